"""Rules on features of transcoders, against forward passes of the bare model.

A feature is read from the MLP's input and changes the MLP's output in the same pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.resolve.cells import Coord

from ..reference.forward import Changes, Write
from .support import (
    MANY,
    agree,
    codes,
    edited,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)
from .test_generation import TOKENS, replies, written
from .test_generation import Case as GenerationCase

FEATURES, K, LAYER = 12, 4, 1
HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "sparsify", "layer_norm")
BASIS = f'basis t = transcoder("of_mlp") at mlp_out layer {LAYER}\n'


@dataclass(frozen=True)
class Reference:
    """A transcoder computed from its formulas."""

    kind: str
    weights: dict[str, Tensor]

    def encode(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":  # of the input alone
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + 1e-5)
        before = x @ self.weights["W_enc"] + self.weights["b_enc"]
        if self.kind == "sparsify":
            least = before.sort(descending=True).values[..., K - 1 : K]
            return torch.where(before >= least, before, 0.0).clamp(min=0)
        if self.kind == "jumprelu_transcoder":
            before = torch.where(before > self.weights["threshold"], before, 0.0)
        return before.clamp(min=0)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        found = features @ self.weights["W_dec"] + self.weights["b_dec"]
        return found + x @ self.weights["W_skip"].T if "skip" in self.kind else found


def make(folder: Path, kind: str, width: int, name: str = "of_mlp", **metadata: str) -> Reference:
    """Write a transcoder, with about half of its features active."""
    random = torch.Generator().manual_seed(len(kind) + (50 if name != "of_mlp" else 0))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    weights = {
        "W_enc": draw(width, FEATURES) / 2,
        "b_enc": draw(FEATURES) / 4,
        "W_dec": draw(FEATURES, width),
        "b_dec": draw(width) / 4,
        "threshold": draw(FEATURES).abs() / 2,
        "W_skip": draw(width, width) / 4,
    }
    unused = {"threshold": "jumprelu", "W_skip": "skip"}
    kept = {k: v for k, v in weights.items() if unused.get(k, kind) in kind}
    target = folder / name
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    if kind == "sparsify":
        config: dict[str, Any] = {"activation": "topk", "k": K, "transcode": True}
        kept["encoder.weight"] = kept.pop("W_enc").T.contiguous()
        kept["encoder.bias"] = kept.pop("b_enc")
        save_file(kept, target / "sae.safetensors")
    else:
        normalised = kind == "layer_norm"
        config = {"architecture": "transcoder" if normalised else kind, "metadata": metadata}
        config["normalize_activations"] = "layer_norm" if normalised else "none"
        save_file(kept, target / "sae_weights.safetensors")
    (target / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return Reference(kind, {name: each.double() for name, each in weights.items()})


def width_of(family: str) -> int:
    return plain(family, rows()[0])["mlp_out", LAYER].shape[-1]


def features_of(name: str, of: Reference, run: str, n: int, site: str = "mlp_norm") -> Tensor:
    """[feature] at the last token of one row."""
    text = rows(run)[n]
    return of.encode(plain(name, text)[site, LAYER][text.last, 0])


def mean_features(name: str, of: Reference) -> Tensor:
    found = [features_of(name, of, "clean", n) for n in range(len(rows()))]
    return torch.stack(found).mean(0)


Change = Callable[[Tensor], Tensor]
"""New features from current ones."""


def writes(
    of: Reference,
    change: Change,
    positions: Sequence[int],
    *,
    keeps_error: bool = True,
    reads: str = "mlp_norm",
    layer: int = LAYER,
) -> list[Write]:
    """A write at the MLP's input records it unchanged; one at the output uses it."""
    found: list[Write] = []
    for position in positions:
        seen: list[Tensor] = []

        def note(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return x

        def act(out: Tensor, seen: list[Tensor] = seen) -> Tensor:
            x = seen[-1]
            features = of.encode(x)
            new = of.decode(change(features), x)
            return out + new - of.decode(features, x) if keeps_error else new

        found += [Write(reads, layer, note, position), Write("mlp_out", layer, act, position)]
    return found


def replaced(features: Tensor, which: Sequence[int], value: Tensor | float) -> Tensor:
    features = features.clone()
    index = list(which)
    features[..., index] = value[..., index] if isinstance(value, Tensor) else value
    return features


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    change: Callable[..., Change]
    """From the model, the transcoder, the row and the coordinates of the cell."""
    at: str = "last token"
    keeps_error: bool = True
    before: Callable[[str, int], list[Write]] = lambda name, n: []
    """Writes of other rules, from the model and the row."""


def source(name: str, of: Reference, n: int) -> Tensor:
    return features_of(name, of, "other", n)


def attention_of_other(name: str, n: int) -> list[Write]:
    text, other = rows()[n], rows("other")[n]
    return [Write("attn_out", LAYER, plain(name, other)["attn_out", LAYER][other.last], text.last)]


EVERY: list[tuple[Coord, ...]] = [(feature,) for feature in range(FEATURES)]
CASES: dict[str, Case] = {
    "each feature": Case(
        "from other into clean  patch feature * of t at last token",
        ("feature",),
        EVERY,
        lambda name, of, n, i: lambda f: replaced(f, [i], source(name, of, n)),
    ),
    "joined features": Case(
        "from other into clean  patch features 2, 5..7 of t at last token",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, [2, 5, 6, 7], source(name, of, n)),
    ),
    "all features": Case(
        f"from other into clean  patch mlp_out layer {LAYER} in basis t at last token",
        (),
        [()],
        lambda name, of, n: lambda f: source(name, of, n).expand_as(f),
    ),
    "zero": Case(
        "ablate features 0..5 of t at tokens * with zero",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, range(6), 0.0),
        "tokens *",
    ),
    "mean": Case(
        "ablate features * of t at last token with mean",
        (),
        [()],
        lambda name, of, n: lambda f: mean_features(name, of).expand_as(f),
    ),
    "clamp": Case(
        "for i in 0..3 { clamp feature i of t at tokens * to 3 }",
        ("i",),
        EVERY[:4],
        lambda name, of, n, i: lambda f: replaced(f, [i], 3.0),
        "tokens *",
    ),
    "without error": Case(
        "clamp features 1..3 of t at tokens * to 2 without error",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, [1, 2, 3], 2.0),
        "tokens *",
        keeps_error=False,
    ),
    "in the place of the MLP": Case(
        f"set mlp_out layer {LAYER} at tokens * to reconstruction of t",
        (),
        [()],
        lambda name, of, n: lambda f: f,
        "tokens *",
        keeps_error=False,
    ),
    "add": Case(
        "for c in [-2, 0.5] { add c to features 3..4 of t at last token }",
        ("c",),
        [(-2,), (0.5,)],
        lambda name, of, n, c: lambda f: replaced(f, [3, 4], f + c),
    ),
    "scale": Case(
        "for c in [-1, 3] { scale features * of t at tokens * by c }",
        ("c",),
        [(-1,), (3,)],
        lambda name, of, n, c: lambda f: f * c,
        "tokens *",
    ),
    "beside a rule that changes the input": Case(
        f"from other into clean  patch attn_out layer {LAYER} at last token  "
        "ablate feature 0..3 of t at last token with zero",
        ("feature",),
        EVERY[:4],
        lambda name, of, n, i: lambda f: replaced(f, [i], 0.0),
        before=attention_of_other,
    ),
}


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", HERE)
def test_rules_on_transcoder_features_equal_the_reference(
    family: str, kind: str, mode: str, data: Path
) -> None:
    of = make(data, kind, width_of(family))
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = BASIS + "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            change = case.change(family, of, n, *cell)
            at = tokens(rows()[n], case.at)
            own = writes(of, change, at, keeps_error=case.keeps_error)
            return [([*case.before(family, n), *own], ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            base = unpatched(family)
            agree(found[names[key]], case.axes, expected, base, most=False, large=0.02)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transcoder_of_resid_mid_equals_the_reference(family: str, mode: str, data: Path) -> None:
    """The hook point is recorded; the stream is a sum and not the output of a module."""
    hook = f"blocks.{LAYER}.hook_resid_mid"
    of = make(data, "transcoder", width_of(family), hook_name=hook)
    text = BASIS + experiment("e", "from other into clean  patch feature * of t at last token")
    found = run_file(text, data, family, mode)["e"]

    def changes(n: int, i: int) -> list[Changes]:
        value = features_of(family, of, "other", n, "resid_mid")
        own = writes(of, lambda f: replaced(f, [i], value), [rows()[n].last], reads="resid_mid")
        return [(own, ())]

    expected = worked_out(family, EVERY, changes, rows(), records())
    agree(found, ("feature",), expected, unpatched(family), most=False)
    assert "resid_mid" in found.conventions["transcoder"]


@pytest.mark.parametrize("mode", MANY)
def test_transcoders_of_all_layers_equal_the_reference(mode: str, data: Path) -> None:
    """Each transcoder reads the input that those of lower layers have changed."""
    of = make(data, "transcoder", width_of("llama"))
    text = 'basis t = transcoder("of_mlp") at mlp_out layer *\n'
    rule = "set mlp_out layers * at tokens * to reconstruction of t"
    text += experiment("e", rule) + experiment("f", rule.replace("layers *", "layer *"))
    found = run_file(text, data, "llama", mode)

    def changes(n: int, *only: int) -> list[Changes]:
        at = tokens(rows()[n], "tokens *")
        layers = only or range(3)
        own = [writes(of, lambda f: f, at, keeps_error=False, layer=each) for each in layers]
        return [([write for each in own for write in each], ())]

    for name, cells in (("e", [()]), ("f", [(0,), (1,), (2,)])):
        axes = ("layer",) if name == "f" else ()
        expected = worked_out("llama", cells, changes, rows(), records())
        agree(found[name], axes, expected, unpatched("llama"), most=False)


def test_inactive_transcoder_features_are_those_of_the_mlp_input(data: Path) -> None:
    of = make(data, "jumprelu_transcoder", width_of("llama"))
    text = BASIS + experiment("e", "ablate feature * of t at last token with zero")
    found = run_file(text, data, "llama", "planned")["e"]
    active = torch.stack([features_of("llama", of, "clean", n) for n in range(len(rows()))]) > 0
    never = (~active.any(0)).sum().item()
    measure = found.measures[0]
    assert measure.inert is not None
    assert measure.inert.sum() == never
    written = measure.patched != measure.base
    assert (written == active.T.numpy()).mean() > 0.95
    count = int((~active).sum())
    assert str(count) in found.conventions["inactive"]


@pytest.mark.parametrize(
    ("basis", "line", "code"),
    [
        (BASIS, "patch feature 12 of t at last token", "E0301"),
        (BASIS, f"patch attn_out layer {LAYER} in basis t at last token", "E0342"),
        (BASIS, "set attn_out layer 1 at last token to reconstruction of t", "E0342"),
        (BASIS, "add 2 to features * of t at last token", "E0342"),
        (BASIS.replace("mlp_out", "resid_post"), "patch feature 1 of t at last token", "E0342"),
        (BASIS.replace("mlp_out", "mlp_norm"), "patch feature 1 of t at last token", "E0342"),
        (BASIS.replace("transcoder(", "sae("), "patch feature 1 of t at last token", "E0342"),
        (BASIS.replace("of_mlp", "nothing"), "patch feature 1 of t at last token", "E0342"),
        (BASIS.replace("transcoder(", "clt("), "patch feature 1 of t at last token", "E0203"),
    ],
)
def test_invalid_transcoder_rules_are_errors(basis: str, line: str, code: str, data: Path) -> None:
    make(data, "transcoder", width_of("llama"))
    assert code in codes(basis + experiment("e", f"from other into clean  {line}"), data)


def test_sparse_autoencoder_loaded_as_transcoder_is_an_error(data: Path) -> None:
    make(data, "transcoder", width_of("llama"))
    config = data / "of_mlp" / "cfg.json"
    config.write_text(json.dumps({"architecture": "standard"}), encoding="utf-8")
    rule = "from other into clean  patch feature 1 of t at last token"
    assert codes(BASIS + experiment("e", rule), data) == ["E0342"]


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ({"hook_name": "blocks.1.ln2.hook_normalized"}, 0),
        ({"hook_name": "blocks.0.ln2.hook_normalized"}, 1),
        ({"hook_name": "blocks.1.hook_resid_post"}, 1),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, 0),
        ({"hook_name_out": "blocks.2.hook_mlp_out"}, 1),
    ],
)
def test_transcoder_of_another_hook_point_is_a_warning(
    hooks: dict[str, str], said: int, data: Path
) -> None:
    make(data, "transcoder", width_of("llama"), **hooks)
    rule = "from other into clean  patch feature 1 of t at last token"
    _, found = try_file(BASIS + experiment("e", rule), data, "llama")
    assert [each.code for each in found].count("W0733") == said


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_transcoder_features_change_at_each_generated_token(mode: str, data: Path) -> None:
    """The reference has a full forward pass for each token of the reply."""
    of = make(data, "jumprelu_transcoder", width_of("llama"))
    rule = "clamp features 1..3 of t at last token to 30"
    lines = (rule, f"generate {TOKENS}")
    text = BASIS + experiment("e", *lines, measure="measure length as raw")
    found = run_file(text, data, "llama", mode, precise=True)["e"]

    def act(name: str, n: int, at: int) -> Changes:
        return writes(of, lambda f: replaced(f, [1, 2, 3], 30.0), [at]), []

    case = GenerationCase(rule, "last token", act)
    wanted = [written("llama", n, [case]) for n in range(len(rows()))]
    assert replies(found) == wanted
    assert wanted != [written("llama", n, []) for n in range(len(rows()))]


