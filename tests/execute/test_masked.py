"""Files on a masked language model: every token sees every other, and there is no next token."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mechdsl

from ..families import tables
from ..families.build import VOCABULARY, model
from ..families.parts import Architecture
from ..reference import hooks
from ..shared_models import unchanged

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
WORDS = (*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY)))
IDS = {word: i for i, word in enumerate(WORDS)}
FIRST, SECOND = ["w11", "w12", "w13", "w14"], ["w21", "w22 w23", "w24"]
FILE = """\
mech 1
model bert = local("bert")
prompts p {
  a in ["w11", "w12", "w13", "w14"]
  b in ["w21", "w22 w23", "w24"]
  template "{a} {b} w9 [MASK] w8"
  answer " w5"
  wrong " w6"
  corrupt other { a = "w15" }
}
experiment e {
  model bert
  prompts p
  from clean into other
  patch SITE at a token, b token, "w8" token
  measure logit(answer) - logit(wrong) at "[MASK]" token as delta
}
"""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )


@cache
def masked_model() -> tuple[Architecture, nn.Module]:
    row = next(row for row in tables.every() if row.name == "bert")
    assert isinstance(row, Architecture)
    return row, unchanged(model(row))


@pytest.fixture
def bert() -> tuple[Architecture, nn.Module]:
    return masked_model()


def prompt(a: str, b: str) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """The prompt, positions by name, the position of the mask."""
    words = ["[CLS]", a, *b.split(), "w9", "[MASK]", "w8", "[SEP]"]
    ids = torch.tensor([[IDS[word] for word in words]])
    found = {"a token": 1, "b token": words.index("w9") - 1, '"w8" token': words.index("w8")}
    return {"input_ids": ids}, found, words.index("[MASK]")


@cache
def unpatched(layer: int, a: str, b: str) -> tuple[Tensor, dict[str, Tensor]]:
    row, module = masked_model()
    return hooks.run(row, module, prompt(a, b)[0], layer)


def by_hand(
    bert: tuple[Architecture, nn.Module], site: str, layer: int, position: str, a: str, b: str
) -> float:
    """The change of the logit difference at the mask by the patch."""
    row, module = bert
    _, places, mask = prompt(a, b)
    base, _, _ = prompt("w15", b)
    _, seen = unpatched(layer, a, b)
    vectors = enumerate(seen[site][places[position]])
    changes = [hooks.Change(places[position], unit, vector) for unit, vector in vectors]
    plain, _ = unpatched(layer, "w15", b)
    patched, _ = hooks.run(row, module, base, layer, site, changes)
    of = (patched - plain)[mask]
    return float(of[IDS["w5"]] - of[IDS["w6"]])


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "attn_out", "mlp_out", "k", "z"])
def test_masked_model_patches_equal_plain_hooks(
    bert: tuple[Architecture, nn.Module], tmp_path: Path, site: str
) -> None:
    path = tmp_path / "masked.mech"
    text = f"{site} layer * heads 0..3" if site in ("k", "z") else f"{site} layer *"
    path.write_text(FILE.replace("SITE", text), encoding="utf-8")
    result = mechdsl.run(path, models={"bert": (bert[1], tokenizer())})["e"]
    deltas = result.measures[0].patched - result.measures[0].base
    assert len(result.cells) == 6
    assert result.prompts == len(FIRST) * len(SECOND)
    largest = 0.0
    for cell, row in zip(result.cells, deltas, strict=True):
        layer, position = int(cell.coords["layer"]), str(cell.coords["position"])
        for a, b, delta in zip(result.row_values["a"], result.row_values["b"], row, strict=True):
            hand = by_hand(bert, site, layer, position, a, b)
            assert delta == pytest.approx(hand, abs=1e-4)
            largest = max(largest, abs(hand))
    assert largest > 0.02


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ("logit(answer)", "predicts tokens at their own position"),
        ('loss at "[MASK]" token', "no loss for tokens that it sees"),
    ],
)
def test_next_token_measures_of_a_masked_model_are_errors(
    bert: tuple[Architecture, nn.Module], tmp_path: Path, measure: str, said: str
) -> None:
    path = tmp_path / "masked.mech"
    text = FILE.replace("SITE", "resid_post layer 0")
    text = text.replace('logit(answer) - logit(wrong) at "[MASK]" token', measure)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(mechdsl.MechdslError, match="E0612") as found:
        mechdsl.run(path, models={"bert": (bert[1], tokenizer())})
    assert said in str(found.value)


def test_observed_attention_of_a_masked_model_covers_both_sides(
    bert: tuple[Architecture, nn.Module], tmp_path: Path
) -> None:
    """Distances count both sides, and tokens receive attention from all others, or from those at
    the given distances."""
    path = tmp_path / "masked.mech"
    head, _, _ = FILE.partition("  from clean")
    lines = """\
  observe distance pattern layer 1 head 2 at "[MASK]" token as far
  observe received pattern layer 1 head 2 at "[MASK]" token as paid
  observe received(2..3) pattern layer 1 head 2 at "[MASK]" token as near_by
}
"""
    path.write_text(head + lines, encoding="utf-8")
    results = mechdsl.run(path, models={"bert": (bert[1], tokenizer())})
    largest = 0.0
    for word in ("far", "paid", "near_by"):
        result = results[f"e.{word}"]
        rows = zip(result.row_values["a"], result.row_values["b"], strict=True)
        for (a, b), value in zip(rows, result.measures[0].patched[0], strict=True):
            seen, mask = unpatched(1, a, b)[1], prompt(a, b)[2]
            q, k = seen["q"][:, 2], seen["k"][:, 2]
            weights = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
            away = (torch.arange(len(weights)) - mask).abs()
            if word == "far":
                hand = float((weights[mask] * away).sum())
            else:
                there = away > 0 if word == "paid" else (away >= 2) & (away <= 3)
                hand = float(weights[there, mask].mean())
            assert value == pytest.approx(hand, abs=1e-4)
            largest = max(largest, abs(hand - float(weights[mask].sum())))
    assert largest > 0.5


INSERTED = """
direction v = saved("drawn.safetensors", "v")
direction w = saved("drawn.safetensors", "w")
experiment e {
  model bert
  prompts p
  from clean into longer
  set embed at inserted tokens to [v, w]
  measure logit(answer) - logit(wrong) at "[MASK]" token as raw
}
"""


@pytest.mark.parametrize(
    ("place", "index"), [('before "w9" token', -4), ("after last token", -1), ("before a token", 1)]
)
def test_inserted_tokens_have_the_written_embeddings(
    bert: tuple[Architecture, nn.Module], tmp_path: Path, place: str, index: int
) -> None:
    """The tokens are inserted between the special tokens at both ends."""
    _, module = bert
    text = FILE.split("experiment")[0]
    line = f'corrupt longer {{ insert 2 tokens {place} with " w7" }}'
    path = tmp_path / "masked.mech"
    path.write_text(text.replace('corrupt other { a = "w15" }', line) + INSERTED, "utf-8")
    words = cast("PreTrainedModel", module).get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    random = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(words.embedding_dim, generator=random) for name in "vw"}
    save_file(drawn, tmp_path / "drawn.safetensors")
    result = mechdsl.run(path, models={"bert": (module, tokenizer())})["e"]
    for n, (a, b) in enumerate(zip(result.row_values["a"], result.row_values["b"], strict=True)):
        ids = prompt(a, b)[0]["input_ids"][0]
        at = index % len(ids)
        for values, between in (
            (result.measures[0].base, words(torch.tensor([7, 7]))),
            (result.measures[0].patched, torch.stack([*drawn.values()])),
        ):
            given = torch.cat([words(ids[:at]), between, words(ids[at:])])
            with torch.no_grad():
                logits = module(inputs_embeds=given[None]).logits[0]
            mask = int((ids == IDS["[MASK]"]).nonzero()) + 2 * (index not in (-1,))
            expected = float(logits[mask, IDS["w5"]] - logits[mask, IDS["w6"]])
            assert values[0, n] == pytest.approx(expected, abs=1e-4)
