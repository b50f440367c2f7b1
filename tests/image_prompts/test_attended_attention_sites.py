"""Queries, keys, scores and patterns of the encoder of Llama 3.2 Vision, and observations of its
patterns, against attention computed in the bare model, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ..quick import some
from . import test_several_attended_images as several
from .support import BLOCK, RECORDS, experiment
from .test_attended_encoder import HEADS, LOCAL, WIDTH, all_columns, column
from .test_attended_images import (
    GRIDS,
    IMAGE,
    bare,
    difference,
    folder,
    inputs,
    other,
    processor,
    run_text,
    token,
    try_text,
)

ALL = range(len(RECORDS))
LAYERS = range(LOCAL + 1)
ONE, TWO = "photo row 1 col 2 token", "photo row 2 col 1 token"
Edit = Callable[[Tensor], Tensor]
"""[image, head, query or key, …] → changed."""


@contextmanager
def attending(layer: int, edits: Mapping[str, Edit]) -> Generator[None]:
    """Let a block of the encoder attend with changed queries, keys, scores and weights."""
    encoder = "transformer" if layer < LOCAL else "global_transformer"
    path = f"model.vision_model.{encoder}.layers.{layer - LOCAL * (layer >= LOCAL)}.self_attn"
    module: Any = bare().get_submodule(path)

    def edited(site: str, value: Tensor) -> Tensor:
        return edits[site](value.clone()) if site in edits else value

    def forward(hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (
            part(hidden_states).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = edited("q_rot", q), edited("k_rot", k)
        scores = edited("scores", q @ k.transpose(-1, -2) * WIDTH**-0.5 + attention_mask)
        weights = edited("pattern", scores.softmax(-1))
        return module.o_proj((weights @ v).transpose(1, 2).flatten(2)), None

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def run(given: Mapping[str, Any]) -> Tensor:
    return bare()(**given, use_cache=False).logits[0, -1]


def gray(n: int) -> dict[str, Any]:
    """The inputs of a prompt whose image is gray."""
    picture = Image.new("RGB", Image.open(folder() / f"{n}.png").size, (128, 128, 128))
    text, made = (
        f"{IMAGE} how many {RECORDS[n]['what']} are there ? answer :",
        cast(Any, processor()),
    )
    return dict(made(text=[text], images=[[picture]], return_tensors="pt"))


def recorded(layer: int, site: str, given: Mapping[str, Any]) -> Tensor:
    """[image, head, query or key, …]"""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    with attending(layer, {site: keep}):
        run(given)
    return found[0]


def at(columns: Sequence[int], head: int, of: Callable[[Tensor], Tensor] | Tensor) -> Edit:
    """Change the vectors of one head at some columns of the first image."""

    def edit(value: Tensor) -> Tensor:
        here = 0, head, list(columns)
        value[here] = of(value[here]) if callable(of) else of[here]
        return value

    return edit


HIDDEN = BLOCK.replace("corrupt changed { file = other }", "corrupt hidden { mask photo }")
SITES = ("q_rot", "k_rot", "scores", "pattern")


def copied(site: str, layer: int, columns: Callable[[int], Sequence[int]]) -> Any:
    """(prompt, head) → the edit that writes the vectors of a gray image."""
    return lambda n, head: {site: at(columns(n), head, recorded(layer, site, gray(n)))}


def one(n: int) -> list[int]:
    return [column(n, 1, 2)]


CASES: dict[str, tuple[int, Callable[[int, int], dict[str, Edit]]]] = {
    **{
        f"patch {site} vision layer {layer} head * at {ONE}": (layer, copied(site, layer, one))
        for site, layer in zip(SITES, (0, 1, 2, 0), strict=True)
    },
    "patch pattern vision layer 2 head * at photo tokens": (2, copied("pattern", 2, all_columns)),
    "patch q_rot vision layer 1 head * at photo tokens": (1, copied("q_rot", 1, all_columns)),
    f"scale scores vision layer 1 head * at {ONE} by -1": (
        1,
        lambda n, head: {"scores": at(one(n), head, torch.neg)},
    ),
    f"swap scores vision layer 2 head * at {ONE} with {TWO}": (
        2,
        lambda n, head: {
            "scores": at([column(n, 1, 2), column(n, 2, 1)], head, lambda x: x.flip(0))
        },
    ),
    "ablate pattern vision layer 0 head * at photo tokens with zero": (
        0,
        lambda n, head: {"pattern": at(all_columns(n), head, torch.zeros_like)},
    ),
}


@pytest.mark.parametrize("mode", some(["planned", "small passes", "plain"], ["planned"]))
def test_rules_within_attention_equal_changed_attention_of_the_bare_encoder(mode: str) -> None:
    """Vectors of a gray image of the same size, and numbers. Padding next to tiles has weights."""
    text = "".join(
        experiment(f"e{n}", "from hidden into clean", rule) for n, rule in enumerate(CASES)
    )
    base, largest = [difference(n, n) for n in ALL], list[float]()
    for found, (rule, (layer, edits)) in zip(
        run_text(text, mode, HIDDEN), CASES.items(), strict=True
    ):
        expected = np.zeros((HEADS, len(ALL)))
        for head in range(HEADS):
            for n in ALL:
                with attending(layer, edits(n, head)):
                    expected[head, n] = difference(n, n)
        [measure] = found.measures
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, expected, atol=2e-4, err_msg=rule)
        largest.append(float(np.abs(expected - base).max()))
    assert min(largest) > 0.01, largest
    assert max(largest) > 0.1


def entropy(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


def places(n: int) -> dict[int, tuple[int, int]]:
    """Column of each patch → its row and column over all tiles."""
    rows, cols = (2 * each for each in GRIDS[n])
    return {column(n, r, c): (r, c) for r in range(1, rows + 1) for c in range(1, cols + 1)}


def distance(n: int, weights: Tensor, window: float = np.inf) -> float:
    """The mean distance of the patch of `ONE`, weights [query, key]."""
    away = {
        key: min(window, float(np.hypot(row - 1, col - 2))) for key, (row, col) in places(n).items()
    }
    seen = weights[column(n, 1, 2), list(away)].double()
    return float(seen @ torch.tensor([*away.values()], dtype=torch.float64) / seen.sum())


def received(n: int, weights: Tensor) -> float:
    """The mean weight of the other patches of the image on the patch of `TWO`."""
    key = column(n, 2, 1)
    return float(weights[[each for each in places(n) if each != key], key].mean())


OBSERVED: dict[str, Callable[[int, Tensor], float]] = {
    f"observe entropy pattern vision layer * head * at {ONE}": (
        lambda n, weights: float(entropy(weights[column(n, 1, 2)]))
    ),
    f"observe distance pattern vision layer * head * at {ONE}": distance,
    f"observe distance(1) pattern vision layer * head * at {ONE}": (
        lambda n, weights: distance(n, weights, 1)
    ),
    f"observe received pattern vision layer * head * at {TWO}": received,
}


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_observations_of_patterns_equal_weights_of_the_bare_encoder(mode: str) -> None:
    """Entropy counts the weights on class tokens and padding; distances are over all tiles."""
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(OBSERVED))
    weights = {
        (layer, n): recorded(layer, "pattern", inputs(n, n)) for layer in LAYERS for n in ALL
    }
    for found, (line, of) in zip(run_text(text, mode), OBSERVED.items(), strict=True):
        expected = [
            [of(n, weights[layer, n][0, head]) for n in ALL]
            for layer in LAYERS
            for head in range(HEADS)
        ]
        np.testing.assert_allclose(found.measures[0].patched, expected, atol=1e-4, err_msg=line)
        assert np.ptp(expected) > 0.01, line


def test_rules_and_observations_in_the_second_of_two_images_equal_the_bare_encoder() -> None:
    """Together with observed attention, whose keys are tokens."""
    where = "two row 1 col 2 token"
    lines = (
        f"observe entropy pattern vision layer 1 head * at {where}",
        f"observe distance pattern vision layer 1 head * at {where}",
        f"observe received pattern vision layer 1 head * at {where}",
        f"observe attention vision layer 1 head * from {where} to two row 1 col 1 token",
    )
    text = "".join(
        several.of_block("pair", f"o{n}", line, measure="") for n, line in enumerate(lines)
    )
    rule = f"scale pattern vision layer 1 head * at {where} by -2"
    text += several.of_block("pair", "rule", rule)
    found = several.run_text(text)
    rows = np.zeros((len(lines) + 1, HEADS, len(ALL)))
    for n in ALL:
        given, image = several.inputs("pair", n), other(n)
        weights = recorded(1, "pattern", given)[1]
        here = column(image, 1, 2)
        for head in range(HEADS):
            own = weights[head]
            away = distance(image, own)
            paid = own[[each for each in places(image) if each != here], here].mean()

            def scaled(value: Tensor, head: int = head, here: int = here) -> Tensor:
                value[1, head, here] *= -2
                return value

            with attending(1, {"pattern": scaled}):
                value = several.difference(n, several.outputs(given))
            rows[:, head, n] = (
                float(entropy(own[here])),
                away,
                float(paid),
                float(own[here, column(image, 1, 1)]),
                value,
            )
    for number in range(len(lines)):
        seen = found[f"o{number}"].measures[0].patched
        np.testing.assert_allclose(seen, rows[number], atol=1e-4, err_msg=lines[number])
    changed = found["rule"].measures[0]
    np.testing.assert_allclose(changed.patched, rows[-1], atol=2e-4)
    assert np.abs(changed.patched - changed.base).max() > 0.01


def test_runs_and_replies_with_changed_patterns_equal_the_bare_encoder() -> None:
    rule = "scale pattern vision layer 0 heads * at photo tokens by -2"
    text = experiment("r", "generate 4", rule, measure='measure matches("1|2|3") as raw')
    text += experiment(
        "d",
        f"run turned {{ {rule} }}",
        "from turned into clean",
        f"patch pattern vision layer 2 heads * at {ONE}",
    )
    replies, derived = run_text(text)
    assert replies.replies is not None
    differ, expected = 0, list[float]()
    for n in ALL:

        def scaled(value: Tensor, n: int = n) -> Tensor:
            value[0, :, all_columns(n)] *= -2
            return value

        with attending(0, {"pattern": scaled}):
            source = recorded(2, "pattern", inputs(n, n))
            ids, given = list[int](), inputs(n, n)
            for _ in range(4):
                best = int(run(several.followed(given, ids)).argmax())
                if best == token("</s>"):
                    break
                ids.append(best)
        assert [*replies.replies.cells[0][n][0].ids] == ids
        differ += ids != [*replies.replies.runs["clean"][n][0].ids]

        def write(value: Tensor, n: int = n, source: Tensor = source) -> Tensor:
            value[0, :, one(n)] = source[0, :, one(n)]
            return value

        with attending(2, {"pattern": write}):
            expected.append(difference(n, n))
    assert differ
    np.testing.assert_allclose(derived.measures[0].patched[0], expected, atol=2e-4)
    assert np.abs(derived.measures[0].patched - derived.measures[0].base).max() > 0.001


ERRORS = {
    f"patch pattern vision layer 0 head 0 at {ONE}": ("E0108", "different rows and columns"),
    f"ablate scores vision layer 0 head 0 at {ONE} with mean of clean": (
        "E0108",
        "with values of all rows",
    ),
}


@pytest.mark.parametrize("line", ERRORS)
def test_vectors_over_keys_of_other_images_report_an_error(line: str) -> None:
    _, found = try_text(experiment("e", "from clean into changed", line))
    [problem] = [each for each in found if each.severity == "error"]
    code, reason = ERRORS[line]
    assert problem.code == code
    assert reason in problem.message
