"""Records of a resolved experiment: its axes, rules, directions, measures and controls.

Every name, coordinate, position and text in these records is concrete. `Intervention` is the
interface of a rule kind that all later stages call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from math import isnan, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from mechdsl.base.hashing import digest
from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun
from mechdsl.diagnostics.core import UNKNOWN_FACTS, UnknownFact
from mechdsl.dictionaries.folder import DictionaryFile, FeatureLabels
from mechdsl.images.layouts import ImageLayout
from mechdsl.images.picture import Picture
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.program import spec
from mechdsl.program.direction_methods import BFLOAT16
from mechdsl.program.python_functions import PythonFunction
from mechdsl.program.spec import Generation
from mechdsl.program.trainers import (
    EditTrainer,
    OwnTrainer,
    RotationTrainer,
    ScaleTrainer,
    ScoringTrainer,
    Trainer,
    TrainerT,
)
from mechdsl.prompts.answers import TokenSets
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun, ReplyPosition
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import CircuitBaseline, ControlTitle, MetricForm
from mechdsl.vocab.sites import SITES, EdgeChange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mechdsl.program.spec import Constant


class FitSample(Record):
    """Rows that a fit reads, with one vector for each row that has the position, or one for each
    token."""

    table: PromptTable
    run: PromptRun
    """The run of the rows, with the name of its model if that isn't the experiment's model."""
    cell: PositionCell
    """The position in `run`."""
    targets: tuple[float | str, ...] = ()
    """The value of each row that a method reads (`probe(count, fruit)`): a number or a word."""
    each_token: bool = False
    """Whether each token has a separate vector, instead of the mean over the tokens of a row."""

    @property
    def classes(self) -> list[float | str]:
        """Distinct targets of the rows that have the position, in numeric or alphabetical order."""
        pairs = zip(self.targets, self.cell.hits, strict=True)
        classes = {target for target, row in pairs if any(row)}
        return sorted(classes)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


class FittedVector(Record):
    """A method fitted to activations of one cell: `mean_difference(A, B)`, `pca(A)`."""

    method: str
    """Its name in `DIRECTION_METHODS`."""
    samples: tuple[FitSample, ...]
    points: tuple[SitePoint, ...]
    """One point, or the heads of a `mean`: each head's mean is multiplied by the head's slice of
    the output projection, and the results are summed."""
    options: Mapping[str, Constant]


class UnembeddingVector(Record):
    """The unembedding's row for a token, minus the row for another token if there is one."""

    token: int
    less: int | None


VectorRole = Literal["direction", "scales", "edit"]
"""What rules do with a named vector: use it as a direction, multiply activations by it, or add what
it computes from each activation."""


class SavedVector(Record):
    """A vector from a safetensors file."""

    path: Path
    key: str
    digest: str
    """SHA-256 of the file."""

    @property
    def role(self) -> VectorRole:
        """What rules do with it."""
        return "direction"


class SavedEdit(SavedVector):
    """An edit from a safetensors file, of three tensors whose names begin with `key`."""

    @property
    def role(self) -> VectorRole:
        return "edit"


class WeightedSum(Record):
    parts: tuple[tuple[float, DirectionVector], ...]


class UnitVector(Record):
    of: DirectionVector


class RandomVector(Record):
    """A random direction with the norm of another direction, or with the same numbers."""

    of: DirectionVector
    draw: str
    """Identifier of the draw: the direction that it replaces, and the number of the draw."""
    seed: int
    shuffles: bool = False
    """Whether it has the numbers of the other one in a random order, as a control of scales."""


class DrawnVector(Record):
    """A random direction of norm 1, for a rule whose vectors are known only when it runs."""

    width: int
    draw: str
    seed: int


DirectionVector: TypeAlias = (
    FittedVector
    | UnembeddingVector
    | SavedVector
    | WeightedSum
    | UnitVector
    | RandomVector
    | DrawnVector
)


class FittedBasis(Record):
    """A basis computed from activations of one site, or from their means for each target of the
    sample: `pca(fruit, dims: 8)`, `class_means(count, fruit)`."""

    samples: tuple[FitSample, ...]
    points: tuple[SitePoint, ...]
    """The site of the activations."""


class JacobianBasis(Record):
    """A basis computed from the Jacobians of one site by another, at the tokens of a sample.

    Tokens of one row have separate Jacobians, each of a token's vector by that of the same token.
    """

    sample: FitSample
    source: SitePoint
    target: SitePoint
    of_target: bool
    """Whether the basis is one of the target: left singular vectors instead of right ones."""

    @property
    def samples(self) -> tuple[FitSample, ...]:
        """Its only sample."""
        return (self.sample,)

    @property
    def points(self) -> tuple[SitePoint, ...]:
        """The sites that a pass must reach."""
        return (self.source, self.target)


class TokenBasis(Record):
    """A basis computed from rows of the unembedding."""

    tokens: tuple[int, ...]


class WeightBasis(Record):
    """A basis computed from the weights that write to a site."""

    site: str
    layer: int


WEIGHTS_BASIS = "weights"
"""Name of the coordinates that rules on weights change: the numbers of all heads or neurons."""


class OutputWeights(Record):
    """The weights from all heads or neurons of a layer to the output of their sublayer, or what is
    added to them."""

    site: str
    """`attn_out` or `mlp_out`."""
    layer: int
    vector: DirectionVector | None = None
    """The vector that is added for each neuron; None for the weights themselves."""
    replaces: bool = False
    """Whether the vector replaces the weights."""


class DrawnBasis(Record):
    """A basis computed from the width of the vectors, and from random numbers."""

    draw: str
    """Identifier of the draw."""
    seed: int


class SpannedBasis(Record):
    """A basis of directions of the file."""

    vectors: tuple[DirectionVector, ...]
    next_map: SitePoint | None = None
    """The point whose next weights it depends on, if it does."""


class PythonBasis(Record):
    """A basis whose encoder and decoder are an object of a Python file."""

    function: PythonFunction
    """Creates the object."""


class RecordStream(Record):
    """Records of files that a training reads in parts."""

    count: int
    digest: str
    """Digest of the files."""
    files: frozenset[str]
    """Digest of each file."""
    groups: tuple[tuple[int, int], ...]
    """Number and bytes of the records that are read together; 0 bytes if each is read alone."""
    folder: Path | None
    """Folder of the training with the texts that it has read; None before the training."""


class PairedVectors(Record):
    """What the vectors of a training are correlated with."""

    label: str
    """`L3.resid_post` or `count, item`."""
    point: SitePoint | None
    """The site of vectors; None for values of the rows."""
    values: tuple[tuple[float, ...], ...] = ()
    """The numbers of each row of the table."""
    sample: FitSample | None = None
    """The tokens of the vectors, as many in each row as the training has; None if they are the same
    tokens of the same run."""
    shape: ModelShape | None = None
    """Sizes of the model or tower that runs `sample`."""

    @property
    def width(self) -> int:
        """Numbers of a vector of `sample`; 0 without."""
        if self.point is None or self.shape is None:
            return 0
        return count_numbers(self.point, self.shape)


