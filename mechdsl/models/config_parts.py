"""What can't be true of a config: sizes that no model has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import ModelTooLarge, PartNotFound, ShapeUnknown
from mechdsl.models.config_keys import COUNTED, EXPERTS, HEAD_WIDTH, MOST


def part_of(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The config of a part, or all of it where it isn't divided."""
    for key in keys:
        if isinstance(nested := config.get(key), Mapping):
            return cast(Mapping[str, Any], nested)
    return config


def impossible_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Keys that say a size, with a value that is none: below 1, or no whole number. Lists are of
    models whose blocks differ, and null is what the library makes of it."""
    for keys, least in (*((keys, 1) for keys in COUNTED), (HEAD_WIDTH, 0), (EXPERTS, 0)):
        for key in keys:
            value = config.get(key)
            if value is None or isinstance(value, bool | list | Mapping):
                continue
            if not isinstance(value, int) or value < least:
                yield key, value
            break  # the others aren't read


def size_too_large(config: Mapping[str, Any], model: str, span: Span | None) -> Diagnostic | None:
    """E0430 for a number that no model has; what is made of it would fill the memory."""
    for key, value in {**part_of(config, "ffn_config"), **config}.items():
        most = MOST.get(key)
        if most is not None and isinstance(value, int) and abs(value) > most:
            return ModelTooLarge(span=span, model=model, key=key, number=value, most=most)
    return None


def without_blocks(
    refused: list[Diagnostic], staged: str, *, model: str, named: str
) -> list[Diagnostic]:
    """E0409 in place of numbers that are missing, of a kind that has no list of blocks alike.

    staged: what it has instead; empty where it isn't of that kind. named: the class of the model.
    """
    if not staged or not all(isinstance(each, ShapeUnknown) for each in refused):
        return refused
    hint = "take a vision transformer whose blocks are alike: ViT, DeiT, DINOv2, BEiT, CLIP"
    span, part = refused[0].span, "list of blocks"
    return [
        PartNotFound(
            span=span, model=model, architecture=named, part=part, reason=staged, hint=hint
        )
    ]


def is_written(config: Mapping[str, Any], found: Iterable[Diagnostic]) -> bool:
    """Whether a number that could not be read stands in the config all the same."""
    keys = {key for problem in found if isinstance(problem, ShapeUnknown) for key in problem.named}
    return any(key in config for key in keys)
