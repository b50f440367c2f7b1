"""What rows are made of, for functions that are given other values of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mechdsl.prompts.names_used import uses
from mechdsl.prompts.python_values import Names, python_calls

if TYPE_CHECKING:
    from mechdsl.prompts.prompts_block import PromptsBlock


def parts_of(block: PromptsBlock) -> Iterator[tuple[Names | None, Any]]:
    """What rows are made of, each part with the names that a function in it is given.

    A value sees those that stand above it in the file and hang on nothing from it on, so that no
    value hangs on itself; texts, conditions and corruptions see all values.
    """
    given = (*block.columns, *(name for name, _ in block.axes))
    definitions = list({id(d): d for d in block.definitions.values()}.values())
    places = {name: n for n, d in enumerate(definitions) for name in d.names}
    below = len(definitions)
    places |= {name: below for name in block.texts if name not in places}
    for template in block.templates:
        places |= {name: below for name in template.definitions if name not in places}
    last: dict[int, int] = {below: below}

    def reach(number: int) -> int:
        """The last definition in the file that one hangs on, itself included."""
        if number not in last:
            last[number] = number
            used = {use.name for use in uses(definitions[number].value, block.placeholders)}
            last[number] = max([number, *(reach(places[n]) for n in used if n in places)])
        return last[number]

    for number, definition in enumerate(definitions):
        if not python_calls(definition.value):
            continue
        above = [n for n in range(number) if reach(n) < number]
        yield (*given, *(name for n in above for name in definitions[n].names)), definition.value
    every = (*given, *(name for definition in definitions for name in definition.names))
    settled = tuple(n for n in every if n not in places or reach(places[n]) < below)
    for node in (*block.texts.values(), *block.spec.where):
        yield settled, node
    for corruption in block.spec.corruptions:
        yield None, corruption.changes
