"""Resolve where rules read and write: positions of both runs, attention heads, and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any, TypeAlias

from mechdsl.base.limits import is_number
from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.models import SiteNotOnModel
from mechdsl.diagnostics.rules import (
    AbsentOccurrence,
    AxisDoesNotFit,
    BadAmount,
    BadDirection,
    BadEdit,
    BadLoopValue,
    NotInReply,
    OutsidePrompt,
    OverlappingPositions,
    UnequalUnion,
    UnpairedPositions,
)
from mechdsl.diagnostics.syntax import NotSupported, UnequalIndexTokens, UnknownName
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.models.shape import ModelShape, check_site, unit_count
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import NO_REPLIES, check_token_counts, resolve_positions
from mechdsl.prompts.positions.spans import AnswerTokens
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.resolve.cells import has_open_positions, report_token_mismatch
from mechdsl.resolve.conflicts import find_lacking_row
from mechdsl.resolve.loops import evaluate_arithmetic
from mechdsl.resolve.sites import (
    ExperimentContext,
    SiteContext,
    check_stack,
    find_missing_point,
    label_points,
    named_stack,
    resolve_components,
    resolve_site,
    resolve_swept_site,
)
from mechdsl.resolve.types import (
    NOTHING,
    Amounts,
    Axis,
    AxisIndices,
    ExternalRun,
    PositionTargets,
    SitePoint,
    SiteTargets,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import number_names, walk
from mechdsl.syntax.words import STACKS
from mechdsl.vocab.sites import SITES, SiteKind


class PositionMatch(Record):
    """Positions of one rule: the written cells, the read cells in the same order, and the labels of
    positions that no row has in both runs."""

    written: list[PositionCell]
    read: list[PositionCell]
    left_out: tuple[str, ...] = ()


NamedValues: TypeAlias = Mapping[str, Any]
"""Parameters and the current values of loops."""

PositionFinder: TypeAlias = Callable[[NamedValues], PositionMatch | None]

_NO_ANSWERS_REASON = "rows of a different prompt set have no text after them"


def resolve_rule_positions(
    rule: spec.Rule,
    run: str,
    work: ExperimentContext,
    external: ExternalRun | None = None,
    *,
    exchanged: bool = False,
    reader: ExperimentContext | None = None,
) -> PositionTargets | None:
    """Resolve the positions that a rule writes and reads; a sweep over positions becomes an axis.

    Args:
        run: The run that is read.
        external: A run of a different prompt set to read instead, whose rows aren't paired with the
            experiment's rows.
        exchanged: Whether each of two positions receives the vectors of the other.
        reader: The context for the read positions, if the read site has vectors at other tokens
            than the written one.
    """
    reader = reader or work
    nodes = [rule.at] if rule.onto is None else [rule.at, rule.onto]

    def find(values: NamedValues) -> PositionMatch | None:
        if external is not None:
            return _match_external(rule.at, external, values, work)
        if rule.onto is None:
            match = _match_same(rule.at, run, values, work, reader)
            return match if rule.token is None else _select_token(rule, match, work)
        if exchanged:
            return _match_exchanged(rule.at, rule.onto, values, work)
        return _match_pairs(rule.at, rule.onto, run, values, work, reader)

    return lay_out_positions(find, nodes, work)


def resolve_base_positions(
    positions: ast.Positions, work: ExperimentContext, axis: str = "position"
) -> PositionTargets | None:
    """Resolve positions of the base run alone."""

    def find(values: NamedValues) -> PositionMatch | None:
        cells = _cells(positions, work.experiment.base, values, work)
        return None if cells is None else PositionMatch(cells, cells)

    return lay_out_positions(find, [positions], work, axis)


def list_rows(table: PromptTable, run: str, work: ExperimentContext) -> tuple[RunRow, ...]:
    """Return the rows of a run, with patches in place of tokens if they are resampled."""
    reader = work.model.tokenizer
    if isinstance(reader, ImagePromptTokenizer) and reader.layout.resamples:
        with suppress(UnsupportedProcessor):  # a run reports unknown patches (E0413)
            table = table.in_patches(reader)
    return table.runs[run].rows


class _LaterTokens:
    """The tokens of the base run at some distances after a position, or next to it."""

    def __init__(self, work: ExperimentContext, low: int, high: int | None, both: bool) -> None:
        self.work = work
        self.low = low
        self.high = high
        self.both = both
        self.base = work.table.runs[work.experiment.base]
        self.joins_tiles = work.model.shape.attends_to_image  # patches attend to all tiles
        in_tiles = work.side == ("source" if self.joins_tiles else "image")
        self.in_tiles = in_tiles and not work.model.tokenizer.stands_in

    def of(self, row: int, tokens: Iterable[int]) -> tuple[int, ...]:
        """Return the tokens at the distances from any of these tokens of a row."""
        if self.in_tiles:
            return self._of_tiles(row, {*tokens})
        source, every = self.base.rows[row].source, len(self.base.rows[row].ids)
        first, end = (0, source) if self.work.side == "source" else (source, every)
        last = end if self.high is None else self.high + 1
        found: set[int] = set()
        for token in tokens:
            found.update(range(token + self.low, min(end, token + last)))
            if self.both:
                found.update(range(max(first, token - last + 1), token - self.low + 1))
        return tuple(sorted(found))

    def _of_tiles(self, row: int, numbers: set[int]) -> tuple[int, ...]:
        """Return the other patches that attend to a row's patches."""
        tile_of = list_rows(self.work.table, self.base.name, self.work)[row].patch_tokens
        if self.joins_tiles:
            tile_of = {token: (image, 0) for token, (image, _) in tile_of.items()}
        tiles = {tile_of[token] for token in numbers}
        numbers = numbers if len(numbers) == 1 else set[int]()  # joined tokens are an error later
        return tuple(t for t, tile in tile_of.items() if tile in tiles and t not in numbers)

    def report_absent(self, positions: ast.Positions) -> Diagnostic:
        """Return E0310: no row has these tokens."""
        absent = f"a token {self.low} or more after"
        hint = "name an earlier position, or a smaller distance"
        if self.in_tiles:
            absent = f"another token in the {'image' if self.joins_tiles else 'tile'} of"
            hint = "name a token of an image with more tokens"
        first = self.base.rows[0]
        return OutsidePrompt(
            span=positions.span,
            position=f"{absent} {positions.span.written}",
            run=self.base.name,
            lacking=len(self.work.table),
            total=len(self.work.table),
            example=f'"{first.text}"',
            hint=hint,
            unit="prompt" if first.image is None else "image",
        )


