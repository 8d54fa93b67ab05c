"""Composition: settings in, a problem and its parts out. The one place where the packages meet."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import envs  # noqa: F401  (registers the environment; and a user's own `envs` beside a FILE.py comes too late)
import latency  # noqa: F401  (likewise)
from amc.budget import Budget, parse_budget
from amc.catalog import MODELS, PRECISIONS, REWARDS, SOFT
from amc.cost import Cost, analytic
from amc.coupling import trace
from amc.data import Data, load_data
from amc.errors import BudgetError, ModelError, UsageError
from amc.evaluate import Evaluator, Metric, ScoreSettings, Tune, in_memory
from amc.finetune import AUGMENTATIONS
from amc.forward import device_of, to_device
from amc.groups import Structure
from amc.importance import rank
from amc.layout import fast_layout
from amc.models import Inputs, Loaded, load_model
from amc.pretrain import RECIPES, is_cached, pretrained
from amc.problem import Problem, Worth
from amc.registry import resolve
from amc.reward import NEEDS_LATENCY
from amc.seeding import threads
from amc.slim import copied
from amc.verify import verify
from search.display import Display
from search.recovery import check_recovery
from search.settings import Settings, settings_from

if TYPE_CHECKING:
    from search.bench import Bench
    from search.executor import Executor

log = logging.getLogger("amc")

LATENCY_MARGIN = 0.01
"""Of a predicted latency, so that the measured one is within the limit with the upper end of its interval."""

TINY = 4e6
"""Multiply-accumulates of one image below which a second thread costs more than it brings."""


@dataclass(frozen=True, eq=False)
class Setup:
    """All the parts of a run.

    loaded: the dense model on its accelerator, with example inputs. order: each group's units, best first.
    augment: the augmentations that fine-tuning uses. executor: who scores policies; None: this process.
    """

    settings: Settings
    loaded: Loaded
    data: Data
    structure: Structure
    costs: Mapping[str, Cost]
    order: Mapping[str, np.ndarray]
    evaluator: Evaluator
    problem: Problem
    augment: tuple[str, ...]
    metric: Metric | None
    bench: Bench | None
    executor: Executor | None = None


@torch.inference_mode(False)
def build(
    *,
    model: Any = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    **settings: Any,
) -> Problem:
    """The narrow waist alone: what `search.run` would search.

    model, data: what the options take, or a module and data sets of your own. metric: a model's worth, higher is
    better, in place of the accuracy. settings: any field of `Settings`, e.g. `budget="flops=0.5"`. Torch's threads are
    those of the settings while it builds and while it evaluates, and else the caller's.
    """
    named, own_model, own_data = with_objects(settings, model, data)
    with threads():
        setup = compose(named, model=own_model, data=own_data, metric=metric, finetune=finetune)
        evaluate = partial(_evaluate, setup.evaluator, torch.get_num_threads())
    made = setup.problem
    return Problem(made.groups, made.budget, evaluate, costs=made.costs, reward=made.reward)


def _evaluate(evaluator: Evaluator, number: int, widths: Mapping[str, int]) -> Worth:
    with threads(number):
        return evaluator(widths)


def with_objects(settings: Mapping[str, Any], model: Any, data: Any) -> tuple[Settings, nn.Module | None, Any]:
    """Settings, and the model and the data where they are objects and not names."""
    named = dict(settings)
    own_model, own_data = None, None
    if isinstance(model, nn.Module):
        own_model, named["model"] = model, type(model).__name__
    elif model is not None:
        named["model"] = str(model)
    if isinstance(data, str | os.PathLike):
        named["data"] = str(data)
    elif data is not None:
        own_data, named["data"] = data, data.name if isinstance(data, Data) else "own"
    return settings_from(named), own_model, own_data


def compose(
    settings: Settings,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    dense_weights: Path | None = None,
    table: Path | None = None,
    budget_required: bool = True,
    display: Display | None = None,
) -> Setup:
    """Builds everything from the settings; nothing is written.

    model, data: objects in place of what the settings name. dense_weights, table: of a run that is gone on with.
    budget_required: False where nothing is searched.

    Raises:
        AmcError: whatever in the settings can't be used.
    """
    display = display or Display(quiet=True)
    for option, given in (("metric", metric), ("finetune", finetune)):
        if given is not None and not callable(given):
            raise UsageError(f"{option}={given!r} can't be called; give a function")
    specs = parse_budget(settings.budget) if settings.budget else ()
    if budget_required and not specs:
        raise BudgetError("--budget is required: say what the model must fit, as in --budget flops=0.5")
    check_device(settings)
    loaded_data = read_data(settings, data)
    check_recovery(settings, loaded_data, metric, finetune)
    embedded = model is None and dense_weights is None and is_trained_here(settings)
    if embedded and not is_cached(settings.model, loaded_data):
        check_reachable([settings], loaded_data)
    loaded = load_dense(
        settings,
        loaded_data,
        model=model,
        weights=dense_weights,
        classifies=metric is None or (finetune is None and settings.recovers()),
        display=display,
    )
    structure = trace_model(loaded, settings)
    costs: dict[str, Cost] = analytic(structure)
    set_threads(settings, costs["flops"]([group.channels for group in structure.groups]))
    bench = None
    if any(spec.cost == "latency" for spec in specs):
        from search.bench import open_bench  # ONNX Runtime is loaded only where it is needed

        bench = open_bench(settings, loaded, structure, table=table, display=display)
        costs["latency"] = bench.cost
    elif settings.reward in NEEDS_LATENCY:
        costs["latency"] = _measured_latency(loaded, structure, settings)
    budget = Budget.of(structure.groups, costs, specs, {"latency": LATENCY_MARGIN})
    order = rank(
        loaded.model, structure, settings.importance, batches=calibration(loaded_data, settings), seed=settings.seed
    )
    augment = augmentations(settings.augment, loaded_data)
    evaluator = evaluator_of(settings, loaded, loaded_data, structure, order, metric=metric, finetune=finetune)
    reward = resolve(REWARDS, settings.reward, "--reward")
    problem = Problem(structure.groups, budget, evaluator, costs=costs, reward=reward)
    return Setup(settings, loaded, loaded_data, structure, costs, order, evaluator, problem, augment, metric, bench)


def check_reachable(settings: Sequence[Settings], data: Data) -> None:
    """Raises a BudgetError unless each budget of one model that needs no measurement can be reached; trains nothing."""
    one = settings[0]
    weights = None if is_trained_here(one) else one.weights
    loaded = load_model(one.model, weights=weights, data=data, input_shape=one.input_shape, seed=one.seed)
    structure = trace_model(loaded, one)
    costs = analytic(structure)
    for each in settings:
        specs = parse_budget(each.budget)
        Budget.of(structure.groups, costs, [spec for spec in specs if spec.cost in costs])


def evaluator_of(
    settings: Settings,
    loaded: Loaded,
    data: Data,
    structure: Structure,
    order: Mapping[str, np.ndarray],
    *,
    metric: Metric | None = None,
    finetune: Tune | None = None,
) -> Evaluator:
    """What scores the policies of a dense model."""
    return Evaluator(
        loaded.model,
        structure,
        order,
        train_split=data.train,
        val_split=data.val,
        settings=score_settings(settings),
        augment=augmentations(settings.augment, data),
        metric=metric,
        tune=finetune,
        layout=fast_layout(loaded.model, loaded.inputs),
        seed=settings.seed,
    )


def read_data(settings: Settings, data: Any = None) -> Data:
    """The data that the settings name, or `data`, with their options."""
    return load_data(
        settings.data if data is None else data,
        mean=settings.mean,
        std=settings.std,
        input_size=settings.input_size,
        seed=settings.seed,
    )


def trace_model(loaded: Loaded, settings: Settings) -> Structure:
    """The groups of a model as the settings restrict them, each tried once.

    Raises:
        ModelError: nothing is left to prune.
    """
    inputs = to_device(loaded.inputs, device_of(loaded.model))
    traced = trace(
        loaded.model,
        inputs,
        exclude=settings.exclude,
        only=settings.only,
        round_to=settings.round_to,
        min_keep=settings.min_keep,
    )
    structure = verify(loaded.model, inputs, traced)
    if not structure.groups:
        reasons = "; ".join(f"{frozen.name}: {frozen.reason}" for frozen in structure.frozen[:5])
        raise ModelError(f"nothing of {loaded.name} can be pruned: {reasons or 'it has no layers with channels'}")
    return structure


def score_settings(settings: Settings) -> ScoreSettings:
    """How candidates are scored."""
    return ScoreSettings(
        steps=settings.score_steps,
        batch=settings.score_batch,
        lr=settings.score_lr,
        weight_decay=settings.weight_decay,
        precision=resolve(PRECISIONS, settings.precision, "--precision"),
        images=settings.score_images,
        calibration=settings.calibration_images,
        reconstruct=settings.reconstruct,
        soft=settings.reward == SOFT and not settings.pareto,
    )


def augmentations(text: str, data: Data) -> tuple[str, ...]:
    """The augmentations that `--augment` asks for."""
    if text == "auto":
        return data.augment
    names = () if text == "none" else tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in AUGMENTATIONS:
            raise UsageError(f"--augment {text!r}: write auto, none, or some of {', '.join(AUGMENTATIONS)}")
    return names


def accelerator(name: str) -> torch.device:
    """The torch device that `--accelerator` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--accelerator {name!r} can't be used here ({str(error).splitlines()[0]}); write auto, cpu or cuda"
        ) from None
    return device


