"""What a device is: ONNX Runtime sessions, paired measurement, latency tables, remote devices.

Names load on first use (PEP 562): importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "LatencyCost": "cost",
    "LatencyTable": "table",
    "Reading": "paired",
    "build_table": "sampling",
    "measure": "paired",
    "open_device": "device",
    "open_session": "session",
    "policy_files": "files",
    "random_feeds": "session",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module `latency` has no attribute `{name}`")
    return getattr(import_module(f"latency.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
