"""Files that are whole or absent, and JSON that says one thing only.

A file is written under a temporary name in its own folder, synced and renamed, so that a reader never sees a part of
it. JSON from strangers is capped in size; duplicate keys, NaN and infinities are refused, since readers disagree about
them (RFC 8259, sections 4 and 6).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

JSON_LIMIT = 16 * 2**20

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file became larger than the file system or a limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk has an input/output error",
}
_DISK_TEXTS = {
    # SQLite and safetensors' writer say it in words alone
    r"disk is full|no space left": "the disk is full",
    r"unable to open database file": "the disk is full, or does not let a file be opened",
    r"disk i/o error|input/output error": "the disk has an input/output error",
    r"readonly database|read-only file system": "the disk is full, or the file system is read-only",
}


def write_atomic(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> None:
    """Writes `content` (bytes, text, or a function that writes the file it is given) to `path`, whole or not at all."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # of a disk that fails, the first failure is what counts
            temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Makes renames in a folder outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what an exception or one of its causes is about."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return _DISK[error.errno]
        for pattern, said in _DISK_TEXTS.items():
            if re.search(pattern, str(error), re.IGNORECASE):
                return said
        error = error.__cause__ or error.__context__
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike[str], limit: int = JSON_LIMIT) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a file, is too large, isn't UTF-8 or JSON, or has a duplicate key, NaN or
            an infinity.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to must not keep us."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def dump_json(value: Any) -> str:
    """JSON text as we write it: two spaces, no NaN, a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
