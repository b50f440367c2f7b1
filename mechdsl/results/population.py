"""What the rows of an experiment stand for, and the design that they were dealt by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.units import FEWEST_IN_STRATUM


def with_population(
    result: ExperimentResult, table: PromptTable, statistics: spec.Statistics
) -> ExperimentResult:
    """The result with its strata, and with the population that its intervals are about among its
    conventions; on the rows that are left, of all variants together.

    table: of the first variant. Where whole groups are drawn (`stats by`) there are no strata.
    """
    names: tuple[str, ...] = ()
    strata = None
    if statistics.by is None:
        strata, names = strata_of(result, table)
    words = population_words(table, names, statistics.by)
    return replace(
        result,
        strata=strata,
        population=words,
        conventions={**result.conventions, "population": words},
    )


def strata_of(result: ExperimentResult, table: PromptTable) -> tuple[Ints | None, tuple[str, ...]]:
    """[prompt] the combination of the evenly dealt values, and their names.

    Each stratum has `FEWEST_IN_STRATUM` distinct rows: the variable of most values goes until it
    is so, of equals the one that is defined last.
    """
    if not table.dealt or result.row_ids is None or result.row_keys is None:
        return None, ()
    values = dict(zip(table.row_ids, table.runs["clean"].rows, strict=True))
    columns = {
        name: [str(values[row].values[name]) for row in result.row_ids] for name in table.dealt
    }
    names = [name for name in columns if len(set(columns[name])) > 1]
    while names:
        codes = _codes([columns[name] for name in names])
        distinct = np.unique(np.stack([codes, np.array(result.row_keys)]), axis=1)[0]
        if np.bincount(distinct).min() >= FEWEST_IN_STRATUM:
            return codes, tuple(names)
        names.remove(max(reversed(names), key=lambda name: len(set(columns[name]))))
    return None, ()


def _codes(columns: Sequence[Sequence[str]]) -> Ints:
    numbers: dict[tuple[str, ...], int] = {}
    rows = zip(*columns, strict=True)
    return np.array([numbers.setdefault(row, len(numbers)) for row in rows], dtype=np.int64)


def population_words(table: PromptTable, strata: Sequence[str], by: str | None) -> str:
    """What intervals and p are about."""
    if by is not None:
        return f"new values of {by}"
    dealt = f"{_listed(strata)} dealt evenly" if strata else ""
    if table.data_hash:
        return "new rows like these"
    if table.whole:
        return "; ".join(filter(None, ["new rows like these, which are all of the design", dealt]))
    return ": ".join(filter(None, ["new rows of this design", dealt]))


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
