"""Registry of trainers: what `fit(…)` can train, `fit(NAME(…), prompts: …)`.

A trainer is one class under `trainer`, a subclass of one of `TRAINER_KINDS`. A module outside the
package adds a trainer with such a class, when it is imported before a file is checked. The class
says what the file may write, and creates the parameters when training begins; rows, batches,
checkpoints and the store are mechdsl's.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record, Registry
from mechdsl.base.text import Percent, name_list
from mechdsl.dictionaries.folder import Architecture
from mechdsl.fits.reports import (
    CircuitReport,
    CorrelationReport,
    DecoderReport,
    EditReport,
    FitReport,
    LensReport,
    MaskReport,
    NodeReport,
    NodeSearchReport,
    ProbeReport,
    RotationReport,
    ScaleReport,
    SoftPromptReport,
    TrainingReport,
    VectorReport,
)
from mechdsl.program.direction_methods import Problem, call_class_problem
from mechdsl.program.estimators import BackwardRules
from mechdsl.program.spec import Constant
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

    from mechdsl.base.arrays import Floats, Ints
    from mechdsl.fits.correlations import CorrelatedPair
    from mechdsl.fits.factors import Solution
    from mechdsl.fits.gates import Gates
    from mechdsl.fits.lenses import LensMaps
    from mechdsl.fits.regression import LinearMap
    from mechdsl.fits.training import Trainable
    from mechdsl.fits.vectors import ChannelScales, LowRankEdit, Rotation, TrainedVectors


STEP_OPTIONS = ("batch", "rate", "patience", "accumulate", "precision")
"""Options of `fit` with a trainer that learns in steps, each on a batch."""

Statement = Literal["basis", "direction", "group", "circuit", "lens", "probe"]
"""First words of statements with `fit(…)`."""

EFFECT_DEFAULTS: Mapping[str, Constant] = {
    "steps": 500,
    "batch": 32,
    "rate": 0.01,
    "validation": Percent(20),
}
"""Defaults of options of `fit` with a trainer that is trained on a measure."""


class Trainer(ABC):
    """Something that `fit` can train."""

    name: str
    declares: ClassVar[Statement] = "basis"
    """First word of the statement that declares what it makes."""
    report: ClassVar[type[FitReport]]
    """What its training reports: the numbers of its table, of conventions and of model cards."""
    example: str
    """A call inside of `fit(…)`, as messages show it."""
    options: tuple[str, ...] = ()
    """Names of the arguments that are written `NAME: VALUE`, with a constant each."""
    required: tuple[str, ...] = ()
    """Options that a call must have."""
    other_options: ClassVar[Mapping[str, str]] = {}
    """Names of an option in other tools → the option."""
    defaults: ClassVar[Mapping[str, Constant]] = {}
    """Defaults of options of `fit` that differ from those in `TRAINING_DEFAULTS`."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options of `fit` that the training doesn't use, so that they are errors."""
    package: ClassVar[str] = ""
    """Name of a package that the training needs and mechdsl doesn't install by itself, which is a
    part of `mechdsl[fits]`."""

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        """Return the problem with an option's value, or None.

        Args:
            name: One of `options`.
            value: None if the file has no constant there.
        """
        return None

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        """Return the problem with the options together, or None; each is valid by itself."""
        return None

    def report_on(self, options: Mapping[str, Constant], *, decoder: bool) -> type[FitReport]:
        """Return what a training reports.

        Args:
            decoder: Whether its vectors are the decoder of a dictionary.
        """
        return DecoderReport if decoder else self.report

    def check_parts(self, options: Mapping[str, Constant]) -> Problem | None:
        """Return the reason that the gradients of a batch can't be computed in parts, or None."""
        return None


# --- trainers on vectors --------------------------------------------------------------------------


class DictionaryOutline(Record):
    """What is known of a dictionary before it is trained."""

    architecture: Architecture
    """Of its file, once it is trained."""
    features: int
    k: int | None = None
    transcodes: bool = False
    skips: bool = False
    crosses_layers: bool = False
    covariance: str = ""


class DictionaryTrainer(Trainer):
    """A dictionary, which is trained on the vectors of a site, one by one."""

    report = TrainingReport

    @abstractmethod
    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        """Return what is known of a dictionary before training."""

    def check_site(self, site: str, width: int, options: Mapping[str, Constant]) -> Problem | None:
        """Return the problem with the vectors of a site, or None.

        Args:
            width: Numbers of a vector.
        """
        return None


