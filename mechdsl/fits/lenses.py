"""Affine maps of a tuned lens: h + A h + b for each layer, trained to predict what the model does.

References:
    Belrose et al. 2023, arXiv 2303.08112: the loss of a layer is the mean of KL(p ‖ q) over
    vectors, where p is the model's distribution over next tokens, and q that of the lens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Final norm and unembedding: [vector, width] → [vector, vocab]."""

PART = 1024
"""Vectors whose logits are in memory at once, where nothing is trained."""


class LensMaps:
    """A and b of each layer; 0 at the start, which is the logit lens."""

    def __init__(self, width: int, layers: Sequence[int], device: torch.device) -> None:
        self.layers = tuple(layers)
        self.parameters: dict[str, Tensor] = {}
        """`layer.N.weight` [width, width] and `layer.N.bias` [width], as in the file."""
        for layer in layers:
            self.parameters[f"layer.{layer}.weight"] = torch.zeros(width, width, device=device)
            self.parameters[f"layer.{layer}.bias"] = torch.zeros(width, device=device)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return A and b of a layer."""
        weight, bias = (self.parameters[f"layer.{layer}.{part}"] for part in ("weight", "bias"))
        return weight, bias

    def apply(self, layer: int, vectors: Tensor) -> Tensor:
        """Return [vector, width]: vectors of a layer in the place of those of the last one."""
        weight, bias = self.of(layer)
        return vectors + vectors @ weight.T + bias


class LensLoss:
    """A lens while it is trained, as `mechdsl.fits.training.Trainable`.

    Inputs are the vectors of all layers, one after another, [vector, layers * width]. Targets are
    those after the last block, [vector, width].
    """

    def __init__(self, maps: LensMaps, logits: Logits) -> None:
        self.maps, self._logits = maps, logits

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return self.maps.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Nothing besides the parameters."""
        return {}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the sum of the losses of all layers."""
        if not torch.is_grad_enabled():
            return self.divergences(inputs, targets).sum()
        with torch.no_grad():
            wanted = self._log_probabilities(targets)
        total = torch.zeros((), device=inputs.device)
        for layer, tensor in self._predictions(inputs):
            # The logits of one layer at a time are in memory: its gradients are computed here, and
            # those of the returned value are the same.
            total = total + _detach(divergence(wanted, tensor).mean(), self.maps.of(layer))
        return total

    @torch.no_grad()
    def divergences(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return [layer] float64: the losses of layers on vectors as those of `loss`."""
        sums = torch.zeros(len(self.maps.layers), dtype=torch.float64)
        for part, last in zip(inputs.split(PART), targets.split(PART), strict=True):
            wanted = self._log_probabilities(last)
            for number, (_, tensor) in enumerate(self._predictions(part)):
                sums[number] += float(divergence(wanted, tensor).double().sum())
        return sums / len(inputs)

    def _predictions(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each layer with log probabilities of the lens, [vector, vocab]."""
        tensors = inputs.chunk(len(self.maps.layers), dim=1)
        for layer, vectors in zip(self.maps.layers, tensors, strict=True):
            yield layer, self._log_probabilities(self.maps.apply(layer, vectors))

    def _log_probabilities(self, vectors: Tensor) -> Tensor:
        """Return [vector, vocab], in the precision of the vectors: logits may be in 16 bits."""
        return self._logits(vectors).to(vectors.dtype).log_softmax(-1)

    def after_step(self) -> None:
        """Nothing must be restored."""

    def weights(self) -> dict[str, Tensor]:
        """Return A and b of all layers."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


@torch.no_grad()
def divergence_from_average(logits: Logits, trained_on: Tensor, targets: Tensor) -> float:
    """Return the mean of KL(p ‖ m) in nats, where m is the mean of p over other vectors.

    A lens that doesn't read its vectors can predict m.

    Args:
        trained_on: [vector, width] whose distributions are averaged.
        targets: [vector, width] whose distributions p are compared with the average.
    """
    parts = [logits(part).float().softmax(-1).double().sum(0) for part in trained_on.split(PART)]
    average = (torch.stack(parts).sum(0) / len(trained_on)).log()
    sums = [
        float(divergence(logits(part).double().log_softmax(-1), average).sum())
        for part in targets.split(PART)
    ]
    return sum(sums) / len(targets)


def divergence(target: Tensor, predicted: Tensor) -> Tensor:
    """Return [vector]: KL(target ‖ predicted) in nats, of log probabilities, [vector, vocab]."""
    possible = target > -torch.inf
    return torch.where(possible, target.exp() * (target - predicted), 0).sum(-1)


def _detach(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a scalar with the value and the gradients of a loss, whose graph is freed."""
    gradients = torch.autograd.grad(loss, parameters)
    linear = torch.stack(
        [
            (parameter * gradient).sum()
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    ).sum()
    return loss.detach() + linear - linear.detach()
