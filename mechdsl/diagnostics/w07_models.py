"""Warnings about models."""

from __future__ import annotations

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class ModelNotHere(Diagnostic):
    """A model that the local cache, or the folder of the file, doesn't have, or that a function
    would make."""

    code = "W0710"
    title = "`{model}` is {absence}, so what hangs on it was not checked"
    label = "`{path}` is {where}{place}"
    help = "{advice}{waiting}"

    model: str
    path: str
    advice: str
    place: str = ""
    """Where it was looked for."""
    absence: str = "not on this machine"
    where: str = "not in "
    waiting: str = ""
    """What is checked once it is there, with the lines."""


@keyword_record
class NotRestartable(Diagnostic):
    """Rows of the model can't take anything over from the unpatched run."""

    code = "W0711"
    title = "`{model}` can't be restarted in the middle; every row is a whole forward pass"
    label = "{reason}"
    help = "nothing to change: results are the same, they take longer"

    model: str
    reason: str


@keyword_record
class StackLeftOut(Diagnostic):
    """A stack beside the main one whose sites can't be had."""

    code = "W0712"
    title = "`{model}` is taken without the sites of its stack `{stack}`"
    label = "{reason}"
    help = "the other sites are as they are on any model"

    model: str
    stack: str
    reason: str


@keyword_record
class NoEffect(Diagnostic):
    """Parts of a model that play no part in its output, as far as a copy tells that has other
    weights."""

    code = "W0770"
    title = "parts of `{model}` have no effect"
    label = "whatever is written there, its output stays as it is: {parts}"
    help = "nothing to change where they are meant to be empty: effects of patching them are 0"

    model: str
    parts: str


@keyword_record
class WeightsUnused(Diagnostic):
    """Weights in the folder that play no part in the model."""

    code = "W0761"
    title = "some of the weights of `{model}` are not used"
    label = "{what}"
    help = "nothing to change where they belong to another part or format; else correct the folder"

    model: str
    what: str


@keyword_record
class OtherBase(Diagnostic):
    """An adapter that was trained on another model than the one it is put on."""

    code = "W0773"
    title = "the adapter `{model}` was trained on `{trained}`, and `{base}` is {given}"
    label = "`base_model_name_or_path` of its `adapter_config.json`"
    help = "nothing to change where both are the same model; else name its own with `base:`"

    model: str
    trained: str
    base: str
    given: str
