"""One pass over the newest tokens of some rows, and a check that the model supports it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mechdsl.forward.generation.attended_images import (
    AttendedImages,
    add_trial_images,
    is_of_image,
    list_image_layers,
)
from mechdsl.forward.generation.key_value_cache import (
    KeyValueCache,
    RowArguments,
    SingleQueryAttention,
    compute_row_lengths,
    find_attention_path,
    is_single_query_supported,
    limit_to_first_rows,
    record_lengths,
)
from mechdsl.forward.generation.rules import RowLineup
from mechdsl.forward.hooks.attention import (
    AttentionCall,
    attend_across,
    attend_full,
    replace_block_attention,
)
from mechdsl.forward.hooks.batch import (
    Batch,
    EdgeWrite,
    PassStopped,
    RuleWrites,
    SiteRead,
    TokenFrame,
    to_device,
)
from mechdsl.forward.hooks.full_pass import SiteHooks, run_full
from mechdsl.forward.hooks.model import IMAGE_TOKENS, LoadedModel, build_text_inputs, replace_blocks
from mechdsl.vocab.sites import SITES

_SITES_AFTER_KEYS = frozenset(
    name
    for name, kind in SITES.items()
    if kind.stage == "query" or kind.order > SITES["k_rot"].order
)
"""Sites of a block that its keys and values don't depend on, for the same token."""


@dataclass(eq=False)
class NewTokens:
    """Tokens of a pass, in columns from `first` on; prompts end in the same column.

    The class is the `TokenFrame` of the pass.
    """

    ids: Tensor
    """[n, Q] long."""
    starts: Tensor
    """[n] long, column of each prompt's first token; on the host. With images, the column that the
    image's first token would have, as in `Batch`."""
    first: int
    numbers: Tensor | None = None
    """[n, Q] or [3, n, Q] long, position ids; None: tokens are counted."""
    saved: Tensor | None = None
    """[n] long: by how much earlier tokens outnumber their position ids, because of images."""
    running: int | None = None
    """Number of rows in the running module, if it computes only the first ones."""
    images: AttendedImages | None = None
    """Images that some blocks attend to."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of tokens of each row."""
        return int(self.ids.shape[1])

    @property
    def leading(self) -> int:
        """Number of rows that are currently computed."""
        return len(self) if self.running is None else self.running

    @property
    def text_starts(self) -> Tensor:
        """[n] long, column of the first token of each text; on the host."""
        return self.starts if self.images is None else self.starts + self.images.encoder.lengths

    @property
    def lane_starts(self) -> Tensor:
        """[row that is currently computed] column of its first token."""
        return self.starts[: self.leading]

    @property
    def key_width(self) -> int:
        """Number of columns up to now."""
        return self.first + self.count

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """Return [n]: number of tokens up to now, or of the image."""
        if self.images is not None and is_of_image(SiteRead(site, None, stack)):
            return self.images.encoder.lengths
        return self.key_width - self.starts

    def keys_of(self, stack: str) -> TokenFrame:
        """Return the tokens that attention of a stack attends to."""
        return self if self.images is None or not stack else self.images.encoder

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the columns of positions."""
        return self.starts[rows] + positions

    def acting(self, rules: RuleWrites) -> RuleWrites:
        """Restrict rules for whole prompts to these tokens."""

        def there(rows: Tensor, positions: Tensor) -> Tensor:
            columns = self.columns(rows, positions).cpu()
            return (columns >= self.first) & (columns < self.key_width)

        writes = (
            write if is_of_image(write) else write.some(there(write.rows, write.positions))
            for write in rules.writes
        )
        edges = (edge.some(there(edge.rows, edge.queries)) for edge in rules.edges)
        return replace(
            rules,
            writes=[write for write in writes if len(write.rows)],
            edges=[edge for edge in edges if len(edge.rows)],
        )

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return row and token of the pass, and whether the position is in the pass."""
        if self.images is not None and is_of_image(SiteRead(site, layer, stack)):
            return self.images.encoder.locate(site, layer, "", rows, positions)
        tokens = self.columns(rows, positions) - self.first
        return rows, tokens, tokens >= 0

    def inputs(self, model: LoadedModel) -> dict[str, Tensor]:
        """Build the inputs of the model."""
        column = torch.arange(self.key_width, device=self.ids.device)
        starts = to_device(self.text_starts, self.ids.device)
        tensor = column[self.first :] - starts[:, None]
        if self.saved is not None:
            tensor = tensor - to_device(self.saved, tensor.device)[:, None]
        numbers = tensor.clamp(min=0) if self.numbers is None else self.numbers
        mask = (column >= starts[:, None]).long()
        given = build_text_inputs(model, self.ids, numbers)
        if self.mixes_images(model):  # the model's masks count columns from the first one
            types = given["token_type_ids"]
            before = types.new_zeros(len(types), self.first)
            given["token_type_ids"] = torch.cat([before, types], 1)
        if self.images is not None:
            given |= self.images.build_arguments(self.first, self.count)
            given["position_ids"] = numbers
        return {**given, "attention_mask": mask}

    def mixes_images(self, model: LoadedModel) -> bool:
        """Return whether some of the tokens attend to later ones, which are all in the pass."""
        table = IMAGE_TOKENS.get(model.module)
        return table is not None and table.token_types(self.ids) is not None


