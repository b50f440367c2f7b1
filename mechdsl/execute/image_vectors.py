# pyright: reportPrivateUsage=false
"""Images in prompts as vectors: the tower runs once for each distinct image.

A vision-language model replaces the embeddings of an image's tokens by vectors that its tower and
projector compute. They depend on the image only, so they are computed once, and the numbers of
these tokens (`IMAGE_TOKEN`) stand for them in every later pass, as token ids do for rows of the
embedding table. `check_images_as_vectors` compares both forms on a model's own forward.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechdsl.diagnostics.models import ImagesNotVectors, SiteNotOnModel
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, WriteMismatch
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import (
    IMAGE_INPUTS,
    IMAGE_TOKENS,
    ImageTokenTable,
    LoadedModel,
    build_arguments,
    call_module,
    find_tokens,
)
from mechdsl.forward.hooks.module_exchange import get_activation, replace_activation
from mechdsl.images.layouts import ImageExpansion, PromptPicture
from mechdsl.images.picture import Picture, Video
from mechdsl.images.pixels import render_pixels
from mechdsl.images.sounds import Sound, render_samples
from mechdsl.models.anatomy import ATTENDED, TILES
from mechdsl.prompts.runs import RunRow
from mechdsl.prompts.tokens.image_prompts import (
    IMAGE_TOKEN,
    ImagePromptTokenizer,
)

_AT_ONCE = 8
"""Number of images in one pass of the tower."""

_EMBED = SiteRead("embed")

_TOLERANCE = 1e-4
"""Largest difference of logits in float32, relative to the largest logit."""


class ImageVectors:
    """The vectors of a model's images, returned by its embedding for the tokens of images."""

    def __init__(self, model: LoadedModel) -> None:
        reader = model.tokenizer
        assert isinstance(reader, ImagePromptTokenizer)
        self.reader = reader
        self._weights = model.provenance.get("weights")
        self._known: dict[str, PromptPicture] = {}
        """The images by their markers."""
        self._images: list[str] = []
        """Their markers, by number."""
        self._places = torch.empty(0, 2, dtype=torch.long, device=model.device)
        """[N, 2]: number of the image, and index of the vector in it, of each token."""
        self._patches: dict[tuple[int, int], int] = {}
        """By size of an image, the number of tokens in the vision encoder."""
        self.are_patches: bool | None = None
        """Whether each token is a patch of the vision encoder, in order; None: unknown."""
        self._tokens = torch.empty(0, dtype=torch.long, device=model.device)
        """[N] ascending: the tokens of images."""
        self._vectors = torch.empty(0, model.shape.d_model, dtype=model.dtype, device=model.device)
        """[N, d_model]"""
        self._numbers = torch.empty(0, 4, dtype=torch.long, device=model.device)
        """[N, 4]: `offsets` and `advance` of `ImageTokenTable`."""
        self._later: list[Tensor] = []
        """[N, d_model] for each of the first blocks: the vectors that the model adds after it."""
        self._asked: Tensor | None = None
        self._passing: Tensor | None = None
        """[B, T] tokens of the running pass."""
        self.apart: dict[str, float] = {}
        """Difference from the model's own forward, relative to the largest logit, by the noun of
        pictures (`image`, `video`)."""
        embedding: nn.Module = model.module.get_input_embeddings()  # type: ignore[operator]
        _remove_hooks(model.module)
        embedding.register_forward_pre_hook(self._before, with_kwargs=True)
        embedding.register_forward_hook(self._after)

    def fits(self, model: LoadedModel) -> bool:
        """Return whether the vectors are those of this model: of its weights and processor.

        After a run of a caller's model, its hooks are removed and its images forgotten, because it
        may have other weights in the next run.
        """
        weights, reader = model.provenance.get("weights"), model.tokenizer
        return (
            reader is not None
            and (weights, reader.hash) == (self._weights, self.reader.hash)
            and model.module in IMAGE_TOKENS
        )

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the embedding an ordinary token in place of each image token."""
        ids: Tensor = args[0] if args else kwargs["input"]
        self._asked = self._passing = ids if len(self._tokens) else None
        plain = torch.where(ids < IMAGE_TOKEN, ids, self.reader.image_id)
        return ((plain, *args[1:]), kwargs) if args else (args, {**kwargs, "input": plain})

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Put in the vectors of images; those of unknown images aren't numbers."""
        ids, self._asked = self._asked, None
        if ids is None:
            return output
        at, known = find_tokens(self._tokens, ids)
        vectors = torch.where(known[..., None], self._vectors[at], torch.nan)
        return torch.where((ids >= IMAGE_TOKEN)[..., None], vectors.to(output), output)

    def _keep_later(self, model: LoadedModel, found: Sequence[Tensor], places: Tensor) -> None:
        """Add vectors of new images that the model adds after its first blocks.

        Args:
            model: The model.
            found: For each of the first blocks, the vectors of the new tokens.
            places: [N] the order of all tokens, the new ones last.
        """
        if not self._later:
            self._later = [each.new_empty(0, each.shape[1]) for each in found]
            for number in range(len(found)):
                block = model.module.get_submodule(model.anatomy.blocks[number + 1].path)
                hook = partial(self._before_block, number)
                block.register_forward_pre_hook(hook, with_kwargs=True)
        self._later = [
            torch.cat([own, new.to(own)])[places]
            for own, new in zip(self._later, found, strict=True)
        ]

    def _before_block(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Add vectors of images to the output of the block before this one."""
        ids = self._passing
        if ids is None or not bool((ids >= IMAGE_TOKEN).any()):
            return None
        hidden = get_activation(args, kwargs)
        if hidden.shape[:2] != ids.shape:
            raise WriteMismatch("vectors of images can't be added to some tokens of a pass")
        at, _ = find_tokens(self._tokens, ids)
        is_image = (ids >= IMAGE_TOKEN)[..., None]
        added = torch.where(is_image, self._later[number][at].to(hidden), 0)
        return replace_activation(args, kwargs, hidden + added)

    def provide(self, model: LoadedModel, rows: Iterable[RunRow]) -> None:
        """Compute the vectors of the rows' images that aren't known yet."""
        new = {
            marker: each
            for row in rows
            for marker, each in row.pictures.items()
            if marker not in self._known
        }
        by_extent: dict[tuple[int, ...], list[tuple[str, PromptPicture]]] = {}
        for marker, each in new.items():
            by_extent.setdefault(each.picture.extent, []).append((marker, each))
        for alike in by_extent.values():
            for start in range(0, len(alike), _AT_ONCE):
                self._add(model, alike[start : start + _AT_ONCE])

    def _add(self, model: LoadedModel, images: Sequence[tuple[str, PromptPicture]]) -> None:
        batch, own = prepare_images(model, self.reader, [each for _, each in images])
        with _record_later_vectors(model) as later:
            vectors = run_full(model, batch, stop=0, reads=[_EMBED]).reads[_EMBED][:, :, 0]
        tokens = [
            token
            for marker, each in images
            for token in self.reader.vector_tokens(marker, each.expansion)
        ]
        device = self._tokens.device
        order = torch.cat([self._tokens, torch.tensor(tokens, device=device)])
        self._tokens, places = order.sort()
        first = len(self._images)
        new = [
            (first + number, index)
            for number, (_, each) in enumerate(images)
            for index in range(sum(each.expansion.is_image))
        ]
        self._places = torch.cat([self._places, torch.tensor(new, device=device)])[places]
        self._images += [marker for marker, _ in images]
        self._vectors = torch.cat([self._vectors, vectors[own].to(self._vectors)])[places]
        layout = self.reader.layout
        if layout.several_layers:
            self._keep_later(model, later, places)
        is_video = isinstance(images[0][1].picture, Video)
        if is_video and layout.numbering == "by row and column":
            numbers = _number_frames(model, batch, own)
        else:
            cells = [row for _, each in images for row in _number_cells(each.expansion)]
            numbers = torch.tensor(cells, device=device)
        self._numbers = torch.cat([self._numbers, numbers])[places]
        IMAGE_TOKENS[model.module] = ImageTokenTable(
            tokens=self._tokens,
            offsets=self._numbers[:, :3] if layout.numbering == "by row and column" else None,
            advance=self._numbers[:, 3],
            mixes=layout.mixes,
            prefix_end=self.reader.prefix_end,
            encode=partial(self._encode, model),
        )
        self._known.update(images)

    # --- the vision encoder apart from the language model -----------------------------------------

    def _occurrences(self, batch: Batch) -> list[_Occurrence]:
        """Return the images in the prompts of a batch."""
        at, known = find_tokens(self._tokens, batch.ids)
        places, known = self._places[at].cpu(), known.cpu()
        found: list[_Occurrence] = []
        for row, (own, there) in enumerate(zip(places, known, strict=True)):
            columns = there.nonzero()[:, 0]
            firsts = (own[columns, 1] == 0).nonzero()[:, 0].tolist()
            for part in columns.tensor_split(firsts)[1:]:
                found.append(_Occurrence(row, int(own[part[0], 0]), part))
        return found

    def _encode(
        self,
        model: LoadedModel,
        batch: Batch,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
    ) -> tuple[list[SiteWrite], dict[SiteRead, Tensor]]:
        """Run the vision encoder on a batch's images: see `VisionPass`."""
        every = self._occurrences(batch)
        inside = [_number_patches(write, batch, every) for write in writes]
        written = {n for write in inside for n in write.rows.tolist()}
        lanes: dict[tuple[str, int], list[int]] = {}  # equal images without writes share a lane
        for n, each in enumerate(every):
            if n in written or reads:
                key = self._images[each.image], n if n in written else -1
                lanes.setdefault(key, []).append(n)
        sizes: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
        for (marker, _), numbers in lanes.items():
            size = self._known[marker].picture.size
            sizes.setdefault(size, []).append((marker, numbers))
        vectors = _ImagesOfBatch(batch, every, written)
        for alike in sizes.values():
            for start in range(0, len(alike), _AT_ONCE):
                own = alike[start : start + _AT_ONCE]
                found = self._run(model, own, inside, reads)
                vectors.add([numbers for _, numbers in own], found)
        return vectors.writes(), vectors.reads

    def _run(
        self,
        model: LoadedModel,
        lanes: Sequence[tuple[str, list[int]]],
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
    ) -> dict[SiteRead, Tensor]:
        """Run the vision encoder on images of one size.

        Args:
            model: The model.
            lanes: The marker of each image, and the numbers that it has in the batch: a changed
                image has one.
            writes: Writes whose rows are numbers of images, and whose positions are patches.
            reads: Sites of the encoder.

        Returns:
            [lane, patch, units, width] by site, `embed` included.
        """
        distinct = list(dict.fromkeys(marker for marker, _ in lanes))
        pictures = [self._known[marker] for marker in distinct]
        batch, own = prepare_images(model, self.reader, pictures)
        patches = self._count_patches(model, batch, pictures[0].picture.size)
        batch = batch.with_inputs(batch.extra, vision=Batch.grid(len(distinct), patches))
        batch = batch.take(torch.tensor([distinct.index(marker) for marker, _ in lanes]))
        columns = own[0].nonzero()[:, 0]
        first = patches - len(columns)
        inside: list[SiteWrite] = []
        for lane, (_, (number, *_)) in enumerate(lanes):
            mine = (write.some(write.rows == number) for write in writes)
            inside += [
                replace(
                    each, rows=torch.full_like(each.rows, lane), positions=each.positions + first
                )
                for each in mine
                if len(each.rows)
            ]
        found = run_full(model, batch, stop=0, writes=inside, reads=[_EMBED, *reads]).reads
        patchwise = {each: found[each][:, first:] for each in reads}
        return {_EMBED: found[_EMBED][:, columns], **patchwise}

    def _count_patches(self, model: LoadedModel, batch: Batch, size: tuple[int, int]) -> int:
        """Return the number of tokens of an image of this size in the vision encoder."""
        if size not in self._patches:
            seen: list[int] = []

            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = get_activation(args, kwargs)
                seen.append(hidden.numel() // hidden.shape[-1] // len(batch))

            block = model.module.get_submodule(model.stack("vision").anatomy.blocks[0].path)
            handle = block.register_forward_pre_hook(look, with_kwargs=True)
            try:
                run_full(model, batch, stop=0)
            finally:
                handle.remove()
            (self._patches[size],) = seen
        return self._patches[size]

    def compare_patches(self, model: LoadedModel, image: PromptPicture) -> bool:
        """Return whether each token of an image is one token of the vision encoder, in order.

        The vector of the second patch is changed after the last block that the language model
        reads: only the vector of its token may change. Reversed or transposed patches fail.
        """
        batch, own = prepare_images(model, self.reader, [image])
        columns = own[0].nonzero()[:, 0]
        patches = self._count_patches(model, batch, image.picture.size)
        before = patches - len(columns)
        if before not in (0, 1):  # a class token that the language model doesn't read
            return False
        batch = batch.with_inputs(batch.extra, vision=Batch.grid(1, patches))
        second, zero = 1 % len(columns), torch.zeros(1, dtype=torch.long)
        plain = run_full(model, batch, stop=0, reads=[_EMBED]).reads[_EMBED][0, columns, 0]
        for layer in reversed(range(model.stack("vision").shape.n_layers)):
            turned = SiteWrite(
                "resid_post",
                layer,
                zero,
                zero + before + second,
                zero,
                torch.full((1, 1), -2.0, device=model.device),
                mode="scale",
                stack="vision",
            )
            read = run_full(model, batch, stop=0, writes=[turned], reads=[_EMBED]).reads[_EMBED]
            apart = (read[0, columns, 0] - plain).abs().amax(-1)
            changed = (apart > _TOLERANCE * plain.abs().max()).nonzero()[:, 0].tolist()
            if changed:
                return changed == [second]
        return False


@dataclass(frozen=True, eq=False)
class _Occurrence:
    """An image in a prompt of a batch."""

    row: int
    image: int
    """Its number."""
    columns: Tensor
    """[patch] long, on the host."""


def _number_patches(write: SiteWrite, batch: Batch, images: Sequence[_Occurrence]) -> SiteWrite:
    """Replace rows and positions of a write by numbers of images in the batch, and of patches.

    Raises:
        WriteMismatch: A token isn't one of an image.
    """
    number = torch.full(batch.ids.shape, -1)
    index = torch.zeros(batch.ids.shape, dtype=torch.long)
    for n, each in enumerate(images):
        number[each.row, each.columns] = n
        index[each.row, each.columns] = torch.arange(len(each.columns))
    where = write.rows, batch.columns(write.rows, write.positions)
    if bool((number[where] < 0).any()):
        raise WriteMismatch(f"{write.where.quoted} has vectors at tokens of images only")
    return replace(write, rows=number[where], positions=index[where])


@dataclass(eq=False)
class _ImagesOfBatch:
    """Values of the images in a batch, from passes of the vision encoder."""

    batch: Batch
    images: Sequence[_Occurrence]
    written: Set[int]
    """Numbers of images whose vectors change."""
    reads: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[B, T, units, width] by site; 0 at tokens of text."""
    _embedded: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By number of an image, [patch, d_model]."""

    def add(self, lanes: Sequence[Sequence[int]], found: Mapping[SiteRead, Tensor]) -> None:
        """Add the values of a pass.

        Args:
            lanes: The images that each lane stands for.
            found: [lane, patch, units, width] by site.
        """
        for lane, numbers in enumerate(lanes):
            for read, values in found.items():
                if read == _EMBED:
                    self._embedded |= {n: values[lane, :, 0] for n in numbers if n in self.written}
                    continue
                if read not in self.reads:
                    whole = values.new_zeros((*self.batch.ids.shape, *values.shape[2:]))
                    self.reads[read] = whole
                for n in numbers:
                    self.reads[read][self.images[n].row, self.images[n].columns] = values[lane]

    def writes(self) -> list[SiteWrite]:
        """Return the writes of changed images at `embed`."""
        if not self._embedded:
            return []
        own = [self.images[n] for n in self._embedded]
        rows = torch.cat([torch.full((len(each.columns),), each.row) for each in own])
        columns = torch.cat([each.columns for each in own])
        values = torch.cat(list(self._embedded.values()))
        positions = columns - self.batch.starts[rows]
        return [SiteWrite("embed", None, rows, positions, torch.zeros_like(rows), values)]


_LATER_VECTORS = "deepstack_visual_embeds"
"""Argument of a language model with vectors of images that it adds after its first blocks."""


@contextmanager
def _record_later_vectors(model: LoadedModel) -> Generator[list[Tensor]]:
    """Collect the vectors of images that the model adds after its first blocks.

    They are those of all tokens of images in a pass, in order, [tokens, d_model] for each block.
    """
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[:] = kwargs.get(_LATER_VECTORS) or ()

    tap = model.anatomy.taps.get("embed")
    if tap is None:
        yield found
        return
    language = model.module.get_submodule(tap.path)
    handle = language.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _number_cells(expansion: ImageExpansion) -> list[tuple[int, int, int, int]]:
    """Return the offsets and the advance of `ImageTokenTable` for the tokens of an image."""
    found = [(0, 0, 0, 0)] * sum(expansion.is_image)
    if len(expansion.layout.cells) == len(found):
        cells = expansion.layout.cells
        found = [(cell.tile - 1, cell.row - 1, cell.col - 1, 0) for cell in cells]
    return [*found[:-1], (*found[-1][:3], max(expansion.size))]


def _number_frames(model: LoadedModel, batch: Batch, own: Tensor) -> Tensor:
    """Return [N, 4] as `_number_cells`, from the model's numbers for prompts of one video each.

    Args:
        model: A model that numbers tokens of videos by frame, row and column.
        batch: The prompts, in which text follows each video.
        own: [B, T] bool, the tokens of the videos.
    """
    module: Any = model.module
    count = module.model.get_rope_index
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, **batch.extra}
    known = signature(count).parameters
    numbers: Tensor = count(**{name: each for name, each in given.items() if name in known})[0]
    found: list[Tensor] = []
    for row, tokens in enumerate(own):
        columns = tokens.nonzero()[:, 0]
        gaps = (columns.diff() > 1).nonzero()[:, 0] + 1
        for part in columns.tensor_split(gaps.tolist()):  # text may separate the frames
            start = numbers[:, row, part[0]].min()
            offsets = numbers[:, row, part].T - start
            advance = offsets.new_zeros(len(offsets), 1)
            advance[-1] = numbers[:, row, part[-1] + 1].min() - start
            found.append(torch.cat([offsets, advance], 1))
    return torch.cat(found)


def _remove_hooks(module: nn.Module) -> None:
    """Remove hooks of earlier vectors, also of the model that this one is a copy of."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key, hook in list(hooks.items()):
                own = hook.func if isinstance(hook, partial) else hook
                if isinstance(getattr(own, "__self__", None), ImageVectors):
                    del hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)


_VECTORS: WeakKeyDictionary[nn.Module, ImageVectors] = WeakKeyDictionary()


def provide_images(model: LoadedModel, rows: Iterable[RunRow]) -> None:
    """Compute the vectors of the images in these rows, once for each image and model."""
    seen = [row for row in rows if row.pictures]
    if not seen:
        return
    if model.shape.encodes_apart:
        _provide_pixels(model, seen)
        return
    vectors = _VECTORS.get(model.module)
    if vectors is None or not vectors.fits(model):
        IMAGE_TOKENS.pop(model.module, None)
        vectors = _VECTORS[model.module] = ImageVectors(model)
    vectors.provide(model, seen)


def _provide_pixels(model: LoadedModel, rows: Iterable[RunRow]) -> None:
    """Prepare the images or sounds that an encoder reads, each one once."""
    from PIL import Image

    reader = model.tokenizer
    assert isinstance(reader, ImagePromptTokenizer)
    known = IMAGE_INPUTS.setdefault(model.module, {})
    for row in rows:
        [picture] = row.pictures.values()
        if row.ids[0] in known:
            continue
        if isinstance(picture.picture, Sound):
            known[row.ids[0]] = _prepare_sound(model, reader.reads_with, picture.picture)
        else:
            image = Image.fromarray(render_pixels(picture.picture))
            made = reader.processor.image_processor(image, return_tensors="pt")
            if model.shape.takes == "attended image":
                known[row.ids[0]] = _encode_image(model, made)
            else:
                known[row.ids[0]] = {"pixel_values": made["pixel_values"][0].to(model.dtype)}


def _prepare_sound(model: LoadedModel, extractor: Any, sound: Sound) -> dict[str, Tensor]:
    """Return the spectrogram of a sound."""
    samples, rate = render_samples(sound), sound.size[0]
    made = extractor(samples, sampling_rate=rate, return_tensors="pt")
    return {"input_features": made["input_features"][0].to(model.dtype)}


def _encode_image(model: LoadedModel, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the vectors of an image that blocks attend to, and the tiles that it fills."""
    module: Any = model.module
    own = module.model
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    given = {name: made[name].to(model.device) for name in names}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    with torch.no_grad():
        encoded = own.vision_model(**given).last_hidden_state
        vectors = own.multi_modal_projector(encoded)
    return {
        ATTENDED: vectors.reshape(-1, vectors.shape[-1]).cpu(),
        TILES: made["aspect_ratio_mask"][0, 0].cpu(),
    }


def prepare_images(
    model: LoadedModel, reader: ImagePromptTokenizer, pictures: Sequence[PromptPicture]
) -> tuple[Batch, Tensor]:
    """Return prompts of one image or video each, prepared by the model's processor.

    Args:
        model: The model.
        reader: Its tokenizer.
        pictures: Images or videos of one extent.

    Returns:
        The batch with the processor's further inputs; [B, T] bool, the tokens of the images.
    """
    from PIL import Image

    extent = pictures[0].picture.extent
    every = [[Image.fromarray(render_pixels(own)) for own in _frames(each)] for each in pictures]
    images, videos = (every, ()) if len(extent) == 2 else ((), every)
    texts = [reader.text_of(extent).given] * len(pictures)
    made = reader.prepare(texts, images, videos, return_tensors="pt")
    rows: list[list[int]] = made["input_ids"].tolist()
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    extra = dict(_further_inputs(model, made))
    return batch.with_inputs(extra), batch.ids == reader.token_of(extent)


def _frames(picture: PromptPicture) -> tuple[Picture, ...]:
    own = picture.picture
    return own.of if isinstance(own, Video) else (own,)


def _further_inputs(model: LoadedModel, made: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the inputs of a processor other than the tokens, on the model's device."""
    for name, value in made.items():
        if name not in ("input_ids", "attention_mask", "labels", "video_metadata"):
            moved = torch.as_tensor(value).to(model.device)
            yield name, moved.to(model.dtype) if moved.is_floating_point() else moved


_TEXT_AFTER = 3
"""Number of tokens after the image in the check."""


def _with_text(
    given: Mapping[str, Tensor], text: Sequence[int], *, follows_prefix: bool
) -> dict[str, Tensor]:
    """Add tokens of text after an image, also to other inputs with an entry for each token.

    follows_prefix: whether the tokens before the text all attend to each other.
    """
    shape = given["input_ids"].shape
    added = given["input_ids"].new_tensor(text).expand(shape[0], -1)
    known = {"input_ids": added, "attention_mask": torch.ones_like(added)}
    if follows_prefix:
        known["token_type_ids"] = torch.ones_like(added)
    return {
        name: torch.cat([value, known.get(name, torch.zeros_like(added)).to(value.dtype)], 1)
        if value.shape == shape
        else value
        for name, value in given.items()
    }


def _first_image(model: LoadedModel, rows: Iterable[RunRow]) -> tuple[RunRow, ImageVectors] | None:
    """Return the first row with images, and the vectors of a model's images, with those of the row;
    None if no row has images."""
    first = next((row for row in rows if row.pictures), None)
    if first is None:
        return None
    provide_images(model, [first])
    return first, _VECTORS[model.module]


def check_images_as_vectors(model: LoadedModel, rows: Iterable[RunRow]) -> ImagesNotVectors | None:
    """Return E0458 if a model's images act by more than their vectors at the embedding.

    The first image and the first video of a model decide.
    """
    first = None if model.shape.encodes_apart else _first_image(model, rows)
    if first is None:
        return None
    row, vectors = first
    for marker, picture in row.pictures.items():
        if (noun := picture.picture.noun) not in vectors.apart:
            vectors.apart[noun] = _compare_forms(model, vectors.reader, row, marker)
    apart = max(vectors.apart[each.picture.noun] for each in row.pictures.values())
    if apart <= max(_TOLERANCE, 8 * torch.finfo(model.dtype).eps):
        return None
    return ImagesNotVectors(
        model=model.name, architecture=model.shape.architecture, apart=f"{apart:.2g}"
    )


def check_patches(model: LoadedModel, rows: Iterable[RunRow]) -> SiteNotOnModel | None:
    """Return E0413 if tokens of the first image aren't patches of the vision encoder, in order."""
    first = _first_image(model, rows)
    if first is None:
        return None
    row, vectors = first
    if vectors.are_patches is None:
        [image, *_] = row.pictures.values()
        vectors.are_patches = vectors.compare_patches(model, image)
    if vectors.are_patches:
        return None
    reason = "a change of one patch doesn't change the vector of one token of the image"
    hint = "use `embed` at the tokens of an image"
    site = "resid_post vision"
    return SiteNotOnModel(span=None, model=model.name, site=site, reason=reason, hint=hint)


def _compare_forms(
    model: LoadedModel, reader: ImagePromptTokenizer, row: RunRow, marker: str
) -> float:
    """Return how far the logits of the model's own forward on an image of a row and its last tokens
    of text are from those of a pass in which the image's tokens have its vectors, relative to the
    largest logit."""
    picture = row.pictures[marker]
    text = [token for token in row.ids if token < IMAGE_TOKEN][-_TEXT_AFTER:]
    batch, own = prepare_images(model, reader, [picture])
    with torch.inference_mode():
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **batch.extra}
        given = _with_text(given, text, follows_prefix=reader.prefix_end is not None)
        expected = call_module(model, given).logits
        ids = given["input_ids"].clone()
        tokens = reader.vector_tokens(marker, picture.expansion)
        ids[:, : own.shape[1]][own] = torch.tensor(tokens, device=ids.device)
        mask = given["attention_mask"]
        lengths = mask.sum(1).cpu()
        plain = Batch(ids, mask, lengths, torch.zeros_like(lengths))
        found = call_module(model, build_arguments(model, plain)).logits
    return float((found - expected).abs().max() / expected.abs().max())
