"""`classes "a photo of a {kind}"`: the texts that images are told apart by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from mechdsl.base import limits
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_data import TooMany
from mechdsl.prompts.expressions import bad
from mechdsl.prompts.names_used import draws, uses
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.values import Value

if TYPE_CHECKING:
    from mechdsl.prompts.prompts_block import PromptsBlock
    from mechdsl.prompts.rows import Row


def class_texts(block: PromptsBlock, row: Row) -> tuple[tuple[str, ...], list[Diagnostic]]:
    """The text with all values of the names in it, whichever rows there are, equal ones once.

    row: any row of the block. Codes: E0503, E0506 and those of values.
    """
    node = block.spec.classes
    if node is None:
        return (), []
    used = dict.fromkeys(use.name for use in uses(node, block.placeholders))
    names = [name for name in used if name not in block.parameters]
    of_rows = (*block.columns, *(name for name, _ in block.axes))
    odd = next((name for name in names if name not in of_rows), None)
    hint = "name values with a domain (`kind in [...]`) and columns"
    try:
        if odd is not None or draws(node, block.placeholders):
            reason = f"`{odd}` is made of other values" if odd else "it is drawn row by row"
            raise bad(node.span, reason, hint)
        found: dict[str, None] = {}
        for values in _combinations(block, names, node.span.text):
            text = row.with_values(values).as_text(node, Key("classes"))
            if not isinstance(text, str) or not text.strip():
                raise bad(node.span, "it is empty", "write a text for each class")
            found[text.strip()] = None
    except Refusal as refusal:
        return (), [refusal.diagnostic("every row")]
    return tuple(found), []


def _combinations(
    block: PromptsBlock, names: list[str], text: str
) -> Iterator[Mapping[str, Value]]:
    """Each value of each name with each of the others."""
    axes = dict(block.axes)
    values = [axes[name] if name in axes else block.column(name) or () for name in names]
    amount = prod(map(len, values))
    if amount > limits.CLASSES:
        assert block.spec.classes is not None
        raise Refusal(
            TooMany,
            block.spec.classes.span,
            what=f"`{text}`",
            amount=f"{amount:,} classes",
            most=limits.CLASSES,
            hint="name values with fewer different ones",
        )
    for each in product(*values):
        yield dict(zip(names, each, strict=True))
