"""Corruptions of images: masked, blurred and noised patches, and swapped boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mechdsl.base.text import Source
from mechdsl.images.picture import Picture, PictureChange, Region, box_coverage, covered_tokens
from mechdsl.images.pixels import model_input
from mechdsl.images.processing import Processing
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer

from ..reference.hooks import Change
from ..reference.noise import keyed_by_number, noise
from ..run_source import run_source
from . import support
from .support import GRID, SIDE, copied, difference, forward, plain
from .test_blocks import SCENES, check, codes, folder_of

Writes = Mapping[tuple[str, int], Sequence[Change]]

BOXES = (((0, 0, 9, 8), (10, 12, 19, 20)), ((2, 1, 7, 9), (8, 4, 16, 16)), ((0, 0, 9, 9), None))
"""Boxes of each file: equal sizes, different sizes, and a missing second box."""
BLOCKS = """
images scenes {
  rows "boxes.jsonl"
  image "{file}"
  region one = first
  region two = second
  answer "{label}"
  wrong "{other}"
  CORRUPT
}
"""
PATCH = SIDE // GRID


def write_boxes(folder: Path) -> None:
    support.write_images(folder)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for record, (first, second) in zip(records, BOXES, strict=True):
        record |= {"first": first, "second": second, "size": 2 + len(record["label"])}
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, records)))


def levels(name: str, number: int) -> NDArray[np.uint8]:
    """[side, side, 3] from 0 to 255: output of the library's processor before rescaling."""
    found = support.processor(name)(
        Image.fromarray(support.image(number)),
        do_rescale=False,
        do_normalize=False,
        return_tensors="np",
    )
    return np.moveaxis(found["pixel_values"][0], 0, -1).round().clip(0, 255).astype(np.uint8)


def ready(name: str, image: NDArray[np.uint8]) -> torch.Tensor:
    """Model input [1, 3, side, side] of an image that already has the model's size."""
    how = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return support.processor(name)(Image.fromarray(image), **how)["pixel_values"].double()


def painted(
    name: str, number: int, other: NDArray[np.uint8], *places: tuple[int, int]
) -> torch.Tensor:
    """The image with patches of another image; rows and columns count from 1."""
    found, theirs = support.pixels(name, number).clone(), ready(name, other)
    for row, col in places:
        part = (..., slice((row - 1) * PATCH, row * PATCH), slice((col - 1) * PATCH, col * PATCH))
        found[part] = theirs[part]
    return found


