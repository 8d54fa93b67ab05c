"""From Python: a training step of one's own, data without labels or without a train split, and what objects say."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import amc
import search
from amc.errors import AmcError, DataError, ModelError, PolicyError, UsageError
from search.cli import main

QUICK = {
    "trials": 3,
    "strategy": "random",
    "score_steps": 2,
    "finetune_epochs": 1,
    "finetune_batch": 16,
    "score_images": 0,
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 3, 1),
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Own:
    """An autoencoder's step and worth: no labels anywhere. It remembers how many steps were asked of it."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.asked = images, []

    def finetune(self, model: nn.Module, steps: int) -> None:
        self.asked.append(steps)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(self.images) - self.images).square().mean().backward()
            optimizer.step()

    def likeness(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return -(model(self.images) - self.images).square().mean().item()


def test_a_step_of_ones_own_recovers_candidates_and_the_result_without_labels(images):
    own = Own(images)
    result = search.run(
        model=net(), data={"train": TensorDataset(images), "val": images}, metric=own.likeness, finetune=own.finetune,
        budget="flops=0.5", out="run", **QUICK,
    )  # fmt: skip
    searched, final = own.asked[: -1 - (result.summary["best"]["widths"] != result.summary["uniform"]["widths"])], 4
    assert set(searched) == {2}, "each score asks for its own few steps"
    assert own.asked[-1] == final, "an epoch of 64 examples in batches of 16"
    assert len(searched) >= 3
    assert result.summary["search"]["metric"] == "likeness"
    assert result.summary["best"]["test_accuracy"] is None
    assert result.summary["best"]["accuracy"] == pytest.approx(own.likeness(result.model), abs=1e-5)
    assert not any(
        parameter.grad is not None and parameter.grad.isnan().any() for parameter in result.model.parameters()
    )
    assert "likeness, search split" in (result.path / "report.html").read_text()
    assert "likeness -" in repr(result)


@pytest.mark.parametrize(
    ("keep", "given", "says"),
    [
        (("train", "val"), {}, "the `val` split has no labels, so there is no accuracy; give .* or metric="),
        (("train", "val"), {"metric": float}, "no labels to fine-tune on; give finetune="),
        (("val",), {"metric": float, "finetune": print}, "finetune=… needs a `train` split"),
    ],
)
def test_what_needs_labels_or_a_train_split_is_refused_with_the_way_out(images, keep, given, says):
    data = dict.fromkeys(keep, images)
    with pytest.raises(DataError, match=says):
        search.build(model=net(), data=data, budget="flops=0.5", **given)


CLASSES = torch.arange(64) % 2


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("labels", [CLASSES.int(), CLASSES.bool(), CLASSES.to(torch.uint8), CLASSES.long()])
def test_class_numbers_of_any_integer_type_are_trained_on(labels):
    data = dict.fromkeys(("train", "val"), TensorDataset(torch.randn(64, 4), labels))
    problem = search.build(model=classifier(), data=data, budget="flops=0.5", score_steps=2)
    assert 0 <= problem.evaluate(problem.admit([4])).accuracy <= 1


@pytest.mark.parametrize(
    ("labels", "split"),
    [
        (CLASSES.float(), "train"),
        (2 * CLASSES - 1, "train"),
        (torch.randn(64), "val"),
        (torch.randn(64, 2), "train"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels, split):
    """Accuracy compares what cross-entropy would not take: whole numbers as floats, and -1 for what has no class."""
    data = dict.fromkeys(("train", "val"), TensorDataset(torch.randn(64, 4), labels))
    with pytest.raises(DataError, match=rf"the `{split}` split's labels are torch.* must be class numbers from 0 on"):
        search.build(model=classifier(), data=data, budget="flops=0.5")
    with pytest.raises(DataError, match=r"the `train` split's labels .* give finetune=… of your own"):
        search.build(model=classifier(), data=data, budget="flops=0.5", metric=lambda model: 0.5)
    own = {"metric": lambda model: 0.5, "finetune": lambda model, steps: None}
    assert search.build(model=classifier(), data=data, budget="flops=0.5", **own).groups


def test_shares_of_classes_are_trained_on():
    shares = torch.nn.functional.one_hot(CLASSES).float() * 0.9 + 0.05
    data = {"train": TensorDataset(torch.randn(64, 4), shares), "val": TensorDataset(torch.randn(64, 4), CLASSES)}
    problem = search.build(model=classifier(), data=data, budget="flops=0.5", score_steps=2)
    assert 0 <= problem.evaluate(problem.admit([4])).accuracy <= 1


@pytest.mark.parametrize("trains", [{"finetune": lambda model, steps: None}, {"score_steps": 0, "finetune_epochs": 0}])
def test_labels_that_only_a_metric_and_a_step_of_ones_own_read_need_not_fit_the_outputs(trains):
    """Ages to regress, or two classes that one logit tells apart."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    data = dict.fromkeys(("train", "val"), TensorDataset(torch.randn(64, 4), torch.arange(64)))
    assert search.build(model=model, data=data, budget="flops=0.5", metric=lambda model: 0.5, **trains).groups
    with pytest.raises(ModelError, match=r"has 1 outputs, but .* has 64 classes.*give metric=… and finetune="):
        search.build(model=model, data=data, budget="flops=0.5", finetune=lambda model, steps: None)


AGES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

def ages():
    return dict.fromkeys(("train", "val"), TensorDataset(torch.randn(64, 4), torch.arange(64)))

def classes_to_score():
    return {"train": torch.randn(64, 4), "val": TensorDataset(torch.randn(8, 4), torch.zeros(8).long())}
"""


def test_verbs_that_read_no_labels_take_any_as_a_search_with_a_metric_and_a_step_does(monkeypatch, capsys):
    Path("own.py").write_text(AGES)
    own = {"metric": lambda model: 0.5, "finetune": lambda model, steps: None}
    search.run(model="own.py:net", data="own.py:ages", budget="flops=0.5", out="run", **own, **QUICK)
    words = ["--model", "own.py:net", "--data", "own.py:ages", "--quiet"]
    assert main(["apply", "run/policy.json", "--out", "slim", *words]) == 0
    monkeypatch.setattr("search.bench.measure_table", lambda *_, **__: pytest.fail("it got so far"))
    with pytest.raises(pytest.fail.Exception, match="so far"):
        main(["latency", "--table", "table.json", *words])
    capsys.readouterr()
    scored = ["--model", "own.py:net", "--data", "own.py:classes_to_score", "--ratios", "0.5", "--quiet"]
    assert main(["sensitivity", *scored, "--out", "sensitivity"]) == 0
    assert main(["sensitivity", *scored, "--out", "tuned", "--steps", "1"]) == 2
    assert "no labels to fine-tune on" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [CLASSES[:, None], torch.ones(64, 2).long(), [{"boxes": torch.ones(2)}] * 64])
def test_labels_that_cross_entropy_can_not_take_are_refused_before_anything_is_kept(labels):
    pairs = list(zip(torch.randn(64, 4), labels, strict=True))
    given = {"data": {"train": pairs, "val": pairs}, "metric": lambda model: 0.5, "budget": "flops=0.5"}
    with pytest.raises(
        DataError, match=r"labels of .* don't fit predictions of shape \(\d+,\); .*finetune=… in Python"
    ):
        search.run(model=classifier(), out="run", **given, **QUICK)
    assert not Path("run").exists()


def test_classes_on_the_last_axis_are_said_to_belong_on_the_second():
    """As language models have them: a word in each place."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 20))
    words = torch.randint(0, 20, (64, 5))
    given = {"data": dict.fromkeys(("train", "val"), TensorDataset(words, words)), "budget": "params=0.9"}
    with pytest.raises(DataError, match=r"output is \(64, 5, 20\), its classes the axis after the batch"):
        search.run(model=model, out="run", **given, **QUICK)
    assert not Path("run").exists()


def test_a_metric_is_of_a_model_in_use_whatever_mode_the_step_of_ones_own_leaves_it_in():
    data, modes = dict.fromkeys(("train", "val"), TensorDataset(torch.randn(64, 4))), []

    def worth(model):
        modes.append(model.training)
        return 0.5

    step = {"metric": worth, "finetune": lambda model, steps: model.train()}
    problem = search.build(model=classifier(), data=data, budget="flops=0.5", **step)
    problem.evaluate(problem.admit([4]))
    assert modes == [False]


@pytest.mark.parametrize("data", [TensorDataset(torch.ones(9, 4)), [1, 2]])
def test_data_that_are_no_mapping_of_splits_are_refused(data):
    with pytest.raises(DataError, match=rf"gave {type(data).__name__}; it must be {{.train"):
        search.build(model=classifier(), data=data, budget="flops=0.5")


@pytest.mark.parametrize("given", [{"metric": "acc"}, {"finetune": 3}])
def test_what_is_no_function_is_refused_and_leaves_nothing(images, given):
    with pytest.raises(UsageError, match="can't be called; give a function"):
        search.run(model=net(), data={"train": images, "val": images}, budget="flops=0.5", out="run", **given)
    assert not Path("run").exists()


def test_a_metric_that_raises_on_the_dense_model_leaves_nothing(images):
    given = {"metric": lambda model: 1 / 0, "finetune": lambda model, steps: None}
    with pytest.raises(ZeroDivisionError):
        search.run(model=net(), data={"train": images, "val": images}, budget="flops=0.5", out="run", **given)
    assert not Path("run").exists()


def test_a_name_is_no_model_and_a_path_no_policy():
    with pytest.raises(ModelError, match=r"give the dense model, an nn\.Module"):
        amc.apply("resnet20", Path("policy.json"))
    with pytest.raises(PolicyError, match=r"give what amc.load_policy\(path\) returns"):
        amc.apply(net(), Path("policy.json"))


def test_labels_are_judged_as_the_data_set_gives_them():
    class Shifted(TensorDataset):
        targets = [-1, 1] * 32

        def __getitem__(self, index):
            return self.tensors[0][index], (self.targets[index] + 1) // 2

    data = dict.fromkeys(("train", "val"), Shifted(torch.randn(64, 4)))
    assert search.build(model=classifier(), data=data, budget="flops=0.5").groups


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.array])
def test_a_metric_may_give_a_number_of_torchs_or_numpys(images, kind):
    own = Own(images)
    result = search.run(
        model=net(), data={"train": TensorDataset(images), "val": images}, finetune=own.finetune,
        metric=lambda model: kind(own.likeness(model)), budget="flops=0.5", out="run", **QUICK,
    )  # fmt: skip
    assert result.summary["best"]["accuracy"] == pytest.approx(own.likeness(result.model), abs=1e-5)


def test_a_metric_that_gives_no_number_is_the_users_to_mend(images):
    data = {"train": images, "val": images}
    with pytest.raises(UsageError, match="the metric gave NoneType None; it must be a number"):
        search.run(
            model=net(), data=data, metric=lambda model: None, finetune=print, budget="flops=0.5", out="run", **QUICK
        )
    assert not Path("run").exists()


class Counting(nn.Conv2d):
    """State that is no tensor, an activation that is kept, and a forward that takes any number of inputs."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(*inputs)
        return self.last

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 3}


def unusual() -> nn.Module:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[3])
    conv = Counting(3, 8, 3, padding=1)
    conv.load_state_dict(model[0].state_dict(), strict=False)
    model[0] = conv
    return nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_model_that_has_run_and_holds_what_is_no_weight_is_searched_and_loaded(images):
    data = TensorDataset(images, torch.arange(64) % 3)
    model = unusual()
    model(images).sum().backward()
    result = search.run(model=model, data={"train": data, "val": data}, budget="flops=0.5", out="run", **QUICK)
    loaded = amc.load("run", model=unusual())
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(images), result.model(images))


