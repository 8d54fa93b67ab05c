"""A run's own look at its groups one by one, for the report: where the network has room.

It plays no part in the search, so it may cost a small share of it and no more: models are scored as sliced, batch norm
recalibrated, on a few images, at as many keep ratios as that share affords. A run too short for two says so in its
report, and `amc sensitivity` goes into any depth. It does not depend on the budget, so that a sweep's runs share it.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from amc.budget import Budget
from amc.errors import SearchFailed, UsageError
from amc.problem import Problem
from search.compose import Setup, evaluator_of
from search.display import Display
from search.run_directory import SENSITIVITY, RunDirectory
from search.sensitivity import Scalar, load_sensitivity, sensitivity

log = logging.getLogger("amc")

SHARE = 0.05
"""Of what the search's trials cost, in examples that go through the network."""
IMAGES, CALIBRATION = 512, 128
CHOICES = ((0.5, 0.25), (0.75, 0.5, 0.25), (0.75, 0.5, 0.25, 0.1), (0.9, 0.75, 0.5, 0.25, 0.1))


def affordable(trials: int, groups: int, cost: float, trial_cost: float) -> tuple[float, ...]:
    """The keep ratios at which each of the groups may be scored; none where there are too few trials.

    cost, trial_cost: of one such score and of a trial, in the same unit.
    """
    scores = int(trials * trial_cost * SHARE / cost + 1e-9)
    return next((ratios for ratios in reversed(CHOICES) if 1 + groups * len(ratios) <= scores), ())


def write_sensitivity(setup: Setup, trials: int, directory: RunDirectory, display: Display) -> None:
    """Writes `sensitivity.json`, unless it is there already, or would cost too much after so many trials."""
    settings = setup.settings
    images = min(settings.score_images or len(setup.data.val), len(setup.data.val))
    few = replace(
        settings,
        score_steps=0,
        score_images=min(images, IMAGES),
        calibration_images=min(settings.calibration_images, CALIBRATION),
        reconstruct=False,
    )
    trial_cost = 3 * settings.score_steps * settings.score_batch + settings.calibration_images + images  # forward
    cost = few.calibration_images + few.score_images
    if setup.metric is not None:
        cost = trial_cost  # only its author knows what it takes
    ratios = affordable(trials, len(setup.structure.groups), cost, trial_cost)
    if not ratios or _known(directory) == tuple(sorted(ratios)):
        return
    alone = evaluator_of(few, setup.loaded, setup.data, setup.structure, setup.order, metric=setup.metric)
    source: dict[str, Scalar] = {
        "steps": 0,
        "images": few.score_images,
        "importance": settings.importance,
        "seed": settings.seed,
    }
    problem = Problem(setup.structure.groups, Budget(setup.structure.groups, []), alone)
    with display.bar("scoring each group alone") as report:
        try:
            found = sensitivity(problem, ratios=ratios, seed=settings.seed, progress=report, source=source)
        except SearchFailed as error:
            log.warning("how sensitive each group is was not measured: %s", error)
            return
    found.save(directory / SENSITIVITY)


def _known(directory: RunDirectory) -> tuple[float, ...] | None:
    """The ratios of the run's file, from before it was gone on with or from another run of its sweep."""
    with contextlib.suppress(UsageError):
        if (directory / SENSITIVITY).is_file():
            return load_sensitivity(directory / SENSITIVITY).ratios
    return None
