"""The texts that measures have behind the prompts: whose tokens rules can act on, and which rules
leave them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mechdsl.prompts.answer_tokens import ANSWER, NO_ANSWERS, AnswerTokens, names_answer
from mechdsl.prompts.prompt_table import PositionCell, RunRow
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.measure_context import MeasureContext
from mechdsl.resolve.measures import resolve_measure
from mechdsl.resolve.resolved import Atom, ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.syntax import ast


def measured_answers(work: Work) -> AnswerTokens:
    """The texts behind the prompts of an experiment, as far as its rules name any.

    What is wrong with its measures is said elsewhere.
    """
    positions = (each for rule in work.experiment.rules for each in (rule.at, rule.onto))
    if not any(map(names_answer, positions)):
        return NO_ANSWERS
    shape, name = work.model.shape, work.model.name
    if shape.task != "tokens":
        outputs = "numbers" if shape.task == "number" else "labels"
        return AnswerTokens(reason=f"`{name}` gives {outputs}, and no text is read behind a prompt")
    if not shape.causal:
        return AnswerTokens(reason=f"`{name}` predicts no text behind its prompts")
    before = len(work.diagnostics)
    context = MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        (1,),
        work.diagnostics,
        metrics=work.program.metrics,
        reply=work.reply,
    )
    measures = [
        (m.at is not None, resolve_measure(m.metric, context, label=m.label, at=m.at))
        for m in work.experiment.measures
        if not m.observed  # an observation looks at the prompt alone
    ]
    del work.diagnostics[before:]
    of_texts = [
        (elsewhere, atom)
        for elsewhere, measure in measures
        for atom in (() if measure is None else measure.atoms)
        if atom.texts and not atom.of_class
    ]
    found = [atom for elsewhere, atom in of_texts if not elsewhere]
    behind = (
        [atom for atom in found if any(atom.behind)]
        or [atom for atom in found if atom.form.takes == "continuation"]
        or found
    )
    if not behind and any(measure is None for _, measure in measures):  # nobody knows
        return AnswerTokens(((ANSWER, (1,) * len(work.table)),))
    if not behind and of_texts:
        return AnswerTokens(
            reason="measures with `at` read tokens of the prompt",
            hint="measure a text without `at`, or name a position of the prompt",
        )
    return AnswerTokens(
        tuple((_written(atom), atom.lengths) for atom in behind),
        reason="no measure of this experiment reads a text behind the prompt",
        hint="measure one, such as `logprob(answer)`, or name a position of the prompt",
    )


def _written(atom: Atom) -> str:
    """The text, as the metric names it."""
    given = atom.node.arguments if isinstance(atom.node, ast.Call) else ()
    return given[0].span.written if given else atom.form.default or ANSWER


@dataclass(frozen=True)
class LeftOut:
    """A rule on the whole prompt that leaves the tokens behind it out."""

    rule: ResolvedRule
    measure: str
    tokens: int
    """Of the longest text."""

    @property
    def at(self) -> ast.Positions:
        """Where it acts."""
        return _acts_at(self.rule)

    @property
    def instead(self) -> str:
        """The rule's position with these tokens; both where it reads at another."""
        here = _with_answer(self.at)
        return (
            here
            if self.at is self.rule.spec.at
            else f"{_with_answer(self.rule.spec.at)} onto {here}"
        )


def _acts_at(rule: ResolvedRule) -> ast.Positions:
    """The queries of an attention rule; else where it writes."""
    onto = rule.spec.onto if rule.edge is None else None
    return rule.spec.at if onto is None else onto


def _with_answer(at: ast.Positions) -> str:
    """A position with the tokens behind the prompt."""
    text = at.span.written
    (item,) = at.items
    base = item.body.base if isinstance(item.body, ast.Point) else None
    if isinstance(base, ast.TokenIndex) and base.low is None:
        return f"{text} and answer"
    return f"{{{text.removeprefix('{').removesuffix('}')}, answer tokens}}"


def answers_left_out(experiment: ResolvedExperiment) -> Iterator[LeftOut]:
    """Rules on all of the prompt beside measures that read several tokens behind it."""
    reading = [
        (max(atom.lengths), measure.text)
        for measure in experiment.measures
        for atom in measure.atoms
        if any(atom.behind)
    ]
    tokens, text = max(reading, key=lambda each: each[0], default=(0, ""))
    if not tokens:
        return
    rows = experiment.table.runs[experiment.spec.base].rows
    for rule in experiment.rules:
        at, here = rule.spec.at, _acts_at(rule)
        changes = rule.does.changes in ("sites", "edges") and rule.spec.verb != "swap"  # two parts
        if not changes or names_answer(at) or len(at.items) != 1 or len(here.items) != 1:
            continue
        if any(_spans_all(cell, rows) for cell in rule.positions.written.values()):
            yield LeftOut(rule, text, tokens)


def _spans_all(cell: PositionCell, rows: tuple[RunRow, ...]) -> bool:
    """Whether it is all of the prompt's own text in each row, and none of what is behind it."""
    for row, hits in zip(rows, cell.hits, strict=True):
        hit = {token for tokens in hits for token in tokens}
        own = {token for token, special in enumerate(row.special) if not special}
        if len(own) < 2 or len(hits) != 1 or not own <= hit <= set(range(len(row.ids))):
            return False
    return bool(rows)
