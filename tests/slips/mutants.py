"""Mutants of valid files with one typing error: every kind of error at every position."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE = re.compile(
    r'(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<comment>#[^\n]*)|(?P<word>[A-Za-z_]\w*)'
    r"|(?P<number>\d+%?)|(?P<sign>\.\.|->|[^\s])"
)
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
WORD = re.compile(r"[A-Za-z_]\w*")
SHORT = re.compile(r"L(\d+)H(\d+)")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Piece:
    """A word, number, string, sign or comment of a file."""

    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Mutant:
    """A file with one slip."""

    file: str
    kind: str
    line: int
    """Line of the slip in the mutated text, from 1."""
    before: str
    after: str
    """The line without and with the slip."""
    text: str
    right: str = ""
    wrong: str = ""
    """The original and the misspelt word."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The key of its judgement."""
        return self.file, self.kind, self.before.strip(), self.after.strip()


Change = tuple[int, int, str]
"""Start, end and replacement."""


class File:
    """A valid file and its pieces."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.text = path.read_text(encoding="utf-8")
        self.pieces = [Piece(m.lastgroup or "", m[0], m.start()) for m in PIECE.finditer(self.text)]
        self.code = [piece for piece in self.pieces if piece.kind != "comment"]

    def words(self) -> Iterator[Piece]:
        """Words outside of strings, and those of placeholders."""
        for piece in self.code:
            if piece.kind == "word":
                yield piece
            elif piece.kind == "string":
                for inner in PLACEHOLDER.finditer(piece.text):
                    for word in WORD.finditer(inner[0]):
                        yield Piece("word", word[0], piece.start + inner.start() + word.start())

    def mutant(self, kind: str, change: Change, right: str = "", wrong: str = "") -> Mutant:
        start, end, new = change
        text = self.text[:start] + new + self.text[end:]
        number = self.text.count("\n", 0, start)
        before = self.text.split("\n")[number]
        after = text.split("\n")[number] if kind != "line dropped" else ""
        if kind == "line doubled":
            number += 1
        return Mutant(self.name, kind, number + 1, before, after, text, right, wrong)


def misspelt(word: str, draw: random.Random) -> str:
    """Drop, double, swap, insert or replace one letter of a word."""
    at = draw.randrange(len(word))
    letter = draw.choice(LETTERS)
    ways = [
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        word[:at] + letter + word[at:],
        word[:at] + letter + word[at + 1 :],
    ]
    return draw.choice(ways)


def misspellings(file: File, draw: random.Random) -> list[Mutant]:
    found: list[Mutant] = []
    for word in file.words():
        if len(word.text) < 2:
            continue
        wrong = misspelt(word.text, draw)
        if wrong != word.text and WORD.fullmatch(wrong):
            change = (word.start, word.end, wrong)
            found.append(file.mutant("misspelt word", change, word.text, wrong))
    return found


def signs(kind: str, among: str) -> dict[str, Callable[[File, random.Random], list[Mutant]]]:
    """Functions that drop and double each of some signs."""

    def places(file: File) -> Iterator[tuple[int, str]]:
        for piece in file.code:
            if piece.kind == "string":
                yield from ((piece.start + i, c) for i, c in enumerate(piece.text) if c in among)
            elif piece.text in among and len(piece.text) == 1:
                yield piece.start, piece.text

    def dropped(file: File, draw: random.Random) -> list[Mutant]:
        del draw
        return [file.mutant(f"{kind} dropped", (at, at + 1, "")) for at, _ in places(file)]

    def doubled(file: File, draw: random.Random) -> list[Mutant]:
        del draw
        return [file.mutant(f"{kind} doubled", (at, at, char)) for at, char in places(file)]

    return {f"{kind} dropped": dropped, f"{kind} doubled": doubled}


def lines(file: File, *, doubled: bool) -> list[Mutant]:
    """Mutants with one non-empty line dropped or doubled."""
    found: list[Mutant] = []
    start = 0
    for line in file.text.splitlines(keepends=True):
        end = start + len(line)
        if line.strip() and not line.lstrip().startswith("#"):
            change = (start, start, line) if doubled else (start, end, "")
            found.append(file.mutant(f"line {'doubled' if doubled else 'dropped'}", change))
        start = end
    return found


def swapped(file: File, draw: random.Random) -> list[Mutant]:
    """Mutants with two neighbouring words swapped."""
    del draw
    found: list[Mutant] = []
    for one, other in zip(file.code, file.code[1:], strict=False):
        between = file.text[one.end : other.start]
        if one.kind == other.kind == "word" and between == " " and one.text != other.text:
            change = (one.start, other.end, f"{other.text} {one.text}")
            found.append(file.mutant("words swapped", change))
    return found


NAMES = {
    "site": ("resid_post", "attn_out", "mlp_out", "z", "k", "resid_mid"),
    "metric": ("logit", "logprob", "prob", "expected", "correct"),
    "effect": ("raw", "total", "delta", "recovery", "relative"),
    "report": ("table", "heatmap", "lines", "bars", "confusion"),
    "fill": ("mean", "zero", "resample"),
}
"""Built-in names by kind."""
DEFINITION = re.compile(r"^\s*(model|prompts|group|metric|experiment)\s+(\w+)\s*[={]", re.MULTILINE)
COMMANDS = {"model", "prompts", "group", "metric", "experiment"}


def of_other_kinds(file: File, draw: random.Random) -> list[Mutant]:
    """Mutants with a name of another kind at one use; definitions are kept."""
    kinds = {name: kind for kind, names in NAMES.items() for name in names}
    kinds |= {m[2]: m[1] for m in DEFINITION.finditer(file.text) if m[1] != "experiment"}
    defined = {m.start(2) for m in DEFINITION.finditer(file.text)}
    found: list[Mutant] = []
    for word in file.code:
        kind = kinds.get(word.text) if word.kind == "word" else None
        if kind is None or word.start in defined:
            continue
        others = sorted(name for name, each in kinds.items() if each != kind)
        change = (word.start, word.end, draw.choice(others))
        found.append(file.mutant("name of another kind", change))
    return found


def backwards(file: File, draw: random.Random) -> list[Mutant]:
    """Mutants with reversed ranges."""
    del draw
    found: list[Mutant] = []
    for low, dots, high in zip(file.code, file.code[1:], file.code[2:], strict=False):
        if dots.text == ".." and low.kind == high.kind == "number" and low.text != high.text:
            change = (low.start, high.end, f"{high.text}..{low.text}")
            found.append(file.mutant("range backwards", change))
    return found


def out_of_bounds(file: File, draw: random.Random) -> list[Mutant]:
    """Mutants with layers, heads, tokens or percentages out of bounds."""
    found: list[Mutant] = []
    axis = ""
    for piece in file.code:
        short = SHORT.fullmatch(piece.text)
        if short is not None:
            layer, head = short.groups()
            new = draw.choice([f"L{int(layer) + 100}H{head}", f"L{layer}H{int(head) + 100}"])
            found.append(file.mutant("out of bounds", (piece.start, piece.end, new)))
        elif piece.kind == "number" and (axis or piece.text.endswith("%")):
            number = int(piece.text.rstrip("%")) + 100
            new = f"{number}%" if piece.text.endswith("%") else str(number)
            found.append(file.mutant("out of bounds", (piece.start, piece.end, new)))
        elif piece.kind == "word":
            axis = piece.text if piece.text.rstrip("s") in ("layer", "head", "token") else ""
        elif piece.text not in ("..", ","):
            axis = ""
    return found


KINDS: dict[str, Callable[[File, random.Random], list[Mutant]]] = {
    "misspelt word": misspellings,
    **signs("bracket", "(){}[]"),
    **signs("quote", '"'),
    **signs("comma", ","),
    "line dropped": lambda file, _: lines(file, doubled=False),
    "line doubled": lambda file, _: lines(file, doubled=True),
    "words swapped": swapped,
    "name of another kind": of_other_kinds,
    "range backwards": backwards,
    "out of bounds": out_of_bounds,
}
"""Functions that make all mutants of a file, by kind of slip."""
NEED_SHAPE = ("out of bounds",)
"""Kinds that are visible only with a model's shape or a text's tokens."""
SHARES = {"misspelt word": 4}
"""Relative sampling weights of kinds, if not 1."""


def drawn(files: list[File], seed: int, count: int) -> list[Mutant]:
    """Draw `count` different mutants; kinds are weighted by their shares until exhausted."""
    draw = random.Random(seed)
    every = {kind: [m for file in files for m in make(file, draw)] for kind, make in KINDS.items()}
    kinds = [kind for kind in KINDS for _ in range(SHARES.get(kind, 1))]
    found: list[Mutant] = []
    while len(found) < count and any(every.values()):
        of_kind = every[draw.choice(kinds)]
        if of_kind:
            found.append(of_kind.pop(draw.randrange(len(of_kind))))
    return found
