"""What `auroc(effect, truth)` is told is true: sites, or a variable of the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import UnknownName, did_you_mean
from mechdsl.syntax import ast
from mechdsl.validate.conditions import CellSelection, full_component, truth_of
from mechdsl.validate.site_selections import RefusedCondition, selection, unreadable
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from mechdsl.base.source import Span
    from mechdsl.validate.known_cells import KnownCells


def column_of(argument: ast.Argument, of: KnownCells) -> str | None:
    """The variable of the prompts that is meant, whose values are true or false; None where it is
    a group or sites. E0201 where it is nothing, E0606 where it is several or no truth value."""
    name = _lone_name(argument)
    if name is None:
        return None
    columns, groups = of.known.columns, of.known.groups
    a_site = name in groups or full_component(name) in SITES
    if columns is None:
        return None if a_site else name
    span = argument.value.span
    if name not in columns:
        if a_site:
            return None
        words = (*groups, *columns)
        variables = name_list(columns) or "none"
        listed = f"write sites as a list, `[L9H9]`; variables of the prompts are {variables}"
        kind = "group or variable of the prompts"
        hint = did_you_mean(name, words, listed)
        raise RefusedCondition(UnknownName(span=span, kind=kind, name=name, hint=hint))
    if a_site:
        other = "a group" if name in groups else "a component"
        reason = f"`{name}` is {other} and a variable of the prompts"
        raise unreadable(span, reason, "give one of them another name")
    _check_values(name, columns[name], span, all_rows=of.known.all_rows)
    return name


def _check_values(name: str, values: Sequence[object], span: Span, *, all_rows: bool) -> None:
    """E0606 for a variable that isn't both true and false."""
    hint = "take one that is 0 or 1, such as `large = if count > 5 then 1 else 0`"
    other = next((value for value in values if truth_of(value) is None), None)
    if other is not None:
        raise unreadable(
            span, f"`{name}` is neither true nor false: it is `{other}` in a row", hint
        )
    if all_rows and len({truth_of(value) for value in values}) == 1:
        raise unreadable(span, f"`{name}` is {values[0]} in every row", hint)


def true_cells(
    argument: ast.Argument, where: Sequence[CellSelection], of: KnownCells
) -> tuple[CellSelection, ...]:
    """The sites of a group or a list, one of which a cell has to have to be true. E0606 for one
    that no cell has, and where all cells that are ranked are true, or none."""
    found = tuple(selection(site) for site in _sites(argument, of))
    span, cells = argument.value.span, of.known.cells
    if cells is None:
        return found
    for each in found:
        if not of.find((each,)):
            of.not_one(span, (each,), [])
    ranked = of.find(where)
    if not ranked:
        of.not_one(span, where, [])
    if of.known.open_axes:
        return found
    true = [i for i in ranked if any(each.matches(cells[i]) for each in found)]
    if len(true) in (0, len(ranked)):
        which = "every" if true else "no"
        reason = f"{which} cell that is ranked is at `{span.written}`"
        hint = "it compares cells that are true with others: rank more cells, or name fewer"
        raise unreadable(span, reason, hint)
    return found


def _sites(
    argument: ast.Argument, of: KnownCells
) -> Iterator[ast.Expr | ast.Range | ast.Quantity | ast.Site]:
    value = argument.value
    if argument.name is not None:
        reason = f"`{argument.span.written}` doesn't say what is true"
        hint = f"write a group or a list of sites, as in `{of.true_example}`"
        raise unreadable(argument.span, reason, hint)
    listed = value.items if isinstance(value, ast.ListOf) else (value,)
    for each in listed:
        name = _name(each)
        if name is not None and name in of.known.groups:
            yield from of.known.groups[name]
        else:
            yield each


def _lone_name(argument: ast.Argument) -> str | None:
    return _name(argument.value) if argument.name is None else None


def _name(value: ast.Expr | ast.Range | ast.Quantity | ast.Site) -> str | None:
    """A lone word, which reads as a group of sites too."""
    if isinstance(value, ast.Site) and len(value.names) == 1 and not value.axes:
        return value.names[0].id
    return value.id if isinstance(value, ast.Name) else None