class IterativeTrainer(DictionaryTrainer):
    """A dictionary that is trained in steps, each on a batch of vectors."""

    @abstractmethod
    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        """Create the parameters of a dictionary.

        Args:
            widths: Numbers of a vector that is encoded, and of one that is reconstructed.
            random: Source of all random numbers of the start, on the CPU.
            device: Where the parameters are needed.
        """


class SolvedTrainer(DictionaryTrainer):
    """A dictionary that is computed from all vectors together."""

    copies: ClassVar[int] = 4
    """Copies of the vectors, in 64 bits, that the computation has in memory."""

    @abstractmethod
    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        """Compute a dictionary.

        Args:
            vectors: [vector, width], neither centred nor scaled.
            steps: Maximum number of iterations; 0 for a random start, the control.
            random: Source of all random numbers, on the CPU.

        Raises:
            NotFactored: These vectors have no such dictionary.
        """


class PairedTrainer(DictionaryTrainer):
    """A dictionary that is computed from two sets of vectors of the same rows together."""

    report = CorrelationReport

    @abstractmethod
    def solve(
        self,
        own: Tensor,
        other: Tensor,
        options: Mapping[str, Constant],
        steps: int,
        random: Generator,
    ) -> CorrelatedPair:
        """Compute the coordinates of both sets.

        Args:
            own: [vector, width] vectors of the site.
            other: [vector, other width] what `with` names, of the same tokens.
            steps: Maximum number of iterations; 0 for a random start, the control.
            random: Source of all random numbers, on the CPU.

        Raises:
            NotFactored: These vectors have no such dictionary.
        """


class LensTrainer(Trainer):
    """A lens: an affine map for each layer, trained on vectors to predict the next token."""

    declares = "lens"
    report = LensReport

    @abstractmethod
    def start(
        self, width: int, layers: Sequence[int], options: Mapping[str, Constant], device: device
    ) -> LensMaps:
        """Create the parameters of a lens.

        Args:
            width: Numbers of a vector of the residual stream.
            layers: Layers that have a map.
            device: Where the parameters are needed.
        """


class ProbeTrainer(Trainer):
    """A linear map of the vectors of rows, one for each row, that predicts a value of the rows."""

    declares = "probe"
    report = ProbeReport
    defaults: ClassVar[Mapping[str, Constant]] = {"validation": Percent(20)}
    unused = ("steps", *STEP_OPTIONS)
    predicts: ClassVar[Literal["number", "class"]]

    @abstractmethod
    def fit(
        self, vectors: Floats, targets: Floats, folds: Ints, options: Mapping[str, Constant]
    ) -> LinearMap:
        """Fit a probe.

        Args:
            vectors: [row, width], one for each row.
            targets: [row] numbers, or numbers of classes from 0 on; every class has a row.
            folds: [row] folds, to choose an option with; rows with equal inputs are in one fold.

        Returns:
            The map to the predicted number, [width, 1], or to a logit for each class,
            [width, class].

        Raises:
            ValueError, ArithmeticError: The vectors have no such probe.
        """


# --- trainers on a measure ------------------------------------------------------------------------


Differentiated = Literal["edited runs", "clean run", "nowhere"]
"""Where a training takes gradients of its measure."""


class EffectTrainer(Trainer):
    """Something that is trained on rows: on the effect of an edit on a measure."""

    defaults = EFFECT_DEFAULTS
    any_run: ClassVar[bool] = False
    """Whether it can be trained on other runs than the clean one, and reads no run `from`."""

    def differentiates(self, options: Mapping[str, Constant]) -> Differentiated:
        """Return where it takes gradients of the measure."""
        return "edited runs"


class RotationTrainer(EffectTrainer):
    """An orthonormal basis of a subspace, which is patched from another run."""

    report = RotationReport
    learns_size: ClassVar[bool] = False
    """Whether the training determines the number of directions."""

    @abstractmethod
    def size(self, options: Mapping[str, Constant], width: int) -> int:
        """Return the number of directions, the largest one if it is learned.

        Args:
            width: Numbers of a vector.
        """

    @abstractmethod
    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> Rotation:
        """Create the parameters of a rotation.

        Args:
            like: [vector, width] vectors that the rotation acts on, whose device and dtype the
                parameters need.
            random: Source of all random numbers of the start, on the CPU.
        """


