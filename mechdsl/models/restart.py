"""The tokens of a patched row that each block recomputes; others come from the unpatched run.

A row differs from its starting run at the patched tokens and at all tokens they affect. A changed
token that enters a block changes its own output and, through its key and value, every later token.
All other values are taken from the unpatched run. No torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES, BlockStage, sites_of_stage

TokenMask: TypeAlias = NDArray[np.bool_]
"""[row, column]"""

SiteMasks: TypeAlias = Mapping[tuple[str, int | None], TokenMask]
"""(site, layer) → the tokens at which it is written or read."""

AFTER_LAST_BLOCK = 1 << 30
"""A number greater than every block's."""


@dataclass(frozen=True)
class Shortcuts:
    """The parts of the unpatched run that a row may reuse. With all off, rows are full passes."""

    resume: bool = True
    """Blocks below the lowest write."""
    inside: bool = True
    """Components of a block before its first write."""
    prefix: bool = True
    """Tokens before the leftmost write."""
    last: bool = True
    """Tokens that no metric reads: those after the last read and, in the last block, all others."""

    def of_circuits(self) -> Shortcuts:
        """Return the parts that a row reuses whose circuit is ablated: tokens before its first
        written one. Each block computes all others, because receivers read any earlier sender."""
        return Shortcuts(resume=False, inside=False, prefix=self.prefix, last=False)


FULL_PASS = Shortcuts(resume=False, inside=False, prefix=False, last=False)


@dataclass(frozen=True, eq=False)
class BlockWork:
    """The tokens that rows compute in one block; other tokens keep their unpatched values."""

    present: TokenMask
    """Tokens that pass through the block."""
    carried: TokenMask
    """Of `present`, the tokens whose input comes from the block below."""
    project: TokenMask
    """Queries, keys and values are computed."""
    attend: TokenMask
    """Attention is computed."""
    output: TokenMask
    """Attention's output projection is computed."""
    mlp: TokenMask
    """The MLP is computed."""


@dataclass(frozen=True, eq=False)
class HeldSublayers:
    """Rows of path patching, whose sublayers return the unpatched run's outputs except at writes.

    Only the residual stream carries a change on.
    """

    rows: NDArray[np.bool_]
    """[row]"""
    mlps: NDArray[np.bool_]
    """[row] whether MLPs are held too."""
    norms: NDArray[np.bool_]
    """[row] whether norms use the base run's divisors; such rows are full forward passes."""
    neurons: Mapping[tuple[str, int | None], NDArray[np.bool_]] = field(
        default_factory=dict[tuple[str, int | None], NDArray[np.bool_]]
    )
    """By stack and layer, [row] whether neurons there are senders: each neuron is held instead of
    the output of the MLP."""
    attention: Mapping[tuple[str, int | None], NDArray[np.bool_]] = field(
        default_factory=dict[tuple[str, int | None], NDArray[np.bool_]]
    )
    """By stack and layer, [row] whether the output of attention is held instead of its heads, so
    that its value before that can be read."""


@dataclass(frozen=True, eq=False)
class RowMasks:
    """The writes and reads of some rows, as token masks."""

    real: TokenMask
    """Columns that hold a token of the prompt."""
    writes: SiteMasks
    reads: SiteMasks
    """Sites that metrics read inside the model."""
    final: TokenMask
    """Tokens that are read after the last block."""
    held: HeldSublayers | None = None

    @property
    def top(self) -> NDArray[np.int64]:
        """[row] the highest block that is read; `AFTER_LAST_BLOCK` if the row is read after it."""
        places = np.full(len(self.real), -1, dtype=np.int64)
        for (site, layer), mask in self.reads.items():
            if site == "embed":  # before all blocks
                continue
            own = np.where(mask.any(axis=1), AFTER_LAST_BLOCK if layer is None else layer, -1)
            places = np.maximum(places, own)
        return np.where(self.final.any(axis=1), AFTER_LAST_BLOCK, places)

    @property
    def seen(self) -> TokenMask:
        """Tokens up to the last read one of each row."""
        reads: TokenMask = np.logical_or.reduce([self.final, *self.reads.values()])
        return mask_to_last(reads) & self.real

    @property
    def from_first_write(self) -> TokenMask:
        """Tokens from the first written one of each row on."""
        none = np.zeros_like(self.real)
        writes: TokenMask = np.logical_or.reduce([none, *self.writes.values()])
        return mask_from_first(writes) & self.real

    def of_block(self, layer: int) -> _BlockMasks:
        """Return the writes and reads in one block."""
        return _BlockMasks(
            np.zeros_like(self.real),
            {site: mask for (site, at), mask in self.writes.items() if at == layer},
            {site: mask for (site, at), mask in self.reads.items() if at == layer},
        )

    def reached(self, mask: TokenMask, *, causal: bool) -> TokenMask:
        """Return the tokens that attend to any token of the mask."""
        return mask_from_first(mask) if causal else mask.any(axis=1, keepdims=True) & self.real


