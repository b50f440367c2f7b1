"""Which rows a table has: one seeded order of all combinations, filtered, without repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from mechdsl.base import limits
from mechdsl.base.plural import plural
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_data import CorruptionWithoutEffect, NoRows, TooMany
from mechdsl.diagnostics.w07_data import EqualRecords, TemplateUnchanged
from mechdsl.images.picture import Picture
from mechdsl.images.regions import Region
from mechdsl.program import spec
from mechdsl.prompts.prompts_block import TEMPLATE, PromptsBlock
from mechdsl.prompts.row_scope import Refusal
from mechdsl.prompts.row_tiles import image_of
from mechdsl.prompts.rows import RECORD, BlockRows, Row
from mechdsl.prompts.seeded_draws import Permutation
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.prompts.values import Rich, TokenId, frozen, plain
from mechdsl.vocab.corruptions import ImageChange, ValueChange, kind_of, of_patches

_MAX_BEFORE_LIMIT = 20_000
"""Rows before `limit` that one standard deviation, or the mean of images, is taken over."""
_BEFORE_LIMIT_OF_DRAWS = 1_000
"""The same where rows are drawn, so that there is no end of them."""
_MAX_BARREN = 1_000
"""Rows drawn one after another that were all there already."""
_TRIED_FOR_ONE = 5
"""Combinations that a check looks at for each row that is enough, before it gives up."""
_TEXT_OF_COLUMN = 10
"""Characters that take as long as the value of a column."""
_TEXT_OF_SPAN = 6
"""The same of a span, which items and separators of lists are."""
_MAX_FAILING = 20
"""Rows that can't be built before it is given up."""
_FAILING_ENOUGH = 5
"""The same for a check."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a row of one run has worked out."""

    prompt: Rich
    values: Mapping[str, object]
    """Those of all names, without spans."""
    texts: tuple[str | TokenId, ...]
    """Those that metrics refer to, in the order of the block."""
    image: Picture | None
    regions: Mapping[str, tuple[Region, ...]]


@dataclass(frozen=True, slots=True)
class Made:
    """What a row and its corruptions have worked out: without the steps to it, which take most of
    the memory of a row."""

    id: int
    key: int
    template: int
    clean: Content
    corrupted: tuple[Content, ...]
    """In the order of the block's corruptions."""


