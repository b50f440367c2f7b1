"""`observe infidelity of caap to taken`: maps against what others found of the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.findings import Refused, VariantFinding
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.rules.observations.maps import (
    Given,
    OfMaps,
    Setting,
    check_map,
    found_by,
    grids_of,
)
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import observation
from mechdsl.vocab.metrics import Form

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats

TAKES_OUT = ("replace", "ablate", "patch")
"""Rules in whose place nothing of a patch is left."""


class ToOthers(OfMaps):
    """`observe WORD of MAPS to EXPERIMENTS`."""

    several: ClassVar[bool] = False
    """Whether there is one for each map; else one for all."""

    def fits(self, rule: spec.Rule, work: Work) -> bool:
        said = rule.observed
        assert said is not None
        wanted = len(said.maps) if self.several else 1
        if not said.others:
            reason = "is set against another experiment, not against a region"
            refuse(rule, work, reason, f"write `observe {self.word} of {self.example}`")
        elif len(said.others) != wanted:
            found = f"{len(said.others)} behind `to`"
            reason = f"has {found} for {len(said.maps)} maps" if self.several else f"has {found}"
            each = "for each map, in the same order" if self.several else "experiment"
            refuse(rule, work, reason, f"name one {each}")
        return len(said.others) == wanted


# --- infidelity -----------------------------------------------------------------------------------


@observation("infidelity")
class Infidelity(ToOthers):
    """How far what maps say of sets of patches is from what taking them out does, squared.

    The mean over the sets, the map scaled in each row so that this is least, by no number below 0.
    Beside it stands what a map has that is the same everywhere.
    source: Yeh et al. 2019, arXiv 1901.09392, definition 2.1
    """

    example = "caap to taken"
    blank = "has no number for a patch that is taken out"
    controls = ("chance",)

    def form_of(self, name: str) -> Form:
        form = super().form_of(name)
        same = "What a map has that is the same everywhere"
        return replace(form, meaning=same) if name == "chance" else form

    def others(self, given: Given) -> Sequence[Sequence[VariantFinding]] | None:
        assert given.rule.observed is not None
        finding = found_by(given.rule.observed.others[0], given.work)
        if finding is None:
            return None
        part, *more = finding.parts
        if more:
            raise Refused(f"`{finding.name}` runs more than once", "let it have one base")
        _takes_out(part, given.work)
        return ((part,),)

    def settings(self, given: Given) -> Sequence[Setting]:
        import numpy as np

        from mechdsl.fits.against_masks import infidelity

        part = _set_against(given)
        found = _taken_out(part, given.work)

        def score(cell: int, number: int, values: Floats) -> Sequence[float]:
            own = infidelity(values, *found[number])
            same = infidelity(np.ones_like(values), *found[number])
            return own, same if own == own else own

        lacking = f"which `{part.experiment.name}` takes no two sets of patches out of"
        return [Setting(found, lacking, score)] * len(given.maps)

    def unit_of(self, given: Given) -> str:
        return f"{_set_against(given).experiment.measures[0].unit or 'number'}²"

    def details(self, given: Given) -> Iterator[str]:
        part = _set_against(given)
        sets, measure = sum(1 for _ in part.grid()), part.experiment.measures[0].text
        yield f"{sets} sets of patches and how far `{measure}` falls are `{part.experiment.name}`'s"
        yield "each map times the number, 0 or more, that fits these best in the row"


def _set_against(given: Given) -> VariantFinding:
    """The one experiment that takes patches out."""
    ((part,),) = given.others
    return part


def _takes_out(part: VariantFinding, work: Work) -> None:
    """Whether it takes sets of patches out of the images, and measures what that does. Raises
    Refused."""
    own = part.experiment
    name, first = f"`{own.name}`", own.spec.measures[:1]
    if own.table.name != work.table.name:
        reason = f"{name} is of `{own.table.name}`, and this experiment of `{work.table.name}`"
        raise Refused(reason, "let both name one block of images")
    if own.spec.base != work.experiment.base:
        reason = f"{name} puts patches into `{own.spec.base}`, and takes none out of the images"
        raise Refused(reason, f"take them out: `from {own.spec.base} into {work.table.name}`")
    other = next((rule for rule in own.rules if rule.spec.verb not in TAKES_OUT), None)
    if other is not None or not own.rules:
        does = "nothing" if other is None else f"`{other.spec.verb}`"
        hint = "write such a rule: `replace top 4 of chance(draw: d) tokens with gray`"
        raise Refused(f"{name} takes no patches out: it has {does}", hint)
    if not first or first[0].effect != "delta" or own.spec.estimator is not None:
        raise Refused(
            f"{name} doesn't measure what taking patches out changes",
            "measure it: `measure logit(answer) as delta`, without `using`",
        )
    if own.n_there < 2:
        raise Refused(
            f"{name} takes one set of patches out, and any one number can be met by scaling",
            "let it take several: `for d in 1..20 { … }`",
        )
    reader = work.model.tokenizer
    if reader.stands_in or not isinstance(reader, ImageReader):
        return
    cells = (cell for rule in own.rules for cell in rule.positions.written.values())
    tokens = {token for cell in cells for row in cell.hits for hit in row for token in hit}
    beside = next((token for token in sorted(tokens) if reader.layout.place(token) is None), None)
    if beside is not None:
        reason = f"{name} changes `{reader.label(beside)}`, which is no patch"
        raise Refused(reason, "let it take patches out alone")


def _taken_out(part: VariantFinding, work: Work) -> Mapping[int, tuple[Bools, Floats]]:
    """Number of a row → ([set, row, col] the patches that are in it, [set] how far the output
    falls), of rows that two sets are taken out of."""
    import numpy as np

    own, reader, values = part.experiment, work.model.tokenizer, part.values
    assert isinstance(reader, ImageReader)
    assert values is not None
    names, cells = [axis.name for axis in own.axes], list(part.grid())
    numbers = [number for number, _ in cells]
    columns = {row: column for column, row in enumerate(part.row_ids)}
    prompts = {row: prompt for prompt, row in enumerate(own.table.row_ids)}
    found: dict[int, tuple[Bools, Floats]] = {}
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
            found[number] = taken[there], drops[there]
    return found


# --- sensitivity ----------------------------------------------------------------------------------


@observation("sensitivity", unit="of its length")
class Sensitivity(ToOthers):
    """How far maps move at most where their images move little.

    The largest ‖map of an image nearby − map‖ / ‖map‖.
    source: Yeh et al. 2019, arXiv 1901.09392, section 4 (max-sensitivity, there not divided)
    """

    example = "caap to near_caap"
    blank = "is 0 everywhere"
    several = True

    def others(self, given: Given) -> Sequence[Sequence[VariantFinding]] | None:
        assert given.rule.observed is not None
        found: list[Sequence[VariantFinding]] = []
        for part, named in zip(given.maps, given.rule.observed.others, strict=True):
            finding = found_by(named, given.work)
            if finding is None:
                return None
            for near in finding.parts:
                check_map(near, given.work)
                _same_map(part, near)
            found.append(finding.parts)
        return found

    def settings(self, given: Given) -> Sequence[Setting]:
        return [_moved(group, given.work) for group in given.others]

    def details(self, given: Given) -> Iterator[str]:
        names = [part.experiment.name for part in chain(*given.others)]
        counts = {name: names.count(name) for name in names}
        said = ", ".join(f"`{name}` ({n})" for name, n in counts.items())
        yield f"‖map of an image nearby − map‖ / ‖map‖, the largest of those of {said}"


def _same_map(part: VariantFinding, near: VariantFinding) -> None:
    """Whether it is made as the map is, of other runs. Raises Refused."""
    own, other = part.experiment, near.experiment
    axes = [[(axis.name, axis.labels) for axis in each.beside] for each in (part, near)]
    if _made(own) != _made(other) or axes[0] != axes[1]:
        raise Refused(
            f"`{other.name}` isn't made as `{own.name}` is",
            f"write the rules and the measure of `{own.name}` there, on other runs",
        )
    if _runs(own) == _runs(other):
        raise Refused(
            f"`{other.name}` is of the same runs as `{own.name}`",
            "let it run on images nearby: `corrupt near_1 { noise image by 4 }`, `from near_1 …`",
        )


def _made(experiment: ResolvedExperiment) -> object:
    """All that a map is made by, but for the runs."""
    said = experiment.spec
    estimator = None if said.estimator is None else said.estimator.text
    rules = [_rule(rule) for rule in experiment.rules]
    return rules, experiment.measures[0].text, said.measures[0].effect, estimator


def _rule(rule: ResolvedRule) -> object:
    sites = None if rule.sites is None else rule.sites.points
    fill = None if rule.spec.fill is None else rule.spec.fill.span.written
    return rule.does.name, sites, [cell.label for cell in rule.positions.written.values()], fill


def _runs(experiment: ResolvedExperiment) -> object:
    said = experiment.spec
    return said.source, said.base, [rule.run for rule in experiment.rules]


def _moved(group: Sequence[VariantFinding], work: Work) -> Setting:
    """Maps of images nearby, in rows that all of them have."""
    import numpy as np

    from mechdsl.fits.against_masks import sensitivity

    grids = [grids_of(part, work) for part in group]
    ids = work.table.row_ids
    rows = {n for n, row in enumerate(ids) if all(row in grid for grid in grids)}

    def score(cell: int, number: int, values: Floats) -> Sequence[float]:
        return (sensitivity(values, np.stack([grid[ids[number]][cell] for grid in grids])),)

    return Setting(rows, f"`{group[0].experiment.name}` lacks them", score)
