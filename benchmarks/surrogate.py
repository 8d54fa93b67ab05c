"""A problem that costs nothing and yet is of a real network: fine-tuned accuracy, guessed from published policies.

    python benchmarks/surrogate.py POLICIES.json     # fits it again: benchmarks/results/resnet20-surrogate.json

In the manner of NAS-Bench-301 (Zela et al., ICLR 2022): a regression on measured points stands in for the measurement.
The points are 22 policies of a CIFAR ResNet-20 at half the FLOPs, block-inner channels only, each fine-tuned once and
measured on 7,000 images (0.15 points from seed to seed). The regression is a concave parabola in each stage's mean
logarithm of the keep ratio, less what a stage loses by being uneven. It says nothing of policies far from the points,
so a parabola may not be flatter than `LEAST`: otherwise its best policies would lie where nobody has measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests`, which is not installed

from amc.budget import Budget, Limit  # noqa: E402
from amc.cost import FunctionCost  # noqa: E402
from amc.problem import Problem  # noqa: E402
from tests.synthetic import group  # noqa: E402

FITTED = ROOT / "benchmarks" / "results" / "resnet20-surrogate.json"
CHANNELS = np.repeat([16, 32, 64], 3)
POSITIONS = np.repeat([1024, 256, 64], 3)
NOISE = 0.0015
"""Standard deviation of one fine-tuned accuracy."""
RIDGE = 0.05
LEAST = (0.003, 0.002)
"""The least curvature in a stage's mean, and of its unevenness."""


def flops(widths: Sequence[int] | np.ndarray) -> float:
    """Multiply-accumulates of the ResNet-20 whose blocks' inner widths these are."""
    inputs = np.array([16, 16, 16, 16, 32, 32, 32, 64, 64])
    per_channel = 9 * POSITIONS * (inputs + CHANNELS)  # of the block's two convolutions; shortcuts cost nothing
    return float(3 * 16 * 9 * 1024 + 640 + per_channel @ np.asarray(widths))


def features(widths: Sequence[int] | np.ndarray) -> np.ndarray:
    """`(9,)`: each stage's mean of the logarithms of keep ratios, its negative square, and its negative variance."""
    logs = np.log(np.asarray(widths, dtype=float) / CHANNELS).reshape(3, 3)
    return np.concatenate([logs.mean(1), -(logs.mean(1) ** 2), -logs.var(1)])


def fit(policies: Sequence[Sequence[int]], accuracies: np.ndarray) -> np.ndarray:
    """`(10,)`: the constant and the features' coefficients, by ridge regression with bounds."""
    from scipy.optimize import lsq_linear

    rows = np.array([[1.0, *features(widths)] for widths in policies])
    ridge = np.sqrt(RIDGE) * np.eye(10)[1:]
    low = [-np.inf] * 4 + [LEAST[0]] * 3 + [LEAST[1]] * 3
    found = lsq_linear(np.vstack([rows, ridge]), np.append(accuracies, np.zeros(9)), bounds=(low, np.inf))
    return np.asarray(found.x)


def best(coefficients: np.ndarray, limit: float) -> float:
    """The highest accuracy within the limit, of widths that need not be whole: no policy has more."""
    from scipy.optimize import minimize

    def accuracy(logs: np.ndarray) -> float:
        return float(coefficients[0] + features(CHANNELS * np.exp(logs)) @ coefficients[1:])

    within = {"type": "ineq", "fun": lambda logs: limit - flops(CHANNELS * np.exp(logs)) / flops(CHANNELS)}
    start = np.repeat(np.log([0.2, 0.4, 0.7]), 3)
    bounds = [(np.log(1 / channels), 0.0) for channels in CHANNELS]
    found = minimize(lambda logs: -accuracy(logs), start, bounds=bounds, constraints=[within], method="SLSQP")
    assert found.success
    return -float(found.fun)


def resnet20(*, limit: float = 0.5, noise: float = 0.0, seed: int = 0) -> tuple[Problem, float]:
    """The problem, and an upper bound of its accuracy.

    noise: standard deviation of a score's error, the same whenever a policy is scored with a seed.
    """
    fitted = json.loads(FITTED.read_text())
    coefficients = np.array(fitted["coefficients"])
    members = [
        group(f"layer{i // 3 + 1}.{i % 3}.conv1", int(CHANNELS[i]), positions=int(POSITIONS[i])) for i in range(9)
    ]
    cost = FunctionCost("flops", "MAC", flops)

    def scored(policy: Mapping[str, int]) -> float:
        widths = [policy[member.name] for member in members]
        error = noise * float(np.random.default_rng([seed, *widths]).normal()) if noise else 0.0
        return float(coefficients[0] + features(widths) @ coefficients[1:]) + error

    dense = flops(CHANNELS)
    budget = Budget(members, [Limit(cost, limit * dense, dense)])
    return Problem(members, budget, scored, costs={"flops": cost}), best(coefficients, limit)


def summary(policies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fit, its points, and how well it guesses each of them from the others."""
    from scipy.stats import spearmanr

    widths = [list(policy["widths"]) for policy in policies]
    truth = np.array([(2000 * policy["val"] + 5000 * policy["test"]) / 7000 for policy in policies])
    guessed = []
    for i in range(len(widths)):
        coefficients = fit(widths[:i] + widths[i + 1 :], np.delete(truth, i))
        guessed.append(coefficients[0] + features(widths[i]) @ coefficients[1:])
    return {
        "what": "ResNet-20, CIFAR-10: accuracy on 7,000 images after two epochs of fine-tuning, and a regression on it",
        "coefficients": [round(float(value), 6) for value in fit(widths, truth)],
        "left_out": {
            "spearman": round(float(spearmanr(guessed, truth)[0]), 3),
            "rmse": round(float(np.sqrt(np.mean((np.array(guessed) - truth) ** 2))), 5),
        },
        "policies": [{"widths": w, "accuracy": round(float(t), 5)} for w, t in zip(widths, truth, strict=True)],
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())["policies"]
    FITTED.write_text(json.dumps(summary(given)).replace('{"widths"', '\n{"widths"') + "\n")
