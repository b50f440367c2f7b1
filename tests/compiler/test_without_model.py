"""Checks of a file are the same with and without its model.

Each case is a statement, its error code, and the suggested word.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mechdsl import zoo
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.models.config import shape_from_config
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.syntax.frontend import read_source

from ..data.support import byte_level, wrapped
from ..quick import in_turn, some
from ..slips.checked import GPT2

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES_OF_EXAMPLES = sorted(EXAMPLES.glob("*.mech"))
FILE = """
mech 1

model m = zoo("counting")
seed 3

metric ld = logit(answer) - logit(answer of fewer)
group movers = L1H2, L2H0

prompts fruit {
  count in 2..9
  place in ["house", "shop"]
  item in ["apple", "pear", "fig"]
  fruits = list(item, count, sep: " ")
  where count > 2
  template "Part 1: {fruits} in the {place} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
  corrupt elsewhere { place = other(place) }
}

experiment heads {
  prompts fruit limit 20
  from clean into fewer
  keep logit(answer) > 0
  patch z layer * head * at last token
  measure ld as recovery
  measure logprob(answer) as delta
  stats bootstrap(1000) confidence 95% correct holm by count
  report table top 5
  report heatmap layer by head
  expect max(recovery) > 0.1
  expect mean(delta, layer: 1..2) < 4
  expect pearson(recovery, along) > 0
}

experiment along {
  prompts fruit limit 20
  from clean into fewer
  for l in 0..3 {
    patch resid_post layer l at place token, each item token
  }
  measure ld as recovery
  report lines l by position
}

