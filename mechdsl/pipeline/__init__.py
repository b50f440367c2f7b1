"""Runs of a file from text to results, and the Python API.

In: the text of a file and options, or a file and models passed from Python. Out: a `FileResult`,
`Results`, text or diagnostics. Imports show and below; it calls each stage in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechdsl.diagnostics.core import Diagnostic
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.program import spec
    from mechdsl.program.python_functions import PythonFunction


def build_lazily(
    model: spec.Model, function: PythonFunction
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Call `mechdsl.loading.loader.build_model`, and import torch only then."""
    from mechdsl.loading.loader import build_model

    return build_model(model, function)
