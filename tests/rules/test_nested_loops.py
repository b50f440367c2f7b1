"""Nested loops: both ends of a range, windows, and domains that depend on an outer loop."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.output import show_report

from ..quick import in_turn
from ..reference.forward import Changes, Edge, Write
from ..results.synthetic import report
from .support import (
    QUICK,
    Text,
    agree,
    codes,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)

NAMES = ("gpt2", "llama", "gpt_neox")
LAST, CUE = "last token", "cue token"


def patched(name: str, n: int, at: str, places: Sequence[tuple[str, int, int]]) -> list[Changes]:
    """Values of `longer` at (site, layer, unit), written into `clean`."""
    text, other = rows()[n], rows("longer")[n]
    (to,), (of,) = tokens(text, at), tokens(other, at)
    run = plain(name, other)
    return [([Write(s, layer, run[s, layer][of, u], to, u) for s, layer, u in places], [])]


def of_layers(site: str, layers: Sequence[int]) -> list[tuple[str, int, int]]:
    return [(site, layer, 0) for layer in layers]


def moved(name: str, n: int, layer: int, to: int) -> list[Changes]:
    found = plain(name, rows("longer")[n])["resid_post", layer][rows("longer")[n].last, 0]
    return [([Write("resid_post", to, found, rows()[n].last, 0)], [])]


def number(name: str, n: int, amount: float) -> list[Changes]:
    last = rows()[n].last
    width = plain(name, rows()[n])["mlp_out", 1][last, 0]
    return [([Write("mlp_out", 1, torch.full_like(width, amount), last, 0)], [])]


def cut(text: Text, layers: Sequence[int]) -> list[Changes]:
    keys = list(text.spans["subject"])
    return [([], [Edge("block", layer, [text.last], keys) for layer in layers])]


def cut_items(text: Text, first: int, second: int) -> list[Changes]:
    """Empty if the row lacks the item."""
    items = text.spans["items"]
    if second > len(items):
        return []
    edge = [Edge("block", layer, [items[second - 1]], [items[first - 1]]) for layer in range(3)]
    return [([], edge)]


def window(center: int, width: int) -> range:
    return range(max(0, center - width // 2), min(3, center + (width + 1) // 2))


@dataclass(frozen=True)
class Case:
    lines: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[int, ...]]
    act: Callable[..., Sequence[Changes]]
    """From a model's name, a row's number and the cell's coordinates."""


def upwards(low: int, high: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]


