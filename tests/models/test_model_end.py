"""The final norm folded into a linear map, compared with each norm's formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechdsl.base.text import Source
from mechdsl.forward.packed import unembedding
from mechdsl.forward.packed.unembedding import LINEAR_TOLERANCE, FoldedNorm

from ..execute.support import run_on, shared
from ..rules.models import bare
from ..rules.support import BLOCKS, experiment, write_data

EPS = 1e-5


class Rms(nn.Module):
    """Llama's norm, or Gemma's with `plus` 1."""

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
def test_folded_norm_is_the_gain_times_one_scale(kind: str, width: int) -> None:
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
    assert scale.std() < 1e-4  # the map is the same for all vectors
    torch.testing.assert_close(folded.bias, bias, rtol=1e-5, atol=1e-5)
    assert folded.error < LINEAR_TOLERANCE


@pytest.mark.parametrize("width", [7, 8])
def test_folded_nonlinear_norm_exceeds_the_tolerance(width: int) -> None:
    torch.manual_seed(0)
    assert FoldedNorm(Squashed(width), width).error > LINEAR_TOLERANCE
    assert FoldedNorm(nn.Sequential(layer_norm(width), nn.GELU()), width).error > LINEAR_TOLERANCE


def test_half_precision_norm_is_folded_in_float32() -> None:
    torch.manual_seed(0)
    norm = layer_norm(8).to(torch.bfloat16)
    folded = FoldedNorm(norm, 8)
    x = torch.randn(3, 8)
    wide = nn.functional.layer_norm(x, (8,), norm.weight.float(), norm.bias.float(), EPS)
    torch.testing.assert_close(folded.of(x), wide, rtol=1e-5, atol=1e-5)
    assert next(norm.parameters()).dtype == torch.bfloat16  # the model's norm is not modified
    assert folded.error < LINEAR_TOLERANCE


# --- whole models ---------------------------------------------------------------------------------


def test_chunked_unembedding_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk size does not affect the logits of a vector."""
    model = shared(bare("llama"))
    torch.manual_seed(0)
    vectors = torch.randn(7, model.shape.d_model)
    whole = unembedding.ModelUnembedding(model).logits(vectors)
    monkeypatch.setattr(unembedding, "MAX_VECTORS", 3)
    torch.testing.assert_close(unembedding.ModelUnembedding(model).logits(vectors), whole)
    some = torch.tensor([3, 11])
    found = unembedding.ModelUnembedding(model).logits(vectors, some)
    torch.testing.assert_close(found, whole[:, some])


def test_direct_logit_rejects_a_nonlinear_norm_and_logit_lens_accepts_it(tmp_path: Path) -> None:
    """A nonlinear norm has no scale to freeze; the logit lens needs none."""
    write_data(tmp_path)
    changed = copy.deepcopy(bare("llama"))
    changed.model.norm = Squashed(changed.config.hidden_size)
    direct = "observe direct_logit attn_out layer 1 toward answer at last token"
    lens = "observe logit_lens resid_post layer 1 at last token"
    for line, code in ((direct, "E0108"), (lens, None)):
        text = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n'
        source = Source(text + experiment("e", line, measure=""), tmp_path / "file.mech")
        result, problems = run_on(source, {"m": shared(changed)})
        assert (result is None) == (code is not None), problems
        assert [each.code for each in problems if each.severity == "error"] == [code][: bool(code)]
