"""The cost of what a file declares with `fit(…)`: passes over the model, steps and memory.

Costs are upper bounds: early stopping ends a training before its last step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import comb
from typing import TypeAlias

import numpy as np

from mechdsl.base.text import count_noun
from mechdsl.fits.reports import IndependenceReport, MixtureReport
from mechdsl.models.shape import ModelShape
from mechdsl.planner.cost import (
    DECOMPOSED_TOKENS,
    Cost,
    count_circuit_work,
    count_pattern_rows,
    count_picture_work,
    list_dropped_layers,
    list_fitted_runs,
    run_cost,
)
from mechdsl.planner.pass_cost import PassCost
from mechdsl.planner.plan import PROMPT_TOKENS
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainers import (
    DirectionTrainer,
    EdgeScoreTrainer,
    EdgeSearchTrainer,
    NodeScoreTrainer,
    NodeSearchTrainer,
    PairedTrainer,
    ScoringTrainer,
    SolvedTrainer,
)
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.resolve.circuits import EdgeGraph
from mechdsl.resolve.trainings import (
    count_held_out,
    list_edited_images,
    mask_points,
    moved_positions,
)
from mechdsl.resolve.types import (
    CircuitTargets,
    PlacedEdge,
    ResolvedExperiment,
    SitePoint,
    TrainedDictionary,
    TrainedLens,
    TrainedMask,
    TrainedProbe,
    TrainedRotation,
    TrainedVector,
    Training,
    count_numbers,
)
from mechdsl.vocab.sites import SITES, is_query_or_key, stop_layer

CHUNK_BYTES = 1 << 28
"""Bytes of the vectors of a training that are in memory at once."""

GATHERED_BYTES = 1 << 30
"""Bytes of the vectors of a probe that are in memory at once."""

HELD_OUT_VECTORS = 1 << 16
"""Largest number of held-out vectors, of all layers of a lens together."""

MOST_ASSESSED = 1024
"""`MOST_ASSESSED` of `mechdsl.fits.training`, which imports torch."""

RANDOM_CONTROLS = 8
"""Random vectors that a trained vector is compared with, and random choices of sites of a mask."""

SINGLE_ROWS = 32, 8
"""Largest and smallest number of training rows that effects of single sites are computed on."""

SVD_PRODUCTS = 4
"""Multiply-adds of a singular value decomposition of tall matrices, per row and squared width."""

MIXTURE_STARTS = 50
"""Number of starts of a mixture: `STARTS` of `mechdsl.fits.factors`, which imports torch."""

FLOAT = 4
"""Bytes of a number of a training."""

OnVectors: TypeAlias = TrainedDictionary | TrainedLens
"""Trained on vectors, one by one."""

Declared: TypeAlias = OnVectors | TrainedProbe | TrainedRotation | TrainedVector | TrainedMask


@dataclass(frozen=True)
class TrainingCost:
    """The cost of one training, with its controls."""

    name: str
    """`f[layer 3]`, or the name of a group."""
    rows: int
    """Training rows."""
    held_out: int
    """Rows that `validation` holds out."""
    steps: int
    """Largest number of steps."""
    cost: Cost
    """Passes over the model, and the multiply-adds of the trained weights."""
    memory: int
    """Bytes besides the weights of the model."""
    blocks: int
    """Blocks of the model."""
    assumed: str = ""
    """`55 of 110 edges`, the size that other rows of the plan assume if the training decides it."""


def training_cost(
    name: str,
    made: Declared,
    objective: ResolvedExperiment | None,
    shape: ModelShape,
    reader: TextTokenizer | None = None,
) -> TrainingCost:
    """Return the cost of a training, with that of the vision encoder for vectors or effects of
    patches.

    Args:
        name: Its name in tables.
        objective: The rows, the rule and the measure of a rotation, vector or mask; None for a
            dictionary, a lens or a probe.
        shape: Sizes of the model that runs the rows.
        reader: Its tokenizer, which knows the patches that a resampler reads.
    """
    training, tower = made.training, None
    if training is not None and _reads_vision(training) and not shape.encodes_apart:
        tower = _VisionCost.of(training, objective, shape, reader)
    if isinstance(made, TrainedProbe):
        return _probe_cost(name, made, shape, tower)
    if objective is None:
        assert isinstance(made, OnVectors)
        return _vectors_cost(name, made, shape, tower)
    if isinstance(made, TrainedMask) and made.is_scored:
        if made.noun == "edge":
            return _circuit_cost(name, made, objective, shape, tower)
        return _group_cost(name, made, objective, shape, tower)
    return _effect_cost(name, made, objective, shape, tower)


def _reads_vision(training: Training) -> bool:
    return any(SITES[point.site].stack == "vision" for point in training.points)


@dataclass(frozen=True)
class _VisionCost:
    """The cost of the vision encoder in a training on patches."""

    images: Cost
    """Of all distinct images of the rows, which passes for vectors run."""
    row: Cost
    """Of the images of a row of a batch, on average: edited rows share equal images that get the
    same vectors."""
    above: float
    """Share of the encoder that a gradient passes through down to the lowest site."""
    saved: int
    """Numbers of a row that autograd keeps."""

    @staticmethod
    def of(
        training: Training,
        objective: ResolvedExperiment | None,
        model: ModelShape,
        reader: TextTokenizer | None,
    ) -> _VisionCost:
        """Count the work of a training's rows, in the base run and in the source run."""
        runs, points = [training.sample.run], training.points
        if objective is not None:
            table, points = objective.table, mask_points(objective)
            runs = [table.runs[n] for n in {objective.spec.base, objective.rules[0].run}]
        shape, rows = model.others["vision"], [row for run in runs for row in run.rows]
        seen = {p.picture.content(): p for row in rows for p in row.pictures.values()}
        work = {n: count_picture_work(model, reader, picture) for n, picture in seen.items()}
        per_row = [
            [work[p.picture.content()] for p in row.pictures.values()] for row in runs[0].rows
        ]
        patches = [sum(count for count, _ in each) for each in per_row]
        shared = 1.0
        if objective is not None and not isinstance(training.trainer, ScoringTrainer):
            shared = _share_of_images(training, objective)
        above = max(
            _blocks_above(replace(point, site=SITES[point.site].component), shape)
            for point in points
        )
        return _VisionCost(
            _encode(shape, work.values()),
            _times(_encode(shape, chain(*per_row)), shared / max(1, len(per_row))),
            above / shape.n_layers,
            max(patches, default=0) * above * _saved_numbers(shape, max(patches, default=0)),
        )

    def read(self, share: float) -> Cost:
        """Return the cost of vectors of a share of the rows."""
        return replace(_times(self.images, share), forwards=0)

    def run(self, forward: float, back: float) -> Cost:
        """Return the cost of edited rows.

        Args:
            forward: Number of rows of forward passes.
            back: Number of rows of backward passes.
        """
        return replace(_times(self.row, forward + back * self.above), forwards=0)


