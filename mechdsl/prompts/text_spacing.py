"""The space between a prompt and the text that follows it: texts that lack it, or have two."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from mechdsl.base.names import quoted
from mechdsl.base.source import Span
from mechdsl.diagnostics.w07_data import TextSpacing
from mechdsl.prompts.tokenizer import TextTokenizer

_LAST_WORD = re.compile(r"\s[\"'“‘«(\[{]*([^\W\d_]+(?:['’-][^\W\d_]+)*)$")
"""A word at the end of a prompt: letters alone, so neither code nor an address."""
_LAST_OPERATOR = re.compile(r"\s(==?|[-=]>|→|⇒|\+|&)$")
_FIRST_WORD = re.compile(r"[^\W\d_]+")
_NUMBERED = re.compile(r"[^\W\d_]\d")
_STOPS = ",;:?!."
_UNSPACED = (
    "BOPOMOFO",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "KHMER",
    "LAO",
    "MYANMAR",
    "THAI",
    "TIBETAN",
    "YI ",
)
"""Scripts without spaces between words, as the Unicode names of their characters begin."""


@dataclass(frozen=True)
class Respelling:
    """A text with exactly one space before it, tokenised as the continuation of a prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without one for the space alone."""
    space_alone: bool
    """Whether the tokenizer gives the space a token of its own."""
    prompt_ends: bool
    """Whether the prompt has to lose the spaces at its end for that."""

    @property
    def advice(self) -> str:
        ending = "end the template without a space and " * self.prompt_ends
        spelt = quoted(f'"{self.text}"')
        return f"{ending}write {spelt}, with a leading space"


def respelling(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """A text with exactly one space between it and the prompt.

    Returns:
        None where the tokens of prompt and text are the same as without the change, where the
        vocabulary lacks them, or where the prompt ends in a line break.
    """
    before, spaced = prompt.rstrip(" "), " " + text.lstrip(" ")
    if not before or before[-1].isspace() or not spaced.strip():
        return None
    pairs = [("", prompt), (prompt, text), ("", before), (before, spaced)]
    (old, _), (own, follows), (new, _), (ids, kept) = tokenizer.continuations(pairs)
    if not kept or not ids or tokenizer.unknown_id in ids:
        return None
    if follows and (*old, *own) == (*new, *ids):
        return None
    alone = len(ids) > 1 and tokenizer.is_space(ids[0])
    return Respelling(spaced, ids[1:] if alone else ids, alone, before != prompt)


def spacing_problem(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """How a text is likely to be meant that follows a prompt with no space or with two.

    No problem are languages without spaces, texts that follow a quote, a bracket, a line break or
    a special token, code, numbers that continue, symbols that the prompt itself writes without a
    space, letters that continue a word of the prompt, and tokenizers that drop spaces. A text that
    changes the prompt's own tokens is W0703.
    """
    two = prompt.endswith(" ") and text.startswith(" ")
    if not two and not _lacks_space(prompt, text):
        return None
    own, kept = tokenizer.continuation(prompt, text)
    meant = respelling(prompt, text, tokenizer) if kept else None
    if meant is None or two or not _may_continue_word(prompt, text):
        return meant
    letter = len(text.strip()) == 1 and meant.space_alone
    return None if letter or len(meant.ids) > len(own) else meant


def single_token_spelling(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """The spelling that makes one token of a text, if the space is why it is several."""
    _, kept = tokenizer.continuation(prompt, text)
    if kept and not prompt.endswith(" "):
        meant = spacing_problem(prompt, text, tokenizer)
    else:
        meant = respelling(prompt, text, tokenizer)
    return meant if meant is not None and len(meant.ids) == 1 else None


def spacing_warnings(
    prompts: Sequence[str],
    texts: Sequence[str | None],
    tokenizer: TextTokenizer,
    span: Span,
    rows: Sequence[int],
) -> list[TextSpacing]:
    """W0705 for texts that follow prompts.

    Args:
        prompts: The prompt before each text.
        texts: The texts; None is a token given by its id.
        tokenizer: The model's.
        span: Where the texts are written.
        rows: The number of each text's row.
    """
    if tokenizer.stands_in:
        return []
    found = {
        pair: spacing_problem(*pair, tokenizer)
        for pair in dict.fromkeys((p, t) for p, t in zip(prompts, texts, strict=True) if p and t)
    }
    wrong = {pair: meant for pair, meant in found.items() if meant is not None}
    if not wrong:
        return []
    (prompt, text), first = next(iter(wrong.items()))
    pairs = zip(rows, prompts, texts, strict=True)
    return [
        TextSpacing(
            span=span,
            spaces="are two spaces" if text.startswith(" ") else "is no space",
            text=quoted(text),
            joined="…" * (len(prompt) > _SHOWN) + prompt[-_SHOWN:] + text,
            rows=len({row for row, p, t in pairs if (p, t) in wrong}),
            total=len(set(rows)),
            hint=first.advice,
        )
    ]


_SHOWN = 20
"""Characters of the prompt that a warning shows."""


def _lacks_space(prompt: str, text: str) -> bool:
    """Whether a text begins a word directly after a word, a stop or an operator of the prompt."""
    if " " not in prompt or not text[:1].isalnum() or _is_unspaced(prompt[-1] + text[0]):
        return False
    last, first = prompt[-1], text[0]
    if last.isalpha():
        word = _LAST_WORD.search(prompt)
        if word is None:
            return False
        if first.isdigit():  # not so in `item1, item2, item` and `GPT`
            return last.islower() and _NUMBERED.search(prompt) is None
        more = _FIRST_WORD.match(text)
        return more is not None and word[1] + more[0] not in prompt
    operator = _LAST_OPERATOR.search(prompt)
    symbol = operator[1] if operator is not None else last
    if (operator is None and last not in _STOPS) or _is_written_unspaced(prompt, symbol):
        return False
    if operator is not None or f"{last} " in prompt:
        return first.isupper() or last != "."
    return first.isupper() if last == "." else first.isalpha() or prompt[-2:-1].isalpha()


def _may_continue_word(prompt: str, text: str) -> bool:
    """Whether letters follow letters as they do inside a word."""
    return (
        prompt[-1].isalpha() and text[0].isalpha() and (prompt[-1].isupper() or text[0].islower())
    )


def _is_written_unspaced(prompt: str, symbol: str) -> bool:
    """Whether the prompt itself has a letter or digit directly after a symbol."""
    return re.search(re.escape(symbol) + r"[^\W_]", prompt) is not None


def _is_unspaced(characters: str) -> bool:
    """Whether any of some characters is of a script without spaces between words."""
    return any(unicodedata.name(c, "").startswith(_UNSPACED) for c in characters)