@dataclass(frozen=True, eq=False)
class _BlockMasks:
    """The writes and reads in one block."""

    none: TokenMask
    writes: Mapping[str, TokenMask]
    reads: Mapping[str, TokenMask]

    @property
    def written(self) -> TokenMask:
        """Tokens at which any site is written."""
        return np.logical_or.reduce([self.none, *self.writes.values()])

    @property
    def read(self) -> TokenMask:
        """Tokens at which any site is read."""
        return np.logical_or.reduce([self.none, *self.reads.values()])

    def read_at(self, sites: Iterable[str]) -> TokenMask:
        """Return the tokens at which one of these sites is read."""
        masks = (self.reads.get(site, self.none) for site in sites)
        return np.logical_or.reduce([self.none, *masks])

    def by_stage(self) -> Mapping[BlockStage, TokenMask]:
        """Return the written tokens, by the stage of their sites."""
        at: defaultdict[BlockStage, TokenMask] = defaultdict(lambda: self.none)
        for site, mask in self.writes.items():
            at[SITES[site].stage] = at[SITES[site].stage] | mask
        return at


def mask_from_first(mask: TokenMask) -> TokenMask:
    """Return the columns from the first True on."""
    return np.logical_or.accumulate(mask, axis=1)


def mask_to_last(mask: TokenMask) -> TokenMask:
    """Return the columns up to the last True."""
    return np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def block_work(
    rows: RowMasks, n_layers: int, *, parallel: bool, causal: bool = True, shortcuts: Shortcuts
) -> Iterator[BlockWork]:
    """Yield the work of each block, from the lowest up.

    parallel: attention and MLP read the same stream. causal: no token sees a later one.
    """
    none = np.zeros_like(rows.real)
    seen = rows.seen if shortcuts.last and causal else rows.real
    everything = rows.from_first_write & seen if shortcuts.prefix and causal else seen
    carried = rows.writes.get(("embed", None), none) & seen if shortcuts.resume else everything
    started = carried.any(axis=1, keepdims=True)
    held, top = rows.held, rows.top
    of_attention, in_mlp = sites_of_stage("key", "query", "weight"), sites_of_stage("in_mlp")
    for layer in range(n_layers):
        here = rows.of_block(layer)
        at, anything, reading = here.by_stage(), here.written, here.read
        entered = carried
        if not shortcuts.prefix:
            # A row includes the whole prompt from its starting block on.
            starting = anything.any(axis=1, keepdims=True) & ~started
            entered = entered | (starting & everything)
        if not shortcuts.inside:
            entered = entered | anything
        started |= anything.any(axis=1, keepdims=True)
        needed = rows.final if layer == n_layers - 1 and shortcuts.last else seen
        if shortcuts.last:  # nothing above the row's highest read
            needed = needed & (top > layer)[:, None]
        needed = needed | reading
        changed = entered | at["stream"]
        normed = changed | at["norm"]
        attended_to = normed | at["key"]
        attend = normed | at["query"] | at["weight"]
        attend = (attend | rows.reached(attended_to, causal=causal)) & needed
        attend = attend | here.read_at(ATTENTION_INTERNAL_SITES)
        attend = attend & rows.real
        project = normed & seen
        if held is not None:
            attend &= ~held.rows[:, None]
            project &= here.read_at(of_attention) | ~held.rows[:, None]
        output = attend | (at["mixed"] & needed)
        middle = changed | output | at["middle"]
        mlp = (changed if parallel else middle) | at["mlp"]
        if held is not None:
            mlp &= ~held.mlps[:, None]
        mlp = (mlp | at["in_mlp"]) & needed
        out = (middle | mlp | at["end"]) & needed
        yield BlockWork(
            present=(attended_to & seen & (top >= layer)[:, None]) | attend | out | reading,
            carried=carried & seen,
            project=project,
            attend=attend,
            output=output,
            mlp=mlp | here.read_at(in_mlp),
        )
        carried = out
