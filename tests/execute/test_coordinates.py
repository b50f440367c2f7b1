"""Singular sweeps and plural joins, windows, groups, loops: which points each cell writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from ..families import build, tables
from ..families.parts import Architecture
from ..quick import some
from ..reference.points import Point, copied, zeroed
from . import support
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    Array,
    Prompt,
    Runs,
    agree,
    bare,
    difference,
    differences,
    experiment,
    patched,
    patches,
    prompt,
    run_file,
    unpatched,
    write_rows,
)

AT = "at {cue token, last token}"
FAMILIES = ("gpt2", "llama")


def both(source: Prompt, base: Prompt) -> Runs:
    return [([source.cue, source.last], [base.cue, base.last])]


@dataclass(frozen=True)
class Case:
    """Rules, the axes they span, and the joined points of every cell in the order of the table."""

    rules: str
    axes: tuple[str, ...]
    cells: Sequence[Sequence[Point]]


def z(layer: int, head: int) -> Point:
    return Point("z", layer, head)


def at(component: str, *layers: int) -> list[Point]:
    return [Point(component, layer) for layer in layers]


CASES: dict[str, Case] = {
    "layer_and_head_sweep": Case(
        f"patch layer * head * {AT}",
        ("layer", "head"),
        [[z(n, h)] for n in range(3) for h in range(4)],
    ),
    "a_range_includes_both_ends": Case(
        f"patch layer 1..2 head 0..2 {AT}",
        ("layer", "head"),
        [[z(n, h)] for n in (1, 2) for h in range(3)],
    ),
    "plural_layers_join": Case(
        f"patch layers 0..1 head * {AT}", ("head",), [[z(0, h), z(1, h)] for h in range(4)]
    ),
    "plural_heads_join": Case(
        f"patch layer * heads 0, 2 {AT}", ("layer",), [[z(n, 0), z(n, 2)] for n in range(3)]
    ),
    "both_plural_is_one_cell": Case(
        f"patch layers * heads * {AT}",
        (),
        [[z(n, h) for n in range(3) for h in range(4)]],
    ),
    "a_list_sweeps": Case(
        f"patch v layer 0, 2 head 1 {AT}", ("layer",), [[Point("v", 0, 1)], [Point("v", 2, 1)]]
    ),
    "single_values_span_no_axis": Case(f"patch layer 1 head 2 {AT}", (), [[z(1, 2)]]),
    "neuron_sweep": Case(
        f"patch layer 1 neuron * {AT}",
        ("neuron",),
        [[Point("mlp_hidden", 1, u)] for u in range(28)],
    ),
    "all_neurons_joined": Case(
        f"patch mlp_hidden layer * neurons * {AT}",
        ("layer",),
        [at("mlp_hidden", n) for n in range(3)],
    ),
    "short_head": Case(f"patch L1H2 {AT}", (), [[z(1, 2)]]),
    "short_head_with_component": Case(f"patch L1H1.k {AT}", (), [[Point("k", 1, 1)]]),
    "short_mlp": Case(f"patch L1.mlp {AT}", (), [at("mlp_out", 1)]),
    "short_attention": Case(f"patch L1.attn {AT}", (), [at("attn_out", 1)]),
    "short_residual": Case(f"patch L1.resid {AT}", (), [at("resid_post", 1)]),
    "short_neuron": Case(f"patch L1N5 {AT}", (), [[Point("mlp_hidden", 1, 5)]]),
    "a_group_is_joined": Case(
        f"patch mixed {AT}", (), [[z(0, 1), Point("q", 1, 2), Point("mlp_out", 1)]]
    ),
    "window_of_two": Case(
        f"patch attn_out layer * window 2 {AT}",
        ("layer",),
        [at("attn_out", 0), at("attn_out", 0, 1), at("attn_out", 1, 2)],
    ),
    "window_of_three": Case(
        f"patch mlp_out layer * window 3 {AT}",
        ("layer",),
        [at("mlp_out", 0, 1), at("mlp_out", 0, 1, 2), at("mlp_out", 1, 2)],
    ),
    "a_loop_shares_its_axis": Case(
        f"for l in 0..1 {{ patch attn_out layer l {AT}  patch mlp_out layer l {AT} }}",
        ("l",),
        [[*at("attn_out", n), *at("mlp_out", n)] for n in (0, 1)],
    ),
    "an_offset_of_a_loop": Case(
        f"for l in 0..1 {{ patch layer l head 1 {AT}  patch mlp_out layer l + 1 {AT} }}",
        ("l",),
        [[z(n, 1), *at("mlp_out", n + 1)] for n in (0, 1)],
    ),
    "a_loop_over_components": Case(
        f"for c in [attn_out, mlp_out] {{ patch c layer * {AT} }}",
        ("c", "layer"),
        [at(c, n) for c in ("attn_out", "mlp_out") for n in range(3)],
    ),
    "percent_of_the_last_layer": Case(
        f"patch attn_out layer 0%..50% {AT}", ("layer",), [at("attn_out", 0), at("attn_out", 1)]
    ),
    "percent_is_rounded_half_up": Case(f"patch attn_out layer 25% {AT}", (), [at("attn_out", 1)]),
    "the_last_percent": Case(f"patch attn_out layer 100% {AT}", (), [at("attn_out", 2)]),
    "two_rules_act_together": Case(
        f"patch attn_out layer * {AT}  patch head 3 layer 1 {AT}",
        ("layer",),
        [[*at("attn_out", n), z(1, 3)] for n in range(3)],
    ),
}


@cache
def results(folder: Path, family: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file."""
    start = ("prompts p", "from longer into clean")
    text = "group mixed = L0H1, L1H2.q, L1.mlp\n" + "".join(
        experiment(name, *start, case.rules, DIFFERENCE) for name, case in CASES.items()
    )
    return run_file(text, folder, bare(family), MODES[mode])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinates")
    write_rows(folder)
    return folder


