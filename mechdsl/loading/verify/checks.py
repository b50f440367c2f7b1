"""Checks that components add up, writes take effect, and packed passes match full ones.

Each check is a function from a `CheckBench` to outcomes; it is registered in the tuple `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.forward.hooks.attention import CannotPack
from mechdsl.forward.hooks.batch import Batch, EdgeWrite, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import view_layout
from mechdsl.forward.hooks.model import (
    BlockStack,
    CheckOutcome,
    LoadedModel,
    build_text_inputs,
    call_model,
    call_with_batch,
    without_vectors,
)
from mechdsl.forward.hooks.module_exchange import get_activation, load_weights
from mechdsl.forward.packed.activation_cache import record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading.bench import (
    MAX_CHECK_TOKENS,
    CheckBench,
    TensorComparison,
    amplify,
    build_text_sample,
    compute_difference,
    get_first,
    get_image_token,
    has_images,
    label_site,
    list_layers,
    list_sites,
    write_whole_site,
)
from mechdsl.loading.verify.head_checks import check_heads, check_rotary_order
from mechdsl.models.config import with_attention
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES

_EMBED_READ = SiteRead("embed")

WriteRow = tuple[str, tuple[int | None, ...], bool]
"""A site, its written layers, and whether the values are the site's unchanged ones."""

TensorComparisons = list[tuple[str, Tensor, Tensor]]
"""(label, actual, expected)."""


def check_writes(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that unchanged values change nothing, and that scaled values act and are read back.

    Scaled values are the original ones times 100 (or -100). All rows use the first prompt: one row
    per site with unchanged values in every layer, then one row per site and layer with scaled
    values at the last token (at every token of an image or an encoder, and of attention inputs,
    because a single one of these may have no effect).
    """
    sites = list_sites(bench.model, bench.stack)
    # A single token attends to itself, whatever its query and key are.
    alone = set(() if len(bench.real_of(0, bench.own.ids, bench.own)) > 1 else ("q", "k"))
    changed = [(name, layer) for name in sites if name not in alone for layer in bench.some(name)]
    rows: list[WriteRow] = [(name, tuple(bench.some(name)), True) for name in sites]
    rows += [(name, (layer,), False) for name, layer in changed]
    writing = _WriteTrial(bench)
    at_once = max(1, MAX_CHECK_TOKENS // max(bench.batch.ids.shape[1], bench.own.ids.shape[1]))
    outcomes: list[tuple[CheckOutcome, CheckOutcome]] = []
    for first in range(0, len(rows), at_once):
        same, back = writing.tried(rows[first : first + at_once])
        outcomes.append(
            (
                bench.equal("writing a site's current values changes nothing", same),
                bench.equal("written values are read back", back),
            )
        )
    for found in zip(*outcomes, strict=True):
        yield max(found, key=lambda one: (one.error, one.compared))
    still = writing.still
    unread = _find_unread(still, changed) if writing.seen else set[int]()
    idle = [label_site(name, layer) for name, layer in still if layer not in unread]
    yield CheckOutcome(
        "a value 100 times as large changes the logits",
        error=float(len(idle)),
        tolerance=0.5,
        detail=", ".join(idle),
        failure="they don't change",
        asks_effect=True,
    )


class _WriteTrial:
    """Passes whose rows are written to."""

    def __init__(self, bench: CheckBench) -> None:
        self.bench = bench
        self.seen = bench.stack == "vision" and has_images(bench.batch)
        """Whether the effect shows in the input of the language model."""
        self.before = bench.reads[_EMBED_READ][0] if self.seen else bench.logits[0]
        self.still: list[tuple[str, int | None]] = []
        """Where scaled values had no effect."""

    def tried(self, rows: Sequence[WriteRow]) -> tuple[TensorComparisons, TensorComparisons]:
        """Return outputs under unchanged values, and scaled values that were read back."""
        writes, wanted = self._writes(rows)
        batch = self.bench.batch.take(torch.zeros(len(rows), dtype=torch.long))
        model = self.bench.model
        if self.seen:
            result = run_full(model, batch, writes=writes, reads=[*wanted, _EMBED_READ], stop=0)
        else:
            result = run_full(model, batch, writes=writes, reads=wanted)
        after = result.reads[_EMBED_READ] if self.seen else result.logits
        assert after is not None
        same: TensorComparisons = []
        back: TensorComparisons = []
        for number, (name, layers, unchanged) in enumerate(rows):
            if unchanged:
                same.append((name, after[number], self.before))
                continue
            (layer,) = layers
            read = result.reads[SiteRead(name, layer, self.bench.stack)]
            values = self._own(name, layer)
            at = self._part(name, values).start
            tokens = batch.of_site(name, self.bench.stack)
            expectation = self.bench.real_of(number, read, tokens)[at:]
            expected = amplify(values[at:], name, self.bench.anatomy).to(expectation.dtype)
            back.append((label_site(name, layer), expectation, expected))
            if compute_difference(after[number], self.before) <= self.bench.tolerance / 10:
                self.still.append((name, layer))
        return same, back

    def _writes(self, rows: Sequence[WriteRow]) -> tuple[list[SiteWrite], list[SiteRead]]:
        """Build the writes, and the reads of the scaled ones."""
        writes: list[SiteWrite] = []
        wanted: list[SiteRead] = []
        for number, (name, layers, unchanged) in enumerate(rows):
            for layer in layers:
                values, where = self._own(name, layer), SiteRead(name, layer, self.bench.stack)
                at = range(len(values)) if unchanged else self._part(name, values)
                values = values[at.start :]
                if not unchanged:
                    values = amplify(values, name, self.bench.anatomy)
                    wanted.append(where)
                writes.append(write_whole_site(where, number, at, values))
        return writes, wanted

    def _own(self, name: str, layer: int | None) -> Tensor:
        """Return the original values of a site."""
        bench = self.bench
        tokens = bench.batch.of_site(name, bench.stack)
        return bench.real_of(0, bench.reads[SiteRead(name, layer, bench.stack)], tokens)

    def _part(self, name: str, values: Tensor) -> range:
        """Return the tokens at which scaled values are written."""
        # A token may not see itself (sparse attention), or nothing else (chunks).
        model = self.bench.model
        each = model.shape.takes != "image" and model.calling.reads == "every token"
        last = each and not self.bench.stack and name not in ("q", "k", "v")
        return range(len(values) - 1 if last else 0, len(values))


def _find_unread(
    still: Sequence[tuple[str, int | None]], changed: Sequence[tuple[str, int | None]]
) -> set[int]:
    """Find the last blocks of an image encoder whose output the language model doesn't read.

    Such a model reads an earlier block, so writes to the last ones have no effect.
    """
    layers = sorted({layer for _, layer in changed if layer is not None})
    moved = {layer for name, layer in changed if (name, layer) not in still and layer is not None}
    unread = {layer for layer in layers if layer > max(moved, default=len(layers))}
    return {layer for layer in unread if ("resid_pre", layer) in still}


def check_logits(bench: CheckBench) -> Iterator[CheckOutcome]:
    bare = call_with_batch(bench.model, bench.batch)
    pairs = [("", bench.output(bench.logits), bench.output(bare))]
    yield bench.equal("logits with hooks = logits without hooks", pairs)


def check_padding(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check a padded batch against prompts alone, given as a user would: only their tokens."""
    if bench.batch.extra or bench.model.shape.takes not in ("text", "image and text"):
        return
    alone = call_single_prompts(bench.model, bench.batch)
    pairs = (
        (f"prompt {i}", bench.real_of(i, bench.logits, bench.batch), expected)
        for i, expected in enumerate(alone)
    )
    yield bench.equal("logits in a padded batch = logits of the prompt alone", pairs)


def call_single_prompts(model: LoadedModel, batch: Batch) -> Iterator[Tensor]:
    """Yield [T, vocab] of each prompt run alone, without masks or positions."""
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row].bool()][None]
        yield call_model(model, build_text_inputs(model, ids, None))[0]


