"""Who scores: this process, child processes of it, or a Ray cluster. The settings say which, and how many at once.

Importing this costs nothing: the settings read the registry.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from amc.registry import resolve

if TYPE_CHECKING:
    from search.compose import Setup
    from search.executor import Executor
    from search.settings import Settings

ENGINES: dict[str, tuple[str, str]] = {
    "local": ("this machine: child processes", "search.engines:local"),
    "ray": ("a Ray cluster, of one machine or many (needs the extra `ray`)", "search.ray_engine:ray_pool"),
}


def elsewhere(settings: Settings) -> bool:
    """Whether policies are scored in other processes than this one."""
    return settings.engine != "local" or settings.workers > 1 or settings.isolate or settings.trial_timeout is not None


def executor_of(setup: Setup, dense_weights: Path) -> Executor | None:
    """Who scores a run's policies; None: this process.

    Raises:
        UsageError: the engine can't be used.
    """
    if not elsewhere(setup.settings):
        return None
    executor: Executor = resolve(ENGINES, setup.settings.engine, "--engine")(setup, dense_weights)
    return executor


def local(setup: Setup, dense_weights: Path) -> Executor:
    """Child processes that share this machine's threads and GPUs."""
    import torch

    from amc.forward import device_of
    from search.child import Isolated
    from search.executor import Pool

    settings, workers = setup.settings, setup.settings.workers
    settings = replace(settings, threads=settings.threads or max(torch.get_num_threads() // workers, 1))
    device = device_of(setup.loaded.model)
    if device.type == "cpu":  # so it stays, in a run that goes on where there is a GPU
        settings = replace(settings, accelerator="cpu")
    gpus = visible_gpus() if device.type == "cuda" and ":" not in settings.accelerator else []
    return Pool(
        [
            Isolated(
                settings,
                dense_weights,
                timeout=settings.trial_timeout,
                environment={"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {},
            )
            for i in range(workers)
        ]
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
