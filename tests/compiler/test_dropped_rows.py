"""Rows that a corruption doesn't alter are dropped only from experiments that use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.types import ResolvedExperiment

BLOCK = """mech 1
model lm = zoo("names")
prompts p {{
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park", "school", "store", "office", "station"]
  template "When {{io}} and {{s1 = s}} went to the {{place}}, {{s2 = s}} gave a ring to"
  answer " {{io}}"
  wrong " {{s}}"
  {corruptions}
  split 60%
}}
direction moving = mean_difference(moved of p.train, p.train) at resid_post layer 1 at last token
direction turned = mean_difference(reversed of p.train, p.train) at resid_post layer 1 at last token
"""
MOVED, REVERSED = 'corrupt moved { place = "shop" }', "corrupt reversed { s2 = io }"
RULE = "ablate z layer 1 head 1 at last token with zero"
MEASURE = "measure logit(answer) - logit(wrong) as delta"
ALL, CHANGED = 30, 25


def resolved(*lines: str, prompts: str = "p") -> list[ResolvedExperiment]:
    """Return the variants of one experiment; `moved` doesn't alter a sixth of the rows."""
    return together(lines, prompts=prompts)[0]


def together(
    *experiments: tuple[str, ...], prompts: str = "p", corruptions: str = f"{MOVED}\n  {REVERSED}"
) -> list[list[ResolvedExperiment]]:
    text = BLOCK.format(corruptions=corruptions)
    for number, lines in enumerate(experiments):
        body = "".join(f"  {line}\n" for line in (f"prompts {prompts}", *lines))
        text += f"experiment e{number} {{\n{body}}}\n"
    checked = check_source(Source(text, Path("file.mech")))
    assert not [d for d in checked.diagnostics if d.severity == "error"], checked.diagnostics
    return [
        [each for each in checked.experiments if each.name == f"e{number}"]
        for number in range(len(experiments))
    ]


def table(*lines: str, prompts: str = "p") -> PromptTable:
    first, *_ = resolved(*lines, prompts=prompts)
    return first.table


USES = {
    "source": ("from moved into clean", "patch z layer 1 head 1 at last token", MEASURE),
    "base": ("from clean into moved", "patch z layer 1 head 1 at last token", MEASURE),
    "metric": (RULE, "measure logit(answer) - logit(answer of moved) as delta"),
    "fill": ("ablate z layer 1 head 1 at last token with mean of moved", MEASURE),
    "keep": (RULE, "keep correct(answer of moved)", MEASURE),
    "run": (
        "run made { from moved into clean patch z layer 1 head 1 at last token }",
        "from made into clean",
        "patch z layer 1 head 2 at last token",
        MEASURE,
    ),
    "save": (RULE, MEASURE, 'save resid_post layer 1 of moved at last token to "a.safetensors"'),
    "observation": (
        "observe similarity resid_post layer 1 of clean with moved at last token as a",
    ),
    "variants": ("from moved, reversed into clean", "patch L1H1 at last token", MEASURE),
}
NEVER = {
    "rule": (RULE, MEASURE),
    "another run": ("from reversed into clean", "patch z layer 1 head 1 at last token", MEASURE),
    "mean": ("ablate z layer 1 head 1 at last token with mean", MEASURE),
    "resample": ("ablate z layer 1 head 1 at last token with resample", MEASURE),
    "observation": ("observe norm resid_post layer 1 at last token",),
    "direction of other rows": ("add 2 * moving to resid_post layer 1 at last token", MEASURE),
}


@pytest.mark.parametrize("key", USES)
def test_experiment_using_a_corruption_drops_unaltered_rows(key: str) -> None:
    for each in resolved(*USES[key]):
        assert len(each.table) == CHANGED
        assert "5 that `moved` leaves unchanged" in each.table.conventions["dropped"]


@pytest.mark.parametrize("key", NEVER)
def test_experiment_not_using_a_corruption_has_all_rows(key: str) -> None:
    found = table(*NEVER[key])
    assert len(found) == ALL
    assert "dropped" not in found.conventions
    (alone,) = together(NEVER["rule"], corruptions=f"{MOVED.replace('shop', 'bar')}\n  {REVERSED}")
    assert found.row_keys == alone[0].table.row_keys


def test_rows_stay_in_their_split_for_any_experiment() -> None:
    parts = {
        (key, part): set(table(*lines, prompts=f"p.{part}").row_ids)
        for key, lines in (("uses", USES["metric"]), ("never", NEVER["rule"]))
        for part in ("train", "test")
    }
    assert parts["uses", "train"] <= parts["never", "train"]
    assert parts["uses", "test"] <= parts["never", "test"]
    assert not parts["never", "train"] & parts["never", "test"]
    assert len(parts["never", "train"]) == 18


def test_fitted_direction_drops_only_rows_by_its_corruption() -> None:
    """The experiment and its other directions make no difference."""
    both = (
        "add 2 * moving to resid_post layer 1 at last token",
        "add 2 * turned to resid_post layer 1 at last-item token".replace("last-item", "io"),
        "measure logit(answer of moved) as delta",
    )
    for lines in (both, (both[0], MEASURE)):
        others = {key: len(rows) for key, rows in table(*lines).other_tables.items()}
        assert others["p.train changed by moved"] < 18
        assert others.get("p.train changed by reversed", 18) == 18
        assert "p.train" not in others


def test_experiments_without_dropped_rows_share_a_table() -> None:
    """A shared table allows shared forward passes. `reversed` alters every row."""
    plain, turned, moved, both = together(
        NEVER["rule"], NEVER["another run"], USES["metric"], USES["variants"]
    )
    assert plain[0].table is turned[0].table
    assert all(each.table is moved[0].table for each in both)


def test_limit_counts_rows_after_dropping() -> None:
    assert len(table(*USES["metric"], prompts="p limit 20")) == 20
    assert len(table(*NEVER["rule"], prompts="p limit 20")) == 20


def test_replaced_tokens_drop_unaltered_rows_only_if_used() -> None:
    corruptions = f"{MOVED.replace('place', 'replace place tokens with').replace(' =', '')}"
    corruptions += f"\n  {REVERSED}"
    uses, never = together(USES["metric"], NEVER["rule"], corruptions=corruptions)
    assert (len(uses[0].table), len(never[0].table)) == (CHANGED, ALL)


def test_values_equal_those_of_each_experiment_run_alone() -> None:
    """Each experiment ablates with the mean of the clean run over its own rows."""
    mean = NEVER["mean"]
    uses = (mean[0], "measure logit(answer) - logit(answer of moved) as delta", MEASURE)
    both = [uses, mean]
    texts = [
        f"experiment e{n} {{\n" + "".join(f"  {each}\n" for each in ("prompts p", *lines)) + "}\n"
        for n, lines in enumerate(both)
    ]
    head = BLOCK.format(corruptions=f"{MOVED}\n  {REVERSED}")
    found = mechdsl.run(head + "".join(texts), store=None)
    for number, text in enumerate(texts):
        (alone,) = mechdsl.run(head + text, store=None)
        together = found[f"e{number}"]
        assert together.row_ids == alone.row_ids
        for one, other in zip(together.measures, alone.measures, strict=True):
            np.testing.assert_allclose(one.patched, other.patched, atol=1e-5)
    few, every = (found[f"e{n}"].measures[-1].patched for n in range(2))
    places = [found["e1"].row_ids.index(row) for row in found["e0"].row_ids]
    assert np.abs(few - every[:, places]).max() > 1e-3
