"""Mean images of a block in prompts, against plain hooks on the bare model with its processor: one
unpadded prompt at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mechdsl
from mechdsl.base.text import Source
from mechdsl.images.picture import Picture, mean_picture
from mechdsl.images.processing import BICUBIC, Processing

from ..execute.support import MODES, run_on
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


UNEVEN = ((30, 26), (11, 40), (52, 28), (8, 9))
"""(height, width) of images of several sizes."""


def write_uneven(folder: Path) -> list[Image.Image]:
    found: list[Image.Image] = []
    for number, sides in enumerate(UNEVEN):
        draws = np.random.default_rng(20 + number)
        found.append(Image.fromarray(draws.integers(0, 256, (*sides, 3), dtype=np.uint8)))
        found[-1].save(folder / f"uneven-{number}.png")
    names = (json.dumps({"uneven": f"uneven-{n}.png"}) for n in range(len(UNEVEN)))
    (folder / "uneven.jsonl").write_text("\n".join(names) + "\n", encoding="utf-8")
    return found


UNEVEN_BLOCK = 'images photos { rows "uneven.jsonl" image "{uneven}" answer "a" }\n'


def fitted_mean(name: str, images: list[Image.Image]) -> Image.Image:
    """The mean of what the model's image processor makes of each image before it scales levels."""
    reader = test_families.vlm.processor(name).image_processor
    fitted: list[Image.Image] = []
    for image in images:
        made = reader(image, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(next(each for key, each in made.items() if "pixel_values" in key))
        fitted.append(Image.fromarray(np.moveaxis(pixels[0], 0, -1).astype(np.uint8)))
    return mean_image(fitted)


@pytest.mark.parametrize("name", ["llava_class", "video_llava", "paligemma", "gemma3"])
def test_mean_of_images_of_several_sizes_is_one_after_resizing(name: str) -> None:
    """As the model's processor resizes and crops each, which then leaves the mean as it is."""
    images = write_uneven(test_families.folder())
    block = UNEVEN_BLOCK + test_families.BLOCK.replace('"{file}"', "mean of photos", 1)
    rule = "ablate resid_post layer 0 at photo row 1 col 2 token with zero"
    [found] = test_families.run_text(name, experiment("e", rule), block=block)
    own, values = bare_of(name), list[float]()
    average = fitted_mean(name, images)
    family = test_families.vlm.FAMILIES[name]
    for words in test_families.WORDS:
        text = f"w3 w2 {family.marker} w1 {words} w3{family.before_end}"
        given = own.with_pictures(text, [average])
        values.append(test_families.difference(own.run(given)))
    np.testing.assert_allclose(found.measures[0].base[0], values, atol=1e-4)
    said = found.conventions["image of ask"]
    assert "mean of 4 images of `photos`, resized to " in said
    assert said.endswith("first, before any `limit`, in pixels before preparation, rounded")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llava_next", "`LlavaNextImageProcessorPil` cuts them into tiles"),
        ("qwen2_vl", "`Qwen2VLImageProcessorPil` isn't known to resize them to one size"),
        ("llava_pad", "`LlavaImageProcessorPil` isn't known to resize them to one size"),
    ],
)
def test_mean_without_a_common_size_reports_the_reason(name: str, why: str) -> None:
    write_uneven(test_families.folder())
    block = UNEVEN_BLOCK + test_families.BLOCK.replace('"{file}"', "mean of photos", 1)
    rule = "ablate resid_post layer 0 at last token with zero"
    whole = f'mech 1\nmodel m = local("x")\n{block}\n{experiment("e", rule)}'
    source = Source(whole, test_families.folder() / "file.mech")
    _, problems = run_on(source, {"m": test_families.loaded(name)}, MODES["planned"])
    [error] = [each for each in problems if each.severity == "error"]
    assert error.code == "E0207"
    shown = " ".join(support.render_full([error], color=False, width=1000).split())
    assert f"images of several sizes, such as 28 x 52 and 40 x 11, and the model's {why}" in shown


def test_mean_depends_on_how_its_images_are_resized() -> None:
    picture = Picture("gray", size=(4, 4)), Picture("gray", size=(8, 6))
    fits = (Processing(("exact", 4, 4)), Processing(("shortest", 4, 4), crop=(4, 4)))
    fits = (*fits, replace(fits[0], resample=BICUBIC))
    means = [mean_picture(picture, "photos", (4, 4), fit) for fit in fits]
    assert len({mean.content() for mean in means}) == len(fits)


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
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
