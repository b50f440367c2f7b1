"""`using … verify`: verified cells, against forward passes of one prompt on the bare model, and
against the same experiment without `using`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan
from mechdsl.resolve.expansion import add_exact_cells
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import Results, pack_results, unpack_results
from mechdsl.show.notebook import experiment_html
from mechdsl.statistics.verification import agreement, choose_cells, top_recall
from mechdsl.store.runs import OpenRun

from ..execute.support import MODES as WAYS
from ..execute.support import (
    PROMPTS,
    Prompt,
    check_file,
    experiment,
    patches,
    run_file,
    shared,
    try_file,
    write_rows,
)
from ..execute.test_stored_values import check_case, opened
from ..reference.points import Point
from .models import bare

FAMILIES = ("gpt2", "llama", "gpt_neox")
HEADS = (
    "prompts p",
    "from other into clean",
    "patch layer * head * at last token",
    "measure logit(answer) - logit(wrong) as delta",
)
VERIFY = "using gradient_input verify top 3, random 5"


def at_last(source: Prompt, base: Prompt) -> list[tuple[list[int], list[int]]]:
    return [([source.last], [base.last])]


def exact_by_hand(family: str, result: ExperimentResult) -> np.ndarray:
    """[verified cell] the mean effect, one prompt at a time."""
    cells = [result.cells[cell].coords for cell in result.verified[0].cells]
    points = [[Point("z", at["layer"], at["head"])] for at in cells]
    base = result.measures[0].base[0]
    return (patches(family, points, "other", at_last) - base).mean(1)


@pytest.mark.parametrize("mode", ["planned", "small passes", "padded on the right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verified_cells_have_the_effects_of_runs(family: str, mode: str, tmp_path: Path) -> None:
    found = run_file(experiment("e", *HEADS, VERIFY), tmp_path, bare(family), WAYS[mode])["e"]
    (verified,) = found.verified
    expected = exact_by_hand(family, found)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(verified.exact, expected, atol=1e-4, rtol=1e-3)
    estimates = found.statistics[0].mean
    order = np.argsort(-np.abs(estimates), kind="stable")
    assert verified.cells[:3].tolist() == order[:3].tolist()
    assert set(verified.cells[3:].tolist()) <= set(order[3:].tolist())
    assert len(set(verified.cells.tolist())) == 8
    drawn = verified.cells[3:]
    over = verified.over_random
    assert over is not None
    assert over.pearson.value == pytest.approx(
        pearsonr(estimates[drawn], expected[3:])[0], abs=1e-3
    )
    assert over.spearman.value == pytest.approx(spearmanr(estimates[drawn], expected[3:])[0])
    assert verified.over_all.cells == 8


def test_verified_effects_and_intervals_equal_those_of_the_sweep(tmp_path: Path) -> None:
    """Several measures, each with separate cells, and a fill with a mean over all rows."""
    lines = (
        "prompts p",
        "ablate layer * head * at last token with mean",
        "measure logit(answer) - logit(wrong) as delta",
        "measure loss as relative",
    )
    text = experiment("estimated", *lines, "using integrated_gradients(steps: 2) verify top 2")
    text += experiment("swept", *lines)
    found = run_file(text, tmp_path, bare("llama"))
    swept = found["swept"]
    chosen = [tuple(each.cells) for each in found["estimated"].verified]
    assert len(set(chosen)) == 2
    for number, each in enumerate(found["estimated"].verified):
        assert each.over_random is None
        own = swept.statistics[number]
        np.testing.assert_allclose(each.exact, own.mean[each.cells], atol=1e-5)
        np.testing.assert_allclose(each.low, own.low[each.cells], atol=1e-5)
        np.testing.assert_allclose(each.high, own.high[each.cells], atol=1e-5)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("top 2, random 1", "absolute estimates and 1 other drawn at random with the seed"),
        ("top 2, random 3", "absolute estimates and 3 others drawn at random with the seed"),
        ("random 1", "of each measure, 1 cell drawn at random with the seed was also run"),
    ],
)
def test_conventions_count_the_cells_drawn_at_random(cells: str, said: str, tmp_path: Path) -> None:
    text = experiment("e", *HEADS, f"using gradient_input verify {cells}")
    assert said in run_file(text, tmp_path, bare("llama"))["e"].conventions["verified"]


def test_random_verified_cells_exclude_cells_without_an_effect(tmp_path: Path) -> None:
    """No head of the last layer can change the answer at an earlier token."""
    text = experiment(
        "e",
        "prompts p",
        "from other into clean",
        "patch layer * head * at cue token",
        "measure logit(answer) - logit(wrong) as delta",
        "using gradient_input verify random 12",
    )
    found = run_file(text, tmp_path, bare("gpt2"))["e"]
    (verified,) = found.verified
    assert 0 < len(verified.cells) < 12
    assert not found.measures[0].inert[verified.cells].any()
    assert verified.others == len(verified.cells) == int((~found.measures[0].inert).sum())
    assert "no other cell can have an effect" in found.conventions["verified"]


def test_random_verified_cells_depend_only_on_the_seed(tmp_path: Path) -> None:
    model = bare("gpt2")
    text = experiment("e", *HEADS, "using gradient_input verify random 5")

    def drawn(head: str, text: str) -> list[int]:
        return run_file(head + text, tmp_path, model)["e"].verified[0].cells.tolist()

    first = drawn("", text)
    assert first == drawn("", text + experiment("f", *HEADS))
    assert first != drawn("seed 5\n", text)


def test_plan_counts_the_verified_cells(tmp_path: Path) -> None:
    write_rows(tmp_path)
    checked = check_file(experiment("e", *HEADS, VERIFY), tmp_path, shared(bare("gpt2")))
    plan = make_plan(list(add_exact_cells(checked.experiments)))
    estimated, exact = (each for panel in plan.panels for each in panel.experiments)
    prompts = len(estimated.experiment.table)
    assert exact.count() == 8 * prompts
    assert exact.experiment.spec.estimator is None


def test_stored_runs_contain_the_verified_cells(tmp_path: Path) -> None:
    check_case("gpt2", experiment("e", *HEADS, VERIFY), tmp_path, cut=3)


def test_verified_cells_are_read_from_an_earlier_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the verified cells are those of the same sweep without `using`."""
    model, kept = bare("gpt2"), tmp_path / "store"
    with opened(kept) as run:
        first, _ = try_file(experiment("f", *HEADS), tmp_path, model, run=run)
    assert first is not None
    blocks: list[int] = []
    whole = OpenRun.keep
    monkeypatch.setattr(
        OpenRun, "keep", lambda self, block: (blocks.append(1), whole(self, block))[1]
    )
    for verify, stored in (("", 0), (" verify top 3, random 5", 0)):
        with opened(kept, verify or "none") as run:
            text = experiment("e", *HEADS, f"using gradient_input{verify}")
            found, _ = try_file(text, tmp_path, model, run=run)
            assert found is not None
        if verify:
            assert len(blocks) == stored
        blocks.clear()
    (verified,) = found.experiments[0].verified
    np.testing.assert_array_equal(
        verified.exact, first.experiments[0].statistics[0].mean[verified.cells]
    )


