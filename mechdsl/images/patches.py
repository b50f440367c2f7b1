"""Which part of an image is which token of a model."""

from __future__ import annotations

from functools import cached_property

from mechdsl.base.record import Record, record


@record
class PatchLayout(Record):
    """How a model divides an image into tokens: some in front, then patches row by row."""

    front: tuple[str, ...]
    """What stands in front of the patches: `cls`, `distillation`, `register`, each as often as it
    does."""
    patch: tuple[int, int]
    """(height, width) of a patch in pixels of the prepared image."""
    size: tuple[int, int]
    """(height, width) of the prepared image."""
    any_size: bool = False
    """It reads images of other sizes too: `size` is that of the config."""

    @cached_property
    def rows(self) -> int:
        return self.size[0] // self.patch[0]

    @cached_property
    def cols(self) -> int:
        return self.size[1] // self.patch[1]

    @property
    def tokens(self) -> int:
        """All of them."""
        return len(self.front) + self.rows * self.cols

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The tokens of the patches, row by row."""
        return tuple(range(len(self.front), self.tokens))

    @property
    def names(self) -> tuple[str, ...]:
        """Of what stands in front, each once."""
        return tuple(dict.fromkeys(self.front))

    def named(self, name: str) -> tuple[int, ...]:
        """The tokens in front of the patches that have a name."""
        return tuple(n for n, own in enumerate(self.front) if own == name)

    def token(self, row: int, col: int) -> int:
        """The token of a patch; rows and columns count from 1, from the top left."""
        return len(self.front) + (row - 1) * self.cols + (col - 1)

    def place(self, token: int) -> tuple[int, int] | None:
        """Row and column of a token, from 1; None of one in front."""
        at = token - len(self.front)
        return None if at < 0 else (at // self.cols + 1, at % self.cols + 1)

    def box(self, token: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a patch in the prepared image, the ends exclusive."""
        place = self.place(token)
        assert place is not None
        (row, col), (height, width) = place, self.patch
        top, left = (row - 1) * height, (col - 1) * width
        return left, top, left + width, top + height
