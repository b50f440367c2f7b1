"""Features of vectors in a dictionary, and vectors with changed features.

Features and reconstructions are those of the SAELens package. Architectures: Bricken et al. 2023
and Cunningham et al. 2023, arXiv 2309.08600 (standard); Gao et al. 2024, arXiv 2406.04093 (top-k);
Bussmann et al. 2024, arXiv 2412.06410 (batch top-k, saved as JumpReLU); Rajamanoharan et al. 2024,
arXiv 2407.14435 (JumpReLU) and arXiv 2404.16014 (gated); Costa et al. 2025, arXiv 2506.03093
(matching pursuit); arXiv 2510.00404 (top-k by size); arXiv 2511.01836 (temporal); Dunefsky et al.
2024, arXiv 2406.11944 (transcoders).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from mechdsl.base.files import SafetensorsFile
from mechdsl.base.records import Registry
from mechdsl.dictionaries.folder import MAX_GATHERED, SKIP, DictionaryFile

DECODERS = "decoders"
"""Tensor of a cross-layer transcoder whose features rules change: [feature, layer, width], of its
layer and all later ones."""

NORM_EPSILON = 1e-5
"""Added to the standard deviation of a vector by `layer_norm`."""


@dataclass(frozen=True, eq=False)
class DictionaryWeights:
    """Tensors of a dictionary on one device, in one precision."""

    file: DictionaryFile
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class Encoder:
    """The encoder of one architecture."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, feature], or [K, m] of the features `which` if they are separate.

        Args:
            vectors: [K, width] normalised, without the decoder's bias if it is subtracted.
            which: [K, m] long.
        """
        raise NotImplementedError


ENCODERS: Registry[Encoder] = Registry("architecture of a dictionary")


def encoder(name: str) -> Callable[[type[Encoder]], type[Encoder]]:
    """Register a subclass of `Encoder` under the name of an architecture."""

    def register(entry: type[Encoder]) -> type[Encoder]:
        ENCODERS.add(name, entry())
        return entry

    return register


def _project(
    weights: DictionaryWeights, vectors: Tensor, which: Tensor | None, bias: str
) -> Tensor:
    """Return x W_enc + b, of all features or of some."""
    activations = project_some(vectors, weights["W_enc"], which)
    return activations + (weights[bias] if which is None else weights[bias][which])


@encoder("standard")
class ReluEncoder(Encoder):
    """ReLU of a linear map."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        return _project(weights, vectors, which, "b_enc").relu()


@encoder("jumprelu")
class JumpReluEncoder(Encoder):
    """ReLU of a linear map, where it exceeds a threshold."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        activations = _project(weights, vectors, which, "b_enc")
        threshold = weights["threshold"] if which is None else weights["threshold"][which]
        return activations.relu() * (activations > threshold)


@encoder("gated")
class GatedEncoder(Encoder):
    """A gate and a magnitude that share a linear map."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        zero = torch.zeros_like(weights["b_gate"])
        shared = DictionaryWeights(weights.file, {**weights.tensors, "zero": zero})
        activations = _project(shared, vectors, which, "zero")
        parts = (weights["b_gate"], weights["r_mag"].exp(), weights["b_mag"])
        gate, scale, bias = (part if which is None else part[which] for part in parts)
        return (activations * scale + bias).relu() * (activations + gate > 0)


@encoder("topk")
class TopKEncoder(Encoder):
    """The k largest features of a linear map, where they are positive."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        file = weights.file
        assert file.k is not None
        activations = _project(weights, vectors, None, "b_enc")
        if file.scales_by_decoder:
            activations = activations * weights["W_dec"].norm(dim=-1)
        return self._largest(activations, min(file.k, file.features))

    def _largest(self, found: Tensor, count: int) -> Tensor:
        values, index = found.topk(count, dim=-1, sorted=False)
        return torch.zeros_like(found).scatter(-1, index, values.relu())


@encoder("abstopk")
class AbsTopKEncoder(TopKEncoder):
    """The k features of a linear map that are largest in size, with their signs."""

    def _largest(self, found: Tensor, count: int) -> Tensor:
        index = found.abs().topk(count, dim=-1, sorted=False).indices
        return torch.zeros_like(found).scatter(-1, index, found.gather(-1, index))


@encoder("nonnegative")
class NonnegativeEncoder(Encoder):
    """Nonnegative least squares for all features together, with a cost of each feature."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        return solve_nonnegative(vectors, weights["W_dec"], weights["threshold"])


