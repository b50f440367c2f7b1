"""Commands on a file that generates text."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

import mechdsl
from mechdsl.base import limits

from .. import fruit
from .conftest import Command, command

__all__ = ["command"]

TEXT = (
    "mech 1\nseed 3\n"
    + fruit.FRUIT.removeprefix("mech 1\n")
    + """
experiment e {
  prompts fruit limit 8
  from clean into fewer
  patch resid_post layer 1..2 at last-item token
  scale z layer 1 head 1 at last token by 2 during step 2..3
  scale k layer 2 head 0 at last-item token by 3 after prefill
  block attention layer 3 from tokens * to first token during prefill
  generate 6 HOW
  measure exact_match as delta
  measure logit(answer) as delta
  stats correct none
}
"""
)
DRAWN = 'with temperature 0.5, top_k 9, top_p 0.8, samples 2 until "Part", "\\n"'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.mech"
    path.write_text(TEXT.replace("HOW", ""), encoding="utf-8")
    return path


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.mech"
    path.write_text(TEXT.replace("HOW", DRAWN), encoding="utf-8")
    return path


def flat(text: str) -> str:
    return " ".join(text.split())


def test_explain_states_when_rules_act(command: Command, file: Path) -> None:
    said = flat(command("explain", file).out)
    assert "generates up to 6 tokens after each prompt" in said
    rules = [part.partition(" patch ")[0] for part in said.split(" acts ")[1:]]
    assert rules[0].startswith("in the prefill scale z")
    newest = "at the newest token, which extends `last token`"
    assert rules[1].startswith(f"in steps 2 to 3 {newest} scale k")
    assert rules[2].startswith("after the prefill, on the prompt's cache block")
    assert rules[3].startswith("in the prefill cells: 2")


def test_explain_lists_prefill_and_generation_steps_of_a_rule(command: Command, file: Path) -> None:
    text = file.read_text("utf-8").replace(" during prefill", "")
    file.write_text(text, "utf-8")
    said = flat(command("explain", file).out)
    newest = "in steps 1 to 5 at the newest token, which extends `tokens *`"
    assert f"acts in the prefill, then {newest}" in said


def test_graph_has_a_node_per_generating_run(command: Command, drawn: Path) -> None:
    said = command("graph", drawn, "--format", "text").out
    how = (
        "up to 6 tokens, sampled at temperature 0.5, from the 9 most likely tokens, from "
        "the tokens that make up 80 % of the probability"
    )
    nodes = re.findall(r"(n\d+)  Generate · (.*)  ← ", said)
    assert {how + ', 2 samples, until "Part" or "\\n"'} == {text for _, text in nodes}
    assert len(nodes) == 3, "of the cells, of base and source"
    for name, _ in nodes:
        assert re.search(rf"Measure · exact_match · of the reply  ← .*{name}", said)
    assert "Measure · logit(answer) · at last token" in said
    for when in ("during step 2..3", "after prefill", "during prefill"):
        assert re.search(rf"Write · .* · {when}  ←", said)


def test_plan_counts_tokens_saved_by_the_cache(command: Command, file: Path) -> None:
    said = command("plan", file).out
    assert "generates up to 6 tokens" in flat(said)
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    tokens = {name: int(rows[name][4].replace(",", "")) for name in ("join", "cache")}
    (experiment,) = json.loads(command("explain", file, "--format", "json").out)["experiments"]
    lengths = {run: [len(row["tokens"]) for row in own] for run, own in experiment["runs"].items()}
    prompts = lengths["clean"] + 3 * lengths["fewer"]  # the source, the base and two cells
    assert len(prompts) == 32
    left_out = sum(length + step - 1 for length in prompts for step in range(1, 6))
    assert tokens["join"] - tokens["cache"] == left_out * 4  # blocks


def test_plan_without_generation_has_no_cache_line(command: Command, file: Path) -> None:
    text = file.read_text("utf-8").replace("  generate 6 \n", "")
    text = re.sub(r" (during|after) .*", "", text).replace("measure exact_match", "measure entropy")
    file.write_text(text, "utf-8")
    done = command("plan", file)
    assert done.status == 0, done.err
    assert not re.search(r"^ *cache:", done.out, re.M)
    assert "generates" not in done.out


def test_run_states_the_generation_settings(command: Command, drawn: Path) -> None:
    said = flat(command("run", drawn, "--no-store").out)
    assert (
        "generate up to 6 tokens after each prompt, sampled at temperature 0.5, from the 9"
    ) in said
    assert "seed 3: separate draws for each prompt" in said
    assert 'replies end before "Part" or "\\n", or after 6 tokens' in said
    assert "samples 2 per row; a row's value is their mean" in said
    assert "`last token` and `tokens *` extend to the newest token" in said
    assert "positions of the prompt are changed in step 0" in said
    edit = "`scale k layer 2 head 0 at last-item token by 3 after prefill` edits the prompt's cache"
    assert edit in said
    assert "prompt end metrics that don't read the reply are measured in step 0" in said


def test_run_without_prompt_writes_omits_the_step_0_note(command: Command, file: Path) -> None:
    text = re.sub(r"\n  (patch|scale k|block) .*", "", file.read_text("utf-8"))
    file.write_text(text.replace("at last token by 2", "at tokens * by 2"), "utf-8")
    said = flat(command("run", file, "--no-store").out)
    assert "extend to the newest token" in said
    assert "are changed in step 0" not in said


def test_run_of_greedy_generation_omits_sampling_notes(command: Command, file: Path) -> None:
    text = file.read_text("utf-8").replace("  measure logit(answer) as delta\n", "")
    text = re.sub(r"  (scale|block) .*\n", "", text)
    file.write_text(text, "utf-8")
    said = flat(command("run", file, "--no-store").out)
    assert "up to 6 tokens after each prompt, the most likely token at each step" in said
    for absent in ("samples 2", "prompt end", "newest token", "edits the prompt's cache"):
        assert absent not in said


LATER = (
    fruit.FRUIT
    + """
