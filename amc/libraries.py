"""Models of other libraries: torchvision, timm and transformers, each imported only when a model of it is named.

Nothing is ever downloaded: architectures come with random weights (`--weights` loads others), and transformers reads a
local directory, its safetensors included, or the configuration alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amc.errors import ModelError
from amc.registry import suggest
from amc.userfile import describe

TOKENS = 16
"""Length of an example text."""


def _library(name: str, spec: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name == name.split(".")[0]:
            raise ModelError(f"--model {spec} needs {problem.name}, which is not installed; {install}") from None
        raise ModelError(f"--model {spec}: {name} can't be imported: {describe(problem)}; {install}") from problem
    except Exception as problem:  # a build for another torch raises a RuntimeError
        raise ModelError(f"--model {spec}: {name} can't be imported: {describe(problem)}; {install}") from problem


def _built(spec: str, factory: Any, *args: Any, **kwargs: Any) -> nn.Module:
    try:
        model = factory(*args, **kwargs)
    except Exception as problem:
        raise ModelError(f"--model {spec} can't be built: {describe(problem)}") from problem
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {spec} is a {type(model).__name__}, not a torch.nn.Module")
    return model


def torchvision(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """A classifier of `torchvision.models`, with random weights. It takes three channels, whatever is asked for."""
    del in_channels
    spec = f"torchvision:{name}"
    models = _library(
        "torchvision.models", spec, "install a torchvision built for this torch (`pip install torchvision`)"
    )
    factory = getattr(models, name, None)
    if not name.islower() or not callable(factory):
        known = [key for key, value in vars(models).items() if key.islower() and key[0] != "_" and callable(value)]
        raise ModelError(f"torchvision has no model {name!r}; {suggest(name, known)}")
    return _built(spec, factory, weights=None, **({} if num_classes is None else {"num_classes": num_classes}))


def timm(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """A model of timm, with random weights."""
    spec = f"timm:{name}"
    library = _library("timm", spec, "install it (`pip install timm`) with a torchvision built for this torch")
    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    given = {key: size for key, size in sizes.items() if size is not None}
    return _built(spec, library.create_model, name, pretrained=False, **given)


def hf(where: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """A model of transformers from a local directory or a `config.json`, without code from it and without the hub.

    Its class is the one that the configuration names, else an image or text classifier for this kind of configuration.
    Where the directory holds no weights, they are random, and the configuration's classes and channels give way to the
    data's.
    """
    spec = f"hf:{where}"
    path = Path(where).expanduser()
    folder = path.parent if path.is_file() else path
    config_file = path if path.is_file() else path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"--model {spec}: there is no {config_file}; give a local directory, nothing is downloaded")
    transformers = _library("transformers", spec, "`pip install transformers`")
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(config_file), local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:
        raise ModelError(f"--model {spec}: {config_file} can't be read: {describe(problem)}") from problem
    config.use_cache = False
    factory = _class(transformers, config, spec)
    weighted = path.is_dir() and any(folder.glob("*.safetensors"))
    if not weighted and path.is_dir() and (pickled := sorted(folder.glob("*.bin"))):
        raise ModelError(
            f"--model {spec} holds weights as {pickled[0].name} only; convert them to safetensors "
            f"(model.save_pretrained(DIR) does), or use --model hf:{config_file} --weights {pickled[0]}"
        )
    if weighted:
        options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
        model = _built(spec, _pretrained, factory, str(folder), config=config, **options)
    else:
        if num_classes is not None:
            config.num_labels = num_classes
        if in_channels is not None and hasattr(config, "num_channels"):
            config.num_channels = in_channels
        model = _built(spec, factory._from_config if hasattr(factory, "_from_config") else factory, config)
    return model


def _class(transformers: Any, config: Any, spec: str) -> Any:
    """The model's class: what the configuration names, else an image or text classifier, else the bare model."""
    for name in config.architectures or ():
        factory = getattr(transformers, name, None)
        if factory is not None and getattr(factory, "config_class", type(config)) is type(config):
            return factory
    for auto in ("AutoModelForImageClassification", "AutoModelForSequenceClassification", "AutoModel"):
        try:
            known = getattr(transformers, auto)._model_mapping[type(config)]
            return known[0] if isinstance(known, tuple) else known
        except KeyError:
            continue
    raise ModelError(f"--model {spec}: transformers has no model for a {type(config).__name__}")


def _pretrained(factory: Any, folder: str, **options: Any) -> Any:
    progress = importlib.import_module("transformers.utils.logging")
    progress.disable_progress_bar()
    model, info = factory.from_pretrained(folder, output_loading_info=True, **options)
    progress.enable_progress_bar()
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"its weights lack {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}")
    return model


def example_inputs(model: Any) -> tuple[Tensor] | dict[str, Tensor] | None:
    """One image or a short text, as the configuration of a model of transformers describes them; else None."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", None) or 3
        return (torch.randn((1, channels, height, width), generator=generator),)
    if model.main_input_name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or TOKENS
        tokens = torch.randint(0, config.vocab_size, (1, min(TOKENS, longest)), generator=generator)
        return {"input_ids": tokens}
    return None
