"""Expectations: accepted conditions and their verdicts."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mechdsl.checks.conditions import KnownMeasure, KnownNames, cell_coordinates
from mechdsl.checks.expectations import check_expectation
from mechdsl.diagnostics.experiments import NoRowsKept
from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.collection import drop_measures
from mechdsl.results.assembly.combination import average_over_axis
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.results.verdicts.decision import decide_all_expectations
from mechdsl.results.verdicts.estimates import Estimate, FixedNumber, combine_estimates

from .synthetic import expectation, finished, heads, measure, positions
from .two_results import plain

KNOWN = KnownNames(
    measures=[KnownMeasure("ld", "recovery")],
    axes=["layer", "head"],
    runs=["clean", "fewer"],
    experiments=["other_experiment"],
)
TWO = replace(
    KNOWN,
    measures=[KnownMeasure("ld", "recovery"), KnownMeasure("prob(answer)", "delta", word="prob")],
)


@pytest.fixture(name="result", scope="module")
def _result() -> ExperimentResult:
    return finished(heads())


def verdict(line: str, result: ExperimentResult, **others: ExperimentResult) -> ExpectOutcome:
    return decide_all_expectations([expectation(line)], result, others)[0]


@pytest.mark.parametrize(
    "line",
    [
        "max(recovery) > 0.3",
        "recovery(L2H1) > 0.5",
        "ld(L2H1) > 0.5",
        "recovery(L2H1.z) > 0.5",
        "argmax(recovery) = L2H1",
        "L2H1 = argmax(recovery of ld)",
        "argmin(recovery) = L1H3",
        "argmax(recovery) != L0H0",
        "top 2 contains L2H1, L1H3",
        "mean(recovery, layer 0..1) < 0.05",
        "mean(recovery, layer 0) = 0",
        "max(recovery, layer: 2) > 0.5",
        "max(recovery, layer: 1..2, head: 1) > 0.5",
        "accuracy(clean) > 0.84",
        "accuracy(clean) > 84%",
        "accuracy(fewer) > 0.94",
        "accuracy(fewer) >= 1 on mean",
        "recovery(L2H1) near 0.6 within 0.05",
        'recovery(L2H1) near 0.6 within 0.05 citing "Wang 2022"',
        "recovery(L2H1) in 0.5..0.7",
        "max(recovery) - min(recovery) > 0.7",
        "2 * max(recovery) > 1",
        "0.3 < max(recovery)",
        "abs(recovery(L1H3)) > 0.1",
        "recovery(L2H1) > recovery(L1H3)",
        "max(recovery) > 0.3 and min(recovery) < 0",
        "max(recovery) > 0.9 or min(recovery) < 0",
        "not max(recovery) > 0.9",
        "not (max(recovery) > 0.9 or min(recovery) > 0)",
        "not recovery(L2H1) near 0 within 0.1",
        "not argmax(recovery) = L0H0",
        "not not max(recovery) > 0.3",
    ],
)
def test_true_expectation_holds(line: str, result: ExperimentResult) -> None:
    assert check_expectation(expectation(line), KNOWN) == []
    found = verdict(line, result)
    assert found.holds, found


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("max(recovery) > 0.7", None),
        ("recovery(L2H1) < 0.6", "it holds for the mean, but not for the whole interval"),
        ("recovery(L2H1) near 0.6 within 0.001", "it holds for the mean, but"),
        ("argmax(recovery) = L1H3", None),
        ("top 2 contains L2H1, L0H0", "L0H0 has rank"),
        ("accuracy(clean) > 0.95", None),
        ("accuracy(fewer) = 1", "it holds for the mean, but"),
        ("argmax(recovery, layer 0) = L0H0", "by the mean, but can't be distinguished from L0H1"),
        ("argmax(recovery, layer 0) != L0H3", "by the mean, but can't be distinguished from L0H3"),
        ("top 3 contains L1H1", None),
        ("recovery(L2H1) > recovery(L2H1)", "all 64 prompts have the same value"),
        ("max(recovery) > 0.3 and min(recovery) > 0", None),
        ("not max(recovery) > 0.3", None),
        # neither the bound nor its negation is certain
        ("not recovery(L2H1) > 0.6", "it holds for the mean, but"),
        ("recovery(L9H9) > 0", "no cell matches L9H9"),
        ("recovery(layer 2) > 0", "layer 2 matches 4 cells"),
        ("recovery(L2H1.q) > 0", "no cell matches L2H1.q"),
        ("argmax(recovery) = L9H9", "no cell matches L9H9"),
        ("not argmax(recovery) = L9H9", "no cell matches L9H9"),
        ("argmin(recovery, layer 0) != L1H0", "no cell matches L1H0, layer 0"),
        ("top 12 contains L2H1, L9H9", "no cell matches L9H9"),
    ],
)
def test_false_or_uncertain_expectation_fails_with_its_reason(
    line: str, reason: str | None, result: ExperimentResult
) -> None:
    found = verdict(line, result)
    assert not found.holds
    if reason:
        assert reason in (found.reason or "")


def test_on_mean_relaxes_the_bound(result: ExperimentResult) -> None:
    assert not verdict("recovery(L2H1) < 0.6", result).holds
    assert verdict("recovery(L2H1) < 0.6 on mean", result).holds


def test_expectation_of_a_cell_has_the_interval_of_the_table(result: ExperimentResult) -> None:
    found = verdict("recovery(L2H1) > 0", result)
    table = result.statistics[0]
    assert [found.value, found.low, found.high] == pytest.approx(
        [table.mean[9], table.low[9], table.high[9]]
    )


def reference_pivots(
    top: np.ndarray, bottom: np.ndarray, share: np.ndarray, seed: int, resamples: int
) -> tuple[float, float, np.ndarray]:
    """The weighted sum of ratios of cells, its error by the delta method, and its pivots."""

    def of(rows: np.ndarray) -> tuple[float, float]:
        value, moves = 0.0, np.zeros(len(rows))
        for own, weight in zip(top, share, strict=True):
            ratio = own[rows].mean() / bottom[rows].mean()
            value += weight * ratio
            moves += weight * (own[rows] - ratio * bottom[rows]) / bottom[rows].mean()
        return value, moves.std(ddof=1) / np.sqrt(len(rows))

    random = np.random.default_rng(seed)
    value, error = of(np.arange(len(bottom)))
    drawn = [of(random.integers(0, len(bottom), len(bottom))) for _ in range(resamples)]
    return value, error, np.array([(moved - value) / own for moved, own in drawn])


def test_expect_of_a_raw_measure_with_few_prompts_has_the_interval_of_its_row() -> None:
    """A raw measure isn't tested against 0, so p with five prompts doesn't widen the interval."""
    made = heads(prompts=5)
    values = np.tile([2.01, 2.03, 2.02, 2.0, 2.04], (len(made.cells), 1))
    raw = measure(values, np.zeros((1, 5)))
    result = finished(replace(made, measures=(replace(raw, effect="raw"),)))
    found = verdict("ld(L2H1) near 2 within 0.1", result)
    row = result.statistics[0]
    assert found.holds
    assert (found.low, found.high) == pytest.approx((row.low[0], row.high[0]))


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
@pytest.mark.parametrize("effect", ["recovery", "delta"])
def test_expect_of_a_mean_or_area_has_the_interval_of_its_table_row(test: str, effect: str) -> None:
    made = heads(prompts=12)
    cells = [CellKey({"layer": n // 4, "k": n % 4}, cell.site) for n, cell in enumerate(made.cells)]
    measures = (replace(made.measures[0], effect=effect),)
    made = replace(made, axes=("layer", "k"), cells=tuple(cells), measures=measures)
    for area in (False, True):
        line = f"auc({effect}, k, layer: 1)" if area else f"mean({effect}, layer: 1)"
        found = verdict(f"{line} > 0", finished(made, test=test))
        row = finished(average_over_axis(made, "k", area=area), test=test).statistics[0]
        expected = [row.mean[1], row.low[1], row.high[1]]
        assert [found.value, found.low, found.high] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_mean_over_cells_is_studentised(result: ExperimentResult) -> None:
    data = result.measures[0]
    assert data.source is not None
    top, bottom = data.patched - data.base, (data.source - data.base)[0]
    share = np.array([0.0] * 4 + [1 / 8] * 8)
    value, error, pivots = reference_pivots(top, bottom, share, 5, 4000)
    found = verdict("mean(recovery, layer 1..2) > 0", result)
    t = stats.t.ppf(0.975, 63)
    low = value - error * max(np.percentile(pivots, 97.5), t)
    high = value - error * min(np.percentile(pivots, 2.5), -t)
    assert found.value == pytest.approx(value)
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.2 * error)
    twice = verdict("2 * mean(recovery, layer 1..2) - 1 > 0", result)
    assert found.low is not None
    assert found.high is not None
    assert [twice.low, twice.high] == pytest.approx([2 * found.low - 1, 2 * found.high - 1])


def test_max_over_cells_uses_simultaneous_bounds(result: ExperimentResult) -> None:
    """The maximum isn't resampled, since the largest estimate overstates the largest effect."""
    data = result.measures[0]
    assert data.source is not None
    top, bottom = data.patched - data.base, (data.source - data.base)[0]
    live = [cell for cell in range(12) if not data.inert[cell]]
    alone = [
        reference_pivots(top[[cell]], bottom, np.ones(1), 5, 2000) for cell in live
    ]  # the same rows are drawn for every cell
    values, errors = (np.array([each[i] for each in alone]) for i in (0, 1))
    pivots = np.stack([each[2] for each in alone])
    upper, lower = np.percentile(pivots.max(0), 97.5), np.percentile(pivots.min(0), 2.5)
    table = result.statistics[0]
    for line, low, high in (
        ("max(recovery) > 0", (values - upper * errors).max(), table.high.max()),
        ("min(recovery) < 0", table.low.min(), (values - lower * errors).min()),
    ):
        found = verdict(line, result)
        assert [found.low, found.high] == pytest.approx([low, high], abs=0.006), line
        assert found.holds
    assert upper > 2.4 > 2.0


