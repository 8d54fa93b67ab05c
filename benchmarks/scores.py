"""Which cheap score tells which policy will be best after fine-tuning? Rung by rung, on policies whose end is known.

    python benchmarks/scores.py --model resnet20 --weights resnet20.pt --data imagefolder:DIR --policies FILE

FILE is JSON: `{"policies": [{"name": …, "widths": [one a block], "val": …, "test": …}]}`, accuracies after a full
fine-tune that the scores never see. Figures are kept in `benchmarks/results/scores-MODEL.json` as they are made, so the
command can be stopped and started again; `python benchmarks/summary.py` writes `docs/benchmarks.md` from them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from amc.data import IMAGENET_MEAN, IMAGENET_STD
from amc.evaluate import Evaluator, ScoreSettings, grade
from amc.files import write_atomic
from amc.memory import split
from amc.problem import Worth
from search.compose import Setup, compose
from search.settings import settings_from

RESULTS = Path(__file__).parent / "results"
RUNGS = {
    "as sliced": ScoreSettings(steps=0, calibration=0),
    "batch norm recalibrated": ScoreSettings(steps=0),
    "8 steps": ScoreSettings(steps=8),
    "30 steps": ScoreSettings(steps=30),
    "30 steps in bfloat16": ScoreSettings(steps=30, precision=torch.bfloat16),
    "120 steps": ScoreSettings(steps=120),
    "120 steps in bfloat16": ScoreSettings(steps=120, precision=torch.bfloat16),
    "refitted": ScoreSettings(steps=0, reconstruct=True),
    "refitted, 8 steps": ScoreSettings(steps=8, reconstruct=True),
}

PARTS, PARTS_OF_FEW, DRAWS = 25, 20, 20
"""Each of four batches of 500 images is cut into so many; so many of these parts are few images; so many times."""


def main() -> None:
    """Scores every policy by every rung that has no figure yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--weights", "--data", "--policies"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    setup = compose(
        settings_from(
            {
                "model": args.model,
                "weights": args.weights,
                "data": args.data,
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "budget": "flops=0.5",
                "only": ("*.conv1:out",),
                "threads": args.threads,
            }
        )
    )
    path = RESULTS / f"scores-{args.model}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"model": args.model, "policies": {}}
    for policy in json.loads(Path(args.policies).read_text())["policies"]:
        kept["policies"].setdefault(policy["name"], described(setup, policy))
    for rung in args.rungs:
        evaluator = evaluator_of(setup, RUNGS[rung])
        for name, row in kept["policies"].items():
            if "probability" in row["scores"].get(rung, {}):
                continue
            start = time.perf_counter()
            worth = evaluator(setup.problem.named(row["widths"]))
            row["scores"][rung] = {
                "accuracy": worth.accuracy,
                "probability": worth.score,
                "seconds": time.perf_counter() - start,
                "few": few(evaluator.parts),
            }
            write_atomic(path, json.dumps(kept, indent=1) + "\n")
            print(rung, name, *worth, row["test"], flush=True)


def described(setup: Setup, policy: dict[str, Any]) -> dict[str, Any]:
    """What is known of a policy beside its scores."""
    costs = {name: setup.costs[name](policy["widths"]) for name in ("flops", "params")}
    positions = np.array([group.layer.positions for group in setup.problem.groups])
    return {
        "widths": policy["widths"],
        "val": policy["val"],
        "test": policy["test"],
        "activations": int(np.array(policy["widths"]) @ positions),
        **costs,
        "scores": {},
    }


class Recording(Evaluator):
    """Keeps what the latest policy was worth on each part of the images, which are equally large."""

    parts: Sequence[Worth] = ()

    def grade(self, model: nn.Module, parts: int = 1) -> Worth:
        """The mean over the parts."""
        self.parts = [grade(model, [part]) for part in split(self._scored, PARTS)]
        return Worth(*np.mean(self.parts, axis=0).tolist())


def few(parts: Sequence[Worth]) -> dict[str, list[float]]:
    """What a policy is worth on few images, drawn several times; the same ones for every policy."""
    rng, worths = np.random.default_rng(0), np.array(parts)
    drawn = [worths[rng.permutation(len(worths))[:PARTS_OF_FEW]].mean(axis=0) for _ in range(DRAWS)]
    accuracies, probabilities = np.round(drawn, 6).T.tolist()
    return {"accuracy": accuracies, "probability": probabilities}


def evaluator_of(setup: Setup, settings: ScoreSettings) -> Recording:
    """The run's evaluator with another rung's settings."""
    old = setup.evaluator
    return Recording(
        old.model,
        setup.structure,
        setup.order,
        train_split=setup.data.train,
        val_split=setup.data.val,
        settings=settings,
        augment=setup.augment,
        layout=old.layout,
        seed=setup.settings.seed,
    )


if __name__ == "__main__":
    main()
