"""Texts the induction model is trained and tested on: random words, then the same words again.

Pure Python and seeded. A text is a sequence of different words (the half), written twice and then
begun once more. Other words may stand before, between and after the copies, so that neither the
distance to the first copy nor the place in the text tells the next word:

    river cloud seven river cloud seven river cloud
    piano salt river cloud seven wolf river cloud seven garden lamp river

What is learned is every word of a later copy that the text before it determines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

WORDS: tuple[str, ...] = (
    "anchor", "angel", "apple", "arrow", "autumn", "bacon", "badge", "basket", "beach", "bell",
    "bench", "bird", "blanket", "board", "boat", "bottle", "box", "branch", "bread", "bridge",
    "brush", "bucket", "butter", "button", "cabin", "cake", "camel", "candle", "canyon", "carpet",
    "castle", "chain", "chair", "cherry", "circle", "clock", "cloud", "coat", "coin", "copper",
    "corner", "cotton", "crown", "curtain", "desert", "diamond", "door", "dragon", "dream", "drum",
    "eagle", "engine", "farmer", "feather", "fence", "field", "finger", "flag", "flower", "forest",
    "fountain", "fox", "garden", "ghost", "giant", "glass", "glove", "gold", "grass", "guitar",
    "hammer", "harbor", "hat", "honey", "horse", "house", "island", "jacket", "jewel", "jungle",
    "kettle", "key", "king", "kitchen", "knife", "ladder", "lake", "lamp", "leaf", "lemon",
    "letter", "lion", "lizard", "magnet", "maple", "market", "meadow", "mirror", "monkey", "moon",
    "morning", "mountain", "music", "needle", "nest", "night", "ocean", "onion", "orange", "owl",
    "paint", "palace", "paper", "pearl", "pencil", "pepper", "piano", "picture", "pillow", "planet",
    "pocket", "pond", "potato", "prince", "rabbit", "radio", "rain", "ribbon", "ring", "river",
    "robot", "rocket", "rope", "rose", "sailor", "salt", "sand", "school", "seven", "shadow",
    "sheep", "ship", "shoe", "silver", "snow", "spoon", "spring", "star", "stone", "storm",
    "street", "summer", "table", "teacher", "tiger", "tower", "train", "wagon", "window", "wolf",
)  # fmt: skip
SPECIAL: tuple[str, ...] = ("<s>", "<pad>", "<unk>")

MIN_LENGTH = 4  # words of a half
MAX_LENGTH = 24
MAX_OTHERS = 8  # other words before a copy

HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    return (*SPECIAL, *WORDS)


@dataclass(frozen=True)
class InductionExample:
    """One text, without `<s>`, with the places (from 0) of the words to predict."""

    words: tuple[str, ...]
    targets: tuple[int, ...]
    half: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def held_out(self) -> bool:
        """Whether this half is kept from training, whatever stands around it."""
        return is_held_out(self.half)


def is_held_out(half: tuple[str, ...]) -> bool:
    """A fixed share of all halves, by hash."""
    digest = hashlib.sha256(" ".join(half).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def write(
    half: tuple[str, ...],
    third: int,
    others: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = ((), (), ()),
) -> InductionExample:
    """Two copies of the half and the first `third` words of another, others before each."""
    words: list[str] = []
    targets: list[int] = []
    for copy, before in enumerate(others):
        words += before
        start = len(words)
        words += half if copy < 2 else half[:third]
        # A copy's first word is known only where a copy was directly followed by one before.
        known = 0 if copy == 2 and not others[1] and not before else 1
        if copy > 0:
            targets += range(start + known, len(words))
    return InductionExample(tuple(words), tuple(targets), half)


def repeat(half: tuple[str, ...]) -> InductionExample:
    """The half twice, then its first word; its second word is the only one to predict."""
    words = write(half, 2).words
    return InductionExample(words, (len(words) - 1,), half)


def draw(rng: random.Random, *, length: int | None = None) -> InductionExample:
    """One text of the training distribution, or one whose half has a given length."""
    n = rng.randint(MIN_LENGTH, MAX_LENGTH) if length is None else length
    words = rng.sample(WORDS, n + 3 * MAX_OTHERS)
    half, rest = tuple(words[:n]), words[n:]
    plain = rng.random() < 0.5
    counts = [0 if plain else rng.randint(0, MAX_OTHERS) for _ in range(3)]
    before, between, after = (
        tuple(rest[i * MAX_OTHERS : i * MAX_OTHERS + count]) for i, count in enumerate(counts)
    )
    return write(half, rng.randint(0, n), (before, between, after))


def stream(seed: int, *, held_out: bool) -> Iterator[InductionExample]:
    """Endless texts, either only those whose half is kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        example = draw(rng)
        if example.held_out == held_out:
            yield example


def repeats(seed: int, length: int) -> Iterator[InductionExample]:
    """Endless held-out texts of the form of `repeat`, with halves of one length."""
    rng = random.Random(seed)
    while True:
        example = repeat(tuple(rng.sample(WORDS, length)))
        if example.held_out:
            yield example