def ran(
    folder: Path, name: str, mode: str, corrupt: str, rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Base and patched values of each row."""
    write_boxes(folder)
    blocks = BLOCKS.replace("CORRUPT", f"corrupt other {{ {corrupt} }}")
    text = support.experiment("e", "from clean into other", rule)
    found = support.run_file(text, folder, name, mode, blocks)["e"]
    return found.measures[0].base[0], found.measures[0].patched[0]


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "siglip"])
def test_mask_corruption_equals_painted_gray_patches(name: str, mode: str, tmp_path: Path) -> None:
    """Masked patches are gray; no other pixel of the model's input differs."""
    corrupt = "mask image row 2..3 col 1..2 tokens"
    places = [(2, 1), (2, 2), (3, 1), (3, 2)]
    base, patched = ran(
        tmp_path, name, mode, corrupt, "patch resid_post layer 0 at image row 2 col 1 token"
    )
    expected: list[tuple[float, float]] = []
    for number in range(3):
        given = painted(name, number, support.GRAY, *places)
        tokens = [support.token(name, 2, 1)]
        writes = {("resid_post", 0): copied(plain(name, number), "resid_post", 0, tokens)}
        seen = forward(name, given), forward(name, given, writes)
        expected.append((difference(seen[0], number), difference(seen[1], number)))
    np.testing.assert_allclose(base, [own for own, _ in expected], atol=1e-4)
    np.testing.assert_allclose(patched, [own for _, own in expected], atol=1e-4)
    clean = [difference(plain(name, number), number) for number in range(3)]
    assert np.abs(base - clean).max() > 0.1
    assert np.abs(base - patched).max() > 0.05


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_blur_corruption_equals_blurred_model_input(name: str, tmp_path: Path) -> None:
    """Each row has a different radius."""
    corrupt = "blur image row 1 col * tokens radius size"
    base, _ = ran(tmp_path, name, "planned", corrupt, "patch embed at cls token")
    expected: list[float] = []
    for number in range(3):
        soft = ImageFilter.GaussianBlur(2 + len(support.ANSWERS[number]))
        image = np.asarray(Image.fromarray(levels(name, number)).filter(soft))
        given = painted(name, number, image, *((1, col) for col in range(1, GRID + 1)))
        expected.append(difference(forward(name, given), number))
    np.testing.assert_allclose(base, expected, atol=1e-4)
    clean = [difference(plain(name, number), number) for number in range(3)]
    assert np.abs(base - clean).max() > 0.02


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_swap_corruption_swaps_resized_boxes(name: str, mode: str, tmp_path: Path) -> None:
    """The row without the second box is dropped."""
    base, _ = ran(tmp_path, name, mode, "swap one, two", "patch embed at cls token")
    expected: list[float] = []
    for number, (first, second) in enumerate(BOXES[:2]):
        assert second is not None
        image = Image.fromarray(support.image(number))
        parts = [image.crop(box) for box in (first, second)]
        for box, part in ((first, parts[1]), (second, parts[0])):
            size = (box[2] - box[0], box[3] - box[1])
            image.paste(part.resize(size, resample=Image.Resampling.BILINEAR), box[:2])
        given = support.processor(name)(image, return_tensors="pt")["pixel_values"].double()
        expected.append(difference(forward(name, given), number))
    np.testing.assert_allclose(base, expected, atol=1e-4)
    clean = [difference(plain(name, number), number) for number in range(2)]
    assert np.abs(base - clean).max() > 0.05


def test_mask_corruption_of_float_images_is_not_rounded(tmp_path: Path) -> None:
    """DINOv3's processor rescales to floats first; other pixels must not be rounded either."""
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    corrupt = "corrupt other { mask image row 2 col 3 token }"
    lines = ("from clean into other", "patch embed at cls token")
    [experiment], problems = check(tmp_path, *lines, blocks=BLOCKS.replace("CORRUPT", corrupt))
    assert not problems
    rows = experiment.table.runs["other"].rows
    how = Processing(("exact", 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5), floats=True)
    for clean, other in zip(experiment.table.runs["clean"].rows, rows, strict=True):
        assert clean.image is not None
        assert other.image is not None
        before, after = model_input(clean.image, how), model_input(other.image, how).copy()
        gray = (128 / 255 - np.array(how.mean)) / np.array(how.std)
        np.testing.assert_allclose(
            after[:, 8:16, 16:24], gray[:, None, None] + np.zeros((3, 8, 8)), atol=1e-6
        )
        after[:, 8:16, 16:24] = before[:, 8:16, 16:24]
        np.testing.assert_array_equal(after, before)


DINO = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


def dino_levels(number: int) -> torch.Tensor:
    """[3, side, side] of 0 to 1, resized in floats."""
    given = torch.from_numpy(support.image(number).copy()).permute(2, 0, 1)[None].float() / 255
    size = {"size": (SIDE, SIDE), "mode": "bilinear", "antialias": True, "align_corners": False}
    return torch.nn.functional.interpolate(given, **size)[0]


@pytest.mark.parametrize("change", ["mask AT", "blur AT radius 2"])
def test_dinov3_images_with_corrupted_patches_equal_reference(change: str, tmp_path: Path) -> None:
    name, places = "dinov3_vit", [(2, 3), (3, 1)]
    write_boxes(tmp_path)
    support.bare(name).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(DINO))
    at = "image row 2 col 3 token, image row 3 col 1 token"
    blocks = BLOCKS.replace("CORRUPT", f"corrupt other {{ {change.replace('AT', at)} }}")
    measure = "measure cosine(resid_post layer 1, clean) at image row 3 col 1 token as raw"
    text = support.experiment("e", "from clean into other", "patch embed at cls token",
                              measure=measure)  # fmt: skip
    whole = f'mech 1\nmodel m = local("dino")\n{blocks}\n{text}'
    found, problems = run_source(Source(whole, tmp_path / "file.mech"))
    assert found is not None, [each.message for each in problems]
    mean, std = (torch.tensor(DINO[key])[:, None, None] for key in ("image_mean", "image_std"))
    expected: list[float] = []
    for number in range(3):
        clean = dino_levels(number)
        levels = (clean * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        soft = Image.fromarray(levels).filter(ImageFilter.GaussianBlur(2))
        other = clean.clone()
        for row, col in places:
            part = (
                ...,
                slice((row - 1) * PATCH, row * PATCH),
                slice((col - 1) * PATCH, col * PATCH),
            )
            blurred = torch.from_numpy(np.asarray(soft).copy()).permute(2, 0, 1) / 255
            other[part] = 128 / 255 if change.startswith("mask") else blurred[part]
        both = [forward(name, ((each - mean) / std)[None].double()) for each in (clean, other)]
        token = support.token(name, 3, 1)
        vectors = [seen.sites["resid_post", 1][token, 0] for seen in both]
        expected.append(float(torch.nn.functional.cosine_similarity(*vectors, dim=0)))
    result = support.as_in_the_data(found.experiments[0])
    np.testing.assert_allclose(result.measures[0].base[0], expected, atol=1e-4)
    assert max(expected) < 0.999


def test_image_noise_depends_on_row_and_corruption_step(tmp_path: Path) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    corrupt = "corrupt other { noise image by 30 noise image row 1 col 1..2 token by 30 }"
    lines = ("from clean into other", "patch embed at cls token")
    [experiment], problems = check(tmp_path, *lines, blocks=BLOCKS.replace("CORRUPT", corrupt))
    assert not problems
    images = [row.image for row in experiment.table.runs["other"].rows]
    seeds = [change.seed for image in images if image is not None for change in image.changes]
    assert len({*seeds}) == 6
    assert all(
        image is None or image.changes[1].patches == ((0, 0, 8, 8), (8, 0, 16, 8))
        for image in images
    )


def test_conventions_describe_image_corruptions(tmp_path: Path) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    corrupt = "corrupt other { swap one, two blur image radius size mask image row 1 col 1 token }"
    lines = ("from clean into other", "patch embed at cls token")
    [experiment], problems = check(tmp_path, *lines, blocks=BLOCKS.replace("CORRUPT", corrupt))
    assert not problems
    assert experiment.table.conventions["image of other"] == (
        "swap of two boxes, each resized to the other (bilinear), then blur with a Gaussian of "
        "radius 6 to 8 pixels, then mask with 128 of 255, on patches of the model's input"
    )


def test_row_without_the_corrupted_region_is_dropped(tmp_path: Path) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    lines = ("from clean into other", "patch embed at cls token")
    for change in ("mask two", "swap one, two"):
        blocks = BLOCKS.replace("CORRUPT", f"corrupt other {{ {change} }}")
        [experiment], problems = check(tmp_path, *lines, blocks=blocks)
        assert not problems
        assert len(experiment.table) == 2
        assert experiment.table.conventions["dropped"] == "1 that `other` leaves unchanged"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("swap one, three", "E0203"),
        ("swap one, image", "E0203"),
        ("swap one, label", "E0203"),
        ("swap one, one", "E0503"),
        ("swap one", "E0101"),
        ("mask 3", "E0101"),
        ("mask one, two", "E0101"),
        ("mask cls token", "E0207"),
        ("mask image row 9 col 1 token", "E0310"),
        ("mask three tokens", "E0308"),
        ("mask two tokens", "E0309"),
        ("mask image row 1 col 1 token blur image radius 2", "E0207"),
        ("mask image row 1 col 1 token swap one, two", "E0207"),
        ("noise image row 1 col 1 token", "E0101"),
        ("noise image row 1 col 1 token by 0", "E0207"),
    ],
)
def test_invalid_image_corruption_is_rejected(change: str, wanted: str, tmp_path: Path) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    blocks = BLOCKS.replace("CORRUPT", f"corrupt other {{ {change} }}")
    lines = ("from clean into other", "patch embed at cls token")
    assert codes(tmp_path, *lines, blocks=blocks)[:1] == [wanted]


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        ([[0, 0, 4, 4], [8, 8, 10, 10]], "2 boxes"),
        ("0.png", "a mask"),
        ([5, 5, 12, 12], "overlap"),
        ([50, 50, 60, 60], "no pixel"),
    ],
)
def test_regions_that_cannot_be_swapped_are_rejected(
    second: object, wanted: str, tmp_path: Path
) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    support.write_images(tmp_path)
    record = {"file": "0.png", "label": "circle", "other": "cross", "first": [0, 0, 6, 6]}
    (tmp_path / "boxes.jsonl").write_text(json.dumps({**record, "second": second}))
    blocks = BLOCKS.replace("CORRUPT", "corrupt other { swap one, two }")
    lines = ("from clean into other", "patch embed at cls token")
    [found] = check(tmp_path, *lines, blocks=blocks)[1]
    assert found.code == "E0503"
    assert wanted in found.message


