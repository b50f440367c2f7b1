"""Positions resolved by offsets, with every type of tokenizer in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

import mechdsl
from mechdsl import cli
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from . import support
from .tokenizers import (
    BY_NAME,
    CHARACTERS,
    CORPUS,
    KINDS,
    Kind,
    byte_level,
    covered,
    is_mark,
    spelling,
    trimmed,
)

EVERY = pytest.mark.parametrize("kind", KINDS, ids=str)

PIECES = [
    *("Mary", " Mary", "the ", "Zoë", "Zoe\u0308", "café", "cafe\u0301", "naïve", "x", "y", "fig"),
    *("don't", "'t", "(x)", "(", ")", ",", ", ", "x,y", "f(x)=y", '"', "\\", "{", "}", "!", "_"),
    *("12", " 12", "7", "2024", "1,000", "3.14", "½", "ﬁ", "…", "㍿", "ß", "İ", "Ġ"),
    *("😀", "👍🏽", "👩‍👩‍👧", "❤️", "🇩🇪", "مرحبا", "مَرْحَبًا", "שלום", "東京", "한국", "हिन्दी"),
    *("🥝", "ж字", "🥦🥝", "द", "👩"),
    *(" ", "  ", "\n", "\n\n", "\t", "\u00a0", " \n"),
]
"""No piece begins with a combining mark, which would belong to the preceding letter."""
UNKNOWN = "[UNK]"
"""WordPiece's token for unknown words; it doesn't spell its text."""
PIECE = st.one_of(
    st.sampled_from(PIECES),
    st.text([c for c in CHARACTERS if c != "▁"], min_size=1, max_size=4).filter(
        lambda text: not any(map(is_mark, text))
    ),
)


def quoted(text: str) -> str:
    """A text between the quotes of the language."""
    for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(char, escape)
    return f'"{text}"'


def braced(text: str) -> str:
    """A text with braces escaped as in a template."""
    return text.replace("{", "{{").replace("}", "}}")


def prompts(kind: Kind, parts: list[tuple[str, str]], bos: bool | None = None) -> PromptTable:
    """A table of one row: (name or "", text) from left to right."""
    values = {name: text for name, text in parts if name}
    template = "".join(f"{{{name}}}" if name else braced(text) for name, text in parts)
    lines = [f"{name} in [{quoted(text)}]" for name, text in values.items()]
    made, found = support.build(
        "\n".join([*lines, f"template {quoted(template)}"]), kind.wrapped(bos)
    )
    assert made is not None, [(d.code, d.message) for d in found]
    assert made.runs["clean"].rows[0].text == "".join(text for _, text in parts)
    return made


def found(
    kind: Kind, made: PromptTable, position: str, bos: bool | None = None
) -> tuple[list[tuple[int, ...]], list[Diagnostic]]:
    """The tokens of each cell in the only row, and the diagnostics."""
    cells, diagnostics = resolve_positions(
        support.positions(position), made, "clean", tokenizer=kind.wrapped(bos)
    )
    return [tuple(p for run in cell.hits[0] for p in run) for cell in cells], diagnostics


# --- offsets --------------------------------------------------------------------------------------


@EVERY
@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(PIECE, min_size=1, max_size=6))
def test_offsets_equal_the_spelling_of_tokens(kind: Kind, pieces: list[str]) -> None:
    text = "".join(pieces)
    if UNKNOWN in spelling(kind, text) or any(token in text for token in kind.roles.values()):
        return
    encoded = kind.wrapped().encode(text)
    own = [at for at, special in zip(encoded.offsets, encoded.special, strict=True) if not special]
    assert [kind.widened(text, *trimmed(text, *at)) for at in own if text[slice(*at)].strip()] == [
        at for at in kind.tokens(text) if at[0] < at[1]
    ]


# --- positions ------------------------------------------------------------------------------------


@EVERY
@settings(max_examples=12, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.sampled_from(["", "", "a", "b"]), PIECE), min_size=1, max_size=6),
    a=PIECE,
    b=PIECE,
)
def test_position_selects_exactly_the_overlapping_tokens(
    kind: Kind, pieces: list[tuple[str, str]], a: str, b: str
) -> None:
    values = {"a": a, "b": b}
    parts = [(name, values.get(name, text)) for name, text in pieces]
    text = "".join(part for _, part in parts)
    spelt = spelling(kind, text)
    if not text.strip() or not spelt or UNKNOWN in spelt:
        return
    made = prompts(kind, parts)
    before = len(kind.opening)
    for name in {name for name, _ in parts if name}:
        ends = [sum(len(t) for _, t in parts[:n]) for n in range(len(parts) + 1)]
        spans = [(ends[n], ends[n + 1]) for n, (own, _) in enumerate(parts) if own == name]
        tokens = [kind.overlapping(text, *span) for span in spans]
        hits, said = found(kind, made, f"{name} tokens")
        if not all(tokens):
            assert [d.code for d in said] == ["E0312"]
            continue
        assert hits == [tuple(before + t for t in sorted({t for own in tokens for t in own}))]
        beside = [t for own, span in zip(tokens, spans, strict=True)
                  for t in kind.beside(text, *span, own)]  # fmt: skip
        assert [d.code for d in said] == ["W0701"] * bool(beside)
        for edge, at in (("first", 0), ("last", -1)):
            for n in (0, -1):
                which = "first" if n == 0 else "last"
                hits, said = found(kind, made, f"{edge} token of {which}-{name}")
                assert hits == [(before + tokens[n][at],)]
                beside = kind.beside(text, *spans[n], [tokens[n][at]])
                assert [d.code for d in said] == ["W0701"] * bool(beside)
        hits, said = found(kind, made, f"{name} token")
        if len(spans) > 1:
            assert [d.code for d in said] == ["E0306"]
            continue
        last = tokens[0][-1]
        assert hits == [(before + last,)]
        hits, said = found(kind, made, f"{name} token + 1")
        if last + 1 < len(spelt):
            assert hits == [(before + last + 1,)]
        else:
            assert "E0310" in {d.code for d in said}
        hits, said = found(kind, made, f"tokens except {name} tokens")
        first = next(n for n, (a, b) in enumerate(covered(kind, text, spelt)) if a < b)
        others = tuple(before + n for n in range(first, len(spelt)) if n not in tokens[0])
        assert (hits == [others]) if others else ("E0315" in {d.code for d in said})


@EVERY
@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(PIECE, min_size=1, max_size=6))
def test_first_and_last_token_are_those_of_the_text(kind: Kind, pieces: list[str]) -> None:
    text = "".join(pieces)
    spelt = spelling(kind, text)
    if not text.strip() or not spelt or UNKNOWN in spelt:
        return
    # Tokens that the tokenizer prepends don't belong to the text.
    first = next(n for n, (a, b) in enumerate(covered(kind, text, spelt)) if a < b)
    made = prompts(kind, [("", text)])
    before = len(kind.opening)
    assert found(kind, made, "first token")[0] == [(before + first,)]
    assert found(kind, made, "last token")[0] == [(before + len(spelt) - 1,)]


LIST = """
  item in ["Zoë", "don't", "12", "東京", "🥝", "Mary", "(x)", "مرحبا"]
  n in 3..4
  xs = list(item, n, sep: ", ", last: " and ")
  template "The {xs}. Total:"
  corrupt fewer { n = n - 1 }
