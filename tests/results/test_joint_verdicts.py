"""`stats verdicts holm` and `or`: several expectations share one level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom

from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.collection import add_statistics
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.verdicts.decision import decide_all_expectations

from .synthetic import expectation, experiment, finished, measure

CELLS, PROMPTS = 6, 24
EACH = tuple(f"delta(L0H{cell}) > 0" for cell in range(CELLS))
"""Without an effect, each holds in 2.5 % of files."""
EFFECTS = (0.0, 0.3, 0.5, 0.6, 0.7, 2.0)
"""In standard deviations; clear, doubtful and none."""
FILES = 50


def noise(seed: int, effects: Sequence[float] = (), **values: object) -> ExperimentResult:
    """Heads with these effects in standard deviations, 0 where none is given."""
    random = np.random.default_rng(seed)
    shift = np.zeros((CELLS, 1))
    shift[: len(effects), 0] = effects
    cells = tuple(
        CellKey({"layer": 0, "head": head}, f"L0H{head}.z", "last token", (":",))
        for head in range(CELLS)
    )
    found = ExperimentResult(
        name="where",
        model="toy",
        axes=("layer", "head"),
        cells=cells,
        measures=(measure(random.normal(size=(CELLS, PROMPTS)) + shift, np.zeros((1, PROMPTS))),),
    )
    return finished(found, **values)


def holds(result: ExperimentResult, lines: Sequence[str]) -> list[bool]:
    return [
        each.holds
        for each in decide_all_expectations([expectation(line) for line in lines], result)
    ]


@cache
def least_level(seed: int, line: str) -> float:
    """The smallest level at which a line holds alone, by bisection."""
    low, high = 0.0, 0.9
    while high - low > 1e-4:
        middle = (low + high) / 2
        result = noise(seed, EFFECTS, confidence=100 * (1 - middle))
        low, high = (low, middle) if holds(result, [line])[0] else (middle, high)
    return high


@pytest.mark.parametrize("seed", range(4))
def test_expect_lines_share_one_level_by_holm(seed: int) -> None:
    levels = [least_level(seed, line) for line in EACH]
    expected, left = [False] * CELLS, CELLS
    for number in sorted(range(CELLS), key=levels.__getitem__):
        if levels[number] > 0.05 / left:
            break
        expected[number], left = True, left - 1
    assert holds(noise(seed, EFFECTS, verdicts="holm"), EACH) == expected
    alone = [level <= 0.05 for level in levels]
    assert holds(noise(seed, EFFECTS), EACH) == alone


def test_the_four_families_distinguish_holm_from_other_corrections() -> None:
    """Guards the test above: Holm differs from no correction and from Bonferroni."""
    found = {"none": 0, "bonferroni": 0, "holm": 0}
    for seed in range(4):
        levels = np.array([least_level(seed, line) for line in EACH])
        found["none"] += int((levels <= 0.05).sum())
        found["bonferroni"] += int((levels <= 0.05 / CELLS).sum())
        found["holm"] += sum(holds(noise(seed, EFFECTS, verdicts="holm"), EACH))
    assert found["bonferroni"] < found["holm"] < found["none"]


def share_below(held: int, of: int, level: float) -> bool:
    """Return whether `held` of `of` are compatible with the level, at 99.9 %."""
    return bool(binom.sf(held - 1, of, level) > 1e-3)


@pytest.mark.slow
def test_any_holm_line_holds_by_chance_within_the_level() -> None:
    held = sum(any(holds(noise(seed, verdicts="holm"), EACH)) for seed in range(FILES))
    assert share_below(held, FILES, 0.05)


@pytest.mark.slow
def test_alternatives_hold_by_chance_within_the_level_of_one_line() -> None:
    either = " or ".join(EACH)
    denied = "not (" + " and ".join(f"delta(L0H{cell}) < 0" for cell in range(CELLS)) + ")"
    held = np.sum([holds(noise(seed), [either, denied]) for seed in range(FILES)], axis=0)
    assert all(share_below(int(files), FILES, 0.025) for files in held)


def test_alternative_is_decided_at_its_share_of_the_level() -> None:
    checked = {True: 0, False: 0}
    for seed in range(25):
        at_half = holds(noise(seed, EFFECTS, confidence=97.5), EACH[1:3])
        either = holds(noise(seed, EFFECTS), [f"{EACH[1]} or {EACH[2]}"])[0]
        assert either == any(at_half)
        checked[either] += 1
    assert min(checked.values()) > 3
    (said,) = decide_all_expectations([expectation(f"{EACH[1]} or {EACH[5]}")], noise(0, EFFECTS))
    assert said.reason == "each of 2 alternatives at 97.5 %"


def test_expect_on_mean_is_not_part_of_the_holm_family() -> None:
    result = noise(0, EFFECTS, verdicts="holm")
    lines = [f"{EACH[5]} on mean", EACH[5]]
    on_mean, alone = decide_all_expectations([expectation(line) for line in lines], result)
    assert "Holm" not in (on_mean.reason or "")
    assert "Holm" not in (alone.reason or ""), "one line has the level to itself"


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ("holm", "2 `expect` lines share one level, by Holm's correction"),
        (
            "none",
            "each of 2 `expect` lines has a separate level; with `stats verdicts holm` they "
            "share one",
        ),
    ],
)
def test_conventions_state_the_level_of_verdicts(verdicts: str, said: str) -> None:
    asked = experiment(EACH[:2], verdicts=verdicts)
    assert add_statistics(noise(0), asked, 0).conventions["verdicts"] == said
    one = experiment(EACH[:1], verdicts=verdicts)
    assert "verdicts" not in add_statistics(noise(0), one, 0).conventions
