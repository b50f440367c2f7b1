"""The multiply-adds of MLPs with experts that `plan` counts, against those of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechdsl.loading.loader import adopt_model
from mechdsl.planner.pass_cost import BlockCost

from ..operations import OperationCounter
from ..quick import some
from .__main__ import prepare
from .build import ids, model
from .parts import Architecture
from .test_walk import ROWS
from .walk import tokenizer

UNUSED = {
    "minimax_m2": ("moe_intermediate_size",),
    "olmoe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("shared_expert_intermediate_size",),
    "minimax_m3_vl_text": ("moe_intermediate_size",),
}
"""Keys of the tables that a model doesn't read."""
OTHER = {
    "dbrx": "the library's counter fails",
    "granitemoehybrid": "two modules give the output",
    "granitemoeshared": "two modules give the output",
    "longcat_flash": "a block has two MLPs",
    "nemotron_h": "a block has attention or an MLP",
    "zaya": "the router is an MLP",
}


def list_names() -> list[str]:
    """Architectures of texts with experts, without variants."""
    found = {name for name, row in ROWS.items() if has_experts(row)}
    return sorted({*found, "llama4_text"} - OTHER.keys())


def has_experts(row: Any) -> bool:
    if not isinstance(row, Architecture) or "/" in row.name or row.takes != "text":
        return False
    return any(each.n_experts for each in (row.main.block, *row.main.other.values()))


@pytest.mark.parametrize(
    "name", some(list_names(), ("mixtral", "deepseek_v3", "llama4_text", "hunyuan_v1_moe"))
)
def test_planned_multiply_adds_of_experts_equal_those_of_a_pass(name: str) -> None:
    """Routers, experts of each token and shared experts; gates of one number aren't counted."""
    prepare()
    row = ROWS[name]
    assert isinstance(row, Architecture)
    config = {key: own for key, own in row.config.items() if key not in UNUSED.get(name, ())}
    loaded, found = adopt_model("m", model(row.but(name, config=config)), tokenizer())
    assert loaded is not None, found
    counter, done = OperationCounter(), list[int]()

    def count(module: Any) -> None:
        first = list[int]()
        module.register_forward_pre_hook(lambda *_: first.append(counter.get_total_flops()))
        module.register_forward_hook(
            lambda *_: done.append(counter.get_total_flops() - first.pop())
        )

    for block in loaded.anatomy.blocks:
        (path,) = block.mlp
        count(loaded.module.get_submodule(path))
    prompt = torch.tensor(ids(1, 8, 0))
    with torch.no_grad(), counter:
        loaded.module(input_ids=prompt)
    shape = loaded.shape
    planned = BlockCost.of(shape).mlp * shape.n_layers * prompt.shape[1]
    assert planned == pytest.approx(sum(done) / 2, rel=0.01)
