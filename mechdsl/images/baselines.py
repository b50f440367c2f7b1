"""Registry of baseline images: images without content, such as `image gray` and `image noise`.

A baseline image is one class. A module outside the package adds one under
`mechdsl.program.images.image_baseline`, when it is imported before a file is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.records import Record, Registry, attribute_problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAY_LEVEL = 128
"""Level of gray, of 255."""


class BaselineNumber(Record):
    """The number in parentheses, as in `gray(100)`."""

    noun: str
    """With its article, for messages: `a level`."""
    low: int
    high: int
    default: int
    """Value if a file has no parentheses."""
    example: int


class ImageBaseline:
    """An image without content, in the size that the model reads."""

    name: ClassVar[str]
    documentation: ClassVar[str]
    """Description for the language reference."""
    number: ClassVar[BaselineNumber | None] = None
    """The number that a file can give; None if it takes none."""
    is_uniform: ClassVar[bool] = False
    """Whether all pixels are equal, so that the size doesn't matter."""
    is_random: ClassVar[bool] = False
    """Whether `pixels` depends on the seed, which differs from row to row."""

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        """Return the image in RGB, shape [height, width, 3].

        Args:
            size: Height and width in pixels.
            number: The number in parentheses, or its default; 0 if the class takes none.
            seed: Seed of random draws, 0..2^64-1.
        """
        raise NotImplementedError

    def shown(self, number: int) -> str:
        """Return the image as a file writes it, with its number unless that is the default."""
        usual = self.number is None or number == self.number.default
        return self.name if usual else f"{self.name} {number}"


IMAGE_BASELINES: Registry[ImageBaseline] = Registry("baseline image")


def baseline_problem(name: str, entry: type[ImageBaseline]) -> str | None:
    """Return the reason that a class can't be registered."""
    wrong = attribute_problem(entry, texts=("documentation",))
    if wrong is not None:
        return wrong
    if not isinstance(entry.number, BaselineNumber | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        return "`number` must be None or a `BaselineNumber`"
    if entry.pixels is ImageBaseline.pixels:
        return "it has no `pixels(self, size, number, seed)`"
    return None


@IMAGE_BASELINES.class_decorator("gray", baseline_problem)
class Gray(ImageBaseline):
    documentation = "All pixels 128 of 255; `gray(100)` is darker."
    number = BaselineNumber("a level", 0, 255, default=GRAY_LEVEL, example=100)
    is_uniform = True

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        import numpy as np  # not at the top: `validate` only reads the registry

        return np.full((*size, 3), number, np.uint8)


@IMAGE_BASELINES.class_decorator("noise", baseline_problem)
class Noise(ImageBaseline):
    documentation = "Uniform noise, drawn for every channel of every pixel."
    is_random = True

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        import numpy as np  # not at the top: `validate` only reads the registry

        random = np.random.Generator(np.random.Philox(seed))
        return random.integers(0, 256, (*size, 3), dtype=np.uint8)
