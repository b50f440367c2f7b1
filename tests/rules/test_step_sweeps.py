"""`for s in … { … during step s }`: every cell against full forward passes with its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from .support import MODES, experiment, rows, run_file
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
