"""What an effect is; the effects of the language are registered in `vocab/effects.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

EffectPart = Callable[[Any, Any, Any], Any]
"""(patched, base, source) of prompts or of means -> the same shape, linear in all three."""


@dataclass(frozen=True, kw_only=True)
class EffectKind:
    """A mean over prompts (`numerator`), or a ratio of two (`denominator`)."""

    name: str
    meaning: str
    formula: str
    numerator: EffectPart
    """Also what the sign-flip test is about."""
    denominator: EffectPart | None = None
    divisor: str = ""
    """The denominator in words of the formula."""
    absolute: bool = False
    """Divide by the denominator's absolute value."""
    tested: bool = True
    """Whether zero means "no effect", so that there is a p."""
    of_intervention: bool = True
    """Whether it depends on the patched run, so that an inert cell has none of it."""
    needs_source: bool = False
    per_prompt_formula: str | None = None
    """Set where `per prompt` (the mean of the ratios) may be written."""
    zero: str | None = None
    one: str | None = None
    """The runs at 0 and 1 of the scale."""
    scale_free: bool = False
    """Without the metric's unit."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The runs whose metric it is made of: of `patched`, `base` and `source`."""
        given = {"patched": 2.0, "base": 3.0, "source": 5.0}
        return tuple(
            name for name in given if isnan(self.of_means(*{**given, name: float("nan")}.values()))
        )

    def of_means(self, patched: Any, base: Any, source: Any) -> Any:
        """The effect of mean metrics, or of single prompts: arrays of any one shape."""
        return self.divide(
            self.numerator(patched, base, source),
            None if self.denominator is None else self.denominator(patched, base, source),
        )

    def divide(self, numerator: Any, denominator: Any) -> Any:
        """The ratio; NaN (never infinite) where the denominator is 0."""
        if denominator is None:
            return numerator
        import numpy as np  # not at the top: `validate` reads the registry of effects only

        divisor = np.abs(denominator) if self.absolute else denominator
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(divisor == 0, np.nan, numerator / divisor)
