"""Negative numbers that select a cell, and loops that only select members of a direction."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source

FILE = """
mech 1

param n = 2
model toy = zoo("counting")

prompts fruit {{
  count in 2..5
  item in ["apple", "pear"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
  corrupt other {{ item = other(item) }}
}}

direction d = mean_difference(fruit, fruit.other) at resid_post layer * at last token

experiment e {{
  prompts fruit limit 6
  {rule}
  measure logit(answer) as delta
  {expect}
}}
"""
SCALED = "for c in [-20, -1.5, 20] { scale z layer 1 at last token by c }"


def codes(rule: str, expect: str = "") -> list[str]:
    text = FILE.format(rule=rule, expect=expect)
    found = check_source(Source(text, Path("a.mech")), CheckSettings()).diagnostics
    return [each.code for each in found if each.severity == "error"]


@pytest.mark.parametrize(
    ("expect", "expected"),
    [
        ("expect delta(c: -20) < 100", []),
        ("expect delta(c: -1.5) < 100", []),
        ("expect delta(c: 20) < 100", []),
        ("expect max(delta, c: -20..-1) < 100", []),
        ("expect delta(c: -3) < 100", ["E0606"]),
        ("expect delta(c: 1.5) < 100", ["E0606"]),
        ("expect delta(c: -n) < 100", ["E0606"]),
        ("expect delta(c: -50%) < 100", ["E0606"]),
    ],
)
def test_expectation_selects_a_cell_by_a_negative_number(expect: str, expected: list[str]) -> None:
    assert codes(SCALED, expect) == expected


@pytest.mark.parametrize(
    "rule",
    [
        "for l in 1..2 { add 2 * d[layer l] to resid_post layer 1 at last token }",
        "for l in 1..2 { project out d[layer l] from resid_post layers * at tokens * }",
        "for l in 1..2 { set resid_post layer 1 at last token to d[layer l] }",
        "add 2 * d[layer n] to resid_post layer 1 at last token",
    ],
)
def test_loop_variable_selects_members_of_a_direction(rule: str) -> None:
    assert codes(rule) == []


def test_unused_loop_variable_is_an_error() -> None:
    rule = "for l in 1..2 { add 2 * d[layer 1] to resid_post layer 1 at last token }"
    assert codes(rule) == ["E0322"]
