"""Directions made concrete: what a rule's expression stands for in every cell."""

from __future__ import annotations

from collections.abc import Sequence

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e03_directions import BadDirection
from mechdsl.models.shape import width
from mechdsl.program import spec
from mechdsl.program.lower_directions import WAYS
from mechdsl.resolve.best_member import best_coordinates
from mechdsl.resolve.direction_fits import fit_family
from mechdsl.resolve.direction_types import DirectionTargets, Member, UnitVector, WeightedSum
from mechdsl.resolve.families import CannotMake, Family, combined, keys_of
from mechdsl.resolve.free_directions import free_family
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.measures import evaluate
from mechdsl.resolve.resolved import Axis, Label
from mechdsl.resolve.resolved_rule import Key, PositionTargets, SiteTargets
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES


def direction_targets(
    rule: spec.Rule, sites: SiteTargets, positions: PositionTargets, work: Work
) -> DirectionTargets | None:
    """The rule's direction in every cell; axes of its family that the rule doesn't sweep are axes
    of the experiment. None after E0341 or E0620, and where something isn't at hand."""
    assert rule.direction is not None
    try:
        family = _family(rule.direction, work, None)
        if family is None:
            return None
        _fits(rule.direction, family, sites, work)
        return _laid_out(rule.direction, family, (*sites.axes, *positions.axes), work)
    except CannotMake as problem:
        text = problem.node.span.written
        work.diagnostics.append(
            BadDirection(
                span=problem.node.span, text=text, reason=problem.reason, hint=problem.hint
            )
        )
        return None


def _fits(node: ast.Expr, family: Family, sites: SiteTargets, work: Work) -> None:
    """The direction has as many numbers as the vectors that it goes into."""
    shape = work.model.shape
    for point in {
        (p.site, p.layer): p for points in sites.points.values() for p in points
    }.values():
        if SITES[point.site].width in ("key", "one"):
            raise CannotMake(
                node, f"`{point.site}` has no vectors with directions",
                "name a site of vectors, such as `resid_post layer 2`",
            )  # fmt: skip
        there = width(shape, point.site, point.layer)
        if family.width is not None and there != family.width:
            raise CannotMake(
                node, f"it has {family.width} numbers, vectors of `{point.site}` have {there}",
                "use it at a site as wide as the one that it was made at",
            )  # fmt: skip


def _laid_out(node: ast.Expr, family: Family, swept: Sequence[str], work: Work) -> DirectionTargets:
    names: list[str] = []
    columns: list[list[int]] = []
    for axis in family.axes:
        names.append(axis.name)
        there = work.axes.get(axis.name)
        if axis.name in work.loops or there is None or axis.name not in swept:
            if axis.name not in work.loops and work.family_axes.get(axis.name) != axis.labels:
                work.family_axes[axis.name] = axis.labels
                work.add_axis(Axis(axis.name, axis.labels, node.span))
            columns.append(list(range(len(axis))))
            continue
        columns.append([_shared(node, family, axis, label) for label in there.labels])
    members: dict[Key, Member] = {}
    for key in _keys(columns):
        members[key] = family.members[tuple(own[i] for own, i in zip(columns, key, strict=True))]
    return DirectionTargets(tuple(names), members, family.definitions)


def _keys(columns: Sequence[Sequence[int]]) -> list[Key]:
    from itertools import product

    return list(product(*(range(len(column)) for column in columns)))


def _shared(node: ast.Expr, family: Family, axis: Axis, label: Label) -> int:
    if label in axis.labels:
        return axis.labels.index(label)
    word = "token" if axis.name == "position" else axis.name
    example = f"{node.span.written}[{word} {axis.labels[0]}]"
    raise CannotMake(
        node,
        f"the rule sweeps `{axis.name}` too, and `{family.name}` has none for `{label}`",
        f"sweep the same values, or name a member: `{example}`",
    )


# --- expressions ----------------------------------------------------------------------------------


def _family(node: ast.Expr, work: Work, within: spec.Direction | None) -> Family | None:
    """What an expression stands for, in the line `within` or in a rule."""
    match node:
        case ast.Name(id=name):
            return _named(name, node, work)
        case ast.Index(name=name, index=ast.Ranked() as picked):
            family = _named(name, node, work)
            key = None if family is None else best_coordinates(node, picked, family, work)
            return None if family is None or key is None else _member(family, key)
        case ast.Index(name=name, index=index):
            family = _named(name, node, work)
            return None if family is None else _at(node, family, index, work)
        case ast.Call(name="unit", arguments=(argument,)):
            part = _family(_expression(argument.value), work, within)
            return part and combined(node, [part], lambda own: UnitVector(own[0]))
        case ast.Call(name=name) if name in WAYS and within is not None:
            if WAYS[name].at_a_site:
                return fit_family(node, within, work)
            return free_family(node, within, work)
        case ast.Negative() | ast.Binary():
            return _arithmetic(node, work, within)
        case _:
            raise CannotMake(
                node,
                "it is made here, and has no name",
                f"give it one: `direction d = {node.span.written} at …`",
            )


def _expression(node: ast.Node) -> ast.Expr:
    return node  # pyright: ignore[reportReturnType]


def _named(name: str, node: ast.Expr, work: Work) -> Family | None:
    if name not in work.families:
        definition = work.program.directions.get(name)
        work.families[name] = None
        if definition is not None:
            found = _family(definition.value, work, definition)
            work.families[name] = found and _called(name, found)
    return work.families[name]


