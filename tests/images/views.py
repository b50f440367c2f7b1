"""One row in a test of rules: its reference runs with plain hooks, and the acts of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference.forward import Edge, Write
from . import support
from .reference import Act, Divisor, Seen, norms
from .support import FRONT, GRID, LAYERS, forward, pixels, plain

PART = "image row 2..3 col 1..3 tokens"
ALL = "image tokens"
DEEP = range(LAYERS)
DIRECTIONS = f"""
direction d = mean_difference(scenes, neutral) at resid_post layer 0 at {PART}
direction middle = mean(scenes) at resid_post layer 0 at {PART}
group few = L0H1, L1H2, L1.mlp
group movers = L1H1, L2H0
"""


def tokens(name: str, written: str) -> list[int]:
    """Token indices of a position, computed without the package."""
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


def in_tower(name: str, tower: str, line: str) -> str:
    """Name the tower before `layer` for one of the models, where it is optional."""
    if name != "clip/dual":
        return line
    return re.sub(r"(?<!into )(?<!block )\b(layers?)\b", rf"{tower} \1", line)


@dataclass(frozen=True)
class View:
    """One row of one model that reads images."""

    name: str
    number: int
    base: Literal["own", "gray"]

    def image(self, which: str) -> Seen:
        """The unpatched run of the row's image, or of the gray image."""
        return plain(self.name, self.number if which == "own" else None)

    @property
    def blocks(self) -> str:
        return support.blocks_of(self.name) + DIRECTIONS

    def experiment(self, key: str, *lines: str) -> str:
        """Text of an experiment; replaces FRONT by a position that all families have."""
        measure = support.OF_SCORES if self.name in support.DUALS else support.DIFFERENCE
        own = [in_tower(self.name, "vision", line.replace("FRONT", self.front)) for line in lines]
        return support.experiment(key, *own, measure=measure)

    def value(self, seen: Seen) -> float:
        """Value of the measure in a run."""
        return support.difference(seen, self.number)

    @property
    def start(self) -> Seen:
        """The run that rules act on."""
        return self.image(self.base)

    @cached_property
    def front(self) -> str:
        """A position that all families have: the class token if there is one."""
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
        """Write vectors of a run, by default the row's image, at the same or another position."""
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
        """Write one vector at all tokens, or a function of the present vectors."""
        found: list[Act] = []
        for layer in [layers] if isinstance(layers, int) else layers:
            like = self.start.sites[site, layer]
            what: Any = torch.full_like(like[0, 0], vector) if isinstance(vector, float) else vector
            for unit in range(like.shape[1]) if units is None else units:
                found += [Write(site, layer, what, at_, unit) for at_ in self.at(at)]
        return found

    def mean(self, site: str, layer: int, at: str, numbers: Sequence[int] = (0, 1, 2)) -> list[Act]:
        """Write the mean over rows at each position."""
        every = [replace(self, number=n) for n in numbers]
        over = torch.stack([v.image("own").sites[site, layer][v.at(at)] for v in every]).mean(0)
        return [
            Write(site, layer, vector, token, unit)
            for token, units in zip(self.at(at), over, strict=True)
            for unit, vector in enumerate(units)
        ]

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
        """Write the inputs of receivers (site, layer, unit) with all other paths held fixed;
        without receivers, return the acts of that pass."""
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

        def middle(of: str) -> Tensor:
            every = [replace(self, number=n) for n in range(3)]
            own = [v.image(of).sites["resid_post", 0][v.at(PART), 0].mean(0) for v in every]
            return torch.stack(own).mean(0)

        return middle("own") if which == "mean" else middle("own") - middle("gray")