def null(prompts: int, cells: int, seed: int) -> ExperimentResult:
    """Build an experiment without an effect in any cell."""
    random = np.random.default_rng(seed)
    data = measure(random.normal(0, 1, (cells, prompts)), np.zeros(prompts), effect="delta")
    keys = tuple(CellKey({"head": head}, f"L0H{head}.z") for head in range(cells))
    made = replace(heads(prompts=prompts), axes=("head",), cells=keys, measures=(data,))
    return finished(replace(made, runs={}, accuracy={}), resamples=400)


@pytest.mark.slow
def test_expectations_rarely_hold_without_an_effect() -> None:
    lines = [
        "max(delta) > 0",
        "min(delta) < 0",
        "abs(delta(L0H0)) > 0",
        "argmax(delta) = L0H0",
        "not argmax(delta) = L0H0",
        "top 1 contains L0H0",
    ]
    holds = dict.fromkeys(lines, 0)
    for seed in range(150):
        made = null(32, 16, seed)
        for line in lines:
            holds[line] += verdict(line, made).holds
    # at 2.5 % of 150, 10 and more come once in 200
    assert all(each < 12 for each in holds.values()), holds


def test_correlation_with_another_experiment_pairs_prompts(result: ExperimentResult) -> None:
    same_again = replace(result, name="other")
    same = verdict("pearson(recovery, other) > 0.99", result, other=same_again)
    assert same.holds
    assert same.value == pytest.approx(1.0, abs=1e-6)
    ranks = verdict("spearman(recovery, other) > 0.99 on mean", result, other=same_again)
    assert ranks.holds
    assert ranks.value == pytest.approx(1.0)
    independent = finished(replace(heads(seed=1), name="other", row_ids=None))
    found = verdict("pearson(recovery, other) > 0.9", result, other=independent)
    assert found.holds
    assert found.low is not None
    assert found.low < found.value < 1
    few = replace(positions(), name="other")
    found = verdict("pearson(recovery, other) > 0", result, other=finished(few))
    assert found.reason == "only 0 cells have the same coordinates in `other`"


