"""What a row or record is made of, as a number that its place in a file has nothing to do with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.values import Record

BITS = 63
"""Of a key, so that it fits into a column of integers."""


def content_key(values: Mapping[str, object], texts: Iterable[object] = ()) -> int:
    """A number in 0..2^63-1, equal for equal values and texts, whatever order the names are in.

    values: plain, by name.
    """
    return stable_hash(_written(dict(values)), *map(_written, texts)) >> (128 - BITS)


def _written(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


class ByContent:
    """Records in an order that hangs on what is in them: what is drawn among them, and which of
    them a limit takes, is the same however the file is sorted."""

    def __init__(self, records: Sequence[Record]) -> None:
        keys = [content_key(record) for record in records]
        self.keys = keys
        """By number of the record."""
        self.order = sorted(range(len(keys)), key=lambda number: (keys[number], number))
        """Numbers of the records."""
        self.rank = [0] * len(keys)
        """By number of the record, its place in `order`."""
        self.copies = [0] * len(keys)
        """By number of the record, how many equal ones come before it."""
        seen: Counter[int] = Counter()
        for place, number in enumerate(self.order):
            self.rank[number] = place
            self.copies[number] = seen[keys[number]]
            seen[keys[number]] += 1
