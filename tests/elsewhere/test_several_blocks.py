"""Several prompts blocks in one experiment, each with its rows, base values and source values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.results.assembly.combination import PromptSetResult, merge_prompt_sets, merge_variants
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import (
    MODES,
    PROMPTS,
    ROWS,
    Array,
    Prompt,
    Record,
    agree,
    difference,
    experiment,
    prompt,
    token,
    write_rows,
)
from ..quick import in_turn
from ..reference.points import Point, copied
from ..results import synthetic
from .support import models, patched, run, unpatched

FAMILIES = ("gpt2", "llama", "gpt_neox")
DIFFERENCE = "measure logit(answer) - logit(wrong) as delta"
SECOND = """
prompts r {
  rows "data.jsonl"
  where a != "w20"
  xs = list(item, from: words, sep: " ")
  template "w7 {cue2} {subject} w9 {xs}"
  answer " {b}"
  wrong " {a}"
  corrupt other { subject = alt }
}
"""
OF_SECOND = [record for record in ROWS if record["a"] != "w20"]


def second(record: Record, run: str = "clean") -> Prompt:
    """A row of `r` with manually counted positions."""
    subject = record["alt" if run == "other" else "subject"].split()
    words = ("w7", record["cue2"], *subject, "w9", *record["words"])
    start = 4 + len(subject)
    items = tuple(range(start, start + len(record["words"])))
    return Prompt(words, items, tuple(range(3, 3 + len(subject))), 2)


def block_reference(family: str, of: str, name: str = "m") -> tuple[Array, Array, Array]:
    """Reference ([cell, prompt] patched, [prompt] base, [prompt] source) of one block: the residual
    stream at the subject's last token, for each layer, one prompt at a time."""
    make, rows, sign = (prompt, ROWS, 1) if of == "p" else (second, OF_SECOND, -1)
    found, base, source = np.zeros((3, len(rows))), np.zeros(len(rows)), np.zeros(len(rows))
    for n, record in enumerate(rows):
        clean, other = make(record), make(record, "other")
        logits, seen = unpatched(family, clean, name)
        source[n] = sign * difference(logits, record)
        base[n] = sign * difference(unpatched(family, other, name)[0], record)
        for layer in range(3):
            at = (clean.subject[-1],), (other.subject[-1],)
            edits = copied([Point("resid_post", layer)], seen, *at)
            found[layer, n] = sign * difference(patched(family, other, edits, name), record)
    return found, base, source


def text_of(*lines: str, blocks: str = "p, r") -> str:
    return experiment(
        "e", f"prompts {blocks}", "from clean into other",
        "patch resid_post layer * at last token of subject", DIFFERENCE, *lines,
    )  # fmt: skip


def holds(found: ExperimentResult, cells: slice, expected: tuple[Array, Array, Array]) -> None:
    """Check that the cells of a block have only its rows, with reference values."""
    values, base, source = expected
    data = found.measures[0]
    there = ~np.isnan(data.patched[cells])
    assert (there == there[:1]).all()
    assert there[0].sum() == values.shape[1]
    assert (found.statistics[0].n[cells] == values.shape[1]).all()
    own = there[0]
    part = replace(
        data,
        patched=data.patched[cells][:, own],
        base=np.broadcast_to(data.base, data.patched.shape)[cells][:, own],
    )
    agree(part, values, base)
    assert data.source is not None
    ends = np.broadcast_to(data.source, data.patched.shape)[cells][:, own]
    np.testing.assert_allclose(ends, np.broadcast_to(source, ends.shape), atol=1e-4)


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES, ["planned", "plain"]))
def test_cells_of_each_block_equal_reference(folder: Path, family: str, mode: str) -> None:
    found = run(text_of(), folder, models(family), MODES[mode], prompts=PROMPTS + SECOND)["e"]
    assert found.axes == ("prompts", "layer")
    assert [c.coords["prompts"] for c in found.cells] == ["p"] * 3 + ["r"] * 3
    assert found.prompts == len(ROWS) + len(OF_SECOND)
    assert len(set(found.row_ids or ())) == found.prompts
    for n, of in enumerate("pr"):
        expected = block_reference(family, of)
        assert abs(expected[2] - expected[1]).max() > 0.1
        holds(found, slice(3 * n, 3 * n + 3), expected)
    shown = found.runs
    assert set(shown) == {"clean (p)", "clean (r)", "other (p)", "other (r)"}
    np.testing.assert_allclose(np.sort(shown["clean (r)"]["logit(answer) - logit(wrong)"])[:3],
                               np.sort(block_reference(family, "r")[2]), atol=1e-4)  # fmt: skip