def test_correlation_accepts_experiments_with_different_prompt_counts(
    result: ExperimentResult,
) -> None:
    other = finished(replace(heads(prompts=200, seed=2), name="other"))
    assert verdict("pearson(recovery, other) > 0.9", result, other=other).holds


def test_expectation_selects_cells_by_position(result: ExperimentResult) -> None:
    swept = finished(positions())
    assert verdict('max(recovery, position: "last token") > 0.9', swept).holds
    assert verdict('max(recovery, item: "first-item of part1 token") < 0.1', swept).holds
    found = verdict("argmax(recovery) = L3.resid", swept)
    assert found.holds
    assert found.value == "L3.resid_post at last token"


def test_expectation_selects_cells_by_a_fixed_layer() -> None:
    cells = tuple(
        replace(cell, coords={"head": cell.coords["head"]})
        for cell in heads().cells
        if cell.coords["layer"] == 2
    )
    data = heads().measures[0]
    part = replace(data, patched=data.patched[8:], inert=data.inert[8:])
    result = finished(replace(heads(), axes=("head",), cells=cells, measures=(part,)))
    assert verdict("recovery(L2H1) > 0.5", result).holds


@pytest.mark.parametrize(
    ("site", "coords", "components"),
    [
        ("L2H0.z", {"layer": 2, "head": 0}, {"z"}),
        ("L3N512.mlp_hidden", {"layer": 3, "neuron": 512}, {"mlp_hidden"}),
        ("L3.resid_post", {"layer": 3}, {"resid_post"}),
        ("L0-2.resid_post", {}, {"resid_post"}),
        ("L3H*.z", {"layer": 3}, {"z"}),
        ("embed", {}, {"embed"}),
        ("L1.attn_out + L1.mlp_out", {}, {"attn_out", "mlp_out"}),
        ("", {}, set()),
    ],
)
def test_cell_coordinates_are_read_from_the_site(
    site: str, coords: dict[str, int], components: set[str]
) -> None:
    assert cell_coordinates(CellKey({}, site)) == (coords, components)
    assert cell_coordinates(CellKey({"layer": 9}, site)) == ({**coords, "layer": 9}, components)


