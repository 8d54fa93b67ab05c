"""The policy file: what is written is read back, and nothing else is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import amc
from amc.application import example_of
from amc.errors import PolicyError
from amc.models import load_model
from amc.policy import GroupPolicy, InputInfo, ModelInfo, Policy, load_policy
from search.result import model_info

GOLDEN = Path(__file__).parent / "golden" / "policy.json"


def example() -> Policy:
    return Policy(
        model=ModelInfo(
            name="net",
            inputs=[InputInfo(name="x", shape=[1, 3, 32, 32], dtype="float32")],
            structure_sha256="0" * 64,
            weights_sha256="1" * 64,
        ),
        groups=[
            GroupPolicy(
                name="conv1",
                kind="channel",
                channels=4,
                width=3,
                keep_ratio=0.75,
                kept=[0, 2, 3],
                members=["conv1:out", "conv2:in"],
            )
        ],
        importance="l1",
        search={"strategy": "ddpg", "seed": 0},
        versions={"torch": "2.13.0"},
    )


def test_the_golden_file_is_read_and_written_back_byte_for_byte(tmp_path):
    policy = load_policy(GOLDEN)
    assert policy == example()
    assert policy.widths == {"conv1": 3}
    policy.save(tmp_path / "policy.json")
    assert (tmp_path / "policy.json").read_bytes() == GOLDEN.read_bytes()


def test_the_inputs_of_a_policy_are_of_its_types_and_go_where_it_says():
    tokens = InputInfo(name="tokens", shape=[1, 5], dtype="int64")
    image = InputInfo(name="image", shape=[1, 3], dtype="float32")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 3), nn.Linear(3, 2)

        def forward(self, image, tokens):
            return self.out(image + self.embed(tokens).mean(1))

    first = example()
    for inputs, kind in (([tokens, image], dict), ([image, tokens], tuple)):
        policy = first.model_copy(update={"model": first.model.model_copy(update={"inputs": inputs})})
        loaded = load_model(Net(), example=example_of(policy))
        assert isinstance(loaded.inputs, kind)
        assert sorted(loaded.input_names) == ["image", "tokens"]


def test_where_a_model_takes_no_zeros_its_integers_are_ones():
    """As the lengths of sequences: a policy file says no more of them than their type."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, lengths):
            if not bool((lengths > 0).all()):
                raise ValueError("a length of 0")
            return self.out(self.stem(x) / lengths[:, None])

    net, inputs = Net(), (torch.randn(1, 3), torch.ones(1, dtype=torch.long))
    loaded = load_model(net, example=inputs)
    policy = example().model_copy(
        update={
            "model": model_info(loaded),
            "groups": [GroupPolicy(name="stem", kind="channel", channels=4, width=2, keep_ratio=0.5)],
        }
    )
    assert amc.apply(net, policy).stem.out_features == 2


def test_a_policy_may_keep_less_than_runs_on_one_example():
    """A search would not: a norm over one channel of pooled features needs a batch."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.out = nn.Linear(3, 4), nn.GroupNorm(1, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.norm(self.stem(x)))

    net = Net().eval()
    policy = example().model_copy(
        update={
            "model": model_info(load_model(net, input_shape=(1, 3))),
            "groups": [GroupPolicy(name="stem", kind="channel", channels=4, width=1, keep_ratio=0.25)],
        }
    )
    assert amc.apply(net, policy)(torch.randn(5, 3)).shape == (5, 2)


def changed(**changes) -> str:
    """The golden policy with `group__width=5` meaning groups[0]["width"] = 5."""
    content = json.loads(GOLDEN.read_text())
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        target = content["groups"][0] if section == "group" else content[section] if section else content
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not whole, valid JSON"),
        (GOLDEN.read_text()[:200], "not whole, valid JSON"),
        ("[]", "not a policy"),
        ("{}", "not a policy"),
        (changed(format="other"), "not a policy"),
        (changed(version=2), "version 2"),
        (changed(version=True), "version True"),
        (changed(groups=None), "`groups`: Field required"),
        (changed(extra=1), "`extra` is not known"),
        (changed(group__extra=1), "`groups.0.extra` is not known"),
        (changed(group__width=5), "keeps 5 of 4"),
        (changed(group__width=0), "`groups.0.width`"),
        (changed(group__width="3"), "`groups.0.width`"),
        (changed(group__width=3.0), "`groups.0.width`"),
        (changed(group__kept=[0, 1]), "must list 3"),
        (changed(group__kept=[2, 0, 3]), "must list 3"),
        (changed(group__kept=[0, 2, 4]), "must list 3"),
        (changed(model__weights_sha256="xyz"), "weights_sha256"),
        (changed(groups=json.loads(GOLDEN.read_text())["groups"] * 2), "appears twice"),
        (GOLDEN.read_text().replace('"width": 3', '"width": 3, "width": 4'), "duplicate key 'width'"),
        (GOLDEN.read_text().replace("0.75", "NaN"), "NaN"),
        (GOLDEN.read_text().replace("0.75", "1e999"), "out of range"),
        ("[" * 100_000, "not whole, valid JSON"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(tmp_path, text, says):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=says):
        load_policy(path)


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path):
    with pytest.raises(PolicyError, match="can't be read"):
        load_policy(tmp_path / "missing.json")
    with pytest.raises(PolicyError, match="can't be read"):
        load_policy(tmp_path)
    (tmp_path / "huge.json").write_bytes(b" " * (17 * 2**20))
    with pytest.raises(PolicyError, match="larger than"):
        load_policy(tmp_path / "huge.json")
