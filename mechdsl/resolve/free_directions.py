"""Directions that aren't read off activations: of the unembedding, or saved in a file."""

from __future__ import annotations

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.named_paths import SAVED, path_to_read
from mechdsl.resolve.direction_types import Member, SavedVector, Unembedded
from mechdsl.resolve.families import CannotMake, Family
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.saved_tensors import Unreadable, saved_tensors
from mechdsl.syntax import ast


def free_family(call: ast.Call, definition: spec.Direction, work: Work) -> Family | None:
    """`unembedding("…", "…")` or `saved("…", "…")`. Raises CannotMake."""
    texts = [str(constant(a.value, work.program.parameters)) for a in call.arguments]
    if call.name == "saved":
        written, key = texts
        return _saved(call, definition, written, key, work)
    tokens = [_token(call, text, work) for text in texts]
    words = " − ".join(f'"{text}"' for text in texts)
    vector = Unembedded(tokens[0], tokens[1] if len(tokens) > 1 else None)
    member = Member(definition.name, vector, f"unembedding of {words}")
    return Family(definition.name, (), {(): member}, work.model.shape.d_model, (definition.name,))


def _saved(
    call: ast.Call, definition: spec.Direction, written: str, key: str, work: Work
) -> Family | None:
    """The vector of a file, of which the header says how long it is."""
    path, problems = path_to_read(SAVED, written, call.span)
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None:
        return None
    try:
        saved = saved_tensors(path, written, limits.DIRECTION_FILE, "save it by itself")
    except Unreadable as problem:
        raise CannotMake(call, problem.reason, problem.hint) from None
    shapes = saved.shapes
    if key not in shapes:
        known = name_list(list(shapes)) or "none"
        raise CannotMake(call, f"`{written}` has no `{key}`", f"it has {known}")
    if len(shapes[key]) != 1:
        reason = f"`{key}` has the shape {list(shapes[key])}, not [width]"
        raise CannotMake(call, reason, "save one vector under a name of its own")
    made = f"`{key}` of {written}, SHA-256 {saved.digest[:12]}…"
    member = Member(definition.name, SavedVector(path, key, saved.digest), made)
    return Family(definition.name, (), {(): member}, shapes[key][0], (definition.name,))


def _token(call: ast.Call, text: str, work: Work) -> int:
    ids = work.model.tokenizer.encode(text, add_special=False).ids
    if len(ids) != 1:
        raise CannotMake(
            call,
            f'"{text}" is {len(ids)} tokens, and each has a row of its own in the unembedding',
            "name texts of one token; a leading space is part of most words",
        )
    return ids[0]
