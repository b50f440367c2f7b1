"""Circuits of encoder-decoders, against plain hooks for one unpadded prompt."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.fits.reports import CircuitReport, MaskReport
from mechdsl.loading.loader import adopt_model
from mechdsl.resolve.circuit_files import EMBEDDING, ENCODER_EMBEDDING, END, edge_of_name
from mechdsl.resolve.circuits import AskedCircuits, EdgeGraph, draw_circuits
from mechdsl.resolve.circuits import list_edges as list_model_edges
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import SitePoint
from mechdsl.show.reports import graph
from mechdsl.show.reports.circuit_layout import list_edges as list_drawn_edges
from mechdsl.vocab.metrics import EFFECTS

from ..image_prompts import test_sounds as sounds
from ..reference.ruled import ruled
from .encoder_decoder_circuits import (
    EMBED,
    ENCODED,
    LOGITS,
    Edge,
    Family,
    Features,
    Node,
    Pass,
    at_tokens,
    doubled,
    list_edges,
    run,
)
from .encoder_decoders import (
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    WIDTH,
    Text,
    model,
    place,
    read,
    starts,
    text,
    tokenizer,
)
from .support import (
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    Array,
    Record,
    by_name,
    experiment,
    token,
    try_file,
    write_rows,
)

SOME: dict[str, list[Edge]] = {
    "embed -> q cross layer 0 head 1": [(EMBED, ("q cross", 0, 1))],
    "z layer 0 head 1 -> q cross layer 0 head 0": [(("z", 0, 1), ("q cross", 0, 0))],
    "z cross layer 0 head 0 -> L0.mlp": [(("z cross", 0, 0), ("mlp_norm", 0, 0))],
    "z cross layer 0 heads * -> q cross layer 2 heads *": [
        (("z cross", 0, of), ("q cross", 2, to)) for of in range(HEADS) for to in range(HEADS)
    ],
    "L1.mlp -> L2H0.v": [(("mlp_out", 1, 0), ("v", 2, 0))],
    "L0H0 -> L1H1.k": [(("z", 0, 0), ("k", 1, 1))],
    "z cross layer 1 head 1 -> logits": [(("z cross", 1, 1), LOGITS)],
    "L2.mlp -> logits": [(("mlp_out", 2, 0), LOGITS)],
    "embed encoder -> v encoder layer 0 head 1": [(ENCODED, ("v encoder", 0, 1))],
    "z encoder layer 0 head 0 -> mlp_norm encoder layer 0": [
        (("z encoder", 0, 0), ("mlp_norm encoder", 0, 0))
    ],
    "mlp_out encoder layer 0 -> q encoder layer 1 heads *": [
        (("mlp_out encoder", 0, 0), ("q encoder", 1, head)) for head in range(HEADS)
    ],
    "z encoder layer 1 head 1 -> v cross layer 1 head 0": [
        (("z encoder", 1, 1), ("v cross", 1, 0))
    ],
    "embed encoder -> k cross layers * heads *": [
        (ENCODED, ("k cross", layer, head)) for layer in range(LAYERS) for head in range(HEADS)
    ],
    "mlp_out encoder layer 1 -> v cross layer 2 heads *": [
        (("mlp_out encoder", 1, 0), ("v cross", 2, head)) for head in range(HEADS)
    ],
}
CIRCUIT = f"circuit c = {', '.join(SOME)}\n"


NEURONS = 24
SPLIT = {("", 0): NEURONS, ("", 1): NEURONS, ("encoder", 0): NEURONS}
"""The MLPs of `t5 split` whose neurons are nodes."""


WITH_FEATURES: dict[str, dict[tuple[str, int], Features]] = {}
"""Features of the MLPs of `t5 features`, which a test writes."""


def opened(family: str) -> Family:
    found = doubled(model, family, LAYERS, ENCODER_LAYERS, HEADS, HEADS)
    if family in WITH_FEATURES:
        return dataclasses.replace(found, features=WITH_FEATURES[family])
    return dataclasses.replace(found, split=SPLIT) if family.endswith(" split") else found


def inputs(family: str, record: Record, of: str = "clean") -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([text(record, of).ids]),
        "decoder_input_ids": torch.tensor([starts(family)]),
    }


@cache
def outputs(family: str, number: int, of: str = "clean") -> dict[Node, Tensor]:
    """The outputs of all senders in a plain run."""
    work = Pass(opened(family))
    with torch.no_grad():
        run(work, inputs(family, ROWS[number], of))
    return work.given


def fills(family: str, number: int, fill: str) -> dict[Node, Tensor]:
    own = outputs(family, number)
    if fill == "zero":
        return {node: torch.zeros_like(value) for node, value in own.items()}
    if fill != "mean":
        return outputs(family, number, fill)
    found: dict[Node, Tensor] = {}
    for node, value in own.items():
        every = [outputs(family, n)[node] for n in range(len(ROWS))]
        at = [text(record).subject[-1] if node[0].endswith("encoder") else -1 for record in ROWS]
        mean = torch.stack([each[token] for each, token in zip(every, at, strict=True)]).mean(0)
        found[node] = mean.expand_as(value)
    return found


def named(names: Collection[str] = SOME) -> set[Edge]:
    return {edge for name in names for edge in SOME[name]}


def tokens_of(family: str, number: int, at: str) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens of a position in the encoder and in the decoder."""
    of, last = text(ROWS[number]), len(starts(family))
    return {
        "tokens *": (range(len(of.ids)), range(last)),
        "last token": ((), [last - 1]),
        "subject token": (of.subject[-1:], ()),
    }[at]


@torch.no_grad()
def expected(
    family: str, ablated: Collection[Edge], fill: str, at: str, record: Record | None = None
) -> Array:
    """[row] the measure."""
    found = []
    for number, own in enumerate(ROWS):
        of, last = text(own), len(starts(family))
        tokens = tokens_of(family, number, at)
        shares = at_tokens(ablated, *tokens, (len(of.ids), last))
        work = Pass(opened(family), fills(family, number, fill), shares)
        logits = run(work, inputs(family, own))
        found.append(float(logits[-1, token(own["a"])] - logits[-1, token(own["b"])]))
    return np.array(found)


