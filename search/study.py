"""The one loop: ask a strategy, evaluate, tell the study, until the trials or the time are used up.

An executor evaluates, several policies at once perhaps; trials are told in the order in which they were asked. With N
workers, trial k is asked when the trials up to k - N were told: what it proposes follows from the run's seed, its
number and these.

Optuna's storage is the only record of trials. A study that exists is gone on with: its finished trials are told to the
problem's memory and counted, and trials that were interrupted are evaluated again, in their place and under their
numbers. So whatever derives from a trial's number and from the trials told before it is as it would have been without a
break.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from amc.errors import AmcError, RunError, SearchFailed
from amc.problem import Outcome, Problem, Worth
from search.executor import Executor, Here, Score
from search.shared import MOST_ATTEMPTS, Leases, patiently
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
    seconds: search time over all resumes. evaluation_seconds: what scoring took, the sum over all workers.
    front: of a Pareto search, the policies that none beats at their cost or less, cheapest first.
    alone: the best was measured within the latency limit, and the uniform policy was not.
    """

    best: Outcome | None
    trials: int
    failed: int
    seconds: float
    evaluation_seconds: float
    front: tuple[Outcome, ...] = ()
    alone: bool = False


def open_study(storage: BaseStorage | None, name: str, sampler: BaseSampler) -> optuna.Study:
    """The study of that name, made if it isn't there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
    )


@dataclass
class _Tally:
    """What the loop counts, all of it from the trials that were told, in the order of their numbers.

    since: the number of the first trial whose repeat counts; what earlier ones repeated is another round's matter.
    """

    best: Outcome | None = None
    trials: int = 0
    failed: int = 0
    evaluation_seconds: float = 0.0
    failed_in_a_row: int = 0
    repeats_in_a_row: int = 0
    last_error: str = ""
    since: int = 0
    seen: set[int] = field(default_factory=set)
    known: dict[tuple[int, ...], Outcome] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        """Different policies that were scored or failed."""
        return self.trials + self.failed

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
            self.repeats_in_a_row += trial.number >= self.since
            return
        outcome = outcome_of(problem, trial)
        widths = problem.widths(outcome.widths)
        self.known[widths] = outcome
        problem.remember(outcome)
        self.trials += 1
        self.evaluation_seconds += _number(trial, "seconds")
        self.repeats_in_a_row = 0
        # A cost that was corrected since may say that the policy isn't within the budget.
        if problem.budget.met(widths) and (self.best is None or outcome.reward > self.best.reward):
            self.best = outcome


def search(
    problem: Problem,
    study: optuna.Study,
    *,
    trials: int | None,
    time_limit: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Progress], object] = lambda _: None,
    executor: Executor | None = None,
    leases: Leases | None = None,
    since: int = 0,
) -> SearchResult:
    """Runs the loop until `trials` different policies were scored or failed, or `time_limit` seconds have passed.

    executor: who scores, several policies at once perhaps; this process unless given. What is under way when the time
        is up is waited for.
    leases: of a study that other processes work on as well; its trials are counted over all of them.
    since: of a further round under other costs, the number of its first trial: what was repeated before that says
        nothing of what it can propose.

    Raises:
        SearchFailed: many trials in a row failed. RunError: the study holds what we did not write.
    """
    before, start = float(study.user_attrs.get("seconds", 0.0)), time.perf_counter()
    with closing(_Loop(problem, study, executor or Here(problem, seed), trials, leases, since)) as loop:
        while True:
            loop.learn()
            elapsed = before + time.perf_counter() - start
            loop.again(partial(study.set_user_attr, "seconds", elapsed))
            ends = loop.over() or ("its time is up" if time_limit and elapsed >= time_limit else None) or loop.ask()
            if loop.asked:
                new, latest = loop.tell()
                if new:
                    loop.learn()
                    elapsed = before + time.perf_counter() - start
                    on_trial(Progress(loop.tally.trials, loop.tally.failed, elapsed, latest, loop.tally.best))
            elif ends:
                log.info("the search ends: %s", ends)
                break
            else:
                time.sleep(POLL)
    tally = loop.tally
    return SearchResult(tally.best, tally.trials, tally.failed, elapsed, tally.evaluation_seconds)


@dataclass
class _Asked:
    """A trial that was asked and is not yet told.

    score: on its way; None where its policy is known, or is being scored for an earlier trial.
    lease: what keeps the trial ours in a shared study.
    """

    trial: optuna.Trial
    lease: ExitStack
    score: Future[Score] | None = None


class _Loop:
    """What is under way: up to `executor.workers` trials that were asked and not yet told, in the order of asking.

    The first of them is the next to be told, whichever is scored first. So what was told when a trial is asked depends
    on its number and on how many workers there are, never on who was quicker, and a study is the same each time.
    """

    def __init__(
        self,
        problem: Problem,
        study: optuna.Study,
        executor: Executor,
        trials: int | None,
        leases: Leases | None,
        since: int,
    ) -> None:
        self._problem, self._study, self._executor = problem, study, executor
        self._most, self._leases = trials, leases
        self.again: Callable[[Callable[[], Any]], Any] = patiently if leases else _once
        self.tally, self.asked, self._failed_here = _Tally(since=since), deque[_Asked](), False

    def close(self) -> None:
        """Lets go of what is under way: whoever goes on with the study scores it again."""
        for asked in self.asked:
            asked.lease.close()

    def learn(self) -> None:
        """Counts the trials that were told since, by whomever."""
        self.again(partial(self.tally.learn, self._problem, self._study))

    def over(self) -> str | None:
        """Why no more is asked, if so.

        Raises:
            SearchFailed: many trials in a row failed, one of them here: what failed before a break gets another try.
        """
        if self._most is not None and self.tally.ended >= self._most:
            return "it has its trials"
        if self._failed_here and self.tally.failed_in_a_row >= MOST_FAILURES:
            raise SearchFailed(
                f"{self.tally.failed_in_a_row} trials in a row failed, the last one with {self.tally.last_error}. "
                "Once what is wrong is mended, a resumed run goes on; a lower --score-lr, or --precision float32, "
                "takes a new one"
            )
        if self.tally.repeats_in_a_row >= MOST_REPEATS:
            return f"the strategy proposed known policies {MOST_REPEATS} times in a row"
        return None

    # ---- ask

    def ask(self) -> str | None:
        """Asks until every worker has a policy to score; returns why the strategy has no more to propose, if so."""
        while len(self.asked) < self._executor.workers:
            try:
                trial = self.again(self._next)
            except Exhausted as reason:
                return f"the strategy has no more to propose: {reason}"
            if trial is None:
                return None
            asked = _Asked(trial, ExitStack())
            if self._leases:
                asked.lease.enter_context(self._leases.kept(trial._trial_id))
            known = self._known(trial) or trial.params in [other.trial.params for other in self.asked]
            self.asked.append(asked)
            if not known:
                asked.score = self._executor.submit(trial.params)
        return None

    def _next(self) -> optuna.Trial | None:
        """The next trial to evaluate, one that was interrupted before a new one; None while enough are under way."""
        study, leases, mine = self._study, self._leases, {asked.trial.number for asked in self.asked}
        with leases.locked() if leases else nullcontext() as connection:
            running = [
                t for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if t.number not in mine
            ]
            free = leases.free(connection, running) if leases and connection else running
            for interrupted in free:
                trial = optuna.Trial(study, interrupted._trial_id)
                attempts = leases.take(connection, trial._trial_id) if leases and connection else 1
                if attempts > MOST_ATTEMPTS:
                    trial.set_user_attr("error", f"{MOST_ATTEMPTS} processes that evaluated it died")
                    study.tell(trial.number, state=TrialState.FAIL)
                elif self._complete(trial):
                    return trial
            if leases:
                self.tally.learn(self._problem, study)  # what others have told by now
            under_way = len(running) - len(free) + len(mine)
            if self._most is not None and self.tally.ended + under_way >= self._most:
                return None
            return self._new(connection)

    def _new(self, connection: Any) -> optuna.Trial:
        while True:
            trial = self._study.ask()
            if self._leases:
                self._leases.take(connection, trial._trial_id)
            if self._complete(trial):
                return trial

    def _complete(self, trial: optuna.Trial) -> bool:
        """Gives a trial its policy, or what it lacks of it; sets it aside if nothing whole comes of that."""
        try:
            for name, distribution in search_space(self._problem).items():
                trial.suggest_int(name, distribution.low, distribution.high)
            widths = self._problem.widths(trial.params)
        except Exhausted:
            self._study.tell(trial.number, state=TrialState.PRUNED)
            raise
        except (AmcError, ValueError) as error:
            raise RunError(f"trial {trial.number} of the study does not fit this run: {error}") from None
        if self._problem.budget.met(widths):
            return True
        # Two halves of different proposals: the process died between them, and another has learned more since.
        self._study.tell(trial.number, state=TrialState.PRUNED)
        return False

    # ---- tell

    def tell(self) -> tuple[bool, Outcome | None]:
        """Tells what came of the trial that was asked first, once it is there; whether that is new, and the outcome."""
        asked = self.asked[0]
        trial, score = asked.trial, asked.score
        known = self._known(trial) if score is None else None
        outcome: Outcome | None
        if known:
            outcome, attributes = known, _stored(known, 0.0, repeat=True)
        else:  # without a score, an earlier trial of the same policy has failed
            outcome, attributes = _outcome(self._problem, trial, score or self._executor.submit(trial.params))
        self._failed_here |= outcome is None
        self.again(partial(_tell, self._study, trial, outcome, attributes, self._leases))
        asked.lease.close()
        self.asked.popleft()
        return not known, outcome

    def _known(self, trial: optuna.Trial) -> Outcome | None:
        """What an earlier trial of this study said of the same policy; what others know of it makes no repeat."""
        return self.tally.known.get(self._problem.widths(trial.params))


def _once(step: Callable[[], Any]) -> Any:
    return step()


def _outcome(problem: Problem, trial: optuna.Trial, score: Future[Score]) -> tuple[Outcome | None, dict[str, Any]]:
    """What a score that may still be on its way makes of a trial; one that can't be scored fails, with its reason."""
    try:
        worth, seconds = score.result()
        outcome = problem.outcome(trial.params, worth)
    except AmcError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:1000]
        log.warning("trial %d failed: %s", trial.number, reason)
        return None, {"error": reason}
    return outcome, _stored(outcome, seconds)


