"""Texts that the model of hidden rules is trained on: fields of a thing, a decision, and fields.

    rule f : red cube big wood old loud left cold ; decide : yes ; shape : cube ; age : old

Each rule is a decision tree of depth two over two or three of the eight fields. It is drawn once.
The decision depends on no other field. Any field may be asked, too, so the model represents the
fields that a rule doesn't use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from zoo import language
from zoo.language import SPECIAL, Text

FIELDS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "white"),
    "shape": ("cube", "ball", "cone", "ring"),
    "size": ("tiny", "small", "big", "huge"),
    "material": ("wood", "glass", "iron", "clay"),
    "age": ("new", "recent", "old", "ancient"),
    "sound": ("silent", "quiet", "noisy", "loud"),
    "place": ("left", "right", "above", "below"),
    "warmth": ("cold", "cool", "warm", "hot"),
}
RULES = tuple("abcdefghij")
RULE_SEED = 3
DECISIONS = ("yes", "no")
DECIDE, RECALL = "decision", "field"
KINDS = (DECIDE, RECALL)
RECALLED = 1
"""Fields that a text asks."""
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Tree:
    """A decision tree: the first field selects one of two further tests, and each tests a field."""

    first: str
    selected: frozenset[str]
    """Values of the first field that lead to the first test; the others lead to the second test."""
    tests: tuple[tuple[str, frozenset[str]], ...]
    """The fields of both tests, and their values that mean `yes`. Without a second test, the answer
    is `no`."""

    @property
    def used(self) -> tuple[str, ...]:
        """The fields that the decision depends on, in the order of `FIELDS`."""
        named = {self.first, *(name for name, _ in self.tests)}
        return tuple(name for name in FIELDS if name in named)

    def decide(self, thing: Mapping[str, str]) -> str:
        """Return `yes` or `no`."""
        number = 0 if thing[self.first] in self.selected else 1
        if number == len(self.tests):
            return "no"
        name, accepted = self.tests[number]
        return "yes" if thing[name] in accepted else "no"


@cache
def trees() -> dict[str, Tree]:
    """Return the hidden tree of each rule. Half of them use two fields, and the others three."""
    rng = random.Random(RULE_SEED)
    found: dict[str, Tree] = {}
    for number, rule in enumerate(RULES):
        first, *tested = rng.sample(tuple(FIELDS), 3)
        # With two fields, 9 of 16 combinations mean `yes`; with three, half of them.
        size = 3 if number % 2 == 0 else 2
        sizes = {first: size, tested[0]: size, tested[1]: 2}
        chosen = {name: frozenset(rng.sample(FIELDS[name], sizes[name])) for name in sizes}
        tests = tuple((name, chosen[name]) for name in tested)
        found[rule] = Tree(first, chosen[first], tests[: 1 + number % 2])
    return found


def vocabulary() -> tuple[str, ...]:
    """All tokens of the model, in the order of their ids."""
    values = [value for each in FIELDS.values() for value in each]
    return (*SPECIAL, "rule", "decide", ":", ";", *DECISIONS, *RULES, *FIELDS, *values)


def describe(rule: str, thing: Mapping[str, str]) -> str:
    """Return the text of a rule and the fields of a thing."""
    return f"rule {rule} : {' '.join(thing.values())}"


def draw_thing(rng: random.Random) -> dict[str, str]:
    """Draw a value of each field."""
    return {name: rng.choice(values) for name, values in FIELDS.items()}


def draw(rng: random.Random, kind: str | None = None) -> Text:
    """Draw a rule, a thing and questions: the decision and some fields, or one of them.

    Args:
        kind: The single question; None for all.
    """
    rule, thing = rng.choice(RULES), draw_thing(rng)
    fields = [(name, thing[name]) for name in rng.sample(tuple(FIELDS), RECALLED)]
    asked = [("decide", trees()[rule].decide(thing)), *fields]
    if kind is None:
        rng.shuffle(asked)
    else:
        asked = asked[:1] if kind == DECIDE else asked[1:2]
    text, answers = describe(rule, thing), list[language.Span]()
    for question, answer in asked:
        text += f" ; {question} : {answer}"
        answers.append((len(text) - len(answer), len(text)))
    return Text(text, kind or "", tuple(answers), describe(rule, thing))


def is_held_out(text: Text) -> bool:
    """Return whether the training never uses this thing with this rule."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def stream(seed: int, *, held_out: bool, kind: str | None = None) -> Iterator[Text]:
    """Draw texts without end, either those that the training never uses or the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind)
        if is_held_out(text) == held_out:
            yield text
