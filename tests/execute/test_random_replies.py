"""Random rules that act while a model writes: kept keys and values give what whole passes give.

In 64 bits, so that no choice of a token hangs on rounding.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.options import Options
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.plan.passes import NAMES
from mechdsl.validate.check_file import Settings

from ..rules.models import double
from . import support
from .test_random_files import MORE, OWN, PROMPTS, QUIET, RUNS, rules

FAMILIES = ("gpt2", "llama", "gpt_neox", "mistral")
TOKENS = 4
PHASES = (
    "",
    "",
    "during prefill",
    "during each step",
    "during step 1..2",
    f"during step 2..{TOKENS - 1}",
    "after prefill",
)
SWEPT = ("during step s", "during step s..s + 1")
"""In a loop over steps."""
FOLLOWING = ("last token", "tokens *", "{cue token, last token}")


@st.composite
def acting(draw: Any, *, swept: bool) -> str:
    """A rule and when it acts; mostly one that follows the newest token."""
    rule = draw(rules(swept=swept).filter(lambda text: not text.startswith("observe")))
    before, at, behind = rule.partition(" at ")
    if at and draw(st.integers(0, 3)):
        word = next((w for w in (" with ", " to ", " by ", " onto ", " into ") if w in behind), "")
        rest = word + behind.partition(word)[2] if word else ""
        rule = f"{before} at {draw(st.sampled_from(FOLLOWING))}{rest}"
    if swept and not draw(st.integers(0, 3)):
        return f"for s in [0, 2, 1] {{ {rule} {draw(st.sampled_from(SWEPT))} }}"
    return f"{rule} {draw(st.sampled_from(PHASES))}".strip()


@st.composite
def cases(draw: Any) -> tuple[str, str, frozenset[str]]:
    """(family, file, passes that are switched off in the planned run)."""
    source, base = draw(st.permutations([run for run in RUNS if run != "noised"]))[:2]
    lines = [draw(acting(swept=number == 0)) for number in range(draw(st.integers(1, 2)))]
    sampled = draw(st.sampled_from(["", "", "with temperature 2, samples 2", 'until "w1"']))
    generate = f"generate {TOKENS} {sampled}".strip()
    text = (
        "seed 3\n"
        + MORE
        + support.experiment(
            "e",
            "prompts p",
            f"from {source} into {base}",
            *lines,
            generate,
            "measure length as raw",
        )
    )
    off = draw(st.sets(st.sampled_from(NAMES), max_size=2))
    return draw(st.sampled_from(FAMILIES)), text, frozenset(off)


def compare(case: tuple[str, str, frozenset[str]], folder: Any) -> None:
    family, text, off = case
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    python = Settings(python="run")
    plain, problems = support.try_file(
        text, folder, double(family), RunOptions(without=frozenset(NAMES), settings=python),
        prompts=PROMPTS,
    )  # fmt: skip
    small = RunOptions(without=off, settings=python, execution=Options(pass_tokens=40))
    planned, again = support.try_file(text, folder, double(family), small, prompts=PROMPTS)
    assert [(d.code, d.message) for d in problems] == [(d.code, d.message) for d in again]
    if plain is None or planned is None:
        assert has_errors(problems)
        assert plain is planned
        event("refused: " + next(d.code for d in problems if d.severity == "error"))
        return
    for one, other in zip(plain.experiments, planned.experiments, strict=True):
        assert one.cells == other.cells
        assert one.replies == other.replies, text
        base = one.replies.runs[one.base]
        changed = any(
            base.get(row) != own for each in one.replies.cells for row, own in each.items()
        )
        event(f"run, replies differ: {changed}")


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(case=cases())
def test_kept_keys_give_what_whole_passes_give(
    case: tuple[str, str, frozenset[str]], tmp_path: Any
) -> None:
    compare(case, tmp_path)


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("MECHDSL_RANDOM_FILES", "300")),
    deadline=None,
    suppress_health_check=QUIET,
)
@given(case=cases())
def test_kept_keys_give_what_whole_passes_give_at_length(
    case: tuple[str, str, frozenset[str]], tmp_path: Any
) -> None:
    compare(case, tmp_path)
