"""Metrics of completions, tested on literal texts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from mechdsl.base import limits
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.measurement.readout import compute_reply_values
from mechdsl.resolve.types import MetricTerm
from mechdsl.vocab.metrics import METRICS, PatternTimeout, Reply, check_pattern


def read(name: str, replies: list[str], wanted: list[tuple[str, ...]]) -> list[float]:
    texts = [Reply(tuple(range(len(text.split()))), text, "length") for text in replies]
    return METRICS[name].forms["reply"].function(texts, wanted)


def test_exact_match_ignores_only_surrounding_white_space() -> None:
    replies = [" Paris\n", "paris", "Paris.", "New  York", "", " New York"]
    wanted = [("Paris ", " London")] * 3 + [("New York",)] * 3
    assert read("exact_match", replies, wanted) == [1, 0, 0, 0, 0, 1]


def test_exact_match_accepts_any_of_several_texts() -> None:
    assert read("exact_match", ["b", "c"], [("a", "b"), ("a", "b")]) == [1, 0]


def test_contains_is_case_sensitive_and_literal() -> None:
    replies = ["I can't do that", "I CAN'T", "Sorry, no", "", "a (b)"]
    wanted = [("can't", "Sorry")] * 4 + [("(b)",)]
    assert read("contains", replies, wanted) == [1, 0, 1, 0, 1]


def test_leading_space_of_a_contained_text_matches_the_beginning_of_a_completion() -> None:
    """Some tokenizers drop the space of the first word."""
    replies = ["Paris.", " Paris.", "in Paris", "inParis", "Parisian", "Lyon Paris"]
    found = read("contains", replies, [(" Paris",)] * 6)
    assert found == [1, 1, 1, 0, 1, 1]
    assert read("contains", ["Paris"], [("  Paris",)]) == [0]


def test_matches_searches_the_pattern_in_the_completion() -> None:
    replies = ["it is 42.", "it is 4.", "No", "Nothing"]
    wanted = [("[0-9]{2}",), ("[0-9]{2}",), (r"No\b",), (r"No\b",)]
    assert read("matches", replies, wanted) == [1, 0, 1, 0]


@pytest.mark.parametrize("pattern", ["cat{e}", "cat{e<=1}", "a{}", "a{2", "[{i}]", "a{1,x}"])
def test_braces_that_are_no_count_match_themselves_as_in_re(pattern: str) -> None:
    replies = ["cat", "cat{e}", "cat{e<=1}", "kat", "a{}", "a{2", "a{e}", "a{1,x}", "", "{", "i"]
    expected = [float(re.search(pattern, reply) is not None) for reply in replies]
    assert read("matches", replies, [(pattern,)] * len(replies)) == expected


@pytest.mark.parametrize(
    "pattern", [r"\N{DIGIT ONE}{2}", r"\d{2,}", r"(a{2}){3}", r"a{,2}b", r"(?i)YES", r"[\]{]x"]
)
def test_valid_pattern_is_accepted_and_searched_as_in_re(pattern: str) -> None:
    replies = ["11", "1", "aaaaaa", "aaaaa", "aab", "yes", "no", "nono", "{x", "]x"]
    check_pattern(pattern)
    expected = [float(re.search(pattern, reply) is not None) for reply in replies]
    assert read("matches", replies, [(pattern,)] * len(replies)) == expected


INVALID = {
    "recursion": ("(?R)", "unknown extension"),
    "call of a group": ("(a|b(?0))", "unknown extension"),
    "property": (r"\p{L}", "bad escape"),
    "flag inside": ("a(?i)", "global flags"),
    "look-behind of any width": ("(?<=a+)b", "fixed-width"),
    "class of characters": ("[[:alpha:]]", "nested set"),
    "large count": ("a{4294967296}", "too large"),
    "long repetition": ("(a){1000000000}", "repetitions exceed 100,000"),
    "nested repetition": ("((a{100}){100}){100}", "repetitions exceed 100,000"),
    "nested groups": ("(" * 500 + ")" * 500, "recursion"),
}


@pytest.mark.parametrize("case", INVALID)
def test_pattern_that_re_cannot_read_is_invalid(case: str) -> None:
    pattern, reason = INVALID[case]
    with pytest.raises(ValueError, match=reason):
        check_pattern(pattern)


ENDLESS = "^([0-9 ]|[0-9])+[a-z]$"
"""A pattern with exponential backtracking over a long row of digits."""


def test_endless_pattern_search_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEARCH_SECONDS", 0.05)
    assert read("matches", ["4 4 x", "4 4"], [(ENDLESS,)] * 2) == [1, 0]
    with pytest.raises(PatternTimeout) as error:
        read("matches", ["4", "4 " * 60], [(ENDLESS,)] * 2)
    assert error.value.row == 1


NUMBERS = {
    "7": (7, 7),
    " Count 1: 3 Total: 12": (1, 12),
    "about 1,234.50 or 3, 4": (1234.5, 4),
    "12,34": (12, 34),
    "1,2345": (1, 2345),
    "-5 and 3-4": (-5, 4),
    "x-2": (2, 2),
    "(-2)": (-2, -2),
    "3.": (3, 3),
    ".5": (5, 5),
    "v1.2.3": (1.2, 3),
    "007": (7, 7),
    "٣": (3, 3),
    "1e3": (1, 3),
}
"""Completion → its first and its last number."""


@pytest.mark.parametrize("text", NUMBERS)
def test_number_reads_the_first_or_last_number(text: str) -> None:
    first, last = NUMBERS[text]
    assert read("number", [text] * 2, [("first",), ("last",)]) == [first, last]


@pytest.mark.parametrize("text", ["", "no", "one", "9" * 400])
def test_number_without_a_finite_number_is_nan(text: str) -> None:
    (found,) = read("number", [text], [("first",)])
    assert math.isnan(found)


def test_length_counts_tokens() -> None:
    assert read("length", ["a b c", ""], [(), ()]) == [3, 0]


# --- arguments ------------------------------------------------------------------------------------

FILE = """
mech 1

