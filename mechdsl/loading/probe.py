# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What a model is tried out on: two rows of what it takes; and how it wants to be called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.calls import (
    arguments,
    bare_logits,
    call,
    narrowed,
    text_inputs,
    whole_output,
)
from mechdsl.hooks.loaded import Calling, LoadedModel, Stack
from mechdsl.loading.probe_classifiers import classifying
from mechdsl.loading.probe_inputs import (
    config_of,
    most_tokens,
    pictures,
    tokens_seen,
    with_images,
    with_sounds,
)
from mechdsl.models.anatomy import HookPoint
from mechdsl.models.heads_by_class import named_outputs

LENGTHS = (5, 4)
"""Tokens of the two prompts, where the model has as many positions."""
_SOURCE = (6, 5)
"""Tokens of what encoders of encoder-decoders read."""
_AROUND = (5, 4)
"""Tokens of prompts with an image, the image aside."""
_CLOSE = 1e-2
"""Two ways of calling that differ less than this, relatively, are one."""


def sample(model: LoadedModel) -> Batch:
    """Two rows; ragged prompts are padded where the model wants it."""
    shape, device = model.shape, model.device
    if shape.takes == "image":
        pixels = pictures(model)
        count = tokens_seen(model, model.anatomy.blocks[0].path, pixels)
        return Batch.grid(2, count, device).with_inputs(pixels)
    tokens = texts(model)
    match shape.takes:
        case "two texts":
            source = Batch.of(_prompts(model, _SOURCE, seed=1), model.pad_id, "right", device)
            return tokens.with_inputs({}, encoder=source)
        case "audio":
            return with_sounds(model, tokens)
        case "image and text" if "vision" in model.others:
            return with_images(model, _prompts(model, _AROUND, seed=0))
        case _:
            return tokens


def texts(model: LoadedModel) -> Batch:
    """Two rows of nothing but tokens."""
    rows = _prompts(model, LENGTHS, seed=0)
    return Batch.of(rows, model.pad_id, model.calling.side, model.device)


