"""A table of config defaults, so that checking a file doesn't import transformers."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from mechdsl.models.config import KEY_GROUPS, add_defaults, read_defaults, shape_of_folder_config
from mechdsl.models.shape import ModelShape

from . import library_defaults


def shape(**config: Any) -> ModelShape:
    """The shape of a config, read without transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # importing it fails
        found, problems = shape_of_folder_config(config)
    assert found is not None, problems
    return found


def test_missing_config_numbers_are_filled_from_the_table() -> None:
    found = shape(model_type="llama", num_hidden_layers=3, architectures=["LlamaForCausalLM"])
    assert (found.n_layers, found.blocks[0].heads, found.d_model, found.blocks[0].neurons) == (
        3,
        32,
        4096,
        11008,
    )
    found = shape(model_type="gpt2", num_attention_heads=4)
    assert (found.n_layers, found.blocks[0].heads, found.blocks[0].d_head) == (12, 4, 192)


def test_missing_numbers_of_a_subconfig_are_filled_from_the_table() -> None:
    """As in the config of LLaVA, whose language model is a LLaMA with default sizes."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    found = shape(**config, vision_config={}, architectures=["LlavaForConditionalGeneration"])
    assert (found.n_layers, found.vocab_size, found.takes) == (32, 32064, "image and text")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("llava", {}),
        ("llava", {"vision_config": {}}),
        ("llava", {"vision_config": {"num_hidden_layers": 3, "patch_size": 16}}),
        ("mllama", {"text_config": {"num_hidden_layers": 41}}),
        ("mllama", {"vision_config": {"image_size": 224}}),
        ("qwen2_vl", {"vision_config": {"depth": 3}}),
        ("t5", {"num_layers": 3}),
        ("t5gemma", {}),
        ("t5gemma", {"decoder": {"num_hidden_layers": 3}}),
        ("t5gemma2", {"encoder": {"text_config": {"num_hidden_layers": 3}}}),
    ],
)
def test_defaults_of_further_stacks_equal_the_library(kind: str, part: dict[str, Any]) -> None:
    """An absent subconfig has the defaults of the whole model, an incomplete one of its type."""
    found = shape(model_type=kind, **part)
    assert library_defaults.without_config(found) in library_defaults.shapes(
        library_defaults.whole(kind, **part)
    )


def test_default_vision_encoder_of_llava_has_24_layers() -> None:
    encoder = shape(model_type="llava").others["vision"]
    assert (encoder.n_layers, encoder.blocks[0].heads, encoder.d_model) == (24, 16, 1024)
    assert encoder.patches is not None
    assert (encoder.patches.size, encoder.patches.patch) == ((336, 336), (14, 14))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3", "paligemma", "mllama"])
@pytest.mark.parametrize("vision", [{}, {"num_hidden_layers": 3, "depth": 3}])
def test_empty_vision_config_has_defaults_where_the_text_config_is_complete(
    kind: str, vision: dict[str, Any]
) -> None:
    text = library_defaults.whole(kind)["text_config"]
    found = shape(model_type=kind, text_config=text, vision_config=vision)
    assert "vision" in found.others
    expected = library_defaults.whole(kind, text_config=text, vision_config=vision)
    assert library_defaults.without_config(found) in library_defaults.shapes(expected)


def test_default_first_token_of_t5gemma_is_2() -> None:
    assert shape(model_type="t5gemma").starts == (2,)


def test_derived_sizes_use_the_given_config_numbers() -> None:
    found = shape(model_type="llama", hidden_size=64, num_attention_heads=4)
    assert (found.blocks[0].d_head, found.blocks[0].kv_heads) == (16, 4)


@pytest.mark.parametrize(
    "config", [{"model_type": "of_tomorrow"}, {}, {"model_type": "gpt2", "n_layer": None}]
)
def test_config_of_unknown_size_is_rejected(config: dict[str, Any]) -> None:
    found, problems = shape_of_folder_config(config)
    assert found is None
    assert "E0408" in [problem.code for problem in problems]


def test_complete_config_is_not_modified_by_defaults() -> None:
    config = {"model_type": "gpt2", **read_defaults()["gpt2"]}
    assert add_defaults(config, KEY_GROUPS) == config


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "gemma2", "opt"])
def test_defaults_table_equals_the_library_for_common_types(kind: str) -> None:
    assert library_defaults.kept(kind, {}) == read_defaults()[kind]
    assert library_defaults.shapes(add_defaults({}, KEY_GROUPS, kind)) == library_defaults.shapes(
        library_defaults.whole(kind)
    )


@pytest.mark.slow
def test_defaults_table_equals_the_library_for_all_types() -> None:
    found = library_defaults.table()
    assert json.loads(json.dumps(found)) == read_defaults()
    kinds = [kind for kind in found if library_defaults.whole(kind)]
    assert [kind for kind in kinds if library_defaults.find_differences(kind, found)] == []
