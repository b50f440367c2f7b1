"""Rotations, steering vectors, soft prompts, edits of low rank and scales, while they are trained.

The free parameters of a rotation are a matrix A [dims, width] with rows of any length and angle.
Its directions R are the rows of the orthonormal factor of A, so that gradients turn the subspace
and never scale it. After a step, A becomes R: the next step has the same size wherever it starts.

With a steering vector, x becomes x + v. The free parameters w [width] give v = u w, where the unit
u is a typical size of the numbers of x. So the learning rate of Adam is a share of this size, at
every site of every model. With a soft prompt, the vector of token k becomes v_k = s_k + u w_k,
where s_k is the mean of those that it replaces, or for tokens inserted into images a random vector.

With an edit of rank r, x becomes x + Δ(x), where Δ(x) = Aᵀ B x + c. With Φ for the free parameters,
B = Φ_B / √width and A = Φ_A / √width, both [r, width], and c = Aᵀ Φ_c m / √r, where m is the mean
length of x; Φ_B and Φ_c start from 0. LoReFT makes the rows of A orthonormal: A = R, B = W − R and
c = Rᵀ b in its notation.

With a scale for each channel, x becomes x ⊙ s. The free parameters w [width] give s = 1 + w and
start from 0, so that a step of Adam changes each factor by about the learning rate at most.

References:
    Park et al. 2025, arXiv 2509.25843 (scales of heads); Wu et al. 2024, arXiv 2404.03592 (LoReFT
    and DiReFT, equations 2 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor


class TrainedEdit:
    """An edit of vectors, while its parameters are trained.

    By default, it has no memory, no penalty and no constraint.
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        raise NotImplementedError

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Further tensors that the next steps depend on."""
        return {}

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [vector, width]: what is written after the training for vectors of the base run.

        Args:
            own: [vector, width] vectors of the base run.
            other: [vector, width] those of the source run, if the edit reads one.
        """
        raise NotImplementedError

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Return what training steps write in place of `edit`, with gradients of the parameters.

        Args:
            own: As in `edit`.
            other: As in `edit`.
            progress: Share of the steps that are done, from 0 to below 1.
        """
        return self.edit(own, other)

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    def after_step(self) -> None:
        """Restore what must hold after every step."""


# --- rotations ------------------------------------------------------------------------------------

ROTATION = "rotation"
"""Name of the parameter."""


class Rotation(TrainedEdit):
    """Orthonormal directions of a subspace."""

    def __init__(self, matrix: Tensor) -> None:
        """Start from [dims, width] independent rows."""
        self.matrix = orthonormal_rows(matrix).detach().clone()

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {ROTATION: self.matrix}

    def directions(self) -> Tensor:
        """Return R [dims, width], orthonormal rows that carry gradients of the parameters."""
        return orthonormal_rows(self.matrix)

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Exchange the part of vectors in the subspace; see `exchange`."""
        return exchange(own, other, self.directions())

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the rows of the parameters orthonormal; their subspace stays."""
        self.matrix.copy_(orthonormal_rows(self.matrix))


class BoundlessRotation(Rotation):
    """Orthonormal directions in an order, with a learned boundary between used and unused ones.

    In training, direction i of n has the weight m_i = sigmoid((b n − i − 1/2) / T), where b is the
    boundary and the temperature T falls from n/10 to 1/10 in a geometric sequence. The loss has the
    additional term p b for a penalty p. In the end, the first round(b n) directions are used.

    References:
        Wu et al. 2023, arXiv 2305.08809, section 3, where T falls linearly from 50 to 0.1.
    """

    def __init__(self, matrix: Tensor, penalty: float) -> None:
        """Start from [dims, width] independent rows, of which half are used."""
        super().__init__(matrix)
        self.boundary = torch.full((), 0.5, dtype=matrix.dtype, device=matrix.device)
        self._weight = penalty

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {**super().parameters, "boundary": self.boundary}

    def directions(self) -> Tensor:
        """Return the directions that are used, at least one."""
        count = max(1, round(float(self.boundary.detach()) * len(self.matrix)))
        return orthonormal_rows(self.matrix)[:count]

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Exchange every direction to the share of its weight."""
        count = len(self.matrix)
        temperature = count / 10 * (1 / count) ** progress
        place = torch.arange(count, dtype=own.dtype, device=own.device) + 0.5
        weight = torch.sigmoid((self.boundary * count - place) / temperature)
        rows = orthonormal_rows(self.matrix)
        return own + ((other - own) @ rows.T * weight) @ rows

    def penalty(self) -> Tensor | float:
        """Return the penalty p b."""
        return self._weight * self.boundary

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the rows orthonormal, and keep the boundary between 0 and 1."""
        super().after_step()
        self.boundary.clamp_(0, 1)


def draw_rows(
    dims: int, width: int, random: Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draw [dims, width] rows whose span is uniformly distributed.

    Args:
        random: On the CPU.
    """
    drawn = torch.randn(dims, width, generator=random, dtype=torch.float64)
    return drawn.to(device, dtype)


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return [dims, width] orthonormal rows of the same span, by the QR decomposition of Aᵀ.

    The triangular factor has a positive diagonal, so that rows change continuously with A.
    """
    factor, triangle = torch.linalg.qr(matrix.T)
    signs = triangle.diagonal().detach().sign()
    return (factor * torch.where(signs == 0, torch.ones_like(signs), signs)).T


def exchange(tensor: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Return [vector, width]: vectors whose part in a subspace is that of other vectors.

    Args:
        tensor: [vector, width]
        other: [vector, width]
        directions: R [dims, width], orthonormal rows.

    Returns:
        x + (y − x) RᵀR for vectors x of `tensor` and y of `other`.
    """
    return tensor + (other - tensor) @ directions.T @ directions