def test_single_cell_needs_no_selector() -> None:
    patched = 0.3 + np.arange(40)[None] * 1e-4
    data = measure(patched, np.ones(40), effect="relative", label="ld")
    one = finished(
        replace(heads(prompts=40), axes=(), cells=(CellKey({}, "L2H1.z"),), measures=(data,))
    )
    assert verdict("relative near -0.7 within 0.05", one).holds
    assert verdict("ld < 0", one).holds
    assert verdict("relative of ld < 0", one).holds


def test_measure_is_selected_by_its_metric_text() -> None:
    patched = 0.3 + np.arange(40)[None] * 1e-4
    data = measure(patched, np.ones(40), effect="delta", label="prob(answer)")
    one = finished(replace(heads(prompts=40), axes=(), cells=(CellKey({}, ""),), measures=(data,)))
    assert verdict("mean(prob(answer)) < 0", one).holds
    assert verdict("prob( answer ) < 0", one).holds


def test_expectation_with_one_prompt_has_no_interval() -> None:
    data = measure(np.array([[0.3]]), np.array([1.0]), label="ld")
    one = finished(replace(heads(prompts=1), axes=(), cells=(CellKey({}, ""),), measures=(data,)))
    found = verdict("delta < 0", one)
    assert not found.holds
    assert (found.value, found.low) == (pytest.approx(-0.7), None)
    assert "1 prompt: no interval below 5; `on mean`" in (found.reason or "")
    assert verdict("delta < 0 on mean", one).holds


