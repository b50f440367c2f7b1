"""Trainers on activations: dictionaries, tuned lenses and linear probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record
from mechdsl.dictionaries.folder import Architecture
from mechdsl.fits.reports import CrossLayerReport
from mechdsl.program.direction_methods import Problem, check_kind
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import (
    DictionaryOutline,
    IterativeTrainer,
    LensTrainer,
    ProbeTrainer,
    trainer,
)

if TYPE_CHECKING:
    from torch import Generator, device

    from mechdsl.base.arrays import Floats, Ints
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