FROM = "from longer into clean"
CASES = {
    "both ends": Case(
        f"{FROM} for a in 0..2 {{ for b in a..2 {{ patch mlp_out layers a..b at {CUE} }} }}",
        ("a", "b"),
        upwards(0, 2),
        lambda name, n, a, b: patched(name, n, CUE, of_layers("mlp_out", range(a, b + 1))),
    ),
    "the inner one goes downwards": Case(
        f"{FROM} for b in 0..2 {{ for a in 0..b {{ patch mlp_out layers a..b at {CUE} }} }}",
        ("b", "a"),
        [(b, a) for b in range(3) for a in range(b + 1)],
        lambda name, n, b, a: patched(name, n, CUE, of_layers("mlp_out", range(a, b + 1))),
    ),
    "one end": Case(
        f"{FROM} for a in 0..2 {{ patch attn_out layers a..-1 at {LAST} "
        f"patch mlp_out layers 0..a at {CUE} }}",
        ("a",),
        [(0,), (1,), (2,)],
        lambda name, n, a: both(
            patched(name, n, LAST, of_layers("attn_out", range(a, 3))),
            patched(name, n, CUE, of_layers("mlp_out", range(a + 1))),
        ),
    ),
    "numbers are added": Case(
        f"{FROM} for a in 0..1 {{ for b in a + 1..2 {{ patch mlp_out layers a..b - 1 at {CUE} "
        f"patch attn_out layer b at {LAST} }} }}",
        ("a", "b"),
        [(0, 1), (0, 2), (1, 2)],
        lambda name, n, a, b: both(
            patched(name, n, CUE, of_layers("mlp_out", range(a, b))),
            patched(name, n, LAST, of_layers("attn_out", [b])),
        ),
    ),
    "three of them": Case(
        f"{FROM} for a in 0..1 {{ for b in a..1 {{ for c in b..2 {{ "
        f"patch mlp_out layers a..c at {CUE} patch attn_out layers a..b at {LAST} }} }} }}",
        ("a", "b", "c"),
        [(a, b, c) for a in range(2) for b in range(a, 2) for c in range(b, 3)],
        lambda name, n, a, b, c: both(
            patched(name, n, CUE, of_layers("mlp_out", range(a, c + 1))),
            patched(name, n, LAST, of_layers("attn_out", range(a, b + 1))),
        ),
    ),
    "a list": Case(
        f"{FROM} for a in 0..1 {{ for b in [a, 2] {{ patch mlp_out layers a..b at {CUE} }} }}",
        ("a", "b"),
        [(0, 0), (0, 2), (1, 1), (1, 2)],
        lambda name, n, a, b: patched(name, n, CUE, of_layers("mlp_out", range(a, b + 1))),
    ),
    "a rule outside": Case(
        f"{FROM} patch attn_out layer 2 at {LAST} "
        f"for a in 0..1 {{ for b in a..1 {{ patch mlp_out layers a..b at {CUE} }} }}",
        ("a", "b"),
        upwards(0, 1),
        lambda name, n, a, b: both(
            patched(name, n, LAST, of_layers("attn_out", [2])),
            patched(name, n, CUE, of_layers("mlp_out", range(a, b + 1))),
        ),
    ),
    "beside a sweep": Case(
        f"{FROM} for a in 0..2 {{ for b in a..2 {{ patch layers a..b head * at {CUE} }} }}",
        ("a", "b", "head"),
        [(a, b, head) for a, b in upwards(0, 2) for head in range(4)],
        lambda name, n, a, b, head: patched(
            name, n, CUE, [("z", layer, head) for layer in range(a, b + 1)]
        ),
    ),
    "heads": Case(
        f"{FROM} for a in 0..3 {{ for b in a..3 {{ patch layer 1 heads a..b at {CUE} }} }}",
        ("a", "b"),
        upwards(0, 3),
        lambda name, n, a, b: patched(name, n, CUE, [("z", 1, head) for head in range(a, b + 1)]),
    ),
    "layers and heads": Case(
        f"{FROM} for a in 0..1 {{ for b in a..1 {{ patch layers a..b heads a..b at {CUE} }} }}",
        ("a", "b"),
        upwards(0, 1),
        lambda name, n, a, b: patched(
            name, n, CUE, [("z", x, h) for x, h in product(range(a, b + 1), repeat=2)]
        ),
    ),
    "windows": Case(
        f"{FROM} for w in [1, 2, 3] {{ patch mlp_out layer * window w at {CUE} }}",
        ("w", "layer"),
        [(w, layer) for w in (1, 2, 3) for layer in range(3)],
        lambda name, n, w, layer: patched(name, n, CUE, of_layers("mlp_out", window(layer, w))),
    ),
    "windows of a loop": Case(
        f"{FROM} for l in 0..2 {{ for w in 1..l + 1 {{ patch mlp_out layer l window w at {CUE} "
        "} }",
        ("l", "w"),
        [(layer, w) for layer in range(3) for w in range(1, layer + 2)],
        lambda name, n, layer, w: patched(name, n, CUE, of_layers("mlp_out", window(layer, w))),
    ),
    "windows that are joined": Case(
        f"{FROM} for w in 1..2 {{ patch mlp_out layers 1..2 window w at {CUE} }}",
        ("w",),
        [(1,), (2,)],
        lambda name, n, w: patched(name, n, CUE, of_layers("mlp_out", range(2 - w, 3))),
    ),
    "into a later layer": Case(
        f"{FROM} for a in 0..1 {{ for b in a + 1..2 {{ "
        "patch resid_post layer a at last token into layer b } }",
        ("a", "b"),
        [(0, 1), (0, 2), (1, 2)],
        lambda name, n, a, b: moved(name, n, a, b),
    ),
    "attention": Case(
        "for a in 0..2 { for b in a..2 { "
        "block attention layers a..b heads * from last token to subject tokens } }",
        ("a", "b"),
        upwards(0, 2),
        lambda name, n, a, b: cut(rows()[n], range(a, b + 1)),
    ),
    "numbers that are written": Case(
        "for x in [0, 1] { for y in x..2 { set mlp_out layer 1 at last token to 0.5 * x - y } }",
        ("x", "y"),
        [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)],
        lambda name, n, x, y: number(name, n, 0.5 * x - y),
    ),
    "positions": Case(
        "for i in 1..2 { for j in i + 1..3 { "
        "block attention layers * heads * from item j token to item i token } }",
        ("i", "j"),
        [(1, 2), (1, 3), (2, 3)],
        lambda name, n, i, j: cut_items(rows()[n], i, j),
    ),
}


