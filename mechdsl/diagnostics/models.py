"""E04xx, W071x: models, adapters, outputs, and patches between two models."""

from __future__ import annotations

import re

from mechdsl.diagnostics.core import (
    Diagnostic,
    HintedDiagnostic,
    ModelDiagnostic,
    ReasonedDiagnostic,
    RowsDiagnostic,
)


class ModelNotFound(ModelDiagnostic):
    """A `local` folder that doesn't exist, or an `hf` model that is needed and not cached."""

    code = "E0401"
    title = "there is no model at `{path}`"
    label = "`{model}` was expected in {place}"
    help = "{advice}"

    path: str
    place: str
    advice: str


class NoResidMid(ModelDiagnostic):
    """`resid_mid` where attention and MLP read the same stream."""

    code = "E0402"
    depends_on = frozenset({"shape"})
    title = "`{model}` has no `resid_mid`"
    label = "attention and MLP run in parallel in each of its blocks"
    help = "use `resid_pre`, the input of both, or `attn_out`, the output of attention"


class UnknownZooModel(Diagnostic):
    """`zoo("…")` with a name that the zoo doesn't have."""

    code = "E0403"
    title = "the zoo has no model `{path}`"
    label = "unknown zoo model"
    help = "{advice}"

    path: str
    advice: str


class NoConfig(ReasonedDiagnostic, ModelDiagnostic):
    """A model folder without a readable `config.json`, or an adapter's without its own."""

    code = "E0404"
    title = "`{file}` of `{model}` can't be read"

    file: str = "config.json"
    hint: str = "name a folder written by `save_pretrained`"


class PickledWeights(ModelDiagnostic):
    """Weights only in a format that runs code when it is read."""

    code = "E0405"
    title = "the weights of `{model}` are pickled, and mechdsl reads only safetensors"
    label = "opening `{file}` can run arbitrary code"
    help = "save them again with `model.save_pretrained(folder)`, which writes safetensors"

    file: str


class NoWeights(ModelDiagnostic):
    """A model folder without weights."""

    code = "E0406"
    title = "`{model}` has no weights"
    label = "no {what} next to its `{config}`"
    help = "{advice}"

    advice: str
    what: str = "`.safetensors` file"
    config: str = "config.json"


class NotATextModel(ModelDiagnostic):
    """A model that can't be called with a prompt alone, or an image alone."""

    code = "E0407"
    title = "`{model}` is a `{architecture}`, which can't run on prompts or images alone"
    label = "{reason}"
    help = "run it from Python with `mechdsl.forward.hooks.full_pass.run_full`"

    architecture: str
    reason: str = (
        "`.mech` files support language models (causal, masked, vision-language and "
        "encoder-decoders of text) and vision transformers"
    )


class SiteNotInBlock(ModelDiagnostic):
    """A site that the model has in other blocks than the one that is asked for."""

    code = "E0414"
    depends_on = frozenset({"shape"})
    title = "`{model}` has no `{site}` in layer {layer}"
    label = "{reason}"
    help = "it has one in {layers}"

    site: str
    layer: int
    reason: str
    layers: str


class ShapeUnknown(ModelDiagnostic):
    """A `config.json` that doesn't say how large the model is."""

    code = "E0408"
    title = "the `config.json` of `{model}` gives no {what}"
    label = "looked for {keys}"
    help = "add the key, or use a transformers model"

    what: str
    keys: str

    @property
    def named(self) -> list[str]:
        """The keys alone."""
        return re.findall(r"\w+", self.keys)


class ModelTooLarge(ModelDiagnostic):
    """A number of `config.json` that no model has."""

    code = "E0430"
    title = "the `config.json` of `{model}` sets `{key}` to {number:,}, above the limit of {most:,}"
    label = "no known model is this large"
    help = "correct the number; the limits are listed in docs/language.md"

    key: str
    number: int
    most: int


class WeightsElsewhere(ModelDiagnostic):
    """A file of weights that lies outside of the model's folder, by what another file says."""

    code = "E0431"
    title = "some weights of `{model}` are outside its folder"
    label = "its `{file}` names `{name}`"
    help = "move the file into the folder and refer to it by name alone"

    file: str
    name: str


class ModelFileTooLarge(ModelDiagnostic):
    """A JSON file of a model that is larger than any."""

    code = "E0432"
    title = "`{file}` of `{model}` has {size:,} bytes, above the limit of {most:,}"
    label = "no known model's is this large"
    help = "save the model again with `save_pretrained`; the limits are listed in docs/language.md"

    file: str
    size: int
    most: int


