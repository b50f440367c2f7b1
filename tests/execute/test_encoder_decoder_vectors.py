"""Observations that compare vectors of encoder-decoders, and `clamp`, against plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .encoder_decoders import (
    ENCODER_LAYERS,
    LAYERS,
    Place,
    difference,
    logits,
    place,
    read,
    run,
    starts,
    text,
)
from .support import DIFFERENCE, ROWS, Array, experiment

FAMILIES = ("t5", "bart", "t5gemma")
SITES = ("resid_post encoder", "attn_out cross", "mlp_out")


def layers(site: str) -> range:
    return range(ENCODER_LAYERS if "encoder" in site else LAYERS)


def last(family: str, site: str, record: Any, name: str = "clean") -> int:
    return text(record, name).last if "encoder" in site else len(starts(family)) - 1


def vectors(family: str, site: str, layer: int, name: str = "clean") -> Tensor:
    """[prompt, width] at the last token."""
    own = place(family, site, layer)
    found = [read(family, text(row, name), own)[last(family, site, row, name)] for row in ROWS]
    return torch.stack(found).double()


def effective_rank(centred: Array) -> float:
    sizes = np.linalg.svd(centred, compute_uv=False)
    shares = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", some(FAMILIES, ("t5",)))
def test_observations_of_vectors_equal_hooks(family: str, site: str, tmp_path: Path) -> None:
    """Similarity of two runs, the rank of the rows' vectors, and one number of a vector."""
    lines = (
        f"observe similarity {site} layer * of clean with other at last token",
        f"observe effective_rank {site} layer * at last token",
        f"observe value {site} layer * dim 3 at last token",
    )
    found = run(
        family,
        "".join(experiment(f"e{n}", "prompts p", line) for n, line in enumerate(lines)),
        tmp_path,
    )
    similarity, rank, value = (found[f"e{n}"].measures[0].patched for n in range(3))
    for layer in layers(site):
        clean, other = (vectors(family, site, layer, name) for name in ("clean", "other"))
        cosine = torch.nn.functional.cosine_similarity(clean, other)
        np.testing.assert_allclose(similarity[layer], cosine, atol=1e-4)
        np.testing.assert_allclose(value[layer], clean[:, 3], atol=1e-4)
        expected = effective_rank((clean - clean.mean(0)).numpy())
        np.testing.assert_allclose(np.unique(rank[layer]), expected, rtol=1e-3)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", some(FAMILIES, ("t5",)))
def test_clusters_equal_the_reference(family: str, site: str, tmp_path: Path) -> None:
    """Gaussians of equal variance around the means of the most likely clusters, in each layer."""
    line = f"observe clusters(2) {site} layer * at last token"
    found = run(family, experiment("e", "prompts p", line), tmp_path)["e"]
    for layer in layers(site):
        cells = [n for n, cell in enumerate(found.cells) if int(cell.coords["layer"]) == layer]
        shares = found.measures[0].patched[cells]  # [cluster, row]
        own = vectors(family, site, layer).numpy()
        own = own - own.mean(0)
        spread = own.std(0)
        own = own / np.where(spread > 0, spread, 1)
        label = shares.argmax(0)
        centres = np.stack([own[label == n].mean(0) for n in range(2)])
        variance = ((own - centres[label]) ** 2).mean()
        off = ((own[:, None] - centres) ** 2).sum(2)
        scores = np.log(np.bincount(label) / len(label)) - off / (2 * variance)
        expected = torch.tensor(scores).softmax(1).T
        np.testing.assert_allclose(shares, expected, atol=1e-3)


@pytest.mark.parametrize("family", some(FAMILIES, ("bart",)))
@pytest.mark.parametrize("site", SITES)
def test_clamped_components_equal_hooks(family: str, site: str, tmp_path: Path) -> None:
    direction = f"direction d = mean_difference(p, p.other) at {site} layer 1 at last token\n"
    rule = f"clamp d of {site} layer 1 at last token to 30"
    lines = direction + experiment("e", "prompts p", rule, DIFFERENCE)
    measure = run(family, lines, tmp_path)["e"].measures[0]
    own: Place = place(family, site, 1)
    step = (vectors(family, site, 1) - vectors(family, site, 1, "other")).mean(0).float()
    unit = step / step.norm()
    expected = []
    for row in ROWS:
        write = (
            own,
            [last(family, site, row)],
            lambda old: old + (30 - old @ unit)[:, None] * unit,
        )
        expected.append(difference(logits(family, text(row), [write]), row))
    np.testing.assert_allclose(measure.patched[0], expected, atol=3e-4)
    assert np.abs(measure.patched[0] - measure.base[0]).max() > 0.05
