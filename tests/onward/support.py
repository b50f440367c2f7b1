"""Run files on the counting model and read their results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES
from mechdsl.results.experiment_result import ExperimentResult

from .. import fruit
from ..run_source import run_source

HERE = Path(__file__).parent
ZOO = HERE.parent.parent / "mechdsl" / "zoo" / "counting"
PLAIN = frozenset(PASS_NAMES)
MODES = {"planned": frozenset[str](), "plain": PLAIN}
HEAD = fruit.head("split 50%", fruit.FEWER)
Array = NDArray[np.float64]


def experiment(name: str, *lines: str, prompts: str = "fruit.test limit 8") -> str:
    body = "".join(f"  {line}\n" for line in (f"prompts {prompts}", *lines))
    return f"\nexperiment {name} {{\n{body}}}\n"


def checked(text: str, *, head: str = HEAD) -> CheckedFile:
    return check_source(Source(head + text))


def run(
    text: str,
    *,
    head: str = HEAD,
    only: Sequence[str] = (),
    without: frozenset[str] = frozenset(),
) -> dict[str, ExperimentResult]:
    """Experiment → result, in file order."""
    options = RunOptions(settings=CheckSettings(only=tuple(only)), without=without)
    result, found = run_source(Source(head + text), options)
    assert not has_errors(found), render_full(found)
    assert result is not None
    return {each.name: each for each in result.experiments}


def patched(result: ExperimentResult, measure: int = 0) -> Array:
    """[cell, row]."""
    return result.measures[measure].patched


def best_sites(result: ExperimentResult, count: int) -> list[str]:
    """Short names of the sites with the largest mean in the records."""
    records = sorted(result.records(), key=lambda record: -record["mean"])
    return [record["site"].removesuffix(".z") for record in records[:count]]


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ZOO).eval()


def without_tokens(ids: Sequence[int], tokens: Sequence[int], answer: int) -> tuple[float, float]:
    """(logit, probability) of the answer with the embeddings of some tokens set to zero."""
    net = model()
    with torch.no_grad():
        embedded = net.get_input_embeddings()(torch.tensor([list(ids)])).clone()
        embedded[0, list(tokens)] = 0
        logits = net(inputs_embeds=embedded).logits[0, -1]
    return float(logits[answer]), float(logits.softmax(-1)[answer])
