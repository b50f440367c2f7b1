# pyright: reportPrivateUsage=false
"""Images in prompts as vectors: the tower runs once for each distinct image.

A vision-language model replaces the embeddings of an image's tokens by vectors that its tower and
projector compute. They depend on the image only, so they are computed once, and the numbers of
these tokens (`IMAGE_TOKEN`) stand for them in every later pass, as token ids do for rows of the
embedding table. `find_image_problem` compares both forms on a model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from inspect import signature
from itertools import count
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechdsl.base.records import Record
from mechdsl.base.text import Span
from mechdsl.diagnostics.models import ImagesNotVectors, SiteNotOnModel
from mechdsl.forward.generation.replies import DEFAULT_PASS_TOKENS
from mechdsl.forward.generation.rules import RowChoice
from mechdsl.forward.hooks.batch import (
    Batch,
    BlockPairs,
    CircuitRead,
    CircuitWrite,
    EdgeWrite,
    PatchPools,
    RuleWrites,
    SiteRead,
    SiteWrite,
    WriteMismatch,
    to_device,
    try_pass,
)
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.model import (
    IMAGE_INPUTS,
    IMAGE_TOKENS,
    BlockStack,
    Derivatives,
    ImageInputs,
    ImageTokenTable,
    LoadedModel,
    build_arguments,
    build_batch,
    call_module,
    exchange_blocks,
    find_tokens,
    replace_blocks,
)
from mechdsl.forward.hooks.module_exchange import get_activation, replace_activation
from mechdsl.images.layouts import EncoderSize, ImageCell, ImageExpansion, PromptPicture
from mechdsl.images.picture import Picture, Video, has_frames, is_grouped
from mechdsl.images.pixels import render_pixels
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.images.sounds import Sound, render_samples
from mechdsl.models.shape import ATTENDED, TILES
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN, ImagePromptTokenizer
from mechdsl.resolve.types import (
    FitSample,
    FittedBasis,
    FittedVector,
    JacobianBasis,
    ResolvedExperiment,
    SitePoint,
    iter_fitted_vectors,
)
from mechdsl.vocab.sites import SITES

_AT_ONCE = 8
"""Number of images in one pass of the tower."""

_DISTINGUISHED_DIGITS = 4
"""Images of up to 2 to the power of this many tokens are tested completely in each arrangement."""

_EMBED = SiteRead("embed")

_TOLERANCE = 1e-4
"""Largest difference of logits in float32, relative to the largest logit."""


ImageKey = tuple[str, bool]
"""The marker of an image, and whether it is grouped: see `Picture.grouped`."""


class ImageVectors:
    """The vectors of a model's images, returned by its embedding for the tokens of images."""

    def __init__(self, model: LoadedModel) -> None:
        reader = model.tokenizer
        assert isinstance(reader, ImagePromptTokenizer)
        self.reader = reader
        self._weights = model.provenance.get("weights")
        self._known: dict[ImageKey, PromptPicture] = {}
        self._images: list[ImageKey] = []
        """Their keys, by number."""
        self._places = torch.empty(0, 2, dtype=torch.long, device=model.device)
        """[N, 2]: number of the image, and index of the vector in it, of each token."""
        self._patches: dict[tuple[int, ...], _Patches | SiteNotOnModel] = {}
        """By extent of an image, its patches in the vision encoder, or why they aren't known."""
        self._proved: set[tuple[object, ...]] = set()
        """The patches that `_prove` found to be right, by all that they depend on."""
        self._video_stack: BlockStack | None = None
        """The vision encoder of videos, if it isn't that of images."""
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
        """Difference from the model's own forward, relative to the largest logit, by `_name_form`
        of pictures."""
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

    def _keep_later(self, model: LoadedModel, vectors: Sequence[Tensor], places: Tensor) -> None:
        """Add vectors of new images that the model adds after its first blocks.

        Args:
            model: The model.
            vectors: For each of the first blocks, the vectors of the new tokens.
            places: [N] the order of all tokens, the new ones last.
        """
        if not self._later:
            self._later = [vector.new_empty(0, vector.shape[1]) for vector in vectors]
            for number in range(len(vectors)):
                block = model.module.get_submodule(model.anatomy.blocks[number + 1].path)
                hook = partial(self._before_block, number)
                block.register_forward_pre_hook(hook, with_kwargs=True)
        self._later = [
            torch.cat([tensor, new.to(tensor)])[places]
            for tensor, new in zip(self._later, vectors, strict=True)
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
            key: picture
            for row in rows
            for marker, picture in row.pictures.items()
            if (key := (marker, picture.picture.grouped)) not in self._known
        }
        by_extent: dict[tuple[int, ...], list[tuple[ImageKey, PromptPicture]]] = {}
        for key, picture in new.items():
            by_extent.setdefault(picture.picture.extent, []).append((key, picture))
        for alike in by_extent.values():
            for start in range(0, len(alike), _AT_ONCE):
                self._add(model, alike[start : start + _AT_ONCE])

    def _add(self, model: LoadedModel, images: Sequence[tuple[ImageKey, PromptPicture]]) -> None:
        batch, pixels = prepare_images(model, self.reader, [picture for _, picture in images])
        with _record_later_vectors(model) as later:
            vectors = run_full(model, batch, stop=0, reads=[_EMBED]).reads[_EMBED][:, :, 0]
        tokens = [
            token
            for (marker, _), picture in images
            for token in self.reader.vector_tokens(marker, picture.expansion)
        ]
        device = self._tokens.device
        order = torch.cat([self._tokens, torch.tensor(tokens, device=device)])
        self._tokens, places = order.sort()
        first = len(self._images)
        new = [
            (first + number, index)
            for number, (_, picture) in enumerate(images)
            for index in range(sum(picture.expansion.is_image))
        ]
        self._places = torch.cat([self._places, torch.tensor(new, device=device)])[places]
        self._images += [key for key, _ in images]
        self._vectors = torch.cat([self._vectors, vectors[pixels].to(self._vectors)])[places]
        layout = self.reader.layout
        if layout.several_layers:
            self._keep_later(model, later, places)
        is_video = isinstance(images[0][1].picture, Video)
        if is_video and layout.numbering == "by row and column":
            numbers = _number_frames(model, batch, pixels)
        else:
            cells = [row for _, picture in images for row in _number_cells(picture.expansion)]
            numbers = torch.tensor(cells, device=device)
        self._numbers = torch.cat([self._numbers, numbers])[places]
        IMAGE_TOKENS[model.module] = ImageTokenTable(
            tokens=self._tokens,
            offsets=self._numbers[:, :3] if layout.numbering == "by row and column" else None,
            advance=self._numbers[:, 3],
            mixes=layout.mixes,
            prefix_end=self.reader.prefix_end,
            encode=partial(self._encode, model),
            index=lambda batch: _tabulate_images(batch, self._occurrences(batch))[1],
        )
        self._known.update(images)

    # --- the vision encoder apart from the language model -----------------------------------------

    def _occurrences(self, batch: Batch) -> list[_Occurrence]:
        """Return the images in the prompts of a batch."""
        at, known = find_tokens(self._tokens, batch.ids)
        places, known = self._places[at].cpu(), known.cpu()
        occurrences: list[_Occurrence] = []
        for row, (place, there) in enumerate(zip(places, known, strict=True)):
            columns = there.nonzero()[:, 0]
            firsts = (place[columns, 1] == 0).nonzero()[:, 0].tolist()
            for part in columns.tensor_split(firsts)[1:]:
                occurrences.append(_Occurrence(row, int(place[part[0], 0]), part))
        return occurrences

    def _encode(
        self,
        model: LoadedModel,
        batch: Batch,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        blocks: BlockPairs,
        edges: Sequence[EdgeWrite],
        circuits: Sequence[CircuitWrite | CircuitRead],
        derivatives: Derivatives,
    ) -> tuple[list[SiteWrite], dict[SiteRead, Tensor]]:
        """Run the vision encoder on a batch's images: see `VisionPass`."""
        every = self._occurrences(batch)
        count = model.shape.merged_side**2
        inside = [_number_patches(write, batch, every, count) for write in writes]
        within = [_number_edges(edge, batch, every, count) for edge in edges]
        ablated = [_number_patches(circuit, batch, every, count) for circuit in circuits]
        written = {n for each in (*inside, *within, *ablated) for n in each.rows.tolist()}
        changed = {*range(len(every))} if blocks else written
        first = _find_first_equal(() if within else writes, every)
        # Equal images without writes, or with equal ones, share a lane.
        lanes: dict[tuple[ImageKey, int], list[int]] = {}
        for n, occurrence in enumerate(every):
            if n in changed or reads:
                key = self._images[occurrence.image], first[n] if n in written else -1
                lanes.setdefault(key, []).append(n)
        by_extent: dict[tuple[int, ...], list[tuple[ImageKey, list[int]]]] = {}
        for (image, _), numbers in lanes.items():
            extent = self._known[image].picture.extent
            by_extent.setdefault(extent, []).append((image, numbers))
        vectors = _ImagesOfBatch(batch, every, changed, count)
        run = partial(run_full, stop=0, **derivatives)
        for alike in by_extent.values():
            for start in range(0, len(alike), _AT_ONCE):
                own = alike[start : start + _AT_ONCE]
                given = inside, reads, blocks, within, ablated
                tensors, later = self._run(model, run, own, *given)
                vectors.add([numbers for _, numbers in own], tensors, later)
        for circuit in circuits:
            if isinstance(circuit, CircuitRead):
                circuit.join_parts()
        return vectors.writes(self._known_later(batch)), vectors.reads

    def _known_later(self, batch: Batch) -> list[Tensor]:
        """Return the vectors that the model adds after its first blocks in unchanged images.

        Returns:
            [B, T, d_model] for each of the blocks; those of text don't matter.
        """
        at, _ = find_tokens(self._tokens, batch.ids)
        return [tensor[at] for tensor in self._later]

    def _run(
        self,
        model: LoadedModel,
        run: Callable[..., FullPassResult],
        lanes: Sequence[tuple[ImageKey, list[int]]],
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        blocks: BlockPairs,
        edges: Sequence[EdgeWrite],
        circuits: Sequence[CircuitWrite | CircuitRead],
    ) -> tuple[dict[SiteRead, Tensor], list[Tensor]]:
        """Run the vision encoder on images of one extent.

        Args:
            model: The model.
            run: Runs it up to its first block.
            lanes: The key of each image, and the numbers that it has in the batch: a changed
                image has several if they all get the same vectors.
            writes: Writes whose rows are numbers of images, and whose positions are patches.
            reads: Sites of the encoder.
            blocks: Replaced blocks.
            edges: Changed attention edges, whose rows are numbers of images, and whose queries and
                keys are patches.
            circuits: Edges between components that carry other values or are read, likewise.

        Returns:
            [lane, token, units, width] of `embed`, [lane, token, head, token] of pooled patterns,
            and [lane, patch, units, width] of other sites; the patches of a token are next to each
            other. [lane, token, d_model] for each of the blocks after which the model adds vectors.
        """
        distinct = list(dict.fromkeys(image for image, _ in lanes))
        pictures = [self._known[image] for image in distinct]
        patches = self.find_patches(model, pictures[0])
        if isinstance(patches, SiteNotOnModel):
            raise WriteMismatch(patches.reason)
        model = self._with_encoder(model, pictures[0].picture.extent)
        batch, pixels = prepare_images(model, self.reader, pictures)
        grid = replace(Batch.grid(len(distinct), patches.count), pools=patches.pool())
        batch = batch.with_inputs(batch.extra, vision=grid)
        batch = batch.take(torch.tensor([distinct.index(image) for image, _ in lanes]))
        columns = pixels[0].nonzero()[:, 0]
        inside: list[SiteWrite] = []
        within: list[EdgeWrite] = []
        for lane, (_, (number, *_)) in enumerate(lanes):
            inside += patches.place_writes(writes, number, lane)
            within += patches.place_edges(edges, number, lane)
        lane_of = {number: lane for lane, (_, (number, *_)) in enumerate(lanes)}
        ablated = [each for circuit in circuits for each in patches.place_circuit(circuit, lane_of)]
        with _record_later_vectors(model) as later, exchange_blocks(model, blocks):
            asked = [_EMBED, *reads]
            changes: dict[str, Any] = {"writes": inside, "edges": within, "circuits": ablated}
            tensors = run(model, batch, reads=asked, **changes).reads
        values = {
            each: tensors[each] if each.pooled else patches.select(tensors[each], each)
            for each in reads
        }
        values[_EMBED] = tensors[_EMBED][:, columns]
        return values, [each.unflatten(0, (len(lanes), -1)) for each in later]

    def find_patches(self, model: LoadedModel, image: PromptPicture) -> _Patches | SiteNotOnModel:
        """Return the patches of an image's tokens, or E0413 if a test doesn't confirm them."""
        extent = image.picture.extent
        if extent not in self._patches:
            self._patches[extent] = self._find_patches(model, image)
        return self._patches[extent]

    def _with_encoder(self, model: LoadedModel, extent: tuple[int, ...]) -> LoadedModel:
        """Return the model with the encoder of images, or of videos, as its stack `vision`.

        Raises:
            UnsupportedProcessor: The two encoders differ in their modules.
        """
        names = self.reader.layout.video_encoder
        if names is None or not has_frames(extent):
            return model
        if self._video_stack is None:
            block_stack = model.stack("vision")
            if not _have_equal_modules(model.module, *names):
                raise UnsupportedProcessor("its encoders of images and videos differ")
            self._video_stack = replace(block_stack, anatomy=_move(block_stack.anatomy, *names))
        return replace(model, others={**model.others, "vision": self._video_stack})

    def _find_patches(self, model: LoadedModel, image: PromptPicture) -> _Patches | SiteNotOnModel:
        try:
            model = self._with_encoder(model, image.picture.extent)
        except UnsupportedProcessor as unfit:
            return _report_patches(model, str(unfit))
        batch, pixels = prepare_images(model, self.reader, [image])
        count, tile = _count_patches(model, batch)
        size = EncoderSize(tile, model.shape.merged_side)
        try:
            groups = self.reader.patches(image.picture.extent, image.expansion, size)
        except UnsupportedProcessor as unfit:
            hint = unfit.hint or _NO_PATCHES_HINT
            return replace(_report_patches(model, str(unfit)), hint=hint)
        cells = [
            image.expansion.cell_of.get(n)
            for n, is_image in enumerate(image.expansion.is_image)
            if is_image
        ]
        rest = iter(groups)
        none = (-1,) * size.side**2
        of_token = torch.tensor([none if cell is None else next(rest) for cell in cells])
        tiles = torch.tensor([-1 if cell is None else cell.tile for cell in cells])
        read = self.reader.read_patches(image.picture.extent, image.expansion, size)
        sources = None if read is None else _list_sources(cells, read)
        patches = _Patches(count, of_token, tiles if model.shape.resamples else None, sources)
        form = _name_form(image)
        sizes = (form, count, tile, image.expansion.size, tuple(groups), tuple(read or ()))
        if sizes in self._proved:
            return patches
        is_first = all(each[0] != form for each in self._proved)
        if not self._prove(model, batch, pixels, patches, every=is_first):
            reason = "a change of the patches of some of its tokens changes other tokens"
            return _report_patches(model, reason)
        self._proved.add(sizes)
        return patches

    def _prove(
        self, model: LoadedModel, batch: Batch, tensor: Tensor, patches: _Patches, *, every: bool
    ) -> bool:
        """Return whether a change of the patches of some tokens changes these tokens only.

        Patches are changed after the last block that the language model reads, each set of tokens
        in a lane. The first lane is unchanged.

        Args:
            model: The model.
            batch: A prompt of one image.
            tensor: [1, T] bool, its tokens.
            patches: The patches to test.
            every: As in `_divide_tokens`.
        """
        columns = tensor[0].nonzero()[:, 0]
        if len(patches.of_token) != len(columns) or not patches.are_distinct():
            return False
        tests = [(torch.zeros(0, dtype=torch.long), torch.zeros(len(columns), dtype=torch.bool))]
        tests += patches.list_tests(every=every)
        layers = list(reversed(range(model.stack("vision").shape.n_layers)))
        for start in range(1, len(tests), _AT_ONCE - 1):
            lanes = [tests[0], *tests[start : start + _AT_ONCE - 1]]
            given = batch.take(torch.zeros(len(lanes), dtype=torch.long))
            given = given.with_inputs(given.extra, vision=Batch.grid(len(lanes), patches.count))
            expected = torch.stack([tokens for _, tokens in lanes])
            rows = [torch.full_like(changed, lane) for lane, (changed, _) in enumerate(lanes)]
            changes = torch.cat(rows), torch.cat([changed for changed, _ in lanes])
            while layers:
                differences = _find_changes(model, given, columns, changes, layers[0])
                if differences.any():
                    break
                layers.pop(0)
            else:
                return False
            if not bool((differences == expected).all()):
                return False
        return True


