"""Token numbers in two runs of different prompt lengths: warning, and both tokens shown."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.resolve.expansion import name_cells
from mechdsl.results.document import experiment_document
from mechdsl.show.output import show_report
from mechdsl.show.reports.grid import hit_tokens_text

from ..fruit import head
from ..results.synthetic import finished, positions, report

RUNS = head("corrupt fewer { count = count - 1 }", "corrupt other { item = other(item) }")


def checked(base: str, rule: str) -> CheckedFile:
    lines = f"prompts fruit limit 24\n  from clean into {base}\n  {rule}\n"
    return check_source(
        Source(f"{RUNS}\nexperiment e {{\n  {lines}  measure logit(answer) as delta\n}}\n")
    )


def warned(base: str, rule: str) -> list[str]:
    return [d.message for d in checked(base, rule).diagnostics if d.code == "W0760"]


@pytest.mark.parametrize(
    "at",
    [
        "token * align left",
        "token 2..7",
        "token 8",
        "tokens 2..7",
        "token -6",
        "{token 1, token 8}",
    ],
)
def test_numbered_tokens_of_runs_with_different_lengths_are_a_warning(at: str) -> None:
    rule = f"patch resid_post layer 1 at {at}"
    assert warned("fewer", rule) == [f"`{at}` refers to different tokens in `clean` and `fewer`"]
    assert warned("other", rule) == []  # equal lengths: other tokens are intended


def test_loop_over_numbered_tokens_is_warned_about_once() -> None:
    rule = "for i in 2..9 { patch resid_post layer 1 at token i }"
    assert len(warned("fewer", rule)) == 1


@pytest.mark.parametrize(
    "at",
    [
        "token -4..-1",  # the shared suffix
        "token 1..5",  # the shared prefix and three items
        "last-item token",
        "each item token",
        "last token",
    ],
)
def test_corresponding_tokens_are_no_warning(at: str) -> None:
    assert warned("fewer", f"patch resid_post layer 1 at {at}") == []


def test_numbered_token_of_a_mean_of_another_run_is_a_warning() -> None:
    rule = "ablate resid_post layer 1 at token 8 with mean of clean"
    assert len(warned("fewer", rule)) == 1


def test_cells_name_the_written_and_the_read_token() -> None:
    (experiment,) = checked("fewer", "patch resid_post layer 1 at token * align left").experiments
    cells = {cell.position: cell for cell in name_cells(experiment)}
    assert cells["2"].read == ()
    assert hit_tokens_text(cells["2"], 6) == "1"
    assert (cells["13"].tokens, cells["13"].read) == ((":", "1"), ("1", "Count"))
    assert hit_tokens_text(cells["13"], 1) == ": and 1 more ← 1 and 1 more"


READ = positions(layers=2)
APART = replace(
    READ,
    cells=tuple(
        replace(cell, read=("fig", "plum")) if cell.position == "last token" else cell
        for cell in READ.cells
    ),
)
"""The last of three positions has different tokens in the source run."""


@pytest.mark.parametrize("kind", ["table", "lines", "bars", "heatmap"])
def test_reports_show_the_written_and_the_read_token(kind: str) -> None:
    console = Console(file=io.StringIO(), width=140)
    words = {"table": {}, "heatmap": {"by": "layer"}}
    said = {"variable": "position"} if kind != "table" else {}
    asked = report(kind, **said, **words.get(kind, {}))
    result = finished(APART)
    show_report(result, asked, console)
    assert isinstance(console.file, io.StringIO)
    text = " ".join(console.file.getvalue().split())
    both = "apple, pear, plum ← fig, plum" if kind == "table" else "last token (apple… ← fig…)"
    assert both in text
    document = experiment_document(result)
    assert [cell.at.read for cell in document.cells] == [None, None, ["fig", "plum"]] * 2
    assert document.cells[2].coords["position"] == "last token"


def test_plot_shows_the_written_and_the_read_token() -> None:
    drawn = finished(APART).plot("bars", "position").to_json()
    text = json.dumps(json.loads(drawn), ensure_ascii=False)
    assert "last token: apple, … ← fig, …" in text.replace("\\n", " ")


def test_white_space_tokens_are_shown_visibly() -> None:
    cell = replace(READ.cells[0], tokens=(" fig", "\n", " ", "\x1b[2J"), read=("  ",))
    assert hit_tokens_text(cell, 4) == "fig, \\n, ␣, \\x1b[2J ← ␣␣"
