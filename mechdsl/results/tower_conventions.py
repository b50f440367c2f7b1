"""What is measured of a model with a tower for images and one for texts, in words."""

from __future__ import annotations

from mechdsl.base.names import quoted
from mechdsl.base.plural import plural
from mechdsl.resolve.resolved import ResolvedExperiment

_SHOWN = 4


def tower_conventions(experiment: ResolvedExperiment) -> dict[str, str]:
    """What an image is scored with, and what it chooses from."""
    shape = experiment.model.shape
    scale = "cosine times the model's scale"
    if shape.task == "many labels":
        scale += ", plus its bias"
    what, other = ("texts", "text") if shape.side == "vision" else ("images", "image")
    found = {
        "score": f"the model's own logit of an image and a text: {scale}",
        what: f"{len(shape.labels)}, each encoded once by the {other} tower, where no rule acts",
    }
    opposite = experiment.model.opposite
    if opposite is not None and opposite.block:
        found[what] = f"`{opposite.block}`: {found[what]}"
    if shape.classes:
        first = ", ".join(quoted(text) for text in shape.labels[: min(_SHOWN, shape.classes)])
        more = shape.classes - _SHOWN
        said = f"{plural(shape.classes, other)}: {first}" + (f" and {more} more" * (more > 0))
        said += "; `correct` is that the best of them is this one, `rank` its place among them"
        if shape.task == "one label":
            said += ", `prob` their softmax"
        found["classes"] = said
    if shape.task == "many labels":
        found["prob"] = "a sigmoid, as the model was trained: each text holds or not by itself"
    return found
