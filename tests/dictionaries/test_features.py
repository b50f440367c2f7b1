"""Features and reconstructions, compared with SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechdsl.base.files import UnreadableFile
from mechdsl.dictionaries.features import Dictionary, load_dictionary
from mechdsl.dictionaries.folder import MAX_GATHERED, read_dictionary

DATA = Path(__file__).parent / "data"
TEMPORAL = sorted(path.name for path in DATA.glob("temporal*"))
CASES = sorted(path.name for path in DATA.iterdir() if path.name not in TEMPORAL)


def case(name: str) -> tuple[Dictionary, dict[str, Tensor]]:
    dictionary = load_dictionary(read_dictionary(DATA / name, name))
    return dictionary, load_file(DATA / name / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_features_equal_sae_lens(name: str) -> None:
    dictionary, expected = case(name)
    found = dictionary.encode(expected["vectors"])
    assert (expected["features"] > 0).float().mean() > 0.05
    torch.testing.assert_close(found, expected["features"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_reconstructions_equal_sae_lens(name: str) -> None:
    dictionary, expected = case(name)
    found = dictionary.decode(expected["features"], expected["vectors"])
    torch.testing.assert_close(found, expected["decoded"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal_features_equal_sae_lens(name: str) -> None:
    """The vectors of one row; each depends on the preceding ones."""
    dictionary, expected = case(name)
    vectors = expected["vectors"]
    novel = dictionary.remove_predicted(vectors)
    found = dictionary.encode(novel)
    assert 0.05 < (expected["features"] > 0).float().mean() < 0.7
    torch.testing.assert_close(found, expected["features"], atol=1e-5, rtol=1e-5)
    predicted = vectors * dictionary.file.scale - novel
    whole = (predicted + dictionary.reconstruct(novel)) / dictionary.file.scale
    torch.testing.assert_close(whole, expected["decoded"], atol=1e-5, rtol=1e-5)
    which = torch.tensor([[3, 20]]).expand(len(vectors), -1)
    torch.testing.assert_close(dictionary.encode(novel, which), found[:, [3, 20]])
    for end in (1, 7):
        torch.testing.assert_close(dictionary.remove_predicted(vectors[:end]), novel[:end])


@pytest.mark.parametrize("count", [5, MAX_GATHERED + 4])
@pytest.mark.parametrize("name", CASES)
def test_selected_features_equal_those_of_the_full_encoder(name: str, count: int) -> None:
    dictionary, expected = case(name)
    vectors = expected["vectors"]
    which = torch.stack([torch.randperm(dictionary.size)[:count] for _ in range(len(vectors))])
    found = dictionary.encode(vectors, which)
    torch.testing.assert_close(found, expected["features"].gather(1, which), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equal_vectors_have_separate_gradients(name: str) -> None:
    dictionary, expected = case(name)
    repeated = expected["vectors"][:1].repeat(3, 1).double().requires_grad_()
    factors = torch.tensor([[1.0], [2.0], [3.0]]).double()
    (found,) = torch.autograd.grad((dictionary.encode(repeated) * factors).sum(), repeated)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found, found[:1] * factors)


def test_weights_loaded_in_inference_mode_can_be_differentiated() -> None:
    dictionary, expected = case("topk")
    vectors = expected["vectors"].double()
    with torch.inference_mode():
        dictionary.encode(vectors)
    (found,) = torch.autograd.grad(dictionary.encode(vectors.requires_grad_()).sum(), vectors)
    assert found.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in CASES if "transcoder" not in name])
def test_shift_equals_the_difference_of_two_reconstructions(name: str) -> None:
    dictionary, expected = case(name)
    vectors, features = expected["vectors"], expected["features"]
    change = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    moved = dictionary.decode(features + change, vectors)
    difference = moved - dictionary.decode(features, vectors)
    found = dictionary.shift(vectors, change, None)
    torch.testing.assert_close(found, vectors + difference, atol=1e-4, rtol=1e-4)
    for count in (2, MAX_GATHERED + 4):
        which = torch.arange(count).expand(len(vectors), -1)
        some = torch.zeros_like(change).scatter(1, which, change.gather(1, which))
        named = dictionary.shift(vectors, change.gather(1, which), which)
        whole = dictionary.shift(vectors, some, None)
        torch.testing.assert_close(named, whole, atol=1e-5, rtol=1e-5)


def test_file_of_tensors_is_read_as_a_dictionary(tmp_path: Path) -> None:
    weights = load_file(DATA / "jumprelu" / "sae_weights.safetensors")
    save_file(weights, tmp_path / "sae.safetensors")
    file = read_dictionary(tmp_path / "sae.safetensors", "sae.safetensors")
    assert (file.layout, file.architecture, file.features) == ("tensors", "jumprelu", 24)
    expected = load_file(DATA / "jumprelu" / "expected.safetensors")
    found = load_dictionary(file).encode(expected["vectors"])
    torch.testing.assert_close(found, expected["features"], atol=1e-5, rtol=1e-5)


def test_sparsify_folder_is_read_with_a_transposed_encoder(tmp_path: Path) -> None:
    weights = load_file(DATA / "topk" / "sae_weights.safetensors")
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    written = {
        names.get(name, name): (each.T if name == "W_enc" else each).contiguous()
        for name, each in weights.items()
    }
    save_file(written, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "num_latents": 24, "k": 5, "d_in": 8}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    file = read_dictionary(tmp_path, "folder")
    assert (file.layout, file.architecture, file.k) == ("sparsify", "topk", 5)
    expected = load_file(DATA / "topk" / "expected.safetensors")
    found = load_dictionary(file).encode(expected["vectors"])
    torch.testing.assert_close(found, expected["features"], atol=1e-5, rtol=1e-5)


def test_sparsify_skip_transcoder_equals_its_definition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, bias, decoder = torch.randn(24, 8), torch.randn(24), torch.randn(24, 8)
    out, skip = torch.randn(8), torch.randn(8, 8)
    written = {"encoder.weight": encoder, "encoder.bias": bias, "W_dec": decoder, "b_dec": out}
    save_file({**written, "W_skip": skip}, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "k": 5, "transcode": True, "skip_connection": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    dictionary = load_dictionary(read_dictionary(tmp_path, "folder"))
    assert dictionary.file.kind == "topk skip transcoder with k 5"
    vectors = torch.randn(6, 8)
    expected = torch.zeros(6, 8)
    for row, x in enumerate(vectors):
        features = (encoder @ x + bias).relu()
        kept = features.argsort(descending=True)[:5]
        expected[row] = features[kept] @ decoder[kept] + out + skip @ x
    torch.testing.assert_close(dictionary.reconstruct(vectors), expected, atol=1e-5, rtol=1e-5)


def test_circuit_tracer_transcoder_file_is_read(tmp_path: Path) -> None:
    """The layout of circuit-tracer."""
    torch.manual_seed(0)
    encoder, bias, decoder = torch.randn(24, 8), torch.randn(24), torch.randn(24, 8)
    threshold, out = torch.rand(24), torch.randn(8)
    written = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": out}
    written["activation_function.threshold"] = threshold
    save_file(written, tmp_path / "layer_3.safetensors")
    file = read_dictionary(tmp_path / "layer_3.safetensors", "layer_3", transcodes=True)
    assert file.kind == "jumprelu transcoder"
    vectors = torch.randn(6, 8)
    features = vectors @ encoder.T + bias
    expected = (features * (features > threshold)) @ decoder + out
    found = load_dictionary(file).reconstruct(vectors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_incomplete_cross_layer_transcoder_is_rejected(tmp_path: Path) -> None:
    save_file({"W_enc_0": torch.zeros(4, 8)}, tmp_path / "W_enc_0.safetensors")
    with pytest.raises(UnreadableFile, match="is a cross-layer transcoder without"):
        read_dictionary(tmp_path, "clt", transcodes=True, layer=1)


def test_dictionary_facts_are_read_from_its_configuration() -> None:
    file = read_dictionary(DATA / "transcoder", "transcoder")
    assert file.kind == "standard transcoder"
    assert (file.width_in, file.width_out, file.features) == (8, 6, 24)
    assert (file.model, file.hook) == ("toy", "blocks.1.hook_resid_post")
    assert file.dtype == "F32"


def test_configuration_before_sae_lens_6_is_read(tmp_path: Path) -> None:
    weights = load_file(DATA / "topk" / "sae_weights.safetensors")
    save_file(weights, tmp_path / "sae_weights.safetensors")
    old = {
        "d_in": 8,
        "d_sae": 24,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "hook_point": "blocks.1.hook_resid_pre",
        "normalize_activations": False,
        "model_name": "gpt2-small",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    file = read_dictionary(tmp_path, "old")
    assert (file.architecture, file.k, file.hook) == ("topk", 5, "blocks.1.hook_resid_pre")


def changed(folder: Path, tensors: dict[str, Tensor] | None = None, **facts: Any) -> Path:
    """Write a copy of a dictionary with modified facts or tensors."""
    config = json.loads((DATA / "standard" / "cfg.json").read_text()) | facts
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = load_file(DATA / "standard" / "sae_weights.safetensors") | (tensors or {})
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("facts", "message", "hint"),
    [
        ({"architecture": "stochastic"}, "the architecture `stochastic`", "`jumprelu`"),
        ({"architecture": "crosscoder"}, "features belong to several layers", "one vector"),
        ({"architecture": "temporal"}, "no tensor `attn_layers.0.k_ctx.weight`", "it has `W_dec`"),
        ({"architecture": "gated"}, "no tensor `b_gate`", "it has `W_dec`"),
        ({"architecture": "topk", "k": 0}, "`k` of `here/cfg.json` is 0", "at least 1"),
        ({"activation_fn": "tanh-relu"}, "activation function `tanh-relu`", "`relu`"),
        ({"normalize_activations": "covariance_whitening"}, "`covariance_whitening`", "`none`"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "a fixed average norm",
            "fold_activation_norm_scaling_factor",
        ),
    ],
)
def test_unsupported_dictionary_configuration_names_the_fix(
    facts: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UnreadableFile) as caught:
        read_dictionary(changed(tmp_path, **facts), "here")
    assert message in caught.value.reason
    assert hint in caught.value.hint


def test_tensor_of_wrong_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"`b_enc` of `here` has the shape \[7\], not \[24\]"):
        read_dictionary(changed(tmp_path, {"b_enc": torch.zeros(7)}), "here")


@pytest.mark.parametrize("name", ["sae.pt", "ae.pkl", "sae.bin"])
def test_pickled_dictionary_is_rejected_with_a_conversion(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UnreadableFile, match="pickle") as caught:
            read_dictionary(path, "here")
        assert "weights_only=True" in caught.value.hint
        assert name in caught.value.hint


@pytest.mark.parametrize(
    ("missing", "message"),
    [("cfg.json", "has no `cfg.json`"), ("sae_weights.safetensors", "has no weights")],
)
def test_missing_dictionary_file_is_named(missing: str, message: str, tmp_path: Path) -> None:
    (changed(tmp_path) / missing).unlink()
    with pytest.raises(UnreadableFile, match=message):
        read_dictionary(tmp_path, "here")


def test_dictionary_modified_after_its_check_is_not_loaded(tmp_path: Path) -> None:
    file = read_dictionary(changed(tmp_path), "here")
    changed(tmp_path, {"b_enc": torch.ones(24)})
    with pytest.raises(ValueError, match="has changed since it was checked"):
        load_dictionary(file)


def test_dictionary_weights_with_nan_are_rejected(tmp_path: Path) -> None:
    file = read_dictionary(changed(tmp_path, {"b_enc": torch.full((24,), torch.nan)}), "here")
    with pytest.raises(ValueError, match="`b_enc` has NaN or infinity"):
        load_dictionary(file)
