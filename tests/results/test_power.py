"""Detectable effects: against noncentral t, simulated tests, and in the output of `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp

import mechdsl
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import check_source
from mechdsl.pipeline.computation import measure_unpatched
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan
from mechdsl.program import spec
from mechdsl.show.plan import plan_measure_units
from mechdsl.statistics.intervals import skewed_t
from mechdsl.statistics.measurements import EffectSums
from mechdsl.statistics.power import (
    detectable_by_flips,
    detectable_by_skewed_t,
    detectable_by_t,
    detectable_effect,
)
from mechdsl.syntax.frontend import read_source

from ..cli.conftest import HEADS as BY_COUNT
from ..cli.conftest import Command, command
from ..fruit import head

Array = NDArray[np.float64]
__all__ = ["command"]
HEADS = BY_COUNT.replace("  stats correct max by count\n", "")
SPAN = Span(Source(""), 0, 0)


def settings(**given: object) -> spec.Statistics:
    return spec.Statistics(span=SPAN).model_copy(update=given)


@pytest.mark.parametrize("units", [2, 5, 16, 64, 1000])
@pytest.mark.parametrize("level", [0.05, 0.01, 0.05 / 144])
def test_detectable_effect_equals_noncentral_t(units: int, level: float) -> None:
    edge = t.ppf(1 - level / 2, units - 1)

    def lacking(effect: float) -> float:
        return float(nct.sf(edge, units - 1, effect * np.sqrt(units))) - 0.8

    most = 4 * edge / np.sqrt(units) + 2
    assert detectable_by_t(units, level) == pytest.approx(brentq(lacking, 0, most), rel=2e-3)


SIMULATED = [(8, 1), (16, 1), (16, 16), (32, 16), (64, 144), (200, 16)]


@pytest.mark.parametrize(("units", "tests"), SIMULATED)
def test_t_test_has_80_percent_power_at_the_detectable_effect(units: int, tests: int) -> None:
    found = detectable_effect(units, tests, settings(test="bootstrap"))
    assert found.effect is not None
    deltas = np.random.default_rng(units).standard_normal((4000, units)) + found.effect
    p = np.asarray(ttest_1samp(deltas, 0, axis=1).pvalue)
    assert np.mean(p * tests < 0.05) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("units", "tests"), SIMULATED)
def test_skewness_corrected_t_has_80_percent_power_at_the_detectable_effect(
    units: int, tests: int
) -> None:
    found = detectable_effect(units, tests, settings())
    assert found.effect is not None
    deltas = np.random.default_rng(50 + units).standard_normal((4000, units)) + found.effect
    p = skewed_t(EffectSums(deltas, np.ones((1, units)), np.full(4000, units))).p()
    assert np.mean(p * tests < 0.05) == pytest.approx(0.8, abs=0.03)


def flipped(deltas: Array) -> float:
    """Return p over all sign patterns."""
    signs = np.array(list(product((1, -1), repeat=len(deltas))))
    sums = np.abs(signs @ deltas)
    return float((sums >= np.abs(deltas.sum()) - 1e-9).mean())


@pytest.mark.parametrize(
    ("units", "tests", "correction"),
    [
        pytest.param(6, 1, "holm", marks=pytest.mark.slow),
        pytest.param(8, 1, "none", marks=pytest.mark.slow),
        (8, 6, "holm"),
        pytest.param(10, 16, "holm", marks=pytest.mark.slow),
        pytest.param(10, 16, "none", marks=pytest.mark.slow),
    ],
)
def test_sign_flips_have_80_percent_power_at_the_detectable_effect(
    units: int, tests: int, correction: str
) -> None:
    found = detectable_effect(units, tests, settings(correction=correction, test="flips"))
    assert found.effect is not None
    deltas = np.random.default_rng(100 + units).standard_normal((2500, units)) + found.effect
    p = np.array([flipped(each) for each in deltas])
    corrected = p * tests if correction == "holm" else p
    assert (corrected < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_sign_flip_power_approaches_t_with_many_sign_patterns() -> None:
    assert detectable_by_flips(12, 100) == pytest.approx(detectable_by_t(12, 100 / 2**11), rel=0.03)
    assert detectable_by_flips(8, 1) > 1.1 * detectable_by_t(8, 1 / 2**7)


@pytest.mark.parametrize(
    ("units", "tests", "given", "shown"),
    [
        (5, 1, {}, False),  # the smallest p is 1/16
        (6, 1, {}, True),  # 1/32
        (6, 2, {}, False),
        (6, 2, {"correction": "none"}, True),
        (6, 1, {"confidence": 99.0}, False),
        (8, 1, {"confidence": 99.0}, True),
        (20, 384, {"confidence": 99.0}, True),
        (14, 384, {}, True),  # 1/8192 to 0.05/384
        (13, 384, {}, False),
        (14, 384, {"confidence": 99.0}, False),
        (5, 1, {"test": "bootstrap"}, False),
        (15, 1536, {}, False),  # 2^-14 to 0.05 / 1536
        (16, 1536, {}, True),
        (1, 1, {"test": "bootstrap"}, False),
        (0, 1, {}, False),
    ],
)
def test_no_effect_is_detectable_if_the_smallest_p_exceeds_the_level(
    units: int, tests: int, given: dict[str, object], shown: bool
) -> None:
    assert (detectable_effect(units, tests, settings(**given)).effect is not None) == shown


# --- on the command line ----------------------------------------------------------------------


def lines_of(text: str, title: str) -> list[list[str]]:
    """Return the rows of one table of a plan, split into columns."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith(title))
    cut = lines[start + 1 :]
    end = next(n for n, line in enumerate(cut) if not line.strip() or line.startswith("effect:"))
    return [[part for part in line.strip().split("  ") if part] for line in cut[:end]]


