"""Packed rows: the recomputed tokens, and equality with full passes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mechdsl.forward.hooks.attention
from mechdsl.forward.hooks.attention import CachedAttention, GroupMasks, VisibleKeyCounts, attend
from mechdsl.forward.hooks.attention_hooks import AttentionGroup
from mechdsl.forward.hooks.batch import (
    Batch,
    DeviceIndex,
    ReadMismatch,
    RowPositions,
    SiteRead,
    SiteWrite,
)
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.model import LoadedModel, call_with_batch
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import BlockPack, PackedResult, pack_block, run_packed
from mechdsl.models.restart import BlockWork, RowMasks, Shortcuts, TokenMask, block_work
from mechdsl.models.shape import PaddingSide, unit_count, vector_width
from mechdsl.vocab.sites import SITES

from . import families
from .clean import clean_model_check
from .test_hooks import nothing_left

# --- recomputed tokens ----------------------------------------------------------------------------

NOTHING = "....."
IDLE = (NOTHING,) * 6
"""A block that the row doesn't pass through."""


def mask(*rows: str) -> TokenMask:
    """`..x` is three columns, true in the last."""
    return np.array([[letter == "x" for letter in row] for row in rows])


def spell(work: BlockWork) -> tuple[str, ...]:
    """present, carried, project, attend, output, mlp of the only row."""
    masks = (work.present, work.carried, work.project, work.attend, work.output, work.mlp)
    return tuple("".join("x" if on else "." for on in each[0]) for each in masks)


def blocks(
    writes: Mapping[tuple[str, int | None], str],
    final: str = "....x",
    *,
    reads: Mapping[tuple[str, int | None], str] | None = None,
    real: str = "xxxxx",
    parallel: bool = False,
    **shortcuts: bool,
) -> list[tuple[str, ...]]:
    """The work of three blocks on one row of five columns."""
    rows = RowMasks(
        real=mask(real),
        writes={where: mask(at) for where, at in writes.items()},
        reads={where: mask(at) for where, at in (reads or {}).items()},
        final=mask(final),
    )
    found = block_work(rows, 3, parallel=parallel, shortcuts=Shortcuts(**shortcuts))
    return [spell(work) for work in found]


#            present  carried  project  attend   output   mlp
LATER = [
    IDLE,
    ("..xxx", NOTHING, "..x..", "..xxx", "..xxx", "..xxx"),
    ("..xxx", "..xxx", "..xxx", "....x", "....x", "....x"),
]
"""A write at token 2 of block 1 that reaches later tokens through its key or value."""
ITSELF = ("..x.x", "..x..", "..x..", "....x", "....x", "....x")
"""The last block, after one in which only token 2 differs."""

