"""Ablated circuits in one experiment with other rules, against passes that compute the input of
every receiver, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.execute.patching import rows as patched_rows
from mechdsl.forward.packed.packed_pass import PackedResult, run_packed
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import DIFFERENCE
from ..quick import in_turn
from ..reference.forward import stack
from .circuits import circuit_pass, outputs, reads
from .models import double
from .support import (
    QUICK,
    Text,
    difference,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)
from .test_ablated_circuits import key_heads

FAMILIES = ("llama", "gpt2", "gpt_neox")
LAST = "last token"
EDGES = [
    ("embed", "L0H1.q"),
    ("L0H1", "L1H0.k"),
    ("L0H1", "L1H1.q"),
    ("embed", "L1.mlp"),
    ("L0.mlp", "logits"),
    ("L1H0", "logits"),
    ("L0H2", "L2.mlp"),
]
CIRCUIT = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in EDGES)}\n"


@dataclass(frozen=True)
class Case:
    """An experiment of a circuit and a path."""

    circuit: str
    fill: str
    at: str
    sender: str
    to: str = "logits"
    mlps: bool = False

    @property
    def lines(self) -> tuple[str, str]:
        through = " through mlps" if self.mlps else ""
        written = self.sender.replace(".mlp", "N*") if ".mlp" in self.sender else self.sender
        of = f"mlp_out layer {self.sender[1]}" if ".mlp" in self.sender else written
        return (
            f"ablate {self.circuit} at {self.at} with {self.fill}",
            f"path {of} -> {self.to} at {LAST}{through}",
        )


CASES = {
    "logits_zero": Case("c", "zero", LAST, "L0H1"),
    "logits_other": Case("c", "other", "tokens *", "L0H1"),
    "logits_all_but": Case("all but c", "other", LAST, "L1H0"),
    "logits_mlps": Case("c", "other", "tokens *", "L0H1", mlps=True),
    "query": Case("c", "zero", "tokens *", "L0H1", "q layer 1 heads *"),
    "query_through_mlps": Case("c", "zero", "cue token", "L0H1", "q layer 2 heads *", mlps=True),
    "key_of_a_receiver": Case("c", "zero", "tokens *", "L0H1", "k layer 1 heads 0"),
    "mlp": Case("c", "other", "tokens *", "L0H1", "mlp_norm layer 2"),
    "mlp_next_to_zeros": Case("c", "zero", LAST, "L0H1", "mlp_norm layer 1"),
    "stream": Case("c", "other", "tokens *", "L0H1", "resid_pre layer 2"),
    "value_all_but": Case("all but c", "zero", "tokens *", "L0.mlp", "v layer 2 heads *"),
}


def circuit_of(name: str, case: Case) -> frozenset[tuple[str, str]]:
    parts = stack(name, double(name))
    senders = reads(parts, key_heads(name), parallel=parts.parallel)
    every = frozenset((of, to) for to, before in senders.items() for of in before)
    return every - {*EDGES} if case.circuit != "c" else frozenset(EDGES)


def fill_of(name: str, case: Case, n: int) -> dict[str, Tensor]:
    given = outputs(plain(name, rows("other")[n]), stack(name, double(name)))
    if case.fill == "zero":
        return {of: torch.zeros_like(value) for of, value in given.items()}
    return given


def once(
    name: str, case: Case, n: int, held: Mapping[str, Tensor], *, circuit: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    text, seen = rows()[n], dict[str, Tensor]()
    ablated = circuit_of(name, case) if circuit else frozenset[tuple[str, str]]()
    at = tokens(text, case.at)
    fill = fill_of(name, case, n)
    model = double(name)
    logits = circuit_pass(name, model, text.ids, fill, ablated, at, held=held, record=seen)
    return logits, seen


def only_at(value: Tensor, like: Tensor, places: list[int]) -> Tensor:
    """NaN, but these tokens of a value."""
    found = torch.full_like(like, torch.nan)
    found[places] = value[places]
    return found


def receivers(name: str, written: str) -> list[str]:
    """What the last pass takes from the pass with the sender; an MLP gives its output."""
    words = written.split()
    match words:
        case ["logits"]:
            return []
        case ["mlp_norm", _, layer]:
            return [f"L{layer}.mlp"]
        case ["resid_pre", _, layer]:
            return [f"resid_pre {layer}"]
        case [letter, _, layer, _, which]:
            count = key_heads(name) if letter in "kv" else 4
            return [f"L{layer}H{h}.{letter}" for h in range(count) if which in ("*", str(h))]
        case _:
            raise ValueError(written)


def expected(name: str, case: Case, *, circuit_held: bool = True) -> list[float]:
    """circuit_held: whether the circuit acts in the pass that provides held values."""
    found: list[float] = []
    for n, record in enumerate(records()):
        text: Text = rows()[n]
        at = tokens(text, LAST)
        _, base = once(name, case, n, {}, circuit=circuit_held)
        heads = {key for key in base if "H" in key and "." not in key}
        mlps = {key for key in base if key.endswith(".mlp")}
        held = {key: base[key] for key in (heads if case.mlps else heads | mlps)}
        source = outputs(plain(name, rows("other")[n]), stack(name, double(name)))
        sent = base[case.sender].clone()
        sent[at] = source[case.sender][at]
        held[case.sender] = sent
        got = receivers(name, case.to)
        logits, seen = once(name, case, n, {k: v for k, v in held.items() if k not in got})
        if got:
            written = {key: only_at(seen[key], seen[key], at) for key in got}
            logits, _ = once(name, case, n, written)
        found.append(difference(logits, record))
    return found


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = CIRCUIT
    for key, case in CASES.items():
        text += experiment(key, "from other into clean", *case.lines)
    return run_file(text, data, name, mode, precise=True)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
def test_path_with_a_circuit_holds_components_at_the_run_with_the_circuit(
    data: Path, name: str, mode: str, key: str
) -> None:
    found = results(data, name, mode)[key].measures[0]
    values = expected(name, CASES[key])
    np.testing.assert_allclose(found.base[0], unpatched(name), atol=1e-5)
    np.testing.assert_allclose(found.patched[0], values, atol=1e-5, rtol=1e-4)


OTHER, ZERO = "ablate c at last token with other", "ablate c at last token with zero"
PACKED = {
    "one_circuit": ([OTHER], DIFFERENCE, LAST),
    "all_but_a_circuit": (["ablate all but c at last token with zero"], DIFFERENCE, LAST),
    "later_write": ([OTHER, "ablate L2H3 at last token with zero"], DIFFERENCE, LAST),
    "earlier_write": ([OTHER, "ablate L1H3 at cue token with zero"], DIFFERENCE, "cue token"),
    "attention": (
        [OTHER, "block attention layer 2 head 0 from last token to cue token"],
        DIFFERENCE,
        LAST,
    ),
    "earlier_read": (
        [ZERO],
        f"{DIFFERENCE}\n  measure cosine(resid_post layer 0, other) at cue token as raw",
        "cue token",
    ),
    "two_tokens": (["ablate c at {cue token, last token} with other"], DIFFERENCE, "cue token"),
    "no_circuit": (["ablate L2H1 at last token with zero"], DIFFERENCE, LAST),
}
"""Rules, measures and the first token that rows compute."""


@pytest.fixture
def packed_work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The number of tokens that each packed pass computes in each block."""
    found: list[tuple[int, ...]] = []

    def spy(*given: Any, **options: Any) -> PackedResult:
        result = run_packed(*given, **options)
        found.append(result.work)
        return result

    monkeypatch.setattr(patched_rows, "run_packed", spy)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_packed_rows_of_circuits_compute_all_blocks_from_their_first_token(
    data: Path, packed_work: list[tuple[int, ...]], name: str
) -> None:
    """Their values are those of padded passes. Rows without circuits have separate passes, in which
    they start at their lowest write."""
    text = CIRCUIT
    for key, (rules, measure, _) in PACKED.items():
        text += experiment(key, "from other into clean", *rules, measure=measure)
    found = run_file(text, data, name, "planned", precise=True)
    starts = [first for key, (_, _, first) in PACKED.items() if key != "no_circuit"]
    count = sum(len(each.ids) - tokens(each, first)[0] for each in rows() for first in starts)
    without_circuits, *others = sorted(packed_work)
    assert without_circuits == (0, 0, 4)
    assert [sum(own) for own in zip(*others, strict=True)] == [count] * 3
    del packed_work[:]
    whole = run_file(text, data, name, "plain", precise=True)
    assert not packed_work
    for key in PACKED:
        for one, other in zip(found[key].measures, whole[key].measures, strict=True):
            np.testing.assert_allclose(one.patched, other.patched, atol=1e-9, err_msg=key)


