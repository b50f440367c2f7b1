"""Images and captions that the dual encoder is trained and tested on.

Seeded. The images are those of `zoo/pictures.py`; a caption says all of a scene or a part:

    a red circle on stripes · a red circle · a circle on stripes · a circle
"""

from __future__ import annotations

from numpy.random import Generator

from mechdsl.images.pixels import SHAPE_COLOURS, SHAPES, TEXTURES
from zoo import language
from zoo.pictures import Scene, scenes

PARTS = (tuple(SHAPES), tuple(SHAPE_COLOURS), tuple(TEXTURES))
"""What each part of a scene may be."""
GROUPS, GROUP = 12, 4
"""Of a batch of scenes that are alike: groups of one kind and colour, scenes of each at most."""
END = "<end>"
SPECIAL: tuple[str, ...] = (*language.SPECIAL, END)
WHOLE_SHARE = 0.4
"""Of the captions, those that say all."""


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    return (*SPECIAL, "a", "on", *SHAPE_COLOURS, *SHAPES, *TEXTURES)


def caption(kind: str, colour: str = "", texture: str = "") -> str:
    """What says that, and nothing else."""
    shape = f"a {colour} {kind}" if colour else f"a {kind}"
    return f"{shape} on {texture}" if texture else shape


def told(scene: Scene, random: Generator) -> Scene:
    """The part of a scene that a caption says; what it doesn't say is empty."""
    if random.random() < WHOLE_SHARE:
        return scene
    kind, colour, texture = scene
    said = int(random.integers(3))
    return kind, colour if said == 1 else "", texture if said == 2 else ""


def alike(random: Generator) -> list[Scene]:
    """Scenes of training that differ in the texture alone from some of the others, so that kind and
    colour don't tell which caption is an image's."""
    pairs: dict[tuple[str, str], list[Scene]] = {}
    for scene in scenes(False):
        pairs.setdefault(scene[:2], []).append(scene)
    groups = list(pairs.values())
    found: list[Scene] = []
    for number in random.permutation(len(groups))[:GROUPS].tolist():
        chosen = random.permutation(len(groups[number]))[:GROUP].tolist()
        found += [groups[number][each] for each in chosen]
    return found


def fits(said: Scene, scene: Scene) -> bool:
    """Whether what a caption says is true of a scene."""
    return all(part in ("", true) for part, true in zip(said, scene, strict=True))
