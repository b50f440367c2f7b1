"""What configs leave out is in a table, so that checking a file doesn't wait for transformers."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from mechdsl.models.config import KEY_GROUPS, add_defaults, read_defaults, shape_of_folder_config
from mechdsl.models.shape import ModelShape

from . import library_defaults


def shape(**config: Any) -> ModelShape:
    """Of a config, without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # importing it fails
        found, problems = shape_of_folder_config(config)
    assert found is not None, problems
    return found


def test_a_config_that_lacks_numbers() -> None:
    found = shape(model_type="llama", num_hidden_layers=3, architectures=["LlamaForCausalLM"])
    assert (found.n_layers, found.n_heads, found.d_model, found.d_mlp) == (3, 32, 4096, 11008)
    found = shape(model_type="gpt2", num_attention_heads=4)
    assert (found.n_layers, found.n_heads, found.d_head) == (12, 4, 192)


def test_numbers_of_a_part() -> None:
    """As in the files of LLaVA, whose language model is a LLaMA as it comes."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    found = shape(**config, vision_config={}, architectures=["LlavaForConditionalGeneration"])
    assert (found.n_layers, found.vocab_size, found.takes) == (32, 32064, "image and text")


def test_what_is_derived_is_derived_of_what_is_written() -> None:
    found = shape(model_type="llama", hidden_size=64, num_attention_heads=4)
    assert (found.d_head, found.n_kv_heads) == (16, 4)


@pytest.mark.parametrize(
    "config", [{"model_type": "of_tomorrow"}, {}, {"model_type": "gpt2", "n_layer": None}]
)
def test_what_nobody_knows_is_said(config: dict[str, Any]) -> None:
    found, problems = shape_of_folder_config(config)
    assert found is None
    assert "E0408" in [problem.code for problem in problems]


def test_a_config_that_is_whole_stays_as_it_is() -> None:
    config = {"model_type": "gpt2", **read_defaults()["gpt2"]}
    assert add_defaults(config, KEY_GROUPS) == config


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "gemma2", "opt"])
def test_the_table_is_what_the_library_says(kind: str) -> None:
    assert library_defaults.kept(kind, {}) == read_defaults()[kind]
    assert library_defaults.shapes(add_defaults({}, KEY_GROUPS, kind)) == library_defaults.shapes(
        library_defaults.whole(kind)
    )


@pytest.mark.slow
def test_the_whole_table_is_what_the_library_says() -> None:
    assert json.loads(json.dumps(library_defaults.table())) == read_defaults()
