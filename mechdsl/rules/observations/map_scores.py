"""Scores of maps: against a region of the image, and against other experiments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.syntax import UnknownName
from mechdsl.program import spec
from mechdsl.prompts.runs import PositionCell
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.findings import PickError, VariantFinding
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.targets import resolve_base_positions
from mechdsl.resolve.types import ResolvedExperiment, ResolvedRule
from mechdsl.rules.observations.maps import (
    MapLine,
    MapObservation,
    MapReference,
    build_grids,
    check_map,
    find_map_finding,
    grid_size,
    is_on_texts,
    span_cell,
)
from mechdsl.rules.observations.registry import observation, report_bad_observation
from mechdsl.vocab.metrics import MetricForm

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats


class RegionObservation(MapObservation):
    """`observe WORD of MAPS in REGION`: a comparison of maps with a region of the image, or with
    tokens of the text."""

    example = "caap in object"
    texts = True
    blank = "has no value above 0"
    shares: ClassVar[bool] = False
    """Whether the observation accepts `top 25%`."""

    def form_of(self, name: str) -> MetricForm:
        if name == "chance":
            return replace(self.form, unit="part", meaning="What chance gives")
        return super().form_of(name)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        """Compute the scores of the observation and of each control.

        Args:
            values: Values of the patches, [row, col].
            mask: Pixels of the region, [height, width].
            share: The share of `top 25%`; None without one.
        """
        raise NotImplementedError

    def shown(self, rule: spec.Rule, work: ExperimentContext) -> PositionCell | None:
        return _region_tokens(rule, work) if is_on_texts(work) else span_cell(_region(rule), work)

    def fits(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        said = rule.observed
        assert said is not None
        if said.region is None:
            texts = is_on_texts(work)
            one = "name token" if texts else "object"
            hint = f"name one: `observe {self.word} of {said.maps[0].of} in {one}`"
            reason = f"is compared with {'tokens' if texts else 'a region'}"
            report_bad_observation(rule, work, reason, hint)
            return False
        ready = _check_region(rule, work)
        if said.share is not None and not self.shares:
            report_bad_observation(rule, work, "takes no `top`", "remove it")
            return False
        if said.share is not None and not 0 < said.share <= 1:
            reason = f"can't take {100 * said.share:g}% of the patches"
            report_bad_observation(rule, work, reason, "write a share such as `top 25%`")
            return False
        return ready

    def settings(self, given: MapLine) -> Sequence[MapReference]:
        assert given.rule.observed is not None
        region, share = _region(given.rule), given.rule.observed.share
        texts = is_on_texts(given.work)
        masks = _token_masks(given) if texts else _masks(region, given.work)
        lacking = f"whose {'text' if texts else 'image'} contains no part of `{region}`"

        def score(cell: int, number: int, values: Floats) -> Sequence[float]:
            return self.score(values, masks[number], share)

        return [MapReference(masks, lacking, score)] * len(given.maps)


def _region(rule: spec.Rule) -> str:
    assert rule.observed is not None
    return rule.observed.region or ""


def _check_region(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Report E0201 for a region that the prompt set doesn't define, and E0207 for a position of an
    image or a region of a text."""
    name, block = _region(rule), work.program.prompts[work.table.name]
    known = [region.name for region in block.regions]
    assert rule.observed is not None
    by_tokens, texts = rule.observed.in_tokens, is_on_texts(work)
    if by_tokens != texts:
        hint = f"write a position: `{name} token`" if texts else "name a region: `in object`"
        reason = f"compares maps of {'texts with tokens' if texts else 'images with a region'}"
        report_bad_observation(rule, work, reason, hint)
        return False
    if texts or name in known:
        return True
    listed = f"`images {block.name}` has {name_list(known)}" if known else ""
    hint = listed or f"define it: `region {name} = box` in `images {block.name}`"
    hint = did_you_mean(name, known, hint)
    problem = UnknownName(span=rule.span, kind="region", name=name, hint=hint)
    work.diagnostics.append(problem)
    return False


def _region_tokens(rule: spec.Rule, work: ExperimentContext) -> PositionCell | None:
    """Return the tokens of a text that maps are compared with; None after an error."""
    position_targets = resolve_base_positions(rule.at, work)
    if position_targets is None:
        return None
    if position_targets.axes:
        hint = "join them: `first-item token` has one, `{item token, name token}` has several"
        report_bad_observation(
            rule, work, f"can't be compared with `{_region(rule)}`, which is a sweep", hint
        )
        return None
    return next(iter(position_targets.written.values()))


