"""Null bands against a reference from each draw's effect, and their coverage by simulation."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mechdsl.base.records import Registry
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.statistics_conventions import describe_equal_draws, statistics_conventions
from mechdsl.show.reports.text import (
    is_significant,
    null_band_text,
    null_p_texts,
    significance_marks,
    significance_note,
)
from mechdsl.statistics.measurements import MeasureData, NullBand, RandomControlValues
from mechdsl.statistics.null_bands import (
    band_level,
    band_rank,
    compute_null_bands,
    min_draws,
    rank_p,
)
from mechdsl.vocab.metrics import EFFECTS, EffectKind

from .synthetic import finished, heads, measure, report, with_controls


def band_of(
    data: MeasureData,
    drawn: RandomControlValues,
    means: list[np.ndarray],
    rounding: float = float("nan"),
    effects: Registry[EffectKind] = EFFECTS,
) -> tuple[NullBand | None, ...]:
    bounds = [np.full(len(each), rounding) for each in means]
    return compute_null_bands(
        [data], drawn, means=means, rounding=bounds, confidence=95.0, effects=effects
    )


def test_null_band_spans_ranked_effects_of_the_draws() -> None:
    random = np.random.default_rng(0)
    base = random.normal(-1, 1, (1, 12))
    source = base + random.normal(4, 1, (1, 12))
    drawn = base + random.normal(0, 1, (25, 3, 12))
    drawn[4, 1] = np.nan  # a draw without a prompt in this cell
    drawn[:, 2] = np.nan
    patched = base + random.normal(0, 0.5, (3, 12))
    data = measure(patched, base, source)
    category = measure(np.zeros((3, 12)), base, kind="category", effect="raw")
    total = measure(np.zeros((3, 12)), base, source, effect="total")
    values = RandomControlValues((drawn,) * 3, np.array([25, 25, 0]), 25, "heads")
    means = [(patched - base).mean(1) / (source - base).mean(), np.full(3, np.nan), np.ones(3)]
    band, *others = compute_null_bands(
        [data, category, total],
        values,
        means=means,
        rounding=[np.zeros(3)] * 3,
        confidence=80.0,
        effects=EFFECTS,
    )
    assert others == [None, None], "one has no mean, one doesn't depend on what is patched"
    assert band is not None
    assert (band.draws.tolist(), band.what, band.asked) == ([25, 24, 0], "heads", 25)
    for cell in (0, 1):
        means = [own[cell].mean() for own in drawn if not np.isnan(own[cell]).any()]
        found = (np.array(means) - base.mean()) / (source.mean() - base.mean())
        own = (patched[cell].mean() - base.mean()) / (source.mean() - base.mean())
        # rank 2 leaves 22 of 26 (21 of 25) places inside the band, rank 3 leaves 20
        lower = np.sort(found)
        assert (band.low[cell], band.high[cell]) == pytest.approx((lower[1], lower[-2]))
        assert band.level[cell] == pytest.approx((len(found) - 3) / (len(found) + 1))
        assert band.mean[cell] == pytest.approx(found.mean())
        larger = sum(1 for each in found if abs(each) >= abs(own))
        assert band.p[cell] == pytest.approx((1 + larger) / (1 + len(found)))
        assert band.inside[cell] == (lower[1] <= own <= lower[-2])
    assert np.isnan([band.low[2], band.mean[2], band.high[2], band.p[2], band.level[2]]).all()
    assert not band.inside[2]


def test_raw_metric_has_a_null_band_without_p() -> None:
    values = np.random.default_rng(1).normal(5, 1, (9, 1, 6))
    data = measure(values[0], np.zeros((1, 6)), effect="raw")
    drawn = RandomControlValues((values,), np.array([9]), 9, "heads")
    means = [values[0].mean(1)]
    (band,) = band_of(data, drawn, means)
    assert band is not None
    assert np.isnan(band.p[0])
    assert band.inside[0]


def test_cell_without_a_ratio_has_no_null_band() -> None:
    """Cells 1 and 3 have only prompts on which the two runs can't be distinguished."""
    random = np.random.default_rng(2)
    result = heads()
    (data,) = result.measures
    assert data.source is not None
    source, patched = data.source.copy(), data.patched.copy()
    half = patched.shape[1] // 2
    source[:, :half] = data.base[:, :half] + random.choice([-1e-3, 1e-3], half)
    source[:, :4] = data.base[:, :4] + [[1e-3, -1e-3, 1e-3, -2e-3]]
    for cell in range(len(patched)):
        patched[cell, half:] = np.nan if cell in (1, 3) else patched[cell, half:]
    made = with_controls(replace(result, measures=(replace(data, source=source, patched=patched),)))
    found = finished(made)
    (statistics,), band = found.statistics, ends(found)
    empty = np.isin(np.arange(len(patched)), (1, 3))
    assert np.isnan(statistics.mean).tolist() == empty.tolist()
    for values in (band.low, band.high, band.mean, band.level, band.p):
        assert np.isnan(values).tolist() == empty.tolist()
    assert not band.inside[empty].any()
    assert not band.weaker[empty].any()
    assert (band.draws == np.where(empty, 0, 39)).all()
    inside = (band.low <= statistics.mean) & (statistics.mean <= band.high)
    assert band.inside.tolist() == inside.tolist()
    assert band.inside.any()
    assert "without a value" not in (null_band_text(found, 0) or "")
    record = found.records()[1]
    assert (record["mean"], record["null_low"], record["null_p"]) == (None, None, None)


