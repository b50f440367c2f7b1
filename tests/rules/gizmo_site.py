"""Sites that are defined outside the package, by one entry each."""

from __future__ import annotations

from mechdsl.vocab.sites import site

site(
    "attn_proj",
    ("layer",),
    "d_model",
    "inside",
    "middle",
    52,
    "what the output projection returns, before any norm behind it",
    output_of="output",
)
site(
    "mlp_proj",
    ("layer",),
    "d_model",
    "inside",
    "in_mlp",
    99,
    "what the MLP's last map returns, before any norm behind it",
    output_of="down",
)
