"""Edits of attention edges, patched attention patterns and scores, and observed attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import Edge, Run, Write, side_by_side
from .models import FAMILIES, double
from .paths import End, copied
from .support import (
    MANY,
    QUICK,
    Key,
    Text,
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    table,
    tokens,
    unpatched,
    worked_out,
)

LAYERS, HEADS = range(3), range(4)
EACH = [(n,) for n in LAYERS]
ONE: list[tuple[Coord, ...]] = [()]
CUE, LAST, SUBJECT = "cue token", "last token", "subject token"
AT_CUE = "measure logit(answer) - logit(wrong) at cue token as delta"
SAME_HEADS = ("gpt2", "gpt_neox", "gpt_neox_sequential")
"""Families with as many key heads as query heads."""

Done = tuple[list[Write], list[Edge]]
Act = Callable[..., Sequence[Done]]
"""From a model's name, a row's number and the cell's coordinates: the runs whose values are
averaged; empty if the row lacks a position."""


@dataclass(frozen=True)
class Case:
    """Rules, and their reference changes in each cell."""

    rules: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    act: Act
    base: str = "clean"
    block: str = "p"
    but: tuple[str, ...] = ()
    """Models on which the rule does nothing or doesn't exist."""


def edges(
    text: Text,
    kind: Any,
    layers: Sequence[int],
    query: str,
    key: str,
    amount: float = 0.0,
    heads: Sequence[int] | None = None,
) -> list[Edge]:
    queries, keys = tokens(text, query), tokens(text, key)
    return [Edge(kind, layer, queries, keys, amount, heads) for layer in layers]


