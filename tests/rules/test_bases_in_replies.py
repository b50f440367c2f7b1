"""Rules on coordinates during generation, against passes over the whole text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..quick import some
from .support import QUICK, compare, experiment, plain, rows, run_file, write_data
from .test_in_replies import GENERATE, MOST, write
from .test_steps_in_replies import (
    MEASURE,
    Act,
    at_subject,
    changes_of,
    each,
    entropies,
    everywhere,
    from_last,
    in_steps,
)

HERE = ("gpt2", "llama", "gpt_neox")


def directions(width: int) -> Tensor:
    """Four directions that aren't orthogonal."""
    return torch.randn(4, width, generator=torch.Generator().manual_seed(9))


def moved(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of four coordinates, as a change of one vector."""

    def act(x: Tensor) -> Tensor:
        rows_ = directions(x.shape[-1]).double()
        before = torch.linalg.lstsq(rows_.T, x.reshape(-1, x.shape[-1]).T).solution.T
        before = before.reshape(*x.shape[:-1], 4)
        return x + (change(before) - before) @ rows_

    return act


def put(which: Sequence[int], value: float) -> Callable[[Tensor], Tensor]:
    def change(f: Tensor) -> Tensor:
        f = f.clone()
        f[..., list(which)] = value
        return f

    return change


CASES: dict[str, tuple[str, Sequence[Act]]] = {
    "every token": (
        "clamp features 0..1 of b at tokens * to 3",
        [each("resid_post", 1, everywhere, moved(put([0, 1], 3.0)))],
    ),
    "newest token": (
        "scale features * of b at last token by -2",
        [each("resid_post", 1, from_last, moved(lambda f: -2 * f))],
    ),
    "some steps": (
        "set feature 2 of b at tokens * to 4 during step 1..3",
        [each("resid_post", 1, in_steps(1, 3), moved(put([2], 4.0)))],
    ),
    "prompt only": (
        "ablate features 1..3 of b at subject tokens with zero",
        [each("resid_post", 1, at_subject, moved(put([1, 2, 3], 0.0)))],
    ),
    "after another rule": (
        "scale resid_post layer 1 at tokens * by 2  clamp feature 0 of b at tokens * to 3",
        [
            each("resid_post", 1, everywhere, lambda x: 2 * x),
            each("resid_post", 1, everywhere, moved(put([0], 3.0))),
        ],
    ),
}


@pytest.mark.parametrize("mode", some(QUICK, ["planned"]))
@pytest.mark.parametrize("name", HERE)
def test_rules_act_on_current_coordinates_in_replies(tmp_path: Path, name: str, mode: str) -> None:
    write_data(tmp_path)
    width = plain(name, rows()[0])["resid_post", 1].shape[-1]
    save_file({"r": directions(width)}, tmp_path / "r.safetensors")
    text = 'basis b = saved("r.safetensors", "r") at resid_post layer 1\n' + "".join(
        experiment(f"e{n}", GENERATE, rule, measure=MEASURE)
        for n, (rule, _) in enumerate(CASES.values())
    )
    found = run_file(text, tmp_path, name, mode)
    for number, (_, acts) in enumerate(CASES.values()):
        replies = [write(name, text.ids, partial(changes_of, acts, text)) for text in rows()]
        values = np.array([entropies(name, n, reply) for n, reply in enumerate(replies)])
        values = values.transpose(2, 1, 0)
        own = found[f"e{number}"]
        assert [cell.coords["step"] for cell in own.cells] == list(range(MOST))
        compare(own.measures[0], values[0], values[1], large=0.02, most=False)
