"""Rules on features of sparse autoencoders, against forward passes of the bare model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.resolve.cells import Coord

from ..reference.forward import Changes, Write
from .support import (
    MANY,
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)

FEATURES, K, LAYER = 12, 4, 1
HERE = ("gpt2", "llama", "gpt_neox")
ARCHITECTURES = ("standard", "topk", "jumprelu", "layer_norm")


@dataclass(frozen=True)
class Reference:
    """A dictionary computed from its formulas."""

    architecture: str
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and shift that undo the normalisation: x = given * scale + shift."""
        if self.architecture != "layer_norm":
            one = x.new_ones(*x.shape[:-1], 1)
            return one, one - 1
        mean = x.mean(-1, keepdim=True)
        return (x - mean).std(-1, keepdim=True), mean

    def encode(self, x: Tensor) -> Tensor:
        given = x
        if self.architecture == "layer_norm":
            scale, mean = self.scale(x)
            given = (x - mean) / (scale + 1e-5)
        before = (given - self.b_dec) @ self.w_enc + self.b_enc
        match self.architecture:
            case "topk":
                least = before.sort(descending=True).values[..., K - 1 : K]
                return torch.where(before >= least, before, 0.0).clamp(min=0)
            case "jumprelu":
                return torch.where(before > self.threshold, before, 0.0).clamp(min=0)
            case _:
                return before.clamp(min=0)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        scale, shift = self.scale(x)
        return (features @ self.w_dec + self.b_dec) * scale + shift


