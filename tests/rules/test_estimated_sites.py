"""`using`: which sites are estimated, against plain autograd on the bare model, and against runs
where a model is linear in the site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.rendering import render_full
from mechdsl.pipeline.options import RunOptions

from ..execute.support import MODES, ROWS, experiment, prompt, run_file, try_file
from ..quick import in_turn
from ..reference.gradients import Where, taken
from ..reference.ruled import ruled
from . import test_transcoders
from .models import bare, double
from .test_bases import Basis, components
from .test_dictionaries import make, replaced
from .test_estimates import ONE, Key, agrees, call_metric, measured, where

FAMILIES = ("gpt2", "llama", "gpt_neox")
LAST = "at last token"
_HIDDEN = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h"}


def site_of(family: str, site: str, layer: int) -> Where:
    """The module of a site; neurons of the MLP are its units."""
    found = where(family, "resid_pre" if site == "mlp_hidden" else site, layer)
    if site != "mlp_hidden":
        return found
    part = double(family).get_submodule(f"{found.path}.{_HIDDEN[family]}")
    width = part.weight.shape[0 if family == "gpt2" else 1]
    return Where(f"{found.path}.{_HIDDEN[family]}", "in", width)


def reads(family: str, at: Where, run: str) -> list[Tensor]:
    """Per row, [T, units, width] of an unpatched run."""
    found: list[Tensor] = []
    for record in ROWS:
        ids = torch.tensor([prompt(record, run).ids])
        own = taken(double(family), at, lambda module, ids=ids: module(input_ids=ids).logits.sum())
        found.append(own.value)
    return found


def gradients(family: str, at: Where, kind: str = "atp") -> list[Tensor]:
    """Per row, [T, units, width]: the gradient of the metric in the clean run."""
    none, module = torch.zeros(()), double(family)
    module = module if kind == "atp" else ruled(module, kind)
    return [
        taken(module, at, call_metric(family, ONE, prompt(record), record, none)).gradient
        for record in ROWS
    ]


def lasts(found: list[Tensor], run: str = "clean") -> Tensor:
    """[row, units, width] at the last token."""
    rows = zip(found, ROWS, strict=True)
    return torch.stack([own[prompt(record, run).last] for own, record in rows])


def products(change: Tensor, gradient: Tensor) -> list[float]:
    """Return one sum per row, from [row, …]."""
    return (change * gradient).flatten(1).sum(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_neurons_and_ablations_equal_autograd(family: str, tmp_path: Path) -> None:
    lines = ("prompts p", "using atp", measured(ONE, "delta"))
    text = experiment(
        "neurons", "from other into clean", f"patch layer 1 neuron 0..4 {LAST}", *lines
    )
    text += experiment("mean", f"ablate layer 1 head * {LAST} with mean", *lines)
    text += experiment("zero", f"ablate mlp_out layer 1 {LAST} with zero", *lines)
    found = run_file(text, tmp_path, bare(family))
    at = site_of(family, "mlp_hidden", 1)
    base, gradient = lasts(reads(family, at, "clean")), lasts(gradients(family, at))
    change = lasts(reads(family, at, "other"), "other") - base
    expected: dict[Key, list[float]] = {
        (n,): products(change[:, n], gradient[:, n]) for n in range(5)
    }
    assert agrees(found["neurons"], 0, expected, None) > 1e-4
    at = site_of(family, "z", 1)
    base, gradient = lasts(reads(family, at, "clean")), lasts(gradients(family, at))
    change = base.mean(0) - base
    heads: dict[Key, list[float]] = {
        (n,): products(change[:, n], gradient[:, n]) for n in range(base.shape[1])
    }
    assert agrees(found["mean"], 0, heads, None) > 1e-4
    at = site_of(family, "mlp_out", 1)
    base, gradient = lasts(reads(family, at, "clean")), lasts(gradients(family, at))
    assert agrees(found["zero"], 0, {(): products(-base, gradient)}, None) > 1e-4


def vectors_of_runs(family: str, at: Where) -> tuple[Tensor, Tensor]:
    """[prompt, width] at the last token, in the runs `clean` and `other`."""
    base = lasts(reads(family, at, "clean")).flatten(1)
    return base, lasts(reads(family, at, "other"), "other").flatten(1)


@pytest.mark.parametrize("site", ["resid_post", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_basis_coordinates_equal_autograd(
    family: str, site: str, tmp_path: Path
) -> None:
    """Principal components of a stream, and of all heads, concatenated."""
    at = site_of(family, "resid_post" if site == "resid_post" else "z", 1)
    base, source = vectors_of_runs(family, at)
    gradient = lasts(gradients(family, at)).flatten(1)
    basis: Basis = components(base, 3)
    change = basis.encode(source) - basis.encode(base)
    expected: dict[Key, list[float]] = {
        (n,): products(change[:, n, None] * basis.directions[n], gradient) for n in range(3)
    }
    place = "resid_post layer 1" if site == "resid_post" else "z layer 1"
    definition = f"basis b = pca(p, dims: 3) at {place} {LAST}\n"
    lines = ("prompts p", "from other into clean", "using atp", measured(ONE, "delta"))
    text = definition + experiment("each", f"patch feature * of b {LAST}", *lines)
    text += experiment("all", f"patch {place} in basis b {LAST}", *lines)
    text += experiment("mean", f"ablate feature 1 of b {LAST} with mean", *lines[:1], *lines[2:])
    found = run_file(text, tmp_path, bare(family))
    assert agrees(found["each"], 0, expected, None) > 1e-3
    whole = products(change @ basis.directions, gradient)
    assert agrees(found["all"], 0, {(): whole}, None) > 1e-3
    codes = basis.encode(base)[:, 1]
    moved = (codes.mean() - codes)[:, None] * basis.directions[1]
    assert agrees(found["mean"], 0, {(): products(moved, gradient)}, None) > 1e-3


@pytest.mark.parametrize("site", ["resid_post", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_basis_coordinates_equal_autograd(
    family: str, site: str, tmp_path: Path
) -> None:
    """The coordinates of a subspace, and one feature of three, move from the base values."""
    at = site_of(family, "resid_post" if site == "resid_post" else "z", 1)
    base, source = vectors_of_runs(family, at)
    basis: Basis = components(base, 3)
    change = basis.encode(source) - basis.encode(base)

    def along(moved: Tensor) -> list[float]:
        found: list[float] = []
        for record, own in zip(ROWS, moved, strict=True):
            here = prompt(record)
            way = torch.zeros(len(here.ids), own.numel(), dtype=own.dtype)
            way[here.last] = own
            forward = call_metric(family, ONE, here, record, torch.zeros(()))
            way = way.unflatten(1, (at.units, -1))
            parts = [
                taken(double(family), at, forward, way * (step + 0.5) / 3).gradient
                for step in range(3)
            ]
            found.append(float((torch.stack(parts).mean(0) * way).sum()))
        return found

    place = "resid_post layer 1" if site == "resid_post" else "z layer 1"
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    lines = (*lines, "using integrated_gradients(steps: 3)")
    text = f"basis b = pca(p, dims: 3) at {place} {LAST}\n"
    text += experiment("all", f"patch {place} in basis b {LAST}", *lines)
    text += experiment("one", f"patch feature 1 of b {LAST}", *lines)
    found = run_file(text, tmp_path, bare(family))
    whole = along(change @ basis.directions)
    assert agrees(found["all"], 0, {(): whole}, None) > 1e-3
    assert agrees(found["one"], 0, {(): along(change[:, 1:2] * basis.directions[1])}, None) > 1e-3


def along_line(family: str, at: Where, ways: Tensor, steps: int) -> Tensor:
    """Return [row, units · width]: the mean gradient at the midpoints of the line on which the
    vectors at the last token move by [row, units · width]."""
    found: list[Tensor] = []
    for record, own in zip(ROWS, ways, strict=True):
        here = prompt(record)
        way = torch.zeros(len(here.ids), own.numel(), dtype=own.dtype)
        way[here.last] = own
        forward = call_metric(family, ONE, here, record, torch.zeros(()))
        way = way.unflatten(1, (at.units, -1))
        parts = [
            taken(double(family), at, forward, way * (step + 0.5) / steps).gradient
            for step in range(steps)
        ]
        found.append(torch.stack(parts).mean(0)[here.last].flatten())
    return torch.stack(found)


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_dictionary_features_equal_autograd(
    family: str, mode: str, tmp_path: Path
) -> None:
    """All features of a site move together, of two sites separately; the error stays."""
    lines = ("prompts p", "from other into clean", "using integrated_gradients(steps: 3)")
    lines = (*lines, measured(ONE, "delta"))
    text, expected = "", dict[str, dict[Key, list[float]]]()
    width = vectors_of_runs(family, site_of(family, "resid_post", 1))[0].shape[1]
    of = make(tmp_path, ARCHITECTURES[family], width)
    for layer in (0, 1):
        at = site_of(family, "resid_post", layer)
        base, source = vectors_of_runs(family, at)
        features, given = of.encode(base), of.encode(source)
        decoded = of.decode(features, base)
        changes = {
            n: of.decode(replaced(features, [n], given), base) - decoded
            for n in range(features.shape[1])
        }
        text += f'basis f{layer} = sae("sae") at resid_post layer {layer}\n'
        for name, own in {"*": list(changes), "3, 5, 6": [3, 5, 6]}.items():
            gradient = along_line(family, at, torch.stack([changes[n] for n in own]).sum(0), 3)
            key = f"{'some' if ',' in name else 'each'}{layer}"
            expected[key] = {(n,): products(changes[n], gradient) for n in own}
            rule = f"patch feature {name} of f{layer} {LAST}"
            text += experiment(key, rule, *lines)
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for key, values in expected.items():
        assert agrees(found[key], 0, values, None) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_bases_of_heads_move_all_heads_together(
    family: str, tmp_path: Path
) -> None:
    """Each head has a basis; whole subspaces and single features."""
    at = site_of(family, "z", 1)
    base, source = (each.unflatten(1, (at.units, -1)) for each in vectors_of_runs(family, at))
    changes: dict[Key, Tensor] = {}
    for head in range(at.units):
        basis: Basis = components(base[:, head], 2)
        moved = basis.encode(source[:, head]) - basis.encode(base[:, head])
        for n in (0, 1):
            own = torch.zeros_like(base)
            own[:, head] = moved[:, n, None] * basis.directions[n]
            changes[head, n] = own.flatten(1)
    gradient = along_line(family, at, torch.stack([*changes.values()]).sum(0), 3)
    lines = ("prompts p", "from other into clean", "using integrated_gradients(steps: 3)")
    lines = (*lines, measured(ONE, "delta"))
    text = f"basis h = pca(p, dims: 2) at z layer 1 head * {LAST}\n"
    text += experiment("each", f"patch feature * of h {LAST}", *lines)
    text += experiment("whole", f"patch z layer 1 head * in basis h {LAST}", *lines)
    found = run_file(text, tmp_path, bare(family))
    each = {key: products(own, gradient) for key, own in changes.items()}
    assert agrees(found["each"], 0, each, None) > 1e-4
    whole = {(h,): np.add(each[h, 0], each[h, 1]).tolist() for h in range(at.units)}
    assert agrees(found["whole"], 0, whole, None) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_cells_that_share_a_head_move_it_once(
    family: str, tmp_path: Path
) -> None:
    at = site_of(family, "z", 1)
    base, source = vectors_of_runs(family, at)
    change = (source - base).unflatten(1, (at.units, -1))
    change[:, 3:] = 0
    gradient = along_line(family, at, change.flatten(1), 3).unflatten(1, (at.units, -1))
    rule = f"for n in [1, 2] {{ patch z layer 1 heads 0, n {LAST} }}"
    lines = ("prompts p", "from other into clean", rule, measured(ONE, "delta"))
    text = experiment("e", *lines, "using integrated_gradients(steps: 3)")
    found = run_file(text, tmp_path, bare(family))["e"]
    expected: dict[Key, list[float]] = {
        (n,): products(change[:, [0, n]], gradient[:, [0, n]]) for n in (1, 2)
    }
    assert agrees(found, 0, expected, None) > 1e-4


PYTHON_BASIS = "encode = decode = lambda self, vectors: vectors"
SEPARATE_MOVES = {
    "same coordinate": "several cells change the same coordinate",
    "same coordinate of all": "several cells change the same coordinate",
    "two bases": "these cells have different bases",
    "without error": "each cell drops the whole reconstruction error",
    "python": "changes by a Python object may not add up",
}


@pytest.mark.parametrize("case", SEPARATE_MOVES)
def test_integrated_gradients_of_changes_that_do_not_add_up_are_an_error(
    case: str, tmp_path: Path
) -> None:
    make(tmp_path, "topk", bare("gpt2").config.hidden_size)
    text = 'basis f = sae("sae") at resid_post layer 1\n'
    text += f"basis b = pca(p, dims: 3) at resid_post layer 1 {LAST}\n"
    text += "basis c = random(dims: 3) at resid_post layer 1\n"
    rule = f"patch feature * of f {LAST}"
    rule = {
        "same coordinate": f"for n in [0, 1] {{ patch features 0, n of b {LAST} }}",
        "same coordinate of all": f"for n in [0, 1] {{ patch features 0, 2, n of b {LAST} }}",
        "two bases": f"for d in [b, c] {{ patch resid_post layer 1 in basis d {LAST} }}",
        "without error": f"{rule} without error",
        "python": rule.replace(" f ", " own "),
    }[case]
    if case == "python":
        (tmp_path / "own.py").write_text(f"class Own:\n    {PYTHON_BASIS}\n", encoding="utf-8")
        text += 'basis own = python("own.py:Own", features: 16) at resid_post layer 1\n'
    lines = ("prompts p", "from other into clean", rule, measured(ONE, "delta"))
    text += experiment("e", *lines, "using integrated_gradients(steps: 3)")
    options = RunOptions(settings=CheckSettings(python="run"))
    _, problems = try_file(text, tmp_path, bare("gpt2"), options)
    assert [each.code for each in problems if each.severity == "error"] == ["E0608"]
    assert SEPARATE_MOVES[case] in render_full(problems, color=False, width=200)


ARCHITECTURES = {"gpt2": "standard", "llama": "topk", "gpt_neox": "layer_norm"}


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, ("atp", "relp", "gim"), FAMILIES))
def test_estimates_of_dictionary_features_equal_autograd(
    family: str, kind: str, tmp_path: Path
) -> None:
    """A feature changes its share of the decoded vector; the error is unchanged."""
    at = site_of(family, "resid_post", 1)
    base, source = vectors_of_runs(family, at)
    gradient = lasts(gradients(family, at, kind)).flatten(1)
    of = make(tmp_path, ARCHITECTURES[family], base.shape[1])
    features, given = of.encode(base), of.encode(source)
    decoded = of.decode(features, base)
    expected: dict[Key, list[float]] = {}
    for n in range(features.shape[1]):
        new = replaced(features, [n], given)
        expected[n,] = products(of.decode(new, base) - decoded, gradient)
    lines = ("prompts p", "from other into clean", f"using {kind}", measured(ONE, "delta"))
    text = 'basis f = sae("sae") at resid_post layer 1\n'
    text += experiment("each", f"patch feature * of f {LAST}", *lines)
    text += experiment("all", f"patch resid_post layer 1 in basis f {LAST}", *lines)
    found = run_file(text, tmp_path, bare(family))
    assert agrees(found["each"], 0, expected, None) > 1e-3
    whole = products(of.decode(given, base) - decoded, gradient)
    assert agrees(found["all"], 0, {(): whole}, None) > 1e-3


def inputs_of_mlp(family: str, layer: int, run: str) -> Tensor:
    """[row, width] at the last token."""
    at = where(family, "mlp_out", layer)
    return lasts(reads(family, replace(at, side="in"), run), run).flatten(1)


CROSSING = ("atp", "relp", "gim", "atp_qk")


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, CROSSING[:3], FAMILIES))
def test_estimates_of_transcoder_features_equal_autograd(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Features of the MLP's input write to its output, and those of a cross-layer transcoder also
    to the outputs of later MLPs."""
    layers = (1, 2)
    width = inputs_of_mlp(family, 1, "clean").shape[1]
    of = test_transcoders.make(tmp_path, "jumprelu_transcoder", width)
    hook = "ln2.hook_normalized"
    parts = test_transcoders.make_cross_layer(tmp_path, width, hook, 3)[1]
    base, source = (inputs_of_mlp(family, 1, run) for run in ("clean", "other"))
    gradient = {
        layer: lasts(gradients(family, where(family, "mlp_out", layer), kind)).flatten(1)
        for layer in layers
    }
    change = of.encode(source) - of.encode(base)
    across = test_transcoders.encode_across(parts, source)
    across = across - test_transcoders.encode_across(parts, base)
    expected: dict[str, dict[Key, list[float]]] = {"t": {}, "c": {}}
    for n in range(change.shape[1]):
        expected["t"][n,] = products(change[:, n, None] * of.weights["W_dec"][n], gradient[1])
        each = [
            products(across[:, n, None] * parts["W_dec"][n, number], gradient[layer])
            for number, layer in enumerate(layers)
        ]
        expected["c"][n,] = np.sum(each, axis=0).tolist()
    text = 'basis t = transcoder("of_mlp") at mlp_out layer 1\n'
    text += 'basis c = transcoder("clt") at mlp_out layer 1\n'
    lines = ("prompts p", "from other into clean", f"using {kind}", measured(ONE, "delta"))
    for name in expected:
        text += experiment(f"x{name}", f"patch feature * of {name} {LAST}", *lines)
    found = run_file(text, tmp_path, bare(family))
    for name, values in expected.items():
        assert agrees(found[f"x{name}"], 0, values, None) > 1e-3


