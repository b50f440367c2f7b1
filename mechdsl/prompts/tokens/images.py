"""The tokenizer of images: an image as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict, cast

from mechdsl.base.files import load_json
from mechdsl.base.hashing import stable_hash
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import NoImageProcessor
from mechdsl.images.layouts import ImageCell, ImageExpansion, ImageTokens
from mechdsl.images.picture import Picture, Region, covered_tokens
from mechdsl.images.processing import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    PatchLayout,
    Processing,
    UnsupportedProcessor,
    parse_processing,
)
from mechdsl.program.images import EXTRA_TOKEN_SPANS, IMAGE_SPAN, INSERTED_SPAN
from mechdsl.prompts.tokens.tokenizer import EncodedText, TextTokenizer

_SIDE = 14

_CACHED_REGIONS = 2**12
"""Maximum number of regions of images whose tokens are cached for the next table."""


class ImageTokenizer(TextTokenizer):
    """A tokenizer of images, whose tokens all have the id of the whole prepared image.

    So two rows have equal tokens exactly if their images are equal.
    """

    def __init__(self, layout: PatchLayout, processing: Processing) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.layout = layout
        self.processing = processing
        self.roles = {}
        self.bos = None
        self.name = ""
        self.hash = sha256(repr((layout, processing)).encode()).hexdigest()
        self.made_unknown = False
        self.texts: TextTokenizer | None = None
        """The text tower's tokenizer, for a model with two towers."""

    @property
    def vocab_size(self) -> int:
        return 1 << 62

    @property
    def own_size(self) -> int:
        return 0

    @property
    def role_ids(self) -> dict[str, int]:  # type: ignore[override]
        return {}

    @property
    def unknown_id(self) -> None:  # type: ignore[override]
        return None

    @property
    def _added(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _splits_at_spaces(self) -> bool:
        return False

    def same_as(self, other: TextTokenizer) -> bool:
        return isinstance(other, ImageTokenizer) and self.hash == other.hash

    def token_text(self, token: int) -> str:
        """Return the name of the token's image, given by its id: image tokens have no text."""
        return f"image {token:x}"

    def plain_words(self) -> list[str]:
        return []

    def convention(self) -> str:
        """Describe the model's input for an image."""
        layout, front = self.layout, []
        for name in layout.names:
            count = len(layout.named(name))
            front.append(f"`{name}`" if count == 1 else f"{count} `{name}` tokens")
        said = f"{self.processing.words}; {layout.rows} x {layout.cols} patches, counted from 1"
        return f"{said}, after {' and '.join(front)}" if front else said

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> EncodedText:
        """Encode an image. text: the picture's text, which is unique to it."""
        own = stable_hash("image", self.hash, text) >> 66
        front = len(self.layout.front)
        patches = self.layout.tokens - front
        return EncodedText(
            (own,) * self.layout.tokens,
            ((0, 0),) * front + ((0, len(text)),) * patches,
            (True,) * front + (False,) * patches,
        )

    # --- image-only methods -----------------------------------------------------------------------

    def encode_picture(self, picture: Picture, *, inserted: int = 0) -> EncodedText:
        """Encode an image, with this number of tokens inserted after its patches."""
        [own] = self.encode_all([picture.text])
        return EncodedText(
            own.ids + own.ids[-1:] * inserted,
            own.offsets + ((0, 0),) * inserted,
            own.special + (False,) * inserted,
        )

    @cached_property
    def expansion(self) -> ImageExpansion:
        """The tokens of an image, as those of images within prompts."""
        layout, count = self.layout, self.layout.tokens
        places = [(token, layout.place(token)) for token in layout.grid]
        cells = tuple(ImageCell(token, 1, *place, None) for token, place in places if place)
        is_image = tuple(token in layout.grid for token in range(count))
        return ImageExpansion((0,) * count, is_image, ImageTokens(0, count, cells, {}))

    def label(self, token: int) -> str:
        """Return the label of a token in tables: its position as written in the language."""
        cell = self.expansion.cell_of.get(token)
        if cell is not None:
            return f"{IMAGE_SPAN} {self.expansion.labels[cell.position]}"
        if token >= self.layout.tokens:
            return f"{INSERTED_SPAN} token {token - self.layout.tokens + 1}"
        name = self.layout.front[token]
        same = self.layout.named(name)
        return name if len(same) == 1 else f"{name} {same.index(token) + 1}"

    def covered(self, region: Region, picture: Picture) -> tuple[int, ...]:
        """Return the tokens that read a part of a region, which no change of the image moves."""
        key = region, replace(picture, changes=()) if picture.changes else picture
        if key not in self._covered:
            from mechdsl.images.pixels import region_coverage  # imports NumPy

            if len(self._covered) == _CACHED_REGIONS:
                self._covered.clear()
            cover = region_coverage(region, picture)
            self._covered[key] = covered_tokens(cover, self.processing, self.layout)
        return self._covered[key]

    @cached_property
    def _covered(self) -> dict[tuple[Region, Picture], tuple[int, ...]]:
        return {}

    def places(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Return the tokens of each occurrence of the spans that every image has, by name."""
        found = {name: tuple((n,) for n in self.layout.named(name)) for name in self.layout.names}
        return {**found, IMAGE_SPAN: (self.layout.grid,)}


class ImageRowFields(TypedDict, total=False):
    """The fields that only rows of images have."""

    image: Picture
    places: Mapping[str, tuple[tuple[int, ...], ...]]
    regions: Mapping[str, tuple[Region, ...]]


def image_row_fields(
    picture: Picture | None, regions: Mapping[str, tuple[Region, ...]], tokenizer: TextTokenizer
) -> ImageRowFields:
    """Return the image fields of a row; none for a prompt. Occurrences of regions without a token
    are omitted."""
    if picture is None:
        return {}
    assert isinstance(tokenizer, ImageTokenizer)
    picture = picture.sized(tokenizer.layout.size)
    places = {**tokenizer.places()}
    for name, occurrences in regions.items():
        found = (tokenizer.covered(each, picture) for each in occurrences)
        places[name] = tuple(tokens for tokens in found if tokens)
    return {"image": picture, "places": places, "regions": regions}


class StandInImageTokenizer(ImageTokenizer):
    """The tokenizer of an unavailable model: more patches than most, every type of extra token."""

    stands_in = True

    def __init__(self) -> None:
        layout = PatchLayout(EXTRA_TOKEN_SPANS, (1, 1), (_SIDE, _SIDE))
        super().__init__(layout, Processing(("exact", _SIDE, _SIDE)))


def read_processing(
    folder: Path, layout: PatchLayout, *, model: str, span: Span | None = None
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Read the image preparation of a model's folder. Codes: E0456."""
    name = PROCESSOR_FILE
    try:
        config: Any = _read(folder / PROCESSOR_FILE, "image_processor")
        if config is None:
            name = PREPROCESSOR_FILE
            config = _read(folder / PREPROCESSOR_FILE)
    except (OSError, ValueError) as error:
        reason = f"`{name}` can't be read ({error})"
        return None, [NoImageProcessor(span=span, model=model, reason=reason)]
    if config is None:
        reason = f"there is no `{PREPROCESSOR_FILE}` next to its `config.json`"
        return None, [NoImageProcessor(span=span, model=model, reason=reason)]
    return make_image_tokenizer(config, layout, model=model, span=span)


def _read(file: Path, part: str = "") -> Any:
    """Read a file, or a key of it; None if it doesn't exist. Raises OSError and ValueError."""
    if not file.exists():
        return None
    found: Any = load_json(file.read_text(encoding="utf-8"))
    if not part:
        return found
    return cast("Mapping[str, Any]", found).get(part) if isinstance(found, Mapping) else None


def make_image_tokenizer(
    config: Any, layout: PatchLayout, *, model: str, span: Span | None = None
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Build the tokenizer from a processor's config. Codes: E0456."""

    def refused(reason: str, hint: str = "") -> tuple[None, list[Diagnostic]]:
        problem = NoImageProcessor(span=span, model=model, reason=reason)
        return None, [replace(problem, hint=hint) if hint else problem]

    if not isinstance(config, Mapping):
        return refused(f"`{PREPROCESSOR_FILE}` is not a JSON object")
    try:
        processing = parse_processing(config)
    except UnsupportedProcessor as unfit:
        return refused(str(unfit), unfit.hint)
    made = processing.size
    if made is None:
        hint = 'crop images (`"do_center_crop": true`), or give both sides of `size`'
        return refused("it keeps the image size of each file, but the model has a fixed size", hint)
    if layout.any_size:
        layout = replace(layout, size=made)
        if layout.rows < 1 or layout.cols < 1:
            return refused("its images are smaller than a patch")
    elif made != layout.size:
        sizes = (
            f"{made[1]} x {made[0]} pixels, but the model reads {layout.size[1]} x {layout.size[0]}"
        )
        return refused(f"it makes images of {sizes}", "give it the `image_size` of the model")
    return ImageTokenizer(layout, processing), []
