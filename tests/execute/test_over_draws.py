"""Draws of noise are averaged where they have a value, and not where one is lost."""

from __future__ import annotations

import numpy as np

from mechdsl.execute.found import Found, Gap


def test_what_is_averaged_over_draws() -> None:
    """Rows of three draws: all there, one too short, none there, one broken, one a gap."""
    nan = np.nan
    rows = [[1, 2, 6], [1, nan, 5], [nan] * 3, [nan, 2, 3], [4, nan, 2]]
    values = np.array(rows, dtype=np.float64).reshape(-1)
    broken = np.zeros(15, dtype=np.bool_)
    broken[9] = True
    gaps = {0: Gap(np.array([13]), "why")}
    none = np.zeros(15)
    found = Found([values, values], broken, [none, none], {}, gaps).over_draws(3)
    np.testing.assert_array_equal(found.values[0], [3, 3, nan, nan, nan])
    np.testing.assert_array_equal(found.values[1], [3, 3, nan, nan, 3])
    assert found.broken.tolist() == [False, False, False, True, False]
    assert found.gaps[0].rows.tolist() == [4]
