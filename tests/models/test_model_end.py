"""The final norm as a linear map, whatever norm it is, beside its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechdsl.packed.model_end import TOLERANCE, FoldedNorm

EPS = 1e-5


class Rms(nn.Module):
    """Llama's, or with `plus` 1 Gemma's."""

    def __init__(self, width: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) + 1.5)
        self.plus = plus

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return (self.weight + self.plus) * x * scale


class Squashed(nn.Module):
    """A norm that isn't linear: Zhu et al. 2025, "Transformers without normalization"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) + 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(0.5 * x)


def layer_norm(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=EPS)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width) + 1.5)
        norm.bias.copy_(torch.randn(width))
    return norm


NORMS: dict[str, Any] = {
    "layer": layer_norm,
    "rms": Rms,
    "gemma": lambda width: Rms(width, 1.0),
}


@pytest.mark.parametrize("width", [7, 8])
@pytest.mark.parametrize("kind", list(NORMS))
def test_a_norm_is_its_gain_times_a_scale(kind: str, width: int) -> None:
    torch.manual_seed(width)
    norm = NORMS[kind](width)
    folded = FoldedNorm(norm, width)
    weight = norm.weight.detach() + getattr(norm, "plus", 0.0)
    bias = norm.bias.detach() if kind == "layer" else torch.zeros(width)
    x = torch.randn(5, width) * 2 + 3
    given = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    along = weight * given
    found = folded.linear(x)
    scale = (found * along).sum(-1) / along.square().sum(-1)
    torch.testing.assert_close(found, along * scale[:, None], rtol=1e-4, atol=1e-4)
    assert scale.std() < 1e-4  # one map for all vectors
    torch.testing.assert_close(folded.bias, bias, rtol=1e-5, atol=1e-5)
    assert folded.error < TOLERANCE


@pytest.mark.parametrize("width", [7, 8])
def test_what_is_no_linear_map_is_known_for_it(width: int) -> None:
    torch.manual_seed(0)
    assert FoldedNorm(Squashed(width), width).error > TOLERANCE
    assert FoldedNorm(nn.Sequential(layer_norm(width), nn.GELU()), width).error > TOLERANCE


def test_a_norm_in_half_precision_is_folded_in_32_bits() -> None:
    torch.manual_seed(0)
    norm = layer_norm(8).to(torch.bfloat16)
    folded = FoldedNorm(norm, 8)
    x = torch.randn(3, 8)
    wide = nn.functional.layer_norm(x, (8,), norm.weight.float(), norm.bias.float(), EPS)
    torch.testing.assert_close(folded.of(x), wide, rtol=1e-5, atol=1e-5)
    assert next(norm.parameters()).dtype == torch.bfloat16  # the model's own stays as it is
    assert folded.error < TOLERANCE
