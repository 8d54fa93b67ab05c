"""What a run starts from: its settings, its parts, and the files that a resumed run finds again.

`settings.json` is written before anything is trained, so that a run can be gone on with from its first second on. What
was resolved (threads, accelerator) is kept from then on; what must not change (settings, data, groups) is compared.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amc.data import Split
from amc.errors import DataError, DeviceError, ModelError, RunError, UsageError
from amc.evaluate import Metric, Tune
from amc.export import export_onnx
from amc.forward import device_of
from amc.weights import save_weights
from latency.session import check_runs, open_session, random_feeds
from search.compose import Setup, compose
from search.display import Display
from search.engines import elsewhere, executor_of
from search.finished import Resolved, SettingsFile, read_document
from search.numbers import metric_name
from search.run_directory import DENSE, DENSE_ONNX, SETTINGS, TABLE, RunDirectory, check_resumable
from search.settings import Settings, settings_from
from search.trust import allow, check_named, names_code

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "optuna", "stable-baselines3", "gymnasium", "amc-pruning-search")

log = logging.getLogger("amc")


def resumed_settings(path: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run in `path`, with those changes in `given` that a resumed run may take.

    Raises:
        RunError: there is no run, or its settings are not what we write. UsageError: a setting that may not change
            differs, or names code that this user never named; the message says which.
    """
    check_resumable(path)
    stored = read_document(path / SETTINGS, SettingsFile).settings
    given = {name: value for name, value in given.items() if value is not None}
    before, changed = settings_from(stored), settings_from({**stored, **given})
    for name, value in before.as_json().items():
        if stored.get(name, value) != value:
            raise RunError(f"{path / SETTINGS} is not what a run writes: `settings.{name}` is {stored[name]!r}")
    for field in fields(Settings):
        old, new = before.as_json()[field.name], changed.as_json()[field.name]
        if old != new and not field.metadata.get("resume"):
            raise _unchangeable(field.name, old, new, "leave it out, or start a run of its own")
    for name, old, new in (
        *zip(("trials", "time_limit"), before.limits(), changed.limits(), strict=True),
        ("finetune_epochs", before.finetune_epochs, changed.finetune_epochs),
    ):
        if (math.inf if new is None else new) < (math.inf if old is None else old):
            raise _unchangeable(name, old, new, "a resumed run may only take more")
    for name in ("model", "data"):
        spec = getattr(changed, name)
        if name not in given:
            check_named(f"the run in {path}", path, name, spec, f"give it again: --resume --{name} {spec}")
    return changed


def _unchangeable(name: str, old: Any, new: Any, way_out: str) -> UsageError:
    none = "unlimited" if name in ("trials", "time_limit") else "not set"
    was, becomes = (none if value is None else repr(value) for value in (old, new))
    return UsageError(f"--{name.replace('_', '-')} was {was} and can't become {becomes} in a resumed run; {way_out}")


def prepare(
    directory: RunDirectory,
    settings: Settings,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    display: Display,
) -> Setup:
    """Composes the run, and writes what it starts from; a run that is gone on with must not have changed.

    Raises:
        AmcError: whatever in the settings can't be used. RunError, DataError: the model or the data have changed.
    """
    if elsewhere(settings) and any(own is not None for own in (model, data, metric, finetune)):
        raise UsageError(
            "--workers, --engine, --isolate and --trial-timeout need a model and data that are named, not objects: "
            "other processes build them anew; write model='FILE.py:FACTORY', data='FILE.py:FACTORY'"
        )
    for option, spec, own in (("model", settings.model, model), ("data", settings.data, data)):
        if own is None and names_code(option, spec):
            allow(directory.path, spec)
    before = Resolved()
    if (directory / SETTINGS).exists():
        before = read_document(directory / SETTINGS, SettingsFile).resolved
    else:
        directory.write_json(SETTINGS, _document(settings))
    own = _named({"model": model, "data": data, "metric": metric, "finetune": finetune})
    _refuse_other_objects(directory.path, before.own, own)
    dense = directory / DENSE
    setup = compose(
        replace(
            settings,
            accelerator=before.accelerator or settings.accelerator,
            threads=before.threads or settings.threads,
        ),
        model=model,
        data=data,
        metric=metric,
        finetune=finetune,
        dense_weights=dense if dense.is_file() else None,
        table=directory / TABLE,
        display=display,
    )
    setup = replace(setup, settings=settings)
    _refuse_changes(directory.path, before, setup)
    if not dense.exists():
        save_weights(setup.loaded.model, dense)
    if not (directory / DENSE_ONNX).exists():
        export_onnx(setup.loaded.model, setup.loaded.inputs, directory / DENSE_ONNX)
        _check_export(directory / DENSE_ONNX)
    setup = replace(setup, executor=executor_of(setup, dense))
    # Last: what was refused is not what the run goes on with.
    directory.write_json(SETTINGS, _document(settings, setup, own))
    return setup


