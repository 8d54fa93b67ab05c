"""Where policies are scored: in this process, or by several workers at once. The loop that asks and tells is elsewhere.

An executor takes policies and promises scores, or what a longer fine-tune makes of them; nothing else travels. A worker
is anything that does this for one policy at a time and may die doing so: a child process (`search.child`), or an actor
on another machine (`search.ray_engine`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from amc.problem import Problem, Worth
from amc.seeding import seeded

if TYPE_CHECKING:
    from amc.evaluate import Evaluator

MOST_LOSSES = 3
"""A policy whose workers were lost so many times is not asked again: it may be what kills them."""

log = logging.getLogger("amc")


class EvaluationFailed(ArithmeticError):
    """A worker could not score a policy."""


class WorkerLost(Exception):
    """A worker died through no fault of its policy, which is asked of another one.

    for_good: it can't be had again.
    """

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.for_good = for_good


class Score(NamedTuple):
    """What a policy is worth, and the seconds that it took to find out."""

    worth: Worth
    seconds: float


def timed(work: Callable[[], float | Worth]) -> Score:
    """What a piece of work gives, and how long it takes."""
    start = time.perf_counter()
    return Score(Worth.of(work()), time.perf_counter() - start)


def done(work: Callable[[], float | Worth]) -> Future[Score]:
    """A piece of work that is done here and now."""
    future: Future[Score] = Future()
    try:
        future.set_result(timed(work))
    except Exception as error:
        future.set_exception(error)
    return future


def scored(evaluator: Evaluator, widths: Mapping[str, int], steps: int | None) -> Worth:
    """What a worker answers."""
    return evaluator(widths) if steps is None else evaluator.recovered(widths, steps)


class Executor(Protocol):
    """Scores policies, `workers` at once."""

    workers: int

    def submit(self, widths: Mapping[str, int], steps: int | None = None) -> Future[Score]:
        """The score that is to come, or that after a fine-tune of `steps`; it raises what went wrong."""
        ...

    def close(self) -> None:
        """Ends it, and whatever is under way."""
        ...


class Here:
    """Scores in this process, one policy after the other, before `submit` returns."""

    workers = 1

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self._problem, self._seed = problem, seed

    def submit(self, widths: Mapping[str, int], steps: int | None = None) -> Future[Score]:
        """A score that is there. A problem can't be asked for more than scores."""
        assert steps is None
        with seeded(self._seed, "evaluate"):
            return done(lambda: self._problem.evaluate(widths).worth)

    def close(self) -> None:
        """Nothing."""


class Worker(Protocol):
    """Scores one policy at a time, somewhere else."""

    def start(self) -> None:
        """Makes it ready to score, unless it is."""
        ...

    def __call__(self, widths: Mapping[str, int], steps: int | None) -> Worth:
        """What it is worth as scored, or after so many steps; whatever it raises but `WorkerLost` costs the policy."""
        ...

    def kill(self) -> None:
        """Ends it at once, from any thread: a score under way raises."""
        ...

    def close(self) -> None:
        """Gives back what it held; nothing is under way any more."""
        ...


class Pool:
    """Workers that each score one policy at a time; whoever is free takes the next."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = len(workers)
        self._all, self._under_way = list(workers), set[Future[Score]]()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="score")
        self._left, self._lock, self._closed = self.workers, Lock(), False
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._free.put(worker)

    def submit(self, widths: Mapping[str, int], steps: int | None = None) -> Future[Score]:
        """The score that is to come. Starting a worker is no part of its seconds."""
        future = self._threads.submit(self._score, dict(widths), steps)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def _score(self, widths: Mapping[str, int], steps: int | None) -> Score:
        """The score by the next worker that is free, or by others where workers are lost on the way."""
        losses = 0
        while True:
            worker, keep = self._free.get(), True
            try:
                worker.start()
                return timed(partial(worker, widths, steps))
            except WorkerLost as error:
                if self._closed:
                    raise EvaluationFailed("it was ended") from None
                keep = not (error.for_good and self._let_go())
                losses += keep
                log.warning("a worker was lost, and its policy is asked again: %s", error)
                if losses >= MOST_LOSSES:
                    raise EvaluationFailed(f"{losses} workers that evaluated it were lost: {error}") from None
            finally:
                if keep:
                    self._free.put(worker)

    def _let_go(self) -> bool:
        """Whether a worker may go for good, as all but the last may."""
        with self._lock:
            last = self._left == 1
            self._left -= not last
            return not last

    def close(self) -> None:
        """Kills the workers, whatever they do."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        left = set(self._under_way)
        while left:  # again and again: one may have been about to start
            for worker in self._all:
                worker.kill()
            left = wait(left, timeout=0.1).not_done
        for worker in self._all:
            worker.close()
