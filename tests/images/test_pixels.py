"""Image files and processed pixels, against the processors of transformers."""

from __future__ import annotations

import importlib
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mechdsl.base import limits
from mechdsl.images.picture import (
    GridLayout,
    MediaError,
    Picture,
    PictureChange,
    Region,
    decode_image,
    inspect_image,
)
from mechdsl.images.pixels import model_input, process_pixels, render_pixels
from mechdsl.images.processing import (
    PROCESSOR_DEFAULTS,
    Processing,
    UnsupportedProcessor,
    parse_processing,
)

SIZES = ((40, 30), (30, 41), (224, 224), (37, 300), (16, 16), (500, 333))
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ViT": [{}, {"size": {"height": 20, "width": 31}, "resample": 3}],
    "DeiT": [{}, {"do_center_crop": False}],
    "Beit": [{"do_center_crop": True, "size": {"height": 256, "width": 256}}],
    "Bit": [{}, {"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 30}}],
    "CLIP": [
        {},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 24, "width": 24}},
        {"do_resize": False, "crop_size": 64},
    ],
    "Siglip": [{}, {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0]}],
}


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), resample=Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("kind", "given"), [(kind, given) for kind, every in SETTINGS.items() for given in every]
)
@pytest.mark.parametrize("size", SIZES)
def test_processed_pixels_equal_transformers(
    kind: str, given: dict[str, Any], size: tuple[int, int]
) -> None:
    module = importlib.import_module(
        f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}"
    )
    own = getattr(module, f"{kind}ImageProcessorPil")(**given)
    image = drawn(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = np.asarray(own(Image.fromarray(image), return_tensors="np")["pixel_values"][0])
    # The full config that is saved with a model, and one that relies on defaults.
    for config in (own.to_dict(), {"image_processor_type": f"{kind}ImageProcessor", **given}):
        how = parse_processing(config)
        found = process_pixels(image, how)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert found.shape[1:] == (how.size or how.resized(*size))


def test_each_known_processor_is_tested() -> None:
    assert {*SETTINGS, "DINOv3ViT"} == set(PROCESSOR_DEFAULTS)


@pytest.mark.parametrize("size", SIZES)
def test_dinov3_pixels_are_resized_without_rounding(size: tuple[int, int]) -> None:
    """DINOv3's processor needs torchvision, which resizes floats as torch does."""
    how = parse_processing({"image_processor_type": "DINOv3ViTImageProcessorFast"})
    image = drawn(*size)
    given = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    wanted = torch.nn.functional.interpolate(
        given, size=(224, 224), mode="bilinear", antialias=True, align_corners=False
    )[0]
    mean, std = (torch.tensor(each)[:, None, None] for each in (how.mean, how.std))
    np.testing.assert_allclose(process_pixels(image, how), (wanted - mean) / std, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "it doesn't say which one it is"),
        ({"image_processor_type": "SwinImageProcessor"}, "`SwinImageProcessor` isn't one"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "`do_pad`"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "size": 10**9}, "a side of"),
        ({"image_processor_type": "ViTImageProcessor", "size": True}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0.0, 1]}, "of 0"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}, "three numbers"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": ["a", 1, 1]}, "no number"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "a filter of Pillow"),
        ({"image_processor_type": "ViTImageProcessor", "rescale_factor": "x"}, "no number"),
    ],
)
def test_unsupported_processor_reports_its_cause(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedProcessor, match=said):
        parse_processing(config)