def test_cells_without_a_value_are_ignored_by_expectations(result: ExperimentResult) -> None:
    data = result.measures[0]
    patched = data.patched.copy()
    patched[9] = np.nan
    gone = finished(replace(heads(), measures=(replace(data, patched=patched),)))
    assert verdict("argmax(abs) = L2H1", gone).reason is not None
    assert not verdict("recovery(L2H1) > 0", gone).holds
    assert verdict("recovery(L2H1) > 0", gone).reason == "no prompt is part of this cell"
    assert verdict("max(recovery) < 0.1", gone).holds


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("max(recovry) > 0", "E0203", "did you mean `recovery`?"),
        ("accuracy(claen) > 0", "E0201", "did you mean `clean`?"),
        ("pearson(recovery, nowhere) > 0", "E0201", "name another experiment"),
        (
            "spearman(recovery, other_experiment) > 0",
            "E0606",
            "pearson(recovery, other_experiment)",
        ),
        ("max(recovery, haed: 1) > 0", "E0203", "did you mean `head`?"),
        ("auc(recovery, k) < 0.4", "E0203", "its axes are"),
        ("recovery > 0.3", "E0606", "max(recovery)"),
        ("max(recovery)", "E0606", "write a condition"),
        ("argmax(recovery) > 3", "E0606", "L9H9"),
        ("max(recovery) > argmax(recovery)", "E0606", "L9H9"),
        ("max(recovery, layer 50%..80%) > 0", "E0606", "from 0"),
        ("max(recovery) near max(recovery) within 0.1", "E0606", "the number itself"),
        ("accuracy > 0.9", "E0203", "this experiment measures"),
        ("spearman(recovery) > 0", "E0606", "other_experiment"),
    ],
)
def test_invalid_expectation_is_rejected_before_running(line: str, code: str, words: str) -> None:
    (found,) = check_expectation(expectation(line), KNOWN)
    assert found.code == code
    assert words in found.help_text


CELLS = [CellKey({"c": value}, "L2.mlp_out", "last token") for value in (0.5, 1)]
SWEEP = replace(
    KNOWN,
    axes=["c"],
    cells=CELLS,
)


def test_cell_of_a_loop_can_be_the_largest() -> None:
    """The cells have one site, so that only the value of the `for` names one of them."""
    random = np.random.default_rng(0)
    values = np.array([[1.0], [3.0], [2.0]]) + 0.1 * random.normal(size=(3, 16))
    made = plain(measure(values, np.zeros(16)))
    keys = tuple(CellKey({"c": c}, "L2.mlp_out", "last token") for c in (0.5, 1, 2))
    made = replace(made, axes=("c",), cells=keys)
    lines = {
        "argmax(delta) = delta(c: 1)": True,
        "argmax(delta) != delta(c: 2)": True,
        "argmin(delta) = delta(c: 0.5)": True,
        "argmax(delta) = delta(c: 2)": False,
        "argmax(delta) = delta(c: 0.5..1)": True,
        "argmax(delta, c: 1..2) = delta(layer 2, c: 2)": False,
        "delta(c: 1) = argmax(delta)": True,
        "not argmax(delta) = delta(c: 2)": True,
    }
    found = finished(made, *lines)
    assert [each.holds for each in found.outcomes] == list(lines.values())
    assert (found.outcomes[0].reason or "").startswith("ahead of ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("argmax(recovery) = recovery(c: 3)", "no cell matches c: 3"),
        ("argmax(recovery) = recovery(c: 0..1)", "all 2 cells match c: 0..1"),
        ("argmax(recovery) = max(recovery)", "`max(recovery)` is not a site"),
    ],
)
def test_invalid_cell_of_an_argmax_is_rejected(line: str, words: str) -> None:
    (found,) = check_expectation(expectation(line), SWEEP)
    assert found.code == "E0606"
    assert words in found.message