@dataclass
class Collection:
    """The rows of a table, in the seeded order, and what became of the others."""

    rows: list[Made] = field(default_factory=list[Made])
    tried: int = 0
    filtered: int = 0
    """Left out by `where`."""
    equal: int = 0
    """Left out because they were there already."""
    repeated: int = 0
    """Kept although they are equal to one before: other records of a file."""
    compared: Counter[int] = field(default_factory=Counter[int])
    """By number of the template, the rows whose corrupted prompts were set against the clean."""
    unchanged: dict[str, Counter[int]] = field(default_factory=dict[str, Counter[int]])
    """Those whose prompt the corruption left as it was, by its name."""
    complete: bool = False
    """Every combination was looked at."""
    cut: bool = False
    """There are more rows than were asked for."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])


def collect(
    rows: BlockRows,
    tokenizer: TextTokenizer,
    *,
    limit: int | None,
    part: str | None = None,
    most: int | None = None,
    used: Container[str] | None = None,
) -> Collection:
    """The first `limit` rows of the block, or of its part `train` or `test`.

    A split deals the rows of the whole block out in turn, so that the parts never share a row and
    a smaller limit gives a part of a larger one. `most` rows are enough to look at. The tokenizer
    counts tokens in `where`. used: the corruptions whose unchanged rows are left out; None: all.
    Codes: E0506, E0509, E0510 and those of rows.
    """
    found = _Collector(rows, tokenizer, limit, part, most, used)
    refused = found.too_many()
    if refused is not None:
        found.result.diagnostics.append(refused)
    else:
        found.run()
    return found.result


def rows_before_limit(block: PromptsBlock) -> int:
    """How many rows of a block stand for all that there are without `limit`."""
    target = max(block.combinations, _BEFORE_LIMIT_OF_DRAWS if block.draws else 0)
    return min(target, _MAX_BEFORE_LIMIT)


def collect_rows(rows: BlockRows, tokenizer: TextTokenizer, ids: Iterable[int]) -> Collection:
    """The rows with these numbers, without those that `where` leaves out. Codes: those of rows."""
    found = _Collector(rows, tokenizer, None, None)
    for number in ids:
        found.try_row(rows[number])
    return found.result


@dataclass(slots=True)
class _Seen:
    """What is known of the rows that are equal to each other."""

    records: set[int] = field(default_factory=set[int])
    kept: bool = False
    """Whether one of them is in the table, if its part is."""


class _Collector:
    def __init__(
        self,
        rows: BlockRows,
        tokenizer: TextTokenizer,
        limit: int | None,
        part: str | None,
        most: int | None = None,
        used: Container[str] | None = None,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.most = most
        self.block = block = rows.block
        self.limit = limit
        self.part = part
        self.result = Collection()
        self.seen: dict[object, _Seen] = {}
        self.belongs: dict[object, bool] = {}
        """By what rows of one part of a split have in common, whether that part is in the table:
        the test would know what the training has seen otherwise."""
        self.seen_text = 0
        """Characters of the prompts so far, and what columns and spans are worth in them."""
        self.failures: dict[tuple[type[Diagnostic], Span], Diagnostic] = {}
        self.failing = 0
        share = block.spec.split if block.spec.split is not None else 100.0
        self.share = Fraction(str(share)) / 100
        self.only_values = [c.name for c in block.spec.corruptions if _only_values(c)]
        self.used = self.only_values if used is None else used

    def too_many(self) -> TooMany | None:
        """E0506 for what can be told without looking at a row."""
        block = self.block
        if self.limit is not None:
            return self._rows_error(f"{self.limit:,}") if self.limit > limits.ROWS else None
        most = limits.TRIED if block.spec.where else limits.ROWS
        return self._rows_error(f"{block.combinations:,}") if block.combinations > most else None

    def _rows_error(self, amount: str) -> TooMany:
        return TooMany(
            span=self.block.spec.span,
            what=f"rows of prompts `{self.block.name}`",
            amount=amount,
            most=limits.ROWS,
            hint=f"write `prompts {self.block.name} limit 1000` in the experiment",
        )

    def run(self) -> None:
        result = self.result
        barren = 0
        again = self.limit is not None and self.block.draws
        for row in self._stream():
            if result.tried == limits.TRIED:
                result.diagnostics.append(self._gave_up())
                break
            result.tried += 1
            try:
                new = self._take(row)
            except Refusal as refusal:
                new = True
                self.failing += 1
                key = (refusal.kind, refusal.span)
                self.failures.setdefault(key, refusal.diagnostic(row.describe()))
                if self.failing == (_MAX_FAILING if self.most is None else _FAILING_ENOUGH):
                    break
            if len(result.rows) == (limits.ROWS + 1 if self.limit is None else self.limit):
                break
            if self._enough() and (again or result.tried < self.block.combinations):
                result.cut = True
                break
            barren = 0 if new else barren + 1
            if barren > _MAX_BARREN and result.tried >= self.block.combinations:
                break
        else:
            result.complete = True
        result.diagnostics += self.failures.values()
        if not result.diagnostics:
            self._check_result()

    def _enough(self) -> bool:
        """Whether a check has looked at as much as it does."""
        if self.most is None:
            return False
        tried = self.result.tried >= _TRIED_FOR_ONE * self.most
        return tried or len(self.result.rows) == self.most or self.seen_text > limits.CHECKED_TEXT

    def try_row(self, row: Row) -> None:
        """Keep a row that is wanted by its number, whether or not another is equal to it."""
        try:
            if row.passes(self.block.spec.where, self.tokenizer):
                corrupted = [each for _, each in self._corrupted(row)]
                self.result.rows.append(self._made(row, corrupted))
            else:
                self.result.filtered += 1
        except Refusal as refusal:
            self.result.diagnostics.append(refusal.diagnostic(row.describe()))

    def _stream(self) -> Iterator[Row]:
        """All combinations in a seeded order; round after round where draws make new rows."""
        block = self.block
        if not block.combinations:
            return
        turn = 0
        while True:
            images = block.combinations // block.tiles
            order = Permutation(images, block.seed, block.name, "rows", turn)
            for place in range(images):
                first = turn * block.combinations + block.in_file(order[place])
                for tile in range(block.tiles):
                    yield self.rows[first + tile * images]
            if self.limit is None or not block.draws:
                return
            turn += 1

    def _take(self, row: Row) -> bool:
        """Keep a row if it is wanted; whether it was a new one."""
        result = self.result
        if not row.passes(self.block.spec.where, self.tokenizer):
            result.filtered += 1
            return False
        mark = self._mark(row)
        seen = self.seen.setdefault(mark, _Seen())
        if row.places[RECORD] in seen.records or (self.block.spec.distinct and seen.records):
            result.equal += 1
            return False
        seen.records.add(row.places[RECORD])
        corrupted = {c.name: each for c, each in self._corrupted(row)}
        self.seen_text += len(row.record) * _TEXT_OF_COLUMN
        for each in (row, *corrupted.values()):
            self.seen_text += len(each.prompt.text) + len(each.prompt.spans) * _TEXT_OF_SPAN
        unchanged = [n for n in self.only_values if corrupted[n].prompt.text == row.prompt.text]
        result.compared[template_of(row)] += 1
        for name in unchanged:
            result.unchanged.setdefault(name, Counter())[template_of(row)] += 1
        # Before any is left out: whatever runs are used, a row is in the same part.
        together = mark if self.block.spec.tiles is None else image_of(row)
        if together not in self.belongs:
            self.belongs[together] = self._belongs(len(self.belongs) + 1)
        if any(name in self.used for name in unchanged):
            return False
        made = self._made(row, list(corrupted.values()))
        if self.belongs[together]:
            result.repeated += seen.kept
            result.rows.append(made)
        seen.kept = True
        return True

    def _corrupted(self, row: Row) -> Iterator[tuple[spec.Corruption, Row]]:
        for corruption in self.block.spec.corruptions:
            yield corruption, self.rows.corrupted(row, corruption)

    def _made(self, row: Row, corrupted: Sequence[Row]) -> Made:
        """What is worked out now is refused here, with its row; later nothing fails any more."""
        clean, *others = map(self._content, (row, *corrupted))
        made = Made(row.id, row.key, template_of(row), clean, tuple(others))
        for each in (row, *corrupted):
            each.forget_steps()
        return made

    def _content(self, row: Row) -> Content:
        values, texts = row.plain_values, tuple(map(row.named_text, self.block.texts))
        return Content(row.prompt, values, texts, row.image, row.regions)

    def _belongs(self, number: int) -> bool:
        """Whether the block's row, or image of tiles, of this number (from 1) is in the part."""
        train = int(number * self.share) > int((number - 1) * self.share)
        return self.part is None or train == (self.part == "train")

    def _mark(self, row: Row) -> object:
        """What makes two rows equal: prompt, texts, and the values that are not drawn."""
        texts = (row.named_text(name) for name in self.block.texts)
        fixed = tuple(
            frozen(plain(value)) for value in (*row.values.values(), *row.record.values())
        )
        marks = tuple(t.id if isinstance(t, TokenId) else t for t in texts)
        return (row.prompt.text, marks, fixed)

    def _gave_up(self) -> TooMany:
        where = self.block.spec.where
        kept = len(self.result.rows)
        return TooMany(
            span=where[0].span if where else self.block.spec.span,
            what=f"combinations looked at for {self.limit or limits.ROWS:,} rows ({kept:,} found)",
            amount=f"{self.block.combinations:,}",
            most=limits.TRIED,
            hint="narrow the values themselves, so that fewer have to be left out",
        )

    def _check_result(self) -> None:
        result, block = self.result, self.block
        if len(result.rows) > limits.ROWS:
            result.diagnostics.append(self._rows_error(f"more than {limits.ROWS:,}"))
        elif result.cut:
            pass  # those that would be looked at next may be right
        elif not result.rows and any(name in self.used for name in result.unchanged):
            result.diagnostics.extend(self._all_unchanged())
        elif not result.rows:
            where = block.spec.where
            reason, hint = "nothing is left", "give it values"
            if where:
                reason = "no combination fulfils `where`"
                hint = "change the condition, or give more values"
            elif self.part is not None:
                reason = f"too few for a part `{self.part}`"
            span = where[0].span if where else block.spec.span
            result.diagnostics.append(
                NoRows(
                    span=span,
                    prompts=block.name,
                    reason=reason,
                    hint=hint,
                    unit=block.spec.unit,
                )
            )

    def _all_unchanged(self) -> list[Diagnostic]:
        """E0510 at corruptions that change no row, else E0509: each row misses one of them."""
        unchanged, looked_at = self.result.unchanged, self.result.compared.total()
        corruptions = [
            c for c in self.block.spec.corruptions if c.name in unchanged and c.name in self.used
        ]
        without = [c for c in corruptions if unchanged[c.name].total() == looked_at]
        if without:
            return [without_effect(c, of_images=self.block.spec.kind == "images") for c in without]
        names = " or ".join(f"`{c.name}`" for c in corruptions)
        return [
            NoRows(
                span=corruptions[0].span,
                prompts=self.block.name,
                reason=f"{names} leaves each of them unchanged",
                hint="rows need a change by every corruption: take another value as the clean one",
                unit=self.block.spec.unit,
            )
        ]


