"""A run's directory: one owner at a time, every file whole or absent, and what belongs together replaced together.

The lock is held by the operating system for as long as the process lives, so that a killed run leaves none behind;
the file beside it says who holds it. A run's results are made in a folder of their own. One rename of that folder says
that they are complete; whoever owns the directory next moves complete ones into place and drops others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from amc.errors import AmcError, RunError, UsageError
from amc.files import disk_trouble, dump_json, read_json, sync_folder, write_atomic

LOCK, OWNER, LOG = ".lock", ".owner.json", "run.log"
MAKING, COMPLETE = ".making", ".complete"
FINETUNED = ".finetuned-"
"""Models on the way to a result, which the result makes needless."""
SETTINGS, DENSE, DENSE_ONNX, STUDY = "settings.json", "dense.safetensors", "dense.onnx", "study.db"
POLICY, MODEL, MODEL_ONNX = "policy.json", "model.safetensors", "model.onnx"
FRONT = "front-"
"""How the names of a front's policy files begin."""
RESULT, REPORT, TABLE, ANCHORS = "result.json", "report.html", "latency-table.json", "anchors.json"
SENSITIVITY = "sensitivity.json"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_TEMPORARY = re.compile(r"\..*\.tmp(-journal|-wal|-shm)?")


class RunDirectory:
    """The files of one run, by name.

    begun: whether its search has; before, a new run that fails leaves nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = False

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
        return (self / RESULT).exists()

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A folder for the results; they take the place of the run's own when the body ends, all or none."""
        making = self / MAKING
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        yield making
        sync_folder(making)
        making.rename(self / COMPLETE)
        sync_folder(self.path)
        self.settle()

    def settle(self) -> None:
        """Ends what a killed owner began: moves complete results into place, and drops what is half made.

        The result goes last, and an earlier one first, so that nobody takes a mixture for a finished run. The policies
        of a front follow the final one: while that is still to be moved, those in place are of an earlier result.
        """
        complete = self / COMPLETE
        if complete.is_dir():
            names = sorted(
                (entry.name for entry in complete.iterdir()),
                key=lambda name: (name == RESULT, name.startswith(FRONT), name),
            )
            for stale in (RESULT, REPORT):
                if RESULT in names:
                    (self / stale).unlink(missing_ok=True)
            if POLICY in names:
                for path in self.path.glob(f"{FRONT}*.json"):
                    path.unlink()
            for name in names:
                (complete / name).replace(self / name)
            for path in self.path.glob(f"{FINETUNED}*"):
                path.unlink()
            sync_folder(self.path)
            complete.rmdir()
        shutil.rmtree(self / MAKING, ignore_errors=True)
        for entry in self.path.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raises a RunError unless a new run may use `path`: it doesn't exist, or is an empty folder."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--out {path} is a file; give a folder that doesn't exist yet, or an empty one")
    if path.is_dir() and not is_unused(path):
        way = "go on with its run by `amc search --resume`, or give" if (path / SETTINGS).is_file() else "give"
        raise RunError(f"--out {path} exists and is not empty; {way} another folder")


@contextmanager
def writable(option: str, path: Path) -> Iterator[None]:
    """Raises a UsageError that names the option where `path` can't be written."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise UsageError(f"{option} {path} can't be written: {error.strerror or error}") from None


def check_writable(option: str, path: Path) -> None:
    """Raises a UsageError, before any work is done, unless files can be made in `path`; leaves nothing behind."""
    made = absent(path)
    with writable(option, path):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        finally:
            remove_empty(made)


def is_unused(path: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before it wrote its settings."""
    return all(entry.name in (LOCK, OWNER, LOG) or _TEMPORARY.fullmatch(entry.name) for entry in path.iterdir())


def check_resumable(path: Path) -> None:
    """Raises a RunError unless `path` holds a run."""
    if not (path / SETTINGS).is_file():
        raise RunError(
            f"--out {path} holds no run to go on with (there is no settings.json); leave out --resume to start one"
        )


@contextmanager
def owned(path: Path, *, resume: bool) -> Iterator[RunDirectory]:
    """The directory, made if need be, for this process alone, with the log of the run in `run.log`.

    A new run that ends because the user's input or code is at fault, before it searched, leaves nothing behind.

    Raises:
        RunError: another process owns it. UsageError: it can't be made.
    """
    made = absent(path)
    try:
        with writable("--out", path):
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / LOCK, timeout=0)
            lock.acquire()
    except Timeout:
        raise RunError(f"{path} is in use by {_owner(path)}; wait for it, or give another --out") from None
    directory, discard = RunDirectory(path), False
    try:
        if not resume:
            check_free(path)
        write_atomic(path / OWNER, dump_json({"pid": os.getpid(), "host": socket.gethostname()}))
        directory.settle()
        with _logged(path / LOG):
            try:
                yield directory
            except Exception as error:
                ours = error.exit_status != 2 if isinstance(error, AmcError) else disk_trouble(error) or directory.begun
                discard = not ours and not resume and not (path / STUDY).exists()
                raise
    finally:
        with contextlib.suppress(OSError):
            (path / OWNER).unlink(missing_ok=True)
            if discard:
                for name in (SETTINGS, DENSE, DENSE_ONNX, TABLE, ANCHORS, SENSITIVITY, LOG):
                    (path / name).unlink(missing_ok=True)
            (path / LOCK).unlink(missing_ok=True)  # before the release: whoever waits for it sees that it is gone
        lock.release()
        if discard:
            remove_empty(made)


def absent(path: Path) -> list[Path]:
    """The folders that making `path` would make, innermost first: for `remove_empty`."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Removes folders that are empty, innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _owner(path: Path) -> str:
    try:
        owner = read_json(path / OWNER)
        return f"process {int(owner['pid'])} on {str(owner['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class _LogFile(logging.FileHandler):
    """A log that can't be written must not stop the run, nor print tracebacks.

    The logger's level is lowered for it. The caller's handlers are shown what they would have been without it.
    """

    def __init__(self, path: Path, callers_level: int) -> None:
        super().__init__(path, encoding="utf-8")
        self._callers_level = callers_level

    def emit(self, record: logging.LogRecord) -> None:
        """To the file, and on to where it would have gone."""
        super().emit(record)
        root = logging.getLogger()
        if record.levelno >= self._callers_level and root.handlers:
            root.handle(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing: what matters is written elsewhere, and says so when it fails."""


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    logger = logging.getLogger("amc")
    handler, level, propagate = _LogFile(path, logger.getEffectiveLevel()), logger.level, logger.propagate
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.setLevel(logging.INFO)
    logger.propagate = False  # it would carry every line of the file to the caller's handlers
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
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
