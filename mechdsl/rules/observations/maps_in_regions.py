"""`observe pointing of caap in object`: whether maps lie in a region of their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import UnknownName, did_you_mean
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.in_progress import Work
from mechdsl.rules.observations.maps import Given, OfMaps, Setting
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import observation
from mechdsl.vocab.metrics import Form

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats


class InRegion(OfMaps):
    """`observe WORD of MAPS in REGION`."""

    example = "caap in object"
    blank = "is nowhere above 0"
    shares: ClassVar[bool] = False
    """Whether it takes `top 25%`."""

    def form_of(self, name: str) -> Form:
        if name == "chance":
            return replace(self.form, unit="part", meaning="What chance gives")
        return super().form_of(name)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        """Of the observation and of each control.

        values: [row, col] of patches. mask: [height, width]. share: of `top 25%`.
        """
        raise NotImplementedError

    def place(self, rule: spec.Rule) -> str:
        return _region(rule)

    def fits(self, rule: spec.Rule, work: Work) -> bool:
        said = rule.observed
        assert said is not None
        if said.region is None:
            hint = f"name one: `observe {self.word} of {said.maps[0].of} in object`"
            refuse(rule, work, "is set against a region", hint)
            return False
        ready = _region_there(rule, work)
        if said.share is not None and not self.shares:
            refuse(rule, work, "takes no `top`", "leave it out")
            return False
        if said.share is not None and not 0 < said.share <= 1:
            reason = f"can't take {100 * said.share:g}% of the patches"
            refuse(rule, work, reason, "write a share such as `top 25%`")
            return False
        return ready

    def settings(self, given: Given) -> Sequence[Setting]:
        assert given.rule.observed is not None
        region, share = _region(given.rule), given.rule.observed.share
        masks = _masks(region, given.work)

        def score(cell: int, number: int, values: Floats) -> Sequence[float]:
            return self.score(values, masks[number], share)

        return [Setting(masks, f"whose image has nothing of `{region}`", score)] * len(given.maps)


def _region(rule: spec.Rule) -> str:
    assert rule.observed is not None
    return rule.observed.region or ""


def _region_there(rule: spec.Rule, work: Work) -> bool:
    """E0201 for a region that the block hasn't."""
    name, block = _region(rule), work.program.prompts[work.table.name]
    known = [region.name for region in block.regions]
    if name in known or block.kind != "images":
        return True
    listed = f"`images {block.name}` has {name_list(known)}" if known else ""
    hint = listed or f"say where it is: `region {name} = box` in `images {block.name}`"
    hint = did_you_mean(name, known, hint)
    problem = UnknownName(span=rule.span, kind="region", name=name, hint=hint)
    work.diagnostics.append(problem)
    return False


def _masks(region: str, work: Work) -> dict[int, Bools]:
    """Number of a row → [height, width] which pixels of its image, as the model gets it, lie in a
    region; of rows that have any."""
    from mechdsl.images.pixels import mask_of

    reader = work.model.tokenizer
    assert isinstance(reader, ImageReader)
    found: dict[int, Bools] = {}
    for number, row in enumerate(work.table.runs["clean"].rows):
        assert row.image is not None
        mask = mask_of(row.regions.get(region, ()), row.image, reader.processing, reader.layout)
        if mask.any():
            found[number] = mask
    return found


# --- the words ------------------------------------------------------------------------------------


@observation("pointing", unit="share")
class Pointing(InRegion):
    """Whether the map is highest in a patch of which half or more lies in the region.

    Beside it stands the share of patches that do, what chance gives. Of several that are highest,
    the share.
    source: Zhang et al. 2018, Top-down neural attention by excitation backprop
    """

    controls = ("chance",)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        import numpy as np

        from mechdsl.fits.against_masks import pointing, shares

        inside = shares(mask, (values.shape[0], values.shape[1])) >= 0.5
        there = np.isfinite(values)
        chance = float(inside[there].mean()) if there.any() else float("nan")
        return pointing(values, mask), chance


@observation("mass", unit="part")
class Mass(InRegion):
    """Which share of what is above 0 in the map lies in the region.

    Beside it stands the region's share of the image, what a map has that is the same everywhere. A
    patch that is partly in it counts by its share of pixels.
    source: Arras et al. 2022, arXiv 2003.07258 (relevance mass accuracy)
    """

    controls = ("chance",)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.against_masks import mass

        found = mass(values, mask)
        return found, float(mask.mean()) if found == found else float("nan")


@observation("iou", unit="part")
class Overlap(InRegion):
    """Pixels that both the region and the highest patches have, over those that either has.

    As many patches as the region's share of the image, or `top 25%` of them.
    """

    shares = True

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.against_masks import iou

        return (iou(values, mask, share),)
