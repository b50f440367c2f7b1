"""Vectors of many rows, read batch by batch, and directions and bases computed from them.

The reader doesn't collect rows: a caller that needs all rows at once stores the vectors itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import EmptyDirection
from mechdsl.dictionaries.features import Dictionary, LaterDecoder, combine_some, load_dictionary
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute.unpatched_batch import (
    UnpatchedBatch,
    UnpatchedRequest,
    add_images,
    build_noise_writes,
    compute_unpatched,
)
from mechdsl.fits.regression import ConvergenceError
from mechdsl.fits.vectors import turn_edit
from mechdsl.forward.hooks.backward_rules import (
    AutogradFailed,
    catch_autograd_errors,
    compute_gradients,
)
from mechdsl.forward.hooks.batch import Batch, EditWrite, SiteRead, SiteWrite, indices_to_device
from mechdsl.forward.hooks.coordinates import (
    CoordinateSystem,
    CoordinateWrite,
    LinearBasis,
    StandardBasis,
)
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import get_head_weights, project_heads
from mechdsl.forward.hooks.model import LoadedModel, has_single_output
from mechdsl.forward.hooks.module_exchange import load_weights
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps
from mechdsl.models.shape import ModelShape, PaddingSide, unit_count, vector_width
from mechdsl.planner.plan import PROMPT_TOKENS, ExperimentPlan, read_batches
from mechdsl.planner.rows import RulePlan, TokenHits
from mechdsl.program.direction_methods import (
    BASIS_METHODS,
    MethodError,
    fitted_method,
    fitted_vector,
    linear_map,
)
from mechdsl.program.python_functions import PythonFailure, PythonFunction
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.bases import NEXT_MAPS
from mechdsl.resolve.trainings import name_edit_tensors
from mechdsl.resolve.types import (
    BasisMember,
    BasisTargets,
    DirectionMember,
    DirectionVector,
    DrawnBasis,
    DrawnVector,
    FitSample,
    FittedBasis,
    FittedVector,
    JacobianBasis,
    OutputWeights,
    ProbeVector,
    PythonBasis,
    RandomVector,
    SavedVector,
    SitePoint,
    SpannedBasis,
    TokenBasis,
    UnembeddingVector,
    UnitVector,
    WeightBasis,
    WeightedSum,
    count_numbers,
    iter_fitted_vectors,
)
from mechdsl.vocab.sites import SITES, CoordinateOperation, stop_layer


@dataclass(frozen=True, eq=False)
class PythonCoordinates:
    """Features of a Python object with `encode` and `decode`."""

    encoder: Any
    size: int

    @property
    def is_affine(self) -> bool:
        """Whether features are an affine map of vectors, as far as is known."""
        return False

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Return features: [K, size], or [K, m] of those in `which`."""
        activations = self.encoder.encode(vectors).to(vectors)
        return activations if which is None else activations.gather(1, which)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return [K, width]: the reconstructions of vectors [K, width]."""
        return self.encoder.decode(self.encode(vectors, None)).to(vectors)

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: vectors whose features have changed; the rest of them stays."""
        now = self.encode(vectors, None)
        new = now + change if which is None else now.scatter_add(1, which, change)
        decode = self.encoder.decode
        return vectors + decode(new).to(vectors) - decode(now).to(vectors)


def load_encoder(function: PythonFunction, width: int, size: int) -> PythonCoordinates:
    """Create the object of a Python file, and check the shapes that it returns.

    Raises:
        PythonFailure: It can't be created, or doesn't encode and decode vectors.
    """
    made = PythonCoordinates(function.call(), size)
    vectors = torch.linspace(-1, 1, 3 * width).view(3, width)
    for name, given, shape in (
        ("encode", vectors, [3, size]),
        ("decode", torch.zeros(3, size), [3, width]),
    ):
        try:
            with torch.no_grad():
                encoder = getattr(made.encoder, name)(given)
        except Exception as error:
            reason = f"`{name}` raised {type(error).__name__}: {error}"
            hint = f"`{name}` must accept a tensor of {list(given.shape)}"
            raise function.failure(reason, hint, error=error) from error
        if not isinstance(encoder, Tensor) or list(encoder.shape) != shape:
            numbers = list(encoder.shape) if isinstance(encoder, Tensor) else type(encoder).__name__
            reason = f"`{name}` returned {numbers} for {list(given.shape)}"
            raise function.failure(reason, f"it must return a tensor of {shape}")
    return made


@dataclass(frozen=True, eq=False)
class _BasisArrays:
    """Implementation of `mechdsl.program.direction_methods.BasisInput`."""

    member: BasisMember
    rows: Callable[[], Tensor]
    weights: Callable[[], Tensor]

    @property
    def width(self) -> int:
        return self.member.width

    def matrix(self) -> Floats:
        return self.rows().double().numpy()

    def next_map(self) -> Floats:
        operand = self.member.operand
        if not isinstance(operand, SpannedBasis) or operand.next_map is None:
            raise TypeError("`next_map` needs a method with `reads_next_map = True`")
        return self.weights().double().numpy()

    def normal(self, rows: int) -> Floats:
        operand = self.member.operand
        if not isinstance(operand, DrawnBasis):
            raise TypeError('`normal` needs a method with `takes = "nothing"`')
        seed = stable_hash(operand.seed, "basis", operand.draw)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
        return random.standard_normal((rows, self.width))


