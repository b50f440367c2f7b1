"""Paths that end at features of dictionaries, against plain hooks on the bare model, one unpadded
prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full

from .circuits import Features
from .models import double
from .support import MODES, difference, experiment, records, rows, run_file, tokens, try_file
from .test_feature_circuits import write_dictionaries
from .test_feature_paths import Across
from .test_joint_paths import (
    FAMILIES,
    LAYERS,
    NOTHING,
    OTHERS,
    Call,
    Change,
    End,
    OtherRules,
    Tap,
    cells,
    copied,
    setting,
)
from .test_transcoders import CROSS_HOOKS, make_cross_layer

FEATURES = 12
"""Features of each dictionary."""
KINDS = ("standard", "topk", "layer_norm", "jumprelu")
"""Architectures of the autoencoders."""
BASES: dict[str, Tap] = {
    "f": ("mlp_out", 1),
    "t": ("mlp_out", 1),
    "g": ("mlp_out", 2),
    "u": ("mlp_out", 2),
    "post": ("resid_post", 1),
    "pre": ("resid_pre", 2),
    "mid": ("resid_mid", 1),
    "norm": ("mlp_norm", 1),
    "attn": ("attn_out", 2),
    "clt": ("mlp_out", 1),
}
"""The site of each basis."""
TRANSCODERS = ("t", "u", "clt")
PARALLEL = ("gpt_neox",)
"""Families whose blocks have no stream between the sublayers."""

Numbers = Sequence[int]


@dataclass(frozen=True)
class Case:
    written: str
    basis: str
    """The basis of the receivers."""
    cells: Sequence[tuple[Sequence[End] | Numbers, Numbers]]
    """The senders, or the features of `f` that send, and the receivers, in the order of cells."""
    at: str = "last token"
    more: str = ""
    other_rules: OtherRules = NOTHING
    first: bool = False
    """Whether the other rules precede the path."""
    sequential: bool = False
    """Whether no path leads there in parallel blocks."""

    @property
    def lines(self) -> tuple[str, ...]:
        rule = f"path {self.written} at {self.at} {self.more}"
        both = (self.other_rules.written, rule)
        return tuple(line for line in (both if self.first else both[::-1]) if line)


HEAD: Sequence[End] = [("z", 0, 1)]
MLP: Sequence[End] = [("mlp_out", 0, None)]
MANY = range(7)
ALL = range(FEATURES)
SCALED = OtherRules(
    "scale mlp_norm layer 1 at last token by 0.5",
    setting("mlp_norm", 1, [None], "last token", lambda x: 0.5 * x),
)
CASES = {
    "one": Case("z layer 0 head 1 -> feature 3 of f", "f", [(HEAD, [3])]),
    "sae_sweep": Case("z layer 0 head 1 -> feature * of f", "f", [(HEAD, [n]) for n in ALL]),
    "sae_joined": Case("mlp_out layer 0 -> features 0..6 of f", "f", [(MLP, MANY)], "cue token"),
    "sae_whole_basis": Case(
        "mlp_out layer 0 -> mlp_out layer 1 in basis f", "f", [(MLP, ALL)]
    ),
    "sae_of_its_layer": Case(
        "z layer 1 head 2 -> features 0..6 of f", "f", [([("z", 1, 2)], MANY)], sequential=True
    ),
    "sae_through_mlps": Case(
        "z layer 0 head 1 -> features 0..6 of g", "g", [(HEAD, MANY)], more="through mlps"
    ),
    "sae_with_frozen_norms": Case(
        "resid_pre layer 0 -> features 0..6 of g", "g", [([("resid_pre", 0, None)], MANY)],
        more="with frozen norms",
    ),
    "sae_from_neurons": Case(
        "mlp_hidden layer 0 neurons 0..23 -> features 0..6 of f", "f",
        [([("mlp_hidden", 0, n) for n in range(24)], MANY)],
    ),
    "sae_then_scaled_mlps": Case(
        "mlp_out layer 0 -> features 0..6 of g", "g", [(MLP, MANY)],
        other_rules=OTHERS["held_mlps"],
    ),
    "sae_after_scaled_mlps": Case(
        "mlp_out layer 0 -> features 0..6 of f", "f", [(MLP, MANY)],
        other_rules=OTHERS["held_mlps"], first=True,
    ),
    "sae_with_neurons": Case(
        "mlp_out layer 0 -> features 0..6 of f", "f", [(MLP, MANY)],
        other_rules=OTHERS["neurons"],
    ),
    "to_transcoder": Case("z layer 0 head * -> feature 3..6 of t", "t", [
        ([("z", 0, head)], [n]) for head in range(4) for n in range(3, 7)
    ]),
    "transcoder_joined": Case(
        "mlp_out layer 0 -> features 0..6 of t", "t", [(MLP, MANY)], "cue token"
    ),
    "transcoder_through_mlps": Case(
        "z layer 0 head 1 -> features 0..6 of u", "u", [(HEAD, MANY)], more="through mlps"
    ),
    "transcoder_with_frozen_norms": Case(
        "mlp_out layer 0 -> features 0..6 of t", "t", [(MLP, MANY)], more="with frozen norms"
    ),
    "transcoder_with_scaled_norm": Case(
        "mlp_out layer 0 -> features 0..6 of t", "t", [(MLP, MANY)], other_rules=SCALED
    ),
    "transcoder_with_scaled_stream": Case(
        "z layer 0 head 1 -> features 0..6 of t", "t", [(HEAD, MANY)],
        other_rules=OTHERS["the_stream"], first=True,
    ),
    "features_to_sae": Case(
        "feature 3, 5 of f -> feature 0..3 of g", "g",
        [([of], [to]) for to in range(4) for of in (3, 5)],
    ),
    "features_to_transcoder": Case(
        "features 0..6 of f -> feature * of u", "u", [(MANY, [n]) for n in ALL]
    ),
    "features_to_stream": Case(
        "features 0..6 of f -> features 0..6 of post", "post", [(MANY, MANY)]
    ),
    "features_to_transcoder_then_scaled_mlps": Case(
        "features 0..6 of f -> features 0..6 of u", "u", [(MANY, MANY)],
        other_rules=OTHERS["held_mlps"],
    ),
    "sae_from_neurons_of_layers": Case(
        "mlp_hidden layer 0..1 neuron 3 -> features 0..6 of f", "f",
        [([("mlp_hidden", 0, 3)], MANY)],
    ),
    "later_sae_from_neurons_of_layers": Case(
        "mlp_hidden layer 0..1 neuron 3 -> features 0..6 of g", "g",
        [([("mlp_hidden", layer, 3)], MANY) for layer in range(2)],
    ),
    "group_of_components_to_sae": Case(
        "several -> features 0..6 of f", "f",
        [([("z", 0, 1), ("mlp_out", 0, None), ("mlp_hidden", 0, 5)], MANY)],
    ),
    "group_of_features_to_group_of_features": Case(
        "sending -> receiving", "u", [([3, 5, 6], [2, 5, 6, 7])]
    ),
    "group_of_features": Case("z layer 0 head 1 -> sending", "f", [(HEAD, [3, 5, 6])]),
    "stream_after": Case("z layer 0 head 1 -> features 0..6 of post", "post", [(HEAD, MANY)]),
    "stream_after_its_mlp": Case(
        "mlp_out layer 1 -> feature 0..3 of post", "post",
        [([("mlp_out", 1, None)], [n]) for n in range(4)],
    ),
    "stream_before": Case(
        "mlp_out layer 0 -> features 0..6 of pre", "pre", [(MLP, MANY)], "cue token"
    ),
    "stream_between": Case(
        "z layer 1 head 2 -> features 0..6 of mid", "mid", [([("z", 1, 2)], MANY)],
        sequential=True,
    ),
    "to_norm": Case("mlp_out layer 0 -> feature 0..3 of norm", "norm", [
        (MLP, [n]) for n in range(4)
    ]),
    "attention_sweep": Case("z layer 0 head 1 -> feature * of attn", "attn", [
        (HEAD, [n]) for n in ALL
    ]),
    "attention_joined": Case(
        "mlp_out layer 1 -> features 0..6 of attn", "attn", [([("mlp_out", 1, None)], MANY)],
        "cue token",
    ),
    "attention_through_mlps": Case(
        "z layer 0 head 1 -> features 0..6 of attn", "attn", [(HEAD, MANY)], more="through mlps"
    ),
    "attention_from_swept_heads": Case(
        "z layer 0..1 head 1 -> features 0..6 of attn", "attn",
        [([("z", layer, 1)], MANY) for layer in range(2)],
    ),
    "attention_then_scaled_mlps": Case(
        "mlp_out layer 0 -> features 0..6 of attn", "attn", [(MLP, MANY)],
        other_rules=OTHERS["held_mlps"],
    ),
    "features_to_attention": Case(
        "feature 3, 5 of f -> feature 0..3 of attn", "attn",
        [([of], [to]) for to in range(4) for of in (3, 5)],
    ),
    "cross_layer_sweep": Case("z layer 0 head 1 -> feature * of clt", "clt", [
        (HEAD, [n]) for n in ALL
    ]),
    "cross_layer_joined": Case(
        "mlp_out layer 0 -> features 0..6 of clt", "clt", [(MLP, MANY)], "cue token"
    ),
    "cross_layer_through_mlps": Case(
        "z layer 0 head 1 -> features 0..6 of clt", "clt", [(HEAD, MANY)], more="through mlps"
    ),
    "cross_layer_with_scaled_norm": Case(
        "mlp_out layer 0 -> features 0..6 of clt", "clt", [(MLP, MANY)], other_rules=SCALED
    ),
}  # fmt: skip

GROUPS = """group several = L0H1, mlp_out layer 0, L0N5
group sending = features 3, 5..6 of f
group receiving = feature 2 of u, features 5..7 of u
group both = feature 3 of f, feature 2 of u
group mixed = L0H1, L1N3
"""


def cases(name: str) -> dict[str, Case]:
    return {key: case for key, case in CASES.items() if not (name in PARALLEL and case.sequential)}


def definitions(name: str, kind: str) -> str:
    return (
        "".join(
            f'basis {basis} = transcoder("{name}_{kind}/{"clt" if basis == "clt" else "of_mlp"}") '
            f"at {site} layer {layer}\n"
            if basis in TRANSCODERS
            else f'basis {basis} = sae("{name}_{kind}/sae") at {site} layer {layer}\n'
            for basis, (site, layer) in BASES.items()
            if not (name in PARALLEL and site == "resid_mid")
        )
        + GROUPS
    )


def dictionaries(data: Path, name: str, kind: str) -> dict[str, Features]:
    """Write the dictionaries of a model."""
    first, second = write_dictionaries(data, name, kind)
    width = double(name).config.hidden_size
    parts = make_cross_layer(data / f"{name}_{kind}", width, CROSS_HOOKS["mlp_norm"], len(LAYERS))
    across = [Features(Across(parts[1], n), {}, "mlp_norm") for n in range(2)]
    return {
        basis: Features(second, {}, "mlp_norm") if basis in TRANSCODERS
        else Features(first, {}, site)
        for basis, (site, _) in BASES.items()
    } | {"clt": across[0], "clt in the next layer": across[1]}  # fmt: skip


@cache
def unpatched_call(name: str, key: str | None, block: str, n: int) -> Call:
    """A row of a run, with the other rules of a case."""
    rules = NOTHING if key is None else CASES[key].other_rules
    return rules(name, rows(block)[n], rules.edits(name, rows(block)[n], n))


def run_senders(
    name: str,
    key: str,
    own: dict[str, Features],
    of: Sequence[Any],
    n: int,
    share: float | Tensor = 1.0,
) -> Call:
    """The pass in which a share of the senders' change is patched and all else is held."""
    case, base, source = CASES[key], rows()[n], rows("longer")[n]
    here, there = tokens(base, case.at), tokens(source, case.at)
    rules = case.other_rules.edits(name, base, n)
    model = unpatched_call(name, key if case.other_rules.written else None, "clean", n)
    given = unpatched_call(name, None, "longer", n)
    neurons = {end[1] for end in of if not isinstance(end, int) and end[0] == "mlp_hidden"}
    held: list[tuple[Tap, Change]] = []
    for layer in LAYERS:
        mlp = "mlp_hidden" if layer in neurons else "mlp_out"
        heads = "attn_out" if BASES[case.basis] == ("attn_out", layer) else "z"
        for site in (heads,) if "through mlps" in case.more else (heads, mlp):
            vectors = model.before[site, layer]
            held.append(((site, layer), lambda now, vectors=vectors: vectors))
    if isinstance(of[0], int):
        which, encoder = list(of), own["f"].of

        def send(now: Tensor) -> Tensor:
            features = encoder.encode(now[here, 0])
            changed = features.clone()
            changed[:, which] = encoder.encode(given.before[BASES["f"]][there, 0])[:, which]
            x = now[here, 0]
            now[here, 0] += share * (encoder.decode(changed, x) - encoder.decode(features, x))
            return now

        sent: list[tuple[Tap, Change]] = [(BASES["f"], send)]
    else:
        sent = [
            (tap, lambda now, to=change: now + share * (to(now.clone()) - now))
            for tap, change in copied(of, given, there, here)
        ]
    order = [*held, *rules, *sent] if case.first else [*held, *sent, *rules]
    frozen = model.normed if "frozen" in case.more else None
    return case.other_rules(name, base, order, frozen=frozen)


