"""Tables by prompt values: W0720, as their cells are separate families, and values of all types."""

from __future__ import annotations

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.show.reports.table import group_by_value

FILE = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 2..4
  item in ["apple", "pear", "plum", "fig", "kiwi", "peach", "lemon", "lime", "mango"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}

experiment heads {
  prompts fruit limit ROWS
  ablate layer * head * at last token with zero
  measure logit(answer) as delta
  stats correct CORRECTION
  report table by count
}
"""


def said(rows: int, correction: str = "holm") -> list[str]:
    text = FILE.replace("ROWS", str(rows)).replace("CORRECTION", correction)
    found = check_source(Source(text)).diagnostics
    return [each.message for each in found if each.code == "W0720"]


@pytest.mark.parametrize(
    ("rows", "correction", "expected"),
    [
        # 48 cells: 2^(1 − n) · 48 is below 0.05 from 11 rows on
        (
            24,
            "holm",
            "in the table by count, with 7 to 9 prompts, no cell can be significant after "
            "correction if more than 12 of the 48 cells are tested",
        ),
        (30, "holm", None),  # 11 of one count
        (24, "bh", None),
        (24, "none", None),
        # 16 cells for all rows: 2^(1 − n) · 16 is below 0.05 from 10 rows on
        (
            12,
            "holm",
            ("in the table by count, with 4 prompts, no cell can be significant after correction"),
        ),
        (
            9,
            "holm",
            "with 9 prompts, no cell can be significant after correction if more than 12 of the "
            "16 cells are tested",
        ),
    ],
)
def test_table_by_value_without_possible_significance_is_a_warning(
    rows: int, correction: str, expected: str | None
) -> None:
    assert said(rows, correction) == ([] if expected is None else [expected])


def test_table_by_a_list_has_the_cells_of_each_prompt() -> None:
    """A list isn't hashable; its text names it."""
    text = FILE.replace("ROWS", "4").replace("CORRECTION", "holm").replace("by count", "by fruits")
    result = mechdsl.run(text, write_reports=False)["heads"]
    lists = [str(value) for value in result.row_values["fruits"]]
    assert len(set(lists)) == 4
    grouped = group_by_value(result, "fruits")
    names = [cell.coords["fruits"] for cell in grouped.cells]
    assert list(dict.fromkeys(names)) == sorted(lists)
    count = len(result.cells)
    for row, name in enumerate(lists):
        part = slice(names.index(name), names.index(name) + count)
        expected = np.full((count, 4), np.nan)
        expected[:, row] = result.measures[0].patched[:, row]
        np.testing.assert_array_equal(grouped.measures[0].patched[part], expected)