def _prompts(model: LoadedModel, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    """Ragged prompts of different tokens, none of which stands for padding or an image; the second
    has the token for masked ones in it, where there is one, as that may be treated apart. They
    begin as the tokenizer begins its texts, and have no more tokens than the model has positions.
    """
    longest = min(lengths[0], most_tokens(model) or lengths[0])
    lengths = longest, min(lengths[1], max(1, longest - 1))
    opening = list(model.tokenizer.opening) if model.tokenizer is not None else []
    special = {model.pad_id} | {
        value
        for key, value in config_of(model).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randperm(model.shape.vocab_size, generator=generator).tolist()
    draws = [token for token in draws if token not in special] or draws
    draws = draws * (1 + sum(lengths) // len(draws))
    rows = [[*opening, *draws[: lengths[0]]], [*opening, *draws[lengths[0] :]]]
    mask = config_of(model).get("mask_token_id")
    if isinstance(mask, int) and 0 <= mask < model.shape.vocab_size and mask != model.pad_id:
        rows[1][1] = mask
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


# --- how the model wants to be called -----------------------------------------------------------


def tried(model: LoadedModel) -> LoadedModel:
    """The model with what calling it shows; raises what the model's own forward raises."""
    # Routers cast their weights in their first call, and those of inference mode take no gradient.
    with torch.no_grad():
        model = _with_logits(_tried(_looked_at(model)))
        return replace(model, calling=replace(model.calling, narrows=_narrows(model)))


def _tried(model: LoadedModel) -> LoadedModel:
    if model.shape.takes in ("text", "image and text"):
        model = _tried_on_text(_with_types(model))
        if "vision" not in model.others:
            return model
        return replace(model, calling=replace(model.calling, places_images=_places_images(model)))
    if model.shape.takes == "image":
        return _tried_on_images(model)
    # On the right, as decoders that begin with padding count columns.
    calling = replace(model.calling, side="right", first_position=None, packs="one prompt")
    model = replace(model, calling=calling)
    return replace(model, calling=_returns(model))


def _with_logits(model: LoadedModel) -> LoadedModel:
    """The model with `logits` as they come out: there may be none, or others than of tokens."""
    shape, anatomy = model.shape, model.anatomy
    if shape.takes == "image":
        return model
    batch = sample(model)
    if shape.takes == "text":  # classifiers without a pad token take no more than one prompt
        batch = batch.part(slice(0, 1))
    output = whole_output(model, arguments(model, batch))
    if "logits" not in output:
        anatomy = replace(anatomy, unembedding=None)
        shape = replace(shape, sites=shape.sites - {"logits"}, d_logits=0)
        return replace(model, anatomy=anatomy, shape=shape)
    size = int(output.logits.shape[-1])
    sites = shape.sites | {"logits"}
    if shape.task == "tokens":
        d_logits = 0 if size == shape.vocab_size else size
        named = named_outputs(config_of(model)) if d_logits else ()
        labels = named if len(named) == size else ()
        return replace(model, shape=replace(shape, sites=sites, d_logits=d_logits, labels=labels))
    labels = shape.labels if len(shape.labels) == size else tuple(map(str, range(size)))
    return replace(model, shape=replace(shape, sites=sites, d_logits=size, labels=labels))


def _places_images(model: LoadedModel) -> bool:
    """Whether an image's tokens are counted one by one; some give their patches two coordinates."""
    if model.calling.first_position is None:
        return False
    one = sample(model).part(slice(0, 1))
    plain = bare_logits(model, one)
    placed = replace(model, calling=replace(model.calling, places_images=True))
    return _close(bare_logits(placed, one), plain, _fine(model))


def _narrows(model: LoadedModel) -> bool:
    """Whether the unembedding alone makes the logits: some add a bias behind it."""
    if model.anatomy.unembedding is None or model.shape.takes == "image":
        return False
    batch = sample(model)
    some = torch.arange(0, model.shape.outputs, 2, device=model.device)
    real = batch.mask.bool()
    every = bare_logits(model, batch)[real]
    try:
        with narrowed(model, some):
            found = bare_logits(model, batch)[real]
    except Exception:  # whatever comes behind it
        return False
    return _close(found, every[:, some], _fine(model))


def _with_types(model: LoadedModel) -> LoadedModel:
    """The model without `token_type_ids` unless it is zeros that it takes by itself (some look them
    up among the tokens, some take several)."""
    accepts = model.calling.accepts
    if "token_type_ids" not in accepts:
        return model
    ids = torch.tensor([_prompts(model, LENGTHS, seed=0)[0]], device=model.device)
    looked_up: list[None] = []  # among the tokens, which need not show in what comes out
    embed = model.anatomy.taps.get("embed")
    handle = embed and model.module.get_submodule(embed.path).register_forward_hook(
        lambda *_: looked_up.append(None)
    )
    try:
        plain = call(model, {"input_ids": ids})
        given = call(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
        if _close(given, plain, 1e-6) and len(looked_up) <= 2:
            return model
    except Exception:  # whatever the model makes of them
        pass
    finally:
        if handle is not None:
            handle.remove()
    calling = replace(model.calling, accepts=accepts - {"token_type_ids"})
    return replace(model, calling=calling)


def _looked_at(model: LoadedModel) -> LoadedModel:
    """The model where norms of heads are known to see [B, T, H, d] or [B, H, T, d], and without
    what passes a module several times in one pass."""
    stacks = {stack: model.stack(stack) for stack in ("", *model.others)}
    taps = [tap for own in stacks.values() for b in own.anatomy.blocks for tap in b.taps.values()]
    taps += [tap for own in stacks.values() for tap in own.anatomy.taps.values()]
    calls: dict[str, int] = defaultdict(int)
    first: set[str] = set()

    def look(tap: HookPoint) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[tap.path] += 1
            made = output[tap.item] if isinstance(output, (tuple, list)) else output
            if tap.layout.axes == "heads" and _heads_first(args[0], made, tap.layout.units):
                first.add(tap.path)

        return hook

    batch = None if model.shape.takes == "text" else sample(model)
    if "vision" in model.others and batch is not None:
        stacks["vision"] = _norm_of_tokens(model, batch)
    with ExitStack() as stack:
        for tap in {tap.path: tap for tap in taps}.values():
            part = model.module.get_submodule(tap.path)
            stack.callback(part.register_forward_hook(look(tap)).remove)
        if batch is None:
            ids = torch.tensor([_prompts(model, LENGTHS, seed=0)[0]], device=model.device)
            call(model, {"input_ids": ids})
        else:
            bare_logits(model, batch)
    found = {name: _seen(own, calls, first) for name, own in stacks.items()}
    main = found.pop("")
    return replace(model, anatomy=main.anatomy, shape=main.shape, others=found)


def _norm_of_tokens(model: LoadedModel, batch: Batch) -> Stack:
    """The vision stack without a last norm of which the language model sees nothing: many image
    encoders have one that only their class token goes through, if anything."""
    own = model.stack("vision")
    tap = own.anatomy.taps.get("final_norm")
    if tap is None:
        return own
    plain = bare_logits(model, batch)
    module = model.module.get_submodule(tap.path)
    tokens = batch.frames["vision"].mask.numel()

    def other(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return -2 * output if output.numel() == tokens * output.shape[-1] else output

    handle = module.register_forward_hook(other)
    try:
        same = _close(bare_logits(model, batch), plain, 1e-5)
    finally:
        handle.remove()
    if not same:
        return own
    taps = {site: tap for site, tap in own.anatomy.taps.items() if site != "final_norm"}
    without = {**own.anatomy.without, "final_norm": "the language model reads the last block"}
    anatomy = replace(own.anatomy, taps=taps, without=without)
    return Stack(anatomy, replace(own.shape, sites=own.shape.sites - {"final_norm"}))


def _heads_first(given: Tensor, output: Tensor, units: int) -> bool:
    """Whether heads come before positions; where there are as many of both, a view tells."""
    if output.dim() != 4 or output.shape[1] != units:
        return False
    return output.shape[2] != units or given.stride(1) < given.stride(2)


def _seen(own: Stack, calls: Mapping[str, int], first: Set[str]) -> Stack:
    """A stack after a look at which of its modules were called how often, and which of them see
    heads first."""
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
    reason = "the module that makes it is called several times in one pass"
    without = {**own.anatomy.without, **dict.fromkeys(sorted(twice), reason)}
    outer = {site: tap for site, tap in own.anatomy.taps.items() if site not in twice}
    anatomy = replace(own.anatomy, blocks=tuple(kept), taps=outer, without=without)
    return Stack(anatomy, replace(own.shape, sites=own.shape.sites - twice))


def _tried_on_text(model: LoadedModel) -> LoadedModel:
    longer, shorter = _prompts(model, LENGTHS, seed=0)
    model = classifying(model, torch.tensor([longer], device=model.device))
    alone = [
        call(model, {"input_ids": torch.tensor([row], device=model.device)})[0]
        for row in (longer, shorter)
    ]
    fine = _fine(model)
    for first in _first_positions(model):
        calling = replace(model.calling, first_position=first)
        one = Batch.of([longer], model.pad_id, "left", model.device)
        if not _close(bare_logits(replace(model, calling=calling), one)[0], alone[0], fine):
            continue
        for side in ("left", "right"):
            as_tried = replace(model, calling=replace(calling, side=side))
            batch = Batch.of([longer, shorter], model.pad_id, side, model.device)
            logits = bare_logits(as_tried, batch)[1][batch.mask[1].bool()]
            if _close(logits, alone[1], fine):
                return _called(as_tried)
    return _called(model)


def _called(model: LoadedModel) -> LoadedModel:
    """With how it returns, and how passes over packed rows call it."""
    packs = model.calling.packs if _takes_many(model) else "one prompt"
    return replace(model, calling=replace(_returns(model), packs=packs))


class _Reached(Exception):
    """The first block was reached."""


def _takes_many(model: LoadedModel) -> bool:
    """Whether it can be called with tokens of many prompts side by side, more than it has
    positions; tried for models of few positions, as others may as well go without."""
    most = model.shape.max_positions or 0
    if not 0 < most <= 1024:
        return True

    def stop(block: nn.Module, args: Any) -> None:
        raise _Reached

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    handle = block.register_forward_pre_hook(stop)
    ids = torch.full((1, most + 1), model.pad_id, device=model.device)
    try:
        call(model, text_inputs(model, ids, torch.zeros_like(ids)))
    except _Reached:
        return True
    except Exception:  # whatever the model thinks of so many tokens
        return False
    finally:
        handle.remove()
    return True


def _first_positions(model: LoadedModel) -> list[int | None]:
    """Position ids that a prompt may begin with; some count from behind the pad id (RoBERTa)."""
    if "position_ids" not in model.calling.accepts:
        return [None]
    return [0, model.pad_id + 1, 2, None]


def _tried_on_images(model: LoadedModel) -> LoadedModel:
    """Which tokens of the last block the output is made of."""
    pixels = pictures(model)
    calling = replace(_returns(model), first_position=None, packs="one prompt")
    output = call(model, pixels)
    shape = replace(model.shape, vocab_size=int(output.shape[-1]))
    if not _norms_tokens(model, pixels):
        taps = {site: tap for site, tap in model.anatomy.taps.items() if site != "final_norm"}
        model = replace(model, anatomy=replace(model.anatomy, taps=taps))
        shape = replace(shape, sites=shape.sites - {"final_norm"})
    if output.dim() == 3:  # no classifier: every token is a result
        shape = replace(shape, sites=shape.sites - {"logits"})
        return replace(model, shape=shape, calling=calling)

    def other(module: nn.Module, args: Any, hidden: Any) -> Any:
        value = hidden[0] if isinstance(hidden, tuple) else hidden
        value = torch.cat([value[:, :1], -2 * value[:, 1:]], dim=1)
        return (value, *hidden[1:]) if isinstance(hidden, tuple) else value

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        first = _close(call(model, pixels), output)
    finally:
        handle.remove()
    calling = replace(calling, reads="first token" if first else "all tokens")
    return replace(model, shape=shape, calling=calling)


def _norms_tokens(model: LoadedModel, pixels: Mapping[str, Tensor]) -> bool:
    """Whether the last norm is one of tokens, not of what they were pooled to."""
    tap = model.anatomy.taps.get("final_norm")
    if tap is None:
        return False
    seen: list[int] = []
    module = model.module.get_submodule(tap.path)
    handle = module.register_forward_hook(lambda m, a, output: seen.append(output.dim()))
    try:
        call(model, pixels)
    finally:
        handle.remove()
    return seen == [3]


def _returns(model: LoadedModel) -> Calling:
    """With the length of the tuple that the first block returns, None for a tensor."""
    returned: list[Any] = []

    def look(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    takes = model.shape.takes
    batch = sample(model) if takes in ("two texts", "audio") else None
    handle = block.register_forward_hook(look)
    try:
        if takes == "image":
            call(model, pictures(model))
        elif batch is not None:
            bare_logits(model, batch)
        else:
            ids = torch.tensor([_prompts(model, LENGTHS, seed=0)[1]], device=model.device)
            call(model, {"input_ids": ids})
    finally:
        handle.remove()
    length = len(returned[0]) if isinstance(returned[0], (tuple, list)) else None
    return replace(model.calling, block_returns=length)


def _fine(model: LoadedModel) -> float:
    """What rounding may make of one and the same."""
    return 1e-4 if model.dtype.itemsize > 2 else _CLOSE


def _close(found: Tensor, expected: Tensor, tolerance: float = _CLOSE) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())
