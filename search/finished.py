"""What the files of a finished run say, checked before anyone believes it.

A run directory may come from a stranger or a broken disk, so each file is read for itself: `result.json` must be
right, and of the others, what can't be read is left out and named in `notes`. Nothing in the directory is changed: the
study is opened as a copy, since SQLite writes beside a database even to read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from amc import documents
from amc.errors import AmcError, RunError
from amc.policy import Policy, load_policy
from search.settings import MAX_THREADS

if TYPE_CHECKING:
    from search.sensitivity import Sensitivity

REQUIRED = {"accuracy", "reward", "seconds"}
NOT_COSTS = {*REQUIRED, "score"}
"""Numbers that are stored with a trial beside its costs; trials of the first versions have no `score`."""

Number = int | float
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Interval = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class _Read(BaseModel):
    """Fields of ours are checked; fields that we don't know belong to a later part and are let be."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class ModelFigures(_Read):
    """One model of `result.json`: dense, best or uniform. None is what was not measured."""

    source: str | None = None
    accuracy: Number
    test_accuracy: Number | None = None
    flops: Number | None = None
    params: Number | None = None
    size: Number | None = None
    memory: Number | None = None
    latency_ms: Number | None = None
    latency_predicted_ms: Number | None = None
    speedup: Number | None = None
    speedup_ci95: Interval | None = None
    widths: dict[str, int] = {}


class BudgetLine(_Read):
    """One limit, and what the best policy spends."""

    cost: str
    limit: Positive
    fraction: Positive
    achieved: Number | None = None
    met: bool | None = None


class Anchor(_Read):
    """A policy that was both scored (`score`) and properly fine-tuned (`accuracy`)."""

    score: Number
    accuracy: Number


class Proxy(_Read):
    """What the score is worth: its rank correlation with the accuracy of anchors after a fine-tune of `steps` steps.

    shared: how many anchors of a sweep's earlier runs helped to calibrate it; the correlation is over the run's own.
    """

    spearman: Number | None = None
    samples: Count = 0
    steps: Count = 0
    shared: Count = 0
    anchors: list[Anchor] = []


class SearchFigures(_Read):
    """How the search went. metric: what `accuracy` is, where it is a metric of the user's own.

    widths: of the policy that it found, whether that or the uniform one is the better in the end.
    """

    strategy: str
    trials: Count
    failed: Count = 0
    seconds: Number
    evaluation_seconds: Number | None = None
    seed: int
    metric: str = "accuracy"
    widths: dict[str, int] = {}


class LayerFigures(_Read):
    """A layer before and after. FLOPs are None where it has no weights, times where they were not measured."""

    name: str
    dense_flops: Number | None = None
    best_flops: Number | None = None
    dense_ms: Number | None = None
    best_ms: Number | None = None


class FrontPolicy(_Read):
    """A policy of the front that `--pareto` searched: its file, its score (no long fine-tuning), costs and widths."""

    policy: str
    score: Number
    flops: Number | None = None
    params: Number | None = None
    size: Number | None = None
    widths: dict[str, int] = {}


class RunResult(_Read):
    """`result.json`. front: cheapest first; empty without `--pareto`."""

    schema_version: Literal[1]
    settings: dict[str, Any] = {}
    budget: list[BudgetLine] = []
    dense: ModelFigures
    best: ModelFigures
    uniform: ModelFigures
    proxy: Proxy = Proxy()
    search: SearchFigures
    front: list[FrontPolicy] = []
    layers: list[LayerFigures] = []


class FrozenInfo(_Read):
    """A part that can't be pruned, and why."""

    name: str
    reason: str


class GroupInfo(_Read):
    """A channel group as `settings.json` lists it."""

    name: str
    kind: str = "channel"
    channels: Annotated[int, Field(ge=1)]
    members: list[str] = []


class Resolved(_Read):
    """What the settings came to; empty until everything is built.

    own: what was given as an object, and not by name; of a function, its name.
    """

    own: dict[str, str] | None = None
    data_fingerprint: str | None = None
    accelerator: str | None = None
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None
    frozen: list[FrozenInfo] | None = None
    groups: list[GroupInfo] = []
    test_examples: Count | None = None
    val_examples: Count | None = None


class SettingsFile(_Read):
    """`settings.json`."""

    settings: dict[str, Any] = {}
    resolved: Resolved = Resolved()
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}


