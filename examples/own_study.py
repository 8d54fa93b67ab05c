"""Our DDPG sampler in an Optuna study of your own, with an objective that you write.

The sampler proposes a whole policy, within the budget, and each `suggest_int` by a group's name reads one width of it.
What you return is what the agent learns from; here, accuracy less a small price on parameters. Run it:

    python examples/own_study.py
"""

from __future__ import annotations

import optuna

import search
from search.strategies.ddpg import DDPGSampler


def main(trials: int = 30) -> optuna.Study:
    problem = search.build(budget="flops=0.5", score_steps=10)

    def objective(trial: optuna.Trial) -> float:
        widths = {group.name: trial.suggest_int(group.name, group.floor, group.channels) for group in problem.groups}
        outcome = problem.evaluate(widths)
        return outcome.accuracy - 0.05 * outcome.costs["params"] / problem.costs["params"](problem.budget.dense)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=DDPGSampler(problem, trials=trials))
    study.optimize(objective, n_trials=trials)
    print(f"best value {study.best_value:.4f}: {study.best_params}")
    return study


if __name__ == "__main__":
    main()
