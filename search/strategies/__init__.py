"""Who proposes: every strategy is an Optuna sampler, made by `make(problem, trials=…, seed=…)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amc.registry import resolve

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from amc.problem import Problem

STRATEGIES: dict[str, tuple[str, str]] = {
    "auto": ("uniform, tilts, then evolution guided by a Gaussian process", "search.strategies.auto:make"),
    "ddpg": ("DDPG agent walking the layers (AMC, He et al. 2018)", "search.strategies.ddpg:make"),
    "td3": ("the same with TD3's changes (Fujimoto et al. 2018)", "search.strategies.ddpg:td3"),
    "nsga2": ("evolution: Optuna's NSGA-II (Deb et al. 2002)", "search.strategies.from_optuna:nsga2"),
    "cmaes": ("evolution: CMA-ES (Hansen 2016)", "search.strategies.cma:make"),
    "tpe": ("Parzen estimators: Optuna's TPE (Bergstra et al. 2011)", "search.strategies.from_optuna:tpe"),
    "gp": ("Gaussian process: Optuna's, seconds a trial", "search.strategies.gp:make"),
    "evolution": (
        "regularized evolution, channels moving at constant cost (Real et al. 2019)",
        "search.strategies.evolution:make",
    ),
    "anneal": ("simulated annealing, channels moving at constant cost", "search.strategies.anneal:make"),
    "greedy": ("the first exchange between groups that helps (NetAdapt, AutoSlim)", "search.strategies.greedy:make"),
    "sensitivity": ("curves of all groups, then a knapsack (SPDY, HALP)", "search.strategies.sensitivity:make"),
    "tilt": ("kept cost grows from stage to stage: five trials", "search.strategies.tilt:make"),
    "random": ("random widths, scaled to the budget", "search.strategies.from_optuna:random"),
    "uniform": ("the same keep ratio everywhere: one trial", "search.strategies.uniform:make"),
}
DEFAULT = "auto"


def make_sampler(name: str, problem: Problem, *, trials: int, seed: int) -> BaseSampler:
    """The sampler of a registered strategy; `trials` is how many it may expect to propose.

    Raises:
        UsageError: there is no such strategy; the message names the nearest.
    """
    return resolve(STRATEGIES, name, "--strategy")(problem, trials=trials, seed=seed)
