"""A tokenizer with tokens that the model doesn't have is rejected before the run."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from mechdsl.pipeline.api import validate

from ..fruit import head

ZOO = Path(str(files("mechdsl") / "zoo" / "counting"))


def said(folder: Path, size: int, measure: str, first: str = "Part", *extra: str) -> list[str]:
    """Return diagnostics of a model with `size` tokens and a tokenizer with added tokens."""
    toy = folder / "toy"
    toy.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, toy / name)
    config = json.loads((ZOO / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    if extra:
        tokenizer = json.loads((toy / "tokenizer.json").read_text())
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        tokenizer["added_tokens"] += [
            {"id": 69 + n, "content": word, "special": False, **flags}
            for n, word in enumerate(extra)
        ]
        (toy / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = head().replace("Part", first).replace('zoo("counting")', 'local("toy")')
    lines = f"prompts fruit limit 20\n  measure {measure} as raw"
    file = folder / "case.mech"
    file.write_text(f"{text}\nexperiment e {{\n  {lines}\n}}\n")
    return [f"{d.code} {d.message}" for d in validate(file)]


def test_model_with_all_tokens_is_accepted(tmp_path: Path) -> None:
    assert said(tmp_path, 69, "prob(answer)") == []


@pytest.mark.parametrize("size", [1, 10, 68])
def test_model_with_fewer_tokens_than_its_tokenizer_is_rejected(tmp_path: Path, size: int) -> None:
    tokens = "1 token" if size == 1 else f"{size} tokens"
    message = f"E0421 `toy` has {tokens}, and its tokenizer has 69"
    assert said(tmp_path, size, "prob(answer)") == [message]


@pytest.mark.parametrize(
    ("first", "measure", "where"),
    [
        ("Part", "prob(answer)", None),
        ("gizmo", "prob(answer)", "prompts `fruit`"),
        ("Part", 'prob(" gizmo")', "a measure"),
    ],
)
def test_added_token_is_rejected_only_if_used(
    tmp_path: Path, first: str, measure: str, where: str | None
) -> None:
    token = "token 69 (`gizmo`)"
    message = f"E0421 `toy` has 69 tokens, and its tokenizer uses {token} in {where}"
    found = said(tmp_path, 69, measure, first, "gizmo")
    assert found == ([] if where is None else [message])
