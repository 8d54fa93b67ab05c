"""Sensitivity: what each group alone does to the accuracy, at several widths, all others dense.

One group at a time is the cheapest look at where a network has room (Li et al., Pruning Filters for Efficient ConvNets,
ICLR 2017, section 3.2; Han et al., NeurIPS 2015, figure 6). It does not see how groups act together, and candidates are
scored without fine-tuning unless the problem's evaluator does it; so it ranks groups, it does not predict a policy.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amc.documents import read_document
from amc.errors import AmcError, SearchFailed, UsageError
from amc.files import dump_json, write_atomic
from amc.problem import Problem
from amc.seeding import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("amc")

FORMAT = "amc/sensitivity"
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)

Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Scalar = str | int | float | bool | None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class GroupSensitivity(_Strict):
    """One group: `accuracy[i]` is that of the model with this group at `widths[i]`, None where it can't be scored."""

    name: str
    channels: Count
    widths: tuple[Count, ...] = Field(strict=False)  # JSON has no tuples
    accuracy: tuple[float | None, ...] = Field(strict=False)


class Sensitivity(_Strict):
    """Accuracy (or the user's metric, higher is better) of each group alone at several widths.

    dense: with every group at its full width, scored the same way.
    ratios: keep ratios, ascending; a group's `widths[i]` is its allowed width nearest to `ratios[i]`.
    groups: in forward order. source: what was analysed and how (model, importance …), for reading.
    """

    format: Literal["amc/sensitivity"] = "amc/sensitivity"
    version: Literal[1] = 1
    dense: float
    ratios: tuple[Ratio, ...] = Field(strict=False)
    groups: tuple[GroupSensitivity, ...] = Field(strict=False)
    source: dict[str, Scalar] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.ratios or list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError("`ratios` must be different keep ratios, ascending")
        names = [group.name for group in self.groups]
        for group in self.groups:
            if names.count(group.name) > 1:
                raise ValueError(f"the group {group.name!r} appears twice")
            if not len(group.widths) == len(group.accuracy) == len(self.ratios):
                raise ValueError(f"the group {group.name!r} must have a width and an accuracy for each ratio")
            if list(group.widths) != sorted(group.widths) or group.widths[-1] > group.channels:
                raise ValueError(f"`widths` of group {group.name!r} must ascend to at most {group.channels}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `load_sensitivity` reads, whole or not at all; equal results give equal bytes."""
        write_atomic(path, dump_json(self.model_dump(mode="json")))


def load_sensitivity(path: str | os.PathLike[str]) -> Sensitivity:
    """Reads what `Sensitivity.save` wrote.

    Raises:
        UsageError: it can't be read, or holds anything that version 1 of the format doesn't define.
    """
    return read_document(path, Sensitivity, "sensitivity file", UsageError)


def sensitivity(
    problem: Problem,
    *,
    ratios: Iterable[float] = RATIOS,
    seed: int = 0,
    progress: Callable[[int, int, str], object] = lambda done, total, note: None,
    source: dict[str, Scalar] | None = None,
) -> Sensitivity:
    """Scores each group of the problem alone at the widths nearest to `ratios`, in (0, 1].

    The problem's budget plays no part. How a candidate is recovered before it is scored is its evaluator's matter; what
    the problem scored before is not scored again. progress: called with (scored, of how many, group).

    Raises:
        UsageError: a ratio is out of range. SearchFailed: the dense model can't be scored.
    """
    ratios = tuple(sorted(set(ratios)))
    if not ratios or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise UsageError(f"the keep ratios of a sensitivity analysis must be in (0, 1]; got {list(ratios)}")
    dense = problem.budget.dense

    def score(*widths: int) -> float | None:
        with seeded(seed, "evaluate"):
            try:
                return problem.evaluate(widths).accuracy
            except AmcError:
                raise
            except Exception as error:  # as a trial: one that fails is left out
                log.warning("a score failed: %s: %s", type(error).__name__, error)
                return None

    total, done = 1 + len(ratios) * len(dense), 1
    baseline = score(*dense)
    if baseline is None:
        raise SearchFailed(
            "the dense model can't be scored; check that it runs on the data, and try a lower --score-lr"
        )
    progress(done, total, "")
    groups = []
    for i, group in enumerate(problem.groups):
        widths, accuracy = tuple(group.snap(ratio * group.channels) for ratio in ratios), []
        for width in widths:
            accuracy.append(score(*dense[:i], width, *dense[i + 1 :]))
            done += 1
            progress(done, total, group.name)
        groups.append(
            GroupSensitivity(name=group.name, channels=group.channels, widths=widths, accuracy=tuple(accuracy))
        )
    return Sensitivity(dense=baseline, ratios=ratios, groups=tuple(groups), source=source or {})


def as_csv(found: Sensitivity) -> str:
    """A row for each group and width: group, channels, width, keep ratio, accuracy, and how far it is below dense."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("group", "channels", "width", "keep_ratio", "accuracy", "drop"))
    for group in found.groups:
        scored = dict(zip(group.widths, group.accuracy, strict=True))  # ratios may meet in one width
        for width, accuracy in scored.items():
            figures = ("", "") if accuracy is None else (accuracy, found.dense - accuracy)
            writer.writerow((group.name, group.channels, width, width / group.channels, *figures))
    return text.getvalue()


def draw(found: Sensitivity) -> Figure:
    """A heat map: a row a group in forward order, a column a keep ratio, the accuracy as colour and number."""
    import numpy as np
    from matplotlib.figure import Figure

    names = [group.name for group in found.groups]
    values = np.array([group.accuracy for group in found.groups], dtype=float)  # None is NaN, and stays blank
    worst = float(np.nanmin(np.append(values, found.dense)))
    best = float(np.nanmax(np.append(values, found.dense)))
    figure = Figure(figsize=(3 + 0.7 * len(found.ratios), 1.2 + 0.26 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=worst, vmax=max(best, worst + 1e-9))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value < (worst + best) / 2
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", size=7, color="white" if dark else "black")
    axes.set_xticks(range(len(found.ratios)), [f"{ratio:g}" for ratio in found.ratios], size=8)
    axes.set_yticks(range(len(names)), names, size=7)
    axes.set_xlabel("keep ratio of this group, all others dense", size=8)
    axes.set_title(f"accuracy, dense {found.dense:.3f}", size=9)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    return figure


def write(found: Sensitivity, folder: Path) -> list[str]:
    """Writes `sensitivity.json`, `.csv`, `.svg` and `.png` into a folder; returns their names."""
    import matplotlib

    found.save(folder / "sensitivity.json")
    write_atomic(folder / "sensitivity.csv", as_csv(found))
    # Text stays text, and equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": FORMAT}):
        figure = draw(found)
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            write_atomic(
                folder / f"sensitivity.{kind}", partial(figure.savefig, format=kind, dpi=150, metadata=metadata)
            )
    return [f"sensitivity.{kind}" for kind in ("json", "csv", "svg", "png")]
