"""Keys of cached values: everything that a number depends on, and nothing else.

How a number is computed isn't in these keys: a change of it raises `NUMERIC_VERSION` of
`execute.run_record`. A new item of a digest changes all its keys, so that every store computes the
values again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import chain, pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Ints
from mechdsl.base.hashing import digest, digest_number
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.planner.plan import ExperimentPlan, ReconstructedSpot, WholeCells, cell_sites
from mechdsl.planner.rows import (
    EdgeEnds,
    RaggedColumn,
    RowTable,
    RulePlan,
    TokenHits,
    number_edge_ends,
)
from mechdsl.program.python_functions import PythonFunction
from mechdsl.prompts.answers import TokenSets
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.circuits import keep_baseline
from mechdsl.resolve.types import (
    BasisMember,
    BasisTargets,
    CircuitTargets,
    Coordinates,
    DirectionVector,
    DrawnBasis,
    DrawnVector,
    FitSample,
    FittedBasis,
    FittedVector,
    ItemNumber,
    JacobianBasis,
    MetricTerm,
    OutputWeights,
    PointBases,
    ProbeVector,
    PythonBasis,
    RandomVector,
    ResolvedMeasure,
    ResolvedRule,
    SavedVector,
    SitePoint,
    SpannedBasis,
    TokenBasis,
    UnembeddingVector,
    UnitVector,
    WeightBasis,
    WeightedSum,
)
from mechdsl.syntax import ast

KeyNumbers = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)

_FIRST = np.uint64(0xBF58476D1CE4E5B9)

_SECOND = np.uint64(0x94D049BB133111EB)


def mix_numbers(numbers: KeyNumbers, more: KeyNumbers | Ints) -> KeyNumbers:
    """Combine two keys so that equal results mean equal pairs: splitmix64's finalizer (Steele et
    al. 2014, doi.org/10.1145/2660193.2660195) on the first, advanced, with the second."""
    with np.errstate(over="ignore"):
        mixed = (numbers + _STEP) ^ _scattered(np.asarray(more).astype(np.uint64) + _STEP)
        return _scattered(mixed)


def _scattered(numbers: KeyNumbers) -> KeyNumbers:
    scattered = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
    scattered = (scattered ^ (scattered >> np.uint64(27))) * _SECOND
    return scattered ^ (scattered >> np.uint64(31))


def fill_numbers(number: int, count: int) -> KeyNumbers:
    """Repeat one number `count` times."""
    return np.full(count, number, dtype=np.uint64)


def number_lists(lists: RaggedColumn) -> KeyNumbers:
    """Return one number per list, for its content. Shape [list]."""
    every = np.arange(len(lists.offsets) - 1)
    counts = lists.counts(every)
    hashes = counts.astype(np.uint64)
    for place in range(int(counts.max(initial=0))):
        longer = np.flatnonzero(counts > place)
        values = lists.values[lists.offsets[longer] + place]
        hashes[longer] = mix_numbers(hashes[longer], values)
    return hashes


def digest_lists(lists: RaggedColumn, table: Sequence[bytes]) -> list[bytes]:
    """Return one digest per list, for the content of its table entries."""
    values = lists.values.tolist()
    return [
        digest(b"".join([table[i] for i in values[begin:end]]))
        for begin, end in pairwise(lists.offsets.tolist())
    ]


class RunContents:
    """The content of the rows of runs as numbers, shared by all experiments of a panel."""

    def __init__(self, models: Mapping[str, bytes], model: str, seed: int) -> None:
        """Store the digests that keys start from.

        Args:
            models: Name → digest of each model and of how it is run.
            model: Name of the model of runs that name none.
            seed: Seed of noise.
        """
        self.models = models
        self.model = model
        self.seed = seed
        self._runs: dict[int, tuple[PromptRun, KeyNumbers]] = {}
        self._given: dict[int, tuple[MetricTerm, KeyNumbers]] = {}
        self._derived: dict[str, Callable[[], KeyNumbers]] = {}

    def of(self, run: PromptRun, table: PromptTable) -> KeyNumbers:
        """Return the content of a run: tokens, added noise and model. Shape [prompt]."""
        if run.derived is not None:
            return self._derived[run.name]()
        if id(run) not in self._runs:
            self._runs[id(run)] = run, self._rows(run, table)
        return self._runs[id(run)][1]

    def define(
        self,
        table: PromptTable,
        run: PromptRun,
        plan: ExperimentPlan,
        kept: Ints,
        donors: Mapping[int, Ints],
        cells: Mapping[int, WholeCells],
    ) -> None:
        """Register a run with rules by what they write, per row.

        Args:
            kept: Rows that means are taken over.
            donors: As in `ExperimentKeys`.
            cells: As in `ExperimentKeys`.

        Raises:
            TypeError: When the keys are requested, if the content can't be compared.
        """

        @cache
        def numbers() -> KeyNumbers:
            keys = ExperimentKeys(plan, table, self, kept, donors, cells)
            every = np.zeros(len(run.rows), dtype=np.uint64)
            there = kept if cells else np.arange(len(run.rows), dtype=np.int64)
            every[there] = keys.of_rules(there)  # other rows have no content that a function reads
            return every

        self._derived[run.name] = numbers

    def given(self, atom: MetricTerm) -> KeyNumbers:
        """Return what a user's function receives besides logits. Shape [prompt].

        Raises:
            TypeError: If the content can't be compared.
        """
        if id(atom) not in self._given:
            rows = [digest_number(_plain(row)) for row in atom.rows]
            self._given[id(atom)] = atom, np.array(rows, dtype=np.uint64)
        return self._given[id(atom)][1]

    def _rows(self, run: PromptRun, table: PromptTable) -> KeyNumbers:
        model = self.models[run.model or self.model]
        rows = np.array(
            [
                digest_number(
                    (model, row.source) if row.source else model,
                    np.array(row.ids, dtype=np.int64).tobytes(),
                    bytes(row.special),
                )
                for row in run.rows
            ],
            dtype=np.uint64,
        )
        noise = run.noise
        if noise is None:
            return rows
        shared = (noise.kind, noise.site, noise.std, noise.sds, noise.samples, self.seed)
        scale = digest_number(shared, noise.sd_tokens if noise.sds is not None else ())
        keys = table.row_keys if noise.row_keys is None else noise.row_keys
        numbers = [digest_number(keys[row], at) for row, at in enumerate(noise.positions)]
        return mix_numbers(
            mix_numbers(rows, fill_numbers(scale, len(rows))), np.array(numbers, dtype=np.uint64)
        )


# --- measures -------------------------------------------------------------------------------------


def measure_digest(measure: ResolvedMeasure) -> bytes:
    """Digest what a measure reads, except the texts of rows and the contents of runs."""
    atoms = [
        [
            *(atom.name, atom.form.takes, atom.form.function.__qualname__),
            *(atom.of_class, atom.classes, atom.point, atom.points, _plain(atom.python)),
            [axis.labels for axis in atom.axes],
            *(atom.run is None, None if atom.tokenizer is None else atom.tokenizer.hash),
        ]
        for atom in measure.atoms
    ]
    numbers = {atom.node: number for number, atom in enumerate(measure.atoms)}
    written = [] if measure.reply is None else [measure.reply, measure.in_reply]
    made = _arithmetic(measure.expression, numbers)
    return digest(made, measure.kind, measure.observed, atoms, *written)


def _arithmetic(node: object, numbers: Mapping[ast.Expr, int]) -> object:
    """Replace the atoms of an expression by their numbers, because names in them may change."""
    if isinstance(node, tuple):
        return [_arithmetic(part, numbers) for part in cast("tuple[object, ...]", node)]
    if not isinstance(node, ast.Node):
        return node
    if node in numbers:
        return ["atom", numbers[cast("ast.Expr", node)]]
    parts = [(field.name, getattr(node, field.name)) for field in fields(node) if field.compare]
    return [type(node), [(name, _arithmetic(part, numbers)) for name, part in parts]]


def measure_row_keys(
    measure: ResolvedMeasure,
    run: PromptRun,
    item: ItemNumber,
    table: PromptTable,
    contents: RunContents,
) -> KeyNumbers:
    """Return the inputs of a measure for each row, except the measured run. Shape [prompt].

    Args:
        run: The run that rows start from.
        item: The occurrence number of the cell.
    """
    numbers = fill_numbers(0, len(table))
    for name in (run.name, *measure.compared_runs):
        at = measure.at.get(name)
        numbers = mix_numbers(numbers, np.full(len(table), -1) if at is None else np.array(at))
    for atom in measure.atoms:
        if atom.texts:
            numbers = mix_numbers(numbers, number_lists(RaggedColumn.of(_texts(atom, item))))
            numbers = mix_numbers(
                numbers, np.isin(np.arange(len(table)), atom.lacking).astype(np.int64)
            )
        if atom.sets:
            numbers = mix_numbers(numbers, _of_sets(atom.sets[item if atom.by_item else None]))
        if atom.own:
            numbers = mix_numbers(numbers, np.array(atom.own[run.name]))
        if atom.wanted:
            texts = atom.wanted[item if atom.by_item else None]
            numbers = mix_numbers(
                numbers, np.array([digest_number(each) for each in texts], dtype=np.uint64)
            )
        if atom.run is not None:
            numbers = mix_numbers(numbers, contents.of(table.runs[atom.run], table))
        if atom.python is not None:
            numbers = mix_numbers(numbers, contents.given(atom))
    return numbers


def _texts(atom: MetricTerm, item: ItemNumber) -> Sequence[tuple[int, ...]]:
    """Return the tokens that a term names. Shape [prompt]."""
    return atom.texts[item if atom.by_item else None]


def _of_sets(sets: TokenSets) -> KeyNumbers:
    """Return the named tokens and the numbers that they represent. Shape [prompt]."""
    numbers = sets.numbers or ((),) * len(sets.tokens)
    kinds = map(digest_number, zip(sets.tokens, numbers, strict=True))
    return np.array(list(kinds), dtype=np.uint64)[list(sets.of_row)]


def _plain(value: object) -> object:
    """Represent functions of Python files by their code, whatever the file's location."""
    if isinstance(value, PythonFunction):
        return ("python", value.name, value.digest)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value)
        return {key: _plain(pair) for key, pair in pairs.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in cast("Sequence[object]", value))
    return value