def both(*each: list[Changes]) -> list[Changes]:
    writes = [write for (found,) in each for write in found[0]]
    return [(writes, [])]


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, QUICK))
def test_cells_of_nested_loops_equal_the_reference(data: Path, name: str, mode: str) -> None:
    text = "".join(experiment(f"e{n}", case.lines) for n, case in enumerate(CASES.values()))
    found = run_file(text, data, name, mode)
    for place, case in enumerate(CASES.values()):

        def changes(n: int, *cell: int, case: Case = case) -> Sequence[Changes]:
            return case.act(name, n, *cell)

        expected = worked_out(name, case.cells, changes, rows(), records())
        agree(found[f"e{place}"], case.axes, expected, unpatched(name), large=0.02, most=False)


# --- other users of cells -------------------------------------------------------------------------

WRITTEN_OUT = {
    "blocks": "replace block layer B with block layer A",
    "paths": "path layer A head * -> q layer B at last token",
    "a run of its own": "patch resid_post layers A..B at last token with turned",
    "an observation": "observe attention layers A..B head * from last token to subject tokens",
}


@pytest.mark.parametrize("rule", list(WRITTEN_OUT))
def test_cell_of_a_nested_loop_equals_the_rule_with_its_numbers(data: Path, rule: str) -> None:
    line = WRITTEN_OUT[rule]
    start = "" if rule == "an observation" else FROM
    measure = {} if start else {"measure": ""}
    looped = line.replace("A", "a").replace("B", "b")
    text = experiment(
        "e", start, f"for a in 0..1 {{ for b in a + 1..2 {{ {looped} }} }}", **measure
    )
    cells = [(0, 1), (0, 2), (1, 2)]
    for a, b in cells:
        own = line.replace("A", str(a)).replace("B", str(b))
        text += experiment(f"e{a}{b}", start, own, **measure)
    found = run_file(text, data, "llama", "planned")
    values = found["e"].measures[0].patched.reshape(len(cells), -1, len(rows()))
    for (a, b), own in zip(cells, values, strict=True):
        np.testing.assert_allclose(own, found[f"e{a}{b}"].measures[0].patched, atol=2e-5)
    assert np.ptp(values, axis=0).max() > 0.01


def triangle(*more: str, inner: str = "a..2", **said: str) -> str:
    loops = f"for a in 0..2 {{ for b in {inner} {{ patch mlp_out layers a..b at {CUE} }} }}"
    return experiment("e", FROM, loops, *more, **said)


MEASURED = {
    "the inner one": (
        "for a in 0..2 { for b in a..2 { patch mlp_out layers a..b at cue token } }",
        "cosine(resid_post layer B, longer)",
        upwards(0, 2),
    ),
    "both": (
        "for a in 0..2 { for b in a..2 { patch mlp_out layers a..b at cue token } }",
        "cosine(resid_pre layer A, longer) - cosine(resid_post layer B, longer)",
        upwards(0, 2),
    ),
    "one that no rule names": (
        "for a in 0..2 { for b in a..2 { patch mlp_out layer b at cue token } }",
        "cosine(resid_post layer A, longer)",
        upwards(0, 2),
    ),
    "the first values don't go together": (
        "for a in 0..1 { for b in 1 - a..2 - a { patch mlp_out layers a, b at cue token } }",
        "cosine(z layer A head B, longer)",
        [(0, 1), (0, 2), (1, 0), (1, 1)],
    ),
}


@pytest.mark.parametrize("case", list(MEASURED))
def test_measures_with_loop_variables_equal_separate_experiments(data: Path, case: str) -> None:
    """Only existing cells read a component."""
    lines, metric, cells = MEASURED[case]
    rule = lines[lines.index("patch") : lines.index(" }")]

    def said(a: object, b: object) -> str:
        own = metric.replace("A", str(a)).replace("B", str(b))
        return f"measure {own} at cue token as raw"

    found = run_file(
        experiment("e", FROM, lines, measure=said("a", "b")), data, "llama", "planned"
    )["e"]
    own = [(cell.coords["a"], cell.coords["b"]) for cell in found.cells]
    assert sorted(own) == cells
    text = ""
    for a, b in own:
        layers = rule.replace("layers a..b", f"layers {a}..{b}").replace("layer b", f"layer {b}")
        layers = layers.replace("layers a, b", f"layers {a}, {b}")
        text += experiment(f"e{a}{b}", FROM, layers, measure=said(a, b))
    alone = run_file(text, data, "llama", "planned")
    for (a, b), values in zip(own, found.measures[0].patched, strict=True):
        expected = alone[f"e{a}{b}"].measures[0].patched[0]
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert np.ptp(found.measures[0].patched, axis=0).max() > 0.001


