"""Positions computed from the variable of a `for`: `item i token`, `token i - 3`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.base.text import Source

from ..execute.support import token
from ..quick import in_turn
from ..reference.forward import Changes, Edge, Write
from ..run_source import run_source
from .support import (
    QUICK,
    Key,
    Text,
    agree,
    codes,
    difference,
    edited,
    experiment,
    plain,
    records,
    rows,
    run_file,
    unpatched,
    worked_out,
)

NAMES = ("gpt2", "llama", "gpt_neox")
LAYERS = range(3)
FEWEST = min(len(text.spans["items"]) for text in rows())
MOST = max(len(text.spans["items"]) for text in rows())
LONGEST = max(text.last for text in rows())


def item(text: Text, number: int) -> list[int]:
    """The token of an occurrence, counted from 1; empty if the row has fewer."""
    return [*text.spans["items"][number - 1 : number]] if number > 0 else []


def zeros(name: str, text: Text, site: str, layer: int, places: Sequence[int]) -> list[Write]:
    found = plain(name, text)[site, layer]
    return [Write(site, layer, torch.zeros_like(found[at, 0]), at, 0) for at in places]


def blocked(query: Sequence[int], key: Sequence[int]) -> list[Changes]:
    """One run; empty if the row lacks the query or the key."""
    if not query or not key:
        return []
    return [([], [Edge("block", layer, [*query], [*key]) for layer in LAYERS])]


def ablated(name: str, text: Text, places: Sequence[int] | None) -> list[Changes]:
    return [] if places is None else [(zeros(name, text, "resid_post", 1, places), [])]


def inside(text: Text, place: int) -> list[int]:
    """A token of the model's input, whose first one is special; empty out of range."""
    return [place] if 0 <= place <= text.last else []


def taken(name: str, n: int, number: int) -> list[Changes]:
    """An item's `resid_pre` of `longer`, which may have more or fewer items."""
    text, other = rows()[n], rows("longer")[n]
    own, theirs = item(text, number), item(other, number)
    if not own or not theirs:
        return []
    found = plain(name, other)["resid_pre", 1][theirs[0], 0]
    return [([Write("resid_pre", 1, found, own[0], 0)], [])]


@dataclass(frozen=True)
class Case:
    rules: str
    numbers: Sequence[int]
    act: Callable[[str, int, int], Sequence[Changes]]
    """From a model's name, a row's number and the loop's value; empty without the position."""


