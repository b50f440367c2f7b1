"""Division of rows into passes: members, groups, pass sizes, and replies generated in advance.

For equal pass size, plan and number of threads, two runs are equal bit for bit. Time and free
memory affect only the size itself, which the results report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.measurement.readout import ReplySearchFailed
from mechdsl.execute.run_record import PassSizes, SizeOrigin
from mechdsl.forward.hooks.attention import get_max_scores
from mechdsl.forward.hooks.batch import (
    REPLY_BYTES,
    BlockPairs,
    get_free_memory,
    get_reply_bytes,
    is_out_of_memory,
    release_memory,
)
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.restart import Shortcuts
from mechdsl.models.shape import ModelShape
from mechdsl.planner.cost import SharedRows, settles_circuits
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, ExperimentPlan, Panel, Plan, batch_size
from mechdsl.planner.rows import PassMember
from mechdsl.program.python_functions import PythonFailure
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.types import SitePoint, count_numbers
from mechdsl.vocab.metrics import Reply
from mechdsl.vocab.sites import SITES

DEVICE_TOKEN_FACTOR = 8
"""Factor from the tokens of a pass on a CPU to those on other devices."""

MIN_PASS_TOKENS = 256

MAX_PASS_TOKENS = 1 << 17

WIDTH_RANGE = 1.5
"""Factor between the numbers of tokens of rows of circuits in padded passes that are sorted by
circuit first. Each circuit of a pass costs about as much as 40 tokens of padding."""

CACHE_MEMORY_SHARE = 0.25
"""Share of free memory that unpatched runs may use for rows that start from them."""


@dataclass
class PassSizer:
    """Number of tokens in one pass, and in one batch of prompts, for one run of a file.

    Both are fixed before the first patched row. Until then, batches are halved if memory runs out.
    After that, only a lack of memory changes the size of passes: it is halved, and the remaining
    rows run at half the size.
    """

    pass_tokens: int = PASS_TOKENS
    prompt_tokens: int = PROMPT_TOKENS
    limit: int = MAX_PASS_TOKENS
    """Largest pass that fits in memory."""
    reply_bytes: int = REPLY_BYTES
    """Space for keys, values and written vectors of the rows that generate text together."""
    chosen: SizeOrigin = "default"
    """Origin of `pass_tokens`."""
    settled: bool = False
    """Whether no further size is tried."""

    @staticmethod
    def of(
        pass_tokens: int | None,
        prompt_tokens: int | None,
        uses: Iterable[tuple[LoadedModel, PromptTable]],
    ) -> PassSizer:
        """Choose sizes; given ones are used unchanged.

        With a given pass size, free memory isn't queried.

        uses: models and prompts of the run.
        """
        if pass_tokens is not None:
            prompts = prompt_tokens or PROMPT_TOKENS
            return PassSizer(pass_tokens, prompts, pass_tokens, chosen="given", settled=True)
        usual, limit, room = PASS_TOKENS * DEVICE_TOKEN_FACTOR, MAX_PASS_TOKENS, PROMPT_TOKENS
        replies: list[int] = []
        for model, table in uses:
            if model.device.type == "cpu":
                usual = PASS_TOKENS
            free = max(0, get_free_memory(model.device) - estimate_score_bytes(model.device))
            limit = min(limit, int(free * 0.5) // max(1, estimate_token_bytes(model)))
            room = min(room, int(free * CACHE_MEMORY_SHARE) // estimate_cache_bytes(model, table))
            replies.append(min(get_reply_bytes(model.device), int(free * CACHE_MEMORY_SHARE)))
        limit = max(MIN_PASS_TOKENS, limit)
        short = limit < usual or (prompt_tokens is None and room < PROMPT_TOKENS)
        prompts = prompt_tokens or max(1, room)
        chosen = "memory" if short else "default"
        replied = min(replies, default=REPLY_BYTES)
        return PassSizer(min(usual, limit), prompts, limit, replied, chosen)

    @property
    def kept(self) -> PassSizes:
        """The sizes as recorded in results."""
        return PassSizes(self.pass_tokens, self.prompt_tokens, self.chosen)

    def measure(self, rate: Callable[[int], float]) -> None:
        """Search for the size with the highest rate, by repeated tries of its double and half.

        rate: rate of a pass with this number of tokens; 0 if there is no such pass.
        """
        self.settled = True
        rates = {self.pass_tokens: rate(self.pass_tokens)}
        if not rates[self.pass_tokens]:  # the rows don't even fill a pass of this size
            return
        while True:
            best = max(rates, key=lambda size: rates[size])
            near = [
                size
                for size in (best * 2, best // 2)
                if size not in rates and MIN_PASS_TOKENS <= size <= self.limit
            ]
            if not near:
                break
            rates[near[0]] = rate(near[0])
        self.pass_tokens, self.chosen = best, "measured"

    def halve(self) -> bool:
        """Halve the size after memory ran out; returns False if it can't be reduced."""
        if self.pass_tokens <= 1:
            return False
        self.pass_tokens = self.limit = self.pass_tokens // 2
        self.chosen = "memory"
        release_memory()
        return True

    def reduce_batches(self, panel: Panel) -> bool:
        """Halve the batches of prompts after memory ran out; False if they have one prompt each."""
        prompts = self._count_prompts(panel)
        if prompts == 1:
            return False
        while self._count_prompts(panel) == prompts:
            self.prompt_tokens //= 2
        return True

    def _count_prompts(self, panel: Panel) -> int:
        return min(batch_size(panel, self.prompt_tokens), len(panel.table))


