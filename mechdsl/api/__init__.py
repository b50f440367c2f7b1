"""The Python API: what the commands of the same names do, with results to go on with.

In: what Python hands over: a file, models. Out: `Results`, a text or `Diagnostics`, or
`MechdslError`. Imports pipeline and below.
"""

from mechdsl.api.run_function import run
from mechdsl.api.stored_runs import diff, runs
from mechdsl.api.views import check, explain, graph_of, plan_of
from mechdsl.diagnostics.raised import MechdslError, MechdslWarning

__all__ = [
    "MechdslError",
    "MechdslWarning",
    "check",
    "diff",
    "explain",
    "graph_of",
    "plan_of",
    "run",
    "runs",
]
