"""Texts the nested model is trained on: brackets first, sentences later.

Pure Python and seeded. The formal language is shuffled Dyck: brackets of four kinds, each kind
opened and closed in order, the kinds crossing one another as they like. The sentences have verbs
that agree in number with a noun, which other nouns may separate from them:

    ( [ ) { ( ] ) }
    the dogs that the cat sees run . the key near the boxes falls .

Of a bracket text its last bracket is asked, which is the only one that closes all; of a sentence
every verb.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from zoo import language
from zoo.language import SPECIAL, Span, Text

PAIRS: tuple[tuple[str, str], ...] = (("(", ")"), ("[", "]"), ("{", "}"), ("/", "\\"))
NOUNS: tuple[tuple[str, str], ...] = (
    ("dog", "dogs"), ("cat", "cats"), ("girl", "girls"), ("boy", "boys"), ("farmer", "farmers"),
    ("teacher", "teachers"), ("bird", "birds"), ("horse", "horses"), ("doctor", "doctors"),
    ("driver", "drivers"), ("friend", "friends"), ("guard", "guards"),
)  # fmt: skip
# Singular first, as of the nouns.
INTRANSITIVE: tuple[tuple[str, str], ...] = (
    ("runs", "run"), ("sleeps", "sleep"), ("waits", "wait"), ("falls", "fall"), ("sings", "sing"),
    ("laughs", "laugh"),
)  # fmt: skip
TRANSITIVE: tuple[tuple[str, str], ...] = (
    ("sees", "see"), ("likes", "like"), ("helps", "help"), ("hears", "hear"), ("knows", "know"),
    ("finds", "find"),
)  # fmt: skip
NEAR: tuple[str, ...] = ("near", "behind", "beside")

BRACKETS = "brackets"
SIMPLE, NEARBY, EMBEDDED = "the noun before", "a noun between", "a clause between"
SENTENCES = (SIMPLE, NEARBY, EMBEDDED)
MOST_OPEN = 6
BRACKET_LENGTH = (8, 24)
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids; both stages share it."""
    tables = (PAIRS, NOUNS, INTRANSITIVE, TRANSITIVE)
    forms = [word for table in tables for pair in table for word in pair]
    return tuple(dict.fromkeys((*SPECIAL, ".", "the", "that", *NEAR, *forms)))


def brackets(rng: random.Random) -> Text:
    """Shuffled Dyck: at each place one more kind is opened, or one that is open is closed."""
    length = rng.randrange(*BRACKET_LENGTH, 2)
    open_kinds: list[int] = []
    said: list[str] = []
    while len(said) < length:
        must_close = len(open_kinds) == length - len(said)
        may_open = len(open_kinds) < MOST_OPEN and not must_close
        if open_kinds and (not may_open or rng.random() < 0.5):
            kind = open_kinds.pop(rng.randrange(len(open_kinds)))
            said.append(PAIRS[kind][1])
        else:
            open_kinds.append(rng.randrange(len(PAIRS)))
            said.append(PAIRS[open_kinds[-1]][0])
    text = " ".join(said)
    return Text(text, BRACKETS, ((len(text) - 1, len(text)),), text)


def sentence(rng: random.Random, kind: str) -> Text:
    """One sentence; its content is its nouns with their numbers, so that both are held out."""
    first, second = rng.sample(NOUNS, 2)
    n1, n2 = rng.randrange(2), rng.randrange(2)
    verb = rng.choice(INTRANSITIVE)[n1]
    asked = [verb]
    words = ["the", first[n1], verb, "."]
    if kind == NEARBY:
        words = ["the", first[n1], rng.choice(NEAR), "the", second[n2], verb, "."]
    elif kind == EMBEDDED:
        inner = rng.choice(TRANSITIVE)[n2]
        asked = [inner, verb]
        words = ["the", first[n1], "that", "the", second[n2], inner, verb, "."]
    text = " ".join(words)
    spans: list[Span] = []
    for word in asked:
        start = f" {text} ".index(f" {word} ")
        spans.append((start, start + len(word)))
    return Text(text, kind, tuple(spans), f"{first[n1]} {second[n2]}")


def sentences(rng: random.Random) -> Text:
    """Two sentences, as a text of the second stage."""
    parts = [sentence(rng, rng.choice(SENTENCES)) for _ in range(2)]
    shift = len(parts[0].text) + 1
    spans = [*parts[0].answers, *((a + shift, b + shift) for a, b in parts[1].answers)]
    content = " | ".join(part.content for part in parts)
    return Text(" ".join(p.text for p in parts), "sentences", tuple(spans), content)


def is_held_out(text: Text) -> bool:
    """Whether these brackets, or one of the pairs of nouns, are kept from training."""
    return any(language.is_held_out(part, HELD_OUT_SHARE) for part in text.content.split(" | "))


def draw(rng: random.Random, kind: str) -> Text:
    """One text of a kind; `sentences` are two, as in training."""
    if kind == BRACKETS:
        return brackets(rng)
    return sentences(rng) if kind == "sentences" else sentence(rng, kind)


def stream(seed: int, kind: str, *, held_out: bool) -> Iterator[Text]:
    """Endless texts, either only those kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind)
        if is_held_out(text) == held_out:
            yield text
