"""What a patched row has to compute, block by block; everything else is the unpatched run's.

A row differs from the run it starts from at the tokens that are written, and at what these reach: a
token that enters a block changed changes itself, and through its key and value every later one.
Only what a measure can see has to be there. Nothing here runs a model: the planner counts work with
these masks, and the packed run computes by them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.vocab.sites import SITES, WITHIN_ATTENTION, Stage, of_stage

Mask: TypeAlias = NDArray[np.bool_]
"""[row, column]"""
SiteMasks: TypeAlias = Mapping[tuple[str, int | None], Mask]
"""(site, layer) → where it is written or read."""


BEHIND = 1 << 30
"""A number above that of every block."""


@dataclass(frozen=True)
class Shortcuts:
    """Which parts of the unpatched run a row may take over. All off is a whole pass."""

    resume: bool = True
    """Blocks below the lowest write."""
    inside: bool = True
    """Parts of a block before its first write."""
    prefix: bool = True
    """Tokens before the leftmost write."""
    last: bool = True
    """Tokens that no measure reads: all behind the last one, and in the last block all others."""


WHOLE_PASS = Shortcuts(resume=False, inside=False, prefix=False, last=False)


@dataclass(frozen=True, eq=False)
class BlockWork:
    """What the rows compute in one block. At all other tokens the unpatched values stand."""

    present: Mask
    """Tokens that pass through the block."""
    carried: Mask
    """Of these, the ones whose input comes from the block below."""
    project: Mask
    """Queries, keys and values are computed."""
    attend: Mask
    """Attention is computed."""
    output: Mask
    """Attention's output projection is computed."""
    mlp: Mask
    """The MLP is computed."""


@dataclass(frozen=True, eq=False)
class Held:
    """Rows of path patching: what their sublayers return is the unpatched run's, but for what is
    written; only the residual stream carries a change on."""

    rows: NDArray[np.bool_]
    """[row]"""
    mlps: NDArray[np.bool_]
    """[row] whether MLPs are held too."""
    norms: NDArray[np.bool_]
    """[row] whether norms divide by what they divide by on the base run; such rows are whole
    passes."""


@dataclass(frozen=True, eq=False)
class RowMasks:
    """Some rows, by what they write and what is read of them."""

    real: Mask
    """Columns that hold a token of the prompt."""
    writes: SiteMasks
    reads: SiteMasks
    """Sites that measures read inside the model."""
    final: Mask
    """Tokens that are read behind the last block."""
    held: Held | None = None

    @property
    def top(self) -> NDArray[np.int64]:
        """[row] the highest block that something is read in; all of them where it is read behind
        the last one."""
        found = np.full(len(self.real), -1, dtype=np.int64)
        for (site, layer), mask in self.reads.items():
            if site == "embed":  # in front of all blocks
                continue
            own = np.where(mask.any(axis=1), BEHIND if layer is None else layer, -1)
            found = np.maximum(found, own)
        return np.where(self.final.any(axis=1), BEHIND, found)

    def reached(self, mask: Mask, *, causal: bool) -> Mask:
        """The tokens that see one of these."""
        return later(mask) if causal else mask.any(axis=1, keepdims=True) & self.real


def later(mask: Mask) -> Mask:
    """The columns from the first one on."""
    return np.logical_or.accumulate(mask, axis=1)


def earlier(mask: Mask) -> Mask:
    """The columns up to the last one."""
    return np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def block_work(
    rows: RowMasks, n_layers: int, *, parallel: bool, causal: bool = True, shortcuts: Shortcuts
) -> Iterator[BlockWork]:
    """The work of each block, from the lowest up.

    parallel: attention and MLP read the same stream. causal: no token sees a later one.
    """
    none = np.zeros_like(rows.real)
    any_read = np.logical_or.reduce([rows.final, *rows.reads.values()])
    seen = earlier(any_read) & rows.real if shortcuts.last and causal else rows.real
    carried = rows.writes.get(("embed", None), none) & seen
    everything = rows.real & seen
    if shortcuts.prefix and causal:
        everything = later(np.logical_or.reduce([none, *rows.writes.values()])) & everything
    if not shortcuts.resume:
        carried = everything
    started = carried.any(axis=1)
    held, top = rows.held, rows.top
    of_attention, in_mlp = of_stage("key", "query", "weight"), of_stage("in_mlp")
    for layer in range(n_layers):
        written = {site: mask for (site, at), mask in rows.writes.items() if at == layer}
        read = {site: mask for (site, at), mask in rows.reads.items() if at == layer}
        at: defaultdict[Stage, Mask] = defaultdict(lambda: none)
        for site, mask in written.items():
            at[SITES[site].stage] = at[SITES[site].stage] | mask
        anything = np.logical_or.reduce([none, *written.values()])
        reading = np.logical_or.reduce([none, *read.values()])
        entered = carried
        if not shortcuts.prefix:
            # A row takes the whole prompt along from the block that it starts in.
            starting = anything.any(axis=1) & ~started
            entered = entered | (starting[:, None] & everything)
        if not shortcuts.inside:
            entered = entered | anything
        started |= anything.any(axis=1)
        needed = rows.final if layer == n_layers - 1 and shortcuts.last else seen
        if shortcuts.last:  # nothing above the highest read of a row
            needed = needed & (top > layer)[:, None]
        needed = needed | reading
        changed = entered | at["stream"]
        normed = changed | at["norm"]
        attended_to = normed | at["key"]
        asked = np.logical_or.reduce([none, *(read.get(site, none) for site in WITHIN_ATTENTION)])
        attend = normed | at["query"] | at["weight"]
        attend = (attend | rows.reached(attended_to, causal=causal)) & needed | asked
        attend = attend & rows.real
        project = normed & seen
        if held is not None:
            attend &= ~held.rows[:, None]
            projected = np.logical_or.reduce(
                [none, *(read.get(site, none) for site in of_attention)]
            )
            project &= projected | ~held.rows[:, None]
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
            mlp=np.logical_or.reduce([mlp, *(read.get(site, none) for site in in_mlp)]),
        )
        carried = out
