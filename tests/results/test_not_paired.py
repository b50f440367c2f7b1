"""Differences between experiments with different rows state that they aren't all paired."""

from __future__ import annotations

import numpy as np
import pytest

from .test_leads import cells_of, verdict

RANDOM = np.random.default_rng(0)
MINE = cells_of(RANDOM.normal(2, 1, (2, 12)), keys=list(range(12)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (list(range(12)), None),
        (list(range(12))[::-1], None),
        (list(range(6, 12)), "not all paired: `there` has 6 of these 12 prompts"),
        (
            list(range(8, 20)),
            "not all paired: `there` has 4 of these 12 prompts and 8 others",
        ),
        (
            list(range(20, 32)),
            "not all paired: `there` has none of these 12 prompts and 12 others",
        ),
    ],
)
def test_difference_over_unequal_rows_states_the_unpaired_rows(
    keys: list[int], said: str | None
) -> None:
    there = cells_of(RANDOM.normal(0, 1, (2, len(keys))), name="there", keys=keys)
    for line in (
        "mean(delta) - mean(delta of there) > -9",
        "mean(delta of there) - mean(delta) in -9..9",
    ):
        found = verdict(line, MINE, there=there)
        assert found.holds
        parts = [part for part in (found.reason or "").split("; ") if "paired" in part]
        assert parts == ([] if said is None else [said])
    alone = verdict("mean(delta of there) < 9", MINE, there=there)
    assert alone.reason is None
