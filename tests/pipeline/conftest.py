"""Packages of other versions than are installed, and how many trainings a test of keys has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mechdsl.results import results


@pytest.fixture
def of_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Makes a package be of some version, though versions are looked up once in a process."""
    real = results.version

    def changed(package: str, to: str) -> None:
        monkeypatch.setattr(results, "version", lambda name: to if name == package else real(name))
        results.package_version.cache_clear()

    yield changed
    monkeypatch.undo()
    results.package_version.cache_clear()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def trains_all(request: pytest.FixtureRequest) -> bool:
    """Whether a test of keys trains after each change; otherwise it computes most keys alone."""
    return request.param
