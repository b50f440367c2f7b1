"""Edges of circuits at positions, against passes with a share of each edge for every token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.forward.hooks import full_pass
from mechdsl.forward.hooks.batch import CircuitWrite
from mechdsl.forward.hooks.circuits import CircuitHooks
from mechdsl.resolve.circuits import draw_circuits, list_edges
from mechdsl.resolve.sites import describe_position
from mechdsl.resolve.types import ResolvedRule
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.circuit_layout import list_edges as draw_edges
from mechdsl.vocab.metrics import EFFECTS

from ..execute.support import MODES, check_file, shared, token
from ..quick import in_turn
from .circuits import EMBED, LOGITS, circuit_pass, head, mlp
from .models import bare
from .support import (
    BLOCKS,
    QUICK,
    Text,
    agree,
    codes,
    difference,
    double,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)
from .test_ablated_circuits import (
    CASES,
    FAMILIES,
    INEXACT,
    Case,
    check_stored_values,
    count_operations,
    edges,
    fills,
    find_donors,
    key_heads,
    named,
    shape_of,
)
from .token_paths import find_leading, find_reached, list_steps

Edge = tuple[str, str]
Written = tuple[str, str, list[Edge]]
"""Edges in the file, their position, these edges."""
EVERY_TOKEN = "tokens *"


def written_edges(name: str) -> list[Written]:
    values = [(EMBED, f"{head(0, n)}.v") for n in range(key_heads(name))]
    return [
        ("embed -> L0H1.q", "last token", [(EMBED, "L0H1.q")]),
        ("embed -> L0H1.k", "cue token", [(EMBED, "L0H1.k")]),
        ("embed -> L0H1.k", "subject tokens", [(EMBED, "L0H1.k")]),
        ("embed -> v layer 0 heads *", "", values),
        (
            "layer 0 heads 0..1 -> L1H0.v",
            "{cue token, last token}",
            [("L0H0", "L1H0.v"), ("L0H1", "L1H0.v")],
        ),
        ("L0H2 -> L1.mlp", "tokens except last token", [("L0H2", mlp(1))]),
        ("L1H3 -> L2H3.q", "last token", [("L1H3", "L2H3.q")]),
        ("L0.mlp -> L2.mlp", "", [(mlp(0), mlp(2))]),
        ("L1.mlp -> logits", "last token", [(mlp(1), LOGITS)]),
        ("embed -> logits", "token 1", [(EMBED, LOGITS)]),  # the last token isn't at this position
        ("L0.mlp -> L1H0.k", "", [(mlp(0), "L1H0.k")]),
        ("L0.mlp -> L1H0.k", "last token", [(mlp(0), "L1H0.k")]),  # adds nothing
    ]


def define(written: Sequence[Written]) -> str:
    each = [f"{edge} at {at}" if at else edge for edge, at, _ in written]
    return f"circuit c = {', '.join(each)}\n"


def tokens_of_edges(written: Sequence[Written], text: Text) -> dict[Edge, set[int]]:
    """The tokens at which each edge is in the circuit."""
    found: dict[Edge, set[int]] = {}
    for _, at, own in written:
        for edge in own:
            found.setdefault(edge, set()).update(tokens(text, at or EVERY_TOKEN))
    return found


def shares(
    name: str, text: Text, placed: Mapping[Edge, set[int]], *, all_but: bool
) -> dict[Edge, Tensor]:
    """[T, 1] by edge: 1 where it is ablated."""
    every = edges(name)[2] if all_but else placed
    found: dict[Edge, Tensor] = {}
    for edge in every:
        there = torch.zeros(len(text.ids), 1, dtype=torch.double)
        there[sorted(placed.get(edge, ()))] = 1
        found[edge] = 1 - there if all_but else there
    return found


def expected(name: str, case: Case, donors: Mapping[int, int]) -> list[float]:
    values: list[float] = []
    every_fill, all_but = fills(name, case, donors), case.rule.startswith("all but")
    for n, (text, record) in enumerate(zip(rows(case.base), records(), strict=True)):
        ablated = shares(name, text, tokens_of_edges(written_edges(name), text), all_but=all_but)
        at = tokens(text, case.at)
        logits = circuit_pass(name, double(name), text.ids, every_fill[n], ablated, at)
        values.append(difference(logits, record))
    return values


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file, whose rows share passes, with those of a circuit without positions."""
    text = define(written_edges(name)) + "".join(
        case.experiment(key) for key, case in CASES.items()
    )
    bare = ", ".join(dict.fromkeys(edge for edge, _, _ in written_edges(name)))
    text += f"circuit d = {bare}\n" + experiment("whole", "ablate all but d at tokens * with other")
    return run_file(text, data, name, mode, precise=name not in INEXACT)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, list(MODES)))
