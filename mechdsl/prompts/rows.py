"""Rows of a prompts block before tokenisation, with their images, and the table of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cache, cached_property, partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast, overload

from mechdsl.base import limits
from mechdsl.base.hashing import Permutation, stable_hash
from mechdsl.base.limits import is_whole_number
from mechdsl.base.records import Record, compact_record, unlocked_property
from mechdsl.base.text import Span, count_noun, name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.prompts import (
    ChatRefused,
    ImageTooSmall,
    TextNotInside,
    TooManyValues,
    UnreadableImage,
)
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.images.picture import (
    EMPTY_CELL,
    IMAGE_BASELINES,
    GridLayout,
    MediaError,
    Picture,
    PictureChange,
    Region,
    pixel_box,
    video_picture,
)
from mechdsl.images.sounds import GENERATED_SOUNDS, Sound
from mechdsl.program import spec
from mechdsl.program.images import FRAME_SPAN, IMAGE_SPAN, listed_frames
from mechdsl.program.paths import (
    AUDIO_PATH,
    IMAGE_PATH,
    VIDEO_PATH,
    WILDCARD,
    path_to_read,
    paths_to_read,
)
from mechdsl.program.python_functions import PythonFunction
from mechdsl.program.spec import CLEAN, TILE
from mechdsl.prompts.block import (
    TEMPLATE,
    CompiledTemplate,
    Definition,
    PromptsBlock,
    image_of_region,
    is_drawn_mask,
    is_pixel_change,
    is_region_swap,
)
from mechdsl.prompts.expressions import (
    FUNCTIONS,
    CallSite,
    bad_value,
    draw_others,
    evaluate,
    is_condition_true,
)
from mechdsl.prompts.runs import PositionCell, PromptRun, RunRow, TokenMap, find_text
from mechdsl.prompts.tokens.chat import ChatProblem, Turn, stand_in_chat
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer, repeat_each
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.prompts.values import (
    DataRecord,
    DrawKey,
    ItemList,
    Refusal,
    RichText,
    RowValue,
    TextSpan,
    TokenId,
    concatenate,
    content_key,
    render_value,
    to_hashable,
    to_plain,
)
from mechdsl.syntax import ast
from mechdsl.syntax.parser import Placeholder
from mechdsl.vocab.corruptions import ImageChange, ValueChange, change_kind

_SIDE = 32


def row_picture(row: Row, node: ast.Expr, name: str = "") -> Picture:
    """Return the image of a row, or the image with this name in its prompt.

    Raises:
        Refusal: E0207, E0503, E0560 and those of values.
    """
    match node:
        case ast.String():
            return _of_path(*_of_file(row, node))
        case ast.QualifiedRef():
            return row.block.averaged.get(node.of.whole, Picture("gray"))
        case ast.Name(id=how) if how in IMAGE_BASELINES:
            return _of_baseline(row, how, name=name)
        case ast.Call(name=how) if how in IMAGE_BASELINES:
            known, value = IMAGE_BASELINES[how].number, node.arguments[0].value
            assert known is not None
            number = _number(row, node, value, known.noun, known.low, known.high)
            return _of_baseline(row, how, number, name=name)
        case ast.Call(name="shapes"):
            return _of_shapes(row, node, name)
        case ast.Call(name="grid"):
            return _of_grid(row, node, name)
        case _:
            return Picture("gray")


def row_frames(row: Row, node: ast.Expr, name: str) -> tuple[Picture, ...]:
    """Return the frames of the video with this name in a row's prompt.

    Raises:
        Refusal: E0207, E0503, E0560 and those of values.
    """
    if isinstance(node, ast.ListLiteral):
        return tuple(
            row_picture(row, each, f"{name} {number}")
            for number, each in enumerate(listed_frames(node), 1)
        )
    assert isinstance(node, ast.String)
    written = row.text(node, DrawKey("image")).text
    paths, problems = paths_to_read(VIDEO_PATH, f"{written.rstrip('/')}/{WILDCARD}", node.span)
    if problems:
        raise Refusal.of(problems[0])
    if len(paths) < 2:
        files_found = count_noun(len(paths), "file")
        reason = f"a video has two frames or more, and the folder has {files_found}"
        hint = "name a folder with an image file for each frame, in the order of their names"
        raise image_refusal(node.span, written, reason, hint)
    named = (f"{written.rstrip('/')}/{path.name}" for path in paths)
    return tuple(_of_path(each, *inspect_row_image(row, each, node.span)) for each in named)


def join_frames(video: spec.PictureDef, frames: tuple[Picture, ...]) -> Picture:
    """Return the frames of a row as one video. Raises `Refusal` (E0207)."""
    try:
        return video_picture(frames)
    except ValueError as error:
        raise Refusal(
            BadArgument,
            video.span,
            name=video.name,
            reason=f"has frames of {error} pixels",
            hint="resize them: a model's video processor reads frames of one size",
        ) from None


def row_sound(row: Row, node: ast.Expr, name: str) -> Sound:
    """Return the sound with this name in a row's prompt.

    Raises:
        Refusal: E0207, E0503, E0560 and those of values.
    """
    match node:
        case ast.String():
            written, path, digest, size = _of_file(row, node, is_sound=True)
            return Sound("file", path=path, digest=digest, said=written, size=size)
        case ast.Call(name=how):
            known = GENERATED_SOUNDS[how].number
            assert known is not None
            value = node.arguments[0].value
            number = _number(row, node, value, known.noun, known.low, known.high)
            return Sound(how, number=number)
        case _:
            how = node.id if isinstance(node, ast.Name) else "silence"
            return Sound(how, seed=_seed(row, name) if GENERATED_SOUNDS[how].is_random else 0)


def _of_baseline(row: Row, how: str, number: int | None = None, *, name: str) -> Picture:
    seed = _seed(row, name) if IMAGE_BASELINES[how].is_random else 0
    return Picture(how, number=number, seed=seed)


def _seed(row: Row, name: str) -> int:
    block = row.block
    named = [name] if name else []
    return stable_hash(block.seed, block.name, row.draw_key, "image", *named) % (1 << 64)


def image_refusal(
    span: Span, written: str, reason: str, hint: str, *, is_sound: bool = False
) -> Refusal:
    """Return E0560 for a path as written in the file."""
    noun = Sound.noun if is_sound else Picture.noun
    return Refusal(UnreadableImage, span, path=written, reason=reason, hint=hint, noun=noun)


def inspect_row_image(
    row: Row, written: str, span: Span, *, is_sound: bool = False
) -> tuple[Path, str, tuple[int, int]]:
    """Return the path of a row's image or sound file, SHA-256 of its bytes and its size.

    Raises:
        Refusal: E0560 and those of paths.
    """
    path, problems = path_to_read(AUDIO_PATH if is_sound else IMAGE_PATH, written, span)
    if path is None:
        raise Refusal.of(problems[0])
    try:
        return path, *row.block.image_files.look(path, is_sound=is_sound)
    except MediaError as error:
        refused = image_refusal(span, written, error.reason, error.hint, is_sound=is_sound)
        raise refused from None


def _of_file(
    row: Row, node: ast.String, *, is_sound: bool = False
) -> tuple[str, Path, str, tuple[int, int]]:
    """Return the path of a file as written, its path, SHA-256 of its bytes and its size."""
    written = row.text(node, DrawKey("image")).text
    if not written.strip():
        reason = f"the row names no {Sound.noun if is_sound else Picture.noun}"
        hint = f"exclude rows without {'a sound' if is_sound else 'an image'} with `where`"
        raise image_refusal(node.span, written, reason, hint, is_sound=is_sound)
    return written, *inspect_row_image(row, written, node.span, is_sound=is_sound)


def _of_path(written: str, path: Path, digest: str, size: tuple[int, int]) -> Picture:
    return Picture("file", path=path, digest=digest, said=written, size=size)


def _of_shapes(row: Row, node: ast.Call, image: str) -> Picture:
    given = {argument.name: argument.value for argument in node.arguments}
    if "kind" not in given:
        raise _wrong(node, "needs a `kind`", 'write `shapes(n: 1, kind: "circle", size: 32)`')
    told = {
        name: _drawn_text(row, given[name], name, "circle") if name in given else ""
        for name in ("kind", "colour", "texture")
    }
    count = size = None
    if "n" in given:
        count = _number(row, node, given["n"], "a number of shapes", 1, 1_000)
    if "size" in given:
        size = _number(row, node, given["size"], "a size", 1, limits.IMAGE_SIDE)
    count, size = count or 1, size or _SIDE
    problem = _cannot_draw(told["kind"], count, size, told["colour"], told["texture"])
    if problem:
        raise bad_value(node.span, problem, "change what is drawn")
    return Picture(
        "shapes",
        kind=told["kind"],
        count=count,
        colour=told["colour"],
        texture=told["texture"],
        size=(size, size),
        seed=_seed(row, image),
    )


def _drawn_text(row: Row, node: object, name: str, example: str) -> str:
    """Return the text of an argument of a generated image."""
    expression = _expr(node)
    value = to_plain(evaluate(expression, row, DrawKey(f"image.{name}")))
    if not isinstance(value, str):
        hint = f'write one in quotes: `"{example}"`'
        raise bad_value(expression.span, f"`{name}` is a text", hint)
    return value


def _of_grid(row: Row, node: ast.Call, image: str) -> Picture:
    given = {argument.name: argument.value for argument in node.arguments}
    if "rows" not in given:
        raise _wrong(node, "needs `rows`", 'write `grid(rows: "red circle, - / -, blue cross")`')
    rows = _drawn_text(row, given["rows"], "rows", "red circle, - / -, blue cross")
    marks, cell, noise = None, GridLayout.cell, None
    if "marks" in given:
        marks = _drawn_text(row, given["marks"], "marks", "@ #")
    if "cell" in given:
        cell = _number(row, node, given["cell"], "pixels of a cell", 7, limits.IMAGE_SIDE)
    if "noise" in given:
        noise = _number(row, node, given["noise"], "a level of noise", 0, 255)
    layout, problem, meant = _grid_layout(rows, marks, cell, noise)
    if problem:
        hint = f"did you mean {meant!r}?" if meant else "change what is drawn"
        raise bad_value(node.span, problem, hint)
    if max(layout.size) > limits.IMAGE_SIDE:
        reason = f"it has {layout.size[1]:,} x {layout.size[0]:,} pixels"
        raise bad_value(node.span, reason, f"a side has at most {limits.IMAGE_SIDE:,}")
    return Picture("grid", grid=layout, size=layout.size, seed=_seed(row, image))


@cache
def _grid_layout(
    rows: str, marks: str | None, cell: int, noise: int | None
) -> tuple[GridLayout, str, str]:
    """Return a grid, the reason that it can't be drawn, empty if it can, and the cell that is
    probably meant."""
    from mechdsl.images.pixels import grid_problem, suggest_cell

    cells = ([each.strip() for each in line.split(",")] for line in rows.split("/"))
    empty = (EMPTY_CELL, "")
    layout = GridLayout(
        tuple(tuple("" if each in empty else each for each in line) for line in cells),
        marks=None if marks is None else tuple(marks.split()),
        cell=cell,
        noise=noise,
    )
    return layout, grid_problem(layout), suggest_cell(layout)


def _expr(node: object) -> ast.Expr:
    assert isinstance(node, ast.Node)
    return node  # type: ignore[return-value]


@cache
def _cannot_draw(kind: str, count: int, size: int, colour: str, texture: str) -> str:
    """Return the reason that such shapes can't be drawn; empty if they can, for every seed."""
    import numpy as np

    from mechdsl.images.pixels import draw_shapes

    try:
        draw_shapes(kind, count, size, np.random.default_rng(0), colour=colour, texture=texture)
    except ValueError as error:
        return str(error)
    return ""


