"""Pytest plugin that measures the processor seconds of tests and writes them to seconds.json.

`make test-seconds` runs it, without the budget of quick.py, which reads the file. Functions that
don't run keep their seconds.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pytest

from .quick import COSTLY, SECONDS, read_seconds

_began = pytest.StashKey[float]()
_measured: defaultdict[str, list[float]] = defaultdict(list)
"""Function → seconds of its tests; only of functions with parameters."""


def read_clock() -> float:
    """Return the processor seconds of this process and of those that it started."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_began] = read_clock()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("seconds", read_clock() - item.stash[_began]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds = dict(report.user_properties).get("seconds")
    function, bracket, _ = report.nodeid.partition("[")
    if bracket and isinstance(seconds, float):
        _measured[function].append(seconds)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        others = {each: s for each, s in read_seconds().items() if each not in _measured}
        text = json.dumps(others | find_costly(_measured), indent=0, sort_keys=True)
        SECONDS.write_text(text + "\n", encoding="utf-8")


def find_costly(measured: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the seconds of one test of each costly function.

    The longest test isn't counted, as it also computed the values that all tests share.
    """
    found: dict[str, float] = {}
    for function, seconds in measured.items():
        if len(seconds) > 1:
            mean = (sum(seconds) - max(seconds)) / (len(seconds) - 1)
            if mean >= COSTLY:
                found[function] = round(mean, 2)
    return found
