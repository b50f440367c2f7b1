"""Functions of Python files: their arguments, the use of their results, and when they don't
run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.diagnostics.syntax import PythonFailed, PythonNotFound
from mechdsl.pipeline.computation import run_checked
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.syntax.frontend import read_source

from .. import fruit
from ..cli.conftest import Command, command
from ..execute.support import bare, word_tokenizer
from ..fruit import FRUIT

__all__ = ["command"]

HERE = Path(__file__).parent
METRIC = (
    FRUIT
    + """
metric own = python("own.py:own")

experiment heads {
  prompts fruit limit 8
  from clean into fewer
  patch layer 0..1 head * at last-item token
  measure own as delta
  measure logit(answer) as delta
  stats correct none
}
"""
)
VALUE = (
    fruit.head('corrupt fewer { count = python("own.py:own") }')
    + """
experiment heads {
  prompts fruit limit 8
  from clean into fewer
  patch layer 0..1 head * at last-item token
  measure logit(answer) as delta
  stats correct none
}
"""
)


def write(folder: Path, text: str, code: str) -> Path:
    path = folder / "file.mech"
    path.write_text(text, encoding="utf-8")
    (folder / "own.py").write_text(code, encoding="utf-8")
    return path


def check(path: Path, settings: CheckSettings) -> CheckedFile:
    source, _ = read_source(path)
    assert source is not None
    return check_source(source, settings)


def failure(path: Path) -> PythonFailed:
    """The error of a function, whether or not other results remain."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mechdsl.MechdslWarning)
            found = mechdsl.run(path, allow_python=True).diagnostics
    except MechdslError as error:
        found = error.diagnostics
    (diagnostic,) = found.errors
    assert isinstance(diagnostic, PythonFailed), diagnostic
    return diagnostic


def failing(path: Path, reason: str, where: str) -> PythonFailed:
    """Check reason and location of the error of a function."""
    found = failure(path)
    assert found.reason.startswith(reason)
    assert found.where == where
    return found


# --- metrics --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> mechdsl.Results:
    return mechdsl.run(HERE / "metric.mech", allow_python=True)


def test_python_metric_equals_the_metric_of_the_language(results: mechdsl.Results) -> None:
    ours, theirs, _ = results["heads"].measures
    assert theirs.label == "theirs"
    assert theirs.metric == 'python("functions.py:difference")'
    for part in ("patched", "base", "source"):
        assert getattr(theirs, part) == pytest.approx(getattr(ours, part), rel=1e-5, abs=1e-5)
    recovery, again, _ = results["heads"].statistics
    assert again.mean == pytest.approx(recovery.mean, rel=1e-5, abs=1e-6)


@torch.no_grad()
def test_python_metric_over_the_vocabulary_equals_reference(results: mechdsl.Results) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(files("mechdsl") / "zoo" / "counting"))
    checked = check(HERE / "metric.mech", CheckSettings(python="run"))
    table = checked.experiments[0].table
    margins = []
    for clean, fewer in zip(table.runs["clean"].rows, table.runs["fewer"].rows, strict=True):
        logits = model(torch.tensor([fewer.ids])).logits[0, -1]
        own = clean.texts["answer"].ids[0]
        rest = torch.cat([logits[:own], logits[own + 1 :]])
        margins.append(float(logits[own] - rest.max()))
    assert results["heads"].measures[2].base[0] == pytest.approx(margins, rel=1e-4, abs=1e-4)