class ModelRunsCode(ModelDiagnostic):
    """A config that takes a kernel from a repository, which is a program."""

    code = "E0433"
    title = "the `config.json` of `{model}` asks for `{value}`, which mechdsl doesn't run"
    label = "its `{key}` names a code repository"
    help = "remove `{key}` from `config.json`; it changes how attention is computed, not its result"

    key: str
    value: str


class BadSize(ModelDiagnostic):
    """A `config.json` with a size that no model can have."""

    code = "E0420"
    title = "the `config.json` of `{model}` has `{key}`: {value}"
    label = "a size is a whole number above 0"
    help = "correct the key, or save the model again with `save_pretrained`"

    key: str
    value: str


class VocabularyTooSmall(ModelDiagnostic):
    """A tokenizer with ids that the model's embedding doesn't have."""

    code = "E0421"
    depends_on = frozenset({"shape", "tokens"})
    title = "`{model}` has {size:,} tokens, and its tokenizer {more}"
    label = "the tokenizer belongs to another model, or `vocab_size` is wrong"
    help = "add the tokenizer that the model was trained with, or correct `config.json`"

    size: int
    more: str


class NoTokenFor(RowsDiagnostic):
    """Words of prompts that a tokenizer without a token for unknown ones can't read."""

    code = "E0436"
    depends_on = frozenset({"tokens"})
    title = "the tokenizer has no token for {words}, and none for unknown words"
    label = "in {rows} of {total} rows of `{run}`"
    help = "use words in the model's vocabulary, or give its tokenizer an unknown token"

    words: str
    run: str


class NoLogits(ModelDiagnostic):
    """A measure that reads logits of a model without a head."""

    code = "E0437"
    depends_on = frozenset({"shape"})
    title = "`{text}` reads logits, but `{model}` has none"
    label = (
        "a `{architecture}` has no language-model head; its outputs are the vectors of its "
        "last block"
    )
    help = (
        "measure its vectors, as in `cosine(resid_post layer 1, clean)`, or load the model with a "
        "head, such as a class that ends in `ForCausalLM` or `ForMaskedLM`"
    )

    text: str
    architecture: str


class NoSuchOutput(ModelDiagnostic):
    """A measure that asks for the logit of a token that the model has none for."""

    code = "E0438"
    depends_on = frozenset({"shape", "tokens"})
    title = "`{text}` asks for the logit of token {token}, but `{model}` has {outputs}"
    label = "a `{architecture}` has fewer outputs than tokens"
    help = "name one of its outputs by its number, as in `class 0`"

    text: str
    token: int
    outputs: int
    architecture: str


class SingleOutput(ModelDiagnostic):
    """A model with one output for a whole prompt that isn't a classifier's, made of one token."""

    code = "E0439"
    title = "`{model}` is a `{architecture}`, whose single output per prompt can't be measured"
    label = "{reason}"
    help = (
        "load its weights as a classifier that reads one token (`…ForSequenceClassification`), a "
        "model with an output for each token, or without a head, and measure its vectors"
    )

    architecture: str
    reason: str


class AdapterFolder(HintedDiagnostic):
    """A folder with an adapter (LoRA), rather than only a model."""

    code = "E0440"
    title = "`{path}` is an adapter for {base}, {kind}"
    label = "it has an `adapter_config.json`, {files}"

    path: str
    base: str
    kind: str = "not a model"
    files: str = "and no `config.json`"


class QuantizedModel(ModelDiagnostic):
    """A model whose weights are integers with separate scales."""

    code = "E0441"
    title = "`{model}` is quantized, which isn't supported yet"
    label = "`{part}` is a `{kind}`"
    help = "use the model from before quantization"

    part: str
    kind: str


class LayerCountMismatch(ModelDiagnostic):
    """Weights of more blocks than the config has."""

    code = "E0422"
    title = "the `config.json` of `{model}` has {blocks} layers, its weights {more}"
    label = "the weights have `{key}`, which no parameter takes"
    help = (
        "correct the number of layers in `config.json`, or replace the weights with matching ones"
    )

    blocks: int
    more: int
    key: str


class ComponentNotFound(ReasonedDiagnostic, ModelDiagnostic):
    """The finder can't tell which module plays a part."""

    code = "E0409"
    title = "`{model}` ({architecture}): {part} not found"

    architecture: str
    part: str
    hint: str = "register the family with `@family` and name the module there"