def ran(family: str, lines: str, folder: Path, mode: str = "planned", **more: Any) -> Any:
    found = try_file(lines, folder, model(family), MODES[mode], tokenizer=tokenizer(), **more)
    return by_name(*found)


slow = pytest.mark.slow
FAMILIES = [
    "t5",
    "bart",
    "t5gemma",
    *(pytest.param(family, marks=slow) for family in ("mt5", "mbart", "marian", "pegasus")),
]
CASES = [
    ("c", "zero", "tokens *"),
    ("all but c", "zero", "tokens *"),
    ("c", "turned", "tokens *"),
    ("all but c", "turned", "tokens *"),
    ("all but c", "mean", "last token"),
    ("c", "mean", "subject token"),
    ("c", "other", "last token"),
    ("all but c", "other", "subject token"),
]


@pytest.mark.parametrize("mode", ["planned", "padded on the right", "small passes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_circuit_of_both_streams_equals_hooks(family: str, mode: str, tmp_path: Path) -> None:
    lines = CIRCUIT + "".join(
        experiment(f"e{n}", "prompts p", f"ablate {rule} at {at} with {fill}", DIFFERENCE)
        for n, (rule, fill, at) in enumerate(CASES)
    )
    found = ran(family, lines, tmp_path, mode)
    every = set(list_edges(opened(family)))
    assert named() < every
    base = expected(family, (), "zero", "tokens *")
    for n, (rule, fill, at) in enumerate(CASES):
        ablated = named() if rule == "c" else every - named()
        values = found[f"e{n}"].measures[0].patched[0]
        own = expected(family, ablated, fill, at)
        np.testing.assert_allclose(values, own, atol=1e-4, err_msg=str(CASES[n]))
        assert np.abs(own - base).max() > 1e-3, CASES[n]


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["bart writing", "t5 writing", pytest.param("marian writing", marks=slow)]
)
def test_streams_in_which_nothing_is_left_are_exactly_zero(family: str, tmp_path: Path) -> None:
    """Norms without biases would make rounding errors as large as any other stream."""
    heads = [("v cross", layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    kept: set[Edge] = {(ENCODED, to) for to in heads} | {(("z cross", 1, 1), LOGITS)}
    lines = (
        "circuit c = embed encoder -> v cross layers * heads *, z cross layer 1 head 1 -> logits\n"
    )
    rule = "ablate all but c at tokens * with zero"
    lines += experiment("e", "prompts p", rule, DIFFERENCE)
    own = expected(family, set(list_edges(opened(family))) - kept, "zero", "tokens *")
    for mode in ("planned", "small passes"):
        found = ran(family, lines, tmp_path, mode)["e"].measures[0].patched[0]
        np.testing.assert_allclose(found, own, atol=1e-4)


PLACED = {
    "z cross layer 0 head 0 -> L0.mlp": "last token",
    "embed encoder -> k cross layers * heads *": "subject tokens",
    "mlp_out encoder layer 0 -> q encoder layer 1 heads *": "token 2",
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_with_positions_in_both_streams_equal_hooks(family: str, tmp_path: Path) -> None:
    edges = ", ".join(f"{edge} at {PLACED[edge]}" if edge in PLACED else edge for edge in SOME)
    rules = ("ablate c at tokens * with zero", "ablate all but c at tokens * with turned")
    lines = f"circuit c = {edges}\n" + "".join(
        experiment(f"e{n}", "prompts p", rule, DIFFERENCE) for n, rule in enumerate(rules)
    )
    found = ran(family, lines, tmp_path)
    for n, fill in enumerate(("zero", "turned")):
        own = placed_values(family, SOME, PLACED, fill, all_but=fill == "turned")
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], own, atol=1e-4)


@pytest.mark.parametrize("encoded", ["subject tokens", "tokens *"])
def test_overlap_at_positions_counts_edges_of_both_streams(encoded: str, tmp_path: Path) -> None:
    """Edges of the encoder at groups of its tokens, edges of the decoder at groups of those."""
    placed = {**PLACED, "embed encoder -> k cross layers * heads *": encoded}
    edges = ", ".join(f"{edge} at {placed[edge]}" if edge in placed else edge for edge in SOME)
    other = ["embed encoder -> k cross layers * heads *", "L2.mlp -> logits"]
    lines = f"circuit c = {edges}\ncircuit d = {', '.join(other)}\n"
    lines += "experiment e {\n model m\n prompts p\n observe overlap c with d as both\n}\n"
    found = ran("t5", lines, tmp_path)["e"]
    values = {each.label: float(each.patched[0, 0]) for each in found.measures}
    groups: set[tuple[bool, frozenset[str]]] = set()
    for record in ROWS:
        of, last = text(record), len(starts("t5"))
        every = range(len(of.ids))
        at = {"subject tokens": of.subject, "token 2": [2], "tokens *": every}
        for n in every:
            groups.add((True, frozenset(p for p in {encoded, "token 2"} if n in at[p])))
        groups |= {(False, frozenset(["last token"] * (n == last - 1))) for n in range(last)}

    def place(edge: Edge, position: str | None) -> set[Any]:
        encoder = edge[0] == ENCODED or "encoder" in edge[0][0]
        return {
            (edge, own)
            for own in groups
            if own[0] == encoder and (position is None or position in own[1])
        }

    def join(names: Collection[str], at: Mapping[str, str]) -> set[Any]:
        each = (place(edge, at.get(name)) for name in names for edge in SOME[name])
        return set().union(*each)

    first, second = join(SOME, placed), join(other, {})
    total = sum(len(place(edge, None)) for edge in list_edges(opened("t5")))
    assert values["both"] == len(first & second)
    assert values["both jaccard"] == pytest.approx(len(first & second) / len(first | second))
    assert values["both expected"] == pytest.approx(len(first) * len(second) / total)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_edge_auroc_counts_pairs_of_edges_of_both_streams(family: str, tmp_path: Path) -> None:
    """Absolute scores, some of them equal; an equal pair counts one half."""
    every = list_edges(opened(family))
    true = {edge for name in SOME for edge in SOME[name]}
    scores = np.random.default_rng(0).integers(-9, 10, len(every)) / 2
    content = {
        names_of(edge): {"score": float(score), "in_graph": n % 2 == 0}
        for n, (edge, score) in enumerate(zip(every, scores, strict=True))
    }
    (tmp_path / "graph.json").write_text(json.dumps({"edges": content}), encoding="utf-8")
    lines = f'circuit s = saved("graph.json")\n{CIRCUIT}'
    lines += "experiment e {\n  model m\n  observe edge_auroc s with c as ranks\n}\n"
    found = ran(family, lines, tmp_path)["e"].measures[0].patched[0, 0]
    sizes = {edge: abs(score) for edge, score in zip(every, scores, strict=True)}
    wins = [
        1.0 if sizes[own] > sizes[other] else 0.5 if sizes[own] == sizes[other] else 0.0
        for own in true
        for other in every
        if other not in true
    ]
    assert 0.5 in wins
    assert len(wins) == len(true) * (len(every) - len(true))
    assert found == pytest.approx(sum(wins) / len(wins))


def placed_values(
    family: str,
    some: Mapping[str, list[Edge]],
    placed: Mapping[str, str],
    fill: str,
    *,
    all_but: bool,
) -> Array:
    """[row] the measure while edges, some of them at positions, carry a fill, or all others do."""
    values, every = list[float](), list_edges(opened(family))
    for number, record in enumerate(ROWS):
        of, last = text(record), len(starts(family))
        sizes = len(of.ids), last
        both = {edge for own in some.values() for edge in own}
        within = at_tokens(both, range(len(of.ids)), range(last), sizes)
        tokens = {"last token": [last - 1], "subject tokens": of.subject, "token 2": [2]}
        for name, at in placed.items():
            within |= at_tokens(some[name], tokens[at], tokens[at], sizes)
        shares = within
        if all_but:
            whole = at_tokens(every, range(len(of.ids)), range(last), sizes)
            shares = {edge: own - within.get(edge, 0 * own) for edge, own in whole.items()}
        logits = run(
            Pass(opened(family), fills(family, number, fill), shares), inputs(family, record)
        )
        values.append(float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])]))
    return np.array(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_at_all_tokens_of_both_streams_equals_hooks(family: str, tmp_path: Path) -> None:
    """On two prompts of 13 tokens."""
    own = [ROWS[0], ROWS[3]]
    write_rows(tmp_path, own)
    rule = "ablate c at tokens * with mean"
    lines = CIRCUIT + experiment("e", "prompts p", rule, DIFFERENCE)
    (values,) = ran(family, lines, tmp_path)["e"].measures[0].patched
    both = [outputs(family, n) for n in (0, 3)]
    mean = {node: (both[0][node] + both[1][node]) / 2 for node in both[0]}
    for value, record in zip(values, own, strict=True):
        of, last = text(record), len(starts(family))
        shares = at_tokens(named(), range(len(of.ids)), range(last), (len(of.ids), last))
        with torch.no_grad():
            logits = run(Pass(opened(family), mean, shares), inputs(family, record))
        expected_ = float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])])
        assert value == pytest.approx(expected_, abs=1e-4)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma"])