NUMBERS = "vector"
"""Name of the parameter."""


class TrainedVectors(TrainedEdit):
    """Vectors that a training writes at a site."""

    like_length: float
    """Mean length of the vectors that they are added to, or that they replace."""

    def vector(self) -> Tensor:
        """Return the vector [width], or one for each token [token, width]."""
        raise NotImplementedError

    def draw_like(self, vector: Tensor, random: Generator) -> Tensor:
        """Draw vectors of the same lengths in uniformly distributed directions."""
        raise NotImplementedError

    def write(self, own: Tensor, vector: Tensor) -> Tensor:
        """Return [vector, width] what is written for vectors of the base run."""
        raise NotImplementedError

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [vector, width] what is written with the present parameters."""
        return self.write(own, self.vector())


class SteeringVector(TrainedVectors):
    """A vector that is added to others."""

    def __init__(
        self, like: Tensor, random: Generator, *, length: float | None, penalty: float
    ) -> None:
        """Start from a random vector of the length, or from 0 if the length is learned.

        Args:
            like: [vector, width] vectors that it is added to.
            random: On the CPU.
            length: Length of the vector after every step; None if it is learned.
            penalty: Weight of the squared length, in units of the mean length of `like`.
        """
        width = like.shape[1]
        self._length, self._penalty = length, penalty
        self.like_length = float(like.norm(dim=1).mean())
        self._unit = (self.like_length if length is None else length) / math.sqrt(width) or 1.0
        self.numbers = torch.zeros(width, dtype=like.dtype, device=like.device)
        if length is not None:
            self.numbers = rescale(self.draw(random), math.sqrt(width))

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {NUMBERS: self.numbers}

    def vector(self) -> Tensor:
        """Return v [width], which carries gradients of the parameters."""
        return self._unit * self.numbers

    def draw(self, random: Generator) -> Tensor:
        """Draw [width] numbers of a vector in a uniformly distributed direction."""
        drawn = torch.randn(len(self.numbers), generator=random, dtype=torch.float64)
        return drawn.to(self.numbers.device, self.numbers.dtype)

    def draw_like(self, vector: Tensor, random: Generator) -> Tensor:
        """Draw [width] a vector of the same length."""
        return rescale(self.draw(random), float(vector.norm()))

    def write(self, own: Tensor, vector: Tensor) -> Tensor:
        """Return [vector, width] vectors of the base run with a vector added."""
        return own + vector

    def penalty(self) -> Tensor | float:
        """Return the penalty p ‖v‖² / m², where m is the mean length of the vectors of the site."""
        if not self._penalty:
            return 0.0
        return self._penalty * self.vector().square().sum() / self.like_length**2

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore the length, if it is given."""
        if self._length is not None:
            self.numbers.copy_(rescale(self.numbers, math.sqrt(len(self.numbers))))


