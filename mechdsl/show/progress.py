"""A progress bar on standard error, only where someone watches and only for long work."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """Appears at the first pass; shows rows, speed and what is left."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int, total: int) -> None:
        """Called after every pass with the rows done so far."""
        if not sys.stderr.isatty():
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
                TextColumn("rows"),
                TimeRemainingColumn(),
                console=visible_console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.name, total=total)
        self._progress.update(self._task, completed=done, total=total)