def test_graph_json_of_both_streams_is_read_as_the_same_circuit(
    family: str, placed: bool, tmp_path: Path
) -> None:
    lines = CIRCUIT.rstrip()
    if placed:
        lines += "".join(f", {edge} at {at}" for edge, at in PLACED.items())
    rule = ("prompts p", "ablate all but c at tokens * with zero", "report graph")
    own = ran(family, f"{lines}\n" + experiment("e", *rule, DIFFERENCE), tmp_path)["e"]
    graph.save(own, own.reports[0], tmp_path / "c.json")
    saved = 'circuit c = saved("c.json")\n' + experiment("e", *rule, DIFFERENCE)
    found = ran(family, saved, tmp_path)["e"]
    assert set(found.circuit.edges) == set(own.circuit.edges)
    assert found.circuit.total == own.circuit.total
    np.testing.assert_array_equal(found.measures[0].patched, own.measures[0].patched)
    graph.save(found, found.reports[0], tmp_path / "d.json")
    read = [json.loads((tmp_path / f"{n}.json").read_text("utf-8")) for n in ("c", "d")]
    assert read[0] == read[1]


def test_effects_of_a_circuit_equal_hooks(tmp_path: Path) -> None:
    """Faithfulness, completeness and random circuits, two experiments in a file."""
    raw = "measure logit(answer) - logit(wrong) as"
    stats = "stats bootstrap(100) confidence 95% correct none"
    lines = CIRCUIT + experiment(
        "f",
        "prompts p",
        "ablate all but c at tokens * with turned",
        f"{raw} faithfulness",
        "against random(3)",
        stats=stats,
    )
    lines += experiment("g", "prompts p", "ablate c at tokens * with turned", f"{raw} completeness")
    found, every = ran("t5", lines, tmp_path), set(list_edges(opened("t5")))
    base = expected("t5", (), "zero", "tokens *")
    empty = expected("t5", every, "turned", "tokens *")
    kept = expected("t5", every - named(), "turned", "tokens *")
    without = expected("t5", named(), "turned", "tokens *")
    faithful = (kept.mean() - empty.mean()) / (base.mean() - empty.mean())
    complete = (without.mean() - empty.mean()) / (base.mean() - empty.mean())
    for name, own in (("f", faithful), ("g", complete)):
        cell, effect = found[name].measures[0], {"f": "faithfulness", "g": "completeness"}[name]
        np.testing.assert_allclose(cell.patched[0], {"f": kept, "g": without}[name], atol=1e-4)
        assert cell.source is not None
        means = (float(each.mean()) for each in (cell.patched, cell.base, cell.source))
        assert EFFECTS[effect].of_means(*means) == pytest.approx(own, abs=1e-3), name
    conventions = found["f"].conventions
    assert "on a path from `embed` to `logits`" not in str(conventions["controls"])
    assert "positions" not in str(conventions["controls"])