"""


@EVERY
@pytest.mark.parametrize("run", ["clean", "fewer"])
def test_item_positions_select_tokens_of_list_items(kind: Kind, run: str) -> None:
    made = support.table(LIST, kind.wrapped(), limit=12)
    before = len(kind.opening)
    first, last, second, *each = (
        cell
        for position in ("first-item token", "last-item token", "item 2 tokens", "each item tokens")
        for cell in support.cells(position, made, kind.wrapped(), run)
    )
    separators = support.cells("each sep of xs token", made, kind.wrapped(), run)
    for n, row in enumerate(made.runs[run].rows):
        items: list[str] = row.values["xs"]
        assert row.text == f"The {', '.join(items[:-1])} and {items[-1]}. Total:"
        if UNKNOWN in spelling(kind, row.text):
            continue
        spans: list[tuple[int, int]] = []
        at = 4
        for k, item in enumerate(items):
            spans.append((at, at + len(item)))
            at += len(item) + (2 if k < len(items) - 2 else 5)
        assert [row.text[a:b] for a, b in spans] == items
        tokens = [tuple(before + t for t in kind.overlapping(row.text, *s)) for s in spans]
        assert first.hits[n] == (tokens[0][-1:],)
        assert last.hits[n] == (tokens[-1][-1:],)
        assert second.hits[n] == (tokens[1],)
        assert [cell.hits[n] for cell in each[: len(items)]] == [(own,) for own in tokens]
        assert not any(cell.hits[n] for cell in each[len(items) :])
        between = [kind.overlapping(row.text, b, a) for (_, b), (a, _) in pairwise(spans)]
        assert [cell.hits[n] for cell in separators[: len(between)]] == [
            ((before + own[-1],),) for own in between
        ]


COLUMNS = [
    ("The café of Zoë (x) is in 東京", "Zoë"),
    ("f(x)=y, isn't it? [x]", "x"),
    ("I don't know Mary's  name", "don't"),
    ("مرحبا بالعالم، كيف حالك", "بالعالم"),
    ("שלום עולם, מה שלומך", "עולם"),
    ("in 2024, 20 years", "20"),
    ("Zoe\u0308 and Zoe", "Zoe"),
    ("👩‍👩‍👧 and 👩", "👩"),
]


@EVERY
def test_column_span_selects_tokens_of_each_occurrence(kind: Kind, tmp_path: Path) -> None:
    records = [{"prompt": prompt, "subject": subject} for prompt, subject in COLUMNS]
    (tmp_path / "d.json").write_text(json.dumps(records))
    made = support.table(
        'rows "d.json" template "{prompt}" span subject in prompt',
        kind.wrapped(),
        path=tmp_path / "f.mech",
    )
    (first,) = support.cells("first-subject token", made, kind.wrapped())
    (every,) = support.cells("subject tokens", made, kind.wrapped())
    places = {"Zoë": [12], "x": [2, 19], "don't": [2], "بالعالم": [6], "עולם": [5], "20": [9]}
    places |= {"Zoe": [9], "👩": [10]}
    for n, row in enumerate(made.runs["clean"].rows):
        subject = row.values["subject"]
        spans = [(at, at + len(subject)) for at in places[subject]]
        tokens = [kind.overlapping(row.text, *span) for span in spans]
        before = len(kind.opening)
        assert first.hits[n] == ((before + tokens[0][-1],),)
        assert every.hits[n] == (tuple(sorted({before + t for own in tokens for t in own})),)


@EVERY
def test_literal_position_selects_its_tokens(kind: Kind) -> None:
    text = 'Mary said "Mary\'s (x)", Maryland x,y: Answer 2024\nAnswers'
    made = prompts(kind, [("", text)])
    before = len(kind.opening)
    for part, at in (("Mary", 11), ("x", 33), ("(x)", 18), ("Answer", 38), ("20", 45), ("said", 5)):
        assert text[at : at + len(part)] == part
        tokens = kind.overlapping(text, at, at + len(part))
        assert found(kind, made, f'"{part}" token')[0] == [(before + tokens[-1],)]
        assert found(kind, made, f'"{part}" tokens')[0] == [tuple(before + t for t in tokens)]


# --- manual references ----------------------------------------------------------------------------

SENTENCE = [
    ("", "The capital of "),
    ("a", "Zoë"),
    ("", " ("),
    ("b", "x"),
    ("", ") is "),
    ("c", "don't"),
    ("", ", "),
    ("d", "2024"),
    ("e", "🥝"),
    ("", ": "),
    ("f", "Zoe\u0308"),
]
SPLIT: dict[str, dict[str, list[str]]] = {
    # Text of each token; a character split over several tokens is repeated for each.
    "gpt2": {
        "a": ["Zoë"],
        "b": ["x"],
        "c": ["don", "'t"],
        "d": ["2024"],
        "e": ["🥝", "🥝", "🥝"],
        "f": ["Zoe", "\u0308"],
    },
    "qwen": {"b": ["x"], "d": ["2", "0", "2", "4"], "f": ["Zoe"]},
    "llama3": {"b": ["x"], "d": ["202", "4"], "e": ["🥝", "🥝", "🥝"]},
    "llama2": {
        "a": ["Zo", "ë", "ë"],
        "b": ["(x)"],
        "c": ["don't"],
        "d": ["2024"],
        "e": ["🥝", "🥝", "🥝", "🥝"],
        "f": ["Zoe\u0308"],
    },
    "bert": {"a": ["Zoë"], "b": ["x"], "c": ["don", "'", "t"], "f": ["Zoe"]},
}
SPLIT["gpt2-trimmed"] = SPLIT["roberta"] = SPLIT["gpt2"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in SPLIT], ids=str)
@pytest.mark.parametrize("bos", [None, True, False])
def test_position_selects_tokens_with_the_listed_texts(kind: Kind, bos: bool | None) -> None:
    if bos and "bos" not in kind.roles:
        return
    made = prompts(kind, SENTENCE, bos)
    row = made.runs["clean"].rows[0]
    for name, texts in SPLIT[kind.name].items():
        (hits,), _ = found(kind, made, f"{name} tokens", bos)
        assert [row.text[slice(*row.offsets[p])].strip() for p in hits] == texts
        (last,), _ = found(kind, made, f"{name} token", bos)
        assert last == hits[-1:]
        (behind,), _ = found(kind, made, f"{name} token - 1", bos)
        assert behind == (hits[-1] - 1,)


def test_character_of_several_tokens_is_selected_as_a_whole() -> None:
    kind = BY_NAME["gpt2"]
    made = prompts(kind, [("", "a "), ("w", "🥝"), ("", "b")])
    assert spelling(kind, "a 🥝b") == ["a", "Ġ", "ðŁ", "¥", "Ŀ", "b"]
    assert found(kind, made, "w tokens") == ([(2, 3, 4)], [])
    assert found(kind, made, "w token") == ([(4,)], [])
    assert found(kind, made, "w token + 1") == ([(5,)], [])
    assert found(kind, made, "each token of w") == ([(2,), (3,), (4,)], [])
    assert found(kind, made, '"🥝" token') == ([(4,)], [])


def test_token_with_parts_of_two_characters_is_warned_about() -> None:
    kind = BY_NAME["gpt2"]
    assert spelling(kind, "x दद y") == ["x", "Ġà¤", "¦à¤¦", "Ġy"]
    made = prompts(kind, [("", "x "), ("v", "द"), ("w", "द"), ("", " y")])
    for position, hits in (("v tokens", (1, 2)), ("v token", (2,)), ("w tokens", (2,))):
        (own,), (warning,) = found(kind, made, position)
        assert own == hits
        assert warning.code == "W0701"
        assert warning.label_text == "`दद`, in 1 of 1 rows"
    assert found(kind, made, "first token of v") == ([(1,)], [])


@pytest.mark.parametrize(
    ("name", "parts", "covers"),
    [
        ("qwen", [("", "f"), ("", "("), ("w", "x"), ("", ")")], "(x"),  # begins inside
        ("qwen", [("", "f"), ("w", "("), ("", "x)")], "(x"),  # ends inside
        ("llama3", [("", "f(x)=y x"), ("w", ","), ("", "y")], ",y"),
        ("llama3", [("", "in "), ("w", "20"), ("", "24")], "202"),
        ("llama2", [("", "f("), ("w", "x"), ("", ")=y")], "f(x)"),
        ("llama2", [("", "I "), ("w", "don"), ("", "'t know")], "don't"),
        ("llama2", [("", "I "), ("", "don"), ("w", "'t"), ("", " know")], "don't"),
        ("gemma", [("", "f("), ("w", "x"), ("", ")=y")], "f(x)"),
        ("gpt2", [("", "the "), ("w", "cap"), ("", "ital")], "capital"),
        ("bert", [("", "The "), ("w", "cap"), ("", "ital")], "capital"),
        ("xlnet", [("", "f("), ("w", "x"), ("", ")=y")], "(x)"),
    ],
)
def test_token_that_covers_adjacent_text_is_named_in_a_warning(
    name: str, parts: list[tuple[str, str]], covers: str
) -> None:
    kind = BY_NAME[name]
    made = prompts(kind, parts)
    for position in ("w token", "w tokens", "first token of w", "each token of w"):
        (_,), (warning,) = found(kind, made, position)
        assert warning.code == "W0701"
        assert warning.severity == "warning"
        assert warning.message == "tokens of `w` also cover adjacent text"
        assert warning.label_text == f"`{covers}`, in 1 of 1 rows"
        assert warning.help_text


def test_unknown_word_is_one_token_and_warned_about() -> None:
    kind = BY_NAME["bert"]
    made = prompts(kind, [("", "fig x🥝"), ("w", "x"), ("", " y")])
    hits, (warning,) = found(kind, made, "w token")
    assert [kind.wrapped().token_text(made.runs["clean"].rows[0].ids[p]) for (p,) in hits] == [
        UNKNOWN
    ]
    assert warning.label_text == "`x🥝x`, in 1 of 1 rows"


@pytest.mark.parametrize(
    ("name", "parts", "token"),
    [
        # A separate space token before each word; it covers no character of the text.
        ("t5", [("", "Mary "), ("w", "ж"), ("", " gave")], "<unk>"),
        ("t5", [("", "Mary\n"), ("w", "ж"), ("", " gave")], "<unk>"),
        # At the start of the text, and after special tokens.
        ("llama2", [("w", "ж"), ("", " gave")], "<0xD0>"),
        ("llama2", [("", "Mary</s>"), ("w", "ж"), ("", " gave")], "<0xD0>"),
        ("xlnet", [("", "Mary</s>"), ("w", "(x)"), ("", " gave")], "(x)"),
        ("gpt2-prefixed", [("w", "ж"), ("", " gave")], "Ð"),
        ("gpt2-prefixed", [("", "Mary<|endoftext|>"), ("w", "ж"), ("", " gave")], "Ð"),
    ],
)
def test_inserted_space_token_is_outside_the_span(
    name: str, parts: list[tuple[str, str]], token: str
) -> None:
    kind = BY_NAME[name]
    made = prompts(kind, parts)
    row = made.runs["clean"].rows[0]
    backend = kind.backend()
    (first,), _ = found(kind, made, "first token of w")
    (tokens,), _ = found(kind, made, "w tokens")
    assert backend.id_to_token(row.ids[first[0]]) == token
    assert tokens[:1] == first
    assert backend.id_to_token(row.ids[first[0] - 1]) in ("▁", "Ġ")


# --- literal texts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part", "at"),
    [
        ("cafe and cafe\u0301", "cafe", 0),  # the second has an accent
        ("Zoe and Zoe\u0308.", "Zoe", 0),
        ("👩 and 👩‍👩‍👧", "👩", 0),
        ("👧 and 👩‍👩‍👧", "👧", 0),
        ("👍 and 👍🏽", "👍", 0),
        ("\u2764 and \u2764\ufe0f", "\u2764", 0),
        ("क and कि", "क", 0),
        ("مرحب and مرحبًا", "مرحب", 0),
        ("می and می‌خواهم", "می", 0),
        ("t and e\u0301t", "t", 0),
        ("Mary and Maryland, Mary's", "Mary", 19),
        ("x and f(x)", "x", 8),
        ("only cafe\u0301", "cafe", 5),  # where there is no other
        ("xx x x", "x x", 3),
    ],
)
def test_literal_matches_whole_words_and_characters(text: str, part: str, at: int) -> None:
    kind = BY_NAME["gpt2"]
    made = prompts(kind, [("", text)])
    (hits,), _ = found(kind, made, f'"{part}" tokens')
    assert hits == kind.overlapping(text, at, at + len(part))


# --- special tokens -------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_setting_adds_or_removes_the_bos_token(kind: Kind, bos: bool | None) -> None:
    own = kind.roles.get("bos")
    if bos and own is None:
        made, (error,) = TextTokenizer.from_backend(kind.backend(), bos=True)
        assert made is None
        assert error.code == "E0522"
        return
    opening = [token for token in kind.opening if token != own]
    if bos or (bos is None and own in kind.opening):
        opening.insert(0, own or "")
    parts = [part for part in SENTENCE if part[0] != "e"]  # not in every vocabulary
    text = "".join(text for _, text in parts)
    backend, tokenizer = kind.backend(), kind.wrapped(bos)
    encoded = tokenizer.encode(text)
    inner = backend.encode(text, add_special_tokens=False).ids
    outer = [[backend.token_to_id(t) for t in tokens] for tokens in (opening, kind.closing)]
    assert list(encoded.ids) == [*outer[0], *inner, *outer[1]]
    flags = [True] * len(opening) + [False] * len(inner) + [True] * len(kind.closing)
    assert list(encoded.special) == flags
    there = bool(opening) and opening[0] == own
    assert tokenizer.bos_convention().startswith(
        f"`{own}` before the text" if there else "none before the text"
    )
    # All positions follow.
    made = prompts(kind, parts, bos)
    at = 0
    for name, part in parts:
        if name:
            tokens = kind.overlapping(text, at, at + len(part))
            (hits,), _ = found(kind, made, f"{name} tokens", bos)
            assert hits == tuple(len(opening) + t for t in tokens)
        at += len(part)
    assert found(kind, made, "last token", bos)[0] == [(len(opening) + len(inner) - 1,)]
    if there:
        assert found(kind, made, "bos token", bos) == ([(0,)], [])
    else:
        assert [d.code for d in found(kind, made, "bos token", bos)[1]] == ["E0313"]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("roberta", {"cls": 0, "sep": -1}),
        ("bert", {"cls": 0, "sep": -1}),
        ("xlnet", {"sep": -2, "cls": -1}),
    ],
)
def test_special_tokens_are_selected_by_role(name: str, places: dict[str, int]) -> None:
    kind = BY_NAME[name]
    made = prompts(kind, SENTENCE)
    size = len(made.runs["clean"].rows[0].ids)
    for role, at in places.items():
        assert found(kind, made, f"{role} token") == ([(range(size)[at],)], [])
    assert [d.code for d in found(kind, made, "cls token - 1")[1]] == ["E0310"]


def test_special_token_within_the_text_is_selected_as_a_literal() -> None:
    kind = BY_NAME["roberta"]
    made = prompts(kind, [("", "The capital of "), ("w", "Zoë"), ("", " is <mask>.")])
    (mask,), _ = found(kind, made, '"<mask>" token')
    assert kind.wrapped().token_text(made.runs["clean"].rows[0].ids[mask[0]]) == "<mask>"
    (last,), _ = found(kind, made, "last token")
    assert last == (mask[0] + 1,)


# --- answers --------------------------------------------------------------------------------------

NUMBERS = 'n in [7, 12, 345, 2024] template "Count {n}:" answer " {n}"'


@pytest.mark.parametrize(
    ("name", "moved", "spelt"),
    [
        # A space and each digit; a space and up to three digits; whole numbers.
        ("qwen", " ", {7: ["7"], 12: ["1", "2"], 345: ["3", "4", "5"], 2024: ["2", "0", "2", "4"]}),
        ("llama3", " ", {7: ["7"], 12: ["12"], 345: ["345"], 2024: ["202", "4"]}),
        ("gpt2-prefixed", "", {7: [" 7"], 12: [" 12"], 345: [" 345"], 2024: [" 2024"]}),
        ("bert", "", {7: ["7"], 12: ["12"], 345: ["345"], 2024: ["2024"]}),
    ],
)
def test_answer_tokens_continue_the_prompt(
    name: str, moved: str, spelt: dict[int, list[str]]
) -> None:
    kind = BY_NAME[name]
    tokenizer = kind.wrapped()
    made = support.table(NUMBERS, tokenizer)
    assert made.moved_text == moved
    for row in made.runs["clean"].rows:
        n = row.values["n"]
        assert row.text == f"Count {n}:{moved}"
        assert [tokenizer.token_text(i) for i in row.texts["answer"].ids] == spelt[n]
        whole = kind.backend().encode(f"Count {n}: {n}").ids
        closing = len(kind.closing)
        prompt = row.ids[: len(row.ids) - closing]
        assert [*prompt, *row.texts["answer"].ids] == whole[: len(whole) - closing]
    (last,) = support.cells("last token", made, tokenizer)
    for row, ((at,),) in zip(made.runs["clean"].rows, last.hits, strict=True):
        assert at == len(row.ids) - len(kind.closing) - 1
        assert row.text[slice(*row.offsets[at])] == (moved or ":")


@EVERY
@settings(max_examples=15, deadline=None)
@given(
    prompt=st.lists(PIECE, min_size=1, max_size=3),
    answers=st.lists(PIECE, min_size=1, max_size=3, unique=True),
)
def test_prompt_and_answer_tokens_equal_those_of_the_whole_text(
    kind: Kind, prompt: list[str], answers: list[str]
) -> None:
    text = "The " + "".join(prompt)
    listed = ", ".join(quoted(a) for a in answers)
    made, said = support.build(
        f"w in [{listed}] template {quoted(braced(text))} answer {quoted('{w}')}", kind.wrapped()
    )
    if made is None:
        errors = {d.code for d in said if d.severity == "error"}
        assert errors <= {"E0519", "E0524"}  # unknown, or no token to measure
        return
    apart = {d.code for d in said} & {"W0703"}
    closing = len(kind.closing)
    same = True
    for row in made.runs["clean"].rows:
        whole = kind.backend().encode(text + row.values["w"]).ids
        ids = [*row.ids[: len(row.ids) - closing], *row.texts["answer"].ids]
        same = same and ids == whole[: len(whole) - closing]
        assert row.texts["answer"].ids
    assert same or apart


# --- slow tokenizers ------------------------------------------------------------------------------

FILE = """\
mech 1

