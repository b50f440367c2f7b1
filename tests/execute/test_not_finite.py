"""Numbers that are none: an error with run, row and place, or rows that are left out, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.source import Source
from mechdsl.checks.file_check import check_source
from mechdsl.execute.measurement.readout import Readout, ReadoutInput
from mechdsl.execute.measurement.values import UnusableRow, report_not_finite
from mechdsl.execute.patching.rows import Patcher, list_stream_reads
from mechdsl.loading.loader import adopt_model
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult

from .nan import HEAD, MEASURE, ROWS, WITH_FIG, broken, experiment, run

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


def test_an_output_of_nan_names_run_row_and_place() -> None:
    found, diagnostics = run(HEADS)
    assert found is None
    (error,) = (d for d in diagnostics if d.severity == "error")
    assert error.code == "E0621"
    assert "in the run `clean`, row " in error.message
    assert error.label_text == f"first in `embed`, in {WITH_FIG} of {ROWS} rows"


def test_another_experiment_goes_on_and_an_expectation_fails() -> None:
    found, _ = run(HEADS + FINE)
    assert found is not None
    assert [each.name for each in found.experiments] == ["fine"]
    (lost,) = found.lost
    assert (lost.name, lost.reasons[0].code) == ("heads", "E0621")
    assert [outcome.holds for outcome in lost.outcomes] == [False]
    assert not found.complete


def test_rows_are_left_out_of_everything() -> None:
    """As if the prompts had been without them: means that are written, cells and statistics."""
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


def test_what_is_left_out_is_said_and_kept() -> None:
    found, diagnostics = run(HEADS, allow_nan=True)
    assert found is not None
    (warning,) = (d for d in diagnostics if d.code == "W0750")
    assert warning.message.startswith(f"{WITH_FIG} of {ROWS} rows of `heads`")
    (result,) = found.experiments
    assert result.conventions["left out"].startswith(f"{WITH_FIG} of {ROWS} rows")
    document = experiment_document(result).as_json()
    assert [each["where"] for each in document["left_out"]] == ["run `clean`"] * WITH_FIG
    assert not {each["row"] for each in document["left_out"]} & set(result.row_ids or ())


def test_a_keep_that_cannot_be_decided() -> None:
    rule = "ablate L1H2 at last token with zero"
    text = experiment("kept", "keep rank(answer) < 1000", rule, MEASURE)
    found, diagnostics = run(text)
    assert found is None
    assert [d.code for d in diagnostics if d.severity == "error"] == ["E0621"]
    (result,) = (run(text, allow_nan=True)[0] or pytest.fail("lost")).experiments
    assert result.prompts == ROWS - WITH_FIG
    assert "0 dropped" in result.conventions["keep"]


def test_a_keep_that_alone_cannot_be_decided() -> None:
    """Nothing else reads the text whose run is broken."""
    rule = "ablate L1H2 at last token with zero"
    kept = 'keep logprob(" fig 2") > -100'
    found = run(experiment("kept", kept, rule, MEASURE, prompts="others"))[1]
    assert [d.code for d in found if d.severity == "error"] == ["E0621"]


def test_the_first_of_several_that_keep_nothing_is_shown() -> None:
    kept = ("keep rank(answer) < 0", "keep rank(answer) < 5")
    rule = "ablate L1H2 at last token with zero"
    found = run(experiment("kept", *kept, rule, MEASURE, prompts="others"), whole=True)[1]
    (error,) = (d for d in found if d.severity == "error")
    assert error.span is not None
    assert (error.code, error.span.text) == ("E0613", kept[0].removeprefix("keep "))


def test_a_patched_run_names_its_cell() -> None:
    text = experiment("huge", "set resid_post layer 1..2 at last token to 1e39", MEASURE)
    found, diagnostics = run(text + FINE, whole=True)
    assert found is not None
    assert [each.name for each in found.experiments] == ["fine"]
    (error,) = (d for d in diagnostics if d.severity == "error")
    assert "in the patched run of layer 1, row " in error.message
    assert error.label_text == "first in `resid_post` of layer 1"


def test_all_rows_broken_is_an_error_with_the_switch_too() -> None:
    text = experiment("huge", "set resid_post layer 1 at last token to 1e39", MEASURE)
    found, diagnostics = run(text, allow_nan=True, whole=True)
    assert found is None
    assert [d.code for d in diagnostics if d.severity == "error"] == ["E0621"]


@pytest.mark.parametrize("against", [False, True])
def test_a_row_that_one_cell_breaks_is_in_none(
    monkeypatch: pytest.MonkeyPatch, against: bool
) -> None:
    """With `against`, one that a control breaks is in no cell of the experiment either."""
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


# --- what may be infinite -------------------------------------------------------------------------


def readout(*measures: str) -> Readout:
    text = HEAD + experiment("e", *(f"measure {each} as raw" for each in measures))
    (resolved,) = check_source(Source(text)).experiments
    return Readout.of(resolved.measures)


def reading(read: Readout, logits: torch.Tensor) -> ReadoutInput:
    """Every row is the first prompt's, read at one spot, and its reference too."""
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