class Training(Record):
    """A training that a file declares: `fit(sae(features: 512, k: 8), prompts: fruit.train)`."""

    name: str
    """Identifies it within a file: its basis, site and model."""
    definition: str
    """Name of the `basis` line."""
    trainer: Trainer
    of_trainer: Mapping[str, Constant]
    """Options of the trainer."""
    options: Mapping[str, Constant]
    """Options of `fit`, with their defaults."""
    source: FitSample | BasisMember
    """The rows; for a dictionary, with the tokens whose vectors it is trained on, one by one. Or a
    dictionary, for its decoder directions."""
    encoded: SitePoint
    """The site of the vectors that are encoded; of a mask, the first site that it chooses from."""
    made: SitePoint
    """The site of the vectors that are reconstructed: the same, unless it is a transcoder; of a
    lens, the residual stream after the last block."""
    seed: int
    span: Span = field(compare=False)
    """Where the file declares it."""
    minimises: bool = False
    """Whether the measure of a rotation, vector or mask is minimised, not maximised."""
    stream: RecordStream | None = None
    """The records that are read during the training, of which `sample` has the first ones; None for
    a training on the rows of `sample`."""
    cells: tuple[SitePoint, ...] = ()
    """Sites of a lens or a cross-layer transcoder, whose vectors are encoded together, or of a
    probe, which has a map for each; `encoded` is the first one."""
    outputs: tuple[SitePoint, ...] = ()
    """Sites that a cross-layer transcoder reconstructs together, one for each of `cells`; `made` is
    the first one."""
    paired: PairedVectors | None = None
    """What the vectors are correlated with."""
    is_one_of_several: bool = False
    """Whether it is one of the trainings of `fit(…, seeds: 3)`."""
    partner: PromptRun | None = None
    """The run of `from:`."""
    is_discovered: bool = field(default=False, compare=False)
    """Whether an experiment discovers what is trained, so that no options of the training are in
    the file."""

    @property
    def inputs(self) -> tuple[SitePoint, ...]:
        """The sites of the vectors that are encoded."""
        return self.cells or (self.encoded,)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of a lens, a cross-layer transcoder or a probe."""
        return tuple(cell.layer for cell in self.cells if cell.layer is not None)

    @property
    def points(self) -> tuple[SitePoint, ...]:
        """The sites of the vectors that are encoded, and then those of the vectors that are
        reconstructed, or that they are correlated with at the same tokens."""
        paired = self.paired
        there = None if paired is None or paired.sample is not None else paired.point
        return (*self.inputs, *(self.outputs or (there or self.made,)))

    @property
    def manner(self) -> str:
        """How its steps differ from the usual ones: `, in bf16 with weights in fp32, each step on 4
        batches of 32`; empty for usual ones."""
        text, count = "", self.options.get("accumulate", 1)
        if self.options.get("precision") == BFLOAT16:
            text += f", in {BFLOAT16} with weights in fp32"
        if count != 1:
            text += f", each step on {count:,} batches of {self.options['batch']:,}"
        return text

    def trainer_of(self, kind: type[TrainerT]) -> TrainerT:
        """Return the trainer, which is of a kind."""
        assert isinstance(self.trainer, kind)
        return self.trainer

    @property
    def decoder(self) -> DictionaryFile | None:
        """The dictionary whose decoder it is trained on; None for a training on rows."""
        if isinstance(self.source, FitSample):
            return None
        assert isinstance(self.source.operand, DictionaryFile)
        return self.source.operand

    @property
    def sample(self) -> FitSample:
        """The rows of a training that reads no decoder."""
        assert isinstance(self.source, FitSample)
        return self.source

    @property
    def with_rows(self) -> Training | None:
        """The training that read rows: this one, or that of the dictionary whose decoder it reads;
        None if that dictionary is from a folder."""
        if self.decoder is None:
            return self
        decoded = self.decoder
        trained = decoded.training if isinstance(decoded, TrainedDictionary) else None
        return None if trained is None else trained.with_rows

    @property
    def model(self) -> str | None:
        """Name of the model that runs the rows, if it isn't the experiment's model."""
        return None if self.decoder is not None else self.sample.run.model


class Trained:
    """What a file declares with `fit`. Its digest is empty until its training is found in the
    store."""

    digest: str

    @property
    def is_trained(self) -> bool:
        """Whether it has the result of its training."""
        return bool(self.digest)


class TrainedDictionary(Trained, DictionaryFile):
    """A dictionary that a file declares with `fit`, without weights until it is trained."""

    training: Training | None = field(default=None, compare=False)
    """Never None; fields that follow defaults need one."""

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        assert self.training is not None
        if isinstance(self.training.trainer, OwnTrainer):
            return f"{super().kind} by {self.training.trainer.name}"
        if self.architecture != "linear":
            return super().kind
        return count_noun(self.features, f"{self.training.trainer.name} component")


class CrossLayerFiles(Record):
    """The files of a trained cross-layer transcoder."""

    layers: tuple[DictionaryFile, ...]
    """The encoders of the features of each layer."""
    digest: str
    """SHA-256 over the digests of its encoders and decoders."""


class TrainedRotation(Trained, SavedVector):
    """Orthonormal directions that a file declares with `fit`, rows of a matrix of the store."""

    size: int
    """Number of directions; before a training that determines it, the largest one."""
    training: Training = field(compare=False)

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        learned = self.training.trainer_of(RotationTrainer).learns_size and not self.is_trained
        text = describe_rotation(self.training.trainer.name, self.size)
        return text.replace(" with ", " with at most ") if learned else text


def describe_rotation(trainer: str, directions: int) -> str:
    """Describe a rotation, as `das rotation with 2 directions`."""
    return f"{trainer} rotation with {count_noun(directions, 'direction')}"


class TrainedVector(Trained, SavedVector):
    """A vector that a file declares with `fit`, from a file of the store."""

    training: Training = field(compare=False)
    name: str = field(compare=False)
    """`v[layer 3]`."""

    @property
    def role(self) -> VectorRole:
        if isinstance(self.training.trainer, EditTrainer):
            return "edit"
        return "scales" if isinstance(self.training.trainer, ScaleTrainer) else "direction"

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        given = "".join(f", {name} {value}" for name, value in self.training.of_trainer.items())
        return f"{self.training.trainer.name}{given}"


class TrainedLens(Trained, Record):
    """A tuned lens that a file declares with `fit`, in a file of the store."""

    path: Path
    digest: str
    training: Training = field(compare=False)
    made: str = field(default="", compare=False)
    """How it was trained, for conventions."""

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        return f"tuned lens of {count_noun(len(self.training.layers), 'layer')}"


class TrainedProbe(Trained, Record):
    """A linear probe that a file declares with `fit`, in a file of the store."""

    path: Path
    digest: str
    classes: tuple[float | str, ...]
    """The classes that it distinguishes, in the order of its logits; empty for a number."""
    widths: tuple[int, ...]
    """Width of the vectors of each of its points."""
    target: str = field(compare=False)
    """The value that it predicts, as the file names it."""
    training: Training = field(compare=False)
    made: str = field(default="", compare=False)
    """How it was trained, for conventions."""

    @property
    def outputs(self) -> int:
        """Number of its outputs: a number, or a logit for each class."""
        return len(self.classes) or 1

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        what = f"{len(self.classes):,} classes" if self.classes else "a number"
        return f"{self.training.trainer.name} probe of {what}"


class ProbeVector(TrainedVector):
    """The weights of a trained probe as a direction: those of its number, or those of a class minus
    the mean of those of the other classes."""

    probe: TrainedProbe = field(compare=False)
    point: SitePoint
    """The site of the map; `key` is the name of its weights."""
    of_class: int
    """Number of the class; 0 for a number."""


class TrainedMask(Trained, Record):
    """A group or a circuit that a file declares with `fit`: the sites, positions, features,
    dimensions or edges that a training chooses.

    Until its training is found in the store, the first candidates replace the chosen ones.
    """

    candidates: tuple[MaskCandidate, ...]
    chosen: tuple[MaskCandidate, ...]
    """Those of a search for nodes in the order in which it added them."""
    digest: str
    training: Training = field(compare=False)
    made: str = field(default="", compare=False)
    """How it was trained, for conventions."""
    scores: tuple[float, ...] = field(default=(), compare=False)
    """Of each candidate, once it is trained: the probability of its gate; without gates, the change
    of the measure if the edge carries the other value or the node has it, and NaN for a node that
    no training row changes."""

    @property
    def members(self) -> tuple[MaskCandidate, ...]:
        """The chosen candidates in the order of all candidates."""
        chosen = frozenset(self.chosen)
        return tuple(candidate for candidate in self.candidates if candidate in chosen)

    @property
    def keeps(self) -> bool:
        """Whether the candidates that aren't chosen are written in training, instead of the
        chosen."""
        return self.is_scored or bool(self.training.of_trainer.get("keep", False))

    @property
    def is_scored(self) -> bool:
        """Whether its candidates have scores instead of gates with probabilities."""
        return isinstance(self.training.trainer, ScoringTrainer)

    def can_choose(self, score: float) -> bool:
        """Whether a candidate with a score of `scores` can be chosen: it changes a training row."""
        return not isnan(score) if self.is_scored else score > 0

    @property
    def noun(self) -> str:
        """What one candidate is: `site`, `position`, `feature`, `dimension` or `edge`."""
        first = self.candidates[0]
        if isinstance(first, tuple | PlacedEdge):
            return "edge"
        if isinstance(first, SitePoint):
            return "site"
        if isinstance(first, PositionChoice):
            return "position"
        return "dimension" if first.basis is None else "feature"

    @property
    def declares(self) -> str:
        """First word of the statement that declares it."""
        return "circuit" if self.noun == "edge" else "group"

    @property
    def kind(self) -> str:
        """Description for tables and conventions."""
        every = count_noun(len(self.candidates), self.noun)
        places = {
            candidate.place for candidate in self.candidates if isinstance(candidate, PlacedEdge)
        }
        if places:
            own = len(self.candidates) // len(places)
            every += f" ({own:,} at each of {count_noun(len(places), 'position')})"
        if not self.digest and self.is_scored:
            return f"{self.training.trainer.name} over {every}"
        return f"{self.training.trainer.name} of {len(self.chosen):,} of {every}"


BasisOperand: TypeAlias = (
    FittedBasis
    | JacobianBasis
    | SpannedBasis
    | TokenBasis
    | SavedVector
    | WeightBasis
    | OutputWeights
    | DrawnBasis
    | DictionaryFile
    | PythonBasis
)


class BasisMember(Record):
    """A basis for the vectors of one site."""

    name: str
    """`axes[layer 3]`. Within one panel, equal names denote equal bases."""
    method: str
    """Its name in `BASIS_METHODS`."""
    options: Mapping[str, Constant]
    operand: BasisOperand
    width: int
    """Numbers of a vector."""
    size: int
    """Number of coordinates."""
    made: str
    """Description of how the basis was computed."""
    reads: str = ""
    """Site of the same block whose vectors have these coordinates, if they are written at another
    one: a transcoder encodes the input of the MLP."""
    labels: FeatureLabels | None = field(default=None, compare=False)
    """Descriptions of coordinates."""


PointBases = Mapping[tuple[int | None, int | None] | None, BasisMember]
"""Bases by layer and head of the written point; the key None is for all points."""


class Coordinates(Record):
    """Coordinates that a rule changes in a cell."""

    which: tuple[int, ...] = ()
    """Empty for all."""
    basis: int = 0
    """Number of the basis, if a rule uses several."""
    inserted: tuple[int, ...] = ()
    """Coordinates in the last basis that come in for these."""


class BasisTargets(Record):
    """Coordinates that a rule changes, in the basis of each cell."""

    definition: str
    """The basis as written: the name of a `basis` line, or of a `for` variable over several."""
    names: tuple[str, ...]
    """Names of the `basis` lines."""
    bases: tuple[PointBases, ...]
    """The same for each of them."""
    axes: tuple[str, ...]
    coordinates: Mapping[AxisIndices, Coordinates]
    """By the indices along `axes`."""

    @property
    def members(self) -> tuple[BasisMember, ...]:
        """All bases."""
        return tuple(member for points in self.bases for member in points.values())

    @property
    def transcodes(self) -> bool:
        """Whether coordinates are those of another site than the written one."""
        return any(member.reads for member in self.members)

    @property
    def crosses_layers(self) -> bool:
        """Whether coordinates are features of a cross-layer transcoder."""
        operands = (member.operand for member in self.members)
        return any(
            isinstance(operand, DictionaryFile) and operand.crosses_layers for operand in operands
        )

    @property
    def saved(self) -> Iterator[SavedVector | DictionaryFile]:
        """Vectors, matrices and dictionaries from files that the members use."""
        for member in self.members:
            operand = member.operand
            if isinstance(operand, OutputWeights):
                operand = SpannedBasis(() if operand.vector is None else (operand.vector,))
            leaves = iter_leaf_vectors(operand) if isinstance(operand, SpannedBasis) else (operand,)
            yield from (leaf for leaf in leaves if isinstance(leaf, SavedVector | DictionaryFile))

    @property
    def labels(self) -> tuple[FeatureLabels, ...]:
        """Descriptions of coordinates, once each."""
        labels = {member.labels.digest: member.labels for member in self.members if member.labels}
        return tuple(labels.values())

    @property
    def fits(self) -> Iterator[FittedVector | FittedBasis | JacobianBasis]:
        """What the members are fitted on."""
        for member in self.members:
            match member.operand:
                case FittedBasis() | JacobianBasis() as own:
                    yield own
                case SpannedBasis(vectors=vectors):
                    yield from (fit for each in vectors for fit in iter_fitted_vectors(each))
                case OutputWeights(vector=vector) if vector is not None:
                    yield from iter_fitted_vectors(vector)
                case _:
                    pass

    def find(self, point: SitePoint, number: int = 0) -> BasisMember | None:
        """Return the basis for the vectors of a point, None if it has none.

        The unit is ignored at sites where the rule names none.

        Args:
            number: As in `Coordinates.basis`.
        """
        bases = self.bases[number]
        if None in bases:
            return bases[None]
        whole = bases.get((point.layer, None))
        return bases.get((point.layer, point.unit), whole)

    def at(self, point: SitePoint, number: int = 0) -> BasisMember:
        """Return the basis for the vectors of a point, which has one."""
        basis_member = self.find(point, number)
        assert basis_member is not None
        return basis_member


class DirectionMember(Record):
    """One member of a direction family."""

    name: str
    """`refusal[layer 3, token -1]`. Within one panel, equal names denote equal directions."""
    vector: DirectionVector
    made: str
    """Description of how the direction was computed."""


class DirectionTargets(Record):
    """Direction of a rule, for every combination of the axes that it depends on."""

    axes: tuple[str, ...]
    members: Mapping[AxisIndices, DirectionMember]
    families: tuple[str, ...] = ()
    """Names of the `direction` definitions that are used."""

    @property
    def saved(self) -> Iterator[SavedVector]:
        """Vectors from files that the members use."""
        for member in self.members.values():
            yield from (
                leaf for leaf in iter_leaf_vectors(member.vector) if isinstance(leaf, SavedVector)
            )

    @property
    def role(self) -> VectorRole:
        """What rules do with its members."""
        return find_vector_role(next(iter(self.members.values())).vector)

    @property
    def models(self) -> Iterator[str]:
        """Models other than the experiment's that the members are fitted on."""
        return iter_fit_models(self.members.values())


