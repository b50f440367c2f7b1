"""Cells that can't differ from the base run by structure are marked, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.vocab.metrics import EFFECTS

from ..quick import in_turn
from ..reference.forward import Write
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    agree,
    bare,
    difference,
    differences,
    experiment,
    patched,
    prompt,
    run_file,
    unpatched,
    write_rows,
)

AT_CUE = "measure logit(answer) - logit(wrong) at cue token as delta"


def marks(
    folder: Path, *lines: str, mode: str = "planned", family: str = "gpt2", before: str = ""
) -> list[bool]:
    """The marks of an experiment's cells; marked ones have no effect, the others have one.

    before: statements of the file before the experiment.
    """
    text = before + experiment("e", "prompts p", *lines)
    options = MODES[mode]
    found = run_file(text, folder, bare(family), options)["e"]
    measure = found.measures[0]
    effects = np.abs(measure.patched - measure.base).max(axis=1)
    # Without the pass, inert rows run like others and differ by rounding.
    near = 1e-5 if "inert" in options.without else 0
    assert (effects[measure.inert] <= near).all()
    assert (effects[~measure.inert] > 1e-3).all()
    statistics = found.statistics[0]
    assert (np.abs(statistics.mean[measure.inert]) <= near).all(), "structure says zero"
    assert np.isnan(statistics.p_corrected[measure.inert]).all(), "they are out of the correction"
    return measure.inert.tolist()


@pytest.mark.parametrize("mode", list(MODES))
def test_patch_in_a_common_prefix_is_inert(folder: Path, mode: str) -> None:
    at = "at first token, last-item token, subject token, last token"
    lines = ("from other into clean", f"patch resid_pre layer 1..2 {at}", DIFFERENCE)
    assert marks(folder, *lines, mode=mode) == [True, True, False, False] * 2


def test_cell_with_one_differing_row_is_not_inert(folder: Path) -> None:
    at = "at first token of subject, subject token - 1"
    lines = ("from other into clean", f"patch resid_pre layer 1 {at}", DIFFERENCE)
    assert marks(folder, *lines) == [False, False]


def test_patch_of_a_prefix_at_other_positions_is_not_inert(folder: Path) -> None:
    """`last-item token` has other positions in the two runs, so that the values differ."""
    lines = ("from longer into clean", "patch resid_pre layer 1 at last-item token", DIFFERENCE)
    assert marks(folder, *lines) == [False]


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize(
    ("site", "of", "to"), [("resid_post", 0, 1), ("resid_pre", 1, 0), ("resid_pre", 1, 2)]
)
def test_patch_of_a_prefix_into_another_layer_is_not_inert(
    folder: Path, site: str, of: int, to: int, mode: str
) -> None:
    """Source and base share the token, but the vectors of two layers differ."""
    rule = f"patch {site} layer {of} at first token into layer {to}"
    text = experiment("e", "prompts p", "from other into clean", rule, DIFFERENCE)
    found = run_file(text, folder, bare("gpt2"), MODES[mode])["e"].measures[0]
    expected = []
    for record in ROWS:
        vector = unpatched("gpt2", prompt(record, "other"))[1][site, of][1, 0]
        writes = [Write(site, to, vector, 1, 0)]
        expected.append(difference(patched("gpt2", prompt(record), writes), record))
    agree(found, np.array([expected]), differences("gpt2", ROWS))
    assert not found.inert.any()


def test_write_after_the_measured_token_is_inert(folder: Path) -> None:
    rule = "patch attn_out layer 1 at subject token, cue token, last token"
    assert marks(folder, "from longer into clean", rule, AT_CUE) == [False, False, True]


def test_write_before_a_later_measured_token_is_not_inert(folder: Path) -> None:
    rule = "patch attn_out layer 1 at cue token, last token"
    lines = ("from longer into clean", rule, AT_CUE, DIFFERENCE)
    text = experiment("e", "prompts p", *lines)
    found = run_file(text, folder, bare("gpt2"))["e"]
    assert not found.measures[1].inert.any()


def test_ablation_in_a_common_prefix_is_not_inert(folder: Path) -> None:
    rule = "ablate resid_pre layer 1 at first token, last token with zero"
    assert marks(folder, rule, DIFFERENCE) == [False, False]


def test_cell_with_one_effective_rule_is_not_inert(folder: Path) -> None:
    rules = "patch resid_pre layer 1 at first token  patch attn_out layer * at last token"
    assert marks(folder, "from other into clean", rules, DIFFERENCE) == [False] * 3


@pytest.mark.parametrize(
    ("site", "marked"),
    [
        ("k layer 2 head 0", False),
        ("v layer 2 heads *", False),
        ("attn_norm layer 2", False),
        ("resid_pre layer 2", False),
        ("q layer 2 heads *", True),
        ("z layer 2 heads *", True),
        ("mlp_out layer 2", True),
        ("resid_post layer 2", True),
        ("resid_post layer 1", False),
        ("final_norm", True),
    ],
)
def test_write_after_the_last_attention_before_the_measured_token_is_inert(
    folder: Path, site: str, marked: bool
) -> None:
    rule = f"patch {site} at cue token, last token"
    assert marks(folder, "from longer into clean", rule, DIFFERENCE)[0] is marked


@pytest.mark.parametrize(
    ("source", "site", "marked"),
    [
        ("longer", "k_rot layer 2 heads *", False),
        ("longer", "q_rot layer 2 heads *", True),
        ("other", "k_rot layer 0 heads *", True),
        ("other", "q_rot layer 0 heads *", True),
        ("other", "q_rot layer 1 heads *", False),
    ],
)
def test_rotated_queries_and_keys_are_inert_like_queries_and_keys(
    folder: Path, source: str, site: str, marked: bool
) -> None:
    lines = (f"from {source} into clean", f"patch {site} at cue token", DIFFERENCE)
    assert marks(folder, *lines, family="llama") == [marked]


@pytest.mark.parametrize(("family", "mode"), in_turn(["gpt2", "llama"], ["planned", "plain"]))
@pytest.mark.parametrize(
    ("site", "marked"),
    [
        ("embed", True),
        ("resid_pre layer 0", True),
        ("attn_norm layer 0", True),
        ("q layer 0 heads *", True),
        ("k layer 0 head 0", True),
        ("v layer 0 heads *", True),
        ("z layer 0 heads *", False),
        ("resid_mid layer 0", False),
        ("k layer 1 heads *", False),
        ("resid_pre layer 1", False),
        ("resid_pre layers 0..1", False),
    ],
)
def test_patch_of_an_equal_token_before_the_first_attention_is_inert(
    folder: Path, site: str, marked: bool, family: str, mode: str
) -> None:
    """After the subject, which differs, the cue is the same token at the same position."""
    lines = ("from other into clean", f"patch {site} at cue token", DIFFERENCE)
    assert marks(folder, *lines, mode=mode, family=family) == [marked]


def test_patch_of_an_equal_token_from_another_position_is_not_inert(folder: Path) -> None:
    """`w41` precedes the cue in both runs, but at different positions."""
    lines = ("from longer into clean", 'patch k layer 0 heads * at "w41" token', DIFFERENCE)
    assert marks(folder, *lines) == [False]


def test_inert_row_of_a_cell_that_is_not_inert_equals_the_base_run(folder: Path) -> None:
    """The first prompt has the same items in both runs, and differs after them."""
    lines = ("from longer into clean", "patch resid_post layer 1 at last-item token", DIFFERENCE)
    text = experiment("e", "prompts p", *lines)
    rows = [{**ROWS[0], "more": ROWS[0]["words"]}, *ROWS[1:]]
    write_rows(folder, rows)
    found = run_file(text, folder, bare("gpt2"))["e"].measures[0]
    assert not found.inert.any()
    effects = np.abs(found.patched - found.base)[0]
    assert effects[0] == 0
    assert (effects[1:] > 1e-3).all()


# --- one of several measures ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(MODES))
def test_measure_of_a_later_token_keeps_the_marks_of_other_measures(
    folder: Path, mode: str
) -> None:
    rule = "patch attn_out layer 1 at subject token, cue token, last token"
    text = "".join(
        experiment(name, "prompts p", "from longer into clean", rule, *measures)
        for name, measures in {"alone": [AT_CUE], "both": [AT_CUE, DIFFERENCE]}.items()
    )
    found = run_file(text, folder, bare("gpt2"), MODES[mode])
    (alone,), both = found["alone"].measures, found["both"].measures
    assert alone.inert.tolist() == both[0].inert.tolist() == [False, False, True]
    assert both[1].inert.tolist() == [False, False, False]
    np.testing.assert_allclose(both[0].patched, alone.patched, atol=1e-4)
    assert (both[0].patched[2] == both[0].base[-1]).all(), "without rounding"
    assert (np.abs(both[1].patched[2] - both[1].base[-1]) > 1e-3).any()


def test_measure_of_a_prompt_does_not_depend_on_rules_in_replies(folder: Path) -> None:
    lines = (
        "generate 2",
        "scale attn_out layer 1 at cue token, last token by 3",
        "measure logit(answer) at cue token as delta",
        "measure length as delta",
    )
    text = experiment("e", "prompts p", *lines)
    measures = run_file(text, folder, bare("gpt2"))["e"].measures
    assert [data.inert.tolist() for data in measures] == [[False, True], [False, False]]


# --- edges of circuits ----------------------------------------------------------------------------

PLACED = """circuit c = L0H1 -> L1H2.v at cue token, L0H2 -> L2H1.q,
  L1H0 -> logits, L1H2 -> logits, L2H1 -> logits
