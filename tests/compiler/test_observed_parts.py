"""Which results an experiment with `observe` lines has, and what goes to which."""

from __future__ import annotations

import pytest

from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

from .support import codes, experiment, lowered

HEAD = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 1..6
  item in ["pear", "fig", "plum", "kiwi"]
  template "{item} {count}:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
"""
ATTN = "observe attention layer * head * from last token to first token as attn"
NORM = "observe norm resid_post layer * at last token as lengths"
LENS = "observe logit_lens resid_post layer * at last token"
LOGIT = "measure logit(answer) as raw"


def results(*lines: str, after: str = "") -> dict[str, spec.Experiment]:
    """By name."""
    found = lowered(HEAD + experiment(*lines) + after).experiments
    return {each.name: each for each in found}


def reports(found: dict[str, spec.Experiment]) -> dict[str, list[str]]:
    return {name: [report.kind for report in each.reports] for name, each in found.items()}


def test_each_line_with_a_name_is_a_result() -> None:
    found = results(ATTN, NORM, LOGIT)
    assert list(found) == ["test", "test.attn", "test.lengths"]
    assert [[m.label for m in each.measures] for each in found.values()] == [
        ["logit(answer)"],
        ["attn"],
        ["lengths"],
    ]


def test_one_line_is_the_experiments_own_result() -> None:
    assert list(results(NORM)) == ["test"]
    assert list(results(NORM, LOGIT)) == ["test", "test.lengths"]
    (both,) = results(NORM.removesuffix(" as lengths"), LOGIT).values()
    assert [m.label for m in both.measures] == ["norm", "logit(answer)"]


def test_measures_are_of_the_lens_alone() -> None:
    """What stands beside a lens is of the model's own output no longer; other lines keep theirs."""
    found = results(NORM, f"{LENS} as lens", LOGIT)
    assert {name: [m.label for m in each.measures] for name, each in found.items()} == {
        "test.lengths": ["lengths"],
        "test.lens": ["logit(answer)"],
    }
    assert all(m.observed for each in found.values() for m in each.measures)


def test_a_report_goes_to_those_that_have_its_axes() -> None:
    found = results(
        ATTN,
        NORM,
        LOGIT,
        "report lines layer",
        "report heatmap layer by head",
        "report table of lengths",
        "report bars count",
    )
    assert reports(found) == {
        "test": ["bars"],  # that no result has the axis of
        "test.attn": ["lines", "heatmap"],
        "test.lengths": ["lines", "table"],
    }


def test_axes_of_rules_are_those_of_what_they_change() -> None:
    """A line that looks at another run has its own axes alone."""
    rule = "ablate layer 0 head * at last token with zero"
    elsewhere = NORM.replace(" at last", " of fewer at last")
    for line, lines_head in ((NORM, ["lines"]), (elsewhere, [])):
        found = results(rule, line, "measure logit(answer) as delta", "report lines head")
        assert reports(found) == {"test": ["lines"], "test.lengths": lines_head}


@pytest.mark.parametrize(
    ("expect", "where"),
    [
        ("max(attn) > 0.1", "test.attn"),
        ("max(lengths) > 0.1", "test.lengths"),
        ("max(logit(answer)) > 0.1", "test"),
        ("max(raw) > 0.1", "test"),
        ("max(norm) > 0.1", "test"),  # which no measure is called, and the first result says so
    ],
)
def test_an_expectation_goes_to_what_it_names(expect: str, where: str) -> None:
    found = results(ATTN, NORM, LOGIT, f"expect {expect}")
    assert [name for name, each in found.items() if each.expects] == [where]


def test_an_expectation_goes_to_the_first_that_has_its_effect() -> None:
    rule = "ablate layer 0 head * at last token with zero"
    for effect, where in (("delta", "test"), ("raw", "test.lengths")):
        found = results(rule, NORM, "measure logit(answer) as delta", f"expect max({effect}) > 0.1")
        assert [name for name, each in found.items() if each.expects] == [where]


def names_in(found: spec.Experiment) -> set[str]:
    """In what it expects."""
    (expect,) = found.expects
    assert expect.condition is not None
    return {node.id for node in walk(expect.condition) if isinstance(node, ast.Name)}