def test_ablated_edges_carry_the_fill_at_their_positions(
    data: Path, name: str, mode: str, key: str
) -> None:
    case = CASES[key]
    found = results(data, name, mode)[key]
    donors = find_donors(name, case, found.measures[0].patched[0], expected)
    values = expected(name, case, donors)
    options: dict[str, Any] = {"most": False, "precise": name not in INEXACT, "large": 1e-3}
    agree(found, (), {(): values}, unpatched(name, case.base), **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_circuit_without_positions_differs_in_the_same_file(data: Path, name: str) -> None:
    found = results(data, name, "planned")
    placed, whole = (found[key].measures[0].patched for key in ("all_but_other", "whole"))
    assert np.abs(placed - whole).max() > 1e-3


@pytest.mark.parametrize(("name", "mode"), in_turn(("llama", "gpt2"), list(MODES)))
def test_rows_of_circuits_that_differ_in_positions_are_separate(
    data: Path, name: str, mode: str
) -> None:
    """Experiments of one file, two of them with equal circuits, and rows that start from a run."""
    at = {"c": "last token", "d": "cue token", "e": "last token", "f": ""}
    lines = [
        f"circuit {key} = embed -> L0H1.v{' at ' if own else ''}{own}\n" for key, own in at.items()
    ]
    run = "run r { ablate layer 1 head 0 at last token with zero }"
    rule = "ablate {} at {{cue token, last token}} with zero"
    text = "".join(lines)
    text += "".join(experiment(f"x{key}", rule.format(key)) for key in at)
    started = [experiment(f"y{key}", run, "from clean into r", rule.format(key)) for key in at]
    found = run_file(text + "".join(started), data, name, mode, precise=True)
    for kind in "xy":
        values = {key: found[kind + key].measures[0].patched[0] for key in at}
        np.testing.assert_array_equal(values["c"], values["e"])
        for key, other in (("c", "d"), ("c", "f"), ("d", "f")):
            assert np.abs(values[key] - values[other]).max() > 1e-5
    for key, own in at.items():
        for n, (row, record) in enumerate(zip(rows(), records(), strict=True)):
            fill = {EMBED: torch.zeros(len(row.ids), 1, dtype=torch.double)}
            there = tokens(row, own or "{cue token, last token}")
            logits = circuit_pass(name, double(name), row.ids, fill, {(EMBED, "L0H1.v")}, there)
            value = difference(logits, record)
            assert found[f"x{key}"].measures[0].patched[0, n] == pytest.approx(value, abs=1e-6)


def mean_with(name: str, placed: Sequence[Mapping[Edge, set[int]]], *, all_but: bool) -> float:
    """The mean of the measure if these edges, or all others, carry another run's values.

    Args:
        placed: By row, the tokens of each edge.
    """
    values: list[float] = []
    given = fills(name, Case("", "other"), {})
    for text, record, fill, own in zip(rows(), records(), given, placed, strict=True):
        ablated = shares(name, text, own, all_but=all_but)
        every = range(len(text.ids))
        logits = circuit_pass(name, double(name), text.ids, fill, ablated, every)
        values.append(difference(logits, record))
    return float(np.mean(values))


def test_effects_of_circuits_with_positions_equal_ratios_of_reference_means(data: Path) -> None:
    """Of a circuit with paths from `embed` to `logits` at single tokens."""
    name, rule = "gpt2", "at tokens * with other"
    written: list[Written] = [
        ("embed -> L0H1.v", "{cue token, last token}", [(EMBED, "L0H1.v")]),
        ("embed -> L0H1.v", "subject tokens", [(EMBED, "L0H1.v")]),
        ("L0H1 -> L1.mlp", "last token", [("L0H1", mlp(1))]),
        ("L1.mlp -> logits", "", [(mlp(1), LOGITS)]),
        ("embed -> logits", "", [(EMBED, LOGITS)]),
    ]
    rules = {
        "faithfulness": f"ablate all but c {rule}",
        "completeness": f"ablate c {rule}",
        "minimality": f"ablate all but c without each edge {rule}",
    }
    measure = "measure logit(answer) - logit(wrong) as {}"
    each = (
        experiment(effect, own, measure=measure.format(effect), stats="")
        for effect, own in rules.items()
    )
    found = run_file(define(written) + "".join(each), data, name, "planned", precise=True)
    placed = [tokens_of_edges(written, text) for text in rows()]
    circuit, rest = (mean_with(name, placed, all_but=own) for own in (True, False))
    none = mean_with(name, [{} for _ in rows()], all_but=True)
    whole = float(np.mean(unpatched(name))) - none

    def means(effect: str) -> list[float]:
        own = found[effect].measures[0]
        assert own.source is not None
        runs = (run.mean(1) for run in (own.patched, own.base, own.source))
        return EFFECTS[effect].of_means(*runs).tolist()

    assert abs(circuit - none) > 1e-3
    assert means("faithfulness") == pytest.approx([(circuit - none) / whole], abs=1e-6)
    assert means("completeness") == pytest.approx([(rest - none) / whole], abs=1e-6)
    labels = [str(cell.coords["edge"]) for cell in found["minimality"].cells]
    assert labels == [
        "embed -> L0H1.v at {cue token, last token} and subject tokens",
        "embed -> logits",
        "L0H1 -> L1.mlp at last token",
        "L1.mlp -> logits",
    ]
    for label, value in zip(labels, means("minimality"), strict=True):
        sender, receiver = label.partition(" at ")[0].split(" -> ")
        fewer = [{e: t for e, t in own.items() if e != (sender, receiver)} for own in placed]
        without = mean_with(name, fewer, all_but=True)
        assert value == pytest.approx((circuit - without) / whole, abs=1e-6)


OTHER_RULES = {
    "path": "path L0H1 -> q layer 2 heads * at last token",
    "patch": "patch L1H0 at last token",
    "attention": "block attention layer 1 head 0 from last token to cue token",
    "input": 'replace cue token with "w7"',
    "two fills": "",
}


@pytest.mark.parametrize("key", OTHER_RULES)
@pytest.mark.parametrize(("name", "mode"), in_turn(("llama", "gpt2"), QUICK))
def test_edges_at_a_position_equal_edges_of_a_rule_at_that_position(
    data: Path, name: str, mode: str, key: str
) -> None:
    """Next to other rules, and with fills as an axis."""
    edge = "embed -> L0H1.v{0}, layer 0 heads * -> L1.mlp{0}, L1H3 -> L2H3.q{0}"
    text = f"circuit c = {edge.format(' at {cue token, last token}')}\n"
    text += f"circuit d = {edge.format('')}\n"
    fill, every = "zero", "tokens *"
    if key == "two fills":
        fill, every = "zero, mean", "{token 1, cue token, last token}"
    for circuit, at in (("c", every), ("d", "{cue token, last token}")):
        lines = (f"ablate {circuit} at {at} with {fill}", OTHER_RULES[key])
        text += experiment(f"x{circuit}", "from other into clean", *lines)
    found = run_file(text, data, name, mode, precise=True)
    own, other = (found[each].measures[0].patched for each in ("xc", "xd"))
    np.testing.assert_allclose(own, other, atol=1e-9)
    assert np.abs(own - unpatched(name)).max() > 1e-3


@pytest.mark.parametrize(("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox"), QUICK))
def test_answers_of_several_tokens_are_at_no_position(data: Path, name: str, mode: str) -> None:
    """Edges with positions are ablated at the first token of the answer, as it is at none."""
    written: list[Written] = [
        ("embed -> logits", "last token", [(EMBED, LOGITS)]),
        ("L0.mlp -> logits", "", [(mlp(0), LOGITS)]),
        ("embed -> L0.mlp", "tokens except cue token", [(EMBED, mlp(0))]),
    ]
    two = """prompts two {
      rows "data.jsonl"
      xs = list(item, from: words, sep: " ")
      template "{xs} w40 {subject} w41 {cue} w42"
      answer " {a} {b}"
    }
    """
    rule = "ablate all but c at tokens * and answer with zero"
    lines = {"block": "two", "measure": "measure logprob(answer) as raw"}
    text = two + define(written) + experiment("e", rule, **lines)
    found = run_file(text, data, name, mode, precise=True)["e"].measures[0].patched[0]
    for n, (row, record) in enumerate(zip(rows(), records(), strict=True)):
        answer = [token(record["a"]), token(record["b"])]
        ids = [*row.ids, answer[0]]
        every = edges(name)[2]
        placed = tokens_of_edges(written, row)
        placed[EMBED, mlp(0)].add(0)  # `except` keeps the first token
        placed[mlp(0), LOGITS].add(len(row.ids))
        ablated: dict[Edge, Tensor] = {}
        for edge in every:
            ablated[edge] = torch.ones(len(ids), 1, dtype=torch.double)
            ablated[edge][sorted(placed.get(edge, ()))] = 0
        fill = {of: torch.zeros(len(ids), 1, dtype=torch.double) for of, _ in every}
        logits = circuit_pass(name, double(name), ids, fill, ablated, range(len(ids)))
        likely = logits[-2:].log_softmax(-1)
        value = float(likely[0, answer[0]] + likely[1, answer[1]])
        assert found[n] == pytest.approx(value, abs=1e-5)