def _number(row: Row, node: ast.Call, value: object, what: str, least: int, most: int) -> int:
    expression = _expr(value)
    number = to_plain(evaluate(expression, row, DrawKey("image.number")))
    if not is_whole_number(number):
        raise bad_value(
            expression.span, f"{what} is a whole number", f"write one from {least} to {most}"
        )
    if not least <= number <= most:
        reason = f"takes {what} from {least:,} to {most:,}, not {number:,g}"
        raise _wrong(node, reason, f"write one from {least} to {most}")
    return int(number)


def _wrong(node: ast.Call, reason: str, hint: str) -> Refusal:
    return Refusal(BadArgument, node.span, name=node.name, reason=reason, hint=hint)


def cut_tile(row: Row, picture: Picture) -> Picture:
    """Return the tile of the image that the row represents; the image if it isn't cut into tiles.

    Raises:
        Refusal: E0503, E0561.
    """
    tiles = row.block.spec.tiles
    if tiles is None:
        return picture
    tile, names = to_plain(row.value(TILE, tiles.span)), tiles.names
    if not isinstance(tile, str) or tile not in names:
        hint = f"tiles are {name_list(names)}"
        hint = did_you_mean(tile, names, hint) if isinstance(tile, str) else hint
        raise bad_value(tiles.span, f"`tile` is {tile!r}, which isn't one of the tiles", hint)
    height, width = picture.size
    if height < tiles.rows or width < tiles.cols:
        raise Refusal(
            ImageTooSmall,
            tiles.span,
            image=picture.words,
            size=f"{width} x {height}",
            tiles=f"{tiles.rows} rows and {tiles.cols} columns",
        )
    return replace(picture, tile=tile, cut=tiles.box(tile, picture.size))


