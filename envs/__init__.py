"""The Gymnasium environment: layers as steps, keep ratios as actions. Importing this package registers it."""

from __future__ import annotations

import gymnasium

from envs.pruning import PruningEnv

__all__ = ["ENV_ID", "PruningEnv"]

ENV_ID = "amc/Pruning-v0"

gymnasium.register(ENV_ID, entry_point="envs.pruning:PruningEnv")
