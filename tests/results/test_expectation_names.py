"""Names in expectations: measures of other experiments, and true cells or rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.conditions import (
    Arithmetic,
    CellValue,
    Comparison,
    ConditionValue,
    ExpectStatement,
    Ranking,
    truth_value,
)
from mechdsl.checks.expectations import read_expectation
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.pipeline.options import RunOptions
from mechdsl.program import spec
from mechdsl.program.lowering import add_dependencies, compared_experiments
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.verdicts.decision import known_results

from ..parsing import lower_program, parse
from ..run_source import run_source
from .synthetic import expectation, finished, heads, measure, positions

GROUP = "mech 1\ngroup movers = L2H1, L1H3\ngroup pair = L0H0\n"


LOGPROB = {"label": "logprob(answer)", "metric": "logprob(answer)"}


def one_cell(name: str) -> ExperimentResult:
    result = heads()
    (data,) = result.measures
    kept = replace(data, patched=data.patched[9:10], inert=data.inert[9:10])
    return finished(replace(result, name=name, cells=result.cells[9:10], measures=(kept,)))


def groups() -> tuple[spec.Group, ...]:
    program, _ = lower_program(parse(Source(GROUP))[0], Source(GROUP))
    return tuple(program.groups.values())


@pytest.fixture(name="here", scope="module")
def _here() -> ExperimentResult:
    result = heads()
    large = [n % 2 for n in range(result.prompts)]
    right = [n % 3 == 0 for n in range(result.prompts)]
    text = [str(n % 2) for n in range(result.prompts)]
    values = {**result.row_values, "large": large, "right": right, "text": text}
    return finished(replace(result, row_values={**values, "pair": large}))


@pytest.fixture(name="there", scope="module")
def _there() -> ExperimentResult:
    """Measures in a different order; the first has a label that isn't a name."""
    result = positions()
    (data,) = result.measures
    second = measure(data.patched, data.base, label="ld", effect="delta")
    third = measure(data.patched, data.base, effect="delta", **LOGPROB)
    return finished(replace(result, name="there", measures=(data, second, third)))


def read(line: str, here: ExperimentResult, **others: ExperimentResult) -> ExpectStatement:
    said = expectation(line).model_copy(update={"groups": groups()})
    condition, found = read_expectation(said, known_results(said, here, others))
    assert condition is not None, found[0].message
    return condition


def refusal(line: str, here: ExperimentResult, lost: tuple[str, ...] = (), **others: object) -> str:
    said = expectation(line).model_copy(update={"groups": groups()})
    known = known_results(said, here, others, lost)  # pyright: ignore[reportArgumentType]
    condition, (found,) = read_expectation(said, known)
    assert condition is None
    return f"{found.code}: {found.message}"


def value(line: str, here: ExperimentResult, **others: ExperimentResult) -> ConditionValue:
    condition = read(f"{line} > 0", here, **others)
    assert isinstance(condition, Comparison)
    return condition.left


@pytest.mark.parametrize(
    ("written", "how", "number"),
    [
        ("max(recovery of there)", "max", 0),
        ("max(delta of ld of there)", "max", 1),
        ("mean(ld of there, layer 2)", "mean", 1),
        ("mean(logprob of there, layer 2)", "mean", 2),
    ],
)
def test_measure_of_another_experiment_is_resolved_there(
    written: str, how: str, number: int, here: ExperimentResult, there: ExperimentResult
) -> None:
    """The index of the measure is that in the other experiment."""
    found = value(written, here, there=there)
    assert isinstance(found, CellValue)
    assert (found.aggregate, found.measure, found.experiment) == (how, number, "there")
    assert bool(found.where) == ("layer" in written)


def test_difference_between_experiments_reads_both(here: ExperimentResult) -> None:
    one = one_cell("one")
    found = value("recovery(L2H1) - recovery of one", here, one=one)
    assert isinstance(found, Arithmetic)
    left, right = found.left, found.right
    assert isinstance(left, CellValue)
    assert isinstance(right, CellValue)
    assert (left.experiment, right.experiment, right.aggregate) == (None, "one", "")


