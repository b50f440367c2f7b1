"""What a way to make a direction reads: the rows, the site and the position of each member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mechdsl.base.plural import plural
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import has_errors
from mechdsl.models.shape import width
from mechdsl.program import spec
from mechdsl.program.constants import Constant, constant
from mechdsl.program.lower_directions import WAYS, Rows, rows_of
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.direction_types import Fitted, Member, Sample
from mechdsl.resolve.families import CannotMake, Family, keys_of, member_name, position_words
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import Key, SitePoint, SiteTargets
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

FEWEST: Mapping[str, int] = {"pca": 2, "probe": 2}
"""Rows that a way needs."""


def fit_family(call: ast.Call, definition: spec.Direction, work: Work) -> Family | None:
    """A member for each value that the definition's site and positions sweep.

    None where something of it was refused, or isn't at hand. Raises CannotMake.
    """
    assert definition.site is not None
    before = len(work.diagnostics)
    context = replace(work.sites, loops={})
    sites, axes = resolve_site(definition.site, context)
    if sites is None or has_errors(work.diagnostics[before:]):
        return None
    points = {key: _points(call, definition, key, sites) for key in sites.points}
    rows = rows_of(call, work.program)
    samples = [_samples(call, each, definition, work) for each in rows]
    if any(each is None for each in samples):
        return None
    by_label = [each for each in samples if each is not None]
    labels = [label for label in by_label[0] if all(label in own for own in by_label[1:])]
    if not labels:
        at = "last token" if definition.at is None else definition.at.span.written
        raise CannotMake(call, f"no row has `{at}` in all that is read", "name another position")
    swept = list(axes)
    if len(labels) > 1:
        assert definition.at is not None
        swept.append(Axis("position", tuple(labels), definition.at.span))
    members: dict[Key, Member] = {}
    options = _options(call, work)
    for key in keys_of(swept):
        site_key, label = (key[:-1], labels[key[-1]]) if len(labels) > 1 else (key, labels[0])
        read = tuple(own[label] for own in by_label)
        _enough(call, read, label)
        if call.name == "probe":
            _kind(call, read[0], options)
        fitted = Fitted(call.name, read, points[site_key], options)
        made = _in_words(call.name, read, rows, options)
        made += f", at {sites.labels[site_key]}, {position_words(label)}"
        members[key] = Member(member_name(definition.name, swept, key), fitted, made)
    some = next(iter(points.values()))
    return Family(definition.name, tuple(swept), members, _width(some, work), (definition.name,))


def _points(
    call: ast.Call, definition: spec.Direction, key: Key, sites: SiteTargets
) -> tuple[SitePoint, ...]:
    """Where a member is read: one vector, or heads whose outputs are summed."""
    points, site = sites.points[key], definition.site
    assert site is not None
    if any(SITES[point.site].width in ("key", "one") for point in points):
        kind = SITES[points[0].site].width
        what = "vectors over keys" if kind == "key" else "single numbers"
        raise CannotMake(site, f"it has {what}, in which there are no directions",
                         "name a site of vectors, such as `resid_post layer 2`")  # fmt: skip
    summed = call.name == "mean" and all(point.site in ("z", "head_out") for point in points)
    if summed and all(point.unit is not None for point in points):
        return points
    if len(points) == 1 and (points[0].unit is not None or SITES[points[0].site].unit is None):
        return points
    several = "heads" if SITES[points[0].site].unit is not None else "layers"
    hint = f"name one, or sweep them: `{several.removesuffix('s')} *` makes a direction of each"
    raise CannotMake(site, f"it joins {several}, and a direction lies in one place", hint)


def _width(points: Sequence[SitePoint], work: Work) -> int:
    first = points[0]
    if len(points) > 1:
        return work.model.shape.d_model
    return width(work.model.shape, first.site, first.layer)


def _samples(
    call: ast.Call, rows: Rows, definition: spec.Direction, work: Work
) -> dict[str, Sample] | None:
    """The rows that are read, by the label of each position."""
    table = work.table if rows.key == "" else work.table.beside.get(rows.key)
    if table is None or table.stands_in or rows.run not in table.runs:
        return None
    run = table.runs[rows.run]
    if rows.model is not None and rows.model != work.model.name:
        run = replace(run, model=rows.model)
    at = definition.at or _last(call)
    parameters = {
        name: value
        for name, value in work.program.parameters.items()
        if isinstance(value, int | float)
    }
    cells, problems = resolve_positions(
        at, table, rows.run, tokenizer=work.model.tokenizer, loop_values=parameters
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if has_errors(problems):
        return None
    targets = _targets(call, table.runs[rows.run].rows)
    return {cell.label: Sample(table, run, cell, targets) for cell in cells}


def _last(call: ast.Call) -> ast.Positions:
    """`last token`."""
    span = Span(Source("last token", call.span.source.path), 0, len("last token"))
    edge = ast.EdgeToken("last", span=span)
    point = ast.Position(ast.Point(edge, span=span), span=span)
    return ast.Positions((point,), span=span)


def _targets(call: ast.Call, rows: Sequence[object]) -> tuple[float | str, ...]:
    """Per row, the value that a probe is fitted to."""
    if WAYS[call.name].takes != "value and block":
        return ()
    value = call.arguments[0].value
    name = value.id if isinstance(value, ast.Name) else ""
    every = [getattr(row, "values") for row in rows]  # noqa: B009
    if not every or name not in every[0]:
        known = ", ".join(f"`{each}`" for each in (every[0] if every else ()))
        raise CannotMake(
            value, f"`{value.span.written}` is no value of its rows", f"values are {known}"
        )
    found = [own[name] for own in every]
    if not all(isinstance(each, int | float | str) for each in found):
        raise CannotMake(value, f"`{name}` is no number or word in every row", "name another value")
    if any(isinstance(each, str) for each in found):
        return tuple(map(str, found))
    return tuple(map(float, found))


def _enough(call: ast.Call, read: Sequence[Sample], label: str) -> None:
    fewest = FEWEST.get(call.name, 1)
    for sample in read:
        there = used_rows(sample.cell)
        if there < fewest:
            many = "no row" if not there else f"{plural(there, 'row')} only"
            raise CannotMake(
                call,
                f"{many} of `{sample.table.name}` has `{label}`",
                f"it takes {fewest} at least: name a position that rows have",
            )


def _kind(call: ast.Call, sample: Sample, options: dict[str, Constant]) -> None:
    """What kind of probe it is: ridge for numbers, logistic for two classes. What isn't said is
    put in."""
    numbers = all(isinstance(each, float) for each in sample.classes)
    classes = len(sample.classes)
    kind = options.setdefault("kind", "ridge" if numbers else "logistic")
    options.setdefault("penalty", 1)
    name = call.arguments[0].value.span.written
    if classes < 2:
        raise CannotMake(call, f"`{name}` is the same in all rows", "name a value that differs")
    if kind == "ridge" and not numbers:
        raise CannotMake(call, f"`{name}` is no number", "write `kind: logistic`, for two classes")
    if kind == "logistic" and classes > 2:
        hint = "keep rows of two of them (`where`)" + ", or write `kind: ridge`" * numbers
        raise CannotMake(call, f"`{name}` has {classes} values, not two classes", hint)
    if kind == "logistic" and not float(options["penalty"]):
        raise CannotMake(call, "without a penalty it may have no minimum", "write `penalty: 1`")


def used_rows(cell: PositionCell) -> int:
    """How many rows have the position."""
    return sum(1 for row in cell.hits if any(row))


def _options(call: ast.Call, work: Work) -> dict[str, Constant]:
    """Numbers and words behind the blocks. Raises CannotMake for one that can't be."""
    found: dict[str, Constant] = {}
    for argument in call.arguments:
        if argument.name is None or argument.name in ("prompts", "limit"):
            continue
        value = argument.value
        given = value.id if isinstance(value, ast.Name) else None
        plain = given if argument.name == "kind" else constant(value, work.program.parameters)
        if argument.name == "kind" and isinstance(value, ast.String):
            plain = value.value
        problem = _problem(argument.name, plain)
        if problem is not None or plain is None:
            raise CannotMake(value, *(problem or ("it is no value", "write a number")))
        found[argument.name] = plain
    return found


