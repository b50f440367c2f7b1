"""Experiments on chats, against plain hooks on the turns as tokenized by transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mechdsl
from tests.data import chats

VALUES = ("plum", "apple pie", "fig", "kiwi")
FILE = """mech 1
model toy = local("nowhere")
prompts p {
  x in ["plum", "apple pie", "fig", "kiwi"]
  chat { user "How many {x} is in Paris?" assistant "There" user " of {x}" assistant "is" }
  answer " {x}"
  corrupt shop { replace x 1 of user tokens with "shop" }
}
experiment patched {
  model toy
  prompts p
  from shop into clean
  patch resid_post layer 0 at last-user token
  measure logprob(answer) as raw
}
"""


def turns(first: str, x: str, behind: str = "") -> list[tuple[str, str]]:
    return [
        ("user", f"How many {first} is in Paris?"),
        ("assistant", "There"),
        ("user", f" of {x}"),
        ("assistant", f"is{behind}"),
    ]


def expected(shape: str, module: Any, x: str) -> float:
    """The answer's log-probability, with the corrupted vector at the last turn of the user."""
    library: Any = chats.library(shape)

    def place(first: str) -> int:
        """The token of the last character of what the user says last."""
        text, ids = chats.by_library(shape, turns(first, x))
        encoded = library(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded["input_ids"] == ids
        end = text.rindex(f"of {x}") + len(f"of {x}")
        (found,) = (n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < end <= b)
        return found

    layer, kept = module.model.layers[0], list[Tensor]()
    clean, whole = (chats.by_library(shape, turns(x, x, b))[1] for b in ("", f" {x}"))

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[..., place("shop"), :])

    def write(_module: Any, _inputs: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output)[..., place(x), :] = kept[0]

    with torch.no_grad():
        handle = layer.register_forward_hook(look)
        module(torch.tensor([chats.by_library(shape, turns("shop", x))[1]]))
        handle.remove()
        handle = layer.register_forward_hook(write)
        logits = module(torch.tensor([whole])).logits[0].log_softmax(-1)
        handle.remove()
    return float(sum(logits[n - 1, whole[n]] for n in range(len(clean), len(whole))))


@pytest.mark.parametrize("shape", chats.SHAPES)
def test_patched_chat_equals_plain_hooks(shape: str) -> None:
    torch.manual_seed(1)
    library = chats.library(shape)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(library),
        initializer_range=0.4,
    )
    module: Any = LlamaForCausalLM(config).eval()
    (found,) = mechdsl.run(FILE, {"toy": (module, library)})["patched"].records()
    wanted = [expected(shape, module, x) for x in VALUES]
    assert found["mean"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    assert found["mean"] != pytest.approx(found["base_mean"], abs=1e-3)
