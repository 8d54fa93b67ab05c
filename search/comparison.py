"""Several finished runs side by side: which are beaten by none, at what cost.

A run stands for its final model: what it costs, and its accuracy on the unseen split (on the search split where one of
the runs has no other). Accuracies of different dense models say little about the searches, so that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.finished import FinishedRun, ModelFigures, read_run
from search.numbers import NAMES
from search.report import dense_id, maximized_in, write_page


@dataclass(frozen=True)
class Comparison:
    """Runs by a short name of their own.

    fronts: cost -> the runs on its Pareto front, cheapest first; only costs that every run measured.
    unseen: whether accuracies are those of the unseen split. same_dense: whether all pruned the same dense weights.
    """

    runs: Mapping[str, FinishedRun]
    fronts: Mapping[str, list[str]]
    unseen: bool
    same_dense: bool

    @property
    def metric(self) -> str:
        """What is compared, by its name; `metric` where the runs have different ones."""
        names = {run.result.search.metric for run in self.runs.values()}
        return names.pop() if len(names) == 1 else "metric"

    def accuracy(self, model: ModelFigures) -> float:
        """What the runs are compared by."""
        value = model.test_accuracy if self.unseen else model.accuracy
        assert value is not None
        return value

    def points(self, cost: str) -> dict[str, tuple[float, float]]:
        """Run -> (cost, accuracy) of its final model."""
        return {name: (spent(run.result.best, cost), self.accuracy(run.result.best)) for name, run in self.runs.items()}


def spent(model: ModelFigures, cost: str) -> Any:
    """A model's cost, None where it was not measured."""
    return getattr(model, "latency_ms" if cost == "latency" else cost)


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and finds their Pareto fronts.

    Raises:
        RunError: one of them is not a finished run.
    """
    from search.figures import pareto_front

    unique = list({path.resolve(): path for path in paths}.values())
    runs = dict(zip(short_names(unique), map(read_run, unique), strict=True))
    figures = [model for run in runs.values() for model in (run.result.best, run.result.dense)]
    found = Comparison(
        runs,
        {},
        unseen=all(model.test_accuracy is not None for model in figures),
        same_dense=len({dense_id(run) for run in runs.values()}) == 1,
    )
    measured = [cost for cost in NAMES if all(spent(run.result.best, cost) is not None for run in runs.values())]
    fronts = {}
    for cost in measured:
        points = found.points(cost)
        fronts[cost] = [list(points)[i] for i in pareto_front(list(points.values()))]
    return Comparison(runs, fronts, found.unseen, found.same_dense)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths' last parts, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def write_comparison(found: Comparison, page: Path) -> None:
    """Writes the page of a comparison."""
    from search import figures

    first = next(iter(found.runs.values())).result
    charts = []
    for cost in found.fronts:
        spent_dense = spent(first.dense, cost)
        dense = (spent_dense, found.accuracy(first.dense)) if found.same_dense and spent_dense else None
        charts.append(figures.run_front(cost, found.points(cost), dense, found.metric))
    searched = {name: run.trials for name, run in found.runs.items() if run.trials}
    maximized = {maximized_in(run.result, found.metric) for run in found.runs.values()}
    if searched and len(maximized) == 1:
        charts += [figures.convergence(searched, by, *maximized) for by in ("trial", "minute")]
    notes = [note for run in found.runs.values() for note in run.notes]
    values = {"title": f"{len(found.runs)} runs compared", "found": found, "charts": charts, "notes": notes}
    write_page(page, "compare.html.j2", values)
