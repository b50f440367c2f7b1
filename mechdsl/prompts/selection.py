"""The selection of a table's rows: a seeded order of all combinations, filtered, deduplicated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import prod
from typing import Literal

from mechdsl.base import limits
from mechdsl.base.text import Span, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.prompts import (
    CorruptionWithoutEffect,
    EqualRecords,
    NoRows,
    TemplateUnchanged,
    TooManyValues,
)
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.images.picture import mean_picture
from mechdsl.images.processing import TilingProcessor, UnsupportedProcessor
from mechdsl.program import spec
from mechdsl.program.images import MEAN_IMAGE, averaged_blocks
from mechdsl.prompts.block import TEMPLATE, PromptsBlock
from mechdsl.prompts.expressions import bad_value, is_random, name_uses
from mechdsl.prompts.rows import RECORD, BlockRows, BuiltRow, Row, source_image_name
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.prompts.values import DrawKey, Refusal, RowValue
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import ImageChange, ValueChange, change_kind, patch_changes

_MAX_BEFORE_LIMIT = 20_000
"""Maximum number of rows before `limit` for a standard deviation or a mean image."""

_BEFORE_LIMIT_OF_DRAWS = 1_000
"""Number of rows before `limit` if rows have draws, so that their number is unlimited."""

_MAX_BARREN = 1_000
"""Maximum number of consecutive rows without a new one."""

_TRIED_FOR_ONE = 5
"""Number of combinations per needed row after which a check gives up."""

_TEXT_OF_COLUMN = 10
"""Number of characters that take as long as the value of a column."""

_TEXT_OF_SPAN = 6
"""Number of characters that take as long as a span: an item or separator of a list."""

_MAX_FAILING = 20
"""Number of rows that can't be built after which selection stops."""

_FAILING_ENOUGH = 5
"""Number of rows that can't be built after which a check stops."""


@dataclass
class RowCollection:
    """The rows of a table in the seeded order, and counts of the other rows."""

    rows: list[BuiltRow] = field(default_factory=list[BuiltRow])
    tried: int = 0
    filtered: int = 0
    """Number dropped by `where`."""
    equal: int = 0
    """Number dropped as duplicates."""
    repeated: int = 0
    """Number included although equal to an earlier row: they are other records of a file."""
    compared: Counter[int] = field(default_factory=Counter[int])
    """By template number, the rows whose corrupted prompts were compared with the clean ones."""
    unchanged: dict[str, Counter[int]] = field(default_factory=dict[str, Counter[int]])
    """By corruption, the compared rows whose prompt it left unchanged, by template number."""
    complete: bool = False
    """Every combination was tried."""
    cut: bool = False
    """There are more rows than requested."""
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
    """Select the first `limit` rows of the block, or of its part `train` or `test`.

    A split assigns the rows of the whole block in turn, so that the parts never share a row and a
    smaller limit selects a subset. Codes: E0506, E0509, E0510 and those of rows.

    Args:
        rows: The rows of the block.
        tokenizer: The tokenizer that counts tokens in `where`.
        limit: The maximum number of rows.
        part: The part of the split.
        most: The number of rows after which a check stops.
        used: The corruptions whose unchanged rows are dropped; None: all.
    """
    collector = _Collector(rows, tokenizer, limit, part, most, used)
    refused = collector.too_many()
    if refused is not None:
        collector.result.diagnostics.append(refused)
    else:
        collector.run()
    return collector.result


def count_rows_before_limit(block: PromptsBlock) -> int:
    """Return the number of rows that represent all rows of a block without `limit`."""
    target = max(block.combinations, _BEFORE_LIMIT_OF_DRAWS if block.draws else 0)
    return min(target, _MAX_BEFORE_LIMIT)


def select_rows_by_id(
    rows: BlockRows, tokenizer: TextTokenizer, ids: Iterable[int]
) -> RowCollection:
    """Select the rows with these numbers, except those that `where` drops. Codes: those of rows."""
    collector = _Collector(rows, tokenizer, None, None)
    for number in ids:
        collector.try_row(rows[number])
    return collector.result