@encoder("linear")
class LinearEncoder(Encoder):
    """A linear map of the centred vector: coordinates of both signs."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        return project_some(vectors, weights["W_enc"], which)


@encoder("mixture")
class MixtureEncoder(Encoder):
    """Probabilities that a vector belongs to each component of a mixture of Gaussians."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        names = ("W_dec", "precision", "log_weights")
        return assign_components(vectors, *(weights[name] for name in names))


@encoder("matching_pursuit")
class MatchingPursuitEncoder(Encoder):
    """Features that are chosen one after the other, each for the remaining residual."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        file, decoder = weights.file, weights["W_dec"]
        residual = vectors.clone()
        activations = vectors.new_zeros(len(vectors), file.features)
        done = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        before = activations != 0
        for _ in range(file.most_steps or file.width_in):
            index = (residual @ decoder.T).relu().argmax(dim=1)
            rows = decoder[index]
            values = (residual * rows).sum(-1).relu() * ~done
            activations.scatter_add_(1, index[:, None], values[:, None])
            residual = residual - values[:, None] * rows
            support = activations != 0
            if file.stops_on_same_support:
                done = done | (support == before).all(dim=1)
            if file.residual_threshold > 0:
                done = done | (residual.norm(dim=-1) < file.residual_threshold)
            before = support
            if bool(done.all()):
                break
        return activations


@encoder("temporal")
class TemporalEncoder(Encoder):
    """The k largest ReLU features of the part of a vector that preceding vectors don't predict."""

    def encode(self, weights: DictionaryWeights, vectors: Tensor, which: Tensor | None) -> Tensor:
        temporal_codes = _temporal_codes(weights, vectors)
        if weights.file.k is None:
            return temporal_codes
        values, index = temporal_codes.topk(
            min(weights.file.k, weights.file.features), dim=-1, sorted=False
        )
        return torch.zeros_like(temporal_codes).scatter(-1, index, values)


def _temporal_codes(weights: DictionaryWeights, vectors: Tensor) -> Tensor:
    encoder = weights["W_enc"] if "W_enc" in weights.tensors else weights["W_dec"].T
    return (vectors / (4 * weights.file.width_in) @ encoder).relu()


PREDICTION_EPSILON = 1e-6
"""Added to the norm of a prediction by a temporal SAE."""


