"""Training of sparse dictionaries: the losses of each architecture.

Sources: Gao et al. 2024, arXiv 2406.04093 (top-k, and the auxiliary loss for inactive features);
Bussmann et al. 2024, arXiv 2412.06410 (batch top-k); Bussmann et al. 2025, arXiv 2503.17547
(Matryoshka); Bricken et al. 2023 (ReLU with an L1 penalty); Rajamanoharan et al. 2024, arXiv
2407.14435 (JumpReLU) and arXiv 2404.16014 (gated); Dunefsky et al. 2024, arXiv 2406.11944
(transcoders); Paulo et al. 2025, arXiv 2501.18823 (skip transcoders); Ameisen et al. 2025,
transformer-circuits.pub/2025/attribution-graphs/methods.html (cross-layer transcoders).
Encoders and decoders have the names and shapes of SAELens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

SKIP = "W_skip"
"""[out, in]: the skip connection of a transcoder, as in `mechdsl.dictionaries.folder`."""

IDLE_STEPS = 200
"""Steps without activity after which a feature takes part in the auxiliary loss."""

IDLE_WEIGHT = 1 / 32
"""Weight of the auxiliary loss (Gao et al., appendix A.2)."""

WARM_UP = 0.1
"""Share of the steps during which a penalty grows from 0 to its weight."""

BANDWIDTH = 0.1
"""Width of the kernel that estimates gradients of JumpReLU thresholds, in units of features of
scaled vectors."""

START_THRESHOLD = 0.1
"""First threshold of JumpReLU features."""

PREFIXES = 5
"""Numbers of first features that reconstruct a vector in a Matryoshka dictionary: a sixteenth of
them, an eighth, and so on up to all (Bussmann et al. 2025)."""


def start_weights(
    widths: tuple[int, int], features: int, random: Generator, *, tied: bool, skips: bool = False
) -> dict[str, Tensor]:
    """Return random directions, and biases and a skip connection of 0.

    Args:
        widths: Numbers of encoded and of reconstructed vectors.
        tied: Whether the encoder begins as the transposed decoder.
        skips: Whether there is a skip connection.
    """
    encoded, made = widths
    decoder = unit_rows(torch.randn(features, made, generator=random))
    encoder = decoder if tied else unit_rows(torch.randn(features, encoded, generator=random))
    return {
        "W_enc": encoder.T.clone(),
        "b_enc": torch.zeros(features),
        "W_dec": decoder.clone(),
        "b_dec": torch.zeros(made),
        **({SKIP: torch.zeros(made, encoded)} if skips else {}),
    }


def unit_rows(rows: Tensor) -> Tensor:
    """Return [row, width]: rows of length 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


