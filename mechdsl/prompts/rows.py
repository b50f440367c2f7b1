"""Rows of a prompts block before tokenisation: values worked out when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn, cast, overload

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.e05_chat import ChatRefused
from mechdsl.diagnostics.e05_data import TextNotInside, TooMany
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE
from mechdsl.prompts.chat_template import ChatProblem, Turn, unwritten
from mechdsl.prompts.compiled_template import CompiledTemplate, Definition
from mechdsl.prompts.expressions import bad, evaluate, holds
from mechdsl.prompts.found_text import find_text
from mechdsl.prompts.functions import FUNCTIONS, CallSite, draw_others
from mechdsl.prompts.images_block import of_pixels
from mechdsl.prompts.prompt_table import RunRow
from mechdsl.prompts.prompts_block import TEMPLATE, PromptsBlock
from mechdsl.prompts.row_content import content_key
from mechdsl.prompts.row_image import OF_IMAGES, WithImage
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.row_tiles import drawn_by, image_of
from mechdsl.prompts.seeded_draws import Permutation, stable_hash
from mechdsl.prompts.span_tokens import TokenMap
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.prompts.values import (
    Items,
    Record,
    Rich,
    SpanAt,
    TokenId,
    Value,
    bare,
    concatenate,
    frozen,
    plain,
    render,
)
from mechdsl.syntax import ast
from mechdsl.syntax.template import Placeholder
from mechdsl.vocab.corruptions import ValueChange, kind_of

RECORD = "record"
"""Name of the axis of a data file's records."""
CLEAN = "clean"
KEPT = 2**12
"""Rows of a block that are kept for the next table, at most."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})
"""One for all rows: 200,000 rows would each hold several empty mappings."""


class Row(WithImage):
    """One row of a block, clean or corrupted. Its methods raise `Refusal`."""

    def __init__(self, block: PromptsBlock, row_id: int) -> None:
        self.block = block
        self.id = row_id
        self.run = CLEAN
        self._clean: Row | None = None
        """The row that this one is a copy of."""
        index = row_id % (block.combinations)
        index, at = divmod(index, block.data_size)
        self.record: Record = block.data.records[at] if block.data else _NOTHING
        self.places: dict[str, int] = {RECORD: at}
        self.values: dict[str, Value] = {}
        for name, values in reversed(block.axes):
            index, at = divmod(index, len(values))
            self.places[name] = at
            self.values[name] = values[at]
        self.template: CompiledTemplate = block.templates[self.places.get(TEMPLATE, 0)]
        self.changed: Mapping[str, Value] = _NOTHING
        """What the corruption has written."""
        self.item_changes: Mapping[str, tuple[ast.Expr, Row]] = _NOTHING
        """Changes of names that only lists draw: applied to each item."""
        self.image_changes: list[ast.Change] = []
        self._tokenizer: TextTokenizer | None = None
        """While conditions are asked for."""
        self._drawn: dict[str, Value] = {}
        self._cache: dict[str, Value] = {}
        self._texts: dict[str, str | TokenId] = {}

    def _copy(self) -> Row:
        copy = object.__new__(Row)
        copy.__dict__.update(self.__dict__)
        copy._forget()
        copy._clean = self.clean
        return copy

    @property
    def clean(self) -> Row:
        """The row that this one is a corruption of. One that named itself would never be freed, as
        garbage is not looked for while files are checked."""
        return self if self._clean is None else self._clean

    def _forget(self) -> None:
        """Work everything out anew, because something is changed."""
        self._cache = {}
        self._texts = {}
        for worked_out in ("prompt", "turns", "plain_values", "key", *OF_IMAGES):
            self.__dict__.pop(worked_out, None)

    def forget_steps(self) -> None:
        """Drop the values that its texts are made of; they are worked out again if asked for."""
        self._cache = {}

    @cached_property
    def draw_key(self) -> int:
        """What its draws hang on: its number, or, in a data file, what the record is. Records that
        are equal have draws of their own."""
        data = self.block.data
        number = self.block.images_behind(self.id)  # tiles of an image are drawn together
        if data is None:
            return number
        found, at = data.by_content, self.places[RECORD]
        return stable_hash(found.keys[at], found.copies[at], number // self.block.data_size)

    @cached_property
    def key(self) -> int:
        """Of its values, its text and the texts that metrics refer to: rows of equal content have
        equal keys, wherever they stand."""
        texts = (self.named_text(name) for name in sorted(self.block.texts))
        written = ((t.id if isinstance(t, TokenId) else t) for t in texts)
        # A chat is the same row whichever model's template writes it.
        said = [part for turn in self.turns for part in (turn.role, turn.rich.text)]
        return content_key(self.plain_values, [*(said or [self.prompt.text]), *written])

    # --- names and values -----------------------------------------------------------------------

    def known(self, name: str) -> bool:
        return (
            name in self.changed
            or name in self.values
            or name in self.record
            or self._definition(name) is not None
            or name in self.block.parameters
        )

    def _definition(self, name: str) -> Definition | None:
        found = self.block.definitions.get(name) or self.template.definitions.get(name)
        if found is None and name in self.block.texts and name not in self.record:
            return Definition((name,), self.block.texts[name])
        return found

    def value(self, name: str, span: Span) -> Value:
        for place in (self.changed, self.values, self._cache):
            if name in place:
                return place[name]
        definition = self._definition(name)
        if definition is not None:
            if self.clean is not self and self.clean.known(name):
                self.clean.value(name, span)  # draws first, so that they can be kept
            self._cache |= self._assigned(definition.names, definition.value, definition.path)
            return self._cache[name]
        if name in self.record:
            return self.record[name]
        if name in self.block.parameters:
            return self.block.parameters[name]
        if name in ("true", "false"):
            return name == "true"
        if name in self.block.columns:
            return None
        if name == IMAGE and self.block.spec.tiles is not None:
            return image_of(self)
        raise self.block.unknown(name, span)

    def attribute(self, name: str, attribute: str, span: Span) -> Value:
        dotted = f"{name}.{attribute}"
        if dotted in self.values:
            return self.values[dotted]
        value = self.value(name, span)
        if isinstance(value, Mapping) and attribute in value:
            return value[attribute]
        raise bad(span, f"`{name}` has no `{attribute}`", "write the name alone")

    def _assigned(self, names: tuple[str, ...], node: ast.Expr, path: str) -> dict[str, Value]:
        """The values that one definition gives to its names."""
        key = Key(path)
        if len(names) == 1:
            return {names[0]: evaluate(node, self, key)}
        if isinstance(node, ast.Call) and node.name == "others":
            call = CallSite(node, FUNCTIONS["others"], self, key.call(), evaluate)
            return dict(zip(names, draw_others(call, len(names)), strict=True))
        value = evaluate(node, self, key)
        entries = [i.value for i in value.items] if isinstance(value, Items) else value
        if not isinstance(entries, list) or len(entries) != len(names):
            hint = "write `others(…)`, or a list of as many values"
            raise bad(node.span, f"it doesn't give {len(names)} values", hint)
        return dict(zip(names, entries, strict=True))

    def text(self, node: ast.String, key: Key) -> Rich:
        """A text with its placeholders filled in; each one with a name is a span."""
        parts: list[tuple[str, Rich]] = []
        for piece in self.block.template(node).pieces:
            if isinstance(piece, str):
                parts.append(("", bare(piece)))
            else:
                parts.append((piece.name or "", self._placed(piece, key)))
        whole = concatenate(parts)
        # Texts of texts would grow without end before a tokenizer sees them.
        if len(whole.text) > limits.TEXT:
            raise Refusal(
                TooMany,
                node.span,
                what="this text",
                amount=f"{len(whole.text):,} characters",
                most=limits.TEXT,
                hint="no model reads so much; shorten what stands in it",
            )
        return whole

    def _placed(self, piece: Placeholder, key: Key) -> Rich:
        own = piece.name is not None and piece.name in self.template.definitions
        if own or isinstance(piece.expr, ast.Name):
            name = piece.name if own and piece.name else cast("ast.Name", piece.expr).id
            rich = render(self.value(name, piece.expr.span))
            rich = self._marked(name, rich) if rich and name in self.block.marks else rich
        else:
            rich = render(evaluate(piece.expr, self, key))
        if rich is None:
            reason = "it is a list or record, or the row has no value for it"
            hint = (
                f"write `{piece.name or piece.expr.span.written} in […]` for one row per value, or "
                'lists as `list(item, from: column, sep: ", ")`'
            )
            raise bad(piece.span, reason, hint)
        return rich

    def _marked(self, name: str, rich: Rich) -> Rich:
        """A column's text with the spans that lie in it. Where the corruption changed such a span's
        value, its text changes with it."""
        spans = list(rich.spans)
        text = rich.text
        for mark in self.block.marks[name]:
            written = render(self.clean.value(mark.name.id, mark.name.span))
            found = find_text(text, written.text) if written and written.text else []
            if not found:
                raise Refusal(TextNotInside, mark.span, name=mark.name.id, within=name)
            new = render(self.value(mark.name.id, mark.name.span))
            for start, end in reversed(found):
                replaced = new.text if new else ""
                if replaced != text[start:end]:
                    text = text[:start] + replaced + text[end:]
                    spans = [_shifted(s, end, len(replaced) - (end - start)) for s in spans]
                spans.append(SpanAt(mark.name.id, start, start + len(replaced)))
        return Rich(text, tuple(sorted(spans, key=lambda s: (s.start, -s.end))))

    # --- what functions need --------------------------------------------------------------------

    def placeholders(self, node: ast.String) -> Sequence[ast.Expr]:
        return self.block.placeholders(node)

    def domain(self, node: ast.Expr) -> Sequence[Value]:
        return self.block.domain_of(node, self.template)

    def python(self, node: ast.Call) -> Value:
        names = self.block.calls.names(node)
        if names is None:
            names = (*self.plain_values, *(n for n in self.values if n not in self.plain_values))
        row = {name: plain(self.value(name, node.span)) for name in names}
        return self.block.calls.run(node, row)

    def records(self, name: str, *, drawn: bool) -> Sequence[Record] | None:
        data = self.block.records(name)
        if data is None:
            return None
        return data.sorted if drawn else data.records

    def is_own(self, record: Record, fields: Sequence[str]) -> bool:
        shared = [f for f in fields if f in record and f in self.record]
        return bool(shared) and all(
            frozen(plain(record[f])) == frozen(plain(self.record[f])) for f in shared
        )

    def tokens(self, node: ast.Expr, value: Value) -> int:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise bad(node.span, "tokens are counted in `where` alone", "write it there")
        if isinstance(value, TokenId):
            return 1
        tokenizer = tokenizer.reading(written=bool(self.turns))
        spans = self._spans_called(node)
        if spans:
            return self._tokens_of(spans, node, tokenizer)
        rich = render(value)
        if rich is None:
            raise bad(node.span, "it has no text in this row", "give a text or a number")
        ids, _ = tokenizer.continuation(self.prompt.text, rich.text)
        # A space of its own goes into the prompt, if all answers begin with it.
        return len(ids[1:] if len(ids) > 1 and tokenizer.is_space(ids[0]) else ids)

    def _spans_called(self, node: ast.Expr) -> list[SpanAt]:
        """Where the prompt has what a name stands for."""
        name = node.id if isinstance(node, ast.Name) else None
        return [span for span in self.prompt.spans if span.name == name]

    def _tokens_of(self, spans: list[SpanAt], node: ast.Expr, tokenizer: TextTokenizer) -> int:
        text = self.prompt.text
        found = tokenizer.encode(text)
        places = TokenMap(RunRow(text, found.ids, found.offsets, found.special, (), {}, {}))
        counts = dict.fromkeys(len(places.tokens(span.start, span.end)) for span in spans)
        if len(counts) > 1:
            shown = " and ".join(map(str, sorted(counts)))
            reason = f"it has {shown} tokens in different places of the prompt"
            hint = "give one of them a name of its own: `{s2 = s}`, then `tokens(s2)`"
            raise bad(node.span, reason, hint)
        return next(iter(counts))

    def changed_item(self, name: str, value: Value, key: Key) -> Value:
        if name not in self.item_changes:
            return value
        node, before = self.item_changes[name]
        inner = before.with_values({name: value})
        return evaluate(node, inner, Key(f"{self.run}:{key.path}.{name}"))

    def draw(self, key: Key, index: int, below: int) -> int:
        own = (self.block.seed, self.block.name, drawn_by(self, key.path), key.path)
        return stable_hash(*own, index) % below

    def kept(self, key: Key) -> list[Value]:
        drawn = self.clean._drawn
        return [drawn[key.path]] if self.run != CLEAN and key.path in drawn else []

    def keep(self, key: Key, value: Value) -> None:
        if self.run == CLEAN:
            self.clean._drawn[key.path] = value

    def order(self, key: Key, size: int) -> Sequence[int]:
        return Permutation(size, self.block.seed, self.block.name, self.draw_key, key.path)

    def elsewhere(self, name: str, span: Span) -> Value:
        key = (self.block.seed, self.block.name, "shuffle", name)
        if self.block.data is not None and name in self.record:
            data = self.block.data
            order, rank = data.by_content.order, data.by_content.rank
            other = order[Permutation(len(order), *key)[rank[self.places[RECORD]]]]
            return data.records[other].get(name)
        for axis, values in self.block.axes:
            if axis == name:
                return values[Permutation(len(values), *key)[self.places[name]]]
        raise bad(span, f"`{name}` is no column", "shuffle a column or a list")

    def with_values(self, values: Mapping[str, Value]) -> Row:
        copy = self._copy()
        copy.values = {**self.values, **values}
        copy.changed = {k: v for k, v in self.changed.items() if k not in values}
        return copy

    # --- corruption -----------------------------------------------------------------------------

    def corrupted(self, corruption: spec.Corruption) -> Row:
        """The same row with something changed, from top to bottom. What works on tokens or
        activations is left for later."""
        row = self._copy()
        row.run = corruption.name
        row.changed, row.item_changes, row.image_changes = _NOTHING, _NOTHING, []
        for change in corruption.changes:
            kind = kind_of(change)
            if isinstance(change, ast.Change) and of_pixels(change, self.block.spec):
                row.image_changes.append(change)
            elif isinstance(kind, ValueChange):
                kind.apply(row, change)
        return row

    def assign(self, names: tuple[ast.Name, ...], value: ast.Expr) -> None:
        ids = tuple(name.id for name in names)
        if len(ids) == 1 and ids[0] in self.block.domains and ids[0] not in self.values:
            before = self._copy()
            before.item_changes = dict(self.item_changes)
            self._write({}, {ids[0]: (value, before)})
            return
        self._write(self._assigned(ids, value, f"{self.run}:{','.join(ids)}"), {})

    def exchange(self, first: ast.Name, second: ast.Name) -> None:
        a, b = self.value(first.id, first.span), self.value(second.id, second.span)
        self._write({first.id: b, second.id: a}, {})

    def use_template(self, text: ast.String) -> None:
        self.template = self.block.template(text)
        self._write({}, {})

    def plain_value(self, name: ast.Name) -> object:
        return plain(self.value(name.id, name.span))

    def put(self, name: ast.Name, value: float | str) -> None:
        self._write({name.id: value}, {})

    def permutation(self, name: ast.Name, size: int) -> Sequence[int]:
        order = self.order(Key(f"{self.run}:{name.id}"), max(1, size))
        return [order[place] for place in range(size)]

    def refuse(self, node: ast.Node, reason: str, hint: str) -> NoReturn:
        raise bad(node.span, reason, hint)

    def _write(
        self, values: Mapping[str, Value], items: Mapping[str, tuple[ast.Expr, Row]]
    ) -> None:
        self.changed = {**self.changed, **values}
        self.item_changes = {**self.item_changes, **items}
        self._forget()

    # --- results --------------------------------------------------------------------------------

    def passes(self, conditions: Sequence[ast.Expr], tokenizer: TextTokenizer) -> bool:
        """Whether all conditions of `where` hold; the tokenizer is that of the model."""
        self._tokenizer = tokenizer
        try:
            return all(holds(node, self, Key(f"where.{n}")) for n, node in enumerate(conditions))
        finally:
            self._tokenizer = None

    @cached_property
    def prompt(self) -> Rich:
        """The prompt with its spans, in the order of the text; of an image, what stands for it."""
        if self.image is not None:
            return Rich(self.image.text)
        rich = self._chat() if self.turns else self.text(self.template.text, Key(TEMPLATE))
        spans = list(rich.spans)
        for definition in self.block.spec.spans:
            if definition.literal is not None:
                literal = self.text(definition.literal, Key(definition.name.id)).text
                found = find_text(rich.text, literal)
                spans += [SpanAt(definition.name.id, *at) for at in found[-1:]]
        return Rich(rich.text, tuple(sorted(spans, key=lambda s: (s.start, -s.end))))

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """What each side says, of a chat."""
        turns = enumerate(self.template.turns)
        return tuple(Turn(t.role, self.text(t.text, Key(f"{TEMPLATE}.{n}"))) for n, t in turns)

    def _chat(self) -> Rich:
        """The turns as the tokenizer's template writes them. E0552 as `Refusal`."""
        if self.block.chat is None:
            return unwritten(self.turns)
        try:
            return self.block.chat.written(self.turns)
        except ChatProblem as problem:
            turns = self.template.turns
            at = turns[problem.turn or 0].span
            raise Refusal(ChatRefused, at, reason=problem.reason, hint=problem.hint) from problem

    def named_text(self, name: str) -> str | TokenId:
        """One of the texts that metrics refer to."""
        if name not in self._texts:
            self._texts[name] = self.as_text(self.block.texts[name], Key(name))
        return self._texts[name]

    def as_text(self, node: ast.Expr, key: Key) -> str | TokenId:
        """An expression as a text for a metric."""
        value = evaluate(node, self, key)
        if isinstance(value, TokenId):
            return value
        rich = render(value)
        if rich is None:
            raise bad(node.span, "it has no text in this row", "give a text or a number")
        return rich.text

    @cached_property
    def plain_values(self) -> Mapping[str, object]:
        """All values of the row, without spans."""
        names = dict.fromkeys(self.record) | dict.fromkeys(n for n, _ in self.block.axes)
        names |= dict.fromkeys(self.block.definitions) | dict.fromkeys(self.template.definitions)
        names |= dict.fromkeys([IMAGE] if self.block.spec.tiles is not None else [])
        names |= dict.fromkeys(self.changed)
        span = self.block.spec.span
        return {name: plain(self.value(name, span)) for name in names}

    def describe(self) -> str:
        """Which row this is, for messages."""
        shown = ", ".join(f"{n} = {render_short(self.values[n])}" for n, _ in self.block.axes[:4])
        if self.block.data is not None:
            return f"record {self.places[RECORD]}" + f", {shown}" * bool(shown)
        return f"the row with {shown}" if shown else "every row"


