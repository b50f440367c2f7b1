"""What several kinds of rules must not do."""

from __future__ import annotations

from mechdsl.diagnostics.e03_coordinates import UnevenPositions
from mechdsl.diagnostics.e03_rules import UnequalPrompts
from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.program import spec
from mechdsl.prompts.position_hits import lies_behind
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Apart, Intervention, PositionTargets, SiteTargets
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.sites import SITES


def equally_long(
    rule: spec.Rule, sites: SiteTargets, does: Intervention, read: Apart, work: Work
) -> None:
    """E0333 where vectors over the keys of one prompt would be written into a longer one.

    read: the rows that vectors come from.
    """
    named = {p.site for points in sites.points.values() for p in points}
    over_keys = sorted(site for site in named if SITES[site].width == "key")
    if not over_keys or does.reads is None:
        return
    base = [len(row.ids) for row in work.table.runs[work.experiment.base].rows]
    other = [len(row.ids) for row in read.table.runs[read.run].rows]
    if does.over_rows:
        lengths = [*base, *other]
        row = next((n for n, length in enumerate(lengths) if length != other[0]), None)
        second = f"row 0 has {other[0]}"
        what, hint = "rows", "ablate `z`, or use prompts of one length"
    else:
        row = next((n for n, (a, b) in enumerate(zip(base, other, strict=True)) if a != b), None)
        second = f"{other[row]} in `{read.run}`" if row is not None else ""
        what, hint = "the two runs", "patch `z`, or let the corruption keep the number of tokens"
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


def even(rule: spec.Rule, positions: PositionTargets, work: Work) -> None:
    """E0324, E0612: means and resamplings go over rows, so a position must be the same thing in
    every row."""
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
                    span=rule.at.span, position=cell.label, least=min(sizes), most=max(sizes)
                )
            )
            return
    rows = work.table.runs[work.experiment.base].rows
    joined = any(
        lies_behind(cell, rows) and any(len(tokens) > 1 for row in cell.hits for tokens in row)
        for cell in positions.written.values()
    )
    for text, lengths in work.answers.texts if joined else ():
        if len(set(lengths)) > 1:
            position = f"{rule.at.span.written}` of `{text}"
            least, most = min(lengths), max(lengths)
            work.diagnostics.append(
                UnevenPositions(span=rule.at.span, position=position, least=least, most=most)
            )
            return
