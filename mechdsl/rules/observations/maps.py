"""`observe pointing of caap in object`: maps that other experiments made, against regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import UnknownName, did_you_mean
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import Hits, PositionCell
from mechdsl.resolve.findings import Finding, Refused, VariantFinding
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.pickable import check_tokens
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import (
    Convention,
    Key,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import Kind, observation
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats

NOWHERE = SitePoint("embed", None, None)
"""A rule has a site: this one is neither read nor written."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What maps are worth, where those that they are of have run."""

    by_word: Mapping[str, Floats]
    """Of the observation and of each control, [cell, row of the table]; NaN without a map or a
    region."""


class OfMaps(OverRows, Kind):
    """`observe WORD of MAPS in REGION`: a number of each row's map."""

    unplaced = "last token"
    reads_vectors = False
    of_maps = True
    shares: ClassVar[bool] = False
    """Whether it takes `top 25%`."""

    def __init__(self, said: str = "", scores: Scores | None = None) -> None:
        """said: of the maps, for a table. scores: None before they have been made."""
        self._said, self.scores = said, scores

    def form_of(self, name: str) -> Form:
        if name == "chance":
            return replace(self.form, unit="part", meaning="What chance gives")
        return super().form_of(name)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        """Of the observation and of each control.

        values: [row, col] of patches. mask: [height, width]. share: of `top 25%`.
        """
        raise NotImplementedError

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.observed is not None
        if not rule.observed.maps:
            refuse(rule, work, "is of maps", f"write `observe {self.word} of caap in object`")
            return None
        ready = [self._stands_alone(rule, work), self._region_there(rule, work)]
        found = [self._map(rule, each, work) for each in rule.observed.maps]
        maps = [part for part in found if part is not None]
        if not all(ready) or len(maps) < len(found):
            return None
        sites = self._sites(rule, maps, work)
        if sites is None:
            return None
        cell = _region(rule.observed.region or "", work)
        places = PositionTargets((), {(): cell}, {(): cell})
        try:
            does = self._scored(rule, maps, work)
        except Refused as refusal:
            refuse(rule, work, refusal.reason, refusal.hint)
            return None
        return ResolvedRule(
            spec=rule, does=does, run=work.experiment.base, sites=sites, positions=places
        )

    # --- what it is of ----------------------------------------------------------------------------

    def _stands_alone(self, rule: spec.Rule, work: Work) -> bool:
        assert rule.observed is not None
        share, fits = rule.observed.share, True
        if any(each.verb != "observe" for each in work.experiment.rules):
            reason = "is of maps that have been made, which rules don't change"
            refuse(rule, work, reason, "write the rules into the experiment that makes the map")
            fits = False
        if share is not None and not self.shares:
            refuse(rule, work, "takes no `top`", "leave it out")
            fits = False
        elif share is not None and not 0 < share <= 1:
            reason = f"can't take {100 * share:g}% of the patches"
            refuse(rule, work, reason, "write a share such as `top 25%`")
            fits = False
        return fits

    def _region_there(self, rule: spec.Rule, work: Work) -> bool:
        """E0201 for a region that the block hasn't; E0207 where rows are no images."""
        said = rule.observed
        assert said is not None
        block = work.program.prompts[work.table.name]
        if block.kind != "images":
            refuse(rule, work, f"is of images, and `{block.name}` has texts", "name images")
            return False
        known = [region.name for region in block.regions]
        if said.region in known:
            return True
        listed = f"`images {block.name}` has {name_list(known)}" if known else ""
        hint = listed or f"say where it is: `region {said.region} = box` in `images {block.name}`"
        hint = did_you_mean(said.region or "", known, hint)
        problem = UnknownName(span=rule.span, kind="region", name=said.region or "", hint=hint)
        work.diagnostics.append(problem)
        return False

    def _map(self, rule: spec.Rule, named: ast.MapOf, work: Work) -> VariantFinding | None:
        finding: Finding | None = work.sites.onward.found.get(named.of)
        if finding is None:  # which has been refused
            return None
        try:
            return _checked(finding, work)
        except Refused as refusal:
            refuse(rule, work, refusal.reason, refusal.hint)
            return None

    def _sites(
        self, rule: spec.Rule, maps: Sequence[VariantFinding], work: Work
    ) -> SiteTargets | None:
        """Cells: one for each map, or, of one map, for each of its cells beside its positions."""
        assert rule.observed is not None
        names = [each.span.written for each in rule.observed.maps]  # not those of results
        if len(names) == 1:
            own = maps[0].experiment
            axes = tuple(axis for axis in own.axes if axis.name != "position")
            work.sites.nested = own.own_loops
        else:
            swept = next((part for part in maps if len(part.experiment.axes) > 1), None)
            if swept is not None:
                others = [a.name for a in swept.experiment.axes if a.name != "position"]
                reason = f"`{swept.experiment.name}` has a map for each {' and '.join(others)}"
                refuse(rule, work, reason, "observe it by itself, or let it have one map")
                return None
            axes = (Axis("map", tuple(names), rule.observed.span),)
        for axis in axes:
            work.add_axis(axis)
        keys = list(_keys(axes))
        label = names[0] if len(names) == 1 else ""
        return SiteTargets(
            tuple(axis.name for axis in axes),
            dict.fromkeys(keys, (NOWHERE,)),
            {key: label or names[key[0]] for key in keys},
        )

    # --- its numbers ------------------------------------------------------------------------------

    def _scored(self, rule: spec.Rule, maps: Sequence[VariantFinding], work: Work) -> OfMaps:
        """With the numbers of rows, where the maps have been made. Refusals: Refused."""
        said = rule.observed
        assert said is not None
        waits = [part.experiment.name for part in maps if part.values is None]
        if waits or work.table.stands_in:
            return type(self)(f"known when {name_list(waits)} has run" if waits else "")
        import numpy as np

        assert said.region is not None
        masks = _masks(said.region, work)
        cells: list[Floats] = []
        dropped = {f"whose image has nothing of `{said.region}`": len(work.table) - len(masks)}
        for part in maps:
            grids, name = grids_of(part, work), part.experiment.name
            if not grids:
                raise Refused(
                    f"`{name}` has none of the {len(work.table)} rows that this experiment runs on",
                    "let both run on the same part and limit of their images",
                )
            found = self._of_map(grids, masks, said.share, work)
            dropped[f"`{name}` lacks them"] = len(work.table) - len(grids)
            nowhere = [
                np.isnan(found[0, :, number]).all()
                for number, row in enumerate(work.table.row_ids)
                if row in grids and number in masks
            ]
            dropped[f"where `{name}` is nowhere above 0"] = sum(map(bool, nowhere))
            cells.append(found)
        measures = dict.fromkeys(part.measure for part in maps)
        parts = [f"by each row's own {' or '.join(measures)}, signed"]
        parts += [
            f"{n} of {len(work.table)} rows dropped, {why}" for why, n in dropped.items() if n
        ]
        every = np.concatenate(cells, axis=1)
        words = (self.word, *self.controls)
        return type(self)("; ".join(parts), Scores(dict(zip(words, every, strict=True))))

    def _of_map(
        self,
        grids: Mapping[int, Floats],
        masks: Mapping[int, Bools],
        share: float | None,
        work: Work,
    ) -> Floats:
        """[word, cell, row of the table] of one experiment; NaN without a map or a region."""
        import numpy as np

        count = len(next(iter(grids.values())))
        found = np.full((1 + len(self.controls), count, len(work.table)), np.nan)
        for number, row in enumerate(work.table.row_ids):
            if row in grids and number in masks:
                for cell, values in enumerate(grids[row]):
                    found[:, cell, number] = self.score(values, masks[number], share)
        return found

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        text = f"{self.word}: {said}"
        yield Convention("observed", f"{text}; {self._said}" if self._said else text)


