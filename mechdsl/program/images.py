"""`image`, `video`, `audio` and `tiles` lines of a prompts block, without the data of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import BadArgument, DuplicateName, UnknownWord
from mechdsl.images.picture import IMAGE_BASELINES, BaselineNumber, ImageBaseline, baseline_problem
from mechdsl.images.sounds import GENERATED_SOUNDS
from mechdsl.program.spec import TILE, Tiles
from mechdsl.syntax import ast
from mechdsl.syntax.words import name_problem

IMAGE_SPAN = "image"
"""The span of all patches."""

EXTRA_TOKEN_SPANS = ("cls", "distillation", "register")
"""Spans of the tokens that may precede the patches."""

INSERTED_SPAN = "inserted"
"""The span of tokens that corruptions insert."""

IMAGE_SPANS = (IMAGE_SPAN, *EXTRA_TOKEN_SPANS)
"""Spans that every image has."""

SHAPE_REGION = "mask"
"""Name of the region of generated shapes."""

FRAME_SPAN = "frame"
"""The span of each frame of a video within prompts."""

MEAN_IMAGE = "mean"

IMAGE_CHANGES = ("blur", "mask")
"""Functions that change an image instead of creating one."""

SHAPES_CALL = "shapes"

SHAPES_ARGUMENTS = ("n", "kind", "size", "colour", "texture")

GRID_CALL = "grid"

GRID_ARGUMENTS = ("rows", "marks", "cell", "noise")

DRAWN_IMAGES = {
    SHAPES_CALL: (SHAPES_ARGUMENTS, "a kind", 'shapes(n: 1, kind: "circle", size: 32)'),
    GRID_CALL: (GRID_ARGUMENTS, "rows", 'grid(rows: "red circle, - / -, blue cross")'),
}
"""Generated images: their arguments, the required one in words, and an example."""

BaselineT = TypeVar("BaselineT", bound=ImageBaseline)


def image_baseline(name: str) -> Callable[[type[BaselineT]], type[BaselineT]]:
    """Register a subclass of `ImageBaseline` as the image `name` of files.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return IMAGE_BASELINES.class_decorator(name, _class_problem)


def _class_problem(name: str, entry: type[ImageBaseline]) -> str | None:
    """Return the reason that a class can't be registered."""
    if name in (*DRAWN_IMAGES, MEAN_IMAGE, *IMAGE_CHANGES):
        return "its name is an image of the language"
    return name_problem(name) or baseline_problem(name, entry)


def _known_images() -> str:
    return name_list(('"{file}"', *IMAGE_BASELINES, "mean of …", "shapes(…)", "grid(…)"))


def image_problems(node: ast.Expr) -> list[Diagnostic]:
    """Report expressions that aren't images (E0203, E0207)."""
    match node:
        case ast.String():
            return []
        case ast.QualifiedRef(name=name) if name == MEAN_IMAGE:
            return []
        case ast.Name(id=name) | ast.Call(name=name) if name == MEAN_IMAGE:
            reason, hint = "needs a block of images", "write `image mean of scenes`"
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
        case ast.Name(id=name) | ast.Call(name=name) | ast.QualifiedRef(name=name) if (
            name in IMAGE_CHANGES
        ):
            return [_changed(node, name)]
        case ast.Name(id=name) if name in IMAGE_BASELINES:
            return []
        case ast.Call(name=name) if name in IMAGE_BASELINES:
            return _baseline_arguments(node, IMAGE_BASELINES[name].number)
        case ast.Call(name=name) if name in DRAWN_IMAGES:
            return _drawn_arguments(node)
        case ast.Name(id=name) | ast.Call(name=name) | ast.QualifiedRef(name=name):
            if name in DRAWN_IMAGES:
                _, required, example = DRAWN_IMAGES[name]
                reason, hint = f"needs {required}", f"write `{example}`"
                return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
            words = [*IMAGE_BASELINES, *DRAWN_IMAGES, MEAN_IMAGE]
            hint = did_you_mean(name, words, f"images are {_known_images()}")
            return [UnknownWord(span=node.span, kind="image", word=name, hint=hint)]
        case _:
            hint = f"images are {_known_images()}"
            reason = "names no image"
            name = node.span.written
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]


def listed_frames(node: ast.Expr) -> tuple[ast.Expr, ...]:
    """Return the frames of a list."""
    items = node.items if isinstance(node, ast.ListLiteral) else ()
    return tuple(item for item in items if isinstance(item, ast.Expr))


def video_problems(node: ast.Expr) -> list[Diagnostic]:
    """Report expressions that aren't the frames of a video (E0203, E0207)."""
    if isinstance(node, ast.String):
        return []
    hint = 'write a folder or a list of images: `"{folder}"` or `["{kind}-1.png", "{kind}-2.png"]`'
    reason = "isn't a list of frames"
    frames = listed_frames(node)
    if isinstance(node, ast.ListLiteral) and len(frames) == len(node.items):
        problems = [problem for frame in frames for problem in image_problems(frame)]
        if problems or len(frames) > 1:
            return problems
        reason = "needs two frames or more"
        hint = "add frames, or write an `image` line"
    return [BadArgument(span=node.span, name=node.span.written, reason=reason, hint=hint)]


