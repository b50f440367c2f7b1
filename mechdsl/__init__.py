"""mechdsl: the language in which interpretability experiments are written.

`run` runs a file, `fit` trains what it declares, `validate` finds what is wrong with it; `plan`,
`graph` and `explain` show what would be run, `runs` what was; `export` writes an edited model, and
`objective` is a measure as a differentiable function.
docs/python.md has every name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechdsl.base.version import __version__ as __version__

__all__ = [
    "Diagnostic",
    "Diagnostics",
    "Differences",
    "ExperimentResult",
    "ExportedModel",
    "MechdslError",
    "MechdslWarning",
    "Objective",
    "Results",
    "Run",
    "Runs",
    "TrainedFit",
    "VerdictComparison",
    "diff",
    "explain",
    "export",
    "fit",
    "graph",
    "objective",
    "plan",
    "run",
    "runs",
    "validate",
]

if TYPE_CHECKING:
    from mechdsl.diagnostics.core import Diagnostic
    from mechdsl.diagnostics.rendering import Diagnostics, MechdslError, MechdslWarning
    from mechdsl.execute.run_record import TrainedFit
    from mechdsl.pipeline.api import (
        diff,
        explain,
        export,
        fit,
        graph,
        objective,
        plan,
        run,
        runs,
        validate,
    )
    from mechdsl.pipeline.loaded_models import ExportedModel
    from mechdsl.pipeline.objectives import Objective
    from mechdsl.results.differences.comparison import Differences
    from mechdsl.results.experiment_result import ExperimentResult, VerdictComparison
    from mechdsl.results.results import Results
    from mechdsl.results.runs import Run, Runs

_HOMES = {
    "Diagnostic": "mechdsl.diagnostics.core",
    "Diagnostics": "mechdsl.diagnostics.rendering",
    "Differences": "mechdsl.results.differences.comparison",
    "ExperimentResult": "mechdsl.results.experiment_result",
    "ExportedModel": "mechdsl.pipeline.loaded_models",
    "MechdslError": "mechdsl.diagnostics.rendering",
    "MechdslWarning": "mechdsl.diagnostics.rendering",
    "Objective": "mechdsl.pipeline.objectives",
    "Results": "mechdsl.results.results",
    "Run": "mechdsl.results.runs",
    "Runs": "mechdsl.results.runs",
    "TrainedFit": "mechdsl.execute.run_record",
    "VerdictComparison": "mechdsl.results.experiment_result",
}
"""Names that aren't defined in `mechdsl.pipeline.api`."""


def __getattr__(name: str) -> Any:
    # Lazy, because `mechdsl validate` must start without torch.
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "mechdsl.pipeline.api")), name)
    raise AttributeError(f"module `mechdsl` has no attribute `{name}`")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
