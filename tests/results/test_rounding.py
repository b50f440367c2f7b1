"""Effects within rounding error: their bounds, and that they aren't significant."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import check_source
from mechdsl.execute.measurement.readout import Readout, ReadoutInput
from mechdsl.resolve.types import ItemNumber, MetricTerm, ResolvedMeasure
from mechdsl.results.assembly.collection import rounding_unit_texts
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.statistics_conventions import statistics_conventions
from mechdsl.show.output import show_report
from mechdsl.show.reports.text import is_significant, rounding_note, significance_note
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.measurements import CellStatistics, MeasureData
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import EFFECTS, METRICS, MetricArgument

from ..execute.nan import HEAD, experiment, run
from .synthetic import finished, heads, measure, report, statistics


def one(data: MeasureData) -> CellStatistics:
    return compute_cell_statistics([data], statistics(), 0, effects=EFFECTS)[0]


def test_rounding_bound_has_the_unit_of_the_effect() -> None:
    random = np.random.default_rng(3)
    base = random.normal(-3, 1, (1, 30))
    source = base + 5
    patched = base + random.normal(0, 1, (2, 30))
    patched[1, 10:] = np.nan
    rounding = random.random((1, 30)) * 1e-5
    here = [slice(None), slice(10)]
    expected = {
        "delta": [rounding[0, of].mean() for of in here],
        "total": [rounding[0, of].mean() for of in here],
        "recovery": [rounding[0, of].mean() / 5 for of in here],
        "relative": [rounding[0, of].mean() / abs(base[0, of].mean()) for of in here],
    }
    for effect, bounds in expected.items():
        data = replace(measure(patched, base, source, effect=effect), rounding=rounding)
        assert one(data).rounding == pytest.approx(bounds, rel=1e-6), effect
    each = replace(measure(patched, base, effect="relative", per_prompt=True), rounding=rounding)
    bounds = [(rounding[0, of] / abs(base[0, of])).mean() for of in here]
    assert one(each).rounding == pytest.approx(bounds, rel=1e-6)
    assert np.isnan(one(measure(patched, base, source)).rounding).all()


@pytest.mark.parametrize("bases", [1, 2])
def test_rounding_bound_uses_the_base_of_its_cell(
    bases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells are processed in blocks, with one shared base or one base per cell."""
    monkeypatch.setattr("mechdsl.statistics.intervals.BLOCK_NUMBERS", 1)
    random = np.random.default_rng(4)
    base = np.array([[-3.0], [-9.0]])[:bases] + random.normal(0, 1, (bases, 30))
    rounding = random.random((bases, 30)) * 1e-5
    patched = base + random.normal(0, 1, (2, 30))
    data = replace(measure(patched, base, effect="relative"), rounding=rounding)
    bounds = np.broadcast_to(rounding.mean(1) / abs(base.mean(1)), 2)
    assert one(data).rounding == pytest.approx(bounds, rel=1e-6)


def test_effect_within_rounding_is_not_significant_and_is_marked() -> None:
    result = heads()
    data = result.measures[0]
    live = np.flatnonzero(~data.inert)
    patched = data.patched.copy()
    patched[live[0]] = data.base + 1e-6 * (1 + np.arange(data.base.shape[1]) % 8)
    rounding = np.where(np.arange(data.base.shape[1])[None] % 8, 1e-5, 1e-7)
    small = replace(data, patched=patched, rounding=rounding)
    done = finished(replace(result, measures=(small,), rounding="R"))
    found = done.statistics[0]
    assert found.p_corrected[live[0]] < 0.05
    assert np.flatnonzero(found.at_rounding).tolist() == [live[0]]
    assert not is_significant(done, 0)[live[0]]
    exact = finished(replace(result, measures=(replace(small, rounding=None),)))
    assert is_significant(exact, 0)[live[0]]
    assert is_significant(exact, 0).sum() == is_significant(done, 0).sum() + 1
    assert significance_note(exact, 0) != significance_note(done, 0)
    assert (
        "1 cell with a mean effect no larger" in statistics_conventions(done, EFFECTS)["rounding"]
    )
    assert "rounding" not in statistics_conventions(exact, EFFECTS)
    cells = experiment_document(done).as_json()["cells"]
    bounds = [cell["measures"][0].get("rounding") for cell in cells]
    assert [n for n, bound in enumerate(bounds) if bound is not None] == [live[0]]
    assert done.records()[live[0]]["at_rounding"]
    shown: dict[str, dict[str, str]] = {
        "table": {},
        "heatmap": {"variable": "layer", "by": "head"},
        "lines": {"variable": "head"},
    }
    for kind, axes in shown.items():
        text = io.StringIO()
        show_report(done, report(kind, **axes), Console(file=text, width=120))
        assert "1 mean is at the level of rounding (up to " in text.getvalue(), kind


