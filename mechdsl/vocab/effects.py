"""Effects: how the metric of a patched run is compared with the base and source runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

from mechdsl.base.records import Registry

EffectTerm = Callable[[Any, Any, Any], Any]
"""(patched, base, source) of prompts or of means -> the same shape, linear in all three."""


@dataclass(frozen=True, kw_only=True)
class EffectKind:
    """A mean over prompts (`numerator`), or a ratio of two (`denominator`)."""

    name: str
    meaning: str
    formula: str
    numerator: EffectTerm
    """Also what the sign-flip test is about."""
    denominator: EffectTerm | None = None
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


EFFECTS: Registry[EffectKind] = Registry("effect")


def _effect(entry: EffectKind) -> EffectKind:
    return EFFECTS.add(entry.name, entry)


RAW = _effect(
    EffectKind(
        name="raw",
        meaning="the metric of the patched run",
        formula="m(patched)",
        numerator=lambda patched, base, source: patched,
        tested=False,
    )
)

TOTAL = _effect(
    EffectKind(
        name="total",
        meaning="what separates the two runs, without any intervention",
        formula="m(source) − m(base)",
        numerator=lambda patched, base, source: source - base,
        of_intervention=False,
        needs_source=True,
        zero="base run",
    )
)

DELTA = _effect(
    EffectKind(
        name="delta",
        meaning="what the intervention changes",
        formula="m(patched) − m(base)",
        numerator=lambda patched, base, source: patched - base,
        zero="base run",
    )
)

RECOVERY = _effect(
    EffectKind(
        name="recovery",
        meaning="what part of the way from the base to the source run the intervention goes",
        formula="(m(patched) − m(base)) / (m(source) − m(base)), of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: source - base,
        divisor="m(source) − m(base)",
        needs_source=True,
        zero="base run",
        one="source run",
        scale_free=True,
    )
)

RELATIVE = _effect(
    EffectKind(
        name="relative",
        meaning="what the intervention changes, as a part of the base run's value",
        formula="(m(patched) − m(base)) / |m(base)|, of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: base,
        divisor="m(base)",
        absolute=True,
        per_prompt_formula="mean of (m(patched) − m(base)) / |m(base)| over prompts",
        zero="base run",
        scale_free=True,
    )
)