def test_random_control_of_nested_loops_covers_existing_cells(data: Path) -> None:
    text = triangle("against random(4, layers)")
    found = run_file(text, data, "llama", "planned")["e"]
    (drawn,) = found.controls
    assert drawn is not None
    assert len(drawn.low) == len(found.cells) == 6
    whole = found.conventions["controls"]
    assert "1 of 6 cells has no alternatives and no band" in whole  # the cell of all layers
    assert np.isfinite(drawn.mean).sum() == 5


def test_best_and_top_select_from_existing_cells(data: Path) -> None:
    """The best cell and the top six are among the six existing cells."""
    text = triangle() + experiment("f", f"ablate best of e at {CUE} with zero")
    found = run_file(text, data, "llama", "planned")
    best = int(found["e"].statistics[0].mean.argmax())
    assert found["f"].cells[0].site == found["e"].cells[best].site
    most = [experiment("g", f"ablate top {k} of e at {CUE} with zero") for k in (6, 7)]
    assert "g" in run_file(text + most[0], data, "llama", "planned")
    assert "E0620" in codes(text + most[1], data)


SHOWN = """
mech 1
model m = zoo("counting")
prompts p {
  count in 2..5
  item in ["pear", "fig"]
  xs = list(item, count, sep: " ")
  template "Part 1: {xs} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
experiment e {
  model m
  prompts p limit 4
  from clean into fewer
  for a in 0..2 { for b in a..2 { patch mlp_out layers a..b at last token } }
  measure logit(answer) as delta
}
"""


def test_nested_loops_are_shown_without_missing_cells() -> None:
    """Missing cells are empty in the heat map and excluded from counts."""
    result = mechdsl.run(SHOWN)["e"]
    text = io.StringIO()
    show_report(result, report("heatmap", variable="a", by="b"), Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    start = next(n for n, line in enumerate(lines) if line.split() == ["a", "0", "1", "2"])
    grid = [line.split() for line in lines[start + 1 : start + 4]]
    assert [len(line) for line in grid] == [4, 3, 2], "a name, and a number for each that is there"
    assert "–" not in "".join(map("".join, grid))
    assert lines[start + 3].endswith(grid[2][1]), "the missing ones come first"
    told = str(mechdsl.explain(SHOWN))
    assert "cells: 6 (a 3 × b 3)" in told
    assert "L0.mlp_out, L0-1.mlp_out, L0-2.mlp_out, L1.mlp_out, L1-2.mlp_out, L2.mlp_out" in (
        " ".join(told.split())
    )
    assert "a 3 × b 3 = 6 cells" in str(mechdsl.graph(SHOWN))
    plan = str(mechdsl.plan(SHOWN))
    row = next(line.split() for line in plan.splitlines() if line.strip().startswith("e  "))
    assert row[:4] == ["e", "6", "4", "24"]


INERT = """for a in [3, 2] { for b in a..3 { patch resid_post layers a..b at last-item token } }"""
PAIRS = """for a in [2, 1] { for b in a..2 { path layer a head 0 -> q layer b at last token } }"""


@pytest.mark.parametrize(
    ("loops", "key", "said"),
    [(INERT, "inert", "1 of 3 cells, and 4 of 12 rows"), (PAIRS, "pairs", "1 of 3; in the others")],
)
def test_inert_and_pair_counts_exclude_missing_cells(loops: str, key: str, said: str) -> None:
    """Placeholders of missing cells aren't counted."""
    lines = SHOWN.splitlines()
    lines = [loops if line.startswith("  for a") else line for line in lines]
    found = mechdsl.run("\n".join(lines))
    assert found["e"].conventions[key].startswith(said)


def test_correction_counts_only_existing_cells() -> None:
    (few,) = (
        found
        for found in mechdsl.validate(SHOWN.replace("limit 4", "limit 5"))
        if found.code == "W0720"
    )
    assert "Holm, 6 cells" in few.label_text


def test_validate_without_the_model_assumes_the_layers_of_loops() -> None:
    loops = "for a in 0..40 { for b in a..a + 30 { patch mlp_out layers a..b at last token } }"
    text = SHOWN.replace('zoo("counting")', 'hf("nobody/nothing")')
    lines = [loops if line.startswith("  for a") else line for line in text.splitlines()]
    lines[-1:] = ["expect delta(a: 40, b: 70) > 0", "expect delta(a: 40, b: 10) > 0", "}"]
    wrong = [found for found in mechdsl.validate("\n".join(lines)) if found.severity == "error"]
    assert [found.message.split(": ", 1)[1] for found in wrong] == ["no cell matches a: 40, b: 10"]


def test_expectation_selects_a_cell_of_nested_loops(data: Path) -> None:
    text = triangle("expect delta(a: 1, b: 2) > -100", "expect max(delta) < 100")
    found: ExperimentResult = run_file(text, data, "llama", "planned")["e"]
    assert len(found.cells) == 6
    assert "E0606" in codes(triangle("expect delta(a: 2, b: 1) > 0"), data)


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ("0..0.3 step 0.1", [0, 0.1, 0.2, 0.3]),
        ("0..1 step 0.1", [n / 10 for n in range(11)]),
        ("-0.3..0.6 step 0.3", [-0.3, 0, 0.3, 0.6]),
        ("0..0.25 step 0.1", [0, 0.1, 0.2]),
    ],
)
def test_range_with_a_step_includes_its_end(data: Path, domain: str, values: list[float]) -> None:
    rule = "set mlp_out layer 1 at last token to x"
    text = experiment("e", f"for x in {domain} {{ {rule} }}")
    found = run_file(text, data, "llama", "planned")["e"]
    np.testing.assert_allclose([float(cell.coords["x"]) for cell in found.cells], values, atol=1e-9)


