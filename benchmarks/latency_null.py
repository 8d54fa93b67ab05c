"""The null test: one model against itself, with random CPU burners beside it; the ratio should be 1.

    python benchmarks/latency_null.py --model resnet56 --runs 40 --burners 2

Prints each ratio with its interval, how many are within 3 % of 1, and how often the interval holds 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import latency


def burn(seed: int) -> None:
    """Take a core for a random while, leave it for a random while."""
    rng = np.random.default_rng(seed)
    while os.getppid() != 1:
        end = time.perf_counter() + rng.exponential(0.05)
        while time.perf_counter() < end:
            pass
        time.sleep(rng.exponential(0.05))


def ratios(model: bytes, runs: int, burners: int, **options: float) -> Iterator[latency.Reading]:
    """Readings of the model against itself."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=burn, args=(seed,), daemon=True) for seed in range(burners)]
    for process in processes:
        process.start()
    try:
        for run in range(runs):
            yield latency.measure({"dense": model, "same": model}, seed=run, **options)["same"]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def export(name: str, folder: Path) -> bytes:
    """A built-in model's ONNX file."""
    import torch

    from amc import architectures
    from amc.export import export_onnx

    torch.manual_seed(0)
    export_onnx(getattr(architectures, name)(), (torch.zeros(1, 3, 32, 32),), folder / "model.onnx")
    return (folder / "model.onnx").read_bytes()


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--burners", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = export(arguments.model, Path(folder))
    found = []
    for reading in ratios(model, arguments.runs, arguments.burners, seconds=arguments.seconds):
        found.append(reading)
        low, high = reading.ratio_ci95
        print(
            f"{reading.ratio:.4f}  [{low:.4f}, {high:.4f}]  {reading.rounds} rounds, drift {reading.drift:.2f}",
            flush=True,
        )
    within = sum(abs(reading.ratio - 1) <= 0.03 for reading in found)
    covered = sum(reading.ratio_ci95[0] <= 1 <= reading.ratio_ci95[1] for reading in found)
    print(json.dumps({"model": arguments.model, "runs": len(found), "within_3_percent": within, "covered": covered}))


if __name__ == "__main__":
    main()
