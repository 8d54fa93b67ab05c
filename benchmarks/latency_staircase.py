"""The staircase: latency of two 3×3 convolutions against the channels kept between them.

    python benchmarks/latency_staircase.py --out benchmarks/results/latency-staircase.json \
        --figure docs/images/latency-staircase.svg

Each width is cut out of one dense ONNX file and timed beside it (batch 1, one thread). The maps are as large as where a
CIFAR ResNet has so many channels. A file that is there already is drawn, not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import latency
from amc.coupling import trace
from amc.export import export_bytes

SIZES = {32: 16, 64: 8}
"""Channels, and the height and width of their maps."""


def staircase(channels: int, size: int, seconds: float) -> list[dict[str, float]]:
    """Every width's latency over the dense one's, with its interval."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    ).eval()
    inputs = (torch.zeros(1, channels, size, size),)
    structure = trace(model, inputs)
    dense = export_bytes(model, inputs)
    files = latency.policy_files(model, structure, inputs, dense)
    models = {str(width): files([width]) for width in range(1, channels + 1)}
    readings = latency.measure({"dense": dense, **models}, seconds=seconds, passes=3)
    return [
        {"width": width, "ratio": found.ratio, "low": found.ratio_ci95[0], "high": found.ratio_ci95[1]}
        for width, found in ((width, readings[str(width)]) for width in range(1, channels + 1))
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Both staircases side by side, with the line that FLOPs would follow."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "staircase"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found["stairs"]), figsize=(9, 3.4), sharey=True, layout="constrained")
    for one, (channels, rows) in zip(axes, found["stairs"].items(), strict=True):
        widths = [row["width"] for row in rows]
        one.fill_between(widths, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.3, linewidth=0)
        one.plot(widths, [row["ratio"] for row in rows], "o-", markersize=3, label="measured")
        one.plot(widths, [width / int(channels) for width in widths], "--", color="gray", label="FLOPs")
        one.set(xlabel=f"channels kept of {channels}", xticks=range(0, int(channels) + 1, 8), ylim=(0, None))
        one.grid(alpha=0.4)
    axes[0].set_ylabel("latency over dense")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of every width")
    parser.add_argument("--figure", type=Path, help="SVG")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each width")
    arguments = parser.parse_args()
    if not arguments.out.exists():
        stairs = {str(channels): staircase(channels, size, arguments.seconds) for channels, size in SIZES.items()}
        found = {"device": latency.open_device("local").fingerprint(), "stairs": stairs}
        arguments.out.write_text(json.dumps(found) + "\n")
    found = json.loads(arguments.out.read_text())
    if arguments.figure:
        draw(found, arguments.figure)
    for channels, rows in found["stairs"].items():
        print(channels, " ".join(f"{row['width']}:{row['ratio']:.3f}" for row in rows))


if __name__ == "__main__":
    main()
