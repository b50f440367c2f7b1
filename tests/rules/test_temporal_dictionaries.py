"""Temporal SAEs, whose features depend on the preceding tokens, against loops over the tokens of
one unpadded prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.planner.passes import save_costs

from ..execute.support import MODES, adopted, context
from ..quick import in_turn
from .support import BLOCKS, Text, codes, experiment, plain, rows, run_file, tokens, try_file
from .test_dictionaries import LAYER
from .test_inactive_features import width_of
from .test_observed_features import check, observed
from .test_saved_rows import check as check_lines
from .test_saved_rows import expected_lines, lines_of, run, save

HERE = ("gpt2", "llama", "gpt_neox")
FEATURES, HEADS, K, SCALE = 12, 2, 4, 0.7
BASIS = f'basis f = sae("temporal") at resid_post layer {LAYER}\n'
Weights = dict[str, Tensor]


def make(folder: Path, width: int) -> Weights:
    """Two attention layers, a separate encoder, and rescaled vectors."""
    random = torch.Generator().manual_seed(5)
    sizes = {"k_ctx": FEATURES // 3, "q_target": FEATURES // 3}
    weights = {
        "W_enc": 6 * torch.randn(width, FEATURES, generator=random),
        "W_dec": torch.randn(FEATURES, width, generator=random) / 2,
        "b_dec": torch.randn(width, generator=random) / 4,
    }
    for layer in range(2):
        for name in ("k_ctx", "q_target", "v_ctx", "c_proj"):
            shape = sizes.get(name, FEATURES), FEATURES
            at = f"attn_layers.{layer}.{name}"
            weights[f"{at}.weight"] = torch.randn(shape, generator=random)
            weights[f"{at}.bias"] = torch.randn(shape[:1], generator=random) / 2
    config = {
        "architecture": "temporal",
        "d_in": width,
        "d_sae": FEATURES,
        "n_heads": HEADS,
        "n_attn_layers": 2,
        "bottleneck_factor": 3,
        "kval_topk": K,
        "tied_weights": False,
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": SCALE,
    }
    (folder / "temporal").mkdir(exist_ok=True)
    (folder / "temporal" / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "temporal" / "sae_weights.safetensors")
    return {name: each.double() for name, each in weights.items()}


def codes_of(weights: Weights, x: Tensor) -> Tensor:
    return (x / (4 * len(x)) @ weights["W_enc"]).clamp(min=0)


def mapped(weights: Weights, layer: int, name: str, code: Tensor) -> Tensor:
    at = f"attn_layers.{layer}.{name}"
    return weights[f"{at}.weight"] @ code + weights[f"{at}.bias"]


def unpredicted(weights: Weights, vectors: Tensor) -> Tensor:
    """[T, width]: token by token, head by head."""
    residual = [SCALE * x - weights["b_dec"] for x in vectors]
    for layer in range(2):
        code = [codes_of(weights, x) for x in residual]
        context = [torch.zeros_like(code[0]), *code[:-1]]
        changed: list[Tensor] = []
        for t, x in enumerate(residual):
            query = mapped(weights, layer, "q_target", code[t]).chunk(HEADS)
            keys = [mapped(weights, layer, "k_ctx", c).chunk(HEADS) for c in context[: t + 1]]
            values = [mapped(weights, layer, "v_ctx", c).chunk(HEADS) for c in context[: t + 1]]
            parts: list[Tensor] = []
            for h in range(HEADS):
                scores = torch.stack([query[h] @ key[h] for key in keys]) / len(query[h]) ** 0.5
                shares = scores.exp() / scores.exp().sum()
                parts.append(shares @ torch.stack([value[h] for value in values]))
            predicted = mapped(weights, layer, "c_proj", torch.cat(parts)).clamp(min=0)
            along = predicted @ weights["W_dec"]
            changed.append(x - along * (along @ x) / (along.norm() + 1e-6) ** 2)
        residual = changed
    return torch.stack(residual)


def encode(weights: Weights, residual: Tensor) -> Tensor:
    found = torch.stack([codes_of(weights, x) for x in residual])
    kept = found.argsort(dim=1, descending=True)[:, :K]
    return torch.zeros_like(found).scatter(1, kept, found.gather(1, kept))


def stream(name: str, text: Text) -> Tensor:
    return plain(name, text)["resid_post", LAYER][:, 0]


def features(name: str, weights: Weights, text: Text, at: list[int]) -> Tensor:
    """[token, feature]"""
    return encode(weights, unpredicted(weights, stream(name, text)))[at]


def means(name: str, weights: Weights, at: str, run: str = "clean") -> np.ndarray:
    found = [features(name, weights, text, tokens(text, at)).mean(0) for text in rows(run)]
    return torch.stack(found).numpy()


@pytest.mark.parametrize("at", ["last token", "tokens *", "subject tokens", "token 3"])
@pytest.mark.parametrize(("family", "mode"), in_turn(HERE, list(MODES)))
def test_observed_temporal_features_equal_the_reference(
    family: str, mode: str, at: str, data: Path
) -> None:
    weights = make(data, width_of(family))
    text = BASIS + observed(f"observe features of f at {at} top 4")
    found = run_file(text, data, family, mode)["e"]
    check(found, means(family, weights, at), 4)
    alone = [encode(weights, SCALE * stream(family, row) - weights["b_dec"]) for row in rows()]
    without = [own[tokens(row, at)].mean(0) for own, row in zip(alone, rows(), strict=True)]
    assert np.abs(means(family, weights, at) - torch.stack(without).numpy()).max() > 1e-3


def test_observed_temporal_features_of_other_runs_equal_the_reference(data: Path) -> None:
    """Another run of other lengths, two positions, and a second experiment on the same rows."""
    weights = make(data, width_of("llama"))
    text = BASIS + observed("observe features of f at subject tokens top 3 by difference(longer)")
    line = "observe features of f at last token, cue token"
    text += experiment("places", line, measure="", stats="")
    found = run_file(text, data, "llama", "planned")
    own = means("llama", weights, "subject tokens")
    check(found["e"], own - means("llama", weights, "subject tokens", "longer"), 3)
    places = found["places"]
    for cell, values in zip(places.cells, places.measures[0].patched, strict=True):
        expected = means("llama", weights, str(cell.coords["position"]))
        assert np.abs(values - expected[:, cell.coords["feature"]]).max() < 1e-4


def test_explained_variance_of_a_temporal_sae_includes_the_prediction(data: Path) -> None:
    """The prediction counts as explained, as in the reconstruction of SAELens."""
    weights = make(data, width_of("llama"))
    text = BASIS + observed("observe features of f at subject tokens top 3")
    said = run_file(text, data, "llama", "planned")["e"].conventions["features of f"]
    whole, error = [], 0.0
    for row in rows():
        at = tokens(row, "subject tokens")
        residual = unpredicted(weights, stream("llama", row))[at]
        error += float((residual - encode(weights, residual) @ weights["W_dec"]).square().sum())
        whole.append(SCALE * stream("llama", row)[at])
    every = torch.cat(whole)
    explained = 1 - error / float((every - every.mean(0)).square().sum())
    assert f"explains {explained:.4g} of their variance" in said


@pytest.mark.parametrize("mode", ["planned", "small passes"])
def test_saved_rows_of_temporal_features_equal_the_reference(mode: str, data: Path) -> None:
    weights = make(data, width_of("llama"))
    line = 'save top 2 rows of features * of f at subject tokens to "rows.jsonl"'
    (saved,) = run(BASIS + save(line), data, "llama", mode)

    def read(text: Text, at: list[int]) -> Tensor:
        return features("llama", weights, text, sorted(at))

    expected = expected_lines(rows(), read, "subject tokens", range(FEATURES), 2)
    check_lines(lines_of(saved.path), expected)


@pytest.mark.parametrize(
    "line",
    [
        "ablate feature 0 of f at last token with zero",
        "set resid_post layer 1 at last token to reconstruction of f",
        "scale resid_post layer 1 in basis f at last token by 2",
        "observe ov(f) layer 1 head *",
    ],
)
def test_rules_on_temporal_features_are_errors(line: str, data: Path) -> None:
    make(data, width_of("llama"))
    text = BASIS + (observed(line) if "observe" in line else experiment("e", line))
    assert codes(text, data) == ["E0342"]
    if "observe" not in line:
        (found,) = try_file(text, data, "llama")[1]
        assert "depend on the preceding tokens" in found.message


def test_plan_counts_preceding_tokens_of_temporal_features(data: Path) -> None:
    """A position at the end of the prompts costs as much context as all tokens."""
    width = width_of("llama")
    make(data, width)
    adds: list[float] = []
    for at in ("last token", "tokens *", "token 0"):
        line = save(f'save top 2 rows of features * of f at {at} to "rows.jsonl"')
        text = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{BASIS}{line}'
        source = Source(text, data / "file.mech")
        models = {"m": context(source, "m", adopted("llama"))}
        (cost,) = save_costs(check_source(source, CheckSettings(), models).saving)
        adds.append(cost.cost.multiply_adds)
    last, every, first = adds
    more = sum(len(row.ids) for row in rows()) - len(rows())
    assert every - last == pytest.approx(more * width * 3 * FEATURES)
    layer = 2 * FEATURES * (width + FEATURES // 3 + FEATURES)
    assert last - first == pytest.approx(more * 2 * layer)