def test_corrupted_images_have_distinct_texts() -> None:
    """Rows are shared and values are cached by these texts."""
    one, two = Region(box=(0, 0, 4, 4)), Region(box=(4, 4, 8, 8))
    changes = [
        PictureChange("mask"),
        PictureChange("mask", patches=((0, 0, 8, 8),)),
        PictureChange("mask", patches=((8, 0, 16, 8),)),
        PictureChange("mask", patches=((0, 0, 8, 8), (8, 0, 16, 8))),
        PictureChange("swap", region=one, other=two),
        PictureChange("swap", region=one, other=Region(box=(4, 4, 8, 9))),
        PictureChange("swap", region=two, other=one),
    ]
    texts = {Picture("gray", size=(16, 16), changes=(each,)).text for each in changes}
    assert len(texts) == len(changes)


def test_adjacent_boxes_can_be_swapped(tmp_path: Path) -> None:
    folder_of(tmp_path)
    support.write_images(tmp_path)
    record = {"file": "0.png", "label": "circle", "other": "cross", "first": [0, 0, 6, 6]}
    blocks = BLOCKS.replace("CORRUPT", "corrupt other { swap one, two }")
    lines = ("from clean into other", "patch embed at cls token")
    for second in ([6, 0, 12, 6], [0, 6, 6, 12]):
        (tmp_path / "boxes.jsonl").write_text(json.dumps({**record, "second": second}))
        assert codes(tmp_path, *lines, blocks=blocks) == []