def test_python_metric_is_used_in_keep_and_arithmetic(results: mechdsl.Results) -> None:
    (difference,) = results["kept"].measures
    assert 0 < results["kept"].prompts <= results["heads"].prompts
    heads = {
        row: theirs - margin
        for row, theirs, margin in zip(
            results["heads"].row_ids or (),
            results["heads"].measures[1].base[0],
            results["heads"].measures[2].base[0],
            strict=True,
        )
    }
    assert results["kept"].row_ids is not None
    expected = [heads[row] for row in results["kept"].row_ids]
    assert difference.base[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_python_metric_receives_copies_of_logits_and_rows(tmp_path: Path) -> None:
    code = """
import torch

def own(logits, rows):
    assert isinstance(rows, list) and all(type(row) is dict for row in rows)
    assert logits.dtype == torch.float32 and logits.shape[0] == len(rows)
    assert logits.shape[1] > 40 and not logits.requires_grad
    for row in rows:
        assert row["answer"] == f" {row['count']}"
        assert len(row["fruits"]) == row["count"]
        assert len(row["answer.ids"]) == 1
    logits.zero_()
    rows.clear()
    return torch.zeros(len(logits))
"""
    found = mechdsl.run(write(tmp_path, METRIC, code), allow_python=True)["heads"]
    alone = METRIC.replace("  measure own as delta\n", "").replace(
        'metric own = python("own.py:own")\n', ""
    )
    plain = mechdsl.run(alone)["heads"]
    assert (found.measures[0].patched == 0).all()
    # Modified logits and rows don't affect the other measure.
    assert found.measures[1].patched == pytest.approx(plain.measures[0].patched, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("takes", "called"),
    [
        ("logits, rows, tok", "tok"),
        ("logits, rows, tok, more=3", "tok"),
        ("logits, rows, tokenizer=None", "tokenizer"),
        ("logits, rows, more=3, tokenizer=None", "tokenizer"),
        ("logits, rows, *, tokenizer", "tokenizer"),
        ("logits, rows, *, tokenizer=None, more=3", "tokenizer"),
        ("logits, rows, tokenizer, /", "tokenizer"),
        ("logits, rows, tokenizer=None, /", "tokenizer"),
    ],
)
def test_python_metric_receives_a_copy_of_the_tokenizer(
    takes: str, called: str, tmp_path: Path
) -> None:
    """The parameter is found by position or by name."""
    code = f"""
def own({takes}):
    {called}.enable_truncation(1)
    {called}.no_truncation()
    three, four = {called}.encode(" 3 4", add_special_tokens=False).ids[-2:]
    assert {called}.token_to_id("4") == four
    {called}.enable_truncation(1)
    return logits[:, three] - logits[:, four]
"""
    text = METRIC.replace("logit(answer)", 'logit(" 3") - logit(" 4")')
    found = mechdsl.run(write(tmp_path, text, code), allow_python=True)["heads"]
    own, written = found.measures
    assert own.patched == pytest.approx(written.patched, rel=1e-5, abs=1e-5)
    assert abs(own.patched).min() > 0.01


def test_python_metric_with_optional_parameters_receives_two_arguments(tmp_path: Path) -> None:
    """Optional parameters keep their defaults."""
    code = "def own(logits, rows, scale=2.0, *more):\n    return logits[:, 0] * scale\n"
    found = mechdsl.run(write(tmp_path, METRIC, code), allow_python=True)["heads"]
    plain = "def own(*given):\n    return 2.0 * given[0][:, 0] * (len(given) == 2)\n"
    again = mechdsl.run(write(tmp_path, METRIC, plain), allow_python=True)["heads"]
    assert np.array_equal(found.measures[0].patched, again.measures[0].patched)


@pytest.mark.parametrize(
    "given",
    [
        "[float(x[0]) for x in logits]",
        "logits[:, 0]",
        "logits[:, 0].double()",
        "logits[:, 0].numpy()",
        "[x[0] for x in logits]",
        "tuple(x[0].item() for x in logits)",
    ],
)
def test_python_metric_may_return_tensors_arrays_or_lists(given: str, tmp_path: Path) -> None:
    code = f"def own(logits, rows):\n    return {given}\n"
    found = mechdsl.run(write(tmp_path, METRIC, code), allow_python=True)["heads"]
    assert found.measures[0].patched.shape == (8, 8)


def test_python_metric_may_return_booleans(tmp_path: Path) -> None:
    code = "def own(logits, rows):\n    return logits.argmax(-1) == 20\n"
    found = mechdsl.run(write(tmp_path, METRIC, code), allow_python=True)["heads"]
    assert set(np.unique(found.measures[0].base)) <= {0.0, 1.0}


# --- values ---------------------------------------------------------------------------------------


def table(path: Path, name: str = "heads") -> Any:
    checked = check(path, CheckSettings(python="run"))
    assert not has_errors(checked.diagnostics), checked.diagnostics
    return next(e for e in checked.experiments if e.name == name).table


def test_python_values_equal_values_of_the_language(tmp_path: Path) -> None:
    plain = (HERE / "values.mech").read_text("utf-8")
    for own, other in (
        ('python("functions.py:total")', "count + 1"),
        ('python("functions.py:shorter")', "count - 1"),
        ('python("functions.py:next_word")', "other(item)"),
    ):
        plain = plain.replace(own, other)
    (tmp_path / "plain.mech").write_text(plain, encoding="utf-8")
    ours, theirs = table(HERE / "values.mech"), table(tmp_path / "plain.mech")
    for run in ("clean", "fewer"):
        rows = zip(ours.runs[run].rows, theirs.runs[run].rows, strict=True)
        assert all(a.ids == b.ids and a.texts == b.texts for a, b in rows)
    words = ["apple", "pear", "plum", "fig"]
    for clean, renamed in zip(ours.runs["clean"].rows, ours.runs["renamed"].rows, strict=True):
        own, other = clean.values["fruits"], renamed.values["fruits"]
        assert [words[(words.index(word) + 1) % 4] for word in own] == other
        assert clean.values["size"] == len(own) + len(own[0])
    for row in ours.runs["fewer"].rows:  # derived values are recomputed
        assert row.values["size"] == row.values["count"] + len(row.values["fruits"][0])


def test_python_value_is_a_row_value_of_results(tmp_path: Path) -> None:
    found = mechdsl.run(HERE / "values.mech", allow_python=True)["heads"]
    assert len(set(found.row_values["size"])) > 2


def test_python_value_receives_only_preceding_values(tmp_path: Path) -> None:
    code = """
def own(row):
    return " ".join(sorted(row))
def late(row):
    return ",".join(sorted(row))
def text(row):
    return " 5"
"""
    text = """\
mech 1
model toy = zoo("counting")
prompts p {
  early in 3..4
  a = early + 1
  b = "{later} x"
  seen = python("own.py:own")
  c = "{seen}!"
  sight = python("own.py:late")
  later = early + 2
  template "Part {early} {b} {c} {sight}"
  answer python("own.py:text")
}
"""
    rows = table_alone(write(tmp_path, text, code))
    assert rows[0].values["seen"] == "a early"
    assert rows[0].values["sight"] == "a,c,early,seen"


def table_alone(path: Path) -> Any:
    """The rows of a file, after adding an experiment."""
    text = path.read_text("utf-8")
    path.write_text(text + "experiment e { prompts p measure entropy as raw }\n", encoding="utf-8")
    return table(path, "e").runs["clean"].rows


def test_numpy_number_becomes_a_plain_number(tmp_path: Path) -> None:
    code = "import numpy as np\ndef own(row):\n    return np.int64(row['count'] - 1)\n"
    rows = table(write(tmp_path, VALUE, code)).runs["fewer"].rows
    assert all(type(row.values["count"]) is int for row in rows)


def test_python_functions_define_where_and_texts(tmp_path: Path) -> None:
    code = """
def own(row):
    return row["count"] < 6

def rival(row):
    return f" {row['count'] - 1}"
"""
    text = VALUE.replace('python("own.py:own")', "count - 1").replace(
        "  answer", '  where python("own.py:own")\n  text rival = python("own.py:rival")\n  answer'
    )
    text = text.replace("logit(answer)", "logit(rival)")
    rows = table(write(tmp_path, text, code)).runs["clean"].rows
    assert {row.values["count"] for row in rows} == {3, 4, 5}
    assert all(row.texts["rival"].text == f" {row.values['count'] - 1}" for row in rows)


# --- hashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metric", "values"])
def test_results_record_the_hash_of_the_python_file(name: str) -> None:
    found = mechdsl.run(HERE / f"{name}.mech", allow_python=True)["heads"]
    digest = sha256((HERE / "functions.py").read_bytes()).hexdigest()
    assert found.hashes["python functions.py"] == digest
    said = found.conventions["python"]
    assert digest[:12] in said
    assert ("`difference`, `margin`" if name == "metric" else "`total`") in said


def test_python_file_edited_after_the_check_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, METRIC, "def own(logits, rows):\n    return logits[:, 0]\n")
    checked = check(path, CheckSettings(python="run"))
    (tmp_path / "own.py").write_text("def own(logits, rows):\n    return logits[:, 1]\n")
    from mechdsl.pipeline.options import RunOptions

    result, diagnostics = run_checked(checked, RunOptions())
    assert result is not None
    assert not result.complete
    assert "has changed since it was checked" in diagnostics[0].message
    assert diagnostics[0].label_text == "defined at own.py:1"


