"""How many tokens go into one pass: settled before the first patched row, then kept.

With a size, a plan and one number of threads two runs are equal bit for bit: seconds and free
memory have no say but in the size itself, which stands in the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mechdsl.execute.sizes import ChosenBy, PassSizes
from mechdsl.hooks.attention_functions import scores_at_once
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.memory import free_memory, release
from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
from mechdsl.prompts.prompt_table import PromptTable

DEVICE_FACTOR = 8
"""How many times the tokens of a CPU's pass one takes elsewhere."""
LEAST_TOKENS = 256
MOST_TOKENS = 1 << 17
KEPT_SHARE = 0.25
"""Of the free memory, what unpatched runs may keep for the rows that start from them."""
MOST_REPLY_BYTES = 2 << 30
"""Of rows that write together, unless that is more than a quarter of the free memory."""


@dataclass
class Sizes:
    """How many tokens go into one pass, and into one batch of prompts, for one run of a file.

    Both are settled before the first patched row and kept. Only running out of memory changes the
    size of a pass then: it is halved, and what is left runs at half the size.
    """

    pass_tokens: int = PASS_TOKENS
    prompt_tokens: int = PROMPT_TOKENS
    limit: int = MOST_TOKENS
    """The largest pass that there is memory for."""
    reply_bytes: int = MOST_REPLY_BYTES
    """Room for keys, values and written vectors of the rows that write together."""
    chosen: ChosenBy = "default"
    """What `pass_tokens` comes from."""
    settled: bool = False
    """No size is tried any more."""

    @staticmethod
    def of(
        pass_tokens: int | None,
        prompt_tokens: int | None,
        uses: Iterable[tuple[LoadedModel, PromptTable]],
    ) -> Sizes:
        """What is given stands, and free memory is asked for nothing beside a given size of passes.

        uses: the models and prompts of the run.
        """
        if pass_tokens is not None:
            prompts = prompt_tokens or PROMPT_TOKENS
            return Sizes(pass_tokens, prompts, pass_tokens, chosen="given", settled=True)
        usual, limit, room = PASS_TOKENS * DEVICE_FACTOR, MOST_TOKENS, PROMPT_TOKENS
        replies = MOST_REPLY_BYTES
        for model, table in uses:
            if model.device.type == "cpu":
                usual = PASS_TOKENS
            free = max(0, free_memory(model.device) - scores_bytes(model.device))
            limit = min(limit, int(free * 0.5) // max(1, bytes_per_token(model)))
            room = min(room, int(free * KEPT_SHARE) // kept_bytes(model, table))
            replies = min(replies, int(free * KEPT_SHARE))
        limit = max(LEAST_TOKENS, limit)
        short = limit < usual or (prompt_tokens is None and room < PROMPT_TOKENS)
        prompts = prompt_tokens or max(1, room)
        chosen = "memory" if short else "default"
        return Sizes(min(usual, limit), prompts, limit, replies, chosen)

    @property
    def kept(self) -> PassSizes:
        """As it stands in the results."""
        return PassSizes(self.pass_tokens, self.prompt_tokens, self.chosen)

    def measure(self, rate: Callable[[int], float]) -> None:
        """Climb to the size with the highest rate: double and half of the best are tried once.

        rate: of a pass of so many tokens; 0 where there is none of that size.
        """
        self.settled = True
        rates = {self.pass_tokens: rate(self.pass_tokens)}
        if not rates[self.pass_tokens]:  # rows of a pass don't even fill this one
            return
        while True:
            best = max(rates, key=lambda size: rates[size])
            near = [
                size
                for size in (best * 2, best // 2)
                if size not in rates and LEAST_TOKENS <= size <= self.limit
            ]
            if not near:
                break
            rates[near[0]] = rate(near[0])
        self.pass_tokens, self.chosen = best, "measured"

    def halve(self) -> bool:
        """After running out of memory; false where nothing smaller is worth trying."""
        if self.pass_tokens <= 1:
            return False
        self.pass_tokens = self.limit = self.pass_tokens // 2
        self.chosen = "memory"
        release()
        return True


@contextmanager
def stopwatch() -> Generator[list[float]]:
    """A list that gets the seconds of the block that is run inside; its results are on the host by
    then, so that the device has nothing left to do."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def bytes_per_token(model: LoadedModel) -> int:
    """Of what one pass holds at once for a token: the MLP, the stream, queries, keys and values."""
    shape = model.shape
    heads = shape.n_heads * shape.d_head
    return model.dtype.itemsize * (3 * shape.d_mlp + 12 * shape.d_model + 6 * heads)


def scores_bytes(device: torch.device) -> int:
    """Of the scores that attention holds at once: in float32, the softmax of them, and a copy of
    each where it is made contiguous or cast."""
    return 4 * 4 * scores_at_once(device)


def kept_bytes(model: LoadedModel, table: PromptTable) -> int:
    """Of what unpatched runs keep for a token of a prompt, in all blocks and runs, and of the row
    that it has in the mask, which all blocks share."""
    shape = model.shape
    heads, shared = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    width = 3 * shape.d_model + 2 * heads + 4 * shared
    longest = max((len(row.ids) for run in table.runs.values() for row in run.rows), default=0)
    return max(1, model.dtype.itemsize * (width * shape.n_layers + longest) * len(table.runs))
