"""Rules that change the input or the model: `replace`, `replace block`, `renumber`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from mechdsl.base.hashing import digest_number
from mechdsl.base.limits import is_number, is_whole_number
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.rules import AxisDoesNotFit, NotInDecoder
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownWord
from mechdsl.images.picture import GRAY_LEVEL, PictureChange
from mechdsl.models.shape import ModelShape, find_family, has_additive_positions, list_block_kinds
from mechdsl.program import spec
from mechdsl.program.spec import constant_value
from mechdsl.prompts.runs import PromptRun
from mechdsl.prompts.table import (
    change_row_patches,
    check_chat_markers,
    has_inserted_tokens,
    replace_tokens,
)
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.circuits import find_named_side
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import (
    ExperimentContext,
    check_stack,
    named_stack,
    resolve_axis,
    resolve_swept_site,
)
from mechdsl.resolve.targets import resolve_amounts, resolve_base_positions, resolve_rule_positions
from mechdsl.resolve.types import (
    Amounts,
    AxisIndices,
    Convention,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.rules.kinds import rule_kind
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES


@rule_kind("replace")
class ReplaceRule(RuleKind, Intervention):
    """The base run starts from other text at these positions."""

    once = True
    """A second rule would change the text that the positions of the first refer to."""
    within_prompt = "`replace` inserts text into the prompt"
    name = "text"
    changes = "input"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        base = work.experiment.base
        positions = resolve_rule_positions(rule, base, work)
        if positions is None:
            return None
        if isinstance(rule.fill, ast.String):
            inputs = _inputs(rule, positions, work)
        else:
            paint = resolve_paint(rule, work)
            if paint is None:
                return None
            inputs = _painted(rule, paint, positions, work)
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=None, positions=positions, inputs=inputs
        )

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        if not isinstance(rule.spec.fill, ast.String) and rule.spec.fill is not None:
            said = rule.spec.fill.span.written
            said = f"gray: {GRAY_LEVEL} of 255" if said == "gray" else said
            yield Convention("patches", f"{said}, in the model's input image")


def _inputs(
    rule: spec.Rule, positions: PositionTargets, work: ExperimentContext
) -> dict[AxisIndices, PromptRun]:
    """Create the prompts with the inserted text.

    Reports a change of length if other positions of the experiment would move.
    """
    assert isinstance(rule.fill, ast.String)
    base, new, tokenizer = work.experiment.base, rule.fill.value, work.model.tokenizer
    if has_inserted_tokens(work.table.runs[base]):
        what = "`replace` on a run with inserted tokens"
        later = "write it in the corruption, before `insert`"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
        return {}
    if work.table.runs[base].chat:
        marker = check_chat_markers(new, rule.fill.span, tokenizer)
        work.diagnostics.extend([] if marker is None else [marker])
    inputs = {
        key: replace_tokens(work.table, base, rule.at, cell, new, tokenizer)
        for key, cell in positions.written.items()
    }
    others = len(work.experiment.rules) > 1 or any(m.at for m in work.experiment.measures)
    others = others and not work.model.tokenizer.stands_in
    rows = work.table.runs[base].rows
    moved = others and any(
        len(new.ids) != len(old.ids)
        for run in inputs.values()
        for new, old in zip(run.rows, rows, strict=True)
    )
    if moved or work.table.runs[base].noise is not None:
        what = "a replacement with a different number of tokens together with other positions"
        later = (
            "write it as a run: `corrupt NAME { replace … with … }`, then `from clean into NAME`"
        )
        work.diagnostics.append(
            NotSupported(span=rule.span, what=what, later=later)
            if moved
            else NotSupported(span=rule.span, what="`replace` on a noised run")
        )
    return inputs


# --- images ---------------------------------------------------------------------------------------

PaintMethod = Literal["mask", "blur", "noise"]

PAINT_AMOUNTS: Mapping[str, tuple[PaintMethod, str]] = {
    "blur": ("blur", "a radius in pixels"),
    "noise": ("noise", "a standard deviation, of 255"),
}

MAX_PAINT_AMOUNT = 255.0

_MEAN_HINT = (
    "of a block of images with `image mean of …`, `from` that block, patches of the image "
    "are `patch embed at …`"
)


def resolve_paint(rule: spec.Rule, work: ExperimentContext) -> PictureChange | None:
    """Resolve the replacement of patches; None after E0203 or E0207."""
    fill = rule.fill
    assert fill is not None
    word = (
        fill.id if isinstance(fill, ast.Name) else fill.name if isinstance(fill, ast.Call) else ""
    )
    if isinstance(fill, ast.Name) and word == "gray":
        return PictureChange("mask")
    if word in PAINT_AMOUNTS:
        how, amount = PAINT_AMOUNTS[word]
        given = fill.arguments if isinstance(fill, ast.Call) else ()
        value = None
        if len(given) == 1 and given[0].name is None and isinstance(given[0].value, ast.Expr):
            value = constant_value(given[0].value, work.program.parameters)
        if is_number(value) and 0 < value <= MAX_PAINT_AMOUNT:
            return PictureChange(how, float(value))
        reason, hint = (
            f"takes {amount}, above 0 and up to {MAX_PAINT_AMOUNT:g}",
            f"write `{word}(4)`",
        )
    elif word == "gray":
        reason, hint = "takes no number", "write `gray`"
    elif word == "mean":
        reason, hint = "applies to several images", _MEAN_HINT
    else:
        hint = did_you_mean(
            word, ("gray", *PAINT_AMOUNTS), "write `gray`, `blur(4)` or `noise(40)`"
        )
        text = fill.span.written
        work.diagnostics.append(UnknownWord(span=fill.span, kind="fill", word=text, hint=hint))
        return None
    work.diagnostics.append(BadArgument(span=fill.span, name=word, reason=reason, hint=hint))
    return None


def _painted(
    rule: spec.Rule, paint: PictureChange, positions: PositionTargets, work: ExperimentContext
) -> Mapping[AxisIndices, PromptRun]:
    """Return the images with these patches replaced."""
    base, reader = work.experiment.base, work.model.tokenizer
    run = work.table.runs[base]
    if run.noise is not None:
        what = "`replace` on a noised run"
        work.diagnostics.append(NotSupported(span=rule.span, what=what))
    if not isinstance(reader, ImageTokenizer):
        return dict.fromkeys(positions.written, run)
    patches, changed = frozenset(reader.layout.grid), dict[AxisIndices, list[list[int]]]()
    for key, cell in positions.written.items():
        every = [sorted({token for hit in hits for token in hit}) for hits in cell.hits]
        other = next((t for tokens in every for t in tokens if t not in patches), None)
        if other is not None and not reader.stands_in:
            reason, hint = "isn't a patch", "write `image tokens` for all of them"
            name = reader.label(other)
            problem = BadArgument(span=rule.at.span, name=name, reason=reason, hint=hint)
            work.diagnostics.append(problem)
            return {}
        changed[key] = [[t for t in tokens if t in patches] for tokens in every]
    seeds = [
        digest_number("replace", work.program.seed, row_key) if paint.how == "noise" else 0
        for row_key in work.table.row_keys
    ]
    return _PaintedRuns(run, changed, [replace(paint, seed=seed) for seed in seeds], reader)


class _PaintedRuns(Mapping[AxisIndices, PromptRun]):
    """Runs of images with replaced patches, created on access: a check needs none of them."""

    def __init__(
        self,
        run: PromptRun,
        tokens: Mapping[AxisIndices, Sequence[Sequence[int]]],
        changes: Sequence[PictureChange],
        reader: ImageTokenizer,
    ) -> None:
        """tokens: the replaced patches of each row. changes: how, for each row."""
        self._run, self._tokens, self._changes, self._reader = run, tokens, changes, reader
        self._made: dict[AxisIndices, PromptRun] = {}

    def __getitem__(self, key: AxisIndices) -> PromptRun:
        if key not in self._made:
            rows = zip(self._run.rows, self._changes, self._tokens[key], strict=True)
            painted = (change_row_patches(*row, self._reader) for row in rows)
            self._made[key] = replace(self._run, rows=tuple(painted))
        return self._made[key]

    def __iter__(self) -> Iterator[AxisIndices]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)


IDENTITY = "identity"


@rule_kind("replace block")
class ReplaceBlockRule(RuleKind, Intervention):
    """A block's work is done by another one, or not at all.

    Its sites are what enters the block; their sources what leaves the one that computes there, or
    what enters again.
    """

    changes = "blocks"
    whole = True
    drawn_positions = False

    @property
    def at_newest(self) -> str:
        return "the newest token passes through the replaced blocks in the steps of their rules"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.site is not None
        stack = _find_stack(rule, work)
        if stack is None:
            return None
        positions = resolve_base_positions(rule.at, work)
        kind = SITES[f"resid_pre {stack}".strip()]
        targets, axes = resolve_swept_site(rule.site, work.sites, [kind])
        for axis in axes:
            work.add_axis(axis)
        if positions is not None and stack == "vision":
            positions = _in_images(rule, positions, work)
        elif positions is not None and "encoder" in work.model.shape.others:
            positions = _in_stack(positions, work, encodes=stack == "encoder")
        if targets is None or positions is None:
            return None
        site_targets = self._by_identity(rule, targets, work)
        if rule.source_block is not None:
            site_targets = _by_block(rule.source_block, targets, work, stack)
        if site_targets is None or not _check_same_kind(rule, site_targets, work, stack):
            return None
        run = work.experiment.base
        return ResolvedRule(spec=rule, does=self, run=run, sites=site_targets, positions=positions)

    def _by_identity(
        self, rule: spec.Rule, targets: SiteTargets, work: ExperimentContext
    ) -> SiteTargets | None:
        """Resolve blocks that pass on their input unchanged; report E0203 for another word."""
        word = rule.fill
        if not isinstance(word, ast.Name):
            return targets
        if word.id != IDENTITY:
            otherwise = "write `identity`, or a block: `block layer 1`"
            hint = did_you_mean(word.id, [IDENTITY], otherwise)
            kind = "replacement of a block"
            work.diagnostics.append(UnknownWord(span=word.span, kind=kind, word=word.id, hint=hint))
            return None
        labels = {key: f"{_block_label(label)} ← identity" for key, label in targets.labels.items()}
        return SiteTargets(targets.axes, targets.points, labels, targets.points)

    def detail(self, rule: ResolvedRule) -> str | None:
        source = rule.spec.source_block
        return IDENTITY if source is None else f"layer {source.span.written}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        if rule.spec.source_block is None:
            said = "a block that is replaced with identity returns its input"
        else:
            said = (
                "a different block, with its weights, processes the input there; it also "
                "remains at its own position, and sites of a layer refer to the position, "
                "not to the block"
            )
        yield Convention("blocks", said)
        if rule.acts_in("encoder"):
            yield Convention("blocks", "all tokens of the prompt pass through the encoder's blocks")
        if rule.in_vision:
            said = "all tokens of all images of a row pass through these blocks"
            yield Convention("blocks", said)
        yield Convention("passes", "rows of `replace block` are full forward passes")


def _block_label(label: str) -> str:
    """Return the label of a block, `L0`, or `L0 vision` in another stack."""
    return label.replace(".resid_pre", "")


def _find_stack(rule: spec.Rule, work: ExperimentContext) -> str | None:
    """Return the stack of the replaced block; None after an error, such as E0207 for a replacement
    in another stack."""
    assert rule.site is not None
    named = [*rule.site.names[1:2], *([] if rule.source_stack is None else [rule.source_stack])]
    if not all(check_stack(word, work.sites) for word in named):
        return None
    stack, other = (
        "" if word is None else named_stack(word, work.model.shape)
        for word in (next(iter(rule.site.names[1:2]), None), rule.source_stack)
    )
    if "cross" in (stack, other):
        reason = "is attention of the decoder's blocks, not a block"
        hint = "replace the decoder's block, `replace block layer 1 with …`, or remove only this "
        hint += "attention: `ablate attn_out cross layer 1 at last token with zero`"
        cross = next(word for word in named if named_stack(word, work.model.shape) == "cross")
        problem = BadArgument(span=cross.span, name="cross", reason=reason, hint=hint)
        work.diagnostics.append(problem)
        return None
    if rule.source_block is None or stack == other:
        return stack
    number = rule.source_block.span.written
    said, there = (" ".join(f"block {each} layer {number}".split()) for each in (other, stack))
    reason = "is in another stack than the block that it replaces"
    hint = f"name one of the same stack: `{there}`"
    span = rule.source_block.span
    work.diagnostics.append(BadArgument(span=span, name=said, reason=reason, hint=hint))
    return None


def _in_images(
    rule: spec.Rule, positions: PositionTargets, work: ExperimentContext
) -> PositionTargets | None:
    """Restrict positions to tokens that are made from patches; E0207 if there are none."""
    rows = work.table.runs[work.experiment.base].rows
    hits = tuple(
        (tuple(sorted(patch_tokens)),) if (patch_tokens := row.patch_tokens) else () for row in rows
    )
    if not any(hits) and not (work.table.stands_in or work.model.tokenizer.stands_in):
        assert rule.site is not None
        reason = f"acts on images, and no row of `{work.table.name}` has one"
        hint = f"add `image photo = …` and `{{photo}}` to `prompts {work.table.name}`, or remove "
        hint += "`vision`"
        name = "replace block vision"
        work.diagnostics.append(
            BadArgument(span=rule.site.span, name=name, reason=reason, hint=hint)
        )
        return None
    pairs = positions.written.items()
    cells = {key: replace(cell, label="images", hits=hits, vectors=1) for key, cell in pairs}
    return replace(positions, written=cells, read=cells, newest=frozenset(), every=frozenset())


def _in_stack(
    positions: PositionTargets, work: ExperimentContext, *, encodes: bool
) -> PositionTargets:
    """Restrict positions to tokens of the encoder, or to those of the decoder."""
    rows = work.table.runs[work.experiment.base].rows
    if work.table.stands_in or work.model.tokenizer.stands_in:
        return positions
    cells = {
        key: replace(
            cell,
            hits=tuple(
                tuple(tuple(at for at in hit if (at < row.source) == encodes) for hit in hits)
                for row, hits in zip(rows, cell.hits, strict=True)
            ),
        )
        for key, cell in positions.written.items()
    }
    position_targets = replace(positions, written=cells, read=cells)
    return (
        replace(position_targets, newest=frozenset(), every=frozenset())
        if encodes
        else position_targets
    )


def _by_block(
    source: ast.Star | ast.AxisRange, targets: SiteTargets, work: ExperimentContext, stack: str
) -> SiteTargets | None:
    """Resolve the block that replaces each target, for every value of the loop that names it."""
    axis = ast.Axis("layer", False, (source,), span=source.span)
    site = f"resid_post {stack}".strip()
    values = resolve_axis(axis, [SITES[site]], work.sites)
    if values is None:
        return None
    if values.sweep is not None:
        work.diagnostics.append(
            AxisDoesNotFit(
                span=source.span,
                site=f"block layer {source.span.written}",
                reason="is several blocks, but only one can be used",
                hint="name one, or sweep it: `for l in 0..2 { replace block layer 3 with block "
                "layer l }`",
            )
        )
        return None
    extra = [loop for loop in values.loops if loop not in targets.axes]
    names = (*targets.axes, *extra)
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    sources: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    more = product(*(range(len(work.loops[loop])) for loop in extra))
    for before, numbers in product(targets.points, more):
        key = (*before, *numbers)
        (layer,) = values.chosen(dict(zip(names, key, strict=True)))
        points[key] = targets.points[before]
        sources[key] = (SitePoint(site, layer, None),) * len(points[key])
        labels[key] = f"{_block_label(targets.labels[before])} ← L{layer}"
    return SiteTargets(names, points, labels, sources)


def _check_same_kind(
    rule: spec.Rule, targets: SiteTargets, work: ExperimentContext, stack: str
) -> bool:
    """Report E0108 for blocks that can't replace each other according to the config."""
    shape = work.sites.shape
    if shape.stands_in:
        return True
    shape = shape.others.get(stack, shape)
    what, later = _explain_tied_blocks(shape.config), NotSupported.later
    kinds = list_block_kinds(shape.config, shape.n_layers)
    assert targets.sources is not None
    for key, points in targets.points.items():
        for to, of in zip(points, targets.sources[key], strict=True):
            if kinds is not None and kinds[to.layer or 0] != kinds[of.layer or 0]:
                what = f"block {of.layer} (`{kinds[of.layer or 0]}`) in place of block {to.layer} "
                what += f"(`{kinds[to.layer or 0]}`), which is of a different type,"
                later = "name a block of the same type"
    if what:
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
    return not what


