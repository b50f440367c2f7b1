"""E04xx, W071x: models, adapters, outputs, and patches between two models."""

from __future__ import annotations

import re

from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class ModelNotFound(Diagnostic):
    """A `local` folder that doesn't exist, or an `hf` model that is needed and not cached."""

    code = "E0401"
    title = "there is no model at `{path}`"
    label = "`{model}` is looked for in {place}"
    help = "{advice}"

    model: str
    path: str
    place: str
    advice: str


@keyword_record
class NoResidMid(Diagnostic):
    """`resid_mid` where attention and MLP read the same stream."""

    code = "E0402"
    hangs_on = frozenset({"shape"})
    title = "`{model}` has no `resid_mid`"
    label = "attention and MLP run side by side in each of its blocks"
    help = "write `resid_pre`, which both read, or `attn_out`, what attention adds"

    model: str


@keyword_record
class UnknownZooModel(Diagnostic):
    """`zoo("…")` with a name that the zoo doesn't have."""

    code = "E0403"
    title = "the zoo has no model `{path}`"
    label = "unknown zoo model"
    help = "{advice}"

    path: str
    advice: str


@keyword_record
class NoConfig(Diagnostic):
    """A model folder without a readable `config.json`, or an adapter's without its own."""

    code = "E0404"
    title = "`{model}` has no readable `{file}`"
    label = "{reason}"
    help = "{hint}"

    model: str
    reason: str
    file: str = "config.json"
    hint: str = "point at a folder that `save_pretrained` wrote"


@keyword_record
class PickledWeights(Diagnostic):
    """Weights only in a format that runs code when it is read."""

    code = "E0405"
    title = "the weights of `{model}` are pickled; only safetensors are read"
    label = "`{file}` can run any code when it is opened"
    help = "save them again with `model.save_pretrained(folder)`, which writes safetensors"

    model: str
    file: str


@keyword_record
class NoWeights(Diagnostic):
    """A model folder without weights."""

    code = "E0406"
    title = "`{model}` has no weights"
    label = "no {what} beside its `{config}`"
    help = "{advice}"

    model: str
    advice: str
    what: str = "`.safetensors` file"
    config: str = "config.json"


@keyword_record
class NotATextModel(Diagnostic):
    """A model that can't be called with a prompt alone, or an image alone."""

    code = "E0407"
    title = "`{model}` is a `{architecture}`, which reads neither prompts nor images alone"
    label = "files run language models (causal, masked or vision-language) and vision transformers"
    help = (
        "run encoder-decoders and other encoders from Python, with "
        "`mechdsl.forward.hooks.full_pass.run_full`"
    )

    model: str
    architecture: str


@keyword_record
class SiteNotInBlock(Diagnostic):
    """A site that the model has in other blocks than the one that is asked for."""

    code = "E0414"
    hangs_on = frozenset({"shape"})
    title = "`{model}` has no `{site}` in layer {layer}"
    label = "{reason}"
    help = "it has one in {layers}"

    model: str
    site: str
    layer: int
    reason: str
    layers: str


@keyword_record
class ShapeUnknown(Diagnostic):
    """A `config.json` that doesn't say how large the model is."""

    code = "E0408"
    title = "the `config.json` of `{model}` gives no {what}"
    label = "looked for {keys}"
    help = "add the key, or use a transformers model"

    model: str
    what: str
    keys: str

    @property
    def named(self) -> list[str]:
        """The keys alone."""
        return re.findall(r"\w+", self.keys)


@keyword_record
class ModelTooLarge(Diagnostic):
    """A number of `config.json` that no model has."""

    code = "E0430"
    title = "the `config.json` of `{model}` says {number:,} for `{key}`, beyond {most:,}"
    label = "no model is as large"
    help = "correct the number; the limits are listed in docs/language.md"

    model: str
    key: str
    number: int
    most: int


@keyword_record
class WeightsElsewhere(Diagnostic):
    """A file of weights that lies outside of the model's folder, by what another file says."""

    code = "E0431"
    title = "the weights of `{model}` are not all in its folder"
    label = "its `{file}` names `{name}`"
    help = "put the file into the folder, and write its name alone"

    model: str
    file: str
    name: str


@keyword_record
class ModelFileTooLarge(Diagnostic):
    """A JSON file of a model that is larger than any."""

    code = "E0432"
    title = "`{file}` of `{model}` has {size:,} bytes, beyond {most:,}"
    label = "no model's is as large"
    help = "save the model again with `save_pretrained`; the limits are listed in docs/language.md"

    model: str
    file: str
    size: int
    most: int


