"""`project out feature 3 of b`, against orthogonal projections of vectors by QR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechdsl.resolve.cells import Coord

from ..reference.forward import Changes, Write
from . import test_transcoders as transcoders
from .basis_reference import SAVED_DIMS, pca, save_rows, saved
from .support import (
    MANY,
    QUICK,
    agree,
    codes,
    compare,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)
from .test_dictionaries import FEATURES, LAYER, Reference, make
from .test_in_replies import GENERATE, write
from .test_inactive_features import width_of
from .test_steps_in_replies import MEASURE, changes_of, each, entropies, everywhere

HERE = ("gpt2", "llama", "gpt_neox")
SAE = f'basis f = sae("sae") at resid_post layer {LAYER}\n'


def removed(directions: Tensor, x: Tensor) -> Tensor:
    """[K, width] without the projection onto the span of directions [m, width]."""
    basis, upper = torch.linalg.qr(directions.double().T)
    independent = upper.diagonal().abs() > 1e-6
    basis = basis[:, independent]
    return x - (x @ basis) @ basis.T


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    basis: str
    which: str = "cell"
    """The removed coordinates: of the cell, or numbers."""
    at: str = "last token"


CASES: dict[str, Case] = {
    "each feature": Case(
        "project out feature * of f at last token",
        ("feature",),
        [(i,) for i in range(FEATURES)],
        "f",
    ),
    "several features": Case(
        "project out features 1, 4..6 of f at tokens *", (), [()], "f", "1 4 5 6", "tokens *"
    ),
    "all features except some": Case(
        "for i in 0..2 { project out feature i of f at subject tokens }",
        ("i",),
        [(0,), (1,), (2,)],
        "f",
        at="subject tokens",
    ),
    "directions that aren't orthogonal": Case(
        "project out feature * of b at tokens *",
        ("feature",),
        [(i,) for i in range(SAVED_DIMS)],
        "b",
        at="tokens *",
    ),
    "their span": Case(
        f"project out resid_post layer {LAYER} in basis b at last token", (), [()], "b", "0 1 2"
    ),
    "a centred basis": Case(
        "project out feature 0..1 of c at last token", ("feature",), [(0,), (1,)], "c"
    ),
    "numbers of the vector": Case(
        f"project out resid_post layer {LAYER} dims 2..4 at last token", (), [()], "dims", "2 3 4"
    ),
}


def directions_of(family: str, name: str, of: Reference) -> Tensor:
    """[size, width]"""
    width = width_of(family)
    match name:
        case "f":
            return of.w_dec
        case "b":
            return saved(width).directions
        case "c":
            return pca(family, "clean", "resid_post", LAYER, "last token", 2).directions
        case _:
            return torch.eye(width).double()


@pytest.mark.parametrize("mode", [*MANY, "padded on the right"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "layer_norm"])
@pytest.mark.parametrize("family", HERE)
def test_project_out_features_equals_the_qr_projection(
    family: str, architecture: str, mode: str, data: Path
) -> None:
    width = width_of(family)
    of, name = make(data, architecture, width), save_rows(data, width)
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = SAE + f'basis b = saved("{name}", "rows") at resid_post layer {LAYER}\n'
    text += f"basis c = pca(p, dims: 2) at resid_post layer {LAYER} at last token\n"
    text += "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            which = [int(str(i)) for i in (cell if case.which == "cell" else case.which.split())]
            own = directions_of(family, case.basis, of)[which]
            at = tokens(rows()[n], case.at)
            return [([Write("resid_post", LAYER, partial(removed, own), one) for one in at], ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), large=0.02, most=False)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def test_project_out_dependent_features_removes_their_span_once(data: Path) -> None:
    """Two features with equal directions remove as much as one of them."""
    of = make(data, "standard", width_of("llama"))
    path = data / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights["W_dec"][3] = 2 * weights["W_dec"][1]
    save_file(weights, path)
    text = SAE + experiment("e", "project out features 1, 3 of f at last token")

    def changes(n: int) -> list[Changes]:
        return [([Write("resid_post", LAYER, partial(removed, of.w_dec[[1]]), rows()[n].last)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(run_file(text, data, "llama", "planned")["e"], (), expected, unpatched("llama"))


def test_project_out_of_a_coordinate_equals_that_of_its_direction(data: Path) -> None:
    text = (
        "direction d = mean_difference(p.other, p) at resid_post layer 1 at last token\n"
        "basis b = directions(d) at resid_post layer 1\n"
        + experiment("e", "project out feature 0 of b at tokens *")
        + experiment("g", "project out d from resid_post layer 1 at tokens *")
    )
    found = run_file(text, data, "llama", "planned")
    one, other = (found[name].measures[0].patched for name in "eg")
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert "error of b" not in found["e"].conventions


@pytest.mark.parametrize("kind", ["skip_transcoder", "sparsify"])
@pytest.mark.parametrize("family", HERE)
def test_project_out_transcoder_features_changes_the_mlp_output(
    family: str, kind: str, data: Path
) -> None:
    of = transcoders.make(data, kind, width_of(family))
    text = transcoders.BASIS + experiment("e", "project out features 2, 5 of t at tokens *")
    act = partial(removed, of.weights["W_dec"][[2, 5]])

    def changes(n: int) -> list[Changes]:
        at = tokens(rows()[n], "tokens *")
        return [([Write("mlp_out", LAYER, act, one) for one in at], ())]

    expected = worked_out(family, [()], changes, rows(), records())
    found = run_file(text, data, family, "planned")["e"]
    agree(found, (), expected, unpatched(family), most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("family", HERE)
def test_project_out_features_acts_at_each_step_of_a_reply(
    family: str, mode: str, data: Path
) -> None:
    of = make(data, "standard", width_of(family))
    rule = "project out features 0, 3 of f at tokens *"
    text = SAE + experiment("e", GENERATE, rule, measure=MEASURE)
    acts = [each("resid_post", LAYER, everywhere, partial(removed, of.w_dec[[0, 3]]))]
    replies = [write(family, text.ids, partial(changes_of, acts, text)) for text in rows()]
    values = np.array([entropies(family, n, reply) for n, reply in enumerate(replies)])
    values = values.transpose(2, 1, 0)
    found = run_file(text, data, family, mode)["e"]
    compare(found.measures[0], values[0], values[1], large=0.02, most=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("project out features * of f at last token", "E0342"),
        ("project out resid_post layer 1 in basis f at last token", "E0342"),
        ("project out feature 1 of f at last token without error", "E0342"),
        ("project out resid_post layer 1 at last token", "E0101"),
        ("project out feature 12 of f at last token", "E0301"),
        ("project out feature 1 of g at last token", "E0201"),
        ("project out feature 1 of f from resid_post layer 1 at last token", "E0101"),
        ("project out nothing at last token", "E0101"),
    ],
)
def test_invalid_projections_are_errors(line: str, code: str, data: Path) -> None:
    make(data, "standard", width_of("llama"))
    assert code in codes(SAE + experiment("e", line), data)
