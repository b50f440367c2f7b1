"""What an experiment that writes replies asks of its model, runs and rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e06_experiment import UnreadableMeasure
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.lower_generation import wrong_steps
from mechdsl.program.spec_replies import During, Generation
from mechdsl.prompts.answer_tokens import names_answer
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved import ResolvedMeasure
from mechdsl.resolve.resolved_rule import Key, ResolvedRule, Steps
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

KEPT = ("k", "v")
"""Sites whose vectors are kept of every token, for later ones to attend to."""


def in_steps(rule: ResolvedRule, work: Work) -> ResolvedRule | None:
    """The rule with the steps in which it acts; None after E0207 for steps that there are not."""
    during, generation = rule.spec.during, work.experiment.generation
    if during is None or generation is None:
        return rule
    named = [end.name for end in (during.first, during.last) if isinstance(end, ast.Bound)]
    axes = tuple(name for name in work.loops if name in named)
    found: dict[Key, tuple[int, int]] = {}
    for key, at in work.sites.combinations(axes):
        low, high = _step(during.first, at), _step(during.last, at)
        problem = wrong_steps(low, high, generation.tokens)
        if problem is not None:
            where = " and ".join(f"`{name}` = {value}" for name, value in at.items())
            reason, hint = problem
            work.diagnostics.append(_bad(during, f"with {where} {reason}", hint))
            return None
        found[key] = low, high
    return replace(rule, steps=Steps(axes, found), after_prefill=during.after_prefill)


def _step(end: int | ast.Bound, at: Mapping[str, object]) -> int:
    """A step, where the loops are so far; -1 where that is no whole number."""
    if isinstance(end, int):
        return end
    value = at[end.name or ""]
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return int(value) + end.offset if isinstance(value, int | float) and whole else -1


def of_generation(
    rules: Sequence[ResolvedRule | None],
    measures: Sequence[ResolvedMeasure | None],
    keep: Sequence[ResolvedMeasure | None],
    work: Work,
) -> Iterator[Diagnostic]:
    """E0108 for what can't be done while a reply is written, E0207 for more tokens than the model
    has positions for, and for steps in which a rule can't act; E0612 for categories and conditions
    of several replies."""
    generation = work.experiment.generation
    if generation is None:
        return
    yield from _of_model(generation, work)
    yield from _of_runs(generation, work)
    for rule in work.experiment.rules:
        if names_answer(rule.at) or names_answer(rule.onto):
            yield _not_yet(
                rule,
                "a rule on tokens of the answer beside `generate`",
                "the model writes its own reply: name `last token`, which is the newest one at "
                "each step, or write an experiment without `generate`",
            )
    for rule in rules:
        if rule is not None:
            yield from _of_rule(rule, generation)
    if generation.samples > 1:
        yield from _of_samples(generation.samples, measures, keep)


def _of_samples(
    samples: int,
    measures: Sequence[ResolvedMeasure | None],
    keep: Sequence[ResolvedMeasure | None],
) -> Iterator[Diagnostic]:
    """A row has several replies: what is no number has no mean over them."""
    for measure in (*measures, *keep):
        if measure is None or measure.reply is None:
            continue
        reason, hint = "", "write one sample, or a share: `exact_match`"
        if measure.kind == "category":
            reason = f"categories of {samples} samples have no mean"
        elif measure in keep:
            reason = f"a row has {samples} samples, of which some may be kept and some not"
            hint = "write one sample, or leave rows out by a `where` in the prompts block"
        if reason:
            span = measure.expression.span
            yield UnreadableMeasure(span=span, text=span.written, reason=reason, hint=hint)


def _of_model(generation: Generation, work: Work) -> Iterator[Diagnostic]:
    """Whether it writes, and has positions for all that it may write."""
    shape, name = work.model.shape, work.model.name
    if shape.stands_in:
        return
    reason = _why_not(shape)
    if reason is not None:
        yield NotSupported(
            span=generation.span,
            what=f"`generate` with `{name}`, {reason},",
            later="take a model that predicts the next token of a text, such as GPT-2 or Llama",
        )
        return
    most = shape.max_positions
    if most is None or work.model.tokenizer.stands_in or work.table.stands_in:
        return
    longest = max(map(len, _prompts(work.experiment, work.table)), default=0)
    # The last token of a reply is predicted, and goes in nowhere.
    if longest + generation.tokens - 1 > most:
        fit = most - longest + 1
        yield BadArgument(
            span=generation.span,
            name=f"generate {generation.tokens}",
            reason=f"needs more positions than `{name}` has: the longest prompt has "
            f"{longest:,} tokens, and the model reads {most:,}",
            hint=f"write at most {fit:,} tokens: `generate {fit}`; or shorten the prompts",
        )


def _why_not(shape: ModelShape) -> str | None:
    """Why a model writes no text behind a prompt."""
    if shape.takes != "text":
        return "which takes more than a text"
    if shape.task != "tokens" or "logits" not in shape.sites:
        return "which predicts no tokens"
    if not shape.causal:
        return "in which tokens see later ones"
    return None


def _prompts(experiment: spec.Experiment, table: PromptTable) -> Iterator[tuple[int, ...]]:
    """Those of the runs that write."""
    for name in (experiment.base, experiment.source):
        run = None if name is None else table.runs.get(name)
        yield from (row.ids for row in (() if run is None else run.rows))


def _of_runs(generation: Generation, work: Work) -> Iterator[Diagnostic]:
    """Runs with rules are of the prompts, and don't write."""
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


