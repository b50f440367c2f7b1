"""The cost of a panel: rows, tokens per block, multiply-adds; shared rows count once.

Costs are counted on the actual rows, with the masks that the packed run computes with; only the
size of an MLP is an estimate.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.dictionaries.folder import MAX_GATHERED, DictionaryFile
from mechdsl.images.layouts import PromptPicture
from mechdsl.models.circuit_graph import CircuitGraph, CircuitNode
from mechdsl.models.restart import (
    FULL_PASS,
    HeldSublayers,
    RowMasks,
    Shortcuts,
    TokenMask,
    block_work,
)
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.pass_cost import (
    BlockCost,
    PassCost,
    encoding_adds,
    has_normed_sums,
    observation_adds,
    unembedding_adds,
)
from mechdsl.planner.plan import (
    BATCH_ROWS,
    VECTORS_PER_TOKEN,
    ExperimentPlan,
    Panel,
    WholeCells,
    batch_size,
    cell_sites,
    collect_whole_cells,
    count_sweeps,
    external_runs,
    is_read_only,
)
from mechdsl.planner.rows import (
    EdgeEnds,
    RaggedColumn,
    RowTable,
    RulePlan,
    TokenHits,
    iter_basis_fits,
    number_edge_ends,
)
from mechdsl.prompts.runs import (
    PromptRun,
    ReplyPosition,
    RunRow,
    count_worthwhile_copies,
    share_beginnings,
)
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.resolve.runs import reads_reply_tokens
from mechdsl.resolve.types import (
    BasisTargets,
    CircuitTargets,
    Coordinates,
    FeatureNodes,
    FitSample,
    JacobianBasis,
    ResolvedExperiment,
    SiteLayer,
    SitePoint,
    count_numbers,
    find_image_layout,
    is_neuron,
    iter_fitted_vectors,
)
from mechdsl.vocab.sites import SITES, is_query_or_key, stop_layer


@dataclass(frozen=True, eq=False)
class SharedRows:
    """The distinct rows of some experiments on the same prompts."""

    owner: Ints
    """Index of the experiment that defines the writes, shape [distinct]."""
    rows: RowTable
    """The rows, with the indices of their experiment, shape [distinct]."""
    members: tuple[tuple[Ints, RowTable], ...]
    """Per experiment: the index of each row's distinct row, and the rows."""

    def __len__(self) -> int:
        return len(self.owner)


class RowSharer:
    """Finds equal rows of the experiments of a panel."""

    def __init__(
        self,
        plans: Sequence[ExperimentPlan],
        *,
        share: bool,
        cells: Sequence[Mapping[int, WholeCells]] | None = None,
        kept: Sequence[Ints] | None = None,
    ) -> None:
        """Prepare the keys of rows.

        Args:
            cells: Per plan, the result of `collect_whole_cells`; None if all rows are in the cells.
            kept: Per plan, the rows that means and donors are over; None for all rows.
        """
        self.plans = plans
        self._cells = [_of_all(plan) for plan in plans] if cells is None else cells
        self.share = share
        self._numbers: dict[Hashable, int] = {}
        of = [b"" for _ in plans] if kept is None else [each.tobytes() for each in kept]
        self._keys = [
            [self._rule(rule, own) for rule in plan.rules]
            for plan, own in zip(plans, of, strict=True)
        ]

    def of(self, rows: Sequence[RowTable]) -> SharedRows:
        """Return the rows of the experiments, with equal rows once."""
        owner = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        every = RowTable(
            *(
                np.concatenate([getattr(one, name) for one in rows])
                for name in ("cell", "prompt", "alternative")
            )
        )
        first = inverse = np.arange(len(owner))
        if self.share and len(owner):
            columns = [self._columns(number, one) for number, one in enumerate(rows)]
            code = combine_columns(columns, [len(one) for one in rows])
            _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        ends = np.cumsum([len(one) for one in rows])[:-1]
        return SharedRows(
            owner[first],
            every.take(first),
            tuple(zip(np.split(inverse, ends), rows, strict=True)),
        )

    def _columns(self, number: int, rows: RowTable) -> list[Ints]:
        """Return the columns that identify a row of an experiment."""
        plan = self.plans[number]
        runs = np.array([self._number(id(run)) for run in plan.starting_runs], dtype=np.int64)
        draws = np.full(len(rows), plan.draws)
        columns = [runs[plan.starting_run(rows)], draws, rows.prompt, self._drawn(plan, rows)]
        either: dict[str, int] = {}
        for place, rule in enumerate(plan.rules):
            if rule.rule.does.changes == "nothing":  # observations don't change the row
                continue
            numbers = self._of_rule(number, place, rows)
            if rule.rule.only is not None:  # alternatives share columns, as each row has one
                begin = either.setdefault(rule.rule.only.axis, len(columns))
                before = columns[begin : begin + len(numbers)] or [np.full(len(rows), -1)] * len(
                    numbers
                )
                acts = rule.acts(rows)
                numbers = [np.where(acts, a, b) for a, b in zip(numbers, before, strict=True)]
                columns[begin : begin + len(numbers)] = numbers
            else:
                columns += numbers
        return columns

    def _drawn(self, plan: ExperimentPlan, rows: RowTable) -> Ints:
        """Return a number for each row's sampling seed, in addition to the prompt. Shape [row]."""
        said = plan.experiment.generation
        if said is None or not said.sampled:
            return np.zeros(len(rows), dtype=np.int64)
        cells, inverse = np.unique(rows.cell, return_inverse=True)
        numbers = [self._number(("drawn", plan.content(cell))) for cell in cells.tolist()]
        return np.array(numbers, dtype=np.int64)[inverse]

    def _of_rule(self, number: int, place: int, rows: RowTable) -> list[Ints]:
        """Return the columns for a rule's effect on each row."""
        rule, key = self.plans[number].rules[place], self._keys[number][place]
        position = rule.position_of_cell[rows.cell]
        columns = [
            np.full(len(rows), key.does),
            key.points[rule.site_of_cell[rows.cell]],
            key.written[rule.written_runs(rows)],
        ]
        if key.whole is None:
            run = rule.read.run(position, rows.prompt, rows.alternative)
            columns.append(key.read[run])
        else:
            columns.append(key.whole[position])
        # The first columns identify the rule and thus the columns that follow.
        if place in self._cells[number]:
            columns.append(self._of_cell(rule, self._cells[number][place], rows))
        columns.append(rule.follow(rows))
        if key.keys is not None:
            columns.append(key.keys[rule.key_runs(rows)])
        if rule.rule.amounts is not None:
            columns.append(key.amounts[rows.cell])
        if rule.steps is not None:
            columns += list(rule.steps[rows.cell].T)
        if key.directions is not None:
            columns.append(key.directions[rows.cell])
        if key.coordinates is not None:
            columns.append(key.coordinates[rows.cell])
        if rule.paths is not None and key.receivers is not None:
            columns.append(key.receivers[rule.paths.pair_of_cell[rows.cell]])
        if rule.paths is not None and key.receiving is not None:
            columns.append(key.receiving[rows.cell])
        return columns

    def _of_cell(self, rule: RulePlan, cells: WholeCells, rows: RowTable) -> Ints:
        """Return a number for all rows of each row's cell. Shape [row]."""
        tokens = rule.read.tokens
        numbers = [
            self._number(
                (
                    "cell",
                    cell.prompts.tobytes(),
                    tokens.counts(cell.runs).tobytes(),
                    tokens.expand(cell.runs)[1].tobytes(),
                )
            )
            for cell in cells.cells
        ]
        return np.array(numbers, dtype=np.int64)[cells.of_cell[rows.cell]]

    def _rule(self, rule: RulePlan, kept: bytes) -> _RuleKey:
        does = rule.rule.does
        pairs = list(zip(rule.point_table, rule.source_table, strict=True))
        points: list[Hashable] = [
            tuple(pairs[i] for i in _list(rule.points, key))
            for key in range(len(rule.points.offsets) - 1)
        ]
        for key, ends in enumerate(rule.edge_ends):  # without the last one, where it doesn't act
            circuit = rule.rule.circuit
            assert circuit is not None
            nodes = (
                *circuit.neurons.items(),
                *(
                    (n, feature.member.name, feature.which)
                    for n, feature in circuit.features.items()
                ),
            )
            points[key] = (nodes, *(self._edges(*end) for end in ends))
        receivers = receiving = None
        if rule.paths is not None:
            paths = rule.paths
            named = paths.coordinates, paths.coordinates_of_cell
            receiving = self._coordinates(rule.rule.receiving_basis, *named)
            ends = [
                tuple(paths.table[i] for i in _list(paths.points, key))
                for key in range(len(paths.points.offsets) - 1)
            ]
            receivers = np.array([self._number(("to", end)) for end in ends], dtype=np.int64)
        whole = None
        if does.over_rows:
            cells = zip(rule.positions, rule.sources, strict=True)
            numbers = [self._number((to.hits, of.hits, kept)) for to, of in cells]
            whole = np.array(numbers, dtype=np.int64)
        return _RuleKey(
            self._number(
                (
                    *(does.name, does.mode, does.key(rule.rule)),
                    *(rule.steps is None, rule.rule.after_prefill),
                )
            ),
            np.array([self._number(one) for one in points], dtype=np.int64),
            self._written(rule),
            self._tokens(rule.read),
            whole,
            None if rule.keys is None else self._tokens(rule.keys),
            np.array([self._number(("amount", one)) for one in rule.amounts.tolist()]),
            self._directions(rule),
            self._coordinates(rule.rule.basis, rule.coordinates, rule.coordinates_of_cell),
            receivers,
            receiving,
        )

    def _edges(self, senders: EdgeEnds, receivers: EdgeEnds) -> Hashable:
        """Return what is equal for equal sets of edges."""
        of, to = (
            np.array([self._number(point) for point in ends.points], dtype=np.int64)[ends.of_edge]
            for ends in (senders, receivers)
        )
        return "edges", np.unique((of << 32) + to).tobytes()

    def _directions(self, rule: RulePlan) -> Ints | None:
        """Return a number for each cell's direction. Shape [cell]."""
        if rule.direction_of_cell is None:
            return None
        numbers = [self._number(("direction", member.name)) for member in rule.directions]
        return np.array(numbers, dtype=np.int64)[rule.direction_of_cell]

    def _coordinates(
        self, basis: BasisTargets | None, named: Sequence[Coordinates], of_cell: Ints | None
    ) -> Ints | None:
        """Return a number for the coordinates of each cell. Shape [cell].

        Args:
            basis: The basis of the coordinates.
            named: Sets of coordinates.
            of_cell: [cell] index into them.
        """
        if basis is None or of_cell is None:
            return None
        names = [
            tuple((key, member.name) for key, member in bases.items()) for bases in basis.bases
        ]
        numbers = [
            self._number(
                (
                    "coordinates",
                    names[coordinates.basis],
                    coordinates.which,
                    coordinates.inserted and names[-1],
                    coordinates.inserted,
                )
            )
            for coordinates in named
        ]
        return np.array(numbers, dtype=np.int64)[of_cell]

    def _tokens(self, hits: TokenHits) -> Ints:
        """Return a number for each run's tokens: a single token itself. Shape [run]."""
        runs = np.arange(len(hits.tokens.offsets) - 1)
        tokens = hits.leftmost(runs) if len(runs) else runs
        for run in np.flatnonzero(hits.tokens.counts(runs) > 1):
            begin, end = hits.tokens.offsets[run : run + 2]
            tokens[run] = -1 - self._number(hits.tokens.values[begin:end].tobytes())
        return tokens

    def _written(self, rule: RulePlan) -> Ints:
        """Return a number for each run's written tokens, with their classes if it ablates a circuit
        with positions. Shape [run]."""
        tokens, classes = self._tokens(rule.written), rule.written_classes
        if classes is None:
            return tokens
        ends = rule.written.tokens.offsets
        own = [classes[first:last].tobytes() for first, last in pairwise(ends.tolist())]
        pairs = zip(tokens.tolist(), own, strict=True)
        return np.array([-1 - self._number(("classes", *pair)) for pair in pairs], dtype=np.int64)

    def _number(self, content: Hashable) -> int:
        return self._numbers.setdefault(content, len(self._numbers))