# --- nothing runs unless it is allowed ------------------------------------------------------------

MARK = """
from pathlib import Path
Path(__file__).with_name("it ran").touch()
def own(*all):
    Path(__file__).with_name("it ran").touch()
    return all[0]["count"] - 1 if len(all) == 1 else all[0][:, 0]
"""


@pytest.mark.parametrize("text", [METRIC, VALUE], ids=["metric", "value"])
def test_python_code_requires_allow_python(text: str, tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, text, MARK)
    mark = tmp_path / "it ran"
    assert {d.code for d in mechdsl.validate(path)} <= {"W0740"}
    done = command("validate", path)
    assert done.status == 0
    for arguments in (("run",), ("plan",), ("explain",), ("graph",), ("run", "--only", "heads")):
        done = command(*arguments, path)
        assert done.status == 2, done.out
        assert "E0221" in done.err
    with pytest.raises(MechdslError, match="E0221"):
        mechdsl.run(path)
    assert not mark.exists()
    assert command("plan", path, "--allow-python").status == 0
    assert command("run", path, "--allow-python").status == 0
    assert mark.exists()


def test_validation_imports_neither_the_python_file_nor_torch(tmp_path: Path) -> None:
    path = write(tmp_path, METRIC, "import torch\n" + MARK)
    code = "import sys, mechdsl; print(mechdsl.validate(sys.argv[1]) == [], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
    assert not (tmp_path / "it ran").exists()