def _of_rule(rule: ResolvedRule, generation: Generation) -> Iterator[Diagnostic]:
    """Whether it can act in its steps."""
    said, does = rule.spec, rule.does
    if rule.path is not None:
        yield _not_yet(
            said,
            "a `path` beside `generate`",
            "write an experiment without `generate`: paths are patched in one pass",
        )
        return
    if said.during is not None and does.changes == "input":
        yield _bad(
            said.during,
            "can't stand behind `replace`, which changes the prompt before anything is run",
            "leave it out",
        )
        return
    if rule.after_prefill:
        yield from _kept(rule, generation)
        return
    steps = [] if rule.steps is None else list(rule.steps.values.values())
    if any(each != (0, 0) for each in steps) and len(rule.positions.newest) < len(
        rule.positions.written
    ):
        assert said.during is not None
        yield _bad(
            said.during,
            f"has no place to act: `{said.at.span.written}` is a token of the prompt, which goes "
            "in with the prefill, and stays as it is then",
            "name `last token`, the newest one at each step, or write `during prefill`",
        )
        return
    if does.changes == "blocks" and rule.steps is not None and rule.steps.axes:
        yield _not_yet(
            said, "a sweep over steps of `replace block`", "name the steps: `during step 2..5`"
        )
        return
    last = generation.tokens - 1
    if (
        does.changes == "blocks"
        and said.source_block is None
        and any(own < last for _, own in steps)
    ):
        assert said.during is not None
        yield _bad(
            said.during,
            "leaves out a block that attends again later, to tokens that it has no keys of",
            f"leave it out up to the last step, `during step {steps[0][0]}..{last}`, or put "
            "another block in its place: `with block layer 1`",
        )
        return
    if rule.acts_later:
        yield from _behind_the_prefill(rule)


def _kept(rule: ResolvedRule, generation: Generation) -> Iterator[Diagnostic]:
    """`after prefill`: keys and values that are kept of the prompt."""
    during, points = rule.spec.during, () if rule.sites is None else rule.sites.points.values()
    assert during is not None
    sites = {point.site for each in points for point in each}
    if rule.does.changes != "sites" or not sites <= set(KEPT):
        yield _bad(
            during,
            "is for rules on `k` and `v`: keys and values are all that is kept of the prompt",
            "write `patch k layer 2 at subject token with clean after prefill`; or "
            "`during prefill`, for what acts while the prompt is read",
        )
    elif rule.does.mode == "step":
        yield _not_yet(rule.spec, "a `step` `after prefill`", "write `during prefill`")
    elif generation.tokens == 1:
        yield _bad(
            during, "has nothing behind it: the only token is predicted by the prefill",
            "write more tokens: `generate 40`",
        )  # fmt: skip


def _behind_the_prefill(rule: ResolvedRule) -> Iterator[Diagnostic]:
    """What only has a meaning while the prompt is read."""
    points = () if rule.sites is None else rule.sites.points.values()
    over_keys = sorted(
        {p.site for each in points for p in each if SITES[p.site].width == "key"}
        if rule.does.changes == "sites"
        else ()
    )
    what = ""
    if over_keys:
        what = f"a rule on `{over_keys[0]}` at newest tokens, which have more keys than the prompt,"
    elif rule.does.looks_ahead:
        what = "`allow` at newest tokens, which see all others as it is,"
    elif rule.does.changes == "positions":
        what = "`renumber` at newest tokens"
    if what:
        yield _not_yet(
            rule.spec, what, "add `during prefill`, or name positions of the prompt alone"
        )


def _not_yet(rule: spec.Rule, what: str, later: str) -> Diagnostic:
    return NotSupported(span=rule.span, what=what, later=later)


def _bad(during: During, reason: str, hint: str) -> Diagnostic:
    said = " ".join(during.span.written.split())
    return BadArgument(span=during.span, name=said, reason=reason, hint=hint)
