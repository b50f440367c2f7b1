"""Rules that write numbers or directions: `set`, `add`, `scale`, `project out`, `clamp`.

Apart from `set`, they act on the current activation, after rules that precede them in the file or
at earlier sites.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.rules import BadAmount, BadDirection, StacksDiffer
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.models.shape import unit_count, vector_width
from mechdsl.program import spec
from mechdsl.program.python_functions import find_function, is_python_call
from mechdsl.resolve.bases import RECONSTRUCTION, REMOVAL, is_reconstruction
from mechdsl.resolve.directions import resolve_direction
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext, label_points, resolve_site
from mechdsl.resolve.targets import NUMBER_HINT, resolve_amounts, resolve_rule_positions
from mechdsl.resolve.types import (
    Amounts,
    AxisIndices,
    Convention,
    DirectionTargets,
    ExternalRun,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    VectorBatch,
)
from mechdsl.rules.kinds import (
    CURRENT_STATE_NOTE,
    check_equal_lengths,
    check_one_side,
    resolve_targets,
    rule_kind,
)
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES, SITES_WITHOUT_STEPS, SiteKind, TokenSide, unknown_component

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class StepAddition(Intervention):
    """Addition of the difference between the current vector and the one at the preceding position.

    Both vectors are those of the patched run.
    """

    name = "add step"
    mode = "step"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.stepped is not None
        yield Convention(
            "step",
            f"`step({rule.spec.stepped.id})` is the vector in the patched pass minus the "
            "vector of the preceding position, both before this rule writes; at the first "
            "position it is 0",
        )


STEP_ADDITION = StepAddition()


def resolve_step(rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
    """Resolve a step; None after E0203 for an unknown component, or E0341 for another component."""
    base = work.experiment.base
    sites, positions = resolve_targets(rule, base, work)
    amounts: Amounts | None = Amounts((), {(): 1.0})
    if rule.fill is not None:
        amounts = resolve_amounts(rule.fill, work)
    if (
        sites is None
        or positions is None
        or amounts is None
        or not _check_own_component(rule, sites, work)
    ):
        return None
    return ResolvedRule(
        spec=rule, does=STEP_ADDITION, run=base, sites=sites, positions=positions, amounts=amounts
    )


def _check_own_component(rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
    """Check that the step is of the component that the rule writes, in whichever stack."""
    assert rule.stepped is not None
    name, span = rule.stepped.id, rule.stepped.span
    if name not in SITES:
        work.diagnostics.append(unknown_component(name, span))
        return False
    names = sorted({point.site for points in sites.points.values() for point in points})
    kinds = [SITES[each] for each in names]
    written = next((kind for kind in kinds if kind.component != name), None)
    images = next((kind.name for kind in kinds if _is_of_patches(kind, work)), None)
    if written is not None:
        reason = f"the rule writes `{written.name}`, and steps are those of the written site"
        hint = f"write `step({written.component})`"
    elif images is not None:
        reason = f"`{images}` is at patches of an image, which have no preceding token"
        hint = "add steps in the language model"
    elif name in SITES_WITHOUT_STEPS and kinds:
        reason = f"`{name}` has no steps"
        here = dict.fromkeys(SITES[s].component for s in SITES if s in work.sites.shape.sites)
        own = ", ".join(f"`{each}`" for each in here if each not in SITES_WITHOUT_STEPS)
        hint = f"steps exist for {own}"
    else:
        return True
    work.diagnostics.append(BadDirection(span=span, text=f"step({name})", reason=reason, hint=hint))
    return False


def _is_of_patches(kind: SiteKind, work: ExperimentContext) -> bool:
    """Whether a site has vectors at patches of an image instead of the tokens of a text."""
    attends = work.model.shape.takes in ("attended image", "image to text")
    return kind.side == "image" or (attends and kind.side == "source")


class ValueAssignment(Intervention):
    """Assignment `to 0.5 * value(SITE)`: the vector of another site, times a number."""

    name = "value"
    reads = "run"

    def detail(self, rule: ResolvedRule) -> str | None:
        return "" if rule.spec.fill is None else f"times {rule.spec.fill.span.written}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.reading is not None
        site = rule.spec.reading.span.written
        moved = rule.spec.onto is not None
        at = f"`{rule.spec.at.span.written}`" if moved else "the written position"
        run = f"the {rule.run} run, without the rules of the experiment"
        yield Convention("value", f"`{site}` is the vector at {at} in {run}")

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        read = vectors.read()
        return read * vectors.amounts[:, None].to(read)


class ValueAddition(ValueAssignment):
    """Addition `add 0.3 * value(attn_out layer 8) of clean to SITE`, in which the direction is an
    activation of the same row."""

    name = "add value"
    mode = "add"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        yield Convention("steering", f"`add` {CURRENT_STATE_NOTE}")

    @property
    def redirected(self) -> Intervention | None:
        return RANDOM_ADDITION


class RandomAddition(ValueAddition):
    """Addition of a random direction with the norm of an activation of the same row."""

    name = "add random"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        read = vectors.read()
        size = read.norm(dim=1, keepdim=True) * vectors.amounts[:, None].to(read)
        return vectors.direction().to(read) * size


VALUE_ADDITION = ValueAddition()
RANDOM_ADDITION = RandomAddition()


def resolve_value(
    rule: spec.Rule, does: Intervention, work: ExperimentContext
) -> ResolvedRule | None:
    """Resolve the written and the read site; report E0337 if their widths differ."""
    assert rule.site is not None
    assert rule.reading is not None
    run = rule.source or work.experiment.base
    written, axes = resolve_site(rule.site, work.sites)
    read, more = resolve_site(rule.reading, work.sites)
    for axis in (*axes, *more):
        if axis.name not in work.loops:
            work.add_axis(axis)
    if not _check_no_keys(rule, (written, read), work):
        return None
    positions = _resolve_value_positions(rule, run, written, read, work)
    amounts: Amounts | None = Amounts((), {(): 1.0})
    if rule.fill is not None:
        amounts = resolve_amounts(rule.fill, work)
    if written is None or read is None or positions is None or amounts is None:
        return None
    sites = _pair_sites(written, read)
    if not _check_widths(rule, sites, work):
        return None
    return ResolvedRule(
        spec=rule, does=does, run=run, sites=sites, positions=positions, amounts=amounts
    )


def _resolve_value_positions(
    rule: spec.Rule,
    run: str,
    written: SiteTargets | None,
    read: SiteTargets | None,
    work: ExperimentContext,
) -> PositionTargets | None:
    """Resolve positions among the tokens of the written and of the read site; None after E0108,
    E0317 and errors of positions."""
    sites = [site_targets for site_targets in (written, read) if site_targets is not None]
    if not all(check_one_side(rule, site, work) for site in sites):
        return None
    writer, reader = (work.reading(written or read), work.reading(read or written))
    images = "image" in (writer.side, reader.side)
    if writer.side == reader.side or (images and work.model.shape.merged_side == 1):
        return resolve_rule_positions(rule, run, writer, reader=reader)
    if images:
        what = "a value read inside the vision encoder and written outside of it, or the reverse, "
        what += "in a model that merges patches,"
        later = "read `embed` at a token of the image: it is the output of the vision encoder"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
        return None
    if rule.onto is not None:
        return resolve_rule_positions(rule, run, writer, reader=reader)
    if resolve_rule_positions(rule, work.experiment.base, writer) is not None:
        _report_unplaced_read(rule, writer.side, sites, work)
    return None


def _report_unplaced_read(
    rule: spec.Rule, side: TokenSide, sites: Sequence[SiteTargets], work: ExperimentContext
) -> None:
    """Report E0317 for a value of the other stack of an encoder-decoder without a position to read.

    Args:
        side: The tokens at which the rule writes.
        sites: The written and the read sites.
    """
    assert rule.reading is not None
    target, source = (next(p.site for here in s.points.values() for p in here) for s in sites)
    token = "last token"
    if side == "target":
        image = work.model.shape.attends_to_image
        token = "photo row 1 col 1 token" if image else "first token"
    else:
        source, target = target, source
    hint = f"name the position to read: `value({rule.reading.span.written} at {token})`"
    work.diagnostics.append(
        StacksDiffer(span=rule.reading.span, source=source, target=target, hint=hint)
    )


def _pair_sites(written: SiteTargets, read: SiteTargets) -> SiteTargets:
    """Combine every written site with every read site, along the axes of both."""
    extra = [name for name in read.axes if name not in written.axes]
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    sources: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    missing: set[AxisIndices] = set()
    for to, of in product(written.points, read.points):
        along = dict(zip(written.axes, to, strict=True))
        there = dict(zip(read.axes, of, strict=True))
        if any(along[name] != there[name] for name in along.keys() & there.keys()):
            continue
        key = (*to, *(there[name] for name in extra))
        points[key] = written.points[to]
        if to in written.missing or of in read.missing:
            missing.add(key)
        point = read.points[of]
        sources[key] = point * len(points[key]) if len(point) == 1 else point
        labels[key] = f"{read.labels[of]} → {written.labels[to]}"
    return replace(
        written,
        axes=(*written.axes, *extra),
        points=points,
        sources=sources,
        labels=labels,
        missing=frozenset(missing),
    )


def _check_no_keys(
    rule: spec.Rule, sites: Sequence[SiteTargets | None], work: ExperimentContext
) -> bool:
    """Report E0108 for a value that is read from or written to vectors over keys."""
    points = [p for site in sites if site is not None for p in chain(*site.points.values())]
    over_keys = next((p.site for p in points if SITES[p.site].width == "key"), None)
    if over_keys is None:
        return True
    what = f"`value(…)` with `{over_keys}`, whose vectors have a number for each key,"
    later = f"`patch {over_keys}` copies such vectors between runs"
    work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
    return False


def _check_widths(rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
    assert rule.reading is not None
    assert sites.sources is not None
    for key, points in sites.points.items():
        reason = _misfit(points, sites.sources[key], work)
        if reason is not None:
            text = rule.reading.span.written
            hint = "name sites of equal width; read either one site or the same number as you write"
            work.diagnostics.append(
                BadAmount(span=rule.reading.span, text=text, reason=reason, hint=hint)
            )
            return False
    return True


def _misfit(
    points: tuple[SitePoint, ...], sources: tuple[SitePoint, ...], work: ExperimentContext
) -> str | None:
    """Explain why the vectors of the sources can't be written at the points; None if they can."""
    if len(points) != len(sources):
        return f"{len(sources)} vectors are read, but {len(points)} are written"
    shape = work.sites.shape
    for to, of in zip(points, sources, strict=True):
        ours, theirs = (
            vector_width(shape, to.site, to.layer),
            vector_width(shape, of.site, of.layer),
        )
        if ours != theirs:
            return f"{label_points((of,))} has {theirs} numbers, {label_points((to,))} {ours}"
        each = unit_count(shape, of.site, of.layer)
        if (
            of.unit is None
            and each > 1
            and (to.unit is not None or each != unit_count(shape, to.site, to.layer))
        ):
            return f"{label_points((of,))} are {each} vectors"
    return None