@dataclass(frozen=True, eq=False)
class OutputMap:
    """The numbers of all heads or neurons of a layer, as coordinates of what they write."""

    rows: Tensor
    """[size, width] float64: what each number adds to the output."""
    is_affine = True

    @property
    def size(self) -> int:
        return len(self.rows)

    @cached_property
    def _moved(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _like(self, vectors: Tensor) -> Tensor:
        key = vectors.device, vectors.dtype
        if key not in self._moved:
            self._moved[key] = self.rows.to(vectors)
        return self._moved[key]

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, m]: the named numbers of all heads or neurons [K, size]."""
        return vectors if which is None else vectors.gather(1, which)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return [K, width]: what all heads or neurons [K, size] write."""
        return vectors @ self._like(vectors)

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: outputs after numbers that are written have changed."""
        return vectors + combine_some(change, self._like(vectors), which)


def read_output_map(model: LoadedModel, weights: OutputWeights, vector: Tensor | None) -> OutputMap:
    """Return what a change of output weights adds to the output of the sublayer.

    Args:
        vector: [width], computed from `weights.vector`; None for the weights themselves.

    Raises:
        ValueError: The sublayer has no linear map.
    """
    matrix = read_written_weights(model, weights.site, weights.layer).T
    tap = model.tap(weights.site, weights.layer)
    if vector is not None:
        rows = vector.double().expand_as(matrix)
        matrix = rows - matrix if weights.replaces else rows
    return OutputMap(matrix * tap.scale)


def list_directions(system: CoordinateSystem, width: int) -> Tensor:
    """Return [size, width] float64: what each coordinate of 1 adds to a vector."""
    size = system.size
    nothing = torch.zeros(size, width, dtype=torch.float64)
    return system.shift(nothing, torch.eye(size, dtype=torch.float64), None)


def list_readers(system: CoordinateSystem, width: int) -> Tensor:
    """Return [width, size] float64: the linear map from vectors to coordinates; for a dictionary,
    to features before bias and activation function."""
    if isinstance(system, Dictionary):
        return system.encoder_weights().double()
    units = torch.eye(width, dtype=torch.float64)
    return system.encode(units, None) - system.encode(torch.zeros_like(units), None)


def compute_system(
    member: BasisMember, rows: Callable[[], Tensor], weights: Callable[[], Tensor]
) -> CoordinateSystem:
    """Compute a basis that isn't of output weights.

    Args:
        rows: Returns the operand, [row, width].
        weights: Returns [output, width], the map that reads the site.

    Raises:
        MethodError: A class from outside the package fails.
        ValueError: The operand has no such basis.
    """
    if isinstance(member.operand, DictionaryFile):
        return load_dictionary(member.operand)
    if isinstance(member.operand, PythonBasis):
        return load_encoder(member.operand.function, member.width, member.size)
    if member.method == "neurons":
        return StandardBasis(member.size)
    arrays = _BasisArrays(member, rows, weights)
    system = linear_map(BASIS_METHODS[member.method], arrays, member.options, member.size)
    center = None if system.center is None else torch.from_numpy(system.center)
    return LinearBasis.of(torch.from_numpy(system.directions), center)


def read_written_weights(model: LoadedModel, site: str, layer: int) -> Tensor:
    """Return [width, input]: the map that writes to a site, with the gain of a norm after it.

    Raises ValueError if it isn't a linear map.
    """
    maps = WeightMaps(model)
    try:
        with load_weights(model.module), torch.no_grad():
            neurons = maps.neurons(layer) if site == "mlp_out" else maps.output(layer).flatten(0, 1)
    except NoLinearMap as error:
        raise ValueError(str(error)) from error
    return neurons.T.double().cpu()


def read_next_weights(model: LoadedModel, point: SitePoint) -> Tensor:
    """Return [output, width]: the map that reads a point, with the gain of a norm after it.

    For one head of `z`, it is the head's part of the map. Raises ValueError if it isn't linear.
    """
    assert point.layer is not None
    weights = read_written_weights(model, NEXT_MAPS[point.site], point.layer)
    if point.unit is None:
        return weights
    size = vector_width(model.shape, point.site, point.layer)
    return weights[:, point.unit * size : (point.unit + 1) * size]


# --- Jacobians ------------------------------------------------------------------------------------


MAX_JACOBIAN_NUMBERS = 1 << 26
"""Numbers of the Jacobians that are in memory together."""


@dataclass(frozen=True, eq=False)
class JacobianProduct:
    """The mean over rows of JᵀJ, or of JJᵀ for a basis of the target."""

    product: Tensor
    """[width, width] float64, on the CPU."""
    passes: int
    """Number of forward passes."""


def mean_jacobian_product(
    model: LoadedModel, basis: JacobianBasis, *, seed: int, side: PaddingSide | None = None
) -> JacobianProduct:
    """Compute the mean over rows, and over the tokens and noise draws of each row.

    Each token has a row of the batch to itself, so that its Jacobian has no part of other tokens.

    Args:
        seed: Seed of noise.
        side: As in `ExecutionOptions`.

    Raises:
        AutogradFailed: Autograd can't differentiate the model's code.
    """
    spots = [
        (prompt, token, sum(map(len, runs)))
        for prompt, runs in enumerate(basis.sample.cell.hits)
        for run in runs
        for token in run
    ]
    rows, draws = len({prompt for prompt, _, _ in spots}), basis.sample.run.draws
    width = count_numbers(basis.target if basis.of_target else basis.source, model.shape)
    total = torch.zeros(width, width, dtype=torch.float64)
    passes = 0
    for part in _split(model, basis, spots):
        jacobians = _jacobians(model, basis, [spot[:2] for spot in part], seed, side)
        weights = torch.tensor([1 / (rows * count * draws) for _, _, count in part])
        weights = weights.double().repeat_interleave(draws)
        scaled = jacobians.cpu().double() * weights.sqrt()[:, None, None]
        flat = (scaled.transpose(1, 2) if basis.of_target else scaled).flatten(0, 1)
        total += flat.T @ flat
        passes += 1
    return JacobianProduct(total, passes)


def _split(
    model: LoadedModel, basis: JacobianBasis, spots: list[tuple[int, int, int]]
) -> Iterator[list[tuple[int, int, int]]]:
    """Split the tokens into batches."""
    longest = max(len(row.ids) for row in basis.sample.run.rows)
    numbers = count_numbers(basis.source, model.shape) * count_numbers(basis.target, model.shape)
    count = min(PROMPT_TOKENS // longest, MAX_JACOBIAN_NUMBERS // numbers)
    count = max(1, count // basis.sample.run.draws)
    return (spots[begin : begin + count] for begin in range(0, len(spots), count))


def _jacobians(
    model: LoadedModel,
    basis: JacobianBasis,
    spots: list[tuple[int, int]],
    seed: int,
    side: PaddingSide | None,
) -> Tensor:
    """Return [K, width of target, width of source]: the Jacobians at tokens of prompts, those of
    all noise draws of a token one after the other."""
    run = basis.sample.run
    spots = [spot for spot in spots for _ in range(run.draws)]
    prompts = np.array([prompt for prompt, _ in spots], dtype=np.int64)
    keys = basis.sample.table.row_keys
    noise = build_noise_writes(model, run.noise, prompts, keys, seed)
    run_rows = [run.rows[prompt] for prompt, _ in spots]
    ids = [row.ids for row in run_rows]
    batch = Batch.of(ids, model.pad_id, side or model.calling.side, model.device)
    batch = add_images(model, batch, run_rows)
    lanes, tokens = torch.arange(len(spots)), torch.tensor([token for _, token in spots])
    dtype = torch.promote_types(model.dtype, torch.float32)
    width = count_numbers(basis.source, model.shape)
    leaf = torch.zeros(len(spots), width, dtype=dtype, device=model.device, requires_grad=True)
    read = SiteRead(basis.target.site, basis.target.layer)
    with catch_autograd_errors():
        result = run_full(
            model,
            batch,
            stop=stop_layer(read.site, read.layer, model.shape.n_layers),
            writes=[*noise, _addition(model, basis.source, lanes, tokens, leaf)],
            reads=[read],
            gradients=True,
        )
    tensors = result.reads[read]
    # A classifier has one output, whatever the token.
    one = read.site == "logits" and has_single_output(model)
    columns = torch.zeros_like(lanes) if one else batch.columns(lanes, tokens)
    vectors = tensors[indices_to_device((lanes, columns), tensors.device)]
    unit = basis.target.unit
    vectors = vectors.flatten(1) if unit is None else vectors[:, unit]
    last = vectors.shape[1] - 1
    rows = [
        compute_gradients(vectors[:, number].sum(), [leaf], keep=number < last)[0]
        for number in range(last + 1)
    ]
    return torch.stack(rows, dim=1)


def _addition(
    model: LoadedModel, point: SitePoint, lanes: Tensor, tokens: Tensor, leaf: Tensor
) -> SiteWrite:
    """Add the leaf to the vectors of a point, with all heads or neurons if it names none."""
    count = unit_count(model.shape, point.site, point.layer) if point.unit is None else 1
    first = point.unit or 0
    units = torch.arange(first, first + count).repeat(len(lanes))
    rows, positions = (each.repeat_interleave(count) for each in (lanes, tokens))
    values = leaf.unflatten(1, (count, -1)).flatten(0, 1)
    return SiteWrite(point.site, point.layer, rows, positions, units, values, mode="add")


CPU_ACTIVATION_BYTES = 8 << 20
"""Maximum size of one activation of a batch on a CPU. The memory of larger ones goes back to the
system after each use and must be cleared for the next, which took a quarter of the time of reading
GPT-2 small with 4,096 tokens."""

MIN_READ_TOKENS = 256
"""Number of tokens that a batch may have however wide the model is."""

BatchReader: TypeAlias = Callable[[Ints], UnpatchedBatch]
"""Returns a run on these prompts, with the requested sites."""


@dataclass(frozen=True, eq=False)
class SiteVectors:
    """Vectors of one site at one position, in the rows of a batch."""

    batch: int
    """Number of the batch."""
    point: int
    """Index of the site among the requested ones."""
    position: int
    """Index of the position."""
    prompts: Ints
    """[K] number of the row, ascending; a position of several tokens has several vectors per
    row."""
    draws: Ints
    """[K] noise draw; 0 if the run has no noise."""
    tokens: Ints
    """[K] token position in the unpadded prompt."""
    vectors: Tensor
    """[K, width] on the model's device and in its dtype. All units of a site are concatenated if
    the point names none. Vectors over keys are as wide as the longest prompt of the batch."""
    patches: int = 1
    """Number of vectors of each token, which are adjacent: patches in a vision encoder."""


def read_vectors(
    lanes: BatchReader,
    points: Sequence[SitePoint],
    positions: Sequence[PositionCell],
    batches: Iterable[Ints],
) -> Iterator[SiteVectors]:
    """Read the vectors of each site at each position, batch by batch.

    Rows that lack a position have no vectors there. In a vision encoder, a token of an image has a
    vector for each of its patches.

    Args:
        lanes: Reader of a run, from `build_reader` or `UnpatchedRuns.reader`.
        positions: Positions in that run.
        batches: Batches of prompts.
    """
    hits: dict[tuple[int, int], TokenHits] = {}
    for count, batch in enumerate(batches):
        unpatched = lanes(batch)
        for number, cell in enumerate(positions):
            for place, point in enumerate(points):
                patches = unpatched.patches if SITES[point.site].stack == "vision" else 1
                if (number, patches) not in hits:
                    hits[number, patches] = TokenHits.of([cell], patches)
                row, draw, token = list_tokens(hits[number, patches], batch, unpatched.draws)
                lane = torch.from_numpy(unpatched.lane(row, draw))
                vectors = _select_vectors(unpatched, point, lane, token)
                own = patches // cell.vectors  # positions of patches have one vector each
                yield SiteVectors(count, place, number, row, draw, token // own, vectors, own)


def list_tokens(hits: TokenHits, batch: Ints, draws: int) -> tuple[Ints, Ints, Ints]:
    """Return [K] each: the prompt, the draw and the token of every vector of a position."""
    index, run = hits.runs.expand(batch)
    which, token = hits.tokens.expand(run)
    prompts = batch[index[which]]
    draw = np.tile(np.arange(draws), len(prompts))
    return np.repeat(prompts, draws), draw, np.repeat(token, draws)


def _select_vectors(
    unpatched: UnpatchedBatch, point: SitePoint, lane: Tensor, token: Ints
) -> Tensor:
    """Return [K, width]: one site in these lanes at these tokens."""
    where = SiteRead(point.site, point.layer)
    read = unpatched.reads[where]
    index = lane, unpatched.batch.of_read(where).columns(lane, torch.from_numpy(token))
    vectors = read[indices_to_device(index, read.device)]
    return vectors.flatten(1) if point.unit is None else vectors[:, point.unit]


def build_reader(
    model: LoadedModel,
    table: PromptTable,
    run: PromptRun,
    points: Iterable[SitePoint],
    *,
    seed: int,
    side: PaddingSide | None = None,
) -> BatchReader:
    """Build a reader of these sites for a run without rules; passes stop after the highest site.

    Args:
        seed: Seed of noise.
        side: As in `ExecutionOptions`.
    """
    request = request_sites(points, model.shape)

    def lanes(prompts: Ints) -> UnpatchedBatch:
        due = [(run, request)]
        return compute_unpatched(model, due, prompts, table.row_keys, seed=seed, side=side)[0]

    return lanes


def request_sites(points: Iterable[SitePoint], shape: ModelShape) -> UnpatchedRequest:
    """Request these sites, in a pass that stops after the highest one."""
    places = frozenset((point.site, point.layer) for point in points)
    stops = [stop_layer(*place, shape.n_layers) for place in places]
    stop = None if None in stops else max((n for n in stops if n is not None), default=0)
    return UnpatchedRequest(reads=places, stop=stop)


def split_prompts(
    model: LoadedModel,
    run: PromptRun,
    points: Iterable[SitePoint],
    prompts: Ints | None = None,
    tokens: int | None = None,
) -> list[Ints]:
    """Split prompts (default: all) into batches, limited by the size of the values read.

    Args:
        tokens: Maximum number of tokens of a batch. By default `PROMPT_TOKENS`; fewer on a CPU if
            the MLPs' activations would take more than `CPU_ACTIVATION_BYTES`.
    """
    size = model.dtype.itemsize
    if tokens is None and model.device.type == "cpu":
        neurons = model.shape.largest(lambda block: block.neurons)
        widest = size * max(neurons, 3 * model.shape.d_model)
        tokens = min(PROMPT_TOKENS, max(MIN_READ_TOKENS, CPU_ACTIVATION_BYTES // widest))
    return read_batches(model.shape, size, run, points, prompts, tokens or PROMPT_TOKENS)


@dataclass(eq=False)
class FittedDirections:
    """Directions and bases of one experiment, by name."""

    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[width] float64 each, on the CPU; of an edit the matrix [2 rank + 1, width]."""
    systems: dict[str, CoordinateSystem] = field(default_factory=dict[str, CoordinateSystem])
    _modes: dict[tuple[str, str, tuple[int, int], bool, bool, str], CoordinateWrite] = field(
        default_factory=dict[tuple[str, str, tuple[int, int], bool, bool, str], CoordinateWrite]
    )
    _later: dict[CoordinateWrite, Mapping[int, CoordinateWrite]] = field(
        default_factory=dict[CoordinateWrite, Mapping[int, CoordinateWrite]]
    )
    _edits: dict[str, EditWrite] = field(default_factory=dict[str, EditWrite])

    def mode(
        self,
        member: BasisMember,
        operation: CoordinateOperation,
        counts: tuple[int, int],
        *,
        joins_units: bool,
        drops_error: bool,
        inserted: BasisMember | None = None,
    ) -> CoordinateWrite:
        """Return the mode of writes that change named coordinates of a basis.

        Equal arguments return the same object, so that writes of several rows can be merged.

        Args:
            counts: Number of coordinates (0: all), and of those of `inserted`.
            joins_units: As in `CoordinateWrite`.
            drops_error: As in `CoordinateWrite`.
            inserted: As in `CoordinateWrite`.
        """
        other = "" if inserted is None else inserted.name
        key = member.name, operation, counts, joins_units, drops_error, other
        if key not in self._modes:
            self._modes[key] = CoordinateWrite(
                self.systems[member.name],
                operation,
                joins_units,
                drops_error,
                member.reads,
                inserted=None if inserted is None else self.systems[inserted.name],
                count_inserted=counts[1],
            )
        return self._modes[key]

    def later_modes(self, mode: CoordinateWrite, layer: int) -> Mapping[int, CoordinateWrite]:
        """Return the writes of the same change of features to later layers, by layer, for features
        of a cross-layer transcoder; always the same objects.

        Args:
            mode: The write to the layer of the features.
            layer: That layer.
        """
        if mode not in self._later:
            systems = list_later_decoders(mode.system, layer)
            self._later[mode] = {
                later: replace(mode, system=system, reads_layer=layer)
                for later, system in systems.items()
            }
        return self._later[mode]

    def edit(self, member: DirectionMember) -> EditWrite:
        """Return the mode of writes that add an edit, always the same object."""
        if member.name not in self._edits:
            self._edits[member.name] = EditWrite(self.vectors[member.name])
        return self._edits[member.name]

    def of(self, plan: RulePlan, cells: Ints) -> Tensor:
        """Return [K, width]: the rule's direction in each of these cells."""
        assert plan.direction_of_cell is not None
        every = torch.stack([self.vectors[member.name] for member in plan.directions])
        return every[torch.from_numpy(plan.direction_of_cell[cells])]

    @property
    def lengths(self) -> Mapping[str, float]:
        """Norms by name, except those of edits."""
        vectors = self.vectors.items()
        return {name: float(vector.norm()) for name, vector in vectors if vector.ndim == 1}


