"""Rows that a measure can't distinguish, at sites of vision encoders: they count once if their
patches are equal, whatever the text, and separately if another image is written into equal prompts.
"""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from .support import STATS, run_file
from .test_resampled_encoder import run_text

FAMILIES = ("llava", "idefics2")


def block(shown: str, first: str, second: str) -> str:
    """A block with the image of each row (`file`) or one image; row 1 has another word."""
    return f"""
prompts ask {{
  rows "data.jsonl"
  shown = {shown}
  image photo = "{{shown}}"
  word = if n = 1 then "{first}" else "{second}"
  template "{{word}} {{photo}} {first}"
  answer " {first}"
  wrong " {second}"
  corrupt changed {{ shown = file }}
}}
"""


def run(family: str, shown: str, *lines: str) -> ExperimentResult:
    every = ("model m", "prompts ask", *lines, STATS)
    text = "experiment e {\n" + "\n".join(f"  {line}" for line in every) + "\n}\n"
    if family == "idefics2":
        [found] = run_text(text, "equal", "planned", block(shown, "w1", "w2"), splits=False)
        return found
    return run_file(text, family, block=block(shown, "dots", "circle"))["e"]


def count_rows(result: ExperimentResult) -> int:
    """Count the distinguishable rows of its only cell; equal ones have equal values."""
    [data] = result.measures
    [values] = data.patched
    seen = np.arange(len(values)) if data.seen is None else data.seen[0]
    for number in np.unique(seen):
        assert np.ptp(values[seen == number]) < 1e-4
    return len(np.unique(seen))


@pytest.mark.parametrize("position", ["photo row 1 col 2 token", "photo tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_images_written_into_equal_prompts_count_separately(
    family: str, position: str
) -> None:
    lines = (
        "from changed into clean",
        f"patch resid_post vision layer 1 at {position}",
        "measure logit(answer) - logit(wrong) as delta",
    )
    found = run(family, '"0.png"', *lines)
    values = found.measures[0].patched[0]
    assert np.ptp(values) > 1e-3
    assert count_rows(found) == len(values) >= 3  # row 1 has the same image twice


@pytest.mark.parametrize("position", ["photo row 1 col 2 token", "photo tokens"])
@pytest.mark.parametrize(("shown", "expected"), [('"0.png"', 1), ("file", 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_equal_patches_count_once(
    family: str, shown: str, expected: int, position: str
) -> None:
    found = run(family, shown, f"observe norm resid_post vision layer 1 at {position}")
    assert len(found.measures[0].patched[0]) == 4
    assert count_rows(found) == expected


def test_an_early_token_of_an_image_sees_patches_that_a_rule_writes_later() -> None:
    """Every token of an image reads the whole image in the vision encoder."""
    lines = (
        "from changed into clean",
        "patch resid_pre vision layer 0 at photo row 3 col 3 token",
        'measure logit("dots") at photo row 1 col 1 token as delta',
    )
    found = run("llava", '"0.png"', *lines)
    assert np.ptp(found.measures[0].patched[0]) > 1e-3
    assert count_rows(found) == len(found.measures[0].patched[0])
