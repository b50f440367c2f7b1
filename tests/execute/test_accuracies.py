"""`accuracy(RUN)` is over all rows, also with `keep`; against single prompts of the bare model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, binomtest, t
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechdsl
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn
from .nan import MEASURE
from .nan import experiment as of_nan
from .nan import run as run_nan
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    STATS,
    Record,
    bare,
    experiment,
    prompt,
    prompts,
    run_file,
    token,
    unpatched,
    write_rows,
)

FAMILY = "llama"
RULE = "patch resid_post layer * at last token"
ASKED = ("expect accuracy(clean) > 0.9", "expect accuracy(longer) > 0.9")


def best(run: str) -> list[int]:
    """The most likely token after each prompt."""
    return [int(unpatched(FAMILY, prompt)[0][-1].argmax()) for prompt in prompts(run)]


def records() -> list[Record]:
    """The first two are right in the clean run, the middle two in the other one."""
    words = {token(f"w{n}"): f"w{n}" for n in range(50)}
    clean, longer = best("clean"), best("longer")
    assert clean[1] == longer[1] != longer[0]
    assert clean[2] != longer[2]
    answers = [words[clean[0]], words[clean[1]], words[longer[2]], "w49"]
    return [{**row, "a": answer} for row, answer in zip(ROWS, answers, strict=True)]


def eight() -> list[Record]:
    """Different in text and in `b`; those of even number are right in the clean run."""
    words = {token(f"w{n}"): f"w{n}" for n in range(50)}
    more = [{**row, "words": [*row["words"], "w19"], "b": f"w{n}"} for n, row in enumerate(ROWS)]
    found: list[Record] = []
    for n, row in enumerate([*ROWS, *more]):
        clean = words[int(unpatched(FAMILY, prompt(row))[0][-1].argmax())]
        found.append({**row, "a": "w49" if n % 2 else clean})
    return found


def ran(
    folder: Path,
    *lines: str,
    mode: str = "planned",
    rows: Sequence[Record] | None = None,
    stats: str = STATS,
) -> ExperimentResult:
    write_rows(folder, records() if rows is None else rows)
    text = experiment(
        "e", "prompts p", "from clean into longer", RULE, DIFFERENCE, *lines, stats=stats
    )
    return run_file(text, folder, bare(FAMILY), MODES[mode])["e"]


@pytest.mark.parametrize(
    ("mode", "keep"), in_turn(list(MODES), ["keep correct", "keep not correct", ""])
)
def test_accuracy_includes_rows_that_keep_drops(tmp_path: Path, mode: str, keep: str) -> None:
    found = ran(tmp_path, keep, *ASKED, mode=mode)
    assert found.prompts == (2 if keep else 4)
    answers = [token(row["a"]) for row in records()]
    right = {
        run: [float(a == b) for a, b in zip(answers, best(run), strict=True)]
        for run in ("clean", "longer")
    }
    assert right == {"clean": [1, 1, 0, 0], "longer": [0, 1, 1, 0]}
    assert {run: own.tolist() for run, own in found.accuracy.items()} == right
    expected = binomtest(2, 4).proportion_ci(0.95, "exact")
    for run in right:
        said = found.accuracy_of(run)
        assert (said.mean, said.n) == (0.5, 4)
        assert (said.low, said.high) == pytest.approx((expected.low, expected.high))
        assert found.run_intervals[run]["accuracy"] == said
    before = ", before `keep`" if keep else ""
    words = f"of all 4 rows{before}; exact interval (Clopper-Pearson)"
    assert found.conventions["accuracy"] == words


def test_accuracy_expectation_after_keep_correct_can_fail(tmp_path: Path) -> None:
    """After `keep correct`, `accuracy(clean)` isn't 1 by construction."""
    found = ran(tmp_path, "keep correct", ASKED[0])
    (outcome,) = found.outcomes
    assert not outcome.holds
    assert outcome.value == 0.5
    (clean,) = (
        each for each in experiment_document(found).runs["clean"] if each.metric == "correct"
    )
    assert (clean.mean, clean.n) == (0.5, 4)


def test_accuracy_interval_counts_equal_prompts_once(tmp_path: Path) -> None:
    """The interval has the effective sample size of eight units (Korn and Graubard 1998)."""
    found = ran(tmp_path, "keep correct", *ASKED, rows=eight() * 3)
    said = found.accuracy_of("clean")
    assert (said.mean, said.n) == (0.5, 24)
    assert len(np.unique(found.accuracy_units["clean"])) == 8
    right = 7 * (t.ppf(0.975, 23) / t.ppf(0.975, 7)) ** 2 / 2
    assert said.low == pytest.approx(beta.ppf(0.025, right, right + 1))
    assert said.high == pytest.approx(1 - said.low)
    assert said.low < binomtest(4, 8).proportion_ci(0.95, "exact").low
    assert np.isnan(found.accuracy_of("longer").low), "as `words` are all that they differ by"
    assert found.conventions["accuracy"].endswith(
        "8 distinct in clean, 4 distinct in longer; exact interval over these (Korn-Graubard), "
        "none below 5"
    )