def _token_masks(given: MapLine) -> dict[int, Bools]:
    """Return row number → tokens of the text that are in the region, [1, token].

    Rows without such tokens are omitted.
    """
    import numpy as np

    token_masks: dict[int, Bools] = {}
    for number, hits in enumerate(given.shown.hits):
        mask = np.zeros(grid_size(number, given.work), dtype=bool)
        mask[0, [token for hit in hits for token in hit]] = True
        if mask.any():
            token_masks[number] = mask
    return token_masks


def _masks(region: str, work: ExperimentContext) -> dict[int, Bools]:
    """Return row number → pixels of the preprocessed image that are in a region, [height, width].

    Rows without such pixels are omitted.
    """
    from mechdsl.images.pixels import region_mask

    reader = work.model.tokenizer
    assert isinstance(reader, ImageTokenizer)
    masks: dict[int, Bools] = {}
    for number, row in enumerate(work.table.runs["clean"].rows):
        assert row.image is not None
        mask = region_mask(row.regions.get(region, ()), row.image, reader.processing, reader.layout)
        if mask.any():
            masks[number] = mask
    return masks


# --- the words ------------------------------------------------------------------------------------


@observation("pointing", unit="share")
class RegionPointing(RegionObservation):
    """Whether the map has its maximum in the region.

    A token is in the region or not; of a patch, at least half of the pixels must be. The control
    `chance` is the share of such tokens or patches. For tied maxima, it is the share of them in the
    region.
    source: Zhang et al. 2018, Top-down neural attention by excitation backprop
    """

    controls = ("chance",)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        import numpy as np

        from mechdsl.fits.agreement import mask_shares, pointing_game

        inside = mask_shares(mask, (values.shape[0], values.shape[1])) >= 0.5
        there = np.isfinite(values)
        chance = float(inside[there].mean()) if there.any() else float("nan")
        return pointing_game(values, mask), chance


@observation("mass", unit="part")
class RegionMass(RegionObservation):
    """Share of the positive values of the map that is in the region.

    The control `chance` is the region's share of the image or of the tokens with a value, which a
    map with equal values has. A patch that is partly in the region counts by its share of pixels.
    source: Arras et al. 2022, arXiv 2003.07258 (relevance mass accuracy)
    """

    controls = ("chance",)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.agreement import chance_mass, relevance_mass

        score = relevance_mass(values, mask)
        return score, chance_mass(values, mask) if score == score else float("nan")


@observation("iou", unit="part")
class RegionOverlap(RegionObservation):
    """Intersection over union of the region and the patches or tokens with the largest values.

    Their number is the region's share of the image, or the number of tokens in it; `top 25%` is a
    share of the patches or tokens with a value.
    """

    shares = True

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.agreement import iou

        return (iou(values, mask, share),)


@observation("f1", unit="part")
class RegionF1(RegionOverlap):
    """The F1 score of the patches or tokens with the largest values, which should be the region.

    Their number is that of `iou`; without `top`, precision, recall and F1 are equal on texts.
    """

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.agreement import f1

        return (f1(values, mask, share),)


@observation("auroc", unit="share")
class RegionAuroc(RegionObservation):
    """How often a token in the region has a larger value than one outside of it.

    Only tokens or patches with a value count, and ties count half. Of a patch, at least half of the
    pixels must be in the region. The control `chance` is 0.5, which a map with equal values has.
    source: Hanley and McNeil 1982, Radiology 143(1)
    """

    blank = "has no value in the region, or none outside of it"
    controls = ("chance",)

    def score(self, values: Floats, mask: Bools, share: float | None) -> Sequence[float]:
        from mechdsl.fits.agreement import mask_auroc

        score = mask_auroc(values, mask)
        return score, 0.5 if score == score else score


REMOVAL_VERBS = ("replace", "ablate", "patch")
"""Rules that remove all information of a patch."""


