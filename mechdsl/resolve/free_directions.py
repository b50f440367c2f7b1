"""Directions that aren't read off activations: of the unembedding, or saved in a file."""

from __future__ import annotations

from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.resolve.direction_types import Member, Unembedded
from mechdsl.resolve.families import CannotMake, Family
from mechdsl.resolve.in_progress import Work
from mechdsl.syntax import ast


def free_family(call: ast.Call, definition: spec.Direction, work: Work) -> Family | None:
    """`unembedding("…", "…")` or `saved("…", "…")`. Raises CannotMake."""
    texts = [str(constant(a.value, work.program.parameters)) for a in call.arguments]
    if call.name == "saved":
        raise CannotMake(call, "`saved` can't be read yet", "fit it: `mean_difference(A, B)`")
    tokens = [_token(call, text, work) for text in texts]
    words = " − ".join(f'"{text}"' for text in texts)
    vector = Unembedded(tokens[0], tokens[1] if len(tokens) > 1 else None)
    member = Member(definition.name, vector, f"unembedding of {words}")
    return Family(definition.name, (), {(): member}, work.model.shape.d_model, (definition.name,))


def _token(call: ast.Call, text: str, work: Work) -> int:
    ids = work.model.tokenizer.encode(text, add_special=False).ids
    if len(ids) != 1:
        raise CannotMake(
            call,
            f'"{text}" is {len(ids)} tokens, and each has a row of its own in the unembedding',
            "name texts of one token; a leading space is part of most words",
        )
    return ids[0]
