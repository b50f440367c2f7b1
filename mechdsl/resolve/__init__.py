"""From the typed program to experiments in which everything is concrete, without weights."""

from mechdsl.resolve.experiment import resolve_experiment
from mechdsl.resolve.types import ModelContext, ResolvedExperiment

__all__ = ["ModelContext", "ResolvedExperiment", "resolve_experiment"]
