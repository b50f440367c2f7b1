"""Holds tables and replies of any device and precision against plain hooks in fp32.

No fixed tolerance fits 16 bits. The plain hooks themselves run in the same precision on the same
inputs: mechdsl may be `MULTIPLE` times as far from fp32 as they are, or `CLOSE` where that is more.
The fp32 model has the rounded weights, so that rounding them widens nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import CLOSE
from benchmarks.model import Place, build, placed
from benchmarks.tools.base import Table
from benchmarks.tools.mechdsl import Mechdsl
from benchmarks.tools.plain import Plain
from benchmarks.work import Shape, Work
from benchmarks.writing import PROMPTS, TOKENS, Replies, Task, by_generate, by_mechdsl

MULTIPLE = 3.0
"""How many times further from fp32 than plain hooks mechdsl may be."""


@dataclass(frozen=True)
class Compared:
    """How far results are from those of plain hooks in fp32."""

    name: str
    error: float
    """Logits, the largest of mechdsl."""
    own: float
    """Logits, the largest of plain hooks in the same precision on the same device."""
    close: float = CLOSE
    """Logits that are allowed in any case."""

    @property
    def allowed(self) -> float:
        """Logits."""
        return max(self.close, MULTIPLE * self.own)

    @property
    def agrees(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.name}: off by {self.error:.1e} at most, plain hooks by {self.own:.1e}; "
            f"{self.allowed:.1e} are allowed"
        )


class RandomTask(Task):
    """Cells on random prompts of 8 to 16 tokens, on the model of a shape."""

    def __init__(self, shape: Shape, tokens: int, cells: int) -> None:
        self.model: Any = build(shape)
        self.config: Any = self.model.config
        self.config.bos_token_id = self.config.eos_token_id = None
        self.config.pad_token_id = 0
        self.tokens, self.cells = tokens, cells
        draw = torch.Generator().manual_seed(0)
        size = PROMPTS, TOKENS
        every = torch.randint(3, shape.vocabulary, size, generator=draw).tolist()
        self.prompts = [
            ids[: TOKENS // 2 + row % (TOKENS // 2 + 1)] for row, ids in enumerate(every)
        ]
        self.arrange()
        device = self.model.device
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)


def compare_table(name: str, work: Work, folder: Path, place: Place) -> Compared:
    """Run a work on a small model with mechdsl and with plain hooks there, and with these in fp32.

    Args:
        name: The work and the precision, as they are printed.
        work: A work on a small model.
        folder: The folder that `make` has written it to.
        place: Where mechdsl runs.
    """
    with placed(Place(dtype=place.dtype)):
        plain = Plain()
        plain.load(work, folder)
    plain.model.float()
    expected = plain.run(work.picks()).table
    with placed(place):
        tool = Mechdsl()
        tool.load(work, folder)
        found = tool.run(work.picks()).table
        with torch.device(place.device):  # where loops make their tensors
            same = Plain()
            same.load(work, folder)
            own = same.run(work.picks()).table
    return Compared(name, largest_difference(expected, found), largest_difference(expected, own))


def compare_replies(name: str, shape: Shape, place: Place, tokens: int, cells: int) -> Compared:
    """Let mechdsl and a loop of `model.generate` write on a small model, judged in fp32."""
    with placed(Place(dtype=place.dtype)):
        exact = RandomTask(shape, tokens, cells)
    exact.model.float()
    with placed(place), torch.inference_mode():
        own = by_generate(RandomTask(shape, tokens, cells))()
    with placed(place):
        found = by_mechdsl(RandomTask(shape, tokens, cells))()
    largest = float(exact.model(exact.ids).logits.abs().max())
    step = torch.finfo(place.dtype).eps * largest  # nearer logits may be equal in this precision
    return Compared(name, shortfall(exact, found), max(step, shortfall(exact, own)))


def largest_difference(expected: Table, found: Table) -> float:
    """Logits, over the cells of the first table; infinite where the second lacks one of them."""
    asked = np.isfinite(expected)
    if not asked.any() or not np.isfinite(found[asked]).all():
        return float("inf")
    return float(np.abs(expected[asked] - found[asked]).max())


@torch.inference_mode()
def shortfall(task: Task, replies: Replies) -> float:
    """By how many logits a written token is below the most likely one, at most.

    The model of the task gets each prompt with its reply in one whole pass, in which a plain hook
    does what the cell does. Infinite where a reply has another number of tokens.
    """
    device = task.model.device
    rows = torch.arange(len(task.prompts), device=device)[:, None]
    last = torch.tensor([len(ids) - 1 for ids in task.prompts], device=device)[:, None]
    steps = last + torch.arange(task.tokens, device=device)
    longest = task.longest + task.tokens - 1
    acts = (torch.arange(longest, device=device) >= last)[..., None]
    worst = 0.0
    for cell, texts in enumerate(replies):
        if [len(ids) for ids in texts] != [task.tokens] * len(task.prompts):
            return float("inf")
        layer, head = task.place(cell)
        span, factor = task.span(head), task.factor(cell)

        def write(
            _: nn.Module, args: tuple[Tensor], span: slice = span, factor: float = factor
        ) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., span] *= torch.where(acts, factor, 1.0).to(changed.dtype)
            return (changed,)

        whole = [ids + own[:-1] for ids, own in zip(task.prompts, texts, strict=True)]
        padded = [ids + [0] * (longest - len(ids)) for ids in whole]  # later tokens aren't seen
        handle = task.output(layer).register_forward_pre_hook(write)
        try:
            given = torch.tensor(padded, device=device)
            logits = task.model(given, use_cache=False).logits[rows, steps]
        finally:
            handle.remove()
        chosen = torch.tensor(texts, device=device)[..., None]
        below = logits.amax(-1) - logits.gather(-1, chosen)[..., 0]
        worst = max(worst, float(below.max()))
    return worst
