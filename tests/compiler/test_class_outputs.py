"""Texts name an output of a classifier by its label or its number."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.show.prompts import print_prompts

from ..markdown import fences
from ..messages.cases import HERE

STARS = "1 star", "2 stars", "3 stars"
NUMBERED = "LABEL_0", "LABEL_1", "LABEL_2"


def checked(folder: Path, labels: tuple[str, ...], answer: str, wanted: str) -> CheckedFile:
    """Check a file on a classifier with these labels, the model of the message cases."""
    page = (HERE / "classifiers.md").read_text(encoding="utf-8")
    files = {fence.file: fence.content for fence in fences(page) if fence.file}
    for name in ("config.json", "tokenizer.json"):
        content = files[f"moods/{name}"]
        if name == "config.json":
            named = {str(n): label for n, label in enumerate(labels)}
            content = json.dumps({**json.loads(content), "id2label": named})
        (folder / name).write_text(content, encoding="utf-8")
    text = (
        'mech 1\nmodel m = local(".")\n'
        'prompts p {\n  stars in 1..2\n  thing in ["film", "book"]\n'
        '  template "the {thing} was fine"\n'
        f"  answer {answer}\n}}\n"
        "experiment e {\n  prompts p\n  ablate embed at thing token with zero\n"
        f"  measure logit(class {wanted}) as raw\n}}\n"
    )
    path = folder / "file.mech"
    path.write_text(text, encoding="utf-8")
    return check_source(Source(text, path))


def outputs(found: CheckedFile) -> list[int]:
    """Return the distinct outputs that rows read."""
    (experiment,) = found.experiments
    (measure,) = experiment.measures
    texts = measure.atoms[0].texts[None]
    return sorted({ids[0] for ids in texts})


@pytest.mark.parametrize(
    ("labels", "answer", "wanted", "numbers"),
    [
        (STARS, '"1 star"', "answer", [0]),
        (STARS, '"  2 stars "', "answer", [1]),
        ((" 1 star ", "2 stars", "3 stars"), '"1 star"', "answer", [0]),
        (STARS, '"1 star"', "2", [2]),
        (STARS, "token_id(stars)", "answer", [1, 2]),
        (("5", "3", "1"), '"{stars}" ', '"1"', [2]),
        (("0", "1", "2"), '"{stars}"', "answer", [1, 2]),
        (NUMBERED, '"{stars}"', "answer", [1, 2]),
        (NUMBERED, '"LABEL_{stars}"', "answer", [1, 2]),
        (NUMBERED, '"x"', '"1"', [1]),
    ],
)
def test_class_output_is_found_by_label_or_number(
    labels: tuple[str, ...], answer: str, wanted: str, numbers: list[int], tmp_path: Path
) -> None:
    found = checked(tmp_path, labels, answer, wanted)
    assert not found.diagnostics
    assert outputs(found) == numbers


@pytest.mark.parametrize(
    ("labels", "answer", "wanted"),
    [
        (STARS, '"{stars}"', "answer"),
        (STARS, '"1 star"', '"1"'),
        (("5", "3", "2"), '"{stars}"', "answer"),
        (NUMBERED, '"x"', '"3"'),
        (STARS, '"1 star"', "3"),
    ],
)
def test_text_or_number_without_an_output_is_rejected(
    labels: tuple[str, ...], answer: str, wanted: str, tmp_path: Path
) -> None:
    found = checked(tmp_path, labels, answer, wanted)
    assert [each.code for each in found.diagnostics] == ["E0442"]


@pytest.mark.parametrize(
    ("labels", "answer", "said"),
    [
        (STARS, '"{stars} star"', "the name of a label"),
        (STARS, "token_id(stars)", "the number of an output"),
        (NUMBERED, '"{stars}"', "the number of an output"),
        (NUMBERED, '"LABEL_{stars}"', "the name of a label"),
    ],
)
def test_conventions_state_whether_an_answer_is_a_label_or_number(
    labels: tuple[str, ...], answer: str, said: str, tmp_path: Path
) -> None:
    found = checked(tmp_path, labels, answer, "0")
    (experiment,) = found.experiments
    assert experiment.table.conventions["answer"].endswith(f"{said}, not a token")
    shown = io.StringIO()
    print_prompts(found, Console(file=shown, width=200))
    assert re.search(rf"answer = '[^']*', {said}", shown.getvalue())