# --- patched rows ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _RuleNumbers:
    """Numbers for what a rule reads and writes; equal numbers mean equal content."""

    plan: RulePlan
    source: KeyNumbers | None
    """Content of the source run, shape [its prompt]; None if no row is read individually."""
    written: KeyNumbers
    """Shape [run of `plan.written`]."""
    read: KeyNumbers
    """Shape [run of `plan.read`]."""
    keys: KeyNumbers | None
    """Shape [run of `plan.keys`]."""
    means: KeyNumbers | None
    """Content of all rows that a mean is over, shape [position]."""
    groups: KeyNumbers | None
    """Group whose mean is the fill, shape [prompt]."""
    donors: Ints | None
    """Prompt whose activation is the replacement, shape [prompt]."""
    cells: WholeCells | None = None
    given: KeyNumbers | None = None
    """Content of all rows that a function receives together, shape [whole cell]."""

    def of(self, rows: RowTable) -> KeyNumbers:
        """Return the number of each row. Shape [row]."""
        plan, numbers = self.plan, self.written[self.plan.written_runs(rows)]
        position = plan.position_of_cell[rows.cell]
        if self.source is not None:
            prompts = rows.prompt if self.donors is None else self.donors[rows.prompt]
            run = plan.read.run(position, prompts, rows.alternative)
            numbers = mix_numbers(mix_numbers(numbers, self.source[prompts]), self.read[run])
        if self.means is not None:
            numbers = mix_numbers(numbers, self.means[position])
        if self.groups is not None:
            numbers = mix_numbers(numbers, self.groups[rows.prompt])
        if self.cells is not None and self.given is not None:
            cell, within = self.cells.place(plan, rows)  # equal rows may receive different vectors
            numbers = mix_numbers(mix_numbers(numbers, self.given[cell]), within)
        if self.keys is not None:
            numbers = mix_numbers(numbers, self.keys[plan.key_runs(rows)])
        return np.where(plan.follow(rows) == 0, numbers, mix_numbers(numbers, plan.follow(rows)))


