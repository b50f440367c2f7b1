"""Percentages that keep their sign."""

from __future__ import annotations


class Percent(float):
    """`5%` is 5.0 in arithmetic and on plots, and `5%` as text."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{float(self):g}%"