@pytest.mark.parametrize(
    ("draws", "confidence", "rank", "level"),
    [
        (1, 95, 1, Fraction(0)),
        (3, 95, 1, Fraction(1, 2)),
        (20, 95, 1, Fraction(19, 21)),
        (38, 95, 1, Fraction(37, 39)),
        (39, 95, 1, Fraction(38, 40)),
        (78, 95, 1, Fraction(77, 79)),
        (79, 95, 2, Fraction(76, 80)),
        (199, 95, 5, Fraction(190, 200)),
        (19, 90, 1, Fraction(18, 20)),
        (39, 90, 2, Fraction(36, 40)),
        (199, 99.9, 1, Fraction(198, 200)),
        (1999, 99.9, 1, Fraction(1998, 2000)),
    ],
)
def test_band_rank_is_the_largest_with_the_confidence(
    draws: int, confidence: float, rank: int, level: Fraction
) -> None:
    assert band_rank(draws, confidence) == rank
    assert band_level(draws, rank) == pytest.approx(float(level))
    asked = Fraction(str(confidence)) / 100
    assert rank == 1 or Fraction(draws + 1 - 2 * rank, draws + 1) >= asked
    assert Fraction(draws + 1 - 2 * (rank + 1), draws + 1) < asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draws", "repetitions"),
    [(3, 500), (20, 1000), *(pytest.param(n, 4000, marks=pytest.mark.slow) for n in (3, 20, 79))],
)
def test_null_band_covers_a_further_draw_at_its_level(draws: int, repetitions: int) -> None:
    """Sample draws without replacement from 120 skewed targets; the cell is a further draw."""
    random = np.random.default_rng(draws)
    effects = np.exp(random.normal(0, 1.5, 120)) - 0.7
    inside = 0
    ps: list[float] = []
    for _ in range(repetitions):
        own, *others = random.permutation(effects)[: draws + 1]
        data = measure(np.array([[own]]), np.zeros((1, 1)), effect="delta")
        values = RandomControlValues(
            (np.reshape(others, (-1, 1, 1)),), np.array([draws]), draws, "heads"
        )
        (band,) = band_of(data, values, [np.array([own])])
        assert band is not None
        inside += bool(band.inside[0])
        ps.append(float(band.p[0]))
    states = float(band_level(draws, band_rank(draws, 95.0)))
    spread = (states * (1 - states) / repetitions) ** 0.5
    assert abs(inside / repetitions - states) < 3.5 * spread
    for level in (1 / (1 + draws), 0.5, 0.75):  # a rank p is exact at multiples of 1 / (1 + draws)
        step = np.floor(level * (1 + draws)) / (1 + draws)
        share = np.mean(np.array(ps) <= step + 1e-12)
        assert abs(share - step) < 3.5 * (step * (1 - step) / repetitions) ** 0.5