def test_verified_cells_appear_in_files_records_and_tables(tmp_path: Path) -> None:
    text = experiment("e", *HEADS, VERIFY, "report table top 4")
    result, _ = try_file(text, tmp_path, bare("gpt2"))
    assert result is not None
    (found,) = result.experiments
    whole = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text}'
    again = unpack_results(pack_results(Results((result,)), whole)).experiments[0]
    (one,), (two,) = found.verified, again.verified
    np.testing.assert_array_equal(one.cells, two.cells)
    assert (one.over_random, one.recall) == (two.over_random, two.recall)
    document: dict[str, Any] = experiment_document(found).as_json()
    exact = [cell["measures"][0].get("exact") for cell in document["cells"]]
    assert [each["choice"] for each in exact if each].count("random") == 5
    assert document["verified"][0]["over_random"]["cells"] == 5
    records = found.records()
    assert [each["verified"] for each in records].count("top") == 3
    assert sum(each["exact"] is not None for each in records) == 8
    shown = found.to_text(140)
    assert "verified cells" in shown
    assert "agreement over 5 cells drawn from 9: Pearson" in shown
    assert "random cells" in shown
    assert "verified cells" in experiment_html(found)


def test_recall_counts_random_cells_above_the_top() -> None:
    found = top_recall(np.array([5.0, -4.0, 1.0, 3.0, -0.5, 2.0]), 3, 95.0)
    assert (found.found, found.above) == (2, 2)
    assert found.low == pytest.approx(0.0943, abs=1e-3)
    assert found.high == pytest.approx(0.9916, abs=1e-3)


def test_correlations_of_two_cells_are_nan() -> None:
    values = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 5.0])
    three = agreement(*values, np.ones(3, dtype=bool), None)
    assert (three.cells, three.spearman.value) == (3, 1)
    two = agreement(*values, np.array([True, True, False]), None)
    assert two.cells == 2
    assert np.isnan([two.pearson.value, two.spearman.value]).all()


