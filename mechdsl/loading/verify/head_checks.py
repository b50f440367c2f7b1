"""Checks that queries, keys, values and `z` belong to the heads that they are listed under."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mechdsl.forward.hooks.attention import (
    CannotPack,
    exchange_attention,
    get_own_attention,
    list_implementations,
)
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import CheckOutcome
from mechdsl.loading.bench import CheckBench, compute_difference, find_max_tokens
from mechdsl.models.shape import ModelShape, unit_count, vector_width


def check_values(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check a prompt of one token, for which attention can only return the token's value."""
    layers, stack = bench.with_sites("v", "z"), bench.stack
    if not layers or not is_token_stack(bench):
        return
    rows = [bench.real_of(i, bench.batch.ids, bench.batch)[:1].tolist() for i in range(2)]
    wanted = [SiteRead(site, layer, stack) for layer in layers for site in ("v", "z")]
    reads = run_on_tokens(bench, rows, wanted)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in layers:
            z, v = (reads[SiteRead(site, layer, stack)] for site in ("z", "v"))
            yield f"layer {layer}", z, _norm_per_head(v, z.shape[2])

    yield bench.equal("z = v of the head's group, over one token", pairs())


def is_token_stack(bench: CheckBench) -> bool:
    """Return whether the stack attends to text tokens, whose number is arbitrary."""
    if bench.model.shape.takes in ("text", "image and text"):
        return not bench.stack
    return bench.model.shape.takes == "two texts" or (
        bench.model.shape.has_encoder and not bench.stack
    )


def run_on_tokens(
    bench: CheckBench,
    rows: Sequence[Sequence[int]],
    reads: Sequence[SiteRead],
    writes: Sequence[SiteWrite] = (),
) -> dict[SiteRead, Tensor]:
    """Read sites while the stack, and the stack that it attends to, sees these tokens."""
    model, takes = bench.model, bench.model.shape.takes
    right = model.shape.has_encoder
    batch = Batch.of(rows, model.pad_id, "right" if right else "left", model.device)
    match takes:
        case "two texts":
            batch = batch.with_inputs({}, encoder=batch)
        case "audio" | "image to text" | "sound to text" | "attended image":
            heard = bench.batch.take(torch.zeros(len(rows), dtype=torch.long))
            batch = batch.with_inputs(heard.extra, **heard.frames)
        case _:
            pass
    stop = 0 if bench.stack == "encoder" else model.shape.n_layers
    return run_full(model, batch, reads=reads, writes=writes, stop=stop).reads


