"""Intervals of mean probabilities, cut to the range of a mean."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.statistics.cell_statistics import compute_cell_statistics, mean_range, run_interval
from mechdsl.vocab.metrics import EFFECTS

from .synthetic import measure, statistics

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
TEXT = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}
experiment e {
  model toy
  prompts fruit limit 6
  ablate layer * head * at last token with zero
  MEASURES
}
"""


def experiment(folder: Path, *measures: str) -> mechdsl.ExperimentResult:
    path = folder / "file.mech"
    path.write_text(TEXT.replace("MEASURES", "\n  ".join(measures)), encoding="utf-8")
    (found,) = mechdsl.run(path, store=False).files[0].experiments
    return found


def test_length_is_between_0_and_the_tokens_of_the_reply() -> None:
    lengths = np.array([[7.0, 8, 8, 8, 8, 8, 8, 8], [0, 0, 0, 1, 0, 0, 0, 0]])
    data = measure(lengths, lengths[0], effect="raw", metric="length", unit="token", most=8)
    assert mean_range(data) == (0, 8)
    assert mean_range(replace(data, effect="delta")) == (-8, 8)
    (found,) = compute_cell_statistics([data], statistics(), 0, effects=EFFECTS)
    assert (found.high[0], found.low[1]) == (8, 0)
    assert mean_range(replace(data, most=None)) is None


def test_interval_of_a_mean_probability_is_cut_to_zero_and_one(tmp_path: Path) -> None:
    """The lines of `expect` have the same intervals as the table."""
    measures = (
        "measure prob(answer) as raw",
        "expect raw(L0H0) >= 0",
        "expect mean(raw) <= 1",
        "expect max(raw) <= 1",
        "expect 1 - raw(L0H0) >= 0",
    )
    result = experiment(tmp_path, *measures)
    data, own = result.measures[0], result.statistics[0]
    sampling = result.sampling
    free = [run_interval(rows, sampling) for rows in data.patched]
    low, high = (np.array([getattr(each, end) for each in free]) for end in ("low", "high"))
    cut = (low < 0) | (high > 1)
    assert 0 < cut.sum() < len(cut)
    np.testing.assert_array_equal(own.low, np.maximum(low, 0))
    np.testing.assert_array_equal(own.high, np.minimum(high, 1))
    assert ((own.low <= own.mean) & (own.mean <= own.high)).all()
    (said,) = re.findall(
        r"in (\d+) cells?, the interval of (\S+) is cut to 0 to 1", result.conventions["interval"]
    )
    assert said == (str(int(cut.sum())), "prob(answer)")
    first, mean, most, rest = result.outcomes
    assert (first.low, first.high) == (own.low[0], own.high[0])
    assert (rest.low, rest.high) == pytest.approx((1 - own.high[0], 1 - own.low[0]))
    for each in (first, mean, most, rest):
        assert each.low is not None
        assert each.high is not None
        assert 0 <= each.low <= each.high <= 1


def test_interval_of_a_difference_of_probabilities_is_cut_to_minus_one_and_one(
    tmp_path: Path,
) -> None:
    result = experiment(tmp_path, "measure prob(answer) as delta")
    assert result.settings is not None
    data, own = result.measures[0], result.statistics[0]
    extreme = np.array([[-1.0, -1.0, -1.0, -0.99, -1.0, -0.2]])
    for base in (0.0, 1.0):
        changed = replace(
            data, patched=base + extreme * (-1) ** (base == 0), base=base + 0 * extreme
        )
        changed = replace(changed, inert=np.zeros(1, dtype=bool), seen=None, same=None)
        (found,) = compute_cell_statistics([changed], result.settings, 0, effects=EFFECTS)
        sign = 1 if base == 0 else -1
        assert sign * (found.high if sign > 0 else found.low)[0] == 1
        assert (found.p[0] < 0.05) == (found.low[0] > 0 or found.high[0] < 0)
    assert np.array_equal(own.p < 0.05, (own.low > 0) | (own.high < 0))


def test_interval_of_other_expressions_and_attention_is_not_cut(tmp_path: Path) -> None:
    result = experiment(tmp_path, "measure 2 * prob(answer) as raw", "measure prob(answer) as raw")
    doubled, single = result.statistics
    assert np.nanmax(doubled.high) > 2
    assert np.nanmax(single.high) <= 1
    data = result.measures[1]
    for change in ({"unit": "share of attention"}, {"estimator": "atp"}, {"word": ""}):
        assert mean_range(replace(data, **change)) is None
    assert mean_range(replace(data, patched=data.patched + 0.1)) is None
    assert mean_range(data) == (0.0, 1.0)
