"""The quick way to write: one prefill, then passes over newest tokens, on kept keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.generate.acting import Chosen, joined, merged
from mechdsl.generate.cached_pass import CachedPass, NewTokens, PassArguments, keep, run_cached
from mechdsl.generate.kept_keys import KeptKeys
from mechdsl.generate.one_query import can_be_asked
from mechdsl.generate.records import StepRules
from mechdsl.generate.shared_blocks import SharedBlocks, lowest_acting
from mechdsl.generate.states import States, first_acting, numbered
from mechdsl.generate.way import Way
from mechdsl.generate.whole import edited
from mechdsl.hooks.batch import Batch, on_device, to_device
from mechdsl.hooks.block_exchange import blocks_replaced
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import run_whole

MIXED = 64
"""Tokens of a prefill that are computed once more rather than in a pass of their own."""


class CachedPasses:
    """Each token is computed once.

    In the prefill, the tokens in front of the first one of a row at which anything acts are
    computed once for each distinct prompt, and so are whole prompts on which nothing acts.
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
        *,
        way: Way,
    ) -> None:
        """tokens: of a reply, at most. limit: tokens of one pass. way: what may be shared."""
        self.model = model
        self.prompts = prompts
        self.prefill = prefill
        self.kept = kept
        self.steps = steps
        self.limit = limit
        self.columns = max(map(len, prompts))
        """Of all prompts, padded on the left."""
        self._lengths = np.array([len(prompt) for prompt in prompts])
        """[row] tokens of its prompt."""
        layers = model.shape.n_layers
        acting = first_acting(len(prompts), prefill, kept, steps)
        lowest = np.zeros_like(acting)
        if way.places is not None:
            lowest = lowest_acting(model, len(prompts), prefill, kept, steps)
            if not way.places.attention:
                lowest -= lowest % 2
        self._texts = numbered(prompts)
        """[row] the number of its prompt."""
        self._distinct = 1 + int(self._texts.max())
        """Prompts."""
        own = _own_tokens(prompts, prefill)
        most = int(own.max())
        begins = np.where(acting == 0, lowest, 2 * layers)
        half_blocks = self._distinct * 2 * layers + int((2 * layers - begins).sum())
        self._together = (
            way.places is not None
            and (way.places.several or most == 1)
            and not prefill.numbers
            and most > 0
            and all(write.mode != "step" for write in prefill.writes)
            and most * half_blocks <= 2 * layers * int(own.sum())
        )
        """Whether the prefill shares blocks as a step does, with as many tokens of each prompt,
        where that is less than its rows compute apart. A step reads the token before, which may be
        in the pass before."""
        self.own = own = np.full_like(own, most) if self._together else own
        """[row] the tokens that only its prefill computes."""
        edited = _own_tokens(prompts, RuleWrites(kept))
        apart = int(np.maximum(own, edited).max())
        shares = way.shares and 2 * self._distinct <= len(prompts) and can_be_asked(model)
        self._common = self.columns - apart if shares else 0
        """Columns that rows of a prompt have in common throughout."""
        self.keys = KeptKeys(layers, len(prompts), self.columns - self._common, tokens - 1)
        self._blocks = SharedBlocks(self._texts, acting, lowest, layers)
        self._places = way.places
        self._leaders = np.zeros(0, dtype=np.int64)
        """[state] rows of the step before; what follows is of these."""
        self._chosen: Chosen | None = None
        self._starting = torch.zeros(0)
        """[state] columns of first tokens."""
        self._few: dict[tuple[bool, ...], Sequence[StepRules]] = {}
        """What acts, by which of the rules do."""
        self._before: tuple[bool, ...] | None = None
        """Which rules acted in the step before; what they did is `_acted`."""
        self._acted = RuleWrites()
        self._open: CachedPass | None = None
        """The step before."""

    def arranged(self, states: States, ids: Ints) -> States:
        """The states of a step in the order in which it computes them.

        ids: [row, step] the replies so far.
        """
        step, rows = ids.shape[1], states.leaders
        if step == 0:
            self._blocks.begin(states)
            if not self._together:
                return states
        newest = ids[rows, -1] if step else np.zeros_like(rows)
        return self._blocks.arrange(states, newest, step)

    def logits(self, states: States, ids: Ints) -> Tensor:
        """[state, vocab] behind the newest token of each state.

        ids: [row, step] the replies so far.
        """
        step, rows = ids.shape[1], states.leaders
        if step == 0:
            return self._prefill_together(states) if self._together else self._prefill(states)
        first = self.columns + step - 1
        self.keys.move(self._blocks.moves, first)
        newest = on_device(ids[rows, -1:], self.model.device)
        if self._chosen is None or not np.array_equal(rows, self._leaders):
            self._leaders, self._before = rows, None
            self._chosen, self._starting = Chosen(len(self.prompts), rows), self._starts(rows)
            if self.keys.shared is not None:
                self.keys.shared.stand(self._texts[rows])
        acts = tuple(rules.acts(step) for rules in self.steps)
        if self._open is not None and self._goes_on(self._open, acts):
            return self._open.run_on(newest)
        self.close()
        if step == 1:
            self._edit(states, self._chosen)
        tokens = NewTokens(newest, self._starting, first)
        acting = self._acting(self._chosen, step, acts)
        every, lineup = slice(0, len(states)), self._blocks.lineup
        self._open = CachedPass(self.model, tokens, self.keys, every, acting, lineup, self._places)
        return self._open.run()

    def _goes_on(self, before: CachedPass, acts: tuple[bool, ...]) -> bool:
        """Whether the same acts on the same rows as in the pass before."""
        return before.repeats and acts == self._before and before.lineup is self._blocks.lineup

    def close(self) -> None:
        """No hooks are left."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _prefilled(self, chosen: Chosen) -> RuleWrites:
        """What acts in the prefill."""
        return merged(chosen.rules(self.prefill), len(chosen.rows))

    def _acting(self, chosen: Chosen, step: int, acts: tuple[bool, ...]) -> RuleWrites:
        """What acts in a step; mostly what acted in the one before."""
        lengths = self.columns - self._starting.cpu()
        newest = lengths + step - 1
        if acts != self._before or self._acted.edges:
            every = chosen.step(self._joined(acts), step, lengths, newest)
            self._before, self._acted = acts, merged(every, len(chosen.rows))
        writes = [replace(each, positions=newest[each.rows]) for each in self._acted.writes]
        return replace(self._acted, writes=writes)

    def _joined(self, acts: tuple[bool, ...]) -> Sequence[StepRules]:
        """Those that act, in few writes: rows change more often than what acts."""
        if acts not in self._few:
            now = [rules for rules, does in zip(self.steps, acts, strict=True) if does]
            always = [replace(rules, first=1, last=None) for rules in now]
            self._few[acts] = joined(always, len(self.prompts))
        return self._few[acts]

    def _starts(self, rows: Ints) -> Tensor:
        """[n] columns of first tokens."""
        return torch.from_numpy(self.columns - self._lengths[rows])

    # --- the prefill ------------------------------------------------------------------------

    def _prefill(self, states: States) -> Tensor:
        rows = states.leaders
        own = self.own[rows]
        found: list[Tensor] = []
        shared = self._shared(states, own)
        if shared is not None:
            found.append(shared)
        for part in _parts(own, self.limit):
            found.append(self._suffix(rows, part, int(own[part].max())))
        return torch.cat(found)

    def _prefill_together(self, states: States) -> Tensor:
        """The same in shared blocks, some columns at a time."""
        rows, lineup = states.leaders, self._blocks.lineup
        self._shared(states, self.own[rows])
        acting, batch = self._prefilled(Chosen(len(self.prompts), rows)), self._batch(rows)
        if self.keys.shared is not None:
            self.keys.shared.stand(self._texts[rows])

        def part(first: int, end: int) -> PassArguments:
            tokens = NewTokens(batch.ids[:, first:end], batch.starts, first)
            every, mine = slice(0, len(rows)), tokens.acting(acting)
            return self.model, tokens, self.keys, every, mine, lineup, self._places

        first, count = self.columns - int(self.own.max()), max(1, self.limit // len(rows))
        # Only the last token needs all of the last block, whose rows are these.
        n_layers = self.model.shape.n_layers
        alone = lineup.rows(n_layers - 1) * (self.columns - 1 - first) > MIXED * n_layers
        last = self.columns - 1 if alone else max(first, self.columns - count)
        while first < last:
            end = min(first + count, last)
            keep(*part(first, end))
            first = end
        return run_cached(*part(first, self.columns))

    def _shared(self, states: States, own: Ints) -> Tensor | None:
        """What prompts have in common, once for each distinct one; the logits [state, vocab] of
        those on which nothing acts, which are the first states.

        own: [state] tokens at the end that aren't common.
        """
        whole = int((own == 0).sum())
        columns = self.columns if whole else self.columns - int(own.min())
        if columns == 0:
            return None
        rows = states.leaders
        of: list[int] = self._texts[rows].tolist()
        lead = [of.index(number) for number in range(self._distinct)]
        batch = self._batch(rows[lead])
        keys = KeptKeys(self.model.shape.n_layers, len(lead), columns)
        acting, index = RuleWrites(blocks=self.prefill.blocks), torch.tensor(of)
        each, found = max(1, self.limit // columns), list[Tensor]()
        for first in range(0, len(lead), each):
            part = slice(first, min(first + each, len(lead)))
            tokens = NewTokens(batch.ids[part, :columns], batch.starts[part], 0)
            if whole:
                found.append(run_cached(self.model, tokens, keys, part, acting))
            else:
                keep(self.model, tokens, keys, part, acting)
        if self._common:
            self.keys.share(keys, self._common, of)
        self.keys.fill(keys, index, columns)
        return torch.cat(found)[to_device(index[:whole], self.model.device)] if whole else None

    def _suffix(self, rows: Ints, part: slice, count: int) -> Tensor:
        """[n, vocab] of some of the rows, whose last tokens are computed, behind those that are
        kept already."""
        rows = rows[part]
        batch = self._batch(rows)
        first = self.columns - count
        acting = self._prefilled(Chosen(len(self.prompts), rows))
        numbers = acting.numbered(batch).numbers
        numbers = None if numbers is None else numbers[:, first:]
        tokens = NewTokens(batch.ids[:, first:], batch.starts, first, numbers)
        return run_cached(self.model, tokens, self.keys, part, acting)

    def _batch(self, rows: Ints) -> Batch:
        """Whole prompts, as wide as the widest of all."""
        ids = torch.full((len(rows), self.columns), self.model.pad_id, dtype=torch.long)
        for number, row in enumerate(rows.tolist()):
            prompt = self.prompts[row]
            ids[number, self.columns - len(prompt) :] = torch.tensor(prompt)
        starts, device = self._starts(rows), self.model.device
        mask = (torch.arange(self.columns) >= starts[:, None]).long()
        return Batch(to_device(ids, device), to_device(mask, device), self.columns - starts, starts)

    # --- edits of what is kept --------------------------------------------------------------

    def _edit(self, states: States, chosen: Chosen) -> None:
        """Edit keys and values between the prefill and the first step.

        They are read as they came out of their projections and edited there; another pass, in which
        they stand so, gives what is kept of them, behind rotary for one. Layers don't see each
        other's edits, as each is made on what the layer had.
        """
        edits = [own for each in self.kept if len((own := chosen.write(each)).rows)]
        if not edits:
            return
        touched = torch.cat([edit.rows for edit in edits]).unique()
        some = states.leaders[touched.numpy()]
        here = torch.full((len(states),), -1, dtype=torch.long)
        here[touched] = torch.arange(len(touched))
        edits = [edit.moved(here) for edit in edits]
        acting = Chosen(len(self.prompts), some).rules(self.prefill)
        batch = acting.numbered(self._batch(some))
        places = list(dict.fromkeys(edit.where for edit in edits))
        with blocks_replaced(self.model, acting.blocks):
            reads = run_whole(
                self.model,
                batch,
                writes=acting.writes,
                edges=acting.edges,
                reads=places,
                logits_at=(batch.lengths - 1)[:, None],
            ).reads
        standing = [_standing(place, reads[place], batch, edits) for place in places]
        scratch = KeptKeys(self.model.shape.n_layers, len(some), self.columns)
        tokens = NewTokens(batch.ids, batch.starts, 0, batch.numbers)
        again = replace(acting, writes=[*acting.writes, *standing])
        keep(self.model, tokens, scratch, slice(0, len(some)), again)
        for write in standing:
            columns = batch.columns(write.rows, write.positions)
            which = "keys" if write.site == "k" else "values"
            assert write.layer is not None
            self.keys.put(scratch, which, write.layer, touched[write.rows], write.rows, columns)


def _standing(
    place: SiteRead, found: Tensor, batch: Batch, edits: Sequence[SiteWrite]
) -> SiteWrite:
    """All heads of each token that is edited at a site, as they stand there afterwards.

    found: [B, T, heads, d_head], what was read.
    """
    spots: list[Tensor] = []
    for edit in edits:
        if edit.where == place:
            index = edit.rows, batch.columns(edit.rows, edit.positions), edit.units
            found = edited(found, edit, index)
            spots.append(torch.stack([edit.rows, edit.positions], dim=1))
    rows, positions = torch.cat(spots).unique(dim=0).t()
    heads = found.shape[2]
    values = found[rows.to(found.device), batch.columns(rows, positions)].flatten(0, 1)
    return SiteWrite(
        place.site,
        place.layer,
        rows.repeat_interleave(heads),
        positions.repeat_interleave(heads),
        torch.arange(heads).repeat(len(rows)),
        values,
    )


def _parts(own: Ints, limit: int) -> Iterable[slice]:
    """States that go through the prefill together; none whose tokens are all common.

    own: [state] tokens of their own, ascending.
    """
    first = int((own == 0).sum())
    while first < len(own):
        end = first + 1
        while end < len(own):
            more = int((own[end] - own[first:end]).sum())
            wasteful = more > max(MIXED, int(own[first:end].sum()) // 4)
            if wasteful or int(own[end]) * (end + 1 - first) > limit:
                break
            end += 1
        yield slice(first, end)
        first = end


def _own_tokens(prompts: Sequence[tuple[int, ...]], prefill: RuleWrites) -> Ints:
    """[row] tokens from the first one on at which anything acts in the prefill."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    first = lengths.copy()
    places = [
        *((each.rows, each.positions - int(each.mode == "step")) for each in prefill.writes),
        *((each.rows, each.queries) for each in prefill.edges),
        *((each.rows, each.positions) for each in prefill.numbers),
    ]
    for rows, positions in places:
        np.minimum.at(first, rows.cpu().numpy(), positions.cpu().numpy().clip(min=0))
    return lengths - first
