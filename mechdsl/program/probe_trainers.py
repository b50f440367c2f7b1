"""Trainers of linear probes: ridge and logistic regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program.direction_methods import Problem
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import ProbeTrainer, trainer

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats, Ints
    from mechdsl.fits.regression import LinearMap

LOGISTIC_PENALTY = 1.0
"""Default of `penalty` of `logistic`, also of `observe probe`."""

PROBE_SITES = "at resid_post layer * at last token"

PROBE_EXAMPLE = f"probe told = fit(ridge, prompts: fruit.train, target: count) {PROBE_SITES}"

OTHER_PROBE_TRAINERS: dict[str, str] = {
    **dict.fromkeys(
        ("linear", "linear_regression", "least_squares", "ols", "lasso"),
        "write `ridge`, for a number",
    ),
    **dict.fromkeys(
        ("probe", "logistic_regression", "classifier", "svm", "softmax"),
        "write `logistic` for a class, or `ridge` for a number",
    ),
}
"""What else may be written for a trainer of this module inside of `fit(…)` → hint."""


class PenalisedTrainer(ProbeTrainer):
    """A regression with an L2 penalty."""

    options = ("penalty",)
    other_options: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("l2", "alpha", "C", "regularization", "weight_decay"), "penalty"
    )

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        return None if number else ("`penalty` is a number above 0", "write `penalty: 1`")


@trainer("ridge")
class RidgeTrainer(PenalisedTrainer):
    """A ridge regression of a number.

    References:
        Hoerl and Kennard 1970, doi 10.1080/00401706.1970.10488634.
    """

    example = "ridge(penalty: 1)"
    predicts = "number"

    def fit(
        self, vectors: Floats, targets: Floats, folds: Ints, options: Mapping[str, Constant]
    ) -> LinearMap:
        from mechdsl.fits.regression import RidgeProbe

        penalty = float(options["penalty"]) if "penalty" in options else None
        return RidgeProbe(penalty).fit(vectors, targets, folds)


@trainer("logistic")
class LogisticTrainer(PenalisedTrainer):
    """A logistic regression of a class, with two or more classes."""

    example = "logistic(penalty: 1)"
    predicts = "class"

    def fit(
        self, vectors: Floats, targets: Floats, folds: Ints, options: Mapping[str, Constant]
    ) -> LinearMap:
        from mechdsl.fits.regression import LogisticProbe

        penalty = float(options.get("penalty", LOGISTIC_PENALTY))
        return LogisticProbe(penalty).fit(vectors, targets)