def make(folder: Path, architecture: str, width: int) -> Reference:
    """Write a dictionary of SAELens, with about half of its features active."""
    random = torch.Generator().manual_seed(len(architecture))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    weights = {
        "W_enc": draw(width, FEATURES) / 2,
        "b_enc": draw(FEATURES) / 4,
        "W_dec": draw(FEATURES, width) / 2,
        "b_dec": draw(width) / 4,
        "threshold": draw(FEATURES).abs() / 2,
    }
    normalised = architecture == "layer_norm"
    config = {
        "architecture": "standard" if normalised else architecture,
        "normalize_activations": "layer_norm" if normalised else "none",
        "k": K,
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post"},
    }
    (folder / "sae").mkdir(exist_ok=True)
    (folder / "sae" / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    kept = dict(weights) if architecture == "jumprelu" else {**weights}
    if architecture != "jumprelu":
        del kept["threshold"]
    save_file(kept, folder / "sae" / "sae_weights.safetensors")
    return Reference(architecture, *(each.double() for each in weights.values()))


def features_of(name: str, of: Reference, run: str, n: int, at: str = "last token") -> Tensor:
    """[token, feature] of one row."""
    text = rows(run)[n]
    return of.encode(plain(name, text)["resid_post", LAYER][tokens(text, at), 0])


def mean_features(name: str, of: Reference) -> Tensor:
    found = [features_of(name, of, "clean", n).mean(0) for n in range(len(rows()))]
    return torch.stack(found).mean(0)


Change = Callable[[Tensor], Tensor]
"""New features from current ones."""


def moved(of: Reference, change: Change, *, keeps_error: bool = True) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        features = of.encode(x)
        new = of.decode(change(features), x)
        return x + new - of.decode(features, x) if keeps_error else new

    return act


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
    """From the model, the dictionary, the row and the coordinates of the cell."""
    at: str = "last token"
    keeps_error: bool = True


def source(name: str, of: Reference, n: int) -> Tensor:
    return features_of(name, of, "other", n)[0]


EVERY: list[tuple[Coord, ...]] = [(feature,) for feature in range(FEATURES)]
CASES: dict[str, Case] = {
    "each feature": Case(
        "from other into clean  patch feature * of f at last token",
        ("feature",),
        EVERY,
        lambda name, of, n, i: lambda f: replaced(f, [i], source(name, of, n)),
    ),
    "joined features": Case(
        "from other into clean  patch features 2, 5..7 of f at last token",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, [2, 5, 6, 7], source(name, of, n)),
    ),
    "all features": Case(
        f"from other into clean  patch resid_post layer {LAYER} in basis f at last token",
        (),
        [()],
        lambda name, of, n: lambda f: source(name, of, n).expand_as(f),
    ),
    "zero": Case(
        "ablate features 0..5 of f at tokens * with zero",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, range(6), 0.0),
        "tokens *",
    ),
    "mean": Case(
        "ablate features * of f at last token with mean",
        (),
        [()],
        lambda name, of, n: lambda f: mean_features(name, of).expand_as(f),
    ),
    "clamp": Case(
        "for i in 0..11 { clamp feature i of f at tokens * to 3 }",
        ("i",),
        EVERY,
        lambda name, of, n, i: lambda f: replaced(f, [i], 3.0),
        "tokens *",
    ),
    "with error": Case(
        "clamp features 1..3 of f at tokens * to 2",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, [1, 2, 3], 2.0),
        "tokens *",
    ),
    "without error": Case(
        "clamp features 1..3 of f at tokens * to 2 without error",
        (),
        [()],
        lambda name, of, n: lambda f: replaced(f, [1, 2, 3], 2.0),
        "tokens *",
        keeps_error=False,
    ),
    "nothing but the error": Case(
        "scale features * of f at last token by 1 without error",
        (),
        [()],
        lambda name, of, n: lambda f: f,
        keeps_error=False,
    ),
    "each feature without error": Case(
        "from other into clean  patch feature 0..3 of f at last token without error",
        ("feature",),
        EVERY[:4],
        lambda name, of, n, i: lambda f: replaced(f, [i], source(name, of, n)),
        keeps_error=False,
    ),
    "add": Case(
        "for c in [-2, 0.5, 4] { add c to features 3..4 of f at last token }",
        ("c",),
        [(-2,), (0.5,), (4,)],
        lambda name, of, n, c: lambda f: replaced(f, [3, 4], f + c),
    ),
    "scale": Case(
        "for c in [-1, 0, 3] { scale features * of f at tokens * by c }",
        ("c",),
        [(-1,), (0,), (3,)],
        lambda name, of, n, c: lambda f: f * c,
        "tokens *",
    ),
}


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", HERE)
def test_rules_on_features_equal_the_reference(
    family: str, architecture: str, mode: str, data: Path
) -> None:
    width = plain(family, rows()[0])["resid_post", LAYER].shape[-1]
    of = make(data, architecture, width)
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = f'basis f = sae("sae") at resid_post layer {LAYER}\n' + "".join(
        experiment(names[key], case.rule) for key, case in CASES.items()
    )
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            change = case.change(family, of, n, *cell)
            act = moved(of, change, keeps_error=case.keeps_error)
            at = tokens(rows()[n], case.at)
            return [([Write("resid_post", LAYER, act, position) for position in at], ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.mark.parametrize("mode", MANY)
def test_rules_with_and_without_error_in_one_run_equal_the_reference(mode: str, data: Path) -> None:
    width = plain("llama", rows()[0])["resid_post", LAYER].shape[-1]
    of = make(data, "standard", width)
    rules = "clamp feature 1 of f at cue token to 2  clamp feature 1 of f at last token to 2"
    text = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
    text += experiment("e", f"{rules} without error")

    def changes(n: int) -> list[Changes]:
        def change(features: Tensor) -> Tensor:
            return replaced(features, [1], 2.0)

        (cue,), last = tokens(rows()[n], "cue token"), rows()[n].last
        kept, dropped = (moved(of, change, keeps_error=keeps) for keeps in (True, False))
        first = Write("resid_post", LAYER, kept, cue)
        return [([first, Write("resid_post", LAYER, dropped, last)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(run_file(text, data, "llama", mode)["e"], (), expected, unpatched("llama"), most=False)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_set_to_reconstruction_drops_the_error(architecture: str, mode: str, data: Path) -> None:
    width = plain("llama", rows()[0])["resid_post", LAYER].shape[-1]
    of = make(data, architecture, width)
    rule = f"set resid_post layer {LAYER} at tokens * to reconstruction of f"
    text = f'basis f = sae("sae") at resid_post layer {LAYER}\n' + experiment("e", rule)

    def changes(n: int) -> list[Changes]:
        def act(x: Tensor) -> Tensor:
            return of.decode(of.encode(x), x)

        at = tokens(rows()[n], "tokens *")
        return [([Write("resid_post", LAYER, act, position) for position in at], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(run_file(text, data, "llama", mode)["e"], (), expected, unpatched("llama"), most=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("patch feature 12 of f at last token", "E0301"),
        ("patch feature 0 of g at last token", "E0201"),
        ("patch attn_out layer 0 in basis wide at last token", "E0342"),
        ("observe norm feature 0 of f at last token", "E0108"),
        ("set features 0..1 of f at last token to reconstruction of f", "E0342"),
        ("add 2 to features * of f at last token", "E0342"),
        ("using gradient  patch feature 0 of f at last token", "E0608"),
        ("patch resid_post layer 1 at last token without error", "E0342"),
        ("ablate resid_post layer 1 dims 0..3 at last token with zero without error", "E0342"),
        ("set resid_post layer 1 at last token to reconstruction of f without error", "E0342"),
        ("patch feature 0 of f at last token without", "E0101"),
    ],
)
def test_invalid_feature_rules_are_errors(line: str, code: str, data: Path) -> None:
    width = plain("llama", rows()[0])["resid_post", LAYER].shape[-1]
    make(data, "standard", width)
    text = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
    text += f"basis wide = neurons at mlp_hidden layer {LAYER}\n"
    text += experiment("e", f"from other into clean  {line}")
    assert code in codes(text, data)


def test_basis_of_one_layer_applies_at_each_written_layer(data: Path) -> None:
    """A basis of another layer's dictionary is used at each layer that the rule writes."""
    width = plain("llama", rows()[0])["resid_post", LAYER].shape[-1]
    of = make(data, "jumprelu", width)
    rule = "clamp resid_post layer * in basis f at last token to 1"
    text = f'basis f = sae("sae") at resid_post layer {LAYER}\n' + experiment("e", rule)

    def changes(n: int, layer: int) -> list[Changes]:
        act = moved(of, torch.ones_like)
        at = tokens(rows()[n], "last token")
        return [([Write("resid_post", layer, act, position) for position in at], ())]

    expected = worked_out("llama", product(range(3)), changes, rows(), records())
    found = run_file(text, data, "llama", "planned")["e"]
    agree(found, ("layer",), expected, unpatched("llama"), most=False)


def test_dictionary_at_the_embedding_is_reported_at_a_site_without_layer(data: Path) -> None:
    width = plain("llama", rows()[0])["resid_post", LAYER].shape[-1]
    make(data, "standard", width)
    rule = "from other into clean  patch feature 0 of f at last token"
    text = 'basis f = sae("sae") at embed\n' + experiment("e", rule)
    _, problems = try_file(text, data, "llama")
    (found,) = (each for each in problems if each.code == "W0733")
    assert "used at `embed`\n" in render_full([found], color=False)