def _find_first_equal(writes: Sequence[SiteWrite], images: Sequence[_Occurrence]) -> list[int]:
    """Return the number of the first image that gets the same vectors as each image of a batch.

    Args:
        writes: Writes at rows of the batch.
        images: The images of the batch; equal rows have equal ones.
    """
    alike = [write.alike for write in writes if write.alike is not None]
    if not alike or len(alike) < len(writes) or any(each is not alike[0] for each in alike):
        return list(range(len(images)))
    of_row: dict[int, list[int]] = {}
    for number, image in enumerate(images):
        of_row.setdefault(image.row, []).append(number)
    return [
        of_row[int(alike[0][image.row])][of_row[image.row].index(number)]
        for number, image in enumerate(images)
    ]


def _have_equal_modules(module: nn.Module, first: str, second: str) -> bool:
    """Return whether two parts of a model have the same classes of modules and parameter shapes."""

    def describe(name: str) -> list[tuple[str, type[nn.Module], list[tuple[str, torch.Size]]]]:
        [part] = (own for path, own in module.named_modules() if path.rpartition(".")[2] == name)
        return [
            (path, type(own), [(key, each.shape) for key, each in own.named_parameters()])
            for path, own in part.named_modules()
        ]

    return describe(first) == describe(second)


MovedT = TypeVar("MovedT")


