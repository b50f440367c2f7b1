"""Chat templates of tokenizers: turns to one text with the span of each turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from mechdsl.base import limits
from mechdsl.base.files import load_json
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError, count_noun
from mechdsl.images.picture import MARKER
from mechdsl.prompts.values import RichText, TextSpan, concatenate

ASSISTANT = "assistant"

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""Files of a template that isn't in the tokenizer's config."""

_TELLS = re.compile(r"(?s)(?=.*[^\w\s]).{3}")
"""Texts that mark turns: not words, which may appear anywhere, and not single characters."""

_MARKS = [chr(0xFDD0 + n) for n in range(32)]
"""Code points that aren't characters, and so appear in no text."""


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    rich: RichText


class ChatProblem(HintedError):
    """Turns that the template can't format.

    turn: the number of the turn that causes the problem; None if unknown.
    """

    def __init__(self, reason: str, hint: str, turn: int | None = None) -> None:
        super().__init__(reason, hint)
        self.turn = turn


class ChatTemplate(Record):
    """The chat template of a tokenizer, and its inputs."""

    text: str
    tokens: Mapping[str, str]
    """Special tokens by their names in templates, `bos_token`."""
    added: Mapping[str, bool]
    """Texts that are always a single token, and whether each is a special token."""
    image: str = ""
    """The text that stands for an image in formatted texts; empty without images."""
    part: str = "image"
    """The type of images in the lists of parts that the template gets."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further variables that the template gets: `enable_thinking`."""

    @cached_property
    def digest(self) -> str:
        """Digest of everything that formatted texts depend on."""
        parts = (self.text, sorted(self.tokens.items()), sorted(self.added.items()))
        parts += (self.image,) if self.image else ()
        parts += (self.part,) if self.part != "image" else ()
        parts += (sorted(self.arguments.items()),) if self.arguments else ()
        return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def tells_time(self) -> bool:
        """Whether formatted texts may contain a date."""
        return "strftime_now" in self.text

    @property
    def starts_reply(self) -> bool:
        """Whether the template can add the start of a reply after the last turn."""
        return "add_generation_prompt" in self.text

    @cached_property
    def problem(self) -> ChatProblem | None:
        """The reason that the template can't be used at all."""
        if len(self.text) > limits.CHAT_TEMPLATE:
            size = f"{len(self.text):,} characters are more than {limits.CHAT_TEMPLATE:,}"
            return ChatProblem(size, "no model's chat template is that long; check the file")
        try:
            _ = self._render
        except Exception as error:  # Jinja's exceptions, and those of Python's compiler
            return ChatProblem(
                f"it is not a valid template ({_said(error)})", "correct it in the folder"
            )
        return None

    @cached_property
    def _render(self) -> Callable[[Mapping[str, Any]], str]:
        from mechdsl.prompts.tokens.sandbox import (
            TemplateSandbox,  # slow to import, and few files need it
        )

        return TemplateSandbox().compiled(self.text)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads, without those that mechdsl sets itself."""
        from mechdsl.prompts.tokens.sandbox import TemplateSandbox

        reserved = {"messages", "tools", "documents", "add_generation_prompt", *self.tokens}
        return frozenset(TemplateSandbox().variables(self.text) - reserved)

    def marker_in(self, text: str) -> str | None:
        """Return the name of a special token that a text contains, where it would be that token."""
        return next(
            (name for name, special in self.added.items() if special and name in text), None
        )

    def written(self, turns: Sequence[Turn]) -> RichText:
        """Format turns as one text, each turn a span of its role, with the spans inside it.

        If the last turn is the assistant's, it is the beginning of a reply, and the text ends with
        it. Otherwise the template's opening of a reply ends the text. Raises `ChatProblem`.
        """
        if not any(MARKER.search(turn.rich.text) for turn in turns):
            return self._formatted(turns)
        try:
            return self._with_images(turns)
        except ChatProblem as problem:
            try:
                return self._formatted(turns)
            except ChatProblem:
                raise problem from None

    def _with_images(self, turns: Sequence[Turn]) -> RichText:
        """Format turns whose contents are lists of texts and images. Raises `ChatProblem`.

        The template places the images; white space next to them is removed before.
        """
        parts = [part for number, turn in enumerate(turns) for part in _parts(number, turn)]
        owners = [number for number, _ in parts]
        try:
            return self._formatted([turn for _, turn in parts], owners)
        except ChatProblem as problem:
            if problem.turn is not None:
                problem.turn = owners[problem.turn]
            raise

    def _formatted(self, turns: Sequence[Turn], owners: Sequence[int] | None = None) -> RichText:
        """Format turns, or parts of turns.

        owners: for parts, the numbers of their turns.
        """
        texts = [turn.rich.text for turn in turns]
        begun = turns[-1].role == ASSISTANT
        for number, text in enumerate(texts):
            self._refuse(number, turns, self.marker_in(text))
        mark, close = _free_marks(texts)
        marked = [
            _inner(text, f"{mark}{number}{mark}", f"{close}{number}{close}")
            for number, text in enumerate(texts)
        ]
        plain = self._rendered(turns, texts, owners)
        formatted = _Found(self._rendered(turns, marked, owners), mark, close)
        if formatted.text != plain:
            alone = ([*texts[:n], marked[n], *texts[n + 1 :]] for n in range(len(turns)))
            seen = (_Found(self._rendered(turns, one, owners), mark, close).text for one in alone)
            changed = next((n for n, text in enumerate(seen) if text != plain), None)
            _lost(turns, formatted, changed)
        rich = formatted.rich(turns, owners)
        for piece in formatted.between:
            for number, text in enumerate(texts):
                self._refuse(number, turns, self._writes(piece, text))
        if not begun:
            return rich
        end = formatted.end(len(turns) - 1, texts[-1])
        if any(span.end > end for span in rich.spans):
            _lost(turns, formatted)
        return RichText(rich.text[:end], rich.spans)

    def _writes(self, piece: str, text: str) -> str | None:
        """Return a turn mark that both the template's own text and a turn's text contain."""
        told = [name for name in (*self.added, piece.strip()) if _TELLS.search(name)]
        return next((name for name in told if name in piece and name in text), None)

    @staticmethod
    def _refuse(number: int, turns: Sequence[Turn], marker: str | None) -> None:
        if marker is not None:
            role, shown = turns[number].role, " ".join(marker.split())
            raise ChatProblem(
                f"the text of a turn of `{role}` contains `{shown}`, a special token or a "
                "turn marker",
                "exclude these rows with `where`, or rephrase the text: the model would "
                "read this as more than text",
                number,
            )

    def _rendered(
        self, turns: Sequence[Turn], texts: Sequence[str], owners: Sequence[int] | None
    ) -> str:
        messages: list[dict[str, Any]] = []
        for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
            if owners is None:
                messages.append({"role": turn.role, "content": text})
                continue
            if not number or owners[number] != owners[number - 1]:
                messages.append({"role": turn.role, "content": []})
            is_image = MARKER.fullmatch(turn.rich.text) is not None
            part = {"type": self.part} if is_image else {"type": "text", "text": text}
            messages[-1]["content"].append(part)
        names = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": turns[-1].role != ASSISTANT,
            **self.tokens,
            **self.arguments,
        }
        try:
            text = self._render(names)
        except Exception as error:  # templates can raise anything
            hint = "change the turns, or write the whole text with `template`"
            raise ChatProblem(_said(error), hint) from error
        if owners is not None:
            text = self._place_images(turns, texts, text)
        if len(text) > limits.TEXT:
            raise ChatProblem(
                f"it writes {len(text):,} characters, more than {limits.TEXT:,}",
                "this exceeds the context of any model; shorten the turns",
            )
        return text

    def _place_images(self, turns: Sequence[Turn], texts: Sequence[str], written: str) -> str:
        """Replace the template's texts of images by those of the turns, in order."""
        names = [
            text
            for turn, text in zip(turns, texts, strict=True)
            if MARKER.fullmatch(turn.rich.text)
        ]
        pieces = written.split(self.image)
        if len(pieces) != len(names) + 1:
            raise ChatProblem(
                f"it writes `{self.image}` {len(pieces) - 1} times, for "
                f"{count_noun(len(names), 'image')}",
                "write the whole text with `template`",
            )
        return pieces[0] + "".join(map("".join, zip(names, pieces[1:], strict=True)))


