"""Image preparation of a model: resizing, cropping, scaling, and division into patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Any, Literal, cast

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record

PREPROCESSOR_FILE = "preprocessor_config.json"

PROCESSOR_FILE = "processor_config.json"
"""File of models of images and texts; `image_processor` in it describes the preparation."""

_STANDARD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_DEFAULT = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_SIDE = 224

BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers of filters."""

RESAMPLING_FILTERS = range(6)


class Processing(Record):
    """The preparation of an image: resized, cropped, scaled, normalised, in this order.

    It equals transformers' processors that are based on Pillow.
    """

    resize: tuple[Literal["exact", "shortest"], int, int] | None = None
    """To (height, width), or the shorter side to a length, which is then given twice."""
    resample: int = BILINEAR
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None = None
    """(height, width) of the centre crop."""
    rescale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    floats: bool = False
    """Scale before resizing, as DINOv3's processor does, without rounding in between."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the result; None if it depends on the image."""
        if self.crop is not None:
            return self.crop
        if self.resize is not None and self.resize[0] == "exact":
            return self.resize[1:]
        return None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after resizing."""
        if self.resize is None:
            return height, width
        how, first, second = self.resize
        if how == "exact":
            return first, second
        if width <= height:
            return int(first * height / width), first
        return first, int(first * width / height)

    @property
    def fitting(self) -> Processing:
        """Resizing and cropping alone. Raises UnsupportedProcessor if images keep several sizes."""
        if self.size is None or self.floats:
            raise UnsupportedProcessor("it doesn't resize all images to one size in whole levels")
        return Processing(self.resize, self.resample, self.crop, rescale=None)

    @property
    def resampled_words(self) -> str:
        """A short description of the preparation, with the filter."""
        return f"{self.words}, filter {self.resample} of Pillow"

    @property
    def words(self) -> str:
        """A short description of the preparation."""
        done: list[str] = []
        if self.resize is not None:
            how, first, second = self.resize
            to = f"{second} x {first}" if how == "exact" else f"a shorter side of {first}"
            done.append(f"resized to {to}")
        if self.crop is not None:
            done.append(f"cropped to {self.crop[1]} x {self.crop[0]}")
        if self.mean is not None:
            done.append("normalised")
        return ", ".join(done) or "as they are"


def crop_corner(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (top, left) of the centre crop; negative if the image is smaller than the crop."""
    return (image[0] - size[0]) // 2, (image[1] - size[1]) // 2


class UnsupportedProcessor(Exception):
    """An unsupported processor; its text is the reason in lower case, `hint` the fix."""

    hint = ""
    what = ""
    """What it can't prepare, such as `videos`; empty: images or sounds, as the model reads."""


class TilingProcessor(UnsupportedProcessor):
    """A processor that cuts images into tiles, which the model reads together."""

    hint = (
        "give it one that doesn't, and write `tiles 2 by 3` in the block of images: tiles as rows"
    )


def _kind(
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    resample: int,
    *,
    size: Mapping[str, int] | None = None,
    crop: int = _SIDE,
    crops: bool = False,
    square: bool = True,
    floats: bool = False,
) -> dict[str, Any]:
    return {
        "image_mean": norm[0],
        "image_std": norm[1],
        "resample": resample,
        "size": size or {"height": _SIDE, "width": _SIDE},
        "crop_size": {"height": crop, "width": crop},
        "do_center_crop": crops,
        "square": square,
        "floats": floats,
    }


_SHORT = {"shortest_edge": _SIDE}

_LARGE = {"height": 256, "width": 256}

PROCESSOR_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "ViT": _kind(_STANDARD, BILINEAR),
    "DeiT": _kind(_STANDARD, BICUBIC, size=_LARGE, crops=True),
    "Beit": _kind(_STANDARD, BICUBIC),
    "Bit": _kind(_CLIP, BICUBIC, size=_SHORT, crops=True, square=False),
    "CLIP": _kind(_CLIP, BICUBIC, size=_SHORT, crops=True, square=False),
    "Siglip": _kind(_STANDARD, BICUBIC, square=False),
    "DINOv3ViT": _kind(_DEFAULT, BILINEAR, floats=True),
}
"""Defaults of transformers' processors."""

_ENDS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")

TILING_SETTINGS = (
    "crop_to_patches",
    "do_image_splitting",
    "do_pan_and_scan",
    "dynamic_hd",
    "image_grid_pinpoints",
    "max_image_tiles",
    "split_image",
)
"""Settings of processors that cut images into tiles, with transformers' names."""


