"""The plan: cells laid out as rows, columns of integers in numpy.

The unit is the row: one cell on one prompt, because positions (and with several tokens under one
label, the number of runs) differ from prompt to prompt. Rows are made for a batch of prompts at a
time and never held as objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.data.types import PositionCell
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean
from mechdsl.graph import Encode, Forward, Graph, Measure, Read, build, unpatched
from mechdsl.passes import PASSES, PassOutcome, run_passes
from mechdsl.registry import nearest
from mechdsl.resolve.types import Env, Key, ResolvedExperiment, ResolvedRule, SitePoint
from mechdsl.vocab.sites import SITES, start_layer

Ints: TypeAlias = NDArray[np.int64]
Place: TypeAlias = tuple[str, int | None]
"""A component and its layer."""

RESUME, PREFIX, BATCH = "resume", "prefix", "batch"
PLAN_PASSES: Mapping[str, str] = {
    RESUME: "a row starts at its lowest write, from the base run's input of that block",
    PREFIX: "a row computes its leftmost write and what follows, on keys and values that are kept",
    BATCH: "rows of many cells ride in one forward pass",
}


@dataclass(frozen=True, eq=False)
class Ragged:
    """Lists of integers of different lengths, end to end."""

    offsets: Ints
    values: Ints

    @staticmethod
    def of(lists: Iterable[Sequence[int]]) -> Ragged:
        found = list(lists)
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in found], out=offsets[1:])
        return Ragged(offsets, np.array([v for one in found for v in one], dtype=np.int64))

    def counts(self, keys: Ints) -> Ints:
        return self.offsets[keys + 1] - self.offsets[keys]

    def expand(self, keys: Ints) -> tuple[Ints, Ints]:
        """(index into keys, value) for every value of every key, in order."""
        counts = self.counts(keys)
        index = np.repeat(np.arange(len(keys)), counts)
        within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return index, self.values[self.offsets[keys][index] + within]


@dataclass(frozen=True, eq=False)
class Hits:
    """The token positions of a rule: (position, prompt) → runs → tokens."""

    prompts: int
    runs: Ragged
    """Indexed by position * prompts + prompt."""
    tokens: Ragged
    """Indexed by run."""

    @staticmethod
    def of(cells: Sequence[PositionCell]) -> Hits:
        runs: list[range] = []
        tokens: list[tuple[int, ...]] = []
        for cell in cells:
            for row in cell.hits:
                runs.append(range(len(tokens), len(tokens) + len(row)))
                tokens.extend(row)
        return Hits(len(cells[0].hits), Ragged.of(runs), Ragged.of(tokens))

    def leftmost(self, runs: Ints) -> Ints:
        """The first token of each run; tokens ascend."""
        return self.tokens.values[self.tokens.offsets[runs]]

    def run(self, position: Ints, prompt: Ints, alternative: Ints) -> Ints:
        """The run of each row; rules with one run give it to every alternative."""
        key = position * self.prompts + prompt
        return self.runs.offsets[key] + np.minimum(alternative, self.runs.counts(key) - 1)


@dataclass(frozen=True, eq=False)
class RulePlan:
    """One rule over all cells."""

    rule: ResolvedRule
    site_of_cell: Ints
    position_of_cell: Ints
    points: Ragged
    """Site combination → indices into `point_table`."""
    point_table: tuple[SitePoint, ...]
    written: Hits
    read: Hits
    positions: tuple[PositionCell, ...]
    """Where it writes, per value of `position_of_cell`."""
    sources: tuple[PositionCell, ...]
    """Where it reads."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One row per (cell, prompt, alternative), as parallel columns."""

    cell: Ints
    prompt: Ints
    """Index into the table's rows."""
    alternative: Ints
    """Which of several runs under one label (the middle tokens of a span), averaged later."""

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: Ints) -> Rows:
        return Rows(self.cell[index], self.prompt[index], self.alternative[index])


