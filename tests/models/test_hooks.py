"""Full passes: every write happens exactly once, no hook remains (A4 to A8, A10, A14)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import (
    Batch,
    ReadMismatch,
    SiteRead,
    SiteWrite,
    WriteMismatch,
    gather_vectors,
)
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel, call_with_batch
from mechdsl.models.shape import unit_count, vector_width
from mechdsl.vocab.sites import SITES

from . import families
from .clean import clean_model_check

ROWS = [[1, 9, 22, 31, 17, 40, 5], [1, 14, 8, 51], [1, 30, 11, 6, 45]]


def batch_of(model: LoadedModel, rows: list[list[int]] = ROWS) -> Batch:
    return Batch.of(rows, model.pad_id, "left")


def logits_of(model: LoadedModel, batch: Batch, **arguments: Any) -> Tensor:
    logits = run_full(model, batch, **arguments).logits
    assert logits is not None
    return logits[batch.mask.bool()]


def one(site: str, layer: int | None, position: int, values: Tensor, **fields: Any) -> SiteWrite:
    """A write on row 0 of all units at one position; `values` is [units, width]."""
    count = values.shape[0]
    zeros = torch.zeros(count, dtype=torch.long)
    return SiteWrite(site, layer, zeros, zeros + position, torch.arange(count), values, **fields)


def layer_of(site: str, layer: int) -> int | None:
    return layer if SITES[site].has_layer else None


def nothing_left(module: nn.Module) -> bool:
    """Check for hooks directly, without the package's own check."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        for part in module.modules()
    )


