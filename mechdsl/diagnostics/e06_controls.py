"""E063x: controls that an experiment is set against."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class BadControl(Diagnostic):
    """Random targets that can't be drawn."""

    code = "E0630"
    title = "`{text}` can't be drawn: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str