def test_swap_of_values_works_in_images_blocks(tmp_path: Path) -> None:
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    write_boxes(tmp_path)
    blocks = BLOCKS.replace("CORRUPT", "corrupt other { swap label, other mask one }")
    lines = ("from clean into other", "patch embed at cls token")
    [experiment], problems = check(tmp_path, *lines, blocks=blocks)
    assert not problems
    for clean, other in zip(
        *(experiment.table.runs[n].rows for n in ("clean", "other")), strict=True
    ):
        assert other.image is not None
        assert [change.how for change in other.image.changes] == ["mask"]
        assert other.values["label"] == clean.values["other"]


NOISED = BLOCKS.replace(
    "CORRUPT",
    "corrupt other { add gaussian(std: 2 sd, samples: 2) to embed at one tokens } "
    "corrupt fixed { add gaussian(std: 0.7) to embed at image row 2 col * tokens }",
)


def noised(name: str, number: int, draw: int, tokens: Sequence[int], scale: float) -> Writes:
    """Output of the embedding plus the noise of a row and a draw."""
    found = plain(name, number).sites["embed", 0][:, 0]
    own = {at: scale * noise(number, draw, at, found.shape[-1]) for at in tokens}
    return {("embed", 0): [Change(at, 0, found[at] + added) for at, added in own.items()]}


