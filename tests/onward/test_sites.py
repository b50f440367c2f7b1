"""`top 3 of E`, `best of E` and groups as sites, against explicitly named sites."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.pipeline.options import RunOptions

from ..quick import some
from ..run_source import run_source
from .support import HEAD, HERE, MODES, best_sites, checked, experiment, patched, run

MEASURE = "measure logit(answer) - logit(answer of fewer) as recovery"
MEASURE_DELTA = "measure logit(answer) as delta"
WHICH = experiment(
    "which",
    "from clean into fewer",
    "patch layer * head * at last token",
    MEASURE,
    prompts="fruit.train limit 8",
)


def patch(name: str, what: str) -> str:
    return experiment(name, "from clean into fewer", f"patch {what} at last token", MEASURE)


def test_heads_file_reports_the_selected_sites() -> None:
    found = run("", head=(HERE / "heads.mech").read_text(encoding="utf-8"))
    assert list(found) == ["together", "grouped", "which"]
    three = best_sites(found["which"], 3)
    records = {r["site"].removesuffix(".z"): r["mean"] for r in found["which"].records()}
    said = found["together"].conventions["top 3 of which"]
    listed = ", ".join(f"{site}.z ({records[site]:.3g})" for site in three)
    assert said.startswith(f"{listed}; by mean recovery of logit(answer)")
    assert found["grouped"].conventions["top 3 of which"] == said


@pytest.mark.parametrize(
    ("written", "count"),
    [("top 3 of which", 3), ("best of which", 1), ("top 25% of which", 4), ("top 1% of which", 1)],
)
def test_top_and_best_sites_equal_named_sites(written: str, count: int) -> None:
    picked = run(patch("picked", written) + WHICH)
    sites = best_sites(picked["which"], count)
    by_hand = run(f"\ngroup hand = {', '.join(sites)}\n" + patch("named", "hand"))
    assert np.array_equal(patched(picked["picked"]), patched(by_hand["named"]))
    one = picked["picked"].cells[0].site
    assert one == (f"{sites[0]}.z" if count == 1 else written)


def test_group_of_named_and_ranked_sites_equals_named_sites() -> None:
    text = "\nparam n = 2\ngroup chosen = L0H1, top n of which\n" + WHICH + patch("a", "chosen")
    found = run(text)
    sites = ["L0H1", *best_sites(found["which"], 2)]
    by_hand = run(f"\ngroup hand = {', '.join(sites)}\n" + patch("b", "hand"))
    assert np.array_equal(patched(found["a"]), patched(by_hand["b"]))


def test_percentage_of_sites_may_be_a_parameter() -> None:
    found = run("\nparam share = 25%\n" + WHICH + patch("a", "top share of which"))
    same = run(WHICH + patch("a", "top 25% of which"))
    assert np.array_equal(patched(found["a"]), patched(same["a"]))


def test_best_site_is_ranked_by_the_signed_mean() -> None:
    which = experiment(
        "which",
        "ablate layer * head * at last token with zero",
        "measure logit(answer) as delta",
        prompts="fruit.train limit 8",
    )
    found = run(
        which
        + experiment(
            "a", "ablate best of which at last token with zero", "measure logit(answer) as delta"
        )
    )
    means = {r["site"]: r["mean"] for r in found["which"].records()}
    assert max(abs(m) for m in means.values()) > max(means.values())
    assert found["a"].cells[0].site == max(means, key=lambda site: means[site])


def test_site_is_ranked_by_its_best_position() -> None:
    which = experiment(
        "which",
        "ablate resid_post layer * at {first-item token}, last token with zero",
        "measure logit(answer) as delta",
        prompts="fruit.train limit 8",
    ).replace("{first-item token}", "first-item token")
    found = run(
        which
        + experiment(
            "a", "ablate top 2 of which at last token with zero", "measure logit(answer) as delta"
        )
    )
    best: dict[str, float] = {}
    for record in found["which"].records():
        best[record["site"]] = max(record["mean"], best.get(record["site"], -np.inf))
    two = sorted(best, key=lambda site: -best[site])[:2]
    said = found["a"].conventions["top 2 of which"]
    assert said.startswith(", ".join(f"{site} ({best[site]:.3g})" for site in two))
    assert said.endswith("each of the 4 sites by the best of its cells")


@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
def test_growing_sets_of_top_sites_equal_separate_experiments(mode: str) -> None:
    curve = experiment(
        "curve",
        "from clean into fewer",
        "for k in [0, 1, 2, 16] {",
        "  patch top k of which at last token",
        "}",
        MEASURE,
        "measure prob(answer) as raw",
    )
    found = run(curve + WHICH, without=MODES[mode])
    rows = patched(found["curve"])
    assert np.array_equal(rows[0], found["curve"].measures[0].base[0])
    assert next(cell.site for cell in found["curve"].cells) == "nothing"
    for row, count in ((1, 1), (2, 2), (3, 16)):
        same = run(patch("same", f"top {count} of which") + WHICH, without=MODES[mode])
        assert np.allclose(rows[row], patched(same["same"])[0], atol=1e-4)
    # All 16 heads at the last token aren't the whole residual stream, so this isn't the source run.
    assert [cell.coords["k"] for cell in found["curve"].cells] == [0, 1, 2, 16]


def test_top_0_sites_equal_the_base_run() -> None:
    found = run(patch("a", "top 0 of which") + WHICH)
    assert np.array_equal(patched(found["a"]), found["a"].measures[0].base)


def test_ranking_on_overlapping_rows_gives_a_warning() -> None:
    same = WHICH.replace("fruit.train limit 8", "fruit.test limit 6")
    found = list(checked(patch("a", "top 3 of which") + same).diagnostics)
    (warning,) = (d for d in found if d.code == "W0721")
    assert warning.span is not None
    assert warning.span.text == "top 3 of which"
    shown = warning.label_text
    ids = [set(e.table.row_ids) for e in checked(patch("a", "best of which") + same).experiments]
    assert shown == f"{len(ids[0] & ids[1])} of its 8 rows are also rows of `which`"
    assert "W0721" not in {d.code for d in checked(patch("a", "best of which") + WHICH).diagnostics}


@pytest.mark.parametrize("amount", ["3", "n"])
def test_direction_at_top_heads_equals_named_heads(amount: str) -> None:
    def steered(name: str, group: str) -> str:
        return (
            f"\nparam n = 3\ngroup some = {group}\n"
            "direction d = mean(fruit) at some at last token\n"
            + experiment(name, "add 2 * d to resid_post layer 2 at last token", MEASURE_DELTA)
        )

    picked = run(steered("a", f"top {amount} of which") + WHICH)  # it comes first in the file
    sites = best_sites(picked["which"], 3)
    by_hand = run(steered("a", ", ".join(sites)))
    assert np.array_equal(patched(picked["a"]), patched(by_hand["a"]))
    assert not np.array_equal(picked["a"].measures[0].patched, picked["a"].measures[0].base)


def test_warning_about_the_sign_does_not_stop_the_run() -> None:
    rules = ("ablate layer * head * at last token with zero", MEASURE_DELTA)
    falls = experiment("which", *rules, prompts="fruit.train limit 8")
    text = "\ndirection d = mean(fruit) at top 3 of which at last token\n"
    steered = experiment("a", "add d to resid_post layer 2 at last token", MEASURE_DELTA)
    result, found = run_source(Source(HEAD + text + steered + falls), RunOptions())
    assert "W0751" in {each.code for each in found}
    assert result is not None
    assert [each.name for each in result.experiments] == ["a", "which"]


def test_warning_about_the_sign_with_several_numbers_is_reported_once() -> None:
    falls = experiment(
        "which", "ablate layer * head * at last token with zero", MEASURE_DELTA, prompts="fruit"
    )
    rules = "for n in [1, 2, 3] { ablate top n of which at last token with zero }"
    result, found = run_source(
        Source(HEAD + experiment("a", rules, MEASURE_DELTA, prompts="fruit") + falls), RunOptions()
    )
    assert result is not None
    (warning,) = [each for each in found if each.code == "W0751"]
    by_sign, by_size = (re.findall(r"L\dH\d", each) for each in warning.label_text.split(";"))
    assert by_sign
    assert by_size
    assert not {*by_sign} & {*by_size}


def test_warning_about_the_sign_of_observed_values_does_not_propose_a_measure() -> None:
    look = "observe direct_logit layer * head * toward answer - answer of fewer at last token"
    ranked = experiment("which", look, prompts="fruit")
    patched = experiment("a", "ablate top 8 of which at last token with zero", MEASURE_DELTA)
    _, found = run_source(Source(HEAD + ranked + patched), RunOptions())
    (warning,) = [each for each in found if each.code == "W0751"]
    assert "toward wrong - answer" in warning.help_text
    assert "measure" not in warning.help_text


def test_direction_at_heads_of_an_unknown_experiment_is_rejected() -> None:
    text = "\ngroup some = top 3 of whihc\ndirection d = mean(fruit) at some at last token\n"
    text += experiment("a", "add d to resid_post layer 2 at last token", MEASURE_DELTA) + WHICH
    found = [each for each in checked(text).diagnostics if each.severity == "error"]
    assert [each.code for each in found] == ["E0201"]


def test_definitions_used_by_directions_and_lists_are_not_unused() -> None:
    text = (
        "\ngroup some = L0H1\ndirection d = mean(fruit) at some at last token\n"
        'prompts pool { x in ["red", "blue"] template "{x}" }\n'
        'prompts drawn { n in 1..2 y = list("{x}", 2, from: pool) template "{y} {n}" }\n'
        + experiment("a", "add d to resid_post layer 2 at last token", MEASURE_DELTA)
        + experiment("b", "measure entropy as raw", prompts="drawn")
    )
    unused = [each for each in checked(text).diagnostics if each.code == "W0730"]
    assert [each.message for each in unused if "`pool`" in each.message] == []
    assert [each.message for each in unused if "`some`" in each.message] == []


@pytest.mark.parametrize(
    "line",
    [
        "basis t = pca(fruit, dims: 1) at resid_post layer 0..k at last token",
        "basis t = pca(fruit, dims: 1) at resid_post layer 1 at token k",
        "group t = z layer k head 0",
    ],
)
def test_parameters_in_the_sites_of_definitions_are_not_unused(line: str) -> None:
    text = f"\nparam k = 1\n{line}\n" + experiment("a", "measure entropy as raw")
    unused = [each for each in checked(text).diagnostics if each.code == "W0730"]
    assert [each.message for each in unused if "`k`" in each.message] == []


def test_warning_about_the_sign_of_picked_tokens_is_reported_once() -> None:
    """Cells with different layers and numbers pick different tokens by size."""
    ranked = experiment(
        "which",
        "ablate resid_post layer 0..2 at each item token with mean",
        MEASURE_DELTA,
        prompts="fruit",
    )
    rules = (
        "for l in 0..2 { for k in [1, 2, 3] { ablate resid_post layer l at top k of "
        "which(layer: l) tokens with zero } }"
    )
    _, found = run_source(
        Source(HEAD + ranked + experiment("a", rules, MEASURE_DELTA, prompts="fruit")), RunOptions()
    )
    assert len([each for each in found if each.code == "W0751"]) == 1
