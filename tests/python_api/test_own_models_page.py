"""docs/own-models.md: its code runs in order, and each table equals plain hooks on the bare
model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.models.shape import FAMILIES

from ..markdown import fences
from ..quick import some

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-models.md"
KINDS = {
    "4. Run the experiment": True,
    "Use an attention-only model": True,
    "Use a bidirectional model": True,
    "Use a model without norms": True,
    "Keep custom attention code": False,
}
"""Heading → whether attention is observed."""
ELSEWHERE = ("Use a classifier", "Use a LoRA adapter", "Build a model in a function")
"""Sections with separate tests: `test_own_models_classifier.py`, `test_adapter_page.py`."""
VARIANTS = ("Use an attention-only model", "Use a bidirectional model", "Use a model without norms")
"""Sections that train another model; the others cover all types of code blocks."""
WORDS = ["[MASK]", "|", *"abcdefgh"]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory on the import path; its modules are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    entries = dict(vars(FAMILIES)["_entries"])
    monkeypatch.setattr(FAMILIES, "_entries", entries)  # for what the page registers
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("left_out", some([VARIANTS, ()], [VARIANTS]), ids=["in part", "whole"])
def test_own_models_page_code_runs_and_equals_hooks(
    left_out: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    names: dict[str, Any] = {}
    printed = ""
    for fence in fences(PAGE.read_text(encoding="utf-8")):
        if fence.heading in (*ELSEWHERE, *left_out):
            continue
        if fence.file is not None:
            Path(fence.file).write_text(fence.content, encoding="utf-8")
            continue
        if fence.language == "text":  # weights differ a little from machine to machine
            assert words(fence.content) in words(printed)
            continue
        names = {}
        exec(compile(fence.content, fence.heading, "exec"), names)
        if "results" in names:
            ran.append(fence.heading)
            results, model = names["results"], names["model"]
            agrees(results["heads"], model)
            assert ("looks" in [each.name for each in results]) == KINDS[fence.heading]
            printed = capsys.readouterr().out
            assert "heads: recovery of" in printed
            codes = [each.code for each in results.diagnostics]
            assert codes == ([] if KINDS[fence.heading] else ["W0711"])
    import_module("family")
    assert FAMILIES.get("toy") is not None
    model, tokenizer = names["model"], names["tokenizer"]
    results = mechdsl.run("mirror.mech", models={"toy": (model, tokenizer)}, only="heads")
    agrees(results["heads"], model)
    assert ran == [heading for heading in KINDS if heading not in left_out]


def words(text: str) -> str:
    """A text without its numbers."""
    return " ".join(re.sub(r"-?\d+\.\d+", "0", text).split())


def agrees(result: Any, model: Any) -> None:
    """Compare the recovery of every head with hooks, over all rows."""
    found = {(r["layer"], r["head"]): r["mean"] for r in result.records()}
    assert set(found) == set(product(range(2), range(2)))
    for (layer, head), mean in found.items():
        patched, base, source = scores(model, layer, head)
        np.testing.assert_allclose(mean, (patched - base) / (source - base), atol=1e-4)


@torch.no_grad()
def scores(model: Any, layer: int, head: int) -> tuple[float, float, float]:
    """Means over the prompts of logit(a) - logit(other): with a head's clean output patched at the
    last token, in the base run, and in the clean run."""
    hidden = [] if model.config.is_causal else ["[MASK]"]
    rows = list(product("abcd", "ef", "gh"))
    right = [a for a, *_ in rows]
    wrong = ["b" if a == "a" else "a" for a in right]
    clean, changed = (
        ids(
            [first, b, c, "|", c, b, *hidden] for first, (_, b, c) in zip(firsts, rows, strict=True)
        )
        for firsts in (right, wrong)
    )
    kept: list[Tensor] = []
    part = model.blocks[layer].attn.o
    place = slice(head * 16, head * 16 + 16)

    def write(module: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        z = given[0].clone()
        z[:, -1, place] = kept[0]
        return (z,)

    def score(prompts: Tensor) -> float:
        logits = model(prompts).logits[:, -1]
        apart = logits.gather(1, ids(right)) - logits.gather(1, ids(wrong))
        return float(apart.mean())

    hook = part.register_forward_pre_hook(lambda module, given: kept.append(given[0][:, -1, place]))
    source = score(clean)
    hook.remove()
    base = score(changed)
    hook = part.register_forward_pre_hook(write)
    patched = score(changed)
    hook.remove()
    return patched, base, source


def ids(rows: Iterable[Iterable[str]]) -> Tensor:
    return torch.tensor([[WORDS.index(word) for word in row] for row in rows])
