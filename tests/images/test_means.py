"""Mean images of a block: `image mean of scenes`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.images.pixels import model_input
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer

from ..quick import in_turn
from . import support
from .support import copied, difference, forward, plain
from .test_blocks import SCENES, check, codes, folder_of

NEUTRAL = support.BLOCKS.replace("image gray", "image mean of scenes")


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(["vit", "dinov2_with_registers", "clip"], ["planned", "plain"])
)
def test_patches_into_the_mean_image_equal_hooks(name: str, mode: str, tmp_path: Path) -> None:
    """The reference averages the library's processed images; the files have different sizes."""
    rule = "patch resid_post layer 0 at image row 1..2 col * tokens"
    text = support.experiment("e", "from scenes into neutral", rule)
    found = support.run_file(text, tmp_path, name, mode, NEUTRAL)["e"]
    mean = torch.stack([support.pixels(name, number) for number in range(3)]).mean(0)
    tokens = [support.token(name, row, col) for row in (1, 2) for col in range(1, 5)]
    base: list[float] = []
    expected: list[float] = []
    for number in range(3):
        writes = {("resid_post", 0): copied(plain(name, number), "resid_post", 0, tokens)}
        base.append(difference(forward(name, mean), number))
        expected.append(difference(forward(name, mean, writes), number))
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)
    gray = [difference(plain(name, None), number) for number in range(3)]
    assert np.abs(np.subtract(base, gray)).max() > 0.1
    assert np.abs(np.subtract(base, expected)).max() > 0.05


def test_mean_image_uses_all_rows_of_the_block_or_part(tmp_path: Path) -> None:
    folder_of(tmp_path)
    scenes = SCENES.replace("kind in", "split 50% x in 1..6 where x != 3 kind in")
    whole, half = (
        _mean(tmp_path, f"{scenes}\nimages neutral {{ image mean of {block} }}")
        for block in ("scenes", "scenes.train")
    )
    assert whole[0] == "mean of 1,000 of scenes"  # number of rows sampled from the combinations
    assert half[0] == "mean of 1,000 of scenes.train"
    assert np.abs(whole[1] - half[1]).max() > 1e-3


def _mean(folder: Path, blocks: str) -> tuple[str, np.ndarray]:
    lines = ("from scenes into neutral", "patch embed at cls token")
    [experiment], problems = check(folder, *lines, blocks=blocks)
    assert not problems
    image = experiment.table.runs["neutral"].rows[0].image
    reader = experiment.model.tokenizer
    assert image is not None
    assert isinstance(reader, ImageTokenizer)
    by_hand = np.mean([model_input(each, reader.processing) for each in image.of], axis=0)
    found = model_input(image, reader.processing)
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    said = experiment.table.conventions["image of neutral"]
    assert said.startswith(f"mean of {len(image.of):,} images of `{image.said}`")
    return image.words, found


@pytest.mark.slow
def test_mean_of_noise_images_uses_the_model_size(tmp_path: Path) -> None:
    folder_of(tmp_path)
    noisy = 'images snow { x in 1..20 image noise answer "circle" }'
    words, found = _mean(tmp_path, f"{SCENES}\n{noisy}\nimages neutral {{ image mean of snow }}")
    assert words == "mean of 1,000 of snow"
    assert np.abs(found).max() < 0.25


def test_text_of_the_mean_image_depends_on_its_images(tmp_path: Path) -> None:
    """Shared rows and cached values depend on every image in the mean."""
    folder_of(tmp_path)
    texts = {
        check(
            tmp_path,
            "from scenes into neutral",
            "patch embed at cls token",
            blocks=f"{seed}\n{SCENES}\nimages neutral {{ image mean of scenes }}",
        )[0][0].table.runs["neutral"].rows[0].text
        for seed in ("seed 1", "seed 2", "seed 1")
    }  # fmt: skip
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("mean", "E0207"),
        ("mean(scenes)", "E0207"),
        ("mean of nothing", "E0201"),
        ("mean of told", "E0207"),
        ("mean of scenes.train", "E0201"),
        ("mean of neutral", "E0207"),
        ("mean of scenes corrupt c { mask image }", "E0207"),
        ("mean of scenes region a = box", "E0207"),
        ("blur", "E0207"),
        ("blur of scenes", "E0207"),
        ("men of scenes", "E0203"),
    ],
)
def test_invalid_mean_image_is_rejected(image: str, wanted: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = f'{SCENES}\nprompts told {{ template "a" }}\nimages neutral {{ image {image} }}'
    lines = ("from scenes into neutral", "patch embed at cls token")
    assert codes(tmp_path, *lines, blocks=blocks)[:1] == [wanted]