def test_validation_reports_experiments_that_need_python(tmp_path: Path, command: Command) -> None:
    text = VALUE.replace("last-item token", "last-itm token")
    done = command("validate", write(tmp_path, text, MARK))
    assert done.status == 2  # names need no rows
    assert "did you mean `item`?" in done.err
    text = VALUE.replace("last-item token", "item 40 token")
    done = command("validate", write(tmp_path, text, MARK))
    assert done.status == 0
    assert "W0740" in done.err
    assert done.out == "1 file checked: no errors, 1 experiment without its Python\n"
    done = command("plan", "--allow-python", tmp_path / "file.mech")
    assert done.status == 2
    assert "item 40" in done.err


# --- functions that can't be called ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def own(logits):\n    return 0\n", "takes 1 argument, but is called with 2"),
        ("def own(a, b, c, d):\n    return 0\n", "takes 4 arguments"),
        ("def own(logits, tokenizer):\n    return 0\n", "as the logits or the rows"),
        ("def own(logits, *, tokenizer):\n    return 0\n", "takes 1 argument"),
        ("def own(a, b, *, tokenizer, c):\n    return 0\n", "has required keyword-only arguments"),
        ("def own(a, b, *, c):\n    return 0\n", "has required keyword-only arguments"),
        ("own = 3\n", "defines no function `own`"),
        ("async def own(a, b):\n    return 0\n", "defines no function `own`"),
        ("class A:\n    def own(a, b):\n        return 0\n", "defines no function `own`"),
        ("def own(a, b:\n", "line 1 of `own.py` is not Python"),
        ("def own(a, b):\n    return 0\n\0", "is not Python"),
    ],
)
def test_function_with_a_wrong_signature_is_rejected(
    code: str, reason: str, tmp_path: Path
) -> None:
    (found,) = mechdsl.validate(write(tmp_path, METRIC, code))
    assert isinstance(found, PythonNotFound)
    assert reason in found.reason
    assert found.span is not None
    assert found.span.text == 'python("own.py:own")'


