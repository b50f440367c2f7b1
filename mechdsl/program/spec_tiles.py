"""Images that are cut into tiles: `tiles 2 by 3 and whole`."""

from __future__ import annotations

from mechdsl.program.spec_fields import Spec

TILE = "tile"
"""The value that says which tile a row is."""
WHOLE = "whole"


class Tiles(Spec):
    """Into how many rows and columns each image is cut."""

    rows: int
    cols: int
    whole: bool = False
    """Whether the uncut image is one more row."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the rows of one image are called, in the order of reading."""
        cut = [f"row {r + 1} col {c + 1}" for r in range(self.rows) for c in range(self.cols)]
        return (*cut, *([WHOLE] if self.whole else []))

    def box(self, name: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Where a tile lies in an image of this size, (height, width): (left, top, right, bottom),
        the ends exclusive; None of the whole image. Edges between two pixels go to the left and to
        the top, so that each pixel is in one tile."""
        if name == WHOLE:
            return None
        height, width = size
        row, col = divmod(self.names.index(name), self.cols)
        return (
            width * col // self.cols,
            height * row // self.rows,
            width * (col + 1) // self.cols,
            height * (row + 1) // self.rows,
        )

    @property
    def words(self) -> str:
        """What becomes of an image."""
        cut = f"cut into {self.rows} x {self.cols} tiles"
        return f"{cut}, and whole" if self.whole else cut
