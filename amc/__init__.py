"""What pruning is: groups, importance, policy, costs, budget, slimming, evaluation, reward, fine-tuning, export.

Names load on first use (PEP 562): importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amc.application import apply, load
    from amc.budget import Budget, Limit
    from amc.errors import AmcError
    from amc.groups import Group, Layer
    from amc.policy import Policy, load_policy
    from amc.problem import Outcome, Problem, Worth

_NAMES = {
    "AmcError": "errors",
    "Budget": "budget",
    "Group": "groups",
    "Layer": "groups",
    "Limit": "budget",
    "Outcome": "problem",
    "Policy": "policy",
    "Problem": "problem",
    "Worth": "problem",
    "apply": "application",
    "load": "application",
    "load_policy": "policy",
}

__all__ = [
    "AmcError",
    "Budget",
    "Group",
    "Layer",
    "Limit",
    "Outcome",
    "Policy",
    "Problem",
    "Worth",
    "apply",
    "load",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module `amc` has no attribute `{name}`")
    return getattr(import_module(f"amc.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