def file(folder: Path, text: str) -> Path:
    path = folder / "a.mech"
    path.write_text(text, encoding="utf-8")
    return path


def test_plan_prints_the_detectable_effect(command: Command, tmp_path: Path) -> None:
    done = command("plan", file(tmp_path, HEADS))
    (line,) = lines_of(done.out, "power")
    effect = detectable_by_skewed_t(16, 0.05 / 8)  # 2 layers of 4 heads
    assert [part.strip() for part in line] == [
        "heads",
        "16 distinct rows",
        "8",
        "0.0063",
        f"{effect:.2f} SD",
    ]
    assert "its p must be below the level, over the number of tests (Holm)" in plain(done.out)


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("stats", "units", "tests", "effect"),
    [
        (
            "stats confidence 99% correct none",
            "16 distinct rows",
            8,
            detectable_by_skewed_t(16, 1 - 0.99),
        ),
        ("stats correct bh", "16 distinct rows", 8, detectable_by_skewed_t(16, 0.05 / 8)),
        ("stats by count correct none", "7 values of count", 8, detectable_by_skewed_t(7, 0.05)),
        ("stats by count", "7 values of count", 8, None),
    ],
)
def test_plan_power_depends_on_units_and_correction(
    stats: str, units: str, tests: int, effect: float | None, command: Command, tmp_path: Path
) -> None:
    text = HEADS.replace("  report table", f"  {stats}\n  report table")
    done = command("plan", file(tmp_path, text))
    (line,) = lines_of(done.out, "power")
    said = "none" if effect is None else f"{effect:.2f} SD"
    assert [line[1].strip(), line[2].strip(), line[-1].strip()] == [units, str(tests), said]
    nothing = "no effect can survive: the smallest p of 7 is 0.0156, but it must be below 0.00625"
    assert (nothing in plain(done.out)) == (effect is None)


def test_plan_prints_a_lower_bound_for_the_bootstrap(command: Command, tmp_path: Path) -> None:
    text = HEADS.replace("  report table", "  stats test bootstrap\n  report table")
    done = command("plan", file(tmp_path, text))
    (line,) = lines_of(done.out, "power")
    assert line[-1].strip() == f"≥ {detectable_by_t(16, 0.05 / 8):.2f} SD"
    assert ("≥: computed for Student's t; the bootstrap-t has equal or lower power") in plain(
        done.out
    )
    assert "≥" not in command("plan", file(tmp_path, HEADS)).out


