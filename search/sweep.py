"""`--sweep flops=0.7,0.5,0.3`: one search for each budget, from one dense model, ending in their comparison.

Each budget is a run of its own in `OUT/flops-0.7` and so on, which can be looked at and applied like any other.
What does not depend on the budget is made by the first one and handed on to the others (`SHARED`), and each learns from
the anchors of those before it (`search/anchors.py`).
`OUT/sweep.json` says which budgets there are, so that a sweep that was stopped goes on by `--resume` alone.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from amc.budget import parse_budget
from amc.errors import AmcError, BudgetError, Interrupted, RunError, UsageError
from amc.files import dump_json, write_atomic
from search.anchor_file import hand_on
from search.display import Display
from search.finished import read_document
from search.run_directory import (
    ANCHORS,
    DENSE,
    DENSE_ONNX,
    SENSITIVITY,
    SETTINGS,
    TABLE,
    RunDirectory,
    absent,
    check_free,
    default_path,
    is_unused,
    remove_empty,
    writable,
)
from search.settings import Settings, settings_from

FILE, PAGE = "sweep.json", "compared.html"
SHARED = (DENSE, DENSE_ONNX, TABLE, SENSITIVITY)
"""What a run takes over from another that pruned the same dense model under another budget."""

log = logging.getLogger("amc")


class SweepFile(BaseModel):
    """`sweep.json`: the budgets in their order, as in `--budget`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal["amc/sweep"] = "amc/sweep"
    version: Literal[1] = 1
    budgets: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=1000)]


def budgets_of(text: str) -> list[str]:
    """`flops=0.7,0.5` as `flops=0.7` and `flops=0.5`.

    Raises:
        UsageError, BudgetError: it is not one cost with its limits.
    """
    cost, equals, limits = text.partition("=")
    parts = [part.strip() for part in limits.split(",")]
    if not equals or "=" in limits or not all(parts):
        raise UsageError(f"--sweep {text!r}: write one cost and its limits, as in --sweep flops=0.7,0.5,0.3")
    if len(set(parts)) < len(parts):
        raise UsageError(f"--sweep {text!r} has a limit twice; give each once")
    found = [f"{cost.strip()}={part}" for part in parts]
    for budget in found:
        parse_budget(budget)
    folders = [folder_of(budget) for budget in found]
    if len(set(folders)) < len(folders):
        raise UsageError(f"--sweep {text!r}: two limits would share a folder ({', '.join(folders)}); leave one out")
    return found


def folder_of(budget: str) -> str:
    """`flops-0.7`, a name that stays in its folder whatever the text."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", budget).strip("-.")


def start(given: Mapping[str, Any], text: str, out: str | None, display: Display) -> Path:
    """Runs a new sweep; returns where it is.

    Raises:
        AmcError: as `search` does, and before anything is trained where a budget is out of reach.
    """
    from search.compose import check_reachable, read_data

    budgets = budgets_of(text)
    held = list(given.get("budget", ()))
    settings = [settings_from({**given, "budget": [*held, budget]}) for budget in budgets]
    if settings[0].storage is not None:
        raise UsageError("--sweep with --storage: each budget needs a study of its own; search them one by one")
    check_reachable(settings, read_data(settings[0]))
    path = Path(out) if out else default_path(f"{settings[0].model}-sweep")
    if not _never_began(path, budgets):
        check_free(path)
    made = absent(path)
    with writable("--out", path):
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / FILE, dump_json(SweepFile(budgets=budgets).model_dump()))
    try:
        _run_all(path, dict(zip(budgets, settings, strict=True)), display)
    except AmcError as error:
        if error.exit_status == 2 and [entry.name for entry in path.iterdir()] == [FILE]:  # before anything was made
            (path / FILE).unlink()
            remove_empty(made)
        raise
    return path


def _never_began(path: Path, budgets: Sequence[str]) -> bool:
    """Whether a folder holds what is left of a sweep that was killed before one of its runs wrote its settings."""
    folders = [path / folder_of(budget) for budget in budgets]
    unused = {folder for folder in folders if folder.is_dir() and is_unused(folder)}
    return is_sweep(path) and set(path.iterdir()) <= {path / FILE, *unused}


def go_on(path: Path, given: Mapping[str, Any], display: Display) -> None:
    """Goes on with a sweep: finished runs stay as they are, the one that was stopped is resumed, the others start.

    Raises:
        AmcError: as a resumed run does.
    """
    from search.start import resumed_settings

    budgets = read_document(path / FILE, SweepFile).budgets
    begun = next((budget for budget in budgets if (path / folder_of(budget) / SETTINGS).is_file()), None)
    if begun is None:
        raise RunError(f"the sweep in {path} had not begun; start it again without --resume")
    base = resumed_settings(path / folder_of(begun), given)
    held = [part for part in base.budget if part != begun]
    _run_all(path, {budget: replace(base, budget=(*held, budget)) for budget in budgets}, display)


def is_sweep(path: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (path / FILE).is_file()


def finished_runs(path: Path) -> list[Path]:
    """The runs of a sweep that are finished, in the order of its budgets."""
    budgets = read_document(path / FILE, SweepFile).budgets
    return [path / folder_of(b) for b in budgets if RunDirectory(path / folder_of(b)).finished]


def share(source: Path, target: Path) -> None:
    """Hands what does not depend on the budget on from one run to another that has just begun."""
    for name in SHARED:
        if (source / name).is_file():
            write_atomic(target / name, (source / name).read_bytes())
    hand_on(RunDirectory(source), RunDirectory(target))


def _clear(folder: Path) -> None:
    """Takes back what was shared with a run that was killed before it began."""
    for name in (*SHARED, ANCHORS):
        (folder / name).unlink(missing_ok=True)


def _run_all(path: Path, runs: Mapping[str, Settings], display: Display) -> None:
    """Each run in turn, new or gone on with; one whose measured budget is out of reach is left out, with a warning."""
    from search.job import run_job

    source: Path | None = None
    refused: list[BudgetError] = []
    for number, (budget, settings) in enumerate(runs.items(), 1):
        folder = path / folder_of(budget)
        display.say(f"--- {budget}, {number} of {len(runs)} ---")
        try:
            resume = (folder / SETTINGS).is_file()
            if not resume:
                _clear(folder)
            run_job(settings, out=folder, resume=resume, display=display, shared=None if resume else source)
            source = folder  # the latest: its latency table has learned from all before
        except Interrupted:
            raise Interrupted(f"stopped; go on by: amc search --out {shlex.quote(str(path))} --resume") from None
        except BudgetError as error:
            log.warning("%s is left out: %s", budget, error)
            refused.append(error)
    if len(refused) == len(runs):
        raise refused[0]
