"""Sets of answers that differ between rows: errors and conventions."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.vocab.metrics import METRICS, JoinedTexts, Metric, MetricArgument, metric

from ..run_source import run_source

FILE = """mech 1
model toy = zoo("counting")
prompts fruit {{
  count in 2..6
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  around = [count - 1, count, count + 1]
  words = list(" {{item}}", 2)
  whole = [" {{count - 1}}", " {{count - 1}} plum", " 1"]
  rivals = [" {{count}} plum"]
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
  wrong " {{count - 1}}"
  corrupt fewer {{ count = count - 1 }}
}}
experiment e {{
  prompts fruit limit 5
  measure {} as raw
}}
"""
REFUSED = {
    "prob(count + 3..5)": ("E0503", "7..5 contains no numerals", "in the row with count = 4"),
    "prob(9..count - 1)": ("E0503", "contains no numerals", "in the row with count = "),
    "prob(count / 2..9)": ("E0503", "1.5 is not a whole number", "in the row with count = 3"),
    "prob(count..20000)": ("E0503", "numerals are more than 10,000", "in the row with count = "),
    "prob(count..x)": ("E0501", "no value or column `x`", ""),
    "prob(9..1)": ("E0612", "the smaller one first", ""),
    "prob(1.9)": ("E0612", "`1.9` is a decimal, and numerals are whole numbers", ""),
    "logprob(2.0)": ("E0612", "`2.0` is a decimal", ""),
    "prob([0.5])": ("E0503", "0.5 in the list is not a text", ""),
    "prob(count)": ("E0503", "it is a value, 4, not a text", ""),
    "expected(words)": ("E0612", "not all of its entries are whole numbers", ""),
    "expected(answer)": ("E0612", "its argument has the wrong type", ""),
    "prob(answer, digits: 2)": ("E0612", "`digits` applies to numerals", ""),
    "prob(0..9, digits: 0)": ("E0612", "`digits` must be a whole number from 1", ""),
    "prob(digits: 2)": ("E0612", "its argument has the wrong type", ""),
    "prob(0..count, digits: 2)": ("E0519", "` 00`", ""),
    "logit(answer, wrong)": ("E0612", "it takes 1 argument, not 2", ""),
    "kl(clean, answer)": ("E0612", "it takes 1 argument, not 2", ""),
    "prob(class answer, wrong)": ("E0612", "can't be an entry of a list", ""),
    'rank(answer, " plum fig")': ("E0507", "needs a one-token text", ""),
    "logit(whole)": ("E0612", "its argument has the wrong type", ""),
    "rank(whole)": ("E0507", "needs a one-token text", ""),
    "expected(first token of whole)": ("E0612", "not all of its entries are whole numbers", ""),
    "prob(first token of rivals)": ("E0517", "share their first token", "in 5 of 5 rows"),
    "prob([29, 31, 32])": ("E0519", "` 31`", "in 5 of 5 rows"),
    'prob([" papaya", " mango"])': ("E0519", "` papaya`", "in 5 of 5 rows"),
    'correct(" {item.index}", answer)': ("E0612", "needs a sweep over occurrences", ""),
    "prob(item.index..9)": ("E0612", "needs a sweep over occurrences", ""),
    "prob(answr, wrong)": ("E0516", "`answr`", ""),
}


def problems(text: str) -> list[Diagnostic]:
    return [d for d in check_source(Source(text)).diagnostics if d.severity == "error"]


@pytest.mark.parametrize("measure", REFUSED)
def test_invalid_answer_sets_are_errors(measure: str) -> None:
    code, reason, label = REFUSED[measure]
    (found,) = problems(FILE.format(measure))
    assert found.code == code
    assert reason in found.message
    assert label in found.label_text


@pytest.mark.parametrize("measure", ["prob(label + 1..99)", "correct(aliases)", "prob(a..b, [c])"])
def test_missing_data_file_gives_no_errors_about_answers(measure: str) -> None:
    """The only error is the missing file: any column may hold a list or a number."""
    text = """mech 1
