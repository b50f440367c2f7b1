"""Texts the tasks model is trained and tested on: pairs of words, all by one rule.

Pure Python and seeded. Only the pairs tell the rule, which is one of five:

    dog : dogs . cup : cups . tree : trees .
    dog : Hund . cup : Tasse . tree : Baum .
    dog : animal . cup : thing . tree : plant .

The second word of every pair is asked; that of the first pair can only be guessed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from zoo import language
from zoo.language import SPECIAL, Span, Text

TASKS: tuple[str, ...] = ("plural", "german", "french", "kind", "same")

# Singular, plural, German, French, kind.
WORDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("dog", "dogs", "Hund", "chien", "animal"),
    ("cat", "cats", "Katze", "chat", "animal"),
    ("horse", "horses", "Pferd", "cheval", "animal"),
    ("bird", "birds", "Vogel", "oiseau", "animal"),
    ("cow", "cows", "Kuh", "vache", "animal"),
    ("rabbit", "rabbits", "Hase", "lapin", "animal"),
    ("bee", "bees", "Biene", "abeille", "animal"),
    ("pig", "pigs", "Schwein", "cochon", "animal"),
    ("tree", "trees", "Baum", "arbre", "plant"),
    ("flower", "flowers", "Blume", "fleur", "plant"),
    ("leaf", "leaves", "Blatt", "feuille", "plant"),
    ("root", "roots", "Wurzel", "racine", "plant"),
    ("oak", "oaks", "Eiche", "chêne", "plant"),
    ("rose", "roses", "Rose", "rosier", "plant"),
    ("herb", "herbs", "Kraut", "herbe", "plant"),
    ("bush", "bushes", "Busch", "buisson", "plant"),
    ("cup", "cups", "Tasse", "tasse", "thing"),
    ("chair", "chairs", "Stuhl", "chaise", "thing"),
    ("key", "keys", "Schlüssel", "clé", "thing"),
    ("book", "books", "Buch", "livre", "thing"),
    ("lamp", "lamps", "Lampe", "lampe", "thing"),
    ("knife", "knives", "Messer", "couteau", "thing"),
    ("spoon", "spoons", "Löffel", "cuillère", "thing"),
    ("mirror", "mirrors", "Spiegel", "miroir", "thing"),
    ("apple", "apples", "Apfel", "pomme", "food"),
    ("egg", "eggs", "Ei", "œuf", "food"),
    ("soup", "soups", "Suppe", "soupe", "food"),
    ("onion", "onions", "Zwiebel", "oignon", "food"),
    ("cake", "cakes", "Kuchen", "gâteau", "food"),
    ("potato", "potatoes", "Kartoffel", "patate", "food"),
    ("cherry", "cherries", "Kirsche", "cerise", "food"),
    ("nut", "nuts", "Nuss", "noix", "food"),
    ("king", "kings", "König", "roi", "person"),
    ("woman", "women", "Frau", "femme", "person"),
    ("child", "children", "Kind", "enfant", "person"),
    ("farmer", "farmers", "Bauer", "fermier", "person"),
    ("friend", "friends", "Freund", "ami", "person"),
    ("doctor", "doctors", "Arzt", "docteur", "person"),
    ("judge", "judges", "Richter", "juge", "person"),
    ("thief", "thieves", "Dieb", "voleur", "person"),
)

MOST_PAIRS = 8
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    return tuple(dict.fromkeys((*SPECIAL, ":", ".", *(word for each in WORDS for word in each))))


def records() -> list[dict[str, str]]:
    """What becomes of each word, by task."""
    names = ("plural", "german", "french", "kind")
    return [{"word": w[0], "same": w[0], **dict(zip(names, w[1:], strict=True))} for w in WORDS]


def draw(rng: random.Random, task: str) -> Text:
    """Two to eight pairs of different words; the second word of each is asked."""
    chosen = rng.sample(records(), rng.randint(2, MOST_PAIRS))
    text, spans = "", list[Span]()
    for each in chosen:
        text += f"{each['word']} : "
        spans.append((len(text), len(text) + len(each[task])))
        text += f"{each[task]} . "
    content = " ".join([task, *(each["word"] for each in chosen)])
    return Text(text.strip(), task, tuple(spans), content)


def is_held_out(text: Text) -> bool:
    """Whether this task with these words in this order is kept from training."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def stream(seed: int, *, held_out: bool, task: str | None = None) -> Iterator[Text]:
    """Endless texts, of one task or of all, either only those kept from training or only the
    others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, task or rng.choice(TASKS))
        if is_held_out(text) == held_out:
            yield text
