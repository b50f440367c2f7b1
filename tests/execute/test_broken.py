"""Comparisons fail if the executor is deliberately broken.

Each break is small and gives plausible numbers; a test that passes with one tests nothing. Errors
of both executors differ from plain hooks, errors of packed rows from full forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl.execute.patching.rows
import mechdsl.execute.patching.writes
import mechdsl.forward.packed.packed_pass
import mechdsl.planner.cost
import mechdsl.planner.plan
from mechdsl.execute.measurement.readout import ReadoutInput
from mechdsl.execute.patching.writes import build_writes
from mechdsl.forward.hooks.attention import attend
from mechdsl.forward.hooks.batch import Batch, SiteWrite, gather_vectors
from mechdsl.forward.packed.activation_cache import ActivationCache
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.models.restart import BlockWork, block_work
from mechdsl.pipeline.options import RunOptions

from ..quick import in_turn
from ..reference.points import Point
from .support import (
    ABSOLUTE,
    DIFFERENCE,
    MODES,
    ROWS,
    agree,
    bare,
    differences,
    experiment,
    patches,
    run_file,
)

FAMILY = "llama"
TEXT = experiment(
    "e",
    "prompts p",
    "from longer into clean",
    "patch layer 0..1 heads 0..1 at cue token",
    DIFFERENCE,
)
CELLS = [[Point("z", layer, 0), Point("z", layer, 1)] for layer in (0, 1)]


def compare(folder: Path, mode: str) -> None:
    expected = patches(FAMILY, CELLS, "longer", lambda s, b: [([s.cue], [b.cue])])
    found = run_file(TEXT, folder, bare(FAMILY), MODES[mode])["e"].measures[0]
    agree(found, expected, differences(FAMILY, ROWS))


@pytest.mark.parametrize("mode", list(MODES))
def test_unbroken_executor_passes_the_comparison(folder: Path, mode: str) -> None:
    compare(folder, mode)


def shifted(*args: Any, **named: Any) -> list[SiteWrite]:
    """Writes one token too far."""
    return [replace(w, positions=w.positions + 1) for w in build_writes(*args, **named)]


def one_head(*args: Any, **named: Any) -> list[SiteWrite]:
    """Drops the second head."""
    return [
        replace(
            w,
            rows=w.rows[w.units == 0],
            positions=w.positions[w.units == 0],
            values=w.values[w.units == 0],
            units=w.units[w.units == 0],
        )
        for w in build_writes(*args, **named)
    ]


def swapped_heads(*args: Any, **named: Any) -> list[SiteWrite]:
    return [replace(w, units=1 - w.units) for w in build_writes(*args, **named)]


def swapped_rows(*args: Any, **named: Any) -> list[SiteWrite]:
    """Gives the first row the values of the second."""
    return [
        replace(w, values=w.values.roll(w.values.shape[0] // 2, 0))
        for w in build_writes(*args, **named)
    ]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    "broken", [shifted, one_head, swapped_heads, swapped_rows, lambda *args, **named: []]
)
def test_wrong_writes_are_detected(
    folder: Path, mode: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.execute.patching.writes, "build_writes", broken)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, mode)


def early(read: Any, batch: Batch, rows: Any, positions: Any, units: Any) -> Any:
    """Reads one token too early."""
    return gather_vectors(read, batch, rows, positions - 1, units)


@pytest.mark.parametrize("mode", list(MODES))
def test_read_at_the_wrong_token_is_detected(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.execute.patching.writes, "gather_vectors", early)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, mode)


def test_ignored_padding_is_detected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    with pytest.raises(AssertionError, match=r"off by|Not equal to tolerance"):
        compare(folder, "plain")


def test_values_rounded_to_bfloat16_are_detected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rough(*args: Any, **named: Any) -> list[SiteWrite]:
        return [
            replace(w, values=w.values.to(torch.bfloat16)) for w in build_writes(*args, **named)
        ]

    monkeypatch.setattr(mechdsl.execute.patching.writes, "build_writes", rough)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, "planned")


# --- packed rows --------------------------------------------------------------------------------

SEVERAL = (
    TEXT
    + experiment(
        "keys", "prompts p", "from longer into clean",
        "patch k layer * head 0 at cue token", DIFFERENCE,
    )
    + experiment(
        "stream", "prompts p", "from other into clean",
        "patch resid_post layer * at subject token", "measure loss as delta",
    )
)  # fmt: skip
"""Rows that start in the middle of a block and between two, on one token or more; read at the last
token, and before their writes."""


def numbers(folder: Path, family: str, options: RunOptions, text: str = SEVERAL) -> np.ndarray:
    found = run_file(text, folder, bare(family), options)
    return np.concatenate([r.measures[0].patched.ravel() for r in found.values()])


def off_by(folder: Path, family: str) -> float:
    """The largest difference between packed rows and full forward passes."""
    packed = numbers(folder, family, RunOptions())
    return float(np.abs(packed - numbers(folder, family, MODES["plain"])).max())


Broken = Callable[..., Any]


def other_lane(tokens: Tensor, kept: ActivationCache) -> Tensor:
    """[token, …] cached values of another prompt."""
    return tokens.unflatten(0, (-1, kept.columns)).roll(1, 0).flatten(0, 1)


def of_kept(change: Callable[[ActivationCache], ActivationCache]) -> Broken:
    def broken(model: Any, kept: ActivationCache, lanes: Any, **others: Any) -> Any:
        return run_packed(model, change(kept), lanes, **others)

    return broken


def other_keys(kept: ActivationCache) -> ActivationCache:
    return replace(
        kept,
        attention={n: replace(a, keys=a.keys.roll(1, 0)) for n, a in kept.attention.items()},
    )


def other_values(kept: ActivationCache) -> ActivationCache:
    return replace(
        kept,
        attention={n: replace(a, values=a.values.roll(1, 0)) for n, a in kept.attention.items()},
    )


def other_masks(kept: ActivationCache) -> ActivationCache:
    """Padding of another prompt."""
    return replace(
        kept,
        attention={
            n: replace(a, mask=None if a.mask is None else a.mask.roll(1, 0))
            for n, a in kept.attention.items()
        },
    )


def other_hidden(kept: ActivationCache) -> ActivationCache:
    return replace(kept, hidden={n: other_lane(x, kept) for n, x in kept.hidden.items()})


def other_final(kept: ActivationCache) -> ActivationCache:
    """Only the output of the last block, for tokens that are read but not computed."""
    last = max(kept.hidden)
    return replace(kept, hidden={**kept.hidden, last: other_lane(kept.hidden[last], kept)})


def other_z(kept: ActivationCache) -> ActivationCache:
    return replace(kept, z={n: other_lane(x, kept) for n, x in kept.z.items()})


def other_outputs(kept: ActivationCache) -> ActivationCache:
    """Of projections and MLPs."""
    return replace(kept, outputs={p: other_lane(x, kept) for p, x in kept.outputs.items()})


def one_block_too_late(kept: ActivationCache) -> ActivationCache:
    """Rows get the input of the next block."""
    return replace(kept, hidden={n: kept.hidden.get(n + 1, x) for n, x in kept.hidden.items()})


def one_token_too_late(kept: ActivationCache) -> ActivationCache:
    return replace(kept, hidden={n: x.roll(-1, 0) for n, x in kept.hidden.items()})


def other_lanes(model: Any, kept: ActivationCache, lanes: Any, **others: Any) -> Any:
    """Rows start from another prompt of equal length."""
    lengths = kept.batch.lengths.tolist()
    one, other = next((a, b) for b in range(4) for a in range(b) if lengths[a] == lengths[b])
    swapped = np.arange(len(lengths))
    swapped[[one, other]] = other, one
    return run_packed(model, kept, swapped[lanes], **others)


def next_lanes(model: Any, kept: ActivationCache, lanes: Any, **others: Any) -> Any:
    return run_packed(model, kept, (lanes + 1) % (lanes.max() + 1), **others)


def other_rows_writes(
    model: Any, kept: ActivationCache, lanes: Any, *, writes: Any, **others: Any
) -> Any:
    """Rows of the same prompt exchange their writes."""
    other = np.arange(len(lanes))
    for lane in np.unique(lanes):
        own = np.flatnonzero(lanes == lane)
        other[own] = np.roll(own, 1)
    moved = [write.moved(torch.from_numpy(other)) for write in writes]
    return run_packed(model, kept, lanes, writes=moved, **others)


def other_rows_logits(model: Any, kept: ActivationCache, lanes: Any, **others: Any) -> Any:
    found = run_packed(model, kept, lanes, **others)
    return replace(found, logits=found.logits.roll(1, 0))


def inside(module: ModuleType, name: str, broken: Any) -> Broken:
    """Replace a function of `packed` while rows run, but not while the model is checked."""

    def run(*args: Any, **others: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, broken)
            return run_packed(*args, **others)

    return run


def less_work(change: Callable[[list[BlockWork]], list[BlockWork]]) -> Broken:
    def broken(*args: Any, **others: Any) -> Iterator[BlockWork]:
        return iter(change(list(block_work(*args, **others))))

    return inside(mechdsl.forward.packed.packed_pass, "block_work", broken)


def nothing(work: BlockWork) -> BlockWork:
    return BlockWork(**{name: np.zeros_like(mask) for name, mask in vars(work).items()})


def first_block_left_out(works: list[BlockWork]) -> list[BlockWork]:
    """A row starts one block too late."""
    started = np.zeros((len(works[0].present), 1), dtype=bool)
    found: list[BlockWork] = []
    for work in works:
        here = work.present.any(axis=1, keepdims=True)
        found.append(BlockWork(**{name: mask & started for name, mask in vars(work).items()}))
        started = started | here
    return found


def first_column_left_out(works: list[BlockWork]) -> list[BlockWork]:
    """A row starts one token too late, where it has more than one."""
    found: list[BlockWork] = []
    for work in works:
        before = np.logical_or.accumulate(work.present, axis=1)
        rest = np.roll(before, 1, axis=1)
        rest[:, 0] = False
        rest |= work.present.sum(axis=1, keepdims=True) == 1
        found.append(BlockWork(**{name: mask & rest for name, mask in vars(work).items()}))
    return found


def last_block_left_out(works: list[BlockWork]) -> list[BlockWork]:
    return [*works[:-1], nothing(works[-1])]


def without_part(name: str) -> Broken:
    """In blocks after the first one of a row, the unpatched run's value is used."""

    def change(works: list[BlockWork]) -> list[BlockWork]:
        return [replace(w, **{name: getattr(w, name) & ~(w.carried & w.present)}) for w in works]

    return less_work(change)


