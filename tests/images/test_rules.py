"""Every rule at positions of images against plain hooks on the bare model: one image at a time, in
fp64, prepared by the processor of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from ..reference.forward import Write
from ..rules.support import agree
from . import support, texts
from .cases import CASES, EVERY, FUNCTIONS, TEXT_CASES, Case
from .support import CLASSIFIERS, DUALS, FRONT, GRID, MORE, difference, plain
from .texts import TextView
from .views import ALL, DEEP, PART, View

NAMES = (*CLASSIFIERS, *MORE, *DUALS)
QUICK = ("vit", "dinov2_with_registers", "siglip/dual")
MODES = ("planned", "plain", "small passes")
FAMILIES = some(NAMES, QUICK)
Cells = dict[tuple[Any, ...], list[float]]


def run(name: str, mode: str, text: str, view: type[View] = View) -> dict[str, ExperimentResult]:
    with TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(FUNCTIONS, encoding="utf-8")
        texts.write(Path(folder))
        return support.run_file(text, Path(folder), name, mode, view(name, 0, "own").blocks)


def table(view: type[View]) -> Mapping[str, Case]:
    return TEXT_CASES if view is TextView else CASES


@cache
def results(view: type[View], name: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file."""
    text = "".join(case.text(view, name, key) for key, case in table(view).items())
    return run(name, mode, text, view)


def views(name: str, base: str = "own", view: type[View] = View) -> list[View]:
    return [view(name, number, base) for number in range(3)]  # type: ignore[arg-type]


@cache
def worked_out(view: type[View], name: str, key: str) -> tuple[np.ndarray, Cells]:
    """Base values, and the value of every cell and row."""
    case = table(view)[key]
    every = views(name, case.base, view)
    start = [v.start if case.start is None else v.run(case.start(v)) for v in every]
    found: Cells = {
        tuple(cell): [v.value(v.run(case.acts(v, *cell))) for v in every] for cell in case.cells
    }
    return np.array([v.value(seen) for seen, v in zip(start, every, strict=True)]), found


def hold(view: type[View], key: str, name: str, mode: str) -> None:
    base, expected = worked_out(view, name, key)
    axes = table(view)[key].axes
    agree(results(view, name, mode)[key], axes, expected, base, large=0.1, most=False)


def runs(
    keys: Iterable[str], names: Sequence[str], quick: Sequence[str], step: int = 1
) -> list[Any]:
    """All combinations; by default each key, or every third with `step` 3, uses one model."""
    every = [*keys][::step]
    fast = {(key, quick[number % len(quick)], "planned") for number, key in enumerate(every)}
    return [
        pytest.param(*each, marks=() if each in fast else pytest.mark.slow)
        for each in itertools.product(keys, names, MODES)
    ]


@pytest.mark.parametrize(("key", "name", "mode"), runs(CASES, NAMES, QUICK))
def test_image_rule_equals_hooks(key: str, name: str, mode: str) -> None:
    """Each effect exceeds 0.1 on logits, or on scores of models with two towers."""
    hold(View, key, name, mode)


@pytest.mark.parametrize(("key", "name", "mode"), runs(TEXT_CASES, DUALS, ["clip/dual"], 3))
def test_text_tower_rule_equals_hooks(key: str, name: str, mode: str) -> None:
    """Each effect exceeds 0.1 on the score of a text with its image."""
    hold(TextView, key, name, mode)


# --- tokens that some models have -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "written", "at"),
    [
        ("dinov2_with_registers", "each register token", [1, 2, 3, 4]),
        ("dinov2_with_registers", "register 3 token", [3]),
        ("deit", "distillation token", [1]),
    ],
)
def test_rule_at_register_and_distillation_tokens_equals_hooks(
    name: str, written: str, at: Sequence[int]
) -> None:
    text = support.experiment("e", f"set mlp_hidden layers 0..1 neurons 1, 3 at {written} to 8")
    found = run(name, "planned", text)["e"]
    like = plain(name, 0).sites["mlp_hidden", 0][0, 0]
    eight = torch.full_like(like, 8)
    expected: Cells = {}
    for number, token in enumerate(at):
        writes = [Write("mlp_hidden", layer, eight, token, unit) for layer in (0, 1)
                  for unit in (1, 3)]  # fmt: skip
        key = (f"register {number + 1}",) if len(at) > 1 else ()
        expected[key] = [difference(v.run(writes), v.number) for v in views(name)]
    base = np.array([difference(v.start, v.number) for v in views(name)])
    agree(found, ("position",) if len(at) > 1 else (), expected, base)


