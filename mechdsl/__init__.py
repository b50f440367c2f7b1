"""mechdsl: the language in which interpretability experiments are written.

`run` runs a file, `check` finds what is wrong with it; `plan_of`, `graph_of` and `explain` show
what would be run, `runs` what was. docs/python.md has every name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Against",
    "Diagnostic",
    "Diagnostics",
    "Differences",
    "ExperimentResult",
    "MechdslError",
    "MechdslWarning",
    "Results",
    "Run",
    "Runs",
    "check",
    "diff",
    "explain",
    "graph_of",
    "plan_of",
    "run",
    "runs",
]

if TYPE_CHECKING:
    from mechdsl.api import check, diff, explain, graph_of, plan_of, run, runs
    from mechdsl.diagnostics.core import Diagnostic
    from mechdsl.diagnostics.raised import Diagnostics, MechdslError, MechdslWarning
    from mechdsl.results.against import Against
    from mechdsl.results.experiment_result import ExperimentResult
    from mechdsl.results.found_differences import Differences
    from mechdsl.results.kept_runs import Run, Runs
    from mechdsl.results.results import Results

_PLACES = {
    "Against": "mechdsl.results.against",
    "Diagnostic": "mechdsl.diagnostics.core",
    "Diagnostics": "mechdsl.diagnostics.raised",
    "Differences": "mechdsl.results.found_differences",
    "ExperimentResult": "mechdsl.results.experiment_result",
    "MechdslError": "mechdsl.diagnostics.raised",
    "MechdslWarning": "mechdsl.diagnostics.raised",
    "Results": "mechdsl.results.results",
    "Run": "mechdsl.results.kept_runs",
    "Runs": "mechdsl.results.kept_runs",
}
"""What isn't defined in `mechdsl.api`."""


def __getattr__(name: str) -> Any:
    # Lazy, because `mechdsl validate` must start without torch.
    if name in __all__:
        return getattr(import_module(_PLACES.get(name, "mechdsl.api")), name)
    raise AttributeError(f"module `mechdsl` has no attribute `{name}`")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