PassArguments: TypeAlias = tuple[
    LoadedModel, NewTokens, KeyValueCache, slice, RuleWrites, RowLineup | None, RowArguments | None
]
"""Arguments of `run_cached_pass` and `store_keys`."""


class CachedPass:
    """A pass, and subsequent ones with the same writes on the same rows, which reuse the hooks."""

    def __init__(
        self,
        model: LoadedModel,
        tokens: NewTokens,
        kept: KeyValueCache,
        rows: slice,
        acting: RuleWrites,
        lineup: RowLineup | None = None,
        places: RowArguments | None = None,
    ) -> None:
        """Prepare the pass.

        Args:
            rows: Rows of the cache, as many as there are in `tokens`.
            acting: Writes, with row numbers of the pass.
            lineup: Which rows blocks compute, for passes of one token each.
            places: Row dimensions in calls of blocks, needed with `lineup`.
        """
        self.model, self.tokens, self.kept = model, tokens, kept
        self._places = places
        self._blocks = acting.blocks
        self._work = work = SiteHooks(model, tokens, acting.writes, (), None, acting.edges)
        every = any(write.site == "logits" for write in acting.writes)
        if not every and tokens.count > 1:
            work.keep_logits((tokens.lengths_of("logits", "") - 1)[:, None])
        self._one = SingleQueryAttention(kept)
        self._limits = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(_apply_rules(model, work, tokens, kept, acting, self._one))
            self._limit(rows, lineup)
            self._stack = stack.pop_all()

    def _limit(self, rows: slice, lineup: RowLineup | None) -> None:
        """Set the rows of the cache, and those that blocks compute."""
        self.rows, self.lineup = rows, lineup
        self._some = lineup if lineup is not None and lineup.shares else None
        self._limits.close()
        self._limits.enter_context(_limit_rows(self.model, self.tokens, self._some, self._places))

    def run(self) -> Tensor:
        """Run the pass, which caches the tokens' keys and values. Raises as `run_full`.

        Returns:
            [n, vocab] logits after the last token.
        """
        tokens, work = self.tokens, self._work
        kept = self.kept.at(self.rows, tokens.first, tokens.count, self._some)
        output = _call_model(self.model, tokens, kept)
        logits = work.output(output.logits)
        work.check()
        return logits[:, -1]

    @property
    def repeats(self) -> bool:
        """Whether the same writes can be applied to later tokens."""
        return self.tokens.count == 1 and self._work.repeats

    def run_on(self, ids: Tensor) -> Tensor:
        """Run the pass for the next tokens, [n, 1]."""
        self.tokens.ids = ids
        self.tokens.first += 1
        self._work.begin()
        self._one.begin()
        return self.run()

    def takes(self, tokens: NewTokens, rows: slice, acting: RuleWrites, lineup: RowLineup) -> bool:
        """Continue with other rows and writes, and return whether the hooks allow that.

        The arguments are those of the constructor.
        """
        rebuilt = acting.edges or acting.blocks != self._blocks
        if rebuilt or not self.repeats or tokens.count != 1:
            return False
        mine = self.tokens  # the frame of the hooks
        mine.ids, mine.starts, mine.first = tokens.ids, tokens.starts, tokens.first
        mine.images = tokens.images
        mine.saved, mine.running = tokens.saved, None
        if not self._work.rewrite(acting.writes):
            return False
        self._one.begin()
        self._limit(rows, lineup)
        return True

    def close(self) -> None:
        """Remove the hooks."""
        self._limits.close()
        self._stack.close()


