"""The pages of this part's codes: the failing file gives the error as printed, the corrected none.

`--update-goldens` writes what is printed; a person reads the diff.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mechdsl.check import check_source
from mechdsl.data import TextTokenizer
from mechdsl.diagnostics import Diagnostic, e03_positions, e05_data, w07_data
from mechdsl.diagnostics.render import render_full
from mechdsl.lower import lower_program
from mechdsl.models.shape import shape_from_config
from mechdsl.resolve import ModelContext
from mechdsl.source import Source
from mechdsl.syntax.parse import parse

PAGES = Path(__file__).parents[2] / "docs" / "errors"
CODES = sorted(
    entry.code
    for module in (e03_positions, e05_data, w07_data)
    for entry in vars(module).values()
    if isinstance(entry, type) and issubclass(entry, Diagnostic) and entry is not Diagnostic
)
FENCE = re.compile(r"```(mech|text)\n(.*?)```\n", re.DOTALL)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
}


def problems(text: str, tokenizer: TextTokenizer) -> list[Diagnostic]:
    """What `check` says of a page's file; the counting model is here without its weights."""
    source = Source(text, PAGES / "FILE.mech")
    shape, _ = shape_from_config(CONFIG | {"vocab_size": tokenizer.vocab_size})
    assert shape is not None
    program, _ = lower_program(parse(source)[0], source, {})
    models = {
        name: ModelContext(model, shape, tokenizer)
        for name, model in program.models.items()
        if model.kind == "zoo"
    }
    return check_source(source, None, models).diagnostics


@pytest.mark.parametrize("code", CODES)
def test_page(code: str, words: TextTokenizer, request: pytest.FixtureRequest) -> None:
    page = PAGES / f"{code}.md"
    content = page.read_text(encoding="utf-8")
    assert content.startswith(f"# {code}: ")
    (_, bad), (_, printed), (_, good) = FENCE.findall(content)
    found = problems(bad, words)
    assert {d.code for d in found} == {code}
    rendered = render_full(found).replace(str(PAGES / "FILE.mech"), "$FILE")
    if request.config.getoption("--update-goldens", default=False):
        page.write_text(content.replace(printed, rendered), encoding="utf-8")
    else:
        assert rendered == printed
    assert [d.message for d in problems(good, words)] == []


def test_every_code_has_a_page_and_no_other_is_used() -> None:
    assert len(CODES) == len(set(CODES))
    assert all((PAGES / f"{code}.md").is_file() for code in CODES)