model toy = local("model")

prompts p {
  w in ["Mary", "John"]
  template "The {w} is"
  answer " {w}"
}

experiment e {
  model toy
  prompts p
  measure logprob(answer) as raw
}
"""


def _vocabulary(folder: Path) -> None:
    BY_NAME["gpt2"].backend().model.save(str(folder))  # vocab.json, merges.txt
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def _word_pieces(folder: Path) -> None:
    BY_NAME["bert"].backend().model.save(str(folder))  # vocab.txt
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def _sentence_pieces(folder: Path, name: str, kind: str, tokenizer_class: str) -> None:
    import sentencepiece

    lines = [line.strip() for line in CORPUS if line.strip()]
    with (folder / name).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=480,
            model_type=kind,
            character_coverage=1.0,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    config = {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SLOW: dict[str, Callable[[Path], None]] = {
    "vocab.json": _vocabulary,
    "vocab.txt": _word_pieces,
    "spiece.model": lambda f: _sentence_pieces(f, "spiece.model", "unigram", "T5Tokenizer"),
    "tokenizer.model": lambda f: _sentence_pieces(f, "tokenizer.model", "bpe", "LlamaTokenizer"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config and no tokenizer, and a file that uses it."""
    folder = tmp_path / "model"
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=800, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(folder)
    (tmp_path / "file.mech").write_text(FILE)
    return folder