experiment without {
  prompts fruit limit 20
  ablate movers at last token with mean of fewer
  ablate mlp_out layer 1..2 at last-item token with zero
  against random(5, heads)
  measure kl(clean) as raw
  expect accuracy(clean) > 0.1
}
""".lstrip()

MODELS = {
    "here": 'zoo("counting")',
    "not in the cache": 'hf("not/here")',
    "no folder": 'local("not/there")',
    "no config": 'local("empty")',
}

CASES = {
    # wrong text, correct text, code, suggested word
    "a component": ("resid_posst layer l", "resid_post layer l", "E0203", "resid_post"),
    "a text of a metric": ("logprob(anwser)", "logprob(answer)", "E0516", "answer"),
    "a span": ("each itme token", "each item token", "E0308", "item"),
    "an axis of a report": ("heatmap layer by hed", "heatmap layer by head", "E0607", "head"),
    "an axis of a loop": ("report lines ll by", "report lines l by", "E0607", ""),
    "a measure": ("max(recovry) > 0.1", "max(recovery) > 0.1", "E0203", "recovery"),
    "a report": ("report tabel", "report table", "E0203", "table"),
    "a metric": ("ld = lgit(answer)", "ld = logit(answer)", "E0203", "logit"),
    "a metric of a measure": ("logprb(answer)", "logprob(answer)", "E0203", "logprob"),
    "a fill": ("with meean of fewer", "with mean of fewer", "E0203", "mean"),
    "a fill alone": ("with zeroo", "with zero", "E0203", "zero"),
    "a placeholder": ("{plaec}", "{place}", "E0501", "place"),
    "an open placeholder": ("{place Count", "{place} Count", "E0113", ""),
    "a function": ("othrs(place)", "other(place)", "E0514", "others"),
    "a range of layers": ("layer 3..1 at last-item", "layer 1..2 at last-item", "E0321", "1"),
    "a short site": ("L1H2x", "L1H2", "E0203", "L1H2"),
    "an effect": ("as recovry\n  measure", "as recovery\n  measure", "E0203", "recovery"),
    "a run": ("into fewr\n  keep", "into fewer\n  keep", "E0201", "fewer"),
    "a run that is compared": ("kl(claen)", "kl(clean)", "E0201", "clean"),
    "a run of an accuracy": ("accuracy(claen)", "accuracy(clean)", "E0201", "clean"),
    "a run of a mean": ("mean of fewr", "mean of fewer", "E0201", "fewer"),
    "a block of prompts": ("prompts friut limit", "prompts fruit limit", "E0201", "fruit"),
    "another experiment": ("(recovery, alng)", "(recovery, along)", "E0201", "along"),
    "a group": ("ablate mvers", "ablate movers", "E0203", "movers"),
    "a value to group by": ("by cuont", "by count", "E0201", "count"),
    "a condition on rows": ("where cuont > 2", "where count > 2", "E0501", "count"),
    "a value that is corrupted": ("{ cuont = count - 1", "{ count = count - 1", "E0501", "count"),
    "a condition on what is kept": ("keep lgoit(answer)", "keep logit(answer)", "E0203", "logit"),
    "a correction": ("correct hlom", "correct holm", "E0207", "holm"),
    "a confidence": ("confidence 30%", "confidence 95%", "E0207", ""),
    "a limit": ("limit 0\n  from clean", "limit 20\n  from clean", "E0207", ""),
    "what is drawn": ("random(5, neurons)", "random(5, heads)", "E0630", ""),
    "a range of a loop": ("for l in 3..0", "for l in 0..3", "E0321", "0..3"),
    "an axis of an expectation": ("layr: 1..2", "layer: 1..2", "E0203", "layer"),
    "an axis that a site lacks": ("mlp_out layer 1..2 head 1", "mlp_out layer 1..2", "E0304", ""),
    "a domain backwards": ("count in 9..2", "count in 2..9", "E0509", ""),
    "a template's list": ("list(itme, count", "list(item, count", "E0501", "item"),
    "a file of a report": ('top 5 to "x.tbl"', "top 5", "E0607", ".csv"),
    "a file of Python": ('python("no.py:f") > 0', "logit(answer) > 0", "E0222", ""),
    "a loop's variable": ("layer ll at place", "layer l at place", "E0322", "l"),
    "a site without a layer": ("z head * at", "z layer * head * at", "E0304", "layer *"),
    "a function of an expectation": ("meacn(delta", "mean(delta", "E0203", "mean"),
    "a unit": ("group movers = L1yH2", "group movers = L1H2", "E0203", "L1H2"),
    "a unit without its layer": ("movers = LH2", "movers = L1H2", "E0203", "both numbers"),
    "a unit of an expectation": ("max(recovery, L1H22x) >", "max(recovery) >", "E0203", "L1H22"),
    "a component of a unit": ("max(recovery, L1.rsid) >", "max(recovery) >", "E0203", "resid"),
    "a unit that is looked for": (
        "argmax(recovery) = LH10", "max(recovery) > 0.1", "E0203", "L1H0",
    ),
    "an effect of three letters": ("as aw", "as raw", "E0203", "raw"),
    "a metric of two letters": ("measure dl as", "measure ld as", "E0203", "ld"),
    "a metric of the file": ("measure ldd as", "measure ld as", "E0203", "ld"),
    "a site of noise": (
        "{ add gaussian(std: 3 sd) to eembed at place token", "{ place = other(place)",
        "E0203", "embed",
    ),
    "a stack": (
        "block attention encodr layer l from last token to", "patch resid_post layer l at",
        "E0203", "encoder",
    ),
    "a stack of a site": ("resid_post encodr layer l", "resid_post layer l", "E0203", "encoder"),
    "a word of statistics": ("ccorrect holm", "correct holm", "E0102", "correct"),
    "a word of statistics of two letters": ("holm hy", "holm by", "E0102", "by"),
    "a resampling": ("bootstap(1000)", "bootstrap(1000)", "E0207", "bootstrap"),
    "an occurrence": ("item 3..1 token", "each item token", "E0321", "1..3"),
}  # fmt: skip


def checked(
    text: str, folder: Path, source: str = MODELS["here"], *, need: bool = False
) -> CheckedFile:
    (folder / "empty").mkdir(exist_ok=True)
    text = text.replace(MODELS["here"], source)
    path = folder / "file.mech"
    return check_source(Source(text, path), CheckSettings(python="look", require_models=need))


def said(found: list[Diagnostic]) -> list[tuple[str, str, int]]:
    """Code, text and line of each error that isn't about the model."""
    return [
        (d.code, d.span.text, d.span.line)
        for d in found
        if d.severity == "error" and d.span is not None and d.code != "E0404"
    ]


@pytest.mark.parametrize("source", MODELS.values(), ids=MODELS)
def test_valid_file_has_no_errors_with_or_without_its_model(tmp_path: Path, source: str) -> None:
    found = checked(FILE, tmp_path, source)
    assert not said(found.diagnostics), [d.message for d in found.diagnostics]
    assert bool(found.experiments) == (source == MODELS["here"])
    assert len(found.unchecked) == (0 if source == MODELS["here"] else 3)