WORK: dict[str, tuple[dict[str, Any], list[tuple[str, ...]]]] = {
    "resid_pre": ({"writes": {("resid_pre", 1): "..x.."}}, LATER),
    "attn_norm": ({"writes": {("attn_norm", 1): "..x.."}}, LATER),
    "k is not projected": (
        {"writes": {("k", 1): "..x.."}},
        [IDLE, ("..xxx", NOTHING, NOTHING, "..xxx", "..xxx", "..xxx"), LATER[2]],
    ),
    "v neither": (
        {"writes": {("v", 1): "..x.."}},
        [IDLE, ("..xxx", NOTHING, NOTHING, "..xxx", "..xxx", "..xxx"), LATER[2]],
    ),
    "q asks for its own token": (
        {"writes": {("q", 1): "..x.."}},
        [IDLE, ("..x..", NOTHING, NOTHING, "..x..", "..x..", "..x.."), ITSELF],
    ),
    "z doesn't attend": (
        {"writes": {("z", 1): "..x.."}},
        [IDLE, ("..x..", NOTHING, NOTHING, NOTHING, "..x..", "..x.."), ITSELF],
    ),
    "head_out is behind the projection": (
        {"writes": {("head_out", 1): "..x.."}},
        [IDLE, ("..x..", NOTHING, NOTHING, NOTHING, NOTHING, "..x.."), ITSELF],
    ),
    "attn_out and resid_mid at different tokens": (
        {"writes": {("attn_out", 1): ".x...", ("resid_mid", 1): "...x."}},
        [
            IDLE,
            (".x.x.", NOTHING, NOTHING, NOTHING, NOTHING, ".x.x."),
            (".x.xx", ".x.x.", ".x.x.", "....x", "....x", "....x"),
        ],
    ),
    "mlp_hidden": (
        {"writes": {("mlp_hidden", 1): "..x.."}},
        [IDLE, ("..x..", NOTHING, NOTHING, NOTHING, NOTHING, "..x.."), ITSELF],
    ),
    "mlp_out computes nothing in its block": (
        {"writes": {("mlp_out", 1): "..x.."}},
        [IDLE, ("..x..", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING), ITSELF],
    ),
    "resid_post of the last block": (
        {"writes": {("resid_post", 2): "....x"}},
        [IDLE, IDLE, ("....x", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)],
    ),
    "resid_post of the last block at a token that isn't read": (
        {"writes": {("resid_post", 2): "..x.."}},
        [IDLE, IDLE, IDLE],
    ),
    "k of the last block": (
        {"writes": {("k", 2): "..x.."}},
        [IDLE, IDLE, ("..x.x", NOTHING, NOTHING, "....x", "....x", "....x")],
    ),
    "the embedding": (
        {"writes": {("embed", None): "...x."}},
        [
            ("...xx", "...x.", "...x.", "...xx", "...xx", "...xx"),
            ("...xx", "...xx", "...xx", "...xx", "...xx", "...xx"),
            ("...xx", "...xx", "...xx", "....x", "....x", "....x"),
        ],
    ),
    "final_norm": ({"writes": {("final_norm", None): "....x"}}, [IDLE, IDLE, IDLE]),
    "no write": ({"writes": {}}, [IDLE, IDLE, IDLE]),
    "two writes in different blocks": (
        {"writes": {("z", 0): ".x...", ("mlp_out", 2): "....x"}},
        [
            (".x...", NOTHING, NOTHING, NOTHING, ".x...", ".x..."),
            (".xxxx", ".x...", ".x...", ".xxxx", ".xxxx", ".xxxx"),
            (".xxxx", ".xxxx", ".xxxx", "....x", "....x", "....x"),
        ],
    ),
    "a second write lower down the row joins later": (
        {"writes": {("z", 0): "...x.", ("z", 1): ".x..."}},
        [
            ("...x.", NOTHING, NOTHING, NOTHING, "...x.", "...x."),
            (".x.xx", "...x.", "...x.", "...xx", ".x.xx", ".x.xx"),
            (".x.xx", ".x.xx", ".x.xx", "....x", "....x", "....x"),
        ],
    ),
    "tokens with a gap": (
        {"writes": {("resid_mid", 1): ".x.x."}},
        [
            IDLE,
            (".x.x.", NOTHING, NOTHING, NOTHING, NOTHING, ".x.x."),
            (".x.xx", ".x.x.", ".x.x.", "....x", "....x", "....x"),
        ],
    ),
    "a write behind the last read": (
        {"writes": {("resid_pre", 1): "...x."}, "final": "..x.."},
        [IDLE, IDLE, IDLE],
    ),
    "nothing behind the last read": (
        {"writes": {("resid_pre", 1): ".x..."}, "final": "..x.."},
        [
            IDLE,
            (".xx..", NOTHING, ".x...", ".xx..", ".xx..", ".xx.."),
            (".xx..", ".xx..", ".xx..", "..x..", "..x..", "..x.."),
        ],
    ),
    "every token is read": (
        {"writes": {("q", 2): "..x.."}, "final": "xxxxx"},
        [IDLE, IDLE, ("..x..", NOTHING, NOTHING, "..x..", "..x..", "..x..")],
    ),
    "padding on the right": (
        {"writes": {("resid_pre", 1): "..x.."}, "final": "...x.", "real": "xxxx."},
        [
            IDLE,
            ("..xx.", NOTHING, "..x..", "..xx.", "..xx.", "..xx."),
            ("..xx.", "..xx.", "..xx.", "...x.", "...x.", "...x."),
        ],
    ),
    "padding on the right is never computed": (
        {
            "writes": {("resid_pre", 1): "..x.."},
            "final": ".x...",
            "real": "xxxx.",
            "last": False,
        },
        [
            IDLE,
            ("..xx.", NOTHING, "..x..", "..xx.", "..xx.", "..xx."),
            ("..xx.", "..xx.", "..xx.", "..xx.", "..xx.", "..xx."),
        ],
    ),
    "parallel: the MLP doesn't see attention": (
        {"writes": {("z", 1): "..x.."}, "parallel": True},
        [IDLE, ("..x..", NOTHING, NOTHING, NOTHING, "..x..", NOTHING), (*ITSELF[:5], NOTHING)],
    ),
    "parallel: later tokens attend only": (
        {"writes": {("resid_pre", 1): "..x.."}, "parallel": True},
        [IDLE, ("..xxx", NOTHING, "..x..", "..xxx", "..xxx", "..x.."), LATER[2]],
    ),
    "a read inside that nothing changes": (
        {"writes": {("z", 1): "..x.."}, "reads": {("resid_post", 1): "x...."}},
        [IDLE, ("x.x..", NOTHING, NOTHING, NOTHING, "..x..", "..x.."), ITSELF],
    ),
    "neurons that are read are computed": (
        {"writes": {("z", 1): "..x.."}, "reads": {("mlp_hidden", 1): ".x..."}},
        [IDLE, (".xx..", NOTHING, NOTHING, NOTHING, "..x..", ".xx.."), ITSELF],
    ),
    "a read below the write": (
        {"writes": {("z", 1): "..x.."}, "reads": {("q", 0): ".x..."}},
        [
            (".x...", *IDLE[1:]),
            ("..x..", NOTHING, NOTHING, NOTHING, "..x..", "..x.."),
            ITSELF,
        ],
    ),
    "a read in the last block": (
        {"writes": {("k", 2): ".x..."}, "reads": {("z", 2): "..x.."}},
        [IDLE, IDLE, (".xx.x", NOTHING, NOTHING, "..x.x", "..x.x", "..x.x")],
    ),
    "without resume: from the embedding": (
        {"writes": {("resid_pre", 1): "..x.."}, "resume": False},
        [
            ("..xxx", "..xxx", "..xxx", "..xxx", "..xxx", "..xxx"),
            ("..xxx", "..xxx", "..xxx", "..xxx", "..xxx", "..xxx"),
            ("..xxx", "..xxx", "..xxx", "....x", "....x", "....x"),
        ],
    ),
    "without inside: from the block's input": (
        {"writes": {("z", 1): "..x.."}, "inside": False},
        LATER,
    ),
    "without prefix: the whole prompt": (
        {"writes": {("z", 1): "..x.."}, "prefix": False},
        [
            IDLE,
            ("xxxxx", NOTHING, "xxxxx", "xxxxx", "xxxxx", "xxxxx"),
            ("xxxxx", "xxxxx", "xxxxx", "....x", "....x", "....x"),
        ],
    ),
    "without last: tokens that nobody reads": (
        {"writes": {("z", 1): ".x..."}, "final": "..x..", "last": False},
        [
            IDLE,
            (".x...", NOTHING, NOTHING, NOTHING, ".x...", ".x..."),
            (".xxxx", ".x...", ".x...", ".xxxx", ".xxxx", ".xxxx"),
        ],
    ),
    "without anything: a whole pass": (
        {
            "writes": {("z", 1): "...x."},
            **dict.fromkeys(("resume", "inside", "prefix", "last"), False),
        },
        [("xxxxx",) * 6] * 3,
    ),
}
"""Keywords of `blocks`, and its result."""