def iter_fit_models(members: Iterable[DirectionMember]) -> Iterator[str]:
    """Yield the models other than the experiment's that directions are fitted on."""
    for member in members:
        for fit in iter_fitted_vectors(member.vector):
            yield from (s.run.model for s in fit.samples if s.run.model is not None)


def iter_leaf_vectors(
    vector: DirectionVector | SpannedBasis,
) -> Iterator[FittedVector | UnembeddingVector | SavedVector]:
    """Yield the vectors from which a vector is computed and which aren't computed from others."""
    match vector:
        case SpannedBasis(vectors=vectors):
            for part in vectors:
                yield from iter_leaf_vectors(part)
        case WeightedSum(parts=parts):
            for _, part in parts:
                yield from iter_leaf_vectors(part)
        case UnitVector(of=of) | RandomVector(of=of):
            yield from iter_leaf_vectors(of)
        case DrawnVector():
            pass
        case _:
            yield vector


def find_training_seed(vector: DirectionVector | SpannedBasis) -> int | None:
    """Return the seed of the training that a vector is computed from, if it is one of several; None
    for other vectors."""
    trained = (leaf for leaf in iter_leaf_vectors(vector) if isinstance(leaf, TrainedVector))
    return next((own.training.seed for own in trained if own.training.is_one_of_several), None)


def iter_read_points(vector: DirectionVector) -> Iterator[SitePoint]:
    """Yield the points whose vectors the leaf vectors of a vector are computed or trained on."""
    for leaf in iter_leaf_vectors(vector):
        match leaf:
            case FittedVector(points=points):
                yield from points
            case ProbeVector(point=point):
                yield point
            case TrainedVector(training=training):
                yield training.made
            case _:
                pass


def find_vector_role(vector: DirectionVector) -> VectorRole:
    """Return what rules do with a vector: the role of what it is computed from."""
    leaves = iter_leaf_vectors(vector)
    roles: list[VectorRole] = [leaf.role for leaf in leaves if isinstance(leaf, SavedVector)]
    others: list[VectorRole] = [role for role in roles if role != "direction"]
    return others[0] if others else "direction"


def iter_fitted_vectors(vector: DirectionVector) -> Iterator[FittedVector]:
    """Return the fitted vectors among the leaf vectors of a vector."""
    return (leaf for leaf in iter_leaf_vectors(vector) if isinstance(leaf, FittedVector))


@dataclass(frozen=True)
class SitePoint:
    """Target of one write. `unit` None means every head or neuron, or the whole vector."""

    site: str
    layer: int | None
    unit: int | None


@dataclass(frozen=True)
class FeatureNode(SitePoint):
    """A feature of a dictionary as a node of a circuit. Its number is the unit.

    A feature of the output of an MLP is at `mlp_out` as a sender, and at `mlp_norm` as a receiver.
    A feature of the output of attention is at `attn_out` as both.
    """

    basis: str
    """Name of the basis."""
    is_of_layers: bool = False
    """Whether the basis has features of several layers, so that its nodes name theirs."""


class FeatureNodes(Record):
    """The features of one output that are nodes of a circuit."""

    member: BasisMember
    """The dictionary of the features, at the output of an MLP or of attention."""
    which: tuple[int, ...]


class SiteCoordinate(Record):
    """One number of the vector of a site, in a basis or as it is."""

    point: SitePoint
    basis: str | None
    """Name of the basis; None for a dimension of the vector."""
    number: int


class PositionChoice(Record):
    """One of the positions that a mask chooses from."""

    number: int
    """Among all of them, in the order of the file."""
    label: str = field(compare=False)


CircuitEdge = tuple[SitePoint, SitePoint]
"""A sender (`resid_pre` of layer 0, `z` or `mlp_out`) and a receiver (`q`, `k`, `v`, `mlp_norm` or
`logits`) that reads its output in the residual stream. A neuron is `mlp_hidden` as both; without a
unit, the neurons of a layer that a circuit doesn't name. A `FeatureNode` is a feature, and in its
layer `mlp_out` and `mlp_norm` without a unit are the rest of the output of the MLP. If features of
the output of attention are nodes, heads of the layer send only to these and to `attn_out`, the rest
of this output, which send to the stream instead."""

PlacedEdges: TypeAlias = Mapping[CircuitEdge, frozenset[int] | None]
"""Edges of a circuit, each with the numbers of its places; None for all tokens."""


class PlacedEdge(Record):
    """An edge of a circuit at one of the positions that a training scores separately."""

    edge: CircuitEdge
    place: int
    """Number of the position, in the order of the file."""
    label: str = field(compare=False)


