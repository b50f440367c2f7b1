"""The keys of `config.json` that say how large a model is, as the families call them."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base import limits

LAYERS = (
    "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers",
    "n_layers", "depth", "decoder_num_hidden_layers",
)  # fmt: skip
HEADS = (
    "num_attention_heads", "n_head", "decoder_attention_heads", "num_heads", "n_heads",
    "attention_heads", "decoder_num_attention_heads",
)  # fmt: skip
KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "decoder_num_key_value_heads",
)  # fmt: skip
MODEL = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
HEAD_WIDTH = ("head_dim", "d_head", "d_kv", "kv_channels")
MLP = (
    "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size",
    "intermediate_size", "n_inner", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "d_ff", "dff",
    "hidden_dim",
)  # fmt: skip
TIMES = ("intermediate_multiple_size",)
VOCAB = ("vocab_size",)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
NARROW = ("embedding_size", "word_embed_proj_dim")
"""Widths of embeddings, in front of the stream and behind it, where that isn't the model's."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ALIKE = (
    LAYERS, HEADS, KV_HEADS, MODEL, HEAD_WIDTH, MLP, TIMES, VOCAB, POSITIONS, NARROW,
    EXPERTS,
)  # fmt: skip
"""Keys that say the same thing."""
MIXERS = (
    "mamba", "ssm", "state_size", "conv_L_cache", "linear_num_", "linear_attn", "lru_width",
    "rescale_every", "qk_dim_factor", "short_conv",
)  # fmt: skip
"""How keys begin that only configs of state-space, convolution or recurrent models have."""

COUNTED = (LAYERS, HEADS, KV_HEADS, MODEL, MLP, VOCAB)
"""Sizes that can't be 0; of the others, 0 says that there is none of its own."""

DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

OTHER = (
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "input_embedding_size",
    "output_embedding_size",
)  # fmt: skip
MOST: Mapping[str, int] = {
    **dict.fromkeys((*MODEL, *HEAD_WIDTH, *MLP, *VOCAB, *NARROW, *OTHER), limits.SIZE),
    **dict.fromkeys(TIMES, limits.LAYERS),
    **dict.fromkeys((*HEADS, *KV_HEADS), limits.HEADS),
    **dict.fromkeys(EXPERTS, limits.EXPERTS),
    **dict.fromkeys(LAYERS, limits.LAYERS),
}
"""The largest number that each key may have."""