# --- derived experiments --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_at_top_patches_and_heads_equal_hooks(name: str) -> None:
    """Another experiment ranks the patches of each image and the heads."""
    text = "".join(
        (
            support.experiment("caap", "ablate embed at each token of image with zero"),
            support.experiment("heads", f"ablate layer * head * at {ALL} with zero"),
            support.experiment("patches", "ablate embed at top 25% of caap tokens with zero"),
            support.experiment("best", f"scale top 2 of heads at {ALL} by 3"),
        )
    )
    found = run(name, "planned", text)
    measure = found["caap"].measures[0]
    deltas = measure.patched - measure.base
    order = found["heads"].measures[0]
    means = (order.patched - order.base).mean(1)
    heads = [divmod(int(n), 4) for n in np.argsort(-means, kind="stable")[:2]]
    patches: list[float] = []
    scaled: list[float] = []
    for v in views(name):
        best = np.argsort(-deltas[:, v.number], kind="stable")[: GRID * GRID // 4]
        acts = [act for n in best for act in v.make("embed", 0, EVERY[n], 0.0)]
        patches.append(difference(v.run(acts), v.number))
        acts = [act for n, h in heads for act in v.make("z", n, ALL, lambda x: 3 * x, [h])]
        scaled.append(difference(v.run(acts), v.number))
    base = np.array([difference(v.start, v.number) for v in views(name)])
    agree(found["patches"], (), {(): patches}, base)
    agree(found["best"], (), {(): scaled}, base)


@pytest.mark.parametrize("name", FAMILIES)
def test_resample_uses_one_donor_image_for_all_tokens_and_layers(name: str) -> None:
    """Each image has one donor image, and each image is a donor once."""
    text = support.experiment("e", f"ablate layers * head * at {ALL} with resample")
    measure = run(name, "planned", text)["e"].measures[0]
    base = np.array([difference(v.start, v.number) for v in views(name)])
    donors: list[set[int]] = []
    for v in views(name):
        able = {n for n in range(3) if n != v.number}
        for head in range(4):
            acts = {n: v.copy("z", DEEP, ALL, [head], of=plain(name, n)) for n in range(3)}
            values = {n: difference(v.run(each), v.number) for n, each in acts.items()}
            near = {n for n, x in values.items() if abs(x - measure.patched[head, v.number]) < 1e-4}
            able &= near
        donors.append(able)
    assert sorted(n for own in donors for n in own) == [0, 1, 2], donors
    assert np.abs(measure.patched - base).max() > 0.1


# --- observations and saved vectors ---------------------------------------------------------------


def entropy(weights: Tensor) -> float:
    return float(-(weights * weights.log()).sum())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_image_observations_equal_hooks(name: str, mode: str) -> None:
    """Observations without rules, and of a patched run on the gray image."""
    front, far = View(name, 0, "own").front, "image row 2 col 3 token"
    lines = (
        "observe norm resid_post layer * at each token of image as lengths",
        f"observe value mlp_hidden layer 1 neuron 0..3 at {far} as value",
        f"observe entropy pattern layer * head * at {front} as spread",
        f"observe attention layer * head * from {front} to {PART} as paid",
        f"observe similarity resid_post layer * at {far} with image row 4 col 4 token as alike",
        f"observe similarity resid_post layer * of neutral with clean at {far} as near",
        f"observe similarity resid_post layer * of clean with neutral at {far} as gray",
        f"observe effective_rank resid_post layer * of clean at {far} as dims",
    )
    text = support.experiment("e", *lines, measure="")
    rule = f"from scenes into neutral\n  patch resid_post layer 0 at {PART}"
    text += support.experiment(
        "then", rule, *(line.replace(" as ", " as new_") for line in lines[:4]), measure=""
    )
    found = run(name, mode, text)
    every = views(name)
    runs = {
        "e": [v.start for v in every],
        "then": [
            v.run(v.copy("resid_post", 0, PART, of=v.image("own"))) for v in views(name, "gray")
        ],
    }
    v = every[0]
    at, [there] = v.at(front)[0], v.at(far)
    for key, seen in runs.items():
        expected = {
            "lengths": [
                [float(s.sites["resid_post", n][t, 0].norm()) for s in seen]
                for n in DEEP for t in v.at(ALL)
            ],
            "value": [
                [float(s.sites["mlp_hidden", 1][there, n, 0]) for s in seen] for n in range(4)
            ],
            "spread": [
                [entropy(s.sites["pattern", n][at, h]) for s in seen]
                for n in DEEP for h in range(4)
            ],
            "paid": [
                [float(s.sites["pattern", n][at, h, v.at(PART)].sum()) for s in seen]
                for n in DEEP for h in range(4)
            ],
        }  # fmt: skip
        if key == "e":
            corner = v.at("image row 4 col 4")[0]
            streams = [[s.sites["resid_post", n][:, 0] for s in seen] for n in DEEP]
            gray = [plain(name, None).sites["resid_post", n][there, 0] for n in DEEP]
            expected["alike"] = [[cosine(x[there], x[corner]) for x in own] for own in streams]
            expected["near"] = expected["gray"] = [
                [cosine(x[there], other) for x in own]
                for own, other in zip(streams, gray, strict=True)
            ]
            dims = found["e.dims"].measures[0].patched
            for own, value in zip(streams, dims, strict=True):
                vectors = torch.stack([x[there] for x in own])
                sizes = torch.linalg.svdvals(vectors - vectors.mean(0))[:2]
                np.testing.assert_allclose(value, np.exp(entropy(sizes / sizes.sum())), rtol=1e-3)
        for label, values in expected.items():
            measured = found[f"{key}.{'new_' * (key == 'then')}{label}"].measures[0].patched
            np.testing.assert_allclose(measured, values, rtol=1e-3, atol=1e-4, err_msg=label)
            assert np.std(values) > 1e-2, label


@pytest.mark.parametrize("name", [*FAMILIES, *support.ENCODERS])
def test_saved_image_vectors_equal_hooks(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    lines = [f'save resid_post layer 1..2 at {PART} to "own.safetensors"']
    measure = "measure cosine(resid_post layer 0, clean) at image row 1 col 1 token as raw"
    support.run_file(support.experiment("e", *lines, measure=measure), tmp_path, name)
    saved = load_file(tmp_path / "own.safetensors")
    tokens = View(name, 0, "own").at(PART)
    for layer in (1, 2):
        found = saved[f"resid_post.layer{layer}"].reshape(3, len(tokens), -1)
        wanted = [plain(name, n).sites["resid_post", layer][tokens, 0].numpy() for n in range(3)]
        for row in wanted:
            assert np.abs(found - row).max((1, 2)).min() < 1e-3


@pytest.mark.parametrize("name", support.ENCODERS)
@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
def test_encoder_measures_of_activations_equal_hooks(name: str, mode: str) -> None:
    lines = ["from scenes into neutral", "patch resid_post layer 0 at each token of image"]
    measure = "measure cosine(resid_post layer 1, neutral) at cls token as raw"
    found = run(name, mode, support.experiment("e", *lines, measure=measure))["e"]
    assert FRONT[name]
    own = plain(name, None).sites["resid_post", 1][0, 0]
    expected = [
        [
            cosine(v.run(v.copy("resid_post", 0, at)).sites["resid_post", 1][0, 0], own)
            for v in views(name, "gray")
        ]
        for at in EVERY
    ]
    np.testing.assert_allclose(found.measures[0].patched, expected, atol=1e-4)
    assert found.measures[0].patched.min() < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_jacobian_of_a_classifier_equals_finite_differences(name: str) -> None:
    """A classifier has one output per image, whatever the token."""
    site = "resid_post layer 0"
    where = "at image row 1 col 1 token"
    line = f"basis j = jacobian(scenes, {site} -> logits, dims: 2) at {site} {where}\n"
    rule = f"ablate {site} in basis j {where} with zero"
    found = run(name, "planned", line + support.experiment("e", rule))["e"]
    token, step = FRONT[name], 1e-3
    products: list[Tensor] = []
    for v in views(name):
        now = plain(name, v.number).sites["resid_post", 0][token]
        sides: list[Tensor] = []
        for sign in (1, -1):
            moved = [now + sign * step * one for one in torch.eye(now.shape[-1]).to(now)]
            sides.append(
                torch.stack([v.run([Write("resid_post", 0, x, token)]).output for x in moved])
            )
        own = (sides[0] - sides[1]) / (2 * step)
        products.append(own @ own.T)
    vectors = torch.linalg.eigh(torch.stack(products).mean(0))[1].T.flip(0)[:2]
    expected: list[float] = []
    for v in views(name):
        now = plain(name, v.number).sites["resid_post", 0][token]
        write = Write("resid_post", 0, now - now @ vectors.T @ vectors, token)
        expected.append(difference(v.run([write]), v.number))
    base = np.array([difference(v.start, v.number) for v in views(name)])
    agree(found, (), {(): expected}, base)
