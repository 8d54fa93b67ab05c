"""The one loop: ask a strategy, evaluate, tell the study, until the trials or the time are used up.

Optuna's storage is the only record of trials. A study that exists is gone on with: its finished trials are told to the
problem's memory and counted, and a trial that was interrupted is evaluated again, in its place and under its number.
So whatever derives from a trial's number and from the trials told before it is as it would have been without a break.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from amc.errors import AmcError, RunError, SearchFailed
from amc.problem import Outcome, Problem
from amc.seeding import seeded
from search.storage import MOST_ATTEMPTS, Leases, patiently
from search.strategies.base import Exhausted, search_space, told

MOST_REPEATS = 50
MOST_FAILURES = 10
POLL = 0.5
"""Seconds between looks at a shared study all of whose trials others work on."""

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


def open_study(storage: BaseStorage | None, name: str, sampler: BaseSampler) -> optuna.Study:
    """The study of that name, made if it isn't there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
    )


@dataclass
class _Tally:
    """What the loop counts, all of it from the trials that were told, in the order of their numbers."""

    best: Outcome | None = None
    trials: int = 0
    failed: int = 0
    evaluation_seconds: float = 0.0
    failed_in_a_row: int = 0
    repeats_in_a_row: int = 0
    last_error: str = ""
    seen: set[int] = field(default_factory=set)

    def learn(self, problem: Problem, study: optuna.Study) -> None:
        """Counts the trials that it has not seen, and tells the problem what they scored."""
        for trial in told(study):
            if trial.number not in self.seen:
                self.seen.add(trial.number)
                self._count(problem, trial)

    def _count(self, problem: Problem, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            self.failed += 1
            self.failed_in_a_row += 1
            self.last_error = str(trial.user_attrs.get("error", ""))[:1000]
            return
        self.failed_in_a_row = 0
        if "repeat" in trial.user_attrs:
            self.repeats_in_a_row += 1
            return
        outcome = outcome_of(problem, trial)
        problem.remember(outcome)
        self.trials += 1
        self.evaluation_seconds += _number(trial, "seconds")
        self.repeats_in_a_row = 0
        # A cost that was corrected since may say that the policy isn't within the budget.
        within = problem.budget.met(problem.widths(outcome.widths))
        if within and (self.best is None or outcome.reward > self.best.reward):
            self.best = outcome


def search(
    problem: Problem,
    study: optuna.Study,
    *,
    trials: int | None,
    time_limit: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Progress], object] = lambda _: None,
    leases: Leases | None = None,
) -> SearchResult:
    """Runs the loop until `trials` different policies were scored or failed, or `time_limit` seconds have passed.

    leases: of a study that other processes work on as well; its trials are counted over all of them.

    Raises:
        SearchFailed: many trials in a row failed. RunError: the study holds what we did not write.
    """
    tally, again = _Tally(), patiently if leases else _once
    before, start = float(study.user_attrs.get("seconds", 0.0)), time.perf_counter()
    while True:
        again(partial(tally.learn, problem, study))
        elapsed = before + time.perf_counter() - start
        again(partial(study.set_user_attr, "seconds", elapsed))
        if (trials is not None and tally.trials + tally.failed >= trials) or (time_limit and elapsed >= time_limit):
            break
        if tally.failed_in_a_row >= MOST_FAILURES:
            raise SearchFailed(
                f"{tally.failed_in_a_row} trials in a row failed, the last one with {tally.last_error}. Check that the "
                "model runs on the data, and try a lower --score-lr"
            )
        if tally.repeats_in_a_row >= MOST_REPEATS:
            log.info("the strategy proposed known policies %d times in a row; the search ends", MOST_REPEATS)
            break
        try:
            trial = again(partial(_next, problem, study, tally, trials, leases))
        except Exhausted as reason:
            log.info("the strategy has no more to propose: %s", reason)
            break
        if trial is None:
            time.sleep(POLL)
            continue
        with leases.kept(trial._trial_id) if leases else nullcontext():
            known = problem.recall(trial.params)
            latest, attributes = (known, _stored(known, 0.0, repeat=True)) if known else _evaluate(problem, trial, seed)
            again(partial(_tell, study, trial, latest, attributes, leases))
        if not known:
            again(partial(tally.learn, problem, study))
            elapsed = before + time.perf_counter() - start
            on_trial(Progress(tally.trials, tally.failed, elapsed, latest, tally.best))
    return SearchResult(tally.best, tally.trials, tally.failed, elapsed, tally.evaluation_seconds)


