"""`for s in … { … during step s }`: every cell against full forward passes with its steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from .models import on_the_model
from .support import MODES, experiment, rows, run_file
from .test_blocks import LISTS
from .test_generation import CASES, TOKENS, Case, replies, written

slow = pytest.mark.slow
SWEPT = {
    "a patch": ("for s in 0..3 { RULE during step s..s + 1 }", "patch", 1),
    "an edge": ("for s in 0..4 { RULE during step s }", "block", 0),
    "all tokens": ("for s in 0..3 { RULE during step s..s + 1 }", "every", 1),
    "a direction": ("for s in [3, 0, 1] { RULE during step s }", "add", 0),
    "a part of a head": ("for s in 1..4 { RULE during step s - 1..s }", "head", 1),
}
"""A loop, the rule in it, and the number of steps after the first in which the rule acts."""
STEPS = {
    "a patch": [0, 1, 2, 3],
    "an edge": [0, 1, 2, 3, 4],
    "all tokens": [0, 1, 2, 3],
    "a direction": [3, 0, 1],
    "a part of a head": [0, 1, 2, 3],
}
"""The first step of each cell."""


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[] if (name, mode) == ("llama", "planned") else slow)
        for name in ("gpt2", "llama", "gpt_neox")
        for mode in MODES
    ],
)
def test_step_sweep_cells_equal_full_forward_passes(data: Path, name: str, mode: str) -> None:
    text = 'direction u = unembedding(" w3", " w9")\n'
    for number, (loop, key, _) in enumerate(SWEPT.values()):
        rule = CASES[key].rule
        source = ("from longer into clean",) if rule.startswith("patch") else ()
        lines = (*source, loop.replace("RULE", rule), f"generate {TOKENS}")
        text += experiment(f"e{number}", *lines, measure="measure length as raw")
    found = run_file(text, data, name, mode, precise=True)
    base = [written(name, n, []) for n in range(len(rows()))]
    for number, (case, (_, key, more)) in enumerate(SWEPT.items()):
        result = found[f"e{number}"]
        assert result.axes == ("s",)
        wanted: list[list[list[int]]] = []
        for first in STEPS[case]:
            own: Case = replace(CASES[key], first=first, last=first + more)
            wanted.append([written(name, n, [own]) for n in range(len(rows()))])
        assert [replies(result, cell) for cell in range(len(result.cells))] == wanted, case
        assert any(cell != base for cell in wanted), case


@pytest.mark.parametrize("mode", [pytest.param("plain", marks=slow), "planned"])
def test_sweep_of_fills_and_steps_equals_separate_experiments(data: Path, mode: str) -> None:
    """An axis of fills, an axis of steps, and a second rule that acts at every step."""
    rule = "for s in 0..2 { ablate resid_pre layer 1 at last token with zero, mean during step s }"
    head = CASES["head"]
    lines = (rule, head.rule, f"generate {TOKENS}")
    text = experiment("e", *lines, measure="measure length as raw")
    result = run_file(text, data, "llama", mode, precise=True)["e"]
    each: list[str] = []
    for s in range(3):
        for fill in ("zero", "mean"):
            alone = f"ablate resid_pre layer 1 at last token with {fill} during step {s}"
            name = f"e{len(each)}"
            each.append(experiment(name, alone, head.rule, f"generate {TOKENS}",
                                   measure="measure length as raw"))  # fmt: skip
    apart = run_file("".join(each), data, "llama", mode, precise=True)
    seen = [replies(result, cell) for cell in range(6)]
    assert seen == [replies(apart[f"e{n}"]) for n in range(6)]
    zero = replace(CASES["zero"], first=1, last=1)
    assert seen[2] == [written("llama", n, [zero, head]) for n in range(len(rows()))]


@torch.no_grad()
@on_the_model
def written_by_blocks(model: Any, name: str, ids: Sequence[int], steps: Sequence[int]) -> list[int]:
    """A reply in whose steps block 2 runs in place of block 1, with the library's cache."""
    blocks = model.get_submodule(LISTS.get(name, "model.layers"))
    own, other = blocks[1], copy.deepcopy(blocks[2])
    for part in other.modules():
        if getattr(part, "layer_idx", None) is not None:
            part.layer_idx = 1
    cache, given, reply = DynamicCache(), list(ids), list[int]()
    for step in range(TOKENS):
        blocks[1] = other if step in steps else own
        found = model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=True)
        reply.append(int(found.logits[0, -1].argmax()))
        given = reply[-1:]
    return reply


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=slow)])
def test_blocks_replaced_in_different_steps_equal_the_library(data: Path, name: str) -> None:
    """In the cells of a sweep, and in experiments of one file that replace the same block."""
    rule = "replace block layer 1 with block layer 2"
    lines = [rule, f"{rule} during prefill", f"for s in 1..4 {{ {rule} during step s }}"]
    lines += [f"for s in 0..2 {{ {rule} during step s..3 }}", f"{rule} during step 2..3"]
    steps = [[range(9)], [[0]], [[s] for s in range(1, 5)], [range(s, 4) for s in range(3)]]
    text = "".join(
        experiment(f"e{n}", line, f"generate {TOKENS}", measure="measure length as raw")
        for n, line in enumerate(lines)
    )
    found, changed = run_file(text, data, name, "planned", precise=True), set[str]()
    for number, cells in enumerate([*steps, [range(2, 4)]]):
        result = found[f"e{number}"]
        wanted = [[written_by_blocks(name, row.ids, own) for row in rows()] for own in cells]
        assert [replies(result, cell) for cell in range(len(cells))] == wanted, lines[number]
        changed |= {str(cell) for cell in wanted}
    assert len(changed) > 4
