"""The multiply-adds of full forward passes over prompts, of a token in a block, of the tokens
that a decoder generates, and of the coordinates that rules change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechdsl.base import limits
from mechdsl.base.arrays import Floats, Ints
from mechdsl.dictionaries.folder import MAX_GATHERED, DictionaryFile
from mechdsl.models.config import find_dense_blocks, subconfig
from mechdsl.models.restart import BlockWork, TokenMask
from mechdsl.models.shape import ModelShape
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.planner.rows import RowTable, RulePlan
from mechdsl.prompts.runs import Hits
from mechdsl.resolve.bases import CoordinateChange
from mechdsl.resolve.observations import Observation, RowSetObservation, join_positions
from mechdsl.resolve.types import BasisMember, PythonBasis


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds per token of a block's components."""

    project: int
    output: int
    mlp: int
    """On average over all blocks, if some have experts."""
    dense_mlp: int
    """Of blocks without experts."""
    key: int
    """Attention's multiply-adds per key that a query sees."""
    causal: bool
    """Queries see no later keys."""
    image: int = 0
    """Number of tokens of each image that some blocks attend to, before a text."""
    share: float = 0
    """The share of these blocks."""
    encode: int = 0
    """Multiply-adds of the keys and values of one image token."""

    @staticmethod
    def of(shape: ModelShape) -> BlockCost:
        heads, keys = shape.average(lambda b: b.queries), shape.average(lambda b: b.keys)
        return BlockCost(
            project=shape.d_model * (heads + 2 * keys),
            output=heads * shape.d_model,
            mlp=_count_mlp_work(shape),
            dense_mlp=_count_dense_work(shape),
            key=2 * heads,
            causal=shape.causal,
            image=shape.attended,
            share=shape.attending / shape.n_layers,
            encode=2 * shape.d_model * keys,
        )

    @property
    def token(self) -> int:
        """Multiply-adds of a token, without attention's products with keys."""
        return self.project + self.output + self.mlp

    def image_maps(self, sources: Ints) -> Ints:
        """Return the multiply-adds of the keys and values of images that some blocks attend to, on
        average over all blocks. sources: tokens of the images, in any shape."""
        return (self.share * self.encode * sources).astype(np.int64)

    def saved_by_copy(self, *, experts: bool) -> float:
        """Multiply-adds of a token that equals one of another prompt, whose linear maps are shared,
        on average over all blocks. Maps of an image that some blocks attend to aren't counted.

        Args:
            experts: Whether MLPs have experts, which aren't shared.
        """
        whole = self.project + self.output + (0 if experts else self.mlp)
        return whole - self.share * self.encode

    def pairs(self, lengths: Ints) -> Ints:
        """Count the pairs of a query and a key that it sees, in prompts of these lengths."""
        return lengths * (lengths + 1) // 2 if self.causal else lengths**2

    def whole(self, lengths: Ints, sources: Ints | None = None) -> Ints:
        """Count all tokens of a prompt in one block, on average if some blocks attend to images in
        place of earlier tokens. Shape [row].

        Args:
            lengths: Tokens of each prompt.
            sources: Of these, the tokens of images that blocks attend to; None for one image.
        """
        if not self.image:
            return lengths * self.token + self.pairs(lengths) * self.key
        images = np.full_like(lengths, self.image) if sources is None else sources
        numbers = lengths - images
        pairs = self.pairs(numbers)
        cost = numbers * self.token + pairs * self.key
        more = (images - numbers) * self.encode + (numbers * images - pairs) * self.key
        return cost + (self.share * more).astype(np.int64)

    def of_work(self, work: BlockWork, lengths: Ints, counts: Ints) -> tuple[int, int]:
        """Return (tokens, multiply-adds) of rows with the given lengths and multiplicities."""
        seen = np.arange(1, work.present.shape[1] + 1)

        def tokens(mask: TokenMask) -> int:
            return int(mask.sum(axis=1) @ counts)

        keys = work.attend @ seen if self.causal else work.attend.sum(axis=1) * lengths
        adds = (
            tokens(work.project) * self.project
            + tokens(work.output) * self.output
            + tokens(work.mlp) * self.mlp
            + int(keys @ counts) * self.key
        )
        return tokens(work.present), adds


_WITHOUT_GATE = frozenset(
    (
        *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "codegen", "bloom", "mpt"),
        *("falcon", "phi", "starcoder2", "nemotron", "bert", "roberta", "distilbert", "electra"),
    )
)
"""Types of models whose MLPs have two matrices, as `model_type` of a config."""

