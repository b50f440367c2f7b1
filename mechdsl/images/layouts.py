"""Layouts of image tokens: the part of an image that each position of a prompt reads.

A processor of transformers replaces each image of a prompt by many tokens. `image_layout` returns
their positions, as rows and columns of tiles, with the pixels that each one covers; `video_layout`
returns those of videos, frame by frame. A layout is one class for each model type. A module outside
the package adds one under `layout`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from datetime import timedelta
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from mechdsl.base.records import Record, Registry
from mechdsl.images.picture import Picture, Region
from mechdsl.images.processing import Processing, UnsupportedProcessor, crop_corner

if TYPE_CHECKING:
    from mechdsl.base.arrays import Ints

Size = tuple[int, int]
"""(height, width)."""

PixelBox = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the image before preparation, the ends exclusive."""

THUMBNAIL = 0
"""The number of the view that shows the whole image next to its tiles."""


class ImageCell(Record):
    """A position of the language model that reads a part of an image."""

    position: int
    """The index of the token in the prompt, from 0."""
    tile: int
    """Number of the tile from 1, in reading order; 1 without tiles, and 0 in the thumbnail.

    In a video, number of the frame from 1, or of the group of frames that the model merges.
    """
    row: int
    """Counted from 1 over all tiles, in the thumbnail, or in a frame; 0 if a resampler mixes the
    patches."""
    col: int
    box: PixelBox | None
    """The pixels that it covers; None for padding."""


class ImageTile(Record):
    """A tile or the thumbnail: the grid of its cells."""

    number: int
    """As in `ImageCell.tile`."""
    top: int
    """The row of its first cell, from 1: cells of tiles count rows over all tiles."""
    left: int
    rows: int
    cols: int


class ImageTokens(Record):
    """The tokens of one image in a prompt."""

    start: int
    """Its first position, markers included."""
    end: int
    """The position after its last one."""
    cells: tuple[ImageCell, ...]
    """In the order of the prompt. The other tokens read no part of the image."""

    @cached_property
    def tiles(self) -> tuple[ImageTile, ...]:
        """The tiles that have cells, in the order of the prompt."""
        cells: dict[int, list[ImageCell]] = {}
        for cell in self.cells:
            cells.setdefault(cell.tile, []).append(cell)
        return tuple(_tile(number, image_cells) for number, image_cells in cells.items())

    @property
    def thumbnail(self) -> ImageTile | None:
        """The view of the whole image next to its tiles."""
        return next((tile for tile in self.tiles if tile.number == THUMBNAIL), None)

    @property
    def rows(self) -> int:
        """Rows of the grid of all tiles; 0 if a resampler mixes the patches, and without cells."""
        return max((cell.row for cell in self.cells if cell.tile != THUMBNAIL), default=0)

    @property
    def cols(self) -> int:
        """Columns of the grid of all tiles."""
        return max((cell.col for cell in self.cells if cell.tile != THUMBNAIL), default=0)


class ImageExpansion(Record):
    """The tokens that stand for an image of one size in a prompt."""

    ids: tuple[int, ...]
    """As the processor writes them: tokens of the image, and marks between them."""
    is_image: tuple[bool, ...]
    """Whether a token has a vector of the image."""
    layout: ImageTokens
    """The parts of the image that they read; positions count from the first token."""
    is_sound: bool = False
    """Whether they stand for a sound, whose frames are tiles of one cell."""
    grouped: bool = False
    """As `Picture.grouped`: its vectors differ from those of the image alone."""
    vectors: int = 1
    """Number of positions of each token: those of the vision encoder, in a view of its patches."""

    @cached_property
    def cell_of(self) -> Mapping[int, ImageCell]:
        """The cells by their tokens."""
        return {cell.position: cell for cell in self.layout.cells}

    @cached_property
    def grid(self) -> Mapping[tuple[int, int], int]:
        """Row and column of each cell → its token; of the tiles, or of the only view."""
        cells = [cell for cell in self.layout.cells if cell.row]
        tiles = [cell for cell in cells if cell.tile != THUMBNAIL]
        return {(cell.row, cell.col): cell.position for cell in tiles or cells}

    def grid_of(self, number: int) -> Mapping[tuple[int, int], int]:
        """Row and column of each cell of a tile or the thumbnail, from 1 within it → its token."""
        tile = next(image_tile for image_tile in self.layout.tiles if image_tile.number == number)
        cells = (cell for cell in self.layout.cells if cell.tile == number and cell.row)
        return {
            (cell.row - tile.top + 1, cell.col - tile.left + 1): cell.position for cell in cells
        }

    def frame(self, number: int) -> tuple[int, ImageExpansion]:
        """Return the first token of a frame of a video, and its tokens as those of an image."""
        cells = [cell for cell in self.layout.cells if cell.tile == number]
        first, end = cells[0].position, cells[-1].position + 1
        moved = tuple(replace(cell, tile=1, position=cell.position - first) for cell in cells)
        layout = ImageTokens(0, end - first, moved)
        return first, ImageExpansion(self.ids[first:end], self.is_image[first:end], layout)

    def list_patches(self, side: int) -> tuple[Ints, Ints]:
        """Return the patches of the image's tokens in the order of the keys of a vector over keys.

        Args:
            side: Rows and columns of patches of a token; 1 if positions are patches.

        Returns:
            [patch] their numbers, as in `TokenHits` with the image's first token as 0. [patch, 3]
            tile, row and column, as in `ImageCell`; (-1, 0, 0) of tokens without patches.
        """
        if side not in self._patches:
            import numpy as np  # not at the top: `validate` only reads the registry

            tokens = np.flatnonzero(self.is_image)
            cells = [self.cell_of.get(token) for token in tokens.tolist()]
            places = np.array([(-1, 1, 1) if c is None else (c.tile, c.row, c.col) for c in cells])
            tile, row, col = places.repeat(side**2, axis=0).T
            down, right = np.divmod(np.tile(np.arange(side**2), len(tokens)), side)
            patches = np.stack([tile, (row - 1) * side + down, (col - 1) * side + right], axis=1)
            numbers = tokens.repeat(side**2) * side**2 + down * side + right
            self._patches[side] = numbers, patches
        return self._patches[side]

    @cached_property
    def _patches(self) -> dict[int, tuple[Ints, Ints]]:
        return {}

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the grid; (0, 0) if no token reads one part of the image."""
        last = max(self.grid, default=(0, 0))
        return last[0], max((col for _, col in self.grid), default=0)

    @cached_property
    def labels(self) -> Mapping[int, str]:
        """The names of the cells within their image, by their tokens."""
        return {cell.position: self._label(cell) for cell in self.layout.cells}

    def _label(self, cell: ImageCell) -> str:
        if not cell.row:
            return f"token {cell.position + 1}"
        if self.is_sound:
            return f"frame {cell.tile}"
        place = f"row {cell.row} col {cell.col}"
        apart = self.grid.get((cell.row, cell.col)) != cell.position
        return f"thumbnail {place}" if apart else place


class PromptPicture(Record):
    """An image in a prompt, with the tokens that stand for it."""

    picture: Picture
    expansion: ImageExpansion
    regions: Mapping[str, tuple[tuple[int, ...], ...]]
    """By name of a region, the tokens of each occurrence, counted from the image's first."""
    shapes: Mapping[str, tuple[Region, ...]] = field(default_factory=dict[str, tuple[Region, ...]])
    """By name of a region, its occurrences in pixels."""
    equal: Mapping[str, PromptPicture] = field(default_factory=dict[str, "PromptPicture"])
    """If images of several names are equal in the prompt but have different regions: by name, the
    image with its own regions. Otherwise empty."""


def _tile(number: int, cells: Sequence[ImageCell]) -> ImageTile:
    rows, cols = {cell.row for cell in cells}, {cell.col for cell in cells}
    top, left = min(rows), min(cols)
    return ImageTile(number, top, left, len(rows - {0}), len(cols - {0}))


def _intersection(first: PixelBox, second: PixelBox) -> PixelBox | None:
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    return (left, top, right, bottom) if left < right and top < bottom else None


# --- from an image to what the vision encoder reads -----------------------------------------------


