"""`using atp_qk` and `using atp_star`: attention weights of the bare model with one replaced query
or key, and gradients without a layer, in 64 bits, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full

from ..execute.support import MODES, ROWS, Prompt, experiment, prompt, run_file, token, try_file
from ..execute.test_stored_values import check_case
from ..quick import some
from ..reference.gradients import Where
from .models import bare, double
from .test_bases import Basis, components
from .test_estimates import (
    LAYERS,
    ONE,
    Key,
    agrees,
    by_hand,
    count_planned_passes,
    heads_at_last,
    measured,
    read,
    whole_subject,
)
from .test_gradient_attention import attending

FAMILIES = ("gpt2", "llama", "gpt_neox")
LINES = ("prompts p", "from other into clean")
RAW, DELTA = measured(ONE, "raw"), measured(ONE, "delta")
_SUBLAYERS = {
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
    "gpt_neox": ("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
}


def projection(family: str, site: str, layer: int) -> tuple[Where, Callable[[int], int]]:
    """The module that computes queries or keys, and the output unit of each head."""
    config = double(family).config
    heads = config.num_attention_heads
    if family == "gpt2":
        first = 0 if site == "q" else heads
        return Where(f"transformer.h.{layer}.attn.c_attn", "out", 3 * heads), lambda h: first + h
    if family == "gpt_neox":
        path = f"gpt_neox.layers.{layer}.attention.query_key_value"
        return Where(path, "out", 3 * heads), lambda h: 3 * h + (site == "k")
    heads = heads if site == "q" else config.num_key_value_heads
    return Where(f"model.layers.{layer}.self_attn.{site}_proj", "out", heads), lambda h: h


@cache
def attention(family: str, row: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Attention weights [head, query, key] of each layer, and the metric's gradient by them."""
    own, record = prompt(ROWS[row]), ROWS[row]
    seen = attending(family)(input_ids=torch.tensor([own.ids]), output_attentions=True)
    logits = seen.logits[0, own.last]
    number = logits[token(record["a"])] - logits[token(record["b"])]
    gradients = torch.autograd.grad(number, seen.attentions)
    return [each[0].detach() for each in seen.attentions], [each[0] for each in gradients]


Edit = Callable[[Tensor, Tensor], Tensor]
"""Vectors of a head in the base and in the other prompt → the written one."""


def changed_attention(
    family: str,
    site: str,
    layer: int,
    head: int,
    row: int,
    positions: Sequence[int],
    edit: Edit = lambda base, other: other,
) -> float:
    """Run the bare model with other queries or keys at these positions, by default those of the
    other prompt."""
    own, source = prompt(ROWS[row]), prompt(ROWS[row], "other")
    at, unit = projection(family, site, layer)
    theirs = read(family, tuple(source.ids), at)

    def swap(part: Any, args: Any, out: Tensor) -> Tensor:
        new = out.clone().unflatten(-1, (at.units, -1))
        for position in positions:
            base, other = (each[position, unit(head)] for each in (new[0], theirs))
            new[0, position, unit(head)] = edit(base, other)
        return new.flatten(-2)

    module = attending(family)
    handle = module.get_submodule(at.path).register_forward_hook(swap)
    with torch.no_grad():
        seen = module(input_ids=torch.tensor([own.ids]), output_attentions=True)
    handle.remove()
    weights, gradients = attention(family, row)
    return float(((seen.attentions[layer][0] - weights[layer]) * gradients[layer]).sum())


Places = Callable[[Prompt], Sequence[int]]
PLACES: dict[str, Places] = {
    "subject tokens": lambda own: own.subject,
    "last token": lambda own: [own.last],
    "tokens *": lambda own: range(own.last + 1),
}


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("family", [*FAMILIES, *some(("gemma2", "gpt_oss"), ("gpt_oss",))])
def test_atp_qk_recomputes_attention_weights_exactly(
    family: str, site: str, mode: str, tmp_path: Path
) -> None:
    """Also with heads that share keys, caps on scores, windows and sinks; cells share vectors."""
    rule = f"patch {site} layer * head * at {', '.join(PLACES)}"
    text = experiment("e", *LINES, rule, "using atp_qk", DELTA)
    found = run_file(text, tmp_path, bare(family), MODES[mode])["e"]
    data, largest = found.measures[0], 0.0
    for cell, values in list(zip(found.cells, data.patched - data.base, strict=True))[::5]:
        at = cell.coords
        positions = PLACES[str(at["position"])]
        given = (family, site, int(str(at["layer"])), int(str(at["head"])))
        wanted = [changed_attention(*given, n, positions(prompt(r))) for n, r in enumerate(ROWS)]
        np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-5)
        largest = max(largest, float(np.abs(wanted).max()))
    assert largest > 1e-2


