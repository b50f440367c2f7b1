"""Bit-for-bit comparison of values: types, order, arrays and NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.results.results import Results


def equal(a: Any, b: Any, at: str = "") -> None:
    """Assert that two values are equal; the message has the path of the first difference."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        assert list(a) == list(b), at
        for key in a:
            assert [type(k) for k in a] == [type(k) for k in b], at
            equal(a[key], b[key], f"{at}[{key!r}]")
        return
    assert type(a) is type(b), (at, type(a), type(b))
    if isinstance(a, Span):
        assert (a.start, a.end, a.text) == (b.start, b.end, b.text), at
        assert (a.source.name, a.source.text) == (b.source.name, b.source.text), at
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), at
        assert a.tobytes() == b.tobytes(), at
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{at}[{n}]")
    elif is_dataclass(a) and not isinstance(a, type):
        for each in fields(a):
            equal(getattr(a, each.name), getattr(b, each.name), f"{at}.{each.name}")
    elif isinstance(a, float | np.floating):
        same = np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert same or (math.isnan(a) and math.isnan(b)), (at, a, b)
    else:
        assert a == b, (at, a, b)


def shown(results: Results) -> list[str]:
    """Return every output of results except pictures."""
    found = [results.to_json(), results.to_csv(), repr(results), results.profile]
    found += [results.to_text(width) for width in (60, 100, 200)]
    found += [repr(each.records()) for each in results]
    found += [repr(each.run_intervals) for each in results if each.settings]
    found += [results.diagnostics.render(form) for form in ("full", "json", "github", "sarif")]
    return found


def same_results(a: Results, b: Results) -> None:
    """Assert that two results are equal bit for bit."""
    for name in ("files", "versions", "written", "profile"):
        equal(getattr(a, name), getattr(b, name), name)
    assert len(a.diagnostics) == len(b.diagnostics)
    for x, y in zip(a.diagnostics, b.diagnostics, strict=True):
        same_diagnostic(x, y)
    assert shown(a) == shown(b)


def same_diagnostic(a: Diagnostic, b: Diagnostic) -> None:
    """Assert that two diagnostics have equal facts and texts."""
    assert type(a) is type(b)
    equal(
        {f.name: getattr(a, f.name) for f in fields(a)},
        {f.name: getattr(b, f.name) for f in fields(b)},
    )
    for name in ("code", "severity", "message", "label_text", "help_text"):
        assert getattr(a, name) == getattr(b, name)
