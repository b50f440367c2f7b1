"""Blocks whose image is the mean of another block's: which block that may be."""

from __future__ import annotations

from mechdsl.diagnostics.e02_names import BadArgument, UnknownName
from mechdsl.program import spec
from mechdsl.program.definitions import Definitions
from mechdsl.program.lower_images import MEAN, averaged_block
from mechdsl.program.namespace import Namespace
from mechdsl.syntax import ast


def check_averaged(parts: Definitions, scope: Namespace) -> None:
    """E0201 and E0207 for what `image mean of BLOCK` can't be taken of."""
    for block in parts.prompts.values():
        ref = averaged_block(block.image)
        if ref is not None and scope.use("prompts", ref.name, ref.span):
            _check(block, ref, parts, scope)


def _check(block: spec.Prompts, ref: ast.Ref, parts: Definitions, scope: Namespace) -> None:
    other = parts.prompts[ref.name]
    reason, hint = "", "write a block of images: `image mean of scenes`"
    if other.kind != "images":
        reason = f"takes images, and `{other.name}` is of prompts"
    elif averaged_block(other.image) is not None:
        reason = f"takes rows, and `{other.name}` is a mean itself"
    elif ref.part is not None and not other.has_part(ref.part):
        halves = f"`{other.name}.train` and `{other.name}.test`"
        known = (
            f"there are {halves}" if other.split is not None else f"`{other.name}` has no `split`"
        )
        problem = UnknownName(span=ref.span, kind="part", name=ref.whole, hint=known)
        scope.diagnostics.append(problem)
        return
    elif block.regions:
        reason = "has no regions: those of its images lie elsewhere in each"
        hint = "leave the region out: `image row 1..2 col * tokens` names patches"
    if reason:
        bad = BadArgument(span=ref.span, name=MEAN, reason=reason, hint=hint)
        scope.diagnostics.append(bad)