class _Found:
    """A formatted text, split at the marks around its turns."""

    def __init__(self, marked: str, mark: str, close: str) -> None:
        self.places: dict[int, list[tuple[int, int]]] = {}
        """By turn number, the characters of its text without white space at its ends."""
        self.between: list[str] = []
        """The text of the template."""
        text, began, outside = "", dict[int, int](), ""
        for piece in re.split(f"({mark}[0-9]+{mark}|{close}[0-9]+{close})", marked):
            if piece[:1] == mark and len(piece) > 2:
                began[int(piece[1:-1])] = len(text)
                self.between.append(outside)
                outside = ""
            elif piece[:1] == close and len(piece) > 2:
                number = int(piece[1:-1])
                start = began.pop(number, len(text))
                self.places.setdefault(number, []).append((start, len(text)))
            else:
                text += piece
                outside += "" if began else piece
        self.between = [piece for piece in (*self.between, outside) if piece.strip()]
        self.text = text

    def rich(self, turns: Sequence[Turn], owners: Sequence[int] | None) -> RichText:
        """Return the text with its spans in text order.

        owners: as in `ChatTemplate._formatted`; the parts of a turn are one span.
        """
        spans: list[TextSpan] = []
        whole: dict[int, tuple[str, list[int]]] = {}
        for number, turn in enumerate(turns):
            core = turn.rich.text.strip()
            places = self.places.get(number, [])
            if not places or any(self.text[a:b] != core for a, b in places):
                _lost(turns, self, number)
            if owners is not None and len(places) != 1:
                _lost(turns, self, number)
            for start, end in places:
                role, *inner = self._spans(turn, start, end)
                spans += inner
                if owners is None:
                    spans.append(role)
                else:
                    whole.setdefault(owners[number], (turn.role, []))[1].extend((start, end))
        spans += [TextSpan(role, min(ends), max(ends)) for role, ends in whole.values()]
        return RichText(self.text, tuple(sorted(spans, key=lambda s: (s.start, -s.end))))

    def _spans(self, turn: Turn, start: int, end: int) -> list[TextSpan]:
        """Return the spans of a turn whose text, without outer white space, has this range."""
        text = turn.rich.text
        lead = len(text) - len(text.lstrip()) if text.strip() else 0

        def at(place: int) -> int:
            return min(max(place - lead + start, start), end)

        inner = (
            TextSpan(name, at(a), at(b), (turn.role, *within))
            for name, a, b, within in turn.rich.spans
        )
        return [TextSpan(turn.role, start, end), *inner]

    def end(self, number: int, text: str) -> int:
        """Return the end of a turn's text, with trailing white space if the template keeps it."""
        end = self.places[number][-1][1]
        trail = text[len(text.rstrip()) :] if text.strip() else ""
        return end + (len(trail) if self.text[end:].startswith(trail) else 0)


