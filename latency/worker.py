"""The one file that travels to a device: opens ONNX models, and times them against a baseline.

It needs only Python, numpy and onnxruntime. In process, `latency.paired` calls `time_models`; on another machine, or in
a process of its own, `python worker.py` answers requests on standard input with JSON lines on standard output, so the
same code measures everywhere.

Timing is paired (Georges et al., OOPSLA 2007, on why one run proves nothing): a round times a burst of the baseline and
a burst of the model next to each other, in swapped order every other round, and its ratio is one sample. What slows the
machine down slows both, and the ratio stands. Each pass opens the sessions anew, since where a session's memory lands
moves its speed by half a percent. On a busy machine most of the noise is waiting for the core, in slices as long as a
run: the kernel counts this waiting, and a single thread's is left out of its times.

Protocol: a request is a line of JSON, followed by the bytes of the models that it announces:
`{"op": "measure", "models": [["dense", 4096], …], …settings}`. The answer is any number of `{"progress": …}` lines,
then `{"result": …}` or `{"error": …, "kind": "model" | "device" | "memory"}`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort

PROTOCOL = 1
MAX_FEED_BYTES = 1 << 30
BURST = 3
"""Runs of one model in a row; their median is what a round compares."""

OPTIMIZATION = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class WorkerError(Exception):
    """`kind` is `model` (the file is at fault) or `device` (this machine can't do it)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def resolve_providers(names: list[str] | None) -> list[str]:
    """`cpu`, `CUDA` or `CUDAExecutionProvider` to what the installed ONNX Runtime calls it; the CPU by default."""
    available = ort.get_available_providers()
    short = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    found = []
    for name in names or ["cpu"]:
        key = name.removesuffix("ExecutionProvider").lower()
        if key not in short:
            raise WorkerError(
                "device", f"this ONNX Runtime has no provider `{name}`; it has: {', '.join(sorted(short))}"
            )
        found.append(short[key])
    return found


def open_session(
    model: str | bytes,
    *,
    threads: int = 1,
    providers: list[str] | None = None,
    optimization: str = "all",
    profile: str | None = None,
) -> ort.InferenceSession:
    """A session with a fixed number of threads. `profile` is the path prefix of ONNX Runtime's own profile."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = OPTIMIZATION[optimization]
    options.log_severity_level = 4
    if threads > 1:
        # Threads that spin while they wait look fast on an idle machine and starve their neighbours on a busy one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    wanted = resolve_providers(providers)
    try:
        session = ort.InferenceSession(model, options, providers=wanted)
    except Exception as error:  # ONNX Runtime raises a class for each of its status codes, all bare Exceptions
        raise WorkerError("model", f"ONNX Runtime can't load the model: {_brief(error)}") from error
    if session.get_providers()[0] != wanted[0]:
        # ONNX Runtime falls back to the CPU without a word, and a CPU's time is not the device's.
        raise WorkerError("device", f"{wanted[0]} is installed but does not start; ONNX Runtime fell back to the CPU")
    return session


def random_feeds(session: ort.InferenceSession, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs drawn from `seed`: floats from a normal distribution, integers and booleans of 0 and 1."""
    rng, feeds, total = np.random.default_rng(seed), {}, 0
    for value in session.get_inputs():
        if value.type not in _TYPES:
            raise WorkerError(
                "model", f"input `{value.name}` has the type {value.type}, for which no data can be made up"
            )
        shape = [batch if i == 0 and not isinstance(d, int) else d for i, d in enumerate(value.shape)]
        if shape and isinstance(value.shape[0], int) and value.shape[0] != batch:
            raise WorkerError(
                "model", f"input `{value.name}` is fixed to a batch of {value.shape[0]}, but {batch} is asked"
            )
        if not all(isinstance(d, int) and d > 0 for d in shape):
            raise WorkerError(
                "model", f"input `{value.name}` of shape {value.shape}: only the first axis may be dynamic"
            )
        total += int(np.prod([float(d) for d in shape])) * 8
        if total > MAX_FEED_BYTES:
            raise WorkerError("model", f"the inputs at batch {batch} take more than {MAX_FEED_BYTES >> 20} MiB")
        kind = np.dtype(_TYPES[value.type])
        drawn = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = np.ascontiguousarray(drawn, dtype=kind)
    return feeds


def time_models(
    models: Mapping[str, str | bytes],
    *,
    baseline: str,
    batch: int = 1,
    threads: int = 1,
    providers: list[str] | None = None,
    optimization: str = "all",
    seconds: float = 4.0,
    tightness: float = 0.005,
    passes: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[list[list[float]]]]:
    """Milliseconds of each model beside the baseline: name -> passes -> rounds -> `[baseline, model]`.

    Rounds go on until the standard error of the median ratio is under `tightness`, or the model has taken `seconds`
    (warm-up left out), shared evenly by the passes.
    """
    samples: dict[str, list[list[list[float]]]] = {name: [] for name in models}
    rng = np.random.default_rng(seed)
    done, total = 0, passes * len(models)
    # The work of other threads, or of an accelerator, goes on while this thread waits for its core.
    alone = threads == 1 and resolve_providers(providers) == ["CPUExecutionProvider"]

    def opened(model: str | bytes, clock: Callable[[], int]) -> Callable[[], float]:
        session = open_session(model, threads=threads, providers=providers, optimization=optimization)
        runner = _runner(session, random_feeds(session, batch, seed), clock)
        runner()  # the first run allocates, and must not be timed
        return runner

    with _clock(alone) as clock:
        for _ in range(passes):
            base = opened(models[baseline], clock)
            for name in rng.permutation(sorted(models)):
                other = opened(models[name], clock)
                with _quiet_collector():
                    samples[name].append(_rounds(base, other, seconds / passes, tightness * passes**0.5))
                done += 1
                if progress:
                    progress(done, total, str(name))
    return samples


@contextlib.contextmanager
def _clock(alone: bool) -> Iterator[Callable[[], int]]:
    """A clock, ns. If `alone`, one that stands still while this thread is ready to run but another has its core.

    Linux counts that waiting (Documentation/scheduler/sched-stats.rst); elsewhere it stays in.
    """
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY) if alone else -1
    except OSError:
        file = -1
    if file < 0:
        yield time.perf_counter_ns
        return
    try:
        yield lambda: time.perf_counter_ns() - int(os.pread(file, 100, 0).split()[1])
    finally:
        os.close(file)


