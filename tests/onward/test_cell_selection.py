"""`top 2 of places(l: 1) tokens`: rankings by selected cells of another experiment."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.results.experiment_result import ExperimentResult

from ..parsing import format_file, parse
from .support import HEAD, PLAIN, Array, checked, experiment, patched, run, without_tokens

DELTA = "measure prob(answer) as delta"
LOGIT = "measure logit(answer) as raw"
PLACES = experiment(
    "places",
    "for l in 0..2 { for m in l..2 {",
    "ablate resid_post layers l..m at token * align left with zero } }",
    DELTA,
    prompts="fruit limit 6",
)
HEADS = experiment(
    "heads", "ablate layer 0..1 head * at last-item token, last token with zero", DELTA
)


def deltas(result: ExperimentResult) -> Array:
    """[cell, row]."""
    data = result.measures[0]
    return data.patched - data.base


def order(places: ExperimentResult, first: int, last: int) -> dict[int, list[int]]:
    """Row id → its tokens by the effect of these layers, largest first."""
    found = deltas(places)
    cells = [
        n for n, c in enumerate(places.cells) if tuple(c.coords[a] for a in "lm") == (first, last)
    ]
    assert places.row_ids is not None
    assert len(cells) == max(int(places.cells[n].coords["position"]) for n in cells) + 1
    return {
        row: sorted(np.flatnonzero(np.isfinite(found[cells, n])), key=lambda t: -found[cells[t], n])
        for n, row in enumerate(places.row_ids)
    }


def without(text: str, name: str, tokens: dict[int, list[int]]) -> list[float]:
    """The answer's logit with the embeddings of these tokens set to zero."""
    (one,) = (each for each in checked(text).experiments if each.name == name)
    rows = one.table.runs["clean"].rows
    return [
        without_tokens(prompt.ids, tokens[row], prompt.texts["answer"].ids[0])[0]
        for row, prompt in zip(one.table.row_ids, rows, strict=True)
    ]


@pytest.mark.parametrize("left_out", [frozenset[str](), PLAIN], ids=["planned", "plain"])
def test_tokens_ranked_by_each_loop_cell_equal_reference(left_out: frozenset[str]) -> None:
    rule = "ablate embed at top 2 of places(m: m, l: l) tokens with zero"
    loops = f"for l in 0..2 {{ for m in l..2 {{ {rule} }} }}"
    text = experiment("a", loops, LOGIT, prompts="fruit limit 6") + PLACES
    found = run(text, without=left_out)
    orders: list[dict[int, list[int]]] = []
    for cell, values in zip(found["a"].cells, patched(found["a"]), strict=True):
        first, last = (int(cell.coords[axis]) for axis in "lm")
        best = {row: own[:2] for row, own in order(found["places"], first, last).items()}
        orders.append({row: sorted(own) for row, own in best.items()})
        assert np.allclose(values, without(text, "a", best), atol=1e-4)
        assert cell.position == f"top 2 of places(m: {last}, l: {first}) tokens"
    assert len(orders) == 6
    assert any(own != orders[0] for own in orders)


def test_tokens_are_ranked_over_the_remaining_axes() -> None:
    rule = "ablate embed at best of places(l: depth) token with zero"
    text = "\nparam depth = 1\n" + experiment("a", rule, LOGIT, prompts="fruit limit 6") + PLACES
    found = run(text)
    each = deltas(found["places"])
    places = found["places"]
    best: dict[int, list[int]] = {}
    assert places.row_ids is not None
    for column, row in enumerate(places.row_ids):
        own = [n for n, cell in enumerate(places.cells) if cell.coords["l"] == 1]
        top = max(own, key=lambda n: np.nan_to_num(each[n, column], nan=-np.inf))
        best[row] = [int(places.cells[top].coords["position"])]
    assert np.allclose(patched(found["a"])[0], without(text, "a", best), atol=1e-4)


