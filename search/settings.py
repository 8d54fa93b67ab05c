"""Settings: everything that shapes a run, one field each with its line of help.

The dataclass drives the command line, is what `search.run(…)` takes as keywords, and is saved with the run. Importing
it costs nothing: no torch, no NumPy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from amc.catalog import CRITERIA, PRECISIONS, REWARDS
from amc.errors import UsageError
from amc.registry import Registry, suggest
from search.engines import ENGINES
from search.strategies import DEFAULT, STRATEGIES

DEFAULT_TRIALS = 120
DEFAULT_TIME_LIMIT = 1800.0
MAX_THREADS = 1024
"""More than any machine gains from, and fewer than what crashes a process that starts them."""


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A field of the settings, with what the command line needs to know of it.

    more: `parse` (text -> value), `nargs`, `flag` (there or not), `metavar`, `repeat`, `choices` (a registry),
        `resume` (may change on resume).
    """
    return field(default=default, metadata={"group": group, "help": text, **more})


def seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `1.5h` in seconds."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h)?", text.strip())
    value = float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if value <= 0:
        raise ValueError("write a time above 0, as in 90s, 10m or 1.5h")
    return value


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A reader of whole numbers in [least, most]."""
    rule = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or not least <= int(text) <= most:
            raise ValueError(f"write a whole number {rule}")
        return int(text)

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A reader of numbers in [low, high]."""

    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"write a number from {low:g} to {high:g}")
        return value

    return read


def without_password(url: str) -> str:
    """A database's address that can be shown and stored."""
    return re.sub(r"([?&])password=[^&]*&?", r"\1", re.sub(r"(://[^:@/]*):[^@]*@", r"\1@", url))


def cluster(text: str) -> str | None:
    """Ray's address; none, as by default, for `local`."""
    return None if text == "local" else text


def truth(text: str) -> bool:
    """A flag, from how Python or JSON writes it."""
    if text.lower() not in ("true", "false"):
        raise ValueError("write true or false")
    return text.lower() == "true"


