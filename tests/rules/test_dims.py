"""`dims 0..7` of a site: numbers of its vectors, or coordinates in a basis, against writes of these
numbers in forward passes of the bare model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechdsl.resolve.cells import Coord

from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .support import (
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)

HERE = ("gpt2", "llama", "gpt_neox", "gemma2")


def vector(
    name: str, run: str, n: int, site: str, layer: int | None, at: str, unit: int = 0
) -> Tensor:
    text = rows(run)[n]
    return plain(name, text)[site, layer][tokens(text, at)[-1], unit]


def mean(name: str, site: str, layer: int, at: str) -> Tensor:
    return torch.stack(
        [vector(name, "clean", n, site, layer, at) for n in range(len(rows()))]
    ).mean(0)


def put(which: Sequence[int], value: Tensor | float) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        x = x.clone()
        index = list(which)
        x[..., index] = value[index] if isinstance(value, Tensor) else value
        return x

    return act


def plus(which: Sequence[int], number: float) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., list(which)] += number
        return x

    return act


def times(which: Sequence[int], factor: float) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., list(which)] *= factor
        return x

    return act


def writes(
    n: int, at: str, change: Callable[[Tensor], Tensor], site: str = "resid_post",
    layer: int | None = 1, unit: int | None = 0,
) -> list[Write]:  # fmt: skip
    return [Write(site, layer, change, position, unit) for position in tokens(rows()[n], at)]


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    changes: Callable[..., Sequence[Write]]


LAST = "last token"
SOURCE = "from other into clean  "
CASES = {
    "joined": Case(
        f"{SOURCE}patch resid_post layer 1 dims 0..3, 7 at {LAST}",
        (),
        [()],
        lambda m, n: writes(
            n, LAST, put([0, 1, 2, 3, 7], vector(m, "other", n, "resid_post", 1, LAST))
        ),
    ),
    "swept": Case(
        f"{SOURCE}patch resid_post layer 1..2 dim 0, 5 at {LAST}",
        ("layer", "dim"),
        product((1, 2), (0, 5)),
        lambda m, n, layer, dim: writes(
            n, LAST, put([dim], vector(m, "other", n, "resid_post", layer, LAST)), layer=layer
        ),
    ),
    "mean and zero": Case(
        "ablate mlp_out layer 0 dims 2..4 at cue token with mean, zero",
        ("fill",),
        [("mean",), ("zero",)],
        lambda m, n, fill: writes(
            n,
            "cue token",
            put([2, 3, 4], mean(m, "mlp_out", 0, "cue token") if fill == "mean" else 0.0),
            "mlp_out",
            0,
        ),
    ),
    "scaled": Case(
        "for c in [-1, 3] { scale resid_pre layer 1 dims 1..9 at tokens * by c }",
        ("c",),
        [(-1,), (3,)],
        lambda m, n, c: writes(n, "tokens *", times(range(1, 10), c), "resid_pre"),
    ),
    "of a loop": Case(
        "for k in 1..2 { set resid_post layer 1 dims 0..k at last token to 4 }",
        ("k",),
        [(1,), (2,)],
        lambda m, n, k: writes(n, LAST, put(range(k + 1), 4.0)),
    ),
    "of one head": Case(
        f"{SOURCE}patch z layer 1 head 0..1 dims 0, 2 at {LAST}",
        ("head",),
        [(0,), (1,)],
        lambda m, n, head: writes(
            n, LAST, put([0, 2], vector(m, "other", n, "z", 1, LAST, head)), "z", 1, head
        ),
    ),
    "all": Case(
        f"{SOURCE}patch resid_post layer 1 dims * at {LAST}",
        (),
        [()],
        lambda m, n: writes(
            n, LAST, lambda x: vector(m, "other", n, "resid_post", 1, LAST).expand_as(x)
        ),
    ),
    "beside whole vectors": Case(
        "add 1 to resid_post layer 1 dims 0..1 at last token  "
        "scale resid_post layer 1 at last token by 2  clamp resid_post layer 1 dims 1 at tokens * "
        "to 0.5",
        (),
        [()],
        lambda m, n: [
            *writes(n, LAST, lambda x: 2 * plus([0, 1], 1)(x)),
            *writes(n, "tokens *", put([1], 0.5)),
        ],
    ),
}


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), HERE))
def test_rules_on_dims_equal_the_reference(family: str, mode: str, data: Path) -> None:
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.changes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def test_dims_in_a_basis_equal_features_of_the_basis(data: Path) -> None:
    """Also at sites other than that of the basis."""
    text = "basis b = pca(p, dims: 3) at resid_post layer 1 at last token\n"
    pairs = (
        ("patch feature 0..1 of b at last token", "patch resid_post layer 1 in basis b dim 0..1"),
        (
            "ablate features 0, 2 of b at tokens * with zero",
            "ablate resid_post layer 1 in basis b dims 0, 2",
        ),
    )
    for number, (one, other) in enumerate(pairs):
        at, _, fill = one.partition(" at ")[2].partition(" with ")
        second = f"{other} at {at}" + (f" with {fill}" if fill else "")
        text += experiment(f"a{number}", SOURCE + one) + experiment(f"b{number}", SOURCE + second)
    text += experiment("c", SOURCE + "patch mlp_out layer 1 in basis b dims 1..2 at last token")
    found = run_file(text, data, "llama", "planned")
    for number in range(len(pairs)):
        one, other = (found[f"{name}{number}"].measures[0].patched for name in "ab")
        assert (one == other).all()
    assert found["c"].cells[0].site == "L1.mlp_out in b dims 1..2"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("patch resid_post layer 1 dims 0..999 at last token", "E0301"),
        ("patch pattern layer 1 head 0 dims 0 at last token", "E0342"),
        ("patch z layer 1 dims 0..99 at last token", "E0301"),
        ("patch layer 1 head 0 dim 99 at last token", "E0301"),
        ("observe norm resid_post layer 1 dims 0..3 at last token", "E0108"),
        ("path resid_post layer 1 dims 0..3 -> logits at last token", "E0108"),
        ("patch resid_post layer 1 dims 0..3 at last token into layer 2", "E0342"),
        ("patch resid_post dims 0..3 layer 1 at last token", "E0101"),
        ("patch resid_post layer 1 dims 0:4 at last token", "E0101"),
        ("using gradient  patch resid_post layer 1 dims 0..3 at last token", "E0608"),
        ("set attn_out layer 1 dims 0..1 at last token to reconstruction of b", "E0342"),
    ],
)
def test_invalid_dims_are_errors(line: str, code: str, data: Path) -> None:
    text = "basis b = random(dims: 2) at resid_post layer 1\n" + experiment("e", SOURCE + line)
    assert code in codes(text, data)
