"""W073x: names and positions that look like mistakes but run."""

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.record import keyword_record


@keyword_record
class UnusedName(Diagnostic):
    code = "W0730"
    title = "`{name}` is never used"
    label = "{kind} defined here"
    help = "remove it, or use it"
    kind: str
    name: str


@keyword_record
class WritesFirstToken(Diagnostic):
    code = "W0731"
    title = "this rule writes at token 0, which may be the attention sink"
    label = "hits `{token}`"
    help = "a large effect there may come from the sink; `token 1..` of the text are safer"
    token: str


@keyword_record
class PatchesItself(Diagnostic):
    """Source and base are one run: what is written is there already."""

    code = "W0732"
    title = "this rule patches `{run}` into itself"
    label = "writes what is there already"
    help = "name two runs, as in `from clean into CORRUPTION`, unless this is a control"
    run: str
