"""Conversion of frozen dataclasses and diagnostics to JSON and arrays and back, without pickle.

Values are written by the types of their fields. The input may be untrusted: reading creates only
the requested classes, with fields of the declared types, and raises ValueError for anything else.
A diagnostic is read back as an equal object, or as its text if its class has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mechdsl import diagnostics
from mechdsl.base.text import Percent, Source, Span
from mechdsl.diagnostics.core import CODES, Diagnostic
from mechdsl.program.spec import Spec

_TICK = timedelta(microseconds=1)

_MOST_TEXT = 1_000_000

_BY_TEXT: dict[type, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    datetime: ("datetime", datetime.isoformat, datetime.fromisoformat),
    date: ("date", date.isoformat, date.fromisoformat),
    time: ("time", time.isoformat, time.fromisoformat),
    timedelta: ("microseconds", lambda value: str(value // _TICK), lambda text: int(text) * _TICK),
    Decimal: ("decimal", str, Decimal),
    bytes: ("bytes", bytes.hex, bytes.fromhex),
}
"""Types of parquet columns: their tag, conversion to text, and conversion back."""

_OF_TAG = {tag: made for tag, _, made in _BY_TEXT.values()}

_NUMBERS = "biuf"
"""Kinds of numpy's number types: boolean, signed and unsigned integer, float."""


@dataclass
class Attachments:
    """Objects that JSON refers to: arrays, and the texts that contain spans."""

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    sources: list[Source] = field(default_factory=list[Source])
    _names: dict[int, str] = field(default_factory=dict[int, str])

    def add(self, array: NDArray[Any]) -> str:
        """Add an array and return its name; a repeated array is stored once."""
        name = self._names.get(id(array))
        if name is None:
            name = self._names[id(array)] = str(len(self.arrays))
            self.arrays[name] = array  # keeps the array alive and so its id unique
        return name

    def source(self, source: Source) -> int:
        """Add a text and return its number."""
        for number, known in enumerate(self.sources):
            if known is source or (known.text, known.name) == (source.text, source.name):
                return number
        self.sources.append(source)
        return len(self.sources) - 1


class Codec(NamedTuple):
    """Conversion of one type's values to JSON and back."""

    write: Callable[[Any, Attachments], Any]
    read: Callable[[Any, Attachments], Any]


def _type_error(expected: str, data: Any) -> ValueError:
    return ValueError(f"{expected} was expected, not a value of type {type(data).__name__}")


def as_list(data: Any) -> list[Any]:
    """Check for a JSON list; ValueError for anything else."""
    if type(data) is not list:
        raise _type_error("a list", data)
    return cast("list[Any]", data)


def as_object(data: Any) -> dict[str, Any]:
    """Check for a JSON object; ValueError for anything else."""
    if type(data) is not dict:
        raise _type_error("an object", data)
    return cast("dict[str, Any]", data)


# --- self-describing values -----------------------------------------------------------------------


def write_value(value: Any, kept: Attachments) -> Any:
    """Convert any value that a row may contain; ValueError for values that can't be stored."""
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in (str, int, bool, NoneType):
        return value
    if kind is list:
        return [write_value(each, kept) for each in value]
    if kind is tuple:
        return {"tuple": [write_value(each, kept) for each in value]}
    if kind is dict:
        pairs = [[write_value(k, kept), write_value(v, kept)] for k, v in value.items()]
        return {"dict": pairs}
    if kind is Percent:
        return {"percent": write_value(float(value), kept)}
    if kind is Span:
        return {"span": [kept.source(value.source), value.start, value.end]}
    if kind in _BY_TEXT:
        tag, text, _ = _BY_TEXT[kind]
        return {tag: text(value)}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS + "U":
        code = "U" if value.dtype.kind == "U" else value.dtype.str
        return {"numpy": [code, write_value(value.item(), kept)]}
    if isinstance(value, np.ndarray):
        return {"array": kept.add(value)}
    raise ValueError(f"a value of type {kind.__module__}.{kind.__qualname__} can't be stored")


