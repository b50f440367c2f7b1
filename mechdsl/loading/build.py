"""`model toy = python("toy.py:build")`: models that functions of the user's Python files give."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any, cast

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.hooks.loaded import PYTHON, LoadedModel
from mechdsl.loading.load import adopt
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFailure, PythonFunction

_HINT = "it takes nothing, and gives a model of transformers and its tokenizer: `return model, tok`"


def build(
    model: spec.Model, function: PythonFunction
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Call the function, and take over what it gives as models from Python are: as it is, and
    where it is.

    E0223 where it fails or gives something else; the codes of `adopt`.
    """
    try:
        with redirect_stdout(sys.stderr):  # standard output may be a document
            given = function.call()
    except PythonFailure as failure:
        return None, [failure.diagnostic]
    pair = cast("tuple[Any, ...]", given) if isinstance(given, tuple) else ()
    if len(pair) != 2:
        kind = "nothing" if given is None else f"a `{type(given).__name__}`"
        reason = f"it gave {kind}, not a model and its tokenizer"
        return None, [function.failure(reason, _HINT).diagnostic]
    module, tokenizer = pair
    return adopt(
        model.name,
        module,
        tokenizer,
        span=model.span,
        provenance={"source": model.source, f"{PYTHON}{function.file}": function.digest},
    )