def test_tokens_that_a_model_excludes_are_no_error() -> None:
    """Entropy, probability, rank and divergence over the others, as they are without them."""
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
def test_one_bad_logit_breaks_the_row_in_every_measure(value: float) -> None:
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
def test_nothing_but_excluded_tokens_breaks_the_row(measure: str) -> None:
    read = readout(measure)
    logits = torch.full((2, 100), -torch.inf)
    logits[0] = torch.linspace(0, 1, 100)
    assert read.read(reading(read, logits)).broken.tolist() == [False, True]


def test_the_difference_of_two_excluded_tokens_is_no_number() -> None:
    """One of them alone is infinite, which has its meaning and no mean."""
    read = readout('logit(answer) - logit(" 3")', "logit(answer)")
    answer, other = (atom.texts[None][0][0] for _, atom in read.atoms[:2])
    logits = torch.zeros(3, 100)
    logits[1, answer] = -torch.inf
    logits[2, [answer, other]] = -torch.inf
    found = read.read(reading(read, logits))
    assert found.broken.tolist() == [False, False, True]
    assert found.values[1][:2].tolist() == [0.0, -np.inf]
    assert np.isnan(found.values[1][2])


def test_the_place_in_a_text_that_is_run_behind_the_prompt() -> None:
    """The prompts themselves are fine."""
    text = experiment(
        "e",
        "ablate layer 1 head 0 at last token with zero",
        'measure logprob(" fig 2") as raw',
        prompts="others",
    )
    (error,) = (d for d in run(text)[1] if d.severity == "error")
    assert (error.code, error.label_text) == ("E0621", "first in `embed`, in 6 of 6 rows")


def test_what_is_said_without_a_place_and_of_one_row() -> None:
    text = HEAD + experiment("e", MEASURE, "measure rank(answer) as raw")
    (found,) = check_source(Source(text)).experiments
    several = report_not_finite(found, UnusableRow(0, "clean"), 3)
    assert several.span is not None
    assert several.span.text == MEASURE
    assert several.label_text == "in 3 of 8 rows"
    one = report_not_finite(found, UnusableRow(0, "clean", place="in `embed`"), 1)
    assert one.label_text == "first in `embed`"


def test_every_block_is_looked_at_in_the_order_of_a_pass() -> None:
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
def test_what_is_made_of_the_rows_of_one_experiment_is_not_of_another(fill: str) -> None:
    """Two write a mean, or other rows, of the same run: one has fewer rows, as its source run is
    broken in some. No row of them is the same."""
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


def test_a_direction_that_is_not_finite_fails_in_every_experiment() -> None:
    """Also where another experiment has tried to compute it before."""
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
