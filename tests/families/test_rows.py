"""The tables against the models alone: what a row says is where it says, and is all there is."""

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
def test_a_row_holds(name: str) -> None:
    assert check(ROWS[name]) == []


def test_no_name_is_in_the_tables_twice() -> None:
    counts = Counter(row.name for row in tables.every())
    assert [name for name, count in counts.items() if count > 1] == []