def read_value(data: Any, kept: Attachments) -> Any:
    """Restore a value that `write_value` has converted."""
    kind = type(data)
    if kind is list:
        return [read_value(each, kept) for each in data]
    if kind is not dict:
        return data
    if len(data) != 1:
        raise ValueError("a value has exactly one type")
    ((tag, content),) = data.items()
    if tag in _OF_TAG and type(content) is str and len(content) < _MOST_TEXT:
        return _OF_TAG[tag](content)
    if tag not in _READ:
        raise ValueError(f"there is no value type `{tag}`")
    return _READ[tag](content, kept)


def _read_float(data: Any, kept: Attachments) -> float:
    if data not in ("nan", "inf", "-inf"):
        raise ValueError("a number that JSON supports must be a JSON number")
    return float(data)


def _read_percent(data: Any, kept: Attachments) -> Percent:
    value = read_value(data, kept)
    if type(value) is not float:
        raise _type_error("a number", value)
    return Percent(value)


def _read_dict(data: Any, kept: Attachments) -> dict[Any, Any]:
    pairs = [as_list(pair) for pair in as_list(data)]
    return {read_value(key, kept): read_value(value, kept) for key, value in pairs}


def _read_numpy(data: Any, kept: Attachments) -> Any:
    code, content = as_list(data)
    value = read_value(content, kept)
    if code == "U" and type(value) is str:
        return np.str_(value)
    if type(code) is not str or code[1:2] not in tuple(_NUMBERS) or len(code) > 4:
        raise ValueError("there is no such number type")
    if type(value) not in (bool, int, float):
        raise _type_error("a number", value)
    return np.dtype(code).type(value)


def _read_path(data: Any, kept: Attachments) -> Path:
    if type(data) is not str:
        raise _type_error("a path", data)
    return Path(data)


def _read_array(data: Any, kept: Attachments) -> NDArray[Any]:
    if type(data) is not str or data not in kept.arrays:
        raise ValueError("an array is missing")
    return kept.arrays[data]


def _read_span(data: Any, kept: Attachments) -> Span:
    parts = as_list(data)
    if len(parts) != 3 or any(type(part) is not int for part in parts):
        raise ValueError("a span is the index of a text and two offsets in it")
    number, start, end = parts
    if not 0 <= number < len(kept.sources):
        raise ValueError("a span is in a text that is missing")
    source = kept.sources[number]
    if not 0 <= start <= end <= len(source.text):
        raise ValueError("a span ends after the end of its text")
    return Span(source, start, end)


_READ: dict[str, Callable[[Any, Attachments], Any]] = {
    "float": _read_float,
    "tuple": lambda data, kept: tuple(read_value(each, kept) for each in as_list(data)),
    "dict": _read_dict,
    "percent": _read_percent,
    "span": _read_span,
    "path": _read_path,
    "numpy": _read_numpy,
    "array": _read_array,
}


# --- values of fields -----------------------------------------------------------------------------


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def build_codec(hint: Any) -> Codec:
    """Return the conversion of a type's values.

    Supports dataclasses, tuples, mappings, arrays, literals, optional values (`X | None`), parts
    of a program and, for `Any`, sequences and plain values, everything that `write_value`
    takes.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(origin, "__value__"):  # a type alias, such as `NDArray[…]` since NumPy 2.5
        return build_codec(origin.__value__[args])
    if _is_class(hint, Spec):
        return _spec(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass(hint)
    if origin is tuple and args[1:] == (...,):
        inner = args[0]
        is_repeated = get_origin(inner) is tuple and not _has_arrays(get_args(inner)[0])
        return _repeated(build_codec(inner)) if is_repeated else _tuple(inner)
    if origin is np.ndarray:
        return _array(np.dtype(get_args(args[1])[0]))
    if _is_class(origin, Mapping):
        return _mapping(args[0], build_codec(args[1]))
    if origin in (Union, UnionType) and NoneType in args and len(args) == 2:
        (own,) = (each for each in args if each is not NoneType)
        return _optional(build_codec(own))
    if origin is Literal:
        return _one_of(lambda value: type(value) is str and value in args, str(args))
    if origin in (Union, UnionType):
        return _one_of(lambda value: any(_is(value, each) for each in args), str(hint))
    if hint in (bool, int, float, str) or hint is Path:
        return _one_of(lambda value: _is(value, hint), hint.__name__)
    if hint is Any:
        return Codec(write_value, read_value)
    if _is_class(origin, Sequence):
        return _one_of(lambda value: type(value) in (list, tuple), "a sequence")
    raise TypeError(f"no form for {hint}")


def _is_class(data: Any, kind: type) -> bool:
    return isinstance(data, type) and issubclass(data, kind)


def _is(value: Any, kind: Any) -> bool:
    """Whether a plain value is valid for a field of this type; numpy's numbers are too."""
    if kind is float:
        return isinstance(value, float | int | np.floating) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    return isinstance(value, kind)


