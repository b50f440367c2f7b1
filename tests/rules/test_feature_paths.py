"""Paths that start at features of dictionaries, against plain hooks on the bare model, one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full

from .circuits import Features
from .support import (
    MODES,
    difference,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
)
from .test_feature_circuits import write_dictionaries
from .test_joint_paths import (
    FAMILIES,
    HEADS,
    LAYERS,
    LOGITS,
    NOTHING,
    OTHERS,
    Call,
    Change,
    End,
    OtherRules,
    Tap,
    cells,
    copied,
)

FEATURES = 12
"""Features of each dictionary."""
KINDS = ("standard", "topk", "layer_norm", "jumprelu")
"""Architectures of the SAE."""
LAYER = 1
"""The layer of the SAE and of the transcoder."""
LAST = max(LAYERS)


@dataclass(frozen=True)
class Case:
    written: str
    cells: Sequence[tuple[Sequence[int], Sequence[End]]]
    """The features that send and the receivers, in the order of the cells."""
    at: str = "last token"
    more: str = ""
    other_rules: OtherRules = NOTHING
    first: bool = False
    """Whether the other rules precede the path."""

    @property
    def basis(self) -> str:
        """The transcoder `t` or the SAE `f`."""
        return "t" if " of t " in self.written else "f"

    @property
    def lines(self) -> tuple[str, ...]:
        rule = f"path {self.written} at {self.at} {self.more}"
        both = (self.other_rules.written, rule)
        return tuple(line for line in (both if self.first else both[::-1]) if line)


QUERIES: list[End] = [("q", 2, head) for head in range(HEADS)]
SWEEP = [([number], LOGITS) for number in range(FEATURES)]
CASES = {
    "sae_to_query": Case("feature 3 of f -> q layer 2 heads *", [([3], QUERIES)]),
    "sae_sweep_to_logits": Case("feature * of f -> logits", SWEEP),
    "sae_with_site": Case(
        "mlp_out layer 1 feature 5 of f -> attn_norm layer 2",
        [([5], [("attn_norm", 2, None)])], "cue token",
    ),
    "sae_joined": Case(
        "features 3, 5, 7 of f -> resid_pre layer 2", [([3, 5, 7], [("resid_pre", 2, None)])]
    ),
    "sae_whole_basis": Case(
        "mlp_out layer 1 in basis f -> logits", [(range(FEATURES), LOGITS)]
    ),
    "sae_sweep_of_both_ends": Case(
        "feature 3, 5 of f -> q layer 2 head *",
        [([number], [to]) for to in QUERIES for number in (3, 5)],
    ),
    "sae_through_mlps": Case(
        "features 0..6 of f -> logits", [(range(7), LOGITS)], more="through mlps"
    ),
    "sae_to_neurons": Case(
        "features 0..6 of f -> mlp_hidden layer 2 neurons 0..23",
        [(range(7), [("mlp_hidden", 2, unit) for unit in range(24)])],
    ),
    "sae_to_query_and_end": Case(
        "features 0..6 of f -> both", [(range(7), [*QUERIES, *LOGITS])]
    ),
    "sae_then_scaled_mlps": Case(
        "feature 0..3 of f -> logits", SWEEP[:4], other_rules=OTHERS["held_mlps"]
    ),
    "sae_after_scaled_mlps": Case(
        "features 0..6 of f -> logits", [(range(7), LOGITS)],
        other_rules=OTHERS["held_mlps"], first=True,
    ),
    "sae_with_scaled_stream": Case(
        "features 0..6 of f -> q layer 2 heads *",
        [(range(7), QUERIES)], other_rules=OTHERS["the_stream"],
    ),
    "transcoder_to_logits": Case("feature 3..6 of t -> logits", SWEEP[3:7]),
    "transcoder_to_norm": Case(
        "features 0..6 of t -> attn_norm layer 2",
        [(range(7), [("attn_norm", 2, None)])], "cue token",
    ),
    "transcoder_with_frozen_norms": Case(
        "feature 0..3 of t -> logits",
        SWEEP[:4], more="with frozen norms",
    ),
    "transcoder_through_mlps": Case(
        "features 0..6 of t -> logits", [(range(7), LOGITS)], more="through mlps"
    ),
    "transcoder_then_scaled_mlps": Case(
        "feature 0..3 of t -> logits", SWEEP[:4], other_rules=OTHERS["held_mlps"]
    ),
    "transcoder_with_scaled_norm": Case(
        "features 0..6 of t -> q layer 2 heads *",
        [(range(7), QUERIES)], other_rules=OTHERS["a_norm"],
    ),
    "transcoder_with_scaled_stream": Case(
        "feature 0..3 of t -> logits", SWEEP[:4], other_rules=OTHERS["the_stream"], first=True
    ),
}  # fmt: skip
GROUP = "group both = q layer 2 heads *, logits\n"


def definitions(name: str, kind: str) -> str:
    return (
        f'basis f = sae("{name}_{kind}/sae") at mlp_out layer {LAYER}\n'
        f'basis t = transcoder("{name}_{kind}/of_mlp") at mlp_out layer {LAYER}\n'
    )


def dictionaries(data: Path, name: str, kind: str) -> dict[str, Features]:
    """Write the dictionaries of a model."""
    first, second = write_dictionaries(data, name, kind)
    return {"f": Features(first, {}), "t": Features(second, {}, "mlp_norm")}


def patched(
    name: str, key: str, own: Features, cell: tuple[Sequence[int], Sequence[End]], n: int, *,
    share: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """[T, vocab] the logits of a row of one cell, with a share of the senders' change."""
    case = CASES[key]
    which, receivers = list(cell[0]), cell[1]
    base, source = rows()[n], rows("longer")[n]
    here, there = tokens(base, case.at), tokens(source, case.at)
    rules = case.other_rules.edits(name, base, n)
    model = unpatched_call(name, key if case.other_rules.written else None, "clean", n)
    of = unpatched_call(name, None, "longer", n)
    held: list[tuple[Tap, Change]] = []
    for layer in LAYERS:
        for site in ("z",) if "through mlps" in case.more else ("z", "mlp_out"):
            vectors = model.before[site, layer]
            held.append(((site, layer), lambda now, vectors=vectors: vectors))
    after = model.before[own.reads, LAYER].clone()
    for tap, change in rules:
        after = change(after) if tap == (own.reads, LAYER) else after
    given = of.before[own.reads, LAYER][there, 0]

    def send(now: Tensor) -> Tensor:
        x = now[here, 0] if own.reads == "mlp_out" else after[here, 0]
        features = own.of.encode(x)
        changed = features.clone()
        changed[:, which] = own.of.encode(given)[:, which]
        now[here, 0] += share * (own.of.decode(changed, x) - own.of.decode(features, x))
        return now

    sent: list[tuple[Tap, Change]] = [(("mlp_out", LAYER), send)]
    order = [*held, *rules, *sent] if case.first else [*held, *sent, *rules]
    frozen = model.normed if "frozen" in case.more else None
    sending = case.other_rules(name, base, order, frozen=frozen)
    inner = [end for end in receivers if end[0] != "logits"]
    if not inner:
        return sending.logits
    got: list[tuple[Tap, Change]] = [*copied(inner, sending, here, here), *rules]
    if len(inner) < len(receivers):
        gain = (sending.before["resid_post", LAST] - model.before["resid_post", LAST])[here]

        def add(now: Tensor) -> Tensor:
            now[here] += gain
            return now

        got.append((("resid_post", LAST), add))
    return case.other_rules(name, base, got).logits


