"""Readout of metrics, of the user's and of mechdsl, and of observations: one number per row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base import limits
from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.experiments import UnreadableMeasure
from mechdsl.diagnostics.syntax import PythonFailed
from mechdsl.execute.unpatched_batch import (
    Continuation,
    MeasuredPosition,
    collect_measured_positions,
    get_continuation_ids,
)
from mechdsl.forward.hooks.batch import (
    RowPositions,
    SiteRead,
    array_to_device,
    arrays_to_device,
    tensors_to_host,
    to_device,
)
from mechdsl.forward.hooks.coordinates import MAX_NUMBERS, CoordinateSystem, count_encoded
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.planner.rows import RowTable, RulePlan, expand_units, point_units
from mechdsl.program.python_functions import TOKENIZER_PARAMETER, PythonFailure, PythonNotLoaded
from mechdsl.prompts.runs import PositionCell, ReplyPosition
from mechdsl.resolve.loops import evaluate_arithmetic, iter_divisors
from mechdsl.resolve.observations import Observation, Unembedding
from mechdsl.resolve.types import (
    ItemNumber,
    MetricTerm,
    ResolvedMeasure,
    ResolvedRule,
    SiteLayer,
    SitePoint,
)
from mechdsl.vocab.metrics import PatternTimeout, Reply, widen

REPLY_ARGUMENT = "it takes `replies`, n texts, and `rows`, n of them, and returns n numbers"

RETURN_HINT = "it takes `logits`, [n, vocab], and `rows`, n of them, and returns n numbers"


def call_python_metric(atom: MetricTerm, logits: Tensor, prompts: Ints, usable: Bools) -> Tensor:
    """Call a function on the usable rows; others are NaN.

    Args:
        logits: [row, vocab].
        prompts: [row] index into the table.
        usable: [row].

    Returns:
        [row].

    Raises:
        PythonFailure: E0223, with the row that it fails on if there is one.
    """
    metric = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return metric
    index = torch.from_numpy(rows)
    if len(rows) < len(prompts):
        logits, prompts = logits[to_device(index, logits.device)], prompts[rows]
    try:
        metric[index] = _call_function(atom, logits, prompts)
    except PythonNotLoaded:
        raise
    except PythonFailure as failure:
        if failure.row is None and failure.__cause__ is not None:  # the function raised
            failure.row = _find_failing_row(
                lambda part: _call_function(atom, logits[part], prompts[part]),
                len(prompts),
                failure.diagnostic.reason,
            )
        if failure.row is not None:
            failure.row = int(rows[failure.row])
        raise
    return metric


def call_reply_metric(atom: MetricTerm, replies: Sequence[str], prompts: Ints) -> Floats:
    """Call a function on texts [row], as `call_python_metric` on logits."""
    if not len(prompts):
        return np.zeros(0)
    try:
        return _read_numbers(atom, list(replies), prompts, REPLY_ARGUMENT).numpy()
    except PythonNotLoaded:
        raise
    except PythonFailure as failure:
        if failure.row is None and failure.__cause__ is not None:  # the function raised
            failure.row = _find_failing_row(
                lambda part: _read_numbers(
                    atom, list(replies[part]), prompts[part], REPLY_ARGUMENT
                ),
                len(prompts),
                failure.diagnostic.reason,
            )
        raise


def _call_function(atom: MetricTerm, logits: Tensor, prompts: Ints) -> Tensor:
    """Return [row] on the CPU: the function's values for logits."""
    # A copy, so that a function that modifies it doesn't affect other readers.
    function = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    return _read_numbers(atom, function, prompts, RETURN_HINT)


def _read_numbers(atom: MetricTerm, own: Tensor | list[str], prompts: Ints, hint: str) -> Tensor:
    """Return [row] on the CPU: the function's values, after a check of their shape and type."""
    function = atom.python
    assert function is not None
    rows = [dict(atom.rows[prompt]) for prompt in prompts]
    library = None if atom.tokenizer is None else atom.tokenizer.library
    third = (library,) if function.tokenizer == "third" else ()
    named = {TOKENIZER_PARAMETER: library} if function.tokenizer == "named" else {}
    with torch.no_grad():
        given = function.call(own, rows, *third, **named)
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise function.failure(f"it returned {_describe_type(given)}, not numbers", hint) from None
    if numbers.shape != (len(prompts),):
        shape = list(numbers.shape)
        raise function.failure(f"it returned the shape {shape}, not [{len(prompts)}]", hint)
    if numbers.is_complex():
        raise function.failure("it returned complex numbers", hint)
    numbers = numbers.detach().double().cpu()
    if numbers.isnan().any():
        first = int(numbers.isnan().nonzero()[0])
        row = atom.rows[prompts[first]]
        told = ", ".join(f"{name} = {value!r}" for name, value in row.items() if "." not in name)
        raise function.failure(
            f"it returned NaN, in the row with {_shorten(told)}", hint, row=first
        )
    return numbers


def _find_failing_row(call: Callable[[slice], object], count: int, reason: str) -> int | None:
    """Bisect for a single row that raises the same error; None if there is none."""

    def raises(low: int, high: int) -> bool:
        try:
            call(slice(low, high))
        except PythonFailure as failure:
            return failure.diagnostic.reason == reason
        return False

    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if raises(low, middle):
            high = middle
        elif raises(middle, high):
            low = middle
        else:
            return None
    return low


def _describe_type(value: object) -> str:
    return "nothing" if value is None else f"a `{type(value).__name__}`"


def _shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


class ReplySearchFailed(Exception):
    """A search takes too long; caught where the rows are known."""

    def __init__(self, diagnostic: UnreadableMeasure, row: int) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic
        self.row = row


def compute_reply_values(
    atom: MetricTerm, replies: Sequence[Reply], prompts: Ints, items: Sequence[ItemNumber]
) -> Floats:
    """Compute the metric of each reply; NaN if it has none, like a reply without a number.

    Args:
        replies: [row].
        prompts: [row] index into the table.
        items: [row] the occurrence that `{item.index}` refers to.

    Returns:
        [row].

    Raises:
        PythonFailure: E0223, with the row that it fails on if there is one.
        ReplySearchFailed: E0612 for a search that exceeds the time limit.
    """
    if atom.python is not None:
        return call_reply_metric(atom, [reply.text for reply in replies], prompts)
    wanted = [
        atom.wanted[item if item in atom.wanted else None][prompt]
        for prompt, item in zip(prompts.tolist(), items, strict=True)
    ]
    try:
        return np.array(atom.form.function(replies, wanted), dtype=np.float64)
    except PatternTimeout as error:
        raise ReplySearchFailed(_search_timeout(atom, replies[error.row]), error.row) from error