def edit(
    kind: str,
    query: str,
    key: str,
    amount: float = 0.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Act:
    """One edit; a cell's coordinates are its layer and its head, unless they are given."""

    def act(name: str, n: int, *at: Coord) -> Sequence[Done]:
        left = list(at)
        own = layers if layers is not None else [left.pop(0)]
        units = heads if heads is not None or not left else [left.pop(0)]
        return [([], edges(rows()[n], kind, own, query, key, amount, units))]  # type: ignore[arg-type]

    return act


def made(several: Callable[..., list[Edge] | None]) -> Act:
    """Edits of a clean text, in one run."""

    def act(name: str, n: int, *at: Coord) -> Sequence[Done]:
        found = several(rows()[n], *at)
        return [] if found is None else [([], found)]

    return act


BOTH = "{cue token, subject token}"
WINDOWED = ("mistral",)
"""All layers have a window: keys further back are not seen."""

GROUPS = """
group movers = L0H1, L1H2, head_out layer 2, L2H0.q
group shared = L1H1.k, L2H0.v
"""


def named(kind: str, amount: float, *heads: tuple[int, tuple[int, ...] | None]) -> Act:
    """One edit of some heads of some layers at once."""
    return made(
        lambda text: [
            edge for n, own in heads for edge in edges(text, kind, [n], LAST, BOTH, amount, own)
        ]
    )


EDITS: dict[str, Case] = {
    "block_a_group": Case(
        f"block attention movers from last token to {BOTH}",
        (),
        ONE,
        named("block", 0, (0, (1,)), (1, (2,)), (2, None)),
    ),
    "reweight_one_head": Case(
        f"reweight attention L1H3 from last token to {BOTH} by 6",
        (),
        ONE,
        named("reweight", 6, (1, (3,))),
    ),
    "a_head_that_is_named_twice": Case(
        f"reweight attention movers from last token to {BOTH} by 6",
        (),
        ONE,
        named("reweight", 6, (0, (1,)), (1, (2,)), (2, None)),
    ),
    "set_a_group": Case(
        f"for w in [0.01, 0.1] {{ set attention movers from last token to {BOTH} to w }}",
        ("w",),
        [(0.01,), (0.1,)],
        made(
            lambda text, w: [
                edge
                for n, own in ((0, (1,)), (1, (2,)), (2, None))
                for edge in edges(text, "set", [n], LAST, BOTH, w, own)
            ]
        ),
    ),
    "heads_of_shared_keys": Case(
        f"block attention shared from last token to {BOTH}",
        (),
        ONE,
        lambda name, n: named(
            "block",
            0,
            (1, (1,) if name in SAME_HEADS else (2, 3)),
            (2, (0,) if name in SAME_HEADS else (0, 1)),
        )(name, n),
    ),
    "block": Case(
        f"block attention layer * head * from last token to {BOTH}",
        ("layer", "head"),
        product(LAYERS, HEADS),
        edit("block", LAST, BOTH),
    ),
    "block_all_heads": Case(
        "block attention layer * from last token to cue token",
        ("layer",),
        EACH,
        edit("block", LAST, CUE),
    ),
    "block_joined_layers": Case(
        "block attention layers 0..1 heads 1, 2 from {cue token, last token} to cue token",
        (),
        ONE,
        edit("block", "{cue token, last token}", CUE, layers=(0, 1), heads=(1, 2)),
    ),
    "block_a_head_of_all_layers": Case(
        "block attention layers * head * from last token to cue token",
        ("head",),
        [(h,) for h in HEADS],
        made(lambda text, head: edges(text, "block", LAYERS, LAST, CUE, heads=[head])),
    ),
    "block_windows_of_layers": Case(
        "block attention layer * window 2 from last token to cue token",
        ("layer",),
        EACH,
        made(
            lambda text, layer: edges(text, "block", range(max(0, layer - 1), layer + 1), LAST, CUE)
        ),
    ),
    "block_all_but_some": Case(
        "block attention layer * from last token to tokens except {last token, subject token}",
        ("layer",),
        EACH,
        edit("block", LAST, "tokens except {last token, subject token}"),
    ),
    "block_between": Case(
        "block attention layer * from {cue token, last token} "
        "to tokens between first token and cue token",
        ("layer",),
        EACH,
        edit("block", "{cue token, last token}", "tokens between first token and cue token"),
    ),
    "block_all_queries": Case(
        "block attention layers * head * from tokens * to subject tokens",
        ("head",),
        [(h,) for h in HEADS],
        made(
            lambda text, head: edges(
                text, "block", LAYERS, "tokens *", "subject tokens", heads=[head]
            )
        ),
    ),
    "block_swept_queries": Case(
        f"block attention layer 0..1 from subject token, cue token, last token to {BOTH}",
        ("layer", "position"),
        product((0, 1), (SUBJECT, CUE, LAST)),
        made(lambda text, layer, query: edges(text, "block", [layer], query, BOTH)),
    ),
    "block_each_query": Case(
        "block attention layer 0 from each item token to first token",
        ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        made(
            lambda text, item: (
                edges(text, "block", [0], f"{item} token", "first token")
                if item in text.spans
                else None
            )
        ),
        but=WINDOWED,
    ),
    "block_swept_keys": Case(
        'block attention layer * from last token to cue token, "w41" token, last token',
        ("layer", "position"),
        product(LAYERS, (CUE, '"w41" token', LAST)),
        made(lambda text, layer, key: edges(text, "block", [layer], LAST, key)),
    ),
    "block_each_key": Case(
        "block attention layers * from {cue token, last token} to each item token",
        ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        made(
            lambda text, item: (
                edges(text, "block", LAYERS, "{cue token, last token}", f"{item} token")
                if item in text.spans
                else None
            )
        ),
        but=WINDOWED,
    ),
    "block_each_token_of_a_span": Case(
        "block attention layers * from {cue token, last token} to each token of subject",
        ("position",),
        [("subject first",), ("subject middle",), ("subject last",)],
        lambda name, n, part: [
            (
                [],
                [
                    Edge("block", layer, [*rows()[n].spans["cue"], rows()[n].last], [key])
                    for layer in LAYERS
                ],
            )
            for key in parts_of_span(rows()[n].spans["subject"], part)
        ],
        but=WINDOWED,
    ),
    "block_swept_both": Case(
        "block attention layer 0..1 from cue token, last token to subject token, cue token",
        ("layer", "from_position", "position"),
        product((0, 1), (CUE, LAST), (SUBJECT, CUE)),
        made(lambda text, layer, query, key: edges(text, "block", [layer], query, key)),
    ),
    "reweight": Case(
        f"reweight attention layer * head 0, 3 from last token to {BOTH} by 4",
        ("layer", "head"),
        product(LAYERS, (0, 3)),
        edit("reweight", LAST, BOTH, 4),
    ),
    "reweight_much": Case(
        f"reweight attention layers * from tokens * to {BOTH} by 8",
        (),
        ONE,
        edit("reweight", "tokens *", BOTH, 8, layers=LAYERS),
    ),
    "reweight_by_nothing": Case(
        f"reweight attention layer * from last token to {BOTH} by 0",
        ("layer",),
        EACH,
        edit("reweight", LAST, BOTH, 0),
    ),
    "reweight_loop": Case(
        f"for c in [0, 0.5, 3] {{ reweight attention layer 1 from last token to {BOTH} by c }}",
        ("c",),
        [(0,), (0.5,), (3,)],
        made(lambda text, c: edges(text, "reweight", [1], LAST, BOTH, c)),
    ),
    "reweight_loop_of_queries": Case(
        "for c in [0.1, 3, 9] "
        "{ reweight attention layer 0..1 from cue token, last token to subject token by c }",
        ("c", "layer", "position"),
        product((0.1, 3, 9), (0, 1), (CUE, LAST)),
        made(lambda text, c, layer, query: edges(text, "reweight", [layer], query, SUBJECT, c)),
        but=WINDOWED,
    ),
    "uniform": Case(
        "set attention layer * head * from last token "
        "to {cue token, subject token, last token} to uniform",
        ("layer", "head"),
        product(LAYERS, HEADS),
        edit("uniform", LAST, "{cue token, subject token, last token}"),
    ),
    "uniform_everywhere": Case(
        "set attention layer * from tokens * to tokens * to uniform",
        ("layer",),
        EACH,
        edit("uniform", "tokens *", "tokens *"),
    ),
    "set": Case(
        f"set attention layer * head 0, 3 from last token to {BOTH} to 0.2",
        ("layer", "head"),
        product(LAYERS, (0, 3)),
        edit("set", LAST, BOTH, 0.2),
    ),
    "set_all_there_is": Case(
        "set attention layer * from last token to {cue token, last token} to 0.5",
        ("layer",),
        EACH,
        edit("set", LAST, "{cue token, last token}", 0.5),
    ),
    "set_of_spans": Case(
        "set attention layer 0..1 head 1, 3 from {cue token, last token} to subject tokens to 0.2",
        ("layer", "head"),
        product((0, 1), (1, 3)),
        edit("set", "{cue token, last token}", "subject tokens", 0.2),
    ),
    "set_where_there_is_no_other_key": Case(
        "set attention layer * from {first token, last token} to {token 0, first token} to 0.2",
        ("layer",),
        EACH,
        edit("set", "{first token, last token}", "{token 0, first token}", 0.2),
        but=WINDOWED,
    ),
    "set_zero": Case(
        f"set attention layer * from last token to {BOTH} to 0",
        ("layer",),
        EACH,
        edit("set", LAST, BOTH, 0),
    ),
    "set_loop": Case(
        "for w in [0.1, 0.9] { set attention layer * from last token to cue token to w }",
        ("w", "layer"),
        product((0.1, 0.9), LAYERS),
        made(lambda text, w, layer: edges(text, "set", [layer], LAST, CUE, w)),
    ),
    "in_order": Case(
        f"reweight attention layer * from last token to {BOTH} by 3 "
        "set attention layer 1 from last token to {cue token, last token} to 0.2",
        ("layer",),
        EACH,
        made(
            lambda text, layer: [
                *edges(text, "reweight", [layer], LAST, BOTH, 3),
                *edges(text, "set", [1], LAST, "{cue token, last token}", 0.2),
            ]
        ),
    ),
    "in_the_other_order": Case(
        "set attention layer 1 from last token to {cue token, last token} to 0.2 "
        f"reweight attention layer * from last token to {BOTH} by 3",
        ("layer",),
        EACH,
        made(
            lambda text, layer: [
                *edges(text, "set", [1], LAST, "{cue token, last token}", 0.2),
                *edges(text, "reweight", [layer], LAST, BOTH, 3),
            ]
        ),
    ),
    "even_then_blocked": Case(
        "set attention layer 1 from last token to {cue token, last token} to uniform "
        "block attention layer 1 head * from last token to cue token",
        ("head",),
        [(h,) for h in HEADS],
        made(
            lambda text, head: [
                *edges(text, "uniform", [1], LAST, "{cue token, last token}"),
                *edges(text, "block", [1], LAST, CUE, heads=[head]),
            ]
        ),
    ),
    "blocked_then_even": Case(
        "block attention layer 1 from last token to cue token "
        "set attention layer 1 head * from last token to {cue token, last token} to uniform",
        ("head",),
        [(h,) for h in HEADS],
        made(
            lambda text, head: [
                *edges(text, "block", [1], LAST, CUE),
                *edges(text, "uniform", [1], LAST, "{cue token, last token}", heads=[head]),
            ]
        ),
    ),
    "blocked_then_set": Case(
        "block attention layer 1 from last token to {cue token, last token} "
        'set attention layer 1 head * from last token to {cue token, "w41" token} to 0.3',
        ("head",),
        [(h,) for h in HEADS],
        made(
            lambda text, head: [
                *edges(text, "block", [1], LAST, "{cue token, last token}"),
                *edges(text, "set", [1], LAST, '{cue token, "w41" token}', 0.3, heads=[head]),
            ]
        ),
        but=WINDOWED,  # nothing is left that 0.4 of the weight could go to
    ),
    "in_two_layers": Case(
        "block attention layer 0 from last token to cue token "
        f"reweight attention layer 2 head * from last token to {BOTH} by 5",
        ("head",),
        [(h,) for h in HEADS],
        made(
            lambda text, head: [
                *edges(text, "block", [0], LAST, CUE),
                *edges(text, "reweight", [2], LAST, BOTH, 5, heads=[head]),
            ]
        ),
    ),
    "beside_a_patch": Case(
        "from longer into clean patch resid_post layer 0 at {cue token, last token} "
        "block attention layer 1..2 from last token to cue token",
        ("layer",),
        [(1,), (2,)],
        lambda name, n, layer: [
            (
                taken(name, n, "longer", [End("resid_post", 0)], "{cue token, last token}"),
                edges(rows()[n], "block", [layer], LAST, CUE),
            )
        ],
    ),
    "beside_an_ablation": Case(
        "ablate z layer * heads 0, 1 at last token with zero "
        "set attention layer 2 from last token to {cue token, last token} to uniform",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            (
                zeros(name, n, [End("z", layer, 0), End("z", layer, 1)], LAST),
                edges(rows()[n], "uniform", [2], LAST, "{cue token, last token}"),
            )
        ],
    ),
    "in_the_corrupted_run": Case(
        f"from clean into longer reweight attention layer * from last token to {BOTH} by 4",
        ("layer",),
        EACH,
        lambda name, n, layer: [([], edges(rows("longer")[n], "reweight", [layer], LAST, BOTH, 4))],
        base="longer",
    ),
}