class SparseDictionary:
    """A dictionary while it is trained; implements `mechdsl.fits.training.Trainable`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, subtracts_bias: bool
    ) -> None:
        """tensors: as `start_weights` returns them. options: of the call, by name."""
        self.tensors = dict(tensors)
        self.subtracts_bias = subtracts_bias
        self.k = int(options.get("k", 0))
        self.penalty = float(options.get("penalty", 0.0))
        self.last_active = torch.zeros_like(self.tensors["b_enc"])
        """[feature] the last step in which it was active."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return self.tensors

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """[feature] `last_active`."""
        return {"last_active": self.last_active}

    def after_step(self) -> None:
        """Give decoder rows the length 1."""
        with torch.no_grad():
            self.tensors["W_dec"].copy_(unit_rows(self.tensors["W_dec"]))

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the file, for centred and scaled vectors."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the squared error of a vector, the mean over the batch, plus penalties."""
        raise NotImplementedError

    def needs_notes(self, step: int) -> bool:
        """Whether a feature hasn't been active for long; another part may find it active."""
        return bool(self._idle(step).any())

    def join_memory(self, copies: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return [feature] the last step in which it was active in some process."""
        return {"last_active": copies["last_active"].amax(0)}

    # --- parts of losses

    def _projected(self, inputs: Tensor) -> Tensor:
        """Return [vector, feature]: the linear map of the encoder, without its bias."""
        tensors = self.tensors
        centred = inputs - tensors["b_dec"] if self.subtracts_bias else inputs
        return centred @ tensors["W_enc"]

    def _decoded(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Return [vector, width]: the reconstruction from all features, or from the first ones."""
        made = self._summed(features) + self.tensors["b_dec"]
        return made + inputs @ self.tensors[SKIP].T if SKIP in self.tensors else made

    def _summed(self, features: Tensor) -> Tensor:
        """Return [vector, width]: the sum of decoder directions, of all or of the first
        features."""
        return features @ self.tensors["W_dec"][: features.shape[1]]

    def _note_active(self, features: Tensor, step: int) -> None:
        self.last_active[(features.detach() > 0).any(0)] = step

    def _idle(self, step: int) -> Tensor:
        """Return [feature] whether a feature hasn't been active for long."""
        return self.last_active < step - IDLE_STEPS

    def _idle_loss(self, before: Tensor, rest: Tensor, step: int) -> Tensor | float:
        """Let features that haven't been active for long reconstruct what the others leave over.

        Args:
            before: [vector, feature] before sparsity.
            rest: [vector, width] the error of the reconstruction.
        """
        idle = self._idle(step)
        if not bool(idle.any()):
            return 0.0
        loss = self._summed((before * idle).relu())
        return IDLE_WEIGHT * _squared_error(rest.detach(), loss)

    def _grown(self, progress: float) -> float:
        """Return the penalty's weight at a point of the training."""
        return self.penalty * min(1.0, progress / WARM_UP)


DictionaryT = TypeVar("DictionaryT", bound=SparseDictionary)

SPARSE_KINDS: dict[str, Callable[..., SparseDictionary]] = {}
"""Architectures by the value of `kind` in a file."""


def _kind(name: str) -> Callable[[type[DictionaryT]], type[DictionaryT]]:
    def register(entry: type[DictionaryT]) -> type[DictionaryT]:
        SPARSE_KINDS[name] = entry
        return entry

    return register


def _squared_error(targets: Tensor, made: Tensor) -> Tensor:
    return (targets - made).square().sum(1).mean()


@_kind("topk")
class TopKDictionary(SparseDictionary):
    """The k largest features of a vector are active."""

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        before = self._projected(inputs) + self.tensors["b_enc"]
        kept = self._kept(before)
        self._note_active(kept, step)
        made = self._decoded(kept, inputs)
        return _squared_error(targets, made) + self._idle_loss(before, targets - made, step)

    def _kept(self, before: Tensor) -> Tensor:
        """Return [vector, feature]: features with all but the active ones set to 0."""
        top = before.topk(min(self.k, before.shape[1]), dim=1)
        return torch.zeros_like(before).scatter(1, top.indices, top.values.relu())


@_kind("batch_topk")
class BatchTopKDictionary(TopKDictionary):
    """The k features per vector that are largest in a batch are active; saved with the mean of the
    smallest active feature as a threshold."""

    MEMORY: ClassVar[float] = 0.99
    """Share of the previous threshold in a new one."""

    def __init__(
        self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, subtracts_bias: bool
    ) -> None:
        super().__init__(tensors, options, subtracts_bias=subtracts_bias)
        self.threshold = torch.full_like(self.tensors["b_dec"][:1], -1.0)
        """[1] running mean of the smallest active feature; negative before the first step."""

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """`last_active` and the running threshold."""
        return {"last_active": self.last_active, "threshold": self.threshold}

    def _kept(self, before: Tensor) -> Tensor:
        positive = before.relu()
        count = min(self.k * len(before), positive.numel())
        least = positive.flatten().topk(count, sorted=False).values.min().detach()
        kept = positive * (positive >= least)
        active = kept.detach()[kept.detach() > 0]
        if active.numel():
            tensor = active.min()
            share = self.MEMORY if float(self.threshold) >= 0 else 0.0
            self.threshold.copy_(share * self.threshold + (1 - share) * tensor)
        return kept

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of a JumpReLU dictionary."""
        weights = super().weights()
        return {
            **weights,
            "threshold": self.threshold.clamp_min(0).expand(len(weights["b_enc"])).clone(),
        }


@_kind("matryoshka")
class MatryoshkaDictionary(BatchTopKDictionary):
    """As batch top-k, but the first features reconstruct vectors without the others, too."""

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        before = self._projected(inputs) + self.tensors["b_enc"]
        kept = self._kept(before)
        self._note_active(kept, step)
        made = [self._decoded(kept[:, :size], inputs) for size in prefix_sizes(kept.shape[1])]
        errors = torch.stack([_squared_error(targets, each) for each in made])
        return errors.mean() + self._idle_loss(before, targets - made[-1], step)


def prefix_sizes(features: int) -> list[int]:
    """Return the numbers of first features that reconstruct vectors, from the smallest to all."""
    return sorted({-(-features // 2**halvings) for halvings in range(PREFIXES)})


@_kind("relu")
class ReluDictionary(SparseDictionary):
    """Features are a ReLU, with a penalty on their sum."""

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        before = self._projected(inputs) + self.tensors["b_enc"]
        features = before.relu()
        self._note_active(features, step)
        made = self._decoded(features, inputs)
        sparse = self._grown(progress) * features.sum(1).mean()
        idle = self._idle_loss(before, targets - made, step)
        return _squared_error(targets, made) + sparse + idle


class _JumpRelu(torch.autograd.Function):
    """z where it exceeds the threshold; the threshold's gradient is estimated with a kernel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        (grad,) = grads
        near = ((z - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return grad * (z > threshold), -(grad * threshold * near).sum(0)


class _Active(torch.autograd.Function):
    """Whether z exceeds the threshold; the threshold's gradient is estimated with a kernel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).to(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        (grad,) = grads
        near = ((z - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return None, -(grad * near).sum(0)


@_kind("jump_relu")
class JumpReluDictionary(SparseDictionary):
    """Features are 0 up to a learned threshold, with a penalty on the number of active ones."""

    def __init__(
        self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, subtracts_bias: bool
    ) -> None:
        super().__init__(tensors, options, subtracts_bias=subtracts_bias)
        start = torch.full_like(self.tensors["b_enc"], START_THRESHOLD)
        self.tensors["log_threshold"] = start.log()

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        before = self._projected(inputs) + self.tensors["b_enc"]
        threshold = self.tensors["log_threshold"].exp()
        positive = before.relu()
        features: Tensor = _JumpRelu.apply(positive, threshold)  # pyright: ignore[reportAssignmentType]
        active: Tensor = _Active.apply(positive, threshold)  # pyright: ignore[reportAssignmentType]
        self._note_active(features, step)
        made = self._decoded(features, inputs)
        sparse = self._grown(progress) * active.sum(1).mean()
        idle = self._idle_loss(before, targets - made, step)
        return _squared_error(targets, made) + sparse + idle

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the file, with thresholds instead of their logarithms."""
        weights = super().weights()
        return {**weights, "threshold": weights.pop("log_threshold").exp()}


@_kind("gated")
class GatedDictionary(SparseDictionary):
    """A gate selects the active features, and a second bias and scale determine their values."""

    def __init__(
        self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, subtracts_bias: bool
    ) -> None:
        super().__init__(tensors, options, subtracts_bias=subtracts_bias)
        bias = self.tensors.pop("b_enc")
        self.tensors |= {"b_gate": bias, "r_mag": bias.clone(), "b_mag": bias.clone()}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        tensors = self.tensors
        shared = self._projected(inputs)
        gate = shared + tensors["b_gate"]
        sizes = (shared * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
        features = sizes * (gate > 0)
        self._note_active(features, step)
        made = self._decoded(features, inputs)
        gates = gate.relu()
        # The gate learns from what it would reconstruct alone, with a decoder that stays.
        alone = gates @ tensors["W_dec"].detach() + tensors["b_dec"].detach()
        sparse = self._grown(progress) * gates.sum(1).mean()
        idle = self._idle_loss(gate, targets - made, step)
        error = _squared_error(targets, made) + _squared_error(targets, alone)
        return error + sparse + idle


# --- cross-layer transcoders ----------------------------------------------------------------------


def start_layers(
    widths: tuple[int, int], layers: int, features: int, random: Generator
) -> dict[str, Tensor]:
    """Return random directions and biases of 0 of a cross-layer transcoder.

    Args:
        widths: Numbers of encoded and of reconstructed vectors of a layer.
        features: Number of features of a layer.

    Returns:
        `W_enc` [layer, width, feature]; `b_enc` [layers * features]; `b_dec` [layers * width]; and
        for the features of each layer a decoder [feature, (this and later layers) * width], called
        `W_dec_0` for the first one, with rows of length 1.
    """
    encoded, made = widths
    encoders: list[Tensor] = []
    decoders: dict[str, Tensor] = {}
    for layer in range(layers):
        rows = torch.randn(features, (layers - layer) * made, generator=random)
        decoders[name_decoder(layer)] = unit_rows(rows)
        encoders.append(unit_rows(torch.randn(features, encoded, generator=random)).T)
    return {
        "W_enc": torch.stack(encoders),
        "b_enc": torch.zeros(layers * features),
        **decoders,
        "b_dec": torch.zeros(layers * made),
    }


def name_decoder(layer: int) -> str:
    """Return the name of the decoder of a layer's features in a cross-layer transcoder."""
    return f"W_dec_{layer}"


class _CrossLayerDictionary(SparseDictionary):
    """Features of several layers, each of which reads the vector of its layer and writes to that of
    this layer and of all later ones. Vectors and features of the layers are one after another.

    `k` is the number of active features per layer; features of all layers compete.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, subtracts_bias: bool
    ) -> None:
        super().__init__(tensors, options, subtracts_bias=subtracts_bias)
        self.k *= self.layers

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.tensors["W_enc"])

    def after_step(self) -> None:
        """Give decoder rows the length 1, over all layers that a feature writes to."""
        with torch.no_grad():
            for layer in range(self.layers):
                tensor = self.tensors[name_decoder(layer)]
                tensor.copy_(unit_rows(tensor))

    def _projected(self, inputs: Tensor) -> Tensor:
        parts = inputs.unflatten(1, (self.layers, -1))
        return torch.einsum("vlw,lwf->vlf", parts, self.tensors["W_enc"]).flatten(1)

    def _summed(self, features: Tensor) -> Tensor:
        width = len(self.tensors["b_dec"]) // self.layers
        made = torch.zeros_like(self.tensors["b_dec"]).expand(len(features), -1)
        for layer, tensor in enumerate(features.unflatten(1, (self.layers, -1)).unbind(1)):
            later = tensor @ self.tensors[name_decoder(layer)]
            made = made + torch.nn.functional.pad(later, (layer * width, 0))
        return made


class CrossLayerBatchTopK(_CrossLayerDictionary, BatchTopKDictionary):
    """The features of all layers that are largest in a batch are active."""


class CrossLayerRelu(_CrossLayerDictionary, ReluDictionary):
    """Features are a ReLU."""


class CrossLayerJumpRelu(_CrossLayerDictionary, JumpReluDictionary):
    """Features are 0 up to a learned threshold."""


CROSS_LAYER_KINDS: dict[str, type[_CrossLayerDictionary]] = {
    "batch_topk": CrossLayerBatchTopK,
    "relu": CrossLayerRelu,
    "jump_relu": CrossLayerJumpRelu,
}
"""Architectures of cross-layer transcoders by the value of `kind` in a file."""


@torch.no_grad()
def unscale_weights(
    weights: Mapping[str, Tensor],
    centers: tuple[Tensor, Tensor],
    scales: tuple[float, float],
    *,
    subtracts_bias: bool,
) -> dict[str, Tensor]:
    """Return the tensors of a dictionary of vectors, from those of centred and scaled vectors.

    Args:
        weights: Tensors of a dictionary of (x − center) · scale.
        centers: [width] subtracted from encoded and from reconstructed vectors.
        scales: The factors of both.
        subtracts_bias: Whether the decoder's bias is subtracted from the input; then both vectors
            are the same.
    """
    (center, made), (scale, made_scale) = centers, scales
    unscaled = dict(weights)
    unscaled["b_dec"] = weights["b_dec"] / made_scale + made
    if SKIP in weights:
        unscaled[SKIP] = weights[SKIP] * (scale / made_scale)
        unscaled["b_dec"] = unscaled["b_dec"] - center @ unscaled[SKIP].T
    if not subtracts_bias:
        unscaled["W_enc"] = weights["W_enc"] * (scale / made_scale)
        unscaled["b_enc"] = weights["b_enc"] - scale * (center @ weights["W_enc"])
    for name in ("b_enc", "b_gate", "b_mag", "threshold"):
        if name in unscaled:
            unscaled[name] = unscaled[name] / made_scale
    return {name: tensor.contiguous() for name, tensor in unscaled.items()}
