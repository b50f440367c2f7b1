"""Runs a plan: panels of experiments on the same prompts, prompt batch by prompt batch.

The plain executor and the batched one are this code with plan passes off or on: a pass over the
rows of one cell from the first layer, or over rows of many cells from their lowest write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mechdsl.data.types import PromptTable, Run
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.gauge import Gauge, Reading
from mechdsl.hooks import Batch, SiteRead, run_segment
from mechdsl.lanes import (
    LaneRequest,
    Lanes,
    Side,
    Spot,
    at_positions,
    compute_lanes,
    continuation_positions,
    noise_writes,
    prompt_loss,
    spot_positions,
    spots_of,
)
from mechdsl.loaded import LoadedModel
from mechdsl.models.shape import units, width
from mechdsl.plan import ExperimentPlan, Ints, Panel, Place, Plan, Rows
from mechdsl.resolve.types import Atom, ResolvedExperiment
from mechdsl.results.statistics import Floats, check_denominator
from mechdsl.vocab.effects import EFFECTS
from mechdsl.writes import (
    Fillings,
    Means,
    build_writes,
    mean_sums,
    readable,
    unless_set,
)

PROMPT_TOKENS = 4096
"""Tokens of one batch of unpatched prompts."""
ROW_TOKENS = 4096
"""Tokens of one pass over patched rows; larger ones cost more than they save on a CPU."""

Progress = Callable[[int, int], None]
"""(rows done, rows in all)."""


@dataclass
class Measured:
    """The values of one experiment, filled as batches finish."""

    experiment: ResolvedExperiment
    kept: Ints
    """Rows of the table that are in the experiment."""
    patched: list[Floats]
    """Per measure, [cell, kept row]; NaN where the row isn't part of the cell."""
    unpatched: dict[str, list[Floats]]
    """Run → per measure, [environment, kept row]."""
    accuracy: dict[str, Floats]
    environments: tuple[int | None, ...]
    dropped: int = 0
    """Rows of cells that a `resample` donor without the position took out."""


Finished = Callable[[Measured, Rows, Sequence[Floats]], None]
"""Called with the rows of each pass and their values per measure."""


@dataclass(frozen=True)
class Options:
    """How an execution goes about it; results don't depend on it."""

    side: Side = "right"
    on_progress: Progress | None = None
    on_rows: Finished | None = None
    on_unpatched: Callable[[Measured], None] | None = None
    row_tokens: int = ROW_TOKENS
    prompt_tokens: int = PROMPT_TOKENS


@dataclass
class Execution:
    """What a run of a plan left: values, and why it didn't go on."""

    measured: dict[str, Measured] = field(default_factory=dict[str, Measured])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])


def execute(
    plan: Plan, models: Mapping[str, LoadedModel], options: Options | None = None
) -> Execution:
    """Run every panel. Denominators and `keep` are checked for all before any cell runs.

    Codes: E0604, E0613. Raises what the model raises; it is left without hooks in any case.
    """
    options = options or Options()
    execution = Execution()
    runners = [PanelRunner(panel, models[panel.model], plan, options) for panel in plan.panels]
    for runner in runners:
        execution.diagnostics.extend(runner.prepare())
        execution.measured.update(runner.measured)
    if has_errors(execution.diagnostics):
        return execution
    if options.on_unpatched is not None:
        for measured in execution.measured.values():
            options.on_unpatched(measured)
    total = sum(runner.total_rows() for runner in runners)
    done = 0
    for runner in runners:
        for count in runner.run():
            done += count
            if options.on_progress is not None:
                options.on_progress(done, total)
    return execution