def _of_all(plan: ExperimentPlan) -> Mapping[int, WholeCells]:
    if not any(rule.rule.does.reads == "cell" for rule in plan.rules):
        return {}
    prompts = np.arange(len(plan.experiment.table), dtype=np.int64)
    return collect_whole_cells(plan, plan.rows(prompts))


@dataclass(frozen=True, eq=False)
class _RuleKey:
    """Numbers for what a rule writes; equal numbers mean equal content."""

    does: int
    points: Ints
    """Shape [site combination]."""
    written: Ints
    """Shape [run]."""
    read: Ints
    """Shape [run]."""
    whole: Ints | None
    """Shape [position]; set if the written value depends on the positions of all rows."""
    keys: Ints | None
    """For attention rules; shape [run of keys]."""
    amounts: Ints
    """Shape [cell]."""
    directions: Ints | None
    """For rules that steer along a direction; shape [cell]."""
    coordinates: Ints | None
    """For rules in a basis; shape [cell]."""
    receivers: Ints | None
    """Shape [pair of senders and receivers]."""
    receiving: Ints | None
    """For features that receive; shape [cell]."""


def _list(ragged: RaggedColumn, key: int) -> list[int]:
    return ragged.values[ragged.offsets[key] : ragged.offsets[key + 1]].tolist()


def combine_columns(columns: Sequence[Sequence[Ints]], lengths: Sequence[int]) -> Ints:
    """Combine columns into one number per row, equal where all columns are equal. Shape [row].

    Args:
        columns: Columns of several parts; parts with fewer columns are padded.
    """
    code = np.zeros(sum(lengths), dtype=np.int64)
    size = 1
    for number in range(max((len(part) for part in columns), default=0)):
        column = np.concatenate(
            [
                part[number] if number < len(part) else np.full(length, -1, dtype=np.int64)
                for part, length in zip(columns, lengths, strict=True)
            ]
        )
        values, column = np.unique(column, return_inverse=True)
        if size * len(values) >= 1 << 62:
            distinct, code = np.unique(code, return_inverse=True)
            size = len(distinct)
        code = code * len(values) + column
        size *= len(values)
    return code


@dataclass(frozen=True)
class GradientWork:
    """The work of gradients for some prompts."""

    forwards: int = 0
    """Number of forward passes with one prompt per pass."""
    backwards: int = 0
    joined_forwards: int = 0
    """Number of forward passes with several prompts per pass."""
    joined_backwards: int = 0
    tokens: int = 0
    """Tokens times blocks, forward and backward."""
    adds: float = 0.0
    """Multiply-adds in all blocks, forward and backward."""
    logits: int = 0
    """Tokens whose logits are computed or differentiated."""

    def __add__(self, other: GradientWork) -> GradientWork:
        return GradientWork(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.joined_forwards + other.joined_forwards,
            self.joined_backwards + other.joined_backwards,
            self.tokens + other.tokens,
            self.adds + other.adds,
            self.logits + other.logits,
        )

    def of_blocks(self, share: float) -> GradientWork:
        """Return the work of passes that end after a share of the blocks."""
        tokens = int(self.tokens * share)
        return replace(self, tokens=tokens, adds=self.adds * share, logits=0)


DECOMPOSED_TOKENS = 1 << 13
"""Maximum number of tokens of a pass of contextual decomposition."""

CIRCUIT_NUMBERS = 1 << 27
"""Maximum number of numbers of circuits that a pass with gradients stores."""

PATTERN_NUMBERS = 1 << 22
"""Maximum number of attention weights that are recomputed together."""


class CountWork(Protocol):
    """Counts the work of full forward passes."""

    def __call__(self, lengths: Ints, sources: Ints) -> tuple[Ints, Ints]:
        """Return (tokens times blocks, multiply-adds), [row] each.

        Args:
            lengths: [row] tokens of each prompt.
            sources: [row] of these, the tokens that an encoder reads.
        """
        ...


CountPasses = Callable[[Ints], tuple[Ints, Floats]]
"""Counts work as `CountWork` does, from prompt lengths alone and with the vision encoder."""


