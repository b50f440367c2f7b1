"""The work of planning and running grows linearly with rows and with cells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechdsl.cli.entry import app

HEAD = """mech 1

model tiny = zoo("induction")
"""
DRAWN = """
prompts repeats {
  word in words(tiny)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  corrupt scrambled { half = list(word, 4, sep: " ", distinct: true) }
}
"""
FROM_FILE = """
prompts repeats {
  rows "rows.csv"
  cue = one
  template "{one} {two} {cue}"
  answer " {two}"
  corrupt scrambled { one = three }
}
"""
ROWS = """
experiment heads {
  model tiny
  prompts repeats limit SIZE
  from scrambled into clean
  patch layer 1 head 1 at last token
  ablate layer 0 head 0 at cue token with mean
  measure logit(answer) - logit(answer of scrambled) as delta
  stats bootstrap(100)
  report table
}

experiment norms {
  model tiny
  prompts repeats limit SIZE
  observe norm resid_post layer 1 at last token
}
"""
CELLS = """
experiment cells {
  model tiny
  prompts repeats limit 4
  for c in 1..SIZE { scale resid_post layers * at last token by c }
  measure logit(answer) as raw
  stats bootstrap(100)
}
"""
MOST = 2.7
"""Maximum growth of the added work when the added size doubles. Linear work doubles and quadratic
work quadruples; the margin allows for partly filled batches."""


def added_work(folder: Path, command: str, text: str, sizes: tuple[int, int, int]) -> float:
    """Ratio of the calls added from the second to the third size to those added before."""
    counts: list[int] = []
    for size in sizes:
        path = folder / f"{size}.mech"
        path.write_text(HEAD + text.replace("SIZE", str(size)), encoding="utf-8")
        arguments = [command, str(path), *(["--no-store"] if command == "run" else [])]
        if not counts:
            run(arguments)  # for imports and caches
        counts.append(calls(arguments))
    first, second, third = counts
    return (third - second) / (second - first)


def run(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert not done.return_value, done.output


def calls(arguments: list[str]) -> int:
    """Number of function calls in Python and C, which other processes don't affect."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run(arguments)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "text"),
    [
        pytest.param("plan", FROM_FILE + ROWS, id="plan-file"),
        pytest.param("run", FROM_FILE + ROWS, id="run-file"),
        pytest.param("plan", DRAWN + ROWS, id="plan-drawn", marks=pytest.mark.slow),
        pytest.param("run", DRAWN + ROWS, id="run-drawn", marks=pytest.mark.slow),
    ],
)
def test_work_is_linear_in_rows(tmp_path: Path, command: str, text: str) -> None:
    words = ["apple", "river", "stone", "cloud", "tiger", "lemon"]
    table = [",".join(words[(n + i) % 6] for i in range(3)) for n in range(240)]
    (tmp_path / "rows.csv").write_text("\n".join(["one,two,three", *table]), encoding="utf-8")
    assert added_work(tmp_path, command, text, (60, 120, 240)) < MOST


@pytest.mark.parametrize("command", ["plan", "run"])
def test_work_is_linear_in_cells(tmp_path: Path, command: str) -> None:
    assert added_work(tmp_path, command, DRAWN + CELLS, (20, 40, 80)) < MOST