@pytest.mark.parametrize(
    ("model", "labels", "says"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.arange(64) % 3, "can be pruned"),
        (classifier, ["cat", "dog"] * 32, "labels are text, as in 'cat'"),
        (lambda: with_example(torch.zeros(1, 5, 8, 8)), torch.arange(64) % 3, "does not run on --data"),
        (lambda: with_example(torch.zeros(1, 3, 8, 8)), torch.full((64,), -100), "no label to score by: all are -100"),
    ],
)
def test_what_can_not_be_searched_is_said_before_anything_is_kept(images, model, labels, says):
    pairs = [(image, label) for image, label in zip(images, labels, strict=True)]
    model = model if isinstance(model, nn.Module) else model()
    with pytest.raises(AmcError, match=says):
        search.run(model=model, data={"train": pairs, "val": pairs}, budget="flops=0.5", out="run", **QUICK)
    assert not Path("run").exists()


def test_an_image_of_nan_is_said_before_anything_is_kept(images):
    pairs = [(image * (math.nan if i == 5 else 1), i % 3) for i, image in enumerate(images)]
    with pytest.raises(DataError, match=r"gives NaN on the first training examples; do they, .* hold NaN"):
        search.run(
            model=with_example(images[:1]), data={"train": pairs, "val": pairs}, budget="flops=0.5", out="run", **QUICK
        )
    assert not Path("run").exists()


