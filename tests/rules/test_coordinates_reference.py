"""Rules on coordinates of a basis, compared with forward passes of a reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .basis_reference import (
    Basis,
    of_directions,
    pca,
    random,
    save_rows,
    saved,
    svd,
    width_of,
    words,
)
from .support import (
    agree,
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
LAST, CUE, SUBJECT = "last token", "cue token", "subject tokens"
LAYERS = range(3)
RANDOM_DIMS = 7


def definitions(folder: Path, name: str) -> str:
    file = save_rows(folder, width_of(name))
    return f"""
basis centred = pca(p, dims: 3) at resid_post layer 1 at last token
basis noise = random(dims: {RANDOM_DIMS}) at resid_post layer 1
basis turned = pca(p.other, dims: 2) at resid_pre layer 2 at subject tokens
basis dims = neurons at z layer 1 head 2
basis pair = rows(unembed, " w3", " w9", " w10") at resid_post layer 1
basis outs = svd(weights: mlp_out, dims: 4) at mlp_out layer 1
basis attention = svd(weights: attn_out, dims: 3) at attn_out layer 2
basis oblique = saved("{file}", "rows") at resid_post layer 1
basis every = pca(second, dims: 2) at resid_post layer * at last token
basis hs = random(dims: 3) at z layer 1 head *
basis start = random(dims: 5) at embed
"""


def centred(name: str) -> Basis:
    return pca(name, "clean", "resid_post", 1, LAST, 3)


def noise(name: str) -> Basis:
    return random(name, 1, "resid_post 1 None", RANDOM_DIMS, width_of(name))


def turned(name: str) -> Basis:
    return pca(name, "other", "resid_pre", 2, SUBJECT, 2)


def dims(name: str) -> Basis:
    return of_directions(torch.eye(width_of(name, "z"), dtype=torch.float64))


def pair(name: str) -> Basis:
    return words(name, "w3", "w9", "w10")


def outs(name: str) -> Basis:
    return svd(name, "mlp_out", 1, 4)


def attention(name: str) -> Basis:
    return svd(name, "attn_out", 2, 3)


def oblique(name: str) -> Basis:
    return saved(width_of(name))


def every(layer: int) -> Callable[[str], Basis]:
    return lambda name: pca(name, "second", "resid_post", layer, LAST, 2)


def of_head(head: int) -> Callable[[str], Basis]:
    return lambda name: random(name, 9, f"z 1 {head}", 3, width_of(name, "z"))


def start(name: str) -> Basis:
    return random(name, 10, "embed None None", 5, width_of(name))


# --- changes ------------------------------------------------------------------------------------

New = Callable[[Tensor], Tensor]
"""New coordinates [K, size] from old ones."""


def to(number: float) -> New:
    return lambda old: torch.full_like(old, number)


def plus(number: float) -> New:
    return lambda old: old + number


def times(number: float) -> New:
    return lambda old: old * number


def changed(
    of: Callable[[str], Basis],
    name: str,
    site: str,
    layer: int | None,
    positions: Sequence[int],
    new: New,
    which: Sequence[int],
    unit: int = 0,
) -> list[Write]:
    basis = of(name)
    return [
        Write(site, layer, lambda x: basis.moved(x, new, which), position, unit)
        for position in positions
    ]


def computed(
    of: Callable[[str], Basis],
    site: str,
    layer: int | None,
    at: str,
    new: New,
    which: Sequence[int],
    unit: int = 0,
):
    """From a family and a prompt: the change at each token of a position."""

    def writes(name: str, n: int) -> list[Write]:
        return changed(of, name, site, layer, tokens(rows()[n], at), new, which, unit)

    return writes


def read(
    of: Callable[[str], Basis],
    site: str,
    layer: int | None,
    at: str,
    which: Sequence[int],
    run: str = "other",
    unit: int = 0,
):
    """From a family and a prompt: the coordinates of another run."""

    def writes(name: str, n: int) -> list[Write]:
        source = rows(run)[n]
        pairs = zip(tokens(source, at), tokens(rows()[n], at), strict=True)
        found: list[Write] = []
        for there, here in pairs:
            value = of(name).coordinates(plain(name, source)[site, layer][there, unit][None])
            found += changed(
                of, name, site, layer, [here], lambda old, v=value: v.expand_as(old), which, unit
            )
        return found

    return writes


def average(
    of: Callable[[str], Basis],
    site: str,
    layer: int | None,
    at: str,
    which: Sequence[int],
    run: str = "clean",
    unit: int = 0,
):
    """From a family and a prompt: the mean coordinates over a run's rows, at one token."""

    def writes(name: str, n: int) -> list[Write]:
        vectors = [plain(name, text)[site, layer][tokens(text, at)[0], unit] for text in rows(run)]
        value = of(name).coordinates(torch.stack(vectors)).mean(0, keepdim=True)
        here = tokens(rows()[n], at)
        return changed(of, name, site, layer, here, lambda old: value.expand_as(old), which, unit)

    return writes