class PlaceOrder(Record):
    """Where information moves to between groups of tokens, such as those of positions. The last
    group is all tokens of no other group, whose edges never carry other values."""

    reaches: tuple[tuple[bool, ...], ...]
    """[group][group] whether a token of the first one is at or before one of the second, or the
    model reads later tokens; never, if no row has tokens of one of them."""
    reads_end: tuple[bool, ...]
    """[group] whether a measure reads the output of the model at one of its tokens."""


NamedEdge: TypeAlias = tuple[CircuitEdge, str | None]
"""An edge, and the text of its position in a file; None for all tokens."""

EdgeAtPlace: TypeAlias = tuple[CircuitEdge, int | None]
"""An edge of a circuit and the number of one of its places; None for all tokens."""

MaskCandidate: TypeAlias = SitePoint | SiteCoordinate | PositionChoice | CircuitEdge | PlacedEdge
"""What a mask chooses from."""


def count_numbers(point: SitePoint, shape: ModelShape) -> int:
    """Return the numbers of a point's vector; of all heads or neurons together if none is named."""
    units = unit_count(shape, point.site, point.layer) if point.unit is None else 1
    return units * vector_width(shape, point.site, point.layer)


SiteLayer = tuple[str, int | None]
"""A site and its layer."""

AxisIndices = tuple[int, ...]
"""Indices along the axes that a value depends on."""


NOTHING = "nothing"
"""Name of the site in cells that write nothing, because no site is selected."""


class SiteTargets(Record):
    """Points of a rule, for every combination of the axes that they depend on."""

    axes: tuple[str, ...]
    points: Mapping[AxisIndices, tuple[SitePoint, ...]]
    labels: Mapping[AxisIndices, str]
    """Name of the site in tables: `L2H0.z`."""
    sources: Mapping[AxisIndices, tuple[SitePoint, ...]] | None = None
    """Points that are read, if they differ from the points that are written (`into layer`)."""
    left_out: str = ""
    """How many points `except` leaves out: `3 of 12 sites`, and for which values of loops it leaves
    none of a sweep; empty without it."""
    missing: frozenset[AxisIndices] = frozenset()
    """Keys of a sweep without a point: `except` leaves none, or a layer has no such head."""

    def writes_nothing(self, key: AxisIndices) -> bool:
        """Return whether a cell has no point, or a placeholder without tokens instead."""
        return not self.points[key] or self.labels[key] == NOTHING

    @property
    def has_empty_picks(self) -> bool:
        """Whether some cell that exists has no point, because a pick is empty."""
        return any(not here for key, here in self.points.items() if key not in self.missing)


class PositionTargets(Record):
    """Positions that a rule writes in the base run and reads in the source run."""

    axes: tuple[str, ...]
    written: Mapping[AxisIndices, PositionCell]
    read: Mapping[AxisIndices, PositionCell]
    """Equal to `written` for rules that read no other run."""
    left_out: tuple[str, ...] = ()
    """Labels of positions that no row has in both runs."""
    newest: frozenset[AxisIndices] = frozenset()
    """During generation: keys whose written cell is or contains the newest token at each step
    (`last token`, `tokens *`)."""
    every: frozenset[AxisIndices] = frozenset()
    """The subset of `newest` for `tokens *`, which covers all tokens generated so far."""


class Amounts(Record):
    """Number that a rule writes, for every value of the loops that the number depends on."""

    axes: tuple[str, ...]
    values: Mapping[AxisIndices, float]


class StepRanges(Record):
    """First and last generation step in which a rule acts, for every value of their loops."""

    axes: tuple[str, ...]
    values: Mapping[AxisIndices, tuple[int, int]]


class Alternative(Record):
    """Cells in which a rule acts, if each cell uses one of several alternative rules."""

    axis: str
    index: int


class EdgeTargets(Record):
    """Attention edges from the rule's positions (the queries) to these keys."""

    change: EdgeChange | None
    """None if the edges are only observed."""
    keys: PositionTargets


class PathTargets(Record):
    """Receivers of a rule's paths."""

    receivers: SiteTargets
    """Sites that are written; those of features are the sites of their dictionary."""
    through_mlps: bool
    frozen_norms: bool = False
    basis: BasisTargets | None = None
    """The features that are receivers; None if receivers are whole vectors."""
    held: tuple[str, ...] = ("z", "mlp_out")
    """Sites of attention, other mixers and MLPs at which blocks are held."""

    def reads(self, point: SitePoint) -> SitePoint:
        """Return the point whose vectors a receiver reads, if it reads and writes other sites."""
        read = "" if self.basis is None else self.basis.at(point).reads
        return replace(point, site=read) if read else point

    @property
    def also_at_the_end(self) -> bool:
        """Whether the receivers include both the end of the model and sites before it."""
        points = (p for here in self.receivers.points.values() for p in here)
        return len({SITES[p.site].when == "output" for p in points}) == 2


def find_stream(edges: Iterable[CircuitEdge]) -> Literal["", "vision"]:
    """Return the stack that edges are in: `vision`, or empty for the language model and all stacks
    of an encoder-decoder."""
    return "vision" if any(SITES[of.site].stack == "vision" for of, _ in edges) else ""


class CircuitTargets(Record):
    """Edges of a model that a rule ablates, for every key of its sites, which are the senders."""

    name: str = field(compare=False)
    """Name of the circuit in the file."""
    edges: Mapping[AxisIndices, tuple[tuple[CircuitEdge, ...], ...]]
    """Those that it ablates at the tokens of each of `classes`."""
    every: tuple[CircuitEdge, ...] = field(compare=False)
    """The edges of the model."""
    named: Mapping[AxisIndices, PlacedEdges] = field(compare=False)
    """The edges of the circuit that the rule names, with those that `without each edge` removes,
    for every key of its loops."""
    places: tuple[PositionCell, ...] = ()
    """Positions of edges in the base run, once each; a row has one run of tokens at each."""
    classes: tuple[frozenset[int], ...] = (frozenset(),)
    """Distinct sets of places, by number, that have a token in common; the first is empty."""
    encoder: int | None = None
    """Number of the place of all tokens of an encoder-decoder's encoder, which is the last one; at
    its tokens, edges of the encoder are ablated, and at all others those of the decoder."""
    neurons: Mapping[SiteLayer, tuple[int, ...]] = field(
        default_factory=dict[SiteLayer, tuple[int, ...]]
    )
    """The neurons that are nodes, by site and layer (`mlp_hidden encoder`, 0); the others of these
    layers are one node together."""
    features: Mapping[SiteLayer, FeatureNodes] = field(
        default_factory=dict[SiteLayer, FeatureNodes]
    )
    """The features that are nodes, by output (`mlp_out`, 0); the rest of the output is one node."""
    scores: Mapping[EdgeAtPlace, float] = field(
        default_factory=dict[EdgeAtPlace, float], compare=False
    )
    """The score of each named edge at each of its places; empty if they have none."""
    digest: str = field(default="", compare=False)
    """SHA-256 of the file that it was read from; empty without one."""
    made: str = field(default="", compare=False)
    """How its edges were read from a file, for conventions."""
    waits: bool = field(default=False, compare=False)
    """Whether a training chooses its edges and hasn't run, so that they are placeholders."""
    others: Mapping[NamedEdge, float] = field(default_factory=dict[NamedEdge, float], compare=False)
    """The finite scores of the other edges of the model, if a training or a file gave them some."""
    dead: tuple[CircuitEdge, ...] = field(default=(), compare=False)
    """Edges that aren't on a path of the circuit's edges to the end of the model, if all others are
    ablated at every token."""
    place_texts: tuple[str, ...] = field(default=(), compare=False)
    """`edge_places` as a file names them; empty texts for those that depend on a parameter."""
    prompts: tuple[str, ...] = field(default=(), compare=False)
    """Digests of the prompts that its edges were chosen on, if its file has them."""

    @property
    def stack(self) -> Literal["", "vision"]:
        """The stack that all of its edges are in, as in `find_stream`."""
        return find_stream(self.every[-1:])

    @property
    def edge_places(self) -> tuple[PositionCell, ...]:
        """The positions of edges, without the place of all tokens of an encoder."""
        return self.places if self.encoder is None else self.places[: self.encoder]


class ExternalRun(Record):
    """A run of a different prompt set from which replacement values are read."""

    table: PromptTable
    run: str
    part: str | None = None
    """Part of the prompt set's split."""

    @property
    def name(self) -> str:
        """Name of the run as a rule writes it."""
        part = self.part or (None if self.run == "clean" else self.run)
        return self.table.name if part is None else f"{self.table.name}.{part}"


class VectorBatch(Protocol):
    """K vectors of one site in one layer that a rule is about to write."""

    @property
    def amounts(self) -> Tensor:
        """[K] float64: the rule's number in the cell of each vector; 0 without a number."""
        ...

    @property
    def width(self) -> int:
        """Width of a vector at this site. It is 1 for vectors over keys, which are broadcast."""
        ...

    def direction(self) -> Tensor:
        """Return the rule's direction in the cell of each vector: [K, width], float64."""
        ...

    def read(self) -> Tensor:
        """Return the vectors that `Intervention.reads` names, at the read positions: [K, width]."""
        ...


