"""A file's metric with a name of the language wins in its file, with W0734."""

from __future__ import annotations

import numpy as np

from mechdsl.base.text import Source
from mechdsl.results.experiment_result import ExperimentResult

from ..run_source import run_source

FILE = """mech 1
model toy = zoo("counting")
prompts fruit {{
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
  wrong " {{count - 1}}"
}}
metric {0} = prob(answer) - prob(wrong)
metric {1} = 2 * {0}
metric {2} = logit(answer)
experiment e {{
  prompts fruit limit 16
  observe attention layer 1 head 0 from last token to tokens *
  measure {0} as raw
  measure {1} as raw
  measure {2} as raw
  measure correct(wrong) as raw
  keep {1} > -2
  expect max({0}) < 1
}}
"""


def run(*names: str) -> tuple[ExperimentResult, list[tuple[str, str]]]:
    ran, found = run_source(Source(FILE.format(*names)))
    assert ran is not None, found
    (result,) = ran.experiments
    return result, [(d.code, d.span.text if d.span else "") for d in found]


def test_file_metric_with_a_builtin_name_takes_precedence() -> None:
    own, warned = run("correct", "entropy", "attention")
    other, silent = run("mine", "double", "answered")
    assert [w for w in warned if w not in silent] == [
        ("W0734", "prob(answer) - prob(wrong)"),
        ("W0734", "2 * correct"),
        ("W0734", "logit(answer)"),
    ]
    assert len(own.measures) == len(other.measures) == 5
    for mine, named in zip(own.measures, other.measures, strict=True):
        assert np.array_equal(mine.patched, named.patched)
    observed, first, second, _, shares = own.measures
    assert np.array_equal(second.patched, 2 * first.patched)
    assert set(np.unique(shares.patched)) <= {0.0, 1.0}  # with an argument: the built-in metric
    assert observed.label == "observed attention"
    assert other.measures[0].label == "attention"
    assert [e.holds for e in own.outcomes] == [True]


def test_file_metric_that_refers_to_itself_is_an_error() -> None:
    """The built-in metric isn't meant either: a name has one meaning in a file."""
    _, found = run_source(
        Source(FILE.format("loss", "entropy", "logit").replace("2 * loss", "entropy"))
    )
    assert "E0207" in {d.code for d in found}
