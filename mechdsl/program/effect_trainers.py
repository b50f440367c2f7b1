"""Trainers on a measure: rotations, steering vectors, soft prompts, edits, scales and masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, get_args

from mechdsl.base.limits import INSERTED, is_integer, is_number
from mechdsl.base.text import name_list
from mechdsl.program.direction_methods import Problem, check_kind
from mechdsl.program.estimators import (
    ContextualDecomposition,
    GradientInteractionModifications,
    RelevancePatching,
)
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import (
    EFFECT_DEFAULTS,
    EdgeScoreTrainer,
    EdgeSearchTrainer,
    EditTrainer,
    EffectScoreTrainer,
    MaskTrainer,
    NodeScoreTrainer,
    NodeSearchTrainer,
    RotationTrainer,
    ScaleTrainer,
    Selection,
    VectorTrainer,
    check_size,
    trainer,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mechdsl.fits.gates import Gates
    from mechdsl.fits.vectors import (
        ChannelScales,
        LowRankEdit,
        Rotation,
        SoftPrompt,
        SteeringVector,
    )

TRAINING_ARGUMENTS = "prompts: fruit.train, from: fewer, maximise: logit(answer of fewer)"
"""Arguments of an example of `fit` with a trainer on a measure."""

MASK_EXAMPLE = (
    f"`group movers = fit(mask(size: 4), {TRAINING_ARGUMENTS}) at layers * heads * at last token`"
)

EDGE_MASK_EXAMPLE = (
    "`circuit c = fit(mask(size: 4, keep: true), prompts: fruit.train, from: fewer, "
    "minimise: logit(answer of fewer))`"
)

SCORE_EXAMPLE = (
    "`circuit c = fit(eap_ig(size: 20, steps: 5), prompts: fruit.train, from: fewer, "
    "minimise: kl(clean))`"
)

NODE_EXAMPLE = MASK_EXAMPLE.replace("mask(size: 4)", "atp(size: 4)")

NODE_SEARCH_EXAMPLE = MASK_EXAMPLE.replace("mask(size: 4)", "forward_selection(size: 4)")

SEARCH_EXAMPLE = SCORE_EXAMPLE.replace("eap_ig(size: 20, steps: 5)", "acdc(threshold: 0.02)")

COARSE_EXAMPLE = SCORE_EXAMPLE.replace(
    "eap_ig(size: 20, steps: 5)", "coarse_to_fine(threshold: 0.02)"
)

OTHER_EFFECT_TRAINERS: dict[str, str] = {
    **dict.fromkeys(
        ("steering", "steering_vector", "direction", "bias", "actadd"), "write `vector(length: 8)`"
    ),
    **dict.fromkeys(
        ("scale", "scaling", "asguard", "ia3", "gain", "channel_scale"),
        "write `scales(penalty: 0.1)`",
    ),
    **dict.fromkeys(
        ("loreft", "LoReFT", "ReFT", "lora", "low_rank", "edit", "intervention"),
        "write `reft(rank: 4)`",
    ),
    **dict.fromkeys(("direft", "DiReFT"), 'write `reft(rank: 4, kind: "direft")`'),
    "boundless": "write `boundless_das(penalty: 1)`",
    "rotation": "write `das(dims: 2)`",
    **dict.fromkeys(
        ("hard_concrete", "subnetwork_probing", "pruning", "masks"),
        f"choose heads or neurons: {MASK_EXAMPLE}",
    ),
    **dict.fromkeys(
        ("discover", "EAP", "EAP_IG", "edge_attribution"),
        f"choose edges by their estimated effects: {SCORE_EXAMPLE}, or sites: {NODE_EXAMPLE}",
    ),
    **dict.fromkeys(
        ("attribution_patching", "AtP", "ATP", "gradient_input", "node_attribution", "attribution"),
        f"choose sites by their estimated effects: {NODE_EXAMPLE}, or edges: {SCORE_EXAMPLE}",
    ),
    **dict.fromkeys(("ig", "IG"), "write `integrated_gradients(size: 4, steps: 16)`"),
    **dict.fromkeys(
        ("search", "greedy_search"),
        f"choose edges by ablating them one after another: {SEARCH_EXAMPLE}, or add sites one "
        f"after another: {NODE_SEARCH_EXAMPLE}",
    ),
    **dict.fromkeys(
        ("forward", "greedy_forward", "greedy_nodes", "greedy_heads", "stepwise"),
        f"add sites one after another: {NODE_SEARCH_EXAMPLE}",
    ),
    "ACDC": f"choose edges by ablating them one after another: {SEARCH_EXAMPLE}",
    **dict.fromkeys(
        ("hagd", "HAGD", "hierarchical", "hierarchical_search"),
        f"ablate layers first, then heads, then edges: {COARSE_EXAMPLE}",
    ),
    **dict.fromkeys(("edge_pruning", "edge_mask", "edges"), f"choose edges: {EDGE_MASK_EXAMPLE}"),
}
"""What else may be written for a trainer of this module inside of `fit(…)` → hint."""

OTHER_MASK_OPTIONS: dict[str, str] = {
    **dict.fromkeys(("k", "n", "top", "heads", "count", "sparsity", "budget", "l0"), "size"),
    "relaxation": "kind",
    "complement": "keep",
}
"""Names of an option of a mask in other tools → the option."""

BOUNDARY_PENALTY = 1.0
"""Default of `penalty` of `boundless_das`, as in the paper."""


class SubspaceTrainer(RotationTrainer):
    """Directions of a subspace whose exchange has the effect of another run."""

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if is_integer(value, least=1):
            return None
        return f"`{name}` is a whole number from 1 on", f"write `{name}: 2`"

    def draw(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> Tensor:
        """Return [dims, width] random rows, from which a training starts."""
        from mechdsl.fits.vectors import draw_rows

        width = like.shape[1]
        return draw_rows(self.size(options, width), width, random, like.device, like.dtype)


@trainer("das")
class AlignmentSearchTrainer(SubspaceTrainer):
    """Distributed alignment search: a subspace of a given size.

    References:
        Geiger et al. 2023, arXiv 2303.02536.
    """

    example = "das(dims: 2)"
    options = ("dims",)
    required = ("dims",)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options["dims"])

    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> Rotation:
        from mechdsl.fits.vectors import Rotation

        return Rotation(self.draw(like, options, random))


@trainer("boundless_das")
class BoundlessSearchTrainer(SubspaceTrainer):
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
        number = is_number(value) and value >= 0
        hint = "write `penalty: 1`; the loss grows by 1 if the subspace is the whole space"
        return None if number else ("`penalty` is a number from 0 on", hint)

    def size(self, options: Mapping[str, Constant], width: int) -> int:
        return int(options.get("dims", width))

    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> Rotation:
        from mechdsl.fits.vectors import BoundlessRotation

        penalty = float(options.get("penalty", BOUNDARY_PENALTY))
        return BoundlessRotation(self.draw(like, options, random), penalty)


@trainer("vector")
class SteeringVectorTrainer(VectorTrainer):
    """A steering vector: added to the vectors of a site, it optimises a measure."""

    example = "vector(length: 8)"
    options = ("length", "penalty")

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        number = value if is_number(value) else -1
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

    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> SteeringVector:
        from mechdsl.fits.vectors import SteeringVector

        length = float(options["length"]) if "length" in options else None
        penalty = float(options.get("penalty", 0))
        return SteeringVector(like, random, length=length, penalty=penalty)


@trainer("soft_prompt")
class SoftPromptTrainer(VectorTrainer):
    """A soft prompt: vectors at the tokens of a position, one for each, instead of their own.

    References:
        Lester et al. 2021, arXiv 2104.08691.
    """

    example = "soft_prompt(tokens: 4)"
    options = ("tokens",)
    required = ("tokens",)
    any_run = True

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if is_integer(value) and 1 <= value <= INSERTED:
            return None
        return f"`tokens` is a whole number from 1 to {INSERTED:,}", "write `tokens: 4`"

    def count_tokens(self, options: Mapping[str, Constant]) -> int | None:
        return int(options["tokens"])

    def start(self, like: Tensor, options: Mapping[str, Constant], random: Generator) -> SoftPrompt:
        from mechdsl.fits.vectors import SoftPrompt

        return SoftPrompt(like, int(options["tokens"]))


EDIT_KINDS = ("loreft", "direft")
"""Values of `kind` of an edit."""


@trainer("reft")
class LowRankEditTrainer(EditTrainer):
    """A representation finetuning of low rank: what it adds depends on the activation.

    References:
        Wu et al. 2024, arXiv 2404.03592, equations 2 (LoReFT) and 3 (DiReFT).
    """

    example = "reft(rank: 4)"
    options = ("rank", "kind")
    required = ("rank",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "kind":
            return check_kind("reft", value, EDIT_KINDS)
        if is_integer(value, least=1):
            return None
        return "`rank` is a whole number from 1 on", "write `rank: 4`"

    def rank(self, options: Mapping[str, Constant]) -> int:
        return int(options["rank"])

    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> LowRankEdit:
        from mechdsl.fits.vectors import LowRankEdit

        orthonormal = options.get("kind", EDIT_KINDS[0]) == EDIT_KINDS[0]
        return LowRankEdit(like, self.rank(options), random, orthonormal=orthonormal)


@trainer("scales")
class ChannelScaleTrainer(ScaleTrainer):
    """A scale for each channel: the vectors of a site times the scales optimise a measure.

    References:
        Park et al. 2025, arXiv 2509.25843.
    """

    example = "scales(penalty: 0.1)"
    options = ("penalty",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        number = is_number(value) and value >= 0
        return None if number else ("`penalty` is a number from 0 on", "write `penalty: 0.1`")

    def start(
        self, like: Tensor, options: Mapping[str, Constant], random: Generator
    ) -> ChannelScales:
        from mechdsl.fits.vectors import ChannelScales

        return ChannelScales(like, penalty=float(options.get("penalty", 0)))


GATE_KINDS = ("hard_concrete", "straight_through")
"""Values of `kind` of a mask; their arithmetic is in `mechdsl.fits.gates`."""


@trainer("mask")
class GateTrainer(MaskTrainer):
    """A mask over sites: it chooses those that have the largest effect together.

    References:
        Louizos et al. 2018, arXiv 1712.01312 (hard concrete); Bengio et al. 2013, arXiv 1308.3432
        (straight-through).
    """

    example = "mask(size: 4)"
    options = ("size", "kind", "keep")
    required = ("size",)
    defaults: ClassVar[Mapping[str, Constant]] = {
        **EFFECT_DEFAULTS,
        "steps": 300,
        "rate": 0.1,
    }

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "kind":
            return check_kind("mask", value, GATE_KINDS)
        if name == "keep":
            fine = isinstance(value, bool)
            return None if fine else ("`keep` is `true` or `false`", "write `keep: true`")
        return check_size(value, "size: 4")

    def size(self, options: Mapping[str, Constant]) -> int:
        return int(options["size"])

    def start(self, count: int, options: Mapping[str, Constant], seed: int) -> Gates:
        from mechdsl.fits.gates import GATES

        kind = str(options.get("kind", GATE_KINDS[0]))
        return GATES[kind](count, self.size(options), seed)


# --- scores of edges ------------------------------------------------------------------------------


class EstimatedEffectTrainer(EffectScoreTrainer):
    """Candidates with large scores: the number is given, or their faithfulness decides."""

    options = ("size", "faithfulness")
    other_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("until", "least"), "faithfulness"),
        **dict.fromkeys(("ig_steps", "n_steps"), "steps"),
        **dict.fromkeys(("method", "choice", "by"), "select"),
    }
    noun: ClassVar[str]
    """What a candidate is."""
    defaults: ClassVar[Mapping[str, Constant]] = {**EFFECT_DEFAULTS, "batch": 8}

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "faithfulness":
            if isinstance(value, float) and 0 < value < 1:
                return None
            return "`faithfulness` is a number between 0 and 1", "write `faithfulness: 0.9`"
        return super().check_option(name, value)

    def check(self, options: Mapping[str, Constant]) -> Problem | None:
        given = [name for name in ("size", "faithfulness") if name in options]
        if len(given) == 1:
            return None
        reason = f"`{self.name}` needs `size: …` or `faithfulness: …`"
        both = f"`size` and `faithfulness` both select the number of {self.noun}s"
        reason = both if given else reason
        other = re.sub("size: [0-9]+", "faithfulness: 0.9", self.example)
        return reason, f"write `{self.example}`, or `{other}`"

    def size(self, options: Mapping[str, Constant]) -> int | None:
        return int(options["size"]) if "size" in options else None

    def faithfulness(self, options: Mapping[str, Constant]) -> float | None:
        return float(options["faithfulness"]) if "faithfulness" in options else None

    def steps(self, options: Mapping[str, Constant]) -> int:
        return int(options.get("steps", 1))


class EstimatedEdgeTrainer(EstimatedEffectTrainer, EdgeScoreTrainer):
    """A circuit of edges with large scores: the change of the output of the sender times the
    gradient of the measure by the input of the receiver."""

    options = ("size", "faithfulness", "select")
    noun = "edge"

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name != "select":
            return super().check_option(name, value)
        known = get_args(Selection)
        listed = name_list([f'"{each}"' for each in known])
        return None if value in known else ("`select` has no such value", f"write one of {listed}")

    def selection(self, options: Mapping[str, Constant]) -> Selection:
        return "top" if options.get("select") == "top" else "greedy"


@trainer("eap")
class EdgeAttributionTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching: the score of the edge from u to v is
    (u′ − u) · ∂m/∂(input of v) in the clean run.

    References:
        Syed et al. 2023, arXiv 2310.10348.
    """

    example = "eap(size: 20)"


