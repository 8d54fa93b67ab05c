"""The report of a run: one page, self-contained."""

from __future__ import annotations

from pathlib import Path


def write_report(path: Path) -> None:
    """Writes `report.html` from the files of a run directory."""