def list_later_decoders(system: CoordinateSystem, layer: int) -> dict[int, CoordinateSystem]:
    """Return the bases that decode features at the layers after theirs, by layer; none but for
    features of a cross-layer transcoder.

    Args:
        system: Their basis.
        layer: Their layer.
    """
    if not isinstance(system, Dictionary) or system.file.decoders is None:
        return {}
    count = system.file.written_layers
    return {layer + n: LaterDecoder(system, n) for n in range(1, count)}


def _has_decoders(member: BasisMember) -> bool:
    """Return whether rules change features of a cross-layer transcoder."""
    return isinstance(member.operand, DictionaryFile) and member.operand.decoders is not None


def _lacks_decoders(system: CoordinateSystem, member: BasisMember) -> bool:
    """Return whether a basis was computed to be read only, and is also written."""
    is_read = isinstance(system, Dictionary) and system.file.decoders is None
    return is_read and _has_decoders(member)


class DirectionFits:
    """Fits of a panel's directions and bases, each computed once."""

    def __init__(
        self,
        model: LoadedModel,
        others: Mapping[str, LoadedModel],
        seed: int,
        side: PaddingSide | None,
    ) -> None:
        self.model = model
        self.others = others
        self.seed = seed
        self.side: PaddingSide | None = side
        self.passes = 0
        """Number of forward passes so far."""
        self._made: dict[str, Tensor] = {}
        self._systems: dict[str, CoordinateSystem] = {}
        self._read: dict[int, list[list[_RowVectors]]] = {}
        """By the identity of a fit: per sample and point."""

    def of(self, plan: ExperimentPlan) -> tuple[FittedDirections, list[Diagnostic]]:
        """Compute the directions and bases of an experiment's rules; reports E0641 for empty
        ones."""
        members = {m.name: m for rule in plan.rules for m in rule.directions}
        every = [
            member for rule in plan.rules for basis in rule.rule.bases for member in basis.members
        ]
        # One that is written replaces one of the same name that is only read.
        bases = {member.name: member for member in sorted(every, key=_has_decoders)}
        used = [basis for rule in plan.rules for basis in rule.rule.bases]
        fits = {id(fit): fit for basis in used for fit in basis.fits}
        span = plan.experiment.spec.span
        self._gather_for(members.values(), fits)
        problems = self._compute_bases(bases, span)
        problems += self._compute(members.values(), span)
        made = {name: self._made[name] for name in members if name in self._made}
        for rule in plan.rules if not problems else ():
            # One of several may be 0, for example if all rows have the same token.
            if rule.directions and not any(made[m.name].any() for m in rule.directions):
                problems.append(_empty_direction(span, rule.directions[0], "is 0 everywhere"))
        systems = {name: self._systems[name] for name in bases if name in self._systems}
        return FittedDirections(made, systems), problems

    def of_members(
        self, members: Collection[DirectionMember], span: Span
    ) -> tuple[dict[str, Tensor], list[Diagnostic]]:
        """Compute directions outside of rules.

        Returns:
            Name of a member → [width] float64; E0641, located at `span`, for those that can't be
            computed, and if all are 0.
        """
        self._gather_for(members, {})
        problems = self._compute(members, span)
        made = {m.name: self._made[m.name] for m in members if m.name in self._made}
        if not problems and not any(vector.any() for vector in made.values()):
            problems.append(_empty_direction(span, next(iter(members)), "is 0 everywhere"))
        return made, problems

    def of_basis(
        self, basis: BasisTargets, span: Span
    ) -> tuple[CoordinateSystem | None, list[Diagnostic]]:
        """Compute a basis outside of rules that has one member; None with E0641, located at
        `span`, if it can't be computed."""
        (member,) = basis.members
        self._gather_for([], {id(fit): fit for fit in basis.fits})
        problems = self._compute_bases({member.name: member}, span)
        return self._systems.get(member.name), problems

    def _gather_for(
        self, members: Collection[DirectionMember], fits: Mapping[int, _Fit | JacobianBasis]
    ) -> None:
        """Read the samples of directions that aren't computed yet, and of other fits."""
        due = [member for member in members if member.name not in self._made]
        fits_by_id: dict[int, _Fit | JacobianBasis] = {
            id(fit): fit for member in due for fit in iter_fitted_vectors(member.vector)
        } | dict(fits)
        rows = [fit for fit in fits_by_id.values() if not isinstance(fit, JacobianBasis)]
        self._gather([fit for fit in rows if id(fit) not in self._read])

    def _compute(self, members: Collection[DirectionMember], span: Span) -> list[Diagnostic]:
        """Compute the directions that aren't computed yet; returns E0641 for those that can't
        be."""
        problems: list[Diagnostic] = []
        for member in members:
            if member.name in self._made:
                continue
            try:
                with torch.no_grad():
                    vector = self._vector(member.vector)
            except MethodError as mistake:
                reason = f"can't be computed: {mistake}"
                problems.append(_empty_direction(span, member, reason, mistake.hint))
                continue
            except (ValueError, ConvergenceError) as error:
                problems.append(_empty_direction(span, member, f"can't be computed: {error}"))
                continue
            if vector.isfinite().all():
                self._made[member.name] = vector
            else:
                problems.append(_empty_direction(span, member, "has NaN or infinity"))
        return problems

    def _compute_bases(self, bases: Mapping[str, BasisMember], span: Span) -> list[Diagnostic]:
        """Compute the bases; returns E0641 for those that can't be computed."""
        problems: list[Diagnostic] = []
        for name, member in bases.items():
            if name in self._systems and not _lacks_decoders(self._systems[name], member):
                continue
            try:
                self._systems[name] = self._system(member)
            except PythonFailure as failed:
                problems.append(failed.diagnostic)
            except (ValueError, MethodError, AutogradFailed, np.linalg.LinAlgError) as error:
                problems.append(
                    EmptyDirection(
                        span=span,
                        name=name,
                        reason=f"can't be computed: {error}",
                        made=member.made,
                        hint="compute it from other rows, or with fewer dimensions",
                        kind="basis",
                    )
                )
        return problems

    def _system(self, member: BasisMember) -> CoordinateSystem:
        if isinstance(member.operand, OutputWeights):
            vector = member.operand.vector
            system = None if vector is None else self._vector(vector)
            return read_output_map(self.model, member.operand, system)
        return compute_system(member, self._operand(member), self._next_weights(member))

    def _next_weights(self, member: BasisMember) -> Callable[[], Tensor]:
        """Return a function that reads the weights after a basis's site: [output, width]."""

        def read() -> Tensor:
            operand = member.operand
            assert isinstance(operand, SpannedBasis)
            assert operand.next_map is not None
            return read_next_weights(self.model, operand.next_map)

        return read

    def _operand(self, member: BasisMember) -> Callable[[], Tensor]:
        """Return a function that reads what a basis is computed from: [row, width] float64."""

        def read() -> Tensor:
            match member.operand:
                case FittedBasis() as own:
                    ((read_rows,),) = self._read[id(own)]
                    return torch.from_numpy(read_rows.basis_operand())
                case JacobianBasis() as own:
                    return self._jacobians(own)
                case SpannedBasis(vectors=vectors):
                    return torch.stack([self._vector(vector) for vector in vectors])
                case TokenBasis(tokens=tokens):
                    return torch.stack([self._unembedding(token) for token in tokens])
                case SavedVector() as saved:
                    return _load_vector(saved)
                case WeightBasis(site=site, layer=layer):
                    return read_written_weights(self.model, site, layer)
                case DrawnBasis() | DictionaryFile() | PythonBasis() | OutputWeights():
                    return torch.zeros(0, member.width, dtype=torch.float64)

        return read

    def _jacobians(self, basis: JacobianBasis) -> Tensor:
        """Return [width, width]: the mean product of a basis's Jacobians."""
        model = (
            self.model if basis.sample.run.model is None else self.others[basis.sample.run.model]
        )
        product = mean_jacobian_product(model, basis, seed=self.seed, side=self.side)
        self.passes += product.passes
        return product.product

    # --- reading ----------------------------------------------------------------------------------

    def _gather(self, fits: Sequence[_Fit]) -> None:
        """Read the samples of fits, each run of rows once."""
        runs: dict[tuple[int, int, str | None], list[tuple[_Fit, int, FitSample]]] = {}
        for fit in fits:
            self._read[id(fit)] = [[] for _ in fit.samples]
            for number, sample in enumerate(fit.samples):
                key = id(sample.table), id(sample.run.rows), sample.run.model
                runs.setdefault(key, []).append((fit, number, sample))
        for wanted in runs.values():
            self._read_run(wanted)

    def _read_run(self, wanted: Sequence[tuple[_Fit, int, FitSample]]) -> None:
        table, run = wanted[0][2].table, wanted[0][2].run
        model = self.model if run.model is None else self.others[run.model]
        points = list(dict.fromkeys(point for fit, _, _ in wanted for point in fit.points))
        cells: list[PositionCell] = []
        for _, _, sample in wanted:
            if sample.cell not in cells:
                cells.append(sample.cell)
        takers: dict[tuple[int, int], list[_RowVectors]] = {}
        for fit, number, sample in wanted:
            for point in fit.points:
                rows = _RowVectors(sample, self.model.dtype, needs_rows=_needs_rows(fit))
                self._read[id(fit)][number].append(rows)
                place = points.index(point), cells.index(sample.cell)
                takers.setdefault(place, []).append(rows)
        lanes = build_reader(model, table, run, points, seed=self.seed, side=self.side)
        batches = split_prompts(model, run, points)
        self.passes += len(batches)
        for vector in read_vectors(lanes, points, cells, batches):
            for rows in takers.get((vector.point, vector.position), ()):
                rows.take(vector)

    # --- computation ------------------------------------------------------------------------------

    def _vector(self, vector: DirectionVector) -> Tensor:
        """Compute [width] float64; of an edit [2 rank + 1, width]."""
        match vector:
            case FittedVector():
                return self._fitted(vector)
            case UnembeddingVector(token=token, less=less):
                found = self._unembedding(token)
                return found if less is None else found - self._unembedding(less)
            case SavedVector():
                return _load_vector(vector)
            case WeightedSum(parts=parts):
                return torch.stack([weight * self._vector(part) for weight, part in parts]).sum(0)
            case UnitVector(of=of):
                found = self._vector(of)
                return found / found.norm() if found.any() else found
            case RandomVector(of=of, draw=draw, seed=seed, shuffles=shuffles):
                return _draw_like(self._vector(of), draw, seed, shuffles=shuffles)
            case DrawnVector(width=width, draw=draw, seed=seed):
                like = torch.full((width,), width**-0.5, dtype=torch.float64)
                return _draw_like(like, draw, seed, shuffles=False)

    def _fitted(self, fit: FittedVector) -> Tensor:
        """[width] float64. Raises MethodError, and what the method raises."""
        method = fitted_method(fit.method)
        samples = self._read[id(fit)]
        vectors = [
            torch.from_numpy(fitted_vector(method, rows, fit.options, rows[0].width))
            for rows in zip(*samples, strict=True)
        ]
        if not method.sums_heads:
            return vectors[0]
        parts = zip(fit.points, vectors, strict=True)
        return torch.stack([self._through(fit, *part) for part in parts]).sum(0)

    def _through(self, fit: FittedVector, point: SitePoint, mean: Tensor) -> Tensor:
        """Return [d_model] of a head's mean, or the mean itself if it isn't added to others."""
        if point.site != "z" or len(fit.points) == 1:
            return mean
        layout = self.model.tap("z", point.layer).layout
        projection = self.model.module.get_submodule(self.model.tap("head_out", point.layer).path)
        weight = get_head_weights(projection, layout).double().cpu()
        assert point.unit is not None
        return project_heads(mean[None], torch.tensor([point.unit]), weight)[0]

    def _unembedding(self, token: int) -> Tensor:
        path = self.model.anatomy.unembedding
        assert path is not None
        module = self.model.module.get_submodule(path)
        with load_weights(module):
            return module.get_parameter("weight")[token].detach().double().cpu()


