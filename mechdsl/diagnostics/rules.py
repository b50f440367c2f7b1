"""E0301 to E0315, E032x, E033x, E0341, E054x, E0641, W0741, W0742: sites, positions and rules."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.diagnostics.core import (
    Diagnostic,
    HintedDiagnostic,
    MissingRowsDiagnostic,
    ModelDiagnostic,
    ReasonedDiagnostic,
    RowsDiagnostic,
)


class UnitOutOfRange(ModelDiagnostic):
    """A head or neuron that the model doesn't have."""

    code = "E0301"
    depends_on = frozenset({"shape"})
    title = "{unit} {index} does not exist in `{model}`"
    label = "`{model}` has {units} {numbers}"
    help = "write `{unit} *` for all of them{others}"
    unit: str
    units: str
    index: int
    numbers: str
    """`0..3 in every layer`."""
    others: str = ""
    """Where the number exists: `, or name a layer that has it: …`."""


class LayerOutOfRange(ModelDiagnostic):
    """A layer that the model doesn't have."""

    code = "E0302"
    depends_on = frozenset({"shape"})
    title = "layer {index} does not exist in `{model}`"
    label = "`{model}` has layers 0..{last}{where}"
    help = "write `layer *` for all of them, or a relative depth such as `layer 50%..80%`"
    index: int
    last: int
    where: str = ""
    """ in the stack `vision`; empty for the main one."""


class NoComponent(Diagnostic):
    """A rule that says where, but not what."""

    code = "E0303"
    title = "the rule names no component and no head"
    label = "which component of this layer?"
    help = "write one of {components}, or add `head *`"
    components: str


class AxisDoesNotFit(ReasonedDiagnostic):
    """An axis that its component doesn't have, or lacks."""

    code = "E0304"
    title = "`{site}` {reason}"
    site: str


class AxesCollide(Diagnostic):
    """Two sweeps of one name in an experiment."""

    code = "E0320"
    title = "two sweeps of this experiment are both called `{axis}`"
    label = "the other one is on line {first}"
    help = "use one axis, `{shared}`, or join one of them: `{plural}`"
    axis: str
    shared: str
    plural: str
    first: int


class EmptyRange(Diagnostic):
    """A range that goes downwards."""

    code = "E0321"
    title = "the range `{text}` is empty{where}"
    label = "nothing to sweep over"
    help = "ranges are inclusive and ascending: write `{low}..{high}`"
    text: str
    low: str
    high: str
    where: str = ""
    """Values of the loops where the range is empty."""
    instead: str = ""
    """The fix, if it isn't swapping the ends."""

    @property
    def help_text(self) -> str:
        start, _, _ = self.help.partition(": ")
        return f"{start}: {self.instead}" if self.instead else super().help_text


def loop_hint(values: Mapping[str, object]) -> str:
    """Format ` where `a` is 5`; empty without loops."""
    said = " and ".join(f"`{name}` is {value}" for name, value in values.items())
    return f" where {said}" if said else ""


UNUSED_LOOP = "no rule of this loop uses it"


class BadLoopValue(ReasonedDiagnostic):
    """A variable, parameter or depth that can't stand where it does."""

    code = "E0322"
    title = "`{name}` can't be used here: {reason}"
    name: str


class TooManyCells(Diagnostic):
    """Axes whose product is too large to run."""

    code = "E0323"
    depends_on = frozenset({"shape", "tokens", "rows"})
    title = "{of} has {cells:,} cells, more than {most:,}"
    label = "its axes multiply: {axes}"
    help = "sweep over fewer values, or join an axis: `heads *` instead of `head *`"
    of: str
    cells: int
    most: int
    axes: str


class StacksDiffer(HintedDiagnostic):
    """Sites at tokens of the encoder and of the decoder in one rule."""

    code = "E0317"
    depends_on = frozenset({"shape"})
    title = "`{source}` is at tokens of the encoder, and `{target}` at tokens of the decoder"
    label = "the positions of a rule are tokens of one of the two"

    source: str
    target: str
    hint: str = "write a rule for each of them"


class UnevenPositions(Diagnostic):
    """A mean or resampling over positions that don't correspond."""

    code = "E0324"
    depends_on = frozenset({"tokens"})
    title = (
        "`{position}` covers {least} to {most} tokens, so tokens of different rows don't correspond"
    )
    label = "`mean` and `resample` combine rows"
    help = (
        "name single tokens, such as `first token of …`, or positions with the same number "
        "of tokens in every row"
    )
    position: str
    least: int
    most: int