def test_sites_are_ranked_at_one_position() -> None:
    at = ("last-item token", "last token")
    text = HEADS + "".join(
        experiment(f"at_{n}", f'ablate top 2 of heads(position: "{word}") at last token with zero',
                   LOGIT)
        for n, word in enumerate(at)
    )  # fmt: skip
    found = run(text)
    means, picked = deltas(found["heads"]).mean(1), list[str]()
    for number, word in enumerate(at):
        cells = [n for n, cell in enumerate(found["heads"].cells) if cell.position == word]
        best = sorted(cells, key=lambda n: -means[n])[:2]
        sites = [found["heads"].cells[n].site.removesuffix(".z") for n in best]
        picked.append(", ".join(sites))
        listed = found[f"at_{number}"].conventions[f'top 2 of heads(position: "{word}")']
        assert all(site in listed for site in sites)
        same = run(f"\ngroup pair = {picked[-1]}" + experiment(
            "own", "ablate pair at last token with zero", LOGIT))  # fmt: skip
        own = patched(found[f"at_{number}"])
        assert np.allclose(own, patched(same["own"]), atol=1e-5)
    assert picked[0] != picked[1]


def test_sites_are_ranked_for_one_base() -> None:
    sweep = ("from clean into fewer, mixed", "patch layer * head * at last token")
    corrupt = "corrupt mixed { item = other(item) }"
    measure = "measure logit(answer) - logit(answer of fewer) as delta"
    head = HEAD.replace("  corrupt fewer", f"  {corrupt}\n  corrupt fewer")
    assert corrupt in head
    lines = 'ablate best of both(base: "mixed") at last token with zero'
    text = experiment("a", lines, LOGIT) + experiment("both", *sweep, measure)
    both = run(text, head=head)["both"]
    own = [n for n, cell in enumerate(both.cells) if cell.coords["base"] == "mixed"]
    best = both.cells[max(own, key=lambda n: deltas(both)[n].mean())].site
    (cell,) = run(text, head=head)["a"].cells
    assert cell.site == best


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("places(m: 1, k: 1)", "`places` has no axis `k`"),
        ("places(l: 7)", "`places` has no `l: 7`"),
        ("places(l: 2, m: 1)", "`places` has no cell there"),
        ("places(1)", "`1` doesn't say along which axis"),
        ("places(l: 1, l: 2)", "`l` is named twice"),
        ("places(l: n)", "`n` is not a value of an axis"),
        ("places(l: 0..1)", "`0..1` is not a value of an axis"),
        ('places(position: "1")', "each position is ranked"),
    ],
)
def test_invalid_cell_selection_is_rejected(written: str, said: str) -> None:
    line = f"ablate embed at top 2 of {written} tokens with zero"
    text = experiment("a", line, LOGIT, prompts="fruit limit 6") + PLACES
    found = [each for each in checked(text).diagnostics if each.severity == "error"]
    assert [each.code for each in found] == ["E0620"]
    assert said in found[0].message


def test_cell_selection_is_checked_without_the_model() -> None:
    head = HEAD.replace('zoo("counting")', 'hf("nobody/nothing")')
    assert head != HEAD
    for written, codes in (("places(l: 7)", ["E0620"]), ("places(l: 1)", [])):
        line = f"ablate embed at top 2 of {written} tokens with zero"
        text = experiment("a", line, LOGIT, prompts="fruit limit 6") + PLACES
        found = checked(text, head=head).diagnostics
        assert [each.code for each in found if each.severity == "error"] == codes


def test_formatter_keeps_the_cell_selection() -> None:
    line = "ablate embed at top 2 of places( l:1 , m : m ) tokens with zero"
    loop = f"for m in 1..2 {{ {line} }}"
    source = Source(HEAD + experiment("a", loop, LOGIT, prompts="fruit limit 6") + PLACES)
    tree, _ = parse(source)
    assert tree is not None
    assert "top 2 of places(l: 1, m: m) tokens" in format_file(tree)
