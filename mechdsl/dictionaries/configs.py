"""Entries of the configurations of dictionaries that mechdsl reads.

pydantic models take a while to build, so this module is imported on use.
"""

from __future__ import annotations

from pydantic import AliasChoices, Field

from mechdsl.base.side_files import Count, Finite, SideFile


class SaeLensFacts(SideFile):
    """Entries of SAELens, in `metadata` since its version 6."""

    model_name: str | None = None
    hook: str | None = Field(default=None, validation_alias=AliasChoices("hook_name", "hook_point"))
    hook_out: str | None = Field(
        default=None, validation_alias=AliasChoices("hook_name_out", "out_hook_point")
    )
    factor: Finite | None = Field(
        default=None, validation_alias=AliasChoices("scaling_factor", "norm_scaling_factor")
    )


class ActivationArguments(SideFile):
    k: Count | None = None


class SaeLensConfig(SaeLensFacts):
    """`cfg.json` of SAELens."""

    architecture: str = "standard"
    activation: str | None = Field(
        default=None, validation_alias=AliasChoices("activation_fn", "activation_fn_str")
    )
    activation_fn_kwargs: ActivationArguments | None = None
    metadata: SaeLensFacts | None = None
    d_in: Count | None = None
    d_sae: Count | None = None
    d_out: Count | None = None
    k: Count | None = None
    normalize_activations: str | bool | None = None
    apply_b_dec_to_input: bool | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    residual_threshold: Finite = Field(1e-2, ge=0)
    max_iterations: Count | None = None
    stop_on_duplicate_support: bool = True
    sae_diff_type: str = "topk"
    kval_topk: Count | None = None
    n_attn_layers: Count = 1
    n_heads: Count = 8
    bottleneck_factor: Count = 64
    tied_weights: bool = True
    activation_normalization_factor: Finite = 1.0


class SparsifyConfig(SideFile):
    """`cfg.json` of sparsify (EleutherAI)."""

    activation: str = "topk"
    signed: bool = False
    multi_topk: bool = False
    k: Count
    transcode: bool = False
    skip_connection: bool = False
    d_in: Count | None = None
    num_latents: int | None = Field(default=None, ge=0)
    """0: a multiple of `d_in`."""


class CrossLayerConfig(SideFile):
    """`config.yaml` of a cross-layer transcoder in circuit-tracer's layout."""

    feature_input_hook: str | None = None
    model_name: str | None = None
