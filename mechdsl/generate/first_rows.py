# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Blocks and attention that run on the first rows of a pass; the others take over what these
give."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor, nn

from mechdsl.base.arrays import Ints
from mechdsl.generate.shared_blocks import Lineup
from mechdsl.hooks.batch import on_device
from mechdsl.hooks.hook_points import given_again, given_to, replaced
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.anatomy import BlockAnatomy

Place = tuple[int | str, ...]
"""Where a tensor stands among the arguments of a module: (0,), ("position_embeddings", 1)."""
PerRow = Mapping[Place, int]
"""Tensors that have so many vectors for each row of the pass, those of a row side by side: one, or
one for each of its heads."""


@dataclass(frozen=True)
class Places:
    """Where rows stand in the calls of modules that can compute some of the rows alone."""

    blocks: tuple[PerRow, ...]
    """[block]"""
    attention: tuple[PerRow, ...] = ()
    """[block] of its attention; empty if that computes what the rest of the block does."""
    several: bool = True
    """Whether that holds for several tokens of each row too."""


def attention_path(block: BlockAnatomy) -> str | None:
    """The module that makes queries of what it is called with, attends, and projects `z`; None
    where that isn't one within the block."""
    z = block.taps.get("z")
    if z is None or z.side != "in" or z.path != block.output or not block.projections:
        return None
    parts = [path.split(".") for path in (*block.projections, z.path)]
    common = list(takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False)))
    path = ".".join(names[0] for names in common)
    return path if path.startswith(f"{block.path}.") and path != z.path else None


@contextmanager
def only_first_rows(
    model: LoadedModel, lineup: Lineup, places: Places, running: Callable[[int], None]
) -> Generator[None]:
    """Blocks, and their attention, compute the rows that they have by `lineup`.

    running: is told how many rows there are from now on.
    """
    with ExitStack() as stack:
        for number, (block, each) in enumerate(
            zip(model.anatomy.blocks, places.blocks, strict=True)
        ):
            few, count = lineup.attending(number), lineup.rows(number)
            if count < len(lineup):
                module = model.module.get_submodule(block.path)
                some = partial(_block, module.forward, count, lineup.like[count:], each, running)
                stack.enter_context(replaced(module, some))
            if places.attention and few < count:
                stack.enter_context(
                    _attention(model, block, lineup, number, places.attention[number], running)
                )
        yield


def _block(
    forward: Callable[..., Any],
    count: int,
    others: Ints,
    places: PerRow,
    running: Callable[[int], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a block returns, where all rows but the first ones are like some of these.

    others: [row behind them] which one.
    """
    every = len(given_to(args, kwargs))
    running(count)
    found = _of_first(forward, count, places, args, kwargs)
    running(every)
    several = isinstance(found, (tuple, list))
    hidden = _grown(found[0] if several else found, others)
    return type(found)([hidden, *found[1:]]) if several else hidden


@contextmanager
def _attention(
    model: LoadedModel,
    block: BlockAnatomy,
    lineup: Lineup,
    number: int,
    places: PerRow,
    running: Callable[[int], None],
) -> Generator[None]:
    """A block's attention has fewer rows up to `z`, and those of the block from there on."""
    few, count = lineup.attending(number), lineup.rows(number)
    path = attention_path(block)
    assert path is not None
    assert block.output is not None
    attention, output = (model.module.get_submodule(each) for each in (path, block.output))
    forward = attention.forward

    def attend(*args: Any, **kwargs: Any) -> Any:
        running(few)
        return _of_first(forward, few, places, args, kwargs)

    def grow(module: nn.Module, args: Any, kwargs: Any) -> Any:
        running(count)
        z = _grown(given_to(args, kwargs), lineup.like[few:count])
        return given_again(args, kwargs, z)

    # In front of what reads and writes `z`.
    handle = output.register_forward_pre_hook(grow, prepend=True, with_kwargs=True)
    try:
        with replaced(attention, attend):
            yield
    finally:
        handle.remove()


def _of_first(
    forward: Callable[..., Any], count: int, places: PerRow, args: Any, kwargs: Any
) -> Any:
    """What is returned for the first rows alone."""
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

    return forward(
        *(cut(each, (n,)) for n, each in enumerate(args)),
        **{name: cut(each, (name,)) for name, each in kwargs.items()},
    )


def _grown(rows: Tensor, others: Ints) -> Tensor:
    """With more rows, each of which is like one of these."""
    every = np.concatenate([np.arange(len(rows)), others])
    return rows.index_select(0, on_device(every, rows.device))


@contextmanager
def noting_lengths(model: LoadedModel, paths: Sequence[str]) -> Generator[list[dict[Place, int]]]:
    """[path] the first dimensions of tensors that modules are called with, where they stand."""
    found: list[dict[Place, int]] = [{} for _ in paths]
    with ExitStack() as stack:
        for number, path in enumerate(paths):

            def note(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                for name, value in (*enumerate(args), *kwargs.items()):
                    for place, tensor in _tensors(value, (name,)):
                        found[number][place] = len(tensor) if tensor.dim() else 0

            module = model.module.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield found


def by_row(few: dict[Place, int], rows: int, more: dict[Place, int]) -> PerRow:
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
