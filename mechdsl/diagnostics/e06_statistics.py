"""E0604 to E0607: statistics, expectations and reports."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class ZeroDenominator(Diagnostic):
    code = "E0604"
    title = "the denominator of `{effect}` cannot be told from 0"
    label = "{divisor} is {mean} over {n} rows, {confidence} % interval {low} to {high}"
    help = "measure `as delta`, take more rows, or a metric and a corruption that separate the runs"
    effect: str
    divisor: str
    mean: str
    low: str
    high: str
    confidence: str
    n: int


@keyword_record
class WhichMeasure(Diagnostic):
    code = "E0605"
    title = "which of the {count} measures is meant by `{text}`?"
    label = "could be {candidates}"
    help = "{hint}"
    text: str
    count: int
    candidates: str
    hint: str


@keyword_record
class UnreadableExpectation(Diagnostic):
    code = "E0606"
    title = "this expectation cannot be decided: {reason}"
    help = "{hint}"
    reason: str
    hint: str


@keyword_record
class BadReport(Diagnostic):
    code = "E0607"
    hangs_on = frozenset({"columns"})
    title = "`report {kind}` {reason}"
    help = "{hint}"
    kind: str
    reason: str
    hint: str
