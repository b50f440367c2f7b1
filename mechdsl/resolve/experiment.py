"""One experiment made concrete: prompts, axes, rules, measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from mechdsl import spec
from mechdsl.data.positions import check_joined, resolve_positions
from mechdsl.data.replace import replace_tokens
from mechdsl.data.types import PositionCell, PromptTable, Run
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import (
    AxesCollide,
    BadLoopValue,
    EmptyRange,
    TooManyCells,
    UnevenPositions,
)
from mechdsl.diagnostics.e03_positions import AbsentOccurrence
from mechdsl.registry import nearest
from mechdsl.resolve.measures import MeasureContext, known_run, resolve_measure
from mechdsl.resolve.sites import SiteContext, resolve_site
from mechdsl.resolve.types import (
    Axis,
    Fill,
    Key,
    Label,
    ModelContext,
    PositionTargets,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    SiteTargets,
)
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

MOST_CELLS = 1_000_000
FILLS: Mapping[str, Fill] = {"zero": "zero", "mean": "mean", "resample": "resample"}


@dataclass
class _Work:
    experiment: spec.Experiment
    program: spec.Program
    model: ModelContext
    table: PromptTable
    sites: SiteContext
    axes: dict[str, Axis] = field(default_factory=dict)

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.sites.diagnostics

    @property
    def loops(self) -> Mapping[str, tuple[Label, ...]]:
        return self.sites.loops


def resolve_experiment(
    experiment: spec.Experiment, program: spec.Program, model: ModelContext, table: PromptTable
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """The experiment with concrete axes, rules and measures; None after an error.

    Codes: E0301 to E0323, E0402, E0413, E0507, E0612 and those of positions and texts.
    """
    diagnostics: list[Diagnostic] = []
    loops = {
        loop.name: values
        for loop in experiment.loops
        if (values := _loop_values(loop, program.parameters, diagnostics)) is not None
    }
    if len(loops) != len(experiment.loops):
        return None, diagnostics
    sites = SiteContext(
        model.name, model.shape, program.groups, program.parameters, loops, diagnostics
    )
    work = _Work(experiment, program, model, table, sites)
    for loop in experiment.loops:
        work.axes[loop.name] = Axis(loop.name, loops[loop.name], loop.span)
    rules = [_rule(rule, work) for rule in experiment.rules]
    _loops_used(work)
    _one_input(work)
    _draws_agree(work)
    axes = tuple(work.axes.values())
    measures, keep, accuracies = _measures(work, axes)
    if has_errors(diagnostics):
        return None, diagnostics
    resolved = ResolvedExperiment(
        spec=experiment,
        model=model,
        table=table,
        axes=axes,
        rules=tuple(rule for rule in rules if rule is not None),
        measures=measures,
        keep=keep,
        accuracies=accuracies,
        seed=program.seed,
    )
    if resolved.n_cells > MOST_CELLS:
        diagnostics.append(
            TooManyCells(
                span=experiment.span,
                experiment=experiment.name,
                cells=resolved.n_cells,
                most=MOST_CELLS,
                axes=" × ".join(f"{axis.name} ({len(axis)})" for axis in axes),
            )
        )
        return None, diagnostics
    return resolved, diagnostics


def _loop_values(
    loop: spec.Loop, parameters: Mapping[str, Any], diagnostics: list[Diagnostic]
) -> tuple[Label, ...] | None:
    """What a `for` runs over: numbers, or words such as components."""
    values, step = loop.domain.values, loop.domain.step
    if step is not None or isinstance(values, ast.Range):
        return _numbers(loop, values, step, parameters, diagnostics)
    items = values.items if isinstance(values, ast.ListOf) else (values,)
    found: list[Label] = []
    for item in items:
        value = _plain(item, parameters)
        if value is None and isinstance(item, ast.Range):
            part = _numbers(loop, item, None, parameters, diagnostics)
            if part is None:
                return None
            found.extend(part)
            continue
        if value is None:
            _bad_loop(loop, "this value can't be looped over", diagnostics)
            return None
        found.append(value)
    return tuple(found)


def _plain(node: Any, parameters: Mapping[str, Any]) -> Label | None:
    match node:
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Negative(operand=ast.Number(value=value)):
            return -value
        case ast.Name(id=name):
            return parameters.get(name, name)
        case _:
            return None


def _numbers(
    loop: spec.Loop,
    values: Any,
    step: ast.Expr | None,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
) -> tuple[Label, ...] | None:
    if not isinstance(values, ast.Range):
        _bad_loop(loop, "`step` needs a range", diagnostics)
        return None
    low, high = _plain(values.low, parameters), _plain(values.high, parameters)
    width = 1 if step is None else _plain(step, parameters)
    if isinstance(values.low, ast.Percent):
        diagnostics.append(NotSupported(span=loop.domain.span, what="a `for` over percentages"))
        return None
    if (
        not isinstance(low, int | float)
        or not isinstance(high, int | float)
        or not isinstance(width, int | float)
    ):
        _bad_loop(loop, "a range needs numbers at both ends", diagnostics)
        return None
    if high < low or width <= 0:
        diagnostics.append(
            EmptyRange(
                span=loop.domain.span,
                text=loop.domain.span.written,
                low=str(high),
                high=str(low),
            )
        )
        return None
    count = int((high - low) / width + 1e-9) + 1
    if count > MOST_CELLS:
        _bad_loop(loop, f"{count:,} values are more than {MOST_CELLS:,}", diagnostics)
        return None
    return tuple(low + i * width for i in range(count))


def _bad_loop(loop: spec.Loop, reason: str, diagnostics: list[Diagnostic]) -> None:
    diagnostics.append(
        BadLoopValue(
            span=loop.domain.span,
            name=loop.name,
            reason=reason,
            hint="for example `for l in 0..11`, `for l in [0, 4, 8]` or "
            "`for c in [attn_out, mlp_out]`",
        )
    )


def _loops_used(work: _Work) -> None:
    """A `for` whose variable nothing uses would run the same cell again and again."""
    used = {
        part.id
        for rule in work.experiment.rules
        for part in walk(_nodes(rule))
        if isinstance(part, ast.Name)
    }
    for rule in work.experiment.rules:
        for part in walk(_nodes(rule)):
            if isinstance(part, ast.Bound) and part.name is not None:
                used.add(part.name)
            elif isinstance(part, ast.TokenIndex) and isinstance(part.low, str):
                used.add(part.low)
    for loop in work.experiment.loops:
        if loop.name not in used:
            work.diagnostics.append(
                BadLoopValue(
                    span=loop.span,
                    name=loop.name,
                    reason="no rule of this loop uses it",
                    hint=f"write it where it should stand, for example `layer {loop.name}`",
                )
            )


def _one_input(work: _Work) -> None:
    """Two `replace` rules would each change the text that the other one points into."""
    replacing = [rule for rule in work.experiment.rules if rule.verb == "replace"]
    work.diagnostics.extend(
        NotSupported(span=rule.span, what="a second `replace` in one experiment")
        for rule in replacing[1:]
    )


def _draws_agree(work: _Work) -> None:
    """Runs with noise must have equally many draws, so that draw k goes with draw k."""
    experiment = work.experiment
    names = [experiment.base, experiment.source, *(rule.source for rule in experiment.rules)]
    noises = [work.table.runs[n].noise for n in names if n is not None]
    samples = {noise.samples for noise in noises if noise is not None} - {1}
    if len(samples) > 1:
        work.diagnostics.append(
            NotSupported(span=experiment.span, what="runs with different numbers of noise draws")
        )


def _nodes(rule: spec.Rule) -> Any:
    return tuple(part for part in (rule.site, rule.at, rule.fill) if part is not None)


def _rule(rule: spec.Rule, work: _Work) -> ResolvedRule | None:
    """The rule with its targets; its sweeps become axes of the experiment."""
    fill, run, groups = _fill(rule, work)
    sites: SiteTargets | None = None
    if rule.site is not None:
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            _add_axis(axis, work)
    positions = _position_targets(rule, run, work)
    broken = rule.site is not None and sites is None
    if broken or positions is None or fill is None:
        return None
    if fill in ("mean", "resample"):
        _even(rule, positions, work)
    return ResolvedRule(
        spec=rule,
        fill=fill,
        run=run,
        sites=sites,
        positions=positions,
        inputs=_inputs(rule, positions, work),
        groups=groups,
    )


def _inputs(rule: spec.Rule, positions: PositionTargets, work: _Work) -> dict[Key, Run]:
    """The prompts of a `replace` rule; other positions must not move."""
    if rule.verb != "replace" or not isinstance(rule.fill, ast.String):
        return {}
    base = work.experiment.base
    found = {
        key: replace_tokens(work.table, base, cell, rule.fill.value, work.model.tokenizer)
        for key, cell in positions.written.items()
    }
    others = len(work.experiment.rules) > 1 or any(m.at for m in work.experiment.measures)
    rows = work.table.runs[base].rows
    moved = others and any(
        len(new.ids) != len(old.ids)
        for run in found.values()
        for new, old in zip(run.rows, rows, strict=True)
    )
    if moved or work.table.runs[base].noise is not None:
        what = "a replacement of another number of tokens beside other positions"
        work.diagnostics.append(
            NotSupported(span=rule.span, what=what if moved else "`replace` on a noised run")
        )
    return found


def _even(rule: spec.Rule, positions: PositionTargets, work: _Work) -> None:
    """Means and resamplings go over rows, so a position must be the same thing in every row."""
    for cell in positions.read.values():
        sizes = {len(tokens) for row in cell.hits for tokens in row}
        if len(sizes) > 1:
            work.diagnostics.append(
                UnevenPositions(
                    span=rule.at.span,
                    position=cell.label,
                    least=min(sizes),
                    most=max(sizes),
                )
            )
            return


def _add_axis(axis: Axis, work: _Work) -> None:
    first = work.axes.get(axis.name)
    if first is not None:
        word, letter = axis.name, axis.name[0]
        shared, plural = f"for {letter} in … {{ … {word} {letter} … }}", f"{word}s"
        if word == "position":
            shared, plural = "for t in 3..5 { … at token t … }", "{A, B}"
        work.diagnostics.append(
            AxesCollide(
                span=axis.span, axis=word, shared=shared, plural=plural, first=first.span.line
            )
        )
        return
    work.axes[axis.name] = axis


def _fill(rule: spec.Rule, work: _Work) -> tuple[Fill | None, str, tuple[str, ...] | None]:
    """What is written, the run that is read for it, and the groups of `mean by`."""
    base = work.experiment.base
    if rule.verb == "patch":
        return "source", rule.source or base, None
    if rule.verb == "replace":
        return "text", base, None
    run = "clean"
    word: ast.Node | None = rule.fill
    name = ""
    if isinstance(word, ast.OfRef):
        name = word.name
        run = word.of.name
        if run not in work.table.runs:
            if run in work.program.prompts:
                work.diagnostics.append(
                    NotSupported(span=word.of.span, what="the mean of another block of prompts")
                )
            else:
                known = ", ".join(f"`{r}`" for r in work.table.runs)
                work.diagnostics.append(
                    UnknownName(
                        span=word.of.span,
                        kind="run",
                        name=run,
                        hint=did_you_mean(nearest(run, work.table.runs), f"runs are {known}"),
                    )
                )
            return None, base, None
    elif isinstance(word, ast.Name):
        name = word.id
    fill = FILLS.get(name)
    if fill is None or (fill == "zero" and isinstance(word, ast.OfRef)):
        span = rule.span if word is None else word.span
        work.diagnostics.append(
            UnknownWord(
                span=span,
                kind="fill of an ablation",
                word=span.written,
                hint=did_you_mean(nearest(name, FILLS), "write `zero`, `mean` or `resample`"),
            )
        )
        return None, base, None
    groups = _groups(rule, fill, work)
    return fill, base if fill == "zero" else run, groups


def _groups(rule: spec.Rule, fill: Fill, work: _Work) -> tuple[str, ...] | None:
    if rule.by is None:
        return None
    rows = work.table.runs["clean"].rows
    if fill != "mean" or not rows or rule.by not in rows[0].values:
        known = ", ".join(rows[0].values) if rows else ""
        work.diagnostics.append(
            UnknownName(
                span=rule.span,
                kind="value to group by",
                name=rule.by,
                hint=did_you_mean(
                    nearest(rule.by, known.split(", ")),
                    f"values of `{work.table.name}` are {known}",
                )
                if fill == "mean"
                else "only `mean` can be taken within groups",
            )
        )
        return None
    return tuple(str(row.values[rule.by]) for row in rows)


def _position_targets(rule: spec.Rule, run: str, work: _Work) -> PositionTargets | None:
    """Where the rule writes and reads, for every value of the loops that its positions name."""
    base = work.experiment.base
    loops = [
        name
        for name in work.loops
        if any(isinstance(n, ast.TokenIndex) and n.low == name for n in walk(rule.at))
    ]
    written: dict[Key, PositionCell] = {}
    read: dict[Key, PositionCell] = {}
    swept: list[PositionCell] | None = None
    left_out: tuple[str, ...] = ()
    for key in product(*(range(len(work.loops[name])) for name in loops)):
        values = {
            **{k: v for k, v in work.program.parameters.items() if isinstance(v, int)},
            **{n: work.loops[n][i] for n, i in zip(loops, key, strict=True)},
        }
        found = _cells(rule, run, base, values, work)
        if found is None:
            return None
        cells, reads, left_out = found
        if loops and len(cells) > 1:
            work.diagnostics.append(
                BadLoopValue(
                    span=rule.at.span,
                    name=loops[0],
                    reason="it can't stand beside another sweep of positions",
                    hint="name one position: `token " + loops[0] + "`",
                )
            )
            return None
        swept = cells
        for index, (cell, source) in enumerate(zip(cells, reads, strict=True)):
            here = key if len(cells) == 1 else (*key, index)
            written[here] = cell
            read[here] = source
    assert swept is not None
    names = tuple(loops)
    if len(swept) > 1:
        items = tuple(cell.item for cell in swept)
        _add_axis(
            Axis(
                "position",
                tuple(cell.label for cell in swept),
                rule.at.span,
                alias="item" if all(i is not None for i in items) else None,
                items=items,
            ),
            work,
        )
        names = (*names, "position")
    return PositionTargets(names, written, read, left_out)


def _cells(
    rule: spec.Rule, run: str, base: str, values: Mapping[str, Any], work: _Work
) -> tuple[list[PositionCell], list[PositionCell], tuple[str, ...]] | None:
    """The cells of a rule's positions in the base run, the same ones where it reads, and the
    labels of those that no row has in both."""

    def found(name: str, other: str) -> tuple[PositionCell, ...] | None:
        cells, problems = resolve_positions(
            rule.at,
            work.table,
            name,
            tokenizer=work.model.tokenizer,
            loop_values=values,
            with_runs=() if other == name else (other,),
        )
        work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
        return None if has_errors(problems) else cells

    cells = found(base, run)
    if cells is None:
        return None
    if run == base:
        return list(cells), list(cells), ()
    sources = found(run, base)
    if sources is None:
        return None
    by_label = {cell.label: cell for cell in sources}
    pairs = [_common(cell, by_label[cell.label]) for cell in cells if cell.label in by_label]
    pairs = [pair for pair in pairs if any(pair[0].hits)]
    if not pairs:
        work.diagnostics.append(
            AbsentOccurrence(
                span=rule.at.span,
                position=rule.at.span.written,
                run=run,
                lacking=len(work.table),
                total=len(work.table),
                example=f'"{work.table.runs[run].rows[0].text}"',
                hint=f"name a position that a row has in both `{base}` and `{run}`",
            )
        )
        return None
    written = [pair[0] for pair in pairs]
    read = [pair[1] for pair in pairs]
    problems = check_joined(written, read, span=rule.at.span, table=work.table, runs=(base, run))
    work.diagnostics.extend(problems)
    labels = dict.fromkeys(cell.label for cell in (*cells, *sources))
    left_out = tuple(label for label in labels if label not in {cell.label for cell in written})
    return None if has_errors(problems) else (written, read, left_out)


def _common(cell: PositionCell, source: PositionCell) -> tuple[PositionCell, PositionCell]:
    """Both without the rows that lack the position in one of the runs."""
    keep = [bool(a) and bool(b) for a, b in zip(cell.hits, source.hits, strict=True)]
    if all(keep):
        return cell, source

    def cut(one: PositionCell) -> PositionCell:
        return replace(one, hits=tuple(h if k else () for h, k in zip(one.hits, keep, strict=True)))

    return cut(cell), cut(source)


def _measures(
    work: _Work, axes: tuple[Axis, ...]
) -> tuple[tuple[ResolvedMeasure, ...], tuple[ResolvedMeasure, ...], dict[str, ResolvedMeasure]]:
    experiment = work.experiment
    items = sorted({i for axis in axes for i in axis.items if i is not None})
    if has_errors(work.diagnostics):
        items = items or [1]  # the rule that failed may have been a sweep over occurrences
    context = MeasureContext(
        work.table, work.model.tokenizer, work.sites, tuple(items), work.diagnostics
    )
    runs = tuple(dict.fromkeys(r for r in (experiment.base, experiment.source, "clean") if r))
    measures = [
        resolve_measure(m.metric, context, label=m.label, at=m.at, runs=runs)
        for m in experiment.measures
    ]
    keep = [resolve_measure(k, context, label="keep", runs=("clean",)) for k in experiment.keep]
    accuracies: dict[str, ResolvedMeasure] = {}
    for call in _accuracy_calls(experiment):
        value = call.arguments[0].value if len(call.arguments) == 1 else call
        run = known_run(value, context)
        if run is None:
            continue
        correct = ast.Name("correct", span=call.span)
        found = resolve_measure(correct, context, label="accuracy")
        if found is not None:
            accuracies[run] = found
    return (
        tuple(m for m in measures if m is not None),
        tuple(k for k in keep if k is not None),
        accuracies,
    )


def _accuracy_calls(experiment: spec.Experiment) -> list[ast.Call]:
    return [
        node
        for expect in experiment.expects
        if expect.condition is not None
        for node in walk(expect.condition)
        if isinstance(node, ast.Call) and node.name == "accuracy"
    ]
