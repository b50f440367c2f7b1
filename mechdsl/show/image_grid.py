"""Tokens of an image, drawn as the grid that they stand in."""

from __future__ import annotations

from collections.abc import Iterable

from mechdsl.images.patches import PatchLayout

HIT, LEFT = "■", "·"
DRAWN = 4
"""Positions that are drawn; more are listed alone."""


def grid_lines(layout: PatchLayout, tokens: Iterable[int]) -> list[str]:
    """One line for each row of patches; those that are hit are filled."""
    hit = set(tokens)
    return [
        "".join(HIT if layout.token(row, col) in hit else LEFT for col in range(1, layout.cols + 1))
        for row in range(1, layout.rows + 1)
    ]


def ranges(tokens: Iterable[int]) -> str:
    """`0, 4..7`."""
    found: list[list[int]] = []
    for token in sorted(tokens):
        if found and token == found[-1][-1] + 1:
            found[-1].append(token)
        else:
            found.append([token])
    return ", ".join(str(own[0]) if len(own) == 1 else f"{own[0]}..{own[-1]}" for own in found)
