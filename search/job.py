"""The main job: search, slim, fine-tune, measure, and write down what came of it.

A run directory is the job's memory. Everything that is made is written there when it is made, so a run that was stopped
goes on from what it holds: the dense weights are not trained again and no trial is evaluated twice.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from optuna.samplers import BaseSampler
from torch import nn

from amc.data import Split
from amc.errors import Interrupted, RunError, SearchFailed, UsageError
from amc.evaluate import Metric
from amc.export import export_onnx
from amc.policy import Policy, load_policy
from amc.weights import save_weights
from search.bench import TABLE
from search.compose import Setup, compose, with_objects
from search.display import Display
from search.finish import Candidate, finish, measure_latency, policy_of, result_of
from search.report import write_report
from search.run_directory import RunDirectory, check_free, check_resumable, default_path, owned
from search.settings import Settings, settings_from
from search.settle import settle
from search.strategies import make_sampler
from search.study import Progress, SearchResult, open_storage, open_study, search

log = logging.getLogger("amc")

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "optuna", "stable-baselines3", "gymnasium", "amc-pruning-search")


@dataclass(frozen=True)
class Result:
    """What a run found.

    policy: the best policy. model: the slim, fine-tuned model (None where a finished run is looked at again).
    path: the run directory. summary: what `result.json` holds.
    """

    policy: Policy
    model: nn.Module | None
    path: Path
    summary: Mapping[str, Any]

    def __repr__(self) -> str:
        best, dense = self.summary["best"], self.summary["dense"]
        return (
            f"Result({self.path}: accuracy {best['accuracy']:.4f} of {dense['accuracy']:.4f}, "
            f"{best['flops'] / dense['flops']:.3f} of the FLOPs, by {best['source']})"
        )


def run(
    *,
    model: Any = None,
    data: Any = None,
    metric: Metric | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Result:
    """Finds a policy under the budget, slims, fine-tunes, measures and writes a run directory, as the commands do.

    model, data: what the options take, or a module and data sets of your own. metric: a model's worth, higher is
    better, in place of the accuracy. out: the run directory. settings: any field of `Settings`.

    Raises:
        AmcError: whatever in the arguments can't be used.
    """
    if resume:
        if out is None:
            raise UsageError("resume=True needs out=…, the directory of the run to go on with")
        named = resumed_settings(Path(out), settings)
        _, own_model, own_data = with_objects({}, model, data)
    else:
        named, own_model, own_data = with_objects(settings, model, data)
    return run_job(
        named, out=out, resume=resume, model=own_model, data=own_data, metric=metric, display=Display(quiet=quiet)
    )


def resumed_settings(path: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run in `path`, with those changes in `given` that a resumed run may take.

    Raises:
        RunError: there is no run. UsageError: a setting that may not change differs; the message names it.
    """
    check_resumable(path)
    stored = RunDirectory(path).read_json("settings.json")
    if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
        raise RunError(f"{path / 'settings.json'} does not hold the settings of a run")
    before, changed = settings_from(stored["settings"]), settings_from({**stored["settings"], **given})
    for field in fields(Settings):
        if getattr(before, field.name) != getattr(changed, field.name) and not field.metadata.get("resume"):
            raise UsageError(
                f"--{field.name.replace('_', '-')} was {getattr(before, field.name)!r} and can't become "
                f"{getattr(changed, field.name)!r} in a resumed run; leave it out, or start a run of its own"
            )
    return changed


def run_job(
    settings: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    model: nn.Module | None = None,
    data: Any = None,
    metric: Metric | None = None,
    display: Display,
) -> Result:
    """The main job on settings that are already read; `model` and `data` are objects in place of what they name."""
    path = Path(out) if out is not None else default_path(settings.model)
    check_resumable(path) if resume else check_free(path)
    if resume and RunDirectory(path).finished and _asks_no_more(path, settings):
        display.say(f"the run in {path} is finished; there is nothing to go on with")
        return finished_result(path)
    dense_weights = path / "dense.safetensors" if resume else None
    if dense_weights is not None and not dense_weights.is_file():
        dense_weights = None
    setup = compose(
        settings,
        model=model,
        data=data,
        metric=metric,
        dense_weights=dense_weights,
        table=path / TABLE if resume else None,
        display=display,
    )
    with owned(path, resume=resume) as directory:
        try:
            _begin(directory, setup, settings)
            _announce(setup, display)
            setup, found = _search(directory, setup, display)
            if found.best is None:
                raise SearchFailed(f"no trial of the search in {path} succeeded; run.log says why")
            best, uniform = finish(setup, found.best, display)
            return _conclude(directory, setup, found, best, uniform, display)
        except KeyboardInterrupt:
            log.info("stopped by a signal")
            raise Interrupted(f"stopped; go on by: amc search --out {shlex.quote(str(path))} --resume") from None


def _asks_no_more(path: Path, settings: Settings) -> bool:
    """Whether a finished run already has the settings asked for."""
    return settings_from(RunDirectory(path).read_json("settings.json")["settings"]) == settings


def finished_result(path: Path) -> Result:
    """The result of a finished run, from its files."""
    return Result(load_policy(path / "policy.json"), None, path, RunDirectory(path).read_json("result.json"))


