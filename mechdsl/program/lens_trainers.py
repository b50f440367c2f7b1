"""Trainers of lenses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program.spec import Constant
from mechdsl.program.trainers import LensTrainer, trainer

if TYPE_CHECKING:
    from torch import device

    from mechdsl.fits.lenses import LensMaps


LENS_SITES = "at resid_post layer * at tokens *"

LENS_EXAMPLE = f"lens tuned = fit(tuned_lens, prompts: texts.train) {LENS_SITES}"

OTHER_LENS_TRAINERS: dict[str, str] = dict.fromkeys(
    ("lens", "logit_lens", "tuned", "translator"), f"write `{LENS_EXAMPLE}`"
)
"""What else may be written for a trainer of this module inside of `fit(…)` → hint."""


@trainer("tuned_lens")
class TunedLensTrainer(LensTrainer):
    """A tuned lens: an affine map for each layer, which starts as the logit lens.

    References:
        Belrose et al. 2023, arXiv 2303.08112.
    """

    example = "tuned_lens"
    defaults: ClassVar[Mapping[str, Constant]] = {"steps": 1000, "batch": 128}

    def start(
        self, width: int, layers: Sequence[int], options: Mapping[str, Constant], device: device
    ) -> LensMaps:
        from mechdsl.fits.lenses import LensMaps

        return LensMaps(width, layers, device)
