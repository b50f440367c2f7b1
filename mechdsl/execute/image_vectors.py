# pyright: reportPrivateUsage=false
"""Images in prompts as vectors: the tower runs once for each distinct image.

A vision-language model replaces the embeddings of an image's tokens by vectors that its tower and
projector compute. They depend on the image only, so they are computed once, and the numbers of
these tokens (`IMAGE_TOKEN`) stand for them in every later pass, as token ids do for rows of the
embedding table. `check_images_as_vectors` compares both forms on a model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechdsl.diagnostics.models import ImagesNotVectors
from mechdsl.forward.hooks.batch import Batch, SiteRead
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel, call_module
from mechdsl.images.layouts import PromptPicture
from mechdsl.images.pixels import render_pixels
from mechdsl.prompts.runs import RunRow
from mechdsl.prompts.tokens.image_prompts import (
    IMAGE_TOKEN,
    ImagePromptTokenizer,
)

_AT_ONCE = 8
"""Number of images in one pass of the tower."""

_TOLERANCE = 1e-4
"""Largest difference of logits in float32, relative to the largest logit."""


class ImageVectors:
    """The vectors of a model's images, returned by its embedding for the tokens of images."""

    def __init__(self, model: LoadedModel) -> None:
        reader = model.tokenizer
        assert isinstance(reader, ImagePromptTokenizer)
        self.reader = reader
        self._weights = model.provenance.get("weights")
        self._known: set[str] = set()
        """Markers of the images."""
        self._tokens = torch.empty(0, dtype=torch.long, device=model.device)
        """[N] ascending: the tokens of images."""
        self._vectors = torch.empty(0, model.shape.d_model, dtype=model.dtype, device=model.device)
        """[N, d_model]"""
        self._asked: Tensor | None = None
        self.apart: float | None = None
        """Difference from the model's own forward, relative to the largest logit; None: unknown."""
        embedding: nn.Module = model.module.get_input_embeddings()  # type: ignore[operator]
        _remove_hooks(embedding)
        embedding.register_forward_pre_hook(self._before, with_kwargs=True)
        embedding.register_forward_hook(self._after)

    def fits(self, model: LoadedModel) -> bool:
        """Return whether the vectors are those of this model: of its weights and processor."""
        weights, reader = model.provenance.get("weights"), model.tokenizer
        return reader is not None and (weights, reader.hash) == (self._weights, self.reader.hash)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the embedding an ordinary token in place of each image token."""
        ids: Tensor = args[0] if args else kwargs["input"]
        self._asked = ids if len(self._tokens) else None
        plain = torch.where(ids < IMAGE_TOKEN, ids, self.reader.image_id)
        return ((plain, *args[1:]), kwargs) if args else (args, {**kwargs, "input": plain})

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Put in the vectors of images; those of unknown images aren't numbers."""
        ids, self._asked = self._asked, None
        if ids is None:
            return output
        at = torch.searchsorted(self._tokens, ids.contiguous()).clamp(max=len(self._tokens) - 1)
        vectors = torch.where((self._tokens[at] == ids)[..., None], self._vectors[at], torch.nan)
        return torch.where((ids >= IMAGE_TOKEN)[..., None], vectors.to(output), output)

    def provide(self, model: LoadedModel, rows: Iterable[RunRow]) -> None:
        """Compute the vectors of the rows' images that aren't known yet."""
        new = {
            marker: each
            for row in rows
            for marker, each in row.pictures.items()
            if marker not in self._known
        }
        by_size: dict[tuple[int, int], list[tuple[str, PromptPicture]]] = {}
        for marker, each in new.items():
            by_size.setdefault(each.picture.size, []).append((marker, each))
        for alike in by_size.values():
            for start in range(0, len(alike), _AT_ONCE):
                self._add(model, alike[start : start + _AT_ONCE])

    def _add(self, model: LoadedModel, images: Sequence[tuple[str, PromptPicture]]) -> None:
        batch, own = prepare_images(model, self.reader, [each for _, each in images])
        read = SiteRead("embed")
        vectors = run_full(model, batch, stop=0, reads=[read]).reads[read][:, :, 0]
        tokens = [
            token
            for marker, each in images
            for token in self.reader.vector_tokens(marker, each.expansion)
        ]
        order = torch.cat([self._tokens, torch.tensor(tokens, device=self._tokens.device)])
        self._tokens, places = order.sort()
        self._vectors = torch.cat([self._vectors, vectors[own].to(self._vectors)])[places]
        self._known.update(marker for marker, _ in images)


