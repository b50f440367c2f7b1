"""Facts about a dictionary on disk, and descriptions of its features, read without torch.

Layouts: folders of SAELens (`cfg.json`, `sae_weights.safetensors`), folders of sparsify
(`cfg.json`, `sae.safetensors`), and a safetensors file with `W_enc`, `W_dec` and biases, whose
encoder may be transposed, as circuit-tracer writes it.

Descriptions of features are in a JSON lines file, such as an export of Neuronpedia. Each line is an
object with the number of the feature in `index` (or `feature`), as a number or a text, and its
description in `description` (or `label`). Other entries are ignored; the first description of a
feature counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from mechdsl.base import limits
from mechdsl.base.files import (
    SafetensorsFile,
    UnreadableFile,
    inspect_safetensors,
    load_object,
)
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun, name_list

if TYPE_CHECKING:
    from mechdsl.dictionaries.configs import CrossLayerConfig, SaeLensConfig

Layout = Literal["SAELens", "sparsify", "tensors", "circuit-tracer", "mechdsl"]

Architecture = Literal[
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "matching_pursuit",
    "temporal",
    "nonnegative",
    "linear",
    "mixture",
]

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

CONFIG_FILE = "cfg.json"

CROSS_LAYER_CONFIG = "config.yaml"
"""Configuration of a cross-layer transcoder, which names the hook point that it reads."""

WEIGHT_FILES: Mapping[Layout, str] = {
    "SAELens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
}

OWN_KINDS: Mapping[Architecture, str] = {
    "nonnegative": "nonnegative factorization",
    "linear": "linear components",
    "mixture": "Gaussian mixture",
}
"""Architectures that only mechdsl trains and reads, in files like those of SAELens → their names in
messages."""

MAX_GATHERED = 16
"""Named coordinates of a vector up to which only their own directions are used."""

SEPARATE: tuple[Architecture, ...] = ("standard", "jumprelu", "gated", "linear")
"""Architectures whose features don't depend on each other, so that some can be computed alone."""

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".npz")
"""Endings of files that may run code when they are loaded, or that need another reader."""


def read_limited_file(path: Path, written: str, most: int, *, pickled: str, large: str) -> bytes:
    """Read a file that isn't a pickle.

    Args:
        written: The path as the user wrote it.
        most: Maximum number of bytes.
        pickled: Hint for a pickle, with FILE for its path.
        large: Hint for a file with more bytes.

    Raises:
        UnreadableFile: The file is missing, too large or a pickle.
    """
    if path.suffix.lower() in PICKLES:
        reason = f"`{written}` is a pickle, which may run code when it is loaded"
        raise UnreadableFile(reason, pickled.replace("FILE", written))
    try:
        size = path.stat().st_size
        if size > most:
            reason = f"`{written}` has {size:,} bytes, more than {most:,}"
            raise UnreadableFile(reason, large)
        return path.read_bytes()
    except OSError as error:
        reason = f"`{written}` can't be read: {(error.strerror or str(error)).lower()}"
        raise UnreadableFile(reason, "paths are relative to the folder of the file") from None


CONVERSION = (
    'convert the file where you trust it: `python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('FILE', weights_only=True).items()}, "
    "'FILE.safetensors')\"`"
)

TENSORS: Mapping[Architecture, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "abstopk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
    "matching_pursuit": ("W_dec", "b_dec"),
    "temporal": ("W_dec", "b_dec"),
    "nonnegative": ("W_dec", "b_dec", "threshold"),
    "linear": ("W_enc", "W_dec", "b_dec"),
    "mixture": ("W_dec", "b_dec", "log_weights", "precision"),
}
"""Tensors of each architecture."""

COVARIANCES = ("spherical", "diag", "full")
"""Covariances of the components of a mixture: one variance, one for each number, or a matrix."""

ATTENTION = ("k_ctx", "q_target", "v_ctx", "c_proj")
"""Maps of an attention layer of a temporal SAE."""

SKIP = "W_skip"
"""[out, in]: the map of a transcoder that adds a linear function of its input."""

