"""Registry of estimators: the words after `using`, which replace running the cells.

An estimator is one class under `estimator`. It computes a cell's value from the gradient of the
metric at the vectors that the cell's rule names. A module outside the package adds an estimator
with such a class, when it is imported before a file is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from mechdsl.base.records import Registry, attribute_problem
from mechdsl.syntax.words import name_problem

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.base.arrays import Floats

Place = Literal["sites", "attention", "paths"]
"""What a cell's rule names: vectors of a site (`patch`, `ablate`), attention weights (`block`), or
edges between components (`path`)."""


@dataclass(frozen=True)
class BackwardRules:
    """Changes of derivatives in a backward pass; the forward pass stays as it is."""

    fixed_norms: bool = False
    """The size that a norm divides by is a constant."""
    identity_activations: bool = False
    """An activation function f(x) is x times the constant f(x) / x."""
    halved_products: bool = False
    """Each factor of a product of two activations, outside of attention, has half its gradient."""
    softmax_temperature: float | None = None
    """Gradients of attention's softmax are those of a softmax of scores / temperature."""
    attention_factors: tuple[float, float, float] | None = None
    """Factors of gradients that enter queries, keys and values."""
    constant_patterns: bool = False
    """The weights of attention are constants."""
    decomposed: bool = False
    """Lanes are in groups of equal size. The first is the base run. Each other group has irrelevant
    parts of contextual decomposition, which depend on the first. Derivatives don't change."""
    parts: int = 1
    """Number of groups with irrelevant parts."""
    dropped_layer: int | None = None
    """Layer whose outputs of attention and MLP are constants."""
    dropped_stack: str = ""
    """Its stack: `vision` for the vision encoder of prompts with images, `encoder` for that of an
    encoder-decoder."""

    @property
    def of_functions(self) -> bool:
        """Whether functions of the model have other derivatives."""
        layer, stack = self.dropped_layer, self.dropped_stack
        return self != BackwardRules(dropped_layer=layer, dropped_stack=stack)

    @property
    def in_attention(self) -> bool:
        """Whether they act inside of attention."""
        rules = self.softmax_temperature, self.attention_factors
        return self.constant_patterns or self.decomposed or any(rule is not None for rule in rules)


