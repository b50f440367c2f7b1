"""Text rows scored with images: the image cases translated to text tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from . import duals, support
from .reference import Act, Seen, call
from .support import KINDS, double, pixels
from .views import ALL, DIRECTIONS, View, in_tower

PARTS = (
    ("the", "small circle", "", "red cross"),
    ("a photo of the", "red square", " and cross", "small ring"),
    ("the", "blue ring", "", "red circle"),
)
"""Text before, the thing, text after, and the other thing."""
BLOCKS = """
prompts captions {
  rows "texts.jsonl"
  image from scenes
  template "{before} {thing}{behind}"
  corrupt changed { thing = other_thing }
}
"""
PLACES = {
    "image row 2..3 col 1..3": "thing tokens",
    "image row 1..3 col *": "thing tokens",
    "image row 1 col 1..2": "thing tokens",
    "image row 1 col *": "token 1",
    "image row 2 col *": "token 1",
    "image row 2 col 3": "token 1",
    "image row 2 col 2": "token 2",
    "image row 3 col *": "token 2",
    "image row 4 col *": "token 2",
}
"""Image position → text position that replaces it."""


def write(folder: Path) -> None:
    names = ("before", "thing", "behind", "other_thing")
    records = [
        {**dict(zip(names, parts, strict=True)), "kind": kind}
        for parts, kind in zip(PARTS, KINDS, strict=True)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def translated(written: str) -> str:
    """Translate image positions to text positions."""
    written = written.replace(ALL, "tokens *").replace("FRONT", "token -1")
    return re.sub(
        r"(image row \S+ col \S+)( tokens?)?", lambda found: PLACES[found[1]], written
    )  # fmt: skip


def forward(
    name: str, number: int, image: int | None, acts: Iterable[Act] = (), *, changed: bool = False
) -> Seen:
    """Run a row's text, optionally with the other thing, and an image through the bare model."""
    before, thing, behind, other = PARTS[number]
    text = f"{before} {other if changed else thing}{behind}"
    given = {"pixel_values": pixels(name, image), **duals.inputs(name, text)}
    return call(double(name), duals.stack("text_model"), given, acts)


@cache
def plain(name: str, number: int, changed: bool) -> Seen:
    return forward(name, number, number, changed=changed)


class TextView(View):
    """One text row; `gray` means the text with the other thing."""

    def image(self, which: str) -> Seen:
        return plain(self.name, self.number, which == "gray")

    @property
    def blocks(self) -> str:
        named = {"scenes": "captions", "neutral": "captions.changed"}
        directions = re.sub("|".join(named), lambda found: named[found[0]], translated(DIRECTIONS))
        return support.blocks_of(self.name) + BLOCKS + directions

    def experiment(self, key: str, *lines: str) -> str:
        own = [in_tower(self.name, "text", translated(line)) for line in lines]
        own = [line.replace("scenes", "clean").replace("neutral", "changed") for line in own]
        every = ("model m", "prompts captions", *own, "measure score as delta", support.STATS)
        return f"experiment {key} {{\n" + "\n".join(f"  {line}" for line in every if line) + "\n}\n"

    def value(self, seen: Seen) -> float:
        return float(seen.output)

    def at(self, written: str) -> list[int]:
        written = translated(written)
        if written == "tokens *":
            return [*range(len(self.start.sites["embed", 0]))]
        if found := re.fullmatch(r"token (-?\d+)", written):
            return [range(len(self.start.sites["embed", 0]))[int(found[1])]]
        first = len(PARTS[self.number][0].split()) + (self.name not in duals.PADDED)
        return {
            "thing tokens": [first, first + 1],
            "thing first": [first],
            "thing last": [first + 1],
        }[written]

    def run(self, acts: Iterable[Act], which: str | None = None) -> Seen:
        changed = (which or self.base) == "gray"
        return forward(self.name, self.number, self.number, acts, changed=changed)
