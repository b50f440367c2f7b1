"""Circuits in vision transformers, against passes that recompute the input of every receiver: one
image at a time, by plain hooks on the bare model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data, run_on
from ..quick import in_turn, some
from ..reference.hooks import Change
from . import duals
from .duals import LAYERS
from .reference import Seen
from .support import (
    ANSWERS,
    BLOCKS,
    OF_TEXTS,
    ROWS,
    STATS,
    WRONG,
    difference,
    double,
    experiment,
    forward,
    handed,
    pixels,
    plain,
    processor,
    succeeded,
    token,
    write_images,
)

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

NAMES = ("vit", "dinov2_with_registers", "beit", "siglip", "clip", "clip/dual", "siglip/dual")
"""With norms of each token or after pooling, layer scales, relative positions, and two towers."""
QUICK = ("dinov2_with_registers", "clip")
HEADS = 4
ROWS_OF = range(len(ANSWERS))
Edge = tuple[str, str]
Node = tuple[str, int, int]
"""Site, layer and head of a sender."""


def list_nodes() -> tuple[dict[str, Node], dict[str, Node]]:
    """The senders and the receivers of the edges of a model, by name."""
    senders: dict[str, Node] = {"embed": ("resid_pre", 0, 0)}
    receivers: dict[str, Node] = {}
    for layer in range(LAYERS):
        heads = [(f"L{layer}H{head}", head) for head in range(HEADS)]
        receivers |= {
            f"{name}.{site}": (site, layer, head) for name, head in heads for site in "qkv"
        }
        receivers[f"L{layer}.mlp"] = ("mlp_out", layer, 0)
        senders |= {name: ("head_out", layer, head) for name, head in heads}
        senders[f"L{layer}.mlp"] = ("mlp_out", layer, 0)
    return senders, {**receivers, "logits": ("logits", LAYERS, 0)}


SENDERS, RECEIVERS = list_nodes()


def is_before(sender: str, receiver: str) -> bool:
    (sends, first, _), (reads, second, _) = SENDERS[sender], RECEIVERS[receiver]
    within = first == second and (sends, reads) == ("head_out", "mlp_out")
    return sends == "resid_pre" or first < second or within


EVERY = [(sender, to) for to in RECEIVERS for sender in SENDERS if is_before(sender, to)]


def draw_edges(seed: int, count: int) -> list[Edge]:
    random = np.random.default_rng(seed)
    return [EVERY[n] for n in sorted(random.choice(len(EVERY), count, replace=False))]


# --- the reference --------------------------------------------------------------------------------


def sent(seen: Seen, name: str, number: int, writes: Writes, sender: str) -> Tensor:
    """[T, width]: what a sender adds to the stream; a head through the map of attention's output,
    and a scale after it if the model has one."""
    site, layer, head = SENDERS[sender]
    if site != "head_out":
        return seen.sites[site, layer][:, 0]
    nothing = [Change(at, head, 0 * each[head]) for at, each in enumerate(seen.sites["z", layer])]
    without = run(name, number, {**writes, ("z", layer): nothing})
    return (seen.sites["attn_out", layer] - without.sites["attn_out", layer])[:, 0]


Writes = Mapping[tuple[str, int], Sequence[Change]]


def run(name: str, number: int, writes: Writes) -> Seen:
    return forward(name, pixels(name, number), {at: each for at, each in writes.items() if each})


@cache
def outputs(name: str, number: int) -> dict[str, Tensor]:
    """Sender → what it adds to the stream in a run without rules."""
    seen = plain(name, number)
    return {sender: sent(seen, name, number, {}, sender) for sender in SENDERS}


def changes(vectors: Tensor, unit: int = 0) -> list[Change]:
    return [Change(at, unit, vector) for at, vector in enumerate(vectors)]


def circuit_value(
    name: str,
    number: int,
    ablated: Mapping[Edge, Sequence[int]],
    fills: Mapping[str, Tensor],
    share: float = 1.0,
) -> float:
    """The measure if edges carry the fill of their sender, or a share of it, at their positions."""
    writes: dict[tuple[str, int], list[Change]] = {}
    given: dict[str, Tensor] = {"embed": plain(name, number).sites["resid_pre", 0][:, 0]}
    into: dict[str, dict[str, Sequence[int]]] = {}
    for (sender, receiver), positions in ablated.items():
        into.setdefault(receiver, {})[sender] = positions

    def read(receiver: str, stream: Tensor) -> Tensor:
        stream = stream.clone()
        for sender, positions in into[receiver].items():
            here, change = list(positions), share * (fills[sender] - given[sender])
            stream[here] += change[here]
        return stream

    for layer in range(LAYERS):
        seen = run(name, number, writes)
        entering = seen.sites["resid_pre", layer][:, 0]
        for head in range(HEADS):
            for site in "qkv":
                receiver = f"L{layer}H{head}.{site}"
                if receiver in into:
                    stream = changes(read(receiver, entering))
                    other = run(name, number, {("resid_pre", layer): stream})
                    own = changes(other.sites[site, layer][:, head], head)
                    writes.setdefault((site, layer), []).extend(own)
        seen = run(name, number, writes)
        heads = [f"L{layer}H{head}" for head in range(HEADS)]
        given |= {sender: sent(seen, name, number, writes, sender) for sender in heads}
        receiver = f"L{layer}.mlp"
        if receiver in into:
            stream = changes(read(receiver, seen.sites["resid_mid", layer][:, 0]))
            other = run(name, number, {("resid_mid", layer): stream})
            writes["mlp_out", layer] = changes(other.sites["mlp_out", layer][:, 0])
        given[receiver] = run(name, number, writes).sites["mlp_out", layer][:, 0]
    seen = run(name, number, writes)
    if "logits" in into:
        last = "resid_post", LAYERS - 1
        seen = run(name, number, {last: changes(read("logits", seen.sites[last][:, 0]))})
    return difference(seen, number)


def tokens(name: str) -> range:
    return range(len(outputs(name, 0)["embed"]))


def zeros(name: str, number: int) -> dict[str, Tensor]:
    return {sender: 0 * value for sender, value in outputs(name, number).items()}


def other(number: int) -> int:
    return (number + 1) % len(ANSWERS)


# --- files ----------------------------------------------------------------------------------------


def blocks_of(name: str) -> str:
    blocks = BLOCKS if name in ROWS else OF_TEXTS
    return blocks.replace("  answer", "  corrupt changed { file = second }\n  answer", 1)


def measure_of(name: str, effect: str = "raw") -> str:
    word = "logit" if name in ROWS else "score"
    return f"measure {word}(answer) - {word}(wrong) as {effect}"


def circuit(edges: Sequence[Edge]) -> str:
    return f"circuit c = {', '.join(f'{sender} -> {to}' for sender, to in edges)}\n"


FILLS = ("zero", "changed")
POSITIONS = ("tokens *", "image row 1 col 2 token")


@cache
def loaded(name: str) -> LoadedModel:
    """In 64 bits: rounding of a stream near 0, of which all senders are ablated, is amplified."""
    own = processor(name)
    given = own if name in ROWS else (own, duals.tokenizer(name))
    model, found = adopt_model("m", double(name), given)
    assert model is not None, found
    return model


def run_file(name: str, folder: Path, text: str) -> list[ExperimentResult]:
    path = write_file(name, folder, text)
    result, problems = run_on(Source(path.read_text("utf-8"), path), {"m": loaded(name)})
    return [*succeeded(result, problems).values()]


@pytest.mark.parametrize(("fill", "at"), in_turn(FILLS, POSITIONS))
@pytest.mark.parametrize(("name", "rule"), in_turn(NAMES, ("all but c", "c"), QUICK))
def test_ablated_edges_of_a_vision_transformer_equal_recomputed_inputs(
    name: str, rule: str, fill: str, at: str, tmp_path: Path
) -> None:
    edges = draw_edges(3, 60 if rule == "all but c" else 12)
    rules = experiment("e", f"ablate {rule} at {at} with {fill}", measure=measure_of(name))
    [found] = run_file(name, tmp_path, circuit(edges) + rules)
    positions = tokens(name) if at == "tokens *" else [token(name, 1, 2)]
    ablated = dict.fromkeys(edges if rule == "c" else {*EVERY} - {*edges}, positions)
    expected = [
        circuit_value(
            name, n, ablated, zeros(name, n) if fill == "zero" else outputs(name, other(n))
        )
        for n in ROWS_OF
    ]
    [data] = found.measures
    np.testing.assert_allclose(data.patched[0], expected, atol=1e-6)
    assert np.abs(data.patched - data.base).max() > 0.005


@pytest.mark.parametrize("rule", some(("all but c", "c"), ["all but c"]))
@pytest.mark.parametrize("name", some(NAMES, ["clip"]))
def test_edges_at_patches_equal_recomputed_inputs(name: str, rule: str, tmp_path: Path) -> None:
    """Patches attend to patches before and after them."""
    edges, places = draw_edges(4, 40), {(1, 2): token(name, 1, 2), (3, 4): token(name, 3, 4)}
    chosen = {edge: (1, 2) if n % 2 else (3, 4) for n, edge in enumerate(edges)}
    listed = [
        f"{sender} -> {to} at image row {row} col {col} token"
        for (sender, to), (row, col) in chosen.items()
    ]
    rules = experiment("e", f"ablate {rule} at tokens * with changed", measure=measure_of(name))
    [found] = run_file(name, tmp_path, f"circuit c = {', '.join(listed)}\n{rules}")
    placed = {edge: [places[at]] for edge, at in chosen.items()}
    ablated: dict[Edge, Sequence[int]] = {**placed}
    if rule == "all but c":
        ablated = {
            edge: [at for at in tokens(name) if at not in placed.get(edge, ())] for edge in EVERY
        }
    expected = [circuit_value(name, n, ablated, outputs(name, other(n))) for n in ROWS_OF]
    [data] = found.measures
    np.testing.assert_allclose(data.patched[0], expected, atol=1e-6)
    assert np.abs(data.patched - data.base).max() > 0.005


# --- chosen edges ---------------------------------------------------------------------------------

STEP = 1e-4


def slope(name: str, edge: Edge) -> float:
    """The mean derivative of the measure by the share of the other image's value on an edge."""
    ablated = {edge: tokens(name)}
    ends = [
        [circuit_value(name, n, ablated, outputs(name, other(n)), share) for n in ROWS_OF]
        for share in (STEP, -STEP)
    ]
    return float(np.mean(ends[0]) - np.mean(ends[1])) / (2 * STEP)