def _rounds(
    base: Callable[[], float], other: Callable[[], float], seconds: float, tightness: float
) -> list[list[float]]:
    warm = time.perf_counter()
    while time.perf_counter() - warm < min(0.05, seconds / 4):
        base(), other()
    pairs: list[list[float]] = []
    start = time.perf_counter()
    while True:
        if len(pairs) % 2:
            theirs, ours = _burst(other), _burst(base)
        else:
            ours, theirs = _burst(base), _burst(other)
        pairs.append([ours, theirs])
        if time.perf_counter() - start > seconds and len(pairs) >= 4:
            return pairs
        if len(pairs) >= 12 and len(pairs) % 6 == 0 and _error(pairs) < tightness:
            return pairs


def _burst(run: Callable[[], float]) -> float:
    return sorted(run() for _ in range(BURST))[BURST // 2]


def _error(pairs: list[list[float]]) -> float:
    """Standard error of the median log ratio, from the middle half of the samples, which no outlier reaches."""
    logs = np.log([theirs / ours for ours, theirs in pairs])
    low, high = np.quantile(logs, [0.25, 0.75])
    return float(1.2533 * (high - low) / 1.349 / len(logs) ** 0.5)


def _runner(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], clock: Callable[[], int]
) -> Callable[[], float]:
    """A function that runs the session once and returns milliseconds."""

    def run() -> float:
        start = clock()
        session.run(None, feeds)
        return max(clock() - start, 1) / 1e6  # a ratio divides by it

    def checked() -> float:
        try:
            return run()
        except Exception as error:
            raise WorkerError("model", f"ONNX Runtime can't run the model: {_brief(error)}") from error

    return checked


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection between two timings."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def profile_model(model: str | bytes, *, folder: str, batch: int = 1, runs: int = 50, **settings: Any) -> list[Any]:
    """ONNX Runtime's profile of `runs` runs: its events of category `Node`, warm-up left out."""
    session = open_session(model, profile=os.path.join(folder, "profile"), **settings)
    runner = _runner(session, random_feeds(session, batch, 0), time.perf_counter_ns)
    warm = 5
    for _ in range(runs + warm):
        runner()
    path = session.end_profiling()
    with open(path, encoding="utf-8") as file:
        events = json.load(file)
    os.unlink(path)
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    each = len(nodes) // (runs + warm)
    return nodes[each * warm :]


def fingerprint() -> dict[str, Any]:
    """What makes two machines the same device for a latency table."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        fields: dict[str, str] = {}
        for line in file:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        known = [fields.get(key, "") for key in ("vendor_id", "model name", "cpu family", "model", "stepping")]
        cpu = " ".join(part for part in known if part) or cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "machine": platform.machine(),
        "system": platform.system(),
        "onnxruntime": ort.__version__,
        "available": sorted(ort.get_available_providers()),
    }


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer requests until the source ends."""

    def say(message: dict[str, Any]) -> None:
        sink.write(json.dumps(message).encode() + b"\n")
        sink.flush()

    say({"ready": PROTOCOL, "fingerprint": fingerprint()})
    for line in iter(source.readline, b""):
        request = json.loads(line)
        models = {}
        for name, size in request.pop("models", []):
            models[name] = source.read(size)
            if len(models[name]) != size:
                return
        try:
            say({"result": _answer(request, models, lambda i, n, name: say({"progress": [i, n, name]}))})
        except WorkerError as error:
            say({"error": str(error), "kind": error.kind})
        except MemoryError:
            say({"error": "the device ran out of memory", "kind": "memory"})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {_brief(error)}", "kind": "device"})


def _answer(
    request: dict[str, Any], models: dict[str, bytes], progress: Callable[[int, int, str], None]
) -> dict[str, Any] | list[Any]:
    op = request.pop("op")
    if op == "measure":
        return time_models(models, progress=progress, **request)
    if op == "profile":
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return profile_model(next(iter(models.values())), folder=folder, **request)
    raise WorkerError("device", f"the worker knows no operation `{op}`")


if __name__ == "__main__":
    # Anything that a library prints to standard output would break the protocol: it goes to standard error instead.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, answers)
