"""A run's directory: one owner at a time, every file whole or absent.

The lock is held by the operating system for as long as the process lives, so that a killed run leaves none behind;
the file beside it says who holds it.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from amc.errors import RunError
from amc.files import dump_json, read_json, write_atomic

LOCK, OWNER = ".lock", ".owner.json"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class RunDirectory:
    """The files of one run, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        write_atomic(self / name, dump_json(value))

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
            RunError: it is missing or not what we wrote.
        """
        try:
            return read_json(self / name)
        except (OSError, ValueError) as error:
            raise RunError(f"{self / name} can't be read: {error}") from None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self / "result.json").exists()


def check_free(path: Path) -> None:
    """Raises a RunError unless a new run may use `path`: it doesn't exist, or is an empty folder."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--out {path} is a file; give a folder that doesn't exist yet, or an empty one")
    if path.is_dir() and any(entry.name not in (LOCK, OWNER) for entry in path.iterdir()):
        raise RunError(f"--out {path} exists and is not empty; go on with its run by --resume, or give another folder")


def check_resumable(path: Path) -> None:
    """Raises a RunError unless `path` holds a run."""
    if not (path / "settings.json").is_file():
        raise RunError(
            f"--out {path} holds no run to go on with (there is no settings.json); leave out --resume to start one"
        )


@contextmanager
def owned(path: Path, *, resume: bool) -> Iterator[RunDirectory]:
    """The directory, made if need be, for this process alone, with the log of the run in `run.log`.

    Raises:
        RunError: another process owns it, or it can't be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunError(f"{path} is in use by {_owner(path)}; wait for it, or give another --out") from None
    except OSError as error:
        raise RunError(f"--out {path} can't be written: {error.strerror or error}") from None
    try:
        if not resume:
            check_free(path)
        write_atomic(path / OWNER, dump_json({"pid": os.getpid(), "host": socket.gethostname()}))
        with _logged(path / "run.log"):
            yield RunDirectory(path)
    finally:
        (path / OWNER).unlink(missing_ok=True)
        lock.release()
        (path / LOCK).unlink(missing_ok=True)


def _owner(path: Path) -> str:
    try:
        owner = read_json(path / OWNER)
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    logger, handler = logging.getLogger("amc"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def default_path(model: str) -> Path:
    """`runs/<time>-<model>`, a folder that doesn't exist."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name[-60:]}"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.removesuffix(f'-{number - 1}')}-{number}")
    return path
