"""Singular vectors of Jacobians, against autograd on the bare model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechdsl.base.text import Source
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import Cost, PanelCount
from mechdsl.planner.plan import Plan

from ..execute.support import run_on, shared
from ..reference.forward import Changes, Write
from ..reference.noise import keyed_by_number, noise
from .models import bare, double
from .support import (
    BLOCKS,
    MANY,
    Text,
    agree,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)
from .test_bases import Basis

HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
S0, S2 = "resid_post layer 0", "resid_post layer 2"
RULE = "from other into clean  patch feature * of j at last token"
COUNT = 3


def block(family: str, layer: int) -> nn.Module:
    model = double(family)
    match family:
        case "gpt2":
            return model.transformer.h[layer]
        case "gpt_neox":
            return model.gpt_neox.layers[layer]
        case _:
            return model.model.layers[layer]


def jacobian(
    family: str,
    ids: tuple[int, ...],
    token: int,
    source: int,
    target: int,
    noise: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """[width, width]: the output of block `target` by that of block `source`, at one token.

    Args:
        noise: Token → vector added to its embedding.
    """
    model = double(family)
    found: list[Tensor] = []

    def put(change: Tensor) -> Callable[..., object]:
        def hook(module: nn.Module, given: object, out: object) -> object:
            stream = out[0] if isinstance(out, tuple) else out
            assert isinstance(stream, Tensor)
            moved = stream.clone()
            moved[0, token] += change
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        return hook

    def read(module: nn.Module, given: object, out: object) -> None:
        stream = out[0] if isinstance(out, tuple) else out
        assert isinstance(stream, Tensor)
        found.append(stream[0, token])

    def add_noise(module: nn.Module, given: object, out: Tensor) -> Tensor:
        moved = out.clone()
        for position, vector in (noise or {}).items():
            moved[0, position] += vector
        return moved

    def run(change: Tensor) -> Tensor:
        with (
            model.get_input_embeddings().register_forward_hook(add_noise),
            block(family, source).register_forward_hook(put(change)),
            block(family, target).register_forward_hook(read),
        ):
            model(torch.tensor([ids]), use_cache=False)
        return found.pop()

    with torch.enable_grad():
        got = torch.autograd.functional.jacobian(run, torch.zeros(width(family)).double())
    assert isinstance(got, Tensor)
    return got


def width(family: str) -> int:
    return plain(family, rows()[0])["resid_post", 0].shape[-1]


def worked_basis(
    family: str, at: str, source: int, target: int, *, left: bool = False, run: str = "clean"
) -> Basis:
    """The mean over rows of the mean over tokens, by an eigendecomposition in float64."""
    products: list[Tensor] = []
    for row in rows(run):
        own = [jacobian(family, row.ids, t, source, target) for t in tokens(row, at)]
        each = [j @ j.T if left else j.T @ j for j in own]
        products.append(torch.stack(each).mean(0))
    vectors = torch.linalg.eigh(torch.stack(products).mean(0))[1].T.flip(0)[:COUNT]
    sign = torch.tensor([float(torch.sign(v[v.abs().argmax()])) for v in vectors])
    return Basis(vectors * sign[:, None], torch.zeros(vectors.shape[1]).double())


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MANY, "padded on the right", "small passes"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_jacobians_of_a_noised_run_are_averaged_over_draws(
    family: str, mode: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed_by_number(monkeypatch)
    noisy = BLOCKS.replace(
        "corrupt other",
        "corrupt noisy { add gaussian(std: 0.7, samples: 3) to embed at subject tokens }\n"
        "  corrupt other",
        1,
    )
    text = f"basis j = jacobian(p.noisy, {S0} -> {S2}, dims: {COUNT}) at {S0} at subject tokens\n"
    rule = "from other into clean  patch feature * of j at last token"
    found = run_file(text + experiment("e", rule), data, family, mode, blocks=noisy)["e"]
    products: list[Tensor] = []
    for n, row in enumerate(rows()):
        every = tokens(row, "subject tokens")
        own: list[Tensor] = []
        for draw in range(3):
            added = {at: 0.7 * noise(n, draw, at, width(family)) for at in every}
            each = [jacobian(family, row.ids, at, 0, 2, added) for at in every]
            own += [j.T @ j for j in each]
        products.append(torch.stack(own).mean(0))
    vectors = torch.linalg.eigh(torch.stack(products).mean(0))[1].T.flip(0)[:COUNT]

    def changes(n: int, feature: int) -> list[Changes]:
        row, other = rows()[n], rows("other")[n]
        source, now = (plain(family, t)["resid_post", 0][t.last] for t in (other, row))
        new = now + ((source - now) @ vectors[feature])[:, None] * vectors[feature]
        return [([Write("resid_post", 0, new, row.last)], ())]

    cells = [(feature,) for feature in range(COUNT)]
    expected = worked_out(family, cells, changes, rows(), records())
    agree(found, ("feature",), expected, unpatched(family), most=False, large=0.001)
    quiet = worked_basis(family, "subject tokens", 0, 2)
    assert (vectors @ quiet.directions.T).abs().diagonal().min() < 0.999


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize(
    ("at", "position", "left", "run"),
    [
        ("last token", "", False, "p"),
        ("last token", "", True, "p"),
        ("{token 1, token 3}", " at {token 1, token 3}", False, "p"),
        ("last token", "", False, "p.other"),
        ("subject tokens", " at subject tokens", False, "p"),
    ],
)
def test_jacobian_basis_equals_the_reference(
    at: str, position: str, left: bool, run: str, family: str, mode: str, data: Path
) -> None:
    own = 2 if left else 1
    text = f"basis j = jacobian({run}, resid_post layer 1 -> resid_post layer 2, dims: {COUNT}) "
    text += f"at resid_post layer {own}{position}\n"
    found = run_file(text + experiment("e", RULE), data, family, mode)["e"]
    name = "other" if run == "p.other" else "clean"
    basis = worked_basis(family, at, 1, 2, left=left, run=name)

    def changes(n: int, feature: int) -> list[Changes]:
        row, other = rows()[n], rows("other")[n]
        source = plain(family, other)["resid_post", own][other.last]
        now = plain(family, row)["resid_post", own][row.last]
        change = (basis.encode(source) - basis.encode(now))[:, feature, None]
        new = now + change * basis.directions[feature]
        return [([Write("resid_post", own, new, row.last)], ())]

    cells = [(feature,) for feature in range(COUNT)]
    expected = worked_out(family, cells, changes, rows(), records())
    agree(found, ("feature",), expected, unpatched(family), most=False, large=0.001)


@pytest.mark.parametrize("head", [None, 1])
def test_jacobian_of_attn_out_by_z_equals_the_output_projection(
    head: int | None, data: Path
) -> None:
    """The Jacobian of `attn_out` by `z` is the output projection, for any row."""
    weight = double("llama").model.layers[1].self_attn.o_proj.weight.detach()
    size = plain("llama", rows()[0])["z", 1].shape[-1]
    site, count = "z layer 1", size * plain("llama", rows()[0])["z", 1].shape[-2]
    if head is not None:
        weight = weight[:, head * size : (head + 1) * size]
        site, count = f"z layer 1 head {head}", size
    vectors = np.linalg.svd(weight.numpy(), full_matrices=False)[2][:COUNT]
    text = f"basis j = jacobian(p, {site} -> attn_out layer 1, dims: {COUNT}) at {site}\n"
    rule = f"from other into clean  patch {site} in basis j at last token"
    found = run_file(text + experiment("e", rule), data, "llama", "planned")["e"]
    values = torch.from_numpy(vectors)
    assert values.shape[1] == count

    def changes(n: int) -> list[Changes]:
        row, other = rows()[n], rows("other")[n]
        now, source = (
            plain("llama", each)["z", 1][each.last].flatten()
            if head is None
            else plain("llama", each)["z", 1][each.last, head]
            for each in (row, other)
        )
        new = now + (source - now) @ values.T @ values
        if head is None:
            return [([Write("z", 1, new.view(-1, size), row.last)], ())]
        return [([Write("z", 1, new, row.last, head)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(found, (), expected, unpatched("llama"), most=False, large=0.001)


def test_jacobian_of_logits_equals_autograd_at_the_token(data: Path) -> None:
    """After the last block, their Jacobian goes through the final norm and the unembedding."""
    model, site = double("llama"), "resid_post layer 2"
    products: list[Tensor] = []
    for row in rows():
        now = plain("llama", row)["resid_post", 2][row.last, 0]
        with torch.enable_grad():
            found = torch.autograd.functional.jacobian(
                lambda x: model.lm_head(model.model.norm(x)), now
            )
        assert isinstance(found, Tensor)
        products.append(found.T @ found)
    values = torch.linalg.eigh(torch.stack(products).mean(0))[1].T.flip(0)[:COUNT]
    text = f"basis j = jacobian(p, {site} -> logits, dims: {COUNT}) at {site}\n"
    rule = f"from other into clean  patch {site} in basis j at last token"
    own = run_file(text + experiment("e", rule), data, "llama", "planned")["e"]

    def changes(n: int) -> list[Changes]:
        row, other = rows()[n], rows("other")[n]
        now, source = (plain("llama", t)["resid_post", 2][t.last] for t in (row, other))
        return [([Write("resid_post", 2, now + (source - now) @ values.T @ values, row.last)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(own, (), expected, unpatched("llama"), most=False, large=0.001)


def test_jacobian_of_one_head_equals_autograd(data: Path) -> None:
    """The Jacobian of a head's output by the stream before its layer."""
    size, products = plain("llama", rows()[0])["z", 1].shape[-1], []
    projection = double("llama").model.layers[1].self_attn.o_proj
    for row in rows():

        def run(change: Tensor, row: Text = row) -> Tensor:
            found: list[Tensor] = []

            def put(module: nn.Module, given: object, out: Tensor) -> Tensor:
                moved = out.clone()
                moved[0, row.last] += change
                return moved

            def read(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                found.append(given[0][0, row.last, size : 2 * size])

            with (
                block("llama", 0).register_forward_hook(put),
                projection.register_forward_pre_hook(read),
            ):
                double("llama")(torch.tensor([row.ids]), use_cache=False)
            return found[0]

        with torch.enable_grad():
            own = torch.autograd.functional.jacobian(run, torch.zeros(width("llama")).double())
        assert isinstance(own, Tensor)
        products.append(own @ own.T)
    values = torch.linalg.eigh(torch.stack(products).mean(0))[1].T.flip(0)[:2]
    site = "z layer 1 head 1"
    text = f"basis j = jacobian(p, {S0} -> {site}, dims: 2) at {site}\n"
    rule = f"from other into clean  patch {site} in basis j at last token"
    found = run_file(text + experiment("e", rule), data, "llama", "planned")["e"]

    def changes(n: int) -> list[Changes]:
        row, other = rows()[n], rows("other")[n]
        now, source = (plain("llama", each)["z", 1][each.last, 1] for each in (row, other))
        return [([Write("z", 1, now + (source - now) @ values.T @ values, row.last, 1)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(found, (), expected, unpatched("llama"), most=False, large=0.001)


def test_plan_counts_a_backward_pass_per_number_and_token(data: Path) -> None:
    """The passes run through the blocks between the sites."""
    plans: list[Plan] = []
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    two = "{token 1, token 3}"
    text = f"basis j = jacobian(p, {S0} -> {S2}, dims: 2) at {S0} at {two}\n"
    text += f"basis k = pca(p, dims: 2) at {S2} at last token\n"
    costs: list[Cost] = []
    for own in ("j", "k"):
        rule = f"from other into clean  patch {S0} in basis {own} at last token"
        file = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}{experiment("e", rule)}'
        run_on(Source(file, data / "file.mech"), {"m": shared(bare("gpt2"))}, options)
        costs.append(PanelCount(plans[-1].panels[0], 1, 4096).unpatched(stopped=True))
    with_jacobian, with_pca = costs
    size, spots = width("gpt2"), 2 * len(rows())
    lengths = sum(len(row.ids) for row in rows())
    assert with_jacobian.backwards == size * spots
    assert with_pca.backwards == 0
    extra = with_jacobian.tokens - with_pca.tokens
    assert extra == 2 * lengths * (3 + size * 2) - 3 * lengths


def test_plan_counts_jacobians_of_each_noise_draw(data: Path) -> None:
    plans: list[Plan] = []
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    blocks = BLOCKS.replace(
        "corrupt other",
        "corrupt noisy { add gaussian(std: 1, samples: 3) to embed at cue token }\n  corrupt other",
        1,
    )
    text = f"basis j = jacobian(p.noisy, {S0} -> {S2}, dims: 2) at {S0}\n"
    rule = f"from other into clean  patch {S0} in basis j at last token"
    file = f'mech 1\nmodel m = local("handed over")\n{blocks}\n{text}{experiment("e", rule)}'
    run_on(Source(file, data / "file.mech"), {"m": shared(bare("gpt2"))}, options)
    cost = PanelCount(plans[-1].panels[0], 1, 4096).unpatched(stopped=True)
    assert cost.backwards == 3 * width("gpt2") * len(rows())


@pytest.mark.parametrize(
    ("line", "rule", "code", "said"),
    [
        (f"jacobian(p, {S2} -> {S0}, dims: 2) at {S0}", RULE, "E0342", f"write `{S0} -> {S2}`"),
        (f"jacobian(p, {S0} -> {S0}, dims: 2) at {S0}", RULE, "E0342", "doesn't come after"),
        (f"jacobian(p, {S0} -> {S2}, dims: 2) at mlp_out layer 1", RULE, "E0342", "neither end"),
        (f"jacobian(p, {S0} -> {S2}) at {S0}", RULE, "E0207", "`dims: …`"),
        (f"jacobian(p, {S0} -> {S2}, dims: 900) at {S0}", RULE, "E0342", "`dims: 900` is more"),
        (f"jacobian(p, {S0}, dims: 2) at {S0}", RULE, "E0207", "with `->` between"),
        (f"jacobian({S0} -> {S2}, dims: 2) at {S0}", RULE, "E0207", "is written"),
        (f"jacobian(q, {S0} -> {S2}, dims: 2) at {S0}", RULE, "E0201", "q"),
        (f"jacobian(p, {S0} -> resid_post layer 9, dims: 2) at {S0}", RULE, "E0302", "9"),
        (f"jacobian(p, z layer 0 head * -> {S2}, dims: 2) at {S2}", RULE, "E0342", "several sites"),
        (f"jacobian(p, pattern layer 0 head 1 -> {S2}, dims: 2) at {S2}", RULE, "E0342", "keys"),
        (f"svd({S0} -> {S2}, dims: 2) at {S0}", RULE, "E0207", "jacobian("),
    ],
)
def test_invalid_jacobian_bases_are_errors(
    line: str, rule: str, code: str, said: str, data: Path
) -> None:
    text = f"basis j = {line}\n" + experiment("e", rule)
    result, problems = try_file(text, data, "llama")
    assert result is None or not result.experiments
    found = [each for each in problems if each.code == code]
    assert found, [each.message for each in problems]
    assert said in found[0].message + (getattr(found[0], "hint", None) or ""), found[0].message


def test_jacobian_basis_of_a_site_without_readers_is_an_error(data: Path) -> None:
    """Only the written token reads it, so that the Jacobian at another site of the layer is 0."""
    text = (
        "basis j = jacobian(p, mlp_out layer 1 -> q layer 1 head 0, dims: 2) at mlp_out layer 1\n"
    )
    rule = "from other into clean  patch mlp_out layer 1 in basis j at last token"
    result, problems = try_file(text + experiment("e", rule), data, "llama")
    assert result is None or not result.experiments
    assert [p.code for p in problems if p.severity == "error"] in (["E0641"], ["E0342"])