def check_queries_and_keys(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that only a head without query, or without keys, attends uniformly.

    Prompts have two tokens, of which the second is compared. Each row silences some heads: the
    query at the second token, the keys at both, or the key at the first token only (which must have
    an effect, unlike a query there). All layers are tried at once, each with its input from an
    unwritten pass; if that fails (a layer may read more than the stream), layers are tried one by
    one.
    """
    layers = bench.with_sites("q", "k", "v", "z")
    two = bench.real_of(0, bench.batch.ids, bench.batch)[:2].tolist()
    if not layers or not is_token_stack(bench) or len(two) < 2:
        return
    if set(layers) <= set(bench.with_sites("resid_pre")):
        rows = _list_silenced(bench.shape, layers)
        together = list(_check_silenced(bench, layers, two, rows, fed=True))
        if all(outcome.passed for outcome in together):
            yield from together
            return
    alone = [row for layer in layers for row in _list_silenced(bench.shape, [layer])]
    yield from _check_silenced(bench, layers, two, alone, fed=False)


def _check_silenced(
    bench: CheckBench,
    layers: Sequence[int],
    two: list[int],
    rows: Sequence[_SilencedHead],
    *,
    fed: bool,
) -> Iterator[CheckOutcome]:
    """Compare the heads of these rows on two tokens.

    fed: every layer reads the stream of a pass without writes.
    """
    stack = bench.stack
    batch = [two] * (1 + len(rows))
    writes = [
        write
        for layer in layers
        for site in ("q", "k")
        if (write := _silence_head(bench, rows, site, layer)) is not None
    ]
    if fed:
        streams = [SiteRead("resid_pre", layer, stack) for layer in layers]
        tensors = run_on_tokens(bench, [two], streams)
        writes += [_repeat_in_rows(stream, len(batch), tensors[stream][0]) for stream in streams]
    wanted = [SiteRead(site, layer, stack) for layer in layers for site in ("v", "z")]
    reads = run_on_tokens(bench, batch, wanted, writes)

    pairs: dict[str, list[tuple[str, Tensor, Tensor]]] = {"q": [], "k": []}
    moved = True
    silent: dict[tuple[int, int, str], Tensor] = {}
    for number, row in enumerate(rows, start=1):
        for layer in row.units:
            z = reads[SiteRead("z", layer, stack)][:, 1]
            v = _norm_per_head(reads[SiteRead("v", layer, stack)], z.shape[1])[number]
            heads = row.heads(bench.shape, layer)
            hit = torch.tensor([h in heads for h in range(z.shape[1])], device=z.device)
            where = f"layer {layer}"
            if row.positions == (0,):
                moved &= bool(((z[number] - z[0])[hit].abs().amax(-1) > 0).all())
                continue
            if not hit.all():
                pairs[row.site].append((where, z[number][~hit], z[0][~hit]))
            if not bench.anatomy.additive_positions:
                pairs[row.site].append((where, z[number][hit], v.mean(0)[hit]))
            elif (twin := silent.get((layer, row.bit, "q"))) is not None:
                pairs["k"].append((where, z[number][hit], twin[hit]))
            silent[layer, row.bit, row.site] = z[number]
    what = "attends uniformly, and no other head does"
    yield bench.equal(f"a head whose q is zero {what}", iter(pairs["q"]))
    yield bench.equal(f"a head whose k are zero {what}", iter(pairs["k"]))
    yield CheckOutcome(
        "k of an earlier token matters",
        error=0.0 if moved else 1.0,
        tolerance=0.5,
        failure="z of the second token doesn't change without the first token's key",
        asks_effect=True,
    )


@dataclass(frozen=True)
class _SilencedHead:
    """Heads without query or keys."""

    site: str
    bit: int
    """Bit of the heads' numbers; -1 for all heads."""
    units: Mapping[int, tuple[int, ...]]
    """By layer; layers without units are compared too."""
    positions: tuple[int, ...]

    def heads(self, shape: ModelShape, layer: int) -> frozenset[int]:
        """Return the heads of a layer; several heads may share a key."""
        group = unit_count(shape, "z", layer) // unit_count(shape, self.site, layer)
        return frozenset(u * group + i for u in self.units[layer] for i in range(group))


def _list_silenced(shape: ModelShape, layers: Sequence[int]) -> list[_SilencedHead]:
    """List rows that distinguish all heads of these layers.

    Each head has a number from 1 on, and each row silences the heads with one bit in their number.
    One further row for the key of the first token suffices, as each head is compared with itself.
    """
    rows: list[_SilencedHead] = []
    for site, positions in (("q", (1,)), ("k", (0, 1))):
        counts = [unit_count(shape, site, layer) for layer in layers]
        first = dict(zip(layers, accumulate(counts, initial=1), strict=False))
        for bit in range(sum(counts).bit_length()):
            chosen = {
                layer: tuple(u for u in range(count) if (first[layer] + u) >> bit & 1)
                for layer, count in zip(layers, counts, strict=True)
            }
            rows.append(_SilencedHead(site, bit, chosen, positions))
    every = {layer: tuple(range(unit_count(shape, "k", layer))) for layer in layers}
    return [*rows, _SilencedHead("k", -1, every, (0,))]


def _silence_head(
    bench: CheckBench, rows: Sequence[_SilencedHead], site: str, layer: int
) -> SiteWrite | None:
    places = [
        (number, position, unit)
        for number, row in enumerate(rows, start=1)
        if row.site == site
        for position in row.positions
        for unit in row.units.get(layer, ())
    ]
    if not places:
        return None
    row, position, unit = torch.tensor(places).unbind(1)
    zeros = torch.zeros(len(places), vector_width(bench.shape, site, layer))
    return SiteWrite(site, layer, row, position, unit, zeros, stack=bench.stack)


def _repeat_in_rows(where: SiteRead, rows: int, values: Tensor) -> SiteWrite:
    """Write the same values, [T, units, width], in every row."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (rows, *values.shape[:2])))
    row, position, unit = grid.unbind(1)
    flat = values.flatten(0, 1).repeat(rows, 1)
    return SiteWrite(where.site, where.layer, row, position, unit, flat, stack=where.stack)


def _norm_per_head(kv: Tensor, heads: int) -> Tensor:
    """Return [B, T, heads, d_head] of key-value heads, each repeated for its group."""
    return kv.repeat_interleave(heads // kv.shape[2], dim=2)


def check_heads(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check heads by the behavior of attention, else by the inputs of its attention function.

    The latter is for families with more than plain attention (sinks, gates, norms of values, other
    stacks).
    """
    done = list(check_values(bench))
    if all(outcome.passed for outcome in done):
        done += check_queries_and_keys(bench)
    if not done or not all(outcome.passed for outcome in done):
        try:
            handed = list(check_attention_inputs(bench))
        except (RuntimeError, ValueError, IndexError):  # heads that can't be compared
            handed = []
        if handed and (not done or all(outcome.passed for outcome in handed)):
            done = handed
    if not done and (bench.stack == "vision" or bench.model.shape.takes == "image"):
        done = list(check_head_writes(bench))
    yield from done


def check_attention_inputs(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check sites against the inputs of the attention function.

    Values must be equal. Queries and keys may differ by rotary, which preserves the length of each
    head's vector. A head's output must be in its own slice of `z`. Nothing is checked if the model
    doesn't attend through the library's functions.
    """
    read: dict[SiteRead, Tensor] = {}
    calls = _record_attention(bench, None, read)
    layers = sorted({n for site in ("q", "k", "v", "z") for n in bench.with_sites(site)})
    if not layers or not calls.keys() >= set(layers):
        return

    def both(site: str, which: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (location, site, attention input), the latter two [token, head, width]."""
        for layer in layers:
            if site in bench.anatomy.blocks[layer].taps:
                tensor = bench.real(read[SiteRead(site, layer, bench.stack)], site)
                yield f"layer {layer}", tensor, _drop_repeats(calls[layer][which], tensor.shape[1])

    def lengths(site: str, which: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        for where, tensor, handed in both(site, which):
            yield where, _profile_heads(tensor), _profile_heads(handed)

    def slices() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("z"):
            query, _, value = calls[layer]
            z = bench.read("z", layer)[:1] * 0
            yield f"layer {layer}", z, z.new_zeros(1, query.shape[1], value.shape[2])

    yield bench.equal("z has a slice for each head that attends", slices())
    yield bench.equal("attention receives v", both("v", 2))
    yield bench.equal("attention receives q after rotary", lengths("q", 0), bench.tolerance * 10)
    yield bench.equal("attention receives k after rotary", lengths("k", 1), bench.tolerance * 10)

    def silent() -> Iterator[tuple[str, Tensor, Tensor]]:
        for head in (0, -1):
            reads: dict[SiteRead, Tensor] = {}
            _record_attention(bench, head, reads)
            for layer in bench.with_sites("z"):
                z = bench.real(reads[SiteRead("z", layer, bench.stack)])
                others = list(range(z.shape[1]))
                del others[head]
                tensor = bench.read("z", layer)[:, others].abs().sum((0, 2))
                still = (z[:, others].abs().sum((0, 2)) == 0) & (tensor != 0)
                where = f"layer {layer}, head {head}"
                yield where, z[:, head], torch.zeros_like(z[:, head])
                yield where, still.float(), torch.zeros(len(others), device=z.device)

    yield bench.equal("only z of a head that attends to nothing is zero", silent())


def _drop_repeats(handed: Tensor, units: int) -> Tensor:
    """Return [token, units, width] of [token, heads, width].

    Some models repeat keys and values for their heads, either one by one or as a whole.
    """
    shared = handed.shape[1] // units
    one_by_one = shared == 1 or torch.equal(handed[:, 0], handed[:, 1])
    return handed[:, ::shared] if one_by_one else handed[:, :units]


def _profile_heads(heads: Tensor) -> Tensor:
    """Return [token, head]: norms of the heads' vectors relative to the token's mean."""
    lengths = heads.double().norm(dim=-1)
    alone = lengths.shape[1] == 1
    mean = lengths.mean() if alone else lengths.mean(1, keepdim=True)
    return lengths / torch.where(mean == 0, 1.0, mean)


def _record_attention(
    bench: CheckBench, silenced: int | None, reads: dict[SiteRead, Tensor] | None = None
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Record (query, key, value) of each block's attention function, [token, head, width].

    Args:
        silenced: A head whose output is set to zero, if any.
        reads: Receives the values of sites.
    """
    model = bench.model
    paths = {id(module): path for path, module in model.module.named_modules()}
    implemented = list_implementations(model)
    calls: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def layer_of(module: torch.nn.Module) -> int | None:
        start = paths[id(module)] + "."
        blocks = enumerate(bench.anatomy.blocks)
        return next((n for n, b in blocks if any(p.startswith(start) for p in b.projections)), None)

    def function(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attention = get_own_attention(module, implemented)
        out, weights = attention(module, query, key, value, attention_mask, **kwargs)
        layer = layer_of(module)
        if layer is not None:
            calls[layer].append((query, key, value))
            if silenced is not None:
                out = out.clone()
                out[:, :, silenced] = 0
        return out, weights

    wanted = [
        SiteRead(site, n, bench.stack)
        for site in ("q", "k", "v", "z")
        for n in bench.with_sites(site)
    ]
    try:
        with exchange_attention(model, function, masked=True):
            tensors = run_full(model, bench.batch, reads=wanted).reads
    except CannotPack:  # a different kernel
        return {}
    if reads is not None:
        reads.update(tensors)

    return {
        layer: (
            _join_calls([one[0] for one in made], "q", bench),
            _join_calls([one[1] for one in made], "k", bench),
            _join_calls([one[2] for one in made], "v", bench),
        )
        for layer, made in calls.items()
    }


def _join_calls(parts: list[Tensor], site: str, bench: CheckBench) -> Tensor:
    """Join to [token, head, width]; calls may split images, or repeat all of them."""
    mask = bench.batch.of_site(site, bench.stack).mask.bool()
    if parts[0].shape[0] * parts[0].shape[2] == mask.numel():
        parts = parts[:1]
    tokens = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return tokens[mask.flatten()] if len(tokens) == mask.numel() else tokens


def check_head_writes(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check heads by writes only, for modules that implement attention where all tokens see all.

    Without values a head returns zero; a query matters to its own token's z, and a key to the z of
    other tokens; none of them matters to other heads.
    """
    layers = bench.with_sites("q", "k", "v", "z")
    pairs: dict[str, list[tuple[str, Tensor, Tensor]]] = {"v": [], "q": [], "k": []}
    moved = True
    for layer in layers:
        tensors = {s: bench.read_of(0, s, layer) for s in ("q", "k", "v", "z")}
        count = len(tensors["z"])
        at = count // 2
        elsewhere = [token for token in range(count) if token != at]
        tries = [
            (site, unit, range(count) if site == "v" else range(at, at + 1))
            for site in ("v", "q", "k")
            for unit in sorted({0, tensors[site].shape[1] - 1})
        ]
        writes = [
            SiteWrite(
                site,
                layer,
                torch.full((len(places),), number),
                torch.tensor(list(places)),
                torch.full((len(places),), unit),
                -tensors[site][places.start : places.stop, unit] * (site != "v"),
                stack=bench.stack,
            )
            for number, (site, unit, places) in enumerate(tries)
        ]
        read = SiteRead("z", layer, bench.stack)
        batch = bench.batch.take(torch.zeros(len(tries), dtype=torch.long))
        stop = 0 if bench.stack else bench.shape.n_layers
        z = run_full(bench.model, batch, writes=writes, reads=[read], stop=stop).reads[read]
        for number, (site, unit, _) in enumerate(tries):
            where, now, was = f"layer {layer}, unit {unit}", z[number], tensors["z"]
            shared = was.shape[1] // tensors[site].shape[1]
            mine = slice(unit * shared, (unit + 1) * shared)
            others = [h for h in range(was.shape[1]) if not mine.start <= h < mine.stop]
            pairs[site].append((where, now[:, others], was[:, others]))
            if site == "v":
                pairs[site].append((where, now[:, mine], torch.zeros_like(now[:, mine])))
                continue
            if site == "q":
                pairs[site].append((where, now[elsewhere], was[elsewhere]))
            felt = [at] if site == "q" else elsewhere
            moved &= compute_difference(now[felt, mine], was[felt, mine]) > bench.tolerance
    if not layers:
        return
    yield bench.equal("a head without values returns nothing, and no other changes", pairs["v"])
    yield bench.equal("a query affects only its own token and head", pairs["q"])
    yield bench.equal("a key affects only its own head", pairs["k"])
    yield CheckOutcome(
        "a query affects its token, a key affects others",
        error=0.0 if moved else 1.0,
        tolerance=0.5,
        failure="z doesn't change",
        asks_effect=True,
    )


_MIN_SIMILARITY = 8
"""Length of a run of equal tokens, beyond which short convolutions don't see."""

_MIN_TOKENS = 4
"""Minimum number of tokens in a prompt with two equal ones in a row."""


def check_rotary_order(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that a token has one query and one key at two positions in the first block.

    This doesn't apply if its stream already depends on the position.
    """
    model = bench.model
    sites = [s for s in ("q", "k") if s in bench.anatomy.blocks[0].taps]
    row = bench.real_of(0, bench.batch.ids, bench.batch).tolist()
    # After the tokens that texts begin with, and within the available positions.
    most = find_max_tokens(model) or _MIN_SIMILARITY + 2
    row = [row[0], *[row[-1]] * min(_MIN_SIMILARITY, most - 2), row[1]] if len(row) > 1 else row
    if bench.stack or model.shape.takes != "text" or not sites or len(row) < _MIN_TOKENS:
        return
    batch = Batch.of([row], model.pad_id, "left", model.device)
    here, there = len(row) - 2, len(row) - 3
    wanted = [SiteRead("resid_pre", 0)] if "resid_pre" in model.shape.sites else []
    reads = run_full(model, batch, reads=[*wanted, *(SiteRead(s, 0) for s in sites)]).reads
    for where in wanted:
        stream = reads[where][0]
        if compute_difference(stream[here], stream[there]) > bench.tolerance:
            return
    pairs = [(s, reads[SiteRead(s, 0)][0, here], reads[SiteRead(s, 0)][0, there]) for s in sites]
    yield bench.equal("q and k of one token are equal at two positions", pairs)
