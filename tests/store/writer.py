"""A process that writes to a store and prints a line after each stored block.

`python -m tests.store.writer FOLDER --blocks 4 --finish`; the content of block `i` is known
(`block_of`), so values found later can be verified.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mechdsl.store import files
from mechdsl.store.runs import CachedValues, ValueBlock
from mechdsl.store.store import Store
from tests.store.support import block, cells, values_of

KEY = "key"
SIZES = {"rows": 7}
CONTENT = {"results.json": b'{"what": "it gave"}', "arrays/values.bin": bytes(range(256)) * 40}
EVERY = 3
"""Cells of a block that no other block has."""
SHARED = cells(1, start=1_000_000)[0]
"""A cell of all blocks; block `i` has its row `i`."""


def value(number: int, row: int) -> float:
    return number * 100 + row + 0.25


def block_of(number: int) -> ValueBlock:
    """Return a block: three cells of this block alone with two rows, and the shared cell."""
    values = {
        cell: {row: value(number * EVERY + place, row) for row in (1, 2)}
        for place, cell in enumerate(cells(EVERY, start=number * EVERY))
    }
    return block({**values, SHARED: {number: value(-1, number)}})


def cells_of(blocks: int) -> list[bytes]:
    """Return the cells of this number of blocks."""
    return [*cells(EVERY * blocks), SHARED]


def blocks_in(found: CachedValues, blocks: int) -> set[int]:
    """Return the numbers of complete blocks; assert that no value is wrong or block partial."""
    values = values_of(found)
    right = {number: values_of_block(number) for number in range(blocks)}
    whole: set[int] = set()
    for number, expected in right.items():
        there = {
            (cell, row): values[cell][row] for cell, row in expected if row in values.get(cell, {})
        }
        assert there in ({}, expected), f"block {number} is there in part, or wrong"
        if there:
            whole.add(number)
    rows = {(cell, row) for cell, of in values.items() for row in of}
    assert rows == {place for number in whole for place in right[number]}, "a row of no block"
    return whole


def values_of_block(number: int) -> dict[tuple[bytes, int], tuple[float, ...]]:
    made = block_of(number)
    return {
        (cell, int(made.rows[place])): tuple(map(float, made.values[place]))
        for nth, cell in enumerate(made.cells)
        for place in range(int(made.starts[nth]), int(made.starts[nth + 1]))
    }


def spoil(what: str) -> None:
    """Disable one of the steps that make writes durable; tests must detect it."""
    if what == "files":
        files.os = type("os", (), {**vars(os), "fsync": staticmethod(lambda _: None)})  # type: ignore[attr-defined]
    elif what == "names":
        from mechdsl.store import files as blobs

        blobs.sync_folder = files.sync_folder = lambda _: None
    elif what == "index":
        prepare = files.Index._prepare

        def unsynced(self: files.Index) -> None:
            prepare(self)
            self._connection.execute("PRAGMA synchronous = OFF")

        files.Index._prepare = unsynced


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--spoil", default="")
    given = parser.parse_args()
    spoil(given.spoil)
    say("ready")
    with Store(given.folder) as store, store.begin(given.key, {"file": "a.mech"}) as run:
        run.settle(SIZES)
        say("settled")
        for number in range(given.start, given.start + given.blocks):
            run.keep(block_of(number))
            say(f"kept {number}")
        if given.finish:
            run.finish(CONTENT, {"done": True})
            say("finished")


if __name__ == "__main__":
    main()
