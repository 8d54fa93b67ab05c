"""SIGKILL at random operations and moments: nothing finished is lost, and the end is as without a break.

python benchmarks/faults/kills.py                     # 100 kills or a few more, over all strategies
python benchmarks/faults/kills.py --strategy tpe      # all of them on one
python benchmarks/faults/kills.py --main-job          # 20 kills of the real main job, ONNX and report included
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.harness import ROOT, Harness, check_whole, finished_trials, harness, words
from search.strategies import STRATEGIES

SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


def kill_campaign(
    server: Harness, folder: Path, *, kills: int, seed: int, strategy: str, trials: int = 8
) -> dict[str, Any]:
    """Kills runs at random operations and random times until there were enough; each must end as the unbroken one."""
    rng = random.Random(seed)
    whole = folder / "whole"
    start = time.perf_counter()
    unbroken = server.run(*words(whole, strategy, trials), below=whole)
    duration = time.perf_counter() - start
    assert unbroken.status == 0, unbroken.said
    policy, expected = (whole / "policy.json").read_bytes(), finished_trials(whole)
    done, runs, sites = 0, 0, set()
    while done < kills:
        broken = folder / f"broken{runs}"
        runs += 1
        known: dict[int, tuple[float, str]] = {}
        while True:
            quota = done < kills
            by_operation = quota and rng.random() < 0.6
            ended = server.run(
                *words(broken, strategy, trials),
                below=broken,
                fault="kill" if by_operation else None,
                at=rng.randrange(unbroken.operations) if by_operation else -1,
                seconds=300 if by_operation or not quota else rng.uniform(0, duration),
            )
            now = finished_trials(broken)
            assert known.items() <= now.items(), "a finished trial was lost or changed"
            known = now
            check_whole(broken)
            if ended.status == 0:
                break
            assert ended.status == -signal.SIGKILL, (ended.status, ended.said)
            done += 1
            sites.add(ended.site)
        assert (broken / "policy.json").read_bytes() == policy, "another policy than the unbroken run's"
        assert finished_trials(broken) == expected
        leftovers = {path.name for path in broken.iterdir()} - {path.name for path in whole.iterdir()}
        leftovers -= {".lock", ".owner.json"}  # killed after its last work; the next owner takes them over
        assert not leftovers, leftovers
    return {"strategy": strategy, "kills": done, "runs": runs, "operations": unbroken.operations}


def main_job(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """The same for the main job as a user starts it, its dense model trained within it: a fresh cache each time."""
    options = ["--trials", "8", "--score-steps", "2", "--finetune-epochs", "1", "--budget", "flops=0.5", "--quiet"]

    def start(out: Path, cache: Path) -> subprocess.Popen[bytes]:
        resumed = (out / "settings.json").exists()
        line = [sys.executable, str(ROOT / "search.py"), "--out", str(out)]
        line += ["--resume", "--quiet"] if resumed else options
        return subprocess.Popen(line, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, **SILENT)

    rng = random.Random(seed)
    begun = time.perf_counter()
    child = start(folder / "whole", folder / "cache")
    assert child.wait() == 0, child.stderr and child.stderr.read()
    duration = time.perf_counter() - begun
    policy, expected = (folder / "whole" / "policy.json").read_bytes(), finished_trials(folder / "whole")
    done, runs = 0, 0
    while done < kills:
        out, cache = folder / f"broken{runs}", folder / f"cache{runs}"
        runs += 1
        known: dict[int, tuple[float, str]] = {}
        while True:
            child = start(out, cache)
            try:
                child.wait(rng.uniform(0.1, 1) * duration if done < kills else None)
            except subprocess.TimeoutExpired:
                child.kill()
            status = child.wait()
            now = finished_trials(out)
            assert known.items() <= now.items(), "a finished trial was lost or changed"
            known = now
            check_whole(out)
            if status == 0:
                break
            assert status == -signal.SIGKILL, child.stderr and child.stderr.read()
            done += 1
        assert (out / "policy.json").read_bytes() == policy, "another policy than the unbroken run's"
        assert finished_trials(out) == expected
    return {"kills": done, "runs": runs, "seconds_unbroken": round(duration, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--main-job", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.main_job:
            print(json.dumps(main_job(Path(folder), kills=arguments.kills or 20, seed=arguments.seed)))
            return
        with harness() as server:
            strategies = arguments.strategy or list(STRATEGIES)
            for i, strategy in enumerate(strategies):
                kills = math.ceil((arguments.kills or 100) / len(strategies))
                place = Path(folder, strategy)
                found = kill_campaign(server, place, kills=kills, seed=arguments.seed + i, strategy=strategy)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
