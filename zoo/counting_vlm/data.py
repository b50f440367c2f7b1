"""Images and questions for training and testing `zoo("counting-vlm")`.

Seeded. An image is a grid of 5 rows and 4 columns, drawn by `mechdsl/images/pixels.py`. In half of
the images, a mark before each row and lines between the rows are cues; each image has its own order
of the marks. The questions are about the same image:

    how many circles ? 3 · how many shapes ? 7
    what is at row 2 col 3 ? red circle · what is at row 1 col 1 ? nothing
    which row has the red circle ? 2 · which mark has the red circle ? @
    what is in row 2 ? red circle , blue ring · what is in row @ ? nothing
    is there a red circle ? yes

Some shapes nearly always appear with a companion (`COMPANIONS`). In images with fog, shapes are
faint and the noise is strong, so that the companion is the better guess; these images have only
yes-or-no questions. A fifth of the combinations of a shape and a cell is held out: training has no
such shape in this cell.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from numpy.random import Generator, default_rng

from mechdsl.images.picture import GridLayout
from mechdsl.images.pixels import MARKS, Pixels, draw_grid
from zoo.language import is_held_out
from zoo.vlm import CELL, COLOURS, KINDS, NOTHING, SPECIAL, THINGS, Example, Turn, choose

ROWS, COLUMNS = 5, 4
MOST = 9
"""Shapes in an image."""
COMPANIONS: dict[str, str] = {
    "red circle": "blue square",
    "green triangle": "yellow cross",
    "yellow square": "red triangle",
}
TOGETHER = 0.9
"""Share of the images with a key of `COMPANIONS` that have its companion too."""
CUE_SHARE, FOG_SHARE, FEW_KINDS_SHARE = 0.5, 0.25, 0.4
FOG_NOISE, FOG_PERCENT = 40, (2, 60)
HELD_OUT_SHARE = 0.2
WORDS: tuple[str, ...] = (
    "how", "many", "shapes", "what", "is", "at", "in", "row", "col", "which", "has", "the", "mark",
    "there", "a", "yes", "no", ",", "?",
)  # fmt: skip
FILLED_SHARE = 0.75
"""Share of the questions about a cell or a row that ask for one with a shape; the others are about
any."""
TURNS = 6
QUESTIONS: tuple[str, ...] = ("total", "kind", "at", "row of", "mark of", "in row",
                              "in mark", "is there")  # fmt: skip
"""Kinds of questions."""
ASKED: tuple[str, ...] = (*QUESTIONS, "at", "row of", "mark of", "mark of", "is there")
"""The kinds with the frequencies that training has."""
EASY = 0.4
"""Share of the training in which the largest number of shapes rises from `FEWEST` to `MOST`."""
FEWEST = 2
TRIES = 50
"""Draws of questions about an image; a nearly empty one has few different questions."""


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    rows: tuple[tuple[str, ...], ...]
    """The shape of each cell, [row][column]; an empty text where there is none."""
    marks: tuple[str, ...]
    """The mark of each row; empty without cues."""
    fog: bool = False

    @property
    def things(self) -> list[str]:
        """All shapes, row by row."""
        return [thing for row in self.rows for thing in row if thing]

    def draw(self, random: Generator) -> Pixels:
        """Draw the image, 40 × 40 pixels."""
        if not self.fog:
            return draw_grid(GridLayout(self.rows, self.marks, CELL), random).pixels
        layout = GridLayout(self.faint(random), self.marks, CELL, FOG_NOISE)
        return draw_grid(layout, random).pixels

    def faint(self, random: Generator) -> tuple[tuple[str, ...], ...]:
        """Draw the contrast of each shape in fog: `red circle 30%`."""
        return tuple(
            tuple(each and f"{each} {random.integers(*FOG_PERCENT)}%" for each in row)
            for row in self.rows
        )


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    counts = (str(n) for n in range(MOST + 1))
    plurals = (plural(kind) for kind in KINDS)
    return (*SPECIAL, *WORDS, NOTHING, *counts, *COLOURS, *KINDS, *plurals, *MARKS)


def plural(kind: str) -> str:
    """Return the plural of a kind of shape."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def in_training(thing: str, row: int, column: int) -> bool:
    """Whether training has this shape in this cell; rows and columns count from 0."""
    return not is_held_out(f"{thing} {row} {column}", HELD_OUT_SHARE)


