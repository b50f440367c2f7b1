"""Comparison of two runs: effects that differ beyond noise, and the compared rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mechdsl.results.differences.comparison import CellDifference, compare_results
from mechdsl.statistics.intervals import share_difference
from mechdsl.statistics.measurements import EffectSums, MeasureData

from .synthetic import counted, finished, measure
from .two_results import BASE, OLD, PROMPTS, noise, only, plain, results, states, two

# --- states of cells ------------------------------------------------------------------------------


def test_identical_runs_have_no_differences() -> None:
    found = two(measure(OLD, BASE), measure(OLD, BASE))
    assert states(found) == {"equal": 4}
    assert (found.changed, found.reasons, found.cells) == (False, (), ())
    assert (found.inputs, found.rows, found.verdicts, found.added, found.removed) == ((),) * 5
    assert found.compared == 4


def test_difference_beyond_noise_is_reported_with_its_statistics() -> None:
    new = OLD.copy()
    new[2] += 0.5 + 0.1 * noise(3, 1)[0]
    found = two(measure(OLD, BASE), measure(new, BASE))
    assert states(found) == {"equal": 3, "changed": 1}
    cell = only(found, "changed")
    assert (cell.rows, cell.rows_changed, cell.rows_beyond, cell.units) == (24, 24, 24, 24)
    assert cell.largest == pytest.approx(np.abs(new - OLD).max())
    assert cell.old == pytest.approx(float((OLD - BASE)[2].mean()))
    assert cell.new == pytest.approx(float((new - BASE)[2].mean()))
    assert cell.difference == pytest.approx(cell.new - cell.old)  # type: ignore[operator]
    assert cell.low is not None
    assert cell.high is not None
    assert 0.4 < cell.low < cell.difference < cell.high < 0.6  # type: ignore[operator]
    assert cell.p_corrected is not None
    assert cell.p_corrected < 0.001
    assert cell.paired
    assert found.changed
    assert found.reasons == ("1 cell changed beyond noise",)


def test_random_differences_are_reported_as_noise() -> None:
    found = two(measure(OLD, BASE), measure(OLD + 0.3 * noise(4), BASE))
    assert states(found) == {"noise": 4}
    assert not found.changed
    assert all(each.rows_changed == 24 and each.largest for each in found.cells)


def test_identical_shift_in_every_row_exceeds_noise() -> None:
    """A shift without variance must not cause a division by zero."""
    found = two(measure(OLD, BASE), measure(OLD + 0.125, BASE))
    cell = found.changed_cells[0]
    assert states(found) == {"changed": 4}
    assert cell.low == pytest.approx(0.125)
    assert cell.high == pytest.approx(0.125)
    assert cell.p_corrected == pytest.approx(4 * cell.p)  # type: ignore[operator]


def test_equal_shift_of_patched_and_base_values_leaves_effects_equal() -> None:
    found = two(measure(OLD, BASE), measure(OLD + 1, BASE + 1))
    assert states(found) == {"noise": 4}
    assert all(each.rows_changed == 24 for each in found.cells)
    assert all(each.largest == pytest.approx(1) for each in found.cells)
    assert all(abs(each.difference or 0) < 1e-12 for each in found.cells)


@pytest.mark.parametrize(("size", "state"), [(0.9e-6, "rounding"), (2.1e-6, "changed")])
def test_difference_within_rounding_is_reported_as_rounding(size: float, state: str) -> None:
    """The bounds of both runs count: 1e-6 each."""
    bound = np.full((1, PROMPTS), 1e-6)
    old, new = measure(OLD, BASE, rounding=bound), measure(OLD + 2 * size, BASE, rounding=bound)
    found = two(old, new)
    assert states(found) == {state: 4}
    if state == "rounding":
        assert not found.changed
        assert all((each.rows_changed, each.rows_beyond) == (24, 0) for each in found.cells)
        assert all(each.p is None for each in found.cells)


def test_single_row_beyond_rounding_is_noise() -> None:
    """All rows move in one direction by less than the rounding bound, one row by more."""
    bound = np.full((1, PROMPTS), 1e-6)
    new = OLD + 1e-6
    new[:, 0] += 2e-6
    found = two(measure(OLD, BASE, rounding=bound), measure(new, BASE, rounding=bound))
    assert states(found) == {"noise": 4}
    cell = found.cells[0]
    assert cell.p_corrected is not None
    assert cell.p_corrected < 0.05  # rounding may have one sign in all rows
    assert (cell.rows_changed, cell.rows_beyond) == (24, 1)


@pytest.mark.parametrize(("prompts", "state"), [(4, "unclear"), (5, "unclear"), (8, "changed")])
def test_too_few_units_are_unclear(prompts: int, state: str) -> None:
    old = OLD[:1, :prompts]
    found = two(measure(old, BASE[:, :prompts]), measure(old + 1, BASE[:, :prompts]))
    assert states(found) == {state: 1}
    cell = only(found, state)
    wanted = {
        4: "4 prompts: no claim below 5",
        5: "5 prompts: too few for a significant p after correction",
        8: None,
    }
    assert cell.reason == wanted[prompts]
    assert cell.rows_changed == prompts  # reported nevertheless
    assert found.changed == (state == "changed")


def test_few_units_are_unclear_if_they_agree_and_noise_if_not() -> None:
    """With 8 prompts, no cell of 20 can be significant after correction: 20 / 2^7."""
    base, old = noise(70, 1, 8), noise(71, 20, 8)
    moved = np.ones((20, 8))
    moved[:10] += np.linspace(0, 0.5, 8)
    moved[5:10, 0] = -0.1
    moved[10:, ::2] = -1.01
    found = two(measure(old, base), measure(old + moved, base))
    assert states(found) == {"unclear": 5, "noise": 15}
    assert {each.reason for each in found.cells} == {
        "8 prompts: too few for a significant p after correction",
        None,
    }


def test_rows_indistinguishable_in_either_run_are_one_unit() -> None:
    """Rows are joined if the old or the new run can't distinguish them."""
    halves = np.arange(PROMPTS)[None] // 12
    for sides in (({"seen": halves}, {}), ({}, {"seen": halves})):
        old, new = (
            measure(values, BASE, **more)
            for values, more in zip((OLD, OLD + 1), sides, strict=True)
        )
        found = two(old, new)
        assert {each.units for each in found.cells} == {2}
        assert states(found) == {"unclear": 4}


