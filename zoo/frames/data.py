"""Frames and questions for training and testing `zoo("frames")`.

Seeded. An example has four images of 3 × 3 cells, drawn by `mechdsl/images/pixels.py`. One or two
shapes move by one cell from frame to frame; a shape that leaves the image returns at the other
side. The question is about all four images, or about one of them:

    which way does the red circle move ? left
    where is the red circle in frame 3 ? row 2 col 1

First cells and motions are drawn independently, and shapes may hide each other, so the motion is
independent of every single frame. Only two shapes with one cell and one motion are drawn again, as
one of them would be hidden in all frames. A fifth of the pairs of shapes is held out from training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from numpy.random import Generator, default_rng

from mechdsl.images.picture import GridLayout
from mechdsl.images.pixels import Pixels, draw_grid
from zoo.language import is_held_out
from zoo.vlm import CELL, COLOURS, KINDS, NOTHING, SPECIAL, THINGS, Example, Turn, choose

ACROSS, FRAMES = 3, 4
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}
"""Rows and columns from one frame to the next."""
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
ONE_SHAPE_SHARE, WAY_SHARE = 0.3, 0.5
HELD_OUT_SHARE = 0.2
WORDS = (
    "which", "way", "does", "the", "move", "?", "where", "is", "in", "frame",
    "row", "col", "1", "2", "3", "4",
)  # fmt: skip
WAY, WHERE = "which way", "where"


@dataclass(frozen=True)
class Moving:
    """A shape, its cell in the first frame, and its motion."""

    thing: str
    row: int
    column: int
    motion: str

    def cell(self, frame: int) -> tuple[int, int]:
        """Return the row and column in a frame; all count from 0."""
        down, right = MOTIONS[self.motion]
        return (self.row + frame * down) % ACROSS, (self.column + frame * right) % ACROSS


Clip = tuple[Moving, ...]
"""The shapes of an example; later ones hide earlier ones."""


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    return (*SPECIAL, *WORDS, *MOTIONS, *COLOURS, *KINDS, NOTHING)


def in_training(first: str, second: str) -> bool:
    """Whether training has clips of these two shapes."""
    return not is_held_out(" ".join(sorted((first, second))), HELD_OUT_SHARE)


def draw_clip(random: Generator, *, held_out: bool, count: int | None = None) -> Clip:
    """Draw the shapes of an example.

    Args:
        random: Source of random draws.
        held_out: Two shapes that training doesn't have together.
        count: The number of shapes; None to draw it.
    """
    if count is None:
        count = 1 if not held_out and random.random() < ONE_SHAPE_SHARE else 2
    while True:
        found = tuple(_draw_moving(random) for _ in range(count))
        if count == 1:
            return found
        first, second = found
        if first.thing == second.thing or replace(first, thing=second.thing) == second:
            continue
        if in_training(first.thing, second.thing) != held_out:
            return found


def _draw_moving(random: Generator) -> Moving:
    row, column = (int(random.integers(ACROSS)) for _ in range(2))
    return Moving(choose(THINGS, random), row, column, choose(tuple(MOTIONS), random))


def cells(clip: Clip, frame: int) -> tuple[tuple[str, ...], ...]:
    """The shape in each cell of a frame, [row][column]; an empty text where there is none."""
    shown = {each.cell(frame): each.thing for each in clip}
    return tuple(tuple(shown.get((r, c), "") for c in range(ACROSS)) for r in range(ACROSS))


def draw_frames(clip: Clip, random: Generator) -> tuple[Pixels, ...]:
    """Draw the four images, 24 × 24 pixels each."""
    layouts = (GridLayout(cells(clip, frame), cell=CELL) for frame in range(FRAMES))
    return tuple(draw_grid(each, random).pixels for each in layouts)


def ask(kind: str, clip: Clip, random: Generator) -> Turn | None:
    """Draw a question of a kind, with its answer; None if the shape is hidden in the frame."""
    asked = choose(clip, random)
    if kind == WAY:
        return Turn(kind, f"which way does the {asked.thing} move ?", asked.motion)
    frame = int(random.integers(FRAMES))
    if not _is_visible(asked, clip, frame):
        return None
    row, column = asked.cell(frame)
    question = f"where is the {asked.thing} in frame {frame + 1} ?"
    return Turn(kind, question, f"row {row + 1} col {column + 1}")


def contents(clip: Clip) -> tuple[str, ...]:
    """The words for each patch of the four frames: its shape, or that there is none."""
    shown = (row for frame in range(FRAMES) for row in cells(clip, frame))
    return tuple(thing or NOTHING for row in shown for thing in row)


def motions(clip: Clip) -> tuple[str, ...]:
    """The motion of the shape at each patch of the four frames; empty at other patches, and where
    the previous frame doesn't show the shape."""
    told: list[str] = []
    for frame in range(FRAMES):
        own = [""] * ACROSS**2
        for each in clip:
            row, column = each.cell(frame)
            if frame and all(_is_visible(each, clip, at) for at in (frame - 1, frame)):
                own[row * ACROSS + column] = each.motion
        told += own
    return tuple(told)


def _is_visible(moving: Moving, clip: Clip, frame: int) -> bool:
    row, column = moving.cell(frame)
    return cells(clip, frame)[row][column] == moving.thing


def examples(seed: int) -> Iterator[Example]:
    """Endless examples for training, with one question each."""
    random = default_rng(seed)
    while True:
        clip = draw_clip(random, held_out=False)
        turn = ask(WAY if random.random() < WAY_SHARE else WHERE, clip, random)
        if turn is not None:
            yield Example(draw_frames(clip, random), (turn,), contents(clip), motions(clip))


def one_question(
    kind: str, seed: int, n: int, *, held_out: bool, count: int | None = None
) -> list[Example]:
    """Draw `n` examples with one question each. held_out, count: as of `draw_clip`."""
    random = default_rng(seed)
    found: list[Example] = []
    while len(found) < n:
        clip = draw_clip(random, held_out=held_out, count=count)
        turn = ask(kind, clip, random)
        if turn is not None:
            found.append(Example(draw_frames(clip, random), (turn,), ()))
    return found
