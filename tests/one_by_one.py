"""A run that breaks off runs its experiments one by one, so that a failure of ours gives the right
numbers all the same. In tests it raises, but where they ask for it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

from mechdsl.pipeline.computation import FileRun

_WAVE = FileRun.wave


def raise_at_once() -> None:
    """Of all that follows in this process."""
    FileRun.wave = FileRun.together


@contextmanager
def as_shipped() -> Generator[None]:
    """Experiments are run one by one where a run of several breaks off."""
    with patch.object(FileRun, "wave", _WAVE):
        yield