class View(Record):
    """A prepared image or a tile of it: the part of the original image that it shows."""

    size: tuple[float, float]
    """(height, width) in pixels of the view."""
    scale: tuple[float, float]
    """(y, x): pixels of the view for each pixel of the original image."""
    shift: tuple[float, float]
    """(y, x) of the original image's corner in the view."""
    seen: PixelBox
    """The part of the original image that no crop removed."""

    @staticmethod
    def of(size: Size) -> View:
        """Return the view of a whole image of this (height, width)."""
        return View(size, (1.0, 1.0), (0.0, 0.0), (0.0, 0.0, float(size[1]), float(size[0])))

    def resized(self, height: float, width: float) -> View:
        """Return the view after resizing, without regard to proportions."""
        y, x = height / self.size[0], width / self.size[1]
        scale = self.scale[0] * y, self.scale[1] * x
        return View((height, width), scale, (self.shift[0] * y, self.shift[1] * x), self.seen)

    def cropped(self, top: float, left: float, height: float, width: float) -> View:
        """Return a part of the view; parts outside it are padding."""
        area = self._original((left, top, left + width, top + height))
        nothing = (0.0, 0.0, 0.0, 0.0)
        seen = _intersection(self.seen, area) or nothing
        shift = self.shift[0] - top, self.shift[1] - left
        return View((height, width), self.scale, shift, seen)

    def box(self, left: float, top: float, right: float, bottom: float) -> PixelBox | None:
        """Return the pixels of the original image in a box of the view; None for padding."""
        return _intersection(self.seen, self._original((left, top, right, bottom)))

    def _original(self, box: PixelBox) -> PixelBox:
        (y, x), (down, right) = self.scale, self.shift
        return (
            (box[0] - right) / x,
            (box[1] - down) / y,
            (box[2] - right) / x,
            (box[3] - down) / y,
        )


# --- one prompt -----------------------------------------------------------------------------------

Feature = tuple[int, int, int, PixelBox | None] | Literal["class", "row end", "padding"]
"""A vector that replaces an image token: (tile, row, col, box) of a cell, the class token of the
encoder, the end of a row of cells, or padding of a tile, which nothing attends to."""


class ImagePrompt(Record):
    """A prompt with images, as a processor prepared it."""

    processor: Any
    """The processor of transformers."""
    config: Any
    """The model's config of transformers."""
    inputs: Mapping[str, Any]
    """The processor's output for one prompt."""
    sizes: tuple[Size, ...]
    """(height, width) of each image before preparation, in the order of the text."""
    grouped: bool = False
    """In a prompt without inputs, for one image: whether it is one of several in its prompt."""

    @property
    def images(self) -> Any:
        """The image processor."""
        return find_layout(self.config.model_type).reader(self.processor)

    @property
    def patch(self) -> Size:
        """(height, width) of a patch of the vision encoder in pixels."""
        return _pair(self.config.vision_config.patch_size)

    def frames(self, number: int) -> int:
        """Return the number of prepared frames of a video, given by its index from 0."""
        return len(self.inputs["pixel_values_videos"][number])

    @property
    def frames_of_each(self) -> int:
        """The number of prepared frames of each video, if the processor writes those of all videos
        as images, one after the other."""
        pixels = self.inputs["pixel_values"]
        return math.prod(pixels.shape[:-3]) // len(self.sizes)

    def setting(self, name: str) -> Any:
        """Return a setting of the image preparation: the processor's has priority."""
        own: Mapping[str, Any] = getattr(self.processor, "images_kwargs", None) or {}
        if not own:  # transformers until 5.17 has the defaults in a class of arguments
            arguments = getattr(self.processor, "valid_processor_kwargs", None)
            own = getattr(arguments, "_defaults", {}).get("images_kwargs", {})
        return own[name] if name in own else getattr(self.images, name, None)

    def library(self, name: str) -> Any:
        """Return a definition in the module of the image processor, which sizes images by it.

        Raises:
            UnsupportedProcessor: The module has none of this name.
        """
        return _library(self.images, name)


def _library(processor: Any, name: str) -> Any:
    """Return a definition in the module of a processor. Raises UnsupportedProcessor."""
    library = getattr(sys.modules[type(processor).__module__], name, None)
    if library is None:
        raise _unknown(f"the module of `{type(processor).__name__}` has no `{name}`")
    return library


def _pair(value: Any) -> Size:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def _number_of(config: Any, key: str, default: int = 0) -> int:
    """Return a positive integer of a config; 0 for any other value."""
    value = config.get(key, default) if isinstance(config, Mapping) else default
    return value if isinstance(value, int) and value > 0 else 0


def _edges(size: Any) -> dict[str, int]:
    """Return the sides that a size of transformers gives, by its names."""
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


_HINT = (
    "use a processor with a known layout, or register the layout of this one "
    "(docs/plugins.md, section Layouts of image tokens)"
)


def _unknown(reason: str) -> UnsupportedProcessor:
    unfit = UnsupportedProcessor(reason)
    unfit.hint = _HINT
    return unfit


class ImageText(Record):
    """The texts that stand for an image in a prompt."""

    given: str
    """In the prompt that the processor gets."""
    written: str
    """In the prompt that the processor writes, with one image token for all."""
    token: str
    """The image token in `written`, which the tokens of an image replace."""

    def token_range(self, first: int = 0) -> tuple[int, int]:
        """Return the characters of `token` in a text in which `written` begins at `first`."""
        start = first + self.written.index(self.token)
        return start, start + len(self.token)


FRAMES_PER_SECOND = 2
"""The rate of the frames that a video processor gets, at which Qwen's samples videos."""

_NATURAL_SIZE = (224, 224)


