# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Blocks that run on the first rows of a pass; the others take over what these give."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.generate.shared_blocks import Lineup
from mechdsl.hooks.hook_points import given_to, replaced
from mechdsl.hooks.loaded import LoadedModel

Place = tuple[int | str, ...]
"""Where a tensor stands among the arguments of a block: (0,), ("position_embeddings", 1)."""
Places = tuple[Mapping[Place, int], ...]
"""[block] tensors that have so many vectors for each row of the pass, those of a row side by side:
one, or one for each of its heads."""


@contextmanager
def only_first_rows(
    model: LoadedModel, lineup: Lineup, places: Places, running: Callable[[int | None], None]
) -> Generator[None]:
    """Blocks compute the rows that they have by `lineup`.

    running: is told how many rows a block has while it runs, and None behind it.
    """
    with ExitStack() as stack:
        for number, (block, each) in enumerate(zip(model.anatomy.blocks, places, strict=True)):
            count = lineup.rows(number)
            if count == len(lineup):
                continue
            module = model.module.get_submodule(block.path)
            others = torch.from_numpy(lineup.like[count:])
            some = partial(_some, module, module.forward, count, others, each, running)
            stack.enter_context(replaced(module, some))
        yield


def _some(
    module: nn.Module,
    forward: Callable[..., Any],
    count: int,
    others: Tensor,
    places: Mapping[Place, int],
    running: Callable[[int | None], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a block returns, where all rows but the first ones are like some of these.

    others: [row behind them] which one.
    """
    every = len(given_to(args, kwargs))

    def cut(value: Any, place: Place) -> Any:
        if isinstance(value, Tensor):
            each = places.get(place, 0)
            return value[: each * count] if each and len(value) == each * every else value
        if type(value) in (tuple, list):
            return type(value)(cut(each, (*place, n)) for n, each in enumerate(value))
        if type(value) is dict:
            return {name: cut(each, (*place, name)) for name, each in value.items()}
        return value

    running(count)
    try:
        found = forward(
            *(cut(each, (n,)) for n, each in enumerate(args)),
            **{name: cut(each, (name,)) for name, each in kwargs.items()},
        )
    finally:
        running(None)
    several = isinstance(found, (tuple, list))
    hidden: Tensor = found[0] if several else found
    grown = torch.cat([hidden, hidden[others.to(hidden.device)]])
    return type(found)([grown, *found[1:]]) if several else grown


@contextmanager
def noting_lengths(model: LoadedModel) -> Generator[list[dict[Place, int]]]:
    """[block] the first dimensions of tensors that blocks are called with, where they stand."""
    found: list[dict[Place, int]] = [{} for _ in model.anatomy.blocks]
    with ExitStack() as stack:
        for number, block in enumerate(model.anatomy.blocks):

            def note(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                for name, value in (*enumerate(args), *kwargs.items()):
                    for place, tensor in _tensors(value, (name,)):
                        found[number][place] = len(tensor) if tensor.dim() else 0

            module = model.module.get_submodule(block.path)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield found


def by_row(few: dict[Place, int], rows: int, more: dict[Place, int]) -> Mapping[Place, int]:
    """Vectors for each row, where these grow with them. few: lengths in a pass of so many rows;
    more: of one more."""
    return {
        place: length // rows
        for place, length in few.items()
        if length and length % rows == 0 and more.get(place) == length + length // rows
    }


def _tensors(value: Any, place: Place) -> Iterator[tuple[Place, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif type(value) in (tuple, list):
        for n, each in enumerate(value):
            yield from _tensors(each, (*place, n))
    elif type(value) is dict:
        for name, each in value.items():
            yield from _tensors(each, (*place, name))