def _explain_tied_blocks(config: Mapping[str, Any]) -> str:
    """Describe dependencies of a block on its index in the model; empty if there are none."""
    if config.get("num_kv_shared_layers"):
        return "`replace block` in a model whose blocks share keys and values"
    if config.get("scale_attn_by_inverse_layer_idx"):
        return "`replace block` in a model that scales attention by the index of the block"
    return ""


@rule_kind("renumber")
class RenumberRule(RuleKind, Intervention):
    """These tokens count on from a number, in their order in the text."""

    changes = "positions"
    whole = True
    drawn_positions = False

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.fill is not None
        positions = _resolve_renumbered(rule, work)
        amounts = resolve_amounts(rule.fill, work)
        if (
            positions is None
            or amounts is None
            or not _check_position_ids(rule, positions, amounts, work)
        ):
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=work.experiment.base,
            sites=SiteTargets((), {(): (SitePoint("embed", None, None),)}, {(): "position ids"}),
            positions=positions,
            amounts=amounts,
        )

    def detail(self, rule: ResolvedRule) -> str | None:
        return f"from {super().detail(rule)}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "position ids",
            "these tokens are numbered consecutively from the number (a prompt's first "
            "token is 0); all other tokens keep their position ids, and which tokens a "
            "token sees doesn't change",
        )
        yield Convention("passes", "rows of `renumber` are full forward passes")


