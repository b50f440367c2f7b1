"""The image of a row, with its regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from mechdsl.images.picture import Picture
from mechdsl.images.regions import Region
from mechdsl.prompts.row_pictures import picture_of
from mechdsl.prompts.row_regions import changes_of, regions_of
from mechdsl.prompts.row_tiles import cut
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.prompts.rows import Row

_NO_REGIONS: Mapping[str, tuple[Region, ...]] = MappingProxyType({})
OF_IMAGES = ("uncut", "image", "regions")
"""What is worked out anew where something of the row changes."""


class WithImage:
    """What a row of images has beside its values. Raises `Refusal`."""

    image_changes: list[ast.Change]
    """What the corruption does to the image."""

    @cached_property
    def uncut(self) -> Picture | None:
        """What its image is made of, of a row of images, before anything is done to it."""
        row = cast("Row", self)
        made_of = row.block.spec.image
        return None if made_of is None else picture_of(row, made_of)

    @cached_property
    def image(self) -> Picture | None:
        """The same with what is done to it, or the tile of it that the row is."""
        row, made = cast("Row", self), self.uncut
        if made is None:
            return None
        made = cut(row, made)
        return replace(made, changes=changes_of(row, made)) if self.image_changes else made

    @cached_property
    def regions(self) -> Mapping[str, tuple[Region, ...]]:
        """Parts of its image, by name."""
        return _NO_REGIONS if self.image is None else regions_of(cast("Row", self), self.image)
