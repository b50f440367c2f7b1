"""The texts that measures have behind the prompts: whose tokens rules can act on, and which rules
leave them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mechdsl.prompts.answer_tokens import ANSWER, NO_ANSWERS, AnswerTokens, names_answer
from mechdsl.prompts.prompt_table import PositionCell, RunRow
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.measures import resolve_measure
from mechdsl.resolve.metric_atoms import MeasureContext
from mechdsl.resolve.resolved import Atom, ResolvedExperiment, ResolvedRule
from mechdsl.syntax import ast


def measured_answers(work: Work) -> AnswerTokens:
    """The texts behind the prompts of an experiment, as far as its rules name any.

    What is wrong with its measures is said elsewhere.
    """
    positions = (each for rule in work.experiment.rules for each in (rule.at, rule.onto))
    if not any(map(names_answer, positions)):
        return NO_ANSWERS
    before = len(work.diagnostics)
    context = MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        (1,),
        work.diagnostics,
        observes=True,
        metrics=work.program.metrics,
    )
    measures = [
        resolve_measure(m.metric, context, label=m.label, at=m.at) for m in work.experiment.measures
    ]
    del work.diagnostics[before:]
    found = [atom for measure in measures if measure is not None for atom in measure.atoms]
    behind = (
        [atom for atom in found if longest(atom) > 1]
        or [atom for atom in found if atom.form.takes == "continuation"]
        or [atom for atom in found if atom.form.takes == "target"]
    )
    if not behind and None in measures:  # nobody knows
        return AnswerTokens(((ANSWER, (1,) * len(work.table)),))
    return AnswerTokens(
        tuple((_written(atom), _lengths(atom)) for atom in behind),
        reason="no measure of this experiment reads a text behind the prompt",
        hint="measure one, such as `logprob(answer)`, or name a position of the prompt",
    )


def longest(atom: Atom) -> int:
    """Tokens of the longest text that has a pass of its own, behind the prompt; 0 without one."""
    if atom.form.takes != "continuation":
        return 0
    return max((len(ids) for rows in atom.texts.values() for ids in rows), default=0)


def _lengths(atom: Atom) -> tuple[int, ...]:
    return tuple(len(ids) for ids in next(iter(atom.texts.values())))


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
    def instead(self) -> str:
        """The rule's position with these tokens."""
        at = self.rule.spec.at
        text = at.span.written
        (item,) = at.items
        base = item.body.base if isinstance(item.body, ast.Point) else None
        if isinstance(base, ast.TokenIndex) and base.low is None:
            return f"{text} and answer"
        return f"{{{text.removeprefix('{').removesuffix('}')}, answer tokens}}"


def answers_left_out(experiment: ResolvedExperiment) -> Iterator[LeftOut]:
    """Rules on all of the prompt beside measures that read several tokens behind it."""
    reading = [
        (longest(atom), measure.text) for measure in experiment.measures for atom in measure.atoms
    ]
    tokens, text = max(reading, key=lambda each: each[0], default=(0, ""))
    if tokens < 2:
        return
    rows = experiment.table.runs[experiment.spec.base].rows
    for rule in experiment.rules:
        changes = rule.does.changes in ("sites", "edges")
        if not changes or len(rule.spec.at.items) != 1 or (rule.spec.onto and rule.edge is None):
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
