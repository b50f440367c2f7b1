"""Directions that aren't read off activations: of the unembedding, or saved in a file."""

from __future__ import annotations

from hashlib import sha256

from mechdsl.base import limits
from mechdsl.base.json_text import load_json
from mechdsl.base.names import name_list
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.named_paths import SAVED, path_to_read
from mechdsl.resolve.direction_types import Member, SavedVector, Unembedded
from mechdsl.resolve.families import CannotMake, Family
from mechdsl.resolve.in_progress import Work
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
        size = path.stat().st_size
        if size > limits.DIRECTION_FILE:
            most = f"{limits.DIRECTION_FILE:,}"
            raise CannotMake(call, f"`{written}` has more than {most} bytes", "save it by itself")
        content = path.read_bytes()
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise CannotMake(call, reason, "paths start from the folder of the file") from None
    shapes = _shapes(call, written, content)
    if key not in shapes:
        known = name_list(list(shapes)) or "none"
        raise CannotMake(call, f"`{written}` has no `{key}`", f"it has {known}")
    if len(shapes[key]) != 1:
        reason = f"`{key}` has the shape {list(shapes[key])}, not [width]"
        raise CannotMake(call, reason, "save one vector under a name of its own")
    digest = sha256(content).hexdigest()
    made = f"`{key}` of {written}, SHA-256 {digest[:12]}…"
    member = Member(definition.name, SavedVector(path, key, digest), made)
    return Family(definition.name, (), {(): member}, shapes[key][0], (definition.name,))


def _shapes(call: ast.Call, written: str, content: bytes) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a safetensors file, by its header: 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, tuple[int, ...]] = {}
    try:
        header = load_json(content[8 : 8 + length].decode("utf-8"))
        for name, entry in header.items():
            if name != "__metadata__":
                if entry["dtype"] not in ("F16", "BF16", "F32", "F64"):
                    continue
                found[name] = tuple(int(size) for size in entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"`{written}` is no safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise CannotMake(call, reason, hint) from None
    return found


def _token(call: ast.Call, text: str, work: Work) -> int:
    ids = work.model.tokenizer.encode(text, add_special=False).ids
    if len(ids) != 1:
        raise CannotMake(
            call,
            f'"{text}" is {len(ids)} tokens, and each has a row of its own in the unembedding',
            "name texts of one token; a leading space is part of most words",
        )
    return ids[0]