def _report_later_in_reply(
    positions: ast.Positions, written: PositionCell, work: ExperimentContext
) -> Diagnostic:
    return NotInReply(
        span=positions.span,
        position=written.label,
        reason="a token of a reply that isn't written yet has no known later tokens",
        hint="append the replies of another experiment: "
        f"`prompts {work.experiment.prompts} with replies of NAME`",
    )


def resolve_later_positions(
    positions: ast.Positions,
    low: int,
    high: int | None,
    work: ExperimentContext,
    *,
    both: bool = False,
) -> PositionTargets | None:
    """Resolve tokens of the base run (written), and the tokens `low` to `high` after them (read).

    Rows without such tokens aren't part of the cell, and cells without rows are omitted. If no cell
    remains, the result is None after E0310.

    Args:
        positions: The written positions.
        low: The smallest distance.
        high: The largest distance; None for no limit.
        both: Whether tokens at these distances before the position are read too. In a vision
            encoder, they are those of the same tile, or of all tiles that attend to each other.
    """
    base = work.table.runs[work.experiment.base]
    later = _LaterTokens(work, low, high, both)

    def find(values: NamedValues) -> PositionMatch | None:
        cells = _cells(positions, base.name, values, work)
        if cells is None:
            return None
        written = next((cell for cell in cells if cell.reply is not None), None)
        if written is not None:
            work.diagnostics.append(_report_later_in_reply(positions, written, work))
            return None
        pairs: list[tuple[PositionCell, PositionCell]] = []
        for cell in cells:
            hits = tuple(
                tuple(own for tokens in hit if (own := later.of(row, tokens)))
                for row, hit in enumerate(cell.hits)
            )
            pairs.append(cut_to_shared_rows(cell, replace(cell, hits=hits)))
        there = [pair for pair in pairs if any(pair[0].hits)]
        if not there:
            work.diagnostics.append(later.report_absent(positions))
            return None
        kept = {pair[0].label for pair in there}
        left_out = tuple(cell.label for cell in cells if cell.label not in kept)
        return PositionMatch([pair[0] for pair in there], [pair[1] for pair in there], left_out)

    return lay_out_positions(find, [positions], work)


def resolve_edge_place(position: ast.Position, work: ExperimentContext) -> PositionCell | None:
    """Resolve the tokens of an edge of a circuit in the base run: one run of tokens in every row.

    None after E0108, E0304, E0310, E0322 and errors of positions.
    """
    positions = ast.Positions((position,), span=position.span)
    problem = _reject_edge_place(position, work)
    cells = None
    if problem is None:
        cells = _cells(positions, work.experiment.base, work.program.numbers, work)
        if cells is None:
            return None
        problem = _check_edge_place(cells, position.span, work)
    if problem is not None:
        work.diagnostics.extend([] if problem in work.diagnostics else [problem])
        return None
    assert cells is not None
    return cells[0]


