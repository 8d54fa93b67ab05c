"""What anchors teach: hand-made ones, whose regression is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amc.cost import FunctionCost
from search.calibration import PRIOR, Anchor, Lessons, calibrated
from tests.synthetic import staged


@pytest.mark.parametrize("worth", [0.0, 0.1, -0.1])
def test_capacity_counts_only_as_far_as_anchors_support_it(worth: float) -> None:
    """Accuracy after the fine-tune is the score and `worth` times the log of the parameters that are kept."""
    problem, _ = staged(2)
    problem.costs["params"] = FunctionCost("params", "", lambda widths: float(sum(widths)))
    rng = np.random.default_rng(1)
    scored = [problem.evaluate([int(rng.integers(2, g.channels + 1)) for g in problem.groups]) for _ in range(60)]
    scores = np.array([one.accuracy for one in scored])
    truth = scores + worth * np.log([one.costs["params"] for one in scored])
    anchors = [Anchor(problem.widths(scored[i].widths), scores[i], truth[i], truth[i]) for i in range(8)]

    params = np.array([one.costs["params"] for one in scored])
    places = [problem.widths(one.widths) for one in scored]
    found = calibrated(places, scores, params, anchors)

    def error(guess: np.ndarray) -> float:
        return float(np.std(guess[8:] - truth[8:]))

    if worth:
        assert error(found) < 0.5 * error(scores)
    else:
        assert error(found) < 0.1 * np.std(scores)


def test_a_single_anchor_leaves_score_and_parameters_worth_what_they_are_elsewhere() -> None:
    """Two policies, a spread of 0.5 on either side of the mean in both: the prior is all that tells them apart."""
    found = calibrated([(1,), (2,)], np.array([0.0, 1.0]), np.array([1.0, math.e]), [Anchor((1,), 0.0, 0.3, 0.3)])
    assert found == pytest.approx([0.3, 0.3 + 1.0 + PRIOR[1]])


def test_half_of_what_the_regression_leaves_is_an_anchors_own() -> None:
    """Two anchors alike in score and parameters, so that nothing explains why one ended better."""
    scores = np.array([0.5, 0.5, 0.1, 0.9])
    anchors = [Anchor((0,), 0.5, 0.6, 0.6), Anchor((1,), 0.5, 0.7, 0.7)]
    found = calibrated([(i,) for i in range(4)], scores, np.ones(4), anchors)
    assert found == pytest.approx([0.625, 0.675, 0.25, 1.05])


def test_anchors_that_contradict_the_score_leave_it_worth_nothing() -> None:
    rng = np.random.default_rng(1)
    scores, places, params = rng.random(60), [(i,) for i in range(60)], np.ones(60)
    anchors = [Anchor(places[i], scores[i], -scores[i], -scores[i]) for i in range(12)]
    found = calibrated(places, scores, params, anchors)[12:]
    assert np.std(found) < 1e-9


@pytest.mark.parametrize("worth", [0.1, -0.1])
def test_anchors_of_other_budgets_teach_what_few_of_ones_own_cannot(worth: float) -> None:
    """The accuracies of a budget have an offset of their own, which says nothing of what score or size are worth."""
    problem, _ = staged(2)
    problem.costs["params"] = FunctionCost("params", "", lambda widths: float(sum(widths)))
    rng, errors = np.random.default_rng(1), []
    for _ in range(5):
        scored = [problem.evaluate([int(rng.integers(2, g.channels + 1)) for g in problem.groups]) for _ in range(60)]
        scores, params = (np.array(x) for x in zip(*((o.accuracy, o.costs["params"]) for o in scored), strict=True))
        truth = scores + worth * np.log(params)
        seen = truth + rng.normal(0, 0.3 * scores.std(), 60)
        anchors = [Anchor(problem.widths(scored[i].widths), scores[i], seen[i], seen[i]) for i in range(5)]
        shared = [Lessons(scores[part], params[part], seen[part] + offset) for part, offset in OTHERS]
        places = [problem.widths(one.widths) for one in scored]
        found = [calibrated(places, scores, params, anchors, more) for more in ([], shared)]
        errors.append([np.std(expected[25:] - truth[25:]) for expected in found])
    alone, together = np.mean(errors, axis=0)
    assert together < 0.8 * alone


OTHERS = ((slice(5, 15), 0.5), (slice(15, 25), -0.8))