def parts_of_span(span: Sequence[int], part: str) -> Sequence[int]:
    """A single token is last."""
    return {
        "subject first": span[:-1][:1],
        "subject middle": span[1:-1],
        "subject last": span[-1:],
    }[part]


def taken(
    name: str, n: int, run: str, ends: Sequence[End], where: str, onto: str | None = None
) -> list[Write]:
    source, base = rows(run)[n], rows()[n]
    return copied(ends, plain(name, source), tokens(source, where), tokens(base, onto or where))


def constants(name: str, n: int, ends: Sequence[End], where: str, number: float) -> list[Write]:
    base = rows()[n]
    places = tokens(base, where)
    found = copied(ends, plain(name, base), places, places)
    return [
        Write(w.site, w.layer, torch.full_like(w.vector, number), w.position, w.unit) for w in found
    ]


def zeros(name: str, n: int, ends: Sequence[End], where: str) -> list[Write]:
    return constants(name, n, ends, where, 0)


def means(name: str, n: int, ends: Sequence[End], where: str, block: str) -> list[Write]:
    """Over all rows, each with its own position."""
    every = rows("clean" if block == "p" else block)
    found: list[Write] = []
    for end in ends:
        vectors = [plain(name, text)[end.site, end.layer] for text in every]
        for number, target in enumerate(tokens(every[n], where)):
            for unit in range(vectors[0].shape[1]) if end.unit is None else [end.unit]:
                same = [
                    value[tokens(text, where)[number], unit]
                    for value, text in zip(vectors, every, strict=True)
                ]
                found.append(Write(end.site, end.layer, torch.stack(same).mean(0), target, unit))
    return found


