"""`save` lines made concrete: which vectors of which rows."""

from __future__ import annotations

from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.e03_rules import UnequalPrompts
from mechdsl.diagnostics.e05_answers import NotInTheReply
from mechdsl.program import spec
from mechdsl.prompts.answer_tokens import AnswerTokens
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.reply_positions import ReplyTokens
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.replies import replies_of
from mechdsl.resolve.resolved import ResolvedSave
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.vocab.sites import SITES

_BEHIND = "`save` reads the prompt alone"


def resolve_saves(work: Work) -> tuple[ResolvedSave, ...]:
    """The `save` lines of an experiment, as far as they are right. Codes: E0333 and those of sites
    and positions."""
    found = (_save(save, work) for save in work.experiment.saves)
    return tuple(save for save in found if save is not None)


def _save(save: spec.Save, work: Work) -> ResolvedSave | None:
    run = save.run or work.experiment.base
    targets, _ = resolve_site(save.site, work.sites)
    cells, problems = resolve_positions(
        save.at,
        work.table,
        run,
        tokenizer=work.model.tokenizer,
        loop_values={
            name: value
            for name, value in work.program.parameters.items()
            if isinstance(value, int | float)
        },
        with_runs=(),
        ranked=work.ranked,
        answers=AnswerTokens(reason=_BEHIND),
        replies=_replies(run, work),
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if targets is None or has_errors(problems):
        return None
    points = tuple(dict.fromkeys(point for own in targets.points.values() for point in own))
    _one_width(save, run, points, work)
    found = ResolvedSave(save, run, points, tuple(cells))
    if found.in_reply and any(SITES[point.site].width == "key" for point in points):
        reason = "vectors over the keys of texts of different lengths aren't equally wide"
        problem = NotInTheReply(
            span=save.at.span, position=save.at.span.written, reason=reason, hint="save `z`"
        )
        work.diagnostics.append(problem)
    return found


def _replies(run: str, work: Work) -> ReplyTokens:
    """What a run writes, without rules."""
    written, found = replies_of(work.experiment), work.table.runs.get(run)
    if work.experiment.generation is None or found is None:
        return written
    if found.derived is not None:
        reason = f"`{run}` has rules, which don't act while a reply is written"
        return ReplyTokens(reason=reason, hint="save a run without rules")
    return written


def _one_width(save: spec.Save, run: str, points: tuple[SitePoint, ...], work: Work) -> None:
    """E0333 for vectors over the keys of prompts that are of different lengths."""
    over_keys = sorted({p.site for p in points if SITES[p.site].width == "key"})
    lengths = [len(row.ids) for row in work.table.runs[run].rows]
    other = next((n for n, length in enumerate(lengths) if length != lengths[0]), None)
    if over_keys and other is not None:
        work.diagnostics.append(
            UnequalPrompts(
                span=save.span,
                site=over_keys[0],
                what="rows",
                row=other,
                first=lengths[other],
                second=f"row 0 has {lengths[0]}",
                hint="save `z`, or use prompts of one length",
            )
        )


def tensor_name(point: SitePoint) -> str:
    """What the tensor of a site is called: `resid_post.layer3`, `z.layer3.head2`."""
    unit = (SITES[point.site].unit or "").removeprefix("kv_")
    words = [point.site]
    words += [] if point.layer is None else [f"layer{point.layer}"]
    words += [] if point.unit is None else [f"{unit}{point.unit}"]
    return ".".join(words)
