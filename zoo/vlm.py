"""Training and evaluation of the zoo's vision-language models: what they have in common."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mechdsl.images.pixels import Pixels
from zoo import language, pictures, words
from zoo.commands import Tally
from zoo.language import T

TOWER = re.compile(r"^(vision_tower\.)(?!vision_model\.)")
IMAGE, END = "<image>", "<end>"
SPECIAL: tuple[str, ...] = (*language.SPECIAL, END, IMAGE)
CELL = PATCH = 8  # pixels; a patch shows one cell of a grid
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow")
KINDS: tuple[str, ...] = ("circle", "square", "triangle", "cross")
NOTHING = "nothing"
THINGS: tuple[str, ...] = tuple(f"{c} {k}" for c in COLOURS for k in KINDS)
"""Shapes that images show."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} "
    "{% endfor %}{% endif %}"
    "{{ '<end> ' if message['role'] == 'assistant' else '' }}{% endfor %}"
)
MATCH_SCALE = 4


@dataclass(frozen=True)
class Turn:
    """A question about the images, and its answer. kind: its row in the table of accuracies."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """Images and turns about them."""

    images: tuple[Pixels, ...]
    turns: tuple[Turn, ...]
    contents: tuple[str, ...]
    """The words that describe each patch of all images, for the first steps of training."""
    told: tuple[str, ...] = ()
    """The word that a layer should return at each patch, for the first steps of training; empty at
    patches without one."""

    def text(self) -> str:
        """The prompt and all answers; images are not expanded."""
        turns = (f"{each.question} {each.answer} {END}" for each in self.turns)
        return " ".join((*[IMAGE] * len(self.images), *turns))


def choose(of: Sequence[T], random: Generator) -> T:
    """Draw one, all with equal probability."""
    return of[int(random.integers(len(of)))]


def llava_config(
    vocabulary: tuple[str, ...],
    *,
    side: int,
    width: int,
    layers: int,
    vision_layers: int,
    positions: int,
) -> LlavaConfig:
    """Configure a CLIP tower of width 96 and a Llama. side: of images, in pixels; width: of the
    stream of the Llama; layers: of the Llama."""
    text = language.llama_config(
        vocabulary, width=width, hidden=256, layers=layers, positions=positions
    )
    text.architectures = None
    text.eos_token_id = vocabulary.index(END)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=96,
        hidden_act="gelu",
    )
    tokens: dict[str, Any] = {
        "pad_token_id": vocabulary.index("<pad>"),
        "bos_token_id": vocabulary.index("<s>"),
        "eos_token_id": vocabulary.index(END),
    }
    return LlavaConfig(
        **tokens,
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary.index(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH) ** 2,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def build_tokenizer(vocabulary: tuple[str, ...]) -> Tokenizer:
    """Build the tokenizer, in which words are tokens."""
    return language.build_tokenizer(vocabulary, SPECIAL)


def save_rest(folder: Path, config: Any, vocabulary: tuple[str, ...]) -> None:
    """Write the tokenizer, the image processor and what joins them, and give the weights the names
    that they have in published models, which transformers 5.0 needs."""
    weights = folder / "model.safetensors"
    named = load_file(weights)
    save_file(
        {TOWER.sub(r"\1vision_model.", name): value for name, value in named.items()},
        weights,
        {"format": "pt"},
    )
    words.save_tokenizer(
        build_tokenizer(vocabulary),
        folder,
        longest=config.text_config.max_position_embeddings,
        end=END,
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE + "\n")
    side: int = config.vision_config.image_size
    pictures.save_processor(folder, "CLIPImageProcessor", crops=True, side=side)
    joined = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(joined, indent=2) + "\n")


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts with answers."""

    ids: Tensor  # [row, position]
    labels: Tensor  # [row, position], the next token of answers, -100 elsewhere
    mask: Tensor  # [row, position], 0 at padding
    pixels: Tensor  # [image, channel, height, width], from -1 to 1

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        parts = (self.ids, self.labels, self.mask, self.pixels)
        return Batch(*(each.to(device) for each in parts))