def equal_records(block: PromptsBlock, found: Collection) -> EqualRecords:
    """W0781 for records of a file that are equal."""
    source = block.spec.rows
    assert source is not None  # generated rows that are equal are left out
    return EqualRecords(
        span=source.span,
        prompts=block.name,
        file=source.span.written,
        equal=found.repeated,
        rows=len(found.rows),
        unit=block.spec.unit,
    )


def template_of(row: Row) -> int:
    """The number of its template."""
    return row.places.get(TEMPLATE, 0)


def templates_unchanged(
    block: PromptsBlock, corruption: spec.Corruption, same: Counter[int], rows: Counter[int]
) -> list[TemplateUnchanged]:
    """W0791 where the corruption changes no row of some template.

    same: by number of the template, how many of its rows are the same as without. rows: of how many
    """
    found = [number for number in sorted(same) if same[number] == rows[number]]
    if not 0 < len(found) < len(rows):  # E0510 says it of all
        return []
    named = [f"template {n + 1} (line {block.templates[n].text.span.line})" for n in found]
    return [
        TemplateUnchanged(
            span=corruption.span,
            run=corruption.name,
            templates=" and ".join(named),
            rows=plural(sum(same[number] for number in found), "row"),
        )
    ]


def without_effect(
    corruption: spec.Corruption, *, of_images: bool = False
) -> CorruptionWithoutEffect:
    """E0510 at the corruption."""
    hint = "change a value that the template shows, or `template` itself"
    if of_images:
        hint = "change a value that the `image` line names"
    unit, shown = ("image", "image") if of_images else ("prompt", "text")
    return CorruptionWithoutEffect(
        span=corruption.span, run=corruption.name, hint=hint, unit=unit, shown=shown
    )


def _only_values(corruption: spec.Corruption) -> bool:
    """Whether the text alone tells what the corruption did."""
    shown = (ValueChange, ImageChange)  # what images are made of is their text
    return not of_patches(corruption.changes) and all(
        isinstance(kind_of(change), shown) for change in corruption.changes
    )
