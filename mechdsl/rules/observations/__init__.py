"""Kinds of observations: the quantities that `observe` lines compute."""

from mechdsl.rules.observations import (
    attention,
    features,
    graph_probes,
    graphs,
    lenses,
    map_scores,
    maps,
    probes,
    rows,
    vectors,
    weights,
)
from mechdsl.rules.observations.registry import OBSERVATIONS, SiteObservation, observation

__all__ = [
    "OBSERVATIONS",
    "SiteObservation",
    "attention",
    "features",
    "graph_probes",
    "graphs",
    "lenses",
    "map_scores",
    "maps",
    "observation",
    "probes",
    "rows",
    "vectors",
    "weights",
]
