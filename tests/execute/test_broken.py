"""The comparison with hand-written hooks fails when the executor is broken on purpose.

Each break is small and gives plausible numbers; a test that lets one pass tests nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl.execute
import mechdsl.patched
import mechdsl.writes
from mechdsl.batch import Batch
from mechdsl.hooks import Past, SiteWrite, WriteMismatch, gather
from mechdsl.lanes import Lanes
from mechdsl.plan import plan_experiment
from mechdsl.writes import build_writes

from .by_hand import Point
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    agree,
    bare,
    differences,
    experiment,
    patches,
    run_file,
)

FAMILY = "llama"
TEXT = experiment(
    "e",
    "prompts p",
    "from longer into clean",
    "patch layer 0..1 heads 0..1 at cue token",
    DIFFERENCE,
)
CELLS = [[Point("z", layer, 0), Point("z", layer, 1)] for layer in (0, 1)]


def compare(folder: Path, mode: str) -> None:
    expected = patches(FAMILY, CELLS, "longer", lambda s, b: [([s.cue], [b.cue])])
    found = run_file(TEXT, folder, bare(FAMILY), MODES[mode])["e"].measures[0]
    agree(found, expected, differences(FAMILY, ROWS))


@pytest.mark.parametrize("mode", list(MODES))
def test_the_whole_executor_passes(folder: Path, mode: str) -> None:
    compare(folder, mode)


def shifted(*args: Any) -> list[SiteWrite]:
    """Writes one token too far."""
    return [replace(w, positions=w.positions + 1) for w in build_writes(*args)]


def one_head(*args: Any) -> list[SiteWrite]:
    """Drops the second head."""
    return [
        replace(
            w,
            rows=w.rows[w.units == 0],
            positions=w.positions[w.units == 0],
            values=w.values[w.units == 0],
            units=w.units[w.units == 0],
        )
        for w in build_writes(*args)
    ]


def swapped_heads(*args: Any) -> list[SiteWrite]:
    return [replace(w, units=1 - w.units) for w in build_writes(*args)]


def swapped_rows(*args: Any) -> list[SiteWrite]:
    """Gives the first row what belongs to the second."""
    return [
        replace(w, values=w.values.roll(w.values.shape[0] // 2, 0)) for w in build_writes(*args)
    ]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    "broken", [shifted, one_head, swapped_heads, swapped_rows, lambda *args: []]
)
def test_wrong_writes_are_noticed(
    folder: Path, mode: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.patched, "build_writes", broken)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, mode)


def early(read: Any, batch: Batch, rows: Any, positions: Any, units: Any) -> Any:
    """Reads one token too early."""
    return gather(read, batch, rows, positions - 1, units)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_read_at_the_wrong_token_is_noticed(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.writes, "gather", early)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, mode)


def test_forgotten_padding_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, "plain")


def test_another_prompts_past_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Past.take

    def wrong(self: Past, rows: Any, columns: int, start: int) -> Past:
        longer = columns > 5  # the check on load would notice it, and go without
        return original(self, rows.flip(0) if longer else rows, columns, start)

    monkeypatch.setattr(Past, "take", wrong)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, "batched")


def test_a_suffix_that_begins_too_late_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = mechdsl.patched.first_column
    monkeypatch.setattr(mechdsl.patched, "first_column", lambda *args: original(*args) + 1)
    with pytest.raises(ValueError, match="before the suffix"):
        compare(folder, "batched")


def test_another_prompts_hidden_state_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Lanes.lane

    def wrong(self: Lanes, prompts: Any, draws: Any) -> Any:
        found = original(self, prompts, draws)
        swapped = found ^ (found < 2)  # of the first two prompts, and in the base run alone
        return np.asarray(swapped) if self.run == "clean" else found

    monkeypatch.setattr(Lanes, "lane", wrong)
    with pytest.raises((AssertionError, ValueError), match=r"off by|not in its prompt"):
        compare(folder, "batched")


def test_a_start_above_the_write_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write couldn't happen (A4): no number comes out."""

    def late(experiment: Any, *, resume: bool) -> Any:
        plan = plan_experiment(experiment, resume=resume)
        return replace(plan, starts=plan.starts + 1)

    monkeypatch.setattr("mechdsl.plan.plan_experiment", late)
    with pytest.raises(WriteMismatch):
        compare(folder, "batched")


def test_values_that_are_off_by_a_little_are_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rough(*args: Any) -> list[SiteWrite]:
        return [replace(w, values=w.values.to(torch.bfloat16)) for w in build_writes(*args)]

    monkeypatch.setattr(mechdsl.patched, "build_writes", rough)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, "batched")
