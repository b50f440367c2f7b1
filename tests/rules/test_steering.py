"""Directions, and rules that change the current vector, against reference forward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.resolve.cells import Coord

from ..execute.support import MODES, by_name, run_on, shared, token
from ..quick import in_turn
from ..reference.forward import Changes, Write, forward
from .models import bare, double
from .support import (
    BLOCKS,
    MANY,
    QUICK,
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)

LAYERS = range(3)
HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
DIRECTION = """
direction d = mean_difference(p.other, second) at resid_post layer 1 at last token
direction h = mean_difference(p.other, second) at z layer 1 head 2 at last token
"""
EDITS = """
direction wide = saved("edits.safetensors", "wide")
direction narrow = saved("edits.safetensors", "narrow")
"""


@cache
def mean(name: str, run: str, site: str, layer: int | None, at: str, unit: int = 0) -> Tensor:
    """[width]: over the rows of a run, tokens of a row averaged first."""
    found = [plain(name, text)[site, layer][tokens(text, at), unit].mean(0) for text in rows(run)]
    return torch.stack(found).mean(0)


def difference_of_means(name: str, site: str = "resid_post", layer: int = 1) -> Tensor:
    at = "last token"
    return mean(name, "other", site, layer, at) - mean(name, "second", site, layer, at)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def without(direction: Tensor) -> Callable[[Tensor], Tensor]:
    u = unit(direction)
    return lambda here: here - (here @ u)[:, None] * u


def only(direction: Tensor) -> Callable[[Tensor], Tensor]:
    u = unit(direction)
    return lambda here: (here @ u)[:, None] * u


def plus(vector: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda here: here + vector


def times(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiply elementwise."""
    return lambda here: here * vector


EDIT = ("reads", "writes", "offset")


