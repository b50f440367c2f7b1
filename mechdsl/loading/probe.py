"""Trial calls that show how a model is called, and how a classifier computes its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import Batch
from mechdsl.forward.hooks.model import (
    BlockStack,
    CallConvention,
    LoadedModel,
    build_arguments,
    build_text_inputs,
    call_model,
    call_module,
    call_with_batch,
    narrow_unembedding,
    without_vectors,
)
from mechdsl.loading.bench import (
    PROMPT_LENGTHS,
    add_encoded,
    build_image_inputs,
    build_image_prompts,
    build_text_sample,
    count_module_tokens,
    draw_prompts,
    get_config,
    get_family,
)
from mechdsl.models.anatomy import HookPoint
from mechdsl.models.shape import OutputPosition, output_labels


class OneOutputOnly(Exception):
    """A single output for a whole prompt that doesn't come from one token; the text says why."""


def probe_classifier(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """Determine the tokens that a classifier's outputs are computed from.

    Args:
        ids: [1, T] a prompt.

    Raises:
        OneOutputOnly: The model has a single output that doesn't come from one token. Errors of the
            model's own forward are raised too.
    """
    output, outside = _record_outputs(model, ids)
    if "logits" not in output:
        return model
    if output.logits.dim() == 3:
        model = replace(model, shape=replace(model.shape, output_at="every token"))
        return model if model.shape.task == "tokens" else _probe_causality(model, ids)
    if model.shape.task == "tokens":
        raise OneOutputOnly(
            "classifiers have a class name that ends in `ForSequenceClassification`"
        )
    model = _drop_unembedding(model)
    places: tuple[tuple[OutputPosition, int], ...] = (("last token", -1), ("first token", 0))
    for at, place in sorted(places, key=lambda each: each[0] != model.shape.output_at):
        for path, made in outside.items():
            if made.shape[-1:] == output.logits.shape[-1:] and torch.equal(
                made[:, place], output.logits
            ):
                calling = replace(model.calling, scores=path)
                shape = replace(model.shape, output_at=at)
                return _probe_causality(replace(model, calling=calling, shape=shape), ids)
        if _depends_on_one_token(model, ids, place, output.logits):
            skips = _find_skipped_token(model, ids) if at == "last token" else None
            calling = replace(model.calling, reads=at, skips=skips)
            shape = replace(model.shape, output_at=at, causal=False)
            return _drop_final_norm(replace(model, calling=calling, shape=shape))
    raise OneOutputOnly("it is computed from several tokens jointly")


def _record_outputs(model: LoadedModel, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Return the model's output, and per-token outputs of modules outside blocks."""
    blocks = [block.path for block in model.anatomy.blocks]
    found: dict[str, Tensor] = {}

    def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:-1] == ids.shape:
                found[path] = output

        return hook

    with ExitStack() as stack:
        for path, module in model.module.named_modules():
            if path and not _is_in_blocks(path, blocks):
                stack.callback(module.register_forward_hook(look(path)).remove)
        output = call_module(model, {"input_ids": ids})
    return output, found


def _is_in_blocks(path: str, blocks: Iterable[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _drop_unembedding(model: LoadedModel) -> LoadedModel:
    """Remove the unembedding: the module computes labels, possibly one set per prompt."""
    anatomy = model.anatomy
    tap = anatomy.taps.get("final_norm")
    if tap is not None and tap.path == anatomy.unembedding:
        model = _drop_final_norm(model)
    return replace(model, anatomy=replace(model.anatomy, unembedding=None))


def _drop_final_norm(model: LoadedModel) -> LoadedModel:
    """Remove `final_norm`, as only one token of each row remains after the last block."""
    anatomy, shape = model.anatomy, model.shape
    if "final_norm" not in anatomy.taps:
        return model
    taps = {site: own for site, own in anatomy.taps.items() if site != "final_norm"}
    reason = "after the last block, only the token for the output is processed"
    without = {**anatomy.without, "final_norm": reason}
    return replace(
        model,
        anatomy=replace(anatomy, taps=taps, without=without),
        shape=replace(shape, sites=shape.sites - {"final_norm"}),
    )


def _depends_on_one_token(model: LoadedModel, ids: Tensor, place: int, logits: Tensor) -> bool:
    """Return whether the output depends on only one token of the last block."""

    def other(module: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, (tuple, list)) else output
        changed = -2 * value
        changed[:, place] = value[:, place]
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        return torch.equal(call_module(model, {"input_ids": ids}).logits, logits)
    finally:
        handle.remove()


def _find_skipped_token(model: LoadedModel, ids: Tensor) -> int | None:
    """Return the pad token if the output comes from the token before it."""
    pad = model.shape.config.get("pad_token_id")
    if not isinstance(pad, int) or not 0 <= pad < model.shape.vocab_size:
        return None
    ended = ids.clone()
    ended[:, -1] = pad
    logits = call_module(model, {"input_ids": ended}).logits
    return pad if _depends_on_one_token(model, ended, -2, logits) else None


def _probe_causality(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """Determine whether tokens see later ones, which a classifier's class doesn't reveal."""
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    before, after = (call_model(model, {"input_ids": each})[:, :-1] for each in (ids, other))
    if not before.numel():
        return model
    size = before.abs().amax()
    causal = bool(((after - before).abs() <= 1e-4 * size).all())
    return replace(model, shape=replace(model.shape, causal=causal))


_ENCODER_LENGTHS = (6, 5)
"""Numbers of tokens in the input of encoders (encoder-decoders)."""

_IMAGE_PROMPT_LENGTHS = (5, 4)
"""Numbers of tokens in prompts with an image, without the image."""

_CLOSE_TOLERANCE = 1e-2
"""Two kinds of calls with a relative difference below this are equivalent."""


def build_sample(model: LoadedModel) -> Batch:
    """Build two rows; ragged prompts are padded on the model's side."""
    shape, device = model.shape, model.device
    if shape.takes == "image":
        pixels = build_image_inputs(model)
        count = count_module_tokens(model, model.anatomy.blocks[0].path, pixels)
        return Batch.grid(2, count, device).with_inputs(pixels)
    tokens = build_text_sample(model)
    match shape.takes:
        case "two texts":
            source = Batch.of(
                draw_prompts(model, _ENCODER_LENGTHS, seed=1), model.pad_id, "right", device
            )
            return tokens.with_inputs({}, encoder=source)
        case "audio" | "image to text" | "sound to text" | "attended image":
            return add_encoded(model, tokens)
        case "image and text" if "vision" in model.others:
            return build_image_prompts(model, draw_prompts(model, _IMAGE_PROMPT_LENGTHS, seed=0))
        case _:
            return tokens


# --- how the model is called --------------------------------------------------------------------


def probe_call(model: LoadedModel) -> LoadedModel:
    """Determine how the model is called; raises errors of the model's own forward."""
    # Not inference mode: routers cast weights in their first call, and these must allow gradients.
    with torch.no_grad():
        model = _probe_logits(_probe_inputs(_probe_structure(model)))
        return replace(model, calling=replace(model.calling, narrows=_can_narrow(model)))


def _probe_inputs(model: LoadedModel) -> LoadedModel:
    if model.shape.takes in ("text", "image and text"):
        model = _probe_text(_probe_token_types(model))
        if "vision" not in model.others:
            return model
        return replace(model, calling=replace(model.calling, places_images=_numbers_images(model)))
    if model.shape.takes == "image":
        return _probe_images(model)
    # On the right, because decoders that begin with padding count columns.
    calling = replace(model.calling, side="right", first_position=None, packs="one prompt")
    model = replace(model, calling=calling)
    return replace(model, calling=_probe_block_output(model))


def _probe_logits(model: LoadedModel) -> LoadedModel:
    """Adapt `logits` to the actual output: it may be missing, or not range over tokens."""
    shape, anatomy = model.shape, model.anatomy
    if shape.takes == "image":
        return model
    batch = build_sample(model)
    if shape.takes == "text":  # classifiers without a pad token accept only one prompt
        batch = batch.part(slice(0, 1))
    output = call_module(model, build_arguments(model, batch))
    if "logits" not in output:
        anatomy = replace(anatomy, unembedding=None)
        shape = replace(shape, sites=shape.sites - {"logits"}, d_logits=0)
        return replace(model, anatomy=anatomy, shape=shape)
    size = int(output.logits.shape[-1])
    sites = shape.sites | {"logits"}
    if shape.task == "tokens":
        d_logits = 0 if size == shape.vocab_size else size
        named = output_labels(get_config(model)) if d_logits else ()
        labels = named if len(named) == size else ()
        return replace(model, shape=replace(shape, sites=sites, d_logits=d_logits, labels=labels))
    labels = shape.labels if len(shape.labels) == size else tuple(map(str, range(size)))
    return replace(model, shape=replace(shape, sites=sites, d_logits=size, labels=labels))


def _numbers_images(model: LoadedModel) -> bool:
    """Return whether image tokens are numbered one by one; some models use two coordinates."""
    if model.calling.first_position is None:
        return False
    one = build_sample(model).part(slice(0, 1))
    plain = call_with_batch(model, one)
    placed = replace(model, calling=replace(model.calling, places_images=True))
    return _is_close(call_with_batch(placed, one), plain, _is_finite(model))


def _can_narrow(model: LoadedModel) -> bool:
    """Return whether logits come from the unembedding alone; some models add a bias later."""
    if model.anatomy.unembedding is None or model.shape.takes == "image":
        return False
    batch = build_sample(model)
    some = torch.arange(0, model.shape.outputs, 2, device=model.device)
    real = batch.mask.bool()
    every = call_with_batch(model, batch)[real]
    try:
        with narrow_unembedding(model, some):
            found = call_with_batch(model, batch)[real]
    except Exception:  # from any later computation
        return False
    return _is_close(found, every[:, some], _is_finite(model))


def _probe_token_types(model: LoadedModel) -> LoadedModel:
    """Remove `token_type_ids`, unless zeros equal the model's default.

    Some models look them up among the tokens, and some allow several.
    """
    accepts = model.calling.accepts
    if "token_type_ids" not in accepts:
        return model
    if get_family(model).prefix:
        return replace(model, calling=replace(model.calling, token_type=1))
    ids = torch.tensor([draw_prompts(model, PROMPT_LENGTHS, seed=0)[0]], device=model.device)
    looked_up: list[None] = []  # among the tokens, which may not show in the output
    embed = model.anatomy.taps.get("embed")
    handle = embed and model.module.get_submodule(embed.path).register_forward_hook(
        lambda *_: looked_up.append(None)
    )
    try:
        plain = call_model(model, {"input_ids": ids})
        given = call_model(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
        if _is_close(given, plain, 1e-6) and len(looked_up) <= 2:
            return model
    except Exception:  # any error in the model's handling of them
        pass
    finally:
        if handle is not None:
            handle.remove()
    calling = replace(model.calling, accepts=accepts - {"token_type_ids"})
    return replace(model, calling=calling)


def _probe_structure(model: LoadedModel) -> LoadedModel:
    """Determine the layout of head norms, and remove sites of modules called several times.

    Norms of heads see [B, T, H, d] or [B, H, T, d].
    """
    stacks = {stack: model.stack(stack) for stack in ("", *model.others)}
    taps = [tap for own in stacks.values() for b in own.anatomy.blocks for tap in b.taps.values()]
    taps += [tap for own in stacks.values() for tap in own.anatomy.taps.values()]
    calls: dict[str, int] = defaultdict(int)
    first: set[str] = set()

    def look(tap: HookPoint) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[tap.path] += 1
            made = output[tap.item] if isinstance(output, (tuple, list)) else output
            if tap.layout.axes == "heads" and _has_heads_first(args[0], made, tap.layout.units):
                first.add(tap.path)

        return hook

    batch = None if model.shape.takes == "text" else build_sample(model)
    if "vision" in model.others and batch is not None:
        batch = without_vectors(batch)
        stacks["vision"] = _find_token_norm(model, batch)
    with ExitStack() as stack:
        for tap in {tap.path: tap for tap in taps}.values():
            part = model.module.get_submodule(tap.path)
            stack.callback(part.register_forward_hook(look(tap)).remove)
        if batch is None:
            ids = torch.tensor(
                [draw_prompts(model, PROMPT_LENGTHS, seed=0)[0]], device=model.device
            )
            call_model(model, {"input_ids": ids})
        else:
            call_with_batch(model, batch)
    found = {name: _probe_visibility(own, calls, first) for name, own in stacks.items()}
    main = found.pop("")
    return replace(model, anatomy=main.anatomy, shape=main.shape, others=found)


def _find_token_norm(model: LoadedModel, batch: Batch) -> BlockStack:
    """Return the vision stack, without a last norm that has no effect on the language model.

    Many image encoders have a norm for the class token only, or an unused one.
    """
    own = model.stack("vision")
    tap = own.anatomy.taps.get("final_norm")
    if tap is None:
        return own
    plain = call_with_batch(model, batch)
    module = model.module.get_submodule(tap.path)
    tokens = batch.frames["vision"].mask.numel()

    def other(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return -2 * output if output.numel() == tokens * output.shape[-1] else output

    handle = module.register_forward_hook(other)
    try:
        same = _is_close(call_with_batch(model, batch), plain, 1e-5)
    finally:
        handle.remove()
    if not same:
        return own
    taps = {site: tap for site, tap in own.anatomy.taps.items() if site != "final_norm"}
    without = {**own.anatomy.without, "final_norm": "the language model reads the last block"}
    anatomy = replace(own.anatomy, taps=taps, without=without)
    return BlockStack(anatomy, replace(own.shape, sites=own.shape.sites - {"final_norm"}))


def _has_heads_first(given: Tensor, output: Tensor, units: int) -> bool:
    """Return whether heads come before positions; for equal counts, strides decide."""
    if output.dim() != 4 or output.shape[1] != units:
        return False
    return output.shape[2] != units or given.stride(1) < given.stride(2)


def _probe_visibility(own: BlockStack, calls: Mapping[str, int], first: Set[str]) -> BlockStack:
    """Adapt a stack to the calls that were seen.

    Args:
        calls: By path, number of calls in one pass.
        first: Paths of modules that see heads first.
    """
    blocks = own.anatomy.blocks
    parts = [own.anatomy.taps, *(block.taps for block in blocks)]
    twice = {
        site
        for part in parts
        for site, tap in part.items()
        if calls[tap.path] > 1 and not tap.again
    }
    if not twice.isdisjoint(("resid_pre", "resid_post")):  # blocks that run several times
        twice = set[str]()
    kept = [
        replace(
            block,
            taps={
                site: replace(tap, layout=replace(tap.layout, axes="heads_first"))
                if tap.path in first and tap.layout.axes == "heads"
                else tap
                for site, tap in block.taps.items()
                if site not in twice
            },
        )
        for block in blocks
    ]
    reason = "the module that computes it is called several times in one pass"
    without = {**own.anatomy.without, **dict.fromkeys(sorted(twice), reason)}
    outer = {site: tap for site, tap in own.anatomy.taps.items() if site not in twice}
    anatomy = replace(own.anatomy, blocks=tuple(kept), taps=outer, without=without)
    return BlockStack(anatomy, replace(own.shape, sites=own.shape.sites - twice))


def _probe_text(model: LoadedModel) -> LoadedModel:
    longer, shorter = draw_prompts(model, PROMPT_LENGTHS, seed=0)
    model = probe_classifier(model, torch.tensor([longer], device=model.device))
    alone = [
        call_model(model, build_text_inputs(model, torch.tensor([row], device=model.device), None))[
            0
        ]
        for row in (longer, shorter)
    ]
    fine = _is_finite(model)
    for first in _list_first_positions(model):
        calling = replace(model.calling, first_position=first)
        one = Batch.of([longer], model.pad_id, "left", model.device)
        if not _is_close(call_with_batch(replace(model, calling=calling), one)[0], alone[0], fine):
            continue
        for side in ("left", "right"):
            as_tried = replace(model, calling=replace(calling, side=side))
            batch = Batch.of([longer, shorter], model.pad_id, side, model.device)
            logits = call_with_batch(as_tried, batch)[1][batch.mask[1].bool()]
            if _is_close(logits, alone[1], fine):
                return _try_call(as_tried)
    return _try_call(model)


def _try_call(model: LoadedModel) -> LoadedModel:
    """Determine the block output, and how passes over packed rows call the model."""
    packs = model.calling.packs if _accepts_packed_rows(model) else "one prompt"
    return replace(model, calling=replace(_probe_block_output(model), packs=packs))


class _BlockReached(Exception):
    """Signal that the first block was reached."""


def _accepts_packed_rows(model: LoadedModel) -> bool:
    """Return whether the model can be called with more packed tokens than it has positions.

    This is tried only for models of few positions; others don't need it.
    """
    most = model.shape.max_positions or 0
    if not 0 < most <= 1024:
        return True

    def stop(block: nn.Module, args: Any) -> None:
        raise _BlockReached

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    handle = block.register_forward_pre_hook(stop)
    ids = torch.full((1, most + 1), model.pad_id, device=model.device)
    try:
        call_model(model, build_text_inputs(model, ids, torch.zeros_like(ids)))
    except _BlockReached:
        return True
    except Exception:  # any error about so many tokens
        return False
    finally:
        handle.remove()
    return True


def _list_first_positions(model: LoadedModel) -> list[int | None]:
    """List possible first position ids; some models count from after the pad id (RoBERTa)."""
    if "position_ids" not in model.calling.accepts:
        return [None]
    return [0, model.pad_id + 1, 2, None]


def _probe_images(model: LoadedModel) -> LoadedModel:
    """Determine which tokens of the last block the output comes from."""
    pixels = build_image_inputs(model)
    calling = replace(_probe_block_output(model), first_position=None, packs="one prompt")
    output = call_model(model, pixels)
    shape = replace(model.shape, vocab_size=int(output.shape[-1]))
    if not _norms_tokens(model, pixels):
        taps = {site: tap for site, tap in model.anatomy.taps.items() if site != "final_norm"}
        model = replace(model, anatomy=replace(model.anatomy, taps=taps))
        shape = replace(shape, sites=shape.sites - {"final_norm"})
    if output.dim() == 3:  # not a classifier: every token is an output
        shape = replace(shape, sites=shape.sites - {"logits"})
        return replace(model, shape=shape, calling=calling)

    def other(module: nn.Module, args: Any, hidden: Any) -> Any:
        value = hidden[0] if isinstance(hidden, tuple) else hidden
        value = torch.cat([value[:, :1], -2 * value[:, 1:]], dim=1)
        return (value, *hidden[1:]) if isinstance(hidden, tuple) else value

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        first = _is_close(call_model(model, pixels), output)
    finally:
        handle.remove()
    calling = replace(calling, reads="first token" if first else "all tokens")
    return replace(model, shape=shape, calling=calling)


def _norms_tokens(model: LoadedModel, pixels: Mapping[str, Tensor]) -> bool:
    """Return whether the last norm applies to tokens instead of the pooled vector."""
    tap = model.anatomy.taps.get("final_norm")
    if tap is None:
        return False
    seen: list[int] = []
    module = model.module.get_submodule(tap.path)
    handle = module.register_forward_hook(lambda m, a, output: seen.append(output.dim()))
    try:
        call_model(model, pixels)
    finally:
        handle.remove()
    return seen == [3]


def _probe_block_output(model: LoadedModel) -> CallConvention:
    """Determine the length of the tuple that the first block returns; None for a tensor."""
    returned: list[Any] = []

    def look(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    takes = model.shape.takes
    batch = build_sample(model) if model.shape.has_encoder else None
    handle = block.register_forward_hook(look)
    try:
        if takes == "image":
            call_model(model, build_image_inputs(model))
        elif batch is not None:
            call_with_batch(model, batch)
        else:
            ids = torch.tensor(
                [draw_prompts(model, PROMPT_LENGTHS, seed=0)[1]], device=model.device
            )
            call_model(model, {"input_ids": ids})
    finally:
        handle.remove()
    length = len(returned[0]) if isinstance(returned[0], (tuple, list)) else None
    return replace(model.calling, block_returns=length)


def _is_finite(model: LoadedModel) -> float:
    """Return the tolerance for rounding between equivalent calls."""
    return 1e-4 if model.dtype.itemsize > 2 else _CLOSE_TOLERANCE


def _is_close(found: Tensor, expected: Tensor, tolerance: float = _CLOSE_TOLERANCE) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())
