"""The tokenizer of prompts that contain images or a sound, by the model's own processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from re import Match
from typing import Any, TypeVar, cast

from mechdsl.base.files import PACKAGE_FOLDER, cache_folder, write_atomically
from mechdsl.base.hashing import digest, stable_hashes
from mechdsl.base.text import Span, quote
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import NoImageProcessor, UnpreparedImages
from mechdsl.images.layouts import (
    EncoderSize,
    ImageCell,
    ImageExpansion,
    ImageLayout,
    ImagePrompt,
    ImageText,
    ImageTokens,
    PixelBox,
    PromptPicture,
    find_layout,
    image_layout,
    video_layout,
)
from mechdsl.images.picture import (
    HALF_COVERED,
    MARKER,
    Picture,
    Region,
    group_extent,
    has_frames,
    is_grouped,
    marker_extent,
)
from mechdsl.images.processing import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    TILING_SETTINGS,
    Processing,
    UnsupportedProcessor,
    parse_processing,
)
from mechdsl.images.sounds import Sound
from mechdsl.program import spec
from mechdsl.prompts.tokens.chat import ChatTemplate
from mechdsl.prompts.tokens.tokenizer import EncodedText, TextTokenizer

IMAGE_TOKEN = 1 << 61
"""Tokens of images have numbers from here on: each stands for one vector of one image, so that
equal tokens have equal vectors, as those of a text do."""

_VIDEO_TOKEN = IMAGE_TOKEN | 1 << 62
"""As `IMAGE_TOKEN`, of videos that the video processor reads."""

_FILES = (PROCESSOR_FILE, PREPROCESSOR_FILE, "config.json")

_SOME_FRAMES = 2
"""A number of frames, where the text that stands for a video doesn't depend on it."""

_VIDEO_FILE = "video_preprocessor_config.json"