@pytest.mark.parametrize("case", WORK)
def test_block_work_covers_only_modified_tokens_that_are_read(case: str) -> None:
    given, expected = WORK[case]
    assert blocks(**given) == expected


def test_block_work_of_many_rows_equals_that_of_each_row() -> None:
    """Holds for any writes of the rows."""
    rows = [
        ({("resid_pre", 1): "..x.."}, "....x"),
        ({("z", 0): ".x...", ("k", 2): "...x."}, "...xx"),
        ({}, "x...."),
        ({("embed", None): "x...x"}, "..x.."),
    ]
    sites = sorted({site for writes, _ in rows for site in writes}, key=str)
    for name in ("none", "resume", "inside", "prefix", "last"):
        shortcuts = Shortcuts(**({} if name == "none" else {name: False}))
        together = block_work(
            RowMasks(
                real=mask(*["xxxxx"] * 4),
                writes={s: mask(*(writes.get(s, NOTHING) for writes, _ in rows)) for s in sites},
                reads={},
                final=mask(*(final for _, final in rows)),
            ),
            3,
            parallel=False,
            shortcuts=shortcuts,
        )
        alone = [
            blocks(writes, final, **({} if name == "none" else {name: False}))
            for writes, final in rows
        ]
        for layer, work in enumerate(together):
            for number, each in enumerate(alone):
                row = slice(number, number + 1)
                own = BlockWork(
                    *(
                        getattr(work, field)[row]
                        for field in ("present", "carried", "project", "attend", "output", "mlp")
                    )
                )
                assert spell(own) == each[layer], (name, layer, number)


# --- packing of tokens ----------------------------------------------------------------------------


def bare_kept(lanes: int, columns: int) -> ActivationCache:
    """An empty cache of prompts that fill all columns."""
    return ActivationCache(Batch.of([[1] * columns] * lanes, 0, "left"))


def pack(present: TokenMask, lanes: Sequence[int], attends: TokenMask | None = None) -> BlockPack:
    """Pack a block of rows on three lanes in which all tokens are computed."""
    attends = present if attends is None else attends
    work = BlockWork(present, present, present, attends, present, present)
    kept = bare_kept(3, present.shape[1])
    return pack_block(work, np.array(lanes), kept, torch.device("cpu"))


def described(group: AttentionGroup) -> tuple[int, list[int], int, list[int], list[int]]:
    return (
        group.start,
        group.lanes.device.tolist(),
        group.rows,
        group.columns.device.tolist(),
        group.queries.device.tolist(),
    )


def test_rows_with_equal_columns_form_a_group_over_lanes_with_equal_row_counts() -> None:
    present = mask("..xxx", "..xxx", "...xx", "..xxx", ".....", "..xxx", "..xxx")
    found = pack(present, [0, 1, 0, 0, 0, 1, 2])
    # Rows 0, 3 on lane 0 and 1, 5 on lane 1; row 6 alone on lane 2; row 2 has other columns.
    assert sorted(described(group) for group in found.groups) == sorted(
        described(
            AttentionGroup(
                start, DeviceIndex.of(lanes), rows, DeviceIndex.of(columns), DeviceIndex.of(ask)
            )
        )
        for start, lanes, rows, columns, ask in [
            (found.lookup[2, 3], [0], 1, [3, 4], [0, 1]),
            (found.lookup[6, 2], [2], 1, [2, 3, 4], [0, 1, 2]),
            (found.lookup[0, 2], [0, 1], 2, [2, 3, 4], [0, 1, 2]),
        ]
    )
    first = found.lookup[0, 2]
    assert [found.lookup[row, 2] for row in (0, 3, 1, 5)] == [
        first,
        first + 3,
        first + 6,
        first + 9,
    ]
    assert (found.lookup[4] == -1).all()
    assert len(found) == 2 + 3 + 12


def test_rows_with_different_queries_form_separate_groups() -> None:
    present = mask("..xxx", "..xxx", "..xxx")
    found = pack(present, [0, 0, 1], mask("....x", "..xxx", "....x"))
    assert sorted(
        (group.lanes.host.tolist(), group.rows, group.queries.host.tolist())
        for group in found.groups
    ) == [([0], 1, [0, 1, 2]), ([0, 1], 1, [2])]