def last_vectors(family: str, site: str, head: int) -> Tensor:
    """[row, width]: what a head of layer 1 has at the last token."""
    at, unit = projection(family, site, 1)
    rows = (prompt(record) for record in ROWS)
    return torch.stack([read(family, tuple(r.ids), at)[r.last, unit(head)] for r in rows])


def edits_of(family: str, site: str) -> dict[str, Mapping[Key, tuple[int, Edit]]]:
    """Rule → by cell, the head that it writes and what it writes."""
    config = double(family).config
    heads = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or heads if site == "k" else heads

    def coordinate(basis: Basis, number: int) -> Edit:
        def edit(base: Tensor, other: Tensor) -> Tensor:
            change = basis.encode(other) - basis.encode(base)
            return base + change[number] * basis.directions[number]

        return edit

    def some(base: Tensor, other: Tensor) -> Tensor:
        return torch.cat([other[:3], base[3:]])

    each = {
        (head, n): (head, coordinate(components(last_vectors(family, site, head), 2), n))
        for head in range(heads)
        for n in (0, 1)
    }
    zeros = (0, lambda base, _: torch.cat([torch.zeros_like(base[:3]), base[3:]]))
    return {
        "patch feature * of h": each,
        f"patch {site} layer 1 head * dims 0..2": {(n,): (n, some) for n in range(heads)},
        f"ablate {site} layer 1 head 0 dims 0..2": {(): zeros},
    }


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("family", some(FAMILIES, ("llama",)))
def test_atp_qk_recomputes_attention_weights_of_changed_coordinates(
    family: str, site: str, mode: str, tmp_path: Path
) -> None:
    """Of bases of heads, whose features share a vector, and of single numbers."""
    text = f"basis h = pca(p, dims: 2) at {site} layer 1 head * at last token\n"
    cases = edits_of(family, site)
    for number, rule in enumerate(cases):
        fill = " with zero" if rule.startswith("ablate") else ""
        line = f"{rule} at subject tokens{fill}"
        text += experiment(f"e{number}", *LINES, line, "using atp_qk", DELTA)
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for number, cells in enumerate(cases.values()):
        data = found[f"e{number}"].measures[0]
        effects = dict(zip(cells, data.patched - data.base, strict=True))
        for key, (head, edit) in cells.items():
            wanted = [
                changed_attention(family, site, 1, head, n, prompt(r).subject, edit)
                for n, r in enumerate(ROWS)
            ]
            np.testing.assert_allclose(effects[key], wanted, rtol=1e-3, atol=1e-5)
        assert np.abs(data.patched - data.base).max() > 1e-3


@cache
def without_a_layer(family: str, layer: int) -> Any:
    """A copy of the model whose sublayers of this layer have no gradient."""
    module = attending.__wrapped__(family)

    def dropped(part: Any, args: Any, out: Any) -> Any:
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

    for path in _SUBLAYERS[family]:
        module.get_submodule(path.format(layer)).register_forward_hook(dropped)
    return module


def dropped_estimates(family: str, site: str, layer: int | None, cells: Any) -> dict[Key, Any]:
    """Mean over layers of absolute estimates; the layer of a head has no gradient without it."""
    every: list[dict[Key, list[float]]] = []
    for left_out in LAYERS:
        if site == "z" and left_out == layer:
            continue
        given = (family, site, layer, cells, ONE, "gradient_input")
        every.append(by_hand(*given, module=without_a_layer(family, left_out)))
    return {key: np.mean([np.abs(own[key]) for own in every], axis=0) for key in every[0]}