def tile_key(row: Row) -> int:
    """Return the key of draws that differ between tiles, independent of the data file's order.

    For other rows, this is the key of all draws.
    """
    return (
        row.draw_key
        if row.block.spec.tiles is None
        else stable_hash(row.draw_key, row.values[TILE])
    )


def shared_draw_key(row: Row, path: str) -> int:
    """Return the key of a draw: the tiles of an image share it, except for draws of another tile.

    path: the drawn value, as in the key's path.
    """
    of_tile = row.block.spec.tiles is not None and path.split(".")[0] == f"{row.run}:{TILE}"
    return tile_key(row) if of_tile else row.draw_key


def source_image_name(row: Row) -> str:
    """Return the unique name of the image that a row is a tile of."""
    picture = row.uncut
    assert picture is not None
    return picture.words if picture.how == "file" else picture.text


_HINT = "a box is a list of four numbers of pixels: left, top, right, bottom"


def row_regions(row: Row, picture: Picture, image: str = "") -> dict[str, tuple[Region, ...]]:
    """Return the occurrences of each region by name; none if the column has no value.

    Args:
        row: The row.
        picture: The row's image, or one in its prompt.
        image: Name of the image in the prompt.

    Raises:
        Refusal: E0503, E0560 and those of values.
    """
    block = row.block.spec
    return {
        region.name: tuple(_regions(row, region, picture))
        for region in block.regions
        if _is_part_of(row, region, image)
    }


def _is_part_of(row: Row, region: spec.RegionDef, image: str) -> bool:
    """Return whether a region is a part of this image of the row."""
    of = image_of_region(row.block.spec, region)
    return ("" if of is None else of.name) == image


def _regions(row: Row, region: spec.RegionDef, picture: Picture) -> list[Region]:
    if is_drawn_mask(row.block.spec, region):
        return [Region(shapes=True)]
    value = to_plain(row.value(region.column, region.span))
    if value is None:
        return []
    if isinstance(value, str):
        return [_mask(row, region, value, picture)]
    if not isinstance(value, list):
        raise bad_value(region.span, f"a {type(value).__name__} isn't a region", _HINT)
    boxes = cast("list[object]", value)
    if boxes and all(isinstance(box, list) for box in boxes):
        return [_box(region, cast("list[object]", box)) for box in boxes]
    return [_box(region, boxes)]


def _box(region: spec.RegionDef, value: list[object]) -> Region:
    numbers = [each for each in value if isinstance(each, (int, float)) and isfinite(each)]
    if len(numbers) != 4 or len(value) != 4:
        raise bad_value(region.span, f"{value!r} isn't a box", _HINT)
    left, top, right, bottom = map(float, numbers)
    if right <= left or bottom <= top:
        raise bad_value(region.span, f"the box {value!r} is empty", _HINT)
    return Region(box=(left, top, right, bottom))


def _mask(row: Row, region: spec.RegionDef, written: str, picture: Picture) -> Region:
    path, digest, size = inspect_row_image(row, written, region.span)
    if picture.how == "file" and size != picture.size:
        sizes = (f"{width} x {height}" for height, width in (size, picture.size))
        reason = "the mask has {} pixels, but the image has {}".format(*sizes)
        raise image_refusal(region.span, written, reason, "use a mask and an image of equal size")
    return Region(mask=path, digest=digest)


def row_image_changes(
    row: Row, picture: Picture, image: str = IMAGE_SPAN
) -> tuple[PictureChange, ...]:
    """Return the corruption's changes to the image before it is prepared for the model.

    Args:
        row: The row.
        picture: Its image, or the image with this name in its prompt.
        image: The name that changes have for the image.

    Raises:
        Refusal: E0207 and those of regions.
    """
    changes: list[PictureChange] = []
    for number, change in enumerate(row.image_changes):
        if not _changes_image(row, change, image):
            continue
        if is_region_swap(change, row.block.spec):
            changes += _swap(row, change, picture)
            continue
        made = resolve_image_change(row, change, number)
        regions = _named(row, change.values[0], picture)
        changes += [replace(made, region=region) for region in regions]
    return tuple(changes) if any(_seen_in(picture, change) for change in changes) else ()


def _changes_image(row: Row, change: ast.ChangeLine, image: str) -> bool:
    """Return whether a change applies to this image of the row, or to a region of it."""
    if not row.block.spec.pictures:
        return True
    [part, *_] = change.values
    assert isinstance(part, ast.Name)
    regions = [region for region in row.block.spec.regions if region.name == part.id]
    return _is_part_of(row, regions[0], image) if regions else part.id == image


def _seen_in(picture: Picture, change: PictureChange) -> bool:
    """Return whether a change may affect a pixel of the tile: a later blur spreads such pixels."""
    if picture.cut is None or change.region is None:
        return True
    from mechdsl.images.pixels import region_coverage  # imports NumPy: needed for regions only

    regions = [change.region] if change.other is None else [change.region, change.other]
    return any(region_coverage(region, picture).getbbox() is not None for region in regions)


def resolve_image_change(row: Row, change: ast.ChangeLine, number: int) -> PictureChange:
    """Return the blur, mask or noise with this number in its corruption, without its region.

    Raises:
        Refusal: E0207.
    """
    kind, block = change_kind(change), row.block
    assert isinstance(kind, ImageChange)
    # Pixel noise is seeded per source image, before tiles are cut; patch noise per tile.
    draw_key = row.draw_key if change.tokens is None else tile_key(row)
    seed = stable_hash(block.seed, block.name, draw_key, row.run, number) % (1 << 64)
    return PictureChange(
        kind.of, _amount(row, kind, change), seed=seed if kind.of == "noise" else 0
    )


def _named(row: Row, part: ast.Node, picture: Picture) -> Sequence[Region | None]:
    """Return the occurrences of a region; None represents the whole image."""
    assert isinstance(part, ast.Name)
    named = [region for region in row.block.spec.regions if region.name == part.id]
    return _regions(row, named[0], picture) if named else (None,)


def _swap(row: Row, change: ast.ChangeLine, picture: Picture) -> list[PictureChange]:
    """Return the swap of two regions; empty if the row lacks one. Raises `Refusal` E0503."""
    sides: list[Region] = []
    for part in change.values:
        regions = _named(row, part, picture)
        if not regions:
            return []
        region = regions[0]
        if len(regions) > 1 or region is None or region.box is None:
            reason = f"`{part.span.written}` is " + (
                f"{len(regions)} boxes" if len(regions) > 1 else "a mask"
            )
            raise bad_value(part.span, reason, "swap regions that are one box each")
        sides.append(region)
    first, second = sides
    _apart(first, second, change, picture)
    return [PictureChange("swap", region=first, other=second)]


