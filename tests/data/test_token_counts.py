"""`where tokens(answer) = 1`: rows filtered by token counts of texts and spans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.table import BlockCompiler, RowSelection, build_table
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import blocks, build, table, wrapped

SUBJECTS = ["Mary", "Vinson Massif", "Zoë", "apple pear", "Paris", "Tomás", "Zoë Zoë"]


def rows(where: str, tokenizer: TextTokenizer, template: str = "The capital of {x} is") -> set[str]:
    listed = ", ".join(f'"{s}"' for s in SUBJECTS)
    text = f'x in [{listed}] template "{template}" answer " {{x}}" where {where}'
    made = table(text, tokenizer)
    return {str(row.values["x"]) for row in made.runs["clean"].rows}


def counted(text: str, before: str, tokenizer: TextTokenizer) -> int:
    """Number of tokens that a text adds after another, without a separate space token."""
    special = sum(tokenizer.encode(before).special)
    whole = [t for t, s in zip(*_parts(before + text, tokenizer), strict=True) if not s]
    own = whole[len(tokenizer.encode(before)) - special :]
    blank = tokenizer.token_text(own[0]).strip(" ▁") == "" and len(own) > 1
    return len(own) - blank


def _parts(text: str, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    found = tokenizer.encode(text)
    return found.ids, found.special


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama", "bert"])
def test_answer_tokens_are_counted_after_the_prompt(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    prompt = "The capital of {} is"
    expected = {s: counted(f" {s}", prompt.format(s), tokenizer) for s in SUBJECTS}
    assert len(set(expected.values())) > 1
    for n in set(expected.values()):
        wanted = {s for s, count in expected.items() if count <= n}
        assert rows(f"tokens(answer) <= {n}", tokenizer) == wanted


def test_separate_space_token_of_an_answer_is_not_counted(qwen: TextTokenizer) -> None:
    """The space moves into the prompt, so the answer is one token."""
    assert len(qwen.continuation("Count", " 7")[0]) == 2
    text = 'x in ["7", "3", "12"] template "Count" answer " {x}" where tokens(answer) = 1'
    made = table(text, qwen)
    assert {row.values["x"] for row in made.runs["clean"].rows} == {"7", "3"}
    assert {len(row.texts["answer"].ids) for row in made.runs["clean"].rows} == {1}


@pytest.fixture(scope="module")
def spaced() -> TextTokenizer:
    """A tokenizer in which words after a space are one token, and several at the text's start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    words = " ".join(word for s in SUBJECTS for word in s.split())
    tokenizer.train_from_iterator([f"a {words} is"] * 3, trainer)
    return wrapped(tokenizer)


def test_span_tokens_are_counted_in_the_prompt(spaced: TextTokenizer) -> None:
    """Tokens of a word differ with and without a preceding space."""
    inside = {s: _within(f"{s} is", s, spaced) for s in SUBJECTS}
    behind = {s: counted(f" {s}", f"{s} is", spaced) for s in SUBJECTS}
    assert inside != behind
    for n in set(inside.values()):
        wanted = {s for s, count in inside.items() if count == n}
        assert rows(f"tokens(x) = {n}", spaced, "{x} is") == wanted
    wanted = {s for s, count in behind.items() if count == 2}
    assert rows('tokens(" {x}") = 2', spaced, "{x} is") == wanted


def _within(text: str, part: str, tokenizer: TextTokenizer) -> int:
    start = text.index(part)
    found = tokenizer.encode(text)
    return sum(
        a < start + len(part) and b > start and bool(text[a:b].strip())
        for (a, b), special in zip(found.offsets, found.special, strict=True)
        if not special
    )


def test_span_with_several_positions_and_counts_is_rejected(spaced: TextTokenizer) -> None:
    text = 'x in ["Mary", "Paris", "apple"] template "{x} is {x}" where tokens(x) = 1'
    made, found = build(text, spaced)
    assert made is None
    assert {d.code for d in found} == {"E0503"}
    assert "tokens at different positions of the prompt" in found[0].message
    assert len(table(text.replace('{x}"', '{y = x}"').replace("(x)", "(y)"), spaced)) == 3


def check(where: str, more: str = 'template "{x} is"') -> list[tuple[str, str]]:
    text = f"""mech 1
model toy = zoo("counting")
prompts p {{
  x in ["fig", "plum", "apple pear"]
  {more}
  answer " {{x}}"
  where {where}
}}
experiment e {{ prompts p  measure logprob(answer) as raw }}
"""
    return [(d.code, d.message) for d in check_source(Source(text)).diagnostics if has_errors([d])]


@pytest.mark.parametrize(
    ("where", "more", "code"),
    [
        ("tokens(y) = 1", 'template "{x} is"', "E0501"),
        ("tokens(x, x) = 1", 'template "{x} is"', "E0515"),
        ("tokens(x) = 1", 'template "{x} is"  n = tokens(x)', "E0515"),
        ("tokens(x) = 1", 'template "{x} is {tokens(x)}"', "E0515"),
        ("tokens(x) = 1", 'template "{x} is" corrupt c { x = "{tokens(x)}" }', "E0515"),
        ("tokens([x]) = 1", 'template "{x} is"', "E0503"),
        ("tokens(x) = 9", 'template "{x} is"', "E0509"),
    ],
)
def test_invalid_tokens_call_is_rejected(where: str, more: str, code: str) -> None:
    found = check(where, more)
    assert code in [each for each, _ in found], found


def test_missing_tokenizer_skips_token_count_errors(tmp_path: Path) -> None:
    """Token counts are unknown without it, so no error reports that all rows are dropped."""
    path = tmp_path / "a.mech"
    text = """mech 1
model far = local("nowhere")
prompts p {
  x in ["fig", "plum"]
  template "{x} is"
  answer " {x}"
  where tokens(answer) = 7
}
experiment e { prompts p  measure logprob(answer) as raw }
"""
    assert not [d for d in check_source(Source(text, path)).diagnostics if has_errors([d])]


@pytest.mark.skipif("MECHDSL_DATA" not in os.environ, reason="no published data")
def test_published_facts_are_filtered_by_token_count(tmp_path: Path, gpt2: TextTokenizer) -> None:
    facts = json.loads((Path(os.environ["MECHDSL_DATA"]) / "known_facts.json").read_bytes())[:200]
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    text = 'rows "facts.json" template "{prompt}" answer " {attribute}" where tokens(answer) <= 4'
    (block,) = blocks(f"prompts p {{ {text} }}", tmp_path / "a.mech").values()
    made, found = build_table(block, gpt2, BlockCompiler(), RowSelection())
    assert made is not None, found
    wanted = [f for f in facts if counted(f" {f['attribute']}", f["prompt"], gpt2) <= 4]
    assert 0 < len(wanted) < len(facts)
    found = [row.values["known_id"] for row in made.runs["clean"].rows]
    assert sorted(map(str, found)) == sorted(str(f["known_id"]) for f in wanted)
