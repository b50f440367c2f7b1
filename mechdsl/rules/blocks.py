"""`replace block layer 2 with block layer 1`, `replace block layer * with identity`.

Another block computes in the place of one, with its own weights on what enters there, or none does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import AxisDoesNotFit
from mechdsl.program import spec
from mechdsl.resolve.coordinates import axis_values
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Convention,
    Intervention,
    Key,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.resolve.site_targets import swept
from mechdsl.resolve.targets import plain_targets
from mechdsl.rules.kind import RuleKind, rule_kind
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

IDENTITY = "identity"


@rule_kind("replace block")
class ReplaceBlock(RuleKind, Intervention):
    """A block's work is done by another one, or not at all.

    Its sites are what enters the block; their sources what leaves the one that computes there, or
    what enters again.
    """

    changes = "blocks"
    whole = True
    drawn_positions = False

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.site is not None
        positions = plain_targets(rule.at, work)
        targets, axes = swept(rule.site, work.sites, [SITES["resid_pre"]])
        for axis in axes:
            work.add_axis(axis)
        if targets is None or positions is None:
            return None
        found = self._by_identity(rule, targets, work)
        if rule.source_block is not None:
            found = _by_block(rule.source_block, targets, work)
        if found is None or not _alike(rule, found, work):
            return None
        run = work.experiment.base
        return ResolvedRule(spec=rule, does=self, run=run, sites=found, positions=positions)

    def _by_identity(self, rule: spec.Rule, targets: SiteTargets, work: Work) -> SiteTargets | None:
        """Blocks that hand on what enters; E0203 for another word."""
        word = rule.fill
        if not isinstance(word, ast.Name):
            return targets
        if word.id != IDENTITY:
            otherwise = "write `identity`, or a block: `block layer 1`"
            hint = did_you_mean(word.id, [IDENTITY], otherwise)
            kind = "replacement of a block"
            work.diagnostics.append(UnknownWord(span=word.span, kind=kind, word=word.id, hint=hint))
            return None
        labels = {key: f"{_blocks(label)} ← identity" for key, label in targets.labels.items()}
        return SiteTargets(targets.axes, targets.points, labels, targets.points)

    def detail(self, rule: ResolvedRule) -> str | None:
        source = rule.spec.source_block
        return IDENTITY if source is None else f"layer {source.span.written}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        if rule.spec.source_block is None:
            said = "a block that is replaced with identity hands on what enters it"
        else:
            said = (
                "another block computes there, with its own weights, on what enters; it stays in "
                "its own place too, and sites of a layer are what is computed in that place"
            )
        yield Convention("blocks", said)
        yield Convention("passes", "rows of `replace block` are whole passes")


def _blocks(label: str) -> str:
    return label.removesuffix(".resid_pre")


def _by_block(
    source: ast.Star | ast.AxisRange, targets: SiteTargets, work: Work
) -> SiteTargets | None:
    """The targets with the block that computes there, for every value of the loop that names it."""
    axis = ast.Axis("layer", False, (source,), span=source.span)
    values = axis_values(axis, [SITES["resid_post"]], work.sites)
    if values is None:
        return None
    if values.sweep is not None:
        work.diagnostics.append(
            AxisDoesNotFit(
                span=source.span,
                site=f"block layer {source.span.written}",
                reason="is several blocks, and one computes there",
                hint="name one, or sweep it: `for l in 0..2 { replace block layer 3 with block "
                "layer l }`",
            )
        )
        return None
    extra = [loop for loop in values.loops if loop not in targets.axes]
    names = (*targets.axes, *extra)
    points: dict[Key, tuple[SitePoint, ...]] = {}
    sources: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    more = product(*(range(len(work.loops[loop])) for loop in extra))
    for before, own in product(targets.points, more):
        key = (*before, *own)
        (layer,) = values.chosen(dict(zip(names, key, strict=True)))
        points[key] = targets.points[before]
        sources[key] = (SitePoint("resid_post", layer, None),) * len(points[key])
        labels[key] = f"{_blocks(targets.labels[before])} ← L{layer}"
    return SiteTargets(names, points, labels, sources)


def _alike(rule: spec.Rule, targets: SiteTargets, work: Work) -> bool:
    """E0108 for blocks that can't stand in for each other, as far as the config tells."""
    shape = work.sites.shape
    if shape.stands_in:
        return True
    what = _tied(shape.config)
    kinds = shape.config.get("layer_types")
    assert targets.sources is not None
    for key, points in targets.points.items():
        for to, of in zip(points, targets.sources[key], strict=True):
            if isinstance(kinds, list) and kinds[to.layer or 0] != kinds[of.layer or 0]:
                what = f"block {of.layer} (`{kinds[of.layer or 0]}`) in place of block {to.layer} "
                what += f"(`{kinds[to.layer or 0]}`), which is of another kind,"
    if what:
        work.diagnostics.append(NotSupported(span=rule.span, what=what))
    return not what


def _tied(config: Mapping[str, Any]) -> str:
    """What hangs on the place of a block in the model, in words."""
    if config.get("num_kv_shared_layers"):
        return "`replace block` in a model whose blocks share keys and values"
    if config.get("scale_attn_by_inverse_layer_idx"):
        return "`replace block` in a model that scales attention by the number of the block"
    return ""
