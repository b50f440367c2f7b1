"""Bases of activations, computed from the bare model by other algorithms than the package's, and
the changes of coordinates that rules make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.base.hashing import stable_hash

from ..execute.support import token
from ..reference.forward import stack
from .models import double
from .support import plain, rows, tokens


@dataclass(frozen=True, eq=False)
class Basis:
    """The coordinates of x are the least-squares solution of x - center = sum f_i d_i."""

    directions: Tensor
    """[size, width]"""
    center: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """[K, size] of [K, width]."""
        flat = (x - self.center).reshape(-1, x.shape[-1])
        found = torch.linalg.lstsq(self.directions.T, flat.T).solution.T
        return found.reshape(*x.shape[:-1], -1)

    def moved(self, x: Tensor, new: Callable[[Tensor], Tensor], which: Sequence[int]) -> Tensor:
        """[K, width] with new coordinates, which are computed from the old ones."""
        old = self.coordinates(x)
        there = torch.zeros(len(self.directions), dtype=x.dtype)
        there[list(which)] = 1
        return x + ((new(old) - old) * there) @ self.directions


def of_directions(directions: Tensor) -> Basis:
    return Basis(directions, torch.zeros(directions.shape[1], dtype=directions.dtype))


def positive(vectors: Tensor) -> Tensor:
    """Flip signs so that the largest number of each vector is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """[count, width] of a symmetric matrix, the largest values first."""
    return positive(torch.linalg.eigh(matrix).eigenvectors.flip(1).T[:count])


@cache
def fit_rows(name: str, run: str, site: str, layer: int | None, at: str, unit: int = 0) -> Tensor:
    """[row, width]: the tokens of a row are averaged."""
    found = [plain(name, text)[site, layer][tokens(text, at), unit].mean(0) for text in rows(run)]
    return torch.stack(found)


@cache
def pca(
    name: str, run: str, site: str, layer: int | None, at: str, dims: int, unit: int = 0
) -> Basis:
    x = fit_rows(name, run, site, layer, at, unit)
    centred = x - x.mean(0)
    return Basis(eigenvectors(centred.T @ centred, dims), x.mean(0))


@cache
def random(name: str, number: int, place: str, dims: int, width: int, seed: int = 0) -> Basis:
    """Gram-Schmidt of normal numbers; number: of the definition in the file."""
    bits = np.random.SeedSequence([stable_hash(seed, "basis", f"{number} {place}")])
    normal = np.random.Generator(np.random.Philox(bits)).standard_normal((dims, width))
    found: list[Tensor] = []
    for each in torch.from_numpy(normal):
        for other in found * 2:
            each = each - (each @ other) * other
        found.append(each / each.norm())
    return of_directions(torch.stack(found))


def words(name: str, *texts: str) -> Basis:
    weight = double(name).get_output_embeddings().weight.detach()
    return of_directions(torch.stack([weight[token(text)] for text in texts]))


@cache
def svd(name: str, site: str, layer: int, dims: int) -> Basis:
    """Left singular vectors of the contributions of one-hot inputs to the stream."""
    parts = stack(name, double(name))
    block = parts.block(layer)
    with torch.no_grad():
        if site == "mlp_out":
            count = plain(name, rows()[0])["mlp_hidden", layer].shape[1]
            inputs = torch.eye(count, dtype=torch.float64)
            matrix = parts.down(block, inputs) - parts.down(block, inputs * 0)
            behind = getattr(block, "post_feedforward_layernorm", None)
        else:
            matrix = parts.output(block)[0].detach()
            behind = getattr(block, "post_attention_layernorm", None) if name == "gemma2" else None
        if behind is not None:
            matrix = matrix * (1 + behind.weight)
    return of_directions(eigenvectors(matrix.T @ matrix, dims))


SAVED_DIMS = 3


@cache
def saved(width: int) -> Basis:
    """Rows that are neither orthogonal nor of length 1."""
    generator = torch.Generator().manual_seed(5)
    found = torch.randn(SAVED_DIMS, width, generator=generator)
    found[1] += 1.5 * found[0]
    return of_directions((found * torch.tensor([[1.0], [0.4], [2.5]])).double())


def save_rows(folder: Path, width: int) -> str:
    """Write the rows; returns the name of the file."""
    name = f"rows{width}.safetensors"
    save_file({"rows": saved(width).directions.float().contiguous()}, folder / name)
    return name


def width_of(name: str, site: str = "resid_post", layer: int | None = 1) -> int:
    return plain(name, rows()[0])[site, layer].shape[-1]