def _parts(number: int, turn: Turn) -> Iterator[tuple[int, Turn]]:
    """Yield a turn's number with each of its texts and images, as turns of its role."""
    text, spans = turn.rich.text, turn.rich.spans
    edges = {end for match in MARKER.finditer(text) for end in match.span()}
    pairs = list(pairwise(sorted({0, len(text), *edges}))) if edges else [(0, len(text))]
    lost = set(spans)
    for start, end in pairs:
        piece = text[start:end]
        if edges:
            start += len(piece) - len(piece.lstrip())
            end = start + len(piece.strip())
        if edges and start == end:
            continue
        inner = [span for span in spans if start <= span.start and span.end <= end]
        lost -= set(inner)
        moved = (span._replace(start=span.start - start, end=span.end - start) for span in inner)
        yield number, Turn(turn.role, RichText(text[start:end], tuple(moved)))
    if lost:
        name = min(lost).name
        raise ChatProblem(
            f"`{name}` covers an image and text", "write the whole text with `template`", number
        )


def find_turns(rich: RichText, roles: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield (number of a turn, start, end) of the turns in a text.

    If the template repeats or omits turns of a role, all its turns count as the role's first.
    """
    for role in dict.fromkeys(roles):
        numbers = [n for n, name in enumerate(roles) if name == role]
        spans = sorted((span.start, span.end) for span in rich.spans if span.name == role)
        numbers = numbers if len(numbers) == len(spans) else numbers[:1] * len(spans)
        for number, (start, end) in zip(numbers, spans, strict=True):
            yield number, start, end


def stand_in_chat(turns: Sequence[Turn]) -> RichText:
    """Return a placeholder for a chat's text when its template isn't available."""
    parts: list[tuple[str, RichText]] = []
    for role, rich in turns:
        parts += [("", RichText(f"\n{role}: ")), (role, rich)]
    opening = [] if turns[-1].role == ASSISTANT else [("", RichText(f"\n{ASSISTANT}:"))]
    return concatenate([*parts, *opening])


def _inner(text: str, mark: str, close: str) -> str:
    """Insert marks inside the white space at a text's ends, which templates strip."""
    core = text.strip()
    if not core:
        return mark + close + text
    start = text.index(core)
    return text[:start] + mark + core + close + text[start + len(core) :]


def _free_marks(texts: Sequence[str]) -> tuple[str, str]:
    free = [mark for mark in _MARKS if not any(mark in text for text in texts)]
    if len(free) < 2:
        raise ChatProblem("a turn contains code points that aren't characters", "remove them")
    return free[0], free[1]


def _lost(turns: Sequence[Turn], formatted: _Found, number: int | None = None) -> NoReturn:
    """Raise `ChatProblem` for a turn whose text isn't in the formatted text."""
    if number is None:
        number = next((n for n in range(len(turns)) if n not in formatted.places), None)
    role = "one turn" if number is None else f"`{turns[number].role}`"
    raise ChatProblem(
        f"the text of {role} doesn't appear in the formatted text",
        "the chat template omits the turn or changes its text; write the whole text with "
        "`template`",
        number,
    )


def _said(error: BaseException) -> str:
    """Return an exception's text on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 160 else words[:159] + "…"


# --- reading --------------------------------------------------------------------------------------


def read_chat_template(
    folder: Path, config: Mapping[str, Any], added: Mapping[str, bool]
) -> ChatTemplate | None:
    """Read the template of a folder: a separate file, or the entry of the tokenizer's config.

    config: `tokenizer_config.json`, with `special_tokens_map.json`.
    """
    text: object = None
    try:
        text = (
            (folder / CHAT_TEMPLATE_FILES[0])
            .read_bytes()[: 8 * limits.CHAT_TEMPLATE]
            .decode("utf-8", "replace")
        )
    except OSError:
        try:
            content = load_json((folder / CHAT_TEMPLATE_FILES[1]).read_text(encoding="utf-8"))
            text = cast("dict[str, Any]", content).get("chat_template")
        except (OSError, ValueError, AttributeError):
            text = None
    return parse_chat_template(config.get("chat_template") if text is None else text, config, added)


def parse_chat_template(
    template: object, config: Mapping[str, Any], added: Mapping[str, bool]
) -> ChatTemplate | None:
    """Parse a template in transformers' format: a text, or several by name with a `default`."""
    if isinstance(template, list):
        entries = [e for e in cast("list[Any]", template) if isinstance(e, dict)]
        named = {e.get("name"): e.get("template") for e in cast("list[dict[str, Any]]", entries)}
        template = named.get("default")
    elif isinstance(template, Mapping):
        template = cast("Mapping[str, Any]", template).get("default")
    if not isinstance(template, str) or not template:
        return None
    tokens: dict[str, str] = {}
    for name, entry in config.items():
        if isinstance(entry, Mapping):
            entry = cast("Mapping[str, Any]", entry).get("content")
        if name.endswith("_token") and isinstance(entry, str):
            tokens[name] = entry
    return ChatTemplate(template, tokens, dict(added))
