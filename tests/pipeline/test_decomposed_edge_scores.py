"""Circuits that a file declares with `fit(cdt(…))`.

Scores are compared with contextual decomposition by hooks on the bare model, one unpadded prompt at
a time, and with exact ablations of a linear model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching.differentiated_run import DifferentiatedRun, DrawLanes
from mechdsl.fits.reports import CircuitReport
from mechdsl.planner import training_cost
from mechdsl.resolve.types import PlacedEdge

from ..execute.support import word_tokenizer
from ..quick import in_turn, some
from ..rules.models import WITHOUT_NORMS, bare, double
from ..rules.test_decomposed_estimates import ENDS, along_edge
from .test_edge_scores import check_planned_cost, fit, open_rows, score
from .test_pattern_edge_scores import DIFFERENCE
from .test_placed_edge_scores import USE
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_rotations import training_errors

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
CALL = "cdt(size: 12)"


def scores(path: Path, model: Any, place: int = 0) -> dict[tuple[str, ...], float]:
    """The scores of all edges at one position, by sites, layers and units."""
    mask, found = open_rows(path, model)
    pairs = zip(found.candidates, found.edges, score(mask, found).tolist(), strict=True)
    return {
        tuple(f"{end.site} {end.layer} {end.unit}" for end in edge): value
        for each, edge, value in pairs
        if not isinstance(each, PlacedEdge) or each.place == place
    }


@pytest.mark.parametrize(
    ("family", "at"),
    in_turn(
        ("llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"),
        ("last token, cue token", "last token"),
        ("llama", "gpt2", "mixtral"),
    ),
)
def test_scores_equal_decomposition_by_plain_hooks(family: str, at: str, tmp_path: Path) -> None:
    line = fit("validation: 0%, batch: 2", call=CALL, objective=DIFFERENCE, at=at)
    path = write(tmp_path, line, USE)
    mask, found = open_rows(path, bare(family))
    ids, own = list(found.objective.table.row_ids), scores(path, bare(family))
    largest = 0.0
    for name, end in ENDS[family].items():
        words = name.split()
        unit = int(words[-1]) if words[0] == "v" else 0
        to = f"{words[0]} {words[2]} {unit if words[0] == 'v' else None}"
        for head in (0, 3):
            expected = np.array(along_edge(family, 0, head, end, unit))[ids].mean()
            value = own[f"z 0 {head}", to]
            assert value == pytest.approx(expected, abs=1e-4), name
            largest = max(largest, abs(value))
    assert largest > 1e-3
    fixed = [value for edge, value in own.items() if edge[1][0] in "qk"]
    assert len(fixed) > 50
    assert not np.any(fixed)
    assert mask.training.trainer.name == "cdt"


def test_scores_of_edges_to_the_end_of_a_linear_model_equal_their_paths(tmp_path: Path) -> None:
    """Without norms, logits are linear in what MLPs add to the stream."""
    line = fit("validation: 0%, batch: 2", call=CALL, objective=DIFFERENCE)
    lines = "".join(
        experiment(f"path {sender} -> logits at tokens *", "from other into clean", name=name,
                   measure="measure logit(answer) - logit(wrong) as delta", block="p")
        for name, sender in {"mlp_out": "mlp_out layer *"}.items()
    )  # fmt: skip
    path = write(tmp_path, line, lines, USE)
    family = "llama" + WITHOUT_NORMS
    own, model = scores(path, bare(family)), bare(family)
    results = mechdsl.run(path, {"m": (model, word_tokenizer())}, store=tmp_path / "s")
    ids = open_rows(path, model)[1].objective.table.row_ids
    assert [result.name for result in results.experiments] == ["mlp_out"]
    for result in results.experiments:
        assert result.row_ids is not None
        there = [row in ids for row in result.row_ids]
        measure = result.measures[0]
        values = (measure.patched - measure.base)[:, there].mean(-1)
        found = [v for (of, to), v in own.items()
                 if of.startswith(f"{result.name} ") and to.startswith("logits")]  # fmt: skip
        np.testing.assert_allclose(values.flat, found, atol=1e-4)
        assert np.abs(values).max() > 1e-2


def test_passes_with_one_part_have_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the clean run of two rows, and of one sender or edge."""
    line = fit("validation: 0%, batch: 2", call=CALL, objective=DIFFERENCE, at="last token")
    path, sizes = write(tmp_path, line, USE), list[int]()
    read = DifferentiatedRun.read

    def count(run: DifferentiatedRun, adds: Any, lanes: DrawLanes, *given: Any) -> Any:
        sizes.append(len(lanes.used))
        return read(run, adds, lanes, *given)

    monkeypatch.setattr(DifferentiatedRun, "read", count)
    expected, together = scores(path, double("gpt2")), max(sizes)
    sizes.clear()
    monkeypatch.setattr(training_cost, "DECOMPOSED_TOKENS", 1)
    own = scores(path, double("gpt2"))
    assert own.keys() == expected.keys()
    np.testing.assert_allclose([*own.values()], [*expected.values()], atol=1e-9)
    assert max(sizes) == 4
    assert together > 200