def test_derived_run_with_transcoder_features_as_base_and_source(data: Path) -> None:
    """Its writes act in passes that start from the run, and in those that read it."""
    of = make(data, "jumprelu_transcoder", width_of("llama"))
    run = "run more { clamp feature 1 of t at last token to 20 }"
    later = "patch resid_post layer 2 at last token with more"
    text = BASIS + experiment("e", run, later)
    text += experiment(
        "f", f"{run}  from clean into more", "ablate mlp_out layer 2 at last token with zero"
    )
    found = run_file(text, data, "llama", "planned")

    def clamped(n: int) -> list[Write]:
        return writes(of, lambda f: replaced(f, [1], 20.0), [rows()[n].last])

    def copied(n: int) -> list[Changes]:
        return [(clamped(n), ())]  # the last layer's last token is all that the logits read

    def ablated(n: int) -> list[Changes]:
        zero = Write("mlp_out", 2, torch.zeros(1), rows()[n].last)
        return [([*clamped(n), zero], ())]

    expected = worked_out("llama", [()], copied, rows(), records())
    agree(found["e"], (), expected, unpatched("llama"), most=False)
    base = np.array(worked_out("llama", [()], copied, rows(), records())[()])
    expected = worked_out("llama", [()], ablated, rows(), records())
    agree(found["f"], (), expected, base, most=False)