def _resolve_renumbered(rule: spec.Rule, work: ExperimentContext) -> PositionTargets | None:
    """Resolve the tokens of the stacks whose position ids can be changed."""
    shape = work.sites.shape
    if shape.attends_to_image:
        return resolve_base_positions(rule.at, replace(work, side="target"))
    stacks = find_family(shape.family).position_ids
    if stacks != frozenset({"decoder"}):
        of = "`renumber` in a model with an encoder and a decoder"
        side = find_named_side(rule.at, of, work) if stacks else work.side
        return resolve_base_positions(rule.at, replace(work, side=side))
    first = len(work.diagnostics)
    positions = resolve_base_positions(rule.at, replace(work, side="target"))
    reason = "this model takes position ids only for the tokens of its decoder"
    hint = "name a token of the decoder, such as `last token`"
    work.diagnostics[first:] = [
        replace(problem, reason=reason, hint=hint) if isinstance(problem, NotInDecoder) else problem
        for problem in work.diagnostics[first:]
    ]
    return positions


def count_positions(shape: ModelShape) -> int | None:
    """Return the number of positions before rotary embeddings are rescaled, if they are."""
    table = shape.config.get("max_target_positions")
    known = [shape.max_positions, table if isinstance(table, int) else None]
    for part in (
        shape.config,
        shape.config.get("rope_scaling"),
        shape.config.get("rope_parameters"),
    ):
        own = part.get("original_max_position_embeddings") if isinstance(part, Mapping) else None
        known.append(own if isinstance(own, int) else None)
    return min((each for each in known if each is not None), default=None)


