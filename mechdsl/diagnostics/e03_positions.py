"""E0305 to E0315: positions in a text. Counts are rows of the prompts block."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class RaggedPositions(Diagnostic):
    code = "E0305"
    hangs_on = frozenset({"tokens"})
    title = "`{position}` means different places in prompts of different lengths"
    label = "prompts of `{run}` have {shortest} to {longest} tokens"
    help = (
        "write `{position} align left` or `{position} align right`, or name the positions "
        "(`last token`, `each token of NAME`)"
    )
    position: str
    run: str
    shortest: int
    longest: int


@keyword_record
class AmbiguousSpan(Diagnostic):
    code = "E0306"
    hangs_on = frozenset({"rows"})
    title = "`{name}` {several}, which one?"
    label = "in {rows} of {total} rows of `{run}`, as in {example}"
    help = "write {ways}"
    name: str
    several: str
    rows: int
    total: int
    run: str
    example: str
    ways: str


@keyword_record
class JoinedUnequal(Diagnostic):
    code = "E0307"
    hangs_on = frozenset({"tokens"})
    title = "joined positions have different numbers of tokens in the two runs"
    label = "{source} in the source run, {base} in the base run, in {rows} of {total} rows"
    help = (
        "use a position that is one token in both (`NAME token`), or values of the same number "
        "of tokens"
    )
    source: str
    base: str
    rows: int
    total: int


@keyword_record
class UnknownSpan(Diagnostic):
    code = "E0308"
    hangs_on = frozenset({"columns"})
    title = "the {unit}s of `{prompts}` have no span called `{name}`"
    label = "{what}"
    help = "{hint}"
    name: str
    prompts: str
    hint: str
    what: str = "not a placeholder of the template"
    unit: str = "prompt"
    """What a row is: a prompt or an image."""


@keyword_record
class AbsentOccurrence(Diagnostic):
    code = "E0309"
    hangs_on = frozenset({"rows"})
    title = "{lacking} of {total} rows of `{run}` have no `{position}`"
    label = "as in {example}"
    help = "{hint}"
    position: str
    run: str
    lacking: int
    total: int
    example: str
    hint: str


@keyword_record
class OutsidePrompt(Diagnostic):
    code = "E0310"
    hangs_on = frozenset({"tokens"})
    title = "`{position}` lies outside the {unit} in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    help = "{hint}"
    position: str
    run: str
    lacking: int
    total: int
    example: str
    hint: str
    unit: str = "prompt"
    """What a row is: a prompt or an image."""


@keyword_record
class ReversedBetween(Diagnostic):
    code = "E0311"
    hangs_on = frozenset({"tokens"})
    title = "the second position comes before the first in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    help = "`between` goes from left to right: exchange the two positions"
    run: str
    lacking: int
    total: int
    example: str


@keyword_record
class SpanWithoutToken(Diagnostic):
    code = "E0312"
    hangs_on = frozenset({"tokens"})
    title = "`{name}` has no token of its own in {lacking} of {total} rows of `{run}`"
    label = "its text is {text}, and white space belongs to the token beside it"
    help = "{hint}"
    name: str
    run: str
    lacking: int
    total: int
    text: str
    hint: str


@keyword_record
class NoSuchSpecial(Diagnostic):
    code = "E0313"
    hangs_on = frozenset({"tokens"})
    title = "the prompts of `{prompts}` have no {name} token"
    label = "{reason}"
    help = "{hint}"
    name: str
    prompts: str
    reason: str
    hint: str


@keyword_record
class NotOnePosition(Diagnostic):
    code = "E0314"
    title = "`between` goes from one token to another, `{position}` is not one token"
    label = "{reason}"
    help = "write a single position, such as `first token of NAME` or `NAME token`"
    position: str
    reason: str


@keyword_record
class NothingLeft(Diagnostic):
    code = "E0315"
    hangs_on = frozenset({"tokens"})
    title = "`{position}` leaves no token in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    help = "except fewer tokens"
    position: str
    run: str
    lacking: int
    total: int
    example: str
