"""Write `tests/dictionaries/data`: small dictionaries of SAELens, and SAELens's results.

Run it in a separate environment, with `sae-lens` 6.54.12, `transformer-lens` 2 or 3 and torch:
`python tests/dictionaries/make_fixtures.py`. The tests read the written files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sae_lens  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "data"
WIDTH, FEATURES, OUT, ROWS = 8, 24, 6, 12
COMMON = {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", "device": "cpu"}

CASES = {
    "standard": {"architecture": "standard"},
    "standard without bias": {"architecture": "standard", "apply_b_dec_to_input": False},
    "layer norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "constant norm": {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    "topk": {"architecture": "topk", "k": 5},
    "topk by decoder norm": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "matching pursuit": {"architecture": "matching_pursuit", "residual_threshold": 0.3},
    "matching pursuit steps": {
        "architecture": "matching_pursuit",
        "max_iterations": 3,
        "stop_on_duplicate_support": False,
        "residual_threshold": 0.0,
        "apply_b_dec_to_input": False,
    },
    "transcoder": {"architecture": "transcoder", "d_out": OUT, "apply_b_dec_to_input": False},
    "skip transcoder": {
        "architecture": "skip_transcoder",
        "d_out": OUT,
        "apply_b_dec_to_input": False,
    },
    "jumprelu transcoder": {
        "architecture": "jumprelu_transcoder",
        "d_out": OUT,
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
    },
    "jumprelu skip transcoder": {
        "architecture": "jumprelu_skip_transcoder",
        "d_out": WIDTH,
        "apply_b_dec_to_input": False,
    },
    "abstopk": {"architecture": "abstopk", "k": 5},
    "temporal": {
        "architecture": "temporal",
        "kval_topk": 5,
        "n_heads": 2,
        "bottleneck_factor": 3,
        "n_attn_layers": 2,
    },
    "temporal relu": {
        "architecture": "temporal",
        "sae_diff_type": "relu",
        "tied_weights": False,
        "n_heads": 2,
        "bottleneck_factor": 3,
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.4,
        "apply_b_dec_to_input": False,
    },
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    vectors = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.3
    for number, (name, facts) in enumerate(CASES.items()):
        torch.manual_seed(number + 1)
        config = {**COMMON, **facts, "metadata": {"model_name": "toy", "hook_name": HOOK}}
        sae = sae_lens.SAE.from_dict(config)
        with torch.no_grad():
            for weight in sae.parameters():
                weight.copy_(torch.randn_like(weight) * 0.6)
            if hasattr(sae, "threshold"):
                sae.threshold.copy_(sae.threshold.abs())
        folder = FOLDER / name.replace(" ", "-")
        sae.save_model(folder)
        with torch.no_grad():
            if facts["architecture"] == "temporal":  # the vectors of one row
                features, decoded = sae.encode(vectors[None])[0], sae(vectors[None])[0]
                arrays = {"vectors": vectors, "features": features, "decoded": decoded}
                save(arrays, folder)
                continue
            features = sae.encode(vectors)
            if "skip_transcoder" in str(facts["architecture"]):
                decoded = sae(vectors)
            else:
                decoded = sae.decode(features)
        arrays = {"vectors": vectors, "features": features, "decoded": decoded}
        save(arrays, folder)


def save(arrays: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({k: v.contiguous() for k, v in arrays.items()}, folder / "expected.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")


HOOK = "blocks.1.hook_resid_post"

if __name__ == "__main__":
    main()
