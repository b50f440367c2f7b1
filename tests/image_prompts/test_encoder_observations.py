"""Ranks, CKA, clusters and values of vectors in vision encoders of prompts with images, against
plain hooks on the bare model's encoder. Each token of an image has the mean of its patches."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor

from mechdsl.base.arrays import Floats
from mechdsl.images.layouts import image_layout

from ..images import prompts_of_images as vlm
from ..quick import some
from .reference import record_value
from .support import SIZES, experiment
from .test_encoder_attention import try_line
from .test_encoder_paths import Place, edited, tower
from .test_families import bare, folder, run_text

NAMES = (
    "llava_class",
    "paligemma",
    "llava_next",
    "gemma3",
    "qwen2_5_vl",
    "internvl",
    "smolvlm",
    "idefics2_wide",
)
QUICK = ("llava_next", "gemma3")
MODES = some(["planned", "padded on the right", "small passes"], ["planned"])
IMAGES = range(8)
BLOCK = """
prompts ask {
  rows "more.jsonl"
  image photo = "{file}"
  template "w3 {more} {photo} w1 w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other }
}
"""
"""Two prompts for each image, with different texts before it."""
TOKEN = "photo row 1 col 2 token"


def other(n: int) -> int:
    """Another image of the same size."""
    return (n + 4) % 8


@cache
def write_images() -> None:
    """Write the images and records, which only these tests read."""
    for n in IMAGES:
        small = np.random.default_rng(40 + n).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        height, width = SIZES[n % 4]
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        grown.save(folder() / f"more-{n}.png")
    records = [
        {"file": f"more-{n}.png", "other": f"more-{other(n)}.png", "more": more}
        for more in ("w1", "w2 w3")
        for n in IMAGES
    ]
    text = "\n".join(map(json.dumps, records)) + "\n"
    (folder() / "more.jsonl").write_text(text, encoding="utf-8")


@cache
def values(name: str, place: Place, n: int) -> Tensor:
    """[token of the encoder, width] of an image."""
    picture = Image.open(folder() / f"more-{n}.png").convert("RGB")
    marker, end = vlm.FAMILIES[name].marker, vlm.FAMILIES[name].before_end
    given = bare(name).with_pictures(f"w3 w1 {marker} w1 w3{end}", [picture])
    found = record_value(partial(edited, name, place), partial(bare(name).run, given))
    return found.double()


def mean_of(name: str, place: Place, n: int) -> Floats:
    """[width] of a token of an image."""
    own = place.own(values(name, Place(place.site, place.layer), n))
    return own[tower(name).cell(n % 4, 1, 2)].mean(0).numpy()


def vectors(name: str, place: Place) -> Floats:
    """[image, width]"""
    return np.stack([mean_of(name, place, n) for n in IMAGES])


def cka(x: Floats, y: Floats) -> float:
    """Linear CKA by the estimator of HSIC without bias (Song et al. 2012, equation 5)."""

    def hsic(a: Floats, b: Floats) -> float:
        n, ones = len(a), np.ones(len(a))
        a, b = (own - np.diag(np.diag(own)) for own in (a, b))
        total = np.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / (n - 1) / (n - 2)
        return float(total - 2 * (ones @ a @ b @ ones) / (n - 2)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5


def entropy_rank(x: Floats) -> float:
    """The exponential of the entropy of singular values (Roy and Vetterli 2007)."""
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    share = singular[singular > 1e-6 * singular[0]] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


LINES = (
    f"observe rank resid_pre vision layer * at {TOKEN}",
    f"observe effective_rank resid_pre vision layer * at {TOKEN}",
    f"observe cka resid_pre vision layer * with z vision layer 1 head 1 at {TOKEN}",
    f"observe cka resid_pre vision layer * with changed at {TOKEN}",
    f"observe value resid_pre vision layer * dim 3 at {TOKEN}",
    f"observe clusters(2) z vision layer 0 head * at {TOKEN}",
)


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_observed_vectors_of_patches_equal_those_of_the_bare_encoder(name: str, mode: str) -> None:
    write_images()
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(LINES))
    found = [each.measures[0].patched for each in run_text(name, text, mode, BLOCK)]
    ranks, effective, sites, runs, dims, clusters = found
    streams = [vectors(name, Place("resid_pre", layer)) for layer in (0, 1)]
    for layer, x in enumerate(streams):
        assert set(ranks[layer]) == {np.linalg.matrix_rank(x - x.mean(0), tol=1e-3)}
        np.testing.assert_allclose(effective[layer], entropy_rank(x), rtol=1e-4)
        of_head = vectors(name, Place("z", 1, 1))
        np.testing.assert_allclose(sites[layer].mean(), cka(x, of_head), atol=1e-4)
        changed = np.stack([x[other(n)] for n in IMAGES])
        np.testing.assert_allclose(runs[layer].mean(), cka(x, changed), atol=1e-4)
        np.testing.assert_allclose(dims[layer], np.tile(x[:, 3], 2), atol=1e-4)
    for head in (0, 1):
        x = np.tile(vectors(name, Place("z", 0, head)), (2, 1))
        starts: Any = 20
        fit = KMeans(2, n_init=starts, random_state=0).fit((x - x.mean(0)) / x.std(0))
        likeliest = clusters[2 * head : 2 * head + 2].argmax(0)
        same = (likeliest == fit.labels_).mean()
        assert same in (0, 1)


WRONG = {
    f"observe cka resid_post layer 0 with resid_post vision layer 0 at {TOKEN}": "E0108",
    f"observe similarity z vision layer 0 head 0 with z layer 0 head 0 at {TOKEN}": "E0108",
    "observe rank resid_post vision layer 0 at last token": "E0310",
    f"observe value resid_post vision layer 0 at {TOKEN}": "E0207",
    f"observe logit_lens resid_post vision layer 0 at {TOKEN}": "E0207",
}


@pytest.mark.parametrize(("line", "code"), WRONG.items())
def test_invalid_line_reports_the_code_before_anything_runs(line: str, code: str) -> None:
    assert {each.code for each in try_line("llava_next", line)} == {code}


def in_language(name: str, n: int, more: str) -> Floats:
    """[width] of a token of an image after the first block of the language model."""
    path = folder() / f"more-{n}.png"
    picture = Image.open(path).convert("RGB")
    marker, end = vlm.FAMILIES[name].marker, vlm.FAMILIES[name].before_end
    given = bare(name).with_pictures(f"w3 {more} {marker} w1 w3{end}", [picture])
    sizes = [(picture.height, picture.width)]
    [layout] = image_layout(bare(name).processor, bare(name).model.config, given, sizes)
    tiles = [cell for cell in layout.cells if cell.tile != 0] or layout.cells
    [token] = [cell.position for cell in tiles if (cell.row, cell.col) == (1, 2)]
    return bare(name).states(given)["blocks"][0][token].double().numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES[:-1], ["gemma3"]))
def test_cka_of_patches_with_tokens_of_the_language_model_equals_hooks(
    name: str, mode: str
) -> None:
    """Rows with one image and different texts are distinct."""
    write_images()
    line = f"observe cka resid_pre vision layer * with resid_post layer 0 at {TOKEN}"
    [found] = run_text(name, experiment("e", line, measure=""), mode, BLOCK)
    y = np.stack([in_language(name, n, more) for more in ("w1", "w2 w3") for n in IMAGES])
    for layer in (0, 1):
        x = np.tile(vectors(name, Place("resid_pre", layer)), (2, 1))
        np.testing.assert_allclose(found.measures[0].patched[layer].mean(), cka(x, y), atol=1e-4)
    assert np.abs(found.measures[0].patched).max() > 0.1
    assert "the mean over its patches" in found.conventions["observed"]


@pytest.mark.parametrize("name", some(NAMES, ["gemma3", "idefics2_wide"]))
def test_random_numbers_in_the_encoder_depend_on_image_and_position(name: str) -> None:
    write_images()
    places = f"{TOKEN}, photo row 1 col 1 token"
    lines = [f"observe random(2) {site} vision layer * at {places}" for site in ("z", "mlp_out")]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    first, second = (each.measures[0].patched for each in run_text(name, text, block=BLOCK))
    np.testing.assert_array_equal(first, second)
    values = first.reshape(2, -1, 2, 8)  # layer; draw and position; text; image
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])
    assert len(np.unique(values[0, :, 0])) == 4 * 8
    assert 0 <= values.min() < 0.3 < 0.7 < values.max() <= 1


def test_random_number_of_a_row_is_even_for_all_tokens_of_an_image() -> None:
    write_images()
    line = "observe random resid_post vision layer 0 at each token of photo"
    [found] = run_text("gemma3", experiment("e", line, measure=""), block=BLOCK)
    assert len(np.unique(found.measures[0].patched[:, :8])) == found.measures[0].patched[:, :8].size
