"""Several processes on one PostgreSQL study, restarted servers, killed workers: no trial lost, none done twice.

python benchmarks/faults/shared.py                    # 8 processes, 160 trials, 2 restarts, 2 kills
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sqlalchemy import text

from benchmarks.faults.postgres import Postgres
from search.shared import LEASE, open_shared

FOR_EVER = 10.0**6
"""Seconds of a lease that runs out only when the campaign ends it."""


def work(url: str, log: Path, trials: int, seconds: float, lease: float) -> None:
    """One worker: the real loop on a problem without a network; every evaluation leaves a line in `log`."""
    from amc.problem import Problem
    from search.shared import Leases
    from search.strategies import make_sampler
    from search.study import open_study, search
    from tests.synthetic import concave

    concave_problem, _ = concave(12)

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    def evaluate(widths: Any) -> float:
        policy = json.dumps(dict(widths))
        note(f"begins\t{os.getpid()}\t{policy}")
        time.sleep(random.Random(policy).uniform(0.5, 1.5) * seconds)
        note(f"ends\t{os.getpid()}\t{policy}")
        return concave_problem.evaluate(widths).accuracy

    problem = Problem(concave_problem.groups, concave_problem.budget, evaluate)
    storage = open_shared(url)
    study = open_study(storage, "search", make_sampler("random", problem, trials=trials, seed=0))
    found = search(problem, study, trials=trials, leases=Leases(storage, lease))
    print(json.dumps({"trials": found.trials, "failed": found.failed, "best": found.best and found.best.reward}))


def campaign(
    folder: Path, *, workers: int, trials: int, restarts: int, kills: int, seconds: float, wait: bool = True
) -> dict[str, Any]:
    """Starts the workers, disturbs them at even distances, and checks what the study holds at the end.

    wait: leases run out as they do in use; else that of a killed worker is ended by hand and no other, so that how busy
    the machine is decides nothing.
    """
    server, log, lease = Postgres(), folder / "log", LEASE if wait else FOR_EVER
    log.touch()
    try:
        line = [sys.executable, __file__, "--work", server.url, str(log), str(trials), str(seconds), str(lease)]
        running = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(workers)]
        events = ["restart"] * restarts + ["kill"] * kills
        random.Random(0).shuffle(events)
        killed = []
        for i, event in enumerate(events):
            while log.read_text().count("ends") < trials * (i + 1) // (len(events) + 2):
                assert any(worker.poll() is None for worker in running), "every worker ended early"
                time.sleep(0.05)
            if event == "kill":
                victim = _evaluating(running, log)
                victim.kill()
                victim.wait()
                killed.append(victim.pid)
                if not wait:
                    _end_leases(server.url, victim.pid)
            else:
                server.stop()
                time.sleep(0.5)
                server.start()
        results = []
        for worker in running:
            out, errors = worker.communicate(timeout=600)
            if worker.pid not in killed:
                assert worker.returncode == 0, errors.decode()[-2000:]
                results.append(json.loads(out))
        return _checked(server.url, log, trials, killed, results)
    finally:
        server.close()


def _end_leases(url: str, worker: int) -> None:
    storage = open_shared(url)
    with storage.engine.begin() as connection:
        ended = text("UPDATE amc_leases SET expires = 0 WHERE owner LIKE :of")
        assert connection.execute(ended, {"of": f"%:{worker}:%"}).rowcount
    storage.engine.dispose()


def _evaluating(running: list[subprocess.Popen[bytes]], log: Path) -> subprocess.Popen[bytes]:
    """A worker that is in the middle of a trial, and is stopped there."""
    while True:
        for worker in running:
            if worker.poll() is None:
                worker.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                lines = [line.split("\t") for line in log.read_text().splitlines()]
                if {int(pid): kind for kind, pid, _ in lines}.get(worker.pid) == "begins":
                    return worker
                worker.send_signal(signal.SIGCONT)
        time.sleep(0.02)


def _checked(url: str, log: Path, trials: int, killed: list[int], results: list[dict[str, Any]]) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState

    storage = open_shared(url)
    study = optuna.load_study(study_name="search", storage=storage)
    ended = [trial for trial in study.trials if trial.state == TrialState.COMPLETE and "repeat" not in trial.user_attrs]
    assert len(ended) == trials, f"{len(ended)} trials were finished, {trials} asked for"
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING)), "a trial was lost"
    assert all(result == results[0] and result["trials"] == trials for result in results)
    done = Counter(line.split("\t")[2] for line in log.read_text().splitlines() if line.startswith("ends"))
    assert set(done) == {json.dumps(trial.user_attrs["widths"]) for trial in ended}
    scored = [trial for trial in study.trials if trial.user_attrs.get("seconds")]
    told = Counter(json.dumps(trial.user_attrs["widths"]) for trial in scored)
    twice = [policy for policy, times in done.items() if times > told[policy]]
    assert not twice, f"trials evaluated twice to the end: {twice}"
    again = log.read_text().count("begins") - len(scored)
    assert again == len(killed), f"{again} trials were begun again, {len(killed)} workers were killed"
    storage.engine.dispose()
    return {"trials": len(ended), "workers": len(results) + len(killed), "killed": len(killed), "begun_again": again}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=5, metavar=("URL", "LOG", "TRIALS", "SECONDS", "LEASE"))
    arguments = parser.parse_args()
    if arguments.work:
        url, log, trials, seconds, lease = arguments.work
        work(url, Path(log), int(trials), float(seconds), float(lease))
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        found = campaign(Path(folder), workers=8, trials=160, restarts=2, kills=2, seconds=1.0)
        print(json.dumps({**found, "seconds": round(time.perf_counter() - begun, 1)}))


if __name__ == "__main__":
    main()
