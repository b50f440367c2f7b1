"""Cells that a measure can't differ in are one number, and one test."""

from __future__ import annotations

import numpy as np
import pytest

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.corrections import holm
from mechdsl.statistics.measurements import find_repeated_cells
from mechdsl.vocab.metrics import EFFECTS

from ..fruit import FRUIT
from .synthetic import measure, statistics

ROWS = np.random.default_rng(4).normal(0.4, 1, (4, 24))
BASE = np.zeros((1, 24))


def test_cells_with_equal_codes_and_values_are_one_number() -> None:
    patched = ROWS[[0, 0, 1, 0, 2]]
    codes = np.array([0, 0, 0, 1, 1])
    data = measure(patched, BASE, same=codes)
    assert find_repeated_cells(data, EFFECTS["delta"]).tolist() == [0, 0, 2, 3, 4]
    other = measure(patched, BASE)
    assert find_repeated_cells(other, EFFECTS["delta"]).tolist() == [0, 1, 2, 3, 4]


def test_effects_of_unpatched_runs_are_one_number_per_set_of_rows() -> None:
    patched = ROWS.copy()
    patched[2, :4] = np.nan
    data = measure(patched, BASE, ROWS[:1] + 1, effect="total")
    assert find_repeated_cells(data, EFFECTS["total"]).tolist() == [0, 0, 2, 0]
    seen = np.stack([np.arange(24)] * 4)
    seen[3, 1] = 0
    data = measure(patched, BASE, ROWS[:1] + 1, effect="total", seen=seen)
    assert find_repeated_cells(data, EFFECTS["total"]).tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("correction", ["holm", "bh", "max"])
def test_repeated_numbers_are_corrected_once(correction: str) -> None:
    settings = statistics(correction=correction)
    (alone,) = compute_cell_statistics([measure(ROWS, BASE)], settings, 0, effects=EFFECTS)
    repeats = np.array([0, 0, 1, 2, 2, 3])
    data = measure(ROWS[repeats], BASE, same=repeats)
    (found,) = compute_cell_statistics([data], settings, 0, effects=EFFECTS)
    assert (alone.tests, found.tests) == (4, 4)
    assert found.p_corrected == pytest.approx(alone.p_corrected[repeats])
    assert found.repeated.tolist() == [False, True, False, False, True, False]
    assert not alone.repeated.any()


def run(*lines: str) -> tuple[ExperimentResult, list[str]]:
    body = "\n  ".join(lines)
    text = f"{FRUIT}\nexperiment e {{\n  model toy\n  prompts fruit limit 8\n  {body}\n}}\n"
    found = mechdsl.run(text, progress=False, store=False)
    return found.files[0].experiments[0], [each.code for each in found.diagnostics]


OBSERVED = "observe attention layer * head * from last token to first token"


def test_measure_next_to_an_observation_is_one_test() -> None:
    rule = "for h in 0..1 { ablate layer 3 head h at last token with zero }"
    alone, _ = run(rule, "measure logit(answer) as delta")
    found, codes = run(rule, OBSERVED, "measure logit(answer) as delta")
    number = next(n for n, each in enumerate(found.measures) if each.effect == "delta")
    cells = found.statistics[number]
    assert (cells.tests, len(cells.p)) == (2, 2 * 16)
    assert np.unique(cells.p_corrected) == pytest.approx(
        np.unique(alone.statistics[0].p_corrected), rel=1e-4
    )
    assert "over 2 cells; 30 further cells not counted" in found.conventions["correction"]
    assert "W0720" not in codes, "32 tests of 8 prompts could have no p below 0.05"


def test_total_effect_over_a_sweep_is_one_test() -> None:
    found, codes = run(
        "from fewer into clean",
        "ablate layer * head * at last token with zero",
        "measure logit(answer) as total",
    )
    (cells,) = found.statistics
    assert (cells.tests, len(cells.p)) == (1, 16)
    assert cells.p_corrected == pytest.approx(holm(cells.p[:1]).repeat(16))
    assert "W0720" not in codes, "16 tests of 8 prompts could have no p below 0.05"