def _begin(directory: RunDirectory, setup: Setup, settings: Settings) -> None:
    """Writes what the run starts from."""
    document = {
        "schema_version": 1,
        "settings": settings.as_json(),
        "resolved": {
            "num_classes": setup.data.num_classes,
            "data_fingerprint": setup.data.fingerprint,
            "accelerator": str(next(setup.loaded.model.parameters()).device),
            "threads": torch.get_num_threads(),
            "augment": list(setup.augment),
            "train_examples": _length(setup.data.train),
            "val_examples": _length(setup.data.val),
            "test_examples": _length(setup.data.test),
            "groups": [
                {"name": g.name, "kind": g.kind, "channels": g.channels, "members": list(g.members)}
                for g in setup.structure.groups
            ],
            "frozen": [{"name": frozen.name, "reason": frozen.reason} for frozen in setup.structure.frozen],
        },
        "versions": versions(),
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cpu": platform.processor()},
    }
    directory.write_json("settings.json", document)
    if not (directory / "dense.safetensors").exists():
        save_weights(setup.loaded.model, directory / "dense.safetensors")
    if not (directory / "dense.onnx").exists():
        export_onnx(setup.loaded.model, setup.loaded.inputs, directory / "dense.onnx")
    if setup.bench is not None:
        setup.bench.table.save(directory / TABLE)


def _length(split: Split | None) -> int | None:
    return None if split is None else len(split)


def versions() -> dict[str, str]:
    """The installed versions of the packages that shape a run."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _announce(setup: Setup, display: Display) -> None:
    groups, frozen = setup.structure.groups, setup.structure.frozen
    display.say(
        f"{setup.loaded.name} on {setup.data.name}: {len(groups)} groups of {sum(g.channels for g in groups)} channels"
        + (f", {len(frozen)} parts frozen" if frozen else "")
        + f"; {setup.problem.budget!r}"
    )


def _search(directory: RunDirectory, setup: Setup, display: Display) -> tuple[Setup, SearchResult]:
    """Searches until the budget is met as measured; returns the setup of the last round, with its corrected costs."""
    settings = setup.settings
    storage = open_storage(directory / "study.db")

    def sampler(setup: Setup) -> BaseSampler:
        return make_sampler(settings.strategy, setup.problem, trials=settings.planned_trials(), seed=settings.seed)

    study = open_study(storage, "search", sampler(setup))

    def search_round(setup: Setup, trials: int | None, time_limit: float | None) -> SearchResult:
        study.sampler = sampler(setup)
        with display.bar(f"searching with {settings.strategy}") as report:

            def on_trial(progress: Progress) -> None:
                best, latest = progress.best, progress.latest
                done = progress.trials + progress.failed
                reward = f"reward {latest.reward:.4f}" if latest else "failed"
                log.info("trial %d: %s, best %s", done, reward, f"{best.reward:.4f}" if best else "none")
                report(done, trials, f"best accuracy {best.accuracy:.4f}" if best else "")

            return search(
                setup.problem, study, trials=trials, time_limit=time_limit, seed=settings.seed, on_trial=on_trial
            )

    setup, found = settle(setup, study, search_round)
    if setup.bench is not None:
        setup.bench.table.save(directory / TABLE)
    return setup, found


def _conclude(
    directory: RunDirectory,
    setup: Setup,
    found: SearchResult,
    best: Candidate,
    uniform: Candidate,
    display: Display,
) -> Result:
    """Writes the models, the policy and the result; the result last, since it marks the run as finished."""
    winner = best if best.accuracy >= uniform.accuracy else uniform  # both are within the budget
    with display.bar("exporting and measuring") as report:
        save_weights(winner.model, directory / "model.safetensors")
        export_onnx(winner.model, setup.loaded.inputs, directory / "model.onnx")
        with _uniform_file(setup, winner, uniform, directory) as files:
            readings = measure_latency(setup, directory / "dense.onnx", files, report)
    policy = policy_of(setup, winner, found.trials, versions())
    policy.save(directory / "policy.json")
    searched = {
        "strategy": setup.settings.strategy,
        "trials": found.trials,
        "failed": found.failed,
        "seconds": found.seconds,
        "evaluation_seconds": found.evaluation_seconds,
        "seed": setup.settings.seed,
    }
    summary = result_of(setup, winner, uniform, readings, searched)
    directory.write_json("result.json", summary)
    try:
        write_report(directory.path)
    except Exception as error:  # what was found stays found
        log.warning("the report could not be written (`amc report %s` tries again): %s", directory.path, error)
    return Result(policy, winner.model, directory.path, summary)


@contextmanager
def _uniform_file(
    setup: Setup, winner: Candidate, uniform: Candidate, directory: RunDirectory
) -> Iterator[dict[str, Path]]:
    """The ONNX files to measure: the winner's, and the uniform policy's in a temporary place where it is another."""
    if winner.widths == uniform.widths:
        yield {"best": directory / "model.onnx"}
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "uniform.onnx")
        export_onnx(uniform.model, setup.loaded.inputs, other)
        yield {"best": directory / "model.onnx", "uniform": other}