class IdentityBroken(ReasonedDiagnostic, ModelDiagnostic):
    """The parts of the model don't add up as its anatomy says."""

    code = "E0410"
    title = "`{model}` ({architecture}) fails the check `{identity}`"

    architecture: str
    identity: str
    hint: str = "its modules were identified wrongly; register the family with `@family`"


class LoadFailed(ReasonedDiagnostic, ModelDiagnostic):
    """transformers or safetensors refused the folder."""

    code = "E0411"
    title = "`{model}` can't be loaded"

    hint: str = "it must load with `AutoModelForCausalLM.from_pretrained`"


class NoTokenizer(ReasonedDiagnostic, ModelDiagnostic):
    """A model without a fast tokenizer."""

    code = "E0412"
    title = "`{model}` has no tokenizer that gives character offsets"

    hint: str = (
        "positions need character offsets: save a fast tokenizer (`tokenizer.json`) in the "
        "model's folder"
    )


class SiteNotOnModel(ReasonedDiagnostic, ModelDiagnostic):
    """A site of the language that this model doesn't have."""

    code = "E0413"
    depends_on = frozenset({"shape"})
    title = "`{model}` has no `{site}`"

    site: str


class InputKindMismatch(HintedDiagnostic, ModelDiagnostic):
    """Images for a model of texts, or prompts for one of images."""

    code = "E0455"
    title = "`{model}` is a `{architecture}`, which reads {reads}, but `{block}` is {given}"
    label = "an experiment passes it `{block}`"

    architecture: str
    reads: str
    block: str
    given: str


class NoImageProcessor(ReasonedDiagnostic, ModelDiagnostic):
    """A vision model without a description of how images are made ready for it."""

    code = "E0456"
    title = "`{model}` has no {what} configuration"

    hint: str = "save its processor in the same folder: `processor.save_pretrained(folder)`"
    what: str = "image processor"


class UnpreparedImages(HintedDiagnostic, ModelDiagnostic):
    """Images in prompts whose tokens aren't known, because of the model's processor."""

    code = "E0459"
    title = "the {what} of prompts can't be prepared for `{model}`"
    label = "the model's processor: {reason}"

    reason: str
    hint: str = "docs/models.md lists supported models, in its section Image tokens"
    what: str = "images"


class ImagesNotVectors(ModelDiagnostic):
    """A vision-language model in which images change more than the embeddings of their tokens."""

    code = "E0458"
    title = "`{model}` is a `{architecture}`, whose images in prompts aren't supported"
    label = "images act on it by more than the vectors of their tokens"
    help = (
        "the logits of an image differ by {apart} of the largest logit; docs/models.md lists "
        "supported models, in its section Image tokens"
    )

    architecture: str
    apart: str


class ModelCircle(ModelDiagnostic):
    """Adapters, edited models or sums whose bases lead back to themselves."""

    code = "E0450"
    title = "`{model}` is defined in terms of itself: {circle}"
    label = "leads back to `{model}`"
    help = 'define the original model with its source: `model toy = zoo("counting")`'

    circle: str


class OtherAdapter(ReasonedDiagnostic, ModelDiagnostic):
    """An adapter that isn't LoRA, or is none of weights."""

    code = "E0451"
    title = "`{model}` is an adapter of type {kind}, which {what}"

    kind: str
    what: str


class AdapterConfig(ReasonedDiagnostic, ModelDiagnostic):
    """An entry of `adapter_config.json` that isn't followed."""

    code = "E0452"
    title = "the `adapter_config.json` of `{model}` has `{key}`: {value}"

    key: str
    value: str


class AdapterDoesNotFit(ReasonedDiagnostic, ModelDiagnostic):
    """Weights of an adapter that its base has no place for."""

    code = "E0453"
    title = "the adapter `{model}` doesn't fit `{base}`"

    base: str


class NoPeft(ModelDiagnostic):
    """An adapter where the library that reads it isn't installed."""

    code = "E0454"
    title = "the adapter `{model}` needs peft, which isn't installed"
    label = "peft merges its weights into those of `{base}`"
    help = "`pip install 'mechdsl[adapters]'` installs it"

    base: str


class UnknownLabel(HintedDiagnostic, ModelDiagnostic):
    """`class "postive"`, or an answer that isn't a label of the model."""

    code = "E0442"
    depends_on = frozenset({"shape", "rows"})
    title = "`{model}` has no {what}"
    label = "{where}"

    what: str
    where: str


