"""A small, reproducible part of `python -m tests.fuzz`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import KINDS, case
from .commands import COMMANDS, say, write

SECONDS = 10
"""Processor seconds; five times the limit, as other work on the machine slows it down."""


def check_commands(kind: str, number: int, commands: tuple[str, ...]) -> None:
    with TemporaryDirectory() as folder:
        file = write(case(kind, number), Path(folder))
        for command in commands:
            said = say(command, file)
            assert said.broke is None, f"{command} on {kind} {number}: {said.broke}"
            if command == COMMANDS[0]:
                assert said.seconds < SECONDS, f"{kind} {number}"
                if said.refused or said.long or said.seconds > 1:
                    break


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(number=st.integers(0, 1_000_000))
def test_validate_on_a_hostile_file_reports_or_succeeds(kind: str, number: int) -> None:
    check_commands(kind, number, ("validate",))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(number=st.integers(0, 1_000_000))
def test_each_command_on_a_hostile_file_reports_or_succeeds(kind: str, number: int) -> None:
    check_commands(kind, number, COMMANDS)