@pytest.mark.parametrize(("name", "model"), in_turn(list(CASES), list(MODELS)[1:]))
def test_errors_without_the_model_equal_those_with_it(
    tmp_path: Path, name: str, model: str
) -> None:
    wrong, right, code, word = CASES[name]
    assert FILE.count(right) >= 1, right
    text = FILE.replace(right, wrong, 1)
    here = checked(text, tmp_path).diagnostics
    assert {each[0] for each in said(here)} == {code}, [d.message for d in here]
    offered = [f"{d.label_text} {d.help_text}" for d in here if d.severity == "error"]
    assert all(word in each for each in offered), offered
    (line,) = {d.span.line for d in here if d.severity == "error" and d.span is not None}
    assert line in _changed_lines(text)
    assert said(checked(text, tmp_path, MODELS[model]).diagnostics) == said(here)


def _changed_lines(text: str) -> set[int]:
    lines = zip(FILE.splitlines(), text.splitlines(), strict=True)
    return {number for number, (old, new) in enumerate(lines, 1) if old != new}


def test_all_errors_are_reported_at_once_without_the_model(tmp_path: Path) -> None:
    """Errors are in rules, measures, reports, expectations and prompts."""
    wrong = {
        "patch resid_post layer l": "patch resid_posst layer l",
        "each item token": "foo token",
        "logprob(answer) as delta": "logprob(anwser) as delta",
        "layer by head": "layer by hed",
        "mean(delta, layer": "mean(delt, layer",
    }
    text = FILE
    for right, word in wrong.items():
        text = text.replace(right, word)
    words = ["resid_posst", "foo", "anwser", "report heatmap layer by hed", "delt"]
    for source in MODELS.values():
        found = said(checked(text, tmp_path, source).diagnostics)
        assert sorted(each[1] for each in found) == sorted(words)
    # Prompts whose rows can't be built hide no errors of experiments.
    broken = text.replace("{place}", "{plaec}")
    for source in MODELS.values():
        found = said(checked(broken, tmp_path, source).diagnostics)
        assert sorted(each[1] for each in found) == sorted(["plaec", *words])


FOLLOW_UPS = {
    "a run that isn't there": ("corrupt fewer {", "corrupt fwer {", {"E0201", "E0516"}),
    "a value by another name": ("place in [", "plcae in [", {"E0501"}),
    "an experiment that is picked from": ("resid_post layer l", "resid_posst layer l", {"E0203"}),
    "a loop without an end": ("for l in 0..3", 'for l in 0.."x"', {"E0322"}),
    "a model without its name": ('zoo("counting")', 'zooo("counting")', {"E0207"}),
    "no model line": ('model m = zoo("counting")', "", {"E0206"}),
    "a data file that isn't there": (
        "where count > 2",
        'where count > 2\n  rows "none.csv"',
        {"E0504"},
    ),
}


@pytest.mark.parametrize("case", FOLLOW_UPS.values(), ids=FOLLOW_UPS)
def test_missing_name_causes_no_consequential_errors(
    tmp_path: Path, case: tuple[str, str, set[str]]
) -> None:
    right, wrong, codes = case
    text = FILE.replace(right, wrong, 1)
    assert text != FILE
    last = "prompts fruit ablate best of along at last token with zero measure ld as raw"
    found = checked(f"{text}\nexperiment last {{ {last} }}\n", tmp_path).diagnostics
    assert {each[0] for each in said(found)} == codes, [d.message for d in found]


SYNTAX = {
    "in another experiment": ("for l in 0..3 {", "for l inn 0..3 {"),
    "in a rule beside it": ("patch z layer * head *", "patchh z layer * head *"),
    "in the prompts": ('answer " {count}"', 'asnwer " {count}"'),
}


@pytest.mark.parametrize("case", SYNTAX.values(), ids=SYNTAX)
def test_syntax_error_hides_no_errors_of_other_statements(
    tmp_path: Path, case: tuple[str, str]
) -> None:
    text = (
        FILE.replace(*case).replace("layer by head", "layer by hed").replace("movers at", "mvrs at")
    )
    for source in MODELS.values():
        found = said(checked(text, tmp_path, source).diagnostics)
        assert {"report heatmap layer by hed", "mvrs"} <= {each[1] for each in found}
        assert {"E0101", "E0102"} & {each[0] for each in found}


def test_warning_lists_the_lines_that_need_the_model(tmp_path: Path) -> None:
    for name in ("not in the cache", "no folder"):
        found = checked(FILE, tmp_path, MODELS[name]).diagnostics
        (warning,) = (d for d in found if d.code == "W0710")
        assert warning.help_text.endswith(
            "`validate` then also checks layers, heads and sites (lines 25, 40, 48 to 49), "
            "positions of tokens (lines 25, 40, 48 to 49), tokens of answers (line 16), cells "
            "(line 32)"
        )


