"""Where trials are stored: an SQLite file of the run's own; a database that processes share is `search.shared`'s.

A file is durable when the process is killed, and one that is only read, perhaps a stranger's, is never touched.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import URL, event

from amc.errors import RunError
from amc.files import disk_trouble, write_atomic

STUDY_LIMIT = 2**30
"""Bytes of a study that is only read; it may be a stranger's."""


def open_storage(path: Path) -> RDBStorage:
    """An SQLite file as Optuna storage, in WAL mode: durable when the process is killed, and quick to commit.

    Raises:
        RunError: the file is damaged or no study; the message says what can be read of it, and nothing is touched.
    """
    if path.exists():
        with _reading(path, going_on=True) as copy:
            for study in copy.get_all_studies():
                copy.get_all_trials(study._study_id, deepcopy=False)  # text that is no JSON shows here, not later
    else:  # whole or not at all: Optuna does not go on with half of its tables
        for suffix in ("-wal", "-shm"):  # SQLite would play another study's log onto this one
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{suffix}").replace(f"{path}.damaged{suffix}")
        write_atomic(path, _empty())
    storage = _sqlite(path, connect_args={"timeout": 60})
    event.listen(storage.engine, "connect", _set_pragmas)
    storage.engine.dispose()  # connections opened so far lack the pragmas
    return storage


@contextmanager
def optuna_says(level: int) -> Iterator[None]:
    """While the body runs, Optuna logs nothing below this level."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(level)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _sqlite(path: Path, **engine: Any) -> RDBStorage:
    return RDBStorage(URL.create("sqlite", database=str(path)).render_as_string(), engine_kwargs=engine)


def _empty() -> bytes:
    """The file of a study without trials. Made in memory: on a disk each of its many tables is synced by itself."""
    storage = RDBStorage("sqlite:///:memory:")
    with closing(storage.engine.raw_connection()) as connection:
        driver: Any = connection.driver_connection
        content: bytes = driver.serialize()
    storage.engine.dispose()
    return content


def _set_pragmas(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def stored_trials(path: Path) -> list[FrozenTrial]:
    """The trials of a run's study.

    Raises:
        RunError: the file is too large, damaged or no study of a run.
    """
    if path.stat().st_size > STUDY_LIMIT:
        raise RunError(f"{path} is larger than {STUDY_LIMIT >> 20} MiB; it was not read")
    with _reading(path) as copy:
        return copy.get_all_trials(copy.get_study_id_from_name("search"), deepcopy=False)


@contextmanager
def _reading(path: Path, *, going_on: bool = False) -> Iterator[RDBStorage]:
    """A copy of a study: even to read a database, SQLite writes beside it, and folds its log into a damaged one.

    going_on: the error also says what can be read of a damaged file, and the way out.

    Raises:
        RunError: the file is damaged, no study, or what the body reads can't be read.
    """
    try:
        with _copied(path) as copy:
            trouble = _trouble(copy, counted=path if going_on else None)
            if trouble:
                raise RunError(f"it {trouble}")
            storage = _sqlite(copy)
            try:
                with optuna_says(optuna.logging.ERROR):
                    yield storage
            finally:
                storage.engine.dispose()
    except Exception as error:  # a broken database fails in as many ways as Optuna and SQLAlchemy have
        if disk_trouble(error):
            raise
        way_out = f". {_way_out(path)}" if going_on else ""
        raise RunError(f"{path} can't be read as a study: {first_line(error)}{way_out}") from None


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    """A copy of an SQLite file in a folder of its own, with what its writer has not yet folded into it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "study.db")
        shutil.copyfile(path, copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{path}-wal", f"{copy}-wal")
        yield copy


def _trouble(path: Path, *, counted: Path | None = None) -> str | None:
    """What is wrong with the copy of an SQLite file, if anything is.

    counted: the file itself, if a damaged one's trials that can still be read are to be counted.
    """
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            strange = database.execute("SELECT name FROM sqlite_master WHERE type IN ('trigger', 'view')").fetchall()
    except Exception as error:  # not only of SQLite: what it says need not be text
        if disk_trouble(error):
            raise
        found, strange = str(error), []
    if strange:
        return f"holds a trigger or a view ({strange[0][0]!r}), so it is not a study that we wrote"
    if found == "ok":
        return None
    damage = f"is damaged ({first_line(found)})"
    return f"{damage}; {_readable(counted)}" if counted else damage


def _way_out(path: Path) -> str:
    there = [suffix for suffix in ("", "-wal", "-shm") if Path(f"{path}{suffix}").exists()]
    moves = "; ".join(f"mv {path.name}{suffix} {path.name}.damaged{suffix}" for suffix in there)
    return (
        f"Move it away ({moves}), put a copy of it back if you have one that is whole, and resume: without a copy, the "
        "search starts again, on the dense weights that it had"
    )


def _readable(path: Path) -> str:
    readable = recoverable(path)
    best = f", the best with a reward of {max(readable.values()):.4f}" if readable else ""
    return f"{len(readable)} finished trials can still be read in it{best}"


def recoverable(path: Path) -> dict[int, float]:
    """Trial number -> reward of the finished trials that can be read in a damaged study; the file isn't touched."""
    found: dict[int, float] = {}
    with _copied(path) as copy, contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(copy)) as database:
        for trial in range(1, 1 + _last_trial(database)):
            with contextlib.suppress(sqlite3.Error, TypeError, ValueError):
                row = database.execute(
                    "SELECT number, value FROM trials JOIN trial_values USING (trial_id) "
                    "WHERE trial_id = ? AND state = 'COMPLETE'",
                    (trial,),
                ).fetchone()
                if row:
                    found[int(row[0])] = float(row[1])
    return found


def _last_trial(database: sqlite3.Connection) -> int:
    """The highest trial id, or a guess where even that can't be read."""
    try:
        return min(int(database.execute("SELECT max(trial_id) FROM trials").fetchone()[0] or 0), 1_000_000)
    except (sqlite3.Error, TypeError, ValueError):
        return 10_000


@contextmanager
def released(study: optuna.Study) -> Iterator[None]:
    """Lets go of a study's database when the body ends; an SQLite file then holds all trials, with no log beside it."""
    try:
        yield
    finally:
        storage = getattr(study._storage, "_backend", study._storage)
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def copy_study(study: optuna.Study, path: Path) -> None:
    """Writes a study into an SQLite file of its own, so that a run's directory holds its trials."""

    def fill(temporary: Path) -> None:
        storage = _sqlite(temporary)
        optuna.copy_study(
            from_study_name=study.study_name,
            from_storage=study._storage,
            to_storage=storage,
            to_study_name="search",
        )
        storage.engine.dispose()

    write_atomic(path, fill)


def first_line(error: Any) -> str:
    """The first line of what an error says; of one that was raised from another, what that one says."""
    cause = getattr(error, "__cause__", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