@keyword_record
class ModelRunsCode(Diagnostic):
    """A config that takes a kernel from a repository, which is a program."""

    code = "E0433"
    title = "the `config.json` of `{model}` asks for `{value}`, which is not run"
    label = "its `{key}` names a repository with code"
    help = (
        "take `{key}` out of `config.json`; it changes how attention is computed, not what it gives"
    )

    model: str
    key: str
    value: str


@keyword_record
class BadSize(Diagnostic):
    """A `config.json` with a size that no model can have."""

    code = "E0420"
    title = "the `config.json` of `{model}` has `{key}`: {value}"
    label = "a size is a whole number above 0"
    help = "correct the key, or save the model again with `save_pretrained`"

    model: str
    key: str
    value: str


@keyword_record
class VocabularyTooSmall(Diagnostic):
    """A tokenizer with ids that the model's embedding doesn't have."""

    code = "E0421"
    hangs_on = frozenset({"shape", "tokens"})
    title = "`{model}` has {size:,} tokens, and its tokenizer {more}"
    label = "the tokenizer is another model's, or `vocab_size` is wrong"
    help = "put the tokenizer beside it that the model was trained with, or correct `config.json`"

    model: str
    size: int
    more: str


@keyword_record
class NoTokenFor(Diagnostic):
    """Words of prompts that a tokenizer without a token for unknown ones can't read."""

    code = "E0436"
    hangs_on = frozenset({"tokens"})
    title = "the tokenizer has no token for {words}, and none for unknown words"
    label = "in {rows} of {total} rows of `{run}`"
    help = "use words that the model's vocabulary holds, or give its tokenizer an unknown token"

    words: str
    rows: int
    total: int
    run: str


@keyword_record
class NoLogits(Diagnostic):
    """A measure that reads logits of a model without a head."""

    code = "E0437"
    hangs_on = frozenset({"shape"})
    title = "`{text}` reads logits, and `{model}` gives none"
    label = "a `{architecture}` has no head: it ends with the vectors of its last block"
    help = (
        "measure its vectors, as in `cosine(resid_post layer 1, clean)`, or load the model with a "
        "head, such as a class that ends in `ForCausalLM` or `ForMaskedLM`"
    )

    text: str
    model: str
    architecture: str


@keyword_record
class NoSuchOutput(Diagnostic):
    """A measure that asks for the logit of a token that the model has none for."""

    code = "E0438"
    hangs_on = frozenset({"shape", "tokens"})
    title = "`{text}` asks for the logit of token {token}, and `{model}` gives {outputs}"
    label = "a `{architecture}` has fewer outputs than tokens"
    help = "name one of its outputs by its number, as in `class 0`"

    text: str
    token: int
    model: str
    outputs: int
    architecture: str


@keyword_record
class SingleOutput(Diagnostic):
    """A model with one output for a whole prompt that isn't a classifier's, made of one token."""

    code = "E0439"
    title = "`{model}` is a `{architecture}`, whose one output for a whole prompt can't be measured"
    label = "{reason}"
    help = (
        "load its weights as a classifier that reads one token (`…ForSequenceClassification`), a "
        "model with an output for each token, or without a head, and measure its vectors"
    )

    model: str
    architecture: str
    reason: str


@keyword_record
class AdapterFolder(Diagnostic):
    """A folder with an adapter (LoRA), and not with a model alone."""

    code = "E0440"
    title = "`{path}` is an adapter for {base}, {beside}"
    label = "it has an `adapter_config.json`, {files}"
    help = "{hint}"

    path: str
    base: str
    beside: str = "and no model"
    files: str = "and no `config.json`"
    hint: str


@keyword_record
class QuantizedModel(Diagnostic):
    """A model whose weights are whole numbers with scales beside them."""

    code = "E0441"
    title = "`{model}` is quantized, which isn't supported yet"
    label = "`{part}` is a `{kind}`"
    help = "hand over the model as it was before it was quantized"

    model: str
    part: str
    kind: str


@keyword_record
class LayerCountMismatch(Diagnostic):
    """Weights of more blocks than the config has."""

    code = "E0422"
    title = "the `config.json` of `{model}` has {blocks} layers, its weights {more}"
    label = "the weights have `{key}`, which no parameter takes"
    help = (
        "correct the number of layers in `config.json`, or put the weights there that belong to it"
    )

    model: str
    blocks: int
    more: int
    key: str


@keyword_record
class ComponentNotFound(Diagnostic):
    """The finder can't tell which module plays a part."""

    code = "E0409"
    title = "`{model}` ({architecture}): {part} not found"
    label = "{reason}"
    help = "{hint}"

    model: str
    architecture: str
    part: str
    reason: str
    hint: str = "register the family with `@family` and name the module there"