class Convention(Record):
    """Note on an intervention that is printed below a table."""

    key: str
    text: str
    closing: str = ""
    """Text printed once, after the texts of all rules with this key."""
    of_runs: bool = False
    """Whether it describes the run of a cell, which an estimate has only with `verify`."""


ChangeTarget = Literal["sites", "edges", "circuit", "input", "positions", "blocks", "nothing"]


class Intervention:
    """Effect of a rule on a run. Stages after `resolve` call this interface and know no rule kinds.

    The defaults are those of a rule that writes vectors at its sites, computed from its number
    alone.
    """

    name: ClassVar[str]
    """Name in graphs; the rule kind's verb by default. Interventions with one name and equal keys
    write the same values."""
    changes: ClassVar[ChangeTarget] = "sites"
    """Component of a run that changes: vectors at sites, edges of attention, edges between
    components, the input text, position ids or the computation of blocks; "nothing" if the rule
    only observes."""
    whole: ClassVar[bool] = False
    """Whether its rows need full forward passes, which reuse nothing from an unpatched run."""
    looks_ahead: ClassVar[bool] = False
    """Whether it lets a token attend to later ones."""
    reads: ClassVar[Literal["run", "donor", "mean", "cell"] | None] = None
    """Source of `VectorBatch.read`: the rule's run at the same prompt ("run"), that run at a
    different prompt by a seeded permutation ("donor"), its mean over all prompts ("mean"), or the
    result of `of_cell` for all rows of a cell ("cell"). None if nothing is read."""
    mode: ClassVar[
        Literal["set", "add", "scale", "along", "onto", "step", "coordinates", "edit"]
    ] = "set"
    """How the result of `values` is combined with the current activation.

    "set" replaces it and "add" is added to it. "scale" multiplies it by [K, 1] or [K, width].
    "along" sets only the component along unit directions, to the rule's number or to 0 without one.
    "onto" keeps only the component along unit directions. "step" adds [K, 1] times the difference
    between the activation and the one at the preceding position. "coordinates" changes coordinates
    in a basis. "edit" adds [K, 1] times the vectors that an edit computes from the activation.
    """
    copies: ClassVar[bool] = False
    """Whether it writes the vectors of the rule's run unchanged. Rows whose source and base run
    agree at these positions then equal the base run and aren't computed."""
    leads_on: ClassVar[bool] = False
    """Whether cells are only pairs whose `compared_sites` are in a later layer."""
    drawn_positions: ClassVar[bool] = True
    """Whether `against random(…, positions)` can move it to random positions."""

    @property
    def trained(self) -> TrainedLens | TrainedProbe | None:
        """The lens or probe that it reads, if the file declares it with `fit`."""
        return None

    @property
    def untrained(self) -> tuple[Intervention, str] | None:
        """The same with the values before the training, and what that is; None if it is no
        control."""
        return None

    @property
    def redirected(self) -> Intervention | None:
        """The same with random directions in place of the vectors that it adds, which keep their
        norms; None if it adds no vectors that it reads."""
        return None

    @property
    def identity(self) -> tuple[object, ...]:
        """Class, name and settings: interventions with equal identities have the same effect."""
        return type(self), self.name, vars(self)

    @property
    def reads_weights_only(self) -> bool:
        """Whether it reads weights alone, so that its values don't depend on any row."""
        return False

    @property
    def at_newest(self) -> str:
        """What it does at the newest token of a reply, in words: its values stay those of the final
        prompt token, and `mode` says how they combine with the current vector."""
        if self.mode == "set":
            return "the newest token receives the value written at the final prompt token"
        if self.mode == "add":
            return "the newest token receives the addition made at the final prompt token"
        return "the newest token's own vector is changed"

    @property
    def of_all_rows(self) -> bool:
        """Whether the values for a row depend on the other rows."""
        return self.over_rows or self.reads == "cell"

    @property
    def over_rows(self) -> bool:
        """Whether the values for a row depend on the positions of all rows."""
        return self.reads in ("donor", "mean")

    def key(self, rule: ResolvedRule) -> Hashable:
        """Return all that the written values depend on besides name, sites, positions and number.

        Rows of rules with equal keys are computed once.
        """
        return rule.run

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return for each cell whether a rule with this number changes nothing: [cell].

        Rows of such cells aren't computed.

        Args:
            amounts: The rule's number in each cell, [cell].
        """
        return (amounts == 0) & (self.mode in ("add", "edit", "step"))

    def detail(self, rule: ResolvedRule) -> str | None:
        """Return the text after the name of its node in the graph.

        None means that the node has no text, because the rule writes the vectors that it reads.
        """
        fill = rule.spec.fill
        return "" if rule.amounts is None or fill is None else fill.span.written

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        """Yield the notes that a table prints for the rule."""
        yield from ()

    def of_cell(self, rule: ResolvedRule, given: Tensor) -> Tensor:
        """Compute the values that are written into all rows of a cell, if `reads` is "cell".

        Args:
            given: Activations of the rule's run at the sites that one layer of the cell writes,
                with heads and neurons concatenated: [row, position, width]. NaN for positions that
                a row lacks.

        Returns:
            The values to write, [row, position, width]. The method is called once for each cell and
            layer.
        """
        return given

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        """Compute the values to write at sites: [K, width] or [K, 1]."""
        return vectors.amounts[:, None] if self.reads is None else vectors.read()


def _are_in(stack: str, site_points: Mapping[AxisIndices, tuple[SitePoint, ...]] | None) -> bool:
    """Return whether some points are in a stack other than the main one."""
    points = (point for here in (site_points or {}).values() for point in here)
    return any(SITES[point.site].stack == stack for point in points)


class ResolvedRule(Record):
    """One rule, ready to be expanded over cells. Rules with the same effect are equal."""

    spec: spec.Rule = field(compare=False)
    does: Intervention
    run: str
    """The run that is read: the source of a patch, or the run of `mean of …`."""
    sites: SiteTargets | None
    """None for `replace`, which changes the input."""
    positions: PositionTargets
    inputs: Mapping[AxisIndices, PromptRun] = field(default_factory=dict[AxisIndices, PromptRun])
    """`replace`: the base run with the inserted text, for every value of its positions."""
    groups: tuple[str, ...] | None = None
    """Group of each row whose mean is written into it (`mean by template`)."""
    amounts: Amounts | None = None
    """The number that it writes or computes with."""
    direction: DirectionTargets | None = None
    """Direction that it steers along."""
    basis: BasisTargets | None = None
    """Coordinates that it changes; None if it changes whole vectors."""
    external: ExternalRun | None = None
    """`mean of BLOCK`, `resample of BLOCK`: the run that is read. `positions.read` then refers to
    its rows."""
    python: PythonFunction | None = None
    """`set … to python(…)`: the function that computes new vectors from the base run's vectors."""
    edge: EdgeTargets | None = None
    path: PathTargets | None = None
    circuit: CircuitTargets | None = None
    """Edges that it ablates; None if it ablates whole components."""
    compared_sites: SiteTargets | None = None
    """Sites that an observation compares its own sites with."""
    only: Alternative | None = None
    """None if it acts in all cells."""
    steps: StepRanges | None = None
    """Generation steps in which it acts; None for every step."""
    after_prefill: bool = False
    """Whether it edits the prompt's cached keys or values, between step 0 and step 1."""

    @property
    def bases(self) -> tuple[BasisTargets, ...]:
        """The bases of its coordinates: of those that it changes, and of those that receive."""
        return tuple(
            basis_targets
            for basis_targets in (self.basis, self.receiving_basis)
            if basis_targets is not None
        )

    @property
    def receiving_basis(self) -> BasisTargets | None:
        """The basis of the features to which its path leads, if any."""
        return None if self.path is None else self.path.basis

    @property
    def named_positions(self) -> PositionTargets:
        """The positions that the axis `position` names: of attention between two positions, the
        keys, or the queries if only these vary."""
        if self.edge is None or (self.positions.axes and not self.edge.keys.axes):
            return self.positions
        return self.edge.keys

    @property
    def acts_later(self) -> bool:
        """Whether it acts on newest tokens in steps after the prefill."""
        return (
            bool(self.positions.newest)
            and not self.after_prefill
            and (self.steps is None or any(last > 0 for _, last in self.steps.values.values()))
        )

    @property
    def in_vision(self) -> bool:
        """Whether some of its sites are in the vision encoder of prompts with images."""
        return self.acts_in("vision")

    @property
    def reads_pattern(self) -> bool:
        """Whether it observes attention between tokens."""
        return self.edge is not None and self.does.changes == "nothing"

    def acts_in(self, stack: str) -> bool:
        """Return whether some of its sites are in a stack other than the main one."""
        sites = self.sites
        return sites is not None and (_are_in(stack, sites.points) or _are_in(stack, sites.sources))

    @property
    def only_in_vision(self) -> bool:
        """Whether it is in the vision encoder of prompts with images, and so are the sites that it
        compares there."""
        compared = () if self.compared_sites is None else self.compared_sites.points.values()
        return self.in_vision and all(
            SITES[point.site].stack == "vision" for point in chain(*compared)
        )

    @property
    def writes_vision(self) -> bool:
        """Whether it changes vectors or edges in the vision encoder of prompts with images."""
        if self.sites is None or self.does.changes == "nothing":
            return False
        return _are_in("vision", self.sites.points)

    @property
    def in_prefill(self) -> bool:
        """Whether it acts in step 0 in some cell."""
        if self.after_prefill:
            return False
        return self.steps is None or any(first == 0 for first, _ in self.steps.values.values())

    @property
    def holes(self) -> list[SiteTargets]:
        """Its sites and compared sites if some of their keys have no point."""
        every = (self.sites, self.compared_sites)
        return [targets for targets in every if targets is not None and targets.missing]

    def leads(self, at: Mapping[str, int]) -> bool:
        """Return whether a cell with these indices along the axes has points, and `leads_on`
        permits it."""
        for targets in self.holes:
            if tuple(at[axis] for axis in targets.axes) in targets.missing:
                return False
        if not self.does.leads_on or self.compared_sites is None or self.sites is None:
            return True
        points = self.sites.points[tuple(at[axis] for axis in self.sites.axes)]
        other = self.compared_sites.points[tuple(at[axis] for axis in self.compared_sites.axes)]
        return max(p.layer or 0 for p in points) < min(p.layer or 0 for p in other)

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes that any of its fields depends on."""
        parts: list[Any] = [self.sites, self.positions, self.amounts, self.direction, self.steps]
        parts += [self.basis]
        parts += [] if self.edge is None else [self.edge.keys]
        parts += [] if self.path is None else [self.path.receivers, self.path.basis]
        parts += [] if self.compared_sites is None else [self.compared_sites]
        axes = frozenset(name for part in parts if part is not None for name in part.axes)
        return axes if self.only is None else axes | {self.only.axis}


def list_end_pairs(
    senders: SiteTargets, receivers: SiteTargets
) -> Iterator[tuple[tuple[SitePoint, ...], tuple[SitePoint, ...]]]:
    """Yield the senders and the receivers of each cell of a path; a `for` over both has one value
    in a cell."""
    for (of, sending), (to, receiving) in product(senders.points.items(), receivers.points.items()):
        at = dict(zip(senders.axes, of, strict=True))
        if all(at.get(axis, n) == n for axis, n in zip(receivers.axes, to, strict=True)):
            yield sending, receiving


def select_reached(
    senders: tuple[SitePoint, ...], receivers: tuple[SitePoint, ...], *, parallel: bool
) -> tuple[SitePoint, ...]:
    """Return the receivers that come after at least one sender."""
    return tuple(
        to for to in receivers if any(precedes(of, to, parallel=parallel) for of in senders)
    )


def precedes(sender: SitePoint, receiver: SitePoint, *, parallel: bool) -> bool:
    """Return whether the sender's output is part of the stream that the receiver reads.

    Keys and values of a decoder's attention to an encoder read the output of the encoder.
    """
    of, to = SITES[sender.site], SITES[receiver.site]
    if "vision" in (of.stack, to.stack):
        if of.stack != to.stack:
            return False
        of, to = SITES[of.component], SITES[to.component]
        parallel = False
    sends, reads = of.stack == "encoder", to.side == "source"
    if sends or reads:
        if not (sends and reads) or to.stack == "cross":
            return sends and reads
        of, to = SITES[of.component], SITES[to.component]
    if to.when == "output" or of.when == "embedding":
        return True
    assert sender.layer is not None
    assert receiver.layer is not None
    if sender.layer != receiver.layer:
        return sender.layer < receiver.layer
    if to.name == "resid_pre":  # the sender is this point or comes after it
        return False
    if of.name == "resid_pre":
        return True
    if to.name == "resid_post":
        return of.name != "resid_post"
    in_mlp = to.name in ("mlp_norm", "mlp_hidden", "mlp_out")
    if to.name == "resid_mid":
        return of.name in ("z", "head_out", "attn_out")
    if of.stack == "cross":
        return in_mlp
    of_attention = of.name in ("z", "head_out", "attn_out", "resid_mid")
    return of_attention and not parallel and (in_mlp or to.stack == "cross")


def find_split_output(node: SitePoint) -> SiteLayer:
    """Return the site and layer of the output that a node is a part of, if it is a feature or the
    rest of an output: for those of an MLP, that of the MLP."""
    return "mlp_out" if node.site == "mlp_norm" else node.site, node.layer


def is_neuron(node: SitePoint) -> bool:
    """Return whether a node of a circuit is a neuron, or the other neurons of a layer."""
    return SITES[node.site].component == "mlp_hidden"


def find_inner_sender(senders: Iterable[SitePoint], output: SitePoint) -> SitePoint | None:
    """Return a sender among the neurons of an MLP or the heads of attention with this output."""
    unit = {"mlp_out": "neuron", "attn_out": "head"}.get(output.site)
    points = (point for point in senders if point.layer == output.layer)
    return next((p for p in points if unit is not None and SITES[p.site].unit == unit), None)


def name_neurons(mlp: SitePoint) -> SiteLayer:
    """Return the site and layer of an MLP's neurons."""
    stack = SITES[mlp.site].stack
    return f"mlp_hidden {stack}" if stack else "mlp_hidden", mlp.layer