@cache
def edit(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """[2, size] directions to read, [2, size] directions to add, and an offset [size]."""
    random = torch.Generator().manual_seed(size)
    numbers = torch.randn(5, size, generator=random)
    return numbers[:2] / size, numbers[2:4], numbers[4]


def save_edits(folder: Path, family: str) -> None:
    """Write edits of the stream and of a head of a family."""
    shape = shared(bare(family)).shape
    sizes = {"wide": shape.d_model, "narrow": shape.blocks[0].d_head}
    tensors = {
        f"{name}.{part}": own.clone()
        for name, size in sizes.items()
        for part, own in zip(EDIT, edit(size), strict=True)
    }
    save_file(tensors, folder / "edits.safetensors")


def edited(factor: float) -> Callable[[Tensor], Tensor]:
    """Add the output of the edit of this width for each vector, times a factor."""

    def change(here: Tensor) -> Tensor:
        reads, writes, offset = edit(here.shape[-1])
        first, second = ((here * each).sum(-1, keepdim=True) for each in reads)
        return here + factor * (first * writes[0] + second * writes[1] + offset)

    return change


def of_head(name: str) -> Tensor:
    """[d_head], the direction `h`."""
    own = [mean(name, run, "z", 1, "last token", unit=2) for run in ("other", "second")]
    return own[0] - own[1]


def writes(site: str, layers: Sequence[int], at: str, change: Callable[[Tensor], Tensor]):
    """From a prompt's number: the change at each of these layers and tokens."""

    def of(n: int) -> list[Write]:
        text = rows()[n]
        return [
            Write(site, layer, change, position)
            for layer in layers
            for position in tokens(text, at)
        ]

    return of


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    changes: Callable[..., Sequence[Write]]
    """From the model's name, a prompt's number and the cell's coordinates."""
    large: float = 0.1


def one_place(site: str, at: str, change: Callable[[str], Callable[[Tensor], Tensor]]):
    """A sweep over layers."""
    return lambda name, n, layer: writes(site, [layer], at, change(name))(n)


EACH: list[tuple[Coord, ...]] = [(layer,) for layer in LAYERS]
D = difference_of_means
CASES: dict[str, Case] = {
    "add": Case(
        "add 1.5 * d to resid_post layer * at last token",
        ("layer",),
        EACH,
        one_place("resid_post", "last token", lambda name: plus(1.5 * D(name))),
    ),
    "add in doses": Case(
        "for c in [-1, 0, 0.5, 2] { add c * d to resid_pre layer 1 at subject tokens }",
        ("c",),
        [(-1,), (0,), (0.5,), (2,)],
        lambda name, n, c: writes("resid_pre", [1], "subject tokens", plus(c * D(name)))(n),
    ),
    "minus": Case(
        "add -d to attn_out layer * at cue token",
        ("layer",),
        EACH,
        one_place("attn_out", "cue token", lambda name: plus(-D(name))),
    ),
    "divided": Case(
        "add 3 * d / 2 to mlp_out layer * at cue token",
        ("layer",),
        EACH,
        one_place("mlp_out", "cue token", lambda name: plus(1.5 * D(name))),
    ),
    "joined layers": Case(
        "add 0.7 * d to resid_post layers * at tokens *",
        (),
        [()],
        lambda name, n: writes("resid_post", LAYERS, "tokens *", plus(0.7 * D(name)))(n),
    ),
    "a token that is named twice": Case(
        "add d to resid_pre layer * at {cue token, cue token, last token}",
        ("layer",),
        EACH,
        one_place("resid_pre", "{cue token, last token}", lambda name: plus(D(name))),
    ),
    "set": Case(
        "set resid_post layer * at cue token to 2 * d",
        ("layer",),
        EACH,
        one_place(
            "resid_post", "cue token", lambda name: lambda here: (2 * D(name)).expand_as(here)
        ),
    ),
    "scale": Case(
        "scale resid_post layer * at subject tokens by -0.5",
        ("layer",),
        EACH,
        one_place("resid_post", "subject tokens", lambda name: lambda here: here * -0.5),
    ),
    "scale several": Case(
        "for k in [-1, 0, 3] { scale attn_out layers 0..1 at tokens * by k }",
        ("k",),
        [(-1,), (0,), (3,)],
        lambda name, n, k: writes("attn_out", [0, 1], "tokens *", lambda here: here * k)(n),
    ),
    "scale by a direction": Case(
        "scale resid_post layer * at subject tokens by d",
        ("layer",),
        EACH,
        one_place("resid_post", "subject tokens", lambda name: times(D(name))),
    ),
    "scale by doses of a direction": Case(
        "for k in [-1, 0, 1, 3] { scale mlp_out layers 0..1 at tokens * by k * d / 2 }",
        ("k",),
        [(-1,), (0,), (1,), (3,)],
        lambda name, n, k: writes("mlp_out", [0, 1], "tokens *", times(k * D(name) / 2))(n),
    ),
    "scale by a direction, then add": Case(
        "scale resid_post layer 1 at last token by d  add d to resid_post layer 1 at last token  "
        "scale resid_post layer 1 at last token by 3 * d",
        (),
        [()],
        lambda name, n: writes(
            "resid_post",
            [1],
            "last token",
            lambda here: (here * D(name) + D(name)) * 3 * D(name),
        )(n),
    ),
    "scale heads by a direction": Case(
        "scale z layer * head * at tokens * by 3 * h",
        ("layer", "head"),
        product(LAYERS, range(4)),
        lambda name, n, layer, head: [
            Write("z", layer, times(3 * of_head(name)), position, head)
            for position in tokens(rows()[n], "tokens *")
        ],
        0.02,
    ),
    "scale all heads by a direction": Case(
        "scale z layers 0..1 at last token by h  scale q_rot layer 2 head 1 at last token by h",
        (),
        [()],
        lambda name, n: [
            *(
                Write("z", layer, times(of_head(name)), rows()[n].last, head)
                for layer in (0, 1)
                for head in range(4)
            ),
            Write("q_rot", 2, times(of_head(name)), rows()[n].last, 1),
        ],
    ),
    "scale what heads add by a direction": Case(
        "scale head_out layer * heads 1..2 at last token by d",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            Write("head_out", layer, times(D(name)), rows()[n].last, head) for head in (1, 2)
        ],
        0.02,
    ),
    "an edit in doses": Case(
        "for c in [-1, 0, 0.5, 2] { add c * wide to resid_pre layer 1 at subject tokens }",
        ("c",),
        [(-1,), (0,), (0.5,), (2,)],
        lambda name, n, c: writes("resid_pre", [1], "subject tokens", edited(c))(n),
    ),
    "an edit in all layers": Case(
        "add wide to resid_post layers * at tokens *",
        (),
        [()],
        lambda name, n: writes("resid_post", LAYERS, "tokens *", edited(1))(n),
    ),
    "edits after other rules": Case(
        "add wide to mlp_out layer 1 at last token  scale mlp_out layer 1 at last token by 2  "
        "add -wide to mlp_out layer 1 at last token  add d to mlp_out layer 1 at last token",
        (),
        [()],
        lambda name, n: writes(
            "mlp_out", [1], "last token", lambda here: edited(-1)(2 * edited(1)(here)) + D(name)
        )(n),
    ),
    "edits of heads": Case(
        "add 3 * narrow to z layer * head * at tokens *",
        ("layer", "head"),
        product(LAYERS, range(4)),
        lambda name, n, layer, head: [
            Write("z", layer, edited(3), position, head)
            for position in tokens(rows()[n], "tokens *")
        ],
        0.02,
    ),
    "edits of what heads add and of queries": Case(
        "add wide to head_out layer 1 heads 1..2 at last token  "
        "add narrow to q_rot layer 2 head 1 at last token",
        (),
        [()],
        lambda name, n: [
            *(Write("head_out", 1, edited(1), rows()[n].last, head) for head in (1, 2)),
            Write("q_rot", 2, edited(1), rows()[n].last, 1),
        ],
    ),
    "project out": Case(
        "project out d from resid_post layer * at tokens *",
        ("layer",),
        EACH,
        one_place("resid_post", "tokens *", lambda name: without(D(name))),
    ),
    "project onto": Case(
        "project resid_post layer * at {cue token, last token} onto d",
        ("layer",),
        EACH,
        one_place("resid_post", "{cue token, last token}", lambda name: only(D(name))),
    ),
    "project onto, then add": Case(
        "project attn_out layers * at tokens * onto d  add d to attn_out layer 1 at last token",
        (),
        [()],
        lambda name, n: [
            *writes("attn_out", [0, 2], "tokens *", only(D(name)))(n),
            *writes("attn_out", [1], "tokens *", only(D(name)))(n),
            *writes("attn_out", [1], "last token", plus(D(name)))(n),
        ],
    ),
    "project out of all layers": Case(
        "project out d from resid_pre layers * at tokens *",
        (),
        [()],
        lambda name, n: writes("resid_pre", LAYERS, "tokens *", without(D(name)))(n),
    ),
    "clamp a component": Case(
        "clamp d of resid_post layer * at last token to 5",
        ("layer",),
        EACH,
        one_place(
            "resid_post",
            "last token",
            lambda name: lambda here: without(D(name))(here) + 5 * unit(D(name)),
        ),
    ),
    "clamp neurons": Case(
        "clamp mlp_hidden layer * neurons 3..9 at cue token to 2",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            Write("mlp_hidden", layer, torch.tensor([2.0]), tokens(rows()[n], "cue token")[0], u)
            for u in range(3, 10)
        ],
    ),
    "in order": Case(
        "add d to resid_post layer 1 at last token  scale resid_post layer 1 at last token by 2  "
        "project out d from resid_post layers 0..1 at tokens *",
        (),
        [()],
        lambda name, n: [
            *writes("resid_post", [0], "tokens *", without(D(name)))(n),
            *writes(
                "resid_post",
                [1],
                "last token",
                lambda here: without(D(name))(2 * (here + D(name))),
            )(n),
            *writes("resid_post", [1], "tokens *", without(D(name)))(n),
        ],
    ),
    "in the other order": Case(
        "scale resid_post layer 1 at last token by 2  add d to resid_post layer 1 at last token",
        (),
        [()],
        lambda name, n: writes(
            "resid_post", [1], "last token", lambda here: 2 * here + D(name)
        )(n),
    ),
    "set behind": Case(
        "add d to resid_post layer 1 at last token  set resid_post layer 1 at last token to 0.3  "
        "add d to resid_post layer 1 at last token",
        (),
        [()],
        lambda name, n: writes(
            "resid_post", [1], "last token", lambda here: D(name) + 0.3 + 0 * here
        )(n),
    ),
    "heads": Case(
        "scale z layer * head * at last token by 3",
        ("layer", "head"),
        product(LAYERS, range(4)),
        lambda name, n, layer, head: [
            Write("z", layer, lambda here: 3 * here, rows()[n].last, head)
        ],
        0.02,
    ),
    "what heads add": Case(
        "add d to head_out layer * heads 1..2 at last token  "
        "for l in 0..2 { scale head_out layer l head 1 at last token by 2 }",
        ("l", "layer"),
        product(LAYERS, LAYERS),
        lambda name, n, other, layer: [
            *(
                Write("head_out", layer, plus(D(name)), rows()[n].last, head)
                for head in (1, 2)
            ),
            Write("head_out", other, lambda here: 2 * here, rows()[n].last, 1),
        ],
    ),
    "the middle": Case(
        "project out d from resid_mid layers * at tokens *  "
        "scale resid_mid layer 1 at cue token by 2  scale resid_mid layer 2 at last token by d",
        (),
        [()],
        lambda name, n: [
            *writes("resid_mid", LAYERS, "tokens *", without(D(name)))(n),
            *writes("resid_mid", [1], "cue token", lambda here: 2 * here)(n),
            *writes("resid_mid", [2], "last token", times(D(name)))(n),
        ],
    ),
    "behind rotary": Case(
        "scale q_rot layer * head 1 at last token by 3  scale k_rot layer 0 heads * at cue token "
        "by 0.5",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            Write("q_rot", layer, lambda here: 3 * here, rows()[n].last, 1),
            Write("k_rot", 0, lambda here: 0.5 * here, tokens(rows()[n], "cue token")[0]),
        ],
        0.02,
    ),
    "scores": Case(
        "scale scores layer * heads * at last token by 2.5",
        ("layer",),
        EACH,
        lambda name, n, layer: [
            Write("scores", layer, lambda here: 2.5 * here, rows()[n].last)
        ],
        0.02,
    ),
    "embeddings": Case(
        "scale embed at cue token by 2  add d to embed at cue token",
        (),
        [()],
        lambda name, n: writes("embed", [None], "cue token", lambda h: 2 * h + D(name))(n),  # type: ignore[list-item]
    ),
    "the last norm": Case(
        "project out d from final_norm at last token",
        (),
        [()],
        lambda name, n: writes("final_norm", [None], "last token", without(D(name)))(n),  # type: ignore[list-item]
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
def test_steering_rules_equal_plain_hooks(family: str, mode: str, data: Path) -> None:
    has_middle = family != "gpt_neox"
    chosen = {k: c for k, c in CASES.items() if has_middle or k != "the middle"}
    names = {key: f"e{number}" for number, key in enumerate(chosen)}
    text = DIRECTION + EDITS
    text += "".join(experiment(names[key], *own.rule.split("  ")) for key, own in chosen.items())
    save_edits(data, family)
    found = run_file(text, data, family, mode)
    for key, case in chosen.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.changes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        result = found[names[key]]
        try:
            agree(result, case.axes, expected, unpatched(family), large=case.large, most=False)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


# --- definitions of directions --------------------------------------------------------------------

FAMILY = """
direction d = mean_difference(p.other, second) at resid_post layer * at token -2..-1
direction final = d[layer 1, token -1]
direction far = d[layer 2, token -2]
direction half = 0.5 * d
"""


def member(name: str, layer: int, token: int) -> Tensor:
    at = f"token {token}"
    other = mean(name, "other", "resid_post", layer, at)
    return other - mean(name, "second", "resid_post", layer, at)


NAMED: dict[str, Callable[[str], Tensor]] = {
    "final": lambda name: member(name, 1, -1),
    "far": lambda name: member(name, 2, -2),
}
FAMILIES_OF_DIRECTIONS: dict[str, Case] = {
    "a loop over directions": Case(
        "for v in [final, far] { add 2 * v to resid_post layer * at last token }",
        ("v", "layer"),
        product(NAMED, LAYERS),
        lambda name, n, v, layer: writes(
            "resid_post", [layer], "last token", plus(2 * NAMED[v](name))
        )(n),
    ),
    "a loop over directions, in sums": Case(
        "for c in [1, 3] { for v in [far, final] { "
        "project out v from resid_pre layer 1 at tokens *  "
        "add c * (v - final) to attn_out layer 0 at cue token } }",
        ("c", "v"),
        product((1, 3), ("far", "final")),
        lambda name, n, c, v: [
            *writes("resid_pre", [1], "tokens *", without(NAMED[v](name)))(n),
            *writes(
                "attn_out", [0], "cue token", plus(c * (NAMED[v](name) - NAMED["final"](name)))
            )(n),
        ],
    ),
    "a loop over families": Case(
        "for v in [d, half] { add v[layer own] to resid_post layers 0, 2 at cue token }",
        ("v", "position"),
        product(("d", "half"), ("-2", "-1")),
        lambda name, n, v, token: [
            each
            for layer in (0, 2)
            for each in writes(
                "resid_post",
                [layer],
                "cue token",
                plus((1 if v == "d" else 0.5) * member(name, layer, int(token))),
            )(n)
        ],
    ),
    "axes of its own": Case(
        "add d to resid_post layers 0..1 at cue token",
        ("layer", "position"),
        product(LAYERS, ("-2", "-1")),
        lambda name, n, layer, token: writes(
            "resid_post", [0, 1], "cue token", plus(member(name, layer, int(token)))
        )(n),
    ),
    "an axis that is shared": Case(
        "project out d from resid_post layer 1..2 at cue token",
        ("layer", "position"),
        product((1, 2), ("-2", "-1")),
        lambda name, n, layer, token: writes(
            "resid_post", [layer], "cue token", without(member(name, layer, int(token)))
        )(n),
    ),
    "both axes shared": Case(
        "add d to resid_post layer 0..1 at token -2, token -1",
        ("layer", "position"),
        product((0, 1), ("-2", "-1")),
        lambda name, n, layer, token: writes(
            "resid_post", [layer], f"token {token}", plus(member(name, layer, int(token)))
        )(n),
    ),
    "a member": Case(
        "add 2 * d[layer 1, token -2] to resid_post layer * at last token",
        ("layer",),
        EACH,
        lambda name, n, layer: writes(
            "resid_post", [layer], "last token", plus(2 * member(name, 1, -2))
        )(n),
    ),
    "a member by a loop": Case(
        "for k in 0..2 { project out d[layer k, token -1] from resid_post layer k at tokens * }",
        ("k",),
        EACH,
        lambda name, n, k: writes("resid_post", [k], "tokens *", without(member(name, k, -1)))(n),
    ),
    "own layers": Case(
        "add 2 * d[layer own, token -1] to resid_post layers 0..2 at last token",
        (),
        [()],
        lambda name, n: [
            each
            for layer in LAYERS
            for each in writes(
                "resid_post", [layer], "last token", plus(2 * member(name, layer, -1))
            )(n)
        ],
    ),
    "own layers, other axes swept": Case(
        "for c in [1, 3] {\n  project out d[layer own] from resid_pre layers 1, 2 at tokens *\n"
        "  add c * d[layer own, token -2] to attn_out layers 0, 2 at cue token\n  }",
        ("c", "position"),
        product((1, 3), ("-2", "-1")),
        lambda name, n, c, token: [
            *writes("resid_pre", [1], "tokens *", without(member(name, 1, int(token))))(n),
            *writes("resid_pre", [2], "tokens *", without(member(name, 2, int(token))))(n),
            *writes("attn_out", [0], "cue token", plus(c * member(name, 0, -2)))(n),
            *writes("attn_out", [2], "cue token", plus(c * member(name, 2, -2)))(n),
        ],
    ),
    "own layer of a sweep": Case(
        "project resid_post layer 1..2 at last token onto d[layer own, token -1]",
        ("layer",),
        product((1, 2)),
        lambda name, n, layer: writes(
            "resid_post", [layer], "last token", only(member(name, layer, -1))
        )(n),
    ),
    "arithmetic": Case(
        "add 8 * (unit(d[layer 0, token -1]) - 0.5 * d[layer 2, token -1]) to resid_post layer 1 "
        "at cue token",
        (),
        [()],
        lambda name, n: writes(
            "resid_post",
            [1],
            "cue token",
            plus(8 * unit(member(name, 0, -1)) - 4 * member(name, 2, -1)),
        )(n),
    ),
}


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_families_and_members_of_directions_equal_plain_hooks(
    family: str, mode: str, data: Path
) -> None:
    names = {key: f"e{number}" for number, key in enumerate(FAMILIES_OF_DIRECTIONS)}
    text = FAMILY + "".join(
        experiment(names[key], case.rule) for key, case in FAMILIES_OF_DIRECTIONS.items()
    )
    found = run_file(text, data, family, mode)
    for key, case in FAMILIES_OF_DIRECTIONS.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.changes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.mark.parametrize(
    ("family", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], ["planned", "plain"])
)
def test_project_out_of_weights_equals_edited_weights(family: str, mode: str, data: Path) -> None:
    """The reference removes the direction from weights, biases and embeddings."""
    text = DIRECTION + experiment("e", "project out d from weights")
    model = copy.deepcopy(double(family))
    u = unit(difference_of_means(family))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lm_head" in key or "embed_out" in key:
                continue
            embedding = any(part in key for part in ("wte", "wpe", "embed_tokens", "embed_in"))
            writing = ("c_proj", "o_proj", "down_proj", "attention.dense", "dense_4h_to_h")
            if embedding or (
                any(part in key for part in writing) and "Conv1D" in _kind(model, key)
            ):
                parameter -= (parameter @ u)[..., None] * u
            elif any(part in key for part in writing):
                first = parameter.dim() == 1
                parameter -= (parameter @ u) * u if first else u[:, None] * (u @ parameter)
    if family == "gpt2":  # the tied unembedding stays unchanged
        model.lm_head.weight = torch.nn.Parameter(double(family).lm_head.weight.clone())
    values = []
    for text_, record in zip(rows(), records(), strict=True):
        logits = model(torch.tensor([text_.ids])).logits[0].detach()
        values.append(float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])]))
    found = run_file(text, data, family, mode)["e"]
    agree(found, (), {(): values}, unpatched(family), most=False)


