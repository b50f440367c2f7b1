# pyright: reportPrivateUsage=false
"""Gradients at all sites of an architecture in one pass over padded prompts, compared with plain
autograd at one site on each prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
SINGLE = ("inkling2_text", "xglm")
"""Architectures that compute only in float32."""
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