class GradientEstimator:
    """A way to compute the values of cells from gradients."""

    name: ClassVar[str]
    example: ClassVar[str]
    """A line, as documentation shows it."""
    documentation: ClassVar[str]
    """Description for the language reference."""
    source: ClassVar[str] = ""
    """The publication."""
    convention: ClassVar[str]
    """Description below results; `{steps}` is the number of steps, `{NAME}` an option, and
    `{change}` what the gradient is multiplied by, for estimators of sites that take paths."""
    place: ClassVar[Place] = "sites"
    takes_paths: ClassVar[bool] = False
    """Whether it also estimates `path`, with its `backward` along the edges."""
    options: ClassVar[Mapping[str, int | float]] = {}
    """Arguments `NAME: NUMBER` → default value; if that is an int, only whole numbers are valid."""
    steps: ClassVar[int | None] = None
    """If set, gradients are taken at this number of points, and averaged. The argument `steps`
    changes the number. Estimators of sites take the midpoints of steps on the line from the base
    run's vectors to the written ones, unless `moves` is set. Others, and estimators of paths, take
    points k/m of the line on which activations move from the source run to the base run,
    k = 1 … m.
    """
    moves: ClassVar[Literal["", "inputs", "senders"]] = ""
    """What moves between runs with `steps`: the stream that enters block 0 of each stack at all
    tokens, or the senders of a path, with all heads or neurons of their layer, at all tokens; with
    a rule in a vision encoder, at all patches, and at tokens that aren't of images. Empty for the
    written vectors of sites, and for `inputs` of paths."""
    value_name: ClassVar[str] = ""
    """Column name of values that aren't effects of the rule; empty for estimates of effects."""
    value_said: ClassVar[str] = ""
    """The same in a sentence, such as `the size of the gradient`."""
    formula: ClassVar[str] = ""
    """Formula of values that aren't effects."""
    reads_written: ClassVar[bool] = True
    """Whether the value depends on what the rule writes."""
    keeps_unit: ClassVar[bool] = True
    """Whether the value has the metric's unit."""
    backward: ClassVar[BackwardRules | None] = None
    """Changes of the derivatives that gradients are computed with."""
    fixes_attention: ClassVar[bool] = False
    """Whether queries and keys are replaced by the attention weights that they determine: `values`
    is then given the weights of one query, [query, key], instead of the vectors of `q` and `k`. For
    paths, these are queries and keys that receive."""
    drops_layers: ClassVar[bool] = False
    """Whether the value is the mean of absolute values, each with the gradient of one layer left
    out, over the layers that don't contain the site, or not all receivers of a path."""
    adds_noise: ClassVar[bool] = False
    """Whether gradients are the mean over copies of the base run with noise at all vectors of a
    site. Needs the options `samples`, the number of copies, and `noise`, the standard deviation
    as a share of the range of the row's values at the site."""
    over_vectors: ClassVar[Literal["sum", "mean"]] = "sum"
    """How the values of a cell's vectors in one layer are combined."""

    def check_option(self, name: str, value: float) -> str | None:
        """Return what an option's value must be, as in `must be at least 1`, or None."""
        return None

    def values(
        self, written: Tensor, base: Tensor, gradient: Tensor, options: Mapping[str, int | float]
    ) -> Tensor:
        """Compute one number per vector.

        Args:
            written: [vector, width] float64, what the rule writes; for attention, 1 at the keys
                that the rule names, and 0 elsewhere; for paths, the senders' values.
            base: [vector, width] float64, the base run's vectors.
            gradient: [vector, width] float64, of the metric by `base`; for paths, along the edges
                of a cell.
            options: The values of `options`.

        Returns:
            [vector] float64.
        """
        raise NotImplementedError

    def finish(self, combined: Floats) -> Floats:
        """Compute values from the combined numbers of the vectors. [measure, row], both."""
        return combined

    @property
    def decomposes(self) -> bool:
        """Whether it is contextual decomposition, which has a pass with all writes of each cell."""
        return self.backward is not None and self.backward.decomposed

    @property
    def is_effect(self) -> bool:
        """Whether the value estimates an effect of the rule."""
        return not self.value_name

    @property
    def call(self) -> str:
        """The estimator with all arguments at their defaults, as messages show it."""
        return call_text(self.name, self.steps, self.options)


ESTIMATORS: Registry[GradientEstimator] = Registry("estimator")

ESTIMATOR_ALIASES = {"atp": "gradient_input"}
"""Other words after `using` for estimators."""

EstimatorT = TypeVar("EstimatorT", bound=GradientEstimator)


def call_text(name: str, steps: int | None, options: Mapping[str, int | float]) -> str:
    """Return the source text of an estimator with its arguments."""
    given = {} if steps is None else {"steps": steps}
    arguments = ", ".join(f"{key}: {value}" for key, value in {**given, **options}.items())
    return f"{name}({arguments})" if arguments else name


