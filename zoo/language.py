"""Training and evaluation of the zoo's models of texts: what they have in common."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, words
from zoo.commands import Tally

T = TypeVar("T")
Span = tuple[int, int]  # from one character of the text up to another

SPECIAL: tuple[str, ...] = ("<s>", "<pad>", "<unk>")
WARM_UP = 150  # steps
POOL = 32
INDUCTION = MODELS / "induction"
INDUCTION_HEADS = (2, 1)  # of layers 0 and 1 of zoo("induction"), which do what it does


@dataclass(frozen=True)
class Text:
    """One text, without `<s>`.

    kind: its row in the table of accuracies. answers: the words that are asked, spans in
    characters. content: what is kept from training or not, however it is written.
    """

    text: str
    kind: str
    answers: tuple[Span, ...]
    content: str


TextT = TypeVar("TextT", bound=Text)


def is_held_out(content: str, share: float) -> bool:
    """A fixed share of all contents, by hash."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def llama_config(
    vocabulary: tuple[str, ...], *, width: int, hidden: int, layers: int, positions: int
) -> LlamaConfig:
    """Four heads, rotary positions, RMS norms, no biases anywhere. width: of the stream; hidden: of
    the MLPs; positions: tokens of the longest input."""
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=vocabulary.index("<s>"),
        pad_token_id=vocabulary.index("<pad>"),
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


@torch.no_grad()
def begin_with_induction(model: Any, layers: tuple[int, ...]) -> None:
    """Gives a new Llama of the same width the circuit of zoo("induction") to start from.

    Its head that attends to the token before goes to layer 0, the one that finds what stood behind
    the same token to each of `layers`. Words get the vectors of words there, by chance; those that
    are left get random ones like them.
    """
    source: Any = LlamaForCausalLM.from_pretrained(INDUCTION, dtype=torch.float32)
    first, count = len(SPECIAL), model.config.vocab_size - len(SPECIAL)
    chosen = torch.randperm(source.config.vocab_size - first)[:count]
    for of, to in (
        (source.model.embed_tokens.weight, model.model.embed_tokens.weight),
        (source.lm_head.weight, model.lm_head.weight),
    ):
        known: Tensor = of[first:]
        to[first:] = known.mean(0) + known.std() * torch.randn(count, known.shape[1])
        to[first : first + len(chosen)] = known[chosen]
        to[0] = of[0]  # <s>
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    for layer, of_layer in ((0, 0), *((each, 1) for each in layers)):
        _copy_head(source.model.layers[of_layer], model.model.layers[layer], of_layer)


def _copy_head(of: Any, to: Any, layer: int) -> None:
    """The head that works in this layer of zoo("induction"), and the norm in front of it."""
    to.input_layernorm.load_state_dict(of.input_layernorm.state_dict())
    size: int = of.self_attn.head_dim
    head = slice(INDUCTION_HEADS[layer] * size, (INDUCTION_HEADS[layer] + 1) * size)
    for part in ("q_proj", "k_proj", "v_proj"):
        getattr(to.self_attn, part).weight[head] = getattr(of.self_attn, part).weight[head]
    to.self_attn.o_proj.weight[:, head] = of.self_attn.o_proj.weight[:, head]


