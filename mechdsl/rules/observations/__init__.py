"""Kinds of observations, one file per family: what `observe` lines look at."""

from mechdsl.rules.observations import (
    attention_weight,
    direct_logit,
    lenses,
    maps,
    over_rows,
    patterns,
    probes,
    received,
    similarities,
    successor,
    tuned_lens,
    value_vectors,
    vectors,
    weights,
)
from mechdsl.rules.observations.registry import OBSERVATIONS, SiteObservation, observation

__all__ = [
    "OBSERVATIONS",
    "SiteObservation",
    "attention_weight",
    "direct_logit",
    "lenses",
    "maps",
    "observation",
    "over_rows",
    "patterns",
    "probes",
    "received",
    "similarities",
    "successor",
    "tuned_lens",
    "value_vectors",
    "vectors",
    "weights",
]