def _remove_predicted(weights: DictionaryWeights, vectors: Tensor) -> Tensor:
    """Remove from each vector [T, width] the direction that the preceding ones predict.

    Each attention layer attends from the codes of a vector to those of the preceding ones. The
    component of the vector along the decoded prediction is removed.
    """
    file = weights.file
    for layer in range(file.context_layers):
        codes = _temporal_codes(weights, vectors)
        context = torch.cat([torch.zeros_like(codes[:1]), codes[:-1]])

        def split(given: Tensor, name: str, layer: int = layer) -> Tensor:
            """Return [head, T, width of a head]."""
            weight, bias = (weights[f"attn_layers.{layer}.{name}.{p}"] for p in ("weight", "bias"))
            mapped = (given @ weight.T + bias).unflatten(-1, (file.context_heads, -1))
            return mapped.transpose(0, 1)

        query, key, value = (
            split(codes, "q_target"),
            split(context, "k_ctx"),
            split(context, "v_ctx"),
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out = f"attn_layers.{layer}.c_proj"
        joined = mixed.transpose(0, 1).flatten(1)
        predicted = (joined @ weights[f"{out}.weight"].T + weights[f"{out}.bias"]).relu()
        along = predicted @ weights["W_dec"]
        size = along.norm(dim=-1, keepdim=True) + PREDICTION_EPSILON
        vectors = vectors - (along * vectors).sum(-1, keepdim=True) / size**2 * along
    return vectors


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A dictionary, as coordinates of vectors."""

    file: DictionaryFile
    _loaded: DictionaryWeights
    _moved: dict[tuple[torch.device, torch.dtype], DictionaryWeights] = field(
        default_factory=dict[tuple[torch.device, torch.dtype], DictionaryWeights]
    )

    @property
    def size(self) -> int:
        """Number of features."""
        return self.file.features

    @property
    def is_affine(self) -> bool:
        """Whether features are an affine map of vectors."""
        return self.file.architecture == "linear" and self.file.normalization == "none"

    def _like(self, vectors: Tensor) -> DictionaryWeights:
        key = vectors.device, vectors.dtype
        if key not in self._moved:
            with torch.inference_mode(False):  # later passes may differentiate by the vectors
                moved = {name: tensor.to(vectors) for name, tensor in self._loaded.tensors.items()}
            self._moved[key] = DictionaryWeights(self.file, moved)
        return self._moved[key]

    @property
    def reads_context(self) -> bool:
        """Whether features are those of `remove_predicted`, and not of the vectors themselves."""
        return self.file.context_layers > 0

    def remove_predicted(self, vectors: Tensor) -> Tensor:
        """Return [T, width]: the unpredicted part of each vector, scaled.

        Args:
            vectors: [T, width] all vectors of a row, from its first token on.
        """
        weights = self._like(vectors)
        given = vectors * self.file.scale
        given = given - weights["b_dec"] if self.file.subtracts_bias else given
        return _remove_predicted(weights, given)

    def _normalised(self, vectors: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return normalised vectors, and the scale and shift that undo it: [K, 1] each."""
        match self.file.normalization:
            case "none":
                return vectors, None, None
            case "layer_norm":
                mean = vectors.mean(dim=-1, keepdim=True)
                centred = vectors - mean
                scale = centred.std(dim=-1, keepdim=True)
                return centred / (scale + NORM_EPSILON), scale, mean
            case "constant_norm_rescale":
                norm = vectors.norm(dim=-1, keepdim=True)
                scale = norm / vectors.shape[-1] ** 0.5
                return vectors / scale, scale, None

    def encode(self, vectors: Tensor, which: Tensor | None = None) -> Tensor:
        """Return features: [K, feature], or [K, m] of those in `which`.

        Args:
            vectors: [K, width].
            which: [K, m] long.
        """
        if which is not None and which.shape[1] <= MAX_GATHERED and self.file.is_separate:
            return self._encode(vectors, which)
        # Each vector has its own gradient, also if it equals another one.
        repeated = None if vectors.requires_grad else distinct_rows(vectors)
        if repeated is None:
            activations = self._encode(vectors, None)
            return activations if which is None else activations.gather(1, which)
        distinct, number = repeated
        activations = self._encode(distinct, None)
        return activations[number] if which is None else activations[number[:, None], which]

    def _encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        weights = self._like(vectors)
        given, _, _ = self._normalised(vectors)
        if self.file.subtracts_bias and not self.reads_context:
            given = given - weights["b_dec"]
        return ENCODERS[self.file.architecture].encode(weights, given, which)

    def _rows(self, weights: DictionaryWeights) -> Tensor:
        """Return [feature, width]: what a feature of 1 adds to the reconstruction."""
        if DECODERS in weights.tensors:
            return weights[DECODERS][:, 0]
        if self.file.scales_by_decoder:
            return weights["W_dec"] / weights["W_dec"].norm(dim=-1, keepdim=True)
        return weights["W_dec"]

    def rows(self) -> Tensor:
        """Return [feature, width]: what a feature of 1 adds to the reconstruction."""
        return self._rows(self._loaded)

    def decoders(self, like: Tensor) -> Tensor:
        """Return [feature, layer, width]: what a feature of a cross-layer transcoder with the
        value 1 adds to its layer and each later one, in the precision and on the device of a
        tensor."""
        return self._like(like)[DECODERS]

    def encoder_weights(self) -> Tensor:
        """Return [width, feature]: the map to features before bias and activation function."""
        weights = self._loaded
        if self.file.architecture == "nonnegative":  # least squares, without a sign constraint
            return torch.linalg.pinv(weights["W_dec"])
        if "W_enc" not in weights.tensors:  # matching pursuit compares with the decoder
            return self._rows(weights).T
        return weights["W_enc"]

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor of its file by its name, such as `W_skip`; None if it has none."""
        return self._loaded.tensors.get(name)

    def contributions(self, features: Tensor, which: Tensor, vectors: Tensor) -> Tensor:
        """Return [K, m, width]: what features add to the reconstruction.

        Args:
            features: [K, m] their values.
            which: [m] long, their numbers.
            vectors: [K, width] the reconstructed vectors, whose norms the reconstruction may use.
        """
        contributions = features[:, :, None] * self._rows(self._like(features))[which]
        scale = None if self.file.transcodes else self._normalised(vectors)[1]
        return contributions if scale is None else contributions * scale[:, None]

    def decode(self, features: Tensor, vectors: Tensor) -> Tensor:
        """Return [K, width] reconstructions.

        Args:
            features: [K, feature].
            vectors: [K, width] the encoded vectors, whose norms the reconstruction may use; a
                transcoder with a skip connection adds a linear function of them.
        """
        weights = self._like(features)
        reconstruction = features @ self._rows(weights)
        reconstruction = (
            reconstruction + weights["b_dec"] if self.file.adds_bias else reconstruction
        )
        if self.file.transcodes:
            return reconstruction + vectors @ weights[SKIP].T if self.file.skips else reconstruction
        _, scale, shift = self._normalised(vectors)
        reconstruction = reconstruction if scale is None else reconstruction * scale
        return reconstruction if shift is None else reconstruction + shift

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return [K, width]: the reconstructions of vectors [K, width]."""
        return self.decode(self.encode(vectors), vectors)

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: vectors whose features have changed; the rest of them stays.

        Args:
            vectors: [K, width]: for a transcoder, those that it reconstructs.
            change: [K, m] or [K, feature]: new features minus current ones.
            which: [K, m] long; None for all.
        """
        rows = self._rows(self._like(vectors))
        shift = combine_some(change, rows, which)
        scale = None if self.file.transcodes else self._normalised(vectors)[1]
        return vectors + (shift if scale is None else shift * scale)


@dataclass(frozen=True, eq=False)
class LaterDecoder:
    """The features of a cross-layer transcoder, as they write to a layer after theirs."""

    dictionary: Dictionary
    """Dictionary of a cross-layer transcoder, with its decoders."""
    distance: int
    """Number of layers from the features' layer to the later one."""

    @property
    def size(self) -> int:
        """Number of features."""
        return self.dictionary.size

    @property
    def is_affine(self) -> bool:
        """Whether features are an affine map of vectors."""
        return self.dictionary.is_affine

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Return features, as `Dictionary.encode` does."""
        return self.dictionary.encode(vectors, which)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return [K, width]: what the features of inputs [K, width] add to the layer."""
        return combine_some(self.encode(vectors, None), self._rows(vectors), None)

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: outputs of the later MLP after features have changed.

        Args:
            vectors: [K, width] outputs.
            change: [K, m] or [K, feature]: new features minus current ones.
            which: [K, m] long; None for all.
        """
        return vectors + combine_some(change, self._rows(vectors), which)

    def _rows(self, like: Tensor) -> Tensor:
        """Return [feature, width]: what a feature with the value 1 adds, on a tensor's device."""
        return self.dictionary.decoders(like)[:, self.distance]


def load_cross_decoder(file: SafetensorsFile) -> Tensor:
    """Load the decoders of the features of one layer of a cross-layer transcoder, [feature, layer,
    width]: of this layer and all later ones, at least in float32.

    Raises:
        ValueError: The file has changed since it was read, or has NaN or infinity.
    """
    (tensors,) = (_load_checked(file.path, file.digest, {"W_dec": name}) for name in file.shapes)
    return tensors["W_dec"]


def _load_checked(path: Path, digest: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Load tensors by their names in the file, at least in float32. Raises ValueError."""
    content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} has changed since it was checked")
    every = load(content)
    for written in names.values():
        if not bool(every[written].isfinite().all()):
            raise ValueError(f"`{written}` has NaN or infinity")
    tensors = {name: every[written] for name, written in names.items()}
    wide = {
        name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in tensors.items()
    }
    return {name: tensor.to(wide[name]) for name, tensor in tensors.items()}


def load_dictionary(file: DictionaryFile) -> Dictionary:
    """Load the weights of a dictionary, in float32 or float64 on the CPU.

    Raises:
        ValueError: The file has changed since it was read, or has NaN or infinity.
    """
    tensors = _load_checked(file.path, file.weights_digest, file.tensors)
    if "W_enc" in tensors and file.transposed:
        tensors["W_enc"] = tensors["W_enc"].T
    if file.decoders is not None:
        tensors[DECODERS] = load_cross_decoder(file.decoders)
    return Dictionary(file, DictionaryWeights(file, tensors))


# --- computations of encoders ---------------------------------------------------------------------


def project_some(vectors: Tensor, columns: Tensor, which: Tensor | None) -> Tensor:
    """Return products with the columns of a matrix: [K, size], or [K, m] with named columns.

    Args:
        vectors: [K, width].
        columns: [width, size].
        which: [K, m] long; None for all.
    """
    if which is None:
        return vectors @ columns
    if which.shape[1] > MAX_GATHERED:
        return (vectors @ columns).gather(1, which)
    return torch.einsum("kw,kmw->km", vectors, columns.T[which])


def combine_some(numbers: Tensor, rows: Tensor, which: Tensor | None) -> Tensor:
    """Return sums of rows times numbers: [K, width].

    Args:
        numbers: [K, size], or [K, m] for named rows.
        rows: [size, width].
        which: [K, m] long; None for all.
    """
    if which is None:
        return numbers @ rows
    if which.shape[1] > MAX_GATHERED:
        every = numbers.new_zeros(len(numbers), len(rows))
        return every.scatter_add(1, which, numbers) @ rows
    return torch.einsum("km,kmw->kw", numbers, rows[which])


def distinct_rows(vectors: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the rows that differ in any bit, and [K] the number of each row among them.

    None if all rows are different.

    Args:
        vectors: [K, width] float32 or float64.
    """
    if len(vectors) < 2:
        return None
    bits = vectors.contiguous().view(torch.int32 if vectors.element_size() == 4 else torch.int64)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=random).to(bits.device)
    _, number = torch.unique((bits * factors).sum(1), return_inverse=True)
    rows = torch.arange(len(bits), device=bits.device)
    count = int(number.max()) + 1
    first = rows.new_full((count,), len(bits)).scatter_reduce(0, number, rows, "amin")
    if count == len(bits) or not torch.equal(bits[first][number], bits):
        return None
    return vectors[first], number


ROUNDING = 1e-12
"""Gradient, relative to the largest product of a vector with a factor, that counts as 0."""

SOLVED_BYTES = 1 << 27
"""Bytes of the systems of equations that are in memory at once."""


def solve_nonnegative(vectors: Tensor, factors: Tensor, penalties: Tensor) -> Tensor:
    """Return the nonnegative coefficients of factors whose sum is nearest to each vector.

    The active set method, for all vectors in parallel; the result for a vector doesn't depend on
    the others. Coefficients carry gradients of the vectors, with the set of positive ones fixed.
    For linearly independent factors, the solution is unique.

    Args:
        vectors: [K, width].
        factors: [factor, width].
        penalties: [factor] costs p of coefficients; 0 for least squares.

    Returns:
        [K, factor] argmin over f ≥ 0 of ‖x − f F‖² / 2 + f · p, computed in float64.

    References:
        Lawson and Hanson 1974, Solving Least Squares Problems, chapter 23.
    """
    wide = vectors.cpu() if vectors.device.type == "mps" else vectors  # which has no float64
    rows = factors.to(wide.device, torch.float64)
    products = wide.double() @ rows.T - penalties.to(rows)
    gram = rows @ rows.T
    size = max(1, SOLVED_BYTES // (8 * gram.numel()))
    parts: list[Tensor] = []
    for product in products.split(size) if len(products) else ():
        with torch.no_grad():
            positive = _find_support(product, gram)
        parts.append(_solve(product, gram, positive))
    nonnegative = torch.cat(parts) if parts else products
    return nonnegative.clamp_min(0).to(vectors)


def _solve(products: Tensor, gram: Tensor, passive: Tensor) -> Tensor:
    """Return [K, factor]: least squares with the passive coefficients only, the others 0."""
    chosen = passive.to(gram)
    system = gram * chosen[:, :, None] * chosen[:, None]
    system = system + torch.diag_embed(1 - chosen)
    return torch.linalg.solve(system, (products * chosen)[..., None])[..., 0] * chosen


def _find_support(products: Tensor, gram: Tensor) -> Tensor:
    """Return [K, factor]: which coefficients are positive in the solution.

    Each row is in one of two states. With a feasible solution, the factor with the largest gradient
    becomes passive. With a solution that has negative coefficients, the row moves towards it until
    the first coefficient is 0, which leaves the passive set.
    """
    count = len(gram)
    support = torch.zeros_like(products)
    passive = torch.zeros_like(products, dtype=torch.bool)
    barred = torch.zeros_like(passive)  # factors that rounding lets in and out again
    limit = ROUNDING * products.abs().amax(1, keepdim=True)
    left = torch.arange(len(products), device=products.device)
    feasible = torch.ones_like(left, dtype=torch.bool)
    for _ in range(6 * count + 6):  # twice the limit of SciPy, whose steps are pairs of these
        gradient = products[left] - support[left] @ gram
        open_ = ~passive[left] & ~barred[left] & (gradient > limit[left])
        going = open_.any(1) | ~feasible[left]
        left, gradient, open_ = left[going], gradient[going], open_[going]
        if not len(left):
            break
        entering = feasible[left]
        best = gradient.where(open_, gradient.new_full((), -torch.inf)).argmax(1)
        passive[left[entering], best[entering]] = True
        solved, now = _solve(products[left], gram, passive[left]), support[left]
        negative = passive[left] & (solved <= 0)
        shares = now / (now - solved).clamp_min(torch.finfo(now.dtype).tiny)
        shares = shares.where(negative, now.new_ones(()))
        share = shares.amin(1, keepdim=True)
        leaves = negative & (shares <= share)
        moved = (now + share * (solved - now)).masked_fill(leaves, 0)
        fine = ~negative.any(1)
        support[left] = torch.where(fine[:, None], solved, moved)
        passive[left] &= ~leaves
        improves = entering & (share[:, 0] > 0)
        barred[left] = (barred[left] | leaves & (now == 0)) & ~improves[:, None]
        feasible[left] = fine
    return passive


SMALLEST = 1e-6
"""Probability below which a vector doesn't belong to a component: its feature is 0."""


def log_densities(
    vectors: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor
) -> Tensor:
    """Return [K, component] log(w N(x; μ, Σ)) in nats, computed in float64.

    Args:
        vectors: [K, width].
        means: [component, width] μ.
        precisions: Factors of Σ⁻¹ = P Pᵀ: [component, width, width] P, [component, width] its
            diagonal, or [component] the number on its diagonal.
        log_weights: [component] log w.
    """
    wide = vectors.cpu() if vectors.device.type == "mps" else vectors  # which has no float64
    wide = wide.double()
    means, precisions, log_weights = (
        each.to(wide.device, torch.float64) for each in (means, precisions, log_weights)
    )
    width = means.shape[1]
    full = precisions.dim() == 3
    diagonal = precisions.diagonal(dim1=1, dim2=2) if full else precisions
    diagonal = diagonal.reshape(len(means), -1).expand(-1, width)
    constants = log_weights + diagonal.log().sum(1) - width / 2 * math.log(2 * math.pi)
    densities: list[Tensor] = []
    for mean, factor, constant in zip(means, precisions, constants, strict=True):
        off = wide - mean
        scaled = off @ factor if full else off * factor
        densities.append(constant - scaled.square().sum(1) / 2)
    return torch.stack(densities, dim=1)


def mean_log_likelihood(vectors: Tensor, tensors: Mapping[str, Tensor]) -> float:
    """Return the mean of log p(x) over vectors [K, width], in nats, under the tensors of a file."""
    weights = tensors["precision"], tensors["log_weights"]
    center = tensors["b_dec"].to(vectors)
    return float(log_densities(vectors - center, tensors["W_dec"], *weights).logsumexp(1).mean())


def assign_components(
    vectors: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor
) -> Tensor:
    """Return [K, component] the probabilities that vectors belong to components.

    Probabilities below `SMALLEST` are 0. Arguments are those of `log_densities`.
    """
    likelihoods = log_densities(vectors, means, precisions, log_weights).softmax(dim=1)
    return (likelihoods * (likelihoods >= SMALLEST)).to(vectors)
