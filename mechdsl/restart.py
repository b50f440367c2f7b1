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

Mask: TypeAlias = NDArray[np.bool_]
"""[row, column]"""
Places: TypeAlias = Mapping[tuple[str, int | None], Mask]
"""(site, layer) → where it is written or read."""


INSIDE_MLP = ("router", "expert_out", "mlp_hidden")
"""Sites that are passed while the MLP runs, on the tokens that it runs on."""


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
class RowMasks:
    """Some rows, by what they write and what is read of them."""

    real: Mask
    """Columns that hold a token of the prompt."""
    writes: Places
    reads: Places
    """Sites that measures read inside the model."""
    final: Mask
    """Tokens that are read behind the last block."""

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
    for layer in range(n_layers):
        written = {site: mask for (site, at), mask in rows.writes.items() if at == layer}
        read = {site: mask for (site, at), mask in rows.reads.items() if at == layer}
        at = defaultdict(lambda: none, written)
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
        needed = needed | reading
        changed = entered | at["resid_pre"]
        normed = changed | at["attn_norm"] | at["mixer_norm"]
        attended_to = normed | at["k"] | at["v"]
        attend = normed | at["q"] | rows.reached(attended_to, causal=causal)
        attend = attend & rows.real & needed
        output = attend | (at["z"] & needed)
        middle = changed | output | at["head_out"] | at["attn_out"]
        middle = middle | at["mixer_out"] | at["resid_mid"]
        mlp = (changed if parallel else middle) | at["mlp_norm"]
        mlp = np.logical_or.reduce([mlp, *(at[site] for site in INSIDE_MLP)]) & needed
        out = (middle | mlp | at["mlp_out"] | at["resid_post"]) & needed
        yield BlockWork(
            present=(attended_to & seen) | attend | out | reading,
            carried=carried & seen,
            project=normed & seen,
            attend=attend,
            output=output,
            mlp=np.logical_or.reduce([mlp, *(read.get(site, none) for site in INSIDE_MLP)]),
        )
        carried = out