direction d = unembedding(" 2")
basis p = random(dims: 3) at resid_post layer 0
experiment e {
  prompts fruit limit 2
  from clean into fewer
  generate 3
RULES
  measure length as raw
}
"""
)
VALUE = "the newest token receives the value written at the final prompt token"
OWN = "the newest token's own vector is changed"
EXTENDS = "`last token` and `tokens *` extend to the newest token"
BLOCKS = "the newest token passes through the replaced blocks in the steps of their rules"
WEIGHTS = "the newest token uses the changed weights"
AT = "resid_post layer 0 at last token"


@pytest.mark.parametrize(
    ("rule", "effect"),
    [
        (f"patch {AT}", VALUE),
        (f"ablate {AT} with zero", VALUE),
        (f"set {AT} to 2 * d", VALUE),
        (f"set {AT} to value(resid_post layer 1) of clean", VALUE),
        ("clamp mlp_hidden layer 0 neuron 1 at last token to 3", VALUE),
        (f"add 2 * d to {AT}", "the newest token receives the addition made at the final prompt"),
        (f"scale {AT} by -2", OWN),
        (f"project out d from {AT}", OWN),
        (f"project {AT} onto d", OWN),
        (f"clamp d of {AT} to 3", OWN),
        (f"add step(resid_post) to {AT}", OWN),
        (f"set {AT} to reconstruction of p", OWN),
        ("scale feature 1 of p at last token by 2", OWN),
        ("ablate feature 1 of p at last token with zero", "receives the coordinates written at"),
        ("add 3 to feature 1 of p at last token", "own coordinates receive the rule's addition"),
        (
            "block attention layer 0 head * from last token to first token",
            "the newest token's own attention is changed",
        ),
    ],
)
def test_steps_state_the_effect_of_a_rule_at_the_newest_token(
    rule: str, effect: str, tmp_path: Path
) -> None:
    said = _steps(tmp_path, rule)
    assert EXTENDS in said
    assert effect in said
    assert sum(each in said for each in (VALUE, OWN)) == (effect in (VALUE, OWN))
    assert f"(`{rule}`)" not in said


def _steps(tmp_path: Path, *rules: str) -> str:
    path = tmp_path / "file.mech"
    path.write_text(LATER.replace("RULES", "\n".join(rules)), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        return mechdsl.run(path, store=False)["e"].conventions["steps"]


@pytest.mark.parametrize(
    ("rule", "effect"),
    [
        ("replace block layer 1 with block layer 0 during step 1..2", BLOCKS),
        ("replace block layer 1 with identity", BLOCKS),
        ("scale weights of z layer 0 head 1 by 2", WEIGHTS),
        ("project out d from weights", WEIGHTS),
    ],
)
def test_steps_of_a_rule_without_positions_omit_last_token(
    rule: str, effect: str, tmp_path: Path
) -> None:
    prefill = f"scale {AT} by 2 during prefill"
    for rules in ((rule,), (rule, prefill)):
        said = _steps(tmp_path, *rules)
        assert effect in said
        assert "last token`" not in said
        assert OWN not in said
        assert (f"(`{rule}`)" in said) == (len(rules) > 1)


def test_steps_name_the_rules_of_each_effect(tmp_path: Path) -> None:
    rules = f"patch {AT}", f"scale {AT} by 2", f"scale {AT} by 3 during step 2..2"
    said = _steps(tmp_path, *rules)
    assert f"{VALUE} (`{rules[0]}`); {OWN} (`{rules[1]}`, `{rules[2]}`)" in said


ALONE = (
    fruit.FRUIT
    + """
