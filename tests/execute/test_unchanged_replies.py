"""Inert rows during generation: a rule without effect on the prompt may change new tokens, and
cells are sampled independently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.execute import unpatched_runs
from mechdsl.results.experiment_result import ExperimentResult, RepliesByPrompt

from .support import MODES, bare, experiment, run_file

SAME = "from other into clean"
DELTA = "measure length as delta"


def ran(folder: Path, *lines: str, mode: str = "planned", top: str = "") -> ExperimentResult:
    text = top + experiment("e", "prompts p", *lines)
    return run_file(text, folder, bare("gpt2"), MODES[mode])["e"]


def texts(found: RepliesByPrompt) -> list[Any]:
    return [[reply.ids for reply in own] for _, own in sorted(found.items())]


def inert(found: ExperimentResult) -> list[bool]:
    return found.measures[0].inert.tolist()


COPIES = {
    "an equal embedding": "patch embed at last token",
    "an equal first key": "patch k layer 0 head * at last token",
    "its own vector": "freeze resid_post layer 1 at last token",
    "a joined position": "freeze mlp_out layers 0..1 at {subject token, last token}",
    "all tokens": "freeze z layers * heads * at tokens *",
}
"""Rules that write the current values, as long as no token follows the prompt."""


@pytest.mark.parametrize("case", COPIES)
def test_rules_without_effect_on_the_prompt_change_replies(folder: Path, case: str) -> None:
    rule = COPIES[case]
    found = {mode: ran(folder, SAME, rule, "generate 4", DELTA, mode=mode) for mode in MODES}
    base = texts(found["plain"].replies.runs["clean"])
    wanted = [texts(cell) for cell in found["plain"].replies.cells]
    assert any(cell != base for cell in wanted)
    for mode, result in found.items():
        assert not any(inert(result)), mode
        assert [texts(cell) for cell in result.replies.cells] == wanted, mode


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_rules_without_effect_in_the_prefill_are_inert(
    folder: Path, case: str, tokens: int
) -> None:
    rule = f"{COPIES[case]} during prefill"
    found = ran(folder, SAME, rule, f"generate {tokens}", DELTA)
    assert all(inert(found))
    base = texts(found.replies.runs["clean"])
    plain = ran(folder, SAME, rule, f"generate {tokens}", DELTA, mode="plain")
    assert all(texts(cell) == base for cell in plain.replies.cells)
    assert all(texts(cell) == base for cell in found.replies.cells)


def test_patch_in_a_common_prefix_is_inert_during_generation(folder: Path) -> None:
    rule = "patch resid_post layer 1 at first token, last-item token, subject token"
    found = ran(folder, SAME, rule, "generate 4", DELTA)
    assert inert(found) == [True, True, False]
    plain = ran(folder, SAME, rule, "generate 4", DELTA, mode="plain")
    assert [texts(cell) for cell in found.replies.cells] == [
        texts(cell) for cell in plain.replies.cells
    ]


NOISY = """seed 3
prompts noisy {
  rows "data.jsonl"
  template "w40 {subject} w41 {cue} w42"
  answer " {a}"
  corrupt other { subject = alt }
  corrupt noised { add gaussian(std: 0.5, samples: 2) to embed at subject tokens }
}
"""


@pytest.mark.parametrize("runs", ["from noised into other", "from other into noised"])
def test_row_without_effect_has_reply_of_each_draw_of_noise(folder: Path, runs: str) -> None:
    lines = ("prompts noisy", runs, "scale resid_pre layer 1 at last token by 1", "generate 4")
    text = NOISY + experiment("e", *lines, DELTA)
    found = {mode: run_file(text, folder, bare("gpt2"), MODES[mode])["e"] for mode in MODES}
    assert all(inert(found["planned"]))
    wanted = [texts(cell) for cell in found["plain"].replies.cells]
    assert {len(own) for cell in wanted for own in cell} == {2}
    for mode, result in found.items():
        assert [texts(cell) for cell in result.replies.cells] == wanted, mode


def test_patch_of_equal_cached_keys_is_inert(folder: Path) -> None:
    rule = "patch k layer 1 head * at first token, subject token after prefill"
    found = ran(folder, SAME, rule, "generate 4", DELTA)
    assert inert(found) == [True, False] * 4


def test_write_after_the_measured_token_changes_replies(folder: Path) -> None:
    """Earlier logits equal the base run's, and the reply differs."""
    lines = (SAME, "ablate resid_post layer 1 at token -1 with zero", "generate 4")
    measure = "measure logit(answer) - logit(wrong) at cue token as delta"
    found = ran(folder, *lines, measure)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() == 0
    assert texts(found.replies.cells[0]) != texts(found.replies.runs["clean"])