def _remove_hooks(embedding: nn.Module) -> None:
    """Remove hooks of earlier vectors, also of the model that this one is a copy of."""
    for hooks in (embedding._forward_pre_hooks, embedding._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ImageVectors):
                del hooks[key]
                embedding._forward_pre_hooks_with_kwargs.pop(key, None)


_VECTORS: WeakKeyDictionary[nn.Module, ImageVectors] = WeakKeyDictionary()


def provide_images(model: LoadedModel, rows: Iterable[RunRow]) -> None:
    """Compute the vectors of the images in these rows, once for each image and model."""
    seen = [row for row in rows if row.pictures]
    if not seen:
        return
    vectors = _VECTORS.get(model.module)
    if vectors is None or not vectors.fits(model):
        vectors = _VECTORS[model.module] = ImageVectors(model)
    vectors.provide(model, seen)


def prepare_images(
    model: LoadedModel, reader: ImagePromptTokenizer, pictures: Sequence[PromptPicture]
) -> tuple[Batch, Tensor]:
    """Return prompts of one image each, prepared by the model's processor.

    Args:
        model: The model.
        reader: Its tokenizer.
        pictures: Images of one size.

    Returns:
        The batch with the processor's further inputs; [B, T] bool, the tokens of the images.
    """
    from PIL import Image

    images = [[Image.fromarray(render_pixels(each.picture))] for each in pictures]
    made: Mapping[str, Any] = reader.processor(
        text=[reader.image_text] * len(images), images=images, return_tensors="pt"
    )
    rows: list[list[int]] = made["input_ids"].tolist()
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    extra = dict(_further_inputs(model, made))
    return batch.with_inputs(extra), batch.ids == reader.image_id


def _further_inputs(model: LoadedModel, made: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the inputs of a processor other than the tokens, on the model's device."""
    for name, value in made.items():
        if name not in ("input_ids", "attention_mask"):
            moved = value.to(model.device)
            yield name, moved.to(model.dtype) if moved.is_floating_point() else moved


_TEXT_AFTER = 3
"""Number of tokens after the image in the check."""


def _with_text(given: Mapping[str, Tensor], text: Sequence[int]) -> dict[str, Tensor]:
    """Add tokens of text after an image, also to other inputs with an entry for each token."""
    shape = given["input_ids"].shape
    added = given["input_ids"].new_tensor(text).expand(shape[0], -1)
    known = {"input_ids": added, "attention_mask": torch.ones_like(added)}
    return {
        name: torch.cat([value, known.get(name, torch.zeros_like(added)).to(value.dtype)], 1)
        if value.shape == shape
        else value
        for name, value in given.items()
    }


def check_images_as_vectors(model: LoadedModel, rows: Iterable[RunRow]) -> ImagesNotVectors | None:
    """Return E0458 if a model's images act by more than their vectors at the embedding.

    The first image of a model decides.
    """
    first = next((row for row in rows if row.pictures), None)
    if first is None:
        return None
    provide_images(model, [first])
    vectors = _VECTORS[model.module]
    if vectors.apart is None:
        vectors.apart = _compare_forms(model, vectors.reader, first)
    if vectors.apart <= max(_TOLERANCE, 8 * torch.finfo(model.dtype).eps):
        return None
    apart = f"{vectors.apart:.2g}"
    return ImagesNotVectors(model=model.name, architecture=model.shape.architecture, apart=apart)


def _compare_forms(model: LoadedModel, reader: ImagePromptTokenizer, row: RunRow) -> float:
    """Return how far the logits of the model's own forward on a row's first image and last tokens
    of text are from those of a pass in which the image's tokens have its vectors, relative to the
    largest logit."""
    [(marker, picture), *_] = row.pictures.items()
    text = [token for token in row.ids if token < IMAGE_TOKEN][-_TEXT_AFTER:]
    batch, own = prepare_images(model, reader, [picture])
    with torch.inference_mode():
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **batch.extra}
        given = _with_text(given, text)
        expected = call_module(model, given).logits
        ids = given["input_ids"].clone()
        tokens = reader.vector_tokens(marker, picture.expansion)
        ids[:, : own.shape[1]][own] = torch.tensor(tokens, device=ids.device)
        mask = given["attention_mask"]
        found = call_module(model, {"input_ids": ids, "attention_mask": mask}).logits
    return float((found - expected).abs().max() / expected.abs().max())