@pytest.mark.parametrize("seed", range(20))
def test_packed_tokens_are_in_one_group_at_their_index(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, columns = 9, 5
    patterns = draw.random((3, columns)) < 0.6
    present = patterns[draw.integers(0, 3, rows)]
    lanes = draw.integers(0, 3, rows)
    attends = present & (draw.random(columns) < 0.6)
    computed = present & (draw.random((rows, columns)) < 0.7)
    work = BlockWork(present, present, computed, attends, attends, computed)
    found = pack_block(work, lanes, bare_kept(3, columns), torch.device("cpu"))
    assert sorted(found.lookup[present]) == list(range(int(present.sum())))
    assert (found.lookup[~present] == -1).all()
    seen = 0
    for group in found.groups:
        assert group.start == seen
        for lane in group.lanes.host.tolist():
            for _ in range(group.rows):
                tokens = np.arange(seen, seen + len(group.columns))
                own = [int(np.flatnonzero((found.lookup == t).any(axis=1))[0]) for t in tokens]
                row = own[0]
                assert own == [row] * len(tokens)
                assert lanes[row] == lane
                columns_there = group.columns.host.tolist()
                assert found.lookup[row, columns_there].tolist() == tokens.tolist()
                assert np.flatnonzero(present[row]).tolist() == columns_there
                asking = group.columns.host[group.queries.host].tolist()
                assert np.flatnonzero(attends[row]).tolist() == asking
                assert found.kept_index[tokens].tolist() == [
                    lane * columns + c for c in columns_there
                ]
                seen += len(tokens)
    assert seen == len(found)
    if found.project is not None:
        chosen = found.lookup[computed]
        assert sorted(found.project.computed.tolist()) == sorted(chosen.tolist())
        assert found.project.taken_from.tolist() == found.kept_index[found.project.taken].tolist()
        inside = found.project.lookup[computed]
        assert found.project.computed[inside].tolist() == chosen.tolist()


# --- attention ------------------------------------------------------------------------------------

HEADS, SHARED, WIDTH = 4, 2, 3


@pytest.mark.parametrize("scheme", ["causal", "by lane", "by head", "none"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 0.7}, {"s_aux": True}, {"scaling": 0.3}])
@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_packed_attention_equals_a_loop_over_rows(
    scheme: str, extra: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference loops over rows, tokens and heads; every row has its own keys and values.

    at_once: the number of scores in memory: of one query, of some, of all.
    """
    monkeypatch.setattr(mechdsl.forward.hooks.attention, "MAX_SCORES", at_once)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    columns, lanes = 5, [0, 1, 0, 2, 1, 1]
    present = mask("..xxx", "..xxx", "x..x.", "..xxx", "xxxxx", "..xxx")
    attends = mask("...xx", "...xx", "x..x.", "...xx", "xxxxx", "..x.x")
    found = pack(present, lanes, attends)
    key_heads = HEADS // SHARED
    keys, values = normal(3, key_heads, columns, WIDTH), normal(3, key_heads, columns, WIDTH)
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()
    seen: Tensor | None
    match scheme:
        case "causal":
            seen = causal[None, None]
        case "by lane":
            window = causal & ~causal.tril(-2)
            seen = torch.stack([causal, window, causal])[:, None]
        case "by head":
            seen = normal(1, HEADS, columns, columns).masked_fill(~causal, float("-inf"))
        case _:
            seen = None
    count = len(found)
    query, key, value = (normal(n, count, WIDTH) for n in (HEADS, key_heads, key_heads))
    arguments = dict(extra)
    if "s_aux" in extra:
        arguments["s_aux"] = normal(HEADS)
    out = torch.full((count, HEADS, WIDTH), 7.0, dtype=torch.float64)
    kept = CachedAttention(keys, values, seen)
    causal_scheme, masks = scheme != "none", GroupMasks(VisibleKeyCounts())
    attend(
        query, key, value, found.groups, kept, out, masks=masks, causal=causal_scheme, **arguments
    )

    for row, lane in enumerate(lanes):
        own = np.flatnonzero(present[row])
        tokens = found.lookup[row, own]
        row_keys, row_values = keys[lane].clone(), values[lane].clone()
        row_keys[:, own], row_values[:, own] = key[:, tokens], value[:, tokens]
        for column, token in zip(own, tokens, strict=True):
            if not attends[row, column]:
                assert (out[token] == 7.0).all()
                continue
            for head in range(HEADS):
                scores = row_keys[head // SHARED] @ query[head, token]
                scores = scores * arguments.get("scaling", WIDTH**-0.5)
                if "softcap" in extra:
                    scores = (scores / 0.7).tanh() * 0.7
                if seen is not None:
                    bias = seen[lane if len(seen) > 1 else 0, head if scheme == "by head" else 0]
                    bias = bias[column]
                    if bias.dtype == torch.bool:
                        scores = scores.masked_fill(~bias, float("-inf"))
                    else:
                        scores = scores + bias
                weights = scores.exp()
                total = weights.sum()
                if "s_aux" in extra:
                    total = total + arguments["s_aux"][head].exp()
                expected = (weights / total) @ row_values[head // SHARED]
                assert torch.allclose(out[token, head], expected, atol=1e-12), (row, column, head)


# --- equality with full passes --------------------------------------------------------------------

PROMPTS = [
    [1, 9, 22, 31, 17, 40, 5, 28, 33, 12, 7],
    [1, 14, 8, 51, 19, 21, 6],
    [1, 30, 11, 6, 45, 19, 36, 41, 2],
]
"""All are longer than the sliding windows of the families that have one (3)."""


def kept_of(
    model: LoadedModel, side: PaddingSide, prompts: Sequence[Sequence[int]] = PROMPTS
) -> ActivationCache:
    batch = Batch.of(prompts, model.pad_id, side)
    with record_activations(model, batch, 0) as kept:
        run_full(model, batch)
    return kept


def write(
    model: LoadedModel,
    site: str,
    layer: int | None,
    places: Sequence[tuple[int, int]],
    seed: int = 0,
    mode: Literal["set", "add"] = "set",
) -> SiteWrite:
    """Random vectors for all units of a site at (row, position)."""
    generator = torch.Generator().manual_seed(seed)
    count = unit_count(model.shape, site, layer)
    row, position = torch.tensor(places).repeat_interleave(count, dim=0).unbind(1)
    values = torch.randn(len(row), vector_width(model.shape, site, layer), generator=generator)
    return SiteWrite(
        site, layer, row, position, torch.arange(count).repeat(len(places)), values, mode
    )


def every_token(kept: ActivationCache, lanes: Sequence[int]) -> RowPositions:
    """(row, position) of all tokens of rows on these lanes."""
    lengths = kept.batch.lengths[torch.tensor(lanes)].tolist()
    return (
        np.repeat(np.arange(len(lanes)), lengths),
        np.concatenate([np.arange(n) for n in lengths]),
    )


def last_tokens(kept: ActivationCache, lanes: Sequence[int]) -> RowPositions:
    return np.arange(len(lanes)), kept.batch.lengths[torch.tensor(lanes)].numpy() - 1


def at_places(
    kept: ActivationCache, lanes: Sequence[int], whole: Tensor, places: RowPositions
) -> Tensor:
    """Select the given (row, position) pairs of a full pass's tensor [row, column, …]."""
    row, position = (torch.from_numpy(each) for each in places)
    return whole[row, kept.batch.starts[torch.tensor(lanes)][row] + position]


def same_as_whole(
    model: LoadedModel,
    kept: ActivationCache,
    lanes: Sequence[int],
    writes: Sequence[SiteWrite],
    final: RowPositions,
    reads: Mapping[SiteRead, RowPositions] | None = None,
    tokens: Tensor | None = None,
    shortcuts: Shortcuts | None = None,
    fuse: bool = True,
    whole: FullPassResult | None = None,
) -> PackedResult:
    """Run packed rows and compare logits and reads with those of a full pass.

    whole: the result of the full pass, if it was computed before.
    """
    reads = reads or {}
    if whole is None:
        rows = kept.batch.take(torch.tensor(lanes))
        whole = run_full(model, rows, writes=writes, reads=list(reads))
    assert whole.logits is not None
    result = run_packed(
        model,
        kept,
        np.array(lanes),
        writes=writes,
        final=final,
        reads=reads,
        tokens=tokens,
        shortcuts=shortcuts,
        fuse=fuse,
    )
    expected = at_places(kept, lanes, whole.logits, final)
    expected = expected if tokens is None else expected[:, tokens]
    assert torch.allclose(result.logits, expected, atol=1e-4, rtol=0)
    for read, places in reads.items():
        wanted = at_places(kept, lanes, whole.reads[read], places)
        assert result.reads[read].shape == wanted.shape
        assert torch.allclose(result.reads[read], wanted, atol=1e-4, rtol=1e-5), read
    return result


def everywhere(model: LoadedModel) -> list[tuple[str, int | None]]:
    """All sites of all layers."""
    return [
        (site, layer)
        for site in sorted(model.shape.sites)
        for layer in (model.anatomy.layers(site) if SITES[site].has_layer else (None,))
    ]


def rows_of_whole_passes(
    model: LoadedModel, kept: ActivationCache, positions: tuple[int, int]
) -> None:
    """Write every site of every layer at an early and a late token in one packed pass."""
    cells = [(*cell, position) for cell in everywhere(model) for position in positions]
    lanes = [number % 3 for number in range(len(cells))]
    writes = [
        write(model, site, layer, [(row, position)], seed=row)
        for row, (site, layer, position) in enumerate(cells)
    ]
    same_as_whole(model, kept, lanes, writes, every_token(kept, lanes))
    same_as_whole(model, kept, lanes, writes, last_tokens(kept, lanes))


@pytest.mark.parametrize(("family", "side"), families.SIDED)
def test_packed_rows_of_every_family_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str, side: PaddingSide
) -> None:
    """One pass has every site and layer, at an early and at a late token."""
    model = loaded[family]
    kept = kept_of(model, side)
    rows_of_whole_passes(model, kept, (1, 5))


