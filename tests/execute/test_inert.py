"""Cells that can't differ from the base run by structure are marked, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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


def marks(folder: Path, *lines: str, mode: str = "planned", family: str = "gpt2") -> list[bool]:
    """The marks of an experiment's cells; marked ones have no effect, the others have one."""
    text = experiment("e", "prompts p", *lines)
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
