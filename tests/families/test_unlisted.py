"""Architectures without a table: the page lists all of them, with their outcomes."""

from __future__ import annotations

import re

import pytest

from . import unlisted


def test_page_lists_every_architecture_without_a_table() -> None:
    listed = re.findall(r"^\| `(.+?)` \|", unlisted.written_section(), flags=re.MULTILINE)
    assert listed == list(unlisted.unlisted()), "run `python -m tests.families.unlisted --write`"


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("mistral4", "loaded", "heads and neurons"),
        ("beam", "refused", "the model scales its stream: in the last block, resid_post = 0.88"),
    ],
)
def test_architecture_has_its_outcome(name: str, outcome: str, reason: str) -> None:
    (tried,) = unlisted.attempts([name])
    assert (tried.outcome, reason in tried.reason) == (outcome, True), tried
