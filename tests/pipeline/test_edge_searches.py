"""Circuits that a file declares with `fit(acdc(…))`, `fit(coarse_to_fine(…))`, `fit(greedy(…))`.

Decisions and changes of the measure are compared with a float64 pass that recomputes all inputs,
one unpadded prompt at a time. Further tests: independence of the batch size, checkpoints, keys,
costs, and errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.execute.mask_training import EdgeRows, EdgeSearch
from mechdsl.fits.reports import CircuitReport
from mechdsl.planner.training_cost import training_cost
from mechdsl.program.trainers import EdgeSearchTrainer
from mechdsl.resolve.circuits import CircuitDraws, EdgeGraph
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge

from ..quick import in_turn, some
from ..rules.circuits import circuit_pass
from ..rules.models import WITHOUT_NORMS, double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import Case, fills, named, shape_of
from .test_edge_scores import fit as scored
from .test_edge_scores import open_rows
from .test_trained_circuits import PAIR, PATCHES
from .test_trained_dictionaries import check_keys, experiment, run, train, write
from .test_trained_rotations import LOSS, NOISY, OTHER, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt_neox", "gpt2", "llama" + WITHOUT_NORMS)
HALF = "validation: 50%, batch: 8"
ACDC = "acdc(threshold: 0.03)"
COARSE = "coarse_to_fine(threshold: 0.03)"


def fit(options: str = HALF, *, call: str = ACDC, **others: str) -> str:
    return scored(options, call=call, **others)


def reference_measure(
    family: str, ids: Sequence[int], source: str, at: str
) -> Callable[[Collection[CircuitEdge]], float]:
    """A function from ablated edges to the mean of the measure."""
    given = fills(family, Case("c", source.split()[1], at), {})

    def mean(ablated: Collection[CircuitEdge]) -> float:
        edges, found = [named(edge) for edge in ablated], list[float]()
        for row in ids:
            here, there = rows("clean")[row], tokens(rows("clean")[row], at)
            logits = circuit_pass(family, double(family), here.ids, given[row], edges, there)
            found.append(loss_by_hand(logits[-1], row).item())
        return float(np.mean(found))

    return mean


def test_search_at_a_token_before_the_last_keeps_edges(tmp_path: Path) -> None:
    path = write(tmp_path, fit(HALF, call="acdc(threshold: 0.001)", at="cue token"), PATCHES)
    searched, _ = search(path, "llama")
    mask, _ = open_rows(path, double("llama"))
    ends = [label_candidates((edge,)).split(" -> ")[1] for edge in mask.candidates]
    kept = [end for end, own in zip(ends, searched.kept.tolist(), strict=True) if own]
    assert any(end.endswith((".k", ".v")) for end in kept)
    assert "logits" not in kept


def search(path: Path, family: str, side: Any = None) -> tuple[EdgeSearch, list[int]]:
    """Return a finished search, and the table indices of its training rows."""
    mask, found = open_rows(path, double(family), side)
    searched = EdgeSearch(found, mask.training.trainer_of(EdgeSearchTrainer))
    for _ in searched.run():
        pass
    return searched, [found.objective.table.row_ids[row] for row in found.trained]


SOURCES = ("from: other", "with: zero", "from: turned")


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES, ("llama",)))
def test_acdc_decisions_equal_an_edge_by_edge_reference(
    family: str, source: str, tmp_path: Path
) -> None:
    """Every edge of the model is tried, also those that lead only to ablated edges."""
    path = write(tmp_path, fit(source=source, at=PAIR), PATCHES)
    searched, ids = search(path, family, "left" if source == "with: zero" else "right")
    every = open_rows(path, double(family))[1].candidates
    mean = reference_measure(family, ids, source, PAIR)
    receivers = [to for _, to in every if _ == every[0][0]]
    ablated: set[CircuitEdge] = set()
    changes, value = dict[CircuitEdge, float](), mean(())
    for receiver in reversed(receivers):
        for edge in reversed([edge for edge in every if edge[1] == receiver]):
            changes[edge] = mean({*ablated, edge}) - value
            if -changes[edge] < 0.03:  # maximised
                ablated.add(edge)
                value += changes[edge]
    assert [edge in ablated for edge in every] == (~searched.kept).tolist()
    np.testing.assert_allclose(searched.scores, [changes[edge] for edge in every], atol=1e-5)
    assert 2 < searched.kept.sum() < searched.measured


@pytest.mark.slow  # the next test compares batches of a search from coarse to fine
@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES, ("llama",)))
def test_acdc_decisions_do_not_depend_on_the_batch_size(
    family: str, source: str, tmp_path: Path
) -> None:
    searched, _ = search(write(tmp_path, fit(source=source, at=PAIR), PATCHES), family)
    alone = write(tmp_path, fit("validation: 50%, batch: 1", source=source, at=PAIR), PATCHES)
    single, _ = search(alone, family)
    np.testing.assert_array_equal(single.kept, searched.kept)
    np.testing.assert_allclose(single.scores, searched.scores, atol=1e-6)
    assert single.measured < searched.measured  # circuits after a restored edge are measured again


def reference_groups(every: Sequence[CircuitEdge]) -> list[list[CircuitEdge]]:
    """Edges from a layer's heads or its MLP, from a head, into a query, key or value, and alone."""
    found: list[list[CircuitEdge]] = []
    texts = {edge: named(edge) for edge in every}
    senders = [*dict.fromkeys(of for of, _ in texts.values())]
    receivers = [to for of, to in texts.values() if of == senders[0]]
    layers = range(max(of.layer or 0 for of, _ in every), -1, -1)
    for layer in layers:
        for own in (f"L{layer}.mlp", f"L{layer}H"):
            found.append([edge for edge in every if texts[edge][0].startswith(own)])
    for sender in reversed(senders):
        if "H" in sender:
            found.append([edge for edge in every if texts[edge][0] == sender])
    for receiver in reversed(receivers):
        if receiver[-2:] in (".q", ".k", ".v"):
            found.append([edge for edge in every if texts[edge][1] == receiver])
    for receiver in reversed(receivers):
        found += [[edge] for edge in reversed(every) if texts[edge][1] == receiver]
    return found