CASES = {
    "the diagonal of tokens": Case(
        "block attention layers * heads * from token i to token i - 3",
        range(4, LONGEST + 1),
        lambda name, n, i: blocked(inside(rows()[n], i), inside(rows()[n], i - 3)),
    ),
    "the diagonal of items": Case(
        "block attention layers * heads * from item i token to item i - 1 token",
        range(2, MOST + 1),
        lambda name, n, i: blocked(item(rows()[n], i), item(rows()[n], i - 1)),
    ),
    "keys alone": Case(
        "block attention layers * heads * from last token to {item i + 1 token, subject token}",
        range(MOST),
        lambda name, n, i: (
            blocked([rows()[n].last], [*item(rows()[n], i + 1), rows()[n].spans["subject"][-1]])
            if item(rows()[n], i + 1)
            else []
        ),
    ),
    "an item": Case(
        "ablate resid_post layer 1 at item i token with zero",
        range(1, MOST + 1),
        lambda name, n, i: ablated(name, rows()[n], item(rows()[n], i) or None),
    ),
    "all of it": Case(
        "ablate resid_post layer 1 at item i - 1 of xs tokens with zero",
        range(2, MOST + 2),
        lambda name, n, i: ablated(name, rows()[n], item(rows()[n], i - 1) or None),
    ),
    "its first token": Case(
        "ablate resid_post layer 1 at first token of item i with zero",
        range(1, MOST + 1),
        lambda name, n, i: ablated(name, rows()[n], item(rows()[n], i) or None),
    ),
    "the token behind it": Case(
        "ablate resid_post layer 1 at first token of item i + 1 with zero",
        range(1, MOST + 1),
        lambda name, n, i: ablated(
            name, rows()[n], [item(rows()[n], i)[0] + 1] if item(rows()[n], i) else None
        ),
    ),
    "from the end": Case(
        "ablate resid_post layer 1 at token -i with zero",
        range(1, LONGEST + 2),
        lambda name, n, i: ablated(
            name, rows()[n], inside(rows()[n], rows()[n].last + 1 - i) or None
        ),
    ),
    "before the last": Case(
        "ablate resid_post layer 1 at last token - i with zero",
        range(LONGEST),
        lambda name, n, i: ablated(
            name, rows()[n], [rows()[n].last - i] if rows()[n].last > i else None
        ),
    ),
    "behind the subject": Case(
        "ablate resid_post layer 1 at subject token + i with zero",
        range(4),
        lambda name, n, i: ablated(
            name, rows()[n], inside(rows()[n], rows()[n].spans["subject"][-1] + i) or None
        ),
    ),
    "joined": Case(
        "ablate resid_post layer 1 at {item i token, last token - i} with zero",
        range(1, MOST + 1),
        lambda name, n, i: ablated(
            name,
            rows()[n],
            [*item(rows()[n], i), rows()[n].last - i] if item(rows()[n], i) else None,
        ),
    ),
    "between": Case(
        "ablate resid_post layer 1 at tokens between item i token and item i + 1 token with zero",
        range(1, MOST),
        lambda name, n, i: ablated(
            name,
            rows()[n],
            [*item(rows()[n], i), *item(rows()[n], i + 1)] if item(rows()[n], i + 1) else None,
        ),
    ),
    "all but one": Case(
        "ablate resid_post layer 1 at tokens except {item i token, last token} with zero",
        range(1, MOST + 1),
        lambda name, n, i: ablated(
            name,
            rows()[n],
            [at for at in range(1, rows()[n].last) if at not in item(rows()[n], i)]
            if item(rows()[n], i)
            else None,
        ),
    ),
    "from another run": Case(
        "from longer into clean  patch resid_pre layer 1 at item i token",
        range(1, 4),
        lambda name, n, i: taken(name, n, i),
    ),
    "two that follow one number": Case(
        "ablate resid_post layer 1 at item i token with zero  "
        "ablate resid_post layer 2 at item i - 1 token with zero",
        range(2, MOST + 1),
        lambda name, n, i: (
            [
                (
                    zeros(name, rows()[n], "resid_post", 1, item(rows()[n], i))
                    + zeros(name, rows()[n], "resid_post", 2, item(rows()[n], i - 1)),
                    [],
                )
            ]
            if item(rows()[n], i)
            else []
        ),
    ),
}


def looped(case: Case) -> str:
    head, tail = ("", case.rules)
    if tail.startswith("from "):
        head, _, tail = tail.partition("  ")
    numbers = f"{min(case.numbers)}..{max(case.numbers)}"
    return f"{head}  for i in {numbers} {{ {tail} }}"


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, QUICK))
def test_rules_at_loop_positions_equal_the_reference(data: Path, name: str, mode: str) -> None:
    text = "".join(experiment(f"e{n}", looped(case)) for n, case in enumerate(CASES.values()))
    found = run_file(text, data, name, mode)
    for number, (title, case) in enumerate(CASES.items()):
        cells = [(i,) for i in case.numbers]

        def changes(n: int, i: int, case: Case = case) -> Sequence[Changes]:
            return case.act(name, n, i)

        expected = worked_out(name, cells, changes, rows(), records())
        assert len(expected) == len(cells), title
        agree(found[f"e{number}"], ("i",), expected, unpatched(name), large=0.02, most=False)


