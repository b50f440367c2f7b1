"""Where each site of a model is found: module paths and layouts, strings and numbers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mechdsl.vocab.sites import Part, of_part

Side = Literal["in", "out"]
Axes = Literal["flat", "heads", "heads_first"]


@dataclass(frozen=True)
class Layout:
    """How a tensor is seen as `[B, T, units, width]`.

    `flat` is `[B, T, F]`: unit u is features `offset + u // group * stride + u % group * width`
    onward. `heads` is that view already, `heads_first` is `[B, units, T, width]`.
    """

    units: int
    width: int
    offset: int = 0
    stride: int = 0
    axes: Axes = "flat"
    group: int = 1
    """Units side by side before `stride` is taken: the queries of one key (Falcon)."""

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
        last = self.units // self.group - 1
        return self.offset + last * self.stride + self.group * self.width


@dataclass(frozen=True)
class HookPoint:
    """A tensor in the module tree: what a module reads or returns."""

    path: str
    side: Side
    layout: Layout
    item: int = 0
    """Which one, where the module returns a tuple."""
    scale: float = 1.0
    """The site is the tensor times this: what a model multiplies it with before it is added."""
    scaled_by: str | None = None
    """Path of a parameter that it is multiplied with too, feature by feature (layer scale)."""
    patches: str | None = None
    """Path of what makes vectors of an image's patches within the module, which then adds their
    positions; the site is these vectors, in front of the positions."""
    again: bool = False
    """The module is called again in the same pass, on something else; the site is what it reads or
    returns first."""


@dataclass(frozen=True)
class BlockAnatomy:
    """The parts of one block by path; None or empty where there is no such part."""

    path: str
    taps: Mapping[str, HookPoint]
    """Site to tensor. `resid_mid` stands for the stream that attention's output is added to where
    its tap is that of what is added, `head_out` for what the output projection returns, `router`
    and `expert_out` for what the experts are called with."""
    projections: tuple[str, ...] = ()
    """The linear maps that make queries, keys and values; one where they are fused."""
    output: str | None = None
    """`z` goes in, attention's output (before any norm behind it) comes out."""
    mlp: tuple[str, ...] = ()
    """The MLP, or the linear maps it consists of where it is no module of its own."""
    down: str | None = None
    """`mlp_hidden` goes in, and what the MLP adds comes out (before any norm behind it)."""
    attn_norm: str | None = None
    """The norm in front of attention (or of what stands in its place); in the stack `cross`, of
    cross attention, as `attn_behind` and `middle` are there."""
    mlp_norm: str | None = None
    attn_behind: str | None = None
    """The norm or scale between the output projection and the stream."""
    mlp_behind: str | None = None
    middle: str | None = None
    """The norm that resid_pre + attn_out goes through, where norms stand behind the sum (BERT)."""
    end: str | None = None
    """The same of resid_mid + mlp_out."""
    adds_up: bool = True
    """resid_pre + attn_out + mlp_out = resid_post; False where more is added, or something else."""
    passes_on: bool = True
    """Where it doesn't add up: what mlp_out gains, resid_post gains all the same."""
    behind: float | None = 1.0
    """resid_post times this is what enters the next block; None where more happens in between."""
    reads_stream: bool = True
    """Its first sublayer reads resid_pre, through a norm or as it is."""
    fed: bool = False
    """Features of images are added to what it returns before the next block reads that."""

    def with_taps(self, **changed: HookPoint) -> BlockAnatomy:
        """With other taps for some sites."""
        return replace(self, taps={**self.taps, **changed})

    def without(self, *sites: str) -> BlockAnatomy:
        """Without some sites."""
        return replace(self, taps={s: t for s, t in self.taps.items() if s not in sites})


def with_outputs_of_parts(block: BlockAnatomy, d_model: int) -> BlockAnatomy:
    """With the sites whose entries say which part of the block returns them."""
    parts: dict[Part, str | None] = {"output": block.output, "down": block.down}
    taps = {
        site: HookPoint(path, "out", Layout.whole(d_model))
        for part, path in parts.items()
        for site in of_part(part)
        if path is not None
    }
    return block.with_taps(**taps)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one stack of blocks by path."""

    blocks: tuple[BlockAnatomy, ...]
    taps: Mapping[str, HookPoint]
    """Sites outside the blocks, `logits` aside."""
    embedding: str | None = None
    """The token embedding; None where tokens aren't looked up (images, audio)."""
    final_norm: str | None = None
    """What makes `final_norm` of the last `resid_post`."""
    unembedding: str | None = None
    """None where there is none, or another stack's output is the model's."""
    parallel: bool = False
    """Attention and MLP read the same stream."""
    arrangement: str = field(default="", compare=False)
    """How norms and sublayers are taken to be arranged; alike in stacks that share blocks."""
    additive_positions: bool = False
    """Positions are added to the scores, so a zero query doesn't attend uniformly."""
    norms_behind_rotary: bool = False
    """Queries and keys are normed behind rotary, so that their length doesn't matter."""
    whole: str = ""
    """Why its rows can't start in the middle; empty where nothing is known against it."""
    without: Mapping[str, str] = field(default_factory=dict[str, str])
    """Sites that there could be, and why they can't be had."""

    def tap(self, site: str, layer: int | None) -> HookPoint | None:
        """The tensor of a site; None where the block has none."""
        return (self.taps if layer is None else self.blocks[layer].taps).get(site)

    def layers(self, site: str) -> tuple[int, ...]:
        """Blocks that have a site."""
        return tuple(n for n, block in enumerate(self.blocks) if site in block.taps)

    def sites(self) -> Iterator[str]:
        """Every site that is somewhere, once."""
        yield from dict.fromkeys([*self.taps, *(site for b in self.blocks for site in b.taps)])