class ImageLayout:
    """The layout of the image tokens of one or more model types."""

    documentation: ClassVar[str]
    """Description for the reference."""
    processors: ClassVar[tuple[str, ...]] = ()
    """Names of the classes of processors that it knows."""
    image_processors: ClassVar[tuple[str, ...]] = ()
    """Names of the classes of image processors that it knows, without `Fast` and `Pil`."""
    video_processors: ClassVar[tuple[str, ...]] = ()
    """Names of the classes of video processors that it knows; empty without videos."""
    separator: ClassVar[str] = ""
    """The attribute of the processor with the token between tiles; empty without one."""
    start: ClassVar[str] = ""
    """Attributes of the config or tokenizer with the ids of the tokens around images."""
    end: ClassVar[str] = ""
    numbering: ClassVar[Literal["one by one", "by row and column"]] = "one by one"
    """Position ids of image tokens: counted like words, or the row and column of each token."""

    mixes: ClassVar[bool] = False
    """Whether tokens of an image attend to later tokens of the image."""
    prefix_end: ClassVar[str] = ""
    """The last token of prompts whose tokens all attend to each other; empty for other prompts."""
    bos_after_images: ClassVar[bool] = False
    """Whether the beginning-of-sequence token follows the last image; otherwise it is the first."""
    encodes: ClassVar[bool] = False
    """Whether an encoder reads one image, without text, and a decoder writes the answer."""
    noun: ClassVar[Literal["image", "sound"]] = "image"
    """What the model reads. Sounds have a size too: sampling rate and number of samples."""
    attended: ClassVar[bool] = False
    """Whether blocks of the language model attend to one image. Its tokens precede the text."""
    several_layers: ClassVar[bool] = False
    """Whether the model also adds vectors of images after its first blocks."""
    without_vision: ClassVar[str] = "the patches of its image tokens aren't known"
    """Why rules can't act in the vision encoder; empty if `patches` is known."""
    resamples: ClassVar[bool] = False
    """Whether tokens of images are resampled from patches, so that positions in the encoder are
    patches. `patches` then divides all patches of an image among its tokens, with -1 for none."""
    interpolates: ClassVar[bool] = False
    """With `resamples`, whether each token is interpolated from the patches of `read_patches`.
    Otherwise a resampler with attention reads all patches of a tile for each of its tokens, and
    `patches` divides those of a tile among its tokens."""
    video_encoder: ClassVar[tuple[str, str] | None] = None
    """Names of the modules that encode images and videos, if each has an encoder."""
    video_token: ClassVar[str] = "video_token_id"
    """The config's attribute with the token that each vector of a video replaces."""
    groups_images: ClassVar[bool] = False
    """Whether the processor prepares several images of a prompt in another way than one alone: the
    same for any other number and any other images of the prompt."""
    joins_images_and_videos: ClassVar[bool] = True
    """Whether the processor prepares images and videos of one prompt together."""

    def image_text(self, processor: Any, config: Any) -> ImageText:
        """Return the texts that stand for an image. Raises UnsupportedProcessor."""
        text: Any = getattr(processor, "image_token", None)
        if not isinstance(text, str):
            raise UnsupportedProcessor("it names no image token")
        return ImageText(text, text, text)

    def frame_rate(self, videos: Any) -> float:
        """Return the number of frames per second that the processor gets.

        videos: the video processor.
        """
        return FRAMES_PER_SECOND

    def video_chat(self, processor: Any) -> str:
        """Return the chat template that the processor uses for videos, which have the type `video`
        there; empty if it is that of images."""
        return ""

    def video_text(self, processor: Any, config: Any, frames: int) -> ImageText:
        """Return the texts that stand for a video: those of an image with the video token.

        frames: the number of its frames.
        """
        image_text = self.image_text(processor, config)
        token = str(processor.video_token)
        given, written = (
            text.replace(image_text.token, token) for text in (image_text.given, image_text.written)
        )
        return ImageText(given, written, token)

    def reader(self, processor: Any) -> Any:
        """Return the part of a processor that reads images."""
        return processor.image_processor

    def natural_size(self, images: Any) -> Size:
        """Return the (height, width) of images without a size, such as a gray image.

        images: the image processor.
        """
        for settings in (getattr(images, "crop_size", None), getattr(images, "size", None)):
            edges = _edges(settings)
            if "height" in edges and "width" in edges:
                return edges["height"], edges["width"]
            if "shortest_edge" in edges:
                return edges["shortest_edge"], edges["shortest_edge"]
        return _NATURAL_SIZE

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        """Yield the vectors of one image, in the order of the prompt.

        Args:
            prompt: The prompt.
            number: The index of the image, from 0.

        Raises:
            UnsupportedProcessor: The settings of the processor have no known layout.
        """
        raise NotImplementedError

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        """Yield the vectors of one video like `features`, for classes with `video_processors`."""
        raise NotImplementedError

    def merged_side(self, config: Mapping[str, Any]) -> int:
        """Return how many rows of patches a token of an image is made from; 0 if the config doesn't
        tell it. With `resamples`, its square is the largest number of patches of a token.

        config: the model's `config.json`.
        """
        return 1

    def encoded_patches(self, prompt: ImagePrompt, tokens: ImageTokens) -> int | None:
        """Return the number of patches that the encoder reads of an image, with padding; None:
        `merged_side` squared for each token.

        Args:
            prompt: A prompt without inputs, for one image or video.
            tokens: The tokens of the image.
        """
        return None

    def encoder_features(self, prompt: ImagePrompt, tokens: ImageTokens) -> Iterator[Feature]:
        """Yield the cells of the encoder's patches of an image, with `resamples`.

        They are in the order of `patches`, without padding. Arguments are those of
        `encoded_patches`.

        Raises:
            UnsupportedProcessor: Their rows and columns aren't known.
        """
        raise _unknown("the rows and columns of its patches aren't known")

    def read_patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return the patches that each cell's vector is interpolated from, with `interpolates`.

        Arguments and result are those of `patches`; tokens can share patches.
        """
        raise NotImplementedError

    def patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return the patches that the vector of each cell is made from, row by row.

        Args:
            prompt: A prompt without inputs, for one image or video.
            tokens: The tokens of the image.
            encoder: The tokens of the vision encoder.

        Returns:
            By cell of `tokens`, indices of tokens in the vision encoder, over all tiles.

        Raises:
            UnsupportedProcessor: The vectors of some tokens aren't made from whole patches.
        """
        parts = {tile.number: (index, tile) for index, tile in enumerate(tokens.tiles)}
        patches: list[tuple[int, ...]] = []
        for cell in tokens.cells:
            index, tile = parts[cell.tile]
            place = cell.row - tile.top, cell.col - tile.left
            patches.append(encoder.group(index, place, (tile.rows, tile.cols)))
        return patches


