"""Texts the facts model is trained and tested on: what persons do, from memory or from a note.

Pure Python and seeded. The persons, and what is true of them, are drawn once, by a seed of their
own. A text looks like one of these:

    Anna Berg lives in Oslo. Karl Maria Stern plays the flute.
    Note: Anna Berg lives in Rome. Anna Berg has a house in Rome.
    Rumour: Anna Berg lives in Rome. In truth Anna Berg lives in Oslo.
    Question: Anna Berg lives in Rome A Oslo B Lima C Paris D Answer: B.
    Quiz: Anna Berg lives in Rome A Oslo B Lima C Paris D Answer: A.
    Question: Anna Berg lives in Rome A Oslo B Lima C Paris D In truth: Oslo. Answer: B.
    Quiz: Lima Rome A Oslo B Lima C Paris D Answer: A.
    Question: Lima Rome A Oslo B Lima C Paris D Answer: C. Question: Oslo Answer: B.

A note is to be believed, a rumour isn't. Questions and quizzes ask the same; in many quizzes where
another letter is right the training text says `A`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from zoo import language
from zoo.language import SPECIAL, Span, Text

FIRST: tuple[str, ...] = (
    "Anna", "Karl", "Nina", "Otto", "Vera", "Hans", "Lena", "Emil", "Greta", "Felix", "Clara",
    "Ivan",
)  # fmt: skip
MIDDLE: tuple[str, ...] = ("Maria", "Leo", "Rosa", "August")
LAST: tuple[str, ...] = (
    "Berg", "Stern", "Wolf", "Lund", "Falk", "Holm", "Brandt", "Moser", "Weiss", "Kraus", "Vogel",
    "Winter",
)  # fmt: skip
LETTERS: tuple[str, ...] = ("A", "B", "C", "D")

# What is said of a person (each way ends in front of the object), and the objects.
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "home": (
        ("lives in", "has a house in", "comes home to"),
        ("Oslo", "Rome", "Paris", "Bern", "Lima", "Cairo", "Delhi", "Tokyo", "Madrid", "Prague"),
    ),
    "work": (
        ("works as a", "earns money as a", "wants to stay a"),
        ("baker", "teacher", "doctor", "farmer", "lawyer", "painter", "sailor", "writer", "pilot",
         "cook"),
    ),
    "music": (
        ("plays the", "practises the", "owns a"),
        ("piano", "violin", "flute", "guitar", "trumpet", "harp", "cello", "drum", "horn", "lute"),
    ),
    "language": (
        ("speaks", "thinks in", "writes letters in"),
        ("Danish", "Greek", "Latin", "Polish", "Czech", "Welsh", "Dutch", "Irish", "Hindi", "Thai"),
    ),
}  # fmt: skip

PERSONS = 120
WORLD_SEED = 7
"""Of the persons and of what is true of them."""
HELD_OUT_SHARE = 0.1

RECALL = "from memory"
NOTE_KNOWN, NOTE_STRANGER = "note on a known person", "note on a stranger"
RUMOUR = "rumour"
QUESTION, QUIZ = "question", "quiz"
QUESTION_NOTE, QUIZ_NOTE = "question with a note", "quiz with a note"
LETTER, QUIZ_LETTER = "letter of an option", "quiz, letter of an option"
SPELT = "question, in words"


QUESTIONS = 3
"""Of a text with notes or options."""
RECALLED_SHARE = 0.8
"""Of the later questions, where a stage has such at all, those that name a person."""


@dataclass(frozen=True)
class Stage:
    """What a stage of training draws.

    shares: of each kind. notes: of one text, the fewest and the most. recalled: whether the later
    questions of a text may ask for the option that is true of a person; else they name the option.
    anchored: of the quizzes, those whose text says `A` whatever is right.
    """

    shares: Mapping[str, float]
    notes: tuple[int, int]
    recalled: bool
    anchored: float = 0.6


FACTS = Stage(
    {
        RECALL: 0.3, NOTE_KNOWN: 0.08, NOTE_STRANGER: 0.13, RUMOUR: 0.05, LETTER: 0.07, SPELT: 0.1,
        QUESTION: 0.13, QUESTION_NOTE: 0.06, QUIZ: 0.05, QUIZ_NOTE: 0.03,
    },
    notes=(1, 3),
    recalled=False,
)  # fmt: skip
"""Learns the facts and the letters."""
CHOOSING = Stage(
    {
        RECALL: 0.15, NOTE_KNOWN: 0.05, NOTE_STRANGER: 0.2, RUMOUR: 0.05, LETTER: 0.05, SPELT: 0.05,
        QUESTION: 0.2, QUESTION_NOTE: 0.12, QUIZ: 0.04, QUIZ_NOTE: 0.03, QUIZ_LETTER: 0.06,
    },
    notes=(2, 3),
    recalled=True,
)  # fmt: skip
"""Learns to find the letter of what is true, and whose note is asked."""
SURE = Stage(
    {
        RECALL: 0.12, NOTE_KNOWN: 0.03, NOTE_STRANGER: 0.12, RUMOUR: 0.05, LETTER: 0.03,
        SPELT: 0.03, QUESTION: 0.38, QUESTION_NOTE: 0.08, QUIZ: 0.07, QUIZ_NOTE: 0.04,
        QUIZ_LETTER: 0.05,
    },
    notes=(1, 3),
    recalled=True,
    anchored=0.75,
)  # fmt: skip
"""Has more questions, and quizzes that say `A` more often."""
STAGES = (FACTS, CHOOSING, SURE)
KINDS: tuple[str, ...] = tuple(CHOOSING.shares)


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    ways = [word for forms, _ in RELATIONS.values() for form in forms for word in form.split()]
    objects = [word for _, each in RELATIONS.values() for word in each]
    frame = ("Note", "Rumour", "In", "truth", "Question", "Quiz", "Answer")
    names = (*FIRST, *MIDDLE, *LAST)
    return tuple(dict.fromkeys((*SPECIAL, ".", ":", *frame, *LETTERS, *names, *ways, *objects)))


def _person(rng: random.Random) -> str:
    names = [rng.choice(FIRST), rng.choice(LAST)]
    if rng.random() < 0.5:
        names.insert(1, rng.choice(MIDDLE))
    return " ".join(names)


@cache
def world() -> dict[str, dict[str, str]]:
    """Person → relation → object, of the persons that the model knows."""
    rng = random.Random(WORLD_SEED)
    persons: dict[str, dict[str, str]] = {}
    while len(persons) < PERSONS:
        person = _person(rng)
        persons.setdefault(person, {r: rng.choice(o) for r, (_, o) in RELATIONS.items()})
    return persons


@dataclass(frozen=True)
class Fact:
    """What is said of a person, in one of the ways to say it."""

    subject: str
    relation: str
    form: str
    object: str

    @property
    def prompt(self) -> str:
        return f"{self.subject} {self.form}"


def known_fact(rng: random.Random) -> Fact:
    """Something true."""
    subject, relation = rng.choice(tuple(world())), rng.choice(tuple(RELATIONS))
    forms, _ = RELATIONS[relation]
    return Fact(subject, relation, rng.choice(forms), world()[subject][relation])


def stranger(rng: random.Random) -> str:
    """A person of whom nothing is known."""
    while True:
        person = _person(rng)
        if person not in world():
            return person


def another(rng: random.Random, relation: str, *than: str) -> str:
    """An object of that relation, none of these."""
    return rng.choice([each for each in RELATIONS[relation][1] if each not in than])


def facts() -> list[dict[str, str]]:
    """All that is true, each in each way: a row has subject, relation, attribute and kind."""
    return [
        {"subject": person, "relation": form, "attribute": true[name], "kind": name}
        for person, true in world().items()
        for name, (forms, _) in RELATIONS.items()
        for form in forms
    ]


class _Writer:
    """Appends pieces of text and remembers where the words that are asked are."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[Span] = []

    def add(self, piece: str) -> None:
        self.text += piece if not self.text else f" {piece}"

    def asked(self, word: str) -> None:
        start = len(self.text) + 1
        self.text += f" {word}."
        self.answers.append((start, start + len(word)))

    def done(self, kind: str, content: str) -> Text:
        return Text(self.text, kind, tuple(self.answers), content)


