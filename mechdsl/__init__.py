"""mechdsl: the language in which interpretability experiments are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MechdslError", "Results", "check", "run"]

if TYPE_CHECKING:
    from mechdsl.api import MechdslError, check, run
    from mechdsl.results.results import Results


def __getattr__(name: str) -> Any:
    # Lazy, because `mechdsl validate` must start without torch.
    if name == "Results":
        from mechdsl.results.results import Results

        return Results
    if name in __all__:
        from mechdsl import api

        return getattr(api, name)
    raise AttributeError(f"module `mechdsl` has no attribute `{name}`")
