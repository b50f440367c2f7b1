"""Faithfulness of groups of nodes, against plain passes with the others and with all ablated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.resolve.node_circuits import NodeChoice
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, check_file, shared
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .models import bare
from .support import (
    BLOCKS,
    DIFFERENCE,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    worked_out,
)

HERE = ("gpt2", "llama", "gpt_neox", "mistral")
GROUPS = "group a = L0H1, L2H0, L1H3\ngroup b = L1H1, L2H2\n"
FAITHFUL = f"{DIFFERENCE.rpartition(' as ')[0]} as faithfulness"
Point = tuple[str, int, int | None]
HEADS: list[Point] = [("z", layer, head) for layer in range(3) for head in range(4)]
MLPS: list[Point] = [("mlp_out", layer, 0) for layer in range(3)]
A: list[Point] = [("z", 0, 1), ("z", 2, 0), ("z", 1, 3)]
B: list[Point] = [("z", 1, 1), ("z", 2, 2)]
FEW_DIMS = [0, 1, 2, 4, 7, 8, 9]


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def dims_zeroed(dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        found = x.clone()
        found[..., list(dims)] = 0
        return found

    return change


def less(points: Sequence[Point], *others: Point) -> list[Point]:
    return [each for each in points if each not in others]


@dataclass(frozen=True)
class Part:
    """Points that carry a fill at some tokens."""

    points: Sequence[Point]
    at: str = "tokens *"
    fill: str = "zero"
    dims: Sequence[int] | None = None


def writes(name: str, n: int, part: Part, run: str, block: str) -> list[Write]:
    """The writes into a prompt; a mean is that of the rows of the clean run, or of another.

    A fill other than `zero` and `mean` is the name of a run.
    """
    texts, found = rows(run), list[Write]()
    clean = rows(block if block != "p" else "clean")
    for site, layer, unit in part.points:
        for place, position in enumerate(tokens(texts[n], part.at)):
            vector: Tensor | Callable[[Tensor], Tensor] = zero
            if part.dims is not None:
                vector = dims_zeroed(part.dims)
            elif part.fill == "mean":
                vectors = [plain(name, each)[site, layer] for each in clean]
                every = [
                    own[tokens(each, part.at)[place], unit or 0]
                    for own, each in zip(vectors, clean, strict=True)
                ]
                vector = torch.stack(every).mean(0)
            elif part.fill != "zero":
                there = rows(part.fill)[n]
                at = tokens(there, part.at)[place]
                vector = plain(name, there)[site, layer][at, unit or 0]
            found.append(Write(site, layer, vector, position, unit))
    return found


@dataclass(frozen=True)
class Case:
    rules: Sequence[str]
    cells: Mapping[tuple[str, ...], Sequence[Part]]
    everything: Mapping[tuple[str, ...], Sequence[Part]]
    """One entry, or one for each cell."""
    axes: tuple[str, ...] = ()
    base: str = "clean"
    block: str = "p"
    before: Sequence[Part] = ()
    """What the base run ablates itself."""


def one(rule: str, own: Part, every: Part, *, base: str = "clean", block: str = "p") -> Case:
    return Case([rule], {(): [own]}, {(): [every]}, base=base, block=block)


def resid(at: str, fill: str = "zero") -> Part:
    return Part([("resid_post", 1, 0)], at, fill)


CASES = {
    "heads": one(
        "ablate layers * heads * except a at tokens * with zero",
        Part(less(HEADS, *A)),
        Part(HEADS),
    ),
    "mean": one(
        "ablate layers * heads * except a at last token with mean",
        Part(less(HEADS, *A), "last token", "mean"),
        Part(HEADS, "last token", "mean"),
    ),
    "heads and MLPs": Case(
        [
            "ablate layers * heads * except a at tokens * with zero",
            "ablate mlp_out layers * except L1.mlp at last token with zero",
            "ablate mlp_out layer 1 at cue token with zero",
        ],
        {
            (): [
                Part(less(HEADS, *A)),
                Part(less(MLPS, ("mlp_out", 1, 0)), "last token"),
                Part([("mlp_out", 1, 0)], "cue token"),
            ]
        },
        {
            (): [
                Part(HEADS),
                Part(MLPS, "last token"),
                Part([("mlp_out", 1, 0)], "cue token"),
            ]
        },
    ),
    "neurons": one(
        "ablate mlp_hidden layers 1..2 neurons 0..25 except 2..8, L2N20 at tokens * with zero",
        Part(
            [
                ("mlp_hidden", layer, n)
                for layer in (1, 2)
                for n in range(26)
                if not (2 <= n <= 8 or (layer, n) == (2, 20))
            ]
        ),
        Part([("mlp_hidden", layer, n) for layer in (1, 2) for n in range(26)]),
    ),
    "dimensions": one(
        "ablate resid_post layer 1 dims 0..9 except 3, 5..6 at last token with zero",
        Part([("resid_post", 1, 0)], "last token", dims=FEW_DIMS),
        Part([("resid_post", 1, 0)], "last token", dims=range(10)),
    ),
    "positions": one(
        "ablate resid_post layer 1 at tokens except {subject tokens, last token} with zero",
        resid("tokens except {subject tokens, last token}"),
        resid("tokens between first token and last token"),
    ),
    "positions without special tokens": one(
        "ablate resid_post layer 1 at {tokens except cue token, token 0} with zero",
        resid("{tokens except cue token, token 0}"),
        resid("tokens *"),
    ),
    "positions with mean": one(
        "ablate resid_post layer 1 at tokens except cue token with mean",
        resid("tokens except cue token", "mean"),
        resid("tokens between first token and last token", "mean"),
        base="even",
        block="even",
    ),
    "sites and positions": one(
        "ablate layers * heads * except a at tokens except cue token with zero",
        Part(less(HEADS, *A), "tokens except cue token"),
        Part(HEADS, "tokens between first token and last token"),
    ),
    "loop over groups": Case(
        ["for g in [a, b] { ablate layers * heads * except g at tokens * with zero }"],
        {("a",): [Part(less(HEADS, *A))], ("b",): [Part(less(HEADS, *B))]},
        {(): [Part(HEADS)]},
        ("g",),
    ),
    "loop over layers": Case(
        ["for l in 1..2 { ablate layers 0..l heads * except a at tokens * with zero }"],
        {(str(n),): [Part(less([p for p in HEADS if p[1] <= n], *A))] for n in (1, 2)},
        {(str(n),): [Part([p for p in HEADS if p[1] <= n])] for n in (1, 2)},
        ("l",),
    ),
    "fills": Case(
        ["ablate layers * heads * except a at last token with zero, mean"],
        {(fill,): [Part(less(HEADS, *A), "last token", fill)] for fill in ("zero", "mean")},
        {(fill,): [Part(HEADS, "last token", fill)] for fill in ("zero", "mean")},
        ("fill",),
    ),
    "another base": one(
        "from clean into other  ablate layers * heads * except a at tokens * with zero",
        Part(less(HEADS, *A)),
        Part(HEADS),
        base="other",
    ),
    "patched heads": one(
        "from other into clean  patch layers * heads * except a at tokens * with other",
        Part(less(HEADS, *A), fill="other"),
        Part(HEADS, fill="other"),
    ),
    "patched from another length": one(
        "from longer into clean  patch layers * heads * except a at {cue token, last token}",
        Part(less(HEADS, *A), "{cue token, last token}", "longer"),
        Part(HEADS, "{cue token, last token}", "longer"),
    ),
    "patched into another base": one(
        "from clean into other  patch layers * heads * except a at tokens *",
        Part(less(HEADS, *A), fill="clean"),
        Part(HEADS, fill="clean"),
        base="other",
    ),
    "patched positions": one(
        "from other into clean  "
        "patch resid_post layer 1 at tokens except {subject tokens, last token} with other",
        resid("tokens except {subject tokens, last token}", "other"),
        resid("tokens between first token and last token", "other"),
    ),
    "patch and ablation": Case(
        [
            "from other into clean  patch layers * heads * except a at tokens * with other",
            "ablate mlp_out layers * except L1.mlp at last token with zero",
        ],
        {
            (): [
                Part(less(HEADS, *A), fill="other"),
                Part(less(MLPS, ("mlp_out", 1, 0)), "last token"),
            ]
        },
        {(): [Part(HEADS, fill="other"), Part(MLPS, "last token")]},
    ),
    "loop over patched groups": Case(
        [
            "from other into clean  "
            "for g in [a, b] { patch layers * heads * except g at tokens * with other }"
        ],
        {(own,): [Part(less(HEADS, *each), fill="other")] for own, each in (("a", A), ("b", B))},
        {(): [Part(HEADS, fill="other")]},
        ("g",),
    ),
    "derived base": Case(
        [
            "run r { from other into clean  ablate mlp_out layer 0 at last token with zero }",
            "from clean into r  ablate layers * heads * except a at last token with zero",
        ],
        {(): [Part(less(HEADS, *A), "last token")]},
        {(): [Part(HEADS, "last token")]},
        before=[Part([("mlp_out", 0, 0)], "last token")],
    ),
}


def values_of(
    name: str, case: Case, cells: Mapping[tuple[str, ...], Sequence[Part]]
) -> list[list[float]]:
    """[cell][prompt] from passes without the executor."""

    def changes(n: int, *cell: str) -> list[Changes]:
        parts = [*case.before, *cells[cell]]
        done = [each for part in parts for each in writes(name, n, part, case.base, case.block)]
        return [(done, ())]

    found = worked_out(name, list(cells), changes, rows(case.base), records(case.block))
    return list(found.values())


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file, whose rows share passes."""
    text = GROUPS + "".join(
        experiment(key.replace(" ", "_"), *case.rules, block=case.block, measure=FAITHFUL)
        for key, case in CASES.items()
    )
    return run_file(text, data, name, mode, precise=True)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), in_turn(HERE, list(MODES)))