def _search_timeout(atom: MetricTerm, reply: Reply) -> UnreadableMeasure:
    span = atom.node.span
    return UnreadableMeasure(
        span=span,
        text=span.written,
        reason=f"in a reply of {len(reply.text):,} letters the search takes more than "
        f"{limits.SEARCH_SECONDS:g} s",
        hint="nested repetitions match the same letters in too many ways: write `a+` for "
        "`(a+)+`, or `(…)++`, which doesn't backtrack",
    )


@dataclass(frozen=True, eq=False)
class ObservedValues:
    """Observed values of rows: one number per row, or logits for metrics to read."""

    numbers: Tensor | None = None
    """[row]"""
    logits: Tensor | None = None
    """[row, token]"""
    tokens: Tensor | None = None
    """[K] ascending: the tokens that `logits` holds; None for the whole vocabulary."""
    listed: Tensor | None = None
    """[row, vocab] probabilities, if tokens are listed."""


@dataclass(frozen=True, eq=False)
class _CodedVectors:
    """Vectors of which the same number of coordinates in one basis is observed."""

    own: Ints
    """[k] numbers of the vectors."""
    system: CoordinateSystem
    which: Ints | None
    """[k, m] coordinates of each vector; None for all."""
    first: Ints
    """[distinct] index of a vector, once each: cells of a sweep read the same vectors."""
    same: Ints
    """[k] index into `first`."""

    def means(self, vectors: Tensor) -> Tensor:
        """Return [k, 1]: the mean of the named coordinates of each vector.

        Args:
            vectors: [k, width].
        """
        device = vectors.device
        if self.which is None:
            distinct = vectors[array_to_device(self.first, device)]
            return self._means(distinct, None)[array_to_device(self.same, device)]
        if len(self.first) * self.system.size > self.which.size:
            return self._means(vectors, array_to_device(self.which, device))
        means = vectors.new_empty(len(vectors), 1)
        count = max(1, MAX_NUMBERS // self.system.size)
        for begin in range(0, len(self.first), count):
            here = (self.same >= begin) & (self.same < begin + count)
            first, same, which, indices = (
                array_to_device(each, device)
                for each in (
                    self.first[begin : begin + count],
                    self.same[here] - begin,
                    self.which[here],
                    np.flatnonzero(here),
                )
            )
            every = self.system.encode(vectors[first], None)
            means[indices] = every[same[:, None], which].mean(1, keepdim=True)
        return means

    def _means(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Encode each vector, in parts that fit in memory."""
        count = count_encoded(self.system, vectors, which)
        means = [
            self.system.encode(
                vectors[begin : begin + count],
                None if which is None else which[begin : begin + count],
            ).mean(1, keepdim=True)
            for begin in range(0, len(vectors), count)
        ]
        return torch.cat(means)


@dataclass(frozen=True, eq=False)
class _SiteVectors:
    """K vectors of one site in one layer."""

    read: SiteRead
    row: Ints
    """[K] the row of each vector."""
    prompt: Ints
    """[K] the row of the table that it is a row of."""
    place: Ints
    """[K] index of each vector into the values read at the site."""
    unit: Ints | None
    """[K] head or neuron; None if each vector is undivided."""
    position: Ints
    """[K] sequence position of each vector."""
    keys: tuple[Ints, Ints] | None
    further_vectors: Mapping[SiteLayer, Ints] = field(default_factory=dict[SiteLayer, Ints])
    """[K] per further site, the index of the accompanying vector into the values read there."""
    coded: Sequence[_CodedVectors] = ()
    """The coordinates to compute of each vector; none if whole vectors are observed."""


@dataclass(frozen=True, eq=False)
class _SeenVectors:
    """Implementation of `mechdsl.resolve.observations.ObservedVectors`."""

    vectors: Tensor
    units: Tensor | None
    positions: Tensor
    prompts: Ints
    keys: tuple[Tensor, Tensor] | None
    place: SiteLayer
    further_vectors: Mapping[SiteLayer, Tensor]
    unembedding: Unembedding
    tokens: Tensor | None


@dataclass(frozen=True, eq=False)
class RowObserver:
    """Reader of the vectors that an `observe` rule looks at, for rows of one experiment."""

    rule: ResolvedRule
    does: Observation
    rows: int
    tokens_per_row: Ints
    """[row] number of joined positions."""
    places: Mapping[SiteRead, RowPositions]
    """Rows of the pass and positions to read, per site."""
    parts: Sequence[_SiteVectors]

    def observed(
        self, reads: Mapping[SiteRead, Tensor], unembedding: Unembedding, tokens: Tensor | None
    ) -> ObservedValues:
        """Compute the observed value of every row.

        Args:
            reads: [place, units, width] values read at each site.
            unembedding: The model's unembedding.
            tokens: Tokens whose logits are needed; None for all. Observations that list tokens
                always compute all logits.
        """
        tokens = None if self.does.lists(self.rule) else tokens
        of_logits = self.does.gives == "logits"
        total: Tensor | None = None
        device = next(iter(reads.values())).device
        count = np.zeros(self.rows, dtype=np.int64)
        for part in self.parts:
            seen = self._seen(part, reads, unembedding, tokens if of_logits else None)
            if of_logits:
                values = self.does.logits(self.rule, seen)
            else:
                values = self.does.each(self.rule, seen)
            count += np.bincount(part.row, minlength=self.rows)
            in_order = len(self.parts) == 1 and np.array_equal(part.row, np.arange(self.rows))
            if in_order:  # exactly one vector per row
                total = values
                break
            values = values.cpu()  # where the order of summation doesn't depend on threads
            if total is None:
                total = values.new_zeros(self.rows, *values.shape[1:])
            total.index_add_(0, torch.from_numpy(part.row), values)
        assert total is not None
        over = torch.from_numpy(self.tokens_per_row if self.does.adds_up else count)
        over = to_device(over.to(total.dtype), total.device)
        over = over.reshape(-1, *(1 for _ in total.shape[1:]))
        if of_logits:
            logits = to_device(total / over, device)
            listed = widen(logits).softmax(-1) if self.does.lists(self.rule) else None
            return ObservedValues(logits=logits, tokens=tokens, listed=listed)
        return ObservedValues(numbers=(total / over).cpu())

    def _seen(
        self,
        part: _SiteVectors,
        found: Mapping[SiteRead, Tensor],
        unembedding: Unembedding,
        tokens: Tensor | None,
    ) -> _SeenVectors:
        tensor = widen(found[part.read])
        device = tensor.device
        place = array_to_device(part.place, device)
        chosen = None if part.unit is None else array_to_device(part.unit, device)
        vectors = tensor[place].flatten(1) if chosen is None else tensor[place, chosen]
        if part.coded:
            numbers = vectors.new_empty(len(vectors), 1)
            for coded_vectors in part.coded:
                index = array_to_device(coded_vectors.own, device)
                numbers[index] = coded_vectors.means(vectors[index])
            vectors = numbers
        keys = None
        if part.keys is not None:
            index, key = arrays_to_device(part.keys, device)
            keys = index, key
        further = {
            at: widen(found[SiteRead(*at)])[array_to_device(where, device)].flatten(1)
            for at, where in part.further_vectors.items()
        }
        return _SeenVectors(
            vectors,
            chosen,
            array_to_device(part.position, device),
            part.prompt,
            keys,
            (part.read.site, part.read.layer),
            further,
            unembedding,
            tokens,
        )


@dataclass(frozen=True, eq=False)
class ReplyTokenMap:
    """Positions of reply tokens in rows that generated text."""

    tokens_of: Callable[[ReplyPosition], Sequence[tuple[int, ...]]]
    """[row of the pass] the selected tokens of its reply, counted from 1."""
    lengths: Ints
    """[row of the pass] number of prompt tokens."""
    at: Ints
    """[row] index of the row in the pass."""

    def there(self, plan: RulePlan, rows: RowTable) -> Bools:
        """Return [row]: whether the reply has all observed positions."""
        mask = np.ones(len(rows), dtype=np.bool_)
        for cells, cell in plan.placed:
            cell_of_row = cell[rows.cell]
            for number, position_cell in enumerate(cells):
                if position_cell.reply is not None:
                    tokens = self.tokens_of(position_cell.reply)
                    own = np.array([bool(tokens[row]) for row in self.at.tolist()], dtype=np.bool_)
                    mask &= own | (cell_of_row != number)
        return mask

    def moved(
        self, cells: Sequence[PositionCell], cell: Ints, rows: Ints, index: Ints, position: Ints
    ) -> tuple[Ints, Ints]:
        """Replace the positions of entries that refer to replies by the actual reply positions.

        Args:
            cells: The position cells.
            cell: [entry number] index into `cells`.
            rows: [entry number] its row.
            index: [K] entry number of each position, ascending.
            position: [K] positions.

        Returns:
            Entry numbers and positions, in the order of entries.
        """
        of_replies = np.array(
            [position_cell.reply is not None for position_cell in cells], dtype=np.bool_
        )[cell]
        if not of_replies.any():
            return index, position
        kept = ~of_replies[index]
        columns, places = [index[kept]], [position[kept]]
        for entry in np.flatnonzero(of_replies).tolist():
            reply = cells[cell[entry]].reply
            assert reply is not None
            row = int(self.at[rows[entry]])
            numbers = np.array(self.tokens_of(reply)[row], dtype=np.int64)
            columns.append(np.full(len(numbers), entry))
            places.append(self.lengths[row] - 1 + numbers)
        whole = np.concatenate(columns)
        order = np.argsort(whole, kind="stable")
        return whole[order], np.concatenate(places)[order]


def build_observer(
    plan: RulePlan,
    rows: RowTable,
    at: Ints,
    shape: ModelShape,
    replies: ReplyTokenMap | None = None,
    *,
    systems: Mapping[str, CoordinateSystem],
) -> RowObserver:
    """Build the observer of an `observe` rule.

    Args:
        plan: The rule's plan.
        rows: The rows of the experiment.
        at: [row] index of the row in the pass.
        shape: The model's shape.
        replies: Positions of reply tokens, if the rows generated text.
        systems: Bases by name.
    """
    does = plan.rule.does
    assert isinstance(does, Observation)
    row, position = _find_observed_positions(plan, rows, replies)
    per_row = np.bincount(row, minlength=len(rows))
    index, point = plan.points.expand(plan.site_of_cell[rows.cell][row])
    row, position = row[index], position[index]
    table = plan.point_table
    of_points = list(dict.fromkeys((p.site, p.layer, p.unit is None) for p in table))
    kind = np.array([of_points.index((p.site, p.layer, p.unit is None)) for p in table])[point]
    unit = point_units(table)[point]
    asked: dict[SiteRead, list[RowPositions]] = {}
    pooled = plan.rule.reads_pattern or (shape.attends_to_image and does.reads_tokens)
    pooled = plan.rule.in_vision and pooled
    entropy = plan.rule.in_vision and does.reads_entropy
    parts: list[_SiteVectors] = []
    for number, (site, layer, whole) in enumerate(of_points):
        indices = np.flatnonzero(kind == number)
        if not len(indices):
            continue
        units_here = None if whole else unit[indices]
        if whole and does.by_unit:
            again, units_here = expand_units(unit[indices], unit_count(shape, site, layer))
            indices = indices[again]
        read = SiteRead(site, layer, pooled=pooled, entropy=entropy)
        place = _add_request(asked, read, at[row[indices]], position[indices])
        part = _SiteVectors(
            read=read,
            row=row[indices],
            prompt=rows.prompt[row[indices]],
            place=place,
            unit=units_here,
            position=position[indices],
            keys=_expand_keys(plan, rows, row[indices], replies),
            further_vectors={
                place: _add_request(asked, SiteRead(*place), at[row[indices]], position[indices])
                for place in does.further_sites(plan.rule, shape)
            },
            coded=_code(plan, (site, layer), rows.cell[row[indices]], (place, units_here), systems),
        )
        parts.append(part)
    return RowObserver(plan.rule, does, len(rows), per_row, join_requests(asked), parts)


def _find_observed_positions(
    plan: RulePlan, rows: RowTable, replies: ReplyTokenMap | None
) -> tuple[Ints, Ints]:
    """Return the row and the sequence position of each observed token."""
    row, position = plan.written.tokens.expand(plan.written_runs(rows))
    if replies is None:
        return row, position
    cell = plan.position_of_cell[rows.cell]
    return replies.moved(plan.positions, cell, np.arange(len(rows)), row, position)


def join_requests(asked: Mapping[SiteRead, Sequence[RowPositions]]) -> dict[SiteRead, RowPositions]:
    """Join the requests for each site, in order."""
    return {
        read: (np.concatenate([p[0] for p in own]), np.concatenate([p[1] for p in own]))
        for read, own in asked.items()
    }


def _code(
    plan: RulePlan,
    place: SiteLayer,
    cells: Ints,
    places: tuple[Ints, Ints | None],
    systems: Mapping[str, CoordinateSystem],
) -> Sequence[_CodedVectors]:
    """Group the vectors at a site by basis and number of coordinates; none without a basis.

    Args:
        cells: [K] the cell of each vector.
        places: [K] the index of each vector into the values read, and its head; None for whole
            vectors.
    """
    basis = plan.rule.basis
    if basis is None or plan.coordinates_of_cell is None:
        return ()
    named = plan.coordinates_of_cell[cells]
    place_of, units = places
    heads = np.full(len(cells), -1) if units is None else units
    pairs, inverse = np.unique(np.stack([named, heads]), axis=1, return_inverse=True)
    names: list[tuple[str, int]] = []
    for number, unit in pairs.T.tolist():
        coordinate = plan.coordinates[number]
        point = SitePoint(*place, None if unit < 0 else unit)
        names.append((basis.at(point, coordinate.basis).name, len(coordinate.which)))
    kinds = list(dict.fromkeys(names))
    kind = np.array([kinds.index(each) for each in names])[inverse.ravel()]
    codes: list[_CodedVectors] = []
    for number, (name, count) in enumerate(kinds):
        coordinate = np.flatnonzero(kind == number)
        which = None
        if count:
            used, index = np.unique(named[coordinate], return_inverse=True)
            which = np.array([plan.coordinates[n].which for n in used.tolist()])[index.ravel()]
        both = np.stack([place_of[coordinate], heads[coordinate]])
        _, first, same = np.unique(both, axis=1, return_index=True, return_inverse=True)
        codes.append(_CodedVectors(coordinate, systems[name], which, first, same.ravel()))
    return codes


def _add_request(
    asked: dict[SiteRead, list[RowPositions]], read: SiteRead, rows: Ints, positions: Ints
) -> Ints:
    """Request positions of a site; each distinct position of one request is read once.

    Returns:
        Index of each position into the values that will be read at the site.
    """
    before = asked.setdefault(read, [])
    pairs = np.stack([rows, positions])
    distinct, place = np.unique(pairs, axis=1, return_inverse=True)
    start = sum(len(each[0]) for each in before)
    before.append((distinct[0], distinct[1]))
    return start + place.reshape(-1)


def _expand_keys(
    plan: RulePlan, rows: RowTable, row: Ints, replies: ReplyTokenMap | None
) -> tuple[Ints, Ints] | None:
    if plan.keys is None:
        return None
    index, key = plan.keys.tokens.expand(plan.key_runs(rows)[row])
    if replies is None:
        return index, key
    assert plan.rule.edge is not None
    assert plan.key_of_cell is not None
    cells = list(plan.rule.edge.keys.written.values())
    return replies.moved(cells, plan.key_of_cell[rows.cell][row], row, index, key)


@dataclass(frozen=True, eq=False)
class ValueGap:
    """Rows in which a measure is undefined although the model's output is usable."""

    rows: Ints
    reason: str


@dataclass(frozen=True, eq=False)
class MeasureFailure:
    """Failure of a measure's function; no row has a value."""

    problem: PythonFailed | UnreadableMeasure
    row: int | None
    """The row that it failed on; None if unknown, or if the failure doesn't depend on a row."""
    rows: int
    """Number of rows in the failing call; 0 if the failure is independent of rows."""


@dataclass(frozen=True, eq=False)
class ReadoutResult:
    """Values of all measures for rows, with failures and gaps."""

    values: list[Floats]
    """Per measure, [row]."""
    broken: Bools
    """[row] whether a value that was read is invalid; such a row has no value in any measure."""
    rounding: list[Floats]
    """Per measure, [row]: how far rounding may move the value; 0 if that wasn't requested."""
    failed: Mapping[int, MeasureFailure]
    """Failed measures, by number."""
    gaps: Mapping[int, ValueGap]
    """Measures that have no value in some rows, by number."""
    listed: Tensor | None = None
    """[row, vocab] probabilities, if an observation lists tokens."""
    replies: Sequence[tuple[Reply, ...]] = ()
    """[row] its replies: one for each sample of each noise draw."""

    def over_draws(self, draws: int) -> ReadoutResult:
        """Average over noise draws, which are adjacent rows.

        Draws without a value are left out, because a reply may be too short for a position. A row
        with a broken draw or a gap has no value.
        """
        broken = np.count_nonzero(self.broken.reshape(-1, draws), axis=1) > 0

        def mean(number: int) -> Floats:
            there = ~np.isnan(self.values[number].reshape(-1, draws))
            average = average_present(self.values[number].reshape(-1, draws), there)
            lost = broken.copy()
            if number in gaps:
                lost[gaps[number].rows] = True
            return np.where(lost, np.nan, average)

        failed = {
            number: replace(
                measure_failure,
                row=None if measure_failure.row is None else measure_failure.row // draws,
            )
            for number, measure_failure in self.failed.items()
        }
        gaps = {
            n: ValueGap(np.unique(gap.rows // draws), gap.reason) for n, gap in self.gaps.items()
        }
        listed = self.listed
        return ReadoutResult(
            [mean(number) for number in range(len(self.values))],
            broken,
            [values.reshape(-1, draws).mean(axis=1) for values in self.rounding],
            failed,
            gaps,
            listed if listed is None else listed.unflatten(0, (-1, draws)).mean(1),
            _group_replies(self.replies, draws),
        )


def average_present(values: Floats, there: Bools) -> Floats:
    """Return [row]: the mean of `values` [row, n] over present entries; NaN if there are none."""
    count = np.count_nonzero(there, axis=1)
    total = np.where(there, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _group_replies(replies: Sequence[tuple[Reply, ...]], draws: int) -> list[tuple[Reply, ...]]:
    """Collect the replies of all draws of each row."""
    groups = (replies[n : n + draws] for n in range(0, len(replies), draws))
    return [tuple(reply for one in group for reply in one) for group in groups]


@dataclass(frozen=True, eq=False)
class ReadoutInput:
    """Input of a readout. Rows are lanes of an unpatched run, or patched rows."""

    run: str
    """The run whose lanes the rows are, or that they start from."""
    prompts: Ints
    """[row] index into the prompt table."""
    items: Sequence[ItemNumber]
    """[row] the occurrence that `{item.index}` refers to."""
    logits: Tensor | None
    """[row, spot, vocab] logits of the prompts without a continuation."""
    continued: Mapping[int, Tensor]
    """Atom number → [row, token, vocab] logits of the prompts followed by the atom's text."""
    loss: Tensor | None
    activations: Mapping[int, Tensor]
    """Atom number → [row, 1, width] at the measured position."""
    references: Mapping[int, Tensor]
    """Atom number → [row, vocab] logits, or [row, 1, width], of the reference run."""
    observed: ObservedValues | None = None
    """Values of an `observe` line; None on runs without rows."""
    tokens: Tensor | None = None
    """[K] ascending: the tokens that `logits` holds; None for the whole vocabulary."""
    largest: Tensor | None = None
    """[row, spot] magnitude of the largest logit of the whole vocabulary, if `tokens` are fewer;
    None if rounding isn't estimated."""
    has_loss: Bools | None = None
    """[row] whether the prompt has a loss; None if no loss is read."""
    replies: Sequence[Reply] = ()
    """[row] its reply, if a metric reads replies."""
    standing: Ints | None = None
    """[row] the reply token at the position where its loss is read."""

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of `logits` that hold these tokens."""
        return ids if self.tokens is None else torch.searchsorted(self.tokens, ids)


@dataclass(frozen=True, eq=False)
class Readout:
    """The measures of one experiment, with their atoms numbered."""

    measures: tuple[ResolvedMeasure, ...]
    atoms: tuple[tuple[int, MetricTerm], ...]
    """(number of its spot, atom)."""
    spots: tuple[MeasuredPosition, ...]
    looking: tuple[bool, ...]
    """Per atom, whether it reads observed values instead of the model's output."""
    in_reply: tuple[bool, ...]
    """For each atom, whether it is read in a reply."""

    @staticmethod
    def of(measures: Sequence[ResolvedMeasure]) -> Readout:
        spots = collect_measured_positions(measures)
        atoms = [(spots.index(m.at), atom) for m in measures for atom in m.atoms]
        looking = [
            m.observed or atom.form.takes == "observation" for m in measures for atom in m.atoms
        ]
        in_reply = tuple(m.in_reply is not None for m in measures for _ in m.atoms)
        return Readout(tuple(measures), tuple(atoms), spots, tuple(looking), in_reply)

    def _of(self, looking: bool) -> tuple[MetricTerm, ...]:
        """Return the atoms that read observed values, or the others; none read in replies."""
        every = zip(self.atoms, self.looking, self.in_reply, strict=True)
        return tuple(atom for (_, atom), own, in_reply in every if own == looking and not in_reply)

    @property
    def continuations(self) -> tuple[int, ...]:
        """Numbers of the atoms that need a separate pass, with their text after the prompt."""
        every = enumerate(zip(self.atoms, self.looking, self.in_reply, strict=True))
        return tuple(
            n
            for n, ((_, atom), looking, in_reply) in every
            if not looking and not in_reply and any(atom.appended)
        )

    @property
    def appended_texts(self) -> tuple[Continuation, ...]:
        """Continuations of the atoms that need a separate pass."""
        return tuple(Continuation(number, self.atoms[number][1]) for number in self.continuations)

    @property
    def passes(self) -> tuple[Continuation | None, ...]:
        """Continuation of each pass over the prompts; None for the prompts alone."""
        return (None, *self.appended_texts) if self.needs_plain else self.appended_texts

    @property
    def needs_plain(self) -> bool:
        """Whether some atom is read from the prompts without a continuation."""
        return len(self.continuations) < len(self._of(looking=False)) - self._of_replies

    @property
    def _of_replies(self) -> int:
        """Number of atoms that read generated text."""
        return sum(atom.form.takes == "reply" for atom in self._of(looking=False))

    @property
    def reads_replies(self) -> bool:
        """Whether some atom reads generated text."""
        return self._of_replies > 0

    @property
    def only_replies(self) -> bool:
        """Whether every atom reads generated text, or values at positions of it."""
        in_reply = sum(self.in_reply)
        return self._of_replies + in_reply == len(self.atoms) and len(self.atoms) > 0

    @property
    def in_replies(self) -> tuple[int, ...]:
        """Numbers of the measures that are read in replies."""
        return tuple(n for n, measure in enumerate(self.measures) if measure.in_reply is not None)

    @property
    def narrow(self) -> bool:
        """Whether no atom needs the logits of the whole vocabulary.

        An atom that compares observed logits with another run needs all logits of that run.
        """
        compared = any(atom.form.takes == "reference" for atom in self._of(looking=True))
        forms = (atom.form for atom in self._of(looking=False))
        return not compared and all(form.narrow or form.takes == "reply" for form in forms)

    def observed_tokens(self, prompts: Ints) -> list[int] | None:
        """Return the tokens whose logits metrics read from observed values; None for all."""
        if not all(atom.form.narrow for atom in self._of(looking=True)):
            return None
        return sorted(self.tokens(prompts, looking=True))

    def tokens(self, prompts: Ints, *, looking: bool = False) -> set[int]:
        """Return the tokens whose logits a narrow readout reads on these prompts."""
        tokens: set[int] = set()
        for atom in self._of(looking):
            for sets in atom.sets.values():
                of_row = {sets.of_row[prompt] for prompt in prompts.tolist()}
                tokens.update(token for number in of_row for token in sets.tokens[number])
            for texts in atom.texts.values():
                tokens.update(texts[prompt][0] for prompt in prompts.tolist())
        return tokens

    @property
    def loss(self) -> MetricTerm | None:
        return next((a for a in self._of(looking=False) if a.form.takes == "prompt"), None)

    def read(
        self, reading: ReadoutInput, relative: float = 0.0, *, skip: Collection[int] = ()
    ) -> ReadoutResult:
        """Compute one value per row for every measure.

        Args:
            reading: The values to read from.
            relative: How far rounding may move a logit, relative to the largest logit at the
                metric's position; 0 skips the estimate of rounding.
            skip: Numbers of measures to leave out.
        """
        broken = self._broken(reading)
        found = [np.full(len(reading.prompts), np.nan) for _ in self.measures]
        rounding = [np.zeros(len(reading.prompts)) for _ in self.measures]
        failed: dict[int, MeasureFailure] = {}
        gaps: dict[int, ValueGap] = {}
        first = 0
        for n, measure in enumerate(self.measures):
            numbers = range(first, first + len(measure.atoms))
            first = numbers.stop
            if n in skip or measure.in_reply is not None:
                continue
            try:
                values = self._values(numbers, reading, ~broken)
            except (PythonFailure, ReplySearchFailed) as failure:
                count = 0 if isinstance(failure, PythonNotLoaded) else len(reading.prompts)
                failed[n] = MeasureFailure(failure.diagnostic, failure.row, count)
                continue
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                result = evaluate_arithmetic(measure.expression, values.__getitem__)
                found[n][:] = result
                gap = _find_gap(measure, values, found[n], ~broken)
                if relative:
                    rounding[n] = self._moved(measure, numbers, values, reading, relative)
            unknown = np.isnan(found[n])
            if gap is not None:
                gaps[n] = gap
                found[n][gap.rows], unknown[gap.rows] = np.nan, False
            for value in values.values():  # −∞ − −∞ is NaN, though each operand is valid
                broken |= np.isinf(value) & unknown
        for values_of_measure in found:
            values_of_measure[broken] = np.nan
        return ReadoutResult(found, broken, rounding, failed, gaps)

    def tensors(self, reading: ReadoutInput) -> list[Tensor]:
        """Return, per measure, [row] float64 values that carry gradients.

        The values equal those of `read`, without a report of invalid ones.
        """
        usable = np.ones(len(reading.prompts), dtype=np.bool_)
        numbers = iter(range(len(self.atoms)))
        tensors: list[Tensor] = []
        for measure in self.measures:
            values: dict[Any, Tensor] = {}
            for atom in measure.atoms:
                number = next(numbers)
                value = _atom_value(atom, number, self.atoms[number][0], reading, usable)
                values[atom.node] = _without_lacking(atom, value, reading.prompts).double()
            tensors.append(evaluate_arithmetic(measure.expression, values.__getitem__))
        return tensors

    def _values(self, numbers: range, reading: ReadoutInput, usable: Bools) -> dict[Any, Floats]:
        """Compute the atoms of a measure, by syntax node: [row]. Raises E0223 as PythonFailure."""
        values: list[Tensor] = []
        for number in numbers:
            spot, atom = self.atoms[number]
            if self.looking[number]:
                value = _observed_value(atom, number, reading, usable)
            else:
                value = _atom_value(atom, number, spot, reading, usable)
            value = _without_lacking(atom, value, reading.prompts)
            values.append(value.detach().double())
        nodes = (self.atoms[number][1].node for number in numbers)
        on_host = (value.numpy() for value in tensors_to_host(values))
        return dict(zip(nodes, on_host, strict=True))

    def _moved(
        self,
        measure: ResolvedMeasure,
        numbers: range,
        values: Mapping[Any, Floats],
        reading: ReadoutInput,
        relative: float,
    ) -> Floats:
        """Return [row]: a first-order bound on how far rounding may move a measure.

        The bound adds up the atoms, each in its worst direction.
        """
        result = evaluate_arithmetic(measure.expression, values.__getitem__)
        moved = np.zeros(len(reading.prompts))
        # Runs without rows have no observed values, and the effect on texts has no first order.
        due = [n for n in numbers if not self.looking[n] and self.atoms[n][1].form.takes != "reply"]
        of_outputs = [n for n in due if self.atoms[n][1].form.of_outputs]
        sizes = [_find_largest(self.atoms[n][1], n, self.atoms[n][0], reading) for n in of_outputs]
        largest = dict(zip(of_outputs, tensors_to_host(sizes), strict=True))
        for number in due:
            spot, atom = self.atoms[number]
            value = values[atom.node]
            if number in largest:
                own = relative * largest[number].numpy()
                error = _bound_rounding(atom, number, spot, reading, value, own)
            else:
                error = np.full(len(value), relative)
            error = np.where(np.isin(reading.prompts, atom.lacking), 0.0, error)
            least, most = _UNIT_BOUNDS.get(atom.form.unit, (-np.inf, np.inf))
            ways: list[Floats] = []
            for other in (np.maximum(value - error, least), np.minimum(value + error, most)):
                changed = evaluate_arithmetic(
                    measure.expression, {**values, atom.node: other}.__getitem__
                )
                ways.append(np.nan_to_num(np.abs(changed - result), nan=0.0, posinf=0.0))
            moved += np.maximum(*ways)
        return moved

    def _broken(self, reading: ReadoutInput) -> Bools:
        """Return [row]: whether a value that is read is NaN, or an infinity that metrics can't use.

        A model gives −∞ to a token that it excludes; −∞ for all tokens is invalid.
        """
        broken_masks = [torch.zeros(len(reading.prompts), dtype=torch.bool)]
        if reading.logits is not None:
            broken_masks.append(_is_invalid(reading.logits, whole=reading.tokens is None).any(-1))
        broken_masks += [
            _is_invalid(logits, whole=True).any(-1) for logits in reading.continued.values()
        ]
        if reading.loss is not None and reading.has_loss is not None:
            due = array_to_device(reading.has_loss, reading.loss.device)
            broken_masks.append(reading.loss.isnan() & due)
        if reading.replies:
            broken_masks.append(
                torch.tensor([reply.ended == "broken" for reply in reading.replies])
            )
        seen = reading.observed
        if seen is not None and seen.numbers is not None:
            broken_masks.append(~seen.numbers.isfinite())
        if seen is not None and seen.logits is not None:
            broken_masks.append(_is_invalid(seen.logits, whole=seen.tokens is None))
        for number, (spot, atom) in enumerate(self.atoms):
            takes = atom.form.takes
            if self.in_reply[number]:
                continue
            if takes == "activations":
                for each in (reading.activations[number], reading.references[number]):
                    broken_masks.append(~each.isfinite().flatten(1).all(-1))
            elif takes == "reference":
                broken_masks.append(_is_invalid(reading.references[number], whole=True))
            elif self.looking[number] or reading.logits is None:
                continue
            elif takes == "numerals" and atom.form.narrow:
                broken_masks.append(_is_invalid(_set_logits(atom, reading, spot), whole=True))
        return torch.stack(tensors_to_host(broken_masks)).any(0).numpy()


def _select_logits(atom: MetricTerm, number: int, spot: int, reading: ReadoutInput) -> Tensor:
    """Return the logits that an atom of the model's output reads: [row, ..., vocab]."""
    logits = reading.continued.get(number)
    if logits is not None:
        return logits
    assert reading.logits is not None
    return _class_logits(atom, reading.logits[:, spot])


def _find_largest(atom: MetricTerm, number: int, spot: int, reading: ReadoutInput) -> Tensor:
    """Return [row] float64: magnitude of the largest logit where an atom is read."""
    if reading.largest is not None:
        size = reading.largest[:, spot]
    else:
        logits = _select_logits(atom, number, spot, reading)
        size = logits.abs().nan_to_num(nan=0.0, posinf=0.0).flatten(1).amax(-1)
    return size.nan_to_num(nan=0.0, posinf=0.0).double()


def _bound_rounding(
    atom: MetricTerm, number: int, spot: int, reading: ReadoutInput, value: Floats, moved: Floats
) -> Floats:
    """Return [row]: how far rounding may move an atom of the model's outputs.

    An output is a sum over the model's width and is rounded like its summands, not like their
    total: a small logit moves as far as the largest one of all tokens. Metrics in logits and
    nats, and the numbers of a regression, move by the same amount; shares move in proportion to
    their value. A rank moves by the number of tokens within that distance. `correct` and
    categories change by 1 if the two best tokens may swap, and errors by the numerals' range.

    Args:
        atom: The atom.
        number: Its number.
        spot: Number of its measured position.
        reading: The values to read from.
        value: [row] the atom's value.
        moved: [row] how far rounding moves a logit.
    """
    takes, unit = atom.form.takes, atom.form.unit
    logits = _select_logits(atom, number, spot, reading)
    if atom.form.narrow and takes == "numerals":
        logits = _set_logits(atom, reading, spot)
    if takes == "label" and unit == "share":  # decided by the sign of the label's logit
        target = to_device(_target_tokens(atom, reading), logits.device)
        own = logits.gather(-1, target[:, None])[:, 0].abs().double().cpu().numpy()
        return (own <= moved).astype(np.float64)
    if atom.form.kind == "category":
        return _has_close_best(logits, 2 * moved)
    if atom.form.compared:
        numbers = pad_token_sets(atom, reading)[2].double().numpy()
        return _has_close_best(logits, 2 * moved) * np.ptp(numbers, axis=-1)
    if takes == "continuation" and unit == "share":
        return _may_round_to_greedy(atom, logits, reading, 2 * moved)
    if unit in ("rank", "share"):
        if atom.sets:
            ids, mask = pad_token_sets(atom, reading)[:2]
        else:
            ids = _target_tokens(atom, reading)[:, None]
            mask = torch.ones_like(ids, dtype=torch.bool)
        ids, mask = to_device(ids, logits.device), to_device(mask, logits.device)
        return _count_exchanges(logits, ids, mask, 2 * moved, best=unit == "share")
    return moved * atom.form.logits if unit in _LOGIT_UNITS else moved * np.abs(value)


_LOGIT_UNITS = ("logit", "nat", "number")
"""Units of metrics that move by the same amount as logits."""


def _count_exchanges(
    logits: Tensor, ids: Tensor, mask: Tensor, within: Floats, *, best: bool
) -> Floats:
    """Return [row]: how many tokens may swap ranks with the best target token.

    Two tokens may swap if their logits differ by at most `within`.

    Args:
        logits: [row, vocab].
        ids: [row, token] target tokens.
        mask: [row, token] true where `ids` holds a token.
        within: [row] the distance.
        best: Return 1 where the best of all tokens may change, instead of a count.
    """
    tensor = logits.gather(-1, ids).masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    apart = logits.double() - tensor.double()
    apart = apart.scatter(-1, ids, -torch.inf)
    close = array_to_device(within, logits.device)[:, None]
    if best:
        apart = apart.amax(-1, keepdim=True)
    return (apart.abs() <= close).sum(-1).double().cpu().numpy()


def _has_close_best(logits: Tensor, within: Floats) -> Floats:
    """Return [row]: 1 where the two best logits differ by at most `within`, else 0."""
    if logits.shape[-1] < 2:
        return np.zeros(len(logits))
    best, second = logits.double().topk(2).values.unbind(-1)
    return ((best - second).cpu().numpy() <= within).astype(np.float64)


def _may_round_to_greedy(
    atom: MetricTerm, logits: Tensor, reading: ReadoutInput, within: Floats
) -> Floats:
    """Return [row]: 1 where rounding decides whether greedy decoding generates a text, else 0.

    Args:
        atom: The metric of the text.
        logits: [row, token, vocab], or [row, vocab] for texts of one token.
        reading: The values to read from.
        within: [row] the largest difference of two logits that may swap.
    """
    ids, mask = _pad_continuations(atom, reading.prompts)
    logits = logits if logits.dim() == 3 else logits[:, None]
    ids, mask = to_device(ids, logits.device), to_device(mask, logits.device)
    tensor = logits.gather(-1, ids[..., None])[..., 0].double()
    best_other = logits.double().scatter(-1, ids[..., None], -torch.inf).amax(-1)
    lead = (tensor - best_other).masked_fill(~mask, torch.inf).amin(-1)
    return (lead.abs().cpu().numpy() <= within).astype(np.float64)


_UNIT_BOUNDS = {"rank": (1.0, np.inf), "share": (0.0, 1.0)}
"""By unit, the range of a metric, which rounding can't leave."""


def _find_gap(
    measure: ResolvedMeasure, values: Mapping[Any, Floats], result: Floats, usable: Bools
) -> ValueGap | None:
    """Find the rows in which the measure is undefined although all its inputs are usable."""
    causes: list[tuple[Bools, str]] = []
    for divisor in iter_divisors(measure.expression):
        zero = evaluate_arithmetic(divisor, values.__getitem__) == 0
        causes.append((zero, f"`{divisor.span.written}`, the divisor, is 0"))
    whole = np.ones_like(usable)
    for atom in measure.atoms:
        value = values[atom.node]
        whole &= np.isfinite(value)
        if atom.form.takes == "activations":
            said = f"a vector of `{atom.node.span.written}` is 0"
            causes.append((np.isnan(value), said))
    causes.append((whole & ~np.isfinite(result), "it exceeds the range of numbers"))
    masks = [np.broadcast_to(mask, usable.shape) & usable for mask, _ in causes]
    rows = np.flatnonzero(np.any(masks, axis=0))
    if not len(rows):
        return None
    reason = next(said for mask, (_, said) in zip(masks, causes, strict=True) if mask[rows[0]])
    return ValueGap(rows, reason)


def _target_tokens(atom: MetricTerm, reading: ReadoutInput) -> Tensor:
    """Return [row]: the first token of the atom's text."""
    if atom.own and reading.standing is not None:
        return torch.from_numpy(reading.standing)
    if atom.own:
        numbers = np.array(atom.own[reading.run], dtype=np.int64)
        return torch.from_numpy(numbers[reading.prompts])
    return torch.tensor(
        [
            atom.texts[item if atom.by_item else None][prompt][0]
            for prompt, item in zip(reading.prompts, reading.items, strict=True)
        ]
    )


def pad_token_sets(atom: MetricTerm, reading: ReadoutInput) -> tuple[Tensor, Tensor, Tensor]:
    """Return the atom's token sets, padded with the first token of each set.

    Returns:
        [row, token] each: token ids, mask of the entries before the padding, and the numbers that
        numerals represent.
    """
    by_item = atom.by_item
    pairs = zip(reading.prompts.tolist(), reading.items, strict=True)
    envs = [(item if by_item else None, prompt) for prompt, item in pairs]
    token_places = [(env, atom.sets[env].of_row[prompt]) for env, prompt in envs]
    places = {place: n for n, place in enumerate(dict.fromkeys(token_places))}
    tokens = [atom.sets[env].tokens[number] for env, number in places]
    numbers = [atom.sets[env].numbers[number] for env, number in places if atom.sets[env].numbers]
    width = max(map(len, tokens))
    mask = torch.arange(width)[None, :] < torch.tensor([len(token) for token in tokens])[:, None]
    index = torch.tensor([places[place] for place in token_places])
    return _pad_sets(tokens, width)[index], mask[index], _pad_sets(numbers or tokens, width)[index]


def _pad_sets(sets: Sequence[tuple[int, ...]], width: int) -> Tensor:
    """Return [set, width]: the sets, padded with their first entry."""
    return torch.tensor([each + each[:1] * (width - len(each)) for each in sets])


def _set_logits(atom: MetricTerm, reading: ReadoutInput, spot: int) -> Tensor:
    """Return [row, token]: the logits of the atom's sets, -inf in the padding."""
    assert reading.logits is not None
    logits = reading.logits[:, spot]
    ids, mask, _ = pad_token_sets(atom, reading)
    tensor = logits.gather(-1, reading.columns(to_device(ids, logits.device)))
    return tensor.masked_fill(~to_device(mask, logits.device), -torch.inf)


def _is_invalid(logits: Tensor, *, whole: bool) -> Tensor:
    """Return [...] for [..., vocab]: whether the logits contain NaN or +∞.

    Logits of all possible choices (`whole`) are also invalid if every one is −∞. One reduction
    suffices, without a second tensor of that size.
    """
    top = logits.amax(-1)
    return ~top.isfinite() if whole else top.isnan() | top.isposinf()


def _observed_value(atom: MetricTerm, number: int, reading: ReadoutInput, usable: Bools) -> Tensor:
    """Return [row]: the atom's metric of the observed values; NaN if there are none."""
    seen = reading.observed
    if seen is None:
        return torch.full((len(reading.prompts),), torch.nan)
    if atom.form.takes == "observation":
        assert seen.numbers is not None
        return seen.numbers
    assert seen.logits is not None
    readout_input = replace(reading, logits=seen.logits[:, None], tokens=seen.tokens, continued={})
    return _atom_value(atom, number, 0, readout_input, usable)


def _atom_value(
    atom: MetricTerm, number: int, spot: int, reading: ReadoutInput, usable: Bools
) -> Tensor:
    """Return [row]: the atom's metric. Raises E0223 as PythonFailure."""
    takes, function = atom.form.takes, atom.form.function
    if takes == "prompt":
        assert reading.loss is not None
        return reading.loss
    if takes == "reply":
        reply_values = compute_reply_values(atom, reading.replies, reading.prompts, reading.items)
        return torch.from_numpy(reply_values)
    if takes == "activations":
        return function(reading.activations[number], reading.references[number])
    if number in reading.continued:
        return _continuation_value(atom, reading.continued[number], reading.prompts)
    assert reading.logits is not None
    logits = _class_logits(atom, reading.logits[:, spot])
    match takes:
        case "target" | "own" | "class" | "label" | "continuation":
            target = to_device(_target_tokens(atom, reading), logits.device)
            if takes != "continuation":
                return function(logits, reading.columns(target))
            one = torch.ones_like(target, dtype=torch.bool)
            return function(logits[:, None], target[:, None], one[:, None])
        case "any" | "numerals":
            ids, mask, numbers = (
                to_device(part, logits.device) for part in pad_token_sets(atom, reading)
            )
            columns = reading.columns(ids)
            if takes == "any":
                return function(logits, columns, mask)
            return function(logits, columns, mask, numbers)
        case "reference":
            return function(logits, _class_logits(atom, reading.references[number]))
        case "nothing" | "observation":
            return function(logits)
        case "rows":
            return call_python_metric(atom, logits, reading.prompts, usable)


def _without_lacking(atom: MetricTerm, values: Tensor, prompts: Ints) -> Tensor:
    """Set the probability of a text to 0 in the rows that lack it."""
    if not atom.lacking:
        return values
    lacking = array_to_device(np.isin(prompts, atom.lacking), values.device)
    return values.masked_fill(lacking, -torch.inf if atom.form.joined == "log_sum_exp" else 0.0)


def _class_logits(atom: MetricTerm, logits: Tensor) -> Tensor:
    """Return [row, class]: class logits, without the further texts that are scored."""
    return logits[..., : atom.classes] if atom.classes else logits


def _continuation_value(atom: MetricTerm, logits: Tensor, prompts: Ints) -> Tensor:
    """Compute the metric of a text of several tokens from [row, token, vocab], ragged over rows."""
    ids, mask = _pad_continuations(atom, prompts)
    device = logits.device
    return atom.form.function(logits, to_device(ids, device), to_device(mask, device))


def _pad_continuations(atom: MetricTerm, prompts: Ints) -> tuple[Tensor, Tensor]:
    """Return [row, token] each: the tokens of the texts, padded with 0, and where there is one."""
    texts = [get_continuation_ids(atom, int(p)) for p in prompts]
    width = max(map(len, texts))
    ids = torch.tensor([t + (0,) * (width - len(t)) for t in texts])
    lengths = torch.tensor([len(t) for t in texts])
    return ids, torch.arange(width)[None, :] < lengths[:, None]


@dataclass(frozen=True)
class ListedToken:
    """Token in a cell's list."""

    token: int
    over_rows: tuple[float, float] | None = None
    """Mean probability over the rows of the cell, and the share of rows in which the token is the
    most likely one; None if the list doesn't come from rows."""


def read_samples(
    readout: Readout,
    reading: ReadoutInput,
    written: Sequence[tuple[Reply, ...]],
    relative: float = 0.0,
    *,
    skip: Collection[int] = (),
) -> ReadoutResult:
    """Read the measures, averaged over the texts that each row generated.

    Equals `Readout.read` if no text was generated.
    """
    if not written:
        return readout.read(reading, relative, skip=skip)
    every = [
        readout.read(replace(reading, replies=replies), relative, skip=skip)
        for replies in zip(*written, strict=True)
    ]
    count = len(every)

    def interleave(parts: Sequence[Sequence[Floats]]) -> list[Floats]:
        return [np.stack(own, axis=1).reshape(-1) for own in zip(*parts, strict=True)]

    gaps = {
        n: ValueGap(
            np.concatenate([value_gap.rows * count + at for at, value_gap in samples]),
            samples[0][1].reason,
        )
        for n in range(len(readout.measures))
        if (
            samples := [(at, result.gaps[n]) for at, result in enumerate(every) if n in result.gaps]
        )
    }
    failed = {
        n: replace(
            measure_failure,
            row=None if measure_failure.row is None else measure_failure.row * count,
        )
        for one in every
        for n, measure_failure in one.failed.items()
    }
    samples = ReadoutResult(
        interleave([result.values for result in every]),
        np.stack([result.broken for result in every], axis=1).reshape(-1),
        interleave([result.rounding for result in every]),
        failed,
        gaps,
    ).over_draws(count)
    return replace(samples, replies=written)
