"""E033x: rules that read in one place and write in another, on edges of attention, along paths."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class UnpairedPositions(Diagnostic):
    """Two lists of positions in one rule that don't go together."""

    code = "E0331"
    hangs_on = frozenset({"tokens"})
    title = "{first} don't pair with {second}"
    label = "{second} here"
    help = "{hint}"
    first: str
    second: str
    hint: str = "write one position here, or as many as there are on the other side"


@keyword_record
class BadEdit(Diagnostic):
    """A number that attention can't be set to."""

    code = "E0332"
    title = "{reason}"
    label = "{what}"
    help = "{hint}"
    reason: str
    what: str
    hint: str


@keyword_record
class UnequalPrompts(Diagnostic):
    """Vectors over key positions of prompts that aren't equally long."""

    code = "E0333"
    hangs_on = frozenset({"tokens"})
    title = "`{site}` is a vector over the tokens of a prompt, and {what} differ in length"
    label = "row {row} has {first} tokens and {second}"
    help = "{hint}"
    site: str
    what: str
    row: int
    first: int
    second: str
    hint: str


@keyword_record
class NotOnAPath(Diagnostic):
    """A site that a path can't start or end at."""

    code = "E0334"
    title = "a path can't {verb} at `{site}`"
    label = "{reason}"
    help = "{hint}"
    verb: str
    site: str
    reason: str
    hint: str


@keyword_record
class NoPath(Diagnostic):
    """Senders that lie behind all receivers."""

    code = "E0335"
    title = "no path leads from `{sender}` to `{receiver}`"
    label = "{reason}"
    help = "name a receiver in a later layer, for example `{example}`"
    sender: str
    receiver: str
    reason: str
    example: str


@keyword_record
class OverlappingPositions(Diagnostic):
    """`swap` of positions that share a token."""

    code = "E0336"
    hangs_on = frozenset({"tokens"})
    title = "`{first}` and `{second}` share a token in row {row}"
    label = "{token} can't change places with itself"
    help = "name positions that have no token in common"
    first: str
    second: str
    row: int
    token: str


@keyword_record
class BadAmount(Diagnostic):
    """A number that isn't one."""

    code = "E0337"
    title = "`{text}` is not a number here"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str
