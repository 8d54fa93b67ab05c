"""Problems without a network whose optimum is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from amc.budget import Budget, Limit
from amc.cost import FunctionCost
from amc.groups import Group, Layer, Slice, Structure, TensorInfo
from amc.problem import Problem


def group(name: str, channels: int, floor: int = 1, **layer: int) -> Group:
    return Group(
        name, channels, tuple(range(floor, channels + 1)), layer=Layer(name, "conv", outputs=channels, **layer)
    )


def concave(groups: int = 20, *, limit: float = 0.5, seed: int = 0) -> tuple[Problem, float]:
    """Accuracy is a weighted sum of sqrt(keep ratio), cost a weighted sum of keep ratios; and the best accuracy.

    With accuracy sum_i v_i sqrt(x_i) and cost sum_i c_i x_i = b the optimum is x_i ~ (v_i / c_i)^2, cut off at 1
    (Lagrange), so it is known without a search.
    """
    rng = np.random.default_rng(seed)
    value, weight = rng.dirichlet(np.full(groups, 1.0)), rng.dirichlet(np.full(groups, 2.0))
    members = [group(f"layer{i:02d}", 64, inputs=int(rng.integers(8, 64))) for i in range(groups)]
    cost = FunctionCost("flops", "MAC", lambda widths: float(weight @ (np.asarray(widths) / 64)) * 1e6)

    def accuracy(ratios: Sequence[float] | np.ndarray) -> float:
        return float(value @ np.sqrt(ratios))

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        ratios = np.minimum((middle * value / weight) ** 2, 1.0)
        low, high = (middle, high) if weight @ ratios < limit else (low, middle)
    best = accuracy(np.minimum((low * value / weight) ** 2, 1.0))
    budget = Budget(members, [Limit(cost, limit * 1e6, 1e6)])
    return Problem(members, budget, lambda w: accuracy([w[g.name] / 64 for g in members]), costs={"flops": cost}), best


def staged(blocks: int = 6, *, limit: float = 0.5, noise: float = 0.0, seed: int = 0) -> tuple[Problem, float]:
    """Three stages of `blocks` groups whose neighbours interact, in cost and in accuracy; and the best accuracy.

    With y = log keep ratios the cost is sum_i c_i exp(y_i + y_(i+1)) (a layer between two groups), and accuracy a
    sigmoid of a'(y - y*) - (y - y*)'Q(y - y*) / 2, Q tridiagonal. What is under the sigmoid is concave and the cost
    convex, so with `a` along the cost's gradient at y*, and y* on the limit, y* is the optimum (Kuhn and Tucker).

    noise: standard deviation of a score's error, the same whenever a policy is scored. seed: of y* and Q.
    """
    rng = np.random.default_rng(seed)
    count = 3 * blocks
    members = [
        group(f"stage{i // blocks}.{i % blocks}", 16 << i // blocks, positions=1024 >> 2 * (i // blocks))
        for i in range(count)
    ]
    dense = np.array([member.channels for member in members], dtype=float)
    weight = rng.uniform(0.5, 1.5, count + 1)
    weight /= weight.sum()

    def layers(y: np.ndarray) -> np.ndarray:
        padded = np.concatenate([[0.0], y, [0.0]])  # the input's and the output's channels stay
        return np.asarray(weight * np.exp(padded[:-1] + padded[1:]))

    planted = np.repeat(rng.normal(-0.6, 0.5, 3), blocks) + rng.normal(0, 0.3, count)
    low, high = -3.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if layers(np.minimum(planted + middle, 0)).sum() < limit else (low, middle)
    planted = np.minimum(planted + low, -0.02)
    limit = float(layers(planted).sum())
    gradient = layers(planted)[:-1] + layers(planted)[1:]
    curvature = rng.uniform(0.05, 0.25, count)
    coupling = rng.uniform(-0.5, 0.5, count - 1) * np.sqrt(curvature[:-1] * curvature[1:])  # Q stays definite
    q = np.diag(curvature) + np.diag(coupling, 1) + np.diag(coupling, -1)
    cost = FunctionCost("flops", "MAC", lambda widths: 1e6 * float(layers(np.log(np.asarray(widths) / dense)).sum()))

    def accuracy(widths: Sequence[int]) -> float:
        off = np.log(np.asarray(widths) / dense) - planted
        return float(1 / (1 + np.exp(-2 - 3 * gradient @ off + off @ q @ off / 2)))

    def scored(policy: Mapping[str, int]) -> float:
        widths = [policy[member.name] for member in members]
        return accuracy(widths) + noise * float(np.random.default_rng([seed, *widths]).normal())

    budget = Budget(members, [Limit(cost, limit * 1e6, 1e6)])
    return Problem(members, budget, scored, costs={"flops": cost}), 1 / (1 + np.exp(-2))


def chain(channels: Sequence[int], kernels: Sequence[int], positions: Sequence[int], step: int = 1) -> Structure:
    """A stack of convolutions with bias: `channels[0]` inputs, a group after each layer but the last."""
    tensors: dict[str, TensorInfo] = {}
    spread: dict[str, int] = {}
    slices: list[list[Slice]] = [[] for _ in channels[1:-1]]
    for i, (inputs, outputs, kernel) in enumerate(zip(channels, channels[1:], kernels, strict=False)):
        weight, bias = f"conv{i}.weight", f"conv{i}.bias"
        tensors[weight] = TensorInfo((outputs, inputs, kernel, kernel), "float32", parameter=True)
        tensors[bias] = TensorInfo((outputs,), "float32", parameter=True)
        spread[weight] = positions[i]
        if i < len(slices):
            slices[i] += [_whole(weight, 0, outputs), _whole(bias, 0, outputs)]
        if i > 0:
            slices[i - 1].append(_whole(weight, 1, inputs))
    groups = tuple(
        Group(
            f"conv{i}",
            width,
            tuple(sorted({*range(step, width + 1, step), width})),
            slices=tuple(slices[i]),
            layer=Layer(f"conv{i}", "conv", width, channels[i], positions[i], 1, kernels[i]),
        )
        for i, width in enumerate(channels[1:-1])
    )
    return Structure(groups, (), tensors, spread)


def _whole(tensor: str, axis: int, length: int) -> Slice:
    return Slice(tensor, axis, np.arange(length), np.arange(length))