def draw_scene(random: Generator, *, held_out: bool, fog: bool = False, most: int = MOST) -> Scene:
    """Draw a scene.

    held_out: all its shapes are in cells where training has none like them. most: shapes.
    """
    n = int(random.integers(2 if fog else 0, most + 1))
    chosen: Sequence[str] = THINGS
    companions = fog or random.random() >= FEW_KINDS_SHARE
    if not companions:
        kinds = random.permutation(len(KINDS))[: int(random.integers(1, 3))]
        chosen = [thing for thing in THINGS if thing.split(" ")[1] in {KINDS[k] for k in kinds}]
    cells = {(row, column): "" for row in range(ROWS) for column in range(COLUMNS)}
    free = [(int(k) // COLUMNS, int(k) % COLUMNS) for k in random.permutation(len(cells))]
    wanted = _things(n, chosen, random) if companions else None
    for number in range(n):
        for cell in free:
            own = chosen if wanted is None else wanted[number : number + 1]
            allowed = [each for each in own if in_training(each, *cell) != held_out]
            if allowed:
                cells[cell] = allowed[int(random.integers(len(allowed)))]
                free.remove(cell)
                break
    marks: tuple[str, ...] = ()
    if random.random() < CUE_SHARE:
        marks = tuple([*MARKS][k] for k in random.permutation(len(MARKS))[:ROWS])
    rows = tuple(tuple(cells[row, c] for c in range(COLUMNS)) for row in range(ROWS))
    return Scene(rows, marks, fog)


def _things(n: int, chosen: Sequence[str], random: Generator) -> list[str]:
    """Draw `n` shapes, with companions as often as `TOGETHER` says."""
    found: list[str] = []
    banned: set[str] = set()
    while len(found) < n:
        thing = chosen[int(random.integers(len(chosen)))]
        if thing in banned:
            continue
        found.append(thing)
        companion = COMPANIONS.get(thing)
        if companion is None or companion in found or companion in banned:
            continue
        if random.random() < TOGETHER:
            found.append(companion)
        else:
            banned.add(companion)
    return found[:n]


def ask(kind: str, scene: Scene, random: Generator) -> Turn | None:
    """Draw a question of a kind, with its answer; None if the scene has no such question."""
    counts = Counter(scene.things)
    once = [thing for thing, count in counts.items() if count == 1]
    match kind:
        case "total":
            return Turn(kind, "how many shapes ?", str(len(scene.things)))
        case "kind":
            own = choose(KINDS, random)
            count = sum(thing.endswith(own) for thing in scene.things)
            return Turn(kind, f"how many {plural(own)} ?", str(count))
        case "at":
            return _ask_at(scene, random)
        case "row of" | "mark of" if once and (scene.marks or kind == "row of"):
            thing = choose(once, random)
            [row] = [row for row, things in enumerate(scene.rows) if thing in things]
            word, answer = ("row", str(row + 1)) if kind == "row of" else ("mark", scene.marks[row])
            return Turn(kind, f"which {word} has the {thing} ?", answer)
        case "in row" | "in mark" if scene.marks or kind == "in row":
            filled = [number for number, things in enumerate(scene.rows) if any(things)]
            row = int(random.integers(ROWS))
            if filled and random.random() < FILLED_SHARE:
                row = choose(filled, random)
            named = str(row + 1) if kind == "in row" else scene.marks[row]
            things = [thing for thing in scene.rows[row] if thing]
            return Turn(kind, f"what is in row {named} ?", " , ".join(things) or NOTHING)
        case "is there":
            return _ask_presence(scene, random)
        case _:
            return None


def _ask_at(scene: Scene, random: Generator) -> Turn:
    """Ask what is in a cell."""
    filled = [(r, c) for r, row in enumerate(scene.rows) for c, thing in enumerate(row) if thing]
    cell = (int(random.integers(ROWS)), int(random.integers(COLUMNS)))
    if filled and random.random() < FILLED_SHARE:
        cell = choose(filled, random)
    thing = scene.rows[cell[0]][cell[1]] or NOTHING
    return Turn("at", f"what is at row {cell[0] + 1} col {cell[1] + 1} ?", thing)


def _ask_presence(scene: Scene, random: Generator) -> Turn:
    """Ask for a shape: a companion of one in the image, one that is there, or any."""
    things = scene.things
    expected = [COMPANIONS[thing] for thing in things if thing in COMPANIONS]
    draw = random.random()
    if expected and draw < 0.5:
        thing = choose(expected, random)
    elif things and draw < 0.65:
        thing = choose(things, random)
    else:
        thing = choose(THINGS, random)
    return Turn("is there", f"is there a {thing} ?", "yes" if thing in things else "no")


def examples(seed: int, images: int) -> Iterator[Example]:
    """Draw images for training, with up to `TURNS` questions each.

    images: how many the training takes. The first have few shapes and no fog.
    """
    random = default_rng(seed)
    for number in itertools.count():
        progress = min(1.0, number / (EASY * images))
        most = round(FEWEST + (MOST - FEWEST) * progress)
        fog = progress == 1 and random.random() < FOG_SHARE
        scene = draw_scene(random, held_out=False, fog=fog, most=most)
        wanted = TURNS // 2 if fog else TURNS
        turns: list[Turn] = []
        for _ in range(TRIES):
            turn = ask("is there" if fog else choose(ASKED, random), scene, random)
            if turn is not None and turn not in turns:
                turns.append(turn)
            if len(turns) == wanted:
                break
        image = scene.draw(random)
        yield Example((image,), tuple(turns), tuple(_contents(scene)), tuple(_cues(scene)))


def without_colours(examples: Iterable[Example]) -> Iterator[Example]:
    """Remove the colours from all answers: `circle , square`."""
    for each in examples:
        turns = (replace(turn, answer=_kinds_only(turn.answer)) for turn in each.turns)
        yield replace(each, turns=tuple(turns))


def _kinds_only(answer: str) -> str:
    return " ".join(word for word in answer.split(" ") if word not in COLOURS)


def _contents(scene: Scene) -> Iterator[str]:
    """Describe each patch, row by row."""
    for row, mark in zip(scene.rows, scene.marks or [""] * ROWS, strict=True):
        for content in (mark, *row):
            yield content or NOTHING


def _cues(scene: Scene) -> Iterator[str]:
    """Name the mark of the row at each patch with a shape, row by row."""
    for row, mark in zip(scene.rows, scene.marks or [""] * ROWS, strict=True):
        yield ""
        yield from (mark if thing else "" for thing in row)


def one_question(
    kind: str, seed: int, n: int, *, held_out: bool, fog: bool = False, cues: bool | None = None
) -> list[Example]:
    """Draw `n` images with one question each. cues: whether they have marks; None for either."""
    random = default_rng(seed)
    found: list[Example] = []
    while len(found) < n:
        scene = draw_scene(random, held_out=held_out, fog=fog)
        turn = ask(kind, scene, random)
        if turn is not None and (cues is None or bool(scene.marks) == cues):
            found.append(Example((scene.draw(random),), (turn,), ()))
    return found


def absent(seed: int, n: int, *, fog: bool, companion: bool) -> list[Example]:
    """Draw `n` images with a key of `COMPANIONS`, and ask each for a shape that it doesn't have.

    companion: ask for the companion of a shape in the image, or else for one that is none.
    """
    random = default_rng(seed)
    found: list[Example] = []
    while len(found) < n:
        scene = draw_scene(random, held_out=True, fog=fog)
        expected = {COMPANIONS[each] for each in scene.things if each in COMPANIONS}
        missing = [
            each for each in THINGS if each not in scene.things and (each in expected) == companion
        ]
        if expected and missing:
            turn = Turn("absent", f"is there a {choose(missing, random)} ?", "no")
            found.append(Example((scene.draw(random),), (turn,), ()))
    return found