def test_search_steps_go_from_coarse_to_fine_groups() -> None:
    for family in HERE:
        graph = EdgeGraph(shape_of(family))
        steps = graph.list_search_steps(("blocks", "heads", "inputs", "edges"))
        own, expected = [{*step.edges} for step in steps], reference_groups(graph.every)
        assert own == [{*group} for group in expected]


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES, ("llama",)))
def test_coarse_to_fine_decisions_equal_a_group_by_group_reference(
    family: str, source: str, tmp_path: Path
) -> None:
    """Groups are tried even if they lead only to ablated edges."""
    path = write(tmp_path, fit(call=COARSE, source=source, at=PAIR), PATCHES)
    searched, ids = search(path, family, "left" if source == "with: zero" else "right")
    every = open_rows(path, double(family))[1].candidates
    mean = reference_measure(family, ids, source, PAIR)
    ablated: set[CircuitEdge] = set()
    changes, value, restored = dict[CircuitEdge, float](), mean(()), set[int]()
    for group in reference_groups(every):
        left = {*group} - ablated
        if not left:
            continue
        change = mean(ablated | left) - value
        changes |= dict.fromkeys(left, change)
        if -change < 0.03:  # maximised
            ablated |= left
            value += change
        else:
            restored.add(len(left))
    kept = [edge for edge in every if edge not in ablated]
    assert kept == [edge for edge, own in zip(every, searched.kept, strict=True) if own]
    found = [searched.scores[every.index(edge)] for edge in kept]
    np.testing.assert_allclose(found, [changes[edge] for edge in kept], atol=1e-5)
    assert len(restored) > 1 or not kept  # groups and edges
    assert searched.measured < len(every)
    line = fit("validation: 50%, batch: 1", call=COARSE, source=source, at=PAIR)
    alone = write(tmp_path, line, PATCHES)
    single, _ = search(alone, family)
    np.testing.assert_array_equal(single.kept, searched.kept)
    np.testing.assert_allclose(single.scores, searched.scores, atol=1e-6)


def test_search_halves_its_passes_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(call=COARSE, at=PAIR), PATCHES)
    whole, _ = search(path, "llama")
    real, sizes = EdgeRows.means_with, list[int]()

    def means_with(self: EdgeRows, rows: Any, circuits: Any, batch: int) -> Floats:
        sizes.append(batch)
        if batch > 2:
            raise MemoryError
        return real(self, rows, circuits, batch)

    monkeypatch.setattr(EdgeRows, "means_with", means_with)
    halved, _ = search(path, "llama")
    assert sizes[:3] == [8, 4, 2]
    assert {*sizes[3:]} == {2}
    np.testing.assert_array_equal(halved.kept, whole.kept)
    np.testing.assert_allclose(halved.scores, whole.scores, atol=1e-6)