model toy = zoo("counting")
prompts years {{
  rows "missing.csv"
  template "{{clean}}"
}}
experiment e {{
  prompts years
  measure {} as raw
}}
"""
    assert [d.code for d in problems(text.format(measure))] == ["E0504"]


def test_conventions_state_the_sizes_of_answer_sets() -> None:
    text = FILE.format("prob(count + 1..9) as raw\n  measure correct(answer, wrong, answer)")
    ran, found = run_source(Source(text))
    assert ran is not None, found
    assert ran.experiments[0].conventions["answer sets"] == (
        "`prob(count + 1..9)` over 3 to 7 numerals per row (`3` to `9`); "
        "`correct(answer, wrong, answer)` over 2 tokens per row; equal tokens count once"
    )


@pytest.fixture
def negated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> JoinedTexts | None:
    """Register `negated`, minus the log probability of any of several texts, for one test."""
    monkeypatch.setitem(vars(METRICS)["_entries"], "negated", Metric("negated"))
    for takes in ("any", "continuation"):
        joined = request.param if takes == "continuation" else None

        @metric("negated", takes=takes, unit="nat", joined=joined)
        def _(*arguments: torch.Tensor, of: MetricArgument = takes) -> torch.Tensor:
            return -METRICS["logprob"].forms[of].function(*arguments)

    return request.param


@pytest.mark.parametrize("negated", [None], indirect=True)
def test_custom_metric_of_texts_of_several_tokens_is_an_error(negated: JoinedTexts | None) -> None:
    (found,) = problems(FILE.format('negated(answer, " plum fig")'))
    assert found.code == "E0507"
    assert problems(FILE.format("negated(answer, wrong)")) == []


@pytest.mark.parametrize("negated", ["sum", "log_sum_exp"], indirect=True)
def test_custom_metric_joins_texts_as_it_declares(negated: JoinedTexts | None) -> None:
    parts = ["negated(answer)", 'negated(" plum fig")', 'negated(answer, " plum fig")']
    ran, found = run_source(Source(FILE.format(" as raw\n  measure ".join(parts))))
    assert ran is not None, found
    one, other, both = (each.patched[0] for each in ran.experiments[0].measures)
    expected = one + other if negated == "sum" else np.logaddexp(one, other)
    np.testing.assert_allclose(both, expected, rtol=1e-5)


def test_first_tokens_of_a_list_are_summed_like_texts_of_one_token() -> None:
    measures = ["prob(first token of whole)", 'prob(wrong, " 1")']
    measures += ["prob(last token of whole)", 'prob(wrong, " plum", " 1")']
    text = FILE.format(" as raw\n  measure ".join(measures))
    ran, found = run_source(Source(text))
    assert ran is not None, found
    firsts, texts, lasts, others = (m.patched for m in ran.experiments[0].measures)
    assert np.array_equal(firsts, texts)
    assert np.array_equal(lasts, others)
    assert not np.array_equal(firsts, lasts)


def test_sets_of_texts_of_several_tokens_equal_a_plain_forward_pass() -> None:
    """P(first token of any member) and the last one's, under an ablation, one prompt at a time."""
    lines = [
        "ablate mlp_out layer 0 at last token with zero",
        "measure prob(first token of whole) as raw",
        "measure prob(last token of whole) as raw",
    ]
    text = FILE.replace("  measure {} as raw\n", "".join(f"  {line}\n" for line in lines))
    ran, found = run_source(Source(text.format()))
    assert ran is not None, found
    result = ran.experiments[0]
    folder = str(files("mechdsl") / "zoo" / "counting")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def zeroed(module: object, given: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = 0
        return output

    hook = model.model.layers[0].mlp.register_forward_hook(zeroed)
    expected: list[list[float]] = []
    with torch.no_grad():
        for row in range(result.prompts):
            count = result.row_values["count"][row]
            fruits = " ".join(result.row_values["fruits"][row])
            ids = tokenizer(f"Part 1: {fruits} Count 1:", return_tensors="pt").input_ids
            probabilities = model(ids).logits[0, -1].double().softmax(-1)
            whole = [f" {count - 1}", f" {count - 1} plum", " 1"]
            members = [tokenizer(each, add_special_tokens=False).input_ids for each in whole]
            edges = {each[0] for each in members}, {each[-1] for each in members}
            expected.append([float(probabilities[list(own)].sum()) for own in edges])
    hook.remove()
    values = np.stack([measure.patched[0] for measure in result.measures], axis=1)
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.skipif("MECHDSL_DATA" not in os.environ, reason="no published data")
def test_years_are_written_with_two_digits(tmp_path: Path) -> None:
    """Greater-than: every row accepts the years after its year, and rejects all others."""
    data = Path(os.environ["MECHDSL_DATA"]) / "greater_than.csv"
    (tmp_path / "years.csv").write_bytes(data.read_bytes())
    path = tmp_path / "years.mech"
    text = """mech 1
model gpt2 = hf("openai-community/gpt2")
prompts years {
  rows "years.csv"
  template "{clean}"
  answer "{label + 1}"
  where label < 99
}
experiment e {
  prompts years limit 20
  measure prob(label + 1..99, digits: 2) - prob(0..label, digits: 2) as raw
}
"""
    path.write_text(text, encoding="utf-8")
    checked = check_source(Source(text, path))
    assert not [d for d in checked.diagnostics if d.severity == "error"]