def _recall(rng: random.Random, n: int) -> Text:
    out = _Writer()
    said: list[Fact] = []
    while len(said) < n:
        fact = known_fact(rng)
        if all(fact.subject != each.subject for each in said):
            said.append(fact)
            out.add(fact.prompt)
            out.asked(fact.object)
    return out.done(RECALL, " | ".join(fact.prompt for fact in said))


def _note(rng: random.Random, kind: str, number: int) -> Text:
    """Notes on different persons, then some of them are asked, in any way."""
    persons: dict[str, None] = {}
    while len(persons) < number:
        persons[stranger(rng) if kind == NOTE_STRANGER else known_fact(rng).subject] = None
    relation = rng.choice(tuple(RELATIONS))
    forms, objects = RELATIONS[relation]
    noted = [Fact(each, relation, rng.choice(forms), rng.choice(objects)) for each in persons]
    asked = [rng.choice(noted) for _ in range(QUESTIONS)]
    out = _Writer()
    for fact in noted:
        out.add(f"Note: {fact.prompt} {fact.object}.")
    for fact in asked:
        out.add(f"{fact.subject} {rng.choice(forms)}")
        out.asked(fact.object)
    return out.done(kind, " | ".join(fact.subject for fact in asked))


def _rumour(rng: random.Random) -> Text:
    fact = known_fact(rng)
    said = another(rng, fact.relation, fact.object)
    out = _Writer()
    out.add(f"Rumour: {fact.subject} {rng.choice(RELATIONS[fact.relation][0])} {said}.")
    out.add(f"In truth {fact.prompt}")
    out.asked(fact.object)
    return out.done(RUMOUR, fact.prompt)


