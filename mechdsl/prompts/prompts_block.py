"""A prompts block, made ready to give rows: its names found, its data read, its axes counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property

from mechdsl.base.names import name_list
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import DuplicateName, did_you_mean
from mechdsl.diagnostics.e05_data import BadCall, DataFormat, NoDomain, NoTemplate, UnknownValue
from mechdsl.images.picture import Picture
from mechdsl.program import spec
from mechdsl.program.lower_images import is_drawn
from mechdsl.program.lower_images import parts as image_parts
from mechdsl.program.lower_tiles import columns_of_tiles
from mechdsl.program.spec_tiles import TILE
from mechdsl.prompts.chat_template import ChatTemplate
from mechdsl.prompts.compiled_template import CompiledTemplate, Definition
from mechdsl.prompts.data_files import DataFile, read_data
from mechdsl.prompts.derived_values import endless
from mechdsl.prompts.domains import Constants, Words, make_domain
from mechdsl.prompts.hub_datasets import read_dataset
from mechdsl.prompts.images_block import (
    ImageFiles,
    is_drawn_mask,
    meant_otherwise,
    not_of_images,
    swaps_regions,
)
from mechdsl.prompts.names_used import NameUse, calls_in, counts_tokens, draws, uses
from mechdsl.prompts.parts_of_rows import parts_of
from mechdsl.prompts.python_values import Calls
from mechdsl.prompts.row_scope import Refusal
from mechdsl.prompts.values import Value, frozen, plain
from mechdsl.syntax import ast
from mechdsl.syntax.template import Placeholder, parse_template
from mechdsl.vocab.corruptions import kind_of, problems

TEMPLATE = "template"
"""Name of the value that says which of several templates a row is written with."""

Blocks = Mapping[str, spec.Prompts]


def _without_wrong_changes(prompts: spec.Prompts, parameters: Constants) -> spec.Prompts:
    """The block, so that what is wrong elsewhere in it can be told too."""
    right = tuple(
        c.model_copy(
            update={"changes": tuple(x for x in c.changes if not problems((x,), parameters))}
        )
        for c in prompts.corruptions
    )
    return prompts.model_copy(update={"corruptions": right})


class PromptsBlock:
    """The names of a block and what they stand for. Build it with `compile_block`."""

    def __init__(
        self,
        prompts: spec.Prompts,
        *,
        seed: int,
        words: Words | None,
        parameters: Constants,
        blocks: Blocks,
        python: bool = False,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.spec = _without_wrong_changes(prompts, parameters)
        self.name = prompts.name
        self.seed = seed
        self.parameters = parameters
        self.words = words
        self.blocks = blocks
        self.python = python
        """Whether functions of Python files may be run."""
        self.chat = chat
        """What writes the turns of a chat; None where the tokenizer isn't at hand."""
        self.diagnostics: list[Diagnostic] = [
            d for c in prompts.corruptions for d in problems(c.changes, parameters)
        ] + not_of_images(prompts)
        self._templates: dict[int, CompiledTemplate] = {}
        self._pools: dict[str, DataFile | None] = {}
        self._columns: dict[str, Sequence[Value]] = {}
        self.image_files = ImageFiles()
        self.averaged: Picture | None = None
        """The mean that its images are, once it is taken."""
        self.data: DataFile | None = self._read()
        self.columns: tuple[str, ...] = self.data.columns if self.data else ()
        self.templates: tuple[CompiledTemplate, ...] = tuple(map(self.template, prompts.templates))
        if prompts.chat:
            self.templates = (self._of_turns(prompts.chat),)
        self.domains: dict[str, Sequence[Value]] = {}
        if prompts.tiles is not None:
            self.domains[TILE] = prompts.tiles.names
        self.definitions: dict[str, Definition] = {}
        for value in prompts.values:
            self._define(value)
        self.texts: dict[str, ast.Expr] = {t.name: t.value for t in prompts.texts}
        self.marks: dict[str, list[ast.SpanDef]] = {}
        """Spans that are marked inside the text of a column (`span subject in prompt`)."""
        for span in prompts.spans:
            if span.within is not None:
                self.marks.setdefault(span.within.id, []).append(span)
        self._check_names()
        self.axes: tuple[tuple[str, Sequence[Value]], ...] = tuple(self._axes())
        self.size = 1
        """Combinations of values, for each record."""
        for _, values in self.axes:
            self.size *= len(values)
        self.draws: bool = any(draws(node, self.placeholders) for node in self._clean_parts())
        if prompts.image is not None:
            self.draws = self.draws or is_drawn(prompts.image)

    # --- building -------------------------------------------------------------------------------

    def _read(self) -> DataFile | None:
        source = self.spec.rows
        if source is None:
            return None
        if isinstance(source, ast.String):
            data, diagnostics = read_data(source.value, source.span)
        else:  # other than calls are refused where they stand
            data, diagnostics = read_dataset(source) if isinstance(source, ast.Call) else (None, [])
        self.diagnostics += diagnostics
        if data is None or not self.spec.rename:
            return data
        new_names = {old: new for new, old in self.spec.rename}
        for old in new_names:
            if old not in data.columns:
                self.diagnostics.append(
                    UnknownValue(
                        span=source.span,
                        prompts=self.name,
                        name=old,
                        hint=_hint(old, data.columns, "columns"),
                    )
                )
        for new in new_names.values():
            if new in data.columns and new not in new_names:
                shown = source.value if isinstance(source, ast.String) else source.span.written
                first = f"the column `{new}` of `{shown}`"
                self.diagnostics.append(DuplicateName(span=source.span, name=new, first=first))
        records = tuple({new_names.get(k, k): v for k, v in r.items()} for r in data.records)
        columns = tuple(new_names.get(c, c) for c in data.columns)
        return DataFile(records, columns, data.digest)

    def _define(self, value: spec.Value) -> None:
        if value.domain is not None:
            values, diagnostics = make_domain(
                value.domain, prompts=self.name, constants=self.parameters, words=self.words
            )
            self.diagnostics += diagnostics
            for name in value.names:
                self.domains[name] = values
        elif value.value is not None:
            definition = Definition(value.names, value.value)
            for name in value.names:
                self.definitions[name] = definition

    def template(self, text: ast.String) -> CompiledTemplate:
        """The parsed text; every text of the file is parsed once. Codes: E0113 and its like."""
        found = self._templates.get(id(text))
        if found is None:
            pieces, diagnostics = parse_template(text)
            self.diagnostics += diagnostics
            # The tree holds on to `text`, so its id stays its own.
            found = self._templates[id(text)] = CompiledTemplate(text, pieces)
        return found

    def _of_turns(self, turns: tuple[ast.ChatTurn, ...]) -> CompiledTemplate:
        texts = [self.template(turn.text) for turn in turns]
        pieces = [piece for text in texts for piece in text.pieces]
        return CompiledTemplate(texts[0].text, pieces, turns)

    def placeholders(self, text: ast.String) -> list[ast.Expr]:
        """What stands in the braces of a text."""
        return [p.expr for p in self.template(text).pieces if isinstance(p, Placeholder)]

    @cached_property
    def calls(self) -> Calls:
        """The `python(…)` in it."""
        return Calls(parts_of(self), allowed=self.python)

    def in_file(self, index: int) -> int:
        """The combination at a place of a round: a limit or a split takes the same records however
        the file is sorted."""
        if self.data is None:
            return index
        rest, place = divmod(index, self.data_size)
        return rest * self.data_size + self.data.by_content.order[place]

    def place_of(self, number: int) -> int:
        """The place of a combination in a round, the other way round."""
        if self.data is None:
            return number
        rest, record = divmod(number, self.data_size)
        return rest * self.data_size + self.data.by_content.rank[record]

    @property
    def data_size(self) -> int:
        """Records of the data file; 1 where there is none."""
        return len(self.data.records) if self.data else 1

    @property
    def columns_unknown(self) -> bool:
        """Whether it has columns whose names can't be read."""
        return self.data is None and (self.spec.rows is not None or self.spec.from_images)

    @property
    def combinations(self) -> int:
        """Rows of one round."""
        return self.size * self.data_size

    @property
    def tiles(self) -> int:
        """Rows that one image is cut into: those of a round have it by the first number of them,
        and so many further."""
        return len(self.domains[TILE]) if self.spec.tiles is not None else 1

    def images_behind(self, number: int) -> int:
        """The number of a row if its image were one: equal for its tiles, and for no others."""
        turn, index = divmod(number, max(1, self.combinations))
        images = self.combinations // self.tiles
        return turn * images + index % max(1, images)

    # --- names ------------------------------------------------------------------------------------

    def _clean_parts(self) -> Iterator[ast.Expr]:
        """All expressions that the clean row is made of."""
        for definition in self.definitions.values():
            yield definition.value
        for template in self.templates:
            yield from template.texts
        if self.spec.image is not None:
            yield from image_parts(self.spec.image)
        for region in self.spec.regions:
            if not is_drawn_mask(self.spec, region):
                yield ast.Name(region.column, span=region.span)
        yield from self.texts.values()
        if self.spec.classes is not None:
            yield self.spec.classes
        yield from self.spec.where
        for span in self.spec.spans:
            if span.literal is not None:
                yield span.literal

    def _changed_parts(self) -> Iterator[tuple[set[str], ast.Node]]:
        """What corruptions write, with the names that each change gives a new value."""
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                if swaps_regions(change, self.spec):
                    continue
                kind = kind_of(change)
                written = {name.id for name in kind.writes(change)}
                for node in kind.reads(change):
                    yield written, node

    def _all_templates(self) -> Iterator[CompiledTemplate]:
        yield from self.templates
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                yield from map(self.template, kind_of(change).templates(change))

    def _check_names(self) -> None:
        """E0202, E0501, E0502, E0525: all that can be said before a row is made."""
        if self.spec.tiles is not None:
            self.diagnostics += columns_of_tiles(self.spec.tiles, self.columns)
        if not self.templates:
            self.diagnostics.append(NoTemplate(span=self.spec.span, prompts=self.name))
        for template in self._all_templates():
            for name in template.definitions:
                if name in self.domains or name in self.definitions:
                    self._duplicate(template, name)
        if not self.columns_unknown:
            self._check_uses()
        self._check_cycles()
        self._check_tokens()
        self._check_roles()

    def _check_tokens(self) -> None:
        """E0515 for `tokens(…)` in what prompts are made of: it is told of finished ones."""
        elsewhere = (
            *(each.value for each in self.definitions.values()),
            *(text for each in self._all_templates() for text in each.texts),
            *self.texts.values(),
            *(part for _, part in self._changed_parts()),
        )
        for call in calls_in(elsewhere, self.placeholders):
            if counts_tokens(call):
                reason, usage = "can only stand in `where`", "where tokens(answer) = 1"
                bad = BadCall(span=call.span, name="tokens", reason=reason, usage=usage)
                self.diagnostics.append(bad)

    def _check_roles(self) -> None:
        """E0202 for values that are called as the turns are, and stand in one."""
        first = "the turns of that name, which are spans too"
        marks = [span.name for span in self.spec.spans if span.within is None]
        texts = [turn.text for turn in self.spec.chat]
        found = [(use.name, use.span) for use in uses(tuple(texts), self.placeholders)]
        found += [(mark.id, mark.span) for mark in marks] if texts else []
        for name, span in found:
            if name in spec.CHAT_ROLES:
                self.diagnostics.append(DuplicateName(span=span, name=name, first=first))

    def _duplicate(self, template: CompiledTemplate, name: str) -> None:
        for piece in template.pieces:
            if isinstance(piece, Placeholder) and piece.name == name:
                first = f"a value of prompts `{self.name}`"
                self.diagnostics.append(DuplicateName(span=piece.span, name=name, first=first))

    def _check_uses(self) -> None:
        names = self.names()
        parts: list[ast.Node] = [*self._clean_parts(), *(n for _, n in self._changed_parts())]
        for use in uses(tuple(parts), self.placeholders):
            if use.name in names or (use.how == "pool" and use.name in self.blocks):
                continue
            problem = meant_otherwise(self._unknown(use.name, use.span), self.spec)
            self.diagnostics.append(problem)
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                for target in kind_of(change).writes(change):
                    if target.id not in names:
                        self.diagnostics.append(self._unknown(target.id, target.span))
        for spans in self.marks.values():
            for span in spans:
                for name in (span.name, span.within):
                    if name is not None and name.id not in names:
                        self.diagnostics.append(self._unknown(name.id, name.span))

    def names(self) -> dict[str, None]:
        """Every name that a row has, in the order of the file."""
        found: dict[str, None] = dict.fromkeys(self.columns)
        if self.spec.tiles is not None:
            found[TILE] = None
        for value in self.spec.values:
            found |= dict.fromkeys(value.names)
        for template in self._all_templates():
            found |= dict.fromkeys(template.definitions)
        if len(self.templates) > 1:
            found[TEMPLATE] = None
        found |= dict.fromkeys(self.texts) | dict.fromkeys(self.parameters)
        return found | dict.fromkeys(("true", "false"))

    def _unknown(self, name: str, span: Span) -> UnknownValue:
        names = [n for n in self.names() if n not in ("true", "false")]
        hint = _hint(name, names, "names")
        return UnknownValue(span=span, prompts=self.name, name=name, hint=hint, unit=self.spec.unit)

    def unknown(self, name: str, span: Span) -> Refusal:
        """E0501 for a name that a row doesn't have."""
        if name in self.domains:
            hint = f"a row has many: `{name}` is only drawn by a list; `xs[1]` is one of them"
        else:
            hint = self._unknown(name, span).hint
        return Refusal(
            UnknownValue, span, prompts=self.name, name=name, hint=hint, unit=self.spec.unit
        )

    def _check_cycles(self) -> None:
        """E0502, and E0506 for values that hang on one another in an endless chain."""
        for template in self._all_templates():
            graph = template.definitions | self.definitions
            for name, value in self.texts.items():
                graph.setdefault(name, Definition((name,), value))
            found = endless(graph, self.placeholders)
            if found is not None:
                self.diagnostics.append(found)
                return

    def only(self, corruption: spec.Corruption) -> PromptsBlock:
        """The same block with one of its corruptions."""
        other = copy(self)
        other.spec = self.spec.model_copy(update={"corruptions": (corruption,)})
        return other

    def _axes(self) -> Iterator[tuple[str, Sequence[Value]]]:
        """The domains that are crossed: all but those that only lists draw from."""
        drawn = set[str]()
        own = set[str]()

        def note(found: Iterable[NameUse], changed: set[str]) -> None:
            for use in found:
                if use.how == "item":
                    drawn.add(use.name)
                elif use.how == "value" and use.name not in changed:
                    own.add(use.name)

        for part in self._clean_parts():
            note(uses(part, self.placeholders), set())
        for changed, part in self._changed_parts():
            # `item = other(item)` changes each item that the lists drew.
            note(uses(part, self.placeholders), changed)
        if len(self.templates) > 1:
            yield TEMPLATE, tuple(t.text.value for t in self.templates)
        if self.spec.tiles is not None:  # outermost: what `images_behind` hangs on
            yield TILE, self.domains[TILE]
        for name, values in self.domains.items():
            if name == TILE and self.spec.tiles is not None:
                continue
            if name in own or name not in drawn:
                yield name, values

    def is_token_id(self, text: str) -> bool:
        """Whether a text is given as the id of a token, which nothing is tokenised for."""
        node = self.texts[text]
        return isinstance(node, ast.Call) and node.name == "token_id"

    # --- domains of names -------------------------------------------------------------------------

    def domain_of(self, node: ast.Expr, template: CompiledTemplate | None) -> Sequence[Value]:
        """What a name ranges over: its own domain, or that of what it is drawn from. E0513."""
        found = self._domain(node, template, frozenset())
        if found is None:
            shown = node.span.text
            hint = 'give values to draw from: `x in ["a", "b"]`, then `other(x)`'
            raise Refusal(NoDomain, node.span, name=shown, hint=hint)
        return found

    def _domain(
        self, node: object, template: CompiledTemplate | None, seen: frozenset[str]
    ) -> Sequence[Value] | None:
        match node:
            case ast.Name(id=name) if name not in seen:
                if name in self.domains:
                    return self.domains[name]
                if name == TEMPLATE and len(self.templates) > 1:
                    return [t.text.value for t in self.templates]
                definition = self.definitions.get(name)
                if definition is None and template is not None:
                    definition = template.definitions.get(name)
                if definition is not None:
                    return self._domain(definition.value, template, seen | {name})
                return self.column(name)
            case ast.Index(name=name):
                inner = ast.Name(name, span=node.span)
                return self._domain(inner, template, seen)
            case ast.Call(name="other" | "others" | "shuffle" | "list", arguments=(first, *_)):
                return self._domain(first.value, template, seen)
            case ast.Call(name="choice", arguments=arguments) if len(arguments) > 1:
                fixed = [a.value for a in arguments]
                values = [n.value for n in fixed if isinstance(n, ast.Number | ast.String)]
                return values if len(values) == len(fixed) else None
            case _:
                return None

    def column(self, name: str) -> Sequence[Value] | None:
        """The different values of a column, however the file is sorted."""
        if self.data is None or name not in self.columns:
            return None
        if name not in self._columns:
            values = (record.get(name) for record in self.data.sorted)
            unique = {frozen(plain(v)): v for v in values if v is not None}
            self._columns[name] = tuple(unique.values())
        return self._columns[name]

    def records(self, name: str) -> DataFile | None:
        """The records of this or another block, None where it has none. E0504, E0505."""
        if name == self.name:
            return self.data
        if name not in self.blocks:
            return None
        if name not in self._pools:
            other = PromptsBlock(
                self.blocks[name],
                seed=self.seed,
                words=self.words,
                parameters=self.parameters,
                blocks={},
            )
            wrong = next((d for d in other.diagnostics if d.code in ("E0504", "E0505")), None)
            if isinstance(wrong, DataFormat) and wrong.span is not None:
                facts = {"path": wrong.path, "reason": wrong.reason, "hint": wrong.hint}
                raise Refusal(DataFormat, wrong.span, **facts)
            self._pools[name] = other.data
        return self._pools[name]


def _hint(name: str, known: Iterable[str], what: str) -> str:
    names = list(known)
    listed = name_list(names)
    return did_you_mean(name, names, f"its {what} are {listed}" if names else "define it")
