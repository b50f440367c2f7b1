"""Names of sites in other tools: TransformerLens, transformers, nnsight and pyvene."""

from __future__ import annotations

import re

_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_q": "q",
    "hook_k": "k",
    "hook_v": "v",
    "hook_rot_q": "q_rot",
    "hook_rot_k": "k_rot",
    "hook_z": "z",
    "hook_result": "head_out",
    "hook_pattern": "pattern",
    "hook_attn_scores": "scores",
    "hook_embed": "embed",
    "hook_post": "mlp_hidden",
    "ln1.hook_normalized": "attn_norm",
    "ln2.hook_normalized": "mlp_norm",
    "ln_final.hook_normalized": "final_norm",
}
"""TransformerLens hook → site."""

_MODULES = {
    "": "resid_post",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
    "mlp.act": "mlp_hidden",
    "ln_1": "attn_norm",
    "input_layernorm": "attn_norm",
    "ln_2": "mlp_norm",
    "post_attention_layernorm": "mlp_norm",
    "wte": "embed",
    "embed_tokens": "embed",
    "ln_f": "final_norm",
    "norm": "final_norm",
    "lm_head": "logits",
}
"""Module inside a block or a model of transformers → site of its output."""

_WORDS = {
    "block_input": "resid_pre",
    "block_output": "resid_post",
    "layer_output": "resid_post",
    "mlp_activation": "mlp_hidden",
    "mlp_activations": "mlp_hidden",
    "mlp_post": "mlp_hidden",
    "mlp_act": "mlp_hidden",
    "mlp_output": "mlp_out",
    "attention_output": "attn_out",
    "attention_value_output": "z",
    "head_attention_value_output": "z",
    "query_output": "q",
    "head_query_output": "q",
    "key_output": "k",
    "head_key_output": "k",
    "value_output": "v",
    "head_value_output": "v",
    "resid": "resid_post",
    "residual": "resid_post",
    "residual_stream": "resid_post",
    "hidden_states": "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "attn_scores": "scores",
    "attention_scores": "scores",
    "attn_pattern": "pattern",
    "attention_pattern": "pattern",
    "attn_weights": "pattern",
    "attention_weights": "pattern",
    "attn_probs": "pattern",
    "result": "head_out",
    "ln_final": "final_norm",
    "embedding": "embed",
    "embeddings": "embed",
    "unembed": "logits",
    "projector": "embed",
    "multi_modal_projector": "embed",
}
"""Component of pyvene, or a word of papers → site."""

METRIC_NAMES = {
    "python": 'python("functions.py:loss")',
    "accuracy": "correct(answer)",
    "acc": "correct(answer)",
    "top1": "correct(answer)",
    "logit_diff": "logit(answer) - logit(wrong)",
    "logit_difference": "logit(answer) - logit(wrong)",
    "probability": "prob(answer)",
    "probs": "prob(answer)",
    "log_prob": "logprob(answer)",
    "log_probs": "logprob(answer)",
    "kl_div": "kl(clean)",
    "kl_divergence": "kl(clean)",
    "mae": "absolute_error(1..9)",
    "mean_absolute_error": "absolute_error(1..9)",
    "cross_entropy": "loss",
    "ce_loss": "loss",
    "perplexity": "loss",
    "nll": "-logprob(answer)",
    "nll_loss": "-logprob(answer)",
    "p": "prob(answer)",
    "P": "prob(answer)",
    "softmax": "prob(answer)",
    "proba": "prob(answer)",
    "logits": "logit(answer)",
    "logprobs": "logprob(answer)",
    "log_softmax": "logprob(answer)",
}
"""Metric of other libraries → metric of mechdsl."""

TOOLS = ("transformer lens", "transformerlens", "nnsight", "pyvene", "baukit", "transformers")

TERMS = {
    "ablation": "ablate",
    "acdc": "using",
    "activation": "value",
    "activation patching": "patch",
    "add hook": "patch",
    "attention knockout": "block",
    "attention pattern": "attention",
    "attribution": "using",
    "attribution patching": "using",
    "cache": "save",
    "causal mediation": "patch",
    "causal scrubbing": "resample",
    "causal tracing": "patch",
    "checkpoint": "local",
    "ci": "confidence",
    "circuit": "circles",
    "confidence interval": "confidence",
    "contrast": "mean_difference",
    "contrastive": "mean_difference",
    "corruption": "corrupt",
    "dataset": "rows",
    "denoising": "patch",
    "difference in means": "mean_difference",
    "direct logit attribution": "direct_logit",
    "direct path": "path",
    "dla": "direct_logit",
    "edge": "path",
    "figure": "report",
    "finetuned": "local",
    "function vector": "direction",
    "generation": "generate",
    "gradients": "gradient",
    "hook": "patch",
    "hf": "model",
    "huggingface": "model",
    "indirect effect": "recovery",
    "interchange intervention": "patch",
    "knock out": "ablate",
    "knockout": "block",
    "linear probe": "probe",
    "loop": "for",
    "metrics": "metric",
    "mlp neuron": "neurons",
    "noising": "patch",
    "p value": "test",
    "patching": "patch",
    "permutation test": "flips",
    "plot": "report",
    "pvalue": "test",
    "random control": "against",
    "resample ablation": "resample",
    "results": "report",
    "run with cache": "save",
    "run with hooks": "patch",
    "seeds": "seed",
    "significance": "test",
    "steer": "add",
    "steering": "add",
    "steering vector": "direction",
    "sweep": "for",
    "unembed": "logits",
    "zero ablation": "ablate",
    "mean ablation": "ablate",
}
"""Term of papers or other libraries, in lower case with spaces → word of the language."""