@pytest.mark.parametrize("name", ["not in the cache", "no folder"])
def test_missing_model_is_an_error_if_required(tmp_path: Path, name: str) -> None:
    found = checked(FILE, tmp_path, MODELS[name], need=True).diagnostics
    assert {each[0] for each in said(found)} == {"E0401"}


def test_unknown_architecture_is_not_called_a_masked_language_model(tmp_path: Path) -> None:
    """An unknown class name doesn't make it a masked language model."""
    own = Path(zoo.__path__[0]) / "counting"
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    for name, said_of_it in {
        "WeirdNet": "doesn't state that it predicts the next token",
        "BertForMaskedLM": "a masked language model predicts tokens at their own position",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        (folder / "tokenizer.json").symlink_to(own / "tokenizer.json")
        found = checked(FILE, tmp_path, f'local("{name}")').diagnostics
        messages = [d.message for d in found if d.code == "E0612"]
        assert messages
        assert all(said_of_it in message for message in messages)


EDGES = {
    "the ends of the prompt": ("first token", "last token", "logit(answer)", True),
    "words in their order": ("place token", "last-item token", "logit(answer)", True),
    "back in the text": ("last-item token", "place token", "logit(answer)", False),
    "measured where it stands": (
        "place token", "last-item token", 'logit(" 3") at last token', False,
    ),
    "what touches": ("place token", '")" token', "logit(answer)", False),
    "what is counted": ("token 1", "token 7", "logit(answer)", False),
    "counted from a word": ("place token + 1", "last-item token", "logit(answer)", False),
}  # fmt: skip


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_blocked_key_after_its_query_is_found_without_the_model(
    tmp_path: Path, case: tuple[str, str, str, bool]
) -> None:
    """If only next tokens are measured, the model must be causal."""
    query, key, measure, refused = case
    text = FILE[: FILE.index("experiment heads")].replace(
        '"Part 1: {fruits} in the {place} Count 1:"', '"({place}) Part 1: {fruits} Count 1:"'
    )
    lines = f"prompts fruit block attention layer 1 from {query} to {key} measure {measure} as raw"
    found = checked(f"{text}experiment e {{ {lines} }}\n", tmp_path, MODELS["not in the cache"])
    assert {each[0] for each in said(found.diagnostics)} == ({"E0332"} if refused else set())


DECIDED = {
    "between from right to left": (
        "at last-item token", "at tokens between place token and first-item token", "E0311",
    ),
    "no token left": ("at last-item token", "at tokens except tokens *", "E0315"),
    "lists that don't pair": (
        "place token, each item token",
        "item 1 token, item 2 token onto place token, last token, first token",
        "E0331",
    ),
    "a position and itself": (
        "ablate mlp_out layer 1..2 at last-item token with zero",
        "swap mlp_out layer 1..2 at last-item token with last-item token",
        "E0336",
    ),
    "a layer beyond every model": ("layer 1..2 at last-item", "layer 2000 at last-item", "E0231"),
    "a layer before every model": ("layer 1..2 at last-item", "layer -2000 at last-item", "E0231"),
    "a head beyond every model": ("z layer * head *", "z layer * head 3, 20000", "E0231"),
    "a neuron beyond every model": ("movers = L1H2,", "movers = L1N2000000,", "E0231"),
    "too many cells": (
        "patch resid_post layer l at",
        "for i in 0..2 { patch mlp_hidden layer i neuron 0..349999 at place token } patch embed at",
        "E0323",
    ),
    "a component of a loop": (
        "patch resid_post layer l at",
        "for c in [resid_pre, resid_posst] { patch c layer l at last token } patch embed at",
        "E0203",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECIDED.values(), ids=DECIDED)
def test_errors_decided_by_the_text_need_no_model(
    tmp_path: Path, case: tuple[str, str, str]
) -> None:
    right, wrong, code = case
    assert right in FILE
    for source in list(MODELS.values())[1:]:
        found = said(checked(FILE.replace(right, wrong, 1), tmp_path, source).diagnostics)
        assert {each[0] for each in found} == {code}, found


RULES = {
    "layers by number": "patch z layer 0..2 head * at last token, place token",
    "no heads": "patch resid_post layer * at last token",
    "from the end": "patch resid_post layer -1 at last token",
    "a joined site": "ablate movers at last token with zero",
    "no rule": "",
    "what is picked": "ablate best of along at last token with zero",
    "occurrences": "patch resid_post layer 1, 3 at each item token",
    "all tokens": "patch resid_post layer 1 at each token of place",
    "receivers": "path layer 30 head 1 -> q layer * head * at last token",
}
CELLS = {
    # rule, expectation, error code
    "another layer": ("layers by number", "max(raw, L3H2) > 0", "E0606"),
    "a head that there may be": ("layers by number", "max(raw, L2H92) > 0", ""),
    "one of several": ("layers by number", "raw(L2H1) > 0", "E0606"),
    "one": ("layers by number", 'raw(L2H1, position: "last token") > 0', ""),
    "a misspelt position": ("layers by number", 'raw(L2H1, position: "last tokn") > 0', "E0203"),
    "another component": ("layers by number", "argmax(raw) = L1.mlp", "E0606"),
    "layers by name": ("layers by number", "max(raw, layer: 4..9) > 0", "E0606"),
    "backwards": ("layers by number", "max(raw, layer 2..1) > 0", "E0321"),
    "backwards by name": ("layers by number", "max(raw, layer: 2..1) > 0", "E0321"),
    "a cell for all": ("layers by number", "raw > 0", "E0606"),
    "a head where there is none": ("no heads", "max(raw, L1H2) > 0", "E0606"),
    "a layer that there may be": ("no heads", "top 3 contains L40.resid", ""),
    "a layer from the end": ("from the end", "max(raw, L7.resid) > 0", ""),
    "a part of what is joined": ("a joined site", "max(raw, L1H2) > 0", "E0606"),
    "a site without a rule": ("no rule", "max(raw, L1H2) > 0", "E0606"),
    "a site that is picked": ("what is picked", "max(raw, L1.resid) > 0", ""),
    "an occurrence": ("occurrences", "raw(layer 1, item: 2) > 0", ""),
    "an occurrence too many": ("occurrences", "raw(layer 1, item: 12) > 0", "E0606"),
    "a token that there may be": ("all tokens", 'max(raw, position: "place 4") > 0', ""),
    "a receiver that there may be": ("receivers", "max(raw, to_layer: 31) > 0", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CELLS.values(), ids=CELLS)
def test_cells_excluded_by_the_text_are_rejected_without_the_model(
    tmp_path: Path, case: tuple[str, str, str]
) -> None:
    rule, expected, code = case
    lines = f"from clean into fewer {RULES[rule]} measure logit(answer) as raw"
    text = f"{FILE}\nexperiment last {{ prompts fruit limit 20 {lines} expect {expected} }}\n"
    found = said(checked(text, tmp_path, MODELS["not in the cache"]).diagnostics)
    assert {each[0] for each in found} == ({code} if code else set()), found


def test_syntax_error_in_a_rule_causes_no_errors_of_its_cells(tmp_path: Path) -> None:
    text = FILE.replace("at last token\n  measure ld", "at last token,, place token\n  measure ld")
    text = text.replace("mean(delta, layer: 1..2)", 'mean(delta, position: "last token")')
    for source in MODELS.values():
        found = said(checked(text, tmp_path, source).diagnostics)
        assert {each[0] for each in found} == {"E0101"}, found


NEEDS_MODEL = {
    "a layer": ("layer 1..2 at last-item", "layer 40 at last-item"),
    "a layer from the end": ("layer 1..2 at last-item", "layer 2..-1 at last-item"),
    "a head": ("z layer * head *", "z layer * head 90..91"),
    "a token": ("last-item token", "token 7"),
    "a sweep over tokens": ("last-item token", "token *"),
    "a special token": ("last-item token", "eos token"),
    "an answer": ('answer " {count}"', 'answer "Kuala Lumpur {count}"'),
    "a cell": ("layer: 1..2", "layer: 30"),
    "what is picked": ("limit 20\n  ablate movers", "limit 20\n  ablate top 300 of heads"),
    "a replacement": ("  stats boot", '  replace last-item token with "a b"\n  stats boot'),
}  # fmt: skip


def test_random_circuits_of_a_missing_encoder_decoder_cause_no_error() -> None:
    """Its edges are unknown, so no random ones are drawn."""
    text = """mech 1
model t5 = hf("nobody/nothing")
prompts facts {
  capital in ["Paris", "Rome"]
  template "We went to {capital}"
  answer "{capital}"
}
circuit c = z encoder layers * heads * -> v cross layers * heads *, L5.mlp -> logits
experiment e {
  prompts facts
  ablate all but c at tokens * with zero
  measure logit(answer) as faithfulness
  against random(39)
}
"""
    found = check_source(Source(text, Path("f.mech")))
    assert [each.code for each in found.diagnostics] == ["W0710"]


@pytest.mark.parametrize("case", NEEDS_MODEL.values(), ids=NEEDS_MODEL)
def test_errors_that_depend_on_the_model_are_not_reported_without_it(
    tmp_path: Path, case: tuple[str, str]
) -> None:
    right, other = case
    assert right in FILE
    for source in list(MODELS.values())[1:]:
        found = checked(FILE.replace(right, other), tmp_path, source)
        assert not said(found.diagnostics), [d.message for d in found.diagnostics]


def test_words_of_a_missing_tokenizer_cause_no_errors(tmp_path: Path) -> None:
    text = FILE.replace('place in ["house", "shop"]', "place in words(m)")
    text = text.replace("where count > 2", 'where place = "attic"')
    assert "E0509" in {each[0] for each in said(checked(text, tmp_path).diagnostics)}
    assert not said(checked(text, tmp_path, MODELS["no folder"]).diagnostics)


OTHER_WORDS = """mech 1

model here = local("here")
model elsewhere = local("elsewhere")

prompts p {
  w in words(elsewhere)
  item in ["apple", "pear", "fig"]
  template "Part 1: {item} {w} Count 1:"
  answer " {w}"
  corrupt swapped { item = other(item) }
}

experiment e {
  model here
  prompts p limit 40
  from clean into swapped
  patch resid_post layer 0..3 at w token
  measure prob(answer) as delta
}
"""


def test_words_of_another_missing_tokenizer_cause_no_errors() -> None:
    """Placeholder words have several tokens in one model, and none in the other."""
    statement = spec.Model(span=Span(Source(""), 0, 0), name="here", kind="local", path="here")
    shape, _ = shape_from_config(GPT2, model="here")
    assert shape is not None
    given = {"here": ModelContext(statement, shape, wrapped(byte_level()))}
    of_words = OTHER_WORDS.replace('local("here")', 'zoo("counting")')
    for text, models in ((OTHER_WORDS, given), (of_words, {})):
        found = check_source(Source(text), models=models).diagnostics
        assert [d.code for d in found] == ["W0710"]


@pytest.mark.parametrize(("limit", "rows"), [(3, 3), (40, 20)])
def test_smaller_of_two_limits_applies(tmp_path: Path, limit: int, rows: int) -> None:
    source = Source(FILE, tmp_path / "file.mech")
    found = check_source(source, CheckSettings(limit=limit)).experiments
    assert [len(each.table) for each in found] == [rows] * 3


def test_unused_prompts_are_checked_by_their_first_row(tmp_path: Path) -> None:
    """Only the first row of unused prompts is checked; used prompts are checked once."""
    prompts = 'prompts NAME {\n  n in 1..5\n  template "Part {n} unheard Count 1:"\n}\n'
    text = (
        'mech 1\nmodel m = zoo("counting")\n'
        + prompts.replace("NAME", "used")
        + prompts.replace("NAME", "alone")
        + "experiment e {\n  prompts used limit 3\n  measure entropy as raw\n}\n"
    )
    found = checked(text, tmp_path).diagnostics
    rows = [d.label_text.partition(" in ")[2] for d in found if d.code == "W0702"]
    assert rows == ["3 of 3 rows of `clean`", "1 of 1 rows of `clean`"]


@pytest.fixture(scope="module")
def without_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the examples with models that aren't on this machine."""
    folder = tmp_path_factory.mktemp("without") / "examples"
    shutil.copytree(EXAMPLES, folder)
    for each in folder.rglob("*.mech"):
        text = each.read_text(encoding="utf-8")
        each.write_text(re.sub(r'(zoo|hf)\("', 'hf("not-here/', text), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "file",
    some(FILES_OF_EXAMPLES, [file for file in FILES_OF_EXAMPLES[2::3] if file.stem != "prices"]),
    ids=lambda file: file.stem,
)
def test_examples_have_no_errors_without_their_models(file: Path, without_models: Path) -> None:
    source, _ = read_source(without_models / file.name)
    assert source is not None
    found = check_source(source)
    assert {d.code for d in found.diagnostics} == {"W0710"}
    assert found.unchecked
    assert not found.experiments
