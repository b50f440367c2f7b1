"""Whether a model writes on kept keys and values as it does in whole passes: tried, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mechdsl.generate.cached_pass import NewTokens, keep, run_cached
from mechdsl.generate.first_rows import Places, attention_path, by_row, noting_lengths
from mechdsl.generate.kept_keys import KeptKeys
from mechdsl.generate.shared_blocks import Lineup
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
    places: Places | None = field(default=None, compare=False)
    """Where rows stand in calls of blocks, if these can compute some of the rows alone."""


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
        off = _off(cached, whole)
        if off <= _allowed(model):
            places = _places(model, prompts, inside, whole, shares)
            return Way("cached", shares=shares, places=places)
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


def _places(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    inside: bool,
    whole: Tensor,
    shares: bool,
) -> Places | None:
    """Of `Way`: with attention that has fewer rows than its block, else without."""
    half, two, blocks = model.shape.n_layers // 2, len(prompts), model.anatomy.blocks
    paths = [block.path for block in blocks]
    within = [path for block in blocks if (path := attention_path(block)) is not None]
    paths += within if len(within) == len(blocks) else []
    try:
        with noting_lengths(model, paths) as few:
            _cached(model, prompts, False, shares=False)
        with noting_lengths(model, paths) as more:
            _cached(model, [*prompts, prompts[0]], False, shares=False)
    except Exception:
        return None
    every = tuple(by_row(a, two, b) for a, b in zip(few, more, strict=True))
    end = len(blocks)
    kinds = (every[end:], ()) if every[end:] else ((),)
    for attention, several in product(kinds, (True, False)):
        begins = [2 * half + int(bool(attention)), 2 * half + 2]
        lineup = Lineup(np.array([0] * two + begins), np.array([0, 1, 0, 1]))
        places = Places(every[:end], attention, several)
        with suppress(Exception):
            by = lineup, places
            some = _cached(model, [*prompts, *prompts], inside, shares=shares, by=by)
            if _off(some, torch.cat([whole, whole])) <= _allowed(model):
                return places
    return None


def _off(found: Tensor, whole: Tensor) -> float:
    """How far logits are from those of whole passes, relative to the largest one."""
    return float((found - whole).abs().amax() / whole.abs().amax())


def _allowed(model: LoadedModel) -> float:
    return max(TOLERANCE, 4 * model.rounding)


def _cached(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    inside: bool,
    *,
    shares: bool,
    by: tuple[Lineup, Places] | None = None,
) -> Tensor:
    """The same in passes over a few tokens, each other one with all attention opened.

    by: which rows blocks compute, of passes over several tokens too if that may be, and how they
    are told.
    """
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
        some = by if by is not None and (by[1].several or end == first + 1) else (None, None)
        acting = RuleWrites()
        if inside and len(found) % 2 == 0:
            acting = _nothing(model, tokens, some[0] or Lineup.apart(len(prompts)))
        found.append(run_cached(model, tokens, kept, every, acting, *some))
        first, end = end, end + 1
    return torch.stack(found, dim=1).float()


def _nothing(model: LoadedModel, tokens: NewTokens, lineup: Lineup) -> RuleWrites:
    """Edges of all layers that are changed so that nothing changes."""
    newest = tokens.lengths_of("pattern", "") - 1
    edges: list[EdgeWrite] = []
    for layer in range(model.shape.n_layers):
        if not model.shape.has("pattern", layer):
            continue
        rows = torch.arange(lineup.attending(layer))
        none, one = torch.zeros_like(rows), torch.ones(len(rows))
        edges.append(
            EdgeWrite(layer, "reweight", rows, newest[rows], none, rows, none, one),
        )
    return RuleWrites(edges=edges)
