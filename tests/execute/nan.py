"""The counting model with a fruit whose embedding is NaN, and prompts of which some name it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult

from ..run_source import run_source
from ..shared_models import unchanged

ZOO = Path(__file__).parent.parent.parent / "mechdsl" / "zoo" / "counting"
BLOCK = """
prompts pairs {
  item in ["apple", "fig", "pear", "plum"]
  other in ["apple", "plum"]
  template "Part 1: {item} {other} Count 1:"
  answer " 2"
}
"""
WITHOUT = BLOCK.replace("pairs", "others").replace("  answer", '  where item != "fig"\n  answer')
HEAD = f'mech 1\n\nmodel toy = zoo("counting")\n{BLOCK}{WITHOUT}'
ROWS = 8
WITH_FIG = 2


@cache
def broken() -> tuple[Any, Any]:
    """A model and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(ZOO).eval()
    tokenizer = AutoTokenizer.from_pretrained(ZOO)
    (fig,) = tokenizer(" fig", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[fig] = torch.nan
    return unchanged(model), tokenizer


def experiment(name: str, *lines: str, prompts: str = "pairs") -> str:
    body = "".join(f"  {line}\n" for line in (f"prompts {prompts}", *lines))
    return f"\nexperiment {name} {{\n{body}}}\n"


def run(
    text: str, *, allow_nan: bool = False, whole: bool = False
) -> tuple[FileResult | None, list[Diagnostic]]:
    """whole: on the model as it was published."""
    options = RunOptions(execution=ExecutionOptions(allow_nan=allow_nan))
    return run_source(Source(HEAD + text), options, {} if whole else {"toy": broken()})


def left_out() -> tuple[None, list[Diagnostic]]:
    """W0750, for its page."""
    text = experiment("heads", "ablate layer * head * at last token with mean", MEASURE)
    return None, run(text, allow_nan=True)[1]


MEASURE = "measure logit(answer) as delta"