@trainer("eap_ig")
class IntegratedEdgeTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching with integrated gradients over the input: the score of the edge
    from u to v is (u′ − u) · mean over k = 1 … m of ∂m/∂(input of v) with the embedding
    z′ + k/m (z − z′) at all tokens, or at those of the training if others have no z′.

    References:
        Hanna et al. 2024, arXiv 2403.17806.
    """

    example = "eap_ig(size: 20, steps: 5)"
    options = ("size", "faithfulness", "steps", "select")
    required = ("steps",)
    path = "inputs"


@trainer("eap_ig_activations")
class IntegratedActivationTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching with integrated gradients over activations: as `eap_ig`, but the
    output of the module of u moves from u′ to u instead of the embedding, for all heads of a layer
    together.

    References:
        Mueller et al. 2025, arXiv 2504.13151 (EAP-IG-activations).
    """

    example = "eap_ig_activations(size: 20, steps: 5)"
    options = ("size", "faithfulness", "steps", "select")
    required = ("steps",)
    path = "activations"


@trainer("relp")
class RelevanceEdgeTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching with coefficients of relevance propagation instead of gradients,
    those of `using relp`.

    References:
        Jafari et al. 2025, arXiv 2508.21258.
    """

    example = "relp(size: 20)"
    backward = RelevancePatching.backward


@trainer("gim")
class InteractionEdgeTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching with gradients that allow for interactions, those of `using gim`.

    References:
        Edin et al. 2025, arXiv 2505.17630.
    """

    example = "gim(size: 20)"
    backward = GradientInteractionModifications.backward