def test_plan_counts_identical_rows_as_one_unit(command: Command, tmp_path: Path) -> None:
    """Rows with a single item differ only in `count`, which has seven values."""
    prompts = head("corrupt fewer { count = count - 1 }").replace(
        'item in ["apple", "pear", "plum", "fig"]', 'item in ["apple"]'
    )
    text = HEADS.replace(HEADS[: HEADS.index("experiment heads")], prompts)
    done = command("plan", file(tmp_path, text))
    (line,) = lines_of(done.out, "power")
    assert line[1].strip() == "7 distinct rows"


def test_plan_excludes_cells_that_cannot_differ_from_the_tests(
    command: Command, tmp_path: Path
) -> None:
    """The plan has the same number of tests as the run corrects for."""
    text = HEADS.replace(
        "layer 0..1 head * at last-item token",
        "resid_post layer * at first-item token, last token",
    )
    text = text.replace("limit 16", "limit 32")
    path = file(tmp_path, text)
    found = mechdsl.run(path, write_reports=False)["heads"]
    statistics = found.statistics[0]
    (line,) = lines_of(command("plan", path).out, "power")
    assert int(line[2]) == int(np.count_nonzero(~found.measures[0].inert)) < len(found.cells)
    assert statistics.p is not None


def test_experiment_without_tests_has_no_power(command: Command, tmp_path: Path) -> None:
    for measure in ("logit(answer) as raw", "category as raw"):
        text = HEADS.replace("logit(answer) - logit(answer of fewer) as recovery", measure)
        done = command("plan", file(tmp_path, text.replace("category", "correct")))
        assert "power" not in done.out


def measured_lines(text: str) -> Sequence[list[str]]:
    return lines_of(text, "measured")


@pytest.mark.parametrize(
    ("effect", "by"), [("recovery", None), ("delta", None), ("delta", "count"), ("relative", None)]
)
def test_measured_plan_prints_effects_in_metric_units(
    effect: str, by: str | None, command: Command, tmp_path: Path
) -> None:
    metric = "logit(answer)"
    stats = "" if by is None else f"  stats by {by} correct none\n"
    text = HEADS.replace("logit(answer) - logit(answer of fewer) as recovery", f"{metric} as raw")
    path = file(tmp_path, text)
    data = mechdsl.run(path, write_reports=False)["heads"]
    base = data.measures[0].base[0]
    turned = text.replace("from clean into fewer", "from fewer into clean")
    source = mechdsl.run(file(tmp_path, turned), write_reports=False)["heads"].measures[0].base[0]
    change = source - base
    if by is not None:
        counts = np.array(data.row_values["count"])
        base, change = (
            np.array([each[counts == n].mean() for n in np.unique(counts)])
            for each in (base, change)
        )
    path = file(
        tmp_path,
        text.replace("as raw", f"as {effect}").replace("  report", f"{stats}  report"),
    )
    done = command("plan", path, "--measure")
    in_python = str(mechdsl.plan(path, measure=True))
    assert measured_lines(in_python) == measured_lines(done.out)
    divisor, words = {
        "recovery": (abs(change.mean()), " of m(source) − m(base)"),
        "delta": (1.0, ""),
        "relative": (abs(base.mean()), " of m(base)"),
    }[effect]
    size = detectable_by_skewed_t(16, 0.05 / 8) if by is None else detectable_by_skewed_t(7, 0.05)
    of_base, of_change = ([part.strip() for part in line] for line in measured_lines(done.out))
    for line, name, values in (
        (of_base, "fewer", base),
        (of_change, "clean − fewer", change),
    ):
        deviation = values.std(ddof=1)
        assert line[:3] == ["heads", metric, name]
        assert float(line[3]) == pytest.approx(values.mean(), rel=6e-3)
        assert float(line[4]) == pytest.approx(deviation, rel=6e-3)
        shown, _, rest = line[5].partition(" ")
        assert float(shown) == pytest.approx(size * deviation / divisor, rel=2e-2)
        assert rest == words.strip()


def test_plan_measurement_applies_no_rule(tmp_path: Path) -> None:
    source, _ = read_source(file(tmp_path, HEADS))
    assert source is not None
    checked = check_source(source)
    found, problems = measure_unpatched(checked, RunOptions())
    assert not problems
    (values,) = found.values()
    assert values.experiment.rules == ()
    assert set(values.unpatched) == {"clean", "fewer"}