@dataclass(slots=True)
class _Seen:
    """The rows that are equal to each other."""

    records: set[int] = field(default_factory=set[int])
    kept: bool = False
    """Whether one of them is in the table, or would be if its part were."""


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
        """By the property that rows of one part of a split share, whether that part is in the
        table: otherwise, the test would contain what the training has seen."""
        self.seen_text = 0
        """Characters of the prompts so far, plus the equivalent of columns and spans."""
        self.failures: dict[tuple[type[Diagnostic], Span], Diagnostic] = {}
        self.failing = 0
        share = block.spec.split if block.spec.split is not None else 100.0
        self.share = (Fraction(str(share)) / 100).as_integer_ratio()
        invalid = any(picture.is_invalid for picture in block.spec.pictures)
        corruptions = () if invalid else block.spec.corruptions
        self.only_values = [
            corruption.name for corruption in corruptions if _only_values(corruption)
        ]
        self.used = self.only_values if used is None else used

    def too_many(self) -> TooManyValues | None:
        """Return E0506 if it is known without building a row."""
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
                new = self._add_if_selected(row)
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
        """Return whether a check has read enough."""
        if self.most is None:
            return False
        tried = self.result.tried >= _TRIED_FOR_ONE * self.most
        return tried or len(self.result.rows) == self.most or self.seen_text > limits.CHECKED_TEXT

    def try_row(self, row: Row) -> None:
        """Add a row requested by its number, even if another row is equal."""
        try:
            if row.passes(self.block.spec.where, self.tokenizer):
                corrupted = [each for _, each in self._corrupted(row)]
                self.result.rows.append(self._made(row, corrupted))
            else:
                self.result.filtered += 1
        except Refusal as refusal:
            self.result.diagnostics.append(refusal.diagnostic(row.describe()))

    def _stream(self) -> Iterator[Row]:
        """Yield all combinations in a seeded order; in further rounds if draws make new rows."""
        block = self.block
        if not block.combinations:
            return
        turn, tiles = 0, block.tiles
        images = block.combinations // tiles
        while True:
            for number in self.rows.in_order(turn):
                first = turn * block.combinations + number
                for tile in range(tiles):
                    yield self.rows[first + tile * images]
            if self.limit is None or not block.draws:
                return
            turn += 1

    def _add_if_selected(self, row: Row) -> bool:
        """Add a row, or count why it is dropped; return whether it was a new one.

        `where`, an equal earlier row and a corruption without effect drop a row. A row of the
        other part of a split is not added either. `rows_convention` describes the counts.
        """
        result = self.result
        if not row.passes(self.block.spec.where, self.tokenizer):
            result.filtered += 1
            return False
        mark = row.mark
        seen = self.seen.get(mark)
        if seen is None:
            seen = self.seen[mark] = _Seen()
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
        # Assigned before rows are dropped: a row's part is independent of the runs in use.
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
        """Compute everything now, so that errors name the row and nothing fails later."""
        made = self.rows.built.get(row.id)
        if made is None:
            clean, *others = (each.content for each in (row, *corrupted))
            made = BuiltRow(row.id, row.key, template_number(row), clean, tuple(others))
            self.rows.keep_built(row.id, made)
        for each in (row, *corrupted):
            each.forget_steps()
        return made

    def _belongs(self, number: int) -> bool:
        """Return whether the row, or image of tiles, with this number (from 1) is in the part."""
        if self.part is None:
            return True
        share, whole = self.share
        train = number * share // whole > (number - 1) * share // whole
        return train == (self.part == "train")

    def _gave_up(self) -> TooManyValues:
        where = self.block.spec.where
        kept = len(self.result.rows)
        return TooManyValues(
            span=where[0].span if where else self.block.spec.span,
            what=f"combinations checked for {self.limit or limits.ROWS:,} rows ({kept:,} found)",
            amount=f"{self.block.combinations:,}",
            most=limits.COMBINATIONS,
            hint="narrow the values themselves, so that fewer are excluded",
        )

    def _check_result(self) -> None:
        result, block = self.result, self.block
        if len(result.rows) > limits.ROWS:
            result.diagnostics.append(self._rows_error(f"more than {limits.ROWS:,}"))
        elif result.cut:
            pass  # the next rows might qualify
        elif not result.rows and any(name in self.used for name in result.unchanged):
            result.diagnostics.extend(self._all_unchanged())
        elif not result.rows:
            where = block.spec.where
            reason, hint = "no row is left", "give it values"
            if where:
                reason = "no combination fulfils `where`"
                hint = "change the condition, or give more values"
            elif self.part is not None:
                reason = f"too few rows for the part `{self.part}`"
                hint = self._suggest_more_rows()
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

    def _suggest_more_rows(self) -> str:
        """Return the hint for a part of a split that has no rows."""
        block = self.block
        if block.draws:
            return (
                "without `limit`, it has one row for each combination of values: write how many "
                f"rows to draw, `limit: 400` in `fit(…)` or `prompts {block.name} limit 40`"
            )
        rest = "give it more values" if block.data is None else "use a file with more records"
        if block.spec.split is None:
            return rest
        if block.spec.split_for:
            share = f"{block.spec.split:g} %"
            return f"{rest}: mechdsl trains on {share} of the rows and tests on the others"
        return f"{rest}, or write another share than `split {block.spec.split:g}%`"

    def _all_unchanged(self) -> list[Diagnostic]:
        """Return E0510 at corruptions that change no row, else E0509: each row lacks a change."""
        unchanged, looked_at = self.result.unchanged, self.result.compared.total()
        corruptions = [
            c for c in self.block.spec.corruptions if c.name in unchanged and c.name in self.used
        ]
        without = [c for c in corruptions if unchanged[c.name].total() == looked_at]
        if without:
            return [no_effect_error(c, self.block) for c in without]
        names = " or ".join(f"`{c.name}`" for c in corruptions)
        return [
            NoRows(
                span=corruptions[0].span,
                prompts=self.block.name,
                reason=f"{names} leaves each of them unchanged",
                hint="every corruption must change each row: choose a different clean value",
                unit=self.block.spec.unit,
            )
        ]


