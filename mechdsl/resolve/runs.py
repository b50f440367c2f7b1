"""Runs with rules, generated replies, `save` lines, and the baseline of observed effects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import ClassVar, Literal

from mechdsl.base.limits import is_whole_number
from mechdsl.base.records import Registry
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.experiments import UnreadableMeasure
from mechdsl.diagnostics.rules import NO_REPLY_REASON, AbsentOccurrence, NotInReply, UnequalPrompts
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.rules import steps_problem
from mechdsl.program.saves import CONTROL_VECTOR_SUFFIX
from mechdsl.program.spec import ONE_CELL_HINT, During, Generation
from mechdsl.prompts.positions.cells import ReplyTokens, resolve_positions
from mechdsl.prompts.positions.spans import AnswerTokens, refers_to_answer
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import DerivedRun, ReplyPosition
from mechdsl.resolve.bases import resolve_rule, resolve_saved_features
from mechdsl.resolve.circuits import keep_baseline
from mechdsl.resolve.directions import (
    DirectionError,
    find_use,
    name_coordinate,
    name_tensor_of_member,
    report_direction,
    resolve_family,
)
from mechdsl.resolve.measures import resolve_measure_positions
from mechdsl.resolve.observations import Observation, RowSetObservation
from mechdsl.resolve.sites import ExperimentContext, MeasureContext, find_side, resolve_site
from mechdsl.resolve.targets import report_empty_selection
from mechdsl.resolve.types import (
    AxisIndices,
    BaselineExperiment,
    BasisTargets,
    DirectionFamily,
    DirectionMember,
    ResolvedDirectionFile,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    ResolvedSave,
    SitePoint,
    StepRanges,
    iter_read_points,
)
from mechdsl.syntax import ast
from mechdsl.syntax.words import ObservationWord
from mechdsl.vocab.metrics import CIRCUIT_BASELINES, EFFECTS, RAW, CircuitBaseline
from mechdsl.vocab.sites import SITES


class RuleKind:
    """A kind of rule, identified by its verb."""

    takes: ClassVar[Literal["", "to", "by"]] = ""
    """Keyword before the number, for kinds parsed as `WORD SITE at POSITIONS`."""
    once: ClassVar[bool] = False
    """Whether an experiment has at most one rule of this kind."""
    once_because: ClassVar[str] = ""
    """Why a second rule is an error, or what to write instead."""
    within_prompt: ClassVar[str] = ""
    """Why the kind can't act on answer tokens, after the prompt; empty if it can."""

    whole_text: ClassVar[bool] = False
    """Whether the kind always acts at all tokens, also those of answers."""
    reads_replies: ClassVar[bool] = False
    """Whether the kind can observe tokens of a reply."""

    def observes(self, rule: spec.Rule) -> Observation | None:
        """Return the observation that measures read; None for rules that act."""
        return None

    def observation_words(self) -> Mapping[str, ObservationWord]:
        """Return the words that may follow its verb, if they name observations."""
        return {}

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        """Resolve the targets of a rule, and add its sweeps to the axes of the experiment.

        Reports all errors of the rule in `work.diagnostics`, and returns None if there are any.
        """
        raise NotImplementedError


def define_runs(
    work: ExperimentContext, kinds: Registry[RuleKind]
) -> dict[str, ResolvedExperiment]:
    """Resolve the runs that the experiment defines, and add them to its table.

    A run with errors equals its base, so that other rules can still name it. Codes: E0108, E0309
    and those of rules.
    """
    runs: dict[str, ResolvedExperiment] = {}
    for run in work.experiment.derived:
        if run.base not in work.table.runs:
            continue  # already reported
        rules = _rules(run, work, kinds)
        base = work.table.runs[run.base]
        reads = tuple(dict.fromkeys(rule.run for rule in rules if rule.external is None))
        draws = max(work.table.runs[name].draws for name in (run.base, *reads))
        made = replace(base, name=run.name, derived=DerivedRun(run.base, reads, draws))
        runs[run.name] = ResolvedExperiment(
            spec=_isolate_run(work.experiment, run),
            model=work.model,
            table=work.table,
            axes=(),
            rules=rules,
            measures=(),
            keep=(),
            accuracies={},
            seed=work.program.seed,
        )
        work.table = replace(work.table, runs={**work.table.runs, run.name: made})
    return runs


def _isolate_run(experiment: spec.Experiment, run: spec.DerivedRun) -> spec.Experiment:
    """Create an experiment that has only the rules of a run."""
    return experiment.model_copy(
        update={
            "name": run.name,
            "span": run.span,
            "variant": (),
            "source": run.source,
            "base": run.base,
            "rules": run.rules,
            "derived": (),
            "loops": (),
            "keep": (),
            "measures": (),
            "against": None,
            "reports": (),
            "expects": (),
        }
    )


