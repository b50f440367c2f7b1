"""`replace POSITIONS with "text"`: another prompt goes in."""

from __future__ import annotations

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import Run
from mechdsl.prompts.replaced_text import marks_turns, replace_tokens
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Intervention, Key, PositionTargets, ResolvedRule
from mechdsl.resolve.targets import rule_targets
from mechdsl.rules.kind import RuleKind, rule_kind
from mechdsl.syntax import ast


@rule_kind("replace")
class ReplaceRule(RuleKind, Intervention):
    """The base run starts from other text at these positions."""

    once = True
    """A second one would change the text that the first one points into."""
    within_prompt = "`replace` puts text into the prompt"
    name = "text"
    changes = "input"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        base = work.experiment.base
        positions = rule_targets(rule, base, work)
        if positions is None:
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=base,
            sites=None,
            positions=positions,
            inputs=_inputs(rule, positions, work),
        )


def _inputs(rule: spec.Rule, positions: PositionTargets, work: Work) -> dict[Key, Run]:
    """The prompts with the text put in; other positions must not move."""
    assert isinstance(rule.fill, ast.String)
    base, new, tokenizer = work.experiment.base, rule.fill.value, work.model.tokenizer
    if work.table.runs[base].chat:
        marker = marks_turns(new, rule.fill.span, tokenizer)
        work.diagnostics.extend([] if marker is None else [marker])
    found = {
        key: replace_tokens(work.table, base, rule.at, cell, new, tokenizer)
        for key, cell in positions.written.items()
    }
    others = len(work.experiment.rules) > 1 or any(m.at for m in work.experiment.measures)
    others = others and not work.model.tokenizer.stands_in
    rows = work.table.runs[base].rows
    moved = others and any(
        len(new.ids) != len(old.ids)
        for run in found.values()
        for new, old in zip(run.rows, rows, strict=True)
    )
    if moved or work.table.runs[base].noise is not None:
        what = "a replacement of another number of tokens beside other positions"
        later = (
            "write it as a run: `corrupt NAME { replace … with … }`, then `from clean into NAME`"
        )
        work.diagnostics.append(
            NotSupported(span=rule.span, what=what, later=later)
            if moved
            else NotSupported(span=rule.span, what="`replace` on a noised run")
        )
    return found
