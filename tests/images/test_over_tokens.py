"""Routing, clusters and features of patches, against the bare model on one image at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ..reference.r_squared import r_squared_contributions
from ..rules.test_over_tokens import Fit, cluster_values, members, probabilities
from . import support
from .test_maps import BOXES, given, looking, masks, mass, run

Array = NDArray[np.float64]
GRID = support.GRID
ALL_BUT_ONE = f"(box, folds: {len(BOXES)}, penalty: 4) at resid_post layer 1"


def patches(name: str, folder: Path, layer: int) -> list[Array]:
    """[patch, width] of each image after a layer."""
    found: list[Array] = []
    for row in range(len(BOXES)):
        own = support.forward(name, given(name, folder, row)).sites["resid_post", layer]
        found.append(own[support.patches(name)].flatten(1).detach().numpy())
    return found


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_routed_probe_of_patches_and_its_map_equal_reference(name: str, tmp_path: Path) -> None:
    text = looking(
        "e",
        f"observe routed_probe{ALL_BUT_ONE} at image tokens as told",
        f"observe routing{ALL_BUT_ONE} at each token of image as looked",
    )
    text += looking("inside", "observe mass of looked in object")
    found = run(name, tmp_path, text)
    vectors = patches(name, tmp_path, 1)
    y = np.array(BOXES, dtype=np.float64)
    got, weights = np.empty_like(y), np.empty((len(y), GRID * GRID))
    for row in range(len(y)):
        others = [each for number, each in enumerate(vectors) if number != row]
        fit = Fit(others, np.delete(y, row, axis=0), 4.0)
        got[row] = fit([vectors[row]])[0]
        weights[row] = fit.weights(vectors[row]).detach().numpy()
    told = found["e.told"].measures[0].patched[0]
    np.testing.assert_allclose(told, r_squared_contributions(y, got), rtol=2e-3, atol=5e-3)
    looked = found["e.looked"].measures[0].patched
    np.testing.assert_allclose(looked.T, weights, atol=2e-3)
    assert weights.max() > 2 / GRID**2
    for row, mask in enumerate(masks(name)):
        if mask.any():
            expected = mass(weights[row].reshape(GRID, GRID), mask)
            assert found["inside"].measures[0].patched[0, row] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_cluster_maps_of_patches_equal_reference(name: str, tmp_path: Path) -> None:
    text = looking("e", "observe clusters(3) resid_post layer 2 at each token of image as concept")
    text += looking("inside", "observe mass of concept in object")
    found = run(name, tmp_path, text)
    values = cluster_values(found["e"], 3)
    flat = values.transpose(2, 1, 0).reshape(-1, 3)
    expected = probabilities(patches(name, tmp_path, 2), members(flat))
    np.testing.assert_allclose(flat, expected, atol=1e-3)
    inside = found["inside"].measures[0].patched
    for row, mask in enumerate(masks(name)):
        for cluster in range(3) if mask.any() else ():
            by_hand = mass(values[cluster, :, row].reshape(GRID, GRID), mask)
            assert inside[cluster, row] == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_features_of_patches_equal_reference(name: str, tmp_path: Path) -> None:
    """Covers feature means and the patches with the highest activations."""
    text = "basis n = neurons at resid_post layer 1\n"
    text += looking("e", "observe features of n at image tokens top 3 as seen")
    found = run(name, tmp_path, text)["e"]
    vectors = patches(name, tmp_path, 1)
    means = np.array([each.mean(0) for each in vectors])
    order = np.argsort(-np.abs(means.mean(0)), kind="stable")[:3].tolist()
    assert [cell.coords["feature"] for cell in found.cells] == order
    np.testing.assert_allclose(found.measures[0].patched, means[:, order].T, atol=2e-4)
    for feature, prompts in zip(order, found.active, strict=True):
        for each in prompts:
            values = [value for value in each.values if value is not None]
            np.testing.assert_allclose(values, vectors[each.row][:, feature], atol=2e-4)
            assert "row 1 col 1" in " ".join(each.tokens)
