"""What to type after a run: commands and scripts that apply its policy, run its model, and find it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from amc.catalog import DATASETS, MODELS
from search.finished import FinishedRun
from search.settings import Settings


@dataclass(frozen=True)
class Command:
    """What to type next."""

    title: str
    text: str


def commands(run: FinishedRun) -> list[Command]:
    """The exact commands to apply the policy, to run the model, and to find it again."""
    settings = run.result.settings
    if is_named(settings):
        again = _shell(["amc", "search"], *(flags(settings, name) for name, _ in changed(settings)))
    else:
        given = {name: value for name, value in changed(settings) if name not in ("model", "data")}
        arguments = "".join(f"    {name}={value!r},\n" for name, value in given.items())
        again = f"import search\n\nresult = search.run(\n    model=...,  # yours\n    data=...,\n{arguments})"
    found = [Command("Apply the policy to the dense weights", apply_command(run, "policy.json"))]
    if run.policy:
        found.append(Command("Run the model, with onnxruntime alone", deployment(run)))
    return [*found, Command("Find it again", again)]


def apply_command(run: FinishedRun, policy: str) -> str:
    """How to apply a policy file of the run: a command, or Python where the model was an object."""
    settings, file = run.result.settings, str(run.path / policy)
    if not is_named(settings):
        return (
            "import amc\n\nmodel = ...  # your dense model, with its weights\n"
            f"slim = amc.apply(model, amc.load_policy({file!r}))"
        )
    source = [flags(settings, name) for name in ("model", "data", "mean", "std", "input_size")]
    return _shell(
        ["amc", "apply", file], *source, ["--weights", str(run.path / "dense.safetensors")], ["--out", "slim"]
    )


def _shell(*groups: list[str]) -> str:
    """A command line, a line for each group of words that there is, quoted."""
    return " \\\n    ".join(shlex.join(words) for words in groups if words)


def deployment(run: FinishedRun) -> str:
    """A script that runs the ONNX file."""
    assert run.policy
    inputs = run.policy.model.inputs
    feeds = "".join(f"    {info.name!r}: np.zeros({tuple(info.shape)!r}, {info.dtype!r}),\n" for info in inputs)
    return (
        "import numpy as np\nimport onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({str(run.path / 'model.onnx')!r})\n"
        f"feeds = {{  # your inputs, normalized as in training\n{feeds}}}\n"
        "print(session.run(None, feeds)[0])"
    )


def is_named(settings: Mapping[str, Any]) -> bool:
    """Whether the command line can find the run's model and data: both were names, not objects."""
    model, data = str(settings.get("model", Settings.model)), str(settings.get("data", Settings.data))
    return (model in MODELS or ":" in model) and (data in DATASETS or ":" in data)


def changed(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that differ from their default, by name; settings that this version doesn't know are left out."""
    for field in fields(Settings):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        value = settings.get(field.name, default)
        if value != default:
            yield field.name, value


def flags(settings: Mapping[str, Any], name: str) -> list[str]:
    """A setting as words of the command line; none where it has its default."""
    if name not in dict(changed(settings)):
        return []
    flag, value = "--" + name.replace("_", "-"), settings[name]
    metadata = next(field.metadata for field in fields(Settings) if field.name == name)
    if "flag" in metadata:
        return [flag]
    if "repeat" in metadata:
        return [word for part in value for word in (flag, str(part))]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
