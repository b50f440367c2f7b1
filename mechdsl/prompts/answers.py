"""Texts and sets of texts that metrics refer to, as tokens after the prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from mechdsl.base import limits
from mechdsl.base.limits import is_whole_number
from mechdsl.base.records import Record
from mechdsl.base.text import Span, name_list, quote
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.prompts import (
    AnswerChangesPrompt,
    AnswerNotInVocabulary,
    EmptyText,
    MultiTokenNumeral,
    NotATokenId,
    OtherSpelling,
    SharedFirstToken,
    UnknownText,
)
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.expressions import bad_value, evaluate, evaluate_whole_number
from mechdsl.prompts.rows import PromptTable, Row
from mechdsl.prompts.runs import ANSWER_SPAN, TextTokens
from mechdsl.prompts.tokens.tokenizer import EncodedText, TextTokenizer, respell, spacing_warnings
from mechdsl.prompts.values import DrawKey, Refusal, TokenId, to_plain
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.prompts.values import RowValue


LabelNaming = Literal["none", "named", "numbered"]
"""The labels of a classifier: with custom names, or numbered; `none` if outputs are tokens."""


def tokenise_texts(
    prompts: Sequence[str],
    texts: Sequence[str | TokenId],
    tokenizer: TextTokenizer,
    *,
    name: str,
    span: Span,
    encoded: Mapping[str, EncodedText] | None = None,
    rows: Sequence[Collection[int]] | None = None,
) -> tuple[list[TextTokens], list[Diagnostic]]:
    """Tokenise one text per row as the continuation of its prompt.

    Args:
        prompts: The prompt of each text.
        texts: The texts; a `TokenId` is kept as it is.
        tokenizer: The tokenizer of the model.
        name: The name of the texts in messages.
        span: The source span of the texts.
        encoded: The encodings of the prompts, if available.
        rows: The rows that have each text, if that isn't one text per row.

    Returns:
        The tokens; diagnostics E0519, E0523, E0524, W0703.
    """
    rows = [(n,) for n in range(len(texts))] if rows is None else rows
    pairs = [(p, t) for p, t in zip(prompts, texts, strict=True) if isinstance(t, str)]
    tokens = iter(tokenizer.continuations(pairs, encoded))
    out: list[TextTokens] = []
    diagnostics: list[Diagnostic] = []
    empty, unknown, changed = _Rows(), _Rows(), _Rows()
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        if isinstance(text, TokenId):
            if not 0 <= text.id < tokenizer.vocab_size and not diagnostics:
                last = tokenizer.vocab_size - 1
                diagnostics.append(NotATokenId(span=span, name=name, value=str(text.id), last=last))
            out.append(TextTokens(tokenizer.token_text(max(text.id, 0)), (text.id,)))
            continue
        ids, kept = next(tokens)
        if not ids:
            empty.add(row, prompt, text)
        if tokenizer.unknown_id in ids:
            unknown.add(row, prompt, text)
        if not kept:
            changed.add(row, prompt, text)
        out.append(TextTokens(text, ids))
    if not (empty.rows or unknown.rows or changed.rows):
        return out, diagnostics
    total = len(set[int]().union(*rows))
    if empty.rows:
        diagnostics.append(EmptyText(span=span, name=name, rows=len(empty.rows), total=total))
    if unknown.rows:
        diagnostics.append(_report_unknown(unknown, total, tokenizer, span))
    if changed.rows:
        diagnostics.append(_report_changed(changed, total, tokenizer, span))
    return out, diagnostics


def _report_unknown(
    unknown: _Rows, total: int, tokenizer: TextTokenizer, span: Span
) -> AnswerNotInVocabulary:
    """Report rows whose text contains the tokenizer's token for unknown text."""
    prompt, text = unknown.most_common()
    meant = respell(prompt, text, tokenizer)
    return AnswerNotInVocabulary(
        span=span,
        text=quote(text),
        unknown=tokenizer.token_text(tokenizer.unknown_id or 0),
        rows=len(unknown.rows),
        total=total,
        hint=meant.advice if meant else "use words in the model's vocabulary",
    )


def _report_changed(
    changed: _Rows, total: int, tokenizer: TextTokenizer, span: Span
) -> AnswerChangesPrompt:
    """Report rows whose text changes the tokens of the prompt."""
    prompt, text = changed.most_common()
    meant = respell(prompt, text, tokenizer)
    general = "let the template end without a space, and the answers begin with one"
    return AnswerChangesPrompt(
        span=span,
        text=quote(text),
        rows=len(changed.rows),
        total=total,
        hint=meant.advice if meant else general,
    )


