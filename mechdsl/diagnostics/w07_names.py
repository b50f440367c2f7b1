"""W073x: names and positions that look like mistakes but run."""

from dataclasses import dataclass

from mechdsl.diagnostics.core import Diagnostic


@dataclass(frozen=True, kw_only=True)
class UnusedName(Diagnostic):
    code = "W0730"
    title = "{kind} `{name}` is never used"
    label = "defined here"
    help = "remove it, or use it"
    kind: str
    name: str


@dataclass(frozen=True, kw_only=True)
class WritesFirstToken(Diagnostic):
    code = "W0731"
    title = "this rule writes at token 0, which may be the attention sink"
    label = "hits `{token}`"
    help = "a large effect there may come from the sink; `token 1..` of the text are safer"
    token: str
