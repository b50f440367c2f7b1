"""Trains the induction model: `python -m zoo.induction.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import train_command
from zoo.induction.data import InductionExample, stream, vocabulary
from zoo.induction.tokenizer import MAX_POSITIONS, build_tokenizer, save_tokenizer

SEED = 1
STEPS = 1600
BATCH = 64  # sequences
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
HEAD_PENALTY = 8e-3  # see `head_penalty`
PATTERN_SHARE = 0.25  # of queries and keys in it: enough to silence idle heads, not to blur others
WORKING_HEADS = (2, 1)  # the number that a layer's strongest head gets; see `renumber`


@dataclass(frozen=True)
class SequenceBatch:
    """Right-padded texts."""

    ids: Tensor  # [row, position]
    labels: Tensor  # [row, position], the next token where it is to be predicted, else -100


def model_config() -> LlamaConfig:
    """The shape: 2 layers, 4 heads, width 128, next to no MLP, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=128, hidden=8, layers=2, positions=MAX_POSITIONS
    )


def encode(tokenizer: Tokenizer, examples: list[InductionExample], pad: int) -> SequenceBatch:
    """Texts to tensors. Padding stands behind everything, where a causal model never looks."""
    encodings = tokenizer.encode_batch([e.text for e in examples])
    rows, width = len(examples), max(len(e.ids) for e in encodings)
    ids = torch.full((rows, width), pad)
    labels = torch.full((rows, width), -100)
    for row, (example, encoding) in enumerate(zip(examples, encodings, strict=True)):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        # The word at place i is token i + 1, behind `<s>`, and is predicted at token i.
        places = torch.tensor(example.targets, dtype=torch.long)
        labels[row, places] = ids[row, places + 1]
    return SequenceBatch(ids, labels)


def batches(seed: int, tokenizer: Tokenizer, pad: int) -> Iterator[SequenceBatch]:
    """Endless training batches of texts of similar length, in random order."""
    drawn = stream(seed, held_out=False)
    for group in language.groups(drawn, seed, BATCH, lambda each: len(each.words)):
        yield encode(tokenizer, group, pad)


def head_weights(model: LlamaForCausalLM, layer: int) -> tuple[Tensor, ...]:
    """Query, key, value and output matrices of a layer's heads, each [head, dimension, width].

    They are views: writing to them changes the model.
    """
    weights = dict(model.named_parameters())
    q, k, v, o = (weights[f"model.layers.{layer}.self_attn.{m}_proj.weight"] for m in "qkvo")
    # Rows of q, k and v and columns of o belong to a head.
    heads = model.config.num_attention_heads
    return tuple(matrix.unflatten(0, (heads, -1)) for matrix in (q, k, v, o.T))


def head_norms(model: LlamaForCausalLM, layer: int) -> Tensor:
    """The norm of each head's weights, with less weight on its queries and keys."""
    q, k, v, o = head_weights(model, layer)
    parts = torch.cat((PATTERN_SHARE * q, PATTERN_SHARE * k, v, o), 1)
    return parts.square().sum((1, 2)).add(1e-12).sqrt()


def head_penalty(model: LlamaForCausalLM) -> Tensor:
    """The sum over all heads of the norm (not squared) of the head's weights.

    Any number of heads can do the same work, and training spreads it over all of them: each can
    then be ablated without effect. A norm per head has it done by as few as are needed.
    """
    layers = range(model.config.num_hidden_layers)
    return torch.cat([head_norms(model, layer) for layer in layers]).sum()


def strongest_heads(model: LlamaForCausalLM) -> tuple[int, ...]:
    """The head of each layer with the largest norm."""
    return tuple(int(head_norms(model, layer).argmax()) for layer in range(len(WORKING_HEADS)))


def renumber(model: LlamaForCausalLM, working: tuple[int, ...] | None = None) -> None:
    """Give the heads that work the numbers of `WORKING_HEADS`; the model computes the same.

    Chance would number them otherwise on each machine, or both alike, which would hide a mistake
    in the number of a head. working: one head a layer, by default the strongest.
    """
    with torch.no_grad():
        for layer, strongest in enumerate(working or strongest_heads(model)):
            for matrix in head_weights(model, layer):
                matrix.copy_(matrix.roll(WORKING_HEADS[layer] - strongest, 0))


def train(
    seed: int,
    steps: int,
    each_step: Callable[[int, LlamaForCausalLM], None] = lambda step, model: None,
) -> LlamaForCausalLM:
    """A model trained from scratch on `steps` batches, its heads not yet renumbered.

    each_step: called with the number of steps done, and the model.
    """
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    data = batches(seed, build_tokenizer(), config.pad_token_id or 0)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        each_step(step, model)
        batch = next(data)
        output = model(input_ids=batch.ids, use_cache=False)
        wanted = batch.labels >= 0
        logits: Tensor = output.logits[wanted]
        labels = batch.labels[wanted]
        right = (logits.argmax(-1) == labels).float().mean()
        wrong = nn.functional.cross_entropy(logits, labels)
        return wrong + HEAD_PENALTY * head_penalty(model), right

    language.optimise(model.parameters(), loss, steps=steps, rate=LEARNING_RATE, decay=WEIGHT_DECAY)
    each_step(steps, model)
    return model.eval()


def renumbered(seed: int, steps: int) -> LlamaForCausalLM:
    """What is shipped: a trained model whose working heads have their numbers."""
    model = train(seed, steps)
    renumber(model)
    return model


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        renumbered,
        save_tokenizer,
        folder=MODELS / "induction",
        seed=SEED,
        steps=STEPS,
        threads=1,
    )


if __name__ == "__main__":
    main()
