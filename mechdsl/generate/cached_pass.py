# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""One pass over the newest tokens of some rows, behind keys and values that are kept."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mechdsl.generate.first_rows import Places, only_first_rows
from mechdsl.generate.kept_keys import KeptKeys
from mechdsl.generate.one_query import OneQuery, can_be_asked
from mechdsl.generate.shared_blocks import Lineup
from mechdsl.hooks.attention_functions import attend_whole
from mechdsl.hooks.batch import to_device
from mechdsl.hooks.block_attention import AttentionCall, block_attention
from mechdsl.hooks.block_exchange import blocks_replaced
from mechdsl.hooks.calls import text_inputs
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.site_hooks import PassStopped, SiteWork
from mechdsl.vocab.sites import SITES

_AFTER_KEYS = frozenset(
    name
    for name, kind in SITES.items()
    if kind.stage == "query" or kind.order > SITES["k_rot"].order
)
"""Sites of a block that its keys and values don't depend on, for the same token."""


@dataclass(eq=False)
class NewTokens:
    """The tokens of a pass, in columns from `first` on; prompts end in the same column. It is the
    `Frame` of the pass."""

    ids: Tensor
    """[n, Q] long."""
    starts: Tensor
    """[n] long, column of each prompt's first token; on the host."""
    first: int
    numbers: Tensor | None = None
    """[n, Q] long, position ids; None: tokens are counted."""
    running: int | None = None
    """Rows of what runs, where it is the first ones alone."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Tokens of each row."""
        return int(self.ids.shape[1])

    @property
    def leading(self) -> int:
        """Rows that are computed now."""
        return len(self) if self.running is None else self.running

    @property
    def lane_starts(self) -> Tensor:
        """[row that is computed now]"""
        return self.starts[: self.leading]

    @property
    def key_width(self) -> int:
        """Columns up to now."""
        return self.first + self.count

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[n] tokens up to now."""
        return self.key_width - self.starts

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Columns in which positions lie."""
        return self.starts[rows] + positions

    def acting(self, rules: RuleWrites) -> RuleWrites:
        """What acts at these tokens, of what acts in whole prompts."""

        def there(rows: Tensor, positions: Tensor) -> Tensor:
            columns = self.columns(rows, positions).cpu()
            return (columns >= self.first) & (columns < self.key_width)

        writes = (each.some(there(each.rows, each.positions)) for each in rules.writes)
        edges = (each.some(there(each.rows, each.queries)) for each in rules.edges)
        return replace(
            rules,
            writes=[each for each in writes if len(each.rows)],
            edges=[each for each in edges if len(each.rows)],
        )

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row and token of the pass; places in front of it aren't there."""
        tokens = self.columns(rows, positions) - self.first
        return rows, tokens, tokens >= 0

    def inputs(self, model: LoadedModel) -> dict[str, Tensor]:
        """What the model is called with."""
        column = torch.arange(self.key_width, device=self.ids.device)
        starts = to_device(self.starts, self.ids.device)
        own = column[self.first :] - starts[:, None]
        numbers = own.clamp(min=0) if self.numbers is None else self.numbers
        mask = (column >= starts[:, None]).long()
        return {**text_inputs(model, self.ids, numbers), "attention_mask": mask}


PassArguments: TypeAlias = tuple[
    LoadedModel, NewTokens, KeptKeys, slice, RuleWrites, Lineup | None, Places | None
]
"""What `run_cached` and `keep` are called with."""


class CachedPass:
    """A pass, and others behind it in which the same acts on the same rows: hooks stay in place
    from one to the next."""

    def __init__(
        self,
        model: LoadedModel,
        tokens: NewTokens,
        kept: KeptKeys,
        rows: slice,
        acting: RuleWrites,
        lineup: Lineup | None = None,
        places: Places | None = None,
    ) -> None:
        """rows: of what is kept, as many as there are of tokens. acting: its rows are those of the
        pass. lineup: which rows blocks compute, of one token each; places: how they are told."""
        self.model, self.tokens, self.kept, self.rows = model, tokens, kept, rows
        self.lineup = lineup
        self._some = lineup if lineup is not None and lineup.shares else None
        self._work = work = SiteWork(model, tokens, acting.writes, (), None, acting.edges)
        every = any(write.site == "logits" for write in acting.writes)
        if not every and tokens.count > 1:
            work.keep_logits((tokens.lengths_of("logits", "") - 1)[:, None])
        self._one = OneQuery(kept)
        with ExitStack() as stack:
            stack.enter_context(_running(model, work, tokens, kept, acting, self._one))
            stack.enter_context(_first_rows(model, tokens, self._some, places))
            self._stack = stack.pop_all()

    def run(self) -> Tensor:
        """[n, vocab] behind the last of the tokens; their keys and values are kept. Raises as
        `run_whole`."""
        tokens, work = self.tokens, self._work
        kept = self.kept.at(self.rows, tokens.first, tokens.count, self._some)
        output = _called(self.model, tokens, kept)
        logits = work.output(output.logits)
        work.check()
        return logits[:, -1]

    @property
    def repeats(self) -> bool:
        """Whether the same can act on later tokens."""
        return self.tokens.count == 1 and self._work.repeats

    def run_on(self, ids: Tensor) -> Tensor:
        """The same for the next tokens, [n, 1]."""
        self.tokens.ids = ids
        self.tokens.first += 1
        self._work.begin()
        self._one.begin()
        return self.run()

    def close(self) -> None:
        """Takes the hooks away."""
        self._stack.close()


