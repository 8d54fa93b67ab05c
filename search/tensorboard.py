"""A run's scalars for TensorBoard, by the names that AMC's own code gives them (github.com/mit-han-lab/amc).

They are read off the study, which is the only record of trials: a process that starts writes all that it holds again,
in place of what an earlier one left. So a run that was killed has no gap, and trials of other processes are there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from amc.errors import UsageError
from amc.problem import Problem
from search.strategies.base import told

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raises a UsageError, before anything is trained, unless TensorBoard is there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'amc-pruning-search[tensorboard]'")


class Scalars:
    """`reward/last`, `reward/best`, `info/accuracy`, `info/compress_ratio` and `preserve_rate/i`, by trial from 1.

    `info/compress_ratio` is the share of the dense model's FLOPs that a policy spends, in (0, 1]; `preserve_rate/i` the
    keep ratio of group i, from 0 in forward order. Failed trials and repeats have none; failed ones count.
    """

    def __init__(self, folder: Path, problem: Problem) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if folder.is_dir():
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer: Any = SummaryWriter(str(folder))
        self._problem, self._seen, self._best = problem, set[int](), float("-inf")

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def catch_up(self, study: optuna.Study) -> None:
        """Writes the trials that ended since the last call; those of other processes may end out of order."""
        for trial in told(study):
            if "repeat" not in trial.user_attrs and trial.number not in self._seen:
                self._seen.add(trial.number)
                if trial.value is not None:
                    self._write(trial, trial.value)
        self._writer.flush()

    def _write(self, trial: FrozenTrial, reward: float) -> None:
        problem, attributes = self._problem, trial.user_attrs
        self._best = max(self._best, reward)
        scalars = {"reward/last": reward, "reward/best": self._best, "info/accuracy": attributes["accuracy"]}
        if "flops" in problem.costs:
            dense = problem.costs["flops"]([group.channels for group in problem.groups])
            scalars["info/compress_ratio"] = attributes["flops"] / dense
        for i, group in enumerate(problem.groups):
            scalars[f"preserve_rate/{i}"] = trial.params[group.name] / group.channels
        at = trial.datetime_complete.timestamp() if trial.datetime_complete else None
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, len(self._seen), walltime=at)