def test_faithfulness_of_a_group_is_relative_to_the_run_with_all_ablated(
    data: Path, name: str, mode: str, key: str
) -> None:
    case, found = CASES[key], results(data, name, mode)[key.replace(" ", "_")]
    expected = values_of(name, case, case.cells)
    empty = np.array(values_of(name, case, case.everything))
    base = values_of(name, case, {(): []})[0]
    data_ = found.measures[0]
    assert found.axes == case.axes
    assert data_.source is not None
    np.testing.assert_allclose(data_.patched, expected, atol=1e-5)
    np.testing.assert_allclose(data_.base, np.broadcast_to(base, data_.base.shape), atol=1e-5)
    np.testing.assert_allclose(data_.source, np.broadcast_to(empty, data_.source.shape), atol=1e-5)
    assert np.abs(np.array(expected) - empty).max() > 1e-3
    shares = (np.mean(expected, 1) - empty.mean(1)) / (np.mean(base) - empty.mean(1))
    own = found.statistics[0].mean
    there = ~np.isnan(own)  # four rows may not distinguish a denominator from 0
    np.testing.assert_allclose(own[there], shares[there], rtol=1e-4, atol=1e-6)


# --- random groups --------------------------------------------------------------------------------


def drawn_values(name: str, own: Sequence[Point], size: int, keeps: bool) -> set[float]:
    """The mean measures of all groups of a size among the heads of layer 2, except one group."""
    pool = [each for each in HEADS if each[1] == 2]
    found = set[float]()
    for group in combinations(pool, size):
        if set(group) == set(own):
            continue
        ablated = less(pool, *group) if keeps else group
        case = one("", Part(ablated), Part(ablated))
        found.add(float(np.mean(values_of(name, case, case.cells))))
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_groups_are_all_other_groups_of_equal_size(data: Path, name: str) -> None:
    """With as many draws as there are other groups; their shares are relative to the same runs."""
    own: list[Point] = [("z", 2, 0), ("z", 2, 3)]
    rule = "ablate layer 2 heads * except L2H0, L2H3 at tokens * with zero"
    measures = f"{FAITHFUL}  {DIFFERENCE.rpartition(' as ')[0]} as raw"
    text = experiment("e", rule, f"against random({comb(4, 2) + 3})", measure=measures)
    found = run_file(text, data, name, "planned", precise=True)["e"]
    means = drawn_values(name, own, 2, keeps=True)
    band = found.control(1)
    assert band is not None
    np.testing.assert_allclose([band.low[0], band.high[0]], [min(means), max(means)], atol=1e-5)
    assert "of 2 of 4 sites, drawn from those that ∅ ablates" in found.conventions["controls"]
    assert band.draws.tolist() == [5]
    assert found.conventions["∅"] == f"`{rule}` ablates 4 sites instead of 2; in the same rows"


