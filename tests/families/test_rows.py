"""The tables of architectures, checked against the models by the reference alone."""

from __future__ import annotations

from collections import Counter

import pytest

from ..quick import some
from . import tables
from .check_rows import check
from .parts import Architecture

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}
QUICK = ("gpt2", "gemma3_text", "mixtral", "bert", "t5", "llava")


@pytest.mark.parametrize("name", some(ROWS, QUICK))
def test_architecture_row_matches_its_model(name: str) -> None:
    assert check(ROWS[name]) == []


def test_architecture_names_are_unique() -> None:
    counts = Counter(row.name for row in tables.every())
    assert [name for name, count in counts.items() if count > 1] == []
