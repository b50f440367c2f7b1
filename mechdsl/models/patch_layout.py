"""How an encoder of images divides them into tokens, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mechdsl.images.patches import PatchLayout
from mechdsl.models.adapters import Family

MOST_PIXELS = 4096
"""Of a side of an image."""


def patch_layout(entry: type[Family], config: Mapping[str, Any]) -> PatchLayout | None:
    """The layout; None where it isn't known of the kind. config: of the encoder."""
    front = entry.in_front(config)
    patch, size = (_sides(config.get(key)) for key in ("patch_size", "image_size"))
    if front is None or patch is None or size is None:
        return None
    return PatchLayout(front, patch, size, entry.any_size(config))


def _sides(value: object) -> tuple[int, int] | None:
    """(height, width) of what may be a square."""
    sides = cast("list[object]", value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(isinstance(n, int) and 0 < n <= MOST_PIXELS for n in sides):
        return None
    return cast("tuple[int, int]", tuple(sides))
