"""Choice of parameter values for `make test`; tests with other values are marked slow.

Test modules choose values with `some` and `in_turn`; `thin_out` limits those of all modules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest


def some(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All values; those that aren't quick are marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


def in_turn(
    values: Sequence[Any], others: Sequence[Any], quick: Collection[Any] | None = None
) -> list[Any]:
    """All pairs; each quick value (by default, all values) has one pair that isn't slow, with the
    other values in turn."""
    each = values if quick is None else quick
    turn = {value: number % len(others) for number, value in enumerate(each)}
    return [
        pytest.param(value, other, marks=() if turn.get(value) == place else pytest.mark.slow)
        for value in values
        for place, other in enumerate(others)
    ]


FEW = 2
"""Number of model families in `make test` for tests with further parameters; other tests: one."""
PRODUCT = 6
"""Minimum number of tests for which a product of parameters without a family is thinned."""
BUDGET = 0.5
"""Processor seconds that `make test` spends on one function's parameters."""
SHARE = 3
"""A function over its budget has at least one in so many of its tests."""
COSTLY = 0.1
"""Minimum seconds of a test for which its function has a budget."""
SECONDS = Path(__file__).with_name("seconds.json")
"""Seconds of one test, by function; `make test-seconds` measures them."""
_FIRST = ("llama", "gpt2", "gpt_neox", "gemma2", "gpt_oss", "t5", "bart")
"""Families that differ most; files, and tests with a single family, begin with different ones."""
_EXEMPT = ("tests/reference/",)
"""Tests of the reference, which all others depend on."""
_UNLIMITED = ("tests/test_examples.py", "tests/systems/", "tests/cli/test_guides.py")
"""Tests of files that users read, which have no budget: each file is one test."""
_FAMILY = ("family", "name", "model")
"""Names of parameters whose values are model families."""
_MODE = "mode"
"""Name of the parameter whose values are combinations of the planner's passes."""

Value = tuple[str, str]
"""A parameter, or the parameters of one table of cases, with its value as text, or with its `id` if
it is another object, as a product contains the same object several times."""


def read_seconds() -> dict[str, float]:
    """Return the seconds of one test of each function that has a budget."""
    return json.loads(SECONDS.read_text(encoding="utf-8"))


