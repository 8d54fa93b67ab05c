"""2,000 trials of an evaluator that costs nothing: what memory grows by, and what a trial costs beside its evaluation.

python benchmarks/faults/soak.py --strategy tpe       # one strategy; without the option, each in turn
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STRATEGIES = ("random", "nsga2", "cmaes", "tpe", "ddpg")


def soak(folder: Path, strategy: str, trials: int) -> dict[str, Any]:
    """Milliseconds a trial round trial 200 and at the end, and MB by which the process grew from trial 200 on."""
    import torch

    from search.storage import open_storage
    from search.strategies import make_sampler
    from search.study import Progress, open_study, search
    from tests.synthetic import concave

    torch.set_num_threads(1)
    problem, _ = concave(20)
    study = open_study(
        open_storage(folder / "study.db"), "search", make_sampler(strategy, problem, trials=trials, seed=0)
    )
    times, memory = [time.perf_counter()], []

    def note(_: Progress) -> None:
        times.append(time.perf_counter())
        if len(times) in (min(200, trials // 2), trials):
            gc.collect()
            memory.append(resident())

    found = search(problem, study, trials=trials, on_trial=note)
    early = min(200, trials // 2)
    window = min(50, early // 2)
    spent = [(times[i] - times[i - window]) / window * 1000 for i in (early, len(times) - 1)]
    return {
        "strategy": strategy,
        "trials": found.trials,
        "ms_early": round(spent[0], 1),
        "ms_late": round(spent[1], 1),
        "grew_mb": round((memory[-1] - memory[0]) / 2**20, 1),
    }


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", action="append")
    parser.add_argument("--trials", type=int, default=2000)
    arguments = parser.parse_args()
    for strategy in arguments.strategy or STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(soak(Path(folder), strategy, arguments.trials)), flush=True)


if __name__ == "__main__":
    main()
