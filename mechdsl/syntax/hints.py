"""What people write by habit, and what the language has for it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """Applies where `before` matches up to the place where the parser stopped and `after` from
    there on; `{0}` and so on in `text` are their groups, in order."""

    before: str
    after: str
    text: str
    accepts: str = ""
    """A terminal that has to be possible there."""


HINTS: tuple[Hint, ...] = (
    Hint(r"\b([0-9]+)\s*$", r"- *([0-9]+)", "a range is written `{0}..{1}`"),
    Hint(r"\b([0-9]+)\s*$", r": *([0-9]+)", "a range is written `{0}..{1}`"),
    Hint(r"\b([0-9]+)\s+$", r"to +([0-9]+)\b", "a range is written `{0}..{1}`"),
    Hint(r"\.\.\s*$", r"\. *([0-9]+)", "a range has two dots: `..{0}`"),
    Hint(r"\b(last|first)\s+$", r"(\w+) +(tokens?)\b", "write `{0}-{1} {2}`"),
    Hint(r"\b(\w+)\s+$", r"([0-9]+|\*)", "say which axis: `{0} layer {1}`", "LAYER"),
    Hint(r"(?:at|onto|to|from|with|,)\s*$", r"(-?[0-9]+)", "write `token {0}`", "TOKEN"),
    Hint(r"", r"to\b", "write `onto`: it says where the activation is written", "ONTO"),
    Hint(r"", r"to\b", "write `into`: `from SOURCE into BASE`", "INTO"),
    Hint(r"", r"(?:x|×|vs|against|and|,)(?!\w)", "write `by`: `heatmap layer by head`", "BY"),
    Hint(
        r"",
        r"((?:layer|head|neuron|expert|token)s?) *= *([\w.*%]+)",
        "write `{0} {1}` without a sign between",
    ),
    Hint(
        r"\b((?:layer|head|neuron|expert|token)s?)\s*$",
        r"[=:] *(\S+)",
        "write `{0} {1}` without a sign between",
    ),
    Hint(r"^measure\b", r"", "say what is compared: `as recovery`, `as delta` or `as raw`", "AS"),
    Hint(
        r"^(?:patch|ablate|freeze|scale|clamp)\b",
        r"",
        "a rule says where it acts, such as `at last token`",
        "AT",
    ),
    Hint(r"^ablate\b", r"", "say what replaces it: `with mean`, `with zero`", "WITH"),
    Hint(r"\b(?:last|first)\s*$", r"", "write `last token` or `last-item token`", "TOKEN"),
)


def hint(before: str, after: str, accepts: frozenset[str]) -> str | None:
    """What to write instead, for a place with this text before and after it."""
    for known in HINTS:
        if known.accepts and known.accepts not in accepts:
            continue
        left = re.search(known.before, before)
        right = re.match(known.after, after)
        if left and right:
            return known.text.format(*left.groups(), *right.groups())
    return None
