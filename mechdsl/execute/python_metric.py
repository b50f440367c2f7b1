"""Metrics that functions of the user's Python files make of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.program.python_files import TOKENIZER, PythonFailure, PythonNotLoaded
from mechdsl.resolve.resolved import Atom

HINT = "it takes `logits`, [n, vocab], and `rows`, n of them, and gives n numbers"


def python_metric(atom: Atom, logits: Tensor, prompts: Ints, usable: Bools) -> Tensor:
    """[row]: what the function makes of the rows that it is given, which are the usable ones; NaN
    in the others.

    logits: [row, vocab]. prompts: [row] index into the table. usable: [row].
    E0223 as PythonFailure, with the row that it fails at where there is one.
    """
    found = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return found
    index = torch.from_numpy(rows)
    if len(rows) < len(prompts):
        logits, prompts = logits[index.to(logits.device)], prompts[rows]
    try:
        found[index] = _called(atom, logits, prompts)
    except PythonNotLoaded:
        raise
    except PythonFailure as failure:
        if failure.row is None and failure.__cause__ is not None:  # it raised
            failure.row = _failing_row(atom, logits, prompts, failure.diagnostic.reason)
        if failure.row is not None:
            failure.row = int(rows[failure.row])
        raise
    return found


def _called(atom: Atom, logits: Tensor, prompts: Ints) -> Tensor:
    """[row] on the CPU: what the function gives, if that is a number for each row."""
    function = atom.python
    assert function is not None
    # A copy, so that a function that writes into it changes nothing that others read.
    own = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    rows = [dict(atom.rows[prompt]) for prompt in prompts]
    library = None if atom.tokenizer is None else atom.tokenizer.library
    third = (library,) if function.tokenizer == "third" else ()
    named = {TOKENIZER: library} if function.tokenizer == "named" else {}
    with torch.no_grad():
        given = function.call(own, rows, *third, **named)
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise function.failure(f"it gave {_kind(given)}, not numbers", HINT) from None
    if found.shape != (len(prompts),):
        shape = list(found.shape)
        raise function.failure(f"it gave the shape {shape}, not [{len(prompts)}]", HINT)
    if found.is_complex():
        raise function.failure("it gave complex numbers", HINT)
    found = found.detach().double().cpu()
    if found.isnan().any():
        first = int(found.isnan().nonzero()[0])
        row = atom.rows[prompts[first]]
        told = ", ".join(f"{name} = {value!r}" for name, value in row.items() if "." not in name)
        raise function.failure(f"it gave NaN, in the row with {_short(told)}", HINT, row=first)
    return found


def _failing_row(atom: Atom, logits: Tensor, prompts: Ints, reason: str) -> int | None:
    """A row that alone makes the function raise the same, by halving; None where only several
    together do."""

    def raises(low: int, high: int) -> bool:
        try:
            _called(atom, logits[low:high], prompts[low:high])
        except PythonFailure as failure:
            return failure.diagnostic.reason == reason
        return False

    low, high = 0, len(prompts)
    while high - low > 1:
        middle = (low + high) // 2
        if raises(low, middle):
            high = middle
        elif raises(middle, high):
            low = middle
        else:
            return None
    return low


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a `{type(value).__name__}`"


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
