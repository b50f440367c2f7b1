"""Records are dataclasses that are built on first use."""

from __future__ import annotations

import copy
import pickle
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, fields, is_dataclass, replace
from importlib import import_module
from threading import Barrier
from typing import Any

import pytest

from mechdsl import diagnostics
from mechdsl.base.records import Record


class Placed(Record, kw_only=True):
    place: int = field(default=0, compare=False, repr=False)


class Word(Placed):
    text: str
    parts: list[str] = field(default_factory=list[str])


def test_record_fields_are_known_before_the_first_object() -> None:
    class Fresh(Placed):
        text: str

    assert is_dataclass(Fresh)
    assert [f.name for f in fields(Fresh)] == ["place", "text"]


def test_record_subclass_has_its_fields_after_use_of_the_base() -> None:
    assert Placed(place=1).place == 1

    class Late(Placed):
        text: str

    late = Late("a", place=2)
    assert (late.text, late.place) == ("a", 2)
    assert [f.name for f in fields(Late)] == ["place", "text"]


def test_record_equality_hash_repr_and_matching() -> None:
    assert Word("a", place=1) == Word("a", place=2)
    assert Word("a") != Word("b")
    assert Word("a") != Placed()
    assert hash(Placed(place=1)) == hash(Placed(place=2))
    assert repr(Word("a", ["b"], place=3)) == "Word(text='a', parts=['b'])"
    match Word("a"):
        case Word("a", parts):
            assert parts == []
        case _:
            pytest.fail("a record is matched by its fields")


def test_copied_and_pickled_records_are_equal() -> None:
    word = Word("a", ["b"], place=3)
    for same in (copy.copy(word), copy.deepcopy(word), pickle.loads(pickle.dumps(word))):
        assert (same, same.place) == (word, 3)
    assert replace(word, text="c") == Word("c", ["b"])


def test_record_with_invalid_arguments_raises() -> None:
    with pytest.raises(TypeError):
        Word()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Placed(1)  # type: ignore[misc]


def test_first_record_objects_are_created_in_threads() -> None:
    for _ in range(50):

        class Fresh(Placed):
            text: str

        start = Barrier(4)

        def make(text: str, kind: type[Fresh] = Fresh, start: Barrier = start) -> str:
            start.wait()
            return kind(text, place=1).text

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(make, "abcd")) == list("abcd")


def _kinds(base: type[Record]) -> Iterator[type[Record]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_each_record_class_of_the_package_is_a_dataclass() -> None:
    """An invalid definition raises only on first use, so this test uses all."""
    for module in pkgutil.iter_modules(diagnostics.__path__, "mechdsl.diagnostics."):
        import_module(module.name)
    others = ("syntax.ast", "prompts.runs", "resolve.types", "checks.conditions")
    for name in others:
        import_module(f"mechdsl.{name}")
    kinds = [kind for kind in _kinds(Record) if kind.__module__.startswith("mechdsl.")]
    assert len(kinds) > 200
    for kind in kinds:
        assert is_dataclass(kind), kind


def test_record_initializer_takes_positions_names_and_defaults() -> None:
    class Filled(Placed):
        text: str
        number: int = 3
        parts: list[str] = field(default_factory=list[str])
        length: int = field(default=0, init=False)

        def __post_init__(self) -> None:
            self.__dict__["length"] = len(self.parts)

    first, second = Filled("a"), Filled("b", 4, ["c"], place=2)
    assert (first.number, first.parts, first.length, first.place) == (3, [], 0, 0)
    assert (second.number, second.parts, second.length, second.place) == (4, ["c"], 1, 2)
    assert first.parts is not Filled("a").parts
    wrong: list[dict[str, Any]] = [{}, {"text": "a", "other": 1}, {"text": "a", "length": 1}]
    for values in wrong:
        with pytest.raises(TypeError):
            Filled(**values)