def write_file(name: str, folder: Path, text: str) -> Path:
    write_images(folder)
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{blocks_of(name)}\n{text}', "utf-8")
    return path


@pytest.mark.parametrize("name", some(NAMES, ["clip"]))
def test_scores_of_edges_equal_derivatives_of_recomputed_inputs(name: str, tmp_path: Path) -> None:
    """And the chosen edges act as the circuit."""
    measure = measure_of(name).split()[1:-2]
    options = "prompts: scenes, validation: 0%, measure_on_training_rows: true, from: changed"
    line = f"circuit c = fit(eap(size: 20), {options}, maximise: {' '.join(measure)})\n"
    rule = experiment("e", "ablate all but c at tokens * with changed", measure=measure_of(name))
    path = write_file(name, tmp_path, line + rule)
    models = {"m": (double(name), *handed(name)[1:])}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    given = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    scores = dict(zip(given["labels"], given["scores"], strict=True))
    assert scores.keys() == {f"{sender} -> {to}" for sender, to in EVERY}
    for edge in draw_edges(5, 5):
        expected = slope(name, edge)
        assert scores[" -> ".join(edge)] == pytest.approx(expected, rel=1e-4, abs=1e-6), edge
    chosen = {given["labels"][n] for n in given["chosen"]}
    assert len(chosen) == 20
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    ablated = {edge: tokens(name) for edge in EVERY if " -> ".join(edge) not in chosen}
    expected = [circuit_value(name, n, ablated, outputs(name, other(n))) for n in ROWS_OF]
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-6)


