"""Rules at positions of images: how each is written in a file, and what it does to one image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference.forward import Edge, Write
from . import support
from .reference import Act, Block, Divisor, Seen, norms
from .support import FRONT, GRID, LAYERS, forward, pixels, plain

Coord = int | float | str
EVERY = tuple(f"image row {r} col {c}" for r in range(1, GRID + 1) for c in range(1, GRID + 1))
PART = "image row 2..3 col 1..3 tokens"
ALL = "image tokens"
DEEP = range(LAYERS)


def tokens(name: str, written: str) -> list[int]:
    """What a position means, counted by hand."""
    if written.startswith("{"):
        return [at for part in written.strip("{}").split(",") for at in tokens(name, part.strip())]
    if written == ALL:
        return support.patches(name)
    if written == "tokens *":
        return [*range(FRONT[name] + GRID * GRID)]
    if written.startswith("cls"):
        assert FRONT[name]
        return [0]
    if found := re.match(r"register (\d)", written):
        return [int(found[1])]
    found = re.match(r"image row (\S+) col (\S+)", written)
    assert found is not None, written
    rows, cols = (_range(part) for part in found.groups())
    return [support.token(name, row, col) for row in rows for col in cols]


def _range(written: str) -> range:
    first, _, last = written.replace("*", f"1..{GRID}").partition("..")
    return range(int(first), int(last or first) + 1)


@dataclass(frozen=True)
class View:
    """One row of one model, for what is done to it."""

    name: str
    number: int
    base: Literal["own", "gray"]

    def image(self, which: str) -> Seen:
        """The unpatched run of its image, or of the gray one."""
        return plain(self.name, self.number if which == "own" else None)

    @property
    def start(self) -> Seen:
        """The run that rules act on."""
        return self.image(self.base)

    @cached_property
    def front(self) -> str:
        """A position that all families have, the class token where there is one."""
        return "cls token" if FRONT[self.name] else "image row 1 col 1 token"

    def at(self, written: str) -> list[int]:
        return tokens(self.name, written.replace("FRONT", self.front))

    def run(self, acts: Iterable[Act], which: str | None = None) -> Seen:
        number = self.number if (which or self.base) == "own" else None
        return forward(self.name, pixels(self.name, number), acts=acts)

    def copy(
        self,
        site: str,
        layers: int | Iterable[int],
        at: str,
        units: Iterable[int] | None = None,
        *,
        of: Seen | None = None,
        to: str | None = None,
        into: int | None = None,
    ) -> list[Act]:
        """What a run (that of the row's image) has at a site stands at it, or at another place."""
        source = of or self.image("own")
        read, written = self.at(at), self.at(to or at)
        found: list[Act] = []
        for layer in [layers] if isinstance(layers, int) else layers:
            values = source.sites[site, layer]
            for unit in range(values.shape[1]) if units is None else units:
                found += [
                    Write(site, layer if into is None else into, values[a, unit], b, unit)
                    for a, b in zip(read, written, strict=True)
                ]
        return found

    def make(
        self,
        site: str,
        layers: int | Iterable[int],
        at: str,
        vector: Tensor | float | Callable[[Tensor], Tensor],
        units: Iterable[int] | None = None,
    ) -> list[Act]:
        """Vectors that are the same at all tokens, or are made of what is there."""
        found: list[Act] = []
        for layer in [layers] if isinstance(layers, int) else layers:
            like = self.start.sites[site, layer]
            what: Any = torch.full_like(like[0, 0], vector) if isinstance(vector, float) else vector
            for unit in range(like.shape[1]) if units is None else units:
                found += [Write(site, layer, what, at_, unit) for at_ in self.at(at)]
        return found

    def mean(self, site: str, layer: int, at: str, numbers: Sequence[int] = (0, 1, 2)) -> list[Act]:
        """The mean over images at each place."""
        every = [plain(self.name, n).sites[site, layer] for n in numbers]
        over = torch.stack(every).mean(0)
        units = range(over.shape[1])
        return [Write(site, layer, over[at_, u], at_, u) for at_ in self.at(at) for u in units]

    def edges(
        self,
        kind: Literal["block", "reweight", "uniform", "set"],
        layers: int | Iterable[int],
        queries: str,
        keys: str,
        amount: float = 0.0,
        heads: Sequence[int] | None = None,
    ) -> list[Act]:
        every = [layers] if isinstance(layers, int) else layers
        return [
            Edge(kind, layer, self.at(queries), self.at(keys), amount, heads) for layer in every
        ]

    def path(
        self,
        sent: Sequence[Act],
        receivers: Sequence[tuple[str, int, int]],
        at: str,
        *,
        mlps: bool = False,
        frozen: bool = False,
    ) -> list[Act]:
        """What receivers (site, layer, unit) read where all but what is sent is held; without any,
        the pass in which it is."""
        base = self.start
        held = [
            Write(site, layer, base.sites[site, layer])
            for layer in DEEP
            for site in ("z", *([] if mlps else ["mlp_out"]))
        ]
        model = support.double(self.name)
        divisors = [Divisor(path, base.normed[path]) for path, _ in norms(model) if frozen]
        acts = [*held, *sent, *divisors]
        if not receivers:
            return acts
        seen = self.run(acts)
        return [
            Write(site, layer, seen.sites[site, layer][place, unit], place, unit)
            for site, layer, unit in receivers
            for place in self.at(at)
        ]

    def direction(self, which: str = "difference") -> Tensor:
        """[d_model] of `d` or `middle` in the file."""
        own = [plain(self.name, n).sites["resid_post", 0] for n in range(3)]
        if which == "mean":
            return torch.stack([one[self.at(PART), 0].mean(0) for one in own]).mean(0)
        gray = plain(self.name, None).sites["resid_post", 0]
        every = self.at(ALL)
        return torch.stack([one[every, 0].mean(0) for one in own]).mean(0) - gray[every, 0].mean(0)


DIRECTIONS = f"""
direction d = mean_difference(scenes, neutral) at resid_post layer 0 at image tokens
direction middle = mean(scenes) at resid_post layer 0 at {PART}
group few = L0H1, L1H2, L1.mlp
group movers = L1H1, L2H0
"""
FUNCTIONS = """
def turned(vectors):
    return vectors.flip(-1) * 2
"""


@dataclass(frozen=True)
class Case:
    """FRONT in what is written stands for the class token, or for the first patch."""

    rules: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    acts: Callable[..., Iterable[Act]]
    """Of a row's View and the cell's coordinates."""
    base: Literal["own", "gray"] = "own"
    """Rules act on the row's image, or on the gray one into which it goes."""
    ends: str = ""
    """`from … into …`, where it is another one."""
    start: Callable[[View], Iterable[Act]] | None = None
    """What is done in the run that rules act on, where that is no unpatched one."""

    def text(self, name: str, key: str) -> str:
        way = self.ends or ("from scenes into neutral" if self.base == "gray" else "")
        front = View(name, 0, self.base).front
        return support.experiment(key, way, self.rules.replace("FRONT", front))


def gray(rules: str, axes: tuple[str, ...], cells: Sequence[tuple[Coord, ...]],
         acts: Callable[..., Iterable[Act]], **more: Any) -> Case:  # fmt: skip
    return Case(rules, axes, cells, acts, "gray", **more)


def each(*axes: Iterable[Coord]) -> list[tuple[Coord, ...]]:
    found: list[tuple[Coord, ...]] = [()]
    for axis in axes:
        values = list(axis)
        found = [(*cell, value) for cell in found for value in values]
    return found


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def along(v: View, amount: float | None, which: str = "mean") -> Callable[[Tensor], Tensor]:
    """The component along a direction becomes this; None: it goes."""
    u = unit(v.direction(which))
    return lambda x: x + ((amount or 0.0) - (x * u).sum(-1, keepdim=True)) * u


def step(v: View, layer: int, head: int, by: float) -> list[Act]:
    """q of each patch minus that of the token before, times a number, is added."""
    q = v.start.sites["q", layer][:, head]
    return [
        Write("q", layer, q[at] + by * (q[at] - q[at - 1]) if at else q[at], at, head)
        for at in v.at(ALL)
    ]


def healed(v: View) -> Seen:
    return v.run(v.copy("attn_out", 0, ALL), "gray")


NORMED = [("attn_norm", layer, 0) for layer in DEEP[1:]]
H01 = (0, 1)

CASES: dict[str, Case] = {
    "every_patch": gray(
        "patch resid_post layers 0..1 at each token of image", ("position",), each(EVERY),
        lambda v, at: v.copy("resid_post", (0, 1), at),
    ),
    "vectors": gray(
        f"for c in [resid_pre, resid_mid, attn_out, mlp_out, attn_norm, mlp_norm] "
        f"{{ patch c layer * at {PART} }}", ("c", "layer"),
        each(("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_norm", "mlp_norm"), DEEP),
        lambda v, site, layer: v.copy(site, layer, PART),
    ),
    "embedded_columns": gray(
        "patch embed at image row * col 2 token", ("position",),
        each([f"image row {n} col 2" for n in range(1, GRID + 1)]),
        lambda v, at: v.copy("embed", 0, at),
    ),
    "heads": gray(
        f"patch layer * head * at {ALL}", ("layer", "head"), each(DEEP, range(4)),
        lambda v, layer, head: v.copy("z", layer, ALL, [head]),
    ),
    "heads_at_the_front": gray(
        "patch head_out layers * head * at FRONT", ("head",), each(range(4)),
        lambda v, head: v.copy("head_out", DEEP, "FRONT", [head]),
    ),
    "parts_of_heads": gray(
        f"for c in [q, k, v, q_rot, k_rot] {{ patch c layer 1 head * at {ALL} }}", ("c", "head"),
        each(("q", "k", "v", "q_rot", "k_rot"), range(4)),
        lambda v, site, head: v.copy(site, 1, ALL, [head]),
    ),
    "within_attention": gray(
        "for c in [scores, pattern] { patch c layer * heads 0..2 at tokens * }", ("c", "layer"),
        each(("scores", "pattern"), DEEP),
        lambda v, site, layer: v.copy(site, layer, "tokens *", (0, 1, 2)),
    ),
    "neurons": gray(
        f"patch mlp_hidden layer * neurons 3..30 at {PART}", ("layer",), each(DEEP),
        lambda v, layer: v.copy("mlp_hidden", layer, PART, range(3, 31)),
    ),
    "windows": gray(
        f"patch mlp_out layer * window 2 at {ALL}", ("layer",), each(DEEP),
        lambda v, layer: v.copy("mlp_out", range(max(0, layer - 1), layer + 1), ALL),
    ),
    "ranges_of_layers": gray(
        f"for a in 0..2 {{ for b in a..2 {{ patch attn_out layers a..b at {PART} }} }}",
        ("a", "b"), [(a, b) for a in DEEP for b in range(a, LAYERS)],
        lambda v, a, b: v.copy("attn_out", range(a, b + 1), PART),
    ),
    "a_group": gray(
        f"patch few at {ALL}", (), [()],
        lambda v: [*v.copy("z", 0, ALL, [1]), *v.copy("z", 1, ALL, [2]),
                   *v.copy("mlp_out", 1, ALL)],
    ),
    "onto": Case(
        "patch resid_post layer * at image row 2 col 2 token onto FRONT with clean",
        ("layer",), each(DEEP),
        lambda v, layer: v.copy("resid_post", layer, "image row 2 col 2", to="FRONT"),
    ),
    "onto_joined": gray(
        "patch resid_post layer 0..1 at image row 1 col * tokens onto image row 4 col * tokens",
        ("layer",), each((0, 1)),
        lambda v, layer: v.copy(
            "resid_post", layer, "image row 1 col *", to="image row 4 col *"
        ),
    ),
    "into": gray(
        f"patch resid_post layer 0 at {PART} into layer *", ("to_layer",), each(DEEP),
        lambda v, to: v.copy("resid_post", 0, PART, into=to),
    ),
    "with_another_run": Case(
        f"patch resid_pre layer * at {PART} with neutral", ("layer",), each(DEEP),
        lambda v, layer: v.copy("resid_pre", layer, PART, of=v.image("gray")),
    ),
    "zero": Case(
        "ablate embed at image row 2 col * token with zero", ("position",),
        each([f"image row 2 col {n}" for n in range(1, GRID + 1)]),
        lambda v, at: v.make("embed", 0, at, 0.0),
    ),
    "means": Case(
        f"ablate resid_post layer 0..1 at {PART} with mean, mean by kind, mean of neutral",
        ("layer", "fill"), each((0, 1), ("mean", "mean by kind", "mean of neutral")),
        lambda v, layer, fill: {
            "mean": lambda: v.mean("resid_post", layer, PART),
            "mean by kind": lambda: v.mean(
                "resid_post", layer, PART, (0, 1) if v.number < 2 else (2,)
            ),
            "mean of neutral": lambda: v.copy("resid_post", layer, PART, of=v.image("gray")),
        }[fill](),
    ),
    "resampled": Case(
        f"ablate layers * head * at {ALL} with resample of neutral", ("head",), each(range(4)),
        lambda v, head: v.copy("z", DEEP, ALL, [head], of=v.image("gray")),
    ),
    "swapped": Case(
        "for c in [mlp_out, attn_out, resid_post] { swap c layer 0..1 at image row 1 col * tokens "
        "with image row 3 col * tokens }", ("c", "layer"),
        each(("mlp_out", "attn_out", "resid_post"), (0, 1)),
        lambda v, site, layer: [
            *v.copy(site, layer, "image row 1 col *", of=v.start, to="image row 3 col *"),
            *v.copy(site, layer, "image row 3 col *", of=v.start, to="image row 1 col *"),
        ],
    ),
    "frozen": gray(
        f"patch embed at {ALL}\n  freeze attn_out layers 1..2 at FRONT\n"
        f"  freeze mlp_out layers 0..1 at {PART}", (), [()],
        lambda v: [*v.copy("embed", 0, ALL), *v.copy("attn_out", (1, 2), "FRONT", of=v.start),
                   *v.copy("mlp_out", (0, 1), PART, of=v.start)],
    ),
    "blocked": Case(
        f"block attention layer * head * from {ALL} to image row 2 col * tokens",
        ("layer", "head"), each(DEEP, range(4)),
        lambda v, layer, head: v.edges("block", layer, ALL, "image row 2 col *", heads=[head]),
    ),
    "blocked_at_the_front": Case(
        "block attention layers * from FRONT to image row 1..3 col * tokens", (), [()],
        lambda v: v.edges("block", DEEP, "FRONT", "image row 1..3 col *"),
    ),
    "reweighted": Case(
        f"reweight attention layer * window 2 from {ALL} to {PART} by 6", ("layer",), each(DEEP),
        lambda v, layer: v.edges("reweight", range(max(0, layer - 1), layer + 1), ALL, PART, 6),
    ),
    "weights_that_are_set": Case(
        f"for w in [0.1, 0.45] {{ set attention layers 0..2 heads 0..2 from {ALL} to "
        "image row 1 col 1..2 tokens to w }", ("w",), each((0.1, 0.45)),
        lambda v, w: v.edges("set", DEEP, ALL, "image row 1 col 1..2", w, (0, 1, 2)),
    ),
    "spread_evenly": Case(
        f"set attention layer * head * from {ALL} to {ALL} to uniform",
        ("layer", "head"), each(DEEP, range(4)),
        lambda v, layer, head: v.edges("uniform", layer, ALL, ALL, heads=[head]),
    ),
    "heads_to_the_end": gray(
        "path layer 1..2 head * -> logits at tokens *", ("layer", "head"), each((1, 2), range(4)),
        lambda v, layer, head: v.path(v.copy("z", layer, "tokens *", [head]), [], "tokens *"),
    ),
    "heads_through_mlps": gray(
        "path layer 0 head * -> logits at tokens * through mlps", ("head",), each(range(4)),
        lambda v, head: v.path(
            v.copy("z", 0, "tokens *", [head]), [], "tokens *", mlps=True
        ),
    ),
    "with_frozen_norms": gray(
        "path layer * head 1 -> logits at tokens * with frozen norms", ("layer",), each(DEEP),
        lambda v, layer: v.path(
            v.copy("z", layer, "tokens *", [1]), [], "tokens *", frozen=True
        ),
    ),
    "patches_to_parts_of_heads": gray(
        f"for c in [q, k, v] {{ path mlp_out layer 0 -> c layer 1..2 at {PART} }}",
        ("c", "to_layer"), each(("q", "k", "v"), (1, 2)),
        lambda v, site, layer: v.path(
            v.copy("mlp_out", 0, PART), [(site, layer, unit) for unit in range(4)], PART
        ),
    ),
    "heads_to_heads": gray(
        f"path L0H1 -> v layer 1 head * at {ALL}", ("to_head",), each(range(4)),
        lambda v, head: v.path(v.copy("z", 0, ALL, [1]), [("v", 1, head)], ALL),
    ),
    "patches_to_a_norm": gray(
        f"path embed -> mlp_norm layer * at {ALL}", ("to_layer",), each(DEEP),
        lambda v, layer: v.path(v.copy("embed", 0, ALL), [("mlp_norm", layer, 0)], ALL),
    ),
    "a_direction_is_added": Case(
        f"for c in [-2, 3] {{ add c * d to resid_post layer * at {PART} }}", ("c", "layer"),
        each((-2, 3), DEEP),
        lambda v, c, layer: v.make("resid_post", layer, PART, lambda x: x + c * v.direction()),
    ),
    "a_value_is_added": Case(
        f"add 2 * value(attn_out layer 0) of neutral to resid_post layer * at {PART}",
        ("layer",), each(DEEP),
        lambda v, layer: [
            Write("resid_post", layer, lambda x, at=at: x + 2 * v.image("gray").sites[
                "attn_out", 0][at], at, 0)
            for at in v.at(PART)
        ],
    ),
    "a_step_is_added": Case(
        f"add 2 * step(q) to q layer 1 head * at {ALL}", ("head",), each(range(4)),
        lambda v, head: step(v, 1, head, 2),
    ),
    "set_to_a_number": Case(
        f"set mlp_hidden layer 1 neuron 1, 3 at {ALL} to 5", ("neuron",), each((1, 3)),
        lambda v, neuron: v.make("mlp_hidden", 1, ALL, 5.0, [neuron]),
    ),
    "set_to_a_direction": Case(
        f"set resid_post layer * at {PART} to -1 * middle", ("layer",), each(DEEP),
        lambda v, layer: v.make("resid_post", layer, PART, -v.direction("mean")),
    ),
    "set_to_a_value": Case(
        "set resid_post layer 1 at image row 2 col 3 token to "
        "2 * value(resid_post layer * at FRONT)", ("layer",), each(DEEP),
        lambda v, layer: v.make(
            "resid_post", 1, "image row 2 col 3",
            2 * v.start.sites["resid_post", layer][v.at("FRONT")[0], 0],
        ),
    ),
    "set_by_a_function": Case(
        f'set attn_out layer * at {PART} to python("own.py:turned")', ("layer",), each(DEEP),
        lambda v, layer: [
            Write("attn_out", layer, v.start.sites["attn_out", layer][at, 0].flip(-1) * 2, at, 0)
            for at in v.at(PART)
        ],
    ),
    "scaled": Case(
        f"scale attn_out layers 0..1 at {ALL} by 3", (), [()],
        lambda v: v.make("attn_out", (0, 1), ALL, lambda x: 3 * x),
    ),
    "projected_out": Case(
        f"project out middle from resid_post layer * at {PART}", ("layer",), each(DEEP),
        lambda v, layer: v.make("resid_post", layer, PART, along(v, None)),
    ),
    "clamped_neurons": Case(
        f"clamp mlp_hidden layer * neurons 0..2 at {PART} to 4", ("layer",), each(DEEP),
        lambda v, layer: v.make("mlp_hidden", layer, PART, 4.0, (0, 1, 2)),
    ),
    "clamped_along_a_direction": Case(
        f"clamp middle of resid_post layer * at {PART} to -6", ("layer",), each(DEEP),
        lambda v, layer: v.make("resid_post", layer, PART, along(v, -6.0)),
    ),
    "blocks_that_hand_on": Case(
        "replace block layer * with identity", ("layer",), each(DEEP),
        lambda v, layer: [Block(layer, None)],
    ),
    "other_blocks": Case(
        "replace block layers 1..2 with block layer 0", (), [()],
        lambda v: [Block(1, 0), Block(2, 0)],
    ),
    "into_a_run_with_rules": gray(
        f"patch resid_post layer 1 at {PART}", (), [()],
        lambda v: [*v.copy("attn_out", 0, ALL), *v.copy("resid_post", 1, PART)],
        ends=f"run healed {{ from scenes into neutral patch attn_out layer 0 at {ALL} }}\n"
        "  from scenes into healed",
        start=lambda v: v.copy("attn_out", 0, ALL),
    ),
    "out_of_a_run_with_rules": gray(
        f"patch resid_post layer 1 at {ALL}", (), [()],
        lambda v: v.copy("resid_post", 1, ALL, of=healed(v)),
        ends=f"run healed {{ from scenes into neutral patch attn_out layer 0 at {ALL} }}\n"
        "  from healed into neutral",
    ),
    "beside_each_other": gray(
        f"patch layer 0 head * at {ALL}\n  block attention layer 1 from FRONT to {PART}\n"
        f"  scale mlp_out layer 1 at {PART} by -1\n  set attn_out layer 2 at FRONT to 0.5",
        ("head",), each(range(4)),
        lambda v, head: [
            *v.copy("z", 0, ALL, [head]), *v.edges("block", 1, "FRONT", PART),
            *v.make("mlp_out", 1, PART, lambda x: -x), *v.make("attn_out", 2, "FRONT", 0.5),
        ],
    ),
}  # fmt: skip