def test_circuit_changes_the_held_values_of_each_reference() -> None:
    """Otherwise, the comparison above couldn't distinguish them."""
    for name in ("llama", "gpt2"):
        for key in (key for key in CASES if key not in ("key_of_a_receiver", "value_all_but")):
            without = np.array(expected(name, CASES[key], circuit_held=False))
            assert np.abs(without - expected(name, CASES[key])).max() > 1e-2, (name, key)


def test_path_to_an_mlp_without_its_own_norm_reads_what_the_circuit_gives(data: Path) -> None:
    """In Phi, attention and MLP read one norm; the neurons read what the MLP reads."""
    text = CIRCUIT
    for key, to in {"input": "mlp_norm layer 1", "neurons": "mlp_hidden layer 1 neurons *"}.items():
        path = f"path L0H1 -> {to} at {LAST}"
        rule = f"ablate c at {LAST} with zero"
        text += experiment(key, "from other into clean", rule, path)
    found = run_file(text, data, "phi", "planned", precise=True)
    values = [found[key].measures[0].patched[0] for key in ("input", "neurons")]
    np.testing.assert_allclose(*values, atol=1e-5, rtol=1e-4)


FEW = "circuit few = embed -> L0H1.v, L0H1 -> logits, L1.mlp -> logits, L2H1 -> logits\n"
SHIFT = "set resid_post layer 0 at last token to 0.5"


