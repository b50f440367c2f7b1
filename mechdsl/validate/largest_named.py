"""How large a model must at least be for what a file names."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.program import spec
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
        values = {loop.name: _highest(loop.domain) for loop in experiment.loops}
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


def _highest(domain: ast.Domain) -> int:
    """The highest number that a loop takes."""
    numbers = (node.value for node in walk(domain) if isinstance(node, ast.Number))
    return max((n for n in numbers if isinstance(n, int)), default=0)
