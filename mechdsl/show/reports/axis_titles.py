"""Titles of axes and scales in charts: words with units, not names of columns."""

from __future__ import annotations

from textwrap import shorten

from mechdsl.base.text import escape_hidden
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import DEPTH_PATTERN, axis_name
from mechdsl.statistics.measurements import MeasureData
from mechdsl.vocab.effects import EFFECTS

AXIS_TITLES = {
    "layer": "Layer",
    "to_layer": "Layer of the receiver",
    "head": "Head",
    "to_head": "Head of the receiver",
    "neuron": "Neuron",
    "to_neuron": "Neuron of the receiver",
    "expert": "Expert",
    "feature": "Feature",
    "position": "Token position",
    "model": "Model",
    "prompts": "Prompts",
}
"""Titles of the language's own axes. The name of a loop variable is the user's, so it stays."""

QUANTITIES = {
    "prob": "probability",
    "logprob": "log-probability",
    "logit": "logit",
    "score": "class logit",
    "rank": "rank",
    "correct": "share of correct answers",
    "exact_match": "share of exact matches",
    "expected": "expected number",
    "argmax": "most likely number",
    "kl": "KL divergence",
    "js": "Jensen-Shannon divergence",
    "entropy": "entropy",
    "loss": "loss",
    "top_margin": "logit margin of the first token",
    "attention": "attention weight",
    "received": "attention received",
    "rollout": "attention rollout",
    "value_norm": "norm of the attended value",
    "direct_logit": "direct logit contribution",
    "norm": "norm",
    "cosine": "cosine similarity",
    "length": "length",
    "probe": "probe score",
    "shuffled": "probe score of shuffled values",
}
"""Metrics and observations in words; others have the name from the file."""

UNIT_QUANTITIES = {"logit": "logit", "probability": "probability"}
"""Quantities of expressions by their unit; a subtraction is a difference."""

UNIT_NAMES = {
    "logit": "logits",
    "nat": "nats",
    "token": "tokens",
    "activation": "activation units",
    "R²": "R²",
    "CKA": "CKA",
    "dimensions": "dimensions",
    "share": "share",
}
"""Units in titles. The others repeat the quantity, or are plain numbers."""

MAX_QUANTITY_LENGTH = 40
"""Maximum length of a name from the file in a title."""


def chart_axis_title(result: ExperimentResult, word: str) -> str:
    """Return the title of an axis in a chart, such as `Layer` or `Layer (centre of the window)`."""
    axis = axis_name(result, word)
    title = AXIS_TITLES.get(axis, escape_hidden(word))
    if axis in result.centres:
        return f"{title} (centre of the window)"
    values = {cell.coords[axis] for cell in result.cells if axis in cell.coords}
    return f"{title} (relative depth)" if values and all(map(_is_depth, values)) else title


def _is_depth(value: Coord) -> bool:
    return isinstance(value, str) and DEPTH_PATTERN.fullmatch(value) is not None


def quantity_name(data: MeasureData) -> str:
    """Return what a measure's metric measures, in words: `logit difference`, `probability`. A
    metric without such words has its name from the file."""
    for word in (data.word, data.label):
        if word in QUANTITIES:
            return QUANTITIES[word]
    if data.unit in UNIT_QUANTITIES and " - " in data.metric:
        return f"{UNIT_QUANTITIES[data.unit]} difference"
    return shorten(escape_hidden(data.label), MAX_QUANTITY_LENGTH, placeholder=" …")


def value_title(data: MeasureData) -> str:
    """Return the title of an effect's axis or colour scale: what is shown, and its unit."""
    quantity, unit = quantity_name(data), UNIT_NAMES.get(data.unit, "")
    if data.called not in (data.effect, f"estimated {data.effect}"):  # not in the metric's unit
        return capitalise(f"{data.called} of {quantity}")
    title = {
        "raw": quantity,
        "delta": f"change in {quantity}",
        "total": f"difference in {quantity} between the runs",
        "recovery": "share of the effect recovered",
        "relative": f"change in {quantity}",
    }.get(data.effect, f"{data.effect} of {quantity}")
    if EFFECTS[data.effect].scale_free:
        unit = {"recovery": "1 = all", "relative": "fraction of the base run"}.get(data.effect, "")
    if data.estimator:
        title = f"estimated {title}"
    shown = title if title == data.label else capitalise(title)  # a name from the file stays
    return shown if not unit or unit in title else f"{shown} ({unit})"


def capitalise(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]
