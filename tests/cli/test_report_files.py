"""Reports in files: several results of a report, failures of drawing, and formulas in CSV."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mechdsl.pipeline.api import validate
from mechdsl.results.experiment_result import csv_text, list_formulas, quote_formulas
from mechdsl.show.reports import drawing, drawing_worker

from ..fruit import FRUIT
from .conftest import Command

PLACES = "layer 0, 2 at first token, last token"
OBSERVING = """
experiment read {{
  prompts fruit limit 8
  observe norm resid_post {places} as a
  observe {second} as b
  {reports}
}}
"""
SAME_UNIT = f"norm resid_mid {PLACES}"
OTHER_UNIT = f"logit_lens resid_post {PLACES}"
KINDS = {
    "lines layer by position": "html",
    "bars position": "html",
    "heatmap layer by position": "html",
    "overlay": "html",
    "table": "csv",
    "csv": "csv",
    "json": "json",
    "parquet": "parquet",
}
SHARED = [kind for kind in KINDS if kind.split()[0] in ("lines", "bars", "heatmap")]


def chart_values(page: str) -> list[float]:
    """Return the means in the data of a page's charts; a page of overlays has them as text."""
    found = re.search(r"const spec = (\{.*\});", page)
    if found is None:
        return [float(number) for number in re.findall(r"-?\d+\.?\d*", page)]
    values: list[float] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            values.extend(node[key] for key in ("mean", "value") if _is_number(node.get(key)))
            for each in node.values():
                visit(each)
        elif isinstance(node, list):
            for each in node:
                visit(each)

    spec = json.loads(found[1])
    visit([spec.get("datasets", {}), spec])
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def file_values(path: Path) -> list[float]:
    match path.suffix:
        case ".html":
            return chart_values(path.read_text("utf-8"))
        case ".csv":
            return [float(row["mean"]) for row in csv.DictReader(path.open(encoding="utf-8"))]
        case ".json":
            cells = json.loads(path.read_text("utf-8"))["cells"]
            return [value["mean"] for cell in cells for value in cell["measures"]]
        case _:
            import pandas

            return list(pandas.read_parquet(path)["mean"])


@pytest.mark.parametrize("second", [SAME_UNIT, OTHER_UNIT])
def test_each_value_of_two_results_is_in_one_file(
    second: str, command: Command, tmp_path: Path
) -> None:
    files = {kind: f"{n}.{suffix}" for n, (kind, suffix) in enumerate(KINDS.items())}
    lines = "\n  ".join(f'report {kind} to "{file}"' for kind, file in files.items())
    path = tmp_path / "read.mech"
    text = OBSERVING.format(places=PLACES, second=second, reports=lines)
    path.write_text(FRUIT + text, "utf-8")
    done = command("run", path, "--no-store", "--format", "json")
    assert done.status == 0, done.err
    means = {
        each["name"]: [cell["measures"][0]["mean"] for cell in each["cells"]]
        for each in json.loads(done.out)["files"][0]["experiments"]
    }
    for kind, file in files.items():
        shares = second == SAME_UNIT and kind in SHARED
        name = kind.split()[0]
        parts = {"read.a": file.replace(".", ".a."), "read.b": file.replace(".", ".b.")}
        assert (tmp_path / file).exists() == shares, kind
        if shares:
            assert f"read.a, read.b: report {name} written to {tmp_path / file}\n" in done.err
            expected = {file: means["read.a"] + means["read.b"]}
        else:
            for result, part in parts.items():
                said = f"{result}: report {name} written to {tmp_path / part}, one file per result"
                assert said in done.err
            expected = {part: means[result] for result, part in parts.items()}
        for part, values in expected.items():
            seen = file_values(tmp_path / part)
            exact = 1e-2 if name == "overlay" else 1e-6  # an overlay has rounded numbers
            for value in values:
                near = (abs(each - value) <= exact * max(1, abs(value)) for each in seen)
                assert any(near), (kind, part)


def test_files_of_two_results_over_an_input_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "read.mech"
    reports = 'report csv to "two.csv"\n  report json to "two.json"\n  '
    text = FRUIT + OBSERVING.format(places=PLACES, second=SAME_UNIT, reports=reports)
    path.write_text(text, "utf-8")
    assert [each for each in validate(path) if each.code[0] == "E"] == []
    path.write_text(text.replace("two.json", "two.a.json"), "utf-8")
    assert [each for each in validate(path) if each.code[0] == "E"] == []
    other = text.replace("  report json", '  report table to "two.a.csv"\n  report json')
    path.write_text(other, "utf-8")
    assert [each.code for each in validate(path) if each.code[0] == "E"] == ["E0607"]


# --- drawing ---

PICTURES = (
    FRUIT
    + """
experiment first {
  prompts fruit limit 8
  ablate resid_post layer 1..2 at last token with zero
  measure logit(answer) as delta
  report bars layer to "a.svg"
}
experiment second {
  prompts fruit limit 8
  ablate resid_post layer 3 at last token with zero
  measure logit(answer) as delta
  report csv to "b.csv"
}
"""
)
SMALL = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
WORKERS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "ended with signal SIGKILL",
    "import sys; print('# Fatal', file=sys.stderr); sys.exit(7)": "ended with exit status 7: Fatal",
    "import time; time.sleep(60)": "drawing took longer than 0.3 s",
    "print('noise', flush=True); import time; time.sleep(60)": "drawing took longer than 0.3 s"
    "|ended with signal SIGKILL",
}