@dataclass(frozen=True, eq=False)
class OperandKeys:
    """Keys of the directions and bases that rules use."""

    contents: RunContents
    model: bytes
    """Digest of the experiment's model."""

    def direction(self, vector: DirectionVector) -> bytes:
        """Digest everything that a direction depends on."""
        match vector:
            case FittedVector():
                samples = [self._sample(sample) for sample in vector.samples]
                points = list(map(_written, vector.points))
                return digest("fit", vector.method, vector.options, points, samples)
            case UnembeddingVector():
                return digest("unembedding", self.model, vector.token, vector.less)
            case ProbeVector():
                return digest("probe", vector.key, vector.of_class, vector.digest)
            case SavedVector():
                return digest("saved", vector.key, vector.digest)
            case WeightedSum():
                parts = [[weight, self.direction(part)] for weight, part in vector.parts]
                return digest("sum", parts)
            case UnitVector():
                return digest("unit", self.direction(vector.of))
            case RandomVector(shuffles=shuffles):
                kind = "shuffled" if shuffles else "random"
                return digest(kind, self.direction(vector.of), vector.draw, vector.seed)
            case DrawnVector(width=width, draw=draw, seed=seed):
                return digest("unit random", width, draw, seed)

    def basis(self, bases: PointBases) -> bytes:
        """Digest everything that the bases of a rule's points depend on."""
        parts = [
            [key, member.method, member.options, member.size, member.reads, *self._operand(member)]
            for key, member in bases.items()
        ]
        return digest("basis", parts)

    def _operand(self, member: BasisMember) -> list[object]:
        operand = member.operand
        match operand:
            case FittedBasis():
                return ["fit", *map(_written, operand.points), *map(self._sample, operand.samples)]
            case JacobianBasis(sample=sample, source=source, target=target):
                sites = [*map(_written, (source, target)), operand.of_target]
                return ["jacobian 2", *sites, self._sample(sample)]
            case SpannedBasis(next_map=point):
                reads = [] if point is None else [self.model, _written(point)]
                return ["span", *map(self.direction, operand.vectors), *reads]
            case TokenBasis():
                return ["tokens", self.model, operand.tokens]
            case SavedVector():
                return ["saved", operand.key, operand.digest]
            case OutputWeights(vector=vector):
                written = [] if vector is None else [self.direction(vector), operand.replaces]
                return ["output", self.model, operand.site, operand.layer, *written]
            case WeightBasis():
                return ["weights", self.model, operand.site, operand.layer]
            case DictionaryFile():
                return ["dictionary", operand.digest]
            case PythonBasis(function=function):
                return ["python", function.name, function.digest]
            case DrawnBasis():
                return ["drawn", member.width, operand.draw, operand.seed]

    def _sample(self, sample: FitSample) -> list[int]:
        """Return the rows that a fit reads, independent of their order."""
        contents = self.contents.of(sample.run, sample.table).tolist()
        targets = sample.targets or (None,) * len(contents)
        rows = zip(contents, sample.cell.hits, targets, strict=True)
        of_tokens = ("each token",) if sample.each_token else ()
        return sorted(digest_number(*row, *of_tokens) for row in rows)


