"""Corruptions that insert tokens, with every type of tokenizer and in chats."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mechdsl.base.text import Source
from mechdsl.prompts.runs import RunRow
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from ..parsing import format_file, parse
from . import chats, support
from .tokenizers import KINDS, Kind

COUNT = 3
PLACES = (
    "before first token",
    "after last token",
    "before who token",
    "after who token",
    'after "went" tokens',
)
LINES = 'who in ["Mary", "John"]\ntemplate "The capital {who} and Zoë went to Paris x"\n'
WORD = " shop"


def inserted(lines: str, place: str, tokenizer: TextTokenizer) -> list[tuple[RunRow, RunRow]]:
    """Pairs of the clean row and the row with inserted tokens."""
    line = f'corrupt longer {{ insert {COUNT} tokens {place} with "{WORD}" }}'
    table = support.table(f"{lines}\n{line}", tokenizer)
    return list(zip(table.runs["clean"].rows, table.runs["longer"].rows, strict=True))


def check_row(clean: RunRow, longer: RunRow, tokenizer: TextTokenizer) -> int:
    """Check a row, and return the index of its first inserted token."""
    (span,) = (each for each in longer.spans if each.name == "inserted")
    assert longer.text[span.start : span.end] == WORD * COUNT
    assert longer.text[: span.start] + longer.text[span.end :] == clean.text
    first = next(n for n, at in enumerate(longer.offsets) if at == (span.start, span.start + 5))
    rest = longer.ids[:first] + longer.ids[first + COUNT :]
    assert rest == clean.ids
    (token,) = set(longer.ids[first : first + COUNT])
    assert tokenizer.token_text(token).strip().lower() == WORD.strip()
    assert len(longer.ids) == len(longer.offsets) == len(longer.special)
    for other in clean.spans:
        own = [each for each in longer.spans if each.name == other.name]
        texts = [longer.text[each.start : each.end] for each in own]
        assert clean.text[other.start : other.end] in [
            text.replace(WORD * COUNT, "") for text in texts
        ]
    return first


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_insertion_preserves_all_other_tokens(place: str, kind: Kind) -> None:
    tokenizer = kind.wrapped()
    ids, _ = tokenizer.continuation("to the", WORD)
    if len(ids) != 1:
        pytest.skip("the word has several tokens")
    for clean, longer in inserted(LINES, place, tokenizer):
        first = check_row(clean, longer, tokenizer)
        ends = [end for (_, end), special in zip(longer.offsets, longer.special, strict=True)
                if not special]  # fmt: skip
        assert all(a <= b for a, b in pairwise(ends))
        if place == "before first token":
            assert all(clean.special[:first])
        if place == "after last token":
            assert all(clean.special[first:])


@pytest.mark.parametrize("shape", chats.SHAPES)
def test_inserted_tokens_are_inside_their_chat_turn(shape: str) -> None:
    tokenizer = chats.tokenizer(shape)
    lines = 'x in ["plum", "fig"]\nchat { user "How many {x} is in Paris?" }'
    line = f'corrupt longer {{ insert {COUNT} tokens before x tokens with " park" }}'
    table = support.table(f"{lines}\n{line}", tokenizer)
    for clean, longer in zip(table.runs["clean"].rows, table.runs["longer"].rows, strict=True):
        (span,) = (each for each in longer.spans if each.name == "inserted")
        (turn,) = (each for each in longer.spans if each.name == "user")
        assert turn.start < span.start < span.end < turn.end
        assert len(longer.ids) == len(clean.ids) + COUNT
        assert longer.text[: span.start] + longer.text[span.end :] == clean.text


def test_two_insertions_of_one_corruption_have_two_spans() -> None:
    lines = (
        f'{LINES}corrupt longer {{ insert 1 token before who token with "{WORD}"'
        f'  insert 2 tokens after last token with "{WORD}" }}'
    )
    tokenizer = next(kind for kind in KINDS if kind.wrapped().continuation("to", WORD)[0])
    table = support.table(lines, tokenizer.wrapped())
    for clean, longer in zip(table.runs["clean"].rows, table.runs["longer"].rows, strict=True):
        sizes = [each.end - each.start for each in longer.spans if each.name == "inserted"]
        assert sizes == [len(WORD), 2 * len(WORD)]
        assert len(longer.ids) == len(clean.ids) + 3


def test_insertion_inside_a_character_is_rejected() -> None:
    tokenizer = support.byte_level()
    made, found = support.build(
        'x in ["🥝"]\ntemplate "apple {x} pear"\n'
        f'corrupt longer {{ insert 1 token after first token of x with "{WORD}" }}',
        support.wrapped(tokenizer),
    )
    assert made is None
    assert "inside of a character" in found[-1].message


@pytest.mark.parametrize(
    "line",
    [
        'insert 4 tokens before last token with " plum"',
        'insert 1 token after first token of item + 1 with " {x}"',
        'insert 20 tokens before item 2 token, last token with "a"',
    ],
)
def test_formatter_keeps_the_insert_line(line: str) -> None:
    text = f"mech 1\n\nprompts p {{\n  corrupt longer {{ {line} }}\n}}\n"
    tree, problems = parse(Source(text.replace("1 token ", "1   tokens ")))
    assert not problems
    assert format_file(tree).split() == text.split()