def test_atp_star_of_features_that_write_to_several_layers_is_an_error(tmp_path: Path) -> None:
    width = bare("gpt2").config.hidden_size
    test_transcoders.make_cross_layer(tmp_path, width, "ln2.hook_normalized", 3)
    text = 'basis c = transcoder("clt") at mlp_out layer 1\n'
    rule = f"patch feature 2 of c {LAST}"
    lines = ("prompts p", "from other into clean", "using atp_star", measured(ONE, "raw"))
    _, problems = try_file(text + experiment("e", rule, *lines), tmp_path, bare("gpt2"))
    assert [each.code for each in problems if each.severity == "error"] == ["E0608"]
    assert "drops a part of it" in render_full(problems, color=False, width=200)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_transcoder_features_equal_autograd(
    family: str, tmp_path: Path
) -> None:
    width = inputs_of_mlp(family, 1, "clean").shape[1]
    of = test_transcoders.make(tmp_path, "transcoder", width)
    codes = [of.encode(inputs_of_mlp(family, 1, run)) for run in ("clean", "other")]
    ways = (codes[1] - codes[0])[:, :, None] * of.weights["W_dec"]
    at = where(family, "mlp_out", 1)
    gradient = along_line(family, at, ways.sum(1), 3)
    expected: dict[Key, list[float]] = {
        (n,): products(ways[:, n], gradient) for n in range(ways.shape[1])
    }
    text = 'basis t = transcoder("of_mlp") at mlp_out layer 1\n'
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    rule = f"patch feature * of t {LAST}"
    text += experiment("e", rule, *lines, "using integrated_gradients(steps: 3)")
    found = run_file(text, tmp_path, bare(family))
    assert agrees(found["e"], 0, expected, None) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_integrated_gradients_of_cross_layer_features_equal_autograd(
    family: str, layer: int, tmp_path: Path
) -> None:
    """The outputs of the MLPs of their layer and of all later ones move together."""
    width, hook = inputs_of_mlp(family, 1, "clean").shape[1], "ln2.hook_normalized"
    parts = test_transcoders.make_cross_layer(tmp_path, width, hook, 3)[layer]
    base, source = (
        test_transcoders.encode_across(parts, inputs_of_mlp(family, layer, run))
        for run in ("clean", "other")
    )
    ways = (source - base)[:, :, None, None] * parts["W_dec"]  # [row, feature, layer, width]
    layers = [where(family, "mlp_out", n) for n in range(layer, 3)]
    steps, expected = 3, dict[Key, list[float]]()
    sums: list[Tensor] = []
    for record, own in zip(ROWS, ways, strict=True):
        here = prompt(record)
        call = call_metric(family, ONE, here, record, torch.zeros(()))
        total = torch.zeros(own.shape[0], dtype=torch.float64)
        for step in range(steps):
            module, moves = double(family), list[Tensor]()
            handles: list[Any] = []
            for number, at in enumerate(layers):
                move = (own[:, number].sum(0) * (step + 0.5) / steps).requires_grad_()
                moves.append(move)

                def add(
                    _: Any, __: Any, out: Any, move: Tensor = move, last: int = here.last
                ) -> Any:
                    given = out if isinstance(out, Tensor) else out[0]
                    found = given.clone()
                    found[0, last] = found[0, last] + move
                    return found if isinstance(out, Tensor) else (found, *out[1:])

                handles.append(module.get_submodule(at.path).register_forward_hook(add))
            try:
                gradients_ = torch.autograd.grad(call(module), moves)
            finally:
                for handle in handles:
                    handle.remove()
            for number, gradient in enumerate(gradients_):
                total += own[:, number] @ gradient / steps
        sums.append(total)
    for n in range(ways.shape[1]):
        expected[n,] = [float(own[n]) for own in sums]
    text = f'basis c = transcoder("clt") at mlp_out layer {layer}\n'
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    rule = f"patch feature * of c {LAST}"
    text += experiment("e", rule, *lines, f"using integrated_gradients(steps: {steps})")
    text += experiment("many", rule, *lines, "using integrated_gradients(steps: 256)")
    text += experiment("exact", f"patch features * of c {LAST}", *lines)
    found = run_file(text, tmp_path, bare(family))
    least = 1e-3 if layer else 0.0  # in layer 0, the inputs may be equal in both runs
    assert agrees(found["e"], 0, expected, None) >= least
    many, exact = (found[key].measures[0] for key in ("many", "exact"))
    sum_of_all = (many.patched - many.base).sum(0)
    np.testing.assert_allclose(sum_of_all, (exact.patched - exact.base)[0], atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_dims_equal_autograd(family: str, tmp_path: Path) -> None:
    at = site_of(family, "resid_post", 1)
    change = lasts(reads(family, at, "other"), "other") - lasts(reads(family, at, "clean"))
    change, gradient = change.flatten(1)[:, :4], lasts(gradients(family, at)).flatten(1)[:, :4]
    rule = f"patch resid_post layer 1 dims 0..3 {LAST}"
    lines = ("prompts p", "from other into clean", "using atp", measured(ONE, "delta"))
    found = run_file(experiment("four", rule, *lines), tmp_path, bare(family))
    assert agrees(found["four"], 0, {(): products(change, gradient)}, None) > 1e-3


LINEAR = (
    f"patch resid_post layer 2 {LAST}",
    f"patch mlp_out layer 2 {LAST}",
    f"patch layer 2 neuron 0..3 {LAST}",
    f"ablate layer 2 neuron 0..3 {LAST} with mean",
    f"ablate mlp_out layer 2 {LAST} with zero",
)
EXACT = ("gradient_input", "integrated_gradients(steps: 2)", "relp", "gim", "atp_qk")


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, EXACT, FAMILIES))
def test_estimate_of_a_linear_model_equals_its_run(family: str, kind: str, tmp_path: Path) -> None:
    """Without norms, logits are linear in what the last block adds to the stream."""
    lines = ("prompts p", measured(ONE, "delta"))
    rules = (*LINEAR, f"patch layer 2 head * {LAST}") if family == "gpt_neox" else LINEAR
    text = f"basis b = pca(p, dims: 3) at resid_post layer 2 {LAST}\n"
    whole = f"patch resid_post layer 2 in basis b {LAST}"
    rules = (*rules, whole if "steps" in kind else f"patch feature * of b {LAST}")
    for number, rule in enumerate(rules):
        own = (rule,) if rule.startswith("ablate") else ("from other into clean", rule)
        text += experiment(f"run{number}", *lines, *own)
        text += experiment(f"estimate{number}", *lines, *own, f"using {kind}")
    found = run_file(text, tmp_path, bare(f"{family} without norms"))
    for number, rule in enumerate(rules):
        run, own = (found[f"{name}{number}"].measures[0] for name in ("run", "estimate"))
        effect = run.patched - run.base
        size = max(1.0, float(np.abs(run.base).max()))
        assert np.abs(effect).max() > 1e-4, rule
        assert np.abs(own.patched - own.base - effect).max() <= 1e-5 * size, rule


def test_atp_alias_equals_gradient_input(tmp_path: Path) -> None:
    lines = ("prompts p", "from other into clean", f"patch z layer * head * {LAST}")
    text = experiment("one", *lines, "using atp", measured(ONE, "delta"))
    text += experiment("two", *lines, "using gradient_input", measured(ONE, "delta"))
    found = run_file(text, tmp_path, bare("gpt2"))
    one, two = found["one"], found["two"]
    np.testing.assert_array_equal(one.measures[0].patched, two.measures[0].patched)
    assert one.measures[0].estimator == two.measures[0].estimator == "gradient_input"
    assert one.conventions["estimates"].startswith("`atp` is `gradient_input`: ")
    assert two.conventions["estimates"].startswith("`gradient_input`: ")
