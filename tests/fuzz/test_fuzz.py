"""A small part of what `python -m tests.fuzz` does, the same at each run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import KINDS, case
from .commands import COMMANDS, say, write

SECONDS = 10
"""Of the processor, which other work on the machine makes slower too: five times the bound."""


def hold(kind: str, number: int, commands: tuple[str, ...]) -> None:
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
def test_a_diagnostic_or_success(kind: str, number: int) -> None:
    hold(kind, number, ("validate",))


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
def test_every_command(kind: str, number: int) -> None:
    hold(kind, number, COMMANDS)
