"""E0341, E0641: directions that can't be made, or don't go where they are written."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class BadDirection(Diagnostic):
    """A direction that can't be made as it is written, or doesn't fit where it is used."""

    code = "E0341"
    title = "no direction: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str


@keyword_record
class EmptyDirection(Diagnostic):
    """A fit that gave no direction."""

    code = "E0641"
    title = "direction `{name}` {reason}"
    label = "{made}"
    help = "{hint}"
    name: str
    reason: str
    made: str
    hint: str
