"""Which rows a table has: a seeded order of all combinations, filtered, without duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import prod
from typing import Literal

from mechdsl.base import limits
from mechdsl.base.hashing import Permutation
from mechdsl.base.source import Span
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.prompts import (
    CorruptionWithoutEffect,
    EqualRecords,
    NoRows,
    TemplateUnchanged,
    TooManyValues,
)
from mechdsl.images.picture import Picture, Region, mean_picture
from mechdsl.program import spec
from mechdsl.program.images import averaged_block
from mechdsl.prompts.block import TEMPLATE, PromptsBlock
from mechdsl.prompts.expressions import bad_value, is_random, name_uses
from mechdsl.prompts.rows import RECORD, BlockRows, Row, source_image_name
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.prompts.values import (
    DrawKey,
    Refusal,
    RichText,
    RowValue,
    TokenId,
    to_hashable,
    to_plain,
)
from mechdsl.vocab.corruptions import ImageChange, ValueChange, change_kind, patch_changes

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
class RowContent:
    """What a row of one run has worked out."""

    prompt: RichText
    values: Mapping[str, object]
    """Those of all names, without spans."""
    texts: tuple[str | TokenId, ...]
    """Those that metrics refer to, in the order of the block."""
    image: Picture | None
    regions: Mapping[str, tuple[Region, ...]]


@dataclass(frozen=True, slots=True)
class BuiltRow:
    """What a row and its corruptions have worked out: without the steps to it, which take most of
    the memory of a row."""

    id: int
    key: int
    template: int
    clean: RowContent
    corrupted: tuple[RowContent, ...]
    """In the order of the block's corruptions."""


@dataclass
class RowCollection:
    """The rows of a table, in the seeded order, and what became of the others."""

    rows: list[BuiltRow] = field(default_factory=list[BuiltRow])
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


def select_rows(
    rows: BlockRows,
    tokenizer: TextTokenizer,
    *,
    limit: int | None,
    part: str | None = None,
    most: int | None = None,
    used: Container[str] | None = None,
) -> RowCollection:
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


def count_rows_before_limit(block: PromptsBlock) -> int:
    """How many rows of a block stand for all that there are without `limit`."""
    target = max(block.combinations, _BEFORE_LIMIT_OF_DRAWS if block.draws else 0)
    return min(target, _MAX_BEFORE_LIMIT)


