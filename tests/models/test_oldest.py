"""Architectures on the oldest transformers that `pyproject.toml` allows (`make test-oldest`).

The tables of `tests/families` describe the version in `constraints.txt`, which tests every row.
Another version may lack an architecture or name its modules differently; its row is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import transformers
from torch import nn

from ..families import build, tables
from ..families.parts import Architecture, Heads, Stack
from ..families.walk import walk

ROOT = Path(__file__).parents[2]
HERE = transformers.__version__
PINNED = re.findall(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
NAMES = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text",
    "gpt_neox", "gpt_neo", "gptj", "bloom", "opt", "mpt", "falcon", "phi", "phi3", "olmo2",
    "cohere2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba", "bert", "roberta",
    "distilbert", "bart", "t5", "vit", "llava",
)  # fmt: skip
ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}

pytestmark = pytest.mark.skipif(HERE in PINNED, reason="tests/families has all of them")


@cache
def missing(name: str) -> str:
    """Why this version doesn't match a row; empty if it does."""
    row = ROWS[name]
    try:
        module = build.model(row)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        return f"transformers {HERE} has no {name}"
    for stack in (row.main, *row.others.values()):
        for path in paths(stack):
            if not there(module, path):
                return f"{name} has no `{path}` in transformers {HERE}"
    return ""


def paths(stack: Stack) -> Iterator[str]:
    """Paths of all modules that a table names."""
    yield from (tap[0] for tap in (stack.embed, stack.final_norm) if tap is not None)
    for layer in range(stack.count):
        block = stack.at(layer)
        root = f"{stack.blocks}.{layer}"
        yield root
        for value in (getattr(block, field.name) for field in fields(block)):
            own = value.path if isinstance(value, Heads) else value
            if isinstance(own, str) and own not in ("", "sum", "none"):
                yield f"{root}.{own}"


def there(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_site_on_this_transformers_version_equals_hooks(name: str) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    found = walk(ROWS[name])
    if "depend on padding" in found.refused:  # E0407: this version's encoder-decoder isn't read
        pytest.skip(found.refused)
    assert found.refused == ""
    assert found.wrong() == []


def test_three_quarters_of_the_architectures_are_available() -> None:
    assert sum(not missing(name) for name in NAMES) >= len(NAMES) * 3 / 4