def thin_out(
    items: Sequence[pytest.Item], families: Collection[str], seconds: Mapping[str, float]
) -> None:
    """Mark tests slow that repeat others on more families, in more combinations or over budget.

    - A test function has one family if it has no other parameter. Otherwise it has at most `FEW`,
      unless a further one alone has a value of another parameter.
    - In a product with families or modes, each value of a parameter has a test; families and modes
      take turns.
    - In any other product of at least `PRODUCT` tests, each value has a test; if it has more than
      two parameters, each pair of values of two parameters has one.
    - Of what is left, a function has as many tests as its budget allows, but one at least, and one
      in `SHARE` of a long list: those with the most values of parameters that others don't have,
      spread over their list.

    Args:
        items: All tests that were collected.
        families: Names of model families.
        seconds: Seconds of one test, by function.
    """
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        fast = item.get_closest_marker("slow") is None and not item.nodeid.startswith(_EXEMPT)
        if fast and _parameters(item):
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for function, tests in by_function.items():
        name = next((name for name in _FAMILY if _is_family(tests, name, families)), None)
        left = tests
        if name is not None:
            left = _mark_others(left, _few_families(left, name))
        if name is not None or _MODE in _parameters(left[0]):
            left = _mark_others(left, _each_value(left, name))
        else:
            left = _mark_others(left, _pairs(left))
        if function in seconds and not function.startswith(_UNLIMITED):
            most = max(1, len(left) // SHARE, int(BUDGET / seconds[function]))
            _mark_others(left, _spread(left, most))


def _mark_others(tests: list[pytest.Item], taken: Collection[int]) -> list[pytest.Item]:
    """Mark tests slow except for those taken, by `id`; returns these."""
    for item in tests:
        if id(item) not in taken:
            item.add_marker(pytest.mark.slow)
    return [item for item in tests if id(item) in taken]


def _is_family(tests: Sequence[pytest.Item], name: str, families: Collection[str]) -> bool:
    values = [_parameters(item).get(name) for item in tests]
    return all(isinstance(v, str) and v.partition(" ")[0] in families for v in values)


def _few_families(tests: Sequence[pytest.Item], name: str) -> set[int]:
    others = {id(item): {each for each in _values(item) if each[0] != name} for item in tests}
    by_family: dict[str, list[pytest.Item]] = {}
    for item in tests:
        by_family.setdefault(_parameters(item)[name], []).append(item)
    taken, covered = set[int](), set[Value]()
    few = FEW if any(others.values()) else 1
    start = crc32(tests[0].nodeid.partition("[" if few == 1 else "::")[0].encode()) % len(_FIRST)
    first = (*_FIRST[start:], *_FIRST[:start])

    def gain(family: str) -> tuple[int, int]:
        new = set[Value]().union(*(others[id(item)] for item in by_family[family])) - covered
        kind = family.removesuffix(" writing")
        return len(new), -(first.index(kind) if kind in first else len(first))

    for _ in range(min(few, len(by_family))):
        best = by_family.pop(max(by_family, key=gain))
        taken |= {id(item) for item in best}
        covered |= set[Value]().union(*(others[id(item)] for item in best))
    for item in tests:
        if not others[id(item)] <= covered:
            taken.add(id(item))
            covered |= others[id(item)]
    return taken


def _each_value(tests: Sequence[pytest.Item], name: str | None) -> set[int]:
    values = {id(item): _values_and_cases(item, name) for item in tests}
    covered, counts = set[Value](), Counter[Value]()

    def gain(item: pytest.Item) -> tuple[int, int]:
        own = values[id(item)]
        turns = sum(counts[each] for each in own if each[0] in (name, _MODE))
        return len(own - covered), -turns

    def take(item: pytest.Item) -> None:
        covered.update(values[id(item)])
        counts.update(values[id(item)])

    return _cover(tests, gain, take)


def _pairs(tests: Sequence[pytest.Item]) -> set[int]:
    if len(tests) < PRODUCT:
        return {id(item) for item in tests}
    if len(_parameters(tests[0])) < 3:
        return _each_value(tests, None)
    pairs = {id(item): {*combinations(sorted(_values(item)), 2)} for item in tests}
    covered = set[tuple[Value, ...]]()
    return _cover(
        tests,
        lambda item: (len(pairs[id(item)] - covered), 0),
        lambda item: covered.update(pairs[id(item)]),
    )


def _spread(tests: Sequence[pytest.Item], most: int) -> set[int]:
    """Choose at most this number of tests."""
    golden = 0.618034  # multiples of it, without their integers, spread over any list
    order = sorted(range(len(tests)), key=lambda number: number * golden % 1)
    mixed = [tests[number] for number in order]
    covered = set[Value]()

    def take(item: pytest.Item) -> None:
        covered.update(_values(item))

    first = _cover(mixed, lambda item: (len(_values(item) - covered), 0), take, most)
    rest = [id(item) for item in mixed if id(item) not in first]
    return {*first, *rest[: most - len(first)]}


def _cover(
    tests: Sequence[pytest.Item],
    gain: Callable[[pytest.Item], tuple[int, int]],
    take: Callable[[pytest.Item], object],
    most: int | None = None,
) -> set[int]:
    """Take the test with the largest gain, the first of equal ones, while it covers anything new.

    Args:
        gain: What a test covers anew, and what decides between equals. Neither grows when other
            tests are taken, so only tests that were best by an old gain are looked at again.
        take: Counts a test as taken.
        most: Maximum number of tests.

    Returns:
        The tests taken, by `id`.
    """
    queue = [(*(-each for each in gain(item)), number) for number, item in enumerate(tests)]
    heapify(queue)
    taken = set[int]()
    while queue and len(taken) != most:
        item = tests[queue[0][-1]]
        new, other = gain(item)
        if (entry := (-new, -other, queue[0][-1])) > queue[0]:
            heapreplace(queue, entry)
        elif new:
            take(item)
            taken.add(id(item))
            heappop(queue)
        else:
            break
    return taken


def _values(item: pytest.Item) -> set[Value]:
    return {
        (name, repr(value) if isinstance(value, str | int | float) else f"object {id(value)}")
        for name, value in _parameters(item).items()
    }


def _values_and_cases(item: pytest.Item, family: str | None) -> set[Value]:
    """Return the values of a test's parameters; those of one table are one value, its case."""
    found = dict(_values(item))
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = [each.strip() for each in names.split(",")] if isinstance(names, str) else names
        if family not in names:
            found[",".join(names)] = str([found.pop(each) for each in names])
    return {*found.items()}


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params
