"""Where trials are stored: an SQLite file of the run's own, or a PostgreSQL database that several processes share.

A shared study needs to know whose a trial is that is under way. Optuna's heartbeats don't work with `ask`, so there is
a lease of our own: a row for each trial that is worked on, with an owner and a time after which the trial is anyone's.
The owner renews it from a thread; times are the database's. Trials are handed out under one advisory lock, so that two
processes never get the same one, nor more than were asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from amc.errors import RunError, UsageError
from amc.files import disk_trouble, write_atomic

LEASE = 60.0
"""Seconds after which the trial of a silent worker is anyone's."""
MOST_ATTEMPTS = 3
"""A trial whose workers died so many times is not tried again: it may be what kills them."""
LOCK = 0x616D63
"""The key of our advisory lock."""
WAITS = (0.25, 0.5, 1, 2, 4, 8, 15, 15)
"""Seconds between the tries to reach a database that went away."""

STUDY_LIMIT = 2**30
"""Bytes of a study that is only read; it may be a stranger's."""

T = TypeVar("T")

log = logging.getLogger("amc")


# ---- SQLite


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
    """What Optuna logs is of this level at least for the body, and then as before."""
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
        raise RunError(f"{path} can't be read as a study: {_first_line(error)}{way_out}") from None


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
    damage = f"is damaged ({_first_line(found)})"
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


# ---- PostgreSQL


def open_shared(url: str) -> RDBStorage:
    """A PostgreSQL database as Optuna storage, with our table of leases.

    Raises:
        UsageError: it can't be reached or used.
    """
    engine_url = checked_url(url)
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
    try:
        engine = create_engine(engine_url, **options)
        with contextlib.closing(engine.connect()) as connection, connection.begin():
            _lock(connection)  # processes that start at once must not make the tables at once
            storage = RDBStorage(engine_url.render_as_string(hide_password=False), engine_kwargs=options)
            connection.execute(
                text(
                    "CREATE TABLE IF NOT EXISTS amc_leases (trial_id BIGINT PRIMARY KEY, owner TEXT NOT NULL, "
                    "expires DOUBLE PRECISION NOT NULL, attempts INTEGER NOT NULL)"
                )
            )
        engine.dispose()
    except ImportError:
        raise UsageError("--storage postgresql://… needs psycopg: pip install 'amc-pruning-search[postgres]'") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        raise UsageError(
            f"--storage {engine_url.render_as_string(hide_password=True)} can't be used: {_first_line(error)}"
        ) from None
    return storage


def checked_url(url: str) -> URL:
    """A PostgreSQL address for the driver that we have.

    Raises:
        UsageError: it is anything else.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        shown = re.sub(r"://.*@", "://…@", url)
        raise UsageError(f"--storage {shown!r} must be postgresql://USER@HOST:PORT/DATABASE; left out, it is a file")
    return parsed.set(drivername="postgresql+psycopg")


def _lock(connection: Connection) -> None:
    connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))


class Leases:
    """Who works on which trial of a shared study."""

    def __init__(self, storage: RDBStorage, seconds: float = LEASE) -> None:
        self.engine, self.seconds = storage.engine, seconds
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    @contextmanager
    def locked(self) -> Iterator[Connection]:
        """One process at a time; what the body writes through the connection counts once it ends."""
        with self.engine.connect() as connection, connection.begin():
            _lock(connection)
            yield connection

    def free(self, connection: Connection, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the running trials that nobody works on: the lease has run out, or was never taken, or is ours."""
        held = "SELECT trial_id FROM amc_leases WHERE expires > EXTRACT(EPOCH FROM clock_timestamp()) AND owner <> :own"
        taken = {row[0] for row in connection.execute(text(held), {"own": self.owner})}
        return [trial for trial in running if trial._trial_id not in taken]

    def take(self, connection: Connection, trial_id: int) -> int:
        """Makes a trial ours; returns how many times it has been worked on, this time included."""
        row = connection.execute(
            text(
                "INSERT INTO amc_leases VALUES (:id, :own, EXTRACT(EPOCH FROM clock_timestamp()) + :seconds, 1) "
                "ON CONFLICT (trial_id) DO UPDATE SET owner = EXCLUDED.owner, expires = EXCLUDED.expires, "
                "attempts = amc_leases.attempts + CASE WHEN amc_leases.owner = EXCLUDED.owner THEN 0 ELSE 1 END "
                "RETURNING attempts"
            ),
            {"id": trial_id, "own": self.owner, "seconds": self.seconds},
        ).one()
        return int(row[0])

    def ours(self, connection: Connection, trial_id: int) -> bool:
        """Whether nobody has taken the trial over."""
        found = connection.execute(text("SELECT owner FROM amc_leases WHERE trial_id = :id"), {"id": trial_id})
        return found.scalar() == self.owner

    @contextmanager
    def kept(self, trial_id: int) -> Iterator[None]:
        """Renews a lease from a thread while the body works on its trial."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(self.seconds / 4):
                with contextlib.suppress(SQLAlchemyError), self.locked() as connection:
                    if self.ours(connection, trial_id):
                        self.take(connection, trial_id)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(1)  # it may be waiting for a database that is gone


def patiently(step: Callable[[], T]) -> T:
    """What `step` returns; it is tried again for a minute while the database can't be reached, so it must bear that."""
    for wait in WAITS:
        try:
            return step()
        except (StorageInternalError, DBAPIError) as error:
            log.warning("the database can't be reached (%s); trying again in %g s", _first_line(error), wait)
            time.sleep(wait)
    return step()


# ---- either


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


def _first_line(error: Any) -> str:
    cause = getattr(error, "__cause__", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
