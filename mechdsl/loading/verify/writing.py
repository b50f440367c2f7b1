# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Own values change nothing, others do, and what is written is read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mechdsl.hooks.loaded import Outcome
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.verify.bench import TOKENS_PER_PASS, Bench, difference, hundredfold, sites_of

_EMBED = SiteRead("embed")

Row = tuple[str, tuple[int | None, ...], bool]
"""A site, the layers that are written in it, and whether with its own values."""
Pairs = list[tuple[str, Tensor, Tensor]]
"""(where, found, expected)"""


def writes_work(bench: Bench) -> Iterator[Outcome]:
    """Own values change nothing, values times 100 (or -100) do, and those are read back.

    All on the first prompt: one row per site with its own values in every layer, then one row per
    site and layer with changed values at the last token (at every token of an image or an encoder,
    and of what attention reads, as not every one need matter).
    """
    sites = sites_of(bench.model, bench.stack)
    # One token attends to itself, whatever its query and key are.
    alone = set(() if len(bench.real_of(0, bench.own.ids, bench.own)) > 1 else ("q", "k"))
    changed = [(name, layer) for name in sites if name not in alone for layer in bench.some(name)]
    rows: list[Row] = [(name, tuple(bench.some(name)), True) for name in sites]
    rows += [(name, (layer,), False) for name, layer in changed]
    writing = _Writing(bench)
    at_once = max(1, TOKENS_PER_PASS // max(bench.batch.ids.shape[1], bench.own.ids.shape[1]))
    outcomes: list[tuple[Outcome, Outcome]] = []
    for first in range(0, len(rows), at_once):
        same, back = writing.tried(rows[first : first + at_once])
        outcomes.append(
            (
                bench.equal("writing a site's own values changes nothing", same),
                bench.equal("what is written is read back", back),
            )
        )
    for found in zip(*outcomes, strict=True):
        yield max(found, key=lambda one: (one.error, one.compared))
    still = writing.still
    unread = _unread(still, changed) if writing.seen else set[int]()
    idle = [label_of(name, layer) for name, layer in still if layer not in unread]
    yield Outcome(
        "a hundredfold value changes the logits",
        error=float(len(idle)),
        tolerance=0.5,
        detail=", ".join(idle),
        failure="they stay as they are",
        asks_effect=True,
    )


class _Writing:
    """Passes whose rows are written to."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seen = bench.stack == "vision"
        """Its effect shows in what the language model gets."""
        self.before = bench.reads[_EMBED][0] if self.seen else bench.logits[0]
        self.still: list[tuple[str, int | None]] = []
        """Where changed values changed nothing."""

    def tried(self, rows: Sequence[Row]) -> tuple[Pairs, Pairs]:
        """(what comes out with own values, what is read back of changed ones)."""
        writes, wanted = self._writes(rows)
        batch = self.bench.batch.take(torch.zeros(len(rows), dtype=torch.long))
        model = self.bench.model
        if self.seen:
            result = run_whole(model, batch, writes=writes, reads=[*wanted, _EMBED], stop=0)
        else:
            result = run_whole(model, batch, writes=writes, reads=wanted)
        after = result.reads[_EMBED] if self.seen else result.logits
        assert after is not None
        same: Pairs = []
        back: Pairs = []
        for number, (name, layers, unchanged) in enumerate(rows):
            if unchanged:
                same.append((name, after[number], self.before))
                continue
            (layer,) = layers
            read = result.reads[SiteRead(name, layer, self.bench.stack)]
            values = self._own(name, layer)
            at = self._part(name, values).start
            tokens = batch.of_site(name, self.bench.stack)
            found = self.bench.real_of(number, read, tokens)[at:]
            expected = hundredfold(values[at:], name, self.bench.anatomy).to(found.dtype)
            back.append((label_of(name, layer), found, expected))
            if difference(after[number], self.before) <= self.bench.tolerance / 10:
                self.still.append((name, layer))
        return same, back

    def _writes(self, rows: Sequence[Row]) -> tuple[list[SiteWrite], list[SiteRead]]:
        """What is written, and which of it is read back."""
        writes: list[SiteWrite] = []
        wanted: list[SiteRead] = []
        for number, (name, layers, unchanged) in enumerate(rows):
            for layer in layers:
                values, where = self._own(name, layer), SiteRead(name, layer, self.bench.stack)
                at = range(len(values)) if unchanged else self._part(name, values)
                values = values[at.start :]
                if not unchanged:
                    values = hundredfold(values, name, self.bench.anatomy)
                    wanted.append(where)
                writes.append(whole_site(where, number, at, values))
        return writes, wanted

    def _own(self, name: str, layer: int | None) -> Tensor:
        """A site's own values."""
        bench = self.bench
        tokens = bench.batch.of_site(name, bench.stack)
        return bench.real_of(0, bench.reads[SiteRead(name, layer, bench.stack)], tokens)

    def _part(self, name: str, values: Tensor) -> range:
        """The tokens that changed values are written at."""
        # A token needn't see itself (sparse attention), or may see nothing else (chunks).
        model = self.bench.model
        each = model.shape.takes != "image" and model.calling.reads == "every token"
        last = each and not self.bench.stack and name not in ("q", "k", "v")
        return range(len(values) - 1 if last else 0, len(values))


def _unread(
    still: Sequence[tuple[str, int | None]], changed: Sequence[tuple[str, int | None]]
) -> set[int]:
    """The last blocks of an image encoder where the language model reads a block before them:
    nothing that is written there does anything."""
    layers = sorted({layer for _, layer in changed if layer is not None})
    moved = {layer for name, layer in changed if (name, layer) not in still and layer is not None}
    unread = {layer for layer in layers if layer > max(moved, default=len(layers))}
    return {layer for layer in unread if ("resid_pre", layer) in still}


def whole_site(where: SiteRead, row: int, positions: Sequence[int], values: Tensor) -> SiteWrite:
    """All units of a site at `positions` of one row; `values` is [positions, units, width]."""
    count, heads, size = values.shape
    rows = torch.full((count * heads,), row)
    places = torch.tensor(list(positions)).repeat_interleave(heads)
    which = torch.arange(heads).repeat(count)
    flat = values.reshape(-1, size)
    return SiteWrite(where.site, where.layer, rows, places, which, flat, stack=where.stack)


def label_of(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} layer {layer}"
