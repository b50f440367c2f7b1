"""Vectors that rules write at `inserted tokens`, which `insert 3 tokens before …` adds to prompts.

The reference is the bare model in 64 bits, which receives the embeddings of one unpadded prompt
with the vectors in between (`inputs_embeds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import (
    MODES,
    ROWS,
    Prompt,
    experiment,
    prompt,
    run_file,
    token,
    try_file,
    word_tokenizer,
    write_rows,
)
from ..quick import in_turn
from .models import bare, double

torch.set_num_threads(1)
FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3")
COUNT = 3
NAMES = "abc"
DIRECTIONS = "\n".join(f'direction {n} = saved("drawn.safetensors", "{n}")' for n in NAMES)
BLOCK = """
prompts p {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  corrupt other { subject = alt }
  corrupt longer { INSERT }
}
"""
INTO = ("prompts p", "from clean into longer")
SET = "set embed at inserted tokens to 2 * [a, b - a, c]"
MEASURE = "measure logit(answer) - logit(wrong) as raw"
PLACES: Mapping[str, Callable[[Prompt], int]] = {
    "before last token": lambda made: made.last,
    "after last token": lambda made: made.last + 1,
    "before first token": lambda made: 1,
    "before subject tokens": lambda made: made.subject[0],
    "after subject tokens": lambda made: made.subject[-1] + 1,
    "after item 1 token": lambda made: made.items[0] + 1,
}
"""Index of the first inserted token, by the position that a file names."""


def block(place: str = "before last token", more: str = "") -> str:
    insert = f'insert {COUNT} tokens {place} with " w7"'
    return f"{BLOCK.replace('INSERT', insert + more)}\n{DIRECTIONS}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def drawn(family: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    width = bare(family).config.hidden_size
    return {name: torch.randn(width, generator=random) for name in NAMES}


def written(family: str) -> Tensor:
    """The vectors of `SET`, [token, width]."""
    a, b, c = (each.double() for each in drawn(family).values())
    return 2 * torch.stack([a, b - a, c])


def embeddings(family: str, row: int, place: str, vectors: Tensor | None) -> Tensor:
    """[token, width] of a prompt with the vectors, or with placeholders."""
    made = prompt(ROWS[row])
    at, ids = PLACES[place](made), list(made.ids)
    with torch.no_grad():
        ids[at:at] = [token("w7")] * COUNT
        found = double(family).get_input_embeddings()(torch.tensor(ids))
    if vectors is not None:
        found[at : at + COUNT] = vectors
    return found


@torch.no_grad()
def logits(family: str, given: Tensor) -> Tensor:
    """[token, vocabulary] of one prompt."""
    return double(family)(inputs_embeds=given[None]).logits[0]


def difference(found: Tensor, row: int) -> float:
    return float(found[-1, token(ROWS[row]["a"])] - found[-1, token(ROWS[row]["b"])])


def result(
    *lines: str, folder: Path, family: str = "llama", mode: str = "planned", prompts: str = ""
) -> ExperimentResult:
    save_file(drawn(family), folder / "drawn.safetensors")
    text = experiment("e", *lines)
    return run_file(text, folder, bare(family), MODES[mode], prompts=prompts or block())["e"]


@pytest.mark.parametrize(("place", "family"), in_turn(tuple(PLACES), FAMILIES))
@pytest.mark.parametrize("mode", MODES)
def test_list_of_directions_is_written_at_inserted_tokens(
    mode: str, family: str, place: str, folder: Path
) -> None:
    """In prompts of different lengths."""
    found = result(*INTO, SET, MEASURE, folder=folder, family=family, mode=mode,
                   prompts=block(place))  # fmt: skip
    (measure,) = found.measures
    vectors, moved = written(family), 0.0
    for row in range(len(ROWS)):
        base = difference(logits(family, embeddings(family, row, place, None)), row)
        expected = difference(logits(family, embeddings(family, row, place, vectors)), row)
        assert measure.base[0, row] == pytest.approx(base, abs=1e-4)
        assert measure.patched[0, row] == pytest.approx(expected, abs=1e-4 + 1e-3 * abs(expected))
        moved = max(moved, abs(expected - base))
    assert moved > 1e-2
    (cell,) = found.cells
    assert (cell.site, cell.position) == ("embed", "inserted tokens")
    assert found.conventions["inserted in longer"].startswith(f'3 tokens {place} with " w7"')


@pytest.mark.parametrize("family", FAMILIES)
def test_one_direction_is_written_at_every_inserted_token(family: str, folder: Path) -> None:
    """In a sweep over factors; the factor 0 writes zeros."""
    lines = ("for f in [0, 1, 3] { set embed at inserted tokens to f * a }", MEASURE)
    found = result(*INTO, *lines, folder=folder, family=family)
    a = drawn(family)["a"].double()
    for cell, factor in enumerate((0, 1, 3)):
        for row in range(len(ROWS)):
            given = embeddings(family, row, "before last token", factor * a)
            expected = difference(logits(family, given), row)
            own = found.measures[0].patched[cell, row]
            assert own == pytest.approx(expected, abs=1e-4 + 1e-3 * abs(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_addition_adds_to_the_embeddings_of_placeholders(family: str, folder: Path) -> None:
    found = result(
        *INTO, "add [a, b, c] to embed at inserted tokens", MEASURE, folder=folder, family=family
    )
    vectors = torch.stack([each.double() for each in drawn(family).values()])
    for row in range(len(ROWS)):
        given = embeddings(family, row, "before last token", None)
        given[-1 - COUNT : -1] += vectors
        expected = difference(logits(family, given), row)
        own = found.measures[0].patched[0, row]
        assert own == pytest.approx(expected, abs=1e-4 + 1e-3 * abs(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_patch_reads_a_derived_run_with_inserted_vectors(
    mode: str, family: str, folder: Path
) -> None:
    """The patch writes the last token of the derived run into the clean run, which is shorter."""
    lines = (
        f"run filled {{ from clean into longer {SET} }}",
        "prompts p",
        "from filled into clean",
        "patch resid_post layer 2 at last token",
        MEASURE,
    )
    found = result(*lines, folder=folder, family=family, mode=mode)
    for row in range(len(ROWS)):
        given = embeddings(family, row, "before last token", written(family))
        expected = difference(logits(family, given), row)  # the last block, at the last token
        own = found.measures[0].patched[0, row]
        assert own == pytest.approx(expected, abs=1e-4 + 1e-3 * abs(expected))


TOKENS = 4


def reply(family: str, given: Tensor) -> list[int]:
    """The most likely tokens, from full forward passes over the prompt and the reply so far."""
    found: list[int] = []
    for _ in range(TOKENS):
        found.append(int(logits(family, given)[-1].argmax()))
        with torch.no_grad():
            newest = double(family).get_input_embeddings()(torch.tensor(found[-1:]))
        given = torch.cat([given, newest])
    return found


@pytest.mark.parametrize(("place", "family"), in_turn(tuple(PLACES), FAMILIES))
@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_replies_after_inserted_vectors_equal_the_reference(
    mode: str, family: str, place: str, folder: Path
) -> None:
    """Their keys and values stay in the cache of later steps."""
    found = result(*INTO, f"generate {TOKENS}", SET, "measure length as raw", folder=folder,
                   family=family, mode=mode, prompts=block(place))  # fmt: skip
    for row in range(len(ROWS)):
        for given, made in (
            (None, found.replies.runs["longer"]),
            (written(family), found.replies.cells[0]),
        ):
            ids = reply(family, embeddings(family, row, place, given))
            (text,) = (each.text for each in made[row])
            assert text.split() == word_tokenizer().convert_ids_to_tokens(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_attention_to_inserted_tokens_equals_the_reference(
    family: str, folder: Path
) -> None:
    lines = ("prompts p", "observe attention layer 1 heads * of longer from last token to "
             "inserted tokens as seen")  # fmt: skip
    found = result(*lines, folder=folder, family=family)
    model = double(family)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for row in range(len(ROWS)):
            given = embeddings(family, row, "before last token", None)
            with torch.no_grad():
                seen = model(inputs_embeds=given[None], output_attentions=True).attentions[1][0]
            expected = seen[:, -1, -1 - COUNT : -1].sum(-1).mean()
            own = found.measures[0].patched[:, row].mean()
            assert own == pytest.approx(float(expected), abs=1e-4)
    finally:
        model.set_attn_implementation(before)


def test_two_experiments_of_a_file_use_different_vectors(folder: Path) -> None:
    texts = [
        experiment(f"e{name}", *INTO, f"set embed at inserted tokens to {name}", MEASURE)
        for name in NAMES
    ]
    save_file(drawn("llama"), folder / "drawn.safetensors")
    together = run_file("".join(texts), folder, bare("llama"), prompts=block())
    for name, text in zip(NAMES, texts, strict=True):
        alone = run_file(text, folder, bare("llama"), prompts=block())[f"e{name}"]
        own = together[f"e{name}"].measures[0].patched
        assert own == pytest.approx(alone.measures[0].patched, abs=1e-5)
    assert together["ea"].measures[0].patched != pytest.approx(together["eb"].measures[0].patched)


def test_random_control_of_inserted_vectors_has_equal_norms_and_a_band(folder: Path) -> None:
    """Each vector is replaced by a random one of equal norm."""
    found = result(*INTO, SET, "against random(5, directions)", MEASURE, folder=folder)
    assert "of the same norm" in found.conventions["controls"]
    (band,) = found.controls
    assert band is not None
    assert band.high[0] - band.low[0] > 1e-3


INSERT = f'insert {COUNT} tokens before last token with " w7"'
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no place": (INSERT, 'insert 3 with " w7"', "E0101", "`tokens`"),
    "at": ("before last token", "at last token", "E0101", "`before`"),
    "no text": (' with " w7"', "", "E0207", "needs the text of its tokens"),
    "no number": ("insert 3 tokens before", "insert tokens before", "E0101", "a whole number"),
    "zero": ("insert 3", "insert 0", "E0515", "takes 1 to 1,000 tokens"),
    "too many": ("insert 3", "insert 1001", "E0515", "takes 1 to 1,000 tokens"),
    "several tokens": ('" w7"', '" w7 w8"', "E0207", "has 2 tokens"),
    "unknown word": ('" w7"', '" zebra"', "E0207", "vocabulary"),
    "white space": ('" w7"', '" "', "E0207", "white space"),
    "direction": ('" w7"', "c", "E0515", "a rule writes vectors"),
    "absent position": ("before last token", "before item 9 token", "E0309", "item 9"),
    "unknown span": ("before last token", "before subjct tokens", "E0308", "subject"),
    "repeated": ("corrupt other { subject", "inserted = 2 corrupt other { subject", "E0207",
                 "is the name of the inserted tokens"),
    "replaced later": (INSERT, f'{INSERT} replace subject tokens with " w3"', "E0207",
                       "write it before `insert`"),
    "fewer directions": ("[a, b - a, c]", "[a, b]", "E0341", "has 3 tokens"),
    "clean run": ("from clean into longer", "from longer into clean", "E0309", "inserted"),
    "replacement": (SET, 'replace subject tokens with " w3"', "E0108", "inserted tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_inserted_tokens_are_errors(name: str, folder: Path) -> None:
    old, new, code, said = MISTAKES[name]
    save_file(drawn("llama"), folder / "drawn.safetensors")
    text, prompts = experiment("e", *INTO, SET, MEASURE), block()
    assert old in text + prompts
    found, diagnostics = try_file(
        text.replace(old, new), folder, bare("llama"), prompts=prompts.replace(old, new)
    )
    errors = [each for each in diagnostics if each.severity == "error"]
    assert found is None
    assert errors[0].code == code, diagnostics
    assert said in f"{errors[0].message} {errors[0].label_text} {errors[0].help_text}"