def test_random_groups_of_queries_and_keys_are_those_of_the_same_heads(data: Path) -> None:
    rules = [
        f"ablate {site} layers * heads * except L0H3, L1H0, L1H2 at tokens * with zero"
        for site in ("q", "k")
    ]
    text = experiment("e", *rules, "against random(4)", measure=FAITHFUL)
    (found,) = check_file(text, data, shared(bare("gpt2")), BLOCKS).experiments
    assert found.control is not None
    first, second = (rule.sites for rule in found.control.experiment.rules)
    assert first is not None
    assert second is not None
    for key, points in first.points.items():
        heads = [(point.layer, point.unit) for point in points]
        assert heads == [(point.layer, point.unit) for point in second.points[key]]
        assert len(heads) == 9
    assert len(set(first.points.values())) == 4


def test_nodes_that_a_training_could_not_choose_are_not_drawn() -> None:
    """They stay in the group or outside of it."""
    choice = NodeChoice(tuple(range(8)), frozenset({0, 1, 5}), frozenset({0, 7}))
    options = choice.options(seed=3)
    assert options.count == comb(6, 2) - 1
    drawn = {choice.drawn(options.pick(rank, 0).values()) for rank in range(options.count)}
    assert len(drawn) == options.count
    assert choice.group not in drawn
    assert all(0 in group and 7 not in group and len(group) == 3 for group in drawn)


