"""`benchmarks.coverage.files`: files of which the truth is known are run as any other."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.coverage import files
from benchmarks.coverage.setting import Figure, Outcome, Setting

from ..quick import some

SETTINGS = list(files.settings())


def test_the_metrics_give_what_was_drawn() -> None:
    random = np.random.default_rng(0)
    drawn = files.with_source(random, 2)
    said = ["measure m0 as recovery", "measure m1 as delta"]
    (found,) = files.results(files.experiment("one", said, source=True), drawn).experiments
    rows = [
        files.ITEMS * (count - 2) + ["apple", "pear", "plum", "fig"].index(item)
        for count, item in zip(found.row_values["count"], found.row_values["item"], strict=True)
    ]
    assert sorted(rows) == list(range(files.ROWS))
    for number, data in enumerate(found.measures):
        np.testing.assert_allclose(data.patched, drawn[number, : files.CELLS][:, rows], atol=1e-6)
        np.testing.assert_allclose(data.base[0], drawn[number, files.BASE][rows], atol=1e-6)
    source = found.measures[0].source
    assert source is not None
    np.testing.assert_allclose(source[0], drawn[0, files.SOURCE][rows], atol=1e-6)


@pytest.mark.parametrize(
    "setting", some(SETTINGS, SETTINGS[::4]), ids=[each.name for each in SETTINGS]
)
def test_what_is_true_holds_and_what_is_not_does_not(setting: Setting) -> None:
    """Three files hold few false verdicts, if any."""
    counts = setting.run(np.random.default_rng(3), 3)
    for figure, (held, of) in zip(setting.figures, counts.tolist(), strict=True):
        assert of == 3
        assert held >= 2 if figure.low is not None else held <= 1, figure.name


def test_an_interval_that_reaches_beyond_the_bound_surely_fails() -> None:
    (figure,) = (Figure("false", high=6.0, surely=True),)
    setting = SETTINGS[0]
    assert Outcome(setting, figure, 90, 2500, 2500).verdict == "holds"
    assert Outcome(setting, figure, 140, 2500, 2500).interval[1] > 6
    assert Outcome(setting, figure, 140, 2500, 2500).verdict == "fails"
    assert Outcome(setting, Figure("false", high=6.0), 140, 2500, 2500).verdict == "holds"
