"""Workers that are actors of a Ray cluster (Moritz et al., OSDI 2018): one machine or many, GPUs in fractions.

The evaluator (dense model, images, batches) is put into Ray's object store once, each node fetches it once, and each
actor unpacks it once; then only policies and scores travel, and the nodes need neither the data nor the run directory.
Ray places the actors. Where a process or a node dies, another actor is started on what is left of the cluster, and the
policy is asked again.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amc.errors import UsageError
from amc.forward import to_device
from amc.problem import Worth
from amc.seeding import seeded
from amc.userfile import PRIVATE
from search.executor import EvaluationFailed, Pool, WorkerLost, scored

if TYPE_CHECKING:
    from search.compose import Setup
    from search.settings import Settings

POLL = 2.0
"""Seconds between looks at whether the cluster still has room for an actor that is not ready."""


def ray_pool(setup: Setup, dense_weights: Path) -> RayPool:
    """The workers of a run, on the cluster at `--address` or on one that is started here.

    Raises:
        UsageError: Ray is missing, there is no such cluster, or it is too small.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'amc-pruning-search[ray]'") from None

    settings, ours = setup.settings, not ray.is_initialized()
    if ours:
        _connect(ray, settings)
    try:
        needs = resources(settings, ray.nodes())
        _pickle_user_files(ray)
        evaluator = ray.put(setup.evaluator)
    except BaseException:
        if ours:
            ray.shutdown()
        raise
    actors: Any = ray.remote(Scorer).options(**needs)

    def start() -> Any:
        return actors.remote(evaluator, settings.seed, settings.threads or 1, settings.accelerator)

    crew = Crew(ray, start, needs, settings.trial_timeout)
    return RayPool([RayWorker(crew) for _ in range(settings.workers)], ray.shutdown if ours else lambda: None)


def _connect(ray: Any, settings: Settings) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        if settings.address:
            _check_answers(settings.address)
            ray.init(address=settings.address, **options)
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")  # these are the run itself, not work beside it
            cpus = settings.workers * (settings.threads or 1)  # by Ray's count, which need not be the machine's
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"--address {settings.address!r}" if settings.address else "a local Ray"
        raise UsageError(f"{where} can't be used: {str(error).splitlines()[0]}") from None