def carried_nowhere(works: list[BlockWork]) -> list[BlockWork]:
    """Every block starts from the unpatched run."""
    return [replace(work, carried=np.zeros_like(work.carried)) for work in works]


def first_tokens_positions(value: Any, index: Any, size: int) -> Any:
    """Arguments of the model for each token, taken from other tokens."""
    return ORIGINAL_SELECTED(value, torch.arange(len(index)), size)


ORIGINAL_SELECTED = mechdsl.forward.packed.packed_pass._select_tokens


def unmasked(*args: Any, **others: Any) -> None:
    query, key, value, groups, kept, *rest = args
    attend(query, key, value, groups, replace(kept, mask=None), *rest, **others)


def columns_without_padding(self: Any, rows: Any, positions: Any) -> Any:
    return np.asarray(positions)


def forgotten_padding(*args: Any, **others: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mechdsl.forward.packed.packed_pass.PromptColumns, "of", columns_without_padding
        )
        return run_packed(*args, **others)


BREAKS: dict[str, Broken] = {
    "keys of another prompt": of_kept(other_keys),
    "values of another prompt": of_kept(other_values),
    "mask of another prompt": of_kept(other_masks),
    "hidden state of another prompt": of_kept(other_hidden),
    "hidden state of another prompt behind the last block": of_kept(other_final),
    "z of another prompt": of_kept(other_z),
    "projections of another prompt": of_kept(other_outputs),
    "hidden state of the next block": of_kept(one_block_too_late),
    "hidden state of the next token": of_kept(one_token_too_late),
    "another lane": other_lanes,
    "another row's writes": other_rows_writes,
    "another row's logits": other_rows_logits,
    "one block too late": less_work(first_block_left_out),
    "one column too late": less_work(first_column_left_out),
    "one block too few": less_work(last_block_left_out),
    "stale projections": without_part("project"),
    "stale attention": without_part("attend"),
    "stale output projection": without_part("output"),
    "stale MLP": without_part("mlp"),
    "stale input": less_work(carried_nowhere),
    "positions of other tokens": inside(
        mechdsl.forward.packed.packed_pass, "_select_tokens", first_tokens_positions
    ),
    "no mask": inside(mechdsl.forward.packed.packed_pass, "attend", unmasked),
    "forgotten padding": forgotten_padding,
}
NOT_IN: dict[str, str] = {"positions of other tokens": "gpt2"}
"""GPT-2 uses positions only before its first block."""


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_packed_rows_equal_full_forward_passes(folder: Path, family: str) -> None:
    assert off_by(folder, family) <= ABSOLUTE


