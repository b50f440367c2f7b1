"""Columns with the name of a line: `answer "{answer}"` reads the column `answer`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.rendering import render_full

RECORDS = [
    {"prompt": "Part 1: apple fig Count 1:", "other": "Part 1: fig fig fig Count 1:"}
    | {"answer": " 2", "wrong": " 3"},
    {"prompt": "Part 1: fig plum fig Count 1:", "other": "Part 1: pear fig Count 1:"}
    | {"answer": " 3", "wrong": " 2"},
]
NAMES = {"answer": "right", "wrong": "rival"}
LINES = {
    "text": ('answer "{answer}"', 'wrong "{wrong}"', "corrupt abc { prompt = other }"),
    "name": ("answer answer", "wrong wrong", "corrupt abc { prompt = other }"),
    "changed": (
        'answer "{answer}"',
        'wrong "{wrong}"',
        "corrupt abc { prompt = other  answer = wrong }",
    ),
}


def write(folder: Path, lines: tuple[str, ...], names: dict[str, str], option: str = "") -> Path:
    records = [{names.get(key, key): value for key, value in record.items()} for record in RECORDS]
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    body = "\n".join(lines)
    for old, new in names.items():  # columns only: the first word of a line stays
        body = body.replace(f"{{{old}", f"{{{new}").replace(f"{old} = ", f"{new} = ")
        body = body.replace(f"= {old}", f"= {new}").replace(f" {old}\n", f" {new}\n")
        body = body.replace(f" {old} ", f" {new} ").replace(f"{{{old}}}", f"{{{new}}}")
    path = folder / "file.mech"
    path.write_text(
        f'mech 1\nmodel toy = zoo("counting")\nprompts p {{\n  rows "data.jsonl"{option}\n'
        f'  template "{{prompt}}"\n{body}\n}}\nexperiment e {{\n  prompts p\n'
        "  from abc into clean\n  patch resid_post layer 3 at last token\n"
        "  measure logit(answer) - logit(wrong) as delta\n"
        "  measure logit(answer of abc) - logit(wrong of abc) as delta\n}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize("kind", list(LINES))
def test_column_with_the_name_of_a_line_equals_a_column_with_another_name(
    kind: str, tmp_path: Path
) -> None:
    (one,), (two,) = (
        mechdsl.run(write(tmp_path / str(n), LINES[kind], names), store=False).files[0].experiments
        for n, names in enumerate(({}, NAMES))
    )
    assert np.abs(one.measures[0].patched).max() > 1
    for mine, renamed in zip(one.measures, two.measures, strict=True):
        np.testing.assert_array_equal(mine.patched, renamed.patched)
        np.testing.assert_array_equal(mine.base, renamed.base)


def test_text_without_a_column_of_its_name_is_a_cycle(tmp_path: Path) -> None:
    path = write(tmp_path, ('answer "{answer}"', 'wrong "{wrong}"', LINES["text"][2]), {})
    text = path.read_text("utf-8").replace('rows "data.jsonl"', 'prompt in ["Count 1:"]')
    text = text.replace("prompt = other", 'prompt = "Count 2:"')
    found = check_source(Source(text, path)).diagnostics
    assert "`answer` → `answer`" in render_full(found, color=False, width=100)


def test_column_used_as_a_text_proposes_the_line_that_defines_it(tmp_path: Path) -> None:
    path = write(tmp_path, (LINES["text"][2],), {})
    found = check_source(Source(path.read_text("utf-8"), path)).diagnostics
    helps = [each.help_text for each in found if each.code == "E0503"]
    assert helps[0] == 'add the line `answer "{answer}"` to `prompts p`'
    fixed = write(tmp_path, (*LINES["text"][:2], LINES["text"][2]), {})
    assert not [
        each
        for each in check_source(Source(fixed.read_text("utf-8"), fixed)).diagnostics
        if each.severity == "error"
    ]
