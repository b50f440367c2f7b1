"""Every rule that edits the vectors of one site, and what it writes, from vectors that plain hooks
read on a bare model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vectors = Callable[[int, bool, int], Tensor]
"""Given a row, whether its other run is read, and 0 for the site or 1 for that of the next layer,
returns the vectors [token, width] of an unpatched run."""

ROWS = range(4)


def direction(of: Vectors) -> Tensor:
    """The mean of the vectors of all rows, which rules call `d`."""
    return torch.cat([of(n, False, 0) for n in ROWS]).mean(0)


def _mean(of: Vectors, *, other: bool) -> Tensor:
    """[token, width] the mean over rows."""
    return torch.stack([of(n, other, 0) for n in ROWS]).mean(0)


def _unit(of: Vectors) -> Tensor:
    return direction(of) / direction(of).norm()


def _along(of: Vectors, old: Tensor) -> Tensor:
    """[token, width] the component along the direction."""
    return (old @ _unit(of))[:, None] * _unit(of)


def _dims(old: Tensor, factor: float) -> Tensor:
    new = old.clone()
    new[:, 1:5] *= factor
    return new


EDITS: dict[str, Callable[[Vectors, int, Tensor], Tensor]] = {
    "ablate SITE at AT with zero": lambda of, n, old: 0 * old,
    "ablate SITE at AT with mean": lambda of, n, old: _mean(of, other=False),
    "ablate SITE at AT with mean of OTHER": lambda of, n, old: _mean(of, other=True),
    "set SITE at AT to 0.5": lambda of, n, old: torch.full_like(old, 0.5),
    "set SITE at AT to 3 * d": lambda of, n, old: (3 * direction(of)).expand_as(old),
    "add 3 * d to SITE at AT": lambda of, n, old: old + 3 * direction(of),
    "scale SITE at AT by -1.5": lambda of, n, old: -1.5 * old,
    "scale SITE at AT by d": lambda of, n, old: old * direction(of),
    "scale SITE dims 1..4 at AT by -4": lambda of, n, old: _dims(old, -4),
    "project out d from SITE at AT": lambda of, n, old: old - _along(of, old),
    "project SITE at AT onto d": lambda of, n, old: _along(of, old),
    "clamp d of SITE at AT to 5": lambda of, n, old: old - _along(of, old) + 5 * _unit(of),
    "set SITE at AT to value(NEXT at AT)": lambda of, n, old: of(n, False, 1),
    "add 2 * value(SITE at AT) of OTHER to SITE at AT": lambda of, n, old: old + 2 * of(n, True, 0),
}
"""Rules with a site, that of the next layer, a position and another run, and the new vectors of a
row, given the old ones."""


def write_rules(site: str, following: str, position: str, other: str) -> list[str]:
    """Return the lines of all rules."""
    names = {"SITE": site, "NEXT": following, "AT": position, "OTHER": other}
    found = list(EDITS)
    for name, text in names.items():
        found = [rule.replace(name, text) for rule in found]
    return found