def test_random_circuits_of_both_streams_are_on_paths_from_an_embedding(tmp_path: Path) -> None:
    ends = "embed encoder -> v cross layer 1 head 0, z cross layer 1 head 0 -> logits"
    rule = "ablate all but c at tokens * with turned"
    lines = f"circuit c = {ends}\n" + experiment(
        "e", "prompts p", rule, DIFFERENCE, "against random(4)"
    )
    said = str(ran("t5", lines, tmp_path)["e"].conventions["controls"])
    assert "of 2 edges, each on a path from `embed` to `logits`, at the same tokens" in said
    loaded, _ = adopt_model("m", model("t5"), tokenizer())
    assert loaded is not None
    v, z = SitePoint("v cross", 1, 0), SitePoint("z cross", 1, 0)
    asked = AskedCircuits(loaded.shape, frozenset(((ENCODER_EMBEDDING, v), (z, END))), 0, 40)
    drawn, graph = draw_circuits(asked), EdgeGraph(loaded.shape)
    assert drawn.is_connected
    senders: set[SitePoint] = set()
    for each in drawn.circuits:
        edges = [edge for edge in each if isinstance(edge, tuple)]
        assert len(edges) == len(each) == 2
        assert graph.covers(edges)
        senders.update(of for of, _ in edges)
    assert {EMBEDDING, ENCODER_EMBEDDING} < senders


@torch.no_grad()
def test_circuits_over_sounds_equal_hooks() -> None:
    """In Whisper, whose decoder begins with four tokens."""
    name = "multilingual"
    circuit = (
        "circuit c = embed -> L1H2.k, z cross layer 0 head 3 -> q layer 2 heads *, "
        "z encoder layer 0 head 1 -> v cross layer 1 head 2, L0H0 -> q cross layer 0 head 1, "
        "embed encoder -> mlp_norm encoder layer 1, mlp_out encoder layer 1 -> k cross layer 2 "
        "heads *\n"
    )
    family = doubled(sounds.bare, name, 3, 2, sounds.HEADS, 2)
    heads = range(sounds.HEADS)
    own: set[Edge] = {
        (EMBED, ("k", 1, 2)),
        *((("z cross", 0, 3), ("q", 2, head)) for head in heads),
        (("z encoder", 0, 1), ("v cross", 1, 2)),
        (("z", 0, 0), ("q cross", 0, 1)),
        (ENCODED, ("mlp_norm encoder", 1, 0)),
        *((("mlp_out encoder", 1, 0), ("k cross", 2, head)) for head in heads),
    }
    rules = (
        ("ablate c at tokens * with zero", own, "zero"),
        ("ablate all but c at tokens * with changed", {*list_edges(family)} - own, "changed"),
    )
    texts = circuit + "".join(
        sounds.experiment(f"e{n}", rule) for n, (rule, _, _) in enumerate(rules)
    )
    found = sounds.run_text(texts, name)
    for (rule, edges, fill), each in zip(rules, found, strict=True):
        for n in range(len(sounds.RECORDS)):
            plain = Pass(family)
            run(plain, sound_inputs(name, sounds.other(n)))
            filled = plain.given
            if fill == "zero":
                filled = {node: torch.zeros_like(value) for node, value in filled.items()}
            sizes = sounds.FRAMES, len(sounds.STARTS[name])
            shares = at_tokens(edges, range(sizes[0]), range(sizes[1]), sizes)
            logits = run(Pass(family, filled, shares), sound_inputs(name, n))[-1]
            answer, wrong = (sounds.token(str(sounds.RECORDS[n][key])) for key in ("n", "m"))
            expected_ = float(logits[answer] - logits[wrong])
            assert each.measures[0].patched[0, n] == pytest.approx(expected_, abs=1e-4), rule


def sound_inputs(name: str, n: int) -> dict[str, Tensor]:
    ids = torch.tensor([sounds.STARTS[name]])
    return {"input_features": sounds.features(n), "decoder_input_ids": ids}


@torch.no_grad()
def test_circuit_with_another_rule_equals_hooks(tmp_path: Path) -> None:
    """The rule writes the output of a sender."""
    rules = ("ablate c at tokens * with zero", "patch z encoder layer 0 head 0 at subject token")
    lines = CIRCUIT + experiment("e", "prompts p", "from other into clean", *rules, DIFFERENCE)
    (values,) = ran("t5", lines, tmp_path)["e"].measures[0].patched
    own = place("t5", "z encoder", 0)
    columns = slice(WIDTH)
    for number, record in enumerate(ROWS):
        of, last = text(record), len(starts("t5"))
        other = read("t5", text(record, "other"), own)[text(record, "other").subject[-1]]
        shares = at_tokens(named(), range(len(of.ids)), range(last), (len(of.ids), last))
        work = Pass(opened("t5"), fills("t5", number, "zero"), shares)

        def patch(_: Any, args: Any, of: Text = of, other: Tensor = other) -> Any:
            new = args[0].clone()
            new[0, of.subject[-1], columns] = other[columns].double()
            return (new, *args[1:])

        handle = work.family.module(own.path).register_forward_pre_hook(patch)
        try:
            logits = run(work, inputs("t5", record))
        finally:
            handle.remove()
        expected_ = float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])])
        assert values[number] == pytest.approx(expected_, abs=1e-4)


ERRORS = {
    "z encoder layer 1 head 0 -> logits": ("E0335", "only through `k cross` and `v cross`"),
    "mlp_hidden encoder layer 1 neuron 3 -> logits": ("E0335", "example `k cross layer 0 head 0`"),
    "z cross layer 0 head 0 -> k cross layer 1 head 0": ("E0335", "doesn't read the decoder"),
    "z cross layer 1 head 0 -> q cross layer 1 head 0": ("E0335", "before or at the sender"),
    "L1.mlp -> q cross layer 1 head 0": ("E0335", "before or at the sender"),
    "z encoder layer 0 head 0 -> final_norm encoder": ("E0334", "`v cross layer 1 head 0`"),
    "attn_out cross layer 0 -> logits": ("E0334", "`z cross layer 0 head 1`"),
    "z layer 0 head 0 -> z cross layer 0 head 0": ("E0334", "`q cross layer 1 head 0`"),
}


