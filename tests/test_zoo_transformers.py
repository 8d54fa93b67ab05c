"""Architectures of `transformers`, tiny and random: groups are found, and slim models run and are right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from amc.coupling import trace
from amc.slim import slim
from amc.verify import difference, verify
from benchmarks.zoo import ZOO, build, chosen, halved

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

EXPECTED = {  # groups, of these heads
    "ResNet": (14, 0),
    "ConvNeXtV2": (9, 0),
    "MobileNetV2": (25, 0),
    "ViT": (5, 2),
    "Swin": (10, 4),
    "LeViT": (16, 5),
    "BERT": (6, 2),
    "GPT-2": (5, 2),
    "Llama": (5, 2),
}
FROZEN = ("PVT", "PVTv2", "SegFormer", "FocalNet", "Gemma", "Phi-3", "BLOOM", "DeBERTaV2", "FNet", "CvT", "MobileViTV2")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [n if n in EXPECTED else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_architecture(name: str) -> None:
    model, inputs = build(name)
    structure = verify(model, inputs, trace(model, inputs))
    if name in EXPECTED:
        heads = sum(group.kind == "head" for group in structure.groups)
        assert (len(structure.groups), heads) == EXPECTED[name]
    if name not in FROZEN:
        assert [f.reason for f in structure.frozen] == ["its channels are the model's output"]
    policy = halved(structure)
    kept = {group.name: chosen(group, policy[group.name]) for group in structure.groups}
    model, inputs = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert difference(model, inputs, structure, kept) < 1e-5
    with torch.no_grad():
        assert np.isfinite(slim(model, structure, kept)(**inputs).logits).all()
