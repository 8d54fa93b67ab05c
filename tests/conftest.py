"""Tests leave nothing in the user's cache, train the embedded default once, and measure latency for a moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for a core spin

import pytest
from hypothesis import HealthCheck, settings

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How busy the machine is decides nothing."""
settings.register_profile("patient", patient)
settings.register_profile("full", patient, max_examples=1000)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """One for all processes of a test run: whoever comes second waits for what the first one trains."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _momentary():
    """A run's latency on this machine is measured for a moment; tests of measuring call `latency.measure` itself."""
    import latency.device
    from latency.paired import measure

    moment = {"seconds": 0.01, "passes": 1, "tries": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency.device, "measure", lambda models, **options: measure(models, **{**options, **moment}))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run with its report, to look at and not to change."""
    from search.report import write_report
    from tests.finished_run import write_run

    path = write_run(tmp_path_factory.mktemp("runs") / "one")
    write_report(path)
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def server():
    """Starts runs whose writes can be made to fail, or be counted."""
    if not shutil.which("cc"):
        pytest.skip("faults are injected by a small C library, and there is no C compiler (cc)")
    from benchmarks.faults.harness import harness

    with harness() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_run(server, tmp_path_factory) -> Path:
    """A finished run of a tiny network, to look at and not to change."""
    from benchmarks.faults.harness import words

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert server.run(*words(folder, "random", 3), below=folder).status == 0
    return folder


@pytest.fixture
def tiny_copy(tiny_run, tmp_path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(tiny_run, tmp_path / "run")
