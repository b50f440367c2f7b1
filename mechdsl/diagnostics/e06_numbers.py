"""E0621, E0622, E0631, W0750, W0751, W0762: numbers that can't be computed, or mislead."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class NotFinite(Diagnostic):
    """A model whose output is NaN, or infinite where a metric can't use that."""

    code = "E0621"
    title = "`{model}` gives NaN or infinity in the {run}, row {row} of `{prompts}`"
    label = "{where}"
    help = (
        "half precision may be too narrow: try `--dtype float32`; `--allow-nan` leaves such rows "
        "out of everything and counts them"
    )
    model: str
    run: str
    row: int
    prompts: str
    where: str


@keyword_record
class NothingToPickFrom(Diagnostic):
    """An experiment that needs the result of one that could not be computed."""

    code = "E0622"
    title = "`{experiment}` uses the results of `{of}`, which could not be computed"
    label = "needs {what}"
    help = "mend `{of}`, whose error stands above"
    experiment: str
    of: str
    what: str


@keyword_record
class RowsLeftOut(Diagnostic):
    """Rows that `--allow-nan` has left out."""

    code = "W0750"
    title = "{count} of {rows} rows of `{experiment}` are left out: NaN or infinity"
    label = "{listed}"
    help = "find out why: results on the rows that are left say nothing about these"
    experiment: str
    count: int
    rows: int
    listed: str


@keyword_record
class PickedBySign(Diagnostic):
    """A pick by sign that would be another one by size."""

    code = "W0751"
    title = "`{text}` picks by sign; by size it would be others"
    label = "picked: {picked}; by absolute value: {by_size}"
    help = (
        "where falls matter, let `{of}` measure the negative first: `measure -logit(answer) as "
        "delta`"
    )
    text: str
    picked: str
    by_size: str
    of: str


@keyword_record
class NoValue(Diagnostic):
    """A measure that is no number in a row of an unpatched run."""

    code = "E0631"
    title = "`{text}` has no value in {place}"
    label = "{reason}"
    help = "leave such rows out with `keep`, or measure what has a value in every row"
    text: str
    place: str
    reason: str


@keyword_record
class CellsWithoutValue(Diagnostic):
    """Cells that have no value, as the measure is no number in some of their rows."""

    code = "W0762"
    title = "`{text}` has no value in {count} of {cells} cells of `{experiment}`"
    label = "{reason}: first in the {place}"
    help = "measure what has a value in every row; in tables these cells are `–`"
    text: str
    count: int
    cells: int
    experiment: str
    reason: str
    place: str
