"""`benchmarks.coverage.files`: files with known true effects."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.coverage import files
from benchmarks.coverage.setting import Figure, Outcome, Setting

from ..quick import some

SETTINGS = list(files.settings())


def test_file_metrics_return_the_drawn_values() -> None:
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
def test_true_statements_hold_and_false_ones_do_not(setting: Setting) -> None:
    """At most one of three files has a false verdict."""
    counts = setting.run(np.random.default_rng(3), 3)
    for figure, (held, of) in zip(setting.figures, counts.tolist(), strict=True):
        assert of == 3
        assert held >= 2 if figure.low is not None else held <= 1, figure.name


def test_sure_figure_fails_if_its_interval_crosses_the_bound() -> None:
    (figure,) = (Figure("false", high=6.0, surely=True),)
    setting = SETTINGS[0]
    assert Outcome(setting, figure, 90, 2500, 2500).verdict == "holds"
    assert Outcome(setting, figure, 140, 2500, 2500).interval[1] > 6
    assert Outcome(setting, figure, 140, 2500, 2500).verdict == "fails"
    assert Outcome(setting, Figure("false", high=6.0), 140, 2500, 2500).verdict == "holds"
