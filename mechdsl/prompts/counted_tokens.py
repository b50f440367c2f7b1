"""Positions that are counted from an end of the prompt: `token 3`, `token *`, `tokens 2..-1`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e03_positions import OutsidePrompt, RaggedPositions
from mechdsl.prompts.named_numbers import number
from mechdsl.prompts.prompt_table import Hits, PositionCell
from mechdsl.prompts.span_occurrences import Occurrences
from mechdsl.syntax import ast
from mechdsl.syntax.format.constructs import position as written_position


@dataclass
class CountedTokens:
    """Counts in the run of `spans`, whose `diagnostics` take what is wrong."""

    spans: Occurrences
    with_runs: tuple[str, ...]
    """Other runs whose prompts must be as long."""

    def __post_init__(self) -> None:
        self.maps = self.spans.maps
        self.diagnostics = self.spans.diagnostics

    def index(self, base: ast.TokenIndex, align: str | None) -> list[PositionCell]:
        """The cells of a number, a range or `*`. Codes: E0305, E0310, E0321."""
        low = number(base.low)
        high = base.high
        if low is None:
            everything = tuple((tuple(range(len(m.row.ids))),) for m in self.maps)
            if base.plural:
                return [PositionCell(base.span.written, everything, follows="every")]
            return self.by_index(base, everything, align)
        if high is None:
            label = base.span.written if base.plural else str(low)
            return self._counted([(label, low, low)], base)
        if (low < 0) != (high < 0):
            return self._mixed(base, low, high, align)
        if low > high:
            text, first, last = f"{low}..{high}", str(high), str(low)
            self.diagnostics.append(EmptyRange(span=base.span, text=text, low=first, high=last))
            return []
        # One index too many is as wrong as a billion, and quicker to refuse.
        longest = max(len(m.row.ids) for m in self.maps)
        low, high = max(low, -longest - 1), min(high, longest)
        if base.plural:
            return self._counted([(base.span.written, low, high)], base)
        return self._counted([(str(i), i, i) for i in range(low, high + 1)], base)

    def _counted(
        self, wanted: list[tuple[str, int, int]], base: ast.TokenIndex
    ) -> list[PositionCell]:
        cells: list[PositionCell] = []
        for label, low, high in wanted:
            hits: list[Hits] = []
            for m in self.maps:
                size = len(m.row.ids) if low < 0 else 0
                hits.append((tuple(range(low + size, high + size + 1)),))
            cells.append(PositionCell(label, tuple(hits)))
        hint = "count within the shortest prompt, or from the end: `token -1`"
        return self.inside(cells, base, hint, special=True)

    def _mixed(
        self, base: ast.TokenIndex, low: int, high: int, align: str | None
    ) -> list[PositionCell]:
        """`2..-1`: from the second to the last, in each row."""
        whole: list[Hits] = []
        for m in self.maps:
            size = len(m.row.ids)
            first, last = (i + size if i < 0 else i for i in (low, high))
            whole.append((tuple(range(first, last + 1)),) if first <= last else ())
        cell = PositionCell(base.span.written, tuple(whole))
        hint = "count within the shortest prompt"
        if not self.inside([cell], base, hint, special=True):
            return []
        if base.plural:
            return [cell]
        return self.by_index(base, whole, align)

    def by_index(
        self, node: ast.Node, whole: Sequence[Hits], align: str | None
    ) -> list[PositionCell]:
        """One cell per index from an end; rows without it drop out. Code: E0305."""
        lengths = [len(m.row.ids) for m in self.maps]
        runs = self.spans.table.runs
        others = [len(r.ids) for name in self.with_runs for r in runs[name].rows]
        everything = lengths + others
        if len(set(everything)) > 1 and align is None:
            self.diagnostics.append(
                RaggedPositions(
                    span=node.span,
                    position=node.span.written,
                    run=self.spans.run,
                    shortest=min(everything),
                    longest=max(everything),
                )
            )
            return []
        found: dict[int, list[Hits]] = {}
        for n, (hits, length) in enumerate(zip(whole, lengths, strict=True)):
            for run in hits:
                for p in run:
                    index = p - length if align == "right" else p
                    found.setdefault(index, [()] * self.spans.total)[n] = ((p,),)
        return [PositionCell(str(index), tuple(found[index])) for index in sorted(found)]

    def inside(
        self,
        cells: Sequence[PositionCell],
        node: ast.Point | ast.TokenIndex,
        hint: str,
        *,
        special: bool,
        behind: bool = False,
    ) -> list[PositionCell]:
        """The cells, where all hits lie in the prompts, else none and E0310; special tokens, and
        those of the answer behind the prompt, count only if told so. Of a `for` that leads out of
        some prompts the others are left."""
        beyond = [self._beyond(cell, special=special, behind=behind) for cell in cells]
        lacking = set[int]().union(*beyond)
        if lacking and self.spans.drops_out(node):
            left = [_without(*each) for each in zip(cells, beyond, strict=True)]
            if any(any(cell.hits) for cell in left):
                return left
        if lacking:
            self.diagnostics.append(
                OutsidePrompt(
                    span=node.span,
                    position=self._written(node),
                    run=self.spans.run,
                    lacking=len(lacking),
                    total=self.spans.total,
                    example=self.spans.example(min(lacking)),
                    hint=hint,
                    unit="image" if self.spans.of_images else "prompt",
                )
            )
        return [] if lacking else list(cells)

    def _written(self, node: ast.Point | ast.TokenIndex) -> str:
        """What a position is called: with the number that a `for` has."""
        if not self.spans.drops_out(node):
            return node.span.written
        point = node if isinstance(node, ast.Point) else ast.Point(node, span=node.span)
        return written_position(ast.Position(point, span=node.span))

    def _beyond(self, cell: PositionCell, *, special: bool, behind: bool) -> set[int]:
        """The rows of whose prompts a cell leads out."""
        lacking: set[int] = set()
        for n, row in enumerate(cell.hits):
            own = self.maps[n].row
            size = len(own.ids)
            allowed = range(size + (self.spans.answers.longest(n) if behind else 0))
            for run in row:
                inside = all(
                    p in allowed and (special or p >= size or not own.special[p]) for p in run
                )
                if not inside:
                    lacking.add(n)
        return lacking


def _without(cell: PositionCell, rows: Collection[int]) -> PositionCell:
    """The cell without what it has in these rows."""
    hits = tuple(() if n in rows else own for n, own in enumerate(cell.hits))
    return replace(cell, hits=hits)