@dataclass
class _Rows:
    """The rows whose texts share a problem."""

    rows: set[int] = field(default_factory=set[int])
    texts: Counter[str] = field(default_factory=Counter[str])
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    """The prompt of the first row with each text."""

    def add(self, rows: Collection[int], prompt: str, text: str) -> None:
        self.rows.update(rows)
        self.texts[text] += len(rows)
        self.prompts.setdefault(text, prompt)

    def most_common(self) -> tuple[str, str]:
        """Return the most frequent text and its prompt."""
        ((text, _),) = self.texts.most_common(1)
        return self.prompts[text], text


def shared_first_token(
    continuations: Sequence[TextTokens], tokenizer: TextTokenizer, *, words: bool = True
) -> tuple[int, ...]:
    """Return the leading token that all texts share, if it can move into the prompt.

    White space alone always moves (the space that some tokenizers put before a digit). A word moves
    only if it doesn't distinguish answers, that is, if there are several, and if `words` allows it.
    """
    firsts = {t.ids[:1] for t in continuations}
    if len(firsts) != 1 or any(len(t.ids) < 2 for t in continuations):
        return ()
    (first,) = firsts
    several = words and len({t.text for t in continuations}) > 1
    is_space = bool(first) and tokenizer.is_space(first[0])
    return first if several or is_space else ()


def drop_shared_token(tokens: TextTokens, moved: tuple[int, ...]) -> TextTokens | None:
    """Return the text without the token that moved to the prompt; None if it begins differently."""
    if not moved:
        return tokens
    return TextTokens(tokens.text, tokens.ids[1:]) if tokens.ids[:1] == moved else None


def moved_characters(
    prompt: str, text: str, moved: tuple[int, ...], tokenizer: TextTokenizer
) -> str:
    """Return the characters of the token that moves from a text to the end of its prompt, including
    white space before it."""
    before = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + text)
    at = len(before) - _closing(before)
    if whole.ids[at : at + 1] == moved:
        return (prompt + text)[len(prompt) : whole.offsets[at][1]]
    return text[: tokenizer.encode(text, add_special=False).offsets[0][1]]


def _closing(encoded: EncodedText) -> int:
    """Count the special tokens that the tokenizer adds after the text."""
    closing = 0
    for special in reversed(encoded.special):
        if not special:
            break
        closing += 1
    return closing if closing < len(encoded.ids) else 0


def answer_context(table: PromptTable, row: int) -> str:
    """Return the text that answers continue: the clean prompt and its reply, if any, without the
    moved token."""
    text = table.runs[CLEAN].rows[row].text
    return text[: len(text) - len(table.moved_text)]


# --- T of `logit(T)` ---------------------------------------------------------------------------


