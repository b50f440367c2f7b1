"""W073x: names and positions that look like mistakes but run."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class UnusedName(Diagnostic):
    """A name that nothing refers to."""

    code = "W0730"
    title = "`{name}` is never used"
    label = "{kind} defined here"
    help = "remove it, or use it"
    kind: str
    name: str


@keyword_record
class HidesMetric(Diagnostic):
    """A metric of the file has the name of one of the language, and takes its place."""

    code = "W0734"
    title = "metric `{name}` has the name of a metric of the language"
    label = "`{name}` alone means this in the file"
    help = "give it another name, unless it shall take the place of the other"
    name: str


@keyword_record
class WritesFirstToken(Diagnostic):
    """A write at what may be the attention sink."""

    code = "W0731"
    hangs_on = frozenset({"tokens"})
    title = "this rule writes at token 0, which may be the attention sink"
    label = "hits `{token}`"
    help = "an effect there may come from the sink alone: name a later token, or compare with one"
    token: str


@keyword_record
class PatchesItself(Diagnostic):
    """Source and base are one run: what is written is there already."""

    code = "W0732"
    title = "this rule patches `{run}` into itself"
    label = "writes what is there already"
    help = "name two runs, as in `from clean into CORRUPTION`, unless this is a control"
    run: str


@keyword_record
class OtherTokens(Diagnostic):
    """Tokens counted alike in prompts of different lengths, which are other words there."""

    code = "W0760"
    title = "`{position}` means other tokens in `{source}` than in `{base}`"
    label = "token {number} is `{theirs}` in `{source}` and `{own}` in `{base}`, in {rows} rows"
    help = (
        "the prompts differ in length: name tokens by their span, as in `last-item token`, or "
        "count from the end where they agree"
    )
    position: str
    source: str
    base: str
    number: str
    theirs: str
    own: str
    rows: str
