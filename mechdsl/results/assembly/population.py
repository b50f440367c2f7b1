"""The population that an experiment's rows represent, and warnings if they cover little of it.

If one value of the prompts explains most of the variance between rows, rows with an equal value are
nearly copies of one another. For inference to other values, the sample size is the number of
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import ExplainedByValues
from mechdsl.program import spec
from mechdsl.program.images import IMAGE_SPAN
from mechdsl.program.spec import TILE
from mechdsl.prompts.rows import PromptTable
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.measurements import (
    MIN_STRATUM_UNITS,
    CellStatistics,
    MeasureData,
    cells_by_view,
    effect_parts,
)
from mechdsl.vocab.metrics import EFFECTS


def add_population(
    result: ExperimentResult, table: PromptTable, statistics: spec.Statistics
) -> ExperimentResult:
    """Add the strata and, to the conventions, the population of the intervals; for the remaining
    rows of all variants together.

    Args:
        table: Prompts of the first variant. Resampling of whole groups (`stats by`) has no strata.
    """
    names: tuple[str, ...] = ()
    strata = None
    if statistics.by is None:
        strata, names = find_strata(result, table)
    words = population_text(table, names, statistics.by)
    return replace(
        result,
        strata=strata,
        population=words,
        conventions={**result.conventions, "population": words},
    )


def find_strata(
    result: ExperimentResult, table: PromptTable
) -> tuple[Ints | None, tuple[str, ...]]:
    """Return the strata, combinations of the evenly assigned values, shape [prompt], and their
    names.

    Each stratum needs `MIN_STRATUM_UNITS` distinct rows. Until then, the variable with the most
    values is dropped, or the last defined one of several.
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
        if np.bincount(distinct).min() >= MIN_STRATUM_UNITS:
            return codes, tuple(names)
        names.remove(max(reversed(names), key=lambda name: len(set(columns[name]))))
    return None, ()


def _codes(columns: Sequence[Sequence[str]]) -> Ints:
    numbers: dict[tuple[str, ...], int] = {}
    rows = zip(*columns, strict=True)
    return np.array([numbers.setdefault(row, len(numbers)) for row in rows], dtype=np.int64)


def population_text(table: PromptTable, strata: Sequence[str], by: str | None) -> str:
    """Describe the population of intervals and p-values."""
    if by is not None:
        return f"new values of {by}"
    dealt = f"{_name_list(strata)} dealt evenly" if strata else ""
    if table.data_hash:
        return "new rows like these"
    if table.whole:
        return "; ".join(filter(None, ["new rows like these, which cover the whole design", dealt]))
    return ": ".join(filter(None, ["new rows of this design", dealt]))


