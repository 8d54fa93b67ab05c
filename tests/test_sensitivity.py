"""Sensitivity: the figures are the evaluator's own, and the file holds what was found or is refused."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch import nn

from amc.budget import Budget
from amc.errors import SearchFailed, UsageError
from amc.problem import Problem
from search.cli import main
from search.compose import build
from search.sensitivity import Sensitivity, as_csv, draw, load_sensitivity, sensitivity, write
from tests.synthetic import concave, group

GROUPS = (group("a", 8), group("b", 4))


def planted(evaluate=lambda widths: widths["a"] / 8) -> Problem:
    """Only the first group counts, by its keep ratio."""
    return Problem(GROUPS, Budget(GROUPS, ()), evaluate)


@pytest.fixture
def found() -> Sensitivity:
    return sensitivity(planted(), ratios=(0.9, 0.5, 0.05), source={"model": "planted", "steps": 0})


def test_each_group_is_scored_alone_at_the_nearest_allowed_widths(found):
    first, second = found.groups
    assert (found.dense, found.ratios) == (1.0, (0.05, 0.5, 0.9))
    assert (first.name, first.widths, first.accuracy) == ("a", (1, 4, 7), (1 / 8, 4 / 8, 7 / 8))
    assert (second.name, second.widths, second.accuracy) == ("b", (1, 2, 4), (1.0, 1.0, 1.0))


def test_the_budget_plays_no_part_and_nothing_is_scored_twice():
    problem, _ = concave(4, limit=0.1)
    calls = []
    counted = Problem(problem.groups, problem.budget, lambda w: calls.append(1) or problem.evaluate(w).accuracy)
    result = sensitivity(counted, ratios=(0.5, 0.501, 1.0))  # of 64 channels the first two are 32
    assert len(calls) == 1 + 4
    assert result.dense == pytest.approx(1.0)
    assert all(entry.widths == (32, 32, 64) and entry.accuracy[-1] == result.dense for entry in result.groups)
    # The accuracy is a sum over the groups, so the drops of single groups add up to that of all of them.
    halved = problem.evaluate([32] * 4).accuracy
    assert sum(result.dense - entry.accuracy[0] for entry in result.groups) == pytest.approx(1 - halved)


def test_progress_counts_to_the_end():
    seen = []
    sensitivity(planted(), ratios=(0.25, 0.5), progress=lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(i, 5) for i in range(1, 6)]
    assert [note for *_, note in seen] == ["", "a", "a", "b", "b"]


def test_what_cant_be_scored_is_none_and_the_rest_goes_on(tmp_path):
    result = sensitivity(planted(lambda w: float("nan") if w["b"] == 1 else 0.5), ratios=(0.25, 0.5))
    assert result.groups[1].accuracy == (None, 0.5)
    write(result, tmp_path)
    assert load_sensitivity(tmp_path / "sensitivity.json") == result
    assert as_csv(result).splitlines()[3] == "b,4,1,0.25,,"
    with pytest.raises(SearchFailed, match="dense model can't be scored"):
        sensitivity(planted(lambda _: float("nan")))


def test_a_metric_that_fails_on_a_model_leaves_that_model_out():
    def worth(widths):
        if widths["b"] == 1:
            raise ValueError("only one class present")
        return 0.5

    assert sensitivity(planted(worth), ratios=(0.25, 0.5)).groups[1].accuracy == (None, 0.5)


@pytest.mark.parametrize("ratios", [(), (0.0, 0.5), (0.5, 1.5), (-1.0,), (float("nan"),)])
def test_ratios_out_of_range_are_refused(ratios):
    with pytest.raises(UsageError, match=r"must be in \(0, 1\]"):
        sensitivity(planted(), ratios=ratios)


def test_the_table_in_csv_has_a_row_for_each_width(found):
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert [(row["group"], row["width"]) for row in rows] == [
        (g, w) for g in "ab" for w in ("147" if g == "a" else "124")
    ]
    assert rows[1] == {
        "group": "a", "channels": "8", "width": "4", "keep_ratio": "0.5", "accuracy": "0.5", "drop": "0.5",
    }  # fmt: skip


def test_the_figure_shows_every_group_and_equal_results_give_equal_files(found, tmp_path):
    names = write(found, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    write(found, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    texts = [
        "".join(node.itertext()) for node in ET.parse(tmp_path / "sensitivity.svg").iter() if node.tag.endswith("}text")
    ]
    for said in ("a", "b", "0.125", "1.000", "accuracy, dense 1.000"):
        assert said in texts
    assert before["sensitivity.png"].startswith(b"\x89PNG")
    assert np.array_equal(draw(found).axes[0].images[0].get_array(), [[1 / 8, 4 / 8, 7 / 8], [1, 1, 1]])


def test_a_saved_analysis_is_read_as_it_was(found, tmp_path):
    found.save(tmp_path / "x.json")
    assert load_sensitivity(tmp_path / "x.json") == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format="amc/policy"), "not a sensitivity file"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(version=True), "version True"),
        (lambda c: c.update(more=1), "`more`"),
        (lambda c: c.pop("dense"), "`dense`"),
        (lambda c: c.update(dense="1.0"), "`dense`"),
        (lambda c: c.update(ratios=[0.5, 0.05, 0.9]), "ascending"),
        (lambda c: c["groups"][0].update(name="b"), "'b' appears twice"),
        (lambda c: c["groups"][0]["accuracy"].pop(), "for each ratio"),
        (lambda c: c["groups"][0].update(widths=[1, 4, 9]), "at most 8"),
        (lambda c: c["groups"][0].update(widths=[1, 4.0, 7]), "groups.0.widths.1"),
        (lambda c: c["groups"][0].update(kept=[]), "groups.0.kept"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(found, tmp_path, change, says):
    content = found.model_dump(mode="json")
    change(content)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as refusal:
        load_sensitivity(path)
    assert says in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": "amc/sensitivity", "format": 1}', "[]", '{"dense": NaN}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        load_sensitivity(path)
    with pytest.raises(UsageError, match="can't be read"):
        load_sensitivity(tmp_path / "missing.json")


class Planted(nn.Module):
    """Two convolutions, one after the other; what the second one makes counts for nothing."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.used, self.idle = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(16, 10)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        nn.init.zeros_(self.head.weight[:, 8:])

    def forward(self, x):
        return self.head(torch.cat([self.used(x).amax((2, 3)), self.idle(x).amax((2, 3))], 1))