@pytest.mark.parametrize("at_once", [4, 200])
@pytest.mark.parametrize("family", families.EACH)
def test_packed_rows_with_chunked_attention_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """at_once: the number of scores in memory, of one query and of some rows."""
    model = loaded[family]
    kept = kept_of(model, "left")
    writes = [
        write(model, "resid_pre", 0, [(0, 0), (1, 2)]),
        write(model, "z", 1, [(2, 3), (2, 6)]),
        write(model, "k", 1, [(3, 4)]),
    ]
    lanes = [0, 1, 2, 0]
    whole = run_full(model, kept.batch.take(torch.tensor(lanes)), writes=writes)
    monkeypatch.setattr(mechdsl.forward.hooks.attention, "MAX_SCORES", at_once)
    kept = kept_of(model, "left")
    same_as_whole(model, kept, lanes, writes, every_token(kept, lanes), whole=whole)
    same_as_whole(model, kept, lanes, writes, last_tokens(kept, lanes), whole=whole)


class LargestSoftmax(TorchDispatchMode):
    """Records the size of the largest softmax."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "softmax" in func._schema.name:
            self.numbers = max(self.numbers, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_a_long_row_are_computed_in_chunks(
    loaded: dict[str, LoadedModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 heads and 60 tokens have 14,400 scores."""
    model = loaded[family]
    kept = kept_of(model, "left", [[1, *range(2, 47), *range(3, 17)]])
    monkeypatch.setattr(mechdsl.forward.hooks.attention, "MAX_SCORES", 1000)
    first = [write(model, "resid_pre", 0, [(0, 0)])]
    with LargestSoftmax() as largest:
        run_packed(model, kept, np.array([0]), writes=first, final=every_token(kept, [0]))
    assert 0 < largest.numbers <= 1000


