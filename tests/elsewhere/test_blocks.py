"""`from A into B` where one side is another prompts block, against reference runs of prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.pipeline.options import RunOptions

from ..execute.support import DIFFERENCE, MODES, ROWS, experiment, prompts
from ..quick import in_turn
from .support import BLANK, by_prompt, layers, models, q, run, same

FAMILIES = ("gpt2", "llama", "gpt_neox")
EVERY = slice(None)


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES))
def test_patch_from_another_block_pairs_rows_by_number(
    folder: Path, family: str, mode: str
) -> None:
    """Row n of the other block is paired with row n of the sampled block, in any seeded order."""
    text = experiment(
        "e", "prompts p", "from q into clean", "patch resid_post layer * at subject token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models(family), MODES[mode])["e"]
    assert found.conventions["rows of q"] == "paired by row number with those of `p`"
    assert found.hashes["data of q"] == found.hashes["data"]
    sources, bases = [q(record) for record in ROWS], prompts()
    where = [(s.subject[-1:], b.subject[-1:]) for s, b in zip(sources, bases, strict=True)]
    expected = by_prompt(family, layers("resid_post"), sources, bases, where)
    same(found.measures[0], expected, EVERY)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_from_a_corruption_of_another_block_equals_reference(
    folder: Path, family: str
) -> None:
    text = experiment(
        "e", "prompts p limit 4", "from q.swapped into p.other",
        "patch z layer 1..2 head * at last token", DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models(family))["e"]
    sources, bases = [q(record, "swapped") for record in ROWS], prompts("other")
    from ..reference.points import Point

    cells = [[Point("z", layer, head)] for layer in (1, 2) for head in range(4)]
    where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
    same(found.measures[0], by_prompt(family, cells, sources, bases, where), EVERY)


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES))
def test_patch_into_a_block_of_one_row_equals_reference(
    folder: Path, family: str, mode: str
) -> None:
    """Answers come from the sampled block and are read after the other block's only prompt."""
    text = experiment(
        "e", "prompts p", "from clean into blank", "patch resid_pre layers 1..2 at cue token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models(family), MODES[mode])["e"]
    assert found.conventions["rows of blank"] == "its only row, paired with each row of `p`"
    from ..reference.points import Point

    sources, bases = prompts(), [BLANK] * len(ROWS)
    where = [((s.cue,), (BLANK.cue,)) for s in sources]
    cells = [[Point("resid_pre", 1), Point("resid_pre", 2)]]
    same(found.measures[0], by_prompt(family, cells, sources, bases, where), EVERY)


@pytest.mark.parametrize("family", FAMILIES)
def test_name_of_the_sampled_block_means_its_clean_run(folder: Path, family: str) -> None:
    """The rule reads from a different block."""
    body = ("patch mlp_out layer * at last token with blank", DIFFERENCE)
    text = experiment("e", "prompts p", "from p into other", *body)
    found = run(text, folder, models(family))["e"]
    assert (found.source, found.base) == ("clean", "other")
    bases = prompts("other")
    where = [((BLANK.last,), (b.last,)) for b in bases]
    expected = by_prompt(family, layers("mlp_out"), [BLANK] * len(ROWS), bases, where)
    same(found.measures[0], (expected[0], expected[1], found.measures[0].source[0]), EVERY)


def test_experiments_of_one_panel_share_runs_of_other_blocks(folder: Path) -> None:
    """Tables differ, but their runs are the same objects and are computed once."""
    text = "".join(
        experiment(
            name, "prompts p", f"from {source} into clean",
            "patch resid_post layer * at last token", DIFFERENCE,
        )
        for name, source in (("one", "q"), ("two", "blank"), ("three", "q"), ("four", "other"))
    )  # fmt: skip
    profiles = []
    options = RunOptions(on_profile=lambda plan, profile: profiles.append((plan, profile)))
    found = run(text, folder, models("gpt2"), options)
    plan = profiles[0][0]
    assert len(plan.panels) == 1
    assert set(plan.panels[0].runs) == {"clean", "q", "blank", "other"}
    tables = [each.experiment.table for each in plan.panels[0].experiments]
    assert tables[0].runs["q"] is tables[2].runs["q"]
    alone = run(text.split("experiment two")[0], folder, models("gpt2"))
    assert (found["one"].measures[0].patched == found["three"].measures[0].patched).all()
    assert abs(found["one"].measures[0].patched - alone["one"].measures[0].patched).max() < 1e-4
    assert profiles[0][1].distinct == 3 * 3 * len(ROWS)


def test_limit_keeps_pairing_by_the_original_row_number(folder: Path) -> None:
    text = experiment(
        "e", "prompts p limit 2", "from q into clean", "patch resid_post layer 1 at last token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2"))["e"]
    assert found.row_ids is not None
    assert len(found.row_ids) == 2
    sources, bases = [q(record) for record in ROWS], prompts()
    where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
    values = by_prompt("gpt2", layers("resid_post")[1:2], sources, bases, where)[0]
    error = abs(found.measures[0].patched - values[:, list(found.row_ids)]).max()
    assert error < 1e-4


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES, ["planned", "plain"]))
def test_patch_onto_a_position_of_another_block_equals_reference(
    folder: Path, family: str, mode: str
) -> None:
    """`onto` is resolved in the other block's text; the layer may differ too."""
    text = "".join(
        experiment(name, "prompts p", "from clean into blank", rule, DIFFERENCE)
        for name, rule in (
            ("items", "patch resid_post layer 1 at each item token onto cue token"),
            ("deeper", "patch resid_post layer 0 at last token onto cue token into layer 1"),
        )
    )
    found = run(text, folder, models(family), MODES[mode])
    from ..execute.support import difference
    from ..reference.points import Point, copied
    from .support import patched, unpatched

    labels = [cell.coords["position"] for cell in found["items"].cells]
    assert labels == [f"item {k}" for k in range(1, 6)]
    for n, record in enumerate(ROWS):
        source = prompts()[n]
        seen = unpatched(family, source)[1]
        for cell in range(len(found["items"].cells)):
            if cell >= len(source.items):  # the row drops out of the cell
                assert np.isnan(found["items"].measures[0].patched[cell, n])
                continue
            edits = copied([Point("resid_post", 1)], seen, [source.items[cell]], [BLANK.cue])
            value = difference(patched(family, BLANK, edits), record)
            assert abs(found["items"].measures[0].patched[cell, n] - value) < 1e-4
        deeper = {("resid_post", 1): seen["resid_post", 0]}
        edits = copied([Point("resid_post", 1)], deeper, [source.last], [BLANK.cue])
        value = difference(patched(family, BLANK, edits), record)
        assert abs(found["deeper"].measures[0].patched[0, n] - value) < 1e-4