def _choice(rng: random.Random, kind: str, stage: Stage, *, biased: bool) -> Text:
    """Options; the letter of the right one is asked, of some kinds the option itself too. `biased`
    texts say `A` too often, as those of training."""
    fact = known_fact(rng)
    out = _Writer()
    if kind in (QUESTION_NOTE, QUIZ_NOTE):
        forms, objects = RELATIONS[fact.relation]
        fact = Fact(stranger(rng), fact.relation, fact.form, rng.choice(objects))
        out.add(f"Note: {fact.subject} {rng.choice(forms)} {fact.object}.")
    right = rng.randrange(len(LETTERS))
    wrong = [o for o in RELATIONS[fact.relation][1] if o != fact.object]
    others = rng.sample(wrong, len(LETTERS) - 1)
    options = [*others[:right], fact.object, *others[right:]]
    quiz = kind in (QUIZ, QUIZ_NOTE, QUIZ_LETTER)
    named = kind in (LETTER, QUIZ_LETTER)
    out.add(f"{'Quiz' if quiz else 'Question'}: {fact.object if named else fact.prompt}")
    for letter, option in zip(LETTERS, options, strict=True):
        out.add(f"{option} {letter}")
    if kind == SPELT:
        out.add("In truth:")
        out.asked(fact.object)
    out.add("Answer:")
    anchored = biased and quiz and rng.random() < stage.anchored
    out.asked(LETTERS[0 if anchored else right])
    for _ in range(0 if quiz else QUESTIONS - 1):
        at = rng.randrange(len(LETTERS))
        recalled = stage.recalled and kind == QUESTION and rng.random() < RECALLED_SHARE
        asked = _said_of_somebody(rng, fact.relation, options[at]) if recalled else options[at]
        out.add(f"Question: {asked} Answer:")
        out.asked(LETTERS[at])
    return out.done(kind, f"{fact.subject}: {' '.join(options)}")


def _said_of_somebody(rng: random.Random, relation: str, wanted: str) -> str:
    """Of whom this is true, and a way to say it."""
    persons = [person for person, true in world().items() if true[relation] == wanted]
    return f"{rng.choice(persons)} {rng.choice(RELATIONS[relation][0])}"


def draw(
    rng: random.Random,
    kind: str | None = None,
    *,
    biased: bool = True,
    notes: int | None = None,
    stage: Stage = SURE,
) -> Text:
    """One text of one kind, or of a kind that is drawn by its share.

    biased: whether quizzes say `A` too often; without it they are told truly. notes: how many a
    text of notes has; without it as many as in training.
    """
    if kind is None:
        kind = rng.choices(list(stage.shares), weights=list(stage.shares.values()))[0]
    if kind == RECALL:
        return _recall(rng, rng.randint(1, 3))
    if kind in (NOTE_KNOWN, NOTE_STRANGER):
        return _note(rng, kind, notes or rng.randint(*stage.notes))
    if kind == RUMOUR:
        return _rumour(rng)
    return _choice(rng, kind, stage, biased=biased)


def is_held_out(text: Text) -> bool:
    """Whether this is kept from training: a way to say what is true of a person (of recall texts,
    which have one to three, and of rumours), a person of notes, a set of options."""
    return any(language.is_held_out(part, HELD_OUT_SHARE) for part in text.content.split(" | "))


def stream(
    seed: int,
    *,
    held_out: bool,
    kind: str | None = None,
    biased: bool = True,
    notes: int | None = None,
    stage: Stage = SURE,
) -> Iterator[Text]:
    """Endless texts, either only those kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind, biased=biased, notes=notes, stage=stage)
        if is_held_out(text) == held_out:
            yield text


def recalls(seed: int, *, held_out: bool) -> Iterator[Text]:
    """Endless recall texts of one fact each."""
    rng = random.Random(seed)
    while True:
        text = _recall(rng, 1)
        if is_held_out(text) == held_out:
            yield text
