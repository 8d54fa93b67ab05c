"""`amc search`: the main job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amc.errors import UsageError
from search.cli import add_settings, given_settings
from search.settings import settings_from
from search.verbs import groups


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All settings, and where the run goes."""
    add_settings(parser, groups.OPTIONS)
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run directory (default runs/<time>-<model>)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--dry-run", action="store_true", help="only show what would be searched, as `amc groups` does")


def execute(arguments: argparse.Namespace) -> Any:
    """Runs the main job; returns what `result.json` holds."""
    if arguments.dry_run:
        if arguments.resume:
            raise UsageError("--dry-run starts nothing and so has nothing to --resume; leave one of them out")
        return groups.execute(arguments)
    if arguments.resume and not arguments.out:
        raise UsageError("--resume needs --out DIR, the directory of the run to go on with")
    given = given_settings(arguments)
    settings = None if arguments.resume else settings_from(given)

    from search.display import Display
    from search.job import run_job
    from search.start import resumed_settings
    from search.table import summary_table

    if settings is None:
        settings = resumed_settings(Path(arguments.out), given)
    display = Display(quiet=arguments.quiet, json=arguments.json, verbose=arguments.verbose)
    result = run_job(settings, out=arguments.out, resume=arguments.resume, display=display)
    display.show(summary_table(result.summary))
    display.show(f"{result.path}/: policy.json, model.safetensors, model.onnx, report.html")
    return {**result.summary, "path": str(result.path)}