@pytest.mark.parametrize("rule", ["scale mlp_out layer 1 at last token by 1", COPIES["all tokens"]])
def test_cells_without_effect_sample_separate_replies(folder: Path, rule: str) -> None:
    lines = (SAME, rule, "generate 4 with temperature 3", DELTA)
    found = {mode: ran(folder, *lines, mode=mode, top="seed 5\n") for mode in ("plain", "planned")}
    base = texts(found["plain"].replies.runs["clean"])
    wanted = [texts(cell) for cell in found["plain"].replies.cells]
    assert all(cell != base for cell in wanted)
    assert [texts(cell) for cell in found["planned"].replies.cells] == wanted
    assert not any(inert(found["planned"]))


def test_amount_without_effect_is_inert_at_each_step(folder: Path) -> None:
    rule = "for c in [1, 2] { scale mlp_out layer 1 at last token by c }"
    assert inert(ran(folder, SAME, rule, "generate 4", DELTA)) == [True, False]


# --- shared rows ----------------------------------------------------------------------------------

ALIKE = {
    "steps": ("ablate z layer 1 at last token with zero during step 1..3", "… during step 2..3"),
    "the prefill alone": ("ablate z layer 1 at last token with zero", "… during prefill"),
    "what follows": ("ablate z layer 1 at last token with zero", "… at token -1 with zero"),
    "keys that follow": (
        "block attention layers * from last token to {cue token, last token}",
        "… from last token to {cue token, token -1}",
    ),
    "behind the prefill": ("scale k layer 1 at subject token by 9", "… after prefill"),
}
"""Two rules with equal writes in the prompt."""


@pytest.mark.parametrize("case", ALIKE)
def test_rows_with_different_later_writes_are_not_shared(folder: Path, case: str) -> None:
    first, more = ALIKE[case]
    head, _, tail = more.removeprefix("… ").partition(" ")
    second = f"{first.partition(f' {head} ')[0]} {head} {tail}"
    if head in ("during", "after"):
        second = f"{first.partition(' during')[0]} {head} {tail}"
    rules = {"a": first, "b": second}
    text = "".join(
        experiment(name, "prompts p", rule, "generate 4", "measure length as delta")
        for name, rule in rules.items()
    )
    together = run_file(text, folder, bare("gpt2"), MODES["planned"])
    found = {name: texts(together[name].replies.cells[0]) for name in rules}
    for name, rule in rules.items():
        alone = ran(folder, rule, "generate 4", DELTA, mode="plain")
        assert found[name] == texts(alone.replies.cells[0]), rule
    assert found["a"] != found["b"]


def test_rows_with_different_reply_lengths_are_not_shared(folder: Path) -> None:
    rule = "ablate z layer 1 at last token with zero"
    text = experiment("a", "prompts p", rule, "generate 4", DELTA)
    text += experiment("b", "prompts p", rule, "generate 2", DELTA)
    found = run_file(text, folder, bare("gpt2"), MODES["planned"])
    assert found["a"].measures[0].base.max() == 4
    assert found["b"].measures[0].base.max() == 2


def test_cells_of_different_loop_values_are_sampled_independently(folder: Path) -> None:
    """Their rules may be equivalent, and names of loop variables don't matter."""
    text = "seed 5\n"
    for name, value in (("i", 1), ("j", 2), ("k", 1)):
        rule = f"scale z layer 1 at last token by {name} / {value}"
        rule = f"for {name} in {value}..{value} {{ {rule} }}"
        text += experiment(name, "prompts p", rule, "generate 4 with temperature 3", DELTA)
    planned = run_file(text, folder, bare("gpt2"), MODES["planned"])
    plain = run_file(text, folder, bare("gpt2"), MODES["plain"])
    found = {name: texts(plain[name].replies.cells[0]) for name in "ijk"}
    for name in "ijk":
        assert texts(planned[name].replies.cells[0]) == found[name]
    assert found["i"] == found["k"] != found["j"]


def test_measures_of_replies_alone_need_no_pass_over_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "for c in [1, 2] { scale resid_post layer 0 at tokens * by c }"
    given = rule, "generate 4", 'measure contains("w1") as raw'
    wanted = ran(folder, *given, mode="plain")
    passes: list[Any] = []
    monkeypatch.setattr(
        unpatched_runs, "compute_unpatched", lambda *args, **own: passes.append(own)
    )
    found = ran(folder, *given)
    assert [*map(texts, found.replies.cells)] == [*map(texts, wanted.replies.cells)]
    assert passes == []
