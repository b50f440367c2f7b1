"""Texts the names model is trained and tested on: indirect objects and coloured objects.

Pure Python and seeded. A text looks like one of these (the words behind the last "to" are asked, or
the colour):

    When Mary and John went to the shop, John gave a bag to Mary.
    When Mary and Tom met at the park, and Mary showed a ring to Tom. Tom was tired. When Mary and
    John went to the shop, John gave a bag to Mary.
    Tom was tired. When Mary and John went to the shop, Anna gave a bag to John.
    When Mary Smith and John Brown went to the shop, Brown gave a bag to Mary Smith.
    On the table there is a red pencil, a blue bag and a green cup. What colour is the bag?
    Answer: blue.

In front there may be other sentences, up to three, some of which are finished stories about the two
or about others: how often somebody is named, and where, doesn't tell who gets something. Without
them a model learns to count names, in one layer, and needs nothing else. In the third text the
giver is a third person, and either of the two may get it: half of the texts say the one, half the
other. In the fourth who gives is named by the family name, which is drawn anew for every text:
taking the giver's name off the names of the two doesn't give the answer, as it isn't the name that
is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from zoo import language
from zoo.language import SPECIAL, Span, Text

NAMES: tuple[str, ...] = (
    "Mary", "John", "Tom", "Anna", "Luke", "James", "Dan", "Martin", "Amy", "Laura",
    "Peter", "Paul", "Sarah", "Emma", "David", "Simon", "Alice", "Kate", "Mark", "Jane",
    "Robert", "Lucy", "Henry", "Julia", "Frank", "Helen", "George", "Rose", "Jack", "Ruth",
    "Adam", "Clara", "Oscar", "Nina", "Victor", "Sophie", "Max", "Olivia", "Leo", "Grace",
    "Arthur", "Ella", "Felix", "Maria", "Hugo", "Diana", "Ivan", "Carol", "Walter", "Susan",
    "Philip", "Linda", "Stephen", "Karen", "Andrew", "Rachel", "Kevin", "Megan", "Ryan", "Lisa",
)  # fmt: skip
ROLES: tuple[str, ...] = (
    "baker", "pilot", "teacher", "doctor", "farmer", "lawyer", "painter", "sailor", "writer",
    "cook", "nurse", "judge", "singer", "driver", "builder", "waiter", "miner", "actor",
    "clerk", "guard",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "shop", "park", "school", "store", "office", "station", "market", "library", "garden", "museum",
    "beach", "hospital", "restaurant", "house", "church", "theatre",
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "bag", "book", "ring", "ball", "drink", "key", "pen", "letter", "cup", "hat",
    "coin", "map", "lamp", "watch", "flower", "basket",
)  # fmt: skip
COLOURS: tuple[str, ...] = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "grey",
)  # fmt: skip
OBJECTS: tuple[str, ...] = (*THINGS, "pencil", "plate", "spoon", "box", "bottle", "scarf")
SURFACES: tuple[str, ...] = ("table", "desk", "floor", "shelf")

# `a` and `b` are the two in the order of the text, `s` is who gives.
TEMPLATES: tuple[str, ...] = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} handed a {thing} to",
    "While {a} and {b} were at the {place}, {s} passed a {thing} to",
    "Then {a} and {b} had a long talk at the {place}. Later {s} gave a {thing} to",
    "{a} and {b} found a {thing} at the {place}. {s} gave it to",
    "{a} and {b} met at the {place}, and {s} showed a {thing} to",
    "{a} went to the {place} with {b}. Later {s} bought a {thing} and gave it to",
    "When {a} got a {thing} at the {place}, {b} was there too. In the end {s} handed it to",
    "{a} was at the {place}. After a long time {b} came too. {s} gave a {thing} to",
    "The {place} was closed, so {a} and {b} went home, where {s} gave a {thing} to",
)
# `x` is one of the two, or somebody else.
OPENINGS: tuple[str, ...] = ("It was late.", "{x} was tired.", "In the morning {x} was cold.")
STORY_SHARE = 0.6  # of the sentences in front; the others are openings
MOST_IN_FRONT = 3
LATER = "Later {s} gave a {thing} to"
MOST_LATER = 2
WHO = "There were {listed}."
LISTED = (4, 7)  # persons
WHO_QUESTIONS = 8
NAMED = ("It was {role}", "{role} is")
COLOURED = "Colours on the {surface}: {o1} {c1}, {o2} {c2} and {o3} {c3}."
ASKED = ("What colour is the {asked}? Answer:", "The {asked} is")

IOI_FIRST, IOI_SECOND = "indirect object first", "indirect object second"
ROLE_FIRST, ROLE_SECOND = "by profession: first", "by profession: second"
EITHER, WHO_IS_WHO = "a third person gives", "who is who"
COLOUR = "coloured objects"
KINDS: dict[str, float] = {
    IOI_FIRST: 0.13,
    IOI_SECOND: 0.13,
    ROLE_FIRST: 0.15,
    ROLE_SECOND: 0.15,
    EITHER: 0.08,
    WHO_IS_WHO: 0.16,
    COLOUR: 0.2,
}
"""The share of each in training."""
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    frames = " ".join((*TEMPLATES, *OPENINGS, LATER, WHO, *NAMED, COLOURED, *ASKED)).translate(
        str.maketrans(",.?:", "    ")
    )
    plain = [word for word in frames.split() if "{" not in word]
    lists = (NAMES, ROLES, PLACES, THINGS, OBJECTS, COLOURS, SURFACES)
    named = [word for each in lists for word in each]
    return tuple(dict.fromkeys((*SPECIAL, ",", ".", "?", ":", *plain, *named)))


def finished(pieces: list[tuple[str, str]], kind: str, content: str) -> Text:
    """Prompts with their answers, whose words are asked, and full stops."""
    text, spans = "", list[Span]()
    for prompt, answer in pieces:
        text = f"{text} {prompt}" if text else prompt
        for word in answer.split():
            start = len(text) + 1
            text = f"{text} {word}"
            spans.append((start, start + len(word)))
        text += "."
    return Text(text, kind, tuple(spans), content)


def is_held_out(text: Text) -> bool:
    """Whether this pair of persons, or this set of coloured objects, is kept from training."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


