"""Whether a model reads what a block has: texts or images."""

from __future__ import annotations

from collections.abc import Iterable

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e04_model import NoImageProcessor, ReadsOther
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.resolved import ModelContext, ResolvedExperiment
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.syntax import ast


def cannot_read(prompts: spec.Prompts, model: ModelContext) -> Diagnostic | None:
    """E0455 for images that a model of texts is to read, and for prompts of one of images; E0456
    for a model of images that is handed over with a tokenizer."""
    shape = model.shape
    if shape.stands_in or prompts.name == spec.NO_PROMPTS:
        return None
    images = prompts.kind == "images"
    if images == (shape.takes == "image"):
        return None if not images or isinstance(model.tokenizer, ImageReader) else _bare(model)
    reads, given = ("texts", "images") if images else ("images", "prompts")
    return ReadsOther(
        span=model.spec.span,
        model=model.name,
        architecture=shape.architecture,
        reads=reads,
        block=prompts.name,
        given=f"of {given}",
        hint=f"write a block of `{'prompts' if images else 'images'}` for it",
    )


def not_of_images(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """E0108 for rules, saves and metrics that images have nothing for."""
    if experiment.model.shape.takes != "image":
        return []
    found: list[Diagnostic] = []
    for rule in experiment.every_rule:
        if rule.does.changes == "input" and isinstance(rule.spec.fill, ast.String):
            found.append(NotSupported(span=rule.spec.span, what="a text in an image"))
        elif rule.sites is not None:
            points = [p for here in rule.sites.points.values() for p in here]
            found += _of_logits(points, rule.spec.span)
    for save in experiment.saves:
        found += _of_logits(save.points, save.spec.span)
    for measure in experiment.measures:
        points = [atom.point for atom in measure.atoms if atom.point is not None]
        found += _of_logits(points, measure.expression.span)
    return found


def _of_logits(points: Iterable[SitePoint], span: Span) -> list[Diagnostic]:
    if all(point.site != "logits" for point in points):
        return []
    return [NotSupported(span=span, what="`logits` at a token of a model of images")]


def _bare(model: ModelContext) -> Diagnostic:
    reason = "it was handed over with a tokenizer, and no image processor"
    hint = f'hand its processor over: `models={{"{model.name}": (model, processor)}}`'
    return NoImageProcessor(span=model.spec.span, model=model.name, reason=reason, hint=hint)