def _reject_edge_place(position: ast.Position, work: ExperimentContext) -> Diagnostic | None:
    """Return E0108 or E0322 for a position of an edge that a circuit can't have."""
    unknown = (name for name in number_names(position) if name not in work.program.numbers)
    if any(isinstance(node, ast.RankedSelection) for node in walk(position)):
        what, later = "a pick from another experiment", "name the tokens"
    elif any(isinstance(node, ast.Position) and node.and_answer for node in walk(position)):
        what, later = "`and answer`", "name tokens of the prompt"
    elif (chosen := _find_chosen_positions(position, work)) is not None:
        what, later = f"`{chosen}`, a group of positions,", "name the tokens, such as `last token`"
    elif (name := next(unknown, None)) is not None:
        reason = "isn't a `param`, and circuits are outside of every `for`"
        hint = f"write a number, or define it: `param {name} = 1`"
        return BadLoopValue(span=position.span, name=name, reason=reason, hint=hint)
    else:
        return None
    what += " in the position of an edge"
    return NotSupported(span=position.span, what=what, later=later)


def _find_chosen_positions(position: ast.Position, work: ExperimentContext) -> str | None:
    """Return the name of a group of positions that a position names, as `movers tokens` does."""
    program = work.program
    groups = {name for name, mask in program.masks.items() if mask.chooses_positions}
    names = (node.name for node in walk(position) if isinstance(node, ast.SpanRef))
    return next((name for name in names if name in groups or name in program.positions), None)


def _check_edge_place(
    cells: Sequence[PositionCell], span: Span, work: ExperimentContext
) -> Diagnostic | None:
    """Return E0304 for a sweep, and E0310 or E0108 for rows that lack the position or have several
    runs of tokens there."""
    if len(cells) != 1:
        return AxisDoesNotFit(
            span=span,
            site=span.written,
            reason="sweeps inside a circuit, whose edges are joined",
            hint="name one position, such as `last token`, or join some: `{token 1, last token}`",
        )
    if work.table.stands_in or work.model.tokenizer.stands_in:
        return None
    run = work.table.runs[work.experiment.base]
    problem = find_lacking_row(cells[0], span, run)
    if problem is not None:
        return problem
    if any(len(hits) > 1 for hits in cells[0].hits):
        what = f"`{span.written}`, which is averaged over tokens, as the position of an edge"
        return NotSupported(span=span, what=what, later="name one token, or join some with `{…}`")
    return None


def sweeps_positions(positions: ast.Positions, work: ExperimentContext) -> bool:
    """Return whether positions have more than one cell; errors are reported elsewhere."""
    before = len(work.diagnostics)
    values = next(_loop_values(_loops_of([positions], work), work))[1]
    cells = _cells(positions, work.experiment.base, values, work)
    del work.diagnostics[before:]
    return cells is not None and len(cells) > 1


def resolve_external_positions(
    positions: ast.Positions, table: PromptTable, run: str, work: ExperimentContext
) -> tuple[list[PositionCell], list[Diagnostic]]:
    """Resolve a rule's positions in rows of a different prompt set, for every loop value."""
    cells: list[PositionCell] = []
    problems: list[Diagnostic] = []
    for _, values in _loop_values(_loops_of([positions], work), work):
        own, said = resolve_positions(
            positions,
            table,
            run,
            tokenizer=work.model.tokenizer,
            loop_values=values,
            loops=tuple(work.loops),
            side=work.side,
        )
        cells += own
        problems += (problem for problem in said if problem not in problems)
    return cells, problems


def lay_out_positions(
    find: PositionFinder,
    nodes: list[ast.Positions],
    work: ExperimentContext,
    axis: str = "position",
) -> PositionTargets | None:
    """Combine the results of `find` for every value of the loops that the positions name."""
    loops = _loops_of(nodes, work)
    written: dict[AxisIndices, PositionCell] = {}
    read: dict[AxisIndices, PositionCell] = {}
    match: PositionMatch | None = None
    for key, values in _loop_values(loops, work):
        match = find(values)
        if match is None or (loops and not match.written):  # an error of this value
            return None
        if loops and len(match.written) > 1:
            work.diagnostics.append(
                BadLoopValue(
                    span=nodes[0].span,
                    name=loops[0],
                    reason="it can't be combined with another sweep of positions",
                    hint="name one position: `token " + loops[0] + "`",
                )
            )
            return None
        for index, (cell, source) in enumerate(zip(match.written, match.read, strict=True)):
            here = key if len(match.written) == 1 else (*key, index)
            written[here] = cell
            read[here] = source
    assert match is not None
    names = tuple(loops)
    swept = match.written
    if len(swept) > 1:
        items = tuple(cell.item for cell in swept)
        work.add_axis(
            Axis(
                axis,
                tuple(cell.label for cell in swept),
                nodes[0].span,
                alias="item" if all(i is not None for i in items) else None,
                items=items,
            )
        )
        names = (*names, axis)
    targets = PositionTargets(names, written, read, match.left_out)
    return targets if work.experiment.generation is None else mark_newest(targets)


