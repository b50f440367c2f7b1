# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Proves a model's anatomy on a few tokens: the parts add up, and writing them does something.

Each check is a function from `_Bench` to outcomes, in the tuple `CHECKS`; a new one is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.batch import Batch
from mechdsl.hooks import SiteRead, SiteWrite, bare_logits, run_whole
from mechdsl.kept import keeping
from mechdsl.loaded import LoadedModel, Outcome
from mechdsl.models.shape import units
from mechdsl.packed import run_packed
from mechdsl.vocab.sites import SITES

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative to the largest value compared; a wrong tap is off by about 1."""


def _hundredfold(values: Tensor, site: str) -> Tensor:
    """Values times 100. Behind queries and keys there must be no norm; behind other sites there is
    one, which undoes a change of scale alone, so their sign changes too."""
    limit = torch.finfo(values.dtype).max / 100  # half precision ends at 65504
    return (values.double() * (100 if site in ("q", "k") else -100)).clamp(-limit, limit)


_LENGTHS = (7, 4)
_MAX_LAYERS = 6
"""Writes are tried on every layer of a model up to this depth, else on first, middle and last."""


def verify(model: LoadedModel) -> Iterator[Outcome]:
    """The outcomes of all checks on a model, in order; later checks build on earlier ones, so a
    caller stops at the first that isn't passed."""
    bench = _Bench.of(model)
    for check in CHECKS:
        with torch.inference_mode():
            outcomes = tuple(check(bench))
        yield from outcomes


RESTART = "rows restarted at a block and token = whole passes"
"""The one identity that a model may break: every row is a whole pass then."""

_PREFIXES = ((2, 5), (1, 3))
"""Of each prompt, the tokens that rows are restarted at."""


