"""Sets of texts and of numerals that metrics refer to, which may differ from row to row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from mechdsl.base import limits
from mechdsl.base.record import Record, record
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.prompts.answers import (
    behind_rows,
    edge_token,
    numerals,
    run_and_name,
    shared_edge,
    text_tokens,
    texts_said,
)
from mechdsl.prompts.expressions import bad, evaluate, whole_number
from mechdsl.prompts.prompt_table import PromptTable, TextTokens
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.rows import Row
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.prompts.values import TokenId, Value, is_whole, plain
from mechdsl.syntax import ast

Entry: TypeAlias = int | str | TokenId
"""What a set has in it: a number, which is spelt as the answers are, or a text."""
Part: TypeAlias = "ast.Expr | ast.Range"


@record
class Accepted(Record):
    """One token, or more, that a set of a row has."""

    text: TextTokens
    number: int | None = None
    """What it stands for, of a numeral."""


@record
class TokenSets(Record):
    """A set of tokens for each row; sets that are equal are held once."""

    tokens: tuple[tuple[int, ...], ...]
    """Of each set, its tokens, all different."""
    of_row: tuple[int, ...]
    """Per row, the number of its set."""
    numbers: tuple[tuple[int, ...], ...] = ()
    """Of each set of numerals, the numbers that its tokens stand for."""

    def of(self, row: int) -> tuple[int, ...]:
        """The tokens of a row."""
        return self.tokens[self.of_row[row]]

    @staticmethod
    def made_of(rows: Iterable[Sequence[Accepted]]) -> TokenSets:
        """The sets of all rows: of each text its only token."""
        numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        of_row: list[int] = []
        for row in rows:
            own: dict[int, int] = {}
            for each in row:
                own.setdefault(each.text.ids[0], 0 if each.number is None else each.number)
            whole = all(each.number is not None for each in row)
            kind = (tuple(own), tuple(own.values()) if whole else ())
            of_row.append(numbers.setdefault(kind, len(numbers)))
        stand_for = tuple(kind[1] for kind in numbers)
        return TokenSets(
            tuple(kind[0] for kind in numbers),
            tuple(of_row),
            stand_for if all(stand_for) else (),
        )


def is_list(table: PromptTable, part: object) -> bool:
    """Whether a part of a metric is a list, written out or a value of the rows that is one, or
    the first tokens of its texts."""
    if isinstance(part, ast.EdgeTokenOf):
        return is_list(table, part.of)
    if isinstance(part, ast.ListOf):
        return True
    if not isinstance(part, ast.Name | ast.OfRef):
        return False
    run, name = run_and_name(part)
    rows = table.runs[run].rows if run in table.runs else ()
    return any(name not in row.texts and isinstance(row.values.get(name), list) for row in rows)


def accepted(
    table: PromptTable,
    parts: Sequence[Part],
    tokenizer: TextTokenizer,
    *,
    extra: Mapping[str, Any],
    digits: int | None = None,
) -> tuple[list[list[Accepted]], list[Diagnostic]]:
    """Per row, any of what several parts of a metric name: texts, lists of texts, numerals.

    extra: values of a cell, `item.index`. digits: how wide numerals are; None is as in `answer`.
    Codes: those of texts, E0503 where a row has none, E0518 for numerals.
    """
    found: list[list[Accepted]] = [[] for _ in range(len(table))]
    diagnostics: list[Diagnostic] = []
    for part in parts:
        if isinstance(part, ast.Range) or is_list(table, part):
            own, problems = _of_entries(table, part, tokenizer, extra, digits)
        else:
            texts, problems = text_tokens(table, part, tokenizer=tokenizer, extra=extra)
            own = [[Accepted(text)] for text in texts]
        diagnostics += problems
        if has_errors(problems):
            return [], diagnostics
        for row, more in zip(found, own, strict=True):
            row += more
    return found, diagnostics


def texts_of(
    table: PromptTable, parts: Sequence[Part], tokenizer: TextTokenizer, extra: Mapping[str, Any]
) -> tuple[tuple[tuple[str, ...], ...], list[Diagnostic]]:
    """Per row, what several parts of a metric say, whatever tokens that has; as `accepted`. Of the
    texts of rows the white space that was moved into the prompt is left out.

    Codes: E0503, E0516.
    """
    found: list[list[str]] = [[] for _ in range(len(table))]
    for part in parts:
        if isinstance(part, ast.Range) or is_list(table, part):
            try:
                own = [
                    [_text(e, tokenizer) for e in _entries(table, n, row.with_values(extra), part)]
                    for n, row in enumerate(table.sources)
                ]
            except Refusal as refusal:
                return (), [refusal.diagnostic(table.sources[0].describe())]
        else:
            texts, problems = texts_said(table, part, tokenizer, extra)
            if has_errors(problems):
                return (), problems
            named = isinstance(part, ast.Name | ast.OfRef)
            before = table.moved_text if named else ""
            own = [[text.removeprefix(before)] for text in texts]
        for row, more in zip(found, own, strict=True):
            row += more
    return tuple(map(tuple, found)), []


def _text(entry: Entry, tokenizer: TextTokenizer) -> str:
    return tokenizer.token_text(entry.id) if isinstance(entry, TokenId) else str(entry)


def _of_entries(
    table: PromptTable,
    part: Part,
    tokenizer: TextTokenizer,
    extra: Mapping[str, Any],
    digits: int | None,
) -> tuple[list[list[Accepted]], list[Diagnostic]]:
    if isinstance(part, ast.EdgeTokenOf):
        whole, problems = _of_entries(table, part.of, tokenizer, extra, digits)
        if has_errors(problems):
            return [], problems
        sets = [[each.text for each in own] for own in whole]
        edges = [[Accepted(edge_token(t, part, tokenizer)) for t in own] for own in sets]
        return edges, [*problems, *shared_edge(table, part, sets, tokenizer)]
    entries: list[list[Entry]] = []
    for number, row in enumerate(table.sources):
        try:
            entries.append(_entries(table, number, row.with_values(extra) if extra else row, part))
        except Refusal as refusal:
            return [], [refusal.diagnostic(row.describe())]
    rows_of: dict[int, list[int]] = {}
    for row, own in enumerate(entries):
        for entry in own:
            if isinstance(entry, int):
                rows_of.setdefault(entry, []).append(row)
    spelt: dict[int, Accepted] = {}
    if rows_of:
        asked = sorted(rows_of)
        ids, problems = numerals(
            table,
            asked,
            tokenizer=tokenizer,
            span=part.span,
            digits=digits,
            rows=[rows_of[number] for number in asked],
        )
        if problems:
            return [], problems
        spelt = {
            number: Accepted(TextTokens(tokenizer.token_text(token), (token,)), number)
            for number, token in zip(asked, ids, strict=True)
        }
    texts = [
        (row, entry)
        for row, own in enumerate(entries)
        for entry in own
        if not isinstance(entry, int)
    ]
    tokens, diagnostics = behind_rows(
        table, [entry for _, entry in texts], tokenizer, part.span, [row for row, _ in texts]
    )
    found = iter(tokens)
    return [
        [spelt[entry] if isinstance(entry, int) else Accepted(next(found)) for entry in own]
        for own in entries
    ], diagnostics


def _entries(table: PromptTable, number: int, row: Row, part: Part) -> list[Entry]:
    """What a row's set has in it. E0503 as Refusal where that is nothing."""
    if isinstance(part, ast.Range):
        key = Key(f"measure:{part.span.text}")
        low, high = whole_number(part.low, row, key), whole_number(part.high, row, key)
        if low > high:
            reason, hint = f"{low}..{high} has no numerals", "leave these rows out with `where`"
            raise bad(part.span, reason, hint)
        if high - low >= limits.NUMERALS:
            reason = f"{high - low + 1:,} numerals are more than {limits.NUMERALS:,}"
            raise bad(part.span, reason, "narrow the range")
        return list(range(low, high + 1))
    found = list(_flat(_listed(table, number, row, part), part))
    if not found:
        hint = "leave these rows out with `where`"
        raise bad(part.span, "the list is empty, so no answer is right", hint)
    return found


def _listed(table: PromptTable, number: int, row: Row, part: ast.Expr) -> object:
    if isinstance(part, ast.Name | ast.OfRef):
        run, name = run_and_name(part)
        return table.runs[run].rows[number].values.get(name)
    return evaluate(part, row, Key(f"measure:{part.span.text}"))


def _flat(value: object, part: ast.Expr) -> Iterator[Entry]:
    """The entries of a list, and of lists in it."""
    if isinstance(value, TokenId):
        yield value
        return
    own = plain(cast("Value", value))
    if isinstance(own, list):
        given = cast("list[object]", value) if isinstance(value, list) else own
        for each in cast("list[object]", given):
            yield from _flat(each, part)
    elif isinstance(own, str):
        yield own
    elif isinstance(own, int | float) and not isinstance(own, bool) and is_whole(own):
        yield int(own)
    else:
        shown = "nothing" if own is None else repr(own)
        raise bad(part.span, f"{shown} in it is no text", "give texts, or whole numbers")