@pytest.mark.parametrize(
    "code",
    [
        "def own(logits, rows, more=1):\n    return logits[:, 0]\n",
        "def own(*all):\n    return all[0][:, 0]\n",
        "def own(logits, /, rows, *, more=1):\n    return logits[:, 0]\n",
        "if True:\n    def own(logits, rows):\n        return logits[:, 0]\n",
        "def own(a):\n    return 0\ndef own(logits, rows):\n    return logits[:, 0]\n",
        "# coding: latin-1\ndef own(logits, rows):\n    return logits[:, 0]\n",
    ],
)
def test_function_with_a_compatible_signature_is_accepted(code: str, tmp_path: Path) -> None:
    path = write(tmp_path, METRIC, code)
    assert mechdsl.validate(path) == []
    assert mechdsl.run(path, allow_python=True)["heads"].prompts == 8


# --- functions that fail --------------------------------------------------------------------------

METRICS = [
    ("    return 1 / 0\n", "ZeroDivisionError: division by zero", "at own.py:2"),
    ("    return rows[0]['cuont']\n", "KeyError: 'cuont'", "at own.py:2"),
    ("    return None\n", "it returned nothing, not numbers", "defined at own.py:1"),
    ("    return {}\n", "it returned a `dict`, not numbers", "defined at own.py:1"),
    ("    return 'abc'\n", "it returned a `str`, not numbers", "defined at own.py:1"),
    (
        "    return ['a' for row in rows]\n",
        "it returned a `list`, not numbers",
        "defined at own.py:1",
    ),
    ("    return logits\n", "it returned the shape [8, ", "defined at own.py:1"),
    ("    return 0.5\n", "it returned the shape [], not [8]", "defined at own.py:1"),
    ("    return logits[1:, 0]\n", "it returned the shape [7], not [8]", "defined at own.py:1"),
    ("    return logits[:, 0] * 1j\n", "it returned complex numbers", "defined at own.py:1"),
    (
        "    return logits[:, 0] * float('nan')\n",
        "it returned NaN, in the row with ",
        "defined at own.py:1",
    ),
    ("    import sys; sys.exit(0)\n", "SystemExit: 0", "at own.py:2"),
    ("    import helpers\n", "ModuleNotFoundError: No module named 'helpers'", "at own.py:2"),
    ("    raise RuntimeError('out of memory')\n", "RuntimeError: out of memory", "at own.py:2"),
]


@pytest.mark.parametrize(("body", "reason", "where"), METRICS)
def test_failing_python_metric_reports_reason_and_line(
    body: str, reason: str, where: str, tmp_path: Path
) -> None:
    found = failing(write(tmp_path, METRIC, f"def own(logits, rows):\n{body}"), reason, where)
    assert found.span is not None
    assert found.span.text == 'python("own.py:own")'


VALUES = [
    ("    return 1 / 0\n", "ZeroDivisionError: division by zero", "at own.py:2"),
    ("    return row['cuont']\n", "KeyError: 'cuont'", "at own.py:2"),
    ("    return None\n", "it returned `NoneType`, not a number or a text", "defined at own.py:1"),
    ("    return [1]\n", "it returned `list`, not a number or a text", "defined at own.py:1"),
    ("    return float('nan')\n", "it returned NaN, not a number or a text", "defined at own.py:1"),
    (
        "    import torch; return torch.zeros(3)\n",
        "it returned `Tensor`, not a number",
        "defined at own.py:1",
    ),
]


@pytest.mark.parametrize(("body", "reason", "where"), VALUES)
def test_failing_python_value_reports_reason_and_line(
    body: str, reason: str, where: str, tmp_path: Path
) -> None:
    found = failing(write(tmp_path, VALUE, f"def own(row):\n{body}"), reason, where)
    if "cuont" in body:
        assert "`count`" in found.hint


def test_exception_during_the_import_reports_its_line(tmp_path: Path) -> None:
    code = "def own(logits, rows):\n    return logits[:, 0]\n\nraise ValueError('not today')\n"
    found = failure(write(tmp_path, METRIC, code))
    assert found.reason == "ValueError: not today"
    assert found.where == "at own.py:4"


