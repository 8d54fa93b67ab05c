"""The main job: search, slim, fine-tune, measure, and write down what came of it.

A run directory is the job's memory. Everything that is made is written there when it is made, so a run that was stopped
goes on from what it holds: the dense weights are not trained again and no trial is evaluated twice.
"""

from __future__ import annotations

import logging
import math
import shlex
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from amc.catalog import ALONE
from amc.data import Data
from amc.errors import AmcError, Interrupted, ModelError, SearchFailed, UsageError
from amc.evaluate import Metric, Tune
from amc.folders import FolderSplit
from amc.memory import out_of_memory
from amc.seeding import threads
from amc.userfile import describe
from search.compose import Setup, with_objects
from search.conclude import Result, conclude, finished_result, report
from search.display import Display
from search.finish import SETTLED, accuracies, finetune_steps, finish
from search.finished import RunResult, read_document
from search.numbers import metric_name
from search.recovery import check_test, check_training
from search.rounds import search_to_budget
from search.run_directory import REPORT, RESULT, check_free, check_resumable, default_path, owned
from search.run_sensitivity import write_sensitivity
from search.settings import Settings, apart_from_workers, settings_from
from search.start import prepare, resumed_settings
from search.storage import optuna_says
from search.study import SearchResult
from search.sweep import share
from search.tensorboard import check_installed

log = logging.getLogger("amc")