def sound_problems(node: ast.Expr) -> list[Diagnostic]:
    """Report expressions that aren't sounds (E0203, E0207)."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "name", "")
    entry = GENERATED_SOUNDS.get(name)
    examples = [
        name if sound.number is None else f"{name}({sound.number.example})"
        for name, sound in GENERATED_SOUNDS.items()
    ]
    known = name_list(('"{file}"', *examples))
    match node:
        case ast.String():
            return []
        case ast.Name() if entry is not None and entry.number is not None:
            number = entry.number
            reason, hint = f"needs {number.noun}", f"write `{name}({number.example})`"
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
        case ast.Name() if entry is not None:
            return []
        case ast.Call() if entry is not None:
            return _baseline_arguments(node, entry.number, "audio a =")
        case ast.Name() | ast.Call():
            hint = did_you_mean(name, GENERATED_SOUNDS, f"sounds are {known}")
            return [UnknownWord(span=node.span, kind="sound", word=name, hint=hint)]
        case _:
            reason, hint = "names no sound", f"sounds are {known}"
            name = node.span.written
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]


def _changed(node: ast.Expr, word: str) -> Diagnostic:
    """Return E0207 for a function that changes images row by row in a corruption."""
    line = f"{word} image radius 8" if word == "blur" else f"{word} image"
    hint = f"change a block's own images: `corrupt changed {{ {line} }}`, `from clean into changed`"
    reason = "changes images, but is not an image itself"
    return BadArgument(span=node.span, name=word, reason=reason, hint=hint)


def _baseline_arguments(
    node: ast.Call, number: BaselineNumber | None, line: str = "image"
) -> list[Diagnostic]:
    if number is None:
        reason, hint = "takes no arguments", f"write `{line} {node.name}`"
    else:
        if len(node.arguments) == 1 and node.arguments[0].name is None:
            return []
        reason = "takes one number"
        hint = f"write `{node.name}({number.example})`, {number.noun} from {number.low} "
        hint += f"to {number.high}"
    return [BadArgument(span=node.span, name=node.name, reason=reason, hint=hint)]


def _drawn_arguments(node: ast.Call) -> list[Diagnostic]:
    known, given = DRAWN_IMAGES[node.name][0], [each.name for each in node.arguments]
    for argument in node.arguments:
        reason = ""
        if argument.name is None:
            reason = "takes each argument by its name"
        elif argument.name not in known:
            reason = f"has no argument `{argument.name}`"
        elif given.count(argument.name) > 1:
            reason = f"has `{argument.name}` twice"
        elif not isinstance(argument.value, ast.Expr):
            reason = f"takes one value for `{argument.name}`"
        if reason:
            hint = f"it takes {name_list(known)}"
            hint = did_you_mean(argument.name, known, hint) if argument.name else hint
            return [BadArgument(span=argument.span, name=node.name, reason=reason, hint=hint)]
    return []


def image_expressions(node: ast.Expr) -> tuple[ast.Expr, ...]:
    """Return the expressions in an image; their names refer to the row."""
    match node:
        case ast.String():
            return (node,)
        case ast.ListLiteral():
            return tuple(part for each in listed_frames(node) for part in image_expressions(each))
        case ast.Call():
            return tuple(a.value for a in node.arguments if isinstance(a.value, ast.Expr))
        case _:
            return ()


def averaged_block(node: ast.Expr | None) -> ast.Ref | None:
    """Return the block, or its part, whose mean an image is."""
    return node.of if isinstance(node, ast.QualifiedRef) and node.name == MEAN_IMAGE else None


def averaged_blocks(nodes: Iterable[ast.Expr | None]) -> tuple[ast.Ref, ...]:
    """Return the blocks, or their parts, whose means are images or frames of videos."""
    each = (part for node in nodes if node for part in (node, *listed_frames(node)))
    refs = (averaged_block(part) for part in each)
    return tuple(ref for ref in refs if ref is not None)


def is_random_image(node: ast.Expr) -> bool:
    """Whether equal values can give different images."""
    if isinstance(node, ast.ListLiteral):
        return any(map(is_random_image, listed_frames(node)))
    if isinstance(node, ast.Call) and node.name in DRAWN_IMAGES:
        return True
    name = node.id if isinstance(node, ast.Name) else getattr(node, "name", "")
    entry = IMAGE_BASELINES.get(name) or GENERATED_SOUNDS.get(name)
    return entry is not None and entry.is_random


TILE_VALUES = (TILE, IMAGE_SPAN)
"""Values of each row of tiles: the tile and its image."""


def check_tiles(
    line: ast.TilesLine, image: ast.Expr | None, names: Sequence[ast.Name]
) -> list[Diagnostic]:
    """Report images that can't have tiles, and values with names that tiles define (E0202, E0207).

    Args:
        image: The image expression of the block.
        names: The names of the block's own values.
    """
    first = f"`tiles` on line {line.span.line} gives each row this value"
    problems: list[Diagnostic] = [
        DuplicateName(span=name.span, name=name.id, first=first)
        for name in names
        if name.id in TILE_VALUES
    ]
    drawn = image.name if isinstance(image, ast.Call | ast.QualifiedRef) else None
    drawn = image.id if isinstance(image, ast.Name) else drawn
    if drawn == MEAN_IMAGE or (drawn is not None and drawn in IMAGE_BASELINES):
        reason = f"needs images with their own size, but `image {drawn}` has the model's"
        hint = "remove it: a block of one image is paired with every tile"
        problems.append(BadArgument(span=line.span, name="tiles", reason=reason, hint=hint))
    return problems


def check_tile_columns(tiles: Tiles, columns: Sequence[str]) -> list[Diagnostic]:
    """Report E0207 for columns of a data file with names that tiles define."""
    reason = "is a column, but `tiles` gives each row a value with this name"
    return [
        BadArgument(
            span=tiles.span,
            name=name,
            reason=reason,
            hint=f"rename the column: `rename {{ file = {name} }}`",
        )
        for name in TILE_VALUES
        if name in columns
    ]