def run_cached_pass(
    model: LoadedModel,
    tokens: NewTokens,
    kept: KeyValueCache,
    rows: slice,
    acting: RuleWrites,
    lineup: RowLineup | None = None,
    places: RowArguments | None = None,
) -> Tensor:
    """Run a single `CachedPass`."""
    with closing(CachedPass(model, tokens, kept, rows, acting, lineup, places)) as only:
        return only.run()


def store_keys(
    model: LoadedModel,
    tokens: NewTokens,
    kept: KeyValueCache,
    rows: slice,
    acting: RuleWrites,
    lineup: RowLineup | None = None,
    places: RowArguments | None = None,
) -> None:
    """Run a pass only for its keys and values: it ends at those of the last block."""
    n_layers = model.shape.n_layers
    acting = _select_for_keys(acting.below(n_layers, n_layers), n_layers - 1)
    work = SiteHooks(model, tokens, acting.writes, (), n_layers, acting.edges)
    some = lineup if lineup is not None and lineup.shares else None
    last = {("", n_layers - 1), ("cross", n_layers - 1)}
    stop = None if acting.blocks or last & work.within else n_layers - 1
    with (
        _apply_rules(model, work, tokens, kept, acting, SingleQueryAttention(kept)),
        _limit_rows(model, tokens, some, places),
        suppress(PassStopped),
    ):
        _call_model(model, tokens, kept.at(rows, tokens.first, tokens.count, some, stop))
    work.check()


def _select_for_keys(acting: RuleWrites, last: int) -> RuleWrites:
    """Remove writes that the keys and values of the last block don't depend on."""
    return replace(
        acting,
        writes=[
            write
            for write in acting.writes
            if write.layer != last or write.site not in _SITES_AFTER_KEYS
        ],
        edges=[edge for edge in acting.edges if edge.layer != last],
    )


def _call_model(model: LoadedModel, tokens: NewTokens, kept: KeyValueCache) -> Any:
    argument = model.calling.cache_argument
    assert argument is not None
    given = tokens.inputs(model)
    kept.holds_earlier = tokens.count == 1 or "token_type_ids" not in given
    with nullcontext() if tokens.images is None else tokens.images.opened():
        return model.module(**given, **{argument: kept}, use_cache=True)


@contextmanager
def _limit_rows(
    model: LoadedModel, tokens: NewTokens, some: RowLineup | None, places: RowArguments | None
) -> Generator[None]:
    """Restrict blocks to their rows in `some`; None: no restriction."""
    if some is None:
        yield
        return
    assert places is not None
    with limit_to_first_rows(model, some, places, partial(setattr, tokens, "running")):
        yield


@contextmanager
def _apply_rules(
    model: LoadedModel,
    work: SiteHooks,
    tokens: NewTokens,
    kept: KeyValueCache,
    acting: RuleWrites,
    one: SingleQueryAttention,
) -> Generator[None]:
    """Apply the rules of a pass while the context is open."""
    with (
        torch.inference_mode(),
        replace_blocks(model, acting.blocks),
        work.installed(),
        _open_attention(model, work, tokens, kept, one),
    ):
        yield


@contextmanager
def _open_attention(
    model: LoadedModel,
    work: SiteHooks,
    tokens: NewTokens,
    kept: KeyValueCache,
    one: SingleQueryAttention,
) -> Generator[None]:
    """Open attention as in full passes; keys written there are cached with their new values."""
    # A single query that sees nothing, such as padding, would give NaN in plain products.
    sees = tokens.count == 1 and bool((tokens.text_starts <= tokens.first).all())
    newest = kept.asked = sees and is_single_query_supported(model)
    if not work.within and not newest:
        yield
        return

    def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        mine = kept.handed(call.layer, call.key, call.value)
        if kept.marked and not mine and not call.across:
            raise ValueError(f"`{model.name}` transforms its cached keys")
        layer = work.layer(call.place, call.query)
        if layer is None and newest and mine and (attended := one.attend(call)) is not None:
            return attended, None
        if layer is not None and layer.rotated.get("k_rot"):
            if not mine:
                raise ValueError(f"`{model.name}` caches its keys in a form that can't be edited")
            tensor = kept.newest(call.layer, tokens.count)
            turned = layer.turned("k_rot", tensor.transpose(0, 1).flatten(1, 2))
            tensor.copy_(turned.unflatten(1, (len(tensor), -1)).transpose(0, 1))
            del layer.rotated["k_rot"]
        if mine:
            call = replace(call, **dict(zip(("key", "value"), kept.every(call.layer), strict=True)))
        if layer is None:
            return call.unchanged()
        attend = attend_across if call.across else attend_full
        whole = call.query, call.key, call.value, call.mask
        return attend(*whole, layer, **call.arguments), None

    def sees_all() -> bool:
        # On a GPU, the library would wait for the device to find padding.
        return tokens.ids.is_cpu and tokens.count == 1 and not bool(tokens.text_starts.any())

    with replace_block_attention(model, attention, masked=True, sees_all=sees_all):
        yield


