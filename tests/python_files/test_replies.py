"""Functions of Python files that read generated texts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import mechdsl
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.diagnostics.syntax import PythonFailed, PythonNotFound
from mechdsl.results.experiment_result import ExperimentResult

FILE = """
mech 1

model toy = zoo("counting")

prompts fruit {{
  count in 2..5
  item in ["apple"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
}}

experiment e {{
  model toy
  prompts fruit
  ablate resid_post layer 1..2 at last token with zero during prefill
  generate 3
  measure python("own.py:own", reply) as raw
  stats correct none
}}
"""
TOKENS = """
def own(replies, rows, tokenizer):
    found = []
    for reply, row in zip(replies, rows, strict=True):
        tokens = tokenizer.encode(reply, add_special_tokens=False).ids
        found.append(10 * row["count"] + len(tokens) + sum(map(ord, reply)) / 9999)
    return found
"""


def ran(folder: Path, code: str) -> mechdsl.Results:
    path = folder / "file.mech"
    path.write_text(FILE.format(), encoding="utf-8")
    (folder / "own.py").write_text(code, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        return mechdsl.run(path, allow_python=True, store=False)


def test_reply_function_receives_replies_rows_and_tokenizer(tmp_path: Path) -> None:
    result = ran(tmp_path, TOKENS)["e"]
    assert isinstance(result, ExperimentResult)
    (measure,) = result.measures
    assert result.row_ids is not None
    assert measure.patched.shape == (2, len(result.row_ids))
    for cell, texts in enumerate(result.replies.cells):
        for n, row in enumerate(result.row_ids):
            (reply,) = texts[row]
            count = result.replies.prompts[row].count("apple")
            expected = 10 * count + len(reply.ids) + sum(map(ord, reply.text)) / 9999
            assert measure.patched[cell, n] == pytest.approx(expected)
    assert measure.patched[0].tolist() != measure.patched[1].tolist()


FAILING = {
    "it returned the shape [1], not [": "def own(replies, rows):\n    return [1.0]\n",
    "it returned a `list`, not numbers": "def own(replies, rows):\n    return list(replies)\n",
    "ValueError: three": "def own(replies, rows):\n    raise ValueError('three')\n",
    "it returned NaN, in the row": "def own(replies, rows):\n    return [float('nan') for _ in "
    "rows]\n",
}


@pytest.mark.parametrize("reason", FAILING)
def test_failing_reply_function_reports_its_reason(reason: str, tmp_path: Path) -> None:
    try:
        found = ran(tmp_path, FAILING[reason]).diagnostics
    except MechdslError as error:
        found = error.diagnostics
    (problem,) = found.errors
    assert isinstance(problem, PythonFailed)
    assert problem.reason.startswith(reason)
    if "shape" in reason or "list" in reason:
        assert problem.hint.startswith("it takes `replies`")


def test_reply_function_with_one_parameter_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(MechdslError) as raised:
        ran(tmp_path, "def own(replies):\n    return [1.0 for _ in replies]\n")
    (problem,) = raised.value.diagnostics.errors
    assert isinstance(problem, PythonNotFound)
    assert problem.hint == "write `def own(replies, rows):`"
