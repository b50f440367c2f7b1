"""After an internal error, a run repeats its experiments one by one, so that users still get
correct values. In tests, the error is raised instead, unless a test uses `as_shipped`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

from mechdsl.pipeline.computation import FileRun

_WAVE = FileRun.wave


def raise_at_once() -> None:
    """Raise internal errors in the rest of this process."""
    FileRun.wave = FileRun.together


@contextmanager
def as_shipped() -> Generator[None]:
    """Run experiments one by one after an internal error, as in the shipped package."""
    with patch.object(FileRun, "wave", _WAVE):
        yield