def validated(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of `mechdsl validate` for the file next to a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mechdsl", "validate", str(folder.parent / "file.mech")])
        patch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as done:
            cli.main()
    return int(done.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("name", SLOW)
def test_slow_tokenizer_is_rejected_until_converted(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SLOW[name](model)
    status, shown = validated(model, capsys)
    assert status == 2
    assert "error[E0508]: the tokenizer of `model` can't be read" in shown
    assert f"there is no `tokenizer.json` in the folder, only `{name}`" in shown
    advice = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    assert advice in shown.partition("= help: ")[2]
    with pytest.raises(mechdsl.MechdslError) as refused:
        mechdsl.run(model.parent / "file.mech")
    assert [d.code for d in refused.value.diagnostics] == ["E0508"]
    # The file is valid after the conversion that the help line suggests.
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(model)
    status, shown = validated(model, capsys)
    assert status == 0, shown


@pytest.mark.parametrize(
    ("name", "like"), [("spiece.model", "t5"), ("tokenizer.model", "metaspace-first")]
)
def test_converted_sentencepiece_model_has_correct_positions(
    name: str, like: str, model: Path
) -> None:
    """Normalisation and spaces are those that transformers converts."""
    SLOW[name](model)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(model)
    shape = BY_NAME[like]
    kind = replace(
        shape, train=lambda: Tokenizer.from_file(str(model / "tokenizer.json")), roles={}
    )
    for w in ("ﬁne ½", "Zoe\u0308", "x,y", "👍🏽", "مرحبا", "2024", "ж"):
        parts = [("", "Mary ("), ("v", "x"), ("", ")\tof  "), ("w", w), ("", "."), ("a", "d")]
        text = "".join(part for _, part in parts)
        made = prompts(kind, parts)
        at = 0
        for own, part in parts:
            if own:
                tokens = kind.overlapping(text, at, at + len(part))
                (hits,), said = found(kind, made, f"{own} tokens")
                assert hits == tokens
                assert [d.code for d in said] == ["W0701"] * bool(
                    kind.beside(text, at, at + len(part), tokens)
                )
            at += len(part)


@pytest.mark.parametrize("slow", [transformers.ByT5Tokenizer, object], ids=["byt5", "object"])
def test_slow_tokenizer_passed_from_python_is_rejected(slow: Callable[[], object]) -> None:
    with pytest.raises(mechdsl.MechdslError) as refused:
        mechdsl.run(FILE, models={"toy": (None, slow())})
    error = refused.value.diagnostics[0]
    assert error.code == "E0412"
    assert "has no tokenizer that gives character offsets" in error.message
    assert f"`{slow.__name__}` is not a fast tokenizer" in error.label_text
    assert "fast tokenizer" in error.help_text


def words_tokenizer(
    *added: AddedToken,
    then: object = pre_tokenizers.Punctuation(),
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Whole words and signs between white space, as the models of the zoo read them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), then])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.WordLevelTrainer(
        vocab_size=900, special_tokens=[UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def with_added(*added: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize(
    "backend",
    [
        *(kind.backend() for kind in KINDS),
        words_tokenizer(),
        words_tokenizer(AddedToken("is Paris")),
        words_tokenizer(then=pre_tokenizers.Metaspace(prepend_scheme="first")),
        words_tokenizer(normalizer=normalizers.Prepend("x")),
        with_added(AddedToken("<cut>", rstrip=True)),
        with_added(AddedToken("is Paris"), AddedToken("<cut>", lstrip=True)),
    ],
    ids=[
        *map(str, KINDS),
        *("words", "words-joined", "words-metaspace", "words-prepended"),
        *("rstrip", "joined-lstrip"),
    ],
)
def test_continuation_has_the_tokens_of_the_whole_text(
    backend: Tokenizer, bos: bool | None
) -> None:
    """Also for words after a space, which aren't tokenised with each prompt."""
    if bos and backend.token_to_id("<|endoftext|>") is None:
        pytest.skip("no beginning-of-sequence token")
    tokenizer = support.wrapped(backend, bos=bos, bos_token="<|endoftext|>")
    prompts = [
        "The capital is",
        "is<cut>",
        "x,",
        "é",
        " ",
        "a ",
        "a\u00a0",
        "\x1c",
        "",
        "<|endoftext|>",
    ]
    texts = [
        " Paris",
        " Paris, France",
        " 12",
        " <cut>",
        "  x",
        " \n",
        " ",
        "Paris",
        "\x1cx",
        " don't",
    ]
    pairs = [(prompt, text) for prompt in prompts for text in texts]
    for pair, (ids, kept) in zip(pairs, tokenizer.continuations(pairs), strict=True):
        before, whole = (backend.encode(each) for each in (pair[0], pair[0] + pair[1]))
        text = [n for n, s in zip(whole.ids, whole.special_tokens_mask, strict=True) if not s]
        prompt = [n for n, s in zip(before.ids, before.special_tokens_mask, strict=True) if not s]
        if kept:
            assert [*prompt, *ids] == text, pair
        else:
            assert text[: len(prompt)] != prompt or not prompt, pair
