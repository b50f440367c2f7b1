"""Fixtures that fake package versions and limit the trainings of key tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mechdsl.results import results


@pytest.fixture
def of_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A function that fakes a package's version, which is otherwise read once per process."""
    real = results.version

    def changed(package: str, to: str) -> None:
        if package == "mechdsl":
            monkeypatch.setattr(results, "__version__", to)
        monkeypatch.setattr(results, "version", lambda name: to if name == package else real(name))
        results.package_version.cache_clear()

    yield changed
    monkeypatch.undo()
    results.package_version.cache_clear()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def trains_all(request: pytest.FixtureRequest) -> bool:
    """Whether a key test trains after each change; otherwise it only computes most keys."""
    return request.param
