"""Rendered errors of statistics, expectations and reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source, Span
from mechdsl.checks.conditions import KnownMeasure, KnownNames
from mechdsl.checks.expectations import check_cell_units, check_expectation
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.program import spec
from mechdsl.statistics.cell_statistics import check_denominator
from mechdsl.statistics.measurements import SamplingDesign
from mechdsl.vocab.metrics import EFFECTS
from mechdsl.vocab.reports import check_report

from .synthetic import expectation, statistics

GOLDENS = Path(__file__).parent / "goldens"
TEXT = """mech 1
experiment heads {
  from clean into fewer
  patch layer * head * at last token
  measure logit(answer) - logit(rival) as recovery
}
"""


REPORTS = """mech 1
experiment countscope {
  from fruit into blank
  patch resid_post layer * at last-item token onto slot token
  measure prob(answer) as raw
  measure argmax(1..9) as raw
  report confusion itme by argmax
  report confusion count by prob
  report overlay
}
"""


def span(line: str, text: str = TEXT) -> Span:
    start = text.index(line)
    return Span(Source(text, Path("heads.mech")), start, start + len(line))


@dataclass(frozen=True)
class Measure:
    label: str
    word: str
    kind: str


def reported(kind: str, **values: str) -> list[Diagnostic]:
    """Return the diagnostics of a report in `REPORTS`."""
    words = [kind, values.get("variable", ""), f"by {values['by']}" if "by" in values else ""]
    line = spec.Report(
        span=span(f"report {' '.join(filter(None, words))}", REPORTS), kind=kind, **values
    )
    measures = [
        Measure("prob(answer)", "prob", "number"),
        Measure("argmax(1..9)", "argmax", "category"),
    ]
    return check_report(line, ["layer"], ["count", "item"], measures)


def confusion_rows() -> list[Diagnostic]:
    return reported("confusion", variable="itme", by="argmax")


def confusion_number() -> list[Diagnostic]:
    return reported("confusion", variable="count", by="prob")


def overlay_without_positions() -> list[Diagnostic]:
    return reported("overlay")


def zero_denominator() -> list[Diagnostic]:
    random = np.random.default_rng(0)
    base = random.normal(1, 2, (1, 24))
    source = base + random.normal(0, 1, (1, 24))
    place = span("measure logit(answer) - logit(rival) as recovery")
    sampling = SamplingDesign(24, statistics(), 0)
    return check_denominator(base, source, sampling, place, effect=EFFECTS["recovery"])


def several_measures() -> list[Diagnostic]:
    known = KnownNames(
        [KnownMeasure("ld", "delta"), KnownMeasure("lp", "delta")], ["layer", "head"]
    )
    return check_expectation(expectation("max(delta) > 0.3"), known)


def every_cell() -> list[Diagnostic]:
    known = KnownNames([KnownMeasure("ld", "recovery")], ["layer", "head"])
    return check_expectation(expectation("recovery > 0.3"), known)


def few_prompts() -> list[Diagnostic]:
    return check_cell_units([4] * 16, statistics(), span("heads"))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("E0604", zero_denominator),
        ("E0605", several_measures),
        ("E0606", every_cell),
        ("W0720", few_prompts),
        ("E0607_rows", confusion_rows),
        ("E0607_number", confusion_number),
        ("E0607_overlay", overlay_without_positions),
    ],
)
def test_rendered_error_equals_its_golden(name: str, cause: object, update: bool) -> None:
    assert callable(cause)
    (found,) = cause()
    assert found.code == name.partition("_")[0]
    text = render_full([found])
    path = GOLDENS / f"{name}.err"
    if update:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
