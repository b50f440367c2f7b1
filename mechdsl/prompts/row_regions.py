"""Regions of a row's image, and what a corruption does to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, cast

from mechdsl.base import limits
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.images.picture import Picture, PictureChange
from mechdsl.images.regions import Region, whole_box
from mechdsl.program import spec
from mechdsl.prompts.expressions import bad, evaluate
from mechdsl.prompts.images_block import is_drawn_mask, swaps_regions
from mechdsl.prompts.row_pictures import look, not_read
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.row_tiles import of_tile
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.values import plain
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import ImageChange, kind_of

if TYPE_CHECKING:
    from mechdsl.prompts.rows import Row

_HINT = "a box is a list of four numbers of pixels: left, top, right, bottom"


def regions_of(row: Row, picture: Picture) -> dict[str, tuple[Region, ...]]:
    """By name, the occurrences of each region; none where the column has no value. Refusals: E0503,
    E0560 and those of values."""
    return {region.name: tuple(_regions(row, region, picture)) for region in row.block.spec.regions}


def _regions(row: Row, region: spec.RegionDef, picture: Picture) -> list[Region]:
    if is_drawn_mask(row.block.spec, region):
        return [Region(shapes=True)]
    value = plain(row.value(region.column, region.span))
    if value is None:
        return []
    if isinstance(value, str):
        return [_mask(row, region, value, picture)]
    if not isinstance(value, list):
        raise bad(region.span, f"a {type(value).__name__} is no region", _HINT)
    boxes = cast("list[object]", value)
    if boxes and all(isinstance(each, list) for each in boxes):
        return [_box(region, cast("list[object]", each)) for each in boxes]
    return [_box(region, boxes)]


def _box(region: spec.RegionDef, value: list[object]) -> Region:
    numbers = [each for each in value if isinstance(each, (int, float)) and isfinite(each)]
    if len(numbers) != 4 or len(value) != 4:
        raise bad(region.span, f"{value!r} is no box", _HINT)
    left, top, right, bottom = map(float, numbers)
    if right <= left or bottom <= top:
        raise bad(region.span, f"the box {value!r} has no inside", _HINT)
    return Region(box=(left, top, right, bottom))


def _mask(row: Row, region: spec.RegionDef, written: str, picture: Picture) -> Region:
    path, digest, size = look(row, written, region.span)
    if picture.how == "file" and size != picture.size:
        sizes = (f"{width} x {height}" for height, width in (size, picture.size))
        reason = "the mask has {} pixels, and the image {}".format(*sizes)
        raise not_read(region.span, written, reason, "make them equal")
    return Region(mask=path, digest=digest)


def changes_of(row: Row, picture: Picture) -> tuple[PictureChange, ...]:
    """What the corruption does to the image before it is made ready. Refusals: E0207 and those of
    regions."""
    found: list[PictureChange] = []
    for number, change in enumerate(row.image_changes):
        if swaps_regions(change, row.block.spec):
            found += _swap(row, change, picture)
            continue
        made = image_change(row, change, number)
        regions = _named(row, change.values[0], picture)
        found += [replace(made, region=region) for region in regions]
    return tuple(found) if any(_seen_in(picture, change) for change in found) else ()


def _seen_in(picture: Picture, change: PictureChange) -> bool:
    """Whether a tile has a pixel that a change may change: a blur behind it takes others along."""
    if picture.cut is None or change.region is None:
        return True
    from mechdsl.images.pixels import cover_of  # NumPy, for those who have regions

    regions = [change.region] if change.other is None else [change.region, change.other]
    return any(cover_of(each, picture).getbbox() is not None for each in regions)


def image_change(row: Row, change: ast.Change, number: int) -> PictureChange:
    """A blur, a mask or noise, the one of a number in its corruption, without where it is.
    Refusals: E0207."""
    kind, block = kind_of(change), row.block
    assert isinstance(kind, ImageChange)
    # Pixels are drawn for the image that tiles are cut from, patches for each tile.
    own = row.draw_key if change.tokens is None else of_tile(row)
    seed = stable_hash(block.seed, block.name, own, row.run, number) % (1 << 64)
    return PictureChange(
        kind.of, _amount(row, kind, change), seed=seed if kind.of == "noise" else 0
    )


def _named(row: Row, part: ast.Node, picture: Picture) -> Sequence[Region | None]:
    """The occurrences of a region; None is the whole image."""
    assert isinstance(part, ast.Name)
    named = [each for each in row.block.spec.regions if each.name == part.id]
    return _regions(row, named[0], picture) if named else (None,)


def _swap(row: Row, change: ast.Change, picture: Picture) -> list[PictureChange]:
    """None where the row lacks a region. Refusals: E0503."""
    sides: list[Region] = []
    for part in change.values:
        found = _named(row, part, picture)
        if not found:
            return []
        region = found[0]
        if len(found) > 1 or region is None or region.box is None:
            reason = f"`{part.span.written}` is " + (
                f"{len(found)} boxes" if len(found) > 1 else "a mask"
            )
            raise bad(part.span, reason, "swap regions that are one box each")
        sides.append(region)
    first, second = sides
    _apart(first, second, change, picture)
    return [PictureChange("swap", region=first, other=second)]


def _apart(first: Region, second: Region, change: ast.Change, picture: Picture) -> None:
    """E0503 for boxes that overlap, or lie outside the image."""
    size = picture.size if picture.size != (0, 0) else (limits.IMAGE_SIDE, limits.IMAGE_SIDE)
    boxes = [whole_box(each, size) for each in (first, second)]
    for (left, top, right, bottom), part in zip(boxes, change.values, strict=True):
        if left >= right or top >= bottom:
            reason = f"`{part.span.written}` has no pixel of the image"
            raise bad(part.span, reason, "leave such rows out with `where`")
    (left, top, right, bottom), other = boxes
    if left < other[2] and other[0] < right and top < other[3] and other[1] < bottom:
        raise bad(change.span, "the boxes overlap", "leave such rows out with `where`")


def _amount(row: Row, kind: ImageChange, change: ast.Change) -> float:
    given = kind.amount(change)
    if given is None:
        return 0.0
    value: object = given
    if isinstance(given, str):
        value = plain(row.value(given, change.span))
    elif not isinstance(given, (int, float)):
        value = plain(evaluate(given, row, Key(f"{row.run}:{kind.name}")))
    if not isinstance(value, (int, float)) or not 0 < value <= kind.most:
        reason = f"takes a number above 0, up to {kind.most:,g}"
        hint = f"write `{kind.usage}`"
        raise Refusal(BadArgument, change.span, name=kind.name, reason=reason, hint=hint)
    return float(value)