"""
HEADS = "layers * heads *"
AT_THREE = "at subject token, cue token, last token with zero"


@pytest.mark.parametrize(
    ("edges", "rule", "marked"),
    [
        ("L0H1 -> L1H2.v at cue token", f"ablate c {AT_THREE}", [True, False, True]),
        ("L0H1 -> L1H2.v at cue token", "ablate c at {cue token, last token} with zero", [False]),
        ("L0H2 -> L2H1.q", f"ablate c {AT_THREE}", [True, True, False]),
        ("L0H2 -> L2H1.k", f"ablate c {AT_THREE}", [False, False, False]),
        ("L0H2 -> L2H1.v", f"ablate c {AT_THREE}", [False, False, False]),
        ("L0H2 -> L1H1.q", f"ablate c {AT_THREE}", [False, False, False]),
        ("L1H2 -> L1.mlp", f"ablate c {AT_THREE}", [False, False, False]),
        ("L1H2 -> L2.mlp, L0H2 -> logits", f"ablate c {AT_THREE}", [True, True, False]),
        ("embed -> L2.mlp, embed -> L2H0.k", f"ablate c {AT_THREE}", [False, False, False]),
        (
            "L0H1 -> L1H2.v at cue token, L1H0 -> logits at last token",
            f"ablate c without each edge {AT_THREE}",
            [True, True, False, True, False, True],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["planned", "plain"])
def test_ablation_of_edges_that_no_measured_token_depends_on_is_inert(
    folder: Path, edges: str, rule: str, marked: list[bool], mode: str
) -> None:
    before = f"circuit c = {edges}\n"
    assert marks(folder, rule, DIFFERENCE, mode=mode, before=before) == marked


def test_query_read_at_its_token_is_not_inert(folder: Path) -> None:
    rule = "ablate c at cue token, last token with zero"
    assert marks(folder, rule, AT_CUE, before="circuit c = L0H2 -> L2H1.q\n") == [False, True]


@pytest.mark.parametrize(
    ("effect", "rule", "marked", "values"),
    [
        ("completeness", f"ablate c {AT_THREE}", [True, False, False], {0: 1}),
        (
            "minimality",
            "ablate all but c without each edge at cue token, last token with zero",
            [False, True, *[True, False] * 4],
            dict.fromkeys((1, 2, 4, 6, 8), 0),
        ),
        (
            "faithfulness",
            f"for n in 0..2 {{ ablate {HEADS} except top n of pick at last token with zero }}",
            [True, False, False],
            {0: 0},
        ),
    ],
)
@pytest.mark.parametrize("mode", ["planned", "plain"])
def test_cell_that_ablates_like_a_baseline_of_a_circuit_is_inert(
    folder: Path, effect: str, rule: str, marked: list[bool], values: dict[int, float], mode: str
) -> None:
    text = PLACED + experiment(
        "pick", "prompts p", "ablate layer * head * at cue token with zero", DIFFERENCE
    )
    text += experiment("e", "prompts p", rule, DIFFERENCE.replace("delta", effect))
    found = run_file(text, folder, bare("gpt2"), MODES[mode])["e"]
    assert found.measures[0].inert.tolist() == marked
    data = found.measures[0]
    means = (run.mean(1) for run in (data.patched, data.base, data.source) if run is not None)
    shares = EFFECTS[effect].of_means(*means)
    assert shares[data.inert] == pytest.approx(list(values.values()), abs=1e-4)
    assert (np.abs(shares[~data.inert]) > 1e-5).all()
    assert np.isnan(found.statistics[0].p_corrected[data.inert]).all()
