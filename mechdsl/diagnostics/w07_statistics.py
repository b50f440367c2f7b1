"""W0720: results that will say little."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class TooFewPrompts(Diagnostic):
    code = "W0720"
    hangs_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "with {n} prompts no cell can survive the correction"
    label = "the smallest p is {smallest}, corrected ({correction}, {cells} cells) {corrected}"
    help = "take more prompts, sweep fewer cells, or see the p values as a description only"
    n: int
    smallest: str
    correction: str
    corrected: str
    cells: int
