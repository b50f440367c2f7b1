"""`top 25% of E tokens`: tokens ranked in each row, against forward passes of the bare model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn
from .support import HEAD, MODES, checked, experiment, patched, run, without_tokens

PLACES = experiment(
    "places",
    "ablate embed at token * align left with zero",
    "measure prob(answer) as delta",
    prompts="fruit limit 6",
)
LOGIT = "measure logit(answer) as raw"


def ablate(name: str, at: str, prompts: str = "fruit limit 6") -> str:
    return experiment(name, f"ablate embed at {at} with zero", LOGIT, prompts=prompts)


def orders(places: ExperimentResult) -> dict[int, list[int]]:
    """Row id → its tokens, largest effect on the probability first."""
    data = places.measures[0]
    deltas = data.patched - data.base
    assert places.row_ids is not None
    found: dict[int, list[int]] = {}
    for column, row in enumerate(places.row_ids):
        has = [n for n in range(len(deltas)) if not np.isnan(deltas[n, column])]
        found[row] = sorted(has, key=lambda n: -deltas[n, column])
    return found


def expected(
    text: str, name: str, tokens: dict[int, list[int]], *, head: str = HEAD, of: int = 0
) -> list[float]:
    """The answer's logit (or `of=1`, its probability) in every row without these tokens."""
    (one,) = (e for e in checked(text, head=head).experiments if e.name == name)
    values: list[float] = []
    for row, prompt in zip(one.table.row_ids, one.table.runs["clean"].rows, strict=True):
        if row not in tokens:
            values.append(np.nan)
            continue
        answer = prompt.texts["answer"].ids[0]
        values.append(without_tokens(prompt.ids, tokens[row], answer)[of])
    return values


COUNTS: dict[str, Callable[[int], int]] = {
    "top 25% of places tokens": lambda n: int(n / 4 + 0.5),
    "top 3 of places tokens": lambda n: 3,
    "best of places token": lambda n: 1,
    "best of places tokens": lambda n: 1,
    "top 1% of places tokens": lambda n: 1,
    "top 100% of places tokens": lambda n: n,
}
"""Position → number of tokens selected from a row of n tokens."""


@pytest.mark.parametrize(("at", "mode"), in_turn(list(COUNTS), list(MODES)))
def test_top_tokens_of_each_row_equal_reference(at: str, mode: str) -> None:
    text = ablate("a", at) + PLACES
    found = run(text, without=MODES[mode])
    ranked = {
        row: order[: COUNTS[at](len(order))] for row, order in orders(found["places"]).items()
    }
    assert np.allclose(patched(found["a"])[0], expected(text, "a", ranked), atol=1e-4)


def test_tokens_except_top_tokens_equal_reference() -> None:
    text = ablate("a", "tokens except top 3 of places tokens") + PLACES
    found = run(text)
    (one,) = (e for e in checked(text).experiments if e.name == "a")
    rows = one.table.runs["clean"].rows
    rest = {
        row: [p for p in range(len(rows[n].ids)) if not rows[n].special[p] and p not in order[:3]]
        for n, (row, order) in enumerate(orders(found["places"]).items())
    }
    assert np.allclose(patched(found["a"])[0], expected(text, "a", rest), atol=1e-4)


def test_best_token_joined_with_the_last_token_equals_reference() -> None:
    text = ablate("a", "{last token, best of places token}") + PLACES
    found = run(text)
    (one,) = (e for e in checked(text).experiments if e.name == "a")
    rows = one.table.runs["clean"].rows
    both = {
        row: [len(rows[n].ids) - 1, order[0]]
        for n, (row, order) in enumerate(orders(found["places"]).items())
    }
    assert np.allclose(patched(found["a"])[0], expected(text, "a", both), atol=1e-4)


def test_top_token_in_the_singular_sweeps_over_ranks() -> None:
    text = ablate("a", "top 3 of places token") + PLACES
    found = run(text)
    ranked = orders(found["places"])
    assert [cell.position for cell in found["a"].cells] == [
        "1 of places",
        "2 of places",
        "3 of places",
    ]
    for rank in range(3):
        own = {row: [order[rank]] for row, order in ranked.items()}
        assert np.allclose(patched(found["a"])[rank], expected(text, "a", own), atol=1e-4)


def test_rows_missing_from_the_ranking_are_dropped() -> None:
    text = ablate("a", "top 25% of places tokens", "fruit limit 10") + PLACES
    found = run(text)
    ids = found["a"].row_ids
    assert ids is not None
    there = set(found["places"].row_ids or ())
    assert [np.isnan(v) for v in patched(found["a"])[0]] == [row not in there for row in ids]
    said = found["a"].conventions["top 25% of places tokens"]
    assert said.endswith(f"; {10 - len(there)} of 10 rows dropped, because `places` lacks them")
    assert "in each row, by delta of prob(answer) of the row" in said


def test_rows_not_kept_by_the_ranking_are_dropped() -> None:
    clean = run(experiment("clean", "measure logit(answer) as raw", prompts="fruit limit 6"))
    middle = float(np.median(patched(clean["clean"])))
    keep = PLACES.replace("  measure", f"  keep logit(answer) > {middle:.4f}\n  measure")
    found = run(ablate("a", "top 25% of places tokens") + keep)
    kept = set(found["places"].row_ids or ())
    assert 0 < len(kept) < 6
    ids = found["a"].row_ids or ()
    assert [not np.isnan(v) for v in patched(found["a"])[0]] == [row in kept for row in ids]


def test_token_ranked_in_another_run_is_found_by_name() -> None:
    """Ranked in a run with a shorter list, ablated in the clean run at the same named position."""
    places = experiment(
        "places",
        "from clean into fewer",
        "patch resid_post layer 0 at first-item token, last-item token, last token",
        "measure logit(answer) - logit(answer of fewer) as recovery",
        prompts="fruit limit 6",
    )
    text = ablate("a", "best of places token") + places
    found = run(text)
    data = found["places"].measures[0]
    assert data.source is not None
    worth = (data.patched - data.base) / (data.source - data.base)
    (one,) = (e for e in checked(text).experiments if e.name == "a")
    tokens: dict[int, list[int]] = {}
    for n, row in enumerate(one.table.row_ids):
        prompt = one.table.runs["clean"].rows[n]
        items = [s for s in prompt.spans if s.name == "item"]
        last = next(i for i, (_, high) in enumerate(prompt.offsets) if high == items[-1].end)
        first = next(i for i, (_, high) in enumerate(prompt.offsets) if high == items[0].end)
        tokens[row] = [[first, last, len(prompt.ids) - 1][int(worth[:, n].argmax())]]
    assert np.allclose(patched(found["a"])[0], expected(text, "a", tokens), atol=1e-4)


def test_token_ranking_on_the_same_rows_gives_no_warning() -> None:
    codes = {d.code for d in checked(ablate("a", "best of places token") + PLACES).diagnostics}
    assert "W0721" not in codes
    assert "W0731" not in codes
