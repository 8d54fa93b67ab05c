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
    run.add_argument(
        "--sweep",
        metavar="COST=LIMIT,LIMIT…",
        help="a run for each of these budgets, in DIR/COST-LIMIT, from one dense model; then their comparison",
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--dry-run", action="store_true", help="only show what would be searched, as `amc groups` does")


def execute(arguments: argparse.Namespace) -> Any:
    """Runs the main job; returns what `result.json` holds."""
    if arguments.dry_run:
        if arguments.resume or arguments.sweep:
            other = "--resume" if arguments.resume else "--sweep"
            raise UsageError(f"--dry-run starts nothing and so has nothing to {other}; leave one of them out")
        return groups.execute(arguments)
    if arguments.resume and not arguments.out:
        raise UsageError("--resume needs --out DIR, the directory of the run to go on with")
    given = given_settings(arguments)
    if arguments.sweep or (arguments.resume and Path(arguments.out, "sweep.json").is_file()):
        return sweep(arguments, given)
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


def sweep(arguments: argparse.Namespace, given: dict[str, Any]) -> Any:
    """Runs or goes on with a sweep; returns what `amc compare` does."""
    if arguments.resume and arguments.sweep:
        raise UsageError("--resume goes on with the budgets that the sweep began with; leave --sweep out")

    from search.display import Display
    from search.sweep import PAGE, finished_runs, go_on, start
    from search.verbs.compare import show

    display = Display(quiet=arguments.quiet, json=arguments.json, verbose=arguments.verbose)
    if arguments.resume:
        path = Path(arguments.out)
        go_on(path, given, display)
    else:
        path = start(given, arguments.sweep, arguments.out, display)
    return {"path": str(path), **show(finished_runs(path), path / PAGE, display)}