@cache
def unpatched_call(name: str, key: str | None, block: str, n: int) -> Call:
    """A row of a run, with the other rules of a case."""
    rules = NOTHING if key is None else CASES[key].other_rules
    return rules(name, rows(block)[n], rules.edits(name, rows(block)[n], n))


EACH = [
    pytest.param(name, mode, kind, marks=() if number == 0 else pytest.mark.slow)
    for number, (name, mode, kind) in enumerate(product(FAMILIES, reversed(MODES), KINDS))
]


@pytest.mark.parametrize(("name", "mode", "kind"), EACH)
def test_paths_of_features_equal_plain_hooks(data: Path, name: str, mode: str, kind: str) -> None:
    own = dictionaries(data, name, kind)
    text = definitions(name, kind) + GROUP
    for key, case in CASES.items():
        text += experiment(key, "from longer into clean", *case.lines)
    found = run_file(text, data, name, mode, precise=True)
    moved: dict[str, float] = {}
    for key, case in CASES.items():
        values = np.array(
            [
                [
                    difference(patched(name, key, own[case.basis], cell, n), record)
                    for n, record in enumerate(records())
                ]
                for cell in case.cells
            ]
        )
        assert len(cells(found[key])) == len(case.cells), key
        np.testing.assert_allclose(cells(found[key]), values, atol=1e-6, rtol=1e-5, err_msg=key)
        moved[key] = float(np.abs(values - found[key].measures[0].base).max())
    without = [key for key, value in moved.items() if value < 1e-3]
    most = 0 if kind == "standard" else len(CASES) // 2  # some features of others are inactive
    assert len(without) <= most, without


@pytest.mark.parametrize(
    ("rule", "code", "reason"),
    [
        ("path feature 3 of r -> logits", "E0342", "describes `resid_post`"),
        ("path feature 3 of h -> logits", "E0342", "MLPs are held at `mlp_out`, attention at its"),
        ("path resid_post layer 0 in basis q -> logits", "E0342", "isn't a dictionary"),
        ("path mlp_out layer 1 dims 0..3 -> logits", "E0108", "`dims`"),
        ("path feature 3 of f -> mlp_norm layer 1", "E0335", "no path leads"),
        ("path feature 99 of f -> logits", "E0301", "does not exist"),
    ],
)
def test_path_that_cannot_start_at_features_is_an_error(
    data: Path, rule: str, code: str, reason: str
) -> None:
    dictionaries(data, "llama", "standard")
    text = definitions("llama", "standard")
    text += 'basis r = sae("llama_standard/sae") at resid_post layer 1\n'
    text += 'basis h = sae("llama_standard/sae") at attn_out layer 1\n'
    text += "basis q = pca(p, dims: 3) at resid_post layer 0 at last token\n"
    text += experiment("e", "from longer into clean", f"{rule} at last token")
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    found = [each for each in diagnostics if each.code == code]
    assert reason in render_full(found), [each.code for each in diagnostics]
