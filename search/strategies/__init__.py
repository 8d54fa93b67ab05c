"""Who proposes: every strategy is an Optuna sampler, made by `make(problem, trials=…, seed=…)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amc.registry import resolve

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from amc.problem import Problem

STRATEGIES: dict[str, tuple[str, str]] = {
    "ddpg": ("DDPG agent walking the layers (AMC, He et al. 2018)", "search.strategies.ddpg:make"),
    "nsga2": ("evolution: Optuna's NSGA-II (Deb et al. 2002)", "search.strategies.from_optuna:nsga2"),
    "cmaes": ("evolution: CMA-ES (Hansen 2016)", "search.strategies.cma:make"),
    "tpe": ("Parzen estimators: Optuna's TPE (Bergstra et al. 2011)", "search.strategies.from_optuna:tpe"),
    "random": ("random widths, scaled to the budget", "search.strategies.from_optuna:random"),
    "uniform": ("the same keep ratio everywhere: one trial", "search.strategies.uniform:make"),
}
DEFAULT = "ddpg"


def make_sampler(name: str, problem: Problem, *, trials: int, seed: int) -> BaseSampler:
    """The sampler of a registered strategy; `trials` is how many it may expect to propose.

    Raises:
        UsageError: there is no such strategy; the message names the nearest.
    """
    return resolve(STRATEGIES, name, "--strategy")(problem, trials=trials, seed=seed)