def writing(how: Callable[..., list[Write]], site: str, *arguments: Any, heads: bool = True) -> Act:
    """A fill of the site, at the layer and head that are the cell's coordinates."""

    def act(name: str, n: int, layer: Coord, head: Coord | None = None) -> Sequence[Done]:
        assert isinstance(layer, int)
        assert head is None or isinstance(head, int)
        return [(how(name, n, *_with(arguments, [End(site, layer, head)])), [])]

    return act


def _with(arguments: Sequence[Any], ends: Sequence[End]) -> list[Any]:
    """`...` stands for the sites."""
    return [ends if argument is ... else argument for argument in arguments]


PAIR = "{cue token, last token}"
GRID = product(LAYERS, HEADS)
SITES: dict[str, Case] = {
    "patch_pattern": Case(
        "from other into clean patch pattern layer * head * at last token",
        ("layer", "head"),
        GRID,
        writing(taken, "pattern", "other", ..., LAST),
    ),
    "patch_scores": Case(
        "from other into clean patch scores layer * head 0, 3 at last token",
        ("layer", "head"),
        product(LAYERS, (0, 3)),
        writing(taken, "scores", "other", ..., LAST),
    ),
    "patch_all_patterns": Case(
        "from turned into clean patch pattern layer * heads * at tokens *",
        ("layer",),
        EACH,
        writing(taken, "pattern", "turned", ..., "tokens *"),
    ),
    "patch_all_scores": Case(
        "from turned into clean patch scores layer * heads * at tokens *",
        ("layer",),
        EACH,
        writing(taken, "scores", "turned", ..., "tokens *"),
    ),
    "pattern_onto": Case(
        "from other into clean patch pattern layer * heads * at cue token onto last token",
        ("layer",),
        EACH,
        writing(taken, "pattern", "other", ..., CUE, LAST),
    ),
    "zero_pattern": Case(
        "ablate pattern layer * head 1, 2 at last token with zero",
        ("layer", "head"),
        product(LAYERS, (1, 2)),
        writing(zeros, "pattern", ..., LAST),
    ),
    "zero_scores": Case(
        "ablate scores layer * head 1, 2 at cue token, last token with zero",
        ("layer", "head", "position"),
        product(LAYERS, (1, 2), (CUE, LAST)),
        lambda name, n, layer, head, at: [(zeros(name, n, [End("scores", layer, head)], at), [])],
    ),
    "mean_pattern": Case(
        "ablate pattern layer * head * at last token with mean",
        ("layer", "head"),
        GRID,
        writing(means, "pattern", ..., LAST, "even"),
        block="even",
        base="even",
    ),
    "mean_scores": Case(
        "ablate scores layer * heads * at {cue token, last token} with mean",
        ("layer",),
        EACH,
        writing(means, "scores", ..., PAIR, "even"),
        block="even",
        base="even",
    ),
    "set_pattern": Case(
        "set pattern layer * head 0, 1 at last token to 0.1",
        ("layer", "head"),
        product(LAYERS, (0, 1)),
        writing(constants, "pattern", ..., LAST, 0.1),
    ),
    "set_scores": Case(
        "set scores layer * heads * at last token to -1",
        ("layer",),
        EACH,
        writing(constants, "scores", ..., LAST, -1),
    ),
    "freeze_pattern": Case(
        "from longer into clean patch resid_post layer 0 at {cue token, last token} "
        "freeze pattern layers 1..2 heads * at tokens *",
        (),
        ONE,
        lambda name, n: [
            (
                [
                    *taken(name, n, "longer", [End("resid_post", 0)], PAIR),
                    *taken(name, n, "clean", [End("pattern", 1), End("pattern", 2)], "tokens *"),
                ],
                [],
            )
        ],
    ),
    "patch_q_rot": Case(
        "from longer into clean patch q_rot layer * head * at {cue token, last token}",
        ("layer", "head"),
        GRID,
        writing(taken, "q_rot", "longer", ..., PAIR),
    ),
    "patch_k_rot": Case(
        "from longer into clean patch k_rot layer * head 0, 1 at {cue token, last token}",
        ("layer", "head"),
        product(LAYERS, (0, 1)),
        writing(taken, "k_rot", "longer", ..., PAIR),
    ),
    "q_rot_of_all_heads": Case(
        "from other into clean patch q_rot layer * heads * at tokens *",
        ("layer",),
        EACH,
        writing(taken, "q_rot", "other", ..., "tokens *"),
    ),
    "k_rot_onto": Case(
        "from longer into clean patch k_rot layer * heads * at cue token onto subject token",
        ("layer",),
        EACH,
        writing(taken, "k_rot", "longer", ..., CUE, SUBJECT),
        but=WINDOWED,
    ),
    "zero_q_rot": Case(
        "ablate q_rot layer * head 1, 2 at last token with zero",
        ("layer", "head"),
        product(LAYERS, (1, 2)),
        writing(zeros, "q_rot", ..., LAST),
    ),
    "zero_k_rot": Case(
        "ablate k_rot layer * head 0, 1 at {cue token, last token} with zero",
        ("layer", "head"),
        product(LAYERS, (0, 1)),
        writing(zeros, "k_rot", ..., PAIR),
    ),
    "mean_q_rot": Case(
        "ablate q_rot layer * heads * at {cue token, last token} with mean",
        ("layer",),
        EACH,
        writing(means, "q_rot", ..., PAIR, "p"),
    ),
    "mean_k_rot": Case(
        "ablate k_rot layer * heads * at {cue token, last token} with mean",
        ("layer",),
        EACH,
        writing(means, "k_rot", ..., PAIR, "p"),
    ),
}