def _apart(first: Region, second: Region, change: ast.ChangeLine, picture: Picture) -> None:
    """Raise E0503 for boxes that overlap or lie outside the image."""
    size = picture.size if picture.size != (0, 0) else (limits.IMAGE_SIDE, limits.IMAGE_SIDE)
    boxes = [pixel_box(region, size) for region in (first, second)]
    for (left, top, right, bottom), part in zip(boxes, change.values, strict=True):
        if left >= right or top >= bottom:
            reason = f"`{part.span.written}` contains no pixel of the image"
            raise bad_value(part.span, reason, "exclude such rows with `where`")
    (left, top, right, bottom), other = boxes
    if left < other[2] and other[0] < right and top < other[3] and other[1] < bottom:
        raise bad_value(change.span, "the boxes overlap", "exclude such rows with `where`")


def _amount(row: Row, kind: ImageChange, change: ast.ChangeLine) -> float:
    given = kind.amount(change)
    if given is None:
        return 0.0
    value: object = given
    if isinstance(given, str):
        value = to_plain(row.value(given, change.span))
    elif not isinstance(given, (int, float)):
        value = to_plain(evaluate(given, row, DrawKey(f"{row.run}:{kind.name}")))
    if not isinstance(value, (int, float)) or not 0 < value <= kind.most:
        reason = f"takes a number above 0, up to {kind.most:,g}"
        hint = f"write `{kind.usage}`"
        raise Refusal(BadArgument, change.span, name=kind.name, reason=reason, hint=hint)
    return float(value)


IMAGE_PROPERTIES = ("uncut", "image", "regions", "pictures", "picture_regions")
"""Cached properties that a change to the row invalidates."""


class ImageRow:
    """The image properties of a row. Raises `Refusal`."""

    image_changes: list[ast.ChangeLine]
    """The corruption's changes to the image."""

    @unlocked_property
    def uncut(self) -> Picture | None:
        """The description of a row's image before any change; None for a row of texts."""
        row = cast("Row", self)
        made_of = row.block.spec.image
        return None if made_of is None else row_picture(row, made_of)

    @unlocked_property
    def image(self) -> Picture | None:
        """The image after the changes, or the tile that the row stands for."""
        row, made = cast("Row", self), self.uncut
        if made is None:
            return None
        made = cut_tile(row, made)
        return replace(made, changes=row_image_changes(row, made)) if self.image_changes else made

    @unlocked_property
    def pictures(self) -> Mapping[str, Picture]:
        """The images in a prompt, by name, after the changes; `clip 2` is the second frame of the
        video `clip`, unless the model has a video processor, which reads all as `clip`."""
        row, pictures = cast("Row", self), dict[str, Picture]()
        if not row.block.spec.pictures:
            return _NOTHING
        made: dict[str, Picture]
        for picture_def in row.block.spec.pictures:
            if picture_def.is_video:
                frames = enumerate(row_frames(row, picture_def.value, picture_def.name), 1)
                made = {f"{picture_def.name} {number}": frame for number, frame in frames}
            elif picture_def.is_sound:
                made = {picture_def.name: row_sound(row, picture_def.value, picture_def.name)}
            else:
                made = {picture_def.name: row_picture(row, picture_def.value, picture_def.name)}
            for name, picture in made.items():
                changes = (
                    row_image_changes(row, picture, picture_def.name) if self.image_changes else ()
                )
                made[name] = replace(picture, changes=changes) if changes else picture
            if picture_def.is_video and row.block.joins_frames:
                made = {picture_def.name: join_frames(picture_def, tuple(made.values()))}
            pictures |= made
        return pictures

    def picture_text(self, picture: spec.PictureDef) -> RichText:
        """The marker of an image in a prompt, or those of the frames of a video."""
        name, pictures = picture.name, self.pictures
        if name in pictures:
            return RichText(pictures[name].marker)
        frames = (own for own in pictures if own.rpartition(" ")[0] == name)
        return concatenate((FRAME_SPAN, RichText(pictures[frame].marker)) for frame in frames)

    @unlocked_property
    def picture_regions(self) -> Mapping[str, Mapping[str, tuple[Region, ...]]]:
        """The regions of the images in a prompt: name of the image → name of the region."""
        row, pictures = cast("Row", self), self.pictures
        if not pictures:
            return _NOTHING
        return {name: row_regions(row, picture, name) for name, picture in pictures.items()}

    @unlocked_property
    def regions(self) -> Mapping[str, tuple[Region, ...]]:
        """Regions of the image, by name."""
        return _NOTHING if self.image is None else row_regions(cast("Row", self), self.image)


