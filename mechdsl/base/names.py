"""Names and texts of a file in messages."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice

SHOWN = 12
"""Names of a list that are shown."""
WIDTH = 40
"""Characters of a name that are shown."""


def shortened(name: str) -> str:
    """The name, or its beginning where it is long."""
    return name if len(name) <= WIDTH else f"{name[: WIDTH - 1]}…"


def quoted(text: str) -> str:
    """A text for a message, its white space visible."""
    shown = text if len(text) <= WIDTH else text[: WIDTH - 3] + "…"
    return "`" + shown.replace("\n", "\\n").replace("\t", "\\t") + "`"


def name_list(names: Iterable[str]) -> str:
    """`` `a`, `b`, `c` ``, empty where there is none; of many the first ones."""
    found = list(islice(names, SHOWN + 1))
    more = " …" if len(found) > SHOWN else ""
    return ", ".join(f"`{shortened(name)}`" for name in found[:SHOWN]) + more


AT = " at "
"""What stands between the name of a measure and the position that tells it from another."""


def names_of_measure(label: str) -> tuple[str, ...]:
    """What a measure may be called by: `ld at item 1 token` also by `ld`.

    A text in quotes may have an ` at ` of its own; what is cut off there is no metric's name.
    """
    parts = label.split(AT)
    return tuple(AT.join(parts[:end]) for end in range(len(parts), 0, -1))


SHUFFLED = " shuffled"
"""What a run of another block is called by besides, whose rows are dealt."""


def run_called(name: str, runs: Collection[str]) -> str | None:
    """The run of this name: of the two that another block may have, the one that is paired by
    number; None where there is neither."""
    return next((run for run in (name, name + SHUFFLED) if run in runs), None)
