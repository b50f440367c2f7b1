"""NaN and infinity: an error with run, row and site, or rows that are left out and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.execute.measurement.readout import Readout, ReadoutInput
from mechdsl.execute.measurement.values import UnusableRow, report_not_finite
from mechdsl.execute.patching.rows import Patcher, list_stream_reads
from mechdsl.loading.loader import adopt_model
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult

from .encoder_decoders import GEMMA, tokenizer
from .nan import HEAD, MEASURE, ROWS, WITH_FIG, broken, experiment, run
from .support import DIFFERENCE, try_file
from .support import experiment as on_words

HEADS = experiment(
    "heads",
    "ablate layer * head * at last token with mean",
    MEASURE,
    "measure rank(answer) as raw",
    "measure entropy as raw",
    "expect accuracy(clean) < 0.9",
)
FINE = experiment(
    "fine",
    "ablate layer 1 head * at last token with zero",
    MEASURE,
    prompts="others",
)


def test_nan_error_names_run_row_and_site() -> None:
    found, diagnostics = run(HEADS)
    assert found is None
    (error,) = (d for d in diagnostics if d.severity == "error")
    assert error.code == "E0621"
    assert "in the run `clean`, row " in error.message
    assert error.label_text == f"first in `embed`, in {WITH_FIG} of {ROWS} rows"


def test_nan_in_one_experiment_spares_others_and_fails_its_expectations() -> None:
    found, _ = run(HEADS + FINE)
    assert found is not None
    assert [each.name for each in found.experiments] == ["fine"]
    (lost,) = found.lost
    assert (lost.name, lost.reasons[0].code) == ("heads", "E0621")
    assert [outcome.holds for outcome in lost.outcomes] == [False]
    assert not found.complete


def test_allow_nan_equals_prompts_without_the_nan_rows() -> None:
    """Means, cells and statistics equal those of prompts without these rows."""
    (found,) = (run(HEADS, allow_nan=True)[0] or pytest.fail("lost")).experiments
    without = HEADS.replace("prompts pairs", "prompts others")
    (expected,) = (run(without, whole=True)[0] or pytest.fail("lost")).experiments
    assert found.prompts == ROWS - WITH_FIG == expected.prompts

    def rows(result: ExperimentResult) -> list[tuple[str, str]]:
        return list(zip(result.row_values["item"], result.row_values["other"], strict=True))

    order = [rows(expected).index(row) for row in rows(found)]
    for own, other in zip(found.measures, expected.measures, strict=True):
        assert np.allclose(own.patched, other.patched[:, order], atol=1e-4)
        assert np.allclose(own.base, other.base[:, order], atol=1e-4)
    for each in found.statistics:
        assert set(each.n.tolist()) == {ROWS - WITH_FIG}
    assert set(found.row_values["item"]) == {"apple", "pear", "plum"}
    assert found.accuracy["clean"].shape == (ROWS - WITH_FIG,)


def test_left_out_rows_are_reported_in_warning_conventions_and_json() -> None:
    found, diagnostics = run(HEADS, allow_nan=True)
    assert found is not None
    (warning,) = (d for d in diagnostics if d.code == "W0750")
    assert warning.message.startswith(f"{WITH_FIG} of {ROWS} rows of `heads`")
    (result,) = found.experiments
    assert result.conventions["left out"].startswith(f"{WITH_FIG} of {ROWS} rows")
    document = experiment_document(result).as_json()
    assert [each["where"] for each in document["left_out"]] == ["run `clean`"] * WITH_FIG
    assert not {each["row"] for each in document["left_out"]} & set(result.row_ids or ())


def test_keep_on_nan_is_an_error_or_leaves_rows_out() -> None:
    rule = "ablate L1H2 at last token with zero"
    text = experiment("kept", "keep rank(answer) < 1000", rule, MEASURE)
    found, diagnostics = run(text)
    assert found is None
    assert [d.code for d in diagnostics if d.severity == "error"] == ["E0621"]
    (result,) = (run(text, allow_nan=True)[0] or pytest.fail("lost")).experiments
    assert result.prompts == ROWS - WITH_FIG
    assert "0 dropped" in result.conventions["keep"]


def test_keep_on_a_text_with_nan_is_an_error() -> None:
    """Nothing else reads the text whose values are NaN."""
    rule = "ablate L1H2 at last token with zero"
    kept = 'keep logprob(" fig 2") > -100'
    found = run(experiment("kept", kept, rule, MEASURE, prompts="others"))[1]
    assert [d.code for d in found if d.severity == "error"] == ["E0621"]


def test_error_shows_the_first_keep_that_drops_all_rows() -> None:
    kept = ("keep rank(answer) < 0", "keep rank(answer) < 5")
    rule = "ablate L1H2 at last token with zero"
    found = run(experiment("kept", *kept, rule, MEASURE, prompts="others"), whole=True)[1]
    (error,) = (d for d in found if d.severity == "error")
    assert error.span is not None
    assert (error.code, error.span.text) == ("E0613", kept[0].removeprefix("keep "))


def test_nan_error_of_a_patched_run_names_the_cell() -> None:
    text = experiment("huge", "set resid_post layer 1..2 at last token to 1e39", MEASURE)
    found, diagnostics = run(text + FINE, whole=True)
    assert found is not None
    assert [each.name for each in found.experiments] == ["fine"]
    (error,) = (d for d in diagnostics if d.severity == "error")
    assert "in the patched run of layer 1, row " in error.message
    assert error.label_text == "first in `resid_post` of layer 1"


def test_nan_in_all_rows_is_an_error_with_allow_nan() -> None:
    text = experiment("huge", "set resid_post layer 1 at last token to 1e39", MEASURE)
    found, diagnostics = run(text, allow_nan=True, whole=True)
    assert found is None
    assert [d.code for d in diagnostics if d.severity == "error"] == ["E0621"]


@pytest.mark.parametrize("against", [False, True])
def test_row_with_nan_in_one_cell_is_left_out_of_all_cells(
    monkeypatch: pytest.MonkeyPatch, against: bool
) -> None:
    """With `against`, a row that a control breaks is in no cell of the experiment either."""
    whole = Patcher.values

    def third_row_breaks(self: Patcher, *args: Any) -> Iterator[Any]:
        for member, found in whole(self, *args):
            of_control = self.plans[member.number].experiment.control_of is not None
            bad = (member.rows.prompt == 3) & (member.rows.cell == 1) & (of_control == against)
            values = [np.where(bad, np.nan, each) for each in found.values]
            yield member, replace(found, values=values, broken=bad)

    monkeypatch.setattr(Patcher, "values", third_row_breaks)
    lines = ["ablate layer 1 head * at last token with zero", MEASURE]
    text = experiment("heads", *lines, *(["against random(3)"] if against else []))
    found, diagnostics = run(text, allow_nan=True, whole=True)
    assert found is not None, diagnostics
    (result,) = found.experiments
    assert result.statistics[0].n.tolist() == [ROWS - 1] * 4
    assert result.measures[0].patched.shape == (4, ROWS - 1)
    if not against:
        assert list(result.left_out.values()) == ["patched run of head 1"]


# --- valid infinite values ------------------------------------------------------------------------


def readout(*measures: str) -> Readout:
    text = HEAD + experiment("e", *(f"measure {each} as raw" for each in measures))
    (resolved,) = check_source(Source(text)).experiments
    return Readout.of(resolved.measures)


def reading(read: Readout, logits: torch.Tensor) -> ReadoutInput:
    """Every row is the first prompt, read at one position, with itself as the reference."""
    rows = len(logits)
    return ReadoutInput(
        run="clean",
        prompts=np.zeros(rows, dtype=np.int64),
        items=[None] * rows,
        logits=logits[:, None],
        continued={},
        loss=None,
        activations={},
        references={n: logits.flip(0) for n, (_, a) in enumerate(read.atoms) if a.run is not None},
    )


def test_excluded_tokens_are_ignored_by_metrics() -> None:
    """Entropy, probability, rank and divergence are those over the other tokens."""
    read = readout("prob(answer)", "entropy", "rank(answer)", "kl(clean)")
    (target,) = {ids[0] for ids in read.atoms[0][1].texts[None]}
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, target + 20, generator=random)
    logits[:, -7:] = -torch.inf
    found = read.read(reading(read, logits))
    assert found.broken.tolist() == [False, False]
    p = logits[:, :-7].double().softmax(-1)
    expected = [
        p[:, target],
        -(p * p.log()).sum(-1),
        1.0 + (p > p[:, [target]]).sum(-1),
        (p.flip(0) * (p.flip(0) / p).log()).sum(-1),
    ]
    for own, other in zip(found.values, expected, strict=True):
        assert np.allclose(own, other.numpy(), atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_invalid_logit_invalidates_the_row_in_every_measure(value: float) -> None:
    read = readout("logit(answer)", "rank(answer)", "entropy")
    logits = torch.zeros(3, 100)
    logits[1, 5] = value
    found = read.read(reading(read, logits))
    assert found.broken.tolist() == [False, True, False]
    for each in found.values:
        assert np.isnan(each).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "measure", ["entropy", "expected(1..9)", "argmax(1..9)", 'logit(answer) - logit(" 3")']
)
def test_row_of_only_excluded_tokens_is_invalid(measure: str) -> None:
    read = readout(measure)
    logits = torch.full((2, 100), -torch.inf)
    logits[0] = torch.linspace(0, 1, 100)
    assert read.read(reading(read, logits)).broken.tolist() == [False, True]


def test_difference_of_two_excluded_tokens_is_invalid() -> None:
    """The logit of one excluded token is infinite, which is a valid value without a mean."""
    read = readout('logit(answer) - logit(" 3")', "logit(answer)")
    answer, other = (atom.texts[None][0][0] for _, atom in read.atoms[:2])
    logits = torch.zeros(3, 100)
    logits[1, answer] = -torch.inf
    logits[2, [answer, other]] = -torch.inf
    found = read.read(reading(read, logits))
    assert found.broken.tolist() == [False, False, True]
    assert found.values[1][:2].tolist() == [0.0, -np.inf]
    assert np.isnan(found.values[1][2])


def test_nan_in_a_text_after_the_prompt_is_an_error_with_its_site() -> None:
    """The prompts themselves are finite."""
    text = experiment(
        "e",
        "ablate layer 1 head 0 at last token with zero",
        'measure logprob(" fig 2") as raw',
        prompts="others",
    )
    (error,) = (d for d in run(text)[1] if d.severity == "error")
    assert (error.code, error.label_text) == ("E0621", "first in `embed`, in 6 of 6 rows")


def test_nan_error_without_a_site_and_for_one_row_states_the_rows() -> None:
    text = HEAD + experiment("e", MEASURE, "measure rank(answer) as raw")
    (found,) = check_source(Source(text)).experiments
    model, problems = adopt_model("toy", *broken())
    assert model is not None, problems
    several = report_not_finite(found, UnusableRow(0, "clean"), 3, model)
    assert several.span is not None
    assert several.span.text == MEASURE
    assert several.label_text == "in 3 of 8 rows"
    one = report_not_finite(found, UnusableRow(0, "clean", place="in `embed`"), 1, model)
    assert one.label_text == "first in `embed`"


SAID_OF_ZERO, SAID_OF_LARGE = "a vector of zeros is NaN", "numbers that are too large"
HELP = {
    "zeros": (("ablate resid_post layer 1 at last token with zero",), "", SAID_OF_ZERO),
    "large numbers": (("set resid_post layer 1 at last token to 1e39",), "", SAID_OF_LARGE),
    "a run without rules": (
        ("ablate resid_post layer 1 at last token with zero",),
        None,
        "no rule acts in this run",
    ),
    "a run with rules": (
        (
            "run emptied { ablate resid_post layer 1 at last token with zero }",
            "from emptied into clean",
            "patch resid_post layer 2 at last token",
        ),
        None,
        SAID_OF_ZERO,
    ),
}


@pytest.mark.parametrize("name", HELP)
def test_help_for_nan_names_what_the_rules_write(name: str) -> None:
    lines, cell, said = HELP[name]
    text = HEAD + experiment("e", *lines, MEASURE)
    (found,) = check_source(Source(text)).experiments
    model, problems = adopt_model("toy", *broken())
    assert model is not None, problems
    run_name = "emptied" if "emptied" in found.derived else "clean"
    error = report_not_finite(found, UnusableRow(0, run_name, cell), 1, model)
    assert said in (error.help_text or "")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_padding_that_sees_no_token_in_float64_is_an_error_with_the_cause(
    dtype: str, tmp_path: Path
) -> None:
    """transformers masks with the lowest float64, and computes the softmax in float32: a query of
    padding beyond the window of real tokens sees nothing, and its NaN spreads."""
    config = AutoConfig.for_model("gemma2", **{**GEMMA, "num_hidden_layers": 2}, sliding_window=2)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    rule = "ablate resid_post layer 0 at last token with zero"
    text = on_words("e", "prompts p", rule, DIFFERENCE)
    found, problems = try_file(text, tmp_path, module, tokenizer=tokenizer())
    errors = [each for each in problems if each.severity == "error"]
    assert [each.code for each in errors] == ["E0621"] * (dtype == "float64")
    if dtype == "float64":
        assert "the mask of float64 is infinite in the softmax of float32" in errors[0].help_text
    else:
        assert found is not None


def test_stream_reads_cover_every_block_in_order() -> None:
    model, found = adopt_model("toy", *broken())
    assert model is not None, found
    sites = [(read.site, read.layer) for read in list_stream_reads(model)]
    assert sites[0] == ("embed", None)
    assert [layer for site, layer in sites if site == "resid_post"] == [0, 1, 2, 3]
    assert sites[-1] == ("final_norm", None)


TURNED = """
prompts turning {
  item in ["apple", "pear", "plum"]
  alt in ["apple", "fig"]
  template "Part 1: {item} {item} Count 1:"
  answer " 2"
  corrupt turned { item = alt }
}
"""


@pytest.mark.parametrize("fill", ["mean of clean", "resample of clean"])
def test_means_and_donors_are_separate_for_experiments_with_other_rows(fill: str) -> None:
    """Two experiments write a mean, or other rows, of the same run. One has fewer rows, as its
    source run has NaN in some. They share no row."""
    rule = f"ablate mlp_out layer 0..1 at last token with {fill}"
    few = experiment("few", "from turned into clean", rule, MEASURE, prompts="turning")
    all_ = experiment("all", rule, MEASURE, prompts="turning")
    (one, other) = (run(TURNED + few + all_, allow_nan=True)[0] or pytest.fail("lost")).experiments
    assert 1 < one.prompts < other.prompts
    for text, together in ((few, one), (all_, other)):
        (alone,) = (run(TURNED + text, allow_nan=True)[0] or pytest.fail("lost")).experiments
        np.testing.assert_allclose(
            together.measures[0].patched, alone.measures[0].patched, atol=1e-4
        )
    of_few = [other.row_ids.index(row) for row in one.row_ids]  # type: ignore[union-attr]
    differ = one.measures[0].patched - other.measures[0].patched[:, of_few]
    assert np.abs(differ).max() > 1e-3


def test_direction_with_nan_is_an_error_in_every_experiment() -> None:
    """Also if another experiment has tried to compute it before."""
    measure = "measure logit(answer) as delta"
    add = "add d to resid_post layer 1 at last token"
    text = "\ndirection d = mean(pairs) at resid_post layer 1\n"
    text += "".join(experiment(name, add, measure, prompts="others") for name in "ab")
    scale = "scale embed at last token by 2"
    result, found = run(text + experiment("c", scale, measure, prompts="others"))
    assert result is not None
    assert [each.name for each in result.experiments] == ["c"]
    errors = [each for each in found if each.severity == "error"]
    assert {each.code for each in errors} == {"E0641"}
    assert {each.name for each in result.lost} == {"a", "b"}