FAILING = {
    "other places of a mean": (
        "ablate resid_post layer 1 at tokens except left token with mean",
        "have different places in different rows",
    ),
    "swept tokens": (
        "ablate resid_post layer 1 at each token except first token align left with zero",
        "the rule sweeps the values that it leaves out",
    ),
    "patch": (
        "ablate layers * heads * except a at tokens * with zero  "
        "add 2 to resid_post layer 1 at last token",
        "each rule is an ablation, or a patch that writes where it reads, and "
        "`add 2 to resid_post layer 1 at last token` isn't",
    ),
    "patch onto other tokens": (
        "from other into clean  patch layers * heads * except a at last token  "
        "patch mlp_out layer 1 at cue token onto last token",
        "and `patch mlp_out layer 1 at cue token onto last token` isn't",
    ),
    "patch of the group": (
        "from other into clean  patch a at last token",
        "defined for `ablate all but CIRCUIT …`",
    ),
    "replies": (
        "ablate layers * heads * except a at tokens * with zero  generate 3",
        "isn't available with `generate`",
    ),
    "estimate": (
        "ablate layer 1 heads * except a at last token with zero  using atp",
        "is computed exactly",
    ),
    "group alone": ("ablate a at last token with zero", "defined for `ablate all but CIRCUIT …`"),
}


@pytest.mark.parametrize("key", FAILING)
def test_faithfulness_without_a_run_to_compare_with_is_an_error(data: Path, key: str) -> None:
    rule, reason = FAILING[key]
    block = "uneven" if key == "other places of a mean" else "p"
    text = GROUPS + experiment("e", rule, block=block, measure=FAITHFUL)
    result, found = try_file(text, data, "llama", blocks=BLOCKS + UNEVEN)
    assert result is None
    errors = [each for each in found if each.code == "E0612"]
    assert any(reason in each.message for each in errors), [each.message for each in found]


UNEVEN = """
prompts uneven {
  word in ["w1", "w2"]
  left in ["w30", "w31"]
  template in ["w40 {left} {word} w41", "w40 w40 {left} w41"]
  answer " {word}"
  wrong " w9"
}
"""
"""Rows of equal length in which `left` is at different tokens."""


def test_conventions_name_the_tokens_of_the_run_with_all_ablated(data: Path) -> None:
    every = "all tokens of the prompt, without special tokens; in the same rows"
    heads = "ablate layers * heads * except a at tokens except cue token with zero"
    parts = "ablate resid_post layer 1 at {tokens except cue token, token 0} with zero"
    text = experiment("heads", heads, measure=FAITHFUL) + experiment(
        "parts", parts, measure=FAITHFUL
    )
    found = run_file(GROUPS + text, data, "gpt2", "planned")
    said = {name: each.conventions["∅"] for name, each in found.items()}
    assert said["heads"] == f"`{heads}` ablates 12 sites instead of 9 at {every}"
    assert said["parts"].endswith(f"at the named tokens, where `tokens except …` are {every}")