@pytest.mark.parametrize(("family", "side"), families.SIDED)
def test_reads_in_packed_rows_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str, side: PaddingSide
) -> None:
    """At tokens before, at and after the writes, and in earlier blocks: each site alone, in
    alternating layers, and all together."""
    model = loaded[family]
    kept = kept_of(model, side)
    lanes = [0, 1, 2, 0]
    writes = [
        write(model, "z", 1, [(0, 3), (0, 6)]),
        write(model, "resid_pre", 1, [(1, 2)]),
        write(model, "mlp_out", 0, [(2, 5)]),
    ]
    places = every_token(kept, lanes)
    some = np.random.default_rng(0).permutation(len(places[0]))[:17]
    chosen = places[0][some], places[1][some]
    cells = everywhere(model)
    rows = kept.batch.take(torch.tensor(lanes))
    whole = run_full(model, rows, writes=writes, reads=[SiteRead(*cell) for cell in cells])
    last = last_tokens(kept, lanes)
    turn = 0 if side == "left" else 1
    for number, site in enumerate(dict.fromkeys(site for site, _ in cells)):
        layers = [layer for name, layer in cells if name == site]
        layer = layers[(number + turn) % len(layers)]
        final = places if layer is None else last
        reads = {SiteRead(site, layer): chosen}
        same_as_whole(model, kept, lanes, writes, final, reads, whole=whole)
    inside = {SiteRead(*cell): chosen for cell in cells if cell[1] is not None}
    same_as_whole(model, kept, lanes, writes, last, inside, whole=whole)


def draw_case(model: LoadedModel, seed: int) -> dict[str, Any]:
    """Random rows, writes, reads, finals and shortcuts: arguments of `same_as_whole`."""
    draw = random.Random(seed)
    prompts = [
        [1, *(draw.randrange(3, 53) for _ in range(draw.randrange(9)))]
        for _ in range(draw.randrange(1, 4))
    ]
    kept = kept_of(model, draw.choice(("left", "right")), prompts)
    lanes = [draw.randrange(len(prompts)) for _ in range(6)]
    lengths = [len(prompts[lane]) for lane in lanes]
    cells = everywhere(model)
    places: dict[tuple[str, int | None], set[tuple[int, int]]] = defaultdict(set)
    for row, length in enumerate(lengths):
        for _ in range(draw.choice((0, 1, 1, 2, 3))):
            cell = draw.choice(cells)
            for _ in range(draw.choice((1, 1, 2))):
                places[cell].add((row, draw.randrange(length)))
    tokens = torch.tensor(draw.sample(range(53), 5)) if draw.random() < 0.5 else None
    writes: list[SiteWrite] = []
    for (site, layer), found in places.items():
        if site == "logits" and tokens is not None:
            continue
        for mode in ("set", "add"):
            some = sorted(place for place in found if draw.random() < 0.6)
            if some:
                writes.append(write(model, site, layer, some, seed, mode))
    share = draw.choice((0.1, 0.5, 1.0))
    final = [
        (row, position)
        for row, length in enumerate(lengths)
        for position in range(length)
        if draw.random() < share
    ] or [(0, 0)]
    draw.shuffle(final)
    reads: dict[SiteRead, RowPositions] = {}
    for site, layer in draw.sample([cell for cell in cells if cell[1] is not None], 2):
        rows = draw.sample(range(6), draw.randrange(1, 7))
        reads[SiteRead(site, layer)] = (
            np.array(rows),
            np.array([draw.randrange(lengths[row]) for row in rows]),
        )
    row, position = np.array(final).T
    return {
        "kept": kept,
        "lanes": lanes,
        "writes": writes,
        "final": (row, position),
        "reads": reads if draw.random() < 0.5 else None,
        "tokens": tokens,
        "shortcuts": Shortcuts(*(draw.random() < 0.8 for _ in range(4))),
        "fuse": draw.random() < 0.5,
    }


@pytest.mark.parametrize("family", families.EACH)
def test_random_packed_rows_equal_full_passes(loaded: dict[str, LoadedModel], family: str) -> None:
    for seed in range(10):
        same_as_whole(loaded[family], **draw_case(loaded[family], seed))


@pytest.mark.parametrize("family", families.VERIFIED)
@pytest.mark.parametrize("site", ["embed", "final_norm", "logits"])
def test_packed_writes_at_embed_final_norm_and_logits_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str, site: str
) -> None:
    model = loaded[family]
    kept = kept_of(model, "left")
    lanes = [2, 0]
    writes = [write(model, site, None, [(0, 8), (1, 3)])]
    every = same_as_whole(model, kept, lanes, writes, every_token(kept, lanes))
    plain = same_as_whole(model, kept, lanes, [], every_token(kept, lanes))
    assert (every.logits - plain.logits).abs().amax() > 1e-2
    if site != "embed":
        assert every.work == (0, 0, 0)
    # A write at a token that isn't read has no effect, and is no error.
    last = same_as_whole(model, kept, lanes, writes, last_tokens(kept, lanes))
    assert last.work == ((1 + 8, 1 + 8, 1 + 8) if site == "embed" else (0, 0, 0))