def _rules(
    run: spec.DerivedRun, work: ExperimentContext, kinds: Registry[RuleKind]
) -> tuple[ResolvedRule, ...]:
    """Resolve the rules of a run, without those that have errors."""
    alone = _isolate_run(work.experiment, run)
    sites = replace(work.sites, loops={}, words={})
    inner = ExperimentContext(
        alone,
        work.program,
        work.model,
        work.table,
        sites,
        probes=work.probes,
        outer=work.experiment,
    )
    rules: list[ResolvedRule] = []
    for rule in run.rules:
        resolved = resolve_rule(kinds[rule.verb].resolve, rule, inner)
        if resolved is None:
            continue
        problems = list(_check_run_rule(resolved, inner.table, run))
        work.diagnostics.extend(problems)
        if not has_errors(problems):
            rules.append(resolved)
    for axis in inner.axes.values():
        what = f"a sweep (`{axis.span.written}`) in a `run`"
        work.diagnostics.append(NotSupported(span=axis.span, what=what, later=ONE_CELL_HINT))
    inner.draws_agree()
    return tuple(rules)


def _check_run_rule(
    rule: ResolvedRule, table: PromptTable, run: spec.DerivedRun
) -> Iterator[Diagnostic]:
    """Yield E0108 for a rule kind that runs can't have, and E0309 for rows that lack its position.

    Such rows would have no run.
    """
    what, later = "", "write it in the experiment, on the run: `from … into NAME`"
    if rule.path is not None:
        what = "a `path` in a `run`"
    elif rule.circuit is not None:
        what = "an ablated circuit in a `run`"
    elif rule.does.changes == "input":
        what, later = "a `replace` in a `run`", "write a `corrupt` in the prompts block"
    elif rule.does.changes == "nothing":
        what = f"`{rule.spec.verb}` in a `run`"
    if what:
        yield NotSupported(span=rule.spec.span, what=what, later=later)
        return
    for cell in rule.positions.written.values():
        lacking = [row for row, hits in enumerate(cell.hits) if not hits]
        if lacking and not table.stands_in:
            rows = table.runs[run.base].rows
            yield AbsentOccurrence(
                span=rule.spec.at.span,
                position=rule.spec.at.span.written,
                run=run.base,
                lacking=len(lacking),
                total=len(rows),
                example=f'"{rows[lacking[0]].text}"',
                hint=f"every row needs it, because `{run.name}` must be a run of all rows: "
                "exclude the other rows with a `where` in the prompts block",
            )


def check_derived_base(
    rules: Sequence[ResolvedRule | None], work: ExperimentContext
) -> Iterator[Diagnostic]:
    """Yield E0108 for rules of the experiment that can't act on a run with rules."""
    if work.table.runs[work.experiment.base].derived is None:
        return
    for rule in rules:
        if rule is not None and rule.does.changes == "input":
            what = f"a `{rule.spec.verb}` on a run that has rules"
            yield NotSupported(span=rule.spec.span, what=what)


def check_accuracies(
    asked: Iterable[str], derived: Mapping[str, ResolvedExperiment], experiment: spec.Experiment
) -> Iterator[Diagnostic]:
    """Yield E0108 for the accuracy of a run that is computed from the kept rows.

    An accuracy is over all rows, which `keep` contradicts.
    """
    for name in asked if experiment.keep else ():
        run = name
        while run in derived:
            if any(rule.does.of_all_rows for rule in derived[run].rules):
                what = (
                    f"`accuracy({name})` together with `keep`, because `{run}` is computed "
                    "from "
                    "the kept rows,"
                )
                yield NotSupported(span=experiment.keep[0].span, what=what)
                break
            run = derived[run].spec.base


CACHED_SITES = ("k", "v", "k cross", "v cross")
"""Sites whose vectors are cached for every token, so that later tokens can attend to them."""


def resolve_steps(rule: ResolvedRule, work: ExperimentContext) -> ResolvedRule | None:
    """Resolve the generation steps in which a rule acts; None after E0207 for invalid steps."""
    during, generation = rule.spec.during, work.experiment.generation
    if during is None or generation is None:
        return rule
    axes = _step_axes(during, work)
    steps: dict[AxisIndices, tuple[int, int]] = {}
    for key, at in work.sites.combinations(axes):
        low, high = _step(during.first, at), _step(during.last, at)
        problem = steps_problem(low, high, generation.tokens)
        if problem is not None:
            where = " and ".join(f"`{name}` = {value}" for name, value in at.items())
            reason, hint = problem
            work.diagnostics.append(_bad_steps(during, f"with {where} {reason}", hint))
            return None
        steps[key] = low, high
    return replace(rule, steps=StepRanges(axes, steps), after_prefill=during.after_prefill)