EVERY = {**EDITS, **SITES}


@cache
def expected(name: str, key: str) -> dict[Key, list[float]]:
    case = EVERY[key]
    run = "clean" if case.base == "p" else case.base
    changes = partial(case.act, name)
    return worked_out(name, case.cells, changes, rows(run), records(case.block))


@cache
def results(data: Path, name: str, mode: str, keys: tuple[str, ...]) -> dict[str, ExperimentResult]:
    """These cases in one file."""
    text = "".join(experiment(key, EVERY[key].rules, block=EVERY[key].block) for key in keys)
    return run_file(GROUPS + text, data, name, mode)


def together(name: str, key: str) -> tuple[str, ...]:
    """Cases that are run in one file with this one."""
    which = EDITS if key in EDITS else SITES
    return tuple(other for other, case in which.items() if name not in case.but)


def hold(data: Path, key: str, name: str, mode: str, keys: tuple[str, ...] = ()) -> None:
    case = EVERY[key]
    if name in case.but:
        pytest.skip("nothing that it edits is seen")
    base = unpatched(name, case.base, case.block)
    found = results(data, name, mode, keys or together(name, key))[key]
    agree(found, case.axes, expected(name, key), base, large=0.02)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("key", list(EVERY))
def test_attention_edits_equal_the_reference(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


FEW = (
    "block_all_heads",
    "reweight_by_nothing",
    "set_all_there_is",
    "set_of_spans",
    "in_order",
    "uniform_everywhere",
    "patch_all_scores",
    "patch_q_rot",
)
OTHERS = ("gpt2", "gpt_neox", "gpt_oss", "gemma2", "mistral", "qwen3", "gpt_neox_sequential")


def turn_of(key: str) -> str:
    able = [name for name in OTHERS if name not in EVERY[key].but]
    return able[list(EVERY).index(key) % len(able)]


@pytest.mark.parametrize("key", list(EVERY))
def test_attention_edits_equal_the_reference_in_other_families(data: Path, key: str) -> None:
    """Windows, caps, sinks, norms of queries and keys take turns."""
    name = turn_of(key)
    hold(data, key, name, "planned", tuple(k for k in EVERY if turn_of(k) == name))


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("name", ["gpt_oss", "mistral", "gemma2"])
@pytest.mark.parametrize("key", FEW)
def test_attention_edits_equal_the_reference_with_sinks_windows_and_caps(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(data, key, name, mode, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(EVERY))
def test_attention_edits_equal_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(data, key, name, mode)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_k_rot_has_one_head_per_key_head_of_the_model(data: Path, name: str) -> None:
    heads = 4 if name in SAME_HEADS else 2
    text = experiment(
        "e", "from longer into clean", "patch k_rot layer * head * at {cue token, last token}"
    )
    found = run_file(text, data, name, "planned")["e"]
    act = partial(SITES["patch_k_rot"].act, name)
    cells = worked_out(name, product(LAYERS, range(heads)), act, rows(), records())
    agree(found, ("layer", "head"), cells, unpatched(name), large=0.02)


def test_q_rot_and_k_rot_equal_q_and_k_without_rotary_embeddings(data: Path) -> None:
    lines = ("from longer into clean", "patch {} layer * head * at {{cue token, last token}}")
    text = "".join(
        experiment(site, lines[0], lines[1].format(site)) for site in ("q", "q_rot", "k", "k_rot")
    )
    found = {
        key: result.measures[0].patched
        for key, result in run_file(text, data, "gpt2", "planned").items()
    }
    np.testing.assert_allclose(found["q_rot"], found["q"], atol=1e-4)
    np.testing.assert_allclose(found["k_rot"], found["k"], atol=1e-4)


def test_reweighting_by_zero_equals_blocking(data: Path) -> None:
    edge = "attention layer * head * from last token to {cue token, subject token}"
    text = experiment("block", f"block {edge}") + experiment("none", f"reweight {edge} by 0")
    text += experiment("same", f"reweight {edge} by 1")
    found = {
        key: result.measures[0]
        for key, result in run_file(text, data, "gpt_oss", "planned").items()
    }
    np.testing.assert_allclose(found["none"].patched, found["block"].patched, atol=1e-4)
    unchanged = np.broadcast_to(found["same"].base, found["same"].patched.shape)
    np.testing.assert_allclose(found["same"].patched, unchanged, atol=1e-4)
    assert found["same"].inert.all()
    assert not found["block"].inert.any()
    assert not found["none"].inert.any()


CHANGES = (("block", ""), ("reweight", " by 9"), ("set", " to uniform"), ("set", " to 0.1"))


@pytest.mark.parametrize("mode", QUICK)
def test_edits_of_keys_outside_the_window_change_nothing(data: Path, mode: str) -> None:
    far = 'tokens between first token and "w40" token'
    text = "".join(
        experiment(f"e{n}", f"{verb} attention layers * from last token to {far}{end}")
        for n, (verb, end) in enumerate(CHANGES)
    )
    for found in run_file(text, data, "mistral", mode).values():
        values = found.measures[0]
        np.testing.assert_allclose(values.patched[0], values.base[0], atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), in_turn(["gpt2", "llama"], QUICK))
def test_edits_skip_queries_before_the_key(data: Path, name: str, mode: str) -> None:
    """A query before the keys is unchanged, even if the rule names it together with others."""
    queries = {"alone": "last token", "beside": "{cue token, subject token, last token}"}
    text = "".join(
        experiment(f"{key}{n}", f"{verb} attention layers * from {query} to last token{end}")
        for key, query in queries.items()
        for n, (verb, end) in enumerate(CHANGES)
    )
    found = run_file(text, data, name, mode)
    for n in range(len(CHANGES)):
        alone, beside = (found[f"{key}{n}"].measures[0].patched for key in queries)
        np.testing.assert_allclose(beside, alone, atol=1e-4)


@pytest.mark.parametrize("mode", QUICK)
def test_cells_with_queries_after_the_measured_token_use_their_amounts(
    data: Path, mode: str
) -> None:
    """Each cell uses its own amount even if no measure depends on some of its queries."""
    rule = f"reweight attention layer * from {PAIR} to subject token by c"
    text = experiment("e", f"for c in [0.1, 3, 9] {{ {rule} }}", measure=AT_CUE)

    def changes(n: int, c: float, layer: int) -> Sequence[Done]:
        return [([], edges(rows()[n], "reweight", [layer], CUE, SUBJECT, c))]

    found = run_file(text, data, "llama", mode)["e"]
    cells = worked_out("llama", product((0.1, 3, 9), LAYERS), changes, rows(), records(), CUE)
    agree(found, ("c", "layer"), cells, unpatched("llama", at=CUE), large=0.02)


@pytest.mark.parametrize("mode", QUICK)
def test_edits_apply_to_the_queries_up_to_the_measured_token(data: Path, mode: str) -> None:
    """Tokens after the measured one aren't computed; edits of earlier tokens still apply."""
    at_cue = "measure logit(answer) - logit(wrong) at cue token as delta"
    queries = {"alone": "cue token", "beside": "{cue token, last token}"}
    text = "".join(
        experiment(key, f"block attention layers * from {query} to first token", measure=at_cue)
        for key, query in queries.items()
    )
    alone, beside = (found.measures[0] for found in run_file(text, data, "llama", mode).values())
    assert (np.abs(alone.patched - alone.base) > 1e-3).all()
    np.testing.assert_allclose(beside.patched, alone.patched, atol=1e-4)


def test_blocking_attention_to_later_tokens_only_is_an_error(data: Path) -> None:
    text = experiment("e", "block attention layers * from cue token to last token")
    assert "E0332" in codes(text, data)


@pytest.mark.parametrize("mode", QUICK)
def test_blocking_all_visible_keys_of_a_query_equals_the_reference(data: Path, mode: str) -> None:
    """With a window, the checker can't see this before the run."""
    rule = "block attention layer * from last token to tokens except subject tokens"
    found = run_file(experiment("e", rule), data, "mistral", mode)["e"]
    act = partial(edit("block", LAST, "tokens except subject tokens"), "mistral")
    cells = worked_out("mistral", EACH, act, rows(), records())
    agree(found, ("layer",), cells, unpatched("mistral"))


# --- observed attention ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """An observation, and the attention edges that it reads."""

    lines: tuple[str, ...]
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    of: Callable[..., Sequence[tuple[int, int, str, str]]]
    """Of the cell's coordinates: layer, head, queries, keys."""
    act: Act = lambda name, n, *at: [([], [])]
    base: str = "clean"


def direct(query: str, key: str) -> Callable[..., Sequence[tuple[int, int, str, str]]]:
    return lambda layer, head: [(layer, head, query, key)]


LOOKS: dict[str, Look] = {
    "each_key": Look(
        ("observe attention layer * head 1, 2 from last token to each item token",),
        ("layer", "head", "position"),
        product(LAYERS, (1, 2), [f"item {n}" for n in range(1, 6)]),
        lambda layer, head, item: [(layer, head, LAST, f"{item} token")],
    ),
    "one_edge": Look(
        ("observe attention layer * head * from last token to cue token",),
        ("layer", "head"),
        GRID,
        direct(LAST, CUE),
    ),
    "several_keys_add_up": Look(
        ("observe attention layer * head * from last token to subject tokens",),
        ("layer", "head"),
        GRID,
        direct(LAST, "subject tokens"),
    ),
    "several_queries_are_averaged": Look(
        (f"observe attention layer * head * from {PAIR} to {{cue token, subject token}}",),
        ("layer", "head"),
        GRID,
        direct(PAIR, BOTH),
    ),
    "swept_queries": Look(
        ("observe attention layer 1 head * from subject token, last token to subject tokens",),
        ("head", "position"),
        product(HEADS, (SUBJECT, LAST)),
        lambda head, at: [(1, head, at, "subject tokens")],
    ),
    "swept_both": Look(
        (
            "observe attention layer 1 head * "
            "from cue token, last token to cue token, subject token",
        ),
        ("head", "from_position", "position"),
        product(HEADS, (CUE, LAST), (CUE, SUBJECT)),
        lambda head, query, key: [(1, head, query, key)],
    ),
    "every_key": Look(
        ("observe attention layer * head * from last token to tokens *",),
        ("layer", "head"),
        GRID,
        direct(LAST, "tokens *"),
    ),
    "of_a_patched_run": Look(
        (
            "from longer into clean",
            "patch resid_post layer 0 at {cue token, last token}",
            "observe attention layer 1..2 head * from last token to cue token",
        ),
        ("layer", "head"),
        product((1, 2), HEADS),
        direct(LAST, CUE),
        lambda name, n, *at: [(taken(name, n, "longer", [End("resid_post", 0)], PAIR), [])],
    ),
    "of_an_edited_run": Look(
        (
            "reweight attention layers * from last token to cue token by 3",
            "observe attention layer * head * from last token to {cue token, subject token}",
        ),
        ("layer", "head"),
        GRID,
        direct(LAST, BOTH),
        lambda name, n, *at: [([], edges(rows()[n], "reweight", LAYERS, LAST, CUE, 3))],
    ),
    "beside_a_rule_that_changes_nothing": Look(
        (
            "from other into clean",
            "patch resid_post layer 0 at first token, subject token",
            "observe attention layer 1..2 head * from cue token to subject token",
        ),
        ("position", "layer", "head"),
        product(("first token", SUBJECT), (1, 2), HEADS),
        lambda at, layer, head: [(layer, head, CUE, SUBJECT)],
        lambda name, n, where, *at: [(taken(name, n, "other", [End("resid_post", 0)], where), [])],
    ),
    "of_the_corrupted_run": Look(
        (
            "from clean into longer",
            "patch resid_post layer 0 at last token",
            "observe attention layer 1..2 head * from last token to cue token",
        ),
        ("layer", "head"),
        product((1, 2), HEADS),
        direct(LAST, CUE),
        lambda name, n, *at: [
            (
                copied(
                    [End("resid_post", 0)],
                    plain(name, rows()[n]),
                    [rows()[n].last],
                    [rows("longer")[n].last],
                ),
                [],
            )
        ],
        base="longer",
    ),
}


@cache
def looks(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "".join(experiment(key, *of.lines, measure="") for key, of in LOOKS.items())
    return run_file(text, data, name, mode)


@cache
def looked(name: str, key: str) -> dict[Key, list[float]]:
    look = LOOKS[key]
    cells = [tuple(cell) for cell in look.cells]
    every: list[dict[Key, Run]] = []
    for n, text in enumerate(rows(look.base)):
        changes = [each for cell in cells for each in look.act(name, n, *cell)]
        runs = side_by_side(name, double(name), text.ids, changes)
        every.append(dict(zip(cells, runs, strict=True)))

    def value(n: int, *at: Coord) -> float | None:
        text = rows(look.base)[n]
        ((layer, head, query, where),) = look.of(*at)
        try:
            queries, keys = tokens(text, query), tokens(text, where)
        except KeyError:
            return None
        return float(every[n][at]["pattern", layer][queries][:, head, keys].sum(1).mean())

    return table(cells, value, len(every))


def hold_look(data: Path, key: str, name: str, mode: str) -> None:
    look, found = LOOKS[key], looks(data, name, mode)[key]
    assert [(m.label, m.effect) for m in found.measures] == [("attention", "raw")]
    near = name in ("mistral", "gemma2", "gpt_oss")  # with windows most weights are 0
    agree(found, look.axes, looked(name, key), None, large=0.02, most=not near)


@pytest.mark.parametrize(("key", "mode"), in_turn(list(LOOKS), QUICK))
def test_observed_attention_equals_the_reference(data: Path, key: str, mode: str) -> None:
    hold_look(data, key, "llama", mode)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_oss", "gemma2"])
def test_observed_attention_equals_the_reference_in_other_families(data: Path, name: str) -> None:
    for key in ("one_edge", "several_queries_are_averaged", "every_key", "of_an_edited_run"):
        hold_look(data, key, name, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral"])
@pytest.mark.parametrize("key", list(LOOKS))
def test_observed_attention_equals_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold_look(data, key, name, mode)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("set attention layer 1 from last token to {cue token, last token} to 0.6", None),
        ("reweight attention layer 1 from last token to cue token by -1", None),
        ("set attention layer 1 from last token to cue token to -0.5", None),
        ("block attention layer 3 from last token to cue token", "E0302"),
        ("block attention layer 1 head 4 from last token to cue token", "E0301"),
        ("block attention layer 1 from first token to tokens *", None),
        ("from longer into clean patch pattern layer 1 head 0 at last token", None),
        ("from longer into clean patch scores layer 1 head 0 at last token", None),
        ("ablate pattern layer 1 head 0 at last token with mean", None),
    ],
)
def test_invalid_attention_edits_are_errors(data: Path, lines: str, code: str | None) -> None:
    """Weights above 1 or below 0, queries without keys, and patterns over other keys."""
    found = codes(experiment("e", lines), data)
    assert found
    assert "E0108" not in found
    assert code is None or code in found
