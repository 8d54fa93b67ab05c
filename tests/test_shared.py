"""Several processes on one PostgreSQL study: a small form of `benchmarks/faults/shared.py`."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

from benchmarks.faults.postgres import Postgres, Unavailable
from benchmarks.faults.shared import campaign
from search.shared import MOST_ATTEMPTS, Leases, open_shared
from search.storage import copy_study, open_storage
from search.strategies import make_sampler
from search.study import open_study, search
from tests.synthetic import concave

pytest.importorskip("psycopg", reason="psycopg is not installed (the extra `postgres`)")


@pytest.fixture(scope="module")
def server():
    try:
        server = Postgres()
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield server
    server.close()


def joined(server, name, trials=6):
    problem, storage = concave(6)[0], open_shared(server.url)
    return problem, open_study(storage, name, make_sampler("random", problem, trials=trials, seed=0)), storage


def test_a_restart_and_a_killed_worker_lose_no_trial_and_repeat_none(server, tmp_path):
    try:
        found = campaign(tmp_path, workers=3, trials=18, restarts=1, kills=1, seconds=0.3, wait=False)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert found == {"trials": 18, "workers": 3, "killed": 1, "begun_again": 1}


def test_a_trial_is_one_workers_until_its_lease_runs_out(server):
    _, study, storage = joined(server, "leases")
    mine, theirs = Leases(storage, 600.0), Leases(storage, 600.0)
    trial = study.ask()
    running = study.get_trials(states=(TrialState.RUNNING,))
    with mine.locked() as connection:
        assert mine.take(connection, trial._trial_id) == 1
        assert mine.free(connection, running) == running
    with theirs.locked() as connection:
        assert theirs.free(connection, running) == []
    mine.seconds = -1.0
    with mine.locked() as connection:
        assert mine.take(connection, trial._trial_id) == 1  # renewed, to a time that has passed
    with theirs.locked() as connection:
        assert theirs.free(connection, running) == running
        assert theirs.take(connection, trial._trial_id) == 2
        assert not mine.ours(connection, trial._trial_id)
    storage.engine.dispose()


def test_a_trial_that_kills_its_workers_is_given_up(server):
    problem, study, storage = joined(server, "deadly", trials=2)
    trial = study.ask()
    for _ in range(MOST_ATTEMPTS):
        dead = Leases(storage, -1.0)
        with dead.locked() as connection:
            dead.take(connection, trial._trial_id)
    found = search(problem, study, trials=2, leases=Leases(storage))
    assert (found.trials, found.failed) == (1, 1)
    assert "died" in study.trials[0].user_attrs["error"]
    storage.engine.dispose()


def test_a_shared_study_is_copied_into_the_run(server, tmp_path):
    problem, study, storage = joined(server, "copied")
    search(problem, study, trials=6, leases=Leases(storage))
    copy_study(study, tmp_path / "study.db")
    copy = open_study(open_storage(tmp_path / "study.db"), "search", make_sampler("random", problem, trials=6, seed=0))
    assert [(t.params, t.value, t.user_attrs) for t in copy.trials] == [
        (t.params, t.value, t.user_attrs) for t in study.trials
    ]
    storage.engine.dispose()
