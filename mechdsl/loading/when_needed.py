"""Models that a function makes, built without torch being imported before one is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechdsl.diagnostics.core import Diagnostic
    from mechdsl.hooks.loaded import LoadedModel
    from mechdsl.program import spec
    from mechdsl.program.python_files import PythonFunction


def build_when_needed(
    model: spec.Model, function: PythonFunction
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """`mechdsl.loading.build.build`, which imports torch only where a file has such a model."""
    from mechdsl.loading.build import build

    return build(model, function)