def test_chosen_cells_skip_cells_without_an_estimate() -> None:
    estimates = np.array([np.nan, 1.0, -3.0, 2.0, 0.0])
    best, drawn = choose_cells(estimates, 2, 9, seed=1)
    assert best.tolist() == [2, 3]
    assert sorted(drawn.tolist()) == [1, 4]


def test_verified_cells_do_not_depend_on_execution_settings(tmp_path: Path) -> None:
    """The exact cells are laid out by the same sizes, with the same planner passes."""
    options = RunOptions(without=frozenset({"prefix"}), execution=ExecutionOptions(pass_tokens=40))
    text = experiment("e", *HEADS, VERIFY)
    one = run_file(text, tmp_path, bare("gpt2"), options)["e"].verified[0]
    two = run_file(text, tmp_path, bare("gpt2"))["e"].verified[0]
    np.testing.assert_allclose(one.exact, two.exact, atol=1e-5)


@pytest.mark.parametrize(("line", "until"), [("top 3 95%", "bound"), ("stable", "stable")])
def test_verification_search_runs_cells_in_order_of_estimates(
    line: str, until: str, tmp_path: Path
) -> None:
    """With so few cells, all of them run, which proves the result."""
    text = experiment("e", *HEADS, f"using gradient_input verify until {line}")
    result, _ = try_file(text, tmp_path, bare("llama"))
    assert result is not None
    (found,) = result.experiments
    (verified,) = found.verified
    assert verified.search is not None
    assert verified.search.until == until
    assert verified.search.is_proved
    assert len(verified.cells) == int((~found.measures[0].inert).sum())
    order = np.abs(found.statistics[0].mean[verified.cells[: verified.ranked]])
    assert (np.diff(order) <= 0).all()
    assert "largest exact effects are proved" in found.to_text(140)
    assert found.conventions["verified"] == (
        "of each measure, all cells that can have an effect were run, on the same rows: the "
        "largest exact effects are proved"
    )
    document = experiment_document(found).as_json()["verified"][0]
    assert document["search"]["proved"]
    whole = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text}'
    again = unpack_results(pack_results(Results((result,)), whole)).experiments[0]
    assert experiment_document(again).as_json()["verified"][0] == document


def test_plan_counts_all_cells_of_a_verification_search(tmp_path: Path) -> None:
    write_rows(tmp_path)
    text = experiment("e", *HEADS, "using gradient_input verify until top 3 95%")
    checked = check_file(text, tmp_path, shared(bare("gpt2")))
    exact = list(add_exact_cells(checked.experiments))[1]
    assert exact.n_there == 12
    assert exact.name == "e, verified at most"


ERRORS = {
    "more cells than there are": (
        (*HEADS, "using gradient_input verify top 9, random 5"),
        "E0608",
        "the experiment has 12 cells",
    ),
    "a value that is no effect": (
        (*HEADS[:3], "measure loss as raw", "using gradient verify top 3"),
        "E0608",
        "which isn't an effect",
    ),
    "no effect of the rule": (
        (*HEADS[:3], "measure loss as total", "using gradient_input verify top 3"),
        "E0608",
        "no measure is an effect that it compares with the runs of cells",
    ),
    "several variants": (
        (
            "prompts p",
            "from other, turned into clean",
            *HEADS[2:],
            "using gradient_input verify top 3",
        ),
        "E0608",
        "several models, prompts, runs",
    ),
    "generated text": (
        ("prompts p", "generate 2", *HEADS[1:], "using gradient_input verify top 3"),
        "E0608",
        "generated text",
    ),
    "an unknown choice": (
        (*HEADS, "using gradient_input verify best 3"),
        "E0203",
        "best",
    ),
    "a repeated choice": (
        (*HEADS, "using gradient_input verify top 3, top 5"),
        "E0207",
        "is given twice",
    ),
    "no cells": (
        (*HEADS, "using gradient_input verify top 0"),
        "E0207",
        "whole number of cells",
    ),
    "a search for more cells than there are": (
        (*HEADS, "using gradient_input verify until top 20 95%"),
        "E0608",
        "the experiment has 12 cells",
    ),
    "a confidence below one half": (
        (*HEADS, "using gradient_input verify until top 3 5%"),
        "E0207",
        "must be a confidence",
    ),
    "without an estimator": ((*HEADS, "using verify top 3"), "E0101", "name the estimator first"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_verification_is_rejected_before_the_run(case: str, tmp_path: Path) -> None:
    lines, code, text = ERRORS[case]
    result, found = try_file(experiment("e", *lines), tmp_path, bare("gpt2"))
    assert result is None
    errors = [each for each in found if each.severity == "error"]
    assert code in [each.code for each in errors]
    assert any(text in f"{each.message} {each.label_text} {each.help_text}" for each in errors)
