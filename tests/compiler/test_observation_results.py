"""Results of experiments with `observe` lines, and the reports and expectations of each."""

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
    """Return the lowered results by name."""
    found = lowered(HEAD + experiment(*lines) + after).experiments
    return {each.name: each for each in found}


def reports(found: dict[str, spec.Experiment]) -> dict[str, list[str]]:
    return {name: [report.kind for report in each.reports] for name, each in found.items()}


def test_each_named_observation_is_a_separate_result() -> None:
    found = results(ATTN, NORM, LOGIT)
    assert list(found) == ["test", "test.attn", "test.lengths"]
    assert [[m.label for m in each.measures] for each in found.values()] == [
        ["logit(answer)"],
        ["attn"],
        ["lengths"],
    ]


def test_single_observation_is_the_result_of_the_experiment() -> None:
    assert list(results(NORM)) == ["test"]
    assert list(results(NORM, LOGIT)) == ["test", "test.lengths"]
    (both,) = results(NORM.removesuffix(" as lengths"), LOGIT).values()
    assert [m.label for m in both.measures] == ["norm", "logit(answer)"]


def test_measures_next_to_a_lens_apply_only_to_the_lens() -> None:
    """Measures next to a lens no longer read the model's output; other observations stay."""
    found = results(NORM, f"{LENS} as lens", LOGIT)
    assert {name: [m.label for m in each.measures] for name, each in found.items()} == {
        "test.lengths": ["lengths"],
        "test.lens": ["logit(answer)"],
    }
    assert all(m.observed for each in found.values() for m in each.measures)


def test_report_is_assigned_to_results_with_its_axes() -> None:
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
        "test": ["bars"],  # no result has the axis `count`
        "test.attn": ["lines", "heatmap"],
        "test.lengths": ["lines", "table"],
    }


def test_observation_of_a_patched_run_has_the_axes_of_the_rules() -> None:
    """An observation of another run has only its own axes."""
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
        ("max(norm) > 0.1", "test"),  # no measure is called so; the first result reports it
    ],
)
def test_expectation_is_assigned_to_the_result_it_names(expect: str, where: str) -> None:
    found = results(ATTN, NORM, LOGIT, f"expect {expect}")
    assert [name for name, each in found.items() if each.expects] == [where]


def test_expectation_is_assigned_to_the_first_result_with_its_effect() -> None:
    rule = "ablate layer 0 head * at last token with zero"
    for effect, where in (("delta", "test"), ("raw", "test.lengths")):
        found = results(rule, NORM, "measure logit(answer) as delta", f"expect max({effect}) > 0.1")
        assert [name for name, each in found.items() if each.expects] == [where]


def names_in(found: spec.Experiment) -> set[str]:
    """Return the names in the expectation of a result."""
    (expect,) = found.expects
    assert expect.condition is not None
    return {node.id for node in walk(expect.condition) if isinstance(node, ast.Name)}


def test_names_in_expectations_refer_to_results() -> None:
    """A measure of the same result keeps its name; others are named by their result."""
    then = ("ablate L0H0 at last token with zero", "measure logit(answer) as delta")
    after = experiment(*then, "expect max(attn) > 0.1", name="then")
    found = results(ATTN, NORM, LOGIT, "expect max(attn) > 0.1", after=after)
    assert names_in(found["test.attn"]) == {"attn"}
    assert names_in(found["then"]) == {"attn", "test.attn"}


def foreign_measures(found: spec.Experiment) -> set[tuple[str, str]]:
    """Return (measure text, result) pairs that an expectation reads from other results."""
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
def test_expectation_compares_results_of_one_experiment(
    expect: str, where: str, others: set[tuple[str, str]]
) -> None:
    found = results(ATTN, NORM, LOGIT, f"expect {expect}")
    assert [name for name, each in found.items() if each.expects] == [where]
    assert foreign_measures(found[where]) == others


def test_measure_of_several_results_is_ambiguous_to_other_results() -> None:
    """The measure could be that of either lens."""
    two = (f"{LENS} as one", f"{LENS.replace('*', '1')} as two")
    found = results(NORM, *two, LOGIT, "expect mean(lengths) > mean(logit(answer))")
    assert foreign_measures(found["test.lengths"]) == set()


@pytest.mark.parametrize("line", [ATTN.replace("layer *", "layer n"), NORM.replace("*", "n")])
def test_loop_around_an_observation_is_its_axis(line: str) -> None:
    found = results(f"for n in 0..1 {{ {line} }}", LOGIT, "report lines n")
    assert [each.kind for each in list(found.values())[1].reports] == ["lines"]
    assert not found["test"].reports


def test_other_experiments_refer_to_results_by_observation_name() -> None:
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
def test_invalid_observation_is_rejected(lines: tuple[str, ...], code: str) -> None:
    assert [each for each in codes(*lines, head=HEAD) if each.startswith("E")] == [code]
