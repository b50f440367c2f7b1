"""The shipped induction model has its card's accuracy, with the two heads that it names."""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from mechdsl import zoo
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from zoo.induction.data import (
    MAX_LENGTH,
    MAX_OTHERS,
    WORDS,
    draw,
    is_held_out,
    repeat,
    repeats,
    stream,
    write,
)
from zoo.induction.evaluate import (
    EVERY_WORD,
    EXAMPLE_LENGTH,
    OF_THE_EXAMPLE,
    REPEATS,
    SEED,
    evaluate,
)
from zoo.induction.tokenizer import MAX_POSITIONS, build_tokenizer
from zoo.induction.train import WORKING_HEADS, model_config, renumber

FOLDER = Path(zoo.__path__[0]) / "induction"
PREVIOUS, INDUCTION = WORKING_HEADS  # of layer 0 and of layer 1


def test_induction_accuracy_on_held_out_halves() -> None:
    torch.set_num_threads(1)
    tallies = evaluate(FOLDER, 300, SEED)
    for name in (OF_THE_EXAMPLE, REPEATS, EVERY_WORD):
        assert tallies[name].n >= 300
        assert tallies[name].interval()[0] > 0.97, name


@cache
def patterns() -> list[Tensor]:
    """Mean attention patterns of 50 prompts as in the example, [head, query, key] per layer."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = [" ".join(e.words[:-1]) for e in islice(repeats(SEED, EXAMPLE_LENGTH), 50)]
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch(texts)])
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    return [layer.mean(0) for layer in layers]


def test_previous_token_head_attends_to_the_preceding_token() -> None:
    before = patterns()[0].diagonal(offset=-1, dim1=1, dim2=2)[:, 1:].mean(1)
    assert before.argmax() == PREVIOUS
    assert before[PREVIOUS] > 0.8
    assert before.sort().values[-2] < 0.3


def test_induction_head_attends_to_tokens_after_the_cue() -> None:
    after = patterns()[1][:, -1, [2, 2 + EXAMPLE_LENGTH]].sum(1)
    assert after.argmax() == INDUCTION
    assert after[INDUCTION] > 0.9
    assert after.sort().values[-2] < 0.4


def test_induction_words_are_plain_words_of_one_token() -> None:
    assert len(WORDS) == len(set(WORDS)) == 160
    tokenizer, problems = TextTokenizer.from_folder(FOLDER)
    assert tokenizer is not None
    assert problems == []
    assert tuple(tokenizer.plain_words()) == WORDS


def test_shipped_induction_tokenizer_equals_the_built_one() -> None:
    shipped = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert shipped.to_str() == build_tokenizer().to_str()
    assert shipped.encode("river moon quux").tokens == ["<s>", "river", "moon", "<unk>"]


def test_induction_training_and_held_out_halves_are_disjoint() -> None:
    trained = {e.half for e in islice(stream(0, held_out=False), 1000)}
    kept = [*islice(stream(0, held_out=True), 100), *islice(repeats(0, 6), 100)]
    assert all(is_held_out(example.half) for example in kept)
    assert not trained & {example.half for example in kept}


def test_induction_texts_depend_only_on_the_seed() -> None:
    assert draw(random.Random(3)) == draw(random.Random(3))


def test_induction_targets_are_determined_by_the_text() -> None:
    for example in islice(stream(1, held_out=False), 300):
        for place in example.targets:
            cue, earlier = example.words[place - 1], example.words[: place - 1]
            followers = {example.words[i + 1] for i, word in enumerate(earlier) if word == cue}
            assert followers == {example.words[place]}
        assert len(example.words) < MAX_POSITIONS
    assert 3 * (MAX_LENGTH + MAX_OTHERS) < MAX_POSITIONS


@pytest.mark.parametrize(
    ("others", "targets"),
    [
        (((), (), ()), (4, 5, 6, 7)),
        ((("x",), (), ()), (5, 6, 7, 8)),
        (((), ("x",), ()), (5, 6, 8)),
        (((), (), ("x",)), (4, 5, 8)),
    ],
)
def test_first_word_of_a_copy_is_a_target_if_the_text_determines_it(
    others: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], targets: tuple[int, ...]
) -> None:
    assert write(("a", "b", "c"), 2, others).targets == targets


def test_repeat_has_the_word_after_the_cue_as_target() -> None:
    example = repeat(("a", "b", "c"))
    assert example.text == "a b c a b c a b"
    assert example.targets == (7,)


def test_renumbering_heads_keeps_the_logits() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config()).eval()
    ids = torch.randint(3, 160, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        old = model.model.layers[0].self_attn.q_proj.weight.clone()
        renumber(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)
    new = model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(old, new)
    assert torch.equal(old.sort(0).values, new.sort(0).values)
