"""Samplers of Optuna's, each by its name and with the settings that suit a search of dozens or hundreds of trials."""

from __future__ import annotations

import optuna
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers.nsgaii import UniformCrossover
from optuna.trial import FrozenTrial

from amc.problem import Problem
from search.strategies.base import ProjectedSampler


class PopulationSampler(ProjectedSampler):
    """An evolutionary sampler of Optuna's, whose population takes in trials that it did not propose itself."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Gives the trial its generation, which Optuna does only where it proposes, not in a warm start."""
        super().before_trial(study, trial)
        assert isinstance(self._base, NSGAIISampler)
        self._base.get_trial_generation(study, trial)


def nsga2(problem: Problem, *, trials: int, seed: int) -> PopulationSampler:
    """NSGA-II with uniform crossover; its population is about a sixth of the trials.

    Optuna's default population of 50 would make a short run a random search.
    """
    population = min(max(trials // 6, 4), 50)
    return PopulationSampler(
        problem, lambda s: NSGAIISampler(population_size=population, crossover=UniformCrossover(), seed=s), seed
    )


def tpe(problem: Problem, *, trials: int, seed: int) -> ProjectedSampler:
    """TPE; its random start-up takes at most a sixth of the trials."""
    startup = min(max(trials // 6, 4), 10)
    return ProjectedSampler(problem, lambda s: TPESampler(n_startup_trials=startup, seed=s), seed)


def random(problem: Problem, *, trials: int, seed: int) -> ProjectedSampler:
    """Uniformly random widths."""
    return ProjectedSampler(problem, lambda s: RandomSampler(seed=s), seed)
