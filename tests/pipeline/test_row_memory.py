"""Memory per row of a prompts block, and recomputation of freed rows."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.prompts import rows, runs
from mechdsl.prompts.tokens import tokenizer
from tests.pipeline.test_linear_work import DRAWN, FROM_FILE, HEAD, ROWS

HELD, PEAK = 3_800, 5_300
"""Maximum bytes per checked row and its corruption, with eight or nine tokens each: held after the
check, and at its peak."""


def checked(folder: Path, text: str, size: int) -> CheckedFile:
    path = folder / "rows.mech"
    return check_source(Source(HEAD + text.replace("SIZE", str(size)), path))


@pytest.mark.slow
def test_memory_per_checked_row_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CACHED_ROWS", 100)
    monkeypatch.setattr(runs, "CACHED_TOKENS", 0)  # as for tables of many rows
    monkeypatch.setattr(tokenizer, "_BATCH", 100)
    monkeypatch.setattr(tokenizer, "_CACHED_TEXT", 0)
    checked(tmp_path, DRAWN + ROWS, 600)  # for imports and caches

    def measured(size: int) -> tuple[int, int]:
        gc.collect()
        gc.disable()  # as on the command line
        tracemalloc.start(1)
        result = checked(tmp_path, DRAWN + ROWS, size)
        found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.enable()
        assert len(result.experiments[0].table) == size
        return found

    few, many = measured(600), measured(1200)
    assert (many[0] - few[0]) / 600 < HELD
    assert (many[1] - few[1]) / 600 < PEAK


@pytest.mark.parametrize("text", [DRAWN, FROM_FILE], ids=["drawn", "file"])
def test_freed_rows_are_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    words = ["apple", "river", "stone", "cloud", "tiger", "lemon"]
    lines = [",".join(words[(n + i) % 6] for i in range(3)) for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["one,two,three", *lines]), encoding="utf-8")
    # The second experiment has more rows of the block, so its table differs.
    text += ROWS.replace("SIZE", "20", 1)
    kept = checked(tmp_path, text, 40)
    monkeypatch.setattr(rows, "CACHED_ROWS", 0)
    freed = checked(tmp_path, text, 40)
    assert [e.table for e in freed.experiments] == [e.table for e in kept.experiments]
    assert [len(e.table) for e in freed.experiments] == [20, 40]
    assert [e.measures for e in freed.experiments] == [e.measures for e in kept.experiments]