def test_function_deleted_during_the_import_is_reported(tmp_path: Path) -> None:
    code = "def own(logits, rows):\n    return logits[:, 0]\n\ndel own\n"
    assert "defines no function" in failure(write(tmp_path, METRIC, code)).reason


def test_exception_in_a_library_names_the_line_of_the_user_file(tmp_path: Path) -> None:
    """The line is in the innermost function of the user's file."""
    code = """
import json

def own(logits, rows):
    return inner(rows)

def inner(rows):
    return json.loads("{")
"""
    assert failure(write(tmp_path, METRIC, code)).where == "at own.py:8"


def alone(text: str, without: str) -> str:
    """The file without one of its measures."""
    if without == "own":
        text = text.replace('metric own = python("own.py:own")\n', "")
    return text.replace(f"  measure {without} as delta\n", "")


LATE = """
calls = []

def own(logits, rows):
    calls.append(1)
    if len(calls) > 2:
        raise ValueError("too often")
    return logits[:, 0]
"""


@pytest.mark.parametrize("code", ["def own(logits, rows):\n    return 0\n", LATE])
def test_failing_metric_fails_only_its_measure(code: str, tmp_path: Path, command: Command) -> None:
    """Covers failures in unpatched runs and in cells; the status is 2 if no result remains."""
    path = write(
        tmp_path, METRIC + "\nexperiment b { prompts fruit measure entropy as raw }\n", code
    )
    done = command("run", "--allow-python", path)
    assert done.status == 3
    assert "error[E0223]: `own` failed: " in done.err
    assert "Traceback" not in done.err
    assert "heads: delta of own: not computed\nE0223: `own` failed: " in done.out
    assert "heads: delta of logit(answer)\n" in done.out
    assert "L1H3.z" in done.out
    assert "b: entropy\n" in done.out
    done = command("run", "--allow-python", path, "--format", "json")
    (file,) = json.loads(done.out)["files"]
    (missing,) = file["missing"]
    assert (missing["experiment"], missing["label"], missing["code"]) == ("heads", "own", "E0223")
    path.write_text(alone(METRIC, "logit(answer)"), encoding="utf-8")
    done = command("run", "--allow-python", path)
    assert (done.status, done.out) == (2, "")


IN_A_CELL = """
def own(logits, rows):
    for line, row in zip(logits, rows):
        if row["count"] == 5 and line[row["answer.ids"][0]] < 5:
            raise ValueError("too small")
    return logits[:, 0]
"""


def test_failing_metric_names_line_cell_and_row(tmp_path: Path, command: Command) -> None:
    """The function fails for a single row of a single cell."""
    text = METRIC.replace("  from clean into fewer\n", "").replace(
        "patch layer 0..1 head * at last-item token",
        "ablate resid_post layer 1..3 at last token with zero",
    )
    done = command("run", "--allow-python", write(tmp_path, text, IN_A_CELL), "--format", "json")
    assert done.status == 3
    (file,) = json.loads(done.out)["files"]
    (missing,) = file["missing"]
    found = re.fullmatch(
        r"`own` failed: ValueError: too small: at own.py:5, "
        r"in the patched run of layer (\d), row (\d+) of `fruit`",
        missing["reason"],
    )
    assert found is not None, missing
    layer, row = map(int, found.groups())
    beside = mechdsl.run(alone(text, "own"), limit=8)["heads"]
    assert beside.row_ids is not None
    at = beside.row_ids.index(row)
    assert beside.row_values["count"][at] == 5
    (cell,) = [n for n, each in enumerate(beside.cells) if each.coords["layer"] == layer]
    assert beside.measures[0].patched[cell, at] < 5


def test_metric_that_fails_only_on_several_rows_reports_their_number(tmp_path: Path) -> None:
    code = "def own(logits, rows):\n    assert len(rows) < 2\n    return logits[:, 0]\n"
    said = failure(write(tmp_path, METRIC, code))
    assert said.where == "at own.py:2"
    assert said.place == ", called with 8 rows from the run `fewer`, row 2 of `fruit`, on"


