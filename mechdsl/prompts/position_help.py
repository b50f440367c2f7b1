"""Help lines of position errors that need to know the prompts block."""

from __future__ import annotations

from collections.abc import Iterable

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.program.lower_images import IMAGE
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.rows import CLEAN
from mechdsl.syntax import ast


def unknown_span_hint(name: str, spans: Iterable[str], table: PromptTable) -> str:
    """What to write instead of a span that doesn't exist."""
    spans = sorted(set(spans))
    if table.sources and name in table.sources[0].block.names():
        return (
            f"`{name}` is a value, but its text isn't marked: write it as `{{{name}}}` in the "
            f"template, or add `span {name} in COLUMN`"
        )
    defined = table.sources[0].block.spec.spans if table.sources else ()
    if any(each.name.id == name and each.literal is not None for each in defined):
        return f"`span {name} = …` looks for its text in the prompts, and finds it in none"
    listed = name_list(spans)
    otherwise = f"there is {listed}" if spans else "write a placeholder: `{name}`"
    return did_you_mean(name, [*spans, "first", "last"], otherwise)


def occurrence_hint(ref: ast.SpanRef, least: int, table: PromptTable, run: str) -> str:
    """Which rows to keep so that all have an occurrence."""
    if table.runs[run].prompts is not None:
        return "name a position that both blocks have, or read one `onto` another"
    if any(row.image is not None for row in table.runs[run].rows[:1]) and ref.name == IMAGE:
        return "each row has one: write `image row 1 col 1 token`, or `each token of image`"
    count = _count_of(ref, table)
    if count is None:
        return "keep rows that have it with `where`, or name another position"
    gap = max(
        (
            clean - own
            for clean, own in zip(
                _counts(table, CLEAN, count), _counts(table, run, count), strict=True
            )
        ),
        default=0,
    )
    each = f"`each {ref.name} token`"
    return f"write `where {count} >= {least + gap}`, or {each}, from which short rows drop out"


def _count_of(ref: ast.SpanRef, table: PromptTable) -> str | None:
    """The name of the value that says how long the list is."""
    block = table.sources[0].block
    for name, definition in block.definitions.items():
        value = definition.value
        if not isinstance(value, ast.Call) or value.name != "list":
            continue
        positional = [a.value for a in value.arguments if a.name is None]
        items = positional[:1] == [ast.Name(ref.name or "", span=ref.span)]
        if items and ref.of in (None, name) and len(positional) > 1:
            count = positional[1]
            return count.id if isinstance(count, ast.Name) else None
    return None


def _counts(table: PromptTable, run: str, name: str) -> list[int]:
    values = (row.values.get(name) for row in table.runs[run].rows)
    return [v if isinstance(v, int) else 0 for v in values]