def _problem(name: str, value: Constant | None) -> tuple[str, str] | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match name:
        case "component" if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return "components are counted from 1", "write `component: 2`"
        case "penalty" if not number or float(str(value)) < 0:
            return "a penalty is a number from 0 on", "write `penalty: 1`"
        case "kind" if value not in ("ridge", "logistic"):
            return f"there is no probe of the kind `{value}`", "write `ridge` or `logistic`"
        case _:
            return None


def _in_words(
    way: str, read: Sequence[Sample], rows: Sequence[Rows], options: Mapping[str, Constant]
) -> str:
    """`mean over the 40 rows of many − mean over the 38 rows of few`."""
    said = [_rows_in_words(sample, own) for sample, own in zip(read, rows, strict=True)]
    match way:
        case "mean_difference":
            return f"mean over {said[0]} − mean over {said[1]}"
        case "mean":
            return f"mean over {said[0]}"
        case "pca":
            number = options.get("component", 1)
            return f"principal component {number} of {said[0]}, its largest coordinate positive"
        case _:
            to = ""
            if options["kind"] == "logistic":
                first, second = (f"{each:g}" if isinstance(each, float) else each
                                 for each in read[0].classes)  # fmt: skip
                to = f", from `{first}` to `{second}`"
            return f"{options['kind']} probe{to}, penalty {options['penalty']}, on {said[0]}"


def _rows_in_words(sample: Sample, rows: Rows) -> str:
    used, every = used_rows(sample.cell), len(sample.table)
    count = plural(used, "row") if used == every else f"{used} of {plural(every, 'row')}"
    part = f".{rows.part}" if rows.part else ""
    run = "" if rows.run == "clean" else f" ({rows.run})"
    model = "" if rows.model is None else f" in {rows.model}"
    return f"{count} of {sample.table.name}{part}{run}{model}"
