"""Sounds in prompts: WAV files, generated sounds, and their corruptions."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.images.picture import BaselineNumber, MediaError, Picture, read_content

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]
    """[sample] from -1 to 1."""

SOUND_CHANGES = ("silence", "noise")
"""Changes of corruptions that apply to sounds."""

_LEVEL = 0.5
"""Amplitude of generated sounds; full scale is 1."""

_VERSION = 1
"""Version of generated sounds: a new version changes them all."""

_FULL_SCALE, _LEVELS = 32_768, 255
"""Full scale of 16-bit samples, and of the amounts of noise."""

_CONVERT = "convert it to 16-bit PCM, for example with `ffmpeg -i in.wav -c:a pcm_s16le out.wav`"


class GeneratedSound(Record):
    """A sound without a file, as long as the model reads sounds."""

    samples: Callable[[int, int, int, int], Samples]
    """Returns the sound from its sampling rate in hertz, its number of samples, the number in
    parentheses (0 without one) and a seed."""
    number: BaselineNumber | None = None
    """The number in parentheses, which is then required."""
    is_random: bool = False
    """Whether the sound depends on the seed, which differs from row to row."""


def _silence(rate: int, count: int, number: int, seed: int) -> Samples:
    import numpy as np  # not at the top: `validate` only reads names

    return np.zeros(count, np.float32)


def _noise(rate: int, count: int, number: int, seed: int) -> Samples:
    import numpy as np  # not at the top: `validate` only reads names

    random = np.random.Generator(np.random.Philox(seed))
    return random.uniform(-_LEVEL, _LEVEL, count).astype(np.float32)


def _tone(rate: int, count: int, number: int, seed: int) -> Samples:
    import numpy as np  # not at the top: `validate` only reads names

    return (_LEVEL * np.sin(2 * np.pi * number / rate * np.arange(count))).astype(np.float32)


GENERATED_SOUNDS = {
    "silence": GeneratedSound(_silence),
    "noise": GeneratedSound(_noise, is_random=True),
    "tone": GeneratedSound(_tone, BaselineNumber("a frequency", 1, 20_000, 440, example=440)),
}
"""Generated sounds by name."""


class Sound(Picture):
    """The description of a sound in a prompt; `how` is `file` or a name in `GENERATED_SOUNDS`.

    `size` is its sampling rate in hertz and its number of samples. A sound is a `Picture` because
    prompts contain both alike: as a marker in the text that tokens replace.
    """

    noun: ClassVar[str] = "sound"

    def content(self) -> str:
        told: list[object] = [self.how, self.digest, *(change.told() for change in self.changes)]
        if self.how != "file":
            told += [_VERSION, self.size, self.number, self.seed]
        return blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    @property
    def _made(self) -> str:
        if self.how == "file":
            return self.said
        return self.how if self.number is None else f"{self.how} {self.number}"


def inspect_sound(path: Path) -> tuple[str, tuple[int, int]]:
    """Return (SHA-256 of the bytes, (sampling rate, number of samples)) of a WAV file.

    Raises MediaError.
    """
    content = _read(path)
    rate, samples = _decode(content)
    return sha256(content).hexdigest(), (rate, len(samples))


def render_samples(sound: Sound) -> Samples:
    """Return a sound with the corruptions' changes.

    Raises MediaError, also if the digest of its file has changed.
    """
    import numpy as np  # not at the top: `validate` only reads names

    if sound.how == "file":
        assert sound.path is not None
        content = _read(sound.path)
        if sha256(content).hexdigest() != sound.digest:
            advice = "run it again when it is written"
            raise MediaError("it has changed since it was checked", advice)
        samples = _decode(content)[1]
    else:
        generated = GENERATED_SOUNDS[sound.how]
        samples = generated.samples(*sound.size, sound.number or 0, sound.seed)
    for change in sound.changes:
        if change.how == "silence":
            samples = np.zeros_like(samples)
        else:
            random = np.random.Generator(np.random.Philox(change.seed))
            noisy = samples + change.amount / _LEVELS * random.standard_normal(len(samples))
            samples = noisy.clip(-1, 1).astype(np.float32)
    return samples


def _read(path: Path) -> bytes:
    return read_content(path, limits.AUDIO_FILE, "cut it: models read a few seconds of a sound")


def _decode(content: bytes) -> tuple[int, Samples]:
    """Return the sampling rate and the mean of the channels of a WAV file.

    Raises MediaError.
    """
    import numpy as np  # not at the top: `validate` only reads names

    try:
        with wave.open(io.BytesIO(content)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            frames, count = file.readframes(file.getnframes()), file.getnframes()
    except (wave.Error, EOFError, RuntimeError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise MediaError(f"it isn't a WAV file of PCM samples ({said})", _CONVERT) from None
    if width != 2:
        raise MediaError(f"its samples have {8 * width} bits, not 16", _CONVERT)
    if not count or len(frames) != 2 * channels * count:
        reason = "it has no samples" if not count else "it is shorter than its header says"
        raise MediaError(reason, "save it again")
    levels = np.frombuffer(frames, "<i2").reshape(-1, channels).mean(1)
    return rate, (levels / _FULL_SCALE).astype(np.float32)