class PromptTable(Record):
    """The rows of a prompts block for one tokenizer, seed, limit and split."""

    name: str
    row_ids: tuple[int, ...]
    """Index of each row before `where`, `limit` and `split`: a row has the same id in every
    experiment."""
    row_keys: tuple[int, ...]
    """A hash of each row's content (values, clean text, answers), 0..2^63-1. Noise, donors and
    random positions depend on it, not on the row's position in the table."""
    runs: Mapping[str, PromptRun]
    conventions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Defaults and dropped rows, described in words, by short key (`bos`, `rows`, `answer`, …)."""
    data_hash: str = ""
    """SHA-256 of the data file, if there is one."""
    other_data: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the data files of other blocks whose runs it has, by block name."""
    moved: tuple[int, ...] = ()
    """Leading token that all answers share: it moves to the end of every prompt."""
    moved_text: str = ""
    python: tuple[PythonFunction, ...] = ()
    """Functions of Python files that compute values."""
    other_tables: Mapping[str, PromptTable] = field(default_factory=dict[str, "PromptTable"])
    """Other blocks, with separate rows, that means are computed over."""
    block_rows: BlockRows | None = field(default=None, repr=False, compare=False)
    """The rows of its block by id."""
    stands_in: bool = False
    """Its rows are placeholders for rows that can't be built here."""
    columns_unknown: bool = False
    """Its rows are placeholders because its data file, which defines further names, is missing."""
    cut: bool = False
    """There are more rows, which a check doesn't read."""
    dealt: tuple[str, ...] = ()
    """Names of the values that are evenly distributed over the rows by construction."""
    exhausted: tuple[str, ...] = ()
    """Names of the variables for which the rows have every value that the block declares."""
    whole: bool = False
    """The rows are all that the block can build."""
    unchanged: frozenset[str] = frozenset()
    """Corruptions that leave some row unchanged; such rows are dropped where they are used."""
    changed_by: tuple[str, ...] = ()
    """The corruptions in `unchanged` that are used; each of them changes all rows of the table."""
    replies_of: str = ""
    """Source of the replies after the prompts, as written: `replies of writes(c: 1)`."""
    classes: tuple[str, ...] = ()
    """Labels that distinguish its images: the texts of a `classes` line."""
    alone: PromptTable | None = field(default=None, repr=False, compare=False)
    """The same table without the replies."""

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def encoded(self) -> PromptTable:
        """The table with only the tokens that an encoder-decoder's encoder reads."""

        def cut(row: RunRow) -> RunRow:
            kept = (
                row if row.reply is None else replace(row, text=row.text_before_reply, reply=None)
            )
            return replace(
                kept,
                ids=row.ids[: row.source],
                offsets=row.offsets[: row.source],
                special=row.special[: row.source],
            )

        return self._with_rows(cut)

    @cached_property
    def decoded(self) -> PromptTable:
        """The table with only the tokens that an encoder-decoder's decoder reads."""

        def cut(row: RunRow) -> RunRow:
            count = len(row.ids) - row.source
            if row.decodes_text:
                return replace(
                    row,
                    ids=row.ids[row.source :],
                    offsets=row.offsets[row.source :],
                    special=row.special[row.source :],
                    reply=row.reply and replace(row.reply, first=row.reply.first - row.source),
                    pictures={},
                    source=0,
                )
            none = ((0, 0),) * count
            reply = row.reply and replace(row.reply, first=row.reply.first - row.source)
            kept = replace(row, text="", spans=(), places={}, regions={}, reply=reply)
            return replace(
                kept, ids=row.ids[row.source :], offsets=none, special=(False,) * count, source=0
            )

        return self._with_rows(cut)

    def in_patches(self, reader: ImagePromptTokenizer) -> PromptTable:
        """Return the table with the patches of the vision encoder in place of tokens, if they are
        resampled to the tokens of an image.

        A token of the text has as many positions as one of an image.

        Raises:
            UnsupportedProcessor: The patches aren't known.
        """
        if reader.hash not in self._patches:
            self._patches[reader.hash] = self._with_rows(partial(row_in_patches, reader))
        return self._patches[reader.hash]

    @cached_property
    def _patches(self) -> dict[str, PromptTable]:
        """By the hash of a tokenizer."""
        return {}

    @cached_property
    def cells(self) -> dict[object, tuple[PositionCell, ...]]:
        """Cells of positions that several experiments resolve in these rows, by
        `resolve_positions`."""
        return {}

    def _with_rows(self, of: Callable[[RunRow], RunRow]) -> PromptTable:
        runs = {
            name: replace(run, rows=tuple(map(of, run.rows))) for name, run in self.runs.items()
        }
        return replace(self, runs=runs)

    @property
    def sources(self) -> Sequence[Row]:
        """The clean rows before tokenisation, in which the texts of metrics are evaluated."""
        return () if self.block_rows is None else self.block_rows.with_ids(self.row_ids)

    @property
    def cut_from(self) -> tuple[str, ...]:
        """Per row, the image that the row is a tile of; empty if rows aren't tiles."""
        rows = self.runs["clean"].rows
        first = rows[0].image if rows else None
        if first is None or not first.tile:
            return ()
        return tuple(str(row.values[IMAGE_SPAN]) for row in rows)


def row_in_patches(reader: ImagePromptTokenizer, row: RunRow) -> RunRow:
    """Return a row of `PromptTable.in_patches`. Raises UnsupportedProcessor."""
    pictures = {marker: reader.in_encoder(picture) for marker, picture in row.pictures.items()}
    vectors = max((picture.expansion.vectors for picture in pictures.values()), default=1)
    return replace(
        row,
        ids=repeat_each(row.ids, vectors),
        offsets=repeat_each(row.offsets, vectors),
        special=repeat_each(row.special, vectors),
        pictures=pictures,
    )


RECORD = "record"
"""Name of the axis of a data file's records."""

