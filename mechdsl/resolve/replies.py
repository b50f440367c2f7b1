"""Replies that an experiment writes: which of its lines may name their tokens."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_answers import NotInTheReply
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import ReplyPosition
from mechdsl.prompts.reply_positions import ReplyTokens
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedMeasure
from mechdsl.resolve.resolved_rule import ResolvedRule

FOR_RULES = ReplyTokens(
    reason="rules act while the reply is written",
    hint="write `at last token`, which is the newest one, and when: `during step 3`",
)


def replies_of(experiment: spec.Experiment) -> ReplyTokens:
    """Those that an experiment writes."""
    written = experiment.generation
    if written is None:
        return ReplyTokens(
            reason="the experiment writes none", hint="let it write one: `generate 40`"
        )
    return ReplyTokens(written.tokens)


def in_reply(rule: ResolvedRule) -> bool:
    """Whether it looks at tokens of the reply, or from there."""
    return any(True for _ in reply_places(rule))


def reply_places(rule: ResolvedRule) -> Iterator[ReplyPosition]:
    """Where in the reply it looks."""
    targets = [rule.positions] if rule.edge is None else [rule.positions, rule.edge.keys]
    for each in targets:
        for cell in each.written.values():
            if cell.reply is not None:
                yield cell.reply


def looks(measure: ResolvedMeasure) -> bool:
    """Whether it reads what is observed."""
    return measure.observed or any(atom.form.takes == "observation" for atom in measure.atoms)


def reads_reply(experiment: ResolvedExperiment) -> bool:
    """Whether something of it is read behind the prompts, in a pass over prompts and replies."""
    measured = any(measure.reply is not None for measure in experiment.measures)
    return measured or any(map(in_reply, experiment.rules))


def refused(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """E0545 for what isn't read behind prompts."""
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        if isinstance(rule.does, OverRows) and in_reply(rule):
            reason = f"`{rule.does.name}` is made of vectors of all rows, at tokens of the prompt"
            found.append(_refuse(rule.spec.span, reason, "observe single rows: `observe norm …`"))
    looking = any(map(in_reply, experiment.rules))
    for measure, said in zip(experiment.measures, experiment.spec.measures, strict=True):
        seen = looking and looks(measure)
        if (measure.reply is not None or seen) and said.effect not in ("raw", "delta"):
            reason = f"`{said.effect}` isn't known there"
            hint = "write `as raw`, or `as delta` for what the rules change of it"
            found.append(_refuse(said.span, reason, hint))
        elif (measure.reply is not None or seen) and said.effect != "raw" and experiment.spec.against:
            reason = "random targets write replies of their own"
            found.append(_refuse(said.span, reason, "write `as raw`, or leave `against …` out"))
        if measure.reply is None:
            continue
        span = said.span if said.at is None else said.at.span
        for atom in measure.atoms:
            if atom.form.takes == "activations":
                reason = f"`{atom.node.span.written}` compares tokens of prompts"
                found.append(_refuse(span, reason, "measure logits there, or observe the site"))
            elif any(atom.behind):
                reason = f"`{atom.node.span.written}` reads a text of several tokens of its own"
                found.append(_refuse(span, reason, "name a text of one token"))
            elif atom.form.takes in ("prompt", "reply"):
                reason = f"`{atom.node.span.written}` reads no single token"
                found.append(_refuse(span, reason, "leave `at …` out"))
            elif atom.run is not None and experiment.table.runs[atom.run].derived is not None:
                reason = f"`{atom.run}` has rules, which don't act on tokens of a reply"
                found.append(_refuse(span, reason, "compare with a run without rules"))
    return found


def _refuse(span: Span, reason: str, hint: str) -> Diagnostic:
    return NotInTheReply(span=span, position=span.written, reason=reason, hint=hint)
