# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""Reading and writing activations of a running model.

Hooks stand only where something is read or written, and are gone when the call returns, however it
ends. Here is the plain way, whole passes over padded rows; `packed` runs only what changes, with
the same hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mechdsl.batch import Batch, gather
from mechdsl.loaded import LoadedModel
from mechdsl.models.anatomy import Layout, Side, Tap
from mechdsl.models.shape import width
from mechdsl.taps import (
    InHook,
    OutHook,
    Step,
    clean_model_check,
    head_weights,
    layout_view,
    replaced,
    through_heads,
)
from mechdsl.vocab.sites import SITES, stop_layer, write_order

__all__ = [
    "Batch",
    "ReadMismatch",
    "RunResult",
    "SiteRead",
    "SiteWork",
    "SiteWrite",
    "WriteMismatch",
    "bare_logits",
    "clean_model_check",
    "entrance",
    "gather",
    "run_whole",
]


class WriteMismatch(RuntimeError):
    """A write didn't happen, or happened more than once; the run's numbers mean nothing."""


class ReadMismatch(RuntimeError):
    """A site that was to be read was not passed, or more than once."""


@dataclass(frozen=True, eq=False)
class SiteWrite:
    """K vectors written at one site of one layer.

    At one site, everything that is set is set before anything is added.
    """

    site: str
    layer: int | None
    """None for `embed`, `final_norm`, `logits`."""
    rows: Tensor
    """[K] long, row of the batch."""
    positions: Tensor
    """[K] long, token position in the unpadded prompt."""
    units: Tensor
    """[K] long, head or neuron; 0 for whole vectors."""
    values: Tensor
    """[K, width], cast to the activation's dtype and device."""
    mode: Literal["set", "add"] = "set"

    def moved(self, rows: Tensor) -> SiteWrite:
        """The same writes where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])


@dataclass(frozen=True)
class SiteRead:
    """One site of one layer, on all rows and positions."""

    site: str
    layer: int | None = None


class Frame(Protocol):
    """Where the tokens of a pass lie in the model's tensors."""

    def __len__(self) -> int:
        """Rows."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[row] long, tokens of each row's prompt."""
        ...

    def locate(
        self, where: SiteRead, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the first two dimensions of the tensor tapped at a site, and which of the
        places are there at all; the others can't be seen by any measure."""
        ...


@dataclass
class RunResult:
    """What came out of a pass."""

    logits: Tensor | None
    """[B, T, vocab], or [B, n, vocab] with `logits_at`; None if the run stopped early."""
    reads: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[B, T, units, width] each, copies (inference tensors); values after the writes at the same
    site."""


def run_whole(
    model: LoadedModel,
    batch: Batch,
    *,
    stop: int | None = None,
    writes: Sequence[SiteWrite] = (),
    reads: Sequence[SiteRead] = (),
    logits_at: Tensor | None = None,
    tokens: Tensor | None = None,
) -> RunResult:
    """Run the whole model on padded rows, with writes and reads.

    stop: number of blocks that run, `n_layers + 1` with the final norm; what lies above is not
        computed and `logits` is None. None runs everything.
    logits_at: [B, n] long, positions (in the unpadded prompt) whose logits are wanted; all by
        default. Logits can't be read or written with it.
    tokens: [K] long, the only tokens whose logits are wanted; `vocab` is K then.

    Raises ValueError for places that don't exist, WriteMismatch for writes that couldn't happen
    exactly once, ReadMismatch for reads that didn't. The model is left as it was found.
    """
    work = SiteWork(model, batch, writes, reads, stop)
    if logits_at is not None:
        work.keep_logits(batch, logits_at)
    with torch.inference_mode(), work.installed(), narrowed(model, tokens):
        try:
            logits = bare_logits(model, batch)
        except _Stopped:
            logits = None
    if logits is not None:
        logits = work.output(logits)
    work.check()
    return RunResult(logits, work.found)


def bare_logits(model: LoadedModel, batch: Batch) -> Tensor:
    """[B, T, vocab]: the model's own forward, with nothing of ours but masks and positions."""
    return call(model, batch.ids, batch.mask, batch.position_ids())


def call(model: LoadedModel, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """[B, T, vocab]: the model's own forward, without a cache."""
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in model.calling.accepts:
        arguments["position_ids"] = positions
    if "use_cache" in model.calling.accepts:
        arguments["use_cache"] = False
    return model.module(**arguments).logits


@contextmanager
def narrowed(model: LoadedModel, tokens: Tensor | None) -> Generator[None]:
    """The unembedding computes the logits of these tokens ([K] long) only, in this order."""
    if tokens is None:
        yield
        return
    module = model.module.get_submodule(model.anatomy.unembedding)
    weight = module.get_parameter("weight")[tokens.to(model.device)]
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias[tokens.to(model.device)]

    def forward(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, weight, bias)

    with replaced(module, forward):
        yield


# --- one forward pass ---------------------------------------------------------------------------

_LAST = (1 << 31, 0)


class _Stopped(Exception):
    """Everything that was asked for has been computed."""


@dataclass
class _Place:
    """One write with its indices in the tapped tensor."""

    number: int
    write: SiteWrite
    values: Tensor
    first: Tensor
    second: Tensor
    units: Tensor

    def put(self, view: Tensor, values: Tensor, *, add: bool) -> None:
        """Write `values` [K, width] into a [B, T, units, width] view."""
        index = tuple(t.to(view.device) for t in (self.first, self.second, self.units))
        view.index_put_(index, values, accumulate=add)

    def get(self, view: Tensor) -> Tensor:
        """[K, width] of a [B, T, units, width] view."""
        return view[tuple(t.to(view.device) for t in (self.first, self.second, self.units))]


class SiteWork:
    """Everything that is read and written during one forward pass, and what came of it."""

    def __init__(
        self,
        model: LoadedModel,
        frame: Frame,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        stop: int | None = None,
    ) -> None:
        n_layers = model.shape.n_layers
        if stop is not None and not 0 <= stop <= n_layers + 1:
            raise ValueError(f"stop {stop} is not in 0..{n_layers + 1}")
        self.model = model
        self.frame = frame
        self.stop = stop
        self.found: dict[SiteRead, Tensor] = {}
        self._steps: dict[tuple[str, Side, int], list[tuple[tuple[int, int], Step]]]
        self._steps = defaultdict(list)
        self._streams: dict[int, Tensor] = {}
        self._applied = [0] * len(writes)
        self._wanted = [int(write.rows.numel()) for write in writes]
        self._writes = list(writes)
        self._reads = list(dict.fromkeys(reads))
        self._logits: tuple[list[_Place], list[SiteRead]] = ([], [])
        self._plan()
        if stop is not None:
            self._on(entrance(model, stop), _LAST, _stop)

    # --- planning -----------------------------------------------------------------------------

    def _plan(self) -> None:
        """A step for each site and layer that is read or written."""
        writes: dict[SiteRead, list[_Place]] = defaultdict(list)
        for number, write in enumerate(self._writes):
            where = SiteRead(write.site, write.layer)
            self._require(where, WriteMismatch)
            if self._wanted[number]:
                writes[where].append(self._place(number, write))
        for read in self._reads:
            self._require(read, ReadMismatch)
        for where in dict.fromkeys([*writes, *self._reads]):
            places = sorted(writes[where], key=lambda place: place.write.mode == "add")
            self._set_once(where, places)
            self._add_site(where, places, where in self._reads)

    def _require(self, where: SiteRead, problem: type[Exception]) -> None:
        """The site is one of the model's and lies in the part that is run."""
        kind = SITES.get(where.site)
        n_layers = self.model.shape.n_layers
        if kind is None or where.site not in self.model.shape.sites:
            raise ValueError(f"`{self.model.name}` has no `{where.site}`")
        if kind.has_layer != (where.layer is not None):
            need = "needs a layer" if kind.has_layer else "has no layers"
            raise ValueError(f"`{where.site}` {need}")
        if where.layer is not None and not 0 <= where.layer < n_layers:
            raise ValueError(f"layer {where.layer} is not in 0..{n_layers - 1}")
        needed = stop_layer(where.site, where.layer, n_layers)
        if self.stop is not None and (needed is None or needed > self.stop):
            raise problem(f"{_name(where)} lies above layer {self.stop}, where the run stops")

    def _place(self, number: int, write: SiteWrite) -> _Place:
        """Indices of a write; ValueError for a place that isn't in the batch."""
        where = SiteRead(write.site, write.layer)
        site_units, site_width = self._extent(write.site)
        count = self._wanted[number]
        name = _name(where)
        if write.values.shape != (count, site_width):
            raise ValueError(f"values for {name} must be [{count}, {site_width}]")
        if write.positions.shape != (count,) or write.units.shape != (count,):
            raise ValueError(f"rows, positions and units for {name} must be equally long")
        lengths = self.frame.lengths
        rows, positions, units = (
            t.to(lengths.device) for t in (write.rows, write.positions, write.units)
        )
        if bool(((rows < 0) | (rows >= len(self.frame))).any()):
            raise ValueError(f"a row for {name} is not in the batch")
        if bool(((positions < 0) | (positions >= lengths[rows])).any()):
            raise ValueError(f"a position for {name} is not in its prompt")
        if bool(((units < 0) | (units >= site_units)).any()):
            raise ValueError(f"a unit for {name} is not in 0..{site_units - 1}")
        first, second, there = self.frame.locate(where, rows, positions)
        values = write.values
        if not bool(there.all()):
            first, second, units = first[there], second[there], units[there]
            values = values[there.to(values.device)]
            self._wanted[number] = int(there.sum())
        return _Place(number, write, values, first, second, units)

    def _extent(self, site: str) -> tuple[int, int]:
        """(units, width) of a site."""
        if site == "logits":
            return 1, self.model.shape.vocab_size
        layout = self.model.anatomy.taps[site].layout
        return layout.units, layout.width

    def _set_once(self, where: SiteRead, places: list[_Place]) -> None:
        keys = [
            torch.stack([place.first, place.second, place.units])
            for place in places
            if place.write.mode == "set"
        ]
        if keys and (joined := torch.cat(keys, dim=1)).shape[1] != joined.unique(dim=1).shape[1]:
            raise ValueError(f"a vector of {_name(where)} is set twice in one run")

    def _add_site(self, where: SiteRead, places: list[_Place], read: bool) -> None:
        reads = [where] if read else []
        order = write_order(where.site, where.layer)
        if where.site == "logits":
            self._logits = (places, reads)
            return
        tap = self.model.anatomy.taps[where.site]
        match where.site:
            case "resid_mid":
                stream = self.model.anatomy.taps["resid_pre"]
                layer = where.layer or 0
                remember_order = (order[0], SITES["resid_pre"].order + 1)
                self._on(self._spot(stream, layer), remember_order, self._remember(layer))
                step = self._between(places, reads, layer)
            case "head_out":
                step = self._heads(places, reads, self.model.anatomy.taps["z"].layout)
            case _:
                step = self._direct(places, reads, tap.layout)
        self._on(self._spot(tap, where.layer), order, step)

    def _spot(self, tap: Tap, layer: int | None) -> tuple[str, Side, int]:
        return tap.at(layer), tap.side, tap.item

    def _on(self, spot: tuple[str, Side, int], order: tuple[int, int], step: Step) -> None:
        self._steps[spot].append((order, step))

    def keep_logits(self, batch: Batch, positions: Tensor) -> None:
        """Unembed only these positions ([B, n]) of each row."""
        if self._logits[0] or self._logits[1]:
            raise ValueError("logits can't be read or written where only some are computed")
        if positions.shape[:1] != (len(batch),) or positions.dim() != 2:
            raise ValueError("logits_at must be [B, n]")
        at = positions.to(batch.ids.device)
        if bool(((at < 0) | (at >= batch.lengths[:, None])).any()):
            raise ValueError("a position in logits_at is not in its prompt")
        rows = torch.arange(len(batch), device=at.device)[:, None]
        columns = batch.starts[:, None] + at

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return value[rows.to(value.device), columns.to(value.device)]

        self._on((self.model.anatomy.unembedding, "in", 0), _LAST, step)

    # --- steps ----------------------------------------------------------------------------------

    def _values(self, place: _Place, like: Tensor) -> Tensor:
        return place.values.to(device=like.device, dtype=like.dtype)

    def _done(self, place: _Place) -> None:
        self._applied[place.number] += int(place.first.numel())

    def _keep(self, reads: list[SiteRead], view: Tensor) -> None:
        for read in reads:
            if read in self.found:
                raise ReadMismatch(f"{_name(read)} was passed twice in one run")
            self.found[read] = view.clone(memory_format=torch.contiguous_format)

    def _direct(self, places: list[_Place], reads: list[SiteRead], layout: Layout) -> Step:
        """A site that is a slice of the tapped tensor."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            if places:
                value = value.clone()
            view = layout_view(value, layout)
            for place in places:
                place.put(view, self._values(place, view), add=place.write.mode == "add")
                self._done(place)
            self._keep(reads, view)
            return value

        return step

    def _remember(self, layer: int) -> Step:
        """Keeps the stream that enters a block, for `resid_mid` in the same block."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._streams[layer] = value
            return value

        return step

    def _between(self, places: list[_Place], reads: list[SiteRead], layer: int) -> Step:
        """`resid_mid`: what attention adds is changed so that the sum is the value written.

        The stream between the sublayers is no module's output; a hook on the second norm would
        leave the residual branch as it was.
        """

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            stream = self._streams[layer].unsqueeze(2)
            if places:
                value = value.clone()
            view = value.unsqueeze(2)
            for place in places:
                new = self._values(place, view)
                if place.write.mode == "set":
                    new = new - place.get(stream)
                place.put(view, new, add=place.write.mode == "add")
                self._done(place)
            if reads:
                self._keep(reads, stream + view)
            return value

        return step

    def _heads(self, places: list[_Place], reads: list[SiteRead], layout: Layout) -> Step:
        """`head_out`: a head's part of the projection's output, changed by its difference.

        Several heads of one row and position add up.
        """

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            z, weight = layout_view(given, layout), head_weights(module, layout)
            if places:
                value = value.clone()
            view = value.unsqueeze(2)
            for place in places:
                new = self._values(place, view)
                if place.write.mode == "set":
                    new = new - through_heads(place.get(z), place.units.to(z.device), weight)
                replace(place, units=torch.zeros_like(place.units)).put(view, new, add=True)
                self._done(place)
            if reads:
                per_head = torch.einsum("bthd,hdm->bthm", z, weight)
                for place in places:
                    add = place.write.mode == "add"
                    place.put(per_head, self._values(place, per_head), add=add)
                self._keep(reads, per_head)
            return value

        return step

    # --- running ----------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Generator[None]:
        """Hooks in place; gone afterwards, whatever happens inside."""
        handles: list[Any] = []
        try:
            for (path, side, item), steps in self._steps.items():
                module = self.model.module.get_submodule(path)
                ordered = [step for _, step in sorted(steps, key=lambda entry: entry[0])]
                if side == "in":
                    hook = InHook(ordered)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    out = OutHook(ordered, item)
                    handles.append(module.register_forward_hook(out, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._streams.clear()

    def output(self, logits: Tensor) -> Tensor:
        """The model's logits, after what is written and read there."""
        places, reads = self._logits
        if (places or reads) and logits.shape[-1] != self.model.shape.vocab_size:
            raise ValueError("logits can't be read or written where only some tokens' are computed")
        with torch.inference_mode():
            step = self._direct(places, reads, Layout.whole(width(self.model.shape, "logits")))
            return step(logits, self.model.module, logits) if places or reads else logits

    def check(self) -> None:
        """Every row of every write exactly once, every read once."""
        for write, applied, wanted in zip(self._writes, self._applied, self._wanted, strict=True):
            if applied != wanted:
                name = _name(SiteRead(write.site, write.layer))
                raise WriteMismatch(f"{wanted} rows were to be written at {name}, {applied} were")
        for read in self._reads:
            if read not in self.found:
                raise ReadMismatch(f"{_name(read)} was not passed")


def entrance(model: LoadedModel, layer: int) -> tuple[str, Side, int]:
    """What is read by block `layer`, by the final norm, by the unembedding."""
    anatomy, n_layers = model.anatomy, model.shape.n_layers
    if layer < n_layers:
        return anatomy.block.format(layer=layer), "in", 0
    return (anatomy.final_norm if layer == n_layers else anatomy.unembedding), "in", 0


def _stop(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
    raise _Stopped


def _name(where: SiteRead) -> str:
    return f"`{where.site}`" if where.layer is None else f"`{where.site} layer {where.layer}`"
