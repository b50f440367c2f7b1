"""Registry of trainers: what `fit(…)` can train, `fit(NAME(…), prompts: …)`.

A trainer is one class under `trainer`, a subclass of one of `TRAINER_KINDS`. A module outside the
package adds a trainer with such a class, when it is imported before a file is checked. The class
says what the file may write, and creates the parameters when training begins; rows, batches,
checkpoints and the store are mechdsl's.

A trainer of the user's Python files, `fit(python("own.py:Trainer", features: 64), …)`, is a
subclass of `torch.nn.Module`. Its methods determine what it makes, so that a file is checked
without running the class.
"""

from __future__ import annotations

import ast as python
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record, Registry
from mechdsl.base.text import Percent, name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.syntax import PythonNotFound
from mechdsl.dictionaries.folder import TENSORS, Architecture
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
from mechdsl.program.python_functions import (
    PythonFunction,
    find_function,
    is_python_call,
    top_level_definitions,
)
from mechdsl.program.spec import Constant
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

    from mechdsl.base.arrays import Floats, Ints
    from mechdsl.fits.correlations import CorrelatedPair
    from mechdsl.fits.factors import Solution
    from mechdsl.fits.gates import Gates
    from mechdsl.fits.lenses import LensMaps
    from mechdsl.fits.own_modules import OwnDictionary, OwnGates, OwnModule, OwnRotation, OwnVector
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
        return f"it must be a subclass of {name_list(kind.__name__ for kind in TRAINER_KINDS)}"
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
        call: A `fit`. One without a trainer is E0207; here it has a trainer without a name, which
            isn't registered.
    """
    node = next((each.value for each in call.arguments if each.name is None), None)
    if isinstance(node, ast.Call):
        return node
    return ast.Call("" if node is None else node.span.written, (), span=(node or call).span)


class Parameters(Record):
    """Parameters of a method, without `self`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


class PythonClass(Record):
    """A class that was found but not yet run."""

    function: PythonFunction
    """Creates an object."""
    methods: Mapping[str, Parameters]
    """Those of the class and of its base classes in the same file."""
    texts: Mapping[str, str]
    """Class attributes that are texts."""
    has_base: bool
    """Whether a base class is imported, such as `torch.nn.Module`."""

    def __hash__(self) -> int:
        return hash(self.function)


def find_class(node: ast.Call) -> tuple[PythonClass | None, list[Diagnostic]]:
    """Find the class that `python("file.py:Name")` refers to, without running any of it.

    Codes: E0222, E0532, E0535.
    """
    function, problems = find_function(node, "trainer")
    if function is None:
        return None, problems
    tree = python.parse(function.path.read_bytes(), filename=function.file)
    classes = {
        definition.name: definition
        for definition in top_level_definitions(tree)
        if isinstance(definition, python.ClassDef)
    }
    bases = [*_with_bases(classes[function.name], classes)]
    methods: dict[str, Parameters] = {}
    texts: dict[str, str] = {}
    for basis in reversed(bases):
        for statement in basis.body:
            match statement:
                case python.FunctionDef(name=name):
                    methods[name] = _read_parameters(statement.args)
                case (
                    python.Assign(targets=[python.Name(id=name)], value=python.Constant(value=text))
                    | python.AnnAssign(
                        target=python.Name(id=name), value=python.Constant(value=text)
                    )
                ) if isinstance(text, str):
                    texts[name] = text
                case _:
                    pass
    written = [base for basis in bases for base in basis.bases]
    has_base = any(not isinstance(base, python.Name) or base.id not in classes for base in written)
    return PythonClass(function, methods, texts, has_base), []


def _with_bases(
    class_def: python.ClassDef, classes: Mapping[str, python.ClassDef]
) -> Iterator[python.ClassDef]:
    """Yield a class, and then its base classes that are defined before it in the same file."""
    yield class_def
    for base in class_def.bases:
        class_node = classes.get(base.id) if isinstance(base, python.Name) else None
        if class_node is not None and class_node.lineno < class_def.lineno:
            yield from _with_bases(class_node, classes)


def _read_parameters(own: python.arguments) -> Parameters:
    places = [each.arg for each in (*own.posonlyargs, *own.args)]
    count = len(places) - len(own.defaults)
    names = [each.arg for each in own.kwonlyargs]
    named = list(zip(names, own.kw_defaults, strict=True))
    required = (name for name, default in named if default is None)
    optional = (name for name, default in named if default is not None)
    return Parameters((*places[1:count], *required), (*places[max(1, count) :], *optional))


