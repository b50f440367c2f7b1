"""Train the sparse autoencoders of `examples/systems`, on activations of zoo models.

They are top-k autoencoders (Gao et al. 2024, arXiv 2406.04093) with decoder rows of length 1, in
the layout of SAELens. Run it with `python -m zoo.dictionaries`; it takes about two minutes.
`python -m zoo.dictionaries induction-64 induction-128` trains some of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
    suffix: str = "features"
    """The second word of the folder's name."""
    seed: int = 0
    """Seed of the training."""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.suffix}"

    @property
    def folder(self) -> Path:
        return SYSTEMS / self.name


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


def lists(words: Sequence[str]) -> list[str]:
    """One to nine times the same item, and the question for their number."""
    items = [word for word in words if word.islower() and word.isalpha()]
    return [
        f"Part 1: {' '.join([item] * count)} Count 1:" for item in items for count in range(1, 10)
    ]


STREAM = Dictionary(
    "induction", "model.layers.0", False, "blocks.0.hook_resid_post", repeats, 64, 8, "64"
)
# The same seed would start dictionaries of different sizes from the same directions.
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
    STREAM,
    replace(STREAM, features=128, suffix="128", seed=1),
    replace(STREAM, features=256, suffix="256", seed=2),
    Dictionary("counting", "model.layers.2", False, "blocks.2.hook_resid_post", lists, 128, 8),
    Dictionary("succession", "model.layers.0", False, "blocks.0.hook_resid_post", numerals, 28, 3),
)


@cache
def activations(
    name: str, module: str, of_input: bool, texts: Callable[[Sequence[str]], list[str]]
) -> Tensor:
    """Return [token, width]: the vectors at all tokens of the training texts but the first.

    Args:
        name: Name of the zoo model.
        module: Path of the module whose input or output is read.
        of_input: Whether to read the input.
        texts: Makes the training texts, from the words of the model.
    """
    path = ROOT / "mechdsl" / "zoo" / name
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    special = set(tokenizer.all_special_tokens)
    words = sorted(word for word in tokenizer.get_vocab() if word not in special)
    found: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor | tuple[Tensor]) -> None:
        vectors = given[0] if of_input else out[0] if isinstance(out, tuple) else out
        found.append(vectors[0, 1:])

    with model.get_submodule(module).register_forward_hook(keep), torch.inference_mode():
        for text in texts([word.strip("▁Ġ") for word in words]):
            model(tokenizer(text, return_tensors="pt").input_ids)
    return torch.cat(found).clone()


def training_vectors(of: Dictionary) -> Tensor:
    """Return [vector, width]: the vectors that a dictionary is trained on."""
    return activations(of.model, of.module, of.of_input, of.texts)


def train(vectors: Tensor, features: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Train an autoencoder.

    Args:
        vectors: [vector, width].
        features: Number of features.
        k: Features that are active for a vector.
        seed: Seed of the first weights and of the batches.

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


def unexplained(vectors: Tensor, weights: Mapping[str, Tensor], k: int) -> float:
    """Return the share of the variance that the dictionary doesn't explain."""
    rest = vectors - encode(vectors, weights, k) @ weights["W_dec"] - weights["b_dec"]
    return float(rest.square().sum() / (vectors - vectors.mean(0)).square().sum())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="folders to write; by default all")
    names = parser.parse_args().names
    for of in DICTIONARIES:
        if names and of.name not in names:
            continue
        vectors = training_vectors(of)
        weights = train(vectors, of.features, of.k, of.seed)
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
        (of.folder / "sae_weights.safetensors").chmod(0o644)
        (of.folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        kept = encode(vectors, weights, of.k)
        share = 1 - unexplained(vectors, weights, of.k)
        alive = int((kept > 0).any(0).sum())
        print(f"{of.name}: {share:.3f} of the variance, {alive} of {of.features} active")


if __name__ == "__main__":
    main()
