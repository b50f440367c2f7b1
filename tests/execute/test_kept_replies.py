"""Replies in the store: one that is known isn't written again, whatever is measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mechdsl.execute import writer
from mechdsl.results.experiment_result import FileResult

from . import support
from .test_stored_values import Stopped, opened, run, same_bits, stops_after

TEXT = """seed 1
experiment e {
  model m
  prompts p
  from other into clean
  generate 4 %s
  patch resid_post layer * at last token
  ablate mlp_out layer 1 at last token with mean during step 2..3
  measure %s as raw
}
"""
DRAWN = "with temperature 1.5, samples 2"


def text(how: str = "", measure: str = "length") -> str:
    return TEXT % (how, measure)


@pytest.fixture
def rows_written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replies were written, pass by pass."""
    whole, counts = writer.write_replies, list[int]()

    def write(model: Any, prompts: Any, *given: Any, **named: Any) -> Any:
        counts.append(len(prompts))
        return whole(model, prompts, *given, **named)

    monkeypatch.setattr(writer, "write_replies", write)
    return counts


def replies(found: FileResult | None) -> Any:
    assert found is not None
    return [each.replies for each in found.experiments]


@pytest.mark.parametrize("how", ["", DRAWN])
def test_a_reply_is_written_once(tmp_path: Path, rows_written: list[int], how: str) -> None:
    support.write_rows(tmp_path)
    plain, _ = run(text(how), tmp_path)
    alone = sum(rows_written)
    assert alone
    with opened(tmp_path / "a") as kept:
        first, _ = run(text(how), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * alone
    with opened(tmp_path / "a", "other") as kept:
        again, _ = run(text(how), tmp_path, kept=kept)
        other, _ = run(text(how, 'contains("w2")'), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * alone
    same_bits(plain, first)
    same_bits(plain, again)
    assert replies(plain) == replies(first) == replies(again) == replies(other)


def test_other_settings_are_other_replies(tmp_path: Path, rows_written: list[int]) -> None:
    support.write_rows(tmp_path)
    with opened(tmp_path / "a") as kept:
        run(text(), tmp_path, kept=kept)
        once = sum(rows_written)
        for n, how in enumerate(['until "w1"', "with temperature 2", "with temperature 1"]):
            run(text(how), tmp_path, kept=kept)
            assert sum(rows_written) == (n + 2) * once


def test_a_run_that_is_cut_short_goes_on(
    tmp_path: Path, rows_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    support.write_rows(tmp_path)
    plain, _ = run(text(), tmp_path)
    alone = sum(rows_written)
    rows_written.clear()
    with monkeypatch.context() as patched:
        stops_after(patched, 2)
        with pytest.raises(Stopped), opened(tmp_path / "a") as kept:
            run(text(), tmp_path, kept=kept)
    done = sum(rows_written)
    with opened(tmp_path / "a") as kept:
        assert kept.resumed
        found, _ = run(text(), tmp_path, kept=kept)
    assert alone <= sum(rows_written) < done + alone
    same_bits(plain, found)
    assert replies(plain) == replies(found)
