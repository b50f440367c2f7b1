"""Null bands, by hand from the effects of every draw."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.statistics.null_bands import null_bands
from mechdsl.vocab.effects import EFFECTS

from .synthetic import measure


def test_a_band_lies_between_the_effects_of_the_draws() -> None:
    random = np.random.default_rng(0)
    base = random.normal(-1, 1, (1, 12))
    source = base + random.normal(4, 1, (1, 12))
    drawn = base + random.normal(0, 1, (25, 3, 12))
    drawn[4, 1] = np.nan  # a draw without a prompt in this cell
    drawn[:, 2] = np.nan
    data = measure(np.zeros((3, 12)), base, source)
    category = measure(np.zeros((3, 12)), base, kind="category", effect="raw")
    total = measure(np.zeros((3, 12)), base, source, effect="total")
    flat = drawn.reshape(75, 12)
    band, *others = null_bands(
        [data, category, total], [flat] * 3, 25, "heads", confidence=80.0, effects=EFFECTS
    )
    assert others == [None, None], "one has no mean, one doesn't depend on what is patched"
    assert band is not None
    assert (band.draws, band.what) == (25, "heads")
    for cell in (0, 1):
        means = [own[cell].mean() for own in drawn if not np.isnan(own[cell]).any()]
        effects = (np.array(means) - base.mean()) / (source.mean() - base.mean())
        assert [band.low[cell], band.high[cell]] == pytest.approx(np.percentile(effects, [10, 90]))
        assert band.mean[cell] == pytest.approx(effects.mean())
    assert np.isnan([band.low[2], band.mean[2], band.high[2]]).all()
