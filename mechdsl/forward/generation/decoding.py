"""Choice of the next token of each row, and the end of replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import array_to_device, to_device
from mechdsl.vocab.metrics import Reply


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where a reply ends."""

    tokens: int
    """Maximum number of tokens."""
    decode: Callable[[Sequence[int]], str]
    """Converts token ids to text."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a reply and aren't part of it."""
    stops: tuple[str, ...] = ()
    """Texts that end a reply; the reply stops before the first of them."""
    suppressed: frozenset[int] = frozenset()
    """Tokens that are never chosen."""
    suppressed_first: frozenset[int] = frozenset()
    """Tokens that aren't chosen as the first one of a reply."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled; otherwise the first token of the largest logit is chosen."""
        return (self.temperature, self.top_k, self.top_p) != (None, None, None)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("a reply must have at least one token")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError("the temperature must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError("top_k must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError("top_p must be above 0 and at most 1")


NO_TOKEN = -1
"""Marks invalid logits, and positions after the end of a reply."""

LOGIT_BINS, BINS_PER_UNIT = 2048, 64
"""Bins of logits below the largest one; those further below share the last bin."""


def choose_next_tokens(
    logits: Tensor,
    states: Ints,
    decoding: Decoding,
    random: Sequence[tuple[int, ...]],
    step: int,
) -> Ints:
    """Return [row]: the next token; NO_TOKEN if logits are invalid.

    Args:
        logits: [state, vocab].
        states: [row].
        decoding: How tokens are chosen.
        random: [row] seed of its random numbers, together with the step.
    """
    never = decoding.suppressed if step else decoding.suppressed | decoding.suppressed_first
    if never:
        ids = torch.tensor(sorted(never), device=logits.device)
        logits = logits.index_fill(-1, ids, -torch.inf)
    if decoding.sampled:
        sound = logits.amax(-1).isfinite()
        logits = logits.where(sound[:, None], logits.new_zeros(()))
        index = array_to_device(states, logits.device)
        drawn = torch.tensor([_draw_uniform(key, step) for key in random], dtype=torch.float64)
        tokens = _sample_tokens(logits, index, to_device(drawn, logits.device), decoding)
        return tokens.where(sound[index], NO_TOKEN).cpu().numpy()
    return _choose_likeliest(logits)[states]


def _choose_likeliest(logits: Tensor) -> Ints:
    """Return [state]: the first token with the largest logit."""
    if logits.is_cpu and logits.dtype in (torch.float32, torch.float64):  # numpy is faster here
        tokens = torch.from_numpy(logits.numpy().argmax(-1))
    else:
        tokens = logits.argmax(-1)
    sound = logits.gather(-1, tokens[:, None])[:, 0].isfinite()
    return tokens.where(sound, NO_TOKEN).cpu().numpy()


def _draw_uniform(key: tuple[int, ...], step: int) -> float:
    """Draw from [0, 1); equal for a row and step in any batch."""
    seed = np.random.SeedSequence([*(each % 2**64 for each in key), step])
    return float(np.random.Generator(np.random.Philox(seed)).random())


def _sample_tokens(logits: Tensor, states: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """Return [row] tokens sampled from [state, vocab] by inversion of the random number.

    Tokens are ordered by logit, and by id for equal logits; the first one at which the cumulative
    probability exceeds the random number is chosen. top_k keeps this many tokens. top_p keeps the
    smallest set with this share of the remaining probability (nucleus sampling, Holtzman et al.
    2020, arXiv 1904.09751).
    """
    warm = logits.float() / (1.0 if decoding.temperature is None else decoding.temperature)
    if decoding.top_k is None and decoding.top_p is None:
        return _sample_from_all(warm, states, uniform)
    if decoding.top_k is not None:
        ordered, ids = _find_top(warm, min(decoding.top_k, warm.shape[-1]))
    else:
        ordered, ids = warm.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1).double().cumsum(-1)
    if decoding.top_p is not None:
        # Tokens preceded by less than top_p, so always the first one.
        enough = (mass < decoding.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        whole = mass.gather(-1, enough)
    else:
        whole = mass[:, -1:]
    wanted = uniform[:, None] * whole[states]
    place = (mass[states] <= wanted).sum(-1, keepdim=True)
    place = torch.minimum(place, (mass < whole).sum(-1, keepdim=True)[states])
    return ids[states].gather(-1, place)[:, 0]


def _find_top(warm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of [state, vocab] and their ids, [state, k]; ties by lowest id."""
    least = warm.topk(k).values[:, -1:]
    with_equal = int((warm >= least).sum(-1).amax())
    ids = warm.topk(with_equal).indices.sort(-1).values
    ordered, place = warm.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered[:, :k], ids.gather(-1, place)[:, :k]


def _sample_from_all(warm: Tensor, states: Tensor, uniform: Tensor) -> Tensor:
    """Return [row] tokens sampled from [state, vocab], as in `_sample_tokens`.

    Only tokens with logits near the sampled one's are sorted.
    """
    probability = warm.softmax(-1).double()
    bins = ((warm.amax(-1, keepdim=True) - warm) * BINS_PER_UNIT).clamp(max=LOGIT_BINS - 1).long()
    sums = (
        probability.new_zeros(len(warm), LOGIT_BINS).scatter_add_(-1, bins, probability).cumsum(-1)
    )
    last = (sums < sums[:, -1:]).sum(-1)
    wanted = uniform * sums[states, -1]
    mask = torch.minimum((sums[states] <= wanted[:, None]).sum(-1), last[states])
    before = torch.where(mask > 0, sums[states, mask - 1], 0.0)
    rows, ids = (bins.short()[states] == mask[:, None]).nonzero().unbind(-1)
    order = warm[states[rows], ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    rows, ids = rows[order], ids[order]
    # `bincount` would wait for the device to find the largest number.
    count = rows.new_zeros(len(states)).index_add_(0, rows, torch.ones_like(rows))
    first = count.cumsum(0) - count
    mass = probability[states[rows], ids].cumsum(0)
    mass = mass - (mass - probability[states[rows], ids])[first][rows] + before[rows]
    place = torch.zeros_like(count).index_add_(0, rows, (mass <= wanted[rows]).long())
    return ids[first + torch.minimum(place, count - 1)]


class ReplyBuffer:
    """Replies generated so far."""

    def __init__(self, rows: int, decoding: Decoding) -> None:
        self.decoding = decoding
        self.ids = np.full((rows, decoding.tokens), NO_TOKEN)
        """[row, token]"""
        self._count = np.zeros(rows, dtype=np.int64)
        """[row] number of tokens so far."""
        self._ends = np.array(sorted(decoding.ends), dtype=np.int64)
        self._done: dict[int, Reply] = {}

    def put(self, rows: Ints, tokens: Ints) -> Ints:
        """Add the next token of some rows; returns NO_TOKEN for rows whose reply is finished."""
        broken, ends = tokens < 0, np.isin(tokens, self._ends)
        self._finish(rows[broken], "broken")
        self._finish(rows[ends], "end")
        goes = ~(broken | ends)
        on = rows[goes]
        self.ids[on, self._count[on]] = tokens[goes]
        self._count[on] += 1
        if self.decoding.stops:
            goes[goes] = [not self._stopped(row) for row in on.tolist()]
        full = goes & (self._count[rows] == self.decoding.tokens)
        self._finish(rows[full], "length")
        return np.where(goes & ~full, tokens, NO_TOKEN)

    def _own(self, row: int) -> list[int]:
        return self.ids[row, : self._count[row]].tolist()

    def _finish(self, rows: Ints, ended: Literal["end", "length", "broken"]) -> None:
        for row in rows.tolist():
            numbers = self._own(row)
            self._done[row] = Reply(tuple(numbers), self.decoding.decode(numbers), ended)

    def _stopped(self, row: int) -> bool:
        """Finish the reply if it contains a stop text, and return whether it does."""
        numbers, decode = self._own(row), self.decoding.decode
        text = decode(numbers)
        ends = [place for stop in self.decoding.stops if (place := text.find(stop)) >= 0]
        if not ends:
            return False
        end, count = min(ends), len(numbers)
        while count and decode(numbers[: count - 1]).startswith(text[:end]):
            count -= 1
        self._done[row] = Reply(tuple(numbers[:count]), text[:end], "stop")
        return True

    def replies(self) -> list[Reply]:
        """Return the replies of all rows, in order."""
        return [self._done[row] for row in range(len(self.ids))]