def equal_records_warning(block: PromptsBlock, row_collection: RowCollection) -> EqualRecords:
    """Return W0781 for equal records of a file."""
    source = block.spec.rows
    assert source is not None  # equal generated rows are dropped
    return EqualRecords(
        span=source.span,
        prompts=block.name,
        file=source.span.written,
        equal=row_collection.repeated,
        rows=len(row_collection.rows),
        unit=block.spec.unit,
    )


def template_number(row: Row) -> int:
    """Return the number of the row's template."""
    return row.places.get(TEMPLATE, 0)


def unchanged_template_warnings(
    block: PromptsBlock, corruption: spec.Corruption, same: Counter[int], rows: Counter[int]
) -> list[TemplateUnchanged]:
    """Return W0791 if the corruption changes no row of some template.

    same: by template number, how many rows are unchanged. rows: by template number, how many rows
    there are.
    """
    numbers = [number for number in sorted(same) if same[number] == rows[number]]
    if not 0 < len(numbers) < len(rows):  # E0510 reports a corruption without any effect
        return []
    named = [f"template {n + 1} (line {block.templates[n].text.span.line})" for n in numbers]
    return [
        TemplateUnchanged(
            span=corruption.span,
            run=corruption.name,
            templates=" and ".join(named),
            rows=count_noun(sum(same[number] for number in numbers), "row"),
        )
    ]


