"""A run that is killed, or whose disk fails, loses nothing: resumed equals unbroken, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from optuna.trial import TrialState

from benchmarks.faults.disk import FAULTS, disk_campaign
from benchmarks.faults.harness import HERE
from benchmarks.faults.kills import kill_campaign, tiny_job
from search.storage import open_storage
from search.strategies import STRATEGIES, make_sampler
from search.study import open_study, search
from tests.synthetic import concave

FACTORIES = ("--model", f"{HERE / 'tiny.py'}:net", "--data", f"{HERE / 'tiny.py'}:data")
RESUME = ("search", "--resume", "--quiet", *FACTORIES, "--out")
"""A copied run is not one whose factories were named on the command line."""


# ---- kills and full disks


def test_ten_kills_lose_nothing_and_change_nothing(server, tmp_path):
    assert kill_campaign(server, tiny_job("ddpg", trials=5), tmp_path, kills=10, seed=1)["kills"] == 10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_or_broken_disk_stops_the_run_and_harms_nothing(server, tmp_path, fault):
    found = disk_campaign(server, tmp_path, fault=fault, every=45, trials=2)
    assert found["stopped and resumed"] >= 3


def test_a_longer_run_that_is_killed_keeps_the_earlier_result_until_the_new_one_is_whole(server, tiny_copy, tmp_path):
    longer = [*RESUME, str(tiny_copy), "--finetune-epochs", "3"]
    twin = Path(shutil.copytree(tiny_copy, tmp_path / "twin"))
    assert server.run(*longer, below=tiny_copy).status == 0
    before = {name: (twin / name).read_bytes() for name in ("policy.json", "model.safetensors", "result.json")}
    again = [str(twin) if word == str(tiny_copy) else word for word in longer]
    operations = server.run(*again, below=twin, fault="kill", at=10**9).operations  # counted to the end
    assert operations > 0
    for at in (20, 60, 100):
        twin = Path(shutil.copytree(tiny_copy, tmp_path / f"twin{at}"))
        for name, content in before.items():
            (twin / name).write_bytes(content)
        again = [str(twin) if word == str(tiny_copy) else word for word in longer]
        ended = server.run(*again, below=twin, fault="kill", at=at)
        after = {name: (twin / name).read_bytes() for name in before if (twin / name).exists()}
        assert ended.status == 0 or after == before or "result.json" not in after
        assert server.run(*RESUME, str(twin), below=twin).status == 0
        assert (twin / "policy.json").read_bytes() == (tiny_copy / "policy.json").read_bytes()


# ---- interrupted trials


PROPOSES = {"uniform": 1, "tilt": 4, "gp": 6}
"""Trials of strategies that propose few, or take seconds for each; 12 of the others."""


def interrupted_after(folder: Path, strategy: str, whole: int, parameters: int) -> None:
    """A study with so many finished trials, and one of which so many parameters were stored when the process died."""
    problem = concave(6)[0]
    storage = open_storage(folder)
    trials = PROPOSES.get(strategy, 12)
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=trials, seed=0))
    search(problem, study, trials=whole)
    trial = study.ask()
    for group in problem.groups[:parameters]:
        trial.suggest_int(group.name, group.floor, group.channels)
    storage.engine.dispose()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parameters", [0, 3, 6])
def test_an_interrupted_trial_is_evaluated_again_in_its_place(tmp_path, strategy, parameters):
    def trials(study):
        return [(t.number, t.state, t.params, t.value, t.user_attrs.get("widths")) for t in study.trials]

    most = PROPOSES.get(strategy, 12)
    problem = concave(6)[0]
    unbroken = open_study(None, "x", make_sampler(strategy, problem, trials=most, seed=0))
    search(problem, unbroken, trials=most)
    interrupted_after(tmp_path / "study.db", strategy, most * 2 // 3, parameters)
    fresh, storage = concave(6)[0], open_storage(tmp_path / "study.db")
    resumed = open_study(storage, "search", make_sampler(strategy, fresh, trials=most, seed=0))
    search(fresh, resumed, trials=most)
    assert trials(resumed) == trials(unbroken)
    assert len(trials(resumed)) == most
    storage.engine.dispose()


def test_failures_and_repeats_are_counted_over_resumes(tmp_path):
    def broken(problem):
        def fail(widths):
            raise RuntimeError("no")

        problem._evaluate = fail
        return problem

    for trials in (4, 8):
        problem = broken(concave(4)[0])
        study = open_study(open_storage(tmp_path / "a"), "search", make_sampler("random", problem, trials=9, seed=0))
        search(problem, study, trials=trials)
    problem = broken(concave(4)[0])
    study = open_study(open_storage(tmp_path / "a"), "search", make_sampler("random", problem, trials=9, seed=0))
    with pytest.raises(Exception, match="10 trials in a row failed"):
        search(problem, study, trials=99)
    assert len(study.get_trials(states=[TrialState.FAIL])) == 10
