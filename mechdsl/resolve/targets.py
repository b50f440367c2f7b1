"""Where rules read and write: positions of both runs, laid out over loops and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e03_coordinates import BadLoopValue
from mechdsl.diagnostics.e03_positions import AbsentOccurrence, JoinedUnequal, OutsidePrompt
from mechdsl.diagnostics.e03_rules import OverlappingPositions, UnpairedPositions
from mechdsl.diagnostics.w07_names import OtherTokens
from mechdsl.program import spec
from mechdsl.prompts.answer_tokens import AnswerTokens
from mechdsl.prompts.position_hits import check_joined
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import PositionCell, PromptTable
from mechdsl.prompts.reply_positions import NO_REPLIES
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.open_axes import open_positions
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import Apart, Key, PositionTargets
from mechdsl.resolve.unlike_tokens import other_tokens
from mechdsl.syntax import ast
from mechdsl.syntax.walk import numbers_named, walk


@dataclass(frozen=True)
class Found:
    """Positions of one rule: the cells where it writes, those where it reads, in the same order,
    and the labels of positions that no row has in both runs."""

    written: list[PositionCell]
    read: list[PositionCell]
    left_out: tuple[str, ...] = ()


Values: TypeAlias = Mapping[str, Any]
"""Parameters and the current values of loops."""
Find: TypeAlias = Callable[[Values], Found | None]
_ELSEWHERE = "rows of another block have no text behind them"


def rule_targets(
    rule: spec.Rule,
    run: str,
    work: Work,
    apart: Apart | None = None,
    *,
    exchanged: bool = False,
) -> PositionTargets | None:
    """Where the rule writes and reads; its sweep over positions becomes an axis.

    apart: another block whose rows are read, whichever they are. exchanged: each of two positions
    is written with what is read at the other.
    """
    nodes = [rule.at] if rule.onto is None else [rule.at, rule.onto]

    def find(values: Values) -> Found | None:
        if apart is not None:
            return _apart(rule.at, apart, values, work)
        if rule.onto is None:
            return _same(rule.at, run, values, work)
        if exchanged:
            return _exchanged(rule.at, rule.onto, values, work)
        return _across(rule.at, rule.onto, run, values, work)

    return laid_out(find, nodes, work)


def plain_targets(
    positions: ast.Positions, work: Work, axis: str = "position"
) -> PositionTargets | None:
    """Positions of the base run alone."""

    def find(values: Values) -> Found | None:
        cells = _cells(positions, work.experiment.base, values, work)
        return None if cells is None else Found(cells, cells)

    return laid_out(find, [positions], work, axis)


def later_targets(
    positions: ast.Positions, low: int, high: int | None, work: Work, *, both: bool = False
) -> PositionTargets | None:
    """Tokens of the base run (written), and those that lie `low` to `high` behind them (read).

    both: or in front of them. Rows that have none there aren't part of the cell, and cells without
    rows are left out: all of them, after E0310.
    """
    base = work.table.runs[work.experiment.base]

    def later(row: int, tokens: Iterable[int]) -> tuple[int, ...]:
        end = len(base.rows[row].ids)
        last = end if high is None else high + 1
        found: set[int] = set()
        for token in tokens:
            found.update(range(token + low, min(end, token + last)))
            if both:
                found.update(range(max(0, token - last + 1), token - low + 1))
        return tuple(sorted(found))

    def find(values: Values) -> Found | None:
        cells = _cells(positions, base.name, values, work)
        if cells is None:
            return None
        pairs: list[tuple[PositionCell, PositionCell]] = []
        for cell in cells:
            hits = tuple(
                tuple(own for tokens in hit if (own := later(row, tokens)))
                for row, hit in enumerate(cell.hits)
            )
            pairs.append(_common(cell, replace(cell, hits=hits)))
        there = [pair for pair in pairs if any(pair[0].hits)]
        if not there:
            problem = OutsidePrompt(
                span=positions.span,
                position=f"a token {low} or more behind {positions.span.written}",
                run=base.name,
                lacking=len(work.table),
                total=len(work.table),
                example=f'"{base.rows[0].text}"',
                hint="name an earlier position, or a smaller distance",
                unit="prompt" if base.rows[0].image is None else "image",
            )
            work.diagnostics.append(problem)
            return None
        kept = {pair[0].label for pair in there}
        left_out = tuple(cell.label for cell in cells if cell.label not in kept)
        return Found([pair[0] for pair in there], [pair[1] for pair in there], left_out)

    return laid_out(find, [positions], work)


def sweeps(positions: ast.Positions, work: Work) -> bool:
    """Whether there is more than one cell; what is wrong with them is said elsewhere."""
    before = len(work.diagnostics)
    values = next(_loop_values(_loops_of([positions], work), work))[1]
    cells = _cells(positions, work.experiment.base, values, work)
    del work.diagnostics[before:]
    return cells is not None and len(cells) > 1


def cells_elsewhere(
    positions: ast.Positions, table: PromptTable, run: str, work: Work
) -> tuple[list[PositionCell], list[Diagnostic]]:
    """The cells of a rule's positions in rows of another block, for every value of its loops."""
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
        )
        cells += own
        problems += (each for each in said if each not in problems)
    return cells, problems


