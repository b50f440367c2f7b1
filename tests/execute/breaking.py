"""The counting model with a mistake in its `forward`: it raises on two figs in a row."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic

from ..one_by_one import as_shipped
from ..run_source import run_source
from .nan import ZOO

SAID = "no rows with two figs"
BLOCK = """
prompts {name} {{
  n in 2..5
  item in {items}
  fruits = list(item, n, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{n}}"
}}
"""
HEAD = (
    'mech 1\n\nmodel toy = zoo("counting")\n'
    + BLOCK.format(name="pears", items='["pear", "plum"]')
    + BLOCK.format(name="figs", items='["fig"]')
)


@cache
def breaking() -> tuple[Any, Any]:
    """A model and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(ZOO).eval()
    tokenizer = AutoTokenizer.from_pretrained(ZOO)
    (fig,) = tokenizer(" fig", add_special_tokens=False).input_ids
    forward = model.forward

    @wraps(forward)
    def failing(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        here = input_ids == fig
        if bool((here[:, 1:] & here[:, :-1]).any()):
            raise ValueError(SAID)
        return forward(input_ids, *args, **kwargs)

    model.forward = failing
    return model, tokenizer


def experiment(name: str, prompts: str, *lines: str) -> str:
    every = (f"prompts {prompts}", "ablate z layer 1 head * at last token with zero", *lines)
    measured = (*every, "measure logit(answer) as delta")
    return f"\nexperiment {name} {{\n" + "".join(f"  {line}\n" for line in measured) + "}\n"


TWO = HEAD + experiment("first", "figs") + experiment("second", "pears")


def broke_off() -> tuple[None, list[Diagnostic]]:
    """E0650, for its page."""
    with as_shipped():
        return None, run_source(Source(TWO), models={"toy": breaking()})[1]