class ExperimentKeys:
    """The keys of one experiment's patched values."""

    def __init__(
        self, plan: ExperimentPlan, table: PromptTable, contents: RunContents, kept: Ints,
        donors: Mapping[int, Ints], cells: Mapping[int, WholeCells],
    ) -> None:  # fmt: skip
        """Compute the digests that cells share.

        Args:
            kept: Rows that are in the experiment.
            donors: Number of a resampling rule → donors, shape [prompt].
            cells: Number of a rule that reads whole cells → the cells.

        Raises:
            TypeError: If a value depends on content that can't be compared.
        """
        self.plan = plan
        self.table = table
        self.contents = contents
        self.kept = kept
        self._rules = [
            self._rule(rule, donors.get(number), cells.get(number))
            for number, rule in enumerate(plan.rules)
        ]
        self._starts = [contents.of(run, table) for run in plan.starting_runs]
        self._whole = self._all_rows()
        self._items = np.array([-1 if item is None else item for item in plan.items])
        self._measured: dict[tuple[int, int, ItemNumber], KeyNumbers] = {}
        for measure in plan.experiment.measures:
            for atom in measure.atoms:
                contents.given(atom)  # raises here, or not at all
        shared = self._shared() + (b"as base" if plan.experiment.as_base else b"")
        codes: dict[bytes, int] = {}
        numbers = [codes.setdefault(cell, len(codes)) for cell in self._cells()]
        self._codes = tuple(codes)
        self.code_of_cell: Ints = np.array(numbers, dtype=np.int64)
        """Shape [cell]: cells with equal numbers differ only in positions, which are in row
        keys."""
        self.cells = tuple(
            tuple(digest(b"".join([shared, measure, code])) for code in codes)
            for measure in map(measure_digest, plan.experiment.measures)
        )
        """Per measure and number in `code_of_cell`, the key of such cells."""

    @cached_property
    def cells_of_rules(self) -> tuple[bytes, ...]:
        """Per number in `code_of_cell`, the key of what the rules do, without a measure."""
        return tuple(digest("rules", self._shared(), code) for code in self._codes)

    def of_writes(self, rows: RowTable) -> KeyNumbers:
        """Return the start and everything that rules read and write, without a measure. [row]"""
        return self._written(rows)

    def of_spot(self, spot: ReconstructedSpot) -> tuple[bytes, KeyNumbers]:
        """Return the key of a basis at some sites, and that of the base run at a position.

        The latter has the shape [prompt of the table].
        """
        rule = self.plan.rules[spot.rule]
        pairs = [(rule.point_table[n], rule.source_table[n]) for n in spot.points]
        points = [_written(to) + _written(of) for to, of in pairs]
        assert rule.rule.basis is not None
        basis = self._operands.basis(rule.rule.basis.bases[spot.basis])
        cell = digest("error", self._model(), basis, *points)
        (start,) = self._starts
        hits = rule.positions[spot.position].hits
        tokens = np.array([digest_number(hit) for hit in hits], dtype=np.uint64)
        return cell, mix_numbers(start, tokens)

    def of_rules(self, prompts: Ints) -> KeyNumbers:
        """Return what the rules of a one-cell experiment read and write. Shape [prompt]."""
        (cell,) = self._cells()
        none = np.zeros(len(prompts), dtype=np.int64)
        code = digest_number(digest("rules", self._shared(), cell))
        return mix_numbers(
            self._written(RowTable(none, prompts, none)), fill_numbers(code, len(prompts))
        )

    def of_rows(self, rows: RowTable, more: bytes) -> list[bytes]:
        """Return everything that rules do to each row, combined with `more`. Shape [row]."""
        shared = digest("rows", self._shared(), more)
        cells = [digest(shared, code) for code in self._codes]
        places = zip(
            self.code_of_cell[rows.cell].tolist(), self._written(rows).tolist(), strict=True
        )
        return [digest(cells[code], own) for code, own in places]

    def rows(self, number: int, rows: RowTable) -> KeyNumbers:
        """Return the keys of rows for a measure. Shape [row]."""
        starting = self.plan.starting_run(rows)
        hashes = mix_numbers(self._written(rows), self._of_measure(number, rows, starting))
        said = self.plan.experiment.spec.estimator
        if said is None or not said.joins_cells:
            return hashes
        return mix_numbers(hashes, self._joined_writes[self._sites[rows.cell], rows.prompt])

    @cached_property
    def _joined_writes(self) -> KeyNumbers:
        """Content of all writes to a site, in any order. Shape [site, prompt]."""
        rows = self.plan.rows(self.kept)
        codes = np.array([digest_number(code) for code in self._codes], dtype=np.uint64)
        numbers = mix_numbers(self._written(rows), codes[self.code_of_cell[rows.cell]])
        found = np.zeros((int(self._sites.max()) + 1, len(self.table)), dtype=np.uint64)
        np.add.at(found, (self._sites[rows.cell], rows.prompt), numbers)
        return found

    @cached_property
    def _sites(self) -> Ints:
        return cell_sites(self.plan)

    def _written(self, rows: RowTable) -> KeyNumbers:
        """Return each row's start and what rules read and write in it. Shape [row]."""
        starting = self.plan.starting_run(rows)
        hashes = np.zeros(len(rows), dtype=np.uint64)
        for index, numbers in enumerate(self._starts):
            hashes = np.where(starting == index, numbers[rows.prompt], hashes)
        for rule in self._rules:
            hashes = np.where(rule.plan.acts(rows), mix_numbers(hashes, rule.of(rows)), hashes)
        return hashes

    def _of_measure(self, number: int, rows: RowTable, starting: Ints) -> KeyNumbers:
        """Return the inputs of a measure. Shape [row]."""
        measure = self.plan.experiment.measures[number]
        by_item = any(atom.by_item for atom in measure.atoms)
        items = self._items if by_item else np.full_like(self._items, -1)
        hashes = np.zeros(len(rows), dtype=np.uint64)
        kinds = np.stack([starting, items[rows.cell]])
        for index, item in np.unique(kinds, axis=1).T.tolist():
            key = (number, index, None if item < 0 else item)
            if key not in self._measured:
                run = self.plan.starting_runs[index]
                self._measured[key] = measure_row_keys(
                    measure, run, key[2], self.table, self.contents
                )
            own = (kinds[0] == index) & (kinds[1] == item)
            hashes[own] = self._measured[key][rows.prompt[own]]
        return hashes

    # --- what all rows of a cell share ---

    def _shared(self) -> bytes:
        """Digest what all cells share."""
        said = self.plan.experiment.spec.estimator
        # 2: before, estimates were 0 if the caller had switched gradients off.
        # 3: before, heads with separate bases moved separately.
        number = 3 if said is not None and said.joins_cells else 2
        estimated = () if said is None else (f"estimated {number}", said.text)
        if said is not None and said.kind.adds_noise:
            estimated = (*estimated, self.contents.seed)
        return digest("patched", self._model(), self.plan.draws, self._whole, *estimated)

    def _cells(self) -> Iterator[bytes]:
        """Yield the effect of the rules that act in each cell; alternatives of a rule that differ
        only in the rows they read are equal."""
        parts: list[list[bytes]] = []
        said = self.plan.experiment.generation
        if said is not None and said.sampled:  # determines the sampled tokens
            parts.append([digest(self.plan.content(cell)) for cell in range(self.plan.n_cells)])
        for rule in self.plan.rules:
            static = _static(rule.rule)
            pairs = zip(rule.point_table, rule.source_table, strict=True)
            points = [_written(to) + _written(of) for to, of in pairs]
            sites = [
                digest(static + digest_list) for digest_list in digest_lists(rule.points, points)
            ]
            begin = len(parts)
            parts.append([sites[site] for site in rule.site_of_cell.tolist()])
            for cells, of in rule.placed:
                if any(cell.reply is not None for cell in cells):
                    parts.append([digest(cells[number].reply) for number in of.tolist()])
            if rule.rule.amounts is not None:
                amounts = {amount: digest(amount) for amount in set(rule.amounts.tolist())}
                parts.append([amounts[amount] for amount in rule.amounts.tolist()])
            if rule.steps is not None:
                parts.append([digest("steps", *step) for step in rule.steps.tolist()])
            if rule.direction_of_cell is not None:
                steered = [self._operands.direction(member.vector) for member in rule.directions]
                parts.append([steered[which] for which in rule.direction_of_cell.tolist()])
            parts += self._named(rule.rule.basis, rule.coordinates, rule.coordinates_of_cell)
            if rule.paths is not None:
                ends = digest_lists(rule.paths.points, list(map(_written, rule.paths.table)))
                parts.append([ends[pair] for pair in rule.paths.pair_of_cell.tolist()])
                named = rule.paths.coordinates, rule.paths.coordinates_of_cell
                parts += self._named(rule.rule.receiving_basis, *named)
            if rule.rule.circuit is not None:
                nodes = _digest_neurons(rule.rule.circuit)
                for (site, layer), feature in rule.rule.circuit.features.items():
                    basis = self._operands.basis({(layer, None): feature.member})
                    nodes += digest(site, layer, basis, feature.which)
                if self.plan.leaves_out_edges:  # estimates depend on the circuit as a whole
                    whole = keep_baseline(rule.rule, "circuit").circuit
                    assert whole is not None
                    (classes,) = whole.edges.values()
                    nodes += b"".join(_digest_edges(number_edge_ends(own)) for own in classes)
                edges = [nodes + b"".join(map(_digest_edges, ends)) for ends in rule.edge_ends]
                feature = [*edges, b""]  # the last one: it doesn't act
                parts.append([feature[site] for site in rule.site_of_cell.tolist()])
            if rule.active is not None:  # where it doesn't act, the key omits it
                acts = rule.active.tolist()
                parts[begin:] = [
                    [part if own else b"" for part, own in zip(each, acts, strict=True)]
                    for each in parts[begin:]
                ]
        if not parts:
            return iter([b""] * self.plan.n_cells)
        return map(b"".join, zip(*parts, strict=True))

    def _named(
        self, basis: BasisTargets | None, named: Sequence[Coordinates], of_cell: Ints | None
    ) -> Iterator[list[bytes]]:
        """Yield the digest of each cell's coordinates in a basis, if there is one.

        Args:
            basis: The basis.
            named: Sets of its coordinates.
            of_cell: [cell] index into them.
        """
        if basis is None or of_cell is None:
            return
        bases = [self._operands.basis(basis_members) for basis_members in basis.bases]
        own = [
            digest(bases[coordinates.basis], coordinates.which, *_inserted(bases, coordinates))
            for coordinates in named
        ]
        yield [own[which] for which in of_cell.tolist()]

    @cached_property
    def _operands(self) -> OperandKeys:
        return OperandKeys(self.contents, self._model())

    def _model(self) -> bytes:
        return self.contents.models[self.plan.experiment.model.key]

    def _rule(self, plan: RulePlan, donors: Ints | None, cells: WholeCells | None) -> _RuleNumbers:
        rule, reads = plan.rule, plan.rule.does.reads
        each = reads in ("run", "donor", "cell")
        table = self.table if rule.external is None else rule.external.table
        read = table.runs[rule.run if rule.external is None else rule.external.run]
        groups = None
        if reads == "mean" and rule.groups is not None:
            names = [digest_number(name) for name in rule.groups]
            groups = np.array(names, dtype=np.uint64)
        return _RuleNumbers(
            plan=plan,
            source=self.contents.of(read, table) if each else None,
            written=_number_written(plan),
            read=number_lists(plan.read.tokens),
            keys=None if plan.keys is None else number_lists(plan.keys.tokens),
            means=self._means(plan) if reads == "mean" else None,
            groups=groups,
            donors=donors,
            cells=cells,
            given=None if cells is None else self._given(plan, cells),
        )

    def _given(self, plan: RulePlan, cells: WholeCells) -> KeyNumbers:
        """Return the content of all rows that a function receives, in order. Shape [whole cell]."""
        contents = self.contents.of(self.table.runs[plan.rule.run], self.table)
        tokens = number_lists(plan.read.tokens)
        digests = [digest_number(contents[cell.prompts], tokens[cell.runs]) for cell in cells.cells]
        return np.array(digests, dtype=np.uint64)

    def _means(self, plan: RulePlan) -> KeyNumbers:
        """Return the rows of each mean with their tokens. Shape [position]."""
        rule, prompts = plan.rule, self.kept
        run, table = self.table.runs[rule.run], self.table
        if rule.external is not None:
            table, prompts = rule.external.table, np.arange(len(rule.external.table))
            run = table.runs[rule.external.run]
        contents = self.contents.of(run, table)[prompts]
        if rule.groups is not None:
            groups = [digest_number(rule.groups[row]) for row in prompts.tolist()]
            contents = mix_numbers(contents, np.array(groups, dtype=np.uint64))
        hits = _hits(plan.averaged, len(plan.sources), prompts)
        means = [
            digest_number(np.sort(mix_numbers(contents[index], numbers))) for index, numbers in hits
        ]
        return np.array(means, dtype=np.uint64)

    def _all_rows(self) -> bytes:
        """Digest all rows if a row may depend on others: after prompts, means and inputs of
        functions include tokens of the answers."""
        rules, kept = self.plan.rules, self.kept
        whole = any(rule.rule.does.of_all_rows for rule in rules)
        if not self.plan.in_answers or not whole:
            return b""
        numbers = fill_numbers(0, len(self.table))
        for run in self.table.runs.values():
            numbers = mix_numbers(numbers, self.contents.of(run, self.table))
        for measure in self.plan.experiment.measures:
            for atom in measure.atoms:
                for text in atom.texts.values():
                    numbers = mix_numbers(numbers, number_lists(RaggedColumn.of(text)))
        return digest(np.sort(numbers[kept]))


