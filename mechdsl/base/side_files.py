"""Strict reader of the files that a `.mech` file names: configurations, circuits, groups.

pydantic models take a while to build, so this module is imported on use.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile, load_object
from mechdsl.base.limits import is_whole_number


def _whole(value: object) -> object:
    """Return 32 for 32.0, as other tools write counts."""
    return int(value) if is_whole_number(value) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=limits.SIZE * limits.HEADS)]
"""A whole number of at least 1."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SideFile(BaseModel):
    """The entries of a file that are read, without conversions; others are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


_FORMS = {
    "dict": "an object",
    "model": "an object",
    "list": "a list",
    "string": "a text",
    "bool": "`true` or `false`",
    "float": "a number",
    "finite": "a finite number",
    "too": "a list with an entry",
}
"""First word of an error of pydantic → the form of a correct entry; others concern counts."""

FileT = TypeVar("FileT", bound=SideFile)


def parse_object(content: bytes, written: str) -> dict[str, Any]:
    """Parse a JSON object with unique keys and finite numbers.

    Args:
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: The content is anything else.
    """
    try:
        return load_object(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(
            f"`{written}` can't be read: {error}", "write the file again"
        ) from None


def check_entries(model: type[FileT], entries: object, written: str, *, hint: str = "") -> FileT:
    """Check the entries of a file, and return them.

    Args:
        written: The path as the user wrote it.
        hint: The fix; empty for what the first wrong entry must be.

    Raises:
        UnreadableFile: An entry is missing, or has another type or range.
    """
    try:
        return model.model_validate(entries)
    except ValidationError as problem:
        error = max(problem.errors(include_url=False), key=lambda each: len(each["loc"]))
    names = [str(part) for part in error["loc"] if not str(part).endswith("]")]
    name = ".".join(names)[:120] or "content"
    if error["type"] == "missing":
        raise UnreadableFile(f"`{written}` has no `{name}`", hint or "write the file again")
    kind = error["type"].partition("_")[0]
    must = f"it must be {_FORMS.get(kind, 'a whole number of at least 1')}"
    reason = f"`{name}` of `{written}` is {repr(error['input'])[:80]}"
    raise UnreadableFile(reason, hint or must)