def test_greedy_search_ablates_the_least_important_edge(tmp_path: Path) -> None:
    """Checks the first two steps, each against all other edges, in one row."""
    call, one_row = "greedy(size: {})", "validation: 50%, limit: 2"
    path = write(tmp_path, fit(one_row, call=call.format(10), at=PAIR), PATCHES)
    count = len(open_rows(path, double("llama"))[1].candidates)
    path = write(tmp_path, fit(one_row, call=call.format(count - 2), at=PAIR), PATCHES)
    searched, ids = search(path, "llama")
    every = open_rows(path, double("llama"))[1].candidates
    mean = reference_measure("llama", ids, "from: other", PAIR)
    ablated: list[CircuitEdge] = []
    for _ in range(2):
        due = [edge for edge in every if edge not in ablated]
        means = [mean([*ablated, edge]) for edge in due]
        ablated.append(due[int(np.argmax(means))])
    assert {edge for edge, kept in zip(every, searched.kept, strict=True) if not kept} == {*ablated}
    assert searched.measured == 2 * count - 1
    assert searched.progress == (2, 2)


@pytest.mark.parametrize("call", ["eap(size: 20)", "mask(size: 20, keep: true)"])
def test_report_names_random_edges_where_few_circuits_are_on_paths(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "validation: 50%, steps: 1" if call.startswith("mask") else "validation: 50%"
    path = write(tmp_path, fit(options, call=call, at=PAIR), PATCHES)
    real = CircuitDraws.draws
    for most in (8, 7):
        monkeypatch.setattr(CircuitDraws, "draws", lambda self, n, m=most: real(self, n)[:m])
        (found,) = train(path, fresh=True)
        said = "random circuits are any 20 edges, on paths to `logits` or not: fewer than 8 others"
        for text in (found.report.describe(), "; ".join(found.report.remarks())):
            assert (said in text) == (most == 7), text


# --- files, checkpoints, keys and costs -----------------------------------------------------------


def scores_of(found: mechdsl.TrainedFit) -> Floats:
    return np.array(json.loads((found.folder / "mask.json").read_text("utf-8"))["scores"])


@pytest.mark.parametrize("call", some([ACDC, COARSE, "greedy(size: 187)"], [ACDC]))
def test_edge_search_resumes_after_an_interruption(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(call=call, at=PAIR), PATCHES)
    (whole,) = train(path)
    content = (whole.folder / "mask.json").read_bytes()
    steps: list[int] = []
    real = EdgeSearch.progress.__get__

    def progress(self: EdgeSearch) -> tuple[int, int]:
        steps.append(real(self)[0])
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(EdgeSearch, "progress", property(progress))
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    (again,) = train(path, fresh=True)
    assert (again.folder / "mask.json").read_bytes() == content
    assert steps[2] > steps[1]
    assert again.report == whole.report


CHANGES: dict[str, dict[str, Any]] = {
    "threshold": {"call": "acdc(threshold: 0.01)"},
    "trainer": {"call": "greedy(size: 188)"},
    "levels": {"call": COARSE},
    "rows": {"options": "validation: 25%, batch: 8"},
    "source": {"source": "with: zero"},
    "position": {"at": "last token"},
    "measure": {"objective": "maximise: logit(answer)"},
}


def test_edge_search_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    def searched(**change: Any) -> str:
        return fit(**{"at": PAIR, **change})

    check_keys(
        tmp_path, trains_all, searched, CHANGES, PATCHES, lambda own: scores_of(own).tolist()
    )


def test_found_circuit_equals_its_listed_edges_in_rules(tmp_path: Path) -> None:
    """Its edges are in the order of their scores."""
    text = experiment("ablate all but c at last token with mean") + OTHER
    path = write(tmp_path, fit(at=PAIR), text)
    (trained,) = train(path, out=tmp_path / "out")
    assert trained.what.startswith("acdc over ")
    report = trained.report
    assert isinstance(report, CircuitReport)
    assert (np.diff(np.abs(list(report.chosen.values()))) <= 0).all()
    own = run(path, fresh=True).files[0].experiments
    assert "makes the measure worse by 0.03 or more; " in own[0].conventions["circuit c"]
    assert f"acdc of {len(report.chosen)} of " in own[0].conventions["circuit c"]
    listed = write(tmp_path, f"circuit c = {', '.join(report.chosen)}\n", text)
    for one, two in zip(own, run(listed, store=False).files[0].experiments, strict=True):
        np.testing.assert_allclose(one.measures[0].patched, two.measures[0].patched, atol=1e-5)


def test_edge_search_accepts_a_step_function_as_measure(tmp_path: Path) -> None:
    line = fit(call="acdc(threshold: 1)", objective="minimise: rank(answer)", at=PAIR)
    (trained,) = train(write(tmp_path, line, PATCHES))
    report = trained.report
    assert isinstance(report, CircuitReport)
    assert (np.array([*report.chosen.values()]) >= 1).all()
    assert report.unpatched == round(report.unpatched)


@pytest.mark.parametrize(
    ("call", "size"), [(ACDC, None), (COARSE, None), ("greedy(size: 100)", 100)]
)
def test_plan_counts_the_measured_circuits(call: str, size: int | None, tmp_path: Path) -> None:
    mask, found = open_rows(write(tmp_path, fit(call=call, at=PAIR), PATCHES), double("llama"))
    edges = len(found.candidates)
    circuits = edges if size is None else sum(range(size + 1, edges + 1))
    if call == COARSE:
        circuits = len(reference_groups(found.candidates))
    cost = training_cost("c", mask, found.objective, found.model.shape)
    assert cost.steps == circuits
    assert cost.cost.backwards == 0
    controls = 11 * 2  # 8 random circuits and three others, on both held-out rows
    assert cost.cost.forwards - -(-(circuits * 2 + controls) // 8) in (0, 1)


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit({ACDC}, prompts: p, from: other, maximise: {LOSS})"
LINE = f"circuit c = {CALL} at {PAIR}"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no threshold": (ACDC, "acdc", "E0207", "needs `threshold: …`"),
    "zero": ("0.03", "0", "E0342", "above 0"),
    "size": ("threshold: 0.03", "size: 3", "E0207", "`threshold: …`"),
    "all": (ACDC, "greedy(size: 2000)", "E0342", "`size` is 2,000, but"),
    "no size": (ACDC, "greedy", "E0207", "needs `size: …`"),
    "training steps": ("from: other", "from: other, steps: 300", "E0207", "isn't trained in steps"),
    "seeds": ("from: other", "from: other, seeds: 3", "E0207", "has no random start"),
    "noise": ("from: other", "from: noised", "E0342", "noise"),
    "reply": (LOSS, "exact_match(answer)", "E0612", "generates none"),
    "name": (ACDC, "adcd(threshold: 0.03)", "E0203", "acdc"),
    "of papers": (ACDC, "hagd(threshold: 0.03)", "E0203", "coarse_to_fine(threshold: 0.02)"),
    "coarse size": ("acdc(threshold: 0.03)", "coarse_to_fine(size: 3)", "E0207", "`threshold: …`"),
    "group": (LINE, f"group c = {CALL} at layers * heads * at last token", "E0342", "a circuit"),
    "too large": ("0.03", "1000", "E0643", "write a smaller `threshold`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_edge_search_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code, said = MISTAKES[name]
    line = f"{LINE}\n"
    assert old in line
    path = write(tmp_path, line.replace(old, new), PATCHES, OTHER, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors
    assert said in f"{errors[0].message} {errors[0].help_text}", errors


def test_training_that_fails_in_the_run_is_not_suggested_again(tmp_path: Path) -> None:
    """With `fit=True`, E0642 refers to the cause; without, it suggests the training."""
    path = write(tmp_path, fit(call="acdc(threshold: 1000)", at=PAIR), PATCHES)
    for trains in (True, False):
        with pytest.raises(mechdsl.MechdslError) as found:
            run(path, fit=trains)
        codes = [each.code for each in found.value.diagnostics]
        assert codes == (["E0643", "E0642"] if trains else ["E0642"])
        last = found.value.diagnostics[-1]
        text = f"{last.message} {last.help_text}"
        assert ("its training failed" in text) == trains
        assert ("mechdsl fit" in text) == (not trains)


def test_random_circuits_are_not_counted_before_training(tmp_path: Path) -> None:
    """Before the training, the circuit has one edge as a placeholder, and there is no other one."""
    text = PATCHES.replace("measure", "against random(9)\n  measure", 1)
    path = write(tmp_path, f"{LINE}\n", text, OTHER, blocks=NOISY)
    train(path)
    drawn = {each.name: each for each in run(path).experiments}["e"]
    assert drawn.controls
