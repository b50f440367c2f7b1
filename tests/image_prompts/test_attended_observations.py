"""Observations in Llama 3.2 Vision, against vectors and patterns that plain hooks read on the bare
model, one unpadded prompt at a time, and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from mechdsl.base.arrays import Floats

from ..quick import some
from ..reference.r_squared import r_squared_contributions
from .support import RECORDS, check_rules, experiment
from .test_attended_encoder import all_columns, column, state
from .test_attended_images import (
    CROSS,
    EACH,
    GRIDS,
    WIDTH,
    Hook,
    at,
    bare,
    block_at,
    difference,
    inputs,
    other,
    outputs,
    patch,
    read,
    run_text,
    words,
)

ALL = range(len(RECORDS))
ONE, TWO = "photo row 1 col 1 token", "photo row 2 col 2 token"
VISION = "resid_post vision layer"


def cosine(first: Tensor, second: Tensor) -> float:
    first, second = first.double(), second.double()
    return float(first @ second / first.norm() / second.norm())


def between(vectors: Tensor) -> float:
    """The mean cosine of all pairs of different vectors."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return float((unit @ unit.T).fill_diagonal_(0).sum() / len(unit) / (len(unit) - 1))


def encoded(layer: int, n: int, image: int, row: int, col: int) -> Tensor:
    return state("resid_post", layer, n, image)[column(image, row, col)]


def stream(layer: int, n: int, image: int) -> Tensor:
    return read(n, image, "resid_post", layer)[0]


def values_of(n: int, row: int, col: int) -> Tensor:
    """The values of a patch in layer 1 for the first pair of heads."""
    return read(n, n, "v cross", 1).flatten(0, -2)[patch(n, row, col)][:6]


SIMILAR: dict[str, Callable[[int], float]] = {
    f"{VISION} 1 at {ONE} with {TWO}": lambda n: cosine(
        encoded(1, n, n, 1, 1), encoded(1, n, n, 2, 2)
    ),
    f"{VISION} 2 at photo tokens": lambda n: between(state("resid_post", 2, n, n)[all_columns(n)]),
    f"{VISION} 0 with {VISION} 1 at {TWO}": lambda n: cosine(
        encoded(0, n, n, 2, 2), encoded(1, n, n, 2, 2)
    ),
    f"{VISION} 1 of clean with changed at {ONE}": lambda n: cosine(
        encoded(1, n, n, 1, 1), encoded(1, n, other(n), 1, 1)
    ),
    "resid_post layer 1 at what tokens with last token": lambda n: float(
        np.mean([cosine(stream(1, n, n)[k], stream(1, n, n)[-1]) for k in words(n)])
    ),
    "resid_post layer 0 with resid_post layer 3 at last token": lambda n: cosine(
        stream(0, n, n)[-1], stream(3, n, n)[-1]
    ),
    "resid_post layer 3 of clean with changed at last token": lambda n: cosine(
        stream(3, n, n)[-1], stream(3, n, other(n))[-1]
    ),
    f"v cross layer 1 head 0 at {ONE} with {TWO}": lambda n: cosine(
        values_of(n, 1, 1), values_of(n, 2, 2)
    ),
}


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_similarity_equals_cosines_of_the_bare_model(mode: str) -> None:
    text = "".join(
        experiment(f"s{n}", f"observe similarity {line}", measure="")
        for n, line in enumerate(SIMILAR)
    )
    for found, (line, value) in zip(run_text(text, mode), SIMILAR.items(), strict=True):
        expected = [value(n) for n in ALL]
        [measure] = found.measures
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4, err_msg=line)
        assert np.ptp(expected) > 0.02