experiment e {
  prompts fruit limit 4
  generate 3
  ablate resid_post layer 1 at last token with zero
  report texts
  report json to "e.json"
}
"""
)


def test_generation_without_a_measure_reports_completions(command: Command, tmp_path: Path) -> None:
    """Completions are printed without a table, and their length is measured."""
    path = tmp_path / "file.mech"
    path.write_text(ALONE, encoding="utf-8")
    done = command("run", path, "--no-store")
    assert done.status == 0, done.err
    assert "e: replies" in done.out
    assert "e: length" not in done.out
    found = json.loads((tmp_path / "e.json").read_text("utf-8"))
    assert [each["label"] for each in found["cells"][0]["measures"]] == ["length"]
    assert found["replies"]
    for report in ("", "  report table\n"):
        path.write_text(ALONE.replace("  report texts\n", report), encoding="utf-8")
        done = command("run", path, "--no-store")
        assert (done.status == 0) == (report == ""), done.err
    assert "E0601" in done.err
    path.write_text(ALONE.replace("  generate 3\n", ""), encoding="utf-8")
    assert "E0601" in command("run", path, "--no-store").err


SAVED = (
    fruit.FRUIT
    + """
experiment e {
  prompts fruit limit 4
  generate 5 with samples 3
  save resid_post layer 1 at last token, each reply token to "x.safetensors"
}
"""
)


def test_plan_counts_saved_completion_activations(command: Command, tmp_path: Path) -> None:
    """Costs of prompts, completions, and both together through the second of four layers."""
    path = tmp_path / "file.mech"
    path.write_text("mech 1\nseed 3\n" + SAVED.removeprefix("mech 1\n"), encoding="utf-8")
    said = command("plan", path).out
    row = next(line for line in said.splitlines() if "x.safetensors" in line and "≤" in line)
    (experiment,) = json.loads(command("explain", path, "--format", "json").out)["experiments"]
    lengths = [len(row["tokens"]) for row in experiment["runs"]["clean"]]
    first, writing = sum(lengths) * 4, len(lengths) * 3 * 4 * 4
    reading = sum(length + 5 for length in lengths) * 3 * 2
    assert f"{first + writing + reading:,}" in row
    assert f"≤ {len(lengths) * 6 * 3}" in row
    said = flat(command("explain", path).out)
    assert f"up to {len(lengths) * 6 * 3} vectors of 1 site of `clean`" in said
    assert "3 samples of each" in said
    assert "found during generation" in said


SEARCHED = ALONE.replace(
    "  report texts",
    """  measure matches("^([0-9 ]|[0-9])+[a-z]$") as raw
  measure length as raw
  report table""",
).replace("generate 3", "generate 50")


def test_endless_pattern_search_is_an_error(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the row, and other measures are computed."""
    monkeypatch.setattr(limits, "SEARCH_SECONDS", 0.05)
    path = tmp_path / "file.mech"
    path.write_text(SEARCHED, encoding="utf-8")
    done = command("run", path, "--no-store")
    assert done.status, "a measure is missing"
    assert "E0612" in done.err
    assert "letters the search takes more than 0.05 s, in the run `clean`, row" in flat(done.err)
    assert "e: length" in done.out


def test_table_heading_states_the_base_of_an_effect(command: Command, tmp_path: Path) -> None:
    """The base is the base run's completions, or the base run on the patched completions; if no
    row has the position, there is no value."""
    rule = "ablate resid_post layer 1 at last token with zero during step 1"
    lines = {
        "length": "0 is clean (3.000 tokens)",
        "exact_match": "0 is clean (0.000)",
        "entropy at reply token 2": r"0 is clean after the same replies \(\S+ nat\)",
        'entropy at "x" of reply token': "0 is clean after the same replies",
    }
    path = tmp_path / "file.mech"
    text = ALONE[: ALONE.index("experiment")]
    for number, measure in enumerate(lines):
        body = f"prompts fruit limit 4\n generate 3\n {rule}\n measure {measure} as delta"
        text += f"experiment e{number} {{\n {body}\n}}\n"
    path.write_text(text, encoding="utf-8")
    facts = [
        line for line in command("run", path, "--no-store").out.splitlines() if "· 0 is" in line
    ]
    for line, said in zip(facts, lines.values(), strict=True):
        said = said if "\\" in said else re.escape(said)
        assert re.search(f" · {said}$", line), line
