"""Attention between patches in the encoder of Llama 3.2 Vision, against attention with changed
weights in the bare model, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from .support import RECORDS, experiment
from .test_attended_blocks import replaced, tower
from .test_attended_encoder import HEADS, LOCAL, WIDTH, all_columns, column
from .test_attended_images import GRIDS, at, bare, difference, read, replied, run_text, try_text

ALL = range(len(RECORDS))
Change = Callable[[Tensor], Tensor]
"""Weights [head, query, key] → changed ones."""


@contextmanager
def attended(layer: int, change: Change) -> Generator[None]:
    """Let a block of the encoder attend with changed weights."""
    encoder = "transformer" if layer < LOCAL else "global_transformer"
    path = f"model.vision_model.{encoder}.layers.{layer - LOCAL * (layer >= LOCAL)}.self_attn"
    module: Any = bare().get_submodule(path)

    def forward(hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (
            part(hidden_states)[0].unflatten(-1, (HEADS, WIDTH)).transpose(0, 1)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        scores = q @ k.transpose(1, 2) * WIDTH**-0.5 + attention_mask[0]
        weights = change(scores.softmax(-1).clone())
        return module.o_proj((weights @ v).transpose(0, 1).flatten(1)[None]), weights

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def edges(queries: Sequence[int], keys: Sequence[int], head: int | None, of: Change) -> Change:
    """Change the weights of keys [query, key of the rule] and normalise as the rule says."""

    def change(weights: Tensor) -> Tensor:
        for h in range(HEADS) if head is None else [head]:
            for query in queries:
                row = weights[h, query]
                weights[h, query] = of_keys(row, list(keys), of)
        return weights

    return change


def of_keys(row: Tensor, keys: list[int], of: Change) -> Tensor:
    row = row.clone()
    row[keys] = of(row[keys])
    return row


def normalised(change: Change) -> Change:
    def apply(weights: Tensor) -> Tensor:
        new = change(weights)
        return new / new.sum(-1, keepdim=True)

    return apply


def fixed(value: float, queries: Sequence[int], keys: Sequence[int]) -> Change:
    """Set the weights of keys; the others share the rest in proportion."""

    def change(weights: Tensor) -> Tensor:
        for query in queries:
            rows = weights[:, query]
            others = torch.ones(rows.shape[-1], dtype=torch.bool)
            others[list(keys)] = False
            rest = rows[:, others] / rows[:, others].sum(-1, keepdim=True)
            rows[:, others] = rest * (1 - value * len(keys))
            rows[:, list(keys)] = value
        return weights

    return change


def equal(row: Tensor) -> Tensor:
    return row.mean().expand_as(row)


def first_row(n: int) -> list[int]:
    return [column(n, 1, col) for col in range(1, 2 * GRIDS[n][1] + 1)]


ROW = "photo row 1 col * tokens"
ONE, TWO = "photo row 1 col 1 token", "photo row 2 col 2 token"
RULES: dict[str, list[tuple[int, Callable[[int], Change]]]] = {
    f"block attention vision layer * heads * from photo tokens to {ROW}": [
        (layer, lambda n: normalised(edges(all_columns(n), first_row(n), None, torch.zeros_like)))
        for layer in range(LOCAL + 1)
    ],
    f"reweight attention vision layer 1 head * from photo tokens to {ONE} by 9": [
        (
            1,
            lambda n, head=head: normalised(
                edges(all_columns(n), [column(n, 1, 1)], head, lambda row: 9 * row)
            ),
        )
        for head in range(HEADS)
    ],
    f"set attention vision layer 2 heads * from photo tokens to {TWO} to 0.9": [
        (2, lambda n: fixed(0.9, all_columns(n), [column(n, 2, 2)]))
    ],
    f"set attention vision layer 1 heads * from photo tokens to {ROW} to uniform": [
        (
            1,
            lambda n: edges(
                all_columns(n), first_row(n), None, lambda row: row.mean().expand_as(row)
            ),
        )
    ],
}


def values(layer: int, change: Callable[[int], Change]) -> list[float]:
    found: list[float] = []
    for n in ALL:
        with attended(layer, change(n)):
            found.append(difference(n, n))
    return found


def check(found: ExperimentResult, expected: Sequence[Sequence[float]]) -> None:
    """Compare the cells of an experiment, each with an effect above 0.1."""
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], [difference(n, n) for n in ALL], atol=1e-4)
    np.testing.assert_allclose(measure.patched, expected, atol=2e-4)
    assert (np.abs(measure.patched - measure.base).max(axis=1) > 0.1).all()


@pytest.mark.parametrize("mode", some(["planned", "plain", "small passes"], ["planned"]))
def test_rules_on_attention_equal_changed_weights_of_the_bare_encoder(mode: str) -> None:
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(RULES))
    for found, cells in zip(run_text(text, mode), RULES.values(), strict=True):
        check(found, [values(*cell) for cell in cells])


def patterns(layer: int, n: int) -> Tensor:
    """[head, query, key]"""
    found: list[Tensor] = []

    def keep(weights: Tensor) -> Tensor:
        found.append(weights.clone())
        return weights

    with attended(layer, keep):
        difference(n, n)
    return found[0]


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_observed_attention_equals_weights_of_the_bare_encoder(mode: str) -> None:
    lines = (
        f"observe attention vision layer * head * from {ONE} to {TWO}",
        f"observe attention vision layer 2 head * from {TWO} to photo tokens",
        f"observe attention vision layer 1 head 1 from {TWO} to {ROW}",
    )
    text = "".join(experiment(f"o{n}", line, measure="") for n, line in enumerate(lines))
    single, every, row = (each.measures[0].patched for each in run_text(text, mode))
    for n in ALL:
        own = [patterns(layer, n) for layer in range(LOCAL + 1)]
        first, last = column(n, 1, 1), column(n, 2, 2)
        expected = torch.stack([each[:, first, last] for each in own]).flatten()
        np.testing.assert_allclose(single[:, n], expected, atol=1e-5)
        expected = own[2][:, last, all_columns(n)].sum(-1)
        np.testing.assert_allclose(every[:, n], expected, atol=1e-5)
        expected = own[1][1, last, first_row(n)].sum()
        np.testing.assert_allclose(row[0, n], expected, atol=1e-5)
    assert single.max() > 0.05


BLOCKED = "block attention vision layer 1 heads * from photo tokens to photo tokens"


def blocked(n: int) -> Change:
    return normalised(edges(all_columns(n), all_columns(n), None, torch.zeros_like))


def test_replies_runs_and_other_rules_with_blocked_attention_equal_hooks() -> None:
    """Edges act in the prefill, whose image later tokens attend to."""
    text = experiment("r", "generate 4", BLOCKED, measure='measure matches("1|2|3") as raw')
    text += experiment("s", BLOCKED, "replace block vision layer 0 with identity")
    text += experiment(
        "d",
        f"run turned {{ {BLOCKED} }}",
        "from turned into clean",
        "patch resid_post layer 2 at last token",
    )
    replies, skipped, derived = run_text(text)
    assert replies.replies is not None
    differ, own, streams = 0, list[float](), list[float]()
    for n in ALL:
        with attended(1, blocked(n)):
            reply = replied(n, ())
            vector = read(n, n, "resid_post", 2)
            with replaced({tower(0): None}):
                own.append(difference(n, n))
        assert [*replies.replies.cells[0][n][0].ids] == reply
        differ += reply != replied(n, ())
        streams.append(difference(n, n, [at("resid_post", 2, [-1], None, vector)]))
    assert differ
    check(skipped, [own])
    check(derived, [streams])


ERRORS = {
    f"block attention vision layer 0 heads * from last token to {ONE}": "E0310",
    f"allow attention vision layer 0 heads * from {ONE} to {TWO}": "E0332",
    f"block attention vision layer 9 heads * from {ONE} to {TWO}": "E0302",
}


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_invalid_edge_reports_the_code_before_anything_runs(line: str, code: str) -> None:
    _, found = try_text(experiment("e", line))
    assert next(each.code for each in found if each.severity == "error") == code