_WITHOUT_LAYER = frozenset({"embed", "final_norm", "logits"})

_SITES = frozenset(_HOOKS.values())

SITE_NAMES = "|".join(sorted(_SITES, key=len, reverse=True))
"""Pattern of the names of sites."""

_PER_HEAD = frozenset({"q", "k", "v", "q_rot", "k_rot", "z", "head_out", "pattern", "scores"})

_LISTS = frozenset({"layers", "layer", "blocks", "block", "resblocks", "h"})
"""Names of a model's list of blocks."""

SITE_WORDS = "|".join(map(re.escape, sorted({*_HOOKS, *_WORDS}, key=len, reverse=True)))
"""Pattern of the words that name a site in other tools."""

_READ = re.compile(r"\.(?:output|input)(?:\.0)?$")


def translate_path(path: str) -> str | None:
    """Return the site of a dotted path, such as `blocks.3.hook_resid_post`; None if it names none.

    A path without a layer names `layer *`.
    """
    dotted = re.sub(r"\[\s*(-?[0-9]+)\s*\]", r".\1", path)
    reads_input = re.search(r"\.input(?:\.0)?$", dotted) is not None
    parts = _READ.sub("", dotted).split(".")
    numbers = [n for n, part in enumerate(parts) if part.lstrip("-").isdigit()]
    tail = parts[numbers[0] + 1 :] if numbers else parts
    layer = parts[numbers[0]] if numbers else "*"
    outer = parts[: numbers[0]] if numbers else parts[:-1]
    if numbers and not tail and outer[-1] not in _LISTS:  # `resid_pre.2`
        kind = _HOOKS.get(outer[-1]) or _WORDS.get(outer[-1])
        kind = kind or (outer[-1] if outer[-1] in _SITES else None)
        if outer[-1] == "hidden_states":  # transformers counts the embeddings, too
            kind = "resid_pre"
    elif reads_input:
        kind = "resid_pre" if numbers and not tail else None
    else:
        kind = _kind_of(tail, inside=bool(numbers))
    stack = "vision " if any(part.startswith("vis") for part in outer) else ""
    return None if kind is None else _written(kind, f"layer {layer}", stack)


def _kind_of(tail: list[str], *, inside: bool) -> str | None:
    """Return the site of the last names of a path; `inside` a block, or outside every block."""
    whole, last = ".".join(tail), tail[-1] if tail else ""
    if inside:
        return _HOOKS.get(whole) or _HOOKS.get(last) or _MODULES.get(whole) or _MODULES.get(last)
    kind = _HOOKS.get(whole) or _HOOKS.get(last) or (_MODULES.get(last) if tail else None)
    outside = kind in _WITHOUT_LAYER or last in _HOOKS
    return kind if outside else None


def translate_word(word: str, rest: str = "") -> str | None:
    """Return the site that a single word of another tool names.

    Args:
        rest: The text after the word; an axis in it, such as `layer 3`, is kept.

    Returns:
        The site with its layer, such as `resid_post layer 3`; None for an unknown word.
    """
    kind = _HOOKS.get(word) or _WORDS.get(word)
    if kind is None:
        return None
    axis = re.match(r"(?:\s+stream\b)?\s+(layers?\s+[\w.*%]+(?:\s+heads?\s+[\w.*%]+)?)", rest)
    number = re.match(r"(?:\s+stream\b)?\s+([0-9]+)\b", rest)
    layer = axis[1] if axis else f"layer {number[1] if number else '*'}"
    return _written(kind, layer)


def _written(kind: str, layer: str, stack: str = "") -> str:
    """Return a site with its axes; `attn layer 3 head 2` names the output of the head."""
    if " head" in layer and kind not in _PER_HEAD:
        if kind == "attn_out":
            return f"head_out {stack}{layer}"
        layer = layer.partition(" head")[0]
    return f"{kind} {stack}".rstrip() if kind in _WITHOUT_LAYER else f"{kind} {stack}{layer}"