def _called(name: str, family: Family) -> Family:
    """Under the name of its line."""
    from dataclasses import replace

    from mechdsl.resolve.families import member_name

    members = {
        key: replace(member, name=member_name(name, family.axes, key))
        for key, member in family.members.items()
    }
    definitions = tuple(dict.fromkeys((name, *family.definitions)))
    return Family(name, family.axes, members, family.width, definitions)


def _arithmetic(
    node: ast.Binary | ast.Negative, work: Work, within: spec.Direction | None
) -> Family | None:
    parts: list[Family] = []
    weights: list[float] = []

    def add(part: ast.Expr, weight: float) -> bool:
        match part:
            case ast.Negative(operand=operand):
                return add(operand, -weight)
            case ast.Binary(operator="+", left=left, right=right):
                return add(left, weight) and add(right, weight)
            case ast.Binary(operator="-", left=left, right=right):
                return add(left, weight) and add(right, -weight)
            case ast.Binary(operator="*", left=left, right=right):
                first = _number(left, work)
                second = _number(right, work) if first is None else None
                if first is not None:
                    return add(right, weight * first)
                if second is not None:
                    return add(left, weight * second)
            case ast.Binary(operator="/", left=left, right=right):
                number = _number(right, work)
                if number:
                    return add(left, weight / number)
                raise CannotMake(right, "it is divided by 0", "write another number")
            case _:
                family = _family(part, work, within)
                if family is None:
                    return False
                parts.append(family)
                weights.append(weight)
                return True
        reason = "directions are multiplied with numbers"
        raise CannotMake(part, reason, "a `for` variable stands in front: `add c * (a - b) to …`")

    if not add(node, 1.0):
        return None
    return combined(node, parts, lambda own: WeightedSum(tuple(zip(weights, own, strict=True))))


def _number(node: ast.Expr, work: Work) -> float | None:
    """A number of the file; None where it is none, or hangs on a loop."""

    def value(part: ast.Node) -> object:
        return work.program.parameters[getattr(part, "id", "")]

    try:
        found = evaluate(node, value)
    except (KeyError, TypeError, ZeroDivisionError, ValueError):
        return None
    return float(found) if isinstance(found, int | float) else None


# --- members --------------------------------------------------------------------------------------


def _member(family: Family, key: Key) -> Family:
    return Family(
        family.members[key].name, (), {(): family.members[key]}, family.width, family.definitions
    )


def _at(node: ast.Index, family: Family, index: ast.Node, work: Work) -> Family:
    """The member, or members, with some coordinates."""
    if not isinstance(index, ast.Coordinates):
        raise CannotMake(
            node,
            f"`{node.span.written}` says no coordinates of `{family.name}`",
            f"write them by name: `{_example(family)}`",
        )
    wanted: dict[str, tuple[str | None, list[int]]] = {}
    for each in index.items:
        name = "position" if each.word == "token" else each.word
        axis = family.axis(name)
        if axis is None:
            has = name_list([a.name for a in family.axes]) or "none: it is one direction"
            raise CannotMake(
                each, f"`{family.name}` doesn't sweep `{name}`", f"what it sweeps is {has}"
            )
        if name in wanted:
            raise CannotMake(each, f"`{each.word}` is named twice", "leave one of them out")
        wanted[name] = _values(each, axis, work)
    axes: list[Axis] = []
    for axis in family.axes:
        loop = wanted[axis.name][0] if axis.name in wanted else None
        if axis.name not in wanted:
            axes.append(axis)
        elif loop is not None and all(a.name != loop for a in axes):
            axes.append(Axis(loop, work.loops[loop], index.span))
    names = [axis.name for axis in axes]
    members: dict[Key, Member] = {}
    for key in keys_of(axes):
        own: list[int] = []
        for axis in family.axes:
            loop, values = wanted.get(axis.name, (axis.name, list(range(len(axis)))))
            own.append(values[0] if loop is None else values[key[names.index(loop)]])
        members[key] = family.members[tuple(own)]
    return Family(node.span.written, tuple(axes), members, family.width, family.definitions)


def _values(each: ast.Coordinate, axis: Axis, work: Work) -> tuple[str | None, list[int]]:
    """(the loop whose values they are, indices along the axis)."""
    value = each.value
    if isinstance(value, str) and value in work.loops:
        return value, [_of(each, axis, label) for label in work.loops[value]]
    if isinstance(value, str):
        known = work.program.parameters.get(value)
        if not isinstance(known, int) or isinstance(known, bool):
            raise CannotMake(
                each,
                f"`{value}` is neither a `for` variable around it nor a whole number of a `param`",
                f"write a number: `{each.word} {axis.labels[0]}`",
            )
        value = known
    return None, [_of(each, axis, value)]


def _of(each: ast.Coordinate, axis: Axis, value: Label) -> int:
    labels = [str(label).removeprefix("token ") for label in axis.labels]
    if str(value) not in labels:
        raise CannotMake(
            each, f"there is no `{each.word} {value}` in it", f"it has {name_list(labels)}"
        )
    return labels.index(str(value))


def _example(family: Family) -> str:
    said = [
        f"{'token' if axis.name == 'position' else axis.name} {axis.labels[0]}"
        for axis in family.axes
    ]
    return f"{family.name}[{', '.join(said)}]" if said else family.name
