"""What Python hands over, as options have it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean

if TYPE_CHECKING:
    import torch


def names(names: Sequence[str]) -> frozenset[str]:
    """A word alone is one name, not its letters."""
    return frozenset([names] if isinstance(names, str) else names)


def name_of(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def word_problem(
    name: str, word: str, known: Sequence[str] | Mapping[str, object]
) -> list[Diagnostic]:
    if word in known:
        return []
    hint = did_you_mean(word, known, f"write one of {', '.join(known)}")
    return [BadCommandLine(reason=f"`{name}={word!r}`: there is no such {name}", hint=hint)]


def dtype_problem(dtype: str | torch.dtype | None) -> list[Diagnostic]:
    from mechdsl.program.lower_file import DTYPES

    return [] if dtype is None else word_problem("dtype", name_of(dtype), DTYPES)


def size_problems(
    limit: int | None, pass_tokens: int | None = None, prompt_tokens: int | None = None
) -> list[Diagnostic]:
    given = {"limit": limit, "pass_tokens": pass_tokens, "prompt_tokens": prompt_tokens}
    return [
        BadCommandLine(
            reason=f"`{name}={value!r}`: it is a whole number from 1 on",
            hint="leave it out where there is to be no limit",
        )
        for name, value in given.items()
        if value is not None and (type(value) is not int or value < 1)
    ]


def store_problem(store: object, fresh: bool) -> list[Diagnostic]:
    if store is False and fresh:
        said = "`store=False` and `fresh=True` contradict each other"
        return [BadCommandLine(reason=said, hint="without a store all is computed anew")]
    if store is None or store is False or isinstance(store, str | Path):
        return []
    hint = "name a folder; `False` is no store, and `None` the one beside the file"
    return [BadCommandLine(reason=f"`store={store!r}`: it is a folder", hint=hint)]
