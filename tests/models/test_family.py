"""Adding a family that the finder can't read takes one file of under 40 lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mechdsl.loading.loader import adopt_model
from mechdsl.models.shape import FAMILIES

from ..families.build import model
from ..families.parts import Architecture, Block, Heads, Stack
from ..families.rows_llama import CONFIG
from ..families.walk import tokenizer, walk

ENTRY = Path(__file__).parent / "gizmo.py"


class GizmoConfig(LlamaConfig):
    model_type = "gizmo"
    half = 0.5


class GizmoBlock(LlamaDecoderLayer):
    """A Llama block with renamed components that adds half of attention's output."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.half = config.half
        self.mixing, self.thinking = self.self_attn, self.mlp
        del self.self_attn, self.mlp
        self.mixing.gizmo = self.mixing.o_proj
        del self.mixing.o_proj
        # LlamaAttention.forward looks up the projection as `o_proj`.
        object.__setattr__(self.mixing, "o_proj", lambda z: self.mixing.gizmo(z))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        kwargs = {k: v for k, v in kwargs.items() if k != "use_cache"}
        middle = hidden_states + self.half * self.mixing(hidden_states=normed, **kwargs)[0]
        return middle + self.thinking(self.post_attention_layernorm(middle))


class GizmoForCausalLM(LlamaForCausalLM):
    config_class = GizmoConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(
            GizmoBlock(config, layer) for layer in range(config.num_hidden_layers)
        )


AutoConfig.register("gizmo", GizmoConfig)
AutoModelForCausalLM.register(GizmoConfig, GizmoForCausalLM)

BLOCK = Block(
    attn_norm="mixing",
    q=Heads("mixing.q_proj", 4, 6),
    k=Heads("mixing.k_proj", 2, 6),
    v=Heads("mixing.v_proj", 2, 6),
    output="mixing.gizmo",
    heads=4,
    width=6,
    attn_out="mixing",
    attn_scale=0.5,
    mlp_norm="thinking",
    mlp_hidden="thinking.down_proj",
    mlp_out="thinking",
)
ROW = Architecture(
    "gizmo",
    {**CONFIG, "half": 0.5},
    Stack(
        "model.layers", 3, BLOCK, embed=("model.embed_tokens", "out"), final_norm=("lm_head", "in")
    ),
)


@pytest.fixture
def entry() -> Iterator[None]:
    name = f"{__package__}.gizmo"
    sys.modules.pop(name, None)
    importlib.import_module(name)
    yield
    FAMILIES._entries.pop("gizmo")  # type: ignore[attr-defined]


def test_unknown_family_without_entry_is_rejected() -> None:
    found, problems = adopt_model("g", model(ROW), tokenizer())
    assert found is None
    assert [d.code for d in problems] == ["E0409"]


def test_family_entry_has_fewer_than_40_lines() -> None:
    assert len(ENTRY.read_text(encoding="utf-8").splitlines()) < 40


def test_every_site_of_a_family_with_entry_equals_hooks(entry: None) -> None:
    walked = walk(ROW)
    assert not walked.refused
    assert walked.agrees
    assert not walked.whole
    assert not walked.missing
    assert not walked.extra
