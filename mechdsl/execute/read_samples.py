"""What a readout finds in rows that wrote, averaged over their samples."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.reply import Reply
from mechdsl.execute.found import Found, Gap
from mechdsl.execute.readout import Reading, Readout


def read_samples(
    readout: Readout,
    reading: Reading,
    written: Sequence[tuple[Reply, ...]],
    relative: float = 0.0,
    *,
    skip: Collection[int] = (),
) -> Found:
    """`Readout.read`, averaged over the texts that each row wrote; the same, where none did."""
    if not written:
        return readout.read(reading, relative, skip=skip)
    every = [
        readout.read(replace(reading, replies=replies), relative, skip=skip)
        for replies in zip(*written, strict=True)
    ]
    count = len(every)

    def beside(parts: Sequence[Sequence[Floats]]) -> list[Floats]:
        return [np.stack(own, axis=1).reshape(-1) for own in zip(*parts, strict=True)]

    gaps = {
        n: Gap(np.concatenate([own.rows * count + at for at, own in found]), found[0][1].reason)
        for n in range(len(readout.measures))
        if (found := [(at, each.gaps[n]) for at, each in enumerate(every) if n in each.gaps])
    }
    failed = {
        n: replace(each, row=None if each.row is None else each.row * count)
        for one in every
        for n, each in one.failed.items()
    }
    found = Found(
        beside([each.values for each in every]),
        np.stack([each.broken for each in every], axis=1).reshape(-1),
        beside([each.rounding for each in every]),
        failed,
        gaps,
    ).over_draws(count)
    return replace(found, replies=written)
