"""What is known of an experiment while it is being resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e03_coordinates import AxesCollide
from mechdsl.program import spec
from mechdsl.prompts.answer_tokens import NO_ANSWERS, AnswerTokens
from mechdsl.prompts.prompt_table import Hits, PromptTable
from mechdsl.prompts.reply_positions import NO_REPLIES, ReplyTokens
from mechdsl.resolve.coordinates import SiteContext
from mechdsl.resolve.resolved import Axis, Label, ModelContext
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.resolve.families import Family


@dataclass
class Work:
    """One experiment, with the axes and diagnostics that have been found so far."""

    experiment: spec.Experiment
    program: spec.Program
    model: ModelContext
    table: PromptTable
    sites: SiteContext
    axes: dict[str, Axis] = field(default_factory=dict)
    families: dict[str, Family | None] = field(default_factory=dict)
    """Directions by their names; None for one that can't be had."""
    family_axes: dict[str, tuple[Label, ...]] = field(default_factory=dict)
    """Axes of the experiment that are those of a family of directions."""
    answers: AnswerTokens = NO_ANSWERS
    """The texts behind the prompts; none for a kind of rule that can't act on them."""

    replies: ReplyTokens = NO_REPLIES
    """Those that are written behind the prompts; none for a rule that isn't given them."""

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.sites.diagnostics

    @property
    def loops(self) -> Mapping[str, tuple[Label, ...]]:
        return self.sites.loops

    @property
    def reply(self) -> tuple[object, ...] | None:
        """How replies are written; None where none are."""
        said = self.experiment.generation
        return None if said is None else said.key(self.program.seed)

    def ranked(
        self,
        base: ast.RankedTokens,
        run: str,
        values: Mapping[str, Any],
        diagnostics: list[Diagnostic],
    ) -> list[tuple[str, list[Hits]]]:
        """The tokens that another experiment ranked, in one run of this one's rows."""
        return self.sites.onward.pick_tokens(
            base, run, values, self.table, self.model.tokenizer, diagnostics
        )

    def add_axis(self, axis: Axis) -> None:
        """Enter a sweep; E0320 where another one has its name."""
        first = self.axes.get(axis.name)
        if first is not None:
            word, letter = axis.name, axis.name[0]
            shared, plural = f"for {letter} in … {{ … {word} {letter} … }}", f"{word}s"
            if word == "fill":
                shared, plural = "ablate {A, B} … with zero, mean", "with zero"
            if word == "position":
                shared, plural = "for t in 3..5 { … at token t … }", "{A, B}"
            self.diagnostics.append(
                AxesCollide(
                    span=axis.span, axis=word, shared=shared, plural=plural, first=first.span.line
                )
            )
            return
        self.axes[axis.name] = axis

    def draws_agree(self) -> None:
        """E0108 unless runs with noise have equally many draws, so that draw k goes with draw k."""
        experiment = self.experiment
        names = [experiment.base, experiment.source, *(rule.source for rule in experiment.rules)]
        samples = {self.table.runs[name].draws for name in names if name is not None} - {1}
        if len(samples) > 1:
            what = "runs with different numbers of noise draws"
            self.diagnostics.append(NotSupported(span=experiment.span, what=what))
