"""What an `image` line says: what images are made of, as far as that needs no row."""

from __future__ import annotations

from mechdsl.base.names import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.syntax import ast

IMAGE = "image"
"""The span of all patches."""
FRONT = ("cls", "distillation", "register")
"""Spans of what may stand in front of them."""
IMAGE_SPANS = (IMAGE, *FRONT)
"""What images have by themselves."""
MASK = "mask"
"""What a region of generated shapes is called that are drawn."""
ALONE = ("gray", "noise")
MEAN = "mean"
CHANGED = ("blur", "mask")
"""What is no image of its own, but a change of one."""
CALLS = {"shapes": ("n", "kind", "size", "colour", "texture"), "gray": ()}
_WORDS = ('"{file}"', *ALONE, "mean of …", "shapes(…)")


def image_problems(node: ast.Expr) -> list[Diagnostic]:
    """E0203, E0207 for what no image can be made of."""
    match node:
        case ast.String():
            return []
        case ast.OfRef(name=name) if name == MEAN:
            return []
        case ast.Name(id=name) | ast.Call(name=name) if name == MEAN:
            reason, hint = "needs a block of images", "write `image mean of scenes`"
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
        case ast.Name(id=name) | ast.Call(name=name) | ast.OfRef(name=name) if name in CHANGED:
            return [_changed(node, name)]
        case ast.Name(id=name) if name in ALONE:
            return []
        case ast.Call(name=name) if name in ALONE and name not in CALLS:
            reason, hint = "takes no arguments", f"write `image {name}`"
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
        case ast.Call(name=name) if name in CALLS:
            return _arguments(node, CALLS[name])
        case ast.Name(id=name) | ast.Call(name=name) | ast.OfRef(name=name):
            if name in CALLS:
                reason, hint = "needs a kind", f'write `{name}(n: 1, kind: "circle", size: 32)`'
                return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]
            words = [*ALONE, *CALLS, MEAN]
            hint = did_you_mean(name, words, f"images are {name_list(_WORDS)}")
            return [UnknownWord(span=node.span, kind="image", word=name, hint=hint)]
        case _:
            hint = f"images are {name_list(_WORDS)}"
            reason = "names no image"
            name = node.span.written
            return [BadArgument(span=node.span, name=name, reason=reason, hint=hint)]


def _changed(node: ast.Expr, word: str) -> Diagnostic:
    """E0207 for what an image becomes by a corruption, row by row."""
    line = f"{word} image radius 8" if word == "blur" else f"{word} image"
    hint = f"change a block's own images: `corrupt changed {{ {line} }}`, `from clean into changed`"
    reason = "is a change of images, and none by itself"
    return BadArgument(span=node.span, name=word, reason=reason, hint=hint)


def _arguments(node: ast.Call, known: tuple[str, ...]) -> list[Diagnostic]:
    given = [each.name for each in node.arguments]
    if not known:
        if len(given) == 1 and given[0] is None:
            return []
        hint = f"write `{node.name}(100)`, a brightness from 0 to 255"
        return [BadArgument(span=node.span, name=node.name, reason="takes one number", hint=hint)]
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


def parts(node: ast.Expr) -> tuple[ast.Expr, ...]:
    """The expressions in it, whose names are names of the row."""
    match node:
        case ast.String():
            return (node,)
        case ast.Call():
            return tuple(a.value for a in node.arguments if isinstance(a.value, ast.Expr))
        case _:
            return ()


def averaged_block(node: ast.Expr | None) -> ast.Ref | None:
    """The block, or a part of one, whose mean an image is."""
    return node.of if isinstance(node, ast.OfRef) and node.name == MEAN else None


def is_drawn(node: ast.Expr) -> bool:
    """Whether the same values can give several images."""
    return (isinstance(node, ast.Call) and node.name == "shapes") or (
        isinstance(node, ast.Name) and node.id == "noise"
    )