def _kind(model: torch.nn.Module, key: str) -> str:
    return type(model.get_submodule(key.rpartition(".")[0])).__name__


def vectors(name: str, run: str, layer: int) -> Tensor:
    """[row, width] at the last token."""
    return torch.stack([plain(name, text)["resid_post", layer][text.last, 0] for text in rows(run)])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_pca_head_unembedding_and_saved_directions_equal_the_reference(
    family: str, data: Path
) -> None:
    """Components, means of heads, the unembedding, and a file."""
    model = double(family)
    x = vectors(family, "clean", 1)
    vector = torch.arange(float(x.shape[1]))
    save_file({"d": vector, "wide": torch.ones(5)}, data / "d.safetensors")
    centred = x - x.mean(0)
    component = torch.linalg.svd(centred).Vh[1]
    component = component * component[component.abs().argmax()].sign()
    heads = torch.zeros_like(x[0])
    for head in (0, 2):
        found = [plain(family, text)["head_out", 1][text.last, head] for text in rows()]
        heads += torch.stack(found).mean(0)
    unembedding = model.get_output_embeddings().weight.detach()
    expected = {
        "c": component,
        "h": heads,
        "u": unembedding[token("w3")] - unembedding[token("w9")],
        "s": vector.double(),
    }
    text = (
        "direction c = pca(p, component: 2) at resid_post layer 1\n"
        "direction h = mean(p) at z layer 1 heads 0, 2 at last token\n"
        'direction u = unembedding(" w3", " w9")\n'
        'direction s = saved("d.safetensors", "d")\n'
    )
    names = ("c", "h", "u", "s")
    text += "".join(
        experiment(f"e{name}", f"set resid_post layer 1 at last token to {name}") for name in names
    )
    result = run_file(text, data, family, "planned")
    for name in names:

        def changes(n: int, name: str = name) -> list[Changes]:
            return [([Write("resid_post", 1, expected[name], rows()[n].last)], ())]

        values = worked_out(family, [()], changes, rows(), records())
        agree(result[f"e{name}"], (), values, unpatched(family), most=False)


