"""`amc sensitivity`: accuracy of each group alone at several widths, as a table, a figure, CSV and JSON."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli import add_settings, given_settings
from search.settings import Settings, number, read_value, settings_from, whole

if TYPE_CHECKING:
    from rich.table import Table

    from search.sensitivity import Sensitivity


SETTINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "data": (),
    "search": ("seed",),
    "groups": (),
    "score": ("score_batch", "score_lr", "score_images", "calibration_images", "reconstruct"),
    "device": ("accelerator", "threads"),
}
"""Group of settings -> those that shape an analysis; all of them where none is named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the data, how candidates are scored, and at which keep ratios."""
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--ratios", nargs="+", metavar="RATIO", help="keep ratios (default 0.1 0.25 0.5 0.75 0.9)")
    analysis.add_argument(
        "--steps", default="0", metavar="N", help="steps of fine-tuning before a model is scored (default 0: none)"
    )
    analysis.add_argument("--out", metavar="DIR", help="where the results go (default runs/<time>-<model>-sensitivity)")
    for group, names in SETTINGS.items():
        others = [f.name for f in fields(Settings) if f.metadata["group"] == group and f.name not in names]
        add_settings(parser, (group,), leave_out=others if names else ())


def execute(arguments: argparse.Namespace) -> Any:
    """Runs the analysis, writes it, and returns it as a JSON value."""
    steps = read_value("steps", arguments.steps, {"parse": whole(0)})
    ratios = [read_value("ratios", text, {"parse": number(0.001, 1)}) for text in arguments.ratios or ()]
    settings = settings_from({**given_settings(arguments), "score_steps": steps, "finetune_epochs": 0})

    from search.compose import compose
    from search.display import Display
    from search.run_directory import check_free, check_writable, default_path, writable
    from search.sensitivity import RATIOS, sensitivity, write

    out = Path(arguments.out) if arguments.out else default_path(f"{settings.model}-sensitivity")
    check_free(out)
    check_writable("--out", out)
    display = Display(quiet=arguments.quiet, json=arguments.json)
    setup = compose(settings, budget_required=False, display=display)
    with display.bar(f"scoring {len(setup.structure.groups)} groups alone") as report:
        found = sensitivity(
            setup.problem,
            ratios=ratios or RATIOS,
            seed=settings.seed,
            progress=report,
            source={
                "model": setup.loaded.name,
                "data": setup.data.name,
                "importance": settings.importance,
                "steps": settings.score_steps,
                "images": settings.score_images,
                "seed": settings.seed,
            },
        )
    with writable("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        names = write(found, out)
    display.show(table(found))
    display.show(f"{out}/: {', '.join(names)}")
    return {"path": str(out), **found.model_dump(mode="json")}


def table(found: Sensitivity) -> Table:
    """Groups by keep ratios; the accuracy of each group alone."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = Table(
        title=f"accuracy of each group alone at a keep ratio; dense {found.dense:.4f}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    rows.add_column("group", max_width=46, overflow="fold")
    rows.add_column("channels", justify="right")
    for ratio in found.ratios:
        rows.add_column(f"{ratio:g}", justify="right", no_wrap=True)
    for group in found.groups:
        cells = ["-" if accuracy is None else f"{accuracy:.4f}" for accuracy in group.accuracy]
        rows.add_row(Text(group.name), str(group.channels), *cells)
    return rows
