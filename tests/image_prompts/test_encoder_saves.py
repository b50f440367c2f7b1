"""`save` at sites of vision encoders of prompts, against vectors that plain hooks read on the bare
model: one unpadded prompt at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..quick import some
from . import test_resampled_encoder as resampled
from . import test_resampled_patches as grids
from .support import STATS, experiment
from .test_encoder_paths import NAMES, Place, edited, seen, state, tower
from .test_families import ALL, bare, inputs, run_text
from .test_token_patches import LAYERS, other
from .test_vision_estimates import slopes

RULE = "scale z vision layer 0 head 0 at photo row 1 col 2 token by 0"
"""A rule in the encoder, in the same experiment."""
PLACES = {
    "resid_post": [Place("resid_pre", 1)],
    "z": [Place("z", layer) for layer in range(LAYERS)],
    "mlp_out": [Place("mlp_out", layer) for layer in range(LAYERS)],
}


RESAMPLED = {
    "photo row 2 col 3 token": lambda given: [grids.in_grid(given, 2, 3)],
    "photo tokens": lambda given: list(grids.spots(given).values()),
    "photo tile 3 tokens": lambda given: grids.in_tile(given, 2),
}


def in_order(saved: dict[str, Tensor], name: str) -> Tensor:
    """Vectors by row of the data, in the file's order within a row."""
    order = torch.argsort(saved["row"], stable=True)
    return saved[name][order]


@pytest.mark.parametrize(
    "mode", some(["planned", "padded on the right", "small passes"], ["planned"])
)
@pytest.mark.parametrize("name", some(NAMES[:-1], ("qwen2_5_vl",)))
def test_saved_patches_equal_hooks(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a token with all of its patches, in two runs, and the mean over rows."""
    monkeypatch.chdir(tmp_path)
    at = "photo row 1 col 2 token"
    lines = [
        f'save {site} vision layer * of {run} at {at} to "{tmp_path}/{site}-{run}.safetensors"'
        for site in PLACES
        for run in ("clean", "changed")
    ]
    lines.append(
        f'save mean of mlp_out vision layer * of clean at {at} to "{tmp_path}/mean.safetensors"'
    )
    run_text(name, experiment("e", "from clean into changed", RULE, *lines), mode)
    own = tower(name)
    count = len(own.cell(0, 1, 2))
    for site, places in PLACES.items():
        for run in ("clean", "changed"):
            saved = load_file(tmp_path / f"{site}-{run}.safetensors")
            images = [n if run == "clean" else other(n) for n in ALL]
            for place in places if (name, site) != ("internvl", "mlp_out") else []:  # it is scaled
                layer = 0 if site == "resid_post" else place.layer
                found = in_order(saved, f"{site}.vision.layer{layer}")
                expected = [
                    seen(name, place, n, image)[own.cell(image, 1, 2)]
                    for n, image in zip(ALL, images, strict=True)
                ]
                assert found.abs().max() > 0.05
                np.testing.assert_allclose(found, torch.cat(expected), atol=1e-4)
            if count > 1:
                assert in_order(saved, "patch").tolist() == [*range(count)] * len(ALL)
            else:
                assert "patch" not in saved
            tokens = in_order(saved, "token").reshape(len(ALL), count)
            assert (tokens == tokens[:, :1]).all()
    mean = load_file(tmp_path / "mean.safetensors")
    for layer in range(LAYERS if name != "internvl" else 0):
        rows = [seen(name, Place("mlp_out", layer), n, n)[own.cell(n, 1, 2)].mean(0) for n in ALL]
        found = mean[f"mlp_out.vision.layer{layer}"]
        np.testing.assert_allclose(found, torch.stack(rows).mean(0), atol=1e-4)


@pytest.mark.parametrize("name", some(NAMES[:-1], ("gemma3",)))
def test_saved_gradients_by_patches_equal_autograd(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at = "photo row 1 col 2 token"
    lines = [
        f"save gradient of logit(answer) - logit(wrong) by {site} vision layer {layer} of changed "
        f'at {at} to "{tmp_path}/{site}{layer}.safetensors"'
        for site, layer in (("resid_pre", 0), ("z", 1))
    ]
    run_text(name, experiment("e", "from clean into changed", RULE, *lines))
    own = tower(name)
    for site, layer in (("resid_pre", 0), ("z", 1)):
        saved = load_file(tmp_path / f"{site}{layer}.safetensors")
        found = in_order(saved, f"{site}.vision.layer{layer}")
        expected = [
            slopes(name, Place(site, layer), inputs(name, n, other(n)))[1][own.cell(other(n), 1, 2)]
            for n in ALL
        ]
        np.testing.assert_allclose(found, torch.cat(expected), atol=1e-4, rtol=1e-3)
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_saved_patches_that_a_resampler_reads_equal_hooks(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches are numbered within their image; the token is the first one of the image."""
    monkeypatch.chdir(tmp_path)
    lines = [
        f'save {site} vision layer 0 of changed at {at} to "{tmp_path}/{site}{n}.safetensors"'
        for site in ("resid_post", "z")
        for n, at in enumerate(RESAMPLED)
    ]
    lines.append(
        f'save mean of z vision layer 0 of changed at photo tokens to "{tmp_path}/mean.safetensors"'
    )
    rule = "scale z vision layer 0 head 0 at photo row 1 col 2 token by 0"
    resampled.run_text(experiment("e", "from clean into changed", rule, *lines), "uneven", mode)
    means: list[Tensor] = []
    for site in ("resid_post", "z"):
        for number, find in enumerate(RESAMPLED.values()):
            saved = load_file(tmp_path / f"{site}{number}.safetensors")
            vectors, patches = (in_order(saved, key) for key in (f"{site}.vision.layer0", "patch"))
            expected, numbers = list[Tensor](), list[int]()
            for n in ALL:
                given = resampled.inputs("uneven", n, other(n))
                own, every = find(given), resampled.patches(given)
                expected.append(resampled.state(site, 0, given)[own])
                numbers += [every.index(patch) for patch in own]
                if site == "z" and number == 1:
                    means.append(expected[-1].mean(0))
            np.testing.assert_allclose(vectors, torch.cat(expected), atol=1e-4)
            assert patches.tolist() == numbers
            for n in ALL:
                [token] = {*saved["token"][saved["row"] == n].tolist()}
                ids = resampled.inputs("uneven", n, other(n))["input_ids"][0].tolist()
                assert token == ids.index(resampled.bare(splits=True).image_id)
    found = load_file(tmp_path / "mean.safetensors")["z.vision.layer0"]
    np.testing.assert_allclose(found, torch.stack(means).mean(0), atol=1e-4)


def test_saved_patches_of_a_run_with_rules_equal_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, path = "gemma3", tmp_path / "x.safetensors"
    lines = (
        "run turned { scale z vision layer 0 at photo row 1 col 2 token by -2 }",
        f'save resid_pre vision layer 1 of turned at photo row 2 col 1 token to "{path}"',
    )
    run_text(name, experiment("e", *lines, measure="").replace("  " + STATS + "\n", ""))
    saved = load_file(path)
    expected: list[Tensor] = []
    for n in ALL:
        own = tower(name)

        with edited(name, Place("z", 0), resampled.times(own.cell(n, 1, 2), -2)):
            run = partial(bare(name).run, inputs(name, n, n))
            expected.append(state(name, Place("resid_pre", 1), run)[own.cell(n, 2, 1)])
    np.testing.assert_allclose(
        in_order(saved, "resid_pre.vision.layer1"), torch.cat(expected), atol=1e-4
    )
