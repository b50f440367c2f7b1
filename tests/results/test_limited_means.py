"""Intervals of mean probabilities with limits that no mean can be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import mechdsl

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


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_convention_counts_cells_with_limits_outside_of_the_range(tmp_path: Path) -> None:
    measures = (
        "measure prob(answer) as raw",
        "measure logit(answer) as raw",
        "measure correct as raw",
    )
    result = experiment(tmp_path, *measures)
    own = result.statistics[0]
    outside = int(np.sum((own.low < -0.0005) | (own.high > 1.0005)))
    assert outside > 0
    assert np.all((own.mean >= 0) & (own.mean <= 1))
    (said,) = re.findall(
        r"in (\d+) cells?, a limit of (\S+) is outside of 0 to 1", result.conventions["interval"]
    )
    assert said == (str(outside), "prob(answer)")


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_convention_is_silent_about_effects_inside_and_differences(tmp_path: Path) -> None:
    inside = "measure prob(answer) as delta"
    difference = "measure 2 * prob(answer) as raw"
    result = experiment(tmp_path, inside, difference)
    assert np.nanmax(result.statistics[1].high) > 1.0005
    assert "outside of" not in result.conventions["interval"]
