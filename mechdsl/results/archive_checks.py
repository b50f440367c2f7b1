"""Whether results that anybody may have written hang together: every number has its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base import limits
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.statistics.measure_data import MeasureData
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.reports import REPORTS

_NAME = re.compile(r"\w[^/\\\0]*")
"""What may be the name of a file, wherever that lies."""
RESAMPLES = range(100, 1_000_001)
"""That a file can ask for."""


def check_file(file: FileResult) -> None:
    """ValueError where an array has another shape than the cells and prompts that it is of, or
    something refers to what isn't there."""
    names = [each.name for each in file.experiments]
    if len({*names}) < len(names):
        raise ValueError("two experiments have one name")
    for experiment in file.experiments:
        for right in _checks(experiment):
            if not right:
                raise ValueError(f"the parts of `{experiment.name:.100}` don't fit together")


def _checks(found: ExperimentResult) -> Iterator[bool]:
    cells, prompts = len(found.cells), found.prompts
    yield _NAME.fullmatch(found.name) is not None
    yield cells <= limits.CELLS and prompts <= limits.ROWS
    yield all(own.coords.keys() >= {*found.axes} for own in found.cells)
    for data in found.measures:
        yield from _of_measure(data, cells, prompts)
    yield len(found.statistics) in (0, len(found.measures))
    yield len(found.controls) in (0, len(found.measures))
    for arrays in (*found.statistics, *(band for band in found.controls if band is not None)):
        yield all(array.shape == (cells,) for array in _arrays(arrays))
    yield all(len(each.reasons) == cells for each in found.statistics)
    for own in found.runs.values():
        yield all(values.shape == (prompts,) for values in own.values())
    yield from _of_accuracies(found)
    yield all(keys is None or len(keys) == prompts for keys in (found.row_ids, found.row_keys))
    yield found.strata is None or found.strata.shape == (prompts,)
    yield all(len(values) == prompts for values in found.row_values.values())
    yield from _of_overlay(found)
    yield from _of_images(found)
    yield from _of_replies(found)
    if found.drawn is not None:
        yield len(found.drawn.values) == len(found.measures)
        yield all(v.ndim == 3 and v.shape[1:] == (cells, prompts) for v in found.drawn.values)
        yield found.drawn.counts.shape == (cells,)
    yield all(report.kind in REPORTS for report in found.reports)
    if found.settings is not None:
        yield found.settings.resamples in RESAMPLES and 0 < found.settings.confidence < 100


def _of_measure(data: MeasureData, cells: int, prompts: int) -> Iterator[bool]:
    yield data.effect in EFFECTS
    yield data.patched.shape == (cells, prompts)
    for array in (data.base, data.source, data.truth, data.rounding, data.seen):
        yield array is None or array.shape in ((1, prompts), (cells, prompts))
    yield data.inert.shape == (cells,)
    yield len(data.gaps) in (0, cells)


def _of_accuracies(found: ExperimentResult) -> Iterator[bool]:
    for run, values in found.accuracy.items():
        yield values.ndim == 1 and len(values) <= limits.ROWS
        for other in (found.accuracy_rounding, found.accuracy_units):
            yield run not in other or other[run].shape == values.shape
        ids = found.accuracy_rows.get(run)
        yield (found.prompts if ids is None else len(ids)) == len(values)


def _of_overlay(found: ExperimentResult) -> Iterator[bool]:
    yield len(found.texts) in (0, found.prompts)
    yield len(found.hits) in (0, len(found.cells))
    lengths = [len(text) for text in found.texts]
    for hits in {id(each): each for each in found.hits}.values():
        yield len(hits) == len(lengths)
        yield all(
            0 <= place < length for own, length in zip(hits, lengths, strict=False) for place in own
        )


def _of_images(found: ExperimentResult) -> Iterator[bool]:
    """Images are as large as they may be, and their tokens are those of the prompt."""
    yield len(found.seen) in (0, found.prompts)
    for own, text in zip(found.seen, found.texts, strict=False):
        if own is not None:
            shape = own.pixels.shape
            yield len(shape) == 3 and shape[2] == 3 and prod(shape) <= limits.IMAGE_PIXELS
            yield 0 < own.rows <= shape[0]
            yield 0 < own.cols <= shape[1]
            yield own.front >= 0
            yield own.front + own.rows * own.cols == len(text)


def _of_replies(found: ExperimentResult) -> Iterator[bool]:
    """Every reply is of a prompt, and there is one at least where there is an entry."""
    written = found.replies
    yield len(written.cells) in (0, len(found.cells))
    for texts in (*written.cells, *written.runs.values()):
        yield texts.keys() <= written.prompts.keys()
        yield all(texts.values())


def _arrays(of: Any) -> Iterator[NDArray[Any]]:
    for each in fields(of):
        value = getattr(of, each.name)
        if isinstance(value, np.ndarray):
            yield value
