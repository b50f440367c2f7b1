"""E0301 to E0304, E032x: coordinates of sites."""

from collections.abc import Mapping

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class UnitOutOfRange(Diagnostic):
    """A head or neuron that the model doesn't have."""

    code = "E0301"
    hangs_on = frozenset({"shape"})
    title = "{unit} {index} does not exist in `{model}`"
    label = "`{model}` has {units} 0..{last} {where}"
    help = "write `{unit} *` for all of them"
    unit: str
    units: str
    index: int
    last: int
    where: str
    model: str


@keyword_record
class LayerOutOfRange(Diagnostic):
    """A layer that the model doesn't have."""

    code = "E0302"
    hangs_on = frozenset({"shape"})
    title = "layer {index} does not exist in `{model}`"
    label = "`{model}` has layers 0..{last}"
    help = "write `layer *` for all of them, or a relative depth such as `layer 50%..80%`"
    index: int
    last: int
    model: str


@keyword_record
class NoComponent(Diagnostic):
    """A rule that says where, but not what."""

    code = "E0303"
    title = "the rule names neither a component nor a head"
    label = "what of this layer?"
    help = "write one of {components}, or add `head *`"
    components: str


@keyword_record
class AxisDoesNotFit(Diagnostic):
    """An axis that its component doesn't have, or lacks."""

    code = "E0304"
    title = "`{site}` {reason}"
    label = "{reason}"
    help = "{hint}"
    site: str
    reason: str
    hint: str


@keyword_record
class AxesCollide(Diagnostic):
    """Two sweeps of one name in an experiment."""

    code = "E0320"
    title = "two sweeps of this experiment are both called `{axis}`"
    label = "the other one is on line {first}"
    help = "share one axis: `{shared}`, or join one of them: `{plural}`"
    axis: str
    shared: str
    plural: str
    first: int


@keyword_record
class EmptyRange(Diagnostic):
    """A range that goes downwards."""

    code = "E0321"
    title = "the range `{text}` is empty{where}"
    label = "nothing to sweep over"
    help = "ranges are inclusive and go upwards: write `{low}..{high}`"
    text: str
    low: str
    high: str
    where: str = ""
    """The values of loops that it is so for."""
    instead: str = ""
    """What to write, where that isn't the ends the other way round."""

    @property
    def help_text(self) -> str:
        start, _, _ = self.help.partition(": ")
        return f"{start}: {self.instead}" if self.instead else super().help_text


def where_loops_are(values: Mapping[str, object]) -> str:
    """` where `a` is 5`; nothing without loops."""
    said = " and ".join(f"`{name}` is {value}" for name, value in values.items())
    return f" where {said}" if said else ""


UNUSED_LOOP = "no rule of this loop uses it"


@keyword_record
class BadLoopValue(Diagnostic):
    """A variable, parameter or depth that can't stand where it does."""

    code = "E0322"
    title = "`{name}` can't be used here: {reason}"
    label = "{reason}"
    help = "{hint}"
    name: str
    reason: str
    hint: str


@keyword_record
class TooManyCells(Diagnostic):
    """Axes whose product is too large to run."""

    code = "E0323"
    hangs_on = frozenset({"shape", "tokens", "rows"})
    title = "{of} has {cells:,} cells, more than {most:,}"
    label = "its axes multiply: {axes}"
    help = "sweep over fewer values, or join an axis: `heads *` instead of `head *`"
    of: str
    cells: int
    most: int
    axes: str


@keyword_record
class UnevenPositions(Diagnostic):
    """A mean or resampling over positions that don't correspond."""

    code = "E0324"
    hangs_on = frozenset({"tokens"})
    title = "`{position}` covers {least} to {most} tokens, so its rows don't correspond"
    label = "a mean or a resampling goes over rows"
    help = "name single tokens, such as `first token of …`, or positions that are equally long"
    position: str
    least: int
    most: int