SAVED_AS: Mapping[str, Architecture] = {
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
"""Architectures whose files contain a different one for inference."""

TRANSCODERS: Mapping[str, Architecture] = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Names of transcoders in SAELens, by the architecture of their encoder."""

OTHER_ARCHITECTURES: Mapping[str, str] = {
    "crosscoder": "a crosscoder, whose features belong to several layers",
}
"""Architectures whose features aren't a function of one vector."""


_PRECISIONS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class DictionaryFile(Record):
    """A dictionary on disk."""

    path: Path
    """The safetensors file with the weights."""
    layout: Layout
    architecture: Architecture
    features: int
    width_in: int
    """Numbers of the vectors that it encodes."""
    width_out: int
    """Numbers of the vectors that it reconstructs."""
    dtype: str
    digest: str
    """SHA-256 over the digests of its files."""
    weights_digest: str
    """SHA-256 of the weights."""
    tensors: Mapping[str, str]
    """Tensors by name → their names in the file."""
    k: int | None = None
    """Number of active features, for `topk`."""
    transcodes: bool = False
    """Whether it reads one site and reconstructs another one: the output of an MLP from its
    input."""
    skips: bool = False
    """Whether a transcoder adds a linear function of its input."""
    crosses_layers: bool = False
    """Whether its features write to several layers, so that it has an encoder only."""
    transposed: bool = False
    """Whether the encoder is saved as [feature, width]."""
    subtracts_bias: bool = True
    """Whether the decoder's bias is subtracted from the input."""
    normalization: Normalization = "none"
    scales_by_decoder: bool = False
    """Whether features are in units of decoder rows of length 1."""
    residual_threshold: float = 0.0
    """Matching pursuit: the norm of the residual at which it stops."""
    most_steps: int | None = None
    """Matching pursuit: the maximum number of steps; None: the width."""
    stops_on_same_support: bool = True
    context_layers: int = 0
    """Temporal: number of attention layers that predict a vector from the preceding ones of its
    row. Features are those of what they don't predict."""
    context_heads: int = 1
    """Heads of each of these layers."""
    context_width: int = 0
    """Width of their queries and keys over all heads."""
    scale: float = 1.0
    """Temporal: factor of the vectors before they are encoded."""
    covariance: str = ""
    """Mixture: `full`, `diag` or `spherical`."""
    model: str | None = None
    """Name of the model that it was trained on, if recorded."""
    hook: str | None = None
    """Name of the hook point that it encodes, if recorded: `blocks.8.hook_resid_pre`."""
    hook_out: str | None = None
    """Name of the hook point that a transcoder reconstructs, if recorded."""
    decoders: SafetensorsFile | None = None
    """The file with the decoders of a cross-layer transcoder, if rules change its features:
    [feature, layer, width], of its layer and all later ones."""

    def with_decoders(self, decoders: SafetensorsFile) -> Self:
        """Add the decoders of a cross-layer transcoder, on which its digest then depends, too."""
        both = sha256(f"{self.digest} {decoders.digest}".encode()).hexdigest()
        return replace(self, decoders=decoders, digest=both)

    @property
    def written_layers(self) -> int:
        """Number of layers that a feature writes to, if rules change it."""
        return 1 if self.decoders is None else next(iter(self.decoders.shapes.values()))[1]

    @property
    def is_separate(self) -> bool:
        """Whether a feature depends on no other one."""
        return self.architecture in SEPARATE

    @property
    def write_obstacle(self) -> str:
        """Why rules can't change its features, after "the features of a"; empty if they can."""
        if self.crosses_layers:
            return "cross-layer transcoder write to several layers"
        return "temporal SAE depend on the preceding tokens" if self.context_layers else ""

    @property
    def encoding_products(self) -> int:
        """Multiply-adds of all features of one vector.

        For a nonnegative factorization, it is an estimate: half of the factors become active, one
        after another, and each time a system of equations with all factors is solved.
        """
        products = self.features * self.width_in
        if self.architecture == "mixture" and self.covariance == "full":
            return products * self.width_in
        solved = self.features**4 // 6 if self.architecture == "nonnegative" else 0
        return products + solved

    @property
    def context_products(self) -> int:
        """Multiply-adds of the prediction of one vector, without attention weights."""
        layer = 2 * self.features * (self.width_in + self.context_width + self.features)
        return self.context_layers * layer

    @property
    def adds_bias(self) -> bool:
        """Whether the reconstruction has the decoder's bias."""
        if self.context_layers:  # SAELens adds the bias only to untied weights
            return not self.subtracts_bias and "W_enc" in self.tensors
        return self.subtracts_bias or self.architecture != "matching_pursuit"

    @property
    def precision(self) -> str:
        """Precision of its weights: `bfloat16`. It computes in float32."""
        return _PRECISIONS[self.dtype]

    @property
    def kind(self) -> str:
        """Its type, as messages name it: `jumprelu SAE`, `topk transcoder with k 32`."""
        if self.architecture in OWN_KINDS:
            return OWN_KINDS[self.architecture]
        what = ("skip transcoder" if self.skips else "transcoder") if self.transcodes else "SAE"
        what = "cross-layer transcoder" if self.crosses_layers else what
        return f"{self.architecture} {what}" + (f" with k {self.k}" if self.k is not None else "")


def read_dictionary(
    path: Path, written: str, *, transcodes: bool = False, layer: int | None = None
) -> DictionaryFile:
    """Read the facts of a dictionary.

    Args:
        path: A folder, or a safetensors file.
        written: The path as the user wrote it.
        transcodes: Whether a file of tensors alone is a transcoder.
        layer: The layer of a cross-layer transcoder's encoder.

    Raises:
        UnreadableFile: If it is missing, has another form, or is too large.
    """
    if path.suffix.lower() in PICKLES:
        raise UnreadableFile(
            f"`{written}` is a pickle, which may run code when it is loaded",
            CONVERSION.replace("FILE", path.name),
        )
    if path.is_dir() and any(path.glob("W_enc_*.safetensors")):
        return _read_cross_layer(path, written, layer)
    if path.is_dir():
        return _read_folder(path, written)
    if path.suffix == ".safetensors":
        return _read_tensors(path, written, transcodes=transcodes)
    reason = "isn't a safetensors file" if path.exists() else "does not exist"
    raise UnreadableFile(
        f"`{written}` {reason}",
        "name a folder with `cfg.json` and `sae_weights.safetensors`, or a `.safetensors` file; "
        "paths start from the folder of the `.mech` file",
    )


def _read_config(path: Path, written: str) -> bytes | None:
    """Return the content of a configuration; None without such a file. Raises UnreadableFile."""
    if not path.exists():
        return None
    large = "copy the folder again"
    return read_limited_file(
        path, written, limits.DICTIONARY_CONFIG, pickled=CONVERSION, large=large
    )


def _read_folder(path: Path, written: str) -> DictionaryFile:
    from mechdsl.base.side_files import parse_object

    config_path = path / CONFIG_FILE
    present: list[Layout] = [name for name, file in WEIGHT_FILES.items() if (path / file).exists()]
    layout = present[0] if present else None
    if layout is None:
        pickled = sorted(each.name for each in path.iterdir() if each.suffix in PICKLES)
        if pickled:
            raise UnreadableFile(
                f"`{written}` has its weights in `{pickled[0]}`, a pickle, which may run code when "
                "it is loaded",
                CONVERSION.replace("FILE", pickled[0]),
            )
        known = name_list(WEIGHT_FILES.values())
        raise UnreadableFile(f"`{written}` has no weights", f"the folder needs one of {known}")
    content = _read_config(config_path, f"{written}/{CONFIG_FILE}")
    if content is None:
        raise UnreadableFile(
            f"`{written}` has no `{CONFIG_FILE}`", "copy the whole folder of the dictionary"
        )
    config = parse_object(content, f"{written}/{CONFIG_FILE}")
    weights = path / WEIGHT_FILES[layout]
    file = inspect_safetensors(
        weights, f"{written}/{weights.name}", limits.DICTIONARY_FILE, "use a smaller dictionary"
    )
    digest = sha256(content + file.digest.encode()).hexdigest()
    read = _of_sae_lens if layout == "SAELens" else _of_sparsify
    return read(config, file, digest, written)


def _read_cross_layer(path: Path, written: str, layer: int | None) -> DictionaryFile:
    """Read the encoder of one layer of a cross-layer transcoder, in circuit-tracer's layout."""
    weights = path / f"W_enc_{layer}.safetensors"
    if not weights.is_file():
        count = len(list(path.glob("W_enc_*.safetensors")))
        raise UnreadableFile(
            f"`{written}` is a cross-layer transcoder without an encoder for layer {layer}",
            f"it has {count}; write, for example, `at mlp_out layer 0`",
        )
    file = inspect_safetensors(
        weights, f"{written}/{weights.name}", limits.DICTIONARY_FILE, "use a smaller dictionary"
    )
    more = [name for name in ("threshold", "b_dec") if f"{name}_{layer}" in file.shapes]
    jumps = "threshold" in more
    names = {name: f"{name}_{layer}" for name in ("W_enc", "b_enc", *more)}
    missing = next((name for name in names.values() if name not in file.shapes), None)
    features, width = (*file.shapes.get(names["W_enc"], ()), 0, 0)[:2]
    expected = {"W_enc": (features, width), "b_dec": (width,)}
    fits = missing is None and all(
        file.shapes[name] == expected.get(key, (features,)) for key, name in names.items()
    )
    if not fits or not width:
        reason = f"has no tensor `{missing}`" if missing else "has tensors of different sizes"
        raise UnreadableFile(
            f"`{written}/{weights.name}` {reason}",
            f"it needs `{names['W_enc']}` [feature, width] and `{names['b_enc']}` [feature]",
        )
    config, content = _read_cross_layer_config(path, written)
    hook = f"blocks.{layer}.{config.feature_input_hook}"
    if site_of_hook(hook) not in [(site, layer) for site in ENCODED_SITES]:
        known = name_list(name for name, site in HOOK_SITES.items() if site in ENCODED_SITES)
        raise UnreadableFile(
            f"`{written}/{CROSS_LAYER_CONFIG}` doesn't say what the features read",
            f"it needs `feature_input_hook: …` with one of {known}",
        )
    return DictionaryFile(
        path=weights,
        layout="circuit-tracer",
        architecture="jumprelu" if jumps else "standard",
        features=features,
        width_in=width,
        width_out=width,
        dtype=file.dtypes[names["W_enc"]],
        digest=sha256(content + file.digest.encode()).hexdigest(),
        weights_digest=file.digest,
        tensors=names,
        transcodes=True,
        crosses_layers=True,
        transposed=True,
        subtracts_bias=False,
        model=config.model_name or None,
        hook=hook,
    )


def read_cross_decoder(file: DictionaryFile, layer: int, layers: int) -> SafetensorsFile:
    """Read the facts of the decoders of one layer's features of a cross-layer transcoder.

    Args:
        file: The encoder of the layer.
        layers: Number of layers of the model.

    Raises:
        UnreadableFile: If they are missing, too large, or of another form.
    """
    name = f"W_dec_{layer}"
    written = f"{file.path.parent.name}/{name}.safetensors"
    hint = f"it needs `{name}` [feature, layer, width], for layer {layer} and all later ones"
    if "b_dec" not in file.tensors:
        raise UnreadableFile(
            f"`{file.path.name}` has no tensor `b_dec_{layer}`",
            "it has a number for each of the model's width",
        )
    path = file.path.parent / f"{name}.safetensors"
    if not path.is_file():
        raise UnreadableFile(f"`{written}` doesn't exist", hint)
    safetensors_file = inspect_safetensors(
        path, written, limits.DICTIONARY_FILE, "use a smaller dictionary"
    )
    shape = (file.features, layers - layer, file.width_out)
    if safetensors_file.shapes != {name: shape}:
        has = name_list(
            f"`{key}` {list(numbers)}" for key, numbers in sorted(safetensors_file.shapes.items())
        )
        raise UnreadableFile(f"`{written}` has {has}, not `{name}` {list(shape)}", hint)
    return safetensors_file


def _read_cross_layer_config(path: Path, written: str) -> tuple[CrossLayerConfig, bytes]:
    """Read the configuration of a cross-layer transcoder; empty if there is none."""
    import yaml

    from mechdsl.base.side_files import check_entries
    from mechdsl.dictionaries.configs import CrossLayerConfig

    written = f"{written}/{CROSS_LAYER_CONFIG}"
    content = _read_config(path / CROSS_LAYER_CONFIG, written)
    if content is None:
        return CrossLayerConfig(), b""
    try:
        events = yaml.parse(content, Loader=yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise UnreadableFile(f"`{written}` has aliases", "write each value where it is used")
        document = yaml.compose(content, Loader=yaml.SafeLoader)
        keys = [key.value for key, _ in document.value] if document is not None else []
        if len(keys) > len(set(map(str, keys))):
            raise UnreadableFile(f"`{written}` has a key twice", "remove one of them")
        entries = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = f"`{written}` can't be read: {type(error).__name__}"
        raise UnreadableFile(reason, "copy the folder again") from None
    return check_entries(CrossLayerConfig, entries or {}, written), content


def _of_sae_lens(
    config: dict[str, Any], file: SafetensorsFile, digest: str, written: str
) -> DictionaryFile:
    """Interpret the configuration of SAELens, of version 6 or before."""
    from mechdsl.base.side_files import check_entries
    from mechdsl.dictionaries.configs import SaeLensConfig

    own = check_entries(SaeLensConfig, config, f"{written}/{CONFIG_FILE}")
    facts = _facts(own)
    name, activation = own.architecture, own.activation or "relu"
    arguments = own.activation_fn_kwargs
    k = own.k if own.k is not None or arguments is None else arguments.k
    if name == "standard" and activation == "topk":
        name = "topk"
    elif activation not in ("relu", "topk"):
        raise UnreadableFile(
            f"`{written}` has the activation function `{activation}`",
            "mechdsl reads `relu` and `topk`",
        )
    if name == "temporal":
        return _of_temporal(own, file, digest, written)
    transcodes = name in TRANSCODERS
    architecture = _architecture(TRANSCODERS.get(name, SAVED_AS.get(name, name)), written)
    normalization = own.normalize_activations
    if isinstance(normalization, bool) or normalization is None:
        normalization = "expected_average_only_in" if normalization else "none"
    if normalization == "expected_average_only_in":
        factor = facts["factor"]
        raise UnreadableFile(
            f"`{written}` expects activations of a fixed average norm"
            + (f" (factor {factor})" if factor is not None else ", and doesn't say which"),
            "fold the factor into the weights: `sae.fold_activation_norm_scaling_factor(factor)`, "
            "then `sae.save_model(path)` in SAELens",
        )
    if normalization not in ("none", "layer_norm", "constant_norm_rescale"):
        raise UnreadableFile(
            f"`{written}` normalises activations by `{normalization}`",
            "mechdsl reads `none`, `layer_norm` and `constant_norm_rescale`",
        )
    ranked = architecture in ("topk", "abstopk")
    if ranked and k is None:
        raise UnreadableFile(
            f"`{written}/{CONFIG_FILE}` has no `k`", "it is the number of active features"
        )
    return _checked(
        file,
        written,
        sizes={"d_in": own.d_in, "d_sae": own.d_sae, "d_out": own.d_out},
        layout="mechdsl" if architecture in OWN_KINDS else "SAELens",
        architecture=architecture,
        digest=digest,
        k=k if ranked else None,
        transcodes=transcodes,
        skips="skip" in name and transcodes,
        subtracts_bias=own.apply_b_dec_to_input is not False and not transcodes,
        normalization=normalization,
        scales_by_decoder=bool(own.rescale_acts_by_decoder_norm),
        residual_threshold=own.residual_threshold,
        most_steps=own.max_iterations,
        **(_mixture_facts(file) if architecture == "mixture" else {}),
        stops_on_same_support=own.stop_on_duplicate_support,
        model=facts["model_name"],
        hook=facts["hook"],
        hook_out=facts["hook_out"],
    )


def _facts(config: SaeLensConfig) -> dict[str, Any]:
    """Return the entries that SAELens writes in `metadata` since its version 6."""
    facts = config.model_dump(include={"model_name", "hook", "hook_out", "factor"})
    newer = {} if config.metadata is None else config.metadata.model_dump()
    facts |= {name: value for name, value in newer.items() if value is not None}
    return {name: value or None for name, value in facts.items()}


def _mixture_facts(file: SafetensorsFile) -> dict[str, Any]:
    """Return the covariance of a mixture by the dimensions of its precisions, with the shape that
    they must have."""
    features, width = (*file.shapes.get("W_dec", ()), 0, 0)[:2]
    dims = min(max(len(file.shapes.get("precision", ())), 1), len(COVARIANCES))
    shape = (features, width, width)[:dims]
    return {"more": {"precision": shape}, "covariance": COVARIANCES[dims - 1]}


def _of_temporal(
    config: SaeLensConfig, file: SafetensorsFile, digest: str, written: str
) -> DictionaryFile:
    """Interpret the configuration of a temporal SAE of SAELens."""
    normalization = config.normalize_activations or "none"
    if normalization not in ("none", "constant_scalar_rescale"):
        raise UnreadableFile(
            f"`{written}` normalises activations by `{normalization}`",
            "mechdsl reads temporal SAEs with `none` and `constant_scalar_rescale`",
        )
    rescales = normalization == "constant_scalar_rescale"
    layers, facts = config.n_attn_layers, _facts(config)
    if layers > len(file.shapes):
        raise UnreadableFile(
            f"`n_attn_layers` of `{written}/{CONFIG_FILE}` is {layers:,}, and its weights have "
            f"{count_noun(len(file.shapes), 'tensor')}",
            "copy the folder again",
        )
    features = (*file.shapes.get("W_dec", ()), 0)[0]
    inner = features // config.bottleneck_factor
    sizes = {"k_ctx": inner, "q_target": inner, "v_ctx": features, "c_proj": features}
    shapes = {
        f"attn_layers.{layer}.{name}.{part}": (sizes[name], features)[: 1 + (part == "weight")]
        for layer in range(layers)
        for name in ATTENTION
        for part in ("weight", "bias")
    }
    return _checked(
        file,
        written,
        more=shapes if config.tied_weights else {**shapes, "W_enc": ()},
        sizes={"d_in": config.d_in, "d_sae": config.d_sae},
        layout="SAELens",
        architecture="temporal",
        digest=digest,
        k=config.kval_topk if config.sae_diff_type == "topk" else None,
        subtracts_bias=config.apply_b_dec_to_input is not False,
        context_layers=layers,
        context_width=inner,
        context_heads=config.n_heads,
        scale=config.activation_normalization_factor if rescales else 1.0,
        model=facts["model_name"],
        hook=facts["hook"],
    )


def _of_sparsify(
    config: dict[str, Any], file: SafetensorsFile, digest: str, written: str
) -> DictionaryFile:
    """Interpret the configuration of sparsify (EleutherAI)."""
    from mechdsl.base.side_files import check_entries
    from mechdsl.dictionaries.configs import SparsifyConfig

    own = check_entries(SparsifyConfig, config, f"{written}/{CONFIG_FILE}")
    if own.activation != "topk" or own.signed or own.multi_topk:
        kind = "signed" if own.signed else own.activation
        raise UnreadableFile(
            f"`{written}` is a `{kind}` dictionary of sparsify", "mechdsl reads its `topk` ones"
        )
    return _checked(
        file,
        written,
        sizes={"d_in": own.d_in, "num_latents": own.num_latents or None},
        layout="sparsify",
        architecture="topk",
        digest=digest,
        k=own.k,
        transcodes=own.transcode,
        skips=own.skip_connection,
        transposed=True,
        subtracts_bias=not own.transcode,
    )


def _read_tensors(path: Path, written: str, *, transcodes: bool) -> DictionaryFile:
    """Read a file of named tensors, as a dictionary with ReLU or JumpReLU."""
    file = inspect_safetensors(path, written, limits.DICTIONARY_FILE, "use a smaller dictionary")
    thresholds = {"threshold", OTHER_NAMES["threshold"]} & file.shapes.keys()
    encoder, decoder = (file.shapes.get(name, ()) for name in ("W_enc", "W_dec"))
    return _checked(
        file,
        written,
        layout="tensors",
        architecture="jumprelu" if thresholds else "standard",
        digest=file.digest,
        transcodes=transcodes,
        skips=SKIP in file.shapes,
        transposed=encoder[:1] == decoder[:1] and encoder[1:] != decoder[:1],
        subtracts_bias=not transcodes,
    )


OTHER_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "threshold": "activation_function.threshold",
}
"""Names of tensors in sparsify and circuit-tracer."""


def _checked(
    file: SafetensorsFile,
    written: str,
    more: Mapping[str, tuple[int, ...]] | None = None,
    sizes: Mapping[str, int | None] | None = None,
    **facts: Any,
) -> DictionaryFile:
    """Check the shapes of the tensors, and create the record.

    Args:
        more: Shapes of tensors beyond those of the architecture; that of `W_enc` is ignored.
        sizes: Sizes in the configuration by name, `d_in`, `d_out` or the number of features.
    """
    architecture: Architecture = facts["architecture"]
    more = more or {}
    wanted = (*TENSORS[architecture], *([SKIP] if facts.get("skips") else []), *more)
    wanted = tuple(dict.fromkeys(wanted))
    names = _match_renamed_tensors(file, written, wanted, architecture)
    decoder = file.shapes["W_dec"]
    if len(decoder) != 2:
        raise UnreadableFile(
            f"`W_dec` of `{written}` has the shape {list(decoder)}", "it must be [feature, width]"
        )
    features, out = decoder
    encoder = file.shapes.get(names.get("W_enc", "W_enc"), (out, features))
    if facts.get("transposed"):
        encoder = encoder[::-1]
    width = encoder[0] if len(encoder) == 2 else 0
    expected: dict[str, tuple[int, ...]] = {
        **more,
        "W_enc": (width, features),
        "W_dec": (features, out),
        "b_dec": (out,),
        SKIP: (out, width),
    }
    for name in wanted:
        shape = encoder if name == "W_enc" else file.shapes[names.get(name, name)]
        there = expected.get(name, (features,))
        if shape != there:
            raise UnreadableFile(
                f"`{names.get(name, name)}` of `{written}` has the shape {list(shape)}, not "
                f"{list(there)}",
                "all tensors must have the same number of features and widths",
            )
    actual = {"d_in": width, "d_out": out}
    for name, size in (sizes or {}).items():
        if size is not None and size != actual.get(name, features):
            raise UnreadableFile(
                f"`{name}` of `{written}/{CONFIG_FILE}` is {size:,}, and its tensors have "
                f"{actual.get(name, features):,}",
                "copy the folder again",
            )
    if facts.get("k") is not None and facts["k"] > features:
        raise UnreadableFile(
            f"`k` of `{written}/{CONFIG_FILE}` is {facts['k']:,}, and it has {features:,} features",
            "copy the folder again",
        )
    if not facts.get("transcodes"):
        _check_autoencoder(written, width, out, skips=bool(facts.get("skips")))
    return DictionaryFile(
        path=file.path,
        features=features,
        width_in=width,
        width_out=out,
        dtype=file.dtypes["W_dec"],
        weights_digest=file.digest,
        tensors={name: names.get(name, name) for name in wanted},
        **facts,
    )


def _match_renamed_tensors(
    file: SafetensorsFile, written: str, wanted: Sequence[str], architecture: Architecture
) -> dict[str, str]:
    """Return the tensors that the file has under another name. Raises UnreadableFile."""
    names = {
        name: OTHER_NAMES[name]
        for name in wanted
        if name not in file.shapes and OTHER_NAMES.get(name) in file.shapes
    }
    missing = [name for name in wanted if names.get(name, name) not in file.shapes]
    if missing:
        known = name_list(sorted(file.shapes)) or "none"
        raise UnreadableFile(
            f"`{written}` has no tensor `{missing[0]}`, which its architecture "
            f"`{architecture}` needs",
            f"it has {known}",
        )
    return names


def _check_autoencoder(written: str, width: int, out: int, *, skips: bool) -> None:
    """Check that a dictionary reconstructs the vectors that it reads. Raises UnreadableFile."""
    if width != out:
        raise UnreadableFile(
            f"`{written}` reads vectors of {width} numbers and writes {out}",
            "only a transcoder does; set `architecture` in its `cfg.json`",
        )
    if skips:
        raise UnreadableFile(
            f"`{written}` has `{SKIP}`, which only transcoders have",
            'write `transcoder("…") at mlp_out layer 3`',
        )


def _architecture(name: str, written: str) -> Architecture:
    if name in OTHER_ARCHITECTURES:
        raise UnreadableFile(
            f"`{written}` is {OTHER_ARCHITECTURES[name]}",
            "use a dictionary that encodes one vector at a time",
        )
    if name not in TENSORS:
        known = name_list([*TENSORS, *SAVED_AS, *TRANSCODERS])
        raise UnreadableFile(f"`{written}` has the architecture `{name}`", f"mechdsl reads {known}")
    return cast("Architecture", name)


def site_of_hook(hook: str) -> tuple[str, int] | None:
    """Return the site and layer that a hook point of TransformerLens names; None if unknown.

    `blocks.3.hook_resid_post` is in a decoder, `encoder.3.hook_resid_post` in an encoder of text.
    """
    words = hook.split(".")
    stacks = {"blocks": "", "decoder": "", "encoder": " encoder"}
    if len(words) < 3 or words[0] not in stacks or not re.fullmatch("[0-9]{1,4}", words[1]):
        return None
    site = HOOK_SITES.get(".".join(words[2:]))
    return None if site is None else (f"{site}{stacks[words[0]]}", int(words[1]))


ENCODED_SITES = ("mlp_norm", "resid_mid")
"""Sites that a transcoder may encode: the input of the MLP after its norm, or before it."""

HOOK_SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    "mlp.hook_post": "mlp_hidden",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_norm",
    "mlp.hook_in": "mlp_norm",
    "ln1.hook_normalized": "attn_norm",
}
"""Hook points of TransformerLens, by site."""