def estimator(name: str) -> Callable[[type[EstimatorT]], type[EstimatorT]]:
    """Register a subclass of `GradientEstimator` as the word `name` after `using`.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return ESTIMATORS.class_decorator(name, _class_problem)


def _class_problem(name: str, entry: type[GradientEstimator]) -> str | None:
    """Return the reason that a class can't be registered."""
    texts = ("example", "documentation", "convention")
    wrong = name_problem(name) or attribute_problem(entry, texts=texts)
    if wrong is not None:
        return wrong
    if "steps" in entry.options:
        return "`options` must not contain `steps`: set the attribute `steps`"
    if entry.value_name and not (entry.formula and entry.value_said):
        return "values that aren't effects need the texts `formula` and `value_said`"
    on_line = entry.steps is not None and entry.place != "paths" and not entry.moves
    moved = entry.steps is not None and (entry.fixes_attention or entry.drops_layers)
    of_paths = entry.place == "paths" or entry.takes_paths
    if of_paths and (on_line or moved or entry.adds_noise):
        return (
            "estimators of paths have no `adds_noise`, and no `steps` with `fixes_attention` or "
            "`drops_layers`; if they also estimate sites, no `steps` without `moves`"
        )
    if entry.values is GradientEstimator.values:
        return "it has no `values(self, written, base, gradient, options)`"
    return None


def find_estimator(text: str) -> GradientEstimator | None:
    """Return the estimator of a text such as `integrated_gradients(steps: 32)`.

    None for an empty text, and for stored results of a plugin that isn't loaded.
    """
    return ESTIMATORS.get(text.partition("(")[0])


def first_of_place(place: Place) -> GradientEstimator:
    """Return the first registered estimator for rules of a kind."""
    return next(
        gradient_estimator
        for _, gradient_estimator in ESTIMATORS.items()
        if gradient_estimator.place == place
    )


# --- the estimators of the language ---------------------------------------------------------------


@estimator("gradient")
class Gradient(GradientEstimator):
    """The length of the gradient.

    The value of a cell is ‖∇m(x)‖ over all of its vectors x in the base run (Simonyan et al. 2014,
    section 3).
    """

    example = "using gradient"
    documentation = (
        "Computes, without running the cells, the L2 norm of the metric's gradient with "
        "respect to all vectors of a cell, in the base run. It measures the sensitivity of the "
        "metric, not the effect of the rule, so it needs `as raw` and has no p. A cell is one "
        "site of one layer, or its queries, keys and values, with joined positions and heads if "
        "any; the rule is `patch` or `ablate`. One forward pass, and one backward pass per "
        "measure, serve all cells. Metrics without a gradient (`rank`, `correct`, replies, Python "
        "functions) are rejected (E0608)."
    )
    source = "Simonyan et al. 2014, arXiv 1312.6034"
    convention = (
        "no effect: how fast the metric changes with what is there, the length of its gradient "
        "at all vectors of a cell together (Simonyan et al. 2014, arXiv 1312.6034, saliency)"
    )
    value_name = "gradient"
    value_said = "the size of the gradient"
    formula = "the length (L2) of ∂m/∂site in the base run"
    reads_written = False
    keeps_unit = False

    def values(
        self, written: Tensor, base: Tensor, gradient: Tensor, options: Mapping[str, int | float]
    ) -> Tensor:
        return gradient.square().sum(-1)

    def finish(self, combined: Floats) -> Floats:
        return combined**0.5


@estimator("smoothgrad")
class SmoothGrad(Gradient):
    """The length of the mean gradient over noisy copies of the base run.

    The value of a cell is ‖1/n Σ ∇m(x + ε)‖ with ε ~ N(0, σ²) (Smilkov et al. 2017, section 3.2).
    """

    example = "using smoothgrad(samples: 20)"
    documentation = (
        "Computes, without running the cells, the L2 norm of the metric's mean gradient over "
        "copies of the base run with noise (20 by default). Gaussian noise is added to the vectors "
        "of all tokens at the site. Its standard deviation is `noise`, 0.15 by default, times the "
        "difference of the largest and the smallest number of the row there. The noise depends on "
        "the seed and on the content of the row. At `embed at each token`, this is a saliency map "
        "of tokens or patches. Like `gradient`, it isn't an effect: it needs `as raw` and has no "
        "p. Each copy, site and layer needs one forward and one backward pass."
    )
    source = "Smilkov et al. 2017, arXiv 1706.03825"
    convention = (
        "no effect: the length of the mean gradient at all vectors of a cell together, over "
        "{samples} copies of the base run, with Gaussian noise at all tokens of the site, of "
        "{noise} times the range of the row's values there (Smilkov et al. 2017, arXiv "
        "1706.03825, SmoothGrad)"
    )
    value_name = "smooth gradient"
    value_said = "the size of a mean gradient"
    formula = "the length (L2) of the mean of ∂m/∂site over noisy copies of the base run"
    options: ClassVar[Mapping[str, int | float]] = {"samples": 20, "noise": 0.15}
    adds_noise = True

    def check_option(self, name: str, value: float) -> str | None:
        if name == "samples":
            return None if 1 <= value <= 10_000 else "must be a number of copies, 1 to 10,000"
        return None if 0 < value < 100 else "must be above 0"