def _once(step: Callable[[], Any]) -> Any:
    return step()


# ---- which trial is next


def _next(
    problem: Problem, study: optuna.Study, tally: _Tally, trials: int | None, leases: Leases | None
) -> optuna.Trial | None:
    """The next trial to evaluate, one that was interrupted before a new one; None while others work on all there is."""
    with leases.locked() if leases else nullcontext() as connection:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        free = leases.free(connection, running) if leases and connection else running
        for interrupted in free:
            trial = optuna.Trial(study, interrupted._trial_id)
            attempts = leases.take(connection, trial._trial_id) if leases and connection else 1
            if attempts > MOST_ATTEMPTS:
                trial.set_user_attr("error", f"{MOST_ATTEMPTS} processes that evaluated it died")
                study.tell(trial.number, state=TrialState.FAIL)
            elif _complete(problem, study, trial):
                return trial
        if leases and trials is not None:
            tally.learn(problem, study)  # what others have told by now
            if tally.trials + tally.failed + len(running) - len(free) >= trials:
                return None
        return _new(problem, study, leases, connection)


def _new(problem: Problem, study: optuna.Study, leases: Leases | None, connection: Any) -> optuna.Trial:
    while True:
        trial = study.ask()
        if leases:
            leases.take(connection, trial._trial_id)
        if _complete(problem, study, trial):
            return trial


def _complete(problem: Problem, study: optuna.Study, trial: optuna.Trial) -> bool:
    """Gives a trial its policy, or what it lacks of it; sets it aside if nothing, or nothing whole, comes of that."""
    try:
        for name, distribution in search_space(problem).items():
            trial.suggest_int(name, distribution.low, distribution.high)
        widths = problem.widths(trial.params)
    except Exhausted:
        study.tell(trial.number, state=TrialState.PRUNED)
        raise
    except (AmcError, ValueError) as error:
        raise RunError(f"trial {trial.number} of the study does not fit this run: {error}") from None
    if problem.budget.met(widths):
        return True
    # Two halves of different proposals: the process died between them, and another has learned more since.
    study.tell(trial.number, state=TrialState.PRUNED)
    return False


# ---- evaluate and tell


def _evaluate(problem: Problem, trial: optuna.Trial, seed: int) -> tuple[Outcome | None, dict[str, Any]]:
    """Scores a trial's policy; one that can't be scored fails, with its reason."""
    start = time.perf_counter()
    try:
        with seeded(seed, "evaluate"):
            outcome = problem.evaluate(trial.params)
    except AmcError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:1000]
        log.warning("trial %d failed: %s", trial.number, reason)
        return None, {"error": reason}
    return outcome, _stored(outcome, time.perf_counter() - start)


def _stored(outcome: Outcome, seconds: float, **more: Any) -> dict[str, Any]:
    """What is stored with a trial that was scored."""
    return {
        "widths": dict(outcome.widths),
        "accuracy": outcome.accuracy,
        **outcome.costs,
        "reward": outcome.reward,
        "seconds": seconds,
        **more,
    }


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    outcome: Outcome | None,
    attributes: dict[str, Any],
    leases: Leases | None,
) -> None:
    """Stores what came of a trial, unless another process has taken it over; without an outcome it failed."""
    with leases.locked() if leases else nullcontext() as connection:
        if leases and connection:
            finished = study._storage.get_trial(trial._trial_id).state.is_finished()
            if finished or not leases.ours(connection, trial._trial_id):
                log.warning("trial %d was taken over by another process", trial.number)
                return
            if any(other.params == trial.params for other in told(study)):
                attributes = {**attributes, "repeat": True}  # another process had the same idea, and was first
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if outcome is None:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, outcome.reward)


def outcome_of(problem: Problem, trial: FrozenTrial) -> Outcome:
    """The outcome that a finished trial stored.

    Raises:
        RunError: it stored something else, so it isn't a trial of ours.
    """
    widths = trial.user_attrs.get("widths")
    if not isinstance(widths, dict) or widths != trial.params:
        raise RunError(f"trial {trial.number} of the study has no widths, or not those of its parameters")
    costs = {name: _number(trial, name) for name in problem.costs}
    return Outcome(_number(trial, "accuracy"), costs, _number(trial, "reward"), widths)


def _number(trial: FrozenTrial, name: str) -> float:
    value = trial.user_attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RunError(f"trial {trial.number} of the study lacks its {name}, so it isn't one that we wrote")
    return value