@contextmanager
def measure_seconds() -> Generator[list[float]]:
    """Measure the seconds of the block, which are appended to the yielded list.

    Its results must be on the host at the end, so that the device is idle.
    """
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def estimate_token_bytes(model: LoadedModel) -> int:
    """Estimate a pass's bytes per token: MLP, stream, queries, keys and values."""
    shape = model.shape
    widest = shape.largest(lambda block: 3 * block.neurons + 6 * block.queries)
    return model.dtype.itemsize * (widest + 12 * shape.d_model)


def estimate_score_bytes(device: torch.device) -> int:
    """Estimate the bytes of attention scores held at once.

    They are the scores in float32, their softmax, and a contiguous or cast copy of each.
    """
    return 4 * 4 * get_max_scores(device)


def estimate_cache_bytes(model: LoadedModel, table: PromptTable) -> int:
    """Estimate the bytes that unpatched runs store per prompt token, in all blocks and runs.

    This includes the token's row in the mask, which all blocks share.
    """
    shape = model.shape
    width = sum(3 * shape.d_model + 2 * b.queries + 4 * b.keys for b in shape.blocks)
    longest = max((len(row.ids) for run in table.runs.values() for row in run.rows), default=0)
    return max(1, model.dtype.itemsize * (width + longest) * len(table.runs))


MIN_TRIAL_PASSES = 200
"""Number of passes below which trials of other sizes cost more than they save."""

MIN_FILLED_SHARE = 0.7
"""Share of its size that a pass must fill to measure the size's speed."""


