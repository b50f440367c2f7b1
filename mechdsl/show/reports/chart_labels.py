"""Texts in charts: how wide they are, and how the labels of an axis find room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any
from unicodedata import east_asian_width

from mechdsl.resolve.cell_key import Coord
from mechdsl.show.reports.grid import numeric, value_text

LABEL_SIZE = 11
"""Of the letters of labels."""
LINE = 13
"""Height of a line of them."""
LABEL_WIDTH = 14
"""Characters per line of a label under a chart."""
MOST_LABEL = 320
"""Width of a label beside a chart, or turned; vega cuts what is longer and says so by `…`."""
SLANTED_FROM = 18
"""Distance of labels from which they are slanted, not upright: closer ones would touch."""
SPLIT = "split(datum.label, '\\n')"
"""How vega breaks labels into lines."""
NARROW, THIN, WIDE = set("ijl.,:;'|! ·"), set("fIrt()[]-/\\"), set("mwMW%@…→")


def text_width(text: str, size: float) -> float:
    """About as wide as Helvetica sets it, in points of the picture; rather more than less."""
    return size * sum(map(_em, text))


def _em(char: str) -> float:
    if char in NARROW:
        return 0.28
    if char in THIN:
        return 0.34
    if char in WIDE or east_asian_width(char) in "WF":
        return 1.0
    return 0.75 if char.isupper() else 0.585


@dataclass(frozen=True)
class ChartLabels:
    """How the values of an axis are written."""

    texts: tuple[str, ...]
    """Per value, in lines."""
    step: float
    """The distance of two values that leaves room for them."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """What an `alt.Axis` is to be told."""


def labels_below(values: Sequence[Coord], step: float, most: float) -> ChartLabels:
    """Labels under a chart whose values are `step` apart.

    Of numbers that don't fit every second, fifth and so on is written. Words are broken into lines
    and get a wider step, up to `most` in all; beyond that they are turned.
    """
    texts = tuple(map(value_text, values))
    widest = max((text_width(text, LABEL_SIZE) for text in texts), default=0.0)
    level: dict[str, Any] = {"labelAngle": 0, "labelLimit": 0}
    if numeric(values) or widest + 8 <= step:
        return ChartLabels(texts, step, {**level, **_thinned(texts, step, widest + 8)})
    lines = [wrap(text, LABEL_WIDTH) or [text] for text in texts]
    broken = max(text_width(line, LABEL_SIZE) for each in lines for line in each) + 8
    if max(step, broken) * len(values) <= most:
        joined = tuple(map("\n".join, lines))
        return ChartLabels(joined, max(step, broken), {**level, "labelExpr": SPLIT})
    step = max(step, LINE + 1)
    angle = -45 if step >= SLANTED_FROM else -90
    return ChartLabels(texts, step, {"labelAngle": angle, "labelLimit": MOST_LABEL})


def labels_beside(values: Sequence[Coord], step: float) -> ChartLabels:
    """Labels to the left of rows that are `step` apart: all words, and as many numbers as fit."""
    texts = tuple(map(value_text, values))
    if not numeric(values):
        return ChartLabels(texts, max(step, LINE), {"labelLimit": MOST_LABEL})
    return ChartLabels(texts, step, _thinned(texts, step, LINE))


def _thinned(texts: Sequence[str], step: float, needed: float) -> dict[str, Any]:
    """Which numbers are written where not all fit: 0, 5, 10 and so on."""
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * step >= needed), len(texts))
    return {} if every == 1 else {"values": list(texts[::every])}