def mark_newest(targets: PositionTargets) -> PositionTargets:
    """Mark the cells that follow the newest token of a reply."""
    newest = {key: cell.follows for key, cell in targets.written.items() if cell.follows}
    every = frozenset(key for key, follows in newest.items() if follows == "every")
    return replace(targets, newest=frozenset(newest), every=every)


def _loops_of(nodes: list[ast.Positions], work: ExperimentContext) -> list[str]:
    """Return the loops whose variables occur in positions."""
    named = {name for node in nodes for name in number_names(node)}
    return [name for name in work.loops if name in named]


def _loop_values(
    loops: list[str], work: ExperimentContext
) -> Iterator[tuple[AxisIndices, NamedValues]]:
    """Yield the index and the values by name for every combination of loop values."""
    parameters = work.program.numbers
    for key, values in work.sites.combinations(loops):
        yield key, {**parameters, **values}


def _cells(
    positions: ast.Positions,
    run: str,
    values: NamedValues,
    work: ExperimentContext,
    other: str | None = None,
    *,
    table: PromptTable | None = None,
) -> list[PositionCell] | None:
    """Resolve positions in a run of this or a different prompt set; None after an error."""
    cells, problems = resolve_positions(
        positions,
        table or work.table,
        run,
        tokenizer=work.model.tokenizer,
        loop_values=values,
        loops=tuple(work.loops),
        with_runs=() if other in (None, run) else (other,),
        ranked=work.ranked,
        side=work.side,
        answers=work.answers if table is None else AnswerTokens(reason=_NO_ANSWERS_REASON),
        replies=work.replies if table is None else NO_REPLIES,
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    return None if has_errors(problems) else list(cells)


def _match_same(
    positions: ast.Positions,
    run: str,
    values: NamedValues,
    work: ExperimentContext,
    reader: ExperimentContext,
) -> PositionMatch | None:
    """Match positions in the base run, where they are written, with the same positions in `run`."""
    base = work.experiment.base
    cells = _cells(positions, base, values, work, run)
    if cells is None or (run == base and reader.side == work.side):
        return None if cells is None else PositionMatch(cells, cells)
    sources = _cells(positions, run, values, reader, base)
    if sources is None:
        return None
    by_label = {cell.label: cell for cell in sources}
    pairs = [
        cut_to_shared_rows(cell, by_label[cell.label]) for cell in cells if cell.label in by_label
    ]
    labels = dict.fromkeys(cell.label for cell in (*cells, *sources))
    runs = (work.table.runs[base], work.table.runs[run])
    apart = report_token_mismatch(positions, runs, pairs, work.model.tokenizer)
    said = {d.span for d in work.diagnostics if isinstance(d, UnequalIndexTokens)}
    if apart is not None and apart.span not in said:  # one warning for all values of a loop
        work.diagnostics.append(apart)
    return _checked(pairs, positions, run, tuple(labels), work)


def _select_token(
    rule: spec.Rule, match: PositionMatch | None, work: ExperimentContext
) -> PositionMatch | None:
    """Select the token of a rule that has one direction for each token of its position; None after
    E0341 for another number of tokens."""
    assert rule.token is not None
    number, count = rule.token
    if match is None:
        return None
    row = next(
        (
            (cell, row, sum(map(len, hits)))
            for cell in match.written
            for row, hits in enumerate(cell.hits)
            if hits and (cell.reply is not None or [*map(len, hits)] != [count])
        ),
        None,
    )
    if row is not None and not (work.table.stands_in or work.model.stands_in):
        cell, which, there = row
        has = count_noun(there, "token") if cell.reply is None else "tokens of a reply"
        reason = f"it has {count} directions, and `{cell.label}` has {has} in row "
        reason += f"{work.table.row_ids[which]}"
        hint = "list one direction for each token: `set embed at inserted tokens to [a, b]`"
        problem = BadDirection(span=rule.span, text=rule.span.written, reason=reason, hint=hint)
        work.diagnostics.extend([] if problem in work.diagnostics else [problem])
        return None
    cells = [
        replace(
            cell,
            hits=tuple(
                tuple(numbers[number : number + 1] for numbers in hits[:1]) for hits in cell.hits
            ),
        )
        for cell in match.written
    ]
    return PositionMatch(cells, cells, match.left_out)


def _match_external(
    positions: ast.Positions, external: ExternalRun, values: NamedValues, work: ExperimentContext
) -> PositionMatch | None:
    """Match positions in the base run with the same positions in rows of a different prompt set."""
    cells = _cells(positions, work.experiment.base, values, work)
    sources = _cells(positions, external.run, values, work, table=external.table)
    if cells is None or sources is None:
        return None
    there = {cell.label: cell for cell in sources if any(cell.hits)}
    kept = [cell for cell in cells if cell.label in there]
    if not kept:
        run = external.table.runs[external.run]
        work.diagnostics.append(
            AbsentOccurrence(
                span=positions.span,
                position=positions.span.written,
                run=external.name,
                lacking=len(external.table),
                total=len(external.table),
                example=f'"{run.rows[0].text}"',
                hint=f"name a position that rows of `{external.name}` have, too",
            )
        )
        return None
    left_out = tuple(cell.label for cell in cells if cell.label not in there)
    return PositionMatch(kept, [there[cell.label] for cell in kept], left_out)


def _match_pairs(
    at: ast.Positions,
    onto: ast.Positions,
    run: str,
    values: NamedValues,
    work: ExperimentContext,
    reader: ExperimentContext | None = None,
) -> PositionMatch | None:
    """Match positions that are read in `run` with other positions, written in the base run."""
    said = len(work.diagnostics)
    base = work.experiment.base
    reader = reader or work
    sources = _cells(at, run, values, reader)
    cells = _cells(onto, base, values, work)
    if sources is None and cells is None and run != base and reader.side == work.side:
        _suggest_exchange(at, onto, run, values, work, said)
    if sources is None or cells is None:
        return None
    if len(cells) not in (1, len(sources)) and len(sources) > 1:
        work.diagnostics.append(
            UnpairedPositions(
                span=onto.span,
                first=f"{len(sources)} positions to read",
                second=f"{len(cells)} positions to write",
                by_text=not work.table.stands_in
                and not any(has_open_positions(positions, ["tokens"]) for positions in (at, onto)),
            )
        )
        return None
    count = max(len(cells), len(sources))
    cells = cells * count if len(cells) == 1 else cells
    sources = sources * count if len(sources) == 1 else sources
    pairs: list[tuple[PositionCell, PositionCell]] = []
    several = len({cell.label for cell in cells}) > 1
    for cell, source in zip(cells, sources, strict=True):
        label = f"{source.label} → {cell.label}" if several else source.label
        item = source.item if source.item is not None else cell.item
        pairs.append(cut_to_shared_rows(replace(cell, label=label, item=item), source))
    return _checked(pairs, at, run, tuple(pair[0].label for pair in pairs), work)


def _suggest_exchange(
    at: ast.Positions,
    onto: ast.Positions,
    run: str,
    values: NamedValues,
    work: ExperimentContext,
    said: int,
) -> None:
    """Report one error instead of two if each run has the position of the other."""
    base, now = work.experiment.base, len(work.diagnostics)
    fits = _cells(at, base, values, work) and _cells(onto, run, values, work)
    del work.diagnostics[now:]
    first = next((d for d in work.diagnostics[said:] if isinstance(d, AbsentOccurrence)), None)
    if fits and first is not None:
        hint = f"here `{run}` is read and `{base}` is written: swap the positions or the runs"
        work.diagnostics[said:] = [replace(first, hint=hint)]


def _match_exchanged(
    first: ast.Positions, second: ast.Positions, values: NamedValues, work: ExperimentContext
) -> PositionMatch | None:
    """Match two positions of the base run, each of which receives the vectors of the other."""
    match = _match_pairs(first, second, work.experiment.base, values, work)
    if match is None:
        for number, said in enumerate(work.diagnostics):
            if isinstance(said, UnequalUnion) and said.span == first.span:
                work.diagnostics[number] = UnpairedPositions(
                    span=second.span,
                    first=said.source,
                    second=said.base,
                    hint="write positions with the same number of tokens on both sides",
                )
        return None
    same = first.span.written == second.span.written
    pairs: list[tuple[PositionCell, PositionCell]] = []
    for to, of in zip(match.written, match.read, strict=True):
        for row, (a, b) in enumerate(zip(to.hits, of.hits, strict=True)):
            shared = [set(x) & set(y) for x, y in zip(a, b, strict=False)]
            if any(shared):
                work.diagnostics.append(
                    OverlappingPositions(
                        span=second.span,
                        first=first.span.written,
                        second=second.span.written,
                        row=row,
                        token="a token" if same else f"token {min(map(min, filter(None, shared)))}",
                        by_text=same,
                    )
                )
                return None
        pairs.append((_join_cells(to, of), _join_cells(of, to)))
    return PositionMatch([pair[0] for pair in pairs], [pair[1] for pair in pairs], match.left_out)


def _join_cells(first: PositionCell, second: PositionCell) -> PositionCell:
    """Join the tokens of two cells."""
    hits = tuple(
        tuple((*x, *y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first.hits, second.hits, strict=True)
    )
    return replace(first, hits=hits, follows=first.follows or second.follows)


def _checked(
    pairs: list[tuple[PositionCell, PositionCell]],
    positions: ast.Positions,
    run: str,
    labels: tuple[str, ...],
    work: ExperimentContext,
) -> PositionMatch | None:
    """Select the pairs that some row has in both runs, and check that their token counts agree."""
    base = work.experiment.base
    pairs = [pair for pair in pairs if any(pair[0].hits)]
    if not labels and any(isinstance(node, ast.RankedTokens) for node in walk(positions)):
        return None  # an error in the ranking is already reported
    if not pairs:
        work.diagnostics.append(
            AbsentOccurrence(
                span=positions.span,
                position=labels[0] if len(labels) == 1 else positions.span.written,
                run=run,
                lacking=len(work.table),
                total=len(work.table),
                example=f'"{work.table.runs[run].rows[0].text}"',
                hint=f"name a position that a row has in both `{base}` and `{run}`",
            )
        )
        return None
    written, read = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    problems = check_token_counts(
        written, read, span=positions.span, table=work.table, runs=(base, run)
    )
    work.diagnostics.extend(problems)
    kept = {cell.label for cell in written}
    left_out = tuple(label for label in labels if label not in kept)
    return None if has_errors(problems) else PositionMatch(written, read, left_out)


def cut_to_shared_rows(
    cell: PositionCell, source: PositionCell
) -> tuple[PositionCell, PositionCell]:
    """Remove the rows that lack the position in one of the runs from both cells."""
    keep = [bool(a) and bool(b) for a, b in zip(cell.hits, source.hits, strict=True)]
    if all(keep):
        return cell, source

    def cut(one: PositionCell) -> PositionCell:
        return replace(one, hits=tuple(h if k else () for h, k in zip(one.hits, keep, strict=True)))

    return cut(cell), cut(source)


NUMBER_HINT = "write a number, for example `0.5`"


def resolve_amounts(
    node: ast.Expr | None, work: ExperimentContext, hint: str = NUMBER_HINT
) -> Amounts | None:
    """Evaluate a number for every value of the loops that it names; None after E0337.

    Args:
        hint: What to write instead of an unknown name if the file has no similar one.
    """
    assert node is not None
    names = [part.id for part in walk(node) if isinstance(part, ast.Name)]
    loops = tuple(name for name in work.loops if name in names)
    amounts: dict[AxisIndices, float] = {}
    for key, at in work.sites.combinations(loops):
        values = {**work.program.parameters, **at}
        amount = _number(node, values)
        if amount is None:
            reason, fix = _explain(node, values, work, hint)
            work.diagnostics.append(
                BadAmount(span=node.span, text=node.span.written, reason=reason, hint=fix)
            )
            return None
        amounts[key] = amount
    return Amounts(loops, amounts)


def _number(node: ast.Expr, values: Mapping[str, object]) -> float | None:
    for part in walk(node):
        match part:
            case ast.Name(id=name):
                value = values.get(name)
                if not is_number(value):
                    return None
            case ast.Number() | ast.Negative() | ast.Binary():
                pass
            case _:
                return None
    try:
        return float(evaluate_arithmetic(node, lambda name: values[getattr(name, "id", "")]))
    except ZeroDivisionError:
        return None


def _explain(
    node: ast.Expr, values: Mapping[str, object], work: ExperimentContext, hint: str
) -> tuple[str, str]:
    known = name_list((*work.loops, *work.program.parameters))
    if isinstance(node, ast.Percent):
        return "only numbers can be written here", f"write `{node.value / 100:g}`"
    for part in walk(node):
        if isinstance(part, ast.Name) and part.id in ("zero", "mean"):
            return f"`{part.id}` belongs to `ablate … with {part.id}`", "write a number: `0`"
        if isinstance(part, ast.Name) and part.id not in values:
            if known:
                hint = f"names known here are {known}"
            names = (*work.loops, *work.program.parameters, *work.program.directions)
            return (
                f"`{part.id}` is neither a `for` variable around this rule nor a `param`",
                hint if part.id in names else did_you_mean(part.id, names, hint),
            )
    return "only numbers can be written here", "for example `0.5`, a `param`, or a `for` variable"


EMBED_POINT = SitePoint("embed", None, None)


def fill_empty_picks(
    sites: SiteTargets | None,
    positions: PositionTargets | None,
    otherwise: SitePoint = EMBED_POINT,
) -> tuple[SiteTargets | None, PositionTargets | None]:
    """Replace picks without any site by an arbitrary site without tokens.

    Every cell then has sites and positions in all later stages.

    Args:
        otherwise: The site to use if no cell picks any.
    """
    if sites is None or positions is None or all(sites.points.values()):
        return sites, positions
    some = next((p for p in sites.points.values() if p), (otherwise,))
    points = {key: here or some for key, here in sites.points.items()}
    sources = sites.sources
    if sources is not None:
        read = next((p for p in sources.values() if p), some)
        sources = {key: here or read for key, here in sources.items()}
    empty = [key for key, here in sites.points.items() if not here]
    positions = remove_tokens(positions, sites.axes, sites.points, empty)
    labels = {key: label if sites.points[key] else NOTHING for key, label in sites.labels.items()}
    return (
        replace(sites, points=points, labels=labels, sources=sources),
        positions,
    )


def report_empty_selection(
    span: Span, verb: str, what: str = "one of its cells selects no site"
) -> BadEdit:
    """Return E0332 for an empty pick that leaves nothing to `verb`."""
    return BadEdit(
        span=span,
        reason=f"there would be nothing to {verb}",
        what=what,
        hint="select at least one: `top 1 of …`",
    )


def remove_tokens(
    positions: PositionTargets,
    axes: tuple[str, ...],
    keys: Iterable[AxisIndices],
    empty: Collection[AxisIndices],
) -> PositionTargets:
    """Remove the tokens of some combinations of further axes, which then write nothing.

    Args:
        axes: The further axes, which may include axes of the positions.
        keys: All combinations of their values.
        empty: Those without tokens.
    """
    ends = [max(column) + 1 for column in zip(*keys, strict=True)]
    sizes = dict(zip(axes, ends, strict=True))
    every_axis = (*positions.axes, *(axis for axis in axes if axis not in positions.axes))
    more = every_axis[len(positions.axes) :]
    written: dict[AxisIndices, PositionCell] = {}
    read_at: dict[AxisIndices, PositionCell] = {}
    newest: set[AxisIndices] = set()
    for before in positions.written:
        for after in product(*(range(sizes[axis]) for axis in more)):
            key = (*before, *after)
            at = dict(zip(every_axis, key, strict=True))
            without = tuple(at[axis] for axis in axes) in empty
            for cells, into in ((positions.written, written), (positions.read, read_at)):
                cell = cells[before]
                into[key] = _without_tokens(cell) if without else cell
            if before in positions.newest and not without:
                newest.add(key)
    count = len(positions.axes)
    every = frozenset(key for key in newest if key[:count] in positions.every)
    return replace(
        positions,
        axes=every_axis,
        written=written,
        read=read_at,
        newest=frozenset(newest),
        every=every,
    )


def _without_tokens(cell: PositionCell) -> PositionCell:
    return replace(cell, hits=tuple(((),) if row else () for row in cell.hits))


_HEADS = ("head", "kv_head")

ResolvedSites = tuple[SiteTargets | None, tuple[Axis, ...]]


def resolve_attention_sites(edge: ast.Edge, context: SiteContext) -> ResolvedSites:
    """Resolve layers and heads of a rule on attention edges to points of `pattern`.

    Without a head axis, the points are all heads.
    """
    edge = _read_stack(edge, context)
    stack = "" if edge.stack is None else named_stack(edge.stack, context.shape)
    pattern = SITES[f"pattern {stack}" if stack else "pattern"]
    if edge.stack is not None and not check_stack(edge.stack, context):
        return None, ()
    if edge.heads is not None and context.shape.encodes_apart:
        what, hint = "attention of named heads of an encoder-decoder", "write `layer 2 head 3`"
        context.diagnostics.append(NotSupported(span=edge.heads.span, what=what, later=hint))
        return None, ()
    missing = check_site(context.shape, pattern.name, model=context.model, span=edge.span)
    if missing is not None:
        context.diagnostics.append(_name_attention(missing, stack, context.shape))
        return None, ()
    if edge.heads is not None:
        targets, axes = _resolve_named_heads(edge.heads, [pattern], None, context), ()
    elif not any(axis.word == "layer" for axis in edge.axes):
        what = "attention" if edge.stack is None else f"attention {edge.stack.id}"
        context.diagnostics.append(
            AxisDoesNotFit(
                span=edge.span,
                site=what,
                reason="needs a layer",
                hint=f"write `{what} layer * …` for every layer, one run each, or "
                f"`{what} layers * …` for all of them at once",
            )
        )
        return None, ()
    else:
        site = ast.Site((ast.Name("attention", span=edge.span),), edge.axes, span=edge.span)
        targets, axes = resolve_swept_site(site, context, [pattern])
    if targets is None or not _points_exist(targets, edge, context):
        return None, ()
    labels = {key: label.replace(".pattern", ".attention") for key, label in targets.labels.items()}
    return replace(targets, labels=labels), axes


def _read_stack(edge: ast.Edge, context: SiteContext) -> ast.Edge:
    """Return an edge with the stack that it names without a layer, which parses as a group."""
    names = () if edge.heads is None else edge.heads.names
    if len(names) != 1 or names[0].id not in STACKS or names[0].id in context.groups:
        return edge
    return replace(edge, heads=None, stack=names[0])


def _name_attention(missing: Diagnostic, stack: str, shape: ModelShape) -> Diagnostic:
    """Replace `pattern` by the word of the rule, and name a rule for the stack instead."""
    if not isinstance(missing, SiteNotOnModel):
        return missing
    problem = replace(missing, site=f"attention {stack}".rstrip())
    if stack in shape.others:
        problem = replace(
            problem,
            reason=f"attention weights of its stack `{stack}` aren't read or changed",
            hint=f"change what its heads write: `ablate z {stack} layer 0 head 0 at … with zero`",
        )
    return problem


def resolve_receivers(site: ast.Site, context: SiteContext) -> ResolvedSites:
    """Resolve the receivers of a path: a site, or heads' inputs (`q of top 2 of cie`)."""
    if site.ranked is not None and site.names:
        heads = ast.Site(ranked=site.ranked, span=site.ranked.span)
    elif len(site.names) > 1 and not site.axes and site.names[1].id not in STACKS:
        heads = ast.Site((site.names[1],), span=site.names[1].span)
    else:
        return resolve_site(site, context)
    component = site.names[0]
    kinds = resolve_components(ast.Site((component,), span=component.span), context)
    if kinds is None:
        return None, ()
    without = next((kind for kind in kinds if kind.unit not in _HEADS), None)
    if without is not None:
        hint = "write `q`, `k` or `v`, or only the site"
        if without.has_layer:
            hint += f": `{without.name} layer 3`"
        context.diagnostics.append(
            AxisDoesNotFit(span=component.span, site=without.name, reason="has no heads", hint=hint)
        )
        return None, ()
    loop = component.id if component.id in context.loops else None
    targets = _resolve_named_heads(heads, kinds, loop, context)
    return (targets if targets is not None and _points_exist(targets, site, context) else None), ()


def _points_exist(targets: SiteTargets, node: ast.Edge | ast.Site, context: SiteContext) -> bool:
    """Check that the model has all points."""
    points = (point for here in targets.points.values() for point in here)
    missing = find_missing_point(points, context.shape, context.model, node.span)
    if missing is not None:
        context.diagnostics.append(missing)
    return missing is None


def _resolve_named_heads(
    heads: ast.Site, kinds: list[SiteKind], loop: str | None, context: SiteContext
) -> SiteTargets | None:
    """Resolve other sites of the heads that a group, a short name or a pick names, joined.

    Args:
        loop: The `for` variable over these sites, if there is one.
    """
    if heads.names and heads.names[0].id not in context.groups:
        name = heads.names[0]
        known = ", ".join(context.groups)
        otherwise = f"the file has {known}" if known else "name heads: `group movers = L9H9, L9H6`"
        short = re.fullmatch(r"L([0-9]+)H([0-9]+)", name.id)
        if short is not None:  # `v L3H2`
            otherwise = f"write `{kinds[0].name} layer {short[1]} head {short[2]}`"
        context.diagnostics.append(
            UnknownName(
                span=name.span,
                kind="group",
                name=name.id,
                hint=did_you_mean(name.id, context.groups, otherwise),
            )
        )
        return None
    found, _ = resolve_site(heads, context)
    if found is None:
        return None
    written = heads.span.written
    others = {p.site for here in found.points.values() for p in here}
    wrong = sorted(name for name in others if SITES[name].unit not in _HEADS)
    if wrong:
        context.diagnostics.append(
            AxisDoesNotFit(
                span=heads.span,
                site=written,
                reason=f"doesn't consist of heads only: it contains `{wrong[0]}`",
                hint="name heads, such as `L9H9`, or an experiment that sweeps them",
            )
        )
        return None
    axes = found.axes if loop is None or loop in found.axes else (loop, *found.axes)
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    for number, key in product(range(len(kinds)), found.points):
        here = found.points[key]
        at = key if axes == found.axes else (number, *key)
        alone = len(here) == 1
        own = [
            each
            for point in here
            for each in _points_of_head(point, kinds[number], context.shape, alone=alone)
        ]
        points[at] = tuple(dict.fromkeys(own))
        plain = here and found.labels[key] == label_points(here)
        label = label_points(points[at]) if plain else found.labels[key]
        labels[at] = label if plain or kinds[number].name == "pattern" else (
            f"{kinds[number].name} of {label}"
        )  # fmt: skip
    return SiteTargets(axes, points, labels)


def _points_of_head(
    point: SitePoint, kind: SiteKind, shape: ModelShape, *, alone: bool
) -> Iterator[SitePoint]:
    """Yield a head at another site: its shared key or value head, or all heads that share it.

    Args:
        alone: Whether no other point is named. If others are, a point for all heads is expanded
            into single heads, so that no head is named twice.
    """
    name = f"{kind.name} {SITES[point.site].stack}".strip()
    if point.unit is None:
        every = range(unit_count(shape, name, point.layer))
        yield from (SitePoint(name, point.layer, unit) for unit in ([None] if alone else every))
        return
    own, other = (
        unit_count(shape, point.site, point.layer),
        unit_count(shape, name, point.layer),
    )
    if other <= own:
        yield SitePoint(name, point.layer, point.unit * other // own)
        return
    shared = other // own
    first = point.unit * shared
    yield from (SitePoint(name, point.layer, first + i) for i in range(shared))
