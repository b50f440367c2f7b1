"""W0720: results that will say little."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class TooFewPrompts(Diagnostic):
    code = "W0720"
    hangs_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "{about}"
    label = "the smallest p is {smallest}, corrected ({correction}, {cells} cells) {corrected}"
    help = "take more prompts, sweep fewer cells, or see the p values as a description only"
    about: str
    """Which cells, and how few prompts they have."""
    smallest: str
    correction: str
    corrected: str
    cells: int
