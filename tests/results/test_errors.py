"""How the errors of statistics, expectations and reports look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.render import render_one
from mechdsl.expectations.check import Known, KnownMeasure, check_expectation
from mechdsl.results.significance import check_prompts
from mechdsl.results.statistics import check_denominator
from mechdsl.source import Source, Span
from mechdsl.vocab.effects import EFFECTS

from .synthetic import expectation, statistics

GOLDENS = Path(__file__).parent / "goldens"
TEXT = """mech 1
experiment heads {
  from clean into fewer
  patch layer * head * at last token
  measure logit(answer) - logit(rival) as recovery
}
"""


def span(line: str) -> Span:
    start = TEXT.index(line)
    return Span(Source(TEXT, Path("heads.mech")), start, start + len(line))


def zero_denominator() -> list[Diagnostic]:
    random = np.random.default_rng(0)
    base = random.normal(1, 2, (1, 24))
    source = base + random.normal(0, 1, (1, 24))
    place = span("measure logit(answer) - logit(rival) as recovery")
    return check_denominator(base, source, statistics(), 0, place, effect=EFFECTS["recovery"])


def several_measures() -> list[Diagnostic]:
    known = Known([KnownMeasure("ld", "delta"), KnownMeasure("lp", "delta")], ["layer", "head"])
    return check_expectation(expectation("max(delta) > 0.3"), known)


def every_cell() -> list[Diagnostic]:
    known = Known([KnownMeasure("ld", "recovery")], ["layer", "head"])
    return check_expectation(expectation("recovery > 0.3"), known)


def few_prompts() -> list[Diagnostic]:
    return check_prompts(4, 16, statistics(), span("heads"))


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("E0604", zero_denominator),
        ("E0605", several_measures),
        ("E0606", every_cell),
        ("W0720", few_prompts),
    ],
)
def test_rendered(code: str, cause: object, request: pytest.FixtureRequest) -> None:
    assert callable(cause)
    (found,) = cause()
    assert found.code == code
    text = render_one(found)
    path = GOLDENS / f"{code}.err"
    if request.config.getoption("--update-goldens", default=False):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