def test_units_are_matched_across_row_orders() -> None:
    order = np.roll(np.arange(PROMPTS), 1)
    pairs = np.arange(PROMPTS)[None] // 2
    old = measure(OLD, BASE, seen=pairs)
    new = measure((OLD + 1)[:, order], BASE[:, order], seen=pairs[:, order])
    found = two(old, new, keys=tuple((100 + order).tolist()))
    assert {each.units for each in found.cells} == {12}


def test_units_are_values_of_stats_by() -> None:
    values = {"count": [n // 3 for n in range(PROMPTS)]}
    old, new = (replace(plain(measure(v, BASE)), row_values=values) for v in (OLD, OLD + 1))
    one, other = (results(finished(each, by="count")) for each in (old, new))
    found = compare_results(one, other)
    assert {each.units for each in found.cells} == {8}


def test_strata_narrow_the_interval_of_a_difference() -> None:
    """The change differs between strata, whose proportions are fixed by design."""
    strata = np.arange(PROMPTS) % 2
    new = measure(OLD + np.where(strata, 1.0, 0.2) + 0.05 * noise(9), BASE)
    sides = [replace(plain(each), strata=strata) for each in (measure(OLD, BASE), new)]
    one, other = (results(finished(each)) for each in sides)
    within, anyhow = compare_results(one, other).cells[0], two(measure(OLD, BASE), new).cells[0]
    assert within.high - within.low < 0.3 * (anyhow.high - anyhow.low)  # type: ignore[operator]


def test_cell_inert_in_both_runs_is_not_tested() -> None:
    base = np.repeat(BASE, 4, 0)
    still = {"inert": np.ones(4, dtype=bool)}
    found = two(measure(base, BASE, **still), measure(base + 1, BASE + 1, **still))
    assert states(found) == {"noise": 4}
    assert all(each.p is None and each.difference == 0 for each in found.cells)
    assert all(
        each.reason == "in neither run can it differ from the base run" for each in found.cells
    )


def test_cell_inert_in_one_run_is_tested() -> None:
    base = np.repeat(BASE, 4, 0)
    still = {"inert": np.ones(4, dtype=bool)}
    assert states(two(measure(base, BASE, **still), measure(base + 1, BASE))) == {"changed": 4}


# --- types of measures ----------------------------------------------------------------------------


def test_difference_of_ratios_has_an_interval() -> None:
    source = BASE + 5 + 0.5 * noise(5, 1)
    old = measure(BASE + 0.6 * (source - BASE) + 0.1 * noise(6), BASE, source)
    new = measure(BASE + 0.4 * (source - BASE) + 0.1 * noise(7), BASE, source)
    found = two(old, new)
    assert states(found) == {"changed": 4}
    for each in found.cells:
        assert each.difference == pytest.approx(-0.2, abs=0.03)
        assert each.low is not None
        assert each.high is not None
        assert each.low < -0.2 < each.high + 0.03


def test_ratio_with_a_denominator_near_zero_is_unclear() -> None:
    """The denominator differs from 0 on all rows, but not on the common rows."""
    source = BASE + 5
    source[0, :6] = BASE[0, :6] + np.array([2, -2, 2, -2, 1, -0.5])
    old, new = measure(OLD, BASE, source), measure(OLD + 1, BASE, source)
    found = two(old, new, keys=(*range(100, 106), *range(500, 518)))
    assert states(found) == {"unclear": 4}
    assert found.cells[0].reason == "m(source) − m(base) is too close to 0 on these rows"
    assert found.cells[0].rows == 6


def test_shares_have_an_exact_mcnemar_p_and_exact_limits() -> None:
    old = np.zeros((1, 20))
    new = np.zeros((1, 20))
    new[0, :9] = 1
    given = {"effect": "raw", "unit": "share"}
    found = two(measure(old, old, **given), measure(new, old, **given))
    cell = only(found, "changed")
    assert cell.p == pytest.approx(2 * 0.5**9)  # exact McNemar test: 9 of 9 in one direction
    sides = [EffectSums(each, np.ones((1, 20)), np.array([20])) for each in (new, old)]
    low, high = share_difference(sides[0], sides[1], np.array([20]), 95)
    assert (cell.low, cell.high) == (pytest.approx(low[0]), pytest.approx(high[0]))


@pytest.mark.parametrize("effect", ["delta", "total"])
def test_differences_of_shares_have_exact_limits_if_the_base_is_equal(effect: str) -> None:
    """The base cancels, so the difference is that of the `raw` shares."""
    random = np.random.default_rng(2)
    old, new, base = ((random.random((1, 20)) < q).astype(float) for q in (0.8, 0.3, 0.6))

    def compare(other_base: np.ndarray, **values: str) -> CellDifference:
        def side(patched: np.ndarray, own: np.ndarray) -> MeasureData:
            runs = (patched, own) if effect == "delta" else (old, own, patched)
            return measure(*runs, **{"unit": "share", "effect": effect, **values})

        (cell,) = two(side(old, base), side(new, other_base)).cells
        return cell

    raw = {"unit": "share", "effect": "raw"}
    (expected,) = two(measure(old, base, **raw), measure(new, base, **raw)).cells
    found = compare(base)
    assert (found.low, found.high, found.p) == (expected.low, expected.high, expected.p)
    moved = base.copy()
    moved[0, :1] = 1 - moved[0, :1]
    by_t, logits = compare(moved), compare(moved, unit="logit")
    assert (by_t.low, by_t.high, by_t.p) == (logits.low, logits.high, logits.p)


def test_differences_of_shares_on_other_rows_include_the_noise_of_the_base() -> None:
    """A base of 0 in every row cancels in paired rows only."""
    random = np.random.default_rng(2)
    old, new = ((random.random((1, 20)) < q).astype(float) for q in (0.8, 0.3))
    keys = tuple(range(500, 520))
    by_t, logits = (
        two(*(measure(each, np.zeros((1, 20)), unit=unit) for each in (old, new)), keys=keys).cells
        for unit in ("share", "logit")
    )
    assert by_t[0].low is not None
    assert (by_t[0].low, by_t[0].p) == (logits[0].low, logits[0].p)


def test_categories_have_shares_and_a_p_but_no_interval() -> None:
    first = finished(replace(counted(), row_keys=tuple(range(96))))
    data = first.measures[1]
    random = np.random.default_rng(0)
    moved = data.patched.copy()
    moved[3] = np.where(np.isnan(moved[3]) | (random.random(96) < 0.5), moved[3], 2)
    second = finished(replace(first, measures=(first.measures[0], replace(data, patched=moved))))
    found = compare_results(results(first), results(second))
    cell = only(found, "changed")
    assert states(found) == {"equal": 35, "changed": 1}
    assert (cell.kind, cell.low, cell.largest) == ("category", None, None)
    values, counts = np.unique(data.patched[3][~np.isnan(moved[3])], return_counts=True)
    assert cell.old == pytest.approx(counts.max() / counts.sum())
    assert cell.new == pytest.approx(
        np.nanmean(np.where(np.isnan(moved[3]), np.nan, moved[3] == values[counts.argmax()]))
    )


def test_p_of_two_categories_equals_p_of_one_share() -> None:
    old, new = np.zeros((1, 20)), np.zeros((1, 20))
    new[0, 3:9] = 1
    old[0, 0] = 1
    given = {"kind": "category", "effect": "raw"}
    cell = only(two(measure(old, old, **given), measure(new, old, **given)), "noise")
    assert cell.p == pytest.approx(2 * (1 + 7) / 2**7)  # 6 in one direction, 1 in the other
    assert (cell.old, cell.new) == (19 / 20, 14 / 20)
    others = tuple(range(500, 520))
    apart = two(measure(old, old, **given), measure(new, old, **given), keys=others)
    share = {"effect": "raw", "unit": "share"}
    alone = two(measure(old, old, **share), measure(new, old, **share), keys=others)
    assert apart.cells[0].p == pytest.approx(2 * (alone.cells[0].p or 0), rel=0.2)


def test_categories_that_rounding_may_alter_are_reported_as_rounding() -> None:
    labels = np.tile(np.arange(PROMPTS) % 3, (1, 1)).astype(np.float64)
    given = {"kind": "category", "effect": "raw", "rounding": np.ones((1, PROMPTS))}
    found = two(measure(labels, labels, **given), measure((labels + 1) % 3, labels, **given))
    assert states(found) == {"rounding": 1}


@pytest.mark.parametrize("seed", range(4))
def test_categories_of_two_samples_of_one_distribution_are_noise(seed: int) -> None:
    random = np.random.default_rng(seed)
    given = {"kind": "category", "effect": "raw"}
    sides = [random.integers(0, 3, (2, PROMPTS)).astype(np.float64) for _ in range(2)]
    old, new = (measure(each, each[:1], **given) for each in sides)
    found = two(old, new, keys=tuple(range(500, 500 + PROMPTS)))
    assert states(found) == {"noise": 2}
    shifted = measure(sides[1] * 0, sides[1][:1] * 0, **given)
    assert len(two(old, shifted, keys=tuple(range(500, 500 + PROMPTS))).changed_cells) == 2


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_matched_by_content_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(PROMPTS)
    new = measure((OLD + 1)[:, order], BASE[:, order])
    keys = tuple(int(100 + place) for place in order)
    found = two(measure(OLD, BASE), new, keys=keys)
    assert found.rows == ()
    assert [each.difference for each in found.cells] == pytest.approx([1] * 4)
    assert [each.largest for each in found.cells] == pytest.approx([1] * 4)
    again = two(measure(OLD, BASE), measure(OLD[:, order], BASE[:, order]), keys=keys)
    assert states(again) == {"equal": 4}


def test_only_common_rows_are_compared() -> None:
    """After a limit is raised, the additional rows don't affect the comparison."""
    old, new = OLD[:, :16], np.concatenate([OLD[:, :16], OLD[:, 16:] + 100], 1)
    found = two(measure(old, BASE[:, :16]), measure(new, BASE))
    assert states(found) == {"equal": 4}
    (rows,) = found.rows
    assert (rows.old, rows.new, rows.common) == (16, 24, 16)
    assert rows.added == tuple(range(16, 24))
    assert rows.removed == ()
    back = two(measure(new, BASE), measure(old, BASE[:, :16]))
    assert back.rows[0].removed == tuple(range(16, 24))
    assert not back.changed  # fewer rows are a different input


def test_duplicate_rows_are_matched_in_order() -> None:
    keys = tuple(100 + n // 2 for n in range(PROMPTS))
    sides = [plain(measure(values, BASE), keys=keys) for values in (OLD, OLD + 1)]
    one, other = (results(finished(each)) for each in sides)
    found = compare_results(one, other)
    assert found.rows == ()
    assert {(each.rows, each.units) for each in found.cells} == {(24, 12)}
    once = plain(measure(OLD[:, ::2], BASE[:, ::2]), keys=keys[::2])
    found = compare_results(results(finished(sides[0])), results(finished(once)))
    assert (found.rows[0].common, len(found.rows[0].removed)) == (12, 12)
    assert states(found) == {"equal": 4}


def test_runs_without_common_rows_are_compared_as_two_samples() -> None:
    others = tuple(range(500, 500 + PROMPTS))
    found = two(measure(OLD, BASE), measure(noise(8) + noise(9, 1), noise(9, 1)), keys=others)
    assert states(found) == {"noise": 4}
    assert not any(each.paired for each in found.cells)
    assert all(each.rows_changed is None for each in found.cells)
    assert "two samples" in found.conventions["not paired"]
    far = two(measure(OLD, BASE), measure(noise(8) + 5 + noise(9, 1), noise(9, 1)), keys=others)
    assert states(far) == {"changed": 4}
    small = two(measure(OLD, BASE), measure(noise(8)[:, :4] + 5, BASE[:, :4]), keys=others[:4])
    assert states(small) == {"unclear": 4}
    assert small.cells[0].reason == "4 prompts in the smaller sample: no claim below 5"


def test_two_samples_have_separate_units() -> None:
    """A value of `stats by` in both runs is one unit in each run, and so are identical rows."""
    others = tuple(range(500, 500 + PROMPTS))
    values = {"count": [n // 3 for n in range(PROMPTS)]}
    sides = [
        replace(plain(measure(OLD + shift, BASE), keys=keys), row_values=values)
        for shift, keys in ((0, None), (5, others))
    ]
    one, other = (results(finished(each, by="count")) for each in sides)
    found = compare_results(one, other)
    assert {each.units for each in found.cells} == {8}
    assert states(found) == {"changed": 4}
    pairs = np.arange(PROMPTS)[None] // 2
    for more in ({}, {"seen": pairs}), ({"seen": pairs}, {}):
        old, new = (measure(v, BASE, **own) for v, own in zip((OLD, OLD + 5), more, strict=True))
        assert {each.units for each in two(old, new, keys=others).cells} == {12}


def test_rows_in_a_cell_of_only_one_run_count_as_value_differences() -> None:
    new = OLD.copy()
    new[1, :3] = np.nan
    for one, other in ((OLD, new), (new, OLD)):
        cell = only(two(measure(one, BASE), measure(other, BASE)), "noise")
        assert (cell.rows, cell.rows_changed, cell.rows_beyond) == (21, 3, 3)
        assert cell.difference == 0
