"""Runs side by side: the table fits, the page has every figure, and no file of a run is written over."""

from __future__ import annotations

import json
import shutil

from search.cli import main
from tests.finished_run import Page, change


def test_runs_are_compared_in_a_table_and_a_page(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other = shutil.copytree(finished, tmp_path / "a run with a long name [bold]&")
    change(other, "result.json", lambda r: r["best"].update(test_accuracy=0.96, flops=700000, latency_ms=0.4))
    page = tmp_path / "compared.html"
    assert main(["compare", str(finished), str(other), "--out", str(page)]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    assert all(figure in table for figure in ("95.00 %", "96.00 %", " 700 k*", " 0.4*", " 0.4321 "))
    numbers = {(row, key): float(value) for row, key, value, _ in Page(page).numbers}
    for run in (finished, other):
        result = json.loads((run / "result.json").read_text())
        for field in ("test_accuracy", "flops", "params", "size", "latency_ms", "speedup"):
            assert numbers[run.name, f"best.{field}"] == result["best"][field]
    assert Page(page).figures() == [
        *("front-flops", "front-params", "front-size", "front-latency"),
        *("best-by-trial", "best-by-minute"),
    ]
    assert main(["compare", str(finished), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["path"] for run in found["runs"]] == [str(finished), str(other)]
    assert found["front"]["flops"] == [str(finished), str(other)]
    assert found["front"]["latency"] == [str(other)]
    assert found["same_dense"] is True


def test_a_comparison_says_when_the_dense_models_differ(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    change(other, "policy.json", lambda p: p["model"].update(weights_sha256="2" * 64))
    assert main(["compare", str(finished), str(other), "--out", str(tmp_path / "page.html")]) == 0
    assert "did not start from the same dense model" in capsys.readouterr().out
    assert "did not start from the same dense model" in Page(tmp_path / "page.html").text


def test_a_comparison_writes_over_no_file_of_a_run(finished, capsys):
    assert main(["compare", str(finished), "--out", str(finished / "policy.json")]) == 2
    assert "must end in .html" in capsys.readouterr().err