def test_in_a_real_net_a_group_that_counts_for_nothing_has_a_flat_curve():
    problem = build(model=Planted(), budget="flops=0.5", score_steps=0, score_images=200)
    result = sensitivity(problem, ratios=(0.125, 0.5))
    assert [entry.name for entry in result.groups] == ["used", "idle"]
    assert result.groups[1].accuracy == (result.dense, result.dense)
    assert result.groups[0].accuracy[0] != result.dense
    assert (
        sensitivity(build(model=Planted(), budget="flops=0.5", score_steps=0, score_images=200), ratios=(0.125, 0.5))
        == result
    )


FACTORY = """
import torch
from torch import nn

def net():
    convolution = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(144, 10))
"""


def test_the_verb_writes_everything_and_twice_the_same(tmp_path, capsys):
    (tmp_path / "net.py").write_text(FACTORY)
    words = ["sensitivity", "--model", f"{tmp_path / 'net.py'}:net", "--ratios", "0.5", "0.25", "--steps", "2"]
    words += ["--score-images", "50", "--calibration-images", "50", "--json"]
    written = []
    for name in ("one", "two"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer.pop("path") == str(tmp_path / name)
        stored = load_sensitivity(tmp_path / name / "sensitivity.json")
        assert answer == stored.model_dump(mode="json")
        assert (stored.ratios, stored.groups[0].widths, stored.source["steps"]) == ((0.25, 0.5), (1, 2), 2)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert sorted(written[0]) == [f"sensitivity.{kind}" for kind in ("csv", "json", "png", "svg")]
    assert written[0] == written[1]


def test_the_verb_prints_a_table_of_groups_and_keep_ratios(tmp_path, capsys):
    (tmp_path / "net.py").write_text(FACTORY)
    words = ["--model", f"{tmp_path / 'net.py'}:net", "--score-images", "50", "--calibration-images", "50"]
    assert main(["sensitivity", *words, "--ratios", "0.25", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    accuracy = load_sensitivity(tmp_path / "out" / "sensitivity.json").groups[0].accuracy[0]
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["0"])
    assert row == ["0", "4", f"{accuracy:.4f}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ratios", "1.5"], "--ratios '1.5'"),
        (["--ratios", "0"], "--ratios '0'"),
        (["--ratios", "half"], "--ratios 'half'"),
        (["--steps", "-1"], "--steps '-1'"),
        (["--importance", "l3"], "--importance 'l3'"),
        (["--out", "."], "exists and is not empty"),
        (["--budget", "flops=0.5"], "no option --budget"),
    ],
)
def test_wrong_options_are_answered_at_once(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert main(["sensitivity", *words]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