_Fit = FittedVector | FittedBasis


def _needs_rows(fit: _Fit) -> bool:
    """Whether a fit needs each vector, not only the mean."""
    return isinstance(fit, FittedBasis) or fitted_method(fit.method).needs_rows


class _RowVectors:
    """The vectors of one site at one position, as `RowVectors` of a method describes them."""

    def __init__(self, sample: FitSample, dtype: torch.dtype, *, needs_rows: bool) -> None:
        self.sample = sample
        self.needs_rows = needs_rows
        self.rounding = torch.finfo(dtype).eps
        self.count = 0
        self._rows: list[Ints] = []
        self._parts: list[Floats] = []
        self._total: Tensor | None = None

    def take(self, found: SiteVectors) -> None:
        """Add one vector per row, or per token: the mean over its tokens, runs and draws."""
        if not len(found.prompts):
            return
        lines = np.stack([found.prompts, found.tokens * self.sample.each_token])
        (row, _), index, counts = np.unique(lines, axis=1, return_inverse=True, return_counts=True)
        index = index.ravel()  # NumPy 2.0 keeps the first axis
        vectors = found.vectors.double().cpu()
        tensors = torch.zeros(len(row), vectors.shape[1], dtype=torch.float64)
        tensors.index_add_(0, torch.from_numpy(index), vectors)
        tensors /= torch.from_numpy(counts)[:, None]
        self.count += len(row)
        total = tensors.sum(0)
        self._total = total if self._total is None else self._total + total
        self._rows.append(row)
        if self.needs_rows:
            self._parts.append(tensors.numpy())

    @property
    def width(self) -> int:
        assert self._total is not None
        return len(self._total)

    @property
    def targets(self) -> list[float | str]:
        every = self.sample.targets
        return [every[row] for rows in self._rows for row in rows.tolist()] if every else []

    @property
    def classes(self) -> list[float | str]:
        return self.sample.classes if self.sample.targets else []

    def mean(self) -> Floats:
        assert self._total is not None
        return (self._total / self.count).numpy()

    def basis_operand(self) -> Floats:
        """Return [class, width] means of the rows with each target; without targets, the rows."""
        if not self.sample.targets:
            return self.matrix()
        rows, targets = self.matrix(), self.targets
        own = [[each == target for each in targets] for target in self.classes]
        return np.stack([rows[np.array(of_class)].mean(axis=0) for of_class in own])

    def matrix(self) -> Floats:
        if not self.needs_rows:
            raise TypeError("`matrix` needs a method with `needs_rows = True`")
        return np.concatenate(self._parts)


