"""What all figures of a page share: drawn by matplotlib as SVG, coloured by the page.

Each figure is drawn for a light page in a fixed palette, and each colour is then replaced by a CSS variable, so that
the page decides what is readable on its background. Text stays text: it takes the page's font and can be searched. The
colours are those that colour-blind readers tell apart (Okabe and Ito, 2008), and shapes tell the same apart again.
Matplotlib is loaded on use, and no state of the caller's is touched.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

INK, FAINT, GROUND = "#1b1f24", "#d5d9de", "#fefefe"
BEST, UNIFORM, FRONT, TRIAL, DENSE = "#0072b2", "#d55e00", "#009e73", "#7a8594", "#a8578a"
SERIES = (BEST, UNIFORM, FRONT, DENSE, "#b07d00", "#56a0d0", "#50565e")
VARIABLES = {
    INK: "ink",
    FAINT: "grid",
    GROUND: "ground",
    TRIAL: "trial",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}
SMALL, WIDE = (5.4, 3.7), (11.0, 3.9)
"""Inches, at 72 a pixel each on the page; a small figure is readable at the width of a phone."""

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names come from files
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Chart:
    """A figure of the page. note: a line under the title. alt: what it shows, for those who can't see it."""

    name: str
    title: str
    note: str
    alt: str
    svg: Markup
    wide: bool = False


@contextmanager
def drawn(name: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in our style, whatever the user's own is; it becomes SVG when the body ends."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the letter, and draws it
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
        figure.svg = text.getvalue()  # type: ignore[attr-defined]


def chart(figure: Any, name: str, title: str, note: str, alt: str, *, wide: bool = False) -> Chart:
    """What was drawn, once it is SVG."""
    return Chart(name, title, note, alt, _for_page(figure.svg, alt), wide)


def _for_page(svg: str, alt: str) -> Markup:
    """A stand-alone SVG file as a part of a page: without prologue, size, names that clash, or colours of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    size = box[0] if box else ""
    head = f'<svg {size} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(alt)}"'
    svg = re.sub(r"^<svg[^>]*", lambda _: head, svg)
    return Markup(re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, svg))


def _variable(found: re.Match[str]) -> str:
    """`fill: var(--ink, #1b1f24)` for `fill: #1b1f24`; the colours of a colour map stay."""
    known = VARIABLES.get(found[2])
    return f"{found[1]}: var(--{known}, {found[2]})" if known else found[0]
