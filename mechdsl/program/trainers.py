"""Registry of trainers: what `fit(…)` can train, `fit(NAME(…), prompts: …)`.

A trainer is one class under `trainer`. A module outside the package adds a trainer with such a
class, when it is imported before a file is checked. The class says what the file may write, and
creates the parameters when training begins; rows, batches, checkpoints and the store are mechdsl's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from mechdsl.base.limits import INSERTED
from mechdsl.base.records import Registry
from mechdsl.base.text import Percent, name_list
from mechdsl.dictionaries.folder import Architecture
from mechdsl.program.direction_methods import Problem, call_class_problem
from mechdsl.program.spec import Constant
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

    from mechdsl.fits.factors import Solution
    from mechdsl.fits.gates import Gates
    from mechdsl.fits.lenses import LensMaps
    from mechdsl.fits.rotations import Rotation
    from mechdsl.fits.scales import ChannelScales
    from mechdsl.fits.training import Trainable
    from mechdsl.fits.vectors import SoftPrompt, SteeringVector, TrainedVectors


Statement = Literal["basis", "direction", "group", "lens"]
"""First words of statements with `fit(…)`."""


@dataclass(frozen=True)
class DictionaryOutline:
    """What is known of a dictionary before it is trained."""

    architecture: Architecture
    """Of its file, once it is trained."""
    features: int
    k: int | None = None
    transcodes: bool = False


class Trainer:
    """Something that `fit` can train.

    A dictionary is trained on vectors of a site, one by one. A rotation is an orthonormal basis of
    a subspace of a site, trained on rows: on the effect of patching the subspace from another run.
    A vector is trained on the effect of adding it at a site, and scales on the effect of
    multiplying the vectors of a site by them. A mask chooses sites, and is trained on the effect of
    patching or ablating them. A lens has an affine map for each layer, and is trained on vectors,
    one by one, to predict the distribution over next tokens.
    """

    name: ClassVar[str]
    makes: ClassVar[Literal["dictionary", "rotation", "vector", "scales", "mask", "lens"]] = (
        "dictionary"
    )
    example: ClassVar[str]
    """A call inside of `fit(…)`, as messages show it."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments that are written `NAME: VALUE`, with a constant each."""
    required: ClassVar[tuple[str, ...]] = ()
    """Options that a call must have."""
    other_options: ClassVar[Mapping[str, str]] = {}
    """Names of an option in other tools → the option."""
    defaults: ClassVar[Mapping[str, Constant]] = {}
    """Defaults of options of `fit` that differ from those in `TRAINING_DEFAULTS`."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options of `fit` that the training doesn't use, so that they are errors."""
    package: ClassVar[str] = ""
    """Name of a package that the training needs and mechdsl doesn't install by itself, which is a
    part of `mechdsl[fits]`."""
    measured: ClassVar[Literal["features", "independence"]] = "features"
    """What the table of a dictionary says: how well its features reconstruct vectors, or how
    independent they are."""
    any_run: ClassVar[bool] = False
    """Whether it can be trained on other runs than the clean one, and reads no run `from`."""
    learns_size: ClassVar[bool] = False
    """Whether the training determines the number of directions of a rotation."""

    @property
    def declares(self) -> Statement:
        """First word of the statement that declares what it makes."""
        found: Mapping[str, Statement] = {
            "mask": "group",
            "vector": "direction",
            "scales": "direction",
            "lens": "lens",
        }
        return found.get(self.makes, "basis")

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        """Return the problem with an option's value, or None.

        Args:
            name: One of `options`.
            value: None if the file has no constant there.
        """
        return None

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        """Return the problem with the options together, or None; each is valid by itself."""
        return None

    def check_site(self, site: str, width: int, options: Mapping[str, Constant]) -> Problem | None:
        """Return the problem with the vectors of a site, or None.

        Args:
            width: Numbers of a vector.
        """
        return None

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        """Return what is known of a dictionary before training."""
        raise NotImplementedError

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        """Return the number of directions of a rotation, the largest one if it is learned; or the
        number of sites that a mask chooses.

        Args:
            width: Numbers of a vector; of a mask, sites that it chooses from.
        """
        raise NotImplementedError

    def count_tokens(self, options: Mapping[str, Constant]) -> int | None:
        """Return the number of vectors, one for each token of a position; None for one vector at
        all of its tokens."""
        return None

    def start_rotation(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> Rotation:
        """Create the parameters of a rotation.

        Args:
            like: [vector, width] vectors that the rotation acts on, whose device and dtype the
                parameters need.
            random: Source of all random numbers of the start, on the CPU.
        """
        raise NotImplementedError

    def start_vector(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> TrainedVectors:
        """Create the parameters of a vector, with arguments as those of `start_rotation`."""
        raise NotImplementedError

    def start_scales(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> ChannelScales:
        """Create the parameters of scales, with arguments as those of `start_rotation`."""
        raise NotImplementedError

    def start_lens(
        self, width: int, layers: Sequence[int], options: Mapping[str, Constant], device: device
    ) -> LensMaps:
        """Create the parameters of a lens.

        Args:
            width: Numbers of a vector of the residual stream.
            layers: Layers that have a map.
            device: Where the parameters are needed.
        """
        raise NotImplementedError

    def start_mask(self, count: int, options: Mapping[str, Constant], seed: int) -> Gates:
        """Create the parameters of a mask.

        Args:
            count: Number of sites that it chooses from.
            seed: Determines the random numbers of every step.
        """
        raise NotImplementedError

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        """Create the parameters of a dictionary.

        Args:
            widths: Numbers of a vector that is encoded, and of one that is reconstructed.
            random: Source of all random numbers of the start, on the CPU.
            device: Where the parameters are needed.
        """
        raise NotImplementedError

    def solve(
        self, vectors: Tensor, options: Mapping[str, Constant], steps: int, random: Generator
    ) -> Solution:
        """Compute a dictionary from all vectors together, instead of `start` and its steps.

        Args:
            vectors: [vector, width], neither centred nor scaled.
            steps: Maximum number of iterations; 0 for a random start, the control.
            random: Source of all random numbers, on the CPU.

        Raises:
            NotFactored: These vectors have no such dictionary.
        """
        raise NotImplementedError

    @property
    def solves(self) -> bool:
        """Whether it has `solve` instead of `start`."""
        return type(self).solve is not Trainer.solve


TRAINERS: Registry[Trainer] = Registry("trainer")


def trainer_call(call: ast.Call) -> ast.Call:
    """Return `das(dims: 2)` of `fit(das(dims: 2), …)`; a name alone is a call without arguments.

    Args:
        call: A `fit` with one argument without a name.
    """
    (node,) = (each.value for each in call.arguments if each.name is None)
    if isinstance(node, ast.Call):
        return node
    return ast.Call(node.span.written, (), span=node.span)


TrainerT = TypeVar("TrainerT", bound=Trainer)


def trainer(name: str) -> Callable[[type[TrainerT]], type[TrainerT]]:
    """Register a subclass of `Trainer` as `fit(NAME(…), …)`.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return TRAINERS.class_decorator(name, _class_problem)


def _class_problem(name: str, entry: object) -> str | None:
    """Return the reason that a class can't be registered."""
    tuples = {"options": "features", "required": "features"}
    wrong = call_class_problem(
        name, entry, Trainer, arguments="features: 512", tuples=tuples, bare=True
    )
    if wrong is not None:
        return wrong
    assert isinstance(entry, type)
    assert issubclass(entry, Trainer)
    if entry.makes == "rotation":
        lacks = entry.size is Trainer.size or entry.start_rotation is Trainer.start_rotation
        needs = "`size(self, options, width)` and `start_rotation(self, like, options, random)`"
    elif entry.makes == "vector":
        lacks = entry.start_vector is Trainer.start_vector
        needs = "`start_vector(self, like, options, random)`"
    elif entry.makes == "scales":
        lacks = entry.start_scales is Trainer.start_scales
        needs = "`start_scales(self, like, options, random)`"
    elif entry.makes == "mask":
        lacks = entry.size is Trainer.size or entry.start_mask is Trainer.start_mask
        needs = "`size(self, options, width)` and `start_mask(self, count, options, seed)`"
    elif entry.makes == "lens":
        lacks = entry.start_lens is Trainer.start_lens
        needs = "`start_lens(self, width, layers, options, device)`"
    else:
        starts = entry.start is not Trainer.start or entry.solve is not Trainer.solve
        lacks = entry.outline is Trainer.outline or not starts
        needs = "`outline(self, options)` and `start(self, widths, options, random, device)`"
    return f"it needs {needs}" if lacks else None


@dataclass(frozen=True)
class _Kind:
    """An architecture of trained dictionaries."""

    architecture: Architecture
    """Of its file."""
    sparsity: str
    """The option that determines how sparse features are."""


KINDS: Mapping[str, _Kind] = {
    "topk": _Kind("topk", "k"),
    "batch_topk": _Kind("jumprelu", "k"),
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
class SparseAutoencoderTrainer(Trainer):
    """A sparse autoencoder: top-k by default, or batch top-k, ReLU, JumpReLU or gated."""

    example = "sae(features: 512, k: 8)"
    options = ("features", "k", "kind", "penalty")
    required = ("features",)
    transcodes: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "kind":
            if value in self.kinds:
                return None
            listed = name_list([f'"{each}"' for each in self.kinds])
            return f"`{self.name}` has no such kind", f"write one of {listed}"
        if name == "penalty":
            positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            return None if positive else ("`penalty` is a number above 0", "write `penalty: 0.1`")
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return None
        example = {"features": 512, "k": 8}[name]
        return f"`{name}` is a whole number from 1 on", f"write `{name}: {example}`"

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        kind = str(options.get("kind", "topk"))
        needs = KINDS[kind].sparsity
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

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        kind = KINDS[str(options.get("kind", "topk"))]
        k = int(options["k"]) if kind.architecture == "topk" else None
        return DictionaryOutline(
            kind.architecture, int(options["features"]), k, transcodes=self.transcodes
        )

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> Trainable:
        from mechdsl.fits.sparse_training import SPARSE_KINDS, start_weights

        kind = SPARSE_KINDS[str(options.get("kind", "topk"))]
        given: dict[str, Any] = dict(options)
        start = start_weights(widths, int(given["features"]), random, tied=not self.transcodes)
        tensors = {name: tensor.to(device) for name, tensor in start.items()}
        return kind(tensors, given, subtracts_bias=not self.transcodes)


@trainer("transcoder")
class TranscoderTrainer(SparseAutoencoderTrainer):
    """A transcoder, which reconstructs the output of an MLP from its input."""

    example = "transcoder(features: 512, k: 8)"
    transcodes = True
    kinds = ("topk", "batch_topk", "relu", "jump_relu")


EFFECT_DEFAULTS: Mapping[str, Constant] = {
    "steps": 500,
    "batch": 32,
    "rate": 0.01,
    "validation": Percent(20),
}
"""Defaults of options of `fit` with a trainer that is trained on a measure."""

BOUNDARY_PENALTY = 1.0
"""Default of `penalty` of `boundless_das`, as in the paper."""


class RotationTrainer(Trainer):
    """Directions of a subspace whose exchange has the effect of another run."""

    makes = "rotation"
    defaults = EFFECT_DEFAULTS

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return None
        return f"`{name}` is a whole number from 1 on", f"write `{name}: 2`"

    def draw(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> Tensor:
        """Return [dims, width] random rows, from which a training starts."""
        from mechdsl.fits.rotations import draw_rows

        width = like.shape[1]
        return draw_rows(self.size(options, width), width, random, like.device, like.dtype)


@trainer("das")
class AlignmentSearchTrainer(RotationTrainer):
    """Distributed alignment search: a subspace of a given size.

    References:
        Geiger et al. 2023, arXiv 2303.02536.
    """

    example = "das(dims: 2)"
    options = ("dims",)
    required = ("dims",)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options["dims"])

    def start_rotation(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> Rotation:
        from mechdsl.fits.rotations import Rotation

        return Rotation(self.draw(like, options, random))


@trainer("boundless_das")
class BoundlessSearchTrainer(RotationTrainer):
    """Boundless distributed alignment search: a subspace whose size is learned, too.

    References:
        Wu et al. 2023, arXiv 2305.08809.
    """

    example = "boundless_das(penalty: 1)"
    options = ("penalty", "dims")
    learns_size = True

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "dims":
            return super().check_option(name, value)
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        hint = "write `penalty: 1`; the loss grows by 1 if the subspace is the whole space"
        return None if number else ("`penalty` is a number from 0 on", hint)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options.get("dims", width))

    def start_rotation(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> Rotation:
        from mechdsl.fits.rotations import BoundlessRotation

        penalty = float(options.get("penalty", BOUNDARY_PENALTY))
        return BoundlessRotation(self.draw(like, options, random), penalty)


@trainer("vector")
class SteeringVectorTrainer(Trainer):
    """A steering vector: added to the vectors of a site, it optimises a measure."""

    example = "vector(length: 8)"
    makes = "vector"
    options = ("length", "penalty")
    defaults = EFFECT_DEFAULTS

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
        if number > 0 or (number == 0 and name == "penalty"):
            return None
        if name == "length":
            return "`length` is a number above 0", "write `length: 8`"
        return "`penalty` is a number from 0 on", "write `penalty: 0.1`"

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        if {"length", "penalty"} <= {*options}:
            said = "`length` fixes the length, so that `penalty` has no effect"
            return said, "keep one of them"
        return None

    def start_vector(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> SteeringVector:
        from mechdsl.fits.vectors import SteeringVector

        length = float(options["length"]) if "length" in options else None
        penalty = float(options.get("penalty", 0))
        return SteeringVector(like, random, length=length, penalty=penalty)


@trainer("soft_prompt")
class SoftPromptTrainer(Trainer):
    """A soft prompt: vectors at the tokens of a position, one for each, instead of their own.

    References:
        Lester et al. 2021, arXiv 2104.08691.
    """

    example = "soft_prompt(tokens: 4)"
    makes = "vector"
    options = ("tokens",)
    required = ("tokens",)
    defaults = EFFECT_DEFAULTS
    any_run = True

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= INSERTED:
            return None
        return f"`tokens` is a whole number from 1 to {INSERTED:,}", "write `tokens: 4`"

    def count_tokens(self, options: Mapping[str, Constant]) -> int | None:
        return int(options["tokens"])

    def start_vector(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> SoftPrompt:
        from mechdsl.fits.vectors import SoftPrompt

        return SoftPrompt(like, int(options["tokens"]))


@trainer("scales")
class ChannelScaleTrainer(Trainer):
    """A scale for each channel: the vectors of a site times the scales optimise a measure.

    References:
        Park et al. 2025, arXiv 2509.25843.
    """

    example = "scales(penalty: 0.1)"
    makes = "scales"
    options = ("penalty",)
    defaults = EFFECT_DEFAULTS

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        return None if number else ("`penalty` is a number from 0 on", "write `penalty: 0.1`")

    def start_scales(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> ChannelScales:
        from mechdsl.fits.scales import ChannelScales

        return ChannelScales(like, penalty=float(options.get("penalty", 0)))


GATE_KINDS = ("hard_concrete", "straight_through")
"""Values of `kind` of a mask; their arithmetic is in `mechdsl.fits.gates`."""


@trainer("mask")
class MaskTrainer(Trainer):
    """A mask over sites: it chooses those that have the largest effect together.

    References:
        Louizos et al. 2018, arXiv 1712.01312 (hard concrete); Bengio et al. 2013, arXiv 1308.3432
        (straight-through).
    """

    example = "mask(size: 4)"
    makes = "mask"
    options = ("size", "kind", "keep")
    required = ("size",)
    defaults: ClassVar[Mapping[str, Constant]] = {
        **EFFECT_DEFAULTS,
        "steps": 300,
        "rate": 0.1,
    }

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "kind":
            if value in GATE_KINDS:
                return None
            listed = name_list([f'"{each}"' for each in GATE_KINDS])
            return "`mask` has no such kind", f"write one of {listed}"
        if name == "keep":
            fine = isinstance(value, bool)
            return None if fine else ("`keep` is `true` or `false`", "write `keep: true`")
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return None
        return "`size` is a whole number from 1 on", "write `size: 4`"

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options["size"])

    def start_mask(self, count: int, options: Mapping[str, Constant], seed: int) -> Gates:
        from mechdsl.fits.gates import GATES

        kind = str(options.get("kind", GATE_KINDS[0]))
        return GATES[kind](count, self.size(options, count), seed)


@trainer("tuned_lens")
class TunedLensTrainer(Trainer):
    """A tuned lens: an affine map for each layer, which starts as the logit lens.

    References:
        Belrose et al. 2023, arXiv 2303.08112.
    """

    example = "tuned_lens"
    makes = "lens"
    defaults: ClassVar[Mapping[str, Constant]] = {"steps": 1000, "batch": 128}

    def start_lens(
        self, width: int, layers: Sequence[int], options: Mapping[str, Constant], device: device
    ) -> LensMaps:
        from mechdsl.fits.lenses import LensMaps

        return LensMaps(width, layers, device)
