"""`embed` of an image is the output of the patch embedding before positions are added: rules
there against a hook on that module only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.loading.loader import adopt_model

from ..quick import some
from ..reference.hooks import patch_projection, patch_tokens
from . import support
from .support import CLASSIFIERS, GRID, MORE

NAMES = (*CLASSIFIERS, *MORE)
FAMILIES = some(NAMES, ("vit", "dinov2_with_registers", "clip"))
PART = [(1, 1), (1, 2), (2, 1)]
"""Rows and columns, counted from 1."""
WHERE = "{" + ", ".join(f"image row {row} col {col} token" for row, col in PART) + "}"
Change = Callable[[Tensor], Tensor]
SEEN = "image row 1 col 1 token, image row 3 col 2 token"
"""Other experiments write at one of these."""
RULES: dict[str, tuple[str, Change]] = {
    "zero": (f"ablate embed at {WHERE} with zero", torch.zeros_like),
    "scaled": (f"scale embed at {WHERE} by 2", lambda vectors: 2 * vectors),
    "turned": (f"scale embed at {WHERE} by -0.5", lambda vectors: -0.5 * vectors),
}


def hooked_embedding(name: str, number: int, change: Change) -> tuple[float, Tensor]:
    """The measure of an image with the output of the patch embedding edited by a hook, and the
    unedited output, [patch, width]."""
    module, own = support.double(name), support.stack(name)
    image = patch_projection(module, own)
    assert image is not None
    tokens = [(row - 1) * GRID + col - 1 for row, col in PART]
    seen: list[Tensor] = []

    def hook(part: object, args: object, made: Tensor) -> Tensor:
        vectors = patch_tokens(made).clone()
        seen.append(vectors[0].clone())
        vectors[:, tokens] = change(vectors[:, tokens])
        return vectors.transpose(1, 2).reshape(made.shape) if made.dim() == 4 else vectors

    handle = image.register_forward_hook(hook)
    try:
        with torch.no_grad():
            output = module(**support.inputs(name, support.pixels(name, number)))
    finally:
        handle.remove()
    answer, wrong = (
        support.LABELS.index(each[number]) for each in (support.ANSWERS, support.WRONG)
    )
    return float(output.logits[0, answer] - output.logits[0, wrong]), seen[0]


@pytest.mark.parametrize("mode", ["planned", "plain", "small passes"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rules_at_image_embed_equal_hooks_on_the_patch_embedding(
    name: str, mode: str, tmp_path: Path
) -> None:
    """All rules are in one file, so that they share passes."""
    text = "".join(support.experiment(key, rule) for key, (rule, _) in RULES.items())
    text += support.experiment("seen", f"observe norm embed at {SEEN}", measure="")
    found = support.run_file(text, tmp_path, name, mode, support.blocks_of(name))
    for key, (_, change) in RULES.items():
        expected = [hooked_embedding(name, number, change)[0] for number in range(3)]
        np.testing.assert_allclose(
            found[key].measures[0].patched[0], expected, atol=1e-4, rtol=1e-4
        )
        assert (
            np.abs(found[key].measures[0].patched[0] - found[key].measures[0].base[0]).max() > 1e-3
        )
    for number in range(3):
        _, vectors = hooked_embedding(name, number, RULES["zero"][1])
        norms = vectors[[0, 2 * GRID + 1]].norm(dim=1).numpy()
        np.testing.assert_allclose(found["seen"].measures[0].patched[:, number], norms, rtol=1e-4)


def test_embedding_that_scales_patches_is_rejected() -> None:
    """The embedding scales the output of the projection instead of only adding positions."""
    module = copy.deepcopy(support.bare("vit"))
    embeddings = module.get_submodule("vit.embeddings")
    forward = embeddings.forward
    embeddings.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    model, found = adopt_model("m", module, support.handed("vit")[1])
    assert model is None
    (refused,) = found
    assert refused.code == "E0410"
    assert "the addition to embed of patches is the same for every image" in refused.message
