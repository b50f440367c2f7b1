# pyright: reportUnknownMemberType=false
"""The next token of each row, and whether its reply ends there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.reply import Reply
from mechdsl.generate.records import Decoding


def next_tokens(
    logits: Tensor,
    states: Sequence[int],
    decoding: Decoding,
    random: Sequence[tuple[int, ...]],
    step: int,
) -> list[int | None]:
    """[row] the token that comes next; None where logits are no numbers.

    logits: [state, vocab]. states: [row]. random: [row] what its random numbers hang on, beside the
    step.
    """
    sound = logits.amax(-1).isfinite()
    if bool(sound.all()):
        return list(_tokens(logits, states, decoding, random, step))
    logits = logits.where(sound[:, None], logits.new_zeros(()))
    tokens = _tokens(logits, states, decoding, random, step)
    usable = sound.tolist()
    return [token if usable[state] else None for state, token in zip(states, tokens, strict=True)]


def _tokens(
    logits: Tensor,
    states: Sequence[int],
    decoding: Decoding,
    random: Sequence[tuple[int, ...]],
    step: int,
) -> list[int]:
    if not decoding.sampled:
        best = logits.argmax(-1).tolist()
        return [best[state] for state in states]
    index = torch.tensor(list(states), device=logits.device)
    drawn = torch.tensor([_uniform(key, step) for key in random], dtype=torch.float64)
    return _sampled(logits, index, drawn.to(logits.device), decoding)


def _uniform(key: tuple[int, ...], step: int) -> float:
    """In [0, 1), the same for a row and step whatever they are batched with."""
    seed = np.random.SeedSequence([*(each % 2**64 for each in key), step])
    return float(np.random.Generator(np.random.Philox(seed)).random())


def _sampled(logits: Tensor, states: Tensor, uniform: Tensor, decoding: Decoding) -> list[int]:
    """[row] of [state, vocab]: tokens in the order of their logits, of equal ones the lowest id
    first, until their probabilities together exceed the random number.

    top_k: these tokens alone. top_p: the fewest that together have so much of what is left (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751).
    """
    warm = logits.float() / (1.0 if decoding.temperature is None else decoding.temperature)
    ordered, ids = warm.sort(dim=-1, descending=True, stable=True)
    if decoding.top_k is not None:
        ordered, ids = ordered[:, : decoding.top_k], ids[:, : decoding.top_k]
    mass = ordered.softmax(-1).double().cumsum(-1)
    if decoding.top_p is not None:
        # Those in front of which less than top_p lies: the first one always.
        enough = (mass < decoding.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        whole = mass.gather(-1, enough)
    else:
        whole = mass[:, -1:]
    wanted = uniform[:, None] * whole[states]
    place = (mass[states] <= wanted).sum(-1, keepdim=True)
    place = torch.minimum(place, (mass < whole).sum(-1, keepdim=True)[states])
    return ids[states].gather(-1, place)[:, 0].tolist()


class Writing:
    """The replies as far as they are written."""

    def __init__(self, rows: int, decoding: Decoding) -> None:
        self.decoding = decoding
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self._done: dict[int, Reply] = {}

    def put(self, tokens: Mapping[int, int | None]) -> dict[int, int]:
        """The next token of rows; of those that go on, it alone."""
        going: dict[int, int] = {}
        most, ends, stops = self.decoding.tokens, self.decoding.ends, self.decoding.stops
        for row, token in tokens.items():
            if token is None:
                self._finish(row, "broken")
            elif token in ends:
                self._finish(row, "end")
            else:
                own = self.ids[row]
                own.append(token)
                if stops and self._stopped(row):
                    continue
                if len(own) == most:
                    self._finish(row, "length")
                else:
                    going[row] = token
        return going

    def _finish(self, row: int, ended: Literal["end", "length", "broken"]) -> None:
        own = self.ids[row]
        self._done[row] = Reply(tuple(own), self.decoding.decode(own), ended)

    def _stopped(self, row: int) -> bool:
        """Whether a stop text has come, where the reply ends then."""
        own, decode = self.ids[row], self.decoding.decode
        text = decode(own)
        found = [place for stop in self.decoding.stops if (place := text.find(stop)) >= 0]
        if not found:
            return False
        end, count = min(found), len(own)
        while count and decode(own[: count - 1]).startswith(text[:end]):
            count -= 1
        self._done[row] = Reply(tuple(own[:count]), text[:end], "stop")
        return True

    def replies(self) -> list[Reply]:
        """Of all rows, in order."""
        return [self._done[row] for row in range(len(self.ids))]
