"""Moved tokens, noise and `where` of other prompts blocks, in tables and against references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors

from ..execute.support import (
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    Prompt,
    bare,
    difference,
    experiment,
    prompts,
    write_rows,
)
from ..reference.forward import Write, forward
from ..reference.noise import keyed_by_number, noise
from ..reference.points import Point, copied
from .support import BLANK, OTHERS, models, patched, q, run, unpatched

MOVED = PROMPTS.replace('answer " {a}"', 'answer " w19 {a}"').replace(
    'wrong " {b}"', 'wrong " w19 {b}"'
)


def with_word(of: Prompt) -> Prompt:
    return Prompt((*of.words, "w19"), of.items, of.subject, of.cue)


@pytest.mark.parametrize("base", ["clean", "blank"])
def test_moved_token_of_answers_ends_prompts_of_all_blocks(folder: Path, base: str) -> None:
    """All answers begin with `w19`, so it also ends prompts of blocks without answers."""
    source = "q" if base == "clean" else "clean"
    text = experiment(
        "e", "prompts p", f"from {source} into {base}", "patch z layer 1 heads * at last token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("llama"), prompts=MOVED + OTHERS)["e"]
    for n, record in enumerate(ROWS):
        own, other = with_word(prompts()[n]), with_word(q(record) if base == "clean" else BLANK)
        of, to = (other, own) if base == "clean" else (own, other)
        seen = unpatched("llama", of)[1]
        edits = copied([Point("z", 1)], seen, (of.last,), (to.last,))
        value = difference(patched("llama", to, edits), record)
        assert abs(found.measures[0].patched[0, n] - value) < 1e-4


NOISED = """
prompts n {
  rows "data.jsonl"
  template "w7 {cue2} w8 {subject}"
  corrupt noisy { add gaussian(std: 0.7, samples: 3) to embed at subject tokens }
}
prompts one {
  subject = "w3 w2"
  template "w6 {subject} w1"
  corrupt noisy { add gaussian(std: 0.7, samples: 3) to embed at subject tokens }
}
"""


@pytest.mark.parametrize("block", ["n", "one"])
@pytest.mark.parametrize("mode", MODES)
def test_noise_of_another_block_is_seeded_by_its_row(
    folder: Path, block: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed_by_number(monkeypatch)
    text = experiment(
        "e", "prompts p", f"from {block}.noisy into clean",
        "patch resid_post layer * at last token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2"), MODES[mode], prompts=PROMPTS + NOISED)["e"]
    assert found.conventions[f"noise of {block}.noisy"] == "gaussian, std 0.7, 3 draws"
    for n, record in enumerate(ROWS):
        subject = record["subject"].split() if block == "n" else ["w3", "w2"]
        words = ("w7", record["cue2"], "w8", *subject) if block == "n" else ("w6", *subject, "w1")
        first = 4 if block == "n" else 2
        of, to = Prompt(words, (), tuple(range(first, first + len(subject))), 0), prompts()[n]
        clean = unpatched("gpt2", of)[1]["embed", None]
        values = []
        for draw in range(3):
            row = n if block == "n" else 0
            writes = [
                Write("embed", None, clean[at, 0] + 0.7 * noise(row, draw, at, clean.shape[-1]), at)
                for at in of.subject
            ]
            seen = forward("gpt2", bare("gpt2"), of.ids, writes).seen
            edits = copied([Point("resid_post", 1)], seen, (of.last,), (to.last,))
            values.append(difference(patched("gpt2", to, edits), record))
        assert abs(found.measures[0].patched[1, n] - np.mean(values)) < 1e-4


def check(blocks: str, lines: tuple[str, ...], folder: Path):
    write_rows(folder)
    body = "\n".join(lines)
    text = f'mech 1\nmodel m = zoo("counting")\n{blocks}\nexperiment e {{\n{body}\n}}\n'
    return check_source(Source(text, folder / "file.mech"))


COUNTED = """
prompts fruit {
  count in 2..9
  item in ["apple", "pear"]
  template "Part {count}: {item} Count 1:"
  answer " {count}"
  where count > 3
}
"""
LINES = ("patch z layer 0 head 0 at last token", "measure logit(answer) as delta")


def test_blocks_with_equal_where_pair_equal_values(folder: Path) -> None:
    other = COUNTED.replace("fruit", "listed").replace("Part {count}", "Count {count}")
    found = check(
        COUNTED + other, ("prompts fruit limit 7", "from listed into clean", *LINES), folder
    )
    assert not has_errors(found.diagnostics)
    table = found.experiments[0].table
    for own, there in zip(table.runs["clean"].rows, table.runs["listed"].rows, strict=True):
        assert (own.values["count"], own.values["item"]) == (
            there.values["count"],
            there.values["item"],
        )


def test_block_with_one_remaining_row_is_paired_with_all_rows(folder: Path) -> None:
    other = COUNTED.replace("fruit", "listed").replace("count > 3", 'count = 4 and item = "pear"')
    other = other.replace("2..9", "2..5")
    found = check(
        COUNTED + other, ("prompts fruit limit 7", "from listed into clean", *LINES), folder
    )
    assert not has_errors(found.diagnostics)
    rows = found.experiments[0].table.runs["listed"].rows
    assert {row.text for row in rows} == {"Part 4: pear Count 1:"}
    assert len(rows) == 7


def test_unsampled_rows_of_another_block_are_not_built(folder: Path) -> None:
    """An invalid row of the other block is an error only if it is paired."""
    own = COUNTED.replace("where count > 3", "")
    other = own.replace("fruit", "listed")
    lines = ("prompts fruit limit 3", "from listed into clean", *LINES)
    table = check(own + other, lines, folder).experiments[0].table
    read = {row.values["count"] for row in table.runs["clean"].rows}
    for count in (min(read), min({*range(2, 10)} - read)):
        wrong = other.replace("Part {count}", f"Part {{6 / ({count} - count)}}")
        found = check(own + wrong, lines, folder).diagnostics
        codes = [d.code for d in found if d.severity == "error"]
        assert codes == (["E0503"] if count in read else [])


def test_answer_of_another_block_is_that_of_the_paired_row(folder: Path) -> None:
    """Covers `answer of listed` in a measure and `accuracy(listed)`."""
    other = COUNTED.replace("fruit", "listed").replace('" {count}"', '" {count - 1}"')
    lines = ("prompts fruit limit 5", "from listed into clean", LINES[0],
             "measure logit(answer) - logit(answer of listed) as delta",
             "expect accuracy(listed) >= 0")  # fmt: skip
    found = check(COUNTED + other, lines, folder)
    assert not has_errors(found.diagnostics), [d.message for d in found.diagnostics]
    atoms = found.experiments[0].measures[0].atoms
    tokenizer = found.experiments[0].model.tokenizer
    own, there = ([tokenizer.token_text(t[0]) for t in atom.texts[None]] for atom in atoms)
    assert [int(a) - 1 for a in own] == [int(b) for b in there]


def test_split_of_the_sampled_block_selects_the_pairs(folder: Path) -> None:
    sampled = COUNTED.replace("where count > 3", "split 50%")
    other = COUNTED.replace("fruit", "listed").replace("where count > 3", "")
    lines = ("prompts fruit.test limit 5", "from listed into clean", *LINES)
    found = check(sampled + other, lines, folder)
    assert not has_errors(found.diagnostics)
    table = found.experiments[0].table
    assert [r.values["count"] for r in table.runs["clean"].rows] == [
        r.values["count"] for r in table.runs["listed"].rows
    ]