# --- discovered circuits --------------------------------------------------------------------------

PAIRS = ((0, 1), (1, 2), (2, 0), (0, 2))
"""Images of each row and of its run `changed`."""
EAP = "eap top 20 edges"
SEARCHES = ("eap_ig(steps: 3) until faithfulness > 0.8", "acdc(threshold: 0.05)",
            "coarse_to_fine(threshold: 0.05)", "greedy top 250 edges")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "using"),
    [
        ("clip/dual", EAP),
        *(
            pytest.param(name, using, marks=pytest.mark.slow)
            for name in ("siglip/dual", "clip", "siglip")
            for using in (EAP, *SEARCHES)
        ),
    ],
)
def test_discovered_circuit_equals_recomputed_inputs(name: str, using: str, tmp_path: Path) -> None:
    """On the rows that test the circuit, all edges but the chosen ones carry the other image."""
    lines = (
        "model m",
        "images scenes",
        "from clean into changed",
        f"discover c over heads, mlps using {using}",
        measure_of(name, "recovery"),
        STATS,
    )
    body = "\n".join(f"  {line}" for line in lines)
    path = write_file(name, tmp_path, f"experiment e {{\n{body}\n}}\n")
    records = [
        {"file": f"{a}.png", "second": f"{b}.png", "label": ANSWERS[a], "other": WRONG[a]}
        for a, b in PAIRS
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")
    models = {"m": (double(name), *handed(name)[1:])}
    found = mechdsl.run(path, models, store=tmp_path / "store")["e"]
    [mask] = (tmp_path / "store").rglob("mask.json")
    given = json.loads(mask.read_text("utf-8"))
    chosen = {given["labels"][n] for n in given["chosen"]}
    ablated = {edge: tokens(name) for edge in EVERY if " -> ".join(edge) not in chosen}
    assert 0 < len(chosen) < len(EVERY)
    assert found.row_ids is not None
    assert len(found.row_ids) == len(PAIRS) / 2
    pairs = [PAIRS[int(row)] for row in found.row_ids]
    expected = [circuit_value(name, a, ablated, outputs(name, b)) for a, b in pairs]
    [data] = found.measures
    assert data.effect == "faithfulness"
    np.testing.assert_allclose(data.patched[0], expected, atol=1e-6)