@pytest.mark.parametrize("mode", ["plain", "planned"])
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "siglip"])
@pytest.mark.parametrize(("run", "draws"), [("other", 2), ("fixed", 1)])
def test_embedding_noise_of_image_tokens_equals_reference(
    name: str, mode: str, run: str, draws: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is seeded by row; `sd` is the standard deviation over the tokens of all rows."""
    keyed_by_number(monkeypatch)
    write_boxes(tmp_path)
    rule = "patch resid_post layer 0 at image row 2 col 1..2 tokens"
    text = support.experiment("e", f"from clean into {run}", rule)
    found = support.run_file(text, tmp_path, name, mode, NOISED)["e"]
    where = [[support.token(name, 2, col) for col in range(1, GRID + 1)]] * 3
    scale = 0.7
    if run == "other":
        own, sizes = support.shared(name).tokenizer, support.SIZES
        assert isinstance(own, ImageTokenizer)
        covers = [box_coverage(box, sizes[number]) for number, (box, _) in enumerate(BOXES)]
        where = [[*covered_tokens(each, own.processing, own.layout)] for each in covers]
        every = [plain(name, n).sites["embed", 0][tokens].numpy() for n, tokens in enumerate(where)]
        scale = 2 * float(np.concatenate(every).std(ddof=1))
    base: list[float] = []
    expected: list[float] = []
    for number, tokens in enumerate(where):
        given = support.pixels(name, number)
        written = [support.token(name, 2, col) for col in (1, 2)]
        back = copied(plain(name, number), "resid_post", 0, written)
        own_draws = [noised(name, number, draw, tokens, scale) for draw in range(draws)]
        seen = [
            (forward(name, given, each), forward(name, given, {**each, ("resid_post", 0): back}))
            for each in own_draws
        ]
        base.append(float(np.mean([difference(one, number) for one, _ in seen])))
        expected.append(float(np.mean([difference(one, number) for _, one in seen])))
    np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)
    clean = [difference(plain(name, number), number) for number in range(3)]
    assert np.abs(np.subtract(base, clean)).max() > 0.1
    assert np.abs(np.subtract(base, expected)).max() > 0.02


def test_noise_scale_uses_all_image_rows_before_the_limit(tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = SCENES.replace(
        "answer",
        "region object = mask "
        "corrupt c { add gaussian(std: 3 sd of object) to embed at cls token } answer",
    )
    lines = ("from clean into c", "patch resid_post layer 1 at cls token")
    [experiment], problems = check(tmp_path, *lines, blocks=blocks)
    assert not problems
    noise = experiment.table.runs["c"].noise
    assert noise is not None
    assert len(noise.sd_images) == 1_000
    assert (
        len({*noise.sd_tokens}) == len(noise.sd_tokens) == sum(len(at) for _, at in noise.sd_images)
    )
    assert noise.positions == ((0,),) * 6
    said = experiment.table.conventions["noise of c"]
    assert said == f"gaussian, 3 sd over {len(noise.sd_tokens):,} tokens of 1,000 images, 1 draw"


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_patch_between_two_images_of_a_record_equals_hooks(name: str, tmp_path: Path) -> None:
    """Patch from the second image of a record into the first."""
    said = 'image "{file}"\n'
    second = support.BLOCKS.replace(said, f"{said}  corrupt other {{ file = second }}\n")
    rule = "patch resid_post layer 0 at image row 1..2 col * tokens"
    text = support.experiment("e", "from other into clean", rule)
    measure = support.run_file(text, tmp_path, name, "planned", second)["e"].measures[0]
    tokens = [support.token(name, row, col) for row in (1, 2) for col in range(1, 5)]
    base, patched = np.zeros(3), np.zeros(3)
    for number in range(3):
        source = plain(name, (number + 1) % 3)
        writes = {("resid_post", 0): copied(source, "resid_post", 0, tokens)}
        clean = support.pixels(name, number)
        base[number] = difference(plain(name, number), number)
        patched[number] = difference(forward(name, clean, writes), number)
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched[0], patched, atol=1e-4)
    assert np.abs(base - patched).min() > 0.05
