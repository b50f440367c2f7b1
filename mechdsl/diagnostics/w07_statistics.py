"""W0720, W0722, W0723: results that say little, or less than it seems."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class TooFewPrompts(Diagnostic):
    code = "W0720"
    hangs_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "{about}"
    label = "{reach}"
    help = "take more {unit}s, sweep fewer cells, or see the p values as a description only"
    about: str
    """Which cells, and how few prompts they have."""
    reach: str
    """How small p can be with so many."""
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


@keyword_record
class SkewedFamily(Diagnostic):
    """Effects whose corrected p would be below the level too often."""

    code = "W0723"
    title = "effects of `{experiment}` are too skewed to say which of {cells} cells survive"
    label = "over {units} {unit}s, more than 1 in 20 such experiments would find one by chance"
    help = "take more {unit}s, measure a difference of logits in place of a probability or a loss, "
    help += "or write `expect max(…) > 0`, whose bounds hold"
    experiment: str
    cells: int
    units: int
    unit: str = "prompt"
    """What a row is: a prompt or an image."""
