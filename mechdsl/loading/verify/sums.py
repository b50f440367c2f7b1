# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""The logits are the model's, and the parts of its blocks add up to what leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.calls import bare_logits, call
from mechdsl.hooks.hook_points import at_hand, given_to, layout_view
from mechdsl.hooks.loaded import LoadedModel, Outcome
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.probe_inputs import image_token
from mechdsl.loading.verify.bench import Bench, Pair, difference, first_of, with_images
from mechdsl.loading.verify.writing import whole_site


def logits_are_the_models(bench: Bench) -> Iterator[Outcome]:
    bare = bare_logits(bench.model, bench.batch)
    pairs = [("", bench.output(bench.logits), bench.output(bare))]
    yield bench.equal("logits with hooks = logits without", pairs)


def padding_changes_nothing(bench: Bench) -> Iterator[Outcome]:
    """Each prompt alone is given to the model as a user would: nothing but its tokens."""
    if bench.batch.extra or bench.model.shape.takes not in ("text", "image and text"):
        return
    alone = bare_alone(bench.model, bench.batch)
    pairs = (
        (f"prompt {i}", bench.real_of(i, bench.logits, bench.batch), expected)
        for i, expected in enumerate(alone)
    )
    yield bench.equal("logits in a padded batch = logits of the prompt alone", pairs)


def bare_alone(model: LoadedModel, batch: Batch) -> Iterator[Tensor]:
    """[T, vocab] of each prompt by itself, without masks or positions."""
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row].bool()][None]
        yield call(model, {"input_ids": ids})[0]


def later_tokens_are_unseen(bench: Bench) -> Iterator[Outcome]:
    """What the planner leaves out of a causal model rests on it."""
    if not bench.model.shape.causal or bench.model.shape.takes not in ("text", "image and text"):
        return
    ids = bench.batch.ids[0][bench.batch.mask[0].bool()]
    other = ids.clone()
    if len(ids) < 2:
        return
    other[-1] = ids[-2]
    both = Batch.of([ids.tolist(), other.tolist()], 0, "left", bench.model.device)
    was, now = bare_logits(bench.model, both)[:, :-1]
    yield bench.equal("another last token leaves earlier logits alone", [("", now, was)])


def sublayers_add_up(bench: Bench) -> Iterator[Outcome]:
    def pairs() -> Iterator[Pair]:
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

    yield bench.equal("resid_pre + attn_out + mlp_out = resid_post", pairs())


def gains_are_passed_on(bench: Bench) -> Iterator[Outcome]:
    """Where the stream is made of more than what sublayers add, or is weighed: what mlp_out gains
    at the last token, resid_post gains."""
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
        writes.append(whole_site(where, number, (last,), values[-1:] + values[:1]))
    batch = bench.batch.take(torch.zeros(len(layers), dtype=torch.long))
    wanted = [SiteRead("resid_post", layer, stack) for layer in layers]
    reads = run_whole(bench.model, batch, writes=writes, reads=wanted).reads
    tokens = batch.of_site("mlp_out", stack)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for number, layer in enumerate(layers):
            found = bench.real_of(number, reads[SiteRead("resid_post", layer, stack)], tokens)
            gained = found[-1] - own("resid_post", layer)[-1]
            yield f"layer {layer}", gained, own("mlp_out", layer)[0]

    yield bench.equal("what mlp_out gains, resid_post gains", pairs(), bench.tolerance * 10)


def norms_of_sums(bench: Bench) -> Iterator[Outcome]:
    """Norms behind the sums, as BERT has them."""

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


def blocks_join(bench: Bench) -> Iterator[Outcome]:
    ids = bench.real(bench.own.ids)
    pictured = torch.zeros_like(ids, dtype=torch.bool)
    if with_images(bench.batch) and not bench.stack:
        pictured = ids == image_token(bench.model)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("resid_pre", "resid_post")[:-1]:
            behind = bench.anatomy.blocks[layer].behind
            if behind is None:
                continue
            below, above = bench.vectors("resid_post", layer), bench.vectors("resid_pre", layer + 1)
            same = ~pictured if bench.anatomy.blocks[layer].fed else slice(None)
            yield f"layer {layer}", (below * behind)[same], above[same]

    yield bench.equal("resid_post of a layer = resid_pre of the next", pairs())


