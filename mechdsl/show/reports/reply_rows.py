"""What rows wrote, side by side, with what differs from the base run: of `report texts`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from mechdsl.base.plural import plural
from mechdsl.base.reply import Reply
from mechdsl.program import spec
from mechdsl.resolve.cell_key import CellKey
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.seen_image import SHOWN

_WORD = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""A word or a sign with the white space in front of it: what is compared."""
_ALIKE = 0.5
"""Share of equal words from which single words are marked, and not the whole text."""
_NAMED = 3
"""Cells that are named where several wrote the same."""
GOES_ON = "…"
"""Behind a reply that is as long as it may be."""
BROKEN = " (NaN or infinite)"
"""Behind one that could go on no further."""


class Part(NamedTuple):
    """A piece of a reply: as in the base run, new, or gone from there."""

    text: str
    kind: Literal["same", "new", "gone"] = "same"


@dataclass(frozen=True)
class WrittenLine:
    """What a run or some cells wrote behind a prompt."""

    label: str
    replies: tuple[tuple[Part, ...], ...]
    """One for each sample and draw of noise; none where all are those of the base run."""
    runs: bool
    """Whether it is an unpatched run."""


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt with all that was written behind it."""

    number: int
    """From 1, in the order of the experiment."""
    text: str
    lines: tuple[WrittenLine, ...]


def written_prompts(result: ExperimentResult, report: spec.Report) -> list[WrittenPrompt]:
    """The first prompts, `top n` of them."""
    rows = list(result.replies.prompts)[: report.top or SHOWN]
    return [
        WrittenPrompt(n, result.replies.prompts[row], tuple(_lines(result, row)))
        for n, row in enumerate(rows, start=1)
    ]


def said_of(result: ExperimentResult, shown: Sequence[WrittenPrompt]) -> list[str]:
    """What is shown, and how."""
    if not shown:
        return ["no replies to show: they weren't kept with these results"]
    count = f"{len(shown)} of {plural(len(result.replies.prompts), 'prompt')}, the first ones"
    said = [count]
    if not all(line.runs for each in shown for line in each.lines):
        base = result.shown(result.base)
        said = [
            f"{count}; what differs from {base} is marked, word by word where half of the words "
            "are the same"
        ]
    if any(len(line.replies) > 1 for each in shown for line in each.lines):
        said.append("below each other: one reply for each sample, and each draw of noise")
    if any(part.text == GOES_ON for each in shown for line in each.lines
           for reply in line.replies for part in reply):  # fmt: skip
        said.append(f"{GOES_ON} behind a reply that is as long as it may be")
    return said


def _lines(result: ExperimentResult, row: int) -> Iterator[WrittenLine]:
    """The unpatched runs, then the cells; those that wrote the same in one line."""
    found = result.replies
    for run, texts in found.runs.items():
        if row in texts:
            plain = tuple((Part(each.text), *_open(each)) for each in texts[row])
            yield WrittenLine(result.shown(run), plain, runs=True)
    alike: dict[tuple[object, ...], list[CellKey]] = {}
    first: dict[tuple[object, ...], tuple[Sequence[Reply], Sequence[Reply]]] = {}
    for cell, texts in zip(result.cells, found.cells, strict=False):
        if row not in texts or not (cell.site or cell.coords):
            continue  # without rules the one cell is the base run
        base = _base(result, row, cell)
        key = (tuple((each.text, each.ended) for each in texts[row]), id(base))
        alike.setdefault(key, []).append(cell)
        first[key] = (texts[row], base)
    for key, cells in alike.items():
        replies, base = first[key]
        parts = tuple(
            (*compared(base[n % len(base)].text if base else None, each.text), *_open(each))
            for n, each in enumerate(replies)
        )
        same = bool(base) and all(
            _equal(each, base[n % len(base)]) for n, each in enumerate(replies)
        )
        yield WrittenLine(_label(cells), () if same else parts, runs=False)


def _equal(one: Reply, other: Reply) -> bool:
    return (one.text, one.ended) == (other.text, other.ended)


def _open(reply: Reply) -> tuple[Part, ...]:
    behind = {"length": GOES_ON, "broken": BROKEN}.get(reply.ended)
    return () if behind is None else (Part(behind),)


def _base(result: ExperimentResult, row: int, cell: CellKey) -> Sequence[Reply]:
    """What the cell's base run wrote; nothing where several stand side by side, and it can't be
    told which of them is the cell's."""
    runs: Mapping[str, Mapping[int, tuple[Reply, ...]]] = result.replies.runs
    names = result.base.split(", ")
    there = [run for run in runs if run.partition(" (")[0] in names and row in runs[run]]
    if len(there) > 1:
        values = {str(value) for value in cell.coords.values()}
        there = [run for run in there if values.issuperset(run[:-1].partition(" (")[2].split(", "))]
    return runs[there[0]][row] if len(there) == 1 else ()


def _label(cells: Sequence[CellKey]) -> str:
    names = [cell.name for cell in cells[:_NAMED]]
    more = len(cells) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def compared(base: str | None, text: str) -> tuple[Part, ...]:
    """A text with what is new in it, and what is gone; as a whole where less than half of the words
    are those of the base run's."""
    if base is None or text == base:
        return (Part(text),) if text else ()
    before, now = _WORD.findall(base), _WORD.findall(text)
    matcher = SequenceMatcher(None, before, now, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return (Part(text, "new"),) if text else (Part(base, "gone"),)
    parts: list[Part] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(Part("".join(now[c:d])))
            continue
        gone, new = "".join(before[a:b]), "".join(now[c:d])
        parts += [Part(gone, "gone")] if gone else []
        parts += [Part(new, "new")] if new else []
    return tuple(parts)