def _one_of(fits: Callable[[Any], bool], expected: str) -> Codec:
    def read(data: Any, kept: Attachments) -> Any:
        value = read_value(data, kept)
        if not fits(value):
            raise _type_error(expected, value)
        return value

    return Codec(write_value, read)


def _optional(codec: Codec) -> Codec:
    return Codec(
        lambda value, kept: None if value is None else codec.write(value, kept),
        lambda data, kept: None if data is None else codec.read(data, kept),
    )


def _tuple(inner: Any) -> Codec:
    codec = build_codec(inner)
    if inner in (str, int):  # fast path for many thousands of tokens

        def write_plain(value: Any, kept: Attachments) -> Any:
            plain = all(type(each) is inner for each in value)
            return list(value) if plain else [codec.write(each, kept) for each in value]

        def read_plain(data: Any, kept: Attachments) -> Any:
            plain = all(type(each) is inner for each in as_list(data))
            return tuple(data) if plain else tuple(codec.read(each, kept) for each in data)

        return Codec(write_plain, read_plain)
    return Codec(
        lambda value, kept: [codec.write(each, kept) for each in value],
        lambda data, kept: tuple(codec.read(each, kept) for each in as_list(data)),
    )


def _has_arrays(inner: Any) -> bool:
    """Whether items of a tuple are records with arrays, which can't be compared."""
    hints = get_type_hints(inner) if is_dataclass(inner) else {}
    return any(get_origin(hint) is np.ndarray for hint in hints.values())


def _repeated(codec: Codec) -> Codec:
    """Return a conversion of tuples that stores equal items once, with an index per position."""

    def write(value: Any, kept: Attachments) -> Any:
        known: dict[int, int] = {}  # items of equal positions are the same object
        numbers: dict[Any, int] = {}
        index: list[int] = []
        for each in value:
            if id(each) not in known:
                known[id(each)] = numbers.setdefault(each, len(numbers))
            index.append(known[id(each)])
        return [[codec.write(number, kept) for number in numbers], index]

    def read(data: Any, kept: Attachments) -> Any:
        distinct, index = as_list(data)
        values = [codec.read(each, kept) for each in as_list(distinct)]
        if any(type(n) is not int or not 0 <= n < len(values) for n in as_list(index)):
            raise ValueError("a tuple is missing")
        return tuple(values[n] for n in index)

    return Codec(write, read)


def _array(dtype: np.dtype[Any]) -> Codec:
    def read(data: Any, kept: Attachments) -> Any:
        array = _read_array(data, kept)
        if array.dtype != dtype:
            raise ValueError(f"an array of {dtype} was expected, not of {array.dtype}")
        return array

    def write(value: Any, kept: Attachments) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            raise ValueError(f"an array of {dtype} was expected, not {value!r:.60}")
        return kept.add(value)

    return Codec(write, read)


def _mapping(key: Any, codec: Codec) -> Codec:
    keys = build_codec(key)

    def write(value: Any, kept: Attachments) -> Any:
        if key is str:
            return {str(k): codec.write(v, kept) for k, v in value.items()}
        return [[keys.write(k, kept), codec.write(v, kept)] for k, v in value.items()]

    def read(data: Any, kept: Attachments) -> Any:
        if key is str:
            return {k: codec.read(v, kept) for k, v in as_object(data).items()}
        pairs = [as_list(pair) for pair in as_list(data)]
        return {keys.read(k, kept): codec.read(v, kept) for k, v in pairs}

    return Codec(write, read)


