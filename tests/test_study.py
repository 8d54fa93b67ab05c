"""The loop: what fails, fails alone; what is known is not evaluated twice; what is stored is enough to go on."""

from __future__ import annotations

import sqlite3
from contextlib import nullcontext
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from amc.budget import Budget
from amc.errors import SearchFailed
from amc.problem import Problem, Worth
from search.storage import open_storage
from search.strategies import make_sampler
from search.study import open_study, outcome_of, outcomes, search
from tests.synthetic import concave


def failing(every: int) -> tuple[Problem, list[int]]:
    """A problem whose evaluation breaks every so often."""
    problem, calls = concave(5)[0], []

    def evaluate(widths):
        calls.append(1)
        if len(calls) % every == 0:
            raise RuntimeError("out of memory, say")
        return problem.evaluate(widths).accuracy

    return Problem(problem.groups, problem.budget, evaluate), calls


def test_a_trial_that_breaks_fails_alone_with_its_reason():
    problem, _ = failing(every=3)
    study = open_study(None, "test", make_sampler("random", problem, trials=9, seed=0))
    result = search(problem, study, trials=9)
    assert (result.trials, result.failed) == (6, 3)
    failed = study.get_trials(states=[TrialState.FAIL])
    assert [trial.user_attrs["error"] for trial in failed] == ["RuntimeError: out of memory, say"] * 3


def test_nan_is_a_failed_trial_not_a_score():
    problem = concave(3)[0]
    broken = Problem(problem.groups, problem.budget, lambda widths: float("nan"))
    study = open_study(None, "test", make_sampler("random", broken, trials=3, seed=0))
    result = search(broken, study, trials=3)
    assert (result.trials, result.failed, result.best) == (0, 3, None)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_finite_number_fails_its_trial_alone(reward):
    problem = concave(5)[0]

    def sometimes(accuracy, costs, budget):
        return reward if accuracy < 0.7 else accuracy

    strange = Problem(problem.groups, problem.budget, problem._evaluate, reward=sometimes)
    study = open_study(None, "test", make_sampler("random", strange, trials=12, seed=0))
    result = search(strange, study, trials=12)
    assert min(result.trials, result.failed) > 0
    assert result.trials + result.failed == 12
    assert all("the reward is" in trial.user_attrs["error"] for trial in study.get_trials(states=[TrialState.FAIL]))


def test_many_failures_in_a_row_stop_the_search_and_say_why():
    problem, calls = failing(every=1)
    study = open_study(None, "test", make_sampler("random", problem, trials=100, seed=0))
    with pytest.raises(SearchFailed, match=r"10 trials in a row failed.*out of memory"):
        search(problem, study, trials=100)
    assert len(calls) == 10


def test_failures_that_are_not_in_a_row_stop_nothing():
    problem, _ = failing(every=2)
    study = open_study(None, "test", make_sampler("random", problem, trials=24, seed=0))
    result = search(problem, study, trials=24)
    assert (result.trials, result.failed) == (12, 12)


def test_once_what_was_wrong_is_mended_a_search_that_failed_goes_on():
    problem, well = concave(5)[0], []
    evaluate = problem._evaluate

    def sometimes(widths):
        if not well:
            raise RuntimeError("the share is offline")
        return evaluate(widths)

    problem._evaluate = sometimes
    study = open_study(None, "test", make_sampler("random", problem, trials=30, seed=0))
    with pytest.raises(SearchFailed, match="10 trials in a row"):
        search(problem, study, trials=30)
    with pytest.raises(SearchFailed, match="11 trials in a row"):
        search(problem, study, trials=30)
    well.append(True)
    result = search(problem, study, trials=30)
    assert (result.trials, result.failed) == (19, 11)


class NobodyElse:
    """The leases of a shared study on which no other process works."""

    def __init__(self) -> None:
        self.locked = lambda: nullcontext(True)
        self.free = lambda connection, running: running
        self.take = lambda connection, trial_id: 1
        self.ours = lambda connection, trial_id: True
        self.kept = lambda trial_id: nullcontext()


def test_in_a_shared_study_a_policy_that_failed_once_counts_when_it_is_scored():
    problem, failed = concave(1)[0], set()

    def evaluate(widths):
        if tuple(widths.values()) not in failed:
            failed.add(tuple(widths.values()))
            raise RuntimeError("no memory, this time")
        return 0.5

    group = replace(problem.groups[0], channels=3, widths=(1, 2, 3))
    few = Problem([group], problem.budget.__class__([group], ()), evaluate, reward=lambda a, costs, budget: a)
    study = open_study(None, "test", make_sampler("random", few, trials=9, seed=0))
    result = search(few, study, trials=6, leases=NobodyElse())
    assert (result.trials, result.failed) == (3, 3)
    assert result.best is not None


def test_a_known_policy_is_told_from_memory_and_not_counted():
    problem, calls = failing(every=10**9)
    small = Problem(
        problem.groups[:1], problem.budget.__class__(problem.groups[:1], ()), lambda w: calls.append(1) or 0.5
    )
    study = open_study(None, "test", make_sampler("random", small, trials=40, seed=0))
    small.reward = lambda accuracy, costs, budget: accuracy  # widths differ, so that there is something to repeat
    result = search(small, study, trials=40)
    assert result.trials == len(calls) == 40
    assert len({tuple(t.params.items()) for t in study.trials}) == 40
    repeated = [trial for trial in study.trials if "repeat" in trial.user_attrs]
    assert len(repeated) == len(study.trials) - 40 > 0


