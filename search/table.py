"""Results as tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from search.numbers import amount, worth_text

if TYPE_CHECKING:
    from search.comparison import Comparison

ROWS = (
    ("{metric} (search split)", "accuracy", "{:.4f}"),
    ("{metric} (test split)", "test_accuracy", "{:.4f}"),
    ("MACs", "flops", "{:,.0f}"),
    ("parameters", "params", "{:,.0f}"),
    ("file size, bytes", "size", "{:,.0f}"),
    ("activations, bytes", "memory", "{:,.0f}"),
    ("latency, ms", "latency_ms", "{:.3f}"),
    ("speed-up", "speedup", "{:.2f}x"),
)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Dense, best and uniform side by side; costs with their share of the dense model."""
    dense, best, uniform = summary["dense"], summary["best"], summary["uniform"]
    table = Table(title="; ".join(map(_limit, summary["budget"])), title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("dense", f"best ({best['source']})", "uniform"):
        table.add_column(name, justify="right", no_wrap=True)
    metric = summary["search"].get("metric") or "accuracy"
    for label, key, form in ROWS:
        cells = [_cell(model.get(key), dense.get(key), key, form) for model in (dense, best, uniform)]
        if any(cell != "-" for cell in cells):
            table.add_row(Text(label.format(metric=metric)), *cells)
    bounds = [model.get("speedup_ci95") for model in (best, uniform)]
    if any(bounds):
        table.add_row("95 % interval", "-", *(f"{ci[0]:.2f} to {ci[1]:.2f}" if ci else "-" for ci in bounds))
    if best["source"] == "uniform":
        table.caption = "The uniform policy ended better on the search split, so it is what you get."
    return table


def _limit(line: Mapping[str, Any]) -> str:
    """What a policy spends of one limit, as a share of the dense model."""
    if line["achieved"] is None or line["met"] is None:
        return f"{line['cost']}: not measured (limit {line['fraction']:.3f} of dense)"
    share = line["achieved"] / line["limit"] * line["fraction"]
    return f"{line['cost']} {share:.3f} of dense ({'within' if line['met'] else 'ABOVE'} {line['fraction']:.3f})"


def _cell(value: float | None, dense: float | None, key: str, form: str) -> str:
    if value is None:
        return "-"
    share = key in ("flops", "params", "size", "memory", "latency_ms") and dense and value != dense
    return form.format(value) + (f" ({value / dense:.3f})" if share and dense else "")


def comparison_table(found: Comparison) -> Table:
    """Runs under each other; a star marks what is on the Pareto front of its cost."""
    split = "unseen split" if found.unseen else "search split"
    headings = {"flops": "FLOPs", "params": "params", "latency": "latency, ms"}
    costs = [cost for cost in headings if cost in found.fronts]
    title = f"{found.metric} on the {split}; * is on the Pareto front of that cost"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", max_width=24)
    table.add_column("strategy", overflow="fold", max_width=12)
    for name in (found.metric, "dense", *(headings[cost] for cost in costs), "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, run in found.runs.items():
        best, dense = run.result.best, run.result.dense
        spent = [_without_unit(amount(found.points(cost)[name][0], cost)) for cost in costs]
        table.add_row(
            Text(name),  # names come from files: text, not markup
            Text(run.result.search.strategy + (", but uniform won" if best.source == "uniform" else "")),
            worth_text(found.accuracy(best), found.metric),
            worth_text(found.accuracy(dense), found.metric),
            *(text + "*" * (name in found.fronts[cost]) for text, cost in zip(spent, costs, strict=True)),
            "-" if best.speedup is None else f"{best.speedup:.2f}x",
        )
    if not found.same_dense:
        table.caption = "These runs did not start from the same dense model."
    return table


def _without_unit(text: str) -> str:
    return text.removesuffix(" MACs").removesuffix(" ms")
