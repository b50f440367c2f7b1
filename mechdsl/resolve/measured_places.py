"""Where a measure is read: at one token of every prompt, or at several, one after the other; and in
which site, where a metric compares activations of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import PositionCell, ReplyPosition
from mechdsl.resolve.measure_context import MeasureContext, refuse
from mechdsl.resolve.resolved import Atom, Labels, ResolvedMeasure
from mechdsl.syntax import ast

MEASURED = "measured"
"""The axis of the positions that measures are read at …"""
STEP = "step"
"""… and of the steps of a reply."""


@dataclass(frozen=True)
class Place:
    """One position that a measure is read at."""

    label: str = ""
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Per run and row, the token; of rows that lack it, any."""
    absent: tuple[int, ...] = ()
    """Rows that lack it in some run."""
    item: int | None = None
    reply: ReplyPosition | None = None


def places_of(
    at: ast.Position | None, context: MeasureContext, runs: tuple[str, ...]
) -> list[Place]:
    """The positions that a measure is read at, in each run; one without a label for the last token
    and after an error."""
    if at is None:
        return [Place()]
    positions = ast.Positions((at,), span=at.span)
    found: dict[str, dict[str, PositionCell]] = {}
    for run in runs:
        cells, problems = resolve_positions(
            positions,
            context.table,
            run,
            tokenizer=context.tokenizer,
            loop_values={**context.parameters, **context.loop_values},
            loops=tuple(context.loop_values),
            replies=context.replies,
        )
        context.diagnostics.extend(p for p in problems if p not in context.diagnostics)
        if any(p.severity == "error" for p in problems):
            return [Place()]
        known = any(cell.reply is not None for cell in cells)
        if context.tokenizer.stands_in and len(cells) == 1 and not known:
            continue  # how many tokens it has isn't known
        if not all(_single(cell) for cell in cells):
            refuse(
                context,
                at.span,
                "a measure is read at one token of every prompt",
                "name one position, such as `last token` or `subject token`, or sweep single "
                "tokens: `each item token`, `token * align left`",
            )
            return [Place()]
        found[run] = {cell.label: cell for cell in cells}
    if not found:
        return [Place()]
    first = next(iter(found.values()))
    labels = [label for label in first if all(label in own for own in found.values())]
    return [_place(label, first, found) for label in labels]


def _single(cell: PositionCell) -> bool:
    """Whether it is one token of every row that has it."""
    if cell.reply is not None and not cell.reply.single:
        return False
    return all(len(row) <= 1 and all(len(tokens) == 1 for tokens in row) for row in cell.hits)


def _place(
    label: str, first: Mapping[str, PositionCell], found: Mapping[str, Mapping[str, PositionCell]]
) -> Place:
    at: dict[str, tuple[int, ...]] = {}
    absent: set[int] = set()
    for run, cells in found.items():
        hits = cells[label].hits
        absent.update(row for row, own in enumerate(hits) if not own)
        at[run] = tuple(own[0][0] if own else 0 for own in hits)
    return Place(label, at, tuple(sorted(absent)), first[label].item, first[label].reply)


def at_places(
    measure: ResolvedMeasure, places: Sequence[Place], context: MeasureContext
) -> Iterator[tuple[Labels, ResolvedMeasure]]:
    """The measure at each place that some row has, and in each combination of the sites that its
    metrics sweep."""
    swept = {axis.name: axis for atom in measure.atoms for axis in atom.axes}
    keys = product(*(range(len(axis)) for axis in swept.values()))
    sites = [dict(zip(swept, key, strict=True)) for key in keys]
    for place, chosen in product(places, sites):
        labels: list[tuple[str, int | float | str]] = []
        if len(places) > 1 and place.reply is not None and place.reply.kind == "step":
            labels.append((STEP, place.reply.number))
        elif len(places) > 1:
            labels.append((MEASURED, place.label))
        labels += [(name, swept[name].labels[index]) for name, index in chosen.items()]
        found = _at(measure, place, chosen, context)
        if len(found.absent) < len(context.table) or not len(context.table):
            yield tuple(labels), found


def _at(
    measure: ResolvedMeasure, place: Place, chosen: Mapping[str, int], context: MeasureContext
) -> ResolvedMeasure:
    atoms = tuple(_atom_at(atom, place, chosen, context) for atom in measure.atoms)
    at, absent = place.at or measure.at, set(place.absent)
    if place.reply is None and any(atom.form.takes == "own" for atom in atoms):
        absent.update(n for tokens in at.values() for n, token in enumerate(tokens) if not token)
        at = {run: tuple(max(token - 1, 0) for token in tokens) for run, tokens in at.items()}
    return replace(
        measure, atoms=atoms, at=at, absent=tuple(sorted(absent)), item=place.item,
        in_reply=place.reply,
        reply=measure.reply if place.reply is None else context.reply,
    )  # fmt: skip


def _atom_at(atom: Atom, place: Place, chosen: Mapping[str, int], context: MeasureContext) -> Atom:
    if atom.points:
        key = tuple(chosen[axis.name] for axis in atom.axes)
        return replace(atom, point=atom.points[key], points={}, axes=())
    if atom.form.takes == "own":
        rows = {run: context.table.runs[run].rows for run in place.at}
        own = {
            run: tuple(row.ids[token] for row, token in zip(rows[run], tokens, strict=True))
            for run, tokens in place.at.items()
        }
        return replace(atom, own=own)
    if atom.by_item and place.item in (*atom.texts, *atom.sets, *atom.wanted):
        texts = {None: atom.texts[place.item]} if atom.texts else {}
        sets = {None: atom.sets[place.item]} if atom.sets else {}
        wanted = {None: atom.wanted[place.item]} if atom.wanted else {}
        return replace(atom, texts=texts, sets=sets, wanted=wanted)
    return atom