def test_failing_keep_condition_fails_only_its_experiment(tmp_path: Path) -> None:
    text = METRIC.replace("  patch", "  keep own > 0\n  patch")
    text += "\nexperiment b { prompts fruit measure entropy as raw }\n"
    path = write(tmp_path, text, "def own(logits, rows):\n    return 1 / 0\n")
    with pytest.warns(mechdsl.MechdslWarning, match="ZeroDivisionError"):
        found = mechdsl.run(path, allow_python=True)
    assert [each.name for each in found] == ["b"]
    assert [each.name for each in found.files[0].lost] == ["heads"]


def test_failing_metric_leaves_no_hooks_on_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = str(files("mechdsl") / "zoo" / "counting")
    pair = (
        AutoModelForCausalLM.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    code = """
calls = []

def own(logits, rows):
    calls.append(1)
    return logits[:, 0] if len(calls) < 3 else 0
"""
    path = write(tmp_path, alone(METRIC, "logit(answer)"), code)
    with pytest.raises(MechdslError, match="E0223"):
        mechdsl.run(path, models={"toy": pair}, allow_python=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pair[0].modules())
    text = METRIC.replace("  measure own as delta\n", "").replace(
        'metric own = python("own.py:own")\n', ""
    )
    again, plain = mechdsl.run(text, models={"toy": pair}), mechdsl.run(text)
    assert _numbers(again["heads"]) == pytest.approx(_numbers(plain["heads"]))


def _numbers(result: ExperimentResult) -> Any:
    return result.measures[0].patched


def test_python_path_is_relative_to_the_imported_mech_file(tmp_path: Path) -> None:
    """The function is named in a file imported with `use`."""
    (tmp_path / "common").mkdir()
    write(tmp_path / "common", METRIC[: METRIC.index("experiment")], MARK)
    path = tmp_path / "main.mech"
    path.write_text(
        'mech 1\nuse "common/file.mech"\n' + METRIC[METRIC.index("experiment") :], encoding="utf-8"
    )
    assert mechdsl.validate(path) == []
    assert mechdsl.run(path, allow_python=True)["heads"].prompts == 8


# --- interventions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> mechdsl.Results:
    return mechdsl.run(HERE / "writes.mech", allow_python=True)


def test_function_that_returns_its_vectors_has_no_effect(written: mechdsl.Results) -> None:
    (found,) = written["same"].measures
    assert found.patched == pytest.approx(
        np.broadcast_to(found.base, found.patched.shape), abs=1e-4
    )


def test_vectors_returned_by_a_function_are_written(written: mechdsl.Results) -> None:
    (ours,), (theirs,) = written["ours"].measures, written["theirs"].measures
    assert theirs.patched == pytest.approx(ours.patched, rel=1e-5, abs=1e-5)
    assert np.abs(theirs.patched - theirs.base).max() > 0.1
    assert "`a_half` of functions.py" in written["theirs"].conventions["python"]
    assert "python functions.py" in written["theirs"].hashes


@torch.no_grad()
def test_rule_function_receives_vectors_of_the_base_run(written: mechdsl.Results) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(files("mechdsl") / "zoo" / "counting"))
    checked = check(HERE / "writes.mech", CheckSettings(python="run"))
    experiment = next(e for e in checked.experiments if e.name == "halved")
    expected = np.zeros((4, len(experiment.table)))
    for number, row in enumerate(experiment.table.runs["clean"].rows):
        tokens = [
            n
            for n, special in enumerate(row.special)
            if not any(
                low < span.end and high > span.start
                for span in row.spans
                if span.name == "fruits"
                for low, high in [row.offsets[n]]
            )
            and not special
        ]
        for layer in range(4):

            def halve(module: Any, inputs: Any, output: Any, tokens: Any = tokens) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden[0, tokens] *= 0.5

            handle = model.model.layers[layer].register_forward_hook(halve)
            logits = model(torch.tensor([row.ids])).logits[0, -1]
            handle.remove()
            expected[layer, number] = float(logits[row.texts["answer"].ids[0]])
    assert written["halved"].measures[0].patched == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("vectors[1:]", "it returned the shape ["),
        ("vectors[:, 0]", "it returned the shape ["),
        ("None", "it returned nothing, not numbers"),
        ("vectors * float('nan')", "it returned NaN or infinity"),
        ("vectors / 0 * 0", "it returned NaN or infinity"),
        ("vectors / (vectors != vectors[0, 0])", "it returned NaN or infinity"),
        ("vectors.shape['a']", "TypeError"),
    ],
)
def test_failing_rule_function_fails_only_its_experiment(
    body: str, reason: str, tmp_path: Path, command: Command
) -> None:
    """The function runs during cells; other experiments in the same passes are unaffected."""
    text = METRIC.replace('metric own = python("own.py:own")\n', "")
    text = text.replace("  measure own as delta\n", "").replace(
        "patch layer 0..1 head * at last-item token",
        'set layer 0..1 head * at last-item token to python("own.py:own")',
    )
    path = write(tmp_path, text, f"def own(vectors):\n    return {body}\n")
    assert failure(path).reason.startswith(reason)
    done = command("run", "--allow-python", path)
    assert (done.status, done.out) == (2, "")
    assert "E0223" in done.err
    beside = METRIC[METRIC.index("experiment") :].replace("heads", "beside")
    path.write_text(text + alone(beside, "own"), encoding="utf-8")
    done = command("run", "--allow-python", path)
    assert done.status == 3
    assert "heads: not computed\nE0223: `own` failed: " in done.out
    assert "from the patched run of layer 0, head 0, row 0 of `fruit`, on" in " ".join(
        done.out.split()
    )
    assert "beside: delta of logit(answer)" in done.out