LOGIT_TOLERANCE = 1e-4
"""Tolerance of logits relative to the largest one, unless rounding explains more."""

_TRIAL_LENGTHS = (7, 5)

_SHARED_TOKENS, _SEPARATE_TOKENS = 3, 2
"""Tokens of the longer prompt in the first two passes; the remaining ones follow one by one."""


@dataclass(frozen=True)
class GenerationMethod:
    """How a model generates text."""

    kind: Literal["cached", "whole"]
    """With cached keys and values, or with a full pass for each token."""
    reason: str = ""
    """Reason for full passes."""
    shares: bool = True
    """Whether attention to the common columns of a prompt's rows can be computed together."""
    places: RowArguments | None = field(default=None, compare=False)
    """Row dimensions in calls of blocks, if blocks can compute only some of the rows."""


_METHODS: WeakKeyDictionary[LoadedModel, dict[bool, GenerationMethod]] = WeakKeyDictionary()


def choose_method(model: LoadedModel, *, inside: bool = False) -> GenerationMethod:
    """Choose how a model generates text; tested once per model.

    inside: whether rules act within attention in some of the passes.
    """
    known = _METHODS.setdefault(model, {})
    if inside not in known:
        known[inside] = _test_methods(model, inside)
    return known[inside]


def _test_methods(model: LoadedModel, inside: bool) -> GenerationMethod:
    attends = model.shape.attends_to_image
    if model.shape.encodes_apart and not attends:
        return GenerationMethod("whole", "only outputs of its encoder are cached")
    if model.calling.side != "left" and not attends:
        return GenerationMethod(
            "whole",
            "its positions are columns of the batch, so prompts can't be aligned at their ends",
        )
    if model.calling.cache_argument is None:
        return GenerationMethod("whole", "it doesn't accept cached keys and values")
    if any(_depends_on_length(getattr(part, "rope_type", "")) for part in model.module.modules()):
        return GenerationMethod("whole", "its rotary embedding depends on the length of the text")
    generator = torch.Generator().manual_seed(0)
    size = model.shape.vocab_size
    prompts = [torch.randint(size, (n,), generator=generator).tolist() for n in _TRIAL_LENGTHS]
    whole = _run_full_passes(model, prompts)
    for shares in (True, False):
        try:
            cached = _run_cached_passes(model, prompts, inside, shares=shares)
        except Exception as error:
            way = GenerationMethod("whole", f"it fails with cached keys and values: {error}")
            continue
        off = _relative_error(cached, whole)
        if off <= _get_tolerance(model):
            places = _find_row_arguments(model, prompts, inside, whole, shares)
            return GenerationMethod("cached", shares=shares, places=places)
        way = GenerationMethod(
            "whole", f"with cached keys and values its logits are off by {off:.1g}"
        )
    return way


def _depends_on_length(kind: object) -> bool:
    """Return whether a type of rotary embedding, or one of several, differs for longer texts."""
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any("dynamic" in str(each) or each == "longrope" for each in kinds)


def _build_trial(model: LoadedModel, prompts: Sequence[Sequence[int]], first: int = 0) -> Batch:
    """Build a batch of prompts, with images if blocks attend to them; first: as in
    `add_trial_images`."""
    batch = Batch.of(prompts, model.pad_id, "left", model.device)
    attends = model.shape.attends_to_image
    return add_trial_images(model, batch, first) if attends else batch


def _trial_tokens(model: LoadedModel, batch: Batch, columns: slice) -> NewTokens:
    """Return some columns of the prompts as the tokens of a pass."""
    images = AttendedImages(model, batch) if batch.frames else None
    return NewTokens(batch.ids[:, columns], batch.starts, columns.start, images=images)