class _GradientTimesChange(GradientEstimator):
    """The gradient times what is written less what is there."""

    def values(
        self, written: Tensor, base: Tensor, gradient: Tensor, options: Mapping[str, int | float]
    ) -> Tensor:
        return ((written - base) * gradient).sum(-1)


@estimator("gradient_input")
class GradientInput(_GradientTimesChange):
    """The first-order estimate of an effect.

    The value of a cell is Σ (x' − x) · ∇m(x), over the vectors x of the base run and the written
    vectors x' (Shrikumar et al. 2016: gradient × input; Nanda 2023: attribution patching).
    """

    example = "using gradient_input"
    documentation = (
        "Estimates the effect of each cell to first order, without running the cells. The "
        "estimate is the difference between written and base value, times the gradient of the "
        "metric in the base run. It is summed over the vectors of a cell. `delta`, `recovery` "
        "and `relative` are labelled as estimates. With `ablate … with zero`, it is minus "
        "gradient × input; with `patch`, it is attribution patching. The base run determines "
        "where the gradient is taken. On images, `patch embed at each token of image` with "
        "`from neutral into scenes` is minus gradient × (input − neutral) at the image. With "
        "`from scenes into neutral`, it is gradient × (input − neutral) at the neutral image. "
        "For rules in a basis, the written value is the vector with the changed coordinates."
    )
    source = "Shrikumar et al. 2016, arXiv 1605.01713; Nanda 2023, Attribution patching"
    convention = (
        "estimates, no cell was run: to first order, what is written less what is there, times "
        "the gradient of the metric, summed over all vectors of a cell (Shrikumar et al. 2016, "
        "arXiv 1605.01713, gradient × input; Nanda 2023, attribution patching)"
    )


@estimator("gradient_attention")
class GradientAttention(GradientEstimator):
    """The positive part of gradient times attention weight, at the keys that the rule names.

    The value of a cell is Σ max(A · ∂m/∂A, 0) over keys and layers, with the mean over heads and
    queries, of the attention weights A in the base run (Chefer et al. 2021, equation 5).
    """

    example = (
        "block attention layer * heads * from last token to each item token using "
        "gradient_attention"
    )
    documentation = (
        "Computes attention weight × gradient of the metric in the base run, without running "
        "the cells or blocking an edge. Negative products count as 0. The value of a cell is "
        "the mean over heads and queries, summed over keys and layers. It is not an effect, so "
        "it needs `as raw` and has no p. On images, `from cls token to each token of image` "
        "gives one map per layer. One forward pass, and one backward pass per measure, serve "
        "all cells."
    )
    source = "Chefer et al. 2021, arXiv 2103.15679, equation 5"
    convention = (
        "no effect: each weight of attention times the gradient of the metric by it, 0 where "
        "that is negative, averaged over heads and queries, added up over keys and layers "
        "(Chefer et al. 2021, arXiv 2103.15679, equation 5, of each layer by itself)"
    )
    place = "attention"
    value_name = "gradient × attention"
    value_said = "gradient × attention"
    formula = (
        "Σ max(A · ∂m/∂A, 0) over keys and layers, the mean over heads and queries, of the "
        "attention A in the base run"
    )
    reads_written = False
    over_vectors = "mean"

    def values(
        self, written: Tensor, base: Tensor, gradient: Tensor, options: Mapping[str, int | float]
    ) -> Tensor:
        return (written * (base * gradient).clamp(min=0)).sum(-1)