def readout(*measures: str) -> Readout:
    text = HEAD + experiment("e", *(f"measure {each} as raw" for each in measures))
    (resolved,) = check_source(Source(text)).experiments
    return Readout.of(resolved.measures)


def bounds(read: Readout, logits: torch.Tensor, relative: float) -> list[float]:
    """Return the rounding bound of each measure for logits [1, vocab]."""
    reading = ReadoutInput(
        run="clean",
        prompts=np.zeros(1, dtype=np.int64),
        items=[None],
        logits=logits[:, None],
        continued={},
        loss=None,
        activations={},
        references={},
    )
    return [float(each[0]) for each in read.read(reading, relative).rounding]


def test_rounding_bounds_of_logit_prob_logprob_and_rank() -> None:
    """Bounds equal the largest effect of moving every logit by the rounding error."""
    read = readout('logit(answer) - logit(" 3")', "prob(answer)", "logprob(answer)", "rank(answer)")
    targets = [atom.texts[None][0][0] for _, atom in read.atoms]
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 120, generator=random, dtype=torch.float64) * 3
    relative = 1e-6
    found = bounds(read, logits, relative)
    largest = float(logits.abs().max())
    p = float(logits.softmax(-1)[0, targets[0]])
    expected = [2 * relative * largest, relative * largest * p, relative * largest, 0.0]
    assert found == pytest.approx(expected, rel=1e-6)
    assert bounds(read, logits, 0.0) == [0.0] * 4


def test_rounding_bound_uses_the_largest_of_all_logits() -> None:
    """If only some tokens have logits, the largest of all logits is passed with them."""
    read = readout("logit(answer)", 'logit(answer) - logit(" 3")')
    tokens = sorted({atom.texts[None][0][0] for _, atom in read.atoms})
    logits = torch.zeros(1, 120, dtype=torch.float64)
    logits[0, tokens] = torch.tensor([0.01, -0.02], dtype=torch.float64)
    logits[0, next(n for n in range(120) if n not in tokens)] = -40.0
    few = ReadoutInput(
        run="clean",
        prompts=np.zeros(1, dtype=np.int64),
        items=[None],
        logits=logits[:, None, tokens],
        continued={},
        loss=None,
        activations={},
        references={},
        tokens=torch.tensor(tokens),
        largest=torch.tensor([[40.0]]),
    )
    found = [float(each[0]) for each in read.read(few, 1e-6).rounding]
    assert found == pytest.approx([4e-5, 8e-5]) == bounds(read, logits, 1e-6)


@pytest.mark.parametrize("value", [-200.0, -1.0, 0.001, 3000.0])
def test_rounding_bound_of_a_regression_output_is_relative_to_it(value: float) -> None:
    """`output` and `output(class 0)` are the same number, and their bound is linear in it."""
    forms = METRICS["output"].forms
    node = ast.Name("output", span=Span(Source(""), 0, 0))
    of_class: dict[ItemNumber, tuple[tuple[int, ...], ...]] = {None: ((0,),)}
    atoms = (
        MetricTerm(node, "output", forms["nothing"]),
        MetricTerm(node, "output", forms["class"], of_class),
    )
    measures = [ResolvedMeasure("", "", node, (atom,), "number", "number", {}) for atom in atoms]
    found = bounds(Readout.of(measures), torch.tensor([[value]], dtype=torch.float64), 1e-6)
    assert found == pytest.approx([1e-6 * abs(value)] * 2, rel=1e-4)