def laid_out(
    find: Find, nodes: list[ast.Positions], work: Work, axis: str = "position"
) -> PositionTargets | None:
    """What `find` finds for every value of the loops that the positions name."""
    loops = _loops_of(nodes, work)
    written: dict[Key, PositionCell] = {}
    read: dict[Key, PositionCell] = {}
    found: Found | None = None
    for key, values in _loop_values(loops, work):
        found = find(values)
        if found is None:
            return None
        if loops and len(found.written) > 1:
            work.diagnostics.append(
                BadLoopValue(
                    span=nodes[0].span,
                    name=loops[0],
                    reason="it can't stand beside another sweep of positions",
                    hint="name one position: `token " + loops[0] + "`",
                )
            )
            return None
        for index, (cell, source) in enumerate(zip(found.written, found.read, strict=True)):
            here = key if len(found.written) == 1 else (*key, index)
            written[here] = cell
            read[here] = source
    assert found is not None
    names = tuple(loops)
    swept = found.written
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
    targets = PositionTargets(names, written, read, found.left_out)
    return targets if work.experiment.generation is None else following(targets)


def following(targets: PositionTargets) -> PositionTargets:
    """The same, with what of it follows the newest token of a reply."""
    newest = {key: cell.follows for key, cell in targets.written.items() if cell.follows}
    every = frozenset(key for key, follows in newest.items() if follows == "every")
    return replace(targets, newest=frozenset(newest), every=every)


def _loops_of(nodes: list[ast.Positions], work: Work) -> list[str]:
    """The loops whose variables stand in positions."""
    named = {name for node in nodes for name in numbers_named(node)}
    return [name for name in work.loops if name in named]


def _loop_values(loops: list[str], work: Work) -> Iterator[tuple[Key, Values]]:
    """Every combination of the loops' values: its key, and the values by name."""
    parameters = {k: v for k, v in work.program.parameters.items() if isinstance(v, int | float)}
    for key, values in work.sites.combinations(loops):
        yield key, {**parameters, **values}