def test_similarity_with_a_run_of_rules_equals_the_bare_model() -> None:
    """The run changes the image, or a block; vectors are read in the encoder and after it."""
    changes = ("scale resid_post vision layer 0 at photo tokens by -2", "replace block layer 1 ")
    changes = (changes[0], changes[1] + "with identity")
    text = "".join(
        experiment(
            f"e{n}{k}",
            f"run turned {{ {change} }}",
            f"observe similarity {site} of clean with turned at {at}",
            measure="",
        )
        for n, change in enumerate(changes)
        for k, (site, at) in enumerate(((f"{VISION} 2", ONE), ("resid_post layer 1", "last token")))
    )
    found = [each.measures[0].patched[0] for each in run_text(text)]

    def turned(n: int, hooks: Sequence[Hook], site: str) -> Tensor:
        seen: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            seen.append(value.clone())
            return value

        path = "model.vision_model.global_transformer.layers.0" if site == "e" else block_at(1)
        outputs(n, n, [*hooks, (path, False, keep)])
        return seen[0][0, column(n, 1, 1) if site == "e" else -1]

    for n in ALL:

        def scale(value: Tensor, n: int = n) -> Tensor:
            value = value.clone()
            value[0, all_columns(n)] *= -2
            return value

        hooks = [("model.vision_model.transformer.layers.0", False, scale)]
        plain = [turned(n, (), site) for site in "es"]
        skipped = stream(0, n, n)[-1]  # what enters block 1
        expected = [cosine(plain[k], turned(n, hooks, site)) for k, site in enumerate("es")]
        expected += [1, cosine(plain[1], skipped)]
        np.testing.assert_allclose([each[n] for each in found], expected, atol=1e-4)


SITES: dict[str, Callable[[int], Tensor]] = {
    f"{VISION} 1 at {ONE}": lambda n: encoded(1, n, n, 1, 1),
    f"{VISION} 2 at photo tokens": lambda n: state("resid_post", 2, n, n)[all_columns(n)].mean(0),
    "resid_post layer 1 at last token": lambda n: stream(1, n, n)[-1],
    f"v cross layer 1 head 0 at {ONE}": lambda n: values_of(n, 1, 1),
}
Q = np.array([float(record["n"]) for record in RECORDS])


def standardised(x: Floats, fitted: Floats) -> Floats:
    spread = fitted.std(axis=0)
    return (x - fitted.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)


def test_probes_equal_scikit_learn_on_vectors_of_the_bare_model() -> None:
    text = "".join(
        experiment(f"p{n}", f"observe probe(n, folds: 4, penalty: 1) at {line}", measure="")
        for n, line in enumerate(SITES)
    )
    for found, (line, vector) in zip(run_text(text), SITES.items(), strict=True):
        x = np.stack([vector(n).numpy().astype(float) for n in ALL])
        guesses: list[float] = []
        for n in ALL:
            own = [k for k in ALL if k != n]
            fitted = Ridge(alpha=1.0).fit(standardised(x[own], x[own]), Q[own])
            guesses.append(float(fitted.predict(standardised(x[[n]], x[own]))[0]))
        expected = r_squared_contributions(Q, np.array(guesses))
        np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-3, err_msg=line)


def patterns(n: int) -> list[Tensor]:
    """[layer] weights [head, query, key]; of blocks that attend to the image, its tokens."""
    bare().set_attn_implementation("eager")
    try:
        return [each[0] for each in outputs(n, n, output_attentions=True).attentions]
    finally:
        bare().set_attn_implementation("sdpa")