def test_rank_p_counts_ties_as_larger() -> None:
    assert rank_p(-2.0, np.array([2.0, -2.0, 1.0])) == 0.75
    assert rank_p(0.0, np.array([0.0, 0.0])) == 1.0
    assert rank_p(3.0, np.array([2.0, -2.0, 1.0])) == 0.25


@pytest.mark.parametrize("rounding", [float("nan"), 1e-6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("by_zero", [False, True])
def test_effects_within_rounding_of_the_band_are_inside(
    rounding: float, sign: float, by_zero: bool
) -> None:
    """Two means may differ by twice the bound. All draws are 0.5 or, in the last cell, 0."""
    kinds = Registry[EffectKind]("effect")
    kinds.add("delta", replace(EFFECTS["delta"], is_shown_by_zero=by_zero))
    ends = np.array([0.5, 0.5, 0.5, 0.5, 0.0])
    moved = np.array([1.9e-6, -1.9e-6, 2.1e-6, -2.1e-6, 1e-9])
    values = sign * (ends + moved)
    data = measure(values[:, None], np.zeros((1, 1)), effect="delta")
    draws = np.broadcast_to(sign * ends[:, None], (39, 5, 1))
    drawn = RandomControlValues((draws,), np.full(5, 39), 39, "heads")
    (band,) = band_of(data, drawn, [values], rounding, kinds)
    assert band is not None
    is_near = np.array([True, True, False, False, True]) & np.isfinite(rounding)
    assert band.inside.tolist() == is_near.tolist()
    assert band.is_inside_by_rounding(values).tolist() == is_near.tolist()
    is_beyond = moved > 0 if by_zero else moved < 0
    assert band.weaker.tolist() == (~is_near & is_beyond).tolist()
    reached = is_near | is_beyond
    assert band.p == pytest.approx(np.where(reached, 1.0, 1 / 40))


def test_rounding_convention_counts_cells_that_rounding_moves_inside() -> None:
    plain = finished(with_controls(heads()))
    (found,), band = plain.statistics, ends(plain)
    out = np.flatnonzero(~band.inside & band.decides)
    assert len(out) > 1
    distance = np.maximum(band.low - found.mean, found.mean - band.high)[out]
    (data,) = plain.measures
    assert data.source is not None
    base = (data.source - data.base).mean()
    bound = float(np.median(distance)) * abs(base) / 2
    made = with_controls(heads())
    (own,) = made.measures
    given = replace(own, rounding=np.full_like(own.base, bound))
    result = finished(replace(made, measures=(given,)))
    (found,), band = result.statistics, ends(result)
    beyond = (found.mean < band.low) | (found.mean > band.high)
    count = int(np.count_nonzero(beyond & band.inside))
    slack = 2 * np.where(np.isnan(found.rounding), 0, found.rounding)
    expected = (band.low - slack <= found.mean) & (found.mean <= band.high + slack)
    assert band.inside.tolist() == expected.tolist()
    assert 0 < count < len(out)
    said = result.conventions["rounding"]
    assert (
        f"{count} cell{'s' * (count > 1)} outside of the null band by no more than rounding" in said
    )
    assert "outside of" not in plain.conventions.get("rounding", "")


# --- marks and notes ------------------------------------------------------------------------------


def banded(**values: np.ndarray | int) -> ExperimentResult:
    result = finished(with_controls(heads()))
    bands = [None if band is None else replace(band, **values) for band in result.controls]
    return replace(result, controls=tuple(bands))


def ends(result: ExperimentResult) -> NullBand:
    band = result.control(0)
    assert band is not None
    return band


def test_significant_cells_inside_the_null_band_are_marked() -> None:
    plain = finished(with_controls(heads()))
    cells = len(plain.cells)
    stars = significance_marks(replace(plain, controls=()), 0)
    assert "*" in stars
    for key, text in (("inside", "lie inside their null bands"), ("weaker", "the band")):
        no = np.zeros(cells, dtype=np.bool_)
        found = banded(**{"inside": no, "weaker": no, key: ~no})
        assert significance_marks(found, 0) == [star.replace("*", "°") for star in stars]
        said = significance_note(found, 0, "*", "°")
        assert said is not None
        assert said.startswith("* or ° ")
        assert said.endswith(text)
        words = "in band" if key == "inside" else "below band"
        table = replace(found, reports=(report("table"),)).to_text(160)
        assert table.count(f" {words}") == stars.count("*")
    none = banded(inside=no, weaker=no)
    assert significance_marks(none, 0) == stars
    assert "none of these lie inside their null bands" in (
        significance_note(none, 0, "*", "°") or ""
    )


def test_significance_note_without_p_values_reports_that_no_cell_was_tested() -> None:
    found = banded()
    every = found.statistics[0]
    none = replace(every, p_corrected=np.full_like(every.p_corrected, np.nan))
    said = significance_note(replace(found, statistics=(none, *found.statistics[1:])), 0, "*", "°")
    assert said == "no cell was tested: none has a p-value"


@pytest.mark.parametrize(
    ("inside", "weaker", "text"),
    [
        (True, False, "it lies inside its null band"),
        (False, True, "it lies between 0 and the band"),
        (False, False, "it lies outside its null band"),
    ],
)
def test_note_on_one_cell_names_its_place(inside: bool, weaker: bool, text: str) -> None:
    every = np.ones(len(finished(with_controls(heads())).cells), dtype=np.bool_)
    found = banded(inside=every & inside, weaker=every & weaker)
    first = int(np.flatnonzero(is_significant(found, 0))[0])
    alone = np.full(len(every), np.nan)
    alone[first] = found.statistics[0].p_corrected[first]
    one = replace(found.statistics[0], p_corrected=alone)
    note = significance_note(replace(found, statistics=(one, *found.statistics[1:])), 0, "", "")
    assert note is not None
    assert note.startswith("1 of 1 cell survives")
    assert note.endswith(f"; {text}")


def test_effects_that_zero_shows_are_weaker_beyond_the_band() -> None:
    """Such as completeness: the cells with the largest effects have a rank p near 1."""
    made = with_controls(heads())
    kinds = Registry[EffectKind]("effect")
    for name, entry in EFFECTS.items():
        kinds.add(name, replace(entry, is_shown_by_zero=True))
    assert made.drawn is not None
    means = [each.mean for each in finished(made).statistics]
    given = (made.measures, made.drawn)
    none = [np.zeros_like(each) for each in means]
    bands = [
        compute_null_bands(*given, means=means, rounding=none, confidence=95, effects=effects)[0]
        for effects in (EFFECTS, kinds)
    ]
    plain, zero = (band for band in bands if band is not None)
    values = means[0]
    away = ((values >= 0) & (values > plain.high)) | ((values <= 0) & (values < plain.low))
    assert zero.weaker.tolist() == away.tolist()
    assert away.any()
    strongest = int(np.argmax(np.abs(values)))
    assert zero.p[strongest] > 0.5 > plain.p[strongest]


@pytest.mark.parametrize(
    ("draws", "confidence", "decided"),
    [(38, 95, False), (39, 95, True), (18, 90, False), (19, 90, True), (198, 99, False)],
)
def test_null_band_of_few_draws_gives_no_verdict(
    draws: int, confidence: float, decided: bool
) -> None:
    """The band and its rank p are still reported."""
    assert (draws >= min_draws(confidence)) == decided
    made = finished(with_controls(heads(), draws), confidence=confidence)
    wide = replace(ends(made), inside=np.ones(len(made.cells), dtype=np.bool_))
    result = replace(made, controls=(wide,), reports=(report("table"),))
    assert ("°" in significance_marks(result, 0)) == decided
    assert ("null bands" in (significance_note(result, 0, "*", "°") or "")) == decided
    words = null_band_text(result, 0) or ""
    assert words.startswith(f"range of {draws} draws")
    assert ("a verdict at" in words) != decided
    cells = [cell["measures"][0] for cell in experiment_document(result).as_json()["cells"]]
    assert {cell["null"]["inside"] for cell in cells} == {True if decided else None}
    assert {row["null_inside"] for row in result.records()} == {True if decided else None}
    assert all(cell["null"]["low"] < cell["null"]["high"] for cell in cells)
    table = result.to_text(200)
    assert (" in band" in table) == decided
    assert "null" in table


def test_significance_note_ignores_cells_with_too_few_draws() -> None:
    result = banded()
    survived = np.flatnonzero([mark != " " for mark in significance_marks(result, 0)])
    draws = np.full(len(result.cells), 39)
    draws[survived[0]] = 3
    some = banded(draws=draws, inside=np.ones(len(draws), dtype=np.bool_))
    said = significance_note(some, 0) or ""
    assert said.endswith("1 of the 1 with 39 draws or more lies inside its null band")


def test_null_band_text_states_draws_and_probability() -> None:
    cells = len(heads().cells)

    def said(**values: np.ndarray | int) -> str | None:
        return null_band_text(banded(**values), 0)

    whole = (
        "range of 39 draws of random heads; a further draw falls in this range with "
        "probability 95 %"
    )
    assert said() == whole
    few = np.array([3] + [39] * (cells - 1))
    level = (few - 1) / (few + 1)
    ragged = said(draws=few, made=few, level=level)
    assert ragged == (
        "range of 3 to 39 draws of random heads, all that exist where fewer than 39; a "
        "further draw falls in this range with probability 50 % to 95 %; a verdict at 95 % "
        "needs 39 draws"
    )
    assert said(made=np.full(cells, 40)) == f"{whole}; {cells} draws without a value left out"
    some = np.array([0] + [17] * (cells - 1))
    gone = said(draws=some, made=some, level=np.array([np.nan] + [16 / 18] * (cells - 1)))
    assert gone is not None
    assert gone.startswith("range of 17 draws of random heads, all that exist; ")
    trimmed = said(rank=np.full(cells, 2))
    assert trimmed is not None
    assert "39 draws of random heads without the 1 lowest and highest; " in trimmed
    assert said(draws=np.zeros(cells, dtype=np.int64)) == "none of the random heads has a value"


def test_equal_draws_are_reported() -> None:
    """In the text below the table, and in the stored conventions."""
    heads_of = banded()
    band, cells = ends(heads_of), len(heads_of.cells)
    assert "same effect" not in (null_band_text(heads_of, 0) or "")
    assert describe_equal_draws(heads_of, 0) == ""
    low = band.low.copy()
    low[:2] = band.high[:2]
    said = null_band_text(banded(low=low), 0) or ""
    equal = f"all draws have the same effect in 2 of {cells} cells: their range has no width, so it"
    assert f"; {equal} doesn't show how much random heads differ" in said
    conventions = statistics_conventions(banded(low=low), EFFECTS)
    assert conventions["equal draws"].startswith(f"recovery: {equal}")
    rounding = np.full(cells, 1e-3)
    near = replace(band, low=band.high - 1.9e-3).is_one_value(rounding)
    assert near.tolist() == [True] * cells
    assert not replace(band, low=band.high - 2.1e-3).is_one_value(rounding).any()
    one = banded(low=low, draws=np.ones(cells, dtype=np.int64))
    assert describe_equal_draws(one, 0) == ""


def test_null_p_at_its_floor_is_printed_as_a_bound() -> None:
    band = ends(banded(p=np.full(len(heads().cells), 1 / 40)))
    assert null_p_texts(band, [0]) == ["≤0.025"]
    assert null_p_texts(replace(band, p=np.full(12, 2 / 40)), [0]) == ["0.050"]
    assert null_p_texts(replace(band, p=np.full(12, np.nan)), [0]) == ["–"]