@cache
def expected(family: str, name: str) -> Array:
    return patches(family, CASES[name].cells, "longer", both)


@pytest.mark.parametrize("family", some(FAMILIES, ["gpt2"]))
@pytest.mark.parametrize("name", list(CASES))
def test_each_cell_writes_the_points_that_its_rule_names(
    shared: Path, name: str, family: str
) -> None:
    for mode in ("plain", "padded on the right"):
        found = results(shared, family, mode)[name]
        assert found.axes == CASES[name].axes
        assert len(found.cells) == len(CASES[name].cells)
        base = differences(family, ROWS)
        agree(found.measures[0], expected(family, name), base, large=0.02)


def test_window_bounds_are_shown(shared: Path) -> None:
    found = results(shared, "gpt2", "plain")["window_of_two"]
    assert [cell.coords["layer"] for cell in found.cells] == [0, 1, 2]
    assert found.centres == ("layer",)
    assert "named by its centre" in found.conventions["window"]
    assert [cell.site for cell in found.cells] == ["L0.attn_out", "L0-1.attn_out", "L1-2.attn_out"]


def sources(n: int) -> tuple[Prompt, Prompt, Prompt]:
    return prompt(ROWS[n]), prompt(ROWS[n], "other"), prompt(ROWS[n], "longer")


@pytest.mark.parametrize("mode", list(MODES))
def test_rules_with_several_sources_and_an_ablation_equal_the_reference(
    folder: Path, mode: str
) -> None:
    rules = (
        "patch layer * heads 0, 1 at cue token, last token",
        "patch mlp_out layer 1 at subject token with other",
        "ablate attn_out layer 2 at last token with zero",
    )
    text = experiment("e", "prompts p", "from longer into clean", *rules, DIFFERENCE)
    found = run_file(text, folder, bare("llama"), MODES[mode])["e"]
    assert found.axes == ("layer", "position")
    values = []
    for layer in range(3):
        for place in ("cue", "last"):
            row = []
            for n, record in enumerate(ROWS):
                base, other, longer = sources(n)
                edits = [
                    *copied(
                        [z(layer, 0), z(layer, 1)],
                        unpatched("llama", longer)[1],
                        [getattr(longer, place)],
                        [getattr(base, place)],
                    ),
                    *copied(
                        at("mlp_out", 1),
                        unpatched("llama", other)[1],
                        [other.subject[-1]],
                        [base.subject[-1]],
                    ),
                    *zeroed(at("attn_out", 2), unpatched("llama", base)[1], [base.last]),
                ]
                row.append(difference(patched("llama", base, edits), record))
            values.append(row)
    agree(found.measures[0], np.array(values), differences("llama", ROWS))


@pytest.mark.parametrize("mode", list(MODES))
def test_later_of_two_rules_on_the_same_vector_applies(folder: Path, mode: str) -> None:
    first, second = f"patch attn_out layer 1 {AT}", f"ablate attn_out layer 1 {AT} with zero"
    start = ("prompts p", "from longer into clean")
    text = experiment("zero_stands", *start, first, second, DIFFERENCE)
    text += experiment("patch_stands", *start, second, first, DIFFERENCE)
    text += experiment("zero", *start, second, DIFFERENCE)
    text += experiment("patch", *start, first, DIFFERENCE)
    found = run_file(text, folder, bare("gpt2"), MODES[mode])
    values = {name: result.measures[0].patched for name, result in found.items()}
    assert abs(values["zero"] - values["patch"]).min() > 0.01
    assert abs(values["zero_stands"] - values["zero"]).max() <= 1e-5
    assert abs(values["patch_stands"] - values["patch"]).max() <= 1e-5


def test_loop_variable_hides_a_parameter_of_its_name(tmp_path: Path) -> None:
    rule = "for k in 0..1 { set z layer 1 head 1 at last token to k }"
    text = "param k = 2\n" + support.experiment("e", "prompts p", rule, support.DIFFERENCE)
    support.write_rows(tmp_path)
    checked = support.check_file(text, tmp_path, support.adopted("gpt2"))
    (resolved,) = checked.experiments[0].rules
    assert resolved.amounts is not None
    assert list(resolved.amounts.values.values()) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("line", "measure", "named"),
    [
        ("scale weights of mlp_out layer * neuron 0 by 0", DIFFERENCE, "layer *"),
        (
            "ablate resid_post layer 0 at last token with zero",
            "measure cosine(mlp_hidden layer *, other) at last token as raw",
            "layer *",
        ),
        ("ablate resid_post layer * at last token with zero", DIFFERENCE, ""),
    ],
)
def test_conventions_name_the_layers_of_weights_and_measured_vectors(
    line: str, measure: str, named: str, folder: Path
) -> None:
    """Jamba has neurons in layers 1 and 2 only, and experts in the others."""
    model = jamba()
    text = experiment("e", "prompts p", line, measure)
    expected = f"`{named}` of `mlp_hidden` selects layers 1, 2: other blocks lack this site"
    found = run_file(text, folder, model)["e"].conventions.get("layers")
    assert found == (expected if named else None)


@cache
def jamba() -> object:
    row = next(each for each in tables.every() if each.name == "jamba")
    assert isinstance(row, Architecture)
    return build.model(row)
