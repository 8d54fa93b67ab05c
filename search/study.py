"""The one loop: ask a strategy, evaluate, tell the study, until the trials or the time are used up.

Optuna's storage is the only record of trials. A study that exists is gone on with: its finished trials are told to the
problem's memory, its interrupted ones are closed, and the loop counts on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, event

from amc.errors import AmcError, SearchFailed
from amc.problem import Outcome, Problem
from amc.seeding import seeded
from search.strategies.base import Exhausted, search_space, told

MOST_REPEATS = 50
MOST_FAILURES = 10

log = logging.getLogger("amc")


@dataclass(frozen=True)
class Progress:
    """Where the search stands, after a trial.

    trials: different policies scored. latest, best: outcomes; latest is None where the trial failed.
    """

    trials: int
    failed: int
    seconds: float
    latest: Outcome | None
    best: Outcome | None


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    best: the trial with the highest reward; None if none succeeded.
    trials: different policies scored. failed: trials that could not be scored.
    seconds: search time over all resumes. evaluation_seconds: the part that scoring took.
    """

    best: Outcome | None
    trials: int
    failed: int
    seconds: float
    evaluation_seconds: float


def open_storage(path: Path) -> RDBStorage:
    """An SQLite file as Optuna storage, in WAL mode: durable when the process is killed, and quick to commit."""
    url = URL.create("sqlite", database=str(path)).render_as_string()
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    event.listen(storage.engine, "connect", _set_pragmas)
    storage.engine.dispose()  # connections opened so far lack the pragmas
    return storage


def _set_pragmas(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def open_study(storage: BaseStorage | None, name: str, sampler: BaseSampler) -> optuna.Study:
    """The study of that name, made if it isn't there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
    )


@dataclass
class _Tally:
    """What the loop counts; rebuilt from the study when it is gone on with."""

    best: Outcome | None = None
    trials: int = 0
    failed: int = 0
    evaluation_seconds: float = 0.0
    failed_in_a_row: int = 0
    repeats_in_a_row: int = 0
    last_error: str = ""

    def add(self, outcome: Outcome, seconds: float, *, within: bool = True) -> None:
        self.trials += 1
        self.evaluation_seconds += seconds
        self.failed_in_a_row = self.repeats_in_a_row = 0
        if within and (self.best is None or outcome.reward > self.best.reward):
            self.best = outcome

    def fail(self, error: str) -> None:
        self.failed += 1
        self.failed_in_a_row += 1
        self.last_error = error


def search(
    problem: Problem,
    study: optuna.Study,
    *,
    trials: int | None,
    time_limit: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Progress], object] = lambda _: None,
) -> SearchResult:
    """Runs the loop until `trials` different policies were scored or failed, or `time_limit` seconds have passed.

    Raises:
        SearchFailed: many trials in a row failed.
    """
    tally = _recover(problem, study)
    before, start = float(study.user_attrs.get("seconds", 0.0)), time.perf_counter()
    while True:
        elapsed = before + time.perf_counter() - start
        study.set_user_attr("seconds", elapsed)
        if (trials is not None and tally.trials + tally.failed >= trials) or (time_limit and elapsed >= time_limit):
            break
        if tally.repeats_in_a_row == MOST_REPEATS:
            log.info("the strategy proposed known policies %d times in a row; the search ends", MOST_REPEATS)
            break
        try:
            trial = study.ask(fixed_distributions=search_space(problem))
        except Exhausted as reason:
            log.info("the strategy has no more to propose: %s", reason)
            _close_interrupted(study)
            break
        known = problem.recall(trial.params)
        if known:
            _tell(study, trial, known, seconds=0.0, repeat=True)
            tally.repeats_in_a_row += 1
            continue
        latest = _evaluate(problem, study, trial, seed, tally)
        elapsed = before + time.perf_counter() - start
        on_trial(Progress(tally.trials, tally.failed, elapsed, latest, tally.best))
    return SearchResult(tally.best, tally.trials, tally.failed, elapsed, tally.evaluation_seconds)


def _evaluate(problem: Problem, study: optuna.Study, trial: optuna.Trial, seed: int, tally: _Tally) -> Outcome | None:
    """Scores a trial's policy and tells the study; a trial that can't be scored fails, with its reason."""
    start = time.perf_counter()
    try:
        with seeded(seed, "evaluate"):
            outcome = problem.evaluate(trial.params)
    except AmcError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:1000]
        log.warning("trial %d failed: %s", trial.number, reason)
        trial.set_user_attr("error", reason)
        study.tell(trial, state=TrialState.FAIL)
        tally.fail(reason)
        if tally.failed_in_a_row == MOST_FAILURES:
            raise SearchFailed(
                f"{MOST_FAILURES} trials in a row failed, the last one with {reason}. Check that the model runs on the "
                "data, and try a lower --score-lr"
            ) from error
        return None
    seconds = time.perf_counter() - start
    _tell(study, trial, outcome, seconds=seconds)
    tally.add(outcome, seconds)
    return outcome


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome, *, seconds: float, **more: Any) -> None:
    attributes = {
        "widths": dict(outcome.widths),
        "accuracy": outcome.accuracy,
        **outcome.costs,
        "reward": outcome.reward,
        "seconds": seconds,
        **more,
    }
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    study.tell(trial, outcome.reward)


def _recover(problem: Problem, study: optuna.Study) -> _Tally:
    """Closes interrupted trials, tells the problem what the study knows, and counts it."""
    _close_interrupted(study)
    tally = _Tally()
    for trial in told(study):
        if "repeat" in trial.user_attrs:
            continue
        if trial.state == TrialState.COMPLETE:
            outcome = outcome_of(problem, trial)
            problem.remember(outcome)
            within = problem.budget.met(problem.widths(outcome.widths))  # a corrected cost may say that it isn't
            tally.add(outcome, trial.user_attrs["seconds"], within=within)
        else:
            tally.fail(trial.user_attrs.get("error", ""))
    return tally


def outcome_of(problem: Problem, trial: FrozenTrial) -> Outcome:
    """The outcome that a finished trial stored."""
    stored = trial.user_attrs
    costs = {name: stored[name] for name in problem.costs}
    return Outcome(stored["accuracy"], costs, stored["reward"], stored["widths"])


def _close_interrupted(study: optuna.Study) -> None:
    """Trials that never ended are set aside as pruned: no sampler here learns from these."""
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            study.tell(trial.number, state=TrialState.PRUNED)
