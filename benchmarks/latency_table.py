"""Latency tables against measurement, and sliced ONNX files against exported ones.

    python benchmarks/latency_table.py --models resnet56 mobilenet_v2 plain20 --policies 100 --out FOLDER

For each model: builds a table, measures random policies that it never saw, and prints how far its predictions are
(target: within 10 % for 99 % of them, mean 3 %, Spearman 0.97), how long the table took, how far the monotone cost is
from measurement on widened policies, how long slicing takes and how far a sliced file's outputs are from an export's.
The policies are measured on several visits, those that another load slowed up to five times, and some once more at the
end: what these differ by is the noise that no prediction can be under. Policies that were slowed each time have another
ratio, and are reported apart. `--out` keeps every policy, predicted and measured, with the dense model's time during
it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from amc import architectures
from amc.coupling import trace
from amc.export import export_onnx
from amc.slim import slim
from latency import LatencyCost, build_table, open_device, open_session, random_feeds
from latency.paired import Reading, pooled
from latency.predict import Predictor
from latency.sampling import BATCH, SLOWED, Builder, draw, table_error
from latency.slicing import first_kept, sliced
from latency.table import Sample

REFERENCE, PASSES, VISITS = 0.3, 2, 3
"""Seconds for each policy that predictions are compared with, in how many passes, and how often."""
REPEATED = 12


def check(name: str, policies: int, limit: float, seed: int) -> dict[str, object]:
    """All figures of one model."""
    torch.manual_seed(seed)
    model = getattr(architectures, name)().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    inputs = (torch.zeros(1, 3, 32, 32),)
    structure = trace(model, inputs)
    device = open_device("local")
    with tempfile.TemporaryDirectory() as folder:
        dense = export(model, inputs, folder)
        slicer = sliced(model, structure, inputs, dense)
        rng = np.random.default_rng(seed + 1)
        kept = first_kept(structure, draw(structure, rng))
        start = time.perf_counter()
        file = slicer(kept)
        slicing_ms = (time.perf_counter() - start) * 1e3
        differs = difference(file, export(slim(model, structure, kept), inputs, folder))

    def files(widths: object) -> bytes:
        return slicer(first_kept(structure, widths))  # type: ignore[arg-type]

    start = time.perf_counter()
    table = build_table(structure, files, dense, device, model=name, seed=seed, limit=limit, progress=say)
    seconds = time.perf_counter() - start
    builder = Builder(structure, files, dense, device, model=name, seed=seed)
    predictor = table.predictor(structure)
    slow = SLOWED * table.dense_ms
    taken = careful(builder, [draw(structure, rng) for _ in range(policies)], slow)
    again = careful(builder, [sample.widths for sample, _ in taken[:REPEATED]], slow)
    pairs = zip(taken[:REPEATED], again, strict=True)
    noise = [np.log(b.ratio / a.ratio) / 2**0.5 for (a, one), (b, other) in pairs if max(one, other) <= slow]
    cost = LatencyCost.of(table, structure)
    wide = [cost.widen(draw(structure, rng)) for _ in range(max(policies // 6, 3))]
    measured = [sample for sample, ms in careful(builder, wide, slow) if ms <= slow]
    off = [abs(cost.ratio(sample.widths) / sample.ratio - 1) for sample in measured]
    return {
        "model": name,
        "groups": len(structure.groups),
        "table_seconds": round(seconds, 1),
        "table_policies": len(table.samples),
        "dense_ms": table.dense_ms,
        "raw": error(predictor, [sample for sample, ms in taken if ms <= slow]),
        "slowed": error(predictor, [sample for sample, ms in taken if ms > slow]),
        "noise": round(float(np.std(noise)), 4),
        "kernel_block": predictor.block,
        "widened_mean_error": round(float(np.mean(off)), 4),
        "slicing_ms": round(slicing_ms, 2),
        "sliced_differs_from_exported": differs,
        "device": table.device.model_dump(),
        "samples": [{"widths": sample.widths, "measured": sample.ratio} for sample in table.samples],
        "policies": [
            {"widths": s.widths, "measured": s.ratio, "predicted": round(float(ratio), 5), "dense_ms": round(ms, 4)}
            for (s, ms), ratio in zip(taken, predictor([sample.widths for sample, _ in taken]), strict=True)
        ],
    }


def careful(builder: Builder, policies: list[list[int]], slow: float) -> list[tuple[Sample, float]]:
    """Each policy measured on several visits, all of which count; and again while the dense model takes over `slow` ms.

    A visit of one policy may meet a neighbour's burst, or memory that lies badly; visits lie minutes apart.
    """
    readings = [pooled(visits) for visits in zip(*(visit(builder, policies) for _ in range(VISITS)), strict=True)]
    for _ in range(4):
        late = [i for i, reading in enumerate(readings) if reading.baseline_ms > slow]
        for i, reading in zip(late, visit(builder, [policies[i] for i in late]), strict=True):
            readings[i] = min(readings[i], reading, key=lambda reading: reading.baseline_ms)
    return [
        (Sample(widths=[int(width) for width in widths], ratio=round(reading.ratio, 5)), reading.baseline_ms)
        for widths, reading in zip(policies, readings, strict=True)
    ]


def visit(builder: Builder, policies: list[list[int]]) -> list[Reading]:
    """One reading of each policy."""
    parts = [policies[at : at + BATCH] for at in range(0, len(policies), BATCH)]
    return [reading for part in parts for reading in builder.readings(part, REFERENCE, PASSES)]


def error(predictor: Predictor, samples: list[Sample]) -> dict[str, float] | None:
    return table_error(predictor, samples).model_dump() if len(samples) > 2 else None


def export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder: str) -> bytes:
    export_onnx(model, inputs, Path(folder, "model.onnx"))
    return Path(folder, "model.onnx").read_bytes()


def difference(one: bytes, other: bytes) -> float:
    """The largest difference of two files' outputs on the same random inputs."""
    sessions = [open_session(one), open_session(other)]
    feeds = random_feeds(sessions[0], 4, 0)
    first, second = (session.run(None, feeds)[0] for session in sessions)
    return float(np.abs(first - second).max())


def say(done: int, total: int, what: str) -> None:
    print(f"\r{done}/{total} {what}", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet56", "mobilenet_v2", "plain20"])
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for a table's random policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for one JSON file a model")
    arguments = parser.parse_args()
    for name in arguments.models:
        found = check(name, arguments.policies, arguments.limit, arguments.seed)
        if arguments.out:
            Path(arguments.out, f"latency-table-{name}.json").write_text(json.dumps(found) + "\n")
        print(
            "\r" + json.dumps({key: value for key, value in found.items() if key not in ("policies", "samples")}),
            flush=True,
        )


if __name__ == "__main__":
    main()
