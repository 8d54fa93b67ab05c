"""The search of a run: its study and its sampler, and rounds until the budget is met as measured."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from amc.errors import RunError, UsageError
from amc.problem import Problem
from amc.weights import weights_sha256
from search.anchors import Chooser
from search.compose import Setup
from search.display import Display
from search.executor import done
from search.front import FrontSampler, begin, front_problem, with_front
from search.live import watching
from search.run_directory import STUDY, TABLE, RunDirectory
from search.settings import Settings, shared_names
from search.settle import FINALISTS, ranked, settle
from search.shared import Leases, open_shared
from search.storage import copy_study, open_storage, released
from search.strategies import make_sampler
from search.strategies.moves import MovingSampler
from search.study import Progress, SearchResult, open_study, search
from search.tensorboard import FOLDER as SCALARS
from search.tensorboard import Scalars
from search.warm import policies, warm_start

log = logging.getLogger("amc")

CHECKING = "checking the score by longer fine-tunes"


def search_to_budget(
    directory: RunDirectory, setup: Setup, display: Display
) -> tuple[Setup, SearchResult, dict[str, object]]:
    """Searches until the budget is met as measured.

    Returns the setup of the last round, with its corrected costs, what was found, and what the score is worth.
    """
    rounds = _Rounds(directory, setup, display)
    recording = Scalars(directory / SCALARS, setup.problem) if setup.settings.tensorboard else nullcontext()
    with released(rounds.study), recording as rounds.scalars:
        if rounds.scalars:
            rounds.scalars.catch_up(rounds.study)
        setup, found = settle(setup, rounds.study, rounds.search)
        if rounds.leases:
            copy_study(rounds.study, directory / STUDY)
    if setup.bench is not None:
        setup.bench.table.save(directory / TABLE)
    return setup, found, rounds.chooser.proxy()


class _Rounds:
    """What the rounds of a search have in common: one study, and who chooses the policy that a round ends with."""

    def __init__(self, directory: RunDirectory, setup: Setup, display: Display) -> None:
        self._settings, self._display = setup.settings, display
        self._planned = setup.problem
        self._front = front_problem(setup.settings, setup.problem)
        self.study, self.leases = _open_study(directory, setup, self._sampler(setup.problem))
        _keep_unit(self.study, setup, self.leases)
        if self._front:
            begin(self.study, self._front)
        warm_start(self.study, setup.problem, setup.settings.warm_start, self.leases)
        self.chooser = _chooser(directory, setup)
        self._since = 0
        self.scalars: Scalars | None = None

    def search(self, setup: Setup, trials: int | None, time_limit: float | None) -> SearchResult:
        """One round, under the costs as they are known by now: trials, and anchors that say which of them is best."""
        self.study.sampler = sampler = self._sampler(setup.problem)
        if setup.problem is not self._planned:  # a further round
            self._since = len(self.study.get_trials(deepcopy=False))
        ends = time_limit and time_limit * (1 - self.chooser.share)
        if isinstance(sampler, MovingSampler) and self.chooser.pauses(trials):
            if not self.chooser.begun:
                self._trials(setup, trials, ends, half=True)
            with self._display.bar(CHECKING) as report:
                self.chooser.learn(setup.problem, self.study, trials, report)
            sampler.worth = partial(self.chooser.worth, setup.problem)
        found = self._trials(setup, trials, ends)
        if time_limit and self.chooser.share and not self.chooser.affords(found.trials):
            self.chooser.share = 0.0  # so few trials leave nothing to be spent on anchors
            found = self._trials(setup, trials, time_limit)
        if self._front:
            return with_front(found, self.study, self._front, setup.problem)
        with self._display.bar(CHECKING) as report:
            return self.chooser.choose(setup.problem, self.study, found, report)

    def _sampler(self, problem: Problem) -> BaseSampler:
        name, trials, seed = self._settings.strategy, self._settings.planned_trials(), self._settings.seed
        if self._front:
            return FrontSampler(self._front, name, trials=trials, seed=seed)
        made = make_sampler(name, problem, trials=trials, seed=seed)
        if problem.revised and isinstance(made, MovingSampler):
            made.worth = lambda scored: [one._replace(reward=problem.evaluate(one.widths).reward) for one in scored]
        if problem is not self._planned and isinstance(made, MovingSampler):  # a further round
            made.start_from(problem.widths(one.widths) for one in ranked(problem, self.study)[:FINALISTS])
        return made

    def _trials(
        self, setup: Setup, trials: int | None, time_limit: float | None, *, half: bool = False
    ) -> SearchResult:
        """Goes on until there are so many trials, or half as many."""
        with watching(setup, self.study, self._display, trials, time_limit, passing=half) as view:

            def on_trial(progress: Progress) -> None:
                self._tell(progress)
                view.trial(progress)

            return search(
                self._front or setup.problem,
                self.study,
                trials=trials // 2 if trials and half else trials,
                time_limit=time_limit / 2 if time_limit and half else time_limit,
                seed=self._settings.seed,
                on_trial=on_trial,
                executor=setup.executor,
                leases=self.leases,
                since=self._since,
            )

    def _tell(self, progress: Progress) -> None:
        """The log and TensorBoard of a trial."""
        best, latest = progress.best, progress.latest
        reward = f"reward {latest.reward:.4f}" if latest else "failed"
        known = f"{best.reward:.4f}" if best else "none"
        log.info("trial %d: %s, best %s", progress.trials + progress.failed, reward, known)
        if self.scalars:
            self.scalars.catch_up(self.study)


def _chooser(directory: RunDirectory, setup: Setup) -> Chooser:
    """Who chooses the policy that the search ends with; by the score alone without training examples.

    So it is without score steps, for a front, and in a study that processes share, each of which would make its own.
    """
    settings, evaluator = setup.settings, setup.evaluator
    makes = evaluator.trains and settings.score_steps and not settings.pareto and settings.storage is None
    share = settings.anchor_share if makes else 0.0
    images = min(settings.score_images or len(setup.data.val), len(setup.data.val))
    if setup.data.train is not None:
        images += min(settings.calibration_images, len(setup.data.train))
    rest = images / (3 * settings.score_batch)  # a step is a forward and a backward pass, three of a forward one
    # Ray's workers need not be where the training data are.
    executor = setup.executor if settings.engine == "local" else None
    return Chooser(
        directory,
        executor.submit if executor else lambda widths, steps: done(partial(evaluator.recovered, widths, steps)),
        at_once=executor.workers if executor else 1,
        score_steps=settings.score_steps,
        share=share,
        rest=rest,
    )


def _keep_unit(study: optuna.Study, setup: Setup, leases: Leases | None) -> None:
    """Measured latencies are multiples of one dense reading: the study's first, whichever process made it.

    Raises:
        RunError: the study holds what we did not write.
    """
    latency: Any = setup.costs.get("latency")
    if latency is None or setup.bench is not None:  # none, or predicted by a table, which is kept
        return
    with leases.locked() if leases else nullcontext():
        known = study.user_attrs.get("dense_ms")
        if known is None:
            study.set_user_attr("dense_ms", latency.dense_ms)
        elif isinstance(known, int | float) and 0 < known < math.inf:
            latency.dense_ms = known
        else:
            raise RunError(f"the study's `dense_ms` is no latency that we wrote: {known!r:.100}")


def _open_study(directory: RunDirectory, setup: Setup, sampler: BaseSampler) -> tuple[optuna.Study, Leases | None]:
    """The run's own study, or the one that it shares with other processes, which must have the same settings."""
    settings = setup.settings
    if settings.storage is None:
        if not (directory / STUDY).exists():
            policies(setup.problem, settings.warm_start)  # what can't be read is refused before there is a study
        return open_study(open_storage(directory / STUDY), "search", sampler), None
    storage = open_shared(settings.storage)
    leases, study = Leases(storage), open_study(storage, settings.study, sampler)
    mine = {name: value for name, value in settings.as_json().items() if name in shared_names()}
    mine |= {"data_fingerprint": setup.data.fingerprint, "weights": weights_sha256(setup.loaded.model)}
    with leases.locked():
        theirs = study.user_attrs.get("run")
        defaults = Settings().as_json()  # of what an earlier version knew nothing of
        if theirs is None:
            study.set_user_attr("run", mine)
    for name, value in mine.items():
        if theirs is not None and theirs.get(name, defaults.get(name)) != value:
            raise UsageError(
                f"the study {settings.study!r} in the database was begun with another {name} ({theirs.get(name)!r}, "
                f"not {value!r}); processes that share a study need the same, and another search another --study NAME"
            )
    return study, leases