@torch.inference_mode(False)  # a caller's no_grad() and inference_mode() are lifted: models are trained
def run(
    *,
    model: Any = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Result:
    """Finds a policy under the budget, slims, fine-tunes, measures and writes a run directory, as the commands do.

    model, data: what the options take, or a module and data sets of your own. metric: a model's worth, higher is
    better, in place of the accuracy. finetune: `(model, steps)`, trains a slim model in place for about so many steps,
    in place of cross entropy on the labels; few steps for each score, many for the result. out: the run directory.
    settings: any field of `Settings`.

    Raises:
        AmcError: whatever in the arguments can't be used.
    """
    if resume:
        if out is None:
            raise UsageError("resume=True needs out=…, the directory of the run to go on with")
        texts = {name: value for name, value in (("model", model), ("data", data)) if isinstance(value, str)}
        named = resumed_settings(Path(out), {**settings, **texts})
        _, own_model, own_data = with_objects({}, model, data)
    else:
        named, own_model, own_data = with_objects(settings, model, data)
    with threads(), optuna_says(optuna.logging.WARNING):
        return run_job(
            named,
            out=out,
            resume=resume,
            model=own_model,
            data=own_data,
            metric=metric,
            finetune=finetune,
            display=Display(quiet=quiet),
        )


def run_job(
    settings: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    model: nn.Module | None = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    display: Display,
    shared: Path | None = None,
) -> Result:
    """The main job on settings that are already read; `model` and `data` are objects in place of what they name.

    shared: another run of the same dense model, from which a new one takes what does not depend on the budget.
    """
    if settings.tensorboard:
        check_installed()
    path = Path(out) if out is not None else default_path(settings.model)
    check_resumable(path) if resume else check_free(path)
    if resume and (path / REPORT).exists() and _asks_no_more(path, settings):
        return finished_result(path, display)
    with owned(path, resume=resume) as directory:
        try:
            if resume and _asks_no_more(path, settings):
                report(directory)
                return finished_result(path, display)
            if shared is not None:
                share(shared, path)
            own = {"model": model, "data": data, "metric": metric, "finetune": finetune}
            setup = prepare(directory, settings, **own, display=display)
            with closing(setup.executor or ExitStack()):
                _announce(setup, display)
                dense = _dense_accuracies(setup, display)
                if finetune is None:
                    check_training(setup.settings, setup.loaded.model, setup.data)
                directory.begun = True
                setup, found, proxy = search_to_budget(directory, setup, display)
            if found.best is None:
                raise SearchFailed(_nothing(path, found))
            best, uniform = finish(setup, found.best, directory.path, display)
            write_sensitivity(setup, found.trials, directory, display)
            return conclude(directory, setup, found, proxy, dense, best, uniform, display)
        except KeyboardInterrupt:
            log.info("stopped by a signal")
            raise Interrupted(f"stopped; go on by: amc search --out {shlex.quote(str(path))} --resume") from None


def _nothing(path: Path, found: SearchResult) -> str:
    """Why a search ended with nothing."""
    if found.trials:
        return f"none of the {found.trials} policies scored in {path} is within the budget; run.log says why"
    if found.failed:
        return f"no trial of the search in {path} succeeded; run.log says why"
    return f"the search in {path} ended before its first trial; raise --time-limit"


def _asks_no_more(path: Path, settings: Settings) -> bool:
    """Whether the run is finished, with the settings asked for: its result says so, and is written last."""
    if not (path / RESULT).exists():
        return False
    before = settings_from(read_document(path / RESULT, RunResult).settings)
    return apart_from_workers(before) == apart_from_workers(settings_from(settings.as_json()))


def _announce(setup: Setup, display: Display) -> None:
    groups, frozen = setup.structure.groups, setup.structure.frozen
    display.say(
        f"{setup.loaded.name} on {setup.data.name}: {len(groups)} groups, {sum(g.channels for g in groups)} channels"
        + (f", {len(frozen)} frozen (`amc groups` says why)" if frozen else "")
        + f"; budget: {setup.problem.budget}"
    )
    display.say(_examples(setup.data))
    if setup.data.train is None:
        log.warning("there is no train split: neither candidates nor the result are fine-tuned or recalibrated")
    elif setup.settings.finetune_epochs and setup.evaluator.tune is None:
        steps = finetune_steps(setup.settings, len(setup.data.train))
        if steps < SETTLED:
            log.warning(
                "the final fine-tune is short: %d steps, from %d examples in batches of %d; raise --finetune-epochs or "
                "lower --finetune-batch",
                steps,
                len(setup.data.train),
                setup.settings.finetune_batch,
            )
    if setup.data.test is None and setup.metric is None:
        log.warning("there is no test split, so no figure of the result is on images that the search never saw")


def _dense_accuracies(setup: Setup, display: Display) -> tuple[float, float | None]:
    """The dense model's `accuracies`; first of all, so that a split that can't be read is known before the search.

    Raises:
        UsageError: its metric is no number.
    """
    if isinstance(setup.data.train, FolderSplit):
        setup.data.train.check_sizes()
    check_test(setup.data, setup.metric)
    dense = _scored(setup)
    if not math.isfinite(dense[0]):
        raise UsageError(f"the dense model's {metric_name(setup.metric)} is {dense[0]}; it must be a number")
    if setup.settings.reward not in ALONE and not 0 <= dense[0] <= 1:
        raise UsageError(
            f"--reward {setup.settings.reward} is made for metrics from 0 to 1, and the dense model's is {dense[0]:g}; "
            "scale the metric, or leave --reward out"
        )
    display.say(f"the dense model's {metric_name(setup.metric)} on the search split: {dense[0]:.4f}")
    classes = setup.data.num_classes  # None: nobody knows
    if setup.metric is None and classes and dense[0] < (1.5 - 0.5 / classes) / classes:  # hardly better than chance
        log.warning(
            "the dense model guesses: are these its weights (--weights), and its normalization (--mean, --std)?"
        )
    return dense


def _scored(setup: Setup) -> tuple[float, float | None]:
    """The dense model's `accuracies`; data that its own `example_inputs` have nothing to do with meet it here."""
    try:
        return accuracies(setup, setup.loaded.model)
    except AmcError:
        raise
    except Exception as error:
        if setup.metric is not None or out_of_memory(error):
            raise
        raise ModelError(
            f"{setup.loaded.name} does not run on --data {setup.data.name}: {describe(error)}; check that they belong "
            "together"
        ) from error


def _examples(data: Data) -> str:
    """How many examples each split has, and how images are normalized."""
    splits = {"train": data.train, "val (searched on)": data.val, "test": data.test}
    text = "examples: " + ", ".join(f"{name} {'none' if x is None else len(x)}" for name, x in splits.items())
    normalize = getattr(data.val, "normalize", None)
    return f"{text}; images normalized by {normalize}" if normalize is not None else text