def test_rounding_bounds_of_rank_and_correct_count_close_tokens() -> None:
    """Only tokens with logits closer than twice the bound may swap ranks with the answer.
    `correct` depends only on the best token."""
    read = readout("rank(answer)", "correct", "1 / rank(answer)")
    target = read.atoms[0][1].texts[None][0][0]
    others = [token for token in range(120) if token != target]

    def found(own: float, *near: float) -> list[float]:
        logits = torch.full((1, 120), -10.0, dtype=torch.float64)
        logits[0, target] = own
        for token, value in zip(others, near, strict=False):
            logits[0, token] = value
        return bounds(read, logits, 1e-3)

    # The largest logit is 10, so one logit moves by 0.01, and two move apart by 0.02.
    assert found(5.0, 4.0, 3.0) == [0, 0, 0]
    assert found(5.0, 4.985) == [1, 1, 0.5]  # the second of two
    assert found(5.0, 4.975) == [0, 0, 0]
    assert found(5.0, 5.015, 4.985) == [2, 1, 0.5]  # rank 2: 1 to 4
    assert found(5.0, 6.0, 5.015) == [1, 0, pytest.approx(1 / 6)]  # rank 3: 2 to 4, and never right
    assert found(5.0, 5.0) == [1, 1, 0.5]  # a tie


def test_rounding_bounds_ignore_swaps_among_accepted_tokens() -> None:
    """Accepted tokens may swap ranks among themselves without an effect."""
    read = readout('rank(answer, " 3")', 'correct(answer, " 3")')
    one, two = read.atoms[0][1].sets[None].of(0)
    rival = next(token for token in range(120) if token not in (one, two))

    def found(first: float, second: float, other: float) -> list[float]:
        logits = torch.full((1, 120), -10.0, dtype=torch.float64)
        logits[0, [one, two, rival]] = torch.tensor([first, second, other], dtype=torch.float64)
        return bounds(read, logits, 1e-3)

    assert found(5.0, 4.99, 4.0) == [0, 0]
    assert found(5.0, 4.0, 4.01) == [0, 0]
    assert found(4.0, 5.0, 5.01) == [1, 1]
    assert found(4.0, 5.0, 5.03) == [0, 0]


def test_rounding_bound_of_a_category_counts_close_numerals() -> None:
    """If the two best numerals are close, rounding may swap them, which changes an error by at most
    the range of the numerals."""
    read = readout("argmax(1..9)", "argmax(3..3)", "absolute_error(2..9)", "expected(1..9)")
    tokens = read.atoms[0][1].sets[None].of(0)

    def found(best: float, second: float) -> list[float]:
        logits = torch.full((1, 120), -10.0, dtype=torch.float64)
        logits[0, tokens[2]], logits[0, tokens[5]] = best, second
        return bounds(read, logits, 1e-3)[:3]

    assert found(5.0, 4.985) == [1, 0, 7]
    assert found(4.985, 5.0) == [1, 0, 7]
    assert found(5.0, 4.975) == [0, 0, 0]


def close() -> ExperimentResult:
    """Two effects are equal up to rounding, and rounding may change two answers."""
    result = heads()
    data = result.measures[0]
    live = np.flatnonzero(~data.inert)
    patched = data.patched.copy()
    patched[live[0]] = patched[live[2]] + 1e-6
    changing = np.zeros(64)
    changing[:2] = 1
    measures = (replace(data, patched=patched, rounding=np.full_like(data.base, 1e-5)),)
    accuracy = {"clean": changing, "fewer": np.zeros(64)}
    return replace(result, measures=measures, accuracy_rounding=accuracy, rounding="R")


