"""Schema of the tables of architectures, as read from their modeling files.

Nothing of the package is used here. The tables are written manually from the modeling files, and
the package's finder must agree with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Form = Literal["flat", "heads", "heads_first"]


@dataclass(frozen=True)
class Heads:
    """Position of all heads' vectors in the output or input of a module."""

    path: str
    """Path within the block."""
    heads: int
    width: int
    start: int = 0
    """Feature at which the first head begins."""
    step: int | None = None
    """Features from one head to the next; None: `width`, for contiguous heads."""
    group: int = 1
    """Number of contiguous heads before each `step` (Falcon's queries of one key)."""
    form: Form = "flat"
    """`flat` is [1, T, features], `heads` is [1, T, heads, width], `heads_first`
    [1, heads, T, width]."""
    again: bool = False
    """Whether the module is called a second time in each pass, on another input."""


@dataclass(frozen=True)
class Block:
    """The components of one block; paths are relative to it. None: the site doesn't exist."""

    attn_norm: str | None = None
    """Module whose input attention reads: mostly the attention module itself."""
    q: Heads | None = None
    """After query norms, before rotary embedding."""
    k: Heads | None = None
    v: Heads | None = None
    output: str | None = None
    """The linear map whose input is `z`."""
    heads: int = 0
    width: int = 0
    """Features of one head of `z`."""
    attn_out: str | None = None
    """Module whose output is added to the residual stream (the norm after attention, if any)."""
    attn_scale: float | str = 1.0
    """Factor of the output before it is added (Granite), or the block's parameter that multiplies
    each feature (BEiT)."""
    mixer_norm: str | None = None
    """Like `attn_norm` and `attn_out`, for the mixer of state-space, convolution or recurrent
    blocks. In such a model, attention blocks have these two as well."""
    mixer_out: str | None = None
    mixer_scale: float = 1.0
    middle: str | Literal["sum", "none"] = "sum"
    """The stream between the sublayers: `sum` is resid_pre + attn_out, `none` where both read the
    same stream (parallel) or there is no second sublayer, else the path of the module that returns
    it (a norm after the sum, as in BERT)."""
    mlp_norm: str | None = None
    """Module whose input the MLP reads: mostly the MLP itself (`fc1` in OPT)."""
    mlp_hidden: str | None = None
    """The down projection, whose input is the neurons."""
    mlp_out: str | None = None
    mlp_scale: float | str = 1.0
    experts: str | None = None
    """Module called with (tokens, indices of experts, their weights), which adds experts up."""
    n_experts: int = 0
    adds_up: bool = True
    """resid_pre + attn_out + mlp_out = resid_post; False where something else is added too."""
    resid: bool = True
    """`resid_pre` and `resid_post` are the block's input and output."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks."""

    blocks: str
    """Path of the list."""
    count: int
    block: Block
    other: Mapping[int, Block] = field(default_factory=dict[int, Block])
    """Blocks with another structure, by number."""
    embed: tuple[str, Literal["in", "out"]] | None = None
    """Module that returns (or gets) the embedded tokens."""
    final_norm: tuple[str, Literal["in", "out"]] | None = None
    """Module that returns (or gets) the input of the unembedding."""

    def at(self, layer: int) -> Block:
        return self.other.get(layer, self.block)


@dataclass(frozen=True)
class Architecture:
    """One architecture: the config of a tiny model, and the paths of its components."""

    name: str
    """`model_type` of the config, with a suffix after `/` for a variant."""
    config: Mapping[str, Any]
    """Of a tiny model: two to four layers, at least two heads, different sizes where they may
    differ (heads ≠ key-value heads, head width ≠ width / heads, MLP ≠ 4 × width)."""
    main: Stack
    build: str = "AutoModelForCausalLM"
    """Auto class (or class of transformers) that builds it from the config."""
    others: Mapping[str, Stack] = field(default_factory=dict[str, Stack])
    """`encoder` and `cross` (the decoder's blocks, with the sites of cross attention alone) of an
    encoder-decoder, `vision` of a vision-language model."""
    takes: Literal["text", "image", "two texts", "audio", "image and text"] = "text"
    begins: int = 1
    """Token that prompts begin with."""
    note: str = ""

    def but(self, name: str, **changes: Any) -> Architecture:
        """Return a variant with other fields."""
        return replace(self, name=name, **changes)


@dataclass(frozen=True)
class Refused:
    """An unsupported architecture, with a short reason for the user."""

    name: str
    reason: str