def _cells(
    positions: ast.Positions,
    run: str,
    values: Values,
    work: Work,
    other: str | None = None,
    *,
    table: PromptTable | None = None,
) -> list[PositionCell] | None:
    """The cells of positions in one run, of the sampled rows or of another block's."""
    cells, problems = resolve_positions(
        positions,
        table or work.table,
        run,
        tokenizer=work.model.tokenizer,
        loop_values=values,
        loops=tuple(work.loops),
        with_runs=() if other in (None, run) else (other,),
        ranked=work.ranked,
        answers=work.answers if table is None else AnswerTokens(reason=_ELSEWHERE),
        replies=work.replies if table is None else NO_REPLIES,
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    return None if has_errors(problems) else list(cells)


def _same(positions: ast.Positions, run: str, values: Values, work: Work) -> Found | None:
    """The same positions in the base run, where they are written, and in `run`."""
    base = work.experiment.base
    cells = _cells(positions, base, values, work, run)
    if cells is None or run == base:
        return None if cells is None else Found(cells, cells)
    sources = _cells(positions, run, values, work, base)
    if sources is None:
        return None
    by_label = {cell.label: cell for cell in sources}
    pairs = [_common(cell, by_label[cell.label]) for cell in cells if cell.label in by_label]
    labels = dict.fromkeys(cell.label for cell in (*cells, *sources))
    runs = (work.table.runs[base], work.table.runs[run])
    apart = other_tokens(positions, runs, pairs, work.model.tokenizer)
    said = {d.span for d in work.diagnostics if isinstance(d, OtherTokens)}
    if apart is not None and apart.span not in said:  # once for all values of a loop
        work.diagnostics.append(apart)
    return _checked(pairs, positions, run, tuple(labels), work)


def _apart(positions: ast.Positions, apart: Apart, values: Values, work: Work) -> Found | None:
    """The same positions in the base run and in the rows of another block."""
    cells = _cells(positions, work.experiment.base, values, work)
    sources = _cells(positions, apart.run, values, work, table=apart.table)
    if cells is None or sources is None:
        return None
    there = {cell.label: cell for cell in sources if any(cell.hits)}
    kept = [cell for cell in cells if cell.label in there]
    if not kept:
        run = apart.table.runs[apart.run]
        work.diagnostics.append(
            AbsentOccurrence(
                span=positions.span,
                position=positions.span.written,
                run=apart.name,
                lacking=len(apart.table),
                total=len(apart.table),
                example=f'"{run.rows[0].text}"',
                hint=f"name a position that rows of `{apart.name}` have too",
            )
        )
        return None
    left_out = tuple(cell.label for cell in cells if cell.label not in there)
    return Found(kept, [there[cell.label] for cell in kept], left_out)


def _across(
    at: ast.Positions, onto: ast.Positions, run: str, values: Values, work: Work
) -> Found | None:
    """Read at some positions of `run`, written at others of the base run."""
    said = len(work.diagnostics)
    base = work.experiment.base
    sources = _cells(at, run, values, work)
    cells = _cells(onto, base, values, work)
    if sources is None and cells is None and run != base:
        _exchangeable(at, onto, run, values, work, said)
    if sources is None or cells is None:
        return None
    if len(cells) not in (1, len(sources)) and len(sources) > 1:
        work.diagnostics.append(
            UnpairedPositions(
                span=onto.span,
                first=f"{len(sources)} positions to read",
                second=f"{len(cells)} positions to write",
                by_text=not work.table.stands_in
                and not any(open_positions(each, ["tokens"]) for each in (at, onto)),
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
        pairs.append(_common(replace(cell, label=label, item=item), source))
    return _checked(pairs, at, run, tuple(pair[0].label for pair in pairs), work)


def _exchangeable(
    at: ast.Positions, onto: ast.Positions, run: str, values: Values, work: Work, said: int
) -> None:
    """Where each side has the position of the other, one message instead of two."""
    base, now = work.experiment.base, len(work.diagnostics)
    fits = _cells(at, base, values, work) and _cells(onto, run, values, work)
    del work.diagnostics[now:]
    first = next((d for d in work.diagnostics[said:] if isinstance(d, AbsentOccurrence)), None)
    if fits and first is not None:
        hint = f"`{run}` is read here and `{base}` is written: exchange the positions, or the runs"
        work.diagnostics[said:] = [replace(first, hint=hint)]


def _exchanged(
    first: ast.Positions, second: ast.Positions, values: Values, work: Work
) -> Found | None:
    """Two positions of the base run: each is written with what is read at the other."""
    found = _across(first, second, work.experiment.base, values, work)
    if found is None:
        for number, said in enumerate(work.diagnostics):
            if isinstance(said, JoinedUnequal) and said.span == first.span:
                work.diagnostics[number] = UnpairedPositions(
                    span=second.span,
                    first=said.source,
                    second=said.base,
                    hint="write positions of equally many tokens on both sides",
                )
        return None
    same = first.span.written == second.span.written
    pairs: list[tuple[PositionCell, PositionCell]] = []
    for to, of in zip(found.written, found.read, strict=True):
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
        pairs.append((_joined(to, of), _joined(of, to)))
    return Found([pair[0] for pair in pairs], [pair[1] for pair in pairs], found.left_out)


def _joined(first: PositionCell, second: PositionCell) -> PositionCell:
    """The tokens of both, side by side."""
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
    work: Work,
) -> Found | None:
    """Pairs that some row has in both runs, with as many tokens in each."""
    base = work.experiment.base
    pairs = [pair for pair in pairs if any(pair[0].hits)]
    if not labels and any(isinstance(node, ast.RankedTokens) for node in walk(positions)):
        return None  # what ranks them has been refused
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
    problems = check_joined(written, read, span=positions.span, table=work.table, runs=(base, run))
    work.diagnostics.extend(problems)
    kept = {cell.label for cell in written}
    left_out = tuple(label for label in labels if label not in kept)
    return None if has_errors(problems) else Found(written, read, left_out)


def _common(cell: PositionCell, source: PositionCell) -> tuple[PositionCell, PositionCell]:
    """Both without the rows that lack the position in one of the runs."""
    keep = [bool(a) and bool(b) for a, b in zip(cell.hits, source.hits, strict=True)]
    if all(keep):
        return cell, source

    def cut(one: PositionCell) -> PositionCell:
        return replace(one, hits=tuple(h if k else () for h, k in zip(one.hits, keep, strict=True)))

    return cut(cell), cut(source)