def check_causality(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check causality, which the planner relies on to skip earlier tokens."""
    takes = ("text", "image and text", "attended image")
    if not bench.model.shape.causal or bench.model.shape.takes not in takes:
        return
    ids = bench.batch.ids[0][bench.batch.mask[0].bool()]
    other = ids.clone()
    if len(ids) < 2:
        return
    other[-1] = ids[-2]
    both = Batch.of([ids.tolist(), other.tolist()], 0, "left", bench.model.device)
    if bench.model.shape.attends_to_image:
        twice = bench.batch.take(torch.tensor([0, 0]))
        both = both.with_inputs(twice.extra, **twice.frames)
    was, now = call_with_batch(bench.model, both)[:, :-1]
    yield bench.equal("a different last token doesn't change earlier logits", [("", now, was)])


def check_sublayer_sums(bench: CheckBench) -> Iterator[CheckOutcome]:
    def pairs() -> Iterator[TensorComparison]:
        for layer in bench.with_sites("resid_pre", "resid_post"):
            block = bench.anatomy.blocks[layer]
            if block.middle or block.end or not block.adds_up:
                continue
            added = [s for s in ("attn_out", "mixer_out", "mlp_out") if s in block.taps]
            parts = [bench.vectors(site, layer) for site in ("resid_pre", *added)]
            crossed = None if bench.stack else bench.of_stack("cross", "attn_out", layer)
            parts += [] if crossed is None else [crossed]
            total = torch.stack(parts)
            yield f"layer {layer}", total.sum(0), bench.vectors("resid_post", layer), total

    outcome = bench.equal("resid_pre + attn_out + mlp_out = resid_post", pairs())
    factors = None if outcome.passed else _fit_factors(pairs(), bench.tolerance)
    if factors is not None:
        outcome = replace(
            outcome,
            detail="",
            failure=f"the model scales its stream: in the last block, resid_post = {factors}",
            hint="mechdsl needs a stream that is the sum of what the blocks write",
        )
    yield outcome


def _fit_factors(pairs: Iterable[TensorComparison], tolerance: float) -> str | None:
    """Return the last block's sum with factors, `0.85 · resid_pre + …`; None unless factors explain
    the output of each block."""
    text = None
    for _, _, after, *total in pairs:
        terms, target = total[0].double().flatten(1).T, after.double().flatten()
        factors = torch.linalg.lstsq(terms, target).solution
        if (terms @ factors - target).norm() > tolerance * target.norm():
            return None
        names = ("resid_pre", "the first sublayer", "the second")
        named = zip(factors.tolist(), names, strict=False)
        text = " + ".join(f"{factor:.2f} · {name}" for factor, name in named)
    return text


def check_gains(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that resid_post gains at the last token what mlp_out gains.

    This replaces the check of sums if the stream has further summands, or is scaled.
    """
    blocks = bench.anatomy.blocks
    layers = [
        n
        for n in bench.with_sites("mlp_out", "resid_post")
        if not blocks[n].adds_up and blocks[n].passes_on and not blocks[n].end
    ]
    if not layers:
        return
    stack = bench.stack
    tokens = bench.batch.of_site("mlp_out", stack)

    def own(site: str, layer: int) -> Tensor:
        return bench.real_of(0, bench.reads[SiteRead(site, layer, stack)], tokens)

    writes: list[SiteWrite] = []
    for number, layer in enumerate(layers):
        values = own("mlp_out", layer)
        where, last = SiteRead("mlp_out", layer, stack), len(values) - 1
        writes.append(write_whole_site(where, number, (last,), values[-1:] + values[:1]))
    batch = bench.batch.take(torch.zeros(len(layers), dtype=torch.long))
    wanted = [SiteRead("resid_post", layer, stack) for layer in layers]
    reads = run_full(bench.model, batch, writes=writes, reads=wanted).reads
    tokens = batch.of_site("mlp_out", stack)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for number, layer in enumerate(layers):
            stream = bench.real_of(number, reads[SiteRead("resid_post", layer, stack)], tokens)
            gained = stream[-1] - own("resid_post", layer)[-1]
            yield f"layer {layer}", gained, own("mlp_out", layer)[0]

    yield bench.equal(
        "a change of mlp_out changes resid_post equally", pairs(), bench.tolerance * 10
    )


def check_norms_of_sums(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check norms after the sums, as in BERT."""

    def of(norm: str, added: str, out: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("resid_pre", added, out):
            path = getattr(bench.anatomy.blocks[layer], norm)
            before = bench.vectors("resid_pre", layer) if norm == "middle" else bench.between(layer)
            if path is not None and before is not None:
                total = before + bench.vectors(added, layer)
                yield f"layer {layer}", bench.vectors(out, layer), bench.through(path, total)

    yield bench.equal(
        "resid_mid = the norm of resid_pre + attn_out", of("middle", "attn_out", "resid_mid")
    )
    yield bench.equal(
        "resid_post = the norm of resid_mid + mlp_out", of("end", "mlp_out", "resid_post")
    )


def check_block_order(bench: CheckBench) -> Iterator[CheckOutcome]:
    ids = bench.real(bench.own.ids)
    pictured = torch.zeros_like(ids, dtype=torch.bool)
    if has_images(bench.batch) and not bench.stack:
        pictured = ids == get_image_token(bench.model)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("resid_pre", "resid_post")[:-1]:
            scale = bench.anatomy.blocks[layer].stream_scale
            if scale is None:
                continue
            below, above = bench.vectors("resid_post", layer), bench.vectors("resid_pre", layer + 1)
            same = ~pictured if bench.anatomy.blocks[layer].fed else slice(None)
            yield f"layer {layer}", (below * scale)[same], above[same]

    yield bench.equal("resid_post of a layer = resid_pre of the next", pairs())


def check_norm_positions(bench: CheckBench) -> Iterator[CheckOutcome]:
    anatomy = bench.anatomy

    def before(layer: int) -> Tensor | None:
        """Return the stream before attention."""
        if bench.stack == "cross":
            return bench.of_stack("", "resid_mid", layer)
        return bench.vectors("resid_pre", layer) if layer in streams else None

    def of(
        site: str, field: str, stream: Callable[[int], Tensor | None]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites(site):
            block = anatomy.blocks[layer]
            if field == "attn_norm" and not block.reads_stream:
                continue
            normed = stream(layer)
            if normed is None:
                continue
            path = getattr(block, field)
            if path is not None:
                normed = bench.through(path, normed)
            yield f"layer {layer}", bench.vectors(site, layer), normed

    streams = bench.with_sites("resid_pre")
    read = "resid_mid" if bench.stack == "cross" else "resid_pre"
    for site in ("attn_norm", "mixer_norm"):
        pairs = list(of(site, "attn_norm", before))
        if pairs:
            yield bench.equal(f"{site} = the preceding norm, of {read}", pairs)
    between = "resid_pre" if anatomy.parallel else "resid_mid"
    if bench.stack != "cross":
        pairs = list(of("mlp_norm", "mlp_norm", bench.between))
        yield bench.equal(f"mlp_norm = the preceding norm, of {between}", pairs)
        # Several MLPs read that norm, so mlp_norm isn't a site of any of them.
        others = set(bench.with_sites("resid_mid")) - set(bench.with_sites("mlp_norm"))
        paths = {n: path for n in sorted(others) if (path := anatomy.blocks[n].mlp_norm)}
        if paths:
            read = _read_stream(bench, paths)
            pairs = [(f"layer {n}", bench.vectors("resid_mid", n), read[n]) for n in paths]
            yield bench.equal("the norm after attention reads resid_mid", pairs)


def _read_stream(bench: CheckBench, paths: Mapping[int, str]) -> dict[int, Tensor]:
    """Return, by layer, the input [tokens, d_model] of one of its modules."""
    read: dict[int, Tensor] = {}

    def look(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            read[layer] = bench.real(get_activation(args, kwargs), "resid_mid")

        return hook

    with ExitStack() as stack:
        for layer, path in paths.items():
            hook = bench.module(path).register_forward_pre_hook(look(layer), with_kwargs=True)
            stack.callback(hook.remove)
        call_with_batch(bench.model, bench.batch)
    return read


def check_image_merge(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that image features replace the image tokens in `embed`."""
    model, batch = bench.model, bench.batch
    mark = get_image_token(model)
    columns = torch.nonzero(bench.real_of(0, batch.ids, batch) == mark).flatten().tolist()
    seen = bench.read_of(0, "embed", None)[columns]
    if model.anatomy.embedding is not None and mark < model.shape.vocab_size:
        blind = bench.module(model.anatomy.embedding)(torch.full_like(batch.ids[0, :1], mark))
        yield CheckOutcome(
            "embed at an image's tokens is not that of the token",
            error=0.0
            if compute_difference(seen[:, 0], blind.expand(len(seen), -1)) > 1e-2
            else 1.0,
            tolerance=0.5,
            failure="it is, so the image is inserted after it",
        )
    generator = torch.Generator(seen.device).manual_seed(0)
    noise = torch.randn(seen.shape, generator=generator, device=seen.device) * seen.std()
    write = write_whole_site(SiteRead("embed"), 0, columns, noise.to(seen.dtype))
    logits = run_full(model, batch.take(torch.tensor([0])), writes=[write]).logits
    assert logits is not None
    moved = compute_difference(logits[0, -1], bench.logits[0, -1]) > bench.tolerance
    yield CheckOutcome(
        "noise at an image's tokens of embed changes the logits",
        error=0.0 if moved else 1.0,
        tolerance=0.5,
        failure="they don't change",
    )


def check_position_embedding(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that the addition to `embed` of patches is the same for every image."""
    tap = bench.anatomy.taps.get("embed")
    if bench.stack or tap is None or tap.patches is None:
        return
    outputs: list[Any] = []
    handle = bench.module(tap.path).register_forward_hook(lambda *given: outputs.append(given[-1]))
    try:
        call_with_batch(bench.model, bench.batch)
    finally:
        handle.remove()
    before = bench.reads[SiteRead("embed", None)][:, :, 0]
    first, *others = get_first(outputs[0]).to(before) - before
    pairs = [(f"image {n}", other, first, before) for n, other in enumerate(others, 2)]
    yield bench.equal("the addition to embed of patches is the same for every image", pairs)


def check_cross_attention(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that values of cross attention are computed from the encoder's `final_norm`."""
    normed = bench.of_stack("encoder", "final_norm") if bench.stack == "cross" else None
    blocks = bench.anatomy.blocks
    layers = [n for n in bench.with_sites("v") if blocks[n].taps["v"].path in blocks[n].projections]
    if normed is None or not layers:
        return
    if normed.shape[-1] != bench.module(blocks[layers[0]].taps["v"].path).in_features:
        normed = bench.module("enc_to_dec_proj")(normed)  # of the library's pairs of models

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in layers:
            tap = blocks[layer].taps["v"]
            values = view_layout(bench.module(tap.path)(normed[None]), tap.layout)[0]
            yield f"layer {layer}", bench.read("v", layer), values

    yield bench.equal("v of cross attention is computed from the encoder's final_norm", pairs())


def check_final_norm(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check `final_norm` if the last norm returns it."""
    tap, path = bench.anatomy.taps.get("final_norm"), bench.anatomy.final_norm
    last = bench.with_sites("resid_post")[-1:]
    if tap is None or path is None or (tap.side, tap.path) != ("out", path) or not last:
        return
    stream = bench.vectors("resid_post", last[0])
    pairs = [("", bench.vectors("final_norm"), bench.module(path)(stream))]
    yield bench.equal("final_norm = the last norm of the last resid_post", pairs)


def check_unembedding_order(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that the unembedding alone orders tokens as the logits do.

    A scale or cap after it preserves the order. A constant bias may change it.
    """
    path = bench.anatomy.unembedding
    if bench.stack or path is None or "final_norm" not in bench.shape.sites:
        return
    logits = bench.module(path)(bench.vectors("final_norm"))
    found, expected = bench.output(bench.logits), logits[..., : bench.logits.shape[-1]]
    # Ties, as in hand-written circuits, may be ordered either way.
    likeliest = expected.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
    spacing = torch.finfo(expected.dtype).eps * expected.abs().amax(-1)
    off = expected.amax(-1) - likeliest > spacing
    bias = (found - expected).mean(0, keepdim=True)
    if len(found) > 1 and compute_difference(expected + bias, found) <= bench.tolerance:
        off = torch.zeros_like(off)
    yield CheckOutcome(
        "final_norm through the unembedding orders tokens as logits do",
        error=float(off.float().mean()),
        tolerance=0.0,
        failure="the most likely token differs",
    )


def check_head_sums(bench: CheckBench) -> Iterator[CheckOutcome]:
    anatomy = bench.anatomy

    def pairs() -> Iterator[TensorComparison]:
        for layer in bench.with_sites("head_out", "attn_out"):
            block = anatomy.blocks[layer]
            assert block.output is not None
            heads = bench.read("head_out", layer)
            total = heads.sum(1)
            projection = bench.module(block.output)
            with load_weights(projection):
                bias = getattr(projection, "bias", None)
            total = total if bias is None else total + bias
            if block.attn_output_norm is not None:
                total, heads = bench.through(block.attn_output_norm, total), total * 0
            total = bench.scaled(block.taps["attn_out"], total)
            heads = bench.scaled(block.taps["attn_out"], heads)
            yield f"layer {layer}", total, bench.vectors("attn_out", layer), heads

    norm = "the norm after attention of " if anatomy.blocks[0].attn_output_norm else ""
    yield bench.equal(f"{norm}the sum of head_out and the bias = attn_out", pairs())


def check_neuron_sums(bench: CheckBench) -> Iterator[CheckOutcome]:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("mlp_hidden", "mlp_out"):
            block = bench.anatomy.blocks[layer]
            if block.down is None:
                continue
            total = bench.through(block.down, bench.read("mlp_hidden", layer).squeeze(2))
            if block.mlp_output_norm is not None:
                total = bench.through(block.mlp_output_norm, total)
            total = bench.scaled(block.taps["mlp_out"], total)
            out = bench.vectors("mlp_out", layer)
            # Some models multiply it by a constant after the map.
            size = (total.double() ** 2).sum()
            factor = (total.double() * out.double()).sum() / size if size else 1.0
            yield f"layer {layer}", total.double() * factor, out

    yield bench.equal("mlp_hidden through the down projection = mlp_out", pairs())


def check_expert_sums(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check that experts of weight 0 add nothing: expert_out is the weight times the output."""

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("router", "expert_out"):
            weights, outs = bench.vectors("router", layer), bench.read("expert_out", layer)
            idle = weights == 0
            yield f"layer {layer}", outs[idle], torch.zeros_like(outs[idle])

    yield bench.equal("expert_out is zero where router is", pairs())


_IDLE_TOLERANCE = 16
"""Multiples of the float spacing by which rounding may move an output."""


def find_idle_sites(
    model: LoadedModel, given: Batch, stack: str = ""
) -> list[tuple[str, int | None]]:
    """Find sites where noise at every token of the first prompt leaves the output unchanged.

    Args:
        given: A batch of two rows. Images are replaced by text, because the language model may
            read something other than the output of their encoder.
        stack: The stack of the sites.

    Returns:
        (site, layer) of each.
    """
    if stack == "vision":
        return []
    with torch.inference_mode():
        bench = CheckBench.of(
            model, stack, build_text_sample(model) if has_images(given) else given
        )
        places = [read for read in bench.reads if read.stack == stack]
        own = [read for read in places if read.site in list_sites(model, stack)]
        at_once = max(1, MAX_CHECK_TOKENS // max(bench.batch.ids.shape[1], bench.own.ids.shape[1]))
        idle: list[SiteRead] = []
        for first in range(0, len(own), at_once):
            idle += _find_unmoved(bench, own[first : first + at_once])
    return [(read.site, read.layer) for read in idle]


def _find_unmoved(bench: CheckBench, places: list[SiteRead]) -> list[SiteRead]:
    """Return the sites where noise has no effect, each tried in a separate row."""
    generator = torch.Generator().manual_seed(0)
    writes: list[SiteWrite] = []
    for row, read in enumerate(places):
        tokens = bench.batch.of_site(read.site, bench.stack)
        values = bench.real_of(0, bench.reads[read], tokens)
        # As large as the site's values, and at least 1 in case they are zero.
        size = max(1.0, float(values.double().std(unbiased=False)))
        noise = torch.randn(values.shape, generator=generator).to(values) * size
        writes.append(write_whole_site(read, row, range(len(values)), noise))
    batch = bench.batch.take(torch.zeros(len(places), dtype=torch.long))
    after = run_full(bench.model, batch, writes=writes).logits
    assert after is not None
    return [read for row, read in enumerate(places) if _is_same(after[row], bench.logits[0])]


def _is_same(after: Tensor, before: Tensor) -> bool:
    """Return whether two outputs are equal up to rounding.

    Each output number is compared separately, because magnitudes may differ a millionfold.
    """
    room = _IDLE_TOLERANCE * torch.finfo(before.dtype).eps * before.abs().amax(0, keepdim=True)
    return bool(((after - before).abs() <= room).all())


ATTENTION_IDENTITY = "attention, computed explicitly = the model's attention"
"""An identity that a model may break; it then has no sites within attention."""


def check_attention(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check outputs of heads and logits while all patterns are read."""
    layers = bench.with_sites("z")
    if bench.stack or not layers:
        return
    within = [SiteRead("pattern", layer) for layer in layers]
    heads = [SiteRead("z", layer) for layer in layers]
    try:
        model = add_attention_sites(bench.model)
        result = run_full(model, bench.batch, reads=[*within, *heads])
    except Exception as error:  # an unknown attention implementation may raise anything
        text = " ".join(str(error).split())[:100] or type(error).__name__
        yield CheckOutcome(ATTENTION_IDENTITY, float("inf"), bench.tolerance, failure=text)
        return

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        assert result.logits is not None
        yield "logits", bench.output(result.logits), bench.output(bench.logits)
        for read in heads:
            values = bench.real(result.reads[read])
            yield f"z, layer {read.layer}", values, bench.read("z", read.layer)

    yield bench.equal(ATTENTION_IDENTITY, pairs())


def add_attention_sites(model: LoadedModel) -> LoadedModel:
    """Add the sites within attention, in blocks that have heads."""
    shape = model.shape
    layers = model.anatomy.layers("z")
    partly = dict(shape.partly)
    if len(layers) < shape.n_layers:
        partly |= dict.fromkeys(ATTENTION_INTERNAL_SITES, frozenset(layers))
    sites = shape.sites | set(ATTENTION_INTERNAL_SITES)
    return replace(model, shape=replace(shape, sites=sites, partly=partly))


STACK_ATTENTION_SITES: Mapping[str, frozenset[str]] = {
    "encoder": frozenset(ATTENTION_INTERNAL_SITES),
    "cross": frozenset({"scores", "pattern"}),
}
"""Sites within attention of the stacks of an encoder-decoder."""

_STACK_ATTENTION_ERROR = 1e-4
"""Largest difference of logits, relative to the largest one, while attention is computed
explicitly."""


def add_stack_attention(model: LoadedModel, batch: Batch) -> LoadedModel:
    """Add the sites within attention to the text stacks of an encoder-decoder.

    The model is unchanged if attention, computed explicitly there, changes the output of the batch.
    """
    others: dict[str, BlockStack] = {}
    for stack, block_stack in model.others.items():
        if stack == "vision":
            continue
        partly, more = dict(block_stack.shape.partly), STACK_ATTENTION_SITES[stack]
        if "z" in partly:
            partly |= dict.fromkeys(more, partly["z"])
        sites = block_stack.shape.sites | more
        others[stack] = replace(
            block_stack, shape=replace(block_stack.shape, sites=sites, partly=partly)
        )
    extended = replace(model, others={**model.others, **others})
    shapes = {stack: block_stack.shape for stack, block_stack in extended.others.items()}
    extended = replace(extended, shape=replace(model.shape, others=shapes))
    reads = [
        SiteRead("pattern", layer, stack)
        for stack, block_stack in others.items()
        for layer in block_stack.anatomy.layers("z")
    ]
    real = batch.mask.bool()
    try:
        plain, explicit = (run_full(extended, batch, reads=each).logits for each in ((), reads))
    except Exception:  # an unknown attention implementation may raise anything
        return model
    assert plain is not None
    assert explicit is not None
    off = (explicit - plain)[real].abs().amax() / plain[real].abs().amax()
    most = max(_STACK_ATTENTION_ERROR, 8 * torch.finfo(model.dtype).eps)
    return extended if bool(off <= most) else model


def add_vision_attention(model: LoadedModel, batch: Batch) -> LoadedModel:
    """Add the sites within attention to the vision encoder of a vision-language model.

    The model is unchanged if attention, computed explicitly there, changes the vectors of images,
    or the logits of a model whose blocks attend to them.

    Args:
        model: The model.
        batch: Prompts with pixels.
    """
    block_stack = model.stack("vision")
    attends = model.shape.attends_to_image
    block_stack = replace(block_stack, shape=with_attention(block_stack.shape))
    shape = with_attention(model.shape.others["vision"])
    shapes = {**model.shape.others, "vision": shape}
    extended = replace(model, others={**model.others, "vision": block_stack})
    extended = replace(extended, shape=replace(model.shape, others=shapes))
    zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    same = [
        EdgeWrite(layer, "reweight", zero, zero, zero, zero, zero, one, "vision")
        for layer in block_stack.anatomy.layers("z")
    ]
    given = without_vectors(batch) if attends else batch

    def run(edges: Sequence[EdgeWrite]) -> Tensor:
        if not attends:
            reads = [_EMBED_READ]
            return run_full(extended, given, stop=0, reads=reads, edges=edges).reads[_EMBED_READ]
        logits = run_full(extended, given, edges=edges).logits
        assert logits is not None
        return logits[given.mask.bool()]

    try:
        plain, explicit = run(()), run(same)
    except Exception:  # an unknown attention implementation may raise anything
        return model
    off = (explicit - plain).abs().amax() / plain.abs().amax()
    most = max(_STACK_ATTENTION_ERROR, 8 * torch.finfo(model.dtype).eps)
    return extended if bool(off <= most) else model


PACKED_IDENTITY = "rows restarted at a block and token = full forward passes"
"""An identity that a model may break; every row is then a full pass."""

PACKED_IMAGE_IDENTITY = "rows restarted at a block and token = full forward passes (with an image)"
"""Counterpart of `PACKED_IDENTITY` for rows with an image."""

_RESTART_TOKENS = ((2, 4), (1, 2))
"""By prompt, the tokens at which rows restart."""

_NARROWED_ROWS = 2
"""Number of rows that are also restarted for logits of selected tokens (a sliced unembedding)."""


def check_packed_rows(bench: CheckBench) -> Iterator[CheckOutcome]:
    """Check rows restarted at every block, and at every site of one block, at various tokens.

    Their values differ from the model's own, so that wrongly reused activations show.
    """
    try:
        encodes = bench.model.shape.has_encoder
        if encodes and "cross" not in bench.model.others:
            raise CannotPack(
                "its decoder attends to its own and the encoder's tokens in one operation"
            )
        if bench.anatomy.whole:
            raise CannotPack(bench.anatomy.whole)
        yield _compare_packed_rows(bench)
    except Exception as error:  # an unknown architecture may raise anything
        text = " ".join(str(error).split())[:100] or type(error).__name__
        yield CheckOutcome(PACKED_IDENTITY, float("inf"), bench.tolerance, failure=text)


def retry_with_one_prompt(
    model: LoadedModel, given: Batch
) -> tuple[LoadedModel, CheckOutcome] | None:
    """Retry packed rows with calls of one prompt, after calls with tokens of many rows failed.

    Returns:
        The changed model and the outcome; None if there is no alternative or it fails too.
    """
    encodes = model.shape.has_encoder
    if model.calling.packs == "one prompt" or encodes or model.anatomy.whole:
        return None
    given = build_text_sample(model) if has_images(given) else given
    other = replace(model, calling=replace(model.calling, packs="one prompt"))
    with torch.inference_mode():
        outcome = next(check_packed_rows(CheckBench.of(other, "", given)))
    return (other, outcome) if outcome.passed else None


def _list_starts(bench: CheckBench, *, seeing: bool) -> list[tuple[str, int | None, int, int]]:
    """List the writes that packed rows start from: site, layer, lane and which of two tokens.

    Args:
        seeing: Whether the prompts contain images, which leave out some layers.
    """
    model = bench.model
    # From the last block backwards: the first rows compute the least.
    streams = [*(bench.some("resid_pre") if seeing else bench.with_sites("resid_pre"))][::-1]
    places = [(lane, which) for which in range(2) for lane in range(len(bench.batch))]
    starts: list[tuple[str, int | None, int, int]] = [
        ("resid_pre", at, *places[n % len(places)]) for n, at in enumerate(streams[:-1])
    ]
    # Where the whole prompt may matter, try every position.
    starts += [("resid_pre", layer, *place) for layer in streams[-1:] for place in places]
    starts += [("embed", None, *place) for place in places if "embed" in list_sites(model, "")]
    for name in list_sites(model, ""):
        layers = list_layers(model.anatomy, name) if SITES[name].has_layer else (None,)
        if name not in ("embed", "logits"):
            starts.append((name, layers[len(layers) // 2], *places[len(starts) % len(places)]))
    return starts


def _compare_packed_rows(bench: CheckBench) -> CheckOutcome:
    model = bench.model
    # Rows with images try fewer positions, and compare the last tokens only.
    seeing = has_images(bench.batch)
    starts = _list_starts(bench, seeing=seeing)
    lanes = np.array([lane for _, _, lane, _ in starts])
    lengths = bench.batch.lengths.numpy()[lanes]
    writes: list[SiteWrite] = []
    tokens: list[int] = []
    for number, (name, layer, lane, which) in enumerate(starts):
        at = max(0, min(_RESTART_TOKENS[lane][which], int(lengths[number]) - 1 - which))
        tensor = bench.read_of(lane, name, layer)[at]
        values = amplify(tensor, name, model.anatomy)[None] / 50
        writes.append(write_whole_site(SiteRead(name, layer), number, (at,), values))
        tokens.append(at)
    batch = bench.batch.take(torch.from_numpy(lanes))
    seen = [range(max(0, n - 3) if seeing else 0, n) for n in lengths.tolist()]
    number = np.repeat(np.arange(len(starts)), [len(one) for one in seen])
    position = np.array([at for one in seen for at in one])
    wanted = torch.tensor([list(one) for one in seen]) if seeing else None
    expected = run_full(model, batch, writes=writes, logits_at=wanted).logits
    assert expected is not None
    if model.shape.takes == "image" and model.calling.reads != "every token":
        number = np.arange(len(starts))  # one output for each
    some = torch.arange(0, model.shape.outputs, 2)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        with record_activations(model, bench.batch, 0) as kept:
            run_full(model, bench.batch)
        ends: list[tuple[str, int, Tensor | None]] = [("", len(starts), None)]
        if model.anatomy.unembedding is not None:
            ends.append((", some tokens", _NARROWED_ROWS, some))
        for end, rows, columns in ends:
            count = int(np.searchsorted(number, rows))
            result = run_packed(
                model,
                kept,
                lanes[:rows],
                writes=writes[:rows],
                final=(number[:count], position[:count]),
                tokens=columns,
            )
            for i, (name, layer, *_) in enumerate(starts[:rows]):
                whole = expected[i] if seeing else bench.real_of(i, expected, batch)
                whole = whole if columns is None else whole[:, columns]
                whole = whole[None] if whole.dim() == 1 else whole
                where = f"{label_site(name, layer)}, token {tokens[i]}{end}"
                yield where, result.logits[number[:count] == i], whole

    exact = model.dtype in (torch.float32, torch.float64)
    return bench.equal(PACKED_IDENTITY, pairs(), bench.tolerance / 10 if exact else bench.tolerance)


def run_checks(model: LoadedModel, given: Batch, stack: str = "") -> Iterator[CheckOutcome]:
    """Yield the outcomes of all checks on a stack, in order.

    Later checks rely on earlier ones, so callers stop at the first failure. A language model with
    images is checked on text; only what images may change is checked on images, because a row with
    an image has hundreds of tokens.

    Args:
        given: A batch of two rows.
        stack: The stack; empty for the main one.
    """
    if stack:
        checks = tuple(check for check in CHECKS if check not in MAIN_STACK_CHECKS)
        yield from _run_each(CheckBench.of(model, stack, given), checks, f" ({stack})")
        return
    seeing = has_images(given)
    yield from _run_each(
        CheckBench.of(model, "", build_text_sample(model) if seeing else given), CHECKS, ""
    )
    if seeing:
        yield from _run_each(CheckBench.of(model, "", given), IMAGE_CHECKS, " (with an image)")


def _run_each(
    bench: CheckBench, checks: Sequence[AnatomyCheck], named: str
) -> Iterator[CheckOutcome]:
    for check in checks:
        with torch.inference_mode():
            outcomes = tuple(check(bench))
        said = (one for one in outcomes if one.compared)
        yield from (replace(one, identity=one.identity + named) for one in said)


AnatomyCheck = Callable[[CheckBench], Iterator[CheckOutcome]]

CHECKS: tuple[AnatomyCheck, ...] = (
    check_logits,
    check_padding,
    check_causality,
    check_position_embedding,
    check_block_order,
    check_sublayer_sums,
    check_gains,
    check_norms_of_sums,
    check_norm_positions,
    check_cross_attention,
    check_final_norm,
    check_unembedding_order,
    check_head_sums,
    check_neuron_sums,
    check_expert_sums,
    check_heads,
    check_rotary_order,
    check_writes,
    check_packed_rows,
    check_attention,
)
MAIN_STACK_CHECKS = (
    check_logits,
    check_attention,
    check_padding,
    check_causality,
    check_position_embedding,
    check_packed_rows,
)
"""Checks of the model as a whole."""
IMAGE_CHECKS: tuple[AnatomyCheck, ...] = (
    check_logits,
    check_image_merge,
    check_block_order,
    check_sublayer_sums,
    check_gains,
    check_norms_of_sums,
    check_norm_positions,
    check_unembedding_order,
    check_head_sums,
    check_neuron_sums,
    check_packed_rows,
)
"""Checks of a language model on prompts with images."""