@estimator("eap")
class EdgeAttributionPatching(_GradientTimesChange):
    """Edge attribution patching, the first-order estimate of a path's effect.

    The value of a cell is Σ (u' − u) · ∂m/∂u along the edges from its senders u to its receivers
    (Syed et al. 2023). The derivative of a receiver's input by u is that of the pass in which all
    other heads and MLPs are held. The derivative of the metric by the input is that of the base
    run.
    """

    example = "path L0H1 -> logits at last token using eap"
    documentation = (
        "Estimates the effect of each cell of a `path` to first order, without running the cells. "
        "The estimate is the difference between the sender's source and base value, times the "
        "derivative of the receiver's input by it with all else held, times the gradient of the "
        "metric by this input in the base run. `through mlps` and `with frozen norms` apply to the "
        "derivative. Senders of a cell may be heads and MLPs of several layers, or one site of the "
        "stream. Its receivers are heads' inputs or one site of one layer, with or without the end "
        "of the model (E0608). For features of a dictionary, the derivative is that of their "
        "activations, and the gradient of the metric that by their activations in the base run. "
        "One forward pass, one backward pass per measure, two forward passes "
        "with all else held, and a short backward pass per receiver serve all cells."
    )
    source = "Syed et al. 2023, arXiv 2310.10348"
    convention = (
        "estimates, no cell was run: to first order, the change of the senders, times the "
        "derivative of the receivers' inputs while all else is held, times the gradient of the "
        "metric by these inputs (Syed et al. 2023, arXiv 2310.10348, edge attribution patching)"
    )
    place = "paths"
    takes_paths = True


@estimator("eap_ig")
class IntegratedEdgeAttributionPatching(_GradientTimesChange):
    """Attribution patching with integrated gradients over the model's input.

    As `gradient_input`, or `eap` for a path, but the derivative of the metric by a site or by a
    receiver's input is the mean over k = 1 … m of that in the base run with x' + k/m (x − x') as
    the stream that enters block 0, where x is the stream of the base run and x' that of the source
    run (Hanna et al. 2024, equation 4). In an encoder-decoder, x is the stream of both stacks.
    """

    example = "using eap_ig"
    documentation = (
        "Estimates the effect of each cell of a `path` like `eap`, and of a `patch` like "
        "`gradient_input`, with the mean gradient of the metric at `steps` points (5 by default). "
        "At point k, the stream that enters block 0 is "
        "x' + k/steps (x − x') at all tokens, where x is that of the base run and x' that of the "
        "source run: the last point is the base run. In an encoder-decoder, this is the stream of "
        "both stacks. Both prompts of a row must have the same "
        "number of tokens (E0608). The derivative along the edge is that of the base run. Not for "
        "`ablate`, whose fills are no second prompt, and not "
        "with frozen norms at the end of the model, where `eap` equals the effect (E0608). Each "
        "point needs a forward pass, and a backward pass per measure."
    )
    source = "Hanna et al. 2024, arXiv 2403.17806"
    convention = (
        "estimates, no cell was run: {change}, times the mean gradient of the metric{by} at "
        "{steps} points (Hanna et al. 2024, arXiv 2403.17806, EAP-IG inputs)"
    )
    takes_paths = True
    steps = 5
    moves = "inputs"


