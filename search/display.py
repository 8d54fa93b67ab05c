"""What a person sees while it runs: bars on a terminal, plain lines elsewhere, nothing when quiet.

Progress and messages go to standard error, results to standard output. Colours follow rich's rules (NO_COLOR, TERM);
what moves on the screen needs a real terminal, whatever FORCE_COLOR says.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("amc")

Report = Callable[..., None]
"""Called with (done, total, note)."""

EVERY = 10.0
"""Seconds between plain lines where there is no terminal, in the first minutes."""
WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


class Pace:
    """When a plain line is due: every ten seconds at first, then at every tenth of the time passed, up to a minute."""

    def __init__(self) -> None:
        self.start = self._last = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.start

    def due(self) -> bool:
        """Whether a line is due; if so, the next one is later."""
        now = time.monotonic()
        if now - self._last < min(max(EVERY, (now - self.start) / 10), 60):
            return False
        self._last = now
        return True


class _Results(Console):
    """Standard output; where nobody reads on, as in `amc groups | head`, the program ends quietly."""

    def on_broken_pipe(self) -> None:
        """Lets `main` end the program; rich would call it a failure."""
        raise BrokenPipeError


class _Messages(Console):
    """Standard error; where nobody reads on, the run goes on."""

    def on_broken_pipe(self) -> None:
        """Says no more."""
        self.quiet = True


class Display:
    """Where progress, messages and results go.

    quiet: no progress and no messages. json: no table either. verbose: a line for each trial.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet or json
        self.verbose = verbose and not self.quiet
        self.messages = _Messages(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
        self.results = _Results(quiet=json, highlight=False, soft_wrap=True, width=width)

    @property
    def moving(self) -> bool:
        """Whether lines that were printed can be drawn again."""
        file = self.messages.file
        return not self.quiet and self.messages.is_interactive and file.isatty()

    def say(self, text: str) -> None:
        """A message, which the run's log keeps as well."""
        log.info("%s", text)
        self.progress(text)

    def progress(self, text: str) -> None:
        """A line that the next one makes old; on a terminal lines break between words, and elsewhere it is one line."""
        self.messages.print(text, markup=False, soft_wrap=not self.moving)

    def show(self, table: Table | str) -> None:
        """A part of the result."""
        self.results.print(table, markup=False, soft_wrap=isinstance(table, str))

    @contextmanager
    def bar(self, what: str) -> Iterator[Report]:
        """A progress bar while the body runs; the body calls what it is given with (done, total, note)."""
        if self.quiet:
            yield lambda done, total, note="": None
        elif self.moving:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.messages,
            ) as progress:
                task = progress.add_task(what, total=None, note="")
                yield lambda done, total, note="": progress.update(task, completed=done, total=total, note=note)
                progress.live.transient = progress.tasks[task].total is None  # nothing was to be done after all
        else:
            yield self._lines(what)

    def _lines(self, what: str) -> Report:
        """A line now and then, and one at the end of what took its time."""
        pace = Pace()

        def report(done: int, total: int | None, note: str = "") -> None:
            if pace.due() or (done == total and pace.elapsed > 2):
                of = f"/{total}" if total else ""
                self.progress(f"{what}: {done}{of}{', ' + note if note else ''} ({pace.elapsed:.0f} s)")

        return report
