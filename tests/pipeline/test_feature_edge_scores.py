"""Circuits of features that a file declares with `fit(eap(…), nodes: g, …)` and other trainers.

Scores are compared with gradients in a float64 pass in which every feature reads and sends
separately, one unpadded prompt at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.fits.reports import CircuitReport
from mechdsl.resolve.circuits import EMBEDDING
from mechdsl.resolve.sites import label_candidates, label_node
from mechdsl.resolve.types import CircuitEdge, FeatureNode, PlacedEdge, SitePoint

from ..execute.support import word_tokenizer
from ..quick import in_turn, some
from ..reference.forward import stack
from ..rules.circuits import EMBED, Features, circuit_pass, reads
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import Case, fills, key_heads
from ..rules.test_feature_circuits import KINDS, NODES, definitions, dictionaries
from .test_edge_scores import (
    CALLS,
    RULED,
    SOURCES,
    WHERE,
    check_planned_cost,
    compare_scores,
    fit,
    open_rows,
    score,
)
from .test_placed_edge_scores import ALL_ROWS, USE
from .test_trained_circuits import PATCHES
from .test_trained_dictionaries import check_keys, experiment, write
from .test_trained_rotations import LOSS, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt2", "gpt_neox", "gpt_neox_sequential", "qwen3")
HALF = "validation: 25%, batch: 2, nodes: g"


def group_of(family: str, kind: str) -> str:
    """The lines of a file with a group of the features of both layers."""
    named = (f"features {', '.join(map(str, own))} of {of}" for of, own in NODES.values())
    return f"{definitions(family, kind)}group g = {', '.join(named)}\n"


@pytest.mark.parametrize(("family", "kind"), in_turn(HERE, KINDS))
@pytest.mark.parametrize(("call", "source"), in_turn(CALLS, SOURCES))
def test_scores_of_features_equal_those_of_separate_features(
    call: str, source: str, family: str, kind: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows, padded on either side."""
    compare_feature_scores(call, source, family, kind, tmp_path)


@pytest.mark.parametrize(("family", "kind"), in_turn(HERE, KINDS[:2]))
@pytest.mark.parametrize("call", RULED)
def test_scores_of_features_with_changed_derivatives_equal_those_of_changed_modules(
    call: str, family: str, kind: str, tmp_path: Path
) -> None:
    compare_feature_scores(call, "from: other", family, kind, tmp_path)


def compare_feature_scores(call: str, source: str, family: str, kind: str, tmp_path: Path) -> None:
    """Compare scores with those of the reference; features have some as senders and receivers."""
    features = dictionaries(tmp_path, family, kind)
    where, group = WHERE[len(call) % 2], group_of(family, kind)
    found = compare_scores(call, where, family, source, tmp_path, group=group, features=features)
    for end in (0, 1):
        sizes = [abs(own) for edge, own in found.items() if isinstance(edge[end], FeatureNode)]
        assert max(sizes) > 1e-4


def test_scores_of_features_at_positions_add_up_to_those_of_all_tokens(tmp_path: Path) -> None:
    family, kind = "llama", "standard"
    dictionaries(tmp_path, family, kind)
    group, places = group_of(family, kind), "cue token, last token"
    joined = fit(f"{ALL_ROWS}, nodes: g", at="{cue token, last token}")
    mask, found = open_rows(write(tmp_path, group, joined, USE), double(family), "left")
    expected = dict(zip(mask.candidates, score(mask, found), strict=True))
    placed, there = open_rows(
        write(tmp_path, group, fit(f"{ALL_ROWS}, nodes: g", at=places), USE), double(family), "left"
    )
    sums = dict.fromkeys(expected, 0.0)
    for own, value in zip(placed.candidates, score(placed, there), strict=True):
        assert isinstance(own, PlacedEdge)
        sums[own.edge] += value
    assert sums == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("call", some([*CALLS, RULED[0]], CALLS[1:2]))
def test_scores_of_the_nodes_of_an_mlp_add_up_to_those_of_the_mlp(
    call: str, tmp_path: Path
) -> None:
    dictionaries(tmp_path, "llama", "standard")
    options = "validation: 0%, batch: 2"
    group = group_of("llama", "standard")
    mask, found = open_rows(
        write(tmp_path, group, fit(options, call=call), PATCHES), double("llama")
    )
    whole = dict(zip(mask.candidates, score(mask, found), strict=True))
    line = fit(f"{options}, nodes: g", call=call)
    split, there = open_rows(write(tmp_path, group, line, PATCHES), double("llama"))
    sums = dict.fromkeys(whole, 0.0)
    for (of, to), own in zip(there.edges, score(split, there), strict=True):
        ends = (
            SitePoint(e.site, e.layer, None) if isinstance(e, FeatureNode) else e for e in (of, to)
        )
        first, second = ends
        sums[first, second] += own
    assert sums == pytest.approx(whole, abs=1e-6)


# --- circuits in rules ----------------------------------------------------------------------------


def value(
    family: str, row: int, kept: Sequence[CircuitEdge], features: Mapping[int, Features]
) -> float:
    """The measure while all edges but some carry the values of the run `other`."""
    text, parts = rows("clean")[row], stack(family, double(family))
    given = fills(family, Case("c", "other", "tokens *"), {}, (), features)[row]
    before = reads(parts, key_heads(family), parallel=parts.parallel, features=features)
    every = {(of, to) for to, senders in before.items() for of in senders}
    ablated = every - {(name_end(of), name_end(to)) for of, to in kept}
    at = tokens(text, "tokens *")
    logits = circuit_pass(family, double(family), text.ids, given, ablated, at, features=features)
    return float(loss_by_hand(logits[-1], row))


