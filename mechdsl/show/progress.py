"""A progress bar on standard error for terminals, notebooks and on request."""

from __future__ import annotations

import sys
from typing import Any


def is_interactive() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    if sys.stderr.isatty():
        return True
    from rich.console import Console

    return Console(stderr=True).is_jupyter


class StepCounter:
    """Joins the steps of several trainings, one after another, into one bar."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._name: str | None = None
        self._before = self._total = 0

    def advance(self, name: str, done: int, steps: int) -> None:
        """Update the bar after a step of the training `name`."""
        if name != self._name:
            self._name, self._before = name, self._total
            self._total += steps
        self._bar.advance(self._before + done, self._total)


class ProgressBar:
    """Appears at the first pass; shows rows, speed and the remaining time."""

    def __init__(self, name: str, *, shown: bool | None = None, unit: str = "rows") -> None:
        """Create a bar; `shown` None shows it only in a terminal or a notebook."""
        self.name = name
        self._unit = unit
        self._shown = shown
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int, total: int) -> None:
        """Update the bar after a pass with the completed rows."""
        if self._shown is None:
            self._shown = is_interactive()
        if not self._shown:
            return
        if self._progress is None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            from mechdsl.show.console import visible_console

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeRemainingColumn(),
                console=visible_console(stderr=True),
                transient=is_interactive(),  # elsewhere one line remains, with the final progress
            )
            self._progress.start()
            self._task = self._progress.add_task(self.name, total=total)
        self._progress.update(self._task, completed=done, total=total)