def _stored(outcome: Outcome, seconds: float, **more: Any) -> dict[str, Any]:
    """What is stored with a trial that was scored."""
    return {
        "widths": dict(outcome.widths),
        "accuracy": outcome.accuracy,
        "score": outcome.score,
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
            scored = (other.params for other in told(study) if other.state == TrialState.COMPLETE)
            if outcome is not None and trial.params in scored:
                attributes = {**attributes, "repeat": True}  # another process had the same idea, and was first
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if outcome is None:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, outcome.reward)


def outcomes(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """What the different policies of a study scored, in the order of its trials, whatever the budget."""
    ended = (trial for trial in told(study) if trial.value is not None and "repeat" not in trial.user_attrs)
    return [outcome_of(problem, trial) for trial in ended]


def outcome_of(problem: Problem, trial: FrozenTrial) -> Outcome:
    """The outcome that a finished trial stored; by the latency table as it is now, where its reward hangs on that.

    Raises:
        RunError: it stored something else, so it isn't a trial of ours.
    """
    widths = trial.user_attrs.get("widths")
    if not isinstance(widths, dict) or widths != trial.params:
        raise RunError(f"trial {trial.number} of the study has no widths, or not those of its parameters")
    costs = {name: _number(trial, name) for name in problem.costs}
    accuracy = _number(trial, "accuracy")
    score = _number(trial, "score") if "score" in trial.user_attrs else accuracy  # the first versions had none
    worth = Worth(accuracy, score)
    if problem.revised:
        return problem.outcome(widths, worth)
    return Outcome(*worth, costs, _number(trial, "reward"), widths)


def _number(trial: FrozenTrial, name: str) -> float:
    value = trial.user_attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RunError(f"trial {trial.number} of the study lacks its {name}, so it isn't one that we wrote")
    return value
