"""A model that was loaded and verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mechdsl.hooks.attention_exchange import ExchangedAttention
from mechdsl.hooks.written_out_attention import entry_of
from mechdsl.models.anatomy import Anatomy, HookPoint
from mechdsl.models.shape import ModelShape

if TYPE_CHECKING:
    from mechdsl.prompts.tokenizer import TextTokenizer


BASE, PYTHON = "base ", "python "
"""What keys of a model's provenance begin with: see `LoadedModel.made_of`."""


@dataclass(frozen=True)
class Outcome:
    """One check of a model's anatomy."""

    identity: str
    """What has to hold, in words: `resid_pre + attn_out + mlp_out = resid_post`."""
    error: float
    """The largest difference, relative to the size of what was compared."""
    tolerance: float
    detail: str = ""
    """Where the largest difference is: `layer 3`."""
    failure: str = ""
    """What it means not to pass, where that isn't being off by `error`."""
    compared: int = 1
    """Tensors that were compared; a check without any says nothing, and isn't kept."""
    asks_effect: bool = False
    """It asks that something has an effect, which parts without one don't have."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Calling:
    """How the model wants to be called; found by trying it."""

    accepts: frozenset[str]
    """Names of its forward's arguments."""
    block_returns: int | None = None
    """Length of the tuple that a block returns; None for a bare tensor."""
    first_position: int | None = 0
    """Position id of a prompt's first token; None where the model is left to count by itself."""
    places_images: bool = False
    """An image's tokens are counted as others are, so that positions are given with images too."""
    side: Literal["left", "right"] = "left"
    """Where padding is harmless: on the right alone for models that count columns."""
    reads: Literal["every token", "first token", "last token", "all tokens"] = "every token"
    """What its output is made of: each token's is its own, or there is one output for a whole image
    or prompt, made of its first token (the class token), its last one, or of all."""
    skips: int | None = None
    """The pad token, where `reads` is the last token that isn't this one, and not the very last."""
    scores: str | None = None
    """Path of the module that gives each token its output, where the model returns only that of a
    prompt's last token, as classifiers built on decoders do; `reads` is every token then."""
    packs: Literal["tokens", "one prompt"] = "tokens"
    """What a pass over packed rows is called with: their tokens, or one prompt, where the model
    counts positions or looks at whole prompts by itself, and for images."""
    narrows: bool = True
    """The unembedding may compute some tokens' logits alone: nothing is added to them behind it."""


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of blocks with its sizes."""

    anatomy: Anatomy
    shape: ModelShape


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode with its anatomy, its tokenizer and what was proved about it."""

    name: str
    """As the file calls it."""
    module: torch.nn.Module
    anatomy: Anatomy
    """Of the main stack: the language model's, the decoder's, or the only one."""
    shape: ModelShape
    tokenizer: TextTokenizer | None
    """None only while a model is looked at without text."""
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    calling: Calling
    provenance: Mapping[str, str]
    """Hash of the weights, revision, versions: what a result has to be kept with."""
    checks: tuple[Outcome, ...] = ()
    self_check_error: float = 0.0
    """The largest difference between logits of packed and of whole passes in its self-check,
    relative to the largest logit."""
    restartable: bool = True
    """Rows that compute only what changes gave the logits of whole passes; of a vision-language
    model, rows of text."""
    idle: tuple[tuple[str, str, int | None], ...] = ()
    """(stack, site, layer) of the parts without effect: whatever is written there alone, the output
    stays as it is. All that is compared holds for them, and what asks for an effect was shown on a
    copy with random weights."""
    identity: str | None = None
    """Of a model that was loaded from a folder, by `mechdsl/models/identity.py`. What any model is,
    `mechdsl/loading/identity.py:identity_of_loaded` says."""
    texts: LoadedModel | None = None
    """The tower for texts, where this is that for images of a model with two."""
    others: Mapping[str, Stack] = field(default_factory=dict[str, Stack])
    """Stacks beside the main one: `encoder`, `cross` (the decoder's blocks, by their attention to
    the encoder), `vision`."""

    @cached_property
    def attention_configs(self) -> tuple[Any, ...]:
        """The distinct configs that modules read their attention function from."""
        found: dict[int, Any] = {}
        for part in self.module.modules():
            config = getattr(part, "config", None)
            if hasattr(config, "_attn_implementation_internal"):
                found[id(config)] = config
        return tuple(found.values())

    @cached_property
    def written_out(self) -> tuple[tuple[nn.Module, ExchangedAttention], ...]:
        """Modules whose attention isn't the library's, with the entries that stand in for them."""
        every = self.module.modules()
        return tuple((part, entry) for part in every if (entry := entry_of(part)) is not None)

    @property
    def rounding(self) -> float:
        """How far rounding alone may move a logit, relative to the largest one: what the self-check
        has measured, and no less than the spacing of numbers of this precision."""
        return max(self.self_check_error, torch.finfo(self.dtype).eps)

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of what the model was made of beside its own weights: the base of an adapter
        (`base m`), the file of the function that gave it (`python toy.py`)."""
        return {
            key: value for key, value in self.provenance.items() if key.startswith((BASE, PYTHON))
        }

    @property
    def parallel(self) -> bool:
        return self.anatomy.parallel

    def stack(self, name: str) -> Stack:
        """A stack by name; the main one has none. ValueError where there isn't one."""
        if not name:
            return Stack(self.anatomy, self.shape)
        if name not in self.others:
            there = ", ".join(f"`{other}`" for other in self.others) or "none beside the main one"
            raise ValueError(f"`{self.name}` has no stack `{name}`; it has {there}")
        return self.others[name]

    def tap(self, site: str, layer: int | None, stack: str = "") -> HookPoint:
        """The tensor of a site; ValueError where there is none."""
        own = self.stack(stack)
        if layer is not None and not 0 <= layer < own.shape.n_layers:
            of = f" of `{stack}`" if stack else ""
            raise ValueError(f"layer {layer}{of} is not in 0..{own.shape.n_layers - 1}")
        tap = own.anatomy.tap(site, layer)
        if tap is None:
            where = "" if layer is None else f" in layer {layer}"
            where += f" of its stack `{stack}`" if stack else ""
            raise ValueError(f"`{self.name}` has no `{site}`{where}")
        return tap
