"""`replace POSITIONS with "text"`: another prompt goes in; of images, patches `with gray`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from mechdsl.base.digest import number_of
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.images.picture import GRAY, PictureChange
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.prompts.changed_patches import with_patches
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import Run, RunRow
from mechdsl.prompts.replaced_text import marks_turns, replace_tokens
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Convention,
    Intervention,
    Key,
    PositionTargets,
    ResolvedRule,
)
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
        if isinstance(rule.fill, ast.String):
            inputs = _inputs(rule, positions, work)
        else:
            paint = paint_of(rule, work)
            if paint is None:
                return None
            inputs = _painted(rule, paint, positions, work)
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=None, positions=positions, inputs=inputs
        )

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        if not isinstance(rule.spec.fill, ast.String) and rule.spec.fill is not None:
            said = rule.spec.fill.span.written
            said = f"gray: {GRAY} of 255" if said == "gray" else said
            yield Convention("patches", f"{said}, in the image as the model gets it")


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


# --- images ---------------------------------------------------------------------------------------

Paint = Literal["mask", "blur", "noise"]
AMOUNTS: Mapping[str, tuple[Paint, str]] = {
    "blur": ("blur", "a radius in pixels"),
    "noise": ("noise", "a standard deviation, of 255"),
}
MOST = 255.0
_AVERAGE = (
    "of a block of images with `image mean of …`, `from` that block, patches of the image are "
    "`patch embed at …`"
)


def paint_of(rule: spec.Rule, work: Work) -> PictureChange | None:
    """What patches become; None after E0203 or E0207."""
    fill = rule.fill
    assert fill is not None
    word = (
        fill.id if isinstance(fill, ast.Name) else fill.name if isinstance(fill, ast.Call) else ""
    )
    if isinstance(fill, ast.Name) and word == "gray":
        return PictureChange("mask")
    if word in AMOUNTS:
        how, amount = AMOUNTS[word]
        given = fill.arguments if isinstance(fill, ast.Call) else ()
        value = None
        if len(given) == 1 and given[0].name is None and isinstance(given[0].value, ast.Expr):
            value = constant(given[0].value, work.program.parameters)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MOST:
            return PictureChange(how, float(value))
        reason, hint = f"takes {amount}, above 0 and up to {MOST:g}", f"write `{word}(4)`"
    elif word == "gray":
        reason, hint = "takes no number", "write `gray`"
    elif word == "mean":
        reason, hint = "is of several images", _AVERAGE
    else:
        hint = did_you_mean(word, ("gray", *AMOUNTS), "write `gray`, `blur(4)` or `noise(40)`")
        text = fill.span.written
        work.diagnostics.append(UnknownWord(span=fill.span, kind="fill", word=text, hint=hint))
        return None
    work.diagnostics.append(BadArgument(span=fill.span, name=word, reason=reason, hint=hint))
    return None


def _painted(
    rule: spec.Rule, paint: PictureChange, positions: PositionTargets, work: Work
) -> dict[Key, Run]:
    """The images with these patches painted."""
    base, reader = work.experiment.base, work.model.tokenizer
    run, found = work.table.runs[base], dict[Key, Run]()
    if run.noise is not None:
        what = "`replace` on a noised run"
        work.diagnostics.append(NotSupported(span=rule.span, what=what))
    if not isinstance(reader, ImageReader):
        return dict.fromkeys(positions.written, run)
    for key, cell in positions.written.items():
        rows: list[RunRow] = []
        for row, hits, own in zip(run.rows, cell.hits, work.table.row_keys, strict=True):
            tokens = sorted({token for hit in hits for token in hit})
            other = next((t for t in tokens if reader.layout.place(t) is None), None)
            if other is not None and not reader.stands_in:
                reason, hint = "is no patch", "write `image tokens` for all of them"
                name = reader.label(other)
                problem = BadArgument(span=rule.at.span, name=name, reason=reason, hint=hint)
                work.diagnostics.append(problem)
                return {}
            seed = number_of("replace", work.program.seed, own) if paint.how == "noise" else 0
            there = [token for token in tokens if reader.layout.place(token) is not None]
            rows.append(with_patches(row, replace(paint, seed=seed), there, reader))
        found[key] = replace(run, rows=tuple(rows))
    return found