def test_random_position_control_of_transcoder_features_has_a_band(data: Path) -> None:
    of = make(data, "transcoder", width_of("llama"))
    rule = "ablate features 0..5 of t at cue token with zero"
    text = BASIS + experiment("e", rule, "against random(3, positions)")
    found = run_file(text, data, "llama", "planned")["e"]

    def changes(n: int) -> list[Changes]:
        return [
            (writes(of, lambda f: replaced(f, range(6), 0.0), tokens(rows()[n], "cue token")), ())
        ]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(found, (), expected, unpatched("llama"), most=False, large=0.01)
    band = found.control(0)
    assert band is not None
    assert band.draws[0] == 3
    assert band.low[0] < band.high[0]


# --- cross-layer transcoders ----------------------------------------------------------------------


def make_cross_layer(
    folder: Path, width: int, hook: str = "hook_resid_mid", layers: int = 2
) -> dict[int, dict[str, Tensor]]:
    """Write a cross-layer transcoder in the layout of circuit-tracer; returns its encoders."""
    random = torch.Generator().manual_seed(5)
    target = folder / "clt"
    target.mkdir(exist_ok=True)
    found: dict[int, dict[str, Tensor]] = {}
    for layer in range(layers):
        parts = {
            "W_enc": torch.randn(FEATURES, width, generator=random) / 2,
            "b_enc": torch.randn(FEATURES, generator=random) / 4,
            "b_dec": torch.randn(width, generator=random),
        }
        written = torch.randn(FEATURES, layers - layer, width, generator=random)
        save_file({f"W_dec_{layer}": written}, target / f"W_dec_{layer}.safetensors")
        if layer == LAYER:
            parts["threshold"] = torch.randn(FEATURES, generator=random).abs() / 2
        save_file(
            {f"{name}_{layer}": each for name, each in parts.items()},
            target / f"W_enc_{layer}.safetensors",
        )
        found[layer] = {name: each.double() for name, each in parts.items()}
        found[layer]["W_dec"] = written.double()
    config = f"model_name: m\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: {hook}\n"
    (target / "config.yaml").write_text(config, encoding="utf-8")
    return found


@pytest.mark.parametrize(
    ("family", "hook", "site"),
    [
        ("gpt2", "hook_resid_mid", "resid_mid"),
        ("llama", "hook_resid_mid", "resid_mid"),
        ("gpt_neox", "mlp.hook_in", "mlp_norm"),
        ("gemma2", "ln2.hook_normalized", "mlp_norm"),
    ],
)
def test_observed_cross_layer_features_equal_the_reference(
    family: str, hook: str, site: str, data: Path
) -> None:
    encoders = make_cross_layer(data, width_of(family), hook)
    text = "".join(
        f'basis c{layer} = transcoder("clt") at mlp_out layer {layer}\n' for layer in encoders
    )
    for layer in encoders:
        line = f"observe features of c{layer} at last token"
        text += experiment(f"e{layer}", line, measure="", stats="")
    results = run_file(text, data, family, "planned")
    for layer, parts in encoders.items():
        found = results[f"e{layer}"]
        for n, row in enumerate(rows()):
            x = plain(family, row)[site, layer][row.last, 0]
            before = parts["W_enc"] @ x + parts["b_enc"]
            active = before > parts.get("threshold", torch.zeros(FEATURES))
            expected = (before * active).clamp(min=0).numpy()
            assert np.abs(found.measures[0].patched[:, n] - expected).max() < 1e-4
        assert "cross-layer transcoder" in found.conventions[f"basis c{layer}"]
        assert "explains" not in found.conventions[f"features of c{layer}"]


