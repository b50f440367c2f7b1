"""`top 3 of attn tokens`: keys ranked by an observation, against the model's attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from .support import MODES, PLAIN, checked, experiment, model, patched, run, without_tokens

LOOK = "observe attention layer 2 head 3 from last token to token * align left as attn"
RAW = "measure logit(answer) as raw"


@torch.no_grad()
def seen(ids: list[int], layer: int = 2, head: int = 3) -> list[float]:
    """Attention from the last token to each key, [key]."""
    net = copy.deepcopy(model())
    net.set_attn_implementation("eager")
    found = net(torch.tensor([ids]), output_attentions=True).attentions[layer]
    return found[0, head, -1].tolist()


def rows_of(text: str, name: str) -> dict[int, list[int]]:
    """Row id → its tokens."""
    table = next(e.table for e in checked(text).experiments if e.name == name)
    return dict(zip(table.row_ids, (list(r.ids) for r in table.runs["clean"].rows), strict=True))


def held(text: str, found: ExperimentResult, count: int) -> None:
    """Compare each row with the model without the embeddings of its most attended keys."""
    ids = rows_of(text, found.name)
    values = patched(found)[0]
    picked: set[tuple[int, ...]] = set()
    for row, answer, value in zip(
        found.row_ids or (), answers(text, found.name), values, strict=True
    ):
        weights = np.array(seen(ids[row]))
        best = sorted(np.argsort(-weights)[:count].tolist())
        picked.add(tuple(best))
        np.testing.assert_allclose(value, without_tokens(ids[row], best, answer)[0], atol=1e-3)
    assert len(picked) > 1, "every row has the same tokens"


def answers(text: str, name: str) -> list[int]:
    experiment = next(e for e in checked(text).experiments if e.name == name)
    (texts,) = experiment.measures[0].atoms[0].texts.values()
    return [ids[0] for ids in texts]


@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
def test_ablated_top_attended_tokens_equal_reference(mode: str) -> None:
    text = experiment("then", "ablate embed at top 3 of attn tokens with zero", RAW)
    text += experiment("look", LOOK)
    found = run(text, without=MODES[mode])
    held(text, found["then"], 3)
    assert "attn" in found["then"].conventions["top 3 of attn tokens"]


def test_ranking_is_named_by_observation_or_experiment() -> None:
    rule = "block attention layers * from last token to top 2 of {} tokens"
    measure = "measure logit(answer) as delta"
    look = experiment("look", LOOK.removesuffix(" as attn"))
    by_name = run(experiment("a", rule.format("attn"), measure) + experiment("look", LOOK))
    by_experiment = run(experiment("a", rule.format("look"), measure) + look)
    plain = run(experiment("a", rule.format("look"), measure) + look, without=PLAIN)
    values = [patched(found["a"]) for found in (by_name, by_experiment, plain)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_allclose(values[0], values[2], atol=1e-4)
    assert np.abs(values[0] - by_name["a"].measures[0].base).min() > 1e-4


def test_token_rank_is_the_maximum_over_heads() -> None:
    """A key is ranked by the head with the highest attention to it."""
    look = "observe attention layer 2 head 0, 3 from last token to token * align left"
    text = experiment("then", "ablate embed at best of look token with zero", RAW)
    text += experiment("look", look)
    found = run(text)["then"]
    ids = rows_of(text, "then")
    row_ids = found.row_ids or ()
    for row, answer, value in zip(row_ids, answers(text, "then"), patched(found)[0], strict=True):
        weights = np.maximum(seen(ids[row], 2, 0), seen(ids[row], 2, 3))
        by_hand = without_tokens(ids[row], [int(np.argmax(weights))], answer)[0]
        np.testing.assert_allclose(value, by_hand, atol=1e-3)


def test_swept_queries_are_ranked_if_keys_are_fixed() -> None:
    look = "observe attention layer 2 head 3 from token * align left to first token"
    text = experiment("then", "ablate embed at best of look token with zero", RAW)
    text += experiment("look", look)
    found = run(text)["then"]
    (look_result,) = (e for e in run(text).values() if e.name == "look")
    seen_first = look_result.measures[0].patched
    ids = rows_of(text, "then")
    row_ids = found.row_ids or ()
    for column, (row, answer) in enumerate(zip(row_ids, answers(text, "then"), strict=True)):
        best = int(np.nanargmax(seen_first[:, column]))
        by_hand = without_tokens(ids[row], [best], answer)[0]
        np.testing.assert_allclose(patched(found)[0][column], by_hand, atol=1e-3)


def test_tokens_are_ranked_by_blocked_edges() -> None:
    """Keys are ranked by an experiment that blocks attention to them."""
    which = experiment(
        "which",
        "block attention layers * from last token to token 1..4",
        "measure logit(answer) as delta",
    )
    text = experiment("then", "ablate embed at best of which token with zero", RAW) + which
    found = run(text)
    deltas = patched(found["which"]) - found["which"].measures[0].base
    ids = rows_of(text, "then")
    every = zip(found["then"].row_ids or (), answers(text, "then"), strict=True)
    for column, (row, answer) in enumerate(every):
        by_hand = without_tokens(ids[row], [1 + int(np.argmax(deltas[:, column]))], answer)[0]
        np.testing.assert_allclose(patched(found["then"])[0][column], by_hand, atol=1e-3)


@pytest.mark.parametrize(
    "look",
    [
        "observe attention layer 2 head 3 from last token to fruits tokens",
        "observe attention layer 2 head 3 from last token to each item tokens, tokens *",
        "patch resid_post layer 1 at token 1..2 onto token 3..4",
    ],
)
def test_ranking_without_single_tokens_is_rejected(look: str) -> None:
    lines = (look,) if look.startswith("observe") else ("from fewer into clean", look, RAW)
    text = experiment("then", "ablate embed at top 1 of look tokens with zero", RAW)
    found = checked(text + experiment("look", *lines)).diagnostics
    assert "E0620" in [d.code for d in found if d.severity == "error"]


@pytest.mark.parametrize(
    "line", ["replace block layer * with identity", "renumber token 1..3 from 9"]
)
def test_ranking_without_sites_is_rejected(line: str) -> None:
    text = experiment("then", "ablate top 1 of look at last token with zero", RAW)
    found = checked(text + experiment("look", line, RAW)).diagnostics
    assert [d.code for d in found if d.severity == "error"] == ["E0620"]
