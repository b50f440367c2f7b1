"""Kinds of observations, one file per family: what `observe` lines look at."""

from mechdsl.rules.observations import attention_weight, vectors
from mechdsl.rules.observations.registry import OBSERVATIONS, SiteObservation, observation

__all__ = ["OBSERVATIONS", "SiteObservation", "attention_weight", "observation", "vectors"]