class OwnTrainer(Trainer):
    """A class of a Python file."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]]
    """Those that the class must have → the arguments that they are called with."""
    given: ClassVar[str]
    """The argument of `__init__` that isn't an option."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Options that are known before training: positive whole numbers that a call must have."""

    def __init__(self, own: PythonClass) -> None:
        """Describe a class that `find_problem` has nothing against."""
        self.own, self.name = own, own.function.name
        parameters = own.methods["__init__"]
        self.options = tuple(name for name in parameters.names if name != self.given)
        required = (name for name in parameters.required if name != self.given)
        self.required = tuple(dict.fromkeys((*self.needed_sizes(own), *required)))
        given = "".join(f", {name}: 8" for name in self.required)
        self.example = f'python("{own.function.file}:{self.name}"{given})'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnTrainer) and self.own == other.own

    def __hash__(self) -> int:
        return hash(self.own)

    @classmethod
    def needed_sizes(cls, own: PythonClass) -> tuple[str, ...]:
        """Return the options of a class that are known before training."""
        return cls.sizes

    @classmethod
    def find_problem(cls, own: PythonClass) -> Problem | None:
        """Return the reason that a class with the methods can't be used, or None."""
        name = own.function.name
        created = own.methods.get("__init__", Parameters((), ()))
        needs = (cls.given, *cls.needed_sizes(own))
        missing = [need for need in needs if need not in created.names]
        if missing:
            reason = f"`{name}.__init__` has no parameter `{missing[0]}`"
            return reason, f"write `def __init__(self, {', '.join(needs)}):`"
        for method, arguments in cls.methods.items():
            parameters = own.methods[method]
            count = len([each for each in parameters.required if each != "progress"])
            if count > len(arguments) or len(parameters.names) < len(arguments):
                written = ", ".join(("self", *arguments))
                reason = f"`{name}.{method}` is called with {len(arguments) or 'no'} arguments"
                reason = reason.removesuffix("s") if len(arguments) == 1 else reason
                return reason, f"write `def {method}({written}):`"
        return None

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if value is None:
            return f"`{name}` isn't a constant", f"write a number or a text: `{name}: 8`"
        whole = is_integer(value, least=1)
        if name in self.needed_sizes(self.own) and not whole:
            return f"`{name}` is a whole number from 1 on", f"write `{name}: 8`"
        return None

    def open(
        self, given: object, options: Mapping[str, Constant], seed: int, like: Tensor
    ) -> OwnModule:
        """Run the file, and create the object. Raises PythonFailure.

        Args:
            given: The argument that isn't an option.
            seed: Determines random numbers of the object.
            like: A tensor whose device and dtype its parameters get.
        """
        from mechdsl.fits.own_modules import OwnModule

        function, named = self.own.function, {**options, self.given: given}
        create = partial(function.load(), **named)
        return OwnModule(create, self.name, function.failure, seed, like)


def _draw_seed(random: Generator) -> int:
    import torch

    return int(torch.randint(2**62, (1,), generator=random))


class OwnDictionaryTrainer(OwnTrainer, IterativeTrainer):
    """A dictionary in a known architecture, with a user-defined loss."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"loss": ("vectors",), "weights": ()}
    given = "width"
    sizes = ("features",)
    architectures: ClassVar[tuple[Architecture, ...]] = ("standard", "topk", "jumprelu", "gated")

    @classmethod
    def architecture(cls, python_class: PythonClass) -> Architecture | None:
        """Return the architecture of the dictionary that a class trains; None if it is unknown."""
        written = python_class.texts.get("architecture", "standard")
        return next(
            (architecture for architecture in cls.architectures if architecture == written), None
        )

    @classmethod
    def needed_sizes(cls, own: PythonClass) -> tuple[str, ...]:
        return (*cls.sizes, "k") if cls.architecture(own) == "topk" else cls.sizes

    @classmethod
    def find_problem(cls, own: PythonClass) -> Problem | None:
        if cls.architecture(own) is None:
            known = name_list(f'"{architecture}"' for architecture in cls.architectures)
            return f"there is no architecture `{own.texts['architecture']}`", f"it can be {known}"
        return super().find_problem(own)

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        architecture = self.architecture(self.own)
        assert architecture is not None
        k = int(options["k"]) if architecture == "topk" else None
        return DictionaryOutline(architecture, int(options["features"]), k)

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        if "k" in self.needed_sizes(self.own) and int(options["k"]) > int(options["features"]):
            said = f"`k: {options['k']}` is more than `features: {options['features']}`"
            return said, "write a smaller `k`"
        return None

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> OwnDictionary:
        import torch

        from mechdsl.fits.own_modules import OwnDictionary

        outline, (_, width) = self.outline(options), widths
        features = outline.features
        shapes = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,)}
        wanted = {each: shapes.get(each, (features,)) for each in TENSORS[outline.architecture]}
        like = torch.zeros((), device=device)
        return OwnDictionary(self.open(width, options, _draw_seed(random), like), wanted)


class OwnVectorTrainer(OwnTrainer, VectorTrainer):
    """A vector that is added, with a user-defined parametrization or penalty."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"vector": ()}
    given = "vectors"

    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> OwnVector:
        from mechdsl.fits.own_modules import OwnVector

        return OwnVector(self.open(like, options, _draw_seed(random), like), like)


