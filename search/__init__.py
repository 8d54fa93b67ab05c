"""Who proposes and who remembers: strategies, the study, the run directory, the command line and the report.

Names load on first use (PEP 562): `--help` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.compose import build
    from search.job import Result, run

_NAMES = {"Result": "job", "build": "compose", "run": "job"}

__all__ = ["Result", "build", "run"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module `search` has no attribute `{name}`")
    return getattr(import_module(f"search.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