class DirectionTrainer(EffectTrainer):
    """A vector, or one for each token, that edits the vectors of a site."""

    declares = "direction"

    def count_tokens(self, options: Mapping[str, Constant]) -> int | None:
        """Return the number of vectors, one for each token of a position; None for one vector at
        all of its tokens."""
        return None


class VectorTrainer(DirectionTrainer):
    """A vector that is added to those of a site, or vectors that replace them."""

    report = VectorReport

    def report_on(self, options: Mapping[str, Constant], *, decoder: bool) -> type[FitReport]:
        """Return what a training reports, depending on the number of vectors."""
        return self.report if self.count_tokens(options) is None else SoftPromptReport

    @abstractmethod
    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> TrainedVectors:
        """Create the parameters of a vector, with arguments as those of a rotation."""


class EditTrainer(VectorTrainer):
    """An edit: a vector that is added, as a function of the vector that it is added to."""

    report = EditReport

    @abstractmethod
    def rank(self, options: Mapping[str, Constant]) -> int:
        """Return the number of directions that it adds."""

    @abstractmethod
    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> LowRankEdit:
        """Create the parameters of an edit, with arguments as those of a rotation."""


class ScaleTrainer(DirectionTrainer):
    """Scales that the vectors of a site are multiplied by."""

    report = ScaleReport

    @abstractmethod
    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> ChannelScales:
        """Create the parameters of scales, with arguments as those of a rotation."""


class ChoosingTrainer(EffectTrainer):
    """Something that chooses from candidates, such as sites or edges."""

    @abstractmethod
    def size(self, options: Mapping[str, Constant]) -> int | None:
        """Return the number of candidates that it chooses; None if its result determines it."""


def check_size(value: Constant | None, example: str) -> Problem | None:
    """Return the problem with the number or the share of candidates that is chosen, or None.

    Args:
        example: A call of the trainer.
    """
    if isinstance(value, Percent):
        if 0 < value <= 100:
            return None
        return f"`size: {value}` isn't above 0% and at most 100%", "write `size: 25%`"
    if is_integer(value, least=1):
        return None
    return "`size` is a whole number from 1 on, or a share such as `25%`", f"write `{example}`"


class MaskTrainer(ChoosingTrainer):
    """A mask, which chooses sites or coordinates that are patched or ablated."""

    declares = "group"
    report = MaskReport

    @abstractmethod
    def size(self, options: Mapping[str, Constant]) -> int:
        """Return the number of candidates that it chooses."""

    @abstractmethod
    def start(self, count: int, options: Mapping[str, Constant], seed: int) -> Gates:
        """Create the parameters of a mask.

        Args:
            count: Number of candidates that it chooses from.
            seed: Determines the random numbers of every step.
        """


class ScoringTrainer(ChoosingTrainer):
    """A circuit or a group that is chosen by scores, without training steps."""

    unused = ("steps", "rate", "patience", "accumulate", "precision")

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "size":
            return check_size(value, self.example)
        if is_integer(value, least=1):
            return None
        return f"`{name}` is a whole number from 1 on", f"write `{self.example}`"


Selection = Literal["greedy", "top"]
"""How the edges of a circuit are selected by their scores: from `logits` backwards, so that each
selected edge leads to it, or those with the largest scores of all."""


class EffectScoreTrainer(ScoringTrainer):
    """Candidates with the largest estimated effects."""

    def faithfulness(self, options: Mapping[str, Constant]) -> float | None:
        """Return the number that the faithfulness of the smallest selection exceeds; None if `size`
        decides."""
        return None

    @abstractmethod
    def steps(self, options: Mapping[str, Constant]) -> int:
        """Return the number of points at which gradients are taken."""


class EdgeScoreTrainer(EffectScoreTrainer):
    """A circuit of the edges with the largest estimated effects."""

    declares = "circuit"
    report = CircuitReport
    path: ClassVar[Literal["inputs", "activations"] | None] = None
    """What moves from the run `from` to the clean run while gradients are taken: the embedding, or
    the outputs of one module after another; None for gradients of the clean run."""
    backward: ClassVar[BackwardRules | None] = None
    """Changes of the derivatives."""
    fixes_attention: ClassVar[bool] = False
    """Whether edges into queries and keys are scored by the exact change of attention weights."""
    drops_layers: ClassVar[bool] = False
    """Whether scores are means of absolute values of rows, each with the gradient of one layer left
    out, over the layers that don't contain the receiver."""

    @property
    def decomposes(self) -> bool:
        """Whether scores are those of contextual decomposition, without gradients."""
        return self.backward is not None and self.backward.decomposed

    def differentiates(self, options: Mapping[str, Constant]) -> Differentiated:
        if self.decomposes:
            return "nowhere"
        return "edited runs" if self.steps(options) > 1 else "clean run"

    @abstractmethod
    def selection(self, options: Mapping[str, Constant]) -> Selection:
        """Return how the edges are selected."""


