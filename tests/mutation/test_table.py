"""The table of mutants matches the current code."""

from __future__ import annotations

from .__main__ import read_table, unmatched


def test_surviving_mutants_exist_in_the_code_and_have_a_reason() -> None:
    """A row whose code has moved or been removed must be renamed or dropped."""
    alive = [row for row in read_table().values() if row["outcome"] == "survived"]
    assert [row["mutant"] for row in alive if not row["by"] or row["by"].endswith(" tests")] == []
    assert unmatched(row["mutant"] for row in alive) == []