def encode_across(parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features of a layer of a cross-layer transcoder."""
    before = x @ parts["W_enc"].T + parts["b_enc"]
    least = parts.get("threshold", torch.zeros(FEATURES))
    return torch.where(before > least, before, 0.0).clamp(min=0)


def writes_across(
    parts: dict[str, Tensor],
    change: Change,
    positions: Sequence[int],
    *,
    reads: str = "mlp_norm",
    layer: int = LAYER,
) -> list[Write]:
    """Features of one layer change the MLP outputs of this layer and of all later ones."""
    found: list[Write] = []
    for position in positions:
        seen: list[Tensor] = []

        def note(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return x

        found.append(Write(reads, layer, note, position))
        for number in range(parts["W_dec"].shape[1]):

            def act(out: Tensor, seen: list[Tensor] = seen, number: int = number) -> Tensor:
                features = encode_across(parts, seen[-1])
                return out + (change(features) - features) @ parts["W_dec"][:, number]

            found.append(Write("mlp_out", layer + number, act, position))
    return sorted(found, key=lambda each: each.layer or 0)


CROSS = f'basis c = transcoder("clt") at mlp_out layer {LAYER}\n'
CROSS_HOOKS = {"mlp_norm": "ln2.hook_normalized", "resid_mid": "hook_resid_mid"}
CROSS_CASES: dict[str, tuple[str, tuple[str, ...], Sequence[tuple[Coord, ...]], Any, str]] = {
    "each feature from another run": (
        "from other into clean  patch feature * of c at last token",
        ("feature",),
        EVERY,
        lambda f, there, i: replaced(f, [i], there),
        "last token",
    ),
    "joined features": (
        "from other into clean  patch features 2, 5..7 of c at last token",
        (),
        [()],
        lambda f, there: replaced(f, [2, 5, 6, 7], there),
        "last token",
    ),
    "all features": (
        "from other into clean  patch mlp_out layer {} in basis c at last token",
        (),
        [()],
        lambda f, there: there.expand_as(f),
        "last token",
    ),
    "zero": (
        "ablate features 0..5 of c at tokens * with zero",
        (),
        [()],
        lambda f, there: replaced(f, range(6), 0.0),
        "tokens *",
    ),
    "clamp": (
        "for i in 0..3 {{ clamp feature i of c at {{cue token, last token}} to 3 }}",
        ("i",),
        EVERY[:4],
        lambda f, there, i: replaced(f, [i], 3.0),
        "{cue token, last token}",
    ),
    "add": (
        "for a in [-2, 0.5] {{ add a to features 3..4 of c at last token }}",
        ("a",),
        [(-2,), (0.5,)],
        lambda f, there, a: replaced(f, [3, 4], f + a),
        "last token",
    ),
    "scale": (
        "for a in [-1, 3] {{ scale features * of c at tokens * by a }}",
        ("a",),
        [(-1,), (3,)],
        lambda f, there, a: f * a,
        "tokens *",
    ),
}
"""Rule, axes, cells, new features from the current ones and those of the other run, tokens."""


CROSS_PLACES = [("gpt2", 0), ("llama", 0), *((family, n) for family in HERE for n in (1, 2))]
"""In layer 0 of the other families, the other run has the same input at the last token."""


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize(("family", "layer"), CROSS_PLACES)
def test_rules_on_cross_layer_features_write_to_all_later_layers(
    family: str, layer: int, mode: str, data: Path
) -> None:
    site = "mlp_norm" if layer == 1 or family == "gpt_neox" else "resid_mid"
    parts = make_cross_layer(data, width_of(family), CROSS_HOOKS[site], 3)[layer]
    names = {key: f"e{number}" for number, key in enumerate(CROSS_CASES)}
    text = f'basis c = transcoder("clt") at mlp_out layer {layer}\n'
    text += "".join(
        experiment(names[key], case[0].format(layer)) for key, case in CROSS_CASES.items()
    )
    found = run_file(text, data, family, mode)
    for key, (_, axes, cells, change, at) in CROSS_CASES.items():

        def changes(n: int, *cell: Coord, change: Any = change, at: str = at) -> list[Changes]:
            other = rows("other")[n]
            there = encode_across(parts, plain(family, other)[site, layer][other.last, 0])
            own = writes_across(
                parts,
                lambda f: change(f, there, *cell),
                tokens(rows()[n], at),
                reads=site,
                layer=layer,
            )
            return [(own, ())]

        expected = worked_out(family, cells, changes, rows(), records())
        try:
            base = unpatched(family)
            agree(found[names[key]], axes, expected, base, most=False, large=0.02)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def clt_of(data: Path, family: str = "llama") -> dict[int, dict[str, Tensor]]:
    return make_cross_layer(data, width_of(family), CROSS_HOOKS["mlp_norm"], 3)


ALL_CROSS = 'basis c = transcoder("clt") at mlp_out layer *\n'


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cross_layer_features_combine_with_other_rules(family: str, mode: str, data: Path) -> None:
    """Features of two layers, a rule on a later MLP before and after them, and a layer sweep."""
    parts = clt_of(data, family)
    first = "clamp mlp_out layer 0 features 1..3 of c at tokens * to 2"
    second = "scale mlp_out layer 1 features * of c at last token by 3"
    zero = "ablate mlp_out layer 2 at last token with zero"
    text = ALL_CROSS  # the first experiment only reads the features
    line = "observe value mlp_out layer * feature * of c at last token"
    text += experiment("seen", line, measure="", stats="")
    line = line.replace("*", "1", 1)  # of a layer that the experiment changes
    text += experiment("read", first, second, line, measure="", stats="")
    text += experiment("two", first, second)
    text += experiment("before", zero, first) + experiment("after", first, zero)
    text += experiment("swept", "scale mlp_out layer * feature 0..2 of c at last token by -2")
    found = run_file(text, data, family, mode)

    def clamped(n: int) -> list[Write]:
        at = tokens(rows()[n], "tokens *")
        return writes_across(parts[0], lambda f: replaced(f, [1, 2, 3], 2.0), at, layer=0)

    def two(n: int) -> list[Changes]:
        more = writes_across(parts[1], lambda f: 3 * f, [rows()[n].last], layer=1)
        return [([*clamped(n), *more], ())]

    def zeroed(n: int) -> Write:
        return Write("mlp_out", 2, torch.zeros(1), rows()[n].last)

    def swept(n: int, layer: int, i: int) -> list[Changes]:
        act = lambda f: replaced(f, [i], -2 * f)  # noqa: E731
        return [(writes_across(parts[layer], act, [rows()[n].last], layer=layer), ())]

    cells = [(layer, i) for layer in range(3) for i in range(3)]
    for name, axes, own, changes in (
        ("two", (), [()], two),
        ("before", (), [()], lambda n: [([zeroed(n), *clamped(n)], ())]),
        ("after", (), [()], lambda n: [([*clamped(n), zeroed(n)], ())]),
        ("swept", ("layer", "feature"), cells, swept),
    ):
        expected = worked_out(family, own, changes, rows(), records())
        agree(found[name], axes, expected, unpatched(family), most=False, large=0.02)
    for n, row in enumerate(rows()):
        x = edited(family, row, clamped(n))["mlp_norm", 1][row.last, 0]
        own = encode_across(parts[1], x).numpy()
        assert np.abs(found["read"].measures[0].patched[:, n] - own).max() < 1e-3
    assert "all later layers" in found["two"].conventions["cross-layer transcoder"]


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_cross_layer_features_change_at_each_generated_token(mode: str, data: Path) -> None:
    """The reference has a full forward pass for each token of the reply."""
    parts = clt_of(data)[LAYER]
    rule = "clamp features 1..3 of c at last token to 30"
    lines = (rule, f"generate {TOKENS}")
    text = CROSS + experiment("e", *lines, measure="measure length as raw")
    found = run_file(text, data, "llama", mode, precise=True)["e"]

    def act(name: str, n: int, at: int) -> Changes:
        return writes_across(parts, lambda f: replaced(f, [1, 2, 3], 30.0), [at]), []

    case = GenerationCase(rule, "last token", act)
    wanted = [written("llama", n, [case]) for n in range(len(rows()))]
    assert replies(found) == wanted
    assert wanted != [written("llama", n, []) for n in range(len(rows()))]


@pytest.mark.parametrize(
    "line",
    [
        "patch feature 1 of t at last token with more",
        "patch mlp_out layer 1 features 1..2 of t at last token with even_more",
    ],
)
def test_features_of_a_run_that_changes_them_are_not_read(line: str, data: Path) -> None:
    """They would be encoded from the input of the MLP, without the change."""
    make(data, "jumprelu_transcoder", width_of("llama"))
    runs = "run more { clamp feature 1 of t at last token to 20 }\n  run even_more { from clean "
    runs += "into more  ablate mlp_out layer 2 at last token with zero }"
    assert codes(BASIS + experiment("e", runs, line), data) == ["E0108"]


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_derived_run_with_cross_layer_features_is_read_at_each_layer(mode: str, data: Path) -> None:
    """A pass may stop below layers that the features write to."""
    parts = clt_of(data)[0]
    run = "run more { clamp mlp_out layer 0 feature 1 of c at tokens * to 20 }"
    text = ALL_CROSS
    for layer in range(3):
        line = f"patch resid_post layer {layer} at last token with more"
        text += experiment(f"e{layer}", run, line)
    text += experiment(
        "f", f"{run}  from clean into more", "ablate mlp_out layer 2 at last token with zero"
    )
    found = run_file(text, data, "llama", mode)

    def clamped(n: int) -> list[Write]:
        at = tokens(rows()[n], "tokens *")
        return writes_across(parts, lambda f: replaced(f, [1], 20.0), at, layer=0)

    def copied(n: int, layer: int) -> list[Changes]:
        there = edited("llama", rows()[n], clamped(n))["resid_post", layer][rows()[n].last, 0]
        return [([Write("resid_post", layer, there, rows()[n].last)], ())]

    for layer in range(3):
        expected = worked_out("llama", [(layer,)], copied, rows(), records())
        own = {(): expected[layer,]}
        agree(found[f"e{layer}"], (), own, unpatched("llama"), most=False, large=0.02)
    base = np.array(worked_out("llama", [()], lambda n: [(clamped(n), ())], rows(), records())[()])
    expected = worked_out(
        "llama",
        [()],
        lambda n: [([*clamped(n), Write("mlp_out", 2, torch.zeros(1), rows()[n].last)], ())],
        rows(),
        records(),
    )
    agree(found["f"], (), expected, base, most=False)


def test_inactive_cross_layer_features_are_those_of_their_layer(data: Path) -> None:
    parts = clt_of(data)[LAYER]
    text = CROSS + experiment("e", "ablate feature * of c at last token with zero")
    found = run_file(text, data, "llama", "planned")["e"]
    inputs = (plain("llama", each)["mlp_norm", LAYER][each.last, 0] for each in rows())
    active = torch.stack([encode_across(parts, x) for x in inputs]) > 0
    measure = found.measures[0]
    written = measure.patched != measure.base
    assert (written == active.T.numpy()).mean() > 0.95
    assert str(int((~active).sum())) in found.conventions["inactive"]


CROSS_ERRORS = {
    "reconstruction": (
        f"set mlp_out layer {LAYER} at tokens * to reconstruction of c",
        "`reconstruction of` needs the features of all layers",
    ),
    "without error": (
        "clamp feature 1 of c at last token to 2 without error",
        "depends on the features of all layers",
    ),
    "project out": ("project out feature 1 of c at last token", "a direction in each layer"),
    "exchange": (
        "patch feature 1 of c at last token with feature 2 of c",
        "features of several layers can't be exchanged",
    ),
    "circuit": (
        "ablate feature 1 of c at last token with zero  ablate k at tokens * with zero",
        "together with a circuit",
    ),
    "removed block": (
        "ablate feature 1 of c at last token with zero  replace block layer 2 with identity",
        "together with `replace block`",
    ),
    "base run with a removed block": (
        "run r { replace block layer 2 with identity }  from clean into r  "
        "ablate feature 1 of c at last token with zero",
        "together with `replace block`",
    ),
    "another layer": (
        "clamp mlp_out layer 2 feature 1 of c at last token to 2",
        f"its features are those of layer {LAYER}",
    ),
}


@pytest.mark.parametrize("case", CROSS_ERRORS)
def test_rules_that_need_a_transcoder_of_one_layer_are_errors(case: str, data: Path) -> None:
    clt_of(data)
    rule, said = CROSS_ERRORS[case]
    circuit = "circuit k = embed -> L0.mlp, L0.mlp -> logits\n" if " k " in rule else ""
    result, found = try_file(CROSS + circuit + experiment("e", rule), data, "llama")
    (problem,) = (each for each in found if each.severity == "error")
    assert result is None
    assert problem.code in ("E0342", "E0108", "E0608")
    assert said in problem.message


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_group_of_cross_layer_features_changes_those_of_each_layer(
    family: str, mode: str, data: Path
) -> None:
    """Features of a later layer are computed from inputs that those of an earlier one changed."""
    parts = clt_of(data, family)
    text = (
        ALL_CROSS + "group g = mlp_out layer 0 features 1, 2 of c, mlp_out layer 1 feature 5 of c\n"
    )
    text += experiment("e", "ablate g at tokens * with zero")
    text += experiment("f", "scale g at last token by 3")
    found = run_file(text, data, family, mode)
    for key, at, change in (
        ("e", "tokens *", lambda f, n: replaced(f, n, 0.0)),
        ("f", "last token", lambda f, n: replaced(f, n, 3 * f)),
    ):

        def changes(n: int, at: str = at, change: Any = change) -> list[Changes]:
            there, own = tokens(rows()[n], at), list[Write]()
            for layer, which in ((0, [1, 2]), (1, [5])):
                own += writes_across(
                    parts[layer], lambda f, which=which: change(f, which), there, layer=layer
                )
            return [(sorted(own, key=lambda each: each.layer or 0), ())]

        expected = worked_out(family, [()], changes, rows(), records())
        agree(found[key], (), expected, unpatched(family), most=False, large=0.02)


def test_cross_layer_features_are_no_nodes_of_circuits(data: Path) -> None:
    clt_of(data)
    text = ALL_CROSS + "circuit k = mlp_out layer 1 feature 1 of c -> logits\n"
    _, found = try_file(text + experiment("e", "ablate k at tokens * with zero"), data, "llama")
    (problem,) = (each for each in found if each.severity == "error")
    assert problem.code == "E0342"
    assert "the rest of a later MLP's output depends on its features" in problem.message
    assert "`ablate mlp_out layer 1 features 3, 12 of c" in problem.help_text


def test_group_of_cross_layer_features_is_not_trained(data: Path) -> None:
    clt_of(data)
    text = "group g = fit(atp(size: 2), prompts: p, with: zero, maximise: logit(answer), "
    text += "measure_on_training_rows: true) at features * of c at last token\n"
    text += experiment("e", "ablate g at last token with zero")
    found = codes(CROSS + text, data)
    assert "E0342" in found


def test_cross_layer_transcoder_without_decoders_is_read_but_not_changed(data: Path) -> None:
    clt_of(data)
    (data / "clt" / f"W_dec_{LAYER}.safetensors").unlink()
    rule = "clamp feature 1 of c at last token to 2"
    result, (problem,) = try_file(CROSS + experiment("e", rule), data, "llama")
    assert result is None
    assert (problem.code, "doesn't exist" in problem.message) == ("E0342", True)
    seen = experiment("e", "observe features of c at last token", measure="", stats="")
    assert run_file(CROSS + seen, data, "llama", "planned")


def test_unreadable_cross_layer_transcoders_are_errors(data: Path) -> None:
    text = experiment("e", "observe features of c at last token", measure="", stats="")

    def problem(basis: str = CROSS) -> str:
        result, (found,) = try_file(basis + text, data, "llama")
        assert result is None
        assert found.code == "E0342"
        return found.message

    make_cross_layer(data, width_of("llama"), "hook_resid_post")
    assert "doesn't say what the features read" in problem()
    (data / "clt" / "config.yaml").unlink()
    assert "doesn't say what the features read" in problem()
    (data / "clt" / "config.yaml").write_text("a: [", encoding="utf-8")
    assert "can't be read" in problem()
    make_cross_layer(data, width_of("llama"))
    (data / "clt" / f"W_enc_{LAYER}.safetensors").unlink()
    assert f"without an encoder for layer {LAYER}" in problem()
    save_file({f"W_enc_{LAYER}": torch.zeros(4, 8)}, data / "clt" / f"W_enc_{LAYER}.safetensors")
    assert f"has no tensor `b_enc_{LAYER}`" in problem()
    make_cross_layer(data, width_of("llama"))
    (data / "clt" / "W_enc_0.safetensors").unlink()
    assert "is a jumprelu cross-layer transcoder" in problem(CROSS.replace("transcoder", "sae", 1))


EXCHANGES = [
    # removed features, inserted features, position, whether the error is dropped
    ("feature 1", "feature 3", "last token", False),
    ("features 1, 4", "features 0, 3, 9", "tokens *", False),
    ("features 0..2", "features 7", "token 6", True),
]


def exchanged(
    own: Reference,
    other: Reference,
    leaving: list[int],
    coming: list[int],
    positions: Sequence[int],
    *,
    drops: bool = False,
) -> list[Write]:
    """Like `writes`: both encode the MLP's input at the same token."""
    found: list[Write] = []
    for position in positions:
        seen: list[Tensor] = []

        def note(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return x

        def act(now: Tensor, seen: list[Tensor] = seen) -> Tensor:
            x = seen[-1]
            features = own.encode(x)
            change = own.decode(replaced(features, leaving, 0.0), x) - own.decode(features, x)
            more = other.encode(x)[..., coming] @ other.weights["W_dec"][coming]
            return change + more + (own.decode(features, x) if drops else now)

        found.append(Write("mlp_norm", LAYER, note, position))
        found.append(Write("mlp_out", LAYER, act, position))
    return found


def numbers(written: str) -> list[int]:
    """The features of `features 0..2` or `features 1, 4`."""
    text = written.partition(" ")[2]
    low, dots, high = text.partition("..")
    return [*range(int(low), int(high) + 1)] if dots else [int(each) for each in text.split(",")]


OTHER = f'basis u = transcoder("other_mlp") at mlp_out layer {LAYER}\n'


LastChange = Callable[[Tensor, Tensor], Tensor]
"""New features, from those of the input and of the other run."""

OVERLAPS: dict[str, tuple[tuple[str, ...], LastChange | None, LastChange]] = {
    "set twice": (
        ("clamp {}feature 3 of {t} at last token to 4",) * 2,
        None,
        lambda f, there: replaced(f, [3], 4.0),
    ),
    "set in two groups": (
        (
            "clamp {}features 1..3 of {t} at tokens * to 2",
            "clamp {}features 2, 5 of {t} at last token to -1",
        ),
        lambda f, there: replaced(f, [1, 2, 3], 2.0),
        lambda f, there: replaced(replaced(f, [1, 3], 2.0), [2, 5], -1.0),
    ),
    "added, then scaled": (
        (
            "add 2 to {}features 2..4 of {t} at tokens *",
            "scale {}features 3..6 of {t} at last token by 3",
        ),
        lambda f, there: replaced(f, [2, 3, 4], f + 2),
        lambda f, there: (
            replaced(replaced(f, [2, 3, 4], f + 2), [3, 4, 5, 6], 3 * (f + 2))
            - replaced(torch.zeros_like(f), [5, 6], 6.0)
        ),
    ),
    "scaled to zero twice": (
        ("scale {}features 0..5 of {t} at last token by 0",) * 2,
        None,
        lambda f, there: replaced(f, range(6), 0.0),
    ),
    "all, then one": (
        (
            "scale {}features * of {t} at tokens * by 2",
            "add 1 to {}feature 3 of {t} at last token",
            "scale {}feature 3 of {t} at last token by -1",
        ),
        lambda f, there: 2 * f,
        lambda f, there: replaced(2 * f, [3], -(2 * f + 1)),
    ),
    "one, then all": (
        (
            "add 2 to {}features 1..3 of {t} at last token",
            "scale {}features * of {t} at last token by -3",
            "scale {}features * of {t} at last token by 0.5",
        ),
        None,
        lambda f, there: -1.5 * replaced(f, [1, 2, 3], f + 2),
    ),
    "another run, then one": (
        (
            "from other into clean  patch {}features * of {t} at last token",
            "scale {}features 2..5 of {t} at last token by -2",
        ),
        None,
        lambda f, there: replaced(there.expand_as(f), [2, 3, 4, 5], -2 * there),
    ),
    "some of another run, then each token": (
        (
            "from other into clean  patch {}features 2, 5..7 of {t} at last token",
            "scale {}features 4..6 of {t} at tokens * by -2",
            "scale {}features * of {t} at tokens * by 2",
        ),
        lambda f, there: 2 * replaced(f, [4, 5, 6], -2 * f),
        lambda f, there: (
            2 * replaced(replaced(f, [2, 7], there), [4, 5, 6], -2 * replaced(f, [5, 6], there))
        ),
    ),
    "one at the last token, then all at each": (
        (
            "clamp {}features 1..3 of {t} at last token to 4",
            "scale {}features * of {t} at tokens * by 2",
        ),
        lambda f, there: 2 * f,
        lambda f, there: 2 * replaced(f, [1, 2, 3], 4.0),
    ),
}
"""Rules, and the features after them at tokens before the last one (None: unchanged) and there."""


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("basis", ["skip_transcoder", "sparsify", "cross-layer"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_rules_on_the_same_transcoder_features_act_one_after_the_other(
    family: str, basis: str, mode: str, data: Path
) -> None:
    """A later rule starts from the features that earlier rules left at the token."""
    names = {key: f"e{number}" for number, key in enumerate(OVERLAPS)}
    parts = clt_of(data, family)[LAYER]
    of = make(data, "transcoder" if basis == "cross-layer" else basis, width_of(family))
    text, name, site = BASIS, "t", ""
    if basis == "cross-layer":
        text, name, site = ALL_CROSS, "c", f"mlp_out layer {LAYER} "
    for key, (rules, _, _) in OVERLAPS.items():
        text += experiment(names[key], *(rule.format(site, t=name) for rule in rules))
    found = run_file(text, data, family, mode)

    def act(change: LastChange, n: int, at: Sequence[int]) -> list[Write]:
        if basis != "cross-layer":
            there = source(family, of, n)
            return writes(of, lambda f: change(f, there), at)
        other = rows("other")[n]
        there = encode_across(parts, plain(family, other)["mlp_norm", LAYER][other.last, 0])
        return writes_across(parts, lambda f: change(f, there), at)

    for key, (_, before, last) in OVERLAPS.items():

        def changes(
            n: int, before: LastChange | None = before, last: LastChange = last
        ) -> list[Changes]:
            *first, end = tokens(rows()[n], "tokens *")
            own = [] if before is None else act(before, n, first)
            every = [*own, *act(last, n, [end])]
            return [(sorted(every, key=lambda each: each.layer or 0), ())]

        expected = worked_out(family, [()], changes, rows(), records())
        try:
            agree(found[names[key]], (), expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.mark.parametrize("mode", MANY)
def test_transcoder_features_of_earlier_rules_combine_with_other_rules(
    mode: str, data: Path
) -> None:
    """Reconstructions contain earlier changes; a rule that sets the vector discards them."""
    family = "llama"
    of = make(data, "skip_transcoder", width_of(family))
    other = make(data, "sparsify", width_of(family), "other_mlp")
    clamp, zero = (
        "clamp feature 3 of t at last token to 4",
        f"ablate mlp_out layer {LAYER} at last token with zero",
    )
    one, two = [3], [2, 3]
    text = BASIS + OTHER
    text += experiment("error", clamp, "add 1 to features 2..3 of t at last token without error")
    text += experiment(
        "whole", clamp, f"set mlp_out layer {LAYER} at last token to reconstruction of t"
    )
    text += experiment("zeroed", clamp, zero, clamp)
    out = f"set mlp_out layer {LAYER} at last token to reconstruction of u"
    text += experiment("inserted", clamp, out, clamp)
    swap = "patch features 2..3 of t at last token with features 0..8 of u"
    text += experiment("exchanged", clamp, swap, "clamp features 3..4 of t at last token to 2")
    text += experiment("swept", "for k in 2..3 { clamp feature k of t at last token to 4 }", clamp)
    text += experiment("two", clamp, "clamp feature 3 of u at last token to 4")
    found = run_file(text, data, family, mode)

    def at(n: int) -> list[int]:
        return [rows()[n].last]

    def clamped(f: Tensor) -> Tensor:
        return replaced(f, one, 4.0)

    def both(n: int) -> list[Write]:
        return [*writes(of, clamped, at(n)), *writes(other, clamped, at(n))]

    def without(f: Tensor) -> Tensor:
        return replaced(clamped(f), two, clamped(f) + 1)

    def zeroed(n: int) -> list[Write]:
        zero = Write("mlp_out", LAYER, torch.zeros(1), rows()[n].last)
        return [zero, *writes(of, clamped, at(n))]

    def inserted(n: int) -> list[Write]:
        own = writes(other, lambda f: f, at(n), keeps_error=False)
        return [*own, *writes(of, clamped, at(n))]

    def swapped(n: int) -> list[Write]:
        own = exchanged(of, other, two, [*range(9)], at(n))
        set_after = writes(of, lambda f: replaced(replaced(f, [3], f + 2), [4], 2.0), at(n))
        return [*own, *set_after]  # the exchanged feature 3 is 0

    cases: dict[str, Callable[[int], list[Write]]] = {
        "error": lambda n: writes(of, without, at(n), keeps_error=False),
        "whole": lambda n: writes(of, clamped, at(n), keeps_error=False),
        "zeroed": zeroed,
        "inserted": inserted,
        "exchanged": swapped,
        "two": both,
    }
    for name, own in cases.items():
        changes = lambda n, own=own: [(own(n), ())]  # noqa: E731
        expected = worked_out(family, [()], changes, rows(), records())
        try:
            agree(found[name], (), expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error

    def swept(n: int, k: int) -> list[Changes]:
        return [(writes(of, lambda f: replaced(f, [k, 3], 4.0), at(n)), ())]

    expected = worked_out(family, [(2,), (3,)], swept, rows(), records())
    agree(found["swept"], ("k",), expected, unpatched(family), most=False, large=0.01)


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_rules_on_the_same_transcoder_features_act_in_replies_and_runs_with_rules(
    mode: str, data: Path
) -> None:
    """Rules of the base run come before those of the experiment."""
    of = make(data, "jumprelu_transcoder", width_of("llama"))
    parts = clt_of(data)[LAYER]
    text = BASIS + ALL_CROSS
    cases: dict[str, tuple[str, Callable[..., list[Write]]]] = {
        "t": ("features 1..3 of t", lambda change, at: writes(of, change, at)),
        "c": (
            f"mlp_out layer {LAYER} features 1..3 of c",
            lambda change, at: writes_across(parts, change, at),
        ),
    }
    add, half = "add 40 to {} at last token", "scale {} at last token by 0.5"
    for name, (site, _) in cases.items():
        lines = add.format(site), half.format(site), f"generate {TOKENS}"
        text += experiment(f"g{name}", *lines, measure="measure length as raw")
        run = f"run more {{ {add.format(site)} }}  from clean into more"
        text += experiment(f"r{name}", run, half.format(site))
    found = run_file(text, data, "llama", mode, precise=True)
    for name, (_, act_at) in cases.items():

        def act(name: str, n: int, at: int, act_at: Callable[..., list[Write]] = act_at) -> Changes:
            return act_at(lambda f: replaced(f, [1, 2, 3], (f + 40) / 2), [at]), []

        def added(n: int, act_at: Callable[..., list[Write]] = act_at) -> list[Changes]:
            at = [rows()[n].last]
            return [(act_at(lambda f: replaced(f, [1, 2, 3], f + 40), at), ())]

        def halved(n: int, act_at: Callable[..., list[Write]] = act_at) -> list[Changes]:
            at = [rows()[n].last]
            return [(act_at(lambda f: replaced(f, [1, 2, 3], (f + 40) / 2), at), ())]

        wanted = [
            written("llama", n, [GenerationCase("", "last token", act)]) for n in range(len(rows()))
        ]
        assert replies(found[f"g{name}"]) == wanted
        base = np.array(worked_out("llama", [()], added, rows(), records())[()])
        expected = worked_out("llama", [()], halved, rows(), records())
        agree(found[f"r{name}"], (), expected, base, most=False)


@pytest.mark.parametrize("mode", [*MANY, "padded on the right"])
@pytest.mark.parametrize(
    ("one", "two"), [("skip_transcoder", "sparsify"), ("layer_norm", "layer_norm")]
)
@pytest.mark.parametrize("family", HERE)
def test_exchanged_transcoder_features_equal_the_reference(
    family: str, one: str, two: str, mode: str, data: Path
) -> None:
    """Both encode the MLP's input, which an earlier rule changes."""
    own = make(data, one, width_of(family))
    other = make(data, two, width_of(family), "other_mlp")
    before = f"from other into clean  patch attn_out layer {LAYER} at last token"
    text = BASIS + OTHER
    for number, (out, come, at, drops) in enumerate(EXCHANGES):
        rule = f"patch {out} of t at {at} with {come} of u" + (" without error" if drops else "")
        text += experiment(f"e{number}", f"{before}  {rule}")
    found = run_file(text, data, family, mode)
    for number, (out, come, at, drops) in enumerate(EXCHANGES):
        named = numbers(out), numbers(come)

        def changes(
            n: int, named: tuple[list[int], list[int]] = named, at: str = at, drops: bool = drops
        ) -> list[Changes]:
            spots = tokens(rows()[n], at)
            every = exchanged(own, other, *named, spots, drops=drops)
            return [([*attention_of_other(family, n), *every], ())]

        expected = worked_out(family, [()], changes, rows(), records())
        try:
            agree(found[f"e{number}"], (), expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{out} with {come}: {error}") from error


@pytest.mark.parametrize("mode", MANY)
def test_exchanged_transcoder_features_in_replies_equal_the_reference(
    mode: str, data: Path
) -> None:
    """At each step, features of the newest token's input are exchanged."""
    own = make(data, "transcoder", width_of("llama"))
    other = make(data, "sparsify", width_of("llama"), "other_mlp")
    rule = "patch features 0..5 of t at last token with features 0..8 of u"
    text = BASIS + OTHER
    text += experiment("e", f"generate {TOKENS}", rule, measure="measure length as raw")
    found = run_file(text, data, "llama", mode)["e"]

    def act(name: str, n: int, at: int) -> Changes:
        return exchanged(own, other, [*range(6)], [*range(9)], [at]), []

    case = GenerationCase(rule, "last token", act)
    wanted = [written("llama", n, [case]) for n in range(len(rows()))]
    assert replies(found) == wanted
    assert wanted != [written("llama", n, []) for n in range(len(rows()))]


def test_exchange_of_dictionaries_with_other_inputs_is_an_error(data: Path) -> None:
    width, hook = width_of("llama"), f"blocks.{LAYER}.hook_resid_mid"
    make(data, "transcoder", width)
    make(data, "transcoder", width, "other_mlp", hook_name=hook)
    text = BASIS + OTHER + f"basis n = random(dims: 3) at mlp_out layer {LAYER}\n"
    for other in ("n", "u"):
        rule = f"patch feature 1 of t at last token with feature 1 of {other}"
        assert "E0342" in codes(text + experiment("e", rule), data)
