"""Every position expression, end to end: read and written tokens equal manually counted ones, in
prompts of different lengths and in runs whose positions differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from ..reference.forward import forward
from ..reference.points import Point, copied
from .support import (
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    Array,
    Prompt,
    Record,
    Runs,
    agree,
    bare,
    difference,
    differences,
    each_patched,
    experiment,
    ids_of,
    prompt,
    run_file,
    unpatched,
    write_rows,
)

FAMILIES = ("gpt2", "llama")
SITE = Point("resid_pre", 1)

Where = Callable[[Prompt, Prompt], Runs]
"""(source, base) → the runs of one cell; empty if the row lacks the position."""


def same(places: Callable[[Prompt], list[int]]) -> Where:
    """One run that joins these tokens, found in each prompt."""
    return lambda source, base: [(places(source), places(base))]


def nth_item(n: int) -> Where:
    def where(source: Prompt, base: Prompt) -> Runs:
        if n > min(len(source.items), len(base.items)):
            return []
        return [([source.items[n - 1]], [base.items[n - 1]])]

    return where


def counted(index: int) -> Where:
    """A position counted from the start, or from the end if negative."""

    def where(source: Prompt, base: Prompt) -> Runs:
        size = len(base.ids)
        if not -size <= index < size:
            return []
        at = index % size
        return [([at], [at])]

    return where


def subject_part(part: str) -> Where:
    """`first`, `middle`, `last` of the subject; a single token is last, middles are averaged."""

    def where(source: Prompt, base: Prompt) -> Runs:
        n = len(base.subject)
        chosen = {
            "first": range(1) if n > 1 else range(0),
            "middle": range(1, n - 1),
            "last": range(n - 1, n),
        }[part]
        return [([source.subject[i]], [base.subject[i]]) for i in chosen]

    return where


def between(part: str) -> Where:
    """The three tokens after the subject: `w41`, the cue, the last."""
    offset = {"first": 2, "middle": 1, "last": 0}[part]
    return lambda source, base: [([source.last - offset], [base.last - offset])]


def outside_subject(p: Prompt) -> list[int]:
    return [i for i in range(1, p.last + 1) if i not in p.subject]


@dataclass(frozen=True)
class Case:
    """A position, the source run, and per cell its label and its tokens."""

    at: str
    run: str
    cells: dict[str | None, Where]
    """A single cell without an axis has the label None."""


def one(at: str, run: str, places: Callable[[Prompt], list[int]]) -> Case:
    return Case(at, run, {None: same(places)})


LONGEST = 1 + 4 + 1 + 4 + 3

CASES: dict[str, Case] = {
    "last_token": one("last token", "longer", lambda p: [p.last]),
    "first_token": one("first token", "longer", lambda p: [1]),
    "subject_token": one("subject token", "other", lambda p: [p.subject[-1]]),
    "subject_token_elsewhere": one("subject token", "longer", lambda p: [p.subject[-1]]),
    "subject_tokens": one("subject tokens", "other", lambda p: [*p.subject]),
    "subject_tokens_elsewhere": one("subject tokens", "longer", lambda p: [*p.subject]),
    "first_of_subject": one("first token of subject", "other", lambda p: [p.subject[0]]),
    "behind_the_subject": one("subject token + 1", "other", lambda p: [p.subject[-1] + 1]),
    "before_the_subjects_last": one("subject token - 1", "longer", lambda p: [p.subject[-1] - 1]),
    "each_token_of_subject": Case(
        "each token of subject",
        "other",
        {f"subject {part}": subject_part(part) for part in ("first", "middle", "last")},
    ),
    "each_item": Case("each item token", "longer", {f"item {n}": nth_item(n) for n in range(1, 4)}),
    "second_item": Case("item 2 token", "turned", {None: nth_item(2)}),
    "first_item": one("first-item token", "longer", lambda p: [p.items[0]]),
    "last_item": one("last-item token", "longer", lambda p: [p.items[-1]]),
    "last_item_of_list": one("last-item of xs token", "longer", lambda p: [p.items[-1]]),
    "list_tokens": one("xs tokens", "turned", lambda p: [*p.items]),
    "from_the_end": one("token -2", "longer", lambda p: [p.last - 1]),
    "from_the_start": one("token 3", "longer", lambda p: [3]),
    "counted_sweep": Case(
        "token -3..-1",
        "longer",
        {
            str(-k): same(lambda p, k=k: [p.last + 1 - k])  # type: ignore[misc]
            for k in (3, 2, 1)
        },
    ),
    "counted_list": Case(
        "token 1, 3", "longer", {str(i): same(lambda p, i=i: [i]) for i in (1, 3)}
    ),  # type: ignore[misc]
    "counted_joined": one("tokens -3..-1", "longer", lambda p: [p.last - 2, p.last - 1, p.last]),
    "aligned_right": Case(
        "token * align right", "other", {str(i): counted(i) for i in range(-LONGEST, 0)}
    ),
    "aligned_left": Case(
        "token * align left", "other", {str(i): counted(i) for i in range(LONGEST)}
    ),
    "all_joined": one("tokens *", "other", lambda p: [*range(p.last + 1)]),
    "between": one(
        "tokens between subject token + 1 and last token",
        "longer",
        lambda p: [p.last - 2, p.last - 1, p.last],
    ),
    "each_between": Case(
        "each token between subject token + 1 and last token",
        "longer",
        {f"between {part}": between(part) for part in ("first", "middle", "last")},
    ),
    "except": one("tokens except subject tokens", "other", outside_subject),
    "joined": one("{cue token, last token}", "longer", lambda p: [p.cue, p.last]),
    "swept": Case(
        "cue token, last token",
        "longer",
        {"cue token": same(lambda p: [p.cue]), "last token": same(lambda p: [p.last])},
    ),
    "literal": one('"w41" token', "longer", lambda p: [p.last - 2]),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("positions")
    write_rows(folder)
    return folder


@cache
def results(folder: Path, family: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file."""
    text = "".join(
        experiment(
            name,
            "prompts p",
            f"from {case.run} into clean",
            f"patch resid_pre layer 1 at {case.at}",
            DIFFERENCE,
        )
        for name, case in CASES.items()
    )
    return run_file(text, folder, bare(family), MODES[mode])