CACHED_ROWS = 2**12
"""Maximum number of a block's rows that are cached for the next table."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
"""Shared by all rows: 200,000 rows would each hold several empty mappings."""


_PROPERTIES = ("prompt", "turns", "plain_values", "key", "mark", *IMAGE_PROPERTIES)


class Row(ImageRow):
    """One row of a block, clean or corrupted. Its methods raise `Refusal`."""

    def __init__(self, block: PromptsBlock, row_id: int) -> None:
        self.block = block
        self.id = row_id
        self.run = CLEAN
        self._clean: Row | None = None
        """The clean row that this row is a copy of."""
        index = row_id % (block.combinations)
        index, at = divmod(index, block.data_size)
        self.record: DataRecord = block.data.records[at] if block.data else _NOTHING
        self.places: dict[str, int] = {RECORD: at}
        self.values: dict[str, RowValue] = {}
        for name, values in reversed(block.axes):
            index, at = divmod(index, len(values))
            self.places[name] = at
            self.values[name] = values[at]
        self.template: CompiledTemplate = block.templates[self.places.get(TEMPLATE, 0)]
        self.changed: Mapping[str, RowValue] = _NOTHING
        """Values that the corruption assigned."""
        self.item_changes: Mapping[str, tuple[ast.Expr, Row]] = _NOTHING
        """Changes of names that only lists draw from: applied to each item."""
        self.image_changes: list[ast.ChangeLine] = []
        self._tokenizer: TextTokenizer | None = None
        """Set only while conditions are evaluated."""
        self._drawn: dict[str, RowValue] = {}
        self._cache: dict[str, RowValue] = {}
        self._texts: dict[str, str | TokenId] = {}

    def _copy(self) -> Row:
        copy = object.__new__(Row)
        copy.__dict__.update(self.__dict__)
        copy._forget()
        copy._clean = self.clean
        return copy

    @property
    def clean(self) -> Row:
        """The row that this row is a corruption of, or itself.

        A reference from a row to itself would never be freed: checks turn garbage collection off.
        """
        return self if self._clean is None else self._clean

    def _forget(self) -> None:
        """Invalidate all cached values because the row changed."""
        self._cache = {}
        self._texts = {}
        own = self.__dict__
        for name in _PROPERTIES:
            if name in own:
                del own[name]

    def forget_steps(self) -> None:
        """Drop intermediate values of the texts; they are recomputed on access."""
        self._cache = {}

    @unlocked_property
    def draw_key(self) -> int:
        """Key of the row's draws: its number or, in a data file, the record's content.

        Equal records have independent draws.
        """
        data = self.block.data
        number = self.block.image_number(self.id)  # tiles of an image share their draws
        if data is None:
            return number
        order, at = data.by_content, self.places[RECORD]
        return stable_hash(order.keys[at], order.copies[at], number // self.block.data_size)

    @unlocked_property
    def key(self) -> int:
        """Hash of the values, the text and the texts of metrics: rows of equal content have equal
        keys, wherever they are in the table."""
        texts = (self.named_text(name) for name in sorted(self.block.texts))
        written = ((t.id if isinstance(t, TokenId) else t) for t in texts)
        # The key of a chat is independent of the model's chat template.
        turns = self.turns if self.template.turns else ()
        said = [part for turn in turns for part in (turn.role, turn.rich.text)]
        return content_key(self.plain_values, [*(said or [self.prompt.text]), *written])

    @unlocked_property
    def mark(self) -> object:
        """What makes rows equal: prompt, texts and the values without draws."""
        texts = map(self.named_text, self.block.texts)
        # Lists: generators would take as long as the values of most rows.
        marks = tuple([t.id if isinstance(t, TokenId) else t for t in texts])
        values = (*self.values.values(), *self.record.values())
        fixed = [v if type(v) is str else to_hashable(to_plain(v)) for v in values]
        return (self.prompt.text, marks, tuple(fixed))

    # --- names and values -----------------------------------------------------------------------

    def known(self, name: str) -> bool:
        return (
            name in self.changed
            or name in self.values
            or name in self.record
            or self._definition(name) is not None
            or name in self.block.parameters
            or any(picture.name == name for picture in self.block.spec.pictures)
        )

    def _definition(self, name: str) -> Definition | None:
        block = self.block
        definition = block.definitions.get(name) or self.template.definitions.get(name)
        return definition or block.text_definitions.get(name)

    def value(self, name: str, span: Span) -> RowValue:
        if name in self.changed:
            return self.changed[name]
        if name in self.values:
            return self.values[name]
        if name in self._cache:
            return self._cache[name]
        definition = self._definition(name)
        if definition is not None:
            clean = self._clean
            if clean is not None and clean.known(name):
                clean.value(name, span)  # draws first: the corrupted row can reuse the draws
            self._cache |= self._assigned(definition.names, definition.value, definition.path)
            return self._cache[name]
        if name in self.record:
            value = self._cache[name] = self.record[name]
            return value
        for picture in self.block.spec.pictures:
            if picture.name == name:
                return self.picture_text(picture)
        if name in self.block.parameters:
            return self.block.parameters[name]
        if name in ("true", "false"):
            return name == "true"
        if name in self.block.columns:
            return None
        if name == IMAGE_SPAN and self.block.spec.tiles is not None:
            return source_image_name(self)
        raise self.block.unknown(name, span)

    def attribute(self, name: str, attribute: str, span: Span) -> RowValue:
        dotted = f"{name}.{attribute}"
        if dotted in self.values:
            return self.values[dotted]
        value = self.value(name, span)
        if isinstance(value, Mapping) and attribute in value:
            return value[attribute]
        raise bad_value(span, f"`{name}` has no `{attribute}`", "write the name alone")

    def _assigned(self, names: tuple[str, ...], node: ast.Expr, path: str) -> dict[str, RowValue]:
        """Return the values that one definition assigns to its names."""
        key = DrawKey(path)
        if len(names) == 1:
            return {names[0]: evaluate(node, self, key)}
        if isinstance(node, ast.Call) and node.name == "others":
            call = CallSite(node, FUNCTIONS["others"], self, key.call(), evaluate)
            return dict(zip(names, draw_others(call, len(names)), strict=True))
        value = evaluate(node, self, key)
        entries = [i.value for i in value.items] if isinstance(value, ItemList) else value
        if not isinstance(entries, list) or len(entries) != len(names):
            hint = "write `others(…)`, or a list with the same number of values"
            raise bad_value(node.span, f"it doesn't give {len(names)} values", hint)
        return dict(zip(names, entries, strict=True))

    def text(self, node: ast.String, key: DrawKey) -> RichText:
        """Fill in the placeholders of a text; each named placeholder becomes a span."""
        template = self.block.template(node)
        whole = template.constant or concatenate(
            [
                piece if isinstance(piece, str) else (piece.name or "", self._placed(piece, key))
                for piece in template.pieces
            ]
        )
        # Nested texts can grow exponentially before a tokenizer sees them.
        if len(whole.text) > limits.TEXT:
            raise Refusal(
                TooManyValues,
                node.span,
                what="this text",
                amount=f"{len(whole.text):,} characters",
                most=limits.TEXT,
                hint="this exceeds the context of any model; shorten its contents",
            )
        return whole

    def _placed(self, piece: Placeholder, key: DrawKey) -> RichText:
        name, expr = piece.name, piece.expr
        if name not in self.template.definitions:
            name = expr.id if isinstance(expr, ast.Name) else None
        if name is not None:
            rich = render_value(self.value(name, expr.span))
            rich = self._marked(name, rich) if rich and name in self.block.marks else rich
        else:
            rich = render_value(evaluate(expr, self, key))
        if rich is None:
            reason = "it is a list or record, or the row has no value for it"
            hint = (
                f"write `{piece.name or piece.expr.span.written} in […]` for one row per value, or "
                'lists as `list(item, from: column, sep: ", ")`'
            )
            raise bad_value(piece.span, reason, hint)
        return rich

    def _marked(self, name: str, rich: RichText) -> RichText:
        """Add the spans marked inside a column's text.

        If the corruption changed such a span's value, its text is replaced too.
        """
        spans = list(rich.spans)
        text = rich.text
        for mark in self.block.marks[name]:
            written, new = (
                _marked_texts(row.value(mark.name.id, mark.name.span)) for row in (self.clean, self)
            )
            ranges = [find_text(text, each) for each in written]
            if not all(ranges) or len(new) != len(written):
                raise Refusal(TextNotInside, mark.span, name=mark.name.id, within=name)
            pairs = zip(ranges, new, strict=True)
            places = sorted({(*at, after) for every, after in pairs for at in every})
            if new != written and any(one[1] > two[0] for one, two in pairwise(places)):
                reason = f"texts of `{mark.name.id}` overlap in `{name}` and can't be replaced"
                raise bad_value(mark.span, reason, "list texts that don't overlap")
            for start, end, replaced in reversed(places):
                if replaced != text[start:end]:
                    text = text[:start] + replaced + text[end:]
                    spans = [_shifted(s, end, len(replaced) - (end - start)) for s in spans]
                spans.append(TextSpan(mark.name.id, start, start + len(replaced)))
        return RichText(text, tuple(sorted(spans, key=lambda s: (s.start, -s.end))))

    # --- context of functions -------------------------------------------------------------------

    def placeholders(self, node: ast.String) -> Sequence[ast.Expr]:
        return self.block.placeholders(node)

    def domain(self, node: ast.Expr) -> Sequence[RowValue]:
        return self.block.domain_of(node, self.template)

    def python(self, node: ast.Call) -> RowValue:
        names = self.block.calls.names(node)
        if names is None:
            names = (*self.plain_values, *(n for n in self.values if n not in self.plain_values))
        row = {name: to_plain(self.value(name, node.span)) for name in names}
        return self.block.calls.run(node, row)

    def records(self, name: str, *, drawn: bool) -> Sequence[DataRecord] | None:
        data = self.block.records(name)
        if data is None:
            return None
        return data.sorted if drawn else data.records

    def is_own(self, record: DataRecord, fields: Sequence[str]) -> bool:
        shared = [f for f in fields if f in record and f in self.record]
        return bool(shared) and all(
            to_hashable(to_plain(record[f])) == to_hashable(to_plain(self.record[f]))
            for f in shared
        )

    def tokens(self, node: ast.Expr, value: RowValue) -> int:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise bad_value(node.span, "tokens are counted only in `where`", "write it there")
        if isinstance(value, TokenId):
            return 1
        tokenizer = tokenizer.reading(written=bool(self.turns))
        spans = self._spans_called(node)
        if spans:
            return self._tokens_of(spans, node, tokenizer)
        rich = render_value(value)
        if rich is None:
            raise bad_value(node.span, "it has no text in this row", "give a text or a number")
        ids, _ = tokenizer.continuation(self.prompt.text, rich.text)
        # A separate leading space moves to the prompt if all answers begin with it.
        return len(ids[1:] if len(ids) > 1 and tokenizer.is_space(ids[0]) else ids)

    def _spans_called(self, node: ast.Expr) -> list[TextSpan]:
        """Return the prompt's spans with the name of a node."""
        name = node.id if isinstance(node, ast.Name) else None
        return [span for span in self.prompt.spans if span.name == name]

    def _tokens_of(self, spans: list[TextSpan], node: ast.Expr, tokenizer: TextTokenizer) -> int:
        text = self.prompt.text
        encoded_text = tokenizer.encode(text)
        places = TokenMap(
            RunRow(text, encoded_text.ids, encoded_text.offsets, encoded_text.special, (), {}, {})
        )
        counts = dict.fromkeys(len(places.tokens(span.start, span.end)) for span in spans)
        if len(counts) > 1:
            shown = " and ".join(map(str, sorted(counts)))
            reason = f"it has {shown} tokens at different positions of the prompt"
            hint = "give one of them a different name: `{s2 = s}`, then `tokens(s2)`"
            raise bad_value(node.span, reason, hint)
        return next(iter(counts))

    def changed_item(self, name: str, value: RowValue, key: DrawKey) -> RowValue:
        if name not in self.item_changes:
            return value
        node, before = self.item_changes[name]
        inner = before.with_values({name: value})
        return evaluate(node, inner, DrawKey(f"{self.run}:{key.path}.{name}"))

    def draw(self, key: DrawKey, index: int, below: int) -> int:
        own = (self.block.seed, self.block.name, shared_draw_key(self, key.path), key.path)
        return stable_hash(*own, index) % below

    def kept(self, key: DrawKey) -> list[RowValue]:
        drawn = self.clean._drawn
        return [drawn[key.path]] if self.run != CLEAN and key.path in drawn else []

    def keep(self, key: DrawKey, value: RowValue) -> None:
        if self.run == CLEAN:
            self.clean._drawn[key.path] = value

    def order(self, key: DrawKey, size: int) -> Sequence[int]:
        return Permutation(size, self.block.seed, self.block.name, self.draw_key, key.path)

    def elsewhere(self, name: str, span: Span) -> RowValue:
        key = (self.block.seed, self.block.name, "shuffle", name)
        if self.block.data is not None and name in self.record:
            data = self.block.data
            order, rank = data.by_content.order, data.by_content.rank
            other = order[Permutation(len(order), *key)[rank[self.places[RECORD]]]]
            return data.records[other].get(name)
        for axis, values in self.block.axes:
            if axis == name:
                return values[Permutation(len(values), *key)[self.places[name]]]
        raise bad_value(span, f"`{name}` isn't a column", "shuffle a column or a list")

    def with_values(self, values: Mapping[str, RowValue]) -> Row:
        copy = self._copy()
        copy.values = {**self.values, **values}
        copy.changed = {k: v for k, v in self.changed.items() if k not in values}
        return copy

    # --- corruption -----------------------------------------------------------------------------

    def corrupted(self, corruption: spec.Corruption) -> Row:
        """Apply the value changes of a corruption in order.

        Changes of tokens and activations are applied later.
        """
        row = self._copy()
        row.run = corruption.name
        row.changed, row.item_changes, row.image_changes = _NOTHING, _NOTHING, []
        for change in corruption.changes:
            kind = change_kind(change)
            if isinstance(change, ast.ChangeLine) and is_pixel_change(change, self.block.spec):
                row.image_changes.append(change)
            elif isinstance(kind, ValueChange):
                kind.apply(row, change)
        if row.template is self.template and not row.image_changes:
            changed = self.block.affected(self.template, (*row.changed, *row.item_changes))
            row._cache = {n: value for n, value in self._cache.items() if n not in changed}
            row._texts = {n: text for n, text in self._texts.items() if n not in changed}
        return row

    def assign(self, names: tuple[ast.Name, ...], value: ast.Expr) -> None:
        ids = tuple(name.id for name in names)
        if len(ids) == 1 and ids[0] in self.block.domains and ids[0] not in self.values:
            before = self._copy()
            before.item_changes = dict(self.item_changes)
            self._write({}, {ids[0]: (value, before)})
            return
        self._write(self._assigned(ids, value, f"{self.run}:{','.join(ids)}"), {})

    def exchange(self, first: ast.Name, second: ast.Name) -> None:
        a, b = self.value(first.id, first.span), self.value(second.id, second.span)
        self._write({first.id: b, second.id: a}, {})

    def use_template(self, text: ast.String) -> None:
        self.template = self.block.template(text)
        self._write({}, {})

    def plain_value(self, name: ast.Name) -> object:
        return to_plain(self.value(name.id, name.span))

    def put(self, name: ast.Name, value: float | str) -> None:
        self._write({name.id: value}, {})

    def permutation(self, name: ast.Name, size: int) -> Sequence[int]:
        order = self.order(DrawKey(f"{self.run}:{name.id}"), max(1, size))
        return [order[place] for place in range(size)]

    def refuse(self, node: ast.Node, reason: str, hint: str) -> NoReturn:
        raise bad_value(node.span, reason, hint)

    def _write(
        self, values: Mapping[str, RowValue], items: Mapping[str, tuple[ast.Expr, Row]]
    ) -> None:
        self.changed = {**self.changed, **values}
        self.item_changes = {**self.item_changes, **items}
        self._forget()

    # --- results --------------------------------------------------------------------------------

    def passes(self, conditions: Sequence[ast.Expr], tokenizer: TextTokenizer) -> bool:
        """Return whether all conditions of `where` hold; the tokenizer is the model's."""
        if not conditions:
            return True
        self._tokenizer = tokenizer
        try:
            return all(
                is_condition_true(node, self, DrawKey(f"where.{n}"))
                for n, node in enumerate(conditions)
            )
        finally:
            self._tokenizer = None

    @unlocked_property
    def prompt(self) -> RichText:
        """The prompt with its spans, in text order; for an image, its text representation."""
        if self.block.spec.image is not None and self.image is not None:
            return RichText(self.image.text)
        chat = bool(self.template.turns)
        rich = self._chat() if chat else self.text(self.template.text, DrawKey(TEMPLATE))
        spans = list(rich.spans)
        for definition in self.block.spec.spans:
            if definition.literal is not None:
                literal = self.text(definition.literal, DrawKey(definition.name.id)).text
                ranges = find_text(rich.text, literal)
                spans += [TextSpan(definition.name.id, *at) for at in ranges[-1:]]
        return RichText(rich.text, tuple(sorted(spans, key=lambda s: (s.start, -s.end))))

    @unlocked_property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of a chat."""
        turns = enumerate(self.template.turns)
        return tuple(Turn(t.role, self.text(t.text, DrawKey(f"{TEMPLATE}.{n}"))) for n, t in turns)

    def _chat(self) -> RichText:
        """Format the turns with the tokenizer's chat template. Raises `Refusal` E0552."""
        if self.block.chat is None:
            return stand_in_chat(self.turns)
        try:
            return self.block.chat.written(self.turns)
        except ChatProblem as problem:
            turns = self.template.turns
            at = turns[0 if problem.turn is None else problem.turn].span
            raise Refusal(ChatRefused, at, reason=problem.reason, hint=problem.hint) from problem

    def named_text(self, name: str) -> str | TokenId:
        """Return one of the texts that metrics refer to."""
        if name not in self._texts:
            self._texts[name] = self.as_text(self.block.texts[name], DrawKey(name))
        return self._texts[name]

    def as_text(self, node: ast.Expr, key: DrawKey) -> str | TokenId:
        """Evaluate an expression as a text for a metric."""
        value = evaluate(node, self, key)
        if isinstance(value, TokenId):
            return value
        rich = render_value(value)
        if rich is None:
            raise bad_value(node.span, "it has no text in this row", "give a text or a number")
        return rich.text

    @unlocked_property
    def plain_values(self) -> Mapping[str, object]:
        """All values of the row, without spans."""
        names = self.block.value_names(self.template)
        if self.record or self.changed:
            names = dict.fromkeys((*self.record, *names, *self.changed))
        span = self.block.spec.span
        return {name: to_plain(self.value(name, span)) for name in names}

    @property
    def content(self) -> RowContent:
        """Everything that a table needs of the row."""
        values, texts = self.plain_values, tuple(map(self.named_text, self.block.texts))
        if self.block.spec.image is None and not self.block.spec.pictures:
            return RowContent(self.prompt, values, texts, None, _NOTHING, _NOTHING, _NOTHING)
        pictures = self.pictures, self.picture_regions
        return RowContent(self.prompt, values, texts, self.image, self.regions, *pictures)

    def describe(self) -> str:
        """Identify the row, for messages."""
        shown = ", ".join(f"{n} = {render_short(self.values[n])}" for n, _ in self.block.axes[:4])
        if self.block.data is not None:
            return f"record {self.places[RECORD]}" + f", {shown}" * bool(shown)
        return f"the row with {shown}" if shown else "every row"


