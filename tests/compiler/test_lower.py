"""From syntax trees to the typed program."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.syntax import UnknownName, UnusedName
from mechdsl.program.measures import CORRECTION_WORDS
from mechdsl.program.significance import CORRECTION_NAMES

from ..parsing import lower_program, parse
from .support import DELTA, FROM, HEAD, experiment, lowered


def test_lowered_experiment_has_typed_fields() -> None:
    text = HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA)
    (found,) = lowered(text).experiments
    assert (found.name, found.model, found.prompts) == ("test", "toy", "fruit")
    assert (found.source, found.base, found.limit) == ("clean", "fewer", 64)
    (rule,) = found.rules
    assert (rule.verb, rule.source) == ("patch", "clean")
    assert found.statistics.correction == "holm"


@pytest.mark.parametrize(
    ("line", "test", "correction", "by"),
    [
        ("stats bootstrap(500)", "t", "holm", None),
        ("stats test flips", "flips", "holm", None),
        ("stats test bootstrap correct max", "bootstrap", "max", None),
        ("stats correct bh test bootstrap bootstrap(500)", "bootstrap", "bh", None),
        ("stats by count test bootstrap", "bootstrap", "holm", "count"),
        ("stats by test", "t", "holm", "test"),
    ],
)
def test_stats_line_sets_test_correction_and_groups(
    line: str, test: str, correction: str, by: str | None
) -> None:
    (found,) = lowered(HEAD + experiment(FROM, DELTA, line)).experiments
    settings = found.statistics
    assert (settings.test, settings.correction, settings.by) == (test, correction, by)
    assert settings.resamples == (500 if "500" in line else 10_000)


def test_each_correction_has_a_name() -> None:
    assert set(CORRECTION_WORDS) == set(CORRECTION_NAMES)


def test_single_model_is_the_default() -> None:
    text = HEAD + experiment("measure correct as raw")
    assert lowered(text).experiments[0].model == "toy"


def test_names_may_be_used_before_they_are_defined() -> None:
    head, model = HEAD.replace('model toy = zoo("counting")\n', ""), 'model toy = zoo("counting")\n'
    text = head + experiment("measure ld as raw") + "metric ld = logit(answer)\n" + model
    assert lowered(text).experiments[0].measures[0].label == "ld"


def test_named_metrics_are_expanded() -> None:
    text = HEAD.replace("\nprompts", "metric a = logit(answer)\nmetric b = a - 1\n\nprompts", 1)
    (found,) = lowered(text + experiment("measure b as raw")).experiments
    (again,) = lowered(HEAD + experiment("measure logit(answer) - 1 as raw")).experiments
    assert found.measures[0].metric == again.measures[0].metric


WRITTEN = {
    "brackets at the end": ("logit(answer) / (prob(answer) - 1)", ""),
    "brackets at the start": ("(logit(answer) - 1) / 2", ""),
    "brackets in brackets": ("2 * ((logit(answer) - 1) / (prob(answer) + (1)))", ""),
    "brackets around all of it": ("(logit(answer) - 1)", "logit(answer) - 1"),
    "a comment between": ("logit(answer) # why\n - 1", "logit(answer) - 1"),
    "spaces in a text": ('logit("  #  1")   -  1', 'logit("  #  1") - 1'),
}


@pytest.mark.parametrize(("written", "label"), WRITTEN.values(), ids=WRITTEN)
def test_labels_equal_the_source_text(written: str, label: str) -> None:
    lines = (
        f"keep {written} > (0)",
        f"measure {written} as raw",
        f"expect mean({written}) > (1 + (2))",
    )
    (found,) = lowered(HEAD + experiment(*lines)).experiments
    assert found.measures[0].label == (label or written)
    whole = written if written[0] == "(" else label or written
    assert found.keep[0].span.written == f"{whole} > (0)"
    assert found.expects[0].text == f"mean({whole}) > (1 + (2))"


def test_settings_override_parameters() -> None:
    text = HEAD.replace("\nprompts", "param n = 8\n\nprompts", 1) + experiment(DELTA)
    source = Source(text.replace("limit 64", "limit n").replace("delta", "raw"))
    tree, _ = parse(source)
    for settings, limit in (({}, 8), ({"n": "5"}, 5)):
        program, found = lower_program(tree, source, settings)
        assert program.experiments[0].limit == limit
        assert not has_errors(found)


def test_imports_define_names_but_no_experiments(tmp_path: Path) -> None:
    shared = HEAD + experiment("measure correct as raw", name="elsewhere")
    (tmp_path / "shared.mech").write_text(shared, encoding="utf-8")
    text = 'mech 1\n\nuse "shared.mech"\nuse "shared.mech"\n' + experiment("measure correct as raw")
    program = lowered(text, tmp_path / "main.mech")
    assert [e.name for e in program.experiments] == ["test"]
    assert list(program.models) == ["toy"]


def test_circular_imports_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mech").write_text('mech 1\nuse "b.mech"\n', encoding="utf-8")
    (tmp_path / "b.mech").write_text('mech 1\nuse "a.mech"\n', encoding="utf-8")
    source = Source((tmp_path / "a.mech").read_text("utf-8"), tmp_path / "a.mech")
    _, found = lower_program(parse(source)[0], source)
    assert [d.code for d in found] == ["E0204"]


def test_rules_record_their_enclosing_loops() -> None:
    lines = (
        "for l in 0..2 {",
        "patch attn_out layer l at last token",
        "}",
        "patch mlp_out layer 0 at last token",
    )
    (found,) = lowered(HEAD + experiment(FROM, *lines, DELTA)).experiments
    assert [rule.loops for rule in found.rules] == [("l",), ()]


@pytest.mark.parametrize(
    "unused",
    [
        "direction d = mean_difference(fruit, fruit) at resid_post layer depth at last token",
        "direction d = mean_difference(fruit, fruit) at resid_post layers depth..3 at last token",
        "direction d = mean_difference(fruit, fruit) at resid_post layer 3 at token depth",
        "basis d = pca(fruit, dims: 2) at resid_post layer depth at token depth",
    ],
)
def test_parameter_of_an_unused_definition_causes_no_second_warning(unused: str) -> None:
    text = HEAD.replace("\nprompts", "param depth = 2\n\nprompts", 1) + f"{unused}\n"
    found = check_source(Source(text + experiment("measure correct as raw"))).diagnostics
    names = {each.name for each in found if isinstance(each, UnusedName)}
    assert "d" in names
    assert "depth" not in names


def test_misspelt_prompts_name_causes_no_unused_warning() -> None:
    source = Source(HEAD + experiment("measure correct as raw").replace("fruit", "friut"))
    found = check_source(source).diagnostics
    assert [type(d) for d in found] == [UnknownName]


def test_metric_may_have_the_name_of_a_text() -> None:
    text = HEAD.replace("\nprompts", "metric answer = prob(answer)\n\nprompts", 1)
    (found,) = lowered(text + experiment("measure answer as raw")).experiments
    (again,) = lowered(HEAD + experiment("measure prob(answer) as raw")).experiments
    assert found.measures[0].metric == again.measures[0].metric


def test_duplicate_experiment_still_counts_as_using_names() -> None:
    text = HEAD.replace("\nprompts", "metric p = prob(answer)\n\nprompts", 1)
    twice = experiment("measure correct as raw") + experiment("measure p as raw")
    source = Source(text + twice)
    checked = check_source(source)
    assert [d.code for d in checked.diagnostics] == ["E0202"]
    assert len(checked.program.experiments) == 1


def test_seed_of_the_file_overrides_an_imported_seed(tmp_path: Path) -> None:
    (tmp_path / "shared.mech").write_text(f"{HEAD}\nseed 5\n", encoding="utf-8")
    rest = 'use "shared.mech"\n' + experiment("measure correct as raw")
    assert lowered(f"mech 1\n{rest}", tmp_path / "a.mech").seed == 5
    assert lowered(f"mech 1\nseed 7\n{rest}", tmp_path / "a.mech").seed == 7


def test_duplicate_corruption_is_ignored_after_its_error() -> None:
    line = "  corrupt fewer { a = a - 1 }\n"
    text = (
        'mech 1\nmodel toy = zoo("counting")\nprompts barred {\n'
        '  a in 3..9\n  b in 2..8\n  part1 = list("fig", a, sep: ", ")\n'
        '  template "Part 1: {part1} | Part 2: {b}. Count 1:"\n'
        f'  answer " {{a}}"\n{line}{line}}}\n'
        "experiment e {\n  model toy\n  prompts barred limit 8\n  from clean into fewer\n"
        "  patch resid_post layer 1 at last token\n"
        "  measure logit(answer) - logit(answer of fewer) as recovery\n}\n"
    )
    assert [each.code for each in check_source(Source(text)).diagnostics] == ["E0202"]


@pytest.mark.parametrize("call", ["fit(steps: 3)", "fit", "fit(sae, das)", "fit(sae: 3)"])
@pytest.mark.parametrize("kind", ["basis", "lens", "probe", "group", "circuit"])
def test_fit_without_one_trainer_is_an_argument_error(kind: str, call: str) -> None:
    at = "" if kind == "circuit" else " at resid_post layer 1 at last token"
    source = Source(f'mech 1\nmodel m = zoo("counting")\n{kind} s = {call}{at}\n')
    errors = [each for each in check_source(source).diagnostics if each.severity == "error"]
    assert errors
    assert {each.code for each in errors} <= {"E0101", "E0201", "E0207"}