def select_rows_by_id(
    rows: BlockRows, tokenizer: TextTokenizer, ids: Iterable[int]
) -> RowCollection:
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
        self.result = RowCollection()
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

    def too_many(self) -> TooManyValues | None:
        """E0506 for what can be told without looking at a row."""
        block = self.block
        if self.limit is not None:
            return self._rows_error(f"{self.limit:,}") if self.limit > limits.ROWS else None
        most = limits.COMBINATIONS if block.spec.where else limits.ROWS
        return self._rows_error(f"{block.combinations:,}") if block.combinations > most else None

    def _rows_error(self, amount: str) -> TooManyValues:
        return TooManyValues(
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
            if result.tried == limits.COMBINATIONS:
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
        result.compared[template_number(row)] += 1
        for name in unchanged:
            result.unchanged.setdefault(name, Counter())[template_number(row)] += 1
        # Before any is left out: whatever runs are used, a row is in the same part.
        together = mark if self.block.spec.tiles is None else source_image_name(row)
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

    def _made(self, row: Row, corrupted: Sequence[Row]) -> BuiltRow:
        """What is worked out now is refused here, with its row; later nothing fails any more."""
        clean, *others = map(self._content, (row, *corrupted))
        made = BuiltRow(row.id, row.key, template_number(row), clean, tuple(others))
        for each in (row, *corrupted):
            each.forget_steps()
        return made

    def _content(self, row: Row) -> RowContent:
        values, texts = row.plain_values, tuple(map(row.named_text, self.block.texts))
        return RowContent(row.prompt, values, texts, row.image, row.regions)

    def _belongs(self, number: int) -> bool:
        """Whether the block's row, or image of tiles, of this number (from 1) is in the part."""
        train = int(number * self.share) > int((number - 1) * self.share)
        return self.part is None or train == (self.part == "train")

    def _mark(self, row: Row) -> object:
        """What makes two rows equal: prompt, texts, and the values that are not drawn."""
        texts = (row.named_text(name) for name in self.block.texts)
        fixed = tuple(
            to_hashable(to_plain(value)) for value in (*row.values.values(), *row.record.values())
        )
        marks = tuple(t.id if isinstance(t, TokenId) else t for t in texts)
        return (row.prompt.text, marks, fixed)

    def _gave_up(self) -> TooManyValues:
        where = self.block.spec.where
        kept = len(self.result.rows)
        return TooManyValues(
            span=where[0].span if where else self.block.spec.span,
            what=f"combinations looked at for {self.limit or limits.ROWS:,} rows ({kept:,} found)",
            amount=f"{self.block.combinations:,}",
            most=limits.COMBINATIONS,
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
            return [no_effect_error(c, of_images=self.block.spec.kind == "images") for c in without]
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


def equal_records_warning(block: PromptsBlock, found: RowCollection) -> EqualRecords:
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


def template_number(row: Row) -> int:
    """The number of its template."""
    return row.places.get(TEMPLATE, 0)


def unchanged_template_warnings(
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
            rows=count_noun(sum(same[number] for number in found), "row"),
        )
    ]


def no_effect_error(
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
    return not patch_changes(corruption.changes) and all(
        isinstance(change_kind(change), shown) for change in corruption.changes
    )


SplitPart = Literal["train", "test"]


def rows_convention(
    block: PromptsBlock,
    found: RowCollection,
    kept: int,
    limit: int | None,
    part: SplitPart | None,
    unchanged: Mapping[str, int],
) -> dict[str, str]:
    """Which rows the table has (`rows`), and what was left out on the way (`dropped`).

    unchanged: by corruption that is used, rows that it left as they were.
    """
    unit = "records" if block.data is not None and block.size == 1 else "combinations"
    unit = unit if block.spec.tiles is None else "tiles"
    text = f"{kept:,} of {block.combinations:,} {unit}"
    if block.draws:
        text = f"{kept:,} drawn from {block.combinations:,} {unit}"
    if part is not None and block.spec.split is not None:
        text += f", part `{part}` of a {block.spec.split:g}% split"
    if limit is not None and kept < limit:
        text += f" (limit {limit:,}, there are no more)"
    if found.repeated:
        text += f", {found.repeated:,} of them equal to another"
    out = {"rows": f"{text}, seed {block.seed}"}
    dropped = [f"{n:,} by `where`" for n in (found.filtered,) if n]
    dropped += [f"{n:,} that were there already" for n in (found.equal,) if n]
    dropped += [f"{n:,} that `{run}` leaves unchanged" for run, n in unchanged.items()]
    if dropped:
        out["dropped"] = ", ".join(dropped)
    return out


MAX_IMBALANCE = 0.1
"""Part of the rows that may have to be of another combination for all to have the same number."""


def balanced_variables(block: PromptsBlock, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the variables, in the order of the file; none of a data file.

    rows: at least a whole round, without those that are left out.
    """
    if block.data is not None:
        return ()
    names = [name for name, _ in block.axes]
    places = {name: [row.places[name] for row in rows] for name in names}
    names = [name for name in names if len(set(places[name])) > 1]
    while names and not _even([places[name] for name in names]):
        names.remove(max(names, key=lambda name: len(set(places[name]))))
    return tuple(names)


def exhausted_variables(block: PromptsBlock, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the variables of which rows have every value that the block declares; none of a data
    file, whose values are those that somebody found."""
    if block.data is not None:
        return ()
    return tuple(
        name
        for name, values in block.axes
        if len({row.places[name] for row in rows}) == len(values)
    )


def _even(columns: Sequence[Sequence[int]]) -> bool:
    """Whether each combination that there is has as many rows as the next, or one more, as of the
    last round there may be a part; or nearly as many, as rows that were there already are left out.
    Where a combination has too few different rows, these soon make it rare."""
    counts = Counter(zip(*columns, strict=True)).values()
    rows, mean = sum(counts), sum(counts) / len(counts)
    moved = sum(abs(count - mean) for count in counts) / 2
    return max(counts) - min(counts) <= 1 or moved <= MAX_IMBALANCE * rows


def expand_class_texts(block: PromptsBlock, row: Row) -> tuple[tuple[str, ...], list[Diagnostic]]:
    """The text with all values of the names in it, whichever rows there are, equal ones once.

    row: any row of the block. Codes: E0503, E0506 and those of values.
    """
    node = block.spec.classes
    if node is None:
        return (), []
    used = dict.fromkeys(use.name for use in name_uses(node, block.placeholders))
    names = [name for name in used if name not in block.parameters]
    of_rows = (*block.columns, *(name for name, _ in block.axes))
    odd = next((name for name in names if name not in of_rows), None)
    hint = "name values with a domain (`kind in [...]`) and columns"
    try:
        if odd is not None or is_random(node, block.placeholders):
            reason = f"`{odd}` is made of other values" if odd else "it is drawn row by row"
            raise bad_value(node.span, reason, hint)
        found: dict[str, None] = {}
        for values in _combinations(block, names, node.span.text):
            text = row.with_values(values).as_text(node, DrawKey("classes"))
            if not isinstance(text, str) or not text.strip():
                raise bad_value(node.span, "it is empty", "write a text for each class")
            found[text.strip()] = None
    except Refusal as refusal:
        return (), [refusal.diagnostic("every row")]
    return tuple(found), []


def _combinations(
    block: PromptsBlock, names: list[str], text: str
) -> Iterator[Mapping[str, RowValue]]:
    """Each value of each name with each of the others."""
    axes = dict(block.axes)
    values = [axes[name] if name in axes else block.column(name) or () for name in names]
    amount = prod(map(len, values))
    if amount > limits.CLASSES:
        assert block.spec.classes is not None
        raise Refusal(
            TooManyValues,
            block.spec.classes.span,
            what=f"`{text}`",
            amount=f"{amount:,} classes",
            most=limits.CLASSES,
            hint="name values with fewer different ones",
        )
    for each in product(*values):
        yield dict(zip(names, each, strict=True))


def set_mean_image(
    block: PromptsBlock, tokenizer: TextTokenizer, enough: int | None
) -> list[Diagnostic]:
    """Give a block whose image is the mean of another's rows, or of those of a part, that mean:
    before `limit`.

    enough: how many rows a check looks at. Codes: those of the rows.
    """
    of = averaged_block(block.spec.image)
    if of is None or of.name not in block.blocks or block.averaged is not None:
        return []
    other = PromptsBlock(
        block.blocks[of.name],
        seed=block.seed,
        words=block.words,
        parameters=block.parameters,
        blocks=block.blocks,
        python=block.python,
    )
    if has_errors(other.diagnostics) or other.columns_unknown:
        return other.diagnostics
    limit = count_rows_before_limit(other)
    found = select_rows(BlockRows(other), tokenizer, limit=limit, part=of.part, most=enough)
    images = [made.clean.image for made in found.rows]
    pictures = tuple(image for image in images if image is not None)
    block.averaged = mean_picture(pictures, of.whole) if pictures else None
    return found.diagnostics
