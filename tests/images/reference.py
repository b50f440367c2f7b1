"""Run one image, or one text, through a bare model with plain hooks: they read every site, write
any of them and replace blocks; attention is computed explicitly, so that edges can be edited.
Uses nothing of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families.parts import Stack
from ..reference import hooks
from ..reference.forward import Edge, Pass, Write
from ..reference.hooks import Session

OUTSIDE = ("embed", "final_norm")
"""Sites that exist once per model; they have layer 0 here."""


@dataclass(frozen=True)
class Block:
    """Replace a block by block `of` with its weights, or by the identity if `of` is None."""

    layer: int
    of: int | None


@dataclass(frozen=True)
class Divisor:
    """A norm divides by the scale that it has for the input `at`, [1, T, width]."""

    path: str
    at: Tensor


Act = Write | Edge | Block | Divisor


@dataclass(frozen=True)
class Seen:
    """Results of a forward pass over one image."""

    output: Tensor
    """[labels] or [texts], or [T, width] of models without a head."""
    sites: Mapping[tuple[str, int], Tensor]
    """(site, layer) → [T, units, width]; within attention there are `q_rot`, `k_rot`, `scores` and
    `pattern`, whose vectors are over keys."""
    normed: Mapping[str, Tensor]
    """Path of a norm → its input, [1, T, width]."""


class _Layer(Session):
    """The hooks of one layer in a forward pass."""

    def __init__(self, layer: int, passing: Pass) -> None:
        super().__init__([])
        self.layer, self.passing = layer, passing

    def writes(self, site: str) -> bool:
        return (site, self.layer) in self.passing.here

    def edit(self, site: str, value: Tensor) -> Tensor:
        if site in OUTSIDE and self.layer:
            return value
        assert (site, self.layer) not in self.passing.seen, f"{site} came by twice"
        return self.passing.at(site, self.layer, value[None])[0]


@contextmanager
def _explicit_attention(module: nn.Module, stack: Stack, passing: Pass) -> Generator[None]:
    """Replace torch's attention, which each block calls once; leave calls outside blocks alone."""
    functional: Any = nn.functional
    own = functional.scaled_dot_product_attention
    within: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not within:
            return own(query, key, value, *args, **kwargs)
        [layer] = within
        q = passing.at("q_rot", layer, query.transpose(1, 2))
        k = passing.at("k_rot", layer, key.transpose(1, 2))
        scores = torch.einsum("cthd,cshd->cths", q, k) * kwargs["scale"]
        visible = torch.ones(scores.shape[1], scores.shape[3], dtype=torch.bool)
        mask = kwargs.get("attn_mask")
        if kwargs.get("is_causal"):
            visible = visible.tril()
        elif mask is not None and mask.dtype == torch.bool:
            visible = mask[0, 0]
        elif mask is not None:
            scores = scores + mask.transpose(1, 2)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        scores = passing.at("scores", layer, scores, visible)
        rows = passing.edited(layer, scores.softmax(3), visible)
        pattern = passing.at("pattern", layer, rows, visible)
        return torch.einsum("cths,cshd->chtd", pattern, value.transpose(1, 2))

    handles: list[Any] = []
    for layer in range(stack.count):
        block = module.get_submodule(f"{stack.blocks}.{layer}")
        enter = block.register_forward_pre_hook(lambda *_, at=layer: within.append(at))
        handles += [enter, block.register_forward_hook(lambda *_: within.clear())]
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own
        for handle in handles:
            handle.remove()


@torch.no_grad()
def call(
    module: nn.Module, stack: Stack, given: Mapping[str, Tensor], acts: Iterable[Act] = ()
) -> Seen:
    """Run the model on inputs with one image or one text for the hooked stack."""
    acts = list(acts)
    writes = [act for act in acts if isinstance(act, Write)]
    passing = Pass([(writes, [act for act in acts if isinstance(act, Edge)])])
    normed: dict[str, Tensor] = {}
    divisors = {act.path: act.at for act in acts if isinstance(act, Divisor)}
    with ExitStack() as within:
        blocks = [act for act in acts if isinstance(act, Block)]
        within.enter_context(_exchanged(module, stack, blocks))
        for path, norm in norms(module):
            within.enter_context(_divided(path, norm, normed, divisors.get(path)))
        for layer in range(stack.count):
            session = _Layer(layer, passing)
            within.enter_context(hooks.hooked(module, stack, layer, session))
        within.enter_context(_explicit_attention(module, stack, passing))
        output: Any = module(**given)
    assert passing.here.keys() <= passing.seen.keys(), "a site that isn't there"
    every = {
        (site, layer or 0): value[0].detach().clone()
        for (site, layer), value in passing.seen.items()
    }
    return Seen(output_of(output), every, normed)


def output_of(given: Any) -> Tensor:
    """Return the output of a model for one image or text."""
    names = ("logits_per_image", "logits", "last_hidden_state")
    [found] = given[next(name for name in names if name in given)]
    return found


@contextmanager
def _exchanged(module: nn.Module, stack: Stack, blocks: Sequence[Block]) -> Generator[None]:
    own: Any = module.get_submodule(stack.blocks)
    before = list(own)
    for act in blocks:
        made = copy.deepcopy(before[act.layer if act.of is None else act.of])
        if act.of is None:
            made.forward = _identity_forward(made.forward)
        own[act.layer] = made
    try:
        yield
    finally:
        for layer, block in enumerate(before):
            own[layer] = block


def _identity_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def identity(given: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(given, *args, **kwargs)
        return (given, *out[1:]) if isinstance(out, tuple) else given

    return identity


def norms(module: nn.Module) -> list[tuple[str, nn.LayerNorm]]:
    return [(path, part) for path, part in module.named_modules() if isinstance(part, nn.LayerNorm)]


@contextmanager
def _divided(
    path: str, norm: nn.LayerNorm, normed: dict[str, Tensor], at: Tensor | None
) -> Generator[None]:
    def seen(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        (x,) = args
        normed[path] = x.clone()
        if at is None:
            return None
        centred, there = (value - value.mean(-1, keepdim=True) for value in (x, at))
        scale = (there.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return norm.weight * centred / scale + norm.bias

    handle = norm.register_forward_hook(seen)
    try:
        yield
    finally:
        handle.remove()
