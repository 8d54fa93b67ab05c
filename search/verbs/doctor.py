"""`amc doctor`: what is installed, which devices and providers work, and what to install for what.

Nothing is taken on trust: a torch device works when it has multiplied two matrices, a provider of ONNX Runtime when it
has run a model. What is broken is a line of the answer, never an exception, since that is when one asks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

DISTRIBUTION = "amc-pruning-search"
WORKS = "works"
ROUNDS = 6
"""Of two training steps in each precision."""

OPTIONAL: dict[str, tuple[str, str]] = {
    "torchvision": ("--model torchvision:NAME", f"{DISTRIBUTION} torchvision"),
    "timm": ("--model timm:NAME", f"{DISTRIBUTION} timm"),
    "transformers": ("--model hf:DIR", f"'{DISTRIBUTION}[hf]'"),
    "asyncssh": ("--device ssh://USER@HOST:PORT", f"'{DISTRIBUTION}[ssh]'"),
    "psycopg": ("--storage postgresql://…", "'psycopg[binary]'"),
    "optuna-dashboard": ("a look at a run's study.db in the browser", "optuna-dashboard"),
    "tensorboard": ("--tensorboard: a run's scalars, live", f"'{DISTRIBUTION}[tensorboard]'"),
    "shtab": ("amc completion", f"'{DISTRIBUTION}[completion]'"),
    "mkdocs-material": ("building these docs", f"'{DISTRIBUTION}[docs]'"),
}
"""Package -> (what it is for, what to give to `pip install`); ours beside another's keeps torch within our bounds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def execute(arguments: argparse.Namespace) -> Any:
    """Looks at everything; returns it as a JSON value."""
    from search.display import Display

    found = examine()
    display = Display(quiet=arguments.quiet, json=arguments.json)
    for table in tables(found):
        display.show(table)
    for problem in found["problems"]:
        display.show(f"problem: {problem}")
    if not found["problems"]:
        display.show("no problems: everything that a run needs is here and works")
    return found


def examine() -> dict[str, Any]:
    """What is here. `problems` are what a run would stumble over; a part that is optional is none."""
    found: dict[str, Any] = {
        "version": version(DISTRIBUTION),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: {"version": version(name), "needs": needs} for name, needs in requirements()},
        "optional": {
            name: {"version": version(name), "for": purpose, "install": f"pip install {what}"}
            for name, (purpose, what) in OPTIONAL.items()
        },
        "torch": guarded(torch_devices),
        "onnxruntime": guarded(providers),
        "training": guarded(training),
        "cache": guarded(cache),
    }
    found["problems"] = list(_problems(found))
    return found


def version(package: str) -> str | None:
    """The installed version, None where it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> Iterator[tuple[str, str]]:
    """The packages that the core needs, each with the versions it asks for."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = line.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match and "extra" not in marker:
            yield match[0], requirement[match.end() :].strip()


def guarded(look: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `look` finds, or why it could not."""
    try:
        return look()
    except Exception as error:
        return {"error": first_line(error)}


def first_line(error: BaseException) -> str:
    """`ImportError: the first line of its message`."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def torch_devices() -> dict[str, str]:
    """Each of torch's devices, and whether it computes: `works`, or why not."""
    import torch

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    found = {}
    for name in names:
        try:
            ones = torch.ones(8, 8, device=name)
            right = float((ones @ ones).sum().cpu()) == 512
            found[name] = WORKS if right else "computes wrong results"
        except Exception as error:
            found[name] = first_line(error)
    return found


def training() -> dict[str, str]:
    """What a training step takes in each precision, of its time in float32, on the device that a run would take."""
    import torch
    from torch import nn

    from amc.catalog import PRECISIONS
    from amc.finetune import train
    from amc.layout import arranged
    from amc.registry import resolve
    from search.compose import accelerator

    device = accelerator("auto")
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(4)]
    model = arranged(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device), torch.channels_last)
    batch = (torch.rand(64, 32, 32, 32, device=device), torch.zeros(64, dtype=torch.long, device=device))
    dtypes = {name: resolve(PRECISIONS, name, "--precision") for name in PRECISIONS}
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for _ in range(ROUNDS):
        for name, dtype in dtypes.items():
            start = time.perf_counter()
            train(model, [batch] * 2, steps=2, lr=1e-6, precision=dtype)
            seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first round warms up
    return {
        f"--precision {name}": f"{middle[name] / middle['float32']:.2f} of float32's time"
        for name in middle
        if name != "float32"
    }


def providers() -> dict[str, str]:
    """Each provider of the installed ONNX Runtime, and whether it runs a model: `works`, or why not."""
    import numpy as np
    import onnxruntime

    from latency.session import open_session

    model, found = _small_model(), {}
    for name in onnxruntime.get_available_providers():
        try:
            session = open_session(model, providers=[name])
            output = session.run(None, {"x": np.full((1, 4), -1, np.float32)})[0]
            found[name] = WORKS if not np.any(output) else "computes wrong results"
        except Exception as error:
            found[name] = first_line(error)
    return found


def _small_model() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    opset = helper.make_opsetid("", 17)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return model


def cache() -> dict[str, str]:
    """The folder where weights that are trained here are kept, and whether it can be written."""
    from amc.pretrain import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return {str(folder): WORKS}


def _problems(found: dict[str, Any]) -> Iterator[str]:
    if found["version"] is None:
        yield f"{DISTRIBUTION} is not installed, so its version is unknown: pip install -e ."
    for name, package in found["packages"].items():
        if package["version"] is None:
            yield f"{name} is missing: pip install '{name}{package['needs']}'"
    for part, of in (("torch", "cpu"), ("onnxruntime", "CPUExecutionProvider")):
        answer = found[part].get("error") or found[part].get(of, "missing")
        if answer != WORKS:
            yield f"{part} does not work on this machine's CPU: {answer}"
    for where, answer in found["cache"].items():
        if answer != WORKS:
            yield f"the cache can't be used ({where}: {answer}), so that the embedded model is trained in every run"


def tables(found: dict[str, Any]) -> Iterator[Table | str]:
    """The findings for a person."""
    yield (
        f"{DISTRIBUTION} {found['version'] or 'not installed'}, Python {found['python']}, {found['system']}, "
        f"{found['cores']} cores"
    )
    packages = [
        (name, package["version"] or "missing", package["needs"]) for name, package in found["packages"].items()
    ]
    if packages:
        yield _table("packages", ("package", "installed", "needs"), packages)
    looked = ("torch", "training", "onnxruntime", "cache")
    parts = [(what, part, answer) for part in looked for what, answer in found[part].items()]
    yield _table("devices, providers and the cache", ("what", "of", "state"), parts)
    optional = [
        (name, package["version"] or "-", package["for"], "" if package["version"] else package["install"])
        for name, package in found["optional"].items()
    ]
    yield _table("optional", ("package", "installed", "for", "to have it"), optional)


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # text, not markup: `[hf]` is no style
    return table