def test_plan_counts_rows_after_keep_only_if_measured(command: Command, tmp_path: Path) -> None:
    path = file(tmp_path, HEADS.replace("  from clean", "  keep correct\n  from clean"))
    (before,) = lines_of(command("plan", path).out, "power")
    assert before[1].strip() == "16 distinct rows before `keep`"
    kept = mechdsl.run(path, write_reports=False)["heads"]
    (after,) = lines_of(command("plan", path, "--measure").out, "power")
    assert after[1].strip() == f"{kept.prompts} distinct rows"


TEXT = """
experiment e {
  model toy
  prompts fruit limit 24
  from clean into fewer
  RULE
  measure MEASURE
  stats LINE correct none
}
"""


@pytest.mark.parametrize(
    ("rule", "measure", "stats", "several"),
    [
        ("patch resid_post layer 0..1 at last-item token", "logit(answer) as delta", "", False),
        ("ablate layer 0..1 head * at item * token with zero",
         "logit(answer) as recovery", "", True),
        ("ablate z layer 0 head * at item * token with zero",
         "logit(answer) as delta", "by count", True),
        ("ablate mlp_out layer 0..2 at item 1 token with zero",
         'logit(" 3") at item 2 token as delta', "", False),
        ("ablate mlp_out layer * at item * token with zero",
         'logit(" 3") at item 2 token as delta', "", False),
        ("ablate mlp_out layer * at last token with mean", 'logit(" 3") as delta', "", False),
    ],
)  # fmt: skip
def test_planned_units_equal_those_of_the_run(
    rule: str, measure: str, stats: str, several: bool, command: Command, tmp_path: Path
) -> None:
    """Units are compared per cell; rows with equal text up to the measured token are one."""
    text = head("corrupt fewer { count = count - 1 }") + TEXT.replace("RULE", rule).replace(
        "MEASURE", measure
    ).replace("LINE", stats)
    path = file(tmp_path, text)
    source, _ = read_source(path)
    assert source is not None
    plans = {
        each.experiment.key: each
        for panel in make_plan(check_source(source).experiments).panels
        for each in panel.experiments
    }
    planned = plan_measure_units(plans["e"], 0, np.arange(24), plans)
    found = mechdsl.run(path, write_reports=False)["e"]
    counted = found.statistics[0].units[~found.measures[0].inert]
    assert planned.counts.tolist() == counted.tolist()
    ends = dict.fromkeys((min(counted), max(counted)))
    assert (len(ends) > 1) == several
    what = "values of count" if stats else "distinct rows"
    (line,) = lines_of(command("plan", path).out, "power")
    assert line[1].strip() == f"{' to '.join(map(str, ends))} {what}"


@pytest.mark.parametrize("correct", ["none", "max", "bh"])
def test_plan_of_four_rows_states_that_there_are_no_p_values(
    correct: str, command: Command, tmp_path: Path
) -> None:
    text = HEADS.replace("  report table", f"  stats correct {correct}\n  report table")
    done = command("plan", file(tmp_path, text.replace("limit 16", "limit 4")))
    (line,) = lines_of(done.out, "power")
    assert (line[1].strip(), line[-1].strip()) == ("4 distinct rows", "none")
    assert "no p-values: they need at least 5, but cells have 4" in plain(done.out)
    assert "smallest p" not in plain(done.out)


@pytest.mark.parametrize(
    ("stats", "effect", "said"),
    [
        (
            "stats by count correct max",
            "unknown",
            "which effects can survive depends on the correlation of cells: the smallest p of 7 is "
            "0.0156, also after correction by the maximum",
        ),
        (
            "stats by count correct max confidence 99%",
            "none",
            "no effect can survive: the smallest p of 7 is 0.0156, but it must be below 0.00125",
        ),
        (
            "stats by count correct bh",
            "none",
            "one effect alone can't survive: the smallest p of 7 is 0.0156",
        ),
    ],
)
def test_plan_states_the_smallest_p_of_max_and_bh_correction(
    stats: str, effect: str, said: str, command: Command, tmp_path: Path
) -> None:
    done = command(
        "plan", file(tmp_path, HEADS.replace("  report table", f"  {stats}\n  report table"))
    )
    (line,) = lines_of(done.out, "power")
    assert line[-1].strip() == effect
    assert said in plain(done.out)
