"""`observe attention … by value_norm`: against matrices of the bare model, one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertForMaskedLM

from mechdsl.execute.observation import joint
from mechdsl.execute.run_record import ExecutionOptions

from ..execute import support
from ..images import support as images
from ..models import families
from ..shared_models import unchanged
from . import models

Array = NDArray[np.float64]

VALUES = {
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    "llama": ("model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.o_proj"),
    "bert": ("bert.encoder.layer.{}.attention.self.value",
             "bert.encoder.layer.{}.attention.output.dense"),
}  # fmt: skip
"""Modules that compute the values (of GPT-2 after queries and keys), and output projections."""


@dataclass(frozen=True)
class Flow:
    """Vectors that attention moves, one list item per layer."""

    heads: list[Array]
    """[head, query, key, d_model]"""

    def norms(self, heads: Sequence[tuple[int, int]]) -> Array:
        """[query, key], of heads (layer, head) that are joined."""
        layers = sorted({layer for layer, _ in heads})
        every = [
            np.linalg.norm(sum(self.heads[n][head] for own, head in heads if own == n), axis=-1)
            for n in layers
        ]
        return np.mean(every, 0)


@cache
def bare(name: str) -> Any:
    if name != "bert":
        return models.bare(name)
    config = BertConfig(
        vocab_size=families.VOCABULARY,
        num_hidden_layers=3,
        hidden_size=24,
        intermediate_size=28,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = BertForMaskedLM(config).eval()
    families.draw(model, 0)
    return unchanged(model)


@cache
def eager(name: str) -> Any:
    """The bare model in 64 bits with eager attention, which returns patterns."""
    module = copy.deepcopy(bare(name)).double()
    module.set_attn_implementation("eager")
    return module.eval()


@torch.no_grad()
def moved(name: str, ids: Sequence[int]) -> Flow:
    module, values = eager(name), list[torch.Tensor]()
    at = [module.get_submodule(VALUES[name][0].format(layer)) for layer in range(3)]
    hooks = [
        each.register_forward_hook(lambda _module, _given, out: values.append(out[0]))
        for each in at
    ]
    patterns = module(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    found: list[Array] = []
    for layer, (pattern, value) in enumerate(zip(patterns, values, strict=True)):
        output = module.get_submodule(VALUES[name][1].format(layer)).weight
        output = output if name == "gpt2" else output.T
        value = value.chunk(3, -1)[2] if name == "gpt2" else value
        heads: list[Array] = []
        width = len(output) // pattern.shape[1]
        shared = pattern.shape[1] * width // value.shape[-1]
        for head in range(pattern.shape[1]):
            own = value[:, head // shared * width :][:, :width]
            wide = own @ output[head * width : (head + 1) * width]
            heads.append((pattern[0, head, ..., None] * wide).numpy())
        found.append(np.stack(heads))
    return Flow(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VALUES)
def test_value_norm_of_padded_texts_equals_matrices(name: str, side: Any, tmp_path: Path) -> None:
    lines = (
        "observe attention layer * head * from last token to token * align left by value_norm as a",
        "observe attention layer * from {subject token, cue token} to item tokens "
        "by value_norm as b",
        "observe attention layers 1, 2 heads 0, 3 of turned from last token to cue token "
        "by value_norm as c",
        "observe attention L2H1 from last token, cue token to token 1, token 3 by value_norm as d",
    )
    text = support.experiment("e", "prompts p", *lines)
    options = replace(support.MODES["planned"], execution=ExecutionOptions(side=side))
    found = support.run_file(text, tmp_path, bare(name), options)
    seen = {run: support.prompts(run) for run in ("clean", "turned")}
    flows = {run: [moved(name, each.ids) for each in every] for run, every in seen.items()}
    each_head = found["e.a"].measures[0].patched
    joined, several, swept = (found[f"e.{name}"].measures[0].patched for name in "bcd")
    each_head = each_head.reshape(3, 4, -1, len(seen["clean"]))
    for row, (flow, own) in enumerate(zip(flows["clean"], seen["clean"], strict=True)):
        size = len(own.ids)
        for layer in range(3):
            for head in range(4):
                expected = flow.norms([(layer, head)])[-1]
                np.testing.assert_allclose(each_head[layer, head, :size, row], expected, atol=1e-4)
            queries = [own.subject[-1], own.cue]
            whole = flow.norms([(layer, head) for head in range(4)])
            expected = np.mean([sum(whole[q, k] for k in own.items) for q in queries])
            assert joined[layer, row] == pytest.approx(expected, abs=1e-4)
        assert np.isnan(each_head[..., size:, row]).all()
        one = flow.norms([(2, 1)])
        expected = [[one[q, k] for k in (1, 3)] for q in (size - 1, own.cue)]
        np.testing.assert_allclose(swept.reshape(2, 2, -1)[..., row], expected, atol=1e-4)
    for row, (flow, own) in enumerate(zip(flows["turned"], seen["turned"], strict=True)):
        expected = flow.norms([(layer, head) for layer in (1, 2) for head in (0, 3)])[-1, own.cue]
        assert several[0, row] == pytest.approx(expected, abs=1e-4)
    assert np.nanmax(each_head) > 0.1


def test_value_norm_of_uniform_attention_reads_the_named_run(tmp_path: Path) -> None:
    """In a run with uniform attention in every layer, layer 0 moves the mean of its values."""
    run = "run flat { set attention layers * heads * from tokens * to tokens * to uniform }"
    line = "observe attention layer 0 heads * of flat from last token to token 1 by value_norm as a"
    text = support.experiment("e", "prompts p", run, line)
    (found,) = support.run_file(text, tmp_path, bare("llama")).values()
    for row, each in enumerate(support.prompts()):
        flow = moved("llama", each.ids).heads[0][:, -1, 1]
        weights = eager_patterns("llama", each.ids)[0, 0, :, -1, 1].numpy()
        expected = np.linalg.norm((flow / weights[:, None]).sum(0)) / len(each.ids)
        assert found.measures[0].patched[0, row] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def eager_patterns(name: str, ids: Sequence[int]) -> torch.Tensor:
    """[layer, 1, head, query, key]"""
    return torch.stack(
        eager(name)(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    )


LINE = "observe attention layer * head * from last token to subject token"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{LINE} by value_norms", "E0203", "did you mean `value_norm`"),
        (f"{LINE} by rollout", "E0203", "factors are value_norm"),
        ("observe value_norm from last token to subject token", "E0207", "by value_norm"),
        ("observe value_norm z layer 1 at last token", "E0207", "by value_norm"),
        ("observe attention from last token to subject token by value_norm", "E0304", "layer *"),
        (
            f"{LINE} by value_norm\n  ablate z layer 0 at last token with zero",
            "E0207",
            "write the rules as a run",
        ),
    ],
)
def test_invalid_value_norm_suggests_the_valid_line(
    line: str, code: str, said: str, tmp_path: Path
) -> None:
    text = support.experiment("e", "prompts p", line)
    result, problems = support.try_file(text, tmp_path, bare("gpt2"))
    assert result is None
    assert [found.code for found in problems] == [code]
    assert said in problems[0].help_text


def test_value_norm_of_heads_before_a_norm_is_rejected(tmp_path: Path) -> None:
    text = support.experiment("e", "prompts p", f"{LINE} by value_norm")
    result, problems = support.try_file(text, tmp_path, models.bare("gemma2"))
    assert result is None
    (found,) = [each for each in problems if each.severity == "error"]
    assert found.code == "E0108"
    assert "post_attention_layernorm` is between the heads and the stream" in found.what


def test_value_norm_of_other_mixtures_has_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention whose heads aren't sums of weighted values, such as attention with gates."""
    monkeypatch.setattr(joint, "MIXTURE_TOLERANCE", 0.0)
    text = support.experiment("e", "prompts p", f"{LINE} by value_norm")
    _, problems = support.try_file(text, tmp_path, bare("gpt2"))
    assert any("isn't the sum of the weighted values" in each.label_text for each in problems)