@cache
def all_but_few(data: Path, name: str) -> dict[str, ExperimentResult]:
    rule = f"ablate all but few at {LAST} with zero"
    text = FEW + experiment("zeros", rule) + experiment("shifted", rule, SHIFT)
    return {
        **run_file(text, data, name, "planned"),
        "precise": run_file(text, data, name, "planned", precise=True)["shifted"],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_receivers_without_kept_senders_read_biases_alone(data: Path, name: str) -> None:
    """In 32 bits; the stream minus all senders would be noise, which norms amplify."""
    parts = stack(name, double(name))
    senders = reads(parts, key_heads(name), parallel=parts.parallel)
    kept = {("embed", "L0H1.v"), *((of, "logits") for of in ("L0H1", "L1.mlp", "L2H1"))}
    ablated = frozenset((of, to) for to, own in senders.items() for of in own) - kept
    values: list[float] = []
    for n, record in enumerate(records()):
        text = rows()[n]
        zeros = fill_of(name, Case("c", "zero", LAST, ""), n)
        at = tokens(text, LAST)
        logits = circuit_pass(name, double(name), text.ids, zeros, ablated, at)
        values.append(difference(logits, record))
    found = all_but_few(data, name)["zeros"].measures[0].patched[0]
    np.testing.assert_allclose(found, values, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("edges", "at"),
    [("L1.mlp -> logits", LAST), ("embed -> L0H1.v, L1.mlp -> logits", "tokens *")],
)
def test_components_that_read_nothing_give_exact_zeros(data: Path, edges: str, at: str) -> None:
    """Mistral has no biases, so that every number is 0 in exact arithmetic."""
    text = f"circuit c = {edges}\n" + experiment("e", f"ablate all but c at {at} with zero")
    found = run_file(text, data, "mistral", "planned")["e"].measures[0].patched
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("name", FAMILIES)
def test_write_to_the_stream_stays_in_receivers_without_kept_senders(data: Path, name: str) -> None:
    found = all_but_few(data, name)
    values, zeros = (found[key].measures[0].patched[0] for key in ("shifted", "zeros"))
    np.testing.assert_allclose(
        values, found["precise"].measures[0].patched[0], atol=1e-3, rtol=1e-3
    )
    assert np.abs(values - zeros).max() > 1e-2


WRONG = {
    "path L0H1 -> attn_norm layer 1 at last token": "a path to `attn_norm`",
    "path L0H1 -> logits at last token with frozen norms": "`with frozen norms`",
    "path L0H1 -> q layer 1 head 1 at last token with frozen norms": "`with frozen norms`",
}


@pytest.mark.parametrize("line", WRONG)
def test_paths_that_circuits_do_not_support_are_errors(data: Path, line: str) -> None:
    lines = "from other into clean", "ablate c at last token with zero", line
    result, problems = try_file(CIRCUIT + experiment("e", *lines), data, "llama")
    assert result is None
    assert [problem.code for problem in problems] == ["E0108"]
    assert problems[0].message.startswith(f"{WRONG[line]} together with a circuit")