@pytest.mark.parametrize(
    ("name", "family"),
    in_turn(list(BREAKS), ["gpt2", "llama", "gpt_neox"], list(BREAKS)[::2]),
)
def test_broken_packed_rows_are_detected(
    folder: Path, name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if NOT_IN.get(name) == family:
        return
    monkeypatch.setattr(mechdsl.execute.patching.rows, "run_packed", BREAKS[name])
    assert off_by(folder, family) > 10 * ABSOLUTE


def test_packed_rows_on_a_prompt_of_another_length_raise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.execute.patching.rows, "run_packed", next_lanes)
    with pytest.raises((IndexError, ValueError)):
        off_by(folder, FAMILY)


# --- rows that run, and row keys ------------------------------------------------------------------


def test_rows_that_start_above_the_cached_block_raise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activations from which rows would start aren't cached, so that no number results."""
    original = mechdsl.planner.plan._lowest
    monkeypatch.setattr(mechdsl.planner.plan, "_lowest", lambda *args: original(*args) + 1)
    with pytest.raises((KeyError, AssertionError)) as found:
        numbers(folder, FAMILY, RunOptions())
    assert "off by" not in str(found.value)


def other_without(patch: pytest.MonkeyPatch, name: str, folder: Path, text: str) -> None:
    """Assert that the numbers of a file change if row keys lack one part."""
    original = mechdsl.planner.cost.RowSharer._rule

    def blurred(self: Any, plan: Any, rule: Any) -> Any:
        key = original(self, plan, rule)
        return replace(key, **{name: np.zeros_like(getattr(key, name))})

    plain = numbers(folder, FAMILY, MODES["plain"], text)
    np.testing.assert_allclose(numbers(folder, FAMILY, RunOptions(), text), plain, atol=ABSOLUTE)
    patch.setattr(mechdsl.planner.cost.RowSharer, "_rule", blurred)
    found = numbers(folder, FAMILY, RunOptions(), text)
    assert np.abs(found - plain).max() > 10 * ABSOLUTE