def build_size_trial(
    one_pass: Callable[[Ints], None],
    group: Ints,
    widths: Ints,
    work: Floats,
) -> Callable[[int], float]:
    """Build a function that measures work per second of a pass with this number of tokens.

    It takes the better of two measurements, and returns 0 if there is no such pass.

    Args:
        one_pass: Runs these distinct rows.
        group: Rows that may share a pass, by width.
        widths: [distinct row] tokens.
        work: [distinct row] blocks times tokens.
    """
    group = group[len(group) // 2 :]  # the first ones are the narrowest
    ends = np.cumsum(widths[group])

    def rate(tokens: int) -> float:
        chosen = group[: int(np.searchsorted(ends, tokens, side="right"))]
        if int(widths[chosen].sum()) < MIN_FILLED_SHARE * tokens:
            return 0.0
        took: list[float] = []
        try:
            for _ in range(2):
                with measure_seconds() as seconds:
                    one_pass(chosen)
                took += seconds
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            return 0.0
        except (PythonFailure, ReplySearchFailed):  # it fails again in the pass that reports it
            return 0.0
        return float(work[chosen].sum()) / max(min(took), 1e-9)

    return rate


def compute_row_widths(
    shared: SharedRows, shortcuts: Shortcuts | None, plans: Sequence[ExperimentPlan]
) -> tuple[Ints, Floats]:
    """Return per distinct row: its number of tokens, and blocks times tokens."""
    widths = np.zeros(len(shared), dtype=np.int64)
    blocks = np.zeros(len(shared), dtype=np.int64)
    for number, plan in enumerate(plans):
        indices = np.flatnonzero(shared.owner == number)
        if not len(indices):
            continue
        rows = shared.rows.take(indices)
        lengths = plan.lengths(rows)
        own_cuts = None if plan.whole else shortcuts
        first = plan.leftmost(rows) if own_cuts and own_cuts.prefix else np.zeros_like(lengths)
        widths[indices] = np.maximum(1, lengths - first) * plan.draws * plan.token_weight
        low = plan.lowest[rows.cell] if own_cuts and own_cuts.resume else 0
        blocks[indices] = np.maximum(1, plan.experiment.model.shape.n_layers - low)
    return widths, widths * blocks.astype(np.float64)


def group_rows(
    shared: SharedRows, plan: Plan, plans: Sequence[ExperimentPlan], widths: Ints, *, packs: bool
) -> Iterator[tuple[PromptRun, Ints]]:
    """Yield groups of rows that can share passes, with rows of equal columns adjacent. Rows of
    circuits are sorted by circuit, so that a pass has few circuits; in full passes, by ranges of
    columns first, so that it has little padding.

    They start from the same run, have the same number of draws, the same blocks replaced in the
    same steps of replies, and are all full passes or all packed; if rows aren't joined, they belong
    to one cell. Packed rows of circuits share no pass with others, because they are computed in all
    blocks. Nor do those that leave out nodes, because others may need steps inside of these nodes.

    Args:
        packs: Whether rows can be packed.
    """
    runs: list[PromptRun] = []
    start = np.zeros(len(shared), dtype=np.int64)
    draws = np.zeros(len(shared), dtype=np.int64)
    whole = np.zeros(len(shared), dtype=np.int64)
    circuit = np.zeros(len(shared), dtype=np.int64)
    blocks = np.zeros(len(shared), dtype=np.int64)
    settles = np.zeros(len(shared), dtype=np.int64)
    has_circuit = np.zeros(len(shared), dtype=np.bool_)
    numbered: dict[tuple[BlockPairs, tuple[tuple[int, ...], ...]], int] = {}
    for number, experiment_plan in enumerate(plans):
        indices = np.flatnonzero(shared.owner == number)
        which = experiment_plan.starting_run(shared.rows.take(indices))
        numbers: list[int] = []
        for run in experiment_plan.starting_runs:
            known = [n for n, other in enumerate(runs) if other is run]
            numbers.append(known[0] if known else len(runs))
            if not known:
                runs.append(run)
        if len(indices):
            start[indices] = np.array(numbers, dtype=np.int64)[which]
            draws[indices] = experiment_plan.draws
            whole[indices] = experiment_plan.whole
            settles[indices] = plan.skips_inert and settles_circuits(experiment_plan)
        cells = shared.rows.cell[indices]
        if experiment_plan.ablates_circuits:
            circuit[indices], has_circuit[indices] = cells, True
        for cell in np.unique(cells).tolist():
            pairs = experiment_plan.replaced_blocks(cell), experiment_plan.block_steps(cell)
            blocks[indices[cells == cell]] = numbered.setdefault(pairs, len(numbered))
    is_packed = has_circuit & (whole == 0) & packs
    keys = [start, draws, whole, blocks, settles, is_packed]
    if not plan.joins_rows:
        keys += [shared.owner, shared.rows.cell]
    _, group = np.unique(np.stack(keys), axis=1, return_inverse=True)
    group = group.reshape(-1)
    ranges = np.where(is_packed, 0, np.where(has_circuit, _begin_ranges(widths), widths))
    order = np.lexsort((shared.rows.prompt, widths, circuit, ranges, group))
    for indices in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(indices):
            yield runs[int(start[indices[0]])], indices


def _begin_ranges(widths: Ints) -> Ints:
    """Return [row] the smallest width of the range that a row's width is in: the largest width of a
    range is at most `WIDTH_RANGE` times the smallest."""
    ranges, first = np.zeros_like(widths), 0
    for width in np.unique(widths).tolist():
        first = first if first and width <= WIDTH_RANGE * first else width
        ranges[widths == width] = first
    return ranges


def list_members(shared: SharedRows, chosen: Ints) -> list[PassMember]:
    """List the rows that these distinct rows represent, by experiment."""
    place = np.full(len(shared), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    members: list[PassMember] = []
    for number, (distinct, rows) in enumerate(shared.members):
        indices = np.flatnonzero(place[distinct] >= 0)
        if len(indices):
            members.append(PassMember(number, rows.take(indices), place[distinct[indices]]))
    return members


RowReplies = list[tuple[Reply, ...]]
"""[row and noise draw] one reply for each sample."""


class GroupGenerator:
    """Generator for a group's rows in order, as many at once as memory allows."""

    def __init__(
        self,
        write: Callable[[Ints], RowReplies],
        wanted: Callable[[Ints], Ints],
        group: Ints,
        lanes: Ints,
        each: Floats,
        sizes: PassSizer,
    ) -> None:
        """Prepare generation.

        Args:
            write: Returns the replies of distinct rows, those of one row adjacent.
            wanted: Selects the distinct rows that are measured.
            group: [row] distinct rows, in the order of their passes.
            lanes: [distinct row] number of its texts, over draws and samples.
            each: [distinct row] bytes of keys, values and written vectors.
            sizes: Limits for lanes and bytes.
        """
        self._write = write
        self._wanted = wanted
        self._group = group
        self._lanes = lanes
        self._each = each
        self._sizes = sizes
        self._found: dict[int, RowReplies] = {}

    def of(self, chosen: Ints) -> RowReplies:
        """Return the replies of some distinct rows; missing ones are generated."""
        while missing := [row for row in chosen.tolist() if row not in self._found]:
            self._write_from(missing[0])
        return [reply for row in chosen.tolist() for reply in self._found.pop(row)]

    def _write_from(self, row: int) -> None:
        """Generate text for a row and subsequent rows without replies."""
        rest = self._group[int(np.flatnonzero(self._group == row)[0]) :]
        rest = rest[np.isin(rest, list(self._found), invert=True)]
        count = min(
            int(np.searchsorted(self._lanes[rest].cumsum(), self._sizes.pass_tokens, side="right")),
            int(np.searchsorted(self._each[rest].cumsum(), self._sizes.reply_bytes, side="right")),
        )
        rows = self._wanted(rest[: max(1, count)])
        replies = self._write(rows)
        draws = len(replies) // len(rows)
        for number, written in enumerate(rows.tolist()):
            self._found[written] = replies[number * draws : (number + 1) * draws]


def estimate_reply_bytes(
    shared: SharedRows, plans: Sequence[ExperimentPlan], itemsize: int, shape: ModelShape
) -> Floats:
    """Estimate [distinct row] bytes for generation: all keys and values, and written vectors."""
    reply_bytes = np.zeros(len(shared))
    kept = 2 * sum(block.keys for block in shape.blocks)
    for number, plan in enumerate(plans):
        indices = np.flatnonzero(shared.owner == number)
        generation = plan.experiment.generation
        if not len(indices) or generation is None:
            continue
        rows = shared.rows.take(indices)
        lengths, lanes = plan.lengths(rows), plan.draws * generation.samples
        vectors = np.zeros(len(indices))
        for rule in plan.rules:
            if rule.rule.does.changes == "sites":
                wide = np.array([_count_cached_numbers(shape, point) for point in rule.point_table])
                row, point = rule.points.expand(rule.site_of_cell[rows.cell])
                vectors += np.bincount(row, wide[point], len(indices))
        tokens = kept * (lengths + generation.tokens) + vectors * (lengths + 1)
        reply_bytes[indices] = itemsize * lanes * tokens
    return reply_bytes


def _count_cached_numbers(shape: ModelShape, point: SitePoint) -> int:
    """Return how many numbers a point has per token; vectors over keys count as one head."""
    if SITES[point.site].width == "key":
        assert point.layer is not None
        return shape.in_stack(point.site)[0].blocks[point.layer].d_head
    return count_numbers(point, shape)
