"""DDPG as an Optuna sampler: AMC's agent (He et al., ECCV 2018, section 3) on Stable-Baselines3's DDPG.

The agent walks the pruning environment, and the walk's widths are the proposal. What it learns from is never its own
rollout but the finished trials of the study, each walked again with the widths that were evaluated: so it learns
from trials of other processes, of earlier runs and of other strategies alike, and in the order in which they were told.

What differs from Stable-Baselines3's DDPG, all of it in this file:

- actor and critic can have different learning rates (SB3 has one);
- the actor ends in inverted gradients, not in a tanh, which saturates within a few dozen trials for good;
- rewards are scaled by their spread and a moving average is subtracted when they are sampled, not when they are stored
  (AMC's baseline, as it is *now*);
- exploration is truncated-normal noise on the keep ratio, drawn here, decaying an episode at a time;
- AMC bounds actions from above, so that the budget is met. Where policies use the budget up, every other episode bounds
  them from below as well, so that it is used up without scaling: an actor that asks for the floor everywhere would be
  scaled to equal widths each time, be rewarded for these, and never learn what the floor is worth;
- `learn()` is not used: trials come from the study, and each is followed by one `train(k)` call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from amc.problem import Problem
from amc.seeding import seeded, threads
from envs.pruning import PruningEnv, action_of
from search.strategies.base import WidthSampler, fresh, told
from search.strategies.moves import Widths

WIDER = 1.5
"""What the noise grows by with each walk that ended in a known policy: few widths may be worth their latency."""


@dataclass(frozen=True)
class AgentSettings:
    """Hyper-parameters of the agent; AMC's values where the paper or its code gives one, unless said here.

    actor_rate: AMC's code has 1e-4. buffer: transitions; AMC keeps those of its latest episodes alone.
    warmup: episodes of uniformly random actions before the actor proposes; None: a quarter of the trials, at most 100.
    sigma, sigma_end: standard deviation of the noise on the keep ratio, at first and at the last trial.
    updates: gradient steps after each trial, in one call; None: twice as many as there are groups, at least 20.
    critics: of which the lowest counts. actor_delay: critic steps for each of the actor's. target_noise: standard
        deviation and bound of the noise on the target's action.
    """

    hidden: tuple[int, ...] = (300, 300)
    actor_rate: float = 1e-3
    critic_rate: float = 1e-3
    tau: float = 0.01
    gamma: float = 1.0
    batch: int = 64
    buffer: int = 100_000
    warmup: int | None = None
    sigma: float = 0.5
    sigma_end: float = 0.02
    baseline_decay: float = 0.95
    updates: int | None = None
    critics: int = 1
    actor_delay: int = 1
    target_noise: tuple[float, float] = (0.1, 0.0)


TD3 = AgentSettings(critics=2, actor_delay=2, target_noise=(0.2, 0.5))
"""Fujimoto et al., ICML 2018: its three changes to DDPG."""


class BaselineBuffer(ReplayBuffer):
    """A replay buffer whose samples have the current baseline subtracted, in units of the rewards' spread."""

    baseline: float = 0.0
    spread: float = 1.0

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> ReplayBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(rewards=(samples.rewards - self.baseline) / self.spread)