def test_direction_between_two_models_equals_the_reference(data: Path) -> None:
    """The rows of a block, or those of the experiment, in both models."""
    lines = (
        'model m = local("handed over")',
        'model other = local("handed over too")',
        BLOCKS,
        "direction a = mean_difference(other, m, prompts: second) at resid_post layer 1",
        "direction b = mean_difference(other, m) at resid_post layer 0 at cue token",
        experiment("ea", "add 3 * a to resid_post layer * at last token"),
        experiment("eb", "add 3 * b to resid_post layer * at last token"),
    )
    changed = copy.deepcopy(bare("llama"))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    models = {"m": shared(bare("llama")), "other": shared(changed)}
    source = Source("mech 1\n" + "\n".join(lines), data / "file.mech")
    found = by_name(*run_on(source, models, MODES["planned"]))
    wide = copy.deepcopy(changed).double()
    for name, block, layer, at in (
        ("ea", "second", 1, "last token"),
        ("eb", "clean", 0, "cue token"),
    ):
        texts = rows(block)
        there = [forward("llama", wide, text.ids)["resid_post", layer] for text in texts]
        here = [plain("llama", text)["resid_post", layer] for text in texts]
        places = [tokens(text, at)[0] for text in texts]
        of_both = zip(there, here, places, strict=True)
        direction = torch.stack([(a - b)[place, 0] for a, b, place in of_both]).mean(0)

        def changes(n: int, to: int, direction: Tensor = direction) -> list[Changes]:
            return [(writes("resid_post", [to], "last token", plus(3 * direction))(n), ())]

        expected = worked_out("llama", EACH, changes, rows(), records())
        agree(found[name], ("layer",), expected, unpatched("llama"), most=False)