def run_cached(
    model: LoadedModel,
    tokens: NewTokens,
    kept: KeptKeys,
    rows: slice,
    acting: RuleWrites,
    lineup: Lineup | None = None,
    places: Places | None = None,
) -> Tensor:
    """What one `CachedPass` gives."""
    with closing(CachedPass(model, tokens, kept, rows, acting, lineup, places)) as only:
        return only.run()


def keep(
    model: LoadedModel,
    tokens: NewTokens,
    kept: KeptKeys,
    rows: slice,
    acting: RuleWrites,
    lineup: Lineup | None = None,
    places: Places | None = None,
) -> None:
    """The same where only the keys and values are wanted: the pass ends at those of the last
    block."""
    n_layers = model.shape.n_layers
    acting = _for_keys(acting.below(n_layers, n_layers), n_layers - 1)
    work = SiteWork(model, tokens, acting.writes, (), n_layers, acting.edges)
    some = lineup if lineup is not None and lineup.shares else None
    stop = None if acting.blocks or n_layers - 1 in work.within else n_layers - 1
    with (
        _running(model, work, tokens, kept, acting, OneQuery(kept)),
        _first_rows(model, tokens, some, places),
        suppress(PassStopped),
    ):
        _called(model, tokens, kept.at(rows, tokens.first, tokens.count, some, stop))
    work.check()


def _for_keys(acting: RuleWrites, last: int) -> RuleWrites:
    """What acts, without what the keys and values of the last block don't depend on."""
    return replace(
        acting,
        writes=[
            each for each in acting.writes if each.layer != last or each.site not in _AFTER_KEYS
        ],
        edges=[each for each in acting.edges if each.layer != last],
    )


def _called(model: LoadedModel, tokens: NewTokens, kept: KeptKeys) -> Any:
    return model.module(**tokens.inputs(model), past_key_values=kept, use_cache=True)


@contextmanager
def _first_rows(
    model: LoadedModel, tokens: NewTokens, some: Lineup | None, places: Places | None
) -> Generator[None]:
    """Blocks compute the rows that they have by `some`; None: all of them."""
    if some is None:
        yield
        return
    assert places is not None
    with only_first_rows(model, some, places, partial(setattr, tokens, "running")):
        yield


@contextmanager
def _running(
    model: LoadedModel,
    work: SiteWork,
    tokens: NewTokens,
    kept: KeptKeys,
    acting: RuleWrites,
    one: OneQuery,
) -> Generator[None]:
    """The model does what acts in a pass."""
    with (
        torch.inference_mode(),
        blocks_replaced(model, acting.blocks),
        work.installed(),
        _opened(model, work, tokens, kept, one),
    ):
        yield


@contextmanager
def _opened(
    model: LoadedModel, work: SiteWork, tokens: NewTokens, kept: KeptKeys, one: OneQuery
) -> Generator[None]:
    """As in whole passes, and keys that are written there are kept as they are then."""
    # One query that sees nothing, as padding does, would make NaN of plain products.
    sees = tokens.count == 1 and bool((tokens.starts <= tokens.first).all())
    newest = kept.asked = sees and can_be_asked(model)
    if not work.within and not newest:
        yield
        return

    def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        mine = kept.handed(call.layer, call.key, call.value)
        if kept.marked and not mine:
            raise ValueError(f"`{model.name}` makes something else of the keys that it keeps")
        layer = work.layer(call.layer, call.query)
        if layer is None and newest and mine and (found := one.attend(call)) is not None:
            return found, None
        if layer is not None and layer.rotated.get("k_rot"):
            if not mine:
                raise ValueError(f"`{model.name}` keeps its keys in a form that can't be written")
            own = kept.newest(call.layer, tokens.count)
            turned = layer.turned("k_rot", own.transpose(0, 1).flatten(1, 2))
            own.copy_(turned.unflatten(1, (len(own), -1)).transpose(0, 1))
            del layer.rotated["k_rot"]
        if mine:
            call = replace(call, **dict(zip(("key", "value"), kept.every(call.layer), strict=True)))
        if layer is None:
            return call.unchanged()
        whole = call.query, call.key, call.value, call.mask
        return attend_whole(*whole, layer, **call.arguments), None

    with block_attention(model, attention, masked=True):
        yield
