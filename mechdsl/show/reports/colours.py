"""Colours of numbers, and colour scales of maps from the range of their numbers.

Effects diverge from white at 0: blue above, red below, which colour-blind readers distinguish
(ColorBrewer RdBu). Equal distances from 0 have equal strength, and the scale ends where the numbers
end. Metrics without an effect have one colour: shares and probabilities from 0 to 1, others from
their smallest to their largest number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from rich.style import Style

from mechdsl.base.arrays import Floats
from mechdsl.statistics.measurements import MeasureData

Colour = tuple[int, int, int]

NEGATIVE_COLOUR, NEUTRAL_COLOUR, POSITIVE_COLOUR = (178, 24, 43), (247, 247, 247), (33, 102, 172)

MAX_DARK_LUMINANCE = 140
"""Maximum luminance of a background with white text."""

SHARE_UNITS = {"probability", "share", "share of attention", "part"}
"""Units of numbers from 0 to 1."""

NEAR_ZERO = 0.12
"""Distance from 0, as a share of the scale, below which an end of the scale has no label."""


def diverging_colour(value: float, limit: float) -> Colour | None:
    """Return a colour of a diverging scale: white at 0, full colour at `limit` and beyond."""
    if not math.isfinite(value) or limit <= 0:
        return None
    share = min(1.0, abs(value) / limit)
    end = POSITIVE_COLOUR if value > 0 else NEGATIVE_COLOUR
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(NEUTRAL_COLOUR, end, strict=True)
    )
    return red, green, blue


def needs_white_text(background: Colour) -> bool:
    """Whether white text is more legible than black text on a background."""
    return (
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), background, strict=True))
        <= MAX_DARK_LUMINANCE
    )


def cell_style(background: Colour | None) -> Style:
    """Return a style with legible text on a background."""
    if background is None:
        return Style()
    ink = "white" if needs_white_text(background) else "black"
    red, green, blue = background
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


@dataclass(frozen=True)
class ColourScale:
    """A piecewise linear scale."""

    low: float
    high: float
    diverges: bool
    """Whether it is white at 0; otherwise it is white at its low end."""

    @property
    def domain(self) -> list[float]:
        """Numbers that have a given colour, in ascending order."""
        if self.diverges and self.low < 0 < self.high:
            return [self.low, 0.0, self.high]
        return [self.low, self.high]

    def colour(self, value: float) -> Colour | None:
        """Return the colour of a number, None for NaN."""
        if self.diverges:
            return diverging_colour(value, max(-self.low, self.high))
        return diverging_colour(max(0.0, value - self.low), self.high - self.low)

    @property
    def colours(self) -> list[str]:
        """The colours of `domain`, as `#rrggbb`."""
        colours = [self.colour(value) or (0, 0, 0) for value in self.domain]
        return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]

    def is_dark(self, value: float) -> bool:
        """Whether text on the colour is white."""
        colour = self.colour(value)
        return colour is not None and needs_white_text(colour)

    @property
    def labels(self) -> list[float]:
        """The numbers next to the scale: its ends, and 0 if it is between them."""
        near = NEAR_ZERO * (self.high - self.low)
        return [v for v in self.domain if v == 0 or abs(v) >= near or len(self.domain) == 2]


def measure_scale(data: MeasureData, values: Floats) -> ColourScale:
    """Return the scale of a measure's map.

    Args:
        data: The measure, whose effect and unit determine the type of scale.
        values: The numbers of all cells, NaN without one.
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))
    if not len(finite):
        return ColourScale(0.0, 1.0, diverges=False)
    if data.kind == "number" and (data.effect != "raw" or low < 0 < high):
        return effect_scale(low, high)
    if data.unit in SHARE_UNITS and low >= 0 and high <= 1:
        return ColourScale(0.0, 1.0, diverges=False)
    if low == high:
        return effect_scale(low, high)
    return ColourScale(low, high, diverges=False)


def effect_scale(low: float, high: float) -> ColourScale:
    """Return a scale that is white at 0 and ends at the smallest and largest number."""
    low, high = min(0.0, low), max(0.0, high)
    return ColourScale(low, high if high > low else 1.0, diverges=True)


def scale_format(scale: ColourScale) -> str:
    """Return the d3 format of the numbers next to a scale."""
    largest = max(abs(scale.low), abs(scale.high))
    if largest < 0.001:
        return ".1e"
    return ",.0f" if largest >= 100 else ".2~r"
