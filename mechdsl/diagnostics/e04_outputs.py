"""E04xx: what a model's outputs are, and what measures ask of them."""

from __future__ import annotations

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class UnknownLabel(Diagnostic):
    """`class "postive"`, or an answer that is no label of the model."""

    code = "E0442"
    hangs_on = frozenset({"shape", "rows"})
    title = "`{model}` has no {what}"
    label = "{where}"
    help = "{hint}"

    what: str
    where: str
    model: str
    hint: str


@keyword_record
class ClassOfTokens(Diagnostic):
    """`class answer` on a language model."""

    code = "E0443"
    hangs_on = frozenset({"shape"})
    title = "`{text}` asks for a class, and the outputs of `{model}` are tokens"
    label = "a `{architecture}` has no labels"
    help = "{hint}"

    text: str
    model: str
    architecture: str
    hint: str


@keyword_record
class TokenOfLabels(Diagnostic):
    """`logit(answer)` on a classifier."""

    code = "E0444"
    hangs_on = frozenset({"shape"})
    title = "`{text}` asks for a token, and the outputs of `{model}` are labels"
    label = "{labels}"
    help = "{hint}"

    text: str
    model: str
    labels: str
    hint: str


@keyword_record
class OtherTask(Diagnostic):
    """A metric that has no meaning for what the model was made for."""

    code = "E0445"
    hangs_on = frozenset({"shape"})
    title = "`{text}` has no meaning on `{model}`"
    label = "{reason}"
    help = "{hint}"

    text: str
    model: str
    reason: str
    hint: str


@keyword_record
class OutputElsewhere(Diagnostic):
    """`at …` behind a measure of a model that has one output for a whole prompt."""

    code = "E0446"
    hangs_on = frozenset({"shape"})
    title = "`{model}` has one output for a whole {unit}, and none at `{at}`"
    label = "it is made of {made_of}"
    help = "leave `at {at}` out"

    model: str
    at: str
    made_of: str
    unit: str = "prompt"
    """What a row is: a prompt or an image."""