def _share_of_images(training: Training, objective: ResolvedExperiment) -> float:
    """Return the number of different edited images, per row, in a random batch of rows."""
    keys, hits = list_edited_images(objective), training.sample.cell.hits
    groups = Counter(key for key, own in zip(keys, hits, strict=True) if own)
    rows = groups.total()
    batch = min(int(training.options["batch"]), rows)
    without = (comb(rows - count, batch) / comb(rows, batch) for count in groups.values())
    return sum(1 - each for each in without) / max(1, batch)


def _encode(shape: ModelShape, work: Iterable[tuple[int, float]]) -> Cost:
    """Return the cost of the blocks of an encoder, from the patches and the multiply-adds of one
    block on each image."""
    costs = list(work)
    layers = shape.n_layers
    tokens, adds = (sum(own) for own in zip(*costs, strict=True)) if costs else (0, 0.0)
    return Cost(tokens=int(tokens) * layers, multiply_adds=adds * layers)


def count_patches(training: Training, shape: ModelShape) -> int:
    """Return how many vectors a training reads for each hit of its position: in a vision encoder,
    one for each patch that a token of an image is made from."""
    in_vision = any(SITES[point.site].stack == "vision" for point in training.points)
    return shape.merged_side**2 // training.sample.cell.vectors if in_vision else 1