@estimator("eap_ig_activations")
class IntegratedSenderAttributionPatching(EdgeAttributionPatching):
    """Edge attribution patching with integrated gradients over activations.

    As `eap`, but the derivative of the metric by a receiver's input is the mean over k = 1 … m of
    that in the base run with u' + k/m (u − u') at the sender's site and layer, with all of its
    heads or neurons, at all tokens. u is the value of the base run and u' that of the source run.
    """

    example = "path L0H1 -> logits at last token using eap_ig_activations"
    documentation = (
        "Estimates the effect of each cell of a `path` like `eap_ig`, but the sender moves from "
        "the source run to the base run instead of the stream that enters block 0: at point k of "
        "`steps` (5 by default), it is u' + k/steps (u − u') at all tokens. All heads or neurons "
        "of the sender's site and layer move together; senders of several layers move separately, "
        "and their estimates are added. Each site and layer of senders needs `steps` forward "
        "passes, and as many backward passes per measure. Errors are those of `eap_ig`."
    )
    source = "Mueller et al. 2025, arXiv 2504.13151"
    convention = (
        "estimates, no cell was run: the change of the senders, times the derivative of the "
        "receivers' inputs while all else is held, times the mean gradient of the metric by these "
        "inputs at {steps} points (Mueller et al. 2025, arXiv 2504.13151, EAP-IG activations)"
    )
    steps = 5
    moves = "senders"


@estimator("integrated_gradients")
class IntegratedGradients(_GradientTimesChange):
    """The estimate by the mean gradient on the line from the base value to the written value.

    The value of a cell is Σ (x' − x) · 1/n Σ ∇m(x + (k − ½)/n (x' − x)) over k = 1 … n, with all
    vectors that the cells of a site and layer write on the line together (Sundararajan et al.
    2017, equation 1, by the midpoint rule).
    """

    example = "using integrated_gradients(steps: 16)"
    documentation = (
        "Estimates the effect like `gradient_input`, but with a mean gradient. It averages "
        "over the midpoints of this number of steps (32 by default) on the straight line from "
        "the base value to the written value. All cells of one site and layer move together, "
        "so their estimates sum to their joint effect, up to the error of the steps. `onto`, "
        "`into layer`, overlapping positions, and cells that change the same feature of a basis "
        "are therefore rejected (E0608). Each step, site and layer needs one forward and one "
        "backward pass."
    )
    source = "Sundararajan et al. 2017, arXiv 1703.01365"
    convention = (
        "estimates, no cell was run: what is written less what is there, times the mean gradient "
        "of the metric at {steps} midpoints of the line between, on which all cells of a site "
        "and layer move together, so that their estimates add up to the effect of all of them at "
        "once, but for the error of the steps (Sundararajan et al. 2017, arXiv 1703.01365)"
    )
    steps = 32


@estimator("relp")
class RelevancePatching(_GradientTimesChange):
    """The estimate with coefficients of relevance propagation instead of gradients.

    The value of a cell is Σ (written − base) · ρ, equation 4 of Jafari et al. 2025, where the
    coefficients ρ are those of the LN rule, the identity rule and the half rule (their table 1).
    Coefficients of linear maps and of attention are gradients.
    """

    example = "using relp"
    documentation = (
        "Estimates the effect like `gradient_input`, with coefficients of layer-wise relevance "
        "propagation instead of gradients. The size that a norm divides by is a constant (LN "
        "rule). An activation function f(x) is x times the constant f(x) / x (identity rule). Each "
        "factor of a product of two activations, as in a gated MLP, has half its gradient (half "
        "rule). Attention has its own gradients, as in the authors' code. For a `path`, these "
        "coefficients also apply along its edges, as in `eap`. Models with experts are rejected "
        "(E0608). One forward pass, and one backward pass per measure, serve all cells."
    )
    source = "Jafari et al. 2025, arXiv 2508.21258"
    convention = (
        "estimates, no cell was run: {change}, times coefficients of relevance propagation: "
        "norms divide by a constant (LN rule), activation functions are x times the constant "
        "f(x) / x (identity rule), factors of a product of activations have half their gradient "
        "(half rule), attention has its gradient (Jafari et al. 2025, arXiv 2508.21258)"
    )
    takes_paths = True
    backward = BackwardRules(fixed_norms=True, identity_activations=True, halved_products=True)


