"""After the search: the best policy and the uniform one at the same budget, fine-tuned and measured alike.

The search scored candidates by a short recovery. What a user ships has had a long one, so that is what decides: where
the uniform policy ends better on the search split, it is what the user gets, and the result says so.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from amc.errors import DeviceError, ModelError, SearchFailed
from amc.evaluate import accuracy, batches_of
from amc.finetune import Diverged, finetune
from amc.layout import arranged
from amc.memory import in_parts, part_of
from amc.problem import Outcome, WidthsByName
from amc.seeding import seeded
from amc.weights import load_weights, save_weights
from latency.device import TableDevice, open_device
from latency.paired import Reading, pooled
from search.compose import Setup
from search.display import Display, Report
from search.numbers import metric_name
from search.run_directory import FINETUNED
from search.settings import Settings
from search.settle import latency_limit, within
from search.strategies.uniform import uniform_policy

log = logging.getLogger("amc")

LATENCY_TRIES = 3
SETTLED = 50
"""Steps after which batch norm's running averages (momentum 0.1) hold next to nothing of what was before."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A slim, fine-tuned model and what it is worth.

    source: `search` or `uniform`. accuracy: on the search split; test_accuracy: on a split that the search never saw,
    None without one.
    """

    source: str
    widths: WidthsByName
    model: nn.Module
    accuracy: float
    test_accuracy: float | None


def finish(setup: Setup, best: Outcome, folder: Path, display: Display) -> tuple[Candidate, Candidate]:
    """The best policy of the search and the uniform one, recovered the same way from the same slices."""
    widths = setup.problem.named(uniform_policy(setup.problem))
    searched = recover(setup, "search", best.widths, folder, display)
    if widths == dict(best.widths):
        return searched, searched
    return searched, recover(setup, "uniform", widths, folder, display)


def recover(setup: Setup, source: str, widths: WidthsByName, folder: Path, display: Display) -> Candidate:
    """Slims by a policy and fine-tunes for the epochs of the settings; without epochs, batch norm is recalibrated.

    What was fine-tuned is kept in `folder` until the run is finished, so that a resumed run doesn't train it again.
    """
    model = setup.evaluator.candidate(widths)
    if setup.settings.finetune_epochs and setup.data.train is not None:
        kept = folder / _finetuned_name(setup.settings, widths)
        try:
            if kept.is_file():
                load_weights(model, kept)
        except ModelError as error:
            log.warning("fine-tuning again: %s", error)
        else:
            if kept.is_file():
                return _candidate(setup, source, widths, model)
        with display.bar(f"fine-tuning the {'best' if source == 'search' else source} policy") as report:
            model = _finetuned(setup, widths, report)
        save_weights(model, kept)
    else:
        setup.evaluator.recalibrate(model)
    return _candidate(setup, source, widths, model)


def _candidate(setup: Setup, source: str, widths: WidthsByName, model: nn.Module) -> Candidate:
    found = accuracies(setup, model)
    if not math.isfinite(found[0]):
        raise SearchFailed(f"the {source} policy's {metric_name(setup.metric)} is {found[0]}; it must be a number")
    return Candidate(source, widths, arranged(model, torch.contiguous_format), *found)


def _finetuned(setup: Setup, widths: WidthsByName, report: Report) -> nn.Module:
    """The slim model, fine-tuned; where that diverges, more carefully, and in the end not at all."""
    settings, data = setup.settings, setup.data
    assert data.train is not None
    steps = finetune_steps(settings, len(data.train))
    if setup.evaluator.tune is not None:
        model = setup.evaluator.candidate(widths)
        with seeded(settings.seed, "finetune"):
            setup.evaluator.tune(model, steps)
        setup.evaluator.recalibrate(model)
        return model.eval()

    def tried(lr: float, parts: int) -> nn.Module:
        assert data.train is not None
        model = setup.evaluator.candidate(widths)
        finetune(
            model,
            data.train,
            steps=steps * parts,
            lr=lr,
            batch=part_of(settings.finetune_batch, parts),
            weight_decay=settings.weight_decay,
            augment=setup.augment,
            precision=setup.evaluator.settings.precision,
            seed=settings.seed,
            progress=report,
        )
        return model

    for lr in (settings.finetune_lr, settings.finetune_lr / 10):
        try:
            model = in_parts(partial(tried, lr))
            if steps < SETTLED:
                setup.evaluator.recalibrate(model)
            return model
        except Diverged as error:
            log.warning("fine-tuning diverged at --finetune-lr %g: %s", lr, error)
    log.warning("the model is not fine-tuned; its batch norm is recalibrated instead")
    model = setup.evaluator.candidate(widths)
    setup.evaluator.recalibrate(model)
    return model


def finetune_steps(settings: Settings, examples: int) -> int:
    """Of the final fine-tune: its epochs', but no fewer than a score's, on however little data."""
    return max(settings.finetune_epochs * max(examples // settings.finetune_batch, 1), settings.score_steps)


def _finetuned_name(settings: Settings, widths: WidthsByName) -> str:
    """The name depends on everything that may have changed when a run is resumed."""
    key = hashlib.sha256(repr((settings.finetune_epochs, sorted(widths.items()))).encode()).hexdigest()
    return f"{FINETUNED}{key[:16]}.safetensors"


def accuracies(setup: Setup, model: nn.Module) -> tuple[float, float | None]:
    """A model's accuracy on the search split (or the metric), and on the split that the search never saw."""
    if setup.metric is not None:
        return setup.evaluator.grade(model).accuracy, None
    test = setup.data.test
    return accuracy(model, batches_of(setup.data.val)), None if test is None else accuracy(model, batches_of(test))


def measure_latency(
    setup: Setup, dense: Path, models: Mapping[str, Path], report: Report | None = None
) -> dict[str, Reading]:
    """The files' latency on the device, each paired with the dense one; keys as in `models`, and `dense`.

    One that seems to break the limit is measured again, since something else may have run meanwhile: the search ended
    with policies that were within it. All that was timed counts. Nothing is known of a device that can't be measured on
    (a table, or one that fails): then it is empty.
    """
    settings, limit = setup.settings, latency_limit(setup.problem.budget)
    device = setup.bench.device if setup.bench else open_device(settings.device)
    if isinstance(device, TableDevice):
        return {}
    found: dict[str, Reading] = {}
    chosen = dict(models)
    for _ in range(LATENCY_TRIES):
        try:
            taken = device.measure(
                {"dense": dense, **chosen},
                batch=settings.latency_batch,
                threads=settings.latency_threads,
                providers=settings.latency_providers,
                seed=settings.seed,
                progress=report,
            )
        except (DeviceError, ModelError) as error:
            log.warning("latency was not measured: %s", error)
            return found
        found |= {name: pooled([found[name], new]) if name in found else new for name, new in taken.items()}
        chosen = {name: path for name, path in models.items() if limit and not within(found[name], limit)}
        if not chosen:
            return found
    assert limit is not None  # without one, nothing is measured again
    log.warning(
        "measured at the end, the latency is still above the limit of %.3f of dense: %s",
        limit.fraction,
        ", ".join(f"{name} {found[name].ratio:.3f}" for name in chosen),
    )
    return found
