"""Rows that are tiles of images: which part of which image each of them is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e05_data import ImageTooSmall
from mechdsl.images.picture import Picture
from mechdsl.program.spec_tiles import TILE
from mechdsl.prompts.expressions import bad
from mechdsl.prompts.row_scope import Refusal
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.values import plain

if TYPE_CHECKING:
    from mechdsl.prompts.rows import Row


def cut(row: Row, picture: Picture) -> Picture:
    """The tile of its image that a row is; the image where that isn't cut. Refusals: E0503,
    E0561."""
    tiles = row.block.spec.tiles
    if tiles is None:
        return picture
    tile, names = plain(row.value(TILE, tiles.span)), tiles.names
    if not isinstance(tile, str) or tile not in names:
        hint = f"tiles are {name_list(names)}"
        hint = did_you_mean(tile, names, hint) if isinstance(tile, str) else hint
        raise bad(tiles.span, f"`tile` is {tile!r}, which is none of them", hint)
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


def of_tile(row: Row) -> int:
    """What draws hang on that each tile has by itself, whatever the order of a data file; of other
    rows what all draws hang on."""
    return (
        row.draw_key
        if row.block.spec.tiles is None
        else stable_hash(row.draw_key, row.values[TILE])
    )


def drawn_by(row: Row, path: str) -> int:
    """What a draw hangs on: tiles of an image share it, but for which tile another one is.

    path: what is drawn, as its key has it.
    """
    return of_tile(row) if path.split(".")[0] == f"{row.run}:{TILE}" else row.draw_key


def image_of(row: Row) -> str:
    """What the image is called that a row is a tile of: no two images have the same."""
    picture = row.uncut
    assert picture is not None
    return picture.words if picture.how == "file" else picture.text
