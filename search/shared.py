"""A PostgreSQL database that several processes share, and who of them works on which trial.

Optuna's heartbeats don't work with `ask`, so there is a lease of our own: a row for each trial that is worked on, with
an owner and a time after which the trial is anyone's. The owner renews it from a thread; times are the database's.
Trials are handed out under one advisory lock, so that two processes never get the same one, nor more than were asked
for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import URL, Connection, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from amc.errors import UsageError
from search.storage import first_line

LEASE = 60.0
"""Seconds after which the trial of a silent worker is anyone's."""
MOST_ATTEMPTS = 3
"""A trial whose workers died so many times is not tried again: it may be what kills them."""
LOCK = 0x616D63
"""The key of our advisory lock."""
WAITS = (0.25, 0.5, 1, 2, 4, 8, 15, 15)
"""Seconds between the tries to reach a database that went away."""

T = TypeVar("T")

log = logging.getLogger("amc")


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
            f"--storage {engine_url.render_as_string(hide_password=True)} can't be used: {first_line(error)}"
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
            log.warning("the database can't be reached (%s); trying again in %g s", first_line(error), wait)
            time.sleep(wait)
    return step()
