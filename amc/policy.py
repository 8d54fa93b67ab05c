"""The policy file: which channels each group keeps, as JSON that can be saved, moved, read and applied again.

The format is `amc/policy`, version 1. A reader refuses what it does not understand (another format, a newer version,
unknown or duplicate keys, NaN), since half-understood is misapplied. `width` is what counts and `keep_ratio` is for
reading; `kept` holds the very channels, for the weights that `weights_sha256` names.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amc.documents import read_document
from amc.errors import PolicyError
from amc.files import dump_json, write_atomic

Count = Annotated[int, Field(ge=1, le=2**31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = str | int | float | bool | None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class InputInfo(_Strict):
    """An example input of the model: name, shape at batch 1, dtype such as `float32`."""

    name: str
    shape: list[Annotated[int, Field(ge=0, le=2**31)]]
    dtype: str


class ModelInfo(_Strict):
    """The dense model that the policy was found for."""

    name: str
    inputs: list[InputInfo]
    structure_sha256: Sha256
    weights_sha256: Sha256


class GroupPolicy(_Strict):
    """What one group keeps: `width` of its `channels`, namely `kept` (ascending)."""

    name: str
    kind: str
    channels: Count
    width: Count
    keep_ratio: Annotated[float, Field(ge=0, le=1)]
    kept: list[Annotated[int, Field(ge=0)]] | None = None
    members: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width > self.channels:
            raise ValueError(f"group {self.name!r} keeps {self.width} of {self.channels} channels")
        if self.kept is None:
            return self
        if len(self.kept) != self.width or sorted(set(self.kept)) != self.kept or self.kept[-1] >= self.channels:
            raise ValueError(
                f"`kept` of group {self.name!r} must list {self.width} channels below {self.channels}, ascending"
            )
        return self


class BudgetInfo(_Strict):
    """A limit of the search, and what the policy spends.

    limit: in the cost's unit. fraction: of the dense model. None in a policy file where it comes from a measurement.
    """

    cost: str
    limit: int | float | None
    fraction: float | None
    achieved: int | float | None = None
    met: bool | None = None


class Policy(_Strict):
    """A policy with its provenance. `widths` is the policy itself; `save` writes the file that `load_policy` reads."""

    format: Literal["amc/policy"] = "amc/policy"
    version: Literal[1] = 1
    model: ModelInfo
    groups: list[GroupPolicy]
    importance: str
    budget: list[BudgetInfo] = []
    result: dict[str, Scalar] = {}
    search: dict[str, Scalar] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [group.name for group in self.groups]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"the group {repeated!r} appears twice")
        return self

    @property
    def widths(self) -> dict[str, int]:
        """Group name -> kept channels."""
        return {group.name: group.width for group in self.groups}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy file, whole or not at all; equal policies give equal bytes."""
        write_atomic(path, dump_json(self.model_dump(mode="json", exclude_none=False)))

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        kept = ", ".join(f"{group.name} {group.width}/{group.channels}" for group in self.groups)
        return f"Policy({self.model.name}: {kept})"


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads a policy file.

    Raises:
        PolicyError: it can't be read, or holds anything that version 1 of the format doesn't define.
    """
    return read_document(path, Policy, "policy", PolicyError)