@pytest.mark.parametrize("edge", ERRORS)
def test_edge_that_the_model_lacks_is_an_error(edge: str, tmp_path: Path) -> None:
    rule = experiment("e", "prompts p", "ablate c at tokens * with zero", DIFFERENCE)
    lines = f"circuit c = embed -> logits, {edge}\n{rule}"
    result, problems = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    code, words = ERRORS[edge]
    assert problem.code == code
    assert words in render_full([problem], color=False, width=200)


RULE_ERRORS = {
    "ablate c at {subject token, last token} with zero": "E0108",
    "ablate c at tokens * with zero\n  patch mlp_norm encoder layer 0 at subject token": "E0108",
    "ablate c at tokens * with zero\n  patch attn_norm cross layer 0 at last token": "E0108",
    "ablate c at tokens * with zero\n  patch final_norm encoder at subject token": "E0108",
    "ablate d at subject token with zero": "E0316",
    "ablate c at tokens * with zero\n  generate 4": "E0108",
    "ablate all but c at tokens * with zero\n  against random(3)": "E0630",
}


@pytest.mark.parametrize("rule", RULE_ERRORS)
def test_rule_on_a_circuit_that_cant_be_computed_is_an_error(rule: str, tmp_path: Path) -> None:
    edges = "embed -> logits, embed encoder -> v cross layer 0 head 0"
    edges += " at subject token" * ("against" in rule)
    ends = ("from other into clean",) * ("patch" in rule)
    lines = f"circuit c = {edges}\ncircuit d = embed -> logits\n" + experiment(
        "e", "prompts p", *ends, rule, DIFFERENCE
    )
    result, problems = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == [RULE_ERRORS[rule]]


def test_picture_of_a_circuit_has_the_encoder_below_the_decoder(tmp_path: Path) -> None:
    rule = "ablate all but c at tokens * with turned"
    lines = CIRCUIT + experiment("e", "prompts p", rule, DIFFERENCE, 'report graph to "c.svg"')
    found = ran("t5", lines, tmp_path)["e"]
    assert found.circuit is not None
    edges = list_drawn_edges(found.circuit, None)
    assert {edge.text for edge in edges} == {f"{of} -> {to}" for of, to in found.circuit.edges}
    for edge in edges:
        assert edge.sender.level < edge.receiver.level, edge.text
    ends = {end.title: end for edge in edges for end in (edge.sender, edge.receiver)}
    order = ["embed encoder", "encoder L0H0", "encoder L0 MLP", "encoder L1H0", "embed"]
    order += ["L0H0", "cross L0H0", "L0 MLP", "L1H1", "cross L1H0", "L1 MLP", "logits"]
    levels = [ends[title].level for title in order if title in ends]
    assert levels == sorted(levels)
    assert len(levels) > 9


# --- scores of edges ------------------------------------------------------------------------------


def node_of(label: str, end: str) -> Node:
    """A node by its name in a file; end: `out` or `norm`, for MLPs."""
    if label in ("embed", "logits", "embed encoder"):
        return label, 0, 0
    stacked = re.fullmatch(r"(\w+ \w+) layer (\d+)(?: (?:head|neuron) (\d+))?", label)
    if stacked is not None:
        return stacked[1], int(stacked[2]), int(stacked[3] or 0)
    head = re.fullmatch(r"L(\d+)H(\d+)(?:\.(\w))?", label)
    if head is not None:
        return head[3] or "z", int(head[1]), int(head[2])
    feature = re.fullmatch(r"feature (\d+) of f", label)
    if feature is not None:
        return "feature", 1, int(feature[1])
    neuron = re.fullmatch(r"L(\d+)N(\d+)", label)
    if neuron is not None:
        return "mlp_hidden", int(neuron[1]), int(neuron[2])
    return f"mlp_{end}", int(label.removeprefix("L").removesuffix(".mlp")), 0


def fitted(
    family: str, maker: str, source: str, at: str, folder: Path, group: str = ""
) -> dict[Edge, float]:
    """The scores of all edges that a training writes; group: a line of the file."""
    options = "validation: 0%, measure_on_training_rows: true"
    call = f"{maker}, prompts: p, {source}, {options}, maximise: logit(answer) - logit(wrong)"
    rule = experiment("e", "prompts p", "ablate all but c at tokens * with turned", DIFFERENCE)
    path = folder / "file.mech"
    text_ = (
        f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{group}\n'
        f"circuit c = fit({call}) {at}\n{rule}"
    )
    path.write_text(text_)
    write_rows(folder)
    (found,) = mechdsl.fit(path, {"m": (model(family), tokenizer())}, store=folder / "store")
    content = json.loads((found.folder / "mask.json").read_text())
    ends = (label.split(" -> ") for label in content["labels"])
    edges = [(node_of(of, "out"), node_of(to, "norm")) for of, to in ends]
    return dict(zip(edges, content["scores"], strict=True))


@cache
def with_rules(family: str, rules: str) -> Family:
    """A model, with the derivatives of `relp` or `gim` if they are named."""
    own = opened(family)
    return dataclasses.replace(own, model=ruled(own.model, rules)) if rules else own


def derivatives(
    family: str,
    number: int,
    fill: str,
    at: str,
    shifts: Mapping[Node, Tensor],
    senders: Collection[Node] | None = None,
    rules: str = "",
) -> dict[Edge, float]:
    """The derivatives of the measure by the shares of edges from some senders, at shares of 0."""
    record, plain, filled = ROWS[number], outputs(family, number), fills(family, number, fill)
    of, last = text(record), len(starts(family))
    tokens = tokens_of(family, number, at)
    every = [e for e in list_edges(opened(family)) if senders is None or e[0] in senders]
    masks = at_tokens(every, *tokens, (len(of.ids), last))
    shares = {edge: torch.zeros((), dtype=torch.double, requires_grad=True) for edge in every}
    change = {sender: filled[sender] - value for sender, value in plain.items()}
    placed = {edge: share * masks[edge] for edge, share in shares.items()}
    work = Pass(with_rules(family, rules), shares=placed, moved=change, shifts=shifts)
    logits = run(work, inputs(family, record))[-1]
    value = logits[token(record["a"])] - logits[token(record["b"])]
    found = torch.autograd.grad(value, list(shares.values()), allow_unused=True)
    return {edge: float(own or 0) for edge, own in zip(every, found, strict=True)}