def no_effect_error(corruption: spec.Corruption, block: PromptsBlock) -> CorruptionWithoutEffect:
    """Return E0510 at the corruption."""
    hint, of_images = "change a value that the template shows, or `template` itself", False
    texts = tuple(text for template in block.templates for text in template.texts)
    shown = {use.name for use in name_uses(texts, block.placeholders)}
    hidden = [picture.name for picture in block.spec.pictures if picture.name not in shown]
    if hidden:
        hint = f'insert `{hidden[0]}` into the template, as in `template "{{{hidden[0]}}} …"`, or '
        hint += "change a value that the template shows"
    if block.spec.kind == "images":
        of_images = True
        hint = "change a value that the `image` line names"
    unit, shown = ("image", "image") if of_images else ("prompt", "text")
    return CorruptionWithoutEffect(
        span=corruption.span, run=corruption.name, hint=hint, unit=unit, shown=shown
    )


def _only_values(corruption: spec.Corruption) -> bool:
    """Return whether the text alone shows the corruption's effect."""
    shown = (ValueChange, ImageChange)  # the text of an image contains its description
    return not patch_changes(corruption.changes) and all(
        isinstance(change_kind(change), shown) for change in corruption.changes
    )


SplitPart = Literal["train", "test"]


def rows_convention(
    block: PromptsBlock,
    row_collection: RowCollection,
    kept: int,
    limit: int | None,
    part: SplitPart | None,
    unchanged: Mapping[str, int],
) -> dict[str, str]:
    """Describe the table's rows (`rows`) and the dropped ones (`dropped`).

    `keep` drops further rows when the experiment runs; `results.assembly.conventions` describes
    them.

    unchanged: by used corruption, the number of rows that it left unchanged.
    """
    unit = "records" if block.data is not None and block.size == 1 else "combinations"
    unit = unit if block.spec.tiles is None else "tiles"
    unit = unit.removesuffix("s") if block.combinations == 1 else unit
    text = f"{kept:,} of {block.combinations:,} {unit}"
    if block.draws:
        text = f"{kept:,} drawn from {block.combinations:,} {unit}"
    if part is not None and block.spec.split is not None:
        text += f", part `{part}` of a {block.spec.split:g}% split"
        if block.spec.split_for:
            trained = "is trained" if len(block.spec.split_for) == 1 else "are trained"
            text += f" (automatic: {name_list(block.spec.split_for)} {trained} on part `train`)"
    if limit is not None and kept < limit:
        text += f" (limit {limit:,}, no more exist)"
    if row_collection.repeated:
        text += f", {row_collection.repeated:,} of them duplicates"
    out = {"rows": f"{text}, seed {block.seed}"}
    dropped = [f"{n:,} by `where`" for n in (row_collection.filtered,) if n]
    dropped += [f"{n:,} duplicates" for n in (row_collection.equal,) if n]
    dropped += [f"{n:,} that `{run}` leaves unchanged" for run, n in unchanged.items()]
    if dropped:
        out["dropped"] = ", ".join(dropped)
    return out


MAX_IMBALANCE = 0.1
"""Maximum share of rows that would have to change their combination for equal counts."""