DECIDED_BY_ROUNDING = {
    "accuracy(clean) > 0.92 on mean": "it can change the value by 3.1e-02",
    "accuracy(clean) < 0.93 on mean": "it can change the value by 3.1e-02",
    "not accuracy(clean) > 0.94 on mean": "it can change the value by 3.1e-02",
    "accuracy(clean) in 0.93..1 on mean": "it can change the value by 3.1e-02",
    "accuracy(clean) - accuracy(fewer) > -0.07 on mean": "it can change the value by 3.1e-02",
    "2 * accuracy(clean) > 1.85 on mean": "it can change the value by 6.2e-02",
    "recovery(L2H1) > recovery(L1H1)": "",
    "recovery(FIRST) - recovery(SECOND) > 0 on mean": "it can change the value by 4.0e-06",
    "abs(recovery(FIRST) - recovery(SECOND)) < 0.1": "",
    "accuracy(clean) > 0.5": "",
    "accuracy(fewer) = 1": "",
    "argmax(recovery) = L2H1": "",
    "top 1 contains L2H1": "",
}


@pytest.mark.parametrize(("line", "said"), DECIDED_BY_ROUNDING.items(), ids=DECIDED_BY_ROUNDING)
def test_expectation_that_rounding_may_decide_states_it(line: str, said: str) -> None:
    result = close()
    live = np.flatnonzero(~result.measures[0].inert)
    first, second = (result.cells[live[i]].name.partition(".")[0] for i in (0, 2))
    (outcome,) = finished(result, line.replace("FIRST", first).replace("SECOND", second)).outcomes
    reason = outcome.reason or ""
    assert ("rounding alone may decide it" in reason) == bool(said), reason
    assert said in reason


@pytest.mark.parametrize(("unit", "base"), [("share", True), ("rank", True), ("logit", False)])
def test_rounding_note_of_shares_and_ranks_refers_to_the_base_run(unit: str, base: bool) -> None:
    """A patch may bring two logits together, or apart, that aren't close in the base run."""
    result = close()
    data = result.measures[0]
    measures = (replace(data, unit=unit, effect="raw", rounding=np.full_like(data.base, 1e3)),)
    lines = "max(raw) > 0 on mean", "argmax(raw) = L2H1", "top 1 contains L2H1"
    lines += ("accuracy(clean) > 0.92 on mean",)
    outcomes = finished(replace(result, measures=measures), *lines).outcomes
    reasons = [outcome.reason or "" for outcome in outcomes]
    assert all("rounding alone may decide it" in reason for reason in reasons)
    said = ["in the base run" in reason for reason in reasons]
    assert said == [base, base, base, False]


def test_leading_cell_that_rounding_may_decide_states_it() -> None:
    result = close()
    data = result.measures[0]
    best, other = 9, 8
    patched = data.patched.copy()
    patched[other] = patched[best] + np.array([1e-6, -1e-6] * 32)
    result = replace(result, measures=(replace(data, patched=patched),))
    assert [result.cells[i].name for i in (best, other)] == ["L2H1.z", "L2H0.z"]
    lines = "argmax(recovery) = L2H1", "top 1 contains L2H1", "top 2 contains L2H1"
    outcomes = finished(result, *lines).outcomes
    said = ["rounding alone may decide it" in (each.reason or "") for each in outcomes]
    assert said == [True, True, False]


