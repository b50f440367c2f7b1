"""Tokens of packed rows after the last block: adjacent, as single prompts, or as images."""

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
    """Sources of the tokens that enter a block."""

    carried: Tensor
    """[n] long, tokens of this block …"""
    carried_from: Tensor
    """… and their tokens in the block below."""
    fresh: Tensor
    """[m] long, tokens of this block whose input is that of the unpatched run …"""
    fresh_from: Tensor
    """… and their indices in the activation cache."""


@dataclass(frozen=True, eq=False)
class OutputTokens:
    """Tokens that continue after the last block, in the order of their numbers there."""

    put: BlockInput
    """Sources of the tokens: the last block, or the activation cache."""
    row: Ints
    column: Ints
    lanes: Ints
    """[row]"""
    left: Tensor
    """[cached token, d_model], output of the last block in the unpatched run."""
    width: int
    """Number of columns of the cached prompts."""
    size: int
    """Number of tokens that the pass continues with."""

    def assembled(self, output: Any) -> Tensor:
        """Return [1, n, d_model] from the output of the last block."""
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        return assemble_tokens(hidden, self.put, self.left)


class OutputSelection(Protocol):
    """Hooks after the last block of one pass."""

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """Run as a hook on the last block."""
        ...

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run as a hook before the unembedding."""
        ...

    def collected(self, output: Tensor) -> Tensor:
        """Return [n, …] of the tokens that are read, or of images that have one output."""
        ...


class OutputReader(ABC):
    """Method of reading positions after the last block."""

    def made_of(
        self, final: RowPositions, ids: Callable[[], Ints], real: NDArray[np.bool_]
    ) -> RowPositions:
        """Return the tokens that the outputs at these positions depend on.

        Args:
            ids: Returns [row, column], the token ids of the cached prompts.
            real: [row, column], true for tokens.
        """
        return final

    def asked(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Select the logits of positions, by their tokens' numbers."""
        return logits[numbers]

    def located(self, site: str, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return both indices into the model's tensor; None if they are as within blocks."""
        return None

    def index(self, site: str, final: Ints, rows: Ints, columns: Ints) -> Ints | None:
        """Return the token in the model's tensor, -1 if missing; None if it is as within blocks."""
        return None

    def taken(self, site: str, found: Tensor, rows: Ints, columns: Ints) -> Tensor | None:
        """Return the values read at these positions; None if they are as within blocks."""
        return None

    @abstractmethod
    def top(self, finals: OutputTokens) -> OutputSelection: ...


class TokenOutput(OutputReader):
    def top(self, finals: OutputTokens) -> OutputSelection:
        return _TokenHook(finals)


@dataclass(frozen=True)
class ImageOutput(OutputReader):
    reads: str
    """Source of the model's output, as in `CallConvention`."""

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
    """Output of classifiers that comes from one token, the only one of a row that continues."""

    reads: str
    """Source of the model's output, as in `CallConvention`."""
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
    """Hooks that place the tokens that are read before the others."""

    def __init__(self, finals: OutputTokens) -> None:
        self.finals = finals
        self.count = len(finals.row)

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """Keep the number of tokens, because some models rely on it."""
        found = self.finals.assembled(output)
        rest = found.new_zeros(1, self.finals.size - self.count, found.shape[2])
        found = torch.cat([found, rest], dim=1)
        return (found, *output[1:]) if isinstance(output, (tuple, list)) else found

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass only the tokens that are read to the unembedding."""
        return replace_activation(args, kwargs, get_activation(args, kwargs)[:, : self.count])

    def collected(self, output: Tensor) -> Tensor:
        return output[0, : self.count]


class _PromptHook:
    """Hooks that make each token a single prompt, whose first and last token it is."""

    def __init__(self, finals: OutputTokens) -> None:
        self.finals = finals

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """Return [token, 1, d_model]."""
        found = self.finals.assembled(output).transpose(0, 1)
        return (found, *output[1:]) if isinstance(output, (tuple, list)) else found

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None

    def collected(self, output: Tensor) -> Tensor:
        return output[0, : len(self.finals.row)]


class _ImageHook:
    """Hooks that restore whole images, with other tokens from the unpatched run."""

    def __init__(self, finals: OutputTokens, reads: str) -> None:
        self.finals = finals
        self.reads = reads
        device = finals.put.fresh.device
        self.row, self.column = (
            array_to_device(each, device) for each in (finals.row, finals.column)
        )

    def gather(self, module: Any, args: Any, output: Any) -> Any:
        """Return [row, T, d_model]."""
        finals = self.finals
        kept = finals.left.unflatten(0, (-1, finals.width))
        images = kept[array_to_device(finals.lanes, kept.device)]
        images[self.row, self.column] = finals.assembled(output)[0]
        return (images, *output[1:]) if isinstance(output, tuple) else images

    def cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None

    def collected(self, output: Tensor) -> Tensor:
        """Return each token's own output, or that of its image."""
        return output[self.row, self.column] if self.reads == "every token" else output


def assemble_tokens(below: Tensor, source: BlockInput | None, kept: Tensor | None) -> Tensor:
    """Return [1, N, d_model]: the tokens of a block."""
    if source is None:
        return below
    assert kept is not None
    count = len(source.carried) + len(source.fresh)
    hidden = below.new_empty(1, count, below.shape[2])
    hidden[0, source.carried] = below[0, source.carried_from]
    hidden[0, source.fresh] = kept[source.fresh_from]
    return hidden
