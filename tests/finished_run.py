"""A finished run of a problem without a network: a real study and policy, and figures as a run would write them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from amc.policy import GroupPolicy, InputInfo, ModelInfo, Policy
from search.settings import settings_from
from search.storage import open_storage
from search.strategies import make_sampler
from search.study import open_study, search
from tests.synthetic import concave

GROUPS, TRIALS = 9, 14


def write_run(path: Path) -> Path:
    """The files of such a run, but for its report; returns the path."""
    path.mkdir(parents=True)
    problem, _ = concave(GROUPS)
    study = open_study(
        open_storage(path / "study.db"), "search", make_sampler("random", problem, trials=TRIALS, seed=0)
    )
    found = search(problem, study, trials=TRIALS, seed=0)
    uniform = problem.named(problem.budget.project(problem.budget.dense))
    chosen = settings_from({"budget": "flops=0.5", "strategy": "random", "trials": TRIALS})
    spent = found.best.costs["flops"]
    figures = {"params": 1234, "size": 45678, "latency_ms": 0.4321, "latency_predicted_ms": None}
    result = {
        "schema_version": 1,
        "settings": chosen.as_json(),
        "budget": [{"cost": "flops", "limit": 500000, "fraction": 0.5, "achieved": spent, "met": True}],
        "dense": {
            "accuracy": 0.99,
            "test_accuracy": 0.975,
            "flops": 1000000,
            "params": 2345,
            "size": 90123,
            "latency_ms": 0.8,
        },
        "best": {
            "source": "search",
            "accuracy": 0.96,
            "test_accuracy": 0.95,
            "flops": spent,
            **figures,
            "speedup": 1.852,
            "speedup_ci95": [1.801, 1.913],
            "widths": dict(found.best.widths),
        },
        "uniform": {
            "source": "uniform",
            "accuracy": 0.94,
            "test_accuracy": 0.93,
            "flops": 499000,
            **figures,
            "widths": uniform,
        },
        "layers": [
            {"name": "layer00", "dense_flops": 600000, "best_flops": 200000, "dense_ms": 0.5, "best_ms": 0.25},
            {
                "name": "layer01",
                "dense_flops": 400000,
                "best_flops": spent - 200000,
                "dense_ms": 0.25,
                "best_ms": 0.125,
            },
            {"name": "[ReorderOutput]", "dense_flops": None, "best_flops": None, "dense_ms": 0.05, "best_ms": 0.05},
        ],
        "proxy": {"spearman": None, "samples": 0},
        "search": {
            "strategy": "random",
            "trials": found.trials,
            "failed": found.failed,
            "seconds": found.seconds,
            "evaluation_seconds": found.evaluation_seconds,
            "seed": 0,
        },
    }
    groups = [
        GroupPolicy(name=g.name, kind="channel", channels=64, width=found.best.widths[g.name], keep_ratio=0.5)
        for g in problem.groups
    ]
    info = ModelInfo(
        name="digits_resnet",
        inputs=[InputInfo(name="x", shape=[1, 1, 8, 8], dtype="float32")],
        structure_sha256="0" * 64,
        weights_sha256="1" * 64,
    )
    Policy(model=info, groups=groups, importance="l1").save(path / "policy.json")
    resolved = {"frozen": [{"name": "fc", "reason": "its outputs are the model's"}], "test_examples": 360}
    document = {"settings": chosen.as_json(), "resolved": resolved, "versions": {"torch": "2.13.0"}, "machine": {}}
    (path / "settings.json").write_text(json.dumps(document))
    (path / "result.json").write_text(json.dumps(result))
    return path


def change(run: Path, name: str, edit) -> None:
    """Rewrites a JSON file of a run."""
    document = json.loads((run / name).read_text())
    edit(document)
    (run / name).write_text(json.dumps(document))


class Page(HTMLParser):
    """The numbers, figures and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.numbers: list[tuple[str | None, str, str, str]] = []  # (trial or run, key, value, text)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._row, self._open = None, None
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self._row = attributes.get("data-trial", attributes.get("data-run"))
            for part in ("layer", "front"):
                if f"data-{part}" in attributes:
                    self._row = f"{part}{attributes[f'data-{part}']}"
        if tag == "data":
            self._open = (self._row, attributes["data-key"], attributes["value"])

    def handle_endtag(self, tag):
        if tag == "tr":
            self._row = None

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.numbers.append((*self._open, data))
            self._open = None

    def figures(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "figure"]


def at(document, key: str):
    """`budget.0.limit` of a JSON document."""
    for part in key.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document