@dataclass(frozen=True)
class Settings:
    """What shapes a run. Times in seconds."""

    model: str = option(
        "digits_resnet",
        "model",
        "built-in name, torchvision:NAME, timm:NAME, hf:DIR, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY",
    )
    weights: str | None = option(None, "model", "state dict: .safetensors, .pt, .pth or .th", metavar="FILE")
    input_shape: tuple[int, ...] | None = option(
        None,
        "model",
        "shape of an input where there is no data, as in 1 3 32 32",
        parse=whole(1),
        nargs="+",
        metavar="N",
    )
    data: str = option(
        "digits",
        "data",
        "digits, imagefolder:DIR, cifar10:DIR, cifar100:DIR, npz:FILE or FILE.py:FACTORY",
    )
    mean: tuple[float, ...] | None = option(
        None,
        "data",
        "mean of each image channel, in [0, 1] (default: the data set's own, ImageNet's for your images)",
        parse=number(-1e4, 1e4),
        nargs="+",
        metavar="M",
    )
    std: tuple[float, ...] | None = option(
        None,
        "data",
        "standard deviation of each image channel (default likewise)",
        parse=number(1e-6, 1e4),
        nargs="+",
        metavar="S",
    )
    input_size: tuple[int, ...] | None = option(
        None, "data", "height and width that images are scaled to", parse=whole(1), nargs="+", metavar="PIXELS"
    )
    budget: tuple[str, ...] = option(
        (),
        "search",
        "COST=LIMIT: flops=0.5, params=300k, latency=8ms, size=1MB; repeatable or comma separated, all hold at once",
        metavar="COST=LIMIT",
        repeat=True,
    )
    strategy: str = option(DEFAULT, "search", "who proposes", choices=STRATEGIES, metavar="NAME")
    trials: int | None = option(
        None, "search", f"policies to score (default {DEFAULT_TRIALS})", parse=whole(1), metavar="N", resume=True
    )
    time_limit: float | None = option(
        None, "search", "search time, as in 90s, 10m, 2h (default 30m)", parse=seconds, metavar="TIME", resume=True
    )
    storage: str | None = option(
        None,
        "search",
        "database that several processes share, as in postgresql://user@host:5432/name (default: a file of the run)",
        metavar="URL",
    )
    study: str = option("search", "search", "name of the study in --storage", metavar="NAME")
    warm_start: tuple[str, ...] = option(
        (),
        "search",
        "a run directory or policy file whose policies are scored first, projected onto the budget; repeatable",
        metavar="RUN_OR_POLICY",
        repeat=True,
    )
    pareto: bool = option(
        False,
        "search",
        "search a front instead, from the budget to the dense model: each trial has a limit between them",
        parse=truth,
        flag=True,
    )
    reward: str = option("soft_accuracy", "search", "what is maximized", choices=REWARDS, metavar="NAME")
    seed: int = option(0, "search", "seeds everything", parse=whole(0, 2**32 - 1), metavar="N")
    tensorboard: bool = option(
        False, "search", "also write scalars for TensorBoard, to DIR/tensorboard", parse=truth, flag=True, resume=True
    )
    importance: str = option("l1", "groups", "how channels are ranked", choices=CRITERIA, metavar="NAME")
    exclude: tuple[str, ...] = option(
        (), "groups", "leave groups out whose name or a member matches", metavar="PATTERN", repeat=True
    )
    only: tuple[str, ...] = option(
        (), "groups", "prune only groups whose name or a member matches", metavar="PATTERN", repeat=True
    )
    round_to: int = option(1, "groups", "widths are multiples of this", parse=whole(1), metavar="N")
    min_keep: float = option(0.0, "groups", "smallest keep ratio of a group", parse=number(0, 1), metavar="RATIO")
    score_steps: int = option(
        30, "score", "steps of the quick fine-tune of each candidate; 0 leaves it out", parse=whole(0), metavar="N"
    )
    score_batch: int = option(128, "score", "its batch size", parse=whole(1), metavar="N")
    score_lr: float = option(0.02, "score", "its peak learning rate", parse=number(0, 10), metavar="RATE")
    score_images: int = option(
        2000, "score", "images of the search split that are scored; 0 scores all", parse=whole(0), metavar="N"
    )
    calibration_images: int = option(
        512, "score", "training images that recalibrate batch norm and rank channels", parse=whole(0), metavar="N"
    )
    anchor_share: float = option(
        0.2,
        "score",
        "share of the search that checks and calibrates the score by longer fine-tunes; 0 leaves it out",
        parse=number(0, 0.9),
        metavar="SHARE",
    )
    reconstruct: bool = option(
        False,
        "score",
        "refit the layers that read pruned channels by least squares before any fine-tune",
        parse=truth,
        flag=True,
    )
    isolate: bool = option(
        False, "score", "evaluate in a child process, so that a crash costs one trial", parse=truth, flag=True
    )
    trial_timeout: float | None = option(
        None,
        "score",
        "a trial that takes longer fails, as in 90s or 10m; evaluates in a child process",
        parse=seconds,
        metavar="TIME",
    )
    workers: int = option(
        1,
        "score",
        "policies scored at once, each in a process with its share of threads and GPUs",
        parse=whole(1),
        metavar="N",
        resume=True,
    )
    engine: str = option(
        "local", "score", "where the workers are: local or ray", choices=ENGINES, metavar="NAME", resume=True
    )
    address: str | None = option(
        None,
        "score",
        "the Ray cluster, as in auto or 10.0.0.1:6379 (default local: one is started here)",
        parse=cluster,
        metavar="HOST:PORT",
        resume=True,
    )
    finetune_epochs: int = option(
        10,
        "fine-tuning",
        "of the final model, and no fewer steps than a score has; 0 leaves it out",
        parse=whole(0),
        metavar="N",
        resume=True,
    )
    finetune_lr: float = option(0.02, "fine-tuning", "its peak learning rate", parse=number(0, 10), metavar="RATE")
    finetune_batch: int = option(128, "fine-tuning", "its batch size", parse=whole(1), metavar="N")
    weight_decay: float = option(1e-4, "fine-tuning", "of both fine-tunings", parse=number(0, 1), metavar="D")
    precision: str = option(
        "float32",
        "fine-tuning",
        "of both fine-tunings: float32 or bfloat16 (`amc doctor` says what the latter gains here)",
        choices=PRECISIONS,
        metavar="NAME",
    )
    augment: str = option(
        "auto", "fine-tuning", "auto (what suits the data), none, crop, flip or crop,flip", metavar="HOW"
    )
    device: str = option(
        "local", "device", "where latency is measured: local, ssh://USER@HOST:PORT or a table file", metavar="DEVICE"
    )
    latency_batch: int = option(1, "device", "batch size of latency", parse=whole(1), metavar="N")
    latency_threads: int = option(
        1, "device", "ONNX Runtime threads of latency", parse=whole(1, MAX_THREADS), metavar="N"
    )
    latency_providers: tuple[str, ...] = option(
        ("cpu",),
        "device",
        "ONNX Runtime's providers of latency, the preferred first: cpu, cuda, tensorrt, openvino …",
        nargs="+",
        metavar="NAME",
    )
    accelerator: str = option("auto", "device", "where torch runs: auto, cpu, cuda, cuda:1 …", metavar="NAME")
    threads: int | None = option(
        None,
        "device",
        "torch's CPU threads (default: all, but one for a tiny model)",
        parse=whole(1, MAX_THREADS),
        metavar="N",
    )

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values; a password in the database's address stays out of files."""
        values = {**asdict(self), "storage": self.storage and without_password(self.storage)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def limits(self) -> tuple[int | None, float | None]:
        """Trials and seconds to search: giving one lifts the other's default."""
        if self.trials is None and self.time_limit is None:
            return DEFAULT_TRIALS, DEFAULT_TIME_LIMIT
        return self.trials, self.time_limit

    def recovers(self) -> bool:
        """Whether candidates or the final models are fine-tuned."""
        return bool(self.score_steps or self.finetune_epochs)

    def planned_trials(self) -> int:
        """How many trials a strategy may plan for."""
        return self.trials or DEFAULT_TRIALS


def shared_names() -> list[str]:
    """The settings that processes on one study must have in common: all that shape a trial."""
    own = {"storage", "study", "isolate", "trial_timeout", "accelerator", "threads", "device"}
    return [f.name for f in fields(Settings) if f.name not in own and not f.metadata.get("resume")]


def apart_from_workers(settings: Settings) -> Settings:
    """The settings without who scores, which shapes no result."""
    return replace(settings, workers=1, engine="local", address=None)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings from keywords, as `search.run(…)` takes them.

    Raises:
        UsageError: an unknown name, or a value of the wrong kind; the message names the field.
    """
    known = {f.name: f for f in fields(Settings)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"there is no setting {name!r}; {suggest(name, known)}")
        if value is not None:  # as if it were left out
            checked[name] = _checked(name, value, known[name].metadata)
    return Settings(**checked)


def _checked(name: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """The value as the command line would have read it."""
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's, torch's
    many = "nargs" in metadata or "repeat" in metadata
    parts = list(value) if many and isinstance(value, Sequence) and not isinstance(value, str) else [value]
    read = [read_value(name, str(part), metadata) for part in parts]
    return tuple(read) if many else read[0]


def read_value(name: str, text: str, metadata: Mapping[str, Any]) -> Any:
    """One value of a field from its text.

    Raises:
        UsageError: names the field, the value, and what it must be.
    """
    flag = "--" + name.replace("_", "-")
    choices: Registry | None = metadata.get("choices")
    if choices is not None and text not in choices:
        raise UsageError(f"{flag} {text!r} is unknown; {suggest(text, choices)}")
    try:
        return metadata.get("parse", str)(text)
    except ValueError as error:
        hint = str(error) if "write" in str(error) else "write a number"
        raise UsageError(f"{flag} {text!r} can't be used: {hint}") from None
