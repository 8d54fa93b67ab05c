"""Warm start: policies of earlier runs, projected onto this run's budget, are what a study scores first.

They wait in the study as trials whose parameters are fixed, so whoever asks gets them, whatever the strategy; and a
strategy that learns, learns from their scores as from any other's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import optuna
from optuna.trial import TrialState

from amc.errors import RunError, UsageError
from amc.policy import load_policy
from amc.problem import Problem
from amc.registry import suggest
from search.run_directory import POLICY, STUDY
from search.shared import Leases
from search.storage import stored_trials

MOST = 10
"""Policies that are taken from a run: its final one, and the best of its trials."""

log = logging.getLogger("amc")


def warm_start(study: optuna.Study, problem: Problem, sources: Sequence[str], leases: Leases | None = None) -> None:
    """Lets the policies of `sources` (run directories or policy files) wait in a study, unless they once did.

    Raises:
        UsageError: a source is neither, or is of another model. PolicyError, RunError: it can't be read.
    """
    if not sources or "warm_start" in study.user_attrs:
        return
    found = policies(problem, sources)
    with leases.locked() if leases else nullcontext():
        if "warm_start" in study.user_attrs:
            return  # another process was first
        for source, widths in found.items():
            for policy in dict.fromkeys(widths):
                study.enqueue_trial(problem.named(policy), user_attrs={"from": source}, skip_if_exists=True)
        study.set_user_attr("warm_start", list(sources))
    log.info("%d policies of earlier runs are scored first", len(study.get_trials(states=(TrialState.WAITING,))))


def policies(problem: Problem, sources: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """What each source tells this problem; raises what `warm_start` does."""
    return {source: [adapted(problem, widths, source) for widths in read(Path(source))] for source in sources}


def adapted(problem: Problem, widths: Mapping[str, int], source: str) -> tuple[int, ...]:
    """A policy as this problem allows it: groups that it lacks start dense, and it is projected onto the budget."""
    names = [group.name for group in problem.groups]
    if not set(names) & set(widths):
        raise UsageError(
            f"--warm-start {source} is of another model: it has no group {names[0]!r}; {suggest(names[0], widths)}"
        )
    return problem.admit([widths.get(group.name, group.channels) for group in problem.groups])


def read(source: Path) -> list[dict[str, int]]:
    """The widths of a policy file, or of a run's final policy and its best trials, best first.

    Raises:
        UsageError: it is neither. PolicyError, RunError: it can't be read.
    """
    if source.is_file():
        return [load_policy(source).widths]
    if not (source / STUDY).is_file():
        raise UsageError(f"--warm-start {source} is no policy file, and no run directory: there is no {STUDY} in it")
    final = [load_policy(source / POLICY).widths] if (source / POLICY).is_file() else []
    ended = (trial for trial in stored_trials(source / STUDY) if trial.state == TrialState.COMPLETE)
    scored = [trial for trial in ended if trial.value is not None and trial.params]
    ranked = sorted(scored, key=lambda trial: -(trial.value or 0.0))
    if not all(type(width) is int for trial in ranked for width in trial.params.values()):
        raise RunError(f"{source / STUDY} is no study of a run: a parameter in it is no width")
    best = [trial.params for trial in ranked]
    different = {tuple(sorted(widths.items())): widths for widths in [*final, *best]}
    return list(different.values())[:MOST]
