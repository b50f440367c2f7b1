"""How large a model must at least be for what a file names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mechdsl.program import spec
from mechdsl.resolve.loops import loop_axes
from mechdsl.resolve.resolved import Label
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def largest_named(program: spec.Program) -> dict[str, int]:
    """The highest index of a `layer`, `head`, `neuron` and `expert` that the file names."""
    found: dict[str, int] = {}
    for word, index in _named(program):
        found[word] = max(index, found.get(word, 0))
    return found


def _named(program: spec.Program) -> Iterator[tuple[str, int]]:
    for experiment in program.experiments:
        values = _highest(loop_axes(experiment.loops, program.parameters, []).labels)
        values |= {n: v for n, v in program.parameters.items() if isinstance(v, int)}
        for part in (*experiment.every_rule, *experiment.measures, *experiment.expects):
            for name in type(part).model_fields:
                yield from _indices(getattr(part, name), values)
        for rule in experiment.every_rule:
            if rule.into_layer is not None:
                into = ast.Axis("layer", False, (rule.into_layer,), span=rule.span)
                yield from _indices(into, values)
    for group in program.groups.values():
        yield from _indices(group.sites, {})


def _indices(tree: object, values: dict[str, int]) -> Iterator[tuple[str, int]]:
    for node in walk(tree):
        if isinstance(node, ast.ShortSite):
            yield "layer", node.layer
            if node.index is not None:
                yield ("neuron" if node.unit == "N" else "head"), node.index
        elif isinstance(node, ast.Axis):
            for bound in walk(node.values):
                if isinstance(bound, ast.Bound):
                    yield node.word, _index(bound, values)


def _index(bound: ast.Bound, values: dict[str, int]) -> int:
    if bound.name is not None:
        return values.get(bound.name, 0) + bound.offset
    return bound.value or 0


def _highest(loops: Mapping[str, Sequence[Label]]) -> dict[str, int]:
    """The highest number that each of the loops takes."""
    numbers = {name: [n for n in own if isinstance(n, int)] for name, own in loops.items()}
    return {name: max(own, default=0) for name, own in numbers.items()}
