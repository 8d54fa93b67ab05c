"""Budgets are hard: what `project` and `max_width` give is within every limit, and wastes nothing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from amc.budget import Budget, Limit, LimitSpec, parse_budget
from amc.cost import FunctionCost, analytic
from amc.errors import BudgetError
from amc.groups import Group
from tests.synthetic import chain

networks = st.builds(
    chain,
    st.lists(st.integers(1, 24), min_size=3, max_size=7),
    st.lists(st.sampled_from([1, 3, 5]), min_size=7, max_size=7),
    st.lists(st.integers(1, 64), min_size=7, max_size=7),
    st.sampled_from([1, 2, 8]),
)
limits = st.dictionaries(st.sampled_from(["flops", "params", "size"]), st.floats(0.02, 1.0), min_size=1)


def budget_of(structure, fractions) -> Budget:
    specs = [LimitSpec(name, fraction, True, f"{name}={fraction}") for name, fraction in fractions.items()]
    try:
        return Budget.of(structure.groups, analytic(structure), specs)
    except BudgetError:
        assume(False)
        raise


@settings(deadline=None, max_examples=150)
@given(networks, limits, st.integers(0, 2**32 - 1))
def test_project_is_feasible_and_leaves_no_step_that_fits(structure, fractions, seed):
    budget = budget_of(structure, fractions)
    rng = random.Random(seed)
    proposal = [rng.choice(group.widths) for group in structure.groups]
    projected = budget.project(proposal)
    assert budget.met(projected)
    assert all(width in group.widths for width, group in zip(projected, structure.groups, strict=True))
    if budget.met(proposal):
        assert projected == tuple(proposal)
        return
    for i, group in enumerate(structure.groups):
        wider = [width for width in group.widths if width > projected[i]]
        if wider:
            assert not budget.met((*projected[:i], wider[0], *projected[i + 1 :]))


@settings(deadline=None, max_examples=80)
@given(networks, limits, st.integers(0, 2**32 - 1))
def test_max_width_is_the_largest_that_later_groups_at_their_floor_allow(structure, fractions, seed):
    budget, prefix = budget_of(structure, fractions), []
    rng = random.Random(seed)
    for i, group in enumerate(structure.groups):
        best = budget.max_width(prefix, i)
        feasible = [w for w in group.widths if budget.met((*prefix, w, *budget.floor[i + 1 :]))]
        assert best == feasible[-1]
        filling = [w for w in group.widths if budget.met((*prefix, w, *budget.dense[i + 1 :]))]
        assert budget.max_width(prefix, i, rest=budget.dense) == max(filling, default=group.widths[0])
        prefix.append(rng.choice([w for w in group.widths if w <= best]))
    assert budget.met(prefix)


@settings(deadline=None, max_examples=80)
@given(networks, limits, st.integers(0, 2**32 - 1))
def test_fill_uses_the_budget_up(structure, fractions, seed):
    budget = budget_of(structure, fractions)
    rng = random.Random(seed)
    filled = budget.fill([rng.choice(group.widths) for group in structure.groups])
    assert budget.met(filled)
    for i, group in enumerate(structure.groups):
        wider = [width for width in group.widths if width > filled[i]]
        if wider:
            assert not budget.met((*filled[:i], wider[0], *filled[i + 1 :]))


def test_a_width_goes_to_the_nearest_allowed_one_and_of_two_to_the_wider():
    few = Group("a", 8, (2, 4, 8))
    assert [few.snap(width) for width in (0, 2.9, 3, 5.9, 6, 99)] == [2, 2, 4, 4, 8, 8]
    assert [few.snap_down(width) for width in (0, 2, 3.9, 4, 7.9, 99)] == [2, 2, 2, 4, 4, 8]


def linear(weights, limit: float) -> Budget:
    """Groups of up to eight channels, each at a price of its own."""
    groups = [Group(f"g{i}", 8, tuple(range(1, 9))) for i in range(len(weights))]
    cost = FunctionCost("flops", "MAC", lambda widths: sum(w * n for w, n in zip(weights, widths, strict=True)))
    return Budget(groups, [Limit(cost, limit, 8 * sum(weights))])


def test_what_scaling_left_goes_to_what_was_proposed_before_it_goes_beyond():
    assert linear((1, 4, 4), 13).project((1, 2, 2)) == (1, 2, 1)
    assert linear((1, 4, 4), 14).project((1, 2, 2)) == (2, 2, 1)


def test_a_fraction_of_a_count_is_rounded_down_but_not_below_itself():
    """57 % of 100 are 57, though in floats 0.57 * 100 is less."""
    cost = FunctionCost("flops", "MAC", lambda widths: 10 * sum(widths))
    for text, limit in (("flops=0.57", 57), ("flops=57%", 57), ("flops=0.579", 57)):
        budget = Budget.of([Group("a", 10, (1, 10))], {"flops": cost}, parse_budget(text))
        assert budget.limits[0].value == limit


def test_costs_of_a_stack_by_hand():
    costs = analytic(chain([3, 4, 2], [3, 1], [100, 25]))
    assert costs["flops"]([4]) == 100 * 4 * 3 * 9 + 25 * 2 * 4
    assert costs["flops"]([1]) == 100 * 1 * 3 * 9 + 25 * 2 * 1
    assert costs["params"]([4]) == (4 * 3 * 9 + 4) + (2 * 4 + 2)
    assert costs["params"]([3]) == (3 * 3 * 9 + 3) + (2 * 3 + 2)


def test_an_absolute_and_a_fractional_limit_mean_the_same_number():
    structure = chain([3, 16, 16, 10], [3, 3, 1], [64, 16, 1])
    costs = analytic(structure)
    dense = costs["params"]([16, 16])
    half = Budget.of(structure.groups, costs, parse_budget("params=50%"))
    absolute = Budget.of(structure.groups, costs, [LimitSpec("params", dense // 2, False, "")])
    assert half.limits[0].value == absolute.limits[0].value == dense // 2
    assert half.project((16, 16)) == absolute.project((16, 16))


def test_a_limit_keeps_the_fraction_that_was_asked_for_though_its_value_is_rounded_down():
    structure = chain([3, 16, 16, 10], [3, 3, 1], [64, 16, 1])
    costs = analytic(structure)
    dense = costs["params"]([16, 16])
    [limit] = Budget.of(structure.groups, costs, parse_budget("params=0.3")).limits
    assert limit.value < 0.3 * dense
    assert limit.fraction == 0.3
    [limit] = Budget.of(structure.groups, costs, parse_budget("params=1k")).limits
    assert limit.fraction == 1000 / dense


@pytest.mark.parametrize(
    ("text", "value", "fraction"),
    [
        ("flops=0.5", 0.5, True),
        ("flops=50%", 0.5, True),
        (" flops = 0.5 ", 0.5, True),
        ("flops=1", 1.0, True),
        ("flops=60M", 60e6, False),
        ("params=300k", 300e3, False),
        ("latency=8ms", 8.0, False),
        ("latency=250us", 0.25, False),
        ("size=1.5MiB", 1.5 * 2**20, False),
    ],
)
def test_limits_are_read_with_their_units(text, value, fraction):
    (limit,) = parse_budget(text)
    assert limit.value == pytest.approx(value)
    assert limit.fraction is fraction


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flops=1.7", r"must be in \(0, 1\].*flops=1.7M"),
        ("flops=0", r"must be in \(0, 1\]"),
        ("flop=0.5", "did you mean 'flops'"),
        ("flops", "COST=LIMIT"),
        ("flops=", "not a limit"),
        ("flops=abc", "not a limit"),
        ("flops=nan", "not a limit"),
        ("flops=-0.5", "not a limit"),
        ("flops=8ms", "not a limit"),
        ("latency=3M", "not a limit"),
        ("flops=0.5,flops=0.4", "2 times"),
    ],
)
def test_a_limit_that_cannot_be_read_says_how_to_write_it(text, says):
    with pytest.raises(BudgetError, match=says):
        parse_budget(text)


def test_an_unreachable_budget_names_the_lowest_reachable_fraction_and_that_one_is_reachable():
    structure = chain([3, 8, 8, 10], [3, 3, 1], [64, 16, 1])
    costs = analytic(structure)
    with pytest.raises(BudgetError) as caught:
        Budget.of(structure.groups, costs, parse_budget("flops=0.00001"))
    named = str(caught.value).split("lowest reachable: flops=")[1][:5]
    lowest = costs["flops"]([1, 1]) / costs["flops"]([8, 8])
    assert float(named) == math.ceil(lowest * 1000) / 1000
    assert Budget.of(structure.groups, costs, parse_budget(f"flops={named}")).met([1, 1])


def test_a_budget_in_words_has_every_digit_of_a_count():
    structure = chain([16, 32, 64], [3, 3, 3], [256, 200, 64])
    budget = Budget.of(structure.groups, analytic(structure), parse_budget("flops=0.5,params=1.25k"))
    flops = budget.limits[0]
    assert flops.value > 1e6
    assert str(budget).startswith(f"flops at most {flops.value:,} MAC (0.500 of dense), params at most 1,250 (")
