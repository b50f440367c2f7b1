"""Trainers on activations: dictionaries, lenses, probes, factorizations and mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record
from mechdsl.base.text import name_list
from mechdsl.dictionaries.folder import COVARIANCES, Architecture
from mechdsl.fits.reports import CrossLayerReport, IndependenceReport, MixtureReport
from mechdsl.program.direction_methods import Problem, check_kind
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import (
    STEP_OPTIONS,
    DictionaryOutline,
    DictionaryTrainer,
    IterativeTrainer,
    LensTrainer,
    PairedTrainer,
    ProbeTrainer,
    SolvedTrainer,
    trainer,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

    from mechdsl.base.arrays import Floats, Ints
    from mechdsl.fits.correlations import CorrelatedPair
    from mechdsl.fits.factors import Solution
    from mechdsl.fits.lenses import LensMaps
    from mechdsl.fits.regression import LinearMap
    from mechdsl.fits.training import Trainable

OTHER_DICTIONARY_TRAINERS: dict[str, str] = {
    "topk": "write `sae(features: 512, k: 8)`",
    "batchtopk": 'write `sae(features: 512, k: 8, kind: "batch_topk")`',
    "batch_topk": 'write `sae(features: 512, k: 8, kind: "batch_topk")`',
    "matryoshka": 'write `sae(features: 512, k: 8, kind: "matryoshka")`',
    "matryoshka_batch_topk": 'write `sae(features: 512, k: 8, kind: "matryoshka")`',
    "jumprelu": 'write `sae(features: 512, penalty: 0.1, kind: "jump_relu")`',
    "gated": 'write `sae(features: 512, penalty: 0.1, kind: "gated")`',
    **dict.fromkeys(
        ("clt", "crosslayer_transcoder", "cross_layer", "crosscoder"),
        "write `cross_layer_transcoder(features: 512, k: 8)`",
    ),
}
"""What else may be written for a trainer of this module inside of `fit(…)` → hint."""


class _Kind(Record):
    """An architecture of trained dictionaries."""

    architecture: Architecture
    """Of its file."""
    sparsity: str
    """The option that determines how sparse features are."""


DICTIONARY_KINDS: Mapping[str, _Kind] = {
    "topk": _Kind("topk", "k"),
    "batch_topk": _Kind("jumprelu", "k"),
    "matryoshka": _Kind("jumprelu", "k"),
    "relu": _Kind("standard", "penalty"),
    "jump_relu": _Kind("jumprelu", "penalty"),
    "gated": _Kind("gated", "penalty"),
}
"""Architectures by the value of `kind`; their arithmetic is in `mechdsl.fits.sparse_training`."""

_SPARSITY_HINT: Mapping[str, str] = {
    "k": "write `k: 8`, the number of active features",
    "penalty": "write `penalty: 0.1`, the weight of the sparsity penalty",
}


@trainer("sae")
class SparseAutoencoderTrainer(IterativeTrainer):
    """A sparse autoencoder: top-k by default, or batch top-k, Matryoshka, ReLU, JumpReLU or
    gated."""

    example = "sae(features: 512, k: 8)"
    options = ("features", "k", "kind", "penalty")
    required = ("features",)
    transcodes: ClassVar[bool] = False
    crosses_layers: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = tuple(DICTIONARY_KINDS)
    default_kind: ClassVar[str] = "topk"

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "kind":
            return check_kind(self.name, value, self.kinds)
        if name == "skip":
            return None if isinstance(value, bool) else ("`skip` is true or false", "`skip: true`")
        if name == "penalty":
            positive = is_number(value) and value > 0
            return None if positive else ("`penalty` is a number above 0", "write `penalty: 0.1`")
        if is_integer(value, least=1):
            return None
        example = {"features": 512, "k": 8}[name]
        return f"`{name}` is a whole number from 1 on", f"write `{name}: {example}`"

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        kind = self._kind_of(options)
        needs = DICTIONARY_KINDS[kind].sparsity
        other = "penalty" if needs == "k" else "k"
        if needs not in options:
            return f"a `{kind}` dictionary needs `{needs}: …`", _SPARSITY_HINT[needs]
        if other in options:
            return (
                f"a `{kind}` dictionary has no `{other}`",
                f"leave it out; `{needs}` determines how sparse the features are",
            )
        if needs == "k" and int(options["k"]) > int(options["features"]):
            said = f"`k: {options['k']}` is more than `features: {options['features']}`"
            return said, "write a smaller `k`"
        return None

    def check_parts(self, options: Mapping[str, Constant]) -> Problem | None:
        kind = self._kind_of(options)
        if kind not in ("batch_topk", "matryoshka"):
            return None
        reason = f"`{kind}` compares the features of a whole batch, which `accumulate` divides"
        other = 'kind: "topk"' if "topk" in self.kinds else 'kind: "jump_relu"'
        return reason, f"write `{other}`, or a larger `batch` without `accumulate`"

    def _kind_of(self, options: Mapping[str, Constant]) -> str:
        return str(options.get("kind", self.default_kind))

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        kind = DICTIONARY_KINDS[self._kind_of(options)]
        return DictionaryOutline(
            kind.architecture,
            int(options["features"]),
            int(options["k"]) if kind.architecture == "topk" else None,
            transcodes=self.transcodes,
            skips=bool(options.get("skip", False)),
            crosses_layers=self.crosses_layers,
        )

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        from mechdsl.fits.sparse_training import SPARSE_KINDS, start_weights

        kind = SPARSE_KINDS[self._kind_of(options)]
        given: dict[str, Any] = dict(options)
        start = start_weights(
            widths,
            int(given["features"]),
            random,
            tied=not self.transcodes,
            skips=bool(given.get("skip", False)),
        )
        tensors = {name: tensor.to(device) for name, tensor in start.items()}
        return kind(tensors, given, subtracts_bias=not self.transcodes)


@trainer("transcoder")
class TranscoderTrainer(SparseAutoencoderTrainer):
    """A transcoder, which reconstructs the output of an MLP from its input; with `skip: true`, a
    linear map of the input is added to it."""

    example = "transcoder(features: 512, k: 8)"
    options = (*SparseAutoencoderTrainer.options, "skip")
    transcodes = True
    kinds = ("topk", "batch_topk", "matryoshka", "relu", "jump_relu")


@trainer("cross_layer_transcoder")
class CrossLayerTrainer(SparseAutoencoderTrainer):
    """A cross-layer transcoder: features of every layer, each of which reads the input of its
    layer's MLP and writes to the outputs of the MLPs of this layer and all later ones.

    References:
        Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html;
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders.
    """

    report = CrossLayerReport
    example = "cross_layer_transcoder(features: 512, k: 8)"
    transcodes = True
    crosses_layers = True
    kinds = ("batch_topk", "relu", "jump_relu")
    default_kind = "batch_topk"

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        return self.start_layers(widths, 1, options, random, device)

    def start_layers(
        self,
        widths: tuple[int, int],
        layers: int,
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        """Create the parameters of the features of several layers, as `start` does for one.

        Args:
            widths: Numbers of a vector of one layer that is encoded, and of one that is
                reconstructed.
        """
        from mechdsl.fits.sparse_training import CROSS_LAYER_KINDS, start_layers

        kind = CROSS_LAYER_KINDS[self._kind_of(options)]
        start = start_layers(widths, layers, int(options["features"]), random)
        tensors = {name: tensor.to(device) for name, tensor in start.items()}
        return kind(tensors, dict(options), subtracts_bias=False)


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
        number = is_number(value) and value > 0
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
