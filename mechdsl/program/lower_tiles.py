"""What a `tiles` line says: into how many rows and columns images are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechdsl.base import limits
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument, DuplicateName
from mechdsl.program.constants import Constant, whole_number
from mechdsl.program.lower_images import IMAGE, MEAN
from mechdsl.program.namespace import Namespace, place
from mechdsl.program.spec_tiles import TILE, Tiles
from mechdsl.syntax import ast

OWN_VALUES = (TILE, IMAGE)
"""What each row of tiles has as values: which it is, and of which image."""


def lower_tiles(
    line: ast.Tiles, scope: Namespace, parameters: Mapping[str, Constant]
) -> Tiles | None:
    """None after an error. Codes: E0201, E0207."""

    def refused(name: str, reason: str, hint: str) -> None:
        bad = BadArgument(span=line.span, name=name, reason=reason, hint=hint)
        scope.diagnostics.append(bad)

    written = (line.rows, line.cols)
    named = [scope.use("param", each, line.span) for each in written if isinstance(each, str)]
    if not all(named):
        return None
    sides = [whole_number(each, parameters) for each in written]
    for said, side in zip(written, sides, strict=True):
        if side is None or side < 1:
            hint = "write how many rows, then how many columns: `tiles 2 by 3`"
            return refused(str(said), "is no number of tiles, which is a whole one above 0", hint)
    rows, cols = (side or 1 for side in sides)
    if rows * cols == 1:
        return refused("tiles", "cuts nothing by `1 by 1`", "leave it out: each row is an image")
    if rows * cols > limits.TILES:
        reason = f"cuts each image into {rows * cols:,}, more than {limits.TILES:,}"
        return refused("tiles", reason, "write fewer rows and columns")
    return Tiles(span=line.span, rows=rows, cols=cols, whole=line.whole)


def misplaced(
    line: ast.Tiles, image: ast.Expr | None, names: Sequence[ast.Name]
) -> list[Diagnostic]:
    """E0202 and E0207 for tiles of what has none, and for values that are called as theirs.

    image: what the images of the block are made of. names: what it calls its own values.
    """
    first = f"what `tiles` {place(line.span, line.span)} gives each row"
    found: list[Diagnostic] = [
        DuplicateName(span=name.span, name=name.id, first=first)
        for name in names
        if name.id in OWN_VALUES
    ]
    drawn = image.name if isinstance(image, ast.Call | ast.OfRef) else None
    drawn = image.id if isinstance(image, ast.Name) else drawn
    if drawn in ("gray", "noise", MEAN):
        reason = f"cuts images that have a size of their own, and `image {drawn}` has the model's"
        hint = "leave it out: a block of one image is the other side of every tile"
        found.append(BadArgument(span=line.span, name="tiles", reason=reason, hint=hint))
    return found


def columns_of_tiles(tiles: Tiles, columns: Sequence[str]) -> list[Diagnostic]:
    """E0207 for columns of a data file that are called as values of tiles."""
    reason = "is a column, and what `tiles` gives each row"
    return [
        BadArgument(
            span=tiles.span,
            name=name,
            reason=reason,
            hint=f"call the column otherwise: `rename {{ file = {name} }}`",
        )
        for name in OWN_VALUES
        if name in columns
    ]