def test_what_was_repeated_in_an_earlier_round_does_not_end_a_further_one():
    problem = concave(5)[0]

    class Same(type(make_sampler("uniform", problem, trials=1, seed=0))):
        def propose(self, study, trial):
            return (30,) * 5 if trial.number < 60 else (trial.number - 59, 30, 30, 30, 30)

    study = open_study(None, "test", Same(problem))
    assert search(problem, study, trials=9).trials == 1
    trials = len(study.trials)
    assert search(problem, study, trials=9).trials == 1, "a resumed round has ended as before"
    assert search(problem, study, trials=9, since=trials).trials == 9
    assert search(problem, study, trials=9, since=trials).trials == 9


def test_repeats_that_are_not_in_a_row_end_nothing():
    problem = concave(5)[0]

    class Slow(type(make_sampler("uniform", problem, trials=1, seed=0))):
        def propose(self, study, trial):
            return (1 + trial.number // 30, 30, 30, 30, 30)

    study = open_study(None, "test", Slow(problem))
    assert search(problem, study, trials=4).trials == 4
    assert len(study.trials) == 91


def test_the_best_is_within_the_budget_as_it_is_known_by_now():
    """What was scored before a cost was corrected may not be."""
    problem = concave(5)[0]
    study = open_study(None, "test", make_sampler("random", problem, trials=20, seed=0))
    before = search(problem, study, trials=20)
    limits = [replace(limit, value=before.best.costs["flops"] - 1.0) for limit in problem.budget.limits]
    corrected = problem.under(Budget(problem.groups, limits), problem.costs)
    after = search(corrected, study, trials=20)
    assert after.trials == before.trials
    assert corrected.budget.met(corrected.widths(after.best.widths))


def test_a_stored_policy_beyond_the_budget_is_set_aside_and_not_scored():
    problem, calls = failing(every=10**9)
    study = open_study(None, "test", make_sampler("random", problem, trials=3, seed=0))
    study.enqueue_trial(problem.named(problem.budget.dense))
    assert search(problem, study, trials=3).trials == len(calls) == 3
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED, *[TrialState.COMPLETE] * 3]


def test_a_policy_that_another_study_scored_is_counted_in_this_one_without_a_score():
    problem, calls = concave(6)[0], []
    counted = Problem(problem.groups, problem.budget, lambda w: calls.append(w) or problem.evaluate(w).accuracy)
    first, second = (
        search(counted, open_study(None, name, make_sampler("tilt", counted, trials=5, seed=0)), trials=5)
        for name in ("first", "second")
    )
    assert second.trials == first.trials == len(calls) > 1
    assert second.best == first.best is not None


def test_a_finished_trial_outlives_the_process_and_an_interrupted_one_is_evaluated_in_its_place(tmp_path):
    path = tmp_path / "odd name?#%.db"
    problem, calls = failing(every=10**9)
    sampler = make_sampler("random", problem, trials=8, seed=0)
    study = open_study(open_storage(path), "search", sampler)
    search(problem, study, trials=4)
    study.ask()  # killed here
    again, calls_again = failing(every=10**9)
    resumed = open_study(open_storage(path), "search", make_sampler("random", again, trials=8, seed=0))
    result = search(again, resumed, trials=8)
    assert result.trials == 8
    assert (len(calls), len(calls_again)) == (4, 4)
    assert [trial.state for trial in resumed.trials] == [TrialState.COMPLETE] * 8
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_time_and_trials_end_the_search_at_whichever_comes_first():
    problem = concave(5)[0]
    study = open_study(None, "test", make_sampler("random", problem, trials=9, seed=0))
    assert search(problem, study, trials=5, time_limit=3600).trials == 5
    study.set_user_attr("seconds", 3600.0)  # time adds up over resumes
    longer = search(problem, study, trials=9, time_limit=3600)
    assert longer.trials == 5
    assert longer.seconds >= 3600


def test_the_trials_hold_what_the_contract_says():
    problem = concave(3)[0]
    study = open_study(None, "test", make_sampler("nsga2", problem, trials=3, seed=0))
    search(problem, study, trials=3)
    assert isinstance(study, optuna.Study)
    for trial in study.trials:
        assert {"widths", "accuracy", "score", "flops", "reward", "seconds"} <= set(trial.user_attrs)


def test_a_reward_counts_the_score_and_a_study_keeps_both_it_and_the_accuracy():
    problem, _ = concave(3)
    problem = Problem(problem.groups, problem.budget, lambda widths: Worth(0.5, sum(widths.values()) / 1000))
    study = open_study(None, "test", make_sampler("nsga2", problem, trials=5, seed=0))
    found = search(problem, study, trials=5)
    told = outcomes(problem, study)
    assert {one.accuracy for one in told} == {0.5}
    assert [one.reward for one in told] == [sum(one.widths.values()) / 1000 for one in told]
    assert found.best is not None
    assert found.best.score == max(one.score for one in told)


def test_trials_of_the_first_versions_had_the_accuracy_as_their_score():
    problem, _ = concave(3)
    study = open_study(None, "test", make_sampler("nsga2", problem, trials=1, seed=0))
    search(problem, study, trials=1)
    trial = study.trials[0]
    del trial.user_attrs["score"]
    assert outcome_of(problem, trial).worth == (trial.user_attrs["accuracy"],) * 2