def check_device(settings: Settings) -> None:
    """Raises a DeviceError, or a UsageError, now rather than after the search, if the device can't be used."""
    if settings.device != "local" or settings.latency_providers != ("cpu",):
        from latency.device import check_providers, open_device

        device = open_device(settings.device)
        try:
            check_providers(device, settings.latency_providers)
        finally:
            device.close()


def set_threads(settings: Settings, flops: float) -> None:
    """Torch's CPU threads: as set, else one for a tiny model, which is quicker so, and steadier on a busy machine."""
    threads = settings.threads or (1 if flops < TINY else None)
    if threads:
        torch.set_num_threads(threads)


def load_dense(
    settings: Settings,
    data: Data | None,
    *,
    model: nn.Module | None = None,
    weights: Path | str | None = None,
    example: Inputs | None = None,
    classifies: bool = True,
    display: Display,
) -> Loaded:
    """The dense model that the settings name (or `model`), on its accelerator; the embedded default is trained first.

    weights: in place of the settings'. example: inputs, where neither the data nor the settings know any. classifies:
    as of `load_model`.
    """
    weights = weights or settings.weights
    spec: Any = settings.model if model is None else copied(model, {})  # the user's own stays as it is
    if model is None and not weights and is_trained_here(settings) and data is not None:
        with display.bar(f"training {settings.model} on {data.name}, once") as report:
            spec = pretrained(settings.model, data, progress=report)
    elif model is None and not weights and settings.model in MODELS:
        log.warning("%s has random weights; give trained ones by --weights", settings.model)
    loaded = load_model(
        spec,
        weights=weights,
        data=data,
        input_shape=settings.input_shape,
        example=example,
        classifies=classifies,
        seed=settings.seed,
    )
    loaded.model.to(accelerator(settings.accelerator))
    return replace(loaded, name=settings.model)


def is_trained_here(settings: Settings) -> bool:
    """Whether the model is an embedded one whose dense weights are made on first use."""
    return settings.model in RECIPES and settings.data == "digits" and not settings.weights


def calibration(data: Data, settings: Settings) -> Sequence[tuple[Any, Any]]:
    """What criteria that need data look at."""
    split = data.train if data.train is not None else data.val
    if settings.calibration_images == 0:
        return ()
    return in_memory(split, settings.calibration_images, batch=settings.score_batch, seed=settings.seed)


def _measured_latency(loaded: Loaded, structure: Structure, settings: Settings) -> Cost:
    from latency.measured import MeasuredLatency  # ONNX Runtime is loaded only where it is needed

    if settings.device != "local":
        raise UsageError("rewards that measure each candidate's latency need --device local")
    return MeasuredLatency(
        loaded.model,
        loaded.inputs,
        structure,
        batch=settings.latency_batch,
        threads=settings.latency_threads,
        providers=settings.latency_providers,
    )
