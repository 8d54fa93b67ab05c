"""Weights: read from files of strangers without running code, written once and whole, named by a hash.

Tensors that share their storage (tied weights) are one tensor, under their first name: in the file, in its size and in
the hashes. Files are safetensors (the format is a JSON header and the bytes of the tensors); state dicts of torch are
read with its restricted unpickler.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from amc.errors import ModelError
from amc.files import write_atomic
from amc.userfile import describe

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
NESTED = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which a checkpoint may hold its state dict."""
SIZE_LIMIT = 2**36

# Names and bytes of the types in the order in which safetensors writes them: by type first, by name second, so that
# wider types come first and every tensor is aligned.
_DTYPES = {
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    "float32": ("F32", 4),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_RANK = {name: rank for rank, name in enumerate(_DTYPES)}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, the modules' own objects, whatever a state dict makes of them."""
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers in state-dict order, each storage once, under its first name."""
    seen: set[tuple[Any, ...]] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            key = identity(name, tensor)
            if key not in seen:
                seen.add(key)
                tensors[name] = tensor
    return tensors


def identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory, be they one object or not."""
    if nn.parameter.is_lazy(tensor) or tensor.numel() == 0 or tensor.device.type == "meta":
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a state dict into `model`, in place.

    The file is `.safetensors`, or a torch file of a state dict: bare, or under `state_dict`, `model`, … A leading
    `module.` is dropped. Counters of batch norm and tied weights may be left out.

    Raises:
        ModelError: the file can't be read without running code, doesn't fit the model, or holds NaN. The model is then
            as it was.
    """
    path = Path(path)
    state = _read(path)
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod."):
        if not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    _complete(state, own)
    _check(path, state, own, type(model).__name__)
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file."""
    if not path.is_file():
        raise ModelError(f"--weights {path}: there is no such file")
    size = path.stat().st_size
    if not 0 < size <= SIZE_LIMIT:
        raise ModelError(f"--weights {path} has {size} bytes; a file of weights has between 1 and {SIZE_LIMIT}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix in TORCH_SUFFIXES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            kinds = ", ".join((".safetensors", *TORCH_SUFFIXES))
            raise ModelError(f"--weights {path}: the kind of file is told by its suffix, one of {kinds}")
    except ModelError:
        raise
    except (Exception, MemoryError) as problem:
        why = describe(problem) if path.suffix == ".safetensors" else (
            "it is damaged, or more than a state dict, and unpickling a model would run code from the file; "
            "save its weights with torch.save(model.state_dict(), FILE)"
        )  # fmt: skip
        raise ModelError(f"--weights {path} can't be read: {why}") from problem
    return _state_dict(path, content)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint."""
    if isinstance(content, Mapping):
        for key in NESTED:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        state = {name: tensor for name, tensor in content.items() if isinstance(name, str)}
        strays = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
        if state and len(state) == len(content) and not strays:
            return state
    held = f"keys {', '.join(map(repr, list(content)[:6]))}" if isinstance(content, Mapping) else type(content).__name__
    raise ModelError(
        f"--weights {path} holds no state dict ({held}); save one with torch.save(model.state_dict(), FILE), "
        f"bare or under {' or '.join(map(repr, NESTED[:2]))}"
    )


def _complete(state: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Adds what a file may leave out: tied weights under other names, counters of batch norm, state of another kind."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            names.setdefault(identity(name, tensor), []).append(name)
    for tied in names.values():
        given = next((name for name in tied if name in state), None)
        for name in tied:
            if given is not None:
                state.setdefault(name, state[given])
    for name, tensor in own.items():
        if name.endswith((".num_batches_tracked", "_extra_state")):
            state.setdefault(name, tensor)


def _check(path: Path, state: Mapping[str, Any], own: Mapping[str, Any], title: str) -> None:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shaped = [
        f"{name} {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape
    ]
    if missing or unexpected or shaped:
        lists = (("lacks", missing), ("has beside them", unexpected), ("has in another shape", shaped))
        said = "; ".join(f"it {verb} {some(names)}" for verb, names in lists if names)
        raise ModelError(
            f"--weights {path} doesn't fit {title}: {said}. Check that --model (and --data, for the number of classes "
            "and input channels) is what the weights were trained as"
        )
    bad = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and _has_nan(tensor)]
    if bad:
        raise ModelError(f"--weights {path} holds NaN in {some(bad)}; the training that wrote it diverged")


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isnan(tensor).any())


def some(names: Sequence[str], count: int = 4) -> str:
    """The first of many names."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the model's tensors as safetensors, tied ones once, whole or not at all.

    Equal weights give equal bytes.
    """
    # A clone even where it looks contiguous: views that share memory are separate tensors in the file.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own_tensors(model).items()}
    write_atomic(path, safetensors.torch.save(tensors))


def safetensors_size(tensors: Mapping[str, tuple[Sequence[int], Any]]) -> int:
    """Bytes of the file that `save_weights` writes, from the tensors' (shape, dtype) alone.

    The file is 8 bytes of length, a JSON header padded with spaces to a multiple of 8, and the tensors without gaps.
    dtype: a torch dtype or its name. Never falls as an axis grows.
    """
    typed = [(str(dtype).removeprefix("torch."), name, shape) for name, (shape, dtype) in tensors.items()]
    typed.sort(key=lambda entry: (_RANK[entry[0]], entry[1]))
    header, start = 2 + max(len(typed) - 1, 0), 0  # braces and commas
    for dtype, name, shape in typed:
        code, width = _DTYPES[dtype]
        end = start + width * math.prod(shape)
        axes = ",".join(map(str, shape))
        header += _quoted_length(name) + len(f':{{"dtype":"{code}","shape":[{axes}],"data_offsets":[{start},{end}]}}')
        start = end
    return 8 + header + -header % 8 + start


@functools.cache
def _quoted_length(name: str) -> int:
    """Bytes of the name as a JSON string."""
    return len(json.dumps(name, ensure_ascii=False).encode())


def structure_sha256(model: nn.Module) -> str:
    """Hash of the model's structure: names and shapes of its parameters, names and kinds of its layers."""
    layers = [(name, type(module).__name__) for name, module in model.named_modules() if not any(module.children())]
    parameters = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps([layers, parameters]).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and contents of the model's parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in own_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
