"""Regression tests of texts in tables, plans and lost experiments."""

from __future__ import annotations

from functools import cache

import mechdsl
from mechdsl.base.text import Source, Span, count_noun, plural_noun
from mechdsl.diagnostics.experiments import BadControl, NoRowsKept
from mechdsl.results.experiment_result import ExperimentResult, missing_reason

FILE = """mech 1

model toy = zoo("counting")

prompts rows {
  a in 3..9
  part = list("pear", a, sep: " ")
  template "Part 1: {part} Count 1:"
  answer " {a}"
}

prompts others {
  a in 2..8
  part = list("pear", a, sep: " ")
  template "Part 1: {part} Count 1:"
  answer " {a}"
}

experiment e {
  model toy
  prompts rows
  from others into clean
  patch resid_post layer 2..3 at last token
  measure correct as delta
  stats test bootstrap by a correct max
  expect accuracy(others) > 0.5
  expect top 1 contains resid_post layer 2
}
"""


@cache
def found() -> ExperimentResult:
    (result,) = mechdsl.run(FILE).files[0].experiments
    return result


def test_accuracy_of_another_prompt_set_uses_the_answers_of_this_one() -> None:
    said = found().conventions["accuracy"]
    assert said.endswith("; `others` compared with the answers of `rows`")


def test_counted_nouns_have_the_right_plural() -> None:
    assert "over values of a, " in found().conventions["p"]
    assert count_noun(1, "value of a") == "1 value of a"
    assert count_noun(2000, "value of a") == "2,000 values of a"
    assert plural_noun("distinct prompt") == "distinct prompts"
    assert plural_noun("patch of an image") == "patches of an image"


def test_p_of_equal_units_is_that_of_their_signs() -> None:
    """At layer 3 every row gives the answer of the other prompt set, which is never correct."""
    (statistics,) = found().statistics
    assert statistics.mean[1] == -1
    assert statistics.units[1] == 7
    assert statistics.p[1] == 2.0**-6
    assert statistics.p_corrected[1] >= statistics.p[1]


def test_missing_reason_states_its_cause_once() -> None:
    span = Span(Source(FILE), 0, 4)
    assert missing_reason(
        BadControl(span=span, text="random(5)", reason="why not", hint="")
    ).reason == ("`random(5)` can't be drawn: why not")
    kept = missing_reason(NoRowsKept(span=span, rows=12)).reason
    assert kept == "`keep` removes all 12 rows: no row of the clean run meets this condition"
