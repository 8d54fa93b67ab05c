"""What a trial costs beyond the forward passes that it contains: slicing, refitting, copying.

    python benchmarks/trial_cost.py --model resnet20 --weights resnet20.pt --data imagefolder:DIR
    python benchmarks/summary.py

Times of the processor, of trials and of the bare passes on a slim model that is there already, interleaved; the median
of paired ratios. Without training: batch norm is recalibrated on 512 images (or not), 1,000 images are scored.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scores import evaluator_of

from amc.data import IMAGENET_MEAN, IMAGENET_STD
from amc.evaluate import ScoreSettings
from amc.files import write_atomic
from search.compose import compose
from search.settings import settings_from

RESULTS = Path(__file__).parent / "results"
ROUNDS, IMAGES = 15, 1000


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Keeps the ratios in `benchmarks/results/trial-cost-MODEL.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--weights", "--data"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    named = {"model": args.model, "weights": args.weights, "data": args.data, "threads": 1, "budget": "flops=0.5"}
    setup = compose(settings_from({**named, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}))
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    found = {}
    for calibration in (512, 0):
        evaluator = evaluator_of(setup, ScoreSettings(steps=0, images=IMAGES, calibration=calibration))
        ratios = []
        for _ in range(ROUNDS):
            widths = setup.problem.named(
                setup.problem.admit([rng.uniform(1, g.channels) for g in setup.problem.groups])
            )
            model = evaluator.candidate(widths)

            def bare(model: torch.nn.Module = model) -> None:
                evaluator.recalibrate(model)  # noqa: B023
                evaluator.grade(model)  # noqa: B023

            def trial(widths: dict[str, int] = widths) -> None:
                evaluator(widths)  # noqa: B023

            first, second = (bare, trial) if rng.random() < 0.5 else (trial, bare)
            times = {work: seconds(work) for work in (first, second)}
            ratios.append(times[trial] / times[bare])
        found[calibration] = round(float(np.median(ratios)), 3)
        print(f"calibration on {calibration}: a trial takes {found[calibration]:.3f} of its bare passes")
    kept = {"model": args.model, "images": IMAGES, "rounds": ROUNDS, "over_bare_passes": found}
    write_atomic(RESULTS / f"trial-cost-{args.model}.json", json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