class BadDirection(ReasonedDiagnostic):
    """A direction that can't be computed as written, or doesn't fit the place where it is used."""

    code = "E0341"
    title = "invalid direction: {reason}"
    text: str


class BadBasis(ReasonedDiagnostic):
    """A basis that can't be made as it is written, or doesn't fit where it is used."""

    code = "E0342"
    title = "invalid {what}: {reason}"
    what: str = "basis"


class BadWeights(ReasonedDiagnostic):
    """Weights that can't be edited as written."""

    code = "E0344"
    depends_on = frozenset({"shape"})
    title = "invalid edit of weights: {reason}"


class MeasuredOnTrainingRows(Diagnostic):
    """Rows that a trained basis is measured on, and was trained on."""

    code = "E0345"
    depends_on = frozenset({"rows"})
    title = "`{experiment}` measures rows that `{basis}` is trained on"
    label = "{shared} of its {rows} rows {relation}"
    help = "{fix}"
    experiment: str
    basis: str
    shared: int
    rows: int
    relation: str
    """How these rows overlap with those of the training."""
    fix: str


class MeasuredSavedRows(Diagnostic):
    """Rows that an experiment measures, and that a group or circuit in a file was chosen on."""

    code = "W0738"
    depends_on = frozenset({"rows"})
    title = "`{experiment}` measures prompts that `{chosen}` was chosen on"
    label = "{shared} of its {rows} rows"
    help = (
        "measure other rows: effects on the prompts that it was chosen on say little about new "
        "prompts"
    )
    experiment: str
    chosen: str
    shared: int
    rows: int


class NotTrained(HintedDiagnostic):
    """A basis that `mechdsl fit` hasn't trained yet."""

    code = "E0642"
    title = "`{basis}` isn't trained{reason}"
    label = "`{experiment}` needs it"
    basis: str
    reason: str
    experiment: str


class TrainingFailed(ReasonedDiagnostic):
    """A training that ended without a result."""

    code = "E0643"
    title = "`{basis}` can't be trained: {reason}"
    basis: str


class OpposedSearch(Diagnostic):
    """A search for a circuit that keeps edges which move the measure away from the clean run."""

    code = "W0739"
    title = "the circuit `{circuit}` doesn't explain the clean run"
    label = "the measure is {whole} with every edge ablated and {unpatched} in the clean run, and "
    label += "the search makes it {aim}"
    help = (
        "write `{other}: …` in `fit`, or the negative measure with `discover`, to keep the edges "
    )
    help += "that cause the value of the clean run"
    circuit: str
    whole: str
    unpatched: str
    aim: str
    other: str


class UndecidedMask(Diagnostic):
    """A trained mask whose choice is uncertain."""

    code = "W0736"
    title = "the mask of `{group}` is undecided at {undecided} of {sites} {noun}s"
    label = "chosen with less than 0.9, or not chosen with more than 0.1"
    help = "train longer, with `steps: {steps}`; or choose another `size`"
    group: str
    undecided: int
    sites: int
    noun: str
    """What one candidate of the mask is: `site`, `feature`."""
    steps: int


class FewDrawnRows(Diagnostic):
    """A training without `limit` on few rows of a block that draws values."""

    code = "W0737"
    depends_on = frozenset({"rows"})
    title = "`{basis}` is trained on only {rows} of `{block}`{held_out}, which can sample more"
    label = "without `limit`, there is one row for each combination of values"
    help = "write how many rows to sample: `limit: 400`"
    basis: str
    rows: str
    block: str
    held_out: str


class BadException(ReasonedDiagnostic):
    """An exception that leaves out nothing, or everything."""

    code = "E0343"
    depends_on = frozenset({"shape"})
    title = "`except {text}` {reason}"
    text: str


class UnreadBlocks(ModelDiagnostic):
    """A rule that writes only in blocks of a vision encoder whose output nothing reads."""

    code = "W0742"
    depends_on = frozenset({"shape"})
    title = "this rule has no effect: the language model doesn't read the blocks that it changes"
    label = "`{model}` reads the vision encoder after block {last}, and this rule starts at {first}"
    help = "write `layer {last}` or an earlier one"
    last: int
    first: int


class DictionaryElsewhere(Diagnostic):
    """A dictionary that was trained at another site than that of the basis."""

    code = "W0733"
    title = "the dictionary was trained at `{hook}`, which is `{own}`"
    label = "used at `{site}`"
    help = "write `at {own}`, unless the transfer is the experiment"
    hook: str
    site: str
    own: str


