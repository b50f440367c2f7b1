"""Syntax errors are reported without consequential errors."""

from __future__ import annotations

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.syntax import UnknownWord

FILE = """mech 1

model m = zoo("counting")

metric speed = prob(answer)

prompts p {
  n in 1..9
  item in ["apple", "pear", "fig"]
  template "Part {n}: {item} Count 1:"
  answer " {n}"
}

experiment e {
  prompts p
  ablate z layer 0 head 0 at last token with zero
  measure speed as delta
  expect mean(speed) > 0
  expect accuracy(clean) > 0
}
"""
OPEN = ("prob(answer)", "prob(answer")

CASES: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "a metric that is measured": ([OPEN], ["E0103"]),
    "a metric, and a rule beside its measure": (
        [OPEN, ("with zero", "with")],
        ["E0103", "E0101"],
    ),
    "a placeholder in a text without an end": ([("{n}: {item} Count 1:\"", "{n")], ["E0105"]),
    "the measure of an expectation": (
        [("measure speed as delta", "measure speed as delta measure logit(answer as raw")],
        ["E0103"],
    ),
    "a rule whose axis is reported": (
        [
            ("  expect mean", "  report heatmap position by layer\n  expect mean"),
            ("ablate z layer 0", "ablate z layer 1..2 ("),
        ],
        ["E0103", "E0101"],
    ),
    "an answer that is misspelt and never closed": (
        [('answer " {n}"', 'anwser {n}"')],
        ["E0102", "E0105"],
    ),
    "a line of prompts that may be the answer": ([('answer " {n}"', 'swer " {n}"')], ["E0101"]),
    "the number that an order needs": (
        [
            ("measure speed as delta", "measure argmax(1..9) as raw measure prob(answer as raw"),
            ("expect mean(speed) > 0", "expect top 3 contains L0H0"),
        ],
        ["E0103"],
    ),
    "a value of the prompts that a table goes by": (
        [
            ("  n in 1..9\n", "  n in 1..9\n  colour 3\n"),
            ("  expect m", "  report table by colour\n  expect m"),
        ],
        ["E0101"],
    ),
    "the same beside a line of the experiment that can't be read": (
        [
            ("  n in 1..9\n", "  n in 1..9\n  colour 3\n"),
            ("  expect m", "  report table by colour\n  report heatmap ]\n  expect m"),
        ],
        ["E0101", "E0101"],
    ),
    "the axis of a loop": (
        [
            ("  ablate z layer 0 head 0", "  loop k in 0..2 {\n  ablate z layer 0 head 0"),
            ("with zero\n", "with zero }\n  report lines k\n"),
        ],
        ["E0101"],
    ),
    "the answer that an accuracy needs": ([('" {n}"', '{n}" "')], ["E0101"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_syntax_error_causes_no_consequential_errors(
    case: tuple[list[tuple[str, str]], list[str]],
) -> None:
    text = FILE
    for right, wrong in case[0]:
        assert right in text
        text = text.replace(right, wrong)
    found = [d for d in check_source(Source(text)).diagnostics if d.severity == "error"]
    assert [d.code for d in found] == case[1], [d.message for d in found]


def test_error_unrelated_to_a_lost_line_is_reported() -> None:
    right, wrong = "  expect mean", "  report table by nothing\n  report heatmap ]\n  expect mean"
    found = check_source(Source(FILE.replace(right, wrong))).diagnostics
    assert "E0607" in {d.code for d in found}


def test_keyword_of_a_lost_line_is_not_a_misspelt_axis() -> None:
    """The lost line may define an axis, but its `measure` doesn't make `feature` one."""
    text = FILE.replace("as delta\n", "as delta\n  measure entropy as as raw\n")
    text = text.replace("mean(speed)", 'delta(measure: "speed")')
    found = [d for d in check_source(Source(text)).diagnostics if isinstance(d, UnknownWord)]
    assert [d.hint for d in found] == ["its axes can be `from_position`, `item`, `position`"]
