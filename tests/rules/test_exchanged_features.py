"""Features of one dictionary replaced by those of another, against plain hooks on the bare model.

The stitching of Leask et al. 2025 (arXiv 2502.04878): one unpadded prompt at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..reference.forward import Changes, Write
from .support import (
    MANY,
    agree,
    codes,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)
from .test_dictionaries import FEATURES, LAYER, make
from .test_generation import TOKENS, replies, written
from .test_generation import Case as GenerationCase
from .test_inactive_features import width_of
from .test_loops_over_bases import ran

HERE = ("gpt2", "llama", "gpt_neox")
BASES = f"""basis small = sae("sae") at resid_post layer {LAYER}
basis big = sae("big") at resid_post layer {LAYER}
"""
BIG = 11


class Big:
    """A top-k dictionary of another size, written next to the small one."""

    def __init__(self, folder: Path, width: int, k: int = 5) -> None:
        random = torch.Generator().manual_seed(8)
        self.k = k
        parts = {
            "W_enc": torch.randn(width, BIG, generator=random) / 2,
            "b_enc": torch.randn(BIG, generator=random) / 4,
            "W_dec": torch.randn(BIG, width, generator=random) / 2,
            "b_dec": torch.randn(width, generator=random) / 4,
        }
        (folder / "big").mkdir(exist_ok=True)
        config = {"architecture": "topk", "k": k, "apply_b_dec_to_input": True}
        (folder / "big" / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(parts, folder / "big" / "sae_weights.safetensors")
        self.parts = {name: each.double() for name, each in parts.items()}

    def contribution(self, x: Tensor, which: Sequence[int]) -> Tensor:
        before = (x - self.parts["b_dec"]) @ self.parts["W_enc"] + self.parts["b_enc"]
        top = before.topk(self.k)
        features = torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
        return features[..., list(which)] @ self.parts["W_dec"][list(which)]


CASES = [
    # removed features, inserted features, position, whether the error is dropped, architecture
    ("feature 1", "feature 3", "last token", False, "standard"),
    ("features 1, 4", "features 0, 3, 9", "tokens *", False, "topk"),
    ("features 0..2", "feature 7", "token 6", True, "jumprelu"),
    (f"features 0..{FEATURES - 1}", "features 2, 4", "last token", False, "topk"),
]


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize(("out", "come", "at", "drops", "architecture"), CASES)
def test_exchanged_features_equal_plain_hooks(
    out: str, come: str, at: str, drops: bool, architecture: str, family: str, mode: str, data: Path
) -> None:
    of = make(data, architecture, width_of(family))
    big = Big(data, width_of(family))
    rule = f"patch {out} of small at {at} with {come} of big" + (" without error" if drops else "")
    found = run_file(BASES + experiment("e", rule), data, family, mode)["e"]
    leaving, coming = (numbers(each) for each in (out, come))

    def changes(n: int) -> list[Changes]:
        row = rows()[n]
        writes: list[Write] = []
        for token in tokens(row, at):
            x = plain(family, row)["resid_post", LAYER][token]
            features = of.encode(x)
            without = features.clone()
            without[..., leaving] = 0
            new = x + of.decode(without, x) - of.decode(features, x) + big.contribution(x, coming)
            if drops:
                new = new - (x - of.decode(features, x))
            writes.append(Write("resid_post", LAYER, new, token))
        return [(writes, ())]

    expected = worked_out(family, [()], changes, rows(), records())
    agree(found, (), expected, unpatched(family), most=False, large=0.001)


def numbers(written: str) -> list[int]:
    text = written.partition(" ")[2]
    if ".." in text:
        low, high = text.split("..")
        return [*range(int(low), int(high) + 1)]
    return [int(each) for each in text.split(",")]


def test_exchange_sweeps_and_loops_equal_separate_rules(data: Path) -> None:
    """Each removed feature is a cell; a `for` is an axis of inserted features."""
    make(data, "standard", width_of("llama"))
    Big(data, width_of("llama"))
    text = BASES
    pairs = [(i, j) for j in (2, 5) for i in (0, 1, 3)]
    for n, (i, j) in enumerate(pairs):
        rule = f"patch feature {i} of small at last token with feature {j} of big"
        text += experiment(f"one_{n}", rule)
    rule = "for j in [2, 5] { patch feature 0..1, 3 of small at last token with feature j of big }"
    text += experiment("every", rule)
    found = run_file(text, data, "llama", "planned")
    measure = found["every"].measures[0].patched
    alone = [found[f"one_{n}"].measures[0].patched[0] for n in range(len(pairs))]
    assert sorted(map(tuple, measure.round(5).tolist())) == sorted(
        map(tuple, np.array(alone).round(5).tolist())
    )
    assert len({tuple(row) for row in np.array(alone).round(4).tolist()}) == len(pairs)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("patch feature 1 of small at last token with feature * of big", "E0342"),
        ("patch feature 1 of small at last token with feature 2, 3 of big", "E0342"),
        ("patch feature 1 of small at last token with feature 40 of big", "E0301"),
        ("patch feature 1 of small at last token with feature 3 of none", "E0201"),
        ("patch resid_post layer 1 at last token with feature 3 of big", "E0342"),
        ("patch feature 1 of small at last token into layer 2 with feature 3 of big", "E0342"),
        ("patch feature 1 of small at last token onto token 1 with feature 3 of big", "E0342"),
    ],
)
def test_invalid_exchanges_are_errors(rule: str, code: str, data: Path) -> None:
    make(data, "standard", width_of("llama"))
    Big(data, width_of("llama"))
    assert code in codes(BASES + experiment("e", rule), data, "llama")


def test_store_distinguishes_exchanges(data: Path) -> None:
    """By the inserted feature and its dictionary, and from a rule that only removes a feature."""
    make(data, "standard", width_of("gpt2"))
    Big(data, width_of("gpt2"))
    rule = "patch feature 1 of small at last token with features {}"
    rules = [rule.format(come) for come in ("0..4 of big", "5..10 of big", "0..4 of small")]
    rules.append("ablate feature 1 of small at last token with zero")
    found: list[np.ndarray] = []
    for each in rules:
        result, count = ran(experiment("e", each), data, BASES)
        assert count > 0, each
        found.append(result.measures[0].patched)
    assert len({tuple(each.round(4).ravel().tolist()) for each in found}) == len(rules)
    again, count = ran(experiment("e", rules[0]), data, BASES)
    assert count == 0
    np.testing.assert_array_equal(again.measures[0].patched, found[0])


def test_exchange_in_a_derived_run_equals_the_rule(data: Path) -> None:
    """Patched logits of the derived run equal those under the rule."""
    make(data, "standard", width_of("llama"))
    Big(data, width_of("llama"))
    rule = "patch feature 1 of small at last token with feature 3 of big"
    text = BASES + experiment("e", rule)
    derived = f"run other_run {{ {rule} }}"
    both = experiment("f", derived, "from other_run into clean", "patch logits at last token")
    found = run_file(text + both, data, "llama", "planned")
    first, second = (found[name].measures[0].patched for name in "ef")
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_exchange_loop_variable_on_both_sides_has_one_cell_per_value(data: Path) -> None:
    """Features of two dictionaries can be inserted in one file."""
    make(data, "standard", width_of("llama"))
    Big(data, width_of("llama"))
    rule = "patch feature {} of small at last token with features {} of {}"
    parts = [(0, 0, "big"), (3, 3, "big"), (0, 3, "big"), (0, 3, "small")]
    text = BASES + "".join(
        experiment(f"one_{n}", rule.format(*each)) for n, each in enumerate(parts)
    )
    text += experiment("both", f"for j in [0, 3] {{ {rule.format('j', 'j', 'big')} }}")
    found = run_file(text, data, "llama", "planned")
    patched = {name: each.measures[0].patched for name, each in found.items()}
    alone = np.concatenate([patched["one_0"], patched["one_1"]])
    np.testing.assert_allclose(patched["both"], alone, atol=1e-5)
    for n in (2, 3):
        apart = run_file(BASES + experiment("e", rule.format(*parts[n])), data, "llama", "planned")
        values = apart["e"].measures[0].patched
        np.testing.assert_allclose(patched[f"one_{n}"], values, atol=1e-5)
    assert np.abs(patched["one_2"] - patched["one_3"]).max() > 0.01


def test_exchange_of_linear_bases_has_no_random_control(data: Path) -> None:
    """One basis is fitted on another block; random subspaces are not a valid control."""
    text = "basis a = random(dims: 3) at resid_post layer 1\n"
    text += "basis c = pca(second, dims: 2) at resid_post layer 1\n"
    rule = "patch feature 0 of a at last token with feature 1 of c"
    found = run_file(text + experiment("e", rule), data, "llama", "planned")["e"]
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.001
    text += "basis d = random(dims: 3) at resid_post layer 1\n"
    rule = "patch feature 0 of a at last token with feature 1 of d"
    assert "E0630" in codes(text + experiment("e", rule, "against random(5)"), data, "llama")


def test_two_exchanges_insert_features_of_their_named_dictionaries(data: Path) -> None:
    """Each inserts features of the dictionary that it names, in either order."""
    make(data, "standard", width_of("llama"))
    Big(data, width_of("llama"))
    rule = "patch feature 0 of small at {} with features 0..4 of {}"
    rules = [rule.format("last token", "big"), rule.format("token 6", "small")]
    text = BASES + experiment("one_way", *rules) + experiment("reversed", *reversed(rules))
    text += experiment("other", rules[0], rule.format("token 6", "big"))
    found = run_file(text, data, "llama", "planned")
    first, second, other = (found[n].measures[0].patched for n in ("one_way", "reversed", "other"))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_exchange_at_each_generated_token_equals_separate_passes(mode: str, data: Path) -> None:
    """At each generated token, against separate passes."""
    of = make(data, "standard", width_of("llama"))
    big = Big(data, width_of("llama"))
    rule = f"patch features * of small at last token with features 0..{BIG - 1} of big"
    lines = (rule, f"generate {TOKENS}")
    text = BASES + experiment("e", *lines, measure="measure length as raw")
    found = run_file(text, data, "llama", mode, precise=True)["e"]

    def new(x: Tensor) -> Tensor:
        features = of.encode(x)
        without = torch.zeros_like(features)
        return x + of.decode(without, x) - of.decode(features, x) + big.contribution(x, range(BIG))

    def act(name: str, n: int, at: int) -> Changes:
        return [Write("resid_post", LAYER, new, at)], []

    case = GenerationCase(rule, "last token", act)
    wanted = [written("llama", n, [case]) for n in range(len(rows()))]
    assert replies(found) == wanted
    assert wanted != [written("llama", n, []) for n in range(len(rows()))]
