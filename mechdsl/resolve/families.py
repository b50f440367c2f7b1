"""Families of directions: one for every layer, head or position that a definition sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mechdsl.resolve.direction_types import Member, Vector
from mechdsl.resolve.resolved import Axis, Label
from mechdsl.resolve.resolved_rule import Key
from mechdsl.syntax import ast


class CannotMake(Exception):
    """Why there is no such direction, and what to write."""

    def __init__(self, node: ast.Node, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class Family:
    """Directions of one width over some axes; one direction where there are none."""

    name: str
    axes: tuple[Axis, ...]
    members: Mapping[Key, Member]
    width: int | None
    """None where only the file that it is in knows."""
    definitions: tuple[str, ...] = ()
    """Names of the `direction` lines that it is made of."""

    def axis(self, name: str) -> Axis | None:
        return next((axis for axis in self.axes if axis.name == name), None)


def member_name(name: str, axes: Sequence[Axis], key: Key) -> str:
    """`refusal[layer 3, token -1]`."""
    said = [_coordinate(axis, axis.labels[i]) for axis, i in zip(axes, key, strict=True)]
    return f"{name}[{', '.join(said)}]" if said else name


def _coordinate(axis: Axis, label: Label) -> str:
    return position_words(label) if axis.name == "position" else f"{axis.name} {label}"


def position_words(label: Label) -> str:
    """`token -2`, `last token`."""
    return f"token {label}" if str(label).lstrip("-").isdigit() else str(label)


def keys_of(axes: Sequence[Axis]) -> list[Key]:
    return list(product(*(range(len(axis)) for axis in axes)))


def combined(
    node: ast.Node, parts: Sequence[Family], make: Callable[[Sequence[Vector]], Vector]
) -> Family:
    """Of several families one: members of the same layer, head and position go together."""
    axes: dict[str, Axis] = {}
    for axis in (axis for part in parts for axis in part.axes):
        known = axes.setdefault(axis.name, axis)
        if known.labels != axis.labels:
            raise CannotMake(
                node,
                f"its parts sweep different values of `{axis.name}`",
                "let them sweep the same ones, or name a member of each",
            )
    widths = {part.width for part in parts if part.width is not None}
    if len(widths) > 1:
        several = " and ".join(map(str, sorted(widths)))
        raise CannotMake(
            node, f"its parts have {several} numbers", "combine directions of sites of one width"
        )
    names = list(axes)
    members: dict[Key, Member] = {}
    text = " ".join(node.span.written.split())
    for key in keys_of(list(axes.values())):
        own = [
            part.members[tuple(key[names.index(axis.name)] for axis in part.axes)] for part in parts
        ]
        made = "; ".join(dict.fromkeys(each.made for each in own))
        name = member_name(text, list(axes.values()), key)
        members[key] = Member(name, make([each.vector for each in own]), made)
    definitions = dict.fromkeys(each for part in parts for each in part.definitions)
    width = next(iter(widths), None)
    return Family(text, tuple(axes.values()), members, width, tuple(definitions))
