# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""How a classifier gives its output: of each token, or one of a whole prompt, and made of what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.calls import call, whole_output
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.heads_by_class import OutputAt


class OneOutputOnly(Exception):
    """The model has one output for a whole prompt, and not that of a classifier which makes it of
    one token; its text says why."""


def classifying(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """The model with what its outputs are made of.

    ids: [1, T] a prompt. Raises OneOutputOnly, and what the model's own forward raises.
    """
    output, outside = _outputs(model, ids)
    if "logits" not in output:
        return model
    if output.logits.dim() == 3:
        model = replace(model, shape=replace(model.shape, output_at="every token"))
        return model if model.shape.task == "tokens" else _as_it_sees(model, ids)
    if model.shape.task == "tokens":
        raise OneOutputOnly("classifiers have a class that ends in `ForSequenceClassification`")
    model = _without_unembedding(model)
    places: tuple[tuple[OutputAt, int], ...] = (("last token", -1), ("first token", 0))
    for at, place in sorted(places, key=lambda each: each[0] != model.shape.output_at):
        for path, made in outside.items():
            if made.shape[-1:] == output.logits.shape[-1:] and torch.equal(
                made[:, place], output.logits
            ):
                calling = replace(model.calling, scores=path)
                shape = replace(model.shape, output_at=at)
                return _as_it_sees(replace(model, calling=calling, shape=shape), ids)
        if _made_of(model, ids, place, output.logits):
            skips = _skipped(model, ids) if at == "last token" else None
            calling = replace(model.calling, reads=at, skips=skips)
            shape = replace(model.shape, output_at=at, causal=False)
            return _without_last_norm(replace(model, calling=calling, shape=shape))
    raise OneOutputOnly("it is made of several tokens at once")


def _outputs(model: LoadedModel, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What the model returns, and, by path, what modules outside of its blocks return that is one
    vector for each token."""
    blocks = [block.path for block in model.anatomy.blocks]
    found: dict[str, Tensor] = {}

    def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:-1] == ids.shape:
                found[path] = output

        return hook

    with ExitStack() as stack:
        for path, module in model.module.named_modules():
            if path and not _inside(path, blocks):
                stack.callback(module.register_forward_hook(look(path)).remove)
        output = whole_output(model, {"input_ids": ids})
    return output, found


def _inside(path: str, blocks: Iterable[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _without_unembedding(model: LoadedModel) -> LoadedModel:
    """What was taken for an unembedding makes labels, perhaps of one vector for a prompt."""
    anatomy = model.anatomy
    tap = anatomy.taps.get("final_norm")
    if tap is not None and tap.path == anatomy.unembedding:
        model = _without_last_norm(model)
    return replace(model, anatomy=replace(model.anatomy, unembedding=None))


def _without_last_norm(model: LoadedModel) -> LoadedModel:
    """Behind the last block of rows there is one token of each."""
    anatomy, shape = model.anatomy, model.shape
    if "final_norm" not in anatomy.taps:
        return model
    taps = {site: own for site, own in anatomy.taps.items() if site != "final_norm"}
    reason = "behind the last block the token that the output is made of goes on by itself"
    without = {**anatomy.without, "final_norm": reason}
    return replace(
        model,
        anatomy=replace(anatomy, taps=taps, without=without),
        shape=replace(shape, sites=shape.sites - {"final_norm"}),
    )


def _made_of(model: LoadedModel, ids: Tensor, place: int, logits: Tensor) -> bool:
    """Whether the output hangs on one token of the last block alone."""

    def other(module: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, (tuple, list)) else output
        changed = -2 * value
        changed[:, place] = value[:, place]
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        return torch.equal(whole_output(model, {"input_ids": ids}).logits, logits)
    finally:
        handle.remove()


def _skipped(model: LoadedModel, ids: Tensor) -> int | None:
    """The pad token, where the output is made of the token before it."""
    pad = model.shape.config.get("pad_token_id")
    if not isinstance(pad, int) or not 0 <= pad < model.shape.vocab_size:
        return None
    ended = ids.clone()
    ended[:, -1] = pad
    logits = whole_output(model, {"input_ids": ended}).logits
    return pad if _made_of(model, ended, -2, logits) else None


def _as_it_sees(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """With whether tokens see later ones, which a classifier's class doesn't tell."""
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    before, after = (call(model, {"input_ids": each})[:, :-1] for each in (ids, other))
    if not before.numel():
        return model
    size = before.abs().amax()
    causal = bool(((after - before).abs() <= 1e-4 * size).all())
    return replace(model, shape=replace(model.shape, causal=causal))