@dataclass(frozen=True, eq=False)
class ExperimentPlan:
    """Everything that is known of an experiment's rows before the model runs."""

    experiment: ResolvedExperiment
    coordinates: tuple[Ints, ...]
    """Per axis, the index of every cell along it."""
    rules: tuple[RulePlan, ...]
    starts: Ints
    """Per cell, the lowest block that has to run again (0 with the pass switched off)."""
    inert: NDArray[np.bool_]
    """Per cell: by structure it can't differ from the base run."""
    items: tuple[Env, ...]
    """Per cell, its occurrence, where an axis runs over occurrences."""

    @property
    def n_cells(self) -> int:
        return len(self.starts)

    @property
    def draws(self) -> int:
        """Draws of noise that every row is run with, of all runs that it starts from or reads."""
        spec = self.experiment.spec
        names = [spec.base, spec.source, *(plan.rule.run for plan in self.rules)]
        runs = self.experiment.table.runs
        noises = [runs[name].noise for name in names if name is not None]
        return max((noise.samples for noise in noises if noise is not None), default=1)

    def leftmost(self, rows: Rows) -> Ints:
        """The first position that each row writes to."""
        first = np.full(len(rows), np.iinfo(np.int64).max, dtype=np.int64)
        for plan in self.rules:
            run = plan.written.run(plan.position_of_cell[rows.cell], rows.prompt, rows.alternative)
            first = np.minimum(first, plan.written.leftmost(run))
        return first

    def _runs(self, prompts: Ints) -> Ints:
        """[cell, prompt]: how many runs there are, none where a rule has no position."""
        counts = np.ones((self.n_cells, len(prompts)), dtype=np.int64)
        for plan in self.rules:
            key = plan.position_of_cell[:, None] * plan.written.prompts + prompts[None, :]
            own = plan.written.runs.counts(key.ravel()).reshape(key.shape)
            counts = np.where((own == 0) | (counts == 0), 0, np.maximum(own, counts))
        return counts

    def count(self, prompts: Ints | None = None) -> int:
        """Patched rows on these prompts (or all), draws included: passes of the plain loop."""
        if prompts is None:
            prompts = np.arange(len(self.experiment.table), dtype=np.int64)
        return int(self._runs(prompts).sum()) * self.draws if self.rules else 0

    def rows(self, prompts: Ints) -> Rows:
        """All rows on these prompts, ordered by start layer, cell, prompt."""
        cells = np.arange(self.n_cells)
        counts = self._runs(prompts)
        order = np.argsort(self.starts, kind="stable")
        flat = counts[order].ravel()
        cell = np.repeat(np.repeat(cells[order], len(prompts)), flat)
        prompt = np.repeat(np.tile(prompts, self.n_cells), flat)
        alternative = np.arange(len(cell)) - np.repeat(np.cumsum(flat) - flat, flat)
        return Rows(cell, prompt, alternative)


