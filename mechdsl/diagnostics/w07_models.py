"""W0710 to W0712: warnings about models."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.record import keyword_record


@keyword_record
class ModelNotHere(Diagnostic):
    """An `hf` model that the local cache doesn't have."""

    code = "W0710"
    title = "`{model}` is not on this machine, so it was not checked"
    label = "`{path}` is not in the Hugging Face cache"
    help = "`hf download {path}` fetches it; layers, heads and answers are checked then"

    model: str
    path: str


@keyword_record
class NotResumable(Diagnostic):
    """Runs of the model can't be resumed in the middle."""

    code = "W0711"
    title = "`{model}` can't be resumed at a layer; every run is a whole forward pass"
    label = "resumed at {layer}, its logits differ by {error:.1g}"
    help = "nothing to change: results are the same, they take longer"

    model: str
    layer: str
    error: float


@keyword_record
class NotContinuable(Diagnostic):
    """Runs of the model can't go on from kept keys and values."""

    code = "W0712"
    title = "`{model}` can't continue on kept keys and values; every run computes all positions"
    label = "{reason}"
    help = "nothing to change: results are the same, they take longer"

    model: str
    reason: str