def test_hash_covers_functions_of_other_blocks(tmp_path: Path) -> None:
    text = VALUE.replace('python("own.py:own")', "count - 1").replace(
        "experiment heads {",
        "prompts other {\n  count in 3..9\n"
        '  item in ["apple", "pear", "plum", "fig"]\n'
        '  fruits = list(item, count, sep: " ")\n  size = python("own.py:own")\n'
        '  template "Part 1: {fruits} Count 1:"\n}\n\nexperiment heads {',
    )
    text = text.replace("from clean into fewer", "from other into fewer")
    path = write(tmp_path, text, "def own(row):\n    return 1\n")
    assert {d.code for d in mechdsl.validate(path)} == {"W0740"}
    found = mechdsl.run(path, allow_python=True)["heads"]
    assert found.hashes["python own.py"] == sha256((tmp_path / "own.py").read_bytes()).hexdigest()


def test_metric_that_returns_booleans_has_the_exact_limits_of_a_share(tmp_path: Path) -> None:
    code = "def own(logits, rows):\n    return logits[:, 0] == logits[:, 0]\n"
    path = write(tmp_path, METRIC.replace("own as delta", "own as raw"), code)
    found = mechdsl.run(path, allow_python=True, store=False)["heads"]
    assert found.statistics[0].mean[0] == 1
    assert found.statistics[0].high[0] == 1
    assert found.statistics[0].low[0] == pytest.approx(0.025 ** (1 / 8))
    assert "treated as shares" in found.conventions["interval"]


def test_python_metric_receives_the_tokenizer_that_python_passes(tmp_path: Path) -> None:
    code = """
from transformers import PreTrainedTokenizerFast
def own(logits, rows, tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.padding_side = "changed"
    return logits[:, tokenizer.convert_tokens_to_ids("w3")]
"""
    text = 'mech 1\nmodel m = local("passed")\n'
    text += 'prompts p {\n  a in ["w1", "w2", "w5"]\n  template "{a} w7"\n  answer " w3"\n}\n'
    text += "experiment e {\n  prompts p\n  ablate mlp_out layer 1 at last token with zero\n"
    text += '  measure python("own.py:own") as raw\n  measure logit(answer) as raw\n}\n'
    tokenizer = word_tokenizer()
    path = write(tmp_path, text, code)
    results = mechdsl.run(path, {"m": (bare("llama"), tokenizer)}, allow_python=True, store=False)
    mine, written = results["e"].measures
    np.testing.assert_allclose(mine.patched, written.patched, atol=1e-5)
    assert tokenizer.padding_side != "changed"
