"""Anchors: how many, which, what they teach, and that none is trained twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest

from amc.budget import Budget
from amc.cost import FunctionCost
from amc.errors import Interrupted
from amc.evaluate import Evaluator
from amc.finetune import Diverged
from amc.problem import Outcome, Problem
from search import anchors as anchors_module
from search import rounds
from search.anchor_file import hand_on
from search.anchors import Begin, Chooser, Plan, plan, trust
from search.calibration import Anchor
from search.contenders import contenders, policies, spread
from search.executor import Score, done
from search.job import run
from search.run_directory import RunDirectory
from search.strategies import make_sampler
from search.strategies.moves import MovingSampler, Scored
from search.study import SearchResult, open_study, search
from tests.synthetic import staged

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"


def unseen(done: int, total: int) -> None:
    """Progress that nobody watches."""


def searched(problem: Problem, trials: int = 80, strategy: str = "random") -> tuple[optuna.Study, SearchResult]:
    study = open_study(None, "test", make_sampler(strategy, problem, trials=trials, seed=0))
    return study, search(problem, study, trials=trials)


def later(train: Callable[[dict[str, int], int], float]) -> Begin:
    """A fine-tune that is done when it begins."""
    return lambda widths, steps: done(partial(train, widths, steps))


def sized() -> tuple[Problem, optuna.Study, SearchResult]:
    problem, _ = staged(2)
    problem.costs["params"] = FunctionCost("params", "", lambda widths: float(sum(widths)))
    return problem, *searched(problem)


def test_anchors_take_their_share_and_no_more() -> None:
    assert plan(80, 30, 0.2) == Plan(5, 120)  # 20 scores' worth: 5 of 4 lengths
    assert plan(120, 10, 0.2, rest=6.5) == Plan(10, 40)
    assert plan(2000, 10, 0.2) == Plan(12, 320)
    assert plan(79, 30, 0.2) == Plan(0, 0)
    assert plan(80, 30, 0.0) == Plan(0, 0)
    assert plan(80, 0, 0.2) == Plan(0, 0)
    assert plan(80, 30, 0.2, least=240) == Plan(2, 240), "as long as those that are there"
    assert plan(2000, 30, 0.2, least=240) == Plan(12, 960), "or longer"
    for trials in range(1, 500, 7):
        planned = plan(trials, 30, 0.2)
        assert planned.count * planned.steps <= 0.25 * trials * 30 + 1e-9


def scored_at_random(problem: Problem, count: int, seed: int = 1) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    return [problem.evaluate([int(rng.integers(2, g.channels + 1)) for g in problem.groups]) for _ in range(count)]


def with_costs(scored: list[Outcome], params: list[float]) -> list[Outcome]:
    return [replace(one, costs={**one.costs, "params": size}) for one, size in zip(scored, params, strict=True)]


def test_contenders_are_those_that_few_beat_in_both_score_and_parameters() -> None:
    rewards, params = np.array([5, 4, 3, 2, 1, 3, 0.0]), np.array([1, 3, 2, 5, 4, 3, 5.0])
    assert contenders(rewards, params, 1) == [0, 1, 3], "the first front, whole"
    assert contenders(rewards, params, 4) == [0, 1, 3, 5, 4, 6]
    assert contenders(rewards, params, 7) == [0, 1, 3, 5, 4, 6, 2]
    assert contenders(rewards, np.ones(7), 2) == [0, 1]
    assert contenders(np.array([1.0]), np.array([1.0]), 12) == [0]
    rng = np.random.default_rng(0)
    rewards, params = rng.random(200), rng.random(200)
    found = contenders(rewards, params, 0)
    beaten = ((rewards[:, None] > rewards) & (params[:, None] > params)).sum(axis=0)
    assert len(found) >= 50
    assert set(np.flatnonzero(beaten == 0)) <= set(found)
    assert beaten[found].max() < np.median(beaten[[i for i in range(200) if i not in found]])


def test_anchors_are_both_ends_of_the_front_and_a_spread_of_the_rest() -> None:
    problem, _, _ = sized()
    rewards = np.arange(40.0)[::-1]
    scored = with_costs(scored_at_random(problem, 40), [*np.arange(10.0), *np.full(29, 5.0), 20.0])
    chosen = spread(problem, scored, rewards, 6)
    assert chosen[:2] == [0, 39], "the best and the largest"
    assert chosen[2] < 10, "a contender"
    assert len(set(chosen)) == 6
    more = spread(problem, scored, rewards, 4, taken=chosen)
    assert len(set(more) - set(chosen)) == 4
    few = [sorted(spread(problem, scored[:n], np.arange(n) * 1.0, 12)) for n in (1, 2, 3)]
    assert few == [[0], [0, 1], [0, 1, 2]]
    assert spread(problem, scored, rewards, 0) == spread(problem, scored[:2], rewards[:2], 3, taken=[0, 1]) == []


def test_anchors_are_no_copies_of_one_another() -> None:
    """A search that has settled scores one policy's neighbours best; the other contenders teach more."""
    problem, _, _ = sized()
    near = [problem.evaluate([group.channels // 2 + i % 2 for group in problem.groups]) for i in range(8)]
    scored = with_costs([*near, *scored_at_random(problem, 32)], [1.0] * 40)
    chosen = spread(problem, scored, np.arange(40.0)[::-1], 6)
    assert chosen[0] == 0
    assert set(chosen[1:3]) == {8, 9}
    assert spread(problem, scored, np.arange(40.0)[::-1], 4, taken=[0, 8])[0] == 9, "nor of those that are there"


def test_the_choice_is_one_of_the_contenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extrapolated, a few noisy anchors can make anything look good."""
    problem, study, found = sized()
    scored = policies(problem, study)
    monkeypatch.setattr(anchors_module, "contenders", lambda rewards, params, count: [17])
    chooser = Chooser(RunDirectory(tmp_path), later(lambda widths, steps: 0.5), score_steps=30, share=0.2)
    assert chooser.choose(problem, study, found, unseen).best == scored[17]
    assert chooser.anchors


def test_a_search_learns_half_way_what_capacity_is_worth(tmp_path: Path) -> None:
    """After a long fine-tune only size counts here, so the second half of the search makes it grow."""

    def searched_with(worth: float, folder: Path) -> float:
        problem, _ = staged(2)
        problem.costs["params"] = FunctionCost("params", "", lambda widths: float(np.dot(widths, range(len(widths)))))
        truth = later(lambda widths, steps: worth * math.log(problem.costs["params"](problem.widths(widths))))
        folder.mkdir()
        chooser = Chooser(RunDirectory(folder), truth, score_steps=30, share=0.4)
        sampler = make_sampler("auto", problem, trials=80, seed=0)
        assert isinstance(sampler, MovingSampler)
        study = open_study(None, "test", sampler)
        search(problem, study, trials=40)
        chooser.learn(problem, study, 80, unseen)
        sampler.worth = partial(chooser.worth, problem)
        search(problem, study, trials=80)
        return float(np.mean([one.costs["params"] for one in policies(problem, study)[50:]]))

    assert searched_with(1.0, tmp_path / "b") > 1.05 * searched_with(0.0, tmp_path / "a")


HALVED = {"model": f"{TINY}:net", "data": f"{TINY}:data", "budget": "flops=0.5", "score_steps": 1, "threads": 1}
HALVED |= {"trials": 14, "anchor_share": 0.8, "finetune_epochs": 0}


def test_a_run_pauses_half_way_and_goes_on_by_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, told = [], []
    once, worth = rounds.search, Chooser.worth

    def searched(problem: Problem, study: optuna.Study, **named: object) -> SearchResult:
        limits.append((named["trials"], named["time_limit"]))
        if named["trials"] is None:  # how many trials a second makes is the machine's matter
            named |= {"trials": 7 * len(limits), "time_limit": None}
        return once(problem, study, **named)

    def noted(self: Chooser, problem: Problem, scored: list[Scored]) -> list[Scored]:
        found = worth(self, problem, scored)
        told.append([after.reward - before.reward for before, after in zip(scored, found, strict=True)])
        return found

    monkeypatch.setattr(rounds, "search", searched)
    monkeypatch.setattr(Chooser, "worth", noted)
    run(**HALVED, out=tmp_path / "a")
    assert limits == [(7, None), (14, None)]
    assert len(told) >= 7, "each proposal of the second half"
    assert all(any(change) for change in told)
    limits.clear()
    run(**HALVED | {"trials": 3, "time_limit": 1000.0}, out=tmp_path / "b")
    assert limits == [(3, pytest.approx(200))], "too few"
    limits.clear()
    run(**HALVED | {"trials": None, "time_limit": 5.0}, out=tmp_path / "c")
    assert limits == [(None, pytest.approx(0.5)), (None, pytest.approx(1.0))]


@pytest.mark.parametrize("after", [0, 3])
def test_a_run_that_was_stopped_after_its_first_anchors_goes_on_as_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = run(**HALVED, out=tmp_path / "whole")
    first = json.loads((tmp_path / "whole" / "anchors.json").read_text())["batches"][0]
    trained: list[dict[str, int]] = []
    scored: list[dict[str, int]] = []
    recovered, ordinary = Evaluator.recovered, Evaluator.__call__

    def noted(self: Evaluator, widths: dict[str, int], steps: int) -> float:
        trained.append(dict(widths))
        return recovered(self, widths, steps)

    def stopped(self: Evaluator, widths: dict[str, int]) -> float:
        scored.extend([widths] if trained else [])
        if len(scored) > after:
            raise KeyboardInterrupt
        return ordinary(self, widths)

    monkeypatch.setattr(Evaluator, "recovered", noted)
    monkeypatch.setattr(Evaluator, "__call__", stopped)
    with pytest.raises(Interrupted):
        run(**HALVED, out=tmp_path / "broken")
    monkeypatch.setattr(Evaluator, "__call__", ordinary)
    assert sorted(map(str, trained)) == sorted(map(str, first["policies"]))
    resumed = run(model=HALVED["model"], data=HALVED["data"], out=tmp_path / "broken", resume=True)
    assert resumed.summary["proxy"] == whole.summary["proxy"]
    assert (tmp_path / "broken" / "policy.json").read_bytes() == (tmp_path / "whole" / "policy.json").read_bytes()
    assert len(trained) == len({str(widths) for widths in trained}) == whole.summary["proxy"]["samples"]


def test_half_way_is_for_searches_that_afford_it(tmp_path: Path) -> None:
    def chooser(share: float) -> Chooser:
        return Chooser(RunDirectory(tmp_path), later(lambda widths, steps: 0.5), score_steps=30, share=share)

    def kept() -> list[dict]:
        return json.loads((tmp_path / "anchors.json").read_text())["anchors"]

    assert [chooser(0.2).pauses(trials) for trials in (100, 159, 160, None)] == [False, False, True, True]
    assert not chooser(0.0).pauses(None)
    problem, study, found = sized()
    chooser(0.05).learn(problem, study, None, unseen)
    assert not kept()
    chooser(0.2).learn(problem, study, None, unseen)
    assert not kept(), "a run that had none half-way has none when it is resumed"
    (tmp_path / "anchors.json").unlink()
    chooser(0.2).learn(problem, study, 1000, unseen)
    assert len(kept()) == 5, "80 trials were half of it, whatever was asked for"
    assert chooser(0.2).begun
    ended = chooser(0.4)
    ended.choose(problem, study, found, unseen)
    assert len(ended.anchors) == len(kept()) == 12, "with those of half-way"


def test_a_failed_anchor_is_tried_once_and_another_takes_its_place(tmp_path: Path) -> None:
    problem, study, found = sized()
    tried: list[str] = []

    def train(widths: dict[str, int], steps: int) -> float:
        tried.append(str(widths))
        if len(tried) <= 5:
            raise Diverged("the training loss became nan")
        return 0.5

    chooser = Chooser(RunDirectory(tmp_path), later(train), score_steps=30, share=0.4)
    reports: list[tuple[int, int]] = []
    chooser.learn(problem, study, 80, lambda done, total: reports.append((done, total)))
    chooser.choose(problem, study, found, lambda done, total: reports.append((done, total)))
    assert (reports[0], reports[6], reports[-1]) == ((0, 6), (6, 6), (11, 11)), "to the end"
    assert len(set(tried)) == len(tried)
    assert len(chooser.anchors) == 12


def test_what_anchors_taught_holds_under_a_corrected_budget(tmp_path: Path) -> None:
    """Policies fill the budget, so a correction puts most of those that were fine-tuned outside of it."""
    problem, study, found = sized()
    truth = later(lambda widths, steps: problem.evaluate(widths).accuracy)
    chooser = Chooser(RunDirectory(tmp_path), truth, score_steps=30, share=0.4)
    chooser.choose(problem, study, found, unseen)
    limits = [replace(limit, margin=0.004) for limit in problem.budget.limits]
    corrected = problem.under(Budget(problem.groups, limits), problem.costs)
    scored = [Scored(i, problem.widths(one.widths), one.reward) for i, one in enumerate(policies(problem, study))]
    assert 0 < len(policies(corrected, study)) < len(scored) / 2
    assert chooser.worth(corrected, scored) != scored
    before = len(chooser.anchors)
    again = chooser.choose(corrected, study, found, unseen)
    assert len(chooser.anchors) == before, "none is paid for twice"
    assert again.best is not None
    assert corrected.budget.met(corrected.widths(again.best.widths))


def test_trust_is_spearmans_correlation_and_nothing_where_nothing_differs() -> None:
    def anchors(*pairs: tuple[float, float]) -> list[Anchor]:
        return [Anchor((i,), score, accuracy, accuracy) for i, (score, accuracy) in enumerate(pairs)]

    assert trust(anchors((0.1, 0.5), (0.2, 0.6), (0.3, 0.9), (0.4, 0.95))) == pytest.approx(1)
    assert trust(anchors((0.1, 0.9), (0.2, 0.8), (0.3, 0.7), (0.4, 0.1))) == pytest.approx(-1)
    assert trust(anchors((0.1, 0.9), (0.2, 0.8), (0.3, 0.7))) is None
    assert trust(anchors((0.1, 0.9), (0.2, 0.9), (0.3, 0.9), (0.4, 0.9))) is None


def test_a_run_of_a_sweep_learns_from_those_before_it_at_no_time(tmp_path: Path) -> None:
    problem, study, found = sized()
    trained: list[tuple[dict[str, int], int]] = []

    def train(widths: dict[str, int], steps: int) -> float:
        trained.append((widths, steps))
        return problem.evaluate(widths).accuracy

    def chosen(name: str, score_steps: int = 30) -> Chooser:
        chooser = Chooser(RunDirectory(tmp_path / name), later(train), score_steps=score_steps, share=0.2)
        seconds = chooser.choose(problem, study, found, unseen).seconds
        assert (seconds > found.seconds) == bool(trained)
        return chooser

    for name in ("first", "second", "third", "other"):
        (tmp_path / name).mkdir()
    first = chosen("first").proxy()
    assert (first["samples"], first["shared"], len(trained)) == (5, 0, 5)
    hand_on(RunDirectory(tmp_path / "first"), RunDirectory(tmp_path / "second"))
    before = (tmp_path / "second" / "anchors.json").read_bytes()
    hand_on(RunDirectory(tmp_path / "first"), RunDirectory(tmp_path / "other"))
    trained.clear()

    second = chosen("second").proxy()
    assert not trained, "the same policies, fine-tuned for as long"
    assert (second["samples"], second["shared"]) == (5, 5)
    assert second["spearman"] == first["spearman"], "over the run's own"
    (tmp_path / "second" / "anchors.json").write_bytes(before)
    assert chosen("second").proxy() == second, "resumed as unbroken"

    assert chosen("other", score_steps=20).proxy()["shared"] == 0, "fine-tuned for another length"
    hand_on(RunDirectory(tmp_path / "other"), RunDirectory(tmp_path / "third"))
    kept = json.loads((tmp_path / "third" / "anchors.json").read_text())
    assert [len(run) for run in kept["shared"]] == [5, 5], "a run each"


def test_which_worker_was_done_first_is_not_handed_on(tmp_path: Path) -> None:
    anchors = [
        {"widths": {"b": b, "a": 1}, "steps": 30, "accuracy": 0.1 * b, "seconds": 1.0, "score": 0.5} for b in (3, 1, 2)
    ]
    handed = []
    for i, order in enumerate((anchors, anchors[::-1])):
        source, target = (RunDirectory(tmp_path / f"{name}{i}") for name in ("source", "target"))
        source.path.mkdir()
        target.path.mkdir()
        source.write_json("anchors.json", {"anchors": order})
        hand_on(source, target)
        handed.append((target / "anchors.json").read_bytes())
    assert handed[0] == handed[1]
    assert [kept["widths"]["b"] for kept in json.loads(handed[0])["shared"][0]] == [1, 2, 3]


def test_the_choice_follows_the_anchors_and_trains_none_twice(tmp_path: Path) -> None:
    problem, study, found = sized()
    trained: list[dict[str, int]] = []

    def train(widths: dict[str, int], steps: int) -> float:
        assert steps == 120
        trained.append(widths)
        return problem.evaluate(widths).accuracy

    for _ in range(2):
        chooser = Chooser(RunDirectory(tmp_path), later(train), score_steps=30, share=0.2)
        chosen = chooser.choose(problem, study, found, unseen)
    assert len(trained) == 5
    assert chosen.best is not None
    assert found.best is not None
    assert chosen.best.accuracy > np.median([one.accuracy for one in policies(problem, study)])
    proxy = chooser.proxy()
    assert proxy["samples"] == 5
    assert proxy["spearman"] == pytest.approx(1)
    assert chosen.seconds >= found.seconds


def test_the_choice_is_by_what_anchors_taught_and_not_by_the_score(tmp_path: Path) -> None:
    """After the longer fine-tune, only size counts here."""
    problem, study, found = sized()
    truth = later(lambda widths, steps: math.log(sum(widths.values())))
    chosen = Chooser(RunDirectory(tmp_path), truth, score_steps=30, share=0.4).choose(problem, study, found, unseen)
    assert chosen.best == max(policies(problem, study), key=lambda one: one.costs["params"]) != found.best


def test_what_is_done_is_kept_while_others_are_under_way(tmp_path: Path) -> None:
    problem, study, found = sized()
    begun: list[Future[Score]] = []

    def begin(widths: dict[str, int], steps: int) -> Future[Score]:
        begun.append(done(lambda: 0.5) if begun else Future())
        if len(begun) == 3:
            raise KeyboardInterrupt
        return begun[-1]

    chooser = Chooser(RunDirectory(tmp_path), begin, score_steps=30, share=0.2, at_once=2)
    with pytest.raises(KeyboardInterrupt):
        chooser.choose(problem, study, found, unseen)
    [kept] = json.loads((tmp_path / "anchors.json").read_text())["anchors"]
    assert kept["accuracy"] == 0.5
    assert not begun[0].done()


def test_noise_is_smoothed_out_of_the_choice(tmp_path: Path) -> None:
    """Over many seeds, the choice is better than the luckiest score."""
    gains = []
    for seed in range(6):
        noisy, _ = staged(2, noise=0.05, seed=seed)
        true, _ = staged(2, seed=seed)
        study, found = searched(noisy, 60, "evolution")
        chooser = Chooser(RunDirectory(tmp_path), later(lambda widths, steps: 0.0), score_steps=0, share=0.0)
        chosen = chooser.choose(noisy, study, found, unseen)
        assert chosen.best
        assert found.best
        gains.append(true.evaluate(chosen.best.widths).accuracy - true.evaluate(found.best.widths).accuracy)
    assert np.mean(gains) > 0


@pytest.mark.parametrize("problem_of_it", [Diverged("the training loss became nan"), ValueError("one class alone")])
def test_an_anchor_that_fails_is_left_out(tmp_path: Path, problem_of_it: Exception) -> None:
    problem, study, found = sized()
    failed: list[dict[str, int]] = []

    def train(widths: dict[str, int], steps: int) -> float:
        if not failed:
            failed.append(widths)
            raise problem_of_it
        return problem.evaluate(widths).accuracy

    chooser = Chooser(RunDirectory(tmp_path), later(train), score_steps=30, share=0.2)
    chosen = chooser.choose(problem, study, found, unseen)
    assert isinstance(chosen.best, Outcome)
    assert chooser.proxy()["samples"] == 4


def test_a_file_that_no_run_wrote_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "anchors.json").write_text('{"schema_version": 1, "anchors": [{"steps": 3}]}')
    problem, study, found = sized()
    chooser = Chooser(RunDirectory(tmp_path), later(lambda widths, steps: 0.5), score_steps=30, share=0.2)
    chooser.choose(problem, study, found, unseen)
    assert "anchors.json is invalid" in caplog.text
    assert chooser.proxy()["spearman"] is None