def _name_list(names: Sequence[str]) -> str:
    """Format `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


WARNING_SHARE = 0.5
"""Share of explained variance from which a warning is given."""

F_TEST_LEVEL = 0.01
"""Level of the F test over all tested values; few rows have a large share by chance too."""


@dataclass(frozen=True)
class ExplainedVariance:
    """Share of the variance between rows that a value of the prompts explains."""

    name: str
    share: float
    values: int


def check_explained_variance(
    result: ExperimentResult, experiment: spec.Experiment, fixed: Sequence[str]
) -> list[Diagnostic]:
    """Report W0722 for the measure and the value of the prompts with the largest explained
    variance.

    Only the cell with the largest effect is tested, because claims rest on its rows. Other cells
    differ by less than what readers take from the table, and selecting a cell by the share would
    find a large one by chance.

    Args:
        fixed: Values that aren't reported, because the block declares all possible ones; a claim
            can't
            be about others.
    """
    by = result.settings.by if result.settings else None
    shares: list[tuple[ExplainedVariance, int, int]] = []
    for number, data in result.computed():
        if data.kind != "number" or not EFFECTS[data.effect].tested:
            continue  # a metric's value is expected to depend on the prompt
        cell = _largest_cell(data, result.statistics[number])
        if cell is None:
            continue
        rows, index = _distinct_rows(data, cell)
        columns = {
            name: [str(values[i]) for i in index.tolist()]
            for name, values in result.row_values.items()
        }
        names = columns.get(by or "")
        whole = [columns[name] for name in fixed if name in columns]
        of_tiles = by == IMAGE_SPAN and TILE in columns
        columns = {
            name: column
            for name, column in columns.items()
            if not any(_is_grouped_by(column, other) for other in (names, *whole))
            and not (of_tiles and _is_crossed(column, names))
        }
        best = largest_explained_variance(rows, columns)
        shares += [] if best is None else [(best, number, cell)]
    if not shares:
        return []
    best, number, cell = max(shares, key=lambda each: each[0].share)
    if by is not None:
        line = f"write `by {best.name}` instead of `by {by}` in the line `stats`"
    elif experiment.statistics.span.written.startswith("stats"):
        line = f"add `by {best.name}` to the line `stats`"
    else:
        line = f"write `stats by {best.name}`"
    return [
        ExplainedByValues(
            span=experiment.measures[number].span,
            name=best.name,
            share=_percent_text(best.share),
            label_of=result.measures[number].label,
            values=best.values,
            units=_units_text(result, number, cell),
            population="rows" if by is None else f"values of `{by}`",
            line=line,
        )
    ]


def largest_explained_variance(
    rows: Floats, columns: Mapping[str, Sequence[str]]
) -> ExplainedVariance | None:
    """Return the column that explains the largest share of these rows' variance, if it is more than
    half; of equal ones the first.

    The share is adjusted R² of the one-way analysis of variance, 1 − (SSW / (n − k)) / (SST / (n −
    1)). For meaningless columns it is 0 on average, however many values they have. The F test must
    be below `F_TEST_LEVEL` divided by the number of columns. Columns with one value, or with at
    least half as many values as rows, aren't tested.

    References:
        Fisher 1925; Ezekiel 1930.
    """
    n = len(rows)
    codes = {name: np.unique(column, return_inverse=True)[1] for name, column in columns.items()}
    tried = {
        name: code for name, code in codes.items() if 2 <= int(code.max(initial=0)) + 1 < n / 2
    }
    distinct = {tuple(_renumber(numbers)) for numbers in tried.values()}
    variances = [
        variance
        for name, numbers in tried.items()
        if (variance := _explained_share(rows, name, numbers, F_TEST_LEVEL / len(distinct)))
        is not None
    ]
    return max(variances, key=lambda explained_variance: explained_variance.share, default=None)


def _explained_share(
    rows: Floats, name: str, codes: Ints, level: float
) -> ExplainedVariance | None:
    from scipy.special import fdtrc  # not at the top: slow to import

    n, k = len(rows), int(codes.max()) + 1
    means = np.bincount(codes, rows, k) / np.bincount(codes, minlength=k)
    total = float(((rows - rows.mean()) ** 2).sum())
    within = float(((rows - means[codes]) ** 2).sum())
    if total <= 0:
        return None
    share = 1 - (within / (n - k)) / (total / (n - 1))
    ratio = np.inf if within <= 0 else ((total - within) / (k - 1)) / (within / (n - k))
    p = float(fdtrc(k - 1, n - k, ratio))
    return ExplainedVariance(name, share, k) if share > WARNING_SHARE and p < level else None


def _units_text(result: ExperimentResult, measure: int, cell: int) -> str:
    """Describe the effective sample size of a cell."""
    views = cells_by_view(result.measures[measure])
    seen = next(rows for cells, rows in views if cell in cells)
    word = result.sampling.unit_word(result.sampling.units(seen))
    return count_noun(int(result.statistics[measure].units[cell]), word)


def _percent_text(share: float) -> str:
    return "more than 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _renumber(codes: Ints) -> Iterator[int]:
    """Renumber codes in the order of their first row, so that equal partitions have equal codes."""
    numbers: dict[int, int] = {}
    for code in codes.tolist():
        yield numbers.setdefault(code, len(numbers))


def _is_crossed(column: Sequence[str], by: Sequence[str] | None) -> bool:
    """Whether a column differs within groups, so that it can't merge them."""
    return by is not None and len(set(zip(column, by, strict=True))) > len(set(by))


# --- rows -----------------------------------------------------------------------------------------


def _row_effects(data: MeasureData, cell: int) -> Floats:
    """Return the values whose mean is a cell's effect, shape [prompt]; for a ratio, the
    contributions to its error, because rows that agree on the ratio differ in the numerator."""
    parts = effect_parts(data, EFFECTS[data.effect], np.array([cell]))
    rows = parts.numerator[0]
    if parts.denominator is not None:
        under = parts.denominator[0]
        total = float(under.sum())
        rows = rows - (float(rows.sum()) / total if total else 0.0) * under
    return np.where(parts.present[0], rows, np.nan)


def _largest_cell(data: MeasureData, statistics: CellStatistics) -> int | None:
    """Return the cell with the largest mean that is neither rounding nor inert."""
    usable = ~data.inert & ~statistics.at_rounding
    sizes = np.where(usable & np.isfinite(statistics.mean), np.abs(statistics.mean), -1.0)
    cell = int(np.argmax(sizes)) if len(sizes) else 0
    return cell if len(sizes) and sizes[cell] > 0 else None


def _distinct_rows(data: MeasureData, cell: int) -> tuple[Floats, Ints]:
    """Return the distinguishable rows of a cell, each once, and their indices."""
    rows = _row_effects(data, cell)
    index = np.flatnonzero(np.isfinite(rows))
    if data.seen is not None:
        seen = data.seen[cell if len(data.seen) > 1 else 0][index]
        index = index[np.sort(np.unique(seen, return_index=True)[1])]
    rounding = 0.0
    if data.rounding is not None and len(index):
        own = data.rounding[cell if len(data.rounding) > 1 else 0][index]
        rounding = float(np.nan_to_num(own).max())
    row = rows[index]
    if not len(row) or float(row.std()) <= rounding:  # the differences are only rounding
        return row[:0], index[:0]
    return row, index


def _is_grouped_by(column: Sequence[str], by: Sequence[str] | None) -> bool:
    """Whether `stats by` already accounts for a column: rows of one value are in one group."""
    return by is not None and len(set(zip(column, by, strict=True))) == len(set(column))
