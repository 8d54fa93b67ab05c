"""Registries: one plain dict each, name -> (a line of help, "module:attribute"), resolved on use.

`--help` and error messages read the names and lines without importing what is behind them.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from amc.errors import UsageError

Registry = Mapping[str, tuple[str, str]]


def resolve(registry: Registry, name: str, what: str) -> Any:
    """The object registered under `name`.

    Raises:
        UsageError: an unknown name; the message names the nearest ones.
    """
    if name not in registry:
        raise UsageError(f"{what} {name!r} is unknown; {suggest(name, registry)}")
    module, attribute = registry[name][1].split(":")
    return getattr(importlib.import_module(module), attribute)


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'ddpg'? There are: ddpg, nsga2`, for the end of an error message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"{meant}There are: {shown or 'none'}"