def test_accuracy_interval_counts_groups_as_units(tmp_path: Path) -> None:
    found = ran(tmp_path, "keep correct", *ASKED, rows=eight() * 3)
    grouped = ran(tmp_path, "keep correct", *ASKED, rows=eight() * 3, stats="stats by b")
    assert grouped.conventions["accuracy"].endswith("over 8 groups by b (Korn-Graubard)")
    assert grouped.accuracy_of("clean") == found.accuracy_of("clean")


def test_accuracy_of_four_units_has_no_interval(tmp_path: Path) -> None:
    few = "exact interval over {} (Korn-Graubard), none below 5"
    cases = ((STATS, "these", "distinct prompts"), ("stats by b", "4 groups by b", "groups"))
    for stats, over, unit in cases:
        found = ran(tmp_path, "keep correct", *ASKED, rows=records() * 3, stats=stats)
        said = found.accuracy_of("clean")
        assert (said.mean, said.n) == (0.5, 12)
        assert np.isnan([said.low, said.high]).all()
        assert found.conventions["accuracy"].endswith(few.format(over))
        assert (found.outcomes[0].reason or "").startswith(f"no interval below 5 {unit}; ")
        assert not any(outcome.holds for outcome in found.outcomes)


def test_result_without_accuracy_expectations_has_no_accuracy(tmp_path: Path) -> None:
    found = ran(tmp_path, "keep correct")
    assert (dict(found.accuracy), dict(found.accuracy_rows)) == ({}, {})
    assert "accuracy" not in found.conventions


# --- rows with NaN --------------------------------------------------------------------------------

BLOCK = """
prompts mixed {
  item in ["pear", "plum"]
  other in ["apple", "plum"]
  template "Part 1: {item} {other} Count 1:"
  said = if other = "plum" then 9 else 2
  answer " {said}"
  corrupt figs { item = if other = "plum" and item = "pear" then "fig" else "apple" }
}
"""
KEPT = BLOCK + of_nan(
    "kept",
    "keep correct",
    "ablate layer 1 head * at last token with zero",
    MEASURE,
    "expect accuracy(clean) < 0.9",
    "expect accuracy(figs) < 0.9",
    prompts="mixed",
)
"""Rows after `keep` are finite in every run; one that it drops is NaN in `figs`."""


def test_dropped_row_with_nan_is_an_error_for_accuracy() -> None:
    found, diagnostics = run_nan(KEPT)
    assert found is None
    (error,) = (each for each in diagnostics if each.severity == "error")
    assert error.code == "E0621"
    assert "in the run `figs`, row " in error.message


def test_row_with_nan_is_left_out_of_every_accuracy() -> None:
    found, _ = run_nan(KEPT, allow_nan=True)
    assert found is not None
    (result,) = found.experiments
    assert result.prompts == 2
    assert list(result.left_out.values()) == ["run `figs`"]
    for run in ("clean", "figs"):
        assert len(result.accuracy[run]) == len(result.accuracy_rows[run]) == 3
        assert not set(result.left_out) & set(result.accuracy_rows[run])
    assert result.accuracy_of("clean").mean == pytest.approx(2 / 3)
    assert result.conventions["accuracy"].startswith("of all 3 rows, before `keep`")


@pytest.mark.slow
def test_accuracy_is_separate_for_each_model(tmp_path: Path) -> None:
    """The second model predicts other tokens and is never right."""
    folder = str(files("mechdsl") / "zoo" / "counting")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    with torch.no_grad():
        models[1].lm_head.weight.neg_()
    path = tmp_path / "a.mech"
    path.write_text(
        """mech 1
model toy = local("one")
model twin = local("two")
prompts fruit {
  count in 2..9
  template "Part 1: apple Count {count}:"
  answer " 1"
  corrupt fewer { count = count - 1 }
}
experiment e {
  prompts fruit limit 6
  from clean into fewer
  model toy, twin
  patch resid_post layer 1 at last token
  measure logit(answer) as delta
  expect accuracy(clean, model: toy) = 1 on mean
  expect accuracy(clean, model: twin) = 1 on mean
  expect accuracy(fewer, model: toy) - accuracy(fewer, model: twin) = 1 on mean
}
""",
        encoding="utf-8",
    )
    own = {"toy": (models[0], tokenizer), "twin": (models[1], tokenizer)}
    (result,) = mechdsl.run(path, models=own).files[0].experiments
    assert [outcome.holds for outcome in result.outcomes] == [True, False, True]