@cache
def expected(family: str, name: str) -> Array:
    case = CASES[name]
    found = np.full((len(case.cells), len(ROWS)), np.nan)
    for n, record in enumerate(ROWS):
        base, source = prompt(record), prompt(record, case.run)
        seen = unpatched(family, source)[1]
        runs = [
            (cell, at) for cell, to in enumerate(case.cells.values()) for at in to(source, base)
        ]
        edits = [copied([SITE], seen, *at) for _, at in runs]
        values: dict[int, list[float]] = {}
        for (cell, _), logits in zip(runs, each_patched(family, base, edits), strict=True):
            values.setdefault(cell, []).append(difference(logits, record))
        for cell, several in values.items():
            found[cell, n] = np.mean(several)
    return found


@pytest.mark.parametrize("family", some(FAMILIES, ["llama"]))
@pytest.mark.parametrize("name", list(CASES))
def test_position_names_the_reference_tokens(shared: Path, name: str, family: str) -> None:
    for mode in MODES:
        found = results(shared, family, mode)[name]
        labels = list(CASES[name].cells)
        assert found.axes == (() if labels == [None] else ("position",))
        if labels != [None]:
            assert [cell.coords["position"] for cell in found.cells] == labels
        agree(found.measures[0], expected(family, name), differences(family, ROWS), large=0.02)


def test_rows_without_an_occurrence_are_excluded_and_reduce_n(shared: Path) -> None:
    found = results(shared, "llama", "planned")["each_item"]
    shorter = [min(len(r["words"]), len(r["more"])) for r in ROWS]
    expected_n = [sum(n >= k for n in shorter) for k in range(1, 4)]
    assert found.statistics[0].n.tolist() == expected_n
    # No row has the fourth (or fifth) item in both runs: no cell, but a line that says so.
    assert "item 4, item 5" in found.conventions["positions"]


def test_cells_list_the_words_at_their_position(shared: Path) -> None:
    found = results(shared, "llama", "planned")
    assert set(found["last_item"].cells[0].tokens) == {r["words"][-1] for r in ROWS}
    assert found["last_token"].cells[0].tokens == ("w42",)
    assert set(found["each_item"].cells[1].tokens) == {
        r["words"][1] for r in ROWS if len(r["more"]) > 1
    }


# --- lists with separators, in two parts ----------------------------------------------------------

PARTS = """
prompts parts {
  rows "data.jsonl"
  part1 = list(item, from: words, sep: " w43 ")
  part2 = list(item, from: more, sep: " ")
  template "{part1} w40 {part2} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  corrupt turned { words = turned }
}
"""


@dataclass(frozen=True)
class Parts:
    """Words, and positions of the two lists and of the separators of the first one."""

    ids: list[int]
    first: list[int]
    seps: list[int]
    second: list[int]


def parts(record: Record, run: str = "clean") -> Parts:
    items = record["turned" if run == "turned" else "words"]
    words = " w43 ".join(items).split()
    n = len(words)
    whole = [*words, "w40", *record["more"], "w41", record["cue"], "w42"]
    second = [n + 2 + i for i in range(len(record["more"]))]
    return Parts(ids_of(whole), [*range(1, n + 1, 2)], [*range(2, n, 2)], second)


PART_CASES: dict[str, tuple[str, Callable[[Parts, int], list[int]]]] = {
    "last_of_first": ("last-item of part1 token", lambda p, cell: [p.first[-1]]),
    "last_of_second": ("last-item of part2 token", lambda p, cell: [p.second[-1]]),
    "last_of_all": ("last-item token", lambda p, cell: [p.second[-1]]),
    "first_of_second": ("first-item of part2 token", lambda p, cell: [p.second[0]]),
    "each_separator": ("each sep of part1 token", lambda p, cell: p.seps[cell : cell + 1]),
    "items_joined": ("item of part1 tokens", lambda p, cell: p.first),
    "part_joined": ("part1 tokens", lambda p, cell: sorted(p.first + p.seps)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_list_items_and_separators_are_distinguished(folder: Path, family: str) -> None:
    text = "".join(
        experiment(
            name,
            "prompts parts",
            "from turned into clean",
            f"patch resid_pre layer 1 at {at}",
            DIFFERENCE,
        )
        for name, (at, _) in PART_CASES.items()
    )
    found = {
        mode: run_file(text, folder, bare(family), options, prompts=PROMPTS + PARTS)
        for mode, options in MODES.items()
    }
    for name, (_, where) in PART_CASES.items():
        expected = np.full(found["planned"][name].measures[0].patched.shape, np.nan)
        base = []
        for n, record in enumerate(ROWS):
            clean, turned = parts(record), parts(record, "turned")
            logits = forward(family, bare(family), clean.ids).logits
            seen = forward(family, bare(family), turned.ids).seen
            base.append(difference(logits, record))
            for cell in range(len(expected)):
                read, written = where(turned, cell), where(clean, cell)
                if written:
                    edits = copied([SITE], seen, read, written)
                    changed = forward(family, bare(family), clean.ids, edits).logits
                    expected[cell, n] = difference(changed, record)
        for results in found.values():
            agree(results[name].measures[0], expected, np.array(base), large=0.0)
