"""From predicted to measured latency: the search's rounds.

Without a latency budget there is one round. With one, the finalists of each round are measured. Where one that is as
good as the best is within the limit, it is what the search found. Where none is, the measurements correct the table and
another, shorter round follows under the corrected costs. Trials of earlier rounds are kept: what they scored holds,
whatever their latency turned out to be. The uniform policy, which is only compared with, is corrected without a round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import optuna

from amc.budget import Budget, Limit
from amc.cost import Cost
from amc.errors import BudgetError, DeviceError
from amc.problem import Outcome, Problem
from latency.paired import Reading
from search.bench import Bench
from search.compose import Setup
from search.strategies.uniform import uniform_policy
from search.study import SearchResult, outcomes

log = logging.getLogger("amc")

ROUNDS = 6
FINALISTS = 3
AS_GOOD = 0.01
"""Rewards that differ by a smaller part are not worth another round: a score's own noise is of this size."""
WIDER = 0.005
"""What the limit's margin grows by with each correction: readings scatter round what a corrected table says."""
MORE = 5
"""A further round may take one in so many of the trials of the first."""

Round = Callable[[Setup, int | None, float | None], SearchResult]
"""Searches a setup until so many trials are done, or so many seconds have passed, over all rounds."""


def settle(setup: Setup, study: optuna.Study, search_round: Round) -> tuple[Setup, SearchResult]:
    """Searches in rounds until what is measured is within the latency budget; returns the setup of the last round."""
    found = search_round(setup, *setup.settings.limits())
    bench = setup.bench
    limit = latency_limit(setup.problem.budget)
    if bench is None or limit is None or not bench.measures:
        return setup, found
    more = max(min(found.trials + found.failed, setup.settings.planned_trials()) // MORE, 1)
    met: dict[tuple[int, ...], Outcome] = {}
    for _ in range(ROUNDS):
        if found.best is None:
            break
        problem = setup.problem
        candidates = {problem.widths(one.widths): one for one in (found.best, *finalists(problem, study))}
        uniform = uniform_policy(problem)
        try:
            readings = bench.measure(list(dict.fromkeys((*candidates, uniform))))
        except DeviceError as error:
            log.warning("the finalists could not be measured; their latency is the table's prediction: %s", error)
            break
        log.info("measured, best first, uniform last: %s", ", ".join(f"{one.ratio:.3f}" for one in readings.values()))
        met |= {widths: one for widths, one in candidates.items() if within(readings[widths], limit)}
        chosen = _as_good(problem, met, found.best)
        if chosen and within(readings[uniform], limit):
            return setup, replace(found, best=chosen)
        log.warning(
            "measured, the latency of the %s policy is up to %.3f of dense, above the limit of %.3f; the table is "
            "corrected%s",
            "uniform" if chosen else "best",
            readings[uniform if chosen else problem.widths(found.best.widths)].ratio_ci95[1],
            limit.fraction,
            "" if chosen else " and the search goes on",
        )
        bench = bench.corrected(readings)
        try:
            setup = with_bench(setup, bench)
        except BudgetError as error:
            log.warning("the search ends; the corrected table calls the latency limit out of reach: %s", error)
            break
        found = replace(found, best=chosen) if chosen else search_round(setup, found.trials + found.failed + more, None)
    else:
        log.warning(
            "after %d rounds the measured latency of %s is still above the limit",
            ROUNDS,
            "the uniform policy" if met else "all policies",
        )
    if not met:
        return setup, found
    return setup, replace(found, best=chosen or max(met.values(), key=lambda one: one.reward), alone=True)


def _as_good(problem: Problem, met: Mapping[tuple[int, ...], Outcome], best: Outcome) -> Outcome | None:
    """Of the policies that were measured within the limit, the highest reward, if the best policy's is no better.

    The best goes before its equals, and before all that the search could have chosen in its place: longer fine-tunes
    may have told it that their scores are luck.
    """
    if problem.widths(best.widths) not in met:
        found = max(met.values(), key=lambda one: one.reward, default=None)
        return found if found and found.reward >= best.reward - AS_GOOD * abs(best.reward) else None
    beyond = [one for widths, one in met.items() if not problem.budget.met(widths)]  # under a table corrected since
    better = max(beyond, key=lambda one: one.reward, default=best)
    return better if better.reward > best.reward + AS_GOOD * abs(best.reward) else best


def ranked(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """The different policies of the study, whatever the budget, best first."""
    return sorted(outcomes(problem, study), key=lambda outcome: -outcome.reward)


def finalists(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """The best of them that are within the budget."""
    return [one for one in ranked(problem, study) if problem.budget.met(problem.widths(one.widths))][:FINALISTS]


def latency_limit(budget: Budget) -> Limit | None:
    """The latency limit among a budget's, if it has one."""
    return next((limit for limit in budget.limits if limit.cost.name == "latency"), None)


def within(reading: Reading, limit: Limit) -> bool:
    """Whether the upper end of a measured interval is within a latency limit, both relative to the dense model."""
    return reading.ratio_ci95[1] <= limit.fraction


def with_bench(setup: Setup, bench: Bench) -> Setup:
    """The same setup under the costs of a corrected table, and a wider margin."""
    costs: dict[str, Cost] = {**setup.costs, "latency": bench.cost}
    old = setup.problem
    limits = [
        replace(limit, cost=bench.cost, margin=limit.margin + WIDER) if limit.cost.name == "latency" else limit
        for limit in old.budget.limits
    ]
    problem = old.under(Budget(old.groups, limits), costs)
    return replace(setup, bench=bench, costs=costs, problem=problem)
