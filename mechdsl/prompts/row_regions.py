"""Regions of a row's image, and what a corruption does to it."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, cast

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.images.picture import Picture, PictureChange
from mechdsl.images.regions import Region
from mechdsl.program import spec
from mechdsl.prompts.expressions import bad, evaluate
from mechdsl.prompts.images_block import is_drawn_mask
from mechdsl.prompts.row_pictures import look, not_read
from mechdsl.prompts.row_scope import Key, Refusal
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
    """What the corruption does to the image. Refusals: E0207 and those of regions."""
    found: list[PictureChange] = []
    for number, change in enumerate(row.image_changes):
        kind = kind_of(change)
        assert isinstance(kind, ImageChange)
        part, amount = kind.part(change), _amount(row, kind, change)
        block = row.block
        seed = stable_hash(block.seed, block.name, row.draw_key, row.run, number) % (1 << 64)
        seed = seed if kind.of == "noise" else 0
        own: tuple[Region | None, ...] = (None,)
        named = [each for each in block.spec.regions if each.name == part.id]
        if named:
            own = tuple(_regions(row, named[0], picture))
        found += [PictureChange(kind.of, amount, region, seed) for region in own]
    return tuple(found)


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
