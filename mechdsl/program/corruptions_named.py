"""Which corruptions of its block an experiment uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.walk import field_names, walk


def corruptions_named(experiment: spec.Experiment, program: spec.Program) -> frozenset[str]:
    """The corruptions of its block whose names are anywhere in an experiment, in one of its
    variants, or in one of the results of the same block: its rows are those that each of them
    changes. What directions are fitted on are rows of their own."""
    block = experiment.within or experiment.name
    words: set[str] = set()
    for each in program.experiments:
        if (each.within or each.name) == block:
            words.update(_words(each.model_copy(update={"name": "", "within": None})))
    runs = program.prompts[experiment.prompts].corruptions
    return frozenset(run.name for run in runs if run.name in words)


def _words(part: Any) -> Iterator[str]:
    """All texts within a part of a program, names among them."""
    match part:
        case str():
            yield part
        case ast.Node():
            for node in walk(part):
                for name in field_names(type(node)):
                    value = getattr(node, name)
                    if isinstance(value, str):
                        yield value
        case BaseModel():
            for name in type(part).model_fields:
                if name != "span":
                    yield from _words(getattr(part, name))
        case Mapping():
            yield from _words(tuple(cast("Mapping[Any, Any]", part).items()))
        case Sequence():
            for each in cast("Sequence[Any]", part):
                yield from _words(each)
        case _:
            pass