# --- files ----------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def png(width: int, height: int) -> bytes:
    """The header of an image of any size, with almost no pixel data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


BYTES = drawn(12, 10)
PLAIN = Image.fromarray(BYTES)
REFUSED = {
    "no image": (b"hello", "it isn't an image"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it isn't an image"),
    "EPS, which runs code": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it isn't an image"),
    "a TIFF": (saved(PLAIN, "TIFF"), "it isn't an image"),
    "cut off": (saved(PLAIN)[:-40], "it is damaged"),
    "a JPEG that is cut off": (saved(PLAIN, "JPEG")[:200], "it is"),
    "a bomb": (png(60_000, 60_000), "pixels"),
    "one pixel too many": (png(limits.IMAGE_PIXELS + 1, 1), "50,000,001 pixels"),
    "16 bits": (saved(Image.fromarray(np.zeros((4, 4), np.uint16))), "I;16"),
    "moving": (
        saved(PLAIN, "WEBP", save_all=True, append_images=[Image.fromarray(255 - BYTES)]),
        "it moves",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_image_reports_its_cause(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, said = REFUSED[case]
    if case in ("a bomb", "one pixel too many"):  # before a pixel is decoded
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(MediaError) as refused:
        decode_image(content)
    assert said in refused.value.reason
    assert refused.value.hint


def test_image_file_over_the_size_limit_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(PLAIN))
    monkeypatch.setattr(limits, "IMAGE_FILE", path.stat().st_size)
    assert inspect_image(path)[1] == (12, 10)
    monkeypatch.setattr(limits, "IMAGE_FILE", path.stat().st_size - 1)
    with pytest.raises(MediaError, match="more than"):
        inspect_image(path)
    with pytest.raises(MediaError, match="no such file"):
        inspect_image(tmp_path / "b.png")


def test_image_file_edited_after_inspection_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(PLAIN))
    digest, size = inspect_image(path)
    picture = Picture("file", path=path, digest=digest, size=size)
    np.testing.assert_array_equal(render_pixels(picture), BYTES)
    path.write_bytes(saved(Image.fromarray(255 - BYTES)))
    with pytest.raises(MediaError, match="has changed"):
        render_pixels(picture)
    other = Picture("file", path=path, digest=inspect_image(path)[0], size=size)
    assert other.text != picture.text


def test_decoded_colours_equal_transformers(tmp_path: Path) -> None:
    """Decoded images are RGB and upright, with transparent pixels on white."""
    from transformers.image_transforms import convert_to_rgb

    clear = np.dstack([BYTES, np.linspace(0, 255, 120).reshape(12, 10).astype(np.uint8)])
    images = {
        "clear": Image.fromarray(clear),
        "gray": PLAIN.convert("L"),
        "palette": PLAIN.convert("P"),
        "black and white": PLAIN.convert("1"),
        "gray and clear": Image.fromarray(clear).convert("LA"),
    }
    for name, image in images.items():
        wanted = convert_to_rgb(image, return_numpy=True)
        np.testing.assert_array_equal(np.asarray(decode_image(saved(image))), wanted, err_msg=name)
    cmyk = decode_image(saved(PLAIN.convert("CMYK"), "JPEG", quality=100))
    assert cmyk.mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    upright = np.asarray(decode_image(saved(PLAIN, exif=turned)))
    np.testing.assert_array_equal(upright, np.rot90(BYTES, -1))


# --- generated ------------------------------------------------------------------------------------


def test_generated_gray_and_noise_images_have_expected_pixels() -> None:
    how = Processing(("exact", 8, 8))
    assert set(model_input(Picture("gray"), how).ravel()) == {np.float32(128 / 255)}
    one, two = (render_pixels(Picture("noise", size=(6, 5), seed=seed)) for seed in (1, 2))
    assert one.shape == (6, 5, 3)
    assert one.dtype == np.uint8
    assert (one != two).mean() > 0.9
    np.testing.assert_array_equal(one, render_pixels(Picture("noise", size=(6, 5), seed=1)))


def test_gray_image_stays_gray_after_the_crop() -> None:
    how = Processing(None, crop=(8, 6))
    found = model_input(Picture("gray", number=10).sized((8, 6)), how)
    assert set(found.ravel()) == {np.float32(10 / 255)}


def test_generated_image_depends_on_each_setting() -> None:
    plain = Picture("shapes", kind="circle", size=(32, 32), seed=5)
    others = [
        Picture("shapes", kind="square", size=(32, 32), seed=5),
        Picture("shapes", kind="circle", size=(40, 40), seed=5),
        Picture("shapes", kind="circle", size=(32, 32), seed=6),
        Picture("shapes", kind="circle", size=(32, 32), seed=5, count=2),
        Picture("shapes", kind="circle", size=(32, 32), seed=5, colour="red"),
        Picture("shapes", kind="circle", size=(32, 32), seed=5, texture="plain"),
        Picture("noise", size=(32, 32), seed=5),
        Picture("gray"),
        Picture("gray", number=7),
    ]
    assert len({each.content() for each in [plain, *others]}) == 10
    own = render_pixels(plain)
    assert all(not np.array_equal(own, render_pixels(each.sized((32, 32)))) for each in others)


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    written = io.BytesIO()
    image.save(written, "PNG", transparency=0)
    assert np.asarray(decode_image(written.getvalue())).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_photo_with_an_embedded_preview_decodes_to_the_photo() -> None:
    photo, preview = (Image.new("RGB", size, colour) for size, colour in (
        ((24, 16), (200, 30, 60)), ((12, 8), (0, 0, 0)),
    ))  # fmt: skip
    written = io.BytesIO()
    photo.save(written, "MPO", save_all=True, append_images=[preview])
    found = np.asarray(decode_image(written.getvalue())).astype(int)
    assert found.shape == (16, 24, 3)
    assert np.abs(found - [200, 30, 60]).max() < 5


SHAPES = Picture("shapes", kind="ring", count=2, size=(24, 24), seed=5, colour="red")
GRIDS = [
    GridLayout((("red ring", ""),), **how)
    for how in (
        {}, {"marks": ()}, {"marks": ("@",)}, {"cell": 9}, {"noise": 20}
    )
]  # fmt: skip
MASKED = PictureChange("mask", region=Region(box=(1, 1, 4, 5)))
TOLD: list[Picture] = [
    *(Picture("noise", size=size, seed=seed) for size in ((12, 10), (10, 12)) for seed in (1, 2)),
    *(Picture("gray", number=level) for level in (0, 40, 128)),
    *(Picture("file", digest=digest, said="a.png") for digest in ("ab", "cd")),
    SHAPES,
    *(
        Picture(**{**SHAPES.__dict__, key: value})
        for key, value in {
            "kind": "cross", "count": 3, "size": (32, 32), "seed": 6, "colour": "blue",
            "texture": "dots",
        }.items()
    ),
    *(Picture("grid", grid=each, size=each.size, seed=seed) for each in GRIDS for seed in (1, 2)),
    Picture("grid", grid=GridLayout((("", "red ring"),)), size=(8, 16), seed=1),
    Picture("grid", grid=GridLayout((("red ring 9%", ""),)), size=(8, 16), seed=1),
    *(
        Picture("gray", changes=changes)
        for changes in (
            (PictureChange("blur", 2.0),),
            (PictureChange("blur", 3.0),),
            (PictureChange("noise", 2.0),),
            (PictureChange("noise", 2.0, seed=1),),
            (PictureChange("mask"),),
            (MASKED,),
            (MASKED, MASKED),
            (PictureChange("mask", region=Region(box=(1, 1, 4, 6))),),
            (PictureChange("mask", region=Region(mask=Path("a"), digest="ab")),),
            (PictureChange("mask", region=Region(mask=Path("a"), digest="cd")),),
            (PictureChange("mask", region=Region(shapes=True)),),
            (PictureChange("mask", patches=((0, 0, 4, 4),)),),
            (PictureChange("mask", patches=((0, 4, 4, 8),)),),
            (PictureChange("swap", region=MASKED.region, other=Region(box=(5, 5, 9, 9))),),
            (PictureChange("swap", region=MASKED.region, other=Region(box=(5, 5, 9, 8))),),
        )
    ),
]  # fmt: skip


def test_picture_text_is_distinct_for_different_pixels() -> None:
    assert len({picture.text for picture in TOLD}) == len(TOLD)
    assert Picture("file", digest="ab", said="b.png").content() == TOLD[7].content()


@pytest.mark.parametrize("radius", [0.5, 3.0, 8.0])
def test_blur_equals_the_gaussian_filter_of_pillow(radius: float) -> None:
    plain = Picture("noise", size=(20, 30), seed=3)
    found = render_pixels(
        Picture("noise", size=(20, 30), seed=3, changes=(PictureChange("blur", radius),))
    )
    wanted = Image.fromarray(render_pixels(plain)).filter(ImageFilter.GaussianBlur(radius))
    np.testing.assert_array_equal(found, np.asarray(wanted))


@pytest.mark.parametrize("seed", [0, 9])
@pytest.mark.parametrize("level", [0, 100, 255])
def test_noise_is_rounded_and_clipped(level: int, seed: int) -> None:
    change = PictureChange("noise", 30.0, seed=seed)
    found = render_pixels(Picture("gray", number=level, size=(20, 30), changes=(change,)))
    drawn = np.random.Generator(np.random.Philox(seed)).standard_normal((20, 30, 3))
    np.testing.assert_array_equal(found, np.rint(np.clip(level + 30 * drawn, 0, 255)))