@dataclass(frozen=True)
class RunNeeds:
    """What an unpatched run has to give."""

    forward: Forward
    reads: frozenset[Place] = frozenset()
    measured: bool = False
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """Experiments on the same model and prompts, which share their unpatched runs."""

    model: str
    encode: Encode
    """Of the clean run."""
    experiments: tuple[ExperimentPlan, ...]
    runs: Mapping[str, RunNeeds]


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole file."""

    graph: Graph
    passes: tuple[PassOutcome, ...]
    panels: tuple[Panel, ...]
    without: frozenset[str] = field(default_factory=frozenset)

    @property
    def resumes(self) -> bool:
        return RESUME not in self.without

    @property
    def reuses(self) -> bool:
        return PREFIX not in self.without

    @property
    def batches(self) -> bool:
        return BATCH not in self.without


def unknown_passes(names: Iterable[str]) -> list[Diagnostic]:
    """E0208 for every `--no-pass` that names none."""
    known = [*PASSES, *PLAN_PASSES]
    return [
        BadCommandLine(
            reason=f"there is no pass called `{name}`",
            hint=did_you_mean(nearest(name, known), f"passes are {', '.join(known)}"),
        )
        for name in names
        if name not in known
    ]


def make_plan(
    experiments: Sequence[ResolvedExperiment], *, without: frozenset[str] = frozenset()
) -> Plan:
    """The plan of a file; `without` names graph and plan passes that are switched off."""
    layers = {e.model.name: e.model.shape.n_layers for e in experiments}
    graph, outcomes = run_passes(build(list(experiments)), layers, without=without)
    by_panel: dict[tuple[str, Encode], list[ExperimentPlan]] = {}
    for experiment in experiments:
        key = (experiment.model.name, unpatched(experiment, "clean").encode)
        by_panel.setdefault(key, []).append(
            plan_experiment(experiment, resume=RESUME not in without)
        )
    panels = tuple(
        Panel(model, encode, tuple(plans), _needs(plans, graph))
        for (model, encode), plans in by_panel.items()
    )
    return Plan(graph, tuple(outcomes), panels, without)


def _needs(plans: Sequence[ExperimentPlan], graph: Graph) -> dict[str, RunNeeds]:
    """What the graph asks of every unpatched run of a panel, and what only rows need."""
    wanted: dict[Forward, RunNeeds] = {}
    for node in graph:
        if not isinstance(node, Forward) or node.axes:
            continue
        users = list(graph.successors(node))
        reads = frozenset(
            (site, layer)
            for user in users
            if isinstance(user, Read)
            for site in user.site.split(", ")
            for layer in (user.layers if SITES[site].has_layer else (None,))
        )
        whole = replace(node, stop=None)
        old = wanted.get(whole, RunNeeds(whole, stop=node.stop))
        wanted[whole] = RunNeeds(
            whole,
            old.reads | reads,
            old.measured or any(isinstance(user, Measure) for user in users),
            node.stop if old.stop is not None else None,
        )
    needs: dict[str, RunNeeds] = {}
    for plan in plans:
        experiment = plan.experiment
        for run in runs_of(experiment):
            forward = unpatched(experiment, run)
            found = wanted.get(forward, RunNeeds(forward))
            if run == "clean" and experiment.keep:  # filters rows before the graph is run
                found = replace(found, measured=True, stop=None)
            needs[run] = found
    return needs


def runs_of(experiment: ResolvedExperiment) -> tuple[str, ...]:
    """Every unpatched run that the experiment reads, measures or starts from."""
    names = [experiment.spec.base]
    if experiment.spec.source is not None:
        names.append(experiment.spec.source)
    names.extend(rule.run for rule in experiment.rules)
    names.extend(experiment.accuracies)
    for measure in (*experiment.measures, *experiment.keep):
        names.extend(atom.run for atom in measure.atoms if atom.run is not None)
    if experiment.keep:
        names.append("clean")
    return tuple(dict.fromkeys(names))


def plan_experiment(experiment: ResolvedExperiment, *, resume: bool) -> ExperimentPlan:
    """Lay the cells of one experiment out."""
    shape = experiment.shape
    count = experiment.n_cells
    coordinates = (
        tuple(np.asarray(c, dtype=np.int64) for c in np.unravel_index(np.arange(count), shape))
        if shape
        else ()
    )
    names = [axis.name for axis in experiment.axes]
    by_name = dict(zip(names, coordinates, strict=True))
    rules = tuple(_rule_plan(rule, by_name, count) for rule in experiment.rules)
    items: list[Env] = [None] * count
    for axis in experiment.axes:
        if axis.items:
            items = [axis.items[i] for i in by_name[axis.name]]
    return ExperimentPlan(
        experiment=experiment,
        coordinates=coordinates,
        rules=rules,
        starts=_starts(experiment, rules, count, resume=resume),
        inert=_inert(experiment, rules, count),
        items=tuple(items),
    )


def _rule_plan(rule: ResolvedRule, by_name: Mapping[str, Ints], count: int) -> RulePlan:
    site_of_cell = np.zeros(count, dtype=np.int64)
    table: dict[SitePoint, int] = {}
    lists: list[list[int]] = [[]]
    if rule.sites is not None:
        keys = list(rule.sites.points)
        site_of_cell = _lookup(keys, rule.sites.axes, by_name, count)
        lists = [
            [table.setdefault(point, len(table)) for point in rule.sites.points[key]]
            for key in keys
        ]
    positions = list(rule.positions.written)
    written = tuple(rule.positions.written[key] for key in positions)
    read = tuple(rule.positions.read[key] for key in positions)
    return RulePlan(
        rule=rule,
        site_of_cell=site_of_cell,
        position_of_cell=_lookup(positions, rule.positions.axes, by_name, count),
        points=Ragged.of(lists),
        point_table=tuple(table),
        written=Hits.of(written),
        read=Hits.of(read),
        positions=written,
        sources=read,
    )


def _lookup(
    keys: Sequence[Key], axes: Sequence[str], by_name: Mapping[str, Ints], count: int
) -> Ints:
    """Per cell, which of `keys` (all combinations along `axes`) it has."""
    if not axes:
        return np.zeros(count, dtype=np.int64)
    sizes = [max(key[i] for key in keys) + 1 for i in range(len(axes))]
    ordinal = np.zeros(sizes, dtype=np.int64)
    for index, key in enumerate(keys):
        ordinal[key] = index
    return ordinal[tuple(by_name[name] for name in axes)]


def _starts(
    experiment: ResolvedExperiment, rules: tuple[RulePlan, ...], count: int, *, resume: bool
) -> Ints:
    """The lowest block that each cell has to run again."""
    n_layers = experiment.model.shape.n_layers
    if not resume or any(plan.rule.sites is None for plan in rules):
        return np.zeros(count, dtype=np.int64)
    starts = np.full(count, n_layers, dtype=np.int64)
    for plan in rules:
        lowest = np.array(
            [
                min(_start(plan.point_table[p], n_layers) for p in _list(plan.points, key))
                for key in range(len(plan.points.offsets) - 1)
            ],
            dtype=np.int64,
        )
        starts = np.minimum(starts, lowest[plan.site_of_cell])
    # What a measure reads from inside the model must still be computed in every row.
    for measure in experiment.measures:
        for atom in measure.atoms:
            if atom.point is not None:
                layer = 0 if atom.point.site == "embed" else atom.point.layer
                starts = np.minimum(starts, n_layers if layer is None else layer)
    return starts


def _list(ragged: Ragged, key: int) -> Ints:
    return ragged.values[ragged.offsets[key] : ragged.offsets[key + 1]]


def _start(point: SitePoint, n_layers: int) -> int:
    return start_layer(point.site, point.layer, n_layers)


# --- cells that can't differ from the base run ----------------------------------------------------

SEEN_BY_LATER_TOKENS = frozenset({"resid_pre", "attn_norm", "k", "v"})
"""Sites of a block that its attention carries to later positions; the rest stay where they are."""


def _inert(
    experiment: ResolvedExperiment, rules: tuple[RulePlan, ...], count: int
) -> NDArray[np.bool_]:
    """Cells in which no write of any row can change what is measured, by structure.

    Three arguments, all for causal decoders: up to the first token in which they differ, source
    and base are the same prompt; a write behind the last position that is read reaches nothing;
    and a write above the last attention reaches its own position only.
    """
    if not rules or any(plan.rule.sites is None for plan in rules):
        return np.zeros(count, dtype=np.bool_)
    inert = np.ones(count, dtype=np.bool_)
    reads = _read_positions(experiment)
    for plan in rules:
        shared = _shared_prefix(experiment, plan.rule)
        pairs = list(zip(plan.positions, plan.sources, strict=True))
        anywhere = np.array([_is_dead(w, r, shared, reads, False) for w, r in pairs])
        on_top = np.array([_is_dead(w, r, shared, reads, True) for w, r in pairs])
        top = _above_attention(experiment, plan)[plan.site_of_cell]
        position = plan.position_of_cell
        inert &= np.where(top, on_top[position], anywhere[position])
    return inert


def _above_attention(experiment: ResolvedExperiment, plan: RulePlan) -> NDArray[np.bool_]:
    """Per site combination: whether all its writes lie above the last attention."""
    last = experiment.model.shape.n_layers - 1
    above = [
        SITES[p.site].when == "output" or (p.layer == last and p.site not in SEEN_BY_LATER_TOKENS)
        for p in plan.point_table
    ]
    keys = range(len(plan.points.offsets) - 1)
    return np.array([all(above[p] for p in _list(plan.points, key)) for key in keys])


def _read_positions(experiment: ResolvedExperiment) -> list[frozenset[int]] | None:
    """Per prompt, the positions of the base run that measures read; None for all of them."""
    base = experiment.spec.base
    rows = experiment.table.runs[base].rows
    found: list[set[int]] = [set() for _ in rows]
    for measure in experiment.measures:
        if any(atom.form.takes in ("prompt", "continuation") for atom in measure.atoms):
            return None
        at = measure.at.get(base) or [len(row.ids) - 1 for row in rows]
        for positions, position in zip(found, at, strict=True):
            positions.add(position)
    return [frozenset(positions) for positions in found]


def _shared_prefix(experiment: ResolvedExperiment, rule: ResolvedRule) -> list[int] | None:
    """Per prompt, how many leading tokens source and base share; None where the rule isn't a patch
    between two plain prompts."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    if rule.fill != "source" or source.noise is not None or base.noise is not None:
        return None
    if source is base:
        return [len(row.ids) for row in base.rows]
    shared: list[int] = []
    for a, b in zip(source.rows, base.rows, strict=True):
        same = 0
        for x, y in zip(a.ids, b.ids, strict=False):
            if x != y:
                break
            same += 1
        shared.append(same)
    return shared


def _is_dead(
    written: PositionCell,
    read: PositionCell,
    shared: list[int] | None,
    reads: list[frozenset[int]] | None,
    local: bool,
) -> bool:
    """Whether no write at this position matters; `local`: it is seen at its own position only."""
    for row, (runs, sources) in enumerate(zip(written.hits, read.hits, strict=True)):
        for tokens, origin in zip(runs, sources, strict=True):
            for token, source in zip(tokens, origin, strict=True):
                same = shared is not None and token == source and token < shared[row]
                unread = reads is not None and (
                    token > max(reads[row]) or (local and token not in reads[row])
                )
                if not same and not unread:
                    return False
    return True
