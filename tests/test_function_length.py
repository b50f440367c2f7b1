"""Functions of the package are short, especially those on the path of one rule."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from .value_path import PACKAGE, long_functions

MAX_CHANGING_FILES = 60

LONG_ON_PATH: set[str] = set()
"""Functions above the limit that the run of one rule calls. Remove entries; don't add any."""

LONG_ELSEWHERE = {
    # Mostly signature and docstring: the documentation of all options is in one place.
    "pipeline/api.py:run",
}
"""The other functions above the limit. Remove entries; don't add any."""


def test_functions_above_the_limit_equal_the_list() -> None:
    found = {name for name, _ in long_functions().values()}
    assert found == LONG_ON_PATH | LONG_ELSEWHERE


@pytest.mark.slow
def test_path_of_one_rule_is_within_limits() -> None:
    command = [sys.executable, "-m", "tests.value_path", "--json"]
    done = subprocess.run(
        command, capture_output=True, cwd=PACKAGE.parent, encoding="utf-8", check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # Both ends of the path and a stage of each kind, so that an empty recording fails.
    assert {
        "syntax/tree_builder.py",
        "program/rules.py",
        "rules/patching.py",
        "planner/plan.py",
        "forward/packed/packed_pass.py",
        "statistics/cell_statistics.py",
        "results/assembly/collection.py",
    } <= found["changing"].keys()
    assert len(found["changing"]) <= MAX_CHANGING_FILES, sorted(found["changing"])
    assert set(found["long"]) == LONG_ON_PATH