def entropy(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


def test_observed_patterns_and_values_equal_the_bare_model() -> None:
    lines = (
        "observe entropy pattern layer 2 head * at last token",
        "observe entropy pattern cross layer 3 head * at last token",
        "observe distance pattern layer 2 head * at last token",
        "observe received pattern layer 2 head * at token 4",
        "observe value resid_post layer 1 dim 3 at last token",
        f"observe value v cross layer 1 head 0 dim 2 at {TWO}",
    )
    found = run_text("".join(experiment(f"o{n}", x, measure="") for n, x in enumerate(lines)))
    for n in ALL:
        weights, last = patterns(n), len(inputs(n, n)["input_ids"][0]) - 1
        own = weights[2]
        away = torch.arange(last, -1, -1).double()
        received = own[:, 5:, 4].mean(-1)
        expected = [
            entropy(own[:, -1]),
            entropy(weights[3][:, -1]),
            own[:, -1].double() @ away,
            received,
            stream(1, n, n)[-1, 3:4],
            values_of(n, 2, 2)[2:3],
        ]
        for line, each, value in zip(lines, found, expected, strict=True):
            np.testing.assert_allclose(
                each.measures[0].patched[:, n], value, atol=1e-4, err_msg=line
            )


def equal_weights(layer: int, n: int) -> Tensor:
    """[head, width] the mean of the values that the last token can attend to."""
    site, path = ("v cross", "cross_attn") if layer in CROSS else ("v", "self_attn")
    values = read(n, n, site, layer).flatten(0, -2)
    if layer in CROSS:
        values = values[: GRIDS[n][0] * GRIDS[n][1] * EACH]  # without tiles that it doesn't fill
    heads = values.mean(0).unflatten(0, (-1, WIDTH))
    attention = bare().get_submodule(f"{block_at(layer)}.{path}")
    return heads.repeat_interleave(attention.num_key_value_groups, 0)


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_rules_inside_attention_equal_hooks_on_the_bare_model(mode: str) -> None:
    rules = (
        "scale scores layer 2 heads * at last token by 0",
        "scale scores cross layer 3 heads * at last token by 0",
        "scale pattern layer 2 heads * at last token by -2",
        "scale pattern cross layer 3 heads * at last token by -2",
        "scale q_rot layer 2 heads * at last token by 0",
    )
    found = run_text("".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules)), mode)

    def levelled(site: str, layer: int, n: int) -> Hook:
        level = equal_weights(layer, n).flatten()
        return at(site, layer, [-1], None, lambda _: level[None])

    def turned(site: str, layer: int) -> Hook:
        return at(site, layer, [-1], None, lambda value: -2 * value)

    cells = [
        [
            [levelled("z", 2, n)],
            [levelled("z cross", 3, n)],
            [turned("z", 2)],
            [turned("z cross", 3)],
            [levelled("z", 2, n)],
        ]
        for n in ALL
    ]
    expected = [
        [difference(n, n, hooks) for n, hooks in enumerate(cell)]
        for cell in zip(*cells, strict=True)
    ]
    check_rules(found, rules, [difference(n, n) for n in ALL], expected)


def test_attention_to_later_tokens_equals_a_changed_mask() -> None:
    rule = "allow attention layer 0 heads * from what tokens to last token"
    [found] = run_text(experiment("e", rule))
    attention = bare().get_submodule(f"{block_at(0)}.self_attn")
    expected: list[float] = []
    for n in ALL:

        def show(module: Any, args: Any, kwargs: dict[str, Any], n: int = n) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[..., words(n), -1] = 0
            return args, {**kwargs, "attention_mask": mask}

        bare().set_attn_implementation("eager")
        handle = attention.register_forward_pre_hook(show, with_kwargs=True)
        try:
            expected.append(difference(n, n))
        finally:
            handle.remove()
            bare().set_attn_implementation("sdpa")
    [measure] = found.measures
    np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)
    assert np.abs(measure.patched - measure.base).max() > 0.02


def test_dimensions_of_rows_equal_singular_values() -> None:
    lines = (
        "observe effective_rank resid_post layer 1 at last token",
        "observe rank resid_post layer 1 at last token",
    )
    text = "".join(experiment(f"o{n}", line, measure="") for n, line in enumerate(lines))
    effective, rank = run_text(text)
    x = torch.stack([stream(1, n, n)[-1] for n in ALL]).double()
    shares = torch.linalg.svdvals(x - x.mean(0))
    shares = shares / shares.sum()
    np.testing.assert_allclose(effective.measures[0].patched[0], float(entropy(shares).exp()))
    assert set(rank.measures[0].patched[0]) == {3}