class MapComparison(MapObservation):
    """`observe WORD of MAPS to EXPERIMENTS`: a comparison of maps with other experiments."""

    several: ClassVar[bool] = False
    """Whether each map is compared with a separate experiment, instead of one for all maps."""

    def fits(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        said = rule.observed
        assert said is not None
        wanted = len(said.maps) if self.several else 1
        if not said.others:
            reason = "is compared with a different experiment, not with a region"
            report_bad_observation(
                rule, work, reason, f"write `observe {self.word} of {self.example}`"
            )
        elif len(said.others) != wanted:
            written = f"{len(said.others)} after `to`"
            reason = (
                f"has {written} for {len(said.maps)} maps" if self.several else f"has {written}"
            )
            each = "for each map, in the same order" if self.several else "experiment"
            report_bad_observation(rule, work, reason, f"name one {each}")
        return len(said.others) == wanted


# --- infidelity -----------------------------------------------------------------------------------


@observation("infidelity")
class Infidelity(MapComparison):
    """How far what maps say of sets of patches is from what taking them out does, squared.

    The mean over the sets, the map scaled in each row so that this is least, by no number below 0.
    Beside it stands what a map has that is the same everywhere.
    source: Yeh et al. 2019, arXiv 1901.09392, definition 2.1
    """

    example = "caap to taken"
    blank = "has no number for a removed patch"
    controls = ("chance",)

    def form_of(self, name: str) -> MetricForm:
        form = super().form_of(name)
        same = "What a map has that is the same everywhere"
        return replace(form, meaning=same) if name == "chance" else form

    def others(self, given: MapLine) -> Sequence[Sequence[VariantFinding]] | None:
        assert given.rule.observed is not None
        finding = find_map_finding(given.rule.observed.others[0], given.work)
        if finding is None:
            return None
        part, *more = finding.parts
        if more:
            raise PickError(f"`{finding.name}` runs more than once", "give it a single base")
        _check_removal(part, given.work)
        return ((part,),)

    def settings(self, given: MapLine) -> Sequence[MapReference]:
        import numpy as np

        from mechdsl.fits.agreement import infidelity

        part = _compared_variant(given)
        removals = _read_removals(part, given.work)

        def score(cell: int, number: int, values: Floats) -> Sequence[float]:
            own = infidelity(values, *removals[number])
            same = infidelity(np.ones_like(values), *removals[number])
            return own, same if own == own else own

        lacking = (
            f"which `{part.experiment.name}` doesn't remove two different sets of patches from"
        )
        return [MapReference(removals, lacking, score)] * len(given.maps)

    def unit_of(self, given: MapLine) -> str:
        return f"{_compared_variant(given).experiment.measures[0].unit or 'number'}²"

    def details(self, given: MapLine) -> Iterator[str]:
        part = _compared_variant(given)
        sets, measure = sum(1 for _ in part.grid()), part.experiment.measures[0].text
        yield (
            f"the {sets} sets of patches and the decrease of `{measure}` are those of "
            f"`{part.experiment.name}`"
        )
        yield (
            "each map is scaled by the nonnegative factor that fits these decreases best in the row"
        )


def _compared_variant(given: MapLine) -> VariantFinding:
    """Return the single experiment that removes patches."""
    ((part,),) = given.others
    return part


def _check_removal(part: VariantFinding, work: ExperimentContext) -> None:
    """Check that an experiment removes sets of patches from the images, and measures the effect.

    Raises:
        PickError: If it doesn't.
    """
    own = part.experiment
    name, first = f"`{own.name}`", own.spec.measures[:1]
    if own.table.name != work.table.name:
        reason = (
            f"{name} runs on `{own.table.name}`, but this experiment runs on `{work.table.name}`"
        )
        raise PickError(reason, "use the same block of images in both")
    if own.spec.base != work.experiment.base:
        reason = f"{name} inserts patches into `{own.spec.base}` and removes none from the images"
        raise PickError(reason, f"remove them: `from {own.spec.base} into {work.table.name}`")
    other = next((rule for rule in own.rules if rule.spec.verb not in REMOVAL_VERBS), None)
    if other is not None or not own.rules:
        does = "nothing" if other is None else f"`{other.spec.verb}`"
        hint = "write such a rule: `replace top 4 of chance(draw: d) tokens with gray`"
        raise PickError(f"{name} removes no patches: it has {does}", hint)
    if not first or first[0].effect != "delta" or own.spec.estimator is not None:
        raise PickError(
            f"{name} doesn't measure the effect of removing patches",
            "measure it: `measure logit(answer) as delta`, without `using`",
        )
    if own.n_there < 2:
        raise PickError(
            f"{name} removes only one set of patches, and scaling can match any single number",
            "remove several sets: `for d in 1..20 { … }`",
        )
    reader = work.model.tokenizer
    if reader.stands_in or not isinstance(reader, ImageTokenizer):
        return
    cells = (cell for rule in own.rules for cell in rule.positions.written.values())
    tokens = {token for cell in cells for row in cell.hits for hit in row for token in hit}
    outside = next((t for t in sorted(tokens) if reader.layout.place(t) is None), None)
    if outside is not None:
        reason = f"{name} changes `{reader.label(outside)}`, which isn't a patch"
        raise PickError(reason, "let it remove only patches")


def _read_removals(
    part: VariantFinding, work: ExperimentContext
) -> Mapping[int, tuple[Bools, Floats]]:
    """Return the removed patches and the decreases of the output, by row number.

    Rows from which fewer than two sets are removed are omitted.

    Returns:
        Row number → removed patches, [set, row, col], and decreases, [set].
    """
    import numpy as np

    own, reader, values = part.experiment, work.model.tokenizer, part.values
    assert isinstance(reader, ImageTokenizer)
    assert values is not None
    names, cells = [axis.name for axis in own.axes], list(part.grid())
    numbers = [number for number, _ in cells]
    columns = {row: column for column, row in enumerate(part.row_ids)}
    prompts = {row: prompt for prompt, row in enumerate(own.table.row_ids)}
    removals: dict[int, tuple[Bools, Floats]] = {}
    for number, row in enumerate(work.table.row_ids):
        if row not in columns:
            continue
        taken = np.zeros((len(cells), reader.layout.rows, reader.layout.cols), dtype=bool)
        for rule in own.rules:
            along = [names.index(axis) for axis in rule.positions.axes]
            for which, (_, index) in enumerate(cells):
                spot = rule.positions.written[tuple(index[axis] for axis in along)]
                for token in (token for hit in spot.hits[prompts[row]] for token in hit):
                    place = reader.layout.place(token)
                    assert place is not None
                    taken[which, place[0] - 1, place[1] - 1] = True
        drops = -values[numbers, columns[row]]
        there = np.isfinite(drops) & taken.any((1, 2))
        if there.sum() > 1:
            removals[number] = taken[there], drops[there]
    return removals


# --- sensitivity ----------------------------------------------------------------------------------


@observation("sensitivity", unit="of its norm")
class Sensitivity(MapComparison):
    """How far maps move at most where their images move little.

    The largest ‖map of an image nearby − map‖ / ‖map‖.
    source: Yeh et al. 2019, arXiv 1901.09392, section 4 (max-sensitivity, there not divided)
    """

    example = "caap to near_caap"
    blank = "is 0 everywhere"
    several = True

    def others(self, given: MapLine) -> Sequence[Sequence[VariantFinding]] | None:
        assert given.rule.observed is not None
        findings: list[Sequence[VariantFinding]] = []
        for part, named in zip(given.maps, given.rule.observed.others, strict=True):
            finding = find_map_finding(named, given.work)
            if finding is None:
                return None
            for near in finding.parts:
                check_map(near, given.work)
                _check_same_map(part, near)
            findings.append(finding.parts)
        return findings

    def settings(self, given: MapLine) -> Sequence[MapReference]:
        return [_nearby_reference(group, given.work) for group in given.others]

    def details(self, given: MapLine) -> Iterator[str]:
        names = [part.experiment.name for part in chain(*given.others)]
        counts = {name: names.count(name) for name in names}
        said = ", ".join(f"`{name}` ({n})" for name, n in counts.items())
        yield f"‖map of a nearby image − map‖ / ‖map‖, the largest value of {said}"


def _check_same_map(part: VariantFinding, near: VariantFinding) -> None:
    """Check that a map is computed as another one, but from other runs.

    Raises:
        PickError: If it isn't.
    """
    own, other = part.experiment, near.experiment
    axes = [[(axis.name, axis.labels) for axis in finding.other_axes] for finding in (part, near)]
    if _map_recipe(own) != _map_recipe(other) or axes[0] != axes[1]:
        raise PickError(
            f"`{other.name}` isn't computed like `{own.name}`",
            f"use the rules and the measure of `{own.name}` there, but other runs",
        )
    if _map_runs(own) == _map_runs(other):
        raise PickError(
            f"`{other.name}` uses the same runs as `{own.name}`",
            "run it on nearby images: `corrupt near_1 { noise image by 4 }`, `from near_1 …`",
        )


def _map_recipe(experiment: ResolvedExperiment) -> object:
    """Return all that determines a map except its runs."""
    said = experiment.spec
    estimator = None if said.estimator is None else said.estimator.text
    rules = [_rule_recipe(rule) for rule in experiment.rules]
    return rules, experiment.measures[0].text, said.measures[0].effect, estimator


def _rule_recipe(rule: ResolvedRule) -> object:
    sites = None if rule.sites is None else rule.sites.points
    fill = None if rule.spec.fill is None else rule.spec.fill.span.written
    return rule.does.name, sites, [cell.label for cell in rule.positions.written.values()], fill


def _map_runs(experiment: ResolvedExperiment) -> object:
    said = experiment.spec
    return said.source, said.base, [rule.run for rule in experiment.rules]


def _nearby_reference(group: Sequence[VariantFinding], work: ExperimentContext) -> MapReference:
    """Create the reference with maps of similar images, for rows that all of them have."""
    import numpy as np

    from mechdsl.fits.agreement import sensitivity

    grids = [build_grids(part, work) for part in group]
    ids = work.table.row_ids
    rows = {n for n, row in enumerate(ids) if all(row in grid for grid in grids)}

    def score(cell: int, number: int, values: Floats) -> Sequence[float]:
        return (sensitivity(values, np.stack([grid[ids[number]][cell] for grid in grids])),)

    return MapReference(rows, f"because `{group[0].experiment.name}` lacks them", score)
