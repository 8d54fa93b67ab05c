"""A run's latency, measured again by a program that shares nothing with ours but ONNX Runtime.

    python benchmarks/latency_verify.py runs/x --low 0.55 --high 0.618

Batch 1 and one thread, timed by the processor time of that thread, which others on the machine don't take from; dense
and slim in turns, in swapped order, in several pairs of sessions. Prints the median ratio
of each pair of sessions and of all; exit status 1 if that is not between the limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def opened(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def milliseconds(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    """The faster of two runs."""
    times = []
    for _ in range(2):
        start = time.thread_time()
        session.run(None, feeds)
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def ratios(dense: Path, slim: Path, rounds: int) -> list[float]:
    """Slim over dense, in one pair of sessions."""
    sessions = [opened(dense), opened(slim)]
    value = sessions[0].get_inputs()[0]
    shape = [1, *value.shape[1:]]
    feeds = {value.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    for session in sessions:
        milliseconds(session, feeds)
    found = []
    for at in range(rounds):
        order = (0, 1) if at % 2 else (1, 0)
        times = {which: milliseconds(sessions[which], feeds) for which in order}
        found.append(times[1] / times[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--low", type=float, default=0.0)
    parser.add_argument("--high", type=float, default=float("inf"))
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    dense, slim = arguments.run / "dense.onnx", arguments.run / "model.onnx"
    medians, everything = [], []
    for _ in range(arguments.passes):
        found = ratios(dense, slim, arguments.rounds)
        medians.append(round(statistics.median(found), 4))
        everything += found
    ratio = statistics.median(everything)
    within = arguments.low <= ratio <= arguments.high
    print(json.dumps({"ratio": round(ratio, 4), "passes": medians, "low": arguments.low, "within": within}))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
