"""`using` in Llama 3.2 Vision, against autograd with one plain hook on the bare model: one unpadded
prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .support import RECORDS, experiment
from .test_attended_blocks import tower
from .test_attended_encoder import LOCAL, all_columns, column
from .test_attended_encoder import WIDTH as TOWER_WIDTH
from .test_attended_images import (
    CROSS,
    LAYERS,
    WIDTH,
    bare,
    block_at,
    hooked,
    other,
    patch,
    run_text,
    token,
)
from .test_attended_paths import MARKED, Place, attention, given, mlp, run, z

ALL = range(len(RECORDS))
STEPS = 3


@dataclass(frozen=True)
class Cell:
    """Vectors of a site that a cell writes."""

    place: Place
    tokens: Callable[[int], Sequence[int]]
    """Given the number of an image."""
    columns: slice | None = None
    """None for all."""
    scale: float = 1.0
    """What the module's output is multiplied by."""

    def of(self, value: Tensor, image: int) -> Tensor:
        """A view [token, width] of the vectors of the cell, for a tensor of the place."""
        flat = value[0].transpose(0, 1).flatten(1) if value.dim() == 4 else value.flatten(0, -2)
        return flat[list(self.tokens(image))][:, self.columns or slice(None)]


def read(n: int, changed: bool, cell: Cell) -> Tensor:
    """The vectors of a cell in a run."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(cell.of(value, other(n) if changed else n).clone())
        return value

    run(n, changed, [(*cell.place, keep)])
    return found[0]


def slope(
    n: int,
    cell: Cell,
    others: Sequence[tuple[Cell, Tensor]] = (),
    module: Any = None,
    *,
    changed: bool = True,
) -> Tensor:
    """The gradient of the measure by the vectors of a cell.

    Args:
        n: The number of the prompt.
        cell: The cell.
        others: Changes of other cells.
        module: A copy of the bare model in 64 bits.
        changed: Whether the image and the word are those of the changed run.
    """
    inputs = given(n, changed)
    image = other(n) if changed else n
    if module is not None:
        inputs = {
            key: each.double() if each.is_floating_point() else each for key, each in inputs.items()
        }
    model = module or bare()
    leaves: list[Tensor] = []

    def add(value: Tensor) -> Tensor:
        leaf = torch.zeros_like(value)
        for own, by in others:
            with torch.no_grad():
                put(leaf, own, by, image)
        leaves.append(leaf.requires_grad_())
        return value + leaf

    wanted = [each for each in model.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    with torch.enable_grad(), hooked([(*cell.place, add)], module):
        logits = model(**inputs, use_cache=False).logits[0, -1]
        answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        (gradient,) = torch.autograd.grad(logits[answer] - logits[wrong], leaves)
    for each in wanted:
        each.requires_grad_()
    return cell.of(gradient, image)


def put(into: Tensor, cell: Cell, value: Tensor, image: int) -> None:
    rows = list(cell.tokens(image))
    if into.dim() == 4:  # [1, head, token, width], of all heads
        heads = value.unflatten(1, (into.shape[1], into.shape[3])).transpose(0, 1)
        into[0, :, rows] = heads
        return
    flat = into.view(-1, into.shape[-1])
    for at, own in zip(rows, value, strict=True):
        flat[at, cell.columns or slice(None)] = own


def at_last(_: int) -> list[int]:
    return [-1]


def head(number: int, width: int = WIDTH) -> slice:
    return slice(number * width, (number + 1) * width)


def cells_of_text(places: Sequence[Place], heads: int = 0) -> list[Cell]:
    if not heads:
        return [Cell(place, at_last) for place in places]
    return [Cell(place, at_last, head(number)) for place in places for number in range(heads)]


def one_patch(image: int) -> list[int]:
    return [patch(image, 1, 2)]


def in_tower(image: int) -> list[int]:
    return [column(image, 1, 2)]


def gate_of(layer: int) -> float:
    return float(bare().get_submodule(block_at(layer)).cross_attn_mlp_gate.detach().tanh())


ONE = "photo row 1 col 2 token"
LOCALS = [n for n in range(LAYERS) if n not in CROSS]
SITES: dict[str, list[Cell]] = {
    "resid_post layer * at last token": cells_of_text(
        [(block_at(n), False) for n in range(LAYERS)]
    ),
    "z layer * head * at last token": cells_of_text([z(n) for n in LOCALS], 4),
    "z cross layer * head * at last token": cells_of_text([z(n) for n in CROSS], 4),
    "mlp_out layer * at last token": [
        Cell(mlp(n), at_last, scale=gate_of(n) if n in CROSS else 1.0) for n in range(LAYERS)
    ],
    f"v cross layer 1 head * at {ONE}": [
        Cell((f"{attention(1)}.v_proj", False), one_patch, head(number)) for number in range(2)
    ],
    f"k cross layer 1 heads * at {ONE}": [Cell((f"{attention(1)}.k_norm", False), one_patch)],
    f"resid_post vision layer * at {ONE}": [
        Cell((tower(n), False), in_tower) for n in range(LOCAL + 1)
    ],
    f"z vision layer * head * at {ONE}": [
        Cell((f"{tower(n)}.self_attn.o_proj", True), in_tower, head(number, TOWER_WIDTH))
        for n in range(LOCAL + 1)
        for number in range(2)
    ],
}


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_estimates_equal_autograd_on_the_bare_model(mode: str) -> None:
    text = "".join(
        experiment(
            f"{name}{n}",
            "from clean into changed",
            f"patch {site} using {estimator}",
            measure=f"measure logit(answer) - logit(wrong) as {effect}",
        )
        for n, site in enumerate(SITES)
        for name, estimator, effect in (
            ("x", "gradient_input", "delta"),
            ("g", "gradient", "raw"),
            ("i", f"integrated_gradients(steps: {STEPS})", "delta"),
        )
    )
    found = {each.name: each for each in run_text(text, mode, MARKED)}
    base = np.array([run(n, True) for n in ALL])
    for number, (site, cells) in enumerate(SITES.items()):
        ways = [[read(n, False, cell) - read(n, True, cell) for n in ALL] for cell in cells]
        slopes = [[slope(n, cell) for n in ALL] for cell in cells]
        own = zip(ways, slopes, strict=True)
        products = np.array([[float((a * b).sum()) for a, b in zip(*c, strict=True)] for c in own])
        [measure] = found[f"x{number}"].measures
        np.testing.assert_allclose(measure.patched - base, products, atol=3e-4, err_msg=site)
        assert np.abs(products).max() > 0.1
        sizes = [
            [float(g.norm()) / cell.scale for g in each]
            for cell, each in zip(cells, slopes, strict=True)
        ]
        [measure] = found[f"g{number}"].measures
        np.testing.assert_allclose(measure.patched, sizes, rtol=1e-3, atol=1e-4, err_msg=site)
        [measure] = found[f"i{number}"].measures
        np.testing.assert_allclose(
            measure.patched - base, integrated(cells, ways), atol=3e-4, err_msg=site
        )


def integrated(cells: Sequence[Cell], ways: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """All cells of a place move together."""
    found = np.zeros((len(cells), len(ALL)))
    for n in ALL:
        for number, cell in enumerate(cells):
            together = [
                (each, own[n])
                for each, own in zip(cells, ways, strict=True)
                if each.place == cell.place
            ]
            for step in range(STEPS):
                share = (step + 0.5) / STEPS
                moved = [(each, own * share) for each, own in together]
                gradient = slope(n, cell, moved)
                found[number, n] += float((ways[number][n] * gradient).sum()) / STEPS
    return found


def test_estimates_of_zero_at_all_patches_equal_autograd() -> None:
    rule = "ablate mlp_out vision layer 1 at photo tokens with zero using gradient_input"
    [found] = run_text(experiment("e", rule), block=MARKED)
    cell = Cell((f"{tower(1)}.mlp", False), all_columns)
    expected: list[float] = []
    for n in ALL:
        values, leaves = list[Tensor](), list[Tensor]()

        def add(
            value: Tensor, values: list[Tensor] = values, leaves: list[Tensor] = leaves
        ) -> Tensor:
            values.append(value.detach())
            leaves.append(torch.zeros_like(value).requires_grad_())
            return value + leaves[0]

        with torch.enable_grad(), hooked([(*cell.place, add)]):
            logits = bare()(**given(n, False), use_cache=False).logits[0, -1]
            answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
            (gradient,) = torch.autograd.grad(logits[answer] - logits[wrong], leaves)
        expected.append(-float((cell.of(values[0], n) * cell.of(gradient, n)).sum()))
    [measure] = found.measures
    np.testing.assert_allclose((measure.patched - measure.base)[0], expected, atol=3e-4)
    assert np.abs(expected).max() > 0.1