def test_accuracy_of_each_block_equals_reference(folder: Path) -> None:
    """A row is correct if its block's answer is the most likely token."""
    lines = ("expect accuracy(clean, prompts: p) >= 0 on mean",
             "expect accuracy(other, prompts: r) >= 0 on mean")  # fmt: skip
    found = run(text_of(*lines), folder, models("llama"), prompts=PROMPTS + SECOND)["e"]
    for verdict, of, which in zip(found.outcomes, "pr", ("clean", "other"), strict=True):
        make, rows, key = (prompt, ROWS, "a") if of == "p" else (second, OF_SECOND, "b")
        right = [
            int(unpatched("llama", make(row, which))[0][-1].argmax()) == token(row[key])
            for row in rows
        ]
        assert verdict.value == pytest.approx(np.mean(right))
        assert verdict.effective_n == len(rows)


def test_each_block_has_cells_for_each_model(folder: Path) -> None:
    text = text_of().replace("model m", "model m, tuned")
    both = models("llama", "m", "tuned")
    found = run(text, folder, both, prompts=PROMPTS + SECOND)["e"]
    assert found.axes == ("prompts", "model", "layer")
    n = 0
    for of in "pr":
        for name in ("m", "tuned"):
            holds(found, slice(n, n + 3), block_reference("llama", of, name))
            n += 3


def test_statistics_of_a_block_equal_those_of_a_separate_experiment(folder: Path) -> None:
    """Only the correction for multiple comparisons is over all cells."""
    blocks = PROMPTS + SECOND
    both = run(text_of(), folder, models("gpt2"), prompts=blocks)["e"]
    start = 0
    for name in "pr":
        alone = run(text_of(blocks=name), folder, models("gpt2"), prompts=blocks)["e"]
        cells = slice(start, start + 3)
        own, of = both.statistics[0], alone.statistics[0]
        for field in ("mean", "n", "units", "base_mean", "source_mean", "p"):
            np.testing.assert_allclose(getattr(own, field)[cells], getattr(of, field), rtol=1e-9)
        start += 3
    assert np.count_nonzero(~both.measures[0].inert) == 4  # a patch after the last layer is inert


def test_parts_and_limits_of_one_block_are_separate_cells(folder: Path) -> None:
    blocks = PROMPTS.replace('rows "data.jsonl"', 'rows "data.jsonl"\n  split 50%')
    text = text_of(blocks="p.train, p.test, p limit 3")
    found = run(text, folder, models("gpt2"), prompts=blocks)["e"]
    assert [c.coords["prompts"] for c in found.cells][::3] == ["p.train", "p.test", "p"]
    there = ~np.isnan(found.measures[0].patched)
    assert there[::3].sum(1).tolist() == [2, 2, 3]
    assert not (there[0] & there[3]).any()
    whole = block_reference("gpt2", "p")
    for cell, own in enumerate(there):
        rows = np.array(found.row_ids)[own]
        values = found.measures[0].patched[cell, own]
        np.testing.assert_allclose(values, whole[0][cell % 3][rows], atol=1e-3)


def test_best_of_another_experiment_is_selected_per_block(folder: Path) -> None:
    first = text_of()
    then = experiment(
        "then", "prompts r, p", "from clean into other",
        "patch best of e at last token of subject", DIFFERENCE,
    )  # fmt: skip
    found = run(first + then, folder, models("llama"), prompts=PROMPTS + SECOND)
    means, cells = found["e"].statistics[0].mean, found["e"].cells
    best = {
        of: cells[at + int(np.argmax(means[at : at + 3]))].site for of, at in (("p", 0), ("r", 3))
    }
    assert [(c.coords["prompts"], c.site) for c in found["then"].cells] == [
        ("r", best["r"]),
        ("p", best["p"]),
    ]


# --- statistics -----------------------------------------------------------------------------------


def made(rows: int, shift: float, seed: int, block: str) -> ExperimentResult:
    """A result of two cells with values around 0 and around a shift."""
    random = np.random.default_rng(seed)
    found = synthetic.heads(prompts=rows, seed=seed)
    patched = random.normal(0, 1, (2, rows)) + np.array([[0.0], [shift]])
    data = synthetic.measure(patched, np.zeros(rows))
    cells = tuple(replace(c, coords={"prompts": block, **c.coords}) for c in found.cells[:2])
    return replace(
        found, measures=(data,), cells=cells, axes=("prompts", *found.axes), source=None,
        base="clean",
        row_ids=tuple(range(rows)), row_keys=tuple(range(10_000 * seed, 10_000 * seed + rows)),
        runs={}, accuracy={},
    )  # fmt: skip