_WITH_GATE = frozenset(
    (
        *("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        *("phi3", "olmo", "olmo2", "granite", "cohere", "stablelm"),
    )
)
"""Types of models whose MLPs have three matrices."""


_EXPERTS_WITHOUT_GATE = frozenset(("nemotron_h",))

_WITH_MLP = frozenset(("gemma4_text", "hunyuan_v1_moe", "llama4_text"))
"""Types of models with an MLP next to the experts, although no key names it."""

_RUN_ALL_EXPERTS = frozenset(("llama4_text",))
"""Types of models that run every expert on every token."""

_WITH_NORMED_SUMS = frozenset(
    ("gemma2", "gemma3_text", "olmo2", "bert", "roberta", "distilbert", "electra")
)
"""Types of models with norms after the sum of the heads or after the stream."""


def has_normed_sums(shape: ModelShape) -> bool:
    """Whether norms follow the output of attention or the stream, as far as the config shows it, so
    that each receiver of a circuit reads sums that are computed again."""
    return shape.config.get("model_type") in _WITH_NORMED_SUMS


_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token"),
    *("top_k_experts", "moe_top_k", "moe_topk", "moe_k"),
)
"""Keys of the number of experts that a token runs."""

_EXPERT_WIDTH = (
    *("moe_intermediate_size", "expert_ffn_hidden_size"),
    *("ffn_hidden_size", "intermediate_size"),
)
"""Keys of the number of neurons of an expert."""

_SHARED_WIDTH = (
    *("shared_expert_intermediate_size", "shared_experts_intermediate_size"),
    *("shared_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim"),
)
"""Keys of the number of neurons of experts that all tokens run."""

_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""Keys of the number of these experts."""


def _read_size(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Return the first size that a config has, of a list the largest; 0 without any."""
    for key in keys:
        value: Any = config.get(key)
        every: list[Any] = value if isinstance(value, list) else [value]
        sizes = [
            number for number in every if isinstance(number, int) and 0 <= number <= limits.SIZE
        ]
        if sizes:
            return max(sizes)
    return 0


def _count_mlp_work(shape: ModelShape) -> int:
    """Count the multiply-adds per token of an MLP; with experts, on average over all blocks: those
    of the router, of the experts that a token runs, and of those that all tokens run."""
    dense = _count_dense_work(shape)
    if not shape.n_experts:
        return dense
    config, own = shape.config, subconfig(shape.config, "ffn_config")
    kind = config.get("model_type")
    width = _read_size(own, _EXPERT_WIDTH) or _average_neurons(shape)
    chosen = min(_read_size(own, _CHOSEN) or 1, shape.n_experts)
    chosen = shape.n_experts if kind in _RUN_ALL_EXPERTS else chosen
    shared = _read_size(config, _SHARED_WIDTH) or width * _read_size(config, _SHARED)
    if kind in _WITH_MLP:
        shared = _read_size(config, ("intermediate_size",))
    sparse = _count_matrices(shape) * (chosen * width + shared) + shape.n_experts
    share = len(find_dense_blocks(config, shape.n_layers)) / shape.n_layers
    return round(share * dense + (1 - share) * shape.d_model * sparse)


def _count_dense_work(shape: ModelShape) -> int:
    """Count the multiply-adds per token of an MLP without experts."""
    return _count_matrices(shape) * shape.d_model * _average_neurons(shape)


def _average_neurons(shape: ModelShape) -> int:
    """Return the number of neurons of an MLP, averaged over the blocks that have neurons."""
    layers = shape.partly.get("mlp_hidden") or range(shape.n_layers)
    return round(sum(shape.blocks[layer].neurons for layer in layers) / len(layers))


def _count_matrices(shape: ModelShape) -> int:
    return 3 if _has_gate(shape) else 2


def _has_gate(shape: ModelShape) -> bool:
    """Whether an MLP has three matrices, as far as the config shows it."""
    config = shape.config
    if shape.n_experts:
        return config.get("model_type") not in _EXPERTS_WITHOUT_GATE
    if isinstance(form := config.get("feed_forward_proj"), str):
        return form.startswith("gated")
    if shape.patches is not None:
        return bool(config.get("use_swiglu_ffn"))
    if any(key in config for key in ("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim")):
        return False
    if (kind := config.get("model_type")) in _WITHOUT_GATE | _WITH_GATE:
        return kind in _WITH_GATE
    # An MLP of four widths usually has no gate; MLPs of other sizes do.
    return _average_neurons(shape) != 4 * shape.d_model


