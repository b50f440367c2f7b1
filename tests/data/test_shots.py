"""Few-shot prompts: whole records of another block, and corruptions that shuffle their answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.table import BlockCompiler, RowSelection, build_table
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import blocks, positions

PAIRS = [{"input": a, "output": b} for a, b in
         (("hot", "cold"), ("up", "down"), ("big", "small"), ("in", "out"), ("wet", "dry"),
          ("old", "new"), ("high", "low"))]  # fmt: skip
FILE = """
prompts pairs {
  rows "pairs.json"
  template "{input}"
}
prompts icl {
  rows "pairs.json"
  shots = list("Q: {input} A: {output}", COUNT, from: pairs, sep: "; ", distinct: true)
  template "{shots}; Q: {query = input} A:"
  answer " {output}"
  corrupt mixed { CHANGE }
}
"""


def build(
    folder: Path,
    tokenizer: TextTokenizer,
    *,
    count: int = 3,
    change: str = "shots = shuffle(shots, output)",
    pairs: list[dict[str, str]] = PAIRS,
    seed: int = 0,
) -> tuple[PromptTable | None, list[Diagnostic]]:
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    text = FILE.replace("COUNT", str(count)).replace("CHANGE", change)
    found = blocks(text, folder / "a.mech")
    return build_table(found["icl"], tokenizer, BlockCompiler(found, seed=seed), RowSelection())


def made(folder: Path, tokenizer: TextTokenizer, **options: Any) -> PromptTable:
    table, found = build(folder, tokenizer, **options)
    assert table is not None, [each.message for each in found]
    return table


def shots(text: str) -> list[tuple[str, str]]:
    """The shots of a prompt, without its question."""
    parts = [part.split(" A: ") for part in text.rpartition("; Q: ")[0].split("; ")]
    return [(question.removeprefix("Q: "), answer) for question, answer in parts]


def test_shots_are_distinct_records_without_the_question(
    tmp_path: Path, gpt2: TextTokenizer
) -> None:
    table = made(tmp_path, gpt2)
    assert len(table) == len(PAIRS)
    known = {(pair["input"], pair["output"]) for pair in PAIRS}
    every: set[tuple[tuple[str, str], ...]] = set()
    for row in table.runs["clean"].rows:
        found = shots(row.text)
        assert len(set(found)) == 3
        assert known.issuperset(found)
        assert row.values["input"] not in [question for question, _ in found]
        assert row.text.endswith(f"Q: {row.values['input']} A:")
        every.add(tuple(found))
    assert len(every) > 1
    assert every != {tuple(shots(r.text)) for r in made(tmp_path, gpt2, seed=1).runs["clean"].rows}


def test_shots_do_not_depend_on_the_order_of_records(tmp_path: Path, gpt2: TextTokenizer) -> None:
    first = {row.text for row in made(tmp_path, gpt2).runs["clean"].rows}
    assert first == {row.text for row in made(tmp_path, gpt2, pairs=PAIRS[::-1]).runs["clean"].rows}


def test_shuffled_shots_permute_the_answers(tmp_path: Path, gpt2: TextTokenizer) -> None:
    table = made(tmp_path, gpt2)
    clean, mixed = (table.runs[run].rows for run in ("clean", "mixed"))
    for before, after in zip(clean, mixed, strict=True):
        old, new = shots(before.text), shots(after.text)
        assert [question for question, _ in old] == [question for question, _ in new]
        assert Counter(answer for _, answer in old) == Counter(answer for _, answer in new)
        assert old != new
        assert after.texts["answer"] == before.texts["answer"]
        assert before.text.rpartition("; ")[2] == after.text.rpartition("; ")[2]


def test_shuffling_two_shots_swaps_answers_and_one_is_rejected(
    tmp_path: Path, gpt2: TextTokenizer
) -> None:
    for row in made(tmp_path, gpt2, count=2).runs["mixed"].rows:
        (a, x), (b, y) = shots(row.text)
        assert (a, y) in [(p["input"], p["output"]) for p in PAIRS]
        assert (b, x) in [(p["input"], p["output"]) for p in PAIRS]
    table, found = build(tmp_path, gpt2, count=1)
    assert table is None
    assert [each.code for each in found] == ["E0510"]


@pytest.mark.parametrize(
    ("position", "part"),
    [
        ("each output of shots token", 1),
        ("each input of shots token", 0),
        ("last-output of shots token", 1),
        ("output 2 token", 1),
        ("first-input of shots token", 0),
    ],
)
@pytest.mark.parametrize("run", ["clean", "mixed"])
def test_position_selects_inputs_and_outputs_of_shots(
    position: str, part: int, run: str, tmp_path: Path, gpt2: TextTokenizer
) -> None:
    table = made(tmp_path, gpt2)
    cells, found = resolve_positions(positions(position), table, run, tokenizer=gpt2)
    assert not found
    ends = {"last": [2], "firs": [0], "outp": [1]}
    which = ends.get(position[:4], [0, 1, 2])
    assert len(cells) == len(which)
    for cell, number in zip(cells, which, strict=True):
        for row, hits in zip(table.runs[run].rows, cell.hits, strict=True):
            ((token,),) = hits
            end = row.offsets[token][1]
            wanted = shots(row.text)[number][part]
            assert row.text[:end].endswith(wanted)
            assert row.text[:end].count("; ") == number


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("shots = shuffle(shots, outptu)", "E0503", "don't draw `outptu`"),
        ("shots = shuffle(output, input)", "E0515", "reassigns values within a list of texts"),
        ("shots = shuffle(shots, output, input)", "E0515", "has too many arguments"),
    ],
)
def test_invalid_shuffle_of_shots_is_rejected(
    change: str, code: str, said: str, tmp_path: Path, gpt2: TextTokenizer
) -> None:
    table, found = build(tmp_path, gpt2, change=change)
    assert table is None
    assert (found[0].code, said in found[0].message) == (code, True), found[0].message


@pytest.mark.skipif("MECHDSL_DATA" not in os.environ, reason="no published data")
@pytest.mark.parametrize("name", ["present_past", "country_capital", "antonym"])
def test_published_pairs_are_shuffled_in_shots(
    name: str, tmp_path: Path, gpt2: TextTokenizer
) -> None:
    data = json.loads((Path(os.environ["MECHDSL_DATA"]) / f"fv_{name}.json").read_bytes())[:60]
    table = made(tmp_path, gpt2, count=10, pairs=data)
    for before, after in zip(table.runs["clean"].rows, table.runs["mixed"].rows, strict=True):
        assert before.text != after.text
        own = [span for span in after.spans if span.name == "output"]
        assert len(own) == 10
        old = [span for span in before.spans if span.name == "output"]
        assert sorted(before.text[s.start : s.end] for s in old) == sorted(
            after.text[s.start : s.end] for s in own
        )