def most_vectors(training: Training, shape: ModelShape, size: int) -> int:
    """Return how many vectors of a training, with their targets, take so many bytes."""
    return max(1, size // (FLOAT * count_vector_numbers(training, shape)))


def count_vector_numbers(training: Training, shape: ModelShape) -> int:
    """Return the numbers of a vector of a training with its target."""
    paired = 0 if training.paired is None else training.paired.width
    return sum(count_numbers(point, shape) for point in training.points) + paired


def count_edited_bytes(made: Declared, objective: ResolvedExperiment, shape: ModelShape) -> int:
    """Return the bytes of the vectors that a training on a measure needs in its steps: those that
    it edits, and those that come in for them."""
    assert made.training is not None
    sample, point, rule = made.training.sample, made.training.made, objective.rules[0]
    hits = sum(len(token) for row in sample.cell.hits for token in row)
    hits *= count_patches(made.training, shape)
    numbers = 2 * count_numbers(point, shape)
    fill = None if rule.spec.fill is None else rule.spec.fill.span.written
    if isinstance(made, TrainedMask) and made.noun != "edge" and rule.basis is not None:
        assert rule.sites is not None
        sources = (rule.sites.sources or rule.sites.points).values()
        encoded = next(iter(sources))[0]
        reads = [*dict.fromkeys((point, encoded)), *([] if fill else [encoded])]
        numbers = sum(count_numbers(site_point, shape) for site_point in reads) + 2 * len(
            made.candidates
        )
    elif isinstance(made, TrainedMask):
        whole = dict.fromkeys(
            replace(site_point, unit=None) for site_point in _written_points(made, objective)
        )
        numbers = (
            0 if fill == "zero" else sum(count_numbers(site_point, shape) for site_point in whole)
        )
    return FLOAT * hits * numbers


def _written_points(mask: TrainedMask, objective: ResolvedExperiment) -> Sequence[SitePoint]:
    """Return the sites that a mask writes; of edges, those of their senders and those that
    transcoders of these encode."""
    if mask.noun == "edge":
        circuit = objective.rules[0].circuit
        assert circuit is not None
        read = [SitePoint(of.site, of.layer, of.unit) for of, _ in circuit.every]
        encoded = ((n, feature.member.reads) for (_, n), feature in circuit.features.items())
        return [*read, *(SitePoint(site, layer, None) for layer, site in encoded if site)]
    return mask_points(objective)


def most_held_out(training: Training, shape: ModelShape, size: int) -> int:
    """Return the largest number of held-out vectors; those of a lens take at most so many bytes."""
    if not training.layers:
        return HELD_OUT_VECTORS
    return min(HELD_OUT_VECTORS // len(training.layers), most_vectors(training, shape, size))


def count_scored_rows(
    senders: int, tokens: int, batch: int, shape: ModelShape, *, attended: int = 0
) -> int:
    """Return the number of rows in a pass that scores edges: at most those for which the outputs of
    all senders fit into `CHUNK_BYTES`.

    Args:
        senders: Number of senders of edges.
        tokens: Largest number of tokens of a row at which edges carry other values.
        batch: Largest number of rows.
        attended: Largest number of tokens of a row whose attention weights are read.
    """
    size = FLOAT * senders * shape.d_model * max(1, tokens)
    heads, layers = shape.largest(lambda block: block.heads), shape.n_layers
    fit = count_pattern_rows(attended**2 * heads, layers) if attended else batch
    return max(1, min(batch, fit, CHUNK_BYTES // size))


def count_decomposed_parts(rows: int, longest: int) -> int:
    """Return the number of irrelevant parts of each row in a pass of contextual decomposition.

    Args:
        rows: Number of rows.
        longest: Largest number of tokens of a row.
    """
    return max(1, DECOMPOSED_TOKENS // max(1, rows * longest) - 1)


def _count_points(made: TrainedMask, objective: ResolvedExperiment) -> int:
    """Return how often a training of scores of edges takes gradients."""
    trainer, circuit = made.training.trainer_of(EdgeScoreTrainer), objective.rules[0].circuit
    assert circuit is not None
    if trainer.decomposes:
        return 0
    points = trainer.steps(made.training.of_trainer)
    if trainer.path == "activations":
        points = 1 + (points - 1) * len({(of.site, of.layer) for of, _ in circuit.every})
    return points * (len(list_dropped_layers(objective)) if trainer.drops_layers else 1)


def _count_reads(
    made: TrainedMask, circuit: CircuitTargets, rows: int, longest: int
) -> tuple[int, int, int]:
    """Return (number of passes without gradients that score edges, number of prompts of a row in
    all of them, number of edges whose attention weights are read): 0 if scores are gradients alone.

    With exact attention weights, these are the clean run, and for each sender a pass that changes
    queries and one that changes keys. Decomposed activations need a pass for the clean run, and
    passes with a copy of the row for the clean run, one for each of some senders, or for each of
    some edges at their positions, except those into queries and keys.

    Args:
        rows: Largest number of rows of a pass.
        longest: Largest number of tokens of a row.
    """
    trainer = made.training.trainer
    if not isinstance(trainer, EdgeScoreTrainer):
        return 0, 0, 0
    if trainer.decomposes:
        placed = [
            candidate.edge for candidate in made.candidates if isinstance(candidate, PlacedEdge)
        ]
        edges = placed or [
            candidate for candidate in made.candidates if isinstance(candidate, tuple)
        ]
        into = sum(not is_query_or_key(to.site) for _, to in edges)
        copies = len({of for of, _ in circuit.every}), into
        most = count_decomposed_parts(rows, longest)
        passes = 1 + sum(-(-count // most) for count in copies)
        return passes, passes + sum(copies), 0
    if not trainer.fixes_attention:
        return 0, 0, 0
    ends = [(of, SITES[to.site].component) for of, to in circuit.every if is_query_or_key(to.site)]
    return 1 + len({*ends}), 1 + len({*ends}), len(ends)


def count_single_rows(sites: int, rows: int, steps: int, batch: int) -> int:
    """Return the number of training rows that effects of single sites are computed on; 0 if they
    would cost more rows than the training.

    Args:
        sites: Sites that a mask chooses from.
        rows: Training rows.
    """
    most, least = SINGLE_ROWS
    few = min(most, steps * batch // sites, rows)
    return few if few >= min(least, rows) else 0


# --- vectors --------------------------------------------------------------------------------------


def _vectors_cost(
    name: str, made: OnVectors, shape: ModelShape, tower: _VisionCost | None
) -> TrainingCost:
    """Return the cost of vectors, read in chunks, and of the steps on them."""
    training = made.training
    assert training is not None
    if training.decoder is not None:
        assert isinstance(made, TrainedDictionary)
        return _decoder_cost(name, made, training.decoder.features, shape)
    sample, options = training.sample, training.options
    counts = np.array([sum(map(len, runs)) for runs in sample.cell.hits]) * sample.run.draws
    counts *= count_patches(training, shape)
    known = int((counts > 0).sum())
    rows = known if training.stream is None else training.stream.count
    held_out = count_held_out(training, rows)
    each = int(counts.sum()) / max(1, known)
    vectors, tested = (
        (rows - held_out) * each,
        min(held_out * each, most_held_out(training, shape, CHUNK_BYTES)),
    )
    steps, batch = int(options["steps"]), int(options.get("batch", 0))
    every = batch * int(options.get("accumulate", 1))
    in_memory = min(vectors, most_vectors(training, shape, CHUNK_BYTES))
    read = in_memory if vectors <= in_memory else max(1, -(-steps * every // in_memory)) * in_memory
    ((run, stop),) = list_fitted_runs([(training.points, (sample,))], shape)
    share = (read + tested) / max(1.0, float(counts.sum()))
    passes = _times(run_cost(shape, run, stop), share)
    passes += Cost() if tower is None else tower.read(share)
    paired = training.paired
    if paired is not None and paired.sample is not None and paired.shape is not None:
        assert paired.point is not None
        ((run, stop),) = list_fitted_runs([((paired.point,), (paired.sample,))], paired.shape)
        passes += _times(run_cost(paired.shape, run, stop), share)
    sizes = _sizes(made, training, shape)
    seen = min(batch or vectors, vectors)  # a factorization uses all vectors in every step
    adds = (
        steps * min(every or vectors, vectors) * sizes.step
        + 2 * tested * sizes.products
        + in_memory * sizes.once
    )
    memory = FLOAT * ((in_memory + tested) * sizes.vector + 4 * sizes.weights)
    memory += FLOAT * max(seen, min(tested, MOST_ASSESSED)) * sizes.kept
    cost = Cost(forwards=passes.forwards, tokens=passes.tokens, multiply_adds=passes.multiply_adds)
    cost += Cost(multiply_adds=adds)
    return TrainingCost(name, rows - held_out, held_out, steps, cost, int(memory), shape.n_layers)


def _decoder_cost(
    name: str, made: TrainedDictionary, directions: int, shape: ModelShape
) -> TrainingCost:
    """Return the cost of a training on the decoder of a dictionary, and of its control, which is
    trained in the same way; the model isn't run."""
    training = made.training
    assert training is not None
    held_out, sizes = count_held_out(training, directions), _sizes(made, training, shape)
    steps, batch = int(training.options["steps"]), int(training.options["batch"])
    trained = directions - held_out
    seen = min(batch, trained)
    every = min(batch * int(training.options["accumulate"]), trained)
    adds = 2 * (steps * every * sizes.step + 2 * held_out * sizes.products)
    memory = directions * (made.width_in + sizes.vector) + 4 * sizes.weights
    memory += max(seen, min(held_out, MOST_ASSESSED)) * sizes.kept
    cost = Cost(multiply_adds=adds)
    return TrainingCost(name, trained, held_out, steps, cost, FLOAT * memory, shape.n_layers)


def _probe_cost(
    name: str, made: TrainedProbe, shape: ModelShape, tower: _VisionCost | None
) -> TrainingCost:
    """Return the cost of a probe and of its control with shuffled values, which are both solved:
    a singular value decomposition for each site."""
    training = made.training
    sample = training.sample
    rows = sum(1 for runs in sample.cell.hits if any(runs))
    held_out = count_held_out(training, rows)
    gathered = FLOAT * rows * sum(made.widths)
    ((run, stop),) = list_fitted_runs([(training.inputs, (sample,))], shape)
    times = max(1, -(-gathered // GATHERED_BYTES))
    cost = _times(run_cost(shape, run, stop), times)
    cost += Cost() if tower is None else tower.read(times)
    adds = 2 * SVD_PRODUCTS * rows * sum(width * width for width in made.widths)
    cost += Cost(multiply_adds=adds)
    memory = min(gathered, GATHERED_BYTES) + 4 * FLOAT * rows * max(made.widths)
    return TrainingCost(name, rows - held_out, held_out, 1, cost, memory, shape.n_layers)


@dataclass(frozen=True)
class _Sizes:
    """Numbers and multiply-adds of a training on vectors."""

    vector: int
    """Numbers in memory of a vector with its target and copies."""
    weights: int
    products: int
    """Multiply-adds of a vector in a forward pass through what is trained."""
    step: int
    """Multiply-adds of a vector in a step."""
    once: int = 0
    """Multiply-adds of a vector before the first step."""
    kept: int = 0
    """Numbers of a vector that autograd keeps in a step."""


def _sizes(made: OnVectors, training: Training, shape: ModelShape) -> _Sizes:
    if isinstance(made, TrainedLens):
        layers, width = len(training.layers), shape.d_model
        weights, logits = layers * width * (width + 1), (layers + 1) * shape.vocab_size
        products = weights + logits * width
        kept = 2 * logits + 3 * layers * width
        return _Sizes(2 * (layers + 1) * width, weights, products, 3 * products, kept=kept)
    if isinstance(training.trainer, SolvedTrainer | PairedTrainer):
        return _sizes_of_solution(made, training.trainer)
    if made.crosses_layers:
        return _sizes_across_layers(made, len(training.outputs))
    widths = made.width_in + made.width_out
    weights = made.features * widths
    vector = widths if training.encoded != training.made else made.width_in
    return _Sizes(2 * vector, weights, weights, 3 * weights, kept=3 * made.features + widths)


def _sizes_across_layers(made: TrainedDictionary, layers: int) -> _Sizes:
    """Return the sizes of a cross-layer transcoder, whose features write to their layer and all
    later ones. After the training, a layer's features are computed for each of these again."""
    pairs, count = layers * (layers + 1) // 2, made.features
    vector = layers * (made.width_in + made.width_out)
    weights = count * (layers * made.width_in + pairs * made.width_out)
    assessed = count * pairs * (made.width_in + made.width_out)
    kept = 3 * layers * count + vector
    return _Sizes(2 * vector, weights, assessed, 3 * weights, kept=kept)


def _sizes_of_solution(made: TrainedDictionary, trainer: SolvedTrainer | PairedTrainer) -> _Sizes:
    """Return the sizes of a dictionary that is computed from all vectors together, in 64 bits: some
    copies of the vectors and two of their coordinates."""
    width, count = made.width_in, made.features
    copies = trainer.copies if isinstance(trainer, SolvedTrainer) else SolvedTrainer.copies
    vector, weights = (1 + 2 * copies) * width + 4 * count, 2 * width * count
    decomposition = SVD_PRODUCTS * width * width
    if isinstance(trainer, PairedTrainer):  # both sets of vectors, also shuffled
        return _Sizes(2 * vector, 2 * weights, 2 * weights, 0, once=4 * decomposition)
    if trainer.report is IndependenceReport:
        return _Sizes(vector, weights, weights, 2 * count * count, once=3 * decomposition)
    if trainer.report is MixtureReport:  # of several starts, also for shuffled vectors
        full = made.covariance == "full"
        weights = count * width * (width if full else 2)
        step = 4 * MIXTURE_STARTS * weights
        return _Sizes(vector, weights, weights, step, once=decomposition)
    return _Sizes(vector, weights, weights, 3 * width * count + 2 * count * count)


def _times(cost: Cost, share: float) -> Cost:
    """Return the cost of a share of a run's prompts, in batches of `PROMPT_TOKENS`."""
    tokens = int(cost.tokens * share)
    return Cost(
        forwards=-(-tokens // PROMPT_TOKENS),
        tokens=tokens,
        multiply_adds=cost.multiply_adds * share,
    )


# --- effects --------------------------------------------------------------------------------------


def _effect_cost(
    name: str,
    made: Declared,
    objective: ResolvedExperiment,
    shape: ModelShape,
    tower: _VisionCost | None,
) -> TrainingCost:
    """Return the cost of steps that run the model forward and backward."""
    training = made.training
    assert training is not None
    options, table = training.options, objective.table
    base, source = table.runs[objective.spec.base], table.runs[objective.rules[0].run]
    there = [row for row, hits in enumerate(training.sample.cell.hits) if hits]
    rows = len(there) - count_held_out(training, len(there))
    held_out = len(there) - rows
    steps, batch = int(options["steps"]), min(int(options["batch"]), rows)
    every = min(int(options["batch"]) * int(options["accumulate"]), rows)
    points = mask_points(objective) if isinstance(made, TrainedMask) else (training.made,)
    above = max(_share_above(point, shape, base) for point in points)
    runs = {atom.run for atom in objective.measures[0].atoms}
    compared = runs - {None, base.name}
    measured = (held_out or rows) * _count_controls(made, objective)
    if isinstance(made, TrainedMask):
        size = len(made.candidates)
        measured += size * count_single_rows(size, rows, steps, int(options["batch"]))
    if "patience" in options:
        measured += 20 * held_out
    whole = run_cost(shape, base, None)
    row, circuit = _per_row(whole, base), objective.rules[0].circuit
    hits = sum(len(token) for row in there for token in training.sample.cell.hits[row])
    hits *= count_patches(training, shape)
    written = hits / max(1, len(there))
    if circuit is not None:
        work = _count_edge_work(training.sample.run, training.sample.cell, circuit, shape)
        row += Cost(multiply_adds=written * work)
    forward = (steps * every + measured) * (1 + len(compared))
    backwards = steps * -(-every // batch) if batch else steps
    passes = backwards * (1 + len(compared)) + -(-measured * (1 + len(compared)) // batch)
    back = steps * every * above
    again = (steps * every + measured) / max(1, len(there))
    vectors, share = _count_vectors(made, objective, shape, again)
    stop = _stop(points[-1], shape)
    reads = [_times(run_cost(shape, run, stop), share) for run in (base, source)]
    cost = Cost(
        forwards=passes,
        tokens=int((forward + back) * row.tokens),
        multiply_adds=(forward + back) * row.multiply_adds,
        backwards=backwards,
    )
    cost = sum(reads, cost)
    longest = int(base.lengths[there].max(initial=1))
    saved = longest * above * shape.depth * _saved_numbers(shape, longest)
    if tower is not None:
        cost += tower.read(share) + tower.run(steps * every + measured, steps * every)
        saved += tower.saved
    saved += 0 if circuit is None else written * _saved_by_edges(circuit, shape)
    memory = vectors + FLOAT * batch * saved
    return TrainingCost(name, rows, held_out, steps, cost, int(memory), shape.n_layers)


def _reads_again(made: Declared, objective: ResolvedExperiment) -> bool:
    """Whether each step reads the vectors of its rows again if not all are in memory: not if only
    means over rows come in."""
    rule = objective.rules[0]
    return not isinstance(made, TrainedMask) or rule.basis is not None or rule.spec.fill is None


def _circuit_cost(
    name: str,
    made: TrainedMask,
    objective: ResolvedExperiment,
    shape: ModelShape,
    tower: _VisionCost | None,
) -> TrainingCost:
    """Return the cost of scores of edges or of a search, and of the table of `mechdsl fit`."""
    training, table, circuit = made.training, objective.table, objective.rules[0].circuit
    assert circuit is not None
    trainer, batch = training.trainer_of(ScoringTrainer), int(training.options["batch"])
    base, source = table.runs[objective.spec.base], table.runs[objective.rules[0].run]
    moved = training.sample.cell
    tokens = [sum(map(len, hits)) for hits in moved.hits]
    there = [row for row, count in enumerate(tokens) if count]
    held_out = count_held_out(training, len(there))
    rows = len(there) - held_out
    written, senders = sum(tokens) / max(1, len(there)), {of for of, _ in circuit.every}
    points = tried = 0
    if isinstance(trainer, EdgeScoreTrainer):
        if trainer.path is not None:
            moved, _ = moved_positions(objective)
            tokens = [sum(map(len, hits)) for hits in moved.hits]
        points = _count_points(made, objective)
        if trainer.faithfulness(training.of_trainer) is not None:
            tried = len(made.candidates)
    else:
        tried = _count_tried_circuits(made, circuit, shape)
    longest = int(base.lengths[there].max(initial=1))
    reads, lanes, attended = _count_reads(made, circuit, min(rows, batch), longest)
    most, read = max(tokens, default=1), longest if attended else 0
    size = count_scored_rows(len(senders), most, batch, shape, attended=read)
    compared = len({atom.run for atom in objective.measures[0].atoms} - {None, base.name})
    measured = (held_out or rows) * _count_controls(made, objective) * (1 + compared)
    measured += tried * rows * (1 if rows <= batch else 1 + compared)
    row = _per_row(run_cost(shape, base, None), base)
    scored, ablated = (
        _count_edge_work(training.sample.run, cell, circuit, shape)
        for cell in (moved, training.sample.cell)
    )
    backwards, whole = points * -(-rows // size), (points * 2 + compared + lanes) * rows + measured
    width = shape.average(lambda block: block.d_head)
    scored = points * scored + attended * shape.d_model * (1 + width)
    cost = Cost(
        forwards=backwards + (compared + reads) * -(-rows // size) + -(-measured // batch),
        tokens=int(whole * row.tokens),
        multiply_adds=whole * row.multiply_adds
        + rows * scored * sum(tokens) / max(1, len(there))
        + measured * ablated * written,
        backwards=backwards,
    )
    cost += _times(run_cost(shape, source, None), 1.0)
    if tower is not None:
        cost += tower.read(1.0) + tower.run(points * rows + measured, points * rows)
    vectors = min(count_edited_bytes(made, objective, shape), CHUNK_BYTES)
    saved = longest * shape.n_layers * _saved_numbers(shape, longest)
    saved += most * len(senders) * _find_width(circuit, shape) + (tower.saved if tower else 0)
    memory = max(size * saved, batch * written * _saved_by_edges(circuit, shape))
    assumed = "" if made.is_trained else _assume_size(made)
    given = name, rows, held_out, points or tried or 1, cost, int(vectors + FLOAT * memory)
    return TrainingCost(*given, shape.n_layers, assumed)


def _count_tried_circuits(made: TrainedMask, circuit: CircuitTargets, shape: ModelShape) -> int:
    """Return how many circuits a search measures."""
    trainer = made.training.trainer_of(EdgeSearchTrainer)
    graph = EdgeGraph(shape, circuit.neurons, circuit.features, stack=circuit.stack)
    tried = len(graph.list_search_steps(trainer.levels, made.candidates))
    left = trainer.size(made.training.of_trainer)
    return tried if left is None else (tried * (tried + 1) - left * (left + 1)) // 2


def _group_cost(
    name: str,
    made: TrainedMask,
    objective: ResolvedExperiment,
    shape: ModelShape,
    tower: _VisionCost | None,
) -> TrainingCost:
    """Return the cost of scores of nodes or of a search, and of the table of `mechdsl fit`."""
    training, table = made.training, objective.table
    trainer, batch = training.trainer_of(ScoringTrainer), int(training.options["batch"])
    base, source = table.runs[objective.spec.base], table.runs[objective.rules[0].run]
    there = [row for row, hits in enumerate(training.sample.cell.hits) if hits]
    held_out = count_held_out(training, len(there))
    rows = len(there) - held_out
    points = mask_points(objective)
    above = [_share_above(point, shape, base) for point in points]
    count, tried = 1, 0
    if isinstance(trainer, NodeScoreTrainer):
        steps = trainer.steps(training.of_trainer)
        if trainer.integrates:
            count = steps * len({(point.site, point.layer) for point in points})
        if trainer.faithfulness(training.of_trainer) is not None:
            tried = len(made.candidates) + 2
    else:
        assert isinstance(trainer, NodeSearchTrainer)
        size = trainer.size(training.of_trainer)
        count, tried = 0, 1 + sum(len(made.candidates) - number for number in range(size))
        steps = tried
    compared = len({atom.run for atom in objective.measures[0].atoms} - {None, base.name})
    measured = (held_out or rows) * _count_controls(made, objective) + tried * rows
    row = _per_row(run_cost(shape, base, None), base)
    forwards = (count * rows + measured) * (1 + compared)
    backwards = count * -(-rows // batch)
    whole = forwards + count * rows * max(above)
    cost = Cost(
        forwards=backwards * (1 + compared) + -(-measured * (1 + compared) // batch),
        tokens=int(whole * row.tokens),
        multiply_adds=whole * row.multiply_adds,
        backwards=backwards,
    )
    again = (count * rows + measured) / max(1, len(there))
    vectors, share = _count_vectors(made, objective, shape, again)
    stop = _stop(points[-1], shape)
    cost = sum((_times(run_cost(shape, run, stop), share) for run in (base, source)), cost)
    longest = int(base.lengths[there].max(initial=1))
    saved = longest * max(above) * shape.depth * _saved_numbers(shape, longest)
    if tower is not None:
        cost += tower.read(share) + tower.run(count * rows + measured, count * rows)
        saved += tower.saved
    memory = vectors + FLOAT * min(batch, rows) * saved
    assumed = "" if made.is_trained else _assume_size(made)
    return TrainingCost(name, rows, held_out, steps, cost, int(memory), shape.n_layers, assumed)


def _count_vectors(
    made: Declared, objective: ResolvedExperiment, shape: ModelShape, again: float
) -> tuple[int, float]:
    """Return (bytes of the other run's vectors in memory, number of times that runs are computed
    for them).

    Args:
        again: This number if vectors don't fit, and rows read them again.
    """
    vectors = count_edited_bytes(made, objective, shape)
    if vectors <= CHUNK_BYTES:
        return vectors, 1.0
    return CHUNK_BYTES, again if _reads_again(made, objective) else 1.0


def _assume_size(made: TrainedMask) -> str:
    """Return `55 of 110 edges` if the training decides the size, or `12 edges at one position each`
    if it decides the number of different edges; empty otherwise."""
    size = made.training.trainer_of(ScoringTrainer).size(made.training.of_trainer)
    if size is not None:
        edges = {edge.edge for edge in made.chosen if isinstance(edge, PlacedEdge)}
        return f"{count_noun(size, 'edge')} at one position each" if 1 < len(edges) == size else ""
    return f"{len(made.chosen):,} of {count_noun(len(made.candidates), made.noun)}"


def _count_controls(made: Declared, objective: ResolvedExperiment) -> int:
    """Return how often the table of `mechdsl fit` measures every held-out row."""
    if isinstance(made, TrainedRotation):
        return 4  # trained, random, no patch, whole
    own = RANDOM_CONTROLS + 2  # trained, and nothing
    if isinstance(made, TrainedMask):  # all, and single effects of a mask or the group itself
        return own + 1 + (made.noun != "edge" or not made.is_scored)
    assert made.training is not None
    if isinstance(made, TrainedVector) and made.role == "scales":
        return own + 2  # the mean scale, and 0
    if isinstance(made, TrainedVector) and made.role == "edit":
        return own + RANDOM_CONTROLS + 1  # random edits, and the mean of what it adds
    trainer = made.training.trainer
    assert isinstance(trainer, DirectionTrainer)
    if trainer.count_tokens(made.training.of_trainer) is not None:
        return own + (objective.spec.base != CLEAN)  # the clean run
    return own + (objective.spec.source is not None)  # the mean difference


def _per_row(cost: Cost, run: PromptRun) -> Cost:
    """Return the mean cost of a prompt of a run."""
    count = max(1, len(run.lengths))
    return Cost(tokens=round(cost.tokens / count), multiply_adds=cost.multiply_adds / count)


def _stop(point: SitePoint, shape: ModelShape) -> int:
    """Return the number of blocks of the language model before a site can be read."""
    if SITES[point.site].stack == "vision":
        return 0
    layer = stop_layer(point.site, point.layer, shape.n_layers)
    return shape.n_layers if layer is None else min(layer, shape.n_layers)


def _blocks_above(point: SitePoint, shape: ModelShape) -> int:
    """Return the number of blocks that a gradient passes through down to a site."""
    own = SITES[point.site].when == "inside" and point.site != "mlp_out"  # its block is passed, too
    return min(shape.n_layers, shape.n_layers - _stop(point, shape) + own)


def _share_above(point: SitePoint, shape: ModelShape, run: PromptRun) -> float:
    """Return the share of a forward pass that a gradient passes through down to a site.

    In an encoder-decoder, a gradient passes the decoder before it reaches the encoder.
    """
    if not shape.encodes_apart:
        return _blocks_above(point, shape) / shape.n_layers
    kind, count = SITES[point.site], PassCost.of(shape)
    encoder, whole = (
        float(count.whole(run.lengths, run.sources, stop)[1].sum()) for stop in (0, None)
    )
    if kind.stack == "encoder":
        model_shape = shape.others["encoder"]
        below = model_shape.n_layers - _blocks_above(
            replace(point, site=kind.component), model_shape
        )
        return 1 - encoder * below / model_shape.n_layers / max(1.0, whole)
    return _blocks_above(point, shape) / shape.n_layers * (1 - encoder / max(1.0, whole))


def _count_edge_work(
    run: PromptRun, cell: PositionCell, circuit: CircuitTargets, shape: ModelShape
) -> float:
    """Count the multiply-adds of all edges for each token of a position, on average."""
    encoded = [
        token < row.source
        for row, hits in zip(run.rows, cell.hits, strict=True)
        for token in chain.from_iterable(hits)
    ]
    return count_circuit_work(circuit, shape, sum(encoded) / max(1, len(encoded)))


def _saved_by_edges(circuit: CircuitTargets, shape: ModelShape) -> int:
    """Return how many numbers per written token autograd keeps for a mask of edges: the outputs of
    senders, the sums and norms of receivers, and the mask, two times."""
    senders = {of for of, _ in circuit.every}
    receivers = {to for _, to in circuit.every}
    ends = len(senders) + 3 * len(receivers)
    return ends * _find_width(circuit, shape) + 2 * len(senders) * len(receivers)


def _find_width(circuit: CircuitTargets, shape: ModelShape) -> int:
    """Return the width of the stream that edges are in."""
    return shape.others.get(circuit.stack, shape).d_model


def _saved_numbers(shape: ModelShape, tokens: int) -> int:
    """Return how many numbers per token autograd keeps in a block: inputs of norms and matrix
    products, attention patterns, and the parts of the MLP's activation."""
    per_block = shape.average(lambda b: 4 * b.queries + 4 * b.neurons + 2 * b.heads * tokens)
    return 8 * shape.d_model + per_block
