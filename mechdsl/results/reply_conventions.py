"""How replies were written, and what rules did meanwhile, in words, by short key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from mechdsl.base.plural import plural
from mechdsl.base.reply import Reply
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.writer import ends_of
from mechdsl.generate.way import way_of
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.program.spec_replies import Generation
from mechdsl.resolve.replies import reads_reply
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule


def of_replies(
    plan: ExperimentPlan, measured: MeasuredValues, model: LoadedModel
) -> Iterator[tuple[str, str]]:
    """Nothing without `generate`."""
    said, experiment = plan.experiment.generation, plan.experiment
    if said is None:
        return
    chosen = "each the most likely one"
    if said.sampled:
        chosen = (
            f"{', '.join(said.drawn)}, by seed {experiment.seed}: other draws for each prompt, "
            "cell, run, sample and step, wherever they are computed"
        )
    yield "generate", f"up to {plural(said.tokens, 'token')} behind each prompt, {chosen}"
    yield "replies end", _ends(said, experiment, model)
    yield "lengths", "; ".join(_lengths(plan, measured))
    way = way_of(model)
    if way.kind == "whole":
        yield "kept keys", f"none: each token takes a whole pass, as {way.reason}"
    if said.samples > 1:
        yield "samples", f"{said.samples:,} to a row, whose value is their mean"
    each = ["draws of noise"] if plan.draws > 1 else []
    each += ["samples"] if said.samples > 1 else []
    if each and reads_reply(experiment):
        several = f"the mean over its {' and '.join(each)} whose reply has the place"
        yield "places", f"a row's value is {several}; a row where none has it leaves the cell"
    rules = [r.rule for r in plan.rules if r.rule.does.changes not in ("nothing", "input")]
    if rules:
        yield "steps", "; ".join(_steps(rules))
    if any(measure.reply is None for measure in experiment.measures):
        yield "prompt end", "what isn't read off the reply is measured in step 0, before it"


def _ends(said: Generation, experiment: ResolvedExperiment, model: LoadedModel) -> str:
    text = experiment.model.tokenizer.token_text
    own = " or ".join(f"`{text(token)}`" for token in sorted(ends_of(model)))
    stops = " or ".join(map(json.dumps, said.stops))
    found = [f"in front of {stops}"] if stops else []
    found += [f"in front of the model's {own}"] if own else []
    return ", or ".join([*found, f"behind {plural(said.tokens, 'token')}"])


def _lengths(plan: ExperimentPlan, measured: MeasuredValues) -> Iterator[str]:
    """How long replies are, of each run and of all cells."""
    of: dict[str, list[Reply]] = {}
    for (run, _), replies in measured.unpatched_replies.items():
        of.setdefault(run, []).extend(replies)
    if plan.rules:
        every = (reply for own in measured.replies.values() for reply in own)
        of["patched"] = list(every)
    for name, replies in of.items():
        counts = [len(reply.ids) for reply in replies]
        if not counts:
            continue
        cut = sum(reply.ended == "length" for reply in replies)
        said = f"{name} {sum(counts) / len(counts):.3g} tokens ({min(counts)} to {max(counts)})"
        yield said + (f", {cut:,} of {len(counts):,} cut off" if cut else "")


def _steps(rules: Sequence[ResolvedRule]) -> Iterator[str]:
    """In which passes rules act."""
    yield "step 0 is the pass over the prompt, each later one that of one more token of the reply"
    if any(rule.acts_later for rule in rules):
        yield (
            "`last token` and `tokens *` go on to the newest token, where a rule writes what it "
            "writes at the prompt's last one"
        )
    if any(rule.in_prefill and not _only_newest(rule) for rule in rules):
        yield "positions of the prompt are written in step 0, and later tokens attend to that"
    for rule in rules:
        if rule.after_prefill:
            text = " ".join(rule.spec.span.written.split())
            yield f"`{text}` edits what is kept of the prompt behind step 0, which doesn't see it"


def _only_newest(rule: ResolvedRule) -> bool:
    """Whether all its positions are the newest token."""
    positions = rule.positions
    return len(positions.newest) == len(positions.written) and not positions.every
