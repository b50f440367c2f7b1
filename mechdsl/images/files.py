"""Images in files, read by Pillow within limits: what a file says of itself is looked at first."""

from __future__ import annotations

import io
import warnings
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base import limits

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Of Pillow, those whose numbers go to 255: others lose what they have beyond."""

_SMALLER = "save it smaller: models read a few hundred pixels a side"


class NotRead(Exception):
    """A file that isn't read; `reason` and `hint` are for the reader."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def look(path: Path) -> tuple[str, tuple[int, int]]:
    """(SHA-256 of the bytes, (height, width)) of an image that can be read, pixel by pixel. Raises
    NotRead."""
    content = _bytes(path)
    image = decoded(content)
    return sha256(content).hexdigest(), (image.height, image.width)


def read(path: Path, digest: str) -> Image:
    """The image in RGB. Raises NotRead, also where the file is another one than it was."""
    content = _bytes(path)
    if sha256(content).hexdigest() != digest:
        raise NotRead("it has changed since it was checked", "run it again when it is written")
    return decoded(content)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limits.IMAGE_FILE + 1)
    except OSError as error:
        reason = "there is no such file"
        if not isinstance(error, FileNotFoundError):
            reason = str(error.strerror or error).lower()
        hint = "the path is relative to the folder of the `.mech` file"
        raise NotRead(reason, hint) from None
    if len(content) > limits.IMAGE_FILE:
        reason = f"it has more than {limits.IMAGE_FILE:,} bytes"
        raise NotRead(reason, _SMALLER)
    return content


def decoded(content: bytes) -> Image:
    """The image that some bytes hold: upright, in RGB, transparent parts on white. Raises NotRead.

    Its size is read off its header, before any pixel is.
    """
    from PIL import Image, ImageOps

    known = ", ".join(FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, which are refused below
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            pixels = image.width * image.height
            if pixels > limits.IMAGE_PIXELS:
                reason = f"it has {pixels:,} pixels, more than {limits.IMAGE_PIXELS:,}"
                raise NotRead(reason, _SMALLER)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise NotRead("it moves: it has several frames", "save one of them")
            if image.mode not in MODES:
                reason = f"its numbers are of the kind `{image.mode}`"
                raise NotRead(reason, "save it with 8 bits for each colour")
            image.load()
            return on_white(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            reason = f"it has more than {limits.IMAGE_PIXELS:,} pixels"
            raise NotRead(reason, _SMALLER) from None
        except Image.UnidentifiedImageError:
            raise NotRead(f"it is no image of the kinds {known}", "save it as one") from None
        except (OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
            raise NotRead(f"it is damaged ({_line(error)})", "save it again") from None


def on_white(image: Image) -> Image:
    """In RGB, as transformers' `convert_to_rgb` has it."""
    from PIL import Image as Images

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Images.new("RGBA", image.size, (255, 255, 255, 255))
    return Images.alpha_composite(ground, image).convert("RGB")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
