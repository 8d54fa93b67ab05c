"""`amc compare RUN…`: several finished runs side by side, and the Pareto front over them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amc.errors import UsageError

if TYPE_CHECKING:
    from search.display import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where a page goes."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument("--out", metavar="FILE.html", help="also write a page with the Pareto front over the runs")


def execute(arguments: argparse.Namespace) -> Any:
    """Compares the runs; returns the result of each, and which are on the front of each cost."""
    page = Path(arguments.out) if arguments.out else None
    if page is not None and page.suffix != ".html":
        raise UsageError(f"--out {page} must end in .html, so that no file of a run is written over by mistake")
    if page is not None and not page.parent.is_dir():
        raise UsageError(f"--out {page}: the folder {page.parent} does not exist; make it first")

    from search.display import Display

    display = Display(quiet=arguments.quiet, json=arguments.json)
    return show([Path(run) for run in arguments.runs], page, display)


def show(paths: Sequence[Path], page: Path | None, display: Display) -> dict[str, Any]:
    """Shows the runs side by side, and writes the page where one is named; returns it all as a JSON value."""
    from search.comparison import compare, write_comparison
    from search.table import comparison_table

    found = compare(paths)
    display.show(comparison_table(found))
    if page is not None:
        write_comparison(found, page)
        display.show(str(page))
    runs = [{"path": str(run.path), **run.result.model_dump(mode="json")} for run in found.runs.values()]
    fronts = {cost: [str(found.runs[name].path) for name in names] for cost, names in found.fronts.items()}
    return {"runs": runs, "front": fronts, "same_dense": found.same_dense, "page": str(page) if page else None}
