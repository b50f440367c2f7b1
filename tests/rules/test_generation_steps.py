"""Which positions follow the newest token during generation, and in which steps rules act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.program.spec import Generation
from mechdsl.resolve.types import PositionTargets, ResolvedExperiment, ResolvedRule, StepRanges

FILE = """
mech 1

{top}
param n = 2
model toy = zoo("counting")

prompts fruit {{
  count in 2..5
  item in ["apple", "pear"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
  corrupt other {{ item = other(item) }}
}}

experiment e {{
  model toy
  prompts fruit limit 4
  from other into clean
  {rule}
  {generate}
  measure length as raw
}}
"""


def checked(rule: str, generate: str = "generate 8", top: str = "") -> CheckedFile:
    text = FILE.format(rule=rule, generate=generate, top=top)
    return check_source(Source(text, Path("a.mech")), CheckSettings())


def resolved(rule: str, generate: str = "generate 8", top: str = "") -> ResolvedExperiment:
    found = checked(rule, generate, top)
    assert not has_errors(found.diagnostics), render_full(found.diagnostics)
    (experiment,) = found.experiments
    return experiment


def one(rule: str) -> ResolvedRule:
    (found,) = resolved(rule).rules
    return found


def kinds(targets: PositionTargets) -> list[str]:
    """For each position, the reply tokens that it follows: `newest`, `every` or none."""
    assert targets.every <= targets.newest
    return [
        "every" if key in targets.every else "newest" if key in targets.newest else ""
        for key in targets.written
    ]


FOLLOWING = {
    "last token": ["newest"],
    "tokens *": ["every"],
    "last-item token, last token": ["", "newest"],
    "{last-item token, last token}": ["newest"],
    "{last token, tokens *}": ["every"],
    "{last-item token, {first token, last token}}": ["newest"],
    "last token - 1": [""],
    "{last token, last-item token} - 1": [""],
    "first token": [""],
    "token -1": [""],
    "tokens -2..-1": [""],
    "tokens 0..3": [""],
    "last token of fruits": [""],
    "tokens except last-item token": [""],
    "tokens between first token and last token": [""],
    "token * align right": [""] * 14,
    "each item token": [""] * 5,
}


@pytest.mark.parametrize("at", FOLLOWING)
def test_positions_follow_the_reply_or_stay_in_the_prompt(at: str) -> None:
    found = kinds(one(f"ablate resid_post layer 1 at {at} with zero").positions)
    assert found[: len(FOLLOWING[at])] == FOLLOWING[at][: len(found)]
    assert set(found) == set(FOLLOWING[at])


@pytest.mark.parametrize("at", ["last token", "tokens *"])
def test_positions_without_generation_follow_no_reply(at: str) -> None:
    text = FILE.format(rule=f"freeze z layer 1 at {at}", generate="", top="")
    text = text.replace("measure length", "measure logit(answer)")
    (experiment,) = check_source(Source(text, Path("a.mech")), CheckSettings()).experiments
    assert kinds(experiment.rules[0].positions) == [""]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("patch z layer 1 at last-item token onto last token", "newest"),
        ("patch z layer 1 at last token onto last-item token", ""),
        ("swap z layer 1 at last-item token with last token", "newest"),
        ("swap z layer 1 at last token with last-item token", "newest"),
        ("set z layer 1 at last token to 0.5", "newest"),
        ("add value(mlp_out layer 1 at last-item token) to embed at last token", "newest"),
        ("replace block layer 1 with block layer 2", "every"),
    ],
)  # fmt: skip
def test_written_position_decides_whether_a_rule_follows_the_reply(
    rule: str, expected: str
) -> None:
    assert kinds(one(rule).positions) == [expected]


def test_queries_and_keys_follow_the_reply_independently() -> None:
    found = one("block attention layer 1 from last token to last-item token, last token")
    assert found.edge is not None
    assert kinds(found.positions) == ["newest"]
    assert kinds(found.edge.keys) == ["", "newest"]
    found = one("set attention layer 1 from last-item token to tokens * to uniform")
    assert found.edge is not None
    assert (kinds(found.positions), kinds(found.edge.keys)) == ([""], ["every"])


STEPS = {
    "": (None, True),
    "during each step": (None, True),
    "during step *": (None, True),
    "during prefill": ((0, 0), False),
    "during step 0": ((0, 0), False),
    "during step 3": ((3, 3), True),
    "during step 2..5": ((2, 5), True),
    "during step 0..7": ((0, 7), True),
    "during step n": ((2, 2), True),
    "during step n - 1..n + 3": ((1, 5), True),
}


@pytest.mark.parametrize("during", STEPS)
def test_during_clause_sets_the_steps_of_a_rule(during: str) -> None:
    steps, later = STEPS[during]
    found = one(f"scale z layer 1 at last token by 2 {during}")
    assert (found.acts_later, found.after_prefill) == (later, False)
    assert found.steps == (None if steps is None else StepRanges((), {(): steps}))
    assert found.in_prefill == (steps is None or steps[0] == 0)


def test_loop_over_steps_sets_step_ranges() -> None:
    rule = "for t in [1, 0] { for s in 0..1 { scale z layer 1 at last token by 2 DURING } }"
    found = one("for s in 0..1 { scale z layer 1 at last token by 2 during step s..s + 2 }")
    assert found.steps == StepRanges(("s",), {(0,): (0, 2), (1,): (1, 3)})
    assert found.acts_later
    assert found.in_prefill
    found = one(rule.replace("DURING", "during step s..t + 1"))
    ends = {(0, 0): (0, 2), (0, 1): (1, 2), (1, 0): (0, 1), (1, 1): (1, 1)}
    assert found.steps == StepRanges(("t", "s"), ends)
    assert found.axes == {"t", "s"}
    found = one("for s in [0] { scale z layer 1 at last token by 2 during step s..s }")
    assert not found.acts_later


BAD_STEPS = {
    "for s in 0..3 { scale z layer 1 at last-item token by 2 during step s }": "E0207",
    "for s in 6..9 { scale z layer 1 at last token by 2 during step s }": "E0207",
    "for s in 0..3 { scale z layer 1 at last token by 2 during step s - 1 }": "E0207",
    "for s in 0..3 { scale z layer 1 at last token by 2 during step s..2 }": "E0207",
    "for s in [0.5] { scale z layer 1 at last token by 2 during step s }": "E0207",
    "for s in [z, q] { scale s layer 1 at last token by 2 during step s }": "E0207",
    "for s in 0..3 { replace block layer 1 with identity during step s }": "E0207",
    "scale z layer 1 at last token by 2 during step 50%": "E0207",
    "scale z layer 1 at last token by 2 during step -1": "E0207",
    "scale z layer 1 at last token by 2 during step s": "E0201",
}


@pytest.mark.parametrize("rule", BAD_STEPS)
def test_invalid_steps_are_errors(rule: str) -> None:
    found = [each.code for each in checked(rule).diagnostics if each.severity == "error"]
    assert found == [BAD_STEPS[rule]]


@pytest.mark.parametrize(
    "rule",
    [
        "freeze resid_post layer 1 at answer token",
        "patch resid_post layer 1 at last token onto answer token",
    ],
)
def test_rule_at_answer_tokens_with_generate_is_an_error(rule: str) -> None:
    """The model generates the completion, even if a measure reads the answer after the prompt."""
    text = FILE.format(rule=rule, generate="generate 5", top="")
    text = text.replace("measure length as raw", "measure logprob(answer) as delta")
    found = check_source(Source(text, Path("a.mech")), CheckSettings()).diagnostics
    assert [each.code for each in found] == ["E0108"]


@pytest.mark.parametrize("at", ["last-item token", "last token", "tokens *"])
def test_after_prefill_rule_acts_neither_in_the_prefill_nor_in_later_steps(at: str) -> None:
    found = one(f"scale v layer 1 head 2 at {at} by 2 after prefill")
    assert found.after_prefill
    assert not found.acts_later
    assert not found.in_prefill


def test_all_fills_of_a_rule_act_in_the_same_steps() -> None:
    found = resolved("ablate z layer 1 at last token with zero, mean during step 1..2").rules
    assert [rule.steps for rule in found] == [StepRanges((), {(): (1, 2)})] * 2


def test_rule_at_a_prompt_position_acts_only_in_the_prefill() -> None:
    assert not one("scale z layer 1 at last-item token by 2").acts_later


# --- generation options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("generate 8", {"tokens": 8}),
        ("generate n", {"tokens": 2}),
        ('generate 8 until "\\n", "Q:", "\\n"', {"tokens": 8, "stops": ("\n", "Q:")}),
        ("generate 8 with temperature 0.5", {"tokens": 8, "temperature": 0.5}),
        ("generate 8 with samples n", {"tokens": 8, "temperature": 1.0, "samples": 2}),
        (
            'generate 8 with top_k 5, top_p 0.9 until "{"',
            {"tokens": 8, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "stops": ("{",)},
        ),
    ],
)
def test_generate_line_sets_generation_options(line: str, fields: dict[str, Any]) -> None:
    found = resolved("freeze z layer 1 at last token", line, "seed 3").generation
    assert found is not None
    assert found == Generation(span=found.span, **fields)


@pytest.mark.parametrize("setting", ["top_k 2.5", "samples 1.5", "samples 0", "temperature 0"])
def test_invalid_generation_option_is_an_error(setting: str) -> None:
    found = checked("freeze z layer 1 at last token", f"generate 8 with {setting}", "seed 1")
    assert [each.code for each in found.diagnostics] == ["E0207"]


def test_generation_key_depends_on_options_and_sampling_seed() -> None:
    lines = [
        *("generate 8", "generate 9", 'generate 8 until "a"', 'generate 8 until "a", "b"'),
        *("generate 8 with temperature 1", "generate 8 with temperature 2"),
        *("generate 8 with top_k 5", "generate 8 with top_p 0.5", "generate 8 with samples 2"),
    ]
    found = [
        resolved("freeze z layer 1 at last token", line, "seed 3").generation for line in lines
    ]
    keys = [each.key(3) for each in found if each is not None]
    assert len(set(keys)) == len(lines)
    greedy, drawn = found[0], found[4]
    assert greedy is not None
    assert drawn is not None
    assert greedy.key(3) == greedy.key(4)
    assert drawn.key(3) != drawn.key(4)


def test_generate_length_is_limited_by_model_positions() -> None:
    """The last token is predicted but isn't an input."""
    longest = max(
        len(row.ids)
        for run in ("clean", "other")
        for row in resolved("freeze z layer 1 at last token").table.runs[run].rows
    )
    fits = 512 - longest + 1
    assert not has_errors(checked("freeze z layer 1 at last token", f"generate {fits}").diagnostics)
    (problem,) = checked("freeze z layer 1 at last token", f"generate {fits + 1}").diagnostics
    assert problem.code == "E0207"
    assert f"generate {fits}`" in problem.help_text


CLASSIFIER = Path(__file__).parents[2] / "docs" / "errors" / "data" / "classifier"


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("BertForMaskedLM", "in which tokens see later tokens"),
        ("BertForSequenceClassification", "which predicts no tokens"),
    ],
)
def test_generate_with_a_model_that_predicts_no_next_token_is_an_error(
    architecture: str, why: str, tmp_path: Path
) -> None:
    for path in CLASSIFIER.iterdir():
        text = path.read_text("utf-8")
        if path.name == "config.json":
            config = json.loads(text)
            config["architectures"] = [architecture]
            text = json.dumps(config)
        (tmp_path / path.name).write_text(text, "utf-8")
    text = FILE.format(rule="freeze z layer 1 at last token", generate="generate 8", top="")
    text = text.replace('zoo("counting")', f'local("{tmp_path}")')
    found = check_source(Source(text, tmp_path / "a.mech"), CheckSettings()).diagnostics
    said = [each for each in found if "`generate` with" in each.message]
    assert [each.code for each in said] == ["E0108"]
    assert why in said[0].message