class BlockRows:
    """The rows of a block by their ids: experiments of a file share them, where they aren't too
    many. Rows are deterministic: one that isn't kept is worked out again."""

    def __init__(self, block: PromptsBlock) -> None:
        self.block = block
        self._rows: dict[int, Row] = {}
        self._corrupted: dict[tuple[int, str], Row] = {}

    def __getitem__(self, row_id: int) -> Row:
        row = self._rows.get(row_id)
        if row is None:
            row = Row(self.block, row_id)
            if len(self._rows) < KEPT:
                self._rows[row_id] = row
        return row

    def corrupted(self, row: Row, corruption: spec.Corruption) -> Row:
        """What the corruption makes of a row of the block."""
        key = row.id, corruption.name
        found = self._corrupted.get(key)
        if found is None:
            found = row.corrupted(corruption)
            if row.id in self._rows:
                self._corrupted[key] = found
        return found

    def with_ids(self, ids: Sequence[int]) -> Sequence[Row]:
        """Those with these ids."""
        return _Found(self, ids)

    def only(self, corruption: spec.Corruption) -> BlockRows:
        """The same rows with one of the corruptions."""
        other = BlockRows(self.block.only(corruption))
        other._rows, other._corrupted = self._rows, self._corrupted
        return other


def render_short(value: Value) -> str:
    text = repr(value) if isinstance(value, str) else str(plain(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _shifted(span: SpanAt, end: int, by: int) -> SpanAt:
    """A span after the text up to `end` has become longer by `by`."""
    start = span.start + by if span.start >= end else span.start
    return SpanAt(span.name, start, span.end + by if span.end >= end else span.end, span.within)


class _Found(Sequence[Row]):
    """Rows of a block, looked up when they are asked for."""

    def __init__(self, rows: BlockRows, ids: Sequence[int]) -> None:
        self._rows, self._ids = rows, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Found(self._rows, self._ids[index])
        return self._rows[self._ids[index]]