def both(left: ExperimentResult, right: ExperimentResult, *expects: str) -> ExperimentResult:
    parts = [
        PromptSetResult((("prompts", name),), name, each)
        for name, each in (("a", left), ("b", right))
    ]
    return synthetic.finished(merge_variants(merge_prompt_sets(parts)), *expects, resamples=4000)


def test_intervals_of_a_block_equal_those_of_a_separate_experiment() -> None:
    left, right = made(12, 1.0, 1, "a"), made(90, 0.5, 2, "b")
    found = both(left, right)
    for block, cells in ((left, slice(0, 2)), (right, slice(2, 4))):
        alone = synthetic.finished(block, resamples=4000).statistics[0]
        width = alone.high - alone.low
        for side in ("low", "high"):
            own = getattr(found.statistics[0], side)[cells]
            assert (abs(own - getattr(alone, side)) < 0.06 * width).all()
    assert found.statistics[0].units.tolist() == [12, 12, 90, 90]


def test_difference_between_blocks_treats_rows_as_independent() -> None:
    """Rows with equal numbers and correlated values aren't paired."""
    left, right = made(40, 1.0, 1, "a"), made(40, 0.4, 2, "b")
    own = left.measures[0]
    moved = replace(own, patched=own.patched - 0.6 + np.linspace(-0.01, 0.01, 40))
    right = replace(right, measures=(moved,))
    line = 'delta(head 1, prompts: "a") - delta(head 1, prompts: "b") > 0'
    (verdict,) = both(left, right, line).outcomes
    sizes = [each.measures[0].patched[1].std(ddof=1) / np.sqrt(40) for each in (left, right)]
    error = float(np.hypot(*sizes))
    assert verdict.value == pytest.approx(0.6, abs=1e-6)
    assert verdict.low is not None
    assert verdict.high is not None
    half = (verdict.high - verdict.low) / 2
    assert half == pytest.approx(2.02 * error, rel=0.12)
    assert verdict.effective_n == 40
    assert "not paired: rows of `a`, `b`" in (verdict.reason or "")
    (alone,) = both(left, right, 'delta(head 1, prompts: "a") > 0').outcomes
    assert "paired" not in (alone.reason or "")


def test_equal_rows_of_two_blocks_are_one_sampling_unit() -> None:
    left, right = made(20, 1.0, 1, "a"), made(20, 0.4, 2, "b")
    right = replace(right, row_keys=left.row_keys)
    found = both(left, right)
    assert found.sampling.units().count == 20
    assert found.statistics[0].n.tolist() == [20] * 4


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        ("prompts p, r\n from clean into longer", "E0201", "`r`"),
        ("prompts p, p\n from clean into other", "E0207", "twice"),
        ("prompts p, nowhere\n from clean into other", "E0201", "nowhere"),
        ("prompts p.train, r\n from clean into other", "E0201", "p.train"),
    ],
)
def test_invalid_list_of_blocks_is_rejected(folder: Path, lines: str, code: str, said: str) -> None:
    found = checked(lines, folder)
    assert [d.code for d in found] == [code]
    assert said in render_full(found)


def checked(lines: str, folder: Path, *more: str) -> list[Diagnostic]:
    text = experiment("e", lines, "patch resid_post layer 0 at last token", DIFFERENCE, *more)
    whole = f'mech 1\nmodel m = zoo("counting")\n{PROMPTS}{SECOND}{text}'
    write_rows(folder)
    every = check_source(Source(whole, folder / "file.mech")).diagnostics
    return [
        d
        for d in every
        if d.code in ("E0108", "E0201", "E0202", "E0207", "E0606", "E0612", "E0203")
    ]


def test_statements_about_one_block_are_rejected_for_several(folder: Path) -> None:
    line = "prompts p, r\n from clean into other"
    assert [d.code for d in checked(line, folder, "expect accuracy(clean) > 0.5")] == ["E0606"]
    assert checked(line, folder, "expect accuracy(clean, prompts: r) > 0.5") == []
    mean = "measure prob(answer) as raw mean over prompts"
    save = 'save resid_post layer 0 of clean at last token to "a.safetensors"'
    several = checked(line, folder, save)
    assert [d.code for d in several] == ["E0108"]
    over = checked(f"{line}\n {mean}", folder)
    assert "E0612" in [d.code for d in over]
    by = checked(line, folder, "report table by prompts")
    assert by == []
