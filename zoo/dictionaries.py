"""Train the sparse autoencoders of `examples/systems`, on activations of zoo models.

They are top-k autoencoders (Gao et al. 2024, arXiv 2406.04093) with decoder rows of length 1, in
the layout of SAELens. Run it with `python -m zoo.dictionaries [MODEL…]`; it takes about a minute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
SYSTEMS = ROOT / "examples" / "systems"
QUESTIONS = ROOT / "examples" / "data" / "questions.jsonl"
STEPS, BATCH, RATE = 4000, 512, 1e-3


@dataclass(frozen=True)
class Dictionary:
    """One autoencoder."""

    model: str
    """Name of the zoo model."""
    module: str
    """Path of the module whose input or output it encodes."""
    of_input: bool
    hook: str
    """The hook point, as TransformerLens names it."""
    texts: Callable[[Sequence[str]], list[str]]
    """Makes the training texts, from the words of the model."""
    features: int
    k: int

    @property
    def folder(self) -> Path:
        return SYSTEMS / f"{self.model}-features"


def questions(words: Sequence[str]) -> list[str]:
    """Questions with their advice, or a refusal."""
    found: list[str] = []
    for line in QUESTIONS.read_text("utf-8").splitlines():
        row = json.loads(line)
        reply = "i can not help with that ." if row["forbidden"] else row["advice"]
        found.append(f"user : how do i {row['verb']} the {row['thing']} ? bot : {reply}")
    return found


def repeats(words: Sequence[str]) -> list[str]:
    """Twelve words, the same again, and the beginning once more."""
    random = torch.Generator().manual_seed(0)
    found: list[str] = []
    for _ in range(3000):
        order: list[int] = torch.randperm(len(words), generator=random)[:12].tolist()
        half = [words[n] for n in order]
        cue = int(torch.randint(1, 11, (1,), generator=random))
        found.append(" ".join([*half, *half, *half[:cue]]))
    return found


def numerals(words: Sequence[str]) -> list[str]:
    """Each numeral alone, in order."""
    return sorted((word for word in words if word.isdigit()), key=int)


DICTIONARIES = (
    Dictionary("refusal", "model.layers.1", False, "blocks.1.hook_resid_post", questions, 384, 6),
    Dictionary(
        "induction",
        "model.layers.1.self_attn.o_proj",
        True,
        "blocks.1.attn.hook_z",
        repeats,
        512,
        8,
    ),
    Dictionary("succession", "model.layers.0", False, "blocks.0.hook_resid_post", numerals, 28, 3),
)


def activations(of: Dictionary) -> Tensor:
    """Return [token, width]: the vectors at all tokens of the training texts but the first."""
    path = ROOT / "mechdsl" / "zoo" / of.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    special = set(tokenizer.all_special_tokens)
    words = sorted(word for word in tokenizer.get_vocab() if word not in special)
    found: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor | tuple[Tensor]) -> None:
        vectors = given[0] if of.of_input else out[0] if isinstance(out, tuple) else out
        found.append(vectors[0, 1:])

    with model.get_submodule(of.module).register_forward_hook(keep), torch.inference_mode():
        for text in of.texts([word.strip("▁Ġ") for word in words]):
            model(tokenizer(text, return_tensors="pt").input_ids)
    return torch.cat(found).clone()


def train(vectors: Tensor, features: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Train an autoencoder.

    Args:
        vectors: [vector, width].
        features: Number of features.
        k: Features that are active for a vector.

    Returns:
        The tensors `W_enc` [width, features], `b_enc`, `W_dec` [features, width] and `b_dec`.
    """
    random = torch.Generator().manual_seed(seed)
    width = vectors.shape[1]
    start = torch.randn(features, width, generator=random)
    start = start / start.norm(dim=1, keepdim=True)
    weights = {
        "W_enc": start.T.clone(),
        "b_enc": torch.zeros(features),
        "W_dec": start,
        "b_dec": vectors.mean(0),
    }
    for each in weights.values():
        each.requires_grad_()
    optimiser = torch.optim.Adam(weights.values(), lr=RATE)
    seen = torch.zeros(features)
    for step in range(STEPS):
        x = vectors[torch.randint(len(vectors), (BATCH,), generator=random)]
        before = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        # A feature that hasn't been active for 200 steps takes part in every vector.
        idle = seen < step - 200
        top = before.topk(k, dim=1)
        kept = torch.zeros_like(before).scatter(1, top.indices, top.values.relu())
        made = kept @ weights["W_dec"] + weights["b_dec"]
        loss = (x - made).square().sum(1).mean()
        if idle.any():
            rest = (before * idle).relu() @ weights["W_dec"]
            loss = loss + (x - made.detach() - rest).square().sum(1).mean() / 32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen[(kept > 0).any(0)] = step
        with torch.no_grad():
            weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    return {name: each.detach().contiguous() for name, each in weights.items()}


def encode(vectors: Tensor, weights: Mapping[str, Tensor], k: int) -> Tensor:
    """Return [vector, feature]: the activations of the features that are among the top k."""
    before = (vectors - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    top = before.topk(k, dim=1)
    return torch.zeros_like(before).scatter(1, top.indices, top.values.relu())


def main(names: Sequence[str]) -> None:
    """Train the dictionaries of these models, by default of all."""
    for of in DICTIONARIES:
        if names and of.model not in names:
            continue
        vectors = activations(of)
        weights = train(vectors, of.features, of.k)
        config = {
            "architecture": "topk",
            "d_in": vectors.shape[1],
            "d_sae": of.features,
            "k": of.k,
            "dtype": "float32",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "metadata": {"hook_name": of.hook, "model_name": of.model},
        }
        of.folder.mkdir(exist_ok=True)
        save_file(weights, of.folder / "sae_weights.safetensors")
        (of.folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        kept = encode(vectors, weights, of.k)
        rest = vectors - kept @ weights["W_dec"] - weights["b_dec"]
        spread = (vectors - vectors.mean(0)).square().sum()
        share = 1 - float(rest.square().sum() / spread)
        alive = int((kept > 0).any(0).sum())
        print(f"{of.folder.name}: {share:.3f} of the variance, {alive} of {of.features} active")


if __name__ == "__main__":
    main(sys.argv[1:])
