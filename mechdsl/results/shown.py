"""How results are shown: by packages above this one, which are called by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mechdsl.base.random_numbers import keeps_random_numbers

AS_TEXT = "mechdsl.show.terminal:as_text"
AS_HTML = "mechdsl.show.notebook:as_html"
AS_CHART = "mechdsl.show.plot:as_chart"
AS_DIFFERENCES = "mechdsl.show.differences:as_text"
AS_JUNIT = "mechdsl.show.junit:as_junit"
AGAINST_AS_TEXT = "mechdsl.show.reports.against:as_text"

LINE_WIDTH = 100
"""Characters of a line of a `repr`."""
MOST_LINES = 5
"""Experiments, or measures, that a `repr` names."""


@keeps_random_numbers
def shown_by(place: str) -> Callable[..., Any]:
    """The function `module:name`, imported now."""
    module, _, name = place.partition(":")
    return keeps_random_numbers(getattr(import_module(module), name))