_SETTINGS = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that a processor is read from; weights have others."""

_CODE = (
    *("images/layouts.py", "images/picture.py", "images/processing.py"),
    *("prompts/tokens/image_prompts.py", "prompts/tokens/tokenizer.py"),
)
"""Modules of this package on which the facts of a processor depend."""

_LIBRARIES = ("transformers", "tokenizers", "torch", "torchvision", "pillow", "numpy")

_FIT_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *TILING_SETTINGS,
)
"""Settings of an image processor that determine the size of prepared images."""

_FIT_AS = {"Gemma3": "Siglip", "Llava": "CLIP", "VideoLlava": "CLIP"}
"""Image processors that resize and crop as another one does, if they neither pad nor cut."""

FactT = TypeVar("FactT")
ItemT = TypeVar("ItemT")


class ImagePromptTokenizer(TextTokenizer):
    """A tokenizer whose texts may contain markers of images (`Picture.marker`)."""

    folder: Path | None = None
    """The model's folder, from which the processor is read when an image is tokenised."""
    given: tuple[Any, Any] | None = None
    """The processor and config of a model that is handed over from Python."""

    @classmethod
    def from_folder(
        cls, path: Path, bos: bool | None = None, *, span: Span | None = None
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Read the tokenizer of a folder; its hash covers the settings of the processor."""
        made, problems = super().from_folder(path, bos, span=span)
        if isinstance(made, ImagePromptTokenizer):
            made.folder = path
            contents = [(path / name) for name in _FILES]
            told = [file.read_bytes() if file.is_file() else b"" for file in contents]
            if (videos := path / _VIDEO_FILE).is_file():
                told.append(videos.read_bytes())
            if version := _library_version("torchvision"):  # prepares images by other classes
                told.append(version.encode())
            made.hash = sha256(b"\0".join([made.hash.encode(), *told])).hexdigest()
        return made, problems

    def with_processor(self, processor: Any, config: Any) -> ImagePromptTokenizer:
        """Return the tokenizer with a processor and config from Python."""
        other = copy(self)
        other.given = processor, config
        other.hash = sha256(f"{self.hash} {processor.to_json_string()}".encode()).hexdigest()
        return other

    # --- the processor ----------------------------------------------------------------------------

    @cached_property
    def _cache(self) -> Path | None:
        """The folder for facts of the processor, by everything that they depend on; None for a
        processor from Python, and without a cache."""
        folder = cache_folder()
        if self.given is not None or self.folder is None or folder is None:
            return None
        files = sorted(path for path in self.folder.iterdir() if path.suffix in _SETTINGS)
        contents = [(file.name, sha256(file.read_bytes()).digest()) for file in files]
        code = [(PACKAGE_FOLDER / name).read_bytes() for name in _CODE]
        key = digest(self.hash, contents, code, _library_versions())
        return folder / "images" / key.hex()

    def _recall(
        self, name: str, find: Callable[[], object], parse: Callable[[Any], FactT]
    ) -> FactT:
        """Return a fact of the processor, from the cache if it has it: transformers, which takes
        seconds to import, is then not needed.

        Args:
            name: The name of the fact.
            find: Returns what JSON can represent.
            parse: Returns the fact, from JSON too.
        """
        folder = self._cache
        if folder is None:
            return parse(find())
        path = folder / f"{digest(name).hex()}.json"
        with suppress(OSError, ValueError, TypeError, LookupError):
            return parse(json.loads(path.read_text(encoding="utf-8")))
        value = find()
        with suppress(OSError):
            write_atomically(path, json.dumps(value))
        return parse(value)

    def _recall_layout(
        self, name: str, find: Callable[[], object], parse: Callable[[Any], FactT]
    ) -> FactT:
        """Return a fact of the processor and of the layout; one of a plugin isn't cached."""
        is_own = type(self.layout).__module__ == ImageLayout.__module__
        return self._recall(name, find, parse) if is_own else parse(find())

    @cached_property
    def _read(self) -> tuple[Any, Any]:
        """The processor and the config of transformers, which is imported when they are needed.

        Raises:
            UnsupportedProcessor: There is none, or the library can't read it.
        """
        if self.given is not None:
            return self.given
        if self.folder is None:
            raise UnsupportedProcessor("there is none")
        try:
            from transformers import AutoConfig, AutoProcessor  # takes seconds

            return (
                AutoProcessor.from_pretrained(self.folder, local_files_only=True),
                AutoConfig.from_pretrained(self.folder, local_files_only=True),
            )
        except Exception as error:  # the library passes on errors of its dependencies
            raise _unreadable(error) from error

    @property
    def processor(self) -> Any:
        """The processor of transformers. Raises UnsupportedProcessor."""
        return self._read[0]

    @cached_property
    def processor_name(self) -> str:
        """The class of the image processor, which may depend on installed libraries."""
        return self._recall("class", lambda: type(self.reads_with).__name__, str)

    @cached_property
    def video_processor_name(self) -> str:
        """The class of the video processor."""
        return self._recall(
            "video class", lambda: type(self.processor.video_processor).__name__, str
        )

    @property
    def reads_with(self) -> Any:
        """The image processor, or the feature extractor of sounds."""
        return self.layout.reader(self.processor)

    @cached_property
    def fitting(self) -> Processing:
        """How the image processor resizes and crops all images to one size.

        Raises:
            UnsupportedProcessor: It prepares images in several sizes, or isn't known.
        """
        return self._recall("fitting", self._find_settings, parse_processing).fitting

    def _find_settings(self) -> dict[str, object]:
        """Return the settings of the image processor that JSON can represent."""
        every: Mapping[str, object] = self.reads_with.to_dict()
        prompt = ImagePrompt(self.processor, self._read[1], {}, ())
        name = type(self.reads_with).__name__
        kind = name.partition("ImageProcessor")[0]
        settings: dict[str, object] = {
            "image_processor_type": name.replace(kind, _FIT_AS.get(kind, kind), 1)
        }
        for key in _FIT_SETTINGS:
            value = prompt.setting(key)
            is_plain = value is None or isinstance(value, bool | int | float | list | tuple | dict)
            settings[key] = value if is_plain else every.get(key)
        return settings

    @cached_property
    def image_text(self) -> ImageText:
        """The texts that stand for an image before the tokenizer expands it.

        Raises:
            UnsupportedProcessor: The processor names no image token.
        """
        return self._recall_layout("text", self._find_image_text, lambda own: ImageText(*own))

    def _find_image_text(self) -> tuple[str, str, str]:
        image_text = self.layout.image_text(*self._read)
        return image_text.given, image_text.written, image_text.token

    @cached_property
    def _video_texts(self) -> dict[int, ImageText]:
        return {}

    def video_text(self, frames: int) -> ImageText:
        """As `image_text`, for a video with this number of frames that the video processor
        reads."""
        if frames not in self._video_texts:
            self._video_texts[frames] = self._recall_layout(
                f"video text {frames}",
                lambda: self._find_video_text(frames),
                lambda own: ImageText(*own),
            )
        return self._video_texts[frames]

    def _find_video_text(self, frames: int) -> tuple[str, str, str]:
        image_text = self.layout.video_text(*self._read, frames)
        return image_text.given, image_text.written, image_text.token

    def text_of(self, extent: tuple[int, ...]) -> ImageText:
        """Return the texts that stand for a picture, given its `Picture.extent`."""
        return self.video_text(extent[2]) if has_frames(extent) else self.image_text

    @cached_property
    def video_id(self) -> int:
        """As `image_id`, for a video that the video processor reads."""
        return self._recall_layout("video token", self._find_video_id, int)

    def _find_video_id(self) -> int:
        return int(getattr(self._read[1], self.layout.video_token))

    @cached_property
    def video_chat(self) -> str:
        """The chat template of the processor for videos; empty if it is that of images."""
        if not self.reads_videos:
            return ""
        return self._recall_layout("chat", lambda: self.layout.video_chat(self.processor), str)

    @cached_property
    def frame_rate(self) -> float:
        """Frames per second of the videos that the video processor reads."""
        return self._recall_layout(
            "frame rate", lambda: self.layout.frame_rate(self.processor.video_processor), float
        )

    def token_of(self, extent: tuple[int, ...]) -> int:
        """Return the token in whose place the model puts a vector of a picture."""
        return self.video_id if has_frames(extent) else self.image_id

    @cached_property
    def image_id(self) -> int:
        """The token in whose place the model puts a vector of an image; of a model whose encoder
        reads images, which has none, the token for unknown text."""
        if self.layout.encodes:
            return self.unknown_id or 0
        return self._recall("token", self._find_image_id, int)

    def _find_image_id(self) -> int:
        number = getattr(self._read[1], "image_token_id", None)
        if not isinstance(number, int):
            raise UnsupportedProcessor("the model's config names no image token")
        return number

    @cached_property
    def image_marks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the processor writes before and after the token of an image."""
        text = self.image_text
        [encoded] = super()._raw([text.written])
        at = self._places(encoded, [text.token_range()])[0]
        return encoded.ids[:at], encoded.ids[at + 1 :]

    @cached_property
    def _model_type(self) -> str:
        return self._recall("type", lambda: getattr(self._read[1], "model_type", ""), str)

    @property
    def layout(self) -> ImageLayout:
        """How the model reads images. Raises UnsupportedProcessor."""
        return find_layout(self._model_type)

    @cached_property
    def bos_after_images(self) -> int | None:
        """The beginning-of-sequence token that follows the last image; None if it is the first."""
        if not self.layout.bos_after_images:
            return None
        return self._recall("bos", lambda: int(self.processor.tokenizer.bos_token_id), int)

    @cached_property
    def prefix_end(self) -> int | None:
        """The last token of prompts with images whose tokens attend to each other; None: they
        attend to earlier tokens.

        Raises:
            UnsupportedProcessor: The tokenizer has no single token for it.
        """
        if not self.layout.prefix_end:
            return None
        [encoded] = super()._raw([self.layout.prefix_end])
        if len(encoded.ids) != 1:
            raise UnsupportedProcessor("its tokenizer splits the line break after prompts")
        return encoded.ids[0]

    @cached_property
    def _written_bos(self) -> str:
        """The beginning-of-sequence token that the processor of attended images writes."""
        return self._recall("bos text", lambda: str(self.processor.bos_token or ""), str)

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raise UnsupportedProcessor if a prompt with images lacks the end that the processor adds.

        Its tokens attend to each other up to the first such token.
        """
        end = self.prefix_end
        if end is None or [n for n, number in enumerate(ids) if number == end] == [len(ids) - 1]:
            return
        unfit = UnsupportedProcessor("it ends each prompt with a line break, its only one")
        unfit.hint = "write `\\n` at the end of the template, and nowhere else"
        raise unfit

    def prefix_conventions(self) -> dict[str, str]:
        """Describe how a model reads whole prompts with images, if it isn't like texts."""
        if self.layout.noun == "sound":
            return {"bos": "none: the encoder reads only the sound"}
        if self.layout.encodes:
            return {"bos": "none: the encoder reads only the image, its class token before patches"}
        out: dict[str, str] = {}
        if self.layout.attended:
            token = quote(self.token_text(self.image_id))
            out["image"] = (
                f"blocks of `cross` attend to it, from its {token} up to the next image; tokens "
                "before the first image attend to all tiles of all images, also to tiles that an "
                "image doesn't fill"
            )
            by = (
                "the chat template or the model's processor"
                if self.written
                else "the model's processor"
            )
            if self._written_bos:
                out["bos"] = (
                    "none (bos: false)"
                    if self.bos is False
                    else f"{quote(self._written_bos)} before the text, or after the tokens of "
                    f"images that it begins with, by {by}"
                )
        if self.bos_after_images is not None and not self.written:
            bos = quote(self.token_text(self.bos_after_images))
            by = "the model's processor"
            out["bos"] = (
                "none (bos: false)" if self.bos is False else f"{bos} after images, by {by}"
            )
        if self.prefix_end is not None:
            out["prompt attention"] = (
                "all tokens of a prompt attend to each other; tokens after its line break attend "
                "to earlier ones"
            )
        return out

    @cached_property
    def reads_videos(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a video processor of the model reads the frames of a video together."""
        with suppress(UnsupportedProcessor):
            return bool(self.layout.video_processors) and self._has_video_processor
        return False

    @cached_property
    def _has_video_processor(self) -> bool:
        return self._recall(
            "videos", lambda: getattr(self.processor, "video_processor", None) is not None, bool
        )

    def check_frames(self) -> None:
        """Raise UnsupportedProcessor if the model reads videos by unknown means."""
        own, known = self._has_video_processor, bool(self.layout.video_processors)
        if own == known:
            return
        reason = f"models of the type `{self._model_type}` read videos by a video processor"
        unfit = UnsupportedProcessor(
            f"{reason}, which this one lacks" if known else f"{reason} with an unknown layout"
        )
        unfit.hint = "write an `image` line for each frame: the model then reads them as images"
        raise unfit

    @cached_property
    def natural_size(self) -> tuple[int, int]:
        """(height, width) of images without a size, such as a gray image."""
        return self._recall_layout(
            "size",
            lambda: self.layout.natural_size(self.reads_with),
            lambda own: (own[0], own[1]),
        )

    @cached_property
    def natural_frame(self) -> tuple[int, int]:
        """As `natural_size`, for the frames that the video processor reads."""
        return self._recall_layout(
            "frame size",
            lambda: self.layout.natural_size(self.processor.video_processor),
            lambda own: (own[0], own[1]),
        )

    def sized(self, extent: tuple[int, ...]) -> tuple[int, ...]:
        """Return an extent with the natural size in place of none (0, 0)."""
        if extent[:2] != (0, 0):
            return extent
        size = self.natural_frame if has_frames(extent) else self.natural_size
        return (*size, *extent[2:])

    @cached_property
    def _expansions(self) -> dict[tuple[int, ...], ImageExpansion]:
        return {}

    def expansion(self, extent: tuple[int, ...]) -> ImageExpansion:
        """Return the tokens of a picture with this `Picture.extent`; without a size (0, 0), it has
        the natural size.

        Raises:
            UnsupportedProcessor: The places of its tokens aren't known.
        """
        numbers = self.sized(extent)
        if numbers not in self._expansions:
            height, width, *frames = numbers
            self._expansions[numbers] = self._recall_layout(
                " x ".join(map(str, (width, height, *frames))),
                lambda: self._expand(numbers),
                partial(self._parse_expansion, numbers),
            )
        return self._expansions[numbers]

    def patches(
        self, extent: tuple[int, ...], expansion: ImageExpansion, encoder: EncoderSize
    ) -> list[tuple[int, ...]]:
        """Return `ImageLayout.patches` of a picture's tokens. Raises UnsupportedProcessor."""
        return self.layout.patches(self._lone_prompt(extent), expansion.layout, encoder)

    def read_patches(
        self, extent: tuple[int, ...], expansion: ImageExpansion, encoder: EncoderSize
    ) -> list[tuple[int, ...]] | None:
        """Return `ImageLayout.read_patches` of a picture; None if it isn't interpolated."""
        layout = self.layout
        if not layout.interpolates:
            return None
        return layout.read_patches(self._lone_prompt(extent), expansion.layout, encoder)

    def _lone_prompt(self, extent: tuple[int, ...]) -> ImagePrompt:
        """Return a prompt without inputs, for one picture."""
        height, width = self.sized(extent)[:2]
        return ImagePrompt(*self._read, {}, ((height, width),), is_grouped(extent))

    def encoded_patches(self, extent: tuple[int, ...]) -> int | None:
        """Return `ImageLayout.encoded_patches` of a picture."""

        def find() -> int | None:
            prompt = self._lone_prompt(extent)
            return self.layout.encoded_patches(prompt, self.expansion(extent).layout)

        return self._recall_layout(f"encoded patches of {extent}", find, lambda own: own)

    def encoder_expansion(self, extent: tuple[int, ...]) -> ImageExpansion:
        """Return the patches of a picture in place of its tokens, for a layout with `resamples`.

        Patch i of token t has the position t * vectors + i. Padding has no cell.

        Raises:
            UnsupportedProcessor: The patches aren't known.
        """
        expansion = self.expansion(extent)

        def find() -> tuple[int, list[list[Any]]]:
            prompt = self._lone_prompt(extent)
            tokens, side = expansion.layout, self.layout.merged_side(prompt.config.to_dict())
            count = self.layout.encoded_patches(prompt, tokens) or 0
            size = EncoderSize(count // max(1, len(tokens.tiles)), side)
            groups = self.layout.patches(prompt, tokens, size)
            numbers = [
                cell.position * side**2 + n
                for cell, patches in zip(expansion.layout.cells, groups, strict=True)
                for n, patch in enumerate(patches)
                if patch >= 0
            ]
            features = list(self.layout.encoder_features(prompt, tokens))
            if len(features) != len(numbers):
                raise UnsupportedProcessor("its patches have another number of rows and columns")
            rows = [[at, *cell] for at, cell in zip(numbers, features, strict=True)]
            return side**2, rows

        def parse(encoding: tuple[int, list[list[Any]]]) -> ImageExpansion:
            vectors, rows = encoding
            ids = repeat_each(expansion.ids, vectors)
            layout = ImageTokens(0, len(ids), _parse_cells(rows))
            is_image = repeat_each(expansion.is_image, vectors)
            grouped = expansion.grouped
            return ImageExpansion(ids, is_image, layout, grouped=grouped, vectors=vectors)

        own = self.sized(extent)
        if own not in self._encoder_expansions:
            name = f"patches of {' x '.join(map(str, own))}"
            self._encoder_expansions[own] = self._recall_layout(name, find, parse)
        return self._encoder_expansions[own]

    @cached_property
    def _encoder_expansions(self) -> dict[tuple[int, ...], ImageExpansion]:
        return {}

    def in_encoder(self, picture: PromptPicture) -> PromptPicture:
        """Return a picture with its `encoder_expansion`. Raises UnsupportedProcessor."""
        expansion = self.encoder_expansion(picture.picture.extent)
        cells, regions = expansion.layout.cells, dict[str, tuple[tuple[int, ...], ...]]()
        for name, shapes in picture.shapes.items():
            assert isinstance(picture.picture, Picture)
            covered = (_covered(shape, picture.picture, cells) for shape in shapes)
            regions[name] = tuple(covered)
        equal = {
            name: self.in_encoder(prompt_picture) for name, prompt_picture in picture.equal.items()
        }
        return replace(picture, expansion=expansion, regions=regions, equal=equal)

    def _parse_expansion(
        self, extent: tuple[int, ...], encoding: tuple[list[int], list[list[Any]]]
    ) -> ImageExpansion:
        ids, rows = encoding
        layout, own = ImageTokens(0, len(ids), _parse_cells(rows)), self.token_of(extent)
        is_image, is_sound = tuple(token == own for token in ids), self.layout.noun == "sound"
        return ImageExpansion(tuple(ids), is_image, layout, is_sound, is_grouped(extent))

    def _expand(self, extent: tuple[int, ...]) -> tuple[list[int], list[list[Any]]]:
        """Return the tokens of a picture; of each cell, its token, tile, row, column and box."""
        size = extent[0], extent[1]
        if self.layout.encodes or self.layout.attended:
            [layout] = image_layout(*self._read, {}, [size])
            return [self.image_id] * layout.end, _cell_rows(layout, 0)
        text = self.text_of(extent)
        ids: list[int] = []
        given: dict[str, Any] = {}
        first, times = 0, 2 if is_grouped(extent) else 1
        moved = self.bos_after_images
        for before, after in (("", ""), ("a ", " b")):
            written, arguments = self._written(
                f"{before}{text.given * times}{after}", *(extent,) * times
            )
            whole = f"{before}{text.written}{after}{self.layout.prefix_end}"
            [plain] = super()._raw([whole], add_special=moved is None)
            at = self._places(plain, [text.token_range(len(before))])[0]
            later = (*(() if moved is None else (moved,)), *plain.ids[at + 1 :])
            if not ids:
                ids, given, first = written[at : len(written) - len(later)], arguments, at
                ids = ids[: len(ids) // times]
            if written != [*plain.ids[:at], *ids * times, *later]:
                raise UnsupportedProcessor("it changes the text around images")
        layout_of = video_layout if has_frames(extent) else image_layout
        layout, *_ = layout_of(*self._read, given, [size] * times)
        return ids, _cell_rows(layout, first)

    def _places(self, encoded: EncodedText, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Return the tokens of pictures that have these characters of a text."""
        numbers = {offset: n for n, offset in enumerate(encoded.offsets) if not encoded.special[n]}
        if not all(own in numbers for own in ranges):
            raise UnsupportedProcessor("the tokenizer splits its image token")
        return [numbers[own] for own in ranges]

    def _written(self, text: str, *extents: tuple[int, ...]) -> tuple[list[int], dict[str, Any]]:
        """Return the tokens of a text with black pictures of these extents, and the processor's
        other outputs."""
        from PIL import Image

        images: list[Any] = []
        videos: list[list[Any]] = []
        for extent in extents:
            black = Image.new("RGB", (extent[1], extent[0]))
            if has_frames(extent):
                videos.append([black] * extent[2])
            else:
                images.append(black)
        options = {"return_tensors": "pt"} if videos else {}  # the text may depend on their shape
        given = self.prepare([text], [images] if images else [], videos, **options)
        return [int(token) for token in given["input_ids"][0]], given

    def prepare(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Any]],
        **options: Any,
    ) -> dict[str, Any]:
        """Return the processor's output for prompts.

        Args:
            texts: The prompts, with the texts of pictures.
            images: The images of each prompt; empty if none has an image.
            videos: The frames of each video; the model reads all of them.
            options: Further arguments of the processor.
        """
        import numpy as np  # not at the top: `validate` only reads names

        if images:
            options["images"] = [[*own] for own in images]
        if videos:
            options["videos"] = [np.stack([np.asarray(own) for own in each]) for each in videos]
            counts = [len(each) for each in videos]
            options["video_metadata"] = [
                {"total_num_frames": n, "fps": self.frame_rate, "frames_indices": [*range(n)]}
                for n in counts
            ]
            options["do_sample_frames"] = False
        return dict(self.processor(text=[*texts], **options))

    @cached_property
    def _joint_sizes(self) -> dict[tuple[tuple[int, ...], ...], bool]:
        """By extents of several pictures, whether they have the same tokens together as alone."""
        return {}

    def prepares_together(self, extents: Sequence[tuple[int, ...]]) -> bool:
        """Whether the processor writes the tokens of several pictures in a prompt as those of each
        picture alone, given their `Picture.extent`."""
        each = tuple(map(self.sized, extents))
        if each not in self._joint_sizes:
            try:
                written = self._recall_layout(
                    f"tokens of {each}", lambda: self._write_joined(each), list[int]
                )
            except _DifferentFrames:
                written = None
            self._joint_sizes[each] = written == self._join(each)
        return self._joint_sizes[each]

    def _check_several(self, extents: Sequence[tuple[int, ...]]) -> None:
        """Raise UnsupportedProcessor if several pictures in a prompt have other tokens than each
        alone.

        Videos of different numbers of frames that a processor can't prepare together pass if
        videos of equal numbers of frames have the tokens that each has alone.
        """
        each = tuple(map(self.sized, extents))
        is_video = [has_frames(numbers) for numbers in each]
        if not self.layout.joins_images_and_videos and len(set(is_video)) > 1:
            unfit = UnsupportedProcessor("it prepares images or videos, not both in a prompt")
            unfit.hint = "write images and videos in prompts of different blocks"
            raise unfit
        if self.prepares_together(each):
            return
        lengths = {numbers[2] for numbers in each if has_frames(numbers)}
        if len(lengths) < 2:
            raise _prepared_otherwise(each)
        most = max(lengths)
        self._check_several(
            [(*numbers[:2], most) if has_frames(numbers) else numbers for numbers in each]
        )

    def _write_joined(self, extents: Sequence[tuple[int, ...]]) -> list[int]:
        """Return the tokens that the processor writes for several pictures.

        Raises:
            _DifferentFrames: It can't prepare videos of different numbers of frames.
        """
        text = " ".join(self.text_of(numbers).given for numbers in extents)
        try:
            return self._written(text, *extents)[0]
        except ValueError as error:
            if len({numbers[2] for numbers in extents if has_frames(numbers)}) < 2:
                raise
            raise _DifferentFrames from error

    def _join(self, extents: Sequence[tuple[int, ...]]) -> list[int]:
        """Return the tokens of several pictures, from those of each."""
        moved = self.bos_after_images
        first, ranges, whole = 0, list[tuple[int, int]](), ""
        for text in map(self.text_of, extents):
            whole += " " if whole else ""
            ranges.append(text.token_range(len(whole)))
            whole += text.written
        whole += self.layout.prefix_end
        [plain] = super()._raw([whole], add_special=moved is None)
        ids: list[int] = []
        for place, extent in zip(self._places(plain, ranges), extents, strict=True):
            ids += [*plain.ids[first:place], *self.expansion(extent).ids]
            first = place + 1
        return [*ids, *(() if moved is None else (moved,)), *plain.ids[first:]]

    def chat_for(self, prompts: spec.Prompts) -> ChatTemplate | None:
        chat = super().chat_for(prompts)
        if chat is None or not (prompts.chat and prompts.pictures):
            return chat
        try:
            if any(picture.is_video for picture in prompts.pictures) and self.video_chat:
                given = self.video_text(_SOME_FRAMES).given
                return replace(chat, text=self.video_chat, image=given, part="video")
            return replace(chat, image=self.image_text.given)
        except UnsupportedProcessor:  # an error of the model
            return chat

    # --- texts to tokens --------------------------------------------------------------------------

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        markers = [list(MARKER.finditer(text)) for text in texts]
        if not any(markers):
            return super()._raw(texts, add_special)
        if self.layout.encodes:
            return [
                self._encoded(text, matches) for text, matches in zip(texts, markers, strict=True)
            ]
        if self.layout.attended:
            pairs = zip(texts, markers, strict=True)
            return [self._with_image(*pair, add_special=add_special) for pair in pairs]
        moved = self.bos_after_images if add_special else None
        if moved is not None and not all(markers):
            return [self._raw([text], add_special)[0] for text in texts]
        plain = [
            MARKER.sub(lambda match: self.text_of(marker_extent(match)).written, text)
            for text in texts
        ]
        every = super()._raw(plain, add_special and moved is None)
        bos = None if self.bos is False else moved
        return [
            self._expanded(encoded, matches, bos) if matches else encoded
            for encoded, matches in zip(every, markers, strict=True)
        ]

    def _separate_words(
        self, pairs: Sequence[tuple[str, str]], prompts: Mapping[str, EncodedText]
    ) -> dict[tuple[str, str], tuple[tuple[int, ...], bool]]:
        # The processor's text for an image may end in white space.
        return super()._separate_words([p for p in pairs if not MARKER.search(p[0])], prompts)

    def _with_bos(self, encoded: EncodedText) -> EncodedText:
        if self.layout.attended and encoded.source:
            if self.bos is not False:  # the prompt has the token that the processor writes
                return encoded
            text = super()._with_bos(_cut(encoded, slice(encoded.source, None)))
            return _after_image(_cut(encoded, slice(encoded.source)), text)
        has_image = any(token >= IMAGE_TOKEN for token in encoded.ids)
        without = self.layout.encodes or self.bos_after_images is not None
        return encoded if has_image and without else super()._with_bos(encoded)

    def _encoded(self, text: str, markers: Sequence[Match[str]]) -> EncodedText:
        """Return what an encoder of images reads: the tokens of the only image.

        Raises:
            UnsupportedProcessor: The text contains anything else.
        """
        if len(markers) != 1 or markers[0][0] != text:
            noun, name = self.layout.noun, "{a}" if self.layout.noun == "sound" else "{photo}"
            unfit = UnsupportedProcessor(f"the encoder reads one {noun}, without any text")
            unfit.hint = f'write only the {noun} in the template: `template "{name}"`'
            raise unfit
        [marker] = markers
        expansion = self.expansion(marker_extent(marker))
        ids = self.vector_tokens(marker[0], expansion)
        return EncodedText(ids, (marker.span(),) * len(ids), (False,) * len(ids))

    def _with_image(
        self, text: str, markers: Sequence[Match[str]], *, add_special: bool
    ) -> EncodedText:
        """Return the tokens of a text and of its images, if it has any, which precede it.

        As the processor does, it writes a beginning-of-sequence token into texts without one: after
        the tokens that stand for images if they begin with them, otherwise in front.
        """
        if not markers:
            return super()._raw([text], add_special)[0]
        token, bos = self.image_text.written, self._written_bos
        if not (add_special or self.written) or self.bos is False or bos in text:
            bos = ""
        leading = 0  # number of images that the text begins with, without anything between
        while leading < len(markers) and markers[leading].start() == (
            markers[leading - 1].end() if leading else 0
        ):
            leading += 1
        lengths = [len(token)] * len(markers)
        shift = len(bos)
        if leading:  # the token counts as a part of the last one's text, without characters
            lengths[leading - 1] += len(bos)
            shift = 0
        plain = "" if leading else bos
        end = 0
        for number, marker in enumerate(markers, 1):
            plain += text[end : marker.start()] + token + (bos if number == leading else "")
            end = marker.end()
        [encoded] = super()._raw([plain + text[end:]], add_special)
        around = _MarkerOffsets(markers, lengths)
        self._places(
            encoded, [self.image_text.token_range(start + shift) for start in around.starts]
        )
        kept = [
            None if special or end <= shift else around.of(start - shift, end - shift)
            for (start, end), special in zip(encoded.offsets, encoded.special, strict=True)
        ]
        ids, special = encoded.ids, tuple(each is None for each in kept)
        offsets = tuple(each or (0, 0) for each in kept)
        text_only = EncodedText(ids, offsets, special)
        vectors: list[int] = []
        spans: list[tuple[int, int]] = []
        for marker in markers:
            vector_tokens = self.vector_tokens(marker[0], self.expansion(marker_extent(marker)))
            vectors += vector_tokens
            spans += [marker.span()] * len(vector_tokens)
        images = EncodedText(tuple(vectors), tuple(spans), (False,) * len(vectors))
        return _after_image(images, text_only)

    def _expanded(
        self, encoded: EncodedText, markers: Sequence[Match[str]], bos: int | None = None
    ) -> EncodedText:
        """Replace the token of each marker by the tokens of its image, and the last one also by the
        beginning-of-sequence token that follows it."""
        extents = [marker_extent(marker) for marker in markers]
        if self._groups(extents):
            extents = [group_extent(extent) for extent in extents]
        if len(markers) > 1:
            self._check_several(extents)
        texts = [self.text_of(extent) for extent in extents]
        around = _MarkerOffsets(markers, [len(text.written) for text in texts])
        ranges = [text.token_range(first) for first, text in zip(around.starts, texts, strict=True)]
        pairs = zip(markers, extents, strict=True)
        due = dict(zip(self._places(encoded, ranges), pairs, strict=True))
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        special: list[bool] = []
        for number, (token, offset) in enumerate(zip(encoded.ids, encoded.offsets, strict=True)):
            if number not in due:
                own = None if encoded.special[number] else around.of(*offset)
                ids.append(token)
                offsets.append(own or (0, 0))
                special.append(own is None)
                continue
            marker, extent = due[number]
            expansion = self.expansion(extent)
            vectors, span = self.vector_tokens(marker[0], expansion), marker.span()
            if len(vectors) == len(expansion.ids):
                ids += vectors
                offsets += [span] * len(vectors)
                special += [False] * len(vectors)
            else:
                is_image, after = expansion.is_image, iter(vectors)
                pairs = zip(expansion.ids, is_image, strict=True)
                ids += [next(after) if is_vector else own for own, is_vector in pairs]
                offsets += [span if is_vector else (0, 0) for is_vector in is_image]
                special += [not is_vector for is_vector in is_image]
            if bos is not None and marker is markers[-1]:
                ids.append(bos)
                offsets.append((0, 0))
                special.append(True)
        return EncodedText(tuple(ids), tuple(offsets), tuple(special))

    def vector_tokens(self, marker: str, expansion: ImageExpansion) -> tuple[int, ...]:
        """Return the tokens that stand for the vectors of an image, in the order of the prompt."""
        name = f"{marker}, grouped" if expansion.grouped else marker
        return _hash_vectors(self.hash, name, expansion.is_image)

    def groups_images(self, text: str) -> bool:
        """Return whether the images in a text have `Picture.grouped`."""
        return self._groups([marker_extent(marker) for marker in MARKER.finditer(text)])

    def _groups(self, extents: Sequence[tuple[int, ...]]) -> bool:
        several = sum(not has_frames(extent) for extent in extents) > 1
        return several and self.layout.groups_images

    def token_text(self, token: int) -> str:
        """Return a readable token: decoded, special tokens by name."""
        if token >= IMAGE_TOKEN and (self.layout.encodes or self.layout.attended):
            return f"<{self.layout.noun}>"
        return super().token_text(self._placeholder(token))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, with special tokens by name."""
        return super().decode([self._placeholder(each) for each in ids])

    def _placeholder(self, token: int) -> int:
        """Return the processor's token for a token of an image or video; others as they are."""
        if token < IMAGE_TOKEN:
            return token
        return self.image_id if token < _VIDEO_TOKEN else self.video_id


class _DifferentFrames(Exception):
    """A processor can't prepare videos of different numbers of frames in one prompt."""


def _prepared_otherwise(extents: Sequence[tuple[int, ...]]) -> UnsupportedProcessor:
    """Return the error of a processor that gives several pictures other tokens than each alone."""
    what = " and ".join(
        sorted({"videos" if has_frames(numbers) else "images" for numbers in extents})
    )
    unfit = UnsupportedProcessor(f"it prepares several {what} in a prompt in another way")
    unfit.hint = "write one image or video in the template"
    unfit.what = what
    return unfit


def _unreadable(error: Exception) -> UnsupportedProcessor:
    """Return the error of a processor that transformers can't load."""
    told = str(error).lower() if isinstance(error, ImportError) else ""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(
        "torchvision::" in str(exception) for exception in causes
    ):  # a name of a compiled operator
        unfit = UnsupportedProcessor("the installed torchvision doesn't fit the installed torch")
        unfit.hint = 'install the version for your torch: `pip install "mechdsl[video]"`'
    elif "torchvision" in told:
        unfit = UnsupportedProcessor("it also prepares videos, for which it needs torchvision")
        unfit.hint = 'install the version for your torch: `pip install "mechdsl[video]"`'
    elif "num2words" in told:
        unfit = UnsupportedProcessor("it writes numbers of frames as words with num2words")
        unfit.hint = 'install it: `pip install "mechdsl[video]"`'
    else:
        unfit = UnsupportedProcessor(f"transformers can't read it ({error})")
    return unfit


def _cut(encoded: EncodedText, part: slice) -> EncodedText:
    """Return some of the tokens of a text."""
    return EncodedText(encoded.ids[part], encoded.offsets[part], encoded.special[part])


def _after_image(image: EncodedText, text: EncodedText) -> EncodedText:
    """Return the tokens of images, which the source consists of, and of the text after them."""
    return EncodedText(
        image.ids + text.ids,
        image.offsets + text.offsets,
        image.special + text.special,
        len(image.ids),
    )


def _cell_rows(layout: ImageTokens, first: int) -> list[list[Any]]:
    """Return the token of each cell, counted from the image's first, its tile, row, column, box."""
    return [[c.position - first, c.tile, c.row, c.col, c.box] for c in layout.cells]


def _parse_cells(rows: list[list[Any]]) -> tuple[ImageCell, ...]:
    """Return cells from their rows in `_cell_rows`."""
    return tuple(
        ImageCell(token, tile, row, col, None if box is None else cast("PixelBox", tuple(box)))
        for token, tile, row, col, box in rows
    )


def repeat_each(values: Sequence[ItemT], times: int) -> tuple[ItemT, ...]:
    """Return the values in order, each repeated `times` times."""
    return tuple(value for value in values for _ in range(times))


@cache
def _library_versions() -> tuple[str, ...]:
    """Return the versions of the libraries on which the facts of a processor depend."""
    return tuple(map(_library_version, _LIBRARIES))


def _library_version(name: str) -> str:
    """Return the version of a library; empty if it isn't installed."""
    from importlib.metadata import PackageNotFoundError, version  # for images in prompts only

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


class _MarkerOffsets:
    """Characters of a text with markers, from those of the text with images' texts instead."""

    def __init__(self, markers: Sequence[Match[str]], lengths: Sequence[int]) -> None:
        self.starts: list[int] = []
        """First characters of images' texts, which have these lengths."""
        self._places: list[tuple[int, int, int, int]] = []
        """Start and end of each image's text, and of its marker."""
        shift = 0
        for marker, length in zip(markers, lengths, strict=True):
            start, end = marker.span()
            self.starts.append(start + shift)
            self._places.append((start + shift, start + shift + length, start, end))
            shift += length - (end - start)

    def of(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the characters of a token; None if it lies within the text of an image."""
        if start < self.starts[0] >= end:
            return start, end
        for first, last, _, _ in self._places:
            if first <= start and end <= last:
                return None
        return self._moved(start, is_end=False), self._moved(end, is_end=True)

    def _moved(self, place: int, *, is_end: bool) -> int:
        shift = 0
        for first, last, start, end in self._places:
            if place >= last:
                shift = end - last
            elif place > first:
                return start if is_end else end
        return place + shift


@lru_cache(maxsize=1024)
def _hash_vectors(tokenizer: str, marker: str, is_image: tuple[bool, ...]) -> tuple[int, ...]:
    """Return the tokens of the vectors among an image's tokens."""
    match = MARKER.fullmatch(marker)
    is_video = match is not None and has_frames(marker_extent(match))
    first = _VIDEO_TOKEN if is_video else IMAGE_TOKEN
    numbers = (number for number, is_vector in enumerate(is_image) if is_vector)
    hashes = stable_hashes(numbers, "image token", tokenizer, marker)
    return tuple(first | each >> 67 for each in hashes)


STAND_IN_SIDE = 14
"""Rows and columns of an image for a missing model."""


@cache
def stand_in_expansion(*, is_sound: bool = False) -> ImageExpansion:
    """Return the tokens of an image or a sound for a missing model."""
    count = STAND_IN_SIDE**2
    places = (divmod(k, STAND_IN_SIDE) for k in range(count))
    cells = tuple(ImageCell(k, 1, row + 1, col + 1, None) for k, (row, col) in enumerate(places))
    if is_sound:
        cells = tuple(ImageCell(k, k + 1, 1, k + 1, None) for k in range(count))
    layout = ImageTokens(0, count, cells)
    return ImageExpansion((IMAGE_TOKEN,) * count, (True,) * count, layout, is_sound)


def prompt_pictures(
    pictures: Mapping[str, Picture],
    regions: Mapping[str, Mapping[str, tuple[Region, ...]]],
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    text: str,
) -> dict[str, PromptPicture]:
    """Return the images of a prompt by their markers, with their tokens.

    Args:
        pictures: The images by name.
        regions: Name of an image → name of a region → its occurrences.
        tokenizer: The tokenizer of the model.
        ids: The tokens of the prompt.
        text: The text of the prompt, with markers.

    Raises:
        UnsupportedProcessor: The model's processor would write another prompt.
    """
    equal: dict[str, dict[str, PromptPicture]] = {}
    grouped = False
    if pictures and isinstance(tokenizer, ImagePromptTokenizer):
        tokenizer.check_prompt(ids)
        grouped = tokenizer.groups_images(text)
    for name, picture in pictures.items():
        expansion, sized = stand_in_expansion(is_sound=isinstance(picture, Sound)), picture
        if isinstance(tokenizer, ImagePromptTokenizer):
            height, width, *_ = tokenizer.sized(picture.extent)
            sized = picture.sized((height, width))
            if grouped and not has_frames(picture.extent):
                sized = replace(sized, grouped=True)
            expansion = tokenizer.expansion(sized.extent)
        shapes = dict(regions.get(name, {}))
        own = {
            region: tuple(
                _covered(occurrence, sized, expansion.layout.cells) for occurrence in occurrences
            )
            for region, occurrences in shapes.items()
        }
        made = PromptPicture(sized, expansion, own, shapes)
        equal.setdefault(picture.marker, {})[name.partition(" ")[0]] = made  # `clip 2`: of `clip`
    return {marker: _unite_regions(named) for marker, named in equal.items()}


def _unite_regions(named: Mapping[str, PromptPicture]) -> PromptPicture:
    """Return one of several equal images, with the regions of all."""
    first, *others = named.values()
    if all(picture.shapes == first.shapes for picture in others):
        return first
    regions, shapes = dict(first.regions), dict(first.shapes)
    for picture in others:
        regions, shapes = {**picture.regions, **regions}, {**picture.shapes, **shapes}
    return replace(first, regions=regions, shapes=shapes, equal=named)


_PARTS = 8
"""Number of rows and of columns into which the part of an image that a token reads is divided."""


@lru_cache(maxsize=1024)
def _covered(region: Region, picture: Picture, every: tuple[ImageCell, ...]) -> tuple[int, ...]:
    """Return the tokens that read a part of a region, counted from the image's first.

    A token belongs to the region if at least half of an eighth by an eighth of its part does.
    """
    from PIL import Image

    from mechdsl.images.pixels import region_coverage  # imports NumPy: needed for regions only

    cells = [cell for cell in every if cell.box is not None]
    if not cells:  # of a missing model
        return tuple(cell.position for cell in every)
    cover = region_coverage(region, picture)
    patches: list[int] = []
    for cell in cells:
        assert cell.box is not None
        left, top, right, bottom = cell.box
        box = max(left, 0), max(top, 0), min(right, cover.width), min(bottom, cover.height)
        if box[0] < box[2] and box[1] < box[3]:
            parts = cover.resize((_PARTS, _PARTS), Image.Resampling.BOX, box)
            if max(parts.tobytes()) >= HALF_COVERED:
                patches.append(cell.position)
    return tuple(patches)


def read_prompt_tokenizer(
    folder: Path, bos: bool | None, *, span: Span | None = None
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    """Read the tokenizer of a model of images and texts; one of texts only without a processor."""
    images = any((folder / name).is_file() for name in (PROCESSOR_FILE, PREPROCESSOR_FILE))
    reader = ImagePromptTokenizer if images else TextTokenizer
    return reader.from_folder(folder, bos, span=span)


def check_processor(
    tokenizer: TextTokenizer,
    *,
    model: str,
    span: Span | None,
    videos: bool = False,
    sounds: bool = False,
) -> list[Diagnostic]:
    """Return E0456 or E0459 if a model has no usable processor for its prompts.

    Args:
        tokenizer: The tokenizer of the model.
        model: The model's name.
        span: Source of the diagnostic.
        videos: Whether the prompts have videos.
        sounds: Whether the prompts have sounds instead of images.
    """
    if tokenizer.stands_in:
        return []
    if not isinstance(tokenizer, ImagePromptTokenizer):
        reason = f"there is no `{PREPROCESSOR_FILE}` next to its `config.json`"
        what = "feature extractor" if sounds else "image processor"
        return [NoImageProcessor(span=span, model=model, reason=reason, what=what)]
    try:
        _ = tokenizer.image_id
        if videos:
            tokenizer.check_frames()
    except UnsupportedProcessor as unfit:
        return [report_unprepared(unfit, model, span, sounds=sounds)]
    return []


def report_unprepared(
    unfit: UnsupportedProcessor, model: str, span: Span | None, *, sounds: bool = False
) -> Diagnostic:
    """Return E0459 for images or sounds that a processor can't prepare."""
    what = unfit.what or ("sounds" if sounds else "images")
    problem = UnpreparedImages(span=span, model=model, reason=str(unfit), what=what)
    return replace(problem, hint=unfit.hint) if unfit.hint else problem
