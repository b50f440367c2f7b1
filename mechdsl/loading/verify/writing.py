# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Own values change nothing, others do, and what is written is read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mechdsl.hooks.loaded import Outcome
from mechdsl.hooks.places import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.verify.bench import TOKENS_PER_PASS, Bench, difference, hundredfold, sites_of


def writes_work(bench: Bench) -> Iterator[Outcome]:
    """Own values change nothing, values times 100 (or -100) do, and those are read back.

    All on the first prompt: one row per site with its own values in every layer, then one row per
    site and layer with changed values at the last token (at every token of an image or an encoder,
    and of what attention reads, as not every one need matter).
    """
    model, stack, anatomy = bench.model, bench.stack, bench.anatomy
    sites = sites_of(model, stack)
    changed = [(name, layer) for name in sites for layer in bench.some(name)]
    rows = [(name, tuple(bench.some(name)), True) for name in sites]
    rows += [(name, (layer,), False) for name, layer in changed]
    embed = SiteRead("embed")
    seen = stack == "vision"  # its effect shows in what the language model gets
    before = bench.reads[embed][0] if seen else bench.logits[0]

    def own(name: str, layer: int | None) -> Tensor:
        tokens = bench.batch.of_site(name, stack)
        return bench.real_of(0, bench.reads[SiteRead(name, layer, stack)], tokens)

    alone = not stack and model.shape.takes != "image"

    def part(name: str, values: Tensor) -> range:
        # A token needn't see itself (sparse attention), or may see nothing else (chunks).
        last = alone and name not in ("q", "k", "v")
        return range(len(values) - 1 if last else 0, len(values))

    def tried(
        some: Sequence[tuple[str, tuple[int | None, ...], bool]],
    ) -> tuple[list[tuple[str, Tensor, Tensor]], list[tuple[str, Tensor, Tensor]]]:
        """(own values, read back), each as (where, found, expected)."""
        writes: list[SiteWrite] = []
        wanted: list[SiteRead] = []
        for number, (name, layers, unchanged) in enumerate(some):
            for layer in layers:
                values, where = own(name, layer), SiteRead(name, layer, stack)
                at = range(len(values)) if unchanged else part(name, values)
                values = values[at.start :]
                values = values if unchanged else hundredfold(values, name, anatomy)
                writes.append(whole_site(where, number, at, values))
                wanted += [] if unchanged else [where]
        batch = bench.batch.take(torch.zeros(len(some), dtype=torch.long))
        if seen:
            result = run_whole(model, batch, writes=writes, reads=[*wanted, embed], stop=0)
        else:
            result = run_whole(model, batch, writes=writes, reads=wanted)
        after = result.reads[embed] if seen else result.logits
        assert after is not None
        same: list[tuple[str, Tensor, Tensor]] = []
        back: list[tuple[str, Tensor, Tensor]] = []
        for number, (name, layers, unchanged) in enumerate(some):
            if unchanged:
                same.append((name, after[number], before))
                continue
            values = own(name, layers[0])
            at = part(name, values).start
            read = result.reads[SiteRead(name, layers[0], stack)]
            found = bench.real_of(number, read, batch.of_site(name, stack))[at:]
            expected = hundredfold(values[at:], name, anatomy).to(found.dtype)
            back.append((label_of(name, layers[0]), found, expected))
            if difference(after[number], before) <= bench.tolerance / 10:
                still.append((name, layers[0]))
        return same, back

    still: list[tuple[str, int | None]] = []
    at_once = max(1, TOKENS_PER_PASS // max(bench.batch.ids.shape[1], bench.own.ids.shape[1]))
    outcomes: list[tuple[Outcome, Outcome]] = []
    for first in range(0, len(rows), at_once):
        same, back = tried(rows[first : first + at_once])
        outcomes.append(
            (
                bench.equal("writing a site's own values changes nothing", same),
                bench.equal("what is written is read back", back),
            )
        )
    for found in zip(*outcomes, strict=True):
        yield max(found, key=lambda one: (one.error, one.compared))
    unread = _unread(still, changed) if seen else set[int]()
    idle = [label_of(name, layer) for name, layer in still if layer not in unread]
    yield Outcome(
        "a hundredfold value changes the logits",
        error=float(len(idle)),
        tolerance=0.5,
        detail=", ".join(idle),
        failure="they stay as they are",
    )


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
