"""`anchors.json`: the anchors of a run, and those that the runs before it in a sweep handed on."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from amc.documents import read_document
from amc.errors import RunError
from search.run_directory import ANCHORS, RunDirectory

log = logging.getLogger("amc")


class Kept(BaseModel):
    """One anchor as stored. seconds: that the search waited for it; evaluation_seconds: that it took a worker.

    accuracy, reached: after its fine-tune, and as the search scores (the first versions had the accuracy alone).
    score: smoothed, once the search has ended.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    widths: dict[str, int]
    steps: Annotated[int, Field(ge=1)]
    accuracy: float
    reached: float | None = None
    seconds: Annotated[float, Field(ge=0)]
    evaluation_seconds: Annotated[float, Field(ge=0)] | None = None
    score: float | None = None

    @property
    def end(self) -> float:
        """What its fine-tune reached, as the search scores if that is known."""
        return self.accuracy if self.reached is None else self.reached

    @property
    def busy(self) -> float:
        """Seconds of a worker; the first versions noted one time."""
        return self.seconds if self.evaluation_seconds is None else self.evaluation_seconds


class Batch(BaseModel):
    """Policies that were chosen as anchors together, so that after a break the same ones are.

    trials: different policies that were scored by then. half: in the middle of a search; there may be none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    trials: int
    half: bool
    steps: Annotated[int, Field(ge=0)]
    policies: Annotated[tuple[dict[str, int], ...], Field(strict=False)]


class AnchorFile(BaseModel):
    """The file. shared: those of the runs before this one in its sweep, a run each."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    anchors: tuple[Kept, ...] = Field(default=(), strict=False)
    batches: tuple[Batch, ...] = Field(default=(), strict=False)
    shared: tuple[Annotated[tuple[Kept, ...], Field(strict=False)], ...] = Field(default=(), strict=False)

    @classmethod
    def read(cls, directory: RunDirectory) -> AnchorFile:
        """That of a run; empty where there is none, or none that can be read, with a warning."""
        if not (directory / ANCHORS).exists():
            return cls()
        try:
            return read_document(directory / ANCHORS, cls, "run's file", RunError)
        except RunError as error:
            log.warning("%s; it is made again", error)
            return cls()

    def write(self, directory: RunDirectory) -> None:
        """Keeps it in a run, whole or not at all."""
        directory.write_json(ANCHORS, self.model_dump())


def hand_on(source: RunDirectory, target: RunDirectory) -> None:
    """Lets a run that begins learn from the anchors of a finished one, and of those that this one learned from.

    They are sorted by their widths, so that the order in which workers finished changes nothing, not even a last digit.
    """
    found = AnchorFile.read(source)
    scored = (kept for kept in found.anchors if kept.score is not None)
    own = tuple(sorted(scored, key=lambda kept: (sorted(kept.widths.items()), kept.steps)))
    shared = tuple(run for run in (*found.shared, own) if run)
    if shared:
        AnchorFile(shared=shared).write(target)