class OwnRotationTrainer(OwnTrainer, RotationTrainer):
    """A subspace, with a user-defined parametrization or penalty."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"directions": ()}
    given = "vectors"
    sizes = ("dims",)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options["dims"])

    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> OwnRotation:
        from mechdsl.fits.own_modules import OwnRotation

        module = self.open(like, options, _draw_seed(random), like)
        return OwnRotation(module, (int(options["dims"]), like.shape[1]))


class OwnMaskTrainer(OwnTrainer, MaskTrainer):
    """A mask with user-defined gates."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {"probabilities": (), "sample": ("rows",)}
    given = "count"
    sizes = ("size",)

    def size(self, options: Mapping[str, Constant]) -> int:
        return int(options["size"])

    def start(self, count: int, options: Mapping[str, Constant], seed: int) -> OwnGates:
        import torch

        from mechdsl.fits.own_modules import OwnGates

        module = self.open(count, options, seed, torch.zeros((), dtype=torch.float64))
        return OwnGates(module, count, self.size(options), seed)


OWN_TRAINERS: tuple[type[OwnTrainer], ...] = (
    OwnDictionaryTrainer,
    OwnVectorTrainer,
    OwnRotationTrainer,
    OwnMaskTrainer,
)


def find_own_trainer(call: ast.Call) -> tuple[OwnTrainer | None, list[Diagnostic]]:
    """Find the trainer of `python("own.py:Trainer", …)`, without running any of it.

    Codes: E0222, E0532, E0535.
    """
    python_class, problems = find_class(call)
    if python_class is None:
        return None, problems
    kinds = [kind for kind in OWN_TRAINERS if {*kind.methods} <= {*python_class.methods}]
    if not python_class.has_base:
        problem = (
            "it has no base class",
            f"write `class {python_class.function.name}(torch.nn.Module):`",
        )
    elif len(kinds) == 1:
        problem = kinds[0].find_problem(python_class)
    else:
        problem = _method_problem(python_class, kinds)
    if problem is None:
        return kinds[0](python_class), []
    written = f'python("{python_class.function.file}:{python_class.function.name}")'
    reason, hint = problem
    return None, [PythonNotFound(span=call.span, written=written, reason=reason, hint=hint)]


def _method_problem(python_class: PythonClass, kinds: Sequence[type[OwnTrainer]]) -> Problem:
    """Return the problem with a class that makes nothing or several things."""
    name = python_class.function.name
    if kinds:
        listed = name_list(method for kind in kinds for method in kind.methods)
        return f"`{name}` makes several things: it defines {listed}", "write one class for each"
    for kind in OWN_TRAINERS:
        lacks = [method for method in kind.methods if method not in python_class.methods]
        if len(lacks) < len(kind.methods):
            written = ", ".join(("self", *kind.methods[lacks[0]]))
            reason = f"`{name}` has no method `{lacks[0]}`"
            return reason, f"define it: `def {lacks[0]}({written}):`"
    makes = {"`loss` and `weights`": "a dictionary", "`vector`": "a direction"}
    makes |= {"`directions`": "a rotation", "`probabilities` and `sample`": "a mask"}
    listed = ", ".join(f"{methods} for {what}" for methods, what in makes.items())
    return f"`{name}` has no method of a trainer", f"define {listed}"


def find_trainer(call: ast.Call) -> Trainer | None:
    """Return the trainer of a call such as `das(dims: 2)` or `python("own.py:Trainer")`; None for
    an unknown one."""
    return find_own_trainer(call)[0] if is_python_call(call) else TRAINERS.get(call.name)


def trainer_arguments(call: ast.Call) -> Sequence[ast.Argument]:
    """Return the arguments of such a call that are options."""
    return call.arguments[1:] if is_python_call(call) else call.arguments
