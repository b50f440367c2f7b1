"""Whether a model writes on kept keys and values as it does in whole passes: tried, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mechdsl.generate.cached_pass import NewTokens, keep, run_cached
from mechdsl.generate.kept_keys import KeptKeys
from mechdsl.hooks.batch import Batch
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import run_whole

TOLERANCE = 1e-4
"""Of logits, relative to the largest one, or what rounding explains."""
_LENGTHS = (7, 5)
_COMMON, _OWN = 3, 2
"""Tokens of the longer prompt that two first passes compute; then they come one by one."""


@dataclass(frozen=True)
class Way:
    """How a model writes."""

    kind: Literal["cached", "whole"]
    """On kept keys and values, or by a whole pass for each token."""
    reason: str = ""
    """Why it is whole passes."""
    shares: bool = True
    """Whether attention to what rows of a prompt have in common can be computed together."""


_KNOWN: WeakKeyDictionary[LoadedModel, dict[bool, Way]] = WeakKeyDictionary()


def way_of(model: LoadedModel, *, inside: bool = False) -> Way:
    """How a model writes; tried once.

    inside: where something acts within attention, in some of the passes.
    """
    known = _KNOWN.setdefault(model, {})
    if inside not in known:
        known[inside] = _tried(model, inside)
    return known[inside]


def _tried(model: LoadedModel, inside: bool) -> Way:
    if model.calling.side != "left":
        return Way("whole", "it counts columns, so that prompts can't end in the same one")
    if "past_key_values" not in model.calling.accepts:
        return Way("whole", "it takes no keys and values of earlier tokens")
    if any(_grows(getattr(part, "rope_type", "")) for part in model.module.modules()):
        return Way("whole", "its rotary embedding hangs on how long the text is")
    generator = torch.Generator().manual_seed(0)
    size = model.shape.vocab_size
    prompts = [torch.randint(size, (n,), generator=generator).tolist() for n in _LENGTHS]
    whole = _whole(model, prompts)
    for shares in (True, False):
        try:
            cached = _cached(model, prompts, inside, shares=shares)
        except Exception as error:
            way = Way("whole", f"it fails with kept keys and values: {error}")
            continue
        off = float((cached - whole).abs().amax() / whole.abs().amax())
        if off <= max(TOLERANCE, 4 * model.rounding):
            return Way("cached", shares=shares)
        way = Way("whole", f"with kept keys and values its logits are off by {off:.1g}")
    return way


def _grows(kind: object) -> bool:
    """Whether a kind of rotary embedding, or one of those of several layers, is another one for
    longer texts."""
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any("dynamic" in str(each) or each == "longrope" for each in kinds)


def _whole(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[prompt, token, vocab] of the last tokens."""
    found = [
        run_whole(model, Batch.of([prompt], model.pad_id, "left", model.device)).logits
        for prompt in prompts
    ]
    last = _LENGTHS[0] - _COMMON - _OWN + 1
    return torch.cat([each[:, -last:] for each in found if each is not None]).float()


def _cached(
    model: LoadedModel, prompts: Sequence[Sequence[int]], inside: bool, *, shares: bool
) -> Tensor:
    """The same in passes over a few tokens, each other one with all attention opened."""
    width, device = _LENGTHS[0], model.device
    batch = Batch.of(prompts, model.pad_id, "left", device)
    every, found = slice(0, len(prompts)), list[Tensor]()
    common = KeptKeys(model.shape.n_layers, len(prompts), _COMMON)
    keep(model, NewTokens(batch.ids[:, :_COMMON], batch.starts, 0), common, every, RuleWrites())
    kept = KeptKeys(model.shape.n_layers, len(prompts), width - _COMMON * shares)
    if shares:
        kept.share(common, _COMMON, range(len(prompts)))
    kept.fill(common, torch.arange(len(prompts)), _COMMON)
    first, end = _COMMON, _COMMON + _OWN
    while end <= width:
        tokens = NewTokens(batch.ids[:, first:end], batch.starts, first)
        acting = _nothing(model, tokens) if inside and len(found) % 2 == 0 else RuleWrites()
        found.append(run_cached(model, tokens, kept, every, acting))
        first, end = end, end + 1
    return torch.stack(found, dim=1).float()


def _nothing(model: LoadedModel, tokens: NewTokens) -> RuleWrites:
    """Edges of all layers that are changed so that nothing changes."""
    count, one = len(tokens), torch.ones(len(tokens), dtype=torch.long)
    newest = (tokens.lengths_of("pattern", "") - 1).cpu()
    return RuleWrites(
        edges=[
            EdgeWrite(
                layer,
                "reweight",
                torch.arange(count),
                newest,
                0 * one,
                torch.arange(count),
                0 * one,
                one.to(torch.float32),
            )
            for layer in range(model.shape.n_layers)
            if model.shape.has("pattern", layer)
        ]
    )