def _check_answers(address: str) -> None:
    """Raises an OSError where nobody listens at HOST:PORT; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def resources(settings: Settings, nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What each worker asks Ray for: its threads as CPUs, and an equal part of the GPUs where there are any.

    nodes: as `ray.nodes()` lists them.

    Raises:
        UsageError: the cluster is too small for all workers; Ray would wait for ever.
    """
    gpus = 0 if settings.accelerator == "cpu" else int(sum(n["Resources"].get("GPU", 0) for n in nodes if n["Alive"]))
    if settings.accelerator.startswith("cuda") and not gpus:
        raise UsageError(f"--accelerator {settings.accelerator} can't be used: the Ray cluster has no GPU")
    # No worker is split over GPUs, so as many share one as the fullest must hold.
    share = 1 / -(-settings.workers // gpus) if gpus else 0.0
    needs = {"num_cpus": settings.threads or 1, "num_gpus": share}
    fit = room(nodes, needs)
    if fit < settings.workers:
        raise UsageError(
            f"--workers {settings.workers} with --threads {settings.threads or 1} do not fit the Ray cluster, which "
            f"has room for {fit}; give fewer of either"
        )
    return needs


def room(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> int:
    """How many workers the nodes hold that are alive."""
    kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return sum(
        min(int(node["Resources"].get(kinds[kind], 0) / need + 1e-6) for kind, need in needs.items() if need)
        for node in nodes
        if node["Alive"]
    )


def _pickle_user_files(ray: Any) -> None:
    """Sends classes of the user's own files whole: the nodes can't import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PRIVATE):
            ray.cloudpickle.register_pickle_by_value(module)


class Scorer:
    """The actor: unpacks the evaluator once, then scores policies."""

    def __init__(self, evaluator: Any, seed: int, threads: int, accelerator: str) -> None:
        torch.set_num_threads(threads)
        device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        self._seed, self._evaluator = seed, evaluator
        for name, value in vars(evaluator).items():
            setattr(evaluator, name, _moved(value, device))

    def ready(self) -> None:
        """Returns once the evaluator is unpacked."""

    def score(self, widths: Mapping[str, int], steps: int | None) -> Worth | str:
        """What a policy is worth, or why that can't be known."""
        try:
            with seeded(self._seed, "evaluate"):
                return scored(self._evaluator, widths, steps)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _moved(value: Any, device: torch.device) -> Any:
    """A model or batches on a device; anything else as it is."""
    if isinstance(value, nn.Module):
        return value.to(device)
    return to_device(value, device) if isinstance(value, list) else value


class Crew:
    """What the workers of one pool share.

    make: starts an actor. needs: what an actor asks for. timeout: seconds that a policy may take, None: as long as it
    takes. ready: the workers whose actors are.
    """

    def __init__(self, ray: Any, make: Callable[[], Any], needs: Mapping[str, float], timeout: float | None) -> None:
        self.ray, self.make, self.needs, self.timeout = ray, make, needs, timeout
        self.ready: set[RayWorker] = set()

    def full(self) -> bool:
        """Whether the nodes that are left have no room for one more."""
        return room(self.ray.nodes(), self.needs) <= len(self.ready)


class RayWorker:
    """Scores policies by an actor: widths by group name -> what they are worth."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._actor: Any = None

    def start(self) -> None:
        """Starts the actor, unless there is one.

        Raises:
            WorkerLost: there is no room for it any more. EvaluationFailed: it could not unpack the evaluator.
        """
        if self._actor is not None:
            return
        ray, self._actor = self._crew.ray, self._crew.make()
        ready = self._actor.ready.remote()
        try:
            while not ray.wait([ready], timeout=POLL)[0]:
                if self._crew.full():
                    raise WorkerLost("the cluster has no room for it any more", for_good=True)
            ray.get(ready)
        except ray.exceptions.RayActorError as error:
            self.close()
            if error.actor_init_failed:
                raise EvaluationFailed(f"the actor that evaluates could not start: {_short(error)}") from None
            raise WorkerLost(_short(error)) from None
        except BaseException:
            self.close()
            raise
        self._crew.ready.add(self)

    def __call__(self, widths: Mapping[str, int], steps: int | None = None) -> Worth:
        """What one policy is worth as scored, or after a fine-tune of so many steps.

        Raises:
            WorkerLost: its process or its node died. EvaluationFailed: the policy can't be scored, or took too long.
        """
        self.start()
        ray, timeout = self._crew.ray, self._crew.timeout if steps is None else None
        try:
            answer = ray.get(self._actor.score.remote(dict(widths), steps), timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            self.close()
            raise EvaluationFailed(f"it took longer than --trial-timeout {timeout:g}s, and was ended") from None
        except ray.exceptions.RayError as error:
            self.close()
            raise WorkerLost(_short(error)) from None
        if isinstance(answer, str):
            raise EvaluationFailed(answer)
        return Worth(*answer)

    def kill(self) -> None:
        """Ends the actor, whatever it does; whoever waits for its answer is told."""
        actor = self._actor
        if actor is not None:
            self._crew.ray.kill(actor)

    def close(self) -> None:
        """Ends the actor."""
        self.kill()
        self._crew.ready.discard(self)
        self._actor = None


class RayPool(Pool):
    """Actors that score; leaves the cluster in the end."""

    def __init__(self, workers: list[RayWorker], leave: Callable[[], object]) -> None:
        super().__init__(workers)
        self._leave = leave

    def close(self) -> None:
        """Ends the actors, and leaves the cluster."""
        super().close()
        self._leave()


def _short(error: BaseException) -> str:
    """The last line of Ray's message, which says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
