"""Which tests `thin_out` leaves to `make test`."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import pytest

from .quick import BUDGET, SHARE, thin_out
from .seconds import find_costly

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")
FUNCTION = "tests/test_it.py::test_it"
MODES = ("planned", "plain", "small passes")


class Item:
    """A test as `thin_out` reads it."""

    def __init__(self, marks: list[tuple[str, ...]], **parameters: Any) -> None:
        self.nodeid = f"{FUNCTION}[case]"
        self.callspec = self
        self.params = parameters
        self.marks = [pytest.mark.parametrize(names, []).mark for names in marks]
        self.is_slow = False

    def get_closest_marker(self, name: str) -> object:
        return self.is_slow or None

    def iter_markers(self, name: str) -> list[Any]:
        return self.marks

    def add_marker(self, mark: Any) -> None:
        self.is_slow = True


def thinned(items: list[Item], seconds: float | None = None) -> list[dict[str, Any]]:
    thin_out(cast(Any, items), FAMILIES, {} if seconds is None else {FUNCTION: seconds})
    return [item.params for item in items if not item.is_slow]


def test_product_of_families_and_modes_keeps_two_families_and_each_mode() -> None:
    marks = [("family",), ("mode",)]
    left = thinned([Item(marks, family=f, mode=m) for f, m in product(FAMILIES, MODES)])
    assert {each["mode"] for each in left} == {*MODES}
    assert len({each["family"] for each in left}) == 2
    assert len(left) == len(MODES)


def test_product_of_families_only_keeps_one_family() -> None:
    assert len(thinned([Item([("family",)], family=each) for each in FAMILIES])) == 1


def test_table_of_cases_keeps_each_case() -> None:
    """The second and the third case have only values that other cases also have."""
    cases = [("patch", 1), ("patch", 2), ("zero", 1), ("zero", 2)]
    marks = [("rule", "layer"), ("mode",)]
    items = [Item(marks, rule=r, layer=n, mode=m) for (r, n), m in product(cases, MODES)]
    left = thinned(items)
    assert [(each["rule"], each["layer"]) for each in left] == cases
    assert {each["mode"] for each in left} == {*MODES}


def test_family_with_a_unique_value_is_kept() -> None:
    items = [Item([("family", "at")], family=f, at=f) for f in FAMILIES]
    assert len(thinned(items)) == len(FAMILIES)


def test_objects_are_distinguished_by_identity() -> None:
    objects, marks = [object(), object()], [("family",), ("build",)]
    left = thinned([Item(marks, family=f, build=o) for o, f in product(objects, FAMILIES)])
    assert [id(each["build"]) for each in left] == [id(each) for each in objects]


def test_product_of_two_parameters_keeps_each_value() -> None:
    items = [Item([("a",), ("b",)], a=a, b=b) for a, b in product(range(3), range(4))]
    left = thinned(items)
    assert {each["a"] for each in left} == {*range(3)}
    assert {each["b"] for each in left} == {*range(4)}
    assert len(left) == 4


def test_table_of_cases_without_families_and_modes_is_whole() -> None:
    items = [Item([("a", "b")], a=a, b=b) for a, b in product(range(3), range(4))]
    assert len(thinned(items)) == 12


def test_small_product_without_families_and_modes_is_whole() -> None:
    items = [Item([("a",), ("b",)], a=a, b=b) for a, b in product(range(2), range(2))]
    assert len(thinned(items)) == 4


def test_function_over_budget_keeps_cases_of_its_whole_list() -> None:
    items = [Item([("a",)], a=a) for a in range(40)]
    left = [each["a"] for each in thinned(items, BUDGET / 16)]
    assert len(left) == 16
    assert [sum(a // 10 == part for a in left) for part in range(4)] == [4, 4, 4, 4]


def test_function_over_budget_keeps_each_value_first() -> None:
    pairs = [(0, 0), (0, 1), (1, 1), (1, 0)]
    items = [Item([("a", "b")], a=a, b=b) for a, b in pairs]
    left = thinned(items, BUDGET / 2)
    assert [(each["a"], each["b"]) for each in left] == [(0, 0), (1, 1)]


def test_function_whose_test_exceeds_the_budget_keeps_one() -> None:
    assert len(thinned([Item([("a",)], a=a) for a in range(3)], 2 * BUDGET)) == 1


def test_function_over_budget_keeps_a_share_of_a_long_list() -> None:
    items = [Item([("a",)], a=a) for a in range(5 * SHARE)]
    assert len(thinned(items, 2 * BUDGET)) == 5


def test_function_within_its_budget_is_whole() -> None:
    assert len(thinned([Item([("a",)], a=a) for a in range(3)], BUDGET / 3)) == 3


def test_find_costly_excludes_the_longest_test() -> None:
    measured = {"shares": [3.0, 0.01, 0.01], "costly": [0.5, 0.4, 0.6], "single": [9.0]}
    assert find_costly(measured) == {"costly": 0.45}
