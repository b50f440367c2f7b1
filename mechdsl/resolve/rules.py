"""Rules made concrete: what they write, where, and from which run."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import UnevenPositions
from mechdsl.diagnostics.e03_rules import UnequalPrompts
from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFunction, find_function, is_python
from mechdsl.program.spec import ATTENTION_VERBS
from mechdsl.prompts.replaced_text import replace_tokens
from mechdsl.prompts.table import Run
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.edges import resolve_edge_rule
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.path_rules import resolve_path
from mechdsl.resolve.picks import pick_nothing
from mechdsl.resolve.resolved import (
    Amounts,
    Apart,
    Fill,
    Key,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
)
from mechdsl.resolve.sites import resolve_site, with_read_layers
from mechdsl.resolve.targets import rule_targets
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.sites import SITES

FILLS: Mapping[str, Fill] = {"zero": "zero", "mean": "mean", "resample": "resample"}


def resolve_rule(rule: spec.Rule, work: Work) -> ResolvedRule | None:
    """The rule with its targets; its sweeps become axes of the experiment."""
    if rule.verb in ATTENTION_VERBS:
        return resolve_edge_rule(rule, work)
    if rule.verb == "path":
        return resolve_path(rule, work)
    fill, run, groups = _fill(rule, work)
    sites: SiteTargets | None = None
    if rule.site is not None:
        sites, axes = resolve_site(rule.site, work.sites)
        if sites is not None and rule.into_layer is not None:
            sites, more = with_read_layers(sites, rule.into_layer, work.sites)
            axes = (*axes, *more)
        for axis in axes:
            work.add_axis(axis)
    apart = _apart(rule, work)
    sites, positions = pick_nothing(sites, rule_targets(rule, run, work, apart))
    amounts: Amounts | None = None
    python: PythonFunction | None = None
    if fill == "python":
        assert isinstance(rule.fill, ast.Call)
        python, problems = find_function(rule.fill, "fill")
        work.diagnostics.extend(problems)
        fill = fill if python is not None else None
    if fill == "number":
        amounts = resolve_amounts(rule.fill, work)
        fill = fill if amounts is not None else None
    broken = rule.site is not None and sites is None
    if broken or positions is None or fill is None:
        return None
    if fill in ("mean", "resample"):
        _even(rule, positions, work)
    if sites is not None:
        _equally_long(rule, sites, fill, (apart or Apart(work.table, run)), work)
    return ResolvedRule(
        spec=rule,
        fill=fill,
        run=run,
        sites=sites,
        positions=positions,
        inputs=_inputs(rule, positions, work),
        groups=groups,
        amounts=amounts,
        apart=apart,
        python=python,
    )


def _apart(rule: spec.Rule, work: Work) -> Apart | None:
    """The other block of `mean of BLOCK`; E0201 for a run that it doesn't have."""
    fill = rule.fill
    if not isinstance(fill, ast.OfRef) or fill.of.name in work.table.runs:
        return None
    table = work.table.beside.get(fill.of.name)
    if table is None:
        return None
    run = fill.of.part or "clean"
    if run not in table.runs:
        others = [f"{table.name}.{name}" for name in table.runs if name != "clean"]
        known = ", ".join(f"`{name}`" for name in others)
        instead = f"it has {known}" if known else "leave it out"
        hint = did_you_mean(fill.of.span.written, others, instead)
        work.diagnostics.append(
            UnknownName(span=fill.of.span, kind="run", name=fill.of.span.written, hint=hint)
        )
        return None
    return Apart(table, run)


def _equally_long(rule: spec.Rule, sites: SiteTargets, fill: Fill, read: Apart, work: Work) -> None:
    """E0333 where vectors over the keys of one prompt would be written into a longer one."""
    named = {p.site for points in sites.points.values() for p in points}
    over_keys = sorted(site for site in named if SITES[site].width == "key")
    if not over_keys or fill not in ("source", "mean", "resample"):
        return
    base = [len(row.ids) for row in work.table.runs[work.experiment.base].rows]
    other = [len(row.ids) for row in read.table.runs[read.run].rows]
    if fill == "source":
        row = next((n for n, (a, b) in enumerate(zip(base, other, strict=True)) if a != b), None)
        second = f"{other[row]} in `{read.run}`" if row is not None else ""
        what, hint = "the two runs", "patch `z`, or let the corruption keep the number of tokens"
    else:
        lengths = [*base, *other]
        row = next((n for n, length in enumerate(lengths) if length != other[0]), None)
        second = f"row 0 has {other[0]}"
        what, hint = "rows", "ablate `z`, or use prompts of one length"
    if row is not None:
        work.diagnostics.append(
            UnequalPrompts(
                span=rule.span,
                site=over_keys[0],
                what=what,
                row=row % len(base),
                first=[*base, *other][row],
                second=second,
                hint=hint,
            )
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
    ranked = next((n for n in walk(rule.at) if isinstance(n, ast.RankedTokens)), None)
    if ranked is not None:
        work.diagnostics.append(
            BadPick(
                span=ranked.span,
                text=ranked.span.written,
                reason="every row has tokens of its own, so a mean or a resampling over rows has "
                "nothing to go over",
                hint="write `with zero`, or name positions that are the same in every row",
            )
        )
        return
    for written, cell in zip(positions.written.values(), positions.read.values(), strict=True):
        sizes = {len(tokens) for row in (*cell.hits, *written.hits) for tokens in row}
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
    if rule.verb in ("swap", "freeze"):
        return "source", base, None
    if rule.verb == "set":
        return "python" if is_python(rule.fill) else "number", base, None
    if rule.verb == "replace":
        return "text", base, None
    run = "clean"
    word: ast.Node | None = rule.fill
    name = ""
    if isinstance(word, ast.OfRef):
        name = word.name
        run = word.of.name
        if run not in work.table.runs:
            if run in work.table.beside and name == "mean" and rule.by is None:
                return "mean", "clean", None
            if run in work.table.beside:
                what = f"`{name}`" if name != "mean" else "a mean within groups"
                what = f"{what} of another block of prompts"
                work.diagnostics.append(NotSupported(span=word.of.span, what=what))
            else:
                known = ", ".join(f"`{r}`" for r in work.table.runs)
                work.diagnostics.append(
                    UnknownName(
                        span=word.of.span,
                        kind="run",
                        name=run,
                        hint=did_you_mean(run, work.table.runs, f"runs are {known}"),
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
                hint=did_you_mean(name, FILLS, "write `zero`, `mean` or `resample`"),
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
                    rule.by,
                    known.split(", "),
                    f"values of `{work.table.name}` are {known}",
                )
                if fill == "mean"
                else "only `mean` can be taken within groups",
            )
        )
        return None
    return tuple(str(row.values[rule.by]) for row in rows)