class Agent(DDPG):
    """Stable-Baselines3's DDPG with a learning rate each for actor and critic."""

    rates: tuple[float, float]

    def _update_learning_rate(self, optimizers: Any) -> None:
        for optimizer, rate in zip((self.actor.optimizer, self.critic.optimizer), self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate


class InvertedGradients(torch.nn.Module):
    """Keeps actions in [-1, 1] without saturating: gradients shrink towards the bound they push to, and turn beyond.

    Hausknecht and Stone, ICLR 2016, section 5.1. A tanh that a few early trials have driven to its end has a gradient
    of zero there, and never comes back.
    """

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        """The actions, unchanged."""
        if actions.requires_grad:
            at = actions.detach()
            actions.register_hook(lambda gradient: gradient * torch.where(gradient < 0, 1 - at, 1 + at) / 2)
        return actions


class DDPGSampler(WidthSampler):
    """AMC's agent as a sampler, for our studies and for anyone's: maximize, and suggest each group's width by name.

    problem: what to search. trials: how many are planned; warm-up and noise are scaled to it.
    """

    def __init__(
        self, problem: Problem, *, trials: int = 100, seed: int = 0, settings: AgentSettings | None = None
    ) -> None:
        super().__init__(problem)
        self.settings = settings or AgentSettings()
        self._trials, self._seed = trials, seed
        self._warmup = min(max(trials // 4, 1), 100) if self.settings.warmup is None else self.settings.warmup
        self.updates = self.settings.updates or max(2 * len(problem.groups), 20)
        self._env = PruningEnv(problem)
        self._agent = self._new_agent()
        self._learned: set[int] = set()
        self._rewards: list[float] = []

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """Learns from every finished trial that it has not seen, then walks the environment.

        Where the walk ends in a policy that was proposed before, it walks again, with more and more noise.
        """
        ended = told(study)
        rng = np.random.default_rng([self._seed, trial.number])
        with threads(1):
            for other in ended:
                if other.number not in self._learned:
                    self._learn(other)
            turns = itertools.count()
            known = {widths for other in study.get_trials(deepcopy=False) if (widths := self.policy(other))}
            return fresh(known, lambda: self._walk(len(ended), WIDER ** next(turns), rng))

    def _walk(self, episode: int, wider: float, rng: np.random.Generator) -> Widths:
        """An episode's widths, admitted. wider: a factor of its noise."""
        self._env.reset()
        for index, group in enumerate(self.problem.groups):
            action = self._act(episode, group.floor / group.channels, wider, rng)
            self._env.decide(max(action, self._least(episode, index)))
        return self.problem.admit(self._env.executed)

    def _least(self, episode: int, index: int) -> float:
        """The action below which the later groups, at full, leave budget; -1 in episodes without such a bound."""
        if episode < self._warmup or episode % 2 or not self.problem.spends:
            return -1.0
        group, budget = self.problem.groups[index], self.problem.budget
        least = budget.max_width(self._env.executed, index, rest=budget.dense)
        return action_of(least, group.floor, group.channels)

    def _act(self, episode: int, floor: float, wider: float, rng: np.random.Generator) -> float:
        """An action in [-1, 1]: random in the warm-up, then the actor's with truncated-normal noise on its ratio."""
        if episode < self._warmup:
            return float(rng.uniform(-1, 1))
        action, _ = self._agent.predict(self._env.observation(), deterministic=True)
        scale = 2 * wider * self._sigma(episode) / max(1 - floor, 1e-6)
        return truncated_normal(float(action[0]), scale, rng)

    def _sigma(self, episode: int) -> float:
        """Exponential decay from `sigma` after the warm-up to `sigma_end` at the last planned trial."""
        done = (episode - self._warmup) / max(self._trials - 1 - self._warmup, 1)
        return self.settings.sigma * (self.settings.sigma_end / self.settings.sigma) ** min(done, 1.0)

    def _learn(self, trial: FrozenTrial) -> None:
        """Stores a finished trial's transitions, with the executed actions, and trains once."""
        self._learned.add(trial.number)
        widths = self.policy(trial)
        if trial.state != TrialState.COMPLETE or widths is None:
            return
        assert trial.value is not None
        self._store(widths, trial.value)
        with seeded(self._seed, "train", trial.number):
            self._agent.train(self.updates, self.settings.batch)

    def _store(self, widths: Sequence[int], reward: float) -> None:
        """The final reward goes to every step, as in AMC's code; its moving average is the baseline."""
        buffer = self._agent.replay_buffer
        assert isinstance(buffer, BaselineBuffer)
        decay = self.settings.baseline_decay
        buffer.baseline = decay * buffer.baseline + (1 - decay) * reward if self._rewards else reward
        self._rewards.append(reward)
        buffer.spread = max(float(np.std(self._rewards[-100:])), 1e-6)
        state, _ = self._env.reset()
        for i, (group, width) in enumerate(zip(self.problem.groups, widths, strict=True)):
            action = action_of(width, group.floor, group.channels)
            self._env.replay(width)
            after, last = self._env.observation(), i == len(widths) - 1
            buffer.add(state, after, np.array([[action]]), np.array([reward]), np.array([last]), [{}])
            state = after

    def _new_agent(self) -> Agent:
        s = self.settings
        with seeded(self._seed, "agent"):
            agent = Agent(
                "MlpPolicy",
                self._env,
                buffer_size=s.buffer,
                batch_size=s.batch,
                tau=s.tau,
                gamma=s.gamma,
                replay_buffer_class=BaselineBuffer,
                policy_kwargs={"net_arch": list(s.hidden), "n_critics": s.critics, "optimizer_kwargs": {"fused": True}},
                device="cpu",
            )
            for actor in (agent.actor, agent.actor_target):
                actor.mu[-1] = InvertedGradients()
        agent.rates = (s.actor_rate, s.critic_rate)
        agent.policy_delay = s.actor_delay
        agent.target_policy_noise, agent.target_noise_clip = s.target_noise
        agent.set_logger(Logger(None, []))  # `configure` would leave a folder behind each time
        return agent


def truncated_normal(
    mean: float, sigma: float, rng: np.random.Generator, low: float = -1.0, high: float = 1.0
) -> float:
    """A draw from a normal distribution cut off at [low, high], by inversion of its distribution function."""
    normal = NormalDist(mean, max(sigma, 1e-9))
    quantile = rng.uniform(normal.cdf(low), normal.cdf(high))
    if not 0 < quantile < 1:
        return min(max(mean, low), high)
    return min(max(normal.inv_cdf(quantile), low), high)


def make(problem: Problem, *, trials: int, seed: int) -> DDPGSampler:
    """The sampler."""
    return DDPGSampler(problem, trials=trials, seed=seed)


def td3(problem: Problem, *, trials: int, seed: int) -> DDPGSampler:
    """The same agent with TD3's changes."""
    return DDPGSampler(problem, trials=trials, seed=seed, settings=TD3)
