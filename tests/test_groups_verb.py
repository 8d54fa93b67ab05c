"""`amc groups`: shares and ranges by hand, and the same answer as the search would give."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from amc.budget import Budget, parse_budget
from amc.cost import analytic
from amc.errors import BudgetError
from amc.groups import Frozen
from search.cli import main
from search.overview import Estimate, Overview, cost_ranges, group_rows, limit_checks, overview, prunable
from search.verbs.groups import parts
from tests.synthetic import chain

THREE = chain((3, 8, 4, 10), kernels=(3, 3, 1), positions=(16, 4, 1))
"""MACs: 16·9·3·8 = 3456, 4·9·8·4 = 1152, 4·10 = 40; together 4648. Parameters: 224 + 292 + 50 = 566."""

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 10)
        self.example_inputs = torch.zeros(1, 3, 4, 4)

    def forward(self, x):
        x = self.conv1(self.conv0(x).relu()).relu()
        return self.head(x.mean((2, 3)))
"""


@pytest.fixture
def net(tmp_path):
    """The three-layer net as a file of the user's."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:Net"


def test_the_share_of_a_group_is_what_goes_when_it_alone_is_at_its_floor():
    first, second = group_rows(THREE)
    # Seven of the first eight channels take 7/8 of both layers that they touch; so do three of four.
    assert first.flops_share == (3456 + 1152) * 7 / 8 / 4648
    assert second.flops_share == (1152 + 40) * 3 / 4 / 4648
    assert (first.channels, first.allowed, second.widths) == (8, "1 to 8", (1, 2, 3, 4))


def test_the_range_of_every_cost_and_what_can_be_pruned_at_all():
    flops, params, size = cost_ranges(THREE.groups, analytic(THREE))
    # At the floors: 16·9·3 + 4·9 + 10 MACs, and 27+1 + 9+1 + 10+10 parameters of four bytes each.
    assert (flops.dense, flops.lowest, flops.lowest_fraction) == (4648, 432 + 36 + 10, 0.103)
    assert (params.dense, params.lowest, params.lowest_fraction) == (566, 58, 0.103)
    assert (size.cost, size.unit) == ("size", "B")
    assert size.dense - size.lowest >= 4 * (566 - 58)
    assert prunable(THREE) == (4648 - 478) / 4648


@pytest.mark.parametrize("step", [1, 2, 4])
def test_the_lowest_fraction_is_the_one_that_the_budget_names_and_can_be_asked_for(step):
    structure = chain((3, 12, 24, 24, 10), kernels=(3, 3, 3, 1), positions=(64, 16, 16, 1), step=step)
    costs = analytic(structure)
    for cost in cost_ranges(structure.groups, costs):
        with pytest.raises(BudgetError, match=f"lowest reachable: {cost.cost}={cost.lowest_fraction:.3f} "):
            Budget.of(structure.groups, costs, parse_budget(f"{cost.cost}=0.000001"))
        Budget.of(structure.groups, costs, parse_budget(f"{cost.cost}={cost.lowest_fraction:.3f}"))


def test_every_budget_is_checked_for_itself():
    specs = parse_budget("flops=0.5,size=10B,latency=8ms")
    checks = limit_checks(THREE.groups, analytic(THREE), specs)
    assert [(check.cost, check.limit, check.reachable) for check in checks] == [
        ("flops", 2324, True),
        ("size", 10, False),
        ("latency", None, None),
    ]


def test_the_verb_finds_in_a_real_net_what_was_worked_out_by_hand(net, capsys):
    assert main(["groups", "--model", net, "--json", "--budget", "flops=0.103,params=0.102"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["groups"]
    assert (first["name"], first["kind"], first["widths"]) == ("conv0", "channel", list(range(1, 9)))
    assert first["flops_share"] == (3456 + 1152) * 7 / 8 / 4648
    assert second["members"] == ["conv1:out", "head:in"]
    assert found["prunable"] == (4648 - 478) / 4648
    assert [frozen["name"] for frozen in found["frozen"]] == ["head"]
    assert [(cost["cost"], cost["dense"], cost["lowest"]) for cost in found["costs"]][:2] == [
        ("flops", 4648, 478),
        ("params", 566, 58),
    ]
    assert [check["reachable"] for check in found["budgets"]] == [True, False]
    assert (found["data"], found["estimate"], list(found["inputs"].values())) == (None, None, [[1, 3, 4, 4]])


def test_a_dry_run_says_the_same_and_starts_nothing(net, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", net, "--budget", "flops=0.5", "--exclude", "conv0"]
    assert main(["groups", *options]) == 0
    by_groups = capsys.readouterr().out
    assert main([*options, "--dry-run"]) == 0
    assert capsys.readouterr().out == by_groups
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["net.py"]
    assert main([*options, "--dry-run", "--resume", "--out", "run"]) == 2


def test_the_embedded_default_is_not_trained_for_it_and_the_time_is_estimated(monkeypatch):
    monkeypatch.setattr("search.compose.pretrained", lambda *_, **__: pytest.fail("trained"))
    common = {"score_steps": 1, "score_images": 50, "calibration_images": 50}
    found = overview({**common, "trials": 12, "budget": "flops=0.5"})
    assert found.data == "digits"
    assert found.estimate is not None
    assert found.estimate.trials == 12
    assert found.estimate.seconds == 12 * found.estimate.seconds_per_trial > 0
    assert overview({**common, "budget": "flops=0.001"}).estimate is None
    limited = overview({**common, "time_limit": "0.000001s"}).estimate
    assert limited is not None
    assert limited.trials == 1


def test_widths_keep_to_the_options_and_inputs_to_the_shape_given():
    found = overview({"model": "resnet20", "input_shape": [1, 3, 16, 16], "round_to": 8, "only": ["layer3*"]})
    assert found.inputs == {"x": (1, 3, 16, 16)}
    assert all(any(member.startswith("layer3") for member in group.members) for group in found.groups)
    assert all(width % 8 == 0 for group in found.groups for width in group.widths)
    assert found.frozen


@pytest.mark.parametrize("width", [80, 100])
def test_what_a_person_reads_fits_and_names_everything(width):
    name = "encoder.layer[0].attention.query"
    rows = [replace(row, name=name, members=(name + ":out",) * 9) for row in group_rows(THREE)]
    found = Overview(
        model="net",
        data="digits",
        inputs={"x": (1, 3, 4, 4)},
        groups=tuple(rows),
        frozen=(
            Frozen(name, "its channels are the model's output"),
            Frozen("head", "its channels are the model's output"),
        ),
        prunable=0.5,
        costs=cost_ranges(THREE.groups, analytic(THREE)),
        budgets=limit_checks(THREE.groups, analytic(THREE), parse_budget("flops=0.5,params=0.01,latency=1ms")),
        estimate=Estimate(2.0, 80, 160.0),
    )
    console = Console(width=width, soft_wrap=True)
    text = ""
    for part in parts(found, width=width):
        with console.capture() as captured:
            console.print(part, soft_wrap=isinstance(part, str), markup=False)
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= (100 if isinstance(part, str) else width)
        text += " ".join(captured.get().split()) + " "
    for said in (
        name[:20],
        "1 to 8",
        "and 5 more",
        "frozen: 2",
        "flops=0.5: can be reached",
        "lowest reachable: params=0.103",
        "3 min",
    ):
        assert said in text


def test_options_of_no_use_are_refused_as_everywhere(capsys):
    assert main(["groups", "--model", "resnet21"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["groups", "--model", "resnet20", "--budget", "flops=1.7"]) == 2
    assert "must be in (0, 1]" in capsys.readouterr().err


DATA = """
import torch
from torch.utils.data import TensorDataset

def splits():
    return dict.fromkeys(("train", "val"), TensorDataset(torch.randn(32, 3, 4, 4), torch.arange(32)))

def inputs():
    return dict.fromkeys(("train", "val"), torch.randn(32, 3, 4, 4))
"""


@pytest.mark.parametrize("factory", ["splits", "inputs"])
def test_data_whose_labels_only_a_step_of_ones_own_reads_has_groups_but_no_estimate(
    net, factory, tmp_path, capsys, caplog
):
    """Labels are never read but to time a candidate by our own training step, which takes class numbers."""
    (tmp_path / "data.py").write_text(DATA)
    assert main(["groups", "--model", net, "--data", f"{tmp_path / 'data.py'}:{factory}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["groups"]), found["estimate"]) == (2, None)
    assert "the search time is not estimated" in caplog.text