ON_PATHS: dict[str, list[Edge]] = {
    "embed -> logits": [(EMBED, LOGITS)],
    "embed -> v layer 0 heads *": [(EMBED, ("v", 0, head)) for head in range(HEADS)],
    "layer 0 heads * -> logits": [(("z", 0, head), LOGITS) for head in range(HEADS)],
    "embed -> q cross layer 1 heads *": [(EMBED, ("q cross", 1, head)) for head in range(HEADS)],
    "embed encoder -> v encoder layer 0 heads *": [
        (ENCODED, ("v encoder", 0, head)) for head in range(HEADS)
    ],
    "z encoder layer 0 heads * -> v cross layer 1 heads *": [
        (("z encoder", 0, of), ("v cross", 1, to)) for of in range(HEADS) for to in range(HEADS)
    ],
    "z cross layer 1 heads * -> logits": [(("z cross", 1, head), LOGITS) for head in range(HEADS)],
}


@pytest.mark.parametrize(
    ("family", "rule", "fill"),
    [
        ("t5", "all but c", "zero"),
        pytest.param("t5", "c", "turned", marks=slow),
        pytest.param("bart", "c", "turned", marks=slow),
        pytest.param("t5gemma", "c", "zero", marks=slow),
    ],
)
def test_estimates_of_edges_in_both_streams_are_derivatives_in_the_circuit(
    family: str, rule: str, fill: str, tmp_path: Path
) -> None:
    edges = SOME | ON_PATHS
    circuit = {edge for each in edges.values() for edge in each}
    lines = f"circuit c = {', '.join(edges)}\n" + experiment(
        "e",
        "prompts p",
        f"ablate {rule} without each edge at tokens * with {fill}",
        "using eap",
        DIFFERENCE,
    )
    found = ran(family, lines, tmp_path)["e"]
    every, sign = list_edges(opened(family)), -1 if rule == "c" else 1
    values: list[dict[Edge, float]] = []
    for number, own in enumerate(ROWS):
        sizes = len(text(own).ids), len(starts(family))
        masks = at_tokens(every, range(sizes[0]), range(sizes[1]), sizes)
        shares = {edge: float((edge in circuit) == (rule == "c")) for edge in every}
        leaves = {edge: torch.tensor(shares[edge], requires_grad=True) for edge in circuit}
        placed = {edge: leaves.get(edge, shares[edge]) * masks[edge] for edge in every}
        logits = run(Pass(opened(family), fills(family, number, fill), placed), inputs(family, own))
        value = logits[-1, token(own["a"])] - logits[-1, token(own["b"])]
        slopes = torch.autograd.grad(value, [*leaves.values()])
        estimates = (float(value.detach() + sign * slope) for slope in slopes)
        values.append(dict(zip(leaves, estimates, strict=True)))
    ends = (str(cell.coords["edge"]).split(" -> ") for cell in found.cells)
    cells = [(node_of(of, "out"), node_of(to, "norm")) for of, to in ends]
    assert {*cells} == circuit
    expected = np.array([[row[edge] for row in values] for edge in cells])
    np.testing.assert_allclose(found.measures[0].patched, expected, rtol=2e-4, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 1e-2


def path_scores(
    family: str, number: int, fill: str, at: str, path: str, steps: int
) -> dict[Edge, float]:
    """Means of derivatives at points between the run and that of the fill; means over rows are
    those of a position, and senders move there only."""
    rules = path if path in ("relp", "gim") else ""
    found = derivatives(family, number, fill, at, {}, rules=rules)
    if not path or rules:
        return found
    plain, filled = outputs(family, number), fills(family, number, fill)
    groups: dict[tuple[str, int], list[Node]] = {}
    for sender in plain:
        module = sender[0].replace("feature", "mlp_out"), sender[1]
        groups.setdefault(module, []).append(sender)
    joined = [[EMBED, ENCODED]] if path == "inputs" else [*groups.values()]
    encoder, decoder = tokens_of(family, number, at if fill == "mean" else "tokens *")
    change = {of: torch.zeros_like(value) for of, value in plain.items()}
    for of, own in change.items():
        moved = list(encoder if of[0].endswith("encoder") else decoder)
        own[moved] = filled[of][moved] - plain[of][moved]
    for moving in joined:
        for step in range(1, steps):
            shifts = {of: (1 - step / steps) * change[of] for of in moving}
            senders = None if path == "inputs" else moving
            more = derivatives(family, number, fill, at, shifts, senders)
            found |= {edge: found[edge] + own for edge, own in more.items()}
    return {edge: own / steps for edge, own in found.items()}


SCORES = {
    "eap": ("eap(size: 40)", "from: turned", "turned", "tokens *", "", 1),
    "eap of zero": ("eap(size: 40)", "with: zero", "zero", "tokens *", "", 1),
    "eap at a token of the decoder": (
        "eap(size: 40)", "with: zero", "zero", "last token", "", 1,
    ),
    "inputs": ("eap_ig(size: 40, steps: 3)", "with: zero", "zero", "tokens *", "inputs", 3),
    "activations": (
        "eap_ig_activations(size: 40, steps: 2)",
        "from: turned", "turned", "tokens *", "activations", 2,
    ),
    "inputs at a token of the decoder": (
        "eap_ig(size: 40, steps: 3)", "from: turned", "turned", "last token", "inputs", 3,
    ),
    "activations at a token of the decoder": (
        "eap_ig_activations(size: 40, steps: 2)",
        "with: zero", "zero", "last token", "activations", 2,
    ),
    "relp": ("relp(size: 40)", "from: turned", "turned", "tokens *", "relp", 1),
    "gim": ("gim(size: 40)", "with: zero", "zero", "tokens *", "gim", 1),
    "gim at a token of the decoder": (
        "gim(size: 40)", "from: turned", "turned", "last token", "gim", 1,
    ),
    "activations with a mean at a token of the decoder": (
        "eap_ig_activations(size: 40, steps: 2)",
        "with: mean", "mean", "last token", "activations", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", pytest.param("mbart", marks=slow)])
def test_scores_of_edges_equal_derivatives(family: str, name: str, tmp_path: Path) -> None:
    maker, source, fill, at, path, steps = SCORES[name]
    found = fitted(family, maker, source, f"at {at}", tmp_path)
    every = [path_scores(family, n, fill, at, path, steps) for n in range(len(ROWS))]
    assert {*found} == {*list_edges(opened(family))}
    expected_ = {edge: sum(each[edge] for each in every) / len(every) for edge in found}
    for encodes in (True, False):
        own = [edge for edge in found if edge[0][0].endswith("encoder") == encodes]
        values, others = (np.array([each[edge] for edge in own]) for each in (found, expected_))
        np.testing.assert_allclose(values, others, atol=1e-4, rtol=5e-5, err_msg=name)
        if at == "tokens *":
            assert np.ptp(others) > 1e-3
    if steps > 1 and at != "tokens *":
        plain = [path_scores(family, n, fill, at, "", 1) for n in range(len(ROWS))]
        mean = {edge: sum(each[edge] for each in plain) / len(plain) for edge in found}
        assert max(abs(mean[edge] - expected_[edge]) for edge in found) > 1e-3


@pytest.mark.parametrize(
    ("maker", "rule"),
    [
        ("eap(size: 30)", "all but c"),
        ("mask(size: 10), steps: 4", "c"),
        pytest.param("eap_ig(faithfulness: 0.5, steps: 2)", "all but c", marks=slow),
        pytest.param("acdc(threshold: 0.003)", "all but c", marks=slow),
    ],
)
def test_report_of_a_circuit_equals_the_ablation(maker: str, rule: str, tmp_path: Path) -> None:
    options = "validation: 0%, measure_on_training_rows: true"
    call = f"{maker}, prompts: p, from: turned, {options}, maximise: logit(answer) - logit(wrong)"
    lines = experiment("e", "prompts p", f"ablate {rule} at tokens * with turned", DIFFERENCE)
    path = tmp_path / "file.mech"
    head = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\ncircuit c = fit({call})'
    path.write_text(f"{head} at tokens *\n{lines}")
    write_rows(tmp_path)
    given = {"m": (model("t5"), tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    assert isinstance(found.report, CircuitReport | MaskReport)
    (ran_,) = mechdsl.run(path, given, store=tmp_path / "store").experiments
    measure = ran_.measures[0]
    assert found.report.trained == pytest.approx(measure.patched.mean(), abs=1e-5)
    assert found.report.unpatched == pytest.approx(measure.base.mean(), abs=1e-5)
    assert abs(found.report.trained - found.report.unpatched) > 1e-3
    assert ran_.circuit is not None
    every = {*list_edges(opened("t5"))}
    ends = ((node_of(of, "out"), node_of(to, "norm")) for of, to in ran_.circuit.edges)
    assert {*ends} <= every


# --- searches for circuits ------------------------------------------------------------------------


def reference_steps(level: str) -> list[list[Edge]]:
    """The groups of edges that a search ablates together, from the end of the decoder backwards."""
    every = list_edges(opened("t5"))
    senders = [*dict.fromkeys(of for of, _ in every if of not in (EMBED, ENCODED))]
    receivers = [*dict.fromkeys(to for _, to in every)]
    if level == "edges":
        return [[edge] for to in receivers for edge in every if edge[1] == to][::-1]
    if level == "inputs":
        groups = [[e for e in every if e[1] == to] for to in receivers if to[0][0] in "qkv"]
    elif level == "heads":
        groups = [[e for e in every if e[0] == of] for of in senders if of[0][0] == "z"]
    else:
        modules = dict.fromkeys(of[:2] for of in senders)
        groups = [[e for e in every if e[0][:2] == module] for module in modules]
    return groups[::-1]


def mean_of(ablated: Collection[Edge]) -> float:
    return float(expected("t5", {*ablated}, "turned", "tokens *").mean())


def search_by_steps(levels: Sequence[str], threshold: float) -> dict[Edge, float]:
    """The kept edges of a search that takes one step after another, with their changes."""
    every, value = list_edges(opened("t5")), mean_of(())
    ablated, changes = set[Edge](), dict[Edge, float]()
    for group in (group for level in levels for group in reference_steps(level)):
        left = {*group} - ablated
        if not left:
            continue
        change = mean_of(ablated | left) - value
        changes |= dict.fromkeys(left, change)
        if -change < threshold:  # maximised
            ablated |= left
            value += change
    return {edge: changes[edge] for edge in every if edge not in ablated}


def kept_edges(maker: str, folder: Path) -> dict[Edge, float]:
    """The edges that a search keeps, with the changes of the measure."""
    found = fitted("t5", maker, "from: turned", "at tokens *", folder)
    (path,) = (folder / "store").rglob("mask.json")
    chosen = json.loads(path.read_text())["chosen"]
    return {edge: own for n, (edge, own) in enumerate(found.items()) if n in chosen}


@slow
@pytest.mark.parametrize(
    ("word", "levels"),
    [("acdc", ["edges"]), ("coarse_to_fine", ["blocks", "heads", "inputs", "edges"])],
)
def test_search_decisions_equal_a_reference(word: str, levels: list[str], tmp_path: Path) -> None:
    """The search skips edges that lead only to ablated edges; their ablation changes nothing."""
    found = kept_edges(f"{word}(threshold: 0.003)", tmp_path)
    reference = search_by_steps(levels, 0.003)
    assert {*found} == {*reference}
    own, others = ([each[edge] for edge in found] for each in (found, reference))
    np.testing.assert_allclose(own, others, atol=1e-5)
    assert len(found) > 2


@slow
def test_greedy_search_ablates_the_edges_with_the_best_means(tmp_path: Path) -> None:
    every = list_edges(opened("t5"))
    kept = kept_edges(f"greedy(size: {len(every) - 2})", tmp_path)
    ablated: list[Edge] = []
    for _ in range(2):
        due = [edge for edge in every if edge not in ablated]
        ablated.append(max(due, key=lambda edge: mean_of([*ablated, edge])))
    assert {*every} - {*kept} == {*ablated}


@slow
@pytest.mark.parametrize("maker", ["eap(size: 9)", "eap_ig(size: 9, steps: 2)"])
def test_scores_of_edges_over_sounds_equal_derivatives(maker: str, tmp_path: Path) -> None:
    """In Whisper; the embeddings of `eap_ig` move in the encoder and the decoder."""
    name, steps = "multilingual", 2 if "ig" in maker else 1
    family = doubled(sounds.bare, name, 3, 2, sounds.HEADS, 2)
    options = "validation: 0%, measure_on_training_rows: true, maximise: logit(answer)"
    line = f"circuit c = fit({maker}, prompts: ask, from: changed, {options}) at tokens *\n"
    rule = sounds.experiment("e", "ablate all but c at tokens * with changed")
    path = tmp_path / "file.mech"
    sounds.write_data(tmp_path)
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{sounds.BLOCK}\n{line}{rule}')
    given = {"m": (sounds.bare(name), sounds.processor())}
    (trained,) = mechdsl.fit(path, given, store=tmp_path / "store")
    content = json.loads((trained.folder / "mask.json").read_text())
    ends = (label.split(" -> ") for label in content["labels"])
    edges = [(node_of(of, "out"), node_of(to, "norm")) for of, to in ends]
    assert {*edges} == {*list_edges(family)}
    sizes = sounds.FRAMES, len(sounds.STARTS[name])
    masks = at_tokens(edges, range(sizes[0]), range(sizes[1]), sizes)
    total = torch.zeros(len(edges)).double()
    for n in range(len(sounds.RECORDS)):
        plain, filled = Pass(family), Pass(family)
        with torch.no_grad():
            run(plain, sound_inputs(name, n))
            run(filled, sound_inputs(name, sounds.other(n)))
        change = {of: filled.given[of] - own for of, own in plain.given.items()}
        for step in range(steps):
            shares = torch.zeros(len(edges)).double().requires_grad_()
            placed = {edge: shares[i] * masks[edge] for i, edge in enumerate(edges)}
            shifts = {of: step / steps * change[of] for of in (EMBED, ENCODED)}
            logits = run(
                Pass(family, {}, placed, moved=change, shifts=shifts), sound_inputs(name, n)
            )
            value = logits[-1, sounds.token(str(sounds.RECORDS[n]["n"]))]
            total += torch.autograd.grad(value, shares)[0] / steps / len(sounds.RECORDS)
    assert total.abs().max() > 1e-2
    np.testing.assert_allclose(content["scores"], total.numpy(), atol=1e-4, rtol=1e-4)


# --- circuits of files ----------------------------------------------------------------------------


def saved(folder: Path, edges: Sequence[str], family: str = "t5", *lines: str) -> Any:
    (folder / "edges.json").write_text(json.dumps({"edges": [*edges]}))
    rules = "".join(
        experiment(f"e{n}", "prompts p", line, DIFFERENCE) for n, line in enumerate(lines)
    )
    text_ = 'circuit c = saved("edges.json")\n' + rules
    return try_file(text_, folder, model(family), tokenizer=tokenizer())


def names_of(edge: Edge) -> str:
    """The edge as a training writes it."""

    def name(node: Node) -> str:
        site, layer, head = node
        if node in (EMBED, ENCODED, LOGITS):
            return site
        if " " in site:
            return f"{site} layer {layer}" + f" head {head}" * (not site.startswith("mlp"))
        if site.startswith("mlp"):
            return f"L{layer}.mlp"
        return f"L{layer}H{head}" + f".{site}" * (site != "z")

    of, to = edge
    return f"{name(of)} -> {name(to)}"


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=slow)])
def test_circuit_of_a_file_equals_hooks(family: str, tmp_path: Path) -> None:
    """With names of both streams, and with positions."""
    rules = (
        "ablate c at tokens * with turned",
        "ablate all but c at tokens * with turned",
    )
    found = by_name(*saved(tmp_path, [*map(names_of, named())], family, *rules))
    every = set(list_edges(opened(family)))
    for n, ablated in enumerate((named(), every - named())):
        own = expected(family, ablated, "turned", "tokens *")
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], own, atol=1e-4)
    first = "embed encoder -> v encoder layer 0 head 1"
    placed = [f"{first} at subject tokens"]
    at_last = ["z cross layer 1 head 1 -> logits at last token"]
    (one,) = by_name(*saved(tmp_path, [*placed, *at_last], family, rules[0])).values()
    written = f"circuit c = {first} at subject tokens, {at_last[0]}\n"
    (two,) = ran(
        family, written + experiment("e", "prompts p", rules[0], DIFFERENCE), tmp_path
    ).values()
    np.testing.assert_allclose(one.measures[0].patched, two.measures[0].patched, atol=1e-6)
    assert np.abs(one.measures[0].patched - one.measures[0].base).max() > 5e-4