@estimator("gim")
class GradientInteractionModifications(_GradientTimesChange):
    """The estimate with gradients that allow for interactions.

    The value of a cell is Σ (written − base) · g, with the modified gradients g of Edin et al.
    2025, section 4, and the factors of the authors' package (`gim-explain`).
    """

    example = "using gim"
    documentation = (
        "Estimates the effect like `gradient_input`, with modified gradients. Gradients of "
        "attention's softmax are those at twice the temperature, so that saturated attention has "
        "gradients. The size that a norm divides by is a constant. Gradients are divided by the "
        "number of interacting factors: by 4 at queries and keys, by 2 at values and at both "
        "factors of a gated MLP. For a `path`, these also apply along its edges, as in `eap`. "
        "Models with experts, and models whose attention weights can't be written, are rejected "
        "(E0608). One forward pass, and one backward pass per measure, serve all cells."
    )
    source = "Edin et al. 2025, arXiv 2505.17630"
    convention = (
        "estimates, no cell was run: {change}, times modified gradients: attention's "
        "softmax at temperature 2, norms divide by a constant, gradients divided by 4 "
        "at queries and keys, by 2 at values and at factors of a product of activations (Edin et "
        "al. 2025, arXiv 2505.17630)"
    )
    takes_paths = True
    backward = BackwardRules(
        fixed_norms=True,
        halved_products=True,
        softmax_temperature=2.0,
        attention_factors=(0.25, 0.25, 0.5),
    )


@estimator("cdt")
class ContextualDecomposition(_GradientTimesChange):
    """Contextual decomposition for transformers (CD-T).

    Each activation x is the sum of a relevant part β and an irrelevant part γ (Hsu et al. 2024,
    section 3). At the cell's vectors, γ is the written value; before them, β is 0. The value of a
    cell is m(γ) − m(x) at the output. Rules of γ: Wγ + b|Wγ| / (|Wβ| + |Wγ|) for a linear map;
    f(γ) for an activation function; the product of the γ of both factors for a product (Murdoch et
    al. 2018); the variance of x for norms; the weights of attention and of routers of x. For a
    path, γ is the source value at the senders and x at all other heads and MLPs; what the receivers
    then read is γ at them, before which β is 0.
    """

    example = "using cdt"
    documentation = (
        "Estimates the effect by contextual decomposition (CD-T). Each activation is the sum of a "
        "relevant part, which starts as the difference between base and written value, and an "
        "irrelevant part, which starts as the written value. The estimate is the metric of the "
        "irrelevant part of the output, less the metric of the base run. Linear maps act on both "
        "parts and share their bias in proportion to the absolute values. The irrelevant part of "
        "an activation function is the function of the irrelevant part, and that of a product is "
        "the product of the irrelevant parts. Norms divide by the size of the whole vector, and "
        "attention has the weights of the base run. Each cell needs a row of two prompts in a "
        "forward pass, so this isn't cheaper than running the cell. A cell may write several "
        "layers, by several rules. For a `path`, the relevant part of all other heads and MLPs is "
        "0 up to the receiver, and each sender needs two further forward passes. Experts are "
        "selected and weighted as in the base run. Queries and "
        "keys are rejected, because their estimates would be 0, and so are experts with biases, "
        "image classifiers, vision encoders of prompts, and "
        "models whose blocks attend to an image (E0608)."
    )
    source = "Hsu et al. 2024, arXiv 2407.00886; Murdoch et al. 2018, arXiv 1801.05453"
    convention = (
        "estimates, no cell was run: the metric of the irrelevant part of the output less the "
        "metric of the base run, by contextual decomposition: biases are shared in proportion, "
        "activation functions and products are those of the irrelevant parts, norms divide by the "
        "size of the whole vector, attention weights are those of the base run (Hsu et al. 2024, "
        "arXiv 2407.00886, CD-T)"
    )
    takes_paths = True
    backward = BackwardRules(decomposed=True)