def _run_full_passes(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return [prompt, token, vocab]: logits of the last tokens."""
    logits = [
        run_full(model, _build_trial(model, [prompt], row)).logits
        for row, prompt in enumerate(prompts)
    ]
    last = _TRIAL_LENGTHS[0] - _SHARED_TOKENS - _SEPARATE_TOKENS + 1
    return torch.cat([logit[:, -last:] for logit in logits if logit is not None]).float()


def _find_row_arguments(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    inside: bool,
    whole: Tensor,
    shares: bool,
) -> RowArguments | None:
    """Find `GenerationMethod.places`, preferably with fewer rows in attention than in the block."""
    half, two, blocks = model.shape.n_layers // 2, len(prompts), model.anatomy.blocks
    paths = [block.path for block in blocks]
    within = [path for block in blocks if (path := find_attention_path(block)) is not None]
    paths += within if len(within) == len(blocks) else []
    try:
        with record_lengths(model, paths) as few:
            _run_cached_passes(model, prompts, False, shares=False)
        with record_lengths(model, paths) as more:
            _run_cached_passes(model, [*prompts, prompts[0]], False, shares=False)
    except Exception:
        return None
    every = tuple(compute_row_lengths(a, two, b) for a, b in zip(few, more, strict=True))
    end = len(blocks)
    kinds = (every[end:], ()) if every[end:] else ((),)
    for attention, several in product(kinds, (True, False)):
        begins = [2 * half + int(bool(attention)), 2 * half + 2]
        lineup = RowLineup(np.array([0] * two + begins), np.array([0, 1, 0, 1]))
        places = RowArguments(every[:end], attention, several)
        with suppress(Exception):
            by = lineup, places
            some = _run_cached_passes(model, [*prompts, *prompts], inside, shares=shares, by=by)
            if _relative_error(some, torch.cat([whole, whole])) <= _get_tolerance(model):
                return places
    return None


def _relative_error(error: Tensor, whole: Tensor) -> float:
    """Return the largest difference from logits of full passes, relative to the largest logit."""
    return float((error - whole).abs().amax() / whole.abs().amax())


def _get_tolerance(model: LoadedModel) -> float:
    return max(LOGIT_TOLERANCE, 4 * model.rounding)


def _run_cached_passes(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    inside: bool,
    *,
    shares: bool,
    by: tuple[RowLineup, RowArguments] | None = None,
) -> Tensor:
    """Compute the logits in passes over a few tokens; every other pass opens all attention.

    by: rows that blocks compute, also in passes over several tokens if possible, and row
    dimensions.
    """
    width, images = _TRIAL_LENGTHS[0], list_image_layers(model)
    batch = _build_trial(model, prompts)
    every, cached_passes = slice(0, len(prompts)), list[Tensor]()
    size = model.shape.n_layers, len(prompts)
    common = KeyValueCache(*size, _SHARED_TOKENS, images=images)
    begun = _trial_tokens(model, batch, slice(0, _SHARED_TOKENS))
    store_keys(model, begun, common, every, RuleWrites())
    kept = KeyValueCache(*size, width - _SHARED_TOKENS * shares, images=images)
    if shares:
        kept.share(common, _SHARED_TOKENS, range(len(prompts)))
    rows = [np.arange(len(prompts))] * model.shape.n_layers
    kept.fill(common, rows, kept.common, _SHARED_TOKENS)
    first, end = _SHARED_TOKENS, _SHARED_TOKENS + _SEPARATE_TOKENS
    while end <= width:
        tokens = _trial_tokens(model, batch, slice(first, end))
        some = by if by is not None and (by[1].several or end == first + 1) else (None, None)
        acting = RuleWrites()
        if inside and len(cached_passes) % 2 == 0:
            acting = _build_neutral_edges(model, tokens, some[0] or RowLineup.apart(len(prompts)))
        cached_passes.append(run_cached_pass(model, tokens, kept, every, acting, *some))
        first, end = end, end + 1
    return torch.stack(cached_passes, dim=1).float()


def _build_neutral_edges(model: LoadedModel, tokens: NewTokens, lineup: RowLineup) -> RuleWrites:
    """Build changes of edges in all layers that have no effect."""
    newest = tokens.lengths_of("pattern", "") - 1
    edges: list[EdgeWrite] = []
    for layer in range(model.shape.n_layers):
        if not model.shape.has("pattern", layer):
            continue
        rows = torch.arange(lineup.attending(layer))
        none, one = torch.zeros_like(rows), torch.ones(len(rows))
        edges.append(
            EdgeWrite(layer, "reweight", rows, newest[rows], none, rows, none, one),
        )
    return RuleWrites(edges=edges)