def test_rows_without_a_loop_position_are_excluded_from_the_cell(data: Path) -> None:
    """Some cells above lack rows, and none lacks all rows: otherwise nothing is tested."""
    text = experiment("e", looped(CASES["the diagonal of items"]))
    counts = run_file(text, data, "llama", "planned")["e"].statistics[0].n.tolist()
    lengths = [len(text.spans["items"]) for text in rows()]
    assert counts == [sum(own >= i for own in lengths) for i in range(2, MOST + 1)]
    assert FEWEST < MOST


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, QUICK))
def test_observed_attention_at_loop_positions_equals_the_reference(
    data: Path, name: str, mode: str
) -> None:
    text = experiment(
        "e",
        "for i in 3..6 { observe attention layer 1 head * from token i to token i - 2 as near }",
        measure="",
    )
    text += experiment(
        "items",
        "for i in 2..5 { observe attention layer 1 head 2 from item i token to item i - 1 token }",
        measure="",
    )
    found = run_file(text, data, name, mode)
    cells = [(i, head) for i in range(3, 7) for head in range(4)]
    expected: dict[Key, list[float]] = {
        (i, head): [float(plain(name, text)["pattern", 1][i, head, i - 2]) for text in rows()]
        for i, head in cells
    }
    agree(found["e"], ("i", "head"), expected, None, large=0.02)
    of_items: dict[Key, list[float]] = {
        (i,): [
            float(plain(name, text)["pattern", 1][own[0], 2, own[0] - 1])
            if (own := item(text, i))
            else np.nan
            for text in rows()
        ]
        for i in range(2, MOST + 1)
    }
    agree(found["items"], ("i",), of_items, None, large=0.02)


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, QUICK))
def test_measure_at_a_loop_position_equals_the_reference(data: Path, name: str, mode: str) -> None:
    """The measure reads one item after the written one; both use one variable."""
    text = experiment(
        "e",
        "for i in 1..4 { ablate mlp_out layer 1 at item i token with zero }",
        measure="measure logit(answer) - logit(wrong) at item i + 1 token as delta",
    )
    found = run_file(text, data, name, mode)["e"]
    expected: dict[Key, list[float]] = {}
    base: list[list[float]] = []
    for i in range(1, MOST):
        own: list[float] = []
        start: list[float] = []
        for text_of, record in zip(rows(), records(), strict=True):
            at = item(text_of, i + 1)
            if not at:
                own.append(np.nan)
                start.append(np.nan)
                continue
            writes = zeros(name, text_of, "mlp_out", 1, item(text_of, i))
            own.append(difference(edited(name, text_of, writes).logits, record, at[0]))
            start.append(difference(plain(name, text_of).logits, record, at[0]))
        expected[(i,)] = own
        base.append(start)
    agree(found, ("i",), expected, np.array(base), large=0.02, most=False)


def test_cell_labels_have_the_values_of_loop_positions(data: Path) -> None:
    text = experiment("e", "for i in 3..4 { block attention layer 1 from token i to token i - 2 }")
    text += experiment("f", "for i in 1..2 { ablate z layer 1 head 0 at item i token with zero }")
    text += experiment("g", "for i in 1..2 { ablate z layer 1 head 0 at last token - i with zero }")
    found = run_file(text, data, "llama", "planned")
    assert [cell.position for cell in found["e"].cells] == ["3 → 1", "4 → 2"]
    assert [cell.position for cell in found["f"].cells] == ["item 1 token", "item 2 token"]
    assert [cell.position for cell in found["g"].cells] == ["last token - 1", "last token - 2"]


def test_loop_over_items_equals_each_item(data: Path) -> None:
    """`each item token` has the same runs; both exclude rows without the item."""
    loop = f"for i in 1..{MOST} {{ ablate resid_post layer 1 at item i token with zero }}"
    text = experiment("e", loop)
    text += experiment("f", "ablate resid_post layer 1 at each item token with zero")
    found = run_file(text, data, "llama", "planned")
    own, each = (found[name].measures[0].patched for name in "ef")
    np.testing.assert_array_equal(own, each)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("for i in 0..2 { ablate embed at item i token with zero }", "E0309"),
        ("for i in 4..6 { ablate embed at item i token with zero }", "E0309"),
        ("for i in 4..6 { ablate embed at item i tokens with zero }", "E0309"),
        ("for i in 2..4 { ablate embed at token i - 3 with zero }", "E0310"),
        ("for i in 2..4 { ablate embed at token i - 15 with zero }", "E0310"),
        ("for i in 10..99 { ablate embed at token i with zero }", "E0310"),
        ("for i in 5..20 { ablate embed at {item i token, token i + 9} with zero }", "E0310"),
        ("for c in [embed, z] { ablate embed at item c token with zero }", "E0322"),
        ("for i in [0.5] { ablate embed at token i with zero }", "E0322"),
        ("for i in 1..2 { ablate embed at item j token with zero }", "E0322"),
        ("for i in 1..2 { ablate embed at item i token, last token with zero }", "E0322"),
        ("for i in 1..2 { ablate z layer 1 head 0 at last token with zero }", "E0322"),
        ("for i in 1..3 { block attention layer 1 from token i to token i + 1 }", "E0332"),
        ("ablate embed at item 4 token with zero", "E0309"),
    ],
)
def test_invalid_loop_positions_are_errors(data: Path, rule: str, code: str) -> None:
    assert code in codes(experiment("e", rule), data)