def encode(examples: Sequence[Example], tokenizer: Tokenizer) -> Batch:
    """Encode examples; each image becomes one token for each of its patches."""
    image, end, pad, asked = (
        words.token_of(tokenizer, each) for each in (IMAGE, END, "<pad>", "?")
    )
    images = [pixels for each in examples for pixels in each.images]
    patches = images[0].shape[0] // PATCH * (images[0].shape[1] // PATCH)
    rows: list[list[int]] = []
    for encoding in tokenizer.encode_batch([each.text() for each in examples]):
        row: list[int] = []
        for token in encoding.ids:
            row += [token] * (patches if token == image else 1)
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        is_answer = False
        for at, token in enumerate(row[:-1]):
            is_answer = (is_answer or token == asked) and token != end
            if is_answer:
                labels[number, at] = row[at + 1]
    return Batch(ids, labels, (ids != pad).long(), pictures.as_input(images))


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Run the model, [row, position, token]."""
    return model(
        input_ids=batch.ids,
        pixel_values=batch.pixels,
        attention_mask=batch.mask,
        use_cache=False,
    ).logits


@torch.no_grad()
def begin_with_matches(model: Any) -> None:
    """Let each token of a new Llama attend to similar ones: keys have the weights of queries, and
    both are larger than usual."""
    pictures.begin_alike(model)
    for layer in model.layers:
        layer.self_attn.q_proj.weight.mul_(MATCH_SCALE)
        layer.self_attn.k_proj.weight.mul_(MATCH_SCALE)


class Alignment:
    """An auxiliary loss of the first steps, instead of LLaVA's first stage of training: the vector
    that the projector returns for a patch is compared with the embeddings of all words, and should
    resemble those of the words that describe the patch."""

    def __init__(self, model: Any, tokenizer: Tokenizer, steps: int) -> None:
        self._embedding = model.get_input_embeddings()
        self._tokenizer = tokenizer
        self._steps = steps
        self._projected = torch.empty(0)
        model.model.multi_modal_projector.register_forward_hook(self._see)

    def _see(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self._projected = out

    def __call__(self, contents: Sequence[str], step: int) -> Tensor:
        """Return the loss, with a weight that falls to 0.

        contents: the words that describe each patch of all images; one word or two.
        """
        if step >= self._steps:
            return self._projected.new_zeros(())
        logits = self._projected.flatten(0, -2) @ self._embedding.weight.T
        found = [each.split(" ") for each in contents]
        lost = [
            nn.functional.cross_entropy(
                logits,
                torch.tensor(
                    [words.token_of(self._tokenizer, each[at]) for each in found],
                    device=logits.device,
                ),
            )
            for at in (0, -1)
        ]
        return (1 - step / self._steps) * (lost[0] + lost[1])


class Told:
    """An auxiliary loss of the first steps: a layer should return given words at patches, as the
    model's head reads its output."""

    def __init__(self, model: Any, tokenizer: Tokenizer, layer: int, steps: int) -> None:
        self._norm = model.model.language_model.norm
        self._head = model.lm_head
        self._tokenizer = tokenizer
        self._steps = steps
        self._hidden = torch.empty(0)
        model.model.language_model.layers[layer].register_forward_hook(self._see)

    def _see(self, module: nn.Module, given: Any, out: Any) -> None:
        self._hidden = out[0] if isinstance(out, tuple) else out

    def __call__(self, at_patches: Tensor, told: Sequence[str], step: int) -> Tensor:
        """Return the loss, with a weight that falls to 0.

        at_patches: the positions of all patches, [row, position]. told: the word of each patch;
        empty for none.
        """
        if step >= self._steps:
            return self._hidden.new_zeros(())
        logits = self._head(self._norm(self._hidden[at_patches]))
        wanted = [words.token_of(self._tokenizer, each) if each else -100 for each in told]
        lost = nn.functional.cross_entropy(logits, torch.tensor(wanted, device=logits.device))
        return (1 - step / self._steps) * lost


def train(
    config: Any,
    vocabulary: tuple[str, ...],
    data: Iterator[Example],
    *,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    aligned_steps: int,
    told_steps: int,
    told_layer: int = -1,
    device: str = "cpu",
) -> LlavaForConditionalGeneration:
    """Train a model on `steps` batches.

    aligned_steps: steps with the loss of `Alignment`.
    told_steps, told_layer: steps with the loss of `Told`, and the layer that it is about.
    device: where the model is trained; it is returned on the CPU.
    """
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    side = config.vision_config.image_size // PATCH
    pictures.begin_with_places(tower.embeddings.position_embedding.weight, side)
    begin_with_matches(model.model.language_model)
    model.to(device)
    tokenizer = build_tokenizer(vocabulary)
    alignment = Alignment(model, tokenizer, aligned_steps)
    told = Told(model, tokenizer, told_layer, told_steps)
    image = words.token_of(tokenizer, IMAGE)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        group = list(itertools.islice(data, batch))
        encoded = encode(group, tokenizer).to(device)
        lost, right = answer_loss(model, encoded)
        contents = [words for each in group for words in each.contents]
        named = [word for each in group for word in each.told]
        lost = lost + alignment(contents, step) + told(encoded.ids == image, named, step)
        return lost, right

    language.optimise(model.parameters(), loss, steps=steps, rate=rate)
    return model.cpu().eval()


def tune(
    model: Any,
    tokenizer: Tokenizer,
    data: Iterator[Example],
    *,
    steps: int,
    batch: int,
    rate: float,
) -> LlavaForConditionalGeneration:
    """Train all weights of a trained model on `steps` batches."""
    model.train()

    def loss(step: int) -> tuple[Tensor, Tensor]:
        return answer_loss(model, encode(list(itertools.islice(data, batch)), tokenizer))

    language.optimise(model.parameters(), loss, steps=steps, rate=rate)
    return model.eval()


def answer_loss(model: Any, encoded: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of the tokens of answers, and the share predicted right."""
    logits = logits_of(model, encoded)
    known = encoded.labels >= 0
    right = (logits.argmax(-1) == encoded.labels)[known].float().mean()
    return nn.functional.cross_entropy(logits[known], encoded.labels[known]), right


def answers(model: Any, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    """Answer the only question of each example by greedy generation.

    The answers are read from one pass over the true answers: up to the first wrong token, which is
    the last one returned, greedy generation gives the same.
    """
    found: list[str] = []
    for i in range(0, len(examples), 64):
        encoded = encode(examples[i : i + 64], tokenizer)
        with torch.no_grad():
            best = logits_of(model, encoded).argmax(-1)
        for own, wanted in zip(best, encoded.labels, strict=True):
            told = own[wanted >= 0].tolist()
            wrong = (own != wanted)[wanted >= 0].tolist()
            until = wrong.index(True) + 1 if True in wrong else len(told) - 1
            found.append(" ".join(words.word_of(tokenizer, token) for token in told[:until]))
    return found


def tally(model: Any, tokenizer: Tokenizer, examples: Sequence[Example]) -> Tally:
    """Count the examples whose only question gets its answer, to the last word."""
    told = answers(model, tokenizer, examples)
    right = [own == each.turns[0].answer for own, each in zip(told, examples, strict=True)]
    return Tally(sum(right), len(right))
