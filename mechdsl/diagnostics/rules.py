"""E0301 to E0304, E032x, E033x, E0341, E0641, W0742: site coordinates, directions and rules."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic, ReasonedDiagnostic


class UnitOutOfRange(Diagnostic):
    """A head or neuron that the model doesn't have."""

    code = "E0301"
    depends_on = frozenset({"shape"})
    title = "{unit} {index} does not exist in `{model}`"
    label = "`{model}` has {units} 0..{last} {where}"
    help = "write `{unit} *` for all of them"
    unit: str
    units: str
    index: int
    last: int
    where: str
    model: str


class LayerOutOfRange(Diagnostic):
    """A layer that the model doesn't have."""

    code = "E0302"
    depends_on = frozenset({"shape"})
    title = "layer {index} does not exist in `{model}`"
    label = "`{model}` has layers 0..{last}{where}"
    help = "write `layer *` for all of them, or a relative depth such as `layer 50%..80%`"
    index: int
    last: int
    model: str
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


class UnreadBlocks(Diagnostic):
    """A rule that writes only in blocks of a vision encoder whose output nothing reads."""

    code = "W0742"
    depends_on = frozenset({"shape"})
    title = "this rule has no effect: the language model doesn't read the blocks that it changes"
    label = "`{model}` reads the vision encoder after block {last}, and this rule starts at {first}"
    help = "write `layer {last}` or an earlier one"
    model: str
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


class DictionaryOfAnotherModel(Diagnostic):
    """A dictionary that was trained on another model."""

    code = "W0735"
    title = "the dictionary was trained on `{own}`, the model is `{model}`"
    label = "used on `{model}`"
    help = "use a dictionary of this model, unless the transfer is the experiment"
    own: str
    model: str


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
