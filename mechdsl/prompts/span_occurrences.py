"""Where named spans lie in the prompts of a run, and what is wrong where they don't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mechdsl.base.names import name_list
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e03_positions import (
    AbsentOccurrence,
    AmbiguousSpan,
    NoSuchSpecial,
    SpanWithoutToken,
    UnknownSpan,
)
from mechdsl.diagnostics.e05_answers import AnswersDiffer, NoAnswerHere, NotInTheAnswer
from mechdsl.diagnostics.w07_data import TokenCoversMore
from mechdsl.program.lower_images import IMAGE, IMAGE_SPANS
from mechdsl.prompts.answer_tokens import ANSWER, NO_ANSWERS, AnswerTokens
from mechdsl.prompts.found_text import find_text
from mechdsl.prompts.named_numbers import bounds
from mechdsl.prompts.position_help import occurrence_hint, unknown_span_hint
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.span_tokens import Place, TokenMap
from mechdsl.prompts.tokenizer import ROLES, TextTokenizer
from mechdsl.prompts.values import SpanAt
from mechdsl.syntax import ast
from mechdsl.syntax.format.constructs import span as written_span

ABSENT = Place(0, 0, ())
"""An occurrence that a row lacks."""


@dataclass
class Occurrences:
    """Finds spans in one run of a table. What is wrong goes into `diagnostics`."""

    table: PromptTable
    run: str
    tokenizer: TextTokenizer
    diagnostics: list[Diagnostic]
    answers: AnswerTokens = NO_ANSWERS
    swept: Collection[Span] = ()
    """Positions, and parts of some, whose numbers are those of a `for`."""

    def __post_init__(self) -> None:
        self.maps = [TokenMap(row) for row in self.table.runs[self.run].rows]
        self.total = len(self.maps)
        self.of_tiles = bool(self.table.cut_from)

    def drops_out(self, node: ast.Node) -> bool:
        """Whether rows that lack a position are left out: its number is that of a `for`, or it is a
        region that lies in other tiles of the image."""
        if self.of_tiles and isinstance(node, ast.SpanRef) and node.name not in IMAGE_SPANS:
            return True
        return node.span in self.swept

    def places(self, n: int, ref: ast.SpanRef) -> list[Place]:
        """All occurrences of a span in a row, in the order of the text."""
        m = self.maps[n]
        if ref.name is not None and ref.name in m.row.places:
            return [Place(0, 0, tokens) for tokens in m.row.places[ref.name]]
        if ref.literal is not None:
            found = find_text(m.row.text, ref.literal)
            if ref.of is not None:
                around = [s for s in m.row.spans if s.name == ref.of]
                found = [
                    at for at in found if any(s.start <= at[0] and at[1] <= s.end for s in around)
                ]
            return [m.place(*at) for at in found]
        if self.is_answer(ref):
            return [Place(0, 0, self.behind(n))]
        special = self.special_id(ref)
        if special is not None:
            return [Place(0, 0, (i,)) for i, token in enumerate(m.row.ids) if token == special]
        around = [s for s in m.row.spans if s.name == ref.of]
        return [
            m.place(s.start, s.end)
            for s in m.row.spans
            if s.name == ref.name and (ref.of is None or ref.of in s.within or _lies_in(s, around))
        ]

    def special_id(self, ref: ast.SpanRef) -> int | None:
        """The id of `bos`, `cls`, `sep`, `eos`, unless the prompt has a span of that name: a
        placeholder for the first three, a list's separator where it says of which."""
        if ref.name not in ROLES or ref.of is not None:
            return None
        named = any(
            s.name == ref.name and not (ref.name == "sep" and s.within)
            for m in self.maps[:1]
            for s in m.row.spans
        )
        return None if named else self.tokenizer.role_ids.get(ref.name)

    # --- behind the prompt ------------------------------------------------------------------------

    def is_answer(self, ref: ast.SpanRef) -> bool:
        """Whether it names the text behind the prompt: no prompt has a span of that name."""
        named = ref.name == ANSWER and ref.of is None
        return named and not self.of_images and self._answer_is_behind

    @cached_property
    def _answer_is_behind(self) -> bool:
        return all(span.name != ANSWER for span in self._all_spans())

    def behind(self, n: int) -> tuple[int, ...]:
        """The positions of a row's longest text behind its prompt."""
        size = len(self.maps[n].row.ids)
        return tuple(range(size, size + self.answers.longest(n)))

    def answer_fits(self, node: ast.Node, *, from_end: bool) -> bool:
        """Whether there is a text behind the prompts, and only one length of it in every row where
        tokens are counted from its end; else E0540, E0541."""
        position, answers = node.span.written, self.answers
        if not answers.texts:
            self.diagnostics.append(
                NoAnswerHere(
                    span=node.span, position=position, reason=answers.reason, hint=answers.hint
                )
            )
            return False
        rows = answers.uneven() if from_end else []
        if rows:
            each = dict.fromkeys(f"`{text}` has {at[rows[0]]}" for text, at in answers.texts)
            self.diagnostics.append(
                AnswersDiffer(
                    span=node.span,
                    position=position,
                    rows=len(rows),
                    total=self.total,
                    row=rows[0],
                    lengths=", ".join(each),
                )
            )
        return not rows

    def span_fits(self, node: ast.Node, ref: ast.SpanRef, *, from_end: bool) -> bool:
        """`answer_fits` for a span that is the answer, which can't be counted (E0542); true for all
        others."""
        if self.of_images and isinstance(node, ast.SpanTokens):
            return self._one_patch(node, ref)
        if not self.is_answer(ref):
            return True
        each = isinstance(node, ast.SpanTokens) and node.each
        if each or ref.occurrence is not None or ref.edge is not None:
            self.diagnostics.append(
                NotInTheAnswer(
                    span=node.span,
                    position=node.span.written,
                    reason="one text stands behind a prompt, so there are no occurrences to count",
                    hint="write `each token of answer` for one run per token, `first token of "
                    "answer + 1` for the second one",
                )
            )
            return False
        return self.answer_fits(node, from_end=from_end)

    def _one_patch(self, node: ast.SpanTokens, ref: ast.SpanRef) -> bool:
        """Whether what is one token in each image isn't a part of it: patches have no last one."""
        if ref.row is not None or (node.plural and not node.each):
            return True
        found = self.all_places(replace(ref, occurrence=None))
        if found is None:
            return False
        sizes = [max((len(place.tokens) for place in places), default=0) for places in found]
        several = [n for n, size in enumerate(sizes) if size > 1]
        if not several:
            return True
        name = ref.name or ""
        ways = [f"`each token of {name}` for one run each", f"`{name} tokens` for all of them"]
        self._ambiguous(node, name, several, f"is {sizes[several[0]]} patches", ways)
        return False

    def _known(self, ref: ast.SpanRef) -> bool:
        """Whether any row of any run has such a span, else E0308 or E0313."""
        if self.of_images:
            return self._known_of_images(ref)
        if ref.literal is not None and ref.of is None:
            return True
        if self.is_answer(ref):
            return True
        special = self.special_id(ref)
        if special is not None:
            if any(special in m.row.ids for m in self.maps):
                return True
            self._no_special(ref, "the tokenizer has one, but doesn't put it into these prompts")
            return False
        wanted = [ref.of] if ref.literal is not None else [ref.name, ref.of]
        for name in wanted:
            if name is None or any(name == span.name for span in self._all_spans()):
                continue
            if name in ROLES and ref.of is None:
                self._no_special(ref, "the tokenizer has none")
            else:
                names = {span.name for span in self._all_spans()}
                hint = unknown_span_hint(name, names, self.table)
                others = (run.prompts for run in self.table.runs.values() if run.prompts)
                blocks = "`, `".join(dict.fromkeys((self.table.name, *others)))
                self.diagnostics.append(
                    UnknownSpan(span=ref.span, name=name, prompts=blocks, hint=hint)
                )
            return False
        return True

    @property
    def of_images(self) -> bool:
        """Whether the rows are images."""
        return any(m.row.image is not None for m in self.maps)

    def _known_of_images(self, ref: ast.SpanRef) -> bool:
        names = [name for m in self.maps[:1] for name in m.row.places]
        if ref.row is not None and ref.name != IMAGE:
            names = [IMAGE]
        if ref.name in names and ref.of is None:
            return True
        shown = name_list(names)
        hint = did_you_mean(ref.name or "", names, f"tokens of these images are {shown}")
        name = ref.of or ref.name or ref.literal or ""
        self.diagnostics.append(
            UnknownSpan(
                span=ref.span,
                name=name,
                prompts=self.table.runs[self.run].prompts or self.table.name,
                hint=hint,
                what="nothing of an image",
                unit="image",
            )
        )
        return False

    def _all_spans(self) -> Iterator[SpanAt]:
        return (s for run in self.table.runs.values() for row in run.rows for s in row.spans)

    def _no_special(self, ref: ast.SpanRef, reason: str) -> None:
        hint = "set `bos: true` in the model line" if ref.name == "bos" else "name another token"
        if reason == "the tokenizer has none":
            hint = "write `first token` for the first one of the text"
        self.diagnostics.append(
            NoSuchSpecial(
                span=ref.span,
                name=ref.name or "",
                prompts=self.table.name,
                reason=reason,
                hint=hint,
            )
        )

    def all_places(self, ref: ast.SpanRef) -> list[list[Place]] | None:
        """Per row, all occurrences; None with a diagnostic where the span is unknown or has no
        token."""
        if (ref.row is not None or ref.col is not None) and not self.of_images:
            self.diagnostics.append(NotSupported(span=ref.span, what="a position in an image"))
            return None
        if not self._known(ref):
            return None
        found = [self.places(n, ref) for n in range(self.total)]
        bare = [n for n, places in enumerate(found) if any(not p.tokens for p in places)]
        if bare:
            place = next(p for p in found[bare[0]] if not p.tokens)
            text = self.maps[bare[0]].row.text[place.start : place.end]
            hint = 'name the token beside it, or choose a separator such as ", "'
            self.diagnostics.append(
                SpanWithoutToken(
                    span=ref.span,
                    name=ref.span.written,
                    run=self.run,
                    lacking=len(bare),
                    total=self.total,
                    text=repr(text),
                    by_text=not text and not self.table.stands_in,
                    hint=hint if text else "leave rows where it is empty out with `where`",
                )
            )
            return None
        return found

    def absent(self, node: ast.Node, ref: ast.SpanRef, lacking: list[int], least: int) -> None:
        self.diagnostics.append(
            AbsentOccurrence(
                span=node.span,
                position=written_span(ref),
                run=self.run,
                lacking=len(lacking),
                total=self.total,
                example=self.example(lacking[0]),
                hint=occurrence_hint(ref, least, self.table, self.run)
                if least > 0
                else f"occurrences count from 1: write `{ref.name} 1 token`",
            )
        )

    def one_place(self, node: ast.Node, ref: ast.SpanRef) -> list[Place] | None:
        """The one occurrence that is meant, in each row; one without tokens where a row lacks what
        a `for` counts. E0306, E0309."""
        found = self.all_places(ref)
        if found is None:
            return None
        pick, least = _picker(ref)
        if least < 1:  # `item 0`: occurrences count from 1
            self.absent(node, ref, list(range(self.total)), least)
            return None
        lacking = [n for n, places in enumerate(found) if len(places) < least]
        if lacking and not (self.drops_out(ref) and len(lacking) < self.total):
            self.absent(node, ref, lacking, least)
            return None
        if pick is None:
            several = [n for n, places in enumerate(found) if len(places) > 1]
            if several:
                times = f"occurs {len(found[several[0]])} times in the prompt"
                self._ambiguous(node, ref.span.written, several, times, _occurrences(ref))
                return None
            pick = 0
        return [places[pick] if len(places) >= least else ABSENT for places in found]

    def _ambiguous(
        self, node: ast.Node, name: str, several: list[int], what: str, ways: list[str]
    ) -> None:
        self.diagnostics.append(
            AmbiguousSpan(
                span=node.span,
                name=name,
                several=what,
                rows=len(several),
                total=self.total,
                run=self.run,
                example=self.example(several[0]),
                ways=", ".join(ways[:-1]) + " or " + ways[-1],
            )
        )

    def warn(self, ref: ast.SpanRef, hits: Iterable[tuple[int, Place, tuple[int, ...]]]) -> None:
        """W0701 where a token that is hit also covers text beside the span."""
        if self.is_answer(ref) or self.special_id(ref) is not None or self.of_images:
            return
        texts: Counter[str] = Counter()
        rows: set[int] = set()
        for n, place, tokens in hits:
            for token in tokens:
                more = self.maps[n].covers_more(place, token)
                if more is not None:
                    texts[more] += 1
                    rows.add(n)
        if texts:
            shown = ", ".join(f"`{t}`" for t, _ in texts.most_common(3))
            self.diagnostics.append(
                TokenCoversMore(
                    span=ref.span,
                    name=ref.span.written,
                    tokens=shown,
                    rows=len(rows),
                    total=self.total,
                )
            )

    def example(self, n: int) -> str:
        text = " ".join(self.maps[n].row.text.split())
        return f'"{text}"' if len(text) <= 48 else f'"{text[:47]}…"'


def _lies_in(span: SpanAt, around: Sequence[SpanAt]) -> bool:
    """Whether a marked or literal span lies within another one of these."""
    return any(s is not span and s.start <= span.start and span.end <= s.end for s in around)


def _picker(ref: ast.SpanRef) -> tuple[int | None, int]:
    """Which occurrence is meant (None: the only one), and how many there have to be."""
    if ref.edge is not None:
        return (0 if ref.edge == "first" else -1), 1
    counted = bounds(ref.occurrence)
    if counted is not None:
        return counted[0] - 1, counted[0]
    return (-1 if ref.literal is not None else None), 1


def _occurrences(ref: ast.SpanRef) -> list[str]:
    """How one of several occurrences is named."""
    name, behind = ref.span.written, f" of {ref.of}" if ref.of is not None else ""
    ways = [f"`first-{name} token`", f"`last-{name} token`", f"`{ref.name} 2{behind} token`"]
    return [*ways, f"`each {name} token` for one run each", f"`{name} tokens` for all of them"]
