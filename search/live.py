"""A search as one watches it: the best trials so far, what is being scored now, and how long it will go on.

On a terminal this is drawn again and again in one place; elsewhere it is a line now and then. A run that will take long
says so as soon as its first trials have shown it, and how to shorten it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import optuna
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from amc.catalog import ALONE
from amc.problem import Outcome, Problem
from search.display import EVERY, Display, Pace
from search.numbers import duration, maximized, metric_name
from search.shared import patiently
from search.strategies.base import told
from search.study import outcome_of

if TYPE_CHECKING:
    from search.compose import Setup
    from search.settings import Settings
    from search.study import Progress

TOP = 5
LONG = 300.0
"""A run that takes more seconds than this says so at its start."""
BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 36


@dataclass
class SearchView:
    """What is shown of a search, and how.

    metric: what outcomes call accuracy. trials, time_limit: the end of the search, whichever comes first. examples: of
    the training split. earlier: seconds of search before this process.
    """

    display: Display
    problem: Problem
    settings: Settings
    metric: str
    trials: int | None
    time_limit: float | None
    examples: int = 0
    earlier: float = 0.0
    top: list[tuple[int, Outcome]] = field(default_factory=list)
    done: int = 0
    pace: Pace = field(default_factory=Pace)
    _before: int | None = None
    _rung: str = ""
    _warned: bool = False

    def know(self, study: optuna.Study) -> None:
        """Takes in the trials of an earlier round, or of the run that is gone on with."""
        ended = [trial for trial in told(study) if "repeat" not in trial.user_attrs]
        scored = [(i, outcome_of(self.problem, t)) for i, t in enumerate(ended, 1) if t.value is not None]
        met = self.problem.budget.met  # a corrected table may say that one of them is not within the budget
        self.top = _ranked([(i, found) for i, found in scored if met(self.problem.widths(found.widths))])
        self.done, self.earlier = len(ended), float(study.user_attrs.get("seconds", 0.0))

    def trial(self, progress: Progress) -> None:
        """A trial has ended."""
        self._before = self.done if self._before is None else self._before
        self._rung, self.done = "", progress.trials + progress.failed
        if progress.latest is not None:
            self.top = _ranked([*self.top, (self.done, progress.latest)])
        if self.display.verbose:
            said = "failed" if progress.latest is None else self._outcome(progress.latest)
            self.display.progress(f"trial {self.done}: {said}")
        self._warn()
        if not self.display.moving and (self.pace.due() or self.done == self.trials):
            self.display.progress(self._line())

    def step(self, rung: str, done: int, total: int) -> None:
        """A trial is being scored: which rung of its evaluation, and how far that is."""
        self._rung = f"{rung}, step {done} of {total}" if total > 1 else rung
        if not self.display.moving and self.pace.due():
            self.display.progress(f"{self._line()}; trial {self.done + 1}: {self._rung}")

    # ---- how long

    @property
    def per_trial(self) -> float | None:
        """Seconds a trial, of those that this process has seen end."""
        seen = self.done - (self._before or 0)
        return self.pace.elapsed / seen if self._before is not None and seen else None

    @property
    def left(self) -> float | None:
        """Seconds of search to go."""
        ends = [] if self.time_limit is None else [self.time_limit - self.earlier - self.pace.elapsed]
        if self.trials is not None and self.per_trial:
            ends.append((self.trials - self.done) * self.per_trial)
        elif self.trials is not None:
            return None
        return max(min(ends), 0) if ends else None

    def _warn(self) -> None:
        """Says once that the run will take long, as soon as that can be known."""
        if self._warned or self.pace.elapsed < EVERY or not self.per_trial:
            return
        self._warned = True
        left, final = self.left, final_seconds(self.settings, self.per_trial, self.examples)
        if left is not None and left + final > LONG:
            self.display.say(notice(self.per_trial, left, final, self.trials, self.settings))

    # ---- what it looks like

    def _outcome(self, outcome: Outcome) -> str:
        spent = ", ".join(f"{cost} {share:.3f} of dense" for cost, share in self._shares(outcome).items())
        return f"{self.metric} {outcome.accuracy:.4f}" + (f" ({spent})" if spent else "")

    def _shares(self, outcome: Outcome) -> dict[str, float]:
        limits = self.problem.budget.limits
        return {limit.cost.name: outcome.costs[limit.cost.name] / limit.dense for limit in limits if limit.dense}

    def _maximized(self) -> str:
        return maximized(self.settings.reward, self.metric, self.settings.pareto)

    def _what(self) -> str:
        return f"searching with {self.settings.strategy}"

    def _timing(self) -> str:
        left = self.left
        return duration(self.pace.elapsed) + (f", about {duration(left)} to go" if left else "")

    def _line(self) -> str:
        of = f"/{self.trials}" if self.trials else ""
        name = self._maximized() if self.settings.reward in ALONE and not self.settings.pareto else self.metric
        best = f", best {name} {self.top[0][1].score:.4f}" if self.top else ""
        return f"{self._what()}: {self.done}{of}{best}; {self._timing()}"

    def __rich__(self) -> RenderableType:
        """The bar, the best trials, and what is being scored."""
        parts: list[RenderableType] = [self._bar()]
        if self.top:
            parts.append(self._table())
        if self._rung:
            parts.append(Text(f"trial {self.done + 1}: {self._rung}", style="dim"))
        return Group(*parts)

    def _bar(self) -> Table:
        share = self.done / self.trials if self.trials else self.pace.elapsed / (self.time_limit or 1)
        of = f"{self.done}/{self.trials}" if self.trials else f"{self.done} trials"
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=min(share, 1.0), width=24)
        grid.add_row(self._what(), bar, of, Text(self._timing(), style="dim"))
        return grid

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        rewarded = any(outcome.reward != outcome.accuracy for _, outcome in self.top)
        bars = self.display.messages.encoding.startswith("utf")
        table.add_column("best trials", justify="right", no_wrap=True)
        table.add_column(self.metric, justify="right", no_wrap=True)
        for name in (self._maximized(),) if rewarded else ():
            table.add_column(name, justify="right", no_wrap=True)
        for cost in self._shares(self.top[0][1]):
            table.add_column(f"{cost}, of dense", justify="right", no_wrap=True)
        if bars:
            table.add_column("keep ratio, input to output", no_wrap=True, overflow="crop")
        for i, (number, outcome) in enumerate(self.top):
            figures = [f"{outcome.accuracy:.4f}", *([f"{outcome.reward:.4f}"] if rewarded else [])]
            shares = (f"{share:.3f}" for share in self._shares(outcome).values())
            keep = [self.keep(outcome)] if bars else []
            table.add_row(str(number), *figures, *shares, *keep, style="bold" if i == 0 else "")
        return table

    def keep(self, outcome: Outcome) -> str:
        """The keep ratio of each group in forward order as bars; of many groups, the mean of neighbours."""
        ratios = [
            width / group.channels
            for width, group in zip(self.problem.widths(outcome.widths), self.problem.groups, strict=True)
        ]
        size = -(-len(ratios) // MOST_BARS)
        parts = [ratios[at : at + size] for at in range(0, len(ratios), size)]
        return "".join(BARS[min(int(sum(part) / len(part) * len(BARS)), len(BARS) - 1)] for part in parts)


@contextmanager
def watching(
    setup: Setup,
    study: optuna.Study,
    display: Display,
    trials: int | None,
    time_limit: float | None,
    *,
    passing: bool = False,
) -> Iterator[SearchView]:
    """The view of a search for as long as the body runs; on a terminal its last state stays, unless it is `passing`.

    study: trials that it holds already are in the view.
    """
    train = setup.data.train
    view = SearchView(
        display,
        setup.problem,
        setup.settings,
        metric_name(setup.metric),
        trials,
        time_limit,
        examples=0 if train is None else len(train),
    )
    patiently(lambda: view.know(study)) if setup.settings.storage else view.know(study)
    setup.evaluator.watch = view.step
    try:
        with Live(view, console=display.messages, transient=passing) if display.moving else nullcontext():
            yield view
    finally:
        setup.evaluator.watch = lambda rung, done, total: None


def notice(per_trial: float, left: float, final: float, trials: int | None, settings: Settings) -> str:
    """That a run takes long, and what to do about it."""
    then = f", then about {duration(final)} of fine-tuning" if final >= 1 else ""
    ways = [f"--trials {trials // 4}"] if trials and trials >= 8 else []
    ways += ["--time-limit 5m"] if left > 300 else []
    ways += [f"--score-steps {settings.score_steps // 2}"] if settings.score_steps >= 4 else []
    ways += (
        [f"--finetune-epochs {settings.finetune_epochs // 4}"] if final > 60 and settings.finetune_epochs >= 4 else []
    )
    return (
        f"this takes a while: about {duration(left)} of search to go, at {duration(per_trial)} a trial{then}. "
        + (f"Shorter: {', '.join(ways)}. " if ways else "")
        + "Ctrl-C stops it; --resume goes on."
    )


def final_seconds(settings: Settings, per_trial: float, examples: int) -> float:
    """Seconds that the two final fine-tunings will take at most, from what a step takes in a trial; 0 if unknown."""
    from search.finish import finetune_steps

    if not settings.score_steps or not settings.finetune_epochs or not examples:
        return 0.0
    step = per_trial / settings.score_steps * settings.finetune_batch / settings.score_batch
    return 2 * step * finetune_steps(settings, examples)


def _ranked(rows: list[tuple[int, Outcome]]) -> list[tuple[int, Outcome]]:
    """The best few, best first; of equals, the earlier."""
    return sorted(rows, key=lambda row: (-row[1].reward, row[0]))[:TOP]