AxisLabel = int | float | str


class OppositeTower(Record):
    """Texts or images that rows are scored with in the other tower of a two-tower model.

    Each input is encoded once, and no rule acts on it.
    """

    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    """Token ids of each text, as the tower reads them."""
    pictures: tuple[Picture, ...] = ()
    """Images, if the inputs aren't texts."""
    block: str = ""
    """Prompt set of the images."""

    @cached_property
    def digest(self) -> str:
        """Hash of all fields."""
        pictures = [(picture.text, picture.size) for picture in self.pictures]
        return digest(self.texts, self.ids, pictures).hex()


class RankingSource(Record):
    """An experiment whose sites were picked."""

    span: Span
    """Source location of the pick from this experiment, or from one that picked from it in turn."""
    cells: int
    """Number of cells to pick from."""
    row_keys: frozenset[int]
    """Keys of the rows that the ranking is computed from, in any prompt set."""


class ModelContext(Record):
    """Facts about a model that are known without its weights."""

    spec: spec.Model
    shape: ModelShape
    tokenizer: TextTokenizer
    opposite: OppositeTower | None = None
    image_tower: ModelContext | None = None
    """For the text tower of a model with two towers: its image tower."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def key(self) -> str:
        """Key of the loaded model. For a model with two towers it includes the opposite tower's
        inputs, because each experiment has different scores."""
        if self.opposite is None:
            return self.name
        return f"{self.name} ({self.shape.side} tower, {self.opposite.digest[:12]})"

    @property
    def stands_in(self) -> bool:
        """Whether a placeholder replaces its shape or tokenizer because that isn't available."""
        return self.shape.stands_in or self.tokenizer.stands_in


class Axis(Record):
    """One axis of the result table."""

    name: str
    labels: tuple[AxisLabel, ...]
    span: ast.Span = field(compare=False, repr=False)
    alias: str | None = None
    """Second name that reports may use: `item` for the positions of `each item token`."""
    items: tuple[int | None, ...] = ()
    """1-based occurrence for each value, if the axis runs over occurrences."""
    of_windows: bool = field(default=False, compare=False)
    """Whether its values are the centres of windows."""

    def __len__(self) -> int:
        return len(self.labels)


class LoopCells(Record):
    """Combinations of loop values that exist.

    The loops are those whose values depend on other loops, such as `b` in
    `for a in 0..5 { for b in a..5 { … } }`, and the loops that they depend on.
    """

    axes: tuple[str, ...]
    keys: frozenset[AxisIndices]

    def has(self, at: Mapping[str, int]) -> bool:
        """Return whether the combination exists.

        Args:
            at: Indices along all of these loops; further axes are ignored.
        """
        return tuple(at[axis] for axis in self.axes) in self.keys

    def along(self, names: Collection[str], fixed: Mapping[str, int] | None = None) -> LoopCells:
        """Select some of the loops, with the combinations of their values that exist.

        Args:
            names: The loops to select.
            fixed: Loops with a fixed index; only combinations with these indices count.
        """
        said = [
            (self.axes.index(name), i) for name, i in (fixed or {}).items() if name in self.axes
        ]
        own = (key for key in self.keys if all(key[place] == i for place, i in said))
        places = [place for place, axis in enumerate(self.axes) if axis in names]
        keys = frozenset(tuple(key[place] for place in places) for key in own)
        return LoopCells(tuple(self.axes[place] for place in places), keys)


def count_cells(axes: Sequence[Axis], nested: LoopCells | None) -> int:
    """Count the cells along some axes."""
    there = LoopCells((), frozenset({()}))
    there = there if nested is None else nested.along([axis.name for axis in axes])
    return len(there.keys) * prod(len(axis) for axis in axes if axis.name not in there.axes)


ItemNumber = int | None
"""Occurrence of the cell (`{item.index}`), which a text may depend on in addition to the row."""


