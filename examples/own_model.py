"""A model and data of your own, in one file, searched from Python or from the command line.

`net` takes no argument and returns a module; `data` returns data sets of (input, label). Here they are a small
convolutional network and scikit-learn's digits. The file trains the network, keeps its weights, and searches:

    python examples/own_model.py

The same with commands, once `own_model.safetensors` is there:

    amc groups --model examples/own_model.py:net --data examples/own_model.py:data
    amc search --model examples/own_model.py:net --weights own_model.safetensors --data examples/own_model.py:data \
        --budget params=0.5 --out runs/own-model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import search


def net() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    body = block(1, 16, 1), block(16, 32, 2), block(32, 64, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def data() -> dict[str, TensorDataset]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    parts = np.split(np.random.default_rng(0).permutation(len(labels)), [1200, 1500])
    return {name: TensorDataset(images[p], labels[p]) for name, p in zip(("train", "val", "test"), parts, strict=True)}


def train(model: nn.Module, examples: TensorDataset, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(examples, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()


def main(out: str = "runs/own-model", epochs: int = 8, trials: int = 20, **settings: Any) -> search.Result:
    torch.manual_seed(0)
    model, splits = net(), data()
    train(model, splits["train"], epochs)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), "own_model.safetensors")
    result = search.run(model=model, data=splits, budget="params=0.5", trials=trials, out=out, **settings)
    print(result)
    print(repr(result.policy))
    return result


if __name__ == "__main__":
    main()
