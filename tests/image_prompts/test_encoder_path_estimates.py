"""Estimates of paths in vision encoders of prompts, against autograd along hooks on the encoder of
the bare model, which hold the outputs of heads and MLPs: one unpadded prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ..images import prompts_of_images as vlm
from ..quick import some
from .support import experiment
from .test_encoder_paths import Path, Place, edited, heads, received, seen, tower
from .test_families import ALL, bare, inputs, run_text
from .test_token_patches import other

NAMES = ("llava_class", "paligemma", "llava_next", "gemma3", "qwen2_5_vl", "idefics2_wide")
QUICK = ("llava_next", "gemma3")
"""One with tiles of two sizes, and one whose tokens are made from several patches."""

CASES: dict[str, list[Path]] = {
    "z vision layer 0 head * -> attn_norm vision layer 1": [
        Path(sender, Place("attn_norm", 1)) for sender in heads("z", 0)
    ],
    "mlp_out vision layer 0 -> mlp_norm vision layer 1": [
        Path(Place("mlp_out", 0), Place("mlp_norm", 1))
    ],
    "z vision layer 0 head 1 -> mlp_norm vision layer 1 through mlps": [
        Path(Place("z", 0, 1), Place("mlp_norm", 1), through_mlps=True)
    ],
}


def estimate(name: str, path: Path, n: int) -> float:
    """The change of the sender times the gradient along the edge, in the base run."""
    own, base, model = tower(name), other(n), bare(name)
    here, given = own.cell(base, 1, 2), inputs(name, n, base)

    def run() -> torch.Tensor:
        return model.model(**given).logits[0, -1]

    old = path.sender.own(seen(name, path.sender, n, base))[here]
    new = path.sender.own(seen(name, path.sender, n, n))[own.cell(n, 1, 2)]
    of_base = {place: seen(name, place, n, base) for place in list_places(path)}
    sent = old.clone().requires_grad_()
    with torch.enable_grad():
        inside = received(name, path, run, lambda place: of_base[place], (here, sent))[here]
        leaf = torch.zeros_like(inside).requires_grad_()

        def add(value: torch.Tensor) -> torch.Tensor:
            value[here] = value[here] + leaf
            return value

        with edited(name, path.receiver, path.receiver.of_head(add)):
            logits = run()
        measure = logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]
        (by_receiver,) = torch.autograd.grad(measure, leaf)
        (slope,) = torch.autograd.grad((inside * by_receiver).sum(), sent)
    return float(((new - old) * slope).sum())


def list_places(path: Path) -> list[Place]:
    """The sites that the path holds, or reads from the base run."""
    return [Place(site, layer) for site in ("z", "mlp_out") for layer in (0, 1)]


@pytest.mark.parametrize("line", CASES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_eap_of_a_path_of_patches_equals_autograd(name: str, line: str) -> None:
    rule, _, rest = line.partition(" through")
    rule = f"path {rule} at photo row 1 col 2 token{' through' * bool(rest)}{rest}"
    [found] = run_text(name, experiment("e", "from clean into changed", rule, "using eap"))
    expected = [[estimate(name, path, n) for n in ALL] for path in CASES[line]]
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched - measure.base, expected, atol=2e-4, rtol=1e-3)
    assert np.abs(expected).max() > 1e-3
