"""Which values of a parameter `make test` takes; with the others a test is slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def some(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All values, those slow that aren't among the quick ones."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


def in_turn(
    values: Sequence[Any], others: Sequence[Any], quick: Collection[Any] | None = None
) -> list[Any]:
    """All pairs; each quick value (all, unless they are said) has one of the others that isn't
    slow, and these take turns."""
    each = values if quick is None else quick
    turn = {value: number % len(others) for number, value in enumerate(each)}
    return [
        pytest.param(value, other, marks=() if turn.get(value) == place else pytest.mark.slow)
        for value in values
        for place, other in enumerate(others)
    ]
