"""Our environment with another agent: TD3 of Stable-Baselines3 walks the layers of the embedded default.

`amc/Pruning-v0` is a Gymnasium environment like any other; an episode is a policy, and its last step's info says what
it is worth. Any agent for a box of one action will do. Run it:

    python examples/another_agent.py
"""

from __future__ import annotations

from typing import Any

import gymnasium
from stable_baselines3 import TD3

import envs
import search


def main(episodes: int = 40) -> dict[str, Any]:
    problem = search.build(budget="flops=0.5", score_steps=10)
    env = gymnasium.make(envs.ENV_ID, problem=problem)
    ended: list[dict[str, Any]] = []

    def remember(training: dict[str, Any], _: dict[str, Any]) -> bool:
        ended.extend(info for info in training["infos"] if "widths" in info)
        return True

    steps = len(problem.groups)
    agent = TD3("MlpPolicy", env, learning_starts=steps * episodes // 4, seed=0)
    agent.learn(steps * episodes, callback=remember)
    best = max(ended, key=lambda info: info["reward"])
    print(f"{len(ended)} policies; the best: accuracy {best['accuracy']:.4f}, {dict(best['widths'])}")
    return best


if __name__ == "__main__":
    main()
