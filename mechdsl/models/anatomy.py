"""Where each site of a model is found: module paths and layouts, strings and numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Side = Literal["in", "out"]
Axes = Literal["flat", "heads", "heads_first"]


@dataclass(frozen=True)
class Layout:
    """How a tensor is viewed as `[B, T, units, width]`, without copying.

    `flat` is `[B, T, F]`: unit u is features `offset + u * stride` onward. `heads` is that view
    already, `heads_first` is `[B, units, T, width]`.
    """

    units: int
    width: int
    offset: int = 0
    stride: int = 0
    axes: Axes = "flat"

    @staticmethod
    def whole(width: int) -> Layout:
        """One vector per position."""
        return Layout(1, width, stride=width)

    @staticmethod
    def heads(units: int, width: int, offset: int = 0) -> Layout:
        """Heads side by side, from feature `offset` on."""
        return Layout(units, width, offset=offset, stride=width)

    @staticmethod
    def neurons(units: int) -> Layout:
        """Each feature is a unit of its own."""
        return Layout(units, 1, stride=1)

    @property
    def end(self) -> int:
        """One past the last feature that it touches."""
        return self.offset + (self.units - 1) * self.stride + self.width


@dataclass(frozen=True)
class Tap:
    """A tensor in the module tree: what a module reads or returns."""

    path: str
    """Path of the module; `{layer}` stands for the block's number."""
    side: Side
    layout: Layout
    item: int = 0
    """Which one, where the module returns a tuple."""

    def at(self, layer: int | None) -> str:
        """The module's path in one layer."""
        return self.path if layer is None else self.path.format(layer=layer)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder by path. Paths with `{layer}` are those of block parts."""

    embedding: str
    block: str
    """`transformer.h.{layer}`."""
    final_norm: str
    unembedding: str
    attention: str
    mlp: str
    attn_norm: str | None
    """The norm in front of attention; None where there is none (Olmo 2)."""
    mlp_norm: str | None
    projections: tuple[str, ...]
    """The linear maps that make queries, keys and values; one where they are fused."""
    output_projection: str
    """`z` goes in, attention's output (before any norm behind it) comes out."""
    down_projection: str | None
    """`mlp_hidden` goes in; None where there isn't one per block (experts)."""
    parallel: bool
    """Attention and MLP read the same stream."""
    attn_norm_behind: bool
    """A norm stands between the output projection and the residual stream."""
    mlp_norm_behind: bool
    additive_positions: bool
    """Positions are added to the scores, so a zero query doesn't attend uniformly."""
    taps: Mapping[str, Tap]
    """Site to tensor, for every site of the model except `logits`. `resid_mid` is written through
    `attn_out`'s tap and `head_out` on the output of the projection."""
