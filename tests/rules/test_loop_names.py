"""Variables of `for` loops with the name of a component or of a definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .support import codes, experiment, run_file, try_file

DEFINITIONS = """basis b = pca(p, dims: 2) at k layer 1 head 0 at last token
direction d = mean_difference(p, p.other) at resid_post layer 0
direction d2 = mean_difference(p, p.longer) at resid_post layer 0
group g = k layer 1 heads *
group g2 = L0H1, L1H0
circuit c = embed -> k layer 1 heads *, L0H1 -> L1H0.q
circuit f = fit(eap(size: 12), prompts: p, with: zero, minimise: logit(answer), METHOD)
param n = 1
basis on_layer_n = pca(p, dims: 2) at resid_post layer n at last token
""".replace("METHOD", "measure_on_training_rows: true")

DIRECTIONS = "for {} in [d, d2] {{ add {} to resid_post layer 0 at last token }}"
LAYERS = "for {} in 0..1 {{ patch layer {} head 0 at cue token }}"
NUMBERS = {
    "param": f"{LAYERS}  patch feature 0 of on_layer_n at cue token",
    "group_of_its_name": f"{LAYERS}  ablate g at last token with zero",
    "circuit_of_its_name": f"{LAYERS}  ablate c at last token with zero",
    "directions": DIRECTIONS + "  patch v layer 0 head 0 at cue token",
    "component": "for {} in 0..1 {{ patch k layer 1 head {} at cue token }}",
    "basis": "for {} in [0, 1] {{ patch feature {} of b at cue token }}",
    "group": (
        "for {} in 0..1 {{ patch layer {} head 0 at last token }}  ablate g at last token with zero"
    ),
    "circuit": (
        "for {} in 0..1 {{ patch layer {} head 0 at cue token  ablate c at last token with zero }}"
    ),
    "path": "for {} in 0..1 {{ path layer 0 head {} -> k layer 1 heads * at cue token }}",
    "sweep": (
        "for {} in 0..1 {{ patch layer {} head 0 at cue token }}  "
        "patch k layer * head 0 at cue token"
    ),
}


def test_variable_with_another_meaning_changes_nothing_but_its_axis(data: Path) -> None:
    """A site that begins with the name of a component is the component, in rules and definitions,
    and definitions read the `param`."""
    defined = "\n".join(line for line in DEFINITIONS.split("\n") if line.startswith(KEPT)) + "\n"
    text = defined
    for key, line in NUMBERS.items():
        for name in ("j", LETTERS.get(key, "k")):
            start = "from longer into clean"
            text += experiment(f"{key}_{name}", start, line.replace("{}", name).format())
    found = run_file(text, data, "llama", "planned")
    for key in NUMBERS:
        one, other = (found[f"{key}_{name}"] for name in ("j", LETTERS.get(key, "k")))
        assert [*other.axes] == [LETTERS.get(key, "k") if a == "j" else a for a in one.axes]
        values, others = (each.measures[0].patched for each in (one, other))
        np.testing.assert_array_equal(values, others)
        assert np.abs(values - one.measures[0].base).max() > 1e-3, key


KEPT = ("basis b =", "group g =", "circuit c", "direction", "param n =", "basis on_")
LETTERS = {"directions": "v", "param": "n", "group_of_its_name": "g", "circuit_of_its_name": "c"}
"""The name of the variable, instead of `k`."""

USED_TWICE = {
    "for d in [d, d2] { add d to resid_post layer 0 at last token }": "d",
    "for d in [d2] { add d to resid_post layer 0 at last token }": "d",
    "for g in [g2] { ablate g at last token with zero }": "g",
    "for d in 0..1 { add d * d2 to resid_post layer 0 at last token }": "d",
    "for c in [f] { ablate c at last token with zero }": "c",
}


@pytest.mark.parametrize("line", USED_TWICE)
def test_variable_named_like_a_definition_is_an_error(data: Path, line: str) -> None:
    lines = "from other into clean", line
    result, problems = try_file(DEFINITIONS + experiment("e", *lines), data, "llama")
    assert result is None
    assert problems[0].code == "E0202"
    assert problems[0].message == f"`{USED_TWICE[line]}` is defined twice"


COMPONENTS = (
    "for attn_out in [mlp_out, resid_post] { patch attn_out layer 0 at last token }",
    "for k in [q, v] { patch k layer 1 head 0 at last token }",
    "for z in [g, g2] { ablate z at last token with zero }",
)


@pytest.mark.parametrize("line", COMPONENTS)
def test_variable_over_sites_named_like_a_component_is_an_error(data: Path, line: str) -> None:
    lines = "from other into clean", line
    result, problems = try_file(DEFINITIONS + experiment("e", *lines), data, "llama")
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == ["E0322"]
    assert "it is the name of a component" in problems[0].message
    assert problems[0].help_text == "rename the variable: `for s in …`"


def test_unused_number_variable_named_like_a_component_is_an_error(data: Path) -> None:
    line = "for k in 0..1 { patch k layer 0 head 0 at last token }"
    assert codes(experiment("e", "from other into clean", line), data) == ["E0322"]


LOOP = "for j in 0..1 { patch layer j head 0 at cue token }"
OUTSIDE = {
    "scale mlp_out layer 0 at last token by j": "j",
    "patch layer j head 1 at cue token": "j",
    "block attention layer 0 from last token to token j": "j",
    "observe entropy pattern layer j head 0 at last token as h": "j",
    "for i in 0..1 { patch layer i head j at last token }": "j",
    "for i in 0..1 { patch layer j head i at last token }": "j",
}


@pytest.mark.parametrize("line", OUTSIDE)
@pytest.mark.parametrize("order", ["before", "after"])
def test_variable_outside_of_its_loop_is_an_error(data: Path, line: str, order: str) -> None:
    """It took the values of the loop, without a word."""
    lines = (LOOP, line) if order == "after" else (line, LOOP)
    result, problems = try_file(experiment("e", "from other into clean", *lines), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0322"
    assert problem.message == "`j` can't be used here: this line is outside of its `for`"
    assert problem.help_text == "move this line into the block of `for j in …`"


def test_param_named_like_a_variable_outside_of_its_loop_is_an_error(data: Path) -> None:
    lines = ("from other into clean", LOOP.replace("j", "n"), "patch layer n head 1 at cue token")
    result, problems = try_file(DEFINITIONS + experiment("e", *lines), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0322"
    assert problem.help_text.endswith("or rename the variable if it means the `param n`")


@pytest.mark.parametrize(
    ("name", "reason", "hint"),
    [
        ("b", "over numbers, which hides the basis `b`", "rename the variable"),
        ("i", "over numbers", "let the `for` loop over bases only"),
    ],
)
def test_variable_of_numbers_as_a_basis_is_an_error(
    data: Path, name: str, reason: str, hint: str
) -> None:
    rule = f"for {name} in 0..1 {{ patch feature 0 of {name} at last token }}"
    lines = "from other into clean", rule
    result, problems = try_file(DEFINITIONS + experiment("e", *lines), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0342"
    assert problem.message == f"invalid basis: `{name}` is the variable of a `for` {reason}"
    assert problem.help_text == hint


@pytest.mark.parametrize("name", ["g", "c"])
def test_variable_of_numbers_that_only_names_a_definition_is_unused(data: Path, name: str) -> None:
    """`ablate g` is the group, so that every cell would be the same."""
    line = f"for {name} in 0..1 {{ ablate {name} at last token with zero }}"
    result, problems = try_file(DEFINITIONS + experiment("e", line), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.message == f"`{name}` can't be used here: no rule of this loop uses it"


@pytest.mark.parametrize("values", ["[1]", "[2, 4]"])
def test_edges_of_a_swept_circuit_left_out_one_by_one_are_an_error(data: Path, values: str) -> None:
    rule = "ablate all but top m of f without each edge at last token with zero"
    rule = f"for m in {values} {{ {rule} }}"
    result, problems = try_file(DEFINITIONS + experiment("e", rule), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0108"
    assert "whose edges depend on `m`" in problem.message
    assert problem.help_text == "write a number instead of `m`, and an experiment for each number"


def test_circuits_do_not_see_loops(data: Path) -> None:
    text = "circuit l = embed -> q layer m heads *\n"
    rule = "for m in 0..1 { patch layer m head 0 at cue token }  ablate l at last token with zero"
    text += experiment("e", "from other into clean", rule)
    found = codes(text, data)
    without = codes(
        text.replace("for m in 0..1 { patch layer m", "for j in 0..1 { patch layer j"), data
    )
    assert found == without == ["E0322"]