CASES: dict[str, tuple[str, str, Any, tuple[int | None, ...]]] = {
    "heads": ("z", "patch layer * head * at last token", heads_at_last, LAYERS),
    "streams": ("resid_pre", "patch resid_pre layer * at subject tokens", whole_subject, LAYERS),
    "embedding": ("embed", "patch embed at subject tokens", whole_subject, (None,)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_atp_star_averages_estimates_that_each_drop_one_layer(family: str, tmp_path: Path) -> None:
    text = "".join(
        experiment(name, *LINES, rule, "using atp_star", RAW)
        for name, (_, rule, _, _) in CASES.items()
    )
    found = run_file(text, tmp_path, bare(family))
    for name, (site, _, cells, layers) in CASES.items():
        for layer in layers:
            expected = dropped_estimates(family, site, layer, cells)
            assert agrees(found[name], 0, expected, layer) > 1e-3


def test_plan_counts_the_atp_star_passes_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "patch k layer 0..1 head * at subject tokens"
    text = experiment("e", *LINES, rule, "using atp_star", RAW)
    # Two layers with the base run and the other keys; each of three layers is left out once.
    passes = (2 * 2 + 3, 3)
    assert count_planned_passes(text, tmp_path, monkeypatch) == (passes, passes)


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("patch k layer 0..1 head * at subject tokens", (1, 1)),
        ("patch feature * of h at subject tokens", (0, 2)),
        ("patch q layer 1 head * at last token, tokens *", (0, 2)),
    ],
)
def test_plan_counts_a_pass_for_each_value_of_a_query_or_key(
    rule: str, values: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two features of a head, or two positions, write the same vector."""
    text = "basis h = pca(p, dims: 2) at k layer 1 head * at last token\n"
    text += experiment("e", *LINES, rule, "using atp_qk", DELTA)
    planned, counted = count_planned_passes(text, tmp_path, monkeypatch)
    assert planned == (1 + sum(n + 1 for n in values if n), 1)
    assert planned == counted


def test_atp_star_of_all_numbers_of_a_query_equals_that_of_the_query(tmp_path: Path) -> None:
    lines = ("at subject tokens", "using atp_star", RAW)
    text = "".join(
        experiment(name, *LINES, f"patch q layer 1 head *{dims} {lines[0]}", *lines[1:])
        for name, dims in (("whole", ""), ("each", " dims 0..5"))
    )
    found = run_file(text, tmp_path, bare("llama"))
    whole, each = (found[name].measures[0].patched for name in ("whole", "each"))
    np.testing.assert_allclose(each, whole, atol=1e-6)
    assert whole.max() > 1e-3


def test_atp_star_values_are_reported_as_unsigned(tmp_path: Path) -> None:
    rule = "patch z layer * head * at last token"
    found = run_file(experiment("e", *LINES, rule, "using atp_star", RAW), tmp_path, bare("gpt2"))
    assert "AtP* of" in found["e"].to_text()
    assert "no sign" in found["e"].conventions["estimates"]
    assert (found["e"].measures[0].patched >= 0).all()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ("patch z layer 0 head * at last token", "using atp_star", DELTA),
            "which isn't an effect",
        ),
        (
            (
                "patch k layer 0 head * at last token",
                "using atp_qk",
                'measure logprob("w3 w9") as delta',
            ),
            "tokens of a text after the prompt attend to the keys",
        ),
    ],
)
def test_measures_that_atp_does_not_support_are_errors(
    lines: Sequence[str], said: str, tmp_path: Path
) -> None:
    result, problems = try_file(experiment("e", *LINES, *lines), tmp_path, bare("gpt2"))
    (error,) = (each for each in problems if each.severity == "error")
    assert result is None
    assert error.code == "E0608"
    assert said in render_full([error], color=False, width=300)


@pytest.mark.slow
def test_interrupted_atp_star_run_resumes(tmp_path: Path) -> None:
    rule = "patch k layer * head * at subject tokens"
    check_case("llama", experiment("e", *LINES, rule, "using atp_star", RAW), tmp_path, cut=1)