def _check_export(path: Path) -> None:
    """Raises ModelError where the dense file does not run on one row. What can't be tried is told when measured."""
    try:
        session = open_session(path)
        feeds = random_feeds(session, 1, 0)
    except (DeviceError, ModelError):
        return
    check_runs(session, feeds)


def _named(own: Mapping[str, Any]) -> dict[str, str]:
    """Those of the objects that were given, by a name: a function's own, or what kind it is."""
    return {option: metric_name(given) for option, given in own.items() if given is not None}


def _refuse_other_objects(path: Path, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Raises unless what the run began with as objects is given again: no file can hold them.

    Models and data are compared by what they hold, later on; functions by their names.
    """
    if before is None:
        return
    lacking = [option for option in before if option not in now]
    if lacking:
        again = ", ".join(f"{option}=…" for option in before)
        raise UsageError(
            f"the run in {path} began with {_listed(before, lacking)} from Python, which no file holds; go on with it "
            f"by search.run(resume=True, out=…, {again})"
        )
    for option in ("metric", "finetune"):
        if now.get(option) != before.get(option):
            raise UsageError(
                f"the run in {path} began {_with(before, option)} and can't go on {_with(now, option)}; what was "
                "scored by one can't be compared with the other. Give the same, or start a run of its own"
            )


def _listed(own: Mapping[str, str], options: Sequence[str]) -> str:
    return ", ".join(f"{option}={own[option]}" for option in options)


def _with(own: Mapping[str, str], option: str) -> str:
    return f"with {option}={own[option]}" if option in own else f"without {option}=…"


def _refuse_changes(path: Path, before: Resolved, setup: Setup) -> None:
    """Raises unless data and groups are those that the run began with."""
    if before.data_fingerprint not in (None, setup.data.fingerprint):
        raise DataError(
            f"the data of the run in {path} has changed: --data {setup.settings.data} had the fingerprint "
            f"{str(before.data_fingerprint)[:12]} and has {setup.data.fingerprint[:12]}; what was scored on one can't "
            "be compared with the other. Put the data back, or start a run of its own"
        )
    groups = [(group.name, group.channels) for group in setup.structure.groups]
    if before.groups and [(group.name, group.channels) for group in before.groups] != groups:
        raise RunError(f"the model of the run in {path} has changed: its groups are others now; start a run of its own")


def _document(settings: Settings, setup: Setup | None = None, own: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `settings.json` holds; without a setup, what is known before anything is built."""
    return {
        "schema_version": 1,
        "settings": settings.as_json(),
        "resolved": {} if setup is None else _resolved(setup) | {"own": dict(own or {})},
        "versions": versions(),
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cpu": platform.processor()},
    }


def _resolved(setup: Setup) -> dict[str, Any]:
    return {
        "num_classes": setup.data.num_classes,
        "data_fingerprint": setup.data.fingerprint,
        "accelerator": str(device_of(setup.loaded.model)),
        "threads": torch.get_num_threads(),
        "augment": list(setup.augment),
        "normalization": _normalization(setup.data.val),
        "train_examples": _length(setup.data.train),
        "val_examples": _length(setup.data.val),
        "test_examples": _length(setup.data.test),
        "groups": [
            {"name": g.name, "kind": g.kind, "channels": g.channels, "members": list(g.members)}
            for g in setup.structure.groups
        ],
        "frozen": [{"name": frozen.name, "reason": frozen.reason} for frozen in setup.structure.frozen],
    }


def _normalization(split: Split) -> dict[str, list[float]] | None:
    """The mean and standard deviation of each image channel that were used, in [0, 1]; None for data as they come."""
    used = getattr(split, "normalize", None)
    return None if used is None else {"mean": list(used.mean), "std": list(used.std)}


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