def test_selectors_match_cells_of_the_other_experiment(
    here: ExperimentResult, there: ExperimentResult
) -> None:
    found = value('mean(recovery of there, position: "last token")', here, there=there)
    assert isinstance(found, CellValue)
    assert len([cell for cell in there.cells if found.where[0].matches(cell)]) == 4
    said = refusal("mean(recovery of there, head 1) > 0", here, there=there)
    assert said.endswith("no cell matches head 1")


def test_measure_of_this_experiment_takes_precedence(here: ExperimentResult) -> None:
    """An experiment may have the name of a measure; valid files keep their meaning."""
    found = value("max(recovery of ld)", here, ld=one_cell("ld"))
    assert isinstance(found, CellValue)
    assert found.experiment is None
    said = refusal("max(delta of ld) > 0", here, ld=one_cell("ld"))
    assert said == "E0203: there is no measure or effect of this experiment called `delta of ld`"


def test_expectation_on_a_lost_experiment_is_rejected(here: ExperimentResult) -> None:
    said = refusal("max(delta of there) > 0", here, lost=("there",))
    assert said == "E0606: this expectation cannot be decided: `there` could not be computed"


@pytest.mark.parametrize(
    ("truth", "cells"),
    [
        ("movers", ["L1H3.z", "L2H1.z"]),
        ("[L2H1, L1H3]", ["L1H3.z", "L2H1.z"]),
        ("[movers, L0H0]", ["L0H0.z", "L1H3.z", "L2H1.z"]),
        ("L2H1", ["L2H1.z"]),
        ("layer 1", ["L1H0.z", "L1H1.z", "L1H2.z", "L1H3.z"]),
        ("layer 1 head 0..1", ["L1H0.z", "L1H1.z"]),
    ],
)
def test_auroc_truth_selects_cells(truth: str, cells: list[str], here: ExperimentResult) -> None:
    found = value(f"auroc(recovery, {truth})", here)
    assert isinstance(found, Ranking)
    assert found.truth is not None
    assert (found.column, found.where) == (None, ())
    true = [c.name for c in here.cells if any(each.matches(c) for each in found.truth)]
    assert true == cells


def test_auroc_truth_selects_positions() -> None:
    here = finished(positions())
    names = ["last token", "first-item of part1 token"]
    found = value(f'auroc(recovery, ["{names[0]}", "{names[1]}"], layer 2)', here)
    assert isinstance(found, Ranking)
    assert found.truth is not None
    true = [cell for cell in here.cells if any(each.matches(cell) for each in found.truth)]
    assert [cell.coords["position"] for cell in true] == names[::-1] * 4
    assert refusal('auroc(recovery, ["first token"]) > 0', here).startswith("E0203")


def test_auroc_ranks_only_selected_cells(here: ExperimentResult) -> None:
    found = value("auroc(recovery, movers, layer 1..2)", here)
    assert isinstance(found, Ranking)
    assert sum(found.where[0].matches(cell) for cell in here.cells) == 8
    assert refusal("auroc(recovery, L2H1, layer 2, L2H1) > 0", here).endswith(
        "every ranked cell is at `L2H1`"
    )
    assert refusal("auroc(recovery, movers, layer 0) > 0", here).endswith(
        "no ranked cell is at `movers`"
    )


