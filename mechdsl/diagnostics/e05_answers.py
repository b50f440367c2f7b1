"""E054x and W0741: positions in texts behind the prompts, of measures and replies."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class NoAnswerHere(Diagnostic):
    """Tokens of the answer where none stands behind the prompts."""

    code = "E0540"
    hangs_on = frozenset({"columns"})
    title = "`{position}` has no tokens here: {reason}"
    label = "tokens of the answer stand behind the prompt, where a measure reads them"
    help = "{hint}"
    position: str
    reason: str
    hint: str


@keyword_record
class AnswersDiffer(Diagnostic):
    """A token that is counted from the end of texts of different lengths."""

    code = "E0541"
    hangs_on = frozenset({"tokens"})
    title = "`{position}` is not the same token in all texts that measures read"
    label = "in {rows} of {total} rows; in row {row}, {lengths}"
    help = (
        "count from the first (`first token of answer`, `first token of answer + 1`), or take all "
        "of them: `answer tokens`"
    )
    position: str
    rows: int
    total: int
    row: int
    lengths: str


@keyword_record
class NotInTheAnswer(Diagnostic):
    """Ways to name tokens of a span that the answer, behind the prompt, doesn't have."""

    code = "E0542"
    title = "tokens of the answer can't be named by `{position}`"
    label = "{reason}"
    help = "{hint}"
    position: str
    reason: str
    hint: str


WRITES_NONE = "the experiment writes none"


@keyword_record
class NotInTheReply(Diagnostic):
    """Tokens of a reply that can't be named so, or where none is written."""

    code = "E0545"
    title = "`{position}` can't be had of a reply: {reason}"
    label = "the reply stands behind the prompt, where `generate` writes one"
    help = "{hint}"
    position: str
    reason: str
    hint: str


@keyword_record
class NoRepliesBehind(Diagnostic):
    """Replies of another experiment that can't stand behind these prompts."""

    code = "E0546"
    title = "`{text}` can't stand behind these prompts: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str


@keyword_record
class AnswerLeftOut(Diagnostic):
    """A rule on the whole prompt, and a measure that reads tokens behind it."""

    code = "W0741"
    hangs_on = frozenset({"tokens"})
    title = "this rule leaves the answer's own tokens as they are"
    label = "all of the prompt; `{measure}` reads up to {tokens} tokens behind it"
    help = "to act on them too, write `{instead}`"
    measure: str
    tokens: int
    instead: str
