"""Scoring and fine-tuning: right on odd sizes, and the same each time."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from amc.coupling import trace
from amc.errors import DataError
from amc.evaluate import Evaluator, ScoreSettings, accuracy, grade, in_memory, kept_units, recalibrate
from amc.finetune import IGNORED, Diverged, draw, finetune, train
from amc.importance import rank


class Examples:
    """Random vectors, the class is the largest of the first three entries."""

    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices):
        x = self.x[np.asarray(indices)]
        return x, x[:, :3].argmax(1)


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).eval()


def test_a_policy_keeps_the_best_units_in_their_own_order():
    kept = kept_units({"a": np.array([3, 1, 2, 0]), "b": np.array([1, 0])}, {"a": 3, "b": 1})
    assert {name: units.tolist() for name, units in kept.items()} == {"a": [1, 2, 3], "b": [1]}


@pytest.mark.parametrize("steps", range(1, 31))
def test_any_number_of_steps_ends_at_a_rate_of_about_nothing(steps):
    model, before = net(), []
    last = model[-1].weight

    def note(done: int, total: int) -> None:
        before.append(last.detach().clone())

    losses = train(model, draw(Examples(64), steps, batch=16), steps=steps, lr=0.02, progress=note)
    assert len(losses) == len(before) == steps
    if steps > 4:
        moves = [float((a - b).abs().max()) for a, b in pairwise(before)]
        assert moves[-1] < 0.6 * max(moves)


def test_training_learns_and_a_diverged_loss_says_so():
    model = net()
    start = accuracy(model, in_memory(Examples(300), 300))
    finetune(model, Examples(500), epochs=20, lr=0.1, batch=32)
    assert accuracy(model, in_memory(Examples(300), 300)) > start + 0.2
    assert not model.training
    with pytest.raises(Diverged, match="lower the learning rate"):
        finetune(net(), Examples(500), steps=50, lr=1e30)
    broken = net()
    next(broken.parameters()).data.fill_(math.nan)
    with pytest.raises(Diverged, match=r"became nan at step 1 of 5; nothing was learned yet, so do the data"):
        finetune(broken, Examples(500), steps=5)


def test_in_bfloat16_the_products_are_rounded_and_the_model_stays_in_float32():
    exact, rounded = net(), net()
    expected = train(exact, draw(Examples(500), 60, batch=32), steps=60, lr=0.1)
    seen = set()
    rounded[0].register_forward_hook(lambda layer, given, output: seen.add(output.dtype))
    losses = train(rounded, draw(Examples(500), 60, batch=32), steps=60, lr=0.1, precision=torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert losses != expected
    assert losses[-1] == pytest.approx(expected[-1], abs=0.1)
    assert losses[-1] < 0.7 * losses[0]
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_a_model_without_trainable_parameters_is_left_as_it_is(caplog):
    model = net().requires_grad_(False)
    finetune(model, Examples(64), steps=3)
    assert "requires a gradient" in caplog.text


class Words(nn.Module):
    """A bag of words, which two embeddings read."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 6, sparse=sparse)
        self.bag = nn.EmbeddingBag(20, 6, sparse=sparse)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.words(x).mean(1) + self.bag(x))


def test_sparse_embeddings_are_trained_as_dense_ones_are():
    words = torch.arange(32).view(8, 4) % 7  # most rows have no gradient, and still decay
    batches = [(words, torch.arange(8) % 3)] * 4
    sparse, dense = Words(sparse=True), Words(sparse=False)
    for model in (sparse, dense):
        train(model, batches, steps=4, lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(sparse.state_dict(), dense.state_dict())


class Deep(nn.Module):
    """Returns more than its logits in training, as models with auxiliary heads do."""

    def __init__(self, kind: Callable | None) -> None:
        super().__init__()
        self.kind, self.body = kind, net()

    def forward(self, x):
        x = self.body(x)
        return self.kind(x, x * float("nan")) if self.kind and self.training else x


@pytest.mark.parametrize("kind", [lambda *outputs: outputs, namedtuple("Outputs", "logits aux")])
def test_a_model_with_more_outputs_in_training_is_trained_by_its_logits(kind):
    losses = [train(Deep(k), draw(Examples(64), 3, batch=16), steps=3, lr=0.1) for k in (kind, None)]
    assert losses[0] == losses[1]


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    batches = list(draw(Examples(10), 3, batch=128))
    assert [len(labels) for _, labels in batches] == [10, 10, 10]


def test_what_stands_for_no_label_counts_neither_right_nor_wrong():
    eye, padded = torch.eye(4), torch.tensor([0, 1, -100, -100])
    assert accuracy(nn.Identity(), [(eye, padded)]) == 1.0
    assert accuracy(nn.Identity(), [(eye, padded), (eye, torch.tensor([1, 1, 2, 3]))]) == 5 / 6
    with pytest.raises(DataError, match="the label 156 is none of the model's 4 classes"):  # -100 as a byte
        accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 156], dtype=torch.uint8))])


