"""What holds for every policy and every setting, drawn at random.

The full numbers: `pytest tests/test_properties.py --hypothesis-profile=full` draws a thousand of each.
"""

from __future__ import annotations

import contextlib
import io
import string
from dataclasses import fields
from functools import cache

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from amc.budget import Budget, LimitSpec
from amc.cost import analytic
from amc.errors import AmcError, UsageError
from amc.problem import Problem
from amc.slim import slim
from envs.pruning import PruningEnv
from search.cli import given_settings, parser_of
from search.finished import SettingsFile
from search.settings import Settings, settings_from
from search.strategies import STRATEGIES
from tests.test_topologies import keep, recount, traced, uncounted
from tests.topologies import TOPOLOGIES

ARCHITECTURES = sorted(TOPOLOGIES)
traced = cache(traced)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- policies


@st.composite
def problems(draw):
    """A network, and a problem on it with one to three limits that its narrowest policy keeps."""
    name = draw(st.sampled_from(ARCHITECTURES))
    _, _, structure = traced(name)
    costs, floor = analytic(structure), [group.floor for group in structure.groups]
    specs = []
    for cost in draw(st.lists(st.sampled_from(sorted(costs)), min_size=1, max_size=3, unique=True)):
        dense = costs[cost]([group.channels for group in structure.groups])
        low = costs[cost](floor) / dense
        fraction = low + (1 - low) * draw(st.floats(0, 1))
        specs.append(LimitSpec(cost, min(fraction * (1 + 1e-9), 1.0), True, f"{cost}={fraction}"))
    budget = Budget.of(structure.groups, costs, specs)
    return name, Problem(structure.groups, budget, lambda _: 0.0, costs=costs)


@given(problems(), st.data())
def test_no_policy_exceeds_the_budget_counted_on_the_slim_model(drawn, data):
    """By whichever way it is proposed; counted not by our cost model but on the tensors and layers that are left."""
    name, problem = drawn
    event(f"architecture {name}")
    count = len(problem.groups)
    way = data.draw(st.sampled_from(["admit", "project", "walk"]), label="way")
    if way == "walk":
        env = PruningEnv(problem)
        env.reset()
        for action in data.draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count)):
            env.decide(action)
        widths = tuple(env.executed)
    else:
        proposal = data.draw(st.lists(st.floats(-10, 100), min_size=count, max_size=count))
        widths = problem.admit(proposal) if way == "admit" else problem.budget.project(proposal)
    net, inputs, structure = traced(name)
    small = slim(net, structure, {g.name: keep(g, w) for g, w in zip(structure.groups, widths, strict=True)})
    spent = {
        "flops": recount(small, inputs) + uncounted(name),
        "params": sum(parameter.numel() for parameter in small.parameters()),
    }
    for limit in problem.budget.limits:
        assert limit.cost(widths) <= limit.value
        if limit.cost.name in spent:
            assert spent[limit.cost.name] <= limit.value, (limit, widths)


# ---- settings

NAMES = [field.name for field in fields(Settings)]
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-9, 99), st.floats(), st.text(max_size=8)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
likely = st.one_of(
    st.sampled_from(
        [*STRATEGIES, "l1", "accuracy", "digits", "10m", "true", "0.5", "flops=0.5", "1e3", "-1", "½", "٣"]
    ),
    values,
)


@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(string.ascii_lowercase + "_", max_size=9)), likely))
def test_settings_are_read_and_kept_or_refused_by_name(given_values):
    try:
        found = settings_from(given_values)
    except UsageError as error:
        event("refused")
        said = str(error)
        assert any(repr(name) in said or f"--{name.replace('_', '-')} " in said for name in given_values), said
        assert "Traceback" not in said
        return
    event("read")
    stored = SettingsFile.model_validate({"settings": found.as_json()}).settings
    assert settings_from(stored) == found


words = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in NAMES]),
    st.sampled_from(["--budget=flops=0.5", "--quiet", "--json", "--resume", "--out", "0.5", "3", "tpe", "--", "-x"]),
    st.text(max_size=10),
)


@given(st.lists(words, max_size=6))
def test_a_command_line_is_read_or_refused_in_a_sentence(line):
    refused = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            settings_from(given_settings(parser_of("search").parse_args(line)))
    except (AmcError, SystemExit) as error:  # help was asked for, perhaps
        refused = error
    if isinstance(refused, SystemExit):
        assert refused.code == 0
    elif refused is not None:
        assert refused.exit_status == 2
        assert str(refused).strip()
