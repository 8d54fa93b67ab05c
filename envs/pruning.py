"""The pruning environment, in the manner of AMC (He et al., ECCV 2018, section 3 and algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from amc.problem import Problem
from envs.observation import Observer


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A walk through a network's channel groups, in forward order; each step decides how much one of them keeps.

    ## Action space

    `Box(-1, 1, (1,), float32)`. An action `a` asks for the keep ratio `floor + (1 - floor) * (a + 1) / 2`; `floor`
    is the smallest keep ratio of the group at hand. It is rounded once to an allowed width and clipped to the
    largest width that still lets the later groups reach the budget, so that no episode ends above it.

    ## Observation space

    `Box(0, 1, (11,), float32)`: AMC's eleven features of the group that is decided next. After the last step it is the
    last group's, with everything decided.

    | at | feature     | meaning                                                                  | 0 is         | 1 is        |
    |----|-------------|--------------------------------------------------------------------------|--------------|-------------|
    | 0  | index       | the group's place, t                                                     | first        | last        |
    | 1  | kind        | other, convolution, depthwise convolution, linear, evenly spaced         | other        | linear      |
    | 2  | outputs     | log2 of the dense output channels, n, over the network's largest         | 1 channel    | the most    |
    | 3  | inputs      | log2 of the dense input channels, c, over the network's largest          | 1 channel    | the most    |
    | 4  | positions   | log2 of the output positions, h·w, over the network's largest            | 1 position   | the most    |
    | 5  | stride      | log2 of the stride over the network's largest                            | stride 1     | the largest |
    | 6  | kernel      | log2 of the kernel size, k, over the network's largest                   | 1            | the largest |
    | 7  | cost        | share of the dense cost that goes when this group alone is at its floor  | nothing      | all of it   |
    | 8  | reduced     | share of the dense cost that the executed decisions have removed         | nothing      | all of it   |
    | 9  | rest        | share of the dense cost that the groups after this one can still remove  | nothing      | all of it   |
    | 10 | last_action | keep ratio that was executed for the group before (1 at the start)       | nothing kept | all kept    |

    The cost is the FLOPs where the problem knows them, else its first cost. A latency budget adds two features, so that
    the space is `(13,)`:

    | at | feature      | meaning                                                                 | 0 is         | 1 is        |
    |----|--------------|-------------------------------------------------------------------------|--------------|-------------|
    | 11 | latency      | share of the dense latency that goes when this group alone is at its floor | nothing   | all of it   |
    | 12 | latency_left | share of the latency limit that decisions so far, the rest at its floor, leave | nothing | all of it |

    ## Reward

    0 until the last step, which scores the policy and yields the problem's reward (`amc.reward`).

    ## Episode end

    Terminates after the last group; never truncates. `reset` starts at the first group with nothing decided. Nothing is
    random, so a seed changes nothing but `action_space`'s and `np_random`'s.

    ## Info

    Each step: `width` and `keep_ratio` that were executed, `group`, and `action`, the action that asks for just this
    width (what a replay buffer should store). The last step adds `widths`, `accuracy`, `score`, `costs` and `reward`; a
    policy that can't be scored has `failed` with the reason instead, and the lowest reward seen so far (before there is any,
    that of a policy of the same costs whose accuracy is 0).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._observer = Observer(problem)
        self.observation_space = spaces.Box(0.0, 1.0, (len(self._observer.features),), np.float32)
        self._executed: list[int] = []
        self._lowest_reward = math.inf

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode: nothing is decided."""
        super().reset(seed=seed, options=options)
        self._executed = []
        return self._observer.observe(self._executed), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decides the next group."""
        info = self.decide(float(np.asarray(action).reshape(())))
        terminated = len(self._executed) == len(self.problem.groups)
        reward = self._score(info) if terminated else 0.0
        return self._observer.observe(self._executed), reward, terminated, False, info

    def decide(self, action: float) -> dict[str, Any]:
        """Executes an action without scoring the policy that it may complete; returns the step's info."""
        if not math.isfinite(action):
            raise ValueError(f"the action {action} is not a number in [-1, 1]")
        index = len(self._executed)
        if index == len(self.problem.groups):
            raise gymnasium.error.ResetNeeded("the episode is over: every group is decided; call reset()")
        group = self.problem.groups[index]
        wanted = group.snap(width_of(action, group.floor, group.channels))
        width = min(wanted, self.problem.budget.max_width(self._executed, index))
        self._executed.append(width)
        ratio, asked = width / group.channels, action_of(width, group.floor, group.channels)
        return {"group": group.name, "width": width, "keep_ratio": ratio, "action": asked}

    def replay(self, width: int) -> None:
        """Decides the next group as it was decided elsewhere: an allowed width, whatever the budget says of it now."""
        self._executed.append(width)

    def observation(self) -> np.ndarray:
        """What the agent sees now."""
        return self._observer.observe(self._executed)

    @property
    def executed(self) -> tuple[int, ...]:
        """The widths decided so far."""
        return tuple(self._executed)

    def _score(self, info: dict[str, Any]) -> float:
        try:
            outcome = self.problem.evaluate(self._executed)
        except ArithmeticError as error:
            info["failed"] = str(error)
            worst = self.problem.outcome(self._executed, 0.0).reward
            return self._lowest_reward if self._lowest_reward < math.inf else worst
        self._lowest_reward = min(self._lowest_reward, outcome.reward)
        info |= {
            "widths": outcome.widths,
            "accuracy": outcome.accuracy,
            "score": outcome.score,
            "costs": outcome.costs,
            "reward": outcome.reward,
        }
        return float(outcome.reward)


def width_of(action: float, floor: int, channels: int) -> float:
    """The width, not yet rounded, that an action in [-1, 1] asks for."""
    return floor + (channels - floor) * (min(max(action, -1.0), 1.0) + 1) / 2


def action_of(width: float, floor: int, channels: int) -> float:
    """The action in [-1, 1] that asks for a width: the inverse of `width_of`."""
    return 2 * (width - floor) / (channels - floor) - 1 if channels > floor else 1.0
