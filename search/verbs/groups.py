"""`amc groups`: what can be pruned, what is frozen and why, the range of each budget, and how long a search takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from search.cli import add_settings, given_settings

if TYPE_CHECKING:
    from rich.table import Table

    from search.overview import Overview

OPTIONS = ("model", "data", "search", "groups", "score", "fine-tuning", "device")
WIDTH = 100
SHOWN_MEMBERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a search; those that shape neither the groups nor a trial's time change nothing."""
    add_settings(parser, OPTIONS)


def execute(arguments: argparse.Namespace) -> Any:
    """Prints the overview; returns it as a JSON value."""
    given = given_settings(arguments)

    from search.display import Display
    from search.overview import overview

    display = Display(quiet=arguments.quiet, json=arguments.json)
    found = overview(given, display)
    width = min(WIDTH, display.results.width)
    for part in parts(found, width=width, members=None if arguments.verbose else SHOWN_MEMBERS):
        display.show(part)
    return asdict(found)


def parts(found: Overview, *, width: int = WIDTH, members: int | None = SHOWN_MEMBERS) -> Iterator[Table | str]:
    """The overview for a person, at most `width` columns wide; of each group's members the first `members`."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.inputs.items())
    yield f"{found.model}, data: {found.data or 'none'}, inputs: {shapes}"
    yield _groups(found, width, members)
    if found.frozen:
        yield _frozen(found, width)
    yield _costs(found, width)
    lowest = {cost.cost: cost for cost in found.costs}
    for check in found.budgets:
        if check.reachable is None:
            yield f"{check.budget}: {check.cost} is measured, so that only a search can tell"
        elif check.reachable:
            yield f"{check.budget}: can be reached (the limit is {check.limit:,.10g} of {lowest[check.cost].dense:,})"
        else:
            yield f"{check.budget}: can't be reached; lowest reachable: {_lowest(lowest[check.cost])}"
    if found.estimate:
        estimate = found.estimate
        yield (
            f"search time: about {_duration(estimate.seconds)}, for {estimate.trials} trials of "
            f"{estimate.seconds_per_trial:.2g} s (one took that just now), and the final fine-tuning"
        )
    elif found.data is None:
        yield "search time: give --data to have it estimated"


def _table(title: str, width: int) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=width
    )


def _groups(found: Overview, width: int, members: int | None) -> Table:
    from rich.console import Group as Lines
    from rich.padding import Padding
    from rich.text import Text

    title = (
        f"{len(found.groups)} groups of {sum(group.channels for group in found.groups)} channels; "
        f"{found.prunable:.1%} of the FLOPs can be pruned"
    )
    table = _table(title, width)
    table.add_column("group and members", ratio=1, overflow="fold")
    table.add_column("kind")
    table.add_column("channels", justify="right")
    table.add_column("widths", max_width=14)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    for group in found.groups:
        shown = group.members[:members]
        more = len(group.members) - len(shown)
        listed = Text(", ".join(shown) + (f" and {more} more" if more else ""), style="dim")
        name = Lines(Text(group.name), Padding(listed, (0, 0, 0, 2)))
        table.add_row(name, group.kind, f"{group.channels:,}", group.allowed, f"{group.flops_share:.1%}")
    table.caption = "FLOPs: the share of the dense model's that goes when this group alone is at its smallest width"
    table.caption_justify = "left"
    return table


def _frozen(found: Overview, width: int) -> Table:
    from rich.text import Text

    reasons: dict[str, list[str]] = {}
    for frozen in found.frozen:
        reasons.setdefault(frozen.reason, []).append(frozen.name)
    table = _table(f"frozen: {len(found.frozen)}", width)
    table.add_column("why", ratio=1, overflow="fold")
    table.add_column("what", ratio=1, overflow="fold")
    for reason, names in reasons.items():
        table.add_row(Text(reason), Text(", ".join(names)))  # text, not markup
    return table


def _costs(found: Overview, width: int) -> Table:
    table = _table("what a budget can ask for", min(width, 72))
    for name in ("cost", "dense", "lowest", "lowest / dense"):
        table.add_column(name, justify="left" if name == "cost" else "right", ratio=1)
    for cost in found.costs:
        unit = f" {cost.unit}" if cost.unit else ""
        table.add_row(cost.cost, f"{cost.dense:,}{unit}", f"{cost.lowest:,}{unit}", f"{cost.lowest_fraction:.3f}")
    return table


def _lowest(cost: Any) -> str:
    return (
        f"{cost.cost}={cost.lowest_fraction:.3f} (that is {cost.lowest:,} {cost.unit}".rstrip() + f" of {cost.dense:,})"
    )


def _duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
