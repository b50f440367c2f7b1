"""What `report overlay` draws on: the tokens of prompts, or images, and what cells hit of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress, product
from typing import Any

import numpy as np

from mechdsl.base.arrays import Bools, Ints
from mechdsl.images.files import NotRead
from mechdsl.images.picture import Picture
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import RunRow
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.seen_image import SHOWN, SeenImage

Hits = tuple[tuple[int, ...], ...]


def overlaid(experiment: ResolvedExperiment, kept: Ints, there: Bools) -> dict[str, Any]:
    """The tokens of every prompt, and which of them each cell hits; of rows that are images, the
    first of these too. Nothing where no report draws on them.

    kept: the rows. there: [cell] whether there is one.
    """
    asked = [report.top or SHOWN for report in experiment.spec.reports if report.kind == "overlay"]
    if not asked:
        return {}
    rows = [experiment.table.runs[experiment.spec.base].rows[i] for i in kept]
    texts = tuple(_texts(row, experiment) for row in rows)
    hits = _hits(experiment, [len(own) for own in texts], kept, there)
    found: dict[str, Any] = {"texts": texts, "hits": hits}
    if any(row.image is not None for row in rows):
        found["seen"] = _seen(experiment, kept, hits, max(asked))
    return found


def _texts(row: RunRow, experiment: ResolvedExperiment) -> tuple[str, ...]:
    """What each of its tokens is called."""
    tokenizer = experiment.model.tokenizer
    if row.image is not None and isinstance(tokenizer, ImageReader):
        return tuple(map(tokenizer.label, range(len(row.ids))))
    return tuple(
        ("" if row.special[p] else row.text[slice(*row.offsets[p])])
        or tokenizer.token_text(row.ids[p])
        for p in range(len(row.ids))
    )


def _hits(
    experiment: ResolvedExperiment, lengths: Sequence[int], kept: Ints, there: Bools
) -> tuple[Hits, ...]:
    """Per cell and prompt, the tokens that are hit."""
    names = [axis.name for axis in experiment.axes]
    made: dict[tuple[object, ...], Hits] = {}

    def hits(index: tuple[int, ...]) -> Hits:
        keys = [
            tuple(index[names.index(axis)] for axis in rule.positions.axes)
            for rule in experiment.rules
        ]
        if tuple(keys) not in made:  # cells of one position share their tuples
            cells = [r.positions.written[k] for r, k in zip(experiment.rules, keys, strict=True)]
            made[tuple(keys)] = tuple(
                tuple(
                    sorted({p for cell in cells for run in cell.hits[i] for p in run if p < length})
                )
                for i, length in zip(kept, lengths, strict=True)
            )
        return made[tuple(keys)]

    every = product(*(range(len(axis)) for axis in experiment.axes))
    return tuple(hits(index) for index in compress(every, there))


def _seen(
    experiment: ResolvedExperiment, kept: Ints, hits: Sequence[Hits], count: int
) -> tuple[SeenImage | None, ...]:
    """Per prompt its image; None behind the first `count` of those that any cell hits."""
    reader = experiment.model.tokenizer
    assert isinstance(reader, ImageReader)
    rows = experiment.table.runs["clean"].rows
    found: list[SeenImage | None] = []
    for place, row in enumerate(kept):
        picture, hit = rows[row].image, any(own[place] for own in hits)
        own = _image(picture, reader) if picture is not None and hit and count > 0 else None
        count -= own is not None
        found.append(own)
    return tuple(found)


def _image(picture: Picture, reader: ImageReader) -> SeenImage | None:
    """None of a file that can't be read any more."""
    from mechdsl.images.pixels import made_ready

    plain = replace(reader.processing, rescale=None, mean=None, std=None)
    try:
        values = made_ready(picture, plain)
    except NotRead:
        return None
    levels = np.moveaxis(values, 0, -1).round().clip(0, 255).astype(np.uint8)
    layout = reader.layout
    return SeenImage(picture.words, levels, len(layout.front), layout.rows, layout.cols)
