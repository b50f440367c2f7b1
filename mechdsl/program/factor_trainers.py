"""Trainers that compute a dictionary from all vectors together: matrix factorizations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program.direction_methods import Problem
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import DictionaryOutline, Trainer, trainer

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mechdsl.fits.factors import Solution

NONNEGATIVE_SITE = "mlp_hidden"
"""The site whose vectors may be nonnegative."""

SPARSITY = 0.02
"""Default of `penalty` of `semi_nmf`."""


OTHER_FACTOR_OPTIONS: dict[str, str] = {
    **dict.fromkeys(("n_components", "components", "rank", "k"), "factors"),
    "alpha": "penalty",
}
"""Names of an option of a factorization in other tools → the option."""


class FactorTrainer(Trainer):
    """Factors of vectors, with nonnegative activations."""

    options = ("factors",)
    required = ("factors",)
    defaults: ClassVar[Mapping[str, Constant]] = {"steps": 1000}
    unused = ("batch", "rate", "patience")

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return None
        return f"`{name}` is a whole number from 1 on", f"write `{name}: 8`"

    def check_site(self, site: str, width: int, options: Mapping[str, Constant]) -> Problem | None:
        count = int(options["factors"])
        if count <= width:
            return None
        reason = f"{count:,} factors of vectors of `{site}`, which have {width:,} numbers"
        return f"{reason}: activations wouldn't be unique", f"write at most `factors: {width}`"

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        return DictionaryOutline("nonnegative", int(options["factors"]))


@trainer("nmf")
class NonnegativeTrainer(FactorTrainer):
    """Nonnegative matrix factorization: nonnegative factors of nonnegative vectors.

    References:
        Lee and Seung 1999, doi 10.1038/44565.
    """

    example = "nmf(factors: 8)"
    package = "scikit-learn"

    def check_site(self, site: str, width: int, options: Mapping[str, Constant]) -> Problem | None:
        if site == NONNEGATIVE_SITE:
            return super().check_site(site, width, options)
        return (
            f"`nmf` needs nonnegative vectors, and those of `{site}` have negative numbers",
            f"write `semi_nmf(factors: {options['factors']})`, whose factors have both signs",
        )

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        from mechdsl.fits.factors import draw_factors, factor_nonnegative

        start = draw_factors(int(options["factors"]), vectors.shape[1], random).abs()
        return factor_nonnegative(vectors, start, steps)


@trainer("semi_nmf")
class SemiNonnegativeTrainer(FactorTrainer):
    """Semi-nonnegative matrix factorization: factors of both signs, with sparse activations.

    References:
        Ding, Li and Jordan 2010, doi 10.1109/TPAMI.2008.277.
    """

    example = "semi_nmf(factors: 8)"
    options = ("factors", "penalty")

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name != "penalty":
            return super().check_option(name, value)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        return None if number else ("`penalty` is from 0 to below 1", "write `penalty: 0.02`")

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        from mechdsl.fits.factors import draw_factors, factor_semi_nonnegative

        start = draw_factors(int(options["factors"]), vectors.shape[1], random)
        length = float(vectors.double().square().sum(1).mean().sqrt())
        penalty = float(options.get("penalty", SPARSITY)) * length
        return factor_semi_nonnegative(vectors, start, steps, penalty)