class DictionaryOfAnotherModel(ModelDiagnostic):
    """A dictionary that was trained on another model."""

    code = "W0735"
    title = "the dictionary was trained on `{own}`, the model is `{model}`"
    label = "used on `{model}`"
    help = "use a dictionary of this model, unless the transfer is the experiment"
    own: str


class EmptyDirection(HintedDiagnostic):
    """A fit that gave no direction or no basis."""

    code = "E0641"
    title = "{kind} `{name}` {reason}"
    label = "{made}"
    name: str
    reason: str
    made: str
    kind: str = "direction"


class UnpairedPositions(HintedDiagnostic):
    """Two lists of positions in one rule that don't go together."""

    code = "E0331"
    depends_on = frozenset({"tokens"})
    title = "{first} can't be paired with {second}"
    label = "{second} here"
    first: str
    second: str
    hint: str = "write one position here, or the same number as on the other side"


class BadEdit(HintedDiagnostic):
    """An impossible edit of attention, or a selection that leaves nothing to observe or save."""

    code = "E0332"
    title = "{reason}"
    label = "{what}"
    reason: str
    what: str


class UnequalPrompts(HintedDiagnostic):
    """Vectors over key positions of prompts that aren't equally long."""

    code = "E0333"
    depends_on = frozenset({"tokens"})
    title = "`{site}` is a vector over the tokens of a prompt, but {what} differ in length"
    label = "row {row} has {first} tokens and {second}"
    site: str
    what: str
    row: int
    first: int
    second: str


class NotOnAPath(ReasonedDiagnostic):
    """A site that a path can't start or end at."""

    code = "E0334"
    title = "{what} can't {verb} at `{site}`"
    verb: str
    site: str
    what: str = "a path"


class NoPath(Diagnostic):
    """Senders that come after all receivers."""

    code = "E0335"
    title = "no path leads from `{sender}` to `{receiver}`"
    label = "{reason}"
    help = "name a receiver that reads the sender, for example `{example}`{other}"
    sender: str
    receiver: str
    reason: str
    example: str
    other: str = ""
    """An edge from another sender; starts with a semicolon."""


class OverlappingPositions(Diagnostic):
    """`swap` of positions that share a token."""

    code = "E0336"
    depends_on = frozenset({"tokens"})
    title = "`{first}` and `{second}` share a token in row {row}"
    label = "{token} can't be swapped with itself"
    help = "name positions without a common token"
    first: str
    second: str
    row: int
    token: str


class BadAmount(ReasonedDiagnostic):
    """A number that isn't one."""

    code = "E0337"
    title = "`{text}` is not a number here"
    text: str


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


class AmbiguousSpan(RowsDiagnostic):
    code = "E0306"
    depends_on = frozenset({"rows"})
    title = "`{name}` is ambiguous: it {several}"
    label = "in {rows} of {total} rows of `{run}`, as in {example}"
    help = "write {ways}"
    name: str
    several: str
    run: str
    example: str
    ways: str


class UnequalUnion(HintedDiagnostic, RowsDiagnostic):
    code = "E0307"
    depends_on = frozenset({"tokens"})
    title = "the joined positions have different numbers of {units} in the two runs"
    label = "{source} in the source run, {base} in the base run, in {rows} of {total} rows"
    source: str
    base: str
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


class AbsentOccurrence(HintedDiagnostic, MissingRowsDiagnostic):
    code = "E0309"
    depends_on = frozenset({"rows"})
    title = "{lacking} of {total} rows of `{run}` have no `{position}`"
    position: str


class OutsidePrompt(HintedDiagnostic, MissingRowsDiagnostic):
    code = "E0310"
    depends_on = frozenset({"tokens"})
    title = "`{position}` lies outside the {unit} in {lacking} of {total} rows of `{run}`"
    position: str
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


class ReversedBetween(MissingRowsDiagnostic):
    code = "E0311"
    depends_on = frozenset({"tokens"})
    title = "the second position comes before the first in {lacking} of {total} rows of `{run}`"
    help = "`between` goes from left to right: swap the two positions"


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


class NoPositionLeft(MissingRowsDiagnostic):
    code = "E0315"
    depends_on = frozenset({"tokens"})
    title = "`{position}` excludes every token in {lacking} of {total} rows of `{run}`"
    help = "exclude fewer tokens"
    position: str


class NoAnswerTokens(HintedDiagnostic):
    """Tokens of the answer where no answer follows the prompts."""

    code = "E0540"
    depends_on = frozenset({"columns"})
    title = "`{position}` has no tokens here: {reason}"
    label = "answer tokens come after the prompt, where a measure reads them"
    position: str
    reason: str


class AnswersDiffer(RowsDiagnostic):
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