class PanelRunner:
    """Runs the experiments of one panel on shared unpatched runs."""

    def __init__(self, panel: Panel, model: LoadedModel, plan: Plan, options: Options) -> None:
        self.panel = panel
        self.model = model
        self.plan = plan
        self.options = options
        self.table: PromptTable = panel.experiments[0].experiment.table
        self.seed = panel.experiments[0].experiment.seed
        self.measured: dict[str, Measured] = {}
        self.fillings: dict[str, Fillings] = {}
        self.gauges = {
            p.experiment.name: Gauge.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Gauge.of(panel.experiments[0].experiment.keep)
        everything = [m for p in panel.experiments for m in p.experiment.measures]
        self.spots: tuple[Spot, ...] = spots_of(everything)
        if {} not in self.spots:  # `keep` and accuracies read the last token
            self.spots = (*self.spots, {})
        gauges = (*self.gauges.values(), self.keep)
        self.loss = next((g.loss for g in gauges if g.loss is not None), None)
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.batches: list[Ints] = []
        self._lanes: dict[tuple[object, ...], Lanes] = {}

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self) -> list[Diagnostic]:
        """Filter rows, measure the unpatched runs, check denominators, average ablations."""
        diagnostics = self._keep()
        if diagnostics:
            return diagnostics
        self.batches = self._batches(self.kept)
        for plan in self.panel.experiments:
            experiment = plan.experiment
            gauge = self.gauges[experiment.name]
            environments = tuple(dict.fromkeys(plan.items)) if _by_item(gauge) else (None,)
            shape = (plan.n_cells, len(self.kept))
            self.measured[experiment.name] = Measured(
                experiment,
                self.kept,
                [np.full(shape, np.nan) for _ in experiment.measures],
                {
                    run: [
                        np.full((len(environments), len(self.kept)), np.nan)
                        for _ in experiment.measures
                    ]
                    for run in _measured_runs(experiment)
                },
                {run: np.full(len(self.kept), np.nan) for run in experiment.accuracies},
                environments,
            )
        for batch in self.batches:
            for plan in self.panel.experiments:
                self._measure_unpatched(plan, batch)
            self._forget()
        for plan in self.panel.experiments:
            diagnostics.extend(self._denominators(plan.experiment))
        if not has_errors(diagnostics):
            for plan in self.panel.experiments:
                self.fillings[plan.experiment.name] = self._fillings(plan)
        return diagnostics

    def total_rows(self) -> int:
        """Patched rows of all experiments, draws included."""
        return sum(
            len(plan.rows(batch)) * self._draws(plan)
            for plan in self.panel.experiments
            if plan.rules
            for batch in self.batches
        )

    def _keep(self) -> list[Diagnostic]:
        if not self.keep.measures:
            return []
        good = np.ones(len(self.table), dtype=np.bool_)
        for batch in self._batches(self.kept):
            for values in self._unpatched_values(self.keep, "clean", batch, None):
                good[batch] &= values != 0
            self._lanes.clear()
        self.kept = np.flatnonzero(good)
        if len(self.kept):
            return []
        spec = self.panel.experiments[0].experiment.spec
        return [NothingKept(span=spec.keep[0].span, rows=len(self.table))]

    def _batches(self, prompts: Ints) -> list[Ints]:
        """Prompts in groups of similar size in tokens, in the order of the table."""
        draws = max((r.noise.samples for r in self.table.runs.values() if r.noise), default=1)
        longest = max(
            (len(row.ids) for run in self.table.runs.values() for row in run.rows), default=1
        )
        size = max(1, self.options.prompt_tokens // (longest * draws))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def _denominators(self, experiment: ResolvedExperiment) -> list[Diagnostic]:
        """E0604 where a ratio would be taken over something that may be 0."""
        measured = self.measured[experiment.name]
        found: list[Diagnostic] = []
        for number, measure in enumerate(experiment.spec.measures):
            effect = EFFECTS[measure.effect]
            source = experiment.spec.source
            if effect.denominator is None or experiment.measures[number].kind == "category":
                continue
            base = measured.unpatched[experiment.spec.base][number]
            other = measured.unpatched[source][number] if source is not None else None
            if effect.needs_source and other is None:
                continue
            found.extend(
                check_denominator(
                    base,
                    other,
                    experiment.spec.statistics,
                    experiment.seed,
                    measure.span,
                    effect=effect,
                    groups=groups_of(experiment, self.kept),
                    ids=[self.table.row_ids[i] for i in self.kept],
                )
            )
        return found

    # --- unpatched runs ---------------------------------------------------------------------------

    def _forget(self) -> None:
        """Free what the finished batch computed; with a single batch it serves all stages."""
        if len(self.batches) > 1:
            self._lanes.clear()

    def _run(self, name: str) -> Run:
        return self.table.runs[name]

    def lanes(self, run: Run, prompts: Ints, continuation: Atom | None = None) -> Lanes:
        """The unpatched run on these prompts, computed once while the batch is in work."""
        name = run.name
        key = (id(run), prompts.tobytes(), None if continuation is None else id(continuation))
        found = self._lanes.get(key)
        if found is None:
            needs = self.panel.runs.get(name)
            starts = {
                int(start)
                for plan in self.panel.experiments
                if plan.experiment.spec.base == name and plan.rules and self.plan.resumes
                for start in np.unique(plan.starts)
                if start > 0
            }
            measured = needs is None or needs.measured or needs.stop is None
            reads = set(needs.reads) if needs is not None else set[Place]()
            reads |= self._gauge_reads()
            found = self._lanes[key] = compute_lanes(
                self.model,
                run,
                prompts,
                self.table.row_ids,
                LaneRequest(
                    reads=frozenset(reads if continuation is None else ()),
                    starts=frozenset(starts),
                    spots=self.spots if measured else (),
                    stop=None if starts or self._gauge_reads() or needs is None else needs.stop,
                    loss=self.loss if measured and continuation is None else None,
                    continuation=continuation,
                ),
                seed=self.seed,
                side=self.options.side,
            )
        return found

    def _gauge_reads(self) -> set[Place]:
        """Sites that measures compare (`cosine`)."""
        return {
            (atom.point.site, atom.point.layer)
            for gauge in self.gauges.values()
            for _, atom in gauge.atoms
            if atom.point is not None
        }

    def _unpatched_values(
        self,
        gauge: Gauge,
        run: str,
        prompts: Ints,
        environment: int | None,
    ) -> list[Floats]:
        """Per measure, one value per prompt; draws of noise are averaged."""
        plain = self.lanes(self._run(run), prompts)
        lanes = np.repeat(prompts, plain.draws)
        draws = np.tile(np.arange(plain.draws), len(prompts))
        reading = Reading(
            prompts=lanes,
            items=[environment] * len(lanes),
            logits=self._spot_logits(gauge, plain),
            continued={
                n: _present(self.lanes(self._run(run), prompts, gauge.atoms[n][1]).logits)
                for n in gauge.continuations
            },
            loss=plain.loss,
            activations={
                n: self._activation(atom, gauge.spots[spot], plain, np.arange(len(lanes)))
                for n, (spot, atom) in enumerate(gauge.atoms)
                if atom.point is not None
            },
            references=self._references(gauge, prompts, lanes, draws),
        )
        return [
            values.reshape(len(prompts), plain.draws).mean(axis=1) for values in gauge.read(reading)
        ]

    def _spot_logits(self, gauge: Gauge, lanes: Lanes) -> Tensor | None:
        """[lane, spot of the gauge, vocab]."""
        if lanes.logits is None or not gauge.needs_plain:
            return None
        return lanes.logits[:, [self.spots.index(spot) for spot in gauge.spots]]

    def _references(
        self, gauge: Gauge, prompts: Ints, row_prompts: Ints, draws: Ints
    ) -> dict[int, Tensor]:
        """What `kl(run)`, `js(run)` and `cosine(SITE, run)` compare each row with."""
        found: dict[int, Tensor] = {}
        for number, (spot, atom) in enumerate(gauge.atoms):
            if atom.run is None:
                continue
            reference = self.lanes(self._run(atom.run), prompts)
            lane = reference.lane(row_prompts, draws)
            if atom.point is not None:
                found[number] = self._activation(atom, gauge.spots[spot], reference, lane)
            else:
                logits = _present(reference.logits)
                index = torch.from_numpy(lane).to(logits.device)
                found[number] = logits[index, self.spots.index(gauge.spots[spot])]
        return found

    def _activation(self, atom: Atom, spot: Spot, lanes: Lanes, lane: Ints) -> Tensor:
        """[row, 1, width]: the site of a `cosine` at the measured place of these lanes."""
        assert atom.point is not None
        read = lanes.reads[SiteRead(atom.point.site, atom.point.layer)]
        prompts = np.repeat(lanes.prompts, lanes.draws)[lane]
        position = spot_positions(spot, lanes.run, prompts, lanes.lengths[lane])
        return _vectors(read, lanes.batch, lane, position, atom)

    def _measure_unpatched(self, plan: ExperimentPlan, batch: Ints) -> None:
        """Base, source and accuracies of one experiment on one batch."""
        experiment = plan.experiment
        measured = self.measured[experiment.name]
        columns = np.searchsorted(self.kept, batch)
        for run, values in measured.unpatched.items():
            for number, environment in enumerate(measured.environments):
                found = self._unpatched_values(
                    self.gauges[experiment.name], run, batch, environment
                )
                for measure, value in zip(values, found, strict=True):
                    measure[number, columns] = value
        for run, correct in experiment.accuracies.items():
            gauge = Gauge.of([correct])
            measured.accuracy[run][columns] = self._unpatched_values(gauge, run, batch, None)[0]

    # --- what rules write -------------------------------------------------------------------------

    def _fillings(self, plan: ExperimentPlan) -> Fillings:
        donors = None
        if any(rule.rule.fill == "resample" for rule in plan.rules):
            donors = _donors(self.kept, len(self.table), self.seed)
        means = {
            number: self._means(plan, number)
            for number, rule in enumerate(plan.rules)
            if rule.rule.fill == "mean"
        }
        return Fillings(means, donors)

    def _means(self, plan: ExperimentPlan, number: int) -> Means:
        """Mean activations over all kept rows, streamed by batches of prompts."""
        rule = plan.rules[number]
        names = rule.rule.groups or ("",) * len(self.table)
        codes = np.unique(names, return_inverse=True)[1].astype(np.int64)
        slots = int(rule.read.tokens.counts(np.arange(len(rule.read.tokens.offsets) - 1)).max())
        shape = self.model.shape
        places = {(p.site, p.layer) for p in rule.point_table}
        size = (len(rule.sources), int(codes.max()) + 1)
        sums = {
            place: torch.zeros(
                *size, slots, units(shape, place[0]), width(shape, place[0]), dtype=torch.float64
            )
            for place in places
        }
        counts = torch.zeros(*size, dtype=torch.float64)
        for batch in self.batches:
            lanes = self.lanes(self._run(rule.rule.run), batch)
            mean_sums(rule, batch, lanes, codes, sums, counts)
            self._forget()
        divisor = counts.clamp(min=1)[:, :, None, None, None]
        return Means({place: total / divisor for place, total in sums.items()}, codes)

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields the number of rows that each pass has finished."""
        totals = {
            plan.experiment.name: [
                (np.zeros(values.shape), np.zeros(values.shape))
                for values in self.measured[plan.experiment.name].patched
            ]
            for plan in self.panel.experiments
        }
        for batch in self.batches:
            for plan in self.panel.experiments:
                name = plan.experiment.name
                if not plan.rules:
                    self._copy_base(plan)
                    continue
                rows = plan.rows(batch)
                good = readable(plan, rows, self.fillings[name])
                self.measured[name].dropped += len(rows) - len(good)
                for part, values in self._passes(plan, rows.take(good), batch):
                    columns = np.searchsorted(self.kept, part.prompt)
                    self._base_where_inert(plan, part, columns, values)
                    for (sums, counts), value in zip(totals[name], values, strict=True):
                        np.add.at(sums, (part.cell, columns), value)
                        np.add.at(counts, (part.cell, columns), 1)
                    if self.options.on_rows is not None:
                        self.options.on_rows(self.measured[name], part, values)
                    yield len(part)
            self._forget()
        for plan in self.panel.experiments:
            if plan.rules:
                for found, (sums, counts) in zip(
                    self.measured[plan.experiment.name].patched,
                    totals[plan.experiment.name],
                    strict=True,
                ):
                    with np.errstate(invalid="ignore"):
                        found[:] = np.where(counts > 0, sums / counts, np.nan)
        self._lanes.clear()

    def _base_where_inert(
        self, plan: ExperimentPlan, rows: Rows, columns: Ints, values: Sequence[Floats]
    ) -> None:
        """What can't differ from the base run is equal to it, not off by a rounding error."""
        inert = plan.inert[rows.cell]
        if not inert.any():
            return
        experiment = plan.experiment
        for number, value in enumerate(values):
            measured = self.measured[experiment.name]
            base = base_per_cell(plan, measured, experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            value[inert] = base[cell, columns][inert]

    def _copy_base(self, plan: ExperimentPlan) -> None:
        """Without rules the patched run is the base run."""
        measured = self.measured[plan.experiment.name]
        base = measured.unpatched[plan.experiment.spec.base]
        for found, values in zip(measured.patched, base, strict=True):
            found[:] = values

    def _draws(self, plan: ExperimentPlan) -> int:
        noise = self._run(plan.experiment.spec.base).noise
        source = plan.experiment.spec.source
        other = self._run(source).noise if source is not None else None
        return max(noise.samples if noise else 1, other.samples if other else 1)

    def _passes(
        self, plan: ExperimentPlan, rows: Rows, batch: Ints
    ) -> Iterator[tuple[Rows, list[Floats]]]:
        """The rows in passes of equal start and input, with their values per measure."""
        draws = self._draws(plan)
        for start, run, group in self._groups(plan, rows):
            lanes = self.lanes(run, batch)
            size = max(1, self.options.row_tokens // (int(lanes.batch.ids.shape[1]) * draws))
            for first in range(0, len(group), size):
                part = group.take(np.arange(first, min(first + size, len(group))))
                repeated = part.take(np.repeat(np.arange(len(part)), draws))
                draw = np.tile(np.arange(draws), len(part))
                values = self._patched_values(plan, repeated, draw, run, start, batch)
                yield part, [v.reshape(len(part), draws).mean(axis=1) for v in values]

    def _groups(self, plan: ExperimentPlan, rows: Rows) -> Iterator[tuple[int, Run, Rows]]:
        """Rows that can share a pass: same start layer, same input, and one cell if not batched."""
        base = self._run(plan.experiment.spec.base)
        replaced = next((r for r in plan.rules if r.rule.fill == "text"), None)
        key = [plan.starts[rows.cell]]
        if replaced is not None:
            key.append(replaced.position_of_cell[rows.cell])
        if not self.plan.batches:
            key.append(rows.cell)
        _, inverse = np.unique(np.stack(key), axis=1, return_inverse=True)
        for number in range(int(inverse.max()) + 1 if len(rows) else 0):
            group = rows.take(np.flatnonzero(inverse.reshape(-1) == number))
            run = base
            if replaced is not None:
                inputs = list(replaced.rule.inputs.values())
                run = inputs[int(replaced.position_of_cell[group.cell[0]])]
            yield int(plan.starts[group.cell[0]]), run, group

    def _patched_values(
        self, plan: ExperimentPlan, rows: Rows, draws: Ints, run: Run, start: int, batch: Ints
    ) -> list[Floats]:
        """One pass (and one more per text of several tokens) over patched rows."""
        name = plan.experiment.name
        gauge, fillings = self.gauges[name], self.fillings[name]

        def lanes_of(source: str, donors: bool) -> Lanes:
            prompts = batch
            if donors and fillings.donors is not None:
                prompts = np.unique(fillings.donors[batch])
            return self.lanes(self._run(source), prompts)

        writes = build_writes(plan, rows, draws, lanes_of, fillings, self.model.shape)
        if start == 0 and run.noise is not None:  # above, it is in the hidden state
            noise = noise_writes(
                self.model,
                run.noise,
                rows.prompt,
                run.noise.samples,
                self.table.row_ids,
                self.seed,
            )
            writes = [*writes, *(unless_set(added, writes) for added in noise)]

        def forward(
            lanes: Lanes, at: Tensor | None, reads: Sequence[SiteRead]
        ) -> tuple[Batch, Tensor | None, Mapping[SiteRead, Tensor]]:
            lane = torch.from_numpy(lanes.lane(rows.prompt, draws))
            taken = lanes.batch.take(lane)
            hidden = lanes.hidden[start][lane.to(self.model.device)] if start > 0 else None
            found = run_segment(
                self.model,
                taken,
                start=start,
                hidden=hidden,
                writes=writes,
                reads=reads,
                logits_at=at,
            )
            return taken, found.logits, found.reads

        logits: Tensor | None = None
        loss: Tensor | None = None
        activations: dict[int, Tensor] = {}
        plain = self.lanes(run, batch)
        lengths = plain.lengths[plain.lane(rows.prompt, draws)]
        if gauge.needs_plain:
            columns = [spot_positions(s, run.name, rows.prompt, lengths) for s in gauge.spots]
            at = torch.from_numpy(np.stack(columns, axis=1)).to(self.model.device)
            full = gauge.loss is not None or any(w.site == "logits" for w in writes)
            points = {n: a for n, (_, a) in enumerate(gauge.atoms) if a.point is not None}
            wanted = [SiteRead(a.point.site, a.point.layer) for a in points.values() if a.point]
            taken, logits, reads = forward(plain, None if full else at, wanted)
            if full and logits is not None:
                if gauge.loss is not None:
                    loss = prompt_loss(gauge.loss, logits, taken, run, rows.prompt)
                logits = at_positions(logits, taken, at)
            for number, atom in points.items():
                assert atom.point is not None
                read = reads[SiteRead(atom.point.site, atom.point.layer)]
                position = columns[gauge.atoms[number][0]]
                activations[number] = _vectors(read, taken, np.arange(len(rows)), position, atom)
        continued: dict[int, Tensor] = {}
        for number in gauge.continuations:
            atom = gauge.atoms[number][1]
            lanes = self.lanes(run, batch, atom)
            at = continuation_positions(atom, rows.prompt, lengths).to(self.model.device)
            written = any(w.site == "logits" for w in writes)
            taken, found, _ = forward(lanes, None if written else at, ())
            assert found is not None
            continued[number] = at_positions(found, taken, at) if written else found
        return gauge.read(
            Reading(
                prompts=rows.prompt,
                items=[plan.items[cell] for cell in rows.cell],
                logits=logits,
                continued=continued,
                loss=loss,
                activations=activations,
                references=self._references(gauge, batch, rows.prompt, draws),
            )
        )


def _vectors(read: Tensor, batch: Batch, rows: Ints, positions: Ints, atom: Atom) -> Tensor:
    """[row, 1, width]: one vector per row; all units side by side where none is named."""
    assert atom.point is not None
    device = batch.ids.device
    row = torch.from_numpy(rows).to(device)
    columns = batch.columns(row, torch.from_numpy(np.ascontiguousarray(positions)).to(device))
    found = read[row.to(read.device), columns.to(read.device)]
    if atom.point.unit is not None:
        found = found[:, [atom.point.unit]]
    return found.flatten(1)[:, None]


def _present(logits: Tensor | None) -> Tensor:
    assert logits is not None, "a measured run was stopped early"
    return logits


def _by_item(gauge: Gauge) -> bool:
    return any(atom.by_item for _, atom in gauge.atoms)


def _measured_runs(experiment: ResolvedExperiment) -> list[str]:
    """Runs whose metrics effects need, in order: base, source."""
    runs = [experiment.spec.base]
    if experiment.spec.source is not None:
        runs.append(experiment.spec.source)
    return list(dict.fromkeys(runs))


def _donors(kept: Ints, size: int, seed: int) -> Ints:
    """A seeded permutation of the kept rows without a fixed point."""
    order = np.random.default_rng([2, seed % 2**63]).permutation(kept)
    donors = np.arange(size, dtype=np.int64)
    donors[order] = np.roll(order, 1)
    return donors


def groups_of(experiment: ResolvedExperiment, kept: Ints) -> np.ndarray | None:
    """The groups that `stats by` resamples."""
    by = experiment.spec.statistics.by
    if by is None:
        return None
    rows = experiment.table.runs["clean"].rows
    return np.array([str(rows[i].values[by]) for i in kept])


def base_per_cell(plan: ExperimentPlan, measured: Measured, run: str, number: int) -> Floats:
    """[1 or cell, row]: the metric of an unpatched run, per cell where its text differs by cell."""
    values = measured.unpatched[run][number]
    if len(measured.environments) == 1:
        return values
    index = [measured.environments.index(item) for item in plan.items]
    return values[index]