def balanced_variables(block: PromptsBlock, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of evenly distributed variables, in file order; none for a data file.

    rows: at least a whole round, without the dropped rows.
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
    """Return the variables for which the rows have every value that the block declares.

    A data file has none: its values are a sample.
    """
    if block.data is not None:
        return ()
    return tuple(
        name
        for name, values in block.axes
        if len({row.places[name] for row in rows}) == len(values)
    )


def _even(columns: Sequence[Sequence[int]]) -> bool:
    """Return whether all combinations have nearly equal numbers of rows.

    Counts may differ by one, because the last round may be incomplete. They may differ slightly
    more, because duplicates are dropped; a combination with too few distinct rows soon becomes
    rare.
    """
    counts = Counter(zip(*columns, strict=True)).values()
    rows, mean = sum(counts), sum(counts) / len(counts)
    moved = sum(abs(count - mean) for count in counts) / 2
    return max(counts) - min(counts) <= 1 or moved <= MAX_IMBALANCE * rows


def expand_class_texts(block: PromptsBlock, row: Row) -> tuple[tuple[str, ...], list[Diagnostic]]:
    """Evaluate the `classes` text with all values of its names, for any selection of rows.

    Returns:
        The distinct texts; diagnostics E0503, E0506 and those of values.
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
            reason = (
                f"`{odd}` is derived from other values"
                if odd
                else ("it is drawn separately for each row")
            )
            raise bad_value(node.span, reason, hint)
        class_texts: dict[str, None] = {}
        for values in _combinations(block, names, node.span.text):
            text = row.with_values(values).as_text(node, DrawKey("classes"))
            if not isinstance(text, str) or not text.strip():
                raise bad_value(node.span, "it is empty", "write a text for each class")
            class_texts[text.strip()] = None
    except Refusal as refusal:
        return (), [refusal.diagnostic("every row")]
    return tuple(class_texts), []


def _combinations(
    block: PromptsBlock, names: list[str], text: str
) -> Iterator[Mapping[str, RowValue]]:
    """Yield each value of each name with each value of the others."""
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
            hint="name values with fewer distinct entries",
        )
    for each in product(*values):
        yield dict(zip(names, each, strict=True))


def set_mean_images(
    block: PromptsBlock, tokenizer: TextTokenizer, enough: int | None
) -> list[Diagnostic]:
    """Set the mean images of a block that averages the images of other blocks or of their parts.

    The mean is over rows before `limit`. Images in prompts of different sizes are resized and
    cropped first, as the model's processor does. Codes: those of the rows; E0207 if the processor
    gives images of different sizes no common size.

    enough: the number of rows that a check reads.
    """
    problems: list[Diagnostic] = []
    for of in averaged_blocks(node for _, node in block.spec.named_images):
        if of.name in block.blocks and of.whole not in block.averaged:
            problems += _set_mean_image(block, of, tokenizer, enough)
    return problems


def _set_mean_image(
    block: PromptsBlock, of: ast.Ref, tokenizer: TextTokenizer, enough: int | None
) -> list[Diagnostic]:
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
    row_collection = select_rows(
        BlockRows(other), tokenizer, limit=limit, part=of.part, most=enough
    )
    images = [made.clean.image for made in row_collection.rows]
    pictures = tuple(image for image in images if image is not None)
    if not pictures:
        return row_collection.diagnostics
    size, fit = (0, 0), None
    if block.spec.kind == "prompts":
        size, *others = dict.fromkeys(picture.size for picture in pictures)
        if others and isinstance(tokenizer, ImagePromptTokenizer) and not tokenizer.stands_in:
            try:
                fit = tokenizer.fitting
            except UnsupportedProcessor as unfit:
                name, tiles = tokenizer.processor_name, isinstance(unfit, TilingProcessor)
                bad = _several_sizes(of, (size, others[0]), name, tiles=tiles)
                return [*row_collection.diagnostics, bad]
            size = fit.size or size
    block.averaged[of.whole] = mean_picture(pictures, of.whole, size, fit)
    return row_collection.diagnostics


def _several_sizes(
    of: ast.Ref, sizes: Iterable[tuple[int, int]], name: str, *, tiles: bool
) -> Diagnostic:
    """Return E0207 for the mean of images that the processor doesn't bring to one size.

    Args:
        of: The block of the images.
        sizes: Two (height, width) of its images.
        name: The class of the model's image processor.
        tiles: Whether it cuts images into tiles.
    """
    shown = " and ".join(f"{width} x {height}" for height, width in sizes)
    why = "cuts them into tiles" if tiles else "isn't known to resize them to one size"
    reason = f"has images of several sizes, such as {shown}, and the model's `{name}` {why}"
    hint = f"name images of one size, or `image photo = gray` instead of `{MEAN_IMAGE} of`"
    return BadArgument(span=of.span, name=of.span.written, reason=reason, hint=hint)
