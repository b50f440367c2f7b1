"""`prob` abbreviates a single measure `prob(answer)`, but no expression or named metric."""

from __future__ import annotations

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source

FILE = """mech 1
model toy = zoo("counting")
prompts fruit {{
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
  wrong " {{count - 1}}"
  corrupt fewer {{ count = count - 1 }}
}}
metric named = prob(answer)
experiment e {{
  prompts fruit limit 16
  from clean into fewer
  patch layer 0 head * at last token
  measure {} as delta
  measure logit(answer) as raw
  expect max(prob) > 0
}}
"""


@pytest.mark.parametrize(
    ("measured", "known"),
    [
        ("prob(answer)", True),
        ("(prob(answer))", True),
        ("prob(answer) - prob(wrong)", False),
        ("2 * prob(answer)", False),
        ("-prob(answer)", False),
        ("named", False),
    ],
)
def test_metric_word_abbreviates_only_a_plain_measure(measured: str, known: bool) -> None:
    found = check_source(Source(FILE.format(measured))).diagnostics
    assert ("E0203" not in {d.code for d in found}) == known, found
