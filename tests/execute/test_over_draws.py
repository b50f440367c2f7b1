"""Averages over noise draws and samples: rows with values, lost rows, and values read after prompts
merged with those of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from mechdsl.diagnostics.syntax import PythonFailed
from mechdsl.execute.measurement.readout import (
    MeasureFailure,
    Readout,
    ReadoutInput,
    ReadoutResult,
    ValueGap,
    read_samples,
)
from mechdsl.execute.unpatched_runs import average_samples, merge_reply_values
from mechdsl.vocab.metrics import Reply

nan = np.nan


def failed(row: int | None, rows: int = 15) -> MeasureFailure:
    return MeasureFailure(cast("PythonFailed", None), row, rows)


def found(
    *values: Sequence[float],
    broken: Sequence[int] = (),
    fails: Mapping[int, MeasureFailure] | None = None,
    gaps: Mapping[int, ValueGap] | None = None,
) -> ReadoutResult:
    """values: per measure, [row]. broken: rows."""
    every = [np.array(own, dtype=np.float64) for own in values]
    lost = np.isin(np.arange(len(every[0])), broken)
    none = [np.zeros(len(lost)) for _ in every]
    return ReadoutResult(every, lost, none, fails or {}, gaps or {})


def test_readout_averages_over_noise_draws() -> None:
    """Rows of three draws: all valid, one too short, none, one broken, one a gap."""
    rows = [[1, 2, 6], [1, nan, 5], [nan] * 3, [nan, 2, 3], [4, nan, 2]]
    values = [each for row in rows for each in row]
    draws = found(values, values, broken=[9], gaps={0: ValueGap(np.array([13, 14]), "why")})
    own = replace(draws, failed={0: failed(13), 1: failed(None)}).over_draws(3)
    np.testing.assert_array_equal(own.values[0], [3, 3, nan, nan, nan])
    np.testing.assert_array_equal(own.values[1], [3, 3, nan, nan, 3])
    assert own.broken.tolist() == [False, False, False, True, False]
    assert own.gaps[0].rows.tolist() == [4]
    assert [own.failed[n].row for n in (0, 1)] == [4, None]


def test_listed_tokens_average_over_noise_draws() -> None:
    listed = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    own = replace(found([1, 2, 3, 4]), listed=listed).over_draws(2)
    assert own.listed is not None
    assert own.listed.tolist() == [[0.75, 0.25], [0.125, 0.875]]


class Samples:
    """Returns one result after another."""

    measures = (None, None)

    def __init__(self, *every: ReadoutResult) -> None:
        self.every = list(every)

    def read(self, reading: Any, relative: float, *, skip: Any) -> ReadoutResult:
        return self.every.pop(0)


def of_samples(*every: ReadoutResult) -> ReadoutResult:
    reply = Reply((), "", "length")
    written = [(reply,) * len(every)] * len(every[0].broken)
    reading = ReadoutInput(*[cast("Any", None)] * 8)
    return read_samples(cast("Readout", Samples(*every)), reading, written)


def test_readout_averages_over_samples() -> None:
    """A failed function is reported at its row, which is the same for all samples."""
    one = found([1, 2, 3, 4], [5] * 4, broken=[0])
    other = found([nan, 6, 9, 0], [7] * 4, gaps={0: ValueGap(np.array([3]), "why")})
    own = of_samples(one, other, replace(one, failed={1: failed(2), 0: failed(None)}))
    np.testing.assert_allclose(own.values[0], [nan, 10 / 3, 5, nan])
    assert own.broken.tolist() == [True, False, False, False]
    assert own.gaps[0].rows.tolist() == [3]
    assert [own.failed[n].row for n in (0, 1)] == [None, 2]


def test_values_read_after_prompts_average_over_samples() -> None:
    """A row is lost if any of its samples is."""
    gap = ValueGap(np.array([1]), "why")
    one = found([1, 2, nan, nan], fails={0: failed(1)})
    other = found([nan, 4, 8, nan], broken=[0, 3], gaps={0: gap})
    own = average_samples([one, other])
    np.testing.assert_array_equal(own.values[0], [1, 3, 8, nan])
    assert own.broken.tolist() == [True, False, False, True]
    assert (own.failed.keys(), own.gaps[0]) == ({0}, gap)


def test_values_read_after_prompts_merge_with_those_of_prompts() -> None:
    """Measures of prompts and of replies, with broken rows and gaps in either."""
    gaps = ValueGap(np.array([0]), "of the prompt"), ValueGap(np.array([2]), "of the reply")
    prompts = found([1, 2, nan], [nan] * 3, broken=[2], fails={0: failed(0)}, gaps={0: gaps[0]})
    behind = found([nan] * 3, [4, nan, 6], broken=[1], fails={1: failed(1)}, gaps={1: gaps[1]})
    own = merge_reply_values(prompts, behind)
    np.testing.assert_array_equal(own.values, [[1, 2, nan], [4, nan, 6]])
    assert own.broken.tolist() == [False, True, True]
    assert own.failed == {0: prompts.failed[0], 1: behind.failed[1]}
    assert own.gaps == dict(enumerate(gaps))
