"""The benchmark's stand-in for ResNet-20: its fit is of the points that it keeps, and no policy is above its bound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from amc.cost import analytic
from benchmarks.surrogate import FITTED, best, fit, flops, resnet20


def test_the_coefficients_are_of_the_points_that_are_kept():
    kept = json.loads(FITTED.read_text())
    accuracies = np.array([policy["accuracy"] for policy in kept["policies"]])
    found = fit([policy["widths"] for policy in kept["policies"]], accuracies)
    assert found == pytest.approx(kept["coefficients"], abs=1e-5)
    assert kept["left_out"]["spearman"] > 0.9


def test_it_costs_what_the_network_costs():
    import torch

    from amc.architectures import resnet20 as network
    from amc.coupling import trace

    structure = trace(network(), (torch.zeros(1, 3, 32, 32),), only=("layer*.conv1",))
    assert [group.channels for group in structure.groups] == [16] * 3 + [32] * 3 + [64] * 3
    for widths in ([16] * 3 + [32] * 3 + [64] * 3, [3, 2, 6, 22, 11, 7, 44, 64, 64]):
        assert analytic(structure)["flops"](widths) == flops(widths)


def test_no_policy_is_above_the_bound():
    problem, top = resnet20()
    rng = np.random.default_rng(0)
    policies = [problem.admit(rng.uniform(1, [group.channels for group in problem.groups])) for _ in range(200)]
    accuracies = [problem.evaluate(policy).accuracy for policy in policies]
    assert max(accuracies) < top == pytest.approx(best(np.array(json.loads(FITTED.read_text())["coefficients"]), 0.5))
    assert top - max(accuracies) < 0.02


def test_a_noisy_score_is_the_same_each_time():
    first, again, other = (resnet20(noise=0.0015, seed=seed)[0] for seed in (1, 1, 2))
    policy = first.admit([8] * 9)
    assert first.evaluate(policy).accuracy == again.evaluate(policy).accuracy != other.evaluate(policy).accuracy
