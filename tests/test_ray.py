"""Scoring on a real local Ray of several nodes, one of which is killed; skipped where Ray isn't installed.

Starting a Ray takes a minute, so what needs one is left to `-m slow`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from amc.errors import UsageError
from search.compose import compose
from search.executor import Here
from search.job import run
from search.ray_engine import ray_pool, resources
from search.settings import Settings
from search.strategies import make_sampler
from search.study import open_study, search

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"
SETTINGS = Settings(
    model=f"{TINY}:net", data=f"{TINY}:data", budget=("flops=0.5",), score_steps=1, threads=1, engine="ray", workers=3
)
TRIALS = 8


@pytest.fixture(scope="module")
def setup():
    return compose(SETTINGS)


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own, 15, is for ever on a machine that is busy
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def searched(setup, executor, on_trial=lambda _: None):
    study = open_study(None, "x", make_sampler("random", setup.problem, trials=TRIALS, seed=0))
    result = search(setup.problem, study, trials=TRIALS, executor=executor, on_trial=on_trial)
    return result, [(t.params, t.value, t.state) for t in study.trials]


@pytest.mark.slow
def test_a_node_that_dies_has_its_trials_asked_again(setup, cluster, tmp_path):
    _, here = searched(setup, Here(setup.problem))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    settings = replace(SETTINGS, address=cluster.address)
    fresh = compose(SETTINGS)
    pool = ray_pool(replace(fresh, settings=settings), tmp_path / "needless")

    def kill_a_node(progress):
        if progress.trials == 4:
            cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        result, there = searched(fresh, pool, kill_a_node)
    finally:
        pool.close()
    assert len(cluster.list_all_nodes()) == 2
    assert (result.trials, result.failed) == (TRIALS, 0)
    assert there == here


@pytest.mark.slow
def test_an_actor_that_dies_has_its_policy_asked_of_another(setup, tmp_path):
    fresh = compose(SETTINGS)
    pool = ray_pool(replace(fresh, settings=replace(SETTINGS, workers=1)), tmp_path / "needless")
    try:
        widths = fresh.problem.named(fresh.problem.admit([g.channels // 2 for g in fresh.problem.groups]))
        worker = pool._all[0]
        worker.start()
        scored = setup.problem.evaluate(widths).accuracy
        ray.kill(worker._actor)  # as a node does that is shut down; it says nothing of it to the pool
        assert pool.submit(widths).result().accuracy == scored
        assert pool.submit(widths, 2).result().worth == setup.evaluator.recovered(widths, 2)
        with pytest.raises(ArithmeticError, match="KeyError"):
            pool.submit({"nothing": 1}).result()
        worker._crew.timeout = 1e-6
        with pytest.raises(ArithmeticError, match="longer than --trial-timeout"):
            pool.submit(widths).result()
    finally:
        pool.close()
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_whole_run_on_ray_finds_what_one_process_finds(tmp_path):
    named = {"model": SETTINGS.model, "data": SETTINGS.data, "budget": "flops=0.5", "score_steps": 1, "threads": 1}
    named |= {"strategy": "random", "trials": 4, "finetune_epochs": 0}
    run(**named, out=tmp_path / "here")
    run(**named, out=tmp_path / "there", engine="ray", workers=2)
    assert (tmp_path / "here" / "policy.json").read_bytes() == (tmp_path / "there" / "policy.json").read_bytes()


def nodes(*resources):
    return [{"Alive": True, "Resources": each} for each in resources]


def test_what_a_worker_asks_of_the_cluster():
    big = {"CPU": 8.0, "GPU": 1.0}
    assert resources(replace(SETTINGS, threads=2), nodes({"CPU": 6.0})) == {"num_cpus": 2, "num_gpus": 0.0}
    assert resources(SETTINGS, nodes(big, big)) == {"num_cpus": 1, "num_gpus": 0.5}  # two on one, one on the other
    assert resources(replace(SETTINGS, workers=2), nodes(big, big))["num_gpus"] == 1.0
    assert resources(replace(SETTINGS, accelerator="cpu"), nodes(big))["num_gpus"] == 0.0
    with pytest.raises(UsageError, match="room for 2; give fewer"):
        resources(replace(SETTINGS, threads=2), nodes({"CPU": 3.0}, {"CPU": 3.0}))
    with pytest.raises(UsageError, match="no GPU"):
        resources(replace(SETTINGS, accelerator="cuda"), nodes({"CPU": 8.0}))


def test_a_cluster_that_is_not_there_is_a_user_error(setup, tmp_path):
    with pytest.raises(UsageError, match="--address"):
        ray_pool(replace(setup, settings=replace(SETTINGS, address="127.0.0.1:1")), tmp_path / "x")
    assert not ray.is_initialized()