# --- descriptions of features ---------------------------------------------------------------------


INDEX_KEYS, TEXT_KEYS = ("index", "feature"), ("description", "label")

_LABEL_EXAMPLE = 'a line is `{"index": 12, "description": "names of months"}`'


class FeatureLabels(Record):
    """Descriptions of features."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    texts: Mapping[int, str]
    """Feature → its description."""


def read_labels(path: Path, written: str) -> FeatureLabels:
    """Read a file of descriptions.

    Args:
        path: A JSON lines file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: If it is missing, has another form, or is too large.
    """
    try:
        size = path.stat()
        if size.st_size > limits.LABELS_FILE:
            raise UnreadableFile(
                f"`{written}` has {size.st_size:,} bytes, more than {limits.LABELS_FILE:,}",
                "keep the lines of this dictionary only",
            )
        return _read_labels(path, written, size.st_mtime_ns, size.st_size)
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise UnreadableFile(
            f"`{written}` can't be read: {said}",
            "name a JSON lines file; paths start from the folder of the `.mech` file",
        ) from None


@lru_cache(maxsize=16)
def _read_labels(path: Path, written: str, modified: int, size: int) -> FeatureLabels:
    content = path.read_bytes()
    texts: dict[int, str] = {}
    for feature, text in _label_entries(content, written):
        texts.setdefault(feature, text)
    if not texts:
        raise UnreadableFile(f"`{written}` describes no feature", _LABEL_EXAMPLE)
    return FeatureLabels(path, sha256(content).hexdigest(), texts)


def _label_entries(content: bytes, written: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = load_object(line)
            index = next(entry[key] for key in INDEX_KEYS if key in entry)
            text = next(entry[key] for key in TEXT_KEYS if key in entry)
            feature = int(index)
        except (ValueError, TypeError, StopIteration, OverflowError):
            raise UnreadableFile(
                f"line {number} of `{written}` has no description", _LABEL_EXAMPLE
            ) from None
        if isinstance(text, str) and text.strip():
            yield feature, " ".join(text.split())
