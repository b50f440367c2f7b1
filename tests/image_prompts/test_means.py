"""Mean images of a block in prompts, against plain hooks on the bare model with its processor: one
unpadded prompt at a time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mechdsl

from . import support, test_families
from .reference import at
from .support import RECORDS, TEMPLATE, experiment, run_file, try_file
from .test_families import bare as bare_of
from .test_rules import ANY, difference, image_tokens, states

SIDES = (30, 26)
"""Height and width of the images of the mean."""
BLOCK = (
    """
images photos {
  rows "even.jsonl"
  image "{even}"
  answer "a"
}
"""
    + support.BLOCK
    + """
prompts neutral {
  rows "data.jsonl"
  image photo = mean of photos
  template "{photo} how many {what} are there ? answer :"
  answer " {n}"
  wrong " {m}"
}
"""
)


@cache
def even_images(folder: Path) -> list[Image.Image]:
    """Write images of one size and the records that name them."""
    rows: list[str] = []
    found: list[Image.Image] = []
    for number in range(3):
        small = np.random.default_rng(10 + number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(SIDES[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"even-{number}.png")
        rows.append(json.dumps({"even": f"even-{number}.png"}))
        found.append(image)
    (folder / "even.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return found


@pytest.fixture(autouse=True)
def folder() -> Path:
    even_images(support.folder_of("llava"))
    return support.folder_of("llava")


def mean_image(images: list[Image.Image]) -> Image.Image:
    total = np.stack([np.asarray(image, dtype=np.float64) for image in images]).mean(0)
    return Image.fromarray(total.round().astype(np.uint8))


@cache
def average() -> Image.Image:
    return mean_image(even_images(support.folder_of("llava")))


@pytest.mark.parametrize("mode", ANY)
def test_patches_into_a_mean_image_equal_hooks(mode: str) -> None:
    rule = "patch resid_post layer 0 at photo row 2 col 1..3 tokens"
    found = run_file(experiment("e", "from ask into neutral", rule), "llava", mode, BLOCK)["e"]
    bare, tokens = support.bare("llava"), image_tokens("llava")[3:6]
    base, values = list[float](), list[float]()
    for n, record in enumerate(RECORDS):
        given = bare.with_pictures(TEMPLATE.format(**record), [average()])
        own = states("llava", n, n)["blocks"][0][tokens]
        base.append(difference("llava", bare.run(given), n))
        values.append(difference("llava", bare.run(given, blocks={0: at(tokens, own)}), n))
    np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.subtract(base, values)).max() > 0.1
    said = "mean of 3 images of `photos`, before any `limit`, in pixels before preparation, rounded"
    assert said in str(found.conventions)


def test_mean_image_next_to_another_image_equals_reference() -> None:
    """The mean image precedes a corrupted image."""
    block = BLOCK.replace(
        'template "{photo} how', 'image still = mean of photos\n  template "{still} {photo} how', 1
    )
    text = experiment("e", "from clean into changed", "patch embed at photo tokens")
    found = run_file(text, "llava", block=block)["e"]
    bare, base = support.bare("llava"), list[float]()
    for n, record in enumerate(RECORDS):
        own = Image.open(support.folder_of("llava") / f"{(n + 1) % 4}.png").convert("RGB")
        given = bare.with_pictures("<image> " + TEMPLATE.format(**record), [average(), own])
        base.append(difference("llava", bare.run(given), n))
    np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_vl"])
def test_mean_image_of_each_family_equals_reference(name: str) -> None:
    """The mean is processed and tiled like any image of its size."""
    images = even_images(test_families.folder())
    block = 'images photos { rows "even.jsonl" image "{even}" answer "a" }\n'
    block += test_families.BLOCK.replace('"{file}"', "mean of photos", 1)
    rule = "ablate resid_post layer 0 at photo tokens with zero"
    [found] = test_families.run_text(name, experiment("e", rule), block=block)
    own, values = bare_of(name), list[float]()
    marker = test_families.vlm.FAMILIES[name].marker
    for words in test_families.WORDS:
        given = own.with_pictures(f"w3 w2 {marker} w1 {words} w3", [mean_image(images)])
        values.append(test_families.difference(own.run(given)))
    np.testing.assert_allclose(found.measures[0].base[0], values, atol=1e-4)


def test_mean_image_of_a_part_differs_from_that_of_the_block() -> None:
    blocks = BLOCK.replace('image "{even}"', 'split 67%\n  image "{even}"')
    text = experiment("e", "from ask into neutral", "patch embed at photo tokens")
    values = [
        run_file(text, "llava", block=each)["e"].measures[0].base[0]
        for each in (blocks, blocks.replace("mean of photos", "mean of photos.train"))
    ]
    assert np.abs(values[0] - values[1]).max() > 1e-3


def test_mean_image_depends_on_each_of_its_images(folder: Path) -> None:
    """The second run omits one image of the mean."""
    text = experiment("e", "from ask into neutral", "patch embed at photo tokens")
    first = run_file(text, "llava", block=BLOCK)["e"].measures[0].base[0]
    fewer = BLOCK.replace('rows "even.jsonl"', 'rows "two.jsonl"')
    lines = (folder / "even.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (folder / "two.jsonl").write_text("\n".join(lines), encoding="utf-8")
    second = run_file(text, "llava", block=fewer)["e"].measures[0].base[0]
    assert np.abs(first - second).max() > 1e-3


def test_store_key_depends_on_files_of_a_mean_image(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text = experiment("e", "from ask into neutral", "patch embed at photo tokens")
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local(".")\n{BLOCK}\n{text}', encoding="utf-8")
    store = tmp_path / "store"
    first, again = (mechdsl.run(path, store=store)["e"].measures[0].base[0] for _ in range(2))
    Image.fromarray(255 - np.asarray(even_images(folder)[0])).save(tmp_path / "even-0.png")
    other = mechdsl.run(path, store=store)["e"].measures[0].base[0]
    np.testing.assert_array_equal(first, again)
    assert np.abs(other - first).max() > 1e-3


def test_mean_image_as_a_video_frame_equals_reference() -> None:
    block = BLOCK.replace('image photo = "{file}"', 'video photo = ["{file}", mean of photos]', 1)
    rule = "ablate resid_post layer 0 at frame 2 tokens with zero"
    found = run_file(experiment("e", rule), "llava", block=block)["e"]
    bare, base = support.bare("llava"), list[float]()
    for n, record in enumerate(RECORDS):
        own = Image.open(support.folder_of("llava") / f"{n}.png").convert("RGB")
        given = bare.with_pictures("<image>" + TEMPLATE.format(**record), [own, average()])
        base.append(difference("llava", bare.run(given), n))
    np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        ('rows "even.jsonl"\n  image "{even}"', 'rows "data.jsonl"\n  image "{file}"', "E0207",
         "its images have several, such as 24 x 24 and "),
        ("mean of photos", "mean of ask", "E0207", "`ask` is a prompts block"),
        ("mean of photos", "mean of photo", "E0201", "photos"),
        ("mean of photos", "mean of photos.train", "E0201", "no `split`"),
        ("mean of photos", "mean of photos\n  region part of photo = what", "E0207", "no regions"),
        ("mean of photos", "mean", "E0207", "needs a block of images"),
        ('image "{even}"', 'image "{even}.gif"', "E0560", ".gif"),
    ],
)  # fmt: skip
def test_invalid_mean_reports_code_and_fix(before: str, after: str, code: str, said: str) -> None:
    assert before in BLOCK
    text = experiment("e", "from ask into neutral", "patch embed at photo tokens")
    _, found = try_file(text, "llava", block=BLOCK.replace(before, after, 1))
    errors = [each for each in found if each.severity == "error"]
    assert code in [each.code for each in errors], errors
    shown = " ".join(support.render_full(errors, color=False, width=1000).split())
    assert said in shown, shown
