"""SIGKILL at random operations and moments: nothing finished is lost, and the end is as without a break.

python benchmarks/faults/kills.py                     # 100 kills or a few more, over all strategies
python benchmarks/faults/kills.py --strategy tpe      # all of them on one
python benchmarks/faults/kills.py --main-job          # 20 kills of the real main job, ONNX and report included
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.harness import Ended, Harness, check_whole, finished_trials, harness, words
from search.strategies import STRATEGIES

MAIN_JOB = ["--budget", "flops=0.5", "--trials", "8", "--score-steps", "2", "--finetune-epochs", "1", "--quiet"]
BATCH = 5
"""Kills of the main job that make a line of the output: minutes, and kept if the next ones fail."""


@dataclass(frozen=True)
class Job:
    """What is killed: its command line for a directory, and whether it is the whole program, with a cache of its own.

    A new directory starts the job; one that holds a run goes on with it.
    """

    line: Callable[[Path], list[str]]
    whole: bool = False

    def run(self, server: Harness, out: Path, **more: Any) -> Ended:
        """Starts or resumes it in `out`."""
        cache = out.with_name(f"{out.name}-cache") if self.whole else None
        return server.run(*self.line(out), below=out, cache=cache, **more)


def tiny_job(strategy: str, trials: int = 8) -> Job:
    """A search on the tiny model."""
    return Job(partial(words, strategy=strategy, trials=trials))


def main_line(out: Path) -> list[str]:
    """The main job as a user starts it, but shorter; its dense model is trained within it."""
    resumed = (out / "settings.json").exists()
    return ["search", "--out", str(out), *(["--resume", "--quiet"] if resumed else MAIN_JOB)]


def kill_campaign(server: Harness, job: Job, folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Kills runs at random operations and random times until there were enough; each must end as the unbroken one."""
    rng, whole = random.Random(seed), folder / "whole"
    unbroken = job.run(server, whole)
    assert unbroken.status == 0, unbroken.said
    done, runs = 0, 0
    while done < kills:
        broken = folder / f"broken{runs}"
        runs += 1
        done += _broken_run(server, job, broken, unbroken, rng, kills - done)
        assert (broken / "policy.json").read_bytes() == (whole / "policy.json").read_bytes(), "another policy"
        assert finished_trials(broken) == finished_trials(whole)
        leftovers = {path.name for path in broken.iterdir()} - {path.name for path in whole.iterdir()}
        leftovers -= {".lock", ".owner.json"}  # killed after its last work; the next owner takes them over
        assert not leftovers, leftovers
    return {"kills": done, "runs": runs, "operations": unbroken.operations, "seconds": round(unbroken.seconds, 1)}


def _broken_run(server: Harness, job: Job, out: Path, unbroken: Ended, rng: random.Random, most: int) -> int:
    """Kills a run, and what goes on with it, until it comes to its end; so often, and no more than `most` times."""
    known: dict[int, tuple[float, str]] = {}
    done = 0
    while True:
        moment: dict[str, Any] = {}
        if done < most and rng.random() < 0.6:
            moment = {"fault": "kill", "at": rng.randrange(unbroken.operations)}
        elif done < most:
            moment = {"seconds": rng.uniform(0, unbroken.seconds)}
        ended = job.run(server, out, **moment)
        now = finished_trials(out)
        assert known.items() <= now.items(), "a finished trial was lost or changed"
        known = now
        check_whole(out)
        if ended.status == 0:
            return done
        assert ended.status == -signal.SIGKILL, (ended.status, ended.said)
        done += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--main-job", action="store_true")
    arguments = parser.parse_args()
    if arguments.main_job:
        kills = arguments.kills or 20
        jobs = {f"main job {i}": (Job(main_line, whole=True), BATCH) for i in range(math.ceil(kills / BATCH))}
    else:
        strategies = arguments.strategy or list(STRATEGIES)
        each = math.ceil((arguments.kills or 100) / len(strategies))
        jobs = {strategy: (tiny_job(strategy), each) for strategy in strategies}
    with tempfile.TemporaryDirectory() as folder, harness() as server:
        for i, (name, (job, kills)) in enumerate(jobs.items()):
            found = kill_campaign(server, job, Path(folder, name), kills=kills, seed=arguments.seed + i)
            print(json.dumps({"job": name, **found}), flush=True)


if __name__ == "__main__":
    main()