def norms_are_in_front(bench: Bench) -> Iterator[Outcome]:
    anatomy = bench.anatomy

    def before(layer: int) -> Tensor | None:
        """The stream in front of attention."""
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
            yield bench.equal(f"{site} = the norm in front of it, of {read}", pairs)
    between = "resid_pre" if anatomy.parallel else "resid_mid"
    if bench.stack != "cross":
        pairs = list(of("mlp_norm", "mlp_norm", bench.between))
        yield bench.equal(f"mlp_norm = the norm in front of it, of {between}", pairs)
        # Several MLPs read that norm: the site is none of theirs.
        others = set(bench.with_sites("resid_mid")) - set(bench.with_sites("mlp_norm"))
        paths = {n: path for n in sorted(others) if (path := anatomy.blocks[n].mlp_norm)}
        if paths:
            read = _entering(bench, paths)
            pairs = [(f"layer {n}", bench.vectors("resid_mid", n), read[n]) for n in paths]
            yield bench.equal("the norm behind attention reads resid_mid", pairs)


def _entering(bench: Bench, paths: Mapping[int, str]) -> dict[int, Tensor]:
    """Layer → [tokens, d_model] that a module of it is called with."""
    read: dict[int, Tensor] = {}

    def look(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            read[layer] = bench.real(given_to(args, kwargs), "resid_mid")

        return hook

    with ExitStack() as stack:
        for layer, path in paths.items():
            hook = bench.module(path).register_forward_pre_hook(look(layer), with_kwargs=True)
            stack.callback(hook.remove)
        bare_logits(bench.model, bench.batch)
    return read


def images_are_merged(bench: Bench) -> Iterator[Outcome]:
    """`embed` is what the language model gets: features of the image in place of its tokens."""
    model, batch = bench.model, bench.batch
    mark = image_token(model)
    columns = torch.nonzero(bench.real_of(0, batch.ids, batch) == mark).flatten().tolist()
    seen = bench.read_of(0, "embed", None)[columns]
    if model.anatomy.embedding is not None and mark < model.shape.vocab_size:
        blind = bench.module(model.anatomy.embedding)(torch.full_like(batch.ids[0, :1], mark))
        yield Outcome(
            "embed at an image's tokens is not that of the token",
            error=0.0 if difference(seen[:, 0], blind.expand(len(seen), -1)) > 1e-2 else 1.0,
            tolerance=0.5,
            failure="it is, so the image is put in behind it",
        )
    generator = torch.Generator(seen.device).manual_seed(0)
    noise = torch.randn(seen.shape, generator=generator, device=seen.device) * seen.std()
    write = whole_site(SiteRead("embed"), 0, columns, noise.to(seen.dtype))
    logits = run_whole(model, batch.take(torch.tensor([0])), writes=[write]).logits
    assert logits is not None
    moved = difference(logits[0, -1], bench.logits[0, -1]) > bench.tolerance
    yield Outcome(
        "noise at an image's tokens of embed changes the logits",
        error=0.0 if moved else 1.0,
        tolerance=0.5,
        failure="they stay as they are",
    )


def positions_are_added(bench: Bench) -> Iterator[Outcome]:
    """What is added to `embed` of patches is no part of it: it is the same for every image."""
    tap = bench.anatomy.taps.get("embed")
    if bench.stack or tap is None or tap.patches is None:
        return
    behind: list[Any] = []
    handle = bench.module(tap.path).register_forward_hook(lambda *given: behind.append(given[-1]))
    try:
        bare_logits(bench.model, bench.batch)
    finally:
        handle.remove()
    in_front = bench.reads[SiteRead("embed", None)][:, :, 0]
    first, *others = first_of(behind[0]).to(in_front) - in_front
    pairs = [(f"image {n}", other, first, in_front) for n, other in enumerate(others, 2)]
    yield bench.equal("what is added to embed of patches is the same for every image", pairs)


def cross_attention_reads_the_encoder(bench: Bench) -> Iterator[Outcome]:
    """What its values are made of is the encoder's `final_norm`."""
    normed = bench.of_stack("encoder", "final_norm") if bench.stack == "cross" else None
    blocks = bench.anatomy.blocks
    layers = [n for n in bench.with_sites("v") if blocks[n].taps["v"].path in blocks[n].projections]
    if normed is None or not layers:
        return

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in layers:
            tap = blocks[layer].taps["v"]
            values = layout_view(bench.module(tap.path)(normed[None]), tap.layout)[0]
            yield f"layer {layer}", bench.read("v", layer), values

    yield bench.equal("v of cross attention is made of the encoder's final_norm", pairs())


def last_norm_is_behind(bench: Bench) -> Iterator[Outcome]:
    """Where the last norm returns `final_norm`."""
    tap, path = bench.anatomy.taps.get("final_norm"), bench.anatomy.final_norm
    last = bench.with_sites("resid_post")[-1:]
    if tap is None or path is None or (tap.side, tap.path) != ("out", path) or not last:
        return
    stream = bench.vectors("resid_post", last[0])
    pairs = [("", bench.vectors("final_norm"), bench.module(path)(stream))]
    yield bench.equal("final_norm = the last norm of the last resid_post", pairs)


def unembedding_is_last(bench: Bench) -> Iterator[Outcome]:
    """Whatever scale or cap comes behind it, tokens keep their order; or a bias does, the same for
    all positions."""
    path = bench.anatomy.unembedding
    if bench.stack or path is None or "final_norm" not in bench.shape.sites:
        return
    logits = bench.module(path)(bench.vectors("final_norm"))
    found, expected = bench.output(bench.logits), logits[..., : bench.logits.shape[-1]]
    # Ties, as circuits set by hand have them, may be ordered either way.
    likeliest = expected.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
    spacing = torch.finfo(expected.dtype).eps * expected.abs().amax(-1)
    off = expected.amax(-1) - likeliest > spacing
    bias = (found - expected).mean(0, keepdim=True)
    if len(found) > 1 and difference(expected + bias, found) <= bench.tolerance:
        off = torch.zeros_like(off)
    yield Outcome(
        "final_norm through the unembedding orders tokens as logits do",
        error=float(off.float().mean()),
        tolerance=0.0,
        failure="the likeliest token is another one",
    )


def heads_add_up(bench: Bench) -> Iterator[Outcome]:
    anatomy = bench.anatomy

    def pairs() -> Iterator[Pair]:
        for layer in bench.with_sites("head_out", "attn_out"):
            block = anatomy.blocks[layer]
            assert block.output is not None
            heads = bench.read("head_out", layer)
            total = heads.sum(1)
            projection = bench.module(block.output)
            with at_hand(projection):
                bias = getattr(projection, "bias", None)
            total = total if bias is None else total + bias
            if block.attn_behind is not None:
                total, heads = bench.through(block.attn_behind, total), total * 0
            total = bench.scaled(block.taps["attn_out"], total)
            heads = bench.scaled(block.taps["attn_out"], heads)
            yield f"layer {layer}", total, bench.vectors("attn_out", layer), heads

    behind = "the norm behind attention of " if anatomy.blocks[0].attn_behind else ""
    yield bench.equal(f"{behind}the sum of head_out and the bias = attn_out", pairs())


def neurons_add_up(bench: Bench) -> Iterator[Outcome]:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("mlp_hidden", "mlp_out"):
            block = bench.anatomy.blocks[layer]
            if block.down is None:
                continue
            total = bench.through(block.down, bench.read("mlp_hidden", layer).squeeze(2))
            if block.mlp_behind is not None:
                total = bench.through(block.mlp_behind, total)
            total = bench.scaled(block.taps["mlp_out"], total)
            out = bench.vectors("mlp_out", layer)
            # Some multiply it with a constant behind the map.
            size = (total.double() ** 2).sum()
            factor = (total.double() * out.double()).sum() / size if size else 1.0
            yield f"layer {layer}", total.double() * factor, out

    yield bench.equal("mlp_hidden through the down projection = mlp_out", pairs())


def experts_add_up(bench: Bench) -> Iterator[Outcome]:
    """What experts add is their weight times what they make, so without weight they add nothing."""

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.with_sites("router", "expert_out"):
            weights, outs = bench.vectors("router", layer), bench.read("expert_out", layer)
            idle = weights == 0
            yield f"layer {layer}", outs[idle], torch.zeros_like(outs[idle])

    yield bench.equal("expert_out is zero where router is", pairs())


# --- heads are what they are called ------------------------------------------------------------
