"""Rules at positions of images: the text in a file, and the equivalent hooks for one image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..reference.forward import Write
from .reference import Act, Block, Seen
from .support import GRID, LAYERS
from .views import ALL, DEEP, PART, View

Coord = int | float | str
EVERY = tuple(f"image row {r} col {c}" for r in range(1, GRID + 1) for c in range(1, GRID + 1))
FUNCTIONS = """
def turned(vectors):
    return vectors.flip(-1) * 2
"""


@dataclass(frozen=True)
class Case:
    """A rule, or several that act together."""

    rules: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    acts: Callable[..., Iterable[Act]]
    """Returns the hooks, given a row's View and the cell's coordinates."""
    base: Literal["own", "gray"] = "own"
    """Whether rules act on the row's image or on the gray image."""
    ends: str = ""
    """`from … into …`, if it differs from the default."""
    start: Callable[[View], Iterable[Act]] | None = None
    """Hooks of the base run, if it isn't an unpatched run."""

    def text(self, view: type[View], name: str, key: str) -> str:
        way = self.ends or ("from scenes into neutral" if self.base == "gray" else "")
        return view(name, 0, self.base).experiment(key, way, self.rules)


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
    """Set the component along a direction to an amount; None removes it."""
    u = unit(v.direction(which))
    return lambda x: x + ((amount or 0.0) - (x * u).sum(-1, keepdim=True)) * u


def step(v: View, layer: int, head: int, by: float) -> list[Act]:
    """Add the difference between q of each patch and of the preceding token, times a factor."""
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
    "windows_of_patches": gray(
        "for r in 1..3 { patch resid_post layer 1 at image row r..r + 1 col 2..r + 1 tokens }",
        ("r",), [(r,) for r in (1, 2, 3)],
        lambda v, r: v.copy("resid_post", 1, f"image row {r}..{r + 1} col 2..{r + 1}"),
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

OF_PATCHES = ("every_patch", "embedded_columns", "windows_of_patches", "zero", "resampled")
"""Cases without an equivalent in the text tower."""
OF_WORDS: dict[str, Case] = {
    "every_word": gray(
        "patch resid_post layers 0..1 at each token of thing", ("position",),
        each(("thing first", "thing last")),
        lambda v, at: v.copy("resid_post", (0, 1), at),
    ),
    "zero": Case(
        f"ablate embed at {PART} with zero", (), [()],
        lambda v: v.make("embed", 0, PART, 0.0),
    ),
    "means": Case(
        f"ablate resid_post layer 0..1 at {PART} with mean, mean by kind",
        ("layer", "fill"), each((0, 1), ("mean", "mean by kind")),
        lambda v, layer, fill: v.mean(
            "resid_post", layer, PART,
            (0, 1, 2) if fill == "mean" else (0, 1) if v.number < 2 else (2,),
        ),
    ),
}  # fmt: skip
TEXT_CASES = {**{key: case for key, case in CASES.items() if key not in OF_PATCHES}, **OF_WORDS}