def _region(name: str, work: Work) -> PositionCell:
    """Its patches in each row: they are shown, and neither read nor written."""
    hits: list[Hits] = []
    for row in work.table.runs["clean"].rows:
        tokens = {token for own in row.places.get(name, ()) for token in own}
        hits.append((tuple(sorted(tokens)),) if tokens else ())
    return PositionCell(name, tuple(hits))


def _keys(axes: Sequence[Axis]) -> Iterator[Key]:
    from itertools import product

    yield from product(*(range(len(axis)) for axis in axes))


def _checked(finding: Finding, work: Work) -> VariantFinding:
    """The one map of each row. Refusals: Refused."""
    part, *others = finding.parts
    if others:
        raise Refused(
            f"`{finding.name}` runs more than once: it compares models, sources or bases",
            "name an experiment with one source and one base",
        )
    hint = "let it sweep patches: `at each token of image`"
    reader = work.model.tokenizer
    check_tokens(part.experiment, work.table, reader, hint)
    if reader.stands_in or not isinstance(reader, ImageReader):
        return part
    places = part.positions(work.table, work.experiment.base, reader)
    other = next((token for *_, token in places if reader.layout.place(token) is None), None)
    if other is not None:
        reason = f"`{finding.name}` has a number for `{reader.label(other)}`, which is no patch"
        raise Refused(reason, "let it sweep patches alone: `at each token of image`")
    return part


def grids_of(part: VariantFinding, work: Work) -> dict[int, Floats]:
    """Row id → [cell, row of patches, column]: its numbers, NaN where a patch has none."""
    import numpy as np

    reader = work.model.tokenizer
    assert isinstance(reader, ImageReader)
    layout = reader.layout
    found: dict[int, Floats] = {}
    for row, token, values in part.by_token(work.table, work.experiment.base, reader):
        place = layout.place(token)
        assert place is not None
        shape = (len(values), layout.rows, layout.cols)
        grid = found.setdefault(row, np.full(shape, np.nan))
        grid[:, place[0] - 1, place[1] - 1] = values
    return found


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
class Pointing(OfMaps):
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
class Mass(OfMaps):
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
class Overlap(OfMaps):
    """Pixels that both the region and the highest patches have, over those that either has.

    As many patches as the region's share of the image, or `top 25%` of them.
    """

    shares = True

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.against_masks import iou

        return (iou(values, mask, share),)