def test_parameter_is_a_valid_item_number(data: Path) -> None:
    """Rows without the item are an error, as with a literal number."""
    text = experiment("e", "ablate resid_post layer 1 at item which token with zero")
    found = run_file(f"param which = {FEWEST}\n{text}", data, "llama", "planned")["e"]
    assert found.statistics[0].n.tolist() == [len(rows())]
    assert codes(f"param which = {FEWEST + 1}\n{text}", data) == ["E0309"]


# --- answers that depend on a loop ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, QUICK))
def test_answers_with_the_loop_variable_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    """A text and a set of texts with the same number as the written position."""
    text = experiment(
        "e",
        "for i in 1..4 { ablate mlp_out layer 1 at token i with zero }",
        measure='measure prob(answer, " w{i}", [" w{i + 20}"]) as delta',
    )
    found = run_file(text, data, name, mode)["e"]
    expected: dict[Key, list[float]] = {}
    base: list[list[float]] = []

    def mass(logits: torch.Tensor, words: set[str]) -> float:
        shares = logits[-1].double().softmax(-1)
        return float(sum(shares[token(word)] for word in words))

    for i in range(1, 5):
        sets = [{record["a"], f"w{i}", f"w{i + 20}"} for record in records()]
        each = list(zip(rows(), sets, strict=True))
        expected[(i,)] = [
            mass(edited(name, of, zeros(name, of, "mlp_out", 1, [i])).logits, words)
            for of, words in each
        ]
        base.append([mass(plain(name, of).logits, words) for of, words in each])
    agree(found, ("i",), expected, np.array(base), large=0.001, most=False)


COUNTED = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 2..5
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}
experiment e { prompts fruit limit 6 LINES }
"""


def test_numerals_with_the_loop_variable_equal_separate_experiments() -> None:
    """Cells equal experiments with literal numbers; a loop may have measures without a rule."""
    measures = "measure prob(count + {}..9) as raw measure expected({}..8) as raw"
    result, problems = run_source(
        Source(COUNTED.replace("LINES", f"for i in 1..3 {{ {measures.format('i', 'i')} }}"))
    )
    assert result is not None, problems
    (found,) = result.experiments
    assert found.axes == ("i",)
    for number, cell in enumerate(found.cells):
        own = measures.format(cell.coords["i"], cell.coords["i"])
        alone, _ = run_source(Source(COUNTED.replace("LINES", own)))
        assert alone is not None
        for one, other in zip(found.measures, alone.experiments[0].measures, strict=True):
            np.testing.assert_array_equal(one.patched[number], other.patched[0])
    first, last = found.measures[0].patched[[0, -1]]
    assert (first > last).any(), "sets of all values are alike"


def test_row_value_takes_precedence_over_a_loop_variable_in_metrics() -> None:
    """A loop of the same name sets positions, and the metric reads the row."""
    lines = "for count in 1..2 {{ ablate resid_post layer 1 at item count token with zero }} {}"
    results = [
        run_source(Source(COUNTED.replace("LINES", lines.format(measure))))
        for measure in ("measure prob(count..count) as raw", "measure prob(answer) as raw")
    ]
    own, same = (result for result, _ in results)
    assert own is not None
    assert same is not None
    a, b = (each.experiments[0].measures[0].patched for each in (own, same))
    np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("measure", "code"),
    [
        ('for i in 1..2 { measure logit(" w1 w{i}") as raw }', "E0507"),
        ('for i in 1..2 { measure logprob(" w1 w{i}") as raw }', "E0108"),
        ("for i in [q, z] { measure prob(i..9) as raw }", "E0503"),
        ("measure prob(i..9) as raw", "E0501"),
    ],
)
def test_invalid_answers_with_loop_variables_are_errors(
    data: Path, measure: str, code: str
) -> None:
    assert code in codes(experiment("e", measure=measure), data)
