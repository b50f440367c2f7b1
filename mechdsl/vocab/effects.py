"""Effects: how the metric of a patched run is compared with the base and source runs."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any, Literal, TypeAlias

from mechdsl.base.records import Record, Registry, keyword_record

EffectTerm = Callable[[Any, Any, Any], Any]
"""Function of (patched, base, source) values, linear in all three and shape-preserving."""


@keyword_record
class EffectKind(Record):
    """An effect: a mean over prompts (`numerator`), or a ratio of two means (`denominator`)."""

    name: str
    meaning: str
    formula: str
    numerator: EffectTerm
    """Also the quantity that the sign-flip test is applied to."""
    denominator: EffectTerm | None = None
    divisor: str = ""
    """Text of the denominator in the formula."""
    absolute: bool = False
    """Whether to divide by the denominator's absolute value."""
    tested: bool = True
    """Whether zero means "no effect", so that a p-value is defined."""
    of_intervention: bool = True
    """Whether it depends on the patched run, so that it is undefined for an inert cell."""
    needs_source: bool = False
    per_prompt_formula: str | None = None
    """Formula of `per prompt` (the mean of the ratios), if that is permitted."""
    zero: str | None = None
    one: str | None = None
    """Runs at 0 and 1 of the scale."""
    scale_free: bool = False
    """Whether the effect has no unit."""

    @property
    def is_tested_intervention(self) -> bool:
        """Whether it is an effect of the rules that is 0 if they change nothing."""
        return self.of_intervention and self.tested

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the runs that it depends on, among `patched`, `base` and `source`."""
        given = {"patched": 2.0, "base": 3.0, "source": 5.0}
        return tuple(
            name for name in given if isnan(self.of_means(*{**given, name: float("nan")}.values()))
        )

    def of_means(self, patched: Any, base: Any, source: Any) -> Any:
        """Compute the effect from mean metrics or from single prompts: arrays of one shape."""
        return self.divide(
            self.numerator(patched, base, source),
            None if self.denominator is None else self.denominator(patched, base, source),
        )

    def divide(self, numerator: Any, denominator: Any) -> Any:
        """Compute the ratio; NaN (never infinite) where the denominator is 0."""
        if denominator is None:
            return numerator
        import numpy as np  # imported here: `validate` only reads the registry of effects

        divisor = np.abs(denominator) if self.absolute else denominator
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(divisor == 0, np.nan, numerator / divisor)


ControlTitle: TypeAlias = Literal["null", "random", "untrained"]
"""Heading of the effects of a control: "null" for one that the file asks for with `against`;
"random" or "untrained" for those that every experiment with something trained has otherwise."""

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
        meaning="the difference between the two runs, without an intervention",
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
        meaning="the change caused by the intervention",
        formula="m(patched) − m(base)",
        numerator=lambda patched, base, source: patched - base,
        zero="base run",
    )
)

RECOVERY = _effect(
    EffectKind(
        name="recovery",
        meaning="the share of the difference between base and source run that the rules restore",
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
        meaning="the change caused by the intervention, relative to the base run's value",
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
