# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Models with a tower for images and one for texts, each as a model of its own.

What a tower makes of its input is scored with what the other one has made of other things, which
are a constant: so an image tower is a classifier whose labels are texts (CLIP's zero-shot classes),
and a text tower one whose labels are images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import IdentityBroken
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.images.picture import Picture
from mechdsl.images.pixels import prepared
from mechdsl.loading.probe import texts as text_batch
from mechdsl.loading.probe_inputs import pictures
from mechdsl.loading.proof_store import Proofs
from mechdsl.loading.prove import take_apart
from mechdsl.models.identity import digest_of
from mechdsl.models.shape import ModelShape
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.resolved import ModelContext

_TRIED = 5
"""Vectors of the other tower that a tower is tried out with."""
_SAME, _SAME_OF_HALF = 1e-4, 0.02
"""Relative difference of scores from those that the model gives itself, in 32 and in 16 bits."""
_TEXTS_AT_ONCE = 64
_IMAGES_AT_ONCE = 16
CAUSAL = ("clip_text_model", "metaclip_2_text_model")


class Tower(nn.Module):
    """One of the two, with what the vectors of the other one are.

    Its output is what the library calls `logits_per_image` or `logits_per_text`.
    """

    others: Tensor

    def __init__(self, model: Any, tower: nn.Module, projection: nn.Module | None) -> None:
        """model: the whole one. projection: the map into the space that both meet in, where the
        tower doesn't end there itself."""
        super().__init__()
        self.config = cast(Any, tower).config
        self.tower = tower
        self.projection = nn.Identity() if projection is None else projection
        self.logit_scale = cast(nn.Parameter, model.logit_scale)
        self.logit_bias = cast("nn.Parameter | None", getattr(model, "logit_bias", None))
        width = int(self.config.hidden_size)
        if projection is not None:
            width = int(cast(Any, projection).out_features)
        noise = torch.randn(_TRIED, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("others", _unit(noise.to(self.logit_scale)), persistent=False)

    def facing(self, others: Tensor) -> Tower:
        """The same tower, scored with other vectors, [other, width] of length 1."""
        found = copy(self)
        found._buffers = {**self._buffers, "others": others}
        return found

    def scores(self, vectors: Tensor) -> Tensor:
        """[…, other]: the cosines, scaled, with the model's bias if it has one."""
        found = _unit(vectors) @ self.others.T * self.logit_scale.exp()
        return found if self.logit_bias is None else found + self.logit_bias


class ImageTower(Tower):
    """An encoder of images."""

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.scores(self.vectors(pixel_values)))

    def vectors(self, pixel_values: Tensor) -> Tensor:
        """[image, width]: what the other tower's are compared with."""
        return self.projection(self.tower(pixel_values=pixel_values).pooler_output)


class TextTower(Tower):
    """An encoder of texts. Where no token sees a later one, each has scores, and those of the text
    are those of its last token; else there is one output for a whole text."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> ModelOutput:
        found = self.tower(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        causal = self.config.model_type in CAUSAL
        made = self.projection(found.last_hidden_state if causal else found.pooler_output)
        return ModelOutput(logits=self.scores(made))

    def get_input_embeddings(self) -> nn.Module:
        return cast(Any, self.tower).embeddings.token_embedding

    def vectors(self, input_ids: Tensor) -> Tensor:
        """[text, width], of texts of one length."""
        return self.projection(self.tower(input_ids=input_ids).pooler_output)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


# --- taking models apart --------------------------------------------------------------------------


def image_tower(model: Any) -> ImageTower:
    return ImageTower(model, model.vision_model, getattr(model, "visual_projection", None))


def text_tower(model: Any) -> TextTower:
    return TextTower(model, model.text_model, getattr(model, "text_projection", None))


def take_any_apart(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    proofs: Proofs | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """As `take_apart`, and models with two towers: the one for images, with the other in it."""
    told: dict[str, Any] = {"provenance": provenance, "span": span, "proofs": proofs}
    if shape.texts is None:
        return take_apart(name, module, shape, tokenizer, **told)
    module.eval()
    own = tokenizer.texts if isinstance(tokenizer, ImageReader) else None
    images, found = take_apart(name, image_tower(module), shape, tokenizer, **told)
    texts, more = take_apart(name, text_tower(module), shape.texts, own, **told)
    found = [*found, *more]
    if images is None or texts is None:
        return None, found
    problem = _other_scores(module, images, texts, span)
    if problem is not None:
        return None, [problem]
    return replace(images, texts=texts), found


def _other_scores(
    module: Any, images: LoadedModel, texts: LoadedModel, span: Span | None
) -> Diagnostic | None:
    """E0410 where the towers don't give the scores that the whole model gives."""
    pixels = pictures(images)["pixel_values"]
    ids = text_batch(texts).ids[:1]
    with torch.no_grad():
        own = module(pixel_values=pixels, input_ids=ids).logits_per_image
        of_texts = cast(TextTower, texts.module).vectors(ids)
        of_images = cast(ImageTower, images.module).vectors(pixels)
        found = cast(Tower, images.module).facing(_unit(of_texts)).scores(of_images)
        other = cast(Tower, texts.module).facing(_unit(of_images)).scores(of_texts).T
    tolerance, size = _SAME, own.abs().max()
    if images.dtype.itemsize <= 2:  # a cosine is rounded as a part of 1, however small it is
        tolerance, size = _SAME_OF_HALF, module.logit_scale.exp()
    error = float(max((found - own).abs().max(), (other - own).abs().max()) / size)
    if error <= tolerance:
        return None
    return IdentityBroken(
        span=span,
        model=images.name,
        architecture=type(module).__name__,
        identity="scores of the towers = scores of the model",
        reason=f"off by {error:.2g} of their size",
    )


# --- what stands on the other side ----------------------------------------------------------------


def facing(model: LoadedModel, context: ModelContext) -> LoadedModel:
    """The tower that an experiment runs, scored with what stands on its other side."""
    opposite, told = context.opposite, context.shape
    assert opposite is not None
    assert model.texts is not None
    if told.side == "vision":
        own, others = model, _of_texts(model.texts, opposite.ids)
    else:
        own, others = model.texts, _of_images(model, opposite.pictures)
    identity = None
    if model.identity is not None:
        identity = digest_of([model.identity, told.side, opposite.digest])
    tower = cast(Tower, own.module).facing(others)
    shape = replace(
        own.shape,
        labels=told.labels,
        d_logits=told.d_logits,
        classes=told.classes,
        output_at=told.output_at,
    )
    return replace(own, module=tower, shape=shape, identity=identity)


def _of_images(model: LoadedModel, pictures: Sequence[Picture]) -> Tensor:
    """[image, width] of length 1."""
    tower, reader = cast(ImageTower, model.module), model.tokenizer
    assert isinstance(reader, ImageReader)
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pictures), _IMAGES_AT_ONCE):
            part = pictures[start : start + _IMAGES_AT_ONCE]
            made = np.stack([prepared(each, reader.processing) for each in part])
            pixels = torch.from_numpy(made).to(model.device, model.dtype)
            found.append(_unit(tower.vectors(pixels)))
    return torch.cat(found)


def _of_texts(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """[text, width] of length 1; those of one length go through together, without padding."""
    tower = cast(TextTower, model.module)
    found: dict[int, Tensor] = {}
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        by_length.setdefault(len(ids), []).append(number)
    with torch.no_grad():
        for numbers in by_length.values():
            for start in range(0, len(numbers), _TEXTS_AT_ONCE):
                part = numbers[start : start + _TEXTS_AT_ONCE]
                ids = torch.tensor([list(texts[n]) for n in part], device=model.device)
                found.update(zip(part, _unit(tower.vectors(ids)), strict=True))
    return torch.stack([found[number] for number in range(len(texts))])
