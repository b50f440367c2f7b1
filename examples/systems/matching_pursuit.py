"""Matching pursuit over the decoder of a saved dictionary (MP-SAE, arXiv 2506.03093)."""

from pathlib import Path

import torch
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parent / "refusal-features" / "sae_weights.safetensors"


class Pursuit:
    """Encoder that takes one feature per step: the one that fits the residual best."""

    steps = 6

    def __init__(self) -> None:
        weights = load_file(WEIGHTS)
        self.rows, self.centre = weights["W_dec"], weights["b_dec"]

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        rows = self.rows.to(vectors)
        rest = vectors - self.centre.to(vectors)
        found = vectors.new_zeros(len(vectors), len(rows))
        for _ in range(self.steps):
            amount, best = (rest @ rows.T).max(dim=1)
            amount = amount.clamp(min=0)
            found.scatter_add_(1, best[:, None], amount[:, None])
            rest = rest - amount[:, None] * rows[best]
        return found

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.rows.to(features) + self.centre.to(features)


class OneStep(Pursuit):
    steps = 1


class TwoSteps(Pursuit):
    steps = 2


class ManySteps(Pursuit):
    steps = 12
