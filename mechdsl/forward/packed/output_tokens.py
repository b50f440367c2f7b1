"""The tokens of packed rows after the last block: side by side, as single prompts, or as images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import RowPositions, array_to_device
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import get_activation, replace_activation


@dataclass(frozen=True, eq=False)
class BlockInput:
    """Where the tokens that enter a block come from."""

    carried: Tensor
    """[n] long, tokens of this block …"""
    carried_from: Tensor
    """… and of the one below."""
    fresh: Tensor
    """[m] long, tokens of this block whose input is the unpatched run's …"""
    fresh_from: Tensor
    """… at this place of what was kept."""


@dataclass(frozen=True, eq=False)
class OutputTokens:
    """Tokens that go on behind the last block, in the order of their numbers there."""

    put: BlockInput
    """Where the tokens of the last block come to lie, and which are kept ones."""
    row: Ints
    column: Ints
    lanes: Ints
    """[row]"""
    left: Tensor
    """[kept token, d_model], what left the last block of the unpatched run."""
    width: int
    """Columns of the kept prompts."""
    size: int
    """Tokens that a pass goes on with."""

    def assembled(self, output: Any) -> Tensor:
        """[1, n, d_model] of what the last block returns."""
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        return assemble_tokens(hidden, self.put, self.left)


class OutputSelection(Protocol):
    """What is done behind the last block of one pass."""

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """A hook on the last block."""
        ...

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook in front of the unembedding."""
        ...

    def collected(self, output: Tensor) -> Tensor:
        """[n, …] of the tokens that are read, or of images that have one output."""
        ...


class OutputReader(ABC):
    """How places behind the last block are found."""

    def made_of(
        self, final: RowPositions, ids: Callable[[], Ints], real: NDArray[np.bool_]
    ) -> RowPositions:
        """The tokens that have to be there for the outputs at these places.

        ids: gives [row, column], the token ids of the kept prompts. real: [row, column], true
        where there is a token.
        """
        return final

    def asked(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The logits of places, by their tokens' numbers."""
        return logits[numbers]

    def located(self, site: str, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """First and second index of the model's tensor; None where that's as within blocks."""
        return None

    def index(self, site: str, final: Ints, rows: Ints, columns: Ints) -> Ints | None:
        """The token of the model's tensor, -1 where it isn't there; None as above."""
        return None

    def taken(self, site: str, found: Tensor, rows: Ints, columns: Ints) -> Tensor | None:
        """What was read at these places; None as above."""
        return None

    @abstractmethod
    def top(self, finals: OutputTokens) -> OutputSelection: ...


class TokenOutput(OutputReader):
    def top(self, finals: OutputTokens) -> OutputSelection:
        return _TokenHook(finals)


@dataclass(frozen=True)
class ImageOutput(OutputReader):
    reads: str
    """What the model makes its output of, as in `Calling`."""

    def made_of(
        self, final: RowPositions, ids: Callable[[], Ints], real: NDArray[np.bool_]
    ) -> RowPositions:
        if self.reads == "every token":
            return final
        count = real.shape[1] if self.reads == "all tokens" else 1
        row, position = np.indices((len(real), count)).reshape(2, -1)
        return row, position

    def asked(self, logits: Tensor, numbers: Tensor) -> Tensor:
        return logits[numbers] if self.reads == "every token" else logits

    def located(self, site: str, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        return (rows, positions) if site == "logits" else None

    def index(self, site: str, final: Ints, rows: Ints, columns: Ints) -> Ints | None:
        if site != "final_norm":
            return None
        return np.where(final[rows, columns] >= 0, rows * final.shape[1] + columns, -1)

    def taken(self, site: str, found: Tensor, rows: Ints, columns: Ints) -> Tensor | None:
        if site != "logits":
            return None
        return found[array_to_device(rows, found.device), array_to_device(columns, found.device)]

    def top(self, finals: OutputTokens) -> OutputSelection:
        return _ImageHook(finals, self.reads)


@dataclass(frozen=True)
class PromptOutput(OutputReader):
    """Of classifiers whose output is made of one token: that is all of a row that goes on."""

    reads: str
    """What the model makes its output of, as in `Calling`."""
    skips: int | None

    def made_of(
        self, final: RowPositions, ids: Callable[[], Ints], real: NDArray[np.bool_]
    ) -> RowPositions:
        rows, _ = final
        if self.reads == "first token":
            return rows, np.zeros_like(rows)
        read = real if self.skips is None else real & (ids() != self.skips)
        position = np.where(read, real.cumsum(axis=1) - 1, 0).max(axis=1)
        return rows, position[rows]

    def top(self, finals: OutputTokens) -> OutputSelection:
        return _PromptHook(finals)


def choose_output(model: LoadedModel) -> OutputReader:
    if model.shape.takes == "image":
        return ImageOutput(model.calling.reads)
    calling = model.calling
    return (
        TokenOutput()
        if calling.reads == "every token"
        else PromptOutput(calling.reads, calling.skips)
    )


class _TokenHook:
    """Tokens that are read, side by side in front of the others."""

    def __init__(self, finals: OutputTokens) -> None:
        self.finals = finals
        self.count = len(finals.row)

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """As many tokens as went in, as some models rely on it."""
        found = self.finals.assembled(output)
        rest = found.new_zeros(1, self.finals.size - self.count, found.shape[2])
        found = torch.cat([found, rest], dim=1)
        return (found, *output[1:]) if isinstance(output, (tuple, list)) else found

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Only these tokens are unembedded."""
        return replace_activation(args, kwargs, get_activation(args, kwargs)[:, : self.count])

    def collected(self, output: Tensor) -> Tensor:
        return output[0, : self.count]


class _PromptHook:
    """Tokens that are read, each as a prompt by itself: the first one and the last."""

    def __init__(self, finals: OutputTokens) -> None:
        self.finals = finals

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """[token, 1, d_model]."""
        found = self.finals.assembled(output).transpose(0, 1)
        return (found, *output[1:]) if isinstance(output, (tuple, list)) else found

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None

    def collected(self, output: Tensor) -> Tensor:
        return output[0, : len(self.finals.row)]


class _ImageHook:
    """Rows as whole images again: what is read of them, and the unpatched run's other tokens."""

    def __init__(self, finals: OutputTokens, reads: str) -> None:
        self.finals = finals
        self.reads = reads
        device = finals.put.fresh.device
        self.row, self.column = (
            array_to_device(each, device) for each in (finals.row, finals.column)
        )

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """[row, T, d_model]."""
        finals = self.finals
        kept = finals.left.unflatten(0, (-1, finals.width))
        images = kept[array_to_device(finals.lanes, kept.device)]
        images[self.row, self.column] = finals.assembled(output)[0]
        return (images, *output[1:]) if isinstance(output, tuple) else images

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None

    def collected(self, output: Tensor) -> Tensor:
        """Each token's own output, or that of its image."""
        return output[self.row, self.column] if self.reads == "every token" else output


def assemble_tokens(below: Tensor, source: BlockInput | None, kept: Tensor | None) -> Tensor:
    """[1, N, d_model]: the tokens of a block."""
    if source is None:
        return below
    assert kept is not None
    count = len(source.carried) + len(source.fresh)
    hidden = below.new_empty(1, count, below.shape[2])
    hidden[0, source.carried] = below[0, source.carried_from]
    hidden[0, source.fresh] = kept[source.fresh_from]
    return hidden