@trainer("atp_qk")
class PatternEdgeTrainer(EstimatedEdgeTrainer):
    """Edge attribution patching with the query and key fix of AtP*: as `eap`, but the score of an
    edge into a query or key is Σ (A′ − A) · ∂m/∂A over the weights A of attention that it
    determines, with the exact weights A′ of the changed input.

    References:
        Kramár et al. 2024, arXiv 2403.00745, section 3.1.1.
    """

    example = "atp_qk(size: 20)"
    fixes_attention = True


@trainer("atp_star")
class DroppedLayersEdgeTrainer(PatternEdgeTrainer):
    """AtP* for edges: the mean over layers of the absolute scores of `atp_qk` of a row, each with
    the gradient through the outputs of attention and MLP of one layer left out, except the layer of
    the receiver.

    References:
        Kramár et al. 2024, arXiv 2403.00745, section 3.1.2.
    """

    example = "atp_star(size: 20)"
    drops_layers = True


@trainer("cdt")
class DecomposedEdgeTrainer(EstimatedEdgeTrainer):
    """Contextual decomposition: the score of an edge is the metric of the irrelevant part of the
    output less that of the clean run, by the rules of `using cdt`. The irrelevant part is u′ at the
    sender, and the clean run's value at all other heads and MLPs before the receiver. Attention has
    the weights of the clean run, so that edges into queries and keys score 0.

    References:
        Hsu et al. 2024, arXiv 2407.00886.
    """

    example = "cdt(size: 20)"
    backward = ContextualDecomposition.backward