@dataclass(frozen=True)
class CrossCost:
    """Multiply-adds of an encoder, and of a decoder's attention to it in one block."""

    encoder: BlockCost
    blocks: int
    """Number of blocks of the encoder."""
    entrance: int
    """Of one token of the encoder: convolutions before the first block."""
    front: int
    """Number of tokens of the encoder that aren't part of an image, such as a class token."""
    exit: int
    """Of one token of the encoder: the map to the width that the decoder reads."""
    query: int
    """Of one token of the decoder, in one block: its query, and the output of attention."""
    source: int
    """Of one token of the encoder, in one block of the decoder: its key and value."""
    key: int
    """Of one pair of a query and a key, in one block."""

    @staticmethod
    def of(shape: ModelShape) -> CrossCost | None:
        """Return the costs of an encoder-decoder; None for other models."""
        encoder = shape.others.get("encoder")
        if encoder is None:
            return None
        reads_encoder = shape.config.get("cross_attention_hidden_size") is not None
        width = encoder.d_model if reads_encoder else shape.d_model
        heads = shape.average(lambda block: block.queries)
        # Without `cross`, a decoder attends to its own and the encoder's tokens in one operation.
        own = 2 * shape.d_model * heads if "cross" in shape.others else 0
        return CrossCost(
            replace(BlockCost.of(encoder), causal=False),
            encoder.n_layers,
            _count_convolutions(encoder),
            0 if encoder.patches is None else len(encoder.patches.front),
            0 if width == encoder.d_model else encoder.d_model * width,
            own,
            2 * width * shape.average(lambda block: block.keys),
            2 * heads,
        )

    def encode(self, sources: Ints) -> Ints:
        """Count the multiply-adds of the encoder on prompts of these lengths. Shape [row]."""
        entering = (sources - self.front) * self.entrance
        return self.blocks * self.encoder.whole(sources) + entering + sources * self.exit


def _count_convolutions(encoder: ModelShape) -> int:
    """Count the multiply-adds per token of an encoder's convolutions over pixels or frames."""
    config: Any = encoder.config
    width = encoder.d_model
    if encoder.patches is not None:
        high, wide = encoder.patches.patch
        return int(config.get("num_channels") or 3) * high * wide * width
    bands = config.get("num_mel_bins")
    if encoder.family == "whisper" and isinstance(bands, int):  # two frames give one token
        return 3 * width * (2 * bands + width)
    return 0


@dataclass(frozen=True)
class PassCost:
    """The work of full forward passes without the unembedding."""

    n_layers: int
    block: BlockCost
    cross: CrossCost | None
    """The encoder of an encoder-decoder; None for other models."""

    @staticmethod
    def of(shape: ModelShape) -> PassCost:
        return PassCost(shape.n_layers, BlockCost.of(shape), CrossCost.of(shape))

    def whole(self, lengths: Ints, sources: Ints, stop: int | None = None) -> tuple[Ints, Ints]:
        """Count the work of full forward passes.

        Args:
            lengths: [row] tokens of each prompt.
            sources: [row] of these, the tokens that an encoder reads; 0 in other models.
            stop: Number of blocks of the main stack to run; None is all.

        Returns:
            (tokens times blocks [row], multiply-adds [row]).
        """
        blocks = self.n_layers if stop is None else min(stop, self.n_layers)
        if self.cross is None:
            return lengths * blocks, self.block.whole(lengths, sources) * blocks
        numbers = lengths - sources
        each = self.block.whole(numbers) + self._attend(numbers, numbers * sources, sources)
        tokens = sources * self.cross.blocks + numbers * blocks
        return tokens, self.cross.encode(sources) + each * blocks

    def decode(self, lengths: Ints, sources: Ints) -> tuple[Ints, Ints]:
        """Count the work of full passes of a decoder, given the outputs of its encoder, or the keys
        and values of an image that blocks attend to.

        Args and returned values are those of `whole`.
        """
        if self.cross is None:
            tokens, adds = self.whole(lengths, sources)
            return tokens, adds - self.block.image_maps(sources) * self.n_layers
        (tokens, adds), (fewer, encoder) = (self.whole(lengths, sources, n) for n in (None, 0))
        return tokens - fewer, adds - encoder + sources * self.cross.exit

    def _attend(self, numbers: Ints, pairs: Ints, projected: Ints) -> Ints:
        """Count the multiply-adds of attention to the encoder, in one block.

        Args:
            numbers: Tokens of the decoder.
            pairs: Pairs of a token of the decoder and one of the encoder.
            projected: Tokens of the encoder whose keys and values are computed.
        """
        assert self.cross is not None
        cross = self.cross
        return numbers * cross.query + pairs * cross.key + projected * cross.source

    def replies(self, lengths: Ints, sources: Ints, steps: int) -> tuple[int, float]:
        """Count the work of `steps` passes after the first one, of replies of a decoder.

        Each pass runs the decoder on all of its tokens, and projects the cached outputs of the
        encoder again. Keys and values of an image that blocks attend to are cached.

        Args:
            lengths: [row] tokens that encoder and decoder read.
            sources: [row] of these, the tokens of the encoder, or of an image.
            steps: Number of passes.

        Returns:
            (tokens times blocks, multiply-adds).
        """
        later, source = np.arange(1, steps + 1, dtype=np.int64), sources[:, None]
        length = lengths[:, None] - source + later
        if self.cross is None:  # blocks attend to an image, which `lengths` include
            maps = self.block.image_maps(source)
            each = self.block.whole(length + source, np.broadcast_to(source, length.shape)) - maps
        else:
            each = self.block.whole(length) + self._attend(length, length * source, source)
        return int(length.sum()) * self.n_layers, float(each.sum()) * self.n_layers


