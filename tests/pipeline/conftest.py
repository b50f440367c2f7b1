"""Packages of other versions than are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mechdsl.results import versions


@pytest.fixture
def of_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Makes a package be of some version, though versions are looked up once in a process."""
    real = versions.version

    def changed(package: str, to: str) -> None:
        monkeypatch.setattr(versions, "version", lambda name: to if name == package else real(name))
        versions.version_of.cache_clear()

    yield changed
    monkeypatch.undo()
    versions.version_of.cache_clear()