def patched(
    name: str, key: str, own: dict[str, Features], cell: tuple[Sequence[Any], Numbers], n: int, *,
    share: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """[T, vocab] the logits of a row of one cell, with a share of the senders' change."""
    case, base = CASES[key], rows()[n]
    here, which = tokens(base, case.at), list(cell[1])
    rules = case.other_rules.edits(name, base, n)
    sending = run_senders(name, key, own, cell[0], n, share)
    (site, layer), of = BASES[case.basis], own[case.basis]
    if site == "resid_mid":
        x = sending.before["resid_pre", layer] + sending.before["attn_out", layer]
    else:
        x = sending.before[of.reads, layer]
    if of.reads != site:
        for tap, change in rules:
            x = change(x.clone()) if tap == (of.reads, layer) else x
    new = of.of.encode(x[here, 0])[:, which]
    read: dict[str, Tensor] = {}

    def look(now: Tensor) -> Tensor:
        read["x"] = now[here, 0].clone()
        return now

    def receive(now: Tensor, of: Features = of) -> Tensor:
        x = now[here, 0] if of.reads == site else read["x"]
        x = x + read["x"] if site == "resid_mid" else x
        features = of.of.encode(x)
        changed = features.clone()
        changed[:, which] = new
        now[here, 0] += of.of.decode(changed, x) - of.of.decode(features, x)
        return now

    writes: list[tuple[Tap, Change]] = [((site, layer), receive)]
    if case.basis == "clt":
        later = own["clt in the next layer"]
        writes.append(((site, layer + 1), partial(receive, of=later)))

    if site == "resid_mid":
        got = [(("resid_pre", layer), look), (("attn_out", layer), receive)]
        return case.other_rules(name, base, [*rules, *got]).logits
    late = [] if of.reads == site else [((of.reads, layer), look)]
    return case.other_rules(name, base, [*writes, *rules, *late]).logits


EACH = [
    pytest.param(
        *(name, mode, KINDS[(family + number) % len(KINDS)]),
        marks=() if family + number == 0 else pytest.mark.slow,
    )
    for family, name in enumerate(FAMILIES)
    for number, mode in enumerate(reversed(MODES))
]


@pytest.mark.parametrize(("name", "mode", "kind"), EACH)
def test_paths_to_features_equal_plain_hooks(data: Path, name: str, mode: str, kind: str) -> None:
    own = dictionaries(data, name, kind)
    text = definitions(name, kind)
    for key, case in cases(name).items():
        text += experiment(key, "from longer into clean", *case.lines)
    found = run_file(text, data, name, mode, precise=True)
    moved: dict[str, float] = {}
    for key, case in cases(name).items():
        values = np.array(
            [
                [
                    difference(patched(name, key, own, cell, n), record)
                    for n, record in enumerate(records())
                ]
                for cell in case.cells
            ]
        )
        assert len(cells(found[key])) == len(case.cells), key
        np.testing.assert_allclose(cells(found[key]), values, atol=1e-6, rtol=1e-5, err_msg=key)
        moved[key] = float(np.abs(values - found[key].measures[0].base).max())
    without = [key for key, value in moved.items() if value < 1e-3]
    most = len(CASES) // (5 if kind == "standard" else 2)  # some features are inactive
    assert len(without) <= most, without


def test_path_to_features_in_a_run_with_rules_equals_the_path_after_these_rules(
    data: Path,
) -> None:
    own = dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard")
    key = "sae_after_scaled_mlps"
    case = CASES[key]
    path = case.lines[1]
    run = f"run steered {{ {case.other_rules.written} }}"
    text += experiment("e", "from longer into steered", run, path)
    found = run_file(text, data, "gpt2", "planned", precise=True)["e"]
    (cell,) = case.cells
    values = [
        difference(patched("gpt2", key, own, cell, n), record) for n, record in enumerate(records())
    ]
    np.testing.assert_allclose(cells(found)[0], values, atol=1e-6, rtol=1e-5)


def test_paths_to_attention_of_two_layers_equal_those_to_each(data: Path) -> None:
    """Heads of layer 1 send to layer 2; in the same pass, others send to layer 1."""
    dictionaries(data, "gpt2", "standard")
    rule = "path z layer 0..1 head 1 -> {} at last token"
    text = 'basis h = sae("gpt2_standard/sae") at attn_out layer 1..2\n'
    text += 'basis f = sae("gpt2_standard/sae") at attn_out layer 1\n'
    text += 'basis g = sae("gpt2_standard/sae") at attn_out layer 2\n'
    ends = {
        "both": "attn_out layer 1..2 features 0..6 of h",
        "one": "features 0..6 of f",
        "two": "features 0..6 of g",
    }
    for key, end in ends.items():
        text += experiment(key, "from longer into clean", rule.format(end))
    found = run_file(text, data, "gpt2", "planned", precise=True)
    values = {key: cells(own) for key, own in found.items()}
    each = [values["one"][0], *values["two"]]
    np.testing.assert_allclose(values["both"], each, atol=1e-9)
    assert np.ptp(np.array(each), axis=0).min() > 1e-3


@pytest.mark.parametrize(
    ("rule", "code", "reason"),
    [
        ("path L0H1 -> feature 3 of q", "E0342", "isn't a dictionary"),
        ("path layers 0..2 heads 1 -> feature 3 of heads_sum", "E0334", "heads of layer 2 are"),
        ("path L0H1 -> feature 3 of embedded", "E0342", "describes `embed`"),
        ("path L0H1 -> mlp_out layer 1 dims 0..3", "E0108", "`dims`"),
        ("path L1H1 -> feature 99 of f", "E0301", "does not exist"),
        ("path L2H1 -> feature 3 of f", "E0335", "no path leads"),
        ("path L2H1 -> feature 3 of heads_sum", "E0335", "heads of layer 2 are part of"),
        ("path mlp_hidden layer 1 neuron 3 -> feature 3 of f", "E0335", "`q layer 2"),
        ("path feature 3 of f -> feature 3 of t", "E0335", "no path leads"),
        ("path mixed -> feature 3 of f", "E0334", "leave out the neurons of layer 1"),
        ("path both -> logits", "E0207", "features of `f`, `u`"),
        ("path L0H1 -> both", "E0207", "features of `f`, `u`"),
        ("for b in [f, g] { path L0H1 -> feature 3 of b at last token }", "E0342", "2 bases"),
        (
            "ablate all but c at tokens * with zero  path L0H1 -> feature 3 of f",
            "E0108", "to features together with a circuit",
        ),
    ],
)  # fmt: skip
def test_path_that_cannot_end_at_features_is_an_error(
    data: Path, rule: str, code: str, reason: str
) -> None:
    dictionaries(data, "llama", "standard")
    text = definitions("llama", "standard")
    text += "circuit c = L0H1 -> L1H1.q\n"
    text += "basis q = pca(p, dims: 3) at resid_post layer 0 at last token\n"
    text += 'basis heads_sum = sae("llama_standard/sae") at attn_out layer 2\n'
    text += 'basis embedded = sae("llama_standard/sae") at embed\n'
    line = rule if rule.endswith("}") else f"{rule} at last token"
    text += experiment("e", "from longer into clean", line)
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    errors = [each for each in diagnostics if each.severity == "error"]
    assert {each.code for each in errors} == {code}
    assert reason in render_full(errors)


def test_features_that_receive_are_labelled_and_explained_in_conventions(data: Path) -> None:
    dictionaries(data, "llama", "standard")
    text = definitions("llama", "standard")
    text += experiment("e", "from longer into clean", "path L0H1 -> feature * of t at last token")
    found = run_file(text, data, "llama", "planned")["e"]
    assert [cell.coords["to_feature"] for cell in found.cells] == list(range(FEATURES))
    assert {cell.site for cell in found.cells} == {"L0H1.z → L1.mlp_out in t"}
    said = "computed from `mlp_norm`, and set in the base run: each changes `mlp_out`"
    assert said in found.conventions["path"]


def test_conventions_state_that_attention_is_held_at_its_output(data: Path) -> None:
    dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard")
    rule = "path L0H1 -> feature 3 of attn at last token"
    found = run_file(
        text + experiment("e", "from longer into clean", rule), data, "gpt2", "planned"
    )
    said = "as its output is held there instead of its heads, and set in the base run"
    assert said in found["e"].conventions["path"]


def test_rule_on_received_features_of_a_transcoder_acts_on_their_new_values(data: Path) -> None:
    own = dictionaries(data, "gpt2", "standard")["t"]
    rule = "scale feature 3 of t at last token by 2"
    path = "path mlp_out layer 0 -> features 3, 5 of t at last token"
    text = definitions("gpt2", "standard") + experiment("e", "from longer into clean", path, rule)
    found = run_file(text, data, "gpt2", "planned", precise=True)["e"]
    values: list[float] = []
    for n, record in enumerate(records()):
        base = rows()[n]
        at, model = tokens(base, "last token"), unpatched_call("gpt2", None, "clean", n)
        given = copied(MLP, unpatched_call("gpt2", None, "longer", n), tokens(rows("longer")[n],
                       "last token"), at)  # fmt: skip
        held: list[tuple[Tap, Change]] = [
            ((site, layer), lambda now, vectors=model.before[site, layer]: vectors)
            for layer in LAYERS
            for site in ("z", "mlp_out")
        ]
        x = model.before["mlp_norm", 1][at, 0]
        sending = NOTHING("gpt2", base, [*held, *given])
        new = own.of.encode(sending.before["mlp_norm", 1][at, 0])
        before = own.of.encode(x)
        after = before.clone()
        after[:, 3], after[:, 5] = 2 * new[:, 3], new[:, 5]
        change = own.of.decode(after, x) - own.of.decode(before, x)

        def receive(now: Tensor, change: Tensor = change, at: Sequence[int] = at) -> Tensor:
            now[at, 0] += change
            return now

        logits = NOTHING("gpt2", base, [(("mlp_out", 1), receive)]).logits
        values.append(difference(logits, record))
    np.testing.assert_allclose(cells(found)[0], values, atol=1e-6, rtol=1e-5)
