"""How an architecture is built, as its modeling file has it: the schema of the tables beside.

Nothing of the package is used here: the tables are read off the modeling files by hand, and the
package's finder has to come to the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Form = Literal["flat", "heads", "heads_first"]


@dataclass(frozen=True)
class Heads:
    """Where the vectors of all heads lie: in what a module of the block gives or gets."""

    path: str
    """Within the block."""
    heads: int
    width: int
    start: int = 0
    """Feature at which the first head begins."""
    step: int | None = None
    """Features from one head to the next; None: `width`, heads lie side by side."""
    group: int = 1
    """Heads that lie side by side before `step` is taken (Falcon's queries of one key)."""
    form: Form = "flat"
    """`flat` is [1, T, features], `heads` is [1, T, heads, width], `heads_first`
    [1, heads, T, width]."""
    again: bool = False
    """The module is called a second time in each pass, on something else."""


@dataclass(frozen=True)
class Block:
    """The parts of one block; paths are relative to it. None: the site doesn't exist there."""

    attn_norm: str | None = None
    """Module whose input attention reads: mostly the attention module itself."""
    q: Heads | None = None
    """Behind query norms, before rotary."""
    k: Heads | None = None
    v: Heads | None = None
    output: str | None = None
    """The linear map that `z` goes into."""
    heads: int = 0
    width: int = 0
    """Of `z`: features of one head."""
    attn_out: str | None = None
    """Module whose output is added to the stream (the norm behind attention, if there is one)."""
    attn_scale: float | str = 1.0
    """What it is multiplied with before it is added (Granite), or a parameter of the block that
    each feature is multiplied with (BEiT)."""
    mixer_norm: str | None = None
    """As `attn_norm`, `attn_out` for what stands in attention's place in a model with state-space,
    convolution or recurrent blocks; there attention blocks have these two as well."""
    mixer_out: str | None = None
    mixer_scale: float = 1.0
    middle: str | Literal["sum", "none"] = "sum"
    """The stream between the sublayers: `sum` is resid_pre + attn_out, `none` where both read the
    same stream (parallel) or there is no second sublayer, else the path of the module that returns
    it (a norm behind the sum, as in BERT)."""
    mlp_norm: str | None = None
    """Module whose input the MLP reads: mostly the MLP itself (`fc1` in OPT)."""
    mlp_hidden: str | None = None
    """The linear map down that the neurons go into."""
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
    """Blocks that are built otherwise, by number."""
    embed: tuple[str, Literal["in", "out"]] | None = None
    """Module that returns (or gets) the embedded tokens."""
    final_norm: tuple[str, Literal["in", "out"]] | None = None
    """Module that returns (or gets) what the unembedding reads."""

    def at(self, layer: int) -> Block:
        return self.other.get(layer, self.block)


@dataclass(frozen=True)
class Architecture:
    """One architecture: how a tiny one is built, and where its parts are."""

    name: str
    """`model_type` of the config, with a suffix behind `/` for a variant of it."""
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
        """A variant."""
        return replace(self, name=name, **changes)


@dataclass(frozen=True)
class Refused:
    """An architecture that isn't supported, and why, in a few words for a user."""

    name: str
    reason: str