def acts_in_prefill(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Return whether a rule acts in step 0, or in a pass without generation, for some loop
    values."""
    during = rule.during
    if during is None or work.experiment.generation is None:
        return True
    values = work.sites.combinations(_step_axes(during, work))
    return any(_step(during.first, at) == 0 for _, at in values)


def _step_axes(during: During, work: ExperimentContext) -> tuple[str, ...]:
    """Return the loops that the steps of a rule depend on."""
    named = [end.name for end in (during.first, during.last) if isinstance(end, ast.Bound)]
    return tuple(name for name in work.loops if name in named)


def _step(end: int | ast.Bound, at: Mapping[str, object]) -> int:
    """Return the step for some loop values; -1 if it isn't a whole number."""
    if isinstance(end, int):
        return end
    value = at[end.name or ""]
    return int(value) + end.offset if is_whole_number(value) else -1


def check_generation(
    rules: Sequence[ResolvedRule | None],
    measures: Sequence[ResolvedMeasure | None],
    keep: Sequence[ResolvedMeasure | None],
    work: ExperimentContext,
) -> Iterator[Diagnostic]:
    """Check the rules, measures and conditions of an experiment that generates replies.

    Yields E0108 for what isn't supported during generation, E0207 for more tokens than the model
    has positions and for steps in which a rule can't act, and E0612 for categories and conditions
    over several replies.
    """
    generation = work.experiment.generation
    if generation is None:
        return
    yield from _check_model(generation, work)
    yield from _check_runs(generation, work)
    for rule in work.experiment.rules:
        if refers_to_answer(rule.at) or refers_to_answer(rule.onto):
            yield _not_supported(
                rule,
                "a rule on tokens of the answer together with `generate`",
                "the model generates its own reply: name `last token`, which is the newest "
                "token at each step, or write an experiment without `generate`",
            )
    for rule in rules:
        if rule is not None:
            yield from _check_rule_steps(rule, generation, work.sites.shape)
    if generation.samples > 1:
        yield from _check_samples(generation.samples, measures, keep)


def _check_samples(
    samples: int,
    measures: Sequence[ResolvedMeasure | None],
    keep: Sequence[ResolvedMeasure | None],
) -> Iterator[Diagnostic]:
    """Check that measures of several replies per row are numbers, which have a mean."""
    for measure in (*measures, *keep):
        if measure is None or measure.reply is None:
            continue
        reason, hint = "", "write one sample, or a share: `exact_match`"
        if measure.kind == "category":
            reason = f"categories of {samples} samples have no mean"
        elif measure in keep:
            reason = f"a row has {samples} samples, of which only some may be kept"
            hint = "write one sample, or exclude rows with a `where` in the prompts block"
        if reason:
            span = measure.expression.span
            yield UnreadableMeasure(span=span, text=span.written, reason=reason, hint=hint)


def _check_model(generation: Generation, work: ExperimentContext) -> Iterator[Diagnostic]:
    """Check that the model generates text and has positions for all its tokens."""
    shape, name = work.model.shape, work.model.name
    if shape.stands_in:
        return
    reason = _explain_no_text(shape)
    if reason is not None:
        yield NotSupported(
            span=generation.span,
            what=f"`generate` with `{name}`, {reason},",
            later="use a model that predicts the next token of a text, such as GPT-2 or Llama",
        )
        return
    most = shape.max_positions
    if most is None or work.model.tokenizer.stands_in or work.table.stands_in:
        return
    longest = max(map(len, _prompts(work.experiment, work.table)), default=0)
    # The last token of a reply is predicted but never fed to the model.
    if longest + generation.tokens - 1 > most:
        fit = most - longest + 1
        yield BadArgument(
            span=generation.span,
            name=f"generate {generation.tokens}",
            reason=f"needs more positions than `{name}` has: the longest prompt has "
            f"{longest:,} tokens, and the model reads {most:,}",
            hint=f"write at most {fit:,} tokens: `generate {fit}`; or shorten the prompts",
        )


def _explain_no_text(shape: ModelShape) -> str | None:
    """Explain why a model generates no text after a prompt; None if it does."""
    if shape.takes in ("image", "audio"):
        return "which takes more than a text"
    if shape.task != "tokens" or "logits" not in shape.sites:
        return "which predicts no tokens"
    if not shape.causal:
        return "in which tokens see later tokens"
    return None


def _prompts(experiment: spec.Experiment, table: PromptTable) -> Iterator[tuple[int, ...]]:
    """Yield the prompts of the runs that generate, as far as a decoder reads them."""
    for name in (experiment.base, experiment.source):
        run = None if name is None else table.runs.get(name)
        yield from (row.ids[row.source :] for row in (() if run is None else run.rows))


def _check_runs(generation: Generation, work: ExperimentContext) -> Iterator[Diagnostic]:
    """Yield errors for runs with rules, which act on the prompts and don't generate."""
    experiment = work.experiment
    for name in dict.fromkeys((experiment.base, experiment.source)):
        run = None if name is None else work.table.runs.get(name)
        if run is not None and run.derived is not None:
            yield NotSupported(
                span=generation.span,
                what=f"`generate` in `{name}`, a run with rules,",
                later="write its rules in the experiment; a rule can read such a run: "
                f"`patch … with {name}`",
            )


def _check_rule_steps(
    rule: ResolvedRule, generation: Generation, shape: ModelShape
) -> Iterator[Diagnostic]:
    """Check that a rule can act in its steps."""
    said, does = rule.spec, rule.does
    if rule.path is not None or rule.circuit is not None:
        what, done = "a `path`", "paths are patched"
        if rule.circuit is not None:
            what, done = "an ablated circuit", "edges are ablated"
        later = f"write an experiment without `generate`: {done} in one pass"
        yield _not_supported(said, f"{what} together with `generate`", later)
        return
    if said.during is not None and does.changes == "input":
        yield _bad_steps(
            said.during,
            "can't follow `replace`, which changes the prompt before the model runs",
            "leave it out",
        )
        return
    if rule.after_prefill:
        yield from _check_cache_edit(rule, generation)
        return
    steps = [] if rule.steps is None else list(rule.steps.values.values())
    problem = _find_block_problem(rule, steps, generation.tokens - 1, shape)
    if problem is not None:
        yield problem
        return
    if any(step != (0, 0) for step in steps) and any(
        key not in rule.positions.newest and any(run for row in cell.hits for run in row)
        for key, cell in rule.positions.written.items()
    ):
        assert said.during is not None
        yield _bad_steps(
            said.during,
            f"has no position to act on: `{said.at.span.written}` is a token of the prompt, "
            "which is processed in the prefill and doesn't change later",
            "name `last token`, the newest token at each step, or write `during prefill`",
        )
        return
    if rule.acts_later:
        yield from _check_after_prefill(rule)


def _find_block_problem(
    rule: ResolvedRule, steps: Sequence[tuple[int, int]], last: int, shape: ModelShape
) -> Diagnostic | None:
    """Return what prevents a replaced block from acting in its steps; None if it can, and for other
    rules.

    Args:
        steps: The first and the last step of each range.
        last: The last step of the generation.
        shape: The shape of the model, some of whose blocks may have no keys of the text.
    """
    said = rule.spec
    if rule.does.changes != "blocks" or rule.steps is None:
        return None
    assert said.during is not None
    if rule.in_vision or rule.acts_in("encoder"):
        reason = "acts on no step: the encoder reads the prompt in the prefill"
        if rule.in_vision:
            reason = "acts on no step: the vision encoder encodes images in the prefill"
        later = any(end > 0 for _, end in steps)
        return _bad_steps(said.during, reason, "leave it out") if later else None
    if said.source_block is not None or all(end >= last for _, end in steps):
        return None
    assert rule.sites is not None
    layers = {point.layer for here in rule.sites.points.values() for point in here}
    keys = any(layer is not None and shape.has("k", layer) for layer in layers)
    if shape.attends_to_image and not keys:
        return None
    return _bad_steps(
        said.during,
        "omits a block that attends again in later steps, without keys for the skipped tokens",
        f"omit it until the last step, `during step {steps[0][0]}..{last}`, or "
        "substitute a different block: `with block layer 1`",
    )


def _check_cache_edit(rule: ResolvedRule, generation: Generation) -> Iterator[Diagnostic]:
    """Check a rule `after prefill`, which edits cached keys or values of the prompt."""
    during, points = rule.spec.during, () if rule.sites is None else rule.sites.points.values()
    assert during is not None
    sites = {point.site for site_points in points for point in site_points}
    if rule.does.changes != "sites" or not sites <= set(CACHED_SITES):
        yield _bad_steps(
            during,
            "applies only to rules on `k` and `v`: only keys and values of the prompt are cached",
            "write `patch k layer 2 at subject token with clean after prefill`; or "
            "`during prefill`, for edits during the pass over the prompt",
        )
    elif rule.does.mode == "step":
        yield _not_supported(rule.spec, "a `step` `after prefill`", "write `during prefill`")
    elif generation.tokens == 1:
        yield _bad_steps(
            during, "has no later step: the prefill predicts the only token",
            "write more tokens: `generate 40`",
        )  # fmt: skip


def _check_after_prefill(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """Yield errors for rules that only have a meaning in the prefill."""
    points = () if rule.sites is None else rule.sites.points.values()
    over_keys = sorted(
        {p.site for site_points in points for p in site_points if SITES[p.site].width == "key"}
        if rule.does.changes == "sites"
        else ()
    )
    what = ""
    if over_keys:
        what = f"a rule on `{over_keys[0]}` at newest tokens, which have more keys than the prompt,"
    elif rule.does.looks_ahead:
        what = "`allow` at newest tokens, which already see all other tokens,"
    elif rule.does.changes == "positions":
        what = "`renumber` at newest tokens"
    if what:
        yield _not_supported(
            rule.spec, what, "add `during prefill`, or name only positions of the prompt"
        )


def _not_supported(rule: spec.Rule, what: str, later: str) -> Diagnostic:
    return NotSupported(span=rule.span, what=what, later=later)


def _bad_steps(during: During, reason: str, hint: str) -> Diagnostic:
    said = " ".join(during.span.written.split())
    return BadArgument(span=during.span, name=said, reason=reason, hint=hint)


RULE_REPLIES = ReplyTokens(
    reason="rules act during generation",
    hint="write `at last token`, which is the newest token, and the steps: `during step 3`",
)


def get_reply_tokens(experiment: spec.Experiment) -> ReplyTokens:
    """Return the tokens that an experiment generates."""
    written = experiment.generation
    if written is None:
        return ReplyTokens(
            reason=NO_REPLY_REASON,
            hint="generate one: `generate 40`; or read the replies of a different experiment: "
            "`prompts "
            f"{experiment.prompts} with replies of NAME`",
        )
    return ReplyTokens(written.tokens)


def reads_reply_tokens(rule: ResolvedRule) -> bool:
    """Return whether a rule observes tokens of the reply, or edges from them."""
    return any(True for _ in iter_reply_positions(rule))


def iter_reply_positions(rule: ResolvedRule) -> Iterator[ReplyPosition]:
    """Yield the positions in the reply that a rule observes."""
    targets = [rule.positions] if rule.edge is None else [rule.positions, rule.edge.keys]
    for target in targets:
        for cell in target.written.values():
            if cell.reply is not None:
                yield cell.reply


def reads_observation(measure: ResolvedMeasure) -> bool:
    """Return whether a measure reads the observation."""
    return measure.observed or any(atom.form.takes == "observation" for atom in measure.atoms)


def reads_any_reply(experiment: ResolvedExperiment) -> bool:
    """Return whether a measure or rule reads tokens after the prompts."""
    measured = any(measure.in_reply is not None for measure in experiment.measures)
    return measured or any(map(reads_reply_tokens, experiment.rules))


def check_reply_readers(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Return E0545 for rules and measures that can't read replies."""
    problems = [problem for rule in experiment.rules for problem in _check_observed_reply(rule)]
    looking = next((rule for rule in experiment.rules if reads_reply_tokens(rule)), None)
    for measure, said in zip(experiment.measures, experiment.spec.measures, strict=True):
        seen = looking is not None and reads_observation(measure)
        if not seen and measure.in_reply is None:
            continue
        if said.effect not in ("raw", "delta"):
            reason = f"`{said.effect}` isn't known there"
            hint = "write `as raw`, or `as delta` for the change caused by the rules"
            problems.append(_not_in_reply(said.span, reason, hint))
        elif said.effect != "raw" and experiment.spec.against is not None:
            reason = "random targets generate separate replies"
            problems.append(
                _not_in_reply(said.span, reason, "write `as raw`, or remove `against …`")
            )
        problems += _check_measured_reply(measure, said, experiment)
    if reads_any_reply(experiment):
        problems += [problem for rule in experiment.rules for problem in _check_repeatable(rule)]
    return problems


def _check_observed_reply(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """Check the observation of a rule on reply tokens."""
    if not reads_reply_tokens(rule):
        return
    if isinstance(rule.does, RowSetObservation):
        reason = f"`{rule.does.name}` is computed from vectors of all rows at prompt tokens"
        yield _not_in_reply(rule.spec.span, reason, "observe single rows: `observe norm …`")
    elif isinstance(rule.does, Observation) and rule.does.lists(rule):
        yield _not_in_reply(
            rule.spec.span, "only tokens of prompts are listed", "leave `top …` out"
        )


def _check_measured_reply(
    measure: ResolvedMeasure, said: spec.Measure, experiment: ResolvedExperiment
) -> Iterator[Diagnostic]:
    """Check a measure that reads reply tokens."""
    span = said.span if said.at is None else said.at.span
    for atom in measure.atoms:
        text, takes = atom.node.span.written, atom.form.takes
        run = None if atom.run is None else experiment.table.runs[atom.run]
        if measure.in_reply is None and not (measure.observed or takes == "observation"):
            reason = f"`{text}` isn't computed from the observation"
            yield _not_in_reply(span, reason, "measure it in a separate line")
        elif measure.in_reply is None and run is not None:
            yield _not_in_reply(span, f"`{text}` compares tokens of prompts", "leave it out")
        elif takes == "activations":
            reason = f"`{text}` compares tokens of prompts"
            yield _not_in_reply(span, reason, "measure logits there, or observe the site")
        elif any(atom.appended):
            reason = f"`{text}` reads a separate text of several tokens"
            yield _not_in_reply(span, reason, "name a text of one token")
        elif takes in ("prompt", "reply"):
            yield _not_in_reply(span, f"`{text}` doesn't read a single token", "leave `at …` out")
        elif run is not None and run.derived is not None:
            reason = f"`{run.name}` has rules, which don't act on tokens of a reply"
            yield _not_in_reply(span, reason, "compare with a run without rules")


def _check_repeatable(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """Check that a single pass over prompt and reply can reproduce the effect of a rule."""
    if rule.after_prefill:
        reason = "the prompt used its keys and values without the edit, the reply uses them with it"
    elif (
        rule.does.changes == "blocks"
        and rule.steps is not None
        and not (rule.in_vision or rule.acts_in("encoder"))
    ):
        reason = "blocks are replaced for some of the tokens"
    else:
        return
    yield _not_in_reply(
        rule.spec.span, reason, "measure the generated text, or the final prompt token"
    )


def _not_in_reply(span: Span, reason: str, hint: str) -> Diagnostic:
    return NotInReply(span=span, position=span.written, reason=reason, hint=hint)


def build_baseline(experiment: ResolvedExperiment) -> BaselineExperiment | None:
    """Create the baseline for effects of measures that are observed, or read in replies.

    None if there are no such measures.
    """
    definition = experiment.spec
    if reads_any_reply(experiment):
        return _baseline_after_replies(experiment)
    pairs = enumerate(zip(experiment.measures, definition.measures, strict=True))
    numbers = tuple(
        n for n, (measure, said) in pairs if reads_observation(measure) and said.effect != RAW.name
    )
    if not numbers:
        return None
    rules = (rule for rule in experiment.rules if isinstance(rule.does, Observation))
    changed = _read_only(experiment)
    changed = replace(changed, spec=changed.spec.model_copy(update={"generation": None}))
    return BaselineExperiment(replace(changed, rules=tuple(rules)), numbers)


def build_circuit_baselines(
    experiment: ResolvedExperiment,
) -> dict[CircuitBaseline, BaselineExperiment]:
    """Create the baselines of effects of an ablated circuit, by what they ablate."""
    effects = [
        EFFECTS.get(measure.effect) for measure in experiment.spec.measures
    ]  # None: misspelt
    baselines: dict[CircuitBaseline, BaselineExperiment] = {}
    for which in CIRCUIT_BASELINES:
        numbers = tuple(
            n for n, effect in enumerate(effects) if effect and which in effect.circuit_baselines
        )
        if not numbers:
            continue
        rules = experiment.everything or [
            rule if rule.circuit is None else keep_baseline(rule, which)
            for rule in experiment.rules
        ]
        used = {name for rule in rules for name in rule.axes}
        used |= set(() if experiment.nested is None else experiment.nested.axes)
        axes = tuple(axis for axis in experiment.axes if axis.name in used)
        name = f"{experiment.spec.name} with {which}"
        changed = replace(_read_only(experiment, name), rules=tuple(rules), axes=axes)
        exact = changed.spec.model_copy(update={"estimator": None})
        changed = replace(changed, spec=exact)
        baselines[which] = BaselineExperiment(changed, numbers)
    return baselines


def _baseline_after_replies(experiment: ResolvedExperiment) -> BaselineExperiment | None:
    """Create a baseline that reads the replies generated under the rules, without these rules."""
    looking = any(map(reads_reply_tokens, experiment.rules))
    numbers = tuple(
        n
        for n, measure in enumerate(experiment.measures)
        if measure.in_reply is not None or (looking and reads_observation(measure))
    )
    if all(isinstance(rule.does, Observation) for rule in experiment.rules) or not numbers:
        return None
    return BaselineExperiment(replace(_read_only(experiment), as_base=True), numbers)


def _read_only(experiment: ResolvedExperiment, name: str = "") -> ResolvedExperiment:
    """Create a variant of the experiment that is only compared with another and never displayed.

    Args:
        name: Its name; empty for one without rules.
    """
    definition = experiment.spec
    measures = tuple(_as_raw(definition.measures))
    changed = definition.model_copy(
        update={
            "name": name or f"{definition.name} without rules",
            "source": None,
            "measures": measures,
            "against": None,
            "reports": (spec.Report(span=definition.span, kind="table"),),
            "expects": (),
        }
    )
    return replace(experiment, spec=changed, accuracies={}, saves=(), control_of=experiment.key)


def _as_raw(measures: Iterable[spec.Measure]) -> Iterable[spec.Measure]:
    return (measure.model_copy(update={"effect": RAW.name, "over": None}) for measure in measures)


_NO_REPLY_ROWS = ReplyTokens(
    reason="`save top … rows of` reads only prompts", hint="name positions in the prompt"
)

_PROMPT_ONLY = "`save` reads only the prompt"

_WRITES_PROMPT = "an objective writes only tokens of the prompt"


def resolve_saves(work: ExperimentContext, context: MeasureContext) -> tuple[ResolvedSave, ...]:
    """Resolve the `save` lines of an experiment, without those that have errors.

    Args:
        context: For the metrics whose gradients are saved.

    Codes: E0333 and those of sites, positions and measures.
    """
    saves = (_save(save, work, context) for save in work.experiment.saves)
    return tuple(save for save in saves if save is not None)


def _save(save: spec.Save, work: ExperimentContext, context: MeasureContext) -> ResolvedSave | None:
    run = save.run or work.experiment.base
    basis: BasisTargets | None = None
    points: tuple[SitePoint, ...] | None = None
    if save.rows is not None:
        saved_features = resolve_saved_features(save.site, work)
        if saved_features is not None:
            points, basis = (saved_features[0],), saved_features[1]
    else:
        targets, _ = resolve_site(save.site, work.sites)
        if targets is not None:
            every = (point for here in targets.points.values() for point in here)
            points = tuple(dict.fromkeys(every))
            if not points:
                work.diagnostics.append(
                    report_empty_selection(save.site.span, "save", "it selects no site")
                )
                return None
    cells, problems = resolve_positions(
        save.at,
        work.table,
        run,
        tokenizer=work.model.tokenizer,
        loop_values=work.program.numbers,
        with_runs=(),
        ranked=work.ranked,
        answers=AnswerTokens(reason=_PROMPT_ONLY if save.file else _WRITES_PROMPT),
        replies=_replies(run, work) if save.rows is None else _NO_REPLY_ROWS,
        side=find_side(points or (), work.model.shape),
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    gradient = None if save.gradient is None else _metric(save.gradient, run, context)
    if points is None or has_errors(problems) or (save.gradient is not None and gradient is None):
        return None
    if basis is not None:
        _without_noise(save, run, work)
    elif gradient is None:
        _one_width(save, run, points, work)
    resolved = ResolvedSave(save, run, points, tuple(cells), basis, gradient)
    if resolved.in_reply and any(SITES[point.site].width == "key" for point in points):
        reason = "vectors over the keys of texts of different lengths have different widths"
        problem = NotInReply(
            span=save.at.span, position=save.at.span.written, reason=reason, hint="save `z`"
        )
        work.diagnostics.append(problem)
    return resolved


def _metric(said: spec.Measure, run: str, context: MeasureContext) -> ResolvedMeasure | None:
    """Resolve the metric whose gradients are saved; E0207 if it is read at several positions."""
    measure_positions = resolve_measure_positions(
        said.metric, context, label=said.label, at=said.at, runs=(run,)
    )
    if measure_positions is None:
        return None
    if said.at is not None and any(labels for labels, _ in measure_positions):
        name, reason = (
            said.at.span.written,
            "names several positions, but a saved gradient has one metric",
        )
        hint = "name one: `item 1 token`, `last-item token`"
        context.diagnostics.append(
            BadArgument(span=said.at.span, name=name, reason=reason, hint=hint)
        )
        return None
    return measure_positions[0][1]


def _without_noise(save: spec.Save, run: str, work: ExperimentContext) -> None:
    """Report E0207 for rows of a run with noise, whose features differ between draws."""
    prompt_run = work.table.runs.get(run)
    if prompt_run is not None and prompt_run.noise is not None:
        reason = "has vectors that differ between draws of noise"
        hint = "save the rows of a run without noise"
        work.diagnostics.append(BadArgument(span=save.span, name=run, reason=reason, hint=hint))


def _replies(run: str, work: ExperimentContext) -> ReplyTokens:
    """Return the reply tokens of a run; runs with rules have none."""
    written, prompt_run = get_reply_tokens(work.experiment), work.table.runs.get(run)
    if work.experiment.generation is None or prompt_run is None:
        return written
    if prompt_run.derived is not None:
        reason = f"`{run}` has rules, which don't act during generation"
        return ReplyTokens(reason=reason, hint="save a run without rules")
    return written


def _one_width(
    save: spec.Save, run: str, points: tuple[SitePoint, ...], work: ExperimentContext
) -> None:
    """Report E0333 for vectors over the keys of prompts with different lengths, or E0108 for those
    over patches."""
    over_keys = sorted({p.site for p in points if SITES[p.site].width == "key"})
    if over_keys and SITES[over_keys[0]].stack == "vision":
        what, hint = (
            f"`save {over_keys[0]}`",
            "save `z vision`, or write `observe attention vision`",
        )
        work.diagnostics.append(NotSupported(span=save.span, what=what, later=hint))
        return
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
                hint="save `z`, or use prompts of equal length",
            )
        )


def name_tensor(point: SitePoint) -> str:
    """Return the name of a point's tensor: `resid_post.layer3`, `z.layer3.head2`."""
    unit = (SITES[point.site].unit or "").removeprefix("kv_")
    words = [point.site.replace(" ", ".")]
    words += [] if point.layer is None else [f"layer{point.layer}"]
    words += [] if point.unit is None else [f"{unit}{point.unit}"]
    return ".".join(words)


# --- saved directions -----------------------------------------------------------------------------


_RESIDUAL = "resid_post"


def resolve_direction_files(work: ExperimentContext) -> tuple[ResolvedDirectionFile, ...]:
    """Resolve the `save direction` lines of an experiment, without those that have errors.

    Codes: E0341 and E0620.
    """
    direction_files: list[ResolvedDirectionFile] = []
    for save in work.experiment.saved_directions:
        try:
            family = resolve_family(save.direction, work)
            if family is not None:
                direction_files.append(_lay_out(save, family, work))
        except DirectionError as problem:
            report_direction(problem, work)
    return tuple(direction_files)


def _lay_out(
    save: spec.SavedDirection, family: DirectionFamily, work: ExperimentContext
) -> ResolvedDirectionFile:
    """Name the tensors of a file. Raises DirectionError."""
    if PurePath(save.file).suffix.lower() != CONTROL_VECTOR_SUFFIX:
        named = {
            name_tensor_of_member(save.name, family.axes, key): member
            for key, member in family.members.items()
        }
        return ResolvedDirectionFile(save, named, family.width or work.model.shape.d_model)
    width = work.model.shape.d_model
    use = find_use(family)
    if use is not None:
        raise DirectionError(
            save.direction,
            f"it {use.what}, and llama.cpp adds control vectors",
            f'save it as safetensors: `save direction {save.name} to "{save.name}.safetensors"`',
        )
    if family.width not in (None, width) and not work.model.shape.stands_in:
        raise DirectionError(
            save.direction,
            f"it has {family.width} numbers, but the residual stream has {width}",
            "a control vector is added to the residual stream: compute the direction at "
            f"`{_RESIDUAL}`",
        )
    _check_axes(save, family)
    _check_read_site(save, work)
    layers = {_layer(save, family, key, member): member for key, member in family.members.items()}
    waiting = bool(work.sites.onward.stand_ins)  # the first member may stand for a selected one
    if not any(layers) and not waiting:
        raise DirectionError(
            save.direction,
            "its only layer is 0, where llama.cpp can't add a control vector",
            "compute it at a later layer",
        )
    there = {
        layer: direction_member for layer, direction_member in layers.items() if layer > 0
    } or layers
    named = {f"direction.{layer}": direction_member for layer, direction_member in there.items()}
    left_out = len(there) < len(layers)
    return ResolvedDirectionFile(save, named, width, control_vector=True, without_first=left_out)


def _check_axes(save: spec.SavedDirection, family: DirectionFamily) -> None:
    """Check that a control vector has one vector per layer. Raises DirectionError."""
    other = next((axis for axis in family.axes if axis.name != "layer"), None)
    if other is not None:
        at = name_coordinate(other, other.labels[0])
        selects = re.fullmatch(r"\w+ -?\d+", at) is not None
        raise DirectionError(
            save.direction,
            f"a control vector has one vector per layer, but `{family.name}` sweeps `{other.name}`",
            f"select one: `save direction {family.name}[{at}] to …`"
            if selects
            else f"compute it at one {other.name}",
        )


def _layer(
    save: spec.SavedDirection, family: DirectionFamily, key: AxisIndices, member: DirectionMember
) -> int:
    """Return the block after which a member of a control vector is added.

    Raises:
        DirectionError: If it isn't a direction of the residual stream after one block.
    """
    points = {*iter_read_points(member.vector)}
    for point in points:
        _check_control_vector_site(save, point.site)
    if family.axes:
        label = family.axes[0].labels[key[0]]
        if isinstance(label, int):
            return label
    layers = {point.layer for point in points if point.layer is not None}
    if len(layers) != 1:
        reason = "it has no layer" if not layers else "it is computed from several layers"
        raise DirectionError(
            save.direction,
            f"{reason}, but a control vector is added after one block",
            f"compute it at one layer of `{_RESIDUAL}`, or at each: `at {_RESIDUAL} layer *`",
        )
    return layers.pop()


def _check_read_site(save: spec.SavedDirection, work: ExperimentContext) -> None:
    """Check the site of a direction that is read from a file. Raises DirectionError."""
    definition = work.program.directions.get(save.name)
    names = () if definition is None or definition.site is None else definition.site.names
    for name in names[:1]:
        _check_control_vector_site(save, name.id)


def _check_control_vector_site(save: spec.SavedDirection, site: str) -> None:
    if site != _RESIDUAL:
        raise DirectionError(
            save.direction,
            f"its site is `{site}`, but llama.cpp adds control vectors to `{_RESIDUAL}`",
            f"compute it at `{_RESIDUAL}`",
        )