class EncoderSize(Record):
    """The tokens of one image in a vision encoder."""

    tokens: int
    """Of each tile, class tokens included."""
    side: int
    """Rows of patches that a token of the language model is made from."""

    def group(self, tile: int, place: tuple[int, int], grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the tokens of a cell, row by row; class tokens come first in each tile.

        Args:
            tile: Index of the tile, in the order of the encoder.
            place: Row and column of the cell in the tile, from 0.
            grid: Rows and columns of cells of a tile.
        """
        (row, col), (rows, cols), side = place, grid, self.side
        width = cols * side
        first = (tile + 1) * self.tokens - rows * side * width + row * side * width + col * side
        return tuple(first + down * width + along for down in range(side) for along in range(side))


IMAGE_LAYOUTS: Registry[ImageLayout] = Registry("layout of image tokens")
"""By model type: `model_type` in the model's `config.json`."""

LayoutT = TypeVar("LayoutT", bound=ImageLayout)


def layout(*model_types: str) -> Callable[[type[LayoutT]], type[LayoutT]]:
    """Register a subclass of `ImageLayout` for model types.

    Raises:
        TypeError: The class names no processor.
        ValueError: A model type has a layout.
    """

    def register(entry: type[LayoutT]) -> type[LayoutT]:
        if not (entry.processors and entry.image_processors):
            raise TypeError(f"`{entry.__name__}` needs `processors` and `image_processors`")
        for name in model_types:
            IMAGE_LAYOUTS.add(name, entry())
        return entry

    return register


def image_layout(
    processor: Any, config: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> tuple[ImageTokens, ...]:
    """Return the tokens of each image of one prompt, in the order of the text.

    Args:
        processor: A processor of transformers, such as `LlavaProcessor`.
        config: The model's config.
        inputs: The processor's output for one prompt: `input_ids` is [tokens] or [1, tokens].
        sizes: (height, width) of each image in pixels, before preparation.

    Raises:
        UnsupportedProcessor: The layout isn't known, or differs from the prompt's image tokens.
    """
    entry = _entry(config)
    _check_class(entry.processors, processor, config)
    _check_class(entry.image_processors, entry.reader(processor), config)
    prompt = ImagePrompt(processor, config, inputs, tuple(sizes))
    features = [list(entry.features(prompt, number)) for number in range(len(sizes))]
    if entry.encodes or entry.attended:
        token = 0
        prompt = replace(prompt, inputs={"input_ids": [token] * sum(map(len, features))})
    else:
        token = config.image_token_id
    return _located(entry, prompt, features, token, "image")


def video_layout(
    processor: Any, config: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> tuple[ImageTokens, ...]:
    """Return the tokens of each video of one prompt, in the order of the text.

    `ImageCell.tile` is the number of the frame, from 1. Qwen models merge frames two by two: it is
    then the number of the pair.

    Args:
        processor: A processor of transformers, such as `VideoLlavaProcessor`.
        config: The model's config.
        inputs: The processor's output for one prompt: `input_ids` is [tokens] or [1, tokens].
        sizes: (height, width) of the frames of each video in pixels, before preparation.

    Raises:
        UnsupportedProcessor: The layout isn't known, or differs from the prompt's video tokens.
    """
    entry = _entry(config)
    _check_class(entry.processors, processor, config)
    if not entry.video_processors:
        known = ", ".join(name for name, each in IMAGE_LAYOUTS.items() if each.video_processors)
        raise _unknown(
            f"the positions of video tokens aren't known for models of the type "
            f"`{config.model_type}`: types that are known are {known}"
        )
    _check_class(entry.video_processors, processor.video_processor, config)
    prompt = ImagePrompt(processor, config, inputs, tuple(sizes))
    features = [list(entry.video_features(prompt, number)) for number in range(len(sizes))]
    return _located(entry, prompt, features, getattr(config, entry.video_token), "video")


def find_layout(model_type: str) -> ImageLayout:
    """Return the layout of a model; one that knows no processor if its type has none."""
    return IMAGE_LAYOUTS.get(model_type) or ImageLayout()


def _located(
    entry: ImageLayout,
    prompt: ImagePrompt,
    features: Sequence[list[Feature]],
    token: int,
    noun: Literal["image", "video"],
) -> tuple[ImageTokens, ...]:
    """Return the tokens of images or videos from their vectors.

    token: the id of the token that each vector replaces.
    """
    ids = _token_ids(prompt.inputs)
    positions = [at for at, number in enumerate(ids) if number == token]
    wanted = sum(map(len, features))
    if wanted != len(positions):
        reason = f"the prompt has {len(positions):,} {noun} tokens, and its layout {wanted:,}"
        name = type(prompt.processor).__name__
        raise _unknown(f"`{name}` prepares {noun}s in another layout: {reason}")
    reader = _MarkerReader(entry, prompt, ids)
    rest = iter(positions)
    return tuple(reader.tokens_of(own, list(islice(rest, len(own)))) for own in features)


def _entry(config: Any) -> ImageLayout:
    """Return the layout of a model. Raises UnsupportedProcessor."""
    entry = IMAGE_LAYOUTS.get(config.model_type)
    if entry is None:
        known = ", ".join(sorted(IMAGE_LAYOUTS))
        raise _unknown(
            f"the positions of image tokens aren't known for models of the type "
            f"`{config.model_type}`: types that are known are {known}"
        )
    return entry


def _check_class(known: Sequence[str], processor: Any, config: Any) -> None:
    """Raise UnsupportedProcessor for a processor of another class."""
    name = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if name not in known:
        raise _unknown(
            f"the positions of image tokens aren't known for `{name}` in models of the type "
            f"`{config.model_type}`, only for {', '.join(known)}"
        )


def _token_ids(inputs: Mapping[str, Any]) -> list[int]:
    ids: Any = inputs["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if ids and isinstance(ids[0], list):
        [ids] = cast("list[list[int]]", ids)
    return cast("list[int]", ids)


class _MarkerReader:
    """Finds the tokens around and between the image tokens of a prompt."""

    def __init__(self, entry: ImageLayout, prompt: ImagePrompt, ids: Sequence[int]) -> None:
        self._ids = ids
        tokenizer = prompt.processor.tokenizer
        text = getattr(prompt.processor, entry.separator) if entry.separator else None
        self._separator: int | None = (
            None if text is None else tokenizer.convert_tokens_to_ids(text)
        )
        self._around: dict[int, str] = {}
        for attribute, name in ((entry.start, "start"), (entry.end, "end")):
            if attribute:
                own = getattr(prompt.config, attribute, None)
                self._around[getattr(tokenizer, attribute) if own is None else own] = name

    def tokens_of(self, features: Sequence[Feature], positions: Sequence[int]) -> ImageTokens:
        """Return the tokens of an image from its vectors and their positions."""
        first, last = self._bounds(positions[0], positions[-1])
        cells = tuple(
            ImageCell(position, *feature)
            for feature, position in zip(features, positions, strict=True)
            if isinstance(feature, tuple)
        )
        return ImageTokens(first, last + 1, cells)

    def _bounds(self, first: int, last: int) -> tuple[int, int]:
        """Extend the bounds of image tokens to the separators or tokens around them."""
        ids = self._ids
        if self._separator is not None:
            before = list(reversed(ids[:first]))
            if self._separator not in before:
                raise _unknown("the prompt has no separator before an image")
            return first - before.index(self._separator) - 1, last + 1
        if first and self._around.get(ids[first - 1]) == "start":
            first -= 1
        if last + 1 < len(ids) and self._around.get(ids[last + 1]) == "end":
            last += 1
        return first, last


# --- grids of cells -------------------------------------------------------------------------------


def grid(
    view: View, cell: tuple[float, float], *, tile: int = 1, above: int = 0, before: int = 0
) -> Iterator[Feature]:
    """Yield the cells of a view, row by row.

    Args:
        view: The prepared image or tile. Pixels after the last whole cell are ignored.
        cell: (height, width) of a cell in pixels of the view.
        tile: The number of the tile.
        above: The rows of the tiles above.
        before: The columns of the tiles to the left.
    """
    height, width = cell
    for row in range(int(view.size[0] // height)):
        for col in range(int(view.size[1] // width)):
            left, top = col * width, row * height
            box = view.box(left, top, left + width, top + height)
            yield tile, above + row + 1, before + col + 1, box


def tiles(view: View, tile: tuple[float, float], cell: tuple[float, float]) -> Iterator[Feature]:
    """Yield the cells of an image that is cut into tiles, tile by tile.

    Args:
        view: The prepared image; both sides are multiples of the tile's.
        tile: (height, width) of a tile in pixels of the view.
        cell: (height, width) of a cell.
    """
    (height, width), across = tile, round(view.size[1] / tile[1])
    for number in range(across * round(view.size[0] / height)):
        row, col = divmod(number, across)
        part = view.cropped(row * height, col * width, height, width)
        above, before = row * int(height // cell[0]), col * int(width // cell[1])
        yield from grid(part, cell, tile=number + 1, above=above, before=before)


def prepared_view(images: Any, size: Size) -> View:
    """Return the view of an image after an image processor without tiles, such as CLIP's.

    Raises:
        UnsupportedProcessor: It pads images in an unknown manner.
    """
    view = View.of(size)
    if getattr(images, "do_pad", None):
        if not type(images).__name__.startswith("LlavaImageProcessor"):
            raise _unknown(f"`{type(images).__name__}` pads images")
        side = max(size)
        top, left = (side - size[0]) // 2, (side - size[1]) // 2
        view = view.cropped(-top, -left, side, side)
    if images.do_resize:
        edges = _edges(images.size)
        if edges.keys() == {"shortest_edge"}:
            short = edges["shortest_edge"]
            how = Processing(("shortest", short, short))
            view = view.resized(*how.resized(int(view.size[0]), int(view.size[1])))
        elif edges.keys() == {"height", "width"}:
            view = view.resized(edges["height"], edges["width"])
        else:
            raise _unknown(f"`{type(images).__name__}` resizes to {edges}")
    if getattr(images, "do_center_crop", None):
        edges = _edges(images.crop_size)
        crop = edges["height"], edges["width"]
        top, left = crop_corner((int(view.size[0]), int(view.size[1])), crop)
        view = view.cropped(top, left, *crop)
    return view


def _check_square(view: View, cell: tuple[float, float], count: int) -> None:
    """Raise UnsupportedProcessor unless the cells of a view are a square of this number."""
    rows, cols = int(view.size[0] // cell[0]), int(view.size[1] // cell[1])
    if not rows == cols == math.isqrt(count) or rows * cols != count:
        raise _unknown(f"it counts {count} tokens for a tile of {rows} x {cols} cells")


# --- layouts by model type ------------------------------------------------------------------------

_PLAIN_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor")


@layout("llava", "vipllava")
class PatchRows(ImageLayout):
    """LLaVA (Liu et al. 2023, arXiv:2304.08485) and ViP-LLaVA."""

    documentation = "one token for each patch, row by row"
    without_vision = ""
    processors = ("LlavaProcessor",)
    image_processors = (*_PLAIN_PROCESSORS, "LlavaImageProcessor")

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        extra = _class_tokens(prompt)
        if extra not in (0, 1):
            raise _unknown(f"the processor counts {extra} additional tokens for each image")
        yield from ("class",) * extra
        view = prepared_view(prompt.images, prompt.sizes[number])
        yield from grid(view, _pair(prompt.processor.patch_size))


@layout("video_llava")
class VideoLlava(PatchRows):
    """Video-LLaVA (Lin et al. 2023, arXiv:2311.10122); frames keep their class tokens."""

    documentation = "one token for each patch, row by row; frames begin with a class token"
    video_encoder = "image_tower", "video_tower"
    processors = ("VideoLlavaProcessor",)
    image_processors = ("VideoLlavaImageProcessor",)
    video_processors = ("VideoLlavaVideoProcessor",)

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        view = prepared_view(prompt.processor.video_processor, prompt.sizes[number])
        for frame in range(prompt.frames(number)):
            yield from ("class",) * prompt.processor.num_additional_image_tokens
            yield from grid(view, _pair(prompt.processor.patch_size), tile=frame + 1)


def _class_tokens(prompt: ImagePrompt) -> int:
    """Return the number of tokens before the patches: class tokens that the model doesn't drop."""
    drops = prompt.processor.vision_feature_select_strategy == "default"
    return prompt.processor.num_additional_image_tokens - int(drops)


def _divide(patches: Sequence[int], count: int, most: int) -> Iterator[tuple[int, ...]]:
    """Yield the patches of each of some tokens, in order, with -1 up to a length.

    Args:
        patches: The patches.
        count: Number of tokens.
        most: Length of each tuple.

    Raises:
        UnsupportedProcessor: A token would have more patches.
    """
    for start, end in pairwise(token * len(patches) // count for token in range(count + 1)):
        if end - start > most:
            raise UnsupportedProcessor("images have more patches than the encoder reads")
        yield (*patches[start:end], *(-1,) * (most - end + start))


class _AnyResolution(ImageLayout):
    """The whole image, then the grid of its tiles without rows or columns of padding."""

    without_vision = ""

    def tile_cells(self, prompt: ImagePrompt) -> int:
        """Return the rows of a tile's cells."""
        raise NotImplementedError

    def merged(self, prompt: ImagePrompt, kept: Size, side: int) -> Size:
        """Return the rows and columns to which the model reduces the grid of a tiled image.

        Args:
            prompt: The prompt.
            kept: The rows and columns without padding.
            side: The rows of a tile's cells.
        """
        return kept

    def anyres(
        self, prompt: ImagePrompt, size: Size, *, is_merged: bool = True
    ) -> Iterator[Feature]:
        """Yield the vectors of an image that is cut into tiles.

        Args:
            prompt: The prompt.
            size: (height, width) of the image.
            is_merged: Whether the grid has the rows and columns of `merged`; otherwise one cell for
                each patch.
        """
        tile, side = self._tile(prompt), self.tile_cells(prompt)
        cell = tile / side
        yield from grid(View.of(size).resized(tile, tile), (cell, cell), tile=THUMBNAIL)
        best, (top, left), kept = self._canvas(prompt, size)
        rows, cols = self.merged(prompt, kept, side) if is_merged else kept
        canvas = _fitted(View.of(size), best)
        for row in range(rows):
            up, down = ((top + each * kept[0] / rows) * cell for each in (row, row + 1))
            for col in range(cols):
                start, end = ((left + each * kept[1] / cols) * cell for each in (col, col + 1))
                across, along = int((up + down) / 2 // tile), int((start + end) / 2 // tile)
                number = 1 + across * (best[1] // tile) + along
                yield number, row + 1, col + 1, canvas.box(start, up, end, down)
            yield "row end"

    def _canvas(self, prompt: ImagePrompt, size: Size) -> tuple[Size, Size, Size]:
        """Return the size of all tiles in pixels, the rows and columns of padding that the model
        removes on each side, and the rows and columns that it keeps."""
        best: Size = prompt.library("select_best_resolution")(
            list(size), prompt.setting("image_grid_pinpoints")
        )
        tile, side = self._tile(prompt), self.tile_cells(prompt)
        height, width = (length // tile * side for length in best)
        top, left = _cut(size, (height, width))
        return best, (top, left), (height - 2 * top, width - 2 * left)

    def patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return the patches of each cell: the thumbnail is the encoder's first tile."""
        side = self.tile_cells(prompt)
        _, (top, left), _ = self._canvas(prompt, prompt.sizes[0])
        patches: list[tuple[int, ...]] = []
        for cell in tokens.cells:
            above, before = (0, 0) if cell.tile == THUMBNAIL else (top, left)
            place = (cell.row - 1 + above) % side, (cell.col - 1 + before) % side
            patches.append(encoder.group(cell.tile, place, (side, side)))
        return patches

    def _tile(self, prompt: ImagePrompt) -> int:
        """Return the side of a tile in pixels. Raises UnsupportedProcessor."""
        images = prompt.images
        size, crop = _edges(images.size), _edges(getattr(images, "crop_size", None))
        sides = {*size.values(), *(crop.values() if images.do_center_crop else ())}
        if crop.get("height"):
            sides.add(crop["height"])
        sides.add(_pair(prompt.config.vision_config.image_size)[0])
        if len(sides) != 1:
            raise _unknown(f"its tiles have different sides: {', '.join(map(str, sorted(sides)))}")
        return sides.pop()


def _fitted(view: View, size: Size) -> View:
    """Return the view in a larger size, in proportion and in the middle of padding."""
    height, width = view.size
    down, across = size[0] / height, size[1] / width
    if across < down:
        view = view.resized(min(math.ceil(height * across), size[0]), size[1])
    else:
        view = view.resized(size[0], min(math.ceil(width * down), size[1]))
    top, left = (size[0] - view.size[0]) // 2, (size[1] - view.size[1]) // 2
    return view.cropped(-top, -left, *size)


def _cut(size: Size, rows_cols: Size) -> Size:
    """Return (rows, columns) of padding that the model removes on each side of the grid."""
    height, width = size
    rows, cols = rows_cols
    if width / height > cols / rows:
        return (rows - int(round(height * (cols / width), 7))) // 2, 0
    return 0, (cols - int(round(width * (rows / height), 7))) // 2


@layout("llava_next")
class LlavaNext(_AnyResolution):
    """LLaVA-NeXT (Liu et al. 2024), `spatial_unpad`."""

    documentation = "the thumbnail, then the rows of all tiles without padding, each with a row end"
    processors = ("LlavaNextProcessor",)
    image_processors = ("LlavaNextImageProcessor",)

    def tile_cells(self, prompt: ImagePrompt) -> int:
        return self._tile(prompt) // prompt.processor.patch_size

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        if _class_tokens(prompt):
            raise _unknown("the model keeps the class token of each tile")
        yield from self.anyres(prompt, prompt.sizes[number])


@layout("llava_onevision")
class LlavaOneVision(_AnyResolution):
    """LLaVA-OneVision (Li et al. 2024, arXiv:2408.03326), with higher anyres."""

    documentation = "as `llava_next`, fewer above a limit; no tiles in prompts of several images"
    processors = ("LlavaOnevisionProcessor",)
    image_processors = ("LlavaOnevisionImageProcessor",)
    video_processors = ("LlavaOnevisionVideoProcessor",)
    resamples = True
    interpolates = True
    groups_images = True

    def tile_cells(self, prompt: ImagePrompt) -> int:
        return math.isqrt(prompt.processor.num_image_tokens)

    def merged(self, prompt: ImagePrompt, kept: Size, side: int) -> Size:
        most = int(prompt.processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(kept[0] * kept[1] / (most * side**2))
        return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept

    def merged_side(self, config: Mapping[str, Any]) -> int:
        """Return 2: the patches of frames and of the largest images are at most four for each of
        their tokens, of tiles and thumbnail together; more with more tiles."""
        tile = _number_of(config.get("vision_config"), "image_size", 384)
        limit = str(config.get("vision_aspect_ratio") or "anyres_max_9").removeprefix("anyres_max_")
        sizes: Any = config.get("image_grid_pinpoints") or [(2304, 2304)]  # the largest default
        if not (tile and limit.isdigit() and isinstance(sizes, Sequence)):
            return 0
        tiles = [math.prod(_pair(size)) / tile**2 for size in cast("Sequence[Any]", sizes)]
        return max(2, math.ceil(math.sqrt((max(tiles) + 1) / (int(limit) + 1))))

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        if prompt.processor.vision_feature_select_strategy == "default":
            raise _unknown("the model drops the first patch of each tile")
        size = prompt.sizes[number]
        if prompt.inputs["batch_num_images"][0] == 1:
            yield from self.anyres(prompt, size)
            return
        side = max(size)
        top, left = (side - size[0]) // 2, (side - size[1]) // 2
        tile = self._tile(prompt)
        view = View.of(size).cropped(-top, -left, side, side).resized(tile, tile)
        cell = tile / self.tile_cells(prompt)
        yield from grid(view, (cell, cell))
        yield "row end"

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        if prompt.processor.vision_feature_select_strategy == "default":
            raise _unknown("the model drops the first patch of each frame")
        view = prepared_view(prompt.processor.video_processor, prompt.sizes[number])
        pooled = math.ceil(self.tile_cells(prompt) / 2)
        for frame in range(prompt.frames(number)):
            unit = view.resized(pooled, pooled)
            yield from grid(unit, (1, 1), tile=frame + 1)
        yield "row end"

    def patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return all patches of the image or of the frames, divided among the tokens in order."""
        numbers = [
            patch for grid in self._grids(prompt, tokens, encoder) for row in grid for patch in row
        ]
        return [*_divide(numbers, len(tokens.cells), encoder.side**2)]

    def read_patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        cells: dict[bool | int, list[ImageCell]] = {}
        for cell in tokens.cells:  # tiles are interpolated together, frames one by one
            is_tile = tokens.thumbnail is not None and cell.tile != THUMBNAIL
            cells.setdefault(is_tile or -cell.tile, []).append(cell)
        numbers: list[tuple[int, ...]] = []
        grids = self._grids(prompt, tokens, encoder)
        for patches, image_cells in zip(grids, cells.values(), strict=True):
            rows, cols = (
                max(each) for each in zip(*((c.row, c.col) for c in image_cells), strict=True)
            )
            for cell in image_cells:
                down = _interpolated(len(patches), rows, cell.row - 1)
                along = _interpolated(len(patches[0]), cols, cell.col - 1)
                numbers.append(tuple(patches[row][col] for row in down for col in along))
        return numbers

    def _grids(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[list[list[int]]]:
        """Return the rows of patches of the thumbnail and of all tiles, or of each frame."""
        side, size = self.tile_cells(prompt), EncoderSize(encoder.tokens, 1)

        def patch(tile: int, row: int, col: int) -> int:
            [number] = size.group(tile, (row, col), (side, side))
            return number

        squares = len(tokens.tiles) if tokens.thumbnail is None else 1
        grids = [
            [[patch(tile, row, col) for col in range(side)] for row in range(side)]
            for tile in range(squares)
        ]
        if tokens.thumbnail is None:
            return grids
        best, (top, left), (rows, cols) = self._canvas(prompt, prompt.sizes[0])
        across = best[1] // self._tile(prompt)
        tiles = [
            [
                patch(1 + row // side * across + col // side, row % side, col % side)
                for col in range(left, left + cols)
            ]
            for row in range(top, top + rows)
        ]
        return [*grids, tiles]

    def encoded_patches(self, prompt: ImagePrompt, tokens: ImageTokens) -> int:
        count = len(tokens.tiles)
        if tokens.thumbnail is not None:
            best, _, _ = self._canvas(prompt, prompt.sizes[0])
            count = 1 + math.prod(best) // self._tile(prompt) ** 2
        return count * self.tile_cells(prompt) ** 2

    def encoder_features(self, prompt: ImagePrompt, tokens: ImageTokens) -> Iterator[Feature]:
        size = prompt.sizes[0]
        if tokens.thumbnail is not None:
            cells = self.anyres(prompt, size, is_merged=False)
            yield from (cell for cell in cells if not isinstance(cell, str))
            return
        if prompt.grouped:  # one token for each patch
            yield from ((cell.tile, cell.row, cell.col, cell.box) for cell in tokens.cells)
            return
        side = self.tile_cells(prompt)
        view = prepared_view(prompt.processor.video_processor, size).resized(side, side)
        for tile in tokens.tiles:
            yield from grid(view, (1, 1), tile=tile.number)


_LEAST_SHARE = 1e-3
"""Smaller weights in an interpolation are rounding errors: others are multiples of half the inverse
of a number of rows or columns."""


def _interpolated(old: int, new: int, index: int) -> list[int]:
    """Return the entries of `old` that bilinear interpolation to `new` reads for an entry."""
    at = max((index + 0.5) * old / new - 0.5, 0.0)
    first = min(int(at), old - 1)
    shares = (1 - (at - first), at - first)
    return sorted(
        {min(first + n, old - 1) for n, share in enumerate(shares) if share > _LEAST_SHARE}
    )


@layout("qwen2_vl", "qwen2_5_vl")
class Qwen(ImageLayout):
    """Qwen2-VL (Wang et al. 2024, arXiv:2409.12191) and Qwen2.5-VL."""

    documentation = "one token for 2 x 2 patches, row by row; the size depends on the image"
    processors = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
    image_processors = ("Qwen2VLImageProcessor",)
    video_processors = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")
    start = "vision_start_token_id"
    end = "vision_end_token_id"
    without_vision = ""
    numbering = "by row and column"

    def image_text(self, processor: Any, config: Any) -> ImageText:
        """Return the image token between the tokens that the model was trained with."""
        image_text = super().image_text(processor, config)
        start, end = processor.tokenizer.convert_ids_to_tokens(
            [config.vision_start_token_id, config.vision_end_token_id]
        )
        text = f"{start}{image_text.token}{end}"
        return ImageText(text, text, image_text.token)

    def natural_size(self, images: Any) -> Size:
        """Return a common size: the processor's settings are numbers of pixels, not sides."""
        return _NATURAL_SIZE

    def merged_side(self, config: Mapping[str, Any]) -> int:
        return _number_of(config.get("vision_config"), "spatial_merge_size", 2)

    def patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return the patches of each cell, which are next to each other; Qwen2.5-VL also puts the
        cells of each window of its attention next to each other."""
        vision = prompt.config.vision_config
        window = getattr(vision, "window_size", 0) // encoder.side // vision.patch_size
        cells = tokens.cells
        order = list(range(len(cells)))
        if window:
            order.sort(
                key=lambda n: (
                    cells[n].tile,
                    (cells[n].row - 1) // window,
                    (cells[n].col - 1) // window,
                    n,
                )
            )
        count = encoder.side**2
        first = {n: place * count for place, n in enumerate(order)}
        return [tuple(range(first[n], first[n] + count)) for n in range(len(cells))]

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        yield from self._merged(prompt, prompt.images, "image_grid_thw", number)

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        videos = prompt.processor.video_processor
        yield from self._merged(prompt, videos, "video_grid_thw", number)

    def _merged(
        self, prompt: ImagePrompt, images: Any, grids: str, number: int
    ) -> Iterator[Feature]:
        """Yield the cells of an image, or of the pairs of frames of a video."""
        patch, cell = images.patch_size, images.patch_size * images.merge_size
        count, rows, cols = (int(each) for each in prompt.inputs[grids][number])
        view = View.of(prompt.sizes[number])
        if images.do_resize:
            view = view.resized(rows * patch, cols * patch)
        for frame in range(count):
            yield from grid(view, (cell, cell), tile=frame + 1)


@layout("qwen3_vl", "qwen3_vl_moe")
class Qwen3(Qwen):
    """Qwen3-VL, with vectors of several layers of the vision encoder (DeepStack, Meng et al. 2024,
    arXiv:2406.04334)."""

    documentation = "as `qwen2_vl`"
    several_layers = True

    def video_text(self, processor: Any, config: Any, frames: int) -> ImageText:
        """Return the video token, in whose place the processor writes each pair of frames with its
        time and tokens around it."""
        image_text, merged = (
            super().video_text(processor, config, frames),
            processor.video_processor,
        )
        seconds = (merged.temporal_patch_size - 1) / FRAMES_PER_SECOND / 2  # mean of the first pair
        return replace(
            image_text,
            given=image_text.token,
            written=f"<{seconds:.1f} seconds>{image_text.written}",
        )


@layout("idefics2")
class Idefics2(ImageLayout):
    """Idefics2 (Laurençon et al. 2024, arXiv:2405.02246)."""

    documentation = (
        "vectors of a resampler, which read a whole tile; only patches have rows and columns"
    )
    without_vision = ""
    resamples = True
    processors = ("Idefics2Processor",)
    image_processors = ("Idefics2ImageProcessor",)
    separator = "fake_image_token"

    def merged_side(self, config: Mapping[str, Any]) -> int:
        vision, resampler = config.get("vision_config"), config.get("perceiver_config")
        patch = _number_of(vision, "patch_size", 32)
        rows = _number_of(vision, "image_size", 224) // patch if patch else 0
        latents = _number_of(resampler, "resampler_n_latents", 64)
        if not (rows and latents):
            return 0
        most = math.ceil(rows**2 / latents)
        return max(2, math.isqrt(most - 1) + 1)

    def patches(
        self, prompt: ImagePrompt, tokens: ImageTokens, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return the patches of each tile, divided among its tokens in order. Tiles of different
        sizes are padded at the right and bottom."""
        down, across = prompt.patch
        views = [(high // down, wide // across) for high, wide in self._views(prompt)]
        width, count = max(cols for _, cols in views), len(tokens.cells) // len(views)
        if max(rows for rows, _ in views) * width != encoder.tokens:
            raise UnsupportedProcessor("its images have another number of patches")
        patches: list[tuple[int, ...]] = []
        for tile, (rows, cols) in enumerate(views):
            first = tile * encoder.tokens
            numbers = [first + row * width + col for row in range(rows) for col in range(cols)]
            patches += _divide(numbers, count, encoder.side**2)
        return patches

    def encoded_patches(self, prompt: ImagePrompt, tokens: ImageTokens) -> int:
        (down, across), views = prompt.patch, self._views(prompt)
        rows, cols = (
            max(high // down for high, _ in views),
            max(wide // across for _, wide in views),
        )
        return len(views) * rows * cols

    def encoder_features(self, prompt: ImagePrompt, tokens: ImageTokens) -> Iterator[Feature]:
        (down, across), views = prompt.patch, self._views(prompt)
        grids = [(high // down, wide // across) for high, wide in views]
        parts = self._parts(prompt, 0)
        for index, ((tile, (left, top, right, bottom)), prepared) in enumerate(
            zip(parts, views, strict=True)
        ):
            view = View.of(prompt.sizes[0]).cropped(top, left, bottom - top, right - left)
            row, col = divmod(index, 2) if len(parts) > 1 and tile != THUMBNAIL else (0, 0)
            above = row * max(rows for rows, _ in grids[:2])
            before = col * max(cols for _, cols in grids[:3:2])
            yield from grid(
                view.resized(*prepared), prompt.patch, tile=tile, above=above, before=before
            )

    def _views(self, prompt: ImagePrompt) -> list[Size]:
        """Return the (height, width) of the prepared tiles and the thumbnail."""
        boxes = (box for _, box in self._parts(prompt, 0))
        return [
            self._resized(prompt, (int(bottom - top), int(right - left)))
            for left, top, right, bottom in boxes
        ]

    def _parts(self, prompt: ImagePrompt, number: int) -> list[tuple[int, PixelBox]]:
        """Return the number and the pixels of each tile of an image and of the thumbnail."""
        height, width = map(float, prompt.sizes[number])
        whole = (0.0, 0.0, width, height)
        if not prompt.setting("do_image_splitting"):
            return [(1, whole)]
        down, across = height // 2, width // 2
        return [
            (1, (0.0, 0.0, across, down)),
            (2, (across, 0.0, width, down)),
            (3, (0.0, down, across, height)),
            (4, (across, down, width, height)),
            (THUMBNAIL, whole),
        ]

    def _resized(self, prompt: ImagePrompt, size: Size) -> Size:
        """Return the (height, width) of a view of this size after preparation."""
        edges, (height, width) = _edges(prompt.setting("size")), size
        if not prompt.setting("do_resize"):
            return size
        if edges.keys() == {"height", "width"}:
            return edges["height"], edges["width"]
        most, proportion = edges["longest_edge"], width / height
        if width >= height and width > most:
            height, width = int(most / proportion), most
        elif height > width and height > most:
            height, width = most, int(most * proportion)
        return max(height, edges["shortest_edge"]), max(width, edges["shortest_edge"])

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        for tile, box in self._parts(prompt, number):
            for _ in range(prompt.processor.image_seq_len):
                yield tile, 0, 0, box


@layout("idefics3")
class Idefics3(ImageLayout):
    """Idefics3 (Laurençon et al. 2024, arXiv:2408.12637)."""

    documentation = "tiles with tags, then the thumbnail; a token merges several patches"
    without_vision = ""
    processors = ("Idefics3Processor", "SmolVLMProcessor")
    image_processors = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
    separator = "fake_image_token"

    def merged_side(self, config: Mapping[str, Any]) -> int:
        return _number_of(config, "scale_factor", 2)

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        tile = _edges(prompt.setting("max_image_size"))["longest_edge"]
        scale: int = prompt.config.scale_factor
        cell = prompt.patch[0] * scale, prompt.patch[1] * scale
        view = View.of(prompt.sizes[number])
        whole = view.resized(tile, tile)
        _check_square(whole, cell, prompt.processor.image_seq_len)
        rows, cols = self._tiles(prompt, prompt.sizes[number], tile)
        if rows * cols == 1:
            yield from grid(whole, cell)
            return
        yield from tiles(view.resized(rows * tile, cols * tile), (tile, tile), cell)
        yield from grid(whole, cell, tile=THUMBNAIL)

    def _tiles(self, prompt: ImagePrompt, size: Size, tile: int) -> Size:
        """Return the rows and columns of tiles; (1, 1) without tiles."""
        if not prompt.setting("do_image_splitting"):
            return 1, 1
        height, width = size
        if prompt.setting("do_resize"):
            edges = _edges(prompt.setting("size"))
            if "longest_edge" in edges:
                most = prompt.library("MAX_IMAGE_SIZE")
                fit = prompt.library("_resize_output_size_rescale_to_max_len")
                limit = prompt.library("_resize_output_size_scale_below_upper_bound")
                height, width = fit(height, width, max_len=edges["longest_edge"])
                height, width = limit(height, width, max_len=most)
            else:
                height, width = edges["height"], edges["width"]
        proportion = width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = int(width / proportion)
        else:
            height = math.ceil(height / tile) * tile
            width = int(height * proportion)
        return math.ceil(height / tile), math.ceil(width / tile)


@layout("smolvlm")
class SmolVLM(Idefics3):
    """SmolVLM (Marafioti et al. 2025, arXiv:2504.05299): frames are images with their times."""

    video_processors = ("SmolVLMVideoProcessor",)
    video_token = "image_token_id"
    joins_images_and_videos = False

    def frame_rate(self, videos: Any) -> float:
        """Return the rate at which the processor samples videos. Raises UnsupportedProcessor."""
        rate: object = getattr(videos, "fps", None)
        if rate is None:
            return FRAMES_PER_SECOND
        if not isinstance(rate, int | float) or not 1e-3 <= rate <= 1e3:
            raise _unknown(f"its `fps` is {rate!r}, not a number of frames per second")
        return rate

    def video_chat(self, processor: Any) -> str:
        return str(_library(processor, "DEFAULT_CHAT_TEMPLATE"))

    def video_text(self, processor: Any, config: Any, frames: int) -> ImageText:
        """Return the video token, in whose place the processor writes the number of frames, the
        time of the last one, and each frame after its time."""
        seconds = int((frames - 1) / self.frame_rate(processor.video_processor))
        intro: str = _library(processor, "DEFAULT_VIDEO_INTRO").format(
            frame_count=_library(processor, "num2words")(frames),
            video_duration=str(timedelta(seconds=seconds)),
        )
        intro += _library(processor, "FRAME_TIMESTAMP_MESSAGE").format(timestamp="00:00")
        token, end = processor.image_token, _library(processor, "DEFAULT_MEDIA_OUTTRO")
        return ImageText(processor.video_token, f"{intro}{token}{end}", token)

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        videos, scale = prompt.processor.video_processor, prompt.config.scale_factor
        if not videos.do_resize:
            raise _unknown("it keeps the size of frames")
        side = _edges(videos.max_image_size)["longest_edge"]
        cell = prompt.patch[0] * scale, prompt.patch[1] * scale
        view = View.of(prompt.sizes[number]).resized(side, side)
        _check_square(view, cell, prompt.processor.image_seq_len)
        for frame in range(prompt.frames_of_each):
            yield from grid(view, cell, tile=frame + 1)


@layout("paligemma")
class PaliGemma(ImageLayout):
    """PaliGemma (Beyer et al. 2024, arXiv:2407.07726) and PaliGemma 2."""

    documentation = "one token for each patch of the resized image, row by row"
    without_vision = ""
    processors = ("PaliGemmaProcessor",)
    image_processors = _PLAIN_PROCESSORS
    mixes = True
    prefix_end = "\n"
    bos_after_images = True

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        yield from grid(prepared_view(prompt.images, prompt.sizes[number]), prompt.patch)


@layout("internvl")
class InternVL(ImageLayout):
    """InternVL (Chen et al. 2024, arXiv:2404.16821): dynamic resolution and pixel shuffle."""

    documentation = "tiles, then the thumbnail; a token merges 2 x 2 patches"
    without_vision = ""
    processors = ("InternVLProcessor",)
    image_processors = ("GotOcr2ImageProcessor",)
    video_processors = ("InternVLVideoProcessor",)
    video_token = "image_token_id"
    start = "start_image_token_id"
    end = "end_image_token_id"

    def merged_side(self, config: Mapping[str, Any]) -> int:
        ratio = config.get("downsample_ratio", 0.5)
        return round(1 / ratio) if isinstance(ratio, float | int) and 0 < ratio <= 1 else 0

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        edges = _edges(prompt.setting("size"))
        tile = edges["height"], edges["width"]
        merge = round(1 / prompt.config.downsample_ratio)
        cell = prompt.patch[0] * merge, prompt.patch[1] * merge
        size = prompt.sizes[number]
        whole = View.of(size).resized(*tile)
        _check_square(whole, cell, prompt.processor.image_seq_length)
        least, most = prompt.setting("min_patches"), prompt.setting("max_patches")
        cols, rows = 1, 1
        if prompt.setting("crop_to_patches") and most > 1:
            cols, rows = prompt.library("get_optimal_tiled_canvas")(size, tile, least, most)
        yield from tiles(View.of(size).resized(rows * tile[0], cols * tile[1]), tile, cell)
        if rows * cols > 1:
            yield from grid(whole, cell, tile=THUMBNAIL)

    def video_text(self, processor: Any, config: Any, frames: int) -> ImageText:
        """Return the video token, in whose place the processor writes each frame as an image of one
        tile, after its number."""
        token, tokenizer = processor.image_token, processor.tokenizer
        frame = f"Frame1: {tokenizer.start_image_token}{token}{tokenizer.end_image_token}"
        return ImageText(processor.video_token, frame, token)

    def video_features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        merge = round(1 / prompt.config.downsample_ratio)
        cell = prompt.patch[0] * merge, prompt.patch[1] * merge
        view = prepared_view(prompt.processor.video_processor, prompt.sizes[number])
        _check_square(view, cell, prompt.processor.image_seq_length)
        for frame in range(prompt.frames_of_each):
            yield from grid(view, cell, tile=frame + 1)


@layout("gemma3")
class Gemma3(ImageLayout):
    """Gemma 3 (Gemma Team 2025, arXiv:2503.19786): pooled patches, and pan and scan."""

    documentation = "one token for the mean of 4 x 4 patches; with pan and scan, also of crops"
    without_vision = ""
    processors = ("Gemma3Processor",)
    image_processors = ("Gemma3ImageProcessor",)
    start = "boi_token_id"
    end = "eoi_token_id"
    mixes = True

    def merged_side(self, config: Mapping[str, Any]) -> int:
        vision = config.get("vision_config")
        size, patch = (_number_of(vision, key) for key in ("image_size", "patch_size"))
        rows = math.isqrt(_number_of(config, "mm_tokens_per_image", 256))
        return size // patch // rows if patch and rows else 0

    def image_text(self, processor: Any, config: Any) -> ImageText:
        """Return the start token, around which the processor writes more tokens and line breaks."""
        token = processor.tokenizer.image_token
        written = processor.full_image_sequence.replace(token * processor.image_seq_length, token)
        return ImageText(processor.boi_token, written, token)

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        edges = _edges(prompt.setting("size"))
        side = math.isqrt(prompt.processor.image_seq_length)
        pooled = edges["height"] // prompt.patch[0] // side
        cell = prompt.patch[0] * pooled, prompt.patch[1] * pooled
        size = prompt.sizes[number]
        view = View.of(size)
        whole = view.resized(edges["height"], edges["width"])
        _check_square(whole, cell, prompt.processor.image_seq_length)
        crops = self._crops(prompt, size) if prompt.setting("do_pan_and_scan") else []
        first = THUMBNAIL if crops else 1
        yield from grid(whole, cell, tile=first)
        top = left = 0
        for count, (height, width) in enumerate(crops):
            part = view.cropped(top, left, height, width)
            part = part.resized(edges["height"], edges["width"])
            above, before = (0, count * side) if size[1] >= size[0] else (count * side, 0)
            yield from grid(part, cell, tile=count + 1, above=above, before=before)
            top, left = (top, left + width) if size[1] >= size[0] else (top + height, left)

    def _crops(self, prompt: ImagePrompt, size: Size) -> list[Size]:
        """Return the (height, width) of each crop, from the left or the top."""
        short, long = sorted(size)
        least: int = prompt.setting("pan_and_scan_min_crop_size")
        if long / short < prompt.setting("pan_and_scan_min_ratio_to_activate"):
            return []
        count = max(2, min(long // least, math.floor(long / short + 0.5)))
        count = min(count, prompt.setting("pan_and_scan_max_num_crops"))
        length = math.ceil(long / count)
        if min(length, short) < least:
            return []
        lengths = (min(length, long - n * length) for n in range(count))
        is_wide = size[1] >= size[0]
        return [(size[0], each) if is_wide else (each, size[1]) for each in lengths]


_FRONT_TOKENS = {"vit": 1, "beit": 1, "deit": 2}
"""By model type of an image encoder, the number of its tokens before the patches."""


@layout("vision-encoder-decoder")
class EncodedImage(ImageLayout):
    """TrOCR (Li et al. 2021, arXiv:2109.10282): a decoder writes the text of an image."""

    documentation = "one token of the encoder for each patch, after its class token"
    processors = ("TrOCRProcessor",)
    image_processors = ("ViTImageProcessor", "DeiTImageProcessor", "BeitImageProcessor")
    encodes = True

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        encoder = prompt.config.encoder
        front = _FRONT_TOKENS.get(encoder.model_type)
        if front is None:
            known = ", ".join(_FRONT_TOKENS)
            raise _unknown(
                f"the tokens of encoders of the type `{encoder.model_type}` aren't known, only of "
                f"{known}"
            )
        view = prepared_view(prompt.images, prompt.sizes[number])
        if view.size != (size := _pair(encoder.image_size)):
            given, read = (f"{width:g} x {height:g}" for height, width in (view.size, size))
            raise UnsupportedProcessor(f"it gives images of {given} to an encoder of {read} pixels")
        for _ in range(front):
            yield "class"
        yield from grid(view, _pair(encoder.patch_size))


MAX_TILES, MAX_TILE_TOKENS = 64, 10_000
"""Limits of the tiles that an image is cut into, and of the tokens of one tile."""


@layout("mllama")
class Mllama(ImageLayout):
    """Llama 3.2 Vision (Grattafiori et al. 2024, arXiv:2407.21783, section 7)."""

    documentation = "for each tile, a class token, then one token for each patch, row by row"
    without_vision = ""
    processors = ("MllamaProcessor",)
    image_processors = ("MllamaImageProcessor",)
    attended = True

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        edges = _edges(prompt.images.size)
        tile, most = (edges["height"], edges["width"]), prompt.images.max_image_tiles
        vision = prompt.config.vision_config
        size, cell = _pair(vision.image_size), _pair(vision.patch_size)
        if (tile, most) != (size, vision.max_num_tiles):
            given, read = (
                f"{count} tiles of {width} x {height}"
                for count, (height, width) in ((most, tile), (vision.max_num_tiles, size))
            )
            raise UnsupportedProcessor(f"it gives {given} pixels to an encoder of {read}")
        each = (tile[0] // cell[0]) * (tile[1] // cell[1])
        if not (0 < most <= MAX_TILES and 0 < each < MAX_TILE_TOKENS):
            limits = f"{MAX_TILES} tiles of {MAX_TILE_TOKENS:,} tokens"
            raise UnsupportedProcessor(f"its images have more than {limits}")
        height, width = prompt.sizes[number]
        canvas = prompt.library("get_optimal_tiled_canvas")(height, width, most, tile[0])
        fit = prompt.library("get_image_size_fit_to_canvas")(height, width, *canvas, tile[0])
        view = View.of((height, width)).resized(*map(int, fit)).cropped(0, 0, *map(int, canvas))
        cells = list(tiles(view, tile, cell))
        for first in range(0, len(cells), each):
            yield "class"
            yield from cells[first : first + each]
        for _ in range(most * (each + 1) - len(cells) - len(cells) // each):
            yield "padding"


@layout("whisper")
class EncodedSound(ImageLayout):
    """Whisper (Radford et al. 2022, arXiv:2212.04356): a decoder writes the text of a sound."""

    documentation = "one token of the encoder for two frames of the spectrogram"
    processors = ("WhisperProcessor",)
    image_processors = ("WhisperFeatureExtractor",)
    encodes = True
    noun = "sound"

    def reader(self, processor: Any) -> Any:
        return processor.feature_extractor

    def natural_size(self, images: Any) -> Size:
        return int(images.sampling_rate), int(images.n_samples)

    def features(self, prompt: ImagePrompt, number: int) -> Iterator[Feature]:
        images, (rate, samples) = prompt.images, prompt.sizes[number]
        if images.dither:
            raise UnsupportedProcessor("its `dither` adds random numbers to sounds")
        count = prompt.config.max_source_positions
        given = f"{images.nb_max_frames} frames of {images.feature_size} features"
        read = f"{2 * count} frames of {prompt.config.num_mel_bins} features"
        if given != read:
            raise UnsupportedProcessor(f"it gives {given} to an encoder of {read}")
        if rate != images.sampling_rate:
            unfit = UnsupportedProcessor(
                f"it reads {images.sampling_rate:,} samples per second, but a sound has {rate:,}"
            )
            unfit.hint = f"convert it: `ffmpeg -i in.wav -ar {images.sampling_rate} out.wav`"
            raise unfit
        if samples > images.n_samples:
            most, own_length = images.n_samples / rate, samples / rate
            unfit = UnsupportedProcessor(
                f"it reads at most {most:g} s, but a sound has {own_length:.4g} s"
            )
            unfit.hint = "cut the sound, or exclude its row with `where`"
            raise unfit
        for frame in range(1, count + 1):
            yield frame, 1, frame, None
