"""Maps of images that other experiments computed: their sum, and the base class of their scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.records import Record
from mechdsl.base.text import name_list
from mechdsl.program import spec
from mechdsl.prompts.runs import Hits, PositionCell
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.findings import Finding, PickError, VariantFinding, check_rankable_tokens
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.targets import resolve_amounts, resolve_base_positions
from mechdsl.resolve.types import (
    Amounts,
    Axis,
    AxisIndices,
    Convention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.rules.observations.registry import ObservationKind, observation, report_bad_observation
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


PLACEHOLDER_POINT = SitePoint("embed", None, None)
"""Point of a rule that needs a site but neither reads nor writes it."""

WINDOW_NOTE = (
    "the number of a window is divided equally among its patches, and a patch has the mean "
    "of its shares"
)
"""Note on maps of windows."""


@dataclass(frozen=True, eq=False)
class MapScores:
    """Scores of maps whose experiments have run."""

    by_word: Mapping[str, Floats]
    """Scores of the observation and of each control, [site, position, row of the table]. Each site
    represents a map or a loop value. NaN for rows without a score."""


@dataclass(frozen=True, eq=False)
class MapReference:
    """Reference that one map is compared with."""

    rows: Collection[int]
    """Rows of the table that have a reference."""
    lacking: str
    """Why the other rows have no reference."""
    score: Callable[[int, int, Floats], Sequence[float]]
    """Function of the map's cell, the row of the table and the map's values, [row, col]. It returns
    the scores of the observation and of each control; NaN for the reason in `blank`."""


@dataclass(frozen=True, eq=False)
class MapLine:
    """Inputs of a line that observes maps."""

    rule: spec.Rule
    work: ExperimentContext
    maps: Sequence[VariantFinding]
    shown: PositionCell
    """Tokens of the region, or all patches."""
    others: Sequence[Sequence[VariantFinding]] = ()
    """Results that the maps are compared with: for each map, or for all of them."""


class MapObservation(RowSetObservation, ObservationKind):
    """`observe WORD of MAPS …`: a number for each row's map."""

    unplaced = "last token"
    reads_vectors = False
    of_maps = True
    keeps_cells = False  # its numbers are available anyway
    example: ClassVar[str]
    """Example of a line, after `observe WORD of`."""
    texts: ClassVar[bool] = False
    """Whether maps of the tokens of texts are supported, too."""
    blank: ClassVar[str]
    """Problem of a map without a score, which completes `` where `caap` … ``."""

    def __init__(self, said: str = "", scores: MapScores | None = None) -> None:
        """Create the observation.

        Args:
            said: Note on the maps for tables.
            scores: The scores; None before the maps' experiments have run.
        """
        self._said, self.scores = said, scores

    def fits(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        """Check what the line needs in addition to maps, and report what it lacks."""
        raise NotImplementedError

    def shown(self, rule: spec.Rule, work: ExperimentContext) -> PositionCell | None:
        """Return the tokens that tables show as observed: those of a region, or all patches; None
        after an error."""
        return span_cell("image", work)

    def others(self, given: MapLine) -> Sequence[Sequence[VariantFinding]] | None:
        """Return `MapLine.others` as far as it is known; None if one was rejected.

        Raises:
            PickError: If a comparison isn't possible.
        """
        return ()

    def settings(self, given: MapLine) -> Sequence[MapReference]:
        """Return the reference of each map, once all experiments have run.

        Raises:
            PickError: If a comparison isn't possible.
        """
        raise NotImplementedError

    def unit_of(self, given: MapLine) -> str:
        """Return the unit of its numbers."""
        return self.unit

    def details(self, given: MapLine) -> Iterator[str]:
        """Yield further notes for tables, once all experiments have run."""
        yield from ()

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        if not rule.observed.maps:
            report_bad_observation(
                rule, work, "reads maps", f"write `observe {self.word} of {self.example}`"
            )
            return None
        ready = [check_map_line(rule, work, texts=self.texts), self.fits(rule, work)]
        shown = self.shown(rule, work) if all(ready) else None
        try:
            findings = [resolve_map(each, work) for each in rule.observed.maps]
            maps = [part for part in findings if part is not None]
            if shown is None or len(maps) < len(findings):
                return None
            given = MapLine(rule, work, maps, shown)
            others = self.others(given)
            if others is None:
                return None
            does = self._scored(replace(given, others=others))
        except PickError as refusal:
            report_bad_observation(rule, work, refusal.reason, refusal.hint)
            return None
        sites = _map_sites(rule, maps, work)
        if sites is None:
            return None
        places = PositionTargets((), {(): shown}, {(): shown})
        return ResolvedRule(
            spec=rule, does=does, run=work.experiment.base, sites=sites, positions=places
        )

    # --- its numbers ------------------------------------------------------------------------------

    def _scored(self, given: MapLine) -> MapObservation:
        """Return the observation with the scores of rows, if all experiments have run.

        Raises:
            PickError: If a comparison isn't possible.
        """
        maps, work = given.maps, given.work
        every = chain(maps, *given.others)
        waits = [part.experiment.name for part in every if part.values is None]
        if waits or work.table.stands_in:
            names = name_list(dict.fromkeys(waits))
            return self._told(given, f"known only after {names} has run" if waits else "")
        import numpy as np

        cells: list[Floats] = []
        dropped: dict[str, int] = {}
        assert given.rule.observed is not None
        written = [each.span.written for each in given.rule.observed.maps]
        for part, setting, own in zip(maps, self.settings(given), written, strict=True):
            grids, name = build_grids(part, work), part.experiment.name
            if not grids:
                raise _no_rows(part, work)
            scores = self._of_map(grids, setting, work)
            dropped[setting.lacking] = len(work.table) - len(setting.rows)
            dropped[f"because `{name}` lacks them"] = len(work.table) - len(grids)
            blank = [
                np.isnan(scores[0, :, number]).all()
                for number, row in enumerate(work.table.row_ids)
                if row in grids and number in setting.rows
            ]
            dropped[f"where `{own}` {self.blank}"] = sum(map(bool, blank))
            cells.append(scores)
        measures = dict.fromkeys(part.measure for part in maps)
        parts = [f"by each row's {' or '.join(measures)}, signed", *self.details(given)]
        parts += [WINDOW_NOTE] * any(part.of_windows for part in maps)
        parts += [
            f"{n} of {len(work.table)} rows dropped, {why}" for why, n in dropped.items() if n
        ]
        words = (self.word, *self.controls)
        every = np.concatenate(cells, axis=1)[:, :, None]
        return self._told(given, "; ".join(parts), MapScores(dict(zip(words, every, strict=True))))

    def _told(self, given: MapLine, said: str, scores: MapScores | None = None) -> MapObservation:
        does = type(self)(said, scores)
        does.form = replace(self.form, unit=self.unit_of(given))
        return does

    def _of_map(
        self, grids: Mapping[int, Floats], setting: MapReference, work: ExperimentContext
    ) -> Floats:
        """Compute the scores of one experiment: [word, cell, row of the table]; NaN for none."""
        import numpy as np

        count = len(next(iter(grids.values())))
        scores = np.full((1 + len(self.controls), count, len(work.table)), np.nan)
        for number, row in enumerate(work.table.row_ids):
            if row in grids and number in setting.rows:
                for cell, values in enumerate(grids[row]):
                    scores[:, cell, number] = setting.score(cell, number, values)
        return scores

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        text = f"{self.word}: {said}"
        yield Convention("observed", f"{text}; {self._said}" if self._said else text)


# --- what it is of --------------------------------------------------------------------------------


def check_map_line(
    rule: spec.Rule, work: ExperimentContext, *, by_position: bool = False, texts: bool = False
) -> bool:
    """Report E0207 for maps in an experiment with rules, and for unsupported texts."""
    fits, block = True, work.program.prompts[work.table.name]
    assert rule.observed is not None
    said = rule.observed
    weighed = next((each for each in (*said.maps, *said.others) if each.weight is not None), None)
    if weighed is not None and not by_position:
        hint = f"remove it, or add the maps first: `observe sum of {weighed.span.written} …`"
        report_bad_observation(rule, work, "takes no factor before a map", hint)
        fits = False
    if any(each.verb != "observe" for each in work.experiment.rules):
        reason = "reads finished maps, which rules don't change"
        report_bad_observation(
            rule, work, reason, "write the rules in the experiment that computes the map"
        )
        fits = False
    if block.kind != "images" and not texts:
        report_bad_observation(
            rule, work, f"needs images, but `{block.name}` has texts", "name images"
        )
        fits = False
    return fits


def resolve_map(named: ast.MapOf, work: ExperimentContext) -> VariantFinding | None:
    """Resolve a single map for each row; None if the experiment was rejected.

    Raises:
        PickError: If there is no single map.
    """
    finding = find_map_finding(named, work)
    if finding is None:
        return None
    part, *others = finding.parts
    if others:
        raise PickError(
            f"`{finding.name}` runs more than once: it compares models, sources or bases",
            "name an experiment with one source and one base",
        )
    check_map(part, work)
    return part


def find_map_finding(named: ast.MapOf, work: ExperimentContext) -> Finding | None:
    """Return the results in the named cells of an experiment.

    Raises:
        PickError: If the name isn't a map.
    """
    looped = [argument.value.id for argument in named.cell if isinstance(argument.value, ast.Name)]
    loop = next((name for name in (named.of, *looped) if name in work.loops), None)
    if loop is not None:
        reason = f"`{loop}` is the variable of a `for`, but maps aren't cells of a loop"
        hint = f"remove it: here, too, `{named.of}` has an axis for it"
        raise PickError(reason, hint if loop in looped else "remove the loop, and list the maps")
    finding, at = work.sites.onward.finding(named, work.program.parameters)
    if "position" in dict(at):
        raise PickError("a map has all positions", f"remove `position` from `{named.span.written}`")
    return finding


def check_map(part: VariantFinding, work: ExperimentContext) -> None:
    """Check that a variant has a number for each of some patches, and for nothing else.

    Raises:
        PickError: If it doesn't.
    """
    reader, texts = work.model.tokenizer, is_on_texts(work)
    hint = (
        f"let it sweep {'tokens: `at token *`' if texts else 'patches: `at each token of image`'}"
    )
    check_rankable_tokens(part.experiment, work.table, reader, hint, windows=not texts)
    fixed = part.window_axes.intersection(part.chosen)
    if fixed:
        name = part.experiment.name
        raise PickError(f"a map of `{name}` contains all of its windows", f"remove `{min(fixed)}`")
    if texts and not part.experiment.model.tokenizer.stands_in:
        for _ in part.positions(work.table, work.experiment.base, reader):  # raises PickError
            break
    if reader.stands_in or not isinstance(reader, ImageTokenizer):
        return
    places = part.places(work.experiment.base)
    rows = {row for _, cell in places for row in cell.hits}
    every = sorted({token for row in rows for hit in row for token in hit})
    other = next((token for token in every if reader.layout.place(token) is None), None)
    if other is not None:
        name = part.experiment.name
        reason = f"`{name}` has a number for `{reader.label(other)}`, which isn't a patch"
        raise PickError(reason, "let it sweep only patches: `at each token of image`")


def _map_sites(
    rule: spec.Rule, maps: Sequence[VariantFinding], work: ExperimentContext
) -> SiteTargets | None:
    """Create the cells: one for each map or, for a single experiment, one for each of its cells
    without the image positions."""
    assert rule.observed is not None
    # names as written, not those in results
    names = [each.span.written for each in rule.observed.maps]
    first = maps[0]
    if len(names) == 1:
        axes, loops = first.other_axes, first.experiment.own_loops
        if loops is not None:
            loops = loops.along([axis.name for axis in axes], first.chosen)
        work.sites.nested = loops
    else:
        swept = next((part for part in maps if part.other_axes), None)
        if swept is not None:
            others = [axis.name for axis in swept.other_axes]
            reason = f"`{swept.experiment.name}` has a map for each {' and '.join(others)}"
            one = ", ".join(f"{axis.name}: {axis.labels[0]}" for axis in swept.other_axes)
            hint = f"observe it separately, or name one: `{swept.experiment.name}({one})`"
            report_bad_observation(rule, work, reason, hint)
            return None
        axes = (Axis("map", tuple(names), rule.observed.span),)
    for axis in axes:
        work.add_axis(axis)
    keys: list[AxisIndices] = list(product(*(range(len(axis)) for axis in axes)))
    label = names[0] if len(names) == 1 else ""
    return SiteTargets(
        tuple(axis.name for axis in axes),
        dict.fromkeys(keys, (PLACEHOLDER_POINT,)),
        {key: label or names[key[0]] for key in keys},
    )


def is_on_texts(work: ExperimentContext) -> bool:
    """Return whether the prompts of an experiment are texts, whose maps have a value per token."""
    return work.program.prompts[work.table.name].kind != "images"


def grid_size(number: int, work: ExperimentContext) -> tuple[int, int]:
    """Return the rows and columns of a map: patches of an image, or the tokens of a text as a row.

    Args:
        number: Row of the table.
    """
    reader = work.model.tokenizer
    if isinstance(reader, ImageTokenizer):
        return reader.layout.rows, reader.layout.cols
    return 1, len(work.table.runs[work.experiment.base].rows[number].ids)


def _grid_place(token: int, work: ExperimentContext) -> tuple[int, int]:
    """Return the row and column of a token in its map, from 0."""
    reader = work.model.tokenizer
    if not isinstance(reader, ImageTokenizer):
        return 0, token
    place = reader.layout.place(token)
    assert place is not None
    return place[0] - 1, place[1] - 1


def span_cell(name: str, work: ExperimentContext) -> PositionCell:
    """Return the patches of a region, or of the image, in each row.

    They are displayed, but neither read nor written.
    """
    hits: list[Hits] = []
    for row in work.table.runs["clean"].rows:
        tokens = {token for numbers in row.places.get(name, ()) for token in numbers}
        hits.append((tuple(sorted(tokens)),) if tokens else ())
    return PositionCell(name, tuple(hits))


def build_grids(part: VariantFinding, work: ExperimentContext) -> dict[int, Floats]:
    """Arrange the values of a variant by patches, or by tokens.

    A window of several patches distributes its value evenly among them. A patch in several windows
    has the mean of its shares.

    Returns:
        Row id → [cell, row of patches, column]; NaN for patches without a value. The tokens of a
        text are one row.
    """
    import numpy as np

    here = {row: number for number, row in enumerate(work.table.row_ids)}
    sums: dict[int, Floats] = {}
    counts: dict[int, Floats] = {}
    base, reader = work.experiment.base, work.model.tokenizer
    if isinstance(reader, ImageTokenizer):
        places = part.by_place(base)
    else:
        places = part.by_token(work.table, base, reader)
    for row, tokens, values in places:
        if row not in here:
            continue
        shape = (len(values), *grid_size(here[row], work))
        own, times = (each.setdefault(row, np.zeros(shape)) for each in (sums, counts))
        there = np.isfinite(values)
        for token in tokens:
            at = (slice(None), *_grid_place(token, work))
            own[at] += np.where(there, values, 0) / len(tokens)
            times[at] += there
    with np.errstate(invalid="ignore"):
        return {row: own / counts[row] for row, own in sums.items()}


def _no_rows(part: VariantFinding, work: ExperimentContext) -> PickError:
    return PickError(
        f"`{part.experiment.name}` has none of the {len(work.table)} rows that this experiment "
        "runs on",
        "use the same part and limit of the images in both",
    )


SWEEP_HINT = "write `at each token of image`"


class MapWeights(Record):
    """Factors before maps."""

    axes: tuple[str, ...]
    """Loops whose variables the factors use."""
    values: Mapping[AxisIndices, tuple[float, ...]]
    """Factor of each map, for every value of these loops."""


@observation("sum")
class MapSum(MapObservation):
    """Maps that other experiments made, patch by patch added up, all that each of them has.

    A window of several patches shares its number evenly among them, and a patch that several
    windows have gets the mean of its shares.
    """

    example = "fine, coarse at each token of image"
    texts = True

    def joined(self, own: Floats) -> Floats:
        """Join weighted maps, [loop value, map, row, col], into [loop value, row, col]."""
        return own.sum(axis=1)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        said = rule.observed
        assert said is not None
        if not said.maps:
            report_bad_observation(
                rule, work, "reads maps", f"write `observe {self.word} of {self.example}`"
            )
            return None
        checked = check_map_line(rule, work, by_position=True, texts=self.texts)
        ready = [checked, self.fits(rule, work)]
        try:
            findings = [resolve_map(each, work) for each in said.maps]
        except PickError as refusal:
            report_bad_observation(rule, work, refusal.reason, refusal.hint)
            return None
        maps = [part for part in findings if part is not None]
        if not all(ready) or len(maps) < len(findings):
            return None
        positions, weights = (
            resolve_base_positions(rule.at, work),
            _resolve_weights(said.maps, work),
        )
        if positions is None or weights is None:
            return None
        try:
            _check_single_patches(positions, work)
            does = self._added(said, maps, weights, positions, work)
        except PickError as refusal:
            report_bad_observation(rule, work, refusal.reason, refusal.hint)
            return None
        keys = weights.values
        sites = SiteTargets(
            weights.axes, dict.fromkeys(keys, (PLACEHOLDER_POINT,)), dict.fromkeys(keys, self.word)
        )
        return ResolvedRule(
            spec=rule, does=does, run=work.experiment.base, sites=sites, positions=positions
        )

    def fits(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        assert rule.observed is not None
        if not rule.observed.placed:
            report_bad_observation(
                rule,
                work,
                "is itself a map, so it takes neither a region nor a second map",
                SWEEP_HINT,
            )
        return rule.observed.placed

    def _added(
        self,
        said: spec.ObservedQuantity,
        maps: Sequence[VariantFinding],
        weights: MapWeights,
        positions: PositionTargets,
        work: ExperimentContext,
    ) -> MapSum:
        """Return the sum with its values, if the maps' experiments have run."""
        waits = [part.experiment.name for part in maps if part.values is None]
        if waits or work.table.stands_in:
            names = name_list(dict.fromkeys(waits))
            return type(self)(f"known only after {names} has run" if waits else "")
        import numpy as np

        rows = {row: number for number, row in enumerate(work.table.row_ids)}
        every = np.array(list(weights.values.values()))
        grids = [build_grids(part, work) for part in maps]
        total: dict[int, Floats] = {}
        for row in set(rows).intersection(*grids):
            own = np.stack([_sum_cells(each[row]) for each in grids])
            total[row] = self.joined(every[..., None, None] * own)
        if not total:
            raise PickError(
                f"{name_list([part.experiment.name for part in maps])} have no row in common that "
                "this experiment runs on",
                "use the same part and limit of the images in all of them",
            )
        values = np.full((len(every), len(positions.written), len(work.table)), np.nan)
        for number, cell in enumerate(positions.written.values()):
            for row, own in total.items():
                for hit in cell.hits[rows[row]]:
                    values[:, number, rows[row]] = own[:, *_grid_place(hit[0], work)]
        parts = [f"by each row's {' or '.join(dict.fromkeys(part.measure for part in maps))}"]
        parts += [f"{self.word} of {', '.join(each.span.written for each in said.maps)}"]
        lacking = len(work.table) - len(total)
        parts += [WINDOW_NOTE] * any(part.of_windows for part in maps)
        parts += [f"{lacking} of {len(work.table)} rows dropped, because a map lacks them"] * bool(
            lacking
        )
        return type(self)("; ".join(parts), MapScores({self.word: values}))


@observation("product")
class MapProduct(MapSum):
    """Maps that other experiments made, patch by patch multiplied: one map weights another."""

    example = "effect, relevance at each token of image"

    def joined(self, own: Floats) -> Floats:
        return own.prod(axis=1)


@observation("magnitude")
class MapMagnitude(MapSum):
    """The absolute value of a map, or of the sum of several maps, patch by patch.

    It ranks patches by the size of an effect, whatever its sign.
    """

    example = "effect at each token of image"

    def joined(self, own: Floats) -> Floats:
        return abs(own.sum(axis=1))


def _resolve_weights(maps: Sequence[ast.MapOf], work: ExperimentContext) -> MapWeights | None:
    """Evaluate the factors before maps; None after E0337."""
    one = Amounts((), {(): 1.0})
    each = [one if own.weight is None else resolve_amounts(own.weight, work) for own in maps]
    amounts = [own for own in each if own is not None]
    if len(amounts) < len(each):
        return None
    named = {name for amount in amounts for name in amount.axes}
    loops = tuple(name for name in work.loops if name in named)
    values: dict[AxisIndices, tuple[float, ...]] = {}
    for key, _ in work.sites.combinations(loops):
        at = dict(zip(loops, key, strict=True))
        values[key] = tuple(
            amount.values[tuple(at[name] for name in amount.axes)] for amount in amounts
        )
    return MapWeights(loops, values)


def _sum_cells(cells: Floats) -> Floats:
    """Sum the maps of an experiment, [cell, row, column], into [row, column].

    Cells that loops omit don't count. NaN where an existing map has no value.
    """
    import numpy as np

    there = np.isfinite(cells).any(axis=(1, 2))
    return cells[there].sum(axis=0) if there.any() else cells[0]


def _check_single_patches(positions: PositionTargets, work: ExperimentContext) -> None:
    """Check that each cell is a single patch; raise PickError otherwise."""
    reader = work.model.tokenizer
    if reader.stands_in or not isinstance(reader, ImageTokenizer):
        return
    for cell in positions.written.values():
        for row in cell.hits:
            tokens = [token for hit in row for token in hit]
            if len(tokens) > 1:
                raise PickError(f"`{cell.label}` covers several tokens", SWEEP_HINT)
            if tokens and reader.layout.place(tokens[0]) is None:
                raise PickError(f"`{cell.label}` isn't a patch", SWEEP_HINT)
