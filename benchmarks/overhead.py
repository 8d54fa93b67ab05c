"""What a trial costs beside its evaluation: asking, telling and storing, for each strategy, up to 1,000 trials.

    python benchmarks/overhead.py                       # what is not yet in benchmarks/results/overhead.json
    python benchmarks/overhead.py --trial-seconds 10    # beside a trial that takes so long

The problem is the surrogate of ResNet-20 (`benchmarks/surrogate.py`), which costs nothing to score; the study is an
SQLite file, as in a run. Times are of the processor, so that other work on the machine doesn't count; what the disk
takes is measured apart, on the clock. A strategy that ends by itself has fewer trials.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.surrogate import NOISE, resnet20  # noqa: E402
from search.storage import open_storage  # noqa: E402
from search.strategies import STRATEGIES, make_sampler  # noqa: E402
from search.study import open_study, search  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
LAST = 100


def measured(strategy: str, trials: int) -> dict[str, Any]:
    """CPU and clock seconds a trial, on average over all trials and over the last ones."""
    problem, _ = resnet20(noise=NOISE)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder, "study.db"))
        study = open_study(storage, "search", make_sampler(strategy, problem, trials=trials, seed=0))
        times.append((time.process_time(), time.perf_counter()))
        search(
            problem, study, trials=trials, on_trial=lambda _: times.append((time.process_time(), time.perf_counter()))
        )
        storage.engine.dispose()
    each = np.diff(np.array(times), axis=0)
    cpu, clock = each.mean(0)
    return {
        "strategy": strategy,
        "trials": len(each),
        "cpu_seconds": round(float(cpu), 4),
        "cpu_seconds_last": round(float(each[-LAST:, 0].mean()), 4),
        "clock_seconds": round(float(clock), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[s for s in STRATEGIES if s != "gp"])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--trial-seconds", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for strategy in args.strategies:
        if not any(row["strategy"] == strategy for row in rows):
            rows.append(measured(strategy, args.trials))
            RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        row = next(row for row in rows if row["strategy"] == strategy)
        share = row["cpu_seconds_last"] / args.trial_seconds
        last = f"{1000 * row['cpu_seconds_last']:.0f} ms: {share:.1%}"
        print(f"{strategy:<12} {row['trials']:>5} trials, the last at {last}")


if __name__ == "__main__":
    main()
