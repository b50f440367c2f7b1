"""Read image files with Pillow, within limits on bytes and pixels."""

from __future__ import annotations

import io
import warnings
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base import limits
from mechdsl.base.files import RELATIVE_PATH_HINT
from mechdsl.base.text import HintedError

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with values up to 255: others would lose precision."""

_SMALLER = "save it smaller: models read a few hundred pixels a side"


class UnreadableImage(HintedError):
    """An image or sound file that can't be used; `reason` and `hint` are for the user."""


def inspect_image(path: Path) -> tuple[str, tuple[int, int]]:
    """Return (SHA-256 of the bytes, (height, width)) of an image, after decoding all its pixels.

    Raises UnreadableImage.
    """
    content = _read(path)
    image = decode_image(content)
    return sha256(content).hexdigest(), (image.height, image.width)


def read_image(path: Path, digest: str) -> Image:
    """Read an image in RGB. Raises UnreadableImage, also if the file's digest has changed."""
    content = _read(path)
    if sha256(content).hexdigest() != digest:
        raise UnreadableImage(
            "it has changed since it was checked", "run it again when it is written"
        )
    return decode_image(content)


def _read(path: Path) -> bytes:
    return read_content(path, limits.IMAGE_FILE, _SMALLER)


def read_content(path: Path, most: int, advice: str) -> bytes:
    """Read a file of at most this number of bytes. Raises UnreadableImage.

    advice: what to do with a larger file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        reason = "there is no such file"
        if not isinstance(error, FileNotFoundError):
            reason = str(error.strerror or error).lower()
        raise UnreadableImage(reason, RELATIVE_PATH_HINT) from None
    if len(content) > most:
        raise UnreadableImage(f"it has more than {most:,} bytes", advice)
    return content


def decode_image(content: bytes) -> Image:
    """Decode an image: upright, in RGB, transparent parts on white. Raises UnreadableImage.

    The size is read from the header before any pixel.
    """
    from PIL import Image, ImageOps

    known = ", ".join(IMAGE_FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images, which are rejected below
        try:
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            pixels = image.width * image.height
            if pixels > limits.IMAGE_PIXELS:
                reason = f"it has {pixels:,} pixels, more than {limits.IMAGE_PIXELS:,}"
                raise UnreadableImage(reason, _SMALLER)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise UnreadableImage("it moves: it has several frames", "save one of them")
            if image.mode not in IMAGE_MODES:
                reason = f"its numbers are of the kind `{image.mode}`"
                raise UnreadableImage(reason, "save it with 8 bits for each colour")
            image.load()
            return flatten_on_white(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            reason = f"it has more than {limits.IMAGE_PIXELS:,} pixels"
            raise UnreadableImage(reason, _SMALLER) from None
        except Image.UnidentifiedImageError:
            raise UnreadableImage(
                f"it isn't an image of the kinds {known}", "save it as one"
            ) from None
        except (OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
            raise UnreadableImage(f"it is damaged ({_line(error)})", "save it again") from None


def flatten_on_white(image: Image) -> Image:
    """Convert to RGB as transformers' `convert_to_rgb` does."""
    from PIL import Image as Images

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Images.new("RGBA", image.size, (255, 255, 255, 255))
    return Images.alpha_composite(ground, image).convert("RGB")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