class Steering(Intervention):
    """An intervention that changes the current vector of the patched run."""

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run

    def detail(self, rule: ResolvedRule) -> str | None:
        said = [part.span.written for part in (rule.spec.fill, rule.spec.direction) if part]
        return " * ".join(said)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("steering", f"`{self.name}` {CURRENT_STATE_NOTE}")


class DirectionRule(RuleKind, Steering):
    """A kind of rule with a direction."""

    amount: ClassVar[float] = 0.0
    """The rule's number if none is written."""

    def with_direction(self, direction: DirectionTargets) -> Intervention:
        """Return the intervention of a rule with this direction."""
        return self

    def where(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[SiteTargets | None, PositionTargets | None]:
        """Resolve the sites and positions of the rule; None for those with errors."""
        return resolve_targets(rule, work.experiment.base, work)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        base = work.experiment.base
        sites, positions = self.where(rule, work)
        amounts: Amounts | None = Amounts((), {(): self.amount})
        if rule.fill is not None:
            amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or amounts is None:
            return None
        direction = resolve_direction(rule, sites, positions, work)
        if direction is None:
            return None
        return ResolvedRule(
            spec=rule,
            does=self.with_direction(direction),
            run=base,
            sites=sites,
            positions=positions,
            amounts=amounts,
            direction=direction,
        )


class EditAddition(Steering):
    """Addition of what an edit computes from each activation."""

    name = "add edit"
    mode = "edit"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("steering", f"`add` {CURRENT_STATE_NOTE}")
        yield Convention(
            "edit",
            "`add` adds Aᵀ B x + c to each activation x, times its number; the edit has the "
            "matrices A and B and the vector c",
        )


EDIT_ADDITION = EditAddition()


def scale_directions(vectors: VectorBatch) -> Tensor:
    """Return the direction times the rule's number: [K, width]."""
    return vectors.direction() * vectors.amounts[:, None]


def normalize_directions(vectors: VectorBatch) -> Tensor:
    """Return the direction with norm 1: [K, width]; a zero direction stays 0."""
    direction = vectors.direction()
    length = direction.norm(dim=1, keepdim=True)
    return direction / length.where(length > 0, length + 1)


@rule_kind("add")
class AddRule(DirectionRule):
    """`add NUMBER * DIRECTION to SITE at POSITIONS` (Turner et al. 2023, arXiv 2308.10248)."""

    mode = "add"
    amount = 1.0

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.reading is not None:
            return resolve_value(rule, VALUE_ADDITION, work)
        if rule.stepped is not None:
            return resolve_step(rule, work)
        if rule.direction is None:
            return resolve_number(rule, NUMBER_ADDITION, work)
        return super().resolve(rule, work)

    def with_direction(self, direction: DirectionTargets) -> Intervention:
        edits = direction.role == "edit"
        return EDIT_ADDITION if edits else self

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return scale_directions(vectors)


class NumberAddition(Intervention):
    """Addition of a number to coordinates: `add 4 to feature 12 of b`."""

    name = "add number"
    mode = "add"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


NUMBER_ADDITION = NumberAddition()


def resolve_number(
    rule: spec.Rule, does: Intervention, work: ExperimentContext, hint: str = NUMBER_HINT
) -> ResolvedRule | None:
    """Resolve a rule with a number at sites of the base run; None after an error.

    Args:
        hint: As in `resolve_amounts`.
    """
    sites, positions = resolve_targets(rule, work.experiment.base, work)
    amounts = resolve_amounts(rule.fill, work, hint)
    if sites is None or positions is None or amounts is None:
        return None
    return ResolvedRule(
        spec=rule,
        does=does,
        run=work.experiment.base,
        sites=sites,
        positions=positions,
        amounts=amounts,
    )


class DirectionAssignment(DirectionRule):
    """Assignment `set SITE at POSITIONS to NUMBER * DIRECTION`."""

    name = "direction"
    amount = 1.0

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from ()

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return scale_directions(vectors)


DIRECTION_ASSIGNMENT = DirectionAssignment()


class ChannelScaling(DirectionRule):
    """Scaling `scale SITE at POSITIONS by NUMBER * DIRECTION`: each number of a vector by another
    one."""

    name = "scale by vector"
    mode = "scale"
    amount = 1.0

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return scale_directions(vectors)


CHANNEL_SCALING = ChannelScaling()


@rule_kind("scale")
class ScaleRule(RuleKind, Steering):
    """`scale SITE at POSITIONS by NUMBER`."""

    takes = "by"
    mode = "scale"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.direction is not None:
            return CHANNEL_SCALING.resolve(rule, work)
        assert rule.site is not None
        assert rule.at is not None
        where = f"at {rule.site.span.written} at {rule.at.span.written}"
        scales = f"`direction g = fit(scales(penalty: 0.1), …) {where}`"
        return resolve_number(rule, self, work, f"{NUMBER_HINT}, or declare scales: {scales}")

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 1


@rule_kind("project out")
class ProjectOutRule(DirectionRule):
    """`project out DIRECTION from SITE at POSITIONS`: x − (x · u) u, u of length 1 (Arditi et al.
    2024, arXiv 2406.11717). `project out feature 3 of b at POSITIONS` removes the direction of a
    coordinate, and `features 3, 12 of b` the span of several directions."""

    mode = "along"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.direction is not None:
            return super().resolve(rule, work)
        base = work.experiment.base
        sites, positions = resolve_targets(rule, base, work)
        if sites is None or positions is None:
            return None
        return ResolvedRule(spec=rule, does=REMOVAL, run=base, sites=sites, positions=positions)

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return normalize_directions(vectors)


@rule_kind("project onto")
class ProjectOntoRule(DirectionRule):
    """`project SITE at POSITIONS onto DIRECTION`: (x · u) u, u of length 1. Only the component
    along the direction stays."""

    mode = "onto"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return normalize_directions(vectors)


class NumberClamp(Intervention):
    """Clamp of a neuron: `clamp mlp_hidden layer 2 neuron 5 at POSITIONS to 5`."""

    name = "clamp"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


NUMBER_CLAMP = NumberClamp()


@rule_kind("clamp")
class ClampRule(DirectionRule):
    """`clamp DIRECTION of SITE at POSITIONS to NUMBER`: the component along it, measured in units
    of the activation; `clamp NEURON at POSITIONS to NUMBER`."""

    takes = "to"
    mode = "along"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.direction is not None:
            return super().resolve(rule, work)
        number = resolve_number(rule, NUMBER_CLAMP, work)
        return None if number is None or _has_vectors(number, work) else number

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return normalize_directions(vectors)


def _has_vectors(rule: ResolvedRule, work: ExperimentContext) -> bool:
    """Report E0341 for a site with vectors, which a single number can't replace."""
    assert rule.sites is not None
    named = {point.site for points in rule.sites.points.values() for point in points}
    wide = sorted(site for site in named if SITES[site].width != "one")
    fill = rule.spec.fill
    if wide and fill is not None:
        work.diagnostics.append(
            BadDirection(
                span=fill.span,
                text=fill.span.written,
                reason=f"`{wide[0]}` has vectors, which one number can't specify",
                hint=f"clamp a neuron, or a component: `clamp DIRECTION of {wide[0]} …`",
            )
        )
    return bool(wide)


class NumberAssignment(Intervention):
    """Assignment `to 0.5`: the number in every coordinate of the vector."""

    name = "number"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


class PythonAssignment(Intervention):
    """Assignment `to python("file.py:function")`: the result for the base run's vectors."""

    name = "python"
    reads = "cell"

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run, rule.python

    def detail(self, rule: ResolvedRule) -> str | None:
        assert rule.python is not None
        return f"{rule.python.name} of {rule.python.file}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.python is not None
        yield Convention(
            "set",
            f"`{rule.python.name}` receives the {rule.run} run of all rows of a cell at once, "
            "[rows, positions, width], in the order of the data",
        )

    def of_cell(self, rule: ResolvedRule, given: Tensor) -> Tensor:
        """Call the function: [row, position, width].

        Raises:
            PythonFailure: E0223 if the result has another shape or type.
        """
        import torch

        function = rule.python
        assert function is not None
        # The copy protects the vectors from in-place changes by the function.
        tensor = given.clone()
        with torch.no_grad():
            made = function.call(tensor)
        hint = "it takes `vectors`, [rows, positions, width], and returns the same shape"
        try:
            vector = torch.as_tensor(made).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = "nothing" if made is None else f"a `{type(made).__name__}`"
            raise function.failure(f"it returned {kind}, not numbers", hint) from None
        if vector.shape != given.shape:
            shapes = f"it returned the shape {list(vector.shape)}, not {list(given.shape)}"
            raise function.failure(shapes, hint)
        if vector.is_complex():
            raise function.failure("it returned complex numbers", hint)
        vector, lacking = vector.to(given), given.isnan()
        if not (vector.isfinite() | lacking).all():
            if lacking.any():
                hint = "rows with fewer positions are padded with NaN: ignore it"
            raise function.failure("it returned NaN or infinity", hint)
        return vector.masked_fill(lacking, 0.0)


NUMBER_ASSIGNMENT, PYTHON_ASSIGNMENT, VALUE_ASSIGNMENT = (
    NumberAssignment(),
    PythonAssignment(),
    ValueAssignment(),
)


def _is_unknown_function(fill: ast.Expr | None, work: ExperimentContext) -> bool:
    """Report E0337 for a name that is neither a number nor a function passed from Python."""
    if not isinstance(fill, ast.Name) or fill.id in ("zero", "mean"):
        return False
    known = (*work.loops, *work.program.parameters, *work.program.rule_functions)
    if fill.id in known:
        return False
    reason = (
        f"`{fill.id}` is neither a `for` variable around this rule, nor a `param`, nor a function "
        "passed from Python"
    )
    passed = f'`mechdsl.run(…, rules={{"{fill.id}": …}})`'
    hint = f"write a number, for example `0.5`, or pass a function from Python: {passed}"
    work.diagnostics.append(
        BadAmount(
            span=fill.span,
            text=fill.span.written,
            reason=reason,
            hint=did_you_mean(fill.id, known, hint),
        )
    )
    return True


@rule_kind("set")
class SetRule(RuleKind):
    """Vectors of the base run are replaced."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.reading is not None:
            return resolve_value(rule, VALUE_ASSIGNMENT, work)
        if rule.direction is not None:
            return DIRECTION_ASSIGNMENT.resolve(rule, work)
        base = work.experiment.base
        sites, positions = resolve_targets(rule, base, work)
        if is_reconstruction(rule.fill) and sites is not None and positions is not None:
            return ResolvedRule(
                spec=rule, does=RECONSTRUCTION, run=base, sites=sites, positions=positions
            )
        does, python = NUMBER_ASSIGNMENT, None
        amounts: Amounts | None = None
        if is_python_call(rule.fill):
            assert isinstance(rule.fill, ast.Call)
            does = PYTHON_ASSIGNMENT
            python, problems = find_function(rule.fill, "fill")
            work.diagnostics.extend(problems)
        elif not (is_reconstruction(rule.fill) or _is_unknown_function(rule.fill, work)):
            amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or (python is None and amounts is None):
            return None
        check_equal_lengths(rule, sites, positions, does, ExternalRun(work.table, base), work)
        return ResolvedRule(
            spec=rule,
            does=does,
            run=base,
            sites=sites,
            positions=positions,
            amounts=amounts,
            python=python,
        )