def test_every_edge_is_read_by_the_name_that_a_training_writes() -> None:
    loaded, _ = adopt_model("m", model("t5"), tokenizer())
    assert loaded is not None
    for edge in list_model_edges(loaded.shape):
        assert edge_of_name(label_candidates((edge,)), loaded.shape, {}) == edge


NO_EDGES = {
    "z encoder layer 0 head 0 -> logits": "the receiver doesn't read the sender",
    "z cross layer 1 head 0 -> q cross layer 1 head 0": "the receiver doesn't read the sender",
    "z encoder layer 2 head 0 -> v cross layer 0 head 0": "`encoder` has 2 layers",
    "z cross layer 0 head 2 -> logits": "`z cross layer 0` has 2 heads",
    "z cross layer 0 -> logits": "`z cross layer 0` has 2 heads",
    "z cross head 0 -> logits": "has no layer",
    "embed cross -> logits": "`embed cross` isn't a valid sender",
    "embed -> z cross layer 0 head 0": "isn't a valid receiver",
    "mlp_out encoder layer 0 head 1 -> v cross layer 0 head 0": "`mlp_out encoder` has no heads",
    "z cross layer 0 head 0 - logits": "which isn't an edge",
}


@pytest.mark.parametrize("edge", NO_EDGES)
def test_file_with_an_edge_that_the_model_lacks_is_an_error(edge: str, tmp_path: Path) -> None:
    rule = "ablate c at tokens * with zero"
    result, problems = saved(tmp_path, ["embed -> logits", edge], "t5", rule)
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0342"
    assert NO_EDGES[edge] in problem.message
