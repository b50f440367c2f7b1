"""A folder in memory, and a store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechdsl.store.store import Store


@pytest.fixture
def memory() -> Iterator[Path]:
    """Return a folder in memory, where syncs take no time, if the system has one."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="mechdsl-", dir=shared if shared.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def store(memory: Path) -> Iterator[Store]:
    with Store(memory / "store") as opened:
        yield opened