def text_tokens(
    table: PromptTable,
    expr: ast.Expr,
    *,
    tokenizer: TextTokenizer,
    extra: Mapping[str, Any] | None = None,
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    """Return the tokens of a text in a metric, in every row of the table.

    The expression is `answer`, `wrong`, a text's name, `answer of fewer`, `first token of answer`,
    or a text in quotes, which is evaluated on the clean row, with `item.index` and other names of
    `extra`. Tokens follow the clean row's prompt.
    Codes: E0503, E0516, E0517, E0519, E0520, E0524, W0703, W0705.
    """
    match expr:
        case ast.Name() | ast.QualifiedRef():
            tokens, diagnostics = _named(table, expr)
            return tokens, [*diagnostics, *_spacing_of_named(table, expr, tokens, tokenizer)]
        case ast.EdgeTokenOf():
            return _edge(table, expr, tokenizer, extra)
        case _:
            return _evaluated(table, expr, tokenizer, extra or {})


def output_text(text: str | TokenId, labels: LabelNaming) -> TextTokens:
    """Return a text that names an output of a classifier.

    If labels have custom names, only `token_id(…)` is the number of an output: `1` could refer to
    the label `1 star`.
    """
    if isinstance(text, TokenId):
        return TextTokens(str(text.id), (), of_output=True)
    return TextTokens(text, (), of_output=labels == "numbered" and text.strip().isdecimal())


def output_texts(
    table: PromptTable, expr: ast.Expr, labels: LabelNaming
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    """Return the text of an output in every row, without tokens. Codes: E0503, E0516."""
    if isinstance(expr, ast.Name | ast.QualifiedRef):
        return _named(table, expr)
    texts, problems = _said(table, expr, {})
    return tuple(output_text(text, labels) for text in texts), problems


def plain_texts(
    table: PromptTable, expr: ast.Expr, tokenizer: TextTokenizer, extra: Mapping[str, Any]
) -> tuple[list[str], list[Diagnostic]]:
    """Return a text without tokens in every row, as a reply may contain it. Codes: E0503, E0516."""
    if isinstance(expr, ast.Name | ast.QualifiedRef):
        named, problems = _named(table, expr)
        return [text.text for text in named], problems
    texts, problems = _said(table, expr, extra)
    return [
        text if isinstance(text, str) else tokenizer.token_text(text.id) for text in texts
    ], problems


TEXT_LINES = (ANSWER_SPAN, "wrong")
"""Texts that a line with their name defines."""


def split_reference(expr: ast.Name | ast.QualifiedRef) -> tuple[str, str]:
    """Split `answer of fewer` into the run and the name."""
    if isinstance(expr, ast.Name):
        return CLEAN, expr.id
    of = expr.of
    return of.name if of.part is None else f"{of.name}.{of.part}", expr.name


def _named(
    table: PromptTable, expr: ast.Name | ast.QualifiedRef
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    run, name = split_reference(expr)
    rows = table.runs[run].rows if run in table.runs else ()
    known = list(table.runs[CLEAN].rows[0].texts) if len(table) else []
    images = len(table) > 0 and table.runs[CLEAN].rows[0].image is not None
    if run not in table.runs:
        runs = name_list(table.runs)
        hint = did_you_mean(
            run, table.runs, f"the runs are {runs}", written=lambda near: f"{name} of {near}"
        )
        shown = f"{name} of {run}"
    elif name not in known and rows and name in rows[0].values:
        value = rows[0].values[name]
        reason = f"it is a value, {value!r}, not a text"
        space = "" if images or str(value)[:1].isspace() else " "
        text = f'"{space}{{{name}}}"'
        hint = f"write it as a text: `{text}`"
        if name in TEXT_LINES:
            hint = f"add the line `{name} {text}` to `prompts {table.name}`"
        refusal = bad_value(expr.span, reason, hint)
        return (), [refusal.diagnostic(table.sources[0].describe())]
    elif name not in known:
        listed = name_list(known)
        line = 'answer "{kind}"' if images else 'answer " {count}"'
        otherwise = f"there is {listed}" if known else f"add a line such as `{line}`"
        hint = did_you_mean(name, known, otherwise)
        shown = name
    else:
        return tuple(row.texts[name] for row in rows), []
    return (), [
        UnknownText(
            span=expr.span,
            prompts=table.name,
            name=shown,
            hint=hint,
            by_text=run not in table.runs and not table.stands_in,
            unit="image" if images else "prompt",
        )
    ]


def _spacing_of_named(
    table: PromptTable,
    expr: ast.Name | ast.QualifiedRef,
    continuations: Sequence[TextTokens],
    tokenizer: TextTokenizer,
) -> Sequence[Diagnostic]:
    """Return W0705 at the line of the prompts that defines a text."""
    if not continuations:
        return []
    block, name = table.sources[0].block, split_reference(expr)[1]
    texts = [None if block.is_token_id(name) else text.text for text in continuations]
    span = block.texts[name].span
    return _spacing(table, texts, tokenizer, span, range(len(table)))


def _spacing(
    table: PromptTable,
    texts: Sequence[str | None],
    tokenizer: TextTokenizer,
    span: Span,
    rows: Sequence[int],
) -> Sequence[Diagnostic]:
    """Return W0705, except for texts after generated replies, whose ends the model chose."""
    clean = table.runs[CLEAN]
    if not rows or clean.rows[0].reply is not None:
        return []
    return spacing_warnings(
        [answer_context(table, row) for row in rows],
        texts,
        tokenizer.reading(written=clean.chat),
        span,
        rows,
    )


def _said(
    table: PromptTable, expr: ast.Expr, extra: Mapping[str, Any]
) -> tuple[list[str | TokenId], list[Diagnostic]]:
    """Evaluate a text in quotes, or another expression, in every row."""
    texts: list[str | TokenId] = []
    for row in table.sources:
        try:
            texts.append(row.with_values(extra).as_text(expr, DrawKey(f"measure:{expr.span.text}")))
        except Refusal as refusal:
            return [], [refusal.diagnostic(row.describe())]
    return texts, []


def _evaluated(
    table: PromptTable, expr: ast.Expr, tokenizer: TextTokenizer, extra: Mapping[str, Any]
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    texts, problems = _said(table, expr, extra)
    if problems:
        return (), problems
    return tokenise_after_rows(table, texts, tokenizer, expr.span, range(len(table)))


def tokenise_after_rows(
    table: PromptTable,
    texts: Sequence[str | TokenId],
    tokenizer: TextTokenizer,
    span: Span,
    rows: Sequence[int],
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    """Tokenise texts after the clean prompts of these rows, without the moved token."""
    prompts = [answer_context(table, row) for row in rows]
    of_text = [(row,) for row in rows]
    name = span.text
    tokens, diagnostics = tokenise_texts(
        prompts, texts, tokenizer, name=name, span=span, rows=of_text
    )
    moved = [drop_shared_token(t, () if isinstance(x, TokenId) else table.moved)
             for t, x in zip(tokens, texts, strict=True)]  # fmt: skip
    other = next((t for t, m in zip(tokens, moved, strict=True) if m is None), None)
    if other is not None:
        diagnostics.append(
            OtherSpelling(span=span, text=quote(other.text), moved=quote(table.moved_text))
        )
    else:
        said = [text if isinstance(text, str) else None for text in texts]
        diagnostics += _spacing(table, said, tokenizer, span, rows)
    return tuple(m or t for m, t in zip(moved, tokens, strict=True)), diagnostics


def _edge(
    table: PromptTable,
    expr: ast.EdgeTokenOf,
    tokenizer: TextTokenizer,
    extra: Mapping[str, Any] | None,
) -> tuple[tuple[TextTokens, ...], list[Diagnostic]]:
    whole, diagnostics = text_tokens(table, expr.of, tokenizer=tokenizer, extra=extra)
    if not whole or any(not t.ids for t in whole):
        return (), diagnostics
    diagnostics += check_shared_edge(table, expr, [[text] for text in whole], tokenizer)
    return tuple(edge_token(text, expr, tokenizer) for text in whole), diagnostics


def edge_token(text: TextTokens, expr: ast.EdgeTokenOf, tokenizer: TextTokenizer) -> TextTokens:
    """Return the first or the last token of a text."""
    token = text.ids[_edge_of(expr)]
    return TextTokens(tokenizer.token_text(token), (token,))


def check_shared_edge(
    table: PromptTable,
    expr: ast.EdgeTokenOf,
    sets: Sequence[Sequence[TextTokens]],
    tokenizer: TextTokenizer,
) -> list[Diagnostic]:
    """Return E0517 if a text outside a row's set shares that token with a text of the set.

    Args:
        table: The rows.
        expr: `first token of …`.
        sets: The texts of each row that the token represents.
        tokenizer: The tokenizer of the model.
    """
    edge = _edge_of(expr)
    shared = _rivals(table, sets, edge)
    if not shared:
        return []
    _, text, rival = shared[0]
    return [
        SharedFirstToken(
            span=expr.span,
            which=expr.which,
            text=quote(text.text),
            rival=quote(rival),
            token=tokenizer.token_text(text.ids[edge]).strip(),
            rows=len({row for row, _, _ in shared}),
            total=len(table),
        )
    ]


def _edge_of(expr: ast.EdgeTokenOf) -> int:
    return 0 if expr.which == "first" else -1


def _rivals(
    table: PromptTable, sets: Sequence[Sequence[TextTokens]], edge: int
) -> list[tuple[int, TextTokens, str]]:
    """Return rows in which a text outside a set has the edge token of a text of the set.

    The texts outside are the row's other texts or, if no row has any, the sets of other rows.
    """
    shared: list[tuple[int, TextTokens, str]] = []
    declared = False
    for n, own in enumerate(sets):
        said = {text.text for text in own}
        others = [t for run in table.runs.values() for t in run.rows[n].texts.values()]
        others = [t for t in others if t.text not in said]
        declared = declared or bool(others)
        by_edge = {text.ids[edge]: text for text in reversed(own)}
        shared += [(n, by_edge[t.ids[edge]], t.text) for t in others if t.ids[edge] in by_edge]
    if declared:
        return shared
    first_set: dict[int, tuple[str, ...]] = {}
    for n, own in enumerate(sets):
        for text in own:
            rivals = first_set.setdefault(text.ids[edge], tuple(t.text for t in own))
            if text.text not in rivals:
                shared.append((n, text, rivals[0]))
    return shared


# --- numerals ------------------------------------------------------------------------------------


def numeral_tokens(
    table: PromptTable,
    numbers: Sequence[int],
    *,
    tokenizer: TextTokenizer,
    span: Span | None = None,
    digits: int | None = None,
    rows: Sequence[Collection[int]] | None = None,
) -> tuple[tuple[int, ...], list[Diagnostic]]:
    """Return token ids of numerals, ascending, spelt as in `answer`.

    The text before the digits is the same as in the answers. Numerals are padded to the answers'
    width if those have leading zeros (`05`), or to `digits`. Codes: E0518, E0519, E0520.

    rows: the rows that name each number, if not all do.
    """
    span = span or table.sources[0].block.spec.span
    before, width = _spelling(table)
    width = width if digits is None else digits
    texts = [f"{before}{number:0{width}d}" for number in numbers]
    # One prompt represents all: only the token after the prompt's last token matters.
    prompt = answer_context(table, 0)
    rows = [range(len(table))] * len(texts) if rows is None else rows
    tokens, diagnostics = tokenise_texts(
        [prompt] * len(texts), texts, tokenizer, name="numeral", span=span, rows=rows
    )
    diagnostics = [d for d in diagnostics if d.severity == "error"]
    moved = [drop_shared_token(t, table.moved) for t in tokens]
    if any(m is None for m in moved):
        text, beginning = quote(texts[0]), quote(table.moved_text)
        return (), [OtherSpelling(span=span, text=text, moved=beginning)]
    kept = [m for m in moved if m is not None]
    long = [(n, t) for n, t in enumerate(kept) if len(t.ids) > 1]
    if long:
        first, text = long[0]
        pieces = " ".join(quote(tokenizer.token_text(i)) for i in text.ids)
        diagnostics.append(
            MultiTokenNumeral(
                span=span,
                amount=len(long),
                low=numbers[0],
                high=numbers[-1],
                text=quote(text.text),
                tokens=len(text.ids),
                pieces=pieces,
                hint=(
                    f"end the range at {numbers[first - 1]}"
                    if first
                    else "measure `logprob(…)` of a text, which is summed over its tokens"
                ),
            )
        )
    if diagnostics:
        return (), diagnostics
    return tuple(t.ids[0] for t in kept), []


def _spelling(table: PromptTable) -> tuple[str, int]:
    """Return the text before the digits of the answers, and the width that they are padded to."""
    rows: Sequence[Row] = table.sources
    texts = [
        row.texts[ANSWER_SPAN].text for row in table.runs[CLEAN].rows if ANSWER_SPAN in row.texts
    ]
    matches = [re.match(r"(\D*)(\d+)", text) for text in texts]
    groups = [m.groups() for m in matches if m is not None]
    if not groups:
        ends_in_space = bool(rows) and answer_context(table, 0)[-1:].isspace()
        glued = bool(texts) and not texts[0][:1].isspace()
        return ("" if ends_in_space or glued else " "), 1
    before = Counter(b for b, _ in groups).most_common(1)[0][0]
    padded = any(len(digits) > 1 and digits.startswith("0") for _, digits in groups)
    return before, max(len(digits) for _, digits in groups) if padded else 1


SetEntry: TypeAlias = int | str | TokenId
"""An entry of a set: a number, which is spelt like the answers, or a text."""

SetExpression: TypeAlias = "ast.Expr | ast.Range"


class AcceptedTokens(Record):
    """One or more tokens in the set of a row."""

    text: TextTokens
    number: int | None = None
    """The number that a numeral represents."""


class TokenSets(Record):
    """A set of tokens for each row; equal sets are stored once."""

    tokens: tuple[tuple[int, ...], ...]
    """Per set, its distinct tokens."""
    of_row: tuple[int, ...]
    """Per row, the index of its set."""
    numbers: tuple[tuple[int, ...], ...] = ()
    """Per set of numerals, the numbers that its tokens represent, or their differences from the
    right number."""

    def of(self, row: int) -> tuple[int, ...]:
        """Return the tokens of a row."""
        return self.tokens[self.of_row[row]]

    @staticmethod
    def made_of(rows: Iterable[Sequence[AcceptedTokens]]) -> TokenSets:
        """Build the sets of all rows from the single tokens of their texts."""
        numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        of_row: list[int] = []
        for row in rows:
            own: dict[int, int] = {}
            for tokens in row:
                own.setdefault(tokens.text.ids[0], 0 if tokens.number is None else tokens.number)
            whole = all(tokens.number is not None for tokens in row)
            kind = (tuple(own), tuple(own.values()) if whole else ())
            of_row.append(numbers.setdefault(kind, len(numbers)))
        stand_for = tuple(kind[1] for kind in numbers)
        return TokenSets(
            tuple(kind[0] for kind in numbers),
            tuple(of_row),
            stand_for if all(stand_for) else (),
        )

    def minus(self, right: Sequence[int]) -> TokenSets:
        """Return the same tokens; their numbers are differences from the row's right number."""
        places = list(zip(self.of_row, right, strict=True))
        index = {place: n for n, place in enumerate(dict.fromkeys(places))}
        return TokenSets(
            tuple(self.tokens[number] for number, _ in index),
            tuple(index[place] for place in places),
            tuple(tuple(each - own for each in self.numbers[number]) for number, own in index),
        )


def is_list(table: PromptTable, part: object) -> bool:
    """Return whether an argument of a metric is a list.

    It is a list if it is written as one, if a value of the rows is one, or if it names the first
    tokens of a list's texts.
    """
    if isinstance(part, ast.EdgeTokenOf):
        return is_list(table, part.of)
    if isinstance(part, ast.ListLiteral):
        return True
    if not isinstance(part, ast.Name | ast.QualifiedRef):
        return False
    run, name = split_reference(part)
    rows = table.runs[run].rows if run in table.runs else ()
    return any(name not in row.texts and isinstance(row.values.get(name), list) for row in rows)


def accepted_tokens(
    table: PromptTable,
    parts: Sequence[SetExpression],
    tokenizer: TextTokenizer,
    *,
    extra: Mapping[str, Any],
    digits: int | None = None,
) -> tuple[list[list[AcceptedTokens]], list[Diagnostic]]:
    """Return, per row, the tokens accepted by any of several arguments of a metric.

    Arguments are texts, lists of texts, or numerals. Codes: those of texts, E0503 if a row has
    none, E0518 for numerals.

    extra: values of a cell, `item.index`. digits: the width of numerals; None: as in `answer`.
    """
    accepted: list[list[AcceptedTokens]] = [[] for _ in range(len(table))]
    diagnostics: list[Diagnostic] = []
    for part in parts:
        if isinstance(part, ast.Range) or is_list(table, part):
            own, problems = _of_entries(table, part, tokenizer, extra, digits)
        else:
            texts, problems = text_tokens(table, part, tokenizer=tokenizer, extra=extra)
            own = [[AcceptedTokens(text)] for text in texts]
        diagnostics += problems
        if has_errors(problems):
            return [], diagnostics
        for row, more in zip(accepted, own, strict=True):
            row += more
    return accepted, diagnostics


def right_numbers(
    table: PromptTable, part: ast.Expr, extra: Mapping[str, Any]
) -> tuple[list[int], list[Diagnostic]]:
    """Return, per row, the whole number that a decoded number is compared with. Codes: E0503.

    part: an expression of the row's values, or a value of another run (`count of fewer`).
    extra: values of a cell, `item.index`.
    """
    numbers: list[int] = []
    for number, row in enumerate(table.sources):
        try:
            numbers.append(_right_number(table, number, row.with_values(extra), part))
        except Refusal as refusal:
            return [], [refusal.diagnostic(row.describe())]
    return numbers, []


def _right_number(table: PromptTable, number: int, row: Row, part: ast.Expr) -> int:
    run = split_reference(part)[0] if isinstance(part, ast.QualifiedRef) else None
    if run not in table.runs:
        return evaluate_whole_number(part, row, DrawKey(f"measure:{part.span.text}"))
    value = to_plain(cast("RowValue", _listed(table, number, row, part)))
    if not is_whole_number(value):
        shown = "nothing" if value is None else repr(value)
        raise bad_value(part.span, f"it is {shown}, not a whole number", "name a whole number")
    return int(value)


def accepted_texts(
    table: PromptTable,
    parts: Sequence[SetExpression],
    tokenizer: TextTokenizer,
    extra: Mapping[str, Any],
) -> tuple[tuple[tuple[str, ...], ...], list[Diagnostic]]:
    """Return, per row, the texts of several arguments of a metric, without tokens.

    White space that moved to the prompt is removed from the texts of rows. Codes: E0503, E0516.
    """
    accepted: list[list[str]] = [[] for _ in range(len(table))]
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
            texts, problems = plain_texts(table, part, tokenizer, extra)
            if has_errors(problems):
                return (), problems
            named = isinstance(part, ast.Name | ast.QualifiedRef)
            before = table.moved_text if named else ""
            own = [[text.removeprefix(before)] for text in texts]
        for row, more in zip(accepted, own, strict=True):
            row += more
    return tuple(map(tuple, accepted)), []


def _text(entry: SetEntry, tokenizer: TextTokenizer) -> str:
    return tokenizer.token_text(entry.id) if isinstance(entry, TokenId) else str(entry)


def _of_entries(
    table: PromptTable,
    part: SetExpression,
    tokenizer: TextTokenizer,
    extra: Mapping[str, Any],
    digits: int | None,
) -> tuple[list[list[AcceptedTokens]], list[Diagnostic]]:
    if isinstance(part, ast.EdgeTokenOf):
        whole, problems = _of_entries(table, part.of, tokenizer, extra, digits)
        if has_errors(problems):
            return [], problems
        sets = [[each.text for each in own] for own in whole]
        edges = [[AcceptedTokens(edge_token(t, part, tokenizer)) for t in own] for own in sets]
        return edges, [*problems, *check_shared_edge(table, part, sets, tokenizer)]
    entries: list[list[SetEntry]] = []
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
    spelt: dict[int, AcceptedTokens] = {}
    if rows_of:
        asked = sorted(rows_of)
        ids, problems = numeral_tokens(
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
            number: AcceptedTokens(TextTokens(tokenizer.token_text(token), (token,)), number)
            for number, token in zip(asked, ids, strict=True)
        }
    texts = [
        (row, entry)
        for row, own in enumerate(entries)
        for entry in own
        if not isinstance(entry, int)
    ]
    tokens, diagnostics = tokenise_after_rows(
        table, [entry for _, entry in texts], tokenizer, part.span, [row for row, _ in texts]
    )
    iterator = iter(tokens)
    return [
        [
            spelt[entry] if isinstance(entry, int) else AcceptedTokens(next(iterator))
            for entry in own
        ]
        for own in entries
    ], diagnostics


def _entries(table: PromptTable, number: int, row: Row, part: SetExpression) -> list[SetEntry]:
    """Return the entries of a row's set; raises `Refusal` E0503 if it is empty."""
    if isinstance(part, ast.Range):
        key = DrawKey(f"measure:{part.span.text}")
        low, high = (
            evaluate_whole_number(part.low, row, key),
            evaluate_whole_number(part.high, row, key),
        )
        if low > high:
            reason, hint = f"{low}..{high} contains no numerals", "exclude these rows with `where`"
            raise bad_value(part.span, reason, hint)
        if high - low >= limits.NUMERALS:
            reason = f"{high - low + 1:,} numerals are more than {limits.NUMERALS:,}"
            raise bad_value(part.span, reason, "narrow the range")
        return list(range(low, high + 1))
    entries = list(_flat(_listed(table, number, row, part), part))
    if not entries:
        hint = "exclude these rows with `where`"
        raise bad_value(part.span, "the list is empty, so no answer is right", hint)
    return entries


def _listed(table: PromptTable, number: int, row: Row, part: ast.Expr) -> object:
    if isinstance(part, ast.Name | ast.QualifiedRef):
        run, name = split_reference(part)
        return table.runs[run].rows[number].values.get(name)
    return evaluate(part, row, DrawKey(f"measure:{part.span.text}"))


def _flat(value: object, part: ast.Expr) -> Iterator[SetEntry]:
    """Yield the entries of a list and of nested lists."""
    if isinstance(value, TokenId):
        yield value
        return
    own = to_plain(cast("RowValue", value))
    if isinstance(own, list):
        given = cast("list[object]", value) if isinstance(value, list) else own
        for each in cast("list[object]", given):
            yield from _flat(each, part)
    elif isinstance(own, str):
        yield own
    elif is_whole_number(own):
        yield int(own)
    else:
        shown = "nothing" if own is None else repr(own)
        raise bad_value(
            part.span, f"{shown} in the list is not a text", "give texts, or whole numbers"
        )
