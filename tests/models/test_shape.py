"""Sizes and sites from a `config.json` alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.config import read_shape, shape_from_config
from mechdsl.models.shape import ENCODER_TYPES, FAMILIES, check_site, unit_count, vector_width
from mechdsl.vocab.sites import SITES, find_short_site, stop_layer, write_order

from ..families.parts import Architecture
from ..families.tables import every
from ..images import duals
from . import families

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "vocab_size": 50257,
    "n_positions": 1024,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "hidden_size": 1024,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def test_encoder_types_include_all_library_encoders_with_classifiers() -> None:
    """Model types with classifiers and a masked language model, except encoder-decoders."""
    from transformers.models.auto import modeling_auto as auto

    classifiers = {
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        *auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    both = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    masked = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    assert (classifiers & masked) - both <= ENCODER_TYPES
    decoders = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - masked
    assert decoders.isdisjoint(ENCODER_TYPES)


@pytest.mark.parametrize(
    ("name", "more", "task", "labels", "at"),
    [
        ("GPT2ForSequenceClassification", {}, "one label", ("LABEL_0", "LABEL_1"), "last token"),
        ("GPT2ForTokenClassification", {"num_labels": 1}, "number", ("LABEL_0",), "every token"),
        (
            "BertForSequenceClassification",
            {"id2label": {"1": "b", "0": "a"}, "problem_type": "multi_label_classification"},
            "many labels",
            ("a", "b"),
            "first token",
        ),
        (
            "BertForSequenceClassification",
            {"id2label": {"0": "x", "1": "y"}, "problem_type": "regression"},
            "number",
            ("x", "y"),
            "first token",
        ),
        ("GPT2LMHeadModel", {"id2label": {"0": "x"}}, "tokens", (), "every token"),
    ],
)
def test_task_and_labels_follow_from_class_and_config(
    name: str, more: dict[str, Any], task: str, labels: tuple[str, ...], at: str
) -> None:
    encodes = name.startswith("Bert")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 12}
    config = {"model_type": "bert" if encodes else "gpt2", "architectures": [name], **sizes, **more}
    shape, found = shape_from_config(config)
    assert found == []
    assert shape is not None
    assert (shape.task, shape.labels, shape.output_at) == (task, labels, at)
    assert shape.causal is not encodes
    assert shape.outputs == (len(labels) or 12)


def test_gpt2_config_gives_sizes_and_sites() -> None:
    shape, problems = shape_from_config(GPT2)
    assert not problems
    assert shape is not None
    assert (shape.n_layers, shape.blocks[0].heads, shape.blocks[0].kv_heads) == (12, 12, 12)
    assert (shape.d_model, shape.blocks[0].d_head, shape.blocks[0].neurons) == (768, 64, 3072)
    assert (shape.vocab_size, shape.max_positions) == (50257, 1024)
    assert shape.parallel_block is False
    assert "resid_mid" in shape.sites
    assert "pattern" in shape.sites


def test_unit_counts_and_widths_with_grouped_heads() -> None:
    shape, _ = shape_from_config(QWEN3)
    assert shape is not None
    assert (unit_count(shape, "q", 0), unit_count(shape, "k", 0), unit_count(shape, "z", 0)) == (
        16,
        8,
        16,
    )
    assert (unit_count(shape, "mlp_hidden", 0), unit_count(shape, "resid_post", 0)) == (3072, 1)
    assert (
        vector_width(shape, "k", 0),
        vector_width(shape, "head_out", 0),
        vector_width(shape, "mlp_hidden", 0),
    ) == (
        128,
        1024,
        1,
    )
    with pytest.raises(ValueError, match="depends on the prompt"):
        vector_width(shape, "pattern", 0)


def test_shape_of_a_nested_text_config() -> None:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": QWEN3}
    shape, _ = shape_from_config(outer)
    assert shape is not None
    assert shape.n_layers == 28
    assert shape.architecture == "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("config", "parallel"),
    [
        ({"model_type": "gpt_neox"}, True),
        ({"model_type": "gpt_neox", "use_parallel_residual": False}, False),
        ({"model_type": "gptj"}, True),
        ({"model_type": "unheard_of"}, False),
        ({"model_type": "unheard_of", "parallel_attn": True}, True),
    ],
)
def test_parallel_blocks_have_no_resid_mid(config: dict[str, Any], parallel: bool | None) -> None:
    sizes = {k: v for k, v in QWEN3.items() if k not in ("model_type", "architectures")}
    shape, _ = shape_from_config({**sizes, **config})
    assert shape is not None
    assert shape.parallel_block is parallel
    assert ("resid_mid" in shape.sites) == (not parallel)


def test_missing_site_message_names_the_reason() -> None:
    neox = {**QWEN3, "model_type": "gpt_neox"}
    shape, _ = shape_from_config(neox)
    assert shape is not None
    assert check_site(shape, "attn_out", model="n") is None
    parallel = check_site(shape, "resid_mid", model="n")
    assert parallel is not None
    assert (parallel.code, parallel.message) == ("E0402", "`n` has no `resid_mid`")
    experts, _ = shape_from_config({**QWEN3, "num_local_experts": 8})
    assert experts is not None
    other = check_site(experts, "mlp_hidden", model="n")
    assert other is not None
    assert other.code == "E0413"
    assert "`mlp_out`" in other.help_text


@pytest.mark.parametrize("site", ["z", "attn_out", "pattern"])
def test_attention_of_a_hybrid_model_is_not_supported(site: str) -> None:
    jamba = next(each for each in every() if each.name == "jamba")
    assert isinstance(jamba, Architecture)
    config = {**jamba.config, "model_type": "jamba", "architectures": ["JambaForCausalLM"]}
    shape, problems = shape_from_config(config)
    assert shape is not None, problems
    missing = check_site(shape, site, model="m")
    assert missing is not None
    assert missing.code == "E0413"
    assert "attention isn't supported in models with other mixers" in str(missing)


def test_mixture_of_experts_has_no_mlp_hidden_site() -> None:
    shape, _ = shape_from_config({**QWEN3, "num_local_experts": 8})
    assert shape is not None
    assert "mlp_hidden" not in shape.sites


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"n_layer": None}, "E0408", "number of layers"),
        ({"vocab_size": None}, "E0408", "vocabulary size"),
        ({"vocab_size": "many"}, "E0420", '`vocab_size`: "many"'),
        ({"vocab_size": 0}, "E0420", "`vocab_size`: 0"),
        ({"n_layer": -4}, "E0420", "`n_layer`: -4"),
        ({"n_layer": 0}, "E0420", "`n_layer`: 0"),
        ({"n_head": -1}, "E0420", "`n_head`: -1"),
        ({"n_head": 12.5}, "E0420", "`n_head`: 12.5"),
        ({"n_embd": 768.0}, "E0420", "`n_embd`: 768.0"),
        ({"n_inner": -3}, "E0420", "`n_inner`: -3"),
        ({"num_key_value_heads": -2}, "E0420", "`num_key_value_heads`: -2"),
        ({"head_dim": -8}, "E0420", "`head_dim`: -8"),
        ({"num_local_experts": -8}, "E0420", "`num_local_experts`: -8"),
    ],
)
def test_config_with_missing_or_invalid_sizes_is_rejected(
    change: dict[str, Any], code: str, words: str
) -> None:
    shape, problems = shape_from_config({**GPT2, **change}, model="g")
    assert shape is None
    assert [d.code for d in problems] == [code]
    assert words in problems[0].message + problems[0].label_text


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_unreadable_config_file_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    shape, problems = read_shape(tmp_path)
    assert shape is None
    assert [d.code for d in problems] == ["E0404"]


@pytest.mark.parametrize("family", families.EACH)
def test_shape_from_config_equals_the_loaded_shape(
    loaded: dict[str, LoadedModel], folders: dict[str, Path], family: str
) -> None:
    shape, _ = read_shape(folders[family])
    found = loaded[family].shape
    assert shape is not None
    if family == "gpt_neox_japanese":  # its last block adds a bias in its own code
        found = replace(found, partly={})
    assert shape == replace(found, config=shape.config)


def test_every_registered_family_is_in_the_tables() -> None:
    types = {row.name.partition("/")[0] for row in every()}
    rows = [row for row in every() if isinstance(row, Architecture)]
    parts = {kind for row in rows if row.takes == "image and text" for kind in parts_of(row)}
    parts |= {f"{row.name}_text_model" for row in every() if not isinstance(row, Architecture)}
    # tests/image_prompts/test_attended_images.py and test_attended_encoder.py
    parts |= {"mllama", "mllama_text_model", "mllama_vision_model"}
    parts |= {"t5_gemma_module"}  # tests/execute/test_encoder_decoder_positions.py
    assert set(FAMILIES) <= types | parts | {*(name.removesuffix("/dual") for name in duals.NAMES)}


def parts_of(row: Architecture) -> Iterator[str]:
    """Model types of a vision-language model's subconfigs."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(row.name.partition("/")[0], **row.config).to_dict()
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            yield part["model_type"]


def test_write_order_follows_the_forward_pass(loaded: dict[str, LoadedModel]) -> None:
    in_block = [name for name in SITES if SITES[name].has_layer]
    order = sorted(SITES, key=lambda name: write_order(name, 1 if name in in_block else None))
    assert order == ["embed", *in_block, "final_norm", "logits"]
    assert write_order("resid_post", 1) < write_order("resid_pre", 2)


def test_stop_layer_depends_on_the_read_site() -> None:
    assert stop_layer("embed", None, 4) == 0
    assert stop_layer("resid_pre", 2, 4) == 2
    assert stop_layer("resid_post", 2, 4) == 3
    assert stop_layer("final_norm", None, 4) == 5
    assert stop_layer("logits", None, 4) is None


def test_short_site_names_resolve_to_sites() -> None:
    found = {short: find_short_site(short) for short in ("attn", "mlp", "resid", "H", "N")}
    assert {short: kind.name for short, kind in found.items() if kind} == {
        "attn": "attn_out",
        "mlp": "mlp_out",
        "resid": "resid_post",
        "H": "z",
        "N": "mlp_hidden",
    }
    assert find_short_site("x") is None