@pytest.mark.parametrize("name", ["points", "written", "read"])
def test_rows_with_an_incomplete_key_are_detected(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of three items and one: both cells read the same token in one direction, and write the same
    # one in the other.
    rule = "patch z layer * head * at item 1 token, last-item token"
    text = "".join(
        experiment(f"e{n}", "prompts p", f"from {direction}", rule, DIFFERENCE)
        for n, direction in enumerate(["longer into clean", "clean into longer"])
    )
    other_without(monkeypatch, name, folder, text)


EDGE = "attention layer 1 from last token to"
ALMOST_EQUAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "does": (
        ("ablate z layer 1 heads * at last token with mean",),
        ("ablate z layer 1 heads * at last token with mean of other",),
    ),
    "whole": (
        (
            "from clean into longer",
            "ablate z layer 1 heads * at item 1 token, last-item token with mean of longer",
        ),
    ),
    "amounts": ((f"for c in [0.1, 9] {{ reweight {EDGE} cue token by c }}",),),
    "keys": ((f"reweight {EDGE} cue token, subject token by 9",),),
    "receivers": (
        (
            "from longer into clean",
            "path attn_out layer 0 -> mlp_norm layer 1..2 at {cue token, last token}",
        ),
    ),
}
"""The only part of the key in which rows of some experiments differ, and these experiments."""


@pytest.mark.parametrize("name", list(ALMOST_EQUAL))
def test_each_part_of_a_row_key_distinguishes_rows(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of a row's key affects a value."""
    text = "".join(
        experiment(f"e{n}", "prompts p", *lines, DIFFERENCE)
        for n, lines in enumerate(ALMOST_EQUAL[name])
    )
    other_without(monkeypatch, name, folder, text)


def test_rows_wrongly_marked_as_inert_are_detected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every(self: Any, rows: Any) -> Any:
        return np.ones(len(rows), dtype=bool)

    monkeypatch.setattr(mechdsl.planner.plan.ExperimentPlan, "is_inert", every)
    with pytest.raises(AssertionError, match="off by"):
        compare(folder, "planned")


def test_logit_of_another_token_is_detected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def next_one(self: ReadoutInput, ids: Tensor) -> Tensor:
        if self.tokens is None:
            return ids
        return (torch.searchsorted(self.tokens, ids) + 1) % len(self.tokens)

    monkeypatch.setattr(ReadoutInput, "columns", next_one)
    with pytest.raises(AssertionError):
        compare(folder, "planned")
