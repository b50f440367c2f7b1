"""What the image of a row is made of: a file, shapes, gray, noise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e05_data import ImageNotRead
from mechdsl.images import files
from mechdsl.images.picture import GRAY, Picture
from mechdsl.program.named_paths import IMAGE, path_to_read
from mechdsl.prompts.expressions import bad, evaluate
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.values import plain
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.prompts.rows import Row

_SIDE = 32


def picture_of(row: Row, node: ast.Expr) -> Picture:
    """The image of a row. Refusals: E0207, E0503, E0560 and those of values."""
    match node:
        case ast.String():
            return _of_file(row, node)
        case ast.OfRef():
            return row.block.averaged or Picture("gray", level=GRAY)
        case ast.Name(id="noise"):
            return Picture("noise", seed=_seed(row))
        case ast.Call(name="gray"):
            level = _number(row, node, node.arguments[0].value, "a level", 0, 255)
            return Picture("gray", level=level)
        case ast.Call(name="shapes"):
            return _of_shapes(row, node)
        case _:
            return Picture("gray", level=GRAY)


def _seed(row: Row) -> int:
    block = row.block
    return stable_hash(block.seed, block.name, row.draw_key, "image") % (1 << 64)


def not_read(span: Span, written: str, reason: str, hint: str) -> Refusal:
    """E0560 for a path as it is written."""
    return Refusal(ImageNotRead, span, path=written, reason=reason, hint=hint)


def look(row: Row, written: str, span: Span) -> tuple[Path, str, tuple[int, int]]:
    """Where an image lies that a row names, SHA-256 of its bytes, (height, width). Refusals: E0560
    and those of paths."""
    path, problems = path_to_read(IMAGE, written, span)
    if path is None:
        raise Refusal.of(problems[0])
    try:
        return path, *row.block.image_files.look(path)
    except files.NotRead as error:
        raise not_read(span, written, error.reason, error.hint) from None


def _of_file(row: Row, node: ast.String) -> Picture:
    written = row.text(node, Key("image")).text
    if not written.strip():
        hint = "leave rows without an image out with `where`"
        raise not_read(node.span, written, "the row names none", hint)
    path, digest, size = look(row, written, node.span)
    return Picture("file", path=path, digest=digest, said=written, size=size)


def _of_shapes(row: Row, node: ast.Call) -> Picture:
    given = {each.name: each.value for each in node.arguments}
    if "kind" not in given:
        raise _wrong(node, "needs a kind", 'write `shapes(n: 1, kind: "circle", size: 32)`')
    told: dict[str, str] = {}
    for name in ("kind", "colour", "texture"):
        value = (
            plain(evaluate(_expr(given[name]), row, Key(f"image.{name}"))) if name in given else ""
        )
        if not isinstance(value, str):
            raise bad(given[name].span, f"a {name} is a text", 'write one in quotes: `"circle"`')
        told[name] = value
    count = size = None
    if "n" in given:
        count = _number(row, node, given["n"], "a number of shapes", 1, 1_000)
    if "size" in given:
        size = _number(row, node, given["size"], "a size", 1, limits.IMAGE_SIDE)
    count, size = count or 1, size or _SIDE
    problem = _cannot_draw(told["kind"], count, size, told["colour"], told["texture"])
    if problem:
        raise bad(node.span, problem, "change what is drawn")
    return Picture(
        "shapes",
        kind=told["kind"],
        count=count,
        colour=told["colour"],
        texture=told["texture"],
        size=(size, size),
        seed=_seed(row),
    )


def _expr(node: object) -> ast.Expr:
    assert isinstance(node, ast.Node)
    return node  # type: ignore[return-value]


@cache
def _cannot_draw(kind: str, count: int, size: int, colour: str, texture: str) -> str:
    """Why such shapes can't be drawn; empty where they can. That hangs on no draw."""
    import numpy as np

    from mechdsl.images.shapes import draw

    try:
        draw(kind, count, size, np.random.default_rng(0), colour=colour, texture=texture)
    except ValueError as error:
        return str(error)
    return ""


def _number(row: Row, node: ast.Call, value: object, what: str, least: int, most: int) -> int:
    expression = _expr(value)
    found = plain(evaluate(expression, row, Key("image.number")))
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != int(found):
        raise bad(expression.span, f"{what} is a whole number", f"write one from {least} to {most}")
    if not least <= found <= most:
        reason = f"takes {what} from {least:,} to {most:,}, not {found:,g}"
        raise _wrong(node, reason, f"write one from {least} to {most}")
    return int(found)


def _wrong(node: ast.Call, reason: str, hint: str) -> Refusal:
    return Refusal(BadArgument, node.span, name=node.name, reason=reason, hint=hint)
