"""Dense weights for the embedded default, trained on first use and kept in the user's cache.

The name of the cached file is a hash of everything that shaped the weights: the code, the recipe, the seed, the data
and the arithmetic. So a file is never stale, and what is trained again is the same. Training uses one thread: the sums
of a convolution depend on how they are shared out, and the weights must not depend on `--threads`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from torch import nn

from amc import architectures, datasets, finetune, forward, seeding
from amc import data as data_module
from amc.data import Data
from amc.errors import DataError, ModelError
from amc.models import load_model
from amc.registry import suggest
from amc.seeding import threads
from amc.weights import load_weights, save_weights

log = logging.getLogger("amc")

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Recipe:
    """How dense weights are trained, with `amc.finetune.finetune`."""

    epochs: int
    lr: float
    batch: int
    weight_decay: float


RECIPES = {"digits_resnet": Recipe(epochs=40, lr=0.1, batch=64, weight_decay=5e-4)}


def pretrained(name: str, data: Data, *, seed: int = 0, progress: Progress | None = None) -> nn.Module:
    """The built-in model `name` with dense weights for `data`, in eval mode: from the cache, else trained and cached.

    Processes that ask at once train once. progress: called with (steps done, steps in all), only if it is trained.

    Raises:
        ModelError: there is no recipe for this model. DataError: the data has nothing to train on.
    """
    if name not in RECIPES:
        raise ModelError(f"--model {name} has no recipe to train its weights; pass --weights. {suggest(name, RECIPES)}")
    if data.train is None:
        raise DataError(f"--data {data.name} has no `train` to train {name} on; pass --weights")
    model = load_model(name, data=data, seed=seed).model
    path = _path(name, data, seed)
    with _locked(path):
        if not _cached(model, path):
            _train(model, name, data, seed, progress)
            try:
                save_weights(model, path)
            except OSError as problem:
                log.warning("the trained weights of %s are not kept: %s", name, problem)
    return model.eval()


def is_cached(name: str, data: Data, *, seed: int = 0) -> bool:
    """Whether `pretrained` need not train."""
    return _path(name, data, seed).exists()


def _path(name: str, data: Data, seed: int) -> Path:
    return cache_folder() / f"{name}-{_key(name, data, seed)}.safetensors"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from training the same weights meanwhile, where the cache can be written."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
        except OSError as problem:
            log.warning("the cache can't be used: %s", problem)
        yield


def cache_folder() -> Path:
    """Where trained weights are kept; `XDG_CACHE_HOME` moves it on Linux."""
    return Path(platformdirs.user_cache_dir("amc-pruning-search"))


def _cached(model: nn.Module, path: Path) -> bool:
    """Whether the weights could be loaded from the cache."""
    if not path.exists():
        return False
    try:
        load_weights(model, path)
    except ModelError as problem:  # damaged from outside: we write it whole
        log.warning("training again: %s", problem)
        return False
    return True


def _train(model: nn.Module, name: str, data: Data, seed: int, progress: Progress | None) -> None:
    assert data.train is not None
    with threads(1):
        finetune.finetune(
            model, data.train, augment=data.augment, seed=seed, progress=progress, **asdict(RECIPES[name])
        )


def _key(name: str, data: Data, seed: int) -> str:
    """Hash of everything that shapes the weights, the normalization included, seen in the first examples."""
    assert data.train is not None
    sample = np.asarray(data.train.batch(range(min(16, len(data.train))))[0])
    parts = (
        [inspect.getsource(module) for module in (architectures, data_module, datasets, finetune, forward, seeding)],
        inspect.getsource(sys.modules[__name__]),
        [name, seed, data.fingerprint, data.num_classes, data.augment, hashlib.sha256(sample.tobytes()).hexdigest()],
        [torch.__version__, np.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()],
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