model toy = zoo("counting")

prompts fruit {{
  count in 2..5
  word = if count > 3 then "many" else "few"
  also = ["some", word]
  item in ["apple", "pear"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {answer}"
  wrong " {{count + 1}}"
  corrupt fewer {{ count = count - 1 }}
}}

experiment e {{
  model toy
  prompts fruit
  from clean into fewer
  patch resid_post layer 1 at each item token
  generate 4
  measure {metric} as raw
}}
"""


def atom(metric: str, answer: str = "{count}") -> MetricTerm:
    """The metric, resolved on all rows."""
    source = Source(FILE.format(metric=metric, answer=answer), Path("a.mech"))
    found = check_source(source, CheckSettings())
    assert not has_errors(found.diagnostics), render_full(found.diagnostics)
    (experiment,) = found.experiments
    (own,) = experiment.measures[0].atoms
    counts = [row.values["count"] for row in experiment.table.runs["clean"].rows]
    assert set(counts) == {2, 3, 4, 5}
    assert experiment.measures[0].reply is not None
    order = sorted(range(len(counts)), key=lambda row: (counts[row], row))
    first = [next(row for row in order if counts[row] == count) for count in (2, 3, 4, 5)]
    object.__setattr__(
        own, "wanted", {e: tuple(t[r] for r in first) for e, t in own.wanted.items()}
    )
    return own


def test_exact_match_defaults_to_the_answer() -> None:
    assert atom("exact_match").wanted == {None: ((" 2",), (" 3",), (" 4",), (" 5",))}


def test_texts_of_a_metric_are_evaluated_per_row() -> None:
    found = atom('exact_match(wrong, "{word}", also)').wanted[None]
    assert found[0] == (" 3", "few", "some", "few")
    assert found[3] == (" 6", "many", "some", "many")


def test_texts_are_read_from_another_run() -> None:
    assert atom("contains(answer of fewer)").wanted[None][:2] == ((" 1",), (" 2",))


def test_number_range_expands_to_texts() -> None:
    assert atom("contains(count..count + 2)").wanted[None][0] == ("2", "3", "4")


def test_texts_may_depend_on_the_cell() -> None:
    found = atom('contains("n{item.index}")').wanted
    assert {env: texts[0] for env, texts in found.items()} == {n: (f"n{n}",) for n in range(1, 5)}


def test_completions_are_compared_with_the_text_of_their_cell() -> None:
    replies = [Reply((), f"n{n}", "length") for n in (1, 2, 2, 1)]
    by_cell, prompts = atom('contains("n{item.index}")'), np.zeros(4, dtype=np.int64)
    assert compute_reply_values(by_cell, replies, prompts, [1, 1, 2, 2]).tolist() == [1, 0, 1, 0]
    same = atom('contains("n1")')
    assert compute_reply_values(same, replies, prompts, [1, 1, 2, 2]).tolist() == [1, 0, 0, 1]


def test_contains_accepts_words_outside_the_vocabulary() -> None:
    assert atom('contains("I\'m sorry")').wanted[None][0] == ("I'm sorry",)


def test_braces_in_a_pattern_are_not_interpolated() -> None:
    assert atom('matches("[0-9]{2} \\\\w")').wanted[None][0] == (r"[0-9]{2} \w",)


def test_number_argument_defaults_to_first() -> None:
    assert atom("number").wanted[None][0] == ("first",)
    assert atom("number(first)").wanted == atom("number").wanted
    assert atom("number(last)").wanted[None][0] == ("last",)


def test_prefix_shared_by_all_answers_is_part_of_the_completion() -> None:
    assert atom("exact_match", answer="Total {count}").wanted[None][0] == (" Total 2",)
