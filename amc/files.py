"""Files that are whole or absent, and JSON that says one thing only.

A file is written under a temporary name in its own folder, synced and renamed, so that a reader never sees a part of
it. JSON from strangers is capped in size; duplicate keys, NaN and infinities are refused, since readers disagree about
them (RFC 8259, sections 4 and 6).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

JSON_LIMIT = 16 * 2**20


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
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike[str], limit: int = JSON_LIMIT) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it can't be read.
        ValueError: it is too large, isn't UTF-8 or JSON, or has a duplicate key, NaN or an infinity.
    """
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
