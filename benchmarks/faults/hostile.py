"""Mutated files of every kind that is read: refused or read, but never a traceback, never code, never slow or large.

    python benchmarks/faults/hostile.py                   # 2,000 mutations: exit 0 or 2, under 1 s and 300 MB each

Each mutation is read in a forked child that has everything loaded, by the function that the program reads it with. The
memory is what the child takes beyond its parent's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from amc.application import apply
from amc.errors import AmcError
from amc.policy import load_policy
from amc.weights import load_weights, save_weights
from benchmarks.faults.harness import for_a_moment
from benchmarks.faults.tiny import data, net
from latency.session import open_session
from latency.table import LatencyTable
from search.finished import RunResult, SettingsFile, read_document, read_trials
from search.settings import settings_from
from search.storage import open_storage

SECONDS, MEMORY = 1.0, 300 * 2**20
PART = 400
"""Mutations that make a line of the output, with a seed of their own."""
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    "",
    "\x00",
    "../../etc/passwd",
    [],
    {},
    [[]],
    "x" * 10_000,
]


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def readers() -> dict[str, Callable[[Path], object]]:
    """File name -> how the program reads it."""

    def policy(path: Path) -> None:
        model = net()
        model.example_inputs = torch.zeros(1, 1, 6, 6)
        apply(model, load_policy(path), force=True)

    def study(path: Path) -> None:
        read_trials(path)
        open_storage(path).engine.dispose()

    return {
        "policy.json": policy,
        "settings.json": lambda path: settings_from(read_document(path, SettingsFile).settings),
        "result.json": lambda path: read_document(path, RunResult),
        "table.json": LatencyTable.load,
        "weights.safetensors": lambda path: load_weights(net(), path),
        "weights.pt": lambda path: load_weights(net(), path),
        "study.db": study,
        "model.onnx": lambda path: open_session(path),
    }


def mutated(content: bytes, name: str, rng: random.Random) -> bytes:
    """The file with something wrong: bytes changed, cut, repeated, or (of JSON) a value replaced by a strange one."""
    if name.endswith(".json") and rng.random() < 0.6:
        document = json.loads(content)
        holders = [node for node in _nodes(document) if node]
        for _ in range(rng.randint(1, 3)):
            holder = rng.choice(holders)
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            if isinstance(holder, dict) and rng.random() < 0.3:
                holder[rng.choice(["__class__", "extra", str(key) + "x"])] = holder.pop(key)
            else:
                holder[key] = copy.deepcopy(rng.choice(STRANGE))
            holders = [node for node in _nodes(document) if node]
            if not holders:
                break
        return json.dumps(document).encode()
    data = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 500))
    else:
        at, length = rng.randrange(len(data)), rng.randint(1, 2000)
        data[at : at + length] = bytes(length)
    return bytes(data)


def _nodes(value: Any) -> list[Any]:
    found = [value] if isinstance(value, dict | list) else []
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += _nodes(child)
    return found


def campaign(
    originals: Path, work: Path, *, count: int, seed: int = 0, most_seconds: float = SECONDS
) -> dict[str, Any]:
    """Reads so many mutations, evenly over the kinds of files."""
    rng, boom = random.Random(seed), work / "boom"
    kinds = {name: read for name, read in readers().items() if (originals / name).exists()}
    outcomes: Counter[str] = Counter()
    slowest = largest = 0.0
    for i in range(count):
        name = list(kinds)[i % len(kinds)]
        path = work / name
        path.write_bytes(mutated((originals / name).read_bytes(), name, rng))
        if name == "weights.pt" and i % 3 == 0:
            torch.save({"state_dict": Bomb(boom)}, path) if i % 2 else path.write_bytes(pickle.dumps(Bomb(boom)))
        status, seconds, size = _child(kinds[name], path)
        kept = f"mutation {i} of {name} (seed {seed})"
        if status not in (0, 2) or seconds > most_seconds or size > MEMORY:
            shutil.copy(path, Path(tempfile.gettempdir()) / f"hostile-{i}-{name}")
        assert status in (0, 2), f"{kept}: status {status}"
        assert seconds <= most_seconds, f"{kept}: {seconds:.2f} s"
        assert size <= MEMORY, f"{kept}: {size / 2**20:.0f} MB"
        assert not boom.exists(), f"{kept} ran code"
        outcomes["refused" if status else "read"] += 1
        slowest, largest = max(slowest, seconds), max(largest, size)
        for extra in work.glob(f"{name}-*"):
            extra.unlink()
    return {**outcomes, "kinds": len(kinds), "slowest_s": round(slowest, 2), "largest_mb": round(largest / 2**20)}


def _child(read: Callable[[Path], object], path: Path) -> tuple[int, float, float]:
    """How the reader ends on a file (0 read, 2 refused, 1 a traceback), CPU seconds, and bytes beyond the parent's."""
    notes, answer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # of the processor: a machine may be busy with other work
        before = resource.getrusage(resource.RUSAGE_SELF)
        status = 0
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                read(path)
        except AmcError as error:
            status = error.exit_status
        except BaseException as error:
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        os.write(answer, json.dumps([seconds, (after.ru_maxrss - before.ru_maxrss) * 1024]).encode())
        os._exit(status)
    os.close(answer)
    _, ended = os.waitpid(child, 0)
    text = os.read(notes, 1000)
    os.close(notes)
    return os.waitstatus_to_exitcode(ended), *(json.loads(text) if text else (0.0, 0.0))


def make_originals(folder: Path) -> None:
    """A whole file of each kind, from a run of the tiny model."""
    from search.job import run

    torch.set_num_threads(1)
    with for_a_moment():
        run(
            model=net(),
            data=data(),
            budget="flops=0.5",
            strategy="random",
            trials=3,
            score_steps=1,
            finetune_epochs=1,
            out=folder / "run",
        )
    for name in ("policy.json", "settings.json", "result.json", "study.db", "model.onnx"):
        shutil.copy(folder / "run" / name, folder / name)
    save_weights(net(), folder / "weights.safetensors")
    torch.save(net().state_dict(), folder / "weights.pt")
    _table().save(folder / "table.json")


def _table() -> LatencyTable:
    device = {"cpu": "a", "cores": 2, "machine": "b", "system": "c", "onnxruntime": "1", "available": ["cpu"]}
    groups = [{"name": f"g{i}", "channels": 8} for i in range(3)]
    samples = [{"widths": [8, 8, i + 1], "ratio": 0.5 + i / 16} for i in range(8)]
    return LatencyTable.model_validate(
        {
            "model": "m",
            "structure": "s",
            "groups": groups,
            "device": device,
            "conditions": {},
            "dense_ms": 1.0,
            "samples": samples,
            "held_out": samples[:3],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals, work = Path(folder, "originals"), Path(folder, "work")
        originals.mkdir()
        work.mkdir()
        make_originals(originals)
        for i in range(math.ceil(arguments.count / PART)):
            count = min(PART, arguments.count - i * PART)
            print(json.dumps(campaign(originals, work, count=count, seed=arguments.seed + i)), flush=True)


if __name__ == "__main__":
    main()
