"""The plain way to write: a whole pass over prompt and reply for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.generate.acting import Chosen, over_replies
from mechdsl.generate.records import StepRules
from mechdsl.generate.states import States
from mechdsl.hooks.batch import Batch, to_device
from mechdsl.hooks.block_exchange import blocks_replaced
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite, written
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import run_whole

Held = dict[SiteRead, Tensor]
"""Keys and values [token, heads, d_head] of all layers, of the tokens of one state so far."""


class WholePasses:
    """Each pass computes all tokens again, with all that was written at each of them.

    Where that doesn't give the tokens in front of the newest one as they were (kept keys and values
    were edited behind the prefill; blocks were exchanged in some of the steps), their keys and
    values are written as they were, and so is what steps are taken of, before any rule.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[tuple[int, ...]],
        prefill: RuleWrites,
        kept: Sequence[SiteWrite],
        steps: Sequence[StepRules],
        tokens: int,
        limit: int,
    ) -> None:
        """tokens: of a reply, at most. limit: tokens of one pass."""
        self.model = model
        self.prompts = prompts
        self.prefill = prefill
        self.kept = kept
        self.steps = steps
        self.limit = limit
        before = dict(prefill.blocks)
        mixed = any(blocks_of(steps, step) != before for step in range(1, tokens))
        self._holds = bool(kept) or mixed
        every = (*prefill.writes, *(write for rules in steps for write in rules.writes))
        stepped = (replace(write.where, before=True) for write in every if write.mode == "step")
        self._stepped = list(dict.fromkeys(stepped))
        """Sites that steps are taken of."""
        self._held: list[Held] = []
        """[state] of the step before."""

    @property
    def own(self) -> Ints:
        """[row] the tokens that only its prefill computes."""
        return np.array([len(prompt) for prompt in self.prompts])

    def arranged(self, states: States, ids: Ints) -> States:
        """In any order."""
        return states

    def close(self) -> None:
        """Every pass takes its hooks away."""

    def logits(self, states: States, ids: Ints) -> Tensor:
        """[state, vocab] behind the newest token of each state.

        ids: [row, step] the replies so far.
        """
        rows: list[int] = states.leaders.tolist()
        step = ids.shape[1]
        held = self._before(states, Chosen(len(self.prompts), rows), step)
        longest = max(len(self.prompts[row]) for row in rows) + step
        each = max(1, self.limit // longest)
        self._held = []
        return torch.cat(
            [
                self._part(rows[first : first + each], held[first : first + each], ids)
                for first in range(0, len(rows), each)
            ]
        )

    def _part(self, rows: Sequence[int], held: Sequence[Held], ids: Ints) -> Tensor:
        """[n, vocab] of the states that these rows lead, in one pass."""
        step = ids.shape[1]
        batch = Batch.of(
            [[*self.prompts[row], *ids[row].tolist()] for row in rows],
            self.model.pad_id,
            self.model.calling.side,
            self.model.device,
        )
        chosen = Chosen(len(self.prompts), rows)
        lengths = torch.tensor([len(self.prompts[row]) for row in rows])
        later = [
            chosen.step(self.steps, earlier, lengths, lengths + earlier - 1)
            for earlier in range(1, step + 1)
        ]
        acting = over_replies(chosen.rules(self.prefill), later)
        blocks = blocks_of(self.steps, step) if step else dict(self.prefill.blocks)
        acting = replace(acting, blocks=tuple(sorted(blocks.items())))
        return self._run(acting, acting.numbered(batch), held)

    def _run(self, acting: RuleWrites, batch: Batch, held: Sequence[Held]) -> Tensor:
        """held: [state], or empty."""
        last = (batch.lengths - 1)[:, None]
        every = any(write.site == "logits" for write in acting.writes)
        reads = self._reads(acting) if self._holds else []
        again = [_as_written(read, [each[read] for each in held]) for read in reads if held]
        # A step begins with vectors before all rules; what else is held is written after them.
        begin, end = again[: len(self._stepped)], again[len(self._stepped) :]
        with blocks_replaced(self.model, acting.blocks):
            result = run_whole(
                self.model,
                batch,
                writes=[*begin, *acting.writes, *end],
                edges=acting.edges,
                reads=reads,
                logits_at=None if every else last,
            )
        assert result.logits is not None
        spans = [
            slice(start, start + length)
            for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        ]
        for number, span in enumerate(spans if self._holds else ()):
            own = {read: found[number, span] for read, found in result.reads.items()}
            for read in self._stepped if held else ():  # of each token, from its own pass
                own[read] = torch.cat([held[number][read], own[read][-1:]])
            self._held.append(own)
        if not every:
            return result.logits[:, 0]
        index = torch.arange(len(batch), device=result.logits.device)
        return result.logits[index, to_device(batch.starts + last[:, 0], index.device)]

    def _reads(self, acting: RuleWrites) -> list[SiteRead]:
        """What steps are taken of, and keys and values of all blocks that run."""
        shape, blocks = self.model.shape, {to: of is not None for to, of in acting.blocks}
        layers = [layer for layer in range(shape.n_layers) if blocks.get(layer, True)]
        every = [SiteRead(site, layer) for layer in layers for site in ("k", "v")]
        if not all(shape.has(read.site, read.layer) for read in every):
            raise ValueError(f"`{self.model.name}` has blocks without keys and values to keep")
        return [*self._stepped, *every]

    def _before(self, states: States, chosen: Chosen, step: int) -> list[Held]:
        """[state] what is held of the tokens in front of the newest; in the first step, edited.
        Nothing where nothing is."""
        if not self._holds or step == 0:
            return []
        held = [dict(self._held[parent]) for parent in states.parents.tolist()]
        for write in map(chosen.write, self.kept if step == 1 else ()):
            for row in write.rows.unique().tolist():
                own, mine = held[row], write.some(write.rows == row)
                index = mine.positions, mine.units
                own[write.where] = edited(own[write.where], mine, index)
        return held


def edited(now: Tensor, write: SiteWrite, index: tuple[Tensor, ...]) -> Tensor:
    """Kept keys or values with an edit of the vectors at these indices, each [K]."""
    now = now.clone()
    index = tuple(each.to(now.device) for each in index)
    values = write.values.to(now.device)
    if write.mode == "add":
        return now.index_put_(index, values.to(now), accumulate=True)
    to = None if write.to is None else write.to.to(now.device)
    return now.index_put_(index, written(write.mode, now[index], values, to))


def _as_written(read: SiteRead, found: Sequence[Tensor]) -> SiteWrite:
    """What was read of each row's first tokens ([token, heads, d_head]), to be written there."""
    heads = found[0].shape[1]
    counts = torch.tensor([len(each) for each in found])
    rows = torch.arange(len(found)).repeat_interleave(counts * heads)
    places = [torch.arange(int(count)).repeat_interleave(heads) for count in counts]
    units = torch.arange(heads).repeat(int(counts.sum()))
    values = torch.cat(list(found)).flatten(0, 1)
    return SiteWrite(read.site, read.layer, rows, torch.cat(places), units, values)


def blocks_of(steps: Sequence[StepRules], step: int) -> dict[int, int | None]:
    """Which blocks compute in the places of others in a step."""
    found: dict[int, int | None] = {}
    for rules in steps:
        if rules.acts(step):
            found |= dict(rules.blocks)
    return found
