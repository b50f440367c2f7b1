"""The prompts of most test files: a list of fruits and their number."""

from __future__ import annotations

FEWER = "corrupt fewer { count = count - 1 }"


VALUES = (
    "count in 3..9",
    'item in ["apple", "pear", "plum", "fig"]',
    'fruits = list(item, count, sep: " ")',
    'template "Part 1: {fruits} Count 1:"',
    'answer " {count}"',
)


def block(*lines: str) -> str:
    """`prompts fruit`, with further lines."""
    return "prompts fruit {\n" + "".join(f"  {line}\n" for line in (*VALUES, *lines)) + "}\n"


def head(*lines: str) -> str:
    """The start of a file before the experiments: the counting model and `prompts fruit`."""
    return f'mech 1\n\nmodel toy = zoo("counting")\n\n{block(*lines)}'


FRUIT = head(FEWER)
"""The start of a file with the corruption `fewer`."""