@pytest.mark.parametrize(
    "line",
    [
        "argmax(recovery) = L2.mlp_out",
        "argmin(recovery) != L2.mlp_out",
        "top 1 contains L2.mlp_out",
    ],
)
def test_condition_on_a_site_of_all_cells_is_rejected(line: str) -> None:
    """It would hold, or fail, for any effects."""
    (found,) = check_expectation(expectation(line), SWEEP)
    assert found.code == "E0606"
    assert found.message.startswith("this expectation cannot be decided: all 2 cells match L2")
    assert found.help_text == "compare single cells: `recovery(c: …) > …`"
    single = replace(SWEEP, cells=CELLS[:1])
    assert check_expectation(expectation(line), single) == []


def test_number_as_a_site_names_the_comparison_of_cells() -> None:
    (found,) = check_expectation(expectation("argmax(recovery) = 2"), SWEEP)
    assert found.code == "E0606"
    assert "a value of `for` as a cell: `delta(NAME: 2)`" in found.help_text


@pytest.mark.parametrize("line", ["top 3 contains L9H9", "max(delta of ld) > 0"])
def test_ambiguous_measure_is_rejected(line: str) -> None:
    same = [KnownMeasure("ld", "delta"), KnownMeasure("entropy", "delta")]
    (found,) = check_expectation(expectation("max(delta) > 0"), replace(KNOWN, measures=same))
    assert found.code == "E0605"
    assert "`delta of ld` or `delta of entropy`" in found.label_text
    assert found.help_text == "name a metric, as in `delta of ld`"
    refused = check_expectation(expectation(line), replace(KNOWN, measures=same))
    assert [each.code for each in refused] == (["E0605"] if "top" in line else [])


def test_measures_are_selected_by_effect_or_label() -> None:
    for line in ("max(recovery) > 0", "max(ld) > 0", "max(delta) > 0", "max(prob(answer)) > 0"):
        assert check_expectation(expectation(line), TWO) == []


def test_category_measure_as_a_number_is_rejected() -> None:
    known = replace(KNOWN, measures=[KnownMeasure("argmax(1..9)", "raw", "category")])
    (found,) = check_expectation(expectation("max(raw) > 0"), known)
    assert found.code == "E0606"
    assert "category" in found.message
    (found,) = check_expectation(expectation("top 1 contains L0H0"), known)
    assert found.code == "E0606"


def test_known_cells_are_checked_before_running() -> None:
    cells = [
        CellKey({"layer": a, "head": b}, f"L{a}H{b}.z")
        for a, b in itertools.product(range(3), range(4))
    ]
    known = replace(KNOWN, cells=cells)
    (found,) = check_expectation(expectation("recovery(L9H9) > 0"), known)
    assert "no cell matches L9H9" in found.message
    assert check_expectation(expectation("recovery(L2H3) > 0"), known) == []
    (found,) = check_expectation(expectation("recovery(layer 1) > 0"), known)
    assert "4 cells" in found.message


def test_expectations_of_a_lost_measure_fail() -> None:
    """The values of the measure exist and would satisfy the expectations."""
    lines = ["max(recovery) > 0.3", "not (max(recovery) > 0.9)", "top 1 contains L2H1"]
    assert [each.holds for each in finished(heads(), *lines).outcomes] == [True, True, True]
    problem = NoRowsKept(rows=3)
    gone = finished(drop_measures(heads(), {0: problem}), *lines)
    assert [each.holds for each in gone.outcomes] == [False, False, False]
    assert all("E0613" in (each.reason or "") for each in gone.outcomes)
    assert np.isnan(gone.statistics[0].mean).all()


@pytest.mark.parametrize("left", [Estimate(0.0), Estimate(0.0, FixedNumber(0.0))])
def test_combined_estimate_keeps_the_reason_of_a_missing_operand(left: Estimate) -> None:
    none = Estimate(np.nan, None, why="no row is left")
    assert (
        combine_estimates("+", left, none).why
        == combine_estimates("+", none, left).why
        == "no row is left"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(combine_estimates("/", left, Estimate(0.0)).point)
