"""`for b in [more, less] { patch SITE in basis b … }` and `for g in [starts, ends] { ablate g … }`,
against an experiment for each basis or group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.execute.run_record import ExecutionProfile
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.store.store import Store

from ..execute.support import by_name, run_on, shared
from .models import bare
from .support import BLOCKS, MANY, codes, experiment, run_file, try_file
from .test_dictionaries import make
from .test_inactive_features import width_of

BASES = {
    "a": "pca(p, dims: 3) at resid_post layer 1 at last token",
    "b": "random(dims: 3) at resid_post layer 1",
    "c": 'saved("r.safetensors", "r") at resid_post layer 1',
    "d": 'sae("sae") at resid_post layer 1',
    "g": "random(dims: 4) at resid_post layer *",
}
DEFINED = "".join(f"basis {name} = {made}\n" for name, made in BASES.items())
FROM = "from other into clean  "
RULES = {
    "whole": (FROM + "patch resid_post layer 1 in basis {} at last token", "abcdg"),
    "features": (FROM + "patch feature 0..2 of {} at last token", "abc"),
    "joined": (FROM + "patch features 0, 2 of {} at cue token, last token", "abc"),
    "mean": ("ablate resid_post layer 1 in basis {} at last token with mean", "abc"),
    "zero": ("ablate resid_post layer 1 in basis {} at tokens * with zero", "abcd"),
    "scale": (
        "for m in [-1, 2] {{ scale resid_post layer 1 in basis {} at last token by m }}",
        "ad",
    ),
    "layers": (FROM + "patch resid_post layer * in basis {} at last token", "bg"),
    "both": (
        FROM + "patch mlp_out layer 0 in basis b at last token  "
        "patch resid_post layer 1 in basis {} at last token",
        "abd",
    ),
}


def write_files(folder: Path, family: str) -> None:
    width = width_of(family)
    make(folder, "jumprelu", width)
    torch.manual_seed(0)
    save_file({"r": torch.randn(3, width)}, folder / "r.safetensors")


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_loop_over_bases_equals_an_experiment_per_basis(family: str, mode: str, data: Path) -> None:
    write_files(data, family)
    text = DEFINED
    for key, (rule, names) in RULES.items():
        loop = f"for v in [{', '.join(names)}] {{ {rule.format('v')} }}"
        if rule.startswith(FROM):
            loop = FROM + loop.replace(FROM, "")
        text += experiment(f"all_{key}", loop)
        text += "".join(experiment(f"{key}_{name}", rule.format(name)) for name in names)
    found = run_file(text, data, family, mode)
    for key, (_, names) in RULES.items():
        whole = found[f"all_{key}"]
        assert whole.axes[0] == "v"
        cells = [cell.coords["v"] for cell in whole.cells]
        effects = []
        for name in names:
            own = found[f"{key}_{name}"].measures[0].patched
            mine = whole.measures[0].patched[[each == name for each in cells]]
            np.testing.assert_allclose(mine, own, atol=2e-5)
            effects.append(own)
        differ = max(np.abs(one - effects[0]).max() for one in effects[1:])
        assert differ > 0.01, key


def ran(text: str, folder: Path, bases: str = DEFINED) -> tuple[ExperimentResult, int]:
    """The result of one experiment with a store, and the number of rows that ran."""
    profiles: list[ExecutionProfile] = []
    options = RunOptions(on_profile=lambda _, profile: profiles.append(profile))
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{bases}{text}'
    source, models = Source(whole, folder / "file.mech"), {"m": shared(bare("gpt2"))}
    with Store(folder / "store") as kept, kept.begin(whole, {}) as opened:
        found = by_name(*run_on(source, models, options, opened))
        opened.finish({}, {})
    (result,) = found.values()
    return result, sum(profile.distinct for profile in profiles)


def test_store_distinguishes_bases_of_a_loop(data: Path) -> None:
    """A cell of the loop has the same store key as an experiment with that basis."""
    write_files(data, "gpt2")
    rule = "patch resid_post layer 1 in basis {} at last token"
    first, count = ran(experiment("e", FROM + rule.format("a")), data)
    assert count > 0
    loop = FROM + f"for v in [b, a] {{ {rule.format('v')} }}"
    both, more = ran(experiment("e", loop), data)
    assert more == count
    np.testing.assert_array_equal(both.measures[0].patched[1], first.measures[0].patched[0])
    assert np.abs(both.measures[0].patched[0] - first.measures[0].patched[0]).max() > 0.01
    again, none = ran(experiment("e", loop), data)
    assert none == 0
    np.testing.assert_array_equal(again.measures[0].patched, both.measures[0].patched)


def test_loop_over_bases_reports_the_error_of_each_dictionary(data: Path) -> None:
    write_files(data, "llama")
    second = 'basis f = sae("sae") at resid_post layer 1\n'
    rule = "for v in [d, f, a] { patch resid_post layer 1 in basis v at last token }"
    found = run_file(DEFINED + second + experiment("x", FROM + rule), data, "llama", "planned")["x"]
    said = {key: text for key, text in found.conventions.items() if key.startswith("error of")}
    assert said.keys() == {"error of d", "error of f"}
    assert len(set(said.values())) == 1


def two_dictionaries(folder: Path) -> str:
    """Bases `x` and `y`."""
    for name, architecture in (("x", "topk"), ("y", "jumprelu")):
        (folder / name).mkdir(exist_ok=True)
        make(folder / name, architecture, width_of("gpt2"))
    return "".join(f'basis {name} = sae("{name}/sae") at resid_post layer 1\n' for name in "xy")


def test_errors_of_two_dictionaries_do_not_depend_on_loop_order(data: Path) -> None:
    """Also from the store, in any order."""
    bases = two_dictionaries(data)
    rule = FROM + "for v in [{}] {{ patch resid_post layer 1 in basis v at last token }}"
    alone = [
        ran(experiment("e", rule.format(name)), data, bases)[0].conventions[f"error of {name}"]
        for name in "xy"
    ]
    assert alone[0] != alone[1]
    text = bases + experiment("e", rule.format("x, y"))
    fresh = run_file(text, data, "gpt2", "planned")["e"]  # without the store
    assert [fresh.conventions[f"error of {name}"] for name in "xy"] == alone
    for order in ("x, y", "y, x", "x, y"):
        both, _ = ran(experiment("e", rule.format(order)), data, bases)
        assert [both.conventions[f"error of {name}"] for name in "xy"] == alone


def test_loop_over_dictionaries_stores_their_errors(data: Path) -> None:
    bases = two_dictionaries(data)
    rule = FROM + "for v in [x, y] { patch resid_post layer 1 in basis v at last token }"
    first, _ = ran(experiment("e", rule), data, bases)
    again, none = ran(experiment("e", rule), data, bases)
    assert none == 0
    errors = [[each.conventions[f"error of {name}"] for name in "xy"] for each in (first, again)]
    assert errors[0] == errors[1]
    assert errors[0][0] != errors[0][1]


@pytest.mark.parametrize(
    ("loop", "code"),
    [
        ("for v in [a, nothing] { patch resid_post layer 1 in basis v at last token }", "E0342"),
        ("for v in [1, 2] { patch resid_post layer 1 in basis v at last token }", "E0342"),
        ("for v in [a, b] { patch resid_post layer 1 in basis w at last token }", "E0201"),
        ("for v in [a, d] { patch feature 0 of v at last token }", "E0342"),
        (
            "for v in [a, d] { ablate resid_post layer 1 in basis v at last token with mean }",
            "E0342",
        ),
        ("for v in [a, b] { patch mlp_hidden layer 1 in basis v at last token }", "E0342"),
        ("for v in [a, g] { patch resid_post layer 5 in basis v at last token }", "E0302"),
    ],
)
def test_invalid_loops_over_bases_are_errors(loop: str, code: str, data: Path) -> None:
    write_files(data, "llama")
    assert code in codes(DEFINED + experiment("e", FROM + loop), data)


@pytest.mark.parametrize(
    "rule",
    [
        FROM + "for v in [wrong, a] { patch resid_post layer 1 in basis v at last token }",
        FROM + "for v in [a, wrong] { patch feature 0 of v at last token }",
        "for v in [up, down] { add v to resid_post layer 1 at last token }",
    ],
)
def test_loop_over_a_definition_with_an_error_reports_only_the_definition(
    rule: str, data: Path
) -> None:
    write_files(data, "llama")
    text = "basis wrong = random(dims: 3, size: 3) at resid_post layer 1\n"
    if "up" in rule:
        at = "at resid_post layer 1 at last token\n"
        text = f"direction up = mean(p, folds: 3) {at}direction down = mean(p) {at}"
    assert codes(DEFINED + text + experiment("e", rule), data) == ["E0207"]


@pytest.mark.parametrize("verb", ["scale c at last token by 2", "ablate c at last token with zero"])
def test_rule_on_a_basis_of_a_loop_names_its_features(verb: str, data: Path) -> None:
    write_files(data, "llama")
    text = DEFINED + experiment("e", f"for c in [a, b] {{ {verb} }}")
    _, found = try_file(text, data, "llama")
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0207"
    assert "`a` is a basis, and rules name its features" in error.message
    assert "write `features * of c`" in str(error.help_text)


GROUPS = """
group starts = L1H0, L1H1
group ends = L0H2, mlp_out layer 2, top 1 of found
"""
RULES_OF_GROUPS = (
    ("", "ablate {} at last token with zero", "against random(5)"),
    ("", "ablate z layers * heads * except {} at cue token with mean", ""),
    ("generate 2", "scale {} at last token by 3", ""),
)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loop_over_groups_equals_an_experiment_per_group(family: str, data: Path) -> None:
    text = GROUPS + experiment("found", "ablate z layer * head * at last token with zero")
    for number, (first, rule, last) in enumerate(RULES_OF_GROUPS):
        loop = f"for g in [starts, ends] {{ {rule.format('g')} }}"
        text += experiment(f"all{number}", first, loop, last)
        for name in ("starts", "ends"):
            text += experiment(f"{name}{number}", first, rule.format(name), last)
    found = run_file(text, data, family, "planned")
    for number in range(len(RULES_OF_GROUPS)):
        both = found[f"all{number}"]
        assert [cell.coords["g"] for cell in both.cells] == ["starts", "ends"]
        alone = [found[f"{name}{number}"].measures[0].patched for name in ("starts", "ends")]
        np.testing.assert_allclose(both.measures[0].patched, np.concatenate(alone), atol=2e-5)
        assert np.abs(alone[0] - alone[1]).max() > 0.01


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("for g in [starts, mlp_out] { scale g at last token by 2 }", "is a group"),
        ("for g in [starts, ends] { scale g layer 1 at last token by 2 }", "is a group"),
        ("for g in [starts, L1H0] { scale g at last token by 2 }", "looped over"),
    ],
)
def test_invalid_loops_over_groups_are_errors(loop: str, said: str, data: Path) -> None:
    groups = "group starts = L1H0, L1H1\ngroup ends = L0H2, mlp_out layer 2\n"
    _, found = try_file(groups + experiment("e", loop), data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert any(said in str(each) for each in errors), errors


def test_loop_over_reconstructions_equals_an_experiment_per_basis(data: Path) -> None:
    """Each cell equals an experiment with that basis alone."""
    text = "basis a = random(dims: 5) at resid_post layer 1\n"
    text += "basis b = pca(p, dims: 3) at resid_post layer 1\n"
    rule = "set resid_post layer 1 at tokens * to reconstruction of "
    text += experiment("both", f"for own in [a, b] {{ {rule}own }}")
    text += experiment("one", rule + "a") + experiment("two", rule + "b")
    found = run_file(text, data, "llama", "planned")
    both, one, two = (found[name].measures[0].patched for name in ("both", "one", "two"))
    np.testing.assert_allclose(both, np.concatenate([one, two]), atol=1e-5)
    assert np.abs(one - two).max() > 0.01
