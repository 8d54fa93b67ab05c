"""The figures of a report: numbers in, a chart out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search.drawing import BEST, FAINT, FRONT, INK, SERIES, SMALL, TRIAL, UNIFORM, WIDE, Chart, chart, drawn
from search.finished import Anchor, LayerFigures, TrialRecord
from search.numbers import PREFIXES, UNITS, amount, name_of, worth_text

if TYPE_CHECKING:
    from search.sensitivity import Sensitivity

FEW, LEVEL = 14, 8
"""So many names fit in a small figure, and so many of them without being turned up."""

MANY = 3000
"""More marks than this become pixels: one element each would make the page slow."""


def keep_ratios(channels: Mapping[str, int], best: Mapping[str, int], uniform: Mapping[str, int]) -> Chart:
    """AMC's signature figure: the keep ratio of every group in forward order, uniform overlaid."""
    names = [name for name in channels if name in best]
    ratios = [100 * best[name] / channels[name] for name in names]
    even = [100 * uniform[name] / channels[name] for name in names if name in uniform]
    wide = len(names) > FEW
    with drawn("keep-ratios", WIDE if wide else SMALL) as (figure, axes):
        shown = [axes.bar(range(len(names)), ratios, color=BEST, width=0.72, label="best")]
        if len(even) == len(names):
            shown += axes.plot(
                range(len(names)),
                even,
                "D-",
                color=UNIFORM,
                markersize=5 if len(names) <= 40 else 2,
                linewidth=1.2,
                label="uniform",
            )
        _name_groups(axes, names, wide=wide)
        axes.set(ylim=(0, 104), ylabel="keep ratio, %", xlim=(-0.6, len(names) - 0.4))
        figure.legend(handles=shown, loc="outside upper left", ncols=2)
    low, high = min(names, key=lambda n: best[n] / channels[n]), max(names, key=lambda n: best[n] / channels[n])
    alt = (
        f"Keep ratio of {len(names)} groups in forward order as bars, from {best[low]} of {channels[low]} channels in "
        f"{label(low)} to {best[high]} of {channels[high]} in {label(high)}; the uniform policy is overlaid as a line."
    )
    note = "Share of its channels that each group keeps, from the model's input to its output"
    return chart(figure, "keep-ratios", "Where the channels went", note, alt, wide=wide)


def layer_bars(layers: Sequence[LayerFigures], what: str) -> Chart | None:
    """FLOPs (`flops`) or time (`ms`) of every layer before and after, as pairs of bars; None where none is known."""
    rows = [(row.name, getattr(row, f"dense_{what}"), getattr(row, f"best_{what}")) for row in layers]
    rows = [(name, dense or 0.0, best or 0.0) for name, dense, best in rows if dense or best]
    if not rows:
        return None
    most = max(max(dense, best) for _, dense, best in rows)
    scale, prefix = next(((s, p) for s, p in PREFIXES if most >= s), (1.0, "")) if what == "flops" else (1.0, "")
    unit = f"{prefix} MACs".strip() if what == "flops" else "ms"
    name, wide, at = f"layer-{what}", len(rows) > FEW, range(len(rows))
    with drawn(name, WIDE if wide else SMALL) as (figure, axes):
        shown = [
            axes.bar([i - 0.2 for i in at], [row[1] / scale for row in rows], color=TRIAL, width=0.4, label="dense"),
            axes.bar([i + 0.2 for i in at], [row[2] / scale for row in rows], color=BEST, width=0.4, label="best"),
        ]
        _name_groups(axes, [row[0] for row in rows], wide=wide)
        axes.set(ylabel=unit, xlim=(-0.6, len(rows) - 0.4))
        figure.legend(handles=shown, loc="outside upper left", ncols=2)
    largest = max(rows, key=lambda row: row[1])
    title = "FLOPs of every layer" if what == "flops" else "Time of every layer"
    alt = (
        f"{title}, dense and best, of {len(rows)} layers in forward order. The largest dense one is "
        f"{label(largest[0])}: {largest[1] / scale:.4g} {unit} before, {largest[2] / scale:.4g} after."
    )
    note = (
        "Multiply-accumulates at batch 1, before and after"
        if what == "flops"
        else "ONNX Runtime's own profile, before and after; profiling slows it down a little, and fused layers share"
    )
    return chart(figure, name, title, note, alt, wide=wide)


