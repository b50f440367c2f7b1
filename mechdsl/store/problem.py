"""Why a store can't be used."""

from __future__ import annotations


class StoreProblem(Exception):
    """The store can't be used; the text says why, in lower case."""
