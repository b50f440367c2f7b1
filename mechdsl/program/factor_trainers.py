"""Trainers that compute a dictionary from all vectors together: factorizations, components and
mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.text import name_list
from mechdsl.dictionaries.folder import COVARIANCES, Architecture
from mechdsl.fits.reports import IndependenceReport, MixtureReport
from mechdsl.program.direction_methods import Problem
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import (
    STEP_OPTIONS,
    DictionaryOutline,
    DictionaryTrainer,
    PairedTrainer,
    SolvedTrainer,
    trainer,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mechdsl.fits.correlations import CorrelatedPair
    from mechdsl.fits.factors import Solution

NONNEGATIVE_SITE = "mlp_hidden"
"""The site whose vectors may be nonnegative."""

SPARSITY = 0.02
"""Default of `penalty` of `semi_nmf`."""

RIDGE = 0.1
"""Default of `ridge` of `cca`."""

SPARSE_PENALTY = 0.5
"""Default of `penalty` of `sparse_cca`."""

COVARIANCE = "diag"
"""Default of `covariance` of `mixture`."""


OTHER_SOLVED_TRAINERS: dict[str, str] = {
    **dict.fromkeys(("snmf", "seminmf"), "write `semi_nmf(factors: 8)`"),
    **dict.fromkeys(("fastica", "fast_ica", "independent"), "write `ica(components: 8)`"),
    **dict.fromkeys(
        ("gmm", "gaussian_mixture", "gaussians", "clusters", "kmeans", "k_means"),
        "write `mixture(components: 8)`",
    ),
    **dict.fromkeys(
        ("canonical_correlation", "svcca", "pwcca", "pls"), "write `cca(components: 8)`"
    ),
    **dict.fromkeys(
        ("scca", "pmd", "sparsecca", "penalized_cca"), "write `sparse_cca(components: 8)`"
    ),
}
"""What else may be written for a trainer of this module inside of `fit(…)` → hint."""

SIZES = ("n_components", "components", "factors", "sources", "clusters", "dims", "rank", "k")
"""Names of the number of factors or components in other tools."""


class SizedTrainer(DictionaryTrainer):
    """A dictionary whose file says the number of its features, from all vectors together."""

    takes_any_size: ClassVar[bool] = False
    """Whether it may have more features than a vector has numbers."""
    defaults: ClassVar[Mapping[str, Constant]] = {"steps": 1000}
    unused = STEP_OPTIONS
    architecture: ClassVar[Architecture]

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if is_integer(value, least=1):
            return None
        return f"`{name}` is a whole number from 1 on", f"write `{name}: 8`"

    def check_site(self, site: str, width: int, options: Mapping[str, Constant]) -> Problem | None:
        (size,) = self.required
        count = int(options[size])
        if count <= width or self.takes_any_size:
            return None
        reason = f"{count:,} {size} of vectors of `{site}`, which have {width:,} numbers"
        return f"{reason}: activations wouldn't be unique", f"write at most `{size}: {width}`"

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        (size,) = self.required
        return DictionaryOutline(self.architecture, int(options[size]))


class FactorTrainer(SizedTrainer, SolvedTrainer):
    """Factors of vectors, with nonnegative activations."""

    options = ("factors",)
    required = ("factors",)
    other_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SIZES, "factors"),
        "alpha": "penalty",
    }
    architecture = "nonnegative"


@trainer("nmf")
class NonnegativeTrainer(FactorTrainer):
    """Nonnegative matrix factorization: nonnegative factors of nonnegative vectors.

    References:
        Lee and Seung 1999, doi 10.1038/44565.
    """

    example = "nmf(factors: 8)"
    copies = 1
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
        number = is_number(value) and 0 <= value < 1
        return None if number else ("`penalty` is from 0 to below 1", "write `penalty: 0.02`")

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        from mechdsl.fits.factors import draw_factors, factor_semi_nonnegative

        start = draw_factors(int(options["factors"]), vectors.shape[1], random)
        length = float(vectors.double().square().sum(1).mean().sqrt())
        penalty = float(options.get("penalty", SPARSITY)) * length
        return factor_semi_nonnegative(vectors, start, steps, penalty)


@trainer("ica")
class IndependentComponentsTrainer(SizedTrainer, SolvedTrainer):
    """Independent component analysis: directions whose coordinates are as independent as possible.

    References:
        Hyvärinen 1999, doi 10.1109/72.761722.
    """

    example = "ica(components: 8)"
    options = ("components",)
    required = ("components",)
    other_options: ClassVar[Mapping[str, str]] = dict.fromkeys(SIZES, "components")
    package = "scikit-learn"
    architecture = "linear"
    report = IndependenceReport

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        from mechdsl.fits.factors import separate_sources

        return separate_sources(vectors, int(options["components"]), steps, random)


@trainer("mixture")
class MixtureTrainer(SizedTrainer, SolvedTrainer):
    """A mixture of Gaussians, whose features are the probabilities of its components.

    References:
        Dempster, Laird and Rubin 1977, doi 10.1111/j.2517-6161.1977.tb01600.x.
    """

    example = "mixture(components: 8)"
    options = ("components", "covariance")
    required = ("components",)
    other_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SIZES, "components"),
        "covariance_type": "covariance",
    }
    package = "scikit-learn"
    architecture = "mixture"
    report = MixtureReport
    takes_any_size = True

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name != "covariance":
            return super().check_option(name, value)
        if value in COVARIANCES:
            return None
        listed = name_list([f'"{each}"' for each in COVARIANCES])
        return "`mixture` has no such covariance", f"write one of {listed}"

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        covariance = str(options.get("covariance", COVARIANCE))
        return replace(super().outline(options), covariance=covariance)

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        from mechdsl.fits.factors import fit_mixture

        covariance = str(options.get("covariance", COVARIANCE))
        return fit_mixture(vectors, int(options["components"]), covariance, steps, random)


class CorrelationTrainer(SizedTrainer, PairedTrainer):
    """Directions whose coordinates correlate with those of other vectors of the same tokens."""

    required = ("components",)
    architecture = "linear"
    strength: ClassVar[str]
    """The option that keeps the training from learning chance correlations."""

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name != self.strength:
            return super().check_option(name, value)
        number = is_number(value) and 0 <= value < 1
        return None if number else (f"`{name}` is from 0 to below 1", f"write `{name}: 0.1`")


@trainer("cca")
class CanonicalCorrelationTrainer(CorrelationTrainer):
    """Canonical correlation analysis, with a ridge.

    References:
        Hotelling 1936, doi 10.1093/biomet/28.3-4.321.
    """

    example = "cca(components: 8)"
    options = ("components", "ridge")
    other_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SIZES, "components"),
        **dict.fromkeys(("penalty", "regularization", "reg", "c", "alpha"), "ridge"),
    }
    defaults: ClassVar[Mapping[str, Constant]] = {"steps": 1}
    strength = "ridge"

    def solve(
        self,
        own: Tensor,
        other: Tensor,
        options: Mapping[str, Constant],
        steps: int,
        random: Generator,
    ) -> CorrelatedPair:
        from mechdsl.fits.correlations import correlate_sets

        ridge = float(options.get("ridge", RIDGE))
        return correlate_sets(own, other, int(options["components"]), ridge, steps, random)


@trainer("sparse_cca")
class SparseCorrelationTrainer(CorrelationTrainer):
    """Sparse canonical correlations, by a penalised matrix decomposition.

    References:
        Witten, Tibshirani and Hastie 2009, doi 10.1093/biostatistics/kxp008.
    """

    example = "sparse_cca(components: 8)"
    options = ("components", "penalty")
    other_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SIZES, "components"),
        **dict.fromkeys(("penaltyx", "sparsity", "l1", "c", "alpha", "ridge"), "penalty"),
    }
    strength = "penalty"

    def solve(
        self,
        own: Tensor,
        other: Tensor,
        options: Mapping[str, Constant],
        steps: int,
        random: Generator,
    ) -> CorrelatedPair:
        from mechdsl.fits.correlations import correlate_sparse

        penalty = float(options.get("penalty", SPARSE_PENALTY))
        return correlate_sparse(own, other, int(options["components"]), penalty, steps, random)
