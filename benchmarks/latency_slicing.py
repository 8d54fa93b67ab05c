"""A sliced ONNX file against an exported one, on every built-in model: outputs, latency, and what slicing takes.

    python benchmarks/latency_slicing.py --out benchmarks/results/latency-slicing.json

Weights and batch norm statistics are drawn at random, and so are the policy and the units that it keeps. Outputs must
agree to 1e-5; the ratio of the two files' latencies should be 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import latency
from amc import architectures
from amc.catalog import MODELS
from amc.coupling import trace
from amc.export import export_bytes
from amc.slim import slim
from latency.slicing import random_kept, sliced


def drawn(name: str) -> nn.Module:
    """A built-in model with batch norm that does something."""
    torch.manual_seed(0)
    model: nn.Module = getattr(architectures, name)().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def compared(name: str, seconds: float) -> dict[str, Any]:
    """One model's figures."""
    model = drawn(name)
    inputs = (torch.zeros(1, 1, 8, 8) if name == "digits_resnet" else torch.zeros(1, 3, 32, 32),)
    structure = trace(model, inputs)
    slicer = sliced(model, structure, inputs, export_bytes(model, inputs))
    rng = np.random.default_rng(0)
    kept = random_kept(structure, [int(rng.choice(group.widths)) for group in structure.groups], rng)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        cut = slicer(kept)
        times.append(1e3 * (time.perf_counter() - start))
    exported = export_bytes(slim(model, structure, kept), inputs)
    sessions = [latency.open_session(cut), latency.open_session(exported)]
    feeds = latency.random_feeds(sessions[0], 4, 0)
    first, second = (session.run(None, feeds)[0] for session in sessions)
    reading = latency.measure({"exported": exported, "sliced": cut}, baseline="exported", seconds=seconds)["sliced"]
    return {
        "model": name,
        "difference": float(np.abs(first - second).max()),
        "slicing_ms": round(min(times), 2),
        "latency_ratio": round(reading.ratio, 4),
        "latency_ratio_ci95": [round(value, 4) for value in reading.ratio_ci95],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(compared(name, arguments.seconds))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