def _load_vector(vector: SavedVector) -> Tensor:
    """Load [width], or [2 rank + 1, width] of an edit, from the file, which must be unchanged since
    it was checked."""
    content = vector.path.read_bytes()
    if sha256(content).hexdigest() != vector.digest:
        raise ValueError(f"{vector.path.name} has changed since it was checked")
    tensors = load(content)
    if vector.role == "edit":
        reads, writes, offset = (tensors[name] for name in name_edit_tensors(vector.key))
        return torch.cat([reads, writes, offset[None]]).double()
    loaded = tensors[vector.key].double()
    if not isinstance(vector, ProbeVector):
        return loaded
    others = [number for number in range(len(loaded)) if number != vector.of_class]
    tensor = loaded[vector.of_class]
    return tensor - loaded[others].mean(0) if others else tensor


def _draw_like(like: Tensor, draw: str, seed: int, *, shuffles: bool) -> Tensor:
    """Draw a direction of the same norm, uniformly distributed; or put its numbers in a random
    order. An edit adds vectors of the same lengths in a random subspace."""
    random = np.random.Generator(
        np.random.Philox(np.random.SeedSequence([stable_hash(seed, "direction", draw)]))
    )
    if shuffles:
        return like[torch.from_numpy(random.permutation(len(like)))]
    drawn = torch.from_numpy(random.standard_normal(like.shape))
    if like.ndim > 1:
        return turn_edit(like, drawn)
    return drawn / drawn.norm() * like.norm()


def _empty_direction(
    span: Span,
    member: DirectionMember,
    reason: str,
    hint: str = "fit it on rows that differ, or at a different site",
) -> EmptyDirection:
    return EmptyDirection(
        span=span,
        name=member.name,
        reason=reason,
        made=member.made,
        hint=hint,
    )