@keyword_record
class IdentityBroken(Diagnostic):
    """The parts of the model don't add up as its anatomy says."""

    code = "E0410"
    title = "`{model}` ({architecture}) fails the check `{identity}`"
    label = "{reason}"
    help = "{hint}"

    model: str
    architecture: str
    identity: str
    reason: str
    hint: str = (
        "its modules are not what the finder took them for; register the family with `@family`"
    )


@keyword_record
class LoadFailed(Diagnostic):
    """transformers or safetensors refused the folder."""

    code = "E0411"
    title = "`{model}` can't be loaded"
    label = "{reason}"
    help = "{hint}"

    model: str
    reason: str
    hint: str = "it has to load with `AutoModelForCausalLM.from_pretrained`"


@keyword_record
class NoTokenizer(Diagnostic):
    """A model without a fast tokenizer."""

    code = "E0412"
    title = "`{model}` has no tokenizer that gives character offsets"
    label = "{reason}"
    help = "{hint}"

    model: str
    reason: str
    hint: str = "positions are found by offsets: save a fast tokenizer (`tokenizer.json`) beside it"


@keyword_record
class SiteNotOnModel(Diagnostic):
    """A site of the language that this model doesn't have."""

    code = "E0413"
    hangs_on = frozenset({"shape"})
    title = "`{model}` has no `{site}`"
    label = "{reason}"
    help = "{hint}"

    model: str
    site: str
    reason: str
    hint: str


@keyword_record
class InputKindMismatch(Diagnostic):
    """Images for a model of texts, or prompts for one of images."""

    code = "E0455"
    title = "`{model}` is a `{architecture}`, which reads {reads}, and `{block}` is {given}"
    label = "an experiment gives it `{block}`"
    help = "{hint}"

    model: str
    architecture: str
    reads: str
    block: str
    given: str
    hint: str


@keyword_record
class NoImageProcessor(Diagnostic):
    """A vision model without a description of how images are made ready for it."""

    code = "E0456"
    title = "`{model}` doesn't say how images are made ready for it"
    label = "{reason}"
    help = "{hint}"

    model: str
    reason: str
    hint: str = "save its processor beside it: `processor.save_pretrained(folder)`"


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
class ClassOnLanguageModel(Diagnostic):
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
class TokenOnClassifier(Diagnostic):
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
class TaskMismatch(Diagnostic):
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
class PositionedOutput(Diagnostic):
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
    """Name of a row: a prompt or an image."""


@keyword_record
class ModelShapeMismatch(Diagnostic):
    """Two models whose activations don't fit into each other."""

    code = "E0415"
    hangs_on = frozenset({"shape"})
    title = "`{source}` and `{base}` are not of one shape"
    label = "{differences}"
    help = "{hint}"
    source: str
    base: str
    differences: str
    hint: str


@keyword_record
class ModelTokenMismatch(Diagnostic):
    """Two models that see different tokens in the same prompts."""

    code = "E0416"
    hangs_on = frozenset({"tokens"})
    title = (
        "`{source}` and `{base}` tokenise the prompts differently, in {rows:,} of {total:,} rows"
    )
    label = "{example}"
    help = "positions must be the same in both: use models with one tokenizer, and the same `bos`"
    source: str
    base: str
    rows: int
    total: int
    example: str


@keyword_record
class ModelNotLocal(Diagnostic):
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
    """Where it was searched for."""
    absence: str = "not on this machine"
    where: str = "not in "
    waiting: str = ""
    """Checks that need the model, with their lines."""


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
class StackSkipped(Diagnostic):
    """A stack beside the main one whose sites can't be had."""

    code = "W0712"
    title = "`{model}` is taken without the sites of its stack `{stack}`"
    label = "{reason}"
    help = "the other sites are as they are on any model"

    model: str
    stack: str
    reason: str


@keyword_record
class IdleComponents(Diagnostic):
    """Parts of a model that play no part in its output, as far as a copy tells that has other
    weights."""

    code = "W0770"
    title = "parts of `{model}` have no effect"
    label = "whatever is written there, its output stays as it is: {parts}"
    help = "nothing to change where they are meant to be empty: effects of patching them are 0"

    model: str
    parts: str


@keyword_record
class UnusedWeights(Diagnostic):
    """Weights in the folder that play no part in the model."""

    code = "W0761"
    title = "some of the weights of `{model}` are not used"
    label = "{what}"
    help = "nothing to change where they belong to another part or format; else correct the folder"

    model: str
    what: str


@keyword_record
class BaseModelMismatch(Diagnostic):
    """An adapter that was trained on another model than the one it is put on."""

    code = "W0773"
    title = "the adapter `{model}` was trained on `{trained}`, and `{base}` is {given}"
    label = "`base_model_name_or_path` of its `adapter_config.json`"
    help = "nothing to change where both are the same model; else name its own with `base:`"

    model: str
    trained: str
    base: str
    given: str
