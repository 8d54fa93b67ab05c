"""`amc report RUN`: the page of a finished run, made again from its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run", metavar="RUN", help="run directory")


def execute(arguments: argparse.Namespace) -> Any:
    """Writes `report.html`; returns where it is, and what of the run could not be read."""
    from search.display import Display
    from search.finished import read_run
    from search.report import write_run_report

    run = read_run(Path(arguments.run))
    page = write_run_report(run)
    display = Display(quiet=arguments.quiet, json=arguments.json)
    for note in run.notes:
        display.say(f"left out: {note}")
    display.show(str(page))
    return {"path": str(page), "left_out": list(run.notes)}
