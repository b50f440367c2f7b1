"""E0305 to E0315, E054x, W0741: positions in prompts, answers and generated text."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic, ReasonedDiagnostic


class RaggedPositions(Diagnostic):
    code = "E0305"
    depends_on = frozenset({"tokens"})
    title = "`{position}` is ambiguous in prompts of different lengths"
    label = "prompts of `{run}` have {shortest} to {longest} tokens"
    help = (
        "write `{position} align left` or `{position} align right`, or refer to tokens by name "
        "(`last token`, `each token of NAME`)"
    )
    position: str
    run: str
    shortest: int
    longest: int


class AmbiguousSpan(Diagnostic):
    code = "E0306"
    depends_on = frozenset({"rows"})
    title = "`{name}` is ambiguous: it {several}"
    label = "in {rows} of {total} rows of `{run}`, as in {example}"
    help = "write {ways}"
    name: str
    several: str
    rows: int
    total: int
    run: str
    example: str
    ways: str


class UnequalUnion(HintedDiagnostic):
    code = "E0307"
    depends_on = frozenset({"tokens"})
    title = "the joined positions have different numbers of {units} in the two runs"
    label = "{source} in the source run, {base} in the base run, in {rows} of {total} rows"
    source: str
    base: str
    rows: int
    total: int
    units: str = "tokens"
    hint: str = (
        "use a position with one token in both runs (`NAME token`), or values with the same "
        "number of tokens"
    )


class UnknownSpan(HintedDiagnostic):
    code = "E0308"
    depends_on = frozenset({"columns"})
    title = "the {unit}s of `{prompts}` have no span called `{name}`"
    label = "{what}"
    name: str
    prompts: str
    what: str = "not a placeholder of the template"
    unit: str = "prompt"
    """What has the position: a prompt, an image or a sound."""


class AbsentOccurrence(HintedDiagnostic):
    code = "E0309"
    depends_on = frozenset({"rows"})
    title = "{lacking} of {total} rows of `{run}` have no `{position}`"
    label = "as in {example}"
    position: str
    run: str
    lacking: int
    total: int
    example: str


class OutsidePrompt(HintedDiagnostic):
    code = "E0310"
    depends_on = frozenset({"tokens"})
    title = "`{position}` lies outside the {unit} in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    position: str
    run: str
    lacking: int
    total: int
    example: str
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""


class NotInDecoder(HintedDiagnostic):
    """A token that an encoder reads, among positions of the decoder or of the text."""

    code = "E0316"
    depends_on = frozenset({"shape"})
    title = "`{position}` is not a token of {part}"
    label = "{reason}, and {reader} `{position}`"
    position: str
    part: str = "the decoder"
    reason: str = "this site has vectors at the tokens of the decoder"
    reader: str = "the encoder reads"
    hint: str = (
        "name a site at the tokens of the encoder, such as `resid_post encoder layer 2` or "
        "`v cross layer 2`, or a token of the decoder: `last token`"
    )


class ReversedBetween(Diagnostic):
    code = "E0311"
    depends_on = frozenset({"tokens"})
    title = "the second position comes before the first in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    help = "`between` goes from left to right: swap the two positions"
    run: str
    lacking: int
    total: int
    example: str


class SpanWithoutToken(HintedDiagnostic):
    code = "E0312"
    depends_on = frozenset({"tokens"})
    title = "`{name}` has no separate token in {lacking} of {total} rows of `{run}`"
    label = "its text is {text}, and the tokenizer merges white space into the next token"
    name: str
    run: str
    lacking: int
    total: int
    text: str


class NoSuchSpecial(ReasonedDiagnostic):
    code = "E0313"
    depends_on = frozenset({"tokens"})
    title = "the prompts of `{prompts}` have no {name} token"
    name: str
    prompts: str


class NotOnePosition(Diagnostic):
    code = "E0314"
    title = "`between` needs single tokens, and `{position}` covers several"
    label = "{reason}"
    help = "write a single position, such as `first token of NAME` or `NAME token`"
    position: str
    reason: str


class NoPositionLeft(Diagnostic):
    code = "E0315"
    depends_on = frozenset({"tokens"})
    title = "`{position}` excludes every token in {lacking} of {total} rows of `{run}`"
    label = "as in {example}"
    help = "exclude fewer tokens"
    position: str
    run: str
    lacking: int
    total: int
    example: str


class NoAnswerTokens(HintedDiagnostic):
    """Tokens of the answer where no answer follows the prompts."""

    code = "E0540"
    depends_on = frozenset({"columns"})
    title = "`{position}` has no tokens here: {reason}"
    label = "answer tokens come after the prompt, where a measure reads them"
    position: str
    reason: str


class AnswersDiffer(Diagnostic):
    """A token that is counted from the end of texts of different lengths."""

    code = "E0541"
    depends_on = frozenset({"tokens"})
    title = "`{position}` is not the same token in all measured texts"
    label = "in {rows} of {total} rows; in row {row}, {lengths}"
    help = (
        "count from the first token (`first token of answer`, `first token of answer + 1`), or "
        "use all of them: `answer tokens`"
    )
    position: str
    rows: int
    total: int
    row: int
    lengths: str


class NotInAnswer(ReasonedDiagnostic):
    """Ways to name tokens of a span that the answer after the prompt doesn't have."""

    code = "E0542"
    title = "`{position}` can't refer to answer tokens"
    position: str


NO_REPLY_REASON = "the experiment generates no reply"


class NotInReply(HintedDiagnostic):
    """Tokens of a reply that can't be named like this, or an experiment without replies."""

    code = "E0545"
    title = "`{position}` can't be used in a reply: {reason}"
    label = "not possible at tokens of a reply"
    position: str
    reason: str

    @property
    def label_text(self) -> str:
        """The formatted text next to the carets."""
        if self.reason == NO_REPLY_REASON:
            return "a reply comes after the prompt and needs `generate`"
        return super().label_text


class RepliesNotUsable(ReasonedDiagnostic):
    """Replies of another experiment that can't follow these prompts."""

    code = "E0546"
    title = "`{text}` can't follow these prompts: {reason}"
    text: str


class AnswerNotCovered(Diagnostic):
    """A rule on the whole prompt, and a measure that reads tokens after it."""

    code = "W0741"
    depends_on = frozenset({"tokens"})
    title = "this rule doesn't change the answer's tokens"
    label = "covers the prompt; `{measure}` reads up to {tokens} tokens after it"
    help = "to change them as well, write `{instead}`"
    measure: str
    tokens: int
    instead: str
