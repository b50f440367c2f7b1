"""Try architectures without a table: `python -m tests.families.unlisted [NAME…] [--write]`.

Every causal language model and every model of images and text of the installed transformers that
the tables lack is built with a small config, and loaded. Prints a line for each; `--write` writes
them to `docs/models.md`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto import modeling_auto

from mechdsl.loading.loader import adopt_model

from . import tables

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TITLE = "## Architectures without a table"
INTRO = f"""{TITLE}

These architectures of the installed transformers have no table of sites, so no reference of their
own. Each is built with a small random config and loaded. `loaded` means that the checks of loading
passed, for prompts of text: mechdsl compares what it finds in the modules with what the model
computes. `not tried` means that a small model can't be built from the default config without
knowing the architecture, or needs another package. `python -m tests.families.unlisted` writes these
rows.

"""
LARGEST = 20_000_000
"""Weights of a model that is tried."""
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "projector_hidden_size"), 32),
    **dict.fromkeys(("out_hidden_size", "image_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "patch_size"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "sliding_window"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim"), 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_hidden_layers", "mm_tokens_per_image"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "depth"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 128,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
}


@dataclass(frozen=True)
class Tried:
    """The outcome of loading one architecture."""

    name: str
    outcome: str
    """`loaded`, `refused` or `not tried`."""
    reason: str


def unlisted() -> dict[str, Any]:
    """The class that builds each architecture without a table, by model type."""
    listed = {row.name.partition("/")[0] for row in tables.every()}
    kinds = {
        transformers.AutoModelForImageTextToText: (
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        ),
        transformers.AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    every = {name: auto for auto, names in kinds.items() for name in names}
    return {name: every[name] for name in sorted(every) if name not in listed}


def shrink(config: Any) -> None:
    """Make a config and those in it small, in place."""
    parts = vars(config)
    for key, value in list(parts.items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif key == "rope_parameters" and isinstance(value, dict):
            value["mrope_section"] = [2, 1, 1]
            value.update({"partial_rotary_factor": 1.0} if "partial_rotary_factor" in value else {})
        elif key.endswith("_types") and isinstance(value, (list, tuple)):
            setattr(config, key, list(value)[:4])
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, SMALL[key])
    if parts.get("kv_lora_rank") is not None:  # latent attention has as many keys as queries
        config.num_key_value_heads = SMALL["num_attention_heads"]
        if "head_dim" in parts:  # the width that rotary embeddings turn
            config.head_dim = SMALL["qk_rope_head_dim"]
    if parts.get("sliding_window", 0) is None:
        config.sliding_window = SMALL["sliding_window"]


def attempt(name: str, auto: Any) -> Tried:
    """Build and load one architecture."""
    torch.manual_seed(0)
    module = None
    try:
        config = transformers.AutoConfig.for_model(name)
        shrink(config)
        with torch.device("meta"):
            weights = sum(each.numel() for each in auto.from_config(config).parameters())
        if weights > LARGEST:
            return Tried(name, "not tried", "its sizes have other names")
        module = auto.from_config(config).eval()
        with torch.no_grad():
            module(input_ids=torch.arange(3, 9)[None])
    except (TypeError, ValueError) as error:  # it needs images, which loading reports
        if module is None:
            return Tried(name, "not tried", f"no small config: {type(error).__name__}")
    except Exception as error:  # the default config of an unknown architecture may raise anything
        reason = "needs a package" if isinstance(error, ImportError) else "no small config"
        return Tried(name, "not tried", f"{reason}: {type(error).__name__}")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    model, problems = adopt_model("m", module, words)
    if model is None:
        problem = problems[0]
        cause = getattr(problem, "reason", "")
        return Tried(name, "refused", ": ".join(filter(None, (problem.message, cause))))
    notes = [problem.message for problem in problems]
    heads = "heads and neurons" if "z" in model.shape.sites else "sublayers"
    return Tried(name, "loaded", "; ".join([heads, *notes]))


def attempts(names: Sequence[str]) -> Iterator[Tried]:
    """Try some architectures, or all without a table."""
    transformers.logging.set_verbosity_error()
    for name, auto in unlisted().items():
        if not names or name in names:
            yield attempt(name, auto)


def section(tried: Sequence[Tried]) -> str:
    """The section of the page."""
    lines = ["| architecture | outcome | sites, or reason |", "| --- | --- | --- |"]
    for each in tried:
        reason = re.sub(r"`m` (\(\w+\):? ?)?", "", each.reason).replace("|", "\\|")
        lines.append(f"| `{each.name}` | {each.outcome} | {' '.join(reason.split())[:240]} |")
    return INTRO + "\n".join(lines) + "\n"


def written_section() -> str:
    """The section as it stands on the page."""
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index(TITLE)
    return text[begin : text.index("\n## ", begin) + 1].rstrip() + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.families.unlisted", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    tried: list[Tried] = []
    for each in attempts(options.names):
        tried.append(each)
        print(f"{each.name}: {each.outcome}: {each.reason}", flush=True)
    if options.write and not options.names:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(written_section(), section(tried)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
