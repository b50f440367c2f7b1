"""Which values of a parameter `make test` takes; with the others a test is slow.

Test modules choose some of them (`some`, `in_turn`); `keep_few_families` limits families of all.
"""

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


FEW = 3
"""Model families of a test that `make test` takes."""
_FIRST = ("llama", "gpt2", "gpt_neox", "gemma2", "gpt_oss")
"""Families that are taken first, as they differ most."""
_EXEMPT = ("tests/reference/",)
"""Tests of the reference, which all others depend on."""
_PARAMETERS = ("family", "name", "model")


def keep_few_families(items: Sequence[pytest.Item], families: Collection[str]) -> None:
    """Mark tests on more than three model families slow, and keep each value of other parameters.

    Args:
        items: All tests that were collected.
        families: Names of model families.
    """
    by_function: dict[tuple[str, str], list[tuple[str, pytest.Item]]] = {}
    for item in items:
        if item.nodeid.startswith(_EXEMPT) or item.get_closest_marker("slow") is not None:
            continue
        parameters = _parameters(item)
        for name in _PARAMETERS:
            family = parameters.get(name)
            if isinstance(family, str) and family.partition(" ")[0] in families:
                function = item.nodeid.partition("[")[0]
                by_function.setdefault((function, name), []).append((family, item))
                break
    for (_, name), tests in by_function.items():
        _keep_few(name, tests)


def _keep_few(name: str, tests: Sequence[tuple[str, pytest.Item]]) -> None:
    values = {
        id(item): {
            (other, repr(value)) for other, value in _parameters(item).items() if other != name
        }
        for _, item in tests
    }
    left = list(dict.fromkeys(family for family, _ in tests))
    taken: set[str] = set()
    covered: set[tuple[str, str]] = set()

    def gain(family: str) -> tuple[int, int]:
        new = set[tuple[str, str]]().union(*(values[id(i)] for f, i in tests if f == family))
        return len(new - covered), -(_FIRST.index(family) if family in _FIRST else len(_FIRST))

    while left and len(taken) < FEW:
        best = max(left, key=gain)
        left.remove(best)
        taken.add(best)
        covered.update(*(values[id(item)] for family, item in tests if family == best))
    for family, item in tests:
        if family not in taken:
            if values[id(item)] <= covered:
                item.add_marker(pytest.mark.slow)
            covered |= values[id(item)]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params