def test_shares_that_rounding_may_alter_are_marked() -> None:
    """Accuracies, `correct` and categories: in the JSON, under tables and in the conventions."""
    result = close()
    data = result.measures[0]
    moved = np.zeros_like(data.base)
    moved[0, :4] = 1
    shares = replace(data, effect="raw", unit="share", rounding=moved)
    ones = np.ones_like(data.patched)
    categories = replace(shares, label="of_nine", kind="category", unit="count", patched=ones)
    logits = replace(data, label="logits", effect="raw", rounding=moved)
    done = finished(replace(result, measures=(shares, categories, logits)))
    for number, marked in enumerate((True, True, False)):
        assert done.statistics[number].rounding == pytest.approx([4 / 64] * len(result.cells))
        assert not done.statistics[number].at_rounding.any()
        assert (rounding_note(done, number) is not None) == marked
    document = experiment_document(done).as_json()
    cells = [[each.get("rounding") for each in cell["measures"]] for cell in document["cells"]]
    assert cells == [[4 / 64, 4 / 64, None]] * len(result.cells)
    accuracies = {run: values[-1].get("rounding") for run, values in document["runs"].items()}
    assert accuracies == {"clean": 2 / 64, "fewer": None}
    said = statistics_conventions(done, EFFECTS)["rounding"]
    assert "24 cells in which rounding may change single prompts of the base run" in said
    assert "estimated from the base run" in (rounding_note(done, 0) or "")
    assert "the accuracy of clean by up to 0.031" in said
    assert "fewer" not in said


def test_accuracy_of_a_file_has_a_rounding_bound() -> None:
    """The accuracy in an expectation is `correct` of the same run."""
    lines = "measure correct as raw", "measure argmax(1..9) as raw", "expect accuracy(clean) > 0.5"
    found, diagnostics = run(experiment("e", *lines), whole=True)
    assert found is not None, diagnostics
    (result,) = found.experiments
    assert result.accuracy_rounding["clean"].shape == result.accuracy["clean"].shape
    assert (result.accuracy_rounding["clean"] == result.measures[0].rounding).all()
    assert "a category can change in rows" in result.rounding


def test_ranks_and_shares_of_a_file_have_a_rounding_bound() -> None:
    """The bound is reported, and an effect of exactly 0 isn't at the level of rounding."""
    rule = "ablate resid_post layer 1 at last token with zero"
    lines = rule, "measure rank(answer) as delta", "measure correct as delta"
    found, diagnostics = run(experiment("e", *lines), whole=True)
    assert found is not None, diagnostics
    (result,) = found.experiments
    for data, statistics_of in zip(result.measures, result.statistics, strict=True):
        assert data.rounding is not None
        exact = (data.rounding == 0).all()
        assert statistics_of.rounding[0] == pytest.approx(data.rounding.mean())
        assert not (exact and statistics_of.at_rounding[0])
    assert "a rank can change by the tokens" in result.rounding
    assert "`correct` can change in rows" in result.rounding


def test_mean_ablation_of_equal_vectors_is_at_the_level_of_rounding() -> None:
    """At token 1 every row has the same vector, which equals the mean up to rounding; at the
    last token, vectors differ."""
    rule = "ablate resid_post layer 1..2 at {} with mean"
    experiments = {
        "same": experiment("same", rule.format("token 1"), "measure logit(answer) as delta"),
        "other": experiment("other", rule.format("last token"), "measure logit(answer) as delta"),
    }
    found, diagnostics = run("".join(experiments.values()), whole=True)
    assert found is not None, diagnostics
    same, other = found.experiments
    assert same.statistics[0].at_rounding.all()
    assert not is_significant(same, 0).any()
    assert not other.statistics[0].at_rounding.any()
    assert "float32" in same.conventions["rounding"]
    assert "rounding" not in other.conventions


@pytest.mark.parametrize(
    ("takes", "said", "unsaid"),
    [("target", "two largest logits", "of 0"), ("label", "a logit within that of 0", "two best")],
)
def test_rounding_texts_depend_on_the_type_of_label(
    takes: MetricArgument, said: str, unsaid: str
) -> None:
    """Independent labels are decided by the sign of their logit."""
    forms = [METRICS["correct"].forms[takes]]
    words = "; ".join(rounding_unit_texts(forms))
    assert said in words
    assert unsaid not in words