class NodeScoreTrainer(EffectScoreTrainer):
    """A group of the sites, positions, features or dimensions with the largest estimated
    effects."""

    declares = "group"
    report = NodeReport
    integrates: ClassVar[bool] = False
    """Whether gradients are the mean over midpoints of the line from the clean run to the other
    values, on which all candidates of a site and layer move together; otherwise, they are those of
    the clean run."""

    def differentiates(self, options: Mapping[str, Constant]) -> Differentiated:
        return "edited runs" if self.integrates else "clean run"


SearchLevel = Literal["blocks", "heads", "inputs", "edges"]
"""Edges that a search ablates together: those from all heads or the MLP of a layer, from one head,
into one query, key or value, or single ones."""


class EdgeSearchTrainer(ScoringTrainer):
    """A circuit of the edges that a search leaves, which ablates one edge or group of edges after
    another and measures each time."""

    declares = "circuit"
    report = CircuitReport
    levels: ClassVar[tuple[SearchLevel, ...]] = ("edges",)
    """What a search with a threshold ablates, from coarse to fine."""

    def differentiates(self, options: Mapping[str, Constant]) -> Differentiated:
        return "nowhere"

    @abstractmethod
    def threshold(self, options: Mapping[str, Constant]) -> float | None:
        """Return how much worse the measure must become for an edge to stay; None if the search
        ends at `size` edges."""


class NodeSearchTrainer(ScoringTrainer):
    """A group of the sites, positions, features or dimensions that a search adds one after
    another, each time the one that changes the measure most while the group is written."""

    declares = "group"
    report = NodeSearchReport

    def differentiates(self, options: Mapping[str, Constant]) -> Differentiated:
        return "nowhere"

    @abstractmethod
    def size(self, options: Mapping[str, Constant]) -> int:
        """Return the largest number of candidates that it adds."""


TRAINER_KINDS: tuple[type[Trainer], ...] = (
    IterativeTrainer,
    SolvedTrainer,
    PairedTrainer,
    RotationTrainer,
    VectorTrainer,
    ScaleTrainer,
    MaskTrainer,
    EdgeScoreTrainer,
    EdgeSearchTrainer,
    NodeScoreTrainer,
    NodeSearchTrainer,
    LensTrainer,
    ProbeTrainer,
)
"""Base classes of trainers."""

# --- registry -------------------------------------------------------------------------------------

TRAINERS: Registry[Trainer] = Registry("trainer")

TrainerT = TypeVar("TrainerT", bound=Trainer)


def trainer(name: str) -> Callable[[type[TrainerT]], type[TrainerT]]:
    """Register a subclass of one of `TRAINER_KINDS` as `fit(NAME(…), …)`.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return TRAINERS.class_decorator(name, _class_problem)


def _class_problem(name: str, entry: object) -> str | None:
    """Return the reason that a class can't be registered."""
    tuples = {"options": "features", "required": "features"}
    wrong = call_class_problem(
        name, entry, Trainer, arguments="features: 512", tuples=tuples, bare=True
    )
    if wrong is not None:
        return wrong
    assert isinstance(entry, type)
    if not issubclass(entry, TRAINER_KINDS):
        return f"it must be a subclass of {name_list(own.__name__ for own in TRAINER_KINDS)}"
    missing = sorted(getattr(entry, "__abstractmethods__", ()))
    if not missing:
        return None
    needs = [f"{each}({', '.join(_parameters(entry, each))})" for each in missing]
    return f"it needs {name_list(needs)}"


def _parameters(entry: type, method: str) -> list[str]:
    return [*inspect.signature(getattr(entry, method)).parameters]


def trainer_call(call: ast.Call) -> ast.Call:
    """Return `das(dims: 2)` of `fit(das(dims: 2), …)`; a name alone is a call without arguments.

    Args:
        call: A `fit` with one argument without a name.
    """
    (node,) = (each.value for each in call.arguments if each.name is None)
    if isinstance(node, ast.Call):
        return node
    return ast.Call(node.span.written, (), span=node.span)