def _check_position_ids(
    rule: spec.Rule, positions: PositionTargets, amounts: Amounts, work: ExperimentContext
) -> bool:
    """Report E0108 or E0207 for models and numbers without such positions."""
    shape = work.sites.shape
    if not shape.stands_in:
        how = ""
        if has_additive_positions(shape.family, shape.config):
            how = "that adds positions to scores"
        elif (
            shape.encodes_apart
            and not shape.attends_to_image
            and not find_family(shape.family).position_ids
        ):
            how = "whose `forward` takes no position ids"
        elif shape.takes in ("image", "audio"):
            how = f"that counts its {'patches' if shape.takes == 'image' else 'frames'} itself"
        if how:
            what = f"`renumber` in a model {how}"
            work.diagnostics.append(NotSupported(span=rule.span, what=what))
            return False
    assert rule.fill is not None
    counted = _count_renumbered(positions, work)
    for amount in amounts.values.values():
        reason = ""
        if amount < 0 or not is_whole_number(amount):
            reason = f"must be a position, a whole number from 0, not {amount:g}"
        for longest, most in counted:
            if not reason and most is not None and amount + longest > most:
                tokens = count_noun(longest, "token")
                reason = f"counts {tokens} from {amount:g}, but the last position is {most - 1}"
        if reason:
            work.diagnostics.append(
                BadArgument(
                    span=rule.fill.span,
                    name="from",
                    reason=reason,
                    hint="name the position of the first token: `renumber subject tokens from 5`",
                )
            )
            return False
    return True


def _count_renumbered(
    positions: PositionTargets, work: ExperimentContext
) -> list[tuple[int, int | None]]:
    """List the largest number of tokens that a row renumbers in a stack, and the number of the
    stack's positions: of an encoder and its decoder, or of the only stack."""
    shape = work.sites.shape
    if work.model.tokenizer.stands_in:
        return [(1, count_positions(shape))]
    rows = work.table.runs[work.experiment.base].rows
    counts = [(0, 0)]
    for cell in positions.written.values():
        for row, hits in zip(rows, cell.hits, strict=True):
            encoded = [sum(token < row.source for token in tokens) for tokens in hits]
            counts += [
                (number, len(tokens) - number) for number, tokens in zip(encoded, hits, strict=True)
            ]
    longest = tuple(map(max, zip(*counts, strict=True)))
    stacks = zip(longest, (shape.others.get("encoder", shape), shape), strict=True)
    return [(most, count_positions(stack)) for most, stack in stacks if most]
