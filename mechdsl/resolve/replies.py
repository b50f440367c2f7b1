"""Replies that an experiment writes: which of its lines may name their tokens."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_answers import WRITES_NONE, NotInTheReply
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import ReplyPosition
from mechdsl.prompts.reply_positions import ReplyTokens
from mechdsl.resolve.observation import Observation
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
            reason=WRITES_NONE,
            hint="let it write one: `generate 40`; or read what another one has written: `prompts "
            f"{experiment.prompts} with replies of NAME`",
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
    measured = any(measure.in_reply is not None for measure in experiment.measures)
    return measured or any(map(in_reply, experiment.rules))


def refused(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """E0545 for what isn't read in replies."""
    found = [problem for rule in experiment.rules for problem in _of_rule(rule)]
    looking = next((rule for rule in experiment.rules if in_reply(rule)), None)
    for measure, said in zip(experiment.measures, experiment.spec.measures, strict=True):
        seen = looking is not None and looks(measure)
        if not seen and measure.in_reply is None:
            continue
        if said.effect not in ("raw", "delta"):
            reason = f"`{said.effect}` isn't known there"
            hint = "write `as raw`, or `as delta` for what the rules change of it"
            found.append(_refuse(said.span, reason, hint))
        elif said.effect != "raw" and experiment.spec.against is not None:
            reason = "random targets write replies of their own"
            found.append(_refuse(said.span, reason, "write `as raw`, or leave `against …` out"))
        found += _of_measure(measure, said, experiment)
    if reads_reply(experiment):
        found += [problem for rule in experiment.rules for problem in _not_again(rule)]
    return found


def _of_rule(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """What an observation can't do there."""
    if not in_reply(rule):
        return
    if isinstance(rule.does, OverRows):
        reason = f"`{rule.does.name}` is made of vectors of all rows, at tokens of the prompt"
        yield _refuse(rule.spec.span, reason, "observe single rows: `observe norm …`")
    elif isinstance(rule.does, Observation) and rule.does.lists(rule):
        yield _refuse(rule.spec.span, "tokens are listed of prompts", "leave `top …` out")


def _of_measure(
    measure: ResolvedMeasure, said: spec.Measure, experiment: ResolvedExperiment
) -> Iterator[Diagnostic]:
    """What a measure can't read there."""
    span = said.span if said.at is None else said.at.span
    for atom in measure.atoms:
        text, takes = atom.node.span.written, atom.form.takes
        run = None if atom.run is None else experiment.table.runs[atom.run]
        if measure.in_reply is None and not (measure.observed or takes == "observation"):
            reason = f"`{text}` isn't of what is observed"
            yield _refuse(span, reason, "measure it by itself, in a line of its own")
        elif measure.in_reply is None and run is not None:
            yield _refuse(span, f"`{text}` compares tokens of prompts", "leave it out")
        elif takes == "activations":
            reason = f"`{text}` compares tokens of prompts"
            yield _refuse(span, reason, "measure logits there, or observe the site")
        elif any(atom.behind):
            reason = f"`{text}` reads a text of several tokens of its own"
            yield _refuse(span, reason, "name a text of one token")
        elif takes in ("prompt", "reply"):
            yield _refuse(span, f"`{text}` reads no single token", "leave `at …` out")
        elif run is not None and run.derived is not None:
            reason = f"`{run.name}` has rules, which don't act on tokens of a reply"
            yield _refuse(span, reason, "compare with a run without rules")


def _not_again(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """Rules that one pass over prompt and reply can't do as they were done."""
    if rule.after_prefill:
        reason = "the prompt saw its keys and values without the edit, the reply with it"
    elif rule.does.changes == "blocks" and rule.steps is not None:
        reason = "blocks are exchanged for some of the tokens"
    else:
        return
    yield _refuse(rule.spec.span, reason, "measure what is written, or the prompt's last token")


def _refuse(span: Span, reason: str, hint: str) -> Diagnostic:
    return NotInTheReply(span=span, position=span.written, reason=reason, hint=hint)
