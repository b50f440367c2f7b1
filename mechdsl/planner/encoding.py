"""Cost of the coordinates that rules change: encoding, decoding, and errors of dictionaries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.dictionaries.folder import MAX_GATHERED, DictionaryFile
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.planner.rows import RowTable, RulePlan
from mechdsl.prompts.runs import Hits
from mechdsl.resolve.bases import CoordinateChange
from mechdsl.resolve.observations import Observation, RowSetObservation, join_positions
from mechdsl.resolve.types import BasisMember, PythonBasis


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
        member = max(rule.rule.basis.members, key=lambda each: each.size)
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
        for each in rule.rule.basis.members:
            own = each.operand
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
    counts = np.array([len(each.which) for each in rule.coordinates], dtype=np.int64)
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
    context = max(context_adds(each, hits) for each in rule.rule.basis.members)
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
    ends = (max((token for own in row for token in own), default=-1) + 1 for row in hits)
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
        found = float((directions * (2 + directions) * basis.width * vectors).sum())
    elif does.operation == "reconstruct":
        found = basis.reconstruction * float(distinct.sum())
    else:
        encoded = np.where(alone & basis.by_feature, 0.0, basis.encoding * distinct)
        encoded += np.where(alone & basis.by_feature, named * basis.width * vectors, 0)
        decoded = np.where(alone, named * basis.width, basis.decoding) * vectors
        found = float(((times + basis.layers - 1) * encoded + basis.layers * decoded).sum())
        found += basis.reconstruction * float(distinct.sum()) if does.drops_error else 0.0
    if basis.overcomplete and plan.reconstructed:
        found += basis.reconstruction * float(_distinct(rule, rows, vectors).sum())
    return found * plan.draws


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
