"""Models that only Python can make."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_python import PythonNotAllowed
from mechdsl.diagnostics.w07_models import ModelNotHere
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFunction


def not_called(model: spec.Model, function: PythonFunction, *, required: bool) -> Diagnostic:
    """W0710 for a model that only Python can make, which isn't run here; E0221 where it has to be
    there."""
    if required:
        return PythonNotAllowed(
            span=function.span,
            function=function.name,
            file=function.file,
            hint=function.allowing,
        )
    return ModelNotHere(
        span=model.span,
        model=model.name,
        path=model.path,
        absence="made by Python, which isn't run here",
        where="what makes it",
        advice="`mechdsl plan --allow-python` makes it",
    )