def test_loop_values_equal_up_to_rounding_are_one_coordinate(data: Path) -> None:
    """0.1 + 6 · 0.1 is 0.7, and 0 + 7 · 0.1 is not."""
    rule = "set mlp_out layer 1 at last token to y - x"
    text = experiment("e", f"for x in [0, 0.1] {{ for y in x..0.8 step 0.1 {{ {rule} }} }}")
    found = run_file(text, data, "llama", "planned")["e"]
    assert len({cell.coords["y"] for cell in found.cells}) == 9
    assert len(found.cells) == 9 + 8


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (
            "for a in 0..2 { for b in 0..2 { ablate z layers a..b head 0 at AT with zero } }",
            "E0321",
        ),
        (
            "for a in 0..2 { for b in a..1 { ablate z layers a..b head 0 at AT with zero } }",
            "E0321",
        ),
        ("for a in 0..2 { ablate z layers a + 1..a head 0 at AT with zero }", "E0321"),
        ("for a in 0..2 { ablate z layers a..5 head 0 at AT with zero }", "E0302"),
        ("for a in 0..3 { ablate z layers 0..a head 0 at AT with zero }", "E0302"),
        ("for a in 0..2 { ablate z layers 0..a + 1 head 0 at AT with zero }", "E0302"),
        ("for a in 0..2 { ablate z layer 0 heads a..9 at AT with zero }", "E0301"),
        ("for a in 0..2 { ablate z layer a..2 head 0 at AT with zero }", "E0322"),
        ("for a in 0..2 { ablate z layer a, 2 head 0 at AT with zero }", "E0322"),
        ("for a in [q, z] { ablate a layers a..2 head 0 at AT with zero }", "E0322"),
        ("for a in [0.5] { ablate z layers a..2 head 0 at AT with zero }", "E0322"),
        ("for w in 0..2 { ablate mlp_out layer * window w at AT with zero }", "E0322"),
        ("for w in [1.5] { ablate mlp_out layer * window w at AT with zero }", "E0322"),
        ("ablate mlp_out layer * window w at AT with zero", "E0322"),
        ("for b in c..2 { ablate mlp_out layer b at AT with zero }", "E0322"),
        ("for b in b..2 { ablate mlp_out layer b at AT with zero }", "E0322"),
        (
            "for b in a..2 { for a in 0..2 { ablate z layers a..b head 0 at AT with zero } }",
            "E0322",
        ),
        ("for a in [q, z] { for b in a..2 { ablate a layer b head 0 at AT with zero } }", "E0322"),
        (
            "for a in 0..2 { for b in a / 0..2 { ablate z layer b head a at AT with zero } }",
            "E0322",
        ),
        ("for a in 0..2 { for b in a..2 { ablate z layer b head 0 at AT with zero } }", "E0322"),
    ],
)
def test_invalid_nested_loops_are_errors(data: Path, rule: str, code: str) -> None:
    assert codes(experiment("e", rule.replace("AT", LAST)), data) == [code]