class ClassOnLanguageModel(HintedDiagnostic, ModelDiagnostic):
    """`class answer` on a language model."""

    code = "E0443"
    depends_on = frozenset({"shape"})
    title = "`{text}` asks for a class, but the outputs of `{model}` are tokens"
    label = "a `{architecture}` has no labels"

    text: str
    architecture: str


class TokenOnClassifier(HintedDiagnostic, ModelDiagnostic):
    """`logit(answer)` on a classifier."""

    code = "E0444"
    depends_on = frozenset({"shape"})
    title = "`{text}` asks for a token, but the outputs of `{model}` are labels"
    label = "{labels}"

    text: str
    labels: str


class TaskMismatch(ReasonedDiagnostic, ModelDiagnostic):
    """A metric that has no meaning for what the model was made for."""

    code = "E0445"
    depends_on = frozenset({"shape"})
    title = "`{text}` has no meaning on `{model}`"

    text: str


class PositionedOutput(ModelDiagnostic):
    """`at …` after a measure of a model that has one output for a whole prompt."""

    code = "E0446"
    depends_on = frozenset({"shape"})
    title = "`{model}` has one output per {unit}, and none at `{at}`"
    label = "it is computed from {made_of}"
    help = "remove `at {at}`"

    at: str
    made_of: str
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""


class ModelShapeMismatch(HintedDiagnostic):
    """Two models whose activations don't fit into each other."""

    code = "E0415"
    depends_on = frozenset({"shape"})
    title = "`{source}` and `{base}` have different shapes"
    label = "{differences}"
    source: str
    base: str
    differences: str


class ModelTokenMismatch(RowsDiagnostic):
    """Two models that see different tokens in the same prompts."""

    code = "E0416"
    depends_on = frozenset({"tokens"})
    title = (
        "`{source}` and `{base}` tokenise the prompts differently, in {rows:,} of {total:,} rows"
    )
    label = "{example}"
    help = "positions must agree in both: use models with {equal}"
    source: str
    base: str
    example: str
    equal: str
    """What has to be equal."""


class BadModelSum(ReasonedDiagnostic, ModelDiagnostic):
    """A sum of models that isn't linear, or of models that can't be added."""

    code = "E0457"
    title = "`{model}` isn't a valid sum of models: {reason}"


class ModelNotLocal(ModelDiagnostic):
    """A model that the local cache, or the folder of the file, doesn't have, or that a function
    would make."""

    code = "W0710"
    title = "`{model}` is {absence}, so checks that need the model were skipped"
    label = "`{path}` is {where}{place}"
    help = "{advice}{waiting}"

    path: str
    advice: str
    place: str = ""
    """Where it was searched for."""
    absence: str = "not on this machine"
    where: str = "not in "
    waiting: str = ""
    """Checks that need the model, with their lines."""


class NotRestartable(ModelDiagnostic):
    """Rows of the model can't take anything over from the unpatched run."""

    code = "W0711"
    title = (
        "`{model}` can't restart from a middle layer, so every row is a full forward pass over its "
        "prompt"
    )
    label = "{reason}"
    help = "no change is needed: the results are the same but take longer"

    reason: str


class StackSkipped(ModelDiagnostic):
    """A stack other than the main one, whose sites aren't available."""

    code = "W0712"
    title = "the sites in stack `{stack}` of `{model}` are not available"
    label = "{reason}"
    help = "all other sites work as usual"

    stack: str
    reason: str


class IdleComponents(ModelDiagnostic):
    """Parts of a model that play no part in its output, as far as a copy tells that has other
    weights."""

    code = "W0770"
    title = "components of `{model}` have no effect"
    label = "writing to these components doesn't change the output: {parts}"
    help = "no change is needed if they are meant to be empty; the effect of patching them is 0"

    parts: str


class UnusedWeights(ModelDiagnostic):
    """Weights in the folder that play no part in the model."""

    code = "W0761"
    title = "some weights of `{model}` are unused"
    label = "{what}"
    help = (
        "no change is needed if they belong to another component or format; otherwise "
        "correct the folder"
    )

    what: str


class BaseModelMismatch(ModelDiagnostic):
    """An adapter that was trained on another model than the one it is put on."""

    code = "W0773"
    title = "the adapter `{model}` was trained on `{trained}`, but `{base}` is {given}"
    label = "`base_model_name_or_path` of its `adapter_config.json`"
    help = (
        "no change is needed if both are the same model; otherwise name the right one with `base:`"
    )

    trained: str
    base: str
    given: str