def name_end(end: SitePoint) -> str:
    return EMBED if end == EMBEDDING else label_node(end)


@pytest.mark.parametrize(
    ("family", "kind", "call"),
    [
        ("llama", "topk", "eap(size: 100)"),
        ("gpt_neox", "jumprelu", "eap_ig(size: 100, steps: 3)"),
        pytest.param("gpt2", "standard", "eap(size: 100)", marks=pytest.mark.slow),
    ],
)
def test_circuit_of_features_equals_passes_with_its_edges(
    family: str, kind: str, call: str, tmp_path: Path
) -> None:
    """As it is trained, and in rules, with random circuits between the same nodes."""
    features = dictionaries(tmp_path, family, kind)
    rule = "ablate all but c at tokens * with other"
    measure = f"measure {LOSS} as raw\n  against random(3)"
    used = experiment(rule, block="p", measure=measure)
    path = write(tmp_path, group_of(family, kind), fit(HALF, call=call), used)
    given = {"m": (double(family), word_tokenizer())}
    store = tmp_path / "store"
    (trained,) = mechdsl.fit(path, given, store=store, out=tmp_path / "out")
    report = trained.report
    assert isinstance(report, CircuitReport)
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    mask, found = open_rows(path, double(family))
    kept = [found.edges[n] for n in stored["chosen"]]
    assert stored["labels"] == [label_candidates((each,)) for each in mask.candidates]
    assert any("of f" in text for text in report.chosen)
    assert any("of t" in text for text in report.chosen)
    (own,) = mechdsl.run(path, given, store=store).files[0].experiments
    assert own.row_ids is not None
    expected = [value(family, row, kept, features) for row in own.row_ids]
    np.testing.assert_allclose(own.measures[0].patched[0], expected, atol=1e-5)
    assert own.conventions["features of circuits"].startswith("3 features of f, 2 features of t")
    said = own.conventions["controls"]
    assert said.startswith("random circuits, 3 draws, seed 0; of 100 edges, each on a path")
    circuit = 'circuit c = saved("out/c/mask.json", nodes: g)'
    copied = write(tmp_path, group_of(family, kind), circuit, used)
    (read,) = mechdsl.run(copied, given, store=False).files[0].experiments
    assert read.row_ids is not None
    expected = [value(family, row, kept, features) for row in read.row_ids]
    np.testing.assert_allclose(read.measures[0].patched[0], expected, atol=1e-5)
    if family == "llama":
        dictionaries(tmp_path, family, "standard")
        changed = group_of(family, "standard")
        (error,) = training_errors(write(tmp_path, changed, circuit, used))
        assert error.code == "E0342"
        assert "has features of a `f` with SHA-256" in error.message


def test_circuit_of_trained_features_is_trained_after_its_dictionary(tmp_path: Path) -> None:
    """One dictionary in each of two layers, whose nodes name theirs."""
    options = "steps: 2, batch: 4, measure_on_training_rows: true"
    line = f"fit(sae(features: 8, k: 3), prompts: p, {options}) at mlp_out layer *"
    named = ", ".join(f"mlp_out layer {n} features 1, 4 of f" for n in (0, 1))
    group = f"basis f = {line}\ngroup g = {named}\n"
    rule = "ablate all but c at tokens * with other"
    used = experiment(rule, block="p", measure=f"measure {LOSS} as raw")
    path = write(tmp_path, group, fit(HALF, call="eap(size: 150)"), used)
    given, store = {"m": (double("llama"), word_tokenizer())}, tmp_path / "store"
    *_, trained = mechdsl.fit(path, given, store=store, out=tmp_path / "out")
    assert isinstance(trained.report, CircuitReport)
    assert "embed -> mlp_out layer 1 feature 4 of f" in {
        *json.loads((trained.folder / "mask.json").read_text("utf-8"))["labels"]
    }
    (own,) = mechdsl.run(path, given, store=store).files[0].experiments
    assert own.row_ids is not None
    assert own.conventions["features of circuits"].startswith(
        "2 features of f[layer 0], 2 features of f[layer 1]"
    )


@pytest.mark.parametrize("call", some(CALLS, CALLS[:1]))
def test_planned_cost_of_scores_of_features_is_within_a_factor_of_two(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionaries(tmp_path, "llama", "standard")
    path = write(tmp_path, group_of("llama", "standard"), fit(HALF, call=call), PATCHES)
    check_planned_cost(path, "llama", monkeypatch)


# --- keys and mistakes ----------------------------------------------------------------------------


def test_key_of_a_circuit_of_features_depends_on_them(tmp_path: Path, trains_all: bool) -> None:
    for kind in ("standard", "topk"):
        dictionaries(tmp_path, "llama", kind)

    def declare(*, kind: str = "standard", features: str = "3, 5") -> str:
        named = f"group g = features {features} of f"
        return f"{definitions('llama', kind).splitlines()[0]}\n{named}\n{fit(HALF)}"

    def content(trained: mechdsl.TrainedFit) -> str:
        return (trained.folder / "mask.json").read_text("utf-8")

    changes: dict[str, dict[str, Any]] = {
        "another feature": {"features": "3, 7"},
        "one more feature": {"features": "3, 5, 7"},
        "dictionary": {"kind": "topk"},
    }
    check_keys(tmp_path, trains_all, declare, changes, PATCHES, content)


def test_changed_derivatives_of_a_normalising_dictionary_are_an_error(tmp_path: Path) -> None:
    dictionaries(tmp_path, "llama", "layer_norm")
    line = fit(HALF, call=RULED[0])
    (error,) = training_errors(write(tmp_path, group_of("llama", "layer_norm"), line, PATCHES))
    assert error.code == "E0608"
    assert "features of `f`" in error.message
