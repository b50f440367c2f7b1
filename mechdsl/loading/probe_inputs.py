# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Images and sounds that a model is tried out on: noise of the right shape, and the prompts that
an image stands in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.calls import call
from mechdsl.hooks.hook_points import given_to
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.adapters import Family, Inputs, family_of

_MASKS = ("token_type_ids", "mm_token_type_ids")
"""What models call their mask of an image's tokens."""
_BEFORE = 2
"""Tokens of a prompt in front of its image."""


def config_of(model: LoadedModel) -> Mapping[str, Any]:
    """The whole model's config."""
    return cast(Any, model.module).config.to_dict()


def family(model: LoadedModel) -> type[Family]:
    """The entry of the whole model, not of its language model alone."""
    return family_of(str(config_of(model).get("model_type")))


def drawn(shape: tuple[int, ...], model: LoadedModel) -> Tensor:
    """Noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def made(model: LoadedModel, inputs: Inputs) -> dict[str, Tensor]:
    """Inputs of two prompts, one behind the other."""
    return {
        name: torch.tensor([*one, *one], device=model.device)
        if isinstance(one, list)
        else drawn((2 * one[0], *one[1:]), model)
        for name, one in inputs.items()
    }


def pictures(model: LoadedModel) -> dict[str, Tensor]:
    """What two images are given as."""
    return made(model, family(model).picture(config_of(model)))


def with_sounds(model: LoadedModel, tokens: Batch) -> Batch:
    """Prompts of a decoder, each with a sound for the encoder."""
    heard = made(model, family(model).sound(config_of(model)))
    read = model.stack("cross").anatomy.blocks[0].projections[-1]
    count = tokens_seen(model, read, {**heard, "decoder_input_ids": tokens.ids})
    return tokens.with_inputs(heard, encoder=Batch.grid(2, count, model.device))


def with_images(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Batch:
    """Two prompts, each with an image behind its second token."""
    extra = pictures(model)
    count = _image_tokens(model, extra)
    mark = image_token(model)
    rows = [[*text[:_BEFORE], *([mark] * count), *text[_BEFORE:]] for text in texts]
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    known = inspect.signature(model.module.forward).parameters
    extra |= {name: (batch.ids == mark).long() for name in _MASKS if name in known}
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, **extra}
    patches = tokens_seen(model, model.stack("vision").anatomy.blocks[0].path, given)
    return batch.with_inputs(extra, vision=Batch.grid(2, patches, model.device))


_POSITIONS = re.compile(r"(^|[._])(wpe|w_?pos|pos(ition(al|s)?)?(_\w+)?|embed_positions)$", re.I)
"""What tables of learned positions are called."""


def most_tokens(model: LoadedModel) -> int | None:
    """How many tokens a text may have, by the config and the tables of learned positions; None
    where neither says it."""
    most = [model.shape.max_positions] if model.shape.max_positions else []
    width = (model.shape.d_model, model.shape.d_embed)
    if model.shape.takes != "text":
        return min(most, default=None)
    for path, weight in model.module.named_parameters():
        table = path.removesuffix(".weight")
        if not _POSITIONS.search(table) or weight.dim() not in (2, 3):
            continue
        if weight.shape[-1] not in width:
            continue
        owner = model.module.get_submodule(table) if table != path else None
        # Some leave rows in front for padding.
        padding = getattr(owner, "padding_idx", None)
        unused = getattr(owner, "offset", 0 if padding is None else padding + 1)
        most.append(int(weight.shape[-2]) - unused)
    return min((one for one in most if one > 0), default=None)


def image_token(model: LoadedModel) -> int:
    """The token that stands for a part of an image; ValueError where the config names none."""
    config = config_of(model)
    for key in ("image_token_id", "image_token_index"):
        if isinstance(token := config.get(key), int):
            return token
    raise ValueError("its config doesn't say which token stands for an image")


def _image_tokens(model: LoadedModel, extra: Mapping[str, Tensor]) -> int:
    """How many tokens one image takes up in a prompt."""
    parts: Any = (model.module, getattr(model.module, "model", None))
    features_of = next(
        (found for part in parts if (found := getattr(part, "get_image_features", None))), None
    )
    if features_of is None:
        raise ValueError("it has no `get_image_features` that tells how many tokens an image takes")
    known = inspect.signature(features_of).parameters
    with torch.inference_mode():
        features = features_of(**{name: value for name, value in extra.items() if name in known})
    if (pooled := getattr(features, "pooler_output", None)) is not None:
        features = pooled
    features = getattr(features, "last_hidden_state", features)
    rows = features if isinstance(features, (tuple, list)) else [features]
    return sum(int(one.numel() // one.shape[-1]) for one in rows) // 2


def tokens_seen(model: LoadedModel, path: str, given: Mapping[str, Tensor]) -> int:
    """How many tokens of a row enter a module; rows may lie in one dimension."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = given_to(args, kwargs)
        seen.append(hidden.numel() // hidden.shape[-1] // 2)

    handle = model.module.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode():
            call(model, given)
    finally:
        handle.remove()
    return seen[0]
