"""E045x: adapters, which change the weights of another model."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class AdapterCircle(Diagnostic):
    """Adapters whose bases lead back to themselves."""

    code = "E0450"
    title = "`{model}` is an adapter for itself: {circle}"
    label = "leads back to `{model}`"
    help = "name the model that was trained first, in a line without `base:`"

    model: str
    circle: str


@keyword_record
class OtherAdapter(Diagnostic):
    """An adapter that isn't LoRA, or is none of weights."""

    code = "E0451"
    title = "`{model}` is an adapter of the kind {kind}, which {what}"
    label = "{reason}"
    help = "{hint}"

    model: str
    kind: str
    what: str
    reason: str
    hint: str


@keyword_record
class AdapterConfig(Diagnostic):
    """An entry of `adapter_config.json` that isn't followed."""

    code = "E0452"
    title = "the `adapter_config.json` of `{model}` has `{key}`: {value}"
    label = "{reason}"
    help = "{hint}"

    model: str
    key: str
    value: str
    reason: str
    hint: str


@keyword_record
class AdapterDoesNotFit(Diagnostic):
    """Weights of an adapter that its base has no place for."""

    code = "E0453"
    title = "the adapter `{model}` doesn't fit `{base}`"
    label = "{reason}"
    help = "{hint}"

    model: str
    base: str
    reason: str
    hint: str


@keyword_record
class NoPeft(Diagnostic):
    """An adapter where the library that reads it isn't installed."""

    code = "E0454"
    title = "the adapter `{model}` needs peft, which isn't installed"
    label = "its weights are merged into those of `{base}` by peft"
    help = "`pip install 'mechdsl[adapters]'` installs it"

    model: str
    base: str
