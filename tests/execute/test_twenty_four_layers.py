"""The rule of the project's description, word for word, on a deep Llama with grouped queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl

from ..models import families
from .support import PROMPTS, ROWS, STATS, agree, as_in_the_data, difference, prompt

FILE = f"""mech 1
model deep = local("deep")
{PROMPTS}
experiment heads {{
  model deep
  prompts p
  from longer into clean
  patch layer 10..20 head * at last-item token
  measure logit(answer) - logit(wrong) as delta
  {STATS}
}}
"""
HEADS, D_HEAD = 4, 6


def projection(model: Any, layer: int) -> Any:
    return model.model.layers[layer].self_attn.o_proj


@torch.no_grad()
def read(model: Any, ids: list[int], layer: int, position: int) -> Tensor:
    """Every head's output before the output projection, [heads, d_head]."""
    kept: list[Tensor] = []
    handle = projection(model, layer).register_forward_pre_hook(
        lambda m, args: kept.append(args[0])
    )
    model(torch.tensor([ids]))
    handle.remove()
    return kept[0][0, position].view(HEADS, D_HEAD).clone()


@torch.no_grad()
def write(model: Any, ids: list[int], layer: int, position: int, vectors: Tensor) -> Tensor:
    """Logits of copies of the prompt, in each of which one head's output is replaced."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        for head, vector in enumerate(vectors):
            z[head, position, head * D_HEAD : (head + 1) * D_HEAD] = vector
        return (z, *args[1:])

    handle = projection(model, layer).register_forward_pre_hook(hook)
    logits = model(torch.tensor([ids] * HEADS)).logits
    handle.remove()
    return logits


@pytest.mark.slow
def test_patch_sweep_on_24_layers_equals_a_loop_of_hooks(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    families.build("llama", folder / "deep", num_hidden_layers=24)
    (folder / "file.mech").write_text(FILE, encoding="utf-8")
    found = as_in_the_data(mechdsl.run(folder / "file.mech")["heads"])
    assert found.axes == ("layer", "head")
    assert [tuple(c.coords.values()) for c in found.cells] == [
        (layer, head) for layer in range(10, 21) for head in range(HEADS)
    ]

    model = AutoModelForCausalLM.from_pretrained(folder / "deep").eval()
    assert model.config.num_key_value_heads == 2
    expected = np.zeros((11 * HEADS, len(ROWS)))
    base = np.zeros(len(ROWS))
    for n, record in enumerate(ROWS):
        clean, source = prompt(record), prompt(record, "longer")
        with torch.no_grad():
            base[n] = difference(model(torch.tensor([clean.ids])).logits[0], record)
        for number, layer in enumerate(range(10, 21)):
            vectors = read(model, source.ids, layer, source.items[-1])
            every = write(model, clean.ids, layer, clean.items[-1], vectors)
            for head, logits in enumerate(every):
                expected[number * HEADS + head, n] = difference(logits, record)
    agree(found.measures[0], expected, base, large=0.02)