@pytest.mark.parametrize("family", families.EACH)
def test_logits_of_a_full_pass_equal_the_bare_model(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    for row in ROWS:
        alone = batch_of(model, [row])
        with torch.no_grad():
            bare = model.module(torch.tensor([row])).logits[0]
        assert torch.allclose(logits_of(model, alone), bare, atol=1e-5)


@pytest.mark.parametrize("family", families.EACH)
def test_reads_return_the_written_values(loaded: dict[str, LoadedModel], family: str) -> None:
    model = loaded[family]
    generator = torch.Generator().manual_seed(0)
    for site in model.shape.sites:
        where = SiteRead(site, layer_of(site, 1))
        over_keys = SITES[site].width == "key"
        seen = 4  # number of tokens that position 3 attends to
        shape = (
            unit_count(model.shape, site, layer_of(site, 1)),
            seen if over_keys else vector_width(model.shape, site, layer_of(site, 1)),
        )
        values = torch.randn(shape, generator=generator)
        for mode in ("set", "add"):
            write = one(site, where.layer, 3, values, mode=mode)
            batch = batch_of(model)
            before = run_full(model, batch, reads=[where]).reads[where]
            after = run_full(model, batch, reads=[where], writes=[write]).reads[where]
            expected = before.clone()
            part = expected[0, 3, :, : shape[1]]
            part[:] = values if mode == "set" else part + values
            if over_keys:  # sliding windows hide some keys
                part[before[0, 3, :, : shape[1]] == 0] = 0
            real = batch.mask.bool()
            assert torch.allclose(after[real], expected[real], atol=1e-5), (site, mode)


@pytest.mark.parametrize("family", families.VERIFIED)
def test_self_patch_keeps_logits_and_scaled_patch_moves_them(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    batch = batch_of(model)
    plain = logits_of(model, batch)
    for site in model.shape.sites:
        where = SiteRead(site, layer_of(site, model.shape.n_layers - 1))
        own = run_full(model, batch, reads=[where]).reads[where][0, 6]
        same = logits_of(model, batch, writes=[one(site, where.layer, 6, own)])
        assert torch.allclose(same, plain, atol=1e-5), site
        # The last norm undoes a change of scale, so the direction changes too.
        factor = torch.linspace(1, 100, own.numel()).view_as(own)
        moved = logits_of(model, batch, writes=[one(site, where.layer, 6, own * factor)])
        assert float((moved - plain).abs().max()) > 1e-2, site


def test_permuted_rows_give_permuted_logits(loaded: dict[str, LoadedModel]) -> None:
    for family in families.VERIFIED:
        model = loaded[family]
        order = torch.tensor([2, 0, 1])
        values = torch.ones(model.shape.blocks[0].heads, model.shape.blocks[0].d_head)
        batch = batch_of(model)
        write = one("z", 1, 2, values)
        moved = replace(write, rows=torch.ones_like(write.rows))
        straight = run_full(model, batch, writes=[write]).logits
        permuted = run_full(model, batch.take(order), writes=[moved]).logits
        assert straight is not None
        assert permuted is not None
        assert torch.allclose(straight[order], permuted, atol=1e-5)


# --- cleanup --------------------------------------------------------------------------------------


class _Interrupt:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("family", families.VERIFIED)
def test_interrupted_full_pass_restores_the_model(
    loaded: dict[str, LoadedModel], family: str, error: type[BaseException]
) -> None:
    model = loaded[family]
    batch = batch_of(model)
    before = call_with_batch(model, batch)
    assert nothing_left(model.module)
    every = [
        SiteRead(site, layer)
        for site in model.shape.sites
        for layer in (range(model.shape.n_layers) if SITES[site].has_layer else (None,))
    ]
    some = torch.tensor([3, 5])
    run_full(model, batch, reads=every)
    run_full(model, batch, tokens=some)
    assert nothing_left(model.module)
    last = model.module.get_submodule(model.anatomy.blocks[2].path)
    handle = last.register_forward_hook(_Interrupt(error))
    with pytest.raises(error):
        run_full(model, batch, reads=every, tokens=some)
    handle.remove()
    assert nothing_left(model.module)
    assert clean_model_check(model.module) == []
    assert torch.equal(call_with_batch(model, batch), before)


def test_full_pass_keeps_foreign_hooks_and_forwards(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    block = model.module.get_submodule("model.layers.0")
    calls: list[int] = []
    handle = block.register_forward_hook(lambda *args: calls.append(1))
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    theirs = block.forward
    run_full(model, batch_of(model), reads=[SiteRead("resid_pre", 0)])
    assert block.forward is theirs
    assert len(calls) == 1
    handle.remove()
    del block.forward


# --- every write exactly once ---------------------------------------------------------------------


def test_write_or_read_after_the_stop_layer_is_rejected(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["gpt2"]
    batch = batch_of(model)
    values = torch.zeros(1, model.shape.d_model)
    with pytest.raises(WriteMismatch, match="above layer 1"):
        run_full(model, batch, stop=1, writes=[one("mlp_out", 1, 0, values)])
    with pytest.raises(ReadMismatch):
        run_full(model, batch, stop=1, reads=[SiteRead("logits")])


@pytest.mark.parametrize("order", [(0, 1, 0), (0, 0, 1), (1, 0, 0)])
def test_duplicate_set_write_is_rejected_in_any_position_order(
    loaded: dict[str, LoadedModel], order: tuple[int, ...]
) -> None:
    """Two set values would be ambiguous; two added values aren't."""
    model = loaded["gpt2"]
    positions, nothing = torch.tensor(order), torch.zeros(3, dtype=torch.long)
    values = torch.ones(3, model.shape.d_model)
    write = SiteWrite("mlp_out", 1, nothing, positions, nothing, values)
    with pytest.raises(ValueError, match="written twice in one write"):
        run_full(model, batch_of(model), writes=[write])
    run_full(model, batch_of(model), writes=[replace(write, mode="add")])


@pytest.mark.parametrize("times", [0, 2])
def test_write_to_a_module_that_runs_zero_or_two_times_is_rejected(
    loaded: dict[str, LoadedModel], times: int
) -> None:
    model = loaded["llama"]
    mlp = model.module.get_submodule("model.layers.1.mlp")
    block = model.module.get_submodule("model.layers.1")
    original = block.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for _ in range(times):
            mlp(x)
        return x

    block.forward = forward
    try:
        write = one("mlp_out", 1, 0, torch.zeros(1, model.shape.d_model))
        with pytest.raises(WriteMismatch, match="1 rows were to be written"):
            run_full(model, batch_of(model), writes=[write])
        with pytest.raises(ReadMismatch):
            run_full(model, batch_of(model), reads=[SiteRead("mlp_out", 1)])
    finally:
        del block.forward
    assert block.forward == original


def _at(**changes: Any) -> Callable[[SiteWrite], SiteWrite]:
    return lambda write: replace(write, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_at(rows=torch.tensor([0, 3])), "row"),
        (_at(positions=torch.tensor([0, 4])), "position"),
        (_at(positions=torch.tensor([0, -1])), "position"),
        (_at(units=torch.tensor([0, 2])), "unit"),
        (_at(values=torch.zeros(2, 5)), "must be"),
        (_at(layer=3), "layer 3"),
        (_at(layer=None), "needs a layer"),
        (_at(site="router"), "no `router`"),
    ],
)
def test_write_to_a_missing_row_position_unit_or_layer_is_rejected(
    loaded: dict[str, LoadedModel], change: Callable[[SiteWrite], SiteWrite], message: str
) -> None:
    """Row 1 has 4 tokens, so column 4 is padding or another token; `k` has two heads of four.

    The neighbouring index exists.
    """
    model = loaded["llama"]
    index = torch.tensor([0, 1])
    write = SiteWrite("k", 1, index, index, index, torch.zeros(2, model.shape.blocks[0].d_head))
    with pytest.raises(ValueError, match=message):
        run_full(model, batch_of(model), writes=[change(write)])


def test_duplicate_set_write_of_a_head_is_rejected(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["gpt2"]
    here = torch.zeros(2, dtype=torch.long)
    write = SiteWrite("z", 1, here, here, here, torch.zeros(2, model.shape.blocks[0].d_head))
    with pytest.raises(ValueError, match="written twice"):
        run_full(model, batch_of(model), writes=[write])
    run_full(model, batch_of(model), writes=[replace(write, mode="add")])


@pytest.mark.parametrize("site", ["z", "head_out", "attn_out", "resid_mid"])
def test_writes_at_one_site_act_in_the_given_order(
    loaded: dict[str, LoadedModel], site: str
) -> None:
    model = loaded["qwen3"]
    shape = (
        unit_count(model.shape, site, layer_of(site, 1)),
        vector_width(model.shape, site, layer_of(site, 1)),
    )
    put = one(site, 1, 2, torch.full(shape, 3.0))
    add = one(site, 1, 2, torch.full(shape, 0.5), mode="add")
    where = SiteRead(site, 1)
    twice = replace(add, mode="scale", values=torch.full((shape[0], 1), 2.0))
    flat = torch.full(shape, shape[1] ** -0.5)
    along = replace(add, mode="along", values=flat, to=torch.full(shape[:1], shape[1] ** 0.5))
    for writes, expected in (
        ([add, put, add], 3.5),
        ([put, add, add], 4.0),
        ([put, add, twice], 7.0),
        ([put, twice, add], 6.5),
        ([put, along, twice], 2.0),
        ([along, put], 3.0),
    ):
        result = run_full(model, batch_of(model), writes=writes, reads=[where])
        assert torch.allclose(result.reads[where][0, 2], torch.full(shape, expected), atol=1e-5)
        whole = one(site, 1, 2, torch.full(shape, expected))
        expected = run_full(model, batch_of(model), writes=[whole]).logits
        assert result.logits is not None
        assert expected is not None
        assert torch.allclose(result.logits, expected, atol=1e-5)


def test_empty_write_keeps_the_logits(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["gpt2"]
    none = torch.zeros(0, dtype=torch.long)
    write = SiteWrite("z", 1, none, none, none, torch.zeros(0, model.shape.blocks[0].d_head))
    batch = batch_of(model)
    assert torch.equal(logits_of(model, batch, writes=[write]), logits_of(model, batch))


# --- parts of a pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.VERIFIED)
def test_reads_of_a_stopped_run_equal_a_full_run(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    batch = batch_of(model)
    ran: list[int] = []
    handles = [
        model.module.get_submodule(model.anatomy.blocks[layer].path)
        .register_forward_hook(lambda *args, layer=layer: ran.append(layer))
        for layer in range(model.shape.n_layers)
    ]  # fmt: skip
    reads = [SiteRead("mlp_out", 0), SiteRead("resid_pre", 1)]
    result = run_full(model, batch, reads=reads, stop=1)
    for handle in handles:
        handle.remove()
    assert result.logits is None
    assert ran == [0]
    whole = run_full(model, batch, reads=reads).reads
    assert all(torch.equal(result.reads[read], whole[read]) for read in reads)
    last = SiteRead("final_norm")
    assert run_full(model, batch, reads=[last], stop=4).reads[last].shape[-1] == (
        model.shape.d_model
    )


def test_logits_at_selected_positions_equal_a_slice_of_all(loaded: dict[str, LoadedModel]) -> None:
    for family in families.KINDS:
        model = loaded[family]
        batch = batch_of(model)
        at = torch.stack([batch.lengths - 1, batch.lengths - 3], dim=1)
        some = run_full(model, batch, logits_at=at).logits
        whole = run_full(model, batch).logits
        assert some is not None
        assert whole is not None
        rows = torch.arange(3).repeat_interleave(2)
        expected = gather_vectors(
            whole.unsqueeze(2), batch, rows, at.flatten(), torch.zeros_like(rows)
        )
        assert torch.allclose(some.flatten(0, 1), expected, atol=1e-5)


def test_logits_of_selected_tokens_equal_a_slice_of_all(loaded: dict[str, LoadedModel]) -> None:
    wanted = torch.tensor([31, 4, 4, 52])
    for family in families.KINDS:
        model = loaded[family]
        batch = batch_of(model)
        narrow = logits_of(model, batch, tokens=wanted)
        assert torch.allclose(narrow, logits_of(model, batch)[:, wanted], atol=1e-5)
        at = batch.lengths[:, None] - 1
        found = run_full(model, batch, tokens=wanted, ends=True, logits_at=at)
        last = found.logits
        assert last is not None
        assert last.shape == (3, 1, 4)
        assert torch.allclose(last[:, 0], narrow[batch.lengths.cumsum(0) - 1], atol=1e-5)
        whole = run_full(model, batch, logits_at=at)
        assert found.largest is not None
        assert whole.logits is not None
        assert whole.largest is None
        assert torch.allclose(found.largest, whole.logits.abs().amax(-1), atol=1e-5)


def test_largest_logit_of_chunked_unembedding_is_the_same(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, some = loaded["llama"], torch.tensor([3, 9])
    batch = batch_of(model)
    whole = run_full(model, batch, tokens=some, ends=True).largest
    monkeypatch.setattr("mechdsl.forward.hooks.model.MAX_BOUND_LOGITS", 1)
    parts = run_full(model, batch, tokens=some, ends=True).largest
    assert whole is not None
    assert parts is not None
    assert torch.allclose(parts, whole, atol=1e-5)


def test_reads_include_writes_at_earlier_and_later_sites(loaded: dict[str, LoadedModel]) -> None:
    """Writes at several sites of one run happen in the order of the forward pass."""
    model = loaded["gpt2"]
    batch = batch_of(model)
    mid, out = SiteRead("resid_mid", 1), SiteRead("attn_out", 1)
    values = torch.full((1, model.shape.d_model), 2.0)
    writes = [one("resid_mid", 1, 3, values), one("attn_out", 1, 3, values * 3)]
    reads = run_full(model, batch, writes=writes, reads=[mid, out]).reads
    assert torch.allclose(reads[mid][0, 3, 0], values[0])
    assert torch.allclose(reads[out][0, 3, 0], values[0] * 3)


def test_reads_do_not_keep_a_larger_tensor_alive(loaded: dict[str, LoadedModel]) -> None:
    read = SiteRead("v", 0)
    model = loaded["gpt2"]
    value = run_full(model, batch_of(model), reads=[read]).reads[read]
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_batch_records_starts_lengths_and_positions() -> None:
    for side, starts in (("left", [0, 3, 2]), ("right", [0, 0, 0])):
        batch = Batch.of(ROWS, 0, side)  # type: ignore[arg-type]
        assert batch.starts.tolist() == starts
        assert batch.lengths.tolist() == [7, 4, 5]
        taken = batch.take(torch.tensor([1, 1, 0]))
        assert taken.ids[0].tolist() == taken.ids[1].tolist()
        start = starts[1]
        assert taken.ids[1, start : start + 4].tolist() == ROWS[1]
        assert batch.position_ids()[1, start : start + 4].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="token"):
        Batch.of([[1], []], 0, "left")