def edit_digest(rule: ResolvedRule, keys: OperandKeys) -> bytes:
    """Digest an edit of a model's weights: its sites, factors, directions and coordinates."""
    sites = (
        [] if rule.sites is None else [list(map(_written, p)) for p in rule.sites.points.values()]
    )
    amounts = [] if rule.amounts is None else list(rule.amounts.values.values())
    members = () if rule.direction is None else rule.direction.members.values()
    steered = [keys.direction(member.vector) for member in members]
    parts: list[object] = []
    if rule.basis is not None:
        bases = [keys.basis(basis_members) for basis_members in rule.basis.bases]
        every = rule.basis.coordinates.values()
        parts = [
            [bases[coordinates.basis], coordinates.which, *_inserted(bases, coordinates)]
            for coordinates in every
        ]
    return digest(_static(rule), sites, amounts, steered, parts)


def _static(rule: ResolvedRule) -> bytes:
    """Digest a rule without its targets; keys of rows contain what it reads in each run."""
    does = rule.does
    key = does.key(replace(rule, run="", external=None, groups=None))
    return digest(
        *does.identity, _plain(key), _plain(rule.python),
        None if rule.edge is None else rule.edge.change,
        None if rule.path is None else (rule.path.through_mlps, rule.path.frozen_norms),
        *([rule.after_prefill] if rule.after_prefill else []),
    )  # fmt: skip