@dataclass(frozen=True)
class TrialRecord:
    """A scored policy of the study.

    number: in the study, from 0. count: which trial of the search it was, from 1; repeats don't count, failed ones do.
    minutes: of search when it ended; stretches in which no trial ran (a stopped run) don't count.
    """

    number: int
    count: int
    accuracy: float
    reward: float
    costs: Mapping[str, float]
    seconds: float
    minutes: float


@dataclass(frozen=True)
class FinishedRun:
    """A run, from its files. notes: what could not be read, a sentence each."""

    path: Path
    result: RunResult
    settings: SettingsFile
    policy: Policy | None
    trials: tuple[TrialRecord, ...]
    sensitivity: Sensitivity | None
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name or self.path.resolve().name

    @property
    def channels(self) -> dict[str, int]:
        """Group -> channels of the dense model, in forward order; empty where no file says so."""
        groups: Iterable[Any] = self.policy.groups if self.policy else self.settings.resolved.groups
        return {group.name: group.channels for group in groups}


def read_run(path: Path) -> FinishedRun:
    """Reads a finished run.

    Raises:
        RunError: there is no finished run, or its `result.json` is not what we write.
    """
    if not path.is_dir():
        raise RunError(f"{path} is no run directory; give the folder that a search wrote")
    if not (path / "result.json").exists():
        unfinished = (path / "settings.json").exists()
        way_out = (
            f"`amc search --resume --out {path}` goes on with it" if unfinished else "give one that a search wrote"
        )
        raise RunError(f"{path} holds no finished run (there is no result.json); {way_out}")
    result = read_document(path / "result.json", RunResult)
    notes: list[str] = []

    def attempt(read: Any, absent: Any) -> Any:
        try:
            return read()
        except AmcError as error:
            notes.append(str(error))
            return absent

    settings = attempt(
        lambda: read_document(path / "settings.json", SettingsFile), SettingsFile(settings=result.settings)
    )
    policy = attempt(lambda: load_policy(_regular(path / "policy.json")), None)
    trials = attempt(lambda: read_trials(path / "study.db"), ())
    curves = path / "sensitivity.json"
    sensitivity = attempt(lambda: _sensitivity(curves), None) if curves.exists() else None
    return FinishedRun(path, result, settings, policy, trials, sensitivity, tuple(notes))


T = TypeVar("T", bound=BaseModel)


def read_document(path: Path, model: type[T]) -> T:
    """A JSON file of ours, checked. Raises a RunError that names the file and the first thing wrong."""
    return documents.read_document(_regular(path), model, "run's file", RunError)


def _sensitivity(path: Path) -> Sensitivity:
    from search.sensitivity import load_sensitivity  # needs torch, which most reports do without

    return load_sensitivity(_regular(path))


def _regular(path: Path) -> Path:
    """The path, unless nothing is there, or a device or a pipe, which would never end."""
    if not path.is_file():
        raise RunError(f"{path} is missing or not a file")
    return path


def read_trials(path: Path) -> tuple[TrialRecord, ...]:
    """The scored trials of a study, in order; repeats of a known policy are left out.

    Raises:
        RunError: the file is missing, too large, or not a study.
    """
    _regular(path)
    from optuna.trial import TrialState

    from search.storage import stored_trials  # needs Optuna, which a report without trials does without

    ended = [trial for trial in stored_trials(path) if trial.datetime_start and trial.datetime_complete]
    minutes = busy_minutes([(trial.datetime_start, trial.datetime_complete) for trial in ended])  # type: ignore[misc]
    found, count = [], 0
    for trial, at in zip(ended, minutes, strict=True):
        count += trial.state in (TrialState.COMPLETE, TrialState.FAIL) and "repeat" not in trial.user_attrs
        stored = {name: value for name, value in trial.user_attrs.items() if _is_number(value)}
        if trial.state == TrialState.COMPLETE and "repeat" not in trial.user_attrs and set(stored) >= REQUIRED:
            costs = {name: float(value) for name, value in stored.items() if name not in NOT_COSTS}
            figures = (float(stored["accuracy"]), float(stored["reward"]), costs, float(stored["seconds"]), at)
            found.append(TrialRecord(trial.number, count, *figures))
    return tuple(found)


def busy_minutes(spans: list[tuple[datetime, datetime]]) -> list[float]:
    """For each (start, end), how many minutes at least one of the spans had been under way when it ended."""
    merged: list[list[datetime]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    zero = datetime.resolution * 0
    return [
        sum((max(min(end, stop) - begin, zero) for begin, stop in merged), zero).total_seconds() / 60
        for _, end in spans
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