# --- scores of nodes ------------------------------------------------------------------------------


OTHER_NODE_OPTIONS: Mapping[str, str] = dict.fromkeys(
    ("k", "n", "top", "heads", "count", "budget", "sites", "nodes"), "size"
)
"""Names of an option of a group in other tools → the option."""


class EstimatedNodeTrainer(EstimatedEffectTrainer, NodeScoreTrainer):
    """A group of sites, positions, features or dimensions with large scores: the difference between
    the other value and that of the clean run, times a gradient of the measure."""

    other_options: ClassVar[Mapping[str, str]] = {
        **OTHER_NODE_OPTIONS,
        **EstimatedEffectTrainer.other_options,
    }
    defaults: ClassVar[Mapping[str, Constant]] = EFFECT_DEFAULTS
    noun = "node"


@trainer("atp")
class NodeAttributionTrainer(EstimatedNodeTrainer):
    """Attribution patching: the score of a candidate with the value x in the clean run and the
    other value x′ is Σ (x′ − x) · ∂m/∂x, with the gradient of the clean run, that of `using atp`.

    References:
        Nanda 2023, Attribution patching; Shrikumar et al. 2016, arXiv 1605.01713.
    """

    example = "atp(size: 4)"


@trainer("integrated_gradients")
class IntegratedNodeTrainer(EstimatedNodeTrainer):
    """Integrated gradients: as `atp`, with the mean gradient at `steps` midpoints of the line from
    x to x′, on which all candidates of a site and layer move together, that of
    `using integrated_gradients`.

    References:
        Sundararajan et al. 2017, arXiv 1703.01365.
    """

    example = "integrated_gradients(size: 4, steps: 16)"
    options = ("size", "faithfulness", "steps")
    required = ("steps",)
    integrates = True


