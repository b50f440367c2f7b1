"""Custom trainers: the content of the file `own.py` in tests."""

import torch
from torch import nn

FEATURES, K, START = 24, 4, 7


class TopK(nn.Module):
    """A top-k autoencoder."""

    architecture = "topk"

    def __init__(self, width, features, k, noise=0.0):
        super().__init__()
        random = torch.Generator().manual_seed(START)
        rows = nn.functional.normalize(torch.randn(features, width, generator=random))
        self.encoder = nn.Parameter(rows.T.clone())
        self.bias = nn.Parameter(torch.zeros(features))
        self.decoder = nn.Parameter(rows.clone())
        self.center = nn.Parameter(torch.zeros(width))
        self.register_buffer("seen", torch.zeros(features))
        self.k, self.noise = k, noise

    def loss(self, vectors, progress):
        before = (vectors - self.center) @ self.encoder + self.bias
        before = before + self.noise * (torch.randn_like(before) + 0.01 * self.seen)
        top = before.topk(self.k, dim=1)
        features = torch.zeros_like(before).scatter(1, top.indices, top.values.relu())
        with torch.no_grad():
            self.seen += (features > 0).sum(0)
        return (vectors - features @ self.decoder - self.center).square().sum(1).mean()

    def after_step(self):
        self.decoder /= self.decoder.norm(dim=1, keepdim=True)

    def weights(self):
        return {
            "W_enc": self.encoder,
            "b_enc": self.bias,
            "W_dec": self.decoder,
            "b_dec": self.center,
        }


class Shift(nn.Module):
    """A vector with an L1 penalty that may grow with the steps."""

    def __init__(self, vectors, weight, growth=0.0, noise=0.0):
        super().__init__()
        self.v = nn.Parameter(0.1 * vectors.mean(0))
        self.register_buffer("steps", torch.zeros(()))
        self.weight, self.growth, self.noise = weight, growth, noise

    def vector(self):
        return self.v + self.noise * torch.randn_like(self.v)

    def penalty(self):
        return (self.weight + self.growth * self.steps) * self.v.abs().sum()

    def after_step(self):
        self.steps += 1


class Turn(nn.Module):
    """A subspace whose rows are never orthonormalized."""

    def __init__(self, vectors, dims, growth=0.0):
        super().__init__()
        random = torch.Generator().manual_seed(START)
        self.rows = nn.Parameter(torch.randn(dims, vectors.shape[1], generator=random))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.growth = growth

    def directions(self):
        return self.rows

    def penalty(self):
        return self.growth * self.steps * self.rows.square().sum()

    def after_step(self):
        self.steps += 1


class Soft(nn.Module):
    """Gates with fractional values."""

    def __init__(self, count, size, noise=0.0):
        super().__init__()
        self.scores = nn.Parameter(torch.linspace(-0.1, 0.1, count))
        self.noise = noise

    def probabilities(self):
        return self.scores.sigmoid()

    def sample(self, rows):
        drawn = self.noise * torch.randn(rows, len(self.scores))
        return (self.scores + drawn).sigmoid()