@pytest.mark.parametrize("column", ["large", "right", "text"])
def test_auroc_truth_may_be_a_prompt_variable(column: str, here: ExperimentResult) -> None:
    found = value(f"auroc(recovery, {column}, L2H1)", here)
    assert isinstance(found, Ranking)
    assert (found.column, found.truth) == (column, None)
    one = replace(one_cell("one"), row_values=here.row_values)
    assert value(f"auroc(recovery, {column})", one) == Ranking(0, (), None, column)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("auroc(recovery, pair, L2H1)", "`pair` is both a group and a prompt variable"),
        ("auroc(recovery, count, L2H1)", "`count` is neither true nor false: it is `2` in one row"),
        ("auroc(recovery, large)", "every cell has a value in each row"),
        ("auroc(recovery, large, layer 2)", "layer 2 matches 4 cells"),
        ("auroc(recovery, large, L9H9)", "no cell matches L9H9"),
        ("auroc(recovery, [L2H1, L9H9])", "no cell matches L9H9"),
        ("auroc(recovery, [1..3])", "`1..3` is not a site"),
        ("auroc(recovery, 3)", "`3` is not a site"),
    ],
)
def test_invalid_auroc_truth_is_rejected(call: str, said: str, here: ExperimentResult) -> None:
    assert refusal(f"{call} > 0", here).endswith(said)


def test_auroc_truth_equal_in_all_kept_rows_is_rejected(here: ExperimentResult) -> None:
    """Some rows are false, but none of the rows that `keep` leaves."""
    kept = replace(here, row_values={"large": [1] * here.prompts})
    assert refusal("auroc(recovery, large, L2H1) > 0", kept).endswith("`large` is 1 in every row")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0.0, False),
        ("1", True),
        ("False", False),
        (2, None),
        ("yes", None),
        (None, None),
        ([1], None),
    ],
)
def test_truth_value_accepts_only_zero_one_and_booleans(
    given: object, expected: bool | None
) -> None:
    assert truth_value(given) is expected


# --- in a file ----------------------------------------------------------------------------------

FILE = """mech 1
model toy = zoo("counting")
group movers = L0H1, L1H2
prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}
"""


def block(name: str, *lines: str) -> str:
    rule = "ablate layer 0..1 head * at last token with zero"
    said = ("prompts fruit limit 16", rule, "measure logit(answer) as delta", *lines)
    return f"experiment {name} {{\n" + "".join(f"  {line}\n" for line in said) + "}\n"


def test_expectation_may_name_a_later_experiment() -> None:
    text = FILE + block("e", "expect max(delta) - max(delta of f) < 0") + block("f")
    assert [each.code for each in check_source(Source(text)).diagnostics] == ["W0730"]


def test_only_adds_experiments_that_expectations_compare_with() -> None:
    first = block("e", "expect max(delta of ld of f) > 0", "expect max(delta of delta) > 0")
    second = block("f", "expect max(delta of g) > 0")
    third = block("h", "expect pearson(delta, e) > 0")
    text = FILE + first + second + block("g") + third
    program, _ = lower_program(parse(Source(text))[0], Source(text))
    every = program.experiments
    assert compared_experiments(every[0]) == {"f", "delta"}
    assert [e.name for e in add_dependencies({"e"}, every)] == ["e", "f"], (
        "nothing that `f` alone reads"
    )
    assert [e.name for e in add_dependencies({"h"}, every)] == ["e", "h"]


def test_only_shows_one_experiment(tmp_path: Path) -> None:
    line = "expect spearman(delta, f) > 0.99 on mean"
    source = Source(FILE + block("e", line) + block("f"), tmp_path / "a.mech")
    found, diagnostics = run_source(source, RunOptions(settings=CheckSettings(only="e")))
    assert found is not None
    assert not has_errors(diagnostics)
    (experiment,) = found.experiments
    assert experiment.name == "e"
    assert experiment.holds, experiment.outcomes


def test_group_named_in_an_expectation_counts_as_used() -> None:
    unused = check_source(Source(FILE + block("e"))).diagnostics
    assert [each.code for each in unused] == ["W0730"]
    text = FILE + block("e", "expect auroc(delta, movers) > 0.5")
    checked = check_source(Source(text))
    assert not checked.diagnostics
    (said,) = checked.program.experiments[0].expects
    assert [group.name for group in said.groups] == ["movers"]