def _written(point: SitePoint) -> bytes:
    """Encode a site, of which there may be tens of thousands (neurons)."""
    return f"{point.site} {point.layer} {point.unit};".encode()


def _number_written(plan: RulePlan) -> KeyNumbers:
    """Number the tokens of each run that a rule writes, with their classes if it ablates a circuit
    with positions. Shape [run]."""
    numbers, classes = number_lists(plan.written.tokens), plan.written_classes
    if classes is None:
        return numbers
    return mix_numbers(numbers, number_lists(RaggedColumn(plan.written.tokens.offsets, classes)))


def _digest_edges(ends: tuple[EdgeEnds, EdgeEnds]) -> bytes:
    """Return a digest of edges, each written as its sender and its receiver."""
    columns = [
        [written[number] for number in end.of_edge.tolist()]
        for end in ends
        for written in [[_written(point) for point in end.points]]
    ]
    return digest(b"".join(chain.from_iterable(zip(*columns, strict=True))))


def _digest_neurons(circuit: CircuitTargets) -> bytes:
    """Return a digest of the neurons that are nodes; empty if there are none.

    The other neurons of their layers are one node.
    """
    return digest(*circuit.neurons.items()) if circuit.neurons else b""


def _inserted(bases: Sequence[bytes], coordinates: Coordinates) -> tuple[object, ...]:
    """Return the parts of a key for features that come in from the last basis."""
    return (bases[-1], coordinates.inserted) if coordinates.inserted else ()


def _hits(hits: TokenHits, positions: int, prompts: Ints) -> Iterator[tuple[Ints, KeyNumbers]]:
    """Yield, per position, the prompts of the runs for these prompts, and the runs' tokens."""
    tokens = number_lists(hits.tokens)
    for position in range(positions):
        index, run = hits.runs.expand(position * hits.prompts + prompts)
        yield index, tokens[run]
