"""The study's file: damaged, hostile, full or of a stranger, it is reported by what is wrong and stays as it is."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sqlite3
import tempfile
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event

import search as package
from amc.errors import RunError, UsageError
from amc.files import disk_trouble
from search.settings import Settings, without_password
from search.shared import checked_url
from search.storage import open_storage, recoverable, stored_trials
from search.strategies import make_sampler
from search.study import open_study, search
from tests.synthetic import concave


def a_study(path: Path, strategy: str = "random", trials: int = 30) -> None:
    problem = concave(6)[0]
    storage = open_storage(path)
    search(
        problem, open_study(storage, "search", make_sampler(strategy, problem, trials=trials, seed=0)), trials=trials
    )
    storage.engine.dispose()


def killed_study(folder: Path, trials: int = 20) -> None:
    """What a kill leaves of a study: its file, and the trials in the log beside it."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "study.db")
        storage, problem = open_storage(path), concave(6)[0]
        study = open_study(storage, "search", make_sampler("random", problem, trials=trials, seed=0))
        search(problem, study, trials=trials)
        for file in Path(place).iterdir():
            shutil.copy(file, folder)
        storage.engine.dispose()


def test_a_damaged_study_is_reported_with_what_can_be_read_of_it(tmp_path):
    path = tmp_path / "study.db"
    a_study(path)
    content = bytearray(path.read_bytes())
    whole = recoverable(path)
    assert len(whole) == 30
    content[len(content) // 2 :] = os.urandom(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"is damaged .* finished trials can still be read.*mv study.db"):
        open_storage(path)
    assert recoverable(path).items() <= whole.items()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(RunError, match="is damaged"):
        open_storage(path)


def test_a_full_disk_is_not_taken_for_a_damaged_study(tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:5000])
        raise OSError(errno.ENOSPC, "No space left on device")

    a_study(tmp_path / "study.db", trials=2)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as raised:
        stored_trials(tmp_path / "study.db")
    assert disk_trouble(raised.value) == "the disk is full"


def test_a_damaged_study_that_is_refused_stays_as_it_is_with_its_log(tmp_path):
    killed_study(tmp_path)
    path = tmp_path / "study.db"
    path.write_bytes(path.read_bytes()[:-4096])
    (tmp_path / "study.db-shm").unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before["study.db-wal"]) > 0
    with pytest.raises(RunError, match=r"is damaged .* 20 finished trials can still be read") as refused:
        open_storage(path)
    assert "(mv study.db study.db.damaged; mv study.db-wal study.db.damaged-wal)" in str(refused.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_study_that_was_moved_away_leaves_no_log_to_the_next(tmp_path):
    killed_study(tmp_path)
    path, log = tmp_path / "study.db", (tmp_path / "study.db-wal").read_bytes()
    path.rename(tmp_path / "study.db.damaged")
    a_study(path, trials=2)
    assert [trial.number for trial in stored_trials(path)] == [0, 1]
    assert (tmp_path / "study.db.damaged-wal").read_bytes() == log
    assert len(stored_trials(tmp_path / "study.db.damaged")) == 20, "the log is still its own"


def test_a_study_whose_damage_is_no_text_is_refused(tmp_path):
    path = tmp_path / "study.db"
    a_study(path)
    path.write_bytes(path.read_bytes().replace(b"study_directions_1", b"study_directions\xe71"))
    with pytest.raises(RunError, match="is damaged"):
        open_storage(path)


@pytest.mark.parametrize("broken", ["'{'", "CAST(X'7BFF' AS TEXT)"])
def test_a_study_whose_texts_are_no_json_is_refused(tmp_path, capfd, broken):
    path = tmp_path / "study.db"
    a_study(path, trials=2)
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE trial_user_attributes SET value_json = {broken} WHERE key = 'widths'")
    database.close()
    with pytest.raises(RunError, match="can't be read as a study"):
        open_storage(path)
    with pytest.raises(RunError, match="can't be read as a study"):
        stored_trials(path)
    assert capfd.readouterr().err == "", "said once, by the error"


def test_a_study_with_code_of_its_own_is_refused(tmp_path):
    path = tmp_path / "study.db"
    a_study(path, trials=2)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END")
    database.close()
    with pytest.raises(RunError, match="trigger") as refused:
        open_storage(path)
    assert "can still be read" not in str(refused.value), "nothing of it is queried: a view may never end"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("strategy", ["ddpg", "nsga2", "cmaes", "tpe", "random"])
def test_a_pickle_in_the_study_is_never_executed(tmp_path, strategy):
    path, problem = tmp_path / "study.db", concave(6)[0]
    storage = open_storage(path)
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=12, seed=0))
    search(problem, study, trials=6)
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    for trial in study.trials:
        for key in ("cma:optimizer:0", "cma:optimizer", "optimizer", "agent"):
            with storage.engine.begin() as connection:
                connection.exec_driver_sql(
                    "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                    (trial._trial_id, key, json.dumps(bomb.hex())),
                )
    again = open_study(open_storage(path), "search", make_sampler(strategy, problem, trials=12, seed=0))
    search(concave(6)[0], again, trials=12)
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)
    assert (tmp_path / "boom").exists()  # it would have


