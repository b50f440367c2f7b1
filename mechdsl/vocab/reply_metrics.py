"""Metrics of what a model has written: one number per reply, read off its text."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

from mechdsl.base import limits
from mechdsl.base.reply import Reply
from mechdsl.vocab.metrics import metric

Wanted = Sequence[tuple[str, ...]]
"""[row] what stands in the brackets of the metric, as it is in that row."""

FIRST, LAST = "first", "last"
_REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_LITERAL_BRACE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?!\d*(?:,\d*)?\})", re.DOTALL)
_NUMBER = re.compile(r"(?:(?<![\w.,)])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?")


@metric("exact_match", takes="reply", unit="share", default="answer")
def exact_match(replies: Sequence[Reply], wanted: Wanted) -> list[float]:
    """Whether the reply is this text, or one of these, white space at its ends aside.

    replies, wanted: [row]
    returns: [row], 1.0 or 0.0; its mean is the accuracy
    source: Rajpurkar et al. 2016, arXiv 1606.05250, there without case, articles and punctuation
    """
    return [
        float(reply.text.strip() in {text.strip() for text in texts})
        for reply, texts in zip(replies, wanted, strict=True)
    ]


@metric("contains", takes="reply", unit="share")
def contains(replies: Sequence[Reply], wanted: Wanted) -> list[float]:
    """Whether one of these texts stands in the reply, letter by letter.

    replies, wanted: [row]
    returns: [row], 1.0 or 0.0
    source: Zou et al. 2023, arXiv 2307.15043, for phrases of refusal
    """
    return [
        float(any(text in reply.text for text in texts))
        for reply, texts in zip(replies, wanted, strict=True)
    ]


@metric("matches", takes="reply", unit="share")
def matches(replies: Sequence[Reply], wanted: Wanted) -> list[float]:
    """Whether the regular expression is found in the reply, as Python's `re.search` does.

    replies, wanted: [row], of `wanted` the pattern
    returns: [row], 1.0 or 0.0
    raises: TakesTooLong for one that goes on and on, as many ways of repeating can
    """
    return [
        float(_found(pattern, reply.text, row))
        for row, (reply, (pattern,)) in enumerate(zip(replies, wanted, strict=True))
    ]


class TakesTooLong(Exception):
    """A search in the reply of a row was cut short."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row


def check_pattern(pattern: str) -> None:
    """Check a regular expression before any search.

    Raises:
        ValueError: If Python's `re` can't compile the expression or warns about it, or if its
            repetitions are too many.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise ValueError(str(error)) from error
    counts = [int(most or least) for least, most in _REPEATED.findall(pattern)]
    if math.prod(max(1, count) for count in counts) > limits.REPEATS:
        raise ValueError(f"its repetitions multiply to more than {limits.REPEATS:,}")


def _found(pattern: str, text: str, row: int) -> bool:
    import regex  # `re` can't be cut short

    # Only to `regex` is `{e<=1}` more than these characters.
    literal = _LITERAL_BRACE.sub(lambda each: each[1] or r"\{", pattern)
    try:
        return regex.search(literal, text, timeout=limits.SEARCH_SECONDS) is not None
    except TimeoutError as error:
        raise TakesTooLong(row) from error


@metric("number", takes="reply", unit="count", kind="category", default=FIRST)
def number(replies: Sequence[Reply], wanted: Wanted) -> list[float]:
    """The first number in the reply; `number(last)` is the last one.

    Digits with a decimal point, with commas between thousands, with a minus sign that stands behind
    no word or number.

    replies, wanted: [row], of `wanted` `first` or `last`
    returns: [row], NaN where the reply has none
    source: Cobbe et al. 2021, arXiv 2110.14168, for the last one
    """
    found: list[float] = []
    for reply, (which,) in zip(replies, wanted, strict=True):
        numbers = _NUMBER.findall(reply.text)
        own = float(numbers[0 if which == FIRST else -1].replace(",", "")) if numbers else math.nan
        found.append(own if math.isfinite(own) else math.nan)
    return found


@metric("length", takes="reply", unit="token")
def length(replies: Sequence[Reply], wanted: Wanted) -> list[float]:
    """How many tokens the reply has, without what ended it.

    replies: [row]. wanted: [row] (not used)
    returns: [row], from 0 to the number behind `generate`
    """
    del wanted
    return [float(len(reply.ids)) for reply in replies]