@pytest.mark.parametrize(("worker", "said"), WORKERS.items(), ids=range(len(WORKERS)))
def test_failed_drawing_costs_one_picture(
    worker: str, said: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(worker, "utf-8")
    (tmp_path / "e.mech").write_text(PICTURES, "utf-8")
    monkeypatch.setattr(drawing_worker, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(drawing, "DRAWING_SECONDS", 0.3)
    done = command("run", tmp_path / "e.mech")
    assert done.status == 3
    assert re.search(rf"E0536.*`report bars` could not be written to `a.svg`: .*({said})", done.err)
    assert "second: report csv written to" in done.out
    assert (tmp_path / "b.csv").exists()
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_limited_address_space_is_named() -> None:
    """V8 reserves more than 40 GB of address space, and aborts the process where it can't."""
    script = f"""
from mechdsl.show.reports.drawing import DrawingError, call_drawing, drawing_process
with drawing_process():
    print(len(call_drawing("svg_to_png", {SMALL!r})) > 0)
    try:
        call_drawing("vegalite_to_svg", {{"data": {{"values": [{{}}]}}, "mark": "bar"}})
    except DrawingError as error:
        print(error.reason, "|", error.hint)
    print(len(call_drawing("svg_to_png", {SMALL!r})) > 0)
"""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v 12000000; exec "{sys.executable}" -'],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, said, last = done.stdout.splitlines()
    assert (first, last) == ("True", "True")
    assert "its address space is limited to 12.3 GB (`ulimit -v`)" in said
    assert "`ulimit -v unlimited`" in said


def test_pictures_of_a_block_share_a_process() -> None:
    with drawing.drawing_process() as process:
        drawing.call_drawing("svg_to_png", SMALL)
        child = process._process
        drawing.call_drawing("svg_to_pdf", SMALL)
        assert process._process is child
        with pytest.raises(drawing.DrawingError, match="ValueError"):
            drawing.call_drawing("vegalite_to_svg", 3)
        assert process._process is child
    assert child is not None
    assert child.poll() is not None


def test_ticks_are_at_the_values_of_the_sweep(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "steps.mech"
    path.write_text(
        FRUIT
        + """
direction d = unembedding(" 3", " 4")
experiment layers {
  prompts fruit limit 8
  ablate head_out layer 0, 3 head 1 at last token with zero
  measure logit(answer) as delta
  report lines layer to "layers.html"
}
experiment alphas {
  prompts fruit limit 8
  for a in [0.5, 1, 2] {
    add a * d to resid_post layer 1 at last token
  }
  measure logit(answer) as delta
  report lines a to "alphas.html"
}
""",
        "utf-8",
    )
    assert command("run", path).status == 0
    for name, ticks in (("layers", "[0.0, 3.0]|[0, 3]"), ("alphas", "[0.5, 1.0, 2.0]|[0.5, 1, 2]")):
        page = (tmp_path / f"{name}.html").read_text("utf-8")
        assert any(f'"values": {each}' in page for each in ticks.split("|")), name


# --- formulas in CSV ---


@pytest.mark.parametrize(
    ("cell", "is_formula"),
    [("=1+1", True), ("+x", True), ("-x", True), ("@sum(a)", True), ("\tx", True), ("\rx", True)]
    + [(text, False) for text in ("-1", "+2.5", "-inf", "a=b", "", " -x", "1-2")],
)
def test_formula_cells_are_quoted_when_asked(cell: str, is_formula: bool) -> None:
    records: list[dict[str, Any]] = [{"text": cell, "number": -1.5}]
    assert list_formulas(csv_text(records)) == [cell] * is_formula
    with quote_formulas():
        (row,) = csv.DictReader(csv_text(records).splitlines(keepends=True))
        assert list_formulas(csv_text(records)) == []
    assert row == {"text": f"'{cell}" if is_formula else cell, "number": "-1.5"}


def test_every_csv_is_warned_about_and_quoted(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "e.mech"
    reports = '  report csv to "a.csv"\n  report table to "b.csv"\n'
    path.write_text(
        PICTURES.replace("logit(answer)", "-logprob(answer)")
        .replace('  report bars layer to "a.svg"\n', reports)
        .replace('  report csv to "b.csv"\n', ""),
        "utf-8",
    )
    store = tmp_path / "S"
    for option, quoted in ((), False), (("--safe-csv",), True):
        done = command("run", path, "--store", store, "--format", "csv", *option)
        shown = command("runs", "show", "last", "--store", store, "--format", "csv", *option)
        texts = [done.out, shown.out, *((tmp_path / f"{n}.csv").read_text() for n in "ab")]
        assert [list_formulas(text) for text in texts] == [
            [] if quoted else ["-logprob(answer)"]
        ] * 4
        assert ("W0745" in shown.err, done.err.count("W0745")) == (not quoted, 0 if quoted else 3)
        assert done.status == shown.status == 0
