"""Whole runs that are killed go on to the undisturbed table: a tenth of what
`python -m tests.store.killed_runs` does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .killed_runs import Harness, ends_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def test_killed_runs_go_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    killed = 0
    for number, ends in enumerate(ends_of(harness, 20, seed=1)):
        killed += any(each.killed for each in harness.killed(number, ends))
    assert killed >= 14
