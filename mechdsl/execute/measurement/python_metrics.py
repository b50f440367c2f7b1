"""Metrics computed by the user's Python functions and by searches in generated text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mechdsl.base import limits
from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.experiments import UnreadableMeasure
from mechdsl.forward.hooks.batch import to_device
from mechdsl.program.python_functions import TOKENIZER_PARAMETER, PythonFailure, PythonNotLoaded
from mechdsl.resolve.types import ItemNumber, MetricTerm
from mechdsl.vocab.metrics import PatternTimeout, Reply

REPLY_ARGUMENT = "it takes `replies`, n texts, and `rows`, n of them, and returns n numbers"

RETURN_HINT = "it takes `logits`, [n, vocab], and `rows`, n of them, and returns n numbers"


def call_python_metric(atom: MetricTerm, logits: Tensor, prompts: Ints, usable: Bools) -> Tensor:
    """Call a function on the usable rows; others are NaN.

    Args:
        logits: [row, vocab].
        prompts: [row] index into the table.
        usable: [row].

    Returns:
        [row].

    Raises:
        PythonFailure: E0223, with the row that it fails on if there is one.
    """
    found = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return found
    index = torch.from_numpy(rows)
    if len(rows) < len(prompts):
        logits, prompts = logits[to_device(index, logits.device)], prompts[rows]
    try:
        found[index] = _call_function(atom, logits, prompts)
    except PythonNotLoaded:
        raise
    except PythonFailure as failure:
        if failure.row is None and failure.__cause__ is not None:  # the function raised
            failure.row = _find_failing_row(
                lambda part: _call_function(atom, logits[part], prompts[part]),
                len(prompts),
                failure.diagnostic.reason,
            )
        if failure.row is not None:
            failure.row = int(rows[failure.row])
        raise
    return found


def call_reply_metric(atom: MetricTerm, replies: Sequence[str], prompts: Ints) -> Floats:
    """Call a function on texts [row], as `call_python_metric` on logits."""
    if not len(prompts):
        return np.zeros(0)
    try:
        return _read_numbers(atom, list(replies), prompts, REPLY_ARGUMENT).numpy()
    except PythonNotLoaded:
        raise
    except PythonFailure as failure:
        if failure.row is None and failure.__cause__ is not None:  # the function raised
            failure.row = _find_failing_row(
                lambda part: _read_numbers(
                    atom, list(replies[part]), prompts[part], REPLY_ARGUMENT
                ),
                len(prompts),
                failure.diagnostic.reason,
            )
        raise


def _call_function(atom: MetricTerm, logits: Tensor, prompts: Ints) -> Tensor:
    """Return [row] on the CPU: the function's values for logits."""
    # A copy, so that a function that modifies it doesn't affect other readers.
    own = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    return _read_numbers(atom, own, prompts, RETURN_HINT)


def _read_numbers(atom: MetricTerm, own: Tensor | list[str], prompts: Ints, hint: str) -> Tensor:
    """Return [row] on the CPU: the function's values, after a check of their shape and type."""
    function = atom.python
    assert function is not None
    rows = [dict(atom.rows[prompt]) for prompt in prompts]
    library = None if atom.tokenizer is None else atom.tokenizer.library
    third = (library,) if function.tokenizer == "third" else ()
    named = {TOKENIZER_PARAMETER: library} if function.tokenizer == "named" else {}
    with torch.no_grad():
        given = function.call(own, rows, *third, **named)
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise function.failure(f"it returned {_describe_type(given)}, not numbers", hint) from None
    if found.shape != (len(prompts),):
        shape = list(found.shape)
        raise function.failure(f"it returned the shape {shape}, not [{len(prompts)}]", hint)
    if found.is_complex():
        raise function.failure("it returned complex numbers", hint)
    found = found.detach().double().cpu()
    if found.isnan().any():
        first = int(found.isnan().nonzero()[0])
        row = atom.rows[prompts[first]]
        told = ", ".join(f"{name} = {value!r}" for name, value in row.items() if "." not in name)
        raise function.failure(
            f"it returned NaN, in the row with {_shorten(told)}", hint, row=first
        )
    return found


def _find_failing_row(call: Callable[[slice], object], count: int, reason: str) -> int | None:
    """Bisect for a single row that raises the same error; None if there is none."""

    def raises(low: int, high: int) -> bool:
        try:
            call(slice(low, high))
        except PythonFailure as failure:
            return failure.diagnostic.reason == reason
        return False

    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if raises(low, middle):
            high = middle
        elif raises(middle, high):
            low = middle
        else:
            return None
    return low


def _describe_type(value: object) -> str:
    return "nothing" if value is None else f"a `{type(value).__name__}`"


def _shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


class ReplySearchFailed(Exception):
    """A search takes too long; caught where the rows are known."""

    def __init__(self, diagnostic: UnreadableMeasure, row: int) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic
        self.row = row


def compute_reply_values(
    atom: MetricTerm, replies: Sequence[Reply], prompts: Ints, items: Sequence[ItemNumber]
) -> Floats:
    """Compute the metric of each reply; NaN if it has none, like a reply without a number.

    Args:
        replies: [row].
        prompts: [row] index into the table.
        items: [row] the occurrence that `{item.index}` refers to.

    Returns:
        [row].

    Raises:
        PythonFailure: E0223, with the row that it fails on if there is one.
        ReplySearchFailed: E0612 for a search that exceeds the time limit.
    """
    if atom.python is not None:
        return call_reply_metric(atom, [reply.text for reply in replies], prompts)
    wanted = [
        atom.wanted[item if item in atom.wanted else None][prompt]
        for prompt, item in zip(prompts.tolist(), items, strict=True)
    ]
    try:
        return np.array(atom.form.function(replies, wanted), dtype=np.float64)
    except PatternTimeout as error:
        raise ReplySearchFailed(_search_timeout(atom, replies[error.row]), error.row) from error


def _search_timeout(atom: MetricTerm, reply: Reply) -> UnreadableMeasure:
    span = atom.node.span
    return UnreadableMeasure(
        span=span,
        text=span.written,
        reason=f"in a reply of {len(reply.text):,} letters the search takes more than "
        f"{limits.SEARCH_SECONDS:g} s",
        hint="nested repetitions match the same letters in too many ways: write `a+` for "
        "`(a+)+`, or `(…)++`, which doesn't backtrack",
    )