@dataclass(frozen=True)
class _BasisCost:
    """Multiply-adds for one vector of a basis."""

    size: int
    width: int
    encoding: int
    """For all coordinates of a vector."""
    by_feature: bool
    """Whether named coordinates are computed alone."""
    overcomplete: bool
    """Whether the basis leaves out a part of a vector, whose size is measured."""
    layers: int = 1
    """Layers that a coordinate writes to; each of them encodes the vector again."""

    @staticmethod
    def of(rule: RulePlan) -> _BasisCost:
        """Return the cost of a rule's largest basis."""
        assert rule.rule.basis is not None
        member = max(rule.rule.basis.members, key=lambda basis_member: basis_member.size)
        operand = member.operand
        width = operand.width_in if isinstance(operand, DictionaryFile) else member.width
        by_feature = not isinstance(operand, PythonBasis)
        if isinstance(operand, DictionaryFile):
            by_feature = operand.is_separate
        overcomplete = isinstance(operand, DictionaryFile | PythonBasis)
        encoding = member.size * width
        if isinstance(operand, DictionaryFile):
            encoding = operand.encoding_products
        layers = [1]
        for basis_member in rule.rule.basis.members:
            own = basis_member.operand
            if isinstance(own, DictionaryFile):
                layers.append(own.written_layers)
                overcomplete &= not own.crosses_layers
        return _BasisCost(member.size, width, encoding, by_feature, overcomplete, max(layers))

    @property
    def decoding(self) -> int:
        """Multiply-adds of a vector from all coordinates."""
        return self.size * self.width

    @property
    def reconstruction(self) -> int:
        """Multiply-adds of all coordinates of a vector, and of a vector from them."""
        return self.encoding + self.decoding


def encoding_adds(plan: ExperimentPlan, rows: RowTable, *, joined: bool) -> float:
    """Return the multiply-adds of all coordinates that rows read and write.

    Args:
        joined: Whether rows share passes, so that equal vectors are encoded once.
    """
    seen = 0.0
    if plan.observes is not None and plan.observes.rule.basis is not None:
        seen = _observed_adds(plan, plan.observes, rows)
    return seen + sum(
        _rule_adds(plan, rule, rows.take(np.flatnonzero(rule.acts(rows))), joined=joined)
        for rule in plan.rules
        if rule.rule.basis is not None and isinstance(rule.rule.does, CoordinateChange)
    )


def _observed_adds(plan: ExperimentPlan, rule: RulePlan, rows: RowTable) -> float:
    """Return the multiply-adds of coordinates that are observed in each row."""
    if isinstance(rule.rule.does, RowSetObservation):  # computed once for all rows
        return 0.0
    basis = _BasisCost.of(rule)
    counts = np.array([len(coordinate.which) for coordinate in rule.coordinates], dtype=np.int64)
    assert rule.coordinates_of_cell is not None
    named = counts[rule.coordinates_of_cell[rows.cell]]
    alone = (named > 0) & (named <= MAX_GATHERED) & basis.by_feature
    vectors = _vector_counts(rule, rows)
    whole = basis.encoding * _distinct(rule, rows, vectors)
    return float(np.where(alone, named * basis.width * vectors, whole).sum()) * plan.draws