@dataclass
class _Bench:
    """A ragged batch, padded on the left, and everything that was read on it."""

    model: LoadedModel
    rows: list[list[int]]
    batch: Batch
    logits: Tensor
    reads: dict[SiteRead, Tensor]

    @staticmethod
    def of(model: LoadedModel) -> _Bench:
        generator = torch.Generator().manual_seed(0)
        draws = torch.randperm(model.shape.vocab_size, generator=generator).tolist()
        draws = draws * (1 + sum(_LENGTHS) // len(draws))
        rows = [draws[: _LENGTHS[0]], draws[_LENGTHS[0] : sum(_LENGTHS)]]
        batch = Batch.of(rows, model.pad_id, "left", model.device)
        wanted = [
            SiteRead(name, layer)
            for name in _sites(model)
            for layer in (range(model.shape.n_layers) if SITES[name].has_layer else (None,))
        ]
        result = run_whole(model, batch, reads=wanted)
        assert result.logits is not None
        return _Bench(model, rows, batch, result.logits, result.reads)

    @property
    def layers(self) -> range:
        return range(self.model.shape.n_layers)

    @property
    def some_layers(self) -> Sequence[int]:
        n = self.model.shape.n_layers
        return self.layers if n <= _MAX_LAYERS else (0, n // 2, n - 1)

    def read(self, site: str, layer: int | None = None) -> Tensor:
        """[tokens, units, width]: one site on the real tokens."""
        return self.real(self.reads[SiteRead(site, layer)])

    def vectors(self, site: str, layer: int | None = None) -> Tensor:
        """[tokens, width] of a whole-vector site."""
        return self.read(site, layer).squeeze(1)

    def real(self, tensor: Tensor) -> Tensor:
        """[tokens, …] of a [B, T, …] tensor, padding left out."""
        return tensor[self.batch.mask.to(tensor.device).bool()]

    def read_of(self, prompt: int, site: str, layer: int | None) -> Tensor:
        """[tokens, units, width]: one site of one prompt."""
        return self.real_of(prompt, self.reads[SiteRead(site, layer)], self.batch)

    @staticmethod
    def real_of(row: int, tensor: Tensor, batch: Batch) -> Tensor:
        """[tokens, …] of one row of a [B, T, …] tensor."""
        return tensor[row][batch.mask[row].to(tensor.device).bool()]

    def module(self, path: str, layer: int | None = None) -> torch.nn.Module:
        return self.model.module.get_submodule(path.format(layer=layer))

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(self.model.dtype, 1e-1)

    def equal(
        self, identity: str, pairs: Iterator[tuple[str, Tensor, Tensor]], tolerance: float = 0.0
    ) -> Outcome:
        """One outcome for many comparisons of (where, found, expected): the worst of them."""
        worst, at = 0.0, ""
        for where, found, expected in pairs:
            error = _difference(found, expected)
            if error > worst:
                worst, at = error, where
        return Outcome(identity, worst, tolerance or self.tolerance, at)


def _sites(model: LoadedModel) -> list[str]:
    return [name for name in SITES if name in model.shape.sites]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite where one is NaN."""
    if found.shape != expected.shape:
        return float("inf")
    error = float((found.double() - expected.double()).abs().max())
    size = float(expected.double().abs().max())
    return error / (size or 1.0) if error == error and size == size else float("inf")


# --- the parts add up --------------------------------------------------------------------------


def logits_are_the_models(bench: _Bench) -> Iterator[Outcome]:
    bare = bare_logits(bench.model, bench.batch)
    pairs = [("", bench.real(bench.logits), bench.real(bare))]
    yield bench.equal("logits with hooks = logits without", iter(pairs))


def padding_changes_nothing(bench: _Bench) -> Iterator[Outcome]:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for i, row in enumerate(bench.rows):
            alone = Batch.of([row], bench.model.pad_id, "left", bench.model.device)
            expected = bare_logits(bench.model, alone)[0]
            yield f"prompt {i}", bench.logits[i, -len(row) :], expected

    yield bench.equal("logits in a padded batch = logits of the prompt alone", pairs())


def sublayers_add_up(bench: _Bench) -> Iterator[Outcome]:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers:
            parts = ("resid_pre", "attn_out", "mlp_out")
            total = torch.stack([bench.vectors(site, layer) for site in parts]).sum(0)
            yield f"layer {layer}", total, bench.vectors("resid_post", layer)

    yield bench.equal("resid_pre + attn_out + mlp_out = resid_post", pairs())


def blocks_join(bench: _Bench) -> Iterator[Outcome]:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers[:-1]:
            below, above = bench.vectors("resid_post", layer), bench.vectors("resid_pre", layer + 1)
            yield f"layer {layer}", below, above

    yield bench.equal("resid_post of a layer = resid_pre of the next", pairs())


def norms_are_in_front(bench: _Bench) -> Iterator[Outcome]:
    anatomy = bench.model.anatomy
    between = "resid_pre" if anatomy.parallel else "resid_mid"

    def of(site: str, path: str | None, stream: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers:
            normed = bench.vectors(stream, layer)
            if path is not None:
                normed = bench.module(path, layer)(normed)
            yield f"layer {layer}", bench.vectors(site, layer), normed

    name = "its norm of resid_pre" if anatomy.attn_norm else "resid_pre"
    yield bench.equal(f"attn_norm = {name}", of("attn_norm", anatomy.attn_norm, "resid_pre"))
    name = f"its norm of {between}" if anatomy.mlp_norm else between
    yield bench.equal(f"mlp_norm = {name}", of("mlp_norm", anatomy.mlp_norm, between))
    last = bench.module(anatomy.final_norm)(bench.vectors("resid_post", bench.layers[-1]))
    yield bench.equal(
        "final_norm = the last norm of resid_post",
        iter([("", bench.vectors("final_norm"), last)]),
    )


def heads_add_up(bench: _Bench) -> Iterator[Outcome]:
    anatomy = bench.model.anatomy

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers:
            total = bench.read("head_out", layer).sum(1)
            bias = getattr(bench.module(anatomy.output_projection, layer), "bias", None)
            total = total if bias is None else total + bias
            if anatomy.attn_norm_behind:
                total = bench.module(anatomy.taps["attn_out"].path, layer)(total)
            yield f"layer {layer}", total, bench.vectors("attn_out", layer)

    behind = "the norm behind attention of " if anatomy.attn_norm_behind else ""
    yield bench.equal(f"{behind}the sum of head_out and the bias = attn_out", pairs())


def neurons_add_up(bench: _Bench) -> Iterator[Outcome]:
    anatomy = bench.model.anatomy
    down = anatomy.down_projection
    if down is None:
        return

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers:
            total = bench.module(down, layer)(bench.read("mlp_hidden", layer).squeeze(2))
            if anatomy.mlp_norm_behind:
                total = bench.module(anatomy.taps["mlp_out"].path, layer)(total)
            yield f"layer {layer}", total, bench.vectors("mlp_out", layer)

    yield bench.equal("mlp_hidden through the down projection = mlp_out", pairs())


# --- heads are what they are called ------------------------------------------------------------


def values_are_values(bench: _Bench) -> Iterator[Outcome]:
    """Over one token attention can only return its value."""
    model = bench.model
    batch = Batch.of([[row[0]] for row in bench.rows], model.pad_id, "left", model.device)
    wanted = [SiteRead(site, layer) for layer in bench.layers for site in ("v", "z")]
    reads = run_whole(model, batch, reads=wanted, stop=model.shape.n_layers).reads

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer in bench.layers:
            v = _per_head(model, reads[SiteRead("v", layer)])
            yield f"layer {layer}", reads[SiteRead("z", layer)], v

    yield bench.equal("z = v of the head's group, over one token", pairs())


def queries_and_keys_are_theirs(bench: _Bench) -> Iterator[Outcome]:
    """Without a query, or without its keys, a head attends uniformly, and no other head does.

    Two tokens, the second is looked at. In each row the heads with one bit of their number + 1
    are silenced in one layer: the query at the second token, the keys at both, or the key at the
    first token alone (which has to matter, as a query there does not).
    """
    rows = _silencing(bench.model)
    model, shape = bench.model, bench.model.shape
    batch = Batch.of([bench.rows[0][:2]] * (1 + len(rows)), model.pad_id, "left", model.device)
    writes = [
        write
        for layer in bench.layers
        for site in ("q", "k")
        if (write := _silence(model, rows, site, layer)) is not None
    ]
    wanted = [SiteRead(site, layer) for layer in bench.layers for site in ("v", "z")]
    reads = run_whole(model, batch, reads=wanted, writes=writes, stop=shape.n_layers).reads

    found: dict[str, list[tuple[str, Tensor, Tensor]]] = {"q": [], "k": []}
    moved = True
    silent: dict[tuple[int, int, str], Tensor] = {}
    for number, row in enumerate(rows, start=1):
        z = reads[SiteRead("z", row.layer)][:, 1]
        v = _per_head(model, reads[SiteRead("v", row.layer)])[number]
        hit = torch.tensor([h in row.heads for h in range(shape.n_heads)], device=z.device)
        where = f"layer {row.layer}"
        if row.positions == (0,):
            moved &= bool(((z[number] - z[0])[hit].abs().amax(-1) > 0).all())
            continue
        found[row.site].append((where, z[number][~hit], z[0][~hit])) if not hit.all() else None
        if not model.anatomy.additive_positions:
            found[row.site].append((where, z[number][hit], v.mean(0)[hit]))
        elif (twin := silent.get((row.layer, row.bit, "q"))) is not None:
            found["k"].append((where, z[number][hit], twin[hit]))
        silent[row.layer, row.bit, row.site] = z[number]
    what = "attends uniformly, and no other does"
    yield bench.equal(f"a head whose q is zero {what}", iter(found["q"]))
    yield bench.equal(f"a head whose k are zero {what}", iter(found["k"]))
    yield Outcome(
        "k of an earlier token matters",
        error=0.0 if moved else 1.0,
        tolerance=0.5,
        failure="z of the second token stays as it is without the first one's key",
    )


@dataclass(frozen=True)
class _Silenced:
    """Heads without query or keys in one layer."""

    site: str
    layer: int
    bit: int
    units: tuple[int, ...]
    positions: tuple[int, ...]
    heads: frozenset[int]


def _silencing(model: LoadedModel) -> list[_Silenced]:
    shape = model.shape
    rows: list[_Silenced] = []
    for layer in range(shape.n_layers):
        for site, positions in (("q", (1,)), ("k", (0, 1)), ("k", (0,))):
            count = units(shape, site)
            group = shape.n_heads // count
            for bit in range(count.bit_length()):
                chosen = tuple(u for u in range(count) if (u + 1) >> bit & 1)
                heads = frozenset(u * group + i for u in chosen for i in range(group))
                rows.append(_Silenced(site, layer, bit, chosen, positions, heads))
    return rows


def _silence(
    model: LoadedModel, rows: Sequence[_Silenced], site: str, layer: int
) -> SiteWrite | None:
    places = [
        (number, position, unit)
        for number, row in enumerate(rows, start=1)
        if row.site == site and row.layer == layer
        for position in row.positions
        for unit in row.units
    ]
    if not places:
        return None
    row, position, unit = torch.tensor(places).unbind(1)
    zeros = torch.zeros(len(places), model.shape.d_head)
    return SiteWrite(site, layer, row, position, unit, zeros)


def _per_head(model: LoadedModel, kv: Tensor) -> Tensor:
    """[B, T, heads, d_head] of key-value heads, each repeated for its group."""
    return kv.repeat_interleave(model.shape.n_heads // model.shape.n_kv_heads, dim=2)


# --- writing works -----------------------------------------------------------------------------


def writes_work(bench: _Bench) -> Iterator[Outcome]:
    """Own values change nothing, values times 100 (or -100) do, and those are read back.

    All on the first prompt: one row per site with its own values in every layer, then one row per
    site and layer with changed values at the last token.
    """
    model = bench.model
    sites = _sites(model)
    layers = {name: bench.some_layers if SITES[name].has_layer else (None,) for name in sites}
    changed = [(name, layer) for name in sites for layer in layers[name]]
    batch = bench.batch.take(torch.zeros(len(sites) + len(changed), dtype=torch.long))
    writes: list[SiteWrite] = []
    for number, name in enumerate(sites):
        for layer in layers[name]:
            own = bench.reads[SiteRead(name, layer)][0]
            writes.append(_whole(name, layer, number, range(own.shape[0]), own))
    for number, (name, layer) in enumerate(changed, start=len(sites)):
        last = bench.reads[SiteRead(name, layer)][0, -1:]
        writes.append(_whole(name, layer, number, (_LENGTHS[0] - 1,), _hundredfold(last, name)))
    wanted = [SiteRead(name, layer) for name, layer in changed]
    result = run_whole(model, batch, writes=writes, reads=wanted)
    logits = result.logits
    assert logits is not None

    same = ((name, logits[i], bench.logits[0]) for i, name in enumerate(sites))
    yield bench.equal("writing a site's own values changes nothing", same)

    def read_back() -> Iterator[tuple[str, Tensor, Tensor]]:
        for number, (name, layer) in enumerate(changed, start=len(sites)):
            where = SiteRead(name, layer)
            expected = _hundredfold(bench.reads[where][0, -1], name)
            yield _label(name, layer), result.reads[where][number, -1], expected

    yield bench.equal("what is written is read back", read_back())
    idle = [
        _label(name, layer)
        for number, (name, layer) in enumerate(changed, start=len(sites))
        if _difference(logits[number, -1], bench.logits[0, -1]) <= bench.tolerance / 10
    ]
    yield Outcome(
        "a hundredfold value changes the logits",
        error=float(len(idle)),
        tolerance=0.5,
        detail=", ".join(idle),
        failure="they stay as they are",
    )


def _whole(
    site: str, layer: int | None, row: int, positions: Sequence[int], values: Tensor
) -> SiteWrite:
    """All units of a site at `positions` of one row; `values` is [positions, units, width]."""
    count, heads, size = values.shape
    rows = torch.full((count * heads,), row)
    where = torch.tensor(list(positions)).repeat_interleave(heads)
    which = torch.arange(heads).repeat(count)
    return SiteWrite(site, layer, rows, where, which, values.reshape(-1, size))


def _label(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} layer {layer}"


def rows_can_be_restarted(bench: _Bench) -> Iterator[Outcome]:
    """From every block, at two tokens, and at every site of one block: with other values than the
    model's own, so that a part that is wrongly taken over shows."""
    model, n = bench.model, bench.model.shape.n_layers
    starts = [("resid_pre", layer, at) for layer in range(n) for at in range(2)]
    starts += [
        (name, n // 2 if SITES[name].has_layer else None, 0)
        for name in _sites(model)
        if name != "logits"
    ]
    # Prompts in turn: the second one is padded.
    lanes = np.arange(len(starts)) // 2 % len(_LENGTHS)
    writes: list[SiteWrite] = []
    for number, (name, layer, which) in enumerate(starts):
        lane = int(lanes[number])
        at = _PREFIXES[lane][which]
        own = bench.read_of(lane, name, layer)[at]
        writes.append(_whole(name, layer, number, (at,), _hundredfold(own, name)[None] / 50))
    batch = bench.batch.take(torch.from_numpy(lanes))
    expected = run_whole(model, batch, writes=writes).logits
    assert expected is not None
    lengths = np.array(_LENGTHS)[lanes]
    number = np.repeat(np.arange(len(starts)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    some = torch.arange(0, model.shape.vocab_size, 2)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        with keeping(model, bench.batch, 0) as kept:
            run_whole(model, bench.batch)
        for end, columns in (("", None), (", some tokens", some)):
            result = run_packed(
                model, kept, lanes, writes=writes, final=(number, position), tokens=columns
            )
            for i, (name, layer, which) in enumerate(starts):
                whole = bench.real_of(i, expected, batch)
                whole = whole if columns is None else whole[:, columns]
                at = _PREFIXES[int(lanes[i])][which]
                yield f"{_label(name, layer)}, token {at}{end}", result.logits[number == i], whole

    try:
        exact = model.dtype in (torch.float32, torch.float64)
        yield bench.equal(RESTART, pairs(), bench.tolerance / 10 if exact else bench.tolerance)
    except Exception as error:  # a model that is built otherwise raises what it likes
        text = " ".join(str(error).split())[:100] or type(error).__name__
        yield Outcome(RESTART, float("inf"), bench.tolerance, failure=text)


CHECKS: tuple[Callable[[_Bench], Iterator[Outcome]], ...] = (
    logits_are_the_models,
    padding_changes_nothing,
    blocks_join,
    sublayers_add_up,
    norms_are_in_front,
    heads_add_up,
    neurons_add_up,
    values_are_values,
    queries_and_keys_are_theirs,
    writes_work,
    rows_can_be_restarted,
)
