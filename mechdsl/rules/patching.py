"""Rules that write vectors of a run or a fill: `patch`, `swap`, `freeze`, `ablate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mechdsl.base.records import Registry
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.syntax import NotSupported, UnknownName, UnknownWord
from mechdsl.program import spec
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.bases import EXCHANGE, resolve_feature_nodes
from mechdsl.resolve.circuits import (
    check_ablated_tokens,
    describe_circuit,
    describe_dead_edges,
    describe_features,
    describe_neurons,
    describe_places,
    describe_reading,
    describe_streams,
    find_circuit_side,
    find_dead_edges,
    list_circuit_bases,
    resolve_circuit,
)
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.targets import resolve_rule_positions
from mechdsl.resolve.types import (
    Alternative,
    Axis,
    Convention,
    ExternalRun,
    Intervention,
    ResolvedRule,
    VectorBatch,
)
from mechdsl.rules.kinds import (
    check_equal_lengths,
    check_even_positions,
    resolve_targets,
    rule_kind,
)
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor


class CopyingRule(RuleKind, Intervention):
    """A rule that writes vectors of one run into another, unchanged."""

    name = "source"
    reads = "run"
    copies = True
    exchanged = False
    """Whether each of two positions receives the vectors of the other."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        run = rule.source or work.experiment.base
        sites, positions = resolve_targets(rule, run, work, exchanged=self.exchanged)
        if sites is None or positions is None:
            return None
        check_equal_lengths(rule, sites, positions, self, ExternalRun(work.table, run), work)
        return ResolvedRule(spec=rule, does=self, run=run, sites=sites, positions=positions)

    def detail(self, rule: ResolvedRule) -> str | None:
        return None


@rule_kind("patch")
class PatchRule(CopyingRule):
    """`patch SITE at POSITIONS onto POSITIONS into layer L with RUN`: another run's vectors.

    `patch feature 12 of b at POSITIONS with feature 3 of c` exchanges features of the same vector.
    """

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.exchanged is None:
            return super().resolve(rule, work)
        base = work.experiment.base
        sites, positions = resolve_targets(rule, base, work)
        if sites is None or positions is None:
            return None
        return ResolvedRule(spec=rule, does=EXCHANGE, run=base, sites=sites, positions=positions)


@rule_kind("swap")
class SwapRule(CopyingRule):
    """`swap SITE at POSITIONS with POSITIONS`: the base run's vectors at two places, exchanged."""

    exchanged = True
    drawn_positions = False


@rule_kind("freeze")
class FreezeRule(CopyingRule):
    """`freeze SITE at POSITIONS`: the base run's vectors, whatever other rules do before."""


FILLS: Registry[Intervention] = Registry("fill of an ablation")

FILL_AXIS = "fill"
"""Name of the axis for several fills."""


def fill_kind(word: str) -> Callable[[type[Intervention]], type[Intervention]]:
    """Register the fill of an ablation under its word."""

    def register(entry: type[Intervention]) -> type[Intervention]:
        FILLS.add(word, entry())
        return entry

    return register


@fill_kind("zero")
class ZeroFill(Intervention):
    """`with zero`."""

    name = "zero"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("fill", "zero")

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


@fill_kind("mean")
class MeanFill(Intervention):
    """`with mean of RUN by VALUE`: the mean over the rows of a run, or over those of a group; `with
    mean of BLOCK`, over the rows of another block.

    `execute.patching.rule_inputs.compute_means` computes the mean."""

    name = "mean"
    reads = "mean"

    def key(self, rule: ResolvedRule) -> Hashable:
        external = None if rule.external is None else rule.external.name
        return rule.run, external, rule.groups

    def detail(self, rule: ResolvedRule) -> str | None:
        return f"by {rule.spec.by}" if rule.spec.by else ""

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        external = rule.external
        own = f"the rows of {rule.run} after `limit` and `keep`"
        rows = own if external is None else f"the {len(external.table):,} rows of {external.name}"
        within = f", within each {rule.spec.by}" if rule.spec.by else ""
        yield Convention("fill", f"mean over {rows}, per position{within}")


@fill_kind("resample")
class ResampleFill(Intervention):
    """`with resample of RUN`: what a run has on another row; `with resample of BLOCK`, what a row
    of another block has."""

    name = "resample"
    reads = "donor"

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run, None if rule.external is None else rule.external.name

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        if rule.external is not None:
            rows = f"one of the {len(rule.external.table):,} rows of {rule.external.name}"
            how = "drawn for each row from its content and the seed, with replacement"
            yield Convention("fill", f"{rows}, {how}")
            return
        how = "a seeded permutation of the rows after `limit` and `keep`, without fixed points"
        yield Convention("fill", f"{rule.run} run of a different row ({how})")


