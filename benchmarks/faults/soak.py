"""2,000 trials of an evaluator that costs nothing: what memory grows by, and what a trial costs beside its evaluation.

python benchmarks/faults/soak.py --strategy tpe       # one strategy; without the option, each in turn

Times are of the processor, so that other work on the machine changes little. A strategy that has nothing more to
propose ends earlier; its figures are then of as many trials as there were.
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

from search.strategies import STRATEGIES

EARLY, WINDOW = 200, 50
"""Trial at which the first figures are taken, and over how many trials before it."""


def soak(folder: Path, strategy: str, trials: int) -> dict[str, Any]:
    """Milliseconds a trial up to trial 200 and at the end, and MB by which the process grew in between.

    Of a run of fewer than 400 trials, the early ones are the first half.
    """
    import torch

    from search.storage import open_storage
    from search.strategies import make_sampler
    from search.study import Progress, open_study, search
    from tests.synthetic import concave

    torch.set_num_threads(1)
    problem, _ = concave(20)
    storage = open_storage(folder / "study.db")
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=trials, seed=0))
    times, sizes = [time.process_time()], [resident()]

    def note(_: Progress) -> None:
        times.append(time.process_time())
        if len(times) == EARLY:
            gc.collect()
        sizes.append(resident())

    found = search(problem, study, trials=trials, on_trial=note)
    done = len(times) - 1
    gc.collect()
    sizes[done] = resident()
    storage.engine.dispose()
    early = min(EARLY, max(done // 2, 1))
    window = min(WINDOW, early)
    spent = [(times[at] - times[at - window]) / window * 1000 for at in (early, done)]
    return {
        "strategy": strategy,
        "trials": found.trials,
        "ms_early": round(spent[0], 1),
        "ms_late": round(spent[1], 1),
        "ratio": round(spent[1] / spent[0], 2),
        "grew_mb": round((sizes[done] - sizes[early]) / 2**20, 1),
    }


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--trials", type=int, default=2000)
    arguments = parser.parse_args()
    for strategy in arguments.strategy or STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(soak(Path(folder), strategy, arguments.trials)), flush=True)


if __name__ == "__main__":
    main()
