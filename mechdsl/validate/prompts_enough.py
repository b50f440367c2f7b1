"""How many prompts of each table a check without a run looks at, by what the file says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from mechdsl.base import limits
from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

_ROW_TO_TABLE = 4
"""How many times as long it takes to make a row as to put it into a table or to find a position."""
_ANY_PROMPT = 10
"""What any prompt costs, in parts of what the file says about it."""


def enough(program: spec.Program, prompts: int) -> int:
    """So many prompts of each table, or as few as can be looked at in reasonable time."""
    work = list(_work(program))
    while prompts > 1 and sum(min(n, prompts) * each for n, each in work) > limits.CHECKED_WORK:
        prompts = prompts * 9 // 10
    return prompts


def _work(program: spec.Program) -> Iterator[tuple[int, int]]:
    """For each table and each block: prompts at most, and what is done with each of them."""
    longest: dict[str, int] = {}
    tables: dict[tuple[str, str, int | None, str | None, int], int] = {}
    for each in program.experiments:
        block = program.prompts.get(each.prompts)
        if block is None:
            continue
        count = (each.limit or limits.ROWS) * (1 + len(block.corruptions))
        longest[block.name] = max(count, longest.get(block.name, 0))
        key = (block.name, each.model, each.limit, each.part, count)
        said = _parts((each.every_rule, each.measures, each.keep, each.expects))
        draws = 2 * limits.CHECKED_DRAWS * _ANY_PROMPT if each.against is not None else 0
        tables[key] = tables.get(key, _parts(block)) + said + draws
    for (*_, count), parts in tables.items():
        yield count, _ANY_PROMPT + parts // _ROW_TO_TABLE
    for name, count in longest.items():
        yield count, _ANY_PROMPT + _parts(program.prompts[name])


def _parts(part: object) -> int:
    """How much the file says, without the domains of values, which are worked out once."""
    match part:
        case ast.Node():
            nodes = list(walk(part))
            slow = sum(isinstance(node, ast.Except) or _draws(node) for node in nodes)
            return len(nodes) + slow * _ANY_PROMPT // 2 + part.span.text.count("{")
        case tuple():
            return sum(map(_parts, cast("tuple[object, ...]", part)))
        case spec.Spec():
            names = type(part).model_fields.keys() - {"domain"}
            own = _ANY_PROMPT if isinstance(part, spec.TextDef) else 1  # texts are tokenised
            return own + sum(_parts(getattr(part, name)) for name in names)
        case _:
            return 0


def _draws(node: ast.Node) -> bool:
    return isinstance(node, ast.Call) and node.name == "list"
