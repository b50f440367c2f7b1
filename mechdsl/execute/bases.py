"""Bases computed from arrays, as coordinate systems of a forward pass, and Jacobians averaged over
rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats
from mechdsl.base.hashing import stable_hash
from mechdsl.dictionaries.features import Dictionary, combine_some, load_dictionary
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute.unpatched_batch import add_images, build_noise_writes
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, indices_to_device
from mechdsl.forward.hooks.coordinates import CoordinateSystem, LinearBasis, StandardBasis
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.gradients import catch_autograd_errors, compute_gradients
from mechdsl.forward.hooks.model import LoadedModel, has_single_output
from mechdsl.forward.hooks.module_exchange import load_weights
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps
from mechdsl.models.shape import PaddingSide, unit_count, vector_width
from mechdsl.planner.plan import PROMPT_TOKENS
from mechdsl.program.basis_methods import BASIS_METHODS, linear_map
from mechdsl.program.python_functions import PythonFunction
from mechdsl.resolve.bases import NEXT_MAPS
from mechdsl.resolve.types import (
    BasisMember,
    DrawnBasis,
    JacobianBasis,
    OutputWeights,
    PythonBasis,
    SitePoint,
    SpannedBasis,
    count_numbers,
)
from mechdsl.vocab.sites import stop_layer


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
        found = self.encoder.encode(vectors).to(vectors)
        return found if which is None else found.gather(1, which)

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
                found = getattr(made.encoder, name)(given)
        except Exception as error:
            reason = f"`{name}` raised {type(error).__name__}: {error}"
            hint = f"`{name}` must accept a tensor of {list(given.shape)}"
            raise function.failure(reason, hint, error=error) from error
        if not isinstance(found, Tensor) or list(found.shape) != shape:
            own = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            reason = f"`{name}` returned {own} for {list(given.shape)}"
            raise function.failure(reason, f"it must return a tensor of {shape}")
    return made


@dataclass(frozen=True, eq=False)
class _BasisArrays:
    """Implementation of `mechdsl.program.basis_methods.BasisInput`."""

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
    found = linear_map(BASIS_METHODS[member.method], arrays, member.options, member.size)
    center = None if found.center is None else torch.from_numpy(found.center)
    return LinearBasis.of(torch.from_numpy(found.directions), center)


def read_written_weights(model: LoadedModel, site: str, layer: int) -> Tensor:
    """Return [width, input]: the map that writes to a site, with the gain of a norm after it.

    Raises ValueError if it isn't a linear map.
    """
    maps = WeightMaps(model)
    try:
        with load_weights(model.module), torch.no_grad():
            found = maps.neurons(layer) if site == "mlp_out" else maps.output(layer).flatten(0, 1)
    except NoLinearMap as error:
        raise ValueError(str(error)) from error
    return found.T.double().cpu()


def read_next_weights(model: LoadedModel, point: SitePoint) -> Tensor:
    """Return [output, width]: the map that reads a point, with the gain of a norm after it.

    For one head of `z`, it is the head's part of the map. Raises ValueError if it isn't linear.
    """
    assert point.layer is not None
    found = read_written_weights(model, NEXT_MAPS[point.site], point.layer)
    if point.unit is None:
        return found
    size = vector_width(model.shape, point.site, point.layer)
    return found[:, point.unit * size : (point.unit + 1) * size]


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
        found = _jacobians(model, basis, [spot[:2] for spot in part], seed, side)
        weights = torch.tensor([1 / (rows * count * draws) for _, _, count in part])
        weights = weights.double().repeat_interleave(draws)
        scaled = found.cpu().double() * weights.sqrt()[:, None, None]
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
    own = [run.rows[prompt] for prompt, _ in spots]
    ids = [row.ids for row in own]
    batch = Batch.of(ids, model.pad_id, side or model.calling.side, model.device)
    batch = add_images(model, batch, own)
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
    found = result.reads[read]
    # A classifier has one output, whatever the token.
    one = read.site == "logits" and has_single_output(model)
    columns = torch.zeros_like(lanes) if one else batch.columns(lanes, tokens)
    vectors = found[indices_to_device((lanes, columns), found.device)]
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