@compact_record
class RowContent:
    """The computed content of a row in one run."""

    prompt: RichText
    values: Mapping[str, object]
    """Values of all names, without spans."""
    texts: tuple[str | TokenId, ...]
    """Texts that metrics refer to, in the order of the block."""
    image: Picture | None
    regions: Mapping[str, tuple[Region, ...]]
    pictures: Mapping[str, Picture]
    """The images within a prompt, by name."""
    parts: Mapping[str, Mapping[str, tuple[Region, ...]]]
    """The regions of each of them."""


@compact_record
class BuiltRow:
    """The content of a row and its corruptions, without the intermediate values, which take most of
    a row's memory."""

    id: int
    key: int
    template: int
    clean: RowContent
    corrupted: tuple[RowContent, ...]
    """In the order of the block's corruptions."""


class BlockRows:
    """The rows of a block by id, shared by the experiments of a file up to `CACHED_ROWS`.

    Rows are deterministic: a row that isn't cached is rebuilt.
    """

    def __init__(self, block: PromptsBlock) -> None:
        self.block = block
        self._rows: dict[int, Row] = {}
        self._corrupted: dict[tuple[int, str], Row] = {}
        self._order: list[int] = []
        """The first numbers of the first round, in its seeded order."""
        self.built: dict[int, BuiltRow] = {}
        """The content of cached rows that are in a table."""

    def in_order(self, turn: int) -> Iterator[int]:
        """Yield the numbers of combinations, without tiles, in the seeded order of a round."""
        block = self.block
        images = block.combinations // block.tiles
        order = Permutation(images, block.seed, block.name, "rows", turn)
        known = () if turn else self._order
        yield from known
        for place in range(len(known), images):
            number = block.in_file(order[place])
            if not turn and place == len(self._order) < CACHED_ROWS:
                self._order.append(number)
            yield number

    def keep_built(self, row_id: int, built: BuiltRow) -> None:
        """Store the content of a row if the row is cached."""
        if row_id in self._rows:
            self.built[row_id] = built

    def __getitem__(self, row_id: int) -> Row:
        row = self._rows.get(row_id)
        if row is None:
            row = Row(self.block, row_id)
            if len(self._rows) < CACHED_ROWS:
                self._rows[row_id] = row
        return row

    def corrupted(self, row: Row, corruption: spec.Corruption) -> Row:
        """Apply a corruption to a row of the block."""
        key = row.id, corruption.name
        corrupted_row = self._corrupted.get(key)
        if corrupted_row is None:
            corrupted_row = row.corrupted(corruption)
            if row.id in self._rows:
                self._corrupted[key] = corrupted_row
        return corrupted_row

    def with_ids(self, ids: Sequence[int]) -> Sequence[Row]:
        """Return the rows with these ids."""
        return _SelectedRows(self, ids)

    def only(self, corruption: spec.Corruption) -> BlockRows:
        """Return the same rows with one of the corruptions."""
        other = BlockRows(self.block.only(corruption))
        other._rows, other._corrupted = self._rows, self._corrupted
        return other


def render_short(value: RowValue) -> str:
    text = repr(value) if isinstance(value, str) else str(to_plain(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _marked_texts(value: RowValue) -> tuple[str, ...]:
    """Return the texts that a column marks: its own text, or those of its list."""
    texts = [render_value(each) for each in (value if isinstance(value, list) else [value])]
    return tuple("" if text is None else text.text for text in texts)


def _shifted(span: TextSpan, end: int, by: int) -> TextSpan:
    """Move a span after the text before `end` has grown by `by` characters."""
    start = span.start + by if span.start >= end else span.start
    return TextSpan(span.name, start, span.end + by if span.end >= end else span.end, span.within)


class _SelectedRows(Sequence[Row]):
    """Rows of a block, looked up on access."""

    def __init__(self, rows: BlockRows, ids: Sequence[int]) -> None:
        self._rows, self._ids = rows, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _SelectedRows(self._rows, self._ids[index])
        return self._rows[self._ids[index]]
