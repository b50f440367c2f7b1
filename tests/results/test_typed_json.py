"""Typed JSON: every value of results round-trips."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typing_extensions import TypeAliasType

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.text import Percent, Source, Span
from mechdsl.results.typed_json import Attachments, build_codec, read_value, write_value

from .exact import equal

SOURCE = Source("mech 1\n", Path("a.mech"))
SPANS = st.integers(0, 7).flatmap(
    lambda end: st.integers(0, end).map(lambda start: Span(SOURCE, start, end))
)
FLOATS = st.floats()
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | FLOATS
    | st.text()
    | FLOATS.map(Percent)
    | FLOATS.map(np.float64)
    | st.floats(width=32).map(np.float32)
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.booleans().map(np.bool_)
    | st.text(st.characters(exclude_characters="\0", codec="utf-8")).map(np.str_)
    | SPANS
    | st.dates()
    | st.datetimes()
    | st.datetimes(timezones=st.just(timezone(timedelta(hours=2))))
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.binary(max_size=5)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def again(written: Any) -> Any:
    """Round-trip through standard JSON text."""
    return json.loads(json.dumps(written, allow_nan=False))


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_row_value_round_trips(value: Any) -> None:
    kept = Attachments()
    equal(value, read_value(again(write_value(value, kept)), kept))


@dataclass(frozen=True)
class Part:
    """Fields of the types that results have."""

    name: str
    count: int
    share: float
    held: bool
    kind: Literal["a", "b"]
    value: float | str | None
    coord: int | float | str
    values: Floats
    numbers: Ints | None
    words: tuple[str, ...]
    hits: tuple[tuple[tuple[int, ...], ...], ...]
    by_id: Mapping[int, str]
    by_name: Mapping[str, Mapping[str, float]]
    rest: Mapping[str, Sequence[Any]]
    path: Path | None = None


@dataclass(frozen=True)
class Whole:
    """Nested dataclasses."""

    parts: tuple[Part | None, ...]
    one: Part | None = None


SMALL = st.integers(0, 3)
REALS = FLOATS | FLOATS.map(np.float64) | FLOATS.map(Percent)
PARTS = st.builds(
    Part,
    name=st.text(),
    count=st.integers() | st.integers(-9, 9).map(np.int64),
    share=REALS,
    held=st.booleans() | st.booleans().map(np.bool_),
    kind=st.sampled_from(["a", "b"]),
    value=REALS | st.text() | st.none(),
    coord=REALS | st.integers() | st.text(),
    values=arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, min_side=0)),
    numbers=st.none() | arrays.arrays(np.int64, st.tuples(SMALL, SMALL)),
    words=st.lists(st.text()).map(tuple),
    hits=st.lists(st.lists(st.lists(SMALL, max_size=2).map(tuple), max_size=2).map(tuple)).map(
        tuple
    ),
    by_id=st.dictionaries(st.integers(), st.text()),
    by_name=st.dictionaries(st.text(), st.dictionaries(st.text(), REALS)),
    rest=st.dictionaries(st.text(), st.lists(VALUES, max_size=2), max_size=2),
    path=st.none() | st.just(Path("a/b")),
)
WHOLES = st.builds(Whole, st.lists(st.none() | PARTS, max_size=2).map(tuple), st.none() | PARTS)


@settings(max_examples=30, deadline=None)
@given(WHOLES)
def test_dataclass_round_trips(whole: Whole) -> None:
    form, kept = build_codec(Whole), Attachments()
    equal(whole, form.read(again(form.write(whole, kept)), kept))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "numpy", "span", "array", "percent", "path", "float"])
            | st.text(max_size=3),
            inner,
            max_size=2,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_json_reads_as_a_value_or_a_plain_error(found: Any) -> None:
    kept = Attachments({"0": np.zeros(2)}, [SOURCE])
    with suppress(ValueError, TypeError, OverflowError):  # archives convert these errors
        read_value(found, kept)


@given(st.text(), st.text(max_size=5))
def test_array_with_an_unknown_name_is_rejected(name: str, other: str) -> None:
    with pytest.raises(ValueError, match="missing"):
        read_value({"array": name}, Attachments({name + other + "x": np.zeros(1)}))


def test_identical_array_is_stored_once() -> None:
    kept, one = Attachments(), np.arange(3.0)
    form = build_codec(tuple[Floats, ...])
    written = form.write((one, one, one.copy()), kept)
    assert len(kept.arrays) == 2
    a, b, _ = form.read(written, kept)
    assert a is b


def test_equal_tuples_are_stored_once() -> None:
    form, kept = build_codec(tuple[tuple[tuple[int, ...], ...], ...]), Attachments()
    cells = (((1, 2), (3,)),) * 1000 + (((4,),),)
    written = form.write(cells, kept)
    assert len(json.dumps(written)) < 5000
    found = form.read(again(written), kept)
    assert found == cells
    assert found[0] is found[999]


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (int, [True, 1.0, "1", None]),
        (float, [True, "1", None]),
        (bool, [1, 0, None, "true"]),
        (str, [1, None, b"a"]),
        (Path, ["a"]),
        (Literal["a", "b"], ["c", 1, None]),
        (float | str | None, [(), [1]]),
        (Sequence[Any], ["abc", 1, {"dict": []}]),
    ],
)
def test_value_of_another_type_is_rejected(hint: Any, values: list[Any]) -> None:
    form = build_codec(hint)
    for value in values:
        with pytest.raises(ValueError, match=r"was expected|can't be stored"):
            form.read(write_value(value, Attachments()), Attachments())


def test_numbers_round_trip_exactly() -> None:
    for value in (0.1 + 0.2, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1e308, 2**200, -1):
        found = read_value(again(write_value(value, Attachments())), Attachments())
        equal(value, found)


def test_codec_accepts_a_type_alias_of_numpy_arrays() -> None:
    """As `NDArray` is since NumPy 2.5, which needs Python 3.12."""
    scalar = TypeVar("scalar", bound=np.generic)
    alias = TypeAliasType("alias", np.ndarray[Any, np.dtype[scalar]], type_params=(scalar,))
    codec = build_codec(alias[np.float64])
    kept = Attachments()
    values = np.array([1.5, np.nan])
    read = codec.read(codec.write(values, kept), kept)
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, values)