def test_a_test_split_without_labels_is_named_where_its_accuracy_is_asked_for(images):
    pairs = [(image, i % 3) for i, image in enumerate(images)]
    given = {
        "model": with_example(images[:1]),
        "data": {"train": pairs, "val": pairs, "test": images},
        "budget": "flops=0.5",
    }
    assert search.build(**given).groups
    with pytest.raises(DataError, match=r"the `test` split has no labels, .* leave it out"):
        search.run(**given, out="run", **QUICK)
    assert not Path("run").exists()


def normed() -> nn.Module:
    """A classifier with a batch norm of vectors, which a batch of one leaves without statistics."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class WantsTargets(nn.Module):
    """As detectors do, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = normed()

    def forward(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and targets is None:
            raise ValueError("targets are missing")
        return self.body(images)


@pytest.mark.parametrize(
    ("model", "examples", "given", "says"),
    [
        (normed, 64, {"score_batch": 1}, "one example can't be trained on: .*raise --score-batch"),
        (normed, 64, {"finetune_batch": 1}, "one example can't be trained on: .*raise --finetune-batch"),
        (normed, 1, {}, "or give more training examples"),
        (WantsTargets, 64, {}, "fails in its forward: ValueError: targets are missing; give finetune="),
    ],
)
def test_what_can_not_be_trained_is_said_before_anything_is_kept(images, model, examples, given, says):
    labels = torch.arange(64) % 3
    data = {"train": TensorDataset(images[:examples], labels[:examples]), "val": TensorDataset(images, labels)}
    with pytest.raises(DataError, match=says):
        search.run(model=model(), data=data, budget="flops=0.5", out="run", **{**QUICK, **given})
    assert not Path("run").exists()


def with_example(example: torch.Tensor) -> nn.Module:
    """A classifier of inputs like the example's, which it holds."""
    model = nn.Sequential(nn.Conv2d(example.shape[1], 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.example_inputs = (example,)
    return model


def test_rewards_made_for_an_accuracy_refuse_another_metric(images):
    data = {"train": images, "val": images}
    given = {"metric": lambda model: -3.0, "finetune": lambda model, steps: None, "reward": "amc_flops"}
    with pytest.raises(UsageError, match="amc_flops is made for metrics from 0 to 1, and the dense model's is -3"):
        search.run(model=net(), data=data, budget="flops=0.5", out="run", **given, **QUICK)


def test_without_labels_a_metric_is_enough_where_nothing_is_fine_tuned(images):
    worth = Own(images).likeness
    data = {"train": images, "val": images}
    problem = search.build(model=net(), data=data, metric=worth, budget="flops=0.5", score_steps=0, finetune_epochs=0)
    assert problem.evaluate(problem.admit([8, 8])).accuracy < 0


def test_without_a_train_split_nothing_is_fine_tuned_and_a_notebook_shows_what_there_is(images, caplog):
    labelled = TensorDataset(images, torch.zeros(64, 8, 8, dtype=torch.long))
    result = search.run(model=net(), data={"val": labelled}, budget="flops=0.5", out="run", **QUICK)
    assert "there is no train split: neither candidates nor the result are fine-tuned" in caplog.text
    assert result.summary["search"]["trials"] > 0

    shown = result._repr_html_()
    assert shown.count("<svg") >= 4
    assert "dense" in shown
    assert "<script" not in shown
    assert f"{result.summary['best']['flops'] / result.summary['dense']['flops']:.3f}" in repr(result)
    assert repr(result.policy) == repr(amc.load_policy("run/policy.json")) == str(result.policy)
    assert "3 2/8" in repr(result.policy)
    (result.path / "result.json").unlink()
    assert result._repr_html_() is None


def test_a_resumed_run_needs_the_objects_that_it_began_with(images):
    def worth(model):
        return 0.5

    def other(model):
        return 0.9

    given = {"model": net(), "data": {"train": TensorDataset(images), "val": images}, "out": "run"}
    plain = {"score_steps": 0, "finetune_epochs": 0}
    search.run(**given, **plain, metric=worth, budget="flops=0.5", trials=1)
    again = {"resume": True, "trials": 2}
    with pytest.raises(UsageError, match=r"began with metric=worth and can't go on with metric=other"):
        search.run(**given, **again, metric=other)
    with pytest.raises(UsageError, match=r"began with metric=worth from Python.*search.run\(resume=True"):
        search.run(**given, **again)
    with pytest.raises(UsageError, match=r"began with model=\w+, data=dict from Python"):
        search.run(out="run", **again, metric=worth)
    assert search.run(**given, **again, metric=worth).summary["search"]["trials"] == 2


class OfMany(nn.Module):
    """Does something else with one row, which the example's two rows don't show the exporter."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.body, self.head, self.again = net(), nn.Linear(6 if again else 3, 4), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.body(x).mean((2, 3), keepdim=True).squeeze()
        pooled = pooled if pooled.dim() > 1 else pooled.unsqueeze(0)
        return self.head(torch.cat([pooled, x.mean((2, 3))], dim=1)) if self.again else pooled @ self.head.weight.T


@pytest.mark.parametrize("again", [False, True])  # its output loses the batch axis; it does not run
def test_a_model_whose_onnx_file_does_not_take_one_row_is_refused_before_the_search(again, images):
    data = {part: TensorDataset(images, torch.arange(64) % 4) for part in ("train", "val")}
    with pytest.raises(ModelError, match="does not run on a batch of 1"):
        search.run(model=OfMany(again), data=data, budget="flops=0.5", out="run", **QUICK)
    assert not Path("run").exists()