class _FixedAttention(_GradientTimesChange):
    """First-order estimates, for queries and keys by the attention weights that they determine."""

    takes_paths = True
    fixes_attention = True


@estimator("atp_qk")
class AttributionPatchingOfPatterns(_FixedAttention):
    """Attribution patching with the query and key fix of AtP*.

    The value of a query or key is Σ (A' − A) · ∂m/∂A, over the weights A of attention that it
    determines: A' are the exact weights with the written query or key (Kramár et al. 2024,
    section 3.1.1). At other sites, it is that of `gradient_input`. For a path to a query or key, A'
    are the weights with the query or key that the path gives; for other paths, it is that of `eap`.
    """

    example = "using atp_qk"
    documentation = (
        "Estimates the effect like `gradient_input`, with the query and key fix of AtP*. At `q` "
        "and `k`, the attention weights that the written queries or keys give are computed "
        "exactly. The estimate is their change times the gradient of the metric by the weights, so "
        "saturated attention doesn't hide an effect. At other sites, values are those of "
        "`gradient_input`. Changes in a basis count with the whole query or key that they give. "
        "Each site and layer of queries or keys needs two further forward passes, and more if "
        "cells write one vector. A `path` to them has the exact weights with the query or key of "
        "the path: each sender needs up to three forward passes for all of its receivers; other "
        "paths are as in `eap`. There, models whose attention can't be computed separately are "
        "rejected (E0608), "
        "and answers of several tokens at `k` and `k cross`."
    )
    source = "Kramár et al. 2024, arXiv 2403.00745, section 3.1.1"
    convention = (
        "estimates, no cell was run: to first order, {change}, times "
        "the gradient of the metric; of queries and keys, the exact change of the attention "
        "weights times the gradient by the weights (Kramár et al. 2024, arXiv 2403.00745, the "
        "query and key fix of AtP*)"
    )


@estimator("atp_star")
class AttributionPatchingStar(_FixedAttention):
    """AtP*: the query and key fix and GradDrop.

    The value of a cell is the mean over layers ℓ of |Σ (written − base) · ∇ℓ m|, where the
    gradient ∇ℓ m doesn't pass the outputs of attention and MLP of layer ℓ (Kramár et al. 2024,
    section 3.1.2). The layer of the site itself is left out: its gradient would be 0.
    """

    example = "using atp_star"
    documentation = (
        "Computes, without running the cells, the mean of the absolute values of `atp_qk` over "
        "layers, each with the gradient through the outputs of attention and MLP of one layer left "
        "out (GradDrop). Direct and indirect effects that cancel in a gradient remain visible. The "
        "value has no sign, so it isn't an effect: it needs `as raw` and has no p. The layer that "
        "contains the site, or all receivers of a `path`, is left out of the mean. For sites of an "
        "encoder, the layers are those "
        "of the encoder and of the language model or decoder. One forward pass, and one backward "
        "pass per measure, for each layer serve all cells. Models with one layer are rejected "
        "(E0608)."
    )
    source = "Kramár et al. 2024, arXiv 2403.00745"
    convention = (
        "no effect, and no sign: the mean over layers of the absolute estimates with the gradient "
        "through this layer's attention and MLP left out, except the layer of the site, or of all "
        "receivers of a path (GradDrop); "
        "of queries and keys, the exact change of the attention weights times the gradient by the "
        "weights (Kramár et al. 2024, arXiv 2403.00745, AtP*)"
    )
    value_name = "AtP*"
    value_said = "a mean of absolute estimates"
    formula = "the mean over layers ℓ of |Σ (written − base) · ∂m/∂site without layer ℓ|"
    drops_layers = True