def test_value_norm_of_image_patches_equals_matrices(tmp_path: Path) -> None:
    text = """experiment e {
  model m
  images scenes
  observe attention layer 1 from cls token to each token of image by value_norm as moved
}
"""
    (found,) = images.run_file(text, tmp_path, "vit").values()
    module = copy.deepcopy(images.bare("vit")).double().eval()
    module.set_attn_implementation("eager")
    modules = dict(module.named_modules())
    (block,) = (each for name, each in modules.items() if name.endswith("layers.1.attention"))
    value: list[torch.Tensor] = []
    block.v_proj.register_forward_hook(lambda _module, _given, out: value.append(out[0]))
    for row in range(3):
        value.clear()
        with torch.no_grad():
            given = images.pixels("vit", row).double()
            pattern = module(pixel_values=given, output_attentions=True).attentions[1][0]
            heads = value[0].unflatten(1, (pattern.shape[0], -1)).transpose(0, 1)
            weight = block.o_proj.weight.T.unflatten(0, (pattern.shape[0], -1))
            vectors = torch.einsum("hk,hkd,hdm->km", pattern[:, 0], heads, weight)
        expected = vectors.norm(dim=-1)[images.patches("vit")].numpy()
        np.testing.assert_allclose(found.measures[0].patched[:, row], expected, atol=1e-4)
