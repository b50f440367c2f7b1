"""Metrics with known values: noise, and noise next to an effect. Equal logits of a row give equal
values."""

from hashlib import blake2b

import torch


def _noise(logits, salt=0):
    """Return a normal number per row, seeded by its logits."""
    found = []
    for line in logits:
        seen = line.detach().float().cpu().numpy().tobytes()
        seed = int.from_bytes(blake2b(seen + bytes([salt]), digest_size=7).digest(), "big")
        found.append(torch.randn((), generator=torch.Generator().manual_seed(seed)))
    return torch.stack(found)


def noise(logits, rows):
    return _noise(logits)


def noise_again(logits, rows):
    return _noise(logits, 1)


def noise_once_more(logits, rows):
    return _noise(logits, 2)


def skewed(logits, rows):
    """Return positive numbers, some of them large."""
    return _noise(logits).exp()


def of_answer(logits, rows):
    """The logit of the answer."""
    ids = torch.tensor([row["answer.ids"][0] for row in rows])
    return logits[torch.arange(len(rows)), ids]


def apart_from_six(logits, rows):
    """The logit of the answer, and noise where there are six fruits."""
    known = torch.tensor([0.0 if row["count"] == 6 else 1.0 for row in rows])
    return known * of_answer(logits, rows) + (1 - known) * 0.01 * _noise(logits)


def a_step(vectors):
    """Every second number is larger by the last bits of single precision."""
    sign = torch.ones(vectors.shape[-1])
    sign[::2] = -1
    return vectors * (1 + 2.0**-19 * sign)