def _name_groups(axes: Any, names: Sequence[str], *, wide: bool, start: float = 0.0) -> None:
    """Names under bars, the first of which is at `start`; of many, some."""
    every, upright = -(-len(names) // 40), wide or len(names) > LEVEL
    places = [start + i for i in range(0, len(names), every)]
    axes.set_xticks(places, [label(name) for name in names[::every]])
    axes.tick_params(axis="x", rotation=90 if upright else 30, labelsize=9)
    for tick in axes.get_xticklabels():
        tick.set_horizontalalignment("center" if upright else "right")
    axes.grid(axis="x", visible=False)


def best_so_far(trials: Sequence[TrialRecord]) -> list[float]:
    """The highest reward up to each trial."""
    best: list[float] = []
    for trial in trials:
        best.append(max(best[-1], trial.reward) if best else trial.reward)
    return best


def convergence(runs: Mapping[str, Sequence[TrialRecord]], by: str, what: str = "accuracy") -> Chart:
    """Best so far by `trial` or by `minute` of search, of one run (with its trials) or of several. what: the reward."""
    name, scale = f"best-by-{by}", _scale(what, (trial.reward for trials in runs.values() for trial in trials))
    with drawn(name, SMALL) as (figure, axes):
        for i, (run, trials) in enumerate(runs.items()):
            x = [t.minutes for t in trials] if by == "minute" else [t.count for t in trials]
            if len(runs) == 1:
                _cloud(axes, x, [scale * trial.reward for trial in trials])
            style = ("-", "--", ":", "-.")[i // len(SERIES) % 4]
            best = [scale * value for value in best_so_far(trials)]
            shown = label(run) if len(runs) > 1 else "best so far"
            axes.plot(x, best, style, color=SERIES[i % len(SERIES)], drawstyle="steps-post", linewidth=2, label=shown)
        axes.set(xlabel="minutes of search" if by == "minute" else "trials", ylabel=_with_percent(label(what), scale))
        figure.legend(loc="outside upper left", ncols=3)
    ends = "; ".join(
        f"{label(run) + ': ' if len(runs) > 1 else ''}{best_so_far(trials)[-1]:.4g} after {len(trials)} trials"
        for run, trials in runs.items()
    )
    alt = f"Best {label(what)} so far, by {by} of the search: {ends}."
    means = " (mean probability of the right class)" if what == "soft accuracy" else ""
    note = f"Highest {label(what)}{means} on the search split, as scored within the search"
    return chart(figure, name, f"Best so far by {by}", note, alt)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the (cost, accuracy) points no other beats: none is cheaper and as accurate, or as cheap and better."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def trade_off(cost: str, trials: Sequence[TrialRecord], dense: float | None, metric: str = "accuracy") -> Chart:
    """Accuracy (or the metric) against one cost over all trials, with the front. dense: the dense model's cost."""
    points = [(trial.costs[cost], trial.accuracy) for trial in trials]
    front = [points[i] for i in pareto_front(points)]
    name, scale = f"trade-off-{cost}", _scale(metric, (accuracy for _, accuracy in points))
    of = (lambda value: 100 * value / dense) if dense else (lambda value: value)
    with drawn(name, SMALL) as (figure, axes):
        floor = _cloud(axes, [of(x) for x, _ in points], [scale * y for _, y in points])
        x, y = [of(x) for x, _ in front], [scale * y for _, y in front]
        axes.plot(x, y, "s-", color=FRONT, markersize=5, drawstyle="steps-post", label="Pareto front")
        axes.set_ylim(bottom=floor)
        unit = UNITS.get(cost, "")
        shown = f"{name_of(cost)}, % of dense" if dense else f"{name_of(cost)}{', ' + unit if unit else ''}"
        axes.set(xlabel=shown, ylabel=_with_percent(label(metric), scale))
        low, high = axes.get_xlim()
        # A hard budget puts all trials at one cost; specks of difference between them should not look like much.
        if dense and high - low < 1:
            axes.set_xlim((low + high - 1) / 2, (low + high + 1) / 2)
        figure.legend(loc="outside upper left", ncols=3)
    ends = " to ".join(
        f"{amount(spent, cost)} at {worth_text(worth, metric)}" for spent, worth in (front[0], front[-1])
    )
    title = f"{capital(metric)} against {name_of(cost)}"
    alt = f"{title} of {len(points)} trials; {len(front)} are on the Pareto front, from {ends}."
    return chart(figure, name, title, "Every trial, as scored within the search", alt)


def run_front(
    cost: str,
    points: Mapping[str, tuple[float, float]],
    dense: tuple[float, float] | None = None,
    metric: str = "accuracy",
) -> Chart:
    """Accuracy against a cost over runs, with the Pareto front. dense: the (cost, accuracy) of what they all pruned."""
    names, values = list(points), list(points.values())
    front = [values[i] for i in pareto_front(values)]
    scale = _scale(metric, (accuracy for _, accuracy in values))
    prefix_scale, prefix = next(((s, p) for s, p in PREFIXES if max(v[0] for v in values) >= s), (1.0, ""))
    with drawn(f"front-{cost}", SMALL) as (figure, axes):
        x, y = [point[0] / prefix_scale for point in front], [scale * point[1] for point in front]
        axes.plot(x, y, "-", color=FRONT, drawstyle="steps-post", linewidth=1.5, label="Pareto front", zorder=1)
        for i, (run, (spent, accuracy)) in enumerate(points.items()):
            marker = "os^vDPX"[i // len(SERIES) % 7] if len(points) > len(SERIES) else "os^vDPX"[i % 7]
            colour = SERIES[i % len(SERIES)]
            axes.plot([spent / prefix_scale], [scale * accuracy], marker, color=colour, markersize=8, label=label(run))
        if dense:
            at = [dense[0] / prefix_scale], [scale * dense[1]]
            axes.plot(*at, "o", color=INK, markerfacecolor="none", markersize=8, label="dense")
        unit = UNITS.get(cost, "")
        axes.set(xlabel=f"{name_of(cost)}, {prefix}{' ' if prefix and unit == 'MACs' else ''}{unit}".rstrip(", "))
        axes.set(ylabel=_with_percent(label(metric), scale))
        figure.legend(loc="outside upper left", ncols=2 if len(points) < 6 else 3, fontsize=9)
    on_it = ", ".join(label(names[i]) for i in pareto_front(values))
    title = f"{capital(metric)} against {name_of(cost)}"
    alt = f"{title} of {len(points)} runs. On the Pareto front: {on_it}."
    return chart(figure, f"front-{cost}", title, "A mark is the result of a run", alt)


def proxy_scatter(anchors: Sequence[Anchor], spearman: float | None, metric: str = "accuracy", steps: int = 0) -> Chart:
    """The score within the search against the accuracy after a fine-tuning of `steps` steps, one point an anchor."""
    scale = _scale(metric, (worth for anchor in anchors for worth in (anchor.score, anchor.accuracy)))
    with drawn("proxy", SMALL) as (figure, axes):
        x, y = [scale * anchor.score for anchor in anchors], [scale * anchor.accuracy for anchor in anchors]
        axes.plot(x, y, "o", color=BEST, markersize=5)
        axes.set(
            xlabel=_with_percent("score in the search", scale),
            ylabel=_with_percent(f"{label(metric)}, fine-tuned", scale),
        )
    rank = "" if spearman is None else f" Their ranks correlate by {spearman:.3f} (Spearman)."
    alt = f"Score in the search against accuracy after fine-tuning, of {len(anchors)} policies.{rank}"
    note = f"{len(anchors)} policies, fine-tuned for longer{f', {steps} steps' if steps else ''}.{rank}"
    return chart(figure, "proxy", "What the score is worth", note, alt)


def latency_scatter(points: Mapping[str, tuple[float, float]], conditions: str = "") -> Chart:
    """Predicted against measured latency in ms, by model; on the diagonal, they agree. conditions: of measuring."""
    with drawn("latency", SMALL) as (figure, axes):
        values = [value for point in points.values() for value in point]
        ends = [0.95 * min(values), 1.05 * max(values)]
        axes.plot(ends, ends, "--", color=TRIAL, linewidth=1, label="equal")
        for i, (name, (predicted, measured)) in enumerate(points.items()):
            colour = SERIES[i % len(SERIES)]
            axes.plot([predicted], [measured], "os^vDPX"[i % 7], color=colour, markersize=7, label=label(name))
        axes.set(xlabel="predicted, ms", ylabel="measured, ms")
        axes.locator_params(nbins=5)
        figure.legend(loc="outside upper left", ncols=3)
    each = "; ".join(f"{label(name)}: {p:.4g} ms predicted, {m:.4g} ms measured" for name, (p, m) in points.items())
    return chart(figure, "latency", "Predicted and measured latency", conditions, f"{each}.")


def sensitivity_map(found: Sensitivity, metric: str = "accuracy") -> Chart:
    """Accuracy (or the metric) of the model with one group alone at several keep ratios, as a heat map."""
    import numpy as np

    scored = {group.name: [a for a in group.accuracy if a is not None] for group in found.groups}
    scale = _scale(metric, (worth for worths in scored.values() for worth in worths))
    grid = scale * np.array([group.accuracy for group in found.groups], dtype=float).T  # None is NaN, and stays blank
    names = [group.name for group in found.groups]
    wide = len(names) > FEW
    with drawn("sensitivity", WIDE if wide else SMALL) as (figure, axes):
        mesh = axes.pcolormesh(grid, cmap="cividis", edgecolors="face", linewidth=0.3, rasterized=grid.size > MANY)
        _name_groups(axes, names, wide=wide, start=0.5)
        axes.set_yticks([i + 0.5 for i in range(len(found.ratios))], [f"{100 * ratio:.3g}" for ratio in found.ratios])
        axes.set(ylabel="keep ratio, %")
        axes.set_facecolor(FAINT)
        axes.grid(visible=False)
        figure.colorbar(mesh, ax=axes, label=_with_percent(label(metric), scale), pad=0.01)
    worst = min((name for name in scored if scored[name]), key=lambda name: min(scored[name]), default="")
    alt = f"{capital(metric)} with one of {len(names)} groups cut alone; the most sensitive is {label(worst)}."
    note = (
        f"{capital(metric)} with one group alone at several keep ratios, all others whole; "
        f"nothing cut, scored the same way: {worth_text(found.dense, metric)}"
    )
    if bool(np.isnan(grid).any()):
        note += "; grey: could not be scored"
    return chart(figure, "sensitivity", "How sensitive each group is", note, alt, wide=wide)


def capital(text: str) -> str:
    """A metric's name at the start of a sentence; one with capitals of its own stays."""
    clean = label(text)
    return clean if any(letter.isupper() for letter in clean) else clean[:1].upper() + clean[1:]


def label(text: str, limit: int = 26) -> str:
    """A name from a file, fit for a figure: printable, one line, its end kept where it is long."""
    clean = "".join(letter if letter.isprintable() else "·" for letter in text)
    return clean if len(clean) <= limit else "…" + clean[1 - limit :]


def _cloud(axes: Any, x: Sequence[float], y: Sequence[float]) -> float | None:
    """Draws every trial as a dot; returns the axis' floor if it has one.

    A few broken policies would press all others into a line, so what is far out (Tukey, 1977: more than three quartile
    ranges below the lower quartile) stands on the floor as a triangle that points down.
    """
    import numpy as np

    low, high = np.quantile(y, [0.25, 0.75])
    fence = low - 3 * (high - low)
    out = [value < fence for value in y]
    inside = [value for value, is_out in zip(y, out, strict=True) if not is_out]
    room = 0.08 * (max(inside) - min(inside) or min(inside) - min(y))
    floor = min(inside) - room if any(out) else None
    many = len(y) > MANY
    dots = [(a, b) for a, b, is_out in zip(x, y, out, strict=True) if not is_out]
    axes.plot(*zip(*dots, strict=True), "o", color=TRIAL, markersize=3.5, label="a trial", rasterized=many)
    if floor is not None:
        below = [a for a, is_out in zip(x, out, strict=True) if is_out]
        style = {"color": TRIAL, "markersize": 5, "label": "a trial far below", "clip_on": False, "rasterized": many}
        axes.plot(below, [floor] * len(below), "v", **style)
        axes.set_ylim(bottom=floor)
    return floor


def _scale(what: str, worths: Iterable[float]) -> int:
    """100 where accuracies are shown, and are shares; a metric of the user's own, or a reward, is shown as it is."""
    return 100 if what in ("accuracy", "soft accuracy") and all(0 <= worth <= 1 for worth in worths) else 1


def _with_percent(what: str, scale: int) -> str:
    return f"{what}, %" if scale == 100 else what
