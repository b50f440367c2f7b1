"""Circuits of features of the output of attention that a file declares with `fit(…, nodes: g)`.

Scores are compared with gradients in a float64 pass in which every feature reads its own sum of the
heads, one unpadded prompt at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mechdsl
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import FeatureNode

from ..execute.support import word_tokenizer
from ..quick import in_turn, some
from ..rules.circuits import circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import Case, fills
from ..rules.test_attention_feature_circuits import (
    FAMILIES,
    KINDS,
    NODES,
    OF_MLPS,
    definitions,
    edges_of,
    nodes_of,
)
from .test_edge_scores import (
    CALLS,
    RULED,
    SOURCES,
    WHERE,
    check_planned_cost,
    compare_scores,
    fit,
    open_rows,
)
from .test_trained_circuits import PATCHES
from .test_trained_dictionaries import check_keys, experiment, write
from .test_trained_rotations import LOSS, loss_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def group_of(family: str, kind: str) -> str:
    """The lines of a file with a group of features of the outputs of attention and of an MLP."""
    named = [f"features {', '.join(map(str, own))} of {of}" for of, own in NODES.values()]
    named += ["features 1, 4 of t"] if family in OF_MLPS else []
    return f"{definitions(family, kind)}group g = {', '.join(named)}\n"


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, KINDS))
@pytest.mark.parametrize(("call", "source"), in_turn(CALLS, SOURCES))
def test_scores_of_attention_features_equal_those_of_separate_features(
    call: str, source: str, family: str, kind: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows, padded on either side."""
    compare_feature_scores(call, source, family, kind, tmp_path)


@pytest.mark.parametrize("family", OF_MLPS[:2])
@pytest.mark.parametrize("call", RULED)
def test_scores_of_attention_features_with_changed_derivatives_equal_those_of_changed_modules(
    call: str, family: str, tmp_path: Path
) -> None:
    compare_feature_scores(call, "from: other", family, "topk", tmp_path)


def compare_feature_scores(call: str, source: str, family: str, kind: str, tmp_path: Path) -> None:
    """Compare scores with those of the reference; features have some as senders and receivers."""
    nodes, group = nodes_of(tmp_path, family, kind), group_of(family, kind)
    given = call, WHERE[len(call) % 2], family, source, tmp_path
    found = compare_scores(*given, group=group, **nodes)
    for end in (0, 1):
        sizes = [
            abs(own)
            for edge, own in found.items()
            if isinstance(edge[end], FeatureNode) and edge[end].site == "attn_out"
        ]
        assert max(sizes) > 1e-4


HALF = "validation: 25%, batch: 2, nodes: g"
TRAININGS = {
    "eap(size: 60)": "llama",
    "eap_ig(size: 60, steps: 2)": "gpt_neox",
    "acdc(threshold: 0.03)": "gpt2",
    "coarse_to_fine(threshold: 0.03)": "llama",
    "mask(size: 60, keep: true)": "qwen3",
}


@pytest.mark.parametrize("call", some(TRAININGS, [*TRAININGS][:1]))
def test_trained_circuit_of_attention_features_equals_passes_with_its_edges(
    call: str, tmp_path: Path
) -> None:
    """As it is trained, in rules, and as it is read from its file."""
    family = TRAININGS[call]
    nodes = nodes_of(tmp_path, family, "topk")
    measure = f"measure {LOSS} as raw\n  against random(3)"
    used = experiment("ablate all but c at tokens * with other", block="p", measure=measure)
    group = group_of(family, "topk")
    options = f"{HALF}, steps: 4" if call.startswith("mask") else HALF
    path = write(tmp_path, group, fit(options, call=call), used)
    given, store = {"m": (double(family), word_tokenizer())}, tmp_path / "store"
    *_, trained = mechdsl.fit(path, given, store=store, out=tmp_path / "out")
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    mask, found = open_rows(path, double(family))
    assert stored["labels"] == [label_candidates((each,)) for each in mask.candidates]
    kept = [tuple(stored["labels"][n].split(" -> ")) for n in stored["chosen"]]
    assert any("of a" in end for edge in kept for end in edge)
    others = {*edges_of(family, nodes)} - {*kept}
    assert len(others) == len(found.edges) - len(kept)
    fill = fills(family, Case("c", "other"), {}, (), **nodes)
    for line in (fit(options, call=call), 'circuit c = saved("out/c/mask.json", nodes: g)'):
        path = write(tmp_path, group, line, used)
        (own,) = mechdsl.run(path, given, store=store).files[0].experiments
        assert own.row_ids is not None
        for n, row in enumerate(own.row_ids):
            text = rows()[row]
            at = tokens(text, "tokens *")
            logits = circuit_pass(family, double(family), text.ids, fill[row], others, at, **nodes)
            expected = float(loss_by_hand(logits[-1], row))
            assert own.measures[0].patched[0, n] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("call", some(CALLS, CALLS[:1]))
def test_planned_cost_of_scores_of_attention_features_is_within_a_factor_of_two(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of(tmp_path, "llama", "standard")
    path = write(tmp_path, group_of("llama", "standard"), fit(HALF, call=call), PATCHES)
    check_planned_cost(path, "llama", monkeypatch)


def test_key_of_a_circuit_of_attention_features_depends_on_them(
    tmp_path: Path, trains_all: bool
) -> None:
    for kind in ("standard", "topk"):
        nodes_of(tmp_path, "llama", kind)

    def declare(*, kind: str = "standard", features: str = "3, 5", site: str = "attn_out") -> str:
        line = definitions("llama", kind).splitlines()[0].replace("attn_out", site)
        return f"{line}\ngroup g = features {features} of a\n{fit(HALF)}"

    def content(trained: mechdsl.TrainedFit) -> str:
        return (trained.folder / "mask.json").read_text("utf-8")

    changes = {
        "another feature": {"features": "3, 7"},
        "dictionary": {"kind": "topk"},
        "site": {"site": "mlp_out"},
    }
    check_keys(tmp_path, trains_all, declare, changes, PATCHES, content)
