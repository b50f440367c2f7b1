"""`python -m benchmarks.coverage` detects intervals that miss their stated coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import program
from benchmarks.coverage.draws import DRAWS
from benchmarks.coverage.report import BEGIN, END, line, markdown, rewrite, summary
from benchmarks.coverage.setting import Figure, Outcome, Run, Setting, Verdict, judge
from benchmarks.coverage.simulate import all_settings, here, simulate

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"
N = 8


def setting(run: Run, low: float | None = 93, high: float | None = 97) -> Setting:
    return Setting("intervals", "normal, n = 8", (Figure("covered", low, high),), run, 2000, 250)


def percentile(random: np.random.Generator, count: int) -> np.ndarray:
    """Count hits of the bootstrap's percentile interval, too narrow for few values."""
    values = random.normal(size=(count, N))
    means = values[:, random.integers(0, N, (500, N))].mean(2)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return np.array([[np.count_nonzero((low <= 0) & (high >= 0)), count]])


def student(random: np.random.Generator, count: int) -> np.ndarray:
    found = stats.ttest_1samp(random.normal(size=(count, N)), 0, axis=1).confidence_interval()
    return np.array([[np.count_nonzero((found.low <= 0) & (found.high >= 0)), count]])


def nothing(random: np.random.Generator, count: int) -> np.ndarray:
    """Return counts of mostly missing intervals; most existing ones contain the truth."""
    there = count // 3
    return np.array([[there * 95 // 100, there]])


@pytest.mark.parametrize(
    ("run", "low", "high", "verdict"),
    [
        (percentile, 93, 97, "fails"),
        (percentile, 93, None, "fails"),
        (percentile, None, 97, "holds"),
        (percentile, None, None, "printed"),
        (student, 93, 97, "holds"),
        (student, None, 92, "fails"),
        (nothing, 80, 100, "fails"),
    ],
)
def test_figure_outside_its_bound_fails(
    run: Run, low: float | None, high: float | None, verdict: Verdict
) -> None:
    (found,) = here(setting(run, low, high), seed=0, repetitions=2000)
    assert found.verdict == verdict


def test_verdict_accounts_for_the_number_of_repetitions() -> None:
    """88 % of 50 may be 95 %, 88 % of 2,000 can't be."""
    made = setting(student)
    few, many = (Outcome(made, made.figures[0], 88 * n // 100, n, n) for n in (50, 2000))
    assert (few.verdict, many.verdict) == ("holds", "fails")
    low, high = many.interval
    expected = stats.beta.ppf([0.005, 0.995], [1760, 1761], [241, 240])
    assert [low, high] == pytest.approx(100 * expected)


def outcomes(failing: int, of: int) -> list[Outcome]:
    figure = Figure("covered", 93, 97)
    made = [Setting("a", str(n), (figure,), student) for n in range(of)]
    hits = [80 if n < failing else 95 for n in range(of)]
    return [Outcome(m, figure, 100 * h, 10_000, 10_000) for m, h in zip(made, hits, strict=True)]


def test_one_in_ten_figures_may_fail_with_a_documented_reason() -> None:
    known = {f"a: {n}: covered": "why" for n in range(3)}
    assert judge(outcomes(2, 20), known).good
    assert not judge(outcomes(3, 20), known).good
    assert not judge(outcomes(1, 20), {}).good
    assert judge(outcomes(0, 20), {}).good
    found = judge(outcomes(4, 40), known)
    assert found.without_reason == ("a: 3: covered",)
    said = summary(found, known)
    assert said[0].startswith("4 of 40")
    assert sum("why" in sentence for sentence in said) == 3


@pytest.mark.slow
def test_equal_seeds_give_equal_counts_in_any_process() -> None:
    key = "interval of a mean: normal, n = 8: covered"
    (spawned,) = simulate([key], 3, 1, lambda _: None, quick=True)
    (own,) = here(all_settings()[key], 3, spawned.repetitions)
    others = {here(all_settings()[key], seed, own.repetitions)[0].hits for seed in range(4, 8)}
    assert (spawned.hits, spawned.of) == (own.hits, own.repetitions)
    assert len(others) > 1


@pytest.mark.parametrize("name", list(DRAWS))
def test_simulated_distributions_have_mean_0_and_variance_1(name: str) -> None:
    values = DRAWS[name](np.random.default_rng(0), (1_000_000,))
    assert values.mean() == pytest.approx(0, abs=0.02)
    if name != "t3":  # its fourth moment is infinite
        assert values.var() == pytest.approx(1, rel=0.1)


def test_benchmark_p_values_equal_references() -> None:
    deltas = np.random.default_rng(1).normal([[0.0], [1.0], [3.0]], 1, (3, 12))
    signs = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
    exact = [(np.abs(signs @ row) >= abs(row.sum()) - 1e-9).mean() for row in deltas]
    assert program.p_values(deltas, 0, test="flips") == pytest.approx(exact)
    found = program.p_values(deltas, 0)
    plain = stats.ttest_1samp(deltas, 0.0, axis=1).pvalue
    assert (found >= plain).all()
    assert found[0] > 0.1 > 0.01 > found[2]
    assert program.p_values(deltas, 0, correction="holm")[2] == pytest.approx(3 * found[2])


def test_every_documented_bound_is_checked() -> None:
    settings = all_settings()
    bounds = {f"{key}": setting.figures[0] for key, setting in settings.items()}

    def judged(text: str) -> set[tuple[float | None, float | None]]:
        found = {(each.low, each.high) for key, each in bounds.items() if text in key}
        assert found, text
        return found

    for n in (8, 16, 32, 64, 200):
        for name in ("normal", "t3", "exponential", "lognormal", "sparse"):
            assert judged(f"a mean: {name}, n = {n}:") == {(93, 99)}
        for name in ("recovery", "relative"):
            assert judged(f"a ratio: {name}, n = {n}:") == {(93, 99)}
        for p in (0.5, 0.7, 0.9, 0.98, 0.999):
            assert judged(f"a share: p = {p:g}, n = {n}:") == {(93, 100)}
    for cells in (1, 16, 144):
        bounds_of_levels = {(None, 5.5)} if cells == 1 else {(None, 5.5), (None, 6.0)}
        assert judged(f"false positives, {cells} cell") == bounds_of_levels
        assert judged(f"without an effect: {cells} cell") == {(None, 5)}
    assert judged("groups of 2 to 12") == judged("duplicate rows") == {(92, None)}


def test_coverage_table_is_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    found = outcomes(1, 2)
    rewrite(page, markdown(found, ["One of two."], seed=0))
    rewrite(page, markdown(found, ["One of two, again."], seed=0))
    text = page.read_text(encoding="utf-8")
    inside = text.split(BEGIN)[1].split(END)[0]
    assert text.split(BEGIN)[0] == PAGE.read_text(encoding="utf-8").split(BEGIN)[0]
    assert inside.count("One of two") == 1
    for each in found:
        assert f"| {' | '.join(line(each))} |" in inside
    assert inside.count("**fails**") == 1