@dataclass(frozen=True)
class Case:
    lines: tuple[str, ...]
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    writes: Callable[..., Sequence[Write]]
    """From a family, a prompt's number and the cell's coordinates."""
    large: float = 0.1


PATCH = "from other into clean"


def one(*lines: str, of: Callable[..., Sequence[Write]], large: float = 0.1) -> Case:
    return Case(lines, (), [()], of, large)


def by(axis: str, values: Sequence[Coord], *lines: str, of: Callable[..., Sequence[Write]]) -> Case:
    return Case(lines, (axis,), [(value,) for value in values], of, 0.02)


ALL_NOISE = range(RANDOM_DIMS)
CASES: dict[str, Case] = {
    "patch all coordinates": one(
        PATCH,
        "patch resid_post layer 1 in basis noise at last token",
        of=read(noise, "resid_post", 1, LAST, ALL_NOISE),
    ),
    "patch components": one(
        PATCH,
        "patch resid_post layer 1 in basis centred at last token",
        of=read(centred, "resid_post", 1, LAST, range(3)),
    ),
    "patch each coordinate": by(
        "feature",
        range(3),
        PATCH,
        "patch feature * of centred at last token",
        of=lambda name, n, k: read(centred, "resid_post", 1, LAST, [k])(name, n),
    ),
    "patch a range jointly": one(
        PATCH,
        "patch features 0..2 of noise at last token",
        of=read(noise, "resid_post", 1, LAST, range(3)),
    ),
    "patch listed coordinates": by(
        "feature",
        (5, 1, 3),
        PATCH,
        "patch feature 5, 1, 3 of noise at last token",
        of=lambda name, n, k: read(noise, "resid_post", 1, LAST, [k])(name, n),
    ),
    "patch the last coordinate": by(
        "feature",
        (RANDOM_DIMS - 2, RANDOM_DIMS - 1),
        PATCH,
        "patch feature -2..-1 of noise at last token",
        of=lambda name, n, k: read(noise, "resid_post", 1, LAST, [k])(name, n),
    ),
    "patch listed coordinates jointly": one(
        PATCH,
        "patch features 6, 2 of noise at last token",
        of=read(noise, "resid_post", 1, LAST, [2, 6]),
    ),
    "patch a coordinate of a loop": by(
        "k",
        (1, 4, 6),
        PATCH,
        "for k in [1, 4, 6] { patch feature k of noise at last token }",
        of=lambda name, n, k: read(noise, "resid_post", 1, LAST, [k])(name, n),
    ),
    "patch ranges of a loop": by(
        "k",
        (0, 2, 5),
        PATCH,
        "for k in [0, 2, 5] { patch features 0..k of noise at last token }",
        of=lambda name, n, k: read(noise, "resid_post", 1, LAST, range(k + 1))(name, n),
    ),
    "patch with another run": one(
        PATCH,
        "patch resid_post layer 1 in basis oblique at cue token with longer",
        of=read(oblique, "resid_post", 1, CUE, range(3), "longer"),
    ),
    "patch several positions": by(
        "position",
        (CUE, "subject token"),
        PATCH,
        "patch resid_post layer 1 in basis pair at cue token, subject token",
        of=lambda name, n, at: read(pair, "resid_post", 1, at, range(3))(name, n),
    ),
    "patch every token": one(
        PATCH,
        "patch resid_post layer 1 in basis noise at tokens *",
        of=read(noise, "resid_post", 1, "tokens *", ALL_NOISE),
    ),
    "patch joined tokens before the layer": one(
        PATCH,
        "patch features 0..1 of turned at {subject tokens, last token}",
        of=read(turned, "resid_pre", 2, f"{{{SUBJECT}, {LAST}}}", range(2)),
    ),
    "patch tokens onto others": one(
        PATCH,
        "patch resid_post layer 1 in basis noise at subject token onto last token",
        of=lambda name, n: [
            write
            for value in [
                noise(name).coordinates(
                    plain(name, rows("other")[n])["resid_post", 1][
                        tokens(rows("other")[n], "subject token")[0]
                    ]
                )
            ]
            for write in changed(
                noise,
                name,
                "resid_post",
                1,
                [rows()[n].last],
                lambda old, value=value: value,
                ALL_NOISE,
            )
        ],
    ),
    "patch numbers of a head": by(
        "feature",
        (0, 3),
        PATCH,
        "patch feature 0, 3 of dims at last token",
        of=lambda name, n, k: read(dims, "z", 1, LAST, [k], unit=2)(name, n),
    ),
    "patch heads with their bases": by(
        "head",
        range(4),
        PATCH,
        "patch z layer 1 head * in basis hs at last token",
        of=lambda name, n, h: read(of_head(h), "z", 1, LAST, range(3), unit=h)(name, n),
    ),
    "patch one head with its basis": one(
        PATCH,
        "patch z layer 1 head 3 in basis hs at last token",
        of=read(of_head(3), "z", 1, LAST, range(3), unit=3),
        large=0.01,
    ),
    "patch heads and coordinates": Case(
        (PATCH, "patch feature 0..1 of hs at last token"),
        ("head", "feature"),
        product(range(4), range(2)),
        lambda name, n, h, k: read(of_head(h), "z", 1, LAST, [k], unit=h)(name, n),
        0.01,
    ),
    "patch each layer in its basis": by(
        "layer",
        LAYERS,
        PATCH,
        "patch feature 0 of every at last token",
        of=lambda name, n, layer: read(every(layer), "resid_post", layer, LAST, [0])(name, n),
    ),
    "patch layers and coordinates": Case(
        (PATCH, "patch feature * of every at last token"),
        ("layer", "feature"),
        product(LAYERS, range(2)),
        lambda name, n, layer, k: read(every(layer), "resid_post", layer, LAST, [k])(name, n),
    ),
    "patch layers jointly in their bases": one(
        PATCH,
        "patch resid_post layers * in basis every at cue token",
        of=lambda name, n: [
            write
            for layer in LAYERS
            for write in read(every(layer), "resid_post", layer, CUE, range(2))(name, n)
        ],
    ),
    "patch a layer of a family": one(
        PATCH,
        "patch resid_post layer 2 in basis every at last token",
        of=read(every(2), "resid_post", 2, LAST, range(2)),
    ),
    "patch another site in a family": by(
        "layer",
        (1, 2),
        PATCH,
        "patch resid_pre layer 1..2 in basis every at subject token",
        of=lambda name, n, layer: read(
            every(layer), "resid_pre", layer, "subject token", range(2)
        )(name, n),
    ),
    "patch contributions": one(
        PATCH,
        "patch mlp_out layer 1 in basis outs at subject tokens",
        of=read(outs, "mlp_out", 1, SUBJECT, range(4)),
    ),
    "patch contributions of attention": by(
        "feature",
        range(3),
        PATCH,
        "patch feature * of attention at last token",
        of=lambda name, n, k: read(attention, "attn_out", 2, LAST, [k])(name, n),
    ),
    "patch contributions of a head": one(
        PATCH,
        "patch head_out layer 1 head 1 in basis noise at last token",
        of=read(noise, "head_out", 1, LAST, ALL_NOISE, unit=1),
        large=0.01,
    ),
    "patch embeddings": one(
        PATCH,
        "patch embed in basis start at subject tokens",
        of=read(start, "embed", None, SUBJECT, range(5)),
    ),
    "patch after the last norm": one(
        PATCH,
        "patch final_norm in basis noise at last token",
        of=read(noise, "final_norm", None, LAST, ALL_NOISE),
    ),
    "zero components": one(
        "ablate resid_post layer 1 in basis centred at cue token with zero",
        of=computed(centred, "resid_post", 1, CUE, to(0), range(3)),
    ),
    "zero of saved rows": by(
        "feature",
        range(3),
        "ablate feature * of oblique at tokens * with zero",
        of=lambda name, n, k: computed(oblique, "resid_post", 1, "tokens *", to(0), [k])(name, n),
    ),
    "mean": one(
        "ablate resid_post layer 1 in basis noise at last token with mean",
        of=average(noise, "resid_post", 1, LAST, ALL_NOISE),
    ),
    "mean of a run": by(
        "feature",
        range(3),
        "ablate feature * of pair at cue token with mean of longer",
        of=lambda name, n, k: average(pair, "resid_post", 1, CUE, [k], "longer")(name, n),
    ),
    "mean of another block": one(
        "ablate resid_post layer 1 in basis oblique at last token with mean of second",
        of=average(oblique, "resid_post", 1, LAST, range(3), "second"),
    ),
    "several fills": Case(
        ("ablate feature 0..1 of oblique at last token with zero, mean, mean of longer",),
        ("fill", "feature"),
        product(("zero", "mean", "mean of longer"), range(2)),
        lambda name, n, fill, k: (
            computed(oblique, "resid_post", 1, LAST, to(0), [k])
            if fill == "zero"
            else average(oblique, "resid_post", 1, LAST, [k], "longer" if "of" in fill else "clean")
        )(name, n),
    ),
    "set": by(
        "feature",
        range(3),
        "set feature * of centred at last token to 2",
        of=lambda name, n, k: computed(centred, "resid_post", 1, LAST, to(2), [k])(name, n),
    ),
    "set all": one(
        "set resid_post layer 1 in basis oblique at subject tokens to 0.5",
        of=computed(oblique, "resid_post", 1, SUBJECT, to(0.5), range(3)),
    ),
    "clamp": by(
        "layer",
        LAYERS,
        "clamp features 0..1 of every at cue token to 2",
        of=lambda name, n, layer: computed(
            every(layer), "resid_post", layer, CUE, to(2), range(2)
        )(name, n),
    ),
    "clamp numbers": one(
        "clamp features 1..3 of dims at tokens * to 2",
        of=computed(dims, "z", 1, "tokens *", to(2), range(1, 4), unit=2),
        large=0.02,
    ),
    "add": one(
        "add 1.5 to feature 0 of outs at last token",
        of=computed(outs, "mlp_out", 1, LAST, plus(1.5), [0]),
    ),
    "add to all": one(
        "add -2 to resid_post layer 1 in basis oblique at tokens *",
        of=computed(oblique, "resid_post", 1, "tokens *", plus(-2), range(3)),
    ),
    "add in doses": by(
        "c",
        (-1, 0, 0.5, 2),
        "for c in [-1, 0, 0.5, 2] { add c to feature 1 of noise at last token }",
        of=lambda name, n, c: computed(noise, "resid_post", 1, LAST, plus(c), [1])(name, n),
    ),
    "scale": by(
        "c",
        (0, 1, -2.5),
        "for c in [0, 1, -2.5] { scale features 1..2 of centred at cue token by c }",
        of=lambda name, n, c: computed(centred, "resid_post", 1, CUE, times(c), [1, 2])(name, n),
    ),
    "scale all": one(
        "scale resid_post layer 1 in basis oblique at tokens * by 3",
        of=computed(oblique, "resid_post", 1, "tokens *", times(3), range(3)),
    ),
    "scale in another layer": by(
        "layer",
        LAYERS,
        "scale resid_post layer * in basis noise at last token by -1",
        of=lambda name, n, layer: computed(
            noise, "resid_post", layer, LAST, times(-1), ALL_NOISE
        )(name, n),
    ),
    "a token that is named twice": one(
        "add 2 to features 0..1 of noise at {last token, cue token, last token}",
        of=computed(noise, "resid_post", 1, f"{{{CUE}, {LAST}}}", plus(2), range(2)),
    ),
    "between attention and MLP": one(
        PATCH,
        "patch resid_mid layers 0..1 in basis noise at last token",
        of=lambda name, n: [
            write
            for layer in (0, 1)
            for write in read(noise, "resid_mid", layer, LAST, ALL_NOISE)(name, n)
        ],
    ),
}  # fmt: skip


@cache
def results(data: Path, family: str, mode: str) -> dict[str, ExperimentResult]:
    text = definitions(data, family)
    for key, case in chosen(family).items():
        text += experiment(name_of(key), *case.lines)
    return run_file(text, data, family, mode)


UNREAD = ("patch contributions", "set all")
"""Cases at tokens that no later one attends to in `gemma2`, whose window is short."""


def chosen(family: str) -> dict[str, Case]:
    without = {"gpt_neox": ("between attention and MLP",), "gemma2": UNREAD}.get(family, ())
    return {key: case for key, case in CASES.items() if key not in without}


def name_of(key: str) -> str:
    return key.replace(" ", "_")


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), HERE, list(MODES)[:2]))
def test_rules_on_coordinates_equal_the_reference(family: str, mode: str, data: Path) -> None:
    found, problems = results(data, family, mode), list[str]()
    for key, case in chosen(family).items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.writes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        base = unpatched(family)
        try:
            agree(found[name_of(key)], case.axes, expected, base, large=1e-3, most=False)
        except AssertionError as error:
            problems.append(f"{key}: {str(error)[:300]}")
    assert not problems, "\n".join(problems)
