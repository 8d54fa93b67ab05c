"""Does a search that sees latency find better models? At equal measured latency, against the search that sees FLOPs.

    python benchmarks/latency_headline.py --folder runs/headline --model resnet56 --weights resnet56.pt \
        --data imagefolder:DIR --out benchmarks/results/latency-headline.json

One search under `latency=LIMIT`. Then searches under `flops=F`, each F in proportion to what the last policy's latency
missed, until one takes as long as the first one's, timed beside it; the closest is compared. The same once more for
widths that are multiples of `--round-to`, as an engineer who knows the kernels would ask for. All policies are
fine-tuned alike with the same seeds, and scored on the test split. What is done is kept in the folder and not done
again, and a search that was cut short goes on; `--out` gets every figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

import amc
import latency
import search
from amc.data import load_data
from amc.evaluate import accuracy, batches_of, in_memory, recalibrate
from amc.finetune import finetune
from amc.models import load_model

CLOSE = 0.02
"""Latencies that differ by less are equal: as much as measurements do."""


@dataclass(frozen=True)
class Found:
    """A search's policy, and its ONNX file. fraction: of its budget. round_to: its widths are multiples of this."""

    fraction: float
    round_to: int
    folder: Path

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text())

    def flops(self) -> float:
        """Its multiply-accumulates, of the dense model's."""
        result = self.result()
        return float(result["best"]["flops"] / result["dense"]["flops"])

    def policy(self) -> Any:
        return amc.load_policy(self.folder / "policy.json")


def searched(arguments: argparse.Namespace, cost: str, fraction: float, round_to: int = 1) -> Found:
    """The run of a search, made unless it is there."""
    folder = arguments.folder / (f"{cost}-{fraction:.4f}" + (f"-by-{round_to}" if round_to > 1 else ""))
    if not (folder / "result.json").exists():
        search.run(
            model=arguments.model,
            data=arguments.data,
            out=folder,
            resume=(folder / "settings.json").exists(),
            weights=arguments.weights,
            mean=arguments.mean,
            std=arguments.std,
            budget=f"{cost}={fraction:.4f}",
            round_to=round_to,
            trials=arguments.trials,
            strategy=arguments.strategy,
            score_steps=arguments.score_steps,
            score_images=arguments.score_images,
            finetune_epochs=0,
            threads=1,
            quiet=False,
        )
    found = Found(fraction, round_to, folder)
    assert found.result()["best"]["source"] == "search", "without a fine-tune the uniform policy was the better one"
    return found


def ratio(one: Path, other: Path, seconds: float) -> list[float]:
    """Latency of the second ONNX file over the first one's, and its 95 % interval."""
    reading = latency.measure({"dense": one, "other": other}, seconds=seconds)["other"]
    return [round(value, 4) for value in (reading.ratio, *reading.ratio_ci95)]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds; made and written where there is none."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def as_slow(
    arguments: argparse.Namespace, target: Found, fraction: float, round_to: int = 1
) -> tuple[Found, list[float]]:
    """The FLOPs search whose policy's latency is closest to the target's, and its latency over the target's.

    fraction: of the dense model's FLOPs, to try first.
    """
    tried: list[tuple[Found, list[float]]] = []
    for _ in range(arguments.tries):
        found = searched(arguments, "flops", fraction, round_to)
        beside = kept(found.folder / "beside.json", partial(ratio, target.onnx, found.onnx, arguments.seconds))
        tried.append((found, beside))
        print(f"{found.folder.name}: {beside[0]:.3f} of the latency search's time {beside[1:]}", flush=True)
        if abs(beside[0] - 1) <= CLOSE:
            break
        fraction = round(min(max(fraction / beside[0], 0.05), 1.0), 4)
    return min(tried, key=lambda pair: abs(pair[1][0] - 1))


def trainer(arguments: argparse.Namespace) -> Callable[[Any, int], dict[str, float]]:
    """A function that fine-tunes a policy with a seed and scores it."""
    data = load_data(arguments.data, mean=arguments.mean, std=arguments.std, seed=0)
    train, test = data.train, data.test
    assert train is not None
    assert test is not None
    dense = load_model(arguments.model, weights=arguments.weights, data=data).model
    calibration = in_memory(train, 512, batch=128)

    def tuned(policy: Any, seed: int) -> dict[str, float]:
        model = amc.apply(dense, policy)
        if arguments.steps:
            finetune(model, train, steps=arguments.steps, lr=0.02, batch=128, augment=("crop", "flip"), seed=seed)
        else:
            recalibrate(model, calibration)
        return {"test": accuracy(model, batches_of(test)), "val": accuracy(model, batches_of(data.val))}

    return tuned


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval of paired differences, by Student's t."""
    values = np.array(differences)
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.inf
    return {"mean": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; what is there is not done again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225])
    parser.add_argument("--latency", type=float, default=0.6, help="limit, of the dense model's")
    parser.add_argument("--flops", type=float, default=0.2, help="the first fraction of FLOPs to be tried")
    parser.add_argument(
        "--round-to", type=int, default=8, help="multiples that the second rival's widths are of; 1: none"
    )
    parser.add_argument("--flops-rounded", type=float, default=0.3, help="the first fraction to be tried with these")
    parser.add_argument("--tries", type=int, default=5, help="searches of each rival, at most")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--score-steps", type=int, default=30)
    parser.add_argument("--score-images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring each policy")
    parser.add_argument("--steps", type=int, default=2000, help="of fine-tuning each policy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    seeing = searched(arguments, "latency", arguments.latency)
    dense = seeing.folder / "dense.onnx"
    share = kept(seeing.folder / "beside.json", partial(ratio, dense, seeing.onnx, arguments.seconds))
    print(f"the latency search's policy takes {share[0]:.3f} of the dense model's time {share[1:]}", flush=True)
    rivals = {"flops": as_slow(arguments, seeing, arguments.flops)}
    if arguments.round_to > 1:
        rivals["flops_rounded"] = as_slow(arguments, seeing, arguments.flops_rounded, arguments.round_to)

    tuned = trainer(arguments)
    policies = {"latency": seeing, **{name: found for name, (found, _) in rivals.items()}}
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows.append({"seed": seed})
        for name, found in policies.items():
            path = found.folder / f"tuned-{arguments.steps}-{seed}.json"
            rows[-1][name] = kept(path, partial(tuned, found.policy(), seed))
            print(f"{name} seed {seed}: {rows[-1][name]}", flush=True)
    result = {
        "model": arguments.model,
        "latency": arguments.latency,
        "latency_policy_over_dense": share,
        "rivals": {
            name: {
                "flops": found.fraction,
                "round_to": found.round_to,
                "over_latency_policy": beside,
                "test_difference": interval([row["latency"]["test"] - row[name]["test"] for row in rows]),
            }
            for name, (found, beside) in rivals.items()
        },
        "widths": {name: found.policy().widths for name, found in policies.items()},
        "steps": arguments.steps,
        "trials": arguments.trials,
        "all_trials": seeing.result()["search"]["trials"],
        "flops": {name: found.flops() for name, found in policies.items()},
        "score_steps": arguments.score_steps,
        "score_images": arguments.score_images,
        "seeds": rows,
        "device": latency.open_device("local").fingerprint(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rivals"]))


if __name__ == "__main__":
    main()
