"""Whether code that a run's settings name was named by its user: a file must not choose what we run.

`--model FILE.py:FACTORY` runs code, and it is the command line that may ask for it. When a run starts with a factory,
a note in the user's own folder says so; resuming takes the name from the run's settings only if there is that note.
A run directory from elsewhere has none, and its factory must be given again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import platformdirs

from amc.catalog import DATASETS, LIBRARIES, MODELS
from amc.errors import UsageError
from amc.files import write_atomic


def names_code(option: str, spec: str) -> bool:
    """Whether what `--model` or `--data` names is a factory, which is code to be run.

    option: `model` or `data`. Each is asked by its own rule, since `npz:build` is a file of data, or a module's model.
    """
    source, _, rest = spec.partition(":")
    if option == "data":
        return ":" in spec and source not in DATASETS
    return ":" in spec and spec not in MODELS and not (source in LIBRARIES and rest)


def allow(run: Path, spec: str) -> None:
    """Notes that the user named this factory for this run; without a place for notes, it must be named again."""
    with contextlib.suppress(OSError):
        note = _note(run, spec)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, "")


def allowed(run: Path, spec: str) -> bool:
    """Whether there is such a note."""
    return _note(run, spec).exists()


def check_named(what: str, run: Path, option: str, spec: str, way_out: str) -> None:
    """Raises a UsageError where `spec`, which a file names for an option, is code that no user named for this run."""
    if names_code(option, spec) and not allowed(run, spec):
        raise UsageError(
            f"{what} names code, {spec}, and a file can't make this program run code; if you know it, {way_out}"
        )


def _note(run: Path, spec: str) -> Path:
    source, _, name = spec.rpartition(":")
    place = os.path.abspath(source) if source.endswith(".py") else source
    key = hashlib.sha256(repr((os.path.realpath(run), place, name)).encode("utf-8", "surrogatepass")).hexdigest()
    return Path(platformdirs.user_state_dir("amc-pruning-search")) / "factories" / key[:32]
