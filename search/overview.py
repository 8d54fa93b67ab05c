"""What a search would work on, without one: groups, frozen parts, the range of every cost, and how long it would take.

Nothing here needs trained weights: which channels are coupled, what they cost and how long a candidate takes do not
depend on them. So the embedded default is not trained for this, and channels are not ranked.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amc.budget import Budget, LimitSpec, parse_budget
from amc.cost import Cost, analytic, spent
from amc.data import Data
from amc.errors import BudgetError, DataError
from amc.finetune import Diverged
from amc.groups import Frozen, Group, Structure
from amc.importance import rank
from amc.models import Loaded, load_model
from amc.own_data import DatasetSplit
from amc.problem import allowed
from amc.seeding import seeded
from search.compose import (
    accelerator,
    evaluator_of,
    is_trained_here,
    read_data,
    set_threads,
    trace_model,
)
from search.display import Display
from search.settings import Settings, settings_from

log = logging.getLogger("amc")


@dataclass(frozen=True)
class GroupRow:
    """One group, in forward order.

    widths: those that a policy may choose, ascending; `allowed` says them in words.
    flops_share: the share of the dense model's FLOPs that goes when this group alone is at its floor, in [0, 1].
    """

    name: str
    kind: str
    channels: int
    widths: tuple[int, ...]
    allowed: str
    flops_share: float
    members: tuple[str, ...]


@dataclass(frozen=True)
class CostRange:
    """What can be reached of one cost. lowest_fraction: of the dense value, rounded up to three decimals."""

    cost: str
    unit: str
    dense: float
    lowest: float
    lowest_fraction: float


@dataclass(frozen=True)
class LimitCheck:
    """Whether one budget can be reached.

    reachable: None where it takes a measurement to know. limit: absolute, in the cost's unit; None likewise.
    """

    budget: str
    cost: str
    limit: float | None
    reachable: bool | None


@dataclass(frozen=True)
class Estimate:
    """How long a search would take, s. trials: how many it would score; fewer where the time limit comes first."""

    seconds_per_trial: float
    trials: int
    seconds: float


@dataclass(frozen=True)
class Overview:
    """All of it; `dataclasses.asdict` gives its JSON value.

    inputs: name -> shape of the example inputs. data: as given; None where nothing was read.
    prunable: the share of the dense model's FLOPs that goes when every group is at its floor, in [0, 1].
    budgets: all of them hold at once if each can be reached, since the smallest policy has the lowest of every cost.
    estimate: None without data, or where a budget can't be reached or no candidate be timed.
    """

    model: str
    data: str | None
    inputs: Mapping[str, Sequence[int]]
    groups: tuple[GroupRow, ...]
    frozen: tuple[Frozen, ...]
    prunable: float
    costs: tuple[CostRange, ...]
    budgets: tuple[LimitCheck, ...]
    estimate: Estimate | None


def overview(given: Mapping[str, Any], display: Display | None = None) -> Overview:
    """What a search with the options `given` would work on.

    Data is read where it is given, or where the model is the embedded default; else the inputs come from
    `input_shape` or the model.

    Raises:
        AmcError: whatever in the options can't be used. A budget out of reach is not an error here.
    """
    display = display or Display(quiet=True)
    settings = settings_from(given)
    specs = parse_budget(settings.budget) if settings.budget else ()
    data = read_data(settings) if "data" in given or is_trained_here(settings) else None
    # Labels of the user's own may be anything: who searches with a metric and a step of one's own sees the groups, too.
    own = data is not None and isinstance(data.val, DatasetSplit)
    loaded = load_model(
        settings.model,
        weights=settings.weights,
        data=data,
        input_shape=settings.input_shape,
        classifies=not own,
        seed=settings.seed,
    )
    loaded.model.to(accelerator(settings.accelerator))
    inputs = loaded.inputs.values() if isinstance(loaded.inputs, dict) else loaded.inputs
    with display.bar(f"tracing {loaded.name}"):
        structure = trace_model(loaded, settings)
    costs = analytic(structure)
    set_threads(settings, costs["flops"]([group.channels for group in structure.groups]))
    checks = limit_checks(structure.groups, costs, specs)
    estimate = None
    if data is not None and all(check.reachable is not False for check in checks):
        known = [spec for spec, check in zip(specs, checks, strict=True) if check.reachable]
        try:
            with display.bar("timing one candidate"):
                estimate = estimated(settings, loaded, data, structure, Budget.of(structure.groups, costs, known))
        except (DataError, Diverged) as problem:
            if not own:
                raise
            log.warning("the search time is not estimated, since no candidate could be timed: %s", problem)
    return Overview(
        model=loaded.name,
        data=None if data is None else data.name,
        inputs={name: tuple(x.shape) for name, x in zip(loaded.input_names, inputs, strict=True)},
        groups=group_rows(structure),
        frozen=structure.frozen,
        prunable=prunable(structure),
        costs=cost_ranges(structure.groups, costs),
        budgets=checks,
        estimate=estimate,
    )


def group_rows(structure: Structure) -> tuple[GroupRow, ...]:
    """The groups with their share of the FLOPs."""
    groups, flops = structure.groups, analytic(structure)["flops"]
    widths = [group.channels for group in groups]
    dense = flops(widths)
    rows = []
    for i, group in enumerate(groups):
        without = flops([*widths[:i], group.floor, *widths[i + 1 :]])
        share = (dense - without) / dense if dense else 0.0
        rows.append(
            GroupRow(group.name, group.kind, group.channels, group.widths, allowed(group), share, group.members)
        )
    return tuple(rows)


def prunable(structure: Structure) -> float:
    """The share of the dense FLOPs that goes when every group is at its floor."""
    flops = analytic(structure)["flops"]
    dense = flops([group.channels for group in structure.groups])
    return (dense - flops([group.floor for group in structure.groups])) / dense if dense else 0.0


def cost_ranges(groups: Sequence[Group], costs: Mapping[str, Cost]) -> tuple[CostRange, ...]:
    """Every cost of the dense model and of the smallest policy."""
    dense, lowest = (spent(costs, widths) for widths in zip(*((g.channels, g.floor) for g in groups), strict=True))
    return tuple(
        CostRange(name, cost.unit, dense[name], lowest[name], math.ceil(lowest[name] / dense[name] * 1000) / 1000)
        for name, cost in costs.items()
        if dense[name]
    )


def limit_checks(
    groups: Sequence[Group], costs: Mapping[str, Cost], specs: Iterable[LimitSpec]
) -> tuple[LimitCheck, ...]:
    """Each budget for itself."""
    checks = []
    for spec in specs:
        if spec.cost not in costs:
            checks.append(LimitCheck(spec.text, spec.cost, None, None))
            continue
        try:
            limit = Budget.of(groups, costs, [spec]).limits[0].value
        except BudgetError:
            limit = spec.value * (costs[spec.cost]([g.channels for g in groups]) if spec.fraction else 1)
            checks.append(LimitCheck(spec.text, spec.cost, limit, False))
        else:
            checks.append(LimitCheck(spec.text, spec.cost, limit, True))
    return tuple(checks)


def estimated(settings: Settings, loaded: Loaded, data: Data, structure: Structure, budget: Budget) -> Estimate:
    """Times one candidate: the uniform policy at the budget, or every group at half its channels without one.

    Without a learning rate, since that takes as long and can't diverge, whatever the weights.
    """
    groups = structure.groups
    widths = budget.project(budget.dense) if budget.limits else [group.snap(group.channels / 2) for group in groups]
    order = rank(loaded.model, structure, "l1")
    evaluator = evaluator_of(replace(settings, score_lr=0.0), loaded, data, structure, order)
    with seeded(settings.seed, "evaluate"):
        start = time.perf_counter()
        evaluator({group.name: width for group, width in zip(groups, widths, strict=True)})
        seconds = time.perf_counter() - start
    trials, time_limit = settings.limits()
    in_time = math.inf if time_limit is None else max(math.floor(time_limit / seconds), 1)
    planned = int(min(in_time, math.inf if trials is None else trials))
    return Estimate(seconds, planned, planned * seconds)
