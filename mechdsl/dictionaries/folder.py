"""Facts about a dictionary on disk, read without torch.

Layouts: folders of SAELens (`cfg.json`, `sae_weights.safetensors`), folders of sparsify
(`cfg.json`, `sae.safetensors`), and a safetensors file with `W_enc`, `W_dec` and biases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

from mechdsl.base import limits
from mechdsl.base.records import Record, record
from mechdsl.base.safetensors_files import SafetensorsFile, UnreadableFile, inspect_safetensors
from mechdsl.base.text import name_list

Layout = Literal["SAELens", "sparsify", "tensors"]

Architecture = Literal[
    "standard", "topk", "jumprelu", "gated", "matching_pursuit", "transcoder", "skip_transcoder"
]

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

CONFIG_FILE = "cfg.json"

WEIGHT_FILES: Mapping[Layout, str] = {
    "SAELens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
}

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".npz")
"""Endings of files that may run code when they are loaded, or that need another reader."""

CONVERSION = (
    'convert the file where you trust it: `python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('FILE', weights_only=True).items()}, "
    "'FILE.safetensors')\"`"
)

TENSORS: Mapping[Architecture, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
    "matching_pursuit": ("W_dec", "b_dec"),
    "transcoder": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"),
}
"""Tensors of each architecture."""

TRANSCODERS: tuple[Architecture, ...] = ("transcoder", "skip_transcoder")

SAVED_AS: Mapping[str, Architecture] = {
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "jumprelu_transcoder": "transcoder",
}
"""Architectures whose files contain a different one for inference."""


@record
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
    tensors: tuple[str, ...]
    k: int | None = None
    """Number of active features, for `topk`."""
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
    model: str | None = None
    """Name of the model that it was trained on, if recorded."""
    hook: str | None = None
    """Name of the hook point that it was trained at, if recorded: `blocks.8.hook_resid_pre`."""


def read_dictionary(path: Path, written: str) -> DictionaryFile:
    """Read the facts of a dictionary.

    Args:
        path: A folder, or a safetensors file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: If it is missing, has another form, or is too large.
    """
    if path.suffix.lower() in PICKLES:
        raise UnreadableFile(
            f"`{written}` is a pickle, which may run code when it is loaded",
            CONVERSION.replace("FILE", path.name),
        )
    if path.is_dir():
        return _read_folder(path, written)
    if path.suffix == ".safetensors":
        return _read_tensors(path, written)
    reason = "is no safetensors file" if path.exists() else "does not exist"
    raise UnreadableFile(
        f"`{written}` {reason}",
        "name a folder with `cfg.json` and `sae_weights.safetensors`, or a `.safetensors` file; "
        "paths start from the folder of the `.mech` file",
    )


def _read_folder(path: Path, written: str) -> DictionaryFile:
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
    try:
        content = config_path.read_bytes()
        config = json.loads(content)
        assert isinstance(config, dict)
    except FileNotFoundError:
        raise UnreadableFile(
            f"`{written}` has no `{CONFIG_FILE}`", "copy the whole folder of the dictionary"
        ) from None
    except (OSError, ValueError, AssertionError) as error:
        raise UnreadableFile(
            f"`{written}/{CONFIG_FILE}` can't be read: {error or 'it is no JSON object'}",
            "copy the folder again",
        ) from None
    weights = path / WEIGHT_FILES[layout]
    file = inspect_safetensors(
        weights, f"{written}/{weights.name}", limits.DICTIONARY_FILE, "use a smaller dictionary"
    )
    digest = sha256(content + file.digest.encode()).hexdigest()
    read = _of_sae_lens if layout == "SAELens" else _of_sparsify
    return read(cast("dict[str, Any]", config), file, digest, written)


def _of_sae_lens(
    config: dict[str, Any], file: SafetensorsFile, digest: str, written: str
) -> DictionaryFile:
    """Interpret the configuration of SAELens, of version 6 or before."""
    metadata = config.get("metadata")
    facts = {**config, **(cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {})}
    kwargs = config.get("activation_fn_kwargs")
    arguments = cast("dict[str, Any]", kwargs) if isinstance(kwargs, dict) else {}
    name = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    k = config.get("k", arguments.get("k"))
    if name == "standard" and activation == "topk":
        name = "topk"
    elif activation not in ("relu", "topk"):
        raise UnreadableFile(
            f"`{written}` has the activation function `{activation}`",
            "mechdsl reads `relu` and `topk`",
        )
    architecture = _architecture(SAVED_AS.get(name, name), written)
    normalization = config.get("normalize_activations", "none")
    if isinstance(normalization, bool) or normalization is None:
        normalization = "expected_average_only_in" if normalization else "none"
    if normalization == "expected_average_only_in":
        factor = facts.get("scaling_factor", facts.get("norm_scaling_factor"))
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
    if architecture == "topk":
        k = _count(k, "k", written)
    transcodes = architecture in TRANSCODERS
    hook = facts.get("hook_name", facts.get("hook_point"))
    steps = config.get("max_iterations")
    return _checked(
        file,
        written,
        layout="SAELens",
        architecture=architecture,
        digest=digest,
        k=k if architecture == "topk" else None,
        subtracts_bias=bool(config.get("apply_b_dec_to_input", True)) and not transcodes,
        normalization=normalization,
        scales_by_decoder=bool(config.get("rescale_acts_by_decoder_norm", False)),
        residual_threshold=float(config.get("residual_threshold", 1e-2)),
        most_steps=None if steps is None else _count(steps, "max_iterations", written),
        stops_on_same_support=bool(config.get("stop_on_duplicate_support", True)),
        model=_text(facts.get("model_name")),
        hook=_text(hook),
    )


def _of_sparsify(
    config: dict[str, Any], file: SafetensorsFile, digest: str, written: str
) -> DictionaryFile:
    """Interpret the configuration of sparsify (EleutherAI)."""
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed", False) or config.get("multi_topk", False):
        said = "signed" if config.get("signed", False) else activation
        raise UnreadableFile(
            f"`{written}` is a `{said}` dictionary of sparsify", "mechdsl reads its `topk` ones"
        )
    transcodes = bool(config.get("transcode", False)) or bool(config.get("skip_connection", False))
    if transcodes:
        raise UnreadableFile(
            f"`{written}` is a transcoder of sparsify", "mechdsl reads transcoders of SAELens"
        )
    return _checked(
        file,
        written,
        layout="sparsify",
        architecture="topk",
        digest=digest,
        k=_count(config.get("k"), "k", written),
        subtracts_bias=True,
    )


def _read_tensors(path: Path, written: str) -> DictionaryFile:
    """Read a file of named tensors, as an SAE with ReLU or JumpReLU."""
    file = inspect_safetensors(path, written, limits.DICTIONARY_FILE, "use a smaller dictionary")
    architecture = "jumprelu" if "threshold" in file.shapes else "standard"
    return _checked(file, written, layout="tensors", architecture=architecture, digest=file.digest)


SPARSIFY_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def _checked(file: SafetensorsFile, written: str, **facts: Any) -> DictionaryFile:
    """Check the shapes of the tensors, and create the record."""
    architecture: Architecture = facts["architecture"]
    names = SPARSIFY_NAMES if facts["layout"] == "sparsify" else {}
    wanted = [names.get(name, name) for name in TENSORS[architecture]]
    missing = [name for name in wanted if name not in file.shapes]
    if missing:
        known = name_list(sorted(file.shapes)) or "none"
        raise UnreadableFile(
            f"`{written}` has no tensor `{missing[0]}`, which its architecture "
            f"`{architecture}` needs",
            f"it has {known}",
        )
    decoder = file.shapes["W_dec"]
    if len(decoder) != 2:
        raise UnreadableFile(
            f"`W_dec` of `{written}` has the shape {list(decoder)}", "it must be [feature, width]"
        )
    features, out = decoder
    encoder = file.shapes.get(names.get("W_enc", "W_enc"), (out, features))
    if facts["layout"] == "sparsify":
        encoder = encoder[::-1]
    width = encoder[0] if len(encoder) == 2 else 0
    expected: dict[str, tuple[int, ...]] = {
        "W_enc": (width, features),
        "W_dec": (features, out),
        "b_dec": (out,),
        "W_skip": (out, width),
    }
    for name in TENSORS[architecture]:
        shape = encoder if name == "W_enc" else file.shapes[names.get(name, name)]
        there = expected.get(name, (features,))
        if shape != there:
            raise UnreadableFile(
                f"`{names.get(name, name)}` of `{written}` has the shape {list(shape)}, not "
                f"{list(there)}",
                "all tensors must have the same number of features and widths",
            )
    if architecture not in TRANSCODERS and width != out:
        raise UnreadableFile(
            f"`{written}` reads vectors of {width} numbers and writes {out}",
            "only a transcoder does; set `architecture` in its `cfg.json`",
        )
    return DictionaryFile(
        path=file.path,
        features=features,
        width_in=width,
        width_out=out,
        dtype=file.dtypes["W_dec"],
        weights_digest=file.digest,
        tensors=tuple(wanted),
        **facts,
    )


def _architecture(name: str, written: str) -> Architecture:
    if name not in TENSORS:
        known = name_list([*TENSORS, *SAVED_AS])
        raise UnreadableFile(f"`{written}` has the architecture `{name}`", f"mechdsl reads {known}")
    return cast("Architecture", name)


def _count(value: object, name: str, written: str) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
        raise UnreadableFile(
            f"`{name}` of `{written}` is {value!r}", "it must be a whole number of at least 1"
        )
    return int(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def site_of_hook(hook: str) -> tuple[str, int] | None:
    """Return the site and layer that a hook point of TransformerLens names; None if unknown."""
    words = hook.split(".")
    if len(words) < 3 or words[0] != "blocks" or not words[1].isdigit():
        return None
    site = HOOK_SITES.get(".".join(words[2:]))
    return None if site is None else (site, int(words[1]))


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
    "ln1.hook_normalized": "attn_norm",
}
"""Hook points of TransformerLens, by site."""