@dataclass(frozen=True)
class Person:
    """Somebody as a text first names them, and as it names them when they give something."""

    first: str
    full: str
    giving: str


def draw_people(rng: random.Random, number: int, *, roles: bool) -> list[Person]:
    """Different persons."""
    firsts = rng.sample(NAMES, number)
    if not roles:
        return [Person(first, first, first) for first in firsts]
    known = zip(firsts, rng.sample(ROLES, number), strict=True)
    return [Person(first, f"the {role} {first}", f"the {role}") for first, role in known]


def draw_names(rng: random.Random, kind: str, *, most_in_front: int) -> Text:
    """Who gets something: the one of the two who doesn't give, or either of them."""
    roles = kind in (ROLE_FIRST, ROLE_SECOND)
    people = draw_people(rng, 4, roles=roles)
    receiver, other, third, _ = people
    first = kind in (IOI_FIRST, ROLE_FIRST) or (kind == EITHER and rng.random() < 0.5)
    a, b = (receiver, other) if first else (other, receiver)
    giver = third if kind == EITHER else other
    front = [_in_front(rng, people) for _ in range(rng.randrange(most_in_front + 1))]
    pieces = [(" ".join((*front, _story(rng, a, b, giver))), receiver.first)]
    for _ in range(rng.randrange(MOST_LATER + 1) if roles else 0):
        giver, getting = rng.sample((receiver, other), 2)
        pieces.append((LATER.format(s=giver.giving, thing=rng.choice(THINGS)), getting.first))
    return finished(pieces, kind, f"{receiver.first} from {other.first}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _story(rng: random.Random, a: Person, b: Person, giver: Person) -> str:
    """Up to who gets something."""
    story = rng.choice(TEMPLATES).format(
        a=a.full, b=b.full, s=giver.giving, place=rng.choice(PLACES), thing=rng.choice(THINGS)
    )
    return ". ".join(_sentence(each) for each in story.split(". "))


def _in_front(rng: random.Random, people: list[Person]) -> str:
    """A sentence about some of these people: a finished story, or less."""
    a, b = rng.sample(people, 2)
    if rng.random() >= STORY_SHARE:
        return _sentence(rng.choice(OPENINGS).format(x=a.full))
    giver, receiver = rng.sample((a, b), 2)
    return f"{_story(rng, a, b, giver)} {receiver.first}."


def draw_who(rng: random.Random) -> Text:
    """Whose profession is whose."""
    people = draw_people(rng, rng.randint(*LISTED), roles=True)
    listed = WHO.format(listed=", ".join(person.full for person in people))
    asked = [rng.choice(people) for _ in range(WHO_QUESTIONS)]
    frames = [rng.choice(NAMED).format(role=person.giving) for person in asked]
    pieces = [(_sentence(frame), person.first) for frame, person in zip(frames, asked, strict=True)]
    pieces[0] = (f"{listed} {pieces[0][0]}", pieces[0][1])
    return finished(pieces, WHO_IS_WHO, ", ".join(person.full for person in people))


def draw_colours(rng: random.Random) -> Text:
    """What colour some of three things have."""
    colours, objects = rng.sample(COLOURS, 3), rng.sample(OBJECTS, 3)
    listed = COLOURED.format(
        surface=rng.choice(SURFACES),
        **{f"c{i + 1}": colour for i, colour in enumerate(colours)},
        **{f"o{i + 1}": thing for i, thing in enumerate(objects)},
    )
    asked = [rng.randrange(3) for _ in range(3)]
    pieces = [(rng.choice(ASKED).format(asked=objects[each]), colours[each]) for each in asked]
    pieces[0] = (f"{listed} {pieces[0][0]}", pieces[0][1])
    content = ", ".join(f"{c} {o}" for c, o in zip(colours, objects, strict=True))
    return finished(pieces, COLOUR, content)


def draw(
    rng: random.Random, kind: str | None = None, *, most_in_front: int = MOST_IN_FRONT
) -> Text:
    """One text of one kind, or of a kind that is drawn by its share."""
    if kind is None:
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    if kind == COLOUR:
        return draw_colours(rng)
    if kind == WHO_IS_WHO:
        return draw_who(rng)
    return draw_names(rng, kind, most_in_front=most_in_front)


def stream(
    seed: int, *, held_out: bool, kind: str | None = None, most_in_front: int = MOST_IN_FRONT
) -> Iterator[Text]:
    """Endless texts, either only those kept from training or only the others.

    most_in_front: sentences in front of what is asked.
    """
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind, most_in_front=most_in_front)
        if is_held_out(text) == held_out:
            yield text