def _dataclass(kind: Any) -> Codec:
    hints = _hints(kind)
    return _record(kind, {each.name: build_codec(hints[each.name]) for each in fields(kind)})


def _spec(kind: type[Spec]) -> Codec:
    # The type of a span has another name there; stored parts contain no syntax trees.
    hints = get_type_hints(kind, localns={"Where": Span})
    span = _one_of(lambda value: type(value) is Span, "a span")
    forms = {name: build_codec(hint) for name, hint in hints.items() if hint is not Span}
    return _record(kind, forms | {"span": span})


def _record(kind: Any, forms: Mapping[str, Codec]) -> Codec:
    needed = {
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }

    def write(value: Any, kept: Attachments) -> Any:
        return {name: form.write(getattr(value, name), kept) for name, form in forms.items()}

    def read(data: Any, kept: Attachments) -> Any:
        given = as_object(data)
        if not needed <= given.keys() <= forms.keys():
            unknown = sorted({*given} ^ {*forms})
            raise ValueError(f"{kind.__name__} has unknown fields: {', '.join(unknown)[:100]}")
        return kind(**{name: forms[name].read(part, kept) for name, part in given.items()})

    return Codec(write, read)


_RECORDED = ("severity", "message", "label_text", "help_text")


class RecordedDiagnostic(Diagnostic):
    """A diagnostic of another version, whose class is missing or has a different text."""

    title = "{message_then}"
    label = "{label_then}"
    help = "{help_then}"
    message_then: str
    label_then: str
    help_then: str


def write_diagnostic(diagnostic: Diagnostic, kept: Attachments) -> dict[str, Any]:
    """Convert a diagnostic: the code of its class, its facts and its texts."""
    facts = {each.name: getattr(diagnostic, each.name) for each in fields(diagnostic)}
    return {
        "code": diagnostic.code,
        **{name: getattr(diagnostic, name) for name in _RECORDED},
        "span": write_value(diagnostic.span, kept),
        "facts": {name: write_value(fact, kept) for name, fact in facts.items() if name != "span"},
    }


def read_diagnostic(data: Any, kept: Attachments) -> Diagnostic:
    """Restore a diagnostic; if its class gives different texts, return the stored texts."""
    parts = as_object(data)
    said = {name: parts[name] for name in ("code", *_RECORDED)}
    if any(type(text) is not str for text in said.values()):
        raise ValueError("the message of a diagnostic must be text")
    span = read_value(parts["span"], kept)
    if span is not None and type(span) is not Span:
        raise ValueError("a diagnostic must have a span")
    facts = {name: read_value(fact, kept) for name, fact in as_object(parts["facts"]).items()}
    made = _rebuild_diagnostic(said, span, facts)
    if made is not None:
        return made
    if said["severity"] != ("warning" if said["code"].startswith("W") else "error"):
        raise ValueError("the severity must be that of the code")
    stands = RecordedDiagnostic(
        span=span,
        message_then=said["message"],
        label_then=said["label_text"],
        help_then=said["help_text"],
    )
    vars(stands)["code"] = said["code"]
    return stands


def _rebuild_diagnostic(
    said: dict[str, str], span: Span | None, facts: dict[str, Any]
) -> Diagnostic | None:
    kind = _diagnostic_classes().get(said["code"])
    if kind is None:
        return None
    if facts.keys() != {each.name for each in fields(kind)} - {"span"}:
        return None
    try:
        made = kind(span=span, **facts)
        return made if all(getattr(made, name) == said[name] for name in _RECORDED) else None
    except Exception:  # texts are formatted with arbitrary facts
        return None


def _diagnostic_classes() -> dict[str, type[Diagnostic]]:
    """Return the classes of all codes."""
    for module in iter_modules(diagnostics.__path__):
        import_module(f"mechdsl.diagnostics.{module.name}")
    return CODES
