"""Paths that start at features of dictionaries, against plain hooks on the bare model, one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full

from .circuits import Features
from .models import double
from .support import MODES, difference, experiment, records, rows, run_file, tokens, try_file
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
    Edits,
    End,
    OtherRules,
    Tap,
    cells,
    copied,
)
from .test_transcoders import CROSS_HOOKS, encode_across, make_cross_layer

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
        """The SAE `f`, the transcoder `t`, the SAE of attention `a` or the cross-layer transcoder
        `c`."""
        named = (name for name in "tac" if f" of {name} " in self.written)
        return next(named, "f")

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
    "attention_to_query": Case("feature 3 of a -> q layer 2 heads *", [([3], QUERIES)]),
    "attention_sweep_to_logits": Case("feature * of a -> logits", SWEEP),
    "attention_joined": Case(
        "features 0..6 of a -> attn_norm layer 2",
        [(range(7), [("attn_norm", 2, None)])], "cue token",
    ),
    "attention_through_mlps": Case(
        "features 0..6 of a -> logits", [(range(7), LOGITS)], more="through mlps"
    ),
    "attention_with_frozen_norms": Case(
        "feature 0..3 of a -> logits", SWEEP[:4], more="with frozen norms"
    ),
    "attention_to_query_and_end": Case(
        "features 0..6 of a -> both", [(range(7), [*QUERIES, *LOGITS])]
    ),
    "attention_after_scaled_mlps": Case(
        "features 0..6 of a -> logits", [(range(7), LOGITS)],
        other_rules=OTHERS["held_mlps"], first=True,
    ),
    "cross_layer_to_query": Case(
        "features 2..4 of c -> q layer 2 heads *", [([2, 3, 4], QUERIES)]
    ),
    "cross_layer_sweep_to_logits": Case("feature * of c -> logits", SWEEP),
    "cross_layer_joined": Case(
        "features 0..6 of c -> resid_pre layer 2",
        [(range(7), [("resid_pre", 2, None)])], "cue token",
    ),
    "cross_layer_through_mlps": Case(
        "features 0..6 of c -> logits", [(range(7), LOGITS)], more="through mlps"
    ),
    "cross_layer_with_frozen_norms": Case(
        "feature 0..3 of c -> logits", SWEEP[:4], more="with frozen norms"
    ),
    "cross_layer_to_query_and_end": Case(
        "features 0..6 of c -> both", [(range(7), [*QUERIES, *LOGITS])]
    ),
    "cross_layer_then_scaled_mlps": Case(
        "features 0..6 of c -> logits", [(range(7), LOGITS)], other_rules=OTHERS["held_mlps"]
    ),
    "cross_layer_with_scaled_norm": Case(
        "features 0..6 of c -> q layer 2 heads *",
        [(range(7), QUERIES)], other_rules=OTHERS["a_norm"],
    ),
}  # fmt: skip
GROUP = "group both = q layer 2 heads *, logits\n"


def definitions(name: str, kind: str) -> str:
    return (
        f'basis f = sae("{name}_{kind}/sae") at mlp_out layer {LAYER}\n'
        f'basis t = transcoder("{name}_{kind}/of_mlp") at mlp_out layer {LAYER}\n'
        f'basis a = sae("{name}_{kind}/sae") at attn_out layer {LAYER}\n'
        f'basis c = transcoder("{name}_{kind}/clt") at mlp_out layer {LAYER}\n'
    )


@dataclass(frozen=True)
class Across:
    """Features of a cross-layer transcoder, as they write to a layer."""

    parts: dict[str, Tensor]
    distance: int

    def encode(self, x: Tensor) -> Tensor:
        return encode_across(self.parts, x)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        return features @ self.parts["W_dec"][:, self.distance]


Sending = Mapping[Tap, Features]
"""Where features of a basis send."""


def dictionaries(data: Path, name: str, kind: str) -> dict[str, Sending]:
    """Write the dictionaries of a model."""
    first, second = write_dictionaries(data, name, kind)
    width = double(name).config.hidden_size
    parts = make_cross_layer(data / f"{name}_{kind}", width, CROSS_HOOKS["mlp_norm"], len(LAYERS))
    across = {
        ("mlp_out", LAYER + n): Features(Across(parts[LAYER], n), {}, "mlp_norm") for n in range(2)
    }
    return {
        "f": {("mlp_out", LAYER): Features(first, {})},
        "t": {("mlp_out", LAYER): Features(second, {}, "mlp_norm")},
        "a": {("attn_out", LAYER): Features(first, {}, "attn_out")},
        "c": across,
    }


def read_by(own: Features, model: Call, source: Call, rules: Edits) -> tuple[Tensor, Tensor]:
    """What a dictionary encodes in the base run, with other rules, and in the source run."""
    after = model.before[own.reads, LAYER].clone()
    for tap, change in rules:
        after = change(after) if tap == (own.reads, LAYER) else after
    return after[:, 0], source.before[own.reads, LAYER][:, 0]


def send_features(
    now: Tensor, *, of: Features, site: str, spots: tuple[Sequence[int], Sequence[int]],
    which: Sequence[int], share: float | Tensor, read: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Add a share of the change of features to a site; `spots` are tokens of both runs."""
    here, there = spots
    x = now[here, 0] if of.reads == site else read[0][here]
    features = of.of.encode(x)
    changed = features.clone()
    changed[:, which] = of.of.encode(read[1][there])[:, which]
    now[here, 0] += share * (of.of.decode(changed, x) - of.of.decode(features, x))
    return now


def patched(
    name: str, key: str, own: Sending, cell: tuple[Sequence[int], Sequence[End]], n: int, *,
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
    sent = [
        (tap, partial(send_features, of=each, site=tap[0], spots=(here, there), which=which,
                      share=share, read=read_by(each, model, of, rules)))
        for tap, each in own.items()
    ]  # fmt: skip
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
    assert len(without) <= most, [(key, moved[key]) for key in without]


@pytest.mark.parametrize(
    ("rule", "code", "reason"),
    [
        ("path feature 3 of r -> logits", "E0342", "describes `resid_post`"),
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
    text += "basis q = pca(p, dims: 3) at resid_post layer 0 at last token\n"
    text += experiment("e", "from longer into clean", f"{rule} at last token")
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    found = [each for each in diagnostics if each.code == code]
    assert reason in render_full(found), [each.code for each in diagnostics]