def observation_adds(plan: ExperimentPlan, prompts: Ints) -> float:
    """Return the multiply-adds of observed coordinates: each token's vector is encoded and
    reconstructed once, and encoded again for the selected coordinates."""
    rule = plan.observes
    together = rule is not None and isinstance(rule.rule.does, RowSetObservation)
    if rule is None or rule.rule.basis is None or not together:
        return 0.0
    basis, count = _BasisCost.of(rule), min(plan.n_cells, MAX_GATHERED)
    every = join_positions(rule.positions)
    tokens = sum(len(hit) for row in prompts.tolist() for hit in every.hits[row])
    again = count * basis.width if basis.by_feature else basis.encoding
    runs = 2 if rule.rule.does.reads == "run" else 1
    hits = [every.hits[row] for row in prompts.tolist()]
    context = max(context_adds(member, hits) for member in rule.rule.basis.members)
    return runs * (float(tokens) * (basis.encoding + basis.reconstruction + again) + context)


def unembedding_adds(plan: ExperimentPlan, rows: RowTable, outputs: int) -> float:
    """Return the multiply-adds of an observation that reads vectors through the unembedding.

    Args:
        outputs: Number of logits that are computed of each vector.
    """
    seen = None if plan.observes is None else plan.observes.rule.does
    if not isinstance(seen, Observation) or isinstance(seen, RowSetObservation):
        return 0.0
    if seen.gives != "logits":
        return 0.0
    return float(len(rows)) * plan.draws * plan.experiment.model.shape.d_model * outputs


def context_adds(member: BasisMember, hits: Iterable[Hits]) -> float:
    """Return the multiply-adds of what preceding tokens predict of the tokens of a position.

    Args:
        member: The basis; 0 unless it is a temporal SAE.
        hits: The tokens of each row.
    """
    operand = member.operand
    if not isinstance(operand, DictionaryFile) or not operand.context_layers:
        return 0.0
    ends = (max((token for numbers in row for token in numbers), default=-1) + 1 for row in hits)
    return float(operand.context_products) * sum(ends)


def _rule_adds(plan: ExperimentPlan, rule: RulePlan, rows: RowTable, *, joined: bool) -> float:
    does, basis = rule.rule.does, _BasisCost.of(rule)
    assert isinstance(does, CoordinateChange)
    assert rule.coordinates_of_cell is not None
    vectors = _vector_counts(rule, rows)
    counts = np.array([len(c.which) + len(c.inserted) for c in rule.coordinates], dtype=np.int64)
    named = counts[rule.coordinates_of_cell[rows.cell]]
    alone = (named > 0) & (named <= MAX_GATHERED)
    times = 2 if does.reads in ("run", "donor") else 1
    distinct = _distinct(rule, rows, vectors) if joined else vectors.astype(np.float64)
    if does.operation == "project out":  # products with the directions, and a sum of them
        directions = np.where(named > 0, named, basis.size)
        work = float((directions * (2 + directions) * basis.width * vectors).sum())
    elif does.operation == "reconstruct":
        work = basis.reconstruction * float(distinct.sum())
    else:
        encoded = np.where(alone & basis.by_feature, 0.0, basis.encoding * distinct)
        encoded += np.where(alone & basis.by_feature, named * basis.width * vectors, 0)
        decoded = np.where(alone, named * basis.width, basis.decoding) * vectors
        work = float(((times + basis.layers - 1) * encoded + basis.layers * decoded).sum())
        work += basis.reconstruction * float(distinct.sum()) if does.drops_error else 0.0
    if basis.overcomplete and plan.reconstructed:
        work += basis.reconstruction * float(_distinct(rule, rows, vectors).sum())
    return work * plan.draws


def _vector_counts(rule: RulePlan, rows: RowTable) -> Ints:
    """Return the number of vectors that each row changes. Shape [row]."""
    tokens = rule.written.tokens.counts(rule.written_runs(rows))
    points = np.diff(rule.points.offsets)[rule.site_of_cell[rows.cell]]
    return tokens * points


def _distinct(rule: RulePlan, rows: RowTable, vectors: Ints) -> Floats:
    """Divide the vectors of a row by the number of rows with the same vectors. Shape [row]."""
    places = [rule.site_of_cell[rows.cell], rule.position_of_cell[rows.cell], rows.prompt]
    both = np.stack([*places, rows.alternative])
    _, same, count = np.unique(both, axis=1, return_inverse=True, return_counts=True)
    return vectors / count[same.ravel()]