@rule_kind("ablate")
class AblateRule(RuleKind):
    """Vectors are replaced by what knows nothing of the prompt."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if not rule.fills:
            return self._with_fill(rule, work)
        context = work if not rule.fill_index else _context_for_fill(work)
        before = len(work.diagnostics)
        resolved = self._with_fill(rule, context)
        new = work.diagnostics[before:]
        work.diagnostics[before:] = [d for d in new if d not in work.diagnostics[:before]]
        if context is work:
            work.add_axis(Axis(FILL_AXIS, rule.fills, rule.span))
        elif resolved is not None and not has_errors(work.diagnostics):
            _check_same_axes(rule, context, work)
        return resolved and replace(resolved, only=Alternative(FILL_AXIS, rule.fill_index))

    def _with_fill(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        base = work.experiment.base
        does, run, external = _resolve_fill(rule, work)
        groups = None if does is None else _groups(rule, does, work)
        read = base if does is None else run
        circuit, definition = None, _find_circuit(rule, work)
        if definition is not None:
            filled = resolve_circuit(definition, rule, work, resolve_feature_nodes)
            sites, circuit = (None, None) if filled is None else filled
            side = "" if circuit is None else find_circuit_side(circuit, rule.at, work)
            positions = resolve_rule_positions(rule, read, replace(work, side=side), external)
            if circuit is not None and positions is not None:
                check_ablated_tokens(circuit, positions, rule, work)
                circuit = replace(circuit, dead=find_dead_edges(circuit, positions, rule, work))
            does = None if does is None else CIRCUIT_FILLS[does.name]
        else:
            sites, positions = resolve_targets(rule, read, work, external)
        if sites is None or positions is None or does is None:
            return None
        if does.over_rows:
            check_even_positions(rule, positions, work)
        check_equal_lengths(
            rule, sites, positions, does, external or ExternalRun(work.table, run), work
        )
        return ResolvedRule(
            spec=rule,
            does=does,
            run=run,
            sites=sites,
            positions=positions,
            groups=groups,
            external=external,
            circuit=circuit,
            basis=None if circuit is None else list_circuit_bases(circuit),
        )


class CircuitFill(Intervention):
    """Edges of a circuit carry a fill instead of the outputs of their senders."""

    changes = "circuit"
    drawn_positions = False

    def detail(self, rule: ResolvedRule) -> str | None:
        return describe_circuit(rule)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        yield Convention("circuit", describe_circuit(rule), describe_reading(rule))
        yield from describe_dead_edges(rule)
        yield from describe_streams(rule)
        yield from describe_places(rule)
        yield from describe_neurons(rule)
        yield from describe_features(rule)
        if rule.circuit is not None and rule.circuit.made:
            yield Convention(f"circuit {rule.circuit.name}", rule.circuit.made)


class ZeroEdges(CircuitFill, ZeroFill):
    """`ablate CIRCUIT at POSITIONS with zero`."""


class MeanEdges(CircuitFill, MeanFill):
    """`ablate CIRCUIT at POSITIONS with mean`."""


class ResampledEdges(CircuitFill, ResampleFill):
    """`ablate CIRCUIT at POSITIONS with resample`."""


class RunEdges(CircuitFill, Intervention):
    """`ablate CIRCUIT at POSITIONS with RUN`: the values of another run of the same rows."""

    name = "run"
    reads = "run"
    copies = True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("fill", f"{rule.run} run of the same row")
        yield from super().conventions(rule, n_layers)


CIRCUIT_FILLS: Mapping[str, Intervention] = {
    does.name: does for does in (ZeroEdges(), MeanEdges(), ResampledEdges(), RunEdges())
}
"""Fills of edges by the name of the fill."""


def _find_circuit(rule: spec.Rule, work: ExperimentContext) -> spec.Circuit | None:
    """Return the circuit that an ablation names; None if it names sites."""
    name = rule.circuit_name
    if name is None or rule.site is None:
        return None
    if name in (spec.EVERY_EDGE, spec.EVERY_VISION_EDGE):
        nodes = () if rule.nodes is None else (ast.Site((rule.nodes,), span=rule.nodes.span),)
        return spec.Circuit(span=rule.site.span, name=name, edges=(), nodes=nodes)
    return work.program.circuits.get(name)


def _context_for_fill(work: ExperimentContext) -> ExperimentContext:
    """Create the context for a further fill, whose axes must be those of the first."""
    return replace(work, axes={name: work.axes[name] for name in work.loops})


def _check_same_axes(rule: spec.Rule, context: ExperimentContext, work: ExperimentContext) -> None:
    """Report E0108 for a fill with other positions than the first, because its rows lack some."""
    if any(work.axes.get(name) != axis for name, axis in context.axes.items()):
        assert rule.fill is not None
        what = f"`{rule.fills[rule.fill_index]}` together with a fill that has other positions"
        work.diagnostics.append(NotSupported(span=rule.fill.span, what=what))


def _resolve_fill(
    rule: spec.Rule, work: ExperimentContext
) -> tuple[Intervention | None, str, ExternalRun | None]:
    """Resolve the fill of an ablation.

    Returns:
        The intervention, None after an error; the run to read; and the rows if they are from a
        different prompt set.
    """
    word = rule.fill
    if rule.source is not None:  # a circuit takes the values of a run
        return CIRCUIT_FILLS["run"], rule.source, None
    assert word is not None
    if isinstance(word, ast.QualifiedRef):
        name, does = word.name, FILLS.get(word.name)
        if word.of.part is not None or word.of.name not in work.table.runs:
            return _of_block(rule, word, work)
    else:
        name = word.id if isinstance(word, ast.Name) else ""
        does = FILLS.get(name)
    if does is None or (does.reads is None and isinstance(word, ast.QualifiedRef)):
        if name in work.table.runs and _selects_from_list(rule, work):
            return None, work.experiment.base, None  # E0201 is reported
        circuit = _find_circuit(rule, work) is not None
        none = _not_a_fill(name, word.span, work, is_circuit=circuit)
        return none, work.experiment.base, None
    if does.reads is None:
        return does, work.experiment.base, None
    return does, word.of.name if isinstance(word, ast.QualifiedRef) else "clean", None


def _selects_from_list(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Whether an ablation names `top n` of a group that lists its members, which is E0201."""
    ranked = None if rule.site is None else rule.site.ranked
    program = work.program
    return ranked is not None and ranked.of in program.groups and ranked.of not in program.masks