def build_tokenizer(
    vocabulary: tuple[str, ...], special: tuple[str, ...] = SPECIAL, end: str = ""
) -> Tokenizer:
    """Words and punctuation marks are tokens. end: the one behind every text, if one is."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return words.word_tokenizer(vocabulary, special, split, end)


@dataclass(frozen=True)
class TextBatch:
    """Right-padded texts."""

    ids: Tensor  # [row, position]
    labels: Tensor  # [row, position], the next token, -100 behind the text
    asked: Tensor  # [row, position], whether the next token is a word that is asked


def encode(tokenizer: Tokenizer, texts: list[Text], pad: int) -> TextBatch:
    """Texts to tensors. Padding stands behind everything, where a causal model never looks."""
    encodings = tokenizer.encode_batch([each.text for each in texts])
    rows, width = len(texts), max(len(e.ids) for e in encodings)
    ids = torch.full((rows, width), pad)
    labels = torch.full((rows, width), -100)
    asked = torch.zeros(rows, width, dtype=torch.bool)
    for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        length = len(encoding.ids)
        ids[row, :length] = torch.tensor(encoding.ids)
        labels[row, : length - 1] = ids[row, 1:length]
        for start, _ in text.answers:
            at = encoding.char_to_token(start)
            assert at is not None
            asked[row, at - 1] = True
    return TextBatch(ids, labels, asked)


def batches(
    drawn: Iterator[Text],
    seed: int,
    size: int,
    tokenizer: Tokenizer,
    pad: int,
    pool_size: int = POOL,
) -> Iterator[TextBatch]:
    """Endless training batches; pool_size: as of `groups`."""
    for group in groups(drawn, seed, size, lambda each: len(each.text), pool_size):
        yield encode(tokenizer, group, pad)


def groups(
    drawn: Iterator[T], seed: int, size: int, length: Callable[[T], int], pool_size: int = POOL
) -> Iterator[list[T]]:
    """Endless groups of texts of similar length, in random order.

    pool_size: groups drawn at once and sorted by length, so that little of them is padding; with 1
    every group has texts of all kinds.
    """
    order = random.Random(seed)
    while True:
        pool = sorted(itertools.islice(drawn, pool_size * size), key=length)
        found = [pool[i : i + size] for i in range(0, len(pool), size)]
        order.shuffle(found)
        yield from found


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nothing; a share of the highest rate."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def fit(
    model: Any,
    data: Iterable[TextBatch],
    *,
    steps: int,
    rate: float,
    other_weight: float,
    decay: float = 0.05,
    each_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a causal language model: AdamW on `steps` batches.

    rate: the highest learning rate. other_weight: of the words that aren't asked, in the loss; of
    those that are, 1. each_step: called with the number of steps done.
    """

    steps_of = iter(data)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        each_step(step)
        batch = next(steps_of)
        logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
        known = batch.labels >= 0
        losses = nn.functional.cross_entropy(logits[known], batch.labels[known], reduction="none")
        weight = torch.where(batch.asked[known], 1.0, other_weight)
        right = (logits.argmax(-1) == batch.labels)[batch.asked].float().mean()
        return (losses * weight).sum() / weight.sum(), right

    optimise(model.parameters(), loss, steps=steps, rate=rate, decay=decay)
    each_step(steps)


def optimise(
    trained: Iterable[nn.Parameter],
    loss_of: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    decay: float = 0.05,
) -> None:
    """AdamW for so many steps. rate: the highest learning rate. loss_of: the loss of a step, and
    the share that is right, which is printed."""
    parameters = list(trained)
    print(f"{sum(p.numel() for p in parameters):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    began = time.perf_counter()
    for step in range(steps):
        loss, right = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.perf_counter() - began
            print(f"{step:5d}  loss {loss.item():.4f}  right {right.item():.3f}  {spent:.0f} s",
                  flush=True)  # fmt: skip


def load(model_class: Any, folder: Path) -> tuple[Any, Tokenizer]:
    """A model of the zoo, computed in 32 bits whatever it is stored in, and its tokenizer."""
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def best_words(
    model: Any, tokenizer: Tokenizer, texts: list[Text], batch: int = 64
) -> Iterator[tuple[Text, list[str], list[str]]]:
    """For each text the words that are asked, and the most likely word in the place of each."""
    pad: int = model.config.pad_token_id or 0
    for i in range(0, len(texts), batch):
        group = texts[i : i + batch]
        encoded = encode(tokenizer, group, pad)
        with torch.no_grad():
            best: Tensor = model(input_ids=encoded.ids, use_cache=False).logits.argmax(-1)
        for row, text in enumerate(group):
            at = encoded.asked[row]
            wanted = [words.word_of(tokenizer, n) for n in encoded.labels[row][at].tolist()]
            found = [words.word_of(tokenizer, n) for n in best[row][at].tolist()]
            yield text, wanted, found


def evaluate_kinds(
    folder: Path, kinds: Iterable[str], drawn: Callable[[str], Iterator[Text]], n: int
) -> dict[str, Tally]:
    """The accuracy of a Llama on `n` different texts of each kind. drawn: the texts of a kind."""
    model, tokenizer = load(LlamaForCausalLM, folder)
    tallies = {kind: Tally() for kind in kinds}
    for kind, tally in tallies.items():
        for _, wanted, found in best_words(model, tokenizer, different(drawn(kind), n)):
            tally.add(wanted == found)
    return tallies


def different(drawn: Iterator[TextT], n: int) -> list[TextT]:
    """The first `n` different texts."""
    found: dict[str, TextT] = {}
    for text in drawn:
        found.setdefault(text.text, text)
        if len(found) == n:
            break
    return list(found.values())