def gradient_work(
    plan: ExperimentPlan, prompts: Ints, count: CountWork, pass_tokens: int
) -> GradientWork:
    """Count the work of gradients.

    A backward pass costs as much as a forward pass: activations have gradients, weights have none.

    Args:
        count: Counts the work of passes.
        pass_tokens: Maximum tokens of a pass over rows; in a pass with a backward pass, all blocks
            share its memory.
    """
    experiment, said = plan.experiment, plan.experiment.spec.estimator
    if said is None:
        return GradientWork()
    run = experiment.table.runs[experiment.spec.base]
    decomposed = said.kind.decomposes
    numbers = np.repeat(prompts, _count_lanes(plan, prompts, by_cell=decomposed))
    lengths, (patches, encoding) = run.lengths[numbers], count_vision_work(experiment)
    patches, encoding = patches[numbers], encoding[numbers]
    added = _count_shared_edges(plan, prompts)

    def whole(lengths: Ints) -> tuple[Ints, Floats]:
        tokens, adds = count(lengths, run.sources[numbers])
        return tokens + patches, adds + encoding + added * lengths

    by_item = any(atom.by_item for measure in experiment.measures for atom in measure.atoms)
    kinds = len(set(plan.items)) if by_item else 1
    n_layers = experiment.model.shape.n_layers
    each = max(1, pass_tokens // n_layers)
    if decomposed:
        kinds, each = 0, DECOMPOSED_TOKENS
    elif plan.leaves_out_edges:  # a run for each item
        kinds, each = 1, min(each, count_circuit_tokens(plan))
    joined = -(-int(lengths.sum() + patches.sum() // n_layers) // each)
    senders = _count_moved_senders(plan)
    points = (said.steps or 1) * max(1, senders) if said.between_runs else 1
    plain, work = False, GradientWork()
    for measure in experiment.measures:
        texts = [atom.appended for atom in measure.atoms if any(atom.appended)]
        appended = [np.array(text)[numbers] for text in texts]
        for more in appended:  # each answer has a separate pass
            work += _pass(lengths + more, joined, whole, forwards=1, backwards=kinds)
        if len(texts) < len(measure.atoms):
            work += _pass(lengths, joined, whole, forwards=0 if plain else 1, backwards=kinds)
            plain = True
    dropped = len(list_dropped_layers(experiment)) if said.kind.drops_layers else 1
    if plan.path is not None:
        times, given = dropped * kinds * len(experiment.measures), (lengths, joined, whole)
        held = _held_work(plan.path, *given, times, n_layers, 2 * senders)
        held = _sent_work(plan, *given) if decomposed else held
        return sum((work for _ in range(dropped * points)), held + _pattern_work(plan, *given))
    if not said.joins_cells and not said.kind.adds_noise:
        more = _pass(lengths, joined, whole, forwards=int(said.between_runs), backwards=0)
        more += _changed_attention_work(plan, lengths, joined, whole, lambda _: (patches, encoding))
        return sum((work for _ in range(dropped * points)), more)
    copies = said.steps or int(dict(said.options)["samples"])
    first = _pass(lengths, joined, whole, forwards=1, backwards=0)
    return sum((work for _ in range(copies * len(set(cell_sites(plan).tolist())))), first)


def _count_lanes(plan: ExperimentPlan, prompts: Ints, *, by_cell: bool) -> Ints:
    """Return the number of lanes of each prompt in a pass with gradients: one, or two for each
    cell, or one for each run of a circuit as a whole; for each draw of noise. Shape [prompt]."""
    draws = plan.experiment.table.runs[plan.experiment.spec.base].draws
    present = plan.present(prompts)
    if by_cell:
        return 2 * draws * present.sum(axis=0)
    if plan.leaves_out_edges:
        runs = circuit_runs(plan)
        present = np.stack([present[runs == n].any(axis=0) for n in np.unique(runs)])
        return draws * present.sum(axis=0)
    return np.where(present.any(axis=0), draws, 0)


def circuit_runs(plan: ExperimentPlan) -> Ints:
    """Return a number that is equal for cells of `without each edge` with the same circuit as a
    whole and the same measured items. Shape [cell]."""
    parts = [
        np.where(True if rule.active is None else rule.active, rule.position_of_cell, -1)
        for rule in plan.rules
    ]
    by_item = any(atom.by_item for measure in plan.experiment.measures for atom in measure.atoms)
    if by_item:
        kinds = list(dict.fromkeys(plan.items))
        parts.append(np.array([kinds.index(item) for item in plan.items]))
    return np.unique(np.stack(parts), axis=1, return_inverse=True)[1].reshape(-1)


def count_circuit_tokens(plan: ExperimentPlan) -> int:
    """Return the largest number of tokens of a pass that differentiates by shares of a circuit's
    edges: it stores the outputs of senders, the inputs of receivers before and after their norm,
    and a mask for each token."""
    shape, most = plan.experiment.model.shape, 1
    for rule in plan.joined_rules:
        for of, to in rule.edge_ends[0]:
            senders, receivers = len(of.points), len(to.points)
            vectors = senders + 2 * receivers
            neurons = sum(
                unit_count(shape, point.site, point.layer)
                for point in to.points
                if is_neuron(point)
            )
            each = (vectors + VECTORS_PER_TOKEN * shape.n_layers) * shape.d_model
            most = max(most, each + neurons + senders * receivers)
    return max(1, CIRCUIT_NUMBERS // most)


def _count_shared_edges(plan: ExperimentPlan, prompts: Ints) -> float:
    """Return the multiply-adds per token that runs of a circuit as a whole add to a pass, if each
    receiver reads separately; 0 for other experiments."""
    if not plan.leaves_out_edges:
        return 0.0
    run, rows = plan.experiment.table.runs[plan.experiment.spec.base], plan.rows(prompts)
    total, tokens = 0.0, max(1, int(run.lengths[rows.prompt].sum()))
    for rule in plan.joined_rules:
        circuit = rule.rule.circuit
        assert circuit is not None
        row_table = rows.take(np.flatnonzero(rule.acts(rows)))
        written = rule.written.tokens.counts(rule.written_runs(row_table)).sum()
        encoded = run.sources[row_table.prompt].sum() / max(1, run.lengths[row_table.prompt].sum())
        work = count_circuit_work(circuit, plan.experiment.model.shape, float(encoded))
        total += work * float(written) / tokens
    return total


def _sent_work(
    plan: ExperimentPlan, lengths: Ints, joined: int, whole: CountPasses
) -> GradientWork:
    """Count the work of passes that decompose what receivers of a path read: two for each sender,
    one of which reads what is held.

    Args:
        lengths: Tokens of two copies of the prompt for each row.
        joined: Number of passes over all of them.
    """
    assert plan.path is not None
    senders = np.stack([plan.senders, plan.path.position_of_cell])
    share = np.unique(senders, axis=1).shape[1] / max(1, plan.n_cells)
    every = _pass(lengths, joined, whole, forwards=2, backwards=0)
    return GradientWork(
        forwards=math.ceil(every.forwards * share),
        joined_forwards=2 * math.ceil(joined * share),
        tokens=math.ceil(every.tokens * share),
        adds=every.adds * share,
    )


def count_pattern_rows(weights: int, layers: int) -> int:
    """Return the largest number of rows of a pass that reads attention weights.

    Args:
        weights: Weights of a row in one layer.
        layers: Number of layers that are read.
    """
    return max(1, PATTERN_NUMBERS // max(1, weights * layers))


def _pattern_work(
    plan: ExperimentPlan, lengths: Ints, joined: int, whole: CountPasses
) -> GradientWork:
    """Count the work of passes that read attention weights whose queries or keys receive along a
    path: one for the base run, and for each sender two or three that hold all else at the base run,
    one of which reads what is held, one changed queries and one changed keys."""
    rule, experiment = plan.path, plan.experiment
    assert rule is not None
    assert rule.paths is not None
    assert experiment.spec.estimator is not None
    ends = [point for point in rule.paths.table if is_query_or_key(point.site)]
    if not experiment.spec.estimator.kind.fixes_attention or not ends or not len(lengths):
        return GradientWork()
    there = np.flatnonzero(rule.paths.exists)
    senders = np.stack([plan.senders[there], rule.position_of_cell[there]])
    count = np.unique(senders, axis=1).shape[1]
    times = 1 + len({SITES[point.site].component for point in ends})
    layers = len({(SITES[point.site].stack, point.layer) for point in ends})
    heads = experiment.model.shape.largest(lambda block: block.heads)
    some = count_pattern_rows(int(lengths.max()) ** 2 * heads, layers)
    passes = joined * -(-count * len(lengths) // (joined * some))
    sent = _pass(lengths, joined, whole, forwards=times * count, backwards=0)
    base = _pass(lengths, joined, whole, forwards=1, backwards=0)
    return base + replace(sent, joined_forwards=times * passes)


def _count_moved_senders(plan: ExperimentPlan) -> int:
    """Return the number of sites and layers of senders with a path that move between runs."""
    said, rule = plan.experiment.spec.estimator, plan.path
    if said is None or rule is None or rule.paths is None or said.kind.moves != "senders":
        return 0
    _, points = rule.points.expand(np.unique(rule.site_of_cell[rule.paths.exists]))
    senders = (rule.point_table[number] for number in points.tolist())
    return len({(point.site, point.layer) for point in senders})


def list_dropped_layers(experiment: ResolvedExperiment) -> list[tuple[str, int | None]]:
    """Return the stacks and layers whose gradients `atp_star` leaves out, one by one: also those of
    an encoder that rules are in."""
    shape = experiment.model.shape
    stacks = {"": shape} | {stack: shape.others[stack] for stack in experiment.acted_stacks}
    return [(name, layer) for name, stack in stacks.items() for layer in range(stack.n_layers)]


def _changed_attention_work(
    plan: ExperimentPlan,
    lengths: Ints,
    joined: int,
    whole: CountPasses,
    encoder: CountPasses,
) -> GradientWork:
    """Count the work of passes that read attention weights with written queries or keys.

    encoder: counts passes of the vision encoder.
    """
    work, n_layers = GradientWork(), plan.experiment.model.shape.n_layers
    for (site, layer), values in _count_changed_attention(plan).items():
        if SITES[site].stack == "vision":
            scores = _pass(lengths, joined, encoder, forwards=1 + values, backwards=0)
            work += scores.of_blocks(1)
            continue
        scores = _pass(lengths, joined, whole, forwards=1 + values, backwards=0)
        if site in ("q", "k") and layer is not None:  # it stops before the next block
            scores = scores.of_blocks((layer + 1) / n_layers)
        work += scores
    return work


def _count_changed_attention(plan: ExperimentPlan) -> dict[SiteLayer, int]:
    """Count, for the sites of queries and keys whose attention weights an estimator computes again,
    how many values the rows of a prompt write to one vector at most."""
    said, writes = plan.experiment.spec.estimator, Counter[tuple[SitePoint, int]]()
    if said is None or not said.kind.fixes_attention:
        return {}
    for rule in plan.rules:
        cells = np.stack([rule.site_of_cell, rule.position_of_cell])
        cells = cells if rule.active is None else cells[:, rule.active]
        for (site, position), count in zip(*_count_distinct(cells), strict=True):
            _, numbers = rule.points.expand(np.array([site]))
            tokens = {*chain.from_iterable(chain.from_iterable(rule.positions[position].hits[:1]))}
            for point in (rule.point_table[number] for number in numbers.tolist()):
                if is_query_or_key(point.site):
                    writes.update({(point, token): count for token in tokens or {0}})
    changed_attentions = dict[SiteLayer, int]()
    for (point, _), count in writes.items():
        place = point.site, point.layer
        changed_attentions[place] = max(count, changed_attentions.get(place, 0))
    return changed_attentions


def _count_distinct(columns: Ints) -> tuple[list[list[int]], list[int]]:
    """Return the distinct columns, and how often each occurs."""
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    return distinct.T.tolist(), counts.tolist()


def _held_work(
    rule: RulePlan,
    lengths: Ints,
    joined: int,
    whole: CountPasses,
    gradients: int,
    n_layers: int,
    more: int,
) -> GradientWork:
    """Count the work of the passes in which heads and MLPs are held.

    The first forward pass reads their values. If MLPs are held too, nothing in a block has a
    gradient, so backward passes from receivers are free, except for the MLP whose output the
    receiving features are computed from.

    Args:
        gradients: Number of gradients of metrics by the receivers.
        more: Number of further forward passes, which read the senders of both runs.
    """
    assert rule.paths is not None
    paths = rule.paths
    named = np.zeros_like(paths.pair_of_cell)
    if paths.coordinates_of_cell is not None:
        named = paths.coordinates_of_cell
    kinds = np.unique(np.stack([paths.pair_of_cell, named]), axis=1).T.tolist()
    receivers = {(tuple(_list(paths.points, pair)), which) for pair, which in kinds}
    receivers = {each for each in receivers if each[0]}  # without pairs that have no path
    backwards = gradients * len(receivers) if paths.through_mlps else 0
    if not paths.through_mlps and any(of.site == "mlp_out" for of in paths.reads):
        backwards = -(-gradients * len(receivers) // n_layers)
    return _pass(lengths, joined, whole, forwards=2 + more, backwards=backwards)


def _pass(
    lengths: Ints,
    joined: int,
    whole: CountPasses,
    *,
    forwards: int,
    backwards: int,
) -> GradientWork:
    """Count numbers of forward and backward passes over all prompts, in `joined` passes."""
    times = forwards + backwards
    tokens, adds = whole(lengths)
    return GradientWork(
        forwards * len(lengths),
        backwards * len(lengths),
        forwards * joined,
        backwards * joined,
        times * int(tokens.sum()),
        times * float(adds.sum()),
        times * len(lengths),
    )


_RULES = ""
"""The pass with a row's rules; other passes have the name of a run without rules."""


@dataclass(frozen=True)
class ReplyWork:
    """Generation steps of a panel's rows; the prefill is counted with the rows."""

    forwards: int
    tokens: int
    """Tokens times blocks."""
    keys: int
    """Pairs of a query and a key, times blocks."""
    logits: int
    """Distributions over the vocabulary."""

    def __add__(self, other: ReplyWork) -> ReplyWork:
        return ReplyWork(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.keys + other.keys,
            self.logits + other.logits,
        )


def reply_work(
    lengths: Ints, tokens: int, samples: int, *, kept: bool, pass_tokens: int
) -> ReplyWork:
    """Count the work after prompts of these lengths, shape [row].

    Args:
        tokens: Maximum length of a reply.
        kept: Whether keys and values of earlier tokens are cached, so that rows with `pass_tokens`
            tokens generate together, one token per row and step. Otherwise each step of a row is a
            full forward pass over its prompt and its reply so far.
    """
    steps = np.arange(1, tokens, dtype=np.int64)
    rows = len(lengths) * samples
    whole = lengths[:, None] + steps
    if kept:
        together = -(-rows // pass_tokens)
        return ReplyWork(
            len(steps) * together, rows * len(steps), int(whole.sum()) * samples, rows * len(steps)
        )
    pairs = whole * (whole + 1) // 2
    return ReplyWork(
        rows * len(steps), int(whole.sum()) * samples, int(pairs.sum()) * samples, rows * len(steps)
    )


def generation_lengths(
    plan: ExperimentPlan, rows: RowTable, *, unpatched: bool
) -> tuple[Ints, Ints]:
    """Return the lengths, in tokens, of the prompts after which an experiment generates text, and
    the number of these tokens that an encoder reads.

    There is one entry per row and noise draw.

    Args:
        unpatched: Append the prompts of the base and source runs.
    """
    found = [np.repeat([plan.lengths(rows), plan.sources(rows)], plan.draws, axis=1)]
    if unpatched:
        experiment = plan.experiment
        names = dict.fromkeys((experiment.spec.base, experiment.spec.source))
        runs = [experiment.table.runs[name] for name in names if name is not None]
        found += [np.repeat([run.lengths, run.sources], run.draws, axis=1) for run in runs]
    lengths, sources = np.concatenate(found, axis=1)
    return lengths, sources


@dataclass(frozen=True, eq=False)
class ReplyPasses:
    """Full forward passes over prompts, or over prompts and replies."""

    lengths: Ints
    """Shape [row]."""
    sources: Ints
    """Of these tokens, those that an encoder reads, shape [row]."""
    logits: int
    """Number of distributions that are read, over all rows."""


def read_pass_work(lengths: Ints, logits: int, samples: int, pass_tokens: int | None) -> ReplyWork:
    """Count full forward passes over prompts and replies of these lengths, shape [row].

    Args:
        logits: Number of distributions that are read, over all rows.
        pass_tokens: Tokens of passes shared by rows; None if each row has its own pass.
    """
    rows, tokens = len(lengths), int(lengths.sum())
    passes = rows if pass_tokens is None else -(-tokens // pass_tokens)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return ReplyWork(passes * samples, tokens * samples, pairs * samples, logits * samples)


@dataclass(frozen=True, eq=False)
class ReadPasses:
    """The passes in which rows of a panel's experiments are read after their prompts."""

    passes: tuple[Mapping[str, Ints], ...]
    """Per experiment, pass → number of read positions, 0 if the pass isn't needed. Shape [row]."""
    most: int
    """Number of positions."""

    @staticmethod
    def of(plans: Sequence[ExperimentPlan], rows: Sequence[RowTable]) -> ReadPasses:
        passes = (
            {name: np.full(len(row), len(_places(plan))) for name in _reads(plan)}
            for plan, row in zip(plans, rows, strict=True)
        )
        return ReadPasses(
            tuple(passes), len(set[ReplyPosition | None]().union(*map(_places, plans)))
        )

    def take(self, index: Sequence[Ints]) -> ReadPasses:
        """Select some rows of each experiment."""
        pairs = zip(self.passes, index, strict=True)
        passes = ({name: numbers[i] for name, numbers in each.items()} for each, i in pairs)
        return ReadPasses(tuple(passes), self.most)

    def shared(self, shared: SharedRows) -> ReadPasses:
        """Reduce to distinct rows, shared by all experiments: the union of their members' reads."""
        found: dict[str, Ints] = {}
        for passes, (which, _) in zip(self.passes, shared.members, strict=True):
            for name, numbers in passes.items():
                whole = found.setdefault(name, np.zeros(len(shared), dtype=np.int64))
                np.add.at(whole, which, numbers)
        every = {name: np.minimum(numbers, self.most) for name, numbers in found.items()}
        return ReadPasses(tuple(every for _ in self.passes), self.most)

    def work(
        self,
        plans: Sequence[ExperimentPlan],
        rows: Sequence[RowTable],
        pass_tokens: int | None,
        *,
        unpatched: bool,
    ) -> ReplyWork:
        """Count the work for rows of each experiment; `unpatched` adds base and source runs."""
        said = plans[0].experiment.generation
        work = ReplyWork(0, 0, 0, 0)
        if said is None:
            return work
        for reply_passes in self.list_passes(plans, rows, said.tokens, unpatched=unpatched):
            work += read_pass_work(
                reply_passes.lengths, reply_passes.logits, said.samples, pass_tokens
            )
        return work

    def list_passes(
        self,
        plans: Sequence[ExperimentPlan],
        rows: Sequence[RowTable],
        tokens: int,
        *,
        unpatched: bool,
    ) -> Iterator[ReplyPasses]:
        """Yield the passes over prompts and replies of so many tokens, as in `work`."""
        every = list(self._prompts(plans, rows))
        every += _unpatched(plans, self.most) if unpatched else []
        by_pass: dict[str, list[ReplyPasses]] = {}
        for name, reply_passes in every:
            by_pass.setdefault(name, []).append(reply_passes)
        for parts in by_pass.values():
            yield ReplyPasses(
                np.concatenate([part.lengths for part in parts]) + tokens,
                np.concatenate([part.sources for part in parts]),
                sum(part.logits for part in parts),
            )

    def _prompts(
        self, plans: Sequence[ExperimentPlan], rows: Sequence[RowTable]
    ) -> Iterator[tuple[str, ReplyPasses]]:
        """Yield passes over prompts with their names; there is one per noise draw."""
        for passes, plan, row in zip(self.passes, plans, rows, strict=True):
            for name, places in passes.items():
                chosen = row.take(np.flatnonzero(places))
                if name == _RULES:
                    given = plan.lengths(chosen), plan.sources(chosen)
                else:
                    run = plan.experiment.table.runs[name]
                    given = run.lengths[chosen.prompt], run.sources[chosen.prompt]
                lengths, sources = (np.repeat(each, plan.draws) for each in given)
                yield name, ReplyPasses(lengths, sources, int(places.sum()) * plan.draws)


def _reads(plan: ExperimentPlan) -> Iterator[str]:
    """Yield the passes that an experiment reads after its rows' prompts."""
    experiment = plan.experiment
    looks = plan.observes is not None and reads_reply_tokens(plan.observes.rule)
    if looks or any(measure.in_reply is not None for measure in experiment.measures):
        yield experiment.spec.base if experiment.as_base else _RULES
        yield from _references(plan)


def _references(plan: ExperimentPlan) -> Iterator[str]:
    """Yield the runs that measures of replies compare with."""
    measured = (measure for measure in plan.experiment.measures if measure.in_reply is not None)
    runs = (atom.run for measure in measured for atom in measure.atoms)
    yield from dict.fromkeys(run for run in runs if run is not None)


def _places(plan: ExperimentPlan) -> set[ReplyPosition | None]:
    """Return the measured positions of a reply, at least one, because a pass gives some logits."""
    reply_positions = {measure.in_reply for measure in plan.experiment.measures}
    return reply_positions - {None} or {None}


def _unpatched(plans: Sequence[ExperimentPlan], places: int) -> list[tuple[str, ReplyPasses]]:
    """Return the passes of base and source runs, which are measured once after their replies."""
    passes: dict[tuple[str, str], ReplyPasses] = {}
    for plan in plans:
        experiment = plan.experiment
        if all(measure.in_reply is None for measure in experiment.measures):
            continue
        for name in (experiment.spec.base, experiment.spec.source):
            run = None if name is None else experiment.table.runs[name]
            if name is None or run is None:
                continue
            for other in ("", *_references(plan)):
                prompts = experiment.table.runs[other] if other else run
                given = prompts.lengths, prompts.sources
                lengths, sources = (np.repeat(each, run.draws) for each in given)
                passes[name, other] = ReplyPasses(lengths, sources, len(lengths) * places)
    return [(f"{name} {other}", reply_passes) for (name, other), reply_passes in passes.items()]


@dataclass(frozen=True)
class Cost:
    """Work of patched rows and unpatched prompts."""

    cells: int = 0
    """Number of cells with at least one row to run."""
    rows: int = 0
    forwards: int = 0
    """Number of forward passes; in a plain loop, one per row."""
    tokens: int = 0
    """Sum over tokens of the number of blocks they pass through."""
    multiply_adds: float = 0.0
    backwards: int = 0
    """Number of backward passes, for gradients."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.cells + other.cells,
            self.rows + other.rows,
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.multiply_adds + other.multiply_adds,
            self.backwards + other.backwards,
        )

    def __rmul__(self, times: int) -> Cost:
        return Cost(
            times * self.cells,
            times * self.rows,
            times * self.forwards,
            times * self.tokens,
            times * self.multiply_adds,
            times * self.backwards,
        )

    @property
    def flops(self) -> float:
        """Floating-point operations: two per multiply-add."""
        return 2 * self.multiply_adds


# --- circuits -----------------------------------------------------------------------------------


def count_circuit_work(circuit: CircuitTargets, shape: ModelShape, encoded: float) -> float:
    """Count the multiply-adds per token that the ablation of all edges adds to those of a pass.

    Args:
        encoded: Share of the tokens that an encoder-decoder's encoder reads.
    """
    classes = next(iter(circuit.edges.values()))  # a training writes all edges
    work: list[int] = []
    for edges in classes:
        senders, receivers = number_edge_ends(edges)
        alone = sum(is_neuron(to) for to in receivers.points)  # each reads separately
        block = BlockCost.of(shape)
        every = _count_edge_work(senders, receivers, block, shape, alone)
        ends = senders, receivers
        every += _count_split_work(ends, circuit.features, block, shape, are_alone=True)
        work.append(every)
    if circuit.encoder is None:
        return work[0]
    return sum(
        (encoded if circuit.encoder in places else 1 - encoded) * number
        for places, number in zip(circuit.classes, work, strict=True)
    )


def _count_edge_work(
    senders: EdgeEnds,
    receivers: EdgeEnds,
    block: BlockCost,
    shape: ModelShape,
    inputs: int | None = None,
) -> int:
    """Each receiver sums what its senders gain, each query, key or value is projected again, and
    the neurons of a layer are computed for each of their inputs.

    Args:
        shape: The whole model.
        inputs: The number of these; None for the distinct ones.
    """
    components = [SITES[of.site].component for of in senders.points]
    in_vision = any(SITES[of.site].stack == "vision" for of in senders.points)
    model_shape = shape.others["vision"] if in_vision else shape
    layers = [
        -1 if component == "resid_pre" else of.layer or 0
        for of, component in zip(senders.points, components, strict=True)
    ]
    widths = sum(
        vector_width(shape, point.site, point.layer)
        for point in (*senders.points, *receivers.points)
        if SITES[point.site].width == "d_head"
    )
    neurons = sum(
        1 if of.unit is not None else unit_count(shape, of.site, of.layer)
        for of in senders.points
        if is_neuron(of)
    )
    reads = [SITES[to.site] for to in receivers.points]
    at_the_end = [
        to.layer is None or (kind.stack == "cross" and kind.side == "source")
        for to, kind in zip(receivers.points, reads, strict=True)
    ]
    summed = sum(
        len(layers) if ends else sum(layer < (to.layer or 0) for layer in layers)
        for to, ends in zip(receivers.points, at_the_end, strict=True)
    )
    if inputs is None:
        sites = {to.site for to in receivers.points if is_neuron(to)}
        inputs = sum(len(_list_inputs(senders, receivers, site)) for site in sites)
    size = model_shape.average(lambda each: each.neurons)
    read = inputs * (block.dense_mlp - model_shape.d_model * size)
    return model_shape.d_model * (summed + widths + neurons) + read


def _count_split_work(
    ends: tuple[EdgeEnds, EdgeEnds],
    features: Mapping[SiteLayer, FeatureNodes],
    block: BlockCost,
    shape: ModelShape,
    *,
    are_alone: bool = False,
) -> int:
    """Count the multiply-adds per token of outputs whose features are nodes: the MLP, or the sum of
    the heads, for each distinct input of these, features of each output and of the fill, and what
    they add to the stream.

    Args:
        are_alone: Whether each node has an input to itself.
    """
    total = 0
    senders, receivers = ends
    sending = {(of.site, of.layer) for of in senders.points}
    for (site, layer), feature in features.items():
        reads = "mlp_norm" if site == "mlp_out" else site
        inputs: Collection[tuple[int | None, object]] = _list_inputs(senders, receivers, reads)
        if are_alone:
            inputs = [(to.layer, to) for to in receivers.points if to.site == reads]
        count = sum(each == layer for each, _ in inputs)
        if not count and (site, layer) not in sending:
            continue
        operand, named = feature.member.operand, len(feature.which)
        assert isinstance(operand, DictionaryFile)
        encoding = operand.encoding_products
        if operand.is_separate and named <= MAX_GATHERED:
            encoding = named * operand.width_in
        fill = int((site, layer) in sending)
        made = (
            block.dense_mlp
            if site == "mlp_out"
            else 2 * unit_count(shape, "z", layer) * shape.d_model
        )
        total += count * made + (count + 1 + fill) * encoding + 2 * named * shape.d_model
    return total


def _list_inputs(
    senders: EdgeEnds, receivers: EdgeEnds, site: str
) -> set[tuple[int | None, frozenset[int]]]:
    """List the sets of senders that differ between the receivers at a site, with their layers."""
    sets: dict[int, set[int]] = defaultdict(set)
    reads = [to.site == site for to in receivers.points]
    if not any(reads):
        return set()
    for of, to in zip(senders.of_edge.tolist(), receivers.of_edge.tolist(), strict=True):
        if reads[to]:
            sets[to].add(of)
    return {(receivers.points[to].layer, frozenset(numbers)) for to, numbers in sets.items()}


def _count_ablation_work(
    graph: CircuitGraph,
    ends: tuple[EdgeEnds, EdgeEnds],
    block: BlockCost,
    shape: ModelShape,
    *,
    settles: bool,
    sums_all: bool,
) -> int:
    """Count the multiply-adds per token of the ablation of some edges; may be negative.

    Args:
        graph: The nodes of the model.
        ends: The senders and the receivers of the edges.
        block: The cost of a block.
        shape: The model.
        settles: Whether nodes aren't computed that give what ablated edges carry.
        sums_all: Whether receivers read the sum of what they keep, so that every sender is read.
    """
    senders, receivers = ends
    columns = np.array([graph.column[_node(point)] for point in senders.points], dtype=np.int64)
    rows = np.array([graph.row[_node(point)] for point in receivers.points], dtype=np.int64)
    kept = graph.before.copy()
    kept[rows[receivers.of_edge], columns[senders.of_edge]] = False
    filled = np.isin(np.arange(len(graph.senders)), columns) | sums_all
    settled = graph.settle(kept, filled) if settles else np.zeros_like(filled)
    heads = np.array([site == "z" for site, _, _ in graph.senders])
    routed = np.array([shape.has("router", layer) for _, layer, _ in graph.senders])
    written = settled & filled & (heads | ~routed)
    left = filled & ~settled
    ablated = (graph.before & ~kept)[:, left]
    due = graph.read_by(~written) & ablated.any(axis=1)
    normed = has_normed_sums(shape)
    terms = 1 + (normed & heads[left])  # before a norm, a head and its fill are added
    before = graph.before[np.ix_(due, left)] @ terms
    reads = [graph.receivers[n] for n in np.flatnonzero(due)]
    summed = _count_sums(reads, before, ablated[due], are_repeated=normed)
    separate, replaced = _count_separate_maps(graph, ablated & due[:, None])
    maps = separate + (3 if normed else 1) * int((left & heads).sum())
    by_layer = Counter(graph.senders[n][1] for n in np.flatnonzero(written & heads).tolist())
    full = sum(count == unit_count(shape, "z", layer) for layer, count in by_layer.items())
    full += replaced
    saved = int((written & ~heads).sum()) * block.dense_mlp + full * block.project
    width = shape.average(lambda each: each.d_head)
    return shape.d_model * (summed + maps * width) - saved


def _count_sums(
    receivers: Sequence[CircuitNode], before: Ints, ablated: Bools, *, are_repeated: bool
) -> int:
    """Count the vectors that are added up for the inputs of receivers. Those of a block's heads
    are computed once for each distinct set of ablated edges and once without any; that of its MLP
    begins with these sums.

    Args:
        receivers: Those with ablated edges.
        before: [receiver] number of the senders before it.
        ablated: [receiver, sender] edges.
        are_repeated: Whether each input, and that without ablated edges, begins with the embedding,
            because norms follow sums.
    """
    rows: dict[int | None, list[int]] = defaultdict(list)
    for number, (_, layer, _) in enumerate(receivers):
        rows[layer].append(number)
    sums = 0
    for row in rows.values():
        heads = [n for n in row if receivers[n][0] in ("q", "k", "v")]
        others = [n for n in row if receivers[n][0] not in ("q", "k", "v")]
        if are_repeated:
            distinct = {ablated[n].tobytes() for n in heads}
            sums += (2 + len(distinct)) * int(before[heads[0]]) if heads else 0
            sums += sum(2 * int(before[n]) for n in others)
            continue
        if not heads:
            sums += sum(1 + int(before[n]) for n in others)
            continue
        first = int(before[heads[0]])
        distinct = {ablated[n].tobytes() for n in row}
        sums += (1 + len(distinct)) * (1 + first)
        sums += sum(int(before[n]) - first for n in others)
    return sums


def _count_separate_maps(graph: CircuitGraph, ablated: Bools) -> tuple[int, int]:
    """Count the queries, keys and values that are computed separately, and the layers whose
    projection isn't computed, because fewer than half of its outputs have a common input.

    Args:
        ablated: [receiver, sender] edges that change the input of a receiver.
    """
    inputs: dict[int | None, Counter[bytes]] = defaultdict(Counter)
    for (site, layer, _), own in zip(graph.receivers, ablated, strict=True):
        if site in ("q", "k", "v"):
            inputs[layer][own.tobytes()] += 1
    separate = replaced = 0
    for counts in inputs.values():
        every, most = counts.total(), max(counts.values())
        replaced += 2 * most < every
        separate += every if 2 * most < every else every - most
    return separate, replaced


def _node(point: SitePoint) -> CircuitNode:
    return point.site, point.layer, point.unit or 0


def settles_circuits(plan: ExperimentPlan) -> bool:
    """Return whether only logits are read, and nothing acts but circuits whose ablated edges carry
    unpatched runs on prompts of equal length, so that some nodes aren't computed.

    Norms over the queries or keys of all heads, which prevent it, aren't known here: few models
    have them.
    """
    experiment = plan.experiment
    runs, base = experiment.table.runs, experiment.spec.base
    every = [runs.get(rule.rule.run) for rule in plan.rules if rule.rule.does.reads == "run"]
    return (
        experiment.model.shape.causal
        and len(every) == len(plan.rules)
        and all(
            rule.rule.circuit is not None
            and not rule.rule.circuit.waits  # its edges are placeholders
            and not rule.rule.circuit.places
            and not rule.rule.circuit.neurons
            and not rule.rule.circuit.features
            and not rule.rule.circuit.stack
            and rule.rule.external is None
            for rule in plan.rules
        )
        and all(atom.point is None for measure in experiment.measures for atom in measure.atoms)
        and all(
            run is not None
            and run.derived is None
            and run.model is None
            and run.noise is None
            and np.array_equal(run.lengths, runs[base].lengths)
            for run in every
        )
    )


def vision_adds(
    plan: ExperimentPlan, rows: RowTable, prompts: Ints, *, joined: bool = False
) -> float:
    """Count the multiply-adds of rules in the vision encoder: it runs on the images of each row,
    and once more on those of the runs that are read. If blocks attend to images, it runs once for
    the replies of a row, and once for measures of its prompt.

    Args:
        plan: The experiment.
        rows: Its rows.
        prompts: The prompts of all runs that are read.
        joined: Whether rows of several cells share passes. If patches of one of them see other
            tiles in a layer, those of all rows of the pass do, and have no weight.
    """
    experiment = plan.experiment
    if not experiment.in_vision:
        return 0.0
    _, each = count_vision_work(experiment)
    read = {rule.run for rule in experiment.every_rule if rule.in_vision}
    if experiment.spec.estimator is None:  # passes with gradients read the base run
        read.add(experiment.spec.base)
    passes = 1
    if experiment.generation is not None and experiment.model.shape.encodes_apart:
        passes += any(measure.reply is None for measure in experiment.measures)
    of_rows = each[rows.prompt]
    layers = _list_opened_layers(plan)
    layers = [set().union(*layers)] * len(layers) if joined else layers
    opened = np.array([len(own) for own in layers])
    if opened.any():
        _, across = count_vision_work(experiment, across=True)
        share = opened[rows.cell] / experiment.model.shape.others["vision"].n_layers
        of_rows += (across - each)[rows.prompt] * share
    return float(of_rows.sum() * plan.draws * passes + each[prompts].sum() * len(read))


def _list_opened_layers(plan: ExperimentPlan) -> list[set[int | None]]:
    """Return the layers of the vision encoder in which patches may see other tiles. Per cell."""
    layers: list[set[int | None]] = [set() for _ in range(plan.n_cells)]
    for rule in plan.rules:
        if rule.rule.edge is None or rule.rule.edge.change != "allow" or not rule.rule.in_vision:
            continue
        for own, site in zip(layers, rule.site_of_cell.tolist(), strict=True):
            first, last = rule.points.offsets[site : site + 2].tolist()
            own.update(rule.point_table[at].layer for at in rule.points.values[first:last])
    return layers


def count_vision_work(
    experiment: ResolvedExperiment, *, across: bool = False
) -> tuple[Ints, Floats]:
    """Return the work of the vision encoder on the images of each prompt of the base run.

    Args:
        experiment: The experiment.
        across: Whether patches see other tiles of their image in each block.

    Returns:
        [row] patches times blocks of the encoder, and [row] their multiply-adds; zeros if no rule
        is in it.
    """
    rows = experiment.table.runs[experiment.spec.base].rows
    if not experiment.in_vision:
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    model = experiment.model
    layers = model.shape.others["vision"].n_layers
    works = [
        [
            count_picture_work(model.shape, model.tokenizer, picture, across=across)
            for picture in row.pictures.values()
        ]
        for row in rows
    ]
    tokens = np.array([sum(count for count, _ in each) for each in works], dtype=np.int64)
    adds = np.array([sum(own for _, own in each) for each in works], dtype=np.float64)
    return tokens * layers, adds * layers


_TILE_MULTIPLE = 8
"""Tiles of images that blocks attend to are padded to a multiple of this number of tokens."""


def count_picture_work(
    model: ModelShape,
    reader: TextTokenizer | None,
    picture: PromptPicture,
    *,
    across: bool = False,
) -> tuple[int, float]:
    """Return the patches of an image, and the multiply-adds of one block of the vision encoder.

    Args:
        model: The whole model.
        reader: Its tokenizer, which knows the patches that a resampler reads.
        picture: The image.
        across: Whether patches see other tiles of the image.
    """
    shape = model.others["vision"]
    block = BlockCost.of(shape)
    if model.attends_to_image:  # tokens of all tiles see each other, also those of their padding
        of_tile = -(-model.attended // model.tiles // _TILE_MULTIPLE) * _TILE_MULTIPLE
        tokens = model.tiles * of_tile
        return tokens, float(block.whole(np.array([tokens])).sum())
    tiles = max(1, len(picture.expansion.layout.tiles))
    tokens = sum(picture.expansion.is_image) * model.merged_side**2
    if model.resamples and isinstance(reader, ImagePromptTokenizer):
        tokens = reader.encoded_patches(picture.picture.extent) or tokens
    layout = shape.patches
    if layout is not None and not layout.any_size:  # also margins without a token, class tokens
        tokens = max(tokens, tiles * layout.tokens)
    tiles = 1 if across else tiles
    return tokens, tiles * float(block.whole(np.array([tokens // tiles])).sum())


def list_first_tokens(row: RunRow, shape: ModelShape) -> tuple[int, ...]:
    """Return the first token of each image of a prompt that blocks of the model attend to."""
    return row.ids[: row.source : shape.attended]


def run_cost(shape: ModelShape, run: PromptRun, stop: int | None) -> Cost:
    """Return the cost of all prompts of a run, each in a separate pass through `stop` blocks (None:
    all blocks and the logits of one token)."""
    prompts = len(run.lengths) * run.draws
    logits = prompts * shape.d_model * shape.outputs if stop is None else 0
    pass_cost = PassCost.of(shape)
    tokens, adds = pass_cost.whole(run.lengths, run.sources, stop)
    products = int(adds.sum()) * run.draws + logits
    if shape.attended:  # keys and values of an image are computed once
        blocks = shape.n_layers if stop is None else min(stop, shape.n_layers)
        every = [image for row in run.rows for image in list_first_tokens(row, shape)]
        copies = np.array((len(every) * run.draws - len({*every})) * shape.attended)
        products -= int(pass_cost.block.image_maps(copies)) * blocks
    return Cost(0, 0, prompts, int(tokens.sum()) * run.draws, products)


def list_fitted_runs(
    fits: Iterable[tuple[Sequence[SitePoint], Sequence[FitSample]]], shape: ModelShape
) -> list[tuple[PromptRun, int]]:
    """Return the runs that fits read, once each, with the number of their blocks to run."""
    fitted_runs: dict[tuple[int, str | None], tuple[PromptRun, int]] = {}
    for points, samples in fits:
        layers = shape.n_layers
        # Passes for vectors of patches stop before the language model.
        stops = [
            0 if SITES[p.site].stack == "vision" else stop_layer(p.site, p.layer, layers)
            for p in points
        ]
        blocks = [layers if stop is None else min(stop, layers) for stop in stops]
        for sample in samples:
            key = id(sample.run.rows), sample.run.model
            before = fitted_runs.get(key, (sample.run, 0))
            fitted_runs[key] = sample.run, max(before[1], *blocks)
    return list(fitted_runs.values())


def jacobian_cost(shape: ModelShape, basis: JacobianBasis) -> Cost:
    """Return the cost of a basis's Jacobians: for each token a forward pass up to the target, and
    for each number of the target a backward pass from it to the source."""
    layers = shape.n_layers
    first, last = (
        min(layers if stop is None else stop, layers)
        for stop in (stop_layer(point.site, point.layer, layers) for point in basis.points)
    )
    draws = basis.sample.run.draws
    counts = draws * np.array([sum(map(len, runs)) for runs in basis.sample.cell.hits])
    times = count_numbers(basis.target, shape)
    blocks = last + times * (last - first)
    run = basis.sample.run
    each = BlockCost.of(shape).whole(run.lengths, run.sources)
    adds = float((each * counts).sum()) * blocks
    tokens = int((run.lengths * counts).sum()) * blocks
    spots = int(counts.sum())
    return Cost(0, 0, spots, tokens, adds, backwards=spots * times)


def reply_cost(shape: ModelShape, work: ReplyWork, stop: int | None = None) -> Cost:
    """Return the cost after the prompts, through `stop` blocks; None is all.

    Blocks that attend to an image see its tokens instead of the keys of the text.
    """
    block, blocks = BlockCost.of(shape), shape.n_layers if stop is None else stop
    keys = (1 - block.share) * work.keys + block.share * work.tokens * block.image
    token = block.token - block.share * block.encode
    adds = blocks * float(work.tokens * token + keys * block.key)
    adds += float(work.logits * shape.d_model * shape.outputs)
    return Cost(0, 0, work.forwards, work.tokens * blocks, adds)


def decoder_reply_cost(
    shape: ModelShape, lengths: Ints, sources: Ints, tokens: int, samples: int
) -> Cost:
    """Return the cost of the replies of an encoder-decoder after the prefill.

    Args:
        shape: The model.
        lengths: [row] number of tokens that encoder and decoder read.
        sources: [row] of these, the tokens of the encoder.
        tokens: Maximum length of a reply.
        samples: Number of replies per row.
    """
    steps = tokens - 1
    passes = len(lengths) * samples * steps
    passed, adds = PassCost.of(shape).replies(lengths, sources, steps)
    logits = passes * float(shape.d_model * shape.outputs)
    return Cost(0, 0, passes, passed * samples, adds * samples + logits)


def read_pass_cost(
    shape: ModelShape,
    passes: ReplyPasses,
    samples: int,
    pass_tokens: int | None,
    stop: int | None = None,
) -> Cost:
    """Return the cost of full forward passes of an encoder-decoder over prompts and replies.

    Args:
        shape: The model.
        passes: The passes.
        samples: Number of replies per row.
        pass_tokens: Tokens of passes shared by rows; None if each row has its own pass.
        stop: Number of blocks of the decoder to run; None is all.
    """
    tokens, adds = PassCost.of(shape).whole(passes.lengths, passes.sources, stop)
    count = len(tokens) if pass_tokens is None else -(-int(passes.lengths.sum()) // pass_tokens)
    logits = passes.logits * float(shape.d_model * shape.outputs)
    return samples * Cost(0, 0, count, int(tokens.sum()), float(adds.sum()) + logits)


# --- rows ---------------------------------------------------------------------------------------


class PanelCount:
    """Counts that are computed once per panel."""

    def __init__(self, panel: Panel, pass_tokens: int, prompt_tokens: int) -> None:
        self.panel = panel
        self.pass_tokens = pass_tokens
        self.prompt_tokens = prompt_tokens
        self.plans = panel.experiments
        self.table = self.plans[0].experiment.table
        self.shape = self.plans[0].experiment.model.shape
        self.block = BlockCost.of(self.shape)
        self.full_pass = PassCost.of(self.shape)
        self.sharer = RowSharer(self.plans, share=True)
        self._circuit_adds: dict[tuple[int, bool], Ints] = {}

    def row_passes(self, plan: ExperimentPlan, lengths: Ints, sources: Ints) -> tuple[Ints, Ints]:
        """Count full forward passes of rows: (tokens times blocks [row], multiply-adds [row]).

        An encoder of images or sounds runs in unpatched runs, and not again for rows without rules
        in it. The same applies to keys and values of images that blocks attend to.

        Args:
            plan: The plan of the rows.
            lengths: [row] tokens of each prompt.
            sources: [row] of these, the tokens that an encoder reads.
        """
        every = plan.experiment.every_rule
        stack = "vision" if self.shape.attends_to_image else "encoder"
        reruns = any(rule.path or rule.circuit or rule.acts_in(stack) for rule in every)
        if reruns or self.shape.takes not in ("image to text", "sound to text", "attended image"):
            return self.full_pass.whole(lengths, sources)
        return self.full_pass.decode(lengths, sources)

    @cached_property
    def _graph(self) -> CircuitGraph:
        return CircuitGraph(self.shape)

    def circuit_adds(self, rule: RulePlan, *, settles: bool) -> Ints:
        """Return [circuit + 1, class]: the multiply-adds per token of a class that each ablated
        circuit of a rule adds to a pass, and 0 where the rule doesn't act.

        Args:
            rule: A rule that ablates circuits.
            settles: Whether nodes aren't computed that give what ablated edges carry.
        """
        key = id(rule), settles
        if key not in self._circuit_adds:
            given, circuit = (self.block, self.shape), rule.rule.circuit
            assert circuit is not None
            attends = self.shape.attends_to_image or circuit.stack == "vision"
            if attends or circuit.encoder is not None or circuit.neurons or circuit.features:

                def count(ends: tuple[EdgeEnds, EdgeEnds]) -> int:
                    split = _count_split_work(ends, circuit.features, *given)
                    return _count_edge_work(*ends, *given) + split
            else:

                def count(ends: tuple[EdgeEnds, EdgeEnds]) -> int:
                    most = 2 * len(ends[0].of_edge) >= len(circuit.every)
                    how = {"settles": settles, "sums_all": most and rule.rule.does.reads is None}
                    return _count_ablation_work(self._graph, ends, *given, **how)

            self._circuit_adds[key] = np.array(
                [[count(ends) for ends in own] for own in rule.edge_ends]
                + [[0] * len(rule.edge_ends[0])]
            )
        return self._circuit_adds[key]

    def chunks(self) -> Iterator[Ints]:
        """Yield groups of prompts whose rows can be laid out together."""
        cells = max(1, sum(plan.n_cells for plan in self.plans))
        size = max(1, BATCH_ROWS // cells)
        every = np.arange(len(self.table), dtype=np.int64)
        return (every[i : i + size] for i in range(0, len(every), size))

    def unpatched(self, *, stopped: bool) -> Cost:
        """Return the cost of all prompts of all unpatched runs, per sweep; with `stopped`, runs
        that are only read stop early."""
        cost = Cost()
        for name, times in self.sweeps.items():
            cost += times * run_cost(
                self.shape, self.panel.table.runs[name], self._stop(name, stopped)
            )
        for run, blocks in (*self.fitted, *self.external):  # these always stop early
            cost += run_cost(self.shape, run, blocks)
        for basis in self.jacobians:
            cost += jacobian_cost(self.shape, basis)
        return cost

    def _stop(self, name: str, stopped: bool) -> int | None:
        needs = self.panel.runs.get(name)
        return None if needs is None or not stopped else needs.stop

    def saved_by_sharing(self, *, stopped: bool) -> Cost:
        """Return the cost of equal beginnings of unpatched prompts, except the first of each."""
        tokens, adds = 0, 0.0
        each = self.block.saved_by_copy(experts=bool(self.shape.n_experts))
        for name, times in self.sweeps.items():
            stop = self._stop(name, stopped)
            blocks = self.shape.n_layers if stop is None else min(stop, self.shape.n_layers)
            copies = times * blocks * self._count_copies(self.panel.table.runs[name])
            tokens, adds = tokens + copies, adds + float(copies * each)
        return Cost(tokens=tokens, multiply_adds=adds)

    def _count_copies(self, run: PromptRun) -> int:
        """Count the tokens that equal those of another prompt in their batch."""
        experiment = self.plans[0].experiment
        layout = find_image_layout(experiment.model.tokenizer, self.table)
        ahead = layout is not None and bool(layout.prefix_end)
        differs = run.derived is not None or run.noise is not None
        attends = self.shape.attends_to_image
        if ahead or differs or not (attends or self.shape.reads_prefix):
            return 0
        copies, size = 0, batch_size(self.panel, self.prompt_tokens)
        for first in range(0, len(run.rows), size):
            rows = run.rows[first : first + size]
            ids = [row.ids[row.source :] for row in rows]
            shown = [list_first_tokens(row, self.shape) if attends else () for row in rows]
            numbers = {own: number for number, own in enumerate(dict.fromkeys(shown))}
            images = np.array([numbers[own] for own in shown], dtype=np.int64)
            owner = share_beginnings(ids, images)
            if owner is not None:
                own = (owner < 0) | (owner == np.arange(len(ids))[:, None])
                copies += int((~own).sum())
        return copies

    @cached_property
    def sweeps(self) -> Counter[str]:
        """Number of times that each unpatched run is computed on all prompts, by name."""
        several = self.batch_count > 1
        return Counter() if is_read_only(self.panel) else count_sweeps(self.panel, several=several)

    @cached_property
    def batch_count(self) -> int:
        """Number of batches of prompts."""
        return -(-len(self.table) // batch_size(self.panel, self.prompt_tokens))

    @cached_property
    def external(self) -> list[tuple[PromptRun, int]]:
        """Runs of other blocks that are read, with the number of their blocks to run."""
        return [(run, self.shape.n_layers) for _, run in external_runs(self.panel)]

    @cached_property
    def fitted(self) -> list[tuple[PromptRun, int]]:
        """Runs that directions and bases are fitted on, with the number of their blocks to run."""
        plans = (*self.panel.derived.values(), *self.plans)
        rules = [rule for p in plans for rule in p.rules]
        members = {m.name: m for rule in rules for m in rule.directions}
        vectors = (fit for m in members.values() for fit in iter_fitted_vectors(m.vector))
        fits = [(fit.points, fit.samples) for fit in vectors]
        others = (
            basis_fit
            for basis_fit in iter_basis_fits(rules)
            if not isinstance(basis_fit, JacobianBasis)
        )
        fits += [(own.points, own.samples) for own in others]
        return list_fitted_runs(fits, self.shape)

    @cached_property
    def jacobians(self) -> list[JacobianBasis]:
        """Bases that are computed from Jacobians."""
        plans = (*self.panel.derived.values(), *self.plans)
        fits = iter_basis_fits([rule for p in plans for rule in p.rules])
        bases = (fit for fit in fits if isinstance(fit, JacobianBasis))
        keyed = {(id(o.sample.run.rows), o.sample.cell, *o.points, o.of_target): o for o in bases}
        return list(keyed.values())

    def batches(self) -> int:
        """Return the number of forward passes over batches of prompts for all unpatched runs."""
        others = [*self.fitted, *self.external]
        tokens = (int(run.lengths.sum()) for run, _ in others)
        return self.sweeps.total() * self.batch_count + sum(
            -(-n // self.prompt_tokens) for n in tokens
        )


class PanelWork:
    """The work of a panel on some prompts: initially that of the plain loop; each method applies
    one optimisation. The panel's unpatched runs are counted with its first prompts."""

    def __init__(self, panel: PanelCount, prompts: Ints) -> None:
        self.panel = panel
        self.first, self.prompts = bool(len(prompts)) and prompts[0] == 0, prompts
        self.batches = -(-len(prompts) // batch_size(panel.panel, panel.prompt_tokens))
        self.rows = [plan.passes(prompts) for plan in panel.plans]
        self.observed = self.rows
        """The rows of all cells, which may share a pass."""
        self.patched = self._whole()
        self.unpatched = panel.unpatched(stopped=False) if self.first else Cost()
        self.shortcuts = FULL_PASS
        self.stopped = False
        """Whether unpatched runs stop above their highest read."""
        self.settles = False
        """Whether nodes of circuits aren't computed that give what ablated edges carry."""
        self.shares = False
        """Whether rows of a prompt share equal tokens, if blocks attend to images."""
        self.keeps_tokens = False
        self.joins = False
        self.narrows = False
        """Whether two rows of the unembedding suffice."""
        self.readings = ReadPasses.of(panel.plans, self.rows)
        given = prompts, panel.full_pass.whole, panel.pass_tokens
        every = (gradient_work(plan, *given) for plan in panel.plans)
        self.gradients = sum(every, GradientWork())
        self.encoding = self._encoding()

    @property
    def cost(self) -> Cost:
        """The remaining cost."""
        return self.patched + self.unpatched + self.encoding + self._replies() + self._estimates()

    def _encoding(self) -> Cost:
        """Return the cost of coordinates in bases, lenses, and images in the vision encoder."""
        plans = zip(self.panel.plans, self.rows, strict=True)
        adds = sum(encoding_adds(plan, rows, joined=self.joins) for plan, rows in plans)
        adds += sum(observation_adds(plan, self.prompts) for plan in self.panel.plans)
        pairs = zip(self.panel.plans, self.rows, strict=True)
        adds += sum(
            vision_adds(plan, rows, self.prompts, joined=self.joins) for plan, rows in pairs
        )
        pairs = zip(self.panel.plans, self.observed, strict=True)
        outputs = 2 if self.narrows else self.panel.shape.outputs
        adds += sum(unembedding_adds(plan, rows, outputs) for plan, rows in pairs)
        return Cost(multiply_adds=adds)

    def _estimates(self) -> Cost:
        """Return the cost of the estimates that replace rows."""
        shape, gradients = self.panel.shape, self.gradients
        forwards, backwards = gradients.forwards, gradients.backwards
        if self.joins:
            forwards, backwards = gradients.joined_forwards, gradients.joined_backwards
        adds = gradients.adds + gradients.logits * float(shape.d_model * shape.outputs)
        return Cost(0, 0, forwards, gradients.tokens, adds, backwards)

    def _replies(self) -> Cost:
        """Return the cost after the prefill; unpatched runs generate once per panel."""
        said = self.panel.plans[0].experiment.generation
        if said is None:
            return Cost()
        parts = [
            generation_lengths(plan, rows, unpatched=self.first and not number)
            for number, (plan, rows) in enumerate(zip(self.panel.plans, self.rows, strict=True))
        ]
        lengths, sources = np.concatenate(parts, axis=1)
        together = self.panel.pass_tokens if self.joins else None
        shape, given = self.panel.shape, (self.panel.plans, self.rows)
        if shape.encodes_apart:
            cost = decoder_reply_cost(shape, lengths, sources, said.tokens, said.samples)
            if self._keeps_with_images:
                texts, size = lengths - sources, self.panel.pass_tokens
                work = reply_work(texts, said.tokens, said.samples, kept=True, pass_tokens=size)
                cost = reply_cost(shape, work)
            read = self.readings.list_passes(*given, said.tokens, unpatched=self.first)
            return sum(
                (
                    read_pass_cost(shape, reply_passes, said.samples, together)
                    for reply_passes in read
                ),
                cost,
            )
        work = reply_work(
            lengths,
            said.tokens,
            said.samples,
            kept=self.keeps_tokens,
            pass_tokens=self.panel.pass_tokens,
        )
        read = self.readings.work(*given, together, unpatched=self.first)
        return reply_cost(shape, work + read)

    def keep_tokens(self) -> None:
        """Compute only the newest token in each step of a reply, except of an encoder-decoder."""
        self.keeps_tokens = True
        saved = self._count_prefill_copies() if self._keeps_with_images else Cost()
        self.patched = replace(
            self.patched,
            tokens=self.patched.tokens - saved.tokens,
            multiply_adds=self.patched.multiply_adds - saved.multiply_adds,
        )

    @property
    def _keeps_with_images(self) -> bool:
        """Whether replies cache keys and values in a model whose blocks attend to an image."""
        every = [plan.experiment for plan in self.panel.plans]
        attends = self.panel.shape.attends_to_image
        return self.keeps_tokens and attends and every[0].generation is not None

    def _count_prefill_copies(self) -> Cost:
        """Return the cost of the tokens of prompts before the first one that a row changes, except
        those of one row of each prompt."""
        shape, block = self.panel.shape, self.panel.block
        tokens, adds = 0, 0.0

        def count(lengths: Ints, sources: Ints) -> float:
            each = block.whole(lengths + sources, sources) - block.image_maps(sources)
            return float(each.sum())

        for plan, rows in zip(self.panel.plans, self.rows, strict=True):
            if plan.experiment.in_vision:  # each row has different images
                continue
            equal = count_unchanged_tokens(plan, rows)[-1]
            sources = plan.sources(rows)
            first, images = np.zeros((2, int(rows.prompt.max(initial=0)) + 1), dtype=np.int64)
            np.maximum.at(first, rows.prompt, equal)
            np.maximum.at(images, rows.prompt, sources)
            first, images = first[first > 0], images[first > 0]
            tokens += int(equal.sum() - first.sum()) * plan.draws
            adds += (count(equal, sources) - count(first, images)) * plan.draws
        return Cost(tokens=tokens * shape.n_layers, multiply_adds=adds * shape.n_layers)

    @cached_property
    def shapes(self) -> list[_Shapes]:
        """The remaining rows by their computation; no rows are dropped after this."""
        return [
            shape
            for plan, rows in zip(self.panel.plans, self.rows, strict=True)
            for shape in _shapes(plan, rows)
        ]

    def stop_early(self) -> None:
        """Stop unpatched runs that are only read above their highest read."""
        self.stopped = True
        if self.first:
            self.unpatched = self.panel.unpatched(stopped=True)

    def leave_inert_out(self) -> None:
        """Skip rows that can't differ from the base run."""
        plans = zip(self.panel.plans, self.rows, strict=True)
        left = [np.flatnonzero(~plan.is_inert(rows)) for plan, rows in plans]
        self.settles = True
        self.rows = [rows.take(numbers) for rows, numbers in zip(self.rows, left, strict=True)]
        self.readings = self.readings.take(left)
        self.patched = self._whole()
        self.encoding = self._encoding()

    def share(self) -> None:
        """Run equal rows, and equal beginnings of unpatched prompts, once."""
        self.shares = True
        shared = self.panel.sharer.of(self.rows)
        numbers = [np.flatnonzero(shared.owner == n) for n in range(len(self.panel.plans))]
        self.rows = [shared.rows.take(rows) for rows in numbers]
        self.readings = self.readings.shared(shared).take(numbers)
        self.patched = self._whole()
        self.encoding = self._encoding()
        if self.first:
            saved = self.panel.saved_by_sharing(stopped=self.stopped)
            left = self.unpatched.tokens - saved.tokens
            adds = self.unpatched.multiply_adds - saved.multiply_adds
            self.unpatched = replace(self.unpatched, tokens=left, multiply_adds=adds)

    def restart(self, **shortcuts: bool) -> None:
        """Let rows reuse one more part of the unpatched run."""
        self.shortcuts = replace(self.shortcuts, **shortcuts)
        shape = self.panel.shape
        tokens = 0
        adds = self.patched.rows * float(shape.d_model * shape.outputs)
        for one in self.shapes:
            more_tokens, more_adds = one.work(self.panel, self.shortcuts, settles=self.settles)
            tokens += more_tokens
            adds += more_adds
        self.patched = replace(self.patched, tokens=tokens, multiply_adds=adds)

    def narrow(self) -> None:
        """Compute two rows of the unembedding per row where no metric needs all logits."""
        measures = [m for plan in self.panel.plans for m in plan.experiment.measures]
        if not all(atom.form.narrow for measure in measures for atom in measure.atoms):
            return
        shape, self.narrows = self.panel.shape, True
        self.encoding = self._encoding()
        saved = self.patched.rows * float(shape.d_model * (shape.outputs - 2))
        left = self.patched.multiply_adds - saved
        self.patched = replace(self.patched, multiply_adds=left)

    def join(self) -> None:
        """Join rows into passes and prompts into batches."""
        self.joins = True
        self.encoding = self._encoding()
        if self.patched.rows:
            passes = -(-sum(one.width for one in self.shapes) // self.panel.pass_tokens)
            forwards = min(self.patched.forwards, max(passes, self.batches))
            saved = self._count_row_copies(forwards) if self.shares else Cost()
            self.patched = replace(
                self.patched,
                forwards=forwards,
                tokens=self.patched.tokens - saved.tokens,
                multiply_adds=self.patched.multiply_adds - saved.multiply_adds,
            )
        if self.first:
            self.unpatched = replace(self.unpatched, forwards=self.panel.batches())

    def _count_row_copies(self, passes: int) -> Cost:
        """Return the cost of the equal tokens of a prompt's rows, except the first of each in a
        pass, if blocks attend to images."""
        shape = self.panel.shape
        generates = self.panel.plans[0].experiment.generation is not None
        if not shape.attends_to_image or generates:
            return Cost()
        pairs = [*zip(self.panel.plans, self.rows, strict=True)]
        equal = np.concatenate(
            [np.repeat(count_unchanged_tokens(*pair), pair[0].draws, axis=1) for pair in pairs],
            axis=1,
        )
        prompt = np.concatenate([np.repeat(rows.prompt, plan.draws) for plan, rows in pairs])
        lengths = [plan.lengths(rows) - plan.sources(rows) for plan, rows in pairs]
        tokens = sum(
            int(length.sum()) * plan.draws for length, (plan, _) in zip(lengths, pairs, strict=True)
        )
        first = np.zeros((shape.n_layers, int(prompt.max(initial=0)) + 1), dtype=np.int64)
        for layer in range(shape.n_layers):
            np.maximum.at(first[layer], prompt, equal[layer])
        times = max(1, passes // self.batches)
        copies = equal.sum(axis=1) - times * first.sum(axis=1)
        few = copies < passes * count_worthwhile_copies(tokens // passes)
        count = int(np.where(few, 0, copies).sum())
        return Cost(
            tokens=count, multiply_adds=float(count * self.panel.block.saved_by_copy(experts=False))
        )

    def _whole(self) -> Cost:
        """Return the cost of every row as a full forward pass."""
        count = tokens = 0
        adds = 0.0
        logits = self.panel.shape.d_model * self.panel.shape.outputs
        for plan, one in zip(self.panel.plans, self.rows, strict=True):
            passed, added = self.panel.row_passes(plan, plan.lengths(one), plan.sources(one))
            count += len(one) * plan.draws
            tokens += int(passed.sum()) * plan.draws
            adds += float(added.sum()) * plan.draws
            adds += len(one) * plan.draws * float(logits)
        # The first prompts suffice, because all prompts have the same cells.
        cells = sum(len(np.unique(one.cell)) for one in self.rows) if self.first else 0
        return Cost(cells, count, count, tokens, adds)


def count_unchanged_tokens(plan: ExperimentPlan, rows: RowTable) -> Ints:
    """Return [block, row]: the tokens before the first one that a row has changed when a block
    begins, in a model whose blocks attend to an image."""
    shape, sources = plan.experiment.model.shape, plan.sources(rows)
    first = np.repeat(plan.lengths(rows)[None], shape.n_layers + 1, axis=0)
    if plan.path is not None or plan.ablates_circuits:  # their passes share no tokens
        first[0] = sources
    for rule in plan.rules:
        if rule.rule.does.changes == "nothing":
            continue
        row, token = rule.written.tokens.expand(rule.written_runs(rows))
        index, point = rule.points.expand(rule.site_of_cell[rows.cell][row])
        for number in np.unique(point):
            place, numbers = rule.point_table[number], index[point == number]
            site = SITES[place.site]
            layer = 0 if place.layer is None or site.stack == "vision" else place.layer
            layer += site.component == "resid_post" and site.stack != "vision"
            of_image = site.stack == "vision" or place.site in ("k cross", "v cross")
            at = sources[row[numbers]] if of_image else token[numbers]
            if place.layer is not None or place.site == "embed":
                np.minimum.at(first[layer], row[numbers], at)
    return np.minimum.accumulate(first, axis=0)[:-1] - sources


def _blocks(table: Sequence[SitePoint], points: RaggedColumn) -> Ints:
    """Return numbers that are equal where the same sites of the same blocks are written, in any
    heads or neurons. Shape [site combination]."""
    numbers: dict[frozenset[tuple[str, int | None]], int] = {}
    places = [(point.site, point.layer) for point in table]
    blocks: list[int] = []
    for begin, end in zip(points.offsets[:-1], points.offsets[1:], strict=True):
        own = frozenset(places[point] for point in points.values[begin:end])
        blocks.append(numbers.setdefault(own, len(numbers)))
    return np.array(blocks, dtype=np.int64)


def _shapes(plan: ExperimentPlan, rows: RowTable) -> list[_Shapes]:
    """Return the rows of an experiment; for path patching, also the rows that record the receivers'
    inputs. If such rows are full forward passes, other passes read their frozen activations."""
    shapes = [_Shapes(plan, rows)]
    path = plan.path
    if path is not None and path.paths is not None and not path.paths.at_the_end:
        at = path.written_runs(rows)
        sender = plan.senders[rows.cell]
        code = combine_columns([[sender, at, rows.alternative, rows.prompt]], [len(rows)])
        _, first = np.unique(code, return_index=True)
        shapes.append(_Shapes(plan, rows.take(first), recording=True))
    if path is not None and plan.whole:
        shapes.append(shapes[-1])
        if path.paths is not None and path.paths.also_at_the_end:  # inputs without it
            shapes.append(shapes[-1])
    return shapes


class _Shapes:
    """The rows of an experiment by their computation; rows with equal costs are counted together.

    recording: Whether they are rows of path patching that freeze everything except the senders and
    record the receivers' inputs.
    """

    def __init__(self, plan: ExperimentPlan, rows: RowTable, *, recording: bool = False) -> None:
        self.plan = plan
        self.recording = recording
        lengths, sources = plan.lengths(rows), plan.sources(rows)
        columns: list[Ints] = [lengths, sources]
        for rule in plan.rules:
            run = rule.written_runs(rows)
            first = rule.written.leftmost(run) if len(rows) else run
            table, points, combination = self._places(rule)
            blocks = _blocks(table, points)[combination[rows.cell]]
            columns += [blocks, first, rule.written.tokens.counts(run)]
            if rule.rule.circuit is not None:
                columns += [rule.site_of_cell[rows.cell], *rule.class_counts(rows).T]
        at = [
            np.asarray(measure.at[plan.experiment.spec.base])[rows.prompt]
            for measure in plan.experiment.measures
            if plan.experiment.spec.base in measure.at
        ]
        code = combine_columns([[*columns, *at]], [len(rows)])
        _, first, counts = np.unique(code, return_index=True, return_counts=True)
        self.rows = rows.take(first)
        self.lengths, self.sources = lengths[first], sources[first]
        self.counts = counts * plan.draws
        self.masks = self._masks([column[first] for column in at])
        begin = np.where(
            self.masks.real.any(axis=1),
            plan.leftmost(self.rows) if len(first) and not plan.whole else 0,
            0,
        )
        self.width = int(np.maximum(1, self.lengths - begin) @ self.counts) * plan.token_weight

    def work(self, panel: PanelCount, shortcuts: Shortcuts, *, settles: bool) -> tuple[int, int]:
        """Return (tokens through blocks, multiply-adds).

        Args:
            panel: The panel of the rows.
            shortcuts: What rows reuse of their starting run.
            settles: Whether nodes aren't computed that give what ablated edges carry.
        """
        if self.plan.ablates_circuits:
            shortcuts = shortcuts.of_circuits()
        tokens, adds = self._blocks(panel, FULL_PASS if self.plan.whole else shortcuts)
        for rule in self.plan.rules:
            if rule.rule.circuit is not None:
                written = rule.class_counts(self.rows)
                number = rule.site_of_cell[self.rows.cell]
                each = panel.circuit_adds(rule, settles=False)[number]
                if settles and settles_circuits(self.plan):
                    fewer = panel.circuit_adds(rule, settles=True)[number]
                    each = np.where(written == self.lengths[:, None], fewer, each)
                adds += int(self.counts @ (written * each).sum(axis=1))
        return tokens, adds

    def _blocks(self, panel: PanelCount, shortcuts: Shortcuts) -> tuple[int, int]:
        """Return (tokens through blocks, multiply-adds) without those of ablated edges."""
        shape = panel.shape
        if shape.encodes_apart:
            passed, added = panel.row_passes(self.plan, self.lengths, self.sources)
            return int(passed @ self.counts), int(added @ self.counts)
        tokens = adds = 0
        for work in block_work(
            self.masks,
            shape.n_layers,
            parallel=shape.parallel_block,
            causal=shape.causal,
            shortcuts=shortcuts,
        ):
            more_tokens, more_adds = panel.block.of_work(work, self.lengths, self.counts)
            tokens += more_tokens
            adds += more_adds
        return tokens, adds

    def _places(self, rule: RulePlan) -> tuple[Sequence[SitePoint], RaggedColumn, Ints]:
        """Return what rows write: (points, combinations of them, combination of each cell)."""
        paths = rule.paths
        if paths is not None and not paths.at_the_end and not self.recording:
            return paths.table, paths.points, paths.pair_of_cell
        return rule.point_table, rule.points, rule.site_of_cell

    def _masks(self, at: Sequence[Ints]) -> RowMasks:
        """Return the written and read positions of the rows."""
        rows, lengths = self.rows, self.lengths
        longest = int(lengths.max(initial=1))
        real = np.arange(longest)[None, :] < lengths[:, None]
        writes: dict[tuple[str, int | None], TokenMask] = {}
        received: dict[tuple[str, int | None], TokenMask] = {}
        for rule in self.plan.rules:
            run = rule.written_runs(rows)
            row, token = rule.written.tokens.expand(run)
            own = token < lengths[row]  # passes over prompts exclude the answer
            row, token = row[own], token[own]
            table, points, combination = self._places(rule)
            index, point = points.expand(combination[rows.cell][row])
            target = received if rule.rule.does.changes == "nothing" else writes
            for number in np.unique(point):
                place = table[number]
                own = index[point == number]
                mask = target.setdefault((place.site, place.layer), np.zeros_like(real))
                mask[row[own], token[own]] = True
                if rule.rule.does.mode == "step":  # the start of the step is read too
                    mask = received.setdefault((place.site, place.layer), np.zeros_like(real))
                    mask[row[own], np.maximum(token[own] - 1, 0)] = True
            if self.recording and rule.paths is not None:
                for place in {(p.site, p.layer) for p in rule.paths.reads}:
                    mask = received.setdefault(place, np.zeros_like(real))
                    mask[row, token] = True
        final = np.zeros_like(real)
        measures = self.plan.experiment.measures
        base = self.plan.experiment.spec.base
        if len(rows) and not self.recording:
            if any(base not in measure.at for measure in measures):
                final[np.arange(len(rows)), lengths - 1] = True
            for column in at:
                final[np.arange(len(rows)), column] = True
        whole = any(a.form.takes == "prompt" for measure in measures for a in measure.atoms)
        if whole and not self.recording:
            final |= real
        reads = {
            (atom.point.site, atom.point.layer): final
            for measure in measures
            for atom in measure.atoms
            if atom.point is not None
        }
        path = None if self.plan.path is None else self.plan.path.paths
        held = None
        if path is not None and not self.plan.whole and (path.at_the_end or self.recording):
            every = np.ones(len(rows), dtype=np.bool_)
            held = HeldSublayers(every, every & (not path.through_mlps), every & path.frozen_norms)
        return RowMasks(real, writes, {**reads, **received}, final, held)