def _not_a_fill(
    name: str, span: ast.Span, work: ExperimentContext, *, is_circuit: bool = False
) -> None:
    *first, last = (f"`{fill}`" for fill in FILLS)
    if is_circuit:
        first, last = [*first, last], f"a run: {name_list(work.table.runs)}"
    hint = did_you_mean(name, FILLS, f"write {', '.join(first)} or {last}")
    if name in work.table.runs and not is_circuit:
        hint = f"write `patch … with {name}`; `ablate` takes a run only for the edges of a circuit"
    work.diagnostics.append(
        UnknownWord(span=span, kind="fill of an ablation", word=span.written, hint=hint)
    )


def _of_block(
    rule: spec.Rule, word: ast.QualifiedRef, work: ExperimentContext
) -> tuple[Intervention | None, str, ExternalRun | None]:
    """Resolve a fill from a different prompt set, or from a part of one."""
    base, block, part = work.experiment.base, word.of.name, word.of.part
    does = FILLS.get(word.name)
    of_part = work.table.other_tables.get(word.of.span.written) if part is not None else None
    table = of_part or work.table.other_tables.get(block)
    if table is None:
        known = name_list(work.table.runs)
        hint = did_you_mean(block, work.table.runs, f"runs are {known}")
        work.diagnostics.append(UnknownName(span=word.of.span, kind="run", name=block, hint=hint))
        return None, base, None
    if of_part is not None:
        external = ExternalRun(of_part, "clean", part)
    else:
        external = ExternalRun(table, part or "clean")
        if external.run not in table.runs:
            return _no_such_run(word, table, work), base, None
    if does is None or does.reads is None:
        return _not_a_fill(word.name, word.span, work), base, None
    noised = table.runs[external.run].noise is not None
    if rule.by is not None or (noised and does.reads == "donor"):
        what = "a mean within groups" if rule.by is not None else "`resample` of noise"
        what = f"{what} of a different prompt set"
        work.diagnostics.append(NotSupported(span=word.of.span, what=what))
        return None, base, None
    return does, "clean", external


def _no_such_run(word: ast.QualifiedRef, table: PromptTable, work: ExperimentContext) -> None:
    others = [f"{table.name}.{name}" for name in table.runs if name != "clean"]
    known = name_list(others)
    hint = did_you_mean(word.of.span.written, others, f"it has {known}" if known else "remove it")
    work.diagnostics.append(
        UnknownName(span=word.of.span, kind="run", name=word.of.span.written, hint=hint)
    )


def _groups(rule: spec.Rule, does: Intervention, work: ExperimentContext) -> tuple[str, ...] | None:
    """Return the group of each row whose mean replaces it; report E0201 for an unknown value."""
    if rule.by is None:
        return None
    rows = work.table.runs["clean"].rows
    averages = does.reads == "mean"
    if averages and rows and rule.by in rows[0].values:
        return tuple(str(row.values[rule.by]) for row in rows)
    if averages and work.table.columns_unknown:
        return None
    hint = "only `mean` can be taken within groups"
    if averages:
        known = list(rows[0].values) if rows else [""]
        hint = did_you_mean(rule.by, known, f"values of `{work.table.name}` are {name_list(known)}")
    work.diagnostics.append(
        UnknownName(span=rule.span, kind="value to group by", name=rule.by, hint=hint)
    )
    return None