def test_nothing_of_ours_unpickles_but_the_cifar_reader():
    root = Path(package.__file__).parent.parent
    users = {
        path.relative_to(root).as_posix()
        for folder in ("amc", "search", "latency", "envs")
        for path in (root / folder).rglob("*.py")
        if any(word in path.read_text() for word in ("import pickle", "CmaEsSampler(", "load_replay_buffer"))
    }
    assert users == {"amc/cifar.py"}


@pytest.mark.parametrize(
    ("key", "value"), [("accuracy", "high"), ("accuracy", None), ("widths", {"layer00": 1}), ("flops", True)]
)
def test_trials_that_we_did_not_write_are_refused_by_number(tmp_path, key, value):
    path, problem = tmp_path / "study.db", concave(6)[0]
    a_study(path, trials=3)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = ?", (json.dumps(value), key))
    database.close()
    study = open_study(open_storage(path), "search", make_sampler("random", problem, trials=5, seed=0))
    with pytest.raises(RunError, match=r"trial 0 of the study"):
        search(problem, study, trials=5)


def test_a_full_database_stops_the_search_and_is_gone_on_with(tmp_path):
    path, problem = tmp_path / "study.db", concave(6)[0]
    storage = open_storage(path)
    study = open_study(storage, "search", make_sampler("random", problem, trials=40, seed=0))
    search(problem, study, trials=4)
    full = optuna.storages.RDBStorage(f"sqlite:///{path}")

    def limit(connection, _):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    event.listen(full.engine, "connect", limit)
    full.engine.dispose()
    with pytest.raises(Exception, match=r".*") as raised:
        search(concave(6)[0], open_study(full, "search", make_sampler("random", problem, trials=40, seed=0)), trials=40)
    assert disk_trouble(raised.value) == "the disk is full"
    full.engine.dispose()
    fresh = concave(6)[0]
    again = open_study(open_storage(path), "search", make_sampler("random", fresh, trials=40, seed=0))
    assert search(fresh, again, trials=40).trials == 40
    assert {trial.state for trial in again.trials} == {TrialState.COMPLETE}


@pytest.mark.parametrize("url", ["mysql://x", "sqlite:///x.db", "postgresql", "", "x" * 1000])
def test_another_database_is_refused(url):
    with pytest.raises(UsageError, match="must be postgresql://"):
        checked_url(url)


def test_passwords_stay_out_of_files():
    assert without_password("postgresql://me:secret@db:5432/x?password=other&a=b") == "postgresql://me@db:5432/x?a=b"
    assert "secret" not in json.dumps(Settings(storage="postgresql://me:secret@db/x").as_json())
    with pytest.raises(UsageError) as refused:
        checked_url("mysql://me:secret@db/x")
    assert "secret" not in str(refused.value)
