"""Runs the program again and again with a fault put into it: a server that has everything loaded, and forks.

The children run the real command line on a tiny model. ONNX export, the measuring of latency and the report are left
out, since they take most of the time, but for children that are asked for the whole program. Limits and moments are in
processor time, so that other work on the machine changes little.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EMPTY_MODEL = b"\x08\x0a"
"""An ONNX file without a graph."""
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "kill": 0}


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    status: of exit, or minus a signal. operations: on files below the folder; site: the last of them. seconds: of the
    processor.
    """

    status: int
    said: str
    operations: int
    site: str
    seconds: float


class Harness:
    """The server, from the parent's side."""

    def __init__(self, work: Path) -> None:
        self.work = work
        shim = work / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(work)}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(shim)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def run(
        self,
        *words: str,
        below: Path,
        fault: str | None = None,
        at: int = -1,
        seconds: float = 300,
        cache: Path | None = None,
    ) -> Ended:
        """One run of the command line, with a fault at the `at`-th operation below a folder, or killed after a time.

        cache: where the whole program is run, with this folder for its cache; else what takes long is left out.
        """
        assert self._server.stdin
        assert self._server.stdout
        request = {"words": words, "below": str(below), "fault": fault, "at": at, "seconds": seconds}
        request["cache"] = cache and str(cache)
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(60)
        assert self._server.stdout
        self._server.stdout.close()


@contextlib.contextmanager
def harness() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory() as work:
        server = Harness(Path(work))
        try:
            yield server
        finally:
            server.close()


def words(folder: Path, strategy: str = "ddpg", trials: int = 8) -> list[str]:
    """A new run, or one that goes on if there is anything to go on with."""
    if (folder / "settings.json").exists():
        return ["search", "--out", str(folder), "--resume", "--quiet"]
    options = {
        "--model": f"{HERE / 'tiny.py'}:net",
        "--data": f"{HERE / 'tiny.py'}:data",
        "--budget": "flops=0.5",
        "--strategy": strategy,
        "--trials": str(trials),
        "--score-steps": "2",
        "--finetune-epochs": "2",
        "--out": str(folder),
    }
    return ["search", "--quiet", *(part for pair in options.items() for part in pair)]


def finished_trials(folder: Path) -> dict[int, tuple[float, str]]:
    """Number -> (value, widths) of the finished trials, by SQLite alone, on the file as it lies there."""
    path = folder / "study.db"
    if not path.exists():
        return {}
    query = (
        "SELECT number, value, value_json FROM trials JOIN trial_values USING (trial_id) "
        "JOIN trial_user_attributes USING (trial_id) WHERE state = 'COMPLETE' AND key = 'widths'"
    )
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if not tables >= {"trials", "trial_values", "trial_user_attributes"}:
            return {}  # the process died while it made them
        return {number: (value, widths) for number, value, widths in database.execute(query)}


def check_whole(folder: Path) -> None:
    """Every file of a run can be read, whenever its process died."""
    import onnx

    from amc.files import read_json
    from amc.policy import load_policy

    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name in ("settings.json", "result.json"):
            assert read_json(path)["schema_version"] == 1
        elif path.name == "policy.json":
            load_policy(path)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            load_file(path)
        elif path.suffix == ".onnx":
            onnx.load(path)


# ---- the server


def serve(shim: str) -> None:
    """Answers requests, a line of JSON each; a request is a forked child."""
    sys.path.insert(0, str(ROOT))
    _load_all()
    shim_functions = ctypes.CDLL(shim)
    shim_functions.amc_site.restype = ctypes.c_char_p
    shim_functions.amc_seen.restype = ctypes.c_long
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as notes:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os._exit(_child(request, shim_functions, notes.fileno()))
            status, seconds = _wait(child, request["seconds"])
            said.seek(0)
            notes.seek(0)
            seen, site = json.loads(notes.read() or b'[0, ""]')
            answer = {"status": status, "operations": seen, "site": site, "seconds": seconds}
            print(json.dumps({**answer, "said": said.read().decode(errors="replace")[-3000:]}), flush=True)


def _load_all() -> None:
    """Loads what is loaded on first use, once for all children."""
    import matplotlib.pyplot  # noqa: F401
    import stable_baselines3  # noqa: F401
    import torch
    import torch._dynamo

    import search.figures
    import search.job
    import search.strategies.ddpg
    import search.verbs.search  # noqa: F401
    from amc.export import export_onnx
    from benchmarks.faults import tiny
    from search.compose import compose
    from search.settings import settings_from
    from search.storage import open_storage

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        open_storage(Path(folder, "study.db")).engine.dispose()
        export_onnx(tiny.net(), (torch.zeros(1, 1, 6, 6),), Path(folder, "model.onnx"))
        compose(
            settings_from({"model": f"{HERE / 'tiny.py'}:net", "data": f"{HERE / 'tiny.py'}:data"}),
            budget_required=False,
        )


def _child(request: dict[str, Any], shim: ctypes.CDLL, notes: int) -> int:
    """Runs the command line that a request asks for, and returns its exit status; what the shim saw goes to `notes`."""
    from search.cli import main

    if request["cache"]:
        os.environ["XDG_CACHE_HOME"] = request["cache"]
    else:
        _leave_out()
    kind = request["fault"]
    below, code = request["below"].encode(), ERRORS[kind] if kind else 0
    shim.amc_fault(below, ctypes.c_long(request["at"]), code, int(kind == "full"))
    try:
        with for_a_moment():
            status = main(request["words"])
    except BaseException as error:
        print(f"uncaught: {error!r}", file=sys.stderr)
        status = 99
    seen, site = shim.amc_seen(), shim.amc_site()
    shim.amc_fault(b"", ctypes.c_long(-1), 0, 0)
    os.write(notes, json.dumps([seen, site.decode()]).encode())
    return status


@contextlib.contextmanager
def for_a_moment() -> Iterator[None]:
    """Takes a moment where a figure would take seconds: nothing is written meanwhile."""
    from unittest.mock import patch

    import latency.device
    from amc import pretrain

    measure, moment = latency.device.measure, {"seconds": 0.01, "passes": 1, "tries": 1}
    quick = replace(pretrain.RECIPES["digits_resnet"], epochs=4)
    with (
        patch.object(latency.device, "measure", lambda models, **options: measure(models, **{**options, **moment})),
        patch.dict(pretrain.RECIPES, digits_resnet=quick),
    ):
        yield


def _leave_out() -> None:
    """Takes what is slow out of the program, and leaves that it writes a file."""
    import search.conclude
    import search.start
    from amc.files import write_atomic

    for module in (search.conclude, search.start):
        module.export_onnx = lambda model, inputs, path: write_atomic(path, EMPTY_MODEL)
    search.conclude.measure_latency = lambda *_: {}
    search.conclude.write_report = lambda path: write_atomic(path / "report.html", "")


def _wait(child: int, seconds: float) -> tuple[int, float]:
    """The child's exit status and processor time; it is killed when it has taken so much."""
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if _processor_time(child) > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = float("inf")
        time.sleep(0.002)


def _processor_time(child: int) -> float:
    """Seconds that a process which was not waited for has taken so far."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    serve(sys.argv[1])
