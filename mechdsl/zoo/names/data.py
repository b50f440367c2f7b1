"""Texts the names model is trained and tested on: indirect objects, and a few coloured objects.

Pure Python and seeded. A text looks like one of these (the last word but one is asked):

    When Mary and John went to the shop, John gave a bag to Mary.
    When Mary and Tom met at the park, and Mary showed a ring to Tom. Tom was tired. When Mary and
    John went to the shop, John gave a bag to Mary.
    Tom was tired. When Mary and John went to the shop, Anna gave a bag to John.
    On the table there is a red pencil, a blue bag and a green cup. What colour is the bag?
    Answer: blue.

In front there may be other sentences, up to three, some of which are finished stories about the two
or about others: how often somebody is named, and where, doesn't tell who gets something. Without
them a model learns to count names, in one layer, and needs nothing else. In the fourth text the
giver is a third person, and either of the two may get it: half of the texts say the one, half the
other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mechdsl.zoo import language
from mechdsl.zoo.language import SPECIAL, Text

NAMES: tuple[str, ...] = (
    "Mary", "John", "Tom", "Anna", "Luke", "James", "Dan", "Martin", "Amy", "Laura",
    "Peter", "Paul", "Sarah", "Emma", "David", "Simon", "Alice", "Kate", "Mark", "Jane",
    "Robert", "Lucy", "Henry", "Julia", "Frank", "Helen", "George", "Rose", "Jack", "Ruth",
    "Adam", "Clara", "Oscar", "Nina", "Victor", "Sophie", "Max", "Olivia", "Leo", "Grace",
    "Arthur", "Ella", "Felix", "Maria", "Hugo", "Diana", "Ivan", "Carol", "Walter", "Susan",
    "Philip", "Linda", "Stephen", "Karen", "Andrew", "Rachel", "Kevin", "Megan", "Ryan", "Lisa",
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
COLOURED = (
    "On the {surface} there is a {c1} {o1}, a {c2} {o2} and a {c3} {o3}. "
    "What colour is the {asked}? Answer:"
)

IOI_FIRST, IOI_SECOND = "indirect object first", "indirect object second"
EITHER, COLOUR = "a third person gives", "coloured objects"
EITHER_SHARE = 0.16
COLOUR_SHARE = 0.12
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    frames = " ".join((*TEMPLATES, *OPENINGS, COLOURED)).translate(str.maketrans(",.?:", "    "))
    plain = [word for word in frames.split() if "{" not in word]
    lists = (NAMES, PLACES, THINGS, OBJECTS, COLOURS, SURFACES)
    named = [word for each in lists for word in each]
    return tuple(dict.fromkeys((*SPECIAL, ",", ".", "?", ":", *plain, *named)))


def finished(prompt: str, answer: str, kind: str, content: str) -> Text:
    """The prompt with its answer, which is asked, and a full stop."""
    start = len(prompt) + 1
    return Text(f"{prompt} {answer}.", kind, ((start, start + len(answer)),), content)


def is_held_out(text: Text) -> bool:
    """Whether this pair of persons, or this set of coloured objects, is kept from training."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def draw_names(rng: random.Random, kind: str) -> Text:
    """Who gets something: the one of the two who doesn't give, or either of them."""
    receiver, other, third, fourth = rng.sample(NAMES, 4)
    first = kind == IOI_FIRST or (kind == EITHER and rng.random() < 0.5)
    a, b = (receiver, other) if first else (other, receiver)
    prompt = rng.choice(TEMPLATES).format(
        a=a,
        b=b,
        s=third if kind == EITHER else other,
        place=rng.choice(PLACES),
        thing=rng.choice(THINGS),
    )
    people = (receiver, other, third, fourth)
    front = [_in_front(rng, people) for _ in range(rng.randrange(MOST_IN_FRONT + 1))]
    prompt = " ".join((*front, prompt))
    return finished(prompt, receiver, kind, f"{receiver} from {other}")


def _in_front(rng: random.Random, people: tuple[str, ...]) -> str:
    """A sentence about some of these people: a finished story, or less."""
    a, b = rng.sample(people, 2)
    if rng.random() >= STORY_SHARE:
        return rng.choice(OPENINGS).format(x=a)
    giver, receiver = rng.sample((a, b), 2)
    story = rng.choice(TEMPLATES).format(
        a=a, b=b, s=giver, place=rng.choice(PLACES), thing=rng.choice(THINGS)
    )
    return f"{story} {receiver}."


def draw_colours(rng: random.Random) -> Text:
    """What colour one of three things has."""
    colours, objects, asked = rng.sample(COLOURS, 3), rng.sample(OBJECTS, 3), rng.randrange(3)
    prompt = COLOURED.format(
        surface=rng.choice(SURFACES),
        **{f"c{i + 1}": colour for i, colour in enumerate(colours)},
        **{f"o{i + 1}": thing for i, thing in enumerate(objects)},
        asked=objects[asked],
    )
    content = ", ".join(f"{c} {o}" for c, o in zip(colours, objects, strict=True))
    return finished(prompt, colours[asked], COLOUR, content)


def draw(rng: random.Random, kind: str | None = None) -> Text:
    """One text of the training distribution, or of one kind."""
    if kind is None:
        fate = rng.random()
        kind = rng.choice((IOI_FIRST, IOI_SECOND))
        if fate < COLOUR_SHARE:
            kind = COLOUR
        elif fate < COLOUR_SHARE + EITHER_SHARE:
            kind = EITHER
    return draw_colours(rng) if kind == COLOUR else draw_names(rng, kind)


def stream(seed: int, *, held_out: bool, kind: str | None = None) -> Iterator[Text]:
    """Endless texts, either only those kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind)
        if is_held_out(text) == held_out:
            yield text