# --- search by ablations --------------------------------------------------------------------------


@trainer("acdc")
class ThresholdSearchTrainer(EdgeSearchTrainer):
    """Automatic circuit discovery: edges are ablated one after another, from the end of the model
    backwards. An edge is restored if its ablation makes the measure worse by `threshold` or more.

    References:
        Conmy et al. 2023, arXiv 2304.14997, algorithm 1.
    """

    example = "acdc(threshold: 0.02)"
    options = ("threshold",)
    required = ("threshold",)
    other_options: ClassVar[Mapping[str, str]] = dict.fromkeys(("tau", "size"), "threshold")
    defaults: ClassVar[Mapping[str, Constant]] = {**EFFECT_DEFAULTS, "batch": 64}

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if is_number(value) and value > 0:
            return None
        return "`threshold` is a number above 0", f"write `{self.example}`"

    def size(self, options: Mapping[str, Constant]) -> None:
        return None

    def threshold(self, options: Mapping[str, Constant]) -> float:
        return float(options["threshold"])


@trainer("coarse_to_fine")
class CoarseToFineTrainer(ThresholdSearchTrainer):
    """Coarse-to-fine search: as `acdc`, but first all heads or the MLP of a layer are ablated
    together, then single heads, then single inputs of queries, keys and values. Edges are tried
    last.

    References:
        Uddin et al. 2026, arXiv 2601.12879 (HAGD), for a search from coarse to fine. Its levels are
        clusters of a graph, and a graph neural network chooses from them; here, they are parts of
        the model, and ablations choose.
    """

    example = "coarse_to_fine(threshold: 0.02)"
    levels = ("blocks", "heads", "inputs", "edges")


@trainer("greedy")
class GreedySearchTrainer(EdgeSearchTrainer):
    """Greedy search: of all edges that are left, the one is ablated that makes the measure least
    worse, until `size` edges are left."""

    example = "greedy(size: 20)"
    options = ("size",)
    required = ("size",)
    defaults: ClassVar[Mapping[str, Constant]] = {**EFFECT_DEFAULTS, "batch": 64}

    def size(self, options: Mapping[str, Constant]) -> int:
        return int(options["size"])

    def threshold(self, options: Mapping[str, Constant]) -> None:
        return None


# --- search for groups ----------------------------------------------------------------------------


@trainer("forward_selection")
class ForwardSelectionTrainer(NodeSearchTrainer):
    """Greedy forward selection: of all candidates, the one is added to the group whose writing,
    together with the group, moves the measure furthest in its direction, until the group has
    `size` candidates or none moves it further.

    References:
        Zhou et al. 2024, arXiv 2410.13708 (Sahara), for a greedy group of heads. Its score is a
        shift of representations; here, the measure is any metric.
    """

    example = "forward_selection(size: 4)"
    options = ("size",)
    required = ("size",)
    other_options: ClassVar[Mapping[str, str]] = OTHER_NODE_OPTIONS
    defaults: ClassVar[Mapping[str, Constant]] = {**EFFECT_DEFAULTS, "batch": 64}

    def size(self, options: Mapping[str, Constant]) -> int:
        return int(options["size"])
