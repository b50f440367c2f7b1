"""Images that blocks attend to in passes over the newest tokens of prompts."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.model import (
    ATTENDED,
    TILES,
    LoadedModel,
    build_image_arguments,
    hide_missing_images,
    map_images_once,
)


@dataclass(frozen=True, eq=False)
class AttendedImages:
    """The images of some prompts, which passes over tokens of these rows attend to."""

    model: LoadedModel
    prompts: Batch
    """[row] whole prompts, whose encoder reads images."""

    @property
    def encoder(self) -> Batch:
        """[row] tokens of the images."""
        return self.prompts.of_stack("encoder")

    @cached_property
    def _arguments(self) -> Mapping[str, Tensor]:
        return build_image_arguments(self.model, self.prompts)

    def build_arguments(self, first: int, count: int) -> dict[str, Tensor]:
        """Build the arguments of a pass over columns of the prompts, or of their replies.

        A reply attends to the tiles that the last token of its prompt attends to.

        Args:
            first: First column.
            count: Number of columns, which are all before or all after the end of the prompts.
        """
        arguments = dict(self._arguments)
        seen = arguments["cross_attention_mask"]
        width = seen.shape[1]
        tensor = seen[:, first : first + count] if first < width else seen[:, -1:]
        return arguments | {"cross_attention_mask": tensor}

    @contextmanager
    def opened(self) -> Generator[None]:
        """Compute the keys and values of each image once for all passes, and let no token attend
        to images that its prompt doesn't have, while the context is open."""
        once = map_images_once(self.model, self.prompts, self._arguments)
        with once, hide_missing_images(self.model, self.prompts):
            yield


def list_image_layers(model: LoadedModel) -> tuple[int, ...]:
    """List the layers that attend to an image in place of earlier tokens."""
    if not model.shape.attends_to_image:
        return ()
    return tuple(n for n in range(model.shape.n_layers) if not model.shape.has("k", n))


def is_of_image(where: SiteRead | SiteWrite) -> bool:
    """Return whether a site has vectors of the tokens of an encoder, not of the text."""
    return where.stack == "cross" and where.site in ("k", "v")


def align_ends(
    model: LoadedModel, prompts: Sequence[tuple[int, ...]], sources: Sequence[int]
) -> Batch:
    """Pad prompts on the left, except the tokens that an encoder reads.

    Args:
        model: The model.
        prompts: [row] token ids.
        sources: [row] number of tokens that an encoder reads; 0 in other models.
    """
    pairs = [*zip(prompts, sources, strict=True)]
    texts = [ids[count:] for ids, count in pairs]
    batch = Batch.of(texts, model.pad_id, "left", model.device)
    if not any(sources):
        return batch
    images = [ids[:count] for ids, count in pairs]
    return batch.after(Batch.of(images, model.pad_id, "right", model.device))


def add_trial_images(model: LoadedModel, batch: Batch, first: int) -> Batch:
    """Add an image of random vectors to each prompt, the same one to every other prompt.

    Args:
        model: The model.
        batch: The prompts.
        first: Number of the first prompt.
    """
    shape, device = model.shape, model.device
    generator = torch.Generator().manual_seed(1)
    size = 2, shape.attended, shape.d_model
    vectors = torch.randn(size, generator=generator).to(device, model.dtype)
    which = (first + torch.arange(len(batch), device=device)) % 2
    extra: dict[str, Any] = {
        ATTENDED: vectors[which],
        TILES: torch.ones(len(batch), 1, shape.tiles, dtype=torch.long, device=device),
    }
    moved = batch.after(Batch.grid(len(batch), shape.attended, device))
    return moved.with_inputs(extra, **moved.frames)