def parse_processing(config: Mapping[str, Any]) -> Processing:
    """Return the preparation that a processor's config describes. Raises UnsupportedProcessor."""
    named = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    tiling = next((key for key in TILING_SETTINGS if config.get(key)), None)
    if tiling is not None:
        raise TilingProcessor(
            f"`{named}` cuts images into tiles (`{tiling}`), and the model reads one image"
        )
    end = next((end for end in _ENDS if named.endswith(end)), "")
    known = PROCESSOR_DEFAULTS.get(named.removesuffix(end)) if end else None
    if known is None:
        kinds = ", ".join(f"{kind}ImageProcessor" for kind in PROCESSOR_DEFAULTS)
        what = f"`{named}` isn't one of them" if named else "it doesn't say which one it is"
        raise UnsupportedProcessor(f"{what}: processors that are known are {kinds}")
    given = {key: value for key, value in config.items() if value is not None}
    for key in ("do_pad", "use_square_size"):
        if given.get(key):
            raise UnsupportedProcessor(f"`{key}` isn't done here")
    whole = {**known, **given}
    resize = None
    if whole.get("do_resize", True):
        resize = _resize(whole["size"], square=bool(known["square"]))
    crop = None
    if whole["do_center_crop"]:
        crop = _resize(whole["crop_size"], square=True)[1:]
    resample = whole["resample"]
    if not isinstance(resample, int) or resample not in RESAMPLING_FILTERS:
        raise UnsupportedProcessor(f"`resample` is {resample!r}, which isn't a filter of Pillow")
    scales = whole.get("do_rescale", True)
    normal = whole.get("do_normalize", True)
    return Processing(
        resize=resize,
        resample=resample,
        crop=crop,
        rescale=_number(whole.get("rescale_factor", 1 / 255), "rescale_factor") if scales else None,
        mean=_three(whole["image_mean"], "image_mean") if normal else None,
        std=_three(whole["image_std"], "image_std") if normal else None,
        floats=bool(known["floats"]),
    )


def _resize(size: Any, *, square: bool) -> tuple[Literal["exact", "shortest"], int, int]:
    if is_integer(size):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, (list, tuple)) and len(cast("list[Any]", size)) == 2:
        size = dict(zip(("height", "width"), cast("list[Any]", size), strict=True))
    if isinstance(size, Mapping):
        sides = {k: v for k, v in cast("Mapping[str, Any]", size).items() if v is not None}
        if sides.keys() == {"height", "width"}:
            return "exact", _side(sides["height"]), _side(sides["width"])
        if sides.keys() == {"shortest_edge"}:
            side = _side(sides["shortest_edge"])
            return "shortest", side, side
    raise UnsupportedProcessor(f"the size {size!r} isn't known here")


_MOST = 4096


def _side(value: Any) -> int:
    if not isinstance(value, int) or not 1 <= value <= _MOST:
        raise UnsupportedProcessor(f"a side of {value!r} pixels isn't one of 1 to {_MOST}")
    return value


def _number(value: Any, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UnsupportedProcessor(f"`{key}` is {value!r}, and no number")
    return float(value)


def _three(value: Any, key: str) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(cast("list[Any]", values)) != 3:
        raise UnsupportedProcessor(f"`{key}` isn't a list of three numbers")
    first, second, third = (_number(each, key) for each in cast("list[Any]", values))
    if key == "image_std" and 0.0 in (first, second, third):
        raise UnsupportedProcessor("a standard deviation of 0 divides by it")
    return first, second, third


class PatchLayout(Record):
    """A model's division of an image into tokens: extra tokens first, then patches row by row."""

    front: tuple[str, ...]
    """The extra tokens before the patches: `cls`, `distillation`, `register`, with repeats."""
    patch: tuple[int, int]
    """(height, width) of a patch in pixels of the prepared image."""
    size: tuple[int, int]
    """(height, width) of the prepared image."""
    any_size: bool = False
    """The model reads images of other sizes too; `size` is the config's."""
    fixed: str = field(default="", repr=False)
    """The reason that no further token can follow the patches; empty if it can."""

    @cached_property
    def rows(self) -> int:
        return self.size[0] // self.patch[0]

    @cached_property
    def cols(self) -> int:
        return self.size[1] // self.patch[1]

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return len(self.front) + self.rows * self.cols

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The tokens of the patches, row by row."""
        return tuple(range(len(self.front), self.tokens))

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct names of the extra tokens."""
        return tuple(dict.fromkeys(self.front))

    def named(self, name: str) -> tuple[int, ...]:
        """Return the extra tokens with a name."""
        return tuple(n for n, own in enumerate(self.front) if own == name)

    def token(self, row: int, col: int) -> int:
        """Return the token of a patch; rows and columns count from 1, from the top left."""
        return len(self.front) + (row - 1) * self.cols + (col - 1)

    def place(self, token: int) -> tuple[int, int] | None:
        """Return row and column of a token, from 1; None for an extra token, and for one that a
        corruption inserted after the patches."""
        at = token - len(self.front)
        if not 0 <= at < self.rows * self.cols:
            return None
        return at // self.cols + 1, at % self.cols + 1

    def box(self, token: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of a patch in the prepared image, ends exclusive."""
        place = self.place(token)
        assert place is not None
        (row, col), (height, width) = place, self.patch
        top, left = (row - 1) * height, (col - 1) * width
        return left, top, left + width, top + height
