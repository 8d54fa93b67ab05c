"""The result as a table that fits 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

ROWS = (
    ("accuracy (search split)", "accuracy", "{:.4f}"),
    ("accuracy (test split)", "test_accuracy", "{:.4f}"),
    ("MACs", "flops", "{:,.0f}"),
    ("parameters", "params", "{:,.0f}"),
    ("file size, bytes", "size", "{:,.0f}"),
    ("latency, ms", "latency_ms", "{:.3f}"),
    ("speed-up", "speedup", "{:.2f}x"),
)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Dense, best and uniform side by side; costs with their share of the dense model."""
    dense, best, uniform = summary["dense"], summary["best"], summary["uniform"]
    title = ", ".join(
        f"{limit['cost']} {limit['achieved'] / limit['limit'] * limit['fraction']:.3f} of dense "
        f"({'within' if limit['met'] else 'ABOVE'} {limit['fraction']:.3f})"
        for limit in summary["budget"]
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("dense", f"best ({best['source']})", "uniform"):
        table.add_column(name, justify="right")
    for label, key, form in ROWS:
        cells = [_cell(model.get(key), dense.get(key), key, form) for model in (dense, best, uniform)]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    if best["source"] == "uniform":
        table.caption = "The uniform policy ended better on the search split, so it is what you get."
    return table


def _cell(value: float | None, dense: float | None, key: str, form: str) -> str:
    if value is None:
        return "-"
    share = key in ("flops", "params", "size", "latency_ms") and dense and value != dense
    return form.format(value) + (f" ({value / dense:.3f})" if share and dense else "")