def test_random_direction_control_is_named_and_rejects_except(data: Path) -> None:
    """One draw is one direction in all cells, with the norm of the direction that it replaces."""
    text = DIRECTION + experiment(
        "e",
        "for c in [1, 2] { add c * d to resid_post layer 1 at last token }",
        "against random(4)",
    )
    text += experiment(
        "f", "set resid_post layer 1 at last token to d", "against random(4, directions)"
    )
    found = run_file(text, data, "llama", "planned")
    assert "directions" in found["e"].conventions["controls"]
    assert codes(
        DIRECTION
        + experiment(
            "e", "add d to resid_post layer 1 at last token", "against random(4) except L0H1"
        ),
        data,
    ) == ["E0630"]


def test_loop_over_directions_equals_an_experiment_per_direction(data: Path) -> None:
    """During generation and with a control."""
    rules = {
        "replies": "generate 3  {}add 6 * {} to resid_post layer 1 at last token",
        "control": "{}add {} to resid_post layer 1 at last token",
    }
    text = FAMILY
    for key, rule in rules.items():
        line = "against random(5, directions)" if key == "control" else ""
        loop = rule.format("for v in [final, far] { ", "v") + " }"
        text += experiment(f"{key}_both", loop, line)
        for name in NAMED:
            text += experiment(f"{key}_{name}", rule.format("", name), line)
    found = run_file(text, data, "llama", "planned")
    for key in rules:
        both = found[f"{key}_both"]
        assert [cell.coords["v"] for cell in both.cells] == list(NAMED)
        alone = [found[f"{key}_{name}"].measures[0] for name in NAMED]
        np.testing.assert_allclose(
            both.measures[0].patched, np.concatenate([each.patched for each in alone]), atol=2e-5
        )
        assert abs(alone[0].patched - alone[1].patched).max() > 0.01


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("for v in [final, 3] { add v to RESID }", "isn't a direction"),
        ("for v in [final, d] { add v to RESID }", "sweep different values of `layer`"),
        ("for v in [final, wide] { add v to RESID }", "isn't used like"),
        ("for v in [final, far] { add v to RESID }  add v to RESID", "doesn't contain this rule"),
    ],
)
def test_loop_over_incompatible_directions_is_an_error(loop: str, said: str, data: Path) -> None:
    save_edits(data, "llama")
    rule = loop.replace("RESID", "resid_post layer 1 at last token")
    _, found = try_file(FAMILY + EDITS + experiment("e", rule), data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0341"]
    assert said in str(errors[0])


@pytest.mark.parametrize("mode", QUICK)
def test_best_direction_is_the_one_with_the_largest_mean(mode: str, data: Path) -> None:
    """It has the largest signed mean, and the second experiment adds it."""
    text = FAMILY + experiment("select", "add 2 * d to resid_post layer 2 at last token")
    text += experiment("test", "add 2 * d[best of select] to resid_post layer 2 at last token")
    found = run_file(text, data, "gpt2", mode)
    first = found["select"].measures[0]
    means = (first.patched - first.base).mean(axis=1)
    best = int(means.argmax())
    layer, position = divmod(best, 2)
    words = found["test"].conventions["d[best of select]"]
    assert words.startswith(f"d[layer {layer}, token {('-2', '-1')[position]}]")
    second = found["test"].measures[0]
    assert abs(second.patched - first.patched[best]).max() < 1e-4
    assert abs(means[best]) > 0.1


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "direction d = mean(p) at resid_post layer *",
            "add d[best of other] to embed at last token",
        ),
        (
            "direction d = pca(second, component: 9) at resid_post layer 1",
            "add d to embed at cue token",
        ),
        (
            "direction d = mean_difference(p, p) at resid_post layer 1",
            "add d to embed at cue token",
        ),
        ('direction d = saved("d.safetensors", "e")', "add d to resid_post layer 1 at cue token"),
        ('direction d = saved("rows.jsonl", "e")', "add d to resid_post layer 1 at cue token"),
        ("direction d = probe(cue, p) at resid_post layer 1", "add d to embed at cue token"),
        ('direction d = unembedding("w1 w2 w3")', "add d to embed at cue token"),
    ],
)
def test_invalid_directions_are_errors(line: str, rule: str, data: Path) -> None:
    save_file({"d": torch.ones(5)}, data / "d.safetensors")
    text = (
        f"{line}\n" + experiment("other", "scale embed at cue token by 2") + experiment("e", rule)
    )
    result, diagnostics = try_file(text, data, "llama")
    errors = {d.code for d in diagnostics if d.severity == "error"}
    assert errors & {"E0341", "E0641", "E0620"}, errors
    assert result is None or [each.name for each in result.experiments] == ["other"]
