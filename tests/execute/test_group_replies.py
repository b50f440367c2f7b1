"""Rows that generate together: as many as fit in one step, independent of their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.execute.pass_layout import GroupGenerator, PassSizer
from mechdsl.execute.patching.rows import Patcher
from mechdsl.execute.run import panel
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.vocab.metrics import Reply

from . import support
from .test_kept_replies import replies, rows_written, text
from .test_stored_values import run

__all__ = ["rows_written"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of distinct rows measured in each pass."""
    counts: list[int] = []
    values = Patcher.values

    def noted(self: Patcher, shared: Any, chosen: Any, *given: Any) -> Any:
        counts.append(len(chosen))
        return values(self, shared, chosen, *given)

    monkeypatch.setattr(Patcher, "values", noted)
    return counts


def test_rows_of_several_passes_generate_together(
    tmp_path: Path, rows_written: list[int], measured: list[int]
) -> None:
    support.write_rows(tmp_path)
    rule = "patch resid_post layer * at last token"
    everywhere = text().replace(rule, "scale z layer * at tokens * by 2")
    small, _ = run(everywhere, tmp_path, options=ExecutionOptions(pass_tokens=20))
    assert len(measured) > 4
    assert max(rows_written) == sum(measured) == 12
    large, _ = run(everywhere, tmp_path, options=ExecutionOptions(pass_tokens=4000))
    assert replies(small) == replies(large)


def test_rows_that_generate_together_fit_in_memory(
    tmp_path: Path, rows_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    support.write_rows(tmp_path)
    whole, _ = run(text(), tmp_path)
    every = sum(rows_written)
    rows_written.clear()
    bytes_of = panel.estimate_reply_bytes
    monkeypatch.setattr(panel, "estimate_reply_bytes", lambda *given: bytes_of(*given) * 0 + 2**30)
    parts, _ = run(text(), tmp_path)
    assert sum(rows_written) == every
    assert max(rows_written[-3:]) == 2  # of 1 GiB each, in 2 GiB
    assert replies(whole) == replies(parts)


def test_rows_are_generated_once_and_in_order() -> None:
    """Rows without a measure are skipped; a row larger than the limit is generated alone."""
    written: list[list[int]] = []

    def write(rows: Any) -> list[tuple[Reply, ...]]:
        written.append(rows.tolist())
        return [(Reply((row, draw), "", "end"),) for row in rows.tolist() for draw in range(2)]

    group = np.array([5, 3, 0, 1, 4, 2])
    each = np.array([1.0, 1.0, 9.0, 1.0, 1.0, 1.0])
    sizes = PassSizer(pass_tokens=4, reply_bytes=5)
    found = GroupGenerator(write, lambda rows: rows[rows != 0], group, np.full(6, 2), each, sizes)
    assert [one[0].ids for one in found.of(np.array([5]))] == [(5, 0), (5, 1)]
    assert [one[0].ids[0] for one in found.of(np.array([3, 1]))] == [3, 3, 1, 1]
    assert [one[0].ids[0] for one in found.of(np.array([4]))] == [4, 4]
    assert [one[0].ids[0] for one in found.of(np.array([2]))] == [2, 2]
    assert written == [[5, 3], [1, 4], [2]]
