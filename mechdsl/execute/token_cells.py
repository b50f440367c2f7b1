"""Observations of all tokens at once: what is made of them, cut into cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.gathering import Gatherer, Joined, points_of
from mechdsl.execute.read_vectors import reader
from mechdsl.execute.token_vectors import token_vectors
from mechdsl.prompts.prompt_table import PositionCell, Run
from mechdsl.resolve.over_rows import OverTokens, SeenTokens, TokenVectors, every_token


def token_cells(
    gatherer: Gatherer, does: OverTokens
) -> Iterator[tuple[int, Ints, Callable[[], Mapping[str, Floats]]]]:
    """(cell, its columns among the kept rows, what gives [column] by the words of what is
    observed): the mean over a row's tokens there. What cells share is made once."""
    plan, rule, words = gatherer.plan, gatherer.rule, (does.word, *does.controls)
    names = [axis.name for axis in plan.experiment.axes]
    value = np.zeros(plan.n_cells, dtype=np.int64)
    value = plan.coordinates[names.index(does.counts)] if does.counts in names else value
    for cells, seen in _tokens(gatherer):
        values = cache(partial(does.per_token, seen, plan.experiment.seed))
        for cell in cells:
            row, index = seen.own.at(rule.positions[rule.position_of_cell[cell]])
            there, starts = np.unique(row, return_index=True)
            if len(there):
                columns = np.searchsorted(gatherer.kept, seen.own.prompts[there])
                number = int(value[cell])
                yield cell, columns, partial(_means, words, values, number, index, starts)


def _means(
    words: Sequence[str],
    values: Callable[[], Sequence[Floats]],
    number: int,
    index: Ints,
    starts: Ints,
) -> dict[str, Floats]:
    """By word [row]: of one of its values at some tokens, those of each row from `starts` on."""
    sizes = np.diff(starts, append=len(index))
    found = (np.add.reduceat(each[number, index], starts) / sizes for each in values())
    return dict(zip(words, found, strict=True))


def _tokens(gatherer: Gatherer) -> Iterator[tuple[list[int], SeenTokens]]:
    """(cells of the same sites, all tokens of these cells), of those that have any."""
    rule, runs, known = gatherer.rule, gatherer.runs, gatherer.known
    base = runs.named(gatherer.plan.experiment.spec.base)
    spot = every_token(rule.positions)
    rows = gatherer.kept[[bool(spot.hits[row]) for row in gatherer.kept.tolist()]]
    due = [cell for cell in range(gatherer.plan.n_cells) if cell not in known]
    size = sum(len(tokens) for row in rows.tolist() for tokens in spot.hits[row])
    for some in gatherer.fitting(due, size) if size else ():
        wanted = list(dict.fromkeys(gatherer.sites[cell] for cell in some))
        own = _of_run(gatherer, wanted, spot, base, rows)
        other: dict[Joined, TokenVectors] = {}
        if rule.rule.does.reads == "run":
            read = runs.named(rule.rule.run)
            other = _of_run(gatherer, wanted, every_token(rule.sources), read, rows)
        training = _of_training(gatherer, wanted)
        for sites in wanted:
            cells = [cell for cell in some if gatherer.sites[cell] == sites]
            yield cells, SeenTokens(own[sites], other.get(sites), training.get(sites))


def _of_run(
    gatherer: Gatherer, wanted: Sequence[Joined], spot: PositionCell, run: Run, rows: Ints
) -> dict[Joined, TokenVectors]:
    """Of each of the sites, at all tokens of a position in some rows."""
    runs = gatherer.runs
    keys = gatherer.keys([spot], rows, [run], runs.table)
    lanes = runs.reader(run, points_of(wanted))
    forget = runs.forget if run.derived is not None else None
    return token_vectors(runs.model_of(run), run, lanes, wanted, spot, rows, keys, forget)


def _of_training(gatherer: Gatherer, wanted: Sequence[Joined]) -> dict[Joined, TokenVectors]:
    """The same of the rows that it is fitted on, where these are others."""
    own, runs = gatherer.does.trained_on, gatherer.runs
    if own is None:
        return {}
    spot, model = every_token(own.cells), runs.model_of(own.run)
    rows = np.flatnonzero([bool(hits) for hits in spot.hits])
    keys = gatherer.keys([spot], rows, [own.run], own.table)
    points = points_of(wanted)
    lanes = reader(model, own.table, own.run, points, seed=runs.seed, side=runs.side)
    return token_vectors(model, own.run, lanes, wanted, spot, rows, keys)