@pytest.mark.parametrize("family", families.VERIFIED)
def test_packed_row_without_a_write_equals_the_base_run(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    kept = kept_of(model, "left")
    lanes = [1, 0, 2, 1]
    alone = same_as_whole(model, kept, lanes, [], every_token(kept, lanes))
    assert alone.work == (0, 0, 0)
    beside = [write(model, "z", 1, [(1, 2)])]
    result = same_as_whole(model, kept, lanes, beside, every_token(kept, lanes))
    others = every_token(kept, lanes)[0] != 1
    assert torch.allclose(result.logits[others], alone.logits[others], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_work_counts_the_tokens_of_each_block(
    loaded: dict[str, LoadedModel], side: PaddingSide
) -> None:
    model = loaded["gpt2"]
    kept = kept_of(model, side)
    writes = [
        write(model, "resid_pre", 1, [(0, 7)]),  # of 11 tokens: 4 in blocks 1 and 2
        write(model, "z", 0, [(1, 2), (1, 5)]),  # of 7: 2 in block 0, then 5, and 5
        write(model, "mlp_out", 2, [(2, 8)]),  # the last of 9
    ]
    result = same_as_whole(model, kept, [0, 1, 2], writes, last_tokens(kept, [0, 1, 2]))
    assert result.work == (2, 4 + 5, 4 + 5 + 1)
    whole = Shortcuts(resume=False, inside=False, prefix=False, last=False)
    again = same_as_whole(
        model, kept, [0, 1, 2], writes, last_tokens(kept, [0, 1, 2]), shortcuts=whole
    )
    assert again.work == (27, 27, 27)


@pytest.mark.parametrize("family", families.VERIFIED)
def test_packed_rows_with_gaps_and_several_layers_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    kept = kept_of(model, "left")
    lanes = [0, 0, 1, 1, 1, 2]
    writes = [
        write(model, "k", 0, [(0, 2), (0, 5), (2, 2)]),
        write(model, "z", 1, [(0, 3), (1, 2), (1, 5), (5, 8)]),
        write(model, "resid_post", 1, [(0, 9), (3, 2), (3, 5)]),
        write(model, "q", 2, [(0, 10), (4, 2), (4, 5), (4, 6)]),
        write(model, "v", 2, [(0, 2), (4, 2)], mode="add"),
    ]
    for final in (every_token(kept, lanes), last_tokens(kept, lanes)):
        for fuse in (True, False):
            same_as_whole(model, kept, lanes, writes, final, fuse=fuse)


@pytest.mark.parametrize("family", families.VERIFIED)
def test_packed_lanes_with_unequal_row_counts_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    """All rows have the same columns, so they form groups of several lanes and of one."""
    model = loaded[family]
    kept = kept_of(model, "right")
    lanes = [2, 0, 0, 1, 0, 2, 1, 0]
    for site in ("resid_pre", "z"):
        writes = [write(model, site, 1, [(row, 4) for row in range(8)])]
        same_as_whole(model, kept, lanes, writes, every_token(kept, lanes))
        reordered = [lanes[row] for row in (5, 2, 7, 0, 3, 6, 1, 4)]
        same_as_whole(model, kept, reordered, writes, last_tokens(kept, reordered))


@pytest.mark.parametrize("family", families.VERIFIED)
def test_packed_rows_need_no_activations_before_the_first_write(
    loaded: dict[str, LoadedModel], family: str
) -> None:
    model = loaded[family]
    batch = Batch.of(PROMPTS, model.pad_id, "left")
    for lowest in range(model.shape.n_layers + 1):
        with record_activations(model, batch, lowest) as kept:
            run_full(model, batch)
        assert sorted(kept.hidden) == list(range(lowest, model.shape.n_layers + 1))
        cells = [
            (site, layer)
            for site, layer in everywhere(model)
            if (0 if site == "embed" else model.shape.n_layers if layer is None else layer)
            >= lowest
        ]
        writes = [write(model, *cell, [(row, 3)], seed=row) for row, cell in enumerate(cells)]
        lanes = [row % 3 for row in range(len(cells))]
        same_as_whole(model, kept, lanes, writes, last_tokens(kept, lanes))


def test_packed_logits_are_in_the_requested_order(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    kept = kept_of(model, "left")
    final = np.array([1, 0, 1, 1, 0]), np.array([3, 10, 0, 3, 2])
    result = same_as_whole(model, kept, [0, 2], [write(model, "z", 1, [(0, 1), (1, 2)])], final)
    assert torch.equal(result.logits[0], result.logits[3])


def test_logits_read_at_an_unrequested_token_is_rejected(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["gpt2"]
    kept = kept_of(model, "left")
    writes = [write(model, "resid_pre", 1, [(0, 4)])]
    reads = {SiteRead("logits"): (np.array([0, 0]), np.array([10, 2]))}
    with pytest.raises(ReadMismatch, match="`logits` is read at a token that isn't"):
        same_as_whole(model, kept, [0], writes, last_tokens(kept, [0]), reads)
    there = {SiteRead("logits"): (np.array([0]), np.array([10]))}
    same_as_whole(model, kept, [0], writes, last_tokens(kept, [0]), there)


@pytest.mark.parametrize("site", ["embed", "final_norm"])
def test_packed_reads_of_embed_and_final_norm_equal_full_passes(
    loaded: dict[str, LoadedModel], site: str
) -> None:
    """Tokens before and after a write, of a patched row and of an unpatched one."""
    model = loaded["gpt2"]
    kept = kept_of(model, "left")
    writes = [write(model, "resid_pre", 1, [(0, 4)])]
    reads = {SiteRead(site): (np.array([0, 0, 0, 1]), np.array([10, 2, 4, 1]))}
    same_as_whole(model, kept, [0, 1], writes, last_tokens(kept, [0, 1]), reads)


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["none", "resume", "inside", "prefix", "last", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_packed_rows_of_a_noised_run_equal_full_passes(
    loaded: dict[str, LoadedModel], family: str, off: str
) -> None:
    """The noise is in the embeddings of the base run; a row's written embedding replaces it."""
    model = loaded[family]
    batch = Batch.of(PROMPTS, model.pad_id, "left")
    noise = write(model, "embed", None, [(0, 2), (1, 1), (2, 4)], 1, "add")
    embed = SiteRead("embed")
    with record_activations(model, batch, 0) as kept:
        kept.embedded = run_full(model, batch, writes=[noise], reads=[embed]).reads[embed]
        kept.embedded = kept.embedded.flatten(0, 2)
    own = write(model, "embed", None, [(1, 3)], 2)
    patches = [write(model, "z", 1, [(0, 3), (1, 1), (2, 6)]), own]
    final = every_token(kept, [0, 1, 2])
    whole = run_full(model, batch, writes=[noise, *patches], reads=[embed])
    assert whole.logits is not None
    names = ("resume", "inside", "prefix", "last")
    result = run_packed(
        model,
        kept,
        np.arange(3),
        writes=patches,
        final=final,
        reads={embed: final},
        shortcuts=Shortcuts(**{name: off not in (name, "all") for name in names}),
    )
    expected = at_places(kept, [0, 1, 2], whole.logits, final)
    assert torch.allclose(result.logits, expected, atol=1e-4)
    embedded = at_places(kept, [0, 1, 2], whole.reads[embed], final)
    assert torch.allclose(result.reads[embed], embedded, atol=1e-5)
    assert nothing_left(model.module)


# --- cleanup --------------------------------------------------------------------------------------


def implementations(module: nn.Module) -> list[Any]:
    """The attention implementation in each config of the model."""
    return [
        part.config._attn_implementation
        for part in module.modules()
        if hasattr(part, "config") and hasattr(part.config, "_attn_implementation")
    ]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("family", families.EACH)
def test_interrupted_packed_pass_restores_the_model(
    loaded: dict[str, LoadedModel], family: str, error: type[BaseException]
) -> None:
    model = loaded[family]
    kept = kept_of(model, "left")
    before, attention = call_with_batch(model, kept.batch), implementations(model.module)
    assert attention
    writes = [write(model, "z", 1, [(0, 2)]), write(model, "resid_mid", 1, [(1, 2)])]
    if model.parallel:
        writes = writes[:1]
    given = {"writes": writes, "final": last_tokens(kept, [0, 1]), "tokens": torch.tensor([3])}
    armed = [True]

    def interrupt(*args: Any) -> None:
        if armed[0]:
            raise error

    block = model.anatomy.blocks[1]
    for path in (block.path, *block.mlp, block.output or ""):
        part = model.module.get_submodule(path)
        handle = part.register_forward_hook(interrupt)
        with pytest.raises(error):
            run_packed(model, kept, np.array([0, 1]), **given)
        with pytest.raises(error), record_activations(model, kept.batch, 0):
            run_full(model, kept.batch)
        handle.remove()
        assert nothing_left(model.module)
        assert clean_model_check(model.module) == []
        assert implementations(model.module) == attention
        assert torch.equal(call_with_batch(model, kept.batch), before)
    run_packed(model, kept, np.array([0, 1]), **given)
    assert nothing_left(model.module)
    assert implementations(model.module) == attention
    assert torch.equal(call_with_batch(model, kept.batch), before)


def test_packed_pass_keeps_foreign_hooks_and_forwards(loaded: dict[str, LoadedModel]) -> None:
    """On a block that rows skip, and on one that they partly recompute."""
    model = loaded["llama"]
    kept = kept_of(model, "left")
    paths = ("model.layers.0", "model.layers.2.mlp", "model.layers.2.self_attn.q_proj")
    parts = [model.module.get_submodule(path) for path in paths]
    calls: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda m, *args: calls.append(m)) for part in parts]
    originals = [part.forward for part in parts]
    theirs: list[Any] = []
    for part, original in zip(parts, originals, strict=True):
        part.forward = lambda *args, original=original, **kwargs: original(*args, **kwargs)
        theirs.append(part.forward)
    writes = [write(model, "resid_pre", 1, [(0, 3)])]
    same_as_whole(model, kept, [0], writes, last_tokens(kept, [0]))
    assert [part.forward for part in parts] == theirs
    assert len(calls) == 2 * len(parts)
    for part, handle in zip(parts, handles, strict=True):
        handle.remove()
        del part.forward
    assert nothing_left(model.module)


def test_packed_rows_and_positions_out_of_range_are_rejected(
    loaded: dict[str, LoadedModel],
) -> None:
    model = loaded["gpt2"]
    kept = kept_of(model, "right")
    for row, position, message in (
        (2, 0, "out of bounds"),
        (1, 7, "a position"),
        (1, -1, "a position"),
    ):
        place = np.array([0, row]), np.array([0, position])  # next to a valid one
        with pytest.raises((ValueError, IndexError), match=message):
            run_packed(model, kept, np.array([0, 1]), writes=[], final=place)
        with pytest.raises((ValueError, IndexError), match=message):
            run_packed(
                model,
                kept,
                np.array([0, 1]),
                writes=[write(model, "z", 1, [(0, 0), (row, position)])],
                final=last_tokens(kept, [0, 1]),
            )
    twice = write(model, "z", 1, [(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="twice in one write"):
        run_packed(model, kept, np.array([0]), writes=[twice], final=last_tokens(kept, [0]))
    assert nothing_left(model.module)