def test_each_class_of_tokens_has_one_write_with_one_mask(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[CircuitWrite] = []
    open_circuit = full_pass.open_circuit

    def spy(*given: Any) -> CircuitHooks:
        writes.append(given[2])
        return open_circuit(*given)

    monkeypatch.setattr(full_pass, "open_circuit", spy)
    text = "circuit c = embed -> L0H1.q at cue token, embed -> L0H1.k at {cue token, last token}\n"
    text += experiment("e", "ablate all but c at tokens * with zero")
    run_file(text, data, "gpt2", "plain")
    assert all(write.mask.dim() == 2 for write in writes)
    total = len(list_edges(shape_of("gpt2")))
    edges_of = {int(write.mask.sum()): len(write.rows) for write in writes}
    every = sum(len(row.ids) for row in rows())
    assert len(writes) == 3
    assert edges_of == {total: every - 8, total - 1: 4, total - 2: 4}


def test_plan_counts_edges_only_at_their_tokens(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, planned = "ablate c at tokens * with zero", dict[str, float]()
    for at in ("last token", "{cue token, last token}", "tokens *", ""):
        circuit = f"circuit c = embed -> q layers * heads * {at and f'at {at}'}\n"
        _, planned[at] = count_operations(data, monkeypatch, "gpt2", circuit, rule)
    one, two, every, whole = planned.values()
    assert two > one
    assert every == whole
    tokens_of = sum(len(row.ids) for row in rows())
    assert (every - one) / (tokens_of - 4) == pytest.approx((two - one) / 4)


# --- random circuits ------------------------------------------------------------------------------

PATHS = """circuit c = embed -> L0H1.q at {cue token, last token}, L0H1 -> L1.mlp at cue token,
  L1.mlp -> L2H0.v at cue token, L0H1 -> L2H3.q at last token, embed -> logits,
  L2H0 -> logits at last token, L2H3 -> logits at last token
"""
CUT = "circuit c = embed -> L0H1.v at cue token, L1.mlp -> logits at cue token, embed -> L1.mlp\n"
"""An edge that leads to no measured token, because nothing reads the output at the cue."""
LATER = "circuit c = embed -> L0H1.v at token 1, L1H0 -> logits at last token\n"
"""Edges on a path only with those at tokens without positions, if these aren't ablated."""
EVERY = "tokens *"
SOME = "{cue token, last token}"
PLACED = PATHS.replace("embed -> logits", "embed -> L2H0.k at token 1")
DRAWN = {
    "all but": (PATHS, "ablate all but c at tokens * with other", True),
    "circuit": (PATHS, "ablate c at tokens * with zero", True),
    "placed": (PLACED, "ablate c at tokens * with zero", True),
    "cut": (CUT, "ablate all but c at tokens * with zero", False),
    "some": (LATER, "ablate all but c at tokens * with zero", False),
    "rest": (LATER, "ablate all but c at {token 1, last token} with zero", True),
}


def walk(
    name: str, text: Text, here: Mapping[Edge, set[int]], rest: Collection[int]
) -> dict[Edge, set[int]]:
    """The tokens at which each edge is on a path from an embedding to the logits of the last token,
    by edges at single tokens; `rest` are tokens of every edge."""
    length = len(text.ids)
    steps = [
        step
        for step in list_steps(name, length)
        if step.token in rest or step.token in here.get(step.edge, ())
    ]
    found: dict[Edge, set[int]] = {}
    for step in find_leading(find_reached(steps), length):
        if step.token in here.get(step.edge, ()):
            found.setdefault(step.edge, set()).add(step.token)
    return found


def is_on_paths(name: str, own: Mapping[Edge, Collection[str]], rule: str) -> bool:
    """Whether each edge at each of its positions is on a path in some row."""
    seen = set[tuple[Edge, str]]()
    for text in rows():
        written = {*tokens(text, rule.partition(" at ")[2].partition(" with ")[0])}
        here = {
            edge: {token for at in places for token in tokens(text, at)} & written
            for edge, places in own.items()
        }
        found = walk(name, text, here, {*range(len(text.ids))} - written)
        for edge, places in own.items():
            of_edge = found.get(edge, set())
            seen |= {(edge, at) for at in places if of_edge.intersection(tokens(text, at))}
    return seen == {(edge, at) for edge, places in own.items() for at in places}


def list_drawn(text: str, data: Path, name: str) -> tuple[list[dict[Edge, list[str]]], str]:
    """The positions of each edge of each random circuit, from what the rule ablates; and the
    convention."""
    (found,) = check_file(text, data, shared(bare(name)), BLOCKS).experiments
    assert found.control is not None
    (rule,) = found.control.experiment.rules
    all_but = "all but" in text
    assert rule.circuit is not None
    every = {*rule.circuit.every}
    circuits: list[dict[Edge, list[str]]] = []
    labels = [describe_position(place.label) for place in rule.circuit.places]
    for ablated in rule.circuit.edges.values():
        kept = [every - {*own} if all_but else {*own} for own in ablated]
        circuits.append({})
        for edge in rule.circuit.every:
            classes = {
                own for own, here in zip(rule.circuit.classes, kept, strict=True) if edge in here
            }
            if classes == {*rule.circuit.classes}:
                circuits[-1][named(edge)] = [EVERY]
            elif classes:
                at = [n for n in range(len(labels)) if classes.issuperset(_with(rule, n))]
                assert classes == {c for n in at for c in _with(rule, n)}
                circuits[-1][named(edge)] = [labels[n] for n in _drop_nested(rule, at)]
    return circuits, found.control.said


def _with(rule: ResolvedRule, place: int) -> list[frozenset[int]]:
    assert rule.circuit is not None
    return [own for own in rule.circuit.classes if place in own]


def _drop_nested(rule: ResolvedRule, places: Sequence[int]) -> list[int]:
    """Without positions that are contained in others of them."""
    return [n for n in places if not any({*_with(rule, n)} < {*_with(rule, o)} for o in places)]


@pytest.mark.parametrize("key", DRAWN)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_circuits_have_as_many_edges_at_each_position_on_paths_between_tokens(
    data: Path, name: str, key: str
) -> None:
    """The reference follows single tokens of each row."""
    circuit, rule, connected = DRAWN[key]
    lines = ("from other into clean", rule, "against random(16)")
    drawn, said = list_drawn(circuit + experiment("e", *lines), data, name)
    written = [each.strip() for each in circuit.removeprefix("circuit c = ").split(",\n")]
    parts = [part.strip() for each in written for part in _split(each)]
    own = {_edge(part): [part.partition(" at ")[2] or EVERY] for part in parts}
    assert len(drawn) == 16
    assert len({str(sorted(each.items())) for each in drawn}) == 16
    assert all(count_at_tokens(each) == count_at_tokens(own) for each in drawn)
    assert is_on_paths(name, own, rule) == connected
    if connected:
        assert all(is_on_paths(name, each, rule) for each in drawn)
    else:
        assert not all(is_on_paths(name, each, rule) for each in drawn)
    path = ", each on a path from `embed` to `logits` through tokens at its positions"
    size = f"of {len(parts)} edges at positions, the same number at each position"
    size += path if connected else ""
    assert said == f"random circuits, 16 draws, seed 0; {size}, at the same tokens"
    draw_circuits.cache_clear()
    assert list_drawn(circuit + experiment("e", *lines), data, name)[0] == drawn
    other = list_drawn("seed 1\n" + circuit + experiment("e", *lines), data, name)[0]
    assert other != drawn


EARLY = "circuit c = embed -> L0H1.v, embed -> L1H0.k, L0H1 -> L1.mlp, L1.mlp -> L2H0.v\n"
"""Edges with effects at tokens where nothing reads logits: values and keys lead to later tokens."""
WRITTEN = {
    "one": (EARLY, "cue token", True),
    "two": (EARLY, "{token 1, cue token}", True),
    "last": (EARLY, "{cue token, last token}", False),
    "logits": ("circuit c = embed -> L0H1.v, L0H1 -> logits\n", "cue token", False),
}


@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_circuits_at_early_tokens_lead_on_by_keys_and_values(
    data: Path, name: str, key: str
) -> None:
    circuit, at, early = WRITTEN[key]
    rule = f"ablate all but c at {at} with other"
    text = circuit + experiment("e", "from other into clean", rule, "against random(16)")
    drawn, said = list_drawn(text, data, name)
    circuits = [{edge: [at] for edge in own} for own in drawn]
    assert len({str(sorted(own)) for own in circuits}) == 16
    own = {_edge(part.strip()): [at] for part in circuit.removeprefix("circuit c = ").split(",")}
    assert all(len(each) == len(own) for each in circuits)
    assert is_on_paths(name, own, rule) == early
    path = ", each on a path from `embed` to `logits` through keys or values that later tokens read"
    size = f"random circuits, 16 draws, seed 0; of {len(own)} edges"
    assert said == f"{size}{path if early else ''}, at the same tokens"
    if early:
        assert all(is_on_paths(name, each, rule) for each in circuits)


def count_at_tokens(circuit: Mapping[Edge, Sequence[str]]) -> Counter[tuple[int, int]]:
    """The number of edges at each token of each row."""
    return Counter(
        (n, token)
        for n, text in enumerate(rows())
        for places in circuit.values()
        for token in {token for at in places for token in tokens(text, at)}
    )


def _split(text: str) -> list[str]:
    """The edges of a list, whose positions may have commas in braces."""
    return re.split(r",\s+(?![^{]*\})", text)


def _edge(part: str) -> Edge:
    sender, receiver = part.partition(" at ")[0].split(" -> ")
    return sender, receiver


def test_control_ablates_random_circuits_at_their_positions(data: Path) -> None:
    name, lines = "gpt2", ("ablate all but c at tokens * with other", "against random(3)")
    text = "circuit c = embed -> L0H1.v at subject tokens, L0H1 -> L1.mlp at last token, "
    text += "L1.mlp -> logits at last token, embed -> logits\n"
    text += experiment("e", "from other into clean", *lines)
    found = run_file(text, data, name, "planned", precise=True)["e"]
    effects: list[float] = []
    for own in list_drawn(text, data, name)[0]:
        placed = [
            {edge: {t for at in places for t in tokens(row, at)} for edge, places in own.items()}
            for row in rows()
        ]
        value = mean_with(name, placed, all_but=True)
        effects.append(value - float(np.mean(unpatched(name))))
    band = found.control(0)
    assert band is not None
    assert (float(band.low[0]), float(band.high[0])) == pytest.approx((min(effects), max(effects)))
    assert len(effects) == 3
    assert np.ptp(effects) > 1e-3
    assert found.conventions["controls"] == (
        "random circuits, 3 draws, seed 0; of 4 edges at positions, the same number at each "
        "position, each on a path from `embed` to `logits` through tokens at its positions, at the "
        "same tokens"
    )


def test_draws_at_nested_positions_have_no_edge_at_both(data: Path) -> None:
    """An edge at a token of its other position would be one edge less."""
    count = len(list_edges(shape_of("gpt2"))) // 2
    every = [f"{of} -> {to}" for of, to in map(named, list_edges(shape_of("gpt2")))]
    parts = [f"{edge} at last token" for edge in every[:count]]
    parts += [f"{edge} at {SOME}" for edge in every[count : count + count // 2]]
    parts += every[count + count // 2 :: 3]
    lines = ("ablate all but c at tokens * with other", "against random(5)")
    text = f"circuit c = {', '.join(parts)}\n" + experiment("e", "from other into clean", *lines)
    drawn, _ = list_drawn(text, data, "gpt2")
    own = {_edge(part): [part.partition(" at ")[2] or EVERY] for part in parts}
    assert len(drawn) == 5
    assert all(count_at_tokens(each) == count_at_tokens(own) for each in drawn)


def test_convention_of_positions_names_only_edges_that_have_them(data: Path) -> None:
    both = "embed -> L0H1.q at last token, embed -> L0H1.q"
    text = f"circuit c = {both}, L0H1 -> logits at tokens *\ncircuit d = {both}\n"
    text += "".join(
        experiment(f"of_{name}", f"ablate {name} at tokens * with zero") for name in "cd"
    )
    found = run_file(text, data, "gpt2", "planned")
    positions = found["of_c"].conventions["positions of edges"]
    assert positions.startswith("1 of 2 edges at positions: `tokens *`; ")
    assert "positions of edges" not in found["of_d"].conventions


def test_table_graph_and_document_show_the_positions_of_edges(data: Path) -> None:
    text = "circuit c = embed -> L0H1.q at last token, embed -> L0H1.q at token 1, L0H1 -> logits\n"
    rule = "ablate all but c at tokens * with zero"
    found = run_file(text + experiment("e", rule), data, "gpt2", "planned")["e"]
    assert found.circuit is not None
    assert found.circuit.places == ("last token and token 1", "")
    total = len(list_edges(shape_of("gpt2")))
    convention = found.conventions["circuit"]
    assert convention.startswith(f"`all but c`: {total - 2} to {total - 1} of {total} edges")
    positions = found.conventions["positions of edges"]
    assert positions.startswith("1 of 2 edges at positions: `last token`, `token 1`; ")
    edges_of = [edge.text for edge in draw_edges(found.circuit, None)]
    assert edges_of == ["embed -> L0H1.q at last token and token 1", "L0H1 -> logits"]


# --- errors and keys ------------------------------------------------------------------------------

C = "circuit c = embed -> L0H1.q at last token, L0H1 -> logits at last token\n"
WRONG = {
    "each item token": "E0304",
    "token 1, 2": "E0101",
    "item 3 token": "E0309",  # rows with two items lack it
    "token n": "E0322",
    "tokens * and answer": "E0108",
    "top 2 of e tokens": "E0108",
    "nothing token": "E0308",
}


@pytest.mark.parametrize("at", WRONG)
def test_positions_that_edges_cannot_have_are_errors(data: Path, at: str) -> None:
    text = f"circuit c = embed -> L0H1.q at {at}\n"
    assert codes(text + experiment("e", "ablate c at tokens * with zero"), data) == [WRONG[at]]


WRONG_RULES = {
    "ablate c at token 1 with zero": ("E0207", "ablates no edge at `token 1`"),
    "ablate c at tokens * with zero generate 3": ("E0108", "`generate`"),
    "run r { ablate c at last token with zero } from r into clean patch L0H1 at token 1": (
        "E0108",
        "an ablated circuit in a `run`",
    ),
    "ablate top 1 of c at tokens * with zero": ("E0207", "without scores"),
}


@pytest.mark.parametrize("lines", WRONG_RULES)
def test_rules_that_circuits_with_positions_do_not_support_are_errors(
    data: Path, lines: str
) -> None:
    code, message = WRONG_RULES[lines]
    problems = try_file(C + experiment("e", lines), data, "llama")[1]
    errors = [each for each in problems if each.severity == "error"]
    assert [(each.code, message in each.message) for each in errors] == [(code, True)]


def test_edge_auroc_of_circuits_with_positions_is_an_error(data: Path) -> None:
    for own in ("c with d", "d with c"):
        text = f"{C}circuit d = embed -> logits\n"
        text += f"experiment e {{ model m prompts p observe edge_auroc {own} as shared }}\n"
        (problem,) = (each for each in try_file(text, data, "llama")[1] if each.code == "E0108")
        assert "whose edges have positions" in problem.message


def test_variable_of_a_loop_in_the_position_of_an_edge_is_an_error(data: Path) -> None:
    text = "circuit c = embed -> L0H1.q at token i\n"
    rule = "for i in 1..2 { ablate c at token i with zero }"
    (problem,) = try_file(text + experiment("e", rule), data, "llama")[1]
    assert problem.code == "E0322"
    assert "`i`" in problem.message
    assert problem.help_text == "write a number, or define it: `param i = 1`"


def test_rule_without_edges_at_its_tokens_is_no_error_without_the_tokenizer(data: Path) -> None:
    """Tokens are placeholders, and `token 1` may be in `name`."""
    text = """mech 1
model m = hf("no/such-model")
prompts p {
  name in ["Anna", "Robert"]
  template "Yesterday {name} went"
  answer " to"
}
circuit c = embed -> L0H2.q at name token, L1H1 -> logits at last token
experiment q { model m prompts p ablate c at token 1 with zero measure loss as raw }
"""
    found = check_source(Source(text, data / "file.mech")).diagnostics
    assert not [each for each in found if each.severity == "error"]


def test_param_in_the_position_of_an_edge_has_its_value(data: Path) -> None:
    text = "param n = 2\ncircuit c = embed -> L0H1.v at token n\n"
    text += "circuit d = embed -> L0H1.v at token 2\n"
    each = (experiment(f"x{key}", f"ablate {key} at tokens * with zero") for key in "cd")
    found = run_file(text + "".join(each), data, "llama", "planned")
    first, second = (found[key].measures[0].patched for key in ("xc", "xd"))
    np.testing.assert_array_equal(first, second)


CHANGES = {
    "place": ("at last token,", "at token 1,"),
    "edge with a place": ("L0H1.v at", "L0H0.v at"),
    "no place": (" at last token,", ","),
    "other edge": ("L0H1.v at last token, L0H2 -> logits", "L0H1.v, L0H2 -> logits at last token"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stored_values_depend_on_positions_of_edges(tmp_path: Path, change: str) -> None:
    circuit = "circuit c = embed -> L0H1.v at last token, L0H2 -> logits\n"
    check_stored_values(circuit, CHANGES[change], tmp_path, 1e-6)