def test_a_name_in_an_expectation_is_the_result_that_it_is_of() -> None:
    """Its own measure keeps its name; that of another experiment is called as its result is."""
    then = ("ablate L0H0 at last token with zero", "measure logit(answer) as delta")
    after = experiment(*then, "expect max(attn) > 0.1", name="then")
    found = results(ATTN, NORM, LOGIT, "expect max(attn) > 0.1", after=after)
    assert names_in(found["test.attn"]) == {"attn"}
    assert names_in(found["then"]) == {"attn", "test.attn"}


def wholly(found: spec.Experiment) -> set[tuple[str, str]]:
    """(measure as written, result that it is in) of what it expects of others."""
    (expect,) = found.expects
    assert expect.condition is not None
    return {
        (node.measure.span.written, node.experiment.id)
        for node in walk(expect.condition)
        if isinstance(node, ast.ExperimentMeasure)
    }


@pytest.mark.parametrize(
    ("expect", "where", "others"),
    [
        ("mean(attn) > mean(lengths)", "test.attn", {("lengths", "test.lengths")}),
        ("mean(lengths) > mean(attn)", "test.lengths", {("attn", "test.attn")}),
        ("lengths(layer 1) > attn(L1H0) + 1", "test.lengths", {("attn(L1H0)", "test.attn")}),
        ("attn(L1H0) > logit(answer)", "test.attn", {("logit(answer)", "test")}),
        ("not max(logit(answer)) < max(attn) or attn(L1H0) near 1 within 2", "test", {
            ("attn", "test.attn"), ("attn(L1H0)", "test.attn"),
        }),
        ("mean(attn) > mean(raw)", "test.attn", set()),  # its own effect
        ("pearson(attn, lengths) > 0", "test.attn", set()),
        ("max(attn, attn layer 1) > 0", "test.attn", set()),
    ],
)  # fmt: skip
def test_two_results_of_an_experiment_are_compared(
    expect: str, where: str, others: set[tuple[str, str]]
) -> None:
    found = results(ATTN, NORM, LOGIT, f"expect {expect}")
    assert [name for name, each in found.items() if each.expects] == [where]
    assert wholly(found[where]) == others


def test_what_several_results_measure_is_none_of_them_to_another() -> None:
    """Which of two lenses is meant, nobody knows."""
    two = (f"{LENS} as one", f"{LENS.replace('*', '1')} as two")
    found = results(NORM, *two, LOGIT, "expect mean(lengths) > mean(logit(answer))")
    assert wholly(found["test.lengths"]) == set()


@pytest.mark.parametrize("line", [ATTN.replace("layer *", "layer n"), NORM.replace("*", "n")])
def test_a_loop_around_a_line_is_its_axis(line: str) -> None:
    found = results(f"for n in 0..1 {{ {line} }}", LOGIT, "report lines n")
    assert [each.kind for each in list(found.values())[1].reports] == ["lines"]
    assert not found["test"].reports


def test_other_experiments_call_a_result_by_the_observations_name() -> None:
    rule = "ablate top 2 of attn at last token with zero"
    after = experiment(rule, "measure logit(answer) as delta", name="then")
    found = results(ATTN, NORM, LOGIT, after=after)
    assert found["then"].after == ("test.attn",)
    group = "group largest = top 2 of attn\n"
    rule = rule.replace("top 2 of attn", "largest")
    after = group + experiment(rule, "measure logit(answer) as delta", name="then")
    found = results(ATTN, NORM, LOGIT, after=after)
    assert found["then"].after == ("test.attn",)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ((ATTN, NORM, "report table of lengts"), "E0201"),
        ((NORM, "report table of attn"), "E0201"),
        ((f"{LENS} top 0",), "E0207"),
        ((NORM.replace(" at", " of fewer at"), "ablate L0H0 at last token with zero"), "E0207"),
        ((NORM.replace(" at", " of fewer at").removesuffix(" as lengths"), LOGIT), "E0207"),
        ((NORM.removesuffix("lengths") + "delta",), "E0207"),
        ((NORM.removesuffix("lengths") + "prob",), "E0207"),
    ],
)
def test_what_is_refused(lines: tuple[str, ...], code: str) -> None:
    assert [each for each in codes(*lines, head=HEAD) if each.startswith("E")] == [code]