class SoftPrompt(TrainedVectors):
    """Vectors that replace those at the tokens of a position, one for each token."""

    def __init__(self, like: Tensor, tokens: int) -> None:
        """Start from the means of the vectors that they replace.

        Args:
            like: [vector, width] vectors of the base run: those of all tokens of one row, then
                those of the next.
            tokens: Number of tokens of the position in every row.
        """
        width = like.shape[1]
        self._start = like.reshape(-1, tokens, width).mean(0)
        self.like_length = float(like.norm(dim=1).mean())
        self._unit = self.like_length / math.sqrt(width) or 1.0
        self.numbers = torch.zeros(tokens, width, dtype=like.dtype, device=like.device)

    def draw_start(self, others: Tensor, random: Generator) -> None:
        """Start from random vectors of the mean length of others, one for each token.

        Tokens inserted into an image have equal vectors and no positions, so that all would get
        the same gradient.

        Args:
            others: [vector, width] vectors of the site at tokens of the images.
            random: On the CPU.
        """
        self.like_length = float(others.norm(dim=1).mean())
        self._unit = self.like_length / math.sqrt(others.shape[1]) or 1.0
        like = torch.full_like(self._start, self._unit)
        self._start = self.draw_like(like, random)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {NUMBERS: self.numbers}

    def vector(self) -> Tensor:
        """Return v [token, width], which carries gradients of the parameters."""
        return self._start + self._unit * self.numbers

    def draw_like(self, vector: Tensor, random: Generator) -> Tensor:
        """Draw [token, width] vectors of the same lengths."""
        drawn = torch.randn(vector.shape, generator=random, dtype=torch.float64)
        vector_like = drawn.to(vector.device, vector.dtype)
        return torch.stack(
            [
                rescale(tensor, float(of.norm()))
                for tensor, of in zip(vector_like, vector, strict=True)
            ]
        )

    def write(self, own: Tensor, vector: Tensor) -> Tensor:
        """Return [vector, width]: the vectors [token, width] for every row."""
        return vector.repeat(len(own) // len(vector), 1)


def rescale(vector: Tensor, length: float) -> Tensor:
    """Return [width] a vector of the same direction and another length; 0 stays 0."""
    norm = float(vector.norm())
    return vector * (length / norm) if norm > 0 else vector


class LowRankEdit(TrainedVectors):
    """A vector that is added, as an affine function of low rank of the vector that it is added to.

    Its matrix [2 rank + 1, width] has the rows of B, those of A, and c.
    """

    def __init__(self, like: Tensor, rank: int, random: Generator, *, orthonormal: bool) -> None:
        """Start from an edit that adds 0, with a random subspace of what it can add.

        Args:
            like: [vector, width] vectors that it edits.
            rank: Number of directions that it reads, and of those that it adds.
            random: On the CPU.
            orthonormal: Whether the directions that it adds stay orthonormal (LoReFT).
        """
        width = like.shape[1]
        self._like, self._orthonormal = like, orthonormal
        self._unit = 1 / math.sqrt(width)
        self.like_length = float(like.norm(dim=1).mean())
        self._offset_unit = self.like_length / math.sqrt(rank) or 1.0
        rows = orthonormal_rows(draw_rows(rank, width, random, like.device, like.dtype))
        self.writes = rows / self._unit
        self.reads = torch.zeros_like(rows)
        self.offset = torch.zeros(rank, dtype=like.dtype, device=like.device)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {"reads": self.reads, "writes": self.writes, "offset": self.offset}

    def vector(self) -> Tensor:
        """Return the matrix [2 rank + 1, width], which carries gradients of the parameters."""
        writes = orthonormal_rows(self.writes) if self._orthonormal else self._unit * self.writes
        offset = self._offset_unit * self.offset @ writes
        return torch.cat([self._unit * self.reads, writes, offset[None]])

    def draw_like(self, vector: Tensor, random: Generator) -> Tensor:
        """Draw the matrix of an edit that adds vectors of the same lengths in a random subspace."""
        drawn = torch.randn(vector.shape, generator=random, dtype=torch.float64)
        return turn_edit(vector, drawn.to(vector.device, vector.dtype))

    def draw_random(self, vector: Tensor, random: Generator) -> Tensor:
        """Draw the matrix of an edit of the same rank that also reads random directions.

        The vectors that it adds have the mean length of those of another edit.
        """
        drawn = torch.randn(vector.shape, generator=random, dtype=torch.float64)
        direction = drawn.to(vector.device, vector.dtype)
        direction[-1] *= self.like_length
        ratio = self.mean_length(vector) / self.mean_length(direction)
        direction[len(direction) // 2 :] *= ratio
        return direction

    def mean_length(self, vector: Tensor) -> float:
        """Return the mean length of the vectors that the edit with a matrix adds."""
        return float(low_rank_change(self._like, vector).norm(dim=1).mean())

    def mean_change(self, vector: Tensor) -> Tensor:
        """Return the matrix of the edit that always adds the mean of what another one adds."""
        constant = torch.zeros_like(vector)
        constant[-1] = low_rank_change(self._like, vector).mean(0)
        return constant

    def write(self, own: Tensor, vector: Tensor) -> Tensor:
        """Return [vector, width] vectors of the base run with what the edit adds to each."""
        return own + low_rank_change(own, vector)

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the directions that it adds orthonormal, for LoReFT; their subspace stays."""
        if self._orthonormal:
            self.writes.copy_(orthonormal_rows(self.writes) / self._unit)


def low_rank_change(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Return [vector, width]: what an edit adds to vectors.

    Args:
        vectors: [vector, width]
        matrix: [2 rank + 1, width] as in `LowRankEdit`.
    """
    reads, writes, offset = split_edit(matrix)
    return vectors @ reads.T @ writes + offset


def split_edit(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return B [rank, width], A [rank, width] and c [width] of the matrix of an edit."""
    rank = len(matrix) // 2
    return matrix[:rank], matrix[rank:-1], matrix[-1]


def turn_edit(matrix: Tensor, drawn: Tensor) -> Tensor:
    """Return the matrix of an edit that adds vectors of the same lengths in another subspace.

    Args:
        matrix: [2 rank + 1, width]
        drawn: [2 rank + 1, width] normal numbers. The last rank + 1 rows determine the subspace.
    """
    rank = len(matrix) // 2
    factor, _ = torch.linalg.qr(matrix[rank:].T)  # what it adds is in the span of A and c
    other, _ = torch.linalg.qr(drawn[rank:].T)
    return torch.cat([matrix[:rank], matrix[rank:] @ factor @ other.T])


CHANGES = "changes"
"""Name of the parameter."""


class ChannelScales(TrainedEdit):
    """Factors of the numbers of vectors."""

    def __init__(self, like: Tensor, *, penalty: float) -> None:
        """Start from factors of 1.

        Args:
            like: [vector, width] vectors that they multiply.
            penalty: Weight of the mean squared difference from 1.
        """
        self._penalty = penalty
        self.changes = torch.zeros(like.shape[1], dtype=like.dtype, device=like.device)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {CHANGES: self.changes}

    def factors(self) -> Tensor:
        """Return s [width], which carries gradients of the parameters."""
        return 1 + self.changes

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [vector, width] vectors of the base run, scaled."""
        return own * self.factors()

    def penalty(self) -> Tensor | float:
        """Return the penalty p ‖s − 1‖² / width."""
        return self._penalty * self.changes.square().mean() if self._penalty else 0.0
