"""E0527 to E0530: runs of another block of prompts."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class RowsNotPaired(Diagnostic):
    """Two blocks whose rows don't belong together."""

    code = "E0527"
    hangs_on = frozenset({"rows"})
    title = "the rows of `{other}` and of `{prompts}` can't be paired: {others:,} and {rows:,}"
    label = "`{other}` has {others:,} rows before `where` and `limit`"
    help = "{hint}"
    other: str
    prompts: str
    others: int
    rows: int
    hint: str


@keyword_record
class PartnerMissing(Diagnostic):
    """A row whose partner `where` has left out."""

    code = "E0528"
    hangs_on = frozenset({"rows"})
    title = "{lacking:,} of {total:,} rows of `{prompts}` have no partner in `{other}`"
    label = "`{other}` leaves out its row {row:,}: {reason}"
    help = "{hint}"
    other: str
    prompts: str
    lacking: int
    total: int
    row: int
    reason: str
    hint: str


@keyword_record
class OtherEnding(Diagnostic):
    """Leading tokens of answers that were moved into the prompts of one block only."""

    code = "E0529"
    hangs_on = frozenset({"tokens"})
    title = "prompts of `{other}` end in {theirs}, those of `{prompts}` in {own}"
    label = "what all answers of a block begin with stands at the end of its prompts"
    help = (
        "spell the answers of both alike, or leave those of `{other}` out: measures read the "
        "texts of `{prompts}`"
    )
    other: str
    prompts: str
    theirs: str
    own: str


@keyword_record
class NeitherSampled(Diagnostic):
    """`from A into B` where the `prompts` line names a third block."""

    code = "E0530"
    title = "neither `{source}` nor `{base}` is a run of `{prompts}`, whose rows are sampled"
    label = "both are of other prompts"
    help = "write `prompts {instead}`, or `clean` on one side"
    source: str
    base: str
    prompts: str
    instead: str
