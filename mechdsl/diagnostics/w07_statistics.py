"""W0720, W0722: results that say little, or less than it seems."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class TooFewPrompts(Diagnostic):
    code = "W0720"
    hangs_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "{about}"
    label = "the smallest p is {smallest}, corrected ({correction}, {cells} cells) {corrected}"
    help = "take more {unit}s, sweep fewer cells, or see the p values as a description only"
    about: str
    """Which cells, and how few prompts they have."""
    smallest: str
    correction: str
    corrected: str
    cells: int
    unit: str = "prompt"
    """What a row is: a prompt or an image."""


@keyword_record
class ExplainedByValues(Diagnostic):
    """Rows that differ by one value of the prompts more than by all the rest."""

    code = "W0722"
    title = "`{name}` explains {share} of what rows of `{label_of}` differ by"
    label = "for values that weren't run, effective n is {values} values of `{name}`, not {n} rows"
    help = "{line}, so that intervals and p hold for new values; without it they hold for new rows "
    help += "with these {values}"
    name: str
    share: str
    label_of: str
    values: int
    n: int
    line: str
