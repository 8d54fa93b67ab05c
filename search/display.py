"""What a person sees while it runs: bars on a terminal, plain lines elsewhere, nothing when quiet.

Progress and messages go to standard error, results to standard output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Report = Callable[..., None]
"""Called with (done, total, note)."""

EVERY = 10.0
"""Seconds between plain lines where there is no terminal."""


class Display:
    """Where progress, messages and results go. quiet: no progress and no messages; json: no table either."""

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.quiet = quiet or json
        self.messages = Console(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)
        self.results = Console(quiet=json, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A message."""
        self.messages.print(text, markup=False)

    def show(self, table: Table | str) -> None:
        """A part of the result."""
        self.results.print(table, markup=False, soft_wrap=isinstance(table, str))

    @contextmanager
    def bar(self, what: str) -> Iterator[Report]:
        """A progress bar while the body runs; the body calls what it is given with (done, total, note)."""
        if self.quiet:
            yield lambda done, total, note="": None
        elif self.messages.is_terminal:
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
        else:
            yield self._lines(what)

    def _lines(self, what: str) -> Report:
        """A line now and then, and one at the end."""
        last = start = time.monotonic()

        def report(done: int, total: int | None, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < EVERY and (done != total or now - start < 2):
                return
            last = now
            of = f"/{total}" if total else ""
            self.say(f"{what}: {done}{of}{', ' + note if note else ''} ({now - start:.0f} s)")

        return report
