"""What is known of p before anything is measured: how small it can get. No numpy here."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.w07_statistics import TooFewPrompts
from mechdsl.program import spec

EXACT_UP_TO = 14
"""Prompts with a non-zero delta up to which all sign flips are enumerated."""

CORRECTION_NAMES: Mapping[str, str] = {
    "holm": "Holm",
    "bh": "Benjamini-Hochberg",
    "none": "none",
}
"""How `stats correct WORD` is called."""


def check_prompts(
    units: int, tests: int, settings: spec.Statistics, span: Span | None
) -> list[Diagnostic]:
    """W0720 where so few prompts (or groups) leave no p that is small enough."""
    smallest = 2.0 ** (1 - units)
    # Holm multiplies the smallest p by the number of tests; the others may leave it as it is
    corrected = min(1.0, smallest * (tests if settings.correction == "holm" else 1))
    if units > EXACT_UP_TO or tests == 0 or corrected < 1 - settings.confidence / 100:
        return []
    return [
        TooFewPrompts(
            span=span,
            n=units,
            smallest=f"{smallest:.3g}",
            corrected=f"{corrected:.3g}",
            correction=CORRECTION_NAMES[settings.correction],
            cells=tests,
        )
    ]