@pytest.mark.parametrize("call", [CALL, *some(["atp_qk(size: 12)", "atp_star(size: 12)"], [])])
def test_circuit_by_scores_equals_its_listed_edges_in_rules(call: str, tmp_path: Path) -> None:
    """Next to another circuit and a reply, with rules on one block, a mean and a derived run."""
    rules = [
        experiment("from turned into clean", "ablate all but c at last token with turned"),
        experiment("ablate c at tokens * with mean", name="mean", block="even"),
        experiment(
            "run changed { ablate mlp_out layer 1 at last token with zero }",
            "from turned into changed",
            "ablate c at last token with turned",
            name="derived",
        ),
        experiment(
            "generate 2",
            "ablate mlp_out layer 0 at last token with zero",
            measure="measure logit(answer) as raw",
            name="reply",
        ),
        experiment(
            "from other into clean", "ablate d at tokens * with other", name="of_d", block="p"
        ),
    ]
    objective = {"objective": DIFFERENCE, "at": "last token"}
    path = write(tmp_path, fit(call=call, **objective), fit(call="eap(size: 9)", name="d"), *rules)
    trained = {each.basis: each for each in train(path)}
    own = run(path, pass_tokens=40).files[0].experiments
    again = run(path).files[0].experiments
    reports = [trained[name].report for name in "cd"]
    listed = [
        f"circuit {name} = {', '.join(report.chosen)}\n"
        for name, report in zip("cd", reports, strict=True)
        if isinstance(report, CircuitReport)
    ]
    written = run(write(tmp_path, *listed, *rules), store=False).files[0].experiments
    for one, two, three in zip(own, again, written, strict=True):
        for mine, stored, theirs in zip(one.measures, two.measures, three.measures, strict=True):
            np.testing.assert_array_equal(mine.patched, stored.patched)
            if one.name not in ("of_d", "mean"):  # rows that `d` isn't trained on, and their means
                np.testing.assert_allclose(mine.patched, theirs.patched, atol=2e-6)
                assert np.abs(mine.patched).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_planned_cost_of_decomposed_scores_is_within_a_factor_of_two(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit("validation: 25%, batch: 2", call=CALL, at="last token"), USE)
    assert check_planned_cost(path, family, monkeypatch) == 0


def test_nodes_that_are_not_decomposed_are_errors(tmp_path: Path) -> None:
    line = fit("validation: 25%, nodes: g", call=CALL)
    (error,) = training_errors(write(tmp_path, "group g = L0N3, L0N5", line, USE))
    assert error.code == "E0608"
    said = render_full([error], color=False, width=300)
    assert "a neuron or a feature as a node" in said


def test_measure_without_a_gradient_scores_edges(tmp_path: Path) -> None:
    """The divergence from the clean run has gradient 0 in the clean run."""
    line = fit("validation: 0%", call=CALL, objective="minimise: kl(clean)", at="last token")
    own = scores(write(tmp_path, line, USE), double("gpt2"))
    assert max(own.values()) > 1e-4
    assert min(own.values()) > -1e-9
