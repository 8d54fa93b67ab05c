"""What `result.json` and the policy files of a run hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from amc.budget import parse_budget
from amc.cost import spent
from amc.evaluate import kept_units
from amc.models import Loaded
from amc.policy import BudgetInfo, GroupPolicy, InputInfo, ModelInfo, Policy
from amc.problem import Outcome, WidthsByName
from amc.weights import structure_sha256, weights_sha256
from latency.paired import Reading
from search.compose import Setup
from search.finish import Candidate
from search.settle import within


def result_of(
    setup: Setup,
    dense: tuple[float, float | None],
    winner: Candidate,
    uniform: Candidate,
    readings: Mapping[str, Reading],
    memory: Mapping[str, int | None],
    search: Mapping[str, Any],
    proxy: Mapping[str, Any],
) -> dict[str, Any]:
    """What `result.json` holds; a figure that was not measured is None.

    dense: the dense model's `accuracies`. readings: of `dense`, and of `best` and `uniform` where these were measured.
    memory: of the activations of the same three, bytes. proxy: what the score is worth.
    """
    dense_figures = {
        "accuracy": dense[0],
        "test_accuracy": dense[1],
        **_analytic(setup, setup.problem.budget.dense),
        "memory": memory["dense"],
        "latency_ms": readings["dense"].median_ms if "dense" in readings else None,
    }
    return {
        "schema_version": 1,
        "settings": setup.settings.as_json(),
        "budget": [info.model_dump() for info in budget_infos(setup, winner.widths, readings.get("best"))],
        "dense": dense_figures,
        "best": _figures(setup, winner, "best", readings, memory),
        "uniform": _figures(setup, uniform, "uniform" if "uniform" in memory else "best", readings, memory),
        "proxy": dict(proxy),
        "search": dict(search),
    }


def _figures(
    setup: Setup, candidate: Candidate, file: str, readings: Mapping[str, Reading], memory: Mapping[str, int | None]
) -> dict[str, Any]:
    """The latency in ms is the dense model's times the paired ratio, so that it says the same as the speed-up."""
    reading = readings.get(file)
    dense_ms = readings["dense"].median_ms if "dense" in readings else None
    return {
        "source": candidate.source,
        "accuracy": candidate.accuracy,
        "test_accuracy": candidate.test_accuracy,
        **_analytic(setup, setup.problem.widths(candidate.widths)),
        "memory": memory[file],
        "latency_ms": reading.ratio * dense_ms if reading and dense_ms else None,
        "latency_predicted_ms": _predicted(setup, candidate, dense_ms),
        "speedup": reading.speedup if reading else None,
        "speedup_ci95": list(reading.speedup_ci95) if reading else None,
        "widths": dict(candidate.widths),
    }


def _predicted(setup: Setup, candidate: Candidate, dense_ms: float | None) -> float | None:
    """The predicted ratio times the dense model's latency as measured now: comparable with the measured latency."""
    if setup.bench is None:
        return None
    cost = setup.bench.cost
    return cost.ratio(setup.problem.widths(candidate.widths)) * (dense_ms or cost.dense)


def _analytic(setup: Setup, widths: Any) -> dict[str, float]:
    return {name: value for name, value in spent(setup.costs, widths).items() if name in ("flops", "params", "size")}


def budget_infos(setup: Setup, widths: WidthsByName, reading: Reading | None = None) -> list[BudgetInfo]:
    """Every limit, and what a policy spends of it: of latency, as measured, and None where it was not."""
    ordered = setup.problem.widths(widths)
    infos = []
    for limit in setup.problem.budget.limits:
        achieved: float | None
        met: bool | None
        if limit.cost.name == "latency":
            achieved = reading.ratio * limit.dense if reading else None
            met = within(reading, limit) if reading else None
        else:
            achieved = limit.cost(ordered)
            met = achieved <= limit.value
        infos.append(
            BudgetInfo(cost=limit.cost.name, limit=limit.value, fraction=limit.fraction, achieved=achieved, met=met)
        )
    return infos


def policy_of(setup: Setup, candidate: Candidate, trials: int, versions: Mapping[str, str]) -> Policy:
    """The policy file's content: nothing in it differs between two equal runs."""
    kept = kept_units(setup.order, candidate.widths)
    settings, costs = setup.settings, _analytic(setup, setup.problem.widths(candidate.widths))
    return Policy(
        model=model_info(setup.loaded),
        groups=[
            GroupPolicy(
                name=group.name,
                kind=group.kind,
                channels=group.channels,
                width=candidate.widths[group.name],
                keep_ratio=candidate.widths[group.name] / group.channels,
                kept=kept[group.name].tolist(),
                members=list(group.members),
            )
            for group in setup.structure.groups
        ],
        importance=settings.importance,
        budget=[_without_times(info, setup) for info in budget_infos(setup, candidate.widths)],
        result={"source": candidate.source, "accuracy": candidate.accuracy, **costs},
        search={"strategy": settings.strategy, "reward": settings.reward, "trials": trials, "seed": settings.seed},
        versions=dict(versions),
    )


def _without_times(info: BudgetInfo, setup: Setup) -> BudgetInfo:
    """Of a latency limit, what the user wrote: a fraction or milliseconds. The other is made with a measured one."""
    if info.cost != "latency":
        return info
    [spec] = (spec for spec in parse_budget(setup.settings.budget) if spec.cost == "latency")
    return info.model_copy(update={"limit": None} if spec.fraction else {"fraction": None})


def model_info(loaded: Loaded) -> ModelInfo:
    """The dense model as a policy file names it."""
    inputs = loaded.inputs
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    return ModelInfo(
        name=loaded.name,
        inputs=[
            InputInfo(name=name, shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in zip(loaded.input_names, tensors, strict=True)
        ],
        structure_sha256=structure_sha256(loaded.model),
        weights_sha256=weights_sha256(loaded.model),
    )


def front_policy(like: Policy, outcome: Outcome, order: Mapping[str, np.ndarray]) -> Policy:
    """A policy file of one of a front's policies, made from another policy of the run; it was scored, no more."""
    kept = kept_units(order, outcome.widths)
    groups = [
        group.model_copy(
            update={
                "width": outcome.widths[group.name],
                "keep_ratio": outcome.widths[group.name] / group.channels,
                "kept": kept[group.name].tolist(),
            }
        )
        for group in like.groups
    ]
    result = {"source": "search", "score": outcome.accuracy, **outcome.costs}
    return like.model_copy(update={"groups": groups, "budget": [], "result": result})


def front_lines(files: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """What `result.json` says of a front: the files of its policies, their scores and costs, cheapest first."""
    return [
        {"policy": name, "score": outcome.accuracy, **outcome.costs, "widths": dict(outcome.widths)}
        for name, outcome in files.items()
    ]
