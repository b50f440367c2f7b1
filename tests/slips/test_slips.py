"""A sample of `python -m tests.slips`: diagnostics of valid files with one slip."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..quick import some
from .checked import Checker, judged, right_files
from .mutants import KINDS, Mutant, drawn
from .table import BOUNDS, counts_of, table

FILES = right_files()
SEED = 8
COUNT = 28
"""Sample size; all sampled mutants without diagnostics have judgements."""
SLOW = ("examples/mediators.mech", "examples/prices.mech")
"""Files whose check takes seconds."""


def sample() -> list[Mutant]:
    return [each for each in drawn(FILES, SEED, COUNT) if each.file not in SLOW]


@pytest.mark.parametrize(
    "models", some([True, False], [True]), ids=["with-models", "without-models"]
)
def test_sampled_slips_are_caught_on_their_line_with_a_suggestion(
    models: bool, tmp_path: Path
) -> None:
    mutants = sample()
    names = {each.file for each in mutants}
    checker = Checker([file for file in FILES if file.name in names], tmp_path, models=models)
    outcomes = [checker.outcome(each) for each in mutants]
    counts = counts_of(outcomes, with_models=models)
    for (caught, of), bound in zip(counts, BOUNDS, strict=True):
        # The bounds hold for 500 mutants; in this small sample, two may be missed.
        assert caught + 2 >= bound * of, table(outcomes, with_models=models)


def test_mutants_differ_from_their_files_in_one_line() -> None:
    mutants = drawn(FILES, SEED, 500)
    assert {each.kind for each in mutants} == set(KINDS)
    texts = {file.name: file.text for file in FILES}
    for each in mutants:
        assert each.text != texts[each.file]
        lines = each.text.count("\n") - texts[each.file].count("\n")
        assert lines == {"line dropped": -1, "line doubled": 1}.get(each.kind, 0)
        assert each.text.split("\n")[each.line - 1] == each.after or each.kind == "line dropped"


def test_slip_judgements_have_a_verdict_and_a_reason() -> None:
    for key, judgement in judged().items():
        assert judgement.verdict in ("legal", "shape", "tokenizer"), key
        assert judgement.reason, key