class MetricTerm(Record):
    """One metric of an expression, with its arguments resolved for every row."""

    node: ast.Expr
    name: str
    form: MetricForm
    texts: Mapping[ItemNumber, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Token ids of the text, or the output number of a class, by occurrence and row."""
    of_class: bool = False
    """Whether `texts` contains outputs of a classifier instead of tokens."""
    sets: Mapping[ItemNumber, TokenSets] = field(default_factory=dict)
    """Tokens of any of several texts or numerals, by occurrence."""
    classes: int = 0
    """Number of classes of a model that scores texts, its first outputs; 0 means all outputs."""
    run: str | None = None
    """Reference run of `kl`, `js` and `cosine`."""
    point: SitePoint | None = None
    """Site of `cosine`."""
    points: Mapping[AxisIndices, SitePoint] = field(default_factory=dict[AxisIndices, SitePoint])
    """For a sweep: the site for each value of `axes`."""
    axes: tuple[Axis, ...] = ()
    wanted: Mapping[ItemNumber, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """For a metric of the reply: the texts of its arguments, by occurrence and row."""
    python: PythonFunction | None = None
    rows: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)
    """Values of each row that the Python function receives."""
    tokenizer: TextTokenizer | None = field(default=None, compare=False, repr=False)
    """Tokenizer that the Python function receives."""
    own: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Token at the measured position (`loss at …`), by run and row."""
    lacking: tuple[int, ...] = ()
    """Rows without this text, if it is one of several accepted texts; its probability is 0
    there."""
    part_of: ast.Expr | None = None
    """The metric of several accepted texts, if this is the term of one of them."""
    alternatives: tuple[MetricTerm, ...] = ()
    """The accepted texts, each of one or more tokens, whose probabilities are added. A measure
    contains these terms instead of this one."""

    @property
    def by_item(self) -> bool:
        """Whether its text differs between the cells of one row."""
        named = {*self.texts, *self.sets, *self.wanted}
        return named != {None} and bool(named)

    @property
    def named(self) -> Iterator[int]:
        """All tokens of its texts; duplicates are possible."""
        for texts in self.texts.values():
            for tokens in texts:
                yield from tokens
        for sets in self.sets.values():
            for tokens in sets.tokens:
                yield from tokens

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of text tokens for each row; the longest text counts if cells differ."""
        return tuple(max(map(len, texts)) for texts in zip(*self.texts.values(), strict=True))

    @cached_property
    def appended(self) -> tuple[int, ...]:
        """Number of text tokens that are appended to each row's prompt. The last token is only
        predicted, and only metrics of a whole text append any."""
        if self.form.takes != "continuation":
            return (0,) * len(self.lengths)
        return tuple(length - 1 for length in self.lengths)


class ResolvedMeasure(Record):
    """One expression over metrics, read at one position of each run."""

    label: str
    text: str
    expression: ast.Expr
    atoms: tuple[MetricTerm, ...]
    kind: Literal["number", "category"]
    unit: str
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Token position that is read, by run and row; the last token for runs without an entry."""
    truth: tuple[float, ...] | None = None
    """For categories: the number that each row's answer spells."""
    observed: bool = False
    """Whether metrics of tokens read the logits of the observation instead of the model's."""
    absent: tuple[int, ...] = ()
    """Rows that lack the position; they have no value."""
    item: int | None = None
    """Occurrence at which it is read, if it is read at each occurrence."""
    reply: tuple[object, ...] | None = None
    """Key of the generation settings of the reply that it reads; None if it reads no reply."""
    in_reply: ReplyPosition | None = None
    """Position in the reply at which it is read; `at` is then the final prompt token."""

    @property
    def compared_runs(self) -> tuple[str, ...]:
        """Runs that its metrics compare with: `kl(clean)`."""
        return tuple(dict.fromkeys(atom.run for atom in self.atoms if atom.run is not None))

    @property
    def word(self) -> str:
        """Name of the metric (`prob` for `prob(answer)`); empty for several metrics."""
        match self.expression:
            case ast.Call(name=word) | ast.Name(id=word):
                return word
            case _:
                return ""


AxisLabels = tuple[tuple[str, AxisLabel], ...]
"""Axis names, each with one label."""


class MeasureGroup(Record):
    """Measures of an experiment at one of the positions at which they are read."""

    labels: AxisLabels
    """Label of the position: `(("measured", "item 2"),)`."""
    measures: tuple[ResolvedMeasure, ...]
    fixed: Mapping[str, int] = field(default_factory=dict[str, int])
    """Loops whose variables the measures name, with the index of the value used here. Cells with
    other values belong to other groups."""


class ResolvedSave(Record):
    """A `save` line with concrete sites and positions."""

    spec: spec.Save = field(compare=False)
    run: str
    points: tuple[SitePoint, ...]
    """Points to save, one tensor for each."""
    cells: tuple[PositionCell, ...]
    basis: BasisTargets | None = None
    """One member, whose coordinates at the one point are saved instead of the vectors."""
    gradient: ResolvedMeasure | None = None
    """The metric whose gradients are saved instead of the vectors."""

    @property
    def in_reply(self) -> bool:
        """Whether it saves tokens that its run generates."""
        return any(cell.reply is not None for cell in self.cells)

    def count_patches(self, shape: ModelShape) -> int:
        """Return the largest number of vectors of a token of an image: its patches in a vision
        encoder of prompts, otherwise 1."""
        in_vision = any(SITES[point.site].stack == "vision" for point in self.points)
        return shape.merged_side**2 if in_vision else 1


class ResolvedDirectionFile(Record):
    """A `save direction` line with the directions that it writes."""

    spec: spec.SavedDirection = field(compare=False)
    members: Mapping[str, DirectionMember]
    """The direction in each tensor of the file."""
    width: int
    """Numbers of each vector."""
    control_vector: bool = False
    """Whether the file is a control vector of llama.cpp."""
    without_first: bool = False
    """Whether layer 0 is left out, to which llama.cpp adds no control vector."""

    @property
    def models(self) -> Iterator[str]:
        """Models other than the experiment's that the members are fitted on."""
        return iter_fit_models(self.members.values())


def find_image_layout(reader: TextTokenizer, table: PromptTable) -> ImageLayout | None:
    """Return how a model with this tokenizer reads the images in its prompts; None without them."""
    seen = any(row.pictures for run in table.runs.values() for row in run.rows)
    return reader.layout if seen and isinstance(reader, ImagePromptTokenizer) else None


def mixes_images(model: ModelContext, table: PromptTable) -> bool:
    """Return whether tokens of the prompts' images attend to later tokens of the image."""
    layout = find_image_layout(model.tokenizer, table)
    return layout is not None and layout.mixes


class ResolvedExperiment(Record):
    """An experiment with all that a plan needs except weights."""

    spec: spec.Experiment
    model: ModelContext
    table: PromptTable
    axes: tuple[Axis, ...]
    rules: tuple[ResolvedRule, ...]
    measures: tuple[ResolvedMeasure, ...]
    keep: tuple[ResolvedMeasure, ...]
    accuracies: Mapping[str, ResolvedMeasure]
    """`correct` on the runs that an `accuracy(RUN)` names."""
    seed: int
    nested: LoopCells | None = None
    """None if every combination of loop values is a cell."""
    picks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Picks as written (`top 3 of cie`), with a description of the picked sites or tokens."""
    stand_ins: tuple[str, ...] = ()
    """Experiments that it picks from and that haven't run, so their first cells are
    placeholders."""
    sites_of: Mapping[str, RankingSource] = field(default_factory=dict, compare=False, repr=False)
    """Experiments whose sites it uses, and those that these experiments picked from, by name."""
    masks: tuple[TrainedMask, ...] = field(default=(), compare=False)
    """The groups that it uses and that a training chooses; their sites are those of its rules."""
    read_groups: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
    """Trained groups that it reads from files: `group g` → what was read."""
    seeds: tuple[int, ...] = field(default=(), compare=False)
    """Values of the axis `seed`, if it is that of trainings with several seeds."""
    control: ResolvedControl | None = None
    without_control: str = ""
    """Why it has no control although it uses something trained."""
    bare: BaselineExperiment | None = None
    """Baseline for the effects of its observations."""
    circuit_baselines: Mapping[CircuitBaseline, BaselineExperiment] = field(
        default_factory=dict[CircuitBaseline, "BaselineExperiment"]
    )
    """Baselines for effects of an ablated circuit."""
    everything: tuple[ResolvedRule, ...] = field(default=(), compare=False)
    """Its rules as they ablate everything that a circuit of nodes is chosen from, one for each
    rule; empty if no effect is relative to that run."""
    as_base: bool = False
    """Whether it reads prompts and replies without its rules, which were active in generation."""
    control_of: str | None = None
    """Key of the experiment that this one is the control or the baseline of."""
    drawn: DrawCounts | None = None
    """For a control: the number of draws in each cell."""
    partial_layers: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict[str, tuple[int, ...]], compare=False
    )
    """`layer *` of sites that some blocks lack, as written, with the layers that it names."""
    saves: tuple[ResolvedSave, ...] = ()
    direction_files: tuple[ResolvedDirectionFile, ...] = ()
    derived: Mapping[str, ResolvedExperiment] = field(default_factory=dict)
    """Runs with rules that it defines, in order of dependency, each with one cell and no
    measures."""
    places: tuple[MeasureGroup, ...] = ()
    """Measures at each position, if there are several; `measures` has those at the first."""
    place: MeasureGroup | None = None
    """The group in `places` that this experiment was split off for, if any."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def trained_parts(self) -> dict[str, str]:
        """`group g`, `lens l`, `probe t` → how it was trained, or read from a file."""
        parts = {f"{mask.declares} {mask.training.definition}": mask.made for mask in self.masks}
        parts |= self.read_groups
        for own in (rule.does.trained for rule in self.every_rule):
            if own is not None:
                parts[f"{own.training.trainer.declares} {own.training.definition}"] = own.made
        return parts

    @property
    def has_path(self) -> bool:
        """Whether one of its rules is a `path`."""
        return any(rule.path is not None for rule in self.rules)

    @property
    def has_circuit(self) -> bool:
        """Whether one of its rules ablates edges of a circuit."""
        return any(rule.circuit is not None for rule in self.rules)

    @property
    def generation(self) -> Generation | None:
        """Generation settings of its rows; None if they generate no text."""
        return self.spec.generation

    @property
    def key(self) -> str:
        """Name that is unique among all variants."""
        return self.spec.key

    @property
    def combined_axis(self) -> str | None:
        """Name of the axis over which measures are averages or areas; None without one."""
        over = self.spec.over
        named = (axis.name for axis in self.axes if over in (axis.name, axis.alias))
        return None if over is None else next(named, None)

    def has(self, index: AxisIndices) -> bool:
        """Return whether its measures are read in the cell with these indices along its axes."""
        at = {axis.name: number for axis, number in zip(self.axes, index, strict=True)}
        fixed = {} if self.place is None else self.place.fixed
        if any(at.get(name, i) != i for name, i in fixed.items()):
            return False
        return self.own_loops is None or self.own_loops.has(at)

    @cached_property
    def own_loops(self) -> LoopCells | None:
        """`nested`, restricted to the loops that are axes here and to fixed values of the
        others."""
        if self.nested is None:
            return None
        fixed = {} if self.place is None else self.place.fixed
        return self.nested.along([axis.name for axis in self.axes], fixed)

    @property
    def observed_axes(self) -> frozenset[str]:
        """Names of the axes of observations alone: along these, no rule changes anything else."""
        changing = [rule.does.changes != "nothing" for rule in self.rules]
        both = [
            frozenset(
                name
                for rule, own in zip(self.rules, changing, strict=True)
                if own == changes
                for name in rule.axes
            )
            for changes in (False, True)
        ]
        return both[0] - both[1]

    @property
    def models(self) -> tuple[str, ...]:
        """The model that it runs on, and other models that it reads."""
        others = [run.model for run in self.spec.elsewhere if run.model is not None]
        others += [m for rule in self.every_rule if rule.direction for m in rule.direction.models]
        others += [model for file in self.direction_files for model in file.models]
        fits = (fit for rule in self.every_rule for basis in rule.bases for fit in basis.fits)
        samples = [sample for fit in fits for sample in fit.samples]
        read = (rule.does.trained for rule in self.every_rule)
        samples += [own.training.sample for own in read if own is not None]
        others += [sample.run.model for sample in samples if sample.run.model is not None]
        return tuple(dict.fromkeys((self.model.key, *others)))

    @property
    def python(self) -> tuple[PythonFunction, ...]:
        """Functions of Python files that its results depend on."""
        measured = [atom.python for m in (*self.measures, *self.keep) for atom in m.atoms]
        written = [rule.python for rule in self.every_rule]
        bases = (basis for rule in self.every_rule for basis in rule.bases)
        operands = (member.operand for basis in bases for member in basis.members)
        written += [operand.function for operand in operands if isinstance(operand, PythonBasis)]
        functions = (
            python_function
            for python_function in (*measured, *written)
            if python_function is not None
        )
        python_functions = [*self.table.python, *functions]
        return tuple(dict.fromkeys(python_functions))

    @property
    def every_rule(self) -> tuple[ResolvedRule, ...]:
        """Its rules, preceded by those of the runs that it defines."""
        return (*(rule for run in self.derived.values() for rule in run.rules), *self.rules)

    @cached_property
    def mixes_images(self) -> bool:
        """Whether tokens of its images attend to later tokens of the image."""
        return mixes_images(self.model, self.table)

    @cached_property
    def in_vision(self) -> bool:
        """Whether its rules are in the vision encoder of prompts with images."""
        return any(rule.in_vision for rule in self.every_rule)

    @cached_property
    def acted_stacks(self) -> tuple[str, ...]:
        """The encoders that its rules are in: `vision` of prompts with images, `encoder`."""
        return tuple(
            stack
            for stack in ("vision", "encoder")
            if any(rule.acts_in(stack) for rule in self.every_rule)
        )

    @cached_property
    def needs_full_passes(self) -> bool:
        """Whether images need full passes: its model adds their vectors after several blocks, or
        its rules are in the vision encoder."""
        layout = find_image_layout(self.model.tokenizer, self.table)
        return self.in_vision or (layout is not None and layout.several_layers)

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens may attend to later ones in a run with rules that it defines."""
        return any(rule.does.looks_ahead for run in self.derived.values() for rule in run.rules)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def n_cells(self) -> int:
        """Number of cells of its full grid, including combinations that don't exist."""
        return prod(self.shape)

    def cells_along(self, names: Sequence[str]) -> Counter[AxisIndices]:
        """Count its cells for each combination of indices along some axes."""
        holes = [(each.axes, each.missing) for rule in self.rules for each in rule.holes]
        wide = dict.fromkeys((*names, *(name for axes, _ in holes for name in axes)))
        nest = self.own_loops or LoopCells((), frozenset({()}))
        free = [axis for axis in self.axes if axis.name not in nest.axes]
        times = prod(len(axis) for axis in free if axis.name not in wide)
        free = [axis for axis in free if axis.name in wide]
        counts: Counter[AxisIndices] = Counter()
        for key, numbers in product(nest.keys, product(*(range(len(axis)) for axis in free))):
            at = dict(
                zip((*nest.axes, *(axis.name for axis in free)), (*key, *numbers), strict=True)
            )
            if not any(tuple(at[name] for name in axes) in gone for axes, gone in holes):
                counts[tuple(at[name] for name in names)] += times
        return counts

    @property
    def n_there(self) -> int:
        """Number of its cells, without combinations of loop values that don't exist and those
        without a site."""
        return self.count_along([axis.name for axis in self.axes])

    def count_along(self, names: Collection[str]) -> int:
        """Count the combinations of values along some axes that have a cell."""
        if any(rule.holes for rule in self.rules):
            return len(self.cells_along([axis.name for axis in self.axes if axis.name in names]))
        return count_cells([axis for axis in self.axes if axis.name in names], self.own_loops)


class ExperimentOutline(Record):
    """Known facts about an experiment, including one with errors, against which its reports and
    expectations are checked."""

    spec: spec.Experiment
    model: ModelContext
    table: PromptTable
    axes: tuple[Axis, ...]
    perhaps: frozenset[str]
    """Names of axes that rejected rules, or positions with unknown tokens, may have."""
    measures: tuple[ResolvedMeasure | None, ...]
    """One entry for each measure that it names; None for a rejected measure."""
    resolved: ResolvedExperiment | None
    """None if the experiment has errors."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def unknown(self) -> frozenset[UnknownFact]:
        """Kinds of facts for which a placeholder is used."""
        facts = {
            "shape": self.model.shape.stands_in,
            "tokens": self.model.tokenizer.stands_in,
            "rows": self.table.stands_in,
            "count": self.table.stands_in or self.table.cut,
            "columns": self.table.columns_unknown,
        }
        return frozenset(what for what in UNKNOWN_FACTS if facts[what])


class DrawCounts(Record):
    """Number of draws in each cell of a control. The number may differ between cells."""

    axes: tuple[str, ...]
    counts: Mapping[AxisIndices, int]


class BaselineExperiment(Record):
    """The same cells without or with other rules, used as the baseline of effects."""

    experiment: ResolvedExperiment
    numbers: tuple[int, ...]
    """Indices of the measures whose effects are computed against it."""


class ResolvedControl(Record):
    """The same experiment on random targets."""

    experiment: ResolvedExperiment
    """The control with a leading `DRAW_AXIS`; not every cell has every draw."""
    draws: int
    """Largest number of draws in a cell."""
    asked: int
    what: str
    """Description of the targets: `random heads`."""
    said: str
    """Description of how they were drawn."""
    title: ControlTitle = "null"
    """Heading of its column."""


DRAW_AXIS = "random draw"
"""An axis name that no file can use."""


class DirectionFamily(Record):
    """Directions of one width over some axes; a single direction if there are no axes."""

    name: str
    axes: tuple[Axis, ...]
    members: Mapping[AxisIndices, DirectionMember]
    width: int | None
    """None if only a file that isn't available specifies it."""
    definitions: tuple[str, ...] = ()
    """Names of the `direction` lines that it is computed from."""

    def axis(self, name: str) -> Axis | None:
        return next((axis for axis in self.axes if axis.name == name), None)
