"""From predicted to measured latency: the search's rounds.

Without a latency budget there is one round. With one, the finalists of each round are measured; where the best or the
uniform policy breaks the limit, the measurements correct the table and another, shorter round follows under the
corrected costs. Trials of earlier rounds are kept: what they scored holds, whatever their latency turned out to be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import optuna

from amc.budget import Budget, Limit
from amc.cost import Cost
from amc.errors import BudgetError, DeviceError
from amc.problem import Problem
from latency.paired import Reading
from search.bench import Bench, Widths
from search.compose import Setup
from search.strategies.uniform import uniform_policy
from search.study import SearchResult, outcomes

log = logging.getLogger("amc")

ROUNDS = 6
FINALISTS = 3
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
    for _ in range(ROUNDS):
        if found.best is None:
            return setup, found
        decisive = {setup.problem.widths(found.best.widths), uniform_policy(setup.problem)}
        try:
            readings = bench.measure(sorted(decisive | set(finalists(setup.problem, study))))
        except DeviceError as error:
            log.warning("the finalists could not be measured; their latency is the table's prediction: %s", error)
            return setup, found
        log.info("measured: %s", ", ".join(f"{reading.ratio:.3f}" for reading in readings.values()))
        if all(within(readings[widths], limit) for widths in decisive):
            return setup, found
        worst = max(readings[widths].ratio_ci95[1] for widths in decisive)
        log.warning(
            "measured, the latency is up to %.3f of dense, above the limit of %.3f; the table is corrected and the "
            "search goes on",
            worst,
            limit.fraction,
        )
        bench = bench.corrected(readings)
        try:
            setup = with_bench(setup, bench)
        except BudgetError as error:
            log.warning(
                "the search ends above the latency limit, which the corrected table calls out of reach: %s", error
            )
            return setup, found
        found = search_round(setup, found.trials + found.failed + more, None)
    log.warning("after %d rounds the measured latency is still above the limit", ROUNDS)
    return setup, found


def finalists(problem: Problem, study: optuna.Study) -> list[Widths]:
    """The best different policies of the study that are within the budget, best first."""
    ranked = sorted(outcomes(problem, study), key=lambda outcome: -outcome.reward)
    policies = (problem.widths(outcome.widths) for outcome in ranked)
    return [widths for widths in policies if problem.budget.met(widths)][:FINALISTS]


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
