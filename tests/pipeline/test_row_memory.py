"""What a row of a prompts block costs in memory, and that freed rows are computed again."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from mechdsl.base.source import Source
from mechdsl.prompts import rows
from mechdsl.validate.check_file import Checked, check_source
from tests.pipeline.test_linear_work import DRAWN, FROM_FILE, HEAD, ROWS

MOST = 5_500
"""Bytes of a checked row and its corruption, with eight or nine tokens each."""


def checked(folder: Path, text: str, size: int) -> Checked:
    path = folder / "rows.mech"
    return check_source(Source(HEAD + text.replace("SIZE", str(size)), path))


def test_checked_rows_hold_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS_KEPT", 100)
    checked(tmp_path, DRAWN + ROWS, 600)  # imports, and fills caches

    def held(size: int) -> int:
        tracemalloc.start(1)
        result = checked(tmp_path, DRAWN + ROWS, size)
        gc.collect()
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(result.experiments[0].table) == size
        return found

    assert (held(600) - held(300)) / 300 < MOST


@pytest.mark.parametrize("text", [DRAWN, FROM_FILE], ids=["drawn", "file"])
def test_freed_rows_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    words = ["apple", "river", "stone", "cloud", "tiger", "lemon"]
    lines = [",".join(words[(n + i) % 6] for i in range(3)) for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["one,two,three", *lines]), encoding="utf-8")
    # The second experiment has more rows of the block, so that its table is another one.
    text += ROWS.replace("SIZE", "20", 1)
    kept = checked(tmp_path, text, 40)
    monkeypatch.setattr(rows, "RESULTS_KEPT", 0)
    freed = checked(tmp_path, text, 40)
    assert [e.table for e in freed.experiments] == [e.table for e in kept.experiments]
    assert [len(e.table) for e in freed.experiments] == [20, 40]
    assert [e.measures for e in freed.experiments] == [e.measures for e in kept.experiments]
