# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""How a model is called: with which tensors, without a cache, with a part of its unembedding."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Ints
from mechdsl.hooks.batch import Batch, on_device
from mechdsl.hooks.hook_points import at_hand, replaced
from mechdsl.hooks.loaded import LoadedModel


def bare_logits(model: LoadedModel, batch: Batch) -> Tensor:
    """The model's own forward, with nothing of ours but masks and positions: [B, T, vocab], what
    leaves a model without an unembedding, [B, T, d_model], or one output for a whole image."""
    return call(model, arguments(model, batch))


def one_output(model: LoadedModel) -> bool:
    """Whether logits are [B, labels], one row for a whole image."""
    return model.shape.takes == "image" and model.calling.reads != "every token"


def of_places(model: LoadedModel, logits: Tensor, rows: Ints) -> Tensor:
    """[place, …]: the logits of places in these rows, where each row has one output for all."""
    return logits[on_device(rows, logits.device)] if one_output(model) else logits


def arguments(model: LoadedModel, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with."""
    ids, mask = batch.ids, batch.mask
    match model.shape.takes:
        case "image":
            return dict(batch.extra)
        case "two texts" | "audio":
            given = dict(batch.extra)
            if model.shape.takes == "two texts":
                encoder = batch.of_stack("encoder")
                given = {"input_ids": encoder.ids, "attention_mask": encoder.mask}
            return given | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        case _:
            plain = not batch.extra or model.calling.places_images
            given = text_inputs(model, ids, batch.position_ids() if plain else None)
            return {**given, **batch.extra, "attention_mask": mask}


def text_inputs(model: LoadedModel, ids: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
    """Tokens with their positions (0 for the first of a prompt), as the model counts them."""
    calling = model.calling
    given = {"input_ids": ids}
    if positions is not None and calling.first_position is not None:
        given["position_ids"] = positions + calling.first_position
    if "token_type_ids" in calling.accepts:
        given["token_type_ids"] = torch.zeros_like(ids)
    return given


def call(model: LoadedModel, arguments: Mapping[str, Tensor]) -> Tensor:
    """The model's output, without a cache: [B, T, …]. A classifier of prompts gives its output to
    each of their tokens, or, of tokens that packed rows have side by side, each token its own."""
    if model.calling.scores is not None:
        return _scored(model, model.calling.scores, arguments)
    output = whole_output(model, arguments)
    if "logits" not in output:
        return output.last_hidden_state
    if model.shape.takes == "image" or model.calling.reads == "every token":
        return output.logits
    rows, tokens = arguments["input_ids"].shape
    if len(output.logits) != rows:
        return output.logits[None]
    return output.logits[:, None].expand(-1, tokens, -1)


class _Scored(Exception):
    """Each token has its output, and what the model makes of them isn't needed."""


def _scored(model: LoadedModel, path: str, arguments: Mapping[str, Tensor]) -> Tensor:
    """[B, T, labels] of the module that gives each token its output."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise _Scored

    handle = model.module.get_submodule(path).register_forward_hook(stop)
    try:
        whole_output(model, arguments)
    except _Scored:
        pass
    finally:
        handle.remove()
    return found[0]


def whole_output(model: LoadedModel, arguments: Mapping[str, Tensor]) -> Any:
    """All that the model returns."""
    cache = {"use_cache": False} if "use_cache" in model.calling.accepts else {}
    return model.module(**arguments, **cache)


ENDS_AT_ONCE = 2**24
"""Logits held at once while the largest and the least of all are looked for."""


@contextmanager
def narrowed(model: LoadedModel, tokens: Tensor | None, *, ends: bool = False) -> Generator[None]:
    """The unembedding computes the logits of these tokens ([K] long) only, in this order, where it
    can; `chosen` takes them out of all logits else.

    ends: two columns more, the largest and the least logit of all tokens.
    """
    if tokens is None or model.anatomy.unembedding is None or not model.calling.narrows:
        yield
        return
    module = model.module.get_submodule(model.anatomy.unembedding)
    with at_hand(module):
        every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
        rows = tokens.to(every.device)
        weight, bias = every[rows], None if biases is None else biases[rows]

    def forward(hidden: Tensor) -> Tensor:
        few = nn.functional.linear(hidden.to(weight.device), weight, bias)
        if not ends:
            return few
        with at_hand(module):
            every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
            vectors = hidden.to(every.device).flatten(0, -2)
            parts = vectors.split(max(1, ENDS_AT_ONCE // len(every)))
            both = [_ends(nn.functional.linear(part, every, biases)) for part in parts]
        return torch.cat([few, torch.cat(both).reshape(*few.shape[:-1], 2).to(few)], -1)

    with replaced(module, forward):
        yield


def chosen(
    model: LoadedModel, logits: Tensor, tokens: Tensor | None, *, ends: bool = False
) -> Tensor:
    """The logits of these tokens, out of a pass that was `narrowed` to them, `ends` behind them."""
    narrow = model.anatomy.unembedding is not None and model.calling.narrows
    if tokens is None or narrow:
        return logits
    few = logits[..., tokens.to(logits.device)]
    return torch.cat([few, _ends(logits)], -1) if ends else few


def _ends(logits: Tensor) -> Tensor:
    """[..., 2] of [..., vocab]: the largest and the least, without tokens that are excluded."""
    least = logits.masked_fill(logits.isneginf(), torch.inf).amin(-1)
    return torch.stack([logits.amax(-1), least], -1)