def _move(value: MovedT, old: str, new: str) -> MovedT:
    """Return an anatomy whose paths have another name for a module."""
    moved: Any = value
    match value:
        case str():
            moved = ".".join(new if name == old else name for name in value.split("."))
        case tuple():
            moved = tuple(_move(each, old, new) for each in cast("tuple[Any, ...]", value))
        case Mapping():
            own = cast("Mapping[str, Any]", value)
            moved = {key: _move(each, old, new) for key, each in own.items()}
        case Record():
            names = (each.name for each in fields(cast("Any", value)))
            moved = replace(
                cast("Any", value),
                **{name: _move(getattr(value, name), old, new) for name in names},
            )
        case _:
            pass
    return moved


def _divide_tokens(count: int, *, every: bool) -> list[Tensor]:
    """Return sets of tokens, [token] bool each, and their complements.

    Args:
        count: Number of tokens.
        every: Whether the sets distinguish each token from each other one, by the binary digits of
            their indices. Otherwise two random halves suffice for a wrong arrangement, in which
            many tokens have wrong patches.
    """
    digits, numbers = max(1, (count - 1).bit_length()), torch.arange(count)
    sets = [(numbers >> digit) & 1 == 1 for digit in range(digits)]
    if not every and digits > _DISTINGUISHED_DIGITS:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        sets = [order < count // 2]
    return [tensor == inside for tensor in sets for inside in (True, False)]


def _find_changes(
    model: LoadedModel,
    batch: Batch,
    columns: Tensor,
    changes: tuple[Tensor, Tensor],
    layer: int,
) -> Tensor:
    """Return [lane, token] bool: the tokens of an image that differ from those of the first lane.

    Args:
        model: The model.
        batch: Prompts of the image, in lanes.
        columns: [token] the columns of its tokens.
        changes: [K] each, the lanes and the changed patches in them.
        layer: The layer of the vision encoder after which they are changed.
    """
    rows, positions = changes
    turned = SiteWrite(
        "resid_post",
        layer,
        rows,
        positions,
        torch.zeros_like(rows),
        torch.full((len(rows), 1), -2.0, device=model.device),
        mode="scale",
        stack="vision",
    )
    embeddings = run_full(model, batch, stop=0, writes=[turned], reads=[_EMBED]).reads[_EMBED]
    vectors = embeddings[:, columns, 0]
    apart = (vectors - vectors[:1]).abs().amax(-1)
    return (apart > _TOLERANCE * vectors[0].abs().max()).cpu()


def _list_sources(
    cells: Sequence[ImageCell | None], read: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """Return the patches that each token of an image is interpolated from.

    Args:
        cells: The cell of each token, None for markers.
        read: By cell, its patches.
    """
    rest = iter(read)
    every = [() if cell is None else next(rest) for cell in cells]
    return tuple(torch.tensor(own, dtype=torch.long) for own in every)


def _count_patches(model: LoadedModel, batch: Batch) -> tuple[int, int]:
    """Return the tokens of an image in the vision encoder: of all tiles, and of each tile."""
    seen: list[tuple[int, int]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = get_activation(args, kwargs)
        seen.append((hidden.numel() // hidden.shape[-1] // len(batch), hidden.shape[-2]))

    block = model.module.get_submodule(model.stack("vision").anatomy.blocks[0].path)
    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run_full(model, batch, stop=0)
    finally:
        handle.remove()
    [patches] = seen
    return patches


_NO_PATCHES_HINT = "use `embed` at the tokens of an image"


def _report_patches(model: LoadedModel, reason: str) -> SiteNotOnModel:
    site = "resid_post vision"
    return SiteNotOnModel(
        span=None, model=model.name, site=site, reason=reason, hint=_NO_PATCHES_HINT
    )


@dataclass(frozen=True, eq=False)
class _Patches:
    """The patches of one image in the vision encoder."""

    count: int
    """Number of the image's tokens in the encoder, of all tiles."""
    of_token: Tensor
    """[token, patch] long: the encoder's tokens; -1 for tokens that aren't made from patches."""
    tiles: Tensor | None = None
    """[token] the numbers of their tiles, if a resampler reads all patches of a tile: `of_token`
    then only divides them among the tokens."""

    sources: tuple[Tensor, ...] | None = None
    """[token] the patches that each token is interpolated from, [patch] long."""

    def list_tests(self, *, every: bool) -> list[tuple[Tensor, Tensor]]:
        """Return sets of the encoder's tokens, [K] long, and whether a change of each set changes
        each token of the image, [token] bool.

        every: As in `_divide_tokens`.
        """
        if self.tiles is None:
            there = (self.of_token[:, 0] >= 0).nonzero()[:, 0]
            test_pairs = list[tuple[Tensor, Tensor]]()
            for chosen in _divide_tokens(len(there), every=every):
                expected = torch.zeros(len(self.of_token), dtype=torch.bool)
                expected[there[chosen]] = True
                test_pairs.append((self.of_token[there[chosen]].flatten(), expected))
            return test_pairs
        used = self.of_token[self.of_token >= 0]
        unused = torch.ones(self.count, dtype=torch.bool)
        unused[used] = False
        nothing = torch.zeros(len(self.of_token), dtype=torch.bool)
        if self.sources is None:
            tests = [(self.of_token[self.tiles == n], self.tiles == n) for n in self.tiles.unique()]
            test_pairs = [(tensor[tensor >= 0], tokens) for tensor, tokens in tests]
        else:
            test_pairs = [
                (used[chosen], self._find_readers(used[chosen]))
                for chosen in _divide_tokens(len(used), every=every)
            ]
        return [*test_pairs, (unused.nonzero()[:, 0], nothing)]

    def _find_readers(self, patches: Tensor) -> Tensor:
        """Return [token] bool: whether each token is interpolated from some of these patches."""
        assert self.sources is not None
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[patches] = True
        return torch.stack([mask[read].any() for read in self.sources])

    def are_distinct(self) -> bool:
        """Return whether the encoder has all of them, and no token shares one with another."""
        there = self.of_token[:, 0] >= 0 if self.tiles is None else self.of_token >= 0
        every = self.of_token[there].flatten()
        return bool((every >= 0).all() & (every < self.count).all()) and len(every) == len(
            every.unique()
        )

    @cached_property
    def of_key(self) -> Tensor:
        """[key] long: the encoder's token that is each key of a vector over keys, -1 for none.

        The keys are the patches of the image's tokens, and then the rest of the encoder's tokens,
        such as class tokens.
        """
        patches = self.of_token.flatten()
        rest = torch.ones(self.count, dtype=torch.bool)
        rest[patches[patches >= 0]] = False
        return torch.cat([patches, rest.nonzero()[:, 0]])

    def select(self, values: Tensor, read: SiteRead) -> Tensor:
        """Return [lane, patch, ...]: values [lane, token of the encoder, ...] of the patches of
        tokens, NaN for tokens that aren't made from patches.

        read: The site. If its last dimension is that of the encoder's tokens, it becomes that of
            `of_key`, with 0 for keys that don't exist.
        """
        order = self.of_token.flatten().to(values.device)
        value = values[:, order.clamp(min=0)]
        if _is_over_keys(read.site) and not read.entropy:
            keys = self.of_key.to(values.device)
            value = value[..., keys.clamp(min=0)].masked_fill_(keys < 0, 0)
        value[:, order < 0] = torch.nan
        return value

    def pool(self) -> PatchPools:
        """Return the token of each of the encoder's tokens; itself if a resampler reads it."""
        of_token = self.of_token if self.tiles is None else self.of_token.reshape(-1, 1)
        tokens, pool = of_token.shape
        there = of_token >= 0
        of_patch = torch.full((self.count,), tokens)
        of_patch[of_token[there]] = torch.arange(tokens)[:, None].expand(-1, pool)[there]
        return PatchPools(of_patch, tokens, pool)

    def keep(self, write: SiteWrite) -> SiteWrite:
        """Return a write without the numbers of `TokenHits` that no patch of a resampler has."""
        if self.tiles is None:
            return write
        return write.some(self.of_token.flatten()[write.positions] >= 0)

    def place_writes(
        self, writes: Iterable[SiteWrite], image: int, lane: int
    ) -> Iterator[SiteWrite]:
        """Yield the writes in an image, with its lane as the row and the encoder's tokens."""
        for write in writes:
            site_write = self.keep(write.some(write.rows == image))
            if len(site_write.rows):
                if _is_over_keys(site_write.site) and site_write.values.shape[1] > 1:
                    site_write = replace(site_write, values=self._find_values(site_write.values))
                rows = torch.full_like(site_write.rows, lane)
                yield replace(site_write, rows=rows, positions=self.find(site_write.positions))

    def _find_values(self, values: Tensor) -> Tensor:
        """Return [K, token of the encoder], given values over keys [K, key].

        Raises:
            WriteMismatch: The values are those of an image with fewer keys.
        """
        if values.shape[1] < len(self.of_key):
            raise WriteMismatch("vectors over the keys of an image have too few keys")
        there = self.of_key >= 0
        keys = to_device(there.nonzero()[:, 0], values.device)
        indices = values.new_zeros(len(values), self.count)
        indices[:, to_device(self.of_key[there], values.device)] = values[:, keys]
        return indices

    def place_edges(self, edges: Iterable[EdgeWrite], image: int, lane: int) -> Iterator[EdgeWrite]:
        """Yield the edges in an image, likewise."""
        for edge in edges:
            edge_write = edge.some(edge.rows == image)
            if len(edge_write.rows):
                rows, queries = (
                    torch.full_like(edge_write.rows, lane),
                    self.find(edge_write.queries),
                )
                yield replace(
                    edge_write, rows=rows, queries=queries, keys=self.find(edge_write.keys)
                )

    def place_circuit(
        self, circuit: CircuitWrite | CircuitRead, lanes: Mapping[int, int]
    ) -> Iterator[CircuitWrite | CircuitRead]:
        """Yield a circuit in some images, with their lanes as rows and the encoder's tokens.

        Args:
            circuit: The circuit in all images of the batch.
            lanes: The lane of each image, by number.
        """
        there = torch.tensor([n in lanes for n in circuit.rows.tolist()], dtype=torch.bool)
        if self.tiles is not None:
            there &= self.of_token.flatten()[circuit.positions] >= 0
        index = there.nonzero()[:, 0]
        if not len(index):
            return
        rows = torch.tensor([lanes[n] for n in circuit.rows[index].tolist()])
        positions = self.find(circuit.positions[index])
        if isinstance(circuit, CircuitRead):
            yield circuit.open_part(index, rows, positions)
        else:
            yield replace(circuit.some(there), rows=rows, positions=positions)

    def find(self, positions: Tensor) -> Tensor:
        """Return the encoder's tokens, given numbers as in `TokenHits`.

        Raises:
            WriteMismatch: A token isn't made from patches.
        """
        indices = self.of_token.flatten()[positions]
        if bool((indices < 0).any()):
            raise WriteMismatch("a token of an image isn't made from patches")
        return indices


@dataclass(frozen=True, eq=False)
class _Occurrence:
    """An image in a prompt of a batch."""

    row: int
    image: int
    """Its number."""
    columns: Tensor
    """[patch] long, on the host."""


def _tabulate_images(batch: Batch, images: Sequence[_Occurrence]) -> tuple[Tensor, Tensor]:
    """Return [B, T] long each: the number of the image of each token, -1 for text, and the index
    of the token in the image."""
    number = torch.full(batch.ids.shape, -1)
    index = torch.zeros(batch.ids.shape, dtype=torch.long)
    for n, image in enumerate(images):
        number[image.row, image.columns] = n
        index[image.row, image.columns] = torch.arange(len(image.columns))
    return number, index


WrittenT = TypeVar("WrittenT", bound=SiteWrite | CircuitWrite | CircuitRead)


def _number_patches(
    write: WrittenT, batch: Batch, images: Sequence[_Occurrence], count: int
) -> WrittenT:
    """Replace rows and positions of a write by numbers of images in the batch, and of patches.

    Args:
        write: A write or a circuit, whose positions are numbers of patches as in `TokenHits`.
        batch: The prompts.
        images: The images in them.
        count: Number of patches of a token.

    Raises:
        WriteMismatch: A token isn't one of an image.
    """
    number, index = _tabulate_images(batch, images)
    where = write.rows, batch.columns(write.rows, write.positions // count)
    if bool((number[where] < 0).any()):
        raise WriteMismatch("the vision encoder has vectors at tokens of images only")
    positions = index[where] * count + write.positions % count
    return replace(write, rows=number[where], positions=positions)


def _number_edges(
    edge: EdgeWrite, batch: Batch, images: Sequence[_Occurrence], count: int
) -> EdgeWrite:
    """Replace rows, queries and keys of edges by numbers of images in the batch, and of patches.

    A patch sees no key in another image, so such edges are left out. Arguments and errors are those
    of `_number_patches`.
    """
    number, index = _tabulate_images(batch, images)

    def find(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        where = rows, batch.columns(rows, positions // count)
        if bool((number[where] < 0).any()):
            raise WriteMismatch("attention of the vision encoder is between tokens of images only")
        return number[where], index[where] * count + positions % count

    rows, queries = find(edge.rows, edge.queries)
    of_key, keys = find(edge.rows[edge.entries], edge.keys)
    mask = of_key == rows[edge.entries]
    return replace(edge, rows=rows, queries=queries, entries=edge.entries[mask], keys=keys[mask])


def _is_over_keys(site: str) -> bool:
    return SITES[site].width == "key"


@dataclass(eq=False)
class _ImagesOfBatch:
    """Values of the images in a batch, from passes of the vision encoder."""

    batch: Batch
    images: Sequence[_Occurrence]
    written: Set[int]
    """Numbers of images whose vectors change."""
    patches: int
    """Number of patches of a token."""
    reads: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[B, column, units, width] by site; 0 at tokens of text. The first column of a prompt is that
    of `Batch.starts`, and each token has one for each of its patches. Pooled patterns are between
    tokens, [B, column, head, position], or between patches that a resampler reads. Other vectors
    over keys have those of `_Patches.of_key`, and then 0."""
    _embedded: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By number of an image, [token, d_model]."""
    _later: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])
    """By number of an image, [token, d_model] for each block after which the model adds vectors."""

    def add(
        self,
        lanes: Sequence[Sequence[int]],
        found: Mapping[SiteRead, Tensor],
        later: Sequence[Tensor],
    ) -> None:
        """Add the values of a pass.

        Args:
            lanes: The images that each lane stands for.
            found: [lane, patch, units, width] by site, and [lane, token, 1, d_model] of `embed`.
            later: [lane, token, d_model] for each block after which the model adds vectors.
        """
        for lane, numbers in enumerate(lanes):
            for n in self.written & {*numbers}:
                self._embedded[n] = found[_EMBED][lane, :, 0]
                self._later[n] = [each[lane] for each in later]
            for read, values in found.items():
                if read == _EMBED:
                    continue
                if read.pooled:
                    self._add_pattern(read, numbers, values[lane])
                    continue
                whole = self._make_room(read, values)
                for n in numbers:
                    where = self.images[n].row, self._columns(n, self.patches)
                    whole[*where, :, : values.shape[-1]] = values[lane]

    def _make_room(self, read: SiteRead, values: Tensor) -> Tensor:
        """Return the tensor of a read, wide enough for values [..., units, width] of an image."""
        whole, width = self.reads.get(read), values.shape[-1]
        if whole is None:
            columns = int((self.batch.starts + self.batch.lengths * self.patches).max())
            whole = values.new_zeros((len(self.batch), columns, *values.shape[2:]))
        elif whole.shape[-1] < width:  # an image with more keys
            whole = nn.functional.pad(whole, (0, width - whole.shape[-1]))
        self.reads[read] = whole
        return whole

    def _add_pattern(self, read: SiteRead, numbers: Sequence[int], values: Tensor) -> None:
        """Add weights [token, head, token] between tokens, or patches, of some images."""
        each = values.shape[0] // len(self.images[numbers[0]].columns)
        if read not in self.reads:
            columns = int((self.batch.starts + self.batch.lengths * each).max())
            size = len(self.batch), columns, values.shape[1], int(self.batch.lengths.max()) * each
            self.reads[read] = values.new_zeros(size)
        for n in numbers:
            row, columns = self.images[n].row, self._columns(n, each)
            keys = columns - self.batch.starts[row]
            self.reads[read][row][columns[:, None], :, keys] = values.transpose(1, 2)

    def _columns(self, number: int, each: int) -> Tensor:
        """Return [patch] long: the columns of an image's patches in `reads`.

        each: Number of patches of a token.
        """
        image = self.images[number]
        start = self.batch.starts[image.row]
        first = (image.columns - start) * each + start
        return (first[:, None] + torch.arange(each)).flatten()

    def writes(self, later: Sequence[Tensor]) -> list[SiteWrite]:
        """Return the writes of changed images: their vectors at `embed`, and the differences of
        those that the model adds after its first blocks.

        later: [B, T, d_model] for each of these blocks, of unchanged images.
        """
        if not self._embedded:
            return []
        occurrences = [self.images[n] for n in self._embedded]
        rows = torch.cat(
            [torch.full((len(occurrence.columns),), occurrence.row) for occurrence in occurrences]
        )
        columns = torch.cat([occurrence.columns for occurrence in occurrences])
        values = torch.cat(list(self._embedded.values()))
        at = rows, columns - self.batch.starts[rows], torch.zeros_like(rows)
        writes = [SiteWrite("embed", None, *at, values)]
        for layer, plain in enumerate(later):
            changed = torch.cat([each[layer] for each in self._later.values()])
            added = changed - plain[rows, columns].to(changed)
            writes.append(SiteWrite("resid_pre", layer + 1, *at, added, mode="add"))
        return writes


_LATER_VECTORS = "deepstack_visual_embeds"
"""Argument of a language model with vectors of images that it adds after its first blocks."""


@contextmanager
def _record_later_vectors(model: LoadedModel) -> Generator[list[Tensor]]:
    """Collect the vectors of images that the model adds after its first blocks.

    They are those of all tokens of images in a pass, in order, [tokens, d_model] for each block.
    """
    vectors: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        vectors[:] = kwargs.get(_LATER_VECTORS) or ()

    tap = model.anatomy.taps.get("embed")
    if tap is None:
        yield vectors
        return
    language = model.module.get_submodule(tap.path)
    handle = language.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield vectors
    finally:
        handle.remove()


def _number_cells(expansion: ImageExpansion) -> list[tuple[int, int, int, int]]:
    """Return the offsets and the advance of `ImageTokenTable` for the tokens of an image."""
    numbers = [(0, 0, 0, 0)] * sum(expansion.is_image)
    if len(expansion.layout.cells) == len(numbers):
        cells = expansion.layout.cells
        numbers = [(cell.tile - 1, cell.row - 1, cell.col - 1, 0) for cell in cells]
    return [*numbers[:-1], (*numbers[-1][:3], max(expansion.size))]


def _number_frames(model: LoadedModel, batch: Batch, tensor: Tensor) -> Tensor:
    """Return [N, 4] as `_number_cells`, from the model's numbers for prompts of one video each.

    Args:
        model: A model that numbers tokens of videos by frame, row and column.
        batch: The prompts, in which text follows each video.
        tensor: [B, T] bool, the tokens of the videos.
    """
    module: Any = model.module
    count = module.model.get_rope_index
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, **batch.extra}
    known = signature(count).parameters
    numbers: Tensor = count(**{name: each for name, each in given.items() if name in known})[0]
    frames: list[Tensor] = []
    for row, tokens in enumerate(tensor):
        columns = tokens.nonzero()[:, 0]
        gaps = (columns.diff() > 1).nonzero()[:, 0] + 1
        for part in columns.tensor_split(gaps.tolist()):  # text may separate the frames
            start = numbers[:, row, part[0]].min()
            offsets = numbers[:, row, part].T - start
            advance = offsets.new_zeros(len(offsets), 1)
            advance[-1] = numbers[:, row, part[-1] + 1].min() - start
            frames.append(torch.cat([offsets, advance], 1))
    return torch.cat(frames)


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
    known = IMAGE_INPUTS.setdefault(model.module, ImageInputs())
    for row in rows:
        for placed in row.whole_pictures:
            token = row.ids[placed.first]
            known.add(token, partial(_prepare_input, placed.picture.picture))
            known.find(model, token)


def _prepare_input(picture: Picture | Sound | Video, model: LoadedModel) -> dict[str, Tensor]:
    """Return the spectrogram of a sound, or the pixels of an image, with its vectors if blocks
    attend to it."""
    from PIL import Image

    reader = model.tokenizer
    assert isinstance(reader, ImagePromptTokenizer)
    if isinstance(picture, Sound):
        samples, rate = render_samples(picture), picture.size[0]
        made = reader.reads_with(samples, sampling_rate=rate, return_tensors="pt")
        return {"input_features": made["input_features"][0].to(model.dtype)}
    assert isinstance(picture, Picture)
    image = Image.fromarray(render_pixels(picture))
    made = reader.processor.image_processor(image, return_tensors="pt")
    if model.shape.attends_to_image:
        return _encode_image(model, made)
    return {"pixel_values": made["pixel_values"][0].to(model.dtype)}


def _encode_image(model: LoadedModel, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the vectors of an image that blocks attend to, [tokens, d_model], the tiles that it
    fills, [1, tiles], and pixels, whose first dimension is 1."""
    module: Any = model.module
    own = module.model
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    given = {name: made[name].to(model.device) for name in names}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    with torch.inference_mode(False), torch.no_grad():
        encoded = own.vision_model(**given).last_hidden_state
        vectors = own.multi_modal_projector(encoded)
    return {
        ATTENDED: vectors.reshape(-1, vectors.shape[-1]).cpu(),
        TILES: made["aspect_ratio_mask"][0].cpu(),
        **{name: each[0].cpu() for name, each in given.items()},
    }


_CHANGED_IMAGES = count(IMAGE_TOKEN << 1)
"""Tokens of images that rules in the encoder changed; no other token is between the first one and
those of videos."""


@contextmanager
def encode_changed_images(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    sources: Sequence[int],
    rules: RuleWrites,
) -> Generator[list[tuple[int, ...]]]:
    """Encode images that blocks attend to once for all passes over some rows, under rules in the
    encoder.

    Args:
        model: A model whose blocks attend to images.
        prompts: [row] token ids.
        sources: [row] number of these that the encoder reads.
        rules: The changes of the rows; only those in the encoder act.

    Yields:
        [row] token ids for passes without these rules. In rows with changes, the tokens of images
        are different for each row, and known while the context is open.
    """
    known, each, made = IMAGE_INPUTS[model.module], model.shape.attended, list[int]()
    inside = rules.inside("vision")
    acting = {row for write in (*inside.writes, *inside.edges) for row in write.rows.tolist()}
    rows = sorted(range(len(prompts)) if inside.blocks else acting)
    changed, vectors = [*prompts], _encode_rows(model, prompts, sources, inside, rows)
    for row, vector in vectors.items():
        images, ids = list[int](), prompts[row]
        for first in range(0, sources[row], each):
            token = next(_CHANGED_IMAGES)
            tiles = known.find(model, ids[first])[TILES]
            inputs = {ATTENDED: vector[first : first + each], TILES: tiles}
            known.add(token, lambda _, inputs=inputs: inputs)
            images += [token] * each
            made.append(token)
        changed[row] = (*images, *ids[sources[row] :])
    try:
        yield changed
    finally:
        for token in made:
            known.drop(token)


def _encode_rows(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    sources: Sequence[int],
    rules: RuleWrites,
    rows: Sequence[int],
) -> dict[int, Tensor]:
    """Return the vectors of the images of some rows, [tokens, d_model] on the host, by row.

    Args:
        model, prompts, sources: As in `encode_changed_images`.
        rules: Changes in the encoder.
        rows: The rows; if they exceed a pass or its memory, each half of them is encoded.
    """
    module: Any = model.module
    counts = [sources[row] for row in rows]

    def encode() -> dict[int, Tensor]:
        seen = list[Tensor]()

        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs[ATTENDED].reshape(len(rows), -1, model.shape.d_model))

        handle = module.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
        batch = build_batch(model, [prompts[row] for row in rows], counts, model.calling.side)
        writes = RowChoice(len(prompts), rows).rules(rules)
        try:
            with replace_blocks(model, rules.blocks):
                run_full(model, batch, stop=0, writes=writes.writes, edges=writes.edges)
        finally:
            handle.remove()
        ends = zip(rows, seen[0], counts, strict=True)
        return {row: each[:count].cpu() for row, each, count in ends}

    if not rows:
        return {}
    is_small = len(rows) * max(map(len, prompts)) <= DEFAULT_PASS_TOKENS
    if is_small or len(rows) == 1:
        encoded_rows = try_pass(encode, can_shrink=len(rows) > 1)
        if encoded_rows is not None:
            return encoded_rows
    half, given = len(rows) // 2, (model, prompts, sources, rules)
    return _encode_rows(*given, rows[:half]) | _encode_rows(*given, rows[half:])


def prepare_images(
    model: LoadedModel,
    reader: ImagePromptTokenizer,
    pictures: Sequence[PromptPicture],
    *,
    copies: bool = False,
) -> tuple[Batch, Tensor]:
    """Return prompts of one image or video each, prepared by the model's processor.

    It prepares an image with `Picture.grouped` in a prompt of two copies.

    Args:
        model: The model.
        reader: Its tokenizer.
        pictures: Images or videos of one extent.
        copies: Whether the prompts keep the second copy.

    Returns:
        The batch with the processor's further inputs; [B, T] bool, the tokens of the images.
    """
    from PIL import Image

    extent = pictures[0].picture.extent
    every = [
        [Image.fromarray(render_pixels(frame)) for frame in _frames(picture)]
        for picture in pictures
    ]
    times = 2 if is_grouped(extent) else 1
    images, videos = ((), every) if has_frames(extent) else ([own * times for own in every], ())
    texts = [reader.text_of(extent).given * times] * len(pictures)
    made = reader.prepare(texts, images, videos, return_tensors="pt")
    rows: list[list[int]] = made["input_ids"].tolist()
    extra = dict(_further_inputs(model, made))
    if times > 1 and not copies:
        rows = [_without_copy(row, reader.token_of(extent)) for row in rows]
        count = times * len(pictures)
        extra = {
            key: tensor[::times] if len(tensor) == count else tensor
            for key, tensor in extra.items()
        }
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    return batch.with_inputs(extra), batch.ids == reader.token_of(extent)


def _without_copy(ids: Sequence[int], token: int) -> list[int]:
    """Return the tokens of a prompt of two copies of an image without those of the second.

    token: the token that each vector of an image replaces.
    """
    numbers = [at for at, each in enumerate(ids) if each == token]
    second = {*numbers[len(numbers) // 2 :]}
    return [each for at, each in enumerate(ids) if at not in second]


def _frames(picture: PromptPicture) -> tuple[Picture, ...]:
    video = picture.picture
    return video.of if isinstance(video, Video) else (video,)


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


def find_image_problem(
    experiment: ResolvedExperiment, models: Mapping[str, LoadedModel]
) -> ImagesNotVectors | SiteNotOnModel | None:
    """Return the reason that an experiment can't run on the images of the prompts that it reads.

    Vectors in the vision encoder need more than others of an image's layout.

    Codes: E0413 and E0458.

    Args:
        experiment: The experiment.
        models: By key, its model and others that it reads.
    """
    for table, run, in_vision in _list_read_runs(experiment):
        model = models[run.model or experiment.model.key]
        problem: ImagesNotVectors | SiteNotOnModel | None
        problem = _check_images_as_vectors(model, run.rows[:1])
        if problem is None and in_vision:
            problem = _check_patches(model, run.rows)
        if problem is not None:
            named = run.model or experiment.model.name
            return replace(problem, span=_first_picture(table), model=named)
    return None


def find_sample_problem(model: LoadedModel, sample: FitSample) -> ImagesNotVectors | None:
    """Return E0458 if the images of rows that a training reads act by more than their vectors."""
    problem = _check_images_as_vectors(model, sample.run.rows[:1])
    return None if problem is None else replace(problem, span=_first_picture(sample.table))


def _first_picture(table: PromptTable) -> Span | None:
    """Return the span of the first image that a block names."""
    pictures = () if table.block_rows is None else table.block_rows.block.spec.pictures
    return pictures[0].span if pictures else None


def _list_read_runs(
    experiment: ResolvedExperiment,
) -> Iterator[tuple[PromptTable, PromptRun, bool]]:
    """Yield the runs that an experiment reads, also of other prompts, and whether it reads or
    changes vectors in the vision encoder there."""
    table = experiment.table
    points = (point for save in experiment.saves for point in save.points)
    in_vision = experiment.in_vision or _are_in_vision(points)
    yield from ((table, run, in_vision) for run in table.runs.values())
    for rule in experiment.every_rule:
        if rule.external is not None:
            yield rule.external.table, rule.external.table.runs[rule.external.run], rule.in_vision
    for fit in _list_fits(experiment):
        if not isinstance(fit, JacobianBasis):
            inside = _are_in_vision(fit.points)
            yield from ((sample.table, sample.run, inside) for sample in fit.samples)


def _list_fits(
    experiment: ResolvedExperiment,
) -> list[FittedVector | FittedBasis | JacobianBasis]:
    """Return the directions and bases that an experiment computes from activations."""
    fits: list[FittedVector | FittedBasis | JacobianBasis] = []
    members = [m for file in experiment.direction_files for m in file.members.values()]
    for rule in experiment.every_rule:
        members += [] if rule.direction is None else rule.direction.members.values()
        fits += [] if rule.basis is None else rule.basis.fits
    return fits + [fit for member in members for fit in iter_fitted_vectors(member.vector)]


def _are_in_vision(points: Iterable[SitePoint]) -> bool:
    return any(SITES[point.site].stack == "vision" for point in points)


def _check_images_as_vectors(model: LoadedModel, rows: Iterable[RunRow]) -> ImagesNotVectors | None:
    """Return E0458 if a model's images act by more than their vectors at the embedding.

    The first picture of each form decides.
    """
    first = None if model.shape.encodes_apart else _first_image(model, rows)
    if first is None:
        return None
    row, vectors = first
    for marker, picture in row.pictures.items():
        if (form := _name_form(picture)) not in vectors.apart:
            vectors.apart[form] = _compare_forms(model, vectors.reader, row, marker)
    apart = max(
        vectors.apart[_name_form(prompt_picture)] for prompt_picture in row.pictures.values()
    )
    if apart <= max(_TOLERANCE, 8 * torch.finfo(model.dtype).eps):
        return None
    return ImagesNotVectors(
        model=model.name, architecture=model.shape.architecture, apart=f"{apart:.2g}"
    )


def _name_form(picture: PromptPicture) -> str:
    """Return the name of the form in which the processor prepares a picture."""
    own = picture.picture
    return f"grouped {own.noun}" if own.grouped else own.noun


def _check_patches(model: LoadedModel, rows: Iterable[RunRow]) -> SiteNotOnModel | None:
    """Return E0413 if the patches of some image's tokens aren't known, or a test refutes them.

    The first image of each extent is tested.
    """
    every = list(rows)
    if model.shape.encodes_apart:
        return _check_attended_patches(model, every)
    first = _first_image(model, every)
    if first is None:
        return None
    pictures = (prompt_picture for row in every for prompt_picture in row.pictures.values())
    for picture in {
        prompt_picture.picture.extent: prompt_picture for prompt_picture in pictures
    }.values():
        patches = first[1].find_patches(model, picture)
        if isinstance(patches, SiteNotOnModel):
            return patches
    return None


_ATTENDED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""By model, whether `_have_own_vectors` found this."""


def _check_attended_patches(model: LoadedModel, rows: Sequence[RunRow]) -> SiteNotOnModel | None:
    """Return E0413 if blocks read a token of an image from another token of the vision encoder.

    The first image decides, because the encoder has equal columns for all of them.
    """
    row = next((run_row for run_row in rows if run_row.pictures), None)
    if row is None:
        return None
    if model.module not in _ATTENDED:
        provide_images(model, [row])
        _ATTENDED[model.module] = _have_own_vectors(model, row)
    if _ATTENDED[model.module]:
        return None
    reason = "a change of some tokens of an image changes what blocks read of other tokens"
    hint = "use `k cross` and `v cross` at the tokens of an image"
    return replace(_report_patches(model, reason), hint=hint)


def _have_own_vectors(model: LoadedModel, row: RunRow) -> bool:
    """Return whether a change of tokens after the last block of the encoder changes the values that
    blocks compute from these tokens only, in sets of `_divide_tokens`."""
    last = model.stack("vision").shape.n_layers - 1
    layer = model.stack("cross").anatomy.layers("v")[0]
    read = SiteRead("v", layer, "cross")
    batch = build_batch(model, [row.ids], [row.source], model.calling.side)
    changed = _divide_tokens(row.source, every=True)
    for start in range(0, len(changed), _AT_ONCE - 1):
        lanes = torch.stack([torch.zeros_like(changed[0]), *changed[start : start + _AT_ONCE - 1]])
        rows, positions = lanes.nonzero(as_tuple=True)
        factor = torch.full((len(rows), 1), -2.0, device=model.device)
        unit = torch.zeros_like(rows)
        turned = SiteWrite(
            "resid_post", last, rows, positions, unit, factor, mode="scale", stack="vision"
        )
        given = batch.take(torch.zeros(len(lanes), dtype=torch.long))
        values = run_full(model, given, stop=layer + 1, writes=[turned], reads=[read]).reads[read]
        values = values.flatten(2)
        apart = (values - values[:1]).abs().amax(-1) > _TOLERANCE * values[0].abs().max()
        if not bool((apart.cpu() == lanes).all()):
            return False
    return True


def _compare_forms(
    model: LoadedModel, reader: ImagePromptTokenizer, row: RunRow, marker: str
) -> float:
    """Return how far the logits of the model's own forward on an image of a row and its last tokens
    of text are from those of a pass in which the image's tokens have its vectors, relative to the
    largest logit."""
    picture = row.pictures[marker]
    text = [token for token in row.ids if token < IMAGE_TOKEN][-_TEXT_AFTER:]
    batch, pixels = prepare_images(model, reader, [picture], copies=True)
    with torch.inference_mode():
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **batch.extra}
        given = _with_text(given, text, follows_prefix=reader.prefix_end is not None)
        expected = call_module(model, given).logits
        ids = given["input_ids"].clone()
        tokens = torch.tensor(reader.vector_tokens(marker, picture.expansion), device=ids.device)
        ids[:, : pixels.shape[1]][pixels] = tokens.repeat(int(pixels.sum()) // len(tokens))
        mask = given["attention_mask"]
        lengths = mask.sum(1).cpu()
        plain = Batch(ids, mask, lengths, torch.zeros_like(lengths))
        logits = call_module(model, build_arguments(model, plain)).logits
    return float((logits - expected).abs().max() / expected.abs().max())
