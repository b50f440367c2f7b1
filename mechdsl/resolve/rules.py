"""Rules made concrete: what they write, where, and from which run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from mechdsl import spec
from mechdsl.data.positions import check_joined, resolve_positions
from mechdsl.data.replace import replace_tokens
from mechdsl.data.types import PositionCell, Run
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import (
    BadLoopValue,
    UnevenPositions,
)
from mechdsl.diagnostics.e03_positions import AbsentOccurrence
from mechdsl.registry import nearest
from mechdsl.resolve.sites import resolve_site
from mechdsl.resolve.types import (
    Axis,
    Fill,
    Key,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
)
from mechdsl.resolve.work import Work
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

FILLS: Mapping[str, Fill] = {"zero": "zero", "mean": "mean", "resample": "resample"}


def resolve_rule(rule: spec.Rule, work: Work) -> ResolvedRule | None:
    """The rule with its targets; its sweeps become axes of the experiment."""
    fill, run, groups = _fill(rule, work)
    sites: SiteTargets | None = None
    if rule.site is not None:
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            work.add_axis(axis)
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


def _inputs(rule: spec.Rule, positions: PositionTargets, work: Work) -> dict[Key, Run]:
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


def _even(rule: spec.Rule, positions: PositionTargets, work: Work) -> None:
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


def _fill(rule: spec.Rule, work: Work) -> tuple[Fill | None, str, tuple[str, ...] | None]:
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


def _groups(rule: spec.Rule, fill: Fill, work: Work) -> tuple[str, ...] | None:
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


def _position_targets(rule: spec.Rule, run: str, work: Work) -> PositionTargets | None:
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
        work.add_axis(
            Axis(
                "position",
                tuple(cell.label for cell in swept),
                rule.at.span,
                alias="item" if all(i is not None for i in items) else None,
                items=items,
            )
        )
        names = (*names, "position")
    return PositionTargets(names, written, read, left_out)


def _cells(
    rule: spec.Rule, run: str, base: str, values: Mapping[str, Any], work: Work
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
