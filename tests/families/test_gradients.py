# pyright: reportPrivateUsage=false
"""Gradients at all sites of an architecture in one pass over padded prompts, compared with plain
autograd at one site on each prompt alone."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mechdsl.forward.hooks import backward_rules
from mechdsl.forward.hooks.batch import SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.resolve.conflicts import SITES_WITHOUT_GRADIENT

from ..quick import some
from ..reference import hooks
from . import tables, walk
from .parts import Architecture

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}
QUICK = ("gpt2", "mamba", "beit")
SINGLE = (
    "gemma2", "granite_swa", "granitemoe_swa", "granitemoe_swa/shared", "inkling2_text",
    "t5gemma", "vaultgemma", "xglm",
)  # fmt: skip
"""Architectures that compute only in float32. Some with sliding windows give NaN for padding in
float64: the smallest number of a mask is infinite in the softmax, which is in float32."""
IN_PLACE = ("rwkv",)
"""Architectures that modify their state in place, which autograd rejects at some sites."""


class Taken(hooks.Session):
    """A session that makes the value at one site a leaf for differentiation."""

    leaf: Tensor

    def edit(self, site: str, value: Tensor) -> Tensor:
        if not self.writes(site):
            return value
        self.leaf = value.detach().clone().requires_grad_()
        return self.leaf


def sites(model: LoadedModel, by_hand: Any) -> list[walk.Spot]:
    other = walk._Walk(by_hand.row, torch.float64, None)
    other.by_hand = by_hand
    return [s for s in other._spots(model) if not s.stack and s.site not in SITES_WITHOUT_GRADIENT]


def whole(weights: Tensor, output: Tensor, mask: Tensor) -> Tensor:
    """The sum of outputs times weights, over real tokens."""
    product = output * weights
    return (product[mask] if product.shape[:2] == mask.shape else product).sum()


@pytest.mark.parametrize("name", some(sorted(set(ROWS) - {*IN_PLACE}), QUICK))
def test_gradients_at_all_sites_equal_autograd(name: str) -> None:
    row, dtype = ROWS[name], torch.float32 if name in SINGLE else torch.float64
    by_hand = walk._ByHand(row, dtype)
    by_hand.module.requires_grad_(False)
    model, _ = adopt_model("m", walk._module(row, dtype), walk.tokenizer())
    if model is None:
        pytest.skip("the package doesn't take it")
    batch = walk._Packaged(model, by_hand, model.calling.side).base
    spots, random = sites(model, by_hand), torch.Generator().manual_seed(0)
    rows, writes = torch.arange(len(batch)), list[SiteWrite]()
    for spot in spots:
        layout = model.tap(spot.read.site, spot.read.layer).layout
        last = batch.lengths.cpu() - 1
        unit = torch.randint(layout.units, (len(batch),), generator=random)
        leaf = torch.zeros(len(batch), layout.width, dtype=dtype, requires_grad=True)
        where = spot.read.site, spot.read.layer
        writes.append(SiteWrite(*where, rows, last // 2, unit, leaf, mode="add"))
    output = run_full(model, batch, writes=writes, gradients=True).logits
    assert output is not None
    weights = torch.randn(output.shape, generator=random, dtype=dtype)
    mask = batch.mask.bool()
    leaves = [write.values for write in writes]
    total = whole(weights, output, mask)
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    large = 0.0
    for spot, write, gradient in zip(spots, writes, found, strict=True):
        for number, prompt in enumerate(by_hand.bases):
            session = Taken([(spot.site, [])])
            with torch.enable_grad(), hooks.hooked(by_hand.module, row.main, spot.layer, session):
                alone = by_hand.module(**prompt)
                alone = alone.logits if "logits" in alone else alone.last_hidden_state
            alone = alone.reshape(-1, alone.shape[-1])
            own = weights[number]
            own = own[mask[number]] if weights.shape[:2] == mask.shape else own.reshape(alone.shape)
            (wanted,) = torch.autograd.grad(
                (alone * own).sum(), [session.leaf], allow_unused=True, materialize_grads=True
            )
            there = wanted[int(write.positions[number]), int(write.units[number])]
            size = max(1.0, float(wanted.abs().max()))
            assert float((gradient[number] - there).abs().max()) <= 1e-5 * size, str(spot)
            large = max(large, float(there.abs().max()))
    assert large > 1e-3


IN_BLOCKS = (
    "resid_pre", "resid_post", "attn_out", "mixer_out", "mlp_out", "z", "q", "k", "v", "mlp_hidden"
)  # fmt: skip
RUN_ONCE = ("albert", "deberta-v2/shared")
"""Architectures with a block that runs several times."""


@pytest.mark.parametrize("name", some(sorted(set(ROWS) - {*IN_PLACE}), QUICK))
def test_recomputed_gradients_equal_stored_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, dtype = ROWS[name], torch.float32 if name in SINGLE else torch.float64
    by_hand = walk._ByHand(row, dtype)
    model, _ = adopt_model("m", walk._module(row, dtype), walk.tokenizer())
    if model is None:
        pytest.skip("the package doesn't take it")
    batch = walk._Packaged(model, by_hand, model.calling.side).base
    random, rows, leaves = (
        torch.Generator().manual_seed(0),
        torch.arange(len(batch)),
        list[Tensor](),
    )
    writes: list[SiteWrite] = []
    for spot in sites(model, by_hand):
        if spot.read.site not in IN_BLOCKS:
            continue
        layout = model.tap(spot.read.site, spot.read.layer).layout
        unit = torch.randint(layout.units, (len(batch),), generator=random)
        leaves.append(torch.zeros(len(batch), layout.width, dtype=dtype, requires_grad=True))
        where, middle = (spot.read.site, spot.read.layer), (batch.lengths.cpu() - 1) // 2
        writes.append(SiteWrite(*where, rows, middle, unit, leaves[-1], mode="add"))
    if not writes:
        pytest.skip("its blocks have none of these sites")
    calls: list[object] = []
    run = backward_rules._BlockFunction.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(backward_rules._BlockFunction, "__call__", count)
    found: list[tuple[Tensor, ...]] = []
    for recompute in (False, True):
        output = run_full(model, batch, writes=writes, gradients=True, recompute=recompute).logits
        assert output is not None
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        total = whole(weights, output, batch.mask.bool())
        for keep in (True, False):  # a pass serves several backward passes
            found.append(
                torch.autograd.grad(
                    total, leaves, allow_unused=True, materialize_grads=True, retain_graph=keep
                )
            )
    for others in found[1:]:
        for own, other in zip(found[0], others, strict=True):
            assert torch.allclose(own, other, rtol=0, atol=1e-4 if name in SINGLE else 1e-10)
    cached = "past_key_values" in inspect.signature(model.module.forward).parameters
    given_cache = cached and "use_cache" not in model.calling.accepts
    # Blocks of a vision tower have no leaf before them: they run once.
    recomputed = [times for times in Counter(calls).values() if times > 1]
    runs_once = given_cache or name in RUN_ONCE
    assert recomputed == ([] if runs_once else [3] * model.shape.n_layers)