def test_the_probability_of_the_right_class_is_averaged_over_the_labels_that_count():
    odds = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).log()
    assert grade(nn.Identity(), [(odds, torch.tensor([0, 1, 0, IGNORED]))]) == (
        pytest.approx(2 / 3),
        pytest.approx((0.75 + 0.25 + 0.5) / 3),
    )
    assert grade(nn.Identity(), [(odds, torch.tensor([0, 1, -1, -1]))]).score == pytest.approx((0.75 + 0.25) / 4)
    odds[0] = math.nan
    assert grade(nn.Identity(), [(odds, torch.tensor([1, 1, 1, 1]))]).score == pytest.approx((0.25 + 0.5 + 0.5) / 4)
    pixels = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()[:, :, None].expand(2, 2, 5)
    assert grade(nn.Identity(), [(pixels, torch.zeros(2, 5).byte())]).score == pytest.approx((0.75 + 0.5) / 2)


def test_a_score_is_the_probability_or_the_accuracy_or_the_users_metric(scored):
    accuracy, score = scored({"0": 4})
    assert 0 < score < 1
    assert score != accuracy
    plain, own = copy(scored), copy(scored)
    plain.settings = replace(scored.settings, soft=False)
    assert plain({"0": 4}) == (accuracy, accuracy)
    own._metric = lambda model: 7
    assert own({"0": 4}) == (7.0, 7.0)


def test_accuracy_refuses_labels_of_another_shape():
    eye = torch.eye(4)
    assert accuracy(nn.Identity(), [(eye, torch.arange(4))]) == 1.0
    with pytest.raises(DataError, match=r"the label 3 is none of the model's 3 classes"):
        accuracy(net(), [(torch.randn(4, 5), torch.tensor([0, -100, 3, -1]))])
    with pytest.raises(DataError, match="don't fit a model without an output a class"):
        accuracy(nn.Flatten(0), [(torch.randn(4, 1), torch.zeros(4))])
    with pytest.raises(DataError, match=r"\(4, 1\) don't fit predictions of shape \(4,\)"):
        accuracy(nn.Identity(), [(eye, torch.arange(4)[:, None])])
    with pytest.raises(DataError, match="metric of your own"):
        accuracy(nn.Identity(), [(eye, eye)])


def test_recalibration_gives_the_statistics_of_all_examples_whatever_the_batches():
    split, norm = Examples(130), nn.BatchNorm1d(5)
    recalibrate(norm, in_memory(split, 130, batch=128))  # 128 and 2 would count the two as much as the others
    assert norm.running_mean.numpy() == pytest.approx(split.x.mean(0).numpy(), abs=1e-6)
    assert (norm.momentum, norm.training) == (0.1, False)
    recalibrate(net(), in_memory(Examples(129), 512, batch=128))  # no batch of one


@pytest.fixture(scope="module")
def scored():
    model = net(dropout=0.5)
    structure = trace(model, (torch.zeros(1, 5),))
    order = rank(model, structure)
    settings = ScoreSettings(steps=4, batch=16, images=100, calibration=64)
    return Evaluator(model, structure, order, train_split=Examples(200), val_split=Examples(150), settings=settings)


def test_a_policy_scores_the_same_each_time_and_the_callers_random_numbers_stay(scored):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = scored({"0": 4})
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert scored({"0": 4}) == first


def test_scoring_leaves_the_dense_model_as_it_is(scored):
    before = {name: value.clone() for name, value in scored.model.state_dict().items()}
    scored({"0": 2})
    assert all(torch.equal(value, before[name]) for name, value in scored.model.state_dict().items())
    assert not scored.model.training


def test_a_reconstructed_candidate_is_nearer_to_the_dense_model():
    model, split = net(), Examples(200)
    structure = trace(model, (torch.zeros(1, 5),))
    order = rank(model, structure)

    def candidate(reconstruct, width):
        settings = ScoreSettings(steps=0, calibration=64, reconstruct=reconstruct)
        parts = {"train_split": split, "val_split": split, "settings": settings}
        return Evaluator(model, structure, order, **parts).candidate({"0": width}).eval()

    expected = model.eval()(split.x)
    near, far = (((candidate(reconstruct, 4)(split.x) - expected) ** 2).mean() for reconstruct in (True, False))
    assert near < 0.9 * far
    torch.testing.assert_close(candidate(True, structure.groups[0].channels)(split.x), expected)
